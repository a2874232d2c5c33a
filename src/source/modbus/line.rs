//! The task of one Modbus line: polls what is due, hands on readings, carries out writes, reopens the line when
//! it broke.
//!
//! Invariant (P7, P9): every due point yields exactly one sample, fresh or bad, and none waits for a reader:
//! a reading that does not fit the channel is counted and dropped. A write is sent at most once (P8); between two
//! requests of polls that are due stands at most one write.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::client::{Client, Data, Failure};
use super::desk::{self, Desk, not_sent};
use super::plan::{self, Limits, Part, Read, Want};
use super::register::Words;
use super::{Line, LinePoint, LineStatus, Transport};
use crate::clock::{self, Stamp};
use crate::command::{Outcome as Ending, Write, Written};
use crate::point::{Fault, PointIndex, Reading, Sample, Value};
use crate::progress::{IDLE, Pulse};
use crate::source::schedule::{Attempt, Breaker, Due, Schedule};
use crate::stats::Stats;
use crate::trouble::{Trouble, counted, grouped, span};

/// The first pause after an open that failed; each further one is twice as long.
const FIRST_REOPEN_MS: u64 = 500;
/// The longest pause before a missing port is looked for again: that costs nothing, and people wait for it.
const LONGEST_REOPEN_SERIAL_MS: u64 = 4_000;
/// The longest pause before a server is connected to again.
const LONGEST_REOPEN_TCP_MS: u64 = 30_000;
/// Timeouts that one request may take at most: a stale connection, a new one, the request once more, and the silence
/// after each. The time of the bytes is within any patience.
const REQUEST_TIMEOUTS: u32 = 8;
/// The least of them, as connections are waited for at least so long.
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a write under way may still take when the agent stops.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// Polls the line until `stop` holds `true` or its sender is gone, or until nobody takes readings any more.
///
/// One [`Reading`] is sent for each unit and interval that is due. When the channel is full the reading is
/// counted in [`Stats::readings_overrun`] and dropped. `status` is updated after every poll and every change
/// of the line. A poll that is under way when `stop` comes is given up.
///
/// Writes go before polls: one waits for the request under way, and behind another write for one request of a poll.
/// The point is read before a write, so that a stale connection or a silent unit is found while nothing has been sent,
/// and right after it. Each write that is taken gets one [`Written`]; none is taken while `written` has no room, and a
/// closed channel only means that there are none. When `stop` comes the write under way has a second to finish.
pub async fn run(
    line: Line,
    readings: mpsc::Sender<Reading>,
    writes: mpsc::Receiver<Write>,
    written: mpsc::Sender<Written>,
    status: watch::Sender<LineStatus>,
    stats: Arc<Stats>,
    mut stop: watch::Receiver<bool>,
) {
    let desk = Desk::new(writes, written, stop.clone());
    let mut busy = desk.busy();
    let mut task = Task::new(line, desk, readings, status, stats);
    let stopped = async {
        let _stopped_or_gone = stop.wait_for(|stop| *stop).await.is_ok();
        let idle = async { busy.wait_for(|busy| !busy).await.is_ok() };
        let _in_time = timeout(LAST_WRITE, idle).await.is_ok();
    };
    tokio::select! {
        biased; // so that nothing new is begun once the line may stop
        () = stopped => {}
        () = task.work() => {}
    }
    task.desk.close();
}

struct Task {
    name: Arc<str>,
    client: Client,
    units: Vec<UnitState>,
    groups: Vec<Group>,
    schedule: Schedule,
    /// What the schedule's milliseconds count from.
    started: Instant,
    reopen: Reopen,
    desk: Desk,
    readings: mpsc::Sender<Reading>,
    /// Nobody takes readings fast enough.
    overrun: Trouble,
    status: watch::Sender<LineStatus>,
    stats: Arc<Stats>,
    pulse: Pulse,
    /// How long one request may take.
    request: Duration,
}

struct UnitState {
    name: Arc<str>,
    id: u8,
    /// Which of its reads the next probe uses: another each time, because one of them may be what is wrong.
    probe_turn: usize,
    /// Not all is well with it.
    trouble: Trouble,
}

/// The points of one unit that share an interval.
struct Group {
    unit: usize,
    points: Vec<LinePoint>,
    reads: Vec<TrackedRead>,
    /// Whether every sample was good; `None` before the first poll and after an outage.
    ok: Option<bool>,
}

/// A planned read, and how it has been doing. Some devices answer nothing at all to an address they do not
/// have; such a read rests without its unit.
struct TrackedRead {
    read: Read,
    breaker: Breaker,
    fault: Option<Fault>,
}

