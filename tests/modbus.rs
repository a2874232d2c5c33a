//! A Modbus line against real servers (pymodbus over TCP and over a pair of pseudo terminals), and against
//! devices that misbehave. Holds P7 (the field never waits) and P9 (no stale value, no wrong one).

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on has found the failure")]
#![allow(unreachable_pub, reason = "helpers are modules of this one test")]

#[path = "support_modbus/device.rs"]
mod device;
#[path = "support_modbus/harness.rs"]
mod harness;
#[path = "support_modbus/pty.rs"]
mod pty;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use device::{Answer, Asked, TcpDevice, slow_rtu_unit};
use fieldpost::command::{Outcome, Ticket};
use fieldpost::point::{Fault, PointIndex, Sample, Value};
use fieldpost::source::modbus::register::{Kind, Order};
use fieldpost::source::modbus::{LateReplies, LinePoint, Space, Transport};
use harness::{Running, Server, holding, line, point, rtu, tcp, unit};
use pty::{Cable, Pty};
use tokio::sync::mpsc;

/// Every type in every order and table, with what `server.py` holds there.
fn every_type() -> Vec<(LinePoint, Value)> {
    let mut table = Vec::new();
    let mut add = |space, address, kind, order, value| {
        table.push((point(table.len(), space, address, kind, order), value));
    };
    let content = [
        (Space::Input, 65535, -12345, 0xDEAD_BEEF, -123_456_789, 230.1),
        (Space::Holding, 4242, -1, 4_000_000_001, -2, -0.05),
    ];
    for (space, u16, i16, u32, i32, f32) in content {
        add(space, 0, Kind::U16, Order::Abcd, Value::Integer(u16));
        add(space, 1, Kind::I16, Order::Abcd, Value::Integer(i16));
        for (n, order) in [Order::Abcd, Order::Cdab, Order::Badc, Order::Dcba].into_iter().enumerate() {
            let address = 10 + 6 * n as u16;
            add(space, address, Kind::U32, order, Value::Integer(u32));
            add(space, address + 2, Kind::I32, order, Value::Integer(i32));
            add(space, address + 4, Kind::F32, order, Value::Float(f32));
        }
    }
    for bit in 0..11 {
        add(Space::Coil, bit, Kind::Bool, Order::Abcd, Value::Bool(bit % 3 == 0));
        add(Space::DiscreteInput, bit, Kind::Bool, Order::Abcd, Value::Bool(bit % 2 == 0));
    }
    table
}

async fn values_are_exact(transport: Transport) {
    let (points, expected): (Vec<_>, Vec<_>) = every_type().into_iter().unzip();
    let mut running = Running::new(line(transport, 2_000, vec![unit(1, points)]));
    let mut found = BTreeMap::new();
    let last = PointIndex(expected.len() - 1);
    running
        .sample_that("is the last", |s| s.point == last, |s| drop(found.insert(s.point, s.value.clone())))
        .await;
    for (index, expected) in expected.into_iter().enumerate() {
        assert_eq!(found[&PointIndex(index)], Ok(expected), "point {index}");
    }
    let status = running.status_that("is ok", |status| status.units[0].ok).await;
    assert!(status.up && status.units[0].last_error.is_none() && status.units[0].last_ok.is_some());
}

#[tokio::test]
async fn values_of_every_type_and_order_are_exact_over_tcp() {
    let server = Server::tcp(0).await;
    values_are_exact(tcp(server.port)).await;
}

#[tokio::test]
async fn values_of_every_type_and_order_are_exact_over_rtu() {
    let cable = Cable::new();
    let _server = Server::rtu(&cable.there).await;
    values_are_exact(rtu(&cable.here)).await;
}

