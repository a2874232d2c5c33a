//! Clocks that are wrong: nothing expires early, the order stays, ages are sane, and once the clock is right, the
//! agent connects by itself and says what to add to the times it told before.
//!
//! The store is asked with stamps of our own. The agent's wall clock is wrong by a library below it
//! (`tests/support_faults/shim.c`), which leaves the monotonic clocks alone.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it
#![allow(unreachable_pub, dead_code, reason = "helpers are modules of this test and of another")]

#[path = "support_modbus/device.rs"]
mod device;
#[path = "support_modbus/pty.rs"]
mod pty;
mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use device::TcpDevice;
use fieldpost::clock::Stamp;
use fieldpost::control::wire::{LinkState, Status};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Settings, Store};
use fieldpost::turn::{Offer, Taken};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use support::agent::{Agent, Config, queued};
use support::faults::{Shim, Switch};
use support::mosquitto::{Mosquitto, Options, Subscriber, Tls};
use support::producer::{Outcome, Producer};
use support::wait_until;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// 2026-11-21T10:00:00Z
const TODAY_MS: i64 = 1_795_255_200_000;
const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;
const DECADE_MS: i64 = 3_652 * DAY_MS;

// ---- the store -------------------------------------------------------------------------------------------

fn open(folder: &Path) -> Store {
    Store::open(Settings::new(folder.join("outbox.db"))).unwrap()
}

fn right(wall_ms: i64, mono_ms: u64) -> Stamp {
    Stamp { wall_ms, mono_ms, synchronised: true }
}

/// Accepts one message that is worth sending for a day.
fn accept(store: &mut Store, text: &str, now: Stamp) {
    let message = Message {
        topic: Topic::new("t").unwrap(),
        qos: Qos::AtLeastOnce,
        retain: false,
        lane: Lane::Normal,
        at: now,
        expires_after: Some(Duration::from_secs(86_400)),
        correlation_data: None,
        payload: Payload::Whole(text.to_owned().into()),
    };
    let append = Append { messages: vec![message], closes: Vec::new() };
    store.commit(Batch { appends: vec![append], ..Batch::default() }, now).unwrap();
}

fn take(store: &mut Store, now: Stamp) -> Vec<Taken> {
    let offer = Offer {
        ids: (2000..2100).map(|id| PacketId::new(id).unwrap()).collect(),
        qos2_room: 100,
        max_bytes: 1 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    };
    store.commit(Batch { offer: Some(offer), ..Batch::default() }, now).unwrap().taken
}

fn oldest_age_ms(store: &Store, now: Stamp) -> Option<u64> {
    store.look(now).unwrap().lanes[1].oldest_age_ms
}

/// As after a reboot of the machine: its name for the boot is another one.
fn reboot(folder: &Path) {
    let db = rusqlite::Connection::open(folder.join("outbox.db")).unwrap();
    db.execute("UPDATE meta SET kernel_boot_id = 'the boot before'", []).unwrap();
}

#[test]
fn within_one_boot_the_wall_clock_may_jump_as_it_likes() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let walls = [
        0,
        TODAY_MS,
        TODAY_MS + DECADE_MS,
        TODAY_MS - DECADE_MS,
        TODAY_MS - HOUR_MS,
        -DECADE_MS,
        1_000 << 31, // 2038-01-19
        1_000 << 32,
        253_402_300_799_999, // the end of 9999
    ];
    for (n, wall_ms) in (0_u32..).zip(walls) {
        accept(&mut store, &n.to_string(), right(wall_ms, 1_000 + u64::from(n)));
    }
    for wall_ms in walls {
        assert_eq!(oldest_age_ms(&store, right(wall_ms, 61_000)), Some(60_000), "at {wall_ms}");
    }
    let taken = take(&mut store, right(TODAY_MS + 5 * DECADE_MS, 86_400_000));
    let texts: Vec<_> = taken.iter().map(|taken| taken.record.payload.to_vec()).collect();
    assert_eq!(texts, (0..walls.len()).map(|n| n.to_string().into_bytes()).collect::<Vec<_>>(), "in order");
    assert_eq!(taken.iter().map(|taken| taken.record.at_ms).collect::<Vec<_>>(), walls, "to the millisecond");
    assert!(
        taken.iter().all(|taken| taken.record.expires_s.is_some_and(|left| left <= 2)),
        "a day has nearly passed"
    );
}

