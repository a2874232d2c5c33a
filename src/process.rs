//! What the kernel says about our own process: memory, processor time, bytes written to disks.
//!
//! Invariant: what it does not say is `None`, never 0.

use std::fs;

use rustix::time::{ClockId, clock_gettime};

/// The process at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    /// Memory it holds, in bytes.
    pub(crate) resident_bytes: Option<u64>,
    /// Time its threads had a processor, in milliseconds.
    pub(crate) cpu_ms: u64,
    /// Bytes it had written to disks, what others have made of them not counted.
    pub(crate) written_bytes: Option<u64>,
}

/// Asks the kernel: two small files that it makes up when they are read.
pub(crate) fn look() -> Process {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    Process {
        resident_bytes: number_after(&read("status"), "VmRSS:").map(|kib| kib << 10),
        cpu_ms: cpu.tv_sec as u64 * 1000 + cpu.tv_nsec as u64 / 1_000_000,
        written_bytes: number_after(&read("io"), "write_bytes:"),
    }
}

/// The number after a word that begins a line.
fn number_after(text: &str, word: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(word))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_knows_this_process() {
        let process = look();
        assert!(process.resident_bytes.is_some_and(|bytes| bytes > 1 << 20), "{process:?}");
        assert!(process.written_bytes.is_some(), "{process:?}");
        assert_eq!(
            number_after("rchar: 1\nwrite_bytes: 4096\ncancelled_write_bytes: 1\n", "write_bytes:"),
            Some(4096)
        );
        assert_eq!(number_after("", "VmRSS:"), None);
    }
}
