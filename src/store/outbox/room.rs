//! Who loses when a limit is reached: decided first, dropped then, whole segments where that is possible.
//!
//! Invariants: an append that is refused has dropped nothing; a record in flight is never dropped; what one commit
//! drops beyond the room it needs is bounded, so that a lowered limit does not stall it.

use rusqlite::{Connection, OptionalExtension, params};

use super::super::{LaneLimits, NotAccepted, WhenFull};
use super::{DropReason, Dropped, Open, Outbox, SEGMENT_OVERHEAD, Sql, count_of, end_of, key, seq_of};
use crate::clock::Stamp;
use crate::message::{Lane, Message};
use crate::store::Boot;
use crate::store::segment::RECORDS_MAX;

/// Bytes a record takes beside topic and payload, at most: flags, four numbers, checksum.
const RECORD_OVERHEAD: u64 = 30;
/// Bytes a small message takes, about, with a segment of its own.
const SMALL_BYTES: u64 = 256;
/// Segments one commit drops beyond the room it needs, at most.
const TRIM_SEGMENTS_MAX: u64 = 1024;
/// Bytes of segments one commit drops beyond the room it needs, at most.
const TRIM_BYTES_MAX: u64 = 4 << 20;

/// What the queue may hold.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Bytes of all lanes.
    pub(crate) quota: u64,
    /// Bytes that fit without the file growing, where the disk's free space is below what was asked for.
    pub(crate) disk_low: Option<DiskLow>,
    /// Who loses, for lanes that say nothing else.
    pub(crate) when_full: WhenFull,
}

impl Limits {
    /// Bytes of messages there may be, and what is to blame for there being no more.
    fn room(&self) -> (u64, DropReason) {
        match self.disk_low {
            Some(low) if low.room < self.quota => (low.room, DropReason::MinFreeDisk),
            _ => (self.quota, DropReason::Quota),
        }
    }

    /// What is told to whom there is no room for, with so many bytes in use.
    fn refusal(&self, used: u64) -> NotAccepted {
        match (self.room(), self.disk_low) {
            ((_, DropReason::MinFreeDisk), Some(DiskLow { free, wanted, .. })) => {
                NotAccepted::DiskLow { free, wanted }
            }
            _ => NotAccepted::QuotaFull { quota: self.quota, used },
        }
    }
}

/// The disk's free space is below `min_free_disk`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskLow {
    /// Bytes of messages for which the file need not grow.
    pub(crate) room: u64,
    /// Free bytes of the file system.
    pub(crate) free: u64,
    /// `min_free_disk`.
    pub(crate) wanted: u64,
}

/// What an append takes of a lane, at most.
#[derive(Debug, Clone, Copy, Default)]
struct Need {
    messages: u64,
    bytes: u64,
}

/// What is to be dropped from a lane.
#[derive(Debug, Clone, Copy)]
enum Excess {
    Messages(u64),
    Bytes(u64),
}

/// What must go for each limit of a lane.
type Beyond = [Option<(Excess, DropReason)>; 2];

/// A segment before it is dropped.
struct Segment {
    first: u64,
    count: u64,
    bytes: u64,
    kernel_boot: u32,
    accepted: Stamp,
}

/// How much more may be dropped beyond the room that is needed.
struct Trim {
    segments: u64,
    bytes: u64,
}

impl Trim {
    fn new() -> Self {
        Trim { segments: TRIM_SEGMENTS_MAX, bytes: TRIM_BYTES_MAX }
    }

    fn is_used_up(&self) -> bool {
        self.segments == 0 || self.bytes == 0
    }

