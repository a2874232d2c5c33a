//! What to add to the stamps of a wall clock that was not right yet, found out once it is. Pure.
//!
//! Invariant: a correction speaks of one boot, and of readings of the clock as it was then; a span of time in which
//! the clock was right, or less than a second wrong, gets none.

use super::Stamp;

/// Differences below this are not worth a correction, in ms: NTP slews them away.
const STEP_MS: u64 = 1_000;
/// Spans between two steps that are remembered; the oldest goes first.
const SPANS_MAX: usize = 16;

/// What to add to stamps of this boot that say that the clock was not right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correction {
    /// The clock's reading at the beginning of the span, Unix time in ms.
    pub from_ms: i64,
    /// The clock's reading at its end.
    pub to_ms: i64,
    /// What to add to readings between the two, in ms.
    pub add_ms: i64,
}

/// A time in which the wall clock ran evenly and was not right, by the monotonic clock.
#[derive(Debug, Clone, Copy)]
struct Span {
    /// Wall clock minus monotonic clock.
    offset_ms: i64,
    from_mono_ms: u64,
    to_mono_ms: u64,
}

/// Watches the clock.
#[derive(Debug, Default)]
pub struct Watch {
    spans: Vec<Span>,
    /// It was looked at before. What happened in this boot before that is taken for the first span.
    looked: bool,
}

impl Watch {
    /// To be called about once a second. What comes back is what was wrong, once it is known by how much.
    pub fn look(&mut self, now: Stamp) -> Vec<Correction> {
        let offset_ms = now.wall_ms.saturating_sub_unsigned(now.mono_ms);
        let first = !std::mem::replace(&mut self.looked, true);
        // The step was between the last look and this one.
        if let Some(last) = self.spans.last_mut() {
            last.to_mono_ms = now.mono_ms;
        }
        if now.wall_is_right() {
            let correction = |span: Span| Correction {
                from_ms: span.offset_ms.saturating_add_unsigned(span.from_mono_ms),
                to_ms: span.offset_ms.saturating_add_unsigned(span.to_mono_ms),
                add_ms: offset_ms.saturating_sub(span.offset_ms),
            };
            let wrong = |correction: &Correction| correction.add_ms.unsigned_abs() >= STEP_MS;
            return std::mem::take(&mut self.spans).into_iter().map(correction).filter(wrong).collect();
        }
        if self.spans.last().is_none_or(|span| span.offset_ms.abs_diff(offset_ms) >= STEP_MS) {
            if self.spans.len() == SPANS_MAX {
                self.spans.remove(0);
            }
            let from_mono_ms = if first { 0 } else { now.mono_ms };
            self.spans.push(Span { offset_ms, from_mono_ms, to_mono_ms: now.mono_ms });
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-11-21T10:00:00Z
    const TODAY_MS: i64 = 1_795_255_200_000;

    fn look(watch: &mut Watch, wall_ms: i64, mono_ms: u64, synchronised: bool) -> Vec<Correction> {
        watch.look(Stamp { wall_ms, mono_ms, synchronised })
    }

    #[test]
    fn a_clock_that_started_in_1970_is_corrected_from_the_boot_on() {
        let mut watch = Watch::default();
        for second in 30..60 {
            assert_eq!(look(&mut watch, second * 1000, second as u64 * 1000, false), []);
        }
        let correction = Correction { from_ms: 0, to_ms: 60_000, add_ms: TODAY_MS - 60_000 };
        assert_eq!(look(&mut watch, TODAY_MS, 60_000, true), [correction]);
        assert_eq!(look(&mut watch, TODAY_MS + 1000, 61_000, true), [], "it is said once");
    }

    #[test]
    fn an_unbelievable_year_is_not_right_whoever_vouches_for_it() {
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, 5_000, 5_000, true), []);
        assert_eq!(look(&mut watch, TODAY_MS, 6_000, true).len(), 1);
    }

    #[test]
    fn steps_before_it_is_right_are_spans_of_their_own() {
        let mut watch = Watch::default();
        let (day, decade) = (86_400_000, 3_652 * 86_400_000_i64);
        assert_eq!(look(&mut watch, TODAY_MS + decade, 10_000, false), []);
        assert_eq!(look(&mut watch, TODAY_MS - decade, 11_000, false), []);
        assert_eq!(look(&mut watch, TODAY_MS - 3_600_000 + 1000, 12_000, false), []);
        let corrections = look(&mut watch, TODAY_MS + 3000, 13_000, true);
        assert_eq!(
            corrections.iter().map(|c| c.add_ms).collect::<Vec<_>>(),
            [-decade, decade + 1000, 3_601_000]
        );
        assert_eq!(corrections[0].from_ms, TODAY_MS + decade - 10_000, "since the boot");
        assert!(corrections.iter().all(|c| (0..day).contains(&(c.to_ms - c.from_ms))));
    }

    #[test]
    fn a_clock_that_was_right_all_the_time_gets_no_correction() {
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, TODAY_MS, 10_000, false), []);
        assert_eq!(look(&mut watch, TODAY_MS + 1_200, 11_000, false), [], "slewed");
        assert_eq!(look(&mut watch, TODAY_MS + 2_300, 12_000, true), []);
        // It was right before it was lost: only what came after is in doubt.
        assert_eq!(look(&mut watch, TODAY_MS + 3_300, 13_000, false), []);
        let back = look(&mut watch, TODAY_MS + 64_300, 14_000, true);
        let from_ms = TODAY_MS + 3_300;
        assert_eq!(back, [Correction { from_ms, to_ms: from_ms + 1_000, add_ms: 60_000 }]);
    }

    #[test]
    fn steps_without_end_cost_bounded_memory_and_no_clock_breaks_the_sums() {
        let mut watch = Watch::default();
        for n in 0..1_000_u64 {
            let wall_ms = if n % 2 == 0 { i64::MAX } else { i64::MIN };
            assert_eq!(look(&mut watch, wall_ms, u64::MAX - 2_000 + n, false), []);
        }
        assert!((1..=SPANS_MAX).contains(&look(&mut watch, TODAY_MS, u64::MAX, true).len()));
    }

    /// 2^31 seconds, where 32 bits end: 2038-01-19T03:14:08Z.
    #[test]
    fn the_year_2038_is_a_year() {
        let edge_ms = 1_000 << 31;
        let mut watch = Watch::default();
        assert_eq!(look(&mut watch, edge_ms - 500, 10_000, false), []);
        let [correction] = look(&mut watch, edge_ms + 9_500, 11_000, true)[..] else { panic!("one") };
        assert_eq!((correction.to_ms, correction.add_ms), (edge_ms + 500, 9_000));
        assert!(Stamp { wall_ms: edge_ms, mono_ms: 0, synchronised: true }.wall_is_right());
    }
}
