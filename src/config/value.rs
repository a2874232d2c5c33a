//! What single values mean: dead bands, addresses, names, ids with `{hostname}`. Pure.
//!
//! Durations and sizes are in `quantity`, the broker's URL in `url`.
//!
//! Invariant: nothing is guessed. A value that could mean two things is refused with both spellings.

use std::fmt;
use std::ops::RangeInclusive;

use super::raw::Value;
use crate::policy::deadband::Deadband;
use crate::source::modbus::Space;

/// Why a value cannot be taken, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) message: String,
    pub(super) help: Option<String>,
}

impl Complaint {
    pub(super) fn new(message: impl Into<String>) -> Self {
        Complaint { message: message.into(), help: None }
    }

    pub(super) fn help(self, help: impl Into<String>) -> Self {
        Complaint { help: Some(help.into()), ..self }
    }
}

/// The machine and environment that ids may name.
pub(super) struct Surroundings<'a> {
    /// For `{hostname}`.
    pub(super) hostname: &'a str,
    /// For `${NAME}`, and where systemd keeps credentials.
    pub(super) variable: &'a dyn Fn(&str) -> Option<String>,
}

impl fmt::Display for Value {
    /// The value as a problem names it: `the number 5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Text(text) => write!(f, "the text {}", quoted(text)),
            Value::Integer(number) => write!(f, "the number {number}"),
            Value::Float(number) => write!(f, "the number {number}"),
            Value::Bool(yes) => write!(f, "{yes}"),
            Value::Date => f.write_str("a date"),
            Value::Array(_) => f.write_str("an array"),
            Value::Table(_) => f.write_str("a table"),
        }
    }
}

