//! The real agent against brokers that are broken or hostile, a faulty network peer being one of them.
//!
//! Each row is one misbehaviour, on both protocol versions where it makes sense. All rows of a test run against
//! one agent, one after the other: it closes and tries again, and when the broker behaves, everything accepted
//! arrives. Between rows nothing is left over, so a row that loses a message is known by its name.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use fieldpost::control::client;
use fieldpost::control::wire::{LinkState, Question, Status};
use std::time::Duration;
use support::agent::{Agent, Config, publish};
use support::broker::{Broker, BrokerServer, ConnectScript, Kind, Script, Tally, Version, Way};
use support::wait_until;
use tokio::runtime::Runtime;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// What the agent may hold of memory, in a build without optimization.
const MEMORY_KIB: u64 = 64 * 1024;
/// The agent's client identifier.
const CLIENT: &str = "g1";

const BOTH: [Version; 2] = [Version::V5, Version::V311];

fn name(version: Version) -> &'static str {
    match version {
        Version::V5 => "5",
        Version::V311 => "3.1.1",
    }
}

/// What a broker that did as it was told owes the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owed {
    /// Nothing lost; at QoS 2 nothing doubled.
    ExactlyOnce,
    /// Nothing lost; the broker itself broke its word about what it holds.
    AtLeastOnce,
}

/// A model broker and an agent that publishes to it.
struct Bench {
    _runtime: Runtime,
    broker: BrokerServer,
    agent: Agent,
    pid: Option<u32>,
    sent: u64,
}

impl Bench {
    fn config(broker: &BrokerServer, version: Version) -> Config {
        // Debug lines, because what repeats is said once only.
        let config = Config::new(&broker.url()).protocol(name(version)).with("log", "level = \"debug\"");
        ["connect_timeout = \"1s\"", "ack_timeout = \"1s\"", "keep_alive = \"5s\""]
            .into_iter()
            .fold(config, |config, line| config.with("broker", line))
    }

    fn new(version: Version) -> Bench {
        let runtime = Runtime::new().unwrap();
        let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
        let agent = Agent::start(&Bench::config(&broker, version));
        let pid = agent.pid();
        let bench = Bench { _runtime: runtime, broker, agent, pid, sent: 0 };
        bench.expect_connected();
        bench
    }

    fn expect_connected(&self) {
        self.agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    }

    /// Hands over a few more messages at QoS 1 and 2.
    fn publish(&mut self, count: u64) {
        let payload = |n: u64, qos: u8| format!("{n} at {qos}");
        let numbers = self.sent..self.sent + count;
        let message =
            |(n, qos): (u64, u8)| Question::Publish(publish(&format!("t/{qos}"), qos, &payload(n, qos)));
        self.agent.accept_all(numbers.flat_map(|n| [(n, 1), (n, 2)]).map(message));
        self.sent += count;
    }

    fn connects(&self) -> usize {
        self.broker.with_blocking(|broker| broker.connects().len())
    }

    fn tally(&self, qos: u8) -> Tally {
        let sent = self.sent;
        self.broker.with_blocking(move |broker| {
            let expected: Vec<String> = (0..sent).map(|n| format!("{n} at {qos}")).collect();
            broker.log.tally(&format!("t/{qos}"), expected.iter().map(String::as_bytes))
        })
    }

    /// The broker follows the specification again, and everything arrives.
    fn settle(&mut self, what: &str, owed: Owed) {
        self.broker.with_blocking(|broker| broker.script = Script::default());
        self.publish(1);
        let arrived = wait_until(PATIENCE, || self.tally(1).lost == 0 && self.tally(2).lost == 0);
        let tallies = [self.tally(1), self.tally(2)];
        assert!(arrived, "{what}: {tallies:?}\n{}", self.agent.tail());
        assert!(tallies.iter().all(|tally| tally.strange == 0), "{what}: {tallies:?}");
        if owed == Owed::ExactlyOnce {
            assert_eq!(tallies[1].duplicated, 0, "{what}: {tallies:?}\n{}", self.agent.tail());
        }
        self.agent.expect_drained(PATIENCE);
        assert!(self.agent.is_running(), "{what}: the agent has ended\n{}", self.agent.tail());
        assert_eq!(self.agent.pid(), self.pid, "{what}");
        let kib = self.agent.resident_kib();
        assert!(kib < MEMORY_KIB, "{what}: the agent holds {kib} KiB");
        // The next row starts from what arrived.
        self.broker.with_blocking(|broker| broker.log.clear());
        self.sent = 0;
    }
}

