//! What the live screen shows: samples and a size become rows. Pure.
//!
//! Invariant: there are never more rows than the window has, and what is wrong outlasts what is well in a small one. A rate is
//! always between two samples of one start of the agent.

use super::super::columns::{Row, Tone, cut, padded, to_the_right, width, wrapped};
use super::super::status::{bytes, grouped, machine, round_trip, span};
use super::super::warnings::{percent, warnings};
use crate::control::wire::{LaneQueue, Line, LinkState, Status, Unit};

/// The column at which texts begin, behind their headings.
const TEXT: usize = 10;
/// Names of lines and units get at most this many columns.
const NAME_MAX: usize = 24;
/// Blocks of a bar.
const BAR: u64 = 10;

/// A window's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// What there is to show.
#[derive(Debug, Clone, Copy)]
pub(super) enum View<'a> {
    /// The agent has answered.
    Live {
        /// Its last answer.
        status: &'a Status,
        /// What happened between that and an earlier one.
        rates: Option<&'a Rates>,
    },
    /// It does not.
    Gone {
        /// In words.
        reason: &'a str,
        /// For how long.
        for_ms: u64,
        /// Whether it has answered before.
        was_there: bool,
    },
}

/// What happened in a second, on average between two samples.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rates {
    /// Messages into and out of each lane, in the order of the status.
    lanes: Vec<(f64, f64)>,
    samples: f64,
    accepted: f64,
    delivered: f64,
    dropped: f64,
    sent_bytes: f64,
    commits: f64,
    /// Milliseconds of one commit; `None` when there was none.
    commit_ms: Option<f64>,
}

impl Rates {
    /// `None` when the two are of different starts or databases, or no time passed.
    pub(super) fn between(before: &Status, after: &Status) -> Option<Rates> {
        let ms = after.uptime_ms.checked_sub(before.uptime_ms).filter(|ms| *ms > 0)?;
        if before.store.epoch != after.store.epoch {
            return None;
        }
        let per_second = |count: u64| count as f64 * 1000.0 / ms as f64;
        let count = |of: &Status, name: &str| of.counters.get(name).copied().unwrap_or(0);
        let counted = |name| count(after, name).saturating_sub(count(before, name));
        let dropped = |of: &Status| of.queue.iter().map(|lane| lane.dropped).sum::<u64>();
        let lane = |after: &LaneQueue| {
            let before = before.queue.iter().find(|before| before.lane == after.lane)?;
            let accepted = after.accepted.saturating_sub(before.accepted);
            let left = (before.messages + accepted).saturating_sub(after.messages);
            let dropped = after.dropped.saturating_sub(before.dropped);
            Some((per_second(accepted), per_second(left.saturating_sub(dropped))))
        };
        let commits = counted("commits");
        Some(Rates {
            lanes: after.queue.iter().map(lane).collect::<Option<_>>()?,
            samples: per_second(counted("samples_read")),
            accepted: per_second(counted("messages_accepted")),
            delivered: per_second(counted("messages_delivered")),
            dropped: per_second(dropped(after).saturating_sub(dropped(before))),
            sent_bytes: per_second(counted("link_bytes_sent")),
            commits: per_second(commits),
            commit_ms: (commits > 0).then(|| counted("commit_us") as f64 / 1000.0 / commits as f64),
        })
    }
}

/// The rows for a window of this size, from the top.
pub(super) fn rows(view: View<'_>, size: Size) -> Vec<Row> {
    let mut rows = match view {
        View::Live { status, rates } => live(status, rates, size),
        View::Gone { reason, for_ms, was_there } => gone(reason, for_ms, was_there, size.columns),
    };
    rows.truncate(size.rows);
    rows
}

fn gone(reason: &str, for_ms: u64, was_there: bool, columns: usize) -> Vec<Row> {
    let words = match was_there {
        true => format!("The agent has not answered for {}.", span(for_ms)),
        false => "The agent does not answer.".to_owned(),
    };
    let mut rows = vec![Row::default().toned(Tone::Bad, &words), Row::default()];
    rows.extend(wrapped(reason, columns).iter().map(|line| Row::of(line)));
    rows.push(Row::default());
    let promise = "It is asked again and again; this screen comes back with it. q or Ctrl-C ends.";
    rows.extend(wrapped(promise, columns).iter().map(|line| Row::of(line)));
    rows
}

