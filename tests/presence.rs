//! What a broker's other clients learn of the gateway: online, offline, health, the state of its units.
//!
//! Real agent, model broker with its log as evidence.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use fieldpost::control::wire::LinkState;
use fieldpost::policy::format::{self, HeardPresence, Speaker};
use std::net::TcpListener;
use std::time::Duration;
use support::agent::{Agent, Config};
use support::broker::{Broker, BrokerServer, Kind, Message, Version, Way};
use support::wait_until;
use tokio::runtime::Runtime;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const STATE: &str = "fieldpost/g1/state";

const BOTH: [&str; 2] = ["5", "3.1.1"];

/// A model broker that nobody has talked to.
struct Bench {
    _runtime: Runtime,
    broker: BrokerServer,
}

impl Bench {
    fn new() -> Bench {
        let runtime = Runtime::new().unwrap();
        let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
        Bench { _runtime: runtime, broker }
    }

    fn config(&self, protocol: &str) -> Config {
        let config = Config::new(&self.broker.url()).protocol(protocol);
        config.with("broker", "ack_timeout = \"2s\"").with("broker", "connect_timeout = \"2s\"")
    }

    fn connected(&self, agent: &Agent) {
        agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    }

    fn retained(&self, topic: &'static str) -> Option<String> {
        let payload = self.broker.with_blocking(move |broker| broker.retained(topic).cloned())?;
        Some(String::from_utf8(payload.to_vec()).unwrap())
    }

    fn presence(&self) -> Option<HeardPresence> {
        format::read_presence(self.retained(STATE)?.as_bytes())
    }

    /// Waits for a retained message that contains these words.
    fn expect_retained(&self, agent: &Agent, topic: &'static str, words: &[&str]) -> String {
        let found = || self.retained(topic).filter(|text| words.iter().all(|words| text.contains(words)));
        let mut last = None;
        let there = wait_until(PATIENCE, || {
            last = found();
            last.is_some()
        });
        assert!(there, "{topic} never said {words:?}: {:?}\n{}", self.retained(topic), agent.tail());
        last.unwrap()
    }

    /// Somebody publishes a retained presence under our name.
    fn say(&self, payload: String) {
        self.broker.with_blocking(move |broker| {
            broker.publish(&Message::new(STATE, payload, 1).retained());
        });
    }

    /// Payloads the broker took on a topic, in order.
    fn taken(&self, topic: &'static str) -> Vec<String> {
        self.broker.with_blocking(move |broker| {
            let taken = broker.received().iter().filter(|received| &*received.topic == topic);
            taken.map(|received| String::from_utf8_lossy(&received.payload).into_owned()).collect()
        })
    }

    fn assert_no_violations(&self) {
        let violations = self.broker.with_blocking(|broker| broker.violations());
        assert!(violations.is_empty(), "{violations:?}");
    }
}

#[test]
fn online_is_said_before_any_backlog() {
    for protocol in BOTH {
        let bench = Bench::new();
        let runtime = &bench._runtime;
        runtime.block_on(bench.broker.stop(support::broker::Memory::Kept));
        let mut agent = Agent::start(&bench.config(protocol));
        agent.accept("t/backlog", 2, ["1", "2", "3"]);
        runtime.block_on(bench.broker.start_again()).unwrap();
        agent.expect_drained(PATIENCE);
        bench.connected(&agent);
        let topics: Vec<String> = bench.broker.with_blocking(|broker| {
            broker.received().iter().map(|received| received.topic.to_string()).collect()
        });
        let online = topics.iter().position(|topic| topic == STATE).unwrap();
        let backlog = topics.iter().position(|topic| topic == "t/backlog").unwrap();
        assert!(online < backlog, "{protocol}: {topics:?}");
        let text = bench.expect_retained(&agent, STATE, &["\"state\":\"online\"", "\"queued\":3"]);
        assert!(text.contains("\"gateway\":\"g1\""), "{text}");
        agent.terminate();
        bench.assert_no_violations();
    }
}

#[test]
fn a_killed_agent_is_announced_by_its_will() {
    for protocol in BOTH {
        let bench = Bench::new();
        let mut agent = Agent::start(&bench.config(protocol));
        bench.connected(&agent);
        let will =
            bench.broker.with_blocking(|broker| broker.connects().last().unwrap().will.clone()).unwrap();
        assert_eq!((will.topic.as_str(), will.retain), (STATE, true), "{protocol}");
        let payload = String::from_utf8_lossy(&will.payload).into_owned();
        assert!(
            payload.contains("\"state\":\"offline\"") && payload.contains("\"reason\":\"lost\""),
            "{payload}"
        );
        bench.expect_retained(&agent, STATE, &["online"]);
        agent.kill_9();
        bench.expect_retained(&agent, STATE, &["offline", "lost"]);
        // The next start corrects it.
        agent.start_again();
        bench.expect_retained(&agent, STATE, &["online", "\"boot\":2"]);
    }
}

#[test]
fn a_planned_stop_says_so_and_disconnects() {
    for protocol in BOTH {
        let bench = Bench::new();
        let mut agent = Agent::start(&bench.config(protocol));
        bench.connected(&agent);
        let conn = bench.broker.with_blocking(|broker| broker.connection_of("g1")).unwrap();
        assert!(agent.terminate().success());
        bench.expect_retained(&agent, STATE, &["offline", "stopped"]);
        let disconnected = wait_until(PATIENCE, || {
            bench.broker.with_blocking(move |broker| {
                let last = broker.packets(conn).iter().rev().find(|packet| packet.way == Way::In);
                last.is_some_and(|packet| packet.kind == Kind::Disconnect && packet.reason == 0)
            })
        });
        assert!(disconnected, "{protocol}: no DISCONNECT");
        let wills = bench.broker.with_blocking(|broker| broker.log.counters.wills);
        assert_eq!(wills, 0, "{protocol}: a planned stop discards the Will");
        bench.assert_no_violations();
    }
}

