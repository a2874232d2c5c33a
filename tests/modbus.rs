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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use device::{Answer, Asked, TcpDevice, slow_rtu_unit};
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
