//! Backlog and live: which of the two is handed out first, how fast the backlog follows, and who keeps the retain
//! flag.
//!
//! The backlog is what was accepted before this connection began to take. With live first, what is accepted since is
//! taken first, by lane, and the backlog follows with a cursor of its own; within each of the two the order is kept.
//!
//! Invariant: a retained message that goes after a newer one of its topic goes without its flag, also after a
//! restart, or the broker would keep the old value for the new one.

use std::ops::Range;

use rusqlite::{Connection, OptionalExtension, params};

use super::super::{Replay, ReplayOrder};
use super::{Cursor, LaneQueue, Loaded, Outbox, Sql, end_of, key, seq_of};
use crate::clock::Stamp;
use crate::message::{Lane, Record, Topic};
use crate::store::pace::Pace;
use crate::turn::record_bytes;

/// Topics of which it is known that a newer value was sent before older ones, at most. Beyond it, messages of
/// unknown topics in the backlog go without the retain flag, and are counted.
const AHEAD_MAX: u64 = 10_000;

/// Messages sent without their retain flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unretained {
    /// A newer message of their topic was sent before.
    pub overtaken: u64,
    /// It is not known whether one was, because there are too many topics.
    pub unknown: u64,
}

/// What of a lane is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it, in order.
    Whole,
    /// What was accepted since this connection began to take.
    Live,
    /// What was accepted before.
    Backlog,
}

const IN_ORDER: [(Lane, Part); 3] =
    [(Lane::Alarm, Part::Whole), (Lane::Normal, Part::Whole), (Lane::Bulk, Part::Whole)];
const LIVE_FIRST: [(Lane, Part); 6] = [
    (Lane::Alarm, Part::Live),
    (Lane::Normal, Part::Live),
    (Lane::Bulk, Part::Live),
    (Lane::Alarm, Part::Backlog),
    (Lane::Normal, Part::Backlog),
    (Lane::Bulk, Part::Backlog),
];

impl Outbox {
    /// In which order lanes and their parts are asked.
    pub(crate) fn turns(&self) -> &'static [(Lane, Part)] {
        if self.is_live_first() { &LIVE_FIRST } else { &IN_ORDER }
    }

    pub(super) fn is_live_first(&self) -> bool {
        self.lanes[0].live_first
    }

    /// A connection begins: whatever is queued is backlog, and what follows until it takes something.
    pub(crate) fn all_is_backlog(&mut self) {
        for queue in &mut self.lanes {
            queue.live_from = u64::MAX;
            queue.live = Cursor::default();
        }
    }

    /// The connection takes: what is accepted from now on is live.
    pub(crate) fn go_live(&mut self, db: &Connection) -> Sql<()> {
        if self.lanes[0].live_from != u64::MAX {
            return Ok(());
        }
        for queue in &mut self.lanes {
            queue.live_from = queue.next_seq;
            queue.live = Cursor { next: queue.next_seq, loaded: None };
        }
        if self.ahead > 0 {
            self.forget_ahead(db)?;
        }
        Ok(())
    }

    pub(super) fn is_backlog(&self, lane: Lane, seq: u64) -> bool {
        seq < self.lanes[lane as usize].live_from
    }

    /// A record was handed out: the backlog pays for it.
    pub(crate) fn pay(&mut self, record: &Record, now: Stamp) {
        if self.is_backlog(record.lane, record.seq.0) {
            self.pace.spend(record_bytes(record) as u64, now.mono_ms);
        }
    }

    /// Takes over what the queue before a failed commit knew and no table says.
    pub(crate) fn keep_pace(&mut self, pace: Pace) {
        self.pace = pace;
    }

    pub(crate) fn pace(&self) -> Pace {
        self.pace
    }

    /// Messages sent without their retain flag since this was last asked.
    pub(crate) fn take_unretained(&mut self) -> Unretained {
        std::mem::take(&mut self.unretained)
    }

    /// Whether a retained message that is handed out keeps its flag. Where one goes before older ones of its lane,
    /// that is written down in the same transaction.
    pub(super) fn keeps_retain(&mut self, db: &Connection, lane: Lane, seq: u64, topic: &Topic) -> Sql<bool> {
        let goes_ahead =
            self.is_live_first() && !self.is_backlog(lane, seq) && self.lane(lane).has_older(db, lane)?;
        if self.ahead == 0 && !goes_ahead {
            return Ok(true);
        }
        let newest: Option<u64> = db
            .prepare_cached("SELECT seq FROM retained_ahead WHERE lane = ? AND topic = ?")?
            .query_row(params![lane as i64, topic.as_str()], |row| row.get(0))
            .optional()?;
        if newest.is_some_and(|newest| newest > seq) {
            self.unretained.overtaken += 1;
            return Ok(false);
        }
        if goes_ahead && (newest.is_some() || self.ahead < AHEAD_MAX) {
            db.prepare_cached("INSERT OR REPLACE INTO retained_ahead VALUES (?, ?, ?)")?.execute(params![
                lane as i64,
                topic.as_str(),
                seq
            ])?;
            self.ahead += u64::from(newest.is_none());
        }
        if !goes_ahead && newest.is_none() && self.ahead >= AHEAD_MAX {
            self.unretained.unknown += 1;
            return Ok(false);
        }
        Ok(true)
    }

    /// Forgets what went ahead of messages that are all done.
    fn forget_ahead(&mut self, db: &Connection) -> Sql<()> {
        for lane in Lane::ALL {
            let oldest = oldest(db, lane)?.unwrap_or(i64::MAX as u64);
            db.execute(
                "DELETE FROM retained_ahead WHERE lane = ? AND seq < ?",
                params![lane as i64, oldest],
            )?;
        }
        self.ahead = count_ahead(db)?;
        Ok(())
    }
}

