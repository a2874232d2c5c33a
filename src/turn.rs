//! Vocabulary between the MQTT session and the store: what one turn changes, and what it hands out.
//!
//! Invariant: everything the session learns travels to the store as a [`Change`] before anything that
//! depends on it is sent; everything the store hands out is committed before the session hears of it.

use bytes::Bytes;

use crate::message::{Lane, PacketId, Qos, Record, Seq, Topic};

/// How far the exchange of one QoS 2 message has come. The numbers are the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowState {
    /// The PUBLISH may have left.
    Published = 1,
    /// PUBREC has arrived; the PUBREL may have left.
    Received = 2,
    /// Given up; waits for its PUBCOMP only, so that the packet identifier is free again.
    Abandoned = 3,
    /// The message goes to another broker instead; waits for its PUBCOMP only, like [`RowState::Abandoned`].
    Moved = 4,
}

/// What becomes of messages between PUBREC and PUBCOMP when the broker lost the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnSessionLoss {
    /// Publish it anew: never lost, possibly doubled. The default.
    Republish,
    /// Call it delivered: never doubled, possibly lost.
    Drop,
}

/// What a refusal holds back until it is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Every message of the refused one's topic.
    Topic,
    /// Every message of the refused one's lane.
    Lane,
}

/// A message from the broker that must be remembered before it is acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inbound {
    /// Where it was published.
    pub topic: Topic,
    /// The application message.
    pub payload: Bytes,
    /// The quality of service it came with.
    pub qos: Qos,
    /// Whether it was a retained message.
    pub retain: bool,
    /// MQTT 5 Response Topic.
    pub response_topic: Option<String>,
    /// MQTT 5 Correlation Data.
    pub correlation_data: Option<Bytes>,
}

/// One thing the session learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// PUBREC arrived: the row goes to [`RowState::Received`].
    Received(PacketId),
    /// PUBCOMP arrived: the message is done and its row goes, in one transaction.
    Completed(PacketId),
    /// PUBACK arrived (or a downgrade to QoS 0 was sent): the message is done.
    Acknowledged {
        /// The message's lane.
        lane: Lane,
        /// The message's number.
        seq: Seq,
    },
    /// The broker refused for now: the exchange ended, the message is queued again and held for `hold_ms`.
    Refused {
        /// The row, for QoS 2.
        id: Option<PacketId>,
        /// The message's lane.
        lane: Lane,
        /// The message's number.
        seq: Seq,
        /// What is held.
        hold: Hold,
        /// For how long, in milliseconds.
        hold_ms: u64,
        /// The reason code.
        reason: u8,
    },
    /// The broker will never take this message: it becomes a dead letter, done bit and row in one transaction.
    DeadLetter {
        /// The row, for QoS 2.
        id: Option<PacketId>,
        /// The message's lane.
        lane: Lane,
        /// The message's number.
        seq: Seq,
        /// The reason code.
        reason: u8,
    },
    /// A message in flight that must go: the row goes to [`RowState::Abandoned`], the message counts as unknown.
    Abandoned(PacketId),
    /// The broker has no session of ours: rows are queued again by policy, inbound state is forgotten, the
    /// flags are cleared.
    SessionAbsent(OnSessionLoss),
    /// The broker has a session, but not the one the rows belong to: rows are queued again by policy, and it must
    /// be discarded before anything is published.
    SessionReplaced(OnSessionLoss),
    /// The rows mean nothing to this broker, which keeps no session or does no QoS 2: they are queued again by
    /// policy. What may have left counts as possibly doubled, because nobody can say what became of it.
    RowsVoid(OnSessionLoss),
    /// The broker's session is the one the rows belong to; the flags are cleared.
    SessionPresent,
    /// Whether the canary's echo came back after it was subscribed: only then does its absence prove anything.
    Canary {
        /// The echo was seen.
        proven: bool,
    },
    /// An inbound message at QoS 0 or 1 to remember before PUBACK.
    Inbound {
        /// Its Packet Identifier, at QoS 1.
        id: Option<PacketId>,
        /// The message.
        inbound: Inbound,
    },
    /// An inbound message at QoS 2 to remember before PUBREC, together with its identifier and content hash.
    InboundOpened {
        /// Its Packet Identifier.
        id: PacketId,
        /// Hash of its content.
        hash: u128,
        /// The message.
        inbound: Inbound,
    },
    /// PUBREL arrived for an inbound message: its identifier is forgotten before PUBCOMP.
    InboundReleased(PacketId),
}

