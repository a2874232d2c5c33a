//! Builds every task from the configuration, joins them with channels, changes them when it changes, stops them in order.
//!
//! ```text
//! lines ──readings──► pipeline ──► store ◄──► uplink        reporter answers the control socket and HTTP
//!   ▲───writes───── dispatch ◄───────┘
//! ```
//!
//! Invariant: a stop follows the flow (dispatch, sources, pipeline, uplink, store), each with a deadline; whatever is
//! not sent by then is in the database.

mod field;
mod reload;
mod settings;

use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{error, info, warn};

use crate::clock;
use crate::config::Config;
use crate::control::wire::Answer;
use crate::control::{self, BindError};
use crate::health::{Reporter, Scope};
use crate::http;
use crate::message::TopicError;
use crate::point::Reading;
use crate::policy::format::Speaker;
use crate::progress::{Patience, Pulse};
use crate::service::Service;
use crate::source::machine::{self, Values};
use crate::source::modbus::{self, LineStatus};
use crate::stats::Stats;
use crate::store::{self, Store, StoreError};
use crate::uplink::connection::{self, LinkStatus, Orders, Stop, Uplink};
use field::Field;
use settings::{Seat, facts, modbus_line, orders};

pub(crate) use settings::store_settings;

/// QoS 0 messages on their way to the uplink.
const QOS0_MAX: usize = 256;
/// Announcements on their way to the uplink: every unit's state and the health message.
const ANNOUNCEMENTS_MAX: usize = 1024;
/// Control requests on their way to the reporter.
const REQUESTS_MAX: usize = 64;
/// Reloads that are asked for while one goes on.
const RELOADS_MAX: usize = 4;
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

/// Runs until it is asked to stop by SIGTERM or SIGINT. By SIGHUP, or through the control socket, it is asked to read
/// `file`, an absolute path, again and to go on with what it says.
///
/// # Errors
/// It could not start, or ended without being asked to.
pub async fn run(config: Config, file: PathBuf) -> Result<(), AgentError> {
    run_with(config, file, Faults::default()).await
}

/// Like [`run`], with faults.
///
/// # Errors
/// As [`run`].
pub async fn run_with(config: Config, file: PathBuf, faults: Faults) -> Result<(), AgentError> {
    let mut signals = Signals::new()?;
    let (summary, shown) = watch::channel(String::new());
    let service = Service::begin(shown)?;
    let agent = Agent::start(config, file, faults, &service, summary).await?;
    service.ready();
    agent.until_stopped(&mut signals, &service).await
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
    for (number, line) in config.modbus.iter().enumerate() {
        let first_point = line.units.first().map_or(0, |unit| unit.points.start);
        let line = modbus_line(&config, line, Seat { line: number, first_point });
        let (status, _) = watch::channel(LineStatus::of(&line));
        let ((_, writes), (written, _)) = (mpsc::channel(1), mpsc::channel(1)); // nobody writes here
        let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), stopped.clone());
        lines.spawn(modbus::run(line, readings, writes, written, status, stats, stop));
    }
    if let Some(machine) = settings::machine(&config, config.points.len(), clock::now(), Faults::default()) {
        let ((status, _), (values, _)) = (watch::channel(machine::status()), watch::channel(Values::new()));
        let (readings, stats, stop) = (readings.clone(), Arc::clone(&stats), stopped.clone());
        lines.spawn(machine::run(machine, readings, status, values, stats, stop));
    }
    tokio::select! {
        _ = signals.next() => {}
        () = readings.closed() => {}
    }
    drop(readings);
    let _gone = stop.send(true);
    join(&mut lines, Instant::now() + config.gateway.drain_timeout, "the lines").await;
    Ok(())
}

/// SIGTERM, SIGINT and SIGHUP.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    /// Handled, or the first write beyond a limit on file sizes (`ulimit -f`) would end the process. So it is an
    /// error of that write.
    _file_size: Signal,
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Stop,
    Reload,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            _file_size: signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hang_up.recv() => Asked::Reload,
        }
    }

    /// The next one that asks to stop; a stop is not the time to read a configuration.
    async fn stop(&mut self) {
        while self.next().await != Asked::Stop {
            warn!("not reloaded: the agent is stopping");
        }
    }
}

/// Every task, and how it is told to stop or to change.
struct Agent {
    /// What it runs by, and where that was read.
    config: Config,
    file: PathBuf,
    faults: Faults,
    speaker: Speaker,
    field: Field,
    uplink: JoinSet<()>,
    orders: watch::Sender<Orders>,
    stop_uplink: watch::Sender<Stop>,
    reporter: JoinSet<()>,
    scope: watch::Sender<Scope>,
    reloads: mpsc::Receiver<oneshot::Sender<Answer>>,
    stop_reporter: watch::Sender<bool>,
    store: store::Handle,
    store_thread: JoinHandle<()>,
}

enum Wake {
    Stop,
    /// Asked for by a signal, or by somebody who waits for the answer.
    Reload(Option<oneshot::Sender<Answer>>),
    Ended,
}

