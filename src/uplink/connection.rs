//! The uplink task: connects, carries the session's packets and turns, waits, connects again.
//!
//! All it decides is when to connect and when to stop; what is sent and what it means is the session's.
//! Invariant: whatever comes from the store carries its connection's number, and is thrown away on another.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until, timeout, timeout_at};
use tracing::debug;

use super::backoff::{Backoff, Cause};
use super::choice::{Choice, Patience};
use super::link::{self, ConnectError, Endpoint, Link, LinkError, Stream};
use super::log::Log;
use super::packet::{Connect, Limits, Packet, Protocol, ReasonCode, Will};
use super::presence::{Announcement, Heard, Presence};
use super::session::{self, Carry, Counted, Event, Session, SessionError};
use super::tls;
use crate::clock;
use crate::message::{Message, Qos};
use crate::progress::Pulse;
use crate::secret::{self, Unusable};
use crate::stats::Stats;
use crate::store::{self, StoreError, Turn, Turned};

/// Changes and gates that wait for a commit, at most, before reading from the broker pauses.
const BACKLOG_MAX: usize = 4096;
/// Packets handled between two turns, at most.
const PACKETS_PER_TURN: usize = 1024;
/// QoS 1 and 2 messages the broker may have under way to us (announced on MQTT 5).
const RECEIVE_MAX: u16 = 64;
/// Sent bytes may stay unacknowledged for so long before the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a broker that is left for a better one may take to acknowledge what is in flight.
const LEAVE: Duration = Duration::from_secs(10);
/// How long DISCONNECT and the presence before it may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// The same when the stop was asked for a second time.
const HASTY_GOODBYE: Duration = Duration::from_millis(300);
/// No QoS 0 message is added to more unsent bytes than this: a broker that reads nothing costs no more memory.
const QOS0_BEHIND_MAX_BYTES: usize = 1 << 20;
/// How often a clock that is not right is looked at while waiting, and a sign of life is given.
const LOOK: Duration = Duration::from_secs(1);
/// A connection the broker closes sooner than this after another like it looks like a takeover.
const SHORT_LIFE: Duration = Duration::from_secs(30);
/// How many of those in a row are called one.
const SHORT_LIVES: u32 = 4;

/// Where to connect, and as whom; replaced as a whole when the configuration changes.
#[derive(Debug, Clone)]
pub struct Orders {
    /// In the order of preference; at least one.
    pub brokers: Vec<Settings>,
    /// Who speaks, and on which topics.
    pub presence: Presence,
}

/// What the uplink needs to know of one broker.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `Some` for TLS.
    pub tls: Option<tls::Settings>,
    /// Client Identifier.
    pub client_id: String,
    /// User name.
    pub username: Option<String>,
    /// File that holds the password, read at every connect.
    pub password_file: Option<PathBuf>,
    /// Session Expiry Interval.
    pub session_expiry: Duration,
    /// For TCP, TLS and CONNACK together.
    pub connect_timeout: Duration,
    /// Longest delay between two attempts.
    pub backoff_max: Duration,
    /// How long it may fail before the next broker is tried.
    pub failover_after: Duration,
    /// While messages go here, how often the brokers before it are asked whether they are back.
    pub failback_every: Duration,
    /// Largest packet taken from the broker, in bytes.
    pub max_packet: u32,
    /// Whether a Will is registered.
    pub will: bool,
    /// Stands for the contents of the password file, the key and the certificates: other contents, other settings.
    pub files: u64,
    /// The session's own.
    pub session: session::Settings,
}

impl Settings {
    /// Where it is, without user name and password.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "mqtts" } else { "mqtt" };
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        format!("{scheme}://{host}:{}", self.port)
    }

    /// Whose session it is: broker and client identifier, as the store knows it.
    pub fn owner(&self) -> (String, String) {
        (format!("{}:{}", self.host, self.port), self.client_id.clone())
    }

    /// Whether a connection made with these settings can go on under the others: they differ in nothing but when to try
    /// again.
    fn serves(&self, other: &Settings) -> bool {
        let like_other = Settings {
            connect_timeout: other.connect_timeout,
            backoff_max: other.backoff_max,
            failover_after: other.failover_after,
            failback_every: other.failback_every,
            ..self.clone()
        };
        like_other == *other
    }

    /// Whether the files that these settings name can be used.
    ///
    /// # Errors
    /// Which cannot and why, in words.
    pub fn look_at_files(&self) -> Result<(), String> {
        let tls = self.tls.as_ref().map(|tls| tls::Client::new(tls, &self.host)).transpose();
        tls.map_err(|error| error.to_string())?;
        self.password().map(drop).map_err(|error| error.to_string())
    }

    fn password(&self) -> Result<Option<String>, End> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let unreadable = |source| End::Password { path: path.clone(), source };
        let mut file = secret::open(path).map_err(|error| match error {
            Unusable::Io(source) => unreadable(source),
            Unusable::Open { mode } => End::PasswordOpen { path: path.clone(), mode },
        })?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(unreadable)?;
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }

    /// Whether a connection can be opened; nothing is sent on it.
    async fn answers(&self, stats: &Arc<Stats>) -> bool {
        let Ok(tls) = self.tls.as_ref().map(|tls| tls::Client::new(tls, &self.host)).transpose() else {
            return false;
        };
        link::open(&self.endpoint(tls.as_ref(), stats)).await.is_ok()
    }

    fn endpoint<'a>(&'a self, tls: Option<&'a tls::Client>, stats: &'a Arc<Stats>) -> Endpoint<'a> {
        let (host, port, timeout) = (&self.host, self.port, self.connect_timeout);
        Endpoint { host, port, tls, timeout, user_timeout: USER_TIMEOUT, stats }
    }

    fn patience(&self) -> Patience {
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Patience { failover_after_ms: ms(self.failover_after), failback_every_ms: ms(self.failback_every) }
    }
}

