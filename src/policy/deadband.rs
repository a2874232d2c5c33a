//! Whether a sample is worth reporting: absolute and percent dead bands, with a longest silence. Pure.
//!
//! Invariant: a value is compared with the last *reported* one, never with the last sample, so that a slow
//! drift cannot creep past the dead band in steps that are each too small.

use std::time::Duration;

use crate::point::{Fault, Value};

/// How far a value must move from the last reported one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Deadband {
    /// Every sample is reported.
    None,
    /// Reported when it moved by more than this, in the point's own unit.
    Absolute(f64),
    /// Reported when it moved by more than this percentage of the last reported value.
    Percent(f64),
}

/// The dead band of one point, and what was last reported of it.
#[derive(Debug, Clone)]
pub struct Filter {
    deadband: Deadband,
    longest_silence_ms: u64,
    last: Option<Reported>,
}

#[derive(Debug, Clone)]
struct Reported {
    what: Result<Value, Trouble>,
    at_mono_ms: u64,
}

/// What must be the same for two bad samples to be the same news: how long was waited and what the operating
/// system said may differ.
type Trouble = (&'static str, Option<u8>);

impl Filter {
    /// A filter that has reported nothing yet. `longest_silence` is how long a value within its dead band, or
    /// a fault that stays the same, goes unreported.
    pub fn new(deadband: Deadband, longest_silence: Duration) -> Self {
        let longest_silence_ms = u64::try_from(longest_silence.as_millis()).unwrap_or(u64::MAX);
        Filter { deadband, longest_silence_ms, last: None }
    }

    /// Whether this sample is to be reported; if so, it is what the next ones are compared with.
    ///
    /// `now_mono_ms` is the sample's [`crate::clock::Stamp::mono_ms`].
    pub fn report(&mut self, value: &Result<Value, Fault>, now_mono_ms: u64) -> bool {
        let worth_it = match &self.last {
            None => true,
            Some(last) if now_mono_ms.saturating_sub(last.at_mono_ms) >= self.longest_silence_ms => true,
            Some(last) => match (&last.what, value) {
                (Ok(reported), Ok(value)) => self.deadband.is_left(reported, value),
                (Err(reported), Err(fault)) => *reported != trouble(fault),
                (Ok(_), Err(_)) | (Err(_), Ok(_)) => true,
            },
        };
        if worth_it {
            let what = value.clone().map_err(|fault| trouble(&fault));
            self.last = Some(Reported { what, at_mono_ms: now_mono_ms });
        }
        worth_it
    }

    /// Makes the next sample count as the first: what was reported last did not get through.
    pub fn forget(&mut self) {
        self.last = None;
    }
}

impl Deadband {
    fn is_left(self, reported: &Value, value: &Value) -> bool {
        if let (Value::Bool(reported), Value::Bool(value)) = (reported, value) {
            // There is no small change of a bit, whatever band a default for the whole unit gave it.
            return self == Deadband::None || reported != value;
        }
        let moved = distance(reported, value);
        match self {
            Deadband::None => true,
            Deadband::Absolute(band) => moved > band,
            // A percentage of 0 is 0: any change leaves it.
            Deadband::Percent(percent) => moved > reported.as_f64().abs() * (percent / 100.0),
        }
    }
}

/// How far apart two values are. Integers are subtracted as such: beyond 2^53 a float cannot tell neighbours.
fn distance(a: &Value, b: &Value) -> f64 {
    match (a, b) {
        (Value::Integer(a), Value::Integer(b)) => a.abs_diff(*b) as f64,
        _ => (a.as_f64() - b.as_f64()).abs(),
    }
}

fn trouble(fault: &Fault) -> Trouble {
    match fault {
        Fault::Exception { code } => (fault.kind(), Some(*code)),
        _ => (fault.kind(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENCE: Duration = Duration::from_secs(60);

    /// Feeds samples taken 1 s apart and returns which of them were reported.
    fn check(deadband: Deadband, samples: &[Result<Value, Fault>], reported: &[bool]) {
        let mut filter = Filter::new(deadband, SILENCE);
        let decisions: Vec<bool> = (1000..)
            .step_by(1000)
            .zip(samples)
            .map(|(now_mono_ms, sample)| filter.report(sample, now_mono_ms))
            .collect();
        assert_eq!(decisions, reported, "{deadband:?} {samples:?}");
    }

    fn floats(values: &[f64]) -> Vec<Result<Value, Fault>> {
        values.iter().map(|value| Ok(Value::Float(*value))).collect()
    }

    fn timeout(waited_ms: u64) -> Result<Value, Fault> {
        Err(Fault::Timeout { waited_ms })
    }

    #[test]
    fn without_a_dead_band_every_good_sample_is_reported() {
        check(Deadband::None, &floats(&[1.0, 1.0, 1.0]), &[true, true, true]);
        let bits = [Ok(Value::Bool(true)), Ok(Value::Bool(true))];
        check(Deadband::None, &bits, &[true, true]);
    }

    #[test]
    fn an_absolute_dead_band_is_left_by_more_than_its_width() {
        let band = Deadband::Absolute(0.5);
        check(band, &floats(&[230.0, 230.5, 229.5, 230.75, 230.5]), &[true, false, false, true, false]);
        check(band, &floats(&[-1.0, 1.0]), &[true, true]);
        check(band, &floats(&[f64::MAX, f64::MIN]), &[true, true]);
        check(Deadband::Absolute(0.0), &floats(&[1.0, 1.0, 1.0 + f64::EPSILON]), &[true, false, true]);
    }

    #[test]
    fn a_percent_dead_band_is_of_the_last_reported_value() {
        let band = Deadband::Percent(10.0);
        check(band, &floats(&[100.0, 110.0, 111.0, 122.0, 123.0]), &[true, false, true, false, true]);
        check(band, &floats(&[-100.0, -109.0, -111.0]), &[true, false, true]);
    }

    #[test]
    fn any_change_leaves_a_percentage_of_zero() {
        check(
            Deadband::Percent(10.0),
            &floats(&[0.0, 0.0, 1e-9, 0.0, -0.0]),
            &[true, false, true, true, false],
        );
    }

    #[test]
    fn a_slow_drift_is_reported_although_no_step_leaves_the_dead_band() {
        let drift: Vec<f64> = (0..9).map(|step| f64::from(step) * 0.25).collect();
        let every_third = [true, false, false, true, false, false, true, false, false];
        check(Deadband::Absolute(0.5), &floats(&drift), &every_third);
    }

    #[test]
    fn integers_and_bits_are_compared_exactly() {
        let big = 1 << 53;
        let integers = [Ok(Value::Integer(big)), Ok(Value::Integer(big + 1)), Ok(Value::Integer(big + 1))];
        check(Deadband::Absolute(0.0), &integers, &[true, true, false]);
        let ends = [Ok(Value::Integer(i64::MIN)), Ok(Value::Integer(i64::MAX))];
        check(Deadband::Absolute(1.0), &ends, &[true, true]);
        let bits = [Ok(Value::Bool(false)), Ok(Value::Bool(true)), Ok(Value::Bool(true))];
        check(Deadband::Absolute(5.0), &bits, &[true, true, false]);
    }

    #[test]
    fn a_change_of_quality_is_reported_at_once_and_repeated_only_after_the_silence() {
        let exception = |code| Err(Fault::Exception { code });
        let samples = [
            Ok(Value::Float(1.0)),
            timeout(1000),
            timeout(1007),
            Err(Fault::Resting { failures: 3 }),
            Err(Fault::Resting { failures: 4 }),
            exception(2),
            exception(2),
            exception(4),
            Ok(Value::Float(1.0)),
            Ok(Value::Float(1.0)),
        ];
        let reported = [true, true, false, true, false, true, false, true, true, false];
        check(Deadband::Absolute(0.5), &samples, &reported);
        check(Deadband::None, &[timeout(1), timeout(1)], &[true, false]);
    }

    #[test]
    fn nothing_is_silent_for_longer_than_the_longest_silence() {
        for sample in [Ok(Value::Float(1.0)), timeout(1000)] {
            let mut filter = Filter::new(Deadband::Absolute(0.5), SILENCE);
            let at = |now_mono_ms, filter: &mut Filter| filter.report(&sample, now_mono_ms);
            assert!(at(5_000, &mut filter));
            assert!(!at(64_999, &mut filter));
            assert!(at(65_000, &mut filter));
            assert!(!at(124_999, &mut filter), "the silence starts anew with each report");
            assert!(at(125_000, &mut filter));
        }
    }
}
