//! Vocabulary of what is forwarded: topics, quality of service, lanes, packet identifiers, messages.
//!
//! Invariant: a [`Topic`] can always be published: no wildcard, no NUL, no leading `$`, at most 65,535 bytes.

use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Stamp;

/// A topic name that may be published to (MQTT 5.0 section 4.7).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

/// Why a text is not a topic name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// Topic names are at least one character long (MQTT-4.7.3-1).
    #[error("a topic must not be empty")]
    Empty,
    /// UTF-8 strings in MQTT hold at most 65,535 bytes (MQTT-4.7.3-3).
    #[error("a topic holds at most 65535 bytes, this one has {0}")]
    TooLong(usize),
    /// Wildcards belong in filters (MQTT-3.3.2-2); NUL and control characters are refused by brokers (1.5.4).
    #[error("a topic must not hold {0:?}")]
    Character(char),
    /// Topics that start with `$` belong to the broker (MQTT-4.7.2-1).
    #[error("a topic must not start with '$', which belongs to the broker")]
    Dollar,
}

impl Topic {
    /// Checks a topic name.
    pub fn new(name: &str) -> Result<Self, TopicError> {
        if name.is_empty() {
            return Err(TopicError::Empty);
        }
        if name.len() > usize::from(u16::MAX) {
            return Err(TopicError::TooLong(name.len()));
        }
        if name.starts_with('$') {
            return Err(TopicError::Dollar);
        }
        match name.chars().find(|c| matches!(c, '+' | '#') || c.is_control()) {
            Some(character) => Err(TopicError::Character(character)),
            None => Ok(Topic(name.into())),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// MQTT quality of service (MQTT 5.0 section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Qos {
    /// QoS 0: sent when connected, never stored.
    AtMostOnce = 0,
    /// QoS 1: PUBLISH until PUBACK.
    AtLeastOnce = 1,
    /// QoS 2: PUBLISH, PUBREC, PUBREL, PUBCOMP.
    ExactlyOnce = 2,
}

impl Qos {
    /// 0, 1 or 2; anything else is `None`.
    pub fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Qos::AtMostOnce),
            1 => Some(Qos::AtLeastOnce),
            2 => Some(Qos::ExactlyOnce),
            _ => None,
        }
    }

    /// 0, 1 or 2.
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Qos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QoS {}", self.number())
    }
}

/// A queue of its own with its own sequence numbers; the lower number is sent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// Alarms, commands' answers and gap records.
    Alarm = 0,
    /// Measured values.
    Normal = 1,
    /// Whatever may wait.
    Bulk = 2,
}

impl Lane {
    /// Every lane, the one that is sent first, first.
    pub const ALL: [Lane; 3] = [Lane::Alarm, Lane::Normal, Lane::Bulk];

    /// The lane's name in the configuration and on screens.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Alarm => "alarm",
            Lane::Normal => "normal",
            Lane::Bulk => "bulk",
        }
    }

    /// The lane of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Lane::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A message's number within its lane. Counts from 1 and never restarts within a store epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seq(pub u64);

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A Packet Identifier (MQTT 5.0 section 2.2.1); never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PacketId(NonZeroU16);

impl PacketId {
    /// `None` for zero, which is not a packet identifier.
    pub fn new(id: u16) -> Option<Self> {
        NonZeroU16::new(id).map(PacketId)
    }

    /// The number on the wire.
    pub fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for PacketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes of Correlation Data that are carried, at most: whoever asks needs 16 for a UUID.
pub const CORRELATION_MAX_BYTES: usize = 1024;

/// The bytes of a message before it is accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Published exactly as given.
    Whole(Bytes),
    /// A JSON object without its closing brace: the store appends `,"epoch":E,"seq":N}`, the two members
    /// that are known only in the transaction that accepts the message.
    Numbered(Vec<u8>),
}

impl Payload {
    /// The bytes that will be sent for the message numbered `seq` in store epoch `epoch`.
    pub fn finish(self, epoch: u32, seq: Seq) -> Bytes {
        match self {
            Payload::Whole(bytes) => bytes,
            Payload::Numbered(mut open) => {
                open.extend_from_slice(format!(",\"epoch\":{epoch},\"seq\":{seq}}}").as_bytes());
                open.into()
            }
        }
    }

    /// The bytes that will be sent for a message that is never stored, and so has no number.
    pub fn unnumbered(self) -> Bytes {
        match self {
            Payload::Whole(bytes) => bytes,
            Payload::Numbered(mut open) => {
                open.push(b'}');
                open.into()
            }
        }
    }

    /// Bytes this payload will take at most once it is finished.
    pub fn len_max(&self) -> usize {
        match self {
            Payload::Whole(bytes) => bytes.len(),
            Payload::Numbered(open) => open.len() + 48,
        }
    }
}

/// A message on its way into the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Where it will be published.
    pub topic: Topic,
    /// The quality of service asked for; the store takes QoS 1 and 2 only.
    pub qos: Qos,
    /// Whether the broker is asked to keep it as the topic's retained message.
    pub retain: bool,
    /// Which queue it joins.
    pub lane: Lane,
    /// When what it tells was measured.
    pub at: Stamp,
    /// How long after acceptance it is still worth sending; `None` for ever.
    pub expires_after: Option<Duration>,
    /// MQTT 5 Correlation Data, for the answer to a command; at most [`CORRELATION_MAX_BYTES`].
    pub correlation_data: Option<Bytes>,
    /// What it tells.
    pub payload: Payload,
}

/// A message as the store hands it out: numbered, and the exact bytes that are (or were) sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its lane.
    pub lane: Lane,
    /// Its number in that lane.
    pub seq: Seq,
    /// Where it is published.
    pub topic: Topic,
    /// QoS 1 or 2.
    pub qos: Qos,
    /// The retain flag.
    pub retain: bool,
    /// Acquisition time, Unix time in milliseconds.
    pub at_ms: i64,
    /// Seconds it is still worth sending; `None` for ever.
    pub expires_s: Option<u32>,
    /// MQTT 5 Correlation Data.
    pub correlation_data: Option<Bytes>,
    /// The application message.
    pub payload: Bytes,
}