/// How far a stop has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Not asked for.
    No,
    /// What is in flight is finished until then, then goodbye.
    DrainUntil(Instant),
    /// At once.
    Now,
}

/// Where the link is, for screens and the health message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkStatus {
    /// Which broker it is to.
    pub broker: String,
    /// `5` or `3.1.1`.
    pub protocol: &'static str,
    /// What it is doing.
    pub state: LinkState,
    /// Since when it has been connected, or not; monotonic, in ms.
    pub since_mono_ms: u64,
    /// Why the last connection or attempt ended.
    pub last_error: Option<String>,
    /// Subscriptions granted at less than was asked for, in words.
    pub downgrades: Vec<String>,
    /// QoS 1 and 2 messages in flight.
    pub in_flight: u64,
    /// How many of them there may be on this connection.
    pub window: u64,
    /// How long the broker last took to answer on this connection, in milliseconds.
    pub round_trip_ms: Option<u64>,
    /// Whether the broker still had the session at the last connect.
    pub session_present: Option<bool>,
    /// Another client uses our identifier, or the database was a copy: in words.
    pub alarm: Option<String>,
    /// Keep Alive of the connection, in seconds.
    pub keep_alive_s: u64,
}

/// What the link is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// An attempt is being made.
    Connecting,
    /// Messages flow.
    Connected,
    /// The next attempt is made at that monotonic time, in ms.
    Waiting {
        /// Monotonic, in ms.
        until_mono_ms: u64,
    },
}

impl LinkStatus {
    /// Before the first attempt.
    pub fn new() -> Self {
        LinkStatus {
            broker: String::new(),
            protocol: "",
            state: LinkState::Connecting,
            since_mono_ms: clock::mono_ms(),
            last_error: None,
            downgrades: Vec::new(),
            in_flight: 0,
            window: 0,
            round_trip_ms: None,
            session_present: None,
            alarm: None,
            keep_alive_s: 0,
        }
    }
}

impl Default for LinkStatus {
    fn default() -> Self {
        LinkStatus::new()
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("{0}")]
    Connect(#[from] ConnectError),
    #[error("{0}")]
    Tls(#[from] tls::SetupError),
    #[error("cannot read the password file {path}: {source}; check [broker] password_file")]
    Password { path: PathBuf, source: std::io::Error },
    #[error(
        "password_file {path} can be read by every user of this machine (mode {mode:03o}): run `chmod 640 {path}`, \
         and give the file to the user fieldpost runs as",
        path = .path.display()
    )]
    PasswordOpen { path: PathBuf, mode: u32 },
    #[error("no CONNACK within {} s; is this an MQTT broker's port?", .0.as_secs())]
    NoConnack(Duration),
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("the store failed, so the connection starts anew: {0}")]
    Store(Arc<StoreError>),
    #[error("the database is a copy of the past (its broker has seen start {boot}): it takes a new epoch")]
    CopyOfThePast { boot: u64, epoch: Option<u32> },
    #[error("another agent is online as this gateway (start {boot}); give each gateway its own [gateway] id")]
    InUseElsewhere { boot: u64 },
    #[error("{url} answers again")]
    FailBack { to: usize, url: String },
    #[error("the configuration was changed")]
    Changed,
    #[error("the agent stops")]
    Stopped,
}

impl End {
    fn cause(&self) -> Cause {
        match self {
            End::InUseElsewhere { .. } | End::Session(SessionError::TakenOver) => Cause::TakenOver,
            _ => Cause::Failed,
        }
    }

    fn is_protocol_error(&self) -> bool {
        matches!(self, End::Session(SessionError::Protocol(_)) | End::Link(LinkError::Protocol { .. }))
    }

    fn is_not_authorized(&self) -> bool {
        matches!(self, End::Session(SessionError::Refused { reason: ReasonCode::NOT_AUTHORIZED, .. }))
    }

    /// Ways in which a 3.1.1 broker throws out a client whose identifier another one uses.
    fn is_hang_up(&self) -> bool {
        matches!(self, End::Link(LinkError::Closed | LinkError::Io(_)))
    }
}