/// What a broker sends that no broker may send.
struct Broken {
    what: &'static str,
    bytes: Vec<u8>,
    /// What the log says of it; empty where any reason will do.
    says: &'static str,
}

/// Sends the bytes while messages are on their way, and expects the connection to be closed and tried again.
fn check_bytes(bench: &mut Bench, row: &Broken) {
    bench.expect_connected();
    let before = (bench.connects(), bench.agent.log().len());
    bench.broker.with_blocking(|broker| {
        broker.script.withhold = [Kind::Puback, Kind::Pubrec].into();
    });
    bench.publish(3);
    let bytes = row.bytes.clone();
    let sent = bench.broker.with_blocking(move |broker| {
        broker.script = Script::default();
        broker.send_raw(CLIENT, &bytes)
    });
    assert!(sent, "{}: the agent was not connected", row.what);
    let again = wait_until(PATIENCE, || bench.connects() > before.0);
    assert!(again, "{}: the connection was not closed\n{}", row.what, bench.agent.tail());
    let log = bench.agent.log();
    let since = log.get(before.1..).unwrap_or_default();
    assert!(since.contains(row.says), "{}: not logged: {:?}\n{since}", row.what, row.says);
    bench.settle(row.what, Owed::ExactlyOnce);
}

fn remaining(mut packet: Vec<u8>, rest: &[u8]) -> Vec<u8> {
    packet.push(u8::try_from(rest.len()).unwrap());
    packet.extend_from_slice(rest);
    packet
}

/// A PUBLISH as written here, with an empty property list on MQTT 5.
fn raw_publish(version: Version, flags: u8, topic: &[u8], id: Option<u16>, payload: &[u8]) -> Vec<u8> {
    let mut rest = u16::try_from(topic.len()).unwrap().to_be_bytes().to_vec();
    rest.extend_from_slice(topic);
    rest.extend(id.into_iter().flat_map(u16::to_be_bytes));
    if version == Version::V5 {
        rest.push(0);
    }
    rest.extend_from_slice(payload);
    remaining(vec![0x30 | flags], &rest)
}

