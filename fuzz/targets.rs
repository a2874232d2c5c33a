//! What fuzzing feeds: one function for each target, which must hold for any bytes.
//!
//! Shared by the programs in `bin/`, which look for bytes that break it, and by `tests/fuzz.rs`, which runs the corpora
//! on stable. Invariant: same bytes, same run; a broken rule is a panic.
#![allow(dead_code, unused_imports)]

#[path = "targets/reply.rs"]
mod reply;
#[path = "targets/segment.rs"]
mod segment;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Cursor;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use fieldpost::clock::Stamp;
use fieldpost::config;
use fieldpost::message::{Lane, PacketId, Qos, Record, Seq, Topic};
use fieldpost::point::{PointIndex, Value};
use fieldpost::policy::command::{self, Allowed, Asked, Judge, WritablePoint};
use fieldpost::policy::topic::{Names, Template};
use fieldpost::source::modbus::register::{Encoding, Kind, Order};
use fieldpost::turn::{Begin, Change, Offer, OnSessionLoss, Resume, RowState, Taken};
use fieldpost::uplink::link::Link;
use fieldpost::uplink::packet::{ConnAck, Limits, Packet, Protocol, Publish, ReasonCode};
use fieldpost::uplink::session::{Broken, Carry, Session, Settings};
use futures_util::FutureExt;

pub(crate) use reply::{misread_reply, reply};
pub(crate) use segment::{forged_segment, segment};

/// A configuration is checked or refused with every problem in words, whatever it is.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match config::parse(Path::new("fieldpost.toml"), text) {
        Ok(config) => {
            for point in &config.points {
                assert!(Topic::new(point.report.topic.as_str()).is_ok());
                assert!(point.every.as_millis() >= 50);
            }
            let points: usize =
                config.modbus.iter().flat_map(|line| &line.units).map(|unit| unit.points.len()).sum();
            assert_eq!(points, config.points.len());
        }
        Err(problems) => assert!(!problems.0.is_empty() && !problems.to_string().is_empty()),
    }
}

/// A template renders to a topic that can be published and has the levels of the template, whatever the names.
pub(crate) fn topic(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut parts = text.split('\n');
    let mut next = || parts.next().unwrap_or_default();
    let (template, gateway, line, unit, point) = (next(), next(), next(), next(), next());
    let Ok(parsed) = Template::parse(template) else { return };
    if let Ok(topic) = parsed.render(&Names { gateway, line, unit, point }) {
        assert!(Topic::new(topic.as_str()).is_ok(), "{topic:?}");
        let levels = |text: &str| text.matches('/').count();
        assert_eq!(levels(topic.as_str()), levels(template), "{topic:?}");
    }
}

/// A command is carried out only on a point, within a range and for a time that are allowed, whatever it says.
pub(crate) fn command(data: &[u8]) {
    let [age, flags, payload @ ..] = data else { return };
    let point = |name: &str, index, allowed| WritablePoint {
        name: name.to_owned(),
        index: PointIndex(index),
        line: 0,
        allowed,
    };
    let settings = command::Settings {
        points: vec![
            point("line1/pump/on", 0, Allowed::Bool),
            point("line1/pump/setpoint", 1, Allowed::Number { min: -10.0, max: 40.5 }),
        ],
        ttl: Duration::from_secs(30),
        max_ttl: Duration::from_secs(600),
        answer_topic: Topic::new("fieldpost/g/answer").expect("a topic"),
        response_topics: vec!["plant/answers/".to_owned()],
    };
    let now = Stamp { wall_ms: 1_795_255_200_000, mono_ms: 1_000_000, synchronised: flags & 2 != 0 };
    let retain = flags & 1 != 0;
    let age_ms = (*age != 255).then_some(u64::from(*age) * 1000);
    let verdict = Judge::new(settings.clone()).judge(&Asked { payload, retain, age_ms, now });
    if let Some(id) = &verdict.id {
        assert!(
            (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_graphic() || c == ' '),
            "{id:?}"
        );
    }
    if let Ok(order) = &verdict.outcome {
        assert!(!retain && age_ms.is_some_and(|age| age < 600_000) && verdict.id.is_some());
        let left_ms = order.not_after_mono_ms - now.mono_ms;
        assert!((1..=600_000).contains(&left_ms), "{left_ms}");
        match (order.point.0, &order.value) {
            (0, Value::Bool(_)) => {}
            (1, value) => {
                assert!((-10.0..=40.5).contains(&value.as_f64()) && !matches!(value, Value::Bool(_)))
            }
            other => panic!("{other:?}"),
        }
    }
    if let Ok(text) = std::str::from_utf8(payload) {
        let reply_to = Judge::new(settings).reply_to(Some(text));
        let topic = reply_to.topic.as_str();
        assert!(topic == "fieldpost/g/answer" || topic.starts_with("plant/answers/"), "{topic}");
        assert!(Topic::new(topic).is_ok());
    }
}

