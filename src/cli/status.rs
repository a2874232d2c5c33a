//! `fieldpost status`: one screen that says in words how the running agent is doing, or all of it as JSON.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::columns::{Paint, Tone, padded, printable, width};
use super::warnings::{percent, warnings};
use super::{Agent, Failure, watch};
use crate::config;
use crate::control::client;
use crate::control::wire::{Answer, Budget, Link, LinkState, Question, Status, Store, Unit};
pub(super) use crate::trouble::{grouped, span};

/// Counters that say that something is not as it should be, in words; the others are in `--json`.
const TROUBLES: [(&str, &str); 21] = [
    ("possibly_lost", "messages possibly lost"),
    ("possibly_doubled", "messages possibly doubled"),
    ("messages_not_accepted", "messages not accepted"),
    ("readings_overrun", "readings lost because the store was too slow"),
    ("polls_skipped", "polls skipped because their unit was still being read"),
    ("qos0_dropped", "QoS 0 messages dropped"),
    ("no_matching_subscribers", "messages nobody is subscribed to"),
    ("abandoned", "messages abandoned in flight"),
    ("refused_for_now", "messages refused for now"),
    ("dead_lettered", "messages given up after a refusal"),
    ("order_overtaken", "messages that overtook a refused one"),
    ("downgraded", "messages sent with less than was asked for"),
    ("retain_cleared_unknown", "backlog messages sent without retain"),
    ("acks_unexpected", "acknowledgements of nothing in flight"),
    ("inbound_refused", "inbound messages refused"),
    ("commands_over_limit", "commands above max_per_second"),
    ("command_steps_retried", "steps of commands tried again"),
    ("connect_failures", "attempts to connect that failed"),
    ("protocol_errors", "connections closed because the broker broke the protocol"),
    ("log_lines_left_out", "log lines left out"),
    ("sessions_lost", "sessions the broker has lost"),
];

/// Between two looks of `--watch`.
const INTERVAL: RangeInclusive<Duration> = Duration::from_millis(200)..=Duration::from_secs(3600);

/// `fieldpost status`
#[derive(Debug, Args)]
pub(super) struct ShowStatus {
    /// Everything, as JSON, for programs
    #[arg(long)]
    json: bool,
    /// Look again and again: a live screen, or with --json a line each time
    #[arg(long)]
    watch: bool,
    /// How often --watch looks, 200ms to 1h
    #[arg(long, value_name = "DURATION", default_value = "1s", requires = "watch", value_parser = interval)]
    interval: Duration,
    #[command(flatten)]
    agent: Agent,
    /// The agent's configuration file, which names the socket
    #[arg(conflicts_with_all = ["socket", "config"])]
    file: Option<PathBuf>,
}

fn interval(text: &str) -> Result<Duration, String> {
    config::duration(text, INTERVAL)
}

impl ShowStatus {
    pub(super) fn run(self) -> Result<(), Failure> {
        let socket = match &self.file {
            Some(file) => config::load(file)?.control.socket,
            None => self.agent.socket()?,
        };
        if self.watch {
            return watch::run(socket, self.interval, self.json);
        }
        let status = ask(&socket)?;
        let text = match self.json {
            true => serde_json::to_string_pretty(&status).map_err(client::ClientError::from)? + "\n",
            false => screen(&status, Paint::of(&io::stdout())),
        };
        io::stdout().write_all(text.as_bytes()).map_err(Failure::Output)
    }
}

/// Asks the agent that listens there how it is doing.
pub(super) fn ask(socket: &Path) -> Result<Status, Failure> {
    match client::ask(socket, &Question::Status {})? {
        Answer::Status(status) => Ok(*status),
        Answer::Refused { reason } => Err(Failure::Refused(printable(&reason))),
        _ => Err(Failure::OtherAnswer),
    }
}

/// Lines with a heading in the first column.
struct Screen {
    text: String,
    paint: Paint,
    width: usize,
}

