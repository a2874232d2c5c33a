//! How a backlog is sent: order, pace and retain flag, through the store's synchronous face and on virtual time.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Replay, ReplayOrder, Settings, Store};
use fieldpost::turn::{Begin, Change, Offer, OnSessionLoss, Resume, Taken};
use tempfile::TempDir;

const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };
const LIVE_FIRST: Replay =
    Replay { order: ReplayOrder::LiveFirst, max_messages_per_second: None, max_bytes_per_second: None };
const IN_ORDER: Replay = Replay { order: ReplayOrder::InOrder, ..LIVE_FIRST };

fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn open(folder: &Path, replay: Replay) -> Store {
    Store::open(Settings { replay, ..Settings::new(folder.join("outbox.db")) }).unwrap()
}

fn after(ms: u64) -> Stamp {
    Stamp { wall_ms: START.wall_ms + ms as i64, mono_ms: START.mono_ms + ms, synchronised: true }
}

fn value(lane: Lane, topic: &str, qos: Qos, text: &str) -> Message {
    Message {
        topic: Topic::new(topic).unwrap(),
        qos,
        retain: true,
        lane,
        at: START,
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(text.to_owned().into()),
    }
}

fn normal(text: &str) -> Message {
    value(Lane::Normal, "t", Qos::ExactlyOnce, text)
}

fn append(messages: Vec<Message>) -> Batch {
    Batch { appends: vec![Append { messages, closes: Vec::new() }], ..Batch::default() }
}

fn accept(store: &mut Store, texts: &[&str]) {
    let committed = store.commit(append(texts.iter().map(|text| normal(text)).collect()), START).unwrap();
    assert_eq!(committed.appends, [Ok(())]);
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

fn take_at(store: &mut Store, first_id: u16, count: u16, now: Stamp) -> Vec<Taken> {
    store.commit(Batch { offer: Some(offer(first_id, count)), ..Batch::default() }, now).unwrap().taken
}

fn take(store: &mut Store, first_id: u16, count: u16) -> Vec<Taken> {
    take_at(store, first_id, count, START)
}

fn done(store: &mut Store, taken: &[Taken]) {
    let done = taken.iter().flat_map(|taken| match taken.qos {
        Qos::ExactlyOnce => vec![Change::Received(taken.id), Change::Completed(taken.id)],
        _ => vec![Change::Acknowledged { lane: taken.record.lane, seq: taken.record.seq }],
    });
    let changes = done.collect();
    store.commit(Batch { changes, ..Batch::default() }, START).unwrap();
}

fn begin(store: &mut Store) -> Begin {
    let begin = store.begin(("b", "c"), OnSessionLoss::Republish, &[], START).unwrap();
    if begin.clean_start_needed {
        let changes = vec![Change::SessionAbsent(OnSessionLoss::Republish)];
        store.commit(Batch { changes, ..Batch::default() }, START).unwrap();
    }
    begin
}

/// Text and retain flag, as `1r 2`.
fn shown(taken: &[Taken]) -> String {
    let word = |taken: &Taken| {
        let text = String::from_utf8_lossy(&taken.record.payload).into_owned();
        if taken.record.retain { text + "r" } else { text }
    };
    taken.iter().map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn live_messages_go_first_and_the_backlog_follows_each_in_order() {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["1", "2", "3"]);
    let bulk = |text| value(Lane::Bulk, "b", Qos::AtLeastOnce, text);
    store.commit(append(vec![bulk("old bulk")]), START).unwrap();
    begin(&mut store);
    assert_eq!(shown(&take(&mut store, 2000, 1)), "1r", "nothing is live yet");
    accept(&mut store, &["4", "5"]);
    store.commit(append(vec![bulk("new bulk")]), START).unwrap();
    assert_eq!(shown(&take(&mut store, 2100, 4)), "4r 5r new bulkr 2");
    accept(&mut store, &["6"]);
    assert_eq!(shown(&take(&mut store, 2200, 9)), "6r 3 old bulk");
    assert!(!store.waiting(START).0);
}

#[test]
fn in_order_a_backlog_keeps_its_order_and_its_flags() {
    let folder = folder();
    let mut store = open(folder.path(), IN_ORDER);
    accept(&mut store, &["1", "2"]);
    begin(&mut store);
    assert_eq!(shown(&take(&mut store, 2000, 1)), "1r");
    accept(&mut store, &["3"]);
    assert_eq!(shown(&take(&mut store, 2100, 9)), "2r 3r");
}

#[test]
fn a_parked_offer_takes_what_arrives_as_live() {
    let folder = folder();
    let slow = Replay { max_messages_per_second: Some(1), ..LIVE_FIRST };
    let mut store = open(folder.path(), slow);
    begin(&mut store);
    // The store's thread keeps an offer until something can be taken: here it comes with the messages.
    let both = Batch { offer: Some(offer(2000, 9)), ..append(vec![normal("1"), normal("2"), normal("3")]) };
    assert_eq!(store.commit(both, START).unwrap().taken.len(), 3, "no pace holds them back");
}

/// What a broker keeps as the topic's retained value, after the program died in the midst of a replay.
fn retained_after_a_crash(replay_after_crash: Replay) -> (String, u64) {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["1", "2", "3", "4"]);
    begin(&mut store);
    let mut sent = take(&mut store, 2000, 1);
    accept(&mut store, &["5"]);
    sent.extend(take(&mut store, 2100, 1));
    done(&mut store, &sent);
    drop(store);
    let mut store = open(folder.path(), replay_after_crash);
    begin(&mut store);
    sent.extend(take(&mut store, 2200, 9));
    let retained = sent.iter().rfind(|taken| taken.record.retain).unwrap();
    (String::from_utf8_lossy(&retained.record.payload).into_owned(), sent.len() as u64)
}

