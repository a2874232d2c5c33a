//! A producer that outlives the agent, and the comparison of what it was promised with what a broker received.
//!
//! Message `n` is known by its topic and its length alone, because that is what mosquitto's log tells: 100
//! messages share a topic, and differ in length.
//!
//! Invariant: a message counts as accepted only when the agent said so; one that was under way when the agent was
//! killed is unknown, and may arrive once or not at all.

use super::agent::publish;
use super::mosquitto::LogCount;
use fieldpost::control::client::{self, ClientError};
use fieldpost::control::wire::{Answer, Question};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

/// Messages that share a topic.
const PER_TOPIC: u64 = 100;
/// Bytes of the shortest payload.
const SHORTEST: usize = 20;
/// Requests sent ahead of their answers.
const AHEAD: usize = 100;

/// Message number `n`, as the control socket takes it.
pub fn numbered(n: u64, qos: u8) -> Question {
    let bytes = SHORTEST + (n % PER_TOPIC) as usize;
    Question::Publish(publish(&format!("n/{}", n / PER_TOPIC), qos, &format!("{n:0bytes$}")))
}

/// The number of a message, of which topic and length are known; `None` if it is none of ours.
fn number(topic: &str, bytes: usize) -> Option<u64> {
    let hundreds: u64 = topic.strip_prefix("n/")?.parse().ok()?;
    Some(hundreds * PER_TOPIC + u64::try_from(bytes.checked_sub(SHORTEST)?).ok()?)
}

/// What became of the messages on the producer's side.
#[derive(Clone, Debug, Default)]
pub struct Produced {
    /// Those the agent accepted.
    pub accepted: BTreeSet<u64>,
    /// Those that had no answer when the agent was killed.
    pub unknown: BTreeSet<u64>,
}

impl Produced {
    /// All of the first so many messages were accepted.
    pub fn all(count: u64) -> Produced {
        Produced { accepted: (0..count).collect(), unknown: BTreeSet::new() }
    }
}

/// A running producer.
#[derive(Debug)]
pub struct Producer {
    thread: JoinHandle<Produced>,
    orders: Arc<Orders>,
}

#[derive(Debug, Default)]
struct Orders {
    hold: AtomicBool,
    stop: AtomicBool,
    accepted: AtomicU64,
}

impl Producer {
    /// Hands numbered messages over, as fast as they are accepted, whenever an agent answers.
    pub fn start(socket: PathBuf, qos: u8) -> Producer {
        let orders = Arc::new(Orders::default());
        let shared = Arc::clone(&orders);
        Producer { thread: std::thread::spawn(move || produce(&socket, qos, &shared)), orders }
    }

    /// Pauses, so that the queue does not grow for ever, or goes on.
    pub fn hold(&self, hold: bool) {
        self.orders.hold.store(hold, Relaxed);
    }

    /// Messages accepted so far.
    pub fn accepted(&self) -> u64 {
        self.orders.accepted.load(Relaxed)
    }

    /// Waits for the last answers.
    pub fn stop(self) -> Produced {
        self.orders.stop.store(true, Relaxed);
        self.thread.join().expect("the producer does not panic")
    }
}

fn produce(socket: &Path, qos: u8, orders: &Orders) -> Produced {
    let mut produced = Produced::default();
    let mut next = 0;
    while !orders.stop.load(Relaxed) {
        // An error is the agent's end; the next one is waited for.
        let _killed = converse(socket, qos, orders, &mut produced, &mut next);
        std::thread::sleep(Duration::from_millis(2));
    }
    produced
}

