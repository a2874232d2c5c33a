//! The log of the real program: its formats, what is wrong with a setting, and how few lines trouble makes.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use fieldpost::control::wire::{LinkState, Status};
use serde_json::Value;
use support::agent::{Agent, Config};
use support::mosquitto::{Mosquitto, Options};

const PATIENCE: Duration = Duration::from_secs(60);
/// A port at which nobody listens.
const NOWHERE: &str = "mqtt://127.0.0.1:1";

/// An agent whose broker was never there, and comes at last.
fn outage(agent: &mut Agent, broker: &mut Mosquitto) {
    agent.start_again();
    agent.expect(PATIENCE, "tried", |status| status.counters["connect_failures"] >= 3);
    broker.start_again();
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    assert!(agent.terminate().success());
}

fn stopped_broker() -> Mosquitto {
    let mut broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    broker.stop();
    broker
}

/// Makes the log before the agent is started, and gives its device and inode as systemd does.
fn journal_stream(agent: &Agent) -> String {
    let log = fs::File::create(agent.dir().join("agent.log")).unwrap().metadata().unwrap();
    format!("{}:{}", log.dev(), log.ino())
}

#[test]
fn a_file_or_terminal_gets_words_with_a_time_and_no_colours_unasked() {
    let mut broker = stopped_broker();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    outage(&mut agent, &mut broker);
    println!("{}", agent.log());
    let log = agent.log();
    for line in log.lines() {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z') && time.len() == 24, "{line}");
        assert!(rest.starts_with("INFO  ") || rest.starts_with("WARN  "), "{line}");
    }
    assert!(!log.contains('\u{1b}'));
    for words in [
        "is running",
        "WARN  no connection to the broker: ",
        "connected to the broker again after",
        "stopped",
    ] {
        assert_eq!(agent.logged(words), 1, "{words}\n{log}");
    }
}

#[test]
fn the_journal_gets_priorities_and_no_times() {
    let mut broker = stopped_broker();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    let stream = journal_stream(&agent);
    agent.set_env("JOURNAL_STREAM", stream);
    outage(&mut agent, &mut broker);
    println!("{}", agent.log());
    let log = agent.log();
    assert!(log.lines().all(|line| line.starts_with("<6>") || line.starts_with("<4>")), "{log}");
    assert!(log.contains("\n<4>no connection to the broker: "), "{log}");
    assert!(log.contains("\n<6>connected to the broker again after "), "{log}");
    // Another stream than ours: a shell in the service's unit, for one.
    agent.set_env("JOURNAL_STREAM", "1:2");
    agent.start_again();
    assert!(agent.log().lines().last().unwrap().starts_with("20"), "{}", agent.log());
}

#[test]
fn a_program_gets_one_json_object_in_each_line() {
    let mut broker = stopped_broker();
    let mut agent = Agent::prepared(&Config::new(&broker.url()).with("log", "format = \"json\""));
    outage(&mut agent, &mut broker);
    println!("{}", agent.log());
    let objects: Vec<Value> = agent.log().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for object in &objects {
        for (member, words) in [("time", "20"), ("target", "fieldpost::"), ("level", ""), ("message", "")] {
            assert!(object[member].as_str().unwrap().starts_with(words), "{member}: {object}");
        }
    }
    let failure = objects.iter().find(|object| object["level"] == "warn").unwrap();
    assert_eq!(failure["message"], "no connection to the broker");
    assert_eq!(failure["fields"]["broker"], broker.url());
    assert!(failure["fields"]["reason"].as_str().unwrap().contains("refused"), "{failure}");
}

#[test]
fn the_level_comes_from_the_configuration_and_the_environment_overrides_it() {
    let config = Config::new(NOWHERE).with("log", "level = \"debug\"");
    let agent = Agent::start(&config);
    agent.expect_log(PATIENCE, "DEBUG");
    let mut agent = Agent::prepared(&config);
    agent.set_env("FIELDPOST_LOG", "warn");
    agent.start_again();
    agent.expect_log(PATIENCE, "no connection to the broker");
    assert_eq!((agent.logged("DEBUG"), agent.logged("INFO")), (0, 0), "{}", agent.log());
}

#[test]
fn levels_that_are_not_understood_are_named_and_the_configured_ones_hold() {
    let mut agent = Agent::prepared(&Config::new(NOWHERE));
    agent.set_env("FIELDPOST_LOG", "verbose");
    agent.start_again();
    agent.expect_log(PATIENCE, "is running");
    let log = agent.log();
    let first = log.lines().next().unwrap();
    assert!(
        first.contains("WARN") && first.contains("FIELDPOST_LOG") && first.contains("\"verbose\""),
        "{log}"
    );
    assert!(first.contains("error, warn, info, debug, trace or off"), "{log}");
}

#[test]
fn libraries_are_heard_when_they_are_named_and_only_then() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let line = format!(
        "[[modbus]]\nname = \"l\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\ntimeout = \"50ms\"\n\
         [[modbus.unit]]\nname = \"u\"\nunit = 1\n\
         points = [{{ name = \"p\", register = \"input\", address = 0, type = \"u16\" }}]\n"
    );
    let mut agent = Agent::prepared(&Config::new(NOWHERE).and(&line));
    let polled = |status: &Status| status.lines[0].units[0].errors >= 3;
    for (level, heard) in [("trace", false), ("info,tokio_modbus=trace", true)] {
        agent.set_env("FIELDPOST_LOG", level);
        agent.start_again();
        agent.expect(PATIENCE, "polled", polled);
        assert!(agent.terminate().success());
        assert_eq!(agent.logged("tokio_modbus::") > 0, heard, "{level}: {}", agent.tail());
    }
}

/// Broker down and a unit that is dead, tried as often as the settings allow.
#[test]
fn twenty_seconds_of_trouble_are_a_handful_of_lines() {
    let device = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = device.local_addr().unwrap().port();
    let line = format!(
        "[[modbus]]\nname = \"line1\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\ntimeout = \"10ms\"\n\
         every = \"50ms\"\n[[modbus.unit]]\nname = \"meter1\"\nunit = 1\n\
         points = [{{ name = \"voltage\", register = \"input\", address = 0, type = \"u16\" }}]\n"
    );
    let mut counts = Vec::new();
    for level in ["info", "debug"] {
        let mut agent =
            Agent::prepared(&Config::new(NOWHERE).with("broker", "backoff_max = \"1s\"").and(&line));
        agent.set_env("FIELDPOST_LOG", level);
        agent.start_again();
        let passed = |status: &Status| status.uptime_ms >= 20_000;
        let status = agent.expect(PATIENCE, "20 s old", passed);
        assert!(status.counters["connect_failures"] >= 15, "{:?}", status.counters);
        assert!(status.counters["samples_bad"] >= 300, "{:?}", status.counters);
        if level == "info" {
            println!("{}", agent.log());
            assert_eq!(agent.logged("no connection to the broker"), 1, "{}", agent.log());
            assert_eq!(agent.logged("line1/meter1: no answer within 10 ms"), 1, "{}", agent.log());
        }
        counts.push(agent.log().lines().count());
    }
    println!("lines at info and debug: {counts:?}");
    assert!(counts[0] <= 10, "{counts:?}");
    // The negative control: at debug each occurrence is a line.
    assert!(counts[1] >= 40, "{counts:?}");
}
