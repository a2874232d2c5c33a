//! Which group of points is due when, and when a failing unit is tried again. Pure.
//!
//! Invariant: a group's due times keep their phase (start + n × interval), whatever a poll took; due times
//! that passed meanwhile are counted, never piled up. A unit that does not answer takes a bounded share of
//! its line. Times are milliseconds of one monotonic clock.

/// Failures in a row after which a unit (or one of its reads) rests.
const FAILURES_BEFORE_REST: u32 = 3;
/// The first rest; each further one is twice as long.
const FIRST_REST_MS: u64 = 1_000;
/// The longest rest.
const LONGEST_REST_MS: u64 = 30_000;
/// While other units answer, a unit whose probe took t rests for at least this many times t for each resting
/// unit of the line: together they get at most a fifth of it.
const PROBE_PAUSE: u64 = 4;

/// The due times of one line's groups, and how its units are doing.
#[derive(Debug)]
pub struct Schedule {
    groups: Vec<Group>,
    units: Vec<Breaker>,
}

#[derive(Debug)]
struct Group {
    unit: usize,
    every_ms: u64,
    next_ms: u64,
}

/// A group whose time has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// The group's place in the list the schedule was made of.
    pub group: usize,
    /// Its unit.
    pub unit: usize,
    /// Due times of this group that passed unused before this one.
    pub skipped: u64,
    /// What is to be done.
    pub attempt: Attempt,
}

/// How a due group is to be treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// Read it.
    Poll,
    /// Its unit has been silent: one cheap request first, and the group only if that is answered.
    Probe,
    /// Its unit is resting: send nothing, report its points as bad.
    Rest {
        /// Failures in a row so far.
        failures: u32,
    },
}

impl Schedule {
    /// A schedule of groups given as (unit, interval in ms), all due at once at `now_ms`.
    pub fn new(groups: &[(usize, u64)], now_ms: u64) -> Self {
        let units = groups.iter().map(|&(unit, _)| unit + 1).max().unwrap_or(0);
        Schedule {
            groups: groups
                .iter()
                .map(|&(unit, every_ms)| Group { unit, every_ms: every_ms.max(1), next_ms: now_ms })
                .collect(),
            units: vec![Breaker::default(); units],
        }
    }

    /// When the next group is due; `None` without groups.
    pub fn next_ms(&self) -> Option<u64> {
        self.groups.iter().map(|group| group.next_ms).min()
    }

    /// The group that has been due the longest, if any is due; it is due again one interval later.
    pub fn take(&mut self, now_ms: u64) -> Option<Due> {
        let (index, group) = self.groups.iter_mut().enumerate().min_by_key(|(_, group)| group.next_ms)?;
        let late_ms = now_ms.checked_sub(group.next_ms)?;
        let skipped = late_ms / group.every_ms;
        group.next_ms += (skipped + 1) * group.every_ms;
        let unit = group.unit;
        Some(Due { group: index, unit, skipped, attempt: self.attempt(unit, now_ms) })
    }

    fn attempt(&self, unit: usize, now_ms: u64) -> Attempt {
        let breaker = &self.units[unit];
        if breaker.is_resting(now_ms) {
            Attempt::Rest { failures: breaker.failures() }
        } else if breaker.is_open() {
            Attempt::Probe
        } else {
            Attempt::Poll
        }
    }

    /// How often the unit has failed in a row.
    pub fn failures(&self, unit: usize) -> u32 {
        self.units.get(unit).map_or(0, Breaker::failures)
    }

    /// The unit answered: it is polled as usual from now on.
    pub fn answered(&mut self, unit: usize) {
        if let Some(breaker) = self.units.get_mut(unit) {
            breaker.succeeded();
        }
    }

    /// The unit did not answer, which cost the line `took_ms`.
    pub fn silent(&mut self, unit: usize, now_ms: u64, took_ms: u64) {
        let Some(breaker) = self.units.get_mut(unit) else { return };
        breaker.failed(now_ms);
        let resting = self.units.iter().filter(|breaker| breaker.is_open()).count();
        if resting < self.units.len() {
            let share_ms = PROBE_PAUSE.saturating_mul(took_ms).saturating_mul(resting as u64);
            self.units[unit].rest_at_least_until(now_ms.saturating_add(share_ms));
        }
    }

    /// The line was down and is up again: what its units did before says nothing any more.
    pub fn line_returned(&mut self) {
        self.units.fill(Breaker::default());
    }
}

/// Counts failures in a row and says when to pause, and for how long.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Breaker {
    failures: u32,
    rest_until_ms: u64,
}

impl Breaker {
    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether it failed so often that it is only probed.
    pub fn is_open(&self) -> bool {
        self.failures >= FAILURES_BEFORE_REST
    }

    /// Whether it is too early even for a probe.
    pub fn is_resting(&self, now_ms: u64) -> bool {
        self.is_open() && now_ms < self.rest_until_ms
    }

    /// One more failure, at `now_ms`.
    pub fn failed(&mut self, now_ms: u64) {
        self.failures = self.failures.saturating_add(1);
        let doublings = self.failures.saturating_sub(FAILURES_BEFORE_REST).min(16);
        self.rest_until_ms = now_ms.saturating_add((FIRST_REST_MS << doublings).min(LONGEST_REST_MS));
    }

    fn rest_at_least_until(&mut self, until_ms: u64) {
        self.rest_until_ms = self.rest_until_ms.max(until_ms);
    }

