//! What was accepted against what arrived: pure counting, and the verdict.
//!
//! Invariant: nothing is taken on anybody's word twice. What was accepted is what the database has numbered,
//! what was delivered is what the broker took for the first time, and the device's own counts say which
//! readings there were.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::device::UNITS;

/// Readings of one unit that the killed agent may have had in memory: 5 s of them. More would mean that it
/// had stopped accepting long before.
const IN_MEMORY_MAX: u32 = 50;

/// A PUBLISH that the broker took for the first time: a resend of one it holds is not here.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) topic: String,
    pub(crate) qos: u8,
    pub(crate) payload: Vec<u8>,
    /// Whether PUBREL came too, and subscribers have it.
    pub(crate) released: bool,
}

/// What the database says when the agent has gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    /// Numbers are unique within it.
    pub(crate) epoch: u64,
    /// Readings accepted: the numbers 1 to this of the lane `normal` have been given.
    pub(crate) readings: u64,
    /// Notes accepted: the same of the lane `alarm`.
    pub(crate) notes: u64,
    /// Accepted messages that are still in the queue.
    pub(crate) waiting: u64,
    /// Messages in the middle of their QoS 2 exchange.
    pub(crate) in_exchange: u64,
    /// Messages that a limit removed, or the broker refused.
    pub(crate) given_up: u64,
}

/// What the demo knows besides.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// Topic of the readings of each unit.
    pub(crate) topics: [String; UNITS.len()],
    /// Topic of the notes.
    pub(crate) notes_topic: String,
    /// Notes that were answered "accepted"; they are numbered from 1.
    pub(crate) notes: u64,
    /// Readings of each unit served when the agent had been killed.
    pub(crate) served_at_kill: [u32; UNITS.len()],
    /// Readings of each unit served in all.
    pub(crate) served: [u32; UNITS.len()],
}

/// What a message is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// Epoch and number in the outbox.
    Reading(u64, u64),
    /// Our own number.
    Note(u64),
}

/// The verdict.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Messages the agent accepted.
    pub(crate) accepted: u64,
    /// Of these, those the broker took.
    pub(crate) delivered: u64,
    /// Of these, those it never saw.
    pub(crate) lost: u64,
    /// Receptions beyond the first.
    pub(crate) duplicates: u64,
    /// Readings that were in the agent's memory and not yet accepted when it was killed.
    pub(crate) in_memory: u32,
    /// Messages that said that the device does not answer.
    pub(crate) bad: u64,
    /// Everything else that must not be, in words.
    pub(crate) faults: Vec<String>,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { accepted, delivered, lost, duplicates, .. } = self;
        write!(f, "accepted={accepted} delivered={delivered} lost={lost} duplicates={duplicates}")
    }
}

impl Tally {
    /// Whether every promise was kept, by enough messages to mean something.
    pub(crate) fn is_clean(&self) -> bool {
        let Tally { accepted, delivered, lost, duplicates, ref faults, .. } = *self;
        accepted > 100 && accepted == delivered && lost == 0 && duplicates == 0 && faults.is_empty()
    }
}

/// Compares.
pub(crate) fn tally(arrivals: &[Arrival], ledger: &Ledger, known: &Known) -> Tally {
    let mut desk = Desk { known, tally: Tally::default(), times: BTreeMap::new(), last: BTreeMap::new() };
    let mut counts = [const { Vec::new() }; UNITS.len()];
    for arrival in arrivals {
        desk.take(arrival, &mut counts);
    }
    let Desk { mut tally, times, .. } = desk;
    let accepted: BTreeSet<Key> = (1..=ledger.readings)
        .map(|seq| Key::Reading(ledger.epoch, seq))
        .chain((1..=ledger.notes).map(Key::Note))
        .collect();
    tally.accepted = accepted.len() as u64;
    tally.delivered = accepted.iter().filter(|key| times.contains_key(key)).count() as u64;
    tally.lost = tally.accepted - tally.delivered;
    tally.duplicates = times.values().map(|times| times - 1).sum();
    for key in times.keys().filter(|key| !accepted.contains(key)) {
        tally.faults.push(format!("the broker has {key:?}, which was never accepted"));
    }
    if ledger.notes != known.notes {
        let (told, stored) = (known.notes, ledger.notes);
        tally.faults.push(format!("{told} notes were answered \"accepted\", the database numbered {stored}"));
    }
    if (ledger.waiting, ledger.given_up) != (0, 0) {
        let Ledger { waiting, given_up, .. } = ledger;
        tally.faults.push(format!("the database still holds {waiting} messages and gave up {given_up}"));
    }
    for (unit, counts) in counts.iter().enumerate() {
        tally.check_readings(unit, counts, known);
    }
    tally
}