pub(super) fn count_ahead(db: &Connection) -> Sql<u64> {
    db.query_row("SELECT count(*) FROM retained_ahead", [], |row| row.get(0))
}

/// The first number of the lane's oldest segment.
fn oldest(db: &Connection, lane: Lane) -> Sql<Option<u64>> {
    let bounds = params![key(lane, 0), end_of(lane)];
    let oldest: Option<i64> = db
        .prepare_cached("SELECT min(id) FROM segment WHERE id >= ? AND id < ?")?
        .query_row(bounds, |row| row.get(0))?;
    Ok(oldest.map(seq_of))
}

pub(super) fn is_live_first(replay: &Replay) -> bool {
    replay.order == ReplayOrder::LiveFirst
}

impl LaneQueue {
    /// The numbers of a part.
    pub(super) fn range(&self, part: Part) -> Range<u64> {
        match part {
            Part::Whole => 0..u64::MAX,
            Part::Live => self.live_from..u64::MAX,
            Part::Backlog => 0..self.live_from,
        }
    }

    fn part_of(&self, seq: u64) -> Part {
        if self.live_first && seq >= self.live_from { Part::Live } else { Part::Backlog }
    }

    pub(super) fn cursor(&self, part: Part) -> &Cursor {
        if part == Part::Live { &self.live } else { &self.backlog }
    }

    pub(super) fn cursor_mut(&mut self, part: Part) -> &mut Cursor {
        if part == Part::Live { &mut self.live } else { &mut self.backlog }
    }

    /// The cursor that passes this number.
    pub(super) fn cursor_over(&mut self, seq: u64) -> &mut Cursor {
        self.cursor_mut(self.part_of(seq))
    }

    /// The decoded segment that holds this number.
    pub(super) fn loaded(&self, seq: u64) -> Option<&Loaded> {
        let holds =
            |loaded: &&Loaded| (loaded.first..loaded.first + loaded.entries.len() as u64).contains(&seq);
        self.cursor(self.part_of(seq)).loaded.as_ref().filter(holds)
    }

    /// Whether a record that a cursor meets has its place elsewhere.
    pub(super) fn is_put_by(&self, seq: u64) -> bool {
        self.taken.contains(&seq)
            || self.returned.contains(&seq)
            || self.held.values().any(|held| held.deferred.contains(&seq))
    }

    pub(super) fn has_backlog(&self) -> bool {
        let end = self.live_from.min(self.next_seq);
        self.backlog.next < end || self.returned.range(..self.live_from).next().is_some()
    }

    pub(super) fn has_live(&self) -> bool {
        let cursor = if self.live_first { &self.live } else { &self.backlog };
        let unread = self.live_from < u64::MAX && cursor.next < self.next_seq;
        unread || self.returned.range(self.live_from..).next().is_some()
    }

    pub(super) fn is_read_to_its_end(&self) -> bool {
        let live = !self.live_first || self.live_from == u64::MAX || self.live.next >= self.next_seq;
        let end = if self.live_first { self.live_from.min(self.next_seq) } else { self.next_seq };
        live && self.backlog.next >= end
    }

    /// Whether anything accepted before this connection began to take is not done.
    fn has_older(&mut self, db: &Connection, lane: Lane) -> Sql<bool> {
        // Once it is all done, it stays so for this connection.
        if self.none_older_than != Some(self.live_from)
            && oldest(db, lane)?.is_none_or(|oldest| oldest >= self.live_from)
        {
            self.none_older_than = Some(self.live_from);
        }
        Ok(self.none_older_than != Some(self.live_from))
    }
}