impl From<Read> for TrackedRead {
    fn from(read: Read) -> Self {
        TrackedRead { read, breaker: Breaker::default(), fault: None }
    }
}

/// When a broken line is opened again.
struct Reopen {
    failures: u32,
    at_ms: u64,
    longest_ms: u64,
    /// It is down, until an answer comes.
    trouble: Trouble,
}

/// What became of one read of a group.
enum Outcome {
    /// Its points have their samples.
    Done(TrackedRead),
    /// It was refused as a whole, and is two reads from now on.
    Split(TrackedRead, TrackedRead),
    /// The unit or the line is gone: so are the group's other reads, for the same reason.
    GiveUp(TrackedRead, Fault),
}

/// The samples of a group, by the place of the point in it.
struct Samples(Vec<Option<(Stamp, Result<Value, Fault>)>>);

impl Samples {
    fn put(&mut self, point: usize, at: Stamp, value: Result<Value, Fault>) {
        if let Some(slot) = self.0.get_mut(point) {
            *slot = Some((at, value));
        }
    }

    fn put_fault(&mut self, read: &Read, fault: &Fault) {
        let at = clock::now();
        for part in &read.parts {
            self.put(part.point, at, Err(fault.clone()));
        }
    }

    /// Gives every point without a sample this one.
    fn fill(&mut self, fault: &Fault) {
        let at = clock::now();
        for slot in self.0.iter_mut().filter(|slot| slot.is_none()) {
            *slot = Some((at, Err(fault.clone())));
        }
    }
}

impl Task {
    fn new(
        line: Line,
        desk: Desk,
        readings: mpsc::Sender<Reading>,
        status: watch::Sender<LineStatus>,
        stats: Arc<Stats>,
    ) -> Self {
        let client = Client::new(&line);
        let groups = groups(&line);
        let due: Vec<(usize, u64)> = groups
            .iter()
            .map(|group| (group.unit, group.points.first().map_or(1, |point| point.every.as_millis() as u64)))
            .collect();
        let longest_ms = match line.transport {
            Transport::Rtu(_) => LONGEST_REOPEN_SERIAL_MS,
            Transport::Tcp { .. } => LONGEST_REOPEN_TCP_MS,
        };
        status.send_replace(LineStatus::of(&line));
        let request = REQUEST_TIMEOUTS * line.timeout.max(SHORTEST_TIMEOUT);
        Task {
            name: line.name,
            client,
            units: line
                .units
                .into_iter()
                .map(|unit| UnitState {
                    name: unit.name,
                    id: unit.unit,
                    probe_turn: 0,
                    trouble: Trouble::default(),
                })
                .collect(),
            groups,
            schedule: Schedule::new(&due, 0),
            started: Instant::now(),
            reopen: Reopen { failures: 0, at_ms: 0, longest_ms, trouble: Trouble::default() },
            desk,
            readings,
            overrun: Trouble::default(),
            status,
            stats,
            pulse: line.pulse,
            request,
        }
    }

    async fn work(&mut self) {
        while !self.readings.is_closed() {
            self.progress();
            if self.client.down().is_some() && self.now_ms() >= self.reopen.at_ms {
                self.open().await;
            }
            match self.schedule.take(self.now_ms()) {
                Some(due) => {
                    self.poll(due).await;
                    self.write_one().await;
                }
                None => self.wait().await,
            }
        }
        debug!(line = %self.name, "nobody takes readings any more");
    }

