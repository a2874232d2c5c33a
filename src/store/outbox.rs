//! The queue of messages on their way to the broker: accept, take, settle, drop.
//!
//! Works inside a transaction that `store` opens and commits. What is kept in memory here only speeds up
//! what the tables say; after a failed commit it is thrown away and read again.
//!
//! Invariants: a record leaves the queue only by its last acknowledgement, or counted by a reason; a record
//! with a row in `inflight` is never dropped; numbers never repeat.

mod replay;
mod room;
mod take;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::browse::State;
use super::pace::Pace;
use super::segment::{self, Entry};
use super::{Boot, LaneLimits, Settings};
use crate::clock::Stamp;
use crate::message::{Lane, Message, Record, Seq, Topic};
use crate::turn::Hold;

/// Bytes of one segment's payloads, about; one larger message makes a segment of its own.
const SEGMENT_BYTES: usize = 128 << 10;
/// Bytes a segment takes beside its body, about: its other columns and its share of the pages.
pub(super) const SEGMENT_OVERHEAD: u64 = 64;
/// Numbers share their key with the lane.
const SEQ_MAX: u64 = (1 << 56) - 1;

/// Why a message was dropped, as counters and gap records name it: where a setting did it, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DropReason {
    Quota,
    MaxMessages,
    MaxBytes,
    MaxAge,
    MinFreeDisk,
    Expired,
    Damaged,
    DeadLetter,
    /// In flight and given up; whether the broker had it is unknown.
    Abandoned,
    /// Somebody asked for it: `fieldpost queue purge`.
    Purged,
}

impl DropReason {
    pub(crate) fn name(self) -> &'static str {
        match self {
            DropReason::Quota => "quota",
            DropReason::MaxMessages => "max_messages",
            DropReason::MaxBytes => "max_bytes",
            DropReason::MaxAge => "max_age",
            DropReason::MinFreeDisk => "min_free_disk",
            DropReason::Expired => "expired",
            DropReason::Damaged => "damaged",
            DropReason::DeadLetter => "dead_letter",
            DropReason::Abandoned => "abandoned",
            DropReason::Purged => "purged",
        }
    }
}

/// First and last number and count of what one transaction dropped.
#[derive(Debug, Clone, Copy)]
struct Dropped {
    first: u64,
    last: u64,
    count: u64,
}

/// A segment some of whose records were taken or are done.
#[derive(Debug)]
struct Open {
    count: u64,
    bytes: u64,
    done: Vec<u8>,
    left: u64,
    changed: bool,
}

impl Open {
    fn is_done(&self, index: u64) -> bool {
        self.done[index as usize / 8] & (1 << (index % 8)) != 0
    }
}

/// The segment that is being read, decoded.
#[derive(Debug)]
struct Loaded {
    first: u64,
    entries: Vec<Option<Entry>>,
    accepted: Stamp,
    kernel_boot: u32,
}

impl Loaded {
    fn is_older_than(&self, max_age: Option<Duration>, boot: &Boot, now: Stamp) -> bool {
        max_age.is_some_and(|max| boot.waited(self.kernel_boot, self.accepted, now) > max)
    }
}

/// A topic of which the broker refused a message for now.
#[derive(Debug, Clone, Default)]
struct Held {
    until_mono_ms: u64,
    /// Passed by a cursor, to be taken after the hold.
    deferred: BTreeSet<u64>,
    /// The first of them, tried alone: were all sent at once and it refused again, all others would overtake it.
    trial: Option<u64>,
}

/// How far records have been read, and the segment where that is. Every record below is done, taken, returned or
/// deferred; so may be some above.
#[derive(Debug, Default)]
struct Cursor {
    next: u64,
    loaded: Option<Loaded>,
}

