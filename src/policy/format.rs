//! What payloads say: the wire contract, schema version 1. Pure.
//!
//! Every payload is one JSON object whose members stand in a fixed order, the schema version first. Receivers
//! may rely on names, types and meaning of what is here; members may be added within a version, so they must
//! ignore those they do not know. The golden tests below are the contract's text.
//!
//! Invariant (P9): each value carries its acquisition time (its own, or the message's), its quality, and
//! whether the clock that stamped it had been set; a bad value is `null`, never an old one.

use std::fmt::{self, Write as _};

use jiff::Timestamp;

use crate::clock::Stamp;
use crate::clock::correction::Correction;
use crate::message::{Lane, Payload, Seq};
use crate::point::{Fault, Value};

/// Version of the payload schema, the member `v`.
pub const SCHEMA_VERSION: u8 = 1;

/// Longest presence payload that is read; ours have about 250 bytes.
const PRESENCE_MAX_BYTES: usize = 4096;

/// Counters above this do not come from a gateway: the boot counter counts starts, the epoch databases.
const COUNTER_MAX: u64 = u32::MAX as u64 / 2;

/// One value of a values payload.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry<'a> {
    /// The point's name, unique in the message.
    pub name: &'a str,
    /// Unit of measure, `kWh`.
    pub unit: Option<&'a str>,
    /// When it was read.
    pub at: Stamp,
    /// The value, or why there is none.
    pub value: &'a Result<Value, Fault>,
}

/// The values of one unit. The message's own time is that of its oldest value, so that a receiver that looks
/// no further never takes a value for fresher than it is; values read at another millisecond say so.
///
/// Where a clock was not right, the message names the boot, for a [`correction`] to find it.
///
/// The payload is left open for the store to add `epoch` and `seq`.
pub fn values(gateway: &str, boot_id: &str, line: &str, unit: &str, entries: &[Entry<'_>]) -> Payload {
    let at = oldest(entries.iter().map(|entry| entry.at));
    let mut members = Object::new();
    for entry in entries {
        members = members.object(entry.name, value(entry, at));
    }
    let payload = Object::versioned().text("gateway", gateway).text("line", line).text("unit", unit);
    let payload = match entries.iter().all(|entry| entry.at.wall_is_right()) {
        true => payload.time(at),
        false => payload.time(at).text("boot_id", boot_id),
    };
    payload.object("values", members).into_open()
}

/// The stamp that was taken first, by the monotonic clock; both clocks at 0 when there is none.
pub fn oldest(stamps: impl Iterator<Item = Stamp>) -> Stamp {
    stamps.min_by_key(|stamp| stamp.mono_ms).unwrap_or(Stamp { wall_ms: 0, mono_ms: 0, synchronised: false })
}

fn value(entry: &Entry<'_>, message_at: Stamp) -> Object {
    let mut object = Object::new();
    object = match entry.value {
        Ok(value) => object.number("value", number(value)),
        Err(_) => object.number("value", "null"),
    };
    if let Some(unit) = entry.unit {
        object = object.text("unit", unit);
    }
    object = match entry.value {
        Ok(_) => object.text("quality", "good"),
        Err(fault) => {
            object.text("quality", "bad").text("fault", fault.kind()).text("reason", &fault.to_string())
        }
    };
    if entry.at.wall_ms != message_at.wall_ms {
        object = object.text("at", &rfc3339(entry.at.wall_ms));
    }
    if clock(entry.at) != clock(message_at) {
        object = object.text("clock", clock(entry.at));
    }
    object
}

/// `serde_json` writes the shortest decimal that reads back the same, and `null` for what JSON has no number for.
pub fn number(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(bit) => (*bit).into(),
        Value::Integer(integer) => (*integer).into(),
        Value::Float(float) => (*float).into(),
    }
}

/// A run of messages that will not come, because a limit removed them (P5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap<'a> {
    /// The lane they were in.
    pub lane: Lane,
    /// The first of them.
    pub first_seq: Seq,
    /// The last of them.
    pub last_seq: Seq,
    /// How many between the two, ends included, were removed: fewer than the distance when some were sent.
    pub count: u64,
    /// One stable word: `quota`, `expired`, …
    pub reason: &'a str,
}

