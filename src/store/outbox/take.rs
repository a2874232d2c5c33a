//! What is handed out next: returned records, then what a cursor finds; expired, aged and damaged ones are dropped
//! on the way, those of a held topic are put by.

use rusqlite::Connection;

use super::super::Boot;
use super::replay::Part;
use super::{DropReason, LaneQueue, Loaded, Outbox, Sql, lies};
use crate::clock::Stamp;
use crate::message::{Lane, Qos, Record, Seq};
use crate::store::segment::Entry;

/// Messages held behind refused ones of their topic, per lane; beyond it the whole lane is held.
const DEFERRED_MAX: usize = 10_000;
/// Unfinished QoS 1 messages sent before a resumed QoS 2 one, at most: no window was ever larger.
const OLDER_MAX: usize = 1_000;

impl Outbox {
    /// The next record of a part of a lane that may be sent, marked as taken. `None`: nothing now.
    pub(crate) fn take(
        &mut self,
        db: &Connection,
        (lane, part): (Lane, Part),
        boot: &Boot,
        now: Stamp,
    ) -> Sql<Option<Record>> {
        // Even in a lane that is held: a topic whose time has come must not ask for attention again and again.
        self.lane(lane).release_held(now);
        if self.held_back[lane as usize] || self.lane(lane).held_until_mono_ms > now.mono_ms {
            return Ok(None);
        }
        while let Some(seq) = self.candidate(db, lane, part)? {
            if self.is_backlog(lane, seq) && !self.pace.lets_pass(now.mono_ms) {
                return Ok(None);
            }
            let Some((entry, expires_s)) = self.readable(db, lane, seq, boot, now)? else { continue };
            let queue = self.lane(lane);
            if let Some(held) = queue.held.get_mut(&entry.topic)
                && let Some(trial) = held.trial.filter(|trial| seq < *trial && queue.returned.remove(trial))
            {
                // An older one came back before the trial was sent.
                held.deferred.insert(trial);
                held.trial = Some(seq);
            }
            let deferred: usize = queue.held.values().map(|held| held.deferred.len()).sum();
            if let Some(held) = queue.held.get_mut(&entry.topic).filter(|held| held.trial != Some(seq)) {
                if deferred >= DEFERRED_MAX {
                    queue.held_until_mono_ms = held.until_mono_ms;
                    return Ok(None);
                }
                held.deferred.insert(seq);
                queue.pass(seq);
                continue;
            }
            queue.pass(seq);
            queue.taken.insert(seq);
            let retain = entry.retain && self.keeps_retain(db, lane, seq, &entry.topic)?;
            return Ok(Some(Record { retain, ..entry.into_record(lane, Seq(seq), expires_s) }));
        }
        Ok(None)
    }

    /// The number to look at next: a returned one, or the first that the part's cursor finds open.
    fn candidate(&mut self, db: &Connection, lane: Lane, part: Part) -> Sql<Option<u64>> {
        let range = self.lane(lane).range(part);
        let mut returned = None;
        while let Some(seq) = self.lane(lane).returned.range(range.clone()).next().copied() {
            // A limit may have taken it meanwhile.
            if !self.is_done(db, lane, seq)? {
                returned = Some(seq);
                break;
            }
            self.lane(lane).returned.remove(&seq);
        }
        if let Some(seq) = returned.filter(|seq| *seq < self.lane(lane).cursor(part).next) {
            return Ok(Some(seq));
        }
        // What came back before its part ended may lie ahead of the cursor.
        Ok([returned, self.ahead(db, lane, part)?].into_iter().flatten().min())
    }

    fn ahead(&mut self, db: &Connection, lane: Lane, part: Part) -> Sql<Option<u64>> {
        loop {
            let queue = self.lane(lane);
            let end = queue.range(part).end.min(queue.next_seq);
            let seq = queue.cursor(part).next;
            let found = seq < end && (queue.loaded(seq).is_some() || queue.load(db, lane, seq)?);
            let cursor = queue.cursor_mut(part);
            let first = cursor.loaded.as_ref().map_or(end, |loaded| loaded.first);
            let seq = seq.max(first);
            if !found || seq >= end {
                cursor.next = cursor.next.max(end);
                return Ok(None);
            }
            cursor.next = seq;
            if queue.is_put_by(seq) || self.is_done(db, lane, seq)? {
                self.lane(lane).cursor_mut(part).next += 1;
                continue;
            }
            return Ok(Some(seq));
        }
    }

    /// The entry, unless it is damaged or has expired, in which case it is dropped.
    fn readable(
        &mut self,
        db: &Connection,
        lane: Lane,
        seq: u64,
        boot: &Boot,
        now: Stamp,
    ) -> Sql<Option<(Entry, Option<u32>)>> {
        let queue = self.lane(lane);
        if queue.loaded(seq).is_none() {
            queue.load(db, lane, seq)?;
        }
        let max_age = queue.limits.max_age;
        let Some(loaded) = queue.loaded(seq) else {
            queue.pass(seq);
            return Ok(None);
        };
        let reason = match &loaded.entries[(seq - loaded.first) as usize] {
            None => DropReason::Damaged,
            Some(_) if loaded.is_older_than(max_age, boot, now) => DropReason::MaxAge,
            Some(entry) => match time_left(entry.expires_after_s, loaded, boot, now) {
                Some(left) => return Ok(Some((entry.clone(), left))),
                None => DropReason::Expired,
            },
        };
        queue.pass(seq);
        self.drop_record(db, lane, seq, reason)?;
        Ok(None)
    }

