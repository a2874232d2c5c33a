//! The model broker itself, byte by byte in both protocol versions, and its proxy and mosquitto harness; then
//! the model broker against clients that are not ours.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;
use support::broker::packet::Request;
use support::broker::session::Session;
use support::broker::{
    Broker, BrokerServer, ConnId, ConnectScript, Cut, CutAt, CutWhen, Kind, Limits, Memory, Message, Onward,
    Output, Refusal, Tally, Times, Version, Way, topic,
};
use support::mosquitto::{self, LogCount, Mosquitto, Subscriber};
use support::proxy::{CutPlan, Proxy};
use support::wait_until;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const BOTH: [Version; 2] = [Version::V311, Version::V5];
const PATIENCE: Duration = Duration::from_secs(20);

// Packets, written out here so that the broker's codec is not checked against itself.

fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    let mut length = body.len();
    while length > 127 {
        out.push((length % 128) as u8 + 128);
        length /= 128;
    }
    out.push(length as u8);
    out.extend_from_slice(body);
    out
}

fn text(text: &str) -> Vec<u8> {
    let mut out = vec![(text.len() >> 8) as u8, text.len() as u8];
    out.extend_from_slice(text.as_bytes());
    out
}

/// CONNECT with flags and what follows the client id; a 5.0 session never expires.
fn connect_with(version: Version, id: &str, flags: u8, keep_alive: u8, rest: &[u8]) -> Vec<u8> {
    let mut body = text("MQTT");
    body.extend_from_slice(&[if version == Version::V5 { 5 } else { 4 }, flags, 0, keep_alive]);
    if version == Version::V5 {
        body.extend_from_slice(&[5, 0x11, 0xff, 0xff, 0xff, 0xff]);
    }
    body.extend(text(id));
    body.extend_from_slice(rest);
    packet(0x10, &body)
}

fn connect(version: Version, id: &str, clean: bool) -> Vec<u8> {
    connect_with(version, id, u8::from(clean) << 1, 0, &[])
}

fn connect_with_will(version: Version, id: &str, will: (&str, &str), retain: bool, delay_s: u8) -> Vec<u8> {
    let mut rest = Vec::new();
    if version == Version::V5 {
        rest.extend_from_slice(&[5, 0x18, 0, 0, 0, delay_s]);
    }
    rest.extend(text(will.0));
    rest.extend(text(will.1));
    connect_with(version, id, 0x04 | 0x08 | u8::from(retain) << 5, 0, &rest)
}

/// PUBLISH; `first` holds type and flags.
fn publish(version: Version, first: u8, id: u16, name: &str, payload: &str) -> Vec<u8> {
    let mut body = text(name);
    if first & 6 != 0 {
        body.extend_from_slice(&id.to_be_bytes());
    }
    if version == Version::V5 {
        body.push(0);
    }
    body.extend_from_slice(payload.as_bytes());
    packet(first, &body)
}

fn ack(first: u8, id: u8) -> Vec<u8> {
    vec![first, 2, 0, id]
}

fn subscribe(version: Version, filter: &str, qos: u8) -> Vec<u8> {
    let mut body = vec![0, 1];
    if version == Version::V5 {
        body.push(0);
    }
    body.extend(text(filter));
    body.push(qos);
    packet(0x82, &body)
}

const QOS0: u8 = 0x30;
const QOS1: u8 = 0x32;
const QOS2: u8 = 0x34;
const DUP: u8 = 0x08;
const RETAIN: u8 = 0x01;
const PUBACK: u8 = 0x40;
const PUBREC: u8 = 0x50;
const PUBREL: u8 = 0x62;
const PUBCOMP: u8 = 0x70;
const DISCONNECT: [u8; 2] = [0xe0, 0];
/// No bytes.
const NOTHING: [u8; 0] = [];

/// A broker, a clock, and what came out of it.
struct Bench {
    broker: Broker,
    now_ms: u64,
    out: BTreeMap<ConnId, Vec<u8>>,
    closed: Vec<ConnId>,
}

impl Bench {
    fn new(broker: Broker) -> Bench {
        Bench { broker, now_ms: 0, out: BTreeMap::new(), closed: Vec::new() }
    }

    fn collect(&mut self) {
        for output in self.broker.take_output() {
            match output {
                Output::Send(conn, bytes) => self.out.entry(conn).or_default().extend(bytes),
                Output::Close(conn) => self.closed.push(conn),
            }
        }
    }

    fn open(&mut self) -> ConnId {
        self.broker.connect(self.now_ms)
    }

    /// Sends, and gives everything that came for this connection since.
    fn say(&mut self, conn: ConnId, bytes: &[u8]) -> Vec<u8> {
        self.broker.input(conn, bytes, self.now_ms);
        self.take(conn)
    }

    fn take(&mut self, conn: ConnId) -> Vec<u8> {
        self.collect();
        self.out.remove(&conn).unwrap_or_default()
    }

    /// A connection with CONNECT accepted.
    fn client(&mut self, version: Version, id: &str, clean: bool) -> ConnId {
        let conn = self.open();
        let answer = self.say(conn, &connect(version, id, clean));
        assert_eq!(answer.first(), Some(&0x20), "CONNACK");
        assert_eq!(answer[CONNACK_CODE], 0, "accepted");
        conn
    }

    /// The same, with a subscription to everything at QoS 2.
    fn subscriber(&mut self, version: Version, id: &str) -> ConnId {
        let conn = self.client(version, id, true);
        self.say(conn, &subscribe(version, "#", 2));
        conn
    }

    fn lose(&mut self, conn: ConnId) {
        self.broker.closed(conn, self.now_ms);
        self.collect();
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.broker.tick(self.now_ms);
        self.collect();
    }

    fn payloads(&self) -> Vec<String> {
        self.broker.received().iter().map(|r| String::from_utf8_lossy(&r.payload).into_owned()).collect()
    }

    #[track_caller]
    fn no_violations(&self) {
        assert_eq!(self.broker.violations(), Vec::<String>::new());
    }

    #[track_caller]
    fn one_violation(&self, containing: &str) {
        let violations = self.broker.violations();
        assert!(
            violations.len() == 1 && violations[0].contains(containing),
            "{violations:?}, not {containing:?}"
        );
    }
}

/// Where CONNACK's code stands, the remaining length being one byte.
const CONNACK_CODE: usize = 3;

fn text_of(delivered: &[support::broker::log::Delivered]) -> Vec<(String, u8, bool, bool)> {
    let payload = |d: &support::broker::log::Delivered| String::from_utf8_lossy(&d.payload).into_owned();
    delivered.iter().map(|d| (payload(d), d.qos, d.retain, d.dup)).collect()
}

#[test]
fn each_qos_is_answered_as_the_clause_says() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", true);
        assert_eq!(bench.say(conn, &publish(version, QOS0, 0, "a", "0")), NOTHING);
        assert_eq!(bench.say(conn, &publish(version, QOS1, 7, "a", "1")), ack(PUBACK, 7));
        assert_eq!(bench.say(conn, &publish(version, QOS2, 8, "a", "2")), ack(PUBREC, 8));
        assert_eq!(bench.say(conn, &ack(PUBREL, 8)), ack(PUBCOMP, 8));
        assert_eq!(bench.say(conn, &[0xc0, 0]), [0xd0, 0]);
        assert_eq!(bench.payloads(), ["0", "1", "2"]);
        let kinds: Vec<(Way, Kind)> = bench.broker.packets(conn).iter().map(|p| (p.way, p.kind)).collect();
        use Kind::*;
        let (i, o) = (Way::In, Way::Out);
        let expected = [(i, Connect), (o, Connack), (i, Publish), (i, Publish), (o, Puback), (i, Publish)];
        let rest = [(o, Pubrec), (i, Pubrel), (o, Pubcomp), (i, Pingreq), (o, Pingresp)];
        assert_eq!(kinds, [&expected[..], &rest].concat());
        bench.no_violations();
    }
}

#[test]
fn any_split_of_the_bytes_gives_the_same_answer() {
    for version in BOTH {
        let mut bytes = connect(version, "c", true);
        bytes.extend(publish(version, QOS2, 1, "a", &"x".repeat(200)));
        bytes.extend(ack(PUBREL, 1));
        let mut whole = Bench::new(Broker::new());
        let conn = whole.open();
        let expected = whole.say(conn, &bytes);
        for cut in 0..bytes.len() {
            let mut bench = Bench::new(Broker::new());
            let conn = bench.open();
            let mut answer = bench.say(conn, &bytes[..cut]);
            answer.extend(bench.say(conn, &bytes[cut..]));
            assert_eq!(answer, expected, "cut at {cut}");
        }
    }
}

