//! The field side: lines, pipeline and dispatch, which go on while the configuration changes.
//!
//! ```text
//! lines ──readings──► pipeline ──► store
//!   ▲───writes───── dispatch ◄───────┘
//! ```
//!
//! A start is a change from nothing. A line that is made with the same settings as before goes on untouched; any other
//! ends, and begins anew. Invariants: numbers of lines and points are never used twice, so that what comes late from a
//! line that has ended is never taken for another's; what is under way there is finished first; lines end before others
//! begin, because both may want one port; and nothing here waits for the store.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::warn;

use super::settings::{Seat, dispatch_settings, machine, modbus_line, reporting};
use super::{Faults, Part, join};
use crate::clock;
use crate::command::{Write, Written};
use crate::config::{self, Config};
use crate::dispatch::{self, LineEnd};
use crate::message::Message;
use crate::pipeline;
use crate::point::{PointIndex, Reading};
use crate::policy::{Policy, Reporting};
use crate::service::Service;
use crate::source::machine::{self, Machine, Values};
use crate::source::modbus::{self, Line, LineStatus};
use crate::stats::Stats;
use crate::store;

/// Readings on their way to the pipeline.
const READINGS_MAX: usize = 1024;
/// Writes on their way to one line: it has at most one at a time.
const WRITES_MAX: usize = 1;
/// Ends of writes on their way to dispatch.
const WRITTEN_MAX: usize = 64;
/// How long a write that has begun may take beside its line's own timeouts.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Timeouts of its line that a write may take: what is under way before it, its request, and reading back.
const WRITE_TIMEOUTS: u32 = 4;
/// How long the writes under way on lines that end may take. Then the line answers what it knows.
const FINISH: Duration = Duration::from_secs(5);
/// How long a line may take to end: it gives a write under way another second.
const END: Duration = Duration::from_secs(3);

/// The tasks of the field side.
pub(super) struct Field {
    faults: Faults,
    stats: Arc<Stats>,
    started: clock::Stamp,
    /// In the order of the configuration.
    lines: Vec<RunningLine>,
    machine: Option<RunningMachine>,
    /// For the next line that begins.
    next: Seat,
    /// Held until the stop, so that an agent without lines has a pipeline too.
    readings: Option<mpsc::Sender<Reading>>,
    written: mpsc::Sender<Written>,
    pipeline: JoinSet<()>,
    points: watch::Sender<Vec<(PointIndex, Reporting)>>,
    dispatch: JoinSet<()>,
    orders: watch::Sender<dispatch::Settings>,
    /// The newest orders under which no line is left that is not among them.
    settled: watch::Receiver<u64>,
    stop_dispatch: watch::Sender<bool>,
}

/// A line, and how it is told to stop.
struct RunningLine {
    /// What it is made with.
    line: Line,
    seat: Seat,
    end: LineEnd,
    status: watch::Receiver<LineStatus>,
    stop: watch::Sender<bool>,
    task: JoinSet<()>,
}

/// The source that tells of the machine, which is a line without writes.
struct RunningMachine {
    /// What it is made with.
    machine: Machine,
    first_point: usize,
    status: watch::Receiver<LineStatus>,
    values: watch::Receiver<Values>,
    stop: watch::Sender<bool>,
    task: JoinSet<()>,
}

/// A line's own ends of its channels, until it begins.
struct Ends {
    writes: mpsc::Receiver<Write>,
    status: watch::Sender<LineStatus>,
    stop: watch::Receiver<bool>,
}