fn check_malformed(version: Version) {
    let mut bench = Bench::new(version);
    let own_properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    let connack = remaining(vec![0x20], &[&[0, 0], own_properties].concat());
    let subscribe = remaining(vec![0x82], &[&[0, 9], own_properties, &[0, 1, b'a', 0]].concat());
    let http = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec();
    let noise: Vec<u8> =
        (0..200_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8 | 0x80).collect();
    let rows = [
        ("packet type 0", vec![0x00, 0x00], ""),
        ("AUTH, never asked for", vec![0xF0, 0x00], ""),
        ("PINGREQ", vec![0xC0, 0x00], ""),
        ("CONNECT", remaining(vec![0x10], &[0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 60, 0, 0]), ""),
        ("SUBSCRIBE", subscribe, ""),
        ("a second CONNACK", connack, "CONNACK"),
        ("PUBACK with reserved flags", remaining(vec![0x41], &[0, 1]), ""),
        ("PUBREL without its flags", remaining(vec![0x60], &[0, 1]), ""),
        ("PINGRESP with flags", vec![0xD1, 0x00], ""),
        ("PINGRESP with content", vec![0xD0, 0x01, 0x00], ""),
        ("PUBACK of one byte", remaining(vec![0x40], &[1]), ""),
        ("PUBACK for id 0", remaining(vec![0x40], &[0, 0]), ""),
        ("PUBREC of no bytes", vec![0x50, 0x00], ""),
        ("SUBACK of no bytes", vec![0x90, 0x00], ""),
        ("PUBLISH at QoS 3", raw_publish(version, 0x06, b"a", Some(1), b"x"), ""),
        ("PUBLISH with DUP at QoS 0", raw_publish(version, 0x08, b"a", None, b"x"), ""),
        ("PUBLISH with id 0", raw_publish(version, 0x02, b"a", Some(0), b"x"), ""),
        ("PUBLISH without a topic", raw_publish(version, 0, b"", None, b"x"), ""),
        ("PUBLISH to a/+", raw_publish(version, 0, b"a/+", None, b"x"), ""),
        ("PUBLISH to #", raw_publish(version, 0x02, b"#", Some(3), b"x"), ""),
        ("PUBLISH to a topic with NUL", raw_publish(version, 0, b"a\0b", None, b"x"), ""),
        ("PUBLISH to a topic not UTF-8", raw_publish(version, 0, b"a\xff\xfeb", None, b"x"), ""),
        ("PUBLISH with a surrogate", raw_publish(version, 0, b"a\xed\xa0\x80", None, b"x"), ""),
        ("PUBLISH with a topic longer than itself", vec![0x30, 0x04, 0xFF, 0xFF, b'a', b'b'], ""),
        ("PUBLISH of no bytes", vec![0x30, 0x00], ""),
        ("a length of five bytes", vec![0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x01], ""),
        ("an acknowledgement of 256 MB", vec![0x40, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1], ""),
        ("a PUBLISH of 256 MB that never comes", vec![0x30, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1, b'a'], ""),
        ("half a packet, then nothing", vec![0x40, 0x02, 0x00], ""),
        ("another protocol", http, ""),
        ("noise", noise, ""),
    ];
    for (what, bytes, says) in rows {
        check_bytes(&mut bench, &Broken { what, bytes, says });
    }
    assert!(bench.agent.status().counters["protocol_errors"] >= 15);
}

#[test]
fn malformed_packets_close_the_connection_and_lose_nothing_on_5() {
    check_malformed(Version::V5);
}

#[test]
fn malformed_packets_close_the_connection_and_lose_nothing_on_311() {
    check_malformed(Version::V311);
}

/// What the broker does to messages on their way.
struct Wrong {
    what: &'static str,
    /// Before the messages are handed over.
    before: fn(&mut Broker),
    /// When they have reached the broker.
    then: fn(&mut Broker),
    owed: Owed,
}

/// Packet ids of QoS 1 and 2 PUBLISHes on the connection that stands.
fn sent_ids(broker: &Broker) -> Vec<u16> {
    let Some(conn) = broker.connection_of(CLIENT) else { return Vec::new() };
    let publishes = broker.packets(conn).iter().filter(|p| p.way == Way::In && p.kind == Kind::Publish);
    publishes.map(|publish| publish.id).filter(|id| *id > 0).collect()
}

/// Acknowledges what was sent with a packet of this first byte.
fn acknowledge(broker: &mut Broker, first: u8, ids: impl IntoIterator<Item = u16>) {
    for id in ids {
        let [high, low] = id.to_be_bytes();
        broker.send_raw(CLIENT, &[first, 2, high, low]);
    }
}

fn withhold_all(broker: &mut Broker) {
    broker.script.withhold = [Kind::Puback, Kind::Pubrec, Kind::Pubcomp].into();
}

fn held(broker: &Broker) -> Vec<u16> {
    broker.session(CLIENT).map(|session| session.held.keys().copied().collect()).unwrap_or_default()
}

fn nothing(_: &mut Broker) {}

