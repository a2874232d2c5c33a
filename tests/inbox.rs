//! Commands in the store: recorded before they are acknowledged, begun before they are carried out, answered in one
//! transaction with their end, and known by their id from then on.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use fieldpost::clock;
use fieldpost::command::{CommandStep, Stepped};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{Append, Batch, Committed, KNOWN_MAX, NotAccepted, Settings, Store, WhenFull};
use fieldpost::turn::{Change, Inbound, Offer, OnSessionLoss, Taken};

const QUOTA: u64 = 1 << 20;

fn open_with(folder: &Path, when_full: WhenFull) -> Store {
    let path = folder.join("outbox.db");
    let commit_interval = [Duration::ZERO; 3];
    Store::open(Settings { quota: QUOTA, when_full, commit_interval, ..Settings::new(path) }).unwrap()
}

fn open(folder: &Path) -> Store {
    open_with(folder, WhenFull::DropOldest)
}

fn inbound(payload: &[u8]) -> Inbound {
    Inbound {
        topic: Topic::new("base/command").unwrap(),
        payload: Bytes::copy_from_slice(payload),
        qos: Qos::AtLeastOnce,
        retain: false,
        response_topic: Some("plant/answers/1".into()),
        correlation_data: Some(Bytes::from_static(&[0, 255, 1])),
    }
}

fn message(lane: Lane, payload: Bytes) -> Message {
    Message {
        topic: Topic::new("base/answer").unwrap(),
        qos: Qos::ExactlyOnce,
        retain: false,
        lane,
        at: clock::now(),
        expires_after: None,
        correlation_data: Some(Bytes::from_static(&[0, 255, 1])),
        payload: Payload::Whole(payload),
    }
}

fn record(store: &mut Store, count: u16) -> Committed {
    let change = |id| Change::Inbound { id: PacketId::new(id), inbound: inbound(b"{}") };
    let changes = (1..=count).map(change).collect();
    store.commit(Batch { changes, ..Batch::default() }, clock::now()).unwrap()
}

fn step(store: &mut Store, step: CommandStep) -> Stepped {
    store.commit(Batch { steps: vec![step], ..Batch::default() }, clock::now()).unwrap().steps[0]
}

fn begin(number: u64, id: &str) -> CommandStep {
    CommandStep::Begin { number, id: id.into() }
}

fn answer(number: u64, id: Option<&str>) -> CommandStep {
    let text = Bytes::from(format!("answer to {number}"));
    CommandStep::Answer { number, id: id.map(str::to_owned), answer: Box::new(message(Lane::Alarm, text)) }
}

fn numbers(store: &Store) -> Vec<u64> {
    store.recorded(0, 1000, clock::now()).unwrap().iter().map(|recorded| recorded.number).collect()
}

fn offer(count: u16) -> Offer {
    Offer {
        ids: (2000..2000 + count).map(|id| PacketId::new(id).unwrap()).collect(),
        qos2_room: usize::from(count),
        max_bytes: 16 << 20,
        max_qos: Qos::ExactlyOnce,
        max_publish_bytes: None,
    }
}

fn take(store: &mut Store, count: u16) -> Vec<Taken> {
    store.commit(Batch { offer: Some(offer(count)), ..Batch::default() }, clock::now()).unwrap().taken
}

#[test]
fn a_command_is_recorded_begun_and_answered_and_survives_each_step() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    record(&mut store, 2);
    drop(store);
    let mut store = open(folder.path());
    let recorded = store.recorded(0, 10, clock::now()).unwrap();
    assert_eq!(recorded.iter().map(|r| r.number).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(recorded[0].inbound, inbound(b"{}"));
    assert!(recorded[0].age_ms.is_some_and(|ms| ms < 60_000));
    assert_eq!(step(&mut store, begin(1, "a")), Stepped::Done);
    drop(store);
    let mut store = open(folder.path());
    assert_eq!(numbers(&store), [2]);
    let begun = store.interrupted(clock::now()).unwrap();
    assert_eq!((begun[0].number, begun[0].id.as_deref(), begun.len()), (1, Some("a"), 1));
    assert_eq!(step(&mut store, answer(1, Some("a"))), Stepped::Done);
    assert_eq!(step(&mut store, answer(1, Some("a"))), Stepped::Done, "handed in again after a failure");
    drop(store);
    let mut store = open(folder.path());
    assert_eq!(store.interrupted(clock::now()).unwrap(), []);
    let taken = take(&mut store, 10);
    assert_eq!(taken.len(), 1, "one answer");
    assert_eq!(taken[0].record.correlation_data.as_deref(), Some(&[0, 255, 1][..]));
}