#[derive(Debug)]
struct LaneQueue {
    next_seq: u64,
    messages: u64,
    bytes: u64,
    /// Live messages are taken first.
    live_first: bool,
    /// The first number accepted since this connection began to take; the maximum before.
    live_from: u64,
    /// Over everything, or with live first over what is below `live_from`.
    backlog: Cursor,
    /// Over the rest, with live first.
    live: Cursor,
    /// Nothing below this `live_from` is left.
    none_older_than: Option<u64>,
    /// To be taken at their place in the order, which is mostly before the cursor.
    returned: BTreeSet<u64>,
    /// In the session's hands.
    taken: BTreeSet<u64>,
    open: BTreeMap<u64, Open>,
    held: HashMap<Topic, Held>,
    held_until_mono_ms: u64,
    limits: LaneLimits,
    /// Every record below was looked at by `max_age`, and is done, dropped or taken.
    aged_to: u64,
    changed: bool,
}

/// What of a lane only memory knows.
#[derive(Debug)]
pub(super) struct Place {
    backlog: u64,
    live: u64,
    live_from: u64,
    returned: BTreeSet<u64>,
    taken: BTreeSet<u64>,
    held: HashMap<Topic, Held>,
    held_until_mono_ms: u64,
}

/// What a screen shows of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneDepth {
    /// Messages not yet done, in flight included.
    pub messages: u64,
    /// Bytes of its segments.
    pub bytes: u64,
    /// Messages in the session's hands.
    pub in_flight: u64,
    /// How long the oldest has waited, in milliseconds; `None` when empty or not known across a boot.
    pub oldest_age_ms: Option<u64>,
    /// Messages ever accepted in this epoch.
    pub accepted: u64,
    /// Bytes it may hold: the lane's own limit, or what there is for all lanes.
    pub limit_bytes: u64,
}

/// The queue of every lane.
#[derive(Debug)]
pub(crate) struct Outbox {
    lanes: [LaneQueue; 3],
    dropped: BTreeMap<(Lane, DropReason), Dropped>,
    pace: Pace,
    /// Lanes of which nothing is taken: the byte budget is used up.
    held_back: [bool; 3],
    /// Rows of `retained_ahead`.
    ahead: u64,
    unretained: Unretained,
}

pub use replay::Unretained;
pub(crate) use room::{DiskLow, Limits};

type Sql<T> = Result<T, rusqlite::Error>;

pub(super) fn key(lane: Lane, seq: u64) -> i64 {
    ((lane as i64) << 56) | seq as i64
}

fn end_of(lane: Lane) -> i64 {
    (lane as i64 + 1) << 56
}

pub(super) fn seq_of(key: i64) -> u64 {
    key as u64 & SEQ_MAX
}

impl Outbox {
    /// Reads what memory needs: counters, and which records of begun segments are done.
    pub(crate) fn load(db: &Connection, settings: &Settings) -> Sql<Self> {
        let lane = |lane: Lane| -> Sql<LaneQueue> {
            let (next_seq, messages, bytes) = db.query_row(
                "SELECT next_seq, messages, bytes FROM lane WHERE lane = ?",
                [lane as i64],
                |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
            )?;
            let mut queue = LaneQueue {
                next_seq,
                messages,
                bytes,
                live_first: replay::is_live_first(&settings.replay),
                live_from: u64::MAX,
                backlog: Cursor::default(),
                live: Cursor::default(),
                none_older_than: None,
                returned: BTreeSet::new(),
                taken: BTreeSet::new(),
                open: BTreeMap::new(),
                held: HashMap::new(),
                held_until_mono_ms: 0,
                limits: settings.lanes[lane as usize],
                aged_to: 0,
                changed: false,
            };
            // CROSS JOIN, so that the few rows of `progress` lead and not the many segments.
            let mut statement = db.prepare(
                "SELECT s.id, s.count, length(s.body), p.done FROM progress p CROSS JOIN segment s ON s.id = p.segment
                 WHERE p.segment >= ? AND p.segment < ?",
            )?;
            let mut rows = statement.query(params![key(lane, 0), end_of(lane)])?;
            while let Some(row) = rows.next()? {
                let (id, count, bytes, done): (i64, u64, u64, Vec<u8>) =
                    (row.get(0)?, count_of(row, 1)?, row.get(2)?, row.get(3)?);
                queue.open.insert(seq_of(id), Open::new(count, bytes, done));
            }
            Ok(queue)
        };
        Ok(Outbox {
            lanes: [lane(Lane::Alarm)?, lane(Lane::Normal)?, lane(Lane::Bulk)?],
            dropped: BTreeMap::new(),
            pace: Pace::new(&settings.replay),
            held_back: [false; 3],
            ahead: replay::count_ahead(db)?,
            unretained: Unretained::default(),
        })
    }