impl Screen {
    fn line(&mut self, heading: &str, text: &str) {
        let heading = printable(heading);
        // Padded before it is painted: escape sequences have no width.
        let padded = padded(&heading, self.width);
        let painted = match heading.starts_with(' ') || heading.is_empty() {
            true => padded,
            false => self.paint.dab(Tone::Heading, &padded),
        };
        writeln!(self.text, "{}", format!("{painted}  {text}").trim_end())
            .expect("a String takes all it is given");
    }

    fn blank(&mut self) {
        self.text.push('\n');
    }
}

fn screen(status: &Status, paint: Paint) -> String {
    let unit_names = status.lines.iter().flat_map(|line| line.units.iter().map(|unit| width(&unit.name) + 2));
    let line_names = status.lines.iter().map(|line| width(&line.name));
    let names = unit_names.chain(line_names).chain([12]).max().unwrap_or(12).min(32);
    let mut screen = Screen { text: String::new(), paint, width: names };
    let title = format!("fieldpost {}, running for {}", printable(&status.version), span(status.uptime_ms));
    screen.line(&status.gateway, &title);
    screen.blank();
    warn(&mut screen, status);
    screen.blank();
    broker(&mut screen, &status.link);
    screen.blank();
    queue(&mut screen, status);
    screen.blank();
    store(&mut screen, &status.store);
    if let Some(of) = &status.budget {
        budget(&mut screen, of);
    }
    if let Some(text) = machine(status) {
        screen.line("Machine", &text);
    }
    let dropped = status.dropped.iter().map(|(reason, count)| (reason.as_str(), *count));
    let dropped = counted(dropped).unwrap_or_else(|| "nothing".to_owned());
    screen.line("Dropped", &dropped);
    commands(&mut screen, status);
    since_start(&mut screen, status);
    screen.blank();
    lines(&mut screen, status);
    screen.text
}

/// What the machine says of itself, but for what is a warning; `None` where it is not asked.
pub(super) fn machine(status: &Status) -> Option<String> {
    let told = |(name, before, after): &(&str, &str, &str)| {
        let value = status.machine.iter().find(|value| value.name == *name)?;
        let unit = value.unit.as_ref().map_or_else(String::new, |unit| format!(" {unit}"));
        let number = match value.value.as_ref().and_then(serde_json::Value::as_f64) {
            None => return Some(format!("{} unknown", name.replace('_', " "))),
            Some(number) if number < 1000.0 => number.to_string(),
            Some(number) => grouped(number as u64),
        };
        Some(format!("{before}{number}{}{after}", printable(&unit)))
    };
    let words = [
        ("cpu_temperature", "", ""),
        ("load", "load ", ""),
        ("memory_available", "", " of memory free"),
        ("disk_written_per_day", "", " written"),
        ("disk_life_used", "", " of the disk's life"),
    ];
    let words: Vec<String> = words.iter().filter_map(told).collect();
    (!words.is_empty()).then(|| words.join(", "))
}

fn warn(screen: &mut Screen, status: &Status) {
    let warnings = warnings(status);
    if warnings.is_empty() {
        let none = screen.paint.dab(Tone::Good, "none");
        screen.line("Warnings", &none);
    }
    for (at, (tone, words)) in warnings.iter().enumerate() {
        let heading = if at == 0 { "Warnings" } else { "" };
        let words = screen.paint.dab(*tone, &printable(words));
        screen.line(heading, &words);
    }
}

fn since_start(screen: &mut Screen, status: &Status) {
    let counts =
        TROUBLES.iter().map(|(name, words)| (words, status.counters.get(*name).copied().unwrap_or(0)));
    for (at, (words, count)) in counts.filter(|(_, count)| *count > 0).enumerate() {
        let heading = if at == 0 { "Since start" } else { "" };
        screen.line(heading, &format!("{words}: {}", grouped(count)));
    }
}

