//! Builds every task from the configuration, joins them with channels, stops them in order.
//!
//! ```text
//! lines ──readings──► pipeline ──► store ◄──► uplink        reporter answers the control socket
//!   ▲───writes───── dispatch ◄───────┘
//! ```
//!
//! Invariant: a stop follows the flow (dispatch, sources, pipeline, uplink, store), each with a deadline; whatever is
//! not sent by then is in the database.

use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{error, info, warn};

use crate::clock;
use crate::config::{self, Config};
use crate::control::{self, BindError};
use crate::dispatch::desk::Limits;
use crate::dispatch::{self, LineEnd};
use crate::health::{Facts, Reporter};
use crate::message::{Qos, TopicError};
use crate::pipeline;
use crate::point::{PointIndex, Reading};
use crate::policy::Policy;
use crate::policy::command::{self, Allowed, WritablePoint};
use crate::policy::format::Speaker;
use crate::progress::{Patience, Pulse};
use crate::service::Service;
use crate::source::machine::{self, Machine, MachinePoint, Values};
use crate::source::modbus::{self, LateReplies, Line, LinePoint, LineStatus, Unit};
use crate::stats::Stats;
use crate::store::{self, Store, StoreError};
use crate::uplink::connection::{self, LinkStatus, Stop, Uplink};
use crate::uplink::packet;
use crate::uplink::presence::Presence;
use crate::uplink::session;

/// Readings on their way to the pipeline.
const READINGS_MAX: usize = 1024;
/// QoS 0 messages on their way to the uplink.
const QOS0_MAX: usize = 256;
/// Announcements on their way to the uplink: every unit's state and the health message.
const ANNOUNCEMENTS_MAX: usize = 1024;
/// Control requests on their way to the reporter.
const REQUESTS_MAX: usize = 64;
/// Writes on their way to one line: it has at most one at a time.
const WRITES_MAX: usize = 1;
/// Ends of writes on their way to dispatch.
const WRITTEN_MAX: usize = 64;
/// How long a write that has begun may take beside its line's own timeouts.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Timeouts of its line that a write may take: what is under way before it, its request, and reading back.
const WRITE_TIMEOUTS: u32 = 4;
/// How long the store may take to close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a stop may take beside `drain_timeout`: the goodbye, the control socket, closing, and some to spare.
const STOP_BESIDE_DRAIN: Duration = Duration::from_secs(30);
/// When the task that a test wants to see frozen is.
const FREEZE_AFTER: Duration = Duration::from_secs(2);

/// Why the agent could not start, or ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The database.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The control socket.
    #[error("{0}")]
    Control(#[from] BindError),
    /// The base topic leaves no room.
    #[error("[gateway] base_topic: {0}")]
    BaseTopic(#[from] TopicError),
    /// The operating system gave no thread or no signal handler.
    #[error("the system gives no thread or signal handler: {0}")]
    System(#[from] io::Error),
    /// A task ended although nobody asked it to.
    #[error("a part of the agent ended unasked; this is a bug in fieldpost, please report it")]
    Unasked,
}

/// Switches for tests that must fail when a promise is broken; production leaves them at their default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// The store's.
    pub store: store::Faults,
    /// PUBREL leaves before the PUBREC is committed.
    pub break_pubrel_order: bool,
    /// A write is handed to its line before its beginning is committed.
    pub break_command_order: bool,
    /// A task that is never polled again soon after the start.
    pub frozen: Option<Part>,
    /// How many times less patient with every part the watch is; 0 is as 1.
    pub haste: u32,
    /// Where another machine's `proc` and `sys` are.
    pub machine_root: Option<&'static Path>,
}

/// A part of the agent that the service manager's watchdog depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The store's thread, and the start before it. It is no task, so it is not frozen: a sync that hangs does that.
    Store,
    /// Every line.
    Line,
    /// The way up.
    Pipeline,
    /// The way down.
    Dispatch,
    /// The way to the broker.
    Uplink,
    /// The control socket's answers and what is said about ourselves.
    Reporter,
}

impl Faults {
    fn patience(&self, part: Part) -> Duration {
        let patience = Patience::default();
        let patience = match part {
            Part::Store => patience.store,
            Part::Line => patience.line,
            Part::Pipeline | Part::Dispatch | Part::Uplink | Part::Reporter => patience.waits_for_store,
        };
        patience / self.haste.max(1)
    }

