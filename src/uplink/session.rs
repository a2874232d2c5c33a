//! The MQTT delivery state machine: QoS 0, 1 and 2, both ways, MQTT 5.0 and 3.1.1.
//!
//! One [`Session`] serves one connection. Packets, commits and `now` go in; packets to send, changes to
//! commit and events come out. It knows no socket, no clock and no database.
//!
//! Invariants (design, delivery; MQTT 5.0 section 4.3 and 4.4):
//! - a packet that depends on a change is *gated*: it leaves after the commit that holds the change;
//! - nothing but SUBSCRIBE, the canary and our presence is sent before what CONNACK meant is committed;
//! - a PUBLISH is sent again once per connection, never on a timer, with the same identifier and bytes;
//! - never more in flight than this connection's limits allow, while resuming too;
//! - an acknowledgement that does not fit is counted and completes nothing.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use bytes::Bytes;

use super::packet::{ConnAck, Limits, Packet, Protocol, Publish, ReasonCode, Subscription};
use crate::message::{Lane, Message, PacketId, Qos, Record, Seq, Topic};
use crate::turn::{
    Begin, Change, Hold, Inbound, Offer, OnSessionLoss, Resume, RowState, Taken, publish_bytes, record_bytes,
};

/// Identifiers 1 to this are for SUBSCRIBE, the canary and presence; messages go round above it.
const OWN_ID_MAX: u16 = 1023;
/// Bytes of payloads held for sending again, about: beyond it no more messages are taken.
const FLIGHT_MAX_BYTES: usize = 8 << 20;
/// Presence and health messages that wait for room, at most: one for every unit state of a large plant.
const OWN_WAITING_MAX: usize = 1024;
/// How long the canary's echo may lag behind its PUBACK, in milliseconds.
const ECHO_GRACE_MS: u64 = 2_000;
/// First and longest time a refused topic is held, in milliseconds.
const HOLD_TOPIC_MS: (u64, u64) = (5_000, 300_000);
/// First and longest time a lane is held after "not authorized", in milliseconds.
const HOLD_LANE_MS: (u64, u64) = (30_000, 300_000);
/// Refused messages whose first refusal is remembered, at most.
const REFUSED_MAX: usize = 10_000;

/// What a session is made with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Which protocol is spoken.
    pub protocol: Protocol,
    /// Keep Alive in milliseconds, before the broker's own.
    pub keep_alive_ms: u64,
    /// Reconnect when nothing in flight was acknowledged for so long, in milliseconds.
    pub ack_timeout_ms: u64,
    /// QoS 1 and 2 messages in flight, at most.
    pub max_in_flight: u16,
    /// QoS 2 messages in flight, at most.
    pub qos2_window: u16,
    /// What the broker is known not to take, whatever CONNACK says or cannot say.
    pub limits: Limits,
    /// The broker keeps no session: each connection begins a new one.
    pub clean_start: bool,
    /// What becomes of messages whose fate the broker forgot.
    pub on_session_loss: OnSessionLoss,
    /// How long a message is tried that the broker refuses for now, in milliseconds.
    pub retry_refused_for_ms: u64,
    /// A topic of our own that proves whether a session is the old one.
    pub canary: Topic,
    /// Our own presence topic: what is said there is handed on as [`Event::Presence`].
    pub presence: Topic,
    /// Filters whose messages are recorded before they are acknowledged, with the QoS asked for.
    pub commands: Vec<(String, Qos)>,
    /// Negative control of tests; production leaves it at `None`.
    pub broken: Option<Broken>,
}

/// A rule of delivery that tests break, to see that it is missed; only those that nobody can break from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// PUBREL leaves before the PUBREC is committed.
    PubrelAfterCommit,
    /// The window counts a QoS 2 message until its PUBREC only.
    WindowUntilPubcomp,
    /// New messages are taken and sent before what is held back.
    HeldBackFirst,
}

/// Why a connection must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The broker refused the CONNECT.
    #[error("the broker refused the connection: {} (0x{:02X}){}", connack_advice(*.reason), .reason.0, quoted(.said))]
    Refused {
        /// The reason code; 3.1.1 return codes are mapped to their MQTT 5 counterparts.
        reason: ReasonCode,
        /// The broker's own words.
        said: Option<String>,
    },
    /// The broker broke the protocol.
    #[error("the broker broke the protocol: {0}")]
    Protocol(String),
    /// The broker said goodbye.
    #[error("the broker closed the connection: {} (0x{:02X})", disconnect_reason(*.0), .0.0)]
    Disconnected(ReasonCode),
    /// Another client uses our client identifier.
    #[error(
        "another client uses the same client identifier (0x8E Session taken over); give each gateway its own \
         [broker] client_id"
    )]
    TakenOver,
    /// The broker kept a session that a clean start should have ended.
    #[error(
        "the broker still has the old session after a clean start; its messages cannot be told from ours"
    )]
    NotClean,
    /// The canary proved that the broker has begun a new session without our knowing. What it may have under our
    /// name by now cannot be told from what was ours, so the next connection begins clean.
    #[error("the broker has lost the session; it is begun anew")]
    Replaced,
    /// Whether the session is the old one cannot be found out now.
    #[error(
        "the broker refuses to take the message that would prove the session to be the old one: {} (0x{:02X})",
        disconnect_reason(*.0), .0.0
    )]
    CanaryRefused(ReasonCode),
    /// Nothing was heard for 1.5 times the keep alive.
    #[error("nothing heard from the broker for {idle_ms} ms")]
    Silent {
        /// How long, in milliseconds.
        idle_ms: u64,
    },
    /// The link is up, but nothing is acknowledged.
    #[error("the broker has acknowledged nothing for {waited_ms} ms")]
    NoProgress {
        /// How long, in milliseconds.
        waited_ms: u64,
    },
}

fn quoted(words: &Option<String>) -> String {
    words.as_ref().map(|words| format!("; it says: {words:?}")).unwrap_or_default()
}

fn connack_advice(reason: ReasonCode) -> &'static str {
    match reason.0 {
        0x81 => "Malformed Packet",
        0x82 => "Protocol Error",
        0x84 => "Unsupported Protocol Version; set [broker] protocol to the other one",
        0x85 => "Client Identifier not valid; check [broker] client_id",
        0x86 => "Bad User Name or Password; check [broker] username and password_file",
        0x87 => "Not authorized; ask the broker's owner what this client id and user may do",
        0x88 => "Server unavailable",
        0x89 => "Server busy",
        0x8A => "Banned; ask the broker's owner",
        0x8C => "Bad authentication method",
        0x90 => "Topic Name invalid: the broker does not like the Will's topic; check [gateway] base_topic",
        0x95 => "Packet too large",
        0x97 => "Quota exceeded",
        0x99 => "Payload format invalid",
        0x9A => "Retain not supported; set [broker] retain = false",
        0x9B => "QoS not supported; set [broker] max_qos = 0, or will = false",
        0x9C => "Use another server",
        0x9D => "Server moved",
        0x9F => "Connection rate exceeded",
        _ => "Unspecified error",
    }
}

fn disconnect_reason(reason: ReasonCode) -> &'static str {
    match reason.0 {
        0x00 => "Normal disconnection",
        0x81 => "Malformed Packet",
        0x82 => "Protocol Error",
        0x87 => "Not authorized",
        0x89 => "Server busy",
        0x8B => "Server shutting down",
        0x8D => "Keep Alive timeout",
        0x8E => "Session taken over",
        0x93 => "Receive Maximum exceeded",
        0x94 => "Topic Alias invalid",
        0x95 => "Packet too large",
        0x96 => "Message rate too high",
        0x97 => "Quota exceeded",
        0x98 => "Administrative action",
        0x9C => "Use another server",
        0x9D => "Server moved",
        _ => "Unspecified error",
    }
}

