//! Durations and sizes: numbers that always carry their unit. Pure.
//!
//! Invariant: nothing is guessed. A number without a unit, or with one that could mean two things, is refused with
//! what to write.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::raw::Value;
use super::value::{Complaint, expected, quoted};

const TIME_UNITS: [(&str, u64, &[&str]); 5] = [
    ("ms", 1, &["msec", "msecs", "millisecond", "milliseconds"]),
    ("s", 1000, &["sec", "secs", "second", "seconds"]),
    ("min", 60_000, &["m", "mins", "minute", "minutes"]),
    ("h", 3_600_000, &["hr", "hrs", "hour", "hours"]),
    ("d", 86_400_000, &["day", "days"]),
];

const SIZE_UNITS: [(&str, u64, &[&str]); 5] = [
    ("B", 1, &["b", "byte", "bytes"]),
    ("KiB", 1 << 10, &["k", "kb", "kib"]),
    ("MiB", 1 << 20, &["m", "mb", "mib"]),
    ("GiB", 1 << 30, &["g", "gb", "gib"]),
    ("TiB", 1 << 40, &["t", "tb", "tib"]),
];

/// A kind of quantity that is written as a number with its unit.
struct Quantity {
    /// What it is, with an example of each spelling.
    what: &'static str,
    units: &'static [(&'static str, u64, &'static [&'static str])],
}

const DURATION: Quantity =
    Quantity { what: "a duration such as \"500ms\", \"2s\", \"5min\", \"1h\" or \"7d\"", units: &TIME_UNITS };
const SIZE: Quantity =
    Quantity { what: "a size such as \"64KiB\", \"512MiB\" or \"1GiB\"", units: &SIZE_UNITS };

impl Quantity {
    fn read(&self, value: &Value, range: RangeInclusive<u64>) -> Result<u64, Complaint> {
        let amount = match value {
            Value::Text(text) => self.parse(text)?,
            Value::Integer(number) => {
                let complaint = expected(&format!("{}, in quotes and with its unit", self.what), value);
                return Err(match self.spellings(*number, &range) {
                    Some(spellings) => complaint.help(format!("write {spellings}")),
                    None => complaint,
                });
            }
            Value::Float(_) => {
                return Err(expected(self.what, value).help("write a whole number of a smaller unit"));
            }
            other => return Err(expected(self.what, other)),
        };
        if range.contains(&amount) {
            return Ok(amount);
        }
        let limits = format!("{} to {}", self.show(*range.start()), self.show(*range.end()));
        let written = if let Value::Text(text) = value { quoted(text) } else { value.to_string() };
        Err(Complaint::new(format!("{written} is out of range: {limits}")))
    }

    fn parse(&self, text: &str) -> Result<u64, Complaint> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..digits], text[digits..].trim());
        let refused = || Complaint::new(format!("{} is not {}", quoted(text), self.what));
        if number.is_empty() {
            return Err(refused());
        }
        let Some((name, factor, _)) = self.units.iter().find(|(name, ..)| *name == unit) else {
            let lower = unit.to_lowercase();
            let meant = self.units.iter().find(|(name, _, also)| *name == lower || also.contains(&&*lower));
            return Err(match meant {
                Some((name, ..)) => refused().help(format!("write \"{number}{name}\"")),
                None if unit.is_empty() => {
                    match number.parse().ok().and_then(|n| self.spellings(n, &(0..=u64::MAX))) {
                        Some(spellings) => refused().help(format!("add the unit: {spellings}")),
                        None => refused(),
                    }
                }
                None => refused(),
            });
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole
                .checked_mul(*factor)
                .ok_or_else(|| Complaint::new(format!("{} is more than can be counted", quoted(text))));
        }
        let smaller = self.units.iter().rev().filter(|(_, other, _)| other < factor);
        let exact = number.parse::<f64>().ok().and_then(|number| {
            smaller
                .map(|(name, other, _)| (name, number * (*factor / *other) as f64))
                .find(|(_, n)| n.fract() == 0.0)
        });
        Err(match exact {
            Some((smaller, amount)) => Complaint::new(format!("\"{number}{name}\" is not a whole number"))
                .help(format!("write \"{amount}{smaller}\"")),
            None => refused(),
        })
    }

    /// How a bare number could have been meant, within the range: `"500ms" or "500s"`, two at most.
    fn spellings(&self, number: i64, range: &RangeInclusive<u64>) -> Option<String> {
        let number = u64::try_from(number).ok()?;
        let fits = |factor: u64| number.checked_mul(factor).is_some_and(|amount| range.contains(&amount));
        let fitting = self.units.iter().filter(|(_, factor, _)| fits(*factor)).take(2);
        let spelt = fitting.map(|(name, factor, _)| match factor {
            // A number of milliseconds or bytes, as other programs have it, in the form we show ourselves.
            1 => format!("\"{}\"", self.show(number)),
            _ => format!("\"{number}{name}\""),
        });
        let spelt = spelt.collect::<Vec<_>>();
        (!spelt.is_empty()).then(|| spelt.join(" or "))
    }

    fn show(&self, amount: u64) -> String {
        let exact =
            |(_, factor, _): &&(&str, u64, &[&str])| amount >= *factor && amount.is_multiple_of(*factor);
        if amount == 0 {
            return format!("0{}", self.units[1].0);
        }
        match self.units.iter().rev().find(exact) {
            Some((name, factor, _)) => format!("{}{name}", amount / factor),
            None => format!("{amount}{}", self.units[0].0),
        }
    }
}