#[test]
fn a_late_will_of_ours_is_corrected() {
    for protocol in BOTH {
        let bench = Bench::new();
        let agent = Agent::start(&bench.config(protocol));
        bench.connected(&agent);
        bench.expect_retained(&agent, STATE, &["online"]);
        let will =
            bench.broker.with_blocking(|broker| broker.connects().last().unwrap().will.clone()).unwrap();
        let before = bench.taken(STATE).len();
        bench.say(String::from_utf8(will.payload.to_vec()).unwrap());
        assert!(wait_until(PATIENCE, || bench.taken(STATE).len() > before), "{protocol}\n{}", agent.tail());
        bench.expect_retained(&agent, STATE, &["online"]);
        assert_eq!(agent.status().link.state, LinkState::Connected);
    }
}

#[test]
fn health_is_told() {
    let bench = Bench::new();
    let agent = Agent::start(&bench.config("5"));
    let text = bench.expect_retained(&agent, "fieldpost/g1/health", &["\"gateway\":\"g1\""]);
    let health: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(health["v"], 1, "{text}");
    for member in ["uptime_s", "link", "queue", "store"] {
        assert!(!health[member].is_null(), "no {member} in {text}");
    }
}

#[test]
fn a_dead_unit_is_told_with_its_reason() {
    let bench = Bench::new();
    // It accepts connections and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let line = format!(
        "[[modbus]]\nname = \"hall\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\n\
         timeout = \"200ms\"\nevery = \"300ms\"\n\n[[modbus.unit]]\nname = \"meter\"\nunit = 1\n\
         points = [{{ name = \"voltage\", register = \"input\", address = 0, type = \"u16\" }}]\n"
    );
    let agent = Agent::start(&bench.config("5").and(&line));
    let text = bench.expect_retained(&agent, "fieldpost/g1/unit/hall/meter", &["fault"]);
    assert!(text.contains("no answer within 200 ms"), "{text}");
    let status = agent.status();
    let unit = &status.lines[0].units[0];
    assert!(!unit.ok && unit.last_error.as_ref().unwrap().contains("no answer"), "{unit:?}");
    // What could not be read is reported as bad, not left out.
    let bad = wait_until(PATIENCE, || bench.taken("g1/hall/meter").iter().any(|text| text.contains("bad")));
    assert!(bad, "{}", agent.tail());
}

fn online(boot: u64, instance: u64, epoch: u32) -> String {
    let speaker = Speaker { gateway: "g1".into(), version: "0.1.0".into(), boot, instance };
    format::online(&speaker, epoch, 0, fieldpost::clock::now())
}

#[test]
fn a_fresh_database_under_a_known_name_takes_a_new_epoch() {
    for protocol in BOTH {
        let bench = Bench::new();
        bench.say(online(7, 0xAB, 3));
        let agent = Agent::start(&bench.config(protocol));
        let payloads: Vec<String> = (0..50).map(|n| n.to_string()).collect();
        agent.accept("t/new", 2, payloads.iter().map(String::as_str));
        agent.expect_drained(PATIENCE);
        let tally = bench
            .broker
            .with_blocking(move |broker| broker.log.tally("t/new", payloads.iter().map(String::as_bytes)));
        assert_eq!((tally.lost, tally.duplicated), (0, 0), "{protocol}: {tally:?}\n{}", agent.tail());
        bench.expect_retained(&agent, STATE, &["online", "g1"]);
        assert!(wait_until(PATIENCE, || bench.presence().is_some_and(|presence| presence.boot > 7)));
        let presence = bench.presence().unwrap();
        assert!(presence.epoch > Some(3), "{protocol}: {presence:?}");
        assert!(agent.status().store.epoch > 3);
        let clean = bench.broker.with_blocking(|broker| broker.connects().iter().filter(|c| c.clean).count());
        assert!(clean >= 2, "{protocol}: the session of before is discarded\n{}", agent.tail());
        let version = bench.broker.with_blocking(|broker| broker.connects().last().unwrap().version);
        assert_eq!(version == Version::V5, protocol == "5");
    }
}

#[test]
fn another_agent_with_our_name_is_an_alarm_and_a_long_wait() {
    for protocol in BOTH {
        let bench = Bench::new();
        let agent = Agent::start(&bench.config(protocol).with("broker", "backoff_max = \"6s\""));
        bench.connected(&agent);
        bench.expect_retained(&agent, STATE, &["online"]);
        // Our own word must have come back; until then it might be our own past.
        let echoed =
            || bench.broker.with_blocking(|broker| broker.log.delivered.iter().any(|d| &*d.topic == STATE));
        assert!(wait_until(PATIENCE, echoed));
        agent.accept("t/1", 2, ["before"]);
        agent.expect_drained(PATIENCE);
        bench.say(online(9, 0xCD, 1));
        let status = agent.expect(PATIENCE, "alarmed", |status| {
            status.link.last_error.as_ref().is_some_and(|error| error.contains("another agent is online"))
        });
        let error = status.link.last_error.unwrap();
        assert!(error.contains("start 9") && error.contains("[gateway] id"), "{error}");
        assert!(
            status.link.retry_in_ms.is_some_and(|ms| ms > 2_000),
            "{protocol}: {:?}",
            status.link.retry_in_ms
        );
        // Messages are accepted all the same.
        agent.accept("t/1", 2, ["after"]);
    }
}