#[test]
fn a_broken_packet_is_written_down_and_closes_the_connection() {
    use Version::{V5, V311};
    let long = packet(0x30, &[0; 300]);
    // Version, packet after CONNECT, words of the violation, 5.0 reason code.
    let rows: Vec<(Version, Vec<u8>, &str, u8)> = vec![
        (V5, connect(V5, "c", true), "second CONNECT", 0x82),
        (V311, connect(V311, "c", true), "second CONNECT", 0),
        (V5, vec![0x00, 0], "type 0", 0x81),
        (V5, vec![0xf0, 0], "AUTH", 0x82),
        (V5, vec![0x20, 2, 0, 0], "from a client", 0x82),
        (V5, vec![0xc1, 0], "flags", 0x81),
        (V311, vec![0x60, 2, 0, 1], "flags", 0),
        (V5, vec![0x80, 5, 0, 1, 0, 0, 1], "flags", 0x81),
        (V5, vec![0xc0, 1, 0], "too many", 0x81),
        (V5, vec![0xc0, 0x80, 0], "more bytes than needed", 0x81),
        (V5, vec![0x30, 0xff, 0xff, 0xff, 0xff], "four bytes", 0x81),
        (V5, publish(V5, 0x36, 1, "a", ""), "QoS 3", 0x81),
        (V5, publish(V5, QOS0 | DUP, 0, "a", ""), "DUP at QoS 0", 0x81),
        (V5, publish(V5, QOS1, 0, "a", ""), "Identifier 0", 0x82),
        (V311, publish(V311, QOS2, 0, "a", ""), "Identifier 0", 0),
        (V5, publish(V5, QOS1, 1, "a/+", ""), "wildcard", 0x90),
        (V311, publish(V311, QOS0, 0, "#", ""), "wildcard", 0),
        (V5, publish(V5, QOS0, 0, "", ""), "empty", 0x90),
        (V311, publish(V311, QOS0, 0, "a\0b", ""), "U+0000", 0),
        (V5, packet(0x30, &[0, 2, 0xc3, 0x28, 0]), "UTF-8", 0x81),
        (V5, packet(0x30, &[0, 9, b'a']), "past the packet's end", 0x81),
        (V5, packet(0x30, &[0, 1, b'a', 3, 0x23, 0, 1]), "above Topic Alias Maximum", 0x94),
        (V5, packet(0x30, &[0, 1, b'a', 5, 0x11, 0, 0, 0, 1]), "not for this packet", 0x82),
        (V5, packet(0x30, &[0, 1, b'a', 4, 1, 0, 1, 0]), "twice", 0x82),
        (V5, packet(0x30, &[0, 1, b'a', 2, 0x7e, 0]), "unknown property", 0x81),
        (V5, vec![0x40, 2, 0, 0], "Identifier 0", 0x82),
        (V5, vec![0x40, 3, 0, 1, 0x77], "0x77", 0x82),
        (V5, vec![0x70, 3, 0, 1, 0x10], "0x10", 0x82),
        (V311, vec![0x40, 3, 0, 1, 0], "too many", 0),
        (V5, packet(0x82, &[0, 1, 0]), "without a Topic Filter", 0x82),
        (V311, packet(0xa2, &[0, 1]), "without a Topic Filter", 0),
        (V5, subscribe(V5, "a/#/b", 0), "not valid", 0x8f),
        (V5, subscribe(V5, "a", 3), "options", 0x81),
        (V311, subscribe(V311, "a", 4), "options", 0),
        (V5, packet(0x82, &[0, 1, 2, 0x0b, 1, 0, 1, b'a', 0]), "Subscription Identifier", 0xa1),
        (V5, vec![0xe0, 1, 0x8e], "not a client's", 0x82),
        (V5, long, "Maximum Packet Size", 0x95),
    ];
    for (version, bytes, words, reason) in rows {
        let mut bench =
            Bench::new(Broker::with_limits(Limits { maximum_packet_size: Some(256), ..Limits::default() }));
        let conn = bench.client(version, "c", true);
        let answer = bench.say(conn, &bytes);
        let expected = if version == V5 { vec![0xe0, 1, reason] } else { Vec::new() };
        assert_eq!(answer, expected, "{bytes:02x?}");
        assert_eq!(bench.closed, [conn], "{bytes:02x?}");
        bench.one_violation(words);
    }
}

#[test]
fn a_broken_connect_is_written_down_and_closes_the_connection() {
    let mut flagged = connect(Version::V5, "c", true);
    flagged[9] |= 1;
    let mut unknown = connect(Version::V5, "c", true);
    unknown[8] = 6;
    let mut named = connect(Version::V311, "c", true);
    named[4] = b'X';
    let qos_without_will = connect_with(Version::V311, "c", 0x08, 0, &[]);
    let password_alone = connect_with(Version::V311, "c", 0x42, 0, &text("secret"));
    let wild = connect_with_will(Version::V5, "c", ("a/#", "x"), false, 0);
    let unacceptable: &[u8] = &[0x20, 2, 0, 1];
    let rows: [(Vec<u8>, &str, &[u8]); 7] = [
        (publish(Version::V5, QOS0, 0, "a", ""), "first packet", &[]),
        (flagged, "reserved Connect Flag", &[]),
        (unknown, "protocol level 6", unacceptable),
        (named, "protocol name", unacceptable),
        (qos_without_will, "without Will Flag", &[]),
        (password_alone, "without a user name", &[]),
        (wild, "Will Topic", &[]),
    ];
    for (bytes, words, answer) in rows {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.open();
        assert_eq!(bench.say(conn, &bytes), answer, "{words}");
        assert_eq!(bench.closed, [conn], "{words}");
        bench.one_violation(words);
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..20_000 {
        let mut bench = Bench::new(Broker::new());
        let version = if random.bool() { Version::V5 } else { Version::V311 };
        let conn = bench.open();
        let mut bytes = connect(version, "c", true);
        bytes.extend(publish(version, QOS2, 1, "a", "b"));
        bytes.extend(subscribe(version, "a/+", 1));
        for _ in 0..random.usize(1..4) {
            let at = random.usize(..bytes.len());
            bytes[at] = random.u8(..);
        }
        bench.say(conn, &bytes);
    }
}

#[test]
fn connack_announces_the_limits() {
    let limits = Limits {
        receive_maximum: Some(3),
        maximum_qos: 1,
        retain_available: false,
        maximum_packet_size: Some(1000),
        server_keep_alive: Some(9),
        session_expiry: Some(60),
        ..Limits::default()
    };
    let mut bench = Bench::new(Broker::with_limits(limits));
    let conn = bench.open();
    let answer = bench.say(conn, &connect(Version::V5, "", true));
    let mut expected = vec![0, 0, 40, 0x29, 0, 0x2a, 0, 0x11, 0, 0, 0, 60, 0x21, 0, 3, 0x24, 1, 0x25, 0];
    expected.extend_from_slice(&[0x27, 0, 0, 3, 232, 0x13, 0, 9, 0x12]);
    expected.extend(text("assigned-1"));
    expected[2] = (expected.len() - 3) as u8;
    assert_eq!(answer, packet(0x20, &expected));
    assert!(bench.broker.connection_of("assigned-1").is_some());
}

#[test]
fn exceeding_a_limit_costs_a_5_0_client_its_connection() {
    let limits =
        Limits { receive_maximum: Some(2), maximum_qos: 1, retain_available: false, ..Limits::default() };
    let rows: [(Vec<Vec<u8>>, u8, &str); 3] = [
        (vec![publish(Version::V5, QOS2, 1, "a", "")], 0x9b, "Maximum QoS"),
        (vec![publish(Version::V5, QOS0 | RETAIN, 0, "a", "")], 0x9a, "Retain Available"),
        ((1..=3).map(|id| publish(Version::V5, QOS1, id, "a", "")).collect(), 0x93, "Receive Maximum"),
    ];
    for (packets, reason, words) in rows {
        let mut bench = Bench::new(Broker::with_limits(limits.clone()));
        bench.broker.script.withhold.insert(Kind::Puback);
        let conn = bench.client(Version::V5, "c", true);
        let answers = packets.iter().map(|p| bench.say(conn, p)).collect::<Vec<_>>().concat();
        assert_eq!(answers, [0xe0, 1, reason]);
        bench.one_violation(words);
    }
}

#[test]
fn receive_maximum_is_free_again_after_puback_and_pubcomp() {
    let mut bench = Bench::new(Broker::with_limits(Limits { receive_maximum: Some(1), ..Limits::default() }));
    let conn = bench.client(Version::V5, "c", true);
    for id in 1..=5 {
        bench.say(conn, &publish(Version::V5, QOS1, 10 + u16::from(id), "a", ""));
        bench.say(conn, &publish(Version::V5, QOS2, u16::from(id), "a", ""));
        bench.say(conn, &ack(PUBREL, id));
    }
    assert_eq!(bench.broker.log.connections[&conn].peak_unfinished, 1);
    bench.no_violations();
}

#[test]
fn a_qos_2_message_is_taken_once_however_often_the_connection_breaks() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let subscriber = bench.subscriber(version, "s");
        for round in 0..3 {
            let conn = bench.client(version, "c", false);
            let first = if round == 0 { QOS2 } else { QOS2 | DUP };
            assert_eq!(bench.say(conn, &publish(version, first, 5, "a", "x")), ack(PUBREC, 5));
            bench.lose(conn);
        }
        assert_eq!(bench.take(subscriber), NOTHING, "handed on at PUBREL");
        assert!(!bench.broker.received()[0].onward);
        for _ in 0..2 {
            let conn = bench.client(version, "c", false);
            bench.say(conn, &ack(PUBREL, 5));
            bench.lose(conn);
        }
        assert_eq!(bench.take(subscriber), publish(version, QOS2, 1, "a", "x"));
        assert_eq!(bench.payloads(), ["x"]);
        assert!(bench.broker.received()[0].onward);
        assert_eq!((bench.broker.log.counters.repeats, bench.broker.log.counters.unknown_pubrels), (2, 1));
        bench.no_violations();
    }
}

