//! Damaged databases: the store always starts, carries over what is readable, and hands out nothing wrong.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use fieldpost::clock;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Seq, Topic};
use fieldpost::progress::{Pulse, Watch};
use fieldpost::store::{Append, Batch, Settings, Store, StoreError};
use fieldpost::turn::{Change, Offer, OnSessionLoss};

const MESSAGES: u32 = 3000;

fn settings(folder: &Path) -> Settings {
    Settings { quota: 64 << 20, ..Settings::new(folder.join("outbox.db")) }
}

/// What message `n` says: long enough for a page to hold a few, and its own proof.
fn text(n: u32) -> String {
    let mut random = fastrand::Rng::with_seed(u64::from(n));
    let noise: String = (0..180).map(|_| random.alphanumeric()).collect();
    format!("{n:05} {noise}")
}

fn message(n: u32) -> Message {
    Message {
        topic: Topic::new("t/x").unwrap(),
        qos: Qos::ExactlyOnce,
        retain: false,
        lane: Lane::Normal,
        at: clock::now(),
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(Bytes::from(text(n))),
    }
}

fn commit(store: &mut Store, batch: Batch) {
    store.commit(batch, clock::now()).unwrap();
}

/// A database with 3,000 messages of which the first ten are done and the next ten in flight, closed as a
/// power cut leaves it (`clean`: as a stop leaves it).
fn filled(clean: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(settings(folder.path())).unwrap();
    for start in (0..MESSAGES).step_by(10) {
        let messages = (start..start + 10).map(message).collect();
        commit(&mut store, Batch { appends: vec![Append { messages, closes: vec![] }], ..Batch::default() });
    }
    store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
    commit(
        &mut store,
        Batch { changes: vec![Change::SessionAbsent(OnSessionLoss::Republish)], ..Batch::default() },
    );
    commit(&mut store, Batch { offer: Some(offer(20)), ..Batch::default() });
    let done = (2000..2010).flat_map(|id| [Change::Received(id_of(id)), Change::Completed(id_of(id))]);
    commit(&mut store, Batch { changes: done.collect(), ..Batch::default() });
    if clean {
        store.close()
    } else {
        drop(store)
    }
    folder
}

fn id_of(number: u16) -> PacketId {
    PacketId::new(number).unwrap()
}

fn offer(count: u16) -> Offer {
    offer_from(2000, count)
}

fn offer_from(first: u16, count: u16) -> Offer {
    Offer {
        ids: (first..first + count).map(id_of).collect(),
        qos2_room: usize::from(count),
        max_bytes: 64 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    }
}

/// Every message the store hands out, checked to be what was stored.
fn hand_out(store: &mut Store, first_id: u16) -> Vec<u32> {
    let mut numbers = Vec::new();
    loop {
        let offered = offer_from(first_id + numbers.len() as u16, 5000);
        let taken = match store.commit(Batch { offer: Some(offered), ..Batch::default() }, clock::now()) {
            Ok(committed) => committed.taken,
            // Found at work: what was handed out before is handed out again.
            Err(StoreError::Damaged { .. }) => return drain(store).into_iter().collect(),
            Err(error) => panic!("{error}"),
        };
        if taken.is_empty() {
            return numbers;
        }
        for taken in taken {
            let said = String::from_utf8(taken.record.payload.to_vec()).unwrap();
            let n: u32 = said[..5].parse().unwrap();
            assert_eq!(said, text(n), "a damaged message was handed out");
            numbers.push(n);
        }
    }
}

/// Everything a salvaged store still hands out, checked to be what was stored, in order.
fn drain(store: &mut Store) -> BTreeSet<u32> {
    let begin = store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
    assert!(begin.resume.is_empty(), "a salvaged database knows of no session");
    assert!(begin.clean_start_needed);
    commit(
        store,
        Batch { changes: vec![Change::SessionAbsent(OnSessionLoss::Republish)], ..Batch::default() },
    );
    let numbers = hand_out(store, 2000);
    assert!(numbers.is_sorted(), "in order");
    let distinct: BTreeSet<u32> = numbers.iter().copied().collect();
    assert_eq!(distinct.len(), numbers.len(), "none twice");
    distinct
}