fn check_acknowledgements(version: Version) {
    let mut bench = Bench::new(version);
    let unknown = |broker: &mut Broker| {
        for first in [0x40, 0x50, 0x62, 0x70] {
            acknowledge(broker, first, [1, 500, 30_000, 65_535]);
        }
        // SUBACK and UNSUBACK for what was never asked.
        broker.send_raw(CLIENT, &[0xB0, 2, 0x77, 0x77]);
    };
    let rows = [
        Wrong { what: "none at all", before: withhold_all, then: nothing, owed: Owed::ExactlyOnce },
        Wrong { what: "unknown ids", before: withhold_all, then: unknown, owed: Owed::ExactlyOnce },
        Wrong {
            what: "PUBACK for QoS 2",
            before: withhold_all,
            then: |broker| acknowledge(broker, 0x40, held(broker)),
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "PUBREC for QoS 1",
            before: withhold_all,
            then: |broker| {
                let held = held(broker);
                let ids = sent_ids(broker).into_iter().filter(|id| !held.contains(id)).collect::<Vec<_>>();
                acknowledge(broker, 0x50, ids);
            },
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "PUBCOMP for QoS 1",
            before: withhold_all,
            then: |broker| {
                let held = held(broker);
                let ids = sent_ids(broker).into_iter().filter(|id| !held.contains(id)).collect::<Vec<_>>();
                acknowledge(broker, 0x70, ids);
            },
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "PUBCOMP before PUBREL",
            before: withhold_all,
            then: |broker| acknowledge(broker, 0x70, held(broker)),
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "PUBREL for what we sent",
            before: withhold_all,
            then: |broker| acknowledge(broker, 0x62, held(broker)),
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "every one twice",
            before: |broker| {
                broker.script.double = [Kind::Puback, Kind::Pubrec, Kind::Pubcomp, Kind::Suback].into();
            },
            then: nothing,
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "never a PUBCOMP",
            before: |broker| broker.script.withhold = [Kind::Pubcomp].into(),
            then: nothing,
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "no SUBACK after a cut",
            before: |broker| {
                broker.script.withhold = [Kind::Suback].into();
                broker.cut_all();
            },
            then: nothing,
            owed: Owed::ExactlyOnce,
        },
        Wrong {
            what: "the session is gone after every PUBREC",
            before: |broker| broker.script.withhold = [Kind::Pubcomp].into(),
            then: |broker| {
                broker.forget_session(CLIENT);
                broker.cut_all();
            },
            owed: Owed::AtLeastOnce,
        },
    ];
    for row in rows {
        bench.expect_connected();
        let before = row.before;
        let connects = bench.connects();
        bench.broker.with_blocking(before);
        bench.publish(5);
        // Twice on 5, since what is wrong once may be right for what is sent again.
        let rounds = if version == Version::V5 { 2 } else { 1 };
        for round in 1..=rounds {
            let then = row.then;
            wait_until(Duration::from_millis(500), || bench.broker.with_blocking(|b| held(b).len() >= 5));
            bench.broker.with_blocking(then);
            if row.what == "every one twice" {
                break;
            }
            let again = wait_until(PATIENCE, || bench.connects() >= connects + round);
            assert!(again, "{}: no new connection\n{}", row.what, bench.agent.tail());
        }
        bench.settle(row.what, row.owed);
    }
}

#[test]
fn wrong_acknowledgements_delete_nothing_early_on_5() {
    check_acknowledgements(Version::V5);
}

#[test]
fn wrong_acknowledgements_delete_nothing_early_on_311() {
    check_acknowledgements(Version::V311);
}