    /// Other limits, another pace, another order. What is live is so from now on.
    pub(crate) fn change(&mut self, settings: &Settings) {
        let live_first = replay::is_live_first(&settings.replay);
        for (queue, limits) in self.lanes.iter_mut().zip(settings.lanes) {
            if live_first && !queue.live_first && queue.live_from != u64::MAX {
                queue.live_from = queue.next_seq;
                queue.live = Cursor { next: queue.next_seq, loaded: None };
            }
            (queue.live_first, queue.limits) = (live_first, limits);
        }
        self.pace = Pace::new(&settings.replay);
    }

    /// What the session holds and what is held back, to be put back by [`Outbox::restore`].
    pub(super) fn place(&self) -> [Place; 3] {
        self.lanes.each_ref().map(|lane| Place {
            backlog: lane.backlog.next,
            live: lane.live.next,
            live_from: lane.live_from,
            returned: lane.returned.clone(),
            taken: lane.taken.clone(),
            held: lane.held.clone(),
            held_until_mono_ms: lane.held_until_mono_ms,
        })
    }

    /// Into a queue that was just read from the disk, which has not changed since the place was noted.
    pub(super) fn restore(&mut self, places: [Place; 3]) {
        for (lane, place) in self.lanes.iter_mut().zip(places) {
            lane.backlog.next = place.backlog;
            lane.live.next = place.live;
            lane.live_from = place.live_from;
            lane.returned = place.returned;
            lane.taken = place.taken;
            lane.held = place.held;
            lane.held_until_mono_ms = place.held_until_mono_ms;
        }
    }

    fn lane(&mut self, lane: Lane) -> &mut LaneQueue {
        &mut self.lanes[lane as usize]
    }