/// Unit 9 is dead, and read as often as unit 1: polled like the others it would take the whole line.
async fn a_dead_unit_does_not_slow_the_others(transport: Transport) {
    let units = vec![unit(9, vec![holding(0, 0)]), unit(1, vec![holding(1, 0)])];
    let mut running = Running::new(line(transport, 300, units));
    running.bad(0, |fault| matches!(fault, Fault::Timeout { waited_ms: 300.. })).await;
    running.bad(0, |fault| matches!(fault, Fault::Resting { failures: 3 })).await;
    let samples = running.samples_during(Duration::from_secs(6)).await;
    let (dead, alive): (Vec<&Sample>, Vec<&Sample>) = samples.iter().partition(|s| s.point == PointIndex(0));
    assert!(dead.iter().all(|s| s.value.is_err()), "a dead unit has no values");
    assert!(alive.iter().all(|s| s.value == Ok(Value::Integer(4242))), "the other is not disturbed");
    // 60 polls were due; with a timeout each for unit 9 there would have been 15 on TCP and 9 on RTU.
    assert!(alive.len() >= 35, "the living unit was read {} times in 6 s", alive.len());
    assert!(dead.len() >= 35, "the dead unit was reported {} times in 6 s", dead.len());
    let status = running.status.borrow().clone();
    assert!(status.up && !status.units[0].ok && status.units[1].ok, "{status:?}");
    assert!(status.units[0].last_error.as_ref().unwrap().starts_with("no answer within"), "{status:?}");
}

#[tokio::test]
async fn a_dead_unit_does_not_slow_the_others_on_tcp() {
    let server = Server::tcp(0).await;
    a_dead_unit_does_not_slow_the_others(tcp(server.port)).await;
}

#[tokio::test]
async fn a_dead_unit_does_not_slow_the_others_on_rtu() {
    let cable = Cable::new();
    let _server = Server::rtu(&cable.there).await;
    a_dead_unit_does_not_slow_the_others(rtu(&cable.here)).await;
}

#[tokio::test]
async fn a_unit_that_returns_is_read_again_at_once() {
    let awake = Arc::new(AtomicBool::new(false));
    let is_awake = Arc::clone(&awake);
    let server = TcpDevice::new(move |asked: Asked| match is_awake.load(Ordering::Relaxed) {
        true => asked.addresses(),
        false => Answer::Silence,
    })
    .await;
    let units = vec![unit(1, vec![holding(0, 7), holding(1, 9)])];
    let mut running = Running::new(line(tcp(server.port), 50, units));
    running.bad(1, |fault| matches!(fault, Fault::Resting { .. })).await;
    awake.store(true, Ordering::Relaxed);
    assert_eq!(running.good(0).await, Value::Integer(7));
    let after = running.samples_during(Duration::from_secs(1)).await;
    assert!(after.iter().all(|s| s.value.is_ok()), "both points are good from then on: {after:?}");
}

#[tokio::test]
async fn an_address_that_is_never_answered_does_not_silence_its_unit() {
    let server = TcpDevice::new(|asked: Asked| match asked.address {
        100 => Answer::Silence,
        _ => asked.addresses(),
    })
    .await;
    let units = vec![unit(1, vec![holding(0, 100), holding(1, 200)])];
    let mut running = Running::new(line(tcp(server.port), 200, units));
    running.good(1).await;
    let samples = running.samples_during(Duration::from_secs(6)).await;
    let good = samples.iter().filter(|s| s.value.is_ok()).count();
    assert!(samples.iter().all(|s| s.value.is_ok() == (s.point == PointIndex(1))), "{samples:?}");
    assert!(good >= 35, "the other address was read {good} times in 6 s, of 60");
}

#[tokio::test]
async fn a_gateway_s_word_that_a_unit_is_silent_counts_as_silence() {
    let server = TcpDevice::new(|asked: Asked| asked.exception(0x0B)).await;
    let mut running = Running::new(line(tcp(server.port), 500, vec![unit(1, vec![holding(0, 0)])]));
    running.bad(0, |fault| *fault == Fault::Exception { code: 0x0B }).await;
    running.bad(0, |fault| matches!(fault, Fault::Resting { failures: 3 })).await;
    assert_eq!(server.connections.load(Ordering::Relaxed), 1, "the connection is in step");
}

#[tokio::test]
async fn a_vanished_server_is_reported_and_found_again() {
    let server = Server::tcp(0).await;
    let port = server.port;
    let mut running = Running::new(line(tcp(port), 500, vec![unit(1, vec![holding(0, 0)])]));
    running.good(0).await;
    server.kill().await;
    let fault = running.bad(0, |fault| matches!(fault, Fault::LineDown { .. })).await;
    let place = format!("line down: 127.0.0.1:{port}: ");
    assert!(fault.to_string().starts_with(&place), "{fault}");
    let status = running.status_that("is down", |status| !status.up).await;
    assert!(status.error.as_ref().unwrap().contains("Connection refused"), "{status:?}");
    let _server = Server::tcp(port).await;
    assert_eq!(running.good(0).await, Value::Integer(4242));
    running.status_that("is up", |status| status.up && status.error.is_none() && status.units[0].ok).await;
}

