//! What the agent says of itself, as OpenMetrics text (OpenMetrics 1.0.0).
//!
//! Everything comes from the same [`Status`] that `fieldpost status` shows. Names are the contract of dashboards and
//! alarms: they may be added to, and are not changed. Invariant: whatever the names of lines and units hold, the text
//! can be read.

use std::fmt::{Display, Write as _};

use crate::control::wire::{Commits, LaneQueue, Line, Link, LinkState, Process, Status};
use crate::stats::Stats;

/// The media type of [`render`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The whole page.
pub fn render(status: &Status) -> String {
    let mut page = Page { text: String::with_capacity(16 << 10) };
    agent(&mut page, status);
    link(&mut page, &status.link);
    queue(&mut page, status);
    store(&mut page, status);
    lines(&mut page, &status.lines);
    counters(&mut page, status);
    page.text.push_str("# EOF\n");
    page.text
}

struct Page {
    text: String,
}

/// A text takes all it is given.
const FITS: &str = "a String takes all it is given";

impl Page {
    /// Begins a metric family. Names that end in a unit say so once more, as the format wants it.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        writeln!(self.text, "# TYPE {name} {kind}").expect(FITS);
        if let Some(unit) = ["seconds", "bytes"].into_iter().find(|unit| name.ends_with(&format!("_{unit}")))
        {
            writeln!(self.text, "# UNIT {name} {unit}").expect(FITS);
        }
        writeln!(self.text, "# HELP {name} {}", Escaped(help)).expect(FITS);
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(name);
        for (at, (label, of)) in labels.iter().enumerate() {
            let before = if at == 0 { '{' } else { ',' };
            write!(self.text, "{before}{label}=\"{}\"", Escaped(of)).expect(FITS);
        }
        let end = if labels.is_empty() { "" } else { "}" };
        writeln!(self.text, "{end} {value}").expect(FITS);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "counter", help);
        self.sample(&format!("{name}_total"), &[], value);
    }

    /// One value for each lane.
    fn by_lane(&mut self, name: &str, help: &str, status: &Status, value: impl Fn(&LaneQueue) -> f64) {
        self.family(name, "gauge", help);
        for lane in &status.queue {
            self.sample(name, &[("lane", &lane.lane)], value(lane));
        }
    }

    /// One value for each unit that has one.
    fn by_unit(
        &mut self,
        (name, kind, help): (&str, &str, &str),
        lines: &[Line],
        value: impl Fn(&crate::control::wire::Unit) -> Option<f64>,
    ) {
        self.family(name, kind, help);
        let name = if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
        for line in lines {
            for unit in &line.units {
                if let Some(value) = value(unit) {
                    self.sample(&name, &[("line", &line.name), ("unit", &unit.name)], value);
                }
            }
        }
    }
}

/// Label values and help texts in quotes or on one line.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                // A carriage return is a line's end to some who read it.
                other if other.is_control() => f.write_char(' ')?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1e3
}

fn agent(page: &mut Page, status: &Status) {
    page.family("fieldpost_build", "info", "The agent's version.");
    page.sample("fieldpost_build_info", &[("version", &status.version), ("gateway", &status.gateway)], 1);
    page.gauge("fieldpost_uptime_seconds", "How long the agent has been running.", seconds(status.uptime_ms));
    let Process { resident_bytes, cpu_ms, written_bytes } = status.process;
    page.counter("process_cpu_seconds", "Time the agent's threads had a processor.", seconds(cpu_ms));
    if let Some(bytes) = resident_bytes {
        page.gauge("process_resident_memory_bytes", "Memory the agent holds.", bytes);
    }
    if let Some(bytes) = written_bytes {
        page.counter("fieldpost_disk_written_bytes", "Bytes the agent had written to disks.", bytes);
    }
}

fn link(page: &mut Page, link: &Link) {
    let is = |state| u8::from(link.state == state);
    let age = seconds(link.state_age_ms);
    let up = is(LinkState::Connected);
    page.gauge("fieldpost_link_up", "Whether the broker is connected.", up);
    page.family("fieldpost_link_state", "stateset", "What the connection to the broker is doing.");
    let states = [
        ("connected", LinkState::Connected),
        ("connecting", LinkState::Connecting),
        ("waiting", LinkState::Waiting),
    ];
    for (name, state) in states {
        page.sample("fieldpost_link_state", &[("fieldpost_link_state", name)], is(state));
    }
    let connected = if up == 1 { age } else { 0.0 };
    page.gauge(
        "fieldpost_link_connected_seconds",
        "How long the connection has lasted; 0 without.",
        connected,
    );
    let down = if up == 1 { 0.0 } else { age };
    page.gauge("fieldpost_link_down_seconds", "How long there has been none; 0 with.", down);
    page.gauge("fieldpost_in_flight_messages", "Messages sent and not finally acknowledged.", link.in_flight);
}