    fn pulse(&self, service: &Service, part: Part, name: &str) -> Pulse {
        service.part(name, self.patience(part))
    }

    /// The task, which is polled for a moment only if it is the one to be frozen.
    async fn freeze(self, part: Part, task: impl Future<Output = ()>) {
        if self.frozen != Some(part) {
            return task.await;
        }
        let mut task = pin!(task);
        if timeout(FREEZE_AFTER, task.as_mut()).await.is_err() {
            std::future::pending().await
        }
    }
}

/// Runs until it is asked to stop by SIGTERM or SIGINT.
///
/// # Errors
/// It could not start, or ended without being asked to.
pub async fn run(config: Config) -> Result<(), AgentError> {
    run_with(config, Faults::default()).await
}

/// Like [`run`], with faults.
///
/// # Errors
/// As [`run`].
pub async fn run_with(config: Config, faults: Faults) -> Result<(), AgentError> {
    let mut signals = Signals::new()?;
    let (summary, shown) = watch::channel(String::new());
    let service = Service::begin(shown)?;
    let agent = Agent::start(&config, faults, &service, summary)?;
    service.ready();
    agent.until_stopped(&mut signals, config.gateway.drain_timeout, &service).await
}

/// Runs the sources alone, until it is asked to stop or `readings` is closed.
///
/// # Errors
/// It could not start, or ended without being asked to.
pub async fn run_dry(config: Config, readings: mpsc::Sender<Reading>) -> Result<(), AgentError> {
    let mut signals = Signals::new()?;
    let stats = Arc::new(Stats::default());
    let (stop, stopped) = watch::channel(false);
    let mut lines = JoinSet::new();
    for line in &config.modbus {
        let line = modbus_line(&config, line);
        let (status, _) = watch::channel(LineStatus::of(&line));
        let ((_, writes), (written, _)) = (mpsc::channel(1), mpsc::channel(1)); // nobody writes here
        let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), stopped.clone());
        lines.spawn(modbus::run(line, readings, writes, written, status, stats, stop));
    }
    if let Some(machine) = machine(&config, clock::now(), Faults::default()) {
        let ((status, _), (values, _)) = (watch::channel(machine::status()), watch::channel(Values::new()));
        let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), stopped.clone());
        lines.spawn(machine::run(machine, readings, status, values, stats, stop));
    }
    tokio::select! {
        () = signals.next() => {}
        () = readings.closed() => {}
    }
    drop(readings);
    let _gone = stop.send(true);
    join(&mut lines, Instant::now() + config.gateway.drain_timeout, "the lines").await;
    Ok(())
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Handled, or it would end the process.
    _hangup: Signal,
    /// Handled, or the first write beyond a limit on file sizes (`ulimit -f`) would end the process. So it is an
    /// error of that write.
    _file_size: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _hangup: signal(SignalKind::hangup())?,
            _file_size: signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Every task, and how it is told to stop.
struct Agent {
    /// Held until the stop, so that an agent without lines has a pipeline too.
    readings: Option<mpsc::Sender<Reading>>,
    dispatch: JoinSet<()>,
    stop_dispatch: watch::Sender<bool>,
    lines: JoinSet<()>,
    stop_lines: watch::Sender<bool>,
    pipeline: JoinSet<()>,
    uplink: JoinSet<()>,
    stop_uplink: watch::Sender<Stop>,
    reporter: JoinSet<()>,
    stop_reporter: watch::Sender<bool>,
    store: store::Handle,
    store_thread: JoinHandle<()>,
}