#[test]
fn an_old_value_never_overwrites_a_newer_retained_one_also_after_a_restart() {
    for after_crash in [LIVE_FIRST, IN_ORDER] {
        assert_eq!(retained_after_a_crash(after_crash), ("5".to_owned(), 5), "{after_crash:?}");
    }
}

#[test]
fn without_the_record_of_what_went_ahead_an_old_value_would_win() {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["1", "2"]);
    begin(&mut store);
    take(&mut store, 2000, 1);
    accept(&mut store, &["3"]);
    let live = take(&mut store, 2100, 1);
    assert_eq!(shown(&live), "3r");
    done(&mut store, &live);
    store.close();
    let db = rusqlite::Connection::open(folder.path().join("outbox.db")).unwrap();
    assert_eq!(db.execute("DELETE FROM retained_ahead", []).unwrap(), 1);
    drop(db);
    let mut store = open(folder.path(), LIVE_FIRST);
    begin(&mut store);
    assert_eq!(shown(&take(&mut store, 2200, 9)), "2r", "the old value would overwrite 3");
}

#[test]
fn what_no_newer_message_went_ahead_of_keeps_its_flag() {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["1", "2"]);
    let other = value(Lane::Normal, "u", Qos::ExactlyOnce, "other");
    store.commit(append(vec![other]), START).unwrap();
    begin(&mut store);
    take(&mut store, 2000, 1);
    accept(&mut store, &["3"]);
    assert_eq!(shown(&take(&mut store, 2100, 9)), "3r 2 otherr");
}

#[test]
fn a_resumed_message_is_sent_again_with_the_flag_it_had() {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["1", "2"]);
    begin(&mut store);
    let mut sent = take(&mut store, 2000, 1);
    accept(&mut store, &["3"]);
    sent.extend(take(&mut store, 2100, 9));
    assert_eq!(shown(&sent), "1r 3r 2");
    drop(store);
    let mut store = open(folder.path(), LIVE_FIRST);
    let resumed: Vec<_> = begin(&mut store)
        .resume
        .into_iter()
        .map(|resume| match resume {
            Resume::Row { record: Some(record), .. } => (record.payload, record.retain),
            other => panic!("{other:?}"),
        })
        .collect();
    let sent: Vec<_> = sent.into_iter().map(|taken| (taken.record.payload, taken.record.retain)).collect();
    assert_eq!(resumed, sent, "the same bytes and flags, in the order of sending");
}

#[test]
fn with_too_many_topics_unknown_values_lose_their_flag_and_are_counted() {
    let folder = folder();
    let mut store = open(folder.path(), LIVE_FIRST);
    accept(&mut store, &["old", "older of the last topic"]);
    begin(&mut store);
    take(&mut store, 2000, 1);
    for chunk in 0..21u16 {
        let topic = |n| value(Lane::Normal, &format!("many/{chunk}/{n}"), Qos::AtLeastOnce, "v");
        store.commit(append((0..500).map(topic).collect()), START).unwrap();
        let taken = take(&mut store, 3000, 500);
        done(&mut store, &taken);
    }
    let last = Batch { offer: Some(offer(2001, 9)), ..Batch::default() };
    let committed = store.commit(last, START).unwrap();
    assert_eq!(shown(&committed.taken), "older of the last topic");
    assert_eq!((committed.unretained.unknown, committed.unretained.overtaken), (1, 0));
    // What went ahead of nothing that is left is forgotten.
    done(&mut store, &committed.taken);
    let row = [PacketId::new(2000).unwrap()].map(Change::Received).to_vec();
    let end = [PacketId::new(2000).unwrap()].map(Change::Completed);
    let changes = row.into_iter().chain(end).collect();
    store.commit(Batch { changes, ..Batch::default() }, START).unwrap();
    accept(&mut store, &["new"]);
    begin(&mut store);
    assert_eq!(shown(&take(&mut store, 2300, 9)), "newr");
    store.close();
    let db = rusqlite::Connection::open(folder.path().join("outbox.db")).unwrap();
    let left: i64 = db.query_row("SELECT count(*) FROM retained_ahead", [], |row| row.get(0)).unwrap();
    assert_eq!(left, 0);
}

