//! What is said on the control socket: one JSON object a line, each answered by one, in order.
//!
//! ```text
//! {"status":{}}                                              {"status":{...}}
//! {"publish":{"topic":"a/b","qos":1,"text":"21.5"}}          {"accepted":{}}, once it is durable
//! {"publish":{"topic":"a/b","json":{"rpm":1450}}}            the same; the message is {"rpm":1450}
//! {"retained_clear":{"topic":"a/b"}}                         {"accepted":{}}
//! {"queue":{"messages":{"lane":"normal","from":0,"limit":100}}}   {"messages":{"messages":[...],"next":101}}
//! {"queue":{"dead_letters":{"after":0,"limit":100}}}         {"dead_letters":{"letters":[...]}}
//! {"queue":{"requeue":{"number":3}}}                         {"changed":{"count":1}}
//! {"queue":{"purge_lane":{"lane":"bulk"}}}                   {"changed":{"count":5000,"below":9001}}: ask again
//! {"queue":{"purge_dead":{}}}                                {"changed":{"count":2}}
//! {"reload":{}}                                              {"reloaded":{"changes":["line2 added"],"warnings":[]}}
//!                                                            {"not_reloaded":{"reason":"...","problems":[...]}}
//! anything that cannot be done                               {"refused":{"reason":"..."}}
//! ```
//!
//! These types are the socket's own contract and nobody else's; members may be added.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::clock::Stamp;
use crate::message::{Lane, Message, Payload, Qos, Topic};

use super::Ask;

/// Longest line, in bytes, without its line break.
pub const LINE_MAX_BYTES: usize = 1 << 20;

/// What a program may ask of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// How things are.
    Status {},
    /// Take this message.
    Publish(Publish),
    /// Publish a zero-length retained message, which removes the topic's retained one (MQTT-3.3.1-6).
    RetainedClear {
        /// The topic.
        topic: String,
    },
    /// Look at the queue, or change it.
    Queue(QueueAsk),
    /// Read the configuration again and go on with it.
    Reload {},
}

/// What may be asked of the queue, a page or a portion at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum QueueAsk {
    /// What waits in a lane, answered by [`Answer::Messages`].
    Messages {
        /// The lane.
        lane: String,
        /// The lowest number wanted.
        from: u64,
        /// How many at most; a page holds 500.
        limit: u32,
        /// Whether payloads are wanted; then a page ends after about 128 KiB of them.
        #[serde(default)]
        payloads: bool,
    },
    /// Dead letters above a number, answered by [`Answer::DeadLetters`].
    DeadLetters {
        /// The last number already known.
        after: u64,
        /// How many at most; a page holds 500.
        limit: u32,
    },
    /// Put a dead letter into the queue again, as a message with a new number, answered by [`Answer::Changed`]: 0
    /// when there is none.
    Requeue {
        /// Its number among the dead letters.
        number: u64,
    },
    /// Drop up to 5000 messages of a lane that are not in flight, answered by [`Answer::Changed`].
    PurgeLane {
        /// The lane.
        lane: String,
        /// Those with a lower number only: what the answer before this one said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        below: Option<u64>,
    },
    /// Throw every dead letter away.
    PurgeDead {},
}

/// A message to take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// Where.
    pub topic: String,
    /// 0, 1 (the default) or 2.
    #[serde(default = "one")]
    pub qos: u8,
    /// Whether the broker is asked to keep it.
    #[serde(default)]
    pub retain: bool,
    /// `alarm`, `normal` (when missing) or `bulk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<String>,
    /// The application message as text; exactly one of `text`, `json` and `hex`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The application message as JSON: what is published are the bytes that stand here. `null` is no message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<Json>,
    /// The application message as hexadecimal digits, for bytes that are not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hex: Option<String>,
}

/// A JSON value as it was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Json(Box<RawValue>);

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

impl Eq for Json {}

