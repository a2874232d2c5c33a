//! What is different in another configuration, in words, and what each difference takes. Pure.
//!
//! Invariant: every setting is compared. Each table is taken apart without `..`, so that a new setting does not compile
//! until it stands here.

use std::fmt;
use std::path::PathBuf;

use super::files::Files;
use super::quantity::{show_duration as duration, show_size as size};
use super::{
    Broker, BudgetSettings, Commands, Config, Control, Gateway, LaneLimits, Machine, MachinePoint,
    ModbusLine, ModbusUnit, Point, Replay, SerialPort, Store, Tls, Transport,
};
use super::{log, points, store, value};
use crate::logging::Settings as LogSettings;
use crate::message::Lane;
use crate::policy::Reporting;
use crate::policy::deadband::Deadband;
use crate::source::modbus::Writable;
use crate::source::modbus::register::Encoding;

/// What a difference takes; the later, the more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// Nothing but to know it.
    Nothing,
    /// Its line ends and begins anew; the others go on.
    Line,
    /// The next start of the agent: until then it stays as it is.
    NextStart,
    /// A new connection to that broker, which goes on with the session.
    Connection,
    /// A new connection with another session.
    Session,
    /// The agent starts again: it cannot be changed while it runs.
    Restart,
}

/// One setting that is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Which setting, and from what to what.
    pub words: String,
    /// What that takes.
    pub needs: Needs,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let takes = match self.needs {
            Needs::Nothing | Needs::Line => "",
            Needs::NextStart => " (holds from the next start on)",
            Needs::Connection => " (connects anew)",
            Needs::Session => " (connects anew, with another session)",
            Needs::Restart => " (needs a restart)",
        };
        write!(f, "{}{takes}", self.words)
    }
}

/// Everything that is different, in the order of the file.
pub(super) fn differences(old: &Config, new: &Config) -> Vec<Difference> {
    let Config {
        gateway,
        broker: _,
        other_brokers: _,
        store,
        replay,
        budget,
        control,
        http,
        commands,
        log,
        modbus: _,
        points,
        machine,
    } = old;
    let mut found = Found(Vec::new());
    self::gateway(&mut found, gateway, &new.gateway);
    brokers(&mut found, old, new);
    self::store(&mut found, store, &new.store);
    self::replay(&mut found, replay, &new.replay);
    self::budget(&mut found, budget.as_ref(), new.budget.as_ref());
    self::control(&mut found, control, &new.control);
    if *http != new.http {
        found.say("[http] another one", Needs::Restart);
    }
    self::commands(&mut found, commands, &new.commands);
    let is_written = |points: &[Point]| points.iter().any(|point| point.writable.is_some());
    match (is_written(points), is_written(&new.points)) {
        (false, true) => {
            found.say("[commands] subscribed to, because a point is writable", Needs::Connection)
        }
        (true, false) => {
            found.say("[commands] not subscribed to, because no point is writable", Needs::Connection)
        }
        _ => {}
    }
    self::log(&mut found, log, &new.log);
    lines(&mut found, old, new);
    self::machine(&mut found, machine.as_ref(), new.machine.as_ref());
    found.0
}

struct Found(Vec<Difference>);

impl Found {
    fn say(&mut self, words: impl Into<String>, needs: Needs) {
        self.0.push(Difference { words: words.into(), needs });
    }
}

/// Compares two values of one type, key by key. `apart` are those that are looked at elsewhere.
macro_rules! compare {
    ($found:expr, $place:expr, $old:expr, $new:expr,
     $type:ident { $($key:ident: $needs:ident, $show:expr;)* } apart { $($apart:ident),* }) => {{
        let (old, new) = ($old, $new);
        let $type { $($key: _,)* $($apart: _,)* } = old;
        $(
            if old.$key != new.$key {
                let show = $show;
                let change = change(show(&old.$key), show(&new.$key));
                $found.say(format!("{} {} {change}", $place, stringify!($key)), Needs::$needs);
            }
        )*
    }};
}

fn change(old: String, new: String) -> String {
    format!("{old} -> {new}")
}

