//! When something happened: wall clock, monotonic clock, and whether the wall clock could be believed.
//!
//! [`Stamp`] is plain data. [`now`] is the one place that reads the clocks; pure logic is handed its result.

pub mod correction;

use std::fs;
use std::path::Path;
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

/// Where systemd-timesyncd says that it has set the clock: the time of the file is that of the last answer it got.
const MARK: &str = "/run/systemd/timesync/synchronized";
/// How long such an answer keeps the clock right, in milliseconds: about as long as the kernel believes one, which takes
/// the clock to be off by 500 ppm at most and gives up at 16 s.
const MARK_HOLDS_MS: i64 = 9 * 3_600_000;

/// Whether somebody can say that the clock is right: the kernel may be asked, or systemd-timesyncd has said so since
/// this machine booted.
pub fn is_judged() -> bool {
    kernel_synchronised().is_some() || Path::new(MARK).exists()
}

/// Whether somebody keeps the wall clock right: by the kernel, which every time service tells, or, where a sandbox
/// forbids to ask it (`ProtectClock=` of systemd), by systemd-timesyncd.
fn synchronised() -> bool {
    kernel_synchronised().unwrap_or_else(|| is_marked(Path::new(MARK), wall_ms()))
}

/// What the kernel was told by whoever sets the clock; `None` where it may not be asked. The kernel takes it back by
/// itself when it hears nothing for some hours, and when somebody sets the clock by hand.
#[allow(unsafe_code)] // no crate that we know wraps adjtimex alone
fn kernel_synchronised() -> Option<bool> {
    // SAFETY: `timex` holds nothing but integers, for which zero is a value; `modes` 0 only reads.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure it is given, which outlives the call.
    let answer = unsafe { libc::adjtimex(&mut state) };
    (answer >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

/// Whether that file was written in the last hours by the clock that it speaks of. A clock that was set back since makes
/// it one of the future, which says nothing.
#[allow(clippy::unnecessary_cast)] // the type of the time differs between machines
fn is_marked(mark: &Path, wall_ms: i64) -> bool {
    let Ok(written) = rustix::fs::stat(mark) else { return false };
    let age_ms = wall_ms - written.st_mtime as i64 * 1000;
    (-1_000..MARK_HOLDS_MS).contains(&age_ms)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_mark_of_the_time_service_holds_for_hours_and_not_when_the_clock_was_set_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let mark = folder.path().join("synchronized");
        let wall = 1_795_255_200_000_i64;
        assert!(!is_marked(&mark, wall), "there is none");
        let file = fs::File::create(&mark).expect("created");
        let at = std::time::UNIX_EPOCH + Duration::from_millis(wall as u64);
        file.set_modified(at).expect("dated");
        for (after_ms, believed) in [
            (0, true),
            (-1_000, true),
            (8 * 3_600_000, true),
            (MARK_HOLDS_MS, false),
            (-60_000, false),
            (-wall, false),
        ] {
            assert_eq!(is_marked(&mark, wall + after_ms), believed, "{after_ms} ms after it");
        }
    }
}