#[test]
fn an_unknown_pubrel_is_answered_0x92_on_5_0() {
    let mut bench = Bench::new(Broker::new());
    let (old, new) = (bench.client(Version::V311, "o", true), bench.client(Version::V5, "n", true));
    assert_eq!(bench.say(old, &ack(PUBREL, 9)), ack(PUBCOMP, 9));
    assert_eq!(bench.say(new, &ack(PUBREL, 9)), [PUBCOMP, 3, 0, 9, 0x92]);
}

#[test]
fn method_b_hands_on_at_publish() {
    let mut bench =
        Bench::new(Broker::with_limits(Limits { onward: Onward::AtPublish, ..Limits::default() }));
    let subscriber = bench.subscriber(Version::V311, "s");
    let conn = bench.client(Version::V311, "c", false);
    bench.say(conn, &publish(Version::V311, QOS2, 5, "a", "x"));
    assert_eq!(bench.take(subscriber), publish(Version::V311, QOS2, 1, "a", "x"));
    bench.say(conn, &ack(PUBREL, 5));
    assert_eq!(bench.take(subscriber), NOTHING);
}

#[test]
fn a_clean_start_ends_the_session_and_frees_its_ids() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let first = bench.client(version, "c", false);
        bench.say(first, &publish(version, QOS2, 5, "a", "x"));
        bench.lose(first);
        let clean = bench.client(version, "c", true);
        bench.say(clean, &publish(version, QOS2, 5, "a", "y"));
        assert_eq!(bench.payloads(), ["x", "y"]);
        let answers: Vec<_> = bench.broker.connects().iter().map(|c| (c.clean, c.answer)).collect();
        assert_eq!(answers, [(false, Some((false, 0))), (true, Some((false, 0)))]);
        bench.no_violations();
    }
}

#[test]
fn what_a_client_left_unfinished_is_resent_in_order_with_dup() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", false);
        bench.say(conn, &subscribe(version, "#", 2));
        for (payload, qos) in [("1", 1), ("2", 2), ("3", 2), ("4", 1)] {
            bench.broker.publish(&Message::new("a", payload, qos));
        }
        // 2 is received, 4 is acknowledged.
        bench.say(conn, &ack(PUBREC, 2));
        bench.say(conn, &ack(PUBACK, 4));
        bench.lose(conn);
        bench.broker.publish(&Message::new("a", "5", 1));
        let conn = bench.open();
        let answer = bench.say(conn, &connect(version, "c", false));
        let resent = [
            publish(version, QOS1 | DUP, 1, "a", "1"),
            ack(PUBREL, 2),
            publish(version, QOS2 | DUP, 3, "a", "3"),
            publish(version, QOS1, 5, "a", "5"),
        ];
        assert!(answer.ends_with(&resent.concat()), "{answer:02x?}");
        assert_eq!(bench.broker.connects()[1].answer, Some((true, 0)));
        for bytes in [ack(PUBACK, 1), ack(PUBCOMP, 2), ack(PUBREC, 3), ack(PUBCOMP, 3), ack(PUBACK, 5)] {
            bench.say(conn, &bytes);
        }
        assert_eq!(bench.broker.unfinished("c"), 0);
        bench.no_violations();
    }
}

#[test]
fn the_window_to_a_client_is_its_receive_maximum() {
    let mut bench = Bench::new(Broker::new());
    let conn = bench.open();
    let mut body = text("MQTT");
    body.extend_from_slice(&[5, 2, 0, 0, 3, 0x21, 0, 2]);
    body.extend(text("c"));
    bench.say(conn, &packet(0x10, &body));
    for n in 0..5 {
        bench.broker.deliver("c", Message::new("a", n.to_string(), 1));
    }
    let two = [publish(Version::V5, QOS1, 1, "a", "0"), publish(Version::V5, QOS1, 2, "a", "1")].concat();
    assert_eq!(bench.take(conn), two);
    assert_eq!(bench.say(conn, &ack(PUBACK, 1)), publish(Version::V5, QOS1, 3, "a", "2"));
}

#[test]
fn a_second_connection_of_a_client_id_takes_the_session_over() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let old = bench.client(version, "c", false);
        let new = bench.client(version, "c", false);
        assert_eq!(bench.take(old), if version == Version::V5 { vec![0xe0, 1, 0x8e] } else { vec![] });
        assert_eq!(bench.closed, [old]);
        assert_eq!(bench.broker.connection_of("c"), Some(new));
        assert_eq!(bench.broker.log.counters.takeovers, 1);
    }
}

#[test]
fn the_latest_retained_message_waits_for_subscribers_until_an_empty_one_removes_it() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", true);
        let live = bench.subscriber(version, "live");
        bench.say(conn, &publish(version, QOS1 | RETAIN, 1, "a/b", "old"));
        bench.say(conn, &publish(version, QOS1 | RETAIN, 1, "a/b", "new"));
        assert_eq!(bench.broker.retained("a/b").map(|p| &p[..]), Some(&b"new"[..]));
        let late = bench.client(version, "late", true);
        let answer = bench.say(late, &subscribe(version, "a/#", 0));
        assert!(answer.ends_with(&publish(version, QOS0 | RETAIN, 0, "a/b", "new")), "{answer:02x?}");
        bench.say(conn, &publish(version, QOS1 | RETAIN, 1, "a/b", ""));
        assert!(bench.broker.retained_topics().is_empty());
        let live_got = bench.take(live);
        assert!(live_got.starts_with(&publish(version, QOS1, 1, "a/b", "old")), "live ones without RETAIN");
        bench.no_violations();
    }
}

#[test]
fn a_will_is_published_on_an_abrupt_end_only() {
    for version in BOTH {
        let will = connect_with_will(version, "c", ("state/c", "lost"), true, 0);
        let mut bench = Bench::new(Broker::new());
        let conn = bench.open();
        bench.say(conn, &will);
        bench.say(conn, &DISCONNECT);
        assert!(bench.broker.log.wills.is_empty(), "DISCONNECT discards it");
        let conn = bench.open();
        bench.say(conn, &will);
        assert_eq!(bench.broker.connects()[1].will.as_ref().map(|w| &w.topic[..]), Some("state/c"));
        bench.lose(conn);
        assert_eq!(bench.broker.log.wills.len(), 1);
        assert_eq!(bench.broker.retained("state/c").map(|p| &p[..]), Some(&b"lost"[..]));
        let conn = bench.open();
        bench.say(conn, &will);
        bench.say(conn, &[0x30, 0x01, 0]);
        assert_eq!(bench.broker.log.wills.len(), 2, "a violation publishes it");
    }
}