/// Registers become a finite value or a fault, whatever a device sends, and only where their number fits; any number
/// is written as the nearest that they can hold, or not at all.
pub(crate) fn registers(data: &[u8]) {
    let [kind, order, scale, words @ ..] = data else { return };
    const KINDS: [Kind; 6] = [Kind::Bool, Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32];
    const ORDERS: [Order; 4] = [Order::Abcd, Order::Cdab, Order::Badc, Order::Dcba];
    const SCALES: [Option<f64>; 6] = [None, Some(0.1), Some(-0.01), Some(1e300), Some(1e-300), Some(3.0)];
    let encoding = Encoding {
        kind: KINDS[usize::from(*kind) % KINDS.len()],
        order: ORDERS[usize::from(*order) % ORDERS.len()],
        scale: SCALES[usize::from(*scale) % SCALES.len()],
    };
    let registers: Vec<u16> =
        words.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
    if let Ok(value) = encoding.decode_registers(&registers) {
        assert!(value.as_f64().is_finite());
        assert_eq!(registers.len(), usize::from(encoding.words()));
        // What can be written at all is read again as what the registers hold.
        if let Ok(words) = encoding.encode(&value) {
            let again = encoding.decode(&words).expect("what was encoded is decoded");
            let (read, written) = (again.as_f64(), value.as_f64());
            let near = (read - written).abs() <= 1e-6 * written.abs().max(f64::MIN_POSITIVE);
            assert!(near, "{written} was written and {read} is read");
        }
    }
    let bit = words.first().is_some_and(|byte| byte & 1 != 0);
    assert_eq!(encoding.decode_bit(bit).is_ok(), encoding.kind == Kind::Bool);
    assert_eq!(encoding.encode(&Value::Bool(bit)).is_ok(), encoding.kind == Kind::Bool);
    let Some(number) = words.first_chunk().map(|bytes| f64::from_be_bytes(*bytes)) else { return };
    if let Ok(words) = encoding.encode(&Value::Float(number)) {
        assert!(number.is_finite() && encoding.kind != Kind::Bool);
        // The nearest that the registers can hold, or one that overflows when it is scaled.
        if let Ok(again) = encoding.decode(&words) {
            let scale = encoding.scale.unwrap_or(1.0).abs();
            let step = if encoding.kind == Kind::F32 { 1e-44 } else { 0.5 };
            let off = (again.as_f64() - number).abs();
            assert!(
                off <= step * scale + 1e-6 * number.abs(),
                "{number} was asked for and {again} is written"
            );
        }
    }
}

fn id(number: u16) -> PacketId {
    PacketId::new(number.max(1)).expect("it is not zero")
}

fn settings(protocol: Protocol) -> Settings {
    let topic = |name| Topic::new(name).expect("a topic");
    Settings {
        protocol,
        keep_alive_ms: 60_000,
        ack_timeout_ms: 20_000,
        max_in_flight: 20,
        qos2_window: 10,
        limits: Limits::default(),
        clean_start: false,
        on_session_loss: OnSessionLoss::Republish,
        retry_refused_for_ms: 60_000,
        canary: topic("box/canary"),
        presence: topic("box/state"),
        commands: vec![("cmd/#".to_owned(), Qos::ExactlyOnce)],
        broken: None,
    }
}