/// The task and what it owns.
pub struct Uplink {
    /// In the order of preference.
    brokers: Vec<Settings>,
    choice: Choice,
    /// Those of the broker that was chosen.
    settings: Settings,
    /// Finds out whether a better one is back; one task at most.
    probe: JoinSet<Option<usize>>,
    store: store::Handle,
    stats: Arc<Stats>,
    status: watch::Sender<LinkStatus>,
    qos0: mpsc::Receiver<Message>,
    announcements: mpsc::Receiver<Announcement>,
    orders: watch::Receiver<Orders>,
    /// Whether the store keeps no session but those of these brokers.
    owners_kept: bool,
    stop: watch::Receiver<Stop>,
    /// The connection is being left: no other orders are looked at before the next one.
    leaves: bool,
    presence: Presence,
    /// Each broker's own.
    backoffs: Vec<Backoff>,
    connections: u64,
    short_lives: u32,
    /// Where the task says that it makes progress.
    pulse: Pulse,
    log: Log,
    /// What was last logged of what the broker does not allow.
    told: Vec<String>,
}

enum Wake {
    Packet(Result<Packet, LinkError>),
    Flushed(Result<(), LinkError>),
    Turned(Option<Turned>),
    Qos0(Message),
    Announcement(Announcement),
    Tick,
    /// A better broker is back, or is not.
    Probed(Option<usize>),
    /// There are other orders.
    Changed,
    Stop,
}

impl Uplink {
    /// The task, not yet running. The store keeps the sessions of the brokers in `orders` and no other.
    pub fn new(
        mut orders: watch::Receiver<Orders>,
        store: store::Handle,
        stats: Arc<Stats>,
        status: watch::Sender<LinkStatus>,
        qos0: mpsc::Receiver<Message>,
        announcements: mpsc::Receiver<Announcement>,
        stop: watch::Receiver<Stop>,
    ) -> Self {
        let Orders { brokers, presence } = orders.borrow_and_update().clone();
        let uplink = Uplink {
            choice: Choice::new(brokers.iter().map(Settings::patience).collect()),
            backoffs: brokers.iter().map(|broker| Backoff::new(broker.backoff_max)).collect(),
            settings: brokers[0].clone(),
            brokers,
            probe: JoinSet::new(),
            store,
            stats,
            status,
            qos0,
            announcements,
            orders,
            owners_kept: true,
            stop,
            leaves: false,
            presence,
            connections: 0,
            short_lives: 0,
            pulse: Pulse::default(),
            log: Log::new(),
            told: Vec::new(),
        };
        uplink.show_broker();
        uplink
    }

    fn show_broker(&self) {
        self.status.send_modify(|status| {
            status.broker = self.settings.url();
            status.protocol = self.settings.session.protocol.name();
        });
    }

    /// Goes over to the broker that was chosen. What this process remembers of the other one's connection is of no use
    /// here; what matters is in the store.
    fn change_broker(&mut self) -> Carry {
        self.settings = self.brokers[self.choice.current()].clone();
        self.probe.abort_all();
        self.short_lives = 0;
        self.status.send_modify(|status| status.downgrades.clear());
        self.show_broker();
        Carry::default()
    }

    /// Whether this connection is as the newest orders want it.
    fn goes_on(&self) -> bool {
        let owner = self.settings.owner();
        let orders = self.orders.borrow();
        orders.brokers.iter().find(|broker| broker.owner() == owner).is_some_and(|b| self.settings.serves(b))
    }

    /// Takes the newest orders. `stays`: with the broker it is connected to, if that is among them; otherwise it begins
    /// with the first. Returns whether the session is the same: what this process remembers is of no use to another.
    fn adopt(&mut self, stays: bool) -> bool {
        let owner = self.settings.owner();
        let Orders { brokers, presence } = self.orders.borrow_and_update().clone();
        let same = brokers.iter().position(|broker| broker.owner() == owner);
        let place = same.filter(|_| stays).unwrap_or(0);
        if presence.topic() != self.presence.topic() {
            self.presence = presence;
        }
        self.probe.abort_all();
        self.choice = Choice::beginning_with(place, brokers.iter().map(Settings::patience).collect());
        self.backoffs = brokers.iter().map(|broker| Backoff::new(broker.backoff_max)).collect();
        self.settings = brokers[place].clone();
        self.brokers = brokers;
        self.owners_kept = false;
        self.short_lives = 0;
        self.show_broker();
        same == Some(place)
    }

