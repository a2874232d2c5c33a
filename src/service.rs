//! The service manager (systemd): told that we are ready, how we are, and, as long as every part of the agent makes
//! progress, that we are alive (sd_notify(3)).
//!
//! A thread of its own does this, so that it can name who is stuck when it is the runtime itself, and ask for time while
//! a long start holds the runtime up. What it says is decided by [`Watch`]: it has no opinion. It never waits for the
//! service manager: a message that finds its queue full is said again later.
//!
//! Invariant: the watchdog is fed only while no part is stuck. Nothing that is said can hold a second line, which the
//! service manager would obey.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info};

use crate::clock;
use crate::progress::{Pulse, Stuck, Watch};

/// Where messages go; set by the service manager.
const SOCKET: &str = "NOTIFY_SOCKET";
/// After how long without a sign of life we are ended, in microseconds.
const WATCHDOG: &str = "WATCHDOG_USEC";
/// The process that is meant by [`WATCHDOG`].
const WATCHDOG_PID: &str = "WATCHDOG_PID";
/// How often the parts are looked at and the status is told, at most.
const LOOK: Duration = Duration::from_secs(1);
/// How often a start that takes long asks for [`MORE_TIME`].
const ASK_FOR_TIME: Duration = Duration::from_secs(5);
/// What it asks for each time.
const MORE_TIME: Duration = Duration::from_secs(30);
/// Longest status, in bytes; the service manager takes 4096 for a whole message.
const STATUS_BYTES_MAX: usize = 1000;
/// Orders that wait for the thread. It always takes them, so none waits for long.
const ORDERS_MAX: usize = 64;

/// Our end of the service manager, or of nothing where none started us.
#[derive(Debug)]
pub struct Service {
    thread: Option<(SyncSender<Order>, JoinHandle<()>)>,
    /// Every part, for whoever else asks: there may be no service manager.
    parts: watch::Sender<Watch>,
}

#[derive(Debug)]
enum Order {
    Watch(String, Pulse),
    Ready,
    Reloading,
    Stopping(Duration),
}

impl Service {
    /// Finds the service manager by the environment it gave us. `summary` is what it is told about how we are, in one
    /// line.
    ///
    /// # Errors
    /// The address in the environment makes no sense, or there is no socket or thread.
    pub fn begin(summary: watch::Receiver<String>) -> io::Result<Self> {
        let Some(address) = std::env::var_os(SOCKET).filter(|address| !address.is_empty()) else {
            return Ok(Service { thread: None, parts: watch::Sender::default() });
        };
        let manager = Manager::at(&address)?;
        let (orders, to_do) = sync_channel(ORDERS_MAX);
        let feeder = Feeder {
            manager,
            summary,
            watch: Watch::default(),
            state: State::Starting,
            every: watchdog().map(|after| after / 3),
            next: Instant::now(),
            owed: VecDeque::new(),
            said: None,
            stuck: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("service".into()).spawn(move || feeder.run(&to_do))?;
        Ok(Service { thread: Some((orders, thread)), parts: watch::Sender::default() })
    }

    /// Watches a part from now on: it makes progress at least every `patience`, beside steps of which it says how long
    /// they take.
    pub fn part(&self, name: &str, patience: Duration) -> Pulse {
        let pulse = Pulse::new(patience, clock::mono_ms());
        self.order(Order::Watch(name.to_owned(), pulse.clone()));
        self.parts.send_modify(|watch| watch.add(name.to_owned(), &pulse));
        pulse
    }

    /// Every part that is watched.
    pub fn parts(&self) -> watch::Receiver<Watch> {
        self.parts.subscribe()
    }

    /// The database is open, and the control socket answers.
    pub fn ready(&self) {
        self.order(Order::Ready);
    }

    /// The configuration is read again; [`Service::ready`] follows.
    pub fn reloading(&self) {
        self.order(Order::Reloading);
    }

    /// The agent stops, which takes so long at most.
    pub fn stopping(&self, at_most: Duration) {
        self.order(Order::Stopping(at_most));
    }

    fn order(&self, order: Order) {
        if let Some((orders, _)) = &self.thread
            && orders.send(order).is_err()
        {
            debug!("nobody speaks to the service manager any more");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some((orders, thread)) = self.thread.take() {
            drop(orders);
            if thread.join().is_err() {
                debug!("the service thread has panicked");
            }
        }
    }
}

/// After how long without a sign of life this process is ended.
fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    if number(WATCHDOG_PID).is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None; // it means a parent of ours
    }
    number(WATCHDOG).filter(|usec| *usec > 0).map(Duration::from_micros)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Running,
    Reloading,
    Stopping,
}

/// What the thread does.
struct Feeder {
    manager: Manager,
    summary: watch::Receiver<String>,
    watch: Watch,
    state: State,
    /// How often the watchdog is fed; `None`: there is none.
    every: Option<Duration>,
    /// When the next sign of life is due.
    next: Instant,
    /// What must be told and could not be yet.
    owed: VecDeque<String>,
    /// The status that was last told.
    said: Option<String>,
    /// Who was stuck when that was last looked at.
    stuck: Vec<Stuck>,
}

