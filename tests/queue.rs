//! `fieldpost queue` through the running agent, and on the database of one that is not running.
//!
//! Real binary, real database; the model broker where messages must be refused.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use serde_json::Value;
use std::fs;
use std::time::Duration;
use support::agent::{Agent, Config, fieldpost, publish, queued};
use support::broker::{Broker, BrokerServer, Kind, Memory, Refusal, Times};
use tokio::runtime::Runtime;

use fieldpost::control::wire::{Publish, Question};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nobody listens there, so everything waits.
const NOWHERE: &str = "mqtt://127.0.0.1:9";

/// Runs `queue` for this agent: exit status, standard output, standard error.
fn queue(agent: &Agent, arguments: &[&str]) -> (bool, String, String) {
    let config = agent.config_file();
    let mut all = vec!["queue", "--config", config.to_str().unwrap()];
    all.extend(arguments);
    let output = fieldpost(&all);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// Its output, which must be a success.
fn told(agent: &Agent, arguments: &[&str]) -> String {
    let (done, out, err) = queue(agent, arguments);
    assert!(done, "{arguments:?}: {out}{err}");
    out
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn lane(agent: &Agent, name: &str) -> Value {
    let overview: Value = serde_json::from_str(&told(agent, &["ls", "--json"])).unwrap();
    overview["lanes"].as_array().unwrap().iter().find(|lane| lane["lane"] == name).unwrap().clone()
}

fn hand_in(agent: &Agent, lane: &str, count: usize) {
    let question = |n: usize| {
        Question::Publish(Publish { lane: Some(lane.to_owned()), ..publish("a/b", 1, &n.to_string()) })
    };
    agent.accept_all((0..count).map(question));
}

#[test]
fn the_queue_is_listed_and_exported_alike_with_and_without_an_agent_and_no_start_is_counted() {
    let mut agent = Agent::start(&Config::new(NOWHERE));
    hand_in(&agent, "normal", 1_200);
    hand_in(&agent, "alarm", 3);
    agent.accept_all([Question::Publish(Publish {
        topic: "bytes".into(),
        qos: 2,
        retain: true,
        lane: Some("alarm".into()),
        text: None,
        json: None,
        hex: Some("ff00".into()),
    })]);
    let shown = |agent: &Agent| {
        let lanes = ["alarm", "normal", "bulk"].map(|name| lane(agent, name)["messages"].clone());
        let page = told(agent, &["ls", "--lane", "normal", "--limit", "700", "--json"]);
        (lanes, page, told(agent, &["export"]))
    };
    let running = shown(&agent);
    assert!(agent.terminate().success());
    let before = fs::metadata(agent.database()).unwrap().len();
    let stopped = shown(&agent);
    assert_eq!(running, stopped);
    assert_eq!(fs::metadata(agent.database()).unwrap().len(), before);
    let (lanes, page, export) = stopped;
    assert_eq!(lanes, [4, 1_200, 0].map(Value::from));
    let page = lines(&page);
    assert_eq!((page.len(), &page[699]["seq"], &page[0]["state"]), (700, &700.into(), &"waiting".into()));
    let export = lines(&export);
    assert_eq!(export.len(), 1_204);
    let bytes = export.iter().find(|message| message["topic"] == "bytes").unwrap();
    assert_eq!((&bytes["hex"], &bytes["qos"], &bytes["retain"]), (&"ff00".into(), &2.into(), &true.into()));
    let texts = export.iter().filter(|message| message["lane"] == "normal").map(|m| m["text"].clone());
    assert!(texts.eq((0..1_200).map(|n| Value::from(n.to_string()))), "in order, and whole");

    agent.start_again();
    assert_eq!(queued(&agent.status()), 1_204);
    let log = agent.log();
    assert!(log.contains("boot=2") && !log.contains("boot=3"), "looking has counted as a start: {log}");
}

#[test]
fn an_export_goes_to_a_new_file_for_its_owner_only_and_removes_nothing() {
    let agent = Agent::start(&Config::new(NOWHERE));
    hand_in(&agent, "bulk", 10);
    let file = agent.dir().join("out.jsonl");
    let name = file.to_str().unwrap();
    let (done, out, err) = queue(&agent, &["export", name, "--lane", "bulk"]);
    assert!(done && out.is_empty() && err.contains("10 messages"), "{out}{err}");
    assert_eq!(lines(&fs::read_to_string(&file).unwrap()).len(), 10);
    assert_eq!(std::os::unix::fs::MetadataExt::mode(&fs::metadata(&file).unwrap()) & 0o777, 0o600);
    let (done, _, err) = queue(&agent, &["export", name]);
    assert!(!done && err.contains("out.jsonl"), "{err}");
    assert_eq!(lane(&agent, "bulk")["messages"], 10);
}

#[test]
fn a_purge_asks_first_drops_one_lane_only_and_is_told_as_a_gap() {
    let runtime = Runtime::new().unwrap();
    let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
    runtime.block_on(broker.stop(Memory::Kept));
    let agent = Agent::start(&Config::new(&broker.url()));
    hand_in(&agent, "normal", 7_000);
    hand_in(&agent, "bulk", 5);
    let (done, _, err) = queue(&agent, &["purge", "--lane", "normal"]);
    assert!(!done && err.contains("--yes"), "{err}");
    assert_eq!(lane(&agent, "normal")["messages"], 7_000, "nobody has confirmed it");
    assert_eq!(
        told(&agent, &["purge", "--lane", "normal", "--yes"]),
        "purged 7,000 messages of lane normal\n"
    );
    assert_eq!(
        (lane(&agent, "normal")["messages"].clone(), lane(&agent, "bulk")["messages"].clone()),
        (0.into(), 5.into())
    );
    assert_eq!(agent.status().dropped.get("purged"), Some(&7_000));
    runtime.block_on(broker.start_again()).unwrap();
    let gap = || {
        broker.with_blocking(|broker| {
            let text = |publish: &[u8]| String::from_utf8_lossy(publish).into_owned();
            broker
                .received()
                .iter()
                .filter(|received| received.topic.ends_with("/gap"))
                .map(|received| text(&received.payload))
                .find(|text| text.contains("purged"))
        })
    };
    assert!(support::wait_until(PATIENCE, || gap().is_some()), "no gap record: {}", agent.tail());
    let gap: Value = serde_json::from_str(&gap().unwrap()).unwrap();
    assert_eq!(
        (&gap["count"], &gap["lane"], &gap["reason"]),
        (&7_000.into(), &"normal".into(), &"purged".into())
    );
}

#[test]
fn what_is_in_flight_survives_a_purge_of_everything() {
    let runtime = Runtime::new().unwrap();
    let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
    let mut agent = Agent::start(&Config::new(&broker.url()).with("broker", "qos2_window = 4"));
    agent.expect(PATIENCE, "connected", |status| status.link.session_present.is_some());
    // From now on nothing is answered. One place of the window is for what is resumed.
    runtime.block_on(broker.with(|broker| broker.script.withhold.insert(Kind::Pubrec)));
    agent.accept("t", 2, (0..50).map(|n| n.to_string()).collect::<Vec<_>>().iter().map(String::as_str));
    agent.expect(PATIENCE, "in flight", |status| status.queue.iter().any(|lane| lane.in_flight == 3));
    let out = told(&agent, &["purge", "--all", "--yes"]);
    assert!(out.contains("47 messages of lane normal"), "{out}");
    let left = lines(&told(&agent, &["ls", "--lane", "normal", "--json"]));
    assert_eq!(left.len(), 3);
    assert!(left.iter().all(|message| message["state"] == "in flight"), "{left:?}");
    // Without the agent the rows say the same.
    agent.kill_9();
    assert_eq!(told(&agent, &["purge", "--all", "--yes"]).split(',').next_back(), Some(" 0 dead letters\n"));
    assert_eq!(lane(&agent, "normal")["messages"], 3);
}

#[test]
fn a_dead_letter_is_shown_in_words_and_put_into_the_queue_again_as_a_new_message() {
    let runtime = Runtime::new().unwrap();
    let mut model = Broker::new();
    model.script.refuse.push(Refusal { filter: "dead/#".into(), reason: 0x99, times: Times::Only(3) });
    let broker = runtime.block_on(BrokerServer::start(model)).unwrap();
    let mut agent = Agent::start(&Config::new(&broker.url()));
    agent.accept("dead/a", 1, ["one", "two", "three"]);
    agent.expect(PATIENCE, "three dead letters", |status| status.dead_letters == 3);
    let shown = told(&agent, &["ls", "--dead"]);
    assert_eq!(shown.matches("dead/a: Payload format invalid (0x99)").count(), 3, "{shown}");
    assert_eq!(lines(&told(&agent, &["ls", "--dead", "--json"]))[0]["reason_name"], "Payload format invalid");

    let (done, _, err) = queue(&agent, &["requeue", "99"]);
    assert!(!done && err.contains("no dead letter 99"), "{err}");
    assert_eq!(told(&agent, &["requeue", "2"]), "1 dead letters are messages again\n");
    agent.expect_drained(PATIENCE);
    let status = agent.status();
    assert_eq!((status.dead_letters, status.counters["requeued"]), (2, 1));
    // The others without an agent; it sends them when it starts.
    assert!(agent.terminate().success());
    assert_eq!(told(&agent, &["requeue", "--all"]), "2 dead letters are messages again\n");
    let waiting = lines(&told(&agent, &["ls", "--lane", "normal", "--json"]));
    assert_eq!(waiting.len(), 2);
    assert!(waiting.iter().all(|message| message["seq"].as_u64() > Some(3)), "{waiting:?}");
    agent.start_again();
    agent.expect_drained(PATIENCE);
    let expected = ["two", "one", "three"].map(|text| text.as_bytes().to_vec());
    let tally =
        broker.with_blocking(move |broker| broker.log.tally("dead/a", expected.iter().map(Vec::as_slice)));
    assert_eq!((tally.lost, tally.duplicated), (0, 0));
    assert_eq!(told(&agent, &["purge", "--dead", "--yes"]), "purged 0 dead letters\n");
}

#[test]
fn a_damaged_record_is_shown_as_damaged_and_the_others_are_shown() {
    let mut agent = Agent::start(&Config::new(NOWHERE));
    agent.accept("a/b", 1, ["first-payload"]);
    agent.accept("a/b", 1, ["second-payload"]);
    assert!(agent.terminate().success());
    let mut file = fs::read(agent.database()).unwrap();
    let at = file.windows(13).position(|bytes| bytes == b"first-payload").unwrap();
    file[at] ^= 1;
    fs::write(agent.database(), file).unwrap();
    let messages = lines(&told(&agent, &["ls", "--lane", "normal", "--json"]));
    assert_eq!((&messages[0]["damaged"], &messages[1]["topic"]), (&true.into(), &"a/b".into()));
    assert!(told(&agent, &["ls", "--lane", "normal"]).contains("DAMAGED"));
    assert_eq!(lines(&told(&agent, &["export"])).len(), 2);
}

#[test]
fn a_queue_that_is_not_there_or_in_use_is_told_with_what_to_do() {
    let mut agent = Agent::prepared(&Config::new(NOWHERE));
    let (done, _, err) = queue(&agent, &["ls"]);
    assert!(!done && err.contains("outbox.db"), "{err}");
    assert!(!agent.database().exists(), "looking has made a database");
    agent.start_again();
    // An agent whose socket is gone still holds its database.
    fs::remove_file(agent.socket()).unwrap();
    let (done, _, err) = queue(&agent, &["ls"]);
    assert!(!done && err.contains("in use by another process"), "{err}");
    assert!(agent.is_running());
    let nobody = fieldpost(&["queue", "ls", "--socket", "/nonexistent/control.sock"]);
    assert_eq!(nobody.status.code(), Some(1));
}
