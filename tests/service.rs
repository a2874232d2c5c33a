//! The service manager's side of the agent: readiness, status text, and a watchdog that is fed only while every part
//! makes progress. Real agent; the service manager is a socket of the test's own. `tests/systemd.sh` has a real one.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it
#![allow(unreachable_pub, dead_code, reason = "helpers are modules of this test and of another")]

#[path = "support_modbus/device.rs"]
mod device;
#[path = "support_modbus/pty.rs"]
mod pty;
mod support;

use std::fs;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use device::{Answer, TcpDevice};
use fieldpost::agent::{Faults, Part};
use fieldpost::control::wire::{LinkState, Question};
use rustix::process::Signal;
use support::agent::{Agent, Config};
use support::faults::{Shim, Switch};
use support::mosquitto::{Mosquitto, Options};
use support::wait_until;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// The watchdog is to be fed at least this often, in microseconds.
const WATCHDOG_USEC: u64 = 6_000_000;
/// Then it counts as not fed any more.
const UNFED: Duration = Duration::from_secs(8);
/// So many times less patient is the agent: 5 s with a line, 15 s with its store, 22.5 s with what waits for that.
const HASTE: u32 = 12;
/// More than all of that.
const LONGER_THAN_ANY_PATIENCE: Duration = Duration::from_secs(27);

/// The service manager: what it was told, and when.
struct Manager {
    socket: UnixDatagram,
    told: Vec<(Instant, String)>,
    /// So many of them have been looked at.
    seen: usize,
}