#[test]
fn a_delayed_will_is_cancelled_by_coming_back() {
    let will = connect_with_will(Version::V5, "c", ("state/c", "lost"), false, 10);
    let mut bench = Bench::new(Broker::new());
    for back_after_s in [5, 15] {
        let conn = bench.open();
        bench.say(conn, &will);
        bench.lose(conn);
        assert_eq!(bench.broker.next_deadline(), Some(bench.now_ms + 10_000));
        bench.pass(back_after_s * 1000);
    }
    assert_eq!(bench.broker.log.wills.len(), 1);
    let conn = bench.open();
    bench.say(conn, &will);
    bench.say(conn, &[0xe0, 1, 0x04]);
    bench.pass(10_000);
    assert_eq!(bench.broker.log.wills.len(), 2, "DISCONNECT 0x04 asks for it");
}

#[test]
fn silence_of_one_and_a_half_keep_alives_ends_the_connection() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.open();
        bench.say(conn, &connect_with(version, "c", 2, 10, &[]));
        bench.pass(10_000);
        bench.say(conn, &[0xc0, 0]);
        bench.pass(14_999);
        assert!(bench.closed.is_empty(), "{:?}", bench.closed);
        assert_eq!(bench.broker.next_deadline(), Some(bench.now_ms + 1));
        bench.pass(1);
        assert_eq!(bench.closed, [conn]);
        bench.no_violations();
    }
}

#[test]
fn a_session_ends_when_its_expiry_has_passed() {
    let mut bench = Bench::new(Broker::with_limits(Limits { session_expiry: Some(60), ..Limits::default() }));
    for (away_ms, present) in [(59_999, true), (60_000, false)] {
        let conn = bench.client(Version::V5, "c", false);
        bench.lose(conn);
        bench.pass(away_ms);
        assert_eq!(bench.broker.session("c").is_some(), present);
    }
    let conn = bench.client(Version::V311, "old", true);
    bench.say(conn, &DISCONNECT);
    assert!(bench.broker.session("old").is_none(), "3.1.1: a clean session ends with its connection");
}

#[test]
fn topic_filters_match_as_clause_4_7_says() {
    let rows = [
        ("a/b", "a/b", true),
        ("a/b", "a/b/c", false),
        ("a/+", "a/b", true),
        ("a/+", "a", false),
        ("a/+/c", "a//c", true),
        ("a/#", "a", true),
        ("a/#", "a/b/c", true),
        ("#", "a/b", true),
        ("+", "/a", false),
        ("+/+", "/a", true),
        ("#", "$SYS/x", false),
        ("+/x", "$SYS/x", false),
        ("$SYS/#", "$SYS/x", true),
        ("a", "A", false),
    ];
    for (filter, name, expected) in rows {
        assert_eq!(topic::matches(filter, name), expected, "{filter} {name}");
    }
    for (filter, valid) in
        [("#", true), ("a/#", true), ("a#", false), ("#/a", false), ("a+", false), ("", false)]
    {
        assert_eq!(topic::valid_filter(filter), valid, "{filter}");
    }
}

#[test]
fn the_granted_qos_is_the_lower_one_and_bounds_delivery() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::with_limits(Limits { granted_qos: 1, ..Limits::default() }));
        let conn = bench.client(version, "c", true);
        let answer = bench.say(conn, &subscribe(version, "a", 2));
        let expected: &[u8] =
            if version == Version::V5 { &[0x90, 4, 0, 1, 0, 1] } else { &[0x90, 3, 0, 1, 1] };
        assert_eq!(answer, expected);
        bench.broker.publish(&Message::new("a", "x", 2));
        assert_eq!(bench.take(conn), publish(version, QOS1, 1, "a", "x"));
    }
}

#[test]
fn overlapping_subscriptions_deliver_once_at_the_highest_qos() {
    let mut bench = Bench::new(Broker::new());
    let conn = bench.client(Version::V311, "c", true);
    bench.say(conn, &subscribe(Version::V311, "a/+", 0));
    bench.say(conn, &subscribe(Version::V311, "a/#", 1));
    bench.broker.publish(&Message::new("a/b", "x", 2));
    assert_eq!(bench.take(conn), publish(Version::V311, QOS1, 1, "a/b", "x"));
}

#[test]
fn unsubscribe_says_0x11_where_there_was_no_subscription() {
    let mut bench = Bench::new(Broker::new());
    let conn = bench.client(Version::V5, "c", true);
    bench.say(conn, &subscribe(Version::V5, "a", 0));
    let unsubscribe = packet(0xa2, &[&[0, 2, 0][..], &text("a"), &text("b")].concat());
    assert_eq!(bench.say(conn, &unsubscribe), [0xb0, 5, 0, 2, 0, 0, 0x11]);
    assert!(bench.broker.session("c").is_some_and(|s: &Session| s.subscriptions.is_empty()));
}

#[test]
fn nobody_subscribed_is_0x10_if_the_broker_tells() {
    for (tells, code) in [(true, Some(0x10)), (false, None)] {
        let limits = Limits { tell_no_subscribers: tells, ..Limits::default() };
        let mut bench = Bench::new(Broker::with_limits(limits));
        let conn = bench.client(Version::V5, "c", true);
        let expect = |first| code.map_or(ack(first, 1), |code| vec![first, 3, 0, 1, code]);
        assert_eq!(bench.say(conn, &publish(Version::V5, QOS1, 1, "a", "")), expect(PUBACK));
        assert_eq!(bench.say(conn, &publish(Version::V5, QOS2, 1, "a", "")), expect(PUBREC));
    }
}

#[test]
fn what_a_client_must_not_do_with_packet_ids_is_written_down() {
    let v = Version::V5;
    let rel = |id| ack(PUBREL, id);
    // Packets on a first connection, packets on a second one, words.
    let rows = vec![
        (vec![publish(v, QOS2, 1, "a", "x")], vec![publish(v, QOS2, 1, "a", "x")], "without DUP"),
        (vec![publish(v, QOS2, 1, "a", "x")], vec![publish(v, QOS2 | DUP, 1, "a", "y")], "used again"),
        (vec![publish(v, QOS2, 1, "a", "x")], vec![publish(v, QOS1, 1, "a", "x")], "in use"),
        (vec![publish(v, QOS2, 1, "a", "x"), publish(v, QOS2 | DUP, 1, "a", "x")], vec![], "twice"),
        (vec![publish(v, QOS2, 1, "a", "x"), rel(1), rel(1)], vec![], "already"),
        (
            vec![publish(v, QOS2, 1, "a", "x"), publish(v, QOS2, 2, "a", "y"), rel(2), rel(1)],
            vec![],
            "order of the PUBRECs",
        ),
        (
            vec![publish(v, QOS2, 1, "a", "x"), publish(v, QOS2, 2, "a", "y")],
            vec![publish(v, QOS2 | DUP, 2, "a", "y"), publish(v, QOS2 | DUP, 1, "a", "x")],
            "first sent later",
        ),
        (vec![ack(PUBACK, 1)], vec![], "no message in flight"),
        (vec![publish(v, QOS2, 1, "a", "x"), publish(v, QOS1, 1, "a", "x")], vec![], "in use"),
    ];
    for (first, second, words) in rows {
        let mut bench = Bench::new(Broker::new());
        for packets in [first, second] {
            let conn = bench.client(v, "c", false);
            packets.iter().for_each(|p| drop(bench.say(conn, p)));
            bench.lose(conn);
        }
        bench.one_violation(words);
    }
}

#[test]
fn a_pubrel_before_its_pubrec_is_written_down() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.script.withhold.insert(Kind::Pubrec);
    let conn = bench.client(Version::V311, "c", false);
    bench.say(conn, &publish(Version::V311, QOS2, 1, "a", "x"));
    bench.say(conn, &ack(PUBREL, 1));
    bench.one_violation("before its PUBREC");
}