fn quarantines(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.contains(".corrupt-") && !name.ends_with("-wal")
        })
        .collect();
    found.sort();
    found
}

/// Spoils a cleanly closed database, opens it, drains it; returns how many of the 2,990 came out.
fn survivors(name: &str, spoil: impl Fn(&mut Vec<u8>)) -> usize {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let mut bytes = fs::read(&path).unwrap();
    spoil(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let mut store = Store::open(settings(folder.path())).unwrap();
    // Damage that the start does not meet is met behind it.
    while store.check_next().unwrap_or(false) {}
    // Without a salvage, those in flight keep their rows and are not handed out anew.
    let before = store.look(clock::now()).unwrap();
    let (kept, rows): (BTreeSet<u32>, u64) = match before.damage {
        Some(_) => (drain(&mut store), 0),
        None => (hand_out(&mut store, 3000).into_iter().collect(), before.rows),
    };
    let look = store.look(clock::now()).unwrap();
    let rows = if look.damage.is_some() { 0 } else { rows };
    let dropped: u64 = look.dropped.iter().map(|(_, _, count)| count).sum();
    let damage = look.damage.as_ref().map(|damage| (damage.salvaged, damage.lost));
    if !kept.is_empty() {
        assert_eq!(kept.len() as u64 + rows + dropped, 2990, "{name}: what is not kept is counted");
    }
    println!("{name}: {} of 2990 kept, {dropped} counted as dropped, salvage {damage:?}", kept.len());
    // Numbering goes on above everything ever numbered.
    commit(
        &mut store,
        Batch { appends: vec![Append { messages: vec![message(9999)], closes: vec![] }], ..Batch::default() },
    );
    kept.len()
}

fn page_of(bytes: &[u8], needle: &str) -> usize {
    let at = bytes.windows(needle.len()).position(|window| window == needle.as_bytes()).unwrap();
    at / 1024 * 1024
}

#[test]
fn a_zeroed_page_costs_the_messages_on_it_and_nothing_else() {
    let kept = survivors("one leaf zeroed", |bytes| {
        let at = page_of(bytes, &text(1500)[..40]);
        bytes[at..at + 1024].fill(0);
    });
    assert!(kept >= 2900, "{kept}");
}

#[test]
fn a_zeroed_block_of_16_kib_costs_the_messages_on_it_and_nothing_else() {
    let kept = survivors("16 KiB zeroed", |bytes| {
        let at = page_of(bytes, &text(1500)[..40]);
        bytes[at..at + (16 << 10)].fill(0);
    });
    assert!(kept >= 2700, "{kept}");
}

#[test]
fn a_hundred_flipped_bytes_never_make_a_wrong_message() {
    let mut all = 0;
    for seed in 0..5 {
        let kept = survivors("100 bytes flipped", |bytes| {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..100 {
                // Behind the tables' definitions and roots, without which nothing can be found.
                let at = random.usize(32 << 10..bytes.len());
                bytes[at] ^= 1 << random.u32(0..8);
            }
        });
        // Which pages are hit depends on the schema and its indices.
        assert!(kept > 0, "seed {seed}");
        all += kept;
    }
    // A byte of an inner page costs many messages: how many depends on which.
    assert!(all >= 5 * 1000, "{all}");
}

/// Ten records each: 26 is one flipped bit, and would cover up the two segments behind it.
#[test]
fn a_damaged_count_of_records_costs_nothing() {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let whole = fs::read(&path).unwrap();
    // A segment that is begun is looked at when the store starts, another when it is its turn.
    let begun = "INSERT INTO progress SELECT id, x'00' FROM segment ORDER BY id LIMIT 1 OFFSET 200";
    for (count, begun) in
        [(26, ""), (2, ""), (0, ""), (-1, begun), (513, ""), (1i64 << 40, begun), (i64::MAX, "")]
    {
        fs::write(&path, &whole).unwrap();
        let db = rusqlite::Connection::open(&path).unwrap();
        db.execute_batch(begun).unwrap();
        let spoil =
            "UPDATE segment SET count = ? WHERE id = (SELECT id FROM segment ORDER BY id LIMIT 1 OFFSET 200)";
        assert_eq!(db.execute(spoil, [count]).unwrap(), 1);
        drop(db);
        let mut store = Store::open(settings(folder.path())).unwrap();
        let handed_out = match store.look(clock::now()).unwrap().damage {
            Some(_) => drain(&mut store).len(),
            None => hand_out(&mut store, 3000).len(),
        };
        let damage = store.look(clock::now()).unwrap().damage.expect("it is noticed");
        assert_eq!((handed_out, damage.lost), (2990, 0), "{count}");
    }
}

#[test]
fn without_its_header_the_store_starts_empty_and_says_so() {
    let kept = survivors("header gone", |bytes| bytes[..1024].fill(0));
    assert_eq!(kept, 0);
}

#[test]
fn a_truncated_file_keeps_what_can_be_read() {
    survivors("truncated to half", |bytes| bytes.truncate(bytes.len() / 2));
}

#[test]
fn an_unclean_stop_alone_costs_nothing() {
    let folder = filled(false);
    let mut store = Store::open(settings(folder.path())).unwrap();
    assert_eq!(store.look(clock::now()).unwrap().damage, None);
    let begin = store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
    assert_eq!(begin.resume.len(), 10);
    let others = offer_from(3000, 5000);
    let taken = store.commit(Batch { offer: Some(others), ..Batch::default() }, clock::now()).unwrap().taken;
    assert_eq!(taken.len(), 2980);
}

#[test]
fn an_empty_file_where_a_database_was_is_damage_and_a_fresh_one_is_not() {
    let folder = filled(true);
    fs::write(folder.path().join("outbox.db"), b"").unwrap();
    let store = Store::open(settings(folder.path())).unwrap();
    assert!(store.look(clock::now()).unwrap().damage.is_some());
    let fresh = tempfile::tempdir().unwrap();
    fs::write(fresh.path().join("outbox.db"), b"").unwrap();
    let store = Store::open(settings(fresh.path())).unwrap();
    assert_eq!(store.look(clock::now()).unwrap().damage, None);
}

#[test]
fn another_programs_database_is_set_aside_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox.db");
    let foreign = rusqlite::Connection::open(&path).unwrap();
    foreign.execute_batch("CREATE TABLE other (x); INSERT INTO other VALUES ('theirs')").unwrap();
    drop(foreign);
    let store = Store::open(settings(folder.path())).unwrap();
    assert!(store.look(clock::now()).unwrap().damage.is_some());
    drop(store);
    let aside = rusqlite::Connection::open(&quarantines(folder.path())[0]).unwrap();
    let theirs: String = aside.query_row("SELECT x FROM other", [], |row| row.get(0)).unwrap();
    assert_eq!(theirs, "theirs");
}