impl Feeder {
    /// Until the agent has gone.
    fn run(mut self, orders: &Receiver<Order>) {
        let look = self.every.map_or(LOOK, |every| every.min(LOOK));
        let mut at = Instant::now() + look;
        loop {
            match orders.recv_timeout(at.saturating_duration_since(Instant::now())) {
                Ok(order) => self.obey(order),
                Err(RecvTimeoutError::Timeout) => {
                    self.look();
                    at = Instant::now() + look;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Watch(name, pulse) => self.watch.add(name, &pulse),
            Order::Ready => self.enter(State::Running, "READY=1".to_owned()),
            Order::Reloading => {
                let usec = monotonic_usec();
                self.enter(State::Reloading, format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
            }
            Order::Stopping(at_most) => {
                let usec = at_most.as_micros();
                self.enter(State::Stopping, format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={usec}"));
            }
        }
    }

    fn enter(&mut self, state: State, lines: String) {
        self.state = state;
        self.next = Instant::now();
        self.owed.push_back(lines);
        self.say();
    }

    fn look(&mut self) {
        let stuck = self.watch.stuck(clock::mono_ms());
        self.tell(&stuck);
        self.stuck = stuck;
        let (every, sign) = match self.state {
            State::Starting => (Some(ASK_FOR_TIME), format!("EXTEND_TIMEOUT_USEC={}", MORE_TIME.as_micros())),
            _ => (self.every, "WATCHDOG=1".to_owned()),
        };
        if let Some(every) = every
            && self.stuck.is_empty()
            && Instant::now() >= self.next
            && self.send(&sign)
        {
            self.next = Instant::now() + every;
        }
        self.say();
    }

    /// Into the log, once for each part.
    fn tell(&self, stuck: &[Stuck]) {
        let is_new = |one: &&Stuck| !self.stuck.iter().any(|other| other.part == one.part);
        for Stuck { part, silent_ms } in stuck.iter().filter(is_new) {
            let silent_s = silent_ms / 1000;
            error!(
                part,
                silent_s,
                "a part of the agent is stuck; the service manager ends the agent unless that goes on"
            );
        }
        if stuck.is_empty() && !self.stuck.is_empty() {
            info!("every part of the agent goes on again");
        }
    }

    /// Everything that is owed, and the status if it has changed.
    fn say(&mut self) {
        while let Some(lines) = self.owed.front() {
            if !self.send(lines) {
                return;
            }
            self.owed.pop_front();
        }
        let status = self.status();
        if self.said.as_ref() != Some(&status) && self.send(&format!("STATUS={}", one_line(&status))) {
            self.said = Some(status);
        }
    }

    /// `false`: it could not be told.
    fn send(&self, message: &str) -> bool {
        let sent = self.manager.tell(message.as_bytes());
        if let Err(error) = &sent {
            debug!(%error, "the service manager could not be told");
        }
        sent.is_ok()
    }

    fn status(&self) -> String {
        if let Some(Stuck { part, .. }) = self.stuck.first() {
            let others = match self.stuck.len() - 1 {
                0 => String::new(),
                others => format!(" and {others} more"),
            };
            return format!("stuck: {part}{others}; the agent is ended unless that goes on");
        }
        match self.state {
            State::Starting => "opening the database".to_owned(),
            State::Running => self.summary.borrow().clone(),
            State::Reloading => "reading the configuration again".to_owned(),
            State::Stopping => "stopping: what is in flight is finished first".to_owned(),
        }
    }
}

/// CLOCK_MONOTONIC, which the service manager compares with its own.
fn monotonic_usec() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// One line and not too long a one, whatever a broker or a device has put into the text.
fn one_line(text: &str) -> String {
    let line = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
    let mut bytes = 0;
    line.take_while(|c| {
        bytes += c.len_utf8();
        bytes <= STATUS_BYTES_MAX
    })
    .collect()
}

/// The service manager's socket.
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Manager {
    /// A path, or a name in the abstract namespace after an `@` (sd_notify(3)).
    fn at(address: &OsString) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
        };
        let socket = UnixDatagram::unbound()?;
        // A service manager that hangs must not take the agent with it.
        socket.set_nonblocking(true)?;
        Ok(Manager { socket, address })
    }

    fn tell(&self, message: &[u8]) -> io::Result<()> {
        self.socket.send_to_addr(message, &self.address).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_said_can_hold_a_second_line() {
        let hostile = "no connection: quota\nREADY=1\r\nMAINPID=1\0\u{1b}[2J";
        let line = one_line(hostile);
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(line.starts_with("no connection: quota\u{fffd}READY=1"), "{line:?}");
        let long = one_line(&"ü".repeat(4096));
        assert!(long.len() <= STATUS_BYTES_MAX && long.len() > STATUS_BYTES_MAX - 4, "{}", long.len());
    }
}
