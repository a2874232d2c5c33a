//! The byte budget of a link that is paid for by the byte: so much in a day or month, and who waits when it is used
//! up. Pure.
//!
//! Days and months are those of UTC, by the wall clock where it is believable; where it is not, a day or 30 days of
//! running time. Invariant: bytes that were counted leave the budget only with their period. A clock that jumps
//! ahead into another period begins a new one; one that comes back from there does not.

use std::time::Duration;

use jiff::{Timestamp, ToSpan, tz::TimeZone};

use crate::clock::Stamp;
use crate::message::Lane;

const DAY_MS: u64 = 86_400_000;
/// By running time, where there is no calendar.
const MONTH_MS: u64 = 30 * DAY_MS;
/// Use is written down when so many bytes of it are not, at least; a crash forgets no more, but for what moved
/// since the last commit.
const SAVE_BYTES_MIN: u64 = 16 << 10;
/// Or the thousandth part of the budget, if that is more.
const SAVE_PART: u64 = 1000;
/// How often running time is written down.
const SAVE_RUNNING_MS: u64 = 3_600_000;
/// How often is looked whether a new period has begun, at least: the clock may be set.
const LOOK_MS: u64 = 60_000;
/// Where people are warned, in percent.
const WARN_AT: [u64; 2] = [80, 100];

/// How long a budget lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Period {
    /// A day.
    Day,
    /// A month.
    Month,
}

impl Period {
    /// Its name in the configuration, in the database and on screens.
    pub fn name(self) -> &'static str {
        match self {
            Period::Day => "day",
            Period::Month => "month",
        }
    }

    fn running(self) -> Duration {
        Duration::from_millis(if self == Period::Day { DAY_MS } else { MONTH_MS })
    }

    /// The number of the period that a moment is in; `None` where the wall clock is not believable.
    fn number(self, now: Stamp) -> Option<i64> {
        if !now.wall_is_believable() {
            return None;
        }
        match self {
            Period::Day => Some(now.wall_ms.div_euclid(DAY_MS as i64)),
            Period::Month => {
                let date = Timestamp::from_millisecond(now.wall_ms).ok()?.to_zoned(TimeZone::UTC);
                Some(i64::from(date.year()) * 12 + i64::from(date.month()) - 1)
            }
        }
    }

    /// Milliseconds until the next period of the calendar.
    fn left_ms(self, now: Stamp) -> Option<u64> {
        if !now.wall_is_believable() {
            return None;
        }
        let at = Timestamp::from_millisecond(now.wall_ms).ok()?.to_zoned(TimeZone::UTC);
        let next = match self {
            Period::Day => at.start_of_day().ok()?.checked_add(1.day()),
            Period::Month => at.first_of_month().ok()?.start_of_day().ok()?.checked_add(1.month()),
        };
        u64::try_from(next.ok()?.timestamp().as_millisecond() - now.wall_ms).ok()
    }
}

/// The settings of a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Bytes sent and received in one period.
    pub bytes: u64,
    /// How long it lasts.
    pub per: Period,
    /// The lanes that wait when it is used up, in the order of [`Lane::ALL`].
    pub holds_back: [bool; 3],
}

/// What is written down of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Used {
    /// The number of the day or month, `None` where it began without a believable clock.
    pub(crate) period: Option<i64>,
    /// Bytes used in it.
    pub(crate) bytes: u64,
    /// How long the agent has run in it.
    pub(crate) ran_ms: u64,
}

/// How much of the budget is used.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    settings: Settings,
    used: Used,
    /// `None`: not known, so that it must be written.
    saved: Option<Used>,
    counted: Option<Stamp>,
}

impl Budget {
    pub(crate) fn new(settings: Settings, saved: Option<Used>) -> Self {
        Budget { settings, used: saved.unwrap_or_default(), saved, counted: None }
    }