fn one() -> u8 {
    1
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How things are.
    Status(Box<Status>),
    /// The message is durable (P1).
    Accepted {},
    /// The QoS 0 message went to the uplink; it was never stored and may be lost.
    HandedOver {},
    /// A page of the queue.
    Messages {
        /// In the order of their numbers.
        messages: Vec<QueuedMessage>,
        /// Where the next page begins; missing at the end of the lane.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        next: Option<u64>,
    },
    /// A page of dead letters, the oldest first.
    DeadLetters {
        /// The dead letters.
        letters: Vec<DeadLetter>,
    },
    /// It was done and is durable.
    Changed {
        /// To how many.
        count: u64,
        /// What bounds the next request, while there may be more to do.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        below: Option<u64>,
    },
    /// The configuration was read again, and it is what the agent goes on with.
    Reloaded {
        /// What is different, a sentence each; empty: nothing.
        changes: Vec<String>,
        /// What will not be done as the configuration asks for it, a sentence each.
        warnings: Vec<String>,
    },
    /// The configuration was read again, and nothing of it was taken over.
    NotReloaded {
        /// Why, in words; of a bad file the whole report.
        reason: String,
        /// What is wrong with the file; empty: nothing, but it cannot be changed while the agent runs, or not be used.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        problems: Vec<Problem>,
        /// The settings that need a restart.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        restart: Vec<String>,
    },
    /// It was not done.
    Refused {
        /// Why, and what to do about it.
        reason: String,
    },
}

/// One thing that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// Line, from 1; missing when the file could not be read at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// Column in characters, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<u64>,
    /// What is wrong.
    pub message: String,
    /// What to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

/// A message in the queue. Of a damaged one only the first members are known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueuedMessage {
    /// Its lane.
    pub lane: String,
    /// Its number in that lane.
    pub seq: u64,
    /// The epoch of that number.
    pub epoch: u32,
    /// `waiting`, `in flight` or `held`.
    pub state: String,
    /// When it was accepted, RFC 3339.
    pub accepted: String,
    /// Whether its checksum is wrong; it will be dropped and counted when its turn comes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub damaged: bool,
    /// Where it is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// 1 or 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// The retain flag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain: Option<bool>,
    /// Bytes of the payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Acquisition time, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// Seconds after its acceptance for which it is worth sending; missing for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_after_s: Option<u32>,
    /// The payload, if it was asked for and is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The payload as hexadecimal digits, if it was asked for and is not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hex: Option<String>,
}

/// A message the broker will never take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// Its number among the dead letters.
    pub number: u64,
    /// The lane it was in.
    pub lane: String,
    /// Its number there.
    pub seq: u64,
    /// The epoch of that number.
    pub epoch: u32,
    /// MQTT reason code.
    pub reason: u8,
    /// When it was given up, RFC 3339.
    pub died: String,
    /// Where it was to be published.
    pub topic: String,
    /// 1 or 2.
    pub qos: u8,
    /// The retain flag.
    pub retain: bool,
    /// Bytes of the payload.
    pub bytes: u64,
}

/// How things are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The gateway's id.
    pub gateway: String,
    /// The agent's version.
    pub version: String,
    /// How long the agent has been running.
    pub uptime_ms: u64,
    /// The connection to the broker.
    pub link: Link,
    /// The queue, by lane, the one that is sent first, first.
    pub queue: Vec<LaneQueue>,
    /// Messages dropped, by reason, since the database was made.
    pub dropped: BTreeMap<String, u64>,
    /// Messages given up and kept as dead letters.
    pub dead_letters: u64,
    /// Commands recorded and not yet begun or answered; what became of the others is in the counters.
    pub commands_waiting: u64,
    /// The database.
    pub store: Store,
    /// The byte budget, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// Every line, in the order of the configuration, the machine itself behind them.
    pub lines: Vec<Line>,
    /// What the machine said of itself last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machine: Vec<MachineValue>,
    /// Every counter of [`crate::stats::Stats`], since the agent started.
    pub counters: BTreeMap<String, u64>,
    /// The agent's process.
    #[serde(default)]
    pub process: Process,
}

