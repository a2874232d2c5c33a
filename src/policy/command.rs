//! What a command asks for, and whether it may: payload and surroundings to a verdict. Pure.
//!
//! The payload is one JSON object, `{"id":"c-17","point":"line1/pump/setpoint","value":21.5,"ttl":"30s"}`, and
//! comes from whoever may publish: it is bounded in size and depth, and nothing in it is guessed.
//!
//! Invariants (P8): a point or value that the configuration does not allow is refused; a command whose age is not
//! known is expired; what cannot be read completely is not carried out in part.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value as Json;

use super::format;
use crate::clock::Stamp;
use crate::message::{CORRELATION_MAX_BYTES, Topic};
use crate::point::{PointIndex, Value};

/// Bytes of a command's payload, at most; one that means anything has about 100.
pub const PAYLOAD_MAX_BYTES: usize = 4096;
/// Characters of an id, at most: a UUID has 36.
pub const ID_CHARACTERS_MAX: usize = 64;
/// Characters of what a sender wrote that a reason repeats.
const SHOWN_MAX: usize = 80;

const MEMBERS: [&str; 5] = ["id", "point", "value", "ttl", "not_after"];

/// What may be written to a point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allowed {
    /// `true` and `false`.
    Bool,
    /// A number from `min` to `max`, in the point's own unit.
    Number {
        /// The least.
        min: f64,
        /// The greatest.
        max: f64,
    },
}

/// A point that the configuration marks writable.
#[derive(Debug, Clone, PartialEq)]
pub struct WritablePoint {
    /// `line/unit/point`.
    pub name: String,
    /// Its place in the table of points.
    pub index: PointIndex,
    /// The number of the line it is on.
    pub line: usize,
    /// What may be written.
    pub allowed: Allowed,
}

/// What commands are judged by.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The points that may be written.
    pub points: Vec<WritablePoint>,
    /// How long a command that does not say is worth carrying out, from its reception.
    pub ttl: Duration,
    /// The longest a command may ask for.
    pub max_ttl: Duration,
    /// Where answers go.
    pub answer_topic: Topic,
    /// Below which topics an answer may go where its command says (MQTT 5 Response Topic); each ends in `/`.
    pub response_topics: Vec<String>,
}

/// Judges commands.
#[derive(Debug)]
pub struct Judge {
    points: HashMap<String, WritablePoint>,
    settings: Settings,
}

/// A command and what is known of how it came.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The application message.
    pub payload: &'a [u8],
    /// Whether it was a retained message.
    pub retain: bool,
    /// How long ago it was received, in milliseconds; `None`: not known.
    pub age_ms: Option<u64>,
    /// When that was.
    pub now: Stamp,
}

/// What a command is and what follows.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// Its id, where one could be read.
    pub id: Option<String>,
    /// The point it names, where one could be read.
    pub point: Option<String>,
    /// What is to be done, or why not.
    pub outcome: Result<Order, Denial>,
}

/// A write that may be carried out.
#[derive(Debug, Clone, PartialEq)]
pub struct Order {
    /// Which line.
    pub line: usize,
    /// Which point.
    pub point: PointIndex,
    /// What to write.
    pub value: Value,
    /// Not begun after this moment of the monotonic clock, in milliseconds.
    pub not_after_mono_ms: u64,
}

/// Why a command is not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    /// It may not, or cannot be understood.
    Refused(String),
    /// Its time is over.
    Expired(String),
}

/// Where an answer goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTo {
    /// The topic.
    pub topic: Topic,
    /// Why it is not the one that was asked for, if so.
    pub note: Option<String>,
}

impl Judge {
    /// A judge for these points.
    pub fn new(settings: Settings) -> Self {
        let points = settings.points.iter().map(|point| (point.name.clone(), point.clone())).collect();
        Judge { points, settings }
    }

