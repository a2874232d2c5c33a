//! Disks that fail: full, read-only, slow, with syncs that fail. The agent is the real binary on a real file system;
//! what no file system does on demand comes from a library below it (`tests/support_faults/shim.c`).
//!
//! A full disk is a real one: a tmpfs, which root may mount. Who is not root and sets FIELDPOST_TEST_NO_MOUNTS runs
//! the rest; each test that did not run says so.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it
#![allow(unreachable_pub, dead_code, reason = "helpers are modules of this test and of another")]

#[path = "support_modbus/device.rs"]
mod device;
#[path = "support_modbus/pty.rs"]
mod pty;
mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use device::TcpDevice;
use fieldpost::clock;
use fieldpost::control::wire::{Answer, Question, Status};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Handle, Settings, Store, Turn, Turned, spawn};
use fieldpost::turn::{Change, Offer, OnSessionLoss};
use rustix::io::Errno;
use support::agent::{Agent, Config, fieldpost, publish, queued};
use support::faults::{Shim, Switch};
use support::mosquitto::{Mosquitto, Options};
use support::producer::{Outcome, Producer};
use support::wait_until;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);

fn mosquitto() -> Mosquitto {
    Mosquitto::start(Options { unlimited: true, persistence: true, ..Options::default() })
}

/// The agent accepts what the producer has.
fn goes_on(agent: &Agent, producer: &Producer) {
    let accepted = producer.accepted();
    assert!(wait_until(PATIENCE, || producer.accepted() > accepted + 300), "{}", agent.tail());
}

/// Everything that was accepted is at the broker, once and in order.
/// Each of many failed commits, and no line for each of them.
fn says_it_in_few_lines(agent: &Agent, words: &[&str]) {
    let (refused, lines) = (agent.status().counters["messages_not_accepted"], agent.log().lines().count());
    println!("{lines} lines for {refused} messages that were refused");
    assert!(lines <= 25, "{}", agent.log());
    for words in words {
        assert!(agent.logged(words) > 0, "{words}: {}", agent.log());
    }
}

fn nothing_is_lost_or_doubled(mut agent: Agent, producer: Producer, broker: &Mosquitto) {
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome}");
    outcome.assert_exactly_once();
}

fn settings(path: &Path) -> Settings {
    Settings::new(path.to_owned())
}

fn message(qos: Qos, text: &str) -> Message {
    Message {
        topic: Topic::new("t").unwrap(),
        qos,
        retain: false,
        lane: Lane::Normal,
        at: clock::now(),
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(text.to_owned().into()),
    }
}

fn offer(first_id: u16, count: u16) -> Offer {
    Offer {
        ids: (first_id..first_id + count).map(|id| PacketId::new(id).unwrap()).collect(),
        qos2_room: usize::from(count),
        max_bytes: 1 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    }
}

// ---- a disk of so many bytes -----------------------------------------------------------------------------