#[test]
fn a_resumed_client_that_keeps_the_rules_is_not_accused() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", false);
        for id in 1..=4 {
            bench.say(conn, &publish(version, QOS2, id, "a", &id.to_string()));
        }
        bench.lose(conn);
        // PUBRECs 1 and 2 arrived before the link broke, 5 never reached the broker.
        let conn = bench.client(version, "c", false);
        for bytes in [
            ack(PUBREL, 1),
            ack(PUBREL, 2),
            publish(version, QOS2 | DUP, 3, "a", "3"),
            publish(version, QOS2 | DUP, 4, "a", "4"),
            publish(version, QOS2 | DUP, 5, "a", "5"),
            publish(version, QOS2, 1, "a", "6"),
            ack(PUBREL, 3),
            ack(PUBREL, 4),
            ack(PUBREL, 5),
            ack(PUBREL, 1),
        ] {
            bench.say(conn, &bytes);
        }
        let expected = ["1", "2", "3", "4", "5", "6"].map(str::as_bytes);
        assert_eq!(bench.broker.log.tally("#", expected), Tally { expected: 6, ..Tally::default() });
        bench.no_violations();
    }
}

// Faults.

#[test]
fn a_connect_is_refused_left_unanswered_or_closed_as_scripted() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let script = &mut bench.broker.script;
        script.next_connects.push_back(ConnectScript { refuse: Some(0x87), ..ConnectScript::default() });
        script.next_connects.push_back(ConnectScript { mute: true, ..ConnectScript::default() });
        script.next_connects.push_back(ConnectScript { close: true, ..ConnectScript::default() });
        let refused = bench.open();
        let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
        assert_eq!(
            bench.say(refused, &connect(version, "c", true)),
            packet(0x20, &[&[0, 0x87], properties].concat())
        );
        let mute = bench.open();
        assert_eq!(bench.say(mute, &connect(version, "c", true)), NOTHING);
        assert_eq!(bench.say(mute, &[0xc0, 0]), NOTHING);
        let cut = bench.open();
        assert_eq!(bench.say(cut, &connect(version, "c", true)), NOTHING);
        assert_eq!(bench.closed, [refused, cut]);
        bench.client(version, "c", true);
        let codes: Vec<_> = bench.broker.connects().iter().map(|c| c.answer).collect();
        assert_eq!(codes, [Some((false, 0x87)), None, None, Some((false, 0))]);
    }
}

#[test]
fn a_wrong_login_is_refused() {
    for (version, code) in [(Version::V311, 4), (Version::V5, 0x86)] {
        let login = Some(("press".to_owned(), "secret".to_owned()));
        let mut bench = Bench::new(Broker::with_limits(Limits { login, ..Limits::default() }));
        for (password, expected) in [("secret", 0), ("wrong", code)] {
            let conn = bench.open();
            let rest = [text("press"), text(password)].concat();
            let answer = bench.say(conn, &connect_with(version, "c", 0xc2, 0, &rest));
            assert_eq!(answer[CONNACK_CODE], expected);
        }
        assert_eq!(bench.broker.connects()[1].username.as_deref(), Some("press"));
    }
}

#[test]
fn session_present_lies_change_nothing_but_the_flag() {
    let mut bench = Bench::new(Broker::new());
    for (say, expected) in [(Some(true), true), (Some(false), false), (None, true)] {
        bench.broker.script.every_connect.session_present = say;
        let conn = bench.open();
        let answer = bench.say(conn, &connect(Version::V311, "c", false));
        assert_eq!(answer, [0x20, 2, u8::from(expected), 0]);
        bench.lose(conn);
    }
}

#[test]
fn forgetting_a_session_or_its_ids_makes_a_repeat_a_first_time() {
    for forget in ["session", "ids", "at connect"] {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(Version::V5, "c", false);
        bench.say(conn, &subscribe(Version::V5, "b", 0));
        bench.say(conn, &publish(Version::V5, QOS2, 1, "a", "x"));
        bench.lose(conn);
        match forget {
            "session" => assert!(bench.broker.forget_session("c")),
            "ids" => assert_eq!(bench.broker.forget_packet_ids("c"), 1),
            _ => bench.broker.script.every_connect.forget_session = true,
        }
        let conn = bench.client(Version::V5, "c", false);
        assert_eq!(bench.broker.connects()[1].answer, Some((forget == "ids", 0)), "{forget}");
        bench.say(conn, &publish(Version::V5, QOS2 | DUP, 1, "a", "x"));
        let tally = bench.broker.log.tally("#", [&b"x"[..]]);
        assert_eq!(tally, Tally { expected: 1, duplicated: 1, ..Tally::default() }, "{forget}");
        bench.no_violations();
    }
}

#[test]
fn an_oversize_packet_closes_a_3_1_1_connection_without_an_accusation() {
    let mut bench =
        Bench::new(Broker::with_limits(Limits { maximum_packet_size: Some(64), ..Limits::default() }));
    let conn = bench.client(Version::V311, "c", true);
    // The fixed header alone is enough.
    assert_eq!(bench.say(conn, &[0x30, 64]), NOTHING);
    assert_eq!(bench.closed, [conn]);
    bench.no_violations();
}

#[test]
fn a_living_connection_survives_the_loss_of_its_session() {
    let mut bench = Bench::new(Broker::new());
    let conn = bench.subscriber(Version::V5, "c");
    bench.broker.forget_session("c");
    bench.broker.publish(&Message::new("a", "x", 0));
    assert_eq!(bench.take(conn), NOTHING);
    assert_eq!(bench.say(conn, &publish(Version::V5, QOS1, 1, "a", "x")), ack(PUBACK, 1));
}

#[test]
fn acknowledgements_are_withheld_delayed_doubled_or_replaced() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", true);
        bench.broker.script.withhold.insert(Kind::Puback);
        assert_eq!(bench.say(conn, &publish(version, QOS1, 1, "a", "")), NOTHING);
        bench.broker.script.withhold.clear();
        bench.broker.script.delay_ms.insert(Kind::Puback, 50);
        assert_eq!(bench.say(conn, &publish(version, QOS1, 2, "a", "")), NOTHING);
        bench.pass(49);
        assert_eq!(bench.take(conn), NOTHING);
        bench.pass(1);
        assert_eq!(bench.take(conn), ack(PUBACK, 2));
        bench.broker.script.delay_ms.clear();
        bench.broker.script.double.insert(Kind::Puback);
        assert_eq!(
            bench.say(conn, &publish(version, QOS1, 3, "a", "")),
            [ack(PUBACK, 3), ack(PUBACK, 3)].concat()
        );
        bench.broker.script.replace.insert(Kind::Puback, ack(PUBCOMP, 77));
        assert_eq!(bench.say(conn, &publish(version, QOS1, 4, "a", "")), ack(PUBCOMP, 77));
        bench.no_violations();
    }
}

#[test]
fn a_late_connack_holds_back_what_the_session_sends() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.script.delay_ms.insert(Kind::Connack, 100);
    let conn = bench.open();
    assert_eq!(bench.say(conn, &connect(Version::V311, "c", false)), NOTHING);
    bench.broker.deliver("c", Message::new("a", "x", 1));
    assert_eq!(bench.take(conn), NOTHING);
    bench.pass(100);
    assert_eq!(bench.take(conn), [vec![0x20, 2, 0, 0], publish(Version::V311, QOS1, 1, "a", "x")].concat());
}

#[test]
fn a_publish_is_refused_with_any_code_a_number_of_times() {
    let mut bench = Bench::new(Broker::new());
    let refusal = Refusal { filter: "a/#".into(), reason: 0x97, times: Times::Only(1) };
    bench.broker.script.refuse.push(refusal.clone());
    let conn = bench.client(Version::V5, "c", false);
    assert_eq!(bench.say(conn, &publish(Version::V5, QOS2, 1, "b", "0")), ack(PUBREC, 1));
    assert_eq!(bench.say(conn, &publish(Version::V5, QOS2, 2, "a/x", "1")), [PUBREC, 3, 0, 2, 0x97]);
    assert_eq!(bench.say(conn, &publish(Version::V5, QOS2, 2, "a/x", "1")), ack(PUBREC, 2));
    assert_eq!(bench.payloads(), ["0", "1"]);
    assert_eq!((bench.broker.log.refused.len(), bench.broker.log.refused[0].reason), (1, 0x97));
    bench.no_violations();

    bench.broker.script.refuse.push(Refusal { times: Times::Always, ..refusal });
    let old = bench.client(Version::V311, "old", false);
    assert_eq!(bench.say(old, &publish(Version::V311, QOS1, 1, "a/x", "2")), ack(PUBACK, 1));
    assert_eq!(bench.broker.log.counters.swallowed, 1, "3.1.1 cannot say it");
    assert_eq!(bench.payloads(), ["0", "1"]);
}