/// A gap record. The payload is left open for the store to add `epoch` and `seq`.
pub fn gap(gateway: &str, gap: &Gap<'_>) -> Payload {
    Object::versioned()
        .text("gateway", gateway)
        .text("lane", gap.lane.name())
        .number("first_seq", gap.first_seq)
        .number("last_seq", gap.last_seq)
        .number("count", gap.count)
        .text("reason", gap.reason)
        .into_open()
}

/// What to add to the times of one boot's messages whose `clock` is not `ok`, once the clock is right: those with
/// this `boot_id` and a time from `from` to `to`, ends included. The payload is left open for the store to add
/// `epoch` and `seq`.
pub fn correction(gateway: &str, boot_id: &str, correction: &Correction, at: Stamp) -> Payload {
    Object::versioned()
        .text("gateway", gateway)
        .text("boot_id", boot_id)
        .text("from", &rfc3339(correction.from_ms))
        .text("to", &rfc3339(correction.to_ms))
        .number("add_ms", correction.add_ms)
        .time(at)
        .into_open()
}

/// The alarm about a damaged database.
pub fn damage(gateway: &str, salvaged: u64, lost: u64, what: &str, at: Stamp) -> Payload {
    Object::versioned()
        .text("alarm", "database_damaged")
        .text("gateway", gateway)
        .number("salvaged", salvaged)
        .number("lost", lost)
        .text("reason", what)
        .time(at)
        .into_open()
}

/// What became of a command: one stable word each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandResult {
    /// Carried out, and read back.
    Done,
    /// Not carried out, because it may not be or cannot be understood.
    Refused,
    /// Not carried out, because its time was over.
    Expired,
    /// Certainly not carried out as asked.
    Failed,
    /// It may or may not have been carried out.
    Unknown,
}

impl CommandResult {
    /// The word in payloads.
    pub fn name(self) -> &'static str {
        match self {
            CommandResult::Done => "done",
            CommandResult::Refused => "refused",
            CommandResult::Expired => "expired",
            CommandResult::Failed => "failed",
            CommandResult::Unknown => "unknown",
        }
    }
}

/// The answer to one command (P8). Exactly one for each id.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Answer<'a> {
    /// The command's id, where one could be read.
    pub id: Option<&'a str>,
    /// `line/unit/point`, where the command names a point that may be written.
    pub point: Option<&'a str>,
    /// What became of it.
    pub result: CommandResult,
    /// Why, in words.
    pub reason: Option<&'a str>,
    /// What was read back from the device after the write.
    pub read_back: Option<&'a Value>,
    /// What else the asker should know, in words.
    pub note: Option<&'a str>,
    /// When the command was received.
    pub received: Stamp,
    /// When this was known.
    pub at: Stamp,
}

/// The answer to a command. The payload is left open for the store to add `epoch` and `seq`.
pub fn answer(gateway: &str, answer: &Answer<'_>) -> Payload {
    let object = Object::versioned()
        .text("gateway", gateway)
        .optional_text("id", answer.id)
        .optional_text("point", answer.point)
        .text("result", answer.result.name())
        .optional_text("reason", answer.reason);
    let object = match answer.read_back {
        Some(value) => object.number("read_back", number(value)),
        None => object,
    };
    object
        .optional_text("note", answer.note)
        .text("received_at", &rfc3339(answer.received.wall_ms))
        .time(answer.at)
        .into_open()
}

/// Which start of which gateway speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Speaker {
    /// The gateway's id.
    pub gateway: String,
    /// The program's version.
    pub version: String,
    /// How many times the agent has started on its database, this time included.
    pub boot: u64,
    /// Drawn at random at every start: tells two agents with the same boot counter apart.
    pub instance: u64,
}

/// The retained presence of a gateway that is connected.
pub fn online(speaker: &Speaker, epoch: u32, queued: u64, at: Stamp) -> String {
    let payload = presence(speaker, "online").number("epoch", epoch).number("queued", queued);
    payload.time(at).close()
}

/// The Will: the retained presence the broker publishes when the connection is lost. It has no time, because
/// it is written when the connection is made.
pub fn lost(speaker: &Speaker) -> String {
    presence(speaker, "offline").text("reason", "lost").close()
}