    fn count(&mut self, bytes: u64) {
        self.segments = self.segments.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

impl Outbox {
    /// Makes room for messages, if their lanes' limits and the quota let it: drops the oldest that are not in
    /// flight, of their own lane for its limits, of the lowest lane first and none above theirs for the quota.
    pub(crate) fn make_room<'a>(
        &mut self,
        db: &Connection,
        messages: impl Iterator<Item = &'a Message> + Clone,
        limits: &Limits,
    ) -> Sql<Result<(), NotAccepted>> {
        let needs = needs(messages.clone());
        let Some(highest) = messages.map(|message| message.lane).min() else { return Ok(Ok(())) };
        let mut drops = Vec::new();
        for lane in Lane::ALL {
            match self.beyond_own_limits(db, lane, needs[lane as usize], limits.when_full)? {
                Ok(excess) => drops.extend(excess.into_iter().flatten().map(|(e, reason)| (lane, e, reason))),
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        let need = total(&needs);
        let (fits, reason) = limits.room();
        let is_over = self.bytes() + need > fits;
        if is_over {
            let policy = self.lane(highest).limits.when_full.unwrap_or(limits.when_full);
            let mut fixed = self.bytes();
            for lane in Lane::ALL.into_iter().filter(|lane| *lane >= highest) {
                fixed -= self.lane(lane).bytes.saturating_sub(self.pinned_bytes(db, lane)?);
            }
            if policy == WhenFull::RejectNew || fixed + need > fits {
                return Ok(Err(limits.refusal(self.bytes())));
            }
        }
        for (lane, excess, reason) in drops {
            let need = needs[lane as usize];
            self.drop_oldest(db, lane, excess, need, reason)?;
        }
        for lane in Lane::ALL.into_iter().rev().filter(|lane| is_over && *lane >= highest) {
            let excess = (self.bytes() + need).saturating_sub(fits);
            self.drop_oldest(db, lane, Excess::Bytes(excess), Need { messages: 0, bytes: need }, reason)?;
        }
        Ok(Ok(()))
    }

    /// Whether the messages fit as things are: nothing would be dropped for them.
    pub(crate) fn has_room<'a>(&self, messages: impl Iterator<Item = &'a Message>, limits: &Limits) -> bool {
        let needs = needs(messages);
        let fits = |(queue, need): (&super::LaneQueue, &Need)| {
            let LaneLimits { max_messages, max_bytes, .. } = queue.limits;
            need.messages == 0
                || (max_messages.is_none_or(|max| queue.messages + need.messages <= max)
                    && max_bytes.is_none_or(|max| queue.bytes + need.bytes <= max))
        };
        self.bytes() + total(&needs) <= limits.room().0 && self.lanes.iter().zip(&needs).all(fits)
    }

    /// For each lane, why a small message would be refused as things are. Where older ones would make room for it, it
    /// would not be, unless all of them are in flight, which passes.
    pub(crate) fn refusing(&self, limits: &Limits) -> [Option<NotAccepted>; 3] {
        let used = self.bytes();
        let has_room = used + SMALL_BYTES <= limits.room().0;
        Lane::ALL.map(|lane| {
            let queue = &self.lanes[lane as usize];
            let LaneLimits { max_messages, max_bytes, when_full, .. } = queue.limits;
            if when_full.unwrap_or(limits.when_full) != WhenFull::RejectNew {
                return None;
            }
            let full = |limit, max, used| NotAccepted::LaneFull { lane, limit, max, used };
            let by_count = max_messages.filter(|max| queue.messages >= *max);
            let by_count = by_count.map(|max| full("max_messages", max, queue.messages));
            let by_bytes = max_bytes.filter(|max| queue.bytes + SMALL_BYTES > *max);
            let by_bytes = by_bytes.map(|max| full("max_bytes", max, queue.bytes));
            by_count.or(by_bytes).or_else(|| (!has_room).then(|| limits.refusal(used)))
        })
    }

    /// Bytes the messages take, at most.
    pub(crate) fn cost(messages: &[Message]) -> u64 {
        total(&needs(messages.iter()))
    }

    /// What must go from a lane for its own limits' sake, or why the messages cannot be taken.
    fn beyond_own_limits(
        &mut self,
        db: &Connection,
        lane: Lane,
        need: Need,
        when_full: WhenFull,
    ) -> Sql<Result<Beyond, NotAccepted>> {
        let queue = self.lane(lane);
        let LaneLimits { max_messages, max_bytes, when_full: own, .. } = queue.limits;
        let rejects = own.unwrap_or(when_full) == WhenFull::RejectNew;
        let (messages, in_flight, bytes) = (queue.messages, queue.taken.len() as u64, queue.bytes);
        let mut excess = [None; 2];
        if need.messages == 0 {
            return Ok(Ok(excess));
        }
        if let Some(max) = max_messages.filter(|max| messages + need.messages > *max) {
            if rejects || in_flight + need.messages > max {
                return Ok(Err(NotAccepted::LaneFull { lane, limit: "max_messages", max, used: messages }));
            }
            excess[0] = Some((Excess::Messages(messages + need.messages - max), DropReason::MaxMessages));
        }
        if let Some(max) = max_bytes.filter(|max| bytes + need.bytes > *max) {
            if rejects || self.pinned_bytes(db, lane)? + need.bytes > max {
                return Ok(Err(NotAccepted::LaneFull { lane, limit: "max_bytes", max, used: bytes }));
            }
            excess[1] = Some((Excess::Bytes(bytes + need.bytes - max), DropReason::MaxBytes));
        }
        Ok(Ok(excess))
    }

    /// Bytes of the lane's segments that cannot go, because a record of theirs is in flight.
    fn pinned_bytes(&mut self, db: &Connection, lane: Lane) -> Sql<u64> {
        let queue = self.lane(lane);
        let (mut bytes, mut from) = (0, 0);
        while let Some(seq) = queue.taken.range(from..).next().copied() {
            from = seq + 1;
            if let Some(first) = queue.open_segment(db, lane, seq)? {
                let open = &queue.open[&first];
                bytes += open.bytes + SEGMENT_OVERHEAD;
                from = first + open.count;
            }
        }
        Ok(bytes)
    }

    /// Drops the oldest of a lane until the excess is gone, or as much as is needed now and the bound allows.
    fn drop_oldest(
        &mut self,
        db: &Connection,
        lane: Lane,
        excess: Excess,
        need: Need,
        reason: DropReason,
    ) -> Sql<()> {
        let (mut trim, mut from) = (Trim::new(), 0);
        let (mut messages, mut bytes) = (0, 0);
        loop {
            let (is_gone, is_enough) = match excess {
                Excess::Messages(excess) => (messages >= excess, messages >= need.messages),
                Excess::Bytes(excess) => (bytes >= excess, bytes >= need.bytes),
            };
            if is_gone || (is_enough && trim.is_used_up()) {
                return Ok(());
            }
            let Some(segment) = next_segment(db, lane, from)? else { return Ok(()) };
            from = segment.first + segment.count;
            trim.count(segment.bytes);
            let left = self.lane(lane).left_of(&segment);
            match excess {
                Excess::Messages(excess) if self.is_pinned(lane, &segment) || messages + left > excess => {
                    messages += self.drop_records(db, lane, &segment, excess - messages, reason)?;
                }
                // Without one of its records a segment takes as many bytes as with it.
                Excess::Bytes(_) if self.is_pinned(lane, &segment) => {}
                _ => {
                    self.drop_segment(db, lane, &segment, reason)?;
                    messages += left;
                    bytes += segment.bytes + SEGMENT_OVERHEAD;
                }
            }
        }
    }

    /// Drops what has waited in the queue for longer than its lane allows.
    pub(crate) fn drop_aged(&mut self, db: &Connection, boot: &Boot, now: Stamp) -> Sql<()> {
        for lane in Lane::ALL {
            let Some(max_age) = self.lane(lane).limits.max_age else { continue };
            let mut trim = Trim::new();
            while !trim.is_used_up() {
                let Some(segment) = next_segment(db, lane, self.lane(lane).aged_to)? else { break };
                if boot.waited(segment.kernel_boot, segment.accepted, now) <= max_age {
                    break;
                }
                trim.count(segment.bytes);
                if self.is_pinned(lane, &segment) {
                    self.drop_records(db, lane, &segment, u64::MAX, DropReason::MaxAge)?;
                } else {
                    self.drop_segment(db, lane, &segment, DropReason::MaxAge)?;
                }
                self.lane(lane).aged_to = segment.first + segment.count;
            }
        }
        Ok(())
    }

    fn is_pinned(&self, lane: Lane, segment: &Segment) -> bool {
        let seqs = segment.first..segment.first + segment.count;
        self.lanes[lane as usize].taken.range(seqs).next().is_some()
    }

    /// Drops the first records of a segment that are not in flight, `most` at most; how many it were.
    fn drop_records(
        &mut self,
        db: &Connection,
        lane: Lane,
        segment: &Segment,
        most: u64,
        reason: DropReason,
    ) -> Sql<u64> {
        let mut dropped = 0;
        for seq in segment.first..segment.first + segment.count {
            if dropped < most && !self.lane(lane).taken.contains(&seq) && !self.is_done(db, lane, seq)? {
                self.drop_record(db, lane, seq, reason)?;
                dropped += 1;
            }
        }
        Ok(dropped)
    }

    /// Drops a segment of which nothing is in flight, without looking at its records.
    fn drop_segment(
        &mut self,
        db: &Connection,
        lane: Lane,
        segment: &Segment,
        reason: DropReason,
    ) -> Sql<()> {
        let queue = &mut self.lanes[lane as usize];
        let (first, end) = (segment.first, segment.first + segment.count);
        let dropped = match queue.open.remove(&first) {
            None => Dropped { first, last: end - 1, count: segment.count },
            Some(open) => {
                let mut left = (first..end).filter(|seq| !open.is_done(seq - first));
                let oldest = left.next().unwrap_or(first);
                Dropped { first: oldest, last: left.next_back().unwrap_or(oldest), count: open.left }
            }
        };
        queue.forget(first..=end - 1);
        for cursor in [&mut queue.backlog, &mut queue.live] {
            cursor.loaded.take_if(|loaded| loaded.first == first);
        }
        queue.messages -= dropped.count;
        queue.bytes = queue.bytes.saturating_sub(segment.bytes + SEGMENT_OVERHEAD);
        queue.changed = true;
        if dropped.count > 0 {
            self.count_dropped(lane, reason, dropped);
        }
        db.prepare_cached("DELETE FROM segment WHERE id = ?")?.execute([key(lane, first)])?;
        db.prepare_cached("DELETE FROM progress WHERE segment = ?")?.execute([key(lane, first)])?;
        Ok(())
    }
}

impl super::LaneQueue {
    fn left_of(&self, segment: &Segment) -> u64 {
        self.open.get(&segment.first).map_or(segment.count, |open: &Open| open.left)
    }
}

/// What the messages take of each lane.
fn needs<'a>(messages: impl Iterator<Item = &'a Message>) -> [Need; 3] {
    let mut needs = [Need::default(); 3];
    for message in messages {
        let need = &mut needs[message.lane as usize];
        need.messages += 1;
        let correlation = message.correlation_data.as_ref().map_or(0, |data| data.len());
        let bytes = message.payload.len_max() + message.topic.as_str().len() + correlation;
        need.bytes += bytes as u64 + RECORD_OVERHEAD;
    }
    for need in needs.iter_mut().filter(|need| need.messages > 0) {
        need.bytes += SEGMENT_OVERHEAD * need.messages.div_ceil(u64::from(RECORDS_MAX));
    }
    needs
}

fn total(needs: &[Need; 3]) -> u64 {
    needs.iter().map(|need| need.bytes).sum()
}

/// The first segment of a lane at or after a number.
fn next_segment(db: &Connection, lane: Lane, from: u64) -> Sql<Option<Segment>> {
    db.prepare_cached(
        "SELECT id, count, length(body), kernel_boot, accepted_ms, accepted_mono, synchronised FROM segment
         WHERE id >= ? AND id < ? ORDER BY id LIMIT 1",
    )?
    .query_row(params![key(lane, from), end_of(lane)], |row| {
        let accepted = Stamp { wall_ms: row.get(4)?, mono_ms: row.get(5)?, synchronised: row.get(6)? };
        let (first, count, bytes) = (seq_of(row.get(0)?), count_of(row, 1)?, row.get(2)?);
        Ok(Segment { first, count, bytes, kernel_boot: row.get(3)?, accepted })
    })
    .optional()
}