    /// Bytes of every segment.
    pub(crate) fn bytes(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.bytes).sum()
    }

    /// Messages that are not done.
    pub(crate) fn messages(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.messages).sum()
    }

    /// Numbers and stores messages of any lanes; the caller has made room.
    pub(crate) fn append(
        &mut self,
        db: &Connection,
        messages: Vec<Message>,
        boot: &Boot,
        now: Stamp,
    ) -> Sql<()> {
        let mut by_lane: [Vec<Entry>; 3] = Default::default();
        for message in messages {
            let lane = message.lane;
            let entries = &mut by_lane[lane as usize];
            let seq = Seq(self.lanes[lane as usize].next_seq + entries.len() as u64);
            entries.push(Entry {
                topic: message.topic,
                qos: message.qos,
                retain: message.retain,
                at_ms: message.at.wall_ms,
                expires_after_s: message
                    .expires_after
                    .map(|after| u32::try_from(after.as_secs().max(1)).unwrap_or(u32::MAX)),
                correlation_data: message.correlation_data,
                payload: message.payload.finish(boot.epoch, seq),
            });
        }
        for (lane, entries) in Lane::ALL.into_iter().zip(by_lane) {
            let mut rest = &entries[..];
            while !rest.is_empty() {
                let (now_segment, later) = rest.split_at(segment_length(rest));
                self.insert(db, lane, now_segment, boot, now)?;
                rest = later;
            }
        }
        Ok(())
    }

    fn insert(&mut self, db: &Connection, lane: Lane, entries: &[Entry], boot: &Boot, now: Stamp) -> Sql<()> {
        let queue = self.lane(lane);
        let (packing, body) = segment::encode(lane, Seq(queue.next_seq), now.wall_ms, entries);
        db.prepare_cached("INSERT INTO segment VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")?.execute(params![
            key(lane, queue.next_seq),
            entries.len() as u64,
            boot.epoch,
            boot.kernel_boot,
            now.wall_ms,
            now.mono_ms,
            packing as i64,
            body,
            now.synchronised,
        ])?;
        queue.next_seq += entries.len() as u64;
        queue.messages += entries.len() as u64;
        queue.bytes += body.len() as u64 + SEGMENT_OVERHEAD;
        queue.changed = true;
        Ok(())
    }

    /// Drops up to `limit` records numbered below `below`, the oldest first and none that is in flight; how many.
    pub(crate) fn drop_below(
        &mut self,
        db: &Connection,
        lane: Lane,
        below: u64,
        limit: u64,
        reason: DropReason,
    ) -> Sql<u64> {
        let (mut from, mut count) = (0, 0);
        while let Some((first, records)) = find(db, lane, from)?.filter(|(first, _)| *first < below) {
            from = first + records;
            for seq in first..from.min(below) {
                if count == limit {
                    return Ok(count);
                }
                if !self.lane(lane).taken.contains(&seq) && !self.is_done(db, lane, seq)? {
                    self.drop_record(db, lane, seq, reason)?;
                    count += 1;
                }
            }
        }
        Ok(count)
    }

    /// The number the lane's next message gets.
    pub(crate) fn next_seq(&self, lane: Lane) -> u64 {
        self.lanes[lane as usize].next_seq
    }

    /// Where a record stands that is not done.
    pub(crate) fn state(&self, lane: Lane, seq: u64, topic: Option<&Topic>, now: Stamp) -> State {
        let queue = &self.lanes[lane as usize];
        let held = |held: &Held| held.until_mono_ms > now.mono_ms || held.deferred.contains(&seq);
        match queue.taken.contains(&seq) {
            true => State::InFlight,
            false if queue.held_until_mono_ms > now.mono_ms => State::Held,
            false if topic.and_then(|topic| queue.held.get(topic)).is_some_and(held) => State::Held,
            false => State::Waiting,
        }
    }

    /// Marks a record done and counts it as dropped.
    pub(crate) fn drop_record(
        &mut self,
        db: &Connection,
        lane: Lane,
        seq: u64,
        reason: DropReason,
    ) -> Sql<()> {
        self.count_dropped(lane, reason, Dropped { first: seq, last: seq, count: 1 });
        self.finish(db, lane, seq)
    }

    fn count_dropped(&mut self, lane: Lane, reason: DropReason, more: Dropped) {
        let dropped = self.dropped.entry((lane, reason)).or_insert(Dropped { count: 0, ..more });
        dropped.first = dropped.first.min(more.first);
        dropped.last = dropped.last.max(more.last);
        dropped.count += more.count;
    }

    /// Marks a record done; the last one of a segment deletes it.
    pub(crate) fn finish(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<()> {
        let queue = &mut self.lanes[lane as usize];
        queue.taken.remove(&seq);
        queue.forget(seq..=seq);
        let Some(first) = queue.open_segment(db, lane, seq)? else { return Ok(()) };
        let open = queue.open.get_mut(&first).expect("open_segment has just found it");
        let index = seq - first;
        if open.is_done(index) {
            return Ok(());
        }
        open.done[index as usize / 8] |= 1 << (index % 8);
        open.left -= 1;
        open.changed = true;
        queue.messages -= 1;
        queue.changed = true;
        if open.left == 0 {
            queue.bytes = queue.bytes.saturating_sub(open.bytes + SEGMENT_OVERHEAD);
            queue.open.remove(&first);
            db.prepare_cached("DELETE FROM segment WHERE id = ?")?.execute([key(lane, first)])?;
            db.prepare_cached("DELETE FROM progress WHERE segment = ?")?.execute([key(lane, first)])?;
        }
        Ok(())
    }

    fn is_done(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<bool> {
        let queue = self.lane(lane);
        Ok(match queue.open_segment(db, lane, seq)? {
            Some(first) => queue.open[&first].is_done(seq - first),
            None => true,
        })
    }

    /// A record by its number, for a row of `inflight`. `None` when it is damaged or gone.
    pub(crate) fn record(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<Option<Record>> {
        let queue = self.lane(lane);
        if queue.loaded(seq).is_none() {
            queue.load(db, lane, seq)?;
        }
        let Some(loaded) = queue.loaded(seq) else { return Ok(None) };
        let entry = loaded.entries[(seq - loaded.first) as usize].clone();
        Ok(entry.map(|entry| {
            let left = entry.expires_after_s;
            entry.into_record(lane, Seq(seq), left)
        }))
    }

    /// Marks a record as being in the session's hands.
    pub(crate) fn mark_taken(&mut self, lane: Lane, seq: u64) {
        self.lane(lane).taken.insert(seq);
    }

    /// The same, unless it is done.
    pub(crate) fn keep_taken(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<()> {
        if !self.is_done(db, lane, seq)? {
            self.lane(lane).returned.remove(&seq);
            self.mark_taken(lane, seq);
        }
        Ok(())
    }

    /// Puts a taken record back into the queue, at its old place.
    pub(crate) fn give_back(&mut self, lane: Lane, seq: u64) {
        let queue = self.lane(lane);
        if queue.taken.remove(&seq) {
            queue.put_back(seq);
        }
    }

    /// Puts back everything taken for which `keep` says no; `false`: there was nothing.
    pub(crate) fn give_back_unless(&mut self, keep: impl Fn(Lane, u64) -> bool) -> bool {
        let mut any = false;
        for lane in Lane::ALL {
            let queue = self.lane(lane);
            let back: Vec<u64> = queue.taken.iter().copied().filter(|seq| !keep(lane, *seq)).collect();
            any |= !back.is_empty();
            for seq in back {
                self.give_back(lane, seq);
            }
        }
        any
    }

    /// Puts a refused record back and holds its topic or its lane.
    pub(crate) fn hold(
        &mut self,
        db: &Connection,
        lane: Lane,
        seq: u64,
        hold: Hold,
        until_mono_ms: u64,
    ) -> Sql<()> {
        let topic = self.record(db, lane, seq)?.map(|record| record.topic);
        let queue = self.lane(lane);
        queue.taken.remove(&seq);
        let passed = queue.cursor_over(seq).next;
        match (hold, topic) {
            (Hold::Topic, Some(topic)) => {
                let held = queue.held.entry(topic).or_default();
                held.until_mono_ms = held.until_mono_ms.max(until_mono_ms);
                held.trial = held.trial.filter(|trial| *trial != seq);
                if seq < passed {
                    held.deferred.insert(seq);
                }
            }
            _ => {
                queue.held_until_mono_ms = queue.held_until_mono_ms.max(until_mono_ms);
                queue.put_back(seq);
            }
        }
        Ok(())
    }

    /// Reads the first segment at or after a key, whole; the key to go on from, `None` at the end.
    pub(crate) fn read_through(db: &Connection, from: i64) -> Sql<Option<i64>> {
        db.prepare_cached("SELECT id, body FROM segment WHERE id >= ? ORDER BY id LIMIT 1")?
            .query_row([from], |row| {
                let _read: Vec<u8> = row.get(1)?;
                Ok(row.get::<_, i64>(0)? + 1)
            })
            .optional()
    }

    /// Writes what the transaction changed: lane counters, done bits, drop counters.
    pub(crate) fn write_changes(&mut self, db: &Connection) -> Sql<()> {
        for lane in Lane::ALL {
            let queue = self.lane(lane);
            for (first, open) in queue.open.iter_mut().filter(|(_, open)| open.changed) {
                db.prepare_cached(
                    "INSERT INTO progress VALUES (?1, ?2) ON CONFLICT (segment) DO UPDATE SET done = ?2",
                )?
                .execute(params![key(lane, *first), open.done])?;
                open.changed = false;
            }
            if queue.changed {
                db.prepare_cached(
                    "UPDATE lane SET next_seq = ?2, messages = ?3, bytes = ?4 WHERE lane = ?1",
                )?
                .execute(params![
                    lane as i64,
                    queue.next_seq,
                    queue.messages,
                    queue.bytes
                ])?;
                queue.changed = false;
            }
        }
        for ((lane, reason), dropped) in std::mem::take(&mut self.dropped) {
            db.prepare_cached(
                "INSERT INTO dropped VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET count = count + ?3",
            )?
            .execute(params![lane as i64, reason.name(), dropped.count])?;
            db.prepare_cached(
                "INSERT INTO gap VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET
                 first_seq = min(first_seq, ?3), last_seq = max(last_seq, ?4), count = count + ?5",
            )?
            .execute(params![
                lane as i64,
                reason.name(),
                dropped.first,
                dropped.last,
                dropped.count
            ])?;
        }
        Ok(())
    }

    /// What a screen shows.
    pub(crate) fn depth(&self, db: &Connection, boot: &Boot, quota: u64, now: Stamp) -> Sql<[LaneDepth; 3]> {
        let mut depths = [LaneDepth::default(); 3];
        for lane in Lane::ALL {
            let queue = &self.lanes[lane as usize];
            let oldest: Option<(u32, Stamp)> = db
                .prepare_cached(
                    "SELECT kernel_boot, accepted_ms, accepted_mono, synchronised FROM segment
                     WHERE id >= ? AND id < ? ORDER BY id LIMIT 1",
                )?
                .query_row(params![key(lane, 0), end_of(lane)], |row| {
                    let (wall_ms, mono_ms, synchronised) = (row.get(1)?, row.get(2)?, row.get(3)?);
                    Ok((row.get(0)?, Stamp { wall_ms, mono_ms, synchronised }))
                })
                .optional()?;
            depths[lane as usize] = LaneDepth {
                messages: queue.messages,
                bytes: queue.bytes,
                in_flight: queue.taken.len() as u64,
                oldest_age_ms: oldest
                    .and_then(|(kernel_boot, accepted)| boot.elapsed_ms(kernel_boot, accepted, now)),
                accepted: queue.next_seq.saturating_sub(1),
                limit_bytes: queue.limits.max_bytes.map_or(quota, |own| own.min(quota)),
            };
        }
        Ok(depths)
    }
}

impl Open {
    fn new(count: u64, body_bytes: u64, mut done: Vec<u8>) -> Self {
        done.resize(count.div_ceil(8) as usize, 0);
        let set = (0..count).filter(|n| done[*n as usize / 8] & (1 << (n % 8)) != 0).count() as u64;
        Open { count, bytes: body_bytes, done, left: count - set, changed: false }
    }
}

impl LaneQueue {
    fn pass(&mut self, seq: u64) {
        if !self.returned.remove(&seq) {
            let cursor = self.cursor_over(seq);
            cursor.next = cursor.next.max(seq + 1);
        }
    }

    /// Back into the queue. What the cursor has yet to pass, it will find by itself.
    fn put_back(&mut self, seq: u64) {
        if seq < self.cursor_over(seq).next {
            self.returned.insert(seq);
        }
    }

    fn release_held(&mut self, now: Stamp) {
        let due = |held: &&mut Held| held.trial.is_none() && held.until_mono_ms <= now.mono_ms;
        for held in self.held.values_mut().filter(due) {
            held.trial = held.deferred.pop_first();
            self.returned.extend(held.trial);
        }
        self.held.retain(|_, held| held.trial.is_some() || held.until_mono_ms > now.mono_ms);
    }

    /// Records are done: nothing waits for them any more. If one was a topic's trial, the others may follow.
    fn forget(&mut self, seqs: RangeInclusive<u64>) {
        remove(&mut self.returned, &seqs);
        for held in self.held.values_mut() {
            remove(&mut held.deferred, &seqs);
        }
        let tried = |held: &Held| held.trial.is_some_and(|trial| seqs.contains(&trial));
        for (_, held) in self.held.extract_if(|_, held| tried(held)) {
            self.returned.extend(held.deferred);
        }
    }

    /// Decodes the segment that holds `seq`, or the first one after it.
    fn load(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<bool> {
        let Some((first, count)) = find(db, lane, seq)? else {
            self.cursor_over(seq).loaded = None;
            return Ok(false);
        };
        let (kernel_boot, accepted, packing, body): (u32, Stamp, i64, Vec<u8>) = db
            .prepare_cached(
                "SELECT kernel_boot, accepted_ms, accepted_mono, synchronised, packing, body FROM segment
                 WHERE id = ?",
            )?
            .query_row([key(lane, first)], |row| {
                let (wall_ms, mono_ms, synchronised) = (row.get(1)?, row.get(2)?, row.get(3)?);
                Ok((row.get(0)?, Stamp { wall_ms, mono_ms, synchronised }, row.get(4)?, row.get(5)?))
            })
            .optional()?
            .ok_or_else(|| lies(format!("segment {first} of lane {lane} is there and is not")))?;
        self.open.entry(first).or_insert_with(|| Open::new(count, body.len() as u64, Vec::new()));
        let entries = segment::decode(lane, Seq(first), count as usize, accepted.wall_ms, packing, body);
        // What cannot be read may not be there: a count that is damaged would cover up the segments behind it.
        if entries.contains(&None) {
            let last = key(lane, first + count - 1);
            let covers = "SELECT EXISTS (SELECT 1 FROM segment WHERE id > ? AND id <= ?)";
            if db.prepare_cached(covers)?.query_row([key(lane, first), last], |row| row.get(0))? {
                return Err(lies(format!("{count} records from {first} on cover up other segments")));
            }
        }
        self.cursor_over(seq).loaded = Some(Loaded { first, entries, accepted, kernel_boot });
        Ok(true)
    }

    /// The first number of the segment that holds `seq`, which is in `open` afterwards; `None`: long done.
    fn open_segment(&mut self, db: &Connection, lane: Lane, seq: u64) -> Sql<Option<u64>> {
        if let Some((first, open)) = self.open.range(..=seq).next_back()
            && seq < first + open.count
        {
            return Ok(Some(*first));
        }
        let holds = |(first, count): &(u64, u64)| (*first..first + count).contains(&seq);
        let Some((first, count)) = find(db, lane, seq)?.filter(holds) else {
            return Ok(None);
        };
        let bytes: u64 = db
            .prepare_cached("SELECT length(body) FROM segment WHERE id = ?")?
            .query_row([key(lane, first)], |row| row.get(0))?;
        self.open.insert(first, Open::new(count, bytes, Vec::new()));
        Ok(Some(first))
    }
}

fn remove(from: &mut BTreeSet<u64>, seqs: &RangeInclusive<u64>) {
    while let Some(seq) = from.range(seqs.clone()).next().copied() {
        from.remove(&seq);
    }
}

/// First number and count of the segment that holds `seq`, or else of the first one after it.
fn find(db: &Connection, lane: Lane, seq: u64) -> Sql<Option<(u64, u64)>> {
    if seq > SEQ_MAX {
        return Ok(None);
    }
    let read = |row: &rusqlite::Row<'_>| Ok((seq_of(row.get(0)?), count_of(row, 1)?));
    let holding = db
        .prepare_cached("SELECT id, count FROM segment WHERE id <= ? AND id >= ? ORDER BY id DESC LIMIT 1")?
        .query_row(params![key(lane, seq), key(lane, 0)], read)
        .optional()?
        .filter(|(first, count)| seq < first + count);
    if holding.is_some() {
        return Ok(holding);
    }
    db.prepare_cached("SELECT id, count FROM segment WHERE id > ? AND id < ? ORDER BY id LIMIT 1")?
        .query_row(params![key(lane, seq), end_of(lane)], read)
        .optional()
}

/// A segment's count of records: one that is damaged must cost neither memory nor time.
fn count_of(row: &rusqlite::Row<'_>, column: usize) -> Sql<u64> {
    let count = row.get(column)?;
    if (1..=u64::from(segment::RECORDS_MAX)).contains(&count) {
        Ok(count)
    } else {
        Err(lies(format!("a segment says that it has {count} records")))
    }
}

/// What the tables say cannot all be true: damage that SQLite has not noticed.
fn lies(what: String) -> rusqlite::Error {
    let corrupt = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    rusqlite::Error::SqliteFailure(corrupt, Some(what))
}

/// How many of the entries go into one segment.
fn segment_length(entries: &[Entry]) -> usize {
    let mut bytes = 0;
    let fits = |entry: &&Entry| {
        bytes += entry.payload.len();
        bytes <= SEGMENT_BYTES
    };
    entries.iter().take(segment::RECORDS_MAX as usize).take_while(fits).count().max(1)
}