/// The retained presence of a gateway that was asked to stop.
pub fn stopped(speaker: &Speaker, at: Stamp) -> String {
    presence(speaker, "offline").text("reason", "stopped").time(at).close()
}

fn presence(speaker: &Speaker, state: &str) -> Object {
    Object::versioned()
        .text("state", state)
        .text("gateway", &speaker.gateway)
        .text("version", &speaker.version)
        .number("boot", speaker.boot)
        .text("instance", &format!("{:016x}", speaker.instance))
}

/// What a presence payload of this schema says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeardPresence {
    /// `online` or `offline`.
    pub online: bool,
    /// The gateway's id.
    pub gateway: String,
    /// Its boot counter.
    pub boot: u64,
    /// Its instance.
    pub instance: u64,
    /// Its store epoch, which only `online` tells.
    pub epoch: Option<u32>,
}

/// Reads a presence payload from the broker, where anybody may have put it: `None` for whatever this program
/// would not have written, absurdly high counters included.
pub fn read_presence(payload: &[u8]) -> Option<HeardPresence> {
    if payload.len() > PRESENCE_MAX_BYTES {
        return None;
    }
    let json: serde_json::Value = serde_json::from_slice(payload).ok()?;
    let counter = |name: &str| json.get(name)?.as_u64().filter(|count| *count <= COUNTER_MAX);
    if counter("v")? != u64::from(SCHEMA_VERSION) {
        return None;
    }
    let online = match json.get("state")?.as_str()? {
        "online" => true,
        "offline" => false,
        _ => return None,
    };
    let epoch = match json.get("epoch") {
        None => None,
        Some(_) => Some(u32::try_from(counter("epoch")?).ok()?),
    };
    Some(HeardPresence {
        online,
        gateway: json.get("gateway")?.as_str()?.to_owned(),
        boot: counter("boot")?,
        instance: u64::from_str_radix(json.get("instance")?.as_str()?, 16).ok()?,
        epoch,
    })
}

/// What the health message tells, every few minutes.
#[derive(Debug, Clone, PartialEq)]
pub struct Health<'a> {
    /// When it was put together.
    pub at: Stamp,
    /// How long this agent has been running, in seconds.
    pub uptime_s: u64,
    /// The store's epoch.
    pub epoch: u32,
    /// The connection to the broker.
    pub link: LinkHealth<'a>,
    /// The queue, by lane.
    pub queue: &'a [LaneHealth],
    /// Messages dropped, by reason, since the database was made.
    pub dropped: &'a [(&'a str, u64)],
    /// Messages given up and kept as dead letters.
    pub dead_letters: u64,
    /// The database.
    pub store: StoreHealth<'a>,
    /// The byte budget, if there is one.
    pub budget: Option<BudgetHealth<'a>>,
    /// Commands.
    pub commands: CommandsHealth,
    /// Every line, in the order of the configuration.
    pub lines: &'a [LineHealth<'a>],
}

/// What became of commands since the agent started, as the health message tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommandsHealth {
    /// Recorded, and neither begun nor answered.
    pub waiting: u64,
    /// Carried out.
    pub done: u64,
    /// Not allowed, not understood, or too many.
    pub refused: u64,
    /// Too late.
    pub expired: u64,
    /// Certainly not carried out as asked.
    pub failed: u64,
    /// Perhaps carried out.
    pub unknown: u64,
    /// Known already.
    pub repeated: u64,
}

/// The connection to the broker, as the health message tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkHealth<'a> {
    /// How long it has been up, in seconds; `None` while it is down.
    pub up_s: Option<u64>,
    /// Connections made since the agent started.
    pub connects: u64,
    /// Attempts that failed since the agent started.
    pub connect_failures: u64,
    /// Why the last connection or attempt ended.
    pub last_error: Option<&'a str>,
    /// What the broker does not allow and is done differently, in words.
    pub downgrades: &'a [String],
}

/// One lane, as the health message tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneHealth {
    /// Which lane.
    pub lane: Lane,
    /// Messages waiting or in flight.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Age of the oldest, in seconds; `None` when the lane is empty.
    pub oldest_age_s: Option<u64>,
}