fn gateway(found: &mut Found, old: &Gateway, new: &Gateway) {
    compare!(found, "[gateway]", old, new, Gateway {
        id: Restart, ToString::to_string;
        base_topic: Connection, ToString::to_string;
        health_interval: Nothing, duration;
        drain_timeout: Nothing, duration;
    } apart {});
}

/// It is written by whatever the process began with.
fn log(found: &mut Found, old: &LogSettings, new: &LogSettings) {
    compare!(found, "[log]", old, new, LogSettings {
        format: NextStart, |chosen| value::name_of(&log::FORMAT, chosen);
    } apart { levels });
    if old.levels != new.levels {
        found.say("[log] level: another one", Needs::NextStart);
    }
}

/// Brokers are told apart by where they are and who we are there: that is whose session it is.
fn brokers(found: &mut Found, old: &Config, new: &Config) {
    let (before, after): (Vec<_>, Vec<_>) = (old.brokers().collect(), new.brokers().collect());
    if let ([old], [new]) = (&before[..], &after[..]) {
        return broker(found, "[broker]", old, new);
    }
    let session = |broker: &Broker| (broker.host.clone(), broker.port, broker.client_id.clone());
    let named = |broker: &Broker| format!("[[broker]] {} as {}", url(broker), broker.client_id);
    for (place, new) in after.iter().enumerate() {
        match before.iter().find(|old| session(old) == session(new)) {
            Some(old) => broker(found, &format!("[[broker]] {}", place + 1), old, new),
            None => found.say(format!("{} added", named(new)), Needs::Session),
        }
    }
    for gone in before.iter().filter(|old| !after.iter().any(|new| session(old) == session(new))) {
        found.say(format!("{} removed", named(gone)), Needs::Session);
    }
    let stayed = |these: &[&Broker], others: &[&Broker]| -> Vec<_> {
        let these = these.iter().map(|broker| session(broker));
        these.filter(|one| others.iter().any(|other| session(other) == *one)).collect()
    };
    if stayed(&before, &after) != stayed(&after, &before) {
        found.say("[[broker]]: another order of preference", Needs::Nothing);
    }
}

fn broker(found: &mut Found, place: &str, old: &Broker, new: &Broker) {
    if url(old) != url(new) {
        found.say(format!("{place} url {} -> {}", url(old), url(new)), Needs::Session);
    }
    compare!(found, place, old, new, Broker {
        protocol: Connection, |protocol: &super::Protocol| protocol.name().to_owned();
        client_id: Session, ToString::to_string;
        password_file: Connection, optional(path);
        keep_alive: Connection, duration;
        session_expiry: Connection, duration;
        connect_timeout: Nothing, duration;
        ack_timeout: Connection, duration;
        backoff_max: Nothing, duration;
        max_in_flight: Connection, ToString::to_string;
        qos2_window: Connection, ToString::to_string;
        max_packet: Connection, |bytes: &u32| size(&u64::from(*bytes));
        on_session_loss: Connection, |chosen| value::name_of(&super::broker::SESSION_LOSS, chosen);
        retry_refused_for: Connection, duration;
        will: Connection, ToString::to_string;
        max_qos: Connection, |qos: &super::Qos| qos.number().to_string();
        retain: Connection, ToString::to_string;
        max_packet_out: Connection, optional(|bytes: &u32| size(&u64::from(*bytes)));
        clean_start: Connection, ToString::to_string;
        failover_after: Nothing, duration;
        failback_every: Nothing, duration;
    } apart { host, port, tls, username, files });
    if old.username != new.username {
        // Some brokers take a token as user name (P10).
        found.say(format!("{place} username: another one"), Needs::Connection);
    }
    if let (Some(old), Some(new)) = (&old.tls, &new.tls) {
        compare!(found, place, old, new, Tls {
            ca_file: Connection, optional(path);
            cert_file: Connection, optional(path);
            key_file: Connection, optional(path);
            server_name: Connection, optional(ToString::to_string);
            alpn: Connection, list;
        } apart {});
    }
    files(found, place, old, new);
}

