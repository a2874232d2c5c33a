//! The HTTP interface as programs meet it: real binary, real mosquitto, plain connections, the OpenMetrics parser of
//! the Prometheus project.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{fs, thread};

use fieldpost::agent::{Faults, Part};
use fieldpost::control::wire::{LinkState, Question, Status};
use rustix::process::Signal;
use serde_json::Value;
use support::agent::{self, Agent, Config, fieldpost, queued};
use support::http::{Answer, Client, request};
use support::mosquitto::{Mosquitto, Options, Subscriber, free_port};
use support::plant::Plant;
use support::producer::{Outcome, Produced, numbered};
use support::wait_until;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// Found nowhere by chance.
const CANARY: &str = "canary-Xq7-t0ken";
const JSON: (&str, &str) = ("content-type", "application/json");

/// A broker that nobody is.
const NO_BROKER: &str = "mqtt://127.0.0.1:1";

fn with_http(url: &str, port: u16) -> Config {
    Config::new(url).with("http", &format!("listen = \"127.0.0.1:{port}\""))
}

/// Connects once the agent listens.
fn connect(port: u16) -> Client {
    let mut client = None;
    let listens = wait_until(PATIENCE, || {
        client = Client::connect(port).ok();
        client.is_some()
    });
    assert!(listens, "nobody listens on port {port}");
    client.unwrap()
}

fn start(config: &Config, port: u16) -> (Agent, Client) {
    let agent = Agent::start(config);
    let client = connect(port);
    (agent, client)
}

fn reason(answer: &Answer) -> String {
    answer.json()["refused"]["reason"].as_str().unwrap_or_default().to_owned()
}

// ---- what is said ----------------------------------------------------------------------------------------

