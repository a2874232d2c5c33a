//! A real mosquitto on a free port, its log as evidence, and its command line clients.
//!
//! Everything here blocks; call it from a test's thread, or through `spawn_blocking`. A missing program fails
//! the test and says what to install; nothing is skipped.
//!
//! Invariant: the broker, its files and its clients are gone when the value is dropped.

use super::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long mosquitto may take to start or stop.
const PATIENCE: Duration = Duration::from_secs(20);

/// Certificate files of a TLS listener, PEM.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Server certificate, its chain after it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// When given, clients must show a certificate of this authority.
    pub client_authority: Option<PathBuf>,
}

/// How mosquitto is configured.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `max_inflight_messages 0` and `max_queued_messages 0`; otherwise its own defaults, 20 and 1000.
    pub unlimited: bool,
    /// Keep sessions and retained messages over a stop.
    pub persistence: bool,
    /// Serve TLS, and only that.
    pub tls: Option<Tls>,
    /// User names and passwords; none lets everyone in.
    pub users: Vec<(String, String)>,
    /// Further lines of the configuration.
    pub extra: Vec<String>,
}

/// A running mosquitto.
#[derive(Debug)]
pub struct Mosquitto {
    port: u16,
    dir: TempDir,
    options: Options,
    child: Option<Child>,
}

impl Mosquitto {
    /// Starts one and waits until it listens. Panics, with its log, if it does not.
    pub fn start(options: Options) -> Mosquitto {
        let dir = TempDir::new().expect("a temporary directory");
        let mut mosquitto = Mosquitto { port: 0, dir, options, child: None };
        // A free port may be taken by somebody else before mosquitto has it.
        for _ in 0..5 {
            mosquitto.port = free_port();
            if mosquitto.try_start() {
                return mosquitto;
            }
        }
        panic!("mosquitto did not start:\n{}", mosquitto.log());
    }

