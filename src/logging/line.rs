//! How a log line reads: for a person at a terminal, in the journal, or as JSON for a program. Pure.
//!
//! Invariant: an entry is one line, whatever a device or a broker put into it, and no longer than [`LINE_MAX_BYTES`].

use std::fmt::Write as _;

use serde_json::Value;

use super::levels::Level;
use crate::policy::format::rfc3339;

/// Longest line; what is beyond it is cut off, and marked.
const LINE_MAX_BYTES: usize = 4096;
/// Fields that say where, in the order of a point's name.
const PLACE: [&str; 3] = ["line", "unit", "point"];
/// Fields that say why: they go behind the words.
const REASON: [&str; 2] = ["error", "reason"];

/// What there is to say.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry<'a> {
    pub(super) wall_ms: i64,
    pub(super) level: Level,
    /// The module that says it.
    pub(super) module: &'a str,
    pub(super) message: String,
    /// In their order, without the message.
    pub(super) fields: Vec<(&'a str, Value)>,
}

/// How it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    /// One JSON object, instead of words.
    pub(super) json: bool,
    /// For the journal, which takes the level from `<N>` at the beginning (sd-daemon(3)) and knows the time.
    pub(super) journal: bool,
    pub(super) colours: bool,
}

/// The line, with the line feed at its end.
pub(super) fn render(style: Style, entry: &Entry<'_>) -> String {
    let mut line = String::new();
    if style.journal {
        // A String takes all it is given, here and below.
        let _ = write!(line, "<{}>", priority(entry.level));
    }
    match style.json {
        true => line.push_str(&object(entry)),
        false => words(&mut line, style, entry),
    }
    line.push('\n');
    line
}

