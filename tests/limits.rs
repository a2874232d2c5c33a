//! What the queue holds and who loses: limits of the store and of its lanes, on real files and virtual time.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Committed, LaneLimits, Look, NotAccepted, Settings, Store, WhenFull};
use fieldpost::turn::{Change, Offer, OnSessionLoss, Taken};
use tempfile::TempDir;

/// 2026-01-01, so that the wall clock is believable.
const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };

/// In memory where there is such a folder: limits are tested here, not the disk.
fn folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn settings(folder: &Path) -> Settings {
    Settings::new(folder.join("outbox.db"))
}

fn with_lane(folder: &Path, lane: Lane, limits: LaneLimits) -> Settings {
    let mut settings = settings(folder);
    settings.lanes[lane as usize] = limits;
    settings
}

fn after(ms: u64) -> Stamp {
    Stamp { wall_ms: START.wall_ms + ms as i64, mono_ms: START.mono_ms + ms, synchronised: true }
}

/// What nothing packs: `bytes` characters of noise.
fn noise(lane: Lane, bytes: usize, seed: u64) -> Message {
    let mut random = fastrand::Rng::with_seed(seed);
    let text: String = (0..bytes).map(|_| random.alphanumeric()).collect();
    Message {
        topic: Topic::new(&format!("t/{lane}")).unwrap(),
        qos: Qos::ExactlyOnce,
        retain: false,
        lane,
        at: START,
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(text.into()),
    }
}

fn accept_at(store: &mut Store, messages: Vec<Message>, now: Stamp) -> Result<(), NotAccepted> {
    let append = Append { messages, closes: Vec::new() };
    let batch = Batch { appends: vec![append], ..Batch::default() };
    store.commit(batch, now).unwrap().appends.remove(0)
}

fn accept(store: &mut Store, messages: Vec<Message>) -> Result<(), NotAccepted> {
    accept_at(store, messages, START)
}

fn take_at(store: &mut Store, first_id: u16, count: u16, now: Stamp) -> Vec<Taken> {
    let offer = Offer {
        ids: (first_id..first_id + count).map(|id| PacketId::new(id).unwrap()).collect(),
        qos2_room: usize::from(count),
        max_bytes: 64 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    };
    store.commit(Batch { offer: Some(offer), ..Batch::default() }, now).unwrap().taken
}

/// Everything that can be taken, settled at once: lane and number.
fn drain(store: &mut Store, now: Stamp) -> Vec<(Lane, u64)> {
    let mut numbers = Vec::new();
    loop {
        let taken = take_at(store, 2000, 10_000, now);
        if taken.is_empty() {
            return numbers;
        }
        numbers.extend(taken.iter().map(|taken| (taken.record.lane, taken.record.seq.0)));
        let done = taken.iter().flat_map(|taken| [Change::Received(taken.id), Change::Completed(taken.id)]);
        let changes = done.collect();
        let _settled: Committed = store.commit(Batch { changes, ..Batch::default() }, now).unwrap();
    }
}

fn numbers_of(kept: &[(Lane, u64)], lane: Lane) -> Vec<u64> {
    kept.iter().filter(|(of, _)| *of == lane).map(|(_, number)| *number).collect()
}

fn dropped_of(look: &Look, lane: Lane) -> u64 {
    look.gaps.iter().filter(|gap| gap.lane == lane).map(|gap| gap.count).sum()
}

fn reasons(look: &Look) -> Vec<(Lane, &str, u64)> {
    look.dropped.iter().map(|(lane, reason, count)| (*lane, reason.as_str(), *count)).collect()
}