    /// The port it listens on, the same for its whole life.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens, as configuration files want it.
    pub fn url(&self) -> String {
        let scheme = if self.options.tls.is_some() { "mqtts" } else { "mqtt" };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// Stops it with SIGTERM, so that it saves what it keeps.
    pub fn stop(&mut self) {
        self.end(Signal::TERM);
    }

    /// Stops it with SIGKILL.
    pub fn kill(&mut self) {
        self.end(Signal::KILL);
    }

    /// Starts it again on the same port, with the same files. Panics, with its log, if it cannot.
    pub fn start_again(&mut self) {
        assert!(self.try_start(), "mosquitto did not start again:\n{}", self.log());
    }

    /// Its whole log, over all starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// What its log says it received.
    pub fn received(&self) -> LogCount {
        LogCount::read(&self.log())
    }

    /// Waits until a log line contains this text; false if none does within the time.
    pub fn wait_for_log(&self, within: Duration, text: &str) -> bool {
        wait_until(within, || self.log().lines().any(|line| line.contains(text)))
    }

    /// Where its log is; it may be emptied while mosquitto is stopped.
    pub fn log_path(&self) -> PathBuf {
        self.dir.path().join("mosquitto.log")
    }

    fn try_start(&mut self) -> bool {
        let config = self.dir.path().join("mosquitto.conf");
        fs::write(&config, self.config()).expect("the temporary directory can be written");
        let before = self.log().matches(RUNNING).count();
        let mut command = Command::new(program("mosquitto"));
        command.arg("-c").arg(&config).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("mosquitto was found and can be run");
        let mut alive = true;
        let running = wait_until(PATIENCE, || {
            alive = matches!(child.try_wait(), Ok(None));
            !alive || self.log().matches(RUNNING).count() > before
        });
        if running && alive {
            self.child = Some(child);
            return true;
        }
        let _ = child.kill();
        let _ = child.wait();
        false
    }

    fn config(&self) -> String {
        let dir = self.dir.path().display();
        let mut lines = vec![
            // When started by root it would become `mosquitto`, who may not write here.
            "user root".to_owned(),
            format!("log_dest file {dir}/mosquitto.log"),
            "log_type all".to_owned(),
            format!("listener {} 127.0.0.1", self.port),
        ];
        if let Some(tls) = &self.options.tls {
            lines.push(format!("certfile {}", tls.certificate.display()));
            lines.push(format!("keyfile {}", tls.key.display()));
            if let Some(authority) = &tls.client_authority {
                lines.push(format!("cafile {}\nrequire_certificate true", authority.display()));
            }
        }
        if self.options.users.is_empty() {
            lines.push("allow_anonymous true".to_owned());
        } else {
            let file = self.write_passwords();
            lines.push(format!("allow_anonymous false\npassword_file {}", file.display()));
        }
        if self.options.unlimited {
            lines.push("max_inflight_messages 0\nmax_queued_messages 0".to_owned());
        }
        if self.options.persistence {
            lines.push(format!("persistence true\npersistence_location {dir}/\nautosave_interval 1"));
        }
        lines.extend(self.options.extra.iter().cloned());
        lines.join("\n") + "\n"
    }

    fn write_passwords(&self) -> PathBuf {
        let file = self.dir.path().join("passwords");
        fs::write(&file, "").expect("the temporary directory can be written");
        for (name, password) in &self.options.users {
            let mut command = Command::new(program("mosquitto_passwd"));
            let status = command.arg("-b").arg(&file).args([name, password]).status();
            assert!(status.is_ok_and(|s| s.success()), "mosquitto_passwd refused user {name:?}");
        }
        file
    }

    fn end(&mut self, signal: Signal) {
        let Some(mut child) = self.child.take() else { return };
        // Only for a child not waited for is the number still that child's.
        if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, signal);
        }
        if !wait_until(PATIENCE, || matches!(child.try_wait(), Ok(Some(_)))) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("mosquitto's log ends so:\n{}", lines[lines.len().saturating_sub(60)..].join("\n"));
            super::keep(&mut self.dir);
        }
        self.end(Signal::KILL);
    }
}

/// Log line of a mosquitto that listens.
const RUNNING: &str = " running";

/// A port nobody listens on at this moment.
pub fn free_port() -> u16 {
    let listener = super::listen().expect("127.0.0.1 has a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

/// Path of a program of the mosquitto packages, if it is there.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian puts the broker where an ordinary user's PATH does not look.
    let places =
        std::env::split_paths(&path).chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")]);
    places.map(|place| place.join(name)).find(|file| Path::is_file(file))
}

/// Path of a program of the mosquitto packages. Panics if it is not there.
fn program(name: &str) -> PathBuf {
    find(name).unwrap_or_else(|| {
        panic!("{name} is not installed; these tests need it: apt-get install mosquitto mosquitto-clients")
    })
}

/// A PUBLISH mosquitto logged as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoggedPublish {
    /// Client Identifier.
    pub client_id: String,
    /// DUP flag.
    pub dup: bool,
    /// QoS, 0 to 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// Packet Identifier, 0 at QoS 0.
    pub id: u16,
    /// Topic Name.
    pub topic: String,
    /// Payload length in bytes.
    pub bytes: usize,
    /// Whether mosquitto took it: at QoS 2 its id was not held, and its acknowledgement did not refuse it. On 3.1.1
    /// only the log tells of a refusal; to the client the message counts as delivered, and is lost.
    pub first_time: bool,
    /// At QoS 2 whether its PUBREL came, which is when mosquitto hands it on; otherwise as `first_time`.
    pub handed_on: bool,
}

/// What a log says mosquitto received, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogCount {
    /// Every PUBLISH.
    pub publishes: Vec<LoggedPublish>,
}

/// What one line of the log means for the messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Logged {
    /// A PUBLISH came.
    Publish(LoggedPublish),
    /// PUBREL came for this client's packet id, which is held.
    HandedOn(String, u16),
    /// The PUBLISH of this client with this packet id was refused, whether first or not.
    Refused(String, u16),
}