fn record(seq: u64, qos: Qos) -> Record {
    Record {
        lane: Lane::Normal,
        seq: Seq(seq),
        topic: Topic::new(if seq.is_multiple_of(3) { "a" } else { "b" }).expect("a topic"),
        qos,
        retain: false,
        at_ms: 0,
        expires_s: None,
        correlation_data: None,
        payload: Bytes::from(seq.to_string()),
    }
}

/// What a store could say at the beginning of a connection.
fn begin(choice: u8) -> Begin {
    let row = |number: u16, seq: u64, state: RowState| Resume::Row {
        id: id(number),
        state,
        send_no: seq,
        record: (state == RowState::Published).then(|| record(seq, Qos::ExactlyOnce)),
        lane: Lane::Normal,
        seq: Seq(seq),
    };
    Begin {
        clean_start_needed: choice & 1 != 0,
        session_uncertain: choice & 2 != 0,
        canary_proven: choice & 4 != 0,
        resume: match choice & 8 {
            0 => Vec::new(),
            _ => vec![
                row(2000, 1, RowState::Published),
                row(2001, 2, RowState::Received),
                Resume::Older(record(3, Qos::AtLeastOnce)),
                row(2002, 4, RowState::Abandoned),
            ],
        },
        rx_open: if choice & 16 != 0 { vec![(id(7), 7)] } else { Vec::new() },
        boot: 1,
        epoch: 1,
        queued: 4,
    }
}

fn connack(choice: u8) -> ConnAck {
    let limits = match choice & 0x30 {
        0x10 => Limits { receive_max: Some(u16::from(choice & 7) + 1), ..Limits::default() },
        0x20 => Limits { max_qos: Some(choice & 1), retain_available: Some(false), ..Limits::default() },
        0x30 => Limits { max_packet_bytes: Some(16), keep_alive_s: Some(1), ..Limits::default() },
        _ => Limits::default(),
    };
    ConnAck { session_present: choice & 0x40 != 0, reason: ReasonCode(0), reason_string: None, limits }
}

/// Any bytes a broker sends are packets or an error to the link, and packets or an error to the session.
pub(crate) fn inbound(data: &[u8]) {
    let [version, beginning, greeting, bytes @ ..] = data else { return };
    let protocol = if version & 1 == 0 { Protocol::V5 } else { Protocol::V311 };
    let mut session = Session::new(settings(protocol), 1, 1, begin(*beginning), Carry::default(), 0);
    if session.on_packet(Packet::ConnAck(connack(*greeting)), 0).is_err() {
        return;
    }
    let mut link = Link::new(Cursor::new(bytes.to_vec()), protocol, 4096);
    let mut seen = 0;
    while let Some(Ok(packet)) = link.next().now_or_never() {
        seen += 1;
        assert!(seen <= bytes.len(), "more packets than bytes");
        if session.on_packet(packet, seen as u64).is_err() {
            break;
        }
        let mut oracle = Oracle::default();
        oracle.run_to_rest(&mut session, seen as u64);
        while session.next_packet().is_some() {}
    }
}

/// What a session may do, judged by what went in and came out.
#[derive(Default)]
struct Oracle {
    offer: Option<Offer>,
    next_seq: u64,
    /// Changes handed over and not committed yet.
    uncommitted: Vec<Change>,
    /// QoS 2 identifiers whose PUBLISH left on this connection and whose exchange has not ended.
    published: BTreeMap<u16, Exchange>,
    /// QoS 1 identifiers sent and not acknowledged.
    unacknowledged: BTreeSet<u16>,
}

#[derive(Default)]
struct Exchange {
    received: bool,
    committed: bool,
    released: bool,
}

impl Oracle {
    fn turn(&mut self, session: &mut Session) {
        if let Some((changes, offer)) = session.turn() {
            assert!(self.uncommitted.is_empty() || changes.is_empty(), "two commits at once");
            self.uncommitted.extend(changes);
            if let Some(offer) = offer {
                assert!(self.offer.is_none(), "two offers at once");
                let distinct: BTreeSet<u16> = offer.ids.iter().map(|id| id.get()).collect();
                assert_eq!(distinct.len(), offer.ids.len(), "an identifier offered twice");
                let used = |number: &u16| {
                    self.published.contains_key(number) || self.unacknowledged.contains(number)
                };
                assert!(!distinct.iter().any(used), "an identifier in use is offered");
                self.offer = Some(offer);
            }
        }
    }

