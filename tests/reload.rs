//! Another configuration for the running agent: the real program, a real mosquitto, pymodbus, and devices that count
//! and keep people waiting.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it
#![allow(unreachable_pub, dead_code, reason = "helpers are modules of more than this test")]

mod support;

#[path = "support_modbus/device.rs"]
mod device;
#[path = "support_modbus/harness.rs"]
mod harness;
#[path = "support_modbus/pty.rs"]
mod pty;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device::TcpDevice;
use fieldpost::control::wire::{Line, LinkState, Question, Status};
use fieldpost::message::Qos;
use rustix::process::Signal;
use support::agent::{Agent, Config, binary, fieldpost};
use support::asker::Asker;
use support::broker::{Broker, BrokerServer};
use support::mosquitto::{Mosquitto, Options};
use support::plant::Plant;
use support::producer::{Outcome, Producer};
use support::{wait_until, wait_until_async};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
const NOWHERE: &str = "mqtt://127.0.0.1:9";

fn mosquitto() -> Mosquitto {
    Mosquitto::start(Options { unlimited: true, ..Options::default() })
}

/// A line to this port with unit `u`, which has one holding register `a`, and what else is said of the point.
fn line(name: &str, port: u16, every: &str, point: &str) -> String {
    format!(
        "\n[[modbus]]\nname = \"{name}\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\n[[modbus.unit]]\n\
         name = \"u\"\nunit = 1\nevery = \"{every}\"\npoints = [{{ name = \"a\", register = \"holding\", address = 1, \
         type = \"u16\"{point} }}]\n"
    )
}

fn writable(name: &str, port: u16, max: u16) -> String {
    line(name, port, "10s", &format!(", writable = {{ min = 0, max = {max} }}"))
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn expect_connected(agent: &Agent) {
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
}

fn of_line<'s>(status: &'s Status, name: &str) -> Option<&'s Line> {
    status.lines.iter().find(|line| line.name == name)
}

fn polls(status: &Status, name: &str) -> u64 {
    of_line(status, name).map_or(0, |line| line.units[0].polls)
}

/// Of a new database, which discards what the broker holds in a connection of its own.
const FRESH: (usize, usize) = (0, 2);