    /// Asked to stop or to connect elsewhere, while a connection is being opened.
    fn interruption(&self) -> impl Future<Output = End> + use<> {
        let (mut stop, mut orders) = (self.stop.clone(), self.orders.clone());
        async move {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop != Stop::No) => End::Stopped,
                Ok(()) = orders.changed() => End::Changed,
            }
        }
    }

    /// Connects again and again until it is asked to stop. Says through `pulse` that it makes progress; while the store
    /// owes it an answer, only an answer is.
    pub async fn run(mut self, pulse: Pulse) {
        self.pulse = pulse;
        let mut carry = Carry::default();
        while *self.stop.borrow() == Stop::No {
            self.pulse.beat(clock::mono_ms());
            if self.orders.has_changed().unwrap_or(false) {
                let connected = self.status.borrow().state == LinkState::Connected;
                if !self.adopt(connected) {
                    carry = Carry::default();
                }
            }
            self.set_state(LinkState::Connecting);
            let began = Instant::now();
            let end;
            (end, carry) = self.connection(carry).await;
            if matches!(end, End::Stopped) {
                break;
            }
            if matches!(end, End::Changed) {
                self.log.info("the configuration was changed: connecting anew");
                continue;
            }
            if let End::FailBack { to, url } = &end {
                self.log
                    .info(&format!("{url} answers again and stands earlier in the list: going back to it"));
                self.stats.failbacks.increment();
                self.choice.fail_back(*to);
                carry = self.change_broker();
                continue;
            }
            let cause = self.explain(&end, began);
            if !matches!(end, End::Store(_)) {
                self.choice.failed(clock::mono_ms());
            }
            if let End::CopyOfThePast { boot, epoch } = end {
                self.disown(boot, epoch).await;
                carry = Carry::default();
            }
            self.wait(cause).await;
            if self.choice.move_on(clock::mono_ms()) {
                let failed = self.settings.url();
                carry = self.change_broker();
                self.stats.failovers.increment();
                let next = self.settings.url();
                self.log
                    .warn(&format!("no connection to {failed} for too long: trying the next broker, {next}"));
            }
        }
        debug!("the uplink has stopped");
    }

    /// Logs and shows why a connection ended, and says how to wait.
    fn explain(&mut self, end: &End, began: Instant) -> Cause {
        let was_connected = self.status.borrow().state == LinkState::Connected;
        if !was_connected {
            self.stats.connect_failures.increment();
        }
        if end.is_protocol_error() {
            self.stats.protocol_errors.increment();
        }
        // An MQTT 5 broker says 0x8E instead; there a line that drops again and again is just that.
        let wordless = self.settings.session.protocol == Protocol::V311;
        let short = wordless && was_connected && end.is_hang_up() && began.elapsed() < SHORT_LIFE;
        self.short_lives = if short { self.short_lives + 1 } else { 0 };
        let mut cause = end.cause();
        let mut reason = end.to_string();
        if end.is_not_authorized() {
            // What mosquitto and others answer to a wrong password too (5.0 section 3.2.2.2 leaves them the choice).
            reason += match self.settings.username {
                Some(_) => "; check [broker] username and password_file too",
                None => "; no [broker] username is set",
            };
        }
        if self.short_lives >= SHORT_LIVES {
            cause = Cause::TakenOver;
            reason = format!(
                "{reason}; the broker has closed {SHORT_LIVES} connections one soon after the other: probably another \
                 client uses the client id {:?}",
                self.settings.client_id
            );
        }
        self.log.failed(&self.settings.url(), &reason, was_connected);
        let alarm = (cause == Cause::TakenOver).then(|| reason.clone());
        self.status.send_modify(|status| {
            status.last_error = Some(reason);
            status.alarm = alarm;
            status.in_flight = 0;
            status.round_trip_ms = None;
        });
        cause
    }

    async fn disown(&mut self, boot: u64, epoch: Option<u32>) {
        let policy = self.settings.session.on_session_loss;
        let boot = u32::try_from(boot).unwrap_or(u32::MAX - 1);
        match self.store.disown(epoch.unwrap_or(0), boot, policy).await {
            Ok(settled) => {
                self.stats.possibly_doubled.add(settled.possibly_doubled);
                self.stats.possibly_lost.add(settled.possibly_lost);
            }
            Err(Some(error)) => {
                self.log.warn(&format!("the copied database could not take a new epoch: {error}"))
            }
            Err(None) => {}
        }
    }

    /// Waits before the next attempt; what cannot be sent meanwhile is counted.
    async fn wait(&mut self, cause: Cause) {
        let now_ms = clock::mono_ms();
        let mut delay = self.backoffs[self.choice.current()].wait(cause, now_ms, fastrand::f64());
        if let Some(at_ms) = self.choice.moves_at_ms() {
            delay = delay.min(Duration::from_millis(at_ms.saturating_sub(now_ms)));
        }
        self.set_state(LinkState::Waiting { until_mono_ms: now_ms + delay.as_millis() as u64 });
        debug!(delay_ms = delay.as_millis() as u64, "waiting before the next attempt to connect");
        let until = Instant::now() + delay;
        let mut looks = interval(LOOK);
        let clock_was_right = clock::now().wall_is_right();
        let interruption = self.interruption();
        tokio::pin!(interruption);
        loop {
            tokio::select! {
                _ = looks.tick() => {
                    self.pulse.beat(clock::mono_ms());
                    // A certificate may be good by a clock that has just been set.
                    if !clock_was_right && clock::now().wall_is_right() {
                        return;
                    }
                }
                Some(_) = self.qos0.recv() => self.stats.qos0_dropped.increment(),
                Some(_) = self.announcements.recv() => {}
                // Also what was asked for while the connection ended.
                end = &mut interruption => return debug!(%end, "the wait is cut short"),
                () = sleep_until(until) => return,
            }
        }
    }

    fn set_state(&self, state: LinkState) {
        self.status.send_modify(|status| {
            if (status.state == LinkState::Connected) != (state == LinkState::Connected) {
                status.since_mono_ms = clock::mono_ms();
            }
            status.state = state;
        });
    }

    /// After a change: what is in flight at brokers, or as clients, that are not in the configuration any more goes back
    /// into the queue by policy, as at a start.
    async fn keep_owners(&mut self) -> Result<(), End> {
        if self.owners_kept {
            return Ok(());
        }
        let owners = self.brokers.iter().map(Settings::owner).collect();
        let settled = self.store.keep_owners(owners, self.brokers[0].session.on_session_loss).await;
        let settled = settled.map_err(|error| error.map_or(End::Stopped, End::Store))?;
        self.stats.possibly_doubled.add(settled.possibly_doubled);
        self.stats.possibly_lost.add(settled.possibly_lost);
        self.owners_kept = true;
        Ok(())
    }

    /// One connection, from what must be committed before CONNECT to its end.
    async fn connection(&mut self, carry: Carry) -> (End, Carry) {
        self.leaves = false;
        if let Err(end) = self.keep_owners().await {
            return (end, carry.after_store_failure());
        }
        let owner = self.settings.owner();
        let policy = self.settings.session.on_session_loss;
        let (turned_to, mut turned) = mpsc::channel(8);
        let begun = match self.store.begin(owner, policy, carry.unacked(), turned_to).await {
            Ok(begin) => begin,
            Err(Some(error)) => return (End::Store(error), carry.after_store_failure()),
            Err(None) => return (End::Stopped, carry),
        };
        self.connections += 1;
        self.presence.set_boot(u64::from(begun.boot));
        let (epoch, queued) = (begun.epoch, begun.queued);
        let nonce = fastrand::u64(..);
        let now_ms = clock::mono_ms();
        let settings =
            session::Settings { presence: self.presence.topic().clone(), ..self.settings.session.clone() };
        let mut session = Session::new(settings, self.connections, nonce, begun, carry, now_ms);
        let end = match self.converse(&mut session, &mut turned, epoch, queued).await {
            Ok(()) => End::Stopped,
            Err(end) => end,
        };
        for event in session.take_events() {
            if let Event::Count(what, n) = event {
                self.count(what, n);
            }
        }
        if matches!(end, End::Store(_)) {
            return (end, session.into_carry().after_store_failure());
        }
        let unsaved = session.take_unsaved();
        if !unsaved.is_empty() {
            let turn = Turn { connection: session.connection(), changes: unsaved, offer: None };
            self.store.turn(turn).await;
        }
        (end, session.into_carry())
    }

    async fn converse(
        &mut self,
        session: &mut Session,
        turned: &mut mpsc::Receiver<Turned>,
        epoch: u32,
        queued: u64,
    ) -> Result<(), End> {
        if session.clean_start() && !self.settings.session.clean_start {
            self.discard_session().await?;
            self.log.info(
                "this database knows of no session: what the broker held is discarded, queued commands too",
            );
        }
        let mut link = self.open(false).await?;
        let connack = self.first_packet(&mut link).await?;
        session.on_packet(connack, clock::mono_ms())?;
        self.on_connected(session, &mut link);
        loop {
            self.act(session, &mut link, epoch, queued).await?;
            let wake = self.wake(session, &mut link, turned).await;
            match wake {
                Wake::Stop => {
                    let drain = match *self.stop.borrow() {
                        Stop::DrainUntil(deadline) => Some(deadline),
                        Stop::No | Stop::Now => None,
                    };
                    return self.goodbye(session, &mut link, turned, epoch, drain).await;
                }
                Wake::Probed(Some(to)) => {
                    let drain = Some(Instant::now() + LEAVE);
                    self.goodbye(session, &mut link, turned, epoch, drain).await?;
                    return Err(End::FailBack { to, url: self.brokers[to].url() });
                }
                Wake::Changed if self.goes_on() => {
                    self.adopt(true);
                    self.backoffs[self.choice.current()].connected(clock::mono_ms());
                }
                Wake::Changed => {
                    // To be looked at between this connection and the next.
                    self.orders.mark_changed();
                    let drain = Some(Instant::now() + LEAVE);
                    self.goodbye(session, &mut link, turned, epoch, drain).await?;
                    return Err(End::Changed);
                }
                wake => self.handle(wake, session, &mut link).await?,
            }
            self.ask_for_better();
        }
    }

    /// Finds out whether a broker before this one in the list is back, when it is time.
    fn ask_for_better(&mut self) {
        if !self.probe.is_empty() || self.status.borrow().state != LinkState::Connected {
            return;
        }
        let better = self.choice.to_ask(clock::mono_ms());
        if better.is_empty() {
            return;
        }
        let (brokers, stats) = (self.brokers[better].to_vec(), Arc::clone(&self.stats));
        self.probe.spawn(async move {
            for (place, broker) in brokers.iter().enumerate() {
                if broker.answers(&stats).await {
                    return Some(place);
                }
            }
            None
        });
    }

    /// Opens the stream and queues CONNECT, `discard`: only to end the old session.
    async fn open(&mut self, discard: bool) -> Result<Link<Stream>, End> {
        let settings = &self.settings;
        let tls = settings.tls.as_ref().map(|tls| tls::Client::new(tls, &settings.host)).transpose()?;
        if let Some(words) = tls.as_ref().and_then(tls::Client::unusable) {
            self.log.warn(words);
        }
        let endpoint = settings.endpoint(tls.as_ref(), &self.stats);
        self.pulse.busy(clock::mono_ms(), settings.connect_timeout);
        let stream = tokio::select! {
            stream = link::open(&endpoint) => stream?,
            end = self.interruption() => return Err(end),
        };
        let mut link = Link::new(stream, settings.session.protocol, settings.max_packet);
        let connect = self.connect(discard)?;
        let kept = connect.will.as_ref().is_some_and(|will| will.retain);
        self.stats.downgraded_will.add(u64::from(!discard && !kept));
        link.queue(&Packet::Connect(Box::new(connect)))?;
        Ok(link)
    }

    /// What the broker says first; sends CONNECT meanwhile.
    async fn first_packet(&self, link: &mut Link<Stream>) -> Result<Packet, End> {
        let patience = self.settings.connect_timeout;
        self.pulse.busy(clock::mono_ms(), patience);
        tokio::select! {
            packet = timeout(patience, link.next()) => Ok(packet.map_err(|_| End::NoConnack(patience))??),
            end = self.interruption() => Err(end),
        }
    }

    fn connect(&self, discard: bool) -> Result<Connect, End> {
        let settings = &self.settings;
        let clean = discard || settings.session.clean_start;
        Ok(Connect {
            client_id: settings.client_id.clone(),
            clean,
            keep_alive_s: u16::try_from(settings.session.keep_alive_ms / 1000).unwrap_or(u16::MAX),
            session_expiry_s: match clean {
                true => 0,
                false => u32::try_from(settings.session_expiry.as_secs()).unwrap_or(u32::MAX),
            },
            receive_max: RECEIVE_MAX,
            max_packet_bytes: settings.max_packet,
            will: (settings.will && !discard).then(|| within(self.presence.will(), settings.session.limits)),
            username: settings.username.clone(),
            password: settings.password()?,
        })
    }

    /// One clean connection on which nothing is published discards the old session, and the next one begins a
    /// new, lasting one. MQTT 3.1.1 keeps no session that was begun clean; on MQTT 5 the standard does, but
    /// mosquitto 2.0.11 loses it when it restarts (measured), whatever the Session Expiry Interval says.
    async fn discard_session(&mut self) -> Result<(), End> {
        let mut link = self.open(true).await?;
        match self.first_packet(&mut link).await? {
            Packet::ConnAck(connack) if !connack.reason.is_error() => {}
            Packet::ConnAck(connack) => {
                let (reason, said) = (connack.reason, connack.reason_string);
                return Err(SessionError::Refused { reason, said }.into());
            }
            other => return Err(SessionError::Protocol(format!("{} before CONNACK", other.name())).into()),
        }
        link.queue(&Packet::Disconnect(ReasonCode::SUCCESS))?;
        // A broker that does not close its side has read DISCONNECT all the same, or says so by "present".
        let _closed = timeout(GOODBYE, link.close()).await;
        Ok(())
    }

    fn on_connected(&mut self, session: &Session, link: &mut Link<Stream>) {
        self.stats.connects.increment();
        self.backoffs[self.choice.current()].connected(clock::mono_ms());
        self.presence.on_connected();
        let limits = *session.limits();
        if let Some(bytes) = limits.max_packet_bytes {
            link.set_broker_max_packet(bytes);
        }
        let asked = match self.settings.session.clean_start {
            true => 0,
            false => self.settings.session_expiry.as_secs(),
        };
        if let Some(granted) = limits.session_expiry_s.filter(|granted| u64::from(*granted) < asked) {
            let words = format!("the broker keeps the session for {granted} s, and was asked for {asked} s");
            self.log.warn(&words);
        }
        let downgrades = self.downgrades(&limits);
        let keep_alive_s = limits.keep_alive_s.map_or(self.settings.session.keep_alive_ms / 1000, u64::from);
        self.status.send_modify(|status| {
            status.keep_alive_s = keep_alive_s;
            status.downgrades.clone_from(&downgrades);
        });
        if self.told != downgrades {
            downgrades.iter().for_each(|words| self.log.warn(words));
            self.told = downgrades;
        }
    }

    /// What this broker does not allow, in words.
    fn downgrades(&self, limits: &Limits) -> Vec<String> {
        let settings = &self.settings;
        let mut words = Vec::new();
        if self.choice.current() > 0 {
            let (first, this) = (self.brokers[0].url(), settings.url());
            words.push(format!("{first} could not be reached: messages go to {this} until it answers again"));
        }
        match limits.max_qos {
            Some(0) => words.push(
                "the broker takes QoS 0 only: every message is sent once and called delivered, whether it arrives or not"
                    .into(),
            ),
            Some(1) => words.push("the broker takes QoS 1 at most: what asks for QoS 2 may arrive twice".into()),
            _ => {}
        }
        if limits.retain_available == Some(false) {
            words.push("the broker takes no retained messages: it keeps neither presence nor states".into());
        }
        if !settings.will {
            words.push("no Will is registered: the broker does not say when the gateway is lost".into());
        }
        if settings.session.clean_start {
            words.push(
                "the broker keeps no session: commands sent during an outage are lost, and QoS 2 messages in flight when \
                 a link breaks may arrive twice"
                    .into(),
            );
        }
        words
    }

    /// Does everything that follows from what is known: events, turns, packets.
    async fn act(
        &mut self,
        session: &mut Session,
        link: &mut Link<Stream>,
        epoch: u32,
        queued: u64,
    ) -> Result<(), End> {
        for event in session.take_events() {
            self.on_event(event, session, epoch, queued)?;
        }
        session.set_unsent(link.queued_bytes());
        while let Some((changes, offer)) = session.turn() {
            let turn = Turn { connection: session.connection(), changes, offer };
            if !self.store.turn(turn).await {
                return Err(End::Stopped);
            }
        }
        while let Some(packet) = session.next_packet() {
            link.queue(&packet)?;
            session.on_written(clock::mono_ms());
        }
        Ok(())
    }

    async fn wake(
        &mut self,
        session: &Session,
        link: &mut Link<Stream>,
        turned: &mut mpsc::Receiver<Turned>,
    ) -> Wake {
        let reads = session.backlog() < BACKLOG_MAX;
        let flushes = !reads && link.queued_bytes() > 0;
        let tick = Instant::now() + Duration::from_millis(session.tick_within_ms());
        let running = session.is_running();
        let takes_qos0 = running && link.queued_bytes() < QOS0_BEHIND_MAX_BYTES;
        let receive = async {
            if reads {
                Wake::Packet(link.next().await)
            } else if flushes {
                Wake::Flushed(link.flush().await)
            } else {
                std::future::pending().await
            }
        };
        tokio::select! {
            wake = receive => wake,
            answer = turned.recv() => Wake::Turned(answer),
            Some(message) = self.qos0.recv(), if takes_qos0 => Wake::Qos0(message),
            Some(announcement) = self.announcements.recv(), if running => Wake::Announcement(announcement),
            () = sleep_until(tick) => Wake::Tick,
            Some(better) = self.probe.join_next(), if !self.probe.is_empty() => {
                Wake::Probed(better.unwrap_or(None))
            }
            Ok(()) = self.orders.changed(), if !self.leaves => Wake::Changed,
            _ = self.stop.changed() => Wake::Stop,
        }
    }

    async fn handle(
        &mut self,
        wake: Wake,
        session: &mut Session,
        link: &mut Link<Stream>,
    ) -> Result<(), End> {
        let now_ms = clock::mono_ms();
        if !session.is_committing() || matches!(wake, Wake::Turned(_)) {
            self.pulse.beat(now_ms);
        }
        match wake {
            Wake::Packet(packet) => {
                session.on_packet(packet?, now_ms)?;
                for _ in 1..PACKETS_PER_TURN {
                    let Some(packet) = link.try_next().await? else { break };
                    session.on_packet(packet, now_ms)?;
                }
            }
            Wake::Flushed(flushed) => flushed?,
            Wake::Turned(Some(answer)) => on_turned(answer, session, now_ms)?,
            Wake::Turned(None) => return Err(End::Stopped),
            Wake::Qos0(message) => match session.publish_qos0(message) {
                true => self.stats.qos0_sent.increment(),
                false => self.stats.qos0_dropped.increment(),
            },
            Wake::Announcement(announcement) => announce(session, announcement, now_ms),
            Wake::Tick | Wake::Probed(_) | Wake::Changed | Wake::Stop => {}
        }
        session.tick(now_ms)?;
        let (in_flight, window) = (session.in_flight() as u64, u64::from(session.window()));
        let now = (in_flight, window, session.round_trip_ms());
        self.status.send_if_modified(|status| {
            let before = (status.in_flight, status.window, status.round_trip_ms);
            (status.in_flight, status.window, status.round_trip_ms) = now;
            before != now
        });
        Ok(())
    }

    fn on_event(&mut self, event: Event, session: &mut Session, epoch: u32, queued: u64) -> Result<(), End> {
        match event {
            Event::SessionSettled { present } => {
                let online = self.presence.online(epoch, queued, clock::now());
                announce(session, online, clock::mono_ms());
                self.status.send_modify(|status| status.session_present = Some(present));
            }
            Event::Running => {
                // What was meant for the moment of an outage is not worth sending now.
                while self.qos0.try_recv().is_ok() {
                    self.stats.qos0_dropped.increment();
                }
                self.status.send_modify(|status| status.last_error = None);
                self.set_state(LinkState::Connected);
                let present = self.status.borrow().session_present == Some(true);
                self.log.connected(&self.settings.url(), present);
                self.choice.connected(clock::mono_ms());
            }
            Event::Downgraded { filter, asked, granted } => {
                let granted = granted.map_or("nothing".to_owned(), |qos| qos.to_string());
                let words = format!("subscribed to {filter}: asked for {asked}, granted {granted}");
                self.log.warn(&words);
                self.status.send_modify(|status| status.downgrades.push(words));
            }
            Event::Presence(payload) => self.on_presence(&payload, session, epoch, queued)?,
            Event::Count(what, n) => self.count(what, n),
        }
        Ok(())
    }

    fn on_presence(
        &mut self,
        payload: &Bytes,
        session: &mut Session,
        epoch: u32,
        queued: u64,
    ) -> Result<(), End> {
        let topic = self.presence.topic().clone();
        match self.presence.heard(&topic, payload) {
            Heard::Nothing => Ok(()),
            Heard::AnnounceAgain => {
                let online = self.presence.online(epoch, queued, clock::now());
                announce(session, online, clock::mono_ms());
                Ok(())
            }
            Heard::CopyOfThePast { boot, epoch } => Err(End::CopyOfThePast { boot, epoch }),
            Heard::InUseElsewhere { boot, .. } => Err(End::InUseElsewhere { boot }),
        }
    }

    fn count(&mut self, what: Counted, n: u64) {
        self.log.counted(what, n);
        let stats = &self.stats;
        let counter = match what {
            Counted::NoMatchingSubscribers => &stats.no_matching_subscribers,
            Counted::ResentWithDup => &stats.resent_with_dup,
            Counted::PossiblyDoubled => &stats.possibly_doubled,
            Counted::Ambiguous => &stats.ambiguous,
            Counted::Abandoned => &stats.abandoned,
            Counted::RefusedForNow => &stats.refused_for_now,
            Counted::DeadLettered => &stats.dead_lettered,
            Counted::OrderOvertaken => &stats.order_overtaken,
            Counted::Downgraded => &stats.downgraded,
            Counted::DowngradedQos => &stats.downgraded_qos,
            Counted::DowngradedRetain => &stats.downgraded_retain,
            Counted::AcksUnexpected => &stats.acks_unexpected,
            Counted::InboundRecorded => &stats.inbound_recorded,
            Counted::InboundRepeated => &stats.inbound_repeated,
            Counted::InboundRefused => &stats.inbound_refused,
            Counted::SessionsLost => &stats.sessions_lost,
        };
        counter.add(n);
    }

    /// A planned end: finish what is in flight until `drain`, say that we are offline, disconnect. A clean DISCONNECT
    /// discards the Will, hence the explicit word.
    async fn goodbye(
        &mut self,
        session: &mut Session,
        link: &mut Link<Stream>,
        turned: &mut mpsc::Receiver<Turned>,
        epoch: u32,
        drain: Option<Instant>,
    ) -> Result<(), End> {
        self.leaves = true;
        session.drain();
        if let Some(deadline) = drain {
            self.settle_until(deadline, session, link, turned, epoch).await?;
        }
        let patience = if *self.stop.borrow() == Stop::Now { HASTY_GOODBYE } else { GOODBYE };
        let stopped = self.presence.stopped(clock::now());
        announce(session, stopped, clock::mono_ms());
        self.settle_until(Instant::now() + patience, session, link, turned, epoch).await?;
        session.disconnect();
        self.act(session, link, epoch, 0).await?;
        let _late = timeout(patience, link.flush()).await;
        Ok(())
    }

    /// Goes on until nothing is in flight or the deadline passes; a second request to stop cuts it short.
    async fn settle_until(
        &mut self,
        deadline: Instant,
        session: &mut Session,
        link: &mut Link<Stream>,
        turned: &mut mpsc::Receiver<Turned>,
        epoch: u32,
    ) -> Result<(), End> {
        loop {
            self.act(session, link, epoch, 0).await?;
            if session.is_idle() {
                // Only acknowledgements of ours can be left, which nothing will answer.
                return timeout_at(deadline, link.flush()).await.unwrap_or(Ok(())).map_err(End::from);
            }
            let Ok(wake) = timeout_at(deadline, self.wake(session, link, turned)).await else {
                return Ok(());
            };
            if let Wake::Stop = wake {
                return Ok(());
            }
            self.handle(wake, session, link).await?;
        }
    }
}

/// A Will that the broker's limits allow.
fn within(will: Will, limits: Limits) -> Will {
    let max_qos = limits.max_qos.and_then(|qos| Qos::from_number(u64::from(qos))).unwrap_or(will.qos);
    let retain = will.retain && limits.retain_available != Some(false);
    Will { qos: will.qos.min(max_qos), retain, ..will }
}

fn on_turned(turned: Turned, session: &mut Session, now_ms: u64) -> Result<(), End> {
    match turned {
        Turned::Failed(error) => Err(End::Store(error)),
        Turned::Done { connection, .. } if connection != session.connection() => Ok(()),
        Turned::Done { settled, refused, taken, .. } => {
            if settled.is_some() {
                session.on_committed(&refused, now_ms);
            }
            if let Some(taken) = taken {
                session.on_taken(taken, now_ms);
            }
            Ok(())
        }
    }
}

fn announce(session: &mut Session, announcement: Announcement, now_ms: u64) {
    let Announcement { topic, payload, retain, .. } = announcement;
    if !session.publish_presence(topic, payload, retain, now_ms) {
        debug!("an announcement was dropped: too many wait for room");
    }
}