fn broker(screen: &mut Screen, link: &Link) {
    let age = span(link.state_age_ms);
    let state = match link.state {
        LinkState::Connected => screen.paint.dab(Tone::Good, "connected") + &format!(" for {age}"),
        LinkState::Connecting => screen.paint.dab(Tone::Waiting, "connecting") + &format!(" for {age}"),
        LinkState::Waiting => {
            let next = link.retry_in_ms.map(|ms| format!(", next attempt in {}", span(ms)));
            screen.paint.dab(Tone::Bad, "not connected") + &format!(" for {age}{}", next.unwrap_or_default())
        }
    };
    screen.line("Broker", &state);
    screen.line("", &format!("{}, MQTT {}", printable(&link.broker), printable(&link.protocol)));
    if link.state == LinkState::Connected {
        let session = match link.session_present {
            Some(true) => "session kept by the broker",
            Some(false) => "new session",
            None => "no session yet",
        };
        let (in_flight, window) = (grouped(link.in_flight), grouped(link.window));
        let text =
            format!("{session}, {in_flight} of {window} in flight, keep alive {} s", link.keep_alive_s);
        let round_trip = link.round_trip_ms.map(|ms| format!(", {}", round_trip(ms)));
        screen.line("", &(text + &round_trip.unwrap_or_default()));
    }
    for downgrade in &link.downgrades {
        let text = format!("not as asked: {}", printable(downgrade));
        screen.line("", &screen.paint.dab(Tone::Waiting, &text));
    }
    if let Some(error) = &link.last_error {
        screen.line("", &format!("last trouble: {}", printable(error)));
    }
}

fn queue(screen: &mut Screen, status: &Status) {
    let row = |messages: &str, bytes: &str, oldest: &str, in_flight: &str, full: &str| {
        format!("{messages:>12}  {bytes:>10}  {oldest:>12}  {in_flight:>9}  {full:>12}")
    };
    screen.line("Queue", &row("messages", "bytes", "oldest", "in flight", "of its limit"));
    for lane in &status.queue {
        let text = row(
            &grouped(lane.messages),
            &bytes(lane.bytes),
            &lane.oldest_age_ms.map_or("-".to_owned(), span),
            &grouped(lane.in_flight),
            &format!("{} %", percent(lane.bytes, lane.limit_bytes)),
        );
        screen.line(&format!("  {}", lane.lane), &text);
    }
}

/// Nothing where none ever came: most gateways take none.
fn commands(screen: &mut Screen, status: &Status) {
    const ENDS: [&str; 6] = ["done", "refused", "expired", "failed", "unknown", "repeated"];
    let end =
        |end: &'static str| (end, status.counters.get(&format!("commands_{end}")).copied().unwrap_or(0));
    let counts = ENDS.into_iter().map(end).chain([("waiting", status.commands_waiting)]);
    if let Some(text) = counted(counts) {
        screen.line("Commands", &text);
    }
}

fn store(screen: &mut Screen, store: &Store) {
    let state = match (store.accepting, &store.error) {
        (true, _) => screen.paint.dab(Tone::Good, "accepting"),
        (false, Some(error)) => screen.paint.dab(Tone::Bad, &format!("NOT ACCEPTING: {}", printable(error))),
        (false, None) => screen.paint.dab(Tone::Bad, "NOT ACCEPTING"),
    };
    let percent = percent(store.used_bytes, store.quota_bytes);
    let used = format!("{} of {} ({percent} %)", bytes(store.used_bytes), bytes(store.quota_bytes));
    let free = store.free_disk_bytes.map(|free| format!(", {} free on its disk", bytes(free)));
    screen.line("Store", &format!("{state}, {used}{}", free.unwrap_or_default()));
    screen.line("", &format!("{}, epoch {}", printable(&store.path), store.epoch));
}

fn budget(screen: &mut Screen, budget: &Budget) {
    let percent = percent(budget.used_bytes, budget.bytes);
    let period = if budget.per == "day" { "today" } else { "this month" };
    let used = format!("{} of {} {period} ({percent} %)", bytes(budget.used_bytes), bytes(budget.bytes));
    let state = match budget.held_back.is_empty() {
        true => used,
        false => {
            let lanes: Vec<String> = budget.held_back.iter().map(|lane| printable(lane)).collect();
            let holds = format!("holds back {}", lanes.join(" and "));
            format!("{used}, {}", screen.paint.dab(Tone::Bad, &holds))
        }
    };
    screen.line("Budget", &state);
}