#[test]
fn a_newer_schema_is_refused_and_not_touched() {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let newer = rusqlite::Connection::open(&path).unwrap();
    newer.execute_batch("PRAGMA user_version = 99").unwrap();
    drop(newer);
    let before = fs::read(&path).unwrap();
    let refusal = Store::open(settings(folder.path())).unwrap_err();
    assert!(matches!(refusal, StoreError::Newer { found: 99, .. }), "{refusal}");
    assert!(quarantines(folder.path()).is_empty());
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn at_most_two_damaged_databases_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    for _ in 0..4 {
        let store = Store::open(settings(folder.path())).unwrap();
        store.close();
        fs::write(folder.path().join("outbox.db"), b"this is not a database, whatever its name says")
            .unwrap();
        // The name of what is set aside holds the time in milliseconds.
        let now = clock::now().wall_ms;
        while clock::now().wall_ms == now {}
    }
    drop(Store::open(settings(folder.path())).unwrap());
    assert_eq!(quarantines(folder.path()).len(), 2);
}

#[test]
fn a_salvaged_database_takes_a_new_epoch() {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let epoch = Store::open(settings(folder.path())).map(|store| {
        let epoch = store.boot().epoch;
        store.close();
        epoch
    });
    let mut bytes = fs::read(&path).unwrap();
    let at = page_of(&bytes, &text(1500)[..40]);
    bytes[at..at + 1024].fill(0);
    fs::write(&path, &bytes).unwrap();
    let mut store = Store::open(settings(folder.path())).unwrap();
    while store.check_next().unwrap_or(false) {}
    assert_eq!(store.boot().epoch, epoch.unwrap() + 1);
}

