//! Who makes progress, and who is stuck.
//!
//! Each part of the agent has a [`Pulse`] and says through it that it has made progress, and how long its next step may
//! take. The [`Watch`] compares that with the time. What counts as progress is for the part to say: a loop that turns
//! while the store owes it an answer has made none.
//!
//! Invariant: a part that says nothing is stuck in the end. One that has ended is watched no longer: whoever spawned it
//! notices that by itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often a part that has nothing to do says so. Far below any patience, so that an idle part is never stuck.
pub const IDLE: Duration = Duration::from_secs(2);

/// How long parts may be silent, beside a step of which they have said how long it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// What waits for nobody but the field: a line.
    pub line: Duration,
    /// The store. One of its steps is a commit with a checkpoint, and a worn card takes half a minute for a sync.
    pub store: Duration,
    /// What waits for the store, whose answer may have waited for its lane's commit interval (at most 60 s) too. Longer
    /// than the store's, so that the store is named first.
    pub waits_for_store: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Patience { line: seconds(60), store: seconds(180), waits_for_store: seconds(270) }
    }
}

/// A part's way to say that it makes progress. It is watched as long as a clone of it exists.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    beat: Arc<Beat>,
    patience_ms: u64,
}

#[derive(Debug, Default)]
struct Beat {
    last_ms: AtomicU64,
    due_ms: AtomicU64,
}

impl Pulse {
    /// A pulse that is first heard of at `now_ms`, and then at least every `patience`.
    pub fn new(patience: Duration, now_ms: u64) -> Self {
        let pulse = Pulse { beat: Arc::default(), patience_ms: ms(patience) };
        pulse.beat(now_ms);
        pulse
    }

    /// Progress was made at `now_ms`, by the clock that the watch is asked by.
    pub fn beat(&self, now_ms: u64) {
        self.busy(now_ms, Duration::ZERO);
    }

    /// Progress was made, and the next step may take so long by itself: a request, a name server.
    pub fn busy(&self, now_ms: u64, step: Duration) {
        self.beat.last_ms.store(now_ms, Ordering::Relaxed);
        let due_ms = now_ms.saturating_add(self.patience_ms).saturating_add(ms(step));
        self.beat.due_ms.store(due_ms, Ordering::Relaxed);
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A part that has been silent for longer than it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stuck {
    /// Its name.
    pub part: String,
    /// For how long, in milliseconds.
    pub silent_ms: u64,
}

/// Every part that is watched.
#[derive(Debug, Default)]
pub struct Watch {
    parts: Vec<(String, Weak<Beat>)>,
}

impl Watch {
    /// Watches this part from now on.
    pub fn add(&mut self, part: String, pulse: &Pulse) {
        self.parts.retain(|(_, beat)| beat.strong_count() > 0);
        self.parts.push((part, Arc::downgrade(&pulse.beat)));
    }

    /// Who is stuck, in the order in which they were added.
    pub fn stuck(&self, now_ms: u64) -> Vec<Stuck> {
        let judge = |(part, beat): &(String, Weak<Beat>)| {
            let beat = beat.upgrade()?;
            let silent_ms = now_ms.saturating_sub(beat.last_ms.load(Ordering::Relaxed));
            let is_stuck = now_ms > beat.due_ms.load(Ordering::Relaxed);
            is_stuck.then(|| Stuck { part: part.clone(), silent_ms })
        };
        self.parts.iter().filter_map(judge).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a part does, and when the watch is asked.
    enum Step {
        Beat(u64),
        Busy(u64, u64),
        End,
        /// At that time it is stuck, silent for so many milliseconds; or it is not.
        Asked(u64, Option<u64>),
    }
    use Step::{Asked, Beat, Busy, End};

    /// One part with a patience of 10 s that begins at 1 s.
    fn check(what: &str, steps: &[Step]) {
        let mut watch = Watch::default();
        let mut pulse = Some(Pulse::new(Duration::from_secs(10), 1_000));
        watch.add("line1".into(), pulse.as_ref().expect("it has just begun"));
        for (number, step) in steps.iter().enumerate() {
            match (step, &pulse) {
                (Beat(now_ms), Some(pulse)) => pulse.beat(*now_ms),
                (Busy(now_ms, step_ms), Some(pulse)) => pulse.busy(*now_ms, Duration::from_millis(*step_ms)),
                (Asked(now_ms, silent_ms), _) => {
                    let expected = silent_ms.map(|silent_ms| Stuck { part: "line1".into(), silent_ms });
                    assert_eq!(watch.stuck(*now_ms), Vec::from_iter(expected), "{what}, step {number}");
                }
                (End, _) => pulse = None,
                (Beat(_) | Busy(..), None) => panic!("{what}: it has ended"),
            }
        }
    }

    #[test]
    fn a_part_is_stuck_when_it_was_silent_for_longer_than_it_may() {
        for (what, steps) in [
            ("it never says anything", &[Asked(11_000, None), Asked(11_001, Some(10_001))][..]),
            (
                "idle, it says so",
                &[Beat(3_000), Beat(5_000), Asked(15_000, None), Asked(15_001, Some(10_001))],
            ),
            ("it goes on", &[Asked(20_000, Some(19_000)), Beat(20_500), Asked(20_501, None)]),
            ("a long step is allowed", &[Busy(2_000, 60_000), Asked(72_000, None)]),
            ("and no more than that", &[Busy(2_000, 60_000), Asked(72_001, Some(70_001))]),
            ("when it is over it is over", &[Busy(2_000, 60_000), Beat(3_000), Asked(13_001, Some(10_001))]),
            ("a step without end", &[Busy(2_000, u64::MAX), Asked(u64::MAX, None)]),
            ("what has ended is not stuck", &[Asked(20_000, Some(19_000)), End, Asked(20_001, None)]),
            (
                "a clock that seems to go back",
                &[Beat(5_000), Asked(4_000, None), Asked(15_001, Some(10_001))],
            ),
        ] {
            check(what, steps);
        }
    }

    #[test]
    fn each_part_has_its_own_patience_and_is_named() {
        let mut watch = Watch::default();
        let seconds = Duration::from_secs;
        let parts = [("the store", 180), ("line1", 60), ("the uplink", 270)];
        let pulses: Vec<Pulse> =
            parts.iter().map(|(_, patience)| Pulse::new(seconds(*patience), 0)).collect();
        for ((name, _), pulse) in parts.iter().zip(&pulses) {
            watch.add((*name).into(), pulse);
        }
        let names =
            |now_ms| watch.stuck(now_ms).into_iter().map(|stuck| stuck.part).collect::<Vec<_>>().join(", ");
        assert_eq!(names(60_000), "");
        assert_eq!(names(60_001), "line1");
        assert_eq!(names(180_001), "the store, line1");
        pulses[1].beat(180_002);
        assert_eq!(names(180_003), "the store");
        assert_eq!(names(270_001), "the store, line1, the uplink");
    }

    #[test]
    fn whoever_waits_for_the_store_is_more_patient_than_the_store() {
        let patience = Patience::default();
        let commit_interval_max = Duration::from_secs(60);
        assert!(patience.waits_for_store > patience.store + commit_interval_max);
        assert!(patience.line > 10 * IDLE);
    }
}