/// What happened that others want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// What CONNACK meant is committed: say that we are online, before any backlog.
    SessionSettled {
        /// The broker still had our session.
        present: bool,
    },
    /// Everything is subscribed and resumed: messages flow.
    Running,
    /// A subscription was granted at a lower QoS than asked for, or refused.
    Downgraded {
        /// The topic filter.
        filter: String,
        /// The QoS asked for.
        asked: Qos,
        /// The QoS granted; `None`: refused.
        granted: Option<Qos>,
    },
    /// Something was said on our own presence topic.
    Presence(Bytes),
    /// Something is to be counted.
    Count(Counted, u64),
}

/// What [`Event::Count`] counts; the names are those of the counters in `stats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is documented where it is counted, in stats")]
pub enum Counted {
    NoMatchingSubscribers,
    ResentWithDup,
    PossiblyDoubled,
    Ambiguous,
    Abandoned,
    RefusedForNow,
    DeadLettered,
    OrderOvertaken,
    Downgraded,
    DowngradedQos,
    DowngradedRetain,
    AcksUnexpected,
    InboundRecorded,
    InboundRepeated,
    InboundRefused,
    SessionsLost,
}

/// What one connection leaves to the next.
#[derive(Debug, Default)]
pub struct Carry {
    unacked: Vec<Flight>,
    /// Identifiers whose PUBLISH may have left; `None` after a start of the program, when nobody knows.
    may_have_left: Option<HashSet<PacketId>>,
    refused: HashMap<(Lane, Seq), Refusal>,
    /// Refusals behind which the store may have handed out more, of which no answer told the session.
    holding: Vec<Holding>,
}

impl Carry {
    /// The store has read its tables again and will hand the QoS 1 messages out anew. Its rows may be of messages
    /// that had come further, so what has left is not known any more.
    pub fn after_store_failure(self) -> Self {
        Carry { unacked: Vec::new(), may_have_left: None, holding: Vec::new(), ..self }
    }

    /// The QoS 1 messages that are still in flight.
    pub fn unacked(&self) -> Vec<(Lane, Seq)> {
        self.unacked.iter().map(|flight| (flight.lane, flight.seq)).collect()
    }
}

#[derive(Debug, Clone, Copy)]
struct Refusal {
    first_ms: u64,
    times: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    AwaitPuback,
    AwaitPubrec,
    AwaitPubcomp,
    Abandoned,
    /// Its message has gone to another broker.
    Moved,
}

/// Whether the PUBLISH may have left on an earlier connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    No,
    Yes,
    Unknown,
}

#[derive(Debug, Clone)]
struct Flight {
    id: PacketId,
    lane: Lane,
    seq: Seq,
    send_no: u64,
    qos: Qos,
    stage: Stage,
    record: Option<Record>,
    left: Left,
    /// The PUBLISH (or, for a resumed one, the PUBREL) left on this connection.
    sent: bool,
    /// The PUBREL left on this connection.
    released: bool,
}