    /// Reads and judges a command.
    pub fn judge(&self, asked: &Asked<'_>) -> Verdict {
        let mut verdict = Verdict { id: None, point: None, outcome: Err(Denial::Refused(String::new())) };
        let outcome = read(asked.payload).and_then(|members| {
            verdict.id = members.text("id").filter(|id| is_id(id)).map(str::to_owned);
            verdict.point =
                members.text("point").filter(|name| self.points.contains_key(*name)).map(str::to_owned);
            self.order(&members, asked)
        });
        Verdict { outcome, ..verdict }
    }

    fn order(&self, members: &Members, asked: &Asked<'_>) -> Result<Order, Denial> {
        if asked.retain {
            return refused("retained: a command is published without the retain flag");
        }
        if let Some((name, _)) = members.0.iter().find(|(name, _)| !MEMBERS.contains(&name.as_str())) {
            return refused(format!("unknown member {}; there are {}", shown(name), MEMBERS.join(", ")));
        }
        match members.text("id") {
            Some(id) if is_id(id) => {}
            _ => {
                return refused(format!(
                    "id: 1 to {ID_CHARACTERS_MAX} printable ASCII characters, in quotes"
                ));
            }
        }
        let Some(name) = members.text("point") else { return refused("point: line/unit/point, in quotes") };
        let Some(point) = self.points.get(name) else {
            return refused(format!("{} is not a point that may be written", shown(name)));
        };
        let value = value(members.get("value"), point.allowed)?;
        let not_after_mono_ms = self.not_after(members, asked)?;
        Ok(Order { line: point.line, point: point.index, value, not_after_mono_ms })
    }

    /// Line and point for a value that was allowed by other rules.
    ///
    /// # Errors
    /// Why it is not any more, in words.
    pub fn seat(&self, point: &str, value: &Value) -> Result<(usize, PointIndex), String> {
        let Some(found) = self.points.get(point) else {
            return Err(format!("{} is not a point that may be written", shown(point)));
        };
        match (found.allowed, value) {
            (Allowed::Bool, Value::Bool(_)) => Ok((found.line, found.index)),
            (Allowed::Bool, _) => Err("value: this point takes true or false".to_owned()),
            (Allowed::Number { .. }, Value::Bool(_)) => Err("value: this point takes a number".to_owned()),
            (Allowed::Number { min, max }, value) if (min..=max).contains(&value.as_f64()) => {
                Ok((found.line, found.index))
            }
            (Allowed::Number { min, max }, value) => {
                Err(format!("value: {value} is out of range, {min} to {max}"))
            }
        }
    }

    /// The end of its time, by the monotonic clock.
    fn not_after(&self, members: &Members, asked: &Asked<'_>) -> Result<u64, Denial> {
        let ttl_ms = match members.get("ttl") {
            None => millis(self.settings.ttl),
            Some(Json::String(text)) => match duration_ms(text) {
                Some(ms) if ms <= millis(self.settings.max_ttl) => ms,
                Some(_) => {
                    return refused(format!("ttl: at most {} s", self.settings.max_ttl.as_secs()));
                }
                None => return refused("ttl: a duration such as \"30s\", \"500ms\" or \"5min\""),
            },
            Some(_) => return refused("ttl: a duration in quotes, such as \"30s\""),
        };
        let Some(age_ms) = asked.age_ms else {
            return expired("it came before the machine started again, and the clock does not tell when");
        };
        let mut left_ms = ttl_ms.saturating_sub(age_ms);
        if let Some(not_after) = members.get("not_after") {
            let Some(at_ms) = not_after.as_str().and_then(format::read_rfc3339) else {
                return refused("not_after: a time such as \"2026-11-21T10:00:00Z\"");
            };
            if !asked.now.wall_is_right() {
                return expired(
                    "it says until when it is meant, and the gateway's clock is not set or not kept right",
                );
            }
            left_ms = left_ms.min(u64::try_from(at_ms.saturating_sub(asked.now.wall_ms)).unwrap_or(0));
        }
        match left_ms {
            0 => expired(format!("its time was over {age_ms} ms after it was received")),
            left_ms => Ok(asked.now.mono_ms.saturating_add(left_ms)),
        }
    }