fn live(status: &Status, rates: Option<&Rates>, size: Size) -> Vec<Row> {
    let mut rows = vec![title(status, size.columns), Row::default()];
    rows.extend(fitting(troubles(status), (size.rows / 3).max(2), "more of these"));
    rows.push(Row::default());
    link(&mut rows, status, rates);
    rows.push(Row::default());
    lanes(&mut rows, status, rates);
    rows.push(flow(rates));
    store(&mut rows, status, rates);
    rows.extend(machine(status).map(|words| heading("Machine").text(&words)));
    rows.push(Row::default());
    let room = size.rows.saturating_sub(rows.len());
    rows.extend(fitting(field(status), room, "more lines and units"));
    rows
}

/// How much a row is needed, the most needed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Bad,
    Heading,
    Well,
}

/// As many of the rows as there is room for, in their order; where some are left out, the last one says so.
fn fitting(rows: Vec<(Need, Row)>, room: usize, what: &str) -> Vec<Row> {
    if rows.len() <= room {
        return rows.into_iter().map(|(_, row)| row).collect();
    }
    let shown = room.saturating_sub(1);
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.sort_by_key(|place| rows[*place].0);
    places.truncate(shown);
    places.sort_unstable();
    let missing = rows.len() - shown;
    let mut fitting: Vec<Row> = places.into_iter().map(|place| rows[place].1.clone()).collect();
    if room > 0 {
        fitting.push(Row::of(&format!("  and {missing} {what}")));
    }
    fitting
}

/// The gateway's name, and as much of the rest as there is room for.
fn title(status: &Status, columns: usize) -> Row {
    let running = format!("running for {}", span(status.uptime_ms));
    let left = columns.saturating_sub(width(&status.gateway) + 2);
    let right = [format!("fieldpost {}, {running}", status.version), running];
    let right = right.iter().find(|text| width(text) <= left).map_or("", |text| text);
    let row = Row::default().toned(Tone::Heading, &status.gateway);
    row.at(columns.saturating_sub(width(right))).text(right)
}

fn heading(text: &str) -> Row {
    Row::default().toned(Tone::Heading, text).at(TEXT)
}

fn link(rows: &mut Vec<Row>, status: &Status, rates: Option<&Rates>) {
    let link = &status.link;
    let age = span(link.state_age_ms);
    let row = heading("Broker");
    let row = match link.state {
        LinkState::Connected => row.toned(Tone::Good, "connected").text(&format!(" for {age}")),
        LinkState::Connecting => row.toned(Tone::Waiting, "connecting").text(&format!(" for {age}")),
        LinkState::Waiting => {
            let next = link.retry_in_ms.map(|ms| format!(", next attempt in {}", span(ms)));
            row.toned(Tone::Bad, "not connected").text(&format!(" for {age}{}", next.unwrap_or_default()))
        }
    };
    rows.push(row.text(&format!(", {}, MQTT {}", link.broker, link.protocol)));
    if link.state == LinkState::Connected {
        let answers = match link.round_trip_ms {
            Some(ms) => round_trip(ms),
            None => "round trip not known yet".to_owned(),
        };
        let flight = format!("in flight {} of {}", grouped(link.in_flight), grouped(link.window));
        let sent = rates.map(|rates| format!(", {}/s", bytes(rates.sent_bytes as u64))).unwrap_or_default();
        let bar = bar(link.in_flight, link.window);
        rows.push(heading("").text(&format!("{answers}, {flight} {bar}{sent}")));
    }
}