#[test]
fn every_request_gets_the_status_that_says_what_became_of_it() {
    let port = free_port();
    let (agent, _) = start(&with_http(NO_BROKER, port).with("http", "max_body = \"2KiB\""), port);
    let good = r#"{"topic":"a/b","qos":2,"text":"21.5"}"#;
    let long = format!(r#"{{"topic":"a/b","text":"{}"}}"#, "x".repeat(2048));
    let lines = ("content-type", "application/x-ndjson");
    for (method, path, headers, body, status, words) in [
        ("GET", "/healthz", &[][..], "", 200, "healthy"),
        ("HEAD", "/healthz", &[], "", 200, ""),
        ("GET", "/readyz", &[], "", 200, "ready"),
        ("GET", "/readyz?lane=alarm", &[], "", 200, "ready"),
        ("GET", "/readyz?lane=x", &[], "", 400, "?lane=bulk"),
        ("GET", "/metrics", &[], "", 200, "# EOF\n"),
        ("GET", "/status", &[], "", 200, "\"gateway\": \"g1\""),
        ("GET", "/", &[], "", 404, "/publish"),
        ("POST", "/healthz", &[], "", 405, "GET"),
        ("GET", "/publish", &[], "", 405, "POST"),
        ("DELETE", "/publish", &[], "", 405, "POST"),
        ("POST", "/publish", &[JSON], good, 200, "{\"accepted\":{\"messages\":1}}\n"),
        ("POST", "/publish", &[JSON], r#"{"topic":"a/b","json":{"a":[1.0]}}"#, 200, "accepted"),
        ("POST", "/publish", &[JSON], &format!("[{good},{good}]"), 200, "\"messages\":2"),
        ("POST", "/publish", &[lines], &format!("{good}\n{good}\n{good}\n"), 200, "\"messages\":3"),
        ("POST", "/publish", &[JSON], r#"{"topic":"a/b","qos":0,"text":""}"#, 202, "handed_over"),
        ("POST", "/publish", &[JSON], "nonsense", 400, "not a message"),
        ("POST", "/publish", &[JSON], "", 400, "not a message"),
        ("POST", "/publish", &[JSON], r#"{"topic":"a/b","qos":3,"text":""}"#, 400, "qos is 0, 1 or 2, not 3"),
        ("POST", "/publish", &[JSON], r#"{"topic":"a/#","text":""}"#, 400, "must not hold '#'"),
        (
            "POST",
            "/publish",
            &[JSON],
            &format!("[{good},{{\"topic\":\"\",\"text\":\"\"}}]"),
            400,
            "message 1",
        ),
        ("POST", "/publish", &[lines], &format!("{good}\n{{\"topic\":\"x\"}}"), 400, "line 2"),
        ("POST", "/publish", &[("content-type", "text/plain")], good, 415, "application/json"),
        ("POST", "/publish", &[], good, 415, "application/json"),
        ("POST", "/publish", &[JSON, ("origin", "https://evil.example")], good, 403, "web pages"),
        ("POST", "/publish", &[JSON, ("host", "evil.example")], good, 403, "localhost"),
        ("GET", "/status", &[("host", "evil.example:80")], "", 403, "token_file"),
        ("POST", "/publish", &[JSON], &long, 413, "2048 bytes"),
    ] {
        let what = format!("{method} {path} {headers:?} {body:.80}");
        let mut client = connect(port);
        let answer =
            client.ask(method, path, headers, body).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.body.contains(words), "{what}: {answer:?}");
        if status >= 400 && !words.is_empty() {
            assert!(!reason(&answer).is_empty(), "{what}: {answer:?}");
        }
    }
    let allow = connect(port).get("/publish").unwrap();
    assert_eq!(allow.header("allow"), Some("POST"));
    let status = agent.status();
    assert_eq!((queued(&status), status.counters["messages_accepted"]), (7, 7));
    assert_eq!((status.counters["http_forbidden"], status.counters["http_bodies_refused"]), (3, 1));
}

#[test]
fn a_request_larger_than_its_limits_is_refused_before_it_is_read() {
    let port = free_port();
    let (agent, mut client) = start(&with_http(NO_BROKER, port), port);
    let giant = request("GET", "/status", &[("x-giant", &"x".repeat(64 << 10))], "");
    // It may be closed before all of it is sent.
    let _reset = client.send(giant.as_bytes());
    assert!(client.hear(false).map_or(true, |answer| answer.status == 431));
    let many: Vec<String> = (0..1001).map(|n| format!(r#"{{"topic":"a/{n}","text":""}}"#)).collect();
    let answer = connect(port).publish(&format!("[{}]", many.join(","))).unwrap();
    assert_eq!((answer.status, reason(&answer).contains("at most 1000 messages")), (413, true), "{answer:?}");
    // A body without a length is measured while it comes.
    let mut client = connect(port);
    client
        .send(request("POST", "/publish", &[JSON, ("transfer-encoding", "chunked")], "").as_bytes())
        .unwrap();
    let chunk = format!("{:x}\r\n{}\r\n", 64 << 10, " ".repeat(64 << 10));
    for _ in 0..5 {
        let _reset = client.send(chunk.as_bytes());
    }
    assert!(client.hear(false).map_or(true, |answer| answer.status == 413));
    let counters =
        agent.expect(PATIENCE, "counted", |status| status.counters["http_bodies_refused"] == 2).counters;
    assert_eq!((counters["http_headers_refused"], counters["messages_accepted"]), (1, 0));
}

#[test]
fn the_status_page_is_what_the_command_prints() {
    let port = free_port();
    let (agent, mut client) = start(&with_http(NO_BROKER, port), port);
    client.publish(r#"{"topic":"a/b","text":"x"}"#).unwrap();
    let timeless = |json: &[u8]| {
        let mut status: Status = serde_json::from_slice(json).unwrap();
        status.queue[1].oldest_age_ms.take().expect("a message waits");
        status
    };
    let page = timeless(client.get("/status").unwrap().body.as_bytes());
    let printed = fieldpost(&["status", "--json", "--socket", &agent.socket().display().to_string()]);
    let printed = timeless(&printed.stdout);
    assert_eq!((&page.gateway, &page.queue, &page.lines), (&printed.gateway, &printed.queue, &printed.lines));
    assert_eq!(page.store.path, printed.store.path);
    assert_eq!((queued(&page), page.queue[1].accepted_since_start), (1, 1));
    assert!(page.store.commits.number >= 1 && page.store.database_bytes > 0, "{:?}", page.store);
}

/// Not a test: the agent with faults, as which this program starts itself again.
#[test]
fn agent_with_faults() {
    agent::be_the_agent();
}

#[test]
fn a_part_that_is_stuck_is_named_and_the_agent_is_not_healthy() {
    let port = free_port();
    // The pipeline is never polled again two seconds after the start, and patience is a thirtieth of what it is.
    let faults = Faults { frozen: Some(Part::Pipeline), haste: 30, ..Faults::default() };
    let agent = Agent::start_with_faults(&with_http(NO_BROKER, port), faults);
    let mut client = connect(port);
    assert_eq!(client.get("/healthz").unwrap().status, 200, "{}", agent.tail());
    let mut last = None;
    let unhealthy = wait_until(PATIENCE, || {
        last = connect(port).get("/healthz").ok();
        last.as_ref().is_some_and(|answer| answer.status == 503)
    });
    let last = last.unwrap();
    assert!(unhealthy, "{last:?}");
    assert!(reason(&last).contains("the pipeline has made no progress for"), "{last:?}");
}

// ---- metrics ---------------------------------------------------------------------------------------------

fn python() -> PathBuf {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.venv/bin/python");
    assert!(python.exists(), "{} is missing: tests/run makes it", python.display());
    python
}

/// Name, labels and value of each sample, as the parser of the Prometheus project reads the page.
fn samples(page: &str) -> Vec<(String, Value, f64)> {
    const READ: &str = "import json, sys\n\
        from prometheus_client.openmetrics.parser import text_string_to_metric_families as read\n\
        print(json.dumps([[s.name, s.labels, s.value] for f in read(sys.stdin.read()) for s in f.samples]))\n";
    let mut command = Command::new(python());
    command.args(["-c", READ]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(page.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}\n{page}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The value of the sample with this name and these labels among others.
fn value(samples: &[(String, Value, f64)], name: &str, labels: &[(&str, &str)]) -> f64 {
    let fits = |(other, of, _): &&(String, Value, f64)| {
        other == name && labels.iter().all(|(label, wanted)| of[*label] == *wanted)
    };
    let found: Vec<_> = samples.iter().filter(fits).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
    found[0].2
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_metrics_say_is_what_was_done() {
    let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let plant = Plant::start().await;
    let port = free_port();
    // One unit answers, the other has no such register, and on the second line nobody is.
    let line = |name: &str, port: u16| {
        format!(
            "[[modbus]]\nname = \"{name}\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}\nevery = \"100ms\"\n"
        )
    };
    let unit = |name: &str, unit: u8, address: u16| {
        format!(
            "[[modbus.unit]]\nname = \"{name}\"\nunit = {unit}\n\
             points = [{{ name = \"p\", register = \"holding\", address = {address}, type = \"u16\" }}]\n"
        )
    };
    let lines = line("line1", plant.port())
        + &unit("good", 1, 0)
        + &unit("bad", 2, 200)
        + &line("line2", 1)
        + &unit("gone", 1, 0);
    let config = with_http(&broker.url(), port).with("gateway", "health_interval = \"1d\"").and(&lines);
    let (agent, mut client) = start(&config, port);
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    // A unit of a line that is down is not asked.
    let polled =
        |status: &Status| status.lines[0].units[0].polls >= 2 && status.lines[0].units[1].errors >= 2;
    agent.expect(PATIENCE, "polled", polled);
    for n in 0..5 {
        assert_eq!(
            client
                .publish(&format!(r#"{{"topic":"alarm/{n}","lane":"alarm","qos":2,"text":""}}"#))
                .unwrap()
                .status,
            200
        );
    }
    for _ in 0..3 {
        assert_eq!(client.publish(r#"{"topic":"b","lane":"bulk","qos":1,"text":""}"#).unwrap().status, 200);
    }
    assert_eq!(client.publish("{}").unwrap().status, 400);
    agent.expect(PATIENCE, "delivered", |status| {
        status.queue[0].delivered_since_start >= 5 && status.queue[2].delivered_since_start >= 3
    });

    let before = agent.status();
    let answer = client.get("/metrics").unwrap();
    let after = agent.status();
    assert_eq!(
        answer.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    let samples = samples(&answer.body);
    println!("{} samples in {} bytes", samples.len(), answer.body.len());
    let of = |name: &str, labels: &[(&str, &str)]| value(&samples, name, labels);
    let between = |name: &str, labels: &[(&str, &str)], low: u64, high: u64| {
        let value = of(name, labels);
        assert!((low as f64..=high as f64).contains(&value), "{name} {labels:?}: {low} <= {value} <= {high}");
    };
    // Every counter of the status is there, with a value between what it was before and after.
    for (name, low) in &before.counters {
        let high = after.counters[name];
        match name.as_str() {
            "messages_accepted" | "messages_delivered" => {
                for (low, high) in before.queue.iter().zip(&after.queue) {
                    let of = |lane: &fieldpost::control::wire::LaneQueue| match name.as_str() {
                        "messages_accepted" => lane.accepted_since_start,
                        _ => lane.delivered_since_start,
                    };
                    between(&format!("fieldpost_{name}_total"), &[("lane", &low.lane)], of(low), of(high));
                }
                let sum = |status: &Status| -> u64 {
                    let of = |lane: &fieldpost::control::wire::LaneQueue| match name.as_str() {
                        "messages_accepted" => lane.accepted_since_start,
                        _ => lane.delivered_since_start,
                    };
                    status.queue.iter().map(of).sum()
                };
                assert_eq!(sum(&after), high, "{name}: the lanes add up");
            }
            _ => between(&format!("fieldpost_{name}_total"), &[], *low, high),
        }
    }
    for (low, high) in before.lines.iter().zip(&after.lines) {
        for (low_unit, high_unit) in low.units.iter().zip(&high.units) {
            let labels = [("line", low.name.as_str()), ("unit", low_unit.name.as_str())];
            between("fieldpost_polls_total", &labels, low_unit.polls, high_unit.polls);
            for (kind, count) in &low_unit.errors_by_kind {
                let labels = [("line", low.name.as_str()), ("unit", &low_unit.name), ("kind", kind)];
                between("fieldpost_poll_errors_total", &labels, *count, high_unit.errors_by_kind[kind]);
            }
            assert_eq!(low_unit.errors_by_kind.values().sum::<u64>(), low_unit.errors, "{low_unit:?}");
        }
    }
    assert!(of("fieldpost_poll_errors_total", &[("unit", "bad"), ("kind", "exception")]) >= 2.0);
    assert_eq!(of("fieldpost_polls_total", &[("unit", "gone")]), 0.0);
    assert_eq!(of("fieldpost_unit_up", &[("unit", "good")]), 1.0);
    assert_eq!(of("fieldpost_line_up", &[("line", "line2")]), 0.0);
    assert_eq!(of("fieldpost_link_up", &[]), 1.0);
    assert_eq!(of("fieldpost_link_state", &[("fieldpost_link_state", "connected")]), 1.0);
    assert_eq!(of("fieldpost_connects_total", &[]), 1.0);
    assert_eq!(of("fieldpost_messages_accepted_total", &[("lane", "alarm")]), 5.0);
    assert_eq!(of("fieldpost_messages_delivered_total", &[("lane", "bulk")]), 3.0);
    assert_eq!(of("fieldpost_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
    // A commit for each of the eight, which were waited for one after the other.
    assert!(of("fieldpost_commit_seconds_count", &[]) >= 8.0);
    assert_eq!(
        of("fieldpost_commit_seconds_bucket", &[("le", "+Inf")]),
        of("fieldpost_commit_seconds_count", &[])
    );
    assert!(of("fieldpost_commit_seconds_sum", &[]) > 0.0);
    let size = |name: &str| fs::metadata(agent.dir().join(name)).unwrap().len();
    assert_eq!(of("fieldpost_store_database_bytes", &[]) as u64, size("outbox.db"));
    assert!(of("fieldpost_store_log_bytes", &[]) > 0.0);
    let resident = agent.resident_kib() as f64 * 1024.0;
    assert!((0.5..2.0).contains(&(of("process_resident_memory_bytes", &[]) / resident)), "{resident}");
    assert!(
        of("fieldpost_disk_written_bytes_total", &[]) >= 0.0 && of("process_cpu_seconds_total", &[]) > 0.0
    );
}

// ---- who may ask -----------------------------------------------------------------------------------------

#[test]
fn a_token_is_needed_where_it_is_set_and_a_new_one_counts_at_once() {
    let port = free_port();
    let config = Config::new(NO_BROKER)
        .with("http", &format!("listen = \"0.0.0.0:{port}\""))
        .with("http", "token_file = \"http.token\"");
    let mut agent = Agent::prepared(&config);
    let file = agent.dir().join("http.token");
    let write = |token: &str, mode: u32| {
        fs::write(&file, token).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    };
    write(&format!("{CANARY}\n"), 0o640);
    agent.set_env("FIELDPOST_LOG", "trace");
    agent.start_again();
    let with = |token: &str| {
        let token = format!("Bearer {token}");
        let headers = [JSON, ("authorization", token.as_str()), ("host", "gateway.example:8090")];
        connect(port).ask("POST", "/publish", &headers, r#"{"topic":"a","text":""}"#).unwrap()
    };
    for (path, method) in
        [("/healthz", "GET"), ("/metrics", "GET"), ("/nowhere", "GET"), ("/publish", "POST")]
    {
        let answer = connect(port).ask(method, path, &[], "").unwrap();
        assert_eq!(answer.status, 401, "{path}");
        assert!(
            answer.header("www-authenticate").is_some_and(|scheme| scheme.starts_with("Bearer")),
            "{answer:?}"
        );
    }
    assert_eq!(with(CANARY).status, 200);
    assert_eq!(with(&CANARY[1..]).status, 401);
    write("another", 0o640);
    assert_eq!((with(CANARY).status, with("another").status), (401, 200));
    // What everybody may read, and what is empty, lets nobody in, and the log says why, once.
    for (token, mode, why) in [(CANARY, 0o644, "chmod 640"), ("", 0o640, "it is empty")] {
        write(token, mode);
        assert_eq!((with(token).status, with("").status), (503, 503));
        assert_eq!(agent.logged(why), 1, "{}", agent.tail());
        write("between", 0o640);
        assert_eq!(with("between").status, 200);
    }
    assert_eq!(agent.status().counters["http_unauthorized"], 6);
    assert!(agent.logged("DEBUG") > 0, "the log was asked for everything");
    for file in
        fs::read_dir(agent.dir()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| *path != file)
    {
        let held = fs::read(&file).unwrap_or_default();
        assert!(!held.windows(CANARY.len()).any(|window| window == CANARY.as_bytes()), "{}", file.display());
    }
    let printed = connect(port).ask("GET", "/status", &[("authorization", "Bearer between")], "").unwrap();
    assert!(!printed.body.contains("between") && printed.status == 200, "{printed:?}");
}

#[test]
fn a_unix_socket_serves_its_owner_and_goes_with_the_agent() {
    let mut agent = Agent::start(&Config::new(NO_BROKER).with("http", "listen = \"unix:http.sock\""));
    let path = agent.dir().join("http.sock");
    assert!(wait_until(PATIENCE, || path.exists()), "{}", agent.tail());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream
        .write_all(request("GET", "/readyz", &[("host", "anything"), ("connection", "close")], "").as_bytes())
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("{\"ready\":{}}\n"), "{answer}");
    // What a kill leaves behind is replaced.
    agent.kill_9();
    assert!(path.exists());
    agent.start_again();
    assert!(wait_until(PATIENCE, || UnixStream::connect(&path).is_ok()), "{}", agent.tail());
    assert!(agent.terminate().success());
    assert!(!path.exists());
}

#[test]
fn an_address_in_use_keeps_no_agent_from_running_and_is_tried_again() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let agent = Agent::start(&with_http(NO_BROKER, port));
    agent.expect_log(PATIENCE, "it is tried again");
    agent.accept("a/b", 1, ["x"]);
    drop(taken);
    assert_eq!(connect(port).get("/healthz").unwrap().status, 200);
}

// ---- limits ----------------------------------------------------------------------------------------------

#[test]
fn a_full_queue_is_not_ready_and_refuses_with_the_reason() {
    let port = free_port();
    let config = with_http(NO_BROKER, port)
        .with("store", "quota = \"1MiB\"")
        .with("store", "when_full = \"reject_new\"")
        .and("[store.lane.bulk]\nmax_messages = 3\n");
    let (agent, mut client) = start(&config, port);
    let message = |topic: &str, lane: &str, bytes: usize| {
        format!(r#"{{"topic":"{topic}","lane":"{lane}","hex":"{}"}}"#, "5a".repeat(bytes))
    };
    // A batch that does not fit is refused whole.
    let four = vec![message("b", "bulk", 1); 4].join("\n");
    let lines = [("content-type", "application/x-ndjson")];
    let answer = client.ask("POST", "/publish", &lines, &four).unwrap();
    assert_eq!((answer.status, queued(&agent.status())), (503, 0), "{answer:?}");
    assert!(reason(&answer).contains("max_messages"), "{answer:?}");
    let answer =
        client.ask("POST", "/publish", &lines, &vec![message("b", "bulk", 1); 3].join("\n")).unwrap();
    assert_eq!((answer.status, queued(&agent.status())), (200, 3), "{answer:?}");
    for (path, status) in
        [("/readyz?lane=bulk", 503), ("/readyz", 200), ("/readyz?lane=alarm", 200), ("/healthz", 200)]
    {
        assert_eq!(client.get(path).unwrap().status, status, "{path}");
    }
    let random = || (0..100_000).map(|_| format!("{:02x}", fastrand::u8(..))).collect::<String>();
    let mut accepted = 3;
    let refused = loop {
        let answer = client.publish(&format!(r#"{{"topic":"n","hex":"{}"}}"#, random())).unwrap();
        match answer.status {
            200 => accepted += 1,
            _ => break answer,
        }
        assert!(accepted < 100, "the quota is never reached");
    };
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{refused:?}");
    assert!(reason(&refused).contains("the queue is full"), "{refused:?}");
    // What is left is filled with ever smaller ones.
    for bytes in [10_000, 1_000, 100, 1] {
        while client.publish(&message("n", "normal", bytes)).unwrap().status == 200 {
            accepted += 1;
            assert!(accepted < 1_000, "the quota is never reached");
        }
    }
    let not_ready = client.get("/readyz").unwrap();
    assert_eq!(
        (not_ready.status, reason(&not_ready).contains("the queue is full")),
        (503, true),
        "{not_ready:?}"
    );
    assert_eq!(client.get("/healthz").unwrap().status, 200, "it is full and well");
    assert_eq!(queued(&agent.status()), accepted, "what was accepted is there, and nothing else");
    let metrics = samples(&client.get("/metrics").unwrap().body);
    assert_eq!(value(&metrics, "fieldpost_queue_refusing", &[("lane", "normal")]), 1.0);
}

#[test]
fn a_batch_is_accepted_whole_and_arrives_in_its_order() {
    let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let port = free_port();
    let (agent, mut client) = start(&with_http(&broker.url(), port), port);
    let subscriber = Subscriber::start(broker.port(), "watch", "batch", 1000, &[]);
    assert!(broker.wait_for_log(PATIENCE, "Sending SUBACK to watch"));
    let message = |n: usize| format!(r#"{{"topic":"batch","qos":2,"json":{{"n":{n}}}}}"#);
    let commits = agent.status().store.commits.number;
    let batch: Vec<String> = (0..1000).map(message).collect();
    let answer = client.publish(&format!("[{}]", batch.join(","))).unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (200, "{\"accepted\":{\"messages\":1000}}\n"));
    println!("commits meanwhile: {}", agent.status().store.commits.number - commits);
    let heard = subscriber.finish();
    assert_eq!(heard, (0..1000).map(|n| format!("batch {{\"n\":{n}}}")).collect::<Vec<_>>());
    // One wrong among many, and none of them is taken.
    let mut wrong = batch;
    wrong[500] = r#"{"topic":"batch","qos":0,"text":""}"#.into();
    let answer = client.publish(&format!("[{}]", wrong.join(","))).unwrap();
    assert_eq!(
        (answer.status, reason(&answer).starts_with("message 500 (from 0)")),
        (400, true),
        "{answer:?}"
    );
    assert_eq!(agent.expect_drained(PATIENCE).counters["messages_accepted"], 1000);
}

#[test]
fn slow_clients_are_left_and_cost_the_others_nothing() {
    let port = free_port();
    let config = with_http(NO_BROKER, port)
        .with("http", "read_timeout = \"500ms\"")
        .with("http", "max_connections = 8");
    let (agent, client) = start(&config, port);
    drop(client);
    // Half a head, half a body, nothing at all; and one that never reads what it asks for.
    let half_head = thread::spawn(move || {
        let mut client = connect(port);
        client.send(b"GET /status HTTP/1.1\r\nhost: localhost\r\nx-slow: ").unwrap();
        client.is_closed()
    });
    let half_body = thread::spawn(move || {
        let mut client = connect(port);
        client.send(request("POST", "/publish", &[JSON, ("content-length", "100")], "{").as_bytes()).unwrap();
        (client.hear(false).map_or(408, |answer| answer.status), client.is_closed())
    });
    let silent = thread::spawn(move || connect(port).is_closed());
    let idle = thread::spawn(move || {
        let mut client = connect(port);
        (client.get("/healthz").unwrap().status, client.is_closed())
    });
    let deaf = thread::spawn(move || {
        let mut client = connect(port);
        let metrics = request("GET", "/metrics", &[], "").repeat(100);
        // Until the server no longer reads, because nobody reads its answers; then it must give up.
        while client.send(metrics.as_bytes()).is_ok() {}
    });
    let mut client = connect(port);
    for _ in 0..100 {
        let began = Instant::now();
        assert_eq!(client.publish(r#"{"topic":"a","text":""}"#).unwrap().status, 200);
        assert!(began.elapsed() < Duration::from_secs(5));
    }
    assert!(half_head.join().unwrap());
    assert_eq!(half_body.join().unwrap(), (408, true));
    assert!(silent.join().unwrap(), "a connection without a request is closed");
    assert_eq!(idle.join().unwrap(), (200, true), "an idle one too");
    deaf.join().unwrap();
    let counters = agent.status().counters;
    assert!(counters["http_headers_refused"] >= 1 && counters["http_bodies_refused"] == 1, "{counters:?}");
}

#[test]
fn sixty_four_connections_are_served_and_one_too_many_is_told() {
    let port = free_port();
    let config = with_http(NO_BROKER, port).with("http", "max_connections = 64");
    let (agent, client) = start(&config, port);
    drop(client);
    let all_open = Arc::new(std::sync::Barrier::new(65));
    let done = Arc::new(std::sync::Barrier::new(65));
    let clients: Vec<JoinHandle<()>> = (0..64)
        .map(|number| {
            let (all_open, done) = (Arc::clone(&all_open), Arc::clone(&done));
            thread::spawn(move || {
                let answered =
                    |client: &mut Client| client.get("/healthz").is_ok_and(|answer| answer.status == 200);
                let mut client = connect(port);
                // The connection that asked whether the agent listens may still be among them.
                while !answered(&mut client) {
                    client = connect(port);
                }
                all_open.wait();
                for n in 0..10 {
                    let body = format!(r#"{{"topic":"c/{number}","qos":1,"text":"{n}"}}"#);
                    assert_eq!(client.publish(&body).unwrap().status, 200);
                }
                done.wait();
            })
        })
        .collect();
    all_open.wait();
    let refused = connect(port).hear(false).unwrap();
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{refused:?}");
    assert!(reason(&refused).contains("64 connections"), "{refused:?}");
    done.wait();
    for client in clients {
        client.join().unwrap();
    }
    let status = agent.status();
    assert_eq!(status.counters["messages_accepted"], 640);
    assert!(status.counters["http_connections_refused"] >= 1);
}

#[test]
fn what_cannot_wait_is_told_to_come_again() {
    let port = free_port();
    let config = with_http(NO_BROKER, port)
        .with("http", "max_waiting = 5")
        .with("http", "max_body = \"1MiB\"")
        .with("store", "commit_interval = { bulk = \"3s\" }");
    let (agent, mut client) = start(&config, port);
    let bulk = r#"{"topic":"a","lane":"bulk","text":""}"#;
    let publish = move || connect(port).publish(bulk).unwrap().status;
    let waiting: Vec<_> = (0..5).map(|_| thread::spawn(publish)).collect();
    // Once all five wait for their commit, the sixth is refused before anybody looks at it.
    let mut busy = None;
    assert!(wait_until(PATIENCE, || {
        busy = client.publish("nonsense").ok().filter(|answer| answer.status == 429);
        busy.is_some()
    }));
    let busy = busy.unwrap();
    assert_eq!(busy.header("retry-after"), Some("1"), "{busy:?}");
    assert!(reason(&busy).contains("5 requests are waiting"), "{busy:?}");
    assert_eq!(client.get("/healthz").unwrap().status, 200, "questions are answered all the same");
    for waiting in waiting {
        assert_eq!(waiting.join().unwrap(), 200);
    }
    // Four bodies of 1 MiB are all that is held; they are announced and do not come.
    let mut held: Vec<Client> = (0..4).map(|_| connect(port)).collect();
    for client in &mut held {
        client
            .send(request("POST", "/publish", &[JSON, ("content-length", "1048576")], "{").as_bytes())
            .unwrap();
    }
    let too_many_bytes = wait_until(PATIENCE, || {
        let answer = connect(port).publish(r#"{"topic":"a","text":""}"#).unwrap();
        answer.status == 429 && reason(&answer).contains("bytes")
    });
    assert!(too_many_bytes);
    drop(held);
    let free_again = wait_until(PATIENCE, || publish() == 200);
    assert!(free_again, "what has gone holds nothing");
    assert!(agent.status().counters["http_busy"] >= 2);
}

#[test]
fn what_was_accepted_at_a_stop_is_still_answered() {
    let port = free_port();
    let config = with_http(NO_BROKER, port).with("store", "commit_interval = { bulk = \"500ms\" }");
    let (mut agent, mut idle) = start(&config, port);
    let mut asking = connect(port);
    let headers = [JSON];
    asking
        .send(request("POST", "/publish", &headers, r#"{"topic":"a","lane":"bulk","text":""}"#).as_bytes())
        .unwrap();
    // It is taken in, and waits for its commit.
    for _ in 0..3 {
        assert_eq!(idle.get("/healthz").unwrap().status, 200);
    }
    agent.signal(Signal::TERM);
    let answer = asking.hear(false).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(asking.is_closed() && idle.is_closed(), "an idle connection too");
    assert!(agent.wait(PATIENCE).success());
    agent.start_again();
    assert_eq!(queued(&agent.status()), 1);
}

// ---- exactly once ----------------------------------------------------------------------------------------

/// Message number `n` as the body of a request.
fn body(n: u64, qos: u8) -> String {
    let Question::Publish(publish) = numbered(n, qos) else { panic!("a message") };
    serde_json::to_string(&publish).unwrap()
}

/// How many messages go through the kills: 1000, or FIELDPOST_HTTP_MESSAGES.
fn messages() -> u64 {
    let asked = std::env::var("FIELDPOST_HTTP_MESSAGES").ok();
    asked.map_or(1_000, |number| number.parse().expect("FIELDPOST_HTTP_MESSAGES is a number"))
}

/// Publishes numbers below `end` at QoS 2, whichever is next, on one connection until that breaks, then on another.
/// What was under way then is unknown, and not sent again.
fn produce(port: u16, next: &AtomicU64, end: u64, accepted: &AtomicU64) -> Produced {
    let mut produced = Produced::default();
    let mut client = connect(port);
    loop {
        let n = next.fetch_add(1, Relaxed);
        if n >= end {
            return produced;
        }
        match client.publish(&body(n, 2)) {
            Ok(answer) if answer.status == 200 => {
                produced.accepted.insert(n);
                accepted.fetch_add(1, Relaxed);
            }
            Ok(answer) => panic!("message {n} was answered {answer:?}"),
            Err(_) => {
                produced.unknown.insert(n);
                client = connect(port);
            }
        }
    }
}

#[test]
fn every_200_is_delivered_exactly_once_through_kills() {
    const CONNECTIONS: usize = 8;
    const KILLS: u64 = 3;
    let messages = messages();
    let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let port = free_port();
    let (mut agent, client) = start(&with_http(&broker.url(), port), port);
    drop(client);
    let (next, accepted) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let began = Instant::now();
    let producers: Vec<JoinHandle<Produced>> = (0..CONNECTIONS)
        .map(|_| {
            let (next, accepted) = (Arc::clone(&next), Arc::clone(&accepted));
            thread::spawn(move || produce(port, &next, messages, &accepted))
        })
        .collect();
    for kill in 1..=KILLS {
        let so_many = messages * kill / (KILLS + 1);
        assert!(wait_until(3 * PATIENCE, || accepted.load(Relaxed) >= so_many), "{}", agent.tail());
        agent.kill_9();
        agent.start_again();
    }
    let mut all = Produced::default();
    for producer in producers {
        let Produced { accepted, unknown } = producer.join().unwrap();
        all.accepted.extend(accepted);
        all.unknown.extend(unknown);
    }
    let accepted_in = began.elapsed().as_secs_f64();
    agent.expect_drained(3 * PATIENCE);
    let drained_in = began.elapsed().as_secs_f64();
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&all, &broker.received());
    println!(
        "messages={messages} kills={KILLS} connections={CONNECTIONS} unknown={} {outcome} accepted in {accepted_in:.1} s, \
         delivered in {drained_in:.1} s",
        all.unknown.len()
    );
    // Several connections at once have no order among them.
    let Outcome { lost, duplicates, strange, details, .. } = &outcome;
    assert_eq!((*lost, *duplicates, *strange), (0, 0, 0), "{outcome} {details:?}");
    assert_eq!(all.accepted.len() + all.unknown.len(), messages as usize);
    assert!(!all.unknown.is_empty(), "no kill met a request under way");
}

/// The negative control of the test above: what is 202 only, and what is sent twice, is found.
#[test]
fn what_is_only_handed_over_is_missed_and_what_is_sent_twice_is_found() {
    let mut broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let port = free_port();
    broker.stop();
    let (mut agent, mut client) = start(&with_http(&broker.url(), port), port);
    for n in 0..10 {
        assert_eq!(client.publish(&body(n, 0)).unwrap().status, 202);
    }
    for n in 10..20 {
        assert_eq!(client.publish(&body(n, 2)).unwrap().status, 200);
    }
    assert_eq!(client.publish(&body(15, 2)).unwrap().status, 200);
    broker.start_again();
    agent.expect_drained(PATIENCE);
    assert!(agent.terminate().success());
    let produced = Produced { accepted: (0..20).collect(), unknown: BTreeSet::new() };
    let outcome = Outcome::logged(&produced, &broker.received());
    assert_eq!((outcome.lost, outcome.duplicates), (10, 1), "{outcome} {:?}", outcome.details);
}