#[derive(Debug)]
enum Todo {
    Flight(PacketId),
    /// An older QoS 1 message, and the place in the order of sending that it shares with the row after it.
    Older(Record, u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Own {
    Subscribe(Vec<Subscription>),
    Presence,
    Canary,
}

/// A refusal the store does not know of yet: what it hands out meanwhile must not overtake the refused message.
#[derive(Debug)]
struct Holding {
    lane: Lane,
    topic: Topic,
    hold: Hold,
    hold_ms: u64,
    reason: ReasonCode,
}

impl Holding {
    fn holds(&self, record: &Record) -> bool {
        self.lane == record.lane && (self.hold == Hold::Lane || self.topic == record.topic)
    }
}

/// A message of our own that waits for room.
#[derive(Debug)]
struct OwnMessage {
    topic: Topic,
    payload: Bytes,
    retain: bool,
    own: Own,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// CONNECT is out.
    Connack,
    /// The canary is asked whether this is the old session.
    Judging {
        /// When the broker had it.
        heard_ms: Option<u64>,
        /// Why it would not take the canary at QoS 1, so that its silence at QoS 0 proves nothing.
        refused: Option<ReasonCode>,
    },
    /// What CONNACK meant is being committed.
    Settling {
        present: bool,
    },
    /// That the session is not ours is being committed; the next connection begins clean.
    Replacing,
    /// SUBSCRIBE is out.
    Subscribing,
    /// The canary is tried out: does its echo come back at all?
    Testing {
        since_ms: u64,
        heard_ms: Option<u64>,
    },
    /// That it does is being committed.
    Proving,
    Running,
    /// DISCONNECT is out or will be.
    Closing,
}

/// The delivery state of one connection.
#[derive(Debug)]
pub struct Session {
    settings: Settings,
    connection: u64,
    clean_start: bool,
    uncertain: bool,
    canary_proven: bool,
    phase: Phase,
    limits: Limits,
    nonce: Bytes,
    flights: BTreeMap<PacketId, Flight>,
    todo: VecDeque<Todo>,
    own: BTreeMap<PacketId, Own>,
    own_waiting: VecDeque<OwnMessage>,
    next_id: u16,
    next_own_id: u16,
    /// Sent on this connection and not finished, presence and canary included.
    in_flight: usize,
    qos2_in_flight: usize,
    rx_open: HashMap<PacketId, u128>,
    refused: HashMap<(Lane, Seq), Refusal>,
    holding: Vec<Holding>,
    /// How many of them are in the commit that is out.
    holding_in_commit: usize,
    pending: Vec<Change>,
    gated: Vec<Packet>,
    /// Gated packets whose changes are being committed; `Some` while a turn with changes is out.
    committing: Option<Vec<Packet>>,
    /// The phase ends with the commit that is out.
    phase_in_commit: bool,
    phase_in_pending: bool,
    offered: bool,
    draining: bool,
    /// Bytes the link holds back, which QoS 0 messages do not wait for.
    unsent_bytes: usize,
    /// Why the connection must end, told by the next packet or tick.
    end: Option<SessionError>,
    out: VecDeque<Packet>,
    events: Vec<Event>,
    last_in_ms: u64,
    last_out_ms: u64,
    last_progress_ms: u64,
    ping_ms: Option<u64>,
}

impl Session {
    /// A session for connection number `connection`, before its CONNECT. `nonce` is unlike that of any
    /// other connection.
    pub fn new(
        settings: Settings,
        connection: u64,
        nonce: u64,
        begin: Begin,
        carry: Carry,
        now_ms: u64,
    ) -> Self {
        let (limits, clean_start) = (settings.limits, begin.clean_start_needed || settings.clean_start);
        let mut session = Session {
            settings,
            connection,
            clean_start,
            uncertain: begin.session_uncertain,
            canary_proven: begin.canary_proven,
            phase: Phase::Connack,
            limits,
            nonce: format!("{}-{connection}-{nonce:016x}", begin.boot).into(),
            flights: BTreeMap::new(),
            todo: VecDeque::new(),
            own: BTreeMap::new(),
            own_waiting: VecDeque::new(),
            next_id: OWN_ID_MAX + 1,
            next_own_id: 1,
            in_flight: 0,
            qos2_in_flight: 0,
            rx_open: begin.rx_open.into_iter().collect(),
            refused: carry.refused,
            holding: Vec::new(),
            holding_in_commit: 0,
            pending: Vec::new(),
            gated: Vec::new(),
            committing: None,
            phase_in_commit: false,
            phase_in_pending: false,
            offered: false,
            draining: false,
            unsent_bytes: 0,
            end: None,
            out: VecDeque::new(),
            events: Vec::new(),
            last_in_ms: now_ms,
            last_out_ms: now_ms,
            last_progress_ms: now_ms,
            ping_ms: None,
        };
        session.plan_resume(begin.resume, carry.unacked, carry.may_have_left.as_ref());
        carry.holding.iter().for_each(|holding| session.hold_back_unsent(holding));
        session
    }

    /// What is in flight, in the order of sending: rows, QoS 1 messages of the last connection, and older
    /// QoS 1 messages found after a crash.
    fn plan_resume(
        &mut self,
        resume: Vec<Resume>,
        unacked: Vec<Flight>,
        may_have_left: Option<&HashSet<PacketId>>,
    ) {
        let mut unacked = unacked.into_iter().peekable();
        let mut older = Vec::new();
        for item in resume {
            match item {
                Resume::Older(record) => older.push(record),
                Resume::Row { id, state, send_no, record, lane, seq } => {
                    // With the same place: what an earlier connection found before this row, older still.
                    while let Some(flight) = unacked.next_if(|flight| flight.send_no <= send_no) {
                        self.plan(flight);
                    }
                    self.todo.extend(older.drain(..).map(|record| Todo::Older(record, send_no)));
                    let left = match may_have_left.map(|ids| ids.contains(&id)) {
                        Some(false) => Left::No,
                        Some(true) => Left::Yes,
                        None => Left::Unknown,
                    };
                    let stage = match state {
                        RowState::Published => Stage::AwaitPubrec,
                        RowState::Received => Stage::AwaitPubcomp,
                        RowState::Abandoned => Stage::Abandoned,
                        RowState::Moved => Stage::Moved,
                    };
                    self.plan(Flight {
                        id,
                        lane,
                        seq,
                        send_no,
                        qos: Qos::ExactlyOnce,
                        stage,
                        record,
                        left,
                        sent: false,
                        released: false,
                    });
                }
            }
        }
        for flight in unacked {
            self.plan(flight);
        }
        self.todo.extend(older.into_iter().map(|record| Todo::Older(record, u64::MAX)));
    }

    fn plan(&mut self, flight: Flight) {
        self.todo.push_back(Todo::Flight(flight.id));
        self.next_id = next_after(flight.id);
        self.flights.insert(flight.id, flight);
    }

    /// Whether CONNECT must ask for a clean start.
    pub fn clean_start(&self) -> bool {
        self.clean_start
    }

    /// The number everything this session hands out belongs to.
    pub fn connection(&self) -> u64 {
        self.connection
    }

    /// The broker's limits: the stricter of what CONNACK said and what was known before.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// QoS 1 and 2 messages sent on this connection and not finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether messages flow.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// CONNACK arrived.
    ///
    /// # Errors
    /// The refusal, or a session that should not be there.
    pub fn on_connack(&mut self, connack: &ConnAck, now_ms: u64) -> Result<(), SessionError> {
        self.heard(now_ms);
        if self.phase != Phase::Connack {
            return Err(SessionError::Protocol("a second CONNACK".into()));
        }
        if connack.reason != ReasonCode::SUCCESS {
            let (reason, said) = (connack.reason, connack.reason_string.clone());
            return Err(SessionError::Refused { reason, said });
        }
        if connack.limits.receive_max == Some(0) || connack.limits.max_packet_bytes == Some(0) {
            return Err(SessionError::Protocol("CONNACK with a limit of zero".into()));
        }
        self.limits = connack.limits.within(self.settings.limits);
        if let Some(seconds) = connack.limits.keep_alive_s {
            self.settings.keep_alive_ms = u64::from(seconds) * 1000;
        }
        match (connack.session_present, self.clean_start) {
            (true, true) => Err(SessionError::NotClean),
            (present, _) if self.are_rows_void() => {
                self.forget();
                self.settle(Change::RowsVoid(self.settings.on_session_loss), present);
                Ok(())
            }
            (false, _) => {
                self.settle_absent();
                Ok(())
            }
            (true, false) if self.uncertain && self.canary_proven => {
                self.phase = Phase::Judging { heard_ms: None, refused: None };
                self.ask_canary(self.canary_qos(), now_ms);
                Ok(())
            }
            (true, false) => {
                if self.uncertain {
                    self.believe();
                }
                self.settle(Change::SessionPresent, true);
                Ok(())
            }
        }
    }

    /// A broker that keeps no session, or does no QoS 2, holds none of our identifiers: a PUBREL would tell it
    /// nothing, or cost the connection.
    fn are_rows_void(&self) -> bool {
        let no_qos2 = self.settings.limits.max_qos.is_some_and(|qos| qos < Qos::ExactlyOnce.number());
        let qos2 = self.flights.values().any(|flight| flight.qos == Qos::ExactlyOnce);
        self.settings.clean_start || (no_qos2 && (qos2 || !self.rx_open.is_empty()))
    }

    /// A broker that counts what it holds from the last connection may have no place left for a QoS 1 canary; and on
    /// 3.1.1 it cannot say so. At QoS 0 it needs none.
    fn canary_qos(&self) -> Qos {
        match self.settings.protocol {
            Protocol::V311 if self.window().min(self.settings.qos2_window) < 2 => Qos::AtMostOnce,
            _ => Qos::AtLeastOnce,
        }
    }

    /// Publishes the canary, to be judged by its echo. At QoS 0 PINGRESP stands for the PUBACK: a broker answers in
    /// the order in which it reads.
    fn ask_canary(&mut self, qos: Qos, now_ms: u64) {
        let canary = self.canary();
        match qos.min(self.max_qos()) {
            Qos::AtMostOnce => {
                let packet = publish(canary.topic, canary.payload, Qos::AtMostOnce, false, None, None);
                self.send(Packet::Publish(Box::new(packet)));
                self.ping_ms = Some(now_ms);
                self.send(Packet::PingReq);
            }
            _ => self.publish_own(canary, now_ms),
        }
    }

    fn settle_absent(&mut self) {
        if !self.clean_start {
            self.count(Counted::SessionsLost, 1);
        }
        self.forget();
        self.settle(Change::SessionAbsent(self.settings.on_session_loss), false);
    }

    /// The canary's echo did not come: "present" was said of a new session.
    ///
    /// Silence is weaker than a word. Were it the old session after all, it would hold identifiers that we give
    /// to other messages one day, and those would be lost. So nothing is published in it: it is discarded.
    fn replace(&mut self) {
        self.count(Counted::SessionsLost, 1);
        self.forget();
        self.phase = Phase::Replacing;
        self.phase_in_pending = true;
        self.pending.push(Change::SessionReplaced(self.settings.on_session_loss));
    }

    fn forget(&mut self) {
        self.flights.clear();
        self.todo.clear();
        self.rx_open.clear();
        self.in_flight = self.own.values().filter(|own| !matches!(own, Own::Subscribe(_))).count();
        self.qos2_in_flight = 0;
        self.canary_proven = false;
    }

    /// No canary can tell: the broker is believed, and what that may cost is counted.
    fn believe(&mut self) {
        let rows = self.flights.values().filter(|flight| flight.qos == Qos::ExactlyOnce).count();
        self.count(Counted::Ambiguous, rows as u64);
    }

    fn settle(&mut self, change: Change, present: bool) {
        self.phase = Phase::Settling { present };
        self.phase_in_pending = true;
        self.pending.push(change);
    }

    fn canary(&self) -> OwnMessage {
        let (topic, payload) = (self.settings.canary.clone(), self.nonce.clone());
        OwnMessage { topic, payload, retain: false, own: Own::Canary }
    }

    /// Publishes something of our own at QoS 1 (or what the broker allows), outside the store: presence,
    /// health. It waits for room like any other message, and is not repeated on another connection.
    /// `false`: too many wait already, or the broker takes none so large.
    pub fn publish_presence(&mut self, topic: Topic, payload: Bytes, retain: bool, now_ms: u64) -> bool {
        let bytes = publish_bytes(topic.as_str(), &payload, None, None);
        if self.own_waiting.len() >= OWN_WAITING_MAX || self.is_too_large(bytes) {
            return false;
        }
        self.own_waiting.push_back(OwnMessage { topic, payload, retain, own: Own::Presence });
        self.pump_own(now_ms);
        true
    }

    fn pump_own(&mut self, now_ms: u64) {
        let settled = match self.phase {
            Phase::Connack | Phase::Judging { .. } | Phase::Settling { .. } | Phase::Replacing => false,
            Phase::Subscribing | Phase::Testing { .. } | Phase::Proving | Phase::Running | Phase::Closing => {
                true
            }
        };
        while settled && !self.own_waiting.is_empty() && self.own_room() > 0 {
            let Some(message) = self.own_waiting.pop_front() else { break };
            self.publish_own(message, now_ms);
        }
    }

    fn publish_own(&mut self, message: OwnMessage, now_ms: u64) {
        let OwnMessage { topic, payload, retain, own } = message;
        let retain = self.may_retain(retain);
        let qos = Qos::AtLeastOnce.min(self.max_qos());
        let id = if qos == Qos::AtMostOnce {
            None
        } else {
            let Some(id) = self.own_id(own) else { return };
            self.progress_from_idle(now_ms);
            self.in_flight += 1;
            Some(id)
        };
        self.send(Packet::Publish(Box::new(publish(topic, payload, qos, retain, id, None))));
    }

    /// Sends a QoS 0 message, if messages flow.
    pub fn publish_qos0(&mut self, message: Message) -> bool {
        let payload = message.payload.unnumbered();
        if self.phase != Phase::Running {
            return false;
        }
        let retain = self.may_retain(message.retain);
        if retain != message.retain {
            self.count(Counted::Downgraded, 1);
        }
        let packet = publish(message.topic, payload, Qos::AtMostOnce, retain, None, None);
        self.send(Packet::Publish(Box::new(packet)));
        true
    }

    /// RETAIN, where the broker allows it; counted where it does not.
    fn may_retain(&mut self, retain: bool) -> bool {
        let allowed = self.limits.retain_available != Some(false);
        self.count(Counted::DowngradedRetain, u64::from(retain && !allowed));
        retain && allowed
    }

    fn own_id(&mut self, own: Own) -> Option<PacketId> {
        for _ in 0..OWN_ID_MAX {
            let id = PacketId::new(self.next_own_id)?;
            self.next_own_id = self.next_own_id % OWN_ID_MAX + 1;
            if let std::collections::btree_map::Entry::Vacant(entry) = self.own.entry(id) {
                entry.insert(own);
                return Some(id);
            }
        }
        None
    }

    /// A packet arrived (CONNACK goes to [`Session::on_connack`]).
    ///
    /// # Errors
    /// The connection must end.
    pub fn on_packet(&mut self, packet: Packet, now_ms: u64) -> Result<(), SessionError> {
        if let Packet::ConnAck(connack) = &packet {
            return self.on_connack(connack, now_ms);
        }
        if self.phase == Phase::Connack {
            return Err(SessionError::Protocol(format!("{} before CONNACK", packet.name())));
        }
        self.heard(now_ms);
        match packet {
            Packet::Publish(publish) => self.on_publish(*publish),
            Packet::Oversize { qos, id, .. } => self.on_oversize(qos, id),
            Packet::PubAck(id, reason) => self.on_puback(id, reason, now_ms),
            Packet::PubRec(id, reason) => self.on_pubrec(id, reason, now_ms),
            Packet::PubRel(id, _) => self.on_pubrel(id),
            Packet::PubComp(id, reason) => self.on_pubcomp(id, reason, now_ms),
            Packet::SubAck(id, reasons) => return self.on_suback(id, &reasons, now_ms),
            Packet::PingResp => self.on_pingresp(now_ms),
            Packet::Disconnect(ReasonCode::SESSION_TAKEN_OVER) => return Err(SessionError::TakenOver),
            Packet::Disconnect(reason) => return Err(SessionError::Disconnected(reason)),
            Packet::ConnAck(_)
            | Packet::Connect(_)
            | Packet::Subscribe(..)
            | Packet::Unsubscribe(..)
            | Packet::UnsubAck(..)
            | Packet::PingReq => {
                return Err(SessionError::Protocol(format!("{} from the broker", packet.name())));
            }
        }
        self.pump(now_ms);
        self.end.take().map_or(Ok(()), Err)
    }

    fn heard(&mut self, now_ms: u64) {
        self.last_in_ms = now_ms;
    }

    // ---- what we publish --------------------------------------------------------------------------------

    fn on_puback(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        if let Some(own) = self.own.get(&id) {
            return match own {
                Own::Subscribe(_) => self.count(Counted::AcksUnexpected, 1),
                Own::Presence | Own::Canary => self.on_own_puback(id, reason, now_ms),
            };
        }
        match self.flights.get(&id) {
            Some(flight) if flight.stage == Stage::AwaitPuback && flight.sent => {}
            _ => return self.count(Counted::AcksUnexpected, 1),
        }
        let Some(flight) = self.land(id, now_ms) else { return };
        if reason.is_error() {
            return self.refuse(flight, reason, now_ms);
        }
        self.accepted(flight.lane, flight.seq, reason);
        self.pending.push(Change::Acknowledged { lane: flight.lane, seq: flight.seq });
    }

    fn on_own_puback(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        let own = self.own.remove(&id);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_progress_ms = now_ms;
        if own != Some(Own::Canary) {
            return;
        }
        match &mut self.phase {
            Phase::Testing { .. } if reason.is_error() => self.run(now_ms),
            Phase::Judging { .. } if reason.is_error() => self.canary_refused(reason, now_ms),
            // Not even we are subscribed.
            Phase::Judging { .. } if reason == ReasonCode::NO_MATCHING_SUBSCRIBERS => self.replace(),
            Phase::Judging { heard_ms, .. } | Phase::Testing { heard_ms, .. } => *heard_ms = Some(now_ms),
            _ => {}
        }
    }

    fn on_pingresp(&mut self, now_ms: u64) {
        self.ping_ms = None;
        let canary_is_out = self.own.values().any(|own| *own == Own::Canary);
        if let Phase::Judging { heard_ms: heard_ms @ None, .. } = &mut self.phase
            && !canary_is_out
        {
            *heard_ms = Some(now_ms);
        }
    }

    /// A canary that was not published proves nothing by its silence.
    fn canary_refused(&mut self, reason: ReasonCode, now_ms: u64) {
        if reason == ReasonCode::NOT_AUTHORIZED || is_hopeless(reason) {
            self.believe();
            self.canary_proven = false;
            self.settle(Change::SessionPresent, true);
            self.pending.push(Change::Canary { proven: false });
        } else if matches!(reason, ReasonCode::RECEIVE_MAXIMUM_EXCEEDED | ReasonCode::QUOTA_EXCEEDED) {
            // What the broker holds of us may fill its window, and only what is resumed after the verdict frees it.
            self.phase = Phase::Judging { heard_ms: None, refused: Some(reason) };
            self.ask_canary(Qos::AtMostOnce, now_ms);
        } else {
            self.end = Some(SessionError::CanaryRefused(reason));
        }
    }

    /// The broker had the canary, and no echo came.
    fn canary_is_silent(&mut self, refused: Option<ReasonCode>) {
        match refused {
            Some(reason) => self.end = Some(SessionError::CanaryRefused(reason)),
            None => self.replace(),
        }
    }

    fn on_pubrec(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        let Some(flight) = self.flights.get_mut(&id) else {
            self.count(Counted::AcksUnexpected, 1);
            if id.get() > OWN_ID_MAX && !reason.is_error() {
                // Whatever this was, PUBREL lets the broker forget it (MQTT 5.0 table 2-6, 0x92).
                self.send(Packet::PubRel(id, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND));
            }
            return;
        };
        match flight.stage {
            Stage::AwaitPubrec if flight.sent && reason.is_error() => {
                if let Some(flight) = self.land(id, now_ms) {
                    self.refuse(flight, reason, now_ms);
                }
            }
            Stage::AwaitPubrec if flight.sent => {
                flight.stage = Stage::AwaitPubcomp;
                flight.record = None;
                let (lane, seq) = (flight.lane, flight.seq);
                self.last_progress_ms = now_ms;
                self.accepted(lane, seq, reason);
                self.pending.push(Change::Received(id));
                match self.settings.broken {
                    Some(Broken::PubrelAfterCommit) => return self.release(id),
                    Some(Broken::WindowUntilPubcomp) => {
                        self.in_flight = self.in_flight.saturating_sub(1);
                        self.qos2_in_flight = self.qos2_in_flight.saturating_sub(1);
                    }
                    _ => {}
                }
                self.gated.push(Packet::PubRel(id, ReasonCode::SUCCESS));
            }
            Stage::Abandoned | Stage::Moved if reason.is_error() => {
                self.land(id, now_ms);
                self.pending.push(Change::Completed(id));
            }
            Stage::Abandoned | Stage::Moved => {}
            Stage::AwaitPubcomp if flight.released => {
                self.count(Counted::AcksUnexpected, 1);
                self.send(Packet::PubRel(id, ReasonCode::SUCCESS));
            }
            _ => self.count(Counted::AcksUnexpected, 1),
        }
    }

    fn on_pubcomp(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        match self.flights.get(&id) {
            Some(flight)
                if matches!(flight.stage, Stage::AwaitPubcomp | Stage::Abandoned | Stage::Moved)
                    && flight.released => {}
            _ => return self.count(Counted::AcksUnexpected, 1),
        }
        let Some(flight) = self.land(id, now_ms) else { return };
        if flight.stage == Stage::Abandoned {
            self.count(Counted::Abandoned, 1);
        } else if flight.stage == Stage::Moved {
            // Counted when it moved.
        } else if reason == ReasonCode::PACKET_IDENTIFIER_NOT_FOUND {
            // Our earlier PUBREL did it, or the broker forgot the identifier; with a message of this connection
            // it can only be the latter.
            self.count(Counted::Ambiguous, 1);
        }
        self.pending.push(Change::Completed(id));
    }

    /// Takes a flight out of the air.
    fn land(&mut self, id: PacketId, now_ms: u64) -> Option<Flight> {
        let flight = self.flights.remove(&id)?;
        self.last_progress_ms = now_ms;
        if flight.sent {
            self.in_flight = self.in_flight.saturating_sub(1);
            if flight.qos == Qos::ExactlyOnce {
                self.qos2_in_flight = self.qos2_in_flight.saturating_sub(1);
            }
        }
        Some(flight)
    }

    fn accepted(&mut self, lane: Lane, seq: Seq, reason: ReasonCode) {
        if reason == ReasonCode::NO_MATCHING_SUBSCRIBERS {
            self.count(Counted::NoMatchingSubscribers, 1);
        }
        if !self.refused.is_empty() {
            self.refused.remove(&(lane, seq));
        }
    }

    /// A failure code ended the exchange (MQTT 5.0 section 4.3): wait and retry, hold the lane, or give up.
    fn refuse(&mut self, flight: Flight, reason: ReasonCode, now_ms: u64) {
        let (lane, seq) = (flight.lane, flight.seq);
        let id = (flight.qos == Qos::ExactlyOnce).then_some(flight.id);
        let hopeless = is_hopeless(reason);
        if self.refused.len() >= REFUSED_MAX {
            self.refused.clear();
        }
        let refusal = self.refused.entry((lane, seq)).or_insert(Refusal { first_ms: now_ms, times: 0 });
        refusal.times += 1;
        let Refusal { first_ms, times } = *refusal;
        if hopeless || now_ms.saturating_sub(first_ms) >= self.settings.retry_refused_for_ms {
            self.refused.remove(&(lane, seq));
            self.count(Counted::DeadLettered, 1);
            return self.pending.push(Change::DeadLetter { id, lane, seq, reason: reason.0 });
        }
        let (hold, (first, longest)) = match reason {
            ReasonCode::NOT_AUTHORIZED => (Hold::Lane, HOLD_LANE_MS),
            _ => (Hold::Topic, HOLD_TOPIC_MS),
        };
        let hold_ms = first.saturating_mul(1 << (times - 1).min(16)).min(longest);
        self.count(Counted::RefusedForNow, 1);
        self.pending.push(Change::Refused { id, lane, seq, hold, hold_ms, reason: reason.0 });
        let Some(Record { topic, .. }) = flight.record else { return };
        let holding = Holding { lane, topic, hold, hold_ms, reason };
        self.hold_back_unsent(&holding);
        let overtakes = |other: &&Flight| {
            let record = other.record.as_ref();
            other.seq > seq
                && record.is_some_and(|other| (other.lane, &other.topic) == (lane, &holding.topic))
        };
        let overtaking = self.flights.values().filter(overtakes).count() as u64;
        self.holding.push(holding);
        self.count(Counted::OrderOvertaken, overtaking);
    }

    /// Gives back what was taken, still waits for room, and would overtake a refused message.
    fn hold_back_unsent(&mut self, holding: &Holding) {
        let unsent = |flight: &Flight| !flight.sent && flight.left == Left::No;
        let held = self.flights.values().filter(|flight| {
            unsent(flight) && flight.record.as_ref().is_some_and(|record| holding.holds(record))
        });
        let ids: Vec<PacketId> = held.map(|flight| flight.id).collect();
        for id in ids {
            if let Some(Flight { qos, record: Some(record), .. }) = self.flights.remove(&id) {
                self.todo.retain(|todo| !matches!(todo, Todo::Flight(waiting) if *waiting == id));
                self.pending.push(held_back(holding, (qos == Qos::ExactlyOnce).then_some(id), &record));
            }
        }
        // What was found after a crash has no identifier yet.
        let pending = &mut self.pending;
        self.todo.retain(|todo| match todo {
            Todo::Older(record, _) if holding.holds(record) => {
                pending.push(held_back(holding, None, record));
                false
            }
            _ => true,
        });
    }

    /// Sends what the limits allow of what has to be resumed.
    fn pump(&mut self, now_ms: u64) {
        self.pump_own(now_ms);
        if self.phase != Phase::Running {
            return;
        }
        while let Some(todo) = self.todo.pop_front() {
            let id = match todo {
                Todo::Flight(id) => Some(id),
                Todo::Older(record, send_no) => self.older(record, send_no),
            };
            if let Some(id) = id.and_then(|id| self.resume(id, now_ms)) {
                self.todo.push_front(Todo::Flight(id));
                break;
            }
        }
    }

    /// Sends a flight, for the first time or again; `Some`: there is no room for it yet.
    fn resume(&mut self, id: PacketId, now_ms: u64) -> Option<PacketId> {
        let (room, qos2_room, max_qos) = (self.room(), self.qos2_room(), self.max_qos());
        let flight = self.flights.get(&id)?;
        match flight.stage {
            Stage::AwaitPubcomp | Stage::Abandoned | Stage::Moved => self.release(id),
            Stage::AwaitPubrec | Stage::AwaitPuback => {
                if room == 0 || (flight.qos == Qos::ExactlyOnce && qos2_room == 0) {
                    return Some(id);
                }
                let record = flight.record.clone()?;
                let dup = flight.left != Left::No;
                let bytes = record_bytes(&record);
                if self.is_too_large(bytes) || (flight.qos == Qos::ExactlyOnce && flight.qos > max_qos) {
                    self.give_up(id, now_ms);
                    return None;
                }
                if max_qos == Qos::AtMostOnce {
                    let Flight { send_no, .. } = self.flights.remove(&id)?;
                    return self.begin_flight(Taken { id, send_no, qos: max_qos, record });
                }
                self.launch(id, record, dup, now_ms);
                if dup {
                    self.count(Counted::ResentWithDup, 1);
                }
            }
        }
        None
    }

    /// A message in flight that this connection cannot carry, because of its size or its QoS: QoS 1 is a dead
    /// letter, QoS 2 is abandoned, which needs its own PUBREL and PUBCOMP before the identifier is free.
    fn give_up(&mut self, id: PacketId, now_ms: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        if flight.stage == Stage::AwaitPubrec {
            flight.stage = Stage::Abandoned;
            flight.record = None;
            self.pending.push(Change::Abandoned(id));
            self.gated.push(Packet::PubRel(id, ReasonCode::SUCCESS));
        } else if let Some(flight) = self.land(id, now_ms) {
            let (lane, seq, reason) = (flight.lane, flight.seq, ReasonCode::PACKET_TOO_LARGE.0);
            self.count(Counted::DeadLettered, 1);
            self.pending.push(Change::DeadLetter { id: None, lane, seq, reason });
        }
    }

    fn older(&mut self, record: Record, send_no: u64) -> Option<PacketId> {
        let id = self.free_ids(1).first().copied()?;
        self.begin_flight(Taken { id, send_no, qos: record.qos.min(self.max_qos()), record })
    }

    /// A message that this process has not sent before; `None`: at QoS 0 it has left already.
    fn begin_flight(&mut self, taken: Taken) -> Option<PacketId> {
        let Taken { id, send_no, qos, record } = taken;
        let (lane, seq) = (record.lane, record.seq);
        let retain = self.may_retain(record.retain);
        self.count(Counted::DowngradedQos, u64::from(qos < record.qos));
        self.count(Counted::Downgraded, u64::from(qos < record.qos || retain != record.retain));
        if qos == Qos::AtMostOnce {
            let packet = self.publish_record(record, qos, retain, None);
            self.send(Packet::Publish(Box::new(packet)));
            self.pending.push(Change::Acknowledged { lane, seq });
            return None;
        }
        let stage = if qos == Qos::ExactlyOnce { Stage::AwaitPubrec } else { Stage::AwaitPuback };
        self.next_id = next_after(id);
        self.flights.insert(
            id,
            Flight {
                id,
                lane,
                seq,
                send_no,
                qos,
                stage,
                record: Some(record),
                left: Left::No,
                sent: false,
                released: false,
            },
        );
        Some(id)
    }

    /// Puts a PUBLISH on its way.
    fn launch(&mut self, id: PacketId, record: Record, dup: bool, now_ms: u64) {
        self.progress_from_idle(now_ms);
        let retain = record.retain && self.limits.retain_available != Some(false);
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.sent = true;
        flight.left = Left::Yes;
        let qos = flight.qos;
        let mut packet = self.publish_record(record, qos, retain, Some(id));
        packet.dup = dup;
        self.in_flight += 1;
        if qos == Qos::ExactlyOnce {
            self.qos2_in_flight += 1;
        }
        self.send(Packet::Publish(Box::new(packet)));
    }

    fn publish_record(&self, record: Record, qos: Qos, retain: bool, id: Option<PacketId>) -> Publish {
        let packet = publish(record.topic, record.payload, qos, retain, id, record.expires_s);
        // 3.1.1 has no properties.
        let data = record.correlation_data.filter(|_| self.settings.protocol == Protocol::V5);
        Publish { correlation_data: data, ..packet }
    }

    /// Puts a PUBREL on its way; what it depends on is committed.
    fn release(&mut self, id: PacketId) {
        if let Some(flight) = self.flights.get_mut(&id) {
            flight.released = true;
            if !flight.sent {
                flight.sent = true;
                self.in_flight += 1;
                self.qos2_in_flight += 1;
            }
        }
        self.send(Packet::PubRel(id, ReasonCode::SUCCESS));
    }

    fn progress_from_idle(&mut self, now_ms: u64) {
        if self.in_flight == 0 {
            self.last_progress_ms = now_ms;
        }
    }

    fn max_qos(&self) -> Qos {
        self.limits.max_qos.and_then(|qos| Qos::from_number(u64::from(qos))).unwrap_or(Qos::ExactlyOnce)
    }

    fn is_too_large(&self, bytes: usize) -> bool {
        self.limits.max_packet_bytes.is_some_and(|max| bytes > max as usize)
    }

    fn window(&self) -> u16 {
        self.settings.max_in_flight.min(self.limits.receive_max.unwrap_or(u16::MAX))
    }

    fn room(&self) -> usize {
        usize::from(self.window()).saturating_sub(self.in_flight)
    }

    /// Room for our own messages: what the broker holds of us and we have not resumed yet has its place already.
    fn own_room(&self) -> usize {
        let held = |flight: &&Flight| flight.qos == Qos::ExactlyOnce && !flight.sent;
        self.room().saturating_sub(self.flights.values().filter(held).count())
    }

    /// QoS 2 leaves one place of the window free. mosquitto counts what it holds from the last connection against
    /// a new one: were that all of the window, it would refuse the canary and presence with 0x97, and on 3.1.1,
    /// where PUBACK carries no reason, throw them and every QoS 1 message away in silence.
    fn qos2_room(&self) -> usize {
        let window = usize::from(self.settings.qos2_window.min(self.window()));
        let window = window.saturating_sub(1).max(1);
        window.saturating_sub(self.qos2_in_flight).min(self.room())
    }

    fn flight_bytes(&self) -> usize {
        let held = |flight: &Flight| flight.record.as_ref().map_or(0, |record| record.payload.len());
        self.flights.values().map(held).sum()
    }

    /// Identifiers that nothing uses, going round, so that one is used again as late as possible.
    fn free_ids(&mut self, count: usize) -> Vec<PacketId> {
        let mut ids = Vec::with_capacity(count);
        for _ in OWN_ID_MAX..u16::MAX {
            if ids.len() == count {
                break;
            }
            let id = PacketId::new(self.next_id).filter(|id| !self.flights.contains_key(id));
            self.next_id = self.next_id.checked_add(1).unwrap_or(OWN_ID_MAX + 1);
            ids.extend(id);
        }
        ids
    }

    // ---- what the broker publishes ----------------------------------------------------------------------

    fn on_publish(&mut self, publish: Publish) {
        let (id, qos) = (publish.id, publish.qos);
        if publish.topic == self.settings.canary || publish.topic == self.settings.presence {
            if publish.topic == self.settings.presence {
                self.events.push(Event::Presence(publish.payload));
            } else if publish.payload == self.nonce {
                self.on_echo();
            }
            return self.acknowledge_unrecorded(qos, id, ReasonCode::SUCCESS);
        }
        if !self.settings.commands.iter().any(|(filter, _)| filter_matches(filter, publish.topic.as_str())) {
            self.count(Counted::InboundRefused, 1);
            return self.acknowledge_unrecorded(qos, id, ReasonCode::SUCCESS);
        }
        let hash = content_hash(&publish);
        let inbound = Inbound {
            topic: publish.topic,
            payload: publish.payload,
            qos,
            retain: publish.retain,
            response_topic: publish.response_topic,
            correlation_data: publish.correlation_data,
        };
        match (qos, id) {
            (Qos::ExactlyOnce, Some(id)) => {
                if self.rx_open.get(&id) == Some(&hash) {
                    self.count(Counted::InboundRepeated, 1);
                } else {
                    // Same identifier, other content: a new message, whatever DUP says. The broker may use
                    // an identifier again only after PUBCOMP, so ours was lost.
                    self.rx_open.insert(id, hash);
                    self.count(Counted::InboundRecorded, 1);
                    self.pending.push(Change::InboundOpened { id, hash, inbound });
                }
                self.gated.push(Packet::PubRec(id, ReasonCode::SUCCESS));
            }
            (_, id) => {
                self.count(Counted::InboundRecorded, 1);
                self.pending.push(Change::Inbound { id, inbound });
                self.gated.extend(id.map(|id| Packet::PubAck(id, ReasonCode::SUCCESS)));
            }
        }
    }

    fn on_oversize(&mut self, qos: Qos, id: Option<PacketId>) {
        self.count(Counted::InboundRefused, 1);
        self.acknowledge_unrecorded(qos, id, self.no_room());
    }

    /// 3.1.1 has no way to refuse, and a message without an answer would come again for ever.
    fn no_room(&self) -> ReasonCode {
        match self.settings.protocol {
            Protocol::V5 => ReasonCode::QUOTA_EXCEEDED,
            Protocol::V311 => ReasonCode::SUCCESS,
        }
    }

    /// Acknowledges what is not recorded: nothing has to be committed for it. The PUBREL that may follow
    /// finds nothing open and is answered all the same.
    fn acknowledge_unrecorded(&mut self, qos: Qos, id: Option<PacketId>, reason: ReasonCode) {
        let Some(id) = id else { return };
        match qos {
            Qos::AtMostOnce => {}
            Qos::AtLeastOnce => self.send(Packet::PubAck(id, reason)),
            Qos::ExactlyOnce => self.send(Packet::PubRec(id, reason)),
        }
    }

    fn on_pubrel(&mut self, id: PacketId) {
        if self.rx_open.remove(&id).is_some() {
            self.pending.push(Change::InboundReleased(id));
            self.gated.push(Packet::PubComp(id, ReasonCode::SUCCESS));
        } else {
            // Our PUBCOMP was lost, or we forgot: without an answer the broker asks for ever.
            self.gated.push(Packet::PubComp(id, self.not_found()));
        }
    }

    fn not_found(&self) -> ReasonCode {
        match self.settings.protocol {
            Protocol::V5 => ReasonCode::PACKET_IDENTIFIER_NOT_FOUND,
            Protocol::V311 => ReasonCode::SUCCESS,
        }
    }

    // ---- phases ------------------------------------------------------------------------------------------

    /// The canary's echo: the subscription is alive in this session.
    fn on_echo(&mut self) {
        match self.phase {
            Phase::Judging { .. } => self.settle(Change::SessionPresent, true),
            Phase::Testing { .. } => {
                self.canary_proven = true;
                self.phase = Phase::Proving;
                self.phase_in_pending = true;
                self.pending.push(Change::Canary { proven: true });
            }
            _ => {}
        }
    }

    fn subscribe(&mut self, now_ms: u64) {
        let own =
            |topic: &Topic| Subscription { filter: topic.to_string(), qos: Qos::AtLeastOnce, retained: true };
        let mut filters = Vec::new();
        if self.is_canary_of_use() {
            // A broker may drop what it sends at QoS 0, and silence would be taken for a new session.
            filters.push(own(&self.settings.canary));
        }
        filters.push(own(&self.settings.presence));
        // A command is meant for now, not for whoever subscribes one day.
        let command = |(filter, qos): &(String, Qos)| Subscription {
            filter: filter.clone(),
            qos: *qos,
            retained: false,
        };
        filters.extend(self.settings.commands.iter().map(command));
        // Some brokers that do no QoS 2 grant less, others close the connection.
        let max_qos = self.max_qos();
        filters.iter_mut().for_each(|filter| filter.qos = max_qos.min(filter.qos));
        self.phase = Phase::Subscribing;
        self.last_progress_ms = now_ms;
        if let Some(id) = self.own_id(Own::Subscribe(filters.clone())) {
            self.send(Packet::Subscribe(id, filters));
        }
    }

    fn on_suback(&mut self, id: PacketId, reasons: &[ReasonCode], now_ms: u64) -> Result<(), SessionError> {
        let Some(Own::Subscribe(filters)) = self.own.get(&id).cloned() else {
            self.count(Counted::AcksUnexpected, 1);
            return Ok(());
        };
        if reasons.len() != filters.len() {
            let (sent, got) = (filters.len(), reasons.len());
            return Err(SessionError::Protocol(format!("SUBACK with {got} reason codes for {sent} filters")));
        }
        self.own.remove(&id);
        self.last_progress_ms = now_ms;
        let mut canary_granted = None;
        for (Subscription { filter, qos: asked, .. }, reason) in filters.into_iter().zip(reasons) {
            if filter == self.settings.canary.as_str() {
                canary_granted = Some(!reason.is_error());
            }
            let granted = Qos::from_number(u64::from(reason.0));
            if granted.is_none_or(|granted| granted < asked) {
                self.events.push(Event::Downgraded { filter, asked, granted });
            }
        }
        if canary_granted == Some(false) && self.canary_proven {
            self.canary_proven = false;
            self.phase = Phase::Proving;
            self.phase_in_pending = true;
            self.pending.push(Change::Canary { proven: false });
        } else if canary_granted == Some(true) && !self.canary_proven && !self.is_window_held() {
            self.phase = Phase::Testing { since_ms: now_ms, heard_ms: None };
            // Presence may have taken all the room that Receive Maximum leaves.
            let canary = self.canary();
            self.own_waiting.push_front(canary);
            self.pump_own(now_ms);
        } else {
            self.run(now_ms);
        }
        Ok(())
    }

    /// Where no row is ever resumed, nothing has to be proven.
    fn is_canary_of_use(&self) -> bool {
        !self.settings.clean_start && self.max_qos() == Qos::ExactlyOnce
    }

    /// What is to be resumed takes all the room: another connection must try the canary out.
    fn is_window_held(&self) -> bool {
        self.flights.values().filter(|flight| flight.qos == Qos::ExactlyOnce).count()
            >= usize::from(self.window())
    }

    fn run(&mut self, now_ms: u64) {
        self.phase = Phase::Running;
        self.events.push(Event::Running);
        self.pump(now_ms);
    }

    // ---- turns -------------------------------------------------------------------------------------------

    /// What the store has to do next: changes to commit, and room for more messages. `None`: nothing now.
    pub fn turn(&mut self) -> Option<(Vec<Change>, Option<Offer>)> {
        if self.committing.is_some() {
            return None;
        }
        let changes = std::mem::take(&mut self.pending);
        if changes.is_empty() {
            // Nothing uncommitted is left that these could depend on.
            let free = std::mem::take(&mut self.gated);
            self.open_gates(free);
        } else {
            self.committing = Some(std::mem::take(&mut self.gated));
            self.phase_in_commit = std::mem::take(&mut self.phase_in_pending);
            self.holding_in_commit = self.holding.len();
        }
        let offer = self.offer();
        (!changes.is_empty() || offer.is_some()).then_some((changes, offer))
    }

    fn offer(&mut self) -> Option<Offer> {
        let held_back_first = self.settings.broken != Some(Broken::HeldBackFirst);
        let holds_back = held_back_first && !self.todo.is_empty();
        if self.offered || self.draining || self.phase != Phase::Running || holds_back {
            return None;
        }
        let (room, qos2_room) = (self.room(), self.qos2_room());
        // At QoS 0 nothing stays in flight: only the link's own backlog tells that the broker does not keep up.
        let held_bytes = match self.max_qos() {
            Qos::AtMostOnce => self.unsent_bytes,
            _ => self.flight_bytes(),
        };
        let max_bytes = FLIGHT_MAX_BYTES.saturating_sub(held_bytes);
        // The store keeps an offer until it can answer it: one that could not take whatever comes first would
        // stay there for ever.
        if room == 0 || qos2_room == 0 || max_bytes == 0 {
            return None;
        }
        self.offered = true;
        Some(Offer {
            ids: self.free_ids(room),
            qos2_room,
            max_bytes,
            max_qos: self.max_qos(),
            max_publish_bytes: self.limits.max_packet_bytes,
        })
    }

    /// The changes of the last turn are on the disk; `refused` are inbound identifiers whose message was
    /// not recorded.
    pub fn on_committed(&mut self, refused: &[PacketId], now_ms: u64) {
        let gated = self.committing.take().unwrap_or_default();
        let phase_ends = std::mem::take(&mut self.phase_in_commit);
        self.holding.drain(..std::mem::take(&mut self.holding_in_commit));
        for id in refused {
            self.rx_open.remove(id);
            self.count(Counted::InboundRefused, 1);
        }
        let gated = gated.into_iter().map(|packet| match packet {
            Packet::PubRec(id, _) if refused.contains(&id) => Packet::PubRec(id, self.no_room()),
            Packet::PubAck(id, _) if refused.contains(&id) => Packet::PubAck(id, self.no_room()),
            packet => packet,
        });
        let gated = gated.collect();
        self.open_gates(gated);
        if phase_ends {
            match self.phase {
                Phase::Settling { present } => {
                    self.events.push(Event::SessionSettled { present });
                    self.subscribe(now_ms);
                }
                Phase::Proving => self.run(now_ms),
                Phase::Replacing => self.end = Some(SessionError::Replaced),
                _ => {}
            }
        }
        self.pump(now_ms);
    }

    fn open_gates(&mut self, packets: Vec<Packet>) {
        for packet in packets {
            match packet {
                Packet::PubRel(id, _) => self.release(id),
                packet => self.send(packet),
            }
        }
    }

    /// The store answered the offer; the rows of these messages are on the disk.
    ///
    /// What has no room any more, because presence took it while the offer was out, waits like a resumed message.
    pub fn on_taken(&mut self, taken: Vec<Taken>, now_ms: u64) {
        self.offered = false;
        if let Some(last) = taken.last() {
            // The rest of the offer was not used: the round goes on behind the last that was.
            self.next_id = next_after(last.id);
        }
        for taken in taken {
            if let Some(holding) = self.holding.iter().find(|holding| holding.holds(&taken.record)) {
                let Taken { id, qos, record, .. } = taken;
                let row = (qos == Qos::ExactlyOnce).then_some(id);
                self.pending.push(held_back(holding, row, &record));
                continue;
            }
            let waits = self.begin_flight(taken).map(Todo::Flight);
            match self.settings.broken {
                Some(Broken::HeldBackFirst) => waits.into_iter().for_each(|todo| self.todo.push_front(todo)),
                _ => self.todo.extend(waits),
            }
        }
        self.pump(now_ms);
    }

    // ---- time --------------------------------------------------------------------------------------------

    /// Time has passed.
    ///
    /// # Errors
    /// The broker is silent, or acknowledges nothing.
    pub fn tick(&mut self, now_ms: u64) -> Result<(), SessionError> {
        if let Some(end) = self.end.take() {
            return Err(end);
        }
        match self.phase {
            Phase::Judging { heard_ms: Some(at), refused } if now_ms >= at + ECHO_GRACE_MS => {
                self.canary_is_silent(refused);
            }
            Phase::Testing { heard_ms: Some(at), .. } if now_ms >= at + ECHO_GRACE_MS => self.run(now_ms),
            Phase::Testing { since_ms, .. } if now_ms >= since_ms + 5 * ECHO_GRACE_MS => self.run(now_ms),
            _ => {}
        }
        let judging = matches!(self.phase, Phase::Connack | Phase::Judging { heard_ms: None, .. });
        let waiting = self.in_flight > 0 || !self.own.is_empty() || judging;
        let waited_ms = now_ms.saturating_sub(self.last_progress_ms);
        if waiting && waited_ms >= self.settings.ack_timeout_ms {
            return Err(SessionError::NoProgress { waited_ms });
        }
        let keep_alive_ms = self.settings.keep_alive_ms;
        if keep_alive_ms == 0 || self.phase == Phase::Connack {
            return Ok(());
        }
        let idle_ms = now_ms.saturating_sub(self.last_in_ms);
        if idle_ms >= keep_alive_ms + keep_alive_ms / 2 {
            return Err(SessionError::Silent { idle_ms });
        }
        let quiet_ms = now_ms.saturating_sub(self.last_out_ms).max(idle_ms);
        if self.ping_ms.is_none() && quiet_ms >= keep_alive_ms - keep_alive_ms / 4 {
            self.ping_ms = Some(now_ms);
            self.send(Packet::PingReq);
        }
        Ok(())
    }

    /// How long [`Session::tick`] can wait, in milliseconds.
    pub fn tick_within_ms(&self) -> u64 {
        (self.settings.keep_alive_ms / 8).clamp(50, 1000)
    }

    /// A packet was written at `now_ms`.
    pub fn on_written(&mut self, now_ms: u64) {
        self.last_out_ms = now_ms;
    }

    /// So many bytes wait in the link for a broker that does not read them.
    pub fn set_unsent(&mut self, bytes: usize) {
        self.unsent_bytes = bytes;
    }

    // ---- ends --------------------------------------------------------------------------------------------

    /// No new messages any more; what is in flight is finished.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether nothing of ours waits for an acknowledgement or a commit.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
            && self.own.is_empty()
            && self.own_waiting.is_empty()
            && self.pending.is_empty()
            && self.gated.is_empty()
            && self.committing.is_none()
            && self.out.is_empty()
    }

    /// Says goodbye; nothing is sent after it.
    pub fn disconnect(&mut self) {
        self.send(Packet::Disconnect(ReasonCode::SUCCESS));
        self.phase = Phase::Closing;
    }

    /// Changes that were learned but not handed over; to be committed before the next connection begins.
    /// What was gated on them is thrown away with the connection.
    pub fn take_unsaved(&mut self) -> Vec<Change> {
        // A verdict that was not committed does not count: the next CONNACK brings its own.
        let verdict = |change: &Change| {
            matches!(
                change,
                Change::SessionAbsent(_)
                    | Change::SessionReplaced(_)
                    | Change::RowsVoid(_)
                    | Change::SessionPresent
                    | Change::Canary { .. }
            )
        };
        std::mem::take(&mut self.pending).into_iter().filter(|change| !verdict(change)).collect()
    }

    /// What the next connection of this process has to know.
    pub fn into_carry(self) -> Carry {
        let left = |flight: &&Flight| flight.left != Left::No;
        let may_have_left = Some(self.flights.values().filter(left).map(|flight| flight.id).collect());
        let mut unacked: Vec<Flight> = self
            .flights
            .into_values()
            .filter(|flight| flight.stage == Stage::AwaitPuback)
            .map(|flight| Flight { sent: false, ..flight })
            .collect();
        unacked.sort_by_key(|flight| (flight.send_no, flight.seq));
        Carry { unacked, may_have_left, refused: self.refused, holding: self.holding }
    }

    // ---- small things ------------------------------------------------------------------------------------

    /// The next packet to write.
    pub fn next_packet(&mut self) -> Option<Packet> {
        self.out.pop_front()
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Changes that wait for the commit that is out; reading more from the broker can wait while they are many.
    pub fn backlog(&self) -> usize {
        self.pending.len() + self.gated.len()
    }

    fn send(&mut self, packet: Packet) {
        if self.phase != Phase::Closing {
            self.out.push_back(packet);
        }
    }

    fn count(&mut self, what: Counted, n: u64) {
        if n > 0 {
            self.events.push(Event::Count(what, n));
        }
    }
}

/// A message that was taken and never sent goes back and shares the hold. `id`: that of its row.
fn held_back(holding: &Holding, id: Option<PacketId>, record: &Record) -> Change {
    let Holding { hold, hold_ms, reason, .. } = *holding;
    Change::Refused { id, lane: record.lane, seq: record.seq, hold, hold_ms, reason: reason.0 }
}

/// Reason codes that no waiting changes.
fn is_hopeless(reason: ReasonCode) -> bool {
    matches!(
        reason,
        ReasonCode::TOPIC_NAME_INVALID | ReasonCode::PACKET_TOO_LARGE | ReasonCode::PAYLOAD_FORMAT_INVALID
    )
}

/// Messages' identifiers go round above our own.
fn next_after(id: PacketId) -> u16 {
    id.get().checked_add(1).unwrap_or(OWN_ID_MAX + 1)
}

fn publish(
    topic: Topic,
    payload: Bytes,
    qos: Qos,
    retain: bool,
    id: Option<PacketId>,
    message_expiry_s: Option<u32>,
) -> Publish {
    Publish {
        dup: false,
        qos,
        retain,
        topic,
        id,
        payload,
        message_expiry_s,
        response_topic: None,
        correlation_data: None,
    }
}

/// Whether a topic filter matches a topic name (MQTT 5.0 section 4.7).
fn filter_matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for part in filter.split('/') {
        match (part, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (part, Some(level)) if part == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}

/// FNV-1a over everything that makes a message what it is; stable across versions of this program, because
/// it is kept in the database.
fn content_hash(publish: &Publish) -> u128 {
    let fields: [&[u8]; 4] = [
        publish.topic.as_str().as_bytes(),
        &publish.payload,
        publish.response_topic.as_deref().unwrap_or_default().as_bytes(),
        publish.correlation_data.as_deref().unwrap_or_default(),
    ];
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let mut add = |byte: u8| hash = (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013B);
    for field in fields {
        (field.len() as u64).to_le_bytes().into_iter().for_each(&mut add);
        field.iter().copied().for_each(&mut add);
    }
    hash
}