/// The database, as the health message tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreHealth<'a> {
    /// Bytes of messages in it.
    pub used_bytes: u64,
    /// Bytes of messages it may hold.
    pub quota_bytes: u64,
    /// Why it accepts nothing at present, if so.
    pub error: Option<&'a str>,
}

/// The byte budget, as the health message tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetHealth<'a> {
    /// Bytes used in this period.
    pub used_bytes: u64,
    /// Bytes of one period.
    pub bytes: u64,
    /// `day` or `month`.
    pub per: &'a str,
    /// The lanes that wait because it is used up.
    pub held_back: Vec<Lane>,
}

/// One line, as the health message tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineHealth<'a> {
    /// Its name.
    pub name: &'a str,
    /// Why it cannot be used, if so.
    pub error: Option<&'a str>,
    /// Each unit's name, and why it fails, if so.
    pub units: Vec<(&'a str, Option<&'a str>)>,
}

/// The health message.
pub fn health(speaker: &Speaker, health: &Health<'_>) -> String {
    let queue = health.queue.iter().fold(Object::new(), |queue, lane| {
        let members = Object::new()
            .number("messages", lane.messages)
            .number("bytes", lane.bytes)
            .optional_number("oldest_age_s", lane.oldest_age_s);
        queue.object(lane.lane.name(), members)
    });
    let dropped =
        health.dropped.iter().fold(Object::new(), |dropped, (reason, count)| dropped.number(reason, count));
    let lines =
        health.lines.iter().fold(Object::new(), |lines, line| lines.object(line.name, line_health(line)));
    let told = Object::versioned()
        .text("gateway", &speaker.gateway)
        .text("version", &speaker.version)
        .number("boot", speaker.boot)
        .number("epoch", health.epoch)
        .time(health.at)
        .number("uptime_s", health.uptime_s)
        .object("link", link_health(&health.link))
        .object("queue", queue)
        .object("dropped", dropped)
        .number("dead_letters", health.dead_letters)
        .object("store", store_health(&health.store))
        .object("commands", commands_health(&health.commands));
    let told = match &health.budget {
        Some(budget) => told.object("budget", budget_health(budget)),
        None => told,
    };
    told.object("lines", lines).close()
}

fn budget_health(budget: &BudgetHealth<'_>) -> Object {
    let held_back: Vec<&str> = budget.held_back.iter().map(|lane| lane.name()).collect();
    Object::new()
        .number("used_bytes", budget.used_bytes)
        .number("bytes", budget.bytes)
        .text("per", budget.per)
        .number("held_back", serde_json::Value::from(held_back))
}

fn link_health(link: &LinkHealth<'_>) -> Object {
    Object::new()
        .text("state", if link.up_s.is_some() { "up" } else { "down" })
        .optional_number("up_s", link.up_s)
        .number("connects", link.connects)
        .number("connect_failures", link.connect_failures)
        .optional_text("last_error", link.last_error)
        .optional_text("not_as_asked", Some(&*link.downgrades.join("; ")).filter(|words| !words.is_empty()))
}

fn store_health(store: &StoreHealth<'_>) -> Object {
    Object::new()
        .text("state", state(store.error))
        .number("used_bytes", store.used_bytes)
        .number("quota_bytes", store.quota_bytes)
        .optional_text("reason", store.error)
}

fn commands_health(commands: &CommandsHealth) -> Object {
    Object::new()
        .number("waiting", commands.waiting)
        .number("done", commands.done)
        .number("refused", commands.refused)
        .number("expired", commands.expired)
        .number("failed", commands.failed)
        .number("unknown", commands.unknown)
        .number("repeated", commands.repeated)
}

fn line_health(line: &LineHealth<'_>) -> Object {
    let units = line.units.iter().fold(Object::new(), |units, (name, error)| {
        units.object(name, Object::new().text("state", state(*error)).optional_text("reason", *error))
    });
    Object::new().text("state", state(line.error)).optional_text("reason", line.error).object("units", units)
}