impl Agent {
    fn start(
        config: &Config,
        faults: Faults,
        service: &Service,
        summary: watch::Sender<String>,
    ) -> Result<Self, AgentError> {
        let started = clock::now();
        let stats = Arc::new(Stats::default());
        let pulse = faults.pulse(service, Part::Store, "the store");
        let mut store = Store::open(store::Settings { pulse, ..store_settings(config, faults) })?;
        let boot = store.boot().clone();
        let listener = control::bind(&config.control.socket)?;
        let speaker = Speaker {
            gateway: config.gateway.id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            boot: u64::from(boot.boot),
            instance: fastrand::u64(..),
        };
        let presence = Presence::new(&config.gateway.base_topic, speaker.clone())?;
        let brokers = config.brokers().map(|broker| uplink_settings(config, broker, &speaker, faults));
        let brokers = brokers.collect::<Result<Vec<_>, _>>()?;
        let owners: Vec<_> = brokers.iter().map(connection::Settings::owner).collect();
        let settled = store.keep_owners(&owners, config.broker.on_session_loss)?;
        stats.possibly_doubled.add(settled.possibly_doubled);
        stats.possibly_lost.add(settled.possibly_lost);
        let (store, store_thread) = store::spawn(store, Arc::clone(&stats))?;

        let (readings, from_lines) = mpsc::channel(READINGS_MAX);
        let (qos0, to_send) = mpsc::channel(QOS0_MAX);
        let (announcements, to_announce) = mpsc::channel(ANNOUNCEMENTS_MAX);
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        let (link_status, link) = watch::channel(LinkStatus::new());
        let (stop_dispatch, dispatch_stopped) = watch::channel(false);
        let (stop_lines, lines_stopped) = watch::channel(false);
        let (stop_uplink, uplink_stopped) = watch::channel(Stop::No);
        let (stop_reporter, reporter_stopped) = watch::channel(false);

        let mut lines = JoinSet::new();
        let mut line_states = Vec::new();
        let mut line_ends = Vec::new();
        let (written, from_lines_written) = mpsc::channel(WRITTEN_MAX);
        for line in &config.modbus {
            let (writes, to_write) = mpsc::channel(WRITES_MAX);
            line_ends.push(LineEnd { writes, patience: WRITE_TIMEOUTS * line.timeout + WRITE_PATIENCE });
            let pulse = faults.pulse(service, Part::Line, &format!("line {}", line.name));
            let line = Line { pulse, ..modbus_line(config, line) };
            let (status, state) = watch::channel(LineStatus::of(&line));
            line_states.push(state);
            let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), lines_stopped.clone());
            let task = modbus::run(line, readings, to_write, written.clone(), status, stats, stop);
            lines.spawn(faults.freeze(Part::Line, task));
        }
        let (values, machine_values) = watch::channel(Values::new());
        if let Some(machine) = machine(config, started, faults) {
            let (status, state) = watch::channel(machine::status());
            line_states.push(state);
            let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), lines_stopped.clone());
            lines.spawn(machine::run(machine, readings, status, values, stats, stop));
        }

        let mut dispatch = JoinSet::new();
        let settings = dispatch_settings(config, line_ends, faults);
        let (to_dispatch, counters) = (store.clone(), Arc::clone(&stats));
        let pulse = faults.pulse(service, Part::Dispatch, "the commands");
        let task =
            dispatch::run(settings, to_dispatch, from_lines_written, counters, dispatch_stopped, pulse);
        dispatch.spawn(faults.freeze(Part::Dispatch, task));

        let mut pipeline = JoinSet::new();
        let reporting = config.reporting().cloned().collect();
        let policy = Policy::new(&config.gateway.id, &clock::boot_id(), reporting);
        let (counters, pulse) = (Arc::clone(&stats), faults.pulse(service, Part::Pipeline, "the pipeline"));
        let task = pipeline::run(policy, from_lines, store.clone(), qos0.clone(), counters, pulse);
        pipeline.spawn(faults.freeze(Part::Pipeline, task));

        let task = Uplink::new(
            brokers,
            store.clone(),
            Arc::clone(&stats),
            link_status,
            to_send,
            to_announce,
            uplink_stopped,
        )?;
        let mut uplink = JoinSet::new();
        uplink
            .spawn(faults.freeze(Part::Uplink, task.run(faults.pulse(service, Part::Uplink, "the uplink"))));

        let mut reporter = JoinSet::new();
        let facts = facts(config, started);
        let task = Reporter {
            facts,
            presence,
            store: store.clone(),
            stats,
            link,
            lines: line_states,
            machine: machine_values,
            announcements,
            qos0,
            summary,
            pulse: faults.pulse(service, Part::Reporter, "the reporter"),
        };
        reporter.spawn(faults.freeze(Part::Reporter, task.run(asked, reporter_stopped)));
        reporter.spawn(control::serve(listener, requests));

        for warning in config.warnings() {
            warn!("{warning}");
        }
        info!(
            gateway = %config.gateway.id,
            boot = boot.boot,
            epoch = boot.epoch,
            lines = config.modbus.len(),
            points = config.reporting().count(),
            clock_is_right = started.wall_is_right(),
            "fieldpost {} is running",
            env!("CARGO_PKG_VERSION")
        );
        Ok(Agent {
            readings: Some(readings),
            dispatch,
            stop_dispatch,
            lines,
            stop_lines,
            pipeline,
            uplink,
            stop_uplink,
            reporter,
            stop_reporter,
            store,
            store_thread,
        })
    }

    async fn until_stopped(
        mut self,
        signals: &mut Signals,
        drain: Duration,
        service: &Service,
    ) -> Result<(), AgentError> {
        let asked = tokio::select! {
            () = signals.next() => true,
            // None of these ends before it is told to; an empty set of lines is no end.
            Some(_) = self.lines.join_next(), if !self.lines.is_empty() => false,
            Some(_) = self.dispatch.join_next() => false,
            Some(_) = self.pipeline.join_next() => false,
            Some(_) = self.uplink.join_next() => false,
            Some(_) = self.reporter.join_next() => false,
        };
        if !asked {
            error!("a part of the agent has ended unasked; everything stops");
        }
        service.stopping(drain + STOP_BESIDE_DRAIN);
        info!("stopping: what is in flight is finished first, a second signal skips that");
        let again = {
            let stopping = self.stop(Instant::now() + drain);
            tokio::pin!(stopping);
            tokio::select! {
                () = &mut stopping => false,
                () = signals.next() => true,
            }
        };
        if again {
            warn!("stopping at once; everything accepted is in the database");
            let _gone = self.stop_uplink.send(Stop::Now);
            join(&mut self.uplink, Instant::now() + Duration::from_secs(1), "the uplink").await;
        }
        self.close().await;
        info!("stopped");
        if asked { Ok(()) } else { Err(AgentError::Unasked) }
    }

    /// In the order of the flow: writes under way are finished, nothing new comes in, what came in is stored, what is
    /// in flight is finished.
    async fn stop(&mut self, deadline: Instant) {
        let _gone = self.stop_dispatch.send(true);
        join(&mut self.dispatch, deadline, "the commands").await;
        let _gone = self.stop_lines.send(true);
        join(&mut self.lines, deadline, "the lines").await;
        self.readings = None;
        join(&mut self.pipeline, deadline, "the pipeline").await;
        let _gone = self.stop_uplink.send(Stop::DrainUntil(deadline));
        // Beyond the deadline the uplink still says goodbye.
        join(&mut self.uplink, deadline + Duration::from_secs(5), "the uplink").await;
    }

    async fn close(mut self) {
        let _gone = self.stop_reporter.send(true);
        join(&mut self.reporter, Instant::now() + Duration::from_secs(1), "the control socket").await;
        let deadline = Instant::now() + CLOSE_DEADLINE;
        if timeout_at(deadline, self.store.close()).await.is_err() {
            error!("the database did not close in time; it is whole all the same");
            return;
        }
        drop(self.store);
        if self.store_thread.join().is_err() {
            error!("the store's thread has panicked");
        }
    }
}