fn queue(page: &mut Page, status: &Status) {
    let messages = |lane: &LaneQueue| lane.messages as f64;
    page.by_lane("fieldpost_queue_messages", "Messages waiting or in flight.", status, messages);
    page.by_lane("fieldpost_queue_bytes", "Their bytes.", status, |lane| lane.bytes as f64);
    page.by_lane("fieldpost_queue_in_flight_messages", "Those in flight.", status, |lane| {
        lane.in_flight as f64
    });
    page.by_lane("fieldpost_queue_oldest_age_seconds", "Age of the oldest; 0 when empty.", status, |lane| {
        seconds(lane.oldest_age_ms.unwrap_or(0))
    });
    let refusing = "Whether a message would be refused because a limit is reached.";
    page.by_lane("fieldpost_queue_refusing", refusing, status, |lane| {
        f64::from(u8::from(lane.refusing.is_some()))
    });
    let dropped = "Messages that limits or damage took, since the database was made.";
    page.family("fieldpost_dropped_messages", "counter", dropped);
    for lane in &status.queue {
        for (reason, count) in &lane.dropped_by_reason {
            let labels = [("lane", lane.lane.as_str()), ("reason", reason)];
            page.sample("fieldpost_dropped_messages_total", &labels, count);
        }
    }
    page.gauge("fieldpost_dead_letters", "Messages given up after a refusal and kept.", status.dead_letters);
    page.gauge(
        "fieldpost_commands_waiting",
        "Commands recorded and not begun or answered.",
        status.commands_waiting,
    );
    if let Some(budget) = &status.budget {
        page.gauge("fieldpost_budget_bytes", "Bytes of one period of the link's budget.", budget.bytes);
        page.gauge("fieldpost_budget_used_bytes", "Those used in this period.", budget.used_bytes);
    }
}

fn store(page: &mut Page, status: &Status) {
    let store = &status.store;
    let accepting = u8::from(store.accepting);
    page.gauge("fieldpost_store_accepting", "Whether the database can be written.", accepting);
    page.gauge("fieldpost_store_quota_bytes", "Bytes of messages it may hold.", store.quota_bytes);
    page.gauge("fieldpost_store_used_bytes", "Bytes of messages it holds.", store.used_bytes);
    page.gauge("fieldpost_store_database_bytes", "Bytes of the database file.", store.database_bytes);
    page.gauge("fieldpost_store_log_bytes", "Bytes of its write-ahead log.", store.log_bytes);
    page.gauge(
        "fieldpost_store_epoch",
        "The database's epoch; it changes when a copy was restored.",
        store.epoch,
    );
    let Commits { number, total_us, up_to_us } = &store.commits;
    let name = "fieldpost_commit_seconds";
    page.family(name, "histogram", "How long commits took.");
    let bucket = format!("{name}_bucket");
    for (us, count) in up_to_us {
        page.sample(&bucket, &[("le", &format!("{:?}", *us as f64 / 1e6))], count);
    }
    page.sample(&bucket, &[("le", "+Inf")], number);
    page.sample(&format!("{name}_sum"), &[], *total_us as f64 / 1e6);
    page.sample(&format!("{name}_count"), &[], number);
}

fn lines(page: &mut Page, lines: &[Line]) {
    page.family("fieldpost_line_up", "gauge", "Whether the port or connection is open.");
    for line in lines {
        page.sample("fieldpost_line_up", &[("line", &line.name)], u8::from(line.up));
    }
    let up = ("fieldpost_unit_up", "gauge", "Whether every point was good when last read.");
    page.by_unit(up, lines, |unit| Some(f64::from(u8::from(unit.ok))));
    let age = ("fieldpost_unit_last_good_age_seconds", "gauge", "How long ago the last good poll was.");
    page.by_unit(age, lines, |unit| unit.last_ok_age_ms.map(seconds));
    let polls = ("fieldpost_polls", "counter", "How often points were due and the unit was asked.");
    page.by_unit(polls, lines, |unit| Some(unit.polls as f64));
    page.family(
        "fieldpost_poll_errors",
        "counter",
        "Polls with a bad sample, by the kind of the first fault.",
    );
    for line in lines {
        for unit in &line.units {
            for (kind, count) in &unit.errors_by_kind {
                let labels = [("line", line.name.as_str()), ("unit", &unit.name), ("kind", kind)];
                page.sample("fieldpost_poll_errors_total", &labels, count);
            }
        }
    }
}