impl Agent {
    async fn start(
        config: Config,
        file: PathBuf,
        faults: Faults,
        service: &Service,
        summary: watch::Sender<String>,
    ) -> Result<Self, AgentError> {
        let started = clock::now();
        let stats = Arc::new(Stats::default());
        let pulse = faults.pulse(service, Part::Store, "the store");
        let mut store = Store::open(store::Settings { pulse, ..store_settings(&config, faults) })?;
        let boot = store.boot().clone();
        let listener = control::bind(&config.control.socket)?;
        let speaker = Speaker {
            gateway: config.gateway.id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            boot: u64::from(boot.boot),
            instance: fastrand::u64(..),
        };
        let orders = orders(&config, &speaker, faults)?;
        let owners: Vec<_> = orders.brokers.iter().map(connection::Settings::owner).collect();
        let settled = store.keep_owners(&owners, config.broker.on_session_loss)?;
        stats.possibly_doubled.add(settled.possibly_doubled);
        stats.possibly_lost.add(settled.possibly_lost);
        let (store, store_thread) = store::spawn(store, Arc::clone(&stats))?;

        let (qos0, to_send) = mpsc::channel(QOS0_MAX);
        let (announcements, to_announce) = mpsc::channel(ANNOUNCEMENTS_MAX);
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        let (asks_reload, reloads) = mpsc::channel(RELOADS_MAX);
        let (link_status, link) = watch::channel(LinkStatus::new());
        let (stop_uplink, uplink_stopped) = watch::channel(Stop::No);
        let (stop_reporter, reporter_stopped) = watch::channel(false);

        let mut field = Field::new(&config, &store, qos0.clone(), &stats, faults, started, service);
        field.change(&config, service).await;

        let scope = settings::scope(&config, &orders.presence, &field);
        let (orders, to_uplink) = watch::channel(orders);
        let mut uplink = JoinSet::new();
        let (outbox, counters) = (store.clone(), Arc::clone(&stats));
        let task =
            Uplink::new(to_uplink, outbox, counters, link_status, to_send, to_announce, uplink_stopped);
        let pulse = faults.pulse(service, Part::Uplink, "the uplink");
        uplink.spawn(faults.freeze(Part::Uplink, task.run(pulse)));

        let mut reporter = JoinSet::new();
        let facts = facts(&config, started);
        let (scopes_to, scopes) = watch::channel(scope.clone());
        let outbox = store.clone();
        let counters = Arc::clone(&stats);
        let task = Reporter {
            facts,
            scope,
            scopes,
            reloads: asks_reload,
            store: outbox,
            stats,
            link,
            announcements,
            qos0,
            summary,
            pulse: faults.pulse(service, Part::Reporter, "the reporter"),
        };
        reporter.spawn(faults.freeze(Part::Reporter, task.run(asked, reporter_stopped)));
        if let Some(settings) = config.http.clone() {
            reporter.spawn(http::serve(settings, requests.clone(), counters, service.parts()));
        }
        reporter.spawn(control::serve(listener, requests));

        if !clock::is_judged() {
            warn!(
                "nobody says whether the clock is right, and values are called unsynchronised: the sandbox forbids to ask \
                 the kernel, and systemd-timesyncd has set no clock yet; with another time service allow adjtimex \
                 (systemd/fieldpost.service says how)"
            );
        }
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
            config,
            file,
            faults,
            speaker,
            field,
            uplink,
            orders,
            stop_uplink,
            reporter,
            scope: scopes_to,
            reloads,
            stop_reporter,
            store,
            store_thread,
        })
    }

    async fn until_stopped(mut self, signals: &mut Signals, service: &Service) -> Result<(), AgentError> {
        let asked = loop {
            match self.wait(signals).await {
                Wake::Stop => break true,
                Wake::Reload(reply) => self.reload(reply, service).await,
                Wake::Ended => break false,
            }
        };
        if !asked {
            error!("a part of the agent has ended unasked; everything stops");
        }
        let drain = self.config.gateway.drain_timeout;
        service.stopping(drain + STOP_BESIDE_DRAIN);
        info!("stopping: what is in flight is finished first, a second signal skips that");
        let again = {
            let stopping = self.stop(Instant::now() + drain);
            tokio::pin!(stopping);
            tokio::select! {
                () = &mut stopping => false,
                () = signals.stop() => true,
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

    async fn wait(&mut self, signals: &mut Signals) -> Wake {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::Stop => Wake::Stop,
                Asked::Reload => Wake::Reload(None),
            },
            Some(reply) = self.reloads.recv() => Wake::Reload(Some(reply)),
            // None of these ends before it is told to.
            () = self.field.ended() => Wake::Ended,
            Some(_) = self.uplink.join_next() => Wake::Ended,
            Some(_) = self.reporter.join_next() => Wake::Ended,
        }
    }

    /// In the order of the flow; what is in flight is finished.
    async fn stop(&mut self, deadline: Instant) {
        self.field.stop(deadline).await;
        let _gone = self.stop_uplink.send(Stop::DrainUntil(deadline));
        // Beyond the deadline the uplink still says goodbye.
        join(&mut self.uplink, deadline + Duration::from_secs(5), "the uplink").await;
    }

    async fn close(mut self) {
        // Whoever has asked for a reload meanwhile is told that the agent is stopping.
        self.reloads.close();
        while self.reloads.try_recv().is_ok() {}
        let _gone = self.stop_reporter.send(true);
        join(&mut self.reporter, Instant::now() + Duration::from_secs(1), "the control socket").await;
        let deadline = Instant::now() + CLOSE_DEADLINE;
        if timeout_at(deadline, self.store.close()).await.is_err() {
            error!("the database did not close in time; it is whole all the same");
            return;
        }
        // The last handles of the store's thread.
        drop((self.store, self.field, self.orders));
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