    fn commit(&mut self, session: &mut Session, now_ms: u64) {
        if self.uncommitted.is_empty() {
            return;
        }
        for change in std::mem::take(&mut self.uncommitted) {
            if let Change::Received(id) | Change::Abandoned(id) = change
                && let Some(exchange) = self.published.get_mut(&id.get())
            {
                exchange.committed = true;
            }
        }
        session.on_committed(&[], now_ms);
    }

    fn take(&mut self, session: &mut Session, choice: u8, now_ms: u64) {
        let Some(offer) = self.offer.take() else { return };
        let count = usize::from(choice % 8).min(offer.ids.len());
        let mut qos2_room = offer.qos2_room;
        let mut taken = Vec::new();
        for id in offer.ids.into_iter().take(count) {
            self.next_seq += 1;
            let wished = if (u64::from(choice) + self.next_seq).is_multiple_of(2) { 2 } else { 1 };
            let qos = if wished == 2 && qos2_room > 0 { Qos::ExactlyOnce } else { Qos::AtLeastOnce }
                .min(offer.max_qos);
            qos2_room -= usize::from(qos == Qos::ExactlyOnce);
            let seq = 100 + self.next_seq;
            taken.push(Taken { id, send_no: seq, qos, record: record(seq, qos.max(Qos::AtLeastOnce)) });
        }
        session.on_taken(taken, now_ms);
    }

    fn sent(&mut self, packet: &Packet) {
        match packet {
            Packet::Publish(publish) => match (publish.qos, publish.id) {
                (Qos::ExactlyOnce, Some(id)) => {
                    let twice = self.published.insert(id.get(), Exchange::default()).is_some();
                    assert!(!twice && !self.unacknowledged.contains(&id.get()), "PUBLISH {id} sent twice");
                }
                (Qos::AtLeastOnce, Some(id)) => {
                    let once = self.unacknowledged.insert(id.get());
                    assert!(once && !self.published.contains_key(&id.get()), "PUBLISH {id} sent twice");
                }
                _ => {}
            },
            Packet::PubRel(id, _) => {
                if let Some(exchange) = self.published.get_mut(&id.get()) {
                    let of_ours = id.get() >= 1024;
                    assert!(exchange.received, "PUBREL {id} before PUBREC");
                    assert!(exchange.committed || !of_ours, "PUBREL {id} before its commit");
                    exchange.released = true;
                }
            }
            _ => {}
        }
    }

    fn heard(&mut self, packet: &Packet) {
        match packet {
            Packet::PubAck(id, _) => {
                self.unacknowledged.remove(&id.get());
            }
            Packet::PubRec(id, reason) if reason.is_error() => {
                self.end_if(*id, |exchange| !exchange.received);
            }
            Packet::PubRec(id, _) => {
                let exchange = self.published.get_mut(&id.get());
                exchange.into_iter().for_each(|exchange| exchange.received = true);
            }
            Packet::PubComp(id, _) => self.end_if(*id, |exchange| exchange.released),
            _ => {}
        }
    }

    fn end_if(&mut self, id: PacketId, is_over: impl Fn(&Exchange) -> bool) {
        self.published.retain(|number, exchange| *number != id.get() || !is_over(exchange));
    }

    fn run_to_rest(&mut self, session: &mut Session, now_ms: u64) {
        for _ in 0..64 {
            self.turn(session);
            if self.uncommitted.is_empty() {
                return;
            }
            self.commit(session, now_ms);
        }
        panic!("the session never comes to rest");
    }
}

/// Whatever a broker says in whatever order, and whenever commits return: nothing is sent twice on a connection, no
/// PUBREL leaves before its PUBREC is committed, no identifier is used for two messages.
pub(crate) fn session(data: &[u8]) {
    run_session(data, None);
}

/// The negative control: the same with a session that breaks the order.
pub(crate) fn broken_session(data: &[u8]) {
    run_session(data, Some(Broken::PubrelAfterCommit));
}

