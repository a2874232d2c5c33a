//! When something happened: wall clock, monotonic clock, and whether the wall clock could be believed.
//!
//! [`Stamp`] is plain data. [`now`] is the one place that reads the clocks; pure logic is handed its result.

use std::time::{SystemTime, UNIX_EPOCH};

/// A wall clock before this moment (2025-01-01T00:00:00Z, in ms) has certainly not been set.
const EARLIEST_BELIEVABLE_MS: i64 = 1_735_689_600_000;

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Stamp {
    /// Wall clock, Unix time in milliseconds.
    pub wall_ms: i64,
    /// Milliseconds since this machine booted, sleep included; only comparable within one boot.
    pub mono_ms: u64,
}

impl Stamp {
    /// Whether the wall clock had plausibly been set when this stamp was taken.
    pub fn wall_is_believable(self) -> bool {
        self.wall_ms >= EARLIEST_BELIEVABLE_MS
    }

    /// Milliseconds from `earlier` to this stamp by the monotonic clock; 0 if `earlier` is later.
    pub fn ms_since(self, earlier: Stamp) -> u64 {
        self.mono_ms.saturating_sub(earlier.mono_ms)
    }
}

/// Reads both clocks.
pub fn now() -> Stamp {
    let wall_ms = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_millis() as i64,
        Err(before) => -(before.duration().as_millis() as i64),
    };
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Stamp { wall_ms, mono_ms: boot.tv_sec as u64 * 1000 + boot.tv_nsec as u64 / 1_000_000 }
}