/// Of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// In this order, which people read too.
fn object(entry: &Entry<'_>) -> String {
    let cut = |text: &str| {
        let mut text = text.to_owned();
        cut_off(&mut text, LINE_MAX_BYTES / 8);
        Value::String(text)
    };
    let (time, level) = (rfc3339(entry.wall_ms), entry.level.name());
    let (target, message) = (cut(entry.module), cut(&entry.message));
    let mut line =
        format!(r#"{{"time":"{time}","level":"{level}","target":{target},"message":{message},"fields":{{"#);
    for (at, (name, value)) in entry.fields.iter().enumerate() {
        let comma = if at > 0 { "," } else { "" };
        let value = value.as_str().map_or_else(|| value.clone(), cut);
        let _ = write!(line, r#"{comma}"{name}":{value}"#);
    }
    line.push_str("}}");
    line
}

fn words(line: &mut String, style: Style, entry: &Entry<'_>) {
    let begin = line.len();
    if !style.journal {
        let (dim, colour, plain) = match (style.colours, entry.level) {
            (false, _) => ("", "", ""),
            (true, Level::Error) => ("\x1b[2m", "\x1b[31;1m", "\x1b[0m"),
            (true, Level::Warn) => ("\x1b[2m", "\x1b[33m", "\x1b[0m"),
            (true, Level::Info) => ("\x1b[2m", "\x1b[32m", "\x1b[0m"),
            (true, _) => ("\x1b[2m", "\x1b[34m", "\x1b[0m"),
        };
        let level = entry.level.name().to_uppercase();
        let _ = write!(line, "{dim}{}{plain} {colour}{level:<5}{plain} ", rfc3339(entry.wall_ms));
    }
    let mut said = String::new();
    let is_ours = entry.module.starts_with("fieldpost");
    if !is_ours || entry.level >= Level::Debug {
        let _ = write!(said, "{}: ", entry.module);
    }
    let place: Vec<String> = PLACE.iter().filter_map(|name| find(entry, name)).collect();
    if !place.is_empty() {
        let _ = write!(said, "{}: ", place.join("/"));
    }
    said.push_str(&entry.message);
    for reason in REASON.iter().filter_map(|name| find(entry, name)) {
        let _ = write!(said, ": {reason}");
    }
    let is_told = |name: &str| PLACE.contains(&name) || REASON.contains(&name);
    let rest: Vec<String> = entry
        .fields
        .iter()
        .filter(|(name, _)| !is_told(name))
        .map(|(name, value)| format!("{name}={}", text(value)))
        .collect();
    if !rest.is_empty() {
        let _ = write!(said, " ({})", rest.join(", "));
    }
    line.extend(said.chars().map(harmless));
    cut_off(line, begin + LINE_MAX_BYTES);
}

fn find(entry: &Entry<'_>, name: &str) -> Option<String> {
    entry.fields.iter().find(|(field, _)| *field == name).map(|(_, value)| text(value))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Nothing in a line begins another one, or moves the cursor.
fn harmless(c: char) -> char {
    match c {
        '\n' => ' ',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

fn cut_off(text: &mut String, max: usize) {
    const MARK: &str = "…";
    if text.len() > max {
        let end = (0..=max - MARK.len()).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
        text.push_str(MARK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMINAL: Style = Style { json: false, journal: false, colours: false };
    const JOURNAL: Style = Style { journal: true, ..TERMINAL };
    const JSON: Style = Style { json: true, ..TERMINAL };

    fn entry(level: Level, message: &str, fields: &[(&'static str, Value)]) -> Entry<'static> {
        Entry {
            wall_ms: 1_795_255_200_123,
            level,
            module: "fieldpost::source::modbus::line",
            message: message.to_owned(),
            fields: fields.to_vec(),
        }
    }

    #[test]
    fn golden_lines_of_each_format() {
        let entry = entry(
            Level::Warn,
            "does not answer",
            &[
                ("line", "line1".into()),
                ("reason", "no answer within 1000 ms".into()),
                ("unit", "meter1".into()),
                ("polls", 3.into()),
            ],
        );
        let words = "line1/meter1: does not answer: no answer within 1000 ms (polls=3)\n";
        assert_eq!(render(TERMINAL, &entry), format!("2026-11-21T10:00:00.123Z WARN  {words}"));
        assert_eq!(render(JOURNAL, &entry), format!("<4>{words}"));
        let coloured = format!("\x1b[2m2026-11-21T10:00:00.123Z\x1b[0m \x1b[33mWARN \x1b[0m {words}");
        assert_eq!(render(Style { colours: true, ..TERMINAL }, &entry), coloured);
        let object = concat!(
            r#"{"time":"2026-11-21T10:00:00.123Z","level":"warn","target":"fieldpost::source::modbus::line","#,
            r#""message":"does not answer","#,
            r#""fields":{"line":"line1","reason":"no answer within 1000 ms","unit":"meter1","polls":3}}"#,
            "\n"
        );
        assert_eq!(render(JSON, &entry), object);
        assert_eq!(render(Style { json: true, ..JOURNAL }, &entry), format!("<4>{object}"));
    }

    #[test]
    fn each_level_has_its_priority_and_only_developers_see_modules() {
        for (level, expected) in [
            (Level::Error, "<3>x\n"),
            (Level::Warn, "<4>x\n"),
            (Level::Info, "<6>x\n"),
            (Level::Debug, "<7>fieldpost::source::modbus::line: x\n"),
            (Level::Trace, "<7>fieldpost::source::modbus::line: x\n"),
        ] {
            assert_eq!(render(JOURNAL, &entry(level, "x", &[])), expected);
        }
        let foreign = Entry { module: "rustls::check", ..entry(Level::Warn, "x", &[]) };
        assert_eq!(render(JOURNAL, &foreign), "<4>rustls::check: x\n");
    }

    #[test]
    fn what_others_say_begins_no_line_of_its_own_and_is_cut_off() {
        let nasty = "quota\u{1b}[2J\r\n<0>forged é".repeat(300);
        let entry = entry(Level::Error, &nasty, &[("reason", nasty.clone().into())]);
        for style in [TERMINAL, JOURNAL, JSON, Style { json: true, ..JOURNAL }] {
            let line = render(style, &entry);
            assert!(line.ends_with('\n') && line.len() <= LINE_MAX_BYTES + 100, "{}", line.len());
            assert!(!line.trim_end_matches('\n').chars().any(char::is_control), "{line:?}");
            assert!(line.contains('…'), "{line}");
            if style.json {
                let object = line.trim_start_matches("<3>");
                let object: Value = serde_json::from_str(object).expect("one JSON object");
                assert!(object["fields"]["reason"].is_string(), "{object}");
            }
        }
    }
}
