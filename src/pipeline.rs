//! The way up: readings to messages to the outbox.
//!
//! Invariant (P7): a slow or full store never makes a reading wait. What it cannot take in time is counted,
//! and the points concerned are reported again at their next sample.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::{info, warn};

use crate::clock;
use crate::message::{Message, Qos};
use crate::point::{PointIndex, Reading};
use crate::policy::{Policy, Report};
use crate::progress::{IDLE, Pulse};
use crate::stats::Stats;
use crate::store;

/// Messages handed to the store and not yet committed. A lane may wait up to 60 s for its commit, so this is
/// counted in messages, about 1 MiB of them, and not in appends.
const OUTSTANDING_MAX: usize = 4096;

/// What is said when the store has this much in hand already.
const TOO_SLOW: &str = "the store is too slow: 4096 messages wait for their commit";

/// Turns readings into messages until every source has hung up, then waits for the last commits. The caller
/// sets the deadline of that.
///
/// QoS 0 messages go to `qos0` as long as there is room.
pub async fn run(
    policy: Policy,
    mut readings: mpsc::Receiver<Reading>,
    store: store::Handle,
    qos0: mpsc::Sender<Message>,
    stats: Arc<Stats>,
    pulse: Pulse,
) {
    let mut desk = Desk { policy, qos0, stats, outstanding: 0, refused: 0 };
    let mut appends = FuturesUnordered::new();
    loop {
        let event = tokio::select! {
            Some((points, outcome)) = appends.next() => Event::Settled(points, outcome),
            reading = readings.recv() => match reading {
                Some(reading) => Event::Read(reading),
                None => break,
            },
            () = sleep(IDLE) => Event::Idle,
        };
        // While the store owes an answer, only an answer is progress.
        if desk.outstanding == 0 || matches!(event, Event::Settled(..)) {
            pulse.beat(clock::mono_ms());
        }
        if let Some(Batch { messages, points }) = desk.handle(event) {
            // In the order of the readings (P4); only their commits are awaited together.
            let handed_in = store.hand_in(messages).await;
            appends.push(settled(handed_in, points));
        }
    }
    while let Some((points, outcome)) = appends.next().await {
        desk.settle(&points, outcome);
    }
}

async fn settled(
    handed_in: Result<store::HandedIn, store::NotAccepted>,
    points: Vec<Vec<PointIndex>>,
) -> (Vec<Vec<PointIndex>>, Result<(), String>) {
    let outcome = async { handed_in?.settled().await }.await;
    (points, outcome.map(drop).map_err(|error| error.to_string()))
}

/// Everything that happens here.
enum Event {
    /// A unit was read.
    Read(Reading),
    /// The store has spoken about a batch: the points of each of its messages, and why it was refused, if so.
    Settled(Vec<Vec<PointIndex>>, Result<(), String>),
    /// Nothing, for a while.
    Idle,
}

/// Messages for one append, and the points of each.
#[derive(Debug, Default, PartialEq)]
struct Batch {
    messages: Vec<Message>,
    points: Vec<Vec<PointIndex>>,
}

struct Desk {
    policy: Policy,
    qos0: mpsc::Sender<Message>,
    stats: Arc<Stats>,
    /// Messages the store has not settled yet.
    outstanding: usize,
    /// Messages refused since the store last accepted one.
    refused: u64,
}

impl Desk {
    fn handle(&mut self, event: Event) -> Option<Batch> {
        match event {
            Event::Read(reading) => self.read(&reading),
            Event::Settled(points, outcome) => {
                self.settle(&points, outcome);
                None
            }
            Event::Idle => None,
        }
    }

    fn read(&mut self, reading: &Reading) -> Option<Batch> {
        let within_before = self.policy.within_deadband;
        let reports = self.policy.on_reading(reading);
        self.stats.samples_within_deadband.add(self.policy.within_deadband - within_before);
        let mut batch = Batch::default();
        for Report { message, points } in reports {
            if message.qos == Qos::AtMostOnce {
                self.send_unstored(message, &points);
            } else if self.outstanding == OUTSTANDING_MAX {
                self.refuse(1, &[points], TOO_SLOW);
            } else {
                self.outstanding += 1;
                batch.messages.push(message);
                batch.points.push(points);
            }
        }
        (!batch.messages.is_empty()).then_some(batch)
    }

    fn send_unstored(&mut self, message: Message, points: &[PointIndex]) {
        if self.qos0.try_send(message).is_err() {
            self.stats.qos0_dropped.increment();
            self.policy.forget(points);
        }
    }

    fn settle(&mut self, points: &[Vec<PointIndex>], outcome: Result<(), String>) {
        self.outstanding -= points.len();
        match outcome {
            Ok(()) if self.refused > 0 => {
                info!(refused = self.refused, "the store accepts messages again");
                self.refused = 0;
            }
            Ok(()) => {}
            Err(reason) => self.refuse(points.len() as u64, points, &reason),
        }
    }