/// A tmpfs, and a file on it that takes space away.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// `None`: it may not be mounted here, and whoever runs the tests has agreed to leave this one out.
    fn of(size: &str, left_out: &str) -> Option<Disk> {
        let dir = tempfile::TempDir::new().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o"]).arg(format!("size={size}")).arg("fieldpost-test").arg(dir.path());
        let output = mount.output().expect("mount can be run");
        if output.status.success() {
            return Some(Disk { dir });
        }
        assert!(
            std::env::var_os("FIELDPOST_TEST_NO_MOUNTS").is_some(),
            "no tmpfs can be mounted, so this cannot be tested: run it as root, or set FIELDPOST_TEST_NO_MOUNTS=1 to \
             leave it out. mount says: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        eprintln!("NOT RUN: {left_out} needs a tmpfs, which cannot be mounted here");
        None
    }

    fn database(&self) -> PathBuf {
        self.dir.path().join("outbox.db")
    }

    fn config(&self, url: &str) -> Config {
        let path = format!("path = \"{}\"", self.database().display());
        // These disks are smaller than what is kept free of a real one.
        let config = Config::new(url).with("store", &path).with("store", "min_free_disk = \"0B\"");
        config.with("control", "socket = \"control.sock\"")
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(self.dir.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Somebody else takes all but so many bytes.
    fn leave(&self, bytes: u64) {
        let mut other = fs::OpenOptions::new().create(true).append(true).open(self.other()).unwrap();
        while self.free() > bytes {
            let some = (self.free() - bytes).min(64 << 10) as usize;
            other.write_all(&vec![1; some]).unwrap();
        }
    }

    /// Somebody else gives it all back.
    fn give_back(&self) {
        fs::remove_file(self.other()).unwrap();
    }

    fn other(&self) -> PathBuf {
        self.dir.path().join("other")
    }

    fn remount(&self, option: &str) {
        let status =
            Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(self.dir.path()).status();
        assert!(status.unwrap().success(), "remount,{option}");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _left = Command::new("umount").arg("-l").arg(self.dir.path()).status();
    }
}

/// Hands over messages that do not compress, until one is refused; how many were taken, and why no more were.
fn fill(agent: &Agent) -> (usize, String) {
    let mut random = fastrand::Rng::with_seed(1);
    for taken in 0..100_000 {
        let text: String = (0..8_000).map(|_| random.alphanumeric()).collect();
        match agent.ask(&Question::Publish(publish("fill", 2, &text))).unwrap() {
            Answer::Accepted {} => {}
            Answer::Refused { reason } => return (taken, reason),
            other => panic!("{other:?}"),
        }
    }
    panic!("the disk never was full");
}

fn accepts(agent: &Agent) -> bool {
    matches!(agent.ask(&Question::Publish(publish("later", 1, "x"))), Ok(Answer::Accepted {}))
}

fn reserve_bytes(database: &Path) -> u64 {
    fs::metadata(database.with_file_name("outbox.db.reserve")).map_or(0, |file| file.len())
}

#[test]
fn a_full_disk_refuses_what_is_new_drains_and_accepts_again_when_there_is_space() {
    let Some(disk) = Disk::of("16m", "a full disk drains") else { return };
    let mut broker = mosquitto();
    let mut agent = Agent::start(&disk.config(&broker.url()));
    let producer = Producer::start(agent.socket(), 2);
    assert!(wait_until(PATIENCE, || producer.accepted() > 500));
    broker.stop();
    agent.expect(PATIENCE, "offline", |status| status.link.last_error.is_some());
    disk.leave(2 << 20);
    let (filled, reason) = fill(&agent);
    assert!(reason.contains("is full") && reason.contains("outbox.db"), "{reason}");
    // The reserve that was given up is for the queue; somebody else leaves next to nothing of it.
    disk.leave(256 << 10);
    let status = agent.status();
    assert!(!status.store.accepting && status.store.error.unwrap().contains("is full"));
    let config = agent.config_file().display().to_string();
    let said = fieldpost(&["publish", "--config", &config, "--topic", "t", "x"]);
    assert!(!said.status.success(), "what is not accepted is not called so");
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("full"), "{said}");
    // A producer that goes on trying does not keep the queue from draining, nor the connection from living.
    let before = agent.status().counters["connects"];
    broker.start_again();
    agent.expect_drained(PATIENCE);
    assert_eq!(agent.status().counters["connects"], before + 1, "{}", agent.tail());
    assert!(!accepts(&agent), "there is no space yet");
    assert_eq!(broker.received().first_time("fill"), filled);
    let accepted = producer.accepted();
    disk.give_back();
    assert!(wait_until(PATIENCE, || producer.accepted() > accepted + 500), "{}", agent.tail());
    assert!(agent.status().store.accepting);
    assert_eq!(reserve_bytes(&disk.database()), 4 << 20, "the reserve is made again");
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("full disk: filled={filled} {outcome}");
    outcome.assert_exactly_once();
}

/// Appends find the disk full while messages of both qualities of service are in flight: they stay there, and what
/// the session learns is recorded, in the same commit.
#[test]
fn what_the_session_holds_stays_in_its_hands_when_an_append_finds_the_disk_full() {
    let Some(disk) = Disk::of("16m", "an append on a full disk beside a session") else { return };
    let mut store = Store::open(settings(&disk.database())).unwrap();
    let commit = |store: &mut Store, batch| store.commit(batch, clock::now()).unwrap();
    let append = |qos, range: std::ops::Range<usize>| {
        let messages = range.map(|n| message(qos, &format!("{n:05} {}", "x".repeat(n % 7)))).collect();
        Append { messages, closes: vec![] }
    };
    let both = vec![append(Qos::AtLeastOnce, 0..100), append(Qos::ExactlyOnce, 100..200)];
    commit(&mut store, Batch { appends: both, ..Batch::default() });
    let taken = commit(&mut store, Batch { offer: Some(offer(2000, 150)), ..Batch::default() }).taken;
    assert_eq!(taken.len(), 150);
    disk.leave(512 << 10);
    let mut done = taken.iter();
    let refused = loop {
        // One acknowledgement rides with each append.
        let Some(taken) = done.next() else { panic!("the disk never was full") };
        let (lane, seq) = (taken.record.lane, taken.record.seq);
        let changes = match taken.qos {
            Qos::ExactlyOnce => vec![Change::Received(taken.id), Change::Completed(taken.id)],
            _ => vec![Change::Acknowledged { lane, seq }],
        };
        let noise: String = (0..20_000).map(|_| fastrand::alphanumeric()).collect();
        let appends = vec![Append { messages: vec![message(Qos::ExactlyOnce, &noise)], closes: vec![] }];
        let committed = commit(&mut store, Batch { appends, changes, ..Batch::default() });
        assert_eq!(committed.settled.delivered, 1);
        if let Err(refusal) = &committed.appends[0] {
            break refusal.to_string();
        }
    };
    assert!(refused.contains("is full"), "{refused}");
    let in_flight = done.count() as u64;
    let look = store.look(clock::now()).unwrap();
    assert_eq!(look.lanes[1].in_flight, in_flight);
    assert!(look.trouble.is_some());
    let next = commit(&mut store, Batch { offer: Some(offer(3000, 10)), ..Batch::default() }).taken;
    let next: Vec<_> = next.iter().map(|taken| taken.record.seq.0).collect();
    assert_eq!(next, (151..=160).collect::<Vec<_>>(), "nothing that is in flight is handed out again");
}

#[test]
fn a_disk_that_is_full_at_the_start_is_drained_too() {
    let Some(disk) = Disk::of("16m", "a disk that is full at the start drains") else { return };
    let mut broker = mosquitto();
    broker.stop();
    let mut agent = Agent::start(&disk.config(&broker.url()));
    disk.leave(1 << 20);
    let (filled, _) = fill(&agent);
    agent.kill_9();
    disk.leave(512 << 10);
    // Once with the reserve given up, once with the reserve made, as after somebody else filled the disk.
    agent.start_again();
    assert!(!accepts(&agent), "there is no space");
    agent.kill_9();
    disk.give_back();
    agent.start_again();
    assert!(wait_until(PATIENCE, || accepts(&agent)));
    agent.kill_9();
    disk.leave(0);
    agent.start_again();
    broker.start_again();
    agent.expect_drained(PATIENCE);
    assert_eq!(broker.received().first_time("fill"), filled);
}

// ---- syncs that fail -------------------------------------------------------------------------------------

/// A producer at QoS 2 while syncs fail: once, several times in a row, until somebody has repaired it.
fn failing_syncs(seed: u64) -> (Outcome, i64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let broker = mosquitto();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    let shim = Shim::below(&mut agent);
    agent.start_again();
    shim.set(Switch::SyncError, i64::from(Errno::IO.raw_os_error()));
    let producer = Producer::start(agent.socket(), 2);
    for bad in [1, 1, 2, 1, 5, 1, -1, 1, 1, 3] {
        let (accepted, failures) = (producer.accepted(), shim.get(Switch::Failures));
        shim.set(Switch::SyncGood, random.i64(0..40));
        shim.set(Switch::SyncBad, bad);
        let failed = wait_until(PATIENCE, || {
            producer.hold(queued(&agent.status()) > 1_000);
            shim.get(Switch::Failures) > failures + bad.max(0) - 1
        });
        assert!(failed, "{}", agent.tail());
        if bad < 0 {
            // It may still wait from before, and then nothing is written and nothing fails.
            producer.hold(false);
            agent.expect(PATIENCE, "not accepting", |status| !status.store.accepting);
            shim.set(Switch::SyncBad, 0);
        }
        let goes_on = wait_until(PATIENCE, || {
            producer.hold(queued(&agent.status()) > 1_000);
            producer.accepted() > accepted + 50
        });
        assert!(goes_on, "{}", agent.tail());
    }
    producer.hold(false);
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    assert!(agent.terminate().success());
    let failures = shim.get(Switch::Failures);
    (Outcome::logged(&produced, &broker.received()), failures)
}

#[test]
fn a_failed_sync_loses_and_doubles_nothing() {
    let seed = fastrand::u64(..);
    let (outcome, failures) = failing_syncs(seed);
    println!("seed={seed} failed syncs={failures} {outcome}");
    assert!(failures >= 10, "{failures}");
    assert_eq!(
        (outcome.lost, outcome.duplicates, outcome.out_of_order),
        (0, 0, 0),
        "{outcome} {:?}",
        outcome.details
    );
}

/// The negative control of this file: what says that it was written and was not is missed.
#[test]
fn writes_that_never_reach_the_disk_are_missed() {
    let mut broker = mosquitto();
    broker.stop();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    let shim = Shim::below(&mut agent);
    agent.start_again();
    let producer = Producer::start(agent.socket(), 2);
    assert!(wait_until(PATIENCE, || producer.accepted() > 100));
    shim.set(Switch::WriteError, -1);
    let accepted = producer.accepted();
    assert!(wait_until(PATIENCE, || producer.accepted() > accepted + 100), "{}", agent.tail());
    agent.kill_9();
    shim.set(Switch::WriteError, 0);
    agent.start_again();
    broker.start_again();
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{outcome}");
    assert!(outcome.lost >= 100, "{outcome}");
}

// ---- a card that takes its time --------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn syncs_that_take_seconds_lose_nothing_and_the_link_and_the_polling_go_on() {
    let meter = TcpDevice::new(|asked| asked.addresses()).await;
    let broker = mosquitto();
    let lines = format!(
        "[[modbus]]\nname = \"line\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {}\n\
         [[modbus.unit]]\nname = \"meter\"\nunit = 1\nevery = \"100ms\"\n\
         points = [{{ name = \"a\", register = \"holding\", address = 7, type = \"u16\" }}]\n",
        meter.port
    );
    let config = Config::new(&broker.url()).with("broker", "keep_alive = \"5s\"").and(&lines);
    let mut agent = Agent::prepared(&config);
    let shim = Shim::below(&mut agent);
    agent.start_again();
    let polls = |status: &Status| status.lines[0].units[0].polls;
    agent.expect(PATIENCE, "polling", |status| polls(status) > 5);
    let producer = Producer::start(agent.socket(), 2);
    for (delay_ms, seconds) in [(200, 5), (1_000, 8), (5_000, 25)] {
        let before = agent.status();
        let syncs = shim.get(Switch::Syncs);
        shim.set(Switch::SyncDelayMs, delay_ms);
        let began = Instant::now();
        // A span is what is tested: several keep alives of a card this slow.
        wait_until(Duration::from_secs(seconds), || false);
        shim.set(Switch::SyncDelayMs, 0);
        let elapsed = began.elapsed();
        let after = agent.status();
        let (polled, syncs) = (polls(&after) - polls(&before), shim.get(Switch::Syncs) - syncs);
        let due = elapsed.as_millis() as u64 / 100;
        let skipped = after.counters["polls_skipped"] - before.counters["polls_skipped"];
        println!("delay={delay_ms} ms: syncs={syncs} polls={polled} of {due} skipped={skipped}");
        assert!(syncs > 0 && polled + skipped >= due * 9 / 10, "{polled} and {skipped} of {due}");
        assert!(polled >= due * 8 / 10, "{polled} of {due}: polling waited for the card");
        assert_eq!(after.counters["readings_overrun"], 0);
        assert_eq!(after.counters["connects"], 1, "the link was lost:\n{}", agent.tail());
    }
    assert!(!broker.log().contains("exceeded timeout"), "keep alive was not answered:\n{}", broker.log());
    nothing_is_lost_or_doubled(agent, producer, &broker);
}