#[test]
fn a_day_offline_into_six_hours_of_room_keeps_the_newest_of_each_lane_and_the_gaps_add_up() {
    const SECONDS: u64 = 24 * 3600;
    const STEP: u64 = 10;
    let folder = folder();
    // 100 messages in ten seconds: 1 alarm, 79 measured values, 20 of bulk.
    let step = |at: u64| -> Vec<Message> {
        let message = |n: u64| {
            let lane = match n {
                0 => Lane::Alarm,
                1..80 => Lane::Normal,
                _ => Lane::Bulk,
            };
            let payload =
                format!("{{\"v\":1,\"at\":{},\"value\":{}}}", at * 1000 + n, (at * 7919 + n * 31) % 10_007);
            Message { payload: Payload::Whole(payload.into()), ..noise(lane, 0, 0) }
        };
        (0..100).map(message).collect()
    };
    // What six hours take, measured; bulk gets a sixth of it, because nothing else would keep any of it.
    let mut six_hours = Store::open(settings(&folder.path().join("measured"))).unwrap();
    for at in (0..6 * 3600).step_by(STEP as usize) {
        accept_at(&mut six_hours, step(at), after(at * 1000)).unwrap();
    }
    let quota = six_hours.look(START).unwrap().used_bytes;
    drop(six_hours);
    let bulk = LaneLimits { max_bytes: Some(quota / 6), ..LaneLimits::default() };
    let normal = LaneLimits { max_bytes: Some(quota / 10 * 7), ..LaneLimits::default() };
    let mut settings = Settings { quota, ..settings(folder.path()) };
    settings.lanes = [LaneLimits::default(), normal, bulk];
    let mut store = Store::open(settings).unwrap();
    let began = Instant::now();
    let mut accepted = [0u64; 3];
    for at in (0..SECONDS).step_by(STEP as usize) {
        let messages = step(at);
        let lanes: Vec<usize> = messages.iter().map(|message| message.lane as usize).collect();
        accept_at(&mut store, messages, after(at * 1000)).unwrap();
        lanes.into_iter().for_each(|lane| accepted[lane] += 1);
    }
    let took = began.elapsed();
    let now = after(SECONDS * 1000);
    let look = store.look(now).unwrap();
    assert!(look.used_bytes <= quota, "{} of {quota}", look.used_bytes);
    let kept = drain(&mut store, now);
    for lane in Lane::ALL {
        let numbers = numbers_of(&kept, lane);
        let total = accepted[lane as usize];
        let (count, dropped) = (numbers.len() as u64, dropped_of(&look, lane));
        println!(
            "{lane:>6}: accepted {total:>6}, kept {count:>6} ({:>4.1} h), in gap records {dropped:>6}",
            24.0 * count as f64 / total as f64
        );
        assert!(count > 0);
        assert_eq!(
            numbers,
            (total - count + 1..=total).collect::<Vec<_>>(),
            "the newest of {lane}, without holes"
        );
        assert_eq!(count + dropped, total, "{lane}");
    }
    println!(
        "quota {quota} bytes, {:.1} s for {} messages",
        took.as_secs_f32(),
        accepted.iter().sum::<u64>()
    );
    assert_eq!(accepted[0], numbers_of(&kept, Lane::Alarm).len() as u64, "no alarm was dropped");
    assert_eq!(store.look(now).unwrap().lanes.map(|lane| lane.messages), [0; 3]);
}

#[test]
fn a_lane_limited_by_count_keeps_exactly_the_newest() {
    let folder = folder();
    let limits = LaneLimits { max_messages: Some(1000), ..LaneLimits::default() };
    let mut store = Store::open(with_lane(folder.path(), Lane::Bulk, limits)).unwrap();
    accept(&mut store, (0..700).map(|n| noise(Lane::Bulk, 20, n)).collect()).unwrap();
    for n in 700..2500 {
        accept(&mut store, vec![noise(Lane::Bulk, 20, n), noise(Lane::Normal, 20, n)]).unwrap();
    }
    let look = store.look(START).unwrap();
    assert_eq!((look.lanes[2].messages, look.lanes[1].messages), (1000, 1800));
    assert_eq!(reasons(&look), [(Lane::Bulk, "max_messages", 1500)]);
    let kept = numbers_of(&drain(&mut store, START), Lane::Bulk);
    assert_eq!(kept, (1501..=2500).collect::<Vec<_>>());
}