pub(super) fn duration(value: &Value, range: RangeInclusive<Duration>) -> Result<Duration, Complaint> {
    let range = range.start().as_millis() as u64..=range.end().as_millis() as u64;
    DURATION.read(value, range).map(Duration::from_millis)
}

pub(super) fn size(value: &Value, range: RangeInclusive<u64>) -> Result<u64, Complaint> {
    SIZE.read(value, range)
}

/// As the file has it.
pub(super) fn show_duration(duration: &Duration) -> String {
    DURATION.show(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// As the file has it.
pub(super) fn show_size(bytes: &u64) -> String {
    SIZE.show(*bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn durations_carry_their_unit() {
        for (written, meant_ms) in [
            ("0s", Some(0)),
            ("500ms", Some(500)),
            ("2s", Some(2000)),
            (" 5 min ", Some(300_000)),
            ("1h", Some(3_600_000)),
            ("7d", Some(604_800_000)),
            ("500", None),
            ("5m", None),
            ("1.5s", None),
            ("-1s", None),
            ("", None),
            ("s", None),
            ("1e3s", None),
            ("99999999999999999999d", None),
            ("9999999999999999d", None),
        ] {
            let found =
                duration(&text_of(written), Duration::ZERO..=Duration::MAX.min(Duration::from_secs(1 << 40)));
            assert_eq!(found.ok().map(|found| found.as_millis()), meant_ms, "{written}");
        }
    }

    #[test]
    fn a_quantity_that_is_not_understood_comes_with_its_remedy() {
        let ms = Duration::from_millis;
        for (value, range_ms, remedy) in [
            (Value::Integer(500), 50..=86_400_000, "write \"500ms\" or \"500s\""),
            (Value::Integer(30), 5000..=64_800_000, "write \"30s\" or \"30min\""),
            (text_of("500"), 0..=1000, "add the unit: \"500ms\" or \"500s\""),
            (text_of("1.5s"), 0..=9000, "write \"1500ms\""),
            (text_of("5 minutes"), 0..=9000, "write \"5min\""),
            (text_of("5m"), 0..=9000, "write \"5min\""),
        ] {
            let found = duration(&value, ms(*range_ms.start())..=ms(*range_ms.end()));
            assert_eq!(found.expect_err("refused").help.as_deref(), Some(remedy), "{value}");
        }
        let found = size(&text_of("64KB"), 0..=u64::MAX);
        assert_eq!(found.expect_err("refused").help.as_deref(), Some("write \"64KiB\""));
        let found = size(&text_of("1.5MiB"), 0..=u64::MAX);
        assert_eq!(found.expect_err("refused").help.as_deref(), Some("write \"1536KiB\""));
    }

    #[test]
    fn out_of_range_names_the_range() {
        let found = duration(&text_of("10ms"), Duration::from_millis(50)..=Duration::from_secs(86_400));
        assert_eq!(found.expect_err("refused").message, "\"10ms\" is out of range: 50ms to 1d");
        let found = size(&text_of("1KiB"), 1 << 20..=1 << 40);
        assert_eq!(found.expect_err("refused").message, "\"1KiB\" is out of range: 1MiB to 1TiB");
    }
}
