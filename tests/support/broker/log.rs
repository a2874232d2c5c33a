//! What the broker saw, in order: evidence for tests.
//!
//! Invariant: nothing the broker forgets is forgotten here; only `Log::clear` empties it.

use super::packet::Will;
use super::wire::{Kind, Version};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Number of a connection, counted from 1 over the broker's life.
pub type ConnId = u64;

/// A first-time PUBLISH the broker took: at QoS 2 one whose Packet Identifier was not held, else every one.
#[derive(Clone, Debug)]
pub struct Received {
    /// Its connection.
    pub conn: ConnId,
    /// Its client.
    pub client_id: Arc<str>,
    /// Topic Name.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// QoS, 0 to 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// DUP flag.
    pub dup: bool,
    /// Packet Identifier, 0 at QoS 0.
    pub id: u16,
    /// Arrival.
    pub at_ms: u64,
    /// Whether it was handed to subscribers; at QoS 2 that may happen as late as PUBREL.
    pub onward: bool,
}

/// A PUBLISH the broker did not take.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Its connection.
    pub conn: ConnId,
    /// Topic Name.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// QoS, 0 to 2.
    pub qos: u8,
    /// Reason code answered; 0 when the client was told that all is well.
    pub reason: u8,
    /// A limit did it that the client knows or must expect.
    pub by_limit: bool,
    /// When.
    pub at_ms: u64,
}

/// A message handed to whoever subscribes, at the moment it was.
#[derive(Clone, Debug)]
pub struct HandedOn {
    /// Topic Name.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// RETAIN flag.
    pub retain: bool,
}

/// A PUBLISH the broker sent.
#[derive(Clone, Debug)]
pub struct Delivered {
    /// Its connection.
    pub conn: ConnId,
    /// The client it went to.
    pub client_id: Arc<str>,
    /// Topic Name.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// QoS, 0 to 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// DUP flag.
    pub dup: bool,
    /// Packet Identifier, 0 at QoS 0.
    pub id: u16,
}

/// A CONNECT and what it was answered.
#[derive(Clone, Debug)]
pub struct Connected {
    /// Its connection.
    pub conn: ConnId,
    /// Arrival.
    pub at_ms: u64,
    /// Protocol version.
    pub version: Version,
    /// Client Identifier as sent, may be empty.
    pub client_id: String,
    /// Clean Session or Clean Start.
    pub clean: bool,
    /// Keep Alive in seconds.
    pub keep_alive: u16,
    /// Session Expiry Interval in seconds, if given.
    pub session_expiry: Option<u32>,
    /// The client's Receive Maximum, if given.
    pub receive_maximum: Option<u16>,
    /// The client's Maximum Packet Size, if given.
    pub maximum_packet_size: Option<u32>,
    /// Will Message.
    pub will: Option<Will>,
    /// User Name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<Vec<u8>>,
    /// session_present and code of CONNACK; `None` if there was none.
    pub answer: Option<(bool, u8)>,
}

/// Which way a packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client.
    In,
    /// To the client.
    Out,
}

/// One packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Direction.
    pub way: Way,
    /// Packet type.
    pub kind: Kind,
    /// Packet Identifier, 0 where there is none.
    pub id: u16,
    /// Reason or return code, 0 where there is none.
    pub reason: u8,
    /// DUP flag of a PUBLISH.
    pub dup: bool,
}

/// A rule of the specification a client broke.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Its connection.
    pub conn: ConnId,
    /// Its client, empty before CONNECT.
    pub client_id: Arc<str>,
    /// What it did and which clause forbids it.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connection {} ({:?}): {}", self.conn, self.client_id, self.text)
    }
}