#[test]
fn a_pubrel_after_a_refusing_pubrec_is_written_down() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.script.deny_publish.push("#".into());
    let conn = bench.client(Version::V5, "c", false);
    assert_eq!(bench.say(conn, &publish(Version::V5, QOS2, 1, "a", "")), [PUBREC, 3, 0, 1, 0x87]);
    bench.say(conn, &ack(PUBREL, 1));
    bench.one_violation("refused");
}

#[test]
fn the_silent_limit_acknowledges_and_loses_as_mosquitto_does() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.script.silent_limit = Some(2);
    let conn = bench.client(Version::V311, "c", false);
    for id in 1..=3 {
        let sent = publish(Version::V311, QOS2, id, "a", &id.to_string());
        assert_eq!(bench.say(conn, &sent), ack(PUBREC, id as u8));
    }
    for id in 1..=3 {
        assert_eq!(bench.say(conn, &ack(PUBREL, id)), ack(PUBCOMP, id));
    }
    assert_eq!(bench.payloads(), ["1", "2"]);
    assert_eq!(bench.broker.log.connections[&conn].peak_unfinished, 3);
    bench.no_violations();
}

#[test]
fn rights_are_denied_aloud_on_5_0_and_in_silence_on_3_1_1() {
    for (version, suback) in [(Version::V311, 0x80), (Version::V5, 0x87)] {
        let mut bench = Bench::new(Broker::new());
        bench.broker.script.deny_publish.push("secret/#".into());
        bench.broker.script.deny_subscribe.push("secret/#".into());
        bench.broker.script.deny_read.push("hidden".into());
        let conn = bench.client(version, "c", true);
        let answer = bench.say(conn, &publish(version, QOS1, 1, "secret/x", ""));
        assert_eq!(answer, if version == Version::V5 { vec![PUBACK, 3, 0, 1, 0x87] } else { ack(PUBACK, 1) });
        assert_eq!(bench.say(conn, &subscribe(version, "secret/x", 1)).last(), Some(&suback));
        bench.say(conn, &subscribe(version, "hidden", 1));
        bench.broker.publish(&Message::new("hidden", "x", 1).retained());
        assert_eq!(bench.take(conn), NOTHING);
        assert!(bench.broker.received().is_empty());
    }
}

#[test]
fn a_connection_is_cut_before_during_or_after_the_nth_packet() {
    for (when, taken, answered) in [
        (CutWhen::Before, vec!["1"], vec![1]),
        (CutWhen::Unanswered, vec!["1", "2"], vec![1]),
        (CutWhen::Answered, vec!["1", "2"], vec![1, 2]),
    ] {
        let mut bench = Bench::new(Broker::new());
        bench.broker.script.cuts.push(Cut::once(CutAt::Packet(Kind::Publish, 2), when));
        let conn = bench.client(Version::V311, "c", false);
        let packets = (1..=3).map(|id| publish(Version::V311, QOS2, id, "a", &id.to_string()));
        let answer = bench.say(conn, &packets.collect::<Vec<_>>().concat());
        assert_eq!(answer, answered.iter().map(|id| ack(PUBREC, *id)).collect::<Vec<_>>().concat());
        assert_eq!(
            (bench.payloads(), bench.closed.clone()),
            (taken.into_iter().map(str::to_owned).collect(), vec![conn])
        );
        assert!(bench.broker.script.cuts.is_empty(), "it happens once");
        bench.no_violations();
    }
}

#[test]
fn a_connection_is_cut_at_a_byte_or_after_a_packet_sent() {
    let sent = publish(Version::V311, QOS1, 1, "a", "x");
    for (cut, taken) in [
        (CutAt::Byte(sent.len() as u64 - 1), 0),
        (CutAt::Byte(sent.len() as u64), 1),
        (CutAt::Sent(Kind::Puback, 1), 1),
    ] {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(Version::V311, "c", false);
        bench.broker.script.cuts.push(Cut::every(cut, CutWhen::Answered));
        let answer = bench.say(conn, &[sent.clone(), sent.clone()].concat());
        assert_eq!(bench.payloads().len(), taken + usize::from(matches!(cut, CutAt::Sent(..))), "{cut:?}");
        assert!(answer.starts_with(&ack(PUBACK, 1)[..2 * taken]));
        assert_eq!((bench.closed.clone(), bench.broker.log.counters.cuts), (vec![conn], 1), "{cut:?}");
    }
}

#[test]
fn any_bytes_are_sent_at_connect_or_on_demand() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.script.every_connect =
        ConnectScript { before: vec![1], after: vec![2], ..ConnectScript::default() };
    let conn = bench.open();
    assert_eq!(bench.say(conn, &connect(Version::V311, "c", true)), [1, 0x20, 2, 0, 0, 2]);
    assert!(bench.broker.send_raw("c", &[9, 9]));
    assert_eq!(bench.take(conn), [9, 9]);
    assert!(bench.broker.disconnect("c", 0x8b));
    assert_eq!(bench.take(conn), NOTHING, "3.1.1 has no DISCONNECT from a server");
    assert_eq!(bench.closed, [conn]);
    assert!(!bench.broker.send_raw("c", &[9]));
}

#[test]
fn a_message_is_delivered_and_repeated_with_its_id_on_demand() {
    for version in BOTH {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(version, "c", false);
        assert!(bench.broker.deliver("c", Message::new("cmd", "x", 2)));
        assert_eq!(bench.take(conn), publish(version, QOS2, 1, "cmd", "x"));
        assert_eq!(bench.broker.repeat("c"), Some(1));
        assert_eq!(bench.take(conn), publish(version, QOS2 | DUP, 1, "cmd", "x"));
        assert_eq!(bench.say(conn, &ack(PUBREC, 1)), ack(PUBREL, 1));
        assert_eq!(bench.say(conn, &ack(PUBREC, 1)), ack(PUBREL, 1), "a second PUBREC for the repeat");
        assert_eq!(bench.say(conn, &ack(PUBCOMP, 1)), NOTHING);
        assert_eq!(bench.broker.unfinished("c"), 0);
        assert!(bench.broker.deliver_as("c", 1, false, Message::new("cmd", "y", 1)));
        assert_eq!(bench.take(conn), publish(version, QOS1, 1, "cmd", "y"));
        bench.say(conn, &ack(PUBACK, 1));
        let x = |dup| ("x".to_owned(), 2, false, dup);
        let expected = [x(false), x(true), ("y".to_owned(), 1, false, false)];
        assert_eq!(text_of(&bench.broker.log.delivered), expected);
        bench.no_violations();
    }
}

#[test]
fn a_restart_keeps_or_loses_sessions_and_never_the_log() {
    for (memory, present) in [(Memory::Kept, true), (Memory::Lost, false)] {
        let mut bench = Bench::new(Broker::new());
        let conn = bench.client(Version::V311, "c", false);
        bench.say(conn, &publish(Version::V311, QOS1 | RETAIN, 1, "a", "x"));
        bench.broker.restart(memory);
        bench.collect();
        assert_eq!(bench.closed, [conn]);
        assert_eq!(bench.broker.retained("a").is_some(), present);
        bench.client(Version::V311, "c", false);
        assert_eq!(bench.broker.connects()[1].answer, Some((present, 0)));
        assert_eq!(bench.payloads(), ["x"]);
    }
}

#[test]
fn the_log_can_be_emptied_between_publish_and_pubrel() {
    let mut bench = Bench::new(Broker::new());
    let conn = bench.client(Version::V311, "c", false);
    bench.say(conn, &publish(Version::V311, QOS2, 1, "a", "x"));
    bench.broker.log.clear();
    bench.say(conn, &publish(Version::V311, QOS2, 2, "a", "y"));
    bench.say(conn, &ack(PUBREL, 1));
    assert!(!bench.broker.received()[0].onward, "that one is not released");
    bench.say(conn, &ack(PUBREL, 2));
    assert!(bench.broker.received()[0].onward);
}