#[test]
fn across_boots_time_counts_only_where_the_clock_was_right_both_times() {
    let free = |wall_ms, mono_ms| Stamp { synchronised: false, ..right(wall_ms, mono_ms) };
    let two_days_on = TODAY_MS + 2 * DAY_MS;
    for (accepted, now, kept, age_ms) in [
        (right(TODAY_MS, 5_000), right(TODAY_MS + HOUR_MS, 10), 1, Some(3_600_000)),
        (right(TODAY_MS, 5_000), right(two_days_on, 10), 0, Some(2 * DAY_MS as u64)),
        // A clock that nobody keeps right may be decades off, in a plausible year too.
        (free(TODAY_MS - DECADE_MS, 5_000), right(TODAY_MS, 10), 1, None),
        (right(TODAY_MS, 5_000), free(TODAY_MS + DECADE_MS, 10), 1, None),
        (right(0, 5_000), right(TODAY_MS, 10), 1, None),
        // Back by ten years and right: no age is below nothing.
        (right(TODAY_MS + DECADE_MS, 5_000), right(TODAY_MS, 10), 1, Some(0)),
        // Over the end of 32 bits.
        (right((1_000 << 31) - 500, 5_000), right((1_000 << 31) + 500, 10), 1, Some(1_000)),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = open(folder.path());
        accept(&mut store, "x", accepted);
        drop(store);
        reboot(folder.path());
        let mut store = open(folder.path());
        assert_eq!(oldest_age_ms(&store, now), age_ms, "{accepted:?} {now:?}");
        assert_eq!(take(&mut store, now).len(), kept, "{accepted:?} {now:?}");
    }
}

// ---- the agent -------------------------------------------------------------------------------------------

/// What the wall clock must be ahead by to show this time.
fn offset_to(wall_ms: i64) -> i64 {
    wall_ms - SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as i64
}

/// A broker with TLS, its certificate not valid before 1975, and its authority.
fn broker_with_tls(dir: &Path) -> Mosquitto {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "an authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "broker");
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let write = |name, pem: String| fs::write(dir.join(name), pem).unwrap();
    write("ca.pem", issuer.pem());
    write("broker.pem", certificate.pem());
    write("broker.key", key.serialize_pem());
    let (certificate, key) = (dir.join("broker.pem"), dir.join("broker.key"));
    let tls = Tls { certificate, key, client_authority: None };
    Mosquitto::start(Options { tls: Some(tls), unlimited: true, ..Options::default() })
}