/// How many messages the session can take, and which packet identifiers they get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Free identifiers, in the order in which they are given out.
    pub ids: Vec<PacketId>,
    /// How many of them may go to QoS 2 messages.
    pub qos2_room: usize,
    /// Bytes of payloads that may be taken, about: at least one message is, if there is an identifier.
    pub max_bytes: usize,
    /// The broker's Maximum QoS: anything above is taken at this QoS.
    pub max_qos: Qos,
    /// The largest PUBLISH the broker takes, in encoded bytes; larger messages become dead letters.
    pub max_publish_bytes: Option<u32>,
}

/// A message the store handed to the session; for QoS 2 its row is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Its Packet Identifier, unless it is sent at QoS 0.
    pub id: PacketId,
    /// Its place in the order of sending.
    pub send_no: u64,
    /// The quality of service it is sent at.
    pub qos: Qos,
    /// The message.
    pub record: Record,
}

/// One message that was in flight when the last connection ended, in the order of sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// A QoS 2 exchange that had begun.
    Row {
        /// Its Packet Identifier.
        id: PacketId,
        /// How far it had come.
        state: RowState,
        /// Its place in the order of sending.
        send_no: u64,
        /// The message; `None` where only the PUBREL is still needed.
        record: Option<Record>,
        /// The message's lane.
        lane: Lane,
        /// The message's number.
        seq: Seq,
    },
    /// An unfinished QoS 1 message older than the row after it, sent before it once more to keep the order.
    Older(Record),
}

/// What the store knows when a connection begins; committed before CONNECT is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begin {
    /// The session at the broker, if any, is not ours: it must be discarded.
    pub clean_start_needed: bool,
    /// An earlier "session absent" may have been missed: "present" proves nothing.
    pub session_uncertain: bool,
    /// The canary's echo has been seen: its absence proves a new session.
    pub canary_proven: bool,
    /// What was in flight.
    pub resume: Vec<Resume>,
    /// Inbound QoS 2 messages that wait for PUBREL: identifier and content hash.
    pub rx_open: Vec<(PacketId, u128)>,
    /// How often the agent has started on this database.
    pub boot: u32,
    /// The store's epoch.
    pub epoch: u32,
    /// Messages that are not done.
    pub queued: u64,
}

/// Bytes of a PUBLISH at QoS 1 or 2 on MQTT 5 (section 3.3), for the broker's Maximum Packet Size, which 3.1.1
/// does not have.
pub fn publish_bytes(
    topic: &str,
    payload: &[u8],
    expires_s: Option<u32>,
    correlation_data: Option<&[u8]>,
) -> usize {
    let expiry = if expires_s.is_some() { 5 } else { 0 };
    let properties = expiry + correlation_data.map_or(0, |data| 1 + 2 + data.len());
    // Topic length, Packet Identifier.
    let remaining = 2 + topic.len() + 2 + varint_bytes(properties) + properties + payload.len();
    1 + varint_bytes(remaining) + remaining
}

/// The same for a message of the outbox.
pub fn record_bytes(record: &Record) -> usize {
    let Record { topic, payload, expires_s, correlation_data, .. } = record;
    publish_bytes(topic.as_str(), payload, *expires_s, correlation_data.as_deref())
}

/// Bytes of a Variable Byte Integer (MQTT 5.0 section 1.5.5).
fn varint_bytes(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}