    /// Where the answer goes: to the Response Topic, if that is allowed.
    pub fn reply_to(&self, response_topic: Option<&str>) -> ReplyTo {
        let default = |note| ReplyTo { topic: self.settings.answer_topic.clone(), note };
        let Some(asked) = response_topic else { return default(None) };
        let allowed = self.settings.response_topics.iter().any(|prefix| asked.starts_with(prefix.as_str()));
        match Topic::new(asked) {
            Ok(topic) if allowed => ReplyTo { topic, note: None },
            _ => default(Some(format!(
                "the response topic {} is not below one of [commands] response_topics",
                shown(asked)
            ))),
        }
    }
}

/// Correlation Data that can be given back; larger data is left out of the answer.
pub fn correlates(data: Option<&bytes::Bytes>) -> bool {
    data.is_none_or(|data| data.len() <= CORRELATION_MAX_BYTES)
}

fn refused<T>(reason: impl Into<String>) -> Result<T, Denial> {
    Err(Denial::Refused(reason.into()))
}

fn expired<T>(reason: impl Into<String>) -> Result<T, Denial> {
    Err(Denial::Expired(reason.into()))
}

fn is_id(id: &str) -> bool {
    (1..=ID_CHARACTERS_MAX).contains(&id.len()) && id.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

fn value(json: Option<&Json>, allowed: Allowed) -> Result<Value, Denial> {
    let Some(json) = json else { return refused("value is missing") };
    match (allowed, json) {
        (Allowed::Bool, Json::Bool(bit)) => Ok(Value::Bool(*bit)),
        (Allowed::Bool, _) => refused("value: this point takes true or false"),
        (Allowed::Number { min, max }, Json::Number(number)) => {
            let value = match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => Value::Integer(integer),
                (None, Some(float)) if float.is_finite() => Value::Float(float),
                _ => return refused("value: this number is too large"),
            };
            match value.as_f64() {
                number if (min..=max).contains(&number) => Ok(value),
                _ => refused(format!("value: {value} is out of range, {min} to {max}")),
            }
        }
        (Allowed::Number { .. }, _) => refused("value: this point takes a number"),
    }
}

/// A whole number and its unit, in milliseconds.
fn duration_ms(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let factor = match text[digits..].trim() {
        "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(factor)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What a sender wrote, in quotes, escaped and not too long.
fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{:?}...", &text[..end]),
        None => format!("{text:?}"),
    }
}

fn read(payload: &[u8]) -> Result<Members, Denial> {
    if payload.len() > PAYLOAD_MAX_BYTES {
        return refused(format!(
            "{} bytes are too many: a command has {PAYLOAD_MAX_BYTES} at most",
            payload.len()
        ));
    }
    serde_json::from_slice(payload)
        .or_else(|error| refused(format!("not a JSON object of a command: {error}")))
}

/// The members of a JSON object, each once. (`serde_json` would take the last of two, another reader the first.)
#[derive(Debug)]
struct Members(Vec<(String, Json)>);

impl Members {
    fn get(&self, name: &str) -> Option<&Json> {
        self.0.iter().find(|(member, _)| member == name).map(|(_, json)| json)
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Json::as_str)
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Members(Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if members.get(&name).is_some() {
                        return Err(de::Error::custom(format!(
                            "the member {} stands there twice",
                            shown(&name)
                        )));
                    }
                    members.0.push((name, map.next_value()?));
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-21T10:00:00.123Z
    const NOW: Stamp = Stamp { wall_ms: 1_795_255_200_123, mono_ms: 50_000, synchronised: true };

    fn judge() -> Judge {
        let point = |name: &str, index, allowed| WritablePoint {
            name: name.into(),
            index: PointIndex(index),
            line: 1,
            allowed,
        };
        Judge::new(Settings {
            points: vec![
                point("line1/pump/setpoint", 7, Allowed::Number { min: -10.0, max: 80.5 }),
                point("line1/pump/on", 8, Allowed::Bool),
            ],
            ttl: Duration::from_secs(30),
            max_ttl: Duration::from_secs(600),
            answer_topic: Topic::new("base/answer").expect("a topic"),
            response_topics: vec!["plant/answers/".into()],
        })
    }

    fn asked(payload: &str) -> Asked<'_> {
        Asked { payload: payload.as_bytes(), retain: false, age_ms: Some(1000), now: NOW }
    }