#[test]
fn an_id_belongs_to_one_command_whatever_became_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    record(&mut store, 6);
    assert_eq!(step(&mut store, begin(1, "a")), Stepped::Done);
    assert_eq!(step(&mut store, begin(2, "a")), Stepped::Repeated);
    assert_eq!(step(&mut store, answer(3, Some("a"))), Stepped::Repeated);
    assert_eq!(step(&mut store, answer(1, Some("a"))), Stepped::Done);
    assert_eq!(step(&mut store, answer(4, Some("a"))), Stepped::Repeated);
    assert_eq!(step(&mut store, answer(5, Some("b"))), Stepped::Done, "refused");
    assert_eq!(step(&mut store, begin(6, "b")), Stepped::Repeated, "what was refused stays so");
    assert_eq!(step(&mut store, begin(6, "c")), Stepped::Gone);
    assert_eq!((numbers(&store), take(&mut store, 10).len()), (vec![], 2));
}

#[test]
fn a_command_whose_row_was_lost_to_damage_is_not_begun_and_its_answer_is_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    assert_eq!(step(&mut store, begin(7, "a")), Stepped::Gone);
    assert_eq!(step(&mut store, answer(7, Some("a"))), Stepped::Done);
    assert_eq!(step(&mut store, answer(7, Some("a"))), Stepped::Done);
    record(&mut store, 1);
    let next = store.newest_command();
    assert_eq!(step(&mut store, begin(next, "a")), Stepped::Repeated);
    assert_eq!(take(&mut store, 10).len(), 1);
}

#[test]
fn numbers_of_commands_go_on_although_their_rows_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    record(&mut store, 1);
    assert_eq!(step(&mut store, answer(1, None)), Stepped::Done);
    record(&mut store, 1);
    assert_eq!((numbers(&store), store.newest_command()), (vec![2], 2));
    assert_eq!(store.look(clock::now()).unwrap().inbox, 1);
}

#[test]
fn the_newest_ids_stay_known_and_no_flood_of_refusals_forgets_an_executed_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let inbound =
        |count: u64| (0..count).map(|_| Change::Inbound { id: None, inbound: inbound(b"{}") }).collect();
    let batch = |changes, steps| Batch { changes, steps, ..Batch::default() };
    store
        .commit(batch(inbound(1), vec![begin(1, "executed"), answer(1, Some("executed"))]), clock::now())
        .unwrap();
    for from in (2..=KNOWN_MAX + 2).step_by(1000) {
        let steps = (from..from + 1000).map(|n| answer(n, Some(&format!("refused {n}")))).collect();
        let done = store.commit(batch(inbound(1000), steps), clock::now()).unwrap().steps;
        assert!(done.iter().all(|stepped| *stepped == Stepped::Done));
        take_and_settle(&mut store);
    }
    store.commit(batch(inbound(3), vec![]), clock::now()).unwrap();
    let next = store.newest_command() - 2;
    assert_eq!(step(&mut store, begin(next, "executed")), Stepped::Repeated);
    assert_eq!(
        step(&mut store, begin(next + 1, &format!("refused {}", next - KNOWN_MAX))),
        Stepped::Repeated
    );
    assert_eq!(step(&mut store, begin(next + 2, "refused 2")), Stepped::Done, "long forgotten");
}

fn take_and_settle(store: &mut Store) {
    let taken = take(store, 2000);
    let changes = taken.into_iter().map(|taken| Change::Completed(taken.id)).collect();
    store.commit(Batch { changes, ..Batch::default() }, clock::now()).unwrap();
}

#[test]
fn the_inbox_is_bounded_in_messages_and_bytes_and_free_again_when_they_are_dealt_with() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let large = || Change::Inbound { id: PacketId::new(7), inbound: inbound(&vec![b'x'; 1 << 20]) };
    let committed = store
        .commit(Batch { changes: (0..5).map(|_| large()).collect(), ..Batch::default() }, clock::now())
        .unwrap();
    assert_eq!(committed.refused.len(), 2, "three of 1 MiB fit into 4 MiB");
    assert_eq!(step(&mut store, answer(1, None)), Stepped::Done);
    let committed = store.commit(Batch { changes: vec![large()], ..Batch::default() }, clock::now()).unwrap();
    assert_eq!((committed.refused.len(), numbers(&store)), (0, vec![2, 3, 4]));
    drop(store);
    let mut store = open(folder.path());
    let committed = store.commit(Batch { changes: vec![large()], ..Batch::default() }, clock::now()).unwrap();
    assert_eq!(committed.refused.len(), 1, "counted anew at the start");
}