/// In quotes, without control characters, and not too long for a line.
pub(super) fn quoted(text: &str) -> String {
    const SHOWN_MAX: usize = 60;
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

pub(super) fn expected(what: &str, found: &Value) -> Complaint {
    Complaint::new(format!("expected {what}, found {found}"))
}

pub(super) fn text(value: &Value) -> Result<&str, Complaint> {
    match value {
        Value::Text(text) => Ok(text),
        Value::Integer(number) => Err(expected("a text", value).help(format!("write \"{number}\""))),
        other => Err(expected("a text in quotes", other)),
    }
}

pub(super) fn boolean(value: &Value) -> Result<bool, Complaint> {
    match value {
        Value::Bool(yes) => Ok(*yes),
        Value::Text(text) if text == "true" || text == "false" => {
            Err(expected("true or false", value).help(format!("write {text} without quotes")))
        }
        other => Err(expected("true or false", other)),
    }
}

pub(super) fn integer(value: &Value, range: RangeInclusive<i64>) -> Result<i64, Complaint> {
    let wanted = format!("a whole number from {} to {}", range.start(), range.end());
    match value {
        Value::Integer(number) if range.contains(number) => Ok(*number),
        Value::Integer(number) => Err(Complaint::new(format!("{number} is out of range: {wanted}"))),
        Value::Text(text) if text.parse::<i64>().is_ok_and(|number| range.contains(&number)) => {
            Err(expected(&wanted, value).help(format!("write {text} without quotes")))
        }
        other => Err(expected(&wanted, other)),
    }
}

/// One of a few words, each with the other words people use for it.
pub(super) type Choice<T> = (&'static str, T, &'static [&'static str]);

/// The word for what was chosen.
pub(super) fn name_of<T: PartialEq>(choices: &[Choice<T>], chosen: &T) -> String {
    choices.iter().find(|(_, choice, _)| choice == chosen).map_or("", |(name, ..)| name).to_owned()
}

pub(super) fn choice<T: Copy>(value: &Value, choices: &[Choice<T>]) -> Result<T, Complaint> {
    let written = match value {
        Value::Text(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        _ => String::new(),
    };
    if let (Value::Text(_), Some((_, chosen, _))) =
        (value, choices.iter().find(|(name, ..)| *name == written))
    {
        return Ok(*chosen);
    }
    let names = choices.iter().map(|(name, ..)| format!("\"{name}\"")).collect::<Vec<_>>();
    let complaint = expected(&format!("one of {}", names.join(", ")), value);
    let written = written.to_lowercase();
    let meant = choices.iter().find(|(name, _, also)| {
        *name == written
            || also.contains(&&*written)
            || strsim::damerau_levenshtein(name, &written) <= name.len() / 3
    });
    Err(match (meant, value) {
        (None, _) => complaint,
        (Some((name, ..)), Value::Text(_)) => complaint.help(format!("did you mean \"{name}\"?")),
        (Some((name, ..)), _) => complaint.help(format!("write \"{name}\"")),
    })
}

/// A finite factor that is not zero.
pub(super) fn scale(value: &Value) -> Result<f64, Complaint> {
    let number = match value {
        Value::Integer(number) => *number as f64,
        Value::Float(number) => *number,
        other => return Err(expected("a number", other)),
    };
    if number == 0.0 {
        return Err(Complaint::new("a scale of 0 makes every value 0").help("leave it out for no scaling"));
    }
    if !number.is_finite() {
        return Err(Complaint::new(format!("{number} is not a number to multiply with")));
    }
    Ok(number)
}

/// `0.5` in the point's own unit, or `"2%"` of the last reported value.
pub(super) fn deadband(value: &Value) -> Result<Deadband, Complaint> {
    const WHAT: &str = "a number in the point's own unit, or a percentage such as \"2%\"";
    let (number, percent) = match value {
        Value::Integer(number) => (*number as f64, false),
        Value::Float(number) => (*number, false),
        Value::Text(text) => match text.strip_suffix('%').map(|number| number.trim().parse::<f64>()) {
            Some(Ok(number)) => (number, true),
            _ if text.trim().parse::<f64>().is_ok() => {
                let text = text.trim();
                return Err(
                    expected(WHAT, value).help(format!("write {text} without quotes, or \"{text}%\""))
                );
            }
            _ => return Err(expected(WHAT, value)),
        },
        other => return Err(expected(WHAT, other)),
    };
    match percent {
        true if (0.0..=100.0).contains(&number) => Ok(Deadband::Percent(number)),
        true => Err(Complaint::new(format!("{number}% is out of range: 0% to 100%"))),
        false if number.is_finite() && number >= 0.0 => Ok(Deadband::Absolute(number)),
        false => Err(Complaint::new(format!("{number} is out of range: a dead band is 0 or more"))),
    }
}

/// A register's address as people have it: `0`, `"0x10"`, or `"40001"`, which also names the register type.
pub(super) fn address(value: &Value) -> Result<(u16, Option<Space>), Complaint> {
    const WHAT: &str = "an address: 0 to 65535 as on the wire, \"0x10\", or a text of five or six digits as in \
                        manuals, \"40001\"";
    match value {
        Value::Integer(number) => u16::try_from(*number).map(|address| (address, None)).map_err(|_| {
            let complaint =
                Complaint::new(format!("{number} is out of range: addresses on the wire are 0 to 65535"));
            match modicon(&number.to_string()) {
                Some(Ok(_)) => complaint.help(format!("for the manual's numbering write \"{number}\"")),
                _ => complaint,
            }
        }),
        Value::Text(text) => {
            let text = text.trim();
            let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
            if let Some(digits) = hex.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit())) {
                let address = u16::from_str_radix(digits, 16);
                return address.map(|address| (address, None)).map_err(|_| expected(WHAT, value));
            }
            match modicon(text) {
                Some(found) => found.map(|(space, address)| (address, Some(space))),
                None if text.len() < 5
                    && !text.is_empty()
                    && text.bytes().all(|byte| byte.is_ascii_digit()) =>
                {
                    text.parse().map(|address| (address, None)).map_err(|_| expected(WHAT, value))
                }
                None => Err(expected(WHAT, value)),
            }
        }
        other => Err(expected(WHAT, other)),
    }
}

/// Five or six digits: the first names the table, the others count from 1. `None` for anything else.
fn modicon(text: &str) -> Option<Result<(Space, u16), Complaint>> {
    if !matches!(text.len(), 5 | 6) || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let space = match text.as_bytes()[0] {
        b'0' => Space::Coil,
        b'1' => Space::DiscreteInput,
        b'3' => Space::Input,
        b'4' => Space::Holding,
        other => {
            let complaint = Complaint::new(format!(
                "\"{text}\" begins with {}: the manual's numbering has 0 (coil), 1 (discrete), 3 (input), 4 (holding)",
                char::from(other),
            ));
            return Some(Err(match text.parse::<u16>() {
                Ok(wire) => {
                    complaint.help(format!("for the address on the wire write {wire} without quotes"))
                }
                Err(_) => complaint,
            }));
        }
    };
    // The text is all digits and at most five of them are left.
    let number = text[1..].parse::<u32>().unwrap_or(0);
    Some(match number.checked_sub(1).and_then(|address| u16::try_from(address).ok()) {
        Some(address) => Ok((space, address)),
        None => Err(Complaint::new(format!(
            "\"{text}\" is out of range: in the manual's numbering registers count from 1 to 65536"
        ))
        .help(format!("the first one is \"{}{:0>2$}\"", &text[..1], 1, text.len() - 1))),
    })
}

/// A name of a gateway, line, unit or point: one topic level.
pub(super) fn name(text: &str) -> Result<(), Complaint> {
    const LENGTH_MAX: usize = 64;
    let length = text.chars().count();
    if length == 0 || length > LENGTH_MAX {
        return Err(Complaint::new(format!(
            "a name has 1 to {LENGTH_MAX} characters, this one has {length}"
        )));
    }
    if text.starts_with('$') {
        let complaint =
            Complaint::new(format!("{} starts with '$', which belongs to the broker", quoted(text)));
        return Err(complaint.help("choose a name without it"));
    }
    match text.chars().find(|c| matches!(c, '/' | '+' | '#') || c.is_control()) {
        None => Ok(()),
        Some(character) => Err(Complaint::new(format!("{} holds {character:?}", quoted(text)))
            .help("names become one level of a topic: no '/', '+', '#' or control characters")),
    }
}

/// Replaces `{hostname}` and `${NAME}`.
pub(super) fn substitute(text: &str, around: &Surroundings<'_>) -> Result<String, Complaint> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(open) = rest.find(['{', '}']) {
        let Some((inside, after)) = rest[open..].strip_prefix('{').and_then(|inner| inner.split_once('}'))
        else {
            return Err(Complaint::new("there is a brace without its partner")
                .help("{hostname} and ${NAME} are replaced; other braces have no place here"));
        };
        match rest[..open].strip_suffix('$') {
            Some(before) => {
                let found = (around.variable)(inside).filter(|value| !value.is_empty());
                let value = found.ok_or_else(|| {
                    Complaint::new(format!("the environment variable {} is not set", quoted(inside))).help(
                        format!(
                            "set it where fieldpost is started; in a systemd unit: Environment={inside}=..."
                        ),
                    )
                })?;
                out.extend([before, &value]);
            }
            None if inside == "hostname" => out.extend([&rest[..open], around.hostname]),
            None => {
                return Err(Complaint::new(format!("unknown placeholder {{{inside}}}"))
                    .help("{hostname} and ${NAME}, a variable of the environment, are replaced here"));
            }
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(text: &str) -> Value {
        Value::Text(text.to_owned())
    }

    #[test]
    fn addresses_are_taken_as_people_have_them() {
        use Space::{Coil, DiscreteInput, Holding, Input};
        for (value, meant) in [
            (Value::Integer(0), Some((0, None))),
            (Value::Integer(65_535), Some((65_535, None))),
            (Value::Integer(40_001), Some((40_001, None))),
            (Value::Integer(65_536), None),
            (Value::Integer(-1), None),
            (Value::Float(1.0), None),
            (text_of("0x10"), Some((16, None))),
            (text_of("0xFFFF"), Some((65_535, None))),
            (text_of("0x10000"), None),
            (text_of("0x"), None),
            (text_of("0x+1"), None),
            (text_of("10"), Some((10, None))),
            (text_of("40011"), Some((10, Some(Holding)))),
            (text_of("30001"), Some((0, Some(Input)))),
            (text_of("10001"), Some((0, Some(DiscreteInput)))),
            (text_of("00001"), Some((0, Some(Coil)))),
            (text_of("400001"), Some((0, Some(Holding)))),
            (text_of("465536"), Some((65_535, Some(Holding)))),
            (text_of("465537"), None),
            (text_of("40000"), None),
            (text_of("20001"), None),
            (text_of("4000001"), None),
            (text_of("forty"), None),
            (text_of(""), None),
        ] {
            assert_eq!(address(&value).ok(), meant, "{value}");
        }
    }

    #[test]
    fn dead_bands_are_absolute_or_percent() {
        for (value, meant) in [
            (Value::Integer(0), Some(Deadband::Absolute(0.0))),
            (Value::Float(0.5), Some(Deadband::Absolute(0.5))),
            (text_of("2%"), Some(Deadband::Percent(2.0))),
            (text_of("0.5 %"), Some(Deadband::Percent(0.5))),
            (text_of("2"), None),
            (text_of("NaN%"), None),
            (text_of("101%"), None),
            (Value::Float(-0.5), None),
            (Value::Float(f64::NAN), None),
            (Value::Float(f64::INFINITY), None),
        ] {
            assert_eq!(deadband(&value).ok(), meant, "{value}");
        }
    }

    #[test]
    fn ids_may_name_the_host_and_the_environment() {
        let variable = |name: &str| (name == "SITE").then(|| "north".to_owned());
        let around = Surroundings { hostname: "pi-7", variable: &variable };
        for (written, meant) in [
            ("plain", Some("plain")),
            ("{hostname}", Some("pi-7")),
            ("${SITE}-{hostname}!", Some("north-pi-7!")),
            ("5$", Some("5$")),
            ("${NOWHERE}", None),
            ("{gateway}", None),
            ("{hostname", None),
            ("hostname}", None),
            ("}{", None),
        ] {
            assert_eq!(substitute(written, &around).ok().as_deref(), meant, "{written}");
        }
    }
}