#[test]
fn dead_letters_outlive_a_damaged_database() {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let mut store = Store::open(settings(folder.path())).unwrap();
    let change = Change::DeadLetter { id: None, lane: Lane::Normal, seq: Seq(2_000), reason: 0x99 };
    commit(&mut store, Batch { changes: vec![change], ..Batch::default() });
    store.close();
    let mut bytes = fs::read(&path).unwrap();
    let at = page_of(&bytes, &text(1500)[..40]);
    bytes[at..at + 1024].fill(0);
    fs::write(&path, &bytes).unwrap();
    let mut store = Store::open(settings(folder.path())).unwrap();
    while store.check_next().unwrap_or(false) {}
    let look = store.look(clock::now()).unwrap();
    assert!(look.damage.is_some());
    assert_eq!(look.dead_letters, 1);
}

#[test]
fn damage_is_found_behind_the_start_although_nothing_reads_there() {
    let folder = filled(true);
    let path = folder.path().join("outbox.db");
    let mut bytes = fs::read(&path).unwrap();
    let at = page_of(&bytes, &text(1500)[..40]);
    bytes[at..at + 1024].fill(0);
    fs::write(&path, &bytes).unwrap();
    let mut store = Store::open(settings(folder.path())).unwrap();
    assert_eq!(store.look(clock::now()).unwrap().damage, None, "the start itself does not read everything");
    let mut segments = 0;
    let found = loop {
        match store.check_next() {
            Ok(true) => segments += 1,
            Ok(false) => break None,
            Err(error) => break Some(error),
        }
    };
    assert!(matches!(found, Some(StoreError::Damaged { .. })), "{found:?} after {segments} segments");
    assert!(store.look(clock::now()).unwrap().damage.is_some());
}

/// The end of a salvage writes the whole database twice, in one step: a watchdog that ended it would end every start.
#[test]
fn a_salvage_has_the_time_that_a_slow_card_needs_for_it() {
    let is_stuck_in_a_second = |damaged: bool| {
        let folder = filled(true);
        let path = folder.path().join("outbox.db");
        let mut file = fs::read(&path).unwrap();
        assert!(file.len() > 600_000, "{} bytes, twice, at 512 KiB/s, are more than 2 s", file.len());
        if damaged {
            let at = page_of(&file, &text(1500)[..40]);
            file[at..at + 1024].fill(0);
            fs::write(&path, file).unwrap();
        }
        let pulse = Pulse::new(Duration::ZERO, clock::mono_ms());
        let mut watch = Watch::default();
        watch.add("the store".into(), &pulse);
        let mut store = Store::open(Settings { pulse, ..settings(folder.path()) }).unwrap();
        while store.check_next().unwrap_or(false) {}
        assert_eq!(store.look(clock::now()).unwrap().damage.is_some(), damaged);
        !watch.stuck(clock::mono_ms() + 1_000).is_empty()
    };
    assert!(!is_stuck_in_a_second(true));
    // The negative control: without a salvage nobody has asked for more time.
    assert!(is_stuck_in_a_second(false));
}