    /// Unfinished QoS 1 records older than `seq`, marked as taken: sent before it, they keep the order. With live
    /// first there is no such order to keep: what is older is the backlog, and follows at its pace.
    pub(crate) fn older(
        &mut self,
        db: &Connection,
        lane: Lane,
        seq: u64,
        boot: &Boot,
        now: Stamp,
    ) -> Sql<Vec<Record>> {
        let mut older = Vec::new();
        let mut passed = Vec::new();
        if self.is_live_first() || self.lane(lane).held_until_mono_ms > now.mono_ms {
            return Ok(older);
        }
        while let Some(candidate) = self.candidate(db, lane, Part::Whole)? {
            if candidate >= seq || older.len() + passed.len() >= OLDER_MAX {
                break;
            }
            let Some((entry, expires_s)) = self.readable(db, lane, candidate, boot, now)? else { continue };
            let queue = self.lane(lane);
            queue.pass(candidate);
            let held = queue.held.get(&entry.topic).is_some_and(|held| held.trial != Some(candidate));
            if entry.qos == Qos::AtLeastOnce && !held {
                queue.taken.insert(candidate);
                older.push(entry.into_record(lane, Seq(candidate), expires_s));
            } else {
                passed.push(candidate);
            }
        }
        self.lane(lane).returned.extend(passed);
        Ok(older)
    }

    /// When the next hold ends or the backlog may go on, by the monotonic clock.
    pub(crate) fn next_release(&self, now: Stamp, held_back: [bool; 3]) -> Option<u64> {
        let holds = |lane: &LaneQueue| match lane.held_until_mono_ms {
            // No topic is free before its lane is.
            until if until > now.mono_ms => Some(until),
            _ => lane.held.values().filter(|held| held.trial.is_none()).map(|held| held.until_mono_ms).min(),
        };
        let is_free = |lane: &&LaneQueue| lane.held_until_mono_ms <= now.mono_ms;
        let paced = self.not_of(held_back).filter(is_free).any(LaneQueue::has_backlog);
        let gathered = paced.then(|| self.pace.gathered_at(now.mono_ms)).filter(|at| *at > now.mono_ms);
        self.not_of(held_back).filter_map(holds).chain(gathered).min()
    }

    /// Whether anything waits that is neither taken nor held, and may go now.
    pub(crate) fn has_waiting(&self, now: Stamp, held_back: [bool; 3]) -> bool {
        let may_follow = self.pace.gathered_at(now.mono_ms) <= now.mono_ms;
        self.not_of(held_back).any(|lane| match lane.has_backlog() {
            true => may_follow || (self.is_live_first() && lane.has_live()),
            false => lane.has_live(),
        })
    }

    /// Whether anything waits in these lanes.
    pub(crate) fn has_any_of(&self, lanes: [bool; 3]) -> bool {
        let others = lanes.map(|listed| !listed);
        self.not_of(others).any(|lane| lane.has_backlog() || lane.has_live())
    }

    /// Nothing is taken of these lanes from now on.
    pub(crate) fn hold_back(&mut self, lanes: [bool; 3]) {
        self.held_back = lanes;
    }

    fn not_of(&self, lanes: [bool; 3]) -> impl Iterator<Item = &LaneQueue> {
        self.lanes.iter().zip(lanes).filter(|(_, listed)| !listed).map(|(lane, _)| lane)
    }

    /// A lane that has been read to its end although it counts more messages than were found is damaged.
    pub(crate) fn check_ends(&self) -> Sql<()> {
        let missing = Lane::ALL.into_iter().find_map(|lane| {
            let queue = &self.lanes[lane as usize];
            let deferred: usize = queue.held.values().map(|held| held.deferred.len()).sum();
            let found = (queue.taken.len() + queue.returned.len() + deferred) as u64;
            let missing = queue.messages.saturating_sub(found);
            (queue.is_read_to_its_end() && missing > 0).then_some((lane, missing))
        });
        match missing {
            None => Ok(()),
            Some((lane, missing)) => Err(lies(format!("{missing} messages of lane {lane} cannot be found"))),
        }
    }
}

/// `None`: expired. Otherwise how many seconds are left, if it expires at all. Where the time since
/// acceptance cannot be known (another boot, an unset clock), nothing expires.
fn time_left(expires_after_s: Option<u32>, loaded: &Loaded, boot: &Boot, now: Stamp) -> Option<Option<u32>> {
    let Some(after_s) = expires_after_s else { return Some(None) };
    let waited_s = boot.elapsed_ms(loaded.kernel_boot, loaded.accepted, now).unwrap_or(0) / 1000;
    match u64::from(after_s).checked_sub(waited_s) {
        None | Some(0) => None,
        Some(left) => Some(Some(left as u32)),
    }
}