/// Fills the queue until it takes nothing more; everything is in flight.
fn fill(store: &mut Store) {
    for id in 3000.. {
        let text: Bytes = (0..4096).map(|_| fastrand::u8(..)).collect();
        let telemetry = Append { messages: vec![message(Lane::Normal, text)], closes: Vec::new() };
        let offer = Offer { ids: vec![PacketId::new(id).unwrap()], ..offer(1) };
        let batch = Batch { appends: vec![telemetry], offer: Some(offer), ..Batch::default() };
        match &store.commit(batch, clock::now()).unwrap().appends[0] {
            Ok(()) => {}
            Err(NotAccepted::QuotaFull { .. }) => return,
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_quota_full_agent_still_records_pubrecs_commands_answers_and_gap_records() {
    for when_full in [WhenFull::RejectNew, WhenFull::DropOldest] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = open_with(folder.path(), when_full);
        store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
        fill(&mut store);
        let look = store.look(clock::now()).unwrap();
        assert!(look.used_bytes + 4200 > QUOTA && look.rows > 200, "{look:?}");
        let begin_again = store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
        let rows = begin_again.resume.len();
        let Some(fieldpost::turn::Resume::Row { id, .. }) = begin_again.resume.first() else {
            panic!("no rows")
        };
        let changes = vec![
            Change::Received(*id),
            Change::InboundOpened { id: PacketId::new(9).unwrap(), hash: 1, inbound: inbound(b"{}") },
            Change::Inbound { id: PacketId::new(10), inbound: inbound(b"{}") },
        ];
        let committed = store.commit(Batch { changes, ..Batch::default() }, clock::now()).unwrap();
        assert_eq!((committed.refused.len(), numbers(&store)), (0, vec![1, 2]), "{when_full:?}");
        assert_eq!(step(&mut store, begin(1, "a")), Stepped::Done, "{when_full:?}");
        assert_eq!(step(&mut store, answer(1, Some("a"))), Stepped::Done, "{when_full:?}");
        assert_eq!(step(&mut store, answer(2, None)), Stepped::Done, "{when_full:?}");
        let Some(fieldpost::turn::Resume::Row { id, lane, seq, .. }) = begin_again.resume.last() else {
            panic!("no rows")
        };
        let lost = Change::DeadLetter { id: Some(*id), lane: *lane, seq: *seq, reason: 0x99 };
        store.commit(Batch { changes: vec![lost], ..Batch::default() }, clock::now()).unwrap();
        let gaps = store.look(clock::now()).unwrap().gaps;
        assert_eq!(gaps.len(), 1, "{when_full:?}");
        let told = Append { messages: vec![message(Lane::Alarm, Bytes::from_static(b"gap"))], closes: gaps };
        let committed =
            store.commit(Batch { appends: vec![told], ..Batch::default() }, clock::now()).unwrap();
        assert_eq!(committed.appends, [Ok(())], "{when_full:?}");
        drop(store);
        let mut store = open_with(folder.path(), when_full);
        let resumed = store.begin(("b", "c"), OnSessionLoss::Republish, &[], clock::now()).unwrap();
        assert_eq!(resumed.resume.len(), rows - 1, "{when_full:?}");
        let alarms =
            take(&mut store, 10).into_iter().filter(|taken| taken.record.lane == Lane::Alarm).count();
        assert_eq!(alarms, 3, "two answers and the gap record, {when_full:?}");
        assert!(store.look(clock::now()).unwrap().gaps.is_empty());
    }
}

#[test]
fn answers_above_the_quota_are_bounded_and_the_command_waits() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open_with(folder.path(), WhenFull::RejectNew);
    fill(&mut store);
    let large = |number| CommandStep::Answer {
        number,
        id: Some(format!("{number}")),
        answer: Box::new(message(Lane::Alarm, (0..100_000).map(|_| fastrand::u8(..)).collect())),
    };
    let mut stored = 0;
    loop {
        record(&mut store, 1);
        stored += 1;
        assert!(stored < 100, "answers are not bounded");
        if step(&mut store, large(stored)) == Stepped::NoRoom {
            break;
        }
    }
    assert!(stored > 20, "{stored} answers of 100 kB");
    assert_eq!(numbers(&store), [stored], "it is still there");
    let used = store.look(clock::now()).unwrap().used_bytes;
    assert!(used <= QUOTA + (4 << 20), "{used}");
}