/// Reads a log line by line, as long as it may be.
#[derive(Clone, Debug, Default)]
pub struct LogReader {
    /// Packet ids by client.
    held: BTreeMap<String, BTreeSet<u16>>,
}

impl LogReader {
    /// Takes the next line of a log written with `log_type all`. A packet id is held from a PUBLISH at QoS 2 until
    /// PUBCOMP was sent, a PUBREC refused it, or the client was told that it has a new session.
    pub fn take(&mut self, line: &str) -> Option<Logged> {
        // "1700000000: Received PUBLISH from ..."
        let text = line.split_once(": ").map_or(line, |(_, text)| text);
        if let Some(mut publish) = LoggedPublish::parse(text) {
            publish.handed_on = publish.qos < 2;
            publish.first_time =
                publish.qos < 2 || self.held.entry(publish.client_id.clone()).or_default().insert(publish.id);
            return Some(Logged::Publish(publish));
        }
        if let Some((client_id, id)) = released(text) {
            let held = self.held.get(client_id).is_some_and(|ids| ids.contains(&id));
            return held.then(|| Logged::HandedOn(client_id.to_owned(), id));
        }
        if let Some((client_id, id)) = completed(text) {
            self.release(client_id, id);
        } else if let Some((client_id, id)) = refused(text) {
            self.release(client_id, id);
            return Some(Logged::Refused(client_id.to_owned(), id));
        } else if let Some(client_id) = new_session(text) {
            self.held.remove(client_id);
        }
        None
    }

    fn release(&mut self, client_id: &str, id: u16) {
        if let Some(ids) = self.held.get_mut(client_id) {
            ids.remove(&id);
        }
    }
}

impl LogCount {
    /// Reads a whole log.
    pub fn read(log: &str) -> LogCount {
        let mut reader = LogReader::default();
        // Which of the publishes an id was last used by for the first time.
        let mut latest: BTreeMap<(String, u16), usize> = BTreeMap::new();
        let mut count = LogCount::default();
        for logged in log.lines().filter_map(|line| reader.take(line)) {
            match logged {
                Logged::Publish(publish) => {
                    if publish.qos == 2 && publish.first_time {
                        latest.insert((publish.client_id.clone(), publish.id), count.publishes.len());
                    }
                    count.publishes.push(publish);
                }
                Logged::HandedOn(client_id, id) => {
                    let publish = latest.get(&(client_id, id));
                    if let Some(publish) = publish.and_then(|index| count.publishes.get_mut(*index)) {
                        publish.handed_on = true;
                    }
                }
                Logged::Refused(client_id, id) => {
                    let last = |p: &&mut LoggedPublish| p.client_id == client_id && p.id == id;
                    if let Some(publish) = count.publishes.iter_mut().rev().find(last) {
                        (publish.first_time, publish.handed_on) = (false, false);
                    }
                }
            }
        }
        count
    }

    /// First-time PUBLISHes whose topic matches a filter.
    pub fn first_time(&self, filter: &str) -> usize {
        let fits = |p: &&LoggedPublish| super::broker::topic::matches(filter, &p.topic);
        self.publishes.iter().filter(|p| p.first_time).filter(fits).count()
    }
}

impl LoggedPublish {
    /// `Received PUBLISH from CLIENT (d0, q2, r0, m1024, 'topic', ... (5 bytes))`
    fn parse(text: &str) -> Option<LoggedPublish> {
        let (client_id, rest) = text.strip_prefix("Received PUBLISH from ")?.split_once(" (d")?;
        let (flags, rest) = rest.split_once(", '")?;
        let (topic, rest) = rest.rsplit_once("', ")?;
        let mut flags = flags.split(", ");
        let dup = flags.next()? == "1";
        let qos = flags.next()?.strip_prefix('q')?.parse().ok()?;
        let retain = flags.next()? == "r1";
        let id = flags.next()?.strip_prefix('m')?.parse().ok()?;
        let bytes = rest.rsplit_once('(')?.1.split(' ').next()?.parse().ok()?;
        let (client_id, topic) = (client_id.to_owned(), topic.to_owned());
        let (first_time, handed_on) = (true, true);
        Some(LoggedPublish { client_id, dup, qos, retain, id, topic, bytes, first_time, handed_on })
    }
}