    fn refuse(&mut self, count: u64, points: &[Vec<PointIndex>], reason: &str) {
        if self.refused == 0 {
            warn!(reason, "values are not accepted by the store and will be missing upstream");
        }
        self.refused += count;
        self.stats.messages_not_accepted.add(count);
        for points in points {
            self.policy.forget(points);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Stamp;
    use crate::message::{Lane, Topic};
    use crate::point::{PointId, Sample, Value};
    use crate::policy::Reporting;
    use crate::policy::deadband::Deadband;

    fn reporting(point: usize, qos: Qos) -> Reporting {
        Reporting {
            id: PointId { line: "l".into(), unit: "u".into(), point: format!("p{point}").into() },
            topic: Topic::new(&format!("t/{point}")).expect("a topic"),
            qos,
            retain: false,
            lane: Lane::Normal,
            unit: None,
            deadband: Deadband::Absolute(1.0),
            longest_silence: Duration::from_secs(600),
            expires_after: None,
        }
    }

    /// A desk for `points` points, and the uplink's end of its QoS 0 channel, which has room for one message.
    fn desk(points: usize, qos: Qos) -> (Desk, mpsc::Receiver<Message>) {
        let policy = Policy::new("g", "boot", (0..points).map(|point| reporting(point, qos)).collect());
        let (qos0, uplink) = mpsc::channel(1);
        (Desk { policy, qos0, stats: Arc::default(), outstanding: 0, refused: 0 }, uplink)
    }

    fn reading(points: usize, mono_ms: u64) -> Event {
        let sample = |point| Sample {
            point: PointIndex(point),
            at: Stamp { wall_ms: 0, mono_ms, synchronised: false },
            value: Ok(Value::Integer(5)),
        };
        Event::Read(Reading { samples: (0..points).map(sample).collect() })
    }

    #[test]
    fn values_go_to_the_store_and_those_within_the_dead_band_are_counted() {
        let (mut desk, _uplink) = desk(2, Qos::AtLeastOnce);
        let batch = desk.handle(reading(2, 0)).expect("something new");
        assert_eq!(batch.messages.len(), 2);
        assert_eq!(batch.points, [vec![PointIndex(0)], vec![PointIndex(1)]]);
        assert_eq!(desk.handle(reading(2, 1000)), None);
        assert_eq!(desk.stats.samples_within_deadband.get(), 2);
        assert_eq!(desk.handle(Event::Settled(batch.points, Ok(()))), None);
        assert_eq!((desk.outstanding, desk.stats.messages_not_accepted.get()), (0, 0));
    }

    #[test]
    fn what_the_store_refuses_is_counted_and_reported_at_the_next_sample() {
        let (mut desk, _uplink) = desk(2, Qos::AtLeastOnce);
        let batch = desk.handle(reading(2, 0)).expect("something new");
        desk.handle(Event::Settled(batch.points, Err("full".into())));
        assert_eq!(desk.stats.messages_not_accepted.get(), 2);
        let batch = desk.handle(reading(2, 1000)).expect("the same again");
        assert_eq!(batch.messages.len(), 2);
        desk.handle(Event::Settled(batch.points, Ok(())));
        assert_eq!((desk.outstanding, desk.refused), (0, 0));
    }

    #[test]
    fn a_store_that_never_answers_costs_bounded_memory_and_what_is_lost_is_counted() {
        let (mut desk, _uplink) = desk(OUTSTANDING_MAX + 10, Qos::ExactlyOnce);
        let batch = desk.handle(reading(OUTSTANDING_MAX + 10, 0)).expect("something new");
        assert_eq!(batch.messages.len(), OUTSTANDING_MAX);
        assert_eq!(desk.handle(reading(OUTSTANDING_MAX + 10, 1000)), None);
        assert_eq!(desk.stats.messages_not_accepted.get(), 20, "ten points, twice");
        desk.handle(Event::Settled(batch.points, Ok(())));
        let batch = desk.handle(reading(OUTSTANDING_MAX + 10, 2000)).expect("the ten");
        assert_eq!(batch.messages.len(), 10);
    }

    #[test]
    fn qos_0_bypasses_the_store_and_is_dropped_when_the_uplink_is_full() {
        let (mut desk, mut uplink) = desk(2, Qos::AtMostOnce);
        assert_eq!(desk.handle(reading(2, 0)), None);
        assert_eq!(uplink.try_recv().expect("one fits").topic.as_str(), "t/0");
        assert_eq!(desk.stats.qos0_dropped.get(), 1);
        assert_eq!(desk.handle(reading(2, 1000)), None);
        assert_eq!(uplink.try_recv().expect("the other one, anew").topic.as_str(), "t/1");
    }
}