#[test]
fn subscription_options_of_5_0_are_obeyed() {
    let mut bench = Bench::new(Broker::new());
    bench.broker.publish(&Message::new("a", "old", 0).retained());
    let conn = bench.client(Version::V5, "c", true);
    // No Local, Retain As Published, Retain Handling 2.
    bench.say(conn, &subscribe(Version::V5, "a", 0x04 | 0x08 | 0x20));
    assert_eq!(bench.take(conn), NOTHING);
    bench.say(conn, &publish(Version::V5, QOS0, 0, "a", "own"));
    assert_eq!(bench.take(conn), NOTHING);
    bench.broker.publish(&Message::new("a", "new", 0).retained());
    assert_eq!(bench.take(conn), publish(Version::V5, QOS0 | RETAIN, 0, "a", "new"));
    let granted: Vec<&Request> =
        bench.broker.session("c").map(|s| s.subscriptions.values().collect()).unwrap_or_default();
    assert!(granted.len() == 1 && granted[0].no_local && granted[0].retain_handling == 2);
}

// The shell, the proxy and the harness, on real sockets.

/// A TCP connection with CONNECT accepted, 3.1.1, persistent.
async fn dial(port: u16, id: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a listener");
    stream.write_all(&connect(Version::V311, id, false)).await.expect("CONNECT is sent");
    let mut connack = [0; 4];
    stream.read_exact(&mut connack).await.expect("CONNACK");
    assert_eq!((connack[0], connack[3]), (0x20, 0));
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_broker_refuses_connections_and_comes_back_on_its_port() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let mut stream = dial(server.port(), "c").await;
    server.stop(Memory::Kept).await;
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "closed without DISCONNECT");
    assert!(TcpStream::connect(server.address()).await.is_err());
    server.start_again().await.expect("the port is still free");
    dial(server.port(), "c").await;
    server.restart(Memory::Lost).await.expect("the port is still free");
    dial(server.port(), "c").await;
    let present = server.with(|b| b.connects().iter().map(|c| c.answer).collect::<Vec<_>>()).await;
    assert_eq!(present, [Some((false, 0)), Some((true, 0)), Some((false, 0))]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_client_still_reads_the_code() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    server.with(|b| b.script.every_connect.refuse = Some(5)).await;
    let mut stream = TcpStream::connect(server.address()).await.expect("a listener");
    let flood = publish(Version::V311, QOS0, 0, "a", &"x".repeat(100_000));
    stream.write_all(&[connect(Version::V311, "c", true), flood].concat()).await.expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("closed in order");
    assert_eq!(answer, [0x20, 2, 0, 5]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_qos_2_messages_take_little_time() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let (mut reader, mut writer) = dial(server.port(), "c").await.into_split();
    let started = std::time::Instant::now();
    let sender = tokio::spawn(async move {
        for window in 0..20_u16 {
            let mut bytes = Vec::new();
            for id in 1..=1000_u16 {
                let number = (window * 1000 + id).to_string();
                bytes.extend(publish(Version::V311, QOS2, id, "a/b", &format!("{number:0>200}")));
            }
            (1..=1000_u16).for_each(|id| bytes.extend([&[PUBREL, 2][..], &id.to_be_bytes()].concat()));
            writer.write_all(&bytes).await.expect("sent");
        }
        writer
    });
    let mut answers = vec![0; 20_000 * 8];
    reader.read_exact(&mut answers).await.expect("a PUBREC and a PUBCOMP for each");
    drop(sender.await);
    println!("20000 QoS 2 messages in {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(10));
    let count = server.with(|b| b.received().iter().filter(|r| r.onward).count()).await;
    assert_eq!(count, 20_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_outside_the_runtime_can_script_and_inspect() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let handle = server.clone();
    let seen = tokio::task::spawn_blocking(move || {
        handle.with_blocking(|b| b.script.silent_limit = Some(3));
        handle.with_blocking(|b| b.script.silent_limit)
    });
    assert_eq!(seen.await.expect("no panic"), Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxy_forwards_cuts_and_refuses() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let proxy = Proxy::start(server.port()).await.expect("a free port");
    proxy.dribble(true);
    let mut stream = dial(proxy.port(), "c").await;
    proxy.dribble(false);
    let sent = connect(Version::V311, "c", false).len() as u64;
    assert_eq!((proxy.counts().to_broker, proxy.counts().to_client), (sent, 4));
    proxy.cut_all().await;
    assert!(!matches!(stream.read(&mut [0; 1]).await, Ok(1..)), "cut towards the client");
    assert!(server.wait_for(PATIENCE, |b| b.open_connections() == 0).await, "and towards the broker");
    assert_eq!(proxy.counts().cuts, 1);
    proxy.refuse(true).await.expect("closing cannot fail");
    assert!(TcpStream::connect(("127.0.0.1", proxy.port())).await.is_err());
    proxy.refuse(false).await.expect("the port is still free");
    dial(proxy.port(), "c").await;
    let other = BrokerServer::start(Broker::new()).await.expect("a free port");
    proxy.set_target(other.port()).await;
    dial(proxy.port(), "c").await;
    assert_eq!(other.with(|b| b.connects().len()).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_proxy_cuts_after_a_number_of_bytes() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let proxy = Proxy::start(server.port()).await.expect("a free port");
    let hello = connect(Version::V311, "c", false).len() as u64;
    proxy.set_plan(CutPlan::After { to_broker: Some(hello + 5), to_client: None }).await;
    let mut stream = dial(proxy.port(), "c").await;
    let _ = stream.write_all(&publish(Version::V311, QOS1, 1, "a", "x")).await;
    assert!(!matches!(stream.read(&mut [0; 1]).await, Ok(1..)), "no PUBACK");
    assert!(server.wait_for(PATIENCE, |b| b.open_connections() == 0).await);
    assert_eq!((proxy.counts().to_broker, proxy.counts().cuts), (hello + 5, 1));
    proxy.set_plan(CutPlan::After { to_broker: None, to_client: Some(6) }).await;
    let mut stream = dial(proxy.port(), "c").await;
    stream.write_all(&publish(Version::V311, QOS1, 1, "a", "x")).await.expect("sent");
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert_eq!(answer, &ack(PUBACK, 1)[..2], "half a PUBACK");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_cuts_repeat_with_their_seed() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let mut bytes = connect(Version::V311, "r", true);
    (1..=200_u16).for_each(|id| bytes.extend(publish(Version::V311, QOS1, id, "a", "x")));
    let mut runs = Vec::new();
    for _ in 0..2 {
        let proxy = Proxy::start(server.port()).await.expect("a free port");
        proxy.set_plan(CutPlan::Random { seed: 42, least: 20, most: 500 }).await;
        let mut places = Vec::new();
        for _ in 0..10 {
            let before = proxy.counts();
            let mut stream = TcpStream::connect(("127.0.0.1", proxy.port())).await.expect("a listener");
            let _ = stream.write_all(&bytes).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
            let after = proxy.counts();
            let up = after.to_broker - before.to_broker;
            // Only a cut towards the broker stops that direction this early.
            places.push(if up <= 500 { (up, 0) } else { (0, after.to_client - before.to_client) });
        }
        assert_eq!(proxy.counts().cuts, 10);
        runs.push(places);
    }
    assert_eq!(runs[0], runs[1]);
    assert!(runs[0].iter().any(|p| p.0 > 0) && runs[0].iter().any(|p| p.1 > 0), "both ways: {:?}", runs[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_link_stays_open_and_loses_nothing() {
    let server = BrokerServer::start(Broker::new()).await.expect("a free port");
    let proxy = Proxy::start(server.port()).await.expect("a free port");
    let mut stream = dial(proxy.port(), "c").await;
    proxy.stall(true, false);
    stream.write_all(&publish(Version::V311, QOS1, 1, "a", "x")).await.expect("the socket takes it");
    let read = tokio::time::timeout(Duration::from_millis(100), stream.read(&mut [0; 1])).await;
    assert!(read.is_err(), "nothing comes and nothing closes");
    assert_eq!(server.with(|b| (b.received().len(), b.open_connections())).await, (0, 1));
    proxy.stall(false, false);
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.expect("PUBACK after the stall");
    assert_eq!(answer[..], ack(PUBACK, 1));
    proxy.delay(Duration::from_millis(30));
    let started = std::time::Instant::now();
    stream.write_all(&[0xc0, 0]).await.expect("sent");
    stream.read_exact(&mut answer[..2]).await.expect("PINGRESP");
    assert!(started.elapsed() >= Duration::from_millis(60), "delayed each way");
}

#[test]
fn the_mosquitto_log_tells_first_times_from_repeats() {
    let log = "\
1700000000: New client connected from 127.0.0.1:5000 as gate (way) (p2, c0, k60).
1700000000: Sending CONNACK to gate (way) (1, 0)
1700000000: Received PUBLISH from gate (way) (d0, q0, r1, m0, 'it''s', ... (0 bytes))
1700000000: Received PUBLISH from gate (way) (d0, q2, r0, m1024, 'a/b', ... (200 bytes))
1700000000: Sending PUBREC to gate (way) (m1024, rc0)
1700000001: Received PUBLISH from gate (way) (d1, q2, r0, m1024, 'a/b', ... (200 bytes))
1700000001: Received PUBREL from gate (way) (Mid: 1024)
1700000001: Sending PUBCOMP to gate (way) (m1024)
1700000002: Received PUBLISH from gate (way) (d0, q2, r0, m1024, 'a/b', ... (7 bytes))
1700000002: Received PUBLISH from gate (way) (d0, q2, r0, m7, 'a/c', ... (7 bytes))
1700000002: Sending PUBREC to gate (way) (m7, rc151)
1700000002: Received PUBLISH from gate (way) (d0, q2, r0, m7, 'a/c', ... (7 bytes))
1700000003: New client connected from 127.0.0.1:5000 as gate (way) (p2, c0, k60).
1700000003: Sending CONNACK to gate (way) (0, 0)
1700000003: Received PUBLISH from gate (way) (d0, q2, r0, m7, 'a/d', ... (7 bytes))";
    let count = LogCount::read(log);
    assert_eq!(
        count.publishes.iter().map(|p| p.first_time).collect::<Vec<_>>(),
        [true, true, false, true, false, true, true]
    );
    assert_eq!(
        count.publishes.iter().map(|p| p.handed_on).collect::<Vec<_>>(),
        [true, true, false, false, false, false, false]
    );
    assert_eq!((count.first_time("#"), count.first_time("a/b"), count.publishes[1].bytes), (5, 2, 200));
    assert_eq!((count.publishes[0].topic.as_str(), count.publishes[0].retain), ("it''s", true));
    assert_eq!(count.publishes[2].client_id, "gate (way)");
}

#[test]
fn a_real_mosquitto_starts_counts_and_keeps_its_sessions_over_a_stop() {
    let options = mosquitto::Options {
        unlimited: true,
        persistence: true,
        users: vec![("press".to_owned(), "secret".to_owned())],
        ..mosquitto::Options::default()
    };
    let mut broker = Mosquitto::start(options);
    let login = ["-u", "press", "-P", "secret"];
    let subscriber = Subscriber::start(broker.port(), "watch", "a/#", 3, &login);
    assert!(broker.wait_for_log(PATIENCE, "Sending SUBACK to watch"));
    for (qos, payload) in [("0", "zero"), ("1", "one"), ("2", "two")] {
        let arguments = ["-t", "a/b", "-r", "-q", qos, "-m", payload];
        mosquitto::publish(broker.port(), &[&login[..], &arguments].concat());
    }
    assert_eq!(subscriber.finish(), ["a/b zero", "a/b one", "a/b two"]);
    assert_eq!(broker.received().first_time("a/b"), 3);
    broker.stop();
    broker.start_again();
    let late = Subscriber::start(broker.port(), "late", "a/b", 1, &login);
    assert_eq!(late.finish(), ["a/b two"], "retained");
    broker.kill();
}

#[test]
fn a_real_mosquitto_serves_tls_with_the_certificate_given() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
    let (certificate, key) = (dir.path().join("server.crt"), dir.path().join("server.key"));
    std::fs::write(&certificate, made.cert.pem()).expect("written");
    std::fs::write(&key, made.signing_key.serialize_pem()).expect("written");
    let tls = mosquitto::Tls { certificate: certificate.clone(), key, client_authority: None };
    let broker = Mosquitto::start(mosquitto::Options { tls: Some(tls), ..mosquitto::Options::default() });
    assert!(broker.url().starts_with("mqtts://"));
    let authority = certificate.to_str().expect("a temporary path is text");
    mosquitto::publish(broker.port(), &["--cafile", authority, "-t", "a", "-q", "1", "-m", "x"]);
    assert_eq!(broker.received().first_time("a"), 1);
}

// The model broker against clients that are not ours.

/// Starts a broker of its own runtime, for tests that run programs and so block.
fn blocking_broker(broker: Broker) -> (tokio::runtime::Runtime, BrokerServer) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let server = runtime.block_on(BrokerServer::start(broker)).expect("a free port");
    (runtime, server)
}

fn subscribed(server: &BrokerServer, client_id: &'static str) -> bool {
    wait_until(PATIENCE, || {
        server.with_blocking(move |b| b.session(client_id).is_some_and(|s| !s.subscriptions.is_empty()))
    })
}

#[test]
fn mosquittos_clients_get_every_qos_through_the_model_broker() {
    for version in ["mqttv311", "mqttv5"] {
        let (_runtime, server) = blocking_broker(Broker::new());
        let version = ["-V", version];
        let subscriber = Subscriber::start(server.port(), "watch", "a/+", 30, &version);
        assert!(subscribed(&server, "watch"));
        for qos in ["0", "1", "2"] {
            for n in 0..10 {
                let payload = format!("{qos}-{n}");
                let arguments = ["-t", "a/b", "-q", qos, "-m", &payload];
                mosquitto::publish(server.port(), &[&version[..], &arguments].concat());
            }
        }
        let expected: Vec<String> = (0..30).map(|n| format!("a/b {}-{}", n / 10, n % 10)).collect();
        assert_eq!(subscriber.finish(), expected);
        let (received, violations) = server.with_blocking(|b| (b.received().len(), b.violations()));
        assert_eq!((received, violations), (30, Vec::new()));
    }
}

#[test]
fn mosquittos_clients_see_retained_messages_and_wills_of_the_model_broker() {
    for version in ["mqttv311", "mqttv5"] {
        let (_runtime, server) = blocking_broker(Broker::new());
        let version = ["-V", version];
        let retained = ["-t", "a/b", "-q", "1", "-r", "-m", "kept"];
        mosquitto::publish(server.port(), &[&version[..], &retained].concat());
        let watch = Subscriber::start(server.port(), "watch", "#", 2, &version);
        assert!(subscribed(&server, "watch"));
        let will =
            ["--will-topic", "state/victim", "--will-payload", "lost", "--will-qos", "1", "--will-retain"];
        let mut victim = Subscriber::start(server.port(), "victim", "x", 1, &[&version[..], &will].concat());
        assert!(subscribed(&server, "victim"));
        victim.kill().expect("it can be killed");
        assert_eq!(watch.finish(), ["a/b kept", "state/victim lost"]);
        assert_eq!(
            server.with_blocking(|b| b.retained("state/victim").cloned()).as_deref(),
            Some(&b"lost"[..])
        );
        mosquitto::publish(server.port(), &[&version[..], &["-t", "a/b", "-r", "-n"]].concat());
        assert!(wait_until(PATIENCE, || server.with_blocking(|b| b.retained("a/b").is_none())));
        assert_eq!(server.with_blocking(|b| b.violations()), Vec::<String>::new());
    }
}

#[test]
fn a_persistent_mosquitto_sub_gets_what_came_while_it_was_away() {
    for version in ["mqttv311", "mqttv5"] {
        let (_runtime, server) = blocking_broker(Broker::new());
        let mut arguments = vec!["-V", version, "-c"];
        if version == "mqttv5" {
            arguments.extend(["-x", "3600"]);
        }
        let mut first = Subscriber::start(server.port(), "watch", "a", 1, &arguments);
        assert!(subscribed(&server, "watch"));
        first.kill().expect("it can be killed");
        assert!(wait_until(PATIENCE, || server.with_blocking(|b| b.connection_of("watch").is_none())));
        for (qos, payload) in [(1, "x"), (2, "y")] {
            server.with_blocking(move |b| b.publish(&Message::new("a", payload, qos)));
        }
        let second = Subscriber::start(server.port(), "watch", "a", 2, &arguments);
        assert_eq!(second.finish(), ["a x", "a y"]);
        assert_eq!(server.with_blocking(|b| b.violations()), Vec::<String>::new());
    }
}