// ---- a file system that takes no writes --------------------------------------------------------------------

#[test]
fn a_read_only_file_system_is_named_and_left_behind_when_it_can_be_written_again() {
    let broker = mosquitto();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    let shim = Shim::below(&mut agent);
    agent.start_again();
    let producer = Producer::start(agent.socket(), 2);
    for _ in 0..3 {
        goes_on(&agent, &producer);
        let error = i64::from(Errno::ROFS.raw_os_error());
        shim.set(Switch::OpenError, error);
        shim.set(Switch::WriteError, error);
        let status = agent.expect(PATIENCE, "not accepting", |status| !status.store.accepting);
        let said = status.store.error.unwrap();
        assert!(said.contains("read-only") && said.contains("outbox.db"), "{said}\n{}", agent.tail());
        // Nothing falls back to memory.
        for _ in 0..20 {
            match agent.ask(&Question::Publish(publish("t", 1, "x"))).unwrap() {
                Answer::Refused { reason } => assert!(reason.contains("read-only"), "{reason}"),
                other => panic!("{other:?}:\n{}", agent.tail()),
            }
        }
        shim.set(Switch::OpenError, 0);
        shim.set(Switch::WriteError, 0);
    }
    goes_on(&agent, &producer);
    says_it_in_few_lines(
        &agent,
        &["nothing is accepted until the database works again", "takes messages again after"],
    );
    nothing_is_lost_or_doubled(agent, producer, &broker);
}

