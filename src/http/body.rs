//! The body of `POST /publish`: one message, or several that are accepted together. Pure.
//!
//! ```text
//! {"topic":"a/b","qos":2,"json":{"rpm":1450}}
//! [{"topic":"a/b","text":"21.5"},{"topic":"a/c","hex":"00ff","lane":"alarm"}]
//! one object a line (application/x-ndjson)
//! ```
//!
//! Members and checks are the control socket's (`control::wire`). Invariant: either every message is good, or none is
//! handed on and the first wrong one is named.

use serde_json::value::RawValue;

use super::route::Form;
use crate::clock::Stamp;
use crate::control::wire::{self, Publish};
use crate::message::{Message, Qos};

/// Messages of one request, at most.
pub(super) const MESSAGES_MAX: usize = 1000;

/// Why the body is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    /// In words: which message, which member.
    Bad(String),
    /// More messages than one request may hold.
    TooMany(usize),
}

/// The messages of a body, at least one; `now` becomes their acquisition time.
///
/// # Errors
/// See [`Wrong`].
pub(super) fn messages(form: Form, body: &[u8], now: Stamp) -> Result<Vec<Message>, Wrong> {
    let text = str::from_utf8(body).map_err(|_| Wrong::Bad("the body is not UTF-8".to_owned()))?;
    let items = match form {
        Form::Json if text.trim_ascii_start().starts_with('[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).map_err(not_json)?;
            items.into_iter().map(RawValue::get).enumerate().collect()
        }
        Form::Json => return Ok(vec![message(text, now).map_err(Wrong::Bad)?]),
        Form::Lines => {
            let lines = text.lines().enumerate().map(|(at, line)| (line, at + 1));
            let lines = lines.filter(|(line, _)| !line.trim_ascii().is_empty());
            lines.map(|(line, number)| (number, line)).collect::<Vec<_>>()
        }
    };
    match items.len() {
        0 => return Err(Wrong::Bad("there is no message in it".to_owned())),
        1..=MESSAGES_MAX => {}
        count => return Err(Wrong::TooMany(count)),
    }
    let named = |number| match form {
        Form::Json => format!("message {number} (from 0)"),
        Form::Lines => format!("line {number}"),
    };
    let one = |(number, text): (usize, &str)| {
        let message = message(text, now).map_err(|why| Wrong::Bad(format!("{}: {why}", named(number))))?;
        match message.qos {
            Qos::AtMostOnce => Err(Wrong::Bad(format!(
                "{}: QoS 0 messages are not stored, so they cannot be accepted together with others; send each alone",
                named(number)
            ))),
            _ => Ok(message),
        }
    };
    items.into_iter().map(one).collect()
}

fn message(text: &str, now: Stamp) -> Result<Message, String> {
    let publish: Publish = serde_json::from_str(text).map_err(|error| format!("not a message: {error}"))?;
    wire::message(publish, now)
}

fn not_json(error: serde_json::Error) -> Wrong {
    Wrong::Bad(format!("not an array of messages: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Lane, Payload};

    const NOW: Stamp = Stamp { wall_ms: 1, mono_ms: 2, synchronised: true };

    fn topics(form: Form, body: &str) -> Result<Vec<String>, Wrong> {
        let messages = messages(form, body.as_bytes(), NOW)?;
        Ok(messages.iter().map(|message| message.topic.to_string()).collect())
    }

    #[test]
    fn one_message_or_several_are_taken_in_their_order() {
        let one = messages(Form::Json, br#" {"topic":"a","qos":2,"lane":"bulk","json":{"b": 1.50}}"#, NOW);
        let one = one.expect("a message").remove(0);
        assert_eq!((one.qos, one.lane, one.at), (Qos::ExactlyOnce, Lane::Bulk, NOW));
        assert_eq!(one.payload, Payload::Whole(r#"{"b": 1.50}"#.into()));
        let array = " \n[{\"topic\":\"a\",\"text\":\"\"} ,{\"topic\":\"b\",\"hex\":\"ff\"}]";
        assert_eq!(topics(Form::Json, array), Ok(vec!["a".into(), "b".into()]));
        let lines = "{\"topic\":\"a\",\"text\":\"\"}\r\n\n  {\"topic\":\"b\",\"text\":\"\"}";
        assert_eq!(topics(Form::Lines, lines), Ok(vec!["a".into(), "b".into()]));
        assert_eq!(topics(Form::Json, r#"{"topic":"a","qos":0,"text":""}"#), Ok(vec!["a".into()]));
    }

    #[test]
    fn the_first_wrong_message_is_named_with_its_member() {
        let good = r#"{"topic":"a","text":""}"#;
        for (form, body, part) in [
            (Form::Json, "".to_owned(), "not a message: EOF"),
            (Form::Json, "[]".to_owned(), "no message in it"),
            (Form::Lines, "\n \n".to_owned(), "no message in it"),
            (Form::Json, "[".to_owned(), "not an array of messages: EOF"),
            (Form::Json, format!("[{good},{good}"), "not an array of messages: EOF"),
            (
                Form::Json,
                format!("[{good},{{\"topic\":\"b\",\"text\":\"\",\"qso\":1}}]"),
                "message 1 (from 0): not a message: unknown field `qso`",
            ),
            (
                Form::Json,
                format!("[{good},{{\"topic\":\"b/#\",\"text\":\"\"}}]"),
                "message 1 (from 0): a topic must not hold '#'",
            ),
            (Form::Json, r#"{"topic":"b","qos":3,"text":""}"#.to_owned(), "qos is 0, 1 or 2, not 3"),
            (
                Form::Json,
                r#"{"topic":"b","qos":"1","text":""}"#.to_owned(),
                "invalid type: string \"1\", expected u8",
            ),
            (Form::Json, r#"{"text":""}"#.to_owned(), "missing field `topic`"),
            (Form::Json, r#"{"topic":"b"}"#.to_owned(), "exactly one of text, json and hex"),
            (Form::Json, "3".to_owned(), "not a message"),
            (Form::Lines, format!("{good}\n\n{{}}"), "line 3: not a message: missing field `topic`"),
            (Form::Lines, format!("{good}\n{{\"topic\":\"b\",\"qos\":0,\"text\":\"\"}}"), "line 2: QoS 0"),
        ] {
            match topics(form, &body) {
                Err(Wrong::Bad(reason)) => assert!(reason.contains(part), "{body}: {reason}"),
                other => panic!("{body}: {other:?}"),
            }
        }
        assert!(matches!(messages(Form::Json, b"\xff", NOW), Err(Wrong::Bad(_))));
        let many = vec![good; MESSAGES_MAX + 1].join("\n");
        assert_eq!(topics(Form::Lines, &many), Err(Wrong::TooMany(MESSAGES_MAX + 1)));
        // Deep nesting is refused, not recursed into.
        let deep = "[".repeat(1 << 20);
        assert!(topics(Form::Json, &deep).is_err());
    }
}