impl Manager {
    /// Started with this agent's next start.
    fn of(agent: &mut Agent) -> Manager {
        let path = agent.dir().join("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        agent.set_env("NOTIFY_SOCKET", path);
        agent.set_env("WATCHDOG_USEC", WATCHDOG_USEC.to_string());
        Manager { socket, told: Vec::new(), seen: 0 }
    }

    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        loop {
            match self.socket.recv(&mut bytes) {
                Ok(length) => {
                    let text = String::from_utf8(bytes[..length].to_vec()).unwrap();
                    self.told.push((Instant::now(), text));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Waits until it is told something that begins so, after what was expected last. Panics, with everything it was
    /// told, if it never is.
    fn expect(&mut self, agent: &Agent, beginning: &str) -> String {
        self.expect_what(agent, beginning, |text| text.starts_with(beginning))
    }

    fn expect_status(&mut self, agent: &Agent, words: &str) -> String {
        self.expect_what(agent, words, |text| text.starts_with("STATUS=") && text.contains(words))
    }

    fn expect_what(&mut self, agent: &Agent, what: &str, wished: impl Fn(&str) -> bool) -> String {
        let mut found = None;
        wait_until(PATIENCE, || {
            self.listen();
            found = self.told[self.seen..].iter().position(|(_, text)| wished(text));
            found.is_some()
        });
        let Some(found) = found else { panic!("never told {what:?} but {:#?}\n{}", self.told, agent.tail()) };
        self.seen += found + 1;
        self.told[self.seen - 1].1.clone()
    }

    /// What it was told until now is not what is expected next.
    fn forget(&mut self) {
        self.listen();
        self.seen = self.told.len();
    }

    /// When the watchdog was fed last.
    fn fed(&mut self) -> Option<Instant> {
        self.listen();
        self.told.iter().rev().find(|(_, text)| text == "WATCHDOG=1").map(|(at, _)| *at)
    }

    /// Waits for so long; false as soon as the watchdog is not fed in time.
    fn is_fed_for(&mut self, span: Duration) -> bool {
        let end = Instant::now() + span;
        let mut since = Instant::now();
        let hungry = wait_until(span, || {
            since = self.fed().map_or(since, |fed| fed.max(since));
            since.elapsed() > Duration::from_micros(WATCHDOG_USEC)
        });
        !hungry && Instant::now() >= end
    }

    /// Waits until it has not been fed for longer than it would let the agent live.
    fn expect_unfed(&mut self, agent: &Agent) {
        let unfed = wait_until(PATIENCE, || self.fed().is_some_and(|fed| fed.elapsed() > UNFED));
        assert!(unfed, "it is still fed: {:#?}\n{}", self.told, agent.tail());
    }
}

fn line(port: u16) -> String {
    format!(
        "[[modbus]]\nname = \"line1\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\ntimeout = \"1s\"\n\
         [[modbus.unit]]\nname = \"meter1\"\nunit = 1\nevery = \"200ms\"\n\
         points = [{{ name = \"a\", register = \"holding\", address = 5, type = \"u16\" }}]\n"
    )
}

/// How often the log says that this part is stuck.
fn named(agent: &Agent, part: &str) -> usize {
    agent.log().lines().filter(|line| line.contains("is stuck") && line.contains(part)).count()
}

/// Becomes the agent under test when [`Agent::have_faults`] says so.
#[test]
fn agent_with_faults() {
    support::agent::be_the_agent();
}

fn hasty(frozen: Option<Part>) -> Faults {
    Faults { frozen, haste: HASTE, ..Faults::default() }
}

#[test]
fn ready_is_said_once_the_control_socket_answers_and_the_status_says_how_it_is() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(TcpDevice::new(|asked| match asked.unit {
        1 => asked.addresses(),
        _ => Answer::Silence,
    }));
    let mut broker = Mosquitto::start(Options::default());
    let silent = "[[modbus.unit]]\nname = \"meter2\"\nunit = 2\nevery = \"200ms\"\n\
                  points = [{ name = \"a\", register = \"holding\", address = 5, type = \"u16\" }]\n";
    let config = Config::new(&broker.url()).and(&line(device.port)).and(silent);
    let mut agent = Agent::prepared(&config);
    let mut manager = Manager::of(&mut agent);
    agent.spawn();
    manager.expect(&agent, "READY=1");
    // At once: whoever is ordered after us counts on it.
    assert!(agent.ask(&Question::Status {}).is_ok(), "{}", agent.tail());
    let url = broker.url();
    manager.expect_status(
        &agent,
        &format!("connected to {url}, 0 queued, 1 of 2 units answer; line1/meter2: no answer within 1000 ms"),
    );
    broker.stop();
    manager.expect_status(&agent, &format!("no connection to {url}: "));
    agent.accept("t", 1, ["x"]);
    manager.expect_status(&agent, "1 queued");
    broker.start_again();
    manager.expect_status(&agent, &format!("connected to {url}, 0 queued"));
    // SIGHUP is no end; nothing has changed, and that is said too.
    agent.signal(Signal::HUP);
    manager.expect(&agent, "RELOADING=1\nMONOTONIC_USEC=");
    assert!(manager.is_fed_for(UNFED), "{:#?}", manager.told);
    agent.signal(Signal::TERM);
    manager.expect(&agent, "STOPPING=1\nEXTEND_TIMEOUT_USEC=");
    assert!(agent.wait(PATIENCE).success());
    let count = |what: &str| manager.told.iter().filter(|(_, text)| text.starts_with(what)).count();
    let counts = (count("READY=1"), count("RELOADING=1"), count("STOPPING=1"));
    assert_eq!(counts, (2, 1, 1), "{:#?}", manager.told);
    let second = |span: &[(Instant, String)]| span[1].0 - span[0].0 > Duration::from_millis(500);
    let texts: Vec<_> =
        manager.told.iter().filter(|(_, text)| text.starts_with("STATUS=")).cloned().collect();
    let often = texts.windows(2).filter(|span| !second(span)).count();
    // A new state has its text at once; else it is once a second.
    assert!(often <= 5, "{texts:#?}");
}

#[test]
fn an_agent_that_cannot_start_never_says_that_it_is_ready() {
    let config = Config::new("mqtt://127.0.0.1:1");
    let mut first = Agent::start(&config);
    let mut second = Agent::prepared(
        &config
            .clone()
            .with("control", "socket = \"second.sock\"")
            .with("store", &format!("path = \"{}\"", first.database().display())),
    );
    let mut manager = Manager::of(&mut second);
    second.spawn();
    assert_eq!(second.wait(PATIENCE).code(), Some(1));
    manager.listen();
    assert!(!manager.told.iter().any(|(_, text)| text.contains("READY")), "{:#?}", manager.told);
    assert!(first.terminate().success());
}

/// What takes long and is nobody's fault: a broker that accepts and says nothing, a unit that never answers, a card
/// that takes 3 s for each sync.
#[test]
fn the_watchdog_is_fed_while_everything_is_slow_and_nothing_is_stuck() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(TcpDevice::new(|_| Answer::Silence));
    let mute = support::listen().unwrap();
    let config = Config::new(&format!("mqtt://{}", mute.local_addr().unwrap()))
        .with("broker", "connect_timeout = \"40s\"")
        .and(&line(device.port));
    let mut agent = Agent::prepared(&config);
    agent.have_faults(hasty(None));
    let mut manager = Manager::of(&mut agent);
    let shim = Shim::below(&mut agent);
    agent.spawn();
    manager.expect(&agent, "READY=1");
    shim.set(Switch::SyncDelayMs, 3_000);
    assert!(manager.is_fed_for(LONGER_THAN_ANY_PATIENCE), "{:#?}\n{}", manager.told, agent.tail());
    assert!(shim.get(Switch::Syncs) > 0, "the card was slow");
    assert_eq!(agent.logged("is stuck"), 0, "{}", agent.tail());
}

/// A start on such a card asks for time as long as it needs it.
#[test]
fn a_start_that_takes_long_asks_for_more_time_and_is_not_ready_before_it_is() {
    let mut agent = Agent::prepared(&Config::new("mqtt://127.0.0.1:1"));
    let mut manager = Manager::of(&mut agent);
    let shim = Shim::below(&mut agent);
    shim.set(Switch::SyncDelayMs, 2_000);
    agent.spawn();
    manager.expect(&agent, "EXTEND_TIMEOUT_USEC=30000000");
    manager.expect_status(&agent, "opening the database");
    assert!(!manager.told.iter().any(|(_, text)| text.contains("READY")), "{:#?}", manager.told);
    shim.set(Switch::SyncDelayMs, 0);
    manager.expect(&agent, "READY=1");
    assert!(manager.is_fed_for(UNFED), "{:#?}", manager.told);
}

/// Never polled again, two seconds after its start. The negative control is the test before: there nothing is frozen,
/// everything else is the same, and the watchdog is fed.
fn frozen(part: Part, name: &str) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(TcpDevice::new(|asked| asked.addresses()));
    let mut agent = Agent::prepared(&Config::new("mqtt://127.0.0.1:1").and(&line(device.port)));
    agent.have_faults(hasty(Some(part)));
    let mut manager = Manager::of(&mut agent);
    agent.spawn();
    manager.expect(&agent, "READY=1");
    manager.expect(&agent, "WATCHDOG=1");
    manager.expect_status(&agent, &format!("stuck: {name}; the agent is ended unless that goes on"));
    assert_eq!(named(&agent, name), 1, "{}", agent.tail());
    manager.expect_unfed(&agent);
    assert!(agent.is_running(), "it waits for its end");
    println!("{name}: {:?}", agent.log().lines().find(|line| line.contains("is stuck")));
}

#[test]
fn a_stuck_line_is_named_and_starves_the_watchdog() {
    frozen(Part::Line, "line line1");
}

#[test]
fn a_stuck_uplink_is_named_and_starves_the_watchdog() {
    frozen(Part::Uplink, "the uplink");
}

#[test]
fn a_stuck_reporter_is_named_and_starves_the_watchdog() {
    frozen(Part::Reporter, "the reporter");
}

#[test]
fn a_stuck_pipeline_is_named_and_starves_the_watchdog() {
    frozen(Part::Pipeline, "the pipeline");
}

#[test]
fn a_stuck_dispatch_is_named_and_starves_the_watchdog() {
    frozen(Part::Dispatch, "the commands");
}

/// A sync that does not return, and then does: the other loops turn all the while.
#[test]
fn a_stuck_store_is_named_and_starves_the_watchdog_until_it_goes_on() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let device = runtime.block_on(TcpDevice::new(|asked| asked.addresses()));
    let broker = Mosquitto::start(Options::default());
    let mut agent = Agent::prepared(&Config::new(&broker.url()).and(&line(device.port)));
    agent.have_faults(hasty(None));
    let mut manager = Manager::of(&mut agent);
    let shim = Shim::below(&mut agent);
    agent.spawn();
    manager.expect(&agent, "READY=1");
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    manager.expect(&agent, "WATCHDOG=1");
    shim.set(Switch::SyncDelayMs, 45_000);
    let stuck = manager.expect_status(&agent, "stuck: the store");
    assert!(!stuck.contains("more"), "the store is named before who waits for it: {stuck}");
    manager.expect_unfed(&agent);
    assert_eq!(named(&agent, "the store"), 1, "{}", agent.tail());
    manager.forget();
    shim.set(Switch::SyncDelayMs, 0);
    manager.expect(&agent, "WATCHDOG=1");
    manager.expect_status(&agent, "connected to");
    assert!(agent.logged("every part of the agent goes on again") > 0, "{}", agent.tail());
    assert!(agent.terminate().success());
}