/// As above, with no space for any write: what can be had of a full disk without mounting one.
#[test]
fn no_space_for_any_write_loses_and_doubles_nothing() {
    let broker = mosquitto();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    let shim = Shim::below(&mut agent);
    agent.start_again();
    let producer = Producer::start(agent.socket(), 2);
    for _ in 0..3 {
        goes_on(&agent, &producer);
        shim.set(Switch::WriteError, i64::from(Errno::NOSPC.raw_os_error()));
        let full =
            |status: &Status| status.store.error.as_ref().is_some_and(|error| error.contains("is full"));
        agent.expect(PATIENCE, "full", full);
        assert!(!accepts(&agent));
        shim.set(Switch::WriteError, 0);
    }
    goes_on(&agent, &producer);
    says_it_in_few_lines(&agent, &["the disk is full", "there is space on the disk again after"]);
    nothing_is_lost_or_doubled(agent, producer, &broker);
}

#[test]
fn a_read_only_file_system_at_the_start_is_named_and_ends_the_agent() {
    let Some(disk) = Disk::of("16m", "a read-only file system at the start") else { return };
    let config = disk.config("mqtt://127.0.0.1:1");
    let mut agent = Agent::start(&config);
    agent.accept("t", 2, ["a", "b"]);
    agent.terminate();
    disk.remount("ro");
    agent.spawn();
    let status = agent.wait(PATIENCE);
    assert_eq!(status.code(), Some(1), "{}", agent.tail());
    assert!(agent.log().contains("read-only"), "{}", agent.tail());
    disk.remount("rw");
    agent.start_again();
    assert_eq!(queued(&agent.status()), 2);
}