#[tokio::test]
async fn a_vanished_port_is_named_and_opened_when_it_returns() {
    let folder = tempfile::tempdir().unwrap();
    let device = folder.path().join("ttyUSB0");
    let mut running = Running::new(line(rtu(&device), 500, vec![unit(1, vec![holding(0, 0)])]));
    let missing = format!("{} is missing: No such file or directory; will be opened", device.display());
    for _ in 0..2 {
        running.bad(0, |fault| matches!(fault, Fault::LineDown { what } if what.starts_with(&missing))).await;
        assert!(!running.status.borrow().up);
        let cable = Cable::new();
        let server = Server::rtu(&cable.there).await;
        std::os::unix::fs::symlink(&cable.here, &device).unwrap();
        assert_eq!(running.good(0).await, Value::Integer(4242));
        running.status_that("is up", |status| status.up && status.error.is_none()).await;
        std::fs::remove_file(&device).unwrap();
        drop(cable);
        server.kill().await;
    }
}

#[tokio::test]
async fn a_port_is_opened_by_one_program_only() {
    let cable = Cable::new();
    let _server = Server::rtu(&cable.there).await;
    let mut first = Running::new(line(rtu(&cable.here), 500, vec![unit(1, vec![holding(0, 0)])]));
    first.good(0).await;
    let mut second = Running::new(line(rtu(&cable.here), 500, vec![unit(1, vec![holding(0, 0)])]));
    let fault = second.bad(0, |_| true).await;
    assert!(fault.to_string().contains("does another program use it?"), "{fault}");
    assert_eq!(first.good(0).await, Value::Integer(4242));
}

#[tokio::test]
async fn one_missing_address_does_not_cost_its_neighbours() {
    let server = Server::tcp(0).await;
    let points = (0..4).map(|n| holding(n.into(), n)).collect();
    let mut running = Running::new(line(tcp(server.port), 2_000, vec![unit(3, points)]));
    for (point, value) in [(0, 100), (1, 101), (3, 103)] {
        assert_eq!(running.good(point).await, Value::Integer(value));
    }
    let fault = running.bad(2, |_| true).await;
    assert_eq!(fault, Fault::Exception { code: 2 });
    let samples = running.samples_during(Duration::from_secs(1)).await;
    assert!(samples.iter().all(|s| s.value.is_ok() == (s.point != PointIndex(2))), "{samples:?}");
    let error = running.status.borrow().units[0].last_error.clone().unwrap();
    assert!(error.starts_with("point2: the unit refused: exception 2 (illegal data address"), "{error}");
}

#[tokio::test]
async fn a_refused_block_is_split_once_and_for_all() {
    let (tell, mut told) = mpsc::channel(1_000);
    let server = TcpDevice::new(move |asked: Asked| {
        tell.try_send((asked.address, asked.count)).unwrap();
        let has_it = !(asked.address..asked.address + asked.count).contains(&5);
        if has_it { asked.addresses() } else { asked.exception(2) }
    })
    .await;
    let points = (0..8).map(|n| holding(n.into(), n)).collect();
    let mut running = Running::new(line(tcp(server.port), 2_000, vec![unit(1, points)]));
    for _ in 0..3 {
        running.good(7).await;
    }
    drop(running);
    let mut asked = Vec::new();
    while let Ok(read) = told.try_recv() {
        asked.push(read);
    }
    let first = [(0, 8), (0, 4), (4, 4), (4, 2), (4, 1), (5, 1), (6, 2)];
    let then = [(0, 4), (4, 1), (5, 1), (6, 2)];
    assert_eq!(asked[..15], [&first[..], &then[..], &then[..]].concat());
}

/// Two values of a unit that answers address 100 after 350 ms, with a timeout of 200 ms.
async fn values_beside_a_late_reply(late_replies: LateReplies) -> BTreeSet<String> {
    let pty = Pty::new();
    let points = vec![holding(0, 100), holding(1, 200)];
    let mut line = line(rtu(&pty.path), 200, vec![unit(1, points)]);
    line.late_replies = late_replies;
    let late = |asked: Asked| match asked.address {
        100 => Duration::from_millis(350),
        _ => Duration::from_millis(50),
    };
    let device = tokio::spawn(slow_rtu_unit(pty, late));
    let mut running = Running::new(line);
    let mut values = BTreeSet::new();
    let mut seen = |s: &Sample| values.extend(s.value.iter().map(|value| format!("{:?} {value}", s.point)));
    for _ in 0..10 {
        running.sample_that("is of point 1", |s| s.point == PointIndex(1), &mut seen).await;
    }
    device.abort();
    values
}

