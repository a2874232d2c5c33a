//! The way up: readings to messages to the outbox.
//!
//! Invariant (P7): a slow or full store never makes a reading wait. What it cannot take in time is counted,
//! and the points concerned are reported again at their next sample.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use crate::clock;
use crate::message::{Lane, Message, Qos};
use crate::point::{PointIndex, Reading};
use crate::policy::{Policy, Report, Reporting};
use crate::progress::{IDLE, Pulse};
use crate::stats::Stats;
use crate::store;
use crate::trouble::{Trouble, counted, span};

/// Messages handed to the store and not yet committed. A lane may wait up to 60 s for its commit, so this is
/// counted in messages, about 1 MiB of them, and not in appends.
const OUTSTANDING_MAX: usize = 4096;

/// What is said when the store has this much in hand already.
const TOO_SLOW: &str = "the store is too slow: 4096 messages wait for their commit";

/// Turns readings into messages until every source has hung up, then waits for the last commits. The caller
/// sets the deadline of that.
///
/// QoS 0 messages go to `qos0` as long as there is room. `points` says how points are reported, whenever that changes;
/// what has arrived before is reported first.
pub async fn run(
    policy: Policy,
    mut points: watch::Receiver<Vec<(PointIndex, Reporting)>>,
    mut readings: mpsc::Receiver<Reading>,
    store: store::Handle,
    qos0: mpsc::Sender<Message>,
    stats: Arc<Stats>,
    pulse: Pulse,
) {
    let mut desk =
        Desk { policy, qos0, stats, outstanding: 0, refusals: Default::default(), before_change: None };
    let started = Instant::now();
    let mut appends = FuturesUnordered::new();
    loop {
        let event = tokio::select! {
            biased; // or the reading of a new point could come before the point
            Ok(()) = points.changed() => Event::Changed(points.borrow_and_update().clone(), readings.len()),
            Some((lane, points, outcome)) = appends.next() => Event::Settled(lane, points, outcome),
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
        if let Some(Batch { messages, points }) = desk.handle(event, ms_since(started)) {
            let lane = messages.first().map_or(Lane::Normal, |message| message.lane);
            // In the order of the readings (P4); only their commits are awaited together.
            let handed_in = store.hand_in(messages).await;
            appends.push(settled(lane, handed_in, points));
        }
    }
    while let Some((lane, points, outcome)) = appends.next().await {
        desk.settle(lane, &points, outcome, ms_since(started));
    }
}

fn ms_since(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}

async fn settled(
    lane: Lane,
    handed_in: Result<store::HandedIn, store::NotAccepted>,
    points: Vec<Vec<PointIndex>>,
) -> (Lane, Vec<Vec<PointIndex>>, Result<(), String>) {
    let outcome = async { handed_in?.settled().await }.await;
    (lane, points, outcome.map(drop).map_err(|error| error.to_string()))
}

/// Everything that happens here.
enum Event {
    /// Points are reported like this from now on. So many readings arrived before.
    Changed(Vec<(PointIndex, Reporting)>, usize),
    /// A unit was read.
    Read(Reading),
    /// The store has spoken about a batch: its first message's lane, the points of each of its messages, and why it was
    /// refused, if so.
    Settled(Lane, Vec<Vec<PointIndex>>, Result<(), String>),
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
    /// The store accepts no messages of a lane, which may be full when others are not; in the order of [`Lane::ALL`].
    refusals: [Trouble; 3],
    /// Readings to come that may be of points that are gone; `None`: none of those is left.
    before_change: Option<usize>,
}

impl Desk {
    /// Times are in ms of a monotonic clock.
    fn handle(&mut self, event: Event, now_ms: u64) -> Option<Batch> {
        match event {
            Event::Changed(points, before) => {
                self.policy.change(points);
                self.before_change = Some(before);
                self.drop_gone();
                None
            }
            Event::Read(reading) => {
                let batch = self.read(&reading, now_ms);
                self.before_change = self.before_change.map(|before| before.saturating_sub(1));
                self.drop_gone();
                batch
            }
            Event::Settled(lane, points, outcome) => {
                self.settle(lane, &points, outcome, now_ms);
                None
            }
            Event::Idle => None,
        }
    }

    /// Once everything that a line has sent before it ended is reported.
    fn drop_gone(&mut self) {
        if self.before_change == Some(0) {
            self.policy.drop_gone();
            self.before_change = None;
        }
    }

    fn read(&mut self, reading: &Reading, now_ms: u64) -> Option<Batch> {
        let within_before = self.policy.within_deadband;
        let reports = self.policy.on_reading(reading);
        self.stats.samples_within_deadband.add(self.policy.within_deadband - within_before);
        let mut batch = Batch::default();
        for Report { message, points } in reports {
            if message.qos == Qos::AtMostOnce {
                self.send_unstored(message, &points);
            } else if self.outstanding == OUTSTANDING_MAX {
                self.refuse(message.lane, 1, &[points], TOO_SLOW, now_ms);
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

    fn settle(&mut self, lane: Lane, points: &[Vec<PointIndex>], outcome: Result<(), String>, now_ms: u64) {
        self.outstanding -= points.len();
        match outcome {
            Ok(()) => {
                if let Some(ended) = self.refusals[lane as usize].ended(now_ms) {
                    let (after, lost) = (span(ended.lasted_ms), counted(ended.times, "message"));
                    let lane = lane.name();
                    info!(lane, "the database accepts messages again after {after}; it has refused {lost}");
                }
            }
            Err(reason) => self.refuse(lane, points.len() as u64, points, &reason, now_ms),
        }
    }

    fn refuse(&mut self, lane: Lane, count: u64, points: &[Vec<PointIndex>], reason: &str, now_ms: u64) {
        let what = "messages with values are not accepted by the database and will be missing upstream";
        let refusal = &mut self.refusals[lane as usize];
        let lane = lane.name();
        match refusal.happened_times(reason, count, now_ms) {
            Some(more) => warn!(lane, reason, "{what}{more}"),
            None => debug!(lane, reason, "{what}"),
        }
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
    use crate::message::Topic;
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
        let mut policy = Policy::new("g", "boot");
        policy.change((0..points).map(|point| (PointIndex(point), reporting(point, qos))).collect());
        let (qos0, uplink) = mpsc::channel(1);
        (
            Desk {
                policy,
                qos0,
                stats: Arc::default(),
                outstanding: 0,
                refusals: Default::default(),
                before_change: None,
            },
            uplink,
        )
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
        let batch = desk.handle(reading(2, 0), 0).expect("something new");
        assert_eq!(batch.messages.len(), 2);
        assert_eq!(batch.points, [vec![PointIndex(0)], vec![PointIndex(1)]]);
        assert_eq!(desk.handle(reading(2, 1000), 0), None);
        assert_eq!(desk.stats.samples_within_deadband.get(), 2);
        assert_eq!(desk.handle(Event::Settled(Lane::Normal, batch.points, Ok(())), 0), None);
        assert_eq!((desk.outstanding, desk.stats.messages_not_accepted.get()), (0, 0));
    }

    #[test]
    fn what_the_store_refuses_is_counted_and_reported_at_the_next_sample() {
        let (mut desk, _uplink) = desk(2, Qos::AtLeastOnce);
        let batch = desk.handle(reading(2, 0), 0).expect("something new");
        desk.handle(Event::Settled(Lane::Normal, batch.points, Err("full".into())), 0);
        assert_eq!(desk.stats.messages_not_accepted.get(), 2);
        let batch = desk.handle(reading(2, 1000), 0).expect("the same again");
        assert_eq!(batch.messages.len(), 2);
        desk.handle(Event::Settled(Lane::Normal, batch.points, Ok(())), 0);
        assert_eq!((desk.outstanding, desk.refusals[1].is_on()), (0, false));
    }

    #[test]
    fn a_store_that_never_answers_costs_bounded_memory_and_what_is_lost_is_counted() {
        let (mut desk, _uplink) = desk(OUTSTANDING_MAX + 10, Qos::ExactlyOnce);
        let batch = desk.handle(reading(OUTSTANDING_MAX + 10, 0), 0).expect("something new");
        assert_eq!(batch.messages.len(), OUTSTANDING_MAX);
        assert_eq!(desk.handle(reading(OUTSTANDING_MAX + 10, 1000), 0), None);
        assert_eq!(desk.stats.messages_not_accepted.get(), 20, "ten points, twice");
        desk.handle(Event::Settled(Lane::Normal, batch.points, Ok(())), 0);
        let batch = desk.handle(reading(OUTSTANDING_MAX + 10, 2000), 0).expect("the ten");
        assert_eq!(batch.messages.len(), 10);
    }

    #[test]
    fn qos_0_bypasses_the_store_and_is_dropped_when_the_uplink_is_full() {
        let (mut desk, mut uplink) = desk(2, Qos::AtMostOnce);
        assert_eq!(desk.handle(reading(2, 0), 0), None);
        assert_eq!(uplink.try_recv().expect("one fits").topic.as_str(), "t/0");
        assert_eq!(desk.stats.qos0_dropped.get(), 1);
        assert_eq!(desk.handle(reading(2, 1000), 0), None);
        assert_eq!(uplink.try_recv().expect("the other one, anew").topic.as_str(), "t/1");
    }
}