    /// A request has ended, whatever came of it, or there is none; the next one may take its time.
    fn progress(&self) {
        self.pulse.busy(clock::mono_ms(), self.request);
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Waits for the next thing to do; if that is a write, does it.
    async fn wait(&mut self) {
        let reopen = self.client.down().is_some().then_some(self.reopen.at_ms);
        let next_ms = [self.schedule.next_ms(), reopen].into_iter().flatten().min();
        self.pulse.beat(clock::mono_ms());
        let idle = Instant::now() + IDLE;
        let due = next_ms.map_or(idle, |at_ms| idle.min(self.started + Duration::from_millis(at_ms)));
        let write = tokio::select! {
            write = self.desk.take() => write,
            () = sleep_until(due) => return,
            () = self.readings.closed(), if next_ms.is_none() => return,
        };
        self.write(write).await;
    }

    async fn open(&mut self) {
        self.client.open().await;
        if self.client.down().is_some() {
            return self.line_is_down();
        }
        debug!(line = %self.name, "open");
        self.schedule.line_returned();
        for group in &mut self.groups {
            group.ok = None;
            group.reads.iter_mut().for_each(|tracked| tracked.breaker.succeeded());
        }
        self.status.send_modify(|status| (status.up, status.error) = (true, None));
    }

    /// Says so, and plans the next attempt.
    fn line_is_down(&mut self) {
        let why = self.client.down().unwrap_or("closed").to_owned();
        let pause_ms = match self.reopen.failures {
            0 => 0,
            failures => (FIRST_REOPEN_MS << (failures - 1).min(16)).min(self.reopen.longest_ms),
        };
        self.reopen.failures = self.reopen.failures.saturating_add(1);
        let now_ms = self.now_ms();
        self.reopen.at_ms = now_ms + pause_ms;
        match self.reopen.trouble.happened(&why, now_ms) {
            Some(more) => warn!(line = %self.name, reason = why, "down{more}"),
            None => debug!(line = %self.name, reason = why, "still down"),
        }
        self.status.send_modify(|status| (status.up, status.error) = (false, Some(why)));
    }

    /// Handles one due group: exactly one sample for each of its points.
    async fn poll(&mut self, due: Due) {
        self.stats.polls_skipped.add(due.skipped);
        let mut samples = Samples(vec![None; self.groups[due.group].points.len()]);
        if let Some(why) = self.client.down() {
            samples.fill(&Fault::LineDown { what: why.to_owned() });
            return self.hand_on(due, samples, false);
        }
        match due.attempt {
            Attempt::Poll => self.read_group(due, &mut samples).await,
            Attempt::Probe => match self.probe(due.unit).await {
                None => self.read_group(due, &mut samples).await,
                Some(fault) => samples.fill(&fault),
            },
            Attempt::Rest { failures } => samples.fill(&Fault::Resting { failures }),
        }
        self.hand_on(due, samples, !matches!(due.attempt, Attempt::Rest { .. }));
    }

    /// Asks a silent unit for one small thing; the reason if it does not answer.
    async fn probe(&mut self, unit: usize) -> Option<Fault> {
        let mut reads: Vec<&TrackedRead> =
            self.groups.iter().filter(|group| group.unit == unit).flat_map(|group| &group.reads).collect();
        reads.sort_by_key(|tracked| (tracked.breaker.failures(), tracked.read.count));
        let turn = self.units[unit].probe_turn;
        let read = reads.get(turn % reads.len().max(1))?.read.clone();
        self.units[unit].probe_turn = turn.wrapping_add(1);
        match self.ask(unit, &read).await {
            Ok(_) | Err(Failure::Refused(_) | Failure::Wrong(_)) => None,
            Err(Failure::Silent(fault)) => Some(fault),
            Err(Failure::Broken(what)) => Some(Fault::LineDown { what }),
        }
    }

    /// Reads a group, the reads that have been answered best first, and gives up after the first silence: a
    /// dead unit costs its line one timeout.
    async fn read_group(&mut self, due: Due, samples: &mut Samples) {
        let mut todo = std::mem::take(&mut self.groups[due.group].reads);
        todo.sort_by_key(|tracked| {
            Reverse((tracked.breaker.failures(), tracked.read.space, tracked.read.address))
        });
        let mut done = Vec::with_capacity(todo.len());
        while let Some(tracked) = todo.pop() {
            if !done.is_empty() {
                self.write_one().await;
            }
            match self.read_one(due, tracked, samples).await {
                Outcome::Done(tracked) => done.push(tracked),
                Outcome::Split(left, right) => todo.extend([right, left]),
                Outcome::GiveUp(tracked, fault) => {
                    done.push(tracked);
                    done.append(&mut todo);
                    samples.fill(&fault);
                }
            }
        }
        self.groups[due.group].reads = done;
    }

    async fn read_one(&mut self, due: Due, mut tracked: TrackedRead, samples: &mut Samples) -> Outcome {
        let unit_is_well = self.schedule.failures(due.unit) == 0;
        if let (true, true, Some(fault)) =
            (unit_is_well, tracked.breaker.is_resting(self.now_ms()), &tracked.fault)
        {
            samples.put_fault(&tracked.read, fault);
            return Outcome::Done(tracked);
        }
        let fault = match self.ask(due.unit, &tracked.read).await {
            Ok(data) => {
                self.decode(due.group, &tracked.read, &data, samples);
                tracked.breaker.succeeded();
                return Outcome::Done(tracked);
            }
            Err(Failure::Refused(code)) => {
                tracked.breaker.succeeded();
                if let Some((left, right)) = self.split(due.unit, &tracked.read, code) {
                    return Outcome::Split(left.into(), right.into());
                }
                samples.put_fault(&tracked.read, &Fault::Exception { code });
                return Outcome::Done(tracked);
            }
            Err(Failure::Broken(what)) => return Outcome::GiveUp(tracked, Fault::LineDown { what }),
            Err(Failure::Wrong(fault) | Failure::Silent(fault)) => fault,
        };
        samples.put_fault(&tracked.read, &fault);
        tracked.fault = Some(fault.clone());
        tracked.breaker.failed(self.now_ms());
        if self.schedule.failures(due.unit) == 0 {
            return Outcome::Done(tracked); // it answered, if wrongly
        }
        Outcome::GiveUp(tracked, fault)
    }

    /// Exceptions 2 (an address it does not have) and 3 (more than it gives at once) may be about one point
    /// of many: the read is halved, for as long as the agent runs (V1.1b3, 7).
    fn split(&self, unit: usize, read: &Read, code: u8) -> Option<(Read, Read)> {
        let halves = if matches!(code, 2 | 3) { plan::split(read) } else { None };
        if halves.is_some() {
            let (name, Read { space, address, count, .. }) = (&self.units[unit].name, read);
            info!(line = %self.name, unit = %name, code,
                "refused {space} {address} and the {} after it as one read; from now on it is two", count - 1);
        }
        halves
    }

    fn decode(&self, group: usize, read: &Read, data: &Data, samples: &mut Samples) {
        let at = clock::now();
        for part in &read.parts {
            if let Some(point) = self.groups[group].points.get(part.point) {
                samples.put(part.point, at, value(point, part, data));
            }
        }
    }

    /// One request, with what it says about unit and line written down.
    async fn ask(&mut self, unit: usize, read: &Read) -> Result<Data, Failure> {
        let asked_ms = self.now_ms();
        let outcome = self.client.read(self.units[unit].id, read).await;
        self.note(unit, asked_ms, outcome.as_ref().err());
        outcome
    }

    /// Writes down what the outcome of a request says about unit and line.
    fn note(&mut self, unit: usize, asked_ms: u64, failure: Option<&Failure>) {
        self.progress();
        let now_ms = self.now_ms();
        match failure {
            None | Some(Failure::Refused(_) | Failure::Wrong(_)) => self.unit_answered(unit),
            Some(Failure::Silent(_)) => self.schedule.silent(unit, now_ms, now_ms - asked_ms),
            Some(Failure::Broken(_)) => {}
        }
        if self.client.down().is_some() {
            self.line_is_down();
        } else if self.client.is_proven() {
            self.reopen.failures = 0;
            if let Some(ended) = self.reopen.trouble.ended(now_ms) {
                let (after, failures) = (span(ended.lasted_ms), counted(ended.times, "failure"));
                info!(line = %self.name, "up again after {after}, {failures}");
            }
        }
    }

    /// Carries out one write, if one waits.
    async fn write_one(&mut self) {
        if let Some(write) = self.desk.try_take() {
            self.write(write).await;
        }
    }

    async fn write(&mut self, write: Write) {
        let outcome = self.carry_out(&write).await;
        let (line, ticket, value) = (&*self.name, write.ticket.0, &write.value);
        let place = self.point(write.point).map(|(unit, point)| (&*self.units[unit].name, point.name));
        let (unit, point) =
            place.as_ref().map_or((None, None), |(unit, point)| (Some(*unit), Some(&**point)));
        match &outcome {
            Ending::Done { read_back } => info!(line, unit, point, ticket, "written: {read_back}"),
            Ending::Failed { reason, .. } => {
                warn!(line, unit, point, ticket, reason, "{value} was not written")
            }
            Ending::Expired => {
                warn!(line, unit, point, ticket, reason = "it came too late", "{value} was not written")
            }
            Ending::Unknown { reason } => {
                warn!(line, unit, point, ticket, reason, "{value} may or may not have been written")
            }
        }
        self.desk.finish(outcome);
    }

    /// Whether the unit is resting does not matter: somebody asked.
    async fn carry_out(&mut self, write: &Write) -> Ending {
        let Some((unit, point)) = self.point(write.point) else {
            return not_sent("this line has no such point");
        };
        let Some(writable) = point.writable else { return not_sent("the point is not writable") };
        if let Err(why) = writable.check(&write.value) {
            return not_sent(why);
        }
        let words = match point.encoding.encode(&write.value) {
            Ok(words) => words,
            Err(why) => return not_sent(why),
        };
        let wanted = match point.encoding.decode(&words) {
            Ok(wanted) => wanted,
            Err(why) => return not_sent(why),
        };
        if is_too_late(write) {
            return Ending::Expired;
        }
        if let Err(fault) = self.read_point(unit, &point).await {
            return not_sent(format!("the point could not be read before: {fault}"));
        }
        if is_too_late(write) {
            return Ending::Expired;
        }
        self.desk.sending();
        let reply = self.send(unit, &point, words).await;
        if let Err(failure) = &reply
            && desk::is_certain(failure)
        {
            return Ending::Failed { reason: fault(failure.clone()).to_string(), read_back: None };
        }
        let read_back = self.read_point(unit, &point).await.and_then(|data| {
            let whole = Part { point: 0, offset: 0, words: point.encoding.words() };
            value(&point, &whole, &data)
        });
        if read_back.is_ok() {
            let sample = Sample { point: point.index, at: clock::now(), value: read_back.clone() };
            self.stats.samples_read.increment();
            self.send_reading(Reading { samples: vec![sample] });
        }
        desk::judge(&wanted, reply.map_err(fault), read_back)
    }

    /// The point and its unit's place.
    fn point(&self, index: PointIndex) -> Option<(usize, LinePoint)> {
        self.groups.iter().find_map(|group| {
            let point = group.points.iter().find(|point| point.index == index)?;
            Some((group.unit, point.clone()))
        })
    }

    /// Reads one point, on a line that is opened if it has to be.
    async fn read_point(&mut self, unit: usize, point: &LinePoint) -> Result<Data, Fault> {
        if self.client.down().is_some() {
            self.open().await;
        }
        let count = point.encoding.words();
        let read = Read { space: point.space, address: point.address, count, parts: Vec::new() };
        self.ask(unit, &read).await.map_err(fault)
    }

    /// Sends one write, once.
    async fn send(&mut self, unit: usize, point: &LinePoint, words: Words) -> Result<(), Failure> {
        let asked_ms = self.now_ms();
        let reply = self.client.write(self.units[unit].id, point.address, words).await;
        self.note(unit, asked_ms, reply.as_ref().err());
        reply
    }

    fn send_reading(&mut self, reading: Reading) {
        let now_ms = self.now_ms();
        match self.readings.try_send(reading) {
            Ok(()) => {
                if let Some(ended) = self.overrun.ended(now_ms) {
                    let lost = grouped(ended.times);
                    info!(line = %self.name, "readings are taken again; {lost} were thrown away");
                }
            }
            Err(TrySendError::Full(_)) => {
                self.stats.readings_overrun.increment();
                if let Some(more) = self.overrun.happened("", now_ms) {
                    warn!(line = %self.name, "readings are thrown away: the database cannot keep up{more}");
                }
            }
            Err(TrySendError::Closed(_)) => {}
        }
    }

    fn unit_answered(&mut self, unit: usize) {
        if self.schedule.failures(unit) > 0 {
            for group in self.groups.iter_mut().filter(|group| group.unit == unit) {
                group.ok = group.ok.filter(|&ok| ok); // what it could not answer before is unknown now
            }
        }
        self.units[unit].probe_turn = 0;
        self.schedule.answered(unit);
    }

    /// Counts, reports and sends the samples of a group.
    fn hand_on(&mut self, due: Due, mut samples: Samples, was_asked: bool) {
        samples.fill(&Fault::BadReply { what: "the point is in no reply".to_owned() });
        let group = &mut self.groups[due.group];
        let samples: Vec<Sample> = std::iter::zip(&group.points, samples.0.into_iter().flatten())
            .map(|(point, (at, value))| Sample { point: point.index, at, value })
            .collect();
        let bad = samples.iter().filter(|sample| sample.value.is_err()).count();
        self.stats.samples_read.add(samples.len() as u64);
        self.stats.samples_bad.add(bad as u64);
        group.ok = Some(bad == 0);
        self.report(due, &samples, was_asked);
        self.send_reading(Reading { samples });
    }

    /// Updates the unit's status, and logs when it changed between well and not.
    fn report(&mut self, due: Due, samples: &[Sample], was_asked: bool) {
        let mut ok = self.groups.iter().filter(|group| group.unit == due.unit).filter_map(|group| group.ok);
        let ok = ok.all(|ok| ok);
        let wrong = wrong(&self.groups[due.group].points, samples).filter(|_| was_asked);
        let kind = wrong.map(|(_, fault)| fault.kind());
        let error = wrong.map(|(point, fault)| match point {
            None => fault.to_string(),
            Some(point) => format!("{point}: {fault}"),
        });
        let last_ok = samples.iter().rev().find(|sample| sample.value.is_ok()).map(|sample| sample.at);
        let now_ms = self.now_ms();
        let UnitState { name, trouble, .. } = &mut self.units[due.unit];
        let (line, unit) = (&*self.name, &**name);
        if let (Some((point, fault)), Some(words)) = (wrong, &error) {
            let (reason, try_this) = (fault.to_string(), remedy(fault));
            match trouble.happened(words, now_ms) {
                Some(more) => warn!(line, unit, point, "{reason}{try_this}{more}"),
                None => debug!(line, unit, point, "{reason}"),
            }
        } else if ok
            && was_asked
            && let Some(ended) = trouble.ended(now_ms)
        {
            let (after, polls) = (span(ended.lasted_ms), counted(ended.times, "bad poll"));
            info!(line, unit, "well again after {after}, {polls}");
        }
        self.status.send_modify(|status| {
            let Some(unit) = status.units.get_mut(due.unit) else { return };
            unit.ok = ok;
            unit.polls += u64::from(was_asked);
            unit.errors += u64::from(error.is_some());
            if let Some(kind) = kind.filter(|_| was_asked) {
                *unit.errors_by_kind.entry(kind).or_default() += 1;
            }
            unit.last_ok = last_ok.or(unit.last_ok);
            unit.last_error = error.or(unit.last_error.take());
        });
    }
}

fn is_too_late(write: &Write) -> bool {
    write.not_after_mono_ms.is_some_and(|limit| clock::now().mono_ms > limit)
}

fn fault(failure: Failure) -> Fault {
    match failure {
        Failure::Refused(code) => Fault::Exception { code },
        Failure::Wrong(fault) | Failure::Silent(fault) => fault,
        Failure::Broken(what) => Fault::LineDown { what },
    }
}

/// The first thing wrong with the samples; with the point's name unless all have the same trouble.
fn wrong<'a>(points: &'a [LinePoint], samples: &'a [Sample]) -> Option<(Option<&'a str>, &'a Fault)> {
    let (point, fault) = std::iter::zip(points, samples)
        .find_map(|(point, sample)| sample.value.as_ref().err().map(|fault| (point, fault)))?;
    let shared = samples.iter().all(|sample| sample.value.as_ref() == Err(fault));
    Some(((!shared).then_some(&*point.name), fault))
}