fn run_session(data: &[u8], broken: Option<Broken>) {
    let [version, beginning, greeting, steps @ ..] = data else { return };
    let protocol = if version & 1 == 0 { Protocol::V5 } else { Protocol::V311 };
    let settings = Settings { broken, ..settings(protocol) };
    let mut session = Session::new(settings, 1, 1, begin(*beginning), Carry::default(), 0);
    if session.on_packet(Packet::ConnAck(connack(*greeting)), 0).is_err() {
        return;
    }
    let (mut oracle, mut now_ms) = (Oracle::default(), 0);
    let mut sent_ids: Vec<u16> = vec![2000, 2001, 2002];
    let mut subscribes: Vec<(PacketId, usize)> = Vec::new();
    let mut canary = None;
    for step in steps.chunks(3) {
        let (what, which, how) =
            (step[0], step.get(1).copied().unwrap_or(0), step.get(2).copied().unwrap_or(0));
        let known = |ids: &[u16]| id(ids[usize::from(which) % ids.len()]);
        let number = if how & 0x40 != 0 { id(u16::from(which) << 4) } else { known(&sent_ids) };
        const REASONS: [u8; 16] =
            [0, 0, 0, 0, 0, 0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x92, 0x93, 0x97, 0x99];
        let reason = ReasonCode(REASONS[usize::from(how) % 16]);
        let packet = match what % 16 {
            0 => Some(Packet::PubAck(number, reason)),
            1 | 2 => Some(Packet::PubRec(number, reason)),
            3 => Some(Packet::PubComp(number, reason)),
            4 => Some(Packet::PubRel(id(u16::from(which % 4) + 6), ReasonCode::SUCCESS)),
            5 => Some(Packet::Publish(Box::new(Publish {
                dup: how & 1 != 0,
                qos: Qos::from_number(u64::from(how >> 1) % 3).expect("0 to 2"),
                retain: how & 8 != 0,
                topic: Topic::new(["cmd/x", "box/state", "other"][usize::from(how >> 4) % 3])
                    .expect("a topic"),
                id: (u64::from(how >> 1) % 3 > 0).then(|| id(u16::from(which % 4) + 6)),
                payload: Bytes::copy_from_slice(&[which]),
                message_expiry_s: None,
                response_topic: None,
                correlation_data: None,
            }))),
            6 => canary.clone().map(|publish: Publish| {
                Packet::Publish(Box::new(Publish { qos: Qos::AtMostOnce, id: None, ..publish }))
            }),
            7 => subscribes.pop().map(|(id, filters)| Packet::SubAck(id, vec![ReasonCode(how % 3); filters])),
            8 => Some(Packet::PingResp),
            9 if how == 0xff => Some(Packet::Disconnect(ReasonCode(which))),
            _ => None,
        };
        if let Some(packet) = packet {
            oracle.heard(&packet);
            if session.on_packet(packet, now_ms).is_err() {
                return;
            }
        }
        match what % 16 {
            10 => oracle.turn(&mut session),
            11 => oracle.commit(&mut session, now_ms),
            12 => oracle.take(&mut session, which, now_ms),
            13 => {
                now_ms += u64::from(which) * u64::from(how);
                if session.tick(now_ms).is_err() {
                    return;
                }
            }
            14 => {
                let topic = Topic::new("box/state").expect("a topic");
                session.publish_presence(topic, Bytes::from_static(b"online"), true, now_ms);
            }
            15 => oracle.run_to_rest(&mut session, now_ms),
            _ => {}
        }
        for packet in std::iter::from_fn(|| session.next_packet()) {
            oracle.sent(&packet);
            match &packet {
                Packet::Publish(publish) => {
                    sent_ids.extend(publish.id.map(PacketId::get));
                    if publish.topic.as_str() == "box/canary" {
                        canary = Some((**publish).clone());
                    }
                }
                Packet::Subscribe(id, filters) => subscribes.push((*id, filters.len())),
                _ => {}
            }
        }
        session.on_written(now_ms);
        drop(session.take_events());
        assert!(session.in_flight() <= 20 + 8, "{} in flight", session.in_flight());
    }
}