/// The same files with other contents.
fn files(found: &mut Found, place: &str, old: &Broker, new: &Broker) {
    let Files { password_file, ca_file, cert_file, key_file } = old.files;
    let tls = |broker: &Broker, file: fn(&Tls) -> &Option<PathBuf>| {
        broker.tls.as_ref().and_then(|tls| file(tls).clone())
    };
    let paths = |broker: &Broker| {
        [
            broker.password_file.clone(),
            tls(broker, |tls| &tls.ca_file),
            tls(broker, |tls| &tls.cert_file),
            tls(broker, |tls| &tls.key_file),
        ]
    };
    let keys = [
        ("password_file", password_file, new.files.password_file),
        ("ca_file", ca_file, new.files.ca_file),
        ("cert_file", cert_file, new.files.cert_file),
        ("key_file", key_file, new.files.key_file),
    ];
    for ((key, old, new), (old_path, new_path)) in
        keys.into_iter().zip(paths(old).into_iter().zip(paths(new)))
    {
        if old != new && old_path == new_path {
            found.say(format!("{place} {key}: the file holds something else"), Needs::Connection);
        }
    }
}

fn url(broker: &Broker) -> String {
    let scheme = if broker.tls.is_some() { "mqtts" } else { "mqtt" };
    let brackets = if broker.host.contains(':') { ("[", "]") } else { ("", "") };
    format!("{scheme}://{}{}{}:{}", brackets.0, broker.host, brackets.1, broker.port)
}

fn store(found: &mut Found, old: &Store, new: &Store) {
    let when_full = |chosen: &super::WhenFull| value::name_of(&store::WHEN_FULL, chosen);
    compare!(found, "[store]", old, new, Store {
        path: Restart, path;
        quota: Nothing, size;
        when_full: Nothing, when_full;
        min_free_disk: Nothing, size;
    } apart { lanes, commit_interval });
    for lane in Lane::ALL {
        let (old, new, name) =
            (old.commit_interval[lane as usize], new.commit_interval[lane as usize], lane.name());
        if old != new {
            let words = change(duration(&old), duration(&new));
            found.say(format!("[store] commit_interval of {name} {words}"), Needs::Nothing);
        }
    }
    for lane in Lane::ALL {
        let (old, new) = (&old.lanes[lane as usize], &new.lanes[lane as usize]);
        compare!(found, format!("[store.lane.{}]", lane.name()), old, new, LaneLimits {
            max_bytes: Nothing, optional(size);
            max_messages: Nothing, optional(ToString::to_string);
            max_age: Nothing, optional(duration);
            when_full: Nothing, optional(when_full);
        } apart {});
    }
}

fn replay(found: &mut Found, old: &Replay, new: &Replay) {
    compare!(found, "[replay]", old, new, Replay {
        order: Nothing, |chosen| value::name_of(&store::ORDER, chosen);
        max_messages_per_second: Nothing, optional(ToString::to_string);
        max_bytes_per_second: Nothing, optional(size);
    } apart {});
}

fn budget(found: &mut Found, old: Option<&BudgetSettings>, new: Option<&BudgetSettings>) {
    let lanes = |lanes: &[bool; 3]| {
        let listed = Lane::ALL.into_iter().filter(|lane| lanes[*lane as usize]);
        listed.map(Lane::name).collect::<Vec<_>>().join(", ")
    };
    match (old, new) {
        (None, None) => {}
        (None, Some(new)) => {
            found.say(format!("[budget] added: {} a {}", size(&new.bytes), new.per.name()), Needs::Nothing)
        }
        (Some(_), None) => found.say("[budget] removed", Needs::Nothing),
        (Some(old), Some(new)) => compare!(found, "[budget]", old, new, BudgetSettings {
            bytes: Nothing, size;
            per: Nothing, |per: &super::BudgetPeriod| per.name().to_owned();
            holds_back: Nothing, lanes;
        } apart {}),
    }
}

fn control(found: &mut Found, old: &Control, new: &Control) {
    compare!(found, "[control]", old, new, Control { socket: Restart, path; } apart {});
}

fn commands(found: &mut Found, old: &Commands, new: &Commands) {
    // The answer's topic follows from the base topic.
    compare!(found, "[commands]", old, new, Commands {
        topic: Connection, ToString::to_string;
        ttl: Nothing, duration;
        max_ttl: Nothing, duration;
        max_per_second: Nothing, ToString::to_string;
        burst: Nothing, ToString::to_string;
        response_topics: Nothing, list;
    } apart { answer_topic });
}