impl Field {
    /// Pipeline and dispatch, still without lines and points: [`Field::change`] brings them.
    pub(super) fn new(
        config: &Config,
        store: &store::Handle,
        qos0: mpsc::Sender<Message>,
        stats: &Arc<Stats>,
        faults: Faults,
        started: clock::Stamp,
        service: &Service,
    ) -> Self {
        let (readings, from_lines) = mpsc::channel(READINGS_MAX);
        let (written, from_writes) = mpsc::channel(WRITTEN_MAX);
        let (points, reported) = watch::channel(Vec::new());
        let (orders, to_dispatch) = watch::channel(dispatch_settings(config, &[], Vec::new(), 0, faults));
        let (settles, settled) = watch::channel(0);
        let (stop_dispatch, dispatch_stopped) = watch::channel(false);
        let mut pipeline = JoinSet::new();
        let policy = Policy::new(&config.gateway.id, &clock::boot_id());
        let (outbox, counters) = (store.clone(), Arc::clone(stats));
        let pulse = faults.pulse(service, Part::Pipeline, "the pipeline");
        let task = pipeline::run(policy, reported, from_lines, outbox, qos0, counters, pulse);
        pipeline.spawn(faults.freeze(Part::Pipeline, task));
        let mut dispatch = JoinSet::new();
        let (outbox, counters) = (store.clone(), Arc::clone(stats));
        let pulse = faults.pulse(service, Part::Dispatch, "the commands");
        let task =
            dispatch::run(to_dispatch, settles, outbox, from_writes, counters, dispatch_stopped, pulse);
        dispatch.spawn(faults.freeze(Part::Dispatch, task));
        Field {
            faults,
            stats: Arc::clone(stats),
            started,
            lines: Vec::new(),
            machine: None,
            next: Seat { line: 0, first_point: 0 },
            readings: Some(readings),
            written,
            pipeline,
            points,
            dispatch,
            orders,
            settled,
            stop_dispatch,
        }
    }

    /// Brings lines, points and commands to what this configuration says. Ends after 8 s at the latest, whatever lines
    /// and store do.
    pub(super) async fn change(&mut self, config: &Config, service: &Service) {
        let mut leaving = std::mem::take(&mut self.lines);
        let mut beginning = Vec::new();
        for line in &config.modbus {
            let is_same = |running: &RunningLine| {
                running.line.name == line.name
                    && running.line.is_like(&modbus_line(config, line, running.seat))
            };
            let running = match leaving.iter().position(is_same) {
                Some(place) => leaving.remove(place),
                None => {
                    let (running, ends) = self.plan(config, line);
                    beginning.push((self.lines.len(), ends));
                    running
                }
            };
            self.lines.push(running);
        }
        let seats: Vec<Seat> = self.lines.iter().map(|running| running.seat).collect();
        let ends = self.lines.iter().map(|running| running.end.clone()).collect();
        let number = self.orders.borrow().number + 1;
        self.orders.send_replace(dispatch_settings(config, &seats, ends, number, self.faults));
        self.end(leaving, number).await;
        let machine = self.end_other_machine(config).await;
        let first = machine.as_ref().map_or(self.next.first_point, |(_, first)| *first);
        let first = self.machine.as_ref().map_or(first, |running| running.first_point);
        self.points.send_replace(reporting(config, &seats, first));
        if let Some((machine, first_point)) = machine {
            self.begin_machine(machine, first_point);
        }
        for (place, ends) in beginning {
            self.begin(place, ends, service);
        }
    }

    fn plan(&mut self, config: &Config, line: &config::ModbusLine) -> (RunningLine, Ends) {
        let seat = self.next;
        let line_of = modbus_line(config, line, seat);
        let points: usize = line.units.iter().map(|unit| unit.points.len()).sum();
        self.next = Seat { line: seat.line + 1, first_point: seat.first_point + points };
        let (writes, to_write) = mpsc::channel(WRITES_MAX);
        let (status_to, status) = watch::channel(LineStatus::of(&line_of));
        let (stop, stopped) = watch::channel(false);
        let patience = WRITE_TIMEOUTS * line.timeout + WRITE_PATIENCE;
        let end = LineEnd { line: seat.line, writes, patience };
        let running = RunningLine { line: line_of, seat, end, status, stop, task: JoinSet::new() };
        (running, Ends { writes: to_write, status: status_to, stop: stopped })
    }

    fn begin(&mut self, place: usize, ends: Ends, service: &Service) {
        let Some(readings) = self.readings.clone() else { return };
        let running = &mut self.lines[place];
        let pulse = self.faults.pulse(service, Part::Line, &format!("line {}", running.line.name));
        let line = Line { pulse, ..running.line.clone() };
        let (written, stats) = (self.written.clone(), Arc::clone(&self.stats));
        let Ends { writes, status, stop } = ends;
        let task = modbus::run(line, readings, writes, written, status, stats, stop);
        running.task.spawn(self.faults.freeze(Part::Line, task));
    }