fn lanes(rows: &mut Vec<Row>, status: &Status, rates: Option<&Rates>) {
    let columns = |messages: &str, bytes: &str, oldest: &str, into: &str, out: &str| {
        let cell = |text: &str, columns| to_the_right(text, columns);
        let queue = format!("{} {} {}", cell(messages, 10), cell(bytes, 10), cell(oldest, 11));
        format!("{queue} {} {}  ", cell(into, 7), cell(out, 7))
    };
    rows.push(
        heading("Lanes").text(&columns("messages", "bytes", "oldest", "in/s", "out/s")).text("of its limit"),
    );
    for (at, lane) in status.queue.iter().enumerate() {
        let rates = rates.and_then(|rates| rates.lanes.get(at));
        let oldest = lane.oldest_age_ms.map_or("-".to_owned(), span);
        let (into, out) =
            rates.map_or(("-".to_owned(), "-".to_owned()), |(into, out)| (rate(*into), rate(*out)));
        let row = Row::of(&format!("  {}", lane.lane)).at(TEXT);
        let row = row.text(&columns(&grouped(lane.messages), &bytes(lane.bytes), &oldest, &into, &out));
        let full = percent(lane.bytes, lane.limit_bytes);
        let text = format!("{} {full} %", bar(lane.bytes, lane.limit_bytes));
        rows.push(if full >= 80 { row.toned(Tone::Bad, &text) } else { row.text(&text) });
    }
    if status.queue.is_empty() {
        rows.push(heading("").toned(Tone::Bad, "the queue cannot be read"));
    }
}

fn flow(rates: Option<&Rates>) -> Row {
    let row = heading("Flow");
    let Some(rates) = rates else { return row.text("the first rates come with the next sample") };
    let text = format!(
        "{} samples/s, {} accepted/s, {} delivered/s, ",
        rate(rates.samples),
        rate(rates.accepted),
        rate(rates.delivered)
    );
    let dropped = format!("{} dropped/s", rate(rates.dropped));
    let row = row.text(&text);
    if rates.dropped > 0.0 { row.toned(Tone::Bad, &dropped) } else { row.text(&dropped) }
}

fn store(rows: &mut Vec<Row>, status: &Status, rates: Option<&Rates>) {
    let store = &status.store;
    let row = heading("Store");
    let row = match store.accepting {
        true => row.toned(Tone::Good, "accepting"),
        false => row.toned(Tone::Bad, "NOT ACCEPTING"),
    };
    let row = row.text(&format!(", {} of {} ", bytes(store.used_bytes), bytes(store.quota_bytes)));
    rows.push(row.text(&bar(store.used_bytes, store.quota_bytes)));
    let commits = rates.map_or("commits: not known yet".to_owned(), |rates| match rates.commit_ms {
        Some(ms) => format!("{} commits/s of {ms:.1} ms", rate(rates.commits)),
        None => "no commit since the last look".to_owned(),
    });
    let free = store.free_disk_bytes.map(|free| format!(", {} free on its disk", bytes(free)));
    rows.push(heading("").text(&format!("{commits}{}", free.unwrap_or_default())));
}

fn troubles(status: &Status) -> Vec<(Need, Row)> {
    let warnings = warnings(status);
    if warnings.is_empty() {
        return vec![(Need::Heading, heading("Warnings").toned(Tone::Good, "none"))];
    }
    let row = |(at, (tone, words)): (usize, &(Tone, String))| {
        let heading = heading(if at == 0 { "Warnings" } else { "" });
        (Need::Bad, heading.toned(*tone, "! ").text(words))
    };
    warnings.iter().enumerate().map(row).collect()
}

fn field(status: &Status) -> Vec<(Need, Row)> {
    let units = status.lines.iter().flat_map(|line| line.units.iter().map(|unit| width(&unit.name) + 2));
    let names = status.lines.iter().map(|line| width(&line.name)).chain(units);
    let name = (names.max().unwrap_or(0) + 2).clamp(TEXT, NAME_MAX);
    let mut rows = Vec::new();
    for line in &status.lines {
        rows.push((if line.up { Need::Heading } else { Need::Bad }, line_row(line, name)));
        for unit in &line.units {
            let need = if unit.polls > 0 && !unit.ok { Need::Bad } else { Need::Well };
            rows.push((need, unit_row(unit, name)));
        }
    }
    rows
}

