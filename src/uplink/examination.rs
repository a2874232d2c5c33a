//! What a broker really does, found out step by step with one test message after the other. Pure.
//!
//! Three visits: the first publishes and reads back, the second finds out whether session and Will were kept, the
//! third leaves nothing behind. Everything goes over one topic of its own, as a client of its own.
//!
//! Invariants: every step has a deadline; each check is told once, also when it was never reached; what was
//! retained is deleted, and a Will that fires is a zero-length retained message, which the broker does not keep.

use bytes::Bytes;

use super::packet::{ConnAck, Connect, Limits, Packet, Protocol, Publish, ReasonCode, Subscription, Will};
use crate::message::{PacketId, Qos, Topic};

/// How long the broker keeps a session that an interrupted examination leaves behind, in seconds (5.0).
const SESSION_EXPIRY_S: u32 = 120;
/// DISCONNECT that makes the broker publish the Will (MQTT 5.0 section 3.14.2.1).
const WITH_WILL: ReasonCode = ReasonCode(0x04);

/// What is examined and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which protocol is spoken.
    pub protocol: Protocol,
    /// Client Identifier: not the agent's, whose connection and session would end.
    pub client_id: String,
    /// The test topic.
    pub topic: Topic,
    /// Keep Alive, in seconds.
    pub keep_alive_s: u16,
    /// The largest packet taken, in bytes.
    pub max_packet_bytes: u32,
    /// User name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<String>,
    /// What the configuration cannot do without.
    pub needs: Needs,
    /// Unlike that of any other examination: it is part of the test messages.
    pub nonce: u64,
    /// How long CONNACK may take, in ms.
    pub connack_ms: u64,
    /// How long each later step may take, in ms.
    pub step_ms: u64,
}

/// What the configuration cannot do without. QoS 0 and 1 and a subscription are always needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// A point is sent at QoS 2.
    pub qos2: bool,
    /// A point is retained.
    pub retain: bool,
    /// A Will is registered.
    pub will: bool,
    /// Session Expiry Interval asked for, in seconds.
    pub session_expiry_s: u32,
    /// QoS 1 and 2 messages in flight.
    pub max_in_flight: u16,
}

/// One line of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Check {
    /// The host's name.
    Dns,
    /// The port.
    Tcp,
    /// Certificates and handshake.
    Tls,
    /// The answer to CONNECT.
    Connack,
    /// As announced.
    MaximumQos,
    /// As announced.
    ReceiveMaximum,
    /// As announced.
    MaximumPacketSize,
    /// As announced.
    RetainAvailable,
    /// As announced.
    ServerKeepAlive,
    /// As announced.
    SessionExpiry,
    /// SUBSCRIBE and the QoS granted.
    Subscribe,
    /// There and back at QoS 0.
    Qos0,
    /// There and back at QoS 1.
    Qos1,
    /// There and back at QoS 2.
    Qos2,
    /// Published, read back, deleted.
    Retain,
    /// Session Present on the second connection.
    Session,
    /// Taken with CONNECT, and published.
    Will,
    /// Nothing was left behind.
    TidyUp,
}

impl Check {
    /// Its name on screens.
    pub fn name(self) -> &'static str {
        match self {
            Check::Dns => "DNS",
            Check::Tcp => "TCP",
            Check::Tls => "TLS",
            Check::Connack => "CONNACK",
            Check::MaximumQos => "Maximum QoS",
            Check::ReceiveMaximum => "Receive Maximum",
            Check::MaximumPacketSize => "Maximum Packet Size",
            Check::RetainAvailable => "Retain Available",
            Check::ServerKeepAlive => "Server Keep Alive",
            Check::SessionExpiry => "Session Expiry Interval",
            Check::Subscribe => "Subscription",
            Check::Qos0 => "QoS 0",
            Check::Qos1 => "QoS 1",
            Check::Qos2 => "QoS 2",
            Check::Retain => "Retained message",
            Check::Session => "Session kept",
            Check::Will => "Will",
            Check::TidyUp => "Nothing left behind",
        }
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Good,
    /// Otherwise than one might expect, and the configuration can live with it.
    Noted,
    /// Not as the configuration needs it.
    Bad,
    /// Not reached.
    Untested,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub check: Check,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found, in words.
    pub text: String,
    /// What to try.
    pub advice: Option<String>,
}