#[test]
fn a_lane_limited_by_bytes_stays_within_them_and_leaves_the_others_alone() {
    let folder = folder();
    let limits = LaneLimits { max_bytes: Some(64 << 10), ..LaneLimits::default() };
    let mut store = Store::open(with_lane(folder.path(), Lane::Normal, limits)).unwrap();
    for n in 0..400 {
        accept(&mut store, vec![noise(Lane::Normal, 500, n)]).unwrap();
        accept(&mut store, vec![noise(Lane::Bulk, 500, n)]).unwrap();
        assert!(store.look(START).unwrap().lanes[1].bytes <= 64 << 10);
    }
    let look = store.look(START).unwrap();
    assert_eq!(look.lanes[2].messages, 400);
    let kept = numbers_of(&drain(&mut store, START), Lane::Normal);
    assert_eq!(reasons(&look), [(Lane::Normal, "max_bytes", 400 - kept.len() as u64)]);
    assert_eq!(kept, (401 - kept.len() as u64..=400).collect::<Vec<_>>());
    assert!(kept.len() > 100, "{}", kept.len());
}

#[test]
fn a_lane_may_reject_where_another_drops() {
    let folder = folder();
    let rejects =
        LaneLimits { max_messages: Some(10), when_full: Some(WhenFull::RejectNew), ..LaneLimits::default() };
    let drops = LaneLimits { max_messages: Some(10), ..LaneLimits::default() };
    let mut settings = with_lane(folder.path(), Lane::Alarm, rejects);
    settings.lanes[Lane::Bulk as usize] = drops;
    let mut store = Store::open(settings).unwrap();
    for n in 0..10 {
        accept(&mut store, vec![noise(Lane::Alarm, 10, n), noise(Lane::Bulk, 10, n)]).unwrap();
    }
    let refused =
        accept(&mut store, vec![noise(Lane::Bulk, 10, 10), noise(Lane::Alarm, 10, 10)]).unwrap_err();
    assert!(matches!(refused, NotAccepted::LaneFull { lane: Lane::Alarm, max: 10, .. }), "{refused}");
    assert_eq!(
        store.look(START).unwrap().dropped,
        [],
        "the bulk message was refused with it, and dropped nothing"
    );
    accept(&mut store, vec![noise(Lane::Bulk, 10, 10)]).unwrap();
    assert_eq!(reasons(&store.look(START).unwrap()), [(Lane::Bulk, "max_messages", 1)]);
}

#[test]
fn what_is_older_than_its_lane_allows_is_dropped_and_nothing_else() {
    const HOUR: u64 = 3_600_000;
    let folder = folder();
    let limits = LaneLimits { max_age: Some(Duration::from_secs(3600)), ..LaneLimits::default() };
    let mut store = Store::open(with_lane(folder.path(), Lane::Normal, limits)).unwrap();
    for n in 0..90 {
        let both = vec![noise(Lane::Normal, 10, n), noise(Lane::Bulk, 10, n)];
        accept_at(&mut store, both, after(n * 60_000)).unwrap();
    }
    let look = store.look(after(HOUR)).unwrap();
    assert_eq!(reasons(&look), [(Lane::Normal, "max_age", 29)], "accepted in minutes 0 to 28");
    // The wall clock jumps: within one boot it means nothing.
    let jumped = Stamp { wall_ms: START.wall_ms + 400 * 24 * HOUR as i64, ..after(100 * 60_000) };
    let kept = drain(&mut store, jumped);
    assert_eq!(numbers_of(&kept, Lane::Normal), (41..=90).collect::<Vec<_>>());
    assert_eq!(numbers_of(&kept, Lane::Bulk).len(), 90);
}

#[test]
fn what_is_in_flight_is_never_dropped_by_age_and_goes_when_it_comes_back_too_old() {
    let folder = folder();
    let limits = LaneLimits { max_age: Some(Duration::from_secs(60)), ..LaneLimits::default() };
    let mut store = Store::open(with_lane(folder.path(), Lane::Normal, limits)).unwrap();
    store.begin(("b", "c"), OnSessionLoss::Republish, &[], START).unwrap();
    accept(&mut store, (0..20).map(|n| noise(Lane::Normal, 10, n)).collect()).unwrap();
    assert_eq!(take_at(&mut store, 2000, 5, START).len(), 5);
    accept_at(&mut store, vec![noise(Lane::Normal, 10, 99)], after(100_000)).unwrap();
    let look = store.look(START).unwrap();
    assert_eq!((look.rows, look.lanes[1].messages), (5, 6));
    assert_eq!(reasons(&look), [(Lane::Normal, "max_age", 15)]);
    let lost = Change::SessionAbsent(OnSessionLoss::Republish);
    store.commit(Batch { changes: vec![lost], ..Batch::default() }, after(100_000)).unwrap();
    assert_eq!(drain(&mut store, after(100_000)), [(Lane::Normal, 21)]);
    assert_eq!(reasons(&store.look(START).unwrap()), [(Lane::Normal, "max_age", 20)]);
}

