//! The queue as people look at it: pages of messages and dead letters, and what they may do to them.
//!
//! Invariants: a page is bounded by count and bytes, never the whole queue; what is in flight is never touched; a
//! damaged record is shown as damaged.

use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, params};

use super::outbox::{DropReason, Outbox, key, seq_of};
use super::segment;
use crate::clock::Stamp;
use crate::message::{Lane, Message, Payload, Qos, Seq, Topic};

/// Messages of one page, at most.
pub const PAGE_MAX: u32 = 500;
/// Payload bytes of one page, about: one larger message makes a page of its own.
const PAGE_BYTES: usize = 128 << 10;
/// Messages one transaction purges at most, so that the others need not wait for long.
pub const PURGE_MAX: u64 = 5_000;

type Sql<T> = Result<T, rusqlite::Error>;

/// What people may ask of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// [`Found::Messages`]: what waits in a lane from this number on.
    Messages {
        /// The lane.
        lane: Lane,
        /// The lowest number wanted.
        from: Seq,
        /// How many at most; [`PAGE_MAX`] is the limit.
        limit: u32,
        /// Whether payloads are wanted.
        payloads: bool,
    },
    /// [`Found::DeadLetters`] above this number.
    DeadLetters {
        /// The last number already known.
        after: u64,
        /// How many at most; [`PAGE_MAX`] is the limit.
        limit: u32,
    },
    /// Put the dead letter of that number into the queue again; [`Found::Changed`] says 0 when there is none.
    Requeue(u64),
    /// Drop up to [`PURGE_MAX`] messages of a lane that are not in flight and were there at the first call.
    PurgeLane {
        /// The lane.
        lane: Lane,
        /// Those with a lower number only; `None` at the first call, which tells it.
        below: Option<Seq>,
    },
    /// Throw every dead letter away.
    PurgeDead,
}

impl Ask {
    /// Whether it changes the database.
    pub fn changes(&self) -> bool {
        matches!(self, Ask::Requeue(_) | Ask::PurgeLane { .. } | Ask::PurgeDead)
    }
}

/// What is found or done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A page of messages.
    Messages {
        /// In the order of their numbers.
        messages: Vec<Waiting>,
        /// Where the next page begins; `None` at the end.
        next: Option<Seq>,
    },
    /// A page of dead letters, the oldest first.
    DeadLetters(Vec<DeadLetter>),
    /// It was done.
    Changed {
        /// To how many.
        count: u64,
        /// The number that bounds the next call; `None` when nothing is left to do.
        below: Option<u64>,
    },
    /// It was not done, and why.
    Refused(String),
}

/// Where a message stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for its turn.
    Waiting,
    /// The session has it.
    InFlight,
    /// The broker refused one of its topic or lane for now.
    Held,
}

/// A message in the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Its lane.
    pub lane: Lane,
    /// Its number.
    pub seq: Seq,
    /// The epoch of that number.
    pub epoch: u32,
    /// When it was accepted, Unix time in ms.
    pub accepted_ms: i64,
    /// Where it stands.
    pub state: State,
    /// What it says; `None` when it is damaged.
    pub content: Option<Content>,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Its topic.
    pub topic: Topic,
    /// QoS 1 or 2.
    pub qos: Qos,
    /// The retain flag.
    pub retain: bool,
    /// Acquisition time, Unix time in ms.
    pub at_ms: i64,
    /// How long after acceptance it is worth sending, in seconds.
    pub expires_after_s: Option<u32>,
    /// Bytes of the payload.
    pub bytes: u64,
    /// The payload, if it was asked for.
    pub payload: Option<Bytes>,
}

/// A message the broker will never take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its number among the dead letters.
    pub number: u64,
    /// Its lane.
    pub lane: Lane,
    /// Its number there.
    pub seq: Seq,
    /// The epoch of that number.
    pub epoch: u32,
    /// MQTT reason code.
    pub reason: u8,
    /// When it was given up, Unix time in ms.
    pub dead_ms: i64,
    /// Its topic, as it stands in the table.
    pub topic: String,
    /// QoS 1 or 2.
    pub qos: u8,
    /// The retain flag.
    pub retain: bool,
    /// Bytes of the payload.
    pub bytes: u64,
}

/// The lane of a number in a table; what is no lane is the last.
fn lane_of(number: i64) -> Lane {
    Lane::ALL.get(usize::try_from(number).unwrap_or(2)).copied().unwrap_or(Lane::Bulk)
}