/// What the caller does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Carry packets both ways until the deadline.
    Converse,
    /// Send what is out, close, and open a new connection: [`Examination::connect`].
    Reconnect,
    /// Send what is out and close: it is over.
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Visit {
    First,
    /// As the first, because CONNECT was refused and the Will may be why.
    WithoutWill,
    Second,
    Tidy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connack,
    Subscribe,
    Round(Qos),
    Retain,
    ReadBack,
    Delete,
    Will,
    Tidy,
    Left,
    Done,
}

/// The examination of one broker.
#[derive(Debug)]
pub struct Examination {
    settings: Settings,
    visit: Visit,
    phase: Phase,
    limits: Limits,
    began_ms: u64,
    deadline_ms: u64,
    next_id: u16,
    id: Option<PacketId>,
    acked: bool,
    echoed: bool,
    granted: Option<Qos>,
    /// A retained message may stand at the broker.
    retained: bool,
    /// Why the first CONNECT was refused.
    refusal: Option<Finding>,
    told: Vec<Check>,
    findings: Vec<Finding>,
    out: Vec<Packet>,
}

impl Examination {
    /// An examination that has not begun.
    pub fn new(settings: Settings) -> Self {
        // A session left by an interrupted one may still hold low identifiers.
        let next_id = (settings.nonce % 50_000) as u16 + 1;
        Examination {
            settings,
            visit: Visit::First,
            phase: Phase::Left,
            limits: Limits::default(),
            began_ms: 0,
            deadline_ms: 0,
            next_id,
            id: None,
            acked: false,
            echoed: false,
            granted: None,
            retained: false,
            refusal: None,
            told: Vec::new(),
            findings: Vec::new(),
            out: Vec::new(),
        }
    }

    /// A stream has been opened: CONNECT is the first packet out.
    pub fn connect(&mut self, now_ms: u64) {
        let settings = &self.settings;
        let tidy = self.visit == Visit::Tidy;
        let will = (settings.needs.will && self.visit == Visit::First).then(|| Will {
            topic: settings.topic.clone(),
            payload: Bytes::new(),
            qos: Qos::AtLeastOnce,
            retain: true,
        });
        let connect = Connect {
            client_id: settings.client_id.clone(),
            clean: tidy,
            keep_alive_s: settings.keep_alive_s,
            session_expiry_s: if tidy { 0 } else { SESSION_EXPIRY_S },
            receive_max: 16,
            max_packet_bytes: settings.max_packet_bytes,
            will,
            username: settings.username.clone(),
            password: settings.password.clone(),
        };
        self.out.push(Packet::Connect(Box::new(connect)));
        self.phase = Phase::Connack;
        self.wait(now_ms, self.settings.connack_ms);
    }

    /// What is to be sent.
    pub fn take_out(&mut self) -> Vec<Packet> {
        std::mem::take(&mut self.out)
    }

