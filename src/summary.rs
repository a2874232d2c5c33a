//! How the agent is, in one line: for `systemctl status`.
//!
//! Invariant: what is wrong comes with its reason, and the line stays one that can be read at a glance.

use std::fmt::Write as _;

use crate::source::modbus::LineStatus;
use crate::uplink::connection::{LinkState, LinkStatus};

/// Units and lines that are named with what is wrong with them.
const NAMED_MAX: usize = 3;
/// Longest reason, in characters.
const REASON_CHARS_MAX: usize = 160;

/// What is known of the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Queue {
    /// Messages in it, and why no more are accepted, if so.
    Holds(u64, Option<String>),
    /// It cannot be read, for this reason.
    Unreadable(String),
}

/// Link, queue and units.
pub fn summary(link: &LinkStatus, queue: &Queue, lines: &[LineStatus]) -> String {
    let mut text = link_words(link);
    // Writing to a String cannot fail.
    let _ = match queue {
        Queue::Holds(messages, None) => write!(text, ", {messages} queued"),
        Queue::Holds(messages, Some(why)) => {
            write!(text, ", {messages} queued, nothing is accepted: {}", short(why))
        }
        Queue::Unreadable(why) => write!(text, ", the queue cannot be read: {}", short(why)),
    };
    text + &units_words(lines)
}

fn link_words(link: &LinkStatus) -> String {
    match (&link.state, &link.last_error) {
        (LinkState::Connected, _) => format!("connected to {}", link.broker),
        (_, None) => format!("connecting to {}", link.broker),
        (_, Some(why)) => format!("no connection to {}: {}", link.broker, short(why)),
    }
}

fn units_words(lines: &[LineStatus]) -> String {
    let units = lines.iter().map(|line| line.units.len()).sum::<usize>();
    if units == 0 {
        return String::new();
    }
    let well = lines.iter().flat_map(|line| &line.units).filter(|unit| unit.ok).count();
    let noun = if units == 1 { "unit answers" } else { "units answer" };
    let mut text = format!(", {well} of {units} {noun}");
    let bad: Vec<String> = lines.iter().flat_map(bad_words).collect();
    if !bad.is_empty() {
        text += "; ";
        text += &bad[..bad.len().min(NAMED_MAX)].join("; ");
    }
    if bad.len() > NAMED_MAX {
        let _ = write!(text, "; and {} more", bad.len() - NAMED_MAX);
    }
    text
}

/// What is wrong on a line: that it is down, or which of its units have been asked in vain.
fn bad_words(line: &LineStatus) -> Vec<String> {
    if let (false, Some(why)) = (line.up, &line.error) {
        return vec![format!("{} is down: {}", line.name, short(why))];
    }
    let bad = line.units.iter().filter(|unit| !unit.ok && unit.polls > 0);
    bad.map(|unit| {
        let why = unit.last_error.as_deref().unwrap_or("it failed");
        format!("{}/{}: {}", line.name, unit.name, short(why))
    })
    .collect()
}