#[tokio::test]
async fn a_late_reply_is_never_taken_for_another_answer() {
    let values = values_beside_a_late_reply(LateReplies::Discard).await;
    assert_eq!(values, BTreeSet::from(["PointIndex(1) 200".to_owned()]));
}

/// The negative control of the test above: it would notice.
#[tokio::test]
async fn without_the_silence_after_a_timeout_late_replies_become_wrong_values() {
    let values = values_beside_a_late_reply(LateReplies::Trust).await;
    assert!(values.contains("PointIndex(1) 100"), "{values:?}");
}

#[tokio::test]
async fn a_reply_with_a_wrong_number_of_registers_is_no_value() {
    for count in [0, 2, 125] {
        let server = TcpDevice::new(move |asked: Asked| asked.registers(&vec![1; count])).await;
        let mut running = Running::new(line(tcp(server.port), 1_000, vec![unit(1, vec![holding(0, 0)])]));
        let samples = running.samples_during(Duration::from_secs(1)).await;
        assert!(!samples.is_empty(), "the point is reported all the same");
        let what = format!("{count} registers instead of 1");
        assert!(
            samples.iter().all(|s| s.value == Err(Fault::BadReply { what: what.clone() })),
            "{samples:?}"
        );
    }
}

#[tokio::test]
async fn nonsense_instead_of_a_reply_is_no_value() {
    let nonsense: [&[u8]; 7] = [&[], &[3], &[3, 2], &[3, 1, 0], &[4, 2, 0, 1], &[0x83], &[3, 250, 0, 1]];
    for pdu in nonsense {
        let server = TcpDevice::new(|_| Answer::Pdu(pdu.to_vec())).await;
        let mut running = Running::new(line(tcp(server.port), 300, vec![unit(1, vec![holding(0, 0)])]));
        let fault = running.bad(0, |_| true).await;
        assert!(matches!(fault, Fault::BadReply { .. }), "{pdu:02x?}: {fault}");
    }
}

#[tokio::test]
async fn a_server_that_closes_idle_connections_costs_no_sample() {
    let server = TcpDevice::new(|asked: Asked| match asked.addresses() {
        Answer::Pdu(pdu) => Answer::Last(pdu),
        other => other,
    })
    .await;
    let mut running = Running::new(line(tcp(server.port), 1_000, vec![unit(1, vec![holding(0, 5)])]));
    let samples = running.samples_during(Duration::from_secs(2)).await;
    assert!(samples.len() >= 5 && samples.iter().all(|s| s.value == Ok(Value::Integer(5))), "{samples:?}");
}

#[tokio::test]
async fn polling_does_not_wait_for_a_full_pipeline() {
    let server = TcpDevice::new(Asked::addresses).await;
    let points = vec![holding(0, 5)];
    let mut running = Running::with_room_for(1, line(tcp(server.port), 1_000, vec![unit(1, points)]));
    running.status_that("was polled ten times", |status| status.units[0].polls >= 10).await;
    assert!(running.stats.readings_overrun.get() >= 8);
    assert_eq!(running.good(0).await, Value::Integer(5));
}

#[tokio::test]
async fn a_line_stops_when_asked_even_while_it_waits_for_a_reply() {
    let server = TcpDevice::new(|_| Answer::Silence).await;
    let units = vec![unit(1, vec![holding(0, 5)])];
    let mut running = Running::new(line(tcp(server.port), 60_000, units));
    running.status_that("is up", |status| status.up).await;
    running.stop.send(true).unwrap();
    tokio::time::timeout(harness::PATIENCE, running.task).await.unwrap().unwrap();
}

