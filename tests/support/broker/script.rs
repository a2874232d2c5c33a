//! What a test may set: the broker's honest limits, and its faults.
//!
//! Invariant: with `Limits::default()` and `Script::default()` the broker follows the specification.
//! Both may be changed at any time; a change applies to the next packet.

use super::wire::Kind;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::RangeInclusive;

/// When a QoS 2 message is handed to subscribers (clause 4.3.3, figure 4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onward {
    /// Method A: stored at PUBLISH, handed on at PUBREL. The default, and what mosquitto does.
    AtPubrel,
    /// Method B: handed on at PUBLISH; only the packet id is kept until PUBREL.
    AtPublish,
}

/// Limits an honest broker may have. On 5.0 CONNACK announces them.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Receive Maximum of CONNACK, 1 to 65535; `None` leaves it out, which means 65535. Only 5.0.
    pub receive_maximum: Option<u16>,
    /// Maximum QoS, 0 to 2. Only 5.0.
    pub maximum_qos: u8,
    /// Retain Available. Only 5.0; on 3.1.1 a retained message is then passed on but not kept.
    pub retain_available: bool,
    /// Maximum Packet Size in bytes, fixed header included; on 3.1.1 it closes the connection unannounced.
    pub maximum_packet_size: Option<u32>,
    /// Server Keep Alive in seconds. Only 5.0.
    pub server_keep_alive: Option<u16>,
    /// Session Expiry Interval in seconds that replaces whatever a client asks for. Only 5.0.
    pub session_expiry: Option<u32>,
    /// Topic Alias Maximum, 0 for none. Only 5.0.
    pub topic_alias_maximum: u16,
    /// Highest QoS a SUBACK grants, 0 to 2.
    pub granted_qos: u8,
    /// Whether PUBACK and PUBREC say 0x10 when nobody is subscribed. Only 5.0.
    pub tell_no_subscribers: bool,
    /// QoS 2 hand-over.
    pub onward: Onward,
    /// Whether a Packet Identifier is given to another message as soon as it is free, or as late as possible.
    pub reuses_ids: bool,
    /// QoS 1 and 2 messages in flight to one client; a smaller Receive Maximum of the client wins.
    pub outgoing_window: usize,
    /// QoS 1 and 2 messages waiting for one client; more are dropped and counted.
    pub queue_maximum: usize,
    /// User name and password every CONNECT must carry.
    pub login: Option<(String, String)>,
    /// Milliseconds a new connection may take to send CONNECT.
    pub connect_timeout_ms: u64,
    /// What it enforces without ever announcing it.
    pub unsaid: Unsaid,
}

/// Limits of cloud brokers, which do not announce them: a client that breaks one is refused or thrown out, on both
/// versions, and `Log::limits_hit` says which it was.
#[derive(Clone, Debug, Default)]
pub struct Unsaid {
    /// Highest QoS of a PUBLISH, a subscription and a Will.
    pub maximum_qos: Option<u8>,
    /// No RETAIN.
    pub no_retain: bool,
    /// No Will.
    pub no_will: bool,
    /// Keep Alive in seconds.
    pub keep_alive: Option<RangeInclusive<u16>>,
    /// Bytes of one PUBLISH, fixed header included.
    pub publish_bytes: Option<usize>,
    /// PUBLISHes of QoS 1 and 2 unfinished on one connection.
    pub in_flight: Option<usize>,
    /// Every CONNECT must ask for a clean session.
    pub no_session: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            receive_maximum: None,
            maximum_qos: 2,
            retain_available: true,
            maximum_packet_size: None,
            server_keep_alive: None,
            session_expiry: None,
            topic_alias_maximum: 0,
            granted_qos: 2,
            tell_no_subscribers: false,
            onward: Onward::AtPubrel,
            reuses_ids: false,
            outgoing_window: 20,
            queue_maximum: 100_000,
            login: None,
            connect_timeout_ms: 30_000,
            unsaid: Unsaid::default(),
        }
    }
}

/// What happens to one CONNECT.
#[derive(Clone, Debug, Default)]
pub struct ConnectScript {
    /// Answer with this code and close: a return code on 3.1.1, a reason code on 5.0. Written as given.
    pub refuse: Option<u8>,
    /// Never answer, and ignore whatever follows.
    pub mute: bool,
    /// Close without an answer.
    pub close: bool,
    /// Lose this client's session before answering.
    pub forget_session: bool,
    /// The session_present flag to answer with, true or not.
    pub session_present: Option<bool>,
    /// Bytes to send before CONNACK.
    pub before: Vec<u8>,
    /// Bytes to send right after CONNACK.
    pub after: Vec<u8>,
}