fn lines(screen: &mut Screen, status: &Status) {
    for line in &status.lines {
        let state = match (line.up, &line.error) {
            (true, _) => screen.paint.dab(Tone::Good, "up"),
            (false, Some(error)) => screen.paint.dab(Tone::Bad, &format!("DOWN: {}", printable(error))),
            (false, None) => screen.paint.dab(Tone::Waiting, "not open yet"),
        };
        screen.line(&line.name, &state);
        for unit in &line.units {
            let text = unit_line(unit, screen.paint);
            screen.line(&format!("  {}", unit.name), &text);
        }
    }
}

fn unit_line(unit: &Unit, paint: Paint) -> String {
    if unit.polls == 0 {
        return paint.dab(Tone::Waiting, "not read yet");
    }
    let last = unit.last_ok_age_ms.map(span);
    let polls = format!("{} polls, {} failed", grouped(unit.polls), grouped(unit.errors));
    let reason = unit.last_error.as_deref().map(printable);
    match (unit.ok, reason) {
        (true, reason) => {
            let reason = reason.map(|reason| format!(", last: {reason}"));
            let last = last.map(|last| format!(", read {last} ago"));
            let (last, reason) = (last.unwrap_or_default(), reason.unwrap_or_default());
            format!("{}{last}; {polls}{reason}", paint.dab(Tone::Good, "ok"))
        }
        (false, reason) => {
            let since = last.map_or("since the start".to_owned(), |last| format!("for {last}"));
            let fault = format!("FAULT {since}: {}", reason.as_deref().unwrap_or("unknown"));
            format!("{}; {polls}", paint.dab(Tone::Bad, &fault))
        }
    }
}

/// `3 expired, 120 quota`; `None` when all of them are 0.
fn counted<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> Option<String> {
    let words = counts
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{} {}", grouped(count), printable(name).replace('_', " ")));
    let words: Vec<String> = words.collect();
    (!words.is_empty()).then(|| words.join(", "))
}

/// How long the broker takes to answer; milliseconds are counted whole.
pub(super) fn round_trip(ms: u64) -> String {
    if ms == 0 { "round trip below 1 ms".to_owned() } else { format!("round trip {ms} ms") }
}