    /// Ends these lines, which the orders of that number do not name any more.
    async fn end(&mut self, mut leaving: Vec<RunningLine>, number: u64) {
        if leaving.is_empty() {
            return;
        }
        if timeout(FINISH, self.settled.wait_for(|settled| *settled >= number)).await.is_err() {
            warn!("a write on a line that ends was not finished in time; the line answers what it knows");
        }
        for running in &leaving {
            running.stop.send_replace(true);
        }
        let deadline = Instant::now() + END;
        for running in &mut leaving {
            join(&mut running.task, deadline, &running.line.name).await;
        }
    }

    /// Ends the source that tells of the machine, unless it is to go on as it is; returned is the one to begin and its
    /// first point.
    async fn end_other_machine(&mut self, config: &Config) -> Option<(Machine, usize)> {
        let wanted = |first_point| machine(config, first_point, self.started, self.faults);
        let points = self.machine.as_ref().map(|running| (running.first_point, &running.machine.points));
        if let Some((first_point, points)) = points
            && wanted(first_point).is_some_and(|machine| machine.points == *points)
        {
            return None;
        }
        let first_point = self.next.first_point;
        let beginning = wanted(first_point).map(|machine| (machine, first_point));
        if let Some(mut running) = self.machine.take() {
            running.stop.send_replace(true);
            join(&mut running.task, Instant::now() + END, "the machine's values").await;
        }
        self.next.first_point += beginning.as_ref().map_or(0, |(machine, _)| machine.points.len());
        beginning
    }

    fn begin_machine(&mut self, machine: Machine, first_point: usize) {
        let Some(readings) = self.readings.clone() else { return };
        let (status_to, status) = watch::channel(machine::status());
        let (values_to, values) = watch::channel(Values::new());
        let (stop, stopped) = watch::channel(false);
        let mut task = JoinSet::new();
        let stats = Arc::clone(&self.stats);
        task.spawn(machine::run(machine.clone(), readings, status_to, values_to, stats, stopped));
        self.machine = Some(RunningMachine { machine, first_point, status, values, stop, task });
    }

    /// Every line's state, in the order of the configuration, and the machine's.
    pub(super) fn states(&self) -> Vec<watch::Receiver<LineStatus>> {
        let machine = self.machine.iter().map(|running| running.status.clone());
        self.lines.iter().map(|running| running.status.clone()).chain(machine).collect()
    }

    /// What the machine said of itself last.
    pub(super) fn machine_values(&self) -> watch::Receiver<Values> {
        self.machine
            .as_ref()
            .map_or_else(|| watch::channel(Values::new()).1, |running| running.values.clone())
    }

    /// Resolves when a part ends although nobody asked it to.
    pub(super) async fn ended(&mut self) {
        let machine = self.machine.iter_mut().map(|running| &mut running.task);
        let lines = self.lines.iter_mut().map(|running| &mut running.task).chain(machine);
        let mut lines: FuturesUnordered<_> = lines.map(JoinSet::join_next).collect();
        tokio::select! {
            // No lines are no end.
            Some(_) = lines.next() => {}
            Some(_) = self.dispatch.join_next() => {}
            Some(_) = self.pipeline.join_next() => {}
        }
    }

    /// In the order of the flow: writes under way are finished, nothing new comes in, what came in is stored.
    pub(super) async fn stop(&mut self, deadline: Instant) {
        self.stop_dispatch.send_replace(true);
        join(&mut self.dispatch, deadline, "the commands").await;
        for running in &self.lines {
            running.stop.send_replace(true);
        }
        for running in &mut self.lines {
            join(&mut running.task, deadline, &running.line.name).await;
        }
        if let Some(running) = &mut self.machine {
            running.stop.send_replace(true);
            join(&mut running.task, deadline, "the machine's values").await;
        }
        self.readings = None;
        join(&mut self.pipeline, deadline, "the pipeline").await;
    }
}