/// How often a fault still happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// This many times.
    Only(u32),
    /// Until the test removes it.
    Always,
}

impl Times {
    /// Counts one occurrence; false when none are left.
    pub fn next(&mut self) -> bool {
        match self {
            Times::Always => true,
            Times::Only(0) => false,
            Times::Only(left) => {
                *left -= 1;
                true
            }
        }
    }
}

/// Which PUBLISH is refused, and how.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// Topic Filter of the refused topics.
    pub filter: String,
    /// Reason code of PUBACK or PUBREC, 0x80 or above. On 3.1.1 the message is acknowledged as usual and thrown
    /// away, for that version has no way to say it.
    pub reason: u8,
    /// How many PUBLISHes.
    pub times: Times,
}

/// What a cut counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutAt {
    /// The n-th packet of a kind from any client, 1 is the next one.
    Packet(Kind, u32),
    /// The n-th packet of a kind to any client; it is still sent.
    Sent(Kind, u32),
    /// The n-th byte from any client; what comes after it is not read.
    Byte(u64),
}

/// What becomes of the packet a cut was counted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutWhen {
    /// It is lost.
    Before,
    /// It takes effect, its answer is lost.
    Unanswered,
    /// It takes effect and is answered.
    Answered,
}

/// Drops a connection, without DISCONNECT, at a chosen place.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// The place, counted over all connections from the moment the cut is set.
    pub at: CutAt,
    /// Ignored for `Sent` and `Byte`.
    pub when: CutWhen,
    /// Start counting again after it fired; otherwise it is removed.
    pub again: bool,
    /// Counted so far; start with 0.
    pub seen: u64,
}

impl Cut {
    /// A cut that happens once.
    pub fn once(at: CutAt, when: CutWhen) -> Cut {
        Cut { at, when, again: false, seen: 0 }
    }

    /// A cut at every n-th.
    pub fn every(at: CutAt, when: CutWhen) -> Cut {
        Cut { at, when, again: true, seen: 0 }
    }
}

/// Every fault. Kinds below are of packets the broker sends; of PUBREL too, which it sends for its own QoS 2.
#[derive(Clone, Debug, Default)]
pub struct Script {
    /// For the next CONNECTs, in order, one each.
    pub next_connects: VecDeque<ConnectScript>,
    /// For every CONNECT after those.
    pub every_connect: ConnectScript,
    /// Packets of these kinds are never sent, though the broker believes so.
    pub withhold: BTreeSet<Kind>,
    /// Packets of these kinds leave this many milliseconds late. A late CONNACK holds back PUBLISHes.
    pub delay_ms: BTreeMap<Kind, u64>,
    /// Packets of these kinds are sent twice.
    pub double: BTreeSet<Kind>,
    /// The next packet of this kind is replaced by these bytes.
    pub replace: BTreeMap<Kind, Vec<u8>>,
    /// Refused PUBLISHes; the first whose filter matches decides.
    pub refuse: Vec<Refusal>,
    /// Topics nobody may publish to: 0x87 on 5.0, thrown away in silence on 3.1.1.
    pub deny_publish: Vec<String>,
    /// Filters nobody may subscribe to: 0x87 on 5.0, 0x80 on 3.1.1.
    pub deny_subscribe: Vec<String>,
    /// Topics that are granted but never delivered, as brokers do that check rights when they deliver.
    pub deny_read: Vec<String>,
    /// On 3.1.1 a QoS 2 PUBLISH that finds this many held gets its PUBREC and is thrown away (mosquitto 2.0.11
    /// does so, with 20, in its default configuration).
    pub silent_limit: Option<usize>,
    /// A PUBLISH of QoS 1 or 2 that finds this many QoS 2 ids held, those of earlier connections included, is refused
    /// with 0x97 on 5.0 and acknowledged and thrown away on 3.1.1: mosquitto's `max_inflight_messages`.
    pub held_limit: Option<usize>,
    /// Connections to drop.
    pub cuts: Vec<Cut>,
}