    /// What was found since it was last asked.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings)
    }

    /// When [`Examination::on_tick`] is due at the latest, in ms.
    pub fn deadline_ms(&self) -> u64 {
        self.deadline_ms
    }

    /// What the caller does next.
    pub fn next(&self) -> Next {
        match self.phase {
            Phase::Left => Next::Reconnect,
            Phase::Done => Next::Done,
            _ => Next::Converse,
        }
    }

    /// A packet came.
    pub fn on_packet(&mut self, packet: Packet, now_ms: u64) {
        match packet {
            Packet::ConnAck(connack) if self.phase == Phase::Connack => self.on_connack(connack, now_ms),
            Packet::Publish(publish) => self.on_publish(&publish, now_ms),
            Packet::PubRel(id, _) => self.out.push(Packet::PubComp(id, ReasonCode::SUCCESS)),
            Packet::SubAck(id, codes) if self.id == Some(id) => self.on_suback(&codes, now_ms),
            Packet::PubRec(id, reason) if !reason.is_error() => {
                self.out.push(Packet::PubRel(id, ReasonCode::SUCCESS));
            }
            Packet::PubAck(id, reason) | Packet::PubRec(id, reason) | Packet::PubComp(id, reason)
                if self.id == Some(id) =>
            {
                self.on_ack(reason, now_ms);
            }
            Packet::Disconnect(reason) => {
                let words = words(reason);
                self.on_end(&format!("the broker ended the connection: {words}"), now_ms);
            }
            _ => {}
        }
    }

    /// The connection ended, or could not be opened again.
    pub fn on_end(&mut self, why: &str, now_ms: u64) {
        if matches!(self.phase, Phase::Done) {
            return;
        }
        let advice = "the broker's log says why; clouds hang up on a client id or topic that their policy does not allow";
        match (self.visit, self.phase) {
            (Visit::Tidy, _) => self.not_tidy(why),
            (_, Phase::Connack | Phase::Left) => {
                let text = format!("no CONNACK: {why}");
                self.refused(text, Some(format!("{advice}; --client-id chooses another id")), now_ms);
            }
            (_, phase) => {
                self.bad(check_of(phase), why.to_owned(), Some(advice.to_owned()));
                self.leave(Visit::Tidy);
            }
        }
    }

    /// Time has passed.
    pub fn on_tick(&mut self, now_ms: u64) {
        if now_ms < self.deadline_ms {
            return;
        }
        let seconds = self.deadline_ms.saturating_sub(self.began_ms) / 1000;
        match self.phase {
            Phase::Connack if self.visit == Visit::Tidy => {
                self.not_tidy(&format!("no CONNACK within {seconds} s"))
            }
            Phase::Connack => {
                let text = format!("no CONNACK within {seconds} s");
                self.refused(
                    text,
                    Some("is this an MQTT broker's port, and the right one for TLS?".into()),
                    now_ms,
                );
            }
            Phase::Tidy => self.not_tidy(&format!("the deletion was not acknowledged within {seconds} s")),
            Phase::Left | Phase::Done => {}
            phase => {
                self.too_late(phase, seconds);
                self.go_on(phase, now_ms);
            }
        }
    }

    fn too_late(&mut self, phase: Phase, seconds: u64) {
        let topic = &self.settings.topic;
        let rights = format!(
            "may this user publish to {topic} and subscribe to it? Some brokers drop silently what is forbidden"
        );
        match phase {
            Phase::Subscribe => {
                self.bad(Check::Subscribe, format!("no SUBACK within {seconds} s"), Some(rights))
            }
            Phase::Will => self.missing(
                self.settings.needs.will,
                Check::Will,
                format!("CONNECT with it was accepted, but it was not published within {seconds} s"),
                Some(rights),
            ),
            phase => {
                let what = match (self.acked, phase) {
                    (false, Phase::Round(Qos::ExactlyOnce)) => "no PUBREC and PUBCOMP",
                    (false, _) => "no PUBACK",
                    (true, Phase::Round(Qos::AtMostOnce)) => "it did not come back",
                    (true, Phase::ReadBack) => "it is not handed out to who subscribes later",
                    (true, _) => "it was acknowledged, but did not come back",
                };
                let check = check_of(phase);
                self.missing(self.needed(check), check, format!("{what} within {seconds} s"), Some(rights));
            }
        }
    }

    fn on_connack(&mut self, connack: ConnAck, now_ms: u64) {
        if connack.reason.is_error() {
            let said = connack.reason_string.map(|said| format!("; it says: {said:?}")).unwrap_or_default();
            let text = format!("refused: {}{said}", words(connack.reason));
            return match self.visit {
                Visit::Tidy => self.not_tidy(&text),
                _ => self.refused(text, connack_advice(connack.reason, &self.settings.username), now_ms),
            };
        }
        let took = now_ms.saturating_sub(self.began_ms);
        match self.visit {
            Visit::First | Visit::WithoutWill => {
                self.limits = connack.limits;
                let id = &self.settings.client_id;
                self.good(Check::Connack, format!("accepted as {id:?} in {took} ms"));
                if self.visit == Visit::WithoutWill
                    && let Some(refusal) = self.refusal.take()
                {
                    let text =
                        format!("CONNECT with a Will is not accepted, without one it is: {}", refusal.text);
                    let advice =
                        format!("allow this user {}, or set [broker] will = false", self.settings.topic);
                    self.bad(Check::Will, text, Some(advice));
                }
                self.announced();
                self.phase = Phase::Subscribe;
                self.subscribe(now_ms);
            }
            Visit::Second => self.on_second(connack.session_present, now_ms),
            Visit::Tidy if self.retained => {
                self.phase = Phase::Tidy;
                self.publish(self.qos_at_most(Qos::AtLeastOnce), true, Bytes::new(), now_ms);
                self.settle(now_ms);
            }
            Visit::Tidy => self.tidy(),
        }
    }

    /// What CONNACK says of the broker's limits (MQTT 5.0 section 3.2.2.3). 3.1.1 announces nothing.
    fn announced(&mut self) {
        if self.settings.protocol == Protocol::V311 {
            return;
        }
        let (limits, needs) = (self.limits, self.settings.needs);
        match limits.max_qos.unwrap_or(2) {
            2 => self.good(Check::MaximumQos, "2".into()),
            1 => {
                let advice =
                    "QoS 2 is sent as QoS 1: set qos = 1, or take a broker that has QoS 2".to_owned();
                self.missing(needs.qos2, Check::MaximumQos, "1".into(), Some(advice));
            }
            _ => self.bad(
                Check::MaximumQos,
                "0: nothing is acknowledged, so messages will be lost".into(),
                Some("take a broker that has QoS 1".into()),
            ),
        }
        let receive_max = limits.receive_max.unwrap_or(u16::MAX);
        match receive_max < needs.max_in_flight {
            true => self.noted(
                Check::ReceiveMaximum,
                format!(
                    "{receive_max}: below the configured max_in_flight of {}, and obeyed",
                    needs.max_in_flight
                ),
            ),
            false => self.good(Check::ReceiveMaximum, receive_max.to_string()),
        }
        match limits.max_packet_bytes {
            None => self.good(Check::MaximumPacketSize, "no limit announced".into()),
            Some(bytes) => self.noted(
                Check::MaximumPacketSize,
                format!("{bytes} bytes: a larger message is not sent and becomes a dead letter"),
            ),
        }
        match (limits.retain_available.unwrap_or(true), needs) {
            (true, _) => self.good(Check::RetainAvailable, "yes".into()),
            (false, Needs { will: true, .. }) => self.bad(
                Check::RetainAvailable,
                "no, and the Will is a retained message".into(),
                Some("set [broker] will = false".into()),
            ),
            (false, Needs { retain, .. }) => self.missing(
                retain,
                Check::RetainAvailable,
                "no: retained messages are sent without the flag".into(),
                Some("remove retain = true from the points".into()),
            ),
        }
        match limits.keep_alive_s {
            Some(seconds) if seconds != self.settings.keep_alive_s => {
                let configured = self.settings.keep_alive_s;
                self.noted(
                    Check::ServerKeepAlive,
                    format!("{seconds} s instead of {configured} s, and obeyed"),
                );
            }
            _ => {
                self.good(Check::ServerKeepAlive, format!("{} s, as configured", self.settings.keep_alive_s))
            }
        }
        match limits.session_expiry_s {
            Some(kept) if kept < SESSION_EXPIRY_S => self.missing(
                needs.qos2,
                Check::SessionExpiry,
                format!(
                    "{kept} s instead of {} s: an outage that lasts longer costs the session",
                    needs.session_expiry_s
                ),
                Some("raise the broker's limit for sessions".into()),
            ),
            // The examination asks for little itself, so more than that cannot be seen.
            _ => self.good(Check::SessionExpiry, format!("the {SESSION_EXPIRY_S} s asked for here")),
        }
    }

    fn subscribe(&mut self, now_ms: u64) {
        let id = self.fresh_id();
        self.id = Some(id);
        self.acked = false;
        self.echoed = false;
        let filter = self.settings.topic.as_str().to_owned();
        let subscription = Subscription { filter, qos: Qos::ExactlyOnce, retained: true };
        self.out.push(Packet::Subscribe(id, vec![subscription]));
        self.wait(now_ms, self.settings.step_ms);
    }

    fn on_suback(&mut self, codes: &[ReasonCode], now_ms: u64) {
        let code = codes.first().copied().unwrap_or(ReasonCode::UNSPECIFIED_ERROR);
        if self.phase == Phase::ReadBack {
            self.acked = true;
            return self.settle(now_ms);
        }
        let topic = self.settings.topic.clone();
        self.granted = Qos::from_number(code.0.into()).filter(|_| !code.is_error());
        match self.granted {
            Some(Qos::ExactlyOnce) => self.good(Check::Subscribe, format!("{topic} granted at QoS 2")),
            Some(qos) => self.noted(Check::Subscribe, format!("{topic} granted at {qos} instead of QoS 2")),
            None => self.bad(
                Check::Subscribe,
                format!("{topic} refused: {}", words(code)),
                Some(format!(
                    "allow this user to subscribe to {topic} and the other topics below its base topic"
                )),
            ),
        }
        self.round(Qos::AtMostOnce, now_ms);
    }

    fn round(&mut self, qos: Qos, now_ms: u64) {
        self.phase = Phase::Round(qos);
        if self.qos_at_most(qos) != qos {
            let check = check_of(self.phase);
            self.missing(self.needed(check), check, "the broker does not have it (Maximum QoS)".into(), None);
            return self.go_on(self.phase, now_ms);
        }
        let payload = self.payload(qos);
        self.publish(qos, false, payload, now_ms);
        self.settle(now_ms);
    }

    fn payload(&self, qos: Qos) -> Bytes {
        format!("fieldpost broker test {:016x} {qos}", self.settings.nonce).into()
    }

    fn publish(&mut self, qos: Qos, retain: bool, payload: Bytes, now_ms: u64) {
        let id = (qos != Qos::AtMostOnce).then(|| self.fresh_id());
        self.id = id;
        self.acked = id.is_none();
        // Nobody to hear it: the acknowledgement has to do.
        self.echoed = self.granted.is_none() || self.visit == Visit::Tidy;
        let publish = Publish {
            dup: false,
            qos,
            retain,
            topic: self.settings.topic.clone(),
            id,
            payload,
            message_expiry_s: None,
            response_topic: None,
            correlation_data: None,
        };
        self.out.push(Packet::Publish(Box::new(publish)));
        self.wait(now_ms, self.settings.step_ms);
    }

    fn on_publish(&mut self, publish: &Publish, now_ms: u64) {
        match (publish.qos, publish.id) {
            (Qos::AtLeastOnce, Some(id)) => self.out.push(Packet::PubAck(id, ReasonCode::SUCCESS)),
            (Qos::ExactlyOnce, Some(id)) => self.out.push(Packet::PubRec(id, ReasonCode::SUCCESS)),
            _ => {}
        }
        if publish.topic != self.settings.topic {
            return;
        }
        let is = |qos| publish.payload == self.payload(qos);
        let ours = match self.phase {
            Phase::Round(qos) => is(qos),
            // The first copy is the subscription's; the one asked for says that it was kept.
            Phase::ReadBack => publish.retain && is(self.qos_at_most(Qos::AtLeastOnce)),
            Phase::Delete | Phase::Will => publish.payload.is_empty(),
            _ => false,
        };
        if ours {
            self.echoed = true;
            self.settle(now_ms);
        }
    }

    fn on_ack(&mut self, reason: ReasonCode, now_ms: u64) {
        self.id = None;
        if !reason.is_error() {
            self.acked = true;
            return self.settle(now_ms);
        }
        let phase = self.phase;
        if phase == Phase::Tidy {
            return self.not_tidy(&format!("the deletion was refused: {}", words(reason)));
        }
        if phase == Phase::Retain {
            self.retained = false;
        }
        let check = check_of(phase);
        let advice = format!("allow this user to publish to {}", self.settings.topic);
        self.missing(self.needed(check), check, format!("refused: {}", words(reason)), Some(advice));
        self.go_on(phase, now_ms);
    }

    /// Whether the step is done, and what follows.
    fn settle(&mut self, now_ms: u64) {
        let took = now_ms.saturating_sub(self.began_ms);
        let seen = self.granted.is_some();
        match self.phase {
            Phase::Retain if self.acked => self.go_on(Phase::Retain, now_ms),
            phase if !self.acked || !self.echoed => debug_assert!(phase != Phase::Done),
            Phase::Round(Qos::AtMostOnce) if !seen => {
                self.noted(Check::Qos0, "sent; without a subscription nothing says that it arrived".into());
                self.go_on(self.phase, now_ms);
            }
            Phase::Round(_) => {
                let text = if seen { "there and back" } else { "acknowledged" };
                self.good(check_of(self.phase), format!("{text} in {took} ms"));
                self.go_on(self.phase, now_ms);
            }
            Phase::ReadBack => self.go_on(Phase::ReadBack, now_ms),
            Phase::Delete => {
                self.retained = false;
                let text = if seen { "published, read back, deleted" } else { "published and deleted" };
                self.good(Check::Retain, text.into());
                self.go_on(Phase::Delete, now_ms);
            }
            Phase::Will => {
                self.good(Check::Will, format!("accepted with CONNECT, published after {took} ms"));
                self.go_on(Phase::Will, now_ms);
            }
            Phase::Tidy => self.tidy(),
            Phase::Connack | Phase::Subscribe | Phase::Retain | Phase::Left | Phase::Done => {}
        }
    }

    /// What comes after a step, however it came out.
    fn go_on(&mut self, phase: Phase, now_ms: u64) {
        match phase {
            Phase::Subscribe => self.round(Qos::AtMostOnce, now_ms),
            Phase::Round(Qos::AtMostOnce) => self.round(Qos::AtLeastOnce, now_ms),
            Phase::Round(Qos::AtLeastOnce) => self.round(Qos::ExactlyOnce, now_ms),
            Phase::Round(Qos::ExactlyOnce) if self.limits.retain_available == Some(false) => {
                self.noted(Check::Retain, "the broker keeps none (Retain Available)".into());
                self.leave_with_will();
            }
            Phase::Round(Qos::ExactlyOnce) => {
                self.phase = Phase::Retain;
                self.retained = true;
                let qos = self.qos_at_most(Qos::AtLeastOnce);
                self.publish(qos, true, self.payload(qos), now_ms);
                self.settle(now_ms);
            }
            // Refused or unheard of: there is nothing to read back.
            Phase::Retain if self.told.contains(&Check::Retain) => self.leave_with_will(),
            Phase::Retain if self.granted.is_some() => {
                self.phase = Phase::ReadBack;
                self.subscribe(now_ms);
            }
            Phase::Retain | Phase::ReadBack => {
                self.phase = Phase::Delete;
                self.publish(self.qos_at_most(Qos::AtLeastOnce), true, Bytes::new(), now_ms);
                self.settle(now_ms);
            }
            Phase::Delete => self.leave_with_will(),
            Phase::Will | Phase::Connack | Phase::Tidy | Phase::Left | Phase::Done => {
                self.out.push(Packet::Disconnect(ReasonCode::SUCCESS));
                self.leave(Visit::Tidy);
            }
        }
    }

    /// So that the Will is published: 3.1.1 has no other way than to hang up.
    fn leave_with_will(&mut self) {
        if self.settings.protocol == Protocol::V5 {
            self.out.push(Packet::Disconnect(WITH_WILL));
        }
        self.leave(Visit::Second);
    }

    fn on_second(&mut self, present: bool, now_ms: u64) {
        match present {
            true => self.good(Check::Session, "present on the second connection".into()),
            false => self.missing(
                self.settings.needs.qos2,
                Check::Session,
                "the broker has forgotten the session between two connections: what is in flight when a link breaks \
                 may arrive twice"
                    .into(),
                Some("let the broker keep sessions, for this client id too".into()),
            ),
        }
        let expected = self.settings.needs.will && !self.told.contains(&Check::Will);
        if expected && present && self.granted.is_some_and(|qos| qos != Qos::AtMostOnce) {
            self.phase = Phase::Will;
            self.acked = true;
            self.echoed = false;
            return self.wait(now_ms, self.settings.step_ms);
        }
        if expected {
            let text = "accepted with CONNECT; whether it is published could not be seen";
            self.noted(Check::Will, text.into());
        }
        self.go_on(Phase::Will, now_ms);
    }

    /// CONNECT was not accepted.
    fn refused(&mut self, text: String, advice: Option<String>, _now_ms: u64) {
        match self.visit {
            Visit::First if self.settings.needs.will => {
                self.refusal = Some(Finding { check: Check::Connack, outcome: Outcome::Bad, text, advice });
                self.leave(Visit::WithoutWill);
            }
            Visit::First | Visit::WithoutWill => {
                // Of two refusals the first is the one of the CONNECT that the agent sends.
                let finding = self.refusal.take();
                let (text, advice) = finding.map_or((text, advice), |finding| (finding.text, finding.advice));
                self.bad(Check::Connack, text, advice);
                self.finish();
            }
            Visit::Second => {
                self.bad(Check::Session, format!("the second connection failed: {text}"), advice);
                self.leave(Visit::Tidy);
            }
            Visit::Tidy => self.not_tidy(&text),
        }
    }

    fn leave(&mut self, visit: Visit) {
        self.visit = visit;
        self.phase = Phase::Left;
        self.id = None;
    }

    fn tidy(&mut self) {
        self.good(Check::TidyUp, "session removed, nothing retained".into());
        self.out.push(Packet::Disconnect(ReasonCode::SUCCESS));
        self.finish();
    }

    fn not_tidy(&mut self, why: &str) {
        let topic = &self.settings.topic;
        let left = match self.retained {
            true => format!("; a retained message may stand at {topic} (`fieldpost retained clear {topic}`)"),
            false => String::new(),
        };
        let text = format!("could not be made sure of: {why}; the session ends by itself{left}");
        self.noted(Check::TidyUp, text);
        self.finish();
    }

    /// What was never reached is said to be so.
    fn finish(&mut self) {
        self.phase = Phase::Done;
        let all = [
            Check::Subscribe,
            Check::Qos0,
            Check::Qos1,
            Check::Qos2,
            Check::Retain,
            Check::Session,
            Check::Will,
        ];
        for check in all {
            let wanted = check != Check::Will || self.settings.needs.will;
            if wanted && !self.told.contains(&check) {
                self.tell(check, Outcome::Untested, "not reached".into(), None);
            }
        }
    }

    fn wait(&mut self, now_ms: u64, ms: u64) {
        self.began_ms = now_ms;
        self.deadline_ms = now_ms + ms;
    }

    fn fresh_id(&mut self) -> PacketId {
        self.next_id = self.next_id % u16::MAX + 1;
        PacketId::new(self.next_id).expect("one more than a remainder is never zero")
    }

    fn qos_at_most(&self, qos: Qos) -> Qos {
        let most = Qos::from_number(self.limits.max_qos.unwrap_or(2).into()).unwrap_or(Qos::ExactlyOnce);
        qos.min(most)
    }

    fn needed(&self, check: Check) -> bool {
        match check {
            Check::Qos2 => self.settings.needs.qos2,
            Check::Retain => self.settings.needs.retain || self.settings.needs.will,
            _ => true,
        }
    }

    fn good(&mut self, check: Check, text: String) {
        self.tell(check, Outcome::Good, text, None);
    }

    fn noted(&mut self, check: Check, text: String) {
        self.tell(check, Outcome::Noted, text, None);
    }

    fn bad(&mut self, check: Check, text: String, advice: Option<String>) {
        self.tell(check, Outcome::Bad, text, advice);
    }

    fn missing(&mut self, needed: bool, check: Check, text: String, advice: Option<String>) {
        self.tell(check, if needed { Outcome::Bad } else { Outcome::Noted }, text, advice);
    }

    fn tell(&mut self, check: Check, outcome: Outcome, text: String, advice: Option<String>) {
        // A later step of a check that has failed adds nothing.
        if !self.told.contains(&check) {
            self.told.push(check);
            self.findings.push(Finding { check, outcome, text, advice });
        }
    }
}

