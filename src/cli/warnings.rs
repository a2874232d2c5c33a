//! What is wrong with the agent now, in words, for whoever looks at a status: what, for how long, what to do. Pure.

use super::columns::Tone;
use super::status::{bytes, grouped, span};
use crate::control::wire::{LinkState, MachineValue, Status};

/// A lane this full, in percent, is worth a word.
const FULL_PERCENT: u64 = 80;
/// Less free space than this is worth a word.
const LITTLE_DISK_BYTES: u64 = 100 << 20;

/// What a true value of the machine means. What has been is told where it is over.
const MACHINE: &[(&str, Tone, &str)] = &[
    (
        "under_voltage",
        Tone::Bad,
        "the power supply is too weak (under-voltage): check the supply and its cable",
    ),
    ("throttled", Tone::Bad, "the processor is throttled"),
    ("frequency_capped", Tone::Waiting, "the processor's frequency is capped"),
    (
        "temperature_limited",
        Tone::Bad,
        "the processor is at its limit of temperature: check the cabinet's air",
    ),
    ("under_voltage_since_boot", Tone::Waiting, "there has been under-voltage since the machine started"),
];

/// One sentence each, what is worst first.
pub(super) fn warnings(status: &Status) -> Vec<(Tone, String)> {
    let mut found = Vec::new();
    let mut say = |tone, words: String| found.push((tone, words));
    if !status.store.accepting {
        let why = status.store.error.as_deref().unwrap_or("it does not say why");
        say(Tone::Bad, format!("nothing is accepted: {why}"));
    }
    if let Some(alarm) = &status.link.alarm {
        say(Tone::Bad, alarm.clone());
    }
    link(status, &mut say);
    lines(status, &mut say);
    for (name, tone, words) in MACHINE {
        let is_so = |value: &MachineValue| value.name == *name && value.value == Some(true.into());
        if status.machine.iter().any(is_so) {
            say(*tone, (*words).to_owned());
        }
    }
    for lane in status.queue.iter().filter(|lane| lane.messages > 0) {
        let percent = percent(lane.bytes, lane.limit_bytes);
        if percent >= FULL_PERCENT {
            let name = &lane.lane;
            say(
                Tone::Waiting,
                format!("lane {name} is {percent} % full; beyond its limit messages are lost"),
            );
        }
    }
    if let Some(free) = status.store.free_disk_bytes.filter(|free| *free < LITTLE_DISK_BYTES) {
        say(Tone::Waiting, format!("the disk of the database has only {} left", bytes(free)));
    }
    if let Some(budget) = status.budget.as_ref().filter(|budget| !budget.held_back.is_empty()) {
        let lanes = budget.held_back.join(" and ");
        say(Tone::Waiting, format!("the byte budget of this {} is used up: {lanes} wait", budget.per));
    }
    if status.dead_letters > 0 {
        let count = grouped(status.dead_letters);
        say(
            Tone::Waiting,
            format!("{count} given up after a refusal by the broker: fieldpost queue ls --dead"),
        );
    }
    let lost = status.counters.get("possibly_lost").copied().unwrap_or(0);
    if lost > 0 {
        say(Tone::Bad, format!("{} may be lost: the broker forgot the session", messages(lost)));
    }
    found
}

fn link(status: &Status, say: &mut impl FnMut(Tone, String)) {
    let link = &status.link;
    let queued: u64 = status.queue.iter().map(|lane| lane.messages).sum();
    if link.state == LinkState::Connected {
        return;
    }
    let why = link.last_error.as_ref().map_or_else(String::new, |error| format!(": {error}"));
    let waiting = match queued {
        0 => String::new(),
        1 => "; 1 message waits".to_owned(),
        queued => format!("; {} messages wait", grouped(queued)),
    };
    // The first attempt of a start is no trouble yet.
    let tone = if link.last_error.is_some() { Tone::Bad } else { Tone::Waiting };
    say(tone, format!("no connection to the broker for {}{why}{waiting}", span(link.state_age_ms)));
}

fn lines(status: &Status, say: &mut impl FnMut(Tone, String)) {
    for line in &status.lines {
        if let Some(error) = line.error.as_ref().filter(|_| !line.up) {
            // Its units say the same.
            say(Tone::Bad, format!("line {} is down: {error}", line.name));
            continue;
        }
        for unit in line.units.iter().filter(|unit| unit.polls > 0 && !unit.ok) {
            let reason = unit.last_error.as_deref().unwrap_or("it does not say why");
            let since = match unit.last_ok_age_ms {
                Some(ms) => format!("has not been well for {}", span(ms)),
                None => "has never been well".to_owned(),
            };
            say(Tone::Bad, format!("{}/{} {since}: {reason}", line.name, unit.name));
        }
    }
}

fn messages(count: u64) -> String {
    if count == 1 { "1 message".to_owned() } else { format!("{} messages", grouped(count)) }
}

/// Whole percent, rounded down.
pub(super) fn percent(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 100 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}
