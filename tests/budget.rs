//! The byte budget of a metered link, through the store's synchronous face and on virtual time.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::stats::Stats;
use fieldpost::store::{self, Append, Batch, BudgetPeriod, BudgetSettings, Settings, Store};
use fieldpost::turn::{Change, Offer, Taken};
use tempfile::TempDir;

/// 2026-01-01T00:00:00Z
const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };
const DAY_MS: u64 = 86_400_000;
const KIB: u64 = 1 << 10;

fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn after(ms: u64) -> Stamp {
    Stamp { wall_ms: START.wall_ms + ms as i64, mono_ms: START.mono_ms + ms, synchronised: true }
}

fn open(folder: &Path, bytes: u64) -> Store {
    let budget = Some(BudgetSettings { bytes, per: BudgetPeriod::Day, holds_back: [false, true, true] });
    Store::open(Settings { budget, ..Settings::new(folder.join("outbox.db")) }).unwrap()
}

fn accept(store: &mut Store, lane: Lane, text: &str, now: Stamp) {
    let message = Message {
        topic: Topic::new("t").unwrap(),
        qos: Qos::AtLeastOnce,
        retain: false,
        lane,
        at: now,
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(text.to_owned().into()),
    };
    let append = Append { messages: vec![message], closes: Vec::new() };
    store.commit(Batch { appends: vec![append], ..Batch::default() }, now).unwrap();
}

fn one_of_each(store: &mut Store, now: Stamp) {
    Lane::ALL.into_iter().for_each(|lane| accept(store, lane, lane.name(), now));
}

fn take(store: &mut Store, now: Stamp) -> Vec<Taken> {
    let offer = Offer {
        ids: (2000..2010).map(|id| PacketId::new(id).unwrap()).collect(),
        qos2_room: 10,
        max_bytes: 1 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    };
    store.commit(Batch { offer: Some(offer), ..Batch::default() }, now).unwrap().taken
}

fn texts(taken: &[Taken]) -> Vec<String> {
    taken.iter().map(|taken| String::from_utf8_lossy(&taken.record.payload).into_owned()).collect()
}

fn used(store: &Store, now: Stamp) -> u64 {
    store.look(now).unwrap().budget.unwrap().used_bytes
}

#[test]
fn a_used_up_budget_holds_its_lanes_back_until_the_next_day_and_alarms_never() {
    let folder = folder();
    let mut store = open(folder.path(), 1024 * KIB);
    store.count_link_bytes(1000 * KIB, START);
    one_of_each(&mut store, START);
    let taken = take(&mut store, START);
    assert_eq!(texts(&taken), ["alarm", "normal", "bulk"]);
    store.count_link_bytes(24 * KIB, after(1));
    one_of_each(&mut store, after(1));
    assert_eq!(texts(&take(&mut store, after(1))), ["alarm"]);
    assert!(!store.waiting(after(1)).0, "what is held back asks for no commit");
    let budget = store.look(after(1)).unwrap().budget.unwrap();
    assert!(budget.is_used_up);
    assert_eq!((budget.used_bytes, budget.held_back), (1024 * KIB, vec![Lane::Normal, Lane::Bulk]));
    // What was in flight is finished all the same.
    let done = taken.iter().map(|t| Change::Acknowledged { lane: t.record.lane, seq: t.record.seq });
    store.commit(Batch { changes: done.collect(), ..Batch::default() }, after(2)).unwrap();
    // The store's thread sleeps until it is told to look again, and never spins.
    let (mut now, mut wakes) = (after(2), 0);
    while !store.waiting(now).0 {
        let at = store.waiting(now).1.unwrap();
        assert!(at > now.mono_ms && at <= now.mono_ms + 60_000);
        now = after(at - START.mono_ms);
        wakes += 1;
    }
    assert_eq!(now, after(DAY_MS), "midnight, to the millisecond");
    println!("{wakes} wakes in a day");
    assert_eq!(texts(&take(&mut store, now)), ["normal", "bulk"]);
    assert_eq!(used(&store, now), 0);
}

#[test]
fn a_budget_outlives_a_planned_restart_to_the_byte_and_a_crash_to_a_thousandth() {
    let folder = folder();
    let budget = 100 * KIB * KIB;
    let mut store = open(folder.path(), budget);
    for n in 0..3000 {
        store.count_link_bytes(7 * KIB + n, after(n));
        accept(&mut store, Lane::Alarm, "x", after(n));
    }
    let before = used(&store, after(3000));
    store.close();
    let mut store = open(folder.path(), budget);
    assert_eq!(used(&store, after(4000)), before, "a planned stop writes it down");
    let mut worst = 0;
    for n in 0..200 {
        store.count_link_bytes(9 * KIB, after(5000 + n));
        accept(&mut store, Lane::Alarm, "x", after(5000 + n));
        if n % 20 == 19 {
            let before = used(&store, after(6000));
            drop(store);
            store = open(folder.path(), budget);
            worst = worst.max(before - used(&store, after(6000)));
        }
    }
    println!("a crash forgot {worst} of {budget} bytes at most");
    assert!(worst <= budget / 1000, "{worst}");
    // A new day begins while the gateway is off.
    drop(store);
    let mut store = open(folder.path(), budget);
    store.count_link_bytes(5, after(DAY_MS));
    assert_eq!(used(&store, after(DAY_MS)), 5);
}

#[test]
fn a_used_up_budget_is_still_used_up_after_a_restart() {
    let folder = folder();
    let mut store = open(folder.path(), 64 * KIB);
    store.count_link_bytes(64 * KIB, START);
    one_of_each(&mut store, START);
    drop(store);
    let mut store = open(folder.path(), 64 * KIB);
    assert_eq!(texts(&take(&mut store, after(10))), ["alarm"]);
    assert_eq!(texts(&take(&mut store, after(DAY_MS))), ["normal", "bulk"]);
}

#[test]
fn without_a_budget_nothing_is_counted_or_held_back() {
    let folder = folder();
    let mut store = Store::open(Settings::new(folder.path().join("outbox.db"))).unwrap();
    store.count_link_bytes(1 << 40, START);
    one_of_each(&mut store, START);
    assert_eq!(take(&mut store, START).len(), 3);
    assert_eq!(store.look(START).unwrap().budget, None);
}

#[tokio::test]
async fn what_the_link_counts_reaches_the_budget_with_the_next_commit() {
    let folder = folder();
    let stats = Arc::<Stats>::default();
    let store = open(folder.path(), 64 * KIB);
    let (handle, thread) = store::spawn(store, Arc::clone(&stats)).unwrap();
    stats.link_bytes_sent.add(70);
    stats.link_bytes_received.add(30);
    assert_eq!(handle.look().await.unwrap().unwrap().budget.unwrap().used_bytes, 100);
    stats.link_bytes_sent.add(11);
    handle.close().await;
    drop(handle);
    thread.join().unwrap();
    let store = open(folder.path(), 64 * KIB);
    assert_eq!(used(&store, fieldpost::clock::now()), 111);
}