fn millis(time: &serde_json::Value) -> i64 {
    let time: jiff::Timestamp = time.as_str().unwrap().parse().unwrap();
    time.as_millisecond()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_starts_in_1970_connects_once_its_clock_is_set_and_corrects_its_times() {
    let certificates = tempfile::tempdir().unwrap();
    let broker = broker_with_tls(certificates.path());
    let ca_file = certificates.path().join("ca.pem").display().to_string();
    let meter = TcpDevice::new(|asked| asked.addresses()).await;
    let lines = format!(
        "[[modbus]]\nname = \"line\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {}\n\
         [[modbus.unit]]\nname = \"meter\"\nunit = 1\nevery = \"200ms\"\ntopic = \"values\"\nexpires_after = \"1h\"\n\
         points = [{{ name = \"a\", register = \"holding\", address = 7, type = \"u16\" }}]\n",
        meter.port
    );
    let config = Config::new(&broker.url())
        .with("broker", &format!("ca_file = \"{ca_file}\""))
        .with("broker", "backoff_max = \"5min\"")
        .and(&lines);
    let mut agent = Agent::prepared(&config);
    let shim = Shim::below(&mut agent);
    shim.set(Switch::ClockOffsetMs, offset_to(30_000));
    shim.set(Switch::ClockState, 1);
    agent.start_again();
    let status = agent.expect(PATIENCE, "refused", |status| status.link.last_error.is_some());
    let said = status.link.last_error.unwrap();
    assert!(
        ["not valid before 1975", "the clock here says 1970", "keeps trying"]
            .iter()
            .all(|w| said.contains(w)),
        "{said}"
    );
    agent.expect(PATIENCE, "five values queued", |status| queued(status) >= 5);
    assert!(!broker.log().contains("New client connected"), "no credentials before the certificate is good");
    let arguments = ["--cafile", &ca_file];
    let values = Subscriber::start(broker.port(), "values", "values", 5, &arguments);
    let corrections = Subscriber::start(broker.port(), "corrections", "fieldpost/g1/clock", 1, &arguments);
    for client in ["values", "corrections"] {
        assert!(broker.wait_for_log(PATIENCE, &format!("Sending SUBACK to {client}")));
    }
    let far = |status: &Status| status.link.retry_in_ms.is_some_and(|ms| ms > 5_000);
    agent.expect(PATIENCE, "waiting for long", far);
    let wrong_by = -shim.get(Switch::ClockOffsetMs);
    shim.set(Switch::ClockOffsetMs, 0);
    shim.set(Switch::ClockState, 2);
    // Long before the next attempt was due: a clock that was set is a reason to try.
    let status =
        agent.expect(Duration::from_secs(4), "connected", |status| status.link.state == LinkState::Connected);
    assert!(!status.dropped.contains_key("expired"), "56 years passed by the wall clock only: {status:?}");
    assert!(
        status.link.state_age_ms < 60_000 && status.queue.iter().all(|l| l.oldest_age_ms < Some(600_000))
    );
    let correction = corrections.finish().remove(0);
    println!("{correction}");
    let correction: serde_json::Value = serde_json::from_str(correction.split_once(' ').unwrap().1).unwrap();
    let add_ms = correction["add_ms"].as_i64().unwrap();
    assert!(add_ms.abs_diff(wrong_by) < 2, "{add_ms} {wrong_by}");
    let now_ms = TODAY_MS.max(-offset_to(0));
    for value in values.finish() {
        let value: serde_json::Value = serde_json::from_str(value.split_once(' ').unwrap().1).unwrap();
        assert_eq!(
            (&value["clock"], &value["boot_id"]),
            (&"unset".into(), &correction["boot_id"]),
            "{value}"
        );
        let at = millis(&value["at"]);
        assert!(
            (millis(&correction["from"])..=millis(&correction["to"])).contains(&at),
            "{value} {correction}"
        );
        assert!((at + add_ms).abs_diff(now_ms) < 120_000, "corrected, it is a moment ago: {value}");
    }
}

#[test]
fn a_clock_that_jumps_while_messages_flow_loses_doubles_and_expires_nothing() {
    let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let config = Config::new(&broker.url()).with("broker", "keep_alive = \"5s\"");
    let mut agent = Agent::prepared(&config);
    let shim = Shim::below(&mut agent);
    agent.start_again();
    let sane = |status: &Status| {
        status.uptime_ms < 600_000
            && status.link.state_age_ms < 600_000
            && status.queue.iter().all(|lane| lane.oldest_age_ms.is_none_or(|age| age < 600_000))
    };
    let producer = Producer::start(agent.socket(), 2);
    let to_2039 = offset_to((1_000 << 31) + 365 * DAY_MS);
    for offset in [offset_to(0), DECADE_MS, -DECADE_MS, -HOUR_MS, to_2039, 0] {
        shim.set(Switch::ClockOffsetMs, offset);
        let accepted = producer.accepted();
        let flows = wait_until(PATIENCE, || {
            let status = agent.status();
            producer.hold(queued(&status) > 1_000);
            assert!(sane(&status), "{offset}: {status:?}");
            producer.accepted() > accepted + 300
        });
        assert!(flows, "{offset}:\n{}", agent.tail());
    }
    producer.hold(false);
    let produced = producer.stop();
    let status = agent.expect_drained(PATIENCE);
    assert_eq!((status.counters["connects"], status.dropped.len()), (1, 0), "{}", agent.tail());
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome}");
    outcome.assert_exactly_once();
}