/// The connection to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// What it is doing.
    pub state: LinkState,
    /// For how long it has been doing that.
    pub state_age_ms: u64,
    /// The broker's URL, without user name and password.
    pub broker: String,
    /// `5` or `3.1.1`.
    pub protocol: String,
    /// Session Present of the last CONNACK; `None` before the first.
    pub session_present: Option<bool>,
    /// Why the last connection or attempt ended, in words.
    pub last_error: Option<String>,
    /// Another client uses our identifier, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<String>,
    /// When the next attempt is made, while waiting.
    pub retry_in_ms: Option<u64>,
    /// What the broker does not allow and is done differently, in words: a lower QoS, no retain.
    pub downgrades: Vec<String>,
    /// Messages sent and not finally acknowledged.
    pub in_flight: u64,
    /// How many of them there may be.
    #[serde(default)]
    pub window: u64,
    /// How long the broker last took to answer a message or a PINGREQ on this connection.
    #[serde(default)]
    pub round_trip_ms: Option<u64>,
    /// Keep Alive in force.
    pub keep_alive_s: u64,
}

/// The byte budget of the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Bytes used in this period.
    pub used_bytes: u64,
    /// Bytes of one period.
    pub bytes: u64,
    /// `day` or `month`.
    pub per: String,
    /// The lanes that wait because it is used up.
    pub held_back: Vec<String>,
}

/// What the connection to the broker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// CONNACK with success was received.
    Connected,
    /// TCP, TLS or CONNECT is under way.
    Connecting,
    /// The next attempt is being waited for.
    Waiting,
}

/// One lane of the queue.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LaneQueue {
    /// `alarm`, `normal` or `bulk`.
    pub lane: String,
    /// Messages waiting or in flight.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Age of the oldest; `None` when the lane is empty.
    pub oldest_age_ms: Option<u64>,
    /// How many of them are in flight.
    pub in_flight: u64,
    /// Messages accepted since the database was made.
    #[serde(default)]
    pub accepted: u64,
    /// Messages dropped since then.
    #[serde(default)]
    pub dropped: u64,
    /// Bytes it may hold: its own limit, or the quota of all lanes.
    #[serde(default)]
    pub limit_bytes: u64,
    /// Messages accepted since the agent started.
    #[serde(default)]
    pub accepted_since_start: u64,
    /// Messages whose last acknowledgement arrived since the agent started.
    #[serde(default)]
    pub delivered_since_start: u64,
    /// Messages dropped, by reason, since the database was made.
    #[serde(default)]
    pub dropped_by_reason: BTreeMap<String, u64>,
    /// Why a message would be refused as things are, in words; missing when it would be accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusing: Option<String>,
}

/// The database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Store {
    /// Its file.
    pub path: String,
    /// Bytes of messages it may hold.
    pub quota_bytes: u64,
    /// Bytes of messages it holds.
    pub used_bytes: u64,
    /// Free bytes of its disk, where the system knows.
    #[serde(default)]
    pub free_disk_bytes: Option<u64>,
    /// Its epoch.
    pub epoch: u32,
    /// Whether it accepts messages.
    pub accepting: bool,
    /// Why not, in words.
    pub error: Option<String>,
    /// Bytes of the database file.
    #[serde(default)]
    pub database_bytes: u64,
    /// Bytes of its write-ahead log.
    #[serde(default)]
    pub log_bytes: u64,
    /// How long commits took, since the agent started.
    #[serde(default)]
    pub commits: Commits,
}

/// How many commits took how long.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Commits {
    /// How many there were.
    pub number: u64,
    /// All of them together.
    pub total_us: u64,
    /// For each duration in microseconds, how many took no longer.
    pub up_to_us: Vec<(u64, u64)>,
}