// ---- a limit on file sizes ---------------------------------------------------------------------------------

#[test]
fn a_limit_on_file_sizes_ends_no_agent() {
    let broker = mosquitto();
    let mut agent = Agent::prepared(&Config::new(&broker.url()));
    // As `ulimit -f` before the agent, which is where SIGXFSZ would end it.
    agent.run_first("ulimit -S -f 600");
    agent.start_again();
    let (filled, reason) = fill(&agent);
    assert!(reason.contains("outbox.db") && reason.contains("ulimit"), "{reason}");
    assert!(!agent.status().store.accepting);
    agent.raise_file_size();
    assert!(wait_until(PATIENCE, || accepts(&agent)), "{}", agent.tail());
    agent.expect_drained(PATIENCE);
    assert_eq!(broker.received().first_time("fill"), filled);
    assert!(agent.is_running());
}

// ---- the store's thread after a failed commit ----------------------------------------------------------------

/// A store's thread on a database in which one change of a row cannot be made.
async fn with_a_row_that_cannot_change(folder: &Path) -> (Handle, tokio::sync::mpsc::Receiver<Turned>) {
    let path = folder.join("outbox.db");
    drop(Store::open(settings(&path)).unwrap());
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch(
        "CREATE TRIGGER stuck BEFORE UPDATE ON inflight WHEN old.pkid = 2001 BEGIN SELECT RAISE(ABORT, 'stuck'); END",
    )
    .unwrap();
    db.close().unwrap();
    let (store, _thread) = spawn(Store::open(settings(&path)).unwrap(), Default::default()).unwrap();
    store.append((0..5).map(|n| message(Qos::ExactlyOnce, &n.to_string())).collect()).await.unwrap();
    let turned = begin(&store).await;
    (store, turned)
}