/// A page of a lane.
pub(super) fn messages(
    db: &Connection,
    outbox: &Outbox,
    (lane, from, limit, payloads): (Lane, Seq, u32, bool),
    now: Stamp,
) -> Sql<Found> {
    let limit = limit.clamp(1, PAGE_MAX) as usize;
    let mut statement = db.prepare_cached(
        "SELECT s.id, s.count, s.epoch, s.accepted_ms, s.packing, s.body, p.done
         FROM segment s LEFT JOIN progress p ON p.segment = s.id
         WHERE s.id >= coalesce((SELECT max(id) FROM segment WHERE id BETWEEN ?1 AND ?2), ?2) AND s.id <= ?3
         ORDER BY s.id",
    )?;
    let (first, from_key) = (key(lane, 0), key(lane, from.0));
    let mut rows = statement.query(params![first, from_key, first | ((1 << 56) - 1)])?;
    let (mut messages, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        let (first, count): (u64, usize) = (seq_of(row.get(0)?), row.get(1)?);
        let (epoch, accepted_ms, packing): (u32, i64, i64) = (row.get(2)?, row.get(3)?, row.get(4)?);
        let done: Option<Vec<u8>> = row.get(6)?;
        let is_done = |index: usize| {
            done.as_ref()
                .and_then(|done| done.get(index / 8))
                .is_some_and(|byte| byte & (1 << (index % 8)) != 0)
        };
        let entries = segment::decode(lane, Seq(first), count, accepted_ms, packing, row.get(5)?);
        for (index, entry) in entries.into_iter().enumerate() {
            let seq = first + index as u64;
            if seq < from.0 || is_done(index) {
                continue;
            }
            if messages.len() >= limit || bytes >= PAGE_BYTES {
                return Ok(Found::Messages { messages, next: Some(Seq(seq)) });
            }
            let state = outbox.state(lane, seq, entry.as_ref().map(|entry| &entry.topic), now);
            let content = entry.map(|entry| Content {
                topic: entry.topic,
                qos: entry.qos,
                retain: entry.retain,
                at_ms: entry.at_ms,
                expires_after_s: entry.expires_after_s,
                bytes: entry.payload.len() as u64,
                payload: payloads.then_some(entry.payload),
            });
            bytes += content.as_ref().and_then(|content| content.payload.as_ref()).map_or(0, Bytes::len);
            messages.push(Waiting { lane, seq: Seq(seq), epoch, accepted_ms, state, content });
        }
    }
    Ok(Found::Messages { messages, next: None })
}

/// A page of dead letters.
pub(super) fn dead_letters(db: &Connection, after: u64, limit: u32) -> Sql<Found> {
    let mut statement = db.prepare_cached(
        "SELECT number, lane, seq, epoch, reason, dead_ms, topic, qos, retain, length(payload) FROM dead_letter
         WHERE number > ? ORDER BY number LIMIT ?",
    )?;
    let letters = statement.query_map(params![after, limit.clamp(1, PAGE_MAX)], |row| {
        Ok(DeadLetter {
            number: row.get(0)?,
            lane: lane_of(row.get(1)?),
            seq: Seq(row.get(2)?),
            epoch: row.get(3)?,
            reason: row.get(4)?,
            dead_ms: row.get(5)?,
            topic: row.get(6)?,
            qos: row.get(7)?,
            retain: row.get(8)?,
            bytes: row.get(9)?,
        })
    })?;
    Ok(Found::DeadLetters(letters.collect::<Sql<_>>()?))
}

/// A dead letter as the message it was: `None` when there is none, `Some(None)` when it is damaged.
pub(super) fn dead_message(db: &Connection, number: u64, now: Stamp) -> Sql<Option<Option<Message>>> {
    let mut statement = db.prepare_cached(
        "SELECT lane, topic, qos, retain, at_ms, payload, expires_s, correlation FROM dead_letter WHERE number = ?",
    )?;
    let mut rows = statement.query([number])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let (topic, qos, at_ms): (String, u64, i64) = (row.get(1)?, row.get(2)?, row.get(4)?);
    let (payload, expires_s): (Vec<u8>, Option<u64>) = (row.get(5)?, row.get(6)?);
    let (lane, retain) = (lane_of(row.get(0)?), row.get(3)?);
    let correlation_data = row.get::<_, Option<Vec<u8>>>(7)?.map(Into::into);
    let whole = Topic::new(&topic).ok().zip(Qos::from_number(qos));
    Ok(Some(whole.map(|(topic, qos)| Message {
        topic,
        qos,
        retain,
        lane,
        at: Stamp { wall_ms: at_ms, mono_ms: now.mono_ms, synchronised: false },
        expires_after: expires_s.map(Duration::from_secs),
        correlation_data,
        payload: Payload::Whole(payload.into()),
    })))
}

/// Drops what is not in flight, up to [`PURGE_MAX`]; what is dropped is counted as `purged`.
pub(super) fn purge(db: &Connection, outbox: &mut Outbox, lane: Lane, below: Option<Seq>) -> Sql<Found> {
    let below = below.map_or_else(|| outbox.next_seq(lane), |below| below.0);
    let count = outbox.drop_below(db, lane, below, PURGE_MAX, DropReason::Purged)?;
    Ok(Found::Changed { count, below: (count == PURGE_MAX).then_some(below) })
}