fn short(reason: &str) -> String {
    match reason.char_indices().nth(REASON_CHARS_MAX) {
        None => reason.to_owned(),
        Some((end, _)) => format!("{}…", &reason[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::modbus::UnitStatus;

    fn link(state: LinkState, last_error: Option<&str>) -> LinkStatus {
        LinkStatus {
            broker: "mqtts://b:8883".into(),
            protocol: "5",
            state,
            since_mono_ms: 0,
            last_error: last_error.map(str::to_owned),
            downgrades: Vec::new(),
            in_flight: 0,
            window: 1000,
            round_trip_ms: None,
            session_present: None,
            alarm: None,
            keep_alive_s: 0,
        }
    }

    /// A line whose units were asked; with an error, one that is not well.
    fn line(name: &str, units: &[(&str, Option<&str>)]) -> LineStatus {
        let unit = |(name, error): &(&str, Option<&str>)| UnitStatus {
            name: (*name).into(),
            ok: error.is_none(),
            last_error: error.map(str::to_owned),
            polls: 1,
            ..UnitStatus::default()
        };
        LineStatus { name: name.into(), up: true, error: None, units: units.iter().map(unit).collect() }
    }

    fn down(name: &str, units: &[&str]) -> LineStatus {
        let unit = |name: &&str| UnitStatus { name: (*name).into(), ..UnitStatus::default() };
        let error = Some("/dev/ttyUSB0 is missing".to_owned());
        LineStatus { name: name.into(), up: false, error, units: units.iter().map(unit).collect() }
    }

    fn asked_never(name: &str, units: &[&str]) -> LineStatus {
        LineStatus { up: true, error: None, ..down(name, units) }
    }

    #[test]
    fn a_line_says_what_a_person_wants_to_know() {
        let up = || link(LinkState::Connected, None);
        let waiting = LinkState::Waiting { until_mono_ms: 5 };
        let holds = |messages| Queue::Holds(messages, None);
        for (link, queue, lines, expected) in [
            (up(), holds(0), vec![], "connected to mqtts://b:8883, 0 queued"),
            (link(LinkState::Connecting, None), holds(7), vec![], "connecting to mqtts://b:8883, 7 queued"),
            (
                link(waiting, Some("cannot resolve \"b\"")),
                holds(7),
                vec![],
                "no connection to mqtts://b:8883: cannot resolve \"b\", 7 queued",
            ),
            (
                link(LinkState::Connecting, Some("no CONNACK within 20 s")),
                holds(7),
                vec![],
                "no connection to mqtts://b:8883: no CONNACK within 20 s, 7 queued",
            ),
            (
                up(),
                Queue::Holds(3, Some("the disk is full".into())),
                vec![],
                "connected to mqtts://b:8883, 3 queued, nothing is accepted: the disk is full",
            ),
            (
                up(),
                Queue::Unreadable("gone".into()),
                vec![],
                "connected to mqtts://b:8883, the queue cannot be read: gone",
            ),
            (
                up(),
                holds(0),
                vec![line("line1", &[("a", None), ("b", None)]), line("line2", &[("c", None)])],
                "connected to mqtts://b:8883, 0 queued, 3 of 3 units answer",
            ),
            (
                up(),
                holds(0),
                vec![line("line1", &[("a", None)])],
                "connected to mqtts://b:8883, 0 queued, 1 of 1 unit answers",
            ),
            (
                up(),
                holds(0),
                vec![line("line1", &[("a", None), ("b", Some("no answer within 1000 ms"))])],
                "connected to mqtts://b:8883, 0 queued, 1 of 2 units answer; line1/b: no answer within 1000 ms",
            ),
            (
                up(),
                holds(0),
                vec![down("line1", &["a", "b"]), line("line2", &[("c", None)])],
                "connected to mqtts://b:8883, 0 queued, 1 of 3 units answer; line1 is down: /dev/ttyUSB0 is missing",
            ),
            (
                up(),
                holds(0),
                vec![asked_never("line1", &["a", "b"])],
                "connected to mqtts://b:8883, 0 queued, 0 of 2 units answer",
            ),
            (
                up(),
                holds(0),
                vec![line("l", &[("a", Some("x")), ("b", Some("x")), ("c", Some("x")), ("d", Some("x"))])],
                "connected to mqtts://b:8883, 0 queued, 0 of 4 units answer; l/a: x; l/b: x; l/c: x; and 1 more",
            ),
        ] {
            assert_eq!(summary(&link, &queue, &lines), expected);
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let link = link(LinkState::Connecting, Some(&"ü".repeat(500)));
        let text = summary(&link, &Queue::Holds(0, None), &[]);
        assert_eq!(
            text,
            format!("no connection to mqtts://b:8883: {}…, 0 queued", "ü".repeat(REASON_CHARS_MAX))
        );
    }
}