fn line_row(line: &Line, name: usize) -> Row {
    let well = line.units.iter().filter(|unit| unit.ok).count();
    let row = Row::default().toned(Tone::Heading, &cut(&line.name, name - 1)).at(name);
    match (line.up, &line.error) {
        (true, _) => {
            row.toned(Tone::Good, "up").text(&format!(", {well} of {} units are well", line.units.len()))
        }
        (false, Some(error)) => row.toned(Tone::Bad, "DOWN").text(&format!(": {error}")),
        (false, None) => row.toned(Tone::Waiting, "not open yet"),
    }
}

fn unit_row(unit: &Unit, name: usize) -> Row {
    let row = Row::of(&padded(&cut(&format!("  {}", unit.name), name - 1), name));
    if unit.polls == 0 {
        return row.toned(Tone::Waiting, "not read yet");
    }
    let polls = format!("{} polls, {} failed", grouped(unit.polls), grouped(unit.errors));
    let last = unit.last_ok_age_ms.map(span);
    match (unit.ok, last) {
        (true, last) => {
            let last = last.unwrap_or_default();
            row.toned(Tone::Good, "ok").text(&format!(", read {last} ago; {polls}"))
        }
        (false, last) => {
            let since = last.map_or("never well".to_owned(), |last| format!("not well for {last}"));
            let why = unit.last_error.as_deref().unwrap_or("it does not say why");
            row.toned(Tone::Bad, &since).text(&format!(": {why}; {polls}"))
        }
    }
}

/// How full something is, `[###.......]`.
fn bar(part: u64, whole: u64) -> String {
    let percent = percent(part, whole).min(100);
    // A little is not nothing.
    let blocks = (percent * BAR / 100).max(u64::from(part > 0)) as usize;
    format!("[{}{}]", "#".repeat(blocks), ".".repeat(BAR as usize - blocks))
}

/// A rate with one digit after the point, or none where it is large.
fn rate(per_second: f64) -> String {
    if per_second < 1000.0 { format!("{per_second:.1}") } else { grouped(per_second as u64) }
}

#[cfg(test)]
mod tests {
    use super::super::super::columns::Paint;
    use super::super::super::status::tests::{healthy, troubled};
    use super::*;

    const LIVE: Size = Size { columns: 80, rows: 24 };

    /// The same agent so many seconds later, with this much more done.
    fn later(before: &Status, seconds: u64, accepted: u64, delivered: u64) -> Status {
        let mut after = before.clone();
        after.uptime_ms += seconds * 1000;
        let lane = &mut after.queue[1];
        lane.accepted += accepted;
        lane.messages = lane.messages + accepted - delivered;
        for (name, more) in [
            ("messages_accepted", accepted),
            ("messages_delivered", delivered),
            ("samples_read", 2 * accepted),
            ("link_bytes_sent", 200 * delivered),
            ("commits", 20),
            ("commit_us", 82_000),
        ] {
            *after.counters.entry(name.to_owned()).or_insert(0) += more;
        }
        after
    }

    fn in_chinese() -> Status {
        let mut status = troubled();
        status.gateway = "冲压车间一号".into();
        status.lines[0].name = "一号线".into();
        status.lines[0].units[0].name = "电表".into();
        status.lines[0].units[1].name = "很长很长很长很长很长的名字的水泵".into();
        status
    }

    fn text(view: View<'_>, size: Size) -> String {
        let row = |row: Row| row.painted(size.columns, Paint { colours: false }).trim_end().to_owned() + "\n";
        rows(view, size).into_iter().map(row).collect()
    }