async fn begin(store: &Handle) -> tokio::sync::mpsc::Receiver<Turned> {
    let (turned_to, turned) = tokio::sync::mpsc::channel(8);
    let owner = ("broker".to_owned(), "client".to_owned());
    store.begin(owner, OnSessionLoss::Republish, Vec::new(), turned_to).await.unwrap();
    turned
}

async fn turn(store: &Handle, changes: Vec<Change>, offer: Option<Offer>) {
    assert!(store.turn(Turn { connection: 1, changes, offer }).await);
}

fn id(number: u16) -> PacketId {
    PacketId::new(number).unwrap()
}

/// What a session says after a failed commit hangs on what was not committed: a PUBCOMP for a PUBREC that the disk
/// does not know, for one.
#[tokio::test]
async fn turns_after_a_failed_commit_are_thrown_away_until_a_connection_begins() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut turned) = with_a_row_that_cannot_change(folder.path()).await;
    turn(&store, vec![Change::SessionAbsent(OnSessionLoss::Republish)], Some(offer(2000, 2))).await;
    // One commit: were the offer committed first, its rows would be taken back again.
    let first = turned.recv().await;
    assert!(
        matches!(first, Some(Turned::Done { settled: Some(_), taken: Some(taken), .. }) if taken.len() == 2)
    );
    turn(&store, vec![Change::Received(id(2000)), Change::Received(id(2001))], None).await;
    let failed = turned.recv().await;
    assert!(matches!(failed, Some(Turned::Failed(_))), "{failed:?}");
    // The session has not heard of it yet.
    turn(&store, vec![Change::Completed(id(2000)), Change::Completed(id(2001))], Some(offer(2002, 2))).await;
    store.append(vec![message(Qos::ExactlyOnce, "later")]).await.unwrap();
    let look = store.look().await.unwrap().unwrap();
    assert_eq!((look.rows, look.lanes[1].messages), (2, 6), "no row ended");
    assert!(turned.try_recv().is_err(), "nothing was handed out");
    // A new connection is heard again.
    let mut turned = begin(&store).await;
    turn(&store, vec![Change::Received(id(2000)), Change::Completed(id(2000))], None).await;
    assert!(matches!(turned.recv().await, Some(Turned::Done { settled: Some(_), .. })));
    assert_eq!(store.look().await.unwrap().unwrap().rows, 1);
}

/// Handed to nobody, messages would be out of the reach of expiry and quota.
#[tokio::test]
async fn an_offer_whose_connection_is_gone_takes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox.db");
    let (store, _thread) = spawn(Store::open(settings(&path)).unwrap(), Default::default()).unwrap();
    for gone in [true, false] {
        let mut turned = begin(&store).await;
        turn(&store, vec![Change::SessionAbsent(OnSessionLoss::Republish)], Some(offer(2000, 10))).await;
        let done = turned.recv().await;
        assert!(matches!(done, Some(Turned::Done { taken: None, .. })), "{done:?}");
        let turned = Some(turned).filter(|_| !gone);
        store.append(vec![message(Qos::ExactlyOnce, "x")]).await.unwrap();
        let look = store.look().await.unwrap().unwrap();
        assert_eq!((look.lanes[1].in_flight, look.rows), if gone { (0, 0) } else { (1, 1) }, "gone={gone}");
        drop(turned);
        // For the next one to find an empty queue.
        let mut turned = begin(&store).await;
        turn(&store, vec![Change::SessionAbsent(OnSessionLoss::Republish)], Some(offer(2000, 1))).await;
        assert!(matches!(turned.recv().await, Some(Turned::Done { taken: Some(_), .. })));
        turn(&store, vec![Change::Received(id(2000)), Change::Completed(id(2000))], None).await;
        assert!(matches!(turned.recv().await, Some(Turned::Done { settled: Some(_), .. })));
    }
}