/// Sums over the broker's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// QoS 2 PUBLISHes whose id was held already, so that they were only acknowledged again.
    pub repeats: u64,
    /// PUBRELs for an id that is not held (0x92 on 5.0): fine after a reconnect.
    pub unknown_pubrels: u64,
    /// PUBLISHes of which the client was told that all is well while nothing was kept.
    pub swallowed: u64,
    /// PUBLISHes refused with a reason code.
    pub refused: u64,
    /// Connections closed because their client id connected again.
    pub takeovers: u64,
    /// Connections closed because nothing came for 1.5 × Keep Alive.
    pub keep_alive_timeouts: u64,
    /// Will Messages published.
    pub wills: u64,
    /// Messages dropped because a client's queue was full, or its Maximum Packet Size too small.
    pub queue_drops: u64,
    /// Packets the script withheld.
    pub withheld: u64,
    /// Connections the script cut.
    pub cuts: u64,
    /// Connections closed because their client did not read.
    pub slow_readers: u64,
}

/// How often each expected payload was received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Expected payloads.
    pub expected: u64,
    /// Expected payloads never received.
    pub lost: u64,
    /// Receptions beyond the first, of any payload.
    pub duplicated: u64,
    /// Payloads received but not expected.
    pub strange: u64,
}

/// Packets of one connection, and how many exchanges were open at most.
#[derive(Clone, Debug, Default)]
pub struct ConnectionLog {
    /// Every packet both ways, in order, as far as `Log::keep_packets` was set.
    pub packets: Vec<Seen>,
    /// Most PUBLISHes of QoS 1 and 2 unfinished at once, those resumed from earlier connections included.
    pub peak_unfinished: usize,
    /// Bytes received.
    pub bytes_in: u64,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Log {
    /// Whether packets are recorded one by one; turn it off for runs of millions.
    pub keep_packets: bool,
    /// PUBLISHes taken.
    pub received: Vec<Received>,
    /// How many PUBLISHes had been taken before `clear` emptied `received`.
    pub received_before: u64,
    /// PUBLISHes not taken.
    pub refused: Vec<Refused>,
    /// PUBLISHes handed on, subscribed to or not.
    pub handed_on: Vec<HandedOn>,
    /// PUBLISHes sent.
    pub delivered: Vec<Delivered>,
    /// CONNECTs.
    pub connects: Vec<Connected>,
    /// Will Messages published.
    pub wills: Vec<Will>,
    /// Rules broken by clients.
    pub violations: Vec<Violation>,
    /// Limits of `script::Unsaid` that clients broke.
    pub limits_hit: Vec<&'static str>,
    /// By connection.
    pub connections: BTreeMap<ConnId, ConnectionLog>,
    /// Sums.
    pub counters: Counters,
}

impl Default for Log {
    fn default() -> Log {
        Log {
            keep_packets: true,
            received: Vec::new(),
            received_before: 0,
            refused: Vec::new(),
            handed_on: Vec::new(),
            delivered: Vec::new(),
            connects: Vec::new(),
            wills: Vec::new(),
            violations: Vec::new(),
            limits_hit: Vec::new(),
            connections: BTreeMap::new(),
            counters: Counters::default(),
        }
    }
}

impl Log {
    /// Forgets everything but `keep_packets` and how much there was.
    pub fn clear(&mut self) {
        let received_before = self.received_before + self.received.len() as u64;
        *self = Log { keep_packets: self.keep_packets, received_before, ..Log::default() };
    }

    /// Notes one packet.
    pub fn saw(&mut self, conn: ConnId, seen: Seen) {
        if self.keep_packets {
            self.connections.entry(conn).or_default().packets.push(seen);
        }
    }

    /// Compares the payloads received under `filter` with those expected, each of which must be unique.
    pub fn tally<'a>(&self, filter: &str, expected: impl IntoIterator<Item = &'a [u8]>) -> Tally {
        let mut times: BTreeMap<&[u8], u64> = BTreeMap::new();
        for received in self.received.iter().filter(|r| super::topic::matches(filter, &r.topic)) {
            *times.entry(&received.payload).or_default() += 1;
        }
        let mut tally = Tally { duplicated: times.values().map(|n| n - 1).sum(), ..Tally::default() };
        let mut known = 0;
        for payload in expected {
            tally.expected += 1;
            if times.contains_key(payload) {
                known += 1;
            } else {
                tally.lost += 1;
            }
        }
        tally.strange = times.len() as u64 - known;
        tally
    }
}