/// The retained state of one unit; `fault` is what its last poll failed with.
pub fn unit_state(gateway: &str, line: &str, unit: &str, fault: Option<&str>, at: Stamp) -> String {
    Object::versioned()
        .text("state", state(fault))
        .text("gateway", gateway)
        .text("line", line)
        .text("unit", unit)
        .optional_text("reason", fault)
        .time(at)
        .close()
}

fn state(error: Option<&str>) -> &'static str {
    if error.is_some() { "fault" } else { "ok" }
}

fn clock(at: Stamp) -> &'static str {
    match (at.wall_is_believable(), at.synchronised) {
        (false, _) => "unset",
        (true, false) => "unsynchronised",
        (true, true) => "ok",
    }
}

/// RFC 3339 in UTC with milliseconds. A clock beyond the years -9999 to 9999 is shown at their edge.
pub fn rfc3339(wall_ms: i64) -> String {
    let edge = if wall_ms < 0 { Timestamp::MIN } else { Timestamp::MAX };
    format!("{:.3}", Timestamp::from_millisecond(wall_ms).unwrap_or(edge))
}

/// Unix time in milliseconds of an RFC 3339 text with its offset.
pub fn read_rfc3339(text: &str) -> Option<i64> {
    text.parse::<Timestamp>().ok().map(Timestamp::as_millisecond)
}

/// A JSON object in the making, members in the order they are added.
struct Object(String);

impl Object {
    fn new() -> Self {
        Object("{".to_owned())
    }

    fn versioned() -> Self {
        Object::new().number("v", SCHEMA_VERSION)
    }

    /// For whatever prints itself as JSON: a number, `true`, `false`, `null`.
    fn number(mut self, name: &str, number: impl fmt::Display) -> Self {
        if self.0.len() > 1 {
            self.0.push(',');
        }
        write!(self.0, "{}:{number}", quoted(name)).expect("a String takes all it is given");
        self
    }

    fn text(self, name: &str, text: &str) -> Self {
        let text = quoted(text);
        self.number(name, text)
    }

    fn object(self, name: &str, object: Object) -> Self {
        self.number(name, object.close())
    }

    fn optional_number(self, name: &str, number: Option<u64>) -> Self {
        match number {
            Some(number) => self.number(name, number),
            None => self,
        }
    }

    fn optional_text(self, name: &str, text: Option<&str>) -> Self {
        match text {
            Some(text) => self.text(name, text),
            None => self,
        }
    }

    fn time(self, at: Stamp) -> Self {
        self.text("at", &rfc3339(at.wall_ms)).text("clock", clock(at))
    }

    fn close(mut self) -> String {
        self.0.push('}');
        self.0
    }

    fn into_open(self) -> Payload {
        Payload::Numbered(self.0.into_bytes())
    }
}