    fn live(status: &Status) -> View<'_> {
        View::Live { status, rates: None }
    }

    #[test]
    fn golden_live_screens() {
        let size = |columns, rows| Size { columns, rows };
        let (well, ill, chinese) = (healthy(), troubled(), in_chinese());
        let after = later(&well, 5, 600, 400);
        let rates = Rates::between(&well, &after);
        let reason = "no agent answers on /var/lib/fieldpost/control.sock: Connection refused (os error 111); is \
                      fieldpost running (systemctl status fieldpost), and is this its user (or root)?";
        let gone = View::Gone { reason, for_ms: 12_000, was_there: true };
        for (name, view, size) in [
            ("well", View::Live { status: &after, rates: rates.as_ref() }, LIVE),
            ("ill", live(&ill), LIVE),
            ("wide", live(&ill), size(132, 40)),
            ("narrow", live(&ill), size(40, 24)),
            ("low", live(&ill), size(80, 12)),
            ("chinese", live(&chinese), LIVE),
            ("gone", gone, LIVE),
        ] {
            let file = format!("{}/tests/data/watch/{name}.txt", env!("CARGO_MANIFEST_DIR"));
            let drawn = text(view, size);
            if std::env::var_os("FIELDPOST_BLESS").is_some() {
                std::fs::write(&file, &drawn).expect("the golden files can be written");
            }
            let golden = std::fs::read_to_string(&file).unwrap_or_default();
            assert_eq!(drawn, golden, "{file}; FIELDPOST_BLESS=1 writes it anew");
        }
    }

    #[test]
    fn no_screen_is_larger_than_its_window() {
        let (ill, chinese) = (troubled(), in_chinese());
        let gone = View::Gone { reason: "no agent answers", for_ms: 0, was_there: false };
        for columns in 0..140 {
            for height in [0, 1, 2, 5, 9, 10, 15, 24, 60] {
                let size = Size { columns, rows: height };
                for view in [live(&ill), live(&chinese), gone] {
                    let rows = rows(view, size);
                    assert!(rows.len() <= height, "{size:?}: {}", rows.len());
                    for row in rows {
                        assert_eq!(width(&row.painted(columns, Paint { colours: false })), columns);
                    }
                }
            }
        }
    }

    #[test]
    fn a_sick_unit_among_many_is_on_the_screen() {
        let mut status = healthy();
        let well = status.lines[0].units[0].clone();
        let sick = Unit { ok: false, last_error: Some("no answer within 1000 ms".into()), ..well.clone() };
        status.lines[0].units = (0..200).map(|n| Unit { name: format!("m{n}"), ..well.clone() }).collect();
        status.lines[0].units[150] = Unit { name: "the sick one".into(), ..sick };
        let shown = text(live(&status), LIVE);
        assert!(shown.contains("the sick one"), "{shown}");
        assert!(shown.contains("more lines and units"), "{shown}");
        assert_eq!(shown.lines().count(), LIVE.rows);
    }

    #[test]
    fn rates_are_of_one_start_and_one_database() {
        let before = healthy();
        let rates = Rates::between(&before, &later(&before, 5, 600, 400)).expect("five seconds");
        assert_eq!(rates.lanes, [(0.0, 0.0), (120.0, 80.0), (0.0, 0.0)]);
        assert_eq!((rates.accepted, rates.delivered, rates.samples), (120.0, 80.0, 240.0));
        assert_eq!((rates.sent_bytes, rates.commits, rates.commit_ms), (16_000.0, 4.0, Some(4.1)));
        assert_eq!(Rates::between(&before, &before), None, "no time has passed");
        assert_eq!(Rates::between(&later(&before, 5, 0, 0), &before), None, "it was started again");
        let mut other = later(&before, 5, 600, 400);
        other.store.epoch += 1;
        assert_eq!(Rates::between(&before, &other), None, "another database");
        let mut dropped = later(&before, 1, 100, 0);
        dropped.queue[1].messages -= 30;
        dropped.queue[1].dropped += 30;
        let rates = Rates::between(&before, &dropped).expect("a second");
        assert_eq!((rates.lanes[1], rates.dropped), ((100.0, 0.0), 30.0), "what is dropped is not sent");
    }

    #[test]
    fn a_bar_shows_a_little_and_never_more_than_all() {
        for (part, whole, expected) in [
            (0, 100, "[..........]"),
            (1, 1_000_000, "[#.........]"),
            (55, 100, "[#####.....]"),
            (100, 100, "[##########]"),
            (300, 100, "[##########]"),
            (0, 0, "[..........]"),
            (u64::MAX, 1, "[##########]"),
        ] {
            assert_eq!(bar(part, whole), expected, "{part} of {whole}");
        }
    }
}