async fn join(tasks: &mut JoinSet<()>, deadline: Instant, what: &str) {
    let all = async { while tasks.join_next().await.is_some() {} };
    if timeout_at(deadline, all).await.is_err() {
        warn!("{what} did not stop in time and were cut off");
        tasks.abort_all();
    }
}

/// What the store of this configuration is opened with.
pub(crate) fn store_settings(config: &Config, faults: Faults) -> store::Settings {
    store::Settings {
        path: config.store.path.clone(),
        quota: config.store.quota,
        when_full: config.store.when_full,
        lanes: config.store.lanes,
        min_free_disk: config.store.min_free_disk,
        replay: config.replay,
        budget: config.budget,
        commit_interval: config.store.commit_interval,
        pulse: Pulse::default(),
        faults: faults.store,
    }
}

fn uplink_settings(
    config: &Config,
    broker: &config::Broker,
    speaker: &Speaker,
    faults: Faults,
) -> Result<connection::Settings, TopicError> {
    let base = config.gateway.base_topic.clone();
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let session = session::Settings {
        protocol: broker.protocol,
        keep_alive_ms: ms(broker.keep_alive),
        ack_timeout_ms: ms(broker.ack_timeout),
        max_in_flight: broker.max_in_flight,
        qos2_window: broker.qos2_window,
        limits: packet::Limits {
            max_qos: Some(broker.max_qos.number()),
            retain_available: Some(broker.retain),
            max_packet_bytes: broker.max_packet_out,
            ..packet::Limits::default()
        },
        clean_start: broker.clean_start,
        on_session_loss: broker.on_session_loss,
        retry_refused_for_ms: ms(broker.retry_refused_for),
        canary: crate::message::Topic::new(&format!("{base}/canary"))?,
        presence: crate::message::Topic::new(&format!("{base}/state"))?,
        // What nobody may write to is not asked for: some brokers disconnect whoever subscribes to what he may not.
        commands: match writable_points(config).is_empty() {
            true => Vec::new(),
            false => vec![(config.commands.topic.to_string(), Qos::ExactlyOnce)],
        },
        broken: faults.break_pubrel_order.then_some(session::Broken::PubrelAfterCommit),
    };
    Ok(connection::Settings {
        host: broker.host.clone(),
        port: broker.port,
        tls: broker.tls.clone(),
        client_id: broker.client_id.clone(),
        username: broker.username.clone(),
        password_file: broker.password_file.clone(),
        session_expiry: broker.session_expiry,
        connect_timeout: broker.connect_timeout,
        backoff_max: broker.backoff_max,
        max_packet: broker.max_packet,
        will: broker.will,
        failover_after: broker.failover_after,
        failback_every: broker.failback_every,
        base,
        speaker: speaker.clone(),
        session,
    })
}