/// A coil, a u16, an i32 with swapped words and a scaled f32, written and read back.
async fn writes_are_read_back(transport: Transport) {
    let mut points = vec![
        point(0, Space::Coil, 1, Kind::Bool, Order::Abcd),
        holding(1, 0),
        point(2, Space::Holding, 18, Kind::I32, Order::Cdab),
        point(3, Space::Holding, 14, Kind::F32, Order::Abcd),
        point(4, Space::Input, 0, Kind::U16, Order::Abcd),
    ];
    points[3].encoding.scale = Some(0.1);
    let mut running = Running::new(line(transport, 2_000, vec![unit(1, points)]));
    let table = [
        (0, Value::Bool(true)),
        (0, Value::Bool(false)),
        (1, Value::Integer(777)),
        (2, Value::Integer(-123_456)),
        (3, Value::Float(23.01)),
    ];
    for (point, value) in table {
        let done = Outcome::Done { read_back: value.clone() };
        assert_eq!(running.write(point, value.clone()).await, done, "point {point}");
        let index = PointIndex(point);
        let polled = |s: &Sample| s.point == index && s.value.as_ref() == Ok(&value);
        running.sample_that("holds what was written", polled, |_| ()).await;
    }
    let nearest = Outcome::Done { read_back: Value::Integer(3) };
    assert_eq!(running.write(1, Value::Float(2.5)).await, nearest);
    for (point, value) in [
        (0, Value::Integer(1)),
        (1, Value::Integer(65_536)),
        (1, Value::Integer(2_000_000_000)),
        (4, Value::Integer(1)),
        (5, Value::Integer(1)),
    ] {
        let outcome = running.write(point, value).await;
        let Outcome::Failed { reason, read_back: None } = outcome else { panic!("{outcome:?}") };
        assert!(reason.starts_with("nothing was sent: "), "{reason}");
    }
}

#[tokio::test]
async fn writes_of_every_kind_are_read_back_over_tcp() {
    let server = Server::tcp(0).await;
    writes_are_read_back(tcp(server.port)).await;
}

#[tokio::test]
async fn writes_of_every_kind_are_read_back_over_rtu() {
    let cable = Cable::new();
    let _server = Server::rtu(&cable.there).await;
    writes_are_read_back(rtu(&cable.here)).await;
}

/// A device with one register that counts the writes it gets and answers them by `reply`.
async fn register_device(
    reply: impl Fn(Asked, &AtomicU16) -> Answer + Send + Sync + 'static,
) -> (TcpDevice, Arc<AtomicUsize>) {
    let (register, writes) = (AtomicU16::new(5), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&writes);
    let device = TcpDevice::new(move |asked: Asked| {
        if asked.function == 6 {
            count.fetch_add(1, Ordering::Relaxed);
            return reply(asked, &register);
        }
        asked.registers(&[register.load(Ordering::Relaxed)])
    })
    .await;
    (device, writes)
}

async fn outcome_of_writing_seven(
    reply: impl Fn(Asked, &AtomicU16) -> Answer + Send + Sync + 'static,
) -> Outcome {
    let (device, writes) = register_device(reply).await;
    let mut running = Running::new(line(tcp(device.port), 300, vec![unit(1, vec![holding(0, 9)])]));
    running.good(0).await;
    let outcome = running.write(0, Value::Integer(7)).await;
    for _ in 0..3 {
        running.good(0).await;
    }
    assert_eq!(writes.load(Ordering::Relaxed), 1, "sent exactly once: {outcome:?}");
    outcome
}

#[tokio::test]
async fn a_write_is_sent_once_whatever_becomes_of_it() {
    let carry_out = |asked: Asked, register: &AtomicU16| register.store(asked.count, Ordering::Relaxed);
    let done = Outcome::Done { read_back: Value::Integer(7) };
    let cut_after = move |asked: Asked, register: &AtomicU16| {
        carry_out(asked, register);
        Answer::Cut
    };
    assert_eq!(outcome_of_writing_seven(cut_after).await, done);
    let unknown = |outcome: &Outcome| matches!(outcome, Outcome::Unknown { .. });
    let failed = |outcome: &Outcome| matches!(outcome, Outcome::Failed { read_back: None, .. });
    for outcome in [
        outcome_of_writing_seven(|_, _| Answer::Cut).await,
        outcome_of_writing_seven(|_, _| Answer::Silence).await,
        outcome_of_writing_seven(|asked, _| asked.exception(4)).await,
        outcome_of_writing_seven(|asked, _| asked.exception(5)).await,
        outcome_of_writing_seven(|asked, _| asked.exception(0x0B)).await,
        outcome_of_writing_seven(|asked, _| Answer::Pdu(vec![asked.function, 0, 9, 0, 8])).await,
    ] {
        assert!(unknown(&outcome), "{outcome:?}");
    }
    for code in [1, 2, 3, 6, 0x0A] {
        let outcome = outcome_of_writing_seven(move |asked, _| asked.exception(code)).await;
        assert!(failed(&outcome), "{outcome:?}");
    }
    let ignored = outcome_of_writing_seven(|asked, _| asked.echo()).await;
    assert!(matches!(ignored, Outcome::Failed { read_back: Some(Value::Integer(5)), .. }), "{ignored:?}");
}