/// A file that cannot be read to its end (here a pipe that nobody writes to) holds up the runtime, and every task with
/// it. That is noticed from outside.
#[test]
fn a_stuck_runtime_is_noticed_from_outside_of_it() {
    let config = Config::new("mqtts://127.0.0.1:1").with("broker", "ca_file = \"ca.pem\"");
    let mut agent = Agent::prepared(&config);
    agent.have_faults(hasty(None));
    let made = std::process::Command::new("mkfifo").arg(agent.dir().join("ca.pem")).status().unwrap();
    assert!(made.success());
    let mut manager = Manager::of(&mut agent);
    agent.spawn();
    manager.expect(&agent, "READY=1");
    manager.expect(&agent, "WATCHDOG=1");
    let stuck = manager.expect_status(&agent, "stuck: ");
    assert!(stuck.contains("and 3 more"), "everything but the store's thread: {stuck}");
    manager.expect_unfed(&agent);
    for part in ["the commands", "the pipeline", "the uplink", "the reporter"] {
        assert_eq!(named(&agent, part), 1, "{}", agent.tail());
    }
}

/// A service manager that is stuck itself must not take the agent with it: its queue fills, nothing waits for it.
#[test]
fn a_service_manager_that_reads_nothing_stops_nothing() {
    let mut agent = Agent::prepared(&Config::new("mqtt://127.0.0.1:1"));
    let mut manager = Manager::of(&mut agent);
    agent.set_env("WATCHDOG_USEC", "30000"); // a message every 10 ms
    agent.spawn();
    manager.expect(&agent, "READY=1");
    let is_full = || {
        let one_more = UnixDatagram::unbound().unwrap();
        one_more.set_nonblocking(true).unwrap();
        let sent = one_more.send_to(b"X=1", agent.dir().join("notify.sock"));
        sent.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    };
    assert!(wait_until(PATIENCE, is_full), "its queue never filled");
    for _ in 0..20 {
        agent.accept("t", 1, ["x"]);
    }
    agent.signal(Signal::TERM);
    assert!(agent.wait(PATIENCE).success());
}