/// The text as a JSON string, quotes included.
fn quoted(text: &str) -> impl fmt::Display {
    serde_json::Value::from(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 2026-11-21T10:00:00.123Z
    const AT: Stamp = Stamp { wall_ms: 1_795_255_200_123, mono_ms: 5_000, synchronised: true };
    const BOOT: &str = "123e5eeb-7f74-4d51-8773-6fc1a8bc42a3";

    fn speaker() -> Speaker {
        Speaker { gateway: "press-shop-1".into(), version: "0.1.0".into(), boot: 7, instance: 0xab }
    }

    fn finished(payload: Payload) -> String {
        String::from_utf8(payload.finish(3, Seq(42)).to_vec()).expect("JSON is UTF-8")
    }

    fn entry<'a>(name: &'a str, at: Stamp, value: &'a Result<Value, Fault>) -> Entry<'a> {
        Entry { name, unit: None, at, value }
    }

    #[test]
    fn golden_values() {
        let voltage = Ok(Value::Float(230.1));
        let energy = Err(Fault::Timeout { waited_ms: 1000 });
        let (count, running) = (Ok(Value::Integer(-5)), Ok(Value::Bool(true)));
        let entries = [
            Entry { unit: Some("V"), ..entry("voltage", AT, &voltage) },
            entry("energy", AT, &energy),
            entry("count", AT, &count),
            entry("running", AT, &running),
        ];
        assert_eq!(
            finished(values("press-shop-1", BOOT, "line1", "meter1", &entries)),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","line":"line1","unit":"meter1","#,
                r#""at":"2026-11-21T10:00:00.123Z","clock":"ok","values":{"#,
                r#""voltage":{"value":230.1,"unit":"V","quality":"good"},"#,
                r#""energy":{"value":null,"quality":"bad","fault":"timeout","reason":"no answer within 1000 ms"},"#,
                r#""count":{"value":-5,"quality":"good"},"#,
                r#""running":{"value":true,"quality":"good"}},"epoch":3,"seq":42}"#,
            )
        );
    }

    #[test]
    fn a_message_is_as_old_as_its_oldest_value_and_newer_ones_say_so() {
        let later = Stamp { wall_ms: AT.wall_ms + 40, mono_ms: AT.mono_ms + 40, ..AT };
        let (one, two) = (Ok(Value::Integer(1)), Ok(Value::Integer(2)));
        let text = finished(values("g", BOOT, "l", "u", &[entry("b", later, &two), entry("a", AT, &one)]));
        assert_eq!(
            text,
            concat!(
                r#"{"v":1,"gateway":"g","line":"l","unit":"u","at":"2026-11-21T10:00:00.123Z","clock":"ok","#,
                r#""values":{"b":{"value":2,"quality":"good","at":"2026-11-21T10:00:00.163Z"},"#,
                r#""a":{"value":1,"quality":"good"}},"epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn a_clock_that_was_not_set_is_admitted_also_when_it_is_set_in_between() {
        let unset = Stamp { wall_ms: 61_000, mono_ms: 4_000, synchronised: false };
        let (one, two) = (Ok(Value::Integer(1)), Ok(Value::Integer(2)));
        let text = finished(values("g", BOOT, "l", "u", &[entry("a", unset, &one), entry("b", AT, &two)]));
        assert_eq!(
            text,
            concat!(
                r#"{"v":1,"gateway":"g","line":"l","unit":"u","at":"1970-01-01T00:01:01.000Z","clock":"unset","#,
                r#""boot_id":"123e5eeb-7f74-4d51-8773-6fc1a8bc42a3","values":{"a":{"value":1,"quality":"good"},"#,
                r#""b":{"value":2,"quality":"good","at":"2026-11-21T10:00:00.123Z","clock":"ok"}},"#,
                r#""epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn a_clock_that_nobody_keeps_right_is_admitted() {
        let free = Stamp { synchronised: false, ..AT };
        let one = Ok(Value::Integer(1));
        assert_eq!(
            finished(values("g", BOOT, "l", "u", &[entry("a", free, &one)])),
            concat!(
                r#"{"v":1,"gateway":"g","line":"l","unit":"u","at":"2026-11-21T10:00:00.123Z","#,
                r#""clock":"unsynchronised","boot_id":"123e5eeb-7f74-4d51-8773-6fc1a8bc42a3","#,
                r#""values":{"a":{"value":1,"quality":"good"}},"epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn golden_correction() {
        let record = Correction { from_ms: 0, to_ms: 60_000, add_ms: 1_795_255_140_123 };
        assert_eq!(
            finished(correction("press-shop-1", BOOT, &record, AT)),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","boot_id":"123e5eeb-7f74-4d51-8773-6fc1a8bc42a3","#,
                r#""from":"1970-01-01T00:00:00.000Z","to":"1970-01-01T00:01:00.000Z","add_ms":1795255140123,"#,
                r#""at":"2026-11-21T10:00:00.123Z","clock":"ok","epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn golden_gap() {
        let record =
            Gap { lane: Lane::Normal, first_seq: Seq(1), last_seq: Seq(9), count: 9, reason: "quota" };
        assert_eq!(
            finished(gap("press-shop-1", &record)),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","lane":"normal","first_seq":1,"last_seq":9,"count":9,"#,
                r#""reason":"quota","epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn golden_answers() {
        let received = Stamp { wall_ms: AT.wall_ms - 23, mono_ms: 4_977, synchronised: true };
        let done = Answer {
            id: Some("c-17"),
            point: Some("line1/pump/setpoint"),
            result: CommandResult::Done,
            reason: None,
            read_back: Some(&Value::Float(21.5)),
            note: None,
            received,
            at: AT,
        };
        assert_eq!(
            finished(answer("press-shop-1", &done)),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","id":"c-17","point":"line1/pump/setpoint","result":"done","#,
                r#""read_back":21.5,"received_at":"2026-11-21T10:00:00.100Z","at":"2026-11-21T10:00:00.123Z","#,
                r#""clock":"ok","epoch":3,"seq":42}"#
            )
        );
        let refused = Answer {
            id: None,
            point: None,
            result: CommandResult::Refused,
            reason: Some("retained"),
            read_back: None,
            note: Some("elsewhere"),
            ..done
        };
        assert_eq!(
            finished(answer("press-shop-1", &refused)),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","result":"refused","reason":"retained","note":"elsewhere","#,
                r#""received_at":"2026-11-21T10:00:00.100Z","at":"2026-11-21T10:00:00.123Z","clock":"ok","#,
                r#""epoch":3,"seq":42}"#
            )
        );
    }

    #[test]
    fn golden_presence() {
        let who = r#""gateway":"press-shop-1","version":"0.1.0","boot":7,"instance":"00000000000000ab""#;
        let at = r#""at":"2026-11-21T10:00:00.123Z","clock":"ok""#;
        assert_eq!(
            online(&speaker(), 3, 12, AT),
            format!(r#"{{"v":1,"state":"online",{who},"epoch":3,"queued":12,{at}}}"#)
        );
        assert_eq!(lost(&speaker()), format!(r#"{{"v":1,"state":"offline",{who},"reason":"lost"}}"#));
        assert_eq!(
            stopped(&speaker(), AT),
            format!(r#"{{"v":1,"state":"offline",{who},"reason":"stopped",{at}}}"#)
        );
    }

    #[test]
    fn golden_unit_state() {
        assert_eq!(
            unit_state("g", "line1", "meter1", Some("it refused"), AT),
            concat!(
                r#"{"v":1,"state":"fault","gateway":"g","line":"line1","unit":"meter1","#,
                r#""reason":"it refused","at":"2026-11-21T10:00:00.123Z","clock":"ok"}"#
            )
        );
        assert_eq!(
            unit_state("g", "line1", "meter1", None, AT),
            concat!(
                r#"{"v":1,"state":"ok","gateway":"g","line":"line1","unit":"meter1","#,
                r#""at":"2026-11-21T10:00:00.123Z","clock":"ok"}"#
            )
        );
    }

    #[test]
    fn golden_health() {
        let lanes = [
            LaneHealth { lane: Lane::Alarm, messages: 0, bytes: 0, oldest_age_s: None },
            LaneHealth { lane: Lane::Normal, messages: 5, bytes: 1000, oldest_age_s: Some(61) },
        ];
        let lines = [LineHealth {
            name: "line1",
            error: None,
            units: vec![("meter1", None), ("meter2", Some("no answer within 1000 ms"))],
        }];
        let message = Health {
            at: AT,
            uptime_s: 3600,
            epoch: 3,
            link: LinkHealth {
                up_s: Some(60),
                connects: 2,
                connect_failures: 1,
                last_error: Some("\"x\""),
                downgrades: &["no retain".into(), "QoS 1 at most".into()],
            },
            queue: &lanes,
            dropped: &[("quota", 4)],
            dead_letters: 1,
            store: StoreHealth { used_bytes: 1000, quota_bytes: 1 << 20, error: None },
            budget: Some(BudgetHealth {
                used_bytes: 32_505_856,
                bytes: 52_428_800,
                per: "month",
                held_back: vec![Lane::Bulk],
            }),
            commands: CommandsHealth { done: 7, refused: 1, ..CommandsHealth::default() },
            lines: &lines,
        };
        assert_eq!(
            health(&speaker(), &message),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","version":"0.1.0","boot":7,"epoch":3,"#,
                r#""at":"2026-11-21T10:00:00.123Z","clock":"ok","uptime_s":3600,"#,
                r#""link":{"state":"up","up_s":60,"connects":2,"connect_failures":1,"last_error":"\"x\"","#,
                r#""not_as_asked":"no retain; QoS 1 at most"},"#,
                r#""queue":{"alarm":{"messages":0,"bytes":0},"#,
                r#""normal":{"messages":5,"bytes":1000,"oldest_age_s":61}},"#,
                r#""dropped":{"quota":4},"dead_letters":1,"#,
                r#""store":{"state":"ok","used_bytes":1000,"quota_bytes":1048576},"#,
                r#""commands":{"waiting":0,"done":7,"refused":1,"expired":0,"failed":0,"unknown":0,"repeated":0},"#,
                r#""budget":{"used_bytes":32505856,"bytes":52428800,"per":"month","held_back":["bulk"]},"#,
                r#""lines":{"line1":{"state":"ok","units":{"meter1":{"state":"ok"},"#,
                r#""meter2":{"state":"fault","reason":"no answer within 1000 ms"}}}}}"#
            )
        );
    }

    #[test]
    fn presence_reads_back_what_it_wrote_and_nothing_else() {
        let heard = |online, epoch| HeardPresence {
            online,
            gateway: "press-shop-1".into(),
            boot: 7,
            instance: 0xab,
            epoch,
        };
        assert_eq!(read_presence(online(&speaker(), 3, 12, AT).as_bytes()), Some(heard(true, Some(3))));
        assert_eq!(read_presence(lost(&speaker()).as_bytes()), Some(heard(false, None)));
        assert_eq!(read_presence(stopped(&speaker(), AT).as_bytes()), Some(heard(false, None)));

        let good = online(&speaker(), 3, 12, AT);
        for (from, to) in [
            (r#""v":1"#, r#""v":2"#),
            (r#""state":"online""#, r#""state":"asleep""#),
            (r#""boot":7"#, r#""boot":-7"#),
            (r#""boot":7"#, r#""boot":18446744073709551615"#),
            (r#""epoch":3"#, r#""epoch":4294967295"#),
            (r#""epoch":3"#, r#""epoch":"3""#),
            (r#""instance":"00"#, r#""instance":"zz"#),
            (r#""gateway":"press-shop-1""#, r#""gateway":null"#),
        ] {
            assert_ne!(good, good.replace(from, to), "{from} is there");
            assert_eq!(read_presence(good.replace(from, to).as_bytes()), None, "{to}");
        }
        let deep = "[".repeat(PRESENCE_MAX_BYTES);
        let long = format!("{good}{}", " ".repeat(PRESENCE_MAX_BYTES));
        for payload in ["", "null", "{}", "\u{0}", &deep, &long] {
            assert_eq!(read_presence(payload.as_bytes()), None, "{payload:?}");
        }
    }

    #[test]
    fn no_clock_breaks_a_time() {
        for (wall_ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (i64::MAX, "9999-12-30T22:00:00.999Z"),
        ] {
            assert_eq!(rfc3339(wall_ms), text);
        }
        assert!(rfc3339(i64::MIN).ends_with('Z'));
    }

    proptest! {
        #[test]
        fn payloads_are_json_whatever_the_names_and_values(
            gateway in any::<String>(), name in any::<String>(), unit in any::<String>(), what in any::<String>(),
            float in any::<f64>(), wall_ms in any::<i64>(),
        ) {
            let at = Stamp { wall_ms, mono_ms: 1, synchronised: wall_ms % 2 == 0 };
            let (good, bad) = (Ok(Value::Float(float)), Err(Fault::LineDown { what: what.clone() }));
            let entries = [
                Entry { name: &name, unit: Some(&unit), at, value: &good },
                Entry { name: "\u{0}bad", unit: None, at, value: &bad },
            ];
            let text = finished(values(&gateway, BOOT, "l", "u", &entries));
            let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            prop_assert_eq!(&json["gateway"], &serde_json::Value::from(gateway));
            if name != "\u{0}bad" {
                prop_assert_eq!(json["values"][&name]["value"].is_number(), float.is_finite());
            }
            let written = serde_json::Value::from(float).to_string();
            let needle = format!("\"value\":{written},");
            prop_assert!(text.contains(&needle));
            prop_assert!(!float.is_finite() || written.parse() == Ok(float));
        }

        #[test]
        fn no_presence_payload_panics(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_presence(&payload);
        }
    }
}
