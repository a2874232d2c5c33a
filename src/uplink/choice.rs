//! Which of several brokers is next: the first as a rule, another while it cannot be reached. Pure.
//!
//! Invariant: a broker is left only after it has failed for its whole time, or for one that stands before it; and
//! while none answers, each gets its turn.

/// How long a broker is held on to. Times are in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// It may fail for so long before the next one is tried.
    pub failover_after_ms: u64,
    /// While messages go there, those before it are asked so often whether they are back.
    pub failback_every_ms: u64,
}

/// The choice among brokers, in the order of preference.
#[derive(Debug, Clone)]
pub struct Choice {
    brokers: Vec<Patience>,
    current: usize,
    /// Since when the current one fails.
    failing_ms: Option<u64>,
    /// When those before the current one were last asked, or it was connected.
    asked_ms: u64,
    /// Where to return if the broker that was preferred does not keep what its port promised.
    left: Option<usize>,
}

impl Choice {
    /// Begins with the first of these brokers; there is at least one.
    pub fn new(brokers: Vec<Patience>) -> Self {
        Choice::beginning_with(0, brokers)
    }

    /// Begins with that one of these brokers, which is among them. Those before it are asked at once.
    pub fn beginning_with(current: usize, brokers: Vec<Patience>) -> Self {
        Choice { brokers, current, failing_ms: None, asked_ms: 0, left: None }
    }

    /// The broker to connect to: its place in the list.
    pub fn current(&self) -> usize {
        self.current
    }

    /// Messages flow. Times are in ms of a monotonic clock.
    pub fn connected(&mut self, now_ms: u64) {
        (self.failing_ms, self.left) = (None, None);
        self.asked_ms = now_ms;
    }

    /// A connection or an attempt has ended.
    pub fn failed(&mut self, now_ms: u64) {
        self.failing_ms.get_or_insert(now_ms);
    }

    /// When the next broker has its turn, if the current one goes on failing; `None`: never.
    pub fn moves_at_ms(&self) -> Option<u64> {
        let since = self.failing_ms?;
        if self.left.is_some() {
            return Some(since);
        }
        (self.brokers.len() > 1).then(|| since.saturating_add(self.brokers[self.current].failover_after_ms))
    }

    /// Goes on to the next broker if its turn has come; whether it has.
    pub fn move_on(&mut self, now_ms: u64) -> bool {
        let due = self.moves_at_ms().is_some_and(|at| at <= now_ms);
        if due {
            self.current = self.left.take().unwrap_or((self.current + 1) % self.brokers.len());
            // Its own time begins with its first failure.
            self.failing_ms = None;
        }
        due
    }

    /// The brokers to be asked whether they are back, the best first; empty: none, or not yet.
    pub fn to_ask(&mut self, now_ms: u64) -> std::ops::Range<usize> {
        let every_ms = self.brokers[self.current].failback_every_ms;
        if self.current == 0 || now_ms < self.asked_ms.saturating_add(every_ms) {
            return 0..0;
        }
        self.asked_ms = now_ms;
        0..self.current
    }

    /// That broker is back: the current one is left for it. Should it fail at once, the way back is short.
    pub fn fail_back(&mut self, to: usize) {
        self.left = Some(self.current);
        (self.current, self.failing_ms) = (to, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Choice {
        Choice::new(vec![Patience { failover_after_ms: 60, failback_every_ms: 300 }; 3])
    }

    #[test]
    fn each_broker_gets_its_turn_after_the_one_before_has_failed_for_its_whole_time() {
        let mut choice = three();
        let mut turns = Vec::new();
        for now_ms in (0..400).step_by(20) {
            choice.failed(now_ms);
            if choice.move_on(now_ms) {
                turns.push((now_ms, choice.current()));
            }
        }
        assert_eq!(turns, [(60, 1), (140, 2), (220, 0), (300, 1), (380, 2)]);
    }

    #[test]
    fn a_broker_that_answers_in_time_is_not_left() {
        let mut choice = three();
        choice.failed(0);
        choice.connected(59);
        choice.failed(1000);
        assert!(!choice.move_on(1059));
        assert_eq!(choice.moves_at_ms(), Some(1060));
        assert!(choice.move_on(1060));
        let mut alone = Choice::new(vec![Patience { failover_after_ms: 0, failback_every_ms: 0 }]);
        alone.failed(0);
        assert!(!alone.move_on(1_000_000) && alone.moves_at_ms().is_none());
    }

    #[test]
    fn those_before_the_current_one_are_asked_now_and_then() {
        let mut choice = three();
        assert_eq!(choice.to_ask(1_000), 0..0, "there is none before the first");
        choice.failed(0);
        choice.move_on(60);
        choice.connected(100);
        assert_eq!((choice.to_ask(399), choice.to_ask(400), choice.to_ask(401)), (0..0, 0..1, 0..0));
        choice.fail_back(0);
        assert_eq!(choice.current(), 0);
        choice.failed(500);
        assert!(choice.move_on(500), "it is not as well as its port looked");
        assert_eq!(choice.current(), 1);
        choice.connected(510);
        choice.failed(600);
        assert!(!choice.move_on(600), "from now on as ever");
        assert_eq!(choice.to_ask(809), 0..0, "the next question has its time too");
    }
}