#[test]
fn an_append_that_is_refused_has_dropped_nothing() {
    let folder = folder();
    let mut store = Store::open(Settings { quota: 64 << 10, ..settings(folder.path()) }).unwrap();
    // Half of the quota is in flight, the rest could be dropped.
    for n in 0..32 {
        accept(&mut store, vec![noise(Lane::Normal, 900, n)]).unwrap();
    }
    assert_eq!(take_at(&mut store, 2000, 32, START).len(), 32);
    for n in 32..60 {
        accept(&mut store, vec![noise(Lane::Normal, 900, n)]).unwrap();
    }
    let refused = accept(&mut store, vec![noise(Lane::Normal, 40_000, 1)]).unwrap_err();
    assert!(matches!(refused, NotAccepted::QuotaFull { .. }), "{refused}");
    let look = store.look(START).unwrap();
    assert_eq!((look.lanes[1].messages, look.dropped.len()), (60, 0));
    accept(&mut store, vec![noise(Lane::Normal, 20_000, 1)]).unwrap();
    assert!(store.look(START).unwrap().used_bytes <= 64 << 10);
}

#[test]
fn a_disk_with_too_little_free_space_counts_as_a_full_queue() {
    let folder = folder();
    let mut store = Store::open(settings(folder.path())).unwrap();
    for n in 0..200 {
        accept(&mut store, vec![noise(Lane::Normal, 900, n)]).unwrap();
    }
    store.close();
    // More than any disk has.
    let low = Settings { min_free_disk: 1 << 60, ..settings(folder.path()) };
    let mut store = Store::open(Settings { when_full: WhenFull::RejectNew, ..low.clone() }).unwrap();
    let refused = accept(&mut store, vec![noise(Lane::Normal, 900, 200)]).unwrap_err();
    assert!(matches!(refused, NotAccepted::DiskLow { .. }), "{refused}");
    store.close();
    let mut store = Store::open(low).unwrap();
    let before = store.pragma("page_count");
    for n in 200..300 {
        accept(&mut store, vec![noise(Lane::Normal, 900, n)]).unwrap();
    }
    let look = store.look(START).unwrap();
    assert_eq!(reasons(&look), [(Lane::Normal, "min_free_disk", 300 - look.lanes[1].messages)]);
    println!("{before} pages before, {} after 100 more messages", store.pragma("page_count"));
    assert!(store.pragma("page_count") <= before + before / 50, "the file has not grown to speak of");
    // Once it has drained, the room it leaves is used again: being online, the gateway loses nothing.
    drain(&mut store, START);
    for n in 0..50 {
        accept(&mut store, vec![noise(Lane::Normal, 900, n)]).unwrap();
    }
    assert_eq!(store.look(START).unwrap().lanes[1].messages, 50);
    assert!(store.pragma("page_count") <= before + before / 50);
}

#[test]
fn a_quota_that_was_lowered_under_a_million_messages_does_not_stall_a_commit() {
    let folder = folder();
    let mut store = Store::open(settings(folder.path())).unwrap();
    let batch: Vec<Message> = (0..5000).map(|n| noise(Lane::Normal, 30, n)).collect();
    for _ in 0..200 {
        accept(&mut store, batch.clone()).unwrap();
    }
    let quota = store.look(START).unwrap().used_bytes / 2;
    store.close();
    let mut store = Store::open(Settings { quota, ..settings(folder.path()) }).unwrap();
    let (mut longest, mut commits) = (Duration::ZERO, 0);
    while store.look(START).unwrap().used_bytes > quota {
        let began = Instant::now();
        accept(&mut store, vec![noise(Lane::Normal, 30, commits)]).unwrap();
        longest = longest.max(began.elapsed());
        commits += 1;
    }
    let look = store.look(START).unwrap();
    println!("{commits} commits of {longest:?} at most to drop {:?}", reasons(&look));
    assert!(commits > 2, "the work is spread over commits");
    assert_eq!(dropped_of(&look, Lane::Normal) + look.lanes[1].messages, 1_000_000 + commits);
    let first = take_at(&mut store, 2000, 1, START)[0].record.seq.0;
    assert_eq!(first, dropped_of(&look, Lane::Normal) + 1);
}

