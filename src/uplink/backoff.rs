//! How long to wait before connecting again: exponential, full jitter, reset after a stable time. Pure.
//!
//! Invariant: a connection that does not last counts as a failure, whatever ended it, so a broker that accepts
//! and then breaks every connection is tried as rarely as one that refuses. A whole fleet that lost its broker
//! comes back spread over the delay, not at once.

use std::time::Duration;

/// The ceiling of the first delay.
const FIRST_MS: u64 = 1_000;

/// No delay is shorter: full jitter alone could retry in a tight loop.
const SHORTEST_MS: u64 = 100;

/// A connection that lasted this long was a good one.
const STABLE_MS: u64 = 60_000;

/// A broker that is back is found within a day.
const LONGEST_MS: u64 = 86_400_000;

/// Why there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// It could not be opened, was refused, or broke.
    Failed,
    /// Another program uses our client identifier (MQTT 5.0 reason code 0x8E, or on 3.1.1 one disconnect after
    /// the other). Whoever connects again quickly only throws the other one out.
    TakenOver,
}

/// The delay before the next attempt to connect.
#[derive(Debug, Clone)]
pub struct Backoff {
    max_ms: u64,
    /// Failures since the last stable connection.
    failures: u32,
    /// When the connection that stands was accepted, in ms of the monotonic clock.
    connected_ms: Option<u64>,
}

impl Backoff {
    /// Never waits longer than `max`, which counts from 1 s to 1 d.
    pub fn new(max: Duration) -> Self {
        let max_ms = u64::try_from(max.as_millis()).unwrap_or(u64::MAX).clamp(FIRST_MS, LONGEST_MS);
        Backoff { max_ms, failures: 0, connected_ms: None }
    }

    /// The broker accepted a CONNECT. Times are in ms of a monotonic clock.
    pub fn connected(&mut self, now_ms: u64) {
        self.connected_ms = Some(now_ms);
    }

    /// An attempt failed, or the connection ended: how long to wait before the next attempt. `random` is a
    /// fresh random number from 0 to 1.
    pub fn wait(&mut self, cause: Cause, now_ms: u64, random: f64) -> Duration {
        let lasted_ms = self.connected_ms.take().map_or(0, |since| now_ms.saturating_sub(since));
        if lasted_ms >= STABLE_MS {
            self.failures = 0;
        }
        let ceiling_ms = self.ceiling_ms();
        self.failures = self.failures.saturating_add(1);
        let (from_ms, to_ms) = match cause {
            Cause::Failed => (SHORTEST_MS, ceiling_ms),
            Cause::TakenOver => (self.max_ms / 2, self.max_ms),
        };
        let spread_ms = (to_ms - from_ms) as f64 * random.clamp(0.0, 1.0);
        Duration::from_millis(from_ms + spread_ms as u64)
    }

    fn ceiling_ms(&self) -> u64 {
        // Doubling 63 times is beyond any maximum.
        FIRST_MS.saturating_mul(1 << self.failures.min(63)).min(self.max_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens at a time in seconds, and between which bounds, in ms, the delay then lies.
    enum Step {
        Connected(u64),
        Wait(Cause, u64, (u64, u64)),
    }
    use Cause::{Failed, TakenOver};
    use Step::{Connected, Wait};

    fn check(max_s: u64, steps: &[Step]) {
        let (mut low, mut high) =
            (Backoff::new(Duration::from_secs(max_s)), Backoff::new(Duration::from_secs(max_s)));
        for (at, step) in steps.iter().enumerate() {
            match *step {
                Connected(s) => {
                    low.connected(s * 1000);
                    high.connected(s * 1000);
                }
                Wait(cause, s, (least, most)) => {
                    let bounds = (low.wait(cause, s * 1000, 0.0), high.wait(cause, s * 1000, 1.0));
                    let expected = (Duration::from_millis(least), Duration::from_millis(most));
                    assert_eq!(bounds, expected, "step {at}");
                }
            }
        }
    }

    #[test]
    fn the_delay_doubles_up_to_the_maximum() {
        check(
            10,
            &[
                Wait(Failed, 0, (100, 1_000)),
                Wait(Failed, 1, (100, 2_000)),
                Wait(Failed, 2, (100, 4_000)),
                Wait(Failed, 3, (100, 8_000)),
                Wait(Failed, 4, (100, 10_000)),
                Wait(Failed, 5, (100, 10_000)),
            ],
        );
    }

    #[test]
    fn only_a_stable_connection_resets_the_delay() {
        check(
            300,
            &[
                Wait(Failed, 0, (100, 1_000)),
                Wait(Failed, 1, (100, 2_000)),
                Connected(2),
                Wait(Failed, 61, (100, 4_000)),
                Connected(70),
                Wait(Failed, 130, (100, 1_000)),
                Wait(Failed, 131, (100, 2_000)),
            ],
        );
    }

    #[test]
    fn a_client_id_in_use_elsewhere_waits_long_at_once() {
        check(
            300,
            &[
                Connected(0),
                Wait(TakenOver, 3, (150_000, 300_000)),
                Connected(200),
                Wait(TakenOver, 203, (150_000, 300_000)),
                Connected(400),
                Wait(TakenOver, 4_000, (150_000, 300_000)),
                Wait(Failed, 4_001, (100, 2_000)),
            ],
        );
    }

    #[test]
    fn no_input_makes_a_delay_outside_its_bounds() {
        for max in [Duration::ZERO, Duration::from_secs(5), Duration::MAX] {
            let mut backoff = Backoff::new(max);
            for round in 0..200 {
                for random in [f64::NAN, f64::NEG_INFINITY, -1.0, 0.5, 2.0, f64::INFINITY] {
                    backoff.connected(u64::MAX - round);
                    let delay = backoff.wait(Failed, round, random);
                    assert!(delay >= Duration::from_millis(SHORTEST_MS));
                    assert!(delay <= max.max(Duration::from_secs(1)));
                    assert!(backoff.wait(TakenOver, round, random) <= max.max(Duration::from_secs(1)));
                }
            }
        }
    }
}