fn check_of(phase: Phase) -> Check {
    match phase {
        Phase::Connack => Check::Connack,
        Phase::Subscribe => Check::Subscribe,
        Phase::Round(Qos::AtMostOnce) => Check::Qos0,
        Phase::Round(Qos::AtLeastOnce) => Check::Qos1,
        Phase::Round(Qos::ExactlyOnce) => Check::Qos2,
        Phase::Retain | Phase::ReadBack | Phase::Delete => Check::Retain,
        Phase::Will => Check::Will,
        Phase::Tidy | Phase::Left | Phase::Done => Check::TidyUp,
    }
}

fn words(reason: ReasonCode) -> String {
    format!("{} (0x{:02X})", reason.name(), reason.0)
}

fn connack_advice(reason: ReasonCode, username: &Option<String>) -> Option<String> {
    let advice = match (reason.0, username) {
        (0x84, _) => "set [broker] protocol to the other one",
        (0x85, _) => "the broker does not allow this client id; --client-id chooses one that it authorises",
        (0x86 | 0x87, Some(_)) => {
            "check [broker] username and password_file; clouds authorise client ids too: --client-id chooses one"
        }
        (0x86 | 0x87, None) => {
            "no [broker] username is set; clouds authorise client ids too: --client-id chooses one"
        }
        (0x8A, _) => "ask the broker's owner",
        (0x9A | 0x9B, _) => "set [broker] will = false",
        _ => return None,
    };
    Some(advice.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(protocol: Protocol) -> Settings {
        Settings {
            protocol,
            client_id: "g1-test".into(),
            topic: Topic::new("fieldpost/g1/test").unwrap(),
            keep_alive_s: 30,
            max_packet_bytes: 1 << 18,
            username: None,
            password: None,
            needs: Needs { qos2: true, retain: true, will: true, session_expiry_s: 600, max_in_flight: 100 },
            nonce: 7,
            connack_ms: 20_000,
            step_ms: 5_000,
        }
    }

    fn connack(limits: Limits) -> Packet {
        Packet::ConnAck(ConnAck {
            session_present: false,
            reason: ReasonCode::SUCCESS,
            reason_string: None,
            limits,
        })
    }

    fn outcome(findings: &[Finding], check: Check) -> Option<Outcome> {
        findings.iter().find(|finding| finding.check == check).map(|finding| finding.outcome)
    }

    /// Lets time run until it is over; every connection is accepted and nothing else is ever answered.
    fn against_silence(limits: Limits) -> Vec<Finding> {
        let mut examination = Examination::new(settings(Protocol::V5));
        let (mut findings, mut now_ms) = (Vec::new(), 0);
        for _ in 0..100 {
            match examination.next() {
                Next::Done => return findings,
                Next::Reconnect => {
                    examination.connect(now_ms);
                    examination.on_packet(connack(limits), now_ms);
                }
                Next::Converse => {
                    now_ms = examination.deadline_ms();
                    examination.on_tick(now_ms);
                }
            }
            findings.extend(examination.take_findings());
        }
        panic!("it never ends: {findings:?}");
    }

    #[test]
    fn a_broker_that_answers_nothing_costs_a_deadline_for_each_step_and_every_check_is_told_once() {
        let findings = against_silence(Limits::default());
        let mut checks: Vec<Check> = findings.iter().map(|finding| finding.check).collect();
        checks.sort();
        let told = checks.len();
        checks.dedup();
        assert_eq!(checks.len(), told, "{findings:?}");
        for check in [Check::Subscribe, Check::Qos1, Check::Qos2, Check::Retain, Check::Session] {
            assert_eq!(outcome(&findings, check), Some(Outcome::Bad), "{check:?} in {findings:?}");
        }
        assert_eq!(outcome(&findings, Check::TidyUp), Some(Outcome::Noted), "a deletion nobody confirmed");
    }

    #[test]
    fn limits_are_bad_only_where_the_configuration_needs_more() {
        let limits = Limits { max_qos: Some(1), retain_available: Some(false), ..Limits::default() };
        for (qos2, retain, will, qos, kept) in [
            (true, true, true, Outcome::Bad, Outcome::Bad),
            (false, false, true, Outcome::Noted, Outcome::Bad),
            (false, true, false, Outcome::Noted, Outcome::Bad),
            (false, false, false, Outcome::Noted, Outcome::Noted),
        ] {
            let mut settings = settings(Protocol::V5);
            settings.needs = Needs { qos2, retain, will, ..settings.needs };
            let mut examination = Examination::new(settings);
            examination.connect(0);
            examination.on_packet(connack(limits), 1);
            let findings = examination.take_findings();
            assert_eq!(outcome(&findings, Check::MaximumQos), Some(qos));
            assert_eq!(outcome(&findings, Check::RetainAvailable), Some(kept));
        }
    }

    #[test]
    fn a_refused_connect_is_tried_without_the_will_and_then_it_is_over() {
        let mut examination = Examination::new(settings(Protocol::V5));
        let mut wills = Vec::new();
        while examination.next() == Next::Reconnect {
            examination.connect(0);
            for packet in examination.take_out() {
                let Packet::Connect(connect) = packet else { panic!("{packet:?}") };
                wills.push(connect.will.is_some());
            }
            let refusal = ConnAck {
                session_present: false,
                reason: ReasonCode::NOT_AUTHORIZED,
                reason_string: Some("go away".into()),
                limits: Limits::default(),
            };
            examination.on_packet(Packet::ConnAck(refusal), 1);
        }
        assert_eq!(wills, [true, false]);
        let findings = examination.take_findings();
        assert_eq!(outcome(&findings, Check::Connack), Some(Outcome::Bad));
        assert!(findings[0].text.contains("Not authorized (0x87); it says: \"go away\""), "{findings:?}");
        assert_eq!(outcome(&findings, Check::Qos2), Some(Outcome::Untested));
    }

    #[test]
    fn a_will_that_fires_leaves_nothing_at_the_broker() {
        let mut examination = Examination::new(settings(Protocol::V311));
        examination.connect(0);
        let Some(Packet::Connect(connect)) = examination.take_out().pop() else { panic!("a CONNECT") };
        let will = connect.will.expect("the configuration has one");
        assert!(will.retain && will.payload.is_empty(), "{will:?}");
    }
}