/// What to try, to be written behind the fault; nothing where that says it itself.
fn remedy(fault: &Fault) -> &'static str {
    match fault {
        Fault::Timeout { .. } => "; check its power, its wiring and its unit identifier",
        Fault::BadReply { .. } => "; check that no two units have the same identifier",
        Fault::NotANumber { .. } => "; check the point's type and order",
        Fault::Exception { .. }
        | Fault::LineDown { .. }
        | Fault::Unreadable { .. }
        | Fault::Resting { .. } => "",
    }
}

/// The points of each unit by interval, with the reads they need.
fn groups(line: &Line) -> Vec<Group> {
    let mut groups: BTreeMap<(usize, Duration), Vec<LinePoint>> = BTreeMap::new();
    for (unit, points) in line.units.iter().map(|unit| &unit.points).enumerate() {
        for point in points {
            groups.entry((unit, point.every)).or_default().push(point.clone());
        }
    }
    let group = |((unit, _), points): ((usize, Duration), Vec<LinePoint>)| {
        let wants: Vec<Want> = points
            .iter()
            .map(|p| Want { space: p.space, address: p.address, words: p.encoding.words() })
            .collect();
        let reads = plan::plan(&wants, Limits::default()).into_iter().map(TrackedRead::from).collect();
        Group { unit, points, reads, ok: None }
    };
    groups.into_iter().map(group).collect()
}

fn value(point: &LinePoint, part: &Part, data: &Data) -> Result<Value, Fault> {
    let begin = usize::from(part.offset);
    let end = begin + usize::from(part.words);
    match data {
        Data::Bits(bits) => bits.get(begin).map(|&bit| point.encoding.decode_bit(bit)),
        Data::Registers(registers) => registers.get(begin..end).map(|r| point.encoding.decode_registers(r)),
    }
    .unwrap_or_else(|| Err(Fault::BadReply { what: "it is too short".to_owned() }))
}