fn dispatch_settings(config: &Config, lines: Vec<LineEnd>, faults: Faults) -> dispatch::Settings {
    let commands = &config.commands;
    dispatch::Settings {
        gateway: config.gateway.id.clone(),
        judge: command::Settings {
            points: writable_points(config),
            ttl: commands.ttl,
            max_ttl: commands.max_ttl,
            answer_topic: commands.answer_topic.clone(),
            response_topics: commands.response_topics.clone(),
        },
        limits: Limits { max_per_second: commands.max_per_second, burst: commands.burst },
        lines,
        break_order: faults.break_command_order,
    }
}

fn writable_points(config: &Config) -> Vec<WritablePoint> {
    let writable = |(line, unit): (usize, &config::ModbusUnit)| {
        let points = unit.points.clone().filter_map(move |index| {
            let point = &config.points[index];
            let allowed = match point.writable? {
                modbus::Writable::Coil => Allowed::Bool,
                modbus::Writable::Range { min, max } => Allowed::Number { min, max },
            };
            Some(WritablePoint { name: point.report.id.to_string(), index: PointIndex(index), line, allowed })
        });
        points.collect::<Vec<_>>()
    };
    let units = config.modbus.iter().enumerate();
    let units = units.flat_map(|(line, modbus)| modbus.units.iter().map(move |unit| (line, unit)));
    units.flat_map(writable).collect()
}

fn facts(config: &Config, started: clock::Stamp) -> Facts {
    Facts {
        gateway: config.gateway.id.clone(),
        store_path: config.store.path.display().to_string(),
        health_interval: config.gateway.health_interval,
        boot_id: clock::boot_id(),
        started,
    }
}

fn machine(config: &Config, started: clock::Stamp, faults: Faults) -> Option<Machine> {
    let point = |(at, point): (usize, &config::MachinePoint)| MachinePoint {
        index: PointIndex(config.points.len() + at),
        sensor: point.sensor,
        every: point.every,
    };
    Some(Machine {
        points: config.machine.as_ref()?.points.iter().enumerate().map(point).collect(),
        store: config.store.path.clone(),
        started,
        root: faults.machine_root.unwrap_or(Path::new("/")).to_owned(),
    })
}

fn modbus_line(config: &Config, line: &config::ModbusLine) -> Line {
    let point = |index: usize| {
        let point = &config.points[index];
        LinePoint {
            index: PointIndex(index),
            name: point.report.id.point.clone(),
            space: point.space,
            address: point.address,
            encoding: point.encoding.clone(),
            every: point.every,
            writable: point.writable,
        }
    };
    let unit = |unit: &config::ModbusUnit| Unit {
        name: unit.name.clone(),
        unit: unit.unit,
        points: unit.points.clone().map(point).collect(),
    };
    Line {
        name: line.name.clone(),
        transport: line.transport.clone(),
        timeout: line.timeout,
        late_replies: LateReplies::Discard,
        units: line.units.iter().map(unit).collect(),
        pulse: Pulse::default(),
    }
}