fn lines(found: &mut Found, old: &Config, new: &Config) {
    for line in &new.modbus {
        match old.modbus.iter().find(|before| before.name == line.name) {
            None => found.say(format!("{} added", line.name), Needs::Line),
            Some(before) => self::line(found, (old, before), (new, line)),
        }
    }
    for gone in old.modbus.iter().filter(|line| !new.modbus.iter().any(|other| other.name == line.name)) {
        found.say(format!("{} removed", gone.name), Needs::Line);
    }
}

fn line(found: &mut Found, (of, old): (&Config, &ModbusLine), (to, new): (&Config, &ModbusLine)) {
    let ModbusLine { name, transport: _, timeout: _, units } = old;
    transport(found, name, &old.transport, &new.transport);
    compare!(found, format!("{name}:"), old, new, ModbusLine {
        timeout: Line, duration;
    } apart { name, transport, units });
    for unit in &new.units {
        let place = format!("{name}/{}", unit.name);
        match units.iter().find(|before| before.name == unit.name) {
            None => found.say(format!("{place} added"), Needs::Line),
            Some(before) => self::unit(found, &place, (of, before), (to, unit)),
        }
    }
    for gone in units.iter().filter(|unit| !new.units.iter().any(|other| other.name == unit.name)) {
        found.say(format!("{name}/{} removed", gone.name), Needs::Line);
    }
}

/// What is different in the same way at all of its points is told once.
fn unit(
    found: &mut Found,
    place: &str,
    (of, old): (&Config, &ModbusUnit),
    (to, new): (&Config, &ModbusUnit),
) {
    compare!(found, format!("{place}:"), old, new, ModbusUnit {
        unit: Line, ToString::to_string;
    } apart { name, points });
    let (before, after) = (&of.points[old.points.clone()], &to.points[new.points.clone()]);
    let mut children = Vec::new();
    for point in after {
        let at = format!("{place}/{}", point.report.id.point);
        match before.iter().find(|other| other.report.id == point.report.id) {
            None => found.say(format!("{at} added"), Needs::Line),
            Some(other) => children.push((at, self::point(other, point))),
        }
    }
    let shared = lift(&mut children);
    tell(found, place, shared);
    for (at, of_point) in children {
        tell(found, &at, of_point);
    }
    for gone in before.iter().filter(|old| !after.iter().any(|new| new.report.id == old.report.id)) {
        found.say(format!("{place}/{} removed", gone.report.id.point), Needs::Line);
    }
}

fn tell(found: &mut Found, place: &str, differences: Vec<Difference>) {
    for Difference { words, needs } in differences {
        found.say(format!("{place}: {words}"), needs);
    }
}

/// Takes out what all of several children say.
fn lift(children: &mut [(String, Vec<Difference>)]) -> Vec<Difference> {
    let [(_, first), _, ..] = &*children else { return Vec::new() };
    let said_by_all = |words: &&Difference| children.iter().all(|(_, said)| said.contains(words));
    let shared: Vec<Difference> = first.iter().filter(said_by_all).cloned().collect();
    children.iter_mut().for_each(|(_, said)| said.retain(|words| !shared.contains(words)));
    shared
}

fn transport(found: &mut Found, line: &str, old: &Transport, new: &Transport) {
    match (old, new) {
        (Transport::Rtu(old), Transport::Rtu(new)) => {
            compare!(found, format!("{line}:"), old, new, SerialPort {
            device: Line, path;
            baud_rate: Line, ToString::to_string;
            parity: Line, |chosen| value::name_of(&super::modbus::PARITIES, chosen);
            stop_bits: Line, ToString::to_string;
        } apart {})
        }
        (old, new) if old != new => {
            found.say(format!("{line}: {} -> {}", reached(old), reached(new)), Needs::Line);
        }
        _ => {}
    }
}

fn reached(transport: &Transport) -> String {
    match transport {
        Transport::Tcp { host, port } => format!("tcp {host} port {port}"),
        Transport::Rtu(port) => format!("rtu {}", port.device.display()),
    }
}

