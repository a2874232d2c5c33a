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

mod begin;
mod error;
mod inbound;
mod outbound;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use bytes::Bytes;

pub use self::error::SessionError;
use super::packet::{Limits, Packet, Protocol, ReasonCode, Subscription};
use crate::message::{Lane, PacketId, Qos, Record, Seq, Topic};
use crate::turn::{Begin, Change, Hold, Offer, OnSessionLoss};

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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// The message whose first acknowledgement is timed, and when it was sent.
    timed: Option<(PacketId, u64)>,
    round_trip_ms: Option<u64>,
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
            timed: None,
            round_trip_ms: None,
        };
        session.plan_resume(begin.resume, carry.unacked, carry.may_have_left.as_ref());
        carry.holding.iter().for_each(|holding| session.hold_back_unsent(holding));
        session
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

    /// How long the broker last took to answer a message or a PINGREQ on this connection, in milliseconds.
    pub fn round_trip_ms(&self) -> Option<u64> {
        self.round_trip_ms
    }

    /// Whether messages flow.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
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

    fn progress_from_idle(&mut self, now_ms: u64) {
        if self.in_flight == 0 {
            self.last_progress_ms = now_ms;
        }
    }

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

    /// No new messages any more; what is in flight is finished.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether the store owes an answer to the last turn.
    pub fn is_committing(&self) -> bool {
        self.committing.is_some()
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