/// What the broker answers to CONNECT, and what is said of it.
fn check_connect(bench: &mut Bench, what: &str, script: ConnectScript, says: &str, owed: Owed) {
    bench.expect_connected();
    let (connects, log) = (bench.connects(), bench.agent.log().len());
    bench.broker.with_blocking(move |broker| {
        withhold_all(broker);
        broker.script.every_connect = script;
    });
    bench.publish(3);
    bench.broker.with_blocking(Broker::cut_all);
    let again = wait_until(PATIENCE, || bench.connects() >= connects + 2);
    assert!(again, "{what}: not tried again\n{}", bench.agent.tail());
    // Publishing goes on meanwhile.
    bench.publish(1);
    if !says.is_empty() {
        let shown =
            |status: &Status| status.link.last_error.as_ref().is_some_and(|error| error.contains(says));
        let status = bench.agent.expect(PATIENCE, what, shown);
        assert_ne!(status.link.state, LinkState::Connected, "{what}");
        let log = bench.agent.log().split_off(log);
        assert!(log.contains(says), "{what}: not logged: {says:?}\n{log}");
    }
    bench.settle(what, owed);
}

fn refused(code: u8) -> ConnectScript {
    ConnectScript { refuse: Some(code), ..ConnectScript::default() }
}

#[test]
fn a_refused_connect_is_named_with_what_to_check_on_5() {
    let mut bench = Bench::new(Version::V5);
    for (code, says) in [
        (0x80, "Unspecified error (0x80)"),
        (0x84, "Unsupported Protocol Version; set [broker] protocol to the other one (0x84)"),
        (0x85, "check [broker] client_id (0x85)"),
        (0x86, "Bad User Name or Password; check [broker] username and password_file (0x86)"),
        (0x87, "Not authorized"),
        (0x88, "Server unavailable (0x88)"),
        (0x89, "Server busy (0x89)"),
        (0x8A, "Banned"),
        (0x8C, "Bad authentication method (0x8C)"),
        (0x95, "Packet too large (0x95)"),
        (0x97, "Quota exceeded (0x97)"),
        (0x9A, "Retain not supported; set [broker] retain = false (0x9A)"),
        (0x9C, "Use another server (0x9C)"),
        (0x9F, "Connection rate exceeded (0x9F)"),
    ] {
        check_connect(&mut bench, says, refused(code), says, Owed::ExactlyOnce);
    }
}

#[test]
fn a_refused_connect_is_named_with_what_to_check_on_311() {
    let mut bench = Bench::new(Version::V311);
    for (code, says) in [
        (1, "Unsupported Protocol Version; set [broker] protocol to the other one"),
        (2, "check [broker] client_id"),
        (3, "Server unavailable"),
        (4, "Bad User Name or Password; check [broker] username and password_file"),
        (5, "Not authorized"),
    ] {
        check_connect(&mut bench, says, refused(code), says, Owed::ExactlyOnce);
    }
}

fn check_strange_connack(version: Version) {
    let mut bench = Bench::new(version);
    let script = ConnectScript::default;
    let silent = ConnectScript { mute: true, ..script() };
    check_connect(&mut bench, "never CONNACK", silent, "no CONNACK within 1 s", Owed::ExactlyOnce);
    let closed = ConnectScript { close: true, ..script() };
    check_connect(&mut bench, "closed", closed, "closed the connection", Owed::ExactlyOnce);
    let greeting =
        ConnectScript { before: b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), close: true, ..script() };
    check_connect(&mut bench, "another protocol", greeting, "protocol", Owed::ExactlyOnce);
    let early = ConnectScript { before: vec![0xD0, 0x00], close: true, ..script() };
    check_connect(&mut bench, "PINGRESP first", early, "before CONNACK", Owed::ExactlyOnce);
    let unknown = refused(if version == Version::V5 { 0x42 } else { 77 });
    check_connect(&mut bench, "an unknown code", unknown, "the broker", Owed::ExactlyOnce);
    let broken = ConnectScript { after: vec![0x00, 0x00], ..script() };
    check_connect(&mut bench, "nonsense after CONNACK", broken, "", Owed::ExactlyOnce);
}

#[test]
fn a_strange_answer_to_connect_is_tried_again_on_5() {
    check_strange_connack(Version::V5);
}

#[test]
fn a_strange_answer_to_connect_is_tried_again_on_311() {
    check_strange_connack(Version::V311);
}