fn point(old: &Point, new: &Point) -> Vec<Difference> {
    let mut found = Found(Vec::new());
    compare!(found, "", old, new, Point {
        space: Line, ToString::to_string;
        address: Line, ToString::to_string;
        every: Line, duration;
        writable: Line, optional(writable);
    } apart { encoding, report });
    let (before, after) = (&old.encoding, &new.encoding);
    compare!(found, "", before, after, Encoding {
        kind: Line, |chosen| value::name_of(&points::KINDS, chosen);
        order: Line, |chosen| value::name_of(&points::ORDERS, chosen);
        scale: Line, optional(ToString::to_string);
    } apart {});
    reporting(&mut found, &old.report, &new.report);
    found.0.into_iter().map(|one| Difference { words: as_written(&one.words), ..one }).collect()
}

fn reporting(found: &mut Found, old: &Reporting, new: &Reporting) {
    compare!(found, "", old, new, Reporting {
        topic: Nothing, ToString::to_string;
        qos: Nothing, |qos: &super::Qos| qos.number().to_string();
        retain: Nothing, ToString::to_string;
        lane: Nothing, |lane: &Lane| lane.name().to_owned();
        unit: Nothing, optional(ToString::to_string);
        deadband: Nothing, deadband;
        longest_silence: Nothing, duration;
        expires_after: Nothing, optional(duration);
    } apart { id });
}

/// The source that tells of the machine; its points begin anew together.
fn machine(found: &mut Found, old: Option<&Machine>, new: Option<&Machine>) {
    let (old, new) = match (old, new) {
        (Some(old), Some(new)) => (old, new),
        (None, None) => return,
        (None, Some(_)) => return found.say("[machine] added", Needs::Line),
        (Some(_), None) => return found.say("[machine] removed", Needs::Line),
    };
    let Machine { points } = old;
    let mut children = Vec::new();
    for point in &new.points {
        let at = format!("[machine] {}", point.sensor.name());
        match points.iter().find(|before| before.sensor == point.sensor) {
            None => found.say(format!("{at} added"), Needs::Line),
            Some(before) => {
                let mut of_point = Found(Vec::new());
                compare!(of_point, "", before, point, MachinePoint {
                    every: Line, duration;
                } apart { sensor, report });
                reporting(&mut of_point, &before.report, &point.report);
                let words = |one: Difference| Difference { words: as_written(&one.words), ..one };
                children.push((at, of_point.0.into_iter().map(words).collect()));
            }
        }
    }
    tell(found, "[machine]", lift(&mut children));
    for (at, of_point) in children {
        tell(found, &at, of_point);
    }
    for gone in points.iter().filter(|old| !new.points.iter().any(|new| new.sensor == old.sensor)) {
        found.say(format!("[machine] {} removed", gone.sensor.name()), Needs::Line);
    }
}

/// A point's key as the file has it.
fn as_written(words: &str) -> String {
    let words = words.trim_start();
    let (key, rest) = words.split_once(' ').unwrap_or((words, ""));
    let key = match key {
        "space" => "register",
        "kind" => "type",
        key => key,
    };
    format!("{key} {rest}")
}

fn optional<T>(show: impl Fn(&T) -> String) -> impl Fn(&Option<T>) -> String {
    move |value| value.as_ref().map_or_else(|| "none".to_owned(), &show)
}

#[expect(clippy::ptr_arg, reason = "it is handed what the setting holds")]
fn list(texts: &Vec<String>) -> String {
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}

#[expect(clippy::ptr_arg, reason = "it is handed what the setting holds")]
fn path(path: &PathBuf) -> String {
    path.display().to_string()
}

fn writable(writable: &Writable) -> String {
    match writable {
        Writable::Coil => "true".to_owned(),
        Writable::Range { min, max } => format!("{min} to {max}"),
    }
}