/// Each in an append of its own, all in one commit.
fn accept_each(store: &mut Store, messages: Vec<Message>) -> Vec<Result<(), NotAccepted>> {
    let append = |message| Append { messages: vec![message], closes: Vec::new() };
    let appends = messages.into_iter().map(append).collect();
    store.commit(Batch { appends, ..Batch::default() }, START).unwrap().appends
}

#[test]
fn what_one_commit_brings_to_a_lane_is_one_segment_and_packs_as_one() {
    let folder = folder();
    let telling = |n: u64| Message {
        payload: Payload::Whole(format!("{{\"gateway\":\"g1\",\"line\":\"line1\",\"value\":{n}}}").into()),
        ..noise(if n.is_multiple_of(10) { Lane::Alarm } else { Lane::Normal }, 0, 0)
    };
    let mut store = Store::open(settings(folder.path())).unwrap();
    let outcomes = accept_each(&mut store, (0..200).map(telling).collect());
    assert_eq!(outcomes, vec![Ok(()); 200]);
    let together = store.look(START).unwrap().lanes;
    assert_eq!(together.map(|lane| lane.messages), [20, 180, 0]);
    assert_eq!(drain(&mut store, START).len(), 200);
    for n in 0..200 {
        accept(&mut store, vec![telling(n)]).unwrap();
    }
    let alone = store.look(START).unwrap().lanes;
    println!("180 messages: {} bytes together, {} alone", together[1].bytes, alone[1].bytes);
    assert!(together[1].bytes * 4 < alone[1].bytes);
}

#[test]
fn an_append_that_does_not_fit_costs_its_neighbours_in_the_commit_nothing() {
    let folder = folder();
    let limits =
        LaneLimits { max_messages: Some(5), when_full: Some(WhenFull::RejectNew), ..LaneLimits::default() };
    let mut store = Store::open(with_lane(folder.path(), Lane::Normal, limits)).unwrap();
    let mut messages: Vec<Message> = (0..8).map(|n| noise(Lane::Normal, 20, n)).collect();
    messages.push(noise(Lane::Bulk, 20, 8));
    messages.insert(2, Message { qos: Qos::AtMostOnce, ..noise(Lane::Normal, 20, 9) });
    let outcomes = accept_each(&mut store, messages);
    let accepted: Vec<usize> = (0..10).filter(|n| outcomes[*n].is_ok()).collect();
    assert_eq!(accepted, [0, 1, 3, 4, 5, 9], "{outcomes:?}");
    assert_eq!(outcomes[2], Err(NotAccepted::Qos0));
    assert!(matches!(outcomes[6], Err(NotAccepted::LaneFull { lane: Lane::Normal, .. })));
    let kept = drain(&mut store, START);
    assert_eq!((numbers_of(&kept, Lane::Normal).len(), numbers_of(&kept, Lane::Bulk).len()), (5, 1));
}

#[test]
fn what_comes_with_an_alarm_in_one_commit_pushes_out_no_alarm() {
    let folder = folder();
    let mut store = Store::open(Settings { quota: 20_000, ..settings(folder.path()) }).unwrap();
    for n in 0..60 {
        accept(&mut store, vec![noise(Lane::Alarm, 300, n)]).unwrap();
    }
    let before = store.look(START).unwrap();
    let outcomes = accept_each(
        &mut store,
        vec![noise(Lane::Bulk, 4_000, 100), noise(Lane::Alarm, 300, 101), noise(Lane::Bulk, 4_000, 102)],
    );
    let after = store.look(START).unwrap();
    assert!(matches!(
        outcomes[..],
        [Err(NotAccepted::QuotaFull { .. }), Ok(()), Err(NotAccepted::QuotaFull { .. })]
    ));
    assert_eq!(
        after.lanes[0].messages + dropped_of(&after, Lane::Alarm),
        before.lanes[0].messages + dropped_of(&before, Lane::Alarm) + 1
    );
    assert!(dropped_of(&after, Lane::Alarm) - dropped_of(&before, Lane::Alarm) <= 1, "{:?}", reasons(&after));
}