    /// Bytes have moved. Returned is the mark, in percent, that they went over.
    pub(crate) fn count(&mut self, bytes: u64, now: Stamp) -> Option<u64> {
        let is_new = self.is_over(now);
        self.used.ran_ms += self.ran_since_counted_ms(now);
        self.counted = Some(now);
        let number = self.settings.per.number(now);
        if is_new {
            self.used = Used { period: number, bytes: 0, ran_ms: 0 };
        }
        self.used.period = number.or(self.used.period);
        let before = self.percent();
        self.used.bytes = self.used.bytes.saturating_add(bytes);
        let after = self.percent();
        WARN_AT.into_iter().rev().find(|mark| (before + 1..=after).contains(mark))
    }

    fn percent(&self) -> u64 {
        (u128::from(self.used.bytes) * 100 / u128::from(self.settings.bytes.max(1))) as u64
    }

    /// How long the agent has run since bytes were last counted.
    fn ran_since_counted_ms(&self, now: Stamp) -> u64 {
        self.counted.map_or(0, |counted| now.ms_since(counted))
    }

    /// Whether the period that bytes were last counted in is over.
    fn is_over(&self, now: Stamp) -> bool {
        match (self.settings.per.number(now), self.used.period) {
            (Some(number), Some(period)) => number > period,
            (Some(_), None) => false,
            (None, _) => {
                let ran_ms = self.used.ran_ms + self.ran_since_counted_ms(now);
                Duration::from_millis(ran_ms) >= self.settings.per.running()
            }
        }
    }

    fn is_used_up(&self, now: Stamp) -> bool {
        self.used.bytes >= self.settings.bytes && !self.is_over(now)
    }

    /// The lanes that wait.
    pub(crate) fn held_back(&self, now: Stamp) -> [bool; 3] {
        if self.is_used_up(now) { self.settings.holds_back } else { [false; 3] }
    }

    /// When to look again whether lanes still wait, by the monotonic clock; `None`: none do.
    pub(crate) fn look_again_at(&self, now: Stamp) -> Option<u64> {
        let left_ms = self.settings.per.left_ms(now).unwrap_or(LOOK_MS);
        self.is_used_up(now).then(|| now.mono_ms + left_ms.clamp(1, LOOK_MS))
    }

    /// What is to be written, if it is time to.
    pub(crate) fn take_due(&mut self) -> Option<Used> {
        let enough = SAVE_BYTES_MIN.max(self.settings.bytes / SAVE_PART);
        let marks = |used: &Used| WARN_AT.map(|mark| used.bytes >= self.settings.bytes / 100 * mark);
        let is_saved = self.saved.is_some_and(|saved| {
            saved.period == self.used.period
                && saved.bytes.abs_diff(self.used.bytes) < enough
                && self.used.ran_ms.abs_diff(saved.ran_ms) < SAVE_RUNNING_MS
                && marks(&saved) == marks(&self.used)
        });
        (!is_saved).then(|| self.take_all())
    }

    /// What is to be written at the end.
    pub(crate) fn take_all(&mut self) -> Used {
        self.saved = Some(self.used);
        self.used
    }

    /// What was written last may not be on the disk.
    pub(crate) fn distrust_saved(&mut self) {
        self.saved = None;
    }

    /// What a screen shows.
    pub(crate) fn look(&self, now: Stamp) -> BudgetLook {
        let held_back = self.held_back(now);
        BudgetLook {
            used_bytes: if self.is_over(now) { 0 } else { self.used.bytes },
            bytes: self.settings.bytes,
            per: self.settings.per,
            is_used_up: self.is_used_up(now),
            held_back: Lane::ALL.into_iter().filter(|lane| held_back[*lane as usize]).collect(),
        }
    }
}

