//! The program as a person or a service manager meets it: exit status, what it prints, what a stop leaves behind,
//! certificates and passwords.
//!
//! Real binary; real mosquitto where a broker's own judgement counts.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

#[path = "cli/broker_test.rs"]
mod broker_test;

use fieldpost::control::wire::{LinkState, Status};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustix::process::Signal;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};
use support::agent::{Agent, Config, binary, fieldpost, queued};
use support::broker::{Broker, BrokerServer, Kind, Tally};
use support::mosquitto::{Mosquitto, Options, Subscriber, Tls};
use support::wait_until;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a stop may take that waits for nobody.
const AT_ONCE: Duration = Duration::from_secs(2);

const BOTH: [&str; 2] = ["5", "3.1.1"];

fn start_broker() -> (Runtime, BrokerServer) {
    let runtime = Runtime::new().unwrap();
    let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
    (runtime, broker)
}

fn expect_connected(agent: &Agent) {
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
}

fn expect_error(agent: &Agent, words: &[&str]) -> Status {
    let says = |error: &String| words.iter().all(|words| error.contains(words));
    agent.expect(PATIENCE, &format!("{words:?}"), |status| status.link.last_error.as_ref().is_some_and(says))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `fieldpost` for this agent, with these lines as its input.
fn with_input(agent: &Agent, arguments: &[&str], input: &str) -> Output {
    let mut command = support::command(binary());
    command.args(arguments).arg("--socket").arg(agent.socket());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn tally(broker: &BrokerServer, topic: &'static str, expected: &[String]) -> Tally {
    let expected = expected.to_vec();
    broker.with_blocking(move |broker| broker.log.tally(topic, expected.iter().map(String::as_bytes)))
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

#[test]
fn a_bad_configuration_names_every_problem_and_starts_nothing() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("fieldpost.toml");
    let config = "[gateway]\nid = \"a/b\"\n\n[broker]\nurl = \"ftp://x\"\nkeep_alive = \"1\"\nkeep_alife = \"5s\"\n\n\
                  [store]\npath = \"outbox.db\"\n";
    fs::write(&file, config).unwrap();
    for command in ["run", "check"] {
        let output = fieldpost(&[command, file.to_str().unwrap()]);
        let said = text(&output.stderr) + &text(&output.stdout);
        assert_eq!(output.status.code(), Some(78), "{command}: {said}");
        for place in ["fieldpost.toml:2:", "fieldpost.toml:5:", "fieldpost.toml:6:", "fieldpost.toml:7:"] {
            assert!(said.contains(place), "{command}: {place} is missing in\n{said}");
        }
        assert!(said.contains("keep_alive") && said.contains('^'), "{command}: {said}");
        let files = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, 1, "{command} made files");
    }
    let output = fieldpost(&["run", dir.path().join("none.toml").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output.stderr));
}

#[test]
fn a_second_agent_on_the_same_database_ends_and_the_first_goes_on() {
    let (_runtime, broker) = start_broker();
    let mut agent = Agent::start(&Config::new(&broker.url()));
    agent.accept("t", 2, ["before"]);
    let output = fieldpost(&["run", agent.config_file().to_str().unwrap()]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("outbox.db") && said.contains("another"), "{said}");
    // With a socket of its own it must fail as well, and not on the socket.
    let other = agent.dir().join("other.toml");
    fs::write(&other, Config::new(&broker.url()).with("control", "socket = \"other.sock\"").text()).unwrap();
    let output = fieldpost(&["run", other.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(agent.is_running());
    agent.accept("t", 2, ["after"]);
    agent.expect_drained(PATIENCE);
    let tally = tally(&broker, "t", &["before".into(), "after".into()]);
    assert_eq!((tally.lost, tally.duplicated), (0, 0));
}

#[test]
fn a_stop_takes_no_time_when_nothing_is_under_way() {
    let (_runtime, broker) = start_broker();
    for protocol in BOTH {
        for signal in [Signal::TERM, Signal::INT] {
            let mut agent = Agent::start(&Config::new(&broker.url()).protocol(protocol));
            expect_connected(&agent);
            let asked = Instant::now();
            agent.signal(signal);
            let status = agent.wait(PATIENCE);
            assert!(status.success(), "{status}");
            let took = asked.elapsed();
            assert!(took < Duration::from_millis(700), "{protocol}: {took:?}\n{}", agent.tail());
        }
    }
}

#[test]
fn a_stop_without_a_broker_takes_no_time_and_keeps_everything() {
    let (runtime, broker) = start_broker();
    runtime.block_on(broker.stop(support::broker::Memory::Kept));
    let mut agent = Agent::start(&Config::new(&broker.url()).with("broker", "backoff_max = \"1h\""));
    let payloads = numbers(200);
    agent.accept("t", 2, payloads.iter().map(String::as_str));
    let asked = Instant::now();
    assert!(agent.terminate().success());
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
    runtime.block_on(broker.start_again()).unwrap();
    agent.start_again();
    agent.expect_drained(PATIENCE);
    let tally = tally(&broker, "t", &payloads);
    assert_eq!((tally.lost, tally.duplicated), (0, 0));
}

#[test]
fn a_stop_under_load_keeps_what_it_could_not_send() {
    let (_runtime, broker) = start_broker();
    let mut agent = Agent::start(&Config::new(&broker.url()));
    let payloads = numbers(3_000);
    agent.accept("t", 2, payloads.iter().map(String::as_str));
    assert!(agent.terminate().success());
    agent.start_again();
    agent.expect_drained(PATIENCE);
    let tally = tally(&broker, "t", &payloads);
    assert_eq!((tally.lost, tally.duplicated), (0, 0));
}

#[test]
fn a_second_signal_skips_the_drain() {
    for protocol in BOTH {
        let (_runtime, broker) = start_broker();
        let config =
            Config::new(&broker.url()).protocol(protocol).with("gateway", "drain_timeout = \"5min\"");
        let mut agent = Agent::start(&config);
        expect_connected(&agent);
        broker.with_blocking(|broker| broker.script.withhold = [Kind::Puback, Kind::Pubrec].into());
        let payloads = numbers(50);
        agent.accept("t", 2, payloads.iter().map(String::as_str));
        agent.expect(PATIENCE, "in flight", |status| status.link.in_flight > 0);
        agent.signal(Signal::TERM);
        agent.expect_log(PATIENCE, "a second signal skips");
        assert!(agent.is_running(), "it waits for acknowledgements");
        let asked = Instant::now();
        agent.signal(Signal::TERM);
        let status = agent.wait(PATIENCE);
        assert!(status.success(), "{status}");
        assert!(asked.elapsed() < AT_ONCE, "{:?}\n{}", asked.elapsed(), agent.tail());
        broker.with_blocking(|broker| broker.script = Default::default());
        agent.start_again();
        agent.expect_drained(PATIENCE);
        let tally = tally(&broker, "t", &payloads);
        assert_eq!((tally.lost, tally.duplicated), (0, 0), "{protocol}");
    }
}

#[test]
fn a_stop_does_not_wait_for_a_broker_that_went_away_meanwhile() {
    let (_runtime, broker) = start_broker();
    let config = Config::new(&broker.url()).with("gateway", "drain_timeout = \"1min\"");
    let mut agent = Agent::start(&config.with("broker", "backoff_max = \"1h\""));
    expect_connected(&agent);
    broker.with_blocking(|broker| broker.script.withhold = [Kind::Pubrec].into());
    agent.accept("t", 2, ["one"]);
    agent.expect(PATIENCE, "in flight", |status| status.link.in_flight > 0);
    agent.signal(Signal::TERM);
    agent.expect_log(PATIENCE, "a second signal skips");
    let asked = Instant::now();
    broker.with_blocking(|broker| {
        broker.script.every_connect.mute = true;
        // After this one the next attempt is at least half an hour away.
        broker.disconnect("g1", 0x8E);
    });
    assert!(agent.wait(PATIENCE).success());
    assert!(asked.elapsed() < AT_ONCE, "{:?}\n{}", asked.elapsed(), agent.tail());
}

#[test]
fn a_stop_does_not_wait_for_a_connack() {
    for clean in [true, false] {
        let (_runtime, broker) = start_broker();
        let config = Config::new(&broker.url()).with("broker", "connect_timeout = \"1min\"");
        let mut agent = Agent::prepared(&config);
        if !clean {
            agent.start_again();
            expect_connected(&agent);
            agent.terminate();
        }
        broker.with_blocking(|broker| broker.script.every_connect.mute = true);
        agent.start_again();
        let mute = || broker.with_blocking(|broker| broker.mute_connections() > 0);
        assert!(wait_until(PATIENCE, mute), "{}", agent.tail());
        let asked = Instant::now();
        assert!(agent.terminate().success());
        assert!(asked.elapsed() < AT_ONCE, "clean start {clean}: {:?}\n{}", asked.elapsed(), agent.tail());
    }
}

#[test]
fn publish_takes_one_message_or_a_line_each() {
    let (_runtime, broker) = start_broker();
    let agent = Agent::start(&Config::new(&broker.url()));
    let one = with_input(&agent, &["publish", "--topic", "t", "--qos", "2", "-1.5"], "");
    assert_eq!(
        (text(&one.stdout).as_str(), one.status.code()),
        ("accepted\n", Some(0)),
        "{}",
        text(&one.stderr)
    );
    let payloads = numbers(500);
    let many = with_input(&agent, &["publish", "--topic", "t", "--qos", "2"], &(payloads.join("\n") + "\n"));
    assert_eq!(text(&many.stdout), "accepted\n".repeat(500), "{}", text(&many.stderr));
    agent.expect_drained(PATIENCE);
    let expected: Vec<String> = payloads.into_iter().chain(["-1.5".to_owned()]).collect();
    let tally = tally(&broker, "t", &expected);
    assert_eq!((tally.lost, tally.duplicated, tally.strange), (0, 0, 0));
    let bad = with_input(&agent, &["publish", "--topic", "a/+", "x"], "");
    assert_eq!(bad.status.code(), Some(1));
    assert!(text(&bad.stderr).contains('+'), "{}", text(&bad.stderr));
}

#[test]
fn a_retained_message_is_cleared_at_the_broker() {
    for protocol in BOTH {
        let (_runtime, broker) = start_broker();
        let agent = Agent::start(&Config::new(&broker.url()).protocol(protocol));
        let kept = || broker.with_blocking(|broker| broker.retained("t/kept").is_some());
        let set = with_input(&agent, &["publish", "--topic", "t/kept", "--retain", "21.5"], "");
        assert!(set.status.success(), "{}", text(&set.stderr));
        assert!(wait_until(PATIENCE, kept), "{protocol}\n{}", agent.tail());
        let cleared = with_input(&agent, &["retained", "clear", "t/kept"], "");
        assert_eq!(text(&cleared.stdout), "accepted\n", "{}", text(&cleared.stderr));
        assert!(wait_until(PATIENCE, || !kept()), "{protocol}\n{}", agent.tail());
    }
}

#[test]
fn status_tells_of_an_outage() {
    let (runtime, broker) = start_broker();
    runtime.block_on(broker.stop(support::broker::Memory::Kept));
    let agent = Agent::start(&Config::new(&broker.url()));
    agent.accept("t", 1, ["a", "b", "c"]);
    expect_error(&agent, &["refused"]);
    let plain = with_input(&agent, &["status"], "");
    let said = text(&plain.stdout);
    assert!(plain.status.success() && said.contains("g1") && said.contains("refused"), "{said}");
    let json = with_input(&agent, &["status", "--json"], "");
    let status: Status = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(queued(&status), 3);
    assert_ne!(status.link.state, LinkState::Connected);
    // Without an agent it says where it looked.
    let nobody = fieldpost(&["status", "--socket", "/nonexistent/control.sock"]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(text(&nobody.stderr).contains("/nonexistent/control.sock"), "{}", text(&nobody.stderr));
}

/// Certificates in a directory: an authority, and what it has signed.
struct Authority {
    dir: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "an authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { dir, issuer }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn broker(&self) -> Mosquitto {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "broker");
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(self.file("broker.pem"), certificate.pem()).unwrap();
        fs::write(self.file("broker.key"), key.serialize_pem()).unwrap();
        let (certificate, key) = (self.file("broker.pem"), self.file("broker.key"));
        let tls = Tls { certificate, key, client_authority: None };
        Mosquitto::start(Options { tls: Some(tls), unlimited: true, ..Options::default() })
    }
}

fn trusting(config: Config, ca_file: &Path) -> Config {
    config.with("broker", &format!("ca_file = \"{}\"", ca_file.display()))
}

#[test]
fn messages_arrive_through_tls() {
    let authority = Authority::new();
    let mosquitto = authority.broker();
    for (at, protocol) in BOTH.into_iter().enumerate() {
        let config = trusting(Config::new(&mosquitto.url()).protocol(protocol), &authority.file("ca.pem"));
        let agent = Agent::start(&config);
        let topic = format!("tls/{at}");
        agent.accept(&topic, 2, numbers(100).iter().map(String::as_str));
        agent.expect_drained(PATIENCE);
        let arrived = || mosquitto.received().first_time(&topic) == 100;
        assert!(wait_until(PATIENCE, arrived), "{protocol}\n{}", agent.tail());
    }
}

#[test]
fn a_certificate_that_does_not_verify_is_named_and_nothing_is_sent() {
    let (authority, other) = (Authority::new(), Authority::new());
    let mosquitto = authority.broker();
    let right = trusting(Config::new(&mosquitto.url()), &authority.file("ca.pem"));
    let wrong_name = right.clone().with("broker", "server_name = \"broker.example.com\"");
    let stranger = trusting(Config::new(&mosquitto.url()), &other.file("ca.pem"));
    for (config, says) in [(stranger, "certificate"), (wrong_name, "broker.example.com")] {
        let mut agent = Agent::start(&config);
        agent.accept("t", 2, numbers(20).iter().map(String::as_str));
        let status = expect_error(&agent, &[says]);
        assert_eq!(queued(&status), 20);
        assert!(!mosquitto.log().contains("New client connected"), "{}", mosquitto.log());
        // With the right authority what was accepted arrives.
        agent.terminate();
        if says == "broker.example.com" {
            agent.configure(&right);
            agent.start_again();
            agent.expect_drained(PATIENCE);
            assert_eq!(mosquitto.received().first_time("t"), 20);
        }
    }
}

#[test]
fn a_password_is_read_from_its_file_and_a_wrong_one_is_named() {
    for protocol in BOTH {
        let users = vec![("gateway".to_owned(), "s3cret".to_owned())];
        let mosquitto = Mosquitto::start(Options { users, unlimited: true, ..Options::default() });
        let config = Config::new(&mosquitto.url()).protocol(protocol);
        let config = config.with("broker", "username = \"gateway\"");
        let mut agent = Agent::prepared(&config.with("broker", "password_file = \"password\""));
        let password = agent.dir().join("password");
        fs::write(&password, "wrong\n").unwrap();
        set_private(&password);
        agent.start_again();
        agent.accept("t", 2, numbers(20).iter().map(String::as_str));
        expect_error(&agent, &["username", "password_file"]);
        assert!(!agent.log().contains("wrong\n") && !agent.log().contains("s3cret"), "{}", agent.log());
        let tried_twice = |status: &Status| status.counters["connect_failures"] >= 3;
        agent.expect(PATIENCE, "tried again", tried_twice);
        assert!(agent.log().lines().count() <= 3, "the same failure is logged once\n{}", agent.log());
        // It is read at every attempt: no restart is needed.
        fs::write(&password, "s3cret\n").unwrap();
        agent.expect_drained(PATIENCE);
        assert_eq!(mosquitto.received().first_time("t"), 20, "{protocol}");
    }
}

fn set_private(file: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}