/// Beside the configuration is another one, which is wrong.
#[test]
fn a_credential_of_the_service_manager_is_the_password() {
    let users = vec![("gateway".to_owned(), "right".to_owned())];
    let broker = Mosquitto::start(Options { users, ..Options::default() });
    let config = Config::new(&broker.url())
        .with("broker", "username = \"gateway\"")
        .with("broker", "password_file = \"broker.password\"");
    let mut agent = Agent::prepared(&config);
    let credentials = agent.dir().join("credentials");
    fs::create_dir(&credentials).unwrap();
    for (folder, password, mode) in [(agent.dir(), "wrong", 0o600), (credentials.as_path(), "right\n", 0o440)]
    {
        let file = folder.join("broker.password");
        fs::write(&file, password).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    }
    agent.start_again();
    agent.expect(PATIENCE, "refused", |status| status.link.last_error.is_some());
    assert!(agent.terminate().success());
    agent.set_env("CREDENTIALS_DIRECTORY", credentials);
    agent.start_again();
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
}

#[test]
fn an_abstract_socket_is_found_and_a_watchdog_of_somebody_else_is_not_fed() {
    let mut agent = Agent::prepared(&Config::new("mqtt://127.0.0.1:1"));
    let name = format!("fieldpost-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let socket = UnixDatagram::bind_addr(&address).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut manager = Manager { socket, told: Vec::new(), seen: 0 };
    agent.set_env("NOTIFY_SOCKET", format!("@{name}"));
    agent.set_env("WATCHDOG_USEC", "300000");
    agent.set_env("WATCHDOG_PID", "1");
    agent.spawn();
    manager.expect(&agent, "READY=1");
    manager.expect_status(&agent, "no connection to mqtt://127.0.0.1:1");
    assert!(agent.terminate().success());
    manager.listen();
    assert!(!manager.told.iter().any(|(_, text)| text.contains("WATCHDOG")), "{:#?}", manager.told);
}