fn deadband(deadband: &Deadband) -> String {
    match deadband {
        Deadband::None => "none".to_owned(),
        Deadband::Absolute(band) => band.to_string(),
        Deadband::Percent(percent) => format!("{percent}%"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse;

    const BASE: &str = r#"
[gateway]
id = "g"
[broker]
url = "mqtts://a"
[store]
[replay]
[commands]
[[modbus]]
name = "l1"
transport = "rtu"
device = "/dev/a"
[[modbus.unit]]
name = "u1"
unit = 1
every = "1s"
points = [
  { name = "a", register = "holding", address = 1, type = "u16" },
  { name = "b", register = "holding", address = 2, type = "u32" },
]
[[modbus.unit]]
name = "u2"
unit = 2
points = [{ name = "c", register = "coil", address = 3 }]
[[modbus]]
name = "l2"
transport = "tcp"
host = "h"
[[modbus.unit]]
name = "u"
unit = 1
points = [{ name = "d", register = "input", address = 0, type = "f32" }]
"#;

    fn config(text: &str) -> Config {
        parse(Path::new("/etc/f.toml"), text).unwrap_or_else(|problems| panic!("{problems}\n{text}"))
    }

    /// What is said of the base with this text in the place of that one.
    fn changed(old: &str, new: &str) -> Vec<(String, Needs)> {
        assert_eq!(BASE.matches(old).count(), 1, "{old} stands once in the base");
        let differences = config(BASE).differences(&config(&BASE.replace(old, new)));
        differences.into_iter().map(|one| (one.words, one.needs)).collect()
    }

    #[test]
    fn each_setting_is_told_with_what_it_takes() {
        use Needs::{Connection, Line, NextStart, Nothing, Restart, Session};
        let gateway = |line: &str| ("id = \"g\"".to_owned(), format!("id = \"g\"\n{line}"));
        let broker = |line: &str| ("url = \"mqtts://a\"".to_owned(), format!("url = \"mqtts://a\"\n{line}"));
        let under = |table: &str, line: &str| (format!("[{table}]\n"), format!("[{table}]\n{line}\n"));
        let l1 = |line: &str| ("device = \"/dev/a\"".to_owned(), format!("device = \"/dev/a\"\n{line}"));
        let a = |more: &str| ("type = \"u16\" }".to_owned(), format!("type = \"u16\"{more} }}"));
        for ((old, new), words, needs) in [
            (gateway("base_topic = \"x\""), "[gateway] base_topic fieldpost/g -> x", Connection),
            (gateway("health_interval = \"1h\""), "[gateway] health_interval 5min -> 1h", Nothing),
            (gateway("drain_timeout = \"1s\""), "[gateway] drain_timeout 5s -> 1s", Nothing),
            (broker("protocol = \"3.1.1\"\nqos2_window = 1000"), "[broker] protocol 5 -> 3.1.1", Connection),
            (broker("client_id = \"x\""), "[broker] client_id g -> x", Session),
            (broker("username = \"x\""), "[broker] username: another one", Connection),
            (broker("password_file = \"p\""), "[broker] password_file none -> /etc/p", Connection),
            (broker("keep_alive = \"60s\""), "[broker] keep_alive 30s -> 1min", Connection),
            (broker("session_expiry = \"1d\""), "[broker] session_expiry 7d -> 1d", Connection),
            (broker("connect_timeout = \"1s\""), "[broker] connect_timeout 20s -> 1s", Nothing),
            (broker("ack_timeout = \"1s\""), "[broker] ack_timeout 1min -> 1s", Connection),
            (broker("backoff_max = \"1s\""), "[broker] backoff_max 5min -> 1s", Nothing),
            (broker("max_in_flight = 2000"), "[broker] max_in_flight 1000 -> 2000", Connection),
            (broker("qos2_window = 2"), "[broker] qos2_window 1000 -> 2", Connection),
            (broker("max_packet = \"8KiB\""), "[broker] max_packet 256KiB -> 8KiB", Connection),
            (broker("on_session_loss = \"drop\""), "[broker] on_session_loss republish -> drop", Connection),
            (broker("retry_refused_for = \"0s\""), "[broker] retry_refused_for 1d -> 0s", Connection),
            (broker("will = false"), "[broker] will true -> false", Connection),
            (broker("max_qos = 1"), "[broker] max_qos 2 -> 1", Connection),
            (broker("retain = false"), "[broker] retain true -> false", Connection),
            (broker("max_packet_out = \"1KiB\""), "[broker] max_packet_out none -> 1KiB", Connection),
            (broker("clean_start = true"), "[broker] clean_start false -> true", Connection),
            (broker("failover_after = \"2s\""), "[broker] failover_after 1min -> 2s", Nothing),
            (broker("failback_every = \"2s\""), "[broker] failback_every 5min -> 2s", Nothing),
            (broker("ca_file = \"c\""), "[broker] ca_file none -> /etc/c", Connection),
            (broker("server_name = \"s\""), "[broker] server_name none -> s", Connection),
            (broker("alpn = [\"mqtt\"]"), "[broker] alpn none -> mqtt", Connection),
            (under("store", "quota = \"1GiB\""), "[store] quota 512MiB -> 1GiB", Nothing),
            (
                under("store", "when_full = \"reject_new\""),
                "[store] when_full drop_oldest -> reject_new",
                Nothing,
            ),
            (under("store", "min_free_disk = \"0B\""), "[store] min_free_disk 16MiB -> 0KiB", Nothing),
            (
                under("store", "commit_interval = { bulk = \"5s\" }"),
                "[store] commit_interval of bulk 1s -> 5s",
                Nothing,
            ),
            (under("store", "lane.bulk.max_age = \"1d\""), "[store.lane.bulk] max_age none -> 1d", Nothing),
            (
                under("store", "lane.alarm.max_messages = 9"),
                "[store.lane.alarm] max_messages none -> 9",
                Nothing,
            ),
            (under("replay", "order = \"live_first\""), "[replay] order in_order -> live_first", Nothing),
            (
                under("replay", "max_bytes_per_second = \"1KiB\""),
                "[replay] max_bytes_per_second none -> 1KiB",
                Nothing,
            ),
            (under("commands", "[budget]\nbytes = \"1MiB\""), "[budget] added: 1MiB a month", Nothing),
            (under("commands", "topic = \"t\""), "[commands] topic fieldpost/g/command -> t", Connection),
            (under("commands", "ttl = \"10s\""), "[commands] ttl 30s -> 10s", Nothing),
            (under("commands", "max_ttl = \"1h\""), "[commands] max_ttl 10min -> 1h", Nothing),
            (under("commands", "max_per_second = 1"), "[commands] max_per_second 10 -> 1", Nothing),
            (under("commands", "burst = 1"), "[commands] burst 50 -> 1", Nothing),
            (
                under("commands", "response_topics = [\"a/\"]"),
                "[commands] response_topics none -> a/",
                Nothing,
            ),
            (under("commands", "[log]\nlevel = \"debug\""), "[log] level: another one", NextStart),
            (under("commands", "[log]\nformat = \"json\""), "[log] format text -> json", NextStart),
            (l1("timeout = \"2s\""), "l1: timeout 1s -> 2s", Line),
            (l1("baud_rate = 19200"), "l1: baud_rate 9600 -> 19200", Line),
            (l1("parity = \"odd\""), "l1: parity even -> odd", Line),
            (l1("stop_bits = 2"), "l1: stop_bits 1 -> 2", Line),
            (a(", every = \"2s\""), "l1/u1/a: every 1s -> 2s", Line),
            (a(", scale = 0.1"), "l1/u1/a: scale none -> 0.1", Line),
            (a(", qos = 2, topic = \"x\""), "l1/u1/a: topic g/l1/u1 -> x", Nothing),
            (a(", retain = true"), "l1/u1/a: retain false -> true", Nothing),
            (a(", unit = \"V\""), "l1/u1/a: unit none -> V", Nothing),
            (a(", deadband = \"5%\""), "l1/u1/a: deadband none -> 5%", Nothing),
            (a(", longest_silence = \"1min\""), "l1/u1/a: longest_silence 10min -> 1min", Nothing),
            (a(", expires_after = \"1min\""), "l1/u1/a: expires_after none -> 1min", Nothing),
            (("\"/dev/a\"".into(), "\"/dev/b\"".into()), "l1: device /dev/a -> /dev/b", Line),
            (("host = \"h\"".into(), "host = \"i\"".into()), "l2: tcp h port 502 -> tcp i port 502", Line),
            (("unit = 2".into(), "unit = 3".into()), "l1/u2: unit 2 -> 3", Line),
            (("address = 3".into(), "address = 4".into()), "l1/u2/c: address 3 -> 4", Line),
            (("\"input\"".into(), "\"holding\"".into()), "l2/u/d: register input -> holding", Line),
            (("\"f32\"".into(), "\"u32\"".into()), "l2/u/d: type f32 -> u32", Line),
            (
                ("mqtts://a".into(), "mqtts://b:1".into()),
                "[broker] url mqtts://a:8883 -> mqtts://b:1",
                Session,
            ),
        ] {
            let found = changed(&old, &new);
            assert_eq!(found.first(), Some(&(words.to_owned(), needs)), "{new}");
            assert!(found.len() <= 2, "{found:?}");
        }
        let restarts = changed("[store]\n", "[store]\npath = \"/x/o.db\"\n");
        assert!(restarts.iter().all(|(_, needs)| *needs == Restart) && restarts.len() == 2, "{restarts:?}");
        let restarts = changed("id = \"g\"", "id = \"h\"");
        assert_eq!(restarts[0], ("[gateway] id g -> h".to_owned(), Restart));
    }

    #[test]
    fn what_comes_and_goes_is_named_and_the_same_change_is_told_once() {
        use Needs::{Connection, Line};
        let words = |old: &str, new: &str| {
            let said = changed(old, new);
            said.into_iter().map(|(words, _)| words).collect::<Vec<_>>()
        };
        assert_eq!(words("every = \"1s\"", "every = \"500ms\""), ["l1/u1: every 1s -> 500ms"]);
        assert_eq!(words("name = \"l2\"", "name = \"l3\""), ["l3 added", "l2 removed"]);
        assert_eq!(words("name = \"u2\"", "name = \"u3\""), ["l1/u3 added", "l1/u2 removed"]);
        assert_eq!(words("name = \"c\"", "name = \"x\""), ["l1/u2/x added", "l1/u2/c removed"]);
        let written =
            changed("register = \"coil\", address = 3", "register = \"coil\", address = 3, writable = true");
        let subscribed = "[commands] subscribed to, because a point is writable".to_owned();
        assert_eq!(written, [(subscribed, Connection), ("l1/u2/c: writable none -> true".to_owned(), Line)]);
        assert!(config(BASE).differences(&config(BASE)).is_empty());
    }

    #[test]
    fn brokers_of_a_list_are_known_by_their_sessions() {
        let several = |list: &[&str]| {
            let brokers = list.iter().map(|broker| format!("[[broker]]\n{broker}\n"));
            config(&format!("[gateway]\nid = \"g\"\n{}", brokers.collect::<String>()))
        };
        let (a, b) = ("url = \"mqtt://a\"", "url = \"mqtt://b\"");
        let words = |old: &[&str], new: &[&str]| {
            several(old).differences(&several(new)).iter().map(Difference::to_string).collect::<Vec<_>>()
        };
        assert_eq!(words(&[a, b], &[b, a]), ["[[broker]]: another order of preference"]);
        assert_eq!(
            words(&[a], &[a, b]),
            ["[[broker]] mqtt://b:1883 as g added (connects anew, with another session)"]
        );
        let slower = format!("{b}\nkeep_alive = \"60s\"");
        assert_eq!(words(&[a, b], &[a, &slower]), ["[[broker]] 2 keep_alive 30s -> 1min (connects anew)"]);
        assert_eq!(words(&[a, b], &[a]).len(), 1);
    }

    #[test]
    fn other_contents_of_the_same_file_are_a_difference_and_are_not_shown() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join("f.toml");
        let text = "[gateway]\nid = \"g\"\n[broker]\nurl = \"mqtts://a\"\nca_file = \"ca\"\n";
        std::fs::write(&path, text).expect("written");
        let load = |contents: &str| {
            std::fs::write(folder.path().join("ca"), contents).expect("written");
            super::super::load(&path).unwrap_or_else(|problems| panic!("{problems}"))
        };
        let (one, same, other) = (load("one"), load("one"), load("other"));
        assert!(one.differences(&same).is_empty());
        let difference = &one.differences(&other)[0];
        assert_eq!(difference.to_string(), "[broker] ca_file: the file holds something else (connects anew)");
        assert_ne!(one.broker.files.number(), other.broker.files.number());
        assert!(!format!("{:?}", one.broker.files).chars().any(|c| c.is_ascii_digit()));
    }
}