    /// It worked.
    pub fn succeeded(&mut self) {
        *self = Breaker::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_times_keep_their_phase_however_late_a_poll_is() {
        let mut schedule = Schedule::new(&[(0, 100)], 1_000);
        let table =
            [(1_000, 0, 1_100), (1_140, 0, 1_200), (1_299, 0, 1_300), (1_750, 4, 1_800), (1_800, 0, 1_900)];
        for (now, skipped, next) in table {
            let due = schedule.take(now).unwrap();
            assert_eq!((due.skipped, schedule.next_ms()), (skipped, Some(next)), "at {now}");
            assert_eq!(schedule.take(now), None, "at {now}");
        }
    }

    #[test]
    fn the_group_that_waited_longest_goes_first() {
        let mut schedule = Schedule::new(&[(0, 50), (1, 1_000), (2, 500)], 0);
        let order: Vec<usize> = (0..3).map(|_| schedule.take(0).unwrap().group).collect();
        assert_eq!(order, [0, 1, 2]);
        // All are due again at 1000; 0 has been due since 50, 2 since 500, 1 since 1000.
        let order: Vec<usize> = (0..3).map(|_| schedule.take(1_000).unwrap().group).collect();
        assert_eq!(order, [0, 2, 1]);
    }

    #[test]
    fn without_groups_nothing_is_ever_due() {
        let mut schedule = Schedule::new(&[], 0);
        assert_eq!((schedule.next_ms(), schedule.take(u64::MAX)), (None, None));
    }

    #[test]
    fn a_unit_rests_after_three_failures_and_is_probed_ever_more_rarely() {
        let mut schedule = Schedule::new(&[(0, 100)], 0);
        let mut tried = Vec::new();
        for now in (0..200_000).step_by(100) {
            let due = schedule.take(now).unwrap();
            if due.attempt == Attempt::Poll || due.attempt == Attempt::Probe {
                tried.push((now, due.attempt));
                schedule.silent(0, now, 10);
            }
        }
        let polls: Vec<u64> = tried.iter().filter(|t| t.1 == Attempt::Poll).map(|t| t.0).collect();
        let probes: Vec<u64> = tried.iter().filter(|t| t.1 == Attempt::Probe).map(|t| t.0).collect();
        assert_eq!(polls, [0, 100, 200]);
        assert_eq!(probes[..7], [1_200, 3_200, 7_200, 15_200, 31_200, 61_200, 91_200]);
    }

    #[test]
    fn a_unit_with_a_long_interval_is_probed_at_its_interval() {
        let mut schedule = Schedule::new(&[(0, 60_000)], 0);
        for now in (0..600_000).step_by(60_000) {
            assert!(!matches!(schedule.take(now).unwrap().attempt, Attempt::Rest { .. }), "at {now}");
            schedule.silent(0, now, 1_000);
        }
    }

    #[test]
    fn an_answer_ends_the_rest_at_once() {
        let mut schedule = Schedule::new(&[(0, 100)], 0);
        for now in [0, 100, 200] {
            schedule.take(now).unwrap();
            schedule.silent(0, now, 10);
        }
        assert_eq!(schedule.take(300).unwrap().attempt, Attempt::Rest { failures: 3 });
        assert_eq!(schedule.take(1_200).unwrap().attempt, Attempt::Probe);
        schedule.answered(0);
        assert_eq!(schedule.take(1_300).unwrap().attempt, Attempt::Poll);
    }

    #[test]
    fn a_line_that_returns_is_polled_at_once() {
        let mut schedule = Schedule::new(&[(0, 100), (1, 100)], 0);
        for now in [0, 100, 200, 300] {
            schedule.silent(0, now, 1_000);
        }
        schedule.line_returned();
        assert_eq!(schedule.take(400).unwrap().attempt, Attempt::Poll);
    }

    /// Runs a line where an answer costs 20 ms and a silence 2 s; gives each unit's (answers, silences).
    fn simulate(dead: &[bool], for_ms: u64) -> Vec<(u64, u64)> {
        let groups: Vec<(usize, u64)> = (0..dead.len()).map(|unit| (unit, 1_000)).collect();
        let mut schedule = Schedule::new(&groups, 0);
        let (mut now, mut counts) = (0, vec![(0, 0); dead.len()]);
        while now < for_ms {
            let Some(due) = schedule.take(now) else {
                now = schedule.next_ms().unwrap();
                continue;
            };
            if matches!(due.attempt, Attempt::Rest { .. }) {
                continue;
            }
            if dead[due.unit] {
                now += 2_000;
                schedule.silent(due.unit, now, 2_000);
                counts[due.unit].1 += 1;
            } else {
                now += 20;
                schedule.answered(due.unit);
                counts[due.unit].0 += 1;
            }
        }
        counts
    }

    #[test]
    fn dead_units_do_not_slow_the_others() {
        let one = simulate(&[false, true, false], 600_000);
        assert!(one[0].0 >= 540 && one[2].0 >= 540, "one dead unit of three: {one:?}");
        let most = simulate(&[true, true, true, true, true, true, true, true, true, false], 600_000);
        assert!(most[9].0 >= 420, "nine dead units of ten: {most:?}");
        assert!(most[..9].iter().all(|unit| unit.1 >= 5), "every dead unit is still probed: {most:?}");
    }
}