/// What the kernel says about the agent's process; what it does not say is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Process {
    /// Memory it holds.
    pub resident_bytes: Option<u64>,
    /// Time its threads had a processor.
    pub cpu_ms: u64,
    /// Bytes it had written to disks.
    pub written_bytes: Option<u64>,
}

/// One thing that the machine tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineValue {
    /// `cpu_temperature`, …
    pub name: String,
    /// A number, true or false; null where it could not be read.
    pub value: Option<serde_json::Value>,
    /// Its unit of measure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Why it could not be read, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One serial line or Modbus TCP server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Whether the port or connection is open.
    pub up: bool,
    /// Why not, in words.
    pub error: Option<String>,
    /// Its units.
    pub units: Vec<Unit>,
}

/// One unit of a line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Unit {
    /// Its name.
    pub name: String,
    /// Whether its last poll succeeded.
    pub ok: bool,
    /// Why its last failed poll failed, in words.
    pub last_error: Option<String>,
    /// Polls so far.
    pub polls: u64,
    /// How many of them failed.
    pub errors: u64,
    /// The same by kind: `timeout`, `exception`, `bad_reply`, `not_a_number`, `line_down`.
    #[serde(default)]
    pub errors_by_kind: BTreeMap<String, u64>,
    /// How long ago the last good poll was; `None` when there was none.
    pub last_ok_age_ms: Option<u64>,
}

/// What a line asks for, with a message already checked; `now` becomes its acquisition time.
///
/// # Errors
/// Why it cannot be done, in words for whoever wrote the line.
pub(super) fn understand(line: &str, now: Stamp) -> Result<Ask, String> {
    let question = serde_json::from_str(line).map_err(|error| format!("not a request: {error}"))?;
    let publish = match question {
        Question::Status {} => return Ok(Ask::Status),
        Question::Queue(ask) => return Ok(Ask::Queue(ask)),
        Question::Reload {} => return Ok(Ask::Reload),
        Question::Publish(publish) => publish,
        Question::RetainedClear { topic } => {
            let text = Some(String::new());
            Publish { topic, qos: 1, retain: true, lane: None, text, json: None, hex: None }
        }
    };
    Ok(Ask::Publish(vec![message(publish, now)?]))
}

/// The checked message; `now` becomes its acquisition time.
///
/// # Errors
/// What is wrong with it, in words for whoever wrote it.
pub(crate) fn message(publish: Publish, now: Stamp) -> Result<Message, String> {
    let topic = Topic::new(&publish.topic).map_err(|error| error.to_string())?;
    let qos = Qos::from_number(publish.qos.into())
        .ok_or_else(|| format!("qos is 0, 1 or 2, not {}", publish.qos))?;
    let lane = match &publish.lane {
        None => Lane::Normal,
        Some(name) => Lane::from_name(name)
            .ok_or_else(|| format!("there is no lane {name:?}; there are alarm, normal and bulk"))?,
    };
    let payload = match (publish.text, publish.json, publish.hex) {
        (Some(text), None, None) => text.into_bytes(),
        (None, Some(json), None) => String::from(Box::<str>::from(json.0)).into_bytes(),
        (None, None, Some(hex)) => {
            from_hex(&hex).ok_or("hex is pairs of hexadecimal digits and nothing else")?
        }
        _ => return Err("exactly one of text, json and hex is the message".to_owned()),
    };
    let payload = Payload::Whole(payload.into());
    Ok(Message {
        topic,
        qos,
        retain: publish.retain,
        lane,
        at: now,
        expires_after: None,
        correlation_data: None,
        payload,
    })
}