    fn denial(asked: &Asked<'_>) -> String {
        match judge().judge(asked).outcome {
            Err(Denial::Refused(reason)) => format!("refused: {reason}"),
            Err(Denial::Expired(reason)) => format!("expired: {reason}"),
            Ok(order) => panic!("{order:?}"),
        }
    }

    #[test]
    fn what_the_configuration_allows_is_ordered_with_the_end_of_its_time() {
        for (payload, point, value, left_ms) in [
            (r#"{"id":"a","point":"line1/pump/setpoint","value":21.5}"#, 7, Value::Float(21.5), 29_000),
            (r#"{"id":"a","point":"line1/pump/setpoint","value":-10}"#, 7, Value::Integer(-10), 29_000),
            (
                r#"{"ttl":"5 min","value":true,"point":"line1/pump/on","id":"b c"}"#,
                8,
                Value::Bool(true),
                299_000,
            ),
            (
                r#"{"id":"a","point":"line1/pump/on","value":false,"not_after":"2026-11-21T10:00:02Z"}"#,
                8,
                Value::Bool(false),
                1_877,
            ),
        ] {
            let order =
                Order { line: 1, point: PointIndex(point), value, not_after_mono_ms: NOW.mono_ms + left_ms };
            assert_eq!(judge().judge(&asked(payload)).outcome, Ok(order), "{payload}");
        }
    }

    #[test]
    fn everything_else_is_refused_with_what_is_wrong() {
        for (payload, reason) in [
            ("", "not a JSON object of a command: EOF while parsing a value at line 1 column 0"),
            (
                "[1]",
                "not a JSON object of a command: invalid type: sequence, expected an object at line 1 column 0",
            ),
            (r#"{"id":"a","id":"b"}"#, "the member \"id\" stands there twice"),
            (
                r#"{"id":"a","point":"line1/pump/on","value":true,"force":1}"#,
                "unknown member \"force\"; there are id",
            ),
            (r#"{"point":"line1/pump/on","value":true}"#, "id: 1 to 64 printable"),
            (r#"{"id":"","point":"line1/pump/on","value":true}"#, "id: 1 to 64 printable"),
            (r#"{"id":"a\nb","point":"line1/pump/on","value":true}"#, "id: 1 to 64 printable"),
            (r#"{"id":"ä","point":"line1/pump/on","value":true}"#, "id: 1 to 64 printable"),
            (r#"{"id":7,"point":"line1/pump/on","value":true}"#, "id: 1 to 64 printable"),
            (r#"{"id":"a","value":true}"#, "point: line/unit/point"),
            (
                r#"{"id":"a","point":"line1/pump/speed","value":1}"#,
                "\"line1/pump/speed\" is not a point that may",
            ),
            (r#"{"id":"a","point":"line1/pump/on"}"#, "value is missing"),
            (r#"{"id":"a","point":"line1/pump/on","value":1}"#, "value: this point takes true or false"),
            (r#"{"id":"a","point":"line1/pump/setpoint","value":"1"}"#, "value: this point takes a number"),
            (r#"{"id":"a","point":"line1/pump/setpoint","value":null}"#, "value: this point takes a number"),
            (
                r#"{"id":"a","point":"line1/pump/setpoint","value":80.6}"#,
                "value: 80.6 is out of range, -10 to 80.5",
            ),
            (r#"{"id":"a","point":"line1/pump/setpoint","value":1e308}"#, "value: 1"),
            (r#"{"id":"a","point":"line1/pump/setpoint","value":99999999999999999999}"#, "value: 1"),
            (r#"{"id":"a","point":"line1/pump/on","value":true,"ttl":"11min"}"#, "ttl: at most 600 s"),
            (r#"{"id":"a","point":"line1/pump/on","value":true,"ttl":"5m"}"#, "ttl: a duration such as"),
            (r#"{"id":"a","point":"line1/pump/on","value":true,"ttl":30}"#, "ttl: a duration in quotes"),
            (r#"{"id":"a","point":"line1/pump/on","value":true,"not_after":1}"#, "not_after: a time such as"),
        ] {
            let found = denial(&asked(payload));
            assert!(found.starts_with("refused: ") && found.contains(reason), "{payload}: {found}");
        }
        let long = format!("{{\"id\":\"{}\"}}", "x".repeat(PAYLOAD_MAX_BYTES));
        assert!(denial(&asked(&long)).contains("bytes are too many"));
    }

    #[test]
    fn a_refused_command_keeps_its_id_where_one_can_be_read() {
        let verdict = judge().judge(&asked(r#"{"id":"a","point":"x","value":1,"more":{"deep":[]}}"#));
        assert_eq!((verdict.id.as_deref(), verdict.point), (Some("a"), None));
        assert_eq!(judge().judge(&asked(r#"{"id":"a""#)).id, None);
    }

    #[test]
    fn retained_expired_and_undatable_commands_are_not_carried_out() {
        let good = r#"{"id":"a","point":"line1/pump/on","value":true,"ttl":"1s"}"#;
        let dated = r#"{"id":"a","point":"line1/pump/on","value":true,"not_after":"2026-11-21T10:00:00Z"}"#;
        let unset = Stamp { wall_ms: 61_000, mono_ms: 4_000, synchronised: true };
        for (asked, start) in [
            (Asked { retain: true, age_ms: Some(0), ..asked(good) }, "refused: retained"),
            (Asked { age_ms: Some(1000), ..asked(good) }, "expired: its time was over"),
            (Asked { age_ms: None, ..asked(good) }, "expired: it came before the machine started again"),
            (asked(dated), "expired: its time was over"),
            (Asked { now: unset, ..asked(dated) }, "expired: it says until when it is meant"),
        ] {
            assert!(denial(&asked).starts_with(start), "{asked:?}");
        }
        assert!(judge().judge(&Asked { age_ms: Some(999), ..asked(good) }).outcome.is_ok());
    }

    #[test]
    fn an_answer_goes_where_it_is_asked_for_only_below_what_is_allowed() {
        let to = |asked| judge().reply_to(asked);
        assert_eq!(to(None), ReplyTo { topic: Topic::new("base/answer").expect("a topic"), note: None });
        assert_eq!(to(Some("plant/answers/7")).topic.as_str(), "plant/answers/7");
        for asked in ["plant/answers", "plant/answersX", "other", "plant/answers/+", "$SYS/x", ""] {
            let reply = to(Some(asked));
            assert_eq!(reply.topic.as_str(), "base/answer", "{asked}");
            assert!(reply.note.is_some_and(|note| note.contains("response_topics")), "{asked}");
        }
    }

    proptest! {
        #[test]
        fn no_payload_panics_and_only_what_is_allowed_is_ordered(
            payload in proptest::collection::vec(any::<u8>(), 0..300), value in any::<f64>(), age_ms in any::<Option<u64>>()
        ) {
            let asked = Asked { payload: &payload, retain: false, age_ms, now: NOW };
            prop_assert!(judge().judge(&asked).outcome.is_err());
            let payload = format!(r#"{{"id":"a","point":"line1/pump/setpoint","value":{value}}}"#);
            let asked = Asked { payload: payload.as_bytes(), ..asked };
            if let Ok(order) = judge().judge(&asked).outcome {
                prop_assert!((-10.0..=80.5).contains(&order.value.as_f64()) && age_ms.is_some_and(|ms| ms < 30_000));
            }
        }

        #[test]
        fn deep_nesting_is_refused(depth in 1usize..4000) {
            let payload = "[".repeat(depth);
            let deep = format!("{{\"id\":{payload}");
            prop_assert!(judge().judge(&asked(&deep)).outcome.is_err());
        }
    }
}