/// `Sending PUBCOMP to CLIENT (m7)`
fn completed(text: &str) -> Option<(&str, u16)> {
    let (client_id, rest) = text.strip_prefix("Sending PUBCOMP to ")?.rsplit_once(" (m")?;
    Some((client_id, rest.trim_end_matches(')').parse().ok()?))
}

/// `Sending PUBREC to CLIENT (m7, rc151)` with a failure code, or PUBACK
fn refused(text: &str) -> Option<(&str, u16)> {
    let rest = text.strip_prefix("Sending PUBREC to ").or_else(|| text.strip_prefix("Sending PUBACK to "))?;
    let (client_id, rest) = rest.rsplit_once(" (m")?;
    let (id, code) = rest.trim_end_matches(')').split_once(", rc")?;
    let code: u8 = code.parse().ok()?;
    Some((client_id, id.parse().ok()?)).filter(|_| code >= 0x80)
}

/// `Received PUBREL from CLIENT (Mid: 7)`
fn released(text: &str) -> Option<(&str, u16)> {
    let (client_id, rest) = text.strip_prefix("Received PUBREL from ")?.rsplit_once(" (Mid: ")?;
    Some((client_id, rest.trim_end_matches(')').parse().ok()?))
}

/// `Sending CONNACK to CLIENT (0, 0)`: no session present, success. A broker that lost the session says so here,
/// and one that was asked for a clean start.
fn new_session(text: &str) -> Option<&str> {
    text.strip_prefix("Sending CONNACK to ")?.strip_suffix(" (0, 0)")
}

/// Runs `mosquitto_pub` against a port of 127.0.0.1 to its end. Panics, with its messages, if it fails.
pub fn publish(port: u16, arguments: &[&str]) {
    let port = port.to_string();
    let mut command = Command::new(program("mosquitto_pub"));
    let output = command.args(["-h", "127.0.0.1", "-p", &port]).args(arguments).output();
    let output = output.expect("mosquitto_pub was found and can be run");
    assert!(output.status.success(), "mosquitto_pub {arguments:?}: {}", both(&output));
}

/// A running `mosquitto_sub` that prints topic and payload of each message.
#[derive(Debug)]
pub struct Subscriber {
    child: Option<Child>,
}

impl Subscriber {
    /// Subscribes at QoS 2 as this client and ends by itself after `count` messages, or after a minute. It may
    /// not be subscribed yet when this returns: ask the broker.
    pub fn start(port: u16, client_id: &str, filter: &str, count: usize, arguments: &[&str]) -> Subscriber {
        let (port, count) = (port.to_string(), count.to_string());
        let mut command = Command::new(program("mosquitto_sub"));
        command.args(["-h", "127.0.0.1", "-p", &port, "-i", client_id, "-t", filter, "-q", "2"]);
        command.args(["-C", &count, "-W", "60", "-F", "%t %p"]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Subscriber { child: Some(command.spawn().expect("mosquitto_sub was found and can be run")) }
    }

    /// Waits for its end and gives what it printed, a line each. Panics if it fails, as after a minute.
    pub fn finish(mut self) -> Vec<String> {
        let child = self.child.take().expect("a subscriber is finished once");
        let output = child.wait_with_output().expect("the output of mosquitto_sub can be read");
        assert!(output.status.success(), "mosquitto_sub: {}", both(&output));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// Kills it, so that its connection breaks without DISCONNECT.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.as_mut().map_or(Ok(()), Child::kill)
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn both(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