/// What screens show of a budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetLook {
    /// Bytes used in this period.
    pub used_bytes: u64,
    /// Bytes of one period.
    pub bytes: u64,
    /// How long it lasts.
    pub per: Period,
    /// Nothing is left of it.
    pub is_used_up: bool,
    /// The lanes that wait for the next one.
    pub held_back: Vec<Lane>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-02-27T23:59:59Z
    const FEBRUARY: i64 = 1_772_236_799_000;
    const DAY: u64 = DAY_MS;

    fn at(wall_ms: i64, mono_ms: u64) -> Stamp {
        Stamp { wall_ms, mono_ms, synchronised: true }
    }

    fn budget(per: Period) -> Budget {
        Budget::new(Settings { bytes: 1000, per, holds_back: [false, true, true] }, None)
    }

    #[test]
    fn a_budget_is_new_on_the_first_of_the_month_and_not_before() {
        let mut budget = budget(Period::Month);
        assert_eq!(budget.count(999, at(FEBRUARY, 0)), Some(80));
        assert_eq!(budget.held_back(at(FEBRUARY, 0)), [false; 3]);
        assert_eq!(budget.count(1, at(FEBRUARY + 1, 1)), Some(100));
        let last = FEBRUARY + DAY as i64;
        assert_eq!(budget.held_back(at(last, DAY)), [false, true, true]);
        assert_eq!(budget.look_again_at(at(last, DAY)), Some(DAY + 1000), "midnight is in a second");
        let march = last + 1000;
        assert_eq!(budget.held_back(at(march, DAY + 1000)), [false; 3], "although nothing was counted yet");
        assert_eq!(budget.count(10, at(march, DAY + 1000)), None);
        assert_eq!(budget.look(at(march, DAY + 1000)).used_bytes, 10);
    }

    #[test]
    fn each_mark_is_told_once() {
        let mut budget = budget(Period::Day);
        let marks: Vec<_> = (0..30u64).filter_map(|n| budget.count(50, at(FEBRUARY - 99_000, n))).collect();
        assert_eq!(marks, [80, 100]);
    }

    #[test]
    fn a_clock_that_comes_back_from_the_future_gives_no_new_budget_and_does_not_bind_it_there() {
        let mut budget = budget(Period::Day);
        budget.count(500, at(FEBRUARY, 0));
        let in_ten_years = FEBRUARY + 3650 * DAY as i64;
        budget.count(700, at(in_ten_years, 1));
        assert_eq!(budget.look(at(in_ten_years, 1)).used_bytes, 700);
        budget.count(400, at(FEBRUARY, 2));
        assert_eq!(budget.look(at(FEBRUARY, 2)).used_bytes, 1100, "set back: the same budget");
        assert_eq!(
            budget.held_back(at(FEBRUARY + DAY as i64, DAY)),
            [false; 3],
            "and the next day is a new one"
        );
    }

    #[test]
    fn without_a_clock_running_time_makes_the_days() {
        let mut one = budget(Period::Day);
        for hour in 0..24 {
            one.count(100, at(5_000, hour * 3_600_000));
        }
        let used = one.take_all();
        assert_eq!((used.period, used.bytes, used.ran_ms), (None, 2400, 23 * 3_600_000));
        // After a restart, at another monotonic time.
        let mut two = Budget::new(one.settings, Some(used));
        two.count(0, at(5_000, 7));
        assert_eq!(two.held_back(at(5_000, 3_599_000)), [false, true, true]);
        assert_eq!(two.held_back(at(5_000, 3_600_007)), [false; 3]);
        // The clock is set: the bytes stay with the day that it names.
        two.count(1, at(FEBRUARY, 10));
        assert_eq!((two.used.bytes, two.used.period.is_some()), (2401, true));
    }

    #[test]
    fn use_is_written_down_at_every_thousandth_and_every_mark() {
        let settings = Settings { bytes: 100 << 20, per: Period::Month, holds_back: [false; 3] };
        let mut budget = Budget::new(settings, Some(Used { period: Some(24_313), bytes: 0, ran_ms: 0 }));
        let mut written = 0;
        for n in 0..10_240 {
            budget.count(10 << 10, at(FEBRUARY, n));
            written += u64::from(budget.take_due().is_some());
        }
        assert!((900..=1100).contains(&written), "{written}");
    }
}