struct Desk<'a> {
    known: &'a Known,
    tally: Tally,
    times: BTreeMap<Key, u64>,
    /// The latest first-time key of each topic.
    last: BTreeMap<&'a str, Key>,
}

impl<'a> Desk<'a> {
    fn take(&mut self, arrival: &'a Arrival, counts: &mut [Vec<u32>; UNITS.len()]) {
        let Arrival { topic, qos, released, .. } = arrival;
        let Some(key) = self.read(arrival, counts) else {
            let text = String::from_utf8_lossy(&arrival.payload);
            return self.tally.faults.push(format!("the broker has something unknown on {topic}: {text}"));
        };
        if *qos != 2 || !released {
            let fault = format!("{key:?} came at QoS {qos}, finished: {released}");
            self.tally.faults.push(fault);
        }
        let times = self.times.entry(key).or_default();
        *times += 1;
        if *times > 1 {
            return;
        }
        if let Some(last) = self.last.insert(topic, key).filter(|last| *last > key) {
            self.tally.faults.push(format!("{key:?} came after {last:?} on {topic}"));
        }
    }

    /// The message's key; the device's count in it goes to `counts` unless this is a repeat.
    fn read(&mut self, arrival: &Arrival, counts: &mut [Vec<u32>; UNITS.len()]) -> Option<Key> {
        let json: serde_json::Value = serde_json::from_slice(&arrival.payload).ok()?;
        if arrival.topic == self.known.notes_topic {
            return Some(Key::Note(json["note"].as_u64()?));
        }
        let unit = self.known.topics.iter().position(|topic| *topic == arrival.topic)?;
        let key = Key::Reading(json["epoch"].as_u64()?, json["seq"].as_u64()?);
        let reading = &json["values"]["reading"];
        match (reading["quality"].as_str()?, reading["value"].as_u64()) {
            _ if self.times.contains_key(&key) => {}
            ("good", Some(count)) => counts[unit].push(u32::try_from(count).ok()?),
            ("bad", None) => self.tally.bad += 1,
            _ => return None,
        }
        Some(key)
    }
}

