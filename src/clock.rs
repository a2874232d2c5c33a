//! When something happened: wall clock, monotonic clock, and whether the wall clock could be believed.
//!
//! [`Stamp`] is plain data. [`now`] is the one place that reads the clocks; pure logic is handed its result.

pub mod correction;

use std::fs;
#[cfg(target_pointer_width = "64")]
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
    /// Whether somebody (NTP, PTP, GPS) was keeping the wall clock right, as far as the kernel knows.
    pub synchronised: bool,
}

impl Stamp {
    /// Whether the wall clock had plausibly been set when this stamp was taken.
    pub fn wall_is_believable(self) -> bool {
        self.wall_ms >= EARLIEST_BELIEVABLE_MS
    }

    /// Whether the wall clock was right when this stamp was taken: kept so by somebody, and plausible.
    pub fn wall_is_right(self) -> bool {
        self.synchronised && self.wall_is_believable()
    }

    /// Milliseconds from `earlier` to this stamp by the monotonic clock; 0 if `earlier` is later.
    pub fn ms_since(self, earlier: Stamp) -> u64 {
        self.mono_ms.saturating_sub(earlier.mono_ms)
    }
}

/// Reads both clocks.
pub fn now() -> Stamp {
    Stamp { wall_ms: wall_ms(), mono_ms: mono_ms(), synchronised: synchronised() }
}

/// The wall clock of [`now`] alone.
#[cfg(target_pointer_width = "64")]
pub fn wall_ms() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_millis() as i64,
        Err(before) => -(before.duration().as_millis() as i64),
    }
}

/// The wall clock of [`now`] alone. A C library that counts seconds in 32 bits has none after 2038-01-19, and `std`
/// then ends the program; a clock that was set wrong is enough. The kernel counts in 64 bits, and is asked itself.
#[cfg(target_pointer_width = "32")]
pub fn wall_ms() -> i64 {
    let wall = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    wall.tv_sec * 1000 + wall.tv_nsec / 1_000_000
}

/// The monotonic clock of [`now`] alone, which costs no system call: for what is looked at with each packet.
pub fn mono_ms() -> u64 {
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    boot.tv_sec as u64 * 1000 + boot.tv_nsec as u64 / 1_000_000
}

/// The kernel's name for this boot of the machine; empty where it has none.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// What the kernel was told by whoever sets the clock; `false` where it may not be asked. The kernel takes it back by
/// itself when it hears nothing for some hours, and when somebody sets the clock by hand.
#[allow(unsafe_code)] // no crate that we know wraps adjtimex alone
fn synchronised() -> bool {
    // SAFETY: `timex` holds nothing but integers, for which zero is a value; `modes` 0 only reads.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure it is given, which outlives the call.
    let answer = unsafe { libc::adjtimex(&mut state) };
    answer >= 0 && state.status & libc::STA_UNSYNC == 0
}
