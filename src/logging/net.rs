//! The last net: no place in the sources fills the log, whatever calls it how often. Pure.
//!
//! What repeats is counted where it happens ([`crate::trouble`]); this holds where that was forgotten, or where somebody
//! outside can cause a line. Invariant: each place says at most [`BURST`] lines at once and one a minute in the long
//! run, and what was left out is told with its next one.

use std::collections::BTreeMap;

/// Lines at once.
const BURST: u64 = 60;
/// Then one in so many milliseconds.
const ONE_IN_MS: u64 = 60_000;
/// Places that are known; the others share one.
const PLACES_MAX: usize = 512;

/// What each place has said.
#[derive(Debug, Default)]
pub(super) struct Net {
    places: BTreeMap<usize, Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// When it would be full again.
    full_ms: u64,
    left_out: u64,
}

impl Net {
    /// Whether this place may say a line; `Some` with how many of its lines were left out before it.
    pub(super) fn pass(&mut self, place: usize, now_ms: u64) -> Option<u64> {
        let is_known = self.places.len() < PLACES_MAX || self.places.contains_key(&place);
        let bucket = self.places.entry(if is_known { place } else { 0 });
        let bucket = bucket.or_insert(Bucket { full_ms: now_ms, left_out: 0 });
        let full_ms = bucket.full_ms.max(now_ms) + ONE_IN_MS;
        if full_ms > now_ms.saturating_add(BURST * ONE_IN_MS) {
            bucket.left_out += 1;
            return None;
        }
        bucket.full_ms = full_ms;
        Some(std::mem::take(&mut bucket.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_at_one_line_a_minute_with_what_was_left_out() {
        let mut net = Net::default();
        let passed: Vec<u64> = (0..3_600_000).step_by(10).filter_map(|now_ms| net.pass(1, now_ms)).collect();
        assert_eq!(passed.len(), 60 + 59);
        assert_eq!(
            passed.iter().sum::<u64>() + passed.len() as u64,
            360_000 - 5_999,
            "all but the last minute's"
        );
        assert_eq!(net.pass(2, 3_600_000), Some(0), "another place is not affected");
    }

    #[test]
    fn what_is_rare_always_passes_and_the_memory_is_bounded() {
        let mut net = Net::default();
        assert!((0..1000).all(|minute| net.pass(1, minute * ONE_IN_MS) == Some(0)));
        for place in 0..10_000 {
            net.pass(place, 0);
        }
        assert!(net.places.len() <= PLACES_MAX + 1);
    }
}