/// The bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| match *pair {
            [high, low] => Some(digit(high)? << 4 | digit(low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Stamp = Stamp { wall_ms: 1, mono_ms: 2, synchronised: true };

    fn message(line: &str) -> Message {
        match understand(line, NOW) {
            Ok(Ask::Publish(mut messages)) => messages.remove(0),
            other => panic!("{line} should be a message, not {other:?}"),
        }
    }

    #[test]
    fn requests_become_checked_messages() {
        let plain = message(r#"{"publish":{"topic":"a/b","text":"21.5"}}"#);
        assert_eq!((plain.topic.as_str(), plain.qos, plain.retain), ("a/b", Qos::AtLeastOnce, false));
        assert_eq!((plain.lane, plain.at, plain.expires_after), (Lane::Normal, NOW, None));
        assert_eq!(plain.payload, Payload::Whole("21.5".into()));

        let full =
            message(r#"{"publish":{"topic":"t","qos":2,"retain":true,"lane":"alarm","hex":"00FFa0"}}"#);
        assert_eq!((full.qos, full.retain, full.lane), (Qos::ExactlyOnce, true, Lane::Alarm));
        assert_eq!(full.payload, Payload::Whole(vec![0, 255, 160].into()));

        let json = message(r#"{"publish":{"topic":"t","json": {"b": 1.50, "a":[ ]} }}"#);
        assert_eq!(json.payload, Payload::Whole(r#"{"b": 1.50, "a":[ ]}"#.into()), "as it was written");

        let clear = message(r#"{"retained_clear":{"topic":"a/b"}}"#);
        assert_eq!((clear.retain, clear.qos), (true, Qos::AtLeastOnce));
        assert_eq!(clear.payload, Payload::Whole("".into()));

        assert!(matches!(understand(r#"{"status":{}}"#, NOW), Ok(Ask::Status)));
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_reason() {
        for (line, part) in [
            ("", "not a request: EOF"),
            ("hello", "not a request: expected value"),
            (r#"{"launch":{}}"#, "unknown variant `launch`"),
            (r#"{"status":{"x":1}}"#, "unknown field `x`"),
            (r#"{"publish":{"topic":"t","text":"","topc":"u"}}"#, "unknown field `topc`"),
            (r#"{"publish":{"text":""}}"#, "missing field `topic`"),
            (r#"{"publish":{"topic":"a/+","text":""}}"#, "must not hold '+'"),
            (r#"{"publish":{"topic":"t","qos":3,"text":""}}"#, "qos is 0, 1 or 2, not 3"),
            (r#"{"publish":{"topic":"t","lane":"fast","text":""}}"#, "there is no lane \"fast\""),
            (r#"{"publish":{"topic":"t"}}"#, "exactly one of text, json and hex"),
            (r#"{"publish":{"topic":"t","text":"a","hex":"00"}}"#, "exactly one of text, json and hex"),
            (r#"{"publish":{"topic":"t","json":null}}"#, "exactly one of text, json and hex"),
            (r#"{"publish":{"topic":"t","json":{]}}"#, "not a request"),
            (r#"{"publish":{"topic":"t","hex":"0"}}"#, "pairs of hexadecimal digits"),
            (r#"{"publish":{"topic":"t","hex":"0g"}}"#, "pairs of hexadecimal digits"),
            (r#"{"publish":{"topic":"t","hex":"é"}}"#, "pairs of hexadecimal digits"),
            (r#"{"retained_clear":{"topic":""}}"#, "must not be empty"),
        ] {
            let reason = understand(line, NOW).expect_err(line);
            assert!(reason.contains(part), "{line}: {reason}");
        }
        assert!(understand(&"[".repeat(LINE_MAX_BYTES), NOW).is_err());
    }

    #[test]
    fn answers_are_written_as_documented() {
        for (answer, text) in [
            (Answer::Accepted {}, r#"{"accepted":{}}"#),
            (Answer::HandedOver {}, r#"{"handed_over":{}}"#),
            (Answer::Refused { reason: "full".into() }, r#"{"refused":{"reason":"full"}}"#),
        ] {
            assert_eq!(serde_json::to_string(&answer).expect("plain"), text);
            assert_eq!(serde_json::from_str::<Answer>(text).expect("an answer"), answer);
        }
    }

    #[test]
    fn hexadecimal_digits_go_both_ways() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
    }
}
