//! The pace of a backlog: token buckets for messages and bytes. Pure.
//!
//! Invariant: over any time, no more is let through than the rate times that time, plus one second's worth, plus
//! one message (a message may be larger than a second's worth of bytes; it is paid off before the next one).

use super::Replay;

/// How long tokens gather before anybody is woken for them: a commit for each message would wear the flash.
const GATHER_MS: u64 = 100;

/// One bucket. Tokens are counted in thousandths, so that a rate per second is a rate per millisecond.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: u64,
    thousandths: i64,
    at_ms: u64,
}

impl Bucket {
    fn new(per_second: u64) -> Self {
        Bucket { per_second, thousandths: Bucket::full(per_second), at_ms: 0 }
    }

    /// One second's worth.
    fn full(per_second: u64) -> i64 {
        i64::try_from(per_second.saturating_mul(1000)).unwrap_or(i64::MAX)
    }

    fn level(&self, now_ms: u64) -> i64 {
        let more = now_ms.saturating_sub(self.at_ms).saturating_mul(self.per_second);
        let level = self.thousandths.saturating_add(i64::try_from(more).unwrap_or(i64::MAX));
        level.min(Bucket::full(self.per_second))
    }

    fn spend(&mut self, tokens: u64, now_ms: u64) {
        let thousandths = i64::try_from(tokens.saturating_mul(1000)).unwrap_or(i64::MAX);
        self.thousandths = self.level(now_ms).saturating_sub(thousandths);
        self.at_ms = now_ms;
    }

    /// When it holds enough to wake somebody for.
    fn gathered_at(&self, now_ms: u64) -> u64 {
        let wanted = (self.per_second * GATHER_MS).max(1000);
        let wanted = i64::try_from(wanted).unwrap_or(i64::MAX).min(Bucket::full(self.per_second));
        let missing = u64::try_from(wanted.saturating_sub(self.level(now_ms))).unwrap_or(0);
        now_ms.saturating_add(missing.div_ceil(self.per_second))
    }
}

/// How fast a backlog may follow. Without limits: as fast as it can.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    messages: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Pace {
    pub(crate) fn new(replay: &Replay) -> Self {
        let bucket = |per_second: Option<u64>| per_second.filter(|rate| *rate > 0).map(Bucket::new);
        Pace { messages: bucket(replay.max_messages_per_second), bytes: bucket(replay.max_bytes_per_second) }
    }

    /// Whether one more message may go.
    pub(crate) fn lets_pass(&self, now_ms: u64) -> bool {
        self.messages.is_none_or(|bucket| bucket.level(now_ms) >= 1000)
            && self.bytes.is_none_or(|bucket| bucket.level(now_ms) > 0)
    }

    /// A message of that many bytes has gone.
    pub(crate) fn spend(&mut self, bytes: u64, now_ms: u64) {
        self.messages.iter_mut().for_each(|bucket| bucket.spend(1, now_ms));
        self.bytes.iter_mut().for_each(|bucket| bucket.spend(bytes, now_ms));
    }

    /// When enough may go to be worth a commit: not later than `now_ms` if it may already.
    pub(crate) fn gathered_at(&self, now_ms: u64) -> u64 {
        let buckets = [&self.messages, &self.bytes].into_iter().flatten();
        buckets.map(|bucket| bucket.gathered_at(now_ms)).max().unwrap_or(now_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ReplayOrder;
    use super::*;

    fn pace(messages: Option<u64>, bytes: Option<u64>) -> Pace {
        Pace::new(&Replay {
            order: ReplayOrder::LiveFirst,
            max_messages_per_second: messages,
            max_bytes_per_second: bytes,
        })
    }

    /// Messages of that size in so many seconds, and how often somebody was woken.
    fn run(mut pace: Pace, bytes: u64, seconds: u64) -> (u64, u64) {
        let (start, mut now_ms, mut messages, mut wakes) = (5_000, 5_000, 0, 0);
        while now_ms < start + seconds * 1000 {
            wakes += 1;
            while pace.lets_pass(now_ms) {
                pace.spend(bytes, now_ms);
                messages += 1;
            }
            let next = pace.gathered_at(now_ms);
            assert!(next > now_ms, "it never spins");
            now_ms = next;
        }
        (messages, wakes)
    }

    #[test]
    fn a_minute_lets_through_a_minutes_worth_and_the_burst_of_one_second() {
        for (messages, bytes, of_bytes, expected) in [
            (Some(10), None, 100, 610),
            (Some(1), None, 100, 61),
            (Some(5000), None, 100, 305_000),
            (None, Some(10_000), 100, 6_100),
            (None, Some(10_000), 25_000, 25),
            (Some(10), Some(500), 100, 305),
        ] {
            let (passed, wakes) = run(pace(messages, bytes), of_bytes, 60);
            let tolerance = expected / 100 + 1;
            assert!(
                passed.abs_diff(expected) <= tolerance,
                "{messages:?} {bytes:?}: {passed}, not {expected}"
            );
            assert!(wakes <= 601, "{wakes} wakes in a minute");
        }
    }

    #[test]
    fn without_a_limit_everything_passes() {
        let pace = pace(None, None);
        assert!(pace.lets_pass(0));
        assert_eq!(pace.gathered_at(7), 7);
    }
}