fn converse(
    socket: &Path,
    qos: u8,
    orders: &Orders,
    produced: &mut Produced,
    next: &mut u64,
) -> Result<(), ClientError> {
    let (mut asker, mut answers) = client::connect(socket)?;
    let mut ahead = VecDeque::new();
    let mut talk = || loop {
        let stop = orders.stop.load(Relaxed);
        while !stop && !orders.hold.load(Relaxed) && ahead.len() < AHEAD {
            ahead.push_back(*next);
            *next += 1;
            asker.ask(&numbered(*next - 1, qos))?;
        }
        asker.flush()?;
        if ahead.is_empty() {
            if stop {
                return Ok(());
            }
            // On hold, but connected: the agent takes 16 connections at a time.
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        match answers.hear()? {
            Answer::Accepted {} => {
                produced.accepted.extend(ahead.pop_front());
                orders.accepted.fetch_add(1, Relaxed);
            }
            // It was not taken, and nobody said otherwise.
            Answer::Refused { .. } => drop(ahead.pop_front()),
            other => panic!("a message was answered {other:?}"),
        }
    };
    let outcome = talk();
    produced.unknown.extend(ahead);
    outcome
}

/// What the broker has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Messages the agent accepted.
    pub accepted: u64,
    /// Messages the broker has, once each.
    pub delivered: u64,
    /// Accepted messages the broker does not have.
    pub lost: u64,
    /// Receptions beyond the first.
    pub duplicates: u64,
    /// First receptions of a message after a later one's.
    pub out_of_order: u64,
    /// Messages nobody handed in.
    pub strange: u64,
    /// The first few things that went wrong, in words.
    pub details: Vec<String>,
}

/// Things that went wrong and are told in words.
const DETAILS: usize = 10;

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { accepted, delivered, lost, duplicates, out_of_order, .. } = self;
        write!(
            f,
            "accepted={accepted} delivered={delivered} lost={lost} duplicates={duplicates} out_of_order={out_of_order}"
        )
    }
}

impl Outcome {
    /// From what mosquitto's log says it received for the first time.
    pub fn logged(produced: &Produced, log: &LogCount) -> Outcome {
        let first_time = log.publishes.iter().filter(|publish| publish.first_time);
        Outcome::of(produced, first_time.map(|publish| (publish.topic.as_str(), publish.bytes)))
    }

    /// From topics and payload lengths in the order of their arrival.
    pub fn of<'a>(produced: &Produced, received: impl Iterator<Item = (&'a str, usize)>) -> Outcome {
        let mut outcome = Outcome { accepted: produced.accepted.len() as u64, ..Outcome::default() };
        let mut times: BTreeMap<u64, u64> = BTreeMap::new();
        let mut latest = None;
        for number in received.filter_map(|(topic, bytes)| number(topic, bytes)) {
            let times = times.entry(number).or_default();
            *times += 1;
            if *times > 1 {
                outcome.duplicates += 1;
                outcome.detail(format!("{number} again"));
            } else if let Some(latest) = latest.filter(|latest| *latest > number) {
                outcome.out_of_order += 1;
                outcome.detail(format!("{number} after {latest}"));
            }
            latest = latest.max(Some(number));
        }
        let known = |n: &u64| produced.accepted.contains(n) || produced.unknown.contains(n);
        outcome.delivered = times.len() as u64;
        outcome.strange = times.keys().filter(|n| !known(n)).count() as u64;
        for lost in produced.accepted.iter().filter(|n| !times.contains_key(n)) {
            outcome.lost += 1;
            outcome.detail(format!("{lost} lost"));
        }
        outcome
    }

    fn detail(&mut self, words: String) {
        if self.details.len() < DETAILS {
            self.details.push(words);
        }
    }

    /// Panics unless every accepted message arrived once, and in order.
    pub fn assert_exactly_once(&self) {
        let Outcome { lost, duplicates, out_of_order, strange, details, .. } = self;
        assert_eq!((*lost, *duplicates, *out_of_order, *strange), (0, 0, 0, 0), "{self} {details:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_doubled_or_out_of_order_is_counted() {
        let produced = Produced { accepted: [0, 1, 2, 102].into(), unknown: [3, 4].into() };
        // 0, 2, 1, 2, 4, and one that is not known.
        let received =
            [("n/0", 20), ("n/0", 22), ("n/0", 21), ("n/0", 22), ("n/0", 24), ("n/7", 20), ("x", 20)];
        let outcome = Outcome::of(&produced, received.into_iter());
        let details = ["1 after 2", "2 again", "102 lost"].map(str::to_owned).into();
        let (lost, duplicates, out_of_order, strange) = (1, 1, 1, 1);
        let expected =
            Outcome { accepted: 4, delivered: 5, lost, duplicates, out_of_order, strange, details };
        assert_eq!(outcome, expected);
    }
}