impl Tally {
    /// Every count that the device served arrived once and in order (no old value dressed as a fresh one);
    /// only those it served just before the kill may be missing, for they were not accepted yet.
    fn check_readings(&mut self, unit: usize, counts: &[u32], known: &Known) {
        let name = UNITS[unit];
        if let Some(pair) = counts.windows(2).find(|pair| pair[0] >= pair[1]) {
            self.faults.push(format!("{name}: reading {} was reported after {}", pair[1], pair[0]));
        }
        let arrived: BTreeSet<u32> = counts.iter().copied().collect();
        let killed = known.served_at_kill[unit];
        let in_memory = (1..=killed).rev().take_while(|count| !arrived.contains(count)).count() as u32;
        self.in_memory += in_memory;
        if in_memory > IN_MEMORY_MAX {
            self.faults
                .push(format!("{name}: the last {in_memory} readings before the kill were not accepted"));
        }
        let mut missing = (1..=killed - in_memory).chain(killed + 1..=known.served[unit]);
        if let Some(count) = missing.find(|count| !arrived.contains(count)) {
            self.faults.push(format!("{name}: reading {count} was read by the agent and never accepted"));
        }
        if let Some(count) = arrived.range(known.served[unit] + 1..).next() {
            self.faults.push(format!("{name}: reading {count} was never taken"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(unit: usize, seq: u64, count: u32) -> Arrival {
        let values = format!(r#"{{"reading":{{"value":{count},"quality":"good"}}}}"#);
        arrival(&format!("t/{unit}"), &format!(r#"{{"values":{values},"epoch":3,"seq":{seq}}}"#))
    }

    fn note(note: u64) -> Arrival {
        arrival("t/notes", &format!(r#"{{"note":{note}}}"#))
    }

    fn arrival(topic: &str, payload: &str) -> Arrival {
        Arrival { topic: topic.into(), qos: 2, payload: payload.into(), released: true }
    }

    /// 60 readings of each unit in turn, 3 notes; the kill came after 30 and took none.
    fn good() -> (Vec<Arrival>, Ledger, Known) {
        let mut arrivals: Vec<Arrival> =
            (0..120).map(|n| reading(n as usize % 2, n + 1, n as u32 / 2 + 1)).collect();
        arrivals.extend((1..=3).map(note));
        let ledger = Ledger { epoch: 3, readings: 120, notes: 3, ..Ledger::default() };
        let known = Known {
            topics: ["t/0".into(), "t/1".into()],
            notes_topic: "t/notes".into(),
            notes: 3,
            served_at_kill: [30, 30],
            served: [60, 60],
        };
        (arrivals, ledger, known)
    }

    fn verdict(change: impl FnOnce(&mut Vec<Arrival>, &mut Ledger, &mut Known)) -> (String, String, bool) {
        let (mut arrivals, mut ledger, mut known) = good();
        change(&mut arrivals, &mut ledger, &mut known);
        let tally = tally(&arrivals, &ledger, &known);
        (tally.to_string(), tally.faults.join("; "), tally.is_clean())
    }

    #[test]
    fn all_is_well_when_everything_came_once() {
        let line = "accepted=123 delivered=123 lost=0 duplicates=0".to_owned();
        assert_eq!(verdict(|_, _, _| {}), (line, String::new(), true));
    }

    #[test]
    fn a_loss_is_seen_and_a_duplicate_is_seen() {
        let (line, _, clean) = verdict(|arrivals, _, _| drop(arrivals.remove(7)));
        assert_eq!((line.as_str(), clean), ("accepted=123 delivered=122 lost=1 duplicates=0", false));
        let (line, _, clean) = verdict(|arrivals, _, _| arrivals.push(note(2)));
        assert_eq!((line.as_str(), clean), ("accepted=123 delivered=123 lost=0 duplicates=1", false));
        let (line, faults, clean) = verdict(|arrivals, _, _| arrivals.push(reading(1, 8, 4)));
        assert_eq!((line.as_str(), clean), ("accepted=123 delivered=123 lost=0 duplicates=1", false));
        assert_eq!(faults, "");
    }

    #[test]
    fn a_loss_does_not_hide_behind_a_duplicate() {
        let (line, _, clean) = verdict(|arrivals, _, _| {
            arrivals.pop();
            arrivals.push(note(2));
        });
        assert_eq!((line.as_str(), clean), ("accepted=123 delivered=122 lost=1 duplicates=1", false));
    }

    #[test]
    fn whatever_else_is_wrong_is_named() {
        type Change = fn(&mut Vec<Arrival>, &mut Ledger, &mut Known);
        let cases: [(Change, &str); 12] = [
            (|a, _, _| a.swap(2, 4), "came after"),
            (|a, _, _| a[5].released = false, "finished: false"),
            (|a, _, _| a[5].qos = 1, "came at QoS 1"),
            (|a, _, _| a.push(arrival("t/9", "{}")), "something unknown on t/9"),
            (|a, _, _| a.push(note(9)), "which was never accepted"),
            (|_, l, _| l.epoch = 4, "which was never accepted"),
            (|_, l, _| l.waiting = 1, "still holds 1 messages"),
            (|_, l, _| l.given_up = 1, "gave up 1"),
            (|_, _, k| k.notes = 4, "4 notes were answered"),
            (|a, _, _| a[6] = reading(0, 7, 3), "reading 3 was reported after 3"),
            (|_, _, k| k.served[1] = 61, "reading 61 was read by the agent and never accepted"),
            (|_, _, k| k.served[1] = 59, "reading 60 was never taken"),
        ];
        for (change, part) in cases {
            let (_, faults, clean) = verdict(change);
            assert!(faults.contains(part) && !clean, "{part}: {faults}");
        }
    }

    #[test]
    fn what_was_in_memory_at_the_kill_is_counted_and_is_no_loss() {
        let (mut arrivals, ledger, mut known) = good();
        known.served_at_kill = [31, 31];
        known.served = [61, 61];
        // Two readings were served and never accepted: later counts are one higher.
        for (n, arrival) in arrivals.iter_mut().enumerate().take(120).skip(60) {
            *arrival = reading(n % 2, n as u64 + 1, n as u32 / 2 + 2);
        }
        let tally = tally(&arrivals, &ledger, &known);
        assert_eq!((tally.in_memory, tally.faults.as_slice(), tally.is_clean()), (2, &[][..], true));
    }

    #[test]
    fn few_messages_prove_nothing() {
        let (mut arrivals, mut ledger, mut known) = good();
        arrivals.retain(|arrival| arrival.topic == "t/notes");
        (ledger.readings, known.served, known.served_at_kill) = (0, [0, 0], [0, 0]);
        let tally = tally(&arrivals, &ledger, &known);
        assert_eq!((tally.accepted, tally.faults.len(), tally.is_clean()), (3, 0, false));
    }
}