#[tokio::test]
async fn a_write_whose_reply_is_late_on_a_serial_line_is_unknown_and_no_poll_is_wrong() {
    let pty = Pty::new();
    let line = line(rtu(&pty.path), 200, vec![unit(1, vec![holding(0, 200)])]);
    let late = |asked: Asked| Duration::from_millis(if asked.function == 6 { 350 } else { 20 });
    let device = tokio::spawn(slow_rtu_unit(pty, late));
    let mut running = Running::new(line);
    running.good(0).await;
    let outcome = running.write(0, Value::Integer(7)).await;
    let Outcome::Unknown { reason } = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("no answer within") && reason.contains("reads back as 200"), "{reason}");
    for _ in 0..5 {
        assert_eq!(running.good(0).await, Value::Integer(200));
    }
    device.abort();
}

#[tokio::test]
async fn a_write_to_a_line_or_unit_that_is_gone_has_failed_and_one_that_is_too_late_is_not_begun() {
    let mut running = Running::new(line(tcp(1), 300, vec![unit(1, vec![holding(0, 9)])]));
    let outcome = running.write(0, Value::Integer(7)).await;
    let Outcome::Failed { reason, .. } = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("Connection refused"), "{reason}");
    let silent = TcpDevice::new(|_| Answer::Silence).await;
    let mut running = Running::new(line(tcp(silent.port), 50, vec![unit(1, vec![holding(0, 9)])]));
    let outcome = running.write(0, Value::Integer(7)).await;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");

    let (device, writes) = register_device(|asked, _| asked.echo()).await;
    let mut running = Running::new(line(tcp(device.port), 300, vec![unit(1, vec![holding(0, 9)])]));
    let (ticket, value) = (Ticket(9), Value::Integer(7));
    let late = fieldpost::command::Write { ticket, point: PointIndex(0), value, not_after_mono_ms: Some(1) };
    running.writes.send(late).await.unwrap();
    let written = tokio::time::timeout(harness::PATIENCE, running.written.recv()).await.unwrap().unwrap();
    assert_eq!((written.ticket, written.outcome), (ticket, Outcome::Expired));
    assert_eq!(writes.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn polls_go_on_during_a_flood_of_writes() {
    let (device, writes) = register_device(|asked, register| {
        register.store(asked.count, Ordering::Relaxed);
        asked.echo()
    })
    .await;
    let points = vec![holding(0, 9), holding(1, 20)];
    let Running { mut readings, writes: to_line, mut written, status, stop, stats, .. } =
        Running::new(line(tcp(device.port), 1_000, vec![unit(1, points)]));
    let flood = tokio::spawn(async move {
        for n in 0u16.. {
            let (ticket, value) = (Ticket(n.into()), Value::Integer(n.into()));
            let point = PointIndex(0);
            let write = fieldpost::command::Write { ticket, point, value, not_after_mono_ms: None };
            if to_line.send(write).await.is_err() {
                break;
            }
        }
    });
    let answered = tokio::spawn(async move {
        let (mut next, mut done) = (0, 0);
        while let Some(written) = written.recv().await {
            assert_eq!(written.ticket, Ticket(next), "outcomes come in order, each once");
            next += 1;
            done += usize::from(matches!(written.outcome, Outcome::Done { .. }));
        }
        done
    });
    let deadline = tokio::time::Instant::now() + Duration::from_secs(3);
    while let Ok(Some(_)) = tokio::time::timeout_at(deadline, readings.recv()).await {}
    let polls = status.borrow().units[0].polls;
    stop.send(true).unwrap();
    let done = tokio::time::timeout(harness::PATIENCE, answered).await.unwrap().unwrap();
    flood.await.unwrap();
    let sent = writes.load(Ordering::Relaxed);
    let (skipped, overrun) = (stats.polls_skipped.get(), stats.readings_overrun.get());
    println!("{polls} of 30 polls in 3 s beside {done} writes, {skipped} skipped, {overrun} overrun");
    assert!(polls >= 25, "{polls} of 30 polls in 3 s beside {done} writes");
    assert!(done >= 30 && sent.abs_diff(done) <= 1, "{done} writes done, {sent} sent");
}