/// A size in the largest binary unit that leaves at least 1 before the point.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let exponent = (bytes.ilog2() / 10) as usize;
    let size = bytes as f64 / 1024_f64.powi(exponent as i32);
    format!("{size:.1} {}", UNITS[exponent - 1])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::control::wire::{Commits, LaneQueue, Line, MachineValue, Process};

    fn lane(lane: &str, messages: u64, bytes: u64, oldest_age_ms: Option<u64>, in_flight: u64) -> LaneQueue {
        let (accepted, dropped, limit_bytes) = (messages, 0, 512 << 20);
        LaneQueue {
            lane: lane.into(),
            messages,
            bytes,
            oldest_age_ms,
            in_flight,
            accepted,
            dropped,
            limit_bytes,
            ..LaneQueue::default()
        }
    }

    fn unit(name: &str, ok: bool, error: Option<&str>, polls: u64, errors: u64, last: Option<u64>) -> Unit {
        let last_error = error.map(String::from);
        let name = name.into();
        Unit { name, ok, last_error, polls, errors, last_ok_age_ms: last, ..Unit::default() }
    }

    pub(in crate::cli) fn healthy() -> Status {
        Status {
            gateway: "press-shop-1".into(),
            version: "0.1.0".into(),
            uptime_ms: 2 * 86_400_000 + 3 * 3_600_000 + 59_000,
            link: Link {
                state: LinkState::Connected,
                state_age_ms: 3 * 3_600_000 + 12 * 60_000,
                broker: "mqtts://broker.example.com:8883".into(),
                protocol: "5".into(),
                session_present: Some(true),
                last_error: None,
                alarm: None,
                retry_in_ms: None,
                downgrades: Vec::new(),
                in_flight: 100,
                window: 1000,
                round_trip_ms: Some(23),
                keep_alive_s: 30,
            },
            queue: vec![
                lane("alarm", 0, 0, None, 0),
                lane("normal", 12_345, 2_202_010, Some(61_000), 100),
                lane("bulk", 0, 0, None, 0),
            ],
            dropped: [("quota".to_owned(), 0)].into(),
            dead_letters: 0,
            commands_waiting: 0,
            store: Store {
                path: "/var/lib/fieldpost/outbox.db".into(),
                quota_bytes: 512 << 20,
                used_bytes: 2_202_010,
                free_disk_bytes: Some(13_207_000_000),
                epoch: 3,
                accepting: true,
                error: None,
                database_bytes: 2_400_256,
                log_bytes: 1_049_000,
                commits: Commits::default(),
            },
            budget: None,
            lines: vec![Line {
                name: "line1".into(),
                up: true,
                error: None,
                units: vec![
                    unit("meter1", true, None, 3600, 0, Some(1_200)),
                    unit("m2", false, None, 0, 0, None),
                ],
            }],
            machine: Vec::new(),
            counters: [("samples_read".to_owned(), 7200), ("possibly_lost".to_owned(), 0)].into(),
            process: Process::default(),
        }
    }

    pub(in crate::cli) fn troubled() -> Status {
        let mut status = healthy();
        status.link = Link {
            state: LinkState::Waiting,
            retry_in_ms: Some(12_000),
            last_error: Some("CONNACK 0x87 Not authorized: check\u{1b}[2J user name and password".into()),
            downgrades: vec!["QoS 2 is sent as QoS 1".into()],
            ..status.link
        };
        status.dropped = [("expired".to_owned(), 3), ("quota".to_owned(), 1_200)].into();
        status.dead_letters = 2;
        status.budget = Some(Budget {
            used_bytes: 51 << 20,
            bytes: 50 << 20,
            per: "month".into(),
            held_back: vec!["normal".into(), "bulk".into()],
        });
        status.commands_waiting = 3;
        let told = |(name, value, unit): (&str, Option<serde_json::Value>, Option<&str>)| MachineValue {
            name: name.into(),
            error: value.is_none().then(|| "cannot be read: Input/output error".to_owned()),
            value,
            unit: unit.map(str::to_owned),
        };
        let values = [
            ("cpu_temperature", Some(81.5.into()), Some("°C")),
            ("under_voltage", Some(true.into()), None),
            ("load", Some(0.52.into()), None),
            ("memory_available", Some(3072.into()), Some("MiB")),
            ("disk_written_per_day", None, Some("MiB/d")),
        ];
        status.machine = values.map(told).into();
        status.store.accepting = false;
        status.store.error = Some("the disk is full".into());
        let counters =
            [("possibly_lost", 1), ("protocol_errors", 4), ("commands_done", 7), ("commands_unknown", 1)];
        status.counters = counters.map(|(name, count)| (name.to_owned(), count)).into();
        status.lines[0].units = vec![
            unit("meter1", true, Some("no answer within 1000 ms"), 3600, 2, Some(1_200)),
            unit("meter2", false, Some("no answer within 1000 ms"), 120, 120, None),
        ];
        let error = Some("cannot open /dev/ttyUSB0: No such file or directory".into());
        status.lines.push(Line { name: "line2".into(), up: false, error, units: Vec::new() });
        status
    }

    #[test]
    fn golden_screen_of_a_healthy_agent() {
        assert_eq!(
            screen(&healthy(), Paint { colours: false }),
            "\
press-shop-1  fieldpost 0.1.0, running for 2 d 3 h

Warnings      none

Broker        connected for 3 h 12 min
              mqtts://broker.example.com:8883, MQTT 5
              session kept by the broker, 100 of 1,000 in flight, keep alive 30 s, round trip 23 ms

Queue             messages       bytes        oldest  in flight  of its limit
  alarm                  0         0 B             -          0           0 %
  normal            12,345     2.1 MiB     1 min 1 s        100           0 %
  bulk                   0         0 B             -          0           0 %

Store         accepting, 2.1 MiB of 512.0 MiB (0 %), 12.3 GiB free on its disk
              /var/lib/fieldpost/outbox.db, epoch 3
Dropped       nothing

line1         up
  meter1      ok, read 1 s ago; 3,600 polls, 0 failed
  m2          not read yet
"
        );
    }

    #[test]
    fn golden_screen_of_an_agent_in_trouble() {
        assert_eq!(
            screen(&troubled(), Paint { colours: false }),
            "\
press-shop-1  fieldpost 0.1.0, running for 2 d 3 h

Warnings      nothing is accepted: the disk is full
              no connection to the broker for 3 h 12 min: CONNACK 0x87 Not authorized: check\u{fffd}[2J user name and password; 12,345 messages wait
              line1/meter2 has never been well: no answer within 1000 ms
              line line2 is down: cannot open /dev/ttyUSB0: No such file or directory
              the power supply is too weak (under-voltage): check the supply and its cable
              the byte budget of this month is used up: normal and bulk wait
              2 given up after a refusal by the broker: fieldpost queue ls --dead
              1 message may be lost: the broker forgot the session

Broker        not connected for 3 h 12 min, next attempt in 12 s
              mqtts://broker.example.com:8883, MQTT 5
              not as asked: QoS 2 is sent as QoS 1
              last trouble: CONNACK 0x87 Not authorized: check\u{fffd}[2J user name and password

Queue             messages       bytes        oldest  in flight  of its limit
  alarm                  0         0 B             -          0           0 %
  normal            12,345     2.1 MiB     1 min 1 s        100           0 %
  bulk                   0         0 B             -          0           0 %

Store         NOT ACCEPTING: the disk is full, 2.1 MiB of 512.0 MiB (0 %), 12.3 GiB free on its disk
              /var/lib/fieldpost/outbox.db, epoch 3
Budget        51.0 MiB of 50.0 MiB this month (102 %), holds back normal and bulk
Machine       81.5 °C, load 0.52, 3,072 MiB of memory free, disk written per day unknown
Dropped       3 expired, 1,200 quota
Commands      7 done, 1 unknown, 3 waiting
Since start   messages possibly lost: 1
              connections closed because the broker broke the protocol: 4

line1         up
  meter1      ok, read 1 s ago; 3,600 polls, 2 failed, last: no answer within 1000 ms
  meter2      FAULT since the start: no answer within 1000 ms; 120 polls, 120 failed
line2         DOWN: cannot open /dev/ttyUSB0: No such file or directory
"
        );
    }

    #[test]
    fn colours_change_nothing_but_colours() {
        for status in [healthy(), troubled()] {
            let painted = screen(&status, Paint { colours: true });
            assert!(painted.contains("\x1b[32mup\x1b[0m"), "{painted:?}");
            let mut plain = painted;
            for code in ["\x1b[32m", "\x1b[33m", "\x1b[31;1m", "\x1b[1m", "\x1b[0m"] {
                plain = plain.replace(code, "");
            }
            assert_eq!(plain, screen(&status, Paint { colours: false }));
        }
    }

    #[test]
    fn every_trouble_is_a_counter() {
        let stats = crate::stats::Stats::default();
        for (name, _) in TROUBLES {
            assert!(stats.all().iter().any(|(counter, _)| *counter == name), "{name}");
        }
    }

    #[test]
    fn the_status_survives_its_journey() {
        let json = serde_json::to_string(&Answer::Status(Box::new(troubled()))).expect("text keys");
        let back: Answer = serde_json::from_str(&json).expect("our own words");
        assert_eq!(back, Answer::Status(Box::new(troubled())));
    }

    #[test]
    fn amounts_are_readable() {
        for (ms, text) in [
            (0, "0 s"),
            (59_999, "59 s"),
            (60_000, "1 min 0 s"),
            (3_599_999, "59 min 59 s"),
            (3_600_000, "1 h 0 min"),
            (86_400_000, "1 d 0 h"),
            (u64::MAX, "213503982334 d 14 h"),
        ] {
            assert_eq!(span(ms), text);
        }
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1 << 40, "1.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(size), text);
        }
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(count), text);
        }
    }
}