#[test]
fn a_lie_about_session_present_loses_nothing() {
    for version in BOTH {
        let mut bench = Bench::new(version);
        let script = ConnectScript::default;
        let new = ConnectScript { forget_session: true, session_present: Some(true), ..script() };
        check_connect(&mut bench, "present, but new", new, "", Owed::AtLeastOnce);
        let kept = ConnectScript { session_present: Some(false), ..script() };
        check_connect(&mut bench, "not present, but kept", kept, "", Owed::AtLeastOnce);
    }
}

/// Two gateways whose configuration was copied: the same client id, and two names.
fn check_twins(version: Version, says: &str) {
    let mut bench = Bench::new(version);
    let twin = Bench::config(&bench.broker, version).with("broker", "client_id = \"g1\"");
    let twin = Agent::start(&twin.with("gateway", "id = \"g2\"").with("broker", "backoff_max = \"4s\""));
    bench.publish(3);
    let named = |status: &Status| status.link.last_error.as_ref().is_some_and(|error| error.contains(says));
    let status = twin.expect(PATIENCE, "named", named);
    // The longest back-off is 4 s, a takeover waits for at least half of it, and some of it has passed.
    let long = |status: &Status| status.link.retry_in_ms.is_some_and(|ms| ms > 1_000);
    assert!(status.link.state == LinkState::Connecting || long(&status), "{:?}", status.link);
    bench.agent.expect(PATIENCE, "named", named);
    drop(twin);
    bench.settle("twins", Owed::AtLeastOnce);
}

#[test]
fn two_agents_with_one_client_id_are_named_and_wait_on_5() {
    check_twins(Version::V5, "another client uses the same client identifier (0x8E");
}

#[test]
fn two_agents_with_one_client_id_are_named_and_wait_on_311() {
    check_twins(Version::V311, "probably another client uses the client id");
}

#[test]
fn a_broker_that_reads_nothing_costs_no_memory() {
    let mut bench = Bench::new(Version::V5);
    let proxy = Runtime::new().unwrap();
    // Connects through a socket that passes on a CONNACK and everything after it, and then reads no more.
    let listener = support::listen().unwrap();
    let url = format!("mqtt://{}", listener.local_addr().unwrap());
    let _deaf = proxy.spawn(deaf(listener, bench.broker.address()));
    bench.agent.terminate();
    let config = Bench::config(&bench.broker, Version::V5).with("broker", &format!("url = \"{url}\""));
    bench
        .agent
        .configure(&config.with("broker", "ack_timeout = \"60s\"").with("broker", "keep_alive = \"60s\""));
    bench.agent.start_again();
    bench.expect_connected();
    let before = bench.agent.resident_kib();
    let payload = "x".repeat(100_000);
    for (qos, count) in [(0, 1_500), (1, 100)] {
        let (mut asker, mut answers) = client::connect(&bench.agent.socket()).unwrap();
        for _ in 0..count / 10 {
            for _ in 0..10 {
                asker.ask(&Question::Publish(publish("big", qos, &payload))).unwrap();
            }
            asker.flush().unwrap();
            // At QoS 0 it may say that the link is busy.
            (0..10).for_each(|_| drop(answers.hear().unwrap()));
        }
        let kib = bench.agent.resident_kib();
        assert!(kib < MEMORY_KIB, "QoS {qos}: the agent holds {kib} KiB, at first {before} KiB");
    }
}

/// Passes everything to the client, and the client's first 4 KiB to the broker.
async fn deaf(listener: std::net::TcpListener, broker: std::net::SocketAddr) {
    use tokio::io::{AsyncReadExt, copy};
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (client, _) = listener.accept().await.unwrap();
        let server = tokio::net::TcpStream::connect(broker).await.unwrap();
        tokio::spawn(async move {
            let (from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            let mut first = from_client.take(4096);
            let up = async {
                let _ = copy(&mut first, &mut to_server).await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = up => {}
                _ = copy(&mut from_server, &mut to_client) => {}
            }
        });
    }
}