/// How often mosquitto has let the agent in, with its session present and without.
fn connacks(broker: &Mosquitto) -> (usize, usize) {
    let log = broker.log();
    let count = |present| log.matches(&format!("Sending CONNACK to g1 ({present}, 0)")).count();
    (count(1), count(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_adds_a_line_and_the_others_never_miss_a_poll() {
    let broker = mosquitto();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let times = Arc::clone(&asked);
    let first = TcpDevice::new(move |request| {
        times.lock().unwrap().push(Instant::now());
        request.registers(&[7])
    })
    .await;
    let server = harness::Server::tcp(0).await;
    let steady = line("line1", first.port, "500ms", ", deadband = 1, retain = true");
    let config = Config::new(&broker.url()).and(&steady);
    let agent = Agent::start(&config);
    expect_connected(&agent);
    let before = agent.expect(PATIENCE, "polled", |status| polls(status, "line1") > 3);

    // The new one stands before the old one: what is the same is known by its name, not by its place.
    let both = Config::new(&broker.url()).and(&line("line2", server.port, "200ms", "")).and(&steady);
    let output = agent.reload(&both);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(out(&output), "line2 added\n");
    agent.expect(PATIENCE, "polling both", |status| polls(status, "line2") > 5 && polls(status, "line1") > 8);
    let slower = Config::new(&broker.url()).and(&line("line2", server.port, "300ms", "")).and(&steady);
    assert_eq!(out(&agent.reload(&slower)), "line2/u/a: every 200ms -> 300ms\n");
    agent.expect(PATIENCE, "begun anew", |status| (1..5).contains(&polls(status, "line2")));
    assert_eq!(out(&agent.reload(&config)), "line2 removed\n");
    let after = agent.expect(PATIENCE, "polling", |status| polls(status, "line1") > 12);
    assert_eq!(after.lines.len(), 1);

    assert_eq!(first.connections.load(Ordering::Relaxed), 1, "its connection was kept");
    let skipped = |status: &Status| status.counters["polls_skipped"];
    assert_eq!(skipped(&after), skipped(&before), "no due time passed unused");
    let asked = asked.lock().unwrap().clone();
    let longest = asked.windows(2).map(|two| two[1] - two[0]).max().unwrap();
    assert!(longest < Duration::from_millis(1_000), "{longest:?} between two polls");
    agent.expect_drained(PATIENCE);
    let told = broker.received().publishes.iter().filter(|publish| publish.topic == "g1/line1/u").count();
    assert_eq!(told, 1, "its dead band remembers what was told");
    assert_eq!(connacks(&broker), FRESH, "the connection to the broker was kept");
}

#[test]
fn a_bad_file_changes_nothing_and_says_every_problem() {
    let config = Config::new(NOWHERE).and(&line("line1", 9, "1s", ""));
    let agent = Agent::start(&config);
    let bad = config.clone().with("store", "quota = 5").with("broker", "keep_alife = \"5s\"");
    for round in 1..3 {
        agent.configure(&bad);
        let output = match round {
            1 => agent.reload_file(),
            _ => {
                agent.signal(Signal::HUP);
                agent.expect_log_times(PATIENCE, "the configuration is bad", 2);
                agent.expect_log_times(PATIENCE, "fieldpost.toml:4:1: unknown key `keep_alife`", 2);
                continue;
            }
        };
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        for part in
            ["fieldpost.toml:4:1: unknown key `keep_alife`", "did you mean `keep_alive`?", ":11:9: `quota`"]
        {
            assert!(err(&output).contains(part), "{part}: {}", err(&output));
        }
        assert!(err(&output).ends_with("not reloaded; the agent goes on with the configuration it has\n"));
    }
    let json = fieldpost(&["reload", "--json", "--socket", agent.socket().to_str().unwrap()]);
    assert_eq!(json.status.code(), Some(78));
    let answer: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let problems = answer["not_reloaded"]["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 2);
    assert!(
        problems.iter().all(|problem| problem["line"].is_u64() && problem["column"].is_u64()),
        "{answer}"
    );
    assert_eq!(agent.status().store.quota_bytes, 512 << 20);
    assert_eq!(agent.status().lines.len(), 1);

    let output = agent.reload(&config);
    assert_eq!((out(&output).as_str(), output.status.code()), ("nothing changed\n", Some(0)));
    fs::remove_file(agent.config_file()).unwrap();
    let output = agent.reload_file();
    assert_eq!(output.status.code(), Some(78));
    assert!(err(&output).contains("cannot be read"), "{}", err(&output));
    assert_eq!(agent.status().lines.len(), 1);
}

#[test]
fn what_needs_a_restart_is_refused_as_a_whole() {
    let config = Config::new(NOWHERE);
    let agent = Agent::start(&config);
    let other = config.with("store", "path = \"other.db\"").with("store", "quota = \"2MiB\"");
    let output = agent.reload(&other.with("gateway", "id = \"g2\""));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for part in
        ["[gateway] id g1 -> g2", "[store] path", "cannot be changed while the agent runs", "restart it"]
    {
        assert!(err(&output).contains(part), "{part}: {}", err(&output));
    }
    assert_eq!(agent.status().store.quota_bytes, 512 << 20, "nothing else of it was taken over");
    assert!(!agent.dir().join("other.db").exists());
}

#[test]
fn limits_of_the_store_change_while_it_runs_and_what_they_drop_is_counted() {
    let agent = Agent::start(&Config::new(NOWHERE));
    let payload = |n: u32| format!("{n:0100}");
    let payloads: Vec<String> = (0..1_000).map(payload).collect();
    agent.accept("t", 1, payloads.iter().map(String::as_str));
    let fewer = Config::new(NOWHERE)
        .with("store", "quota = \"2MiB\"")
        .with("store", "commit_interval = \"0s\"")
        .with("store", "lane.normal.max_messages = 100")
        .with("replay", "order = \"live_first\"")
        .with("replay", "max_messages_per_second = 50");
    let output = agent.reload(&fewer);
    assert_eq!(
        out(&output),
        "[store] quota 512MiB -> 2MiB\n[store] commit_interval of normal 50ms -> 0s\n\
         [store] commit_interval of bulk 1s -> 0s\n[store.lane.normal] max_messages none -> 100\n\
         [replay] order in_order -> live_first\n[replay] max_messages_per_second none -> 50\n"
    );
    agent.accept("t", 1, ["one more"]);
    let status = agent.expect(PATIENCE, "within the new limit", |status| status.queue[1].messages == 100);
    assert_eq!(status.dropped["max_messages"], 901);
    assert_eq!(status.store.quota_bytes, 2 << 20);
}

/// Reloads that need another connection, one after the other, under QoS 2 load.
#[test]
fn a_reload_under_load_neither_loses_nor_doubles_and_the_session_is_kept() {
    let broker = mosquitto();
    let config = Config::new(&broker.url());
    let agent = Agent::start(&config);
    expect_connected(&agent);
    let producer = Producer::start(agent.socket(), 2);
    const RELOADS: usize = 6;
    for round in 1..=RELOADS {
        let goal = producer.accepted() + 500;
        assert!(wait_until(PATIENCE, || producer.accepted() > goal), "{}", agent.tail());
        let output =
            agent.reload(&config.clone().with("broker", &format!("keep_alive = \"{}s\"", 30 + round)));
        assert!(out(&output).ends_with(" (connects anew)\n"), "{output:?}");
        let entered = wait_until(PATIENCE, || connacks(&broker) == (round, FRESH.1));
        assert!(entered, "{:?}\n{}", connacks(&broker), agent.tail());
    }
    let produced = producer.stop();
    let status = agent.expect_drained(PATIENCE);
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome} reloads={RELOADS} connacks={:?}", connacks(&broker));
    outcome.assert_exactly_once();
    assert!(outcome.delivered > 3_000, "{outcome}");
    assert_eq!(status.counters["possibly_doubled"] + status.counters["possibly_lost"], 0);
    assert_eq!(status.link.session_present, Some(true));
}

/// Another client id is another session: what the old one holds is finished there, or queued again and counted.
#[test]
fn another_client_id_goes_on_with_the_queue_and_doubles_only_what_is_counted() {
    let broker = mosquitto();
    let config = Config::new(&broker.url());
    let agent = Agent::start(&config);
    expect_connected(&agent);
    let producer = Producer::start(agent.socket(), 2);
    for client in ["other", "g1", "third"] {
        let goal = producer.accepted() + 500;
        assert!(wait_until(PATIENCE, || producer.accepted() > goal), "{}", agent.tail());
        let output = agent.reload(&config.clone().with("broker", &format!("client_id = \"{client}\"")));
        assert!(out(&output).ends_with(" (connects anew, with another session)\n"), "{output:?}");
        let entered = format!("Sending CONNACK to {client} (0, 0)");
        assert!(broker.wait_for_log(PATIENCE, &entered), "{entered}\n{}", agent.tail());
    }
    let produced = producer.stop();
    let status = agent.expect_drained(PATIENCE);
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome} possibly_doubled={}", status.counters["possibly_doubled"]);
    assert_eq!(outcome.lost, 0, "{outcome} {:?}", outcome.details);
    assert!(outcome.duplicates <= status.counters["possibly_doubled"], "{outcome} {:?}", outcome.details);
}

/// The agent is killed while it reads, compares and takes over, with lines and broker settings that change each time.
#[test]
fn a_kill_in_the_middle_of_a_reload_loses_and_doubles_nothing() {
    let broker = mosquitto();
    let configs: Vec<Config> = (0..3)
        .map(|n| {
            let lines = (0..=n).map(|line_n| line(&format!("line{line_n}"), 9, "100ms", ""));
            let config = Config::new(&broker.url()).with("broker", &format!("keep_alive = \"{}s\"", 20 + n));
            config.with("store", &format!("quota = \"{}MiB\"", 10 + n)).and(&lines.collect::<String>())
        })
        .collect();
    let mut agent = Agent::start(&configs[0]);
    let producer = Producer::start(agent.socket(), 2);
    const KILLS: usize = 15;
    for kill in 0..KILLS {
        let goal = producer.accepted() + 100;
        assert!(wait_until(PATIENCE, || producer.accepted() > goal), "{}", agent.tail());
        agent.configure(&configs[(kill + 1) % 3]);
        let reads = agent.logged("reading the configuration again");
        agent.signal(Signal::HUP);
        assert!(wait_until(PATIENCE, || agent.logged("reading the configuration again") > reads));
        // What the kill falls into is left to chance.
        let moment = Instant::now() + Duration::from_millis(fastrand::u64(0..40));
        wait_until(PATIENCE, || Instant::now() >= moment);
        agent.kill_9();
        agent.start_again();
    }
    expect_connected(&agent);
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome} kills={KILLS} reloads_finished={}", agent.logged("is in force"));
    outcome.assert_exactly_once();
    assert!(agent.terminate().success());
}

#[test]
fn a_password_file_with_another_content_is_a_change_and_one_that_cannot_be_used_is_not() {
    let users = vec![("g1".to_owned(), "hunter2".to_owned())];
    let broker = Mosquitto::start(Options { users, ..Options::default() });
    let config = Config::new(&broker.url())
        .with("broker", "username = \"g1\"")
        .with("broker", "password_file = \"pw\"");
    let mut agent = Agent::prepared(&config);
    let file = agent.dir().join("pw");
    let put = |text: &str, mode: u32| {
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    };
    put("hunter2\n", 0o600);
    agent.start_again();
    expect_connected(&agent);
    assert_eq!(out(&agent.reload_file()), "nothing changed\n");

    put("hunter2\n", 0o644);
    let output = agent.reload_file();
    assert_eq!(output.status.code(), Some(78), "everybody may read it: {output:?}");
    fs::remove_file(&file).unwrap();
    let output = agent.reload_file();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(err(&output).contains("cannot read the password file"), "{}", err(&output));
    assert_eq!(agent.status().link.state, LinkState::Connected, "the connection was kept");
    assert_eq!(connacks(&broker), FRESH);

    put("hunter3\n", 0o600);
    let output = agent.reload_file();
    assert_eq!(out(&output), "[broker] password_file: the file holds something else (connects anew)\n");
    agent.expect(PATIENCE, "refused", |status| {
        status.link.last_error.as_ref().is_some_and(|error| error.contains("refused the connection"))
    });
    put("hunter2\n", 0o600);
    assert!(agent.reload_file().status.success());
    expect_connected(&agent);
    for secret in ["hunter2", "hunter3"] {
        assert!(!agent.log().contains(secret), "{}", agent.tail());
    }
}

/// A Modbus TCP device that answers reads at once, and writes once it may.
async fn slow_writer(may: watch::Receiver<bool>, writes: watch::Sender<usize>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut register = 0u16;
        while let Ok((mut stream, _)) = listener.accept().await {
            loop {
                let mut request = [0; 12];
                if stream.read_exact(&mut request).await.is_err() {
                    break;
                }
                let mut pdu = request[7..].to_vec();
                if pdu[0] == 6 {
                    register = u16::from_be_bytes([pdu[3], pdu[4]]);
                    writes.send_modify(|writes| *writes += 1);
                    let _gone = may.clone().wait_for(|may| *may).await.is_err();
                } else {
                    pdu = vec![pdu[0], 2];
                    pdu.extend(register.to_be_bytes());
                }
                let mut reply = request[..4].to_vec();
                reply.extend((pdu.len() as u16 + 1).to_be_bytes());
                reply.push(request[6]);
                reply.extend(pdu);
                if stream.write_all(&reply).await.is_err() {
                    break;
                }
            }
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_under_way_on_a_line_that_is_removed_is_finished_and_answered_once() {
    let broker = mosquitto();
    let (lets, may) = watch::channel(false);
    let (counts, mut writes) = watch::channel(0);
    let port = slow_writer(may, counts).await;
    let plant = Plant::start().await;
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
    let other = writable("line1", plant.port(), 100);
    let agent = Agent::start(&Config::new(&broker.url()).and(&writable("line0", port, 100)).and(&other));
    expect_connected(&agent);
    let command = |id: &str, line: u8, value: u8| {
        format!(r#"{{"id":"{id}","point":"line{line}/u/a","value":{value}}}"#)
    };
    let ask = async |id, line, value| {
        asker.ask("fieldpost/g1/command", &command(id, line, value), Qos::ExactlyOnce, None).await;
    };
    ask("under way", 0, 7).await;
    writes.wait_for(|writes| *writes == 1).await.unwrap();
    // Behind it waits one that will not be carried out.
    ask("waits", 0, 8).await;
    agent.expect(PATIENCE, "taken", |status| status.counters["commands_received"] == 2);

    let only_other = Config::new(&broker.url()).and(&other);
    let reloading = tokio::task::spawn_blocking(move || {
        let output = agent.reload(&only_other);
        (agent, output)
    });
    let refused = wait_until_async(PATIENCE, async || asker.answers().contains_key("waits")).await;
    assert!(refused, "{:?}", asker.answers());
    assert!(!asker.answers().contains_key("under way"));
    lets.send_replace(true);
    let (agent, output) = reloading.await.unwrap();
    assert_eq!(out(&output), "line0 removed\n", "{output:?}");
    ask("other", 1, 9).await;
    ask("gone", 0, 9).await;
    let all = wait_until_async(PATIENCE, async || asker.answers().len() == 4).await;
    assert!(all, "{:?}\n{}", asker.answers(), agent.tail());
    let answers = asker.answers();
    let result = |id: &str| (answers[id].len(), answers[id][0]["result"].as_str().unwrap().to_owned());
    assert_eq!(result("under way"), (1, "done".to_owned()));
    assert_eq!(result("waits"), (1, "refused".to_owned()), "{answers:?}");
    assert_eq!(result("other"), (1, "done".to_owned()));
    assert_eq!(result("gone"), (1, "refused".to_owned()));
    assert_eq!(*writes.borrow(), 1, "at most once");
}

/// A line that is made anew takes over what waits for it; a smaller range refuses what it does not allow.
#[tokio::test(flavor = "multi_thread")]
async fn commands_that_wait_go_to_the_line_that_is_made_anew_by_the_new_range() {
    let broker = mosquitto();
    let (lets, may) = watch::channel(false);
    let (counts, mut writes) = watch::channel(0);
    let port = slow_writer(may, counts).await;
    let plant = Plant::start().await;
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
    let agent = Agent::start(&Config::new(&broker.url()).and(&writable("line0", port, 100)));
    expect_connected(&agent);
    for value in [1, 2, 60] {
        let command = format!(r#"{{"id":"c{value}","point":"line0/u/a","value":{value}}}"#);
        asker.ask("fieldpost/g1/command", &command, Qos::ExactlyOnce, None).await;
    }
    writes.wait_for(|writes| *writes == 1).await.unwrap();
    agent.expect(PATIENCE, "taken", |status| status.counters["commands_received"] == 3);
    let elsewhere = Config::new(&broker.url()).and(&writable("line0", plant.port(), 50));
    let reloading = tokio::task::spawn_blocking(move || {
        let output = agent.reload(&elsewhere);
        (agent, output)
    });
    let refused = wait_until_async(PATIENCE, async || asker.answers().contains_key("c60")).await;
    assert!(refused, "{:?}", asker.answers());
    lets.send_replace(true);
    let (agent, output) = reloading.await.unwrap();
    assert!(out(&output).contains("line0/u/a: writable 0 to 100 -> 0 to 50"), "{output:?}");
    let all = wait_until_async(PATIENCE, async || asker.answers().len() == 3).await;
    assert!(all, "{:?}\n{}", asker.answers(), agent.tail());
    let answers = asker.answers();
    assert_eq!((&answers["c1"][0]["result"], &answers["c2"][0]["result"]), (&"done".into(), &"done".into()));
    assert!(answers["c60"][0]["reason"].as_str().unwrap().contains("out of range, 0 to 50"), "{answers:?}");
    assert_eq!((*writes.borrow(), plant.writes()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_change_leaves_behind_at_the_broker_is_cleared() {
    let broker = BrokerServer::start(Broker::new()).await.unwrap();
    let plant = Plant::start().await;
    let both = line("line1", plant.port(), "100ms", "") + &line("line2", plant.port(), "100ms", "");
    let config = Config::new(&broker.url());
    let agent = Agent::start(&config.clone().and(&both));
    let retained =
        async |topic: &'static str| broker.with(move |broker| broker.retained(topic).is_some()).await;
    let expect = async |topics: &[(&'static str, bool)]| {
        for (topic, there) in topics {
            let as_wished = wait_until_async(PATIENCE, async || retained(topic).await == *there).await;
            assert!(as_wished, "{topic} retained: {}\n{}", !there, agent.tail());
        }
    };
    expect(&[("fieldpost/g1/unit/line1/u", true), ("fieldpost/g1/unit/line2/u", true)]).await;
    let one = config.clone().and(&line("line1", plant.port(), "100ms", ""));
    assert_eq!(out(&agent.reload(&one)), "line2 removed\n");
    expect(&[("fieldpost/g1/unit/line2/u", false), ("fieldpost/g1/unit/line1/u", true)]).await;
    let output = agent.reload(&one.with("gateway", "base_topic = \"plant/g1\""));
    let base = "[gateway] base_topic fieldpost/g1 -> plant/g1 (connects anew)\n";
    let below = "[commands] topic fieldpost/g1/command -> plant/g1/command (connects anew)\n";
    assert_eq!(out(&output), format!("{base}{below}"));
    expect(&[
        ("plant/g1/state", true),
        ("plant/g1/health", true),
        ("plant/g1/unit/line1/u", true),
        ("fieldpost/g1/state", false),
        ("fieldpost/g1/health", false),
        ("fieldpost/g1/unit/line1/u", false),
    ])
    .await;
}

#[test]
fn reloads_come_one_after_the_other_and_a_stop_after_them() {
    let broker = mosquitto();
    let config = Config::new(&broker.url());
    let mut agent = Agent::start(&config);
    expect_connected(&agent);
    agent.configure(&config.clone().and(&line("line1", 9, "1s", "")));
    let outputs: Vec<Output> = std::thread::scope(|scope| {
        let reloads: Vec<_> = (0..4).map(|_| scope.spawn(|| agent.reload_file())).collect();
        reloads.into_iter().map(|reload| reload.join().unwrap()).collect()
    });
    let said = |text: &str| outputs.iter().filter(|output| out(output) == text).count();
    assert_eq!((said("line1 added\n"), said("nothing changed\n")), (1, 3), "{outputs:?}");
    agent.configure(&config);
    agent.signal(Signal::HUP);
    agent.signal(Signal::TERM);
    assert!(agent.wait(PATIENCE).success(), "{}", agent.tail());
    let retained = broker.received();
    assert!(retained.publishes.iter().any(|publish| publish.topic == "fieldpost/g1/state"));
}

/// Relative paths mean the same after a reload, whatever the file was called when the agent started.
#[test]
fn a_file_that_was_named_by_a_relative_path_is_the_same_after_a_reload() {
    let agent = Agent::prepared(&Config::new(NOWHERE));
    let mut command = Command::new(binary());
    command.args(["run", "fieldpost.toml"]).current_dir(agent.dir());
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_until(PATIENCE, || agent.ask(&Question::Status {}).is_ok()));
    let output = agent.reload_file();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(out(&output), "nothing changed\n", "{output:?}");
}