#[test]
fn a_paced_backlog_follows_at_its_rate_and_the_store_wakes_itself() {
    for (order, rate) in
        [(ReplayOrder::LiveFirst, 20), (ReplayOrder::InOrder, 20), (ReplayOrder::LiveFirst, 500)]
    {
        let folder = folder();
        let replay = Replay { order, max_messages_per_second: Some(rate), max_bytes_per_second: None };
        let mut store = open(folder.path(), replay);
        for _ in 0..100 {
            let backlog = (0..500).map(|n| normal(&n.to_string())).collect();
            store.commit(append(backlog), START).unwrap();
        }
        begin(&mut store);
        let (mut now, mut messages, mut wakes, mut next_id) = (START, 0u64, 0u64, 2000u16);
        while now.mono_ms < START.mono_ms + 60_000 {
            // As the store's thread does it: commit when something may go, or else sleep until it may.
            let (waits, release) = store.waiting(now);
            if !waits {
                let at = release.expect("a backlog that is held back by its pace says until when");
                assert!(at > now.mono_ms, "it never spins");
                now = after(at - START.mono_ms);
                wakes += 1;
                continue;
            }
            let taken = take_at(&mut store, next_id, 200, now);
            assert!(!taken.is_empty(), "a wake is never for nothing");
            next_id = if next_id > 40_000 { 2000 } else { next_id + 200 };
            messages += taken.len() as u64;
            done(&mut store, &taken);
        }
        let expected = rate * 61;
        println!(
            "{order:?} at {rate}/s: {messages} in a minute (with the first second's burst {expected}), {wakes} wakes"
        );
        assert!(messages.abs_diff(expected) <= expected / 50 + 1, "{messages}, not {expected}");
        assert!(wakes <= 601);
    }
}

#[test]
fn live_messages_are_not_paced() {
    let folder = folder();
    let replay = Replay { max_bytes_per_second: Some(100), ..LIVE_FIRST };
    let mut store = open(folder.path(), replay);
    for _ in 0..50 {
        accept(&mut store, &["backlog"]);
    }
    begin(&mut store);
    let first = take(&mut store, 2000, 50).len();
    assert!((1..20).contains(&first), "{first}: one second's worth");
    for _ in 0..30 {
        accept(&mut store, &["live"]);
    }
    let taken = take(&mut store, 2100, 50);
    assert_eq!(taken.len(), 30);
    assert!(taken.iter().all(|taken| &taken.record.payload[..] == b"live"));
    assert!(!store.waiting(START).0);
    assert!(store.waiting(START).1.is_some_and(|at| at > START.mono_ms));
}

#[test]
fn the_order_may_change_at_any_moment_and_everything_is_handed_out_once() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let folder = folder();
        let mut store = open(folder.path(), IN_ORDER);
        begin(&mut store);
        let (mut accepted, mut id) = (0, 2000);
        let (mut handed, mut unfinished) = (BTreeSet::new(), Vec::new());
        let mut hand_out = |store: &mut Store, unfinished: &mut Vec<Taken>, count: u16| {
            let taken = take(store, id, count);
            id += count;
            for taken in &taken {
                assert!(handed.insert(taken.record.seq), "seed {seed}: {:?} twice", taken.record.seq);
            }
            unfinished.extend(taken);
            handed.len()
        };
        for _ in 0..60 {
            match random.u8(0..10) {
                0..4 => {
                    let texts: Vec<String> =
                        (0..random.u32(1..5)).map(|n| (accepted + n).to_string()).collect();
                    accepted += texts.len() as u32;
                    accept(&mut store, &texts.iter().map(String::as_str).collect::<Vec<_>>());
                }
                4..7 => drop(hand_out(&mut store, &mut unfinished, random.u16(1..6))),
                7 | 8 => {
                    let finished: Vec<Taken> =
                        unfinished.drain(..random.usize(0..=unfinished.len())).collect();
                    done(&mut store, &finished);
                }
                _ => {
                    let replay = if random.bool() { LIVE_FIRST } else { IN_ORDER };
                    store
                        .change(Settings { replay, ..Settings::new(folder.path().join("outbox.db")) })
                        .unwrap();
                }
            }
        }
        let all = hand_out(&mut store, &mut unfinished, 1_000);
        assert_eq!(all, accepted as usize, "seed {seed}");
        done(&mut store, &unfinished);
        assert_eq!(store.look(START).unwrap().lanes[Lane::Normal as usize].messages, 0, "seed {seed}");
    }
}