/// Every counter under its own name.
fn counters(page: &mut Page, status: &Status) {
    for (name, count) in &status.counters {
        let help = Stats::meaning(name).unwrap_or("A counter of a newer agent.");
        let family = format!("fieldpost_{name}");
        page.family(&family, "counter", help);
        let total = format!("{family}_total");
        // Two are known by lane.
        let of: fn(&LaneQueue) -> u64 = match name.as_str() {
            "messages_accepted" => |lane| lane.accepted_since_start,
            "messages_delivered" => |lane| lane.delivered_since_start,
            _ => {
                page.sample(&total, &[], count);
                continue;
            }
        };
        for lane in &status.queue {
            page.sample(&total, &[("lane", &lane.lane)], of(lane));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{Store, Unit};

    fn status() -> Status {
        let lane = |lane: &str, accepted| LaneQueue {
            lane: lane.into(),
            accepted_since_start: accepted,
            ..LaneQueue::default()
        };
        let mut bulk = lane("bulk", 7);
        bulk.dropped_by_reason = [("quota".to_owned(), 3)].into();
        let unit = Unit {
            name: "a\"b\\c\n\r".into(),
            polls: 10,
            errors: 2,
            errors_by_kind: [("timeout".to_owned(), 2)].into(),
            ..Unit::default()
        };
        Status {
            gateway: "g".into(),
            version: "0.1.0".into(),
            uptime_ms: 1_500,
            link: Link {
                state: LinkState::Waiting,
                state_age_ms: 2_000,
                broker: "mqtt://b".into(),
                protocol: "5".into(),
                session_present: None,
                last_error: None,
                alarm: None,
                retry_in_ms: None,
                downgrades: Vec::new(),
                in_flight: 0,
                window: 1000,
                round_trip_ms: None,
                keep_alive_s: 30,
            },
            queue: vec![lane("alarm", 5), lane("normal", 6), bulk],
            dropped: [("quota".to_owned(), 3)].into(),
            dead_letters: 0,
            commands_waiting: 0,
            store: Store {
                path: "/x".into(),
                quota_bytes: 1 << 20,
                used_bytes: 0,
                free_disk_bytes: None,
                epoch: 1,
                accepting: true,
                error: None,
                database_bytes: 4096,
                log_bytes: 0,
                commits: Commits { number: 3, total_us: 7_500, up_to_us: vec![(500, 1), (10_000_000, 2)] },
            },
            budget: None,
            lines: vec![Line { name: "l".into(), up: true, error: None, units: vec![unit] }],
            machine: Default::default(),
            counters: [("messages_accepted".to_owned(), 18), ("connects".to_owned(), 4)].into(),
            process: Process { resident_bytes: None, cpu_ms: 10, written_bytes: Some(4096) },
        }
    }

    #[test]
    fn the_page_holds_what_the_status_says() {
        let page = render(&status());
        for line in [
            "fieldpost_build_info{version=\"0.1.0\",gateway=\"g\"} 1",
            "fieldpost_uptime_seconds 1.5",
            "# UNIT fieldpost_uptime_seconds seconds",
            "fieldpost_link_up 0",
            "fieldpost_link_state{fieldpost_link_state=\"waiting\"} 1",
            "fieldpost_link_down_seconds 2",
            "fieldpost_dropped_messages_total{lane=\"bulk\",reason=\"quota\"} 3",
            "fieldpost_messages_accepted_total{lane=\"normal\"} 6",
            "# HELP fieldpost_messages_accepted Messages the store accepted.",
            "fieldpost_connects_total 4",
            "fieldpost_commit_seconds_bucket{le=\"0.0005\"} 1",
            "fieldpost_commit_seconds_bucket{le=\"10.0\"} 2",
            "fieldpost_commit_seconds_bucket{le=\"+Inf\"} 3",
            "fieldpost_commit_seconds_sum 0.0075",
            "fieldpost_poll_errors_total{line=\"l\",unit=\"a\\\"b\\\\c\\n \",kind=\"timeout\"} 2",
            "fieldpost_disk_written_bytes_total 4096",
        ] {
            assert!(page.lines().any(|other| other == line), "{line} is not in\n{page}");
        }
        assert!(page.ends_with("# EOF\n") && !page.contains("resident"), "{page}");
    }

    #[test]
    fn no_metric_family_stands_there_twice() {
        let page = render(&status());
        let mut names: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count, "{page}");
    }
}
