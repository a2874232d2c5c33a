//! The outbox database through its synchronous face, on real files.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use fieldpost::clock::{self, Stamp};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Seq, Topic};
use fieldpost::store::{Append, Batch, Committed, NotAccepted, Settings, Store, StoreError, WhenFull};
use fieldpost::turn::{Begin, Change, Hold, Inbound, Offer, OnSessionLoss, Resume, RowState, Taken};

fn settings(folder: &Path) -> Settings {
    Settings { quota: 64 << 20, ..Settings::new(folder.join("outbox.db")) }
}

fn open(folder: &Path) -> Store {
    Store::open(settings(folder)).unwrap()
}

fn message(topic: &str, qos: Qos, text: &str) -> Message {
    Message {
        topic: Topic::new(topic).unwrap(),
        qos,
        retain: false,
        lane: Lane::Normal,
        at: clock::now(),
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(Bytes::copy_from_slice(text.as_bytes())),
    }
}

fn accept(store: &mut Store, messages: Vec<Message>) -> Committed {
    let append = Append { messages, closes: Vec::new() };
    store.commit(Batch { appends: vec![append], ..Batch::default() }, clock::now()).unwrap()
}

fn texts(topic: &str, qos: Qos, range: std::ops::Range<u32>) -> Vec<Message> {
    range.map(|n| message(topic, qos, &n.to_string())).collect()
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

fn take_at(store: &mut Store, offer: Offer, now: Stamp) -> Vec<Taken> {
    store.commit(Batch { offer: Some(offer), ..Batch::default() }, now).unwrap().taken
}

fn take(store: &mut Store, first_id: u16, count: u16) -> Vec<Taken> {
    take_at(store, offer(first_id, count), clock::now())
}

fn settle(store: &mut Store, changes: Vec<Change>) -> Committed {
    store.commit(Batch { changes, ..Batch::default() }, clock::now()).unwrap()
}

fn begin(store: &mut Store, broker: &str) -> Begin {
    store.begin((broker, "client"), OnSessionLoss::Republish, &[], clock::now()).unwrap()
}

fn payloads(taken: &[Taken]) -> Vec<String> {
    taken.iter().map(|taken| String::from_utf8(taken.record.payload.to_vec()).unwrap()).collect()
}

fn id(number: u16) -> PacketId {
    PacketId::new(number).unwrap()
}

#[test]
fn messages_come_out_in_order_alarms_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::AtLeastOnce, 0..3));
    let alarm = Message { lane: Lane::Alarm, ..message("a", Qos::AtLeastOnce, "alarm") };
    accept(&mut store, vec![alarm]);
    assert_eq!(payloads(&take(&mut store, 2000, 10)), ["alarm", "0", "1", "2"]);
    assert!(take(&mut store, 3000, 10).is_empty());
}

#[test]
fn what_is_accepted_is_there_after_opening_again_and_numbers_never_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::AtLeastOnce, 0..3));
    let done = take(&mut store, 2000, 3)
        .into_iter()
        .map(|taken| Change::Acknowledged { lane: taken.record.lane, seq: taken.record.seq });
    settle(&mut store, done.collect());
    assert_eq!(store.look(clock::now()).unwrap().used_bytes, 0, "a drained queue takes no space");
    drop(store);
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::AtLeastOnce, 3..4));
    let taken = take(&mut store, 2000, 3);
    assert_eq!((payloads(&taken), taken[0].record.seq), (vec!["3".to_owned()], Seq(4)));
}

#[test]
fn a_numbered_payload_carries_the_number_it_was_accepted_under() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let numbered =
        || Message { payload: Payload::Numbered(b"{\"v\":1".to_vec()), ..message("t", Qos::ExactlyOnce, "") };
    accept(&mut store, vec![numbered(), numbered()]);
    assert_eq!(
        payloads(&take(&mut store, 2000, 2)),
        [r#"{"v":1,"epoch":1,"seq":1}"#, r#"{"v":1,"epoch":1,"seq":2}"#]
    );
}

#[test]
fn a_qos_2_message_has_its_row_when_it_is_handed_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "b");
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..2));
    take(&mut store, 2000, 2);
    settle(&mut store, vec![Change::Received(id(2001))]);
    drop(store);
    let begin = begin(&mut open(folder.path()), "b");
    let rows: Vec<_> = begin
        .resume
        .iter()
        .map(|resume| match resume {
            Resume::Row { id, state, record, .. } => (id.get(), *state, record.is_some()),
            Resume::Older(_) => panic!("nothing is older"),
        })
        .collect();
    assert_eq!(rows, [(2000, RowState::Published, true), (2001, RowState::Received, false)]);
    assert!(begin.session_uncertain, "committed before CONNECT while rows are in flight");
}

#[test]
fn done_bit_and_row_go_in_one_transaction() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..2));
    take(&mut store, 2000, 2);
    let committed = settle(&mut store, vec![Change::Received(id(2000)), Change::Completed(id(2000))]);
    assert_eq!(committed.settled.delivered, 1);
    drop(store);
    let mut store = open(folder.path());
    let look = store.look(clock::now()).unwrap();
    assert_eq!((look.rows, look.lanes[1].messages), (1, 1));
    assert!(take(&mut store, 3000, 10).is_empty(), "the other one has its row");
}

#[test]
fn a_new_database_asks_for_a_clean_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    assert!(begin(&mut store, "b").clean_start_needed);
    drop(store);
    let mut store = open(folder.path());
    assert!(begin(&mut store, "b").clean_start_needed, "until an absent session was committed");
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    assert!(!begin(&mut store, "b").clean_start_needed);
}

#[test]
fn a_broker_that_is_not_configured_any_more_is_forgotten_and_its_rows_are_queued_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = at_broker_one(folder.path());
    let owners = ["two", "three"].map(|broker| (broker.to_owned(), "client".to_owned()));
    let settled = store.keep_owners(&owners, OnSessionLoss::Republish).unwrap();
    assert_eq!(settled.possibly_doubled, 2, "either may have been there");
    let two = begin(&mut store, "two");
    assert!(two.clean_start_needed && two.resume.is_empty() && !two.session_uncertain);
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    assert_eq!(payloads(&take(&mut store, 2000, 5)), ["0", "1"]);
    let one = begin(&mut store, "one");
    assert!(one.clean_start_needed && one.resume.is_empty(), "nothing is known of it any more");
}

/// A store whose broker `one` has two messages: 2000 after PUBREC, 2001 published.
fn at_broker_one(folder: &Path) -> Store {
    let mut store = open(folder);
    begin(&mut store, "one");
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..2));
    take(&mut store, 2000, 2);
    settle(&mut store, vec![Change::Received(id(2000)), Change::Canary { proven: true }]);
    store
}

fn inbound(text: &'static str) -> Inbound {
    Inbound {
        topic: Topic::new("cmd").unwrap(),
        payload: Bytes::from_static(text.as_bytes()),
        qos: Qos::ExactlyOnce,
        retain: false,
        response_topic: None,
        correlation_data: None,
    }
}

/// Identifiers and states of what is to be resumed.
fn states(begin: &Begin) -> Vec<(u16, RowState)> {
    let state = |resume: &Resume| match resume {
        Resume::Row { id, state, .. } => (id.get(), *state),
        Resume::Older(record) => panic!("{record:?}"),
    };
    begin.resume.iter().map(state).collect()
}

#[test]
fn nothing_moves_to_another_broker_before_it_has_answered() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = at_broker_one(folder.path());
    let held = vec![(2000, RowState::Received), (2001, RowState::Published)];
    for crash in [false, true] {
        if crash {
            drop(store);
            store = open(folder.path());
        }
        let two = begin(&mut store, "two");
        assert!(two.clean_start_needed && two.resume.is_empty() && !two.session_uncertain);
        let one = begin(&mut store, "one");
        assert_eq!(states(&one), held, "there was no way to the other one");
        assert!(one.session_uncertain && one.canary_proven && !one.clean_start_needed);
    }
    begin(&mut store, "two");
    settle(&mut store, vec![Change::SessionReplaced(OnSessionLoss::Republish)]);
    assert_eq!(states(&begin(&mut store, "one")), held, "nor to one whose session has to go first");
}

#[test]
fn what_moves_to_another_broker_is_counted_and_its_identifiers_are_freed_on_return() {
    for (policy, texts, lost) in
        [(OnSessionLoss::Republish, vec!["0", "1"], 0), (OnSessionLoss::Drop, vec!["1"], 1)]
    {
        for verdict in [Change::SessionAbsent(policy), Change::SessionPresent, Change::RowsVoid(policy)] {
            let folder = tempfile::tempdir().unwrap();
            let mut store = at_broker_one(folder.path());
            store.begin(("two", "client"), policy, &[], clock::now()).unwrap();
            let settled = settle(&mut store, vec![verdict]).settled;
            assert_eq!((settled.possibly_doubled, settled.possibly_lost), (2 - lost, lost));
            // The same identifiers, at another owner.
            assert_eq!(payloads(&take(&mut store, 2000, 5)), texts);
            drop(store);
            let mut store = open(folder.path());
            let one = begin(&mut store, "one");
            assert_eq!(states(&one), [(2000, RowState::Moved), (2001, RowState::Moved)]);
            assert!(one.session_uncertain && one.canary_proven && !one.clean_start_needed);
            // What waits at the second one is not handed out at the first before that has answered, and not lost.
            assert_eq!(payloads(&take(&mut store, 3000, 5)), [""; 0]);
            let settled = settle(&mut store, vec![Change::SessionPresent]).settled;
            assert_eq!(settled.possibly_doubled, 2 - lost);
            let completed = [2000, 2001].map(id).map(Change::Completed);
            let settled = settle(&mut store, completed.to_vec()).settled;
            assert_eq!((settled.delivered, settled.abandoned), (0, 0), "counted when they moved");
            assert_eq!(payloads(&take(&mut store, 3000, 5)), texts);
            assert_eq!(states(&begin(&mut store, "two")).len(), texts.len(), "moved in their turn");
        }
    }
}

#[test]
fn inbound_identifiers_and_flags_are_each_owners_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let open_at = |store: &mut Store, broker: &str| begin(store, broker).rx_open;
    begin(&mut store, "one");
    let opened = Change::InboundOpened { id: id(7), hash: 1, inbound: inbound("x") };
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish), opened]);
    assert_eq!(open_at(&mut store, "two"), []);
    let opened = Change::InboundOpened { id: id(7), hash: 2, inbound: inbound("y") };
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish), opened]);
    assert_eq!(open_at(&mut store, "one"), [(id(7), 1)]);
    settle(&mut store, vec![Change::InboundReleased(id(7))]);
    assert_eq!((open_at(&mut store, "one"), open_at(&mut store, "two")), (vec![], vec![(id(7), 2)]));
    settle(&mut store, vec![Change::SessionReplaced(OnSessionLoss::Republish)]);
    assert!(begin(&mut store, "two").clean_start_needed && !begin(&mut store, "one").clean_start_needed);
}

#[test]
fn a_lost_session_queues_rows_again_and_treats_the_ambiguous_by_policy() {
    for (policy, left) in [(OnSessionLoss::Republish, vec!["0", "1"]), (OnSessionLoss::Drop, vec!["0"])] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = open(folder.path());
        accept(&mut store, texts("t", Qos::ExactlyOnce, 0..2));
        take(&mut store, 2000, 2);
        settle(&mut store, vec![Change::Received(id(2001)), Change::SessionAbsent(policy)]);
        assert_eq!(payloads(&take(&mut store, 2100, 5)), left);
    }
}

#[test]
fn a_segment_stays_until_its_last_record_is_done_and_no_row_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..3));
    take(&mut store, 2000, 3);
    let three = [2000, 2001, 2002].map(id);
    settle(&mut store, three.map(Change::Received).to_vec());
    settle(&mut store, three[..2].iter().copied().map(Change::Completed).collect());
    assert!(store.look(clock::now()).unwrap().used_bytes > 0, "PUBREC is not done");
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    assert_eq!(payloads(&take(&mut store, 2100, 5)), ["2"], "its bytes were still there");
}

#[test]
fn unfinished_qos_1_messages_older_than_a_row_go_before_it_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "");
    accept(&mut store, vec![message("t", Qos::AtLeastOnce, "1"), message("t", Qos::ExactlyOnce, "2")]);
    take(&mut store, 2000, 2);
    drop(store);
    let begin = begin(&mut open(folder.path()), "");
    assert!(matches!(
        &begin.resume[..],
        [Resume::Older(older), Resume::Row { .. }] if &older.payload[..] == b"1"
    ));
}

#[test]
fn unfinished_qos_1_messages_that_nobody_holds_any_more_go_before_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "");
    accept(&mut store, vec![message("t", Qos::AtLeastOnce, "1"), message("t", Qos::ExactlyOnce, "2")]);
    take(&mut store, 2000, 2);
    let begin = begin(&mut store, "");
    assert!(matches!(
        &begin.resume[..],
        [Resume::Older(older), Resume::Row { .. }] if &older.payload[..] == b"1"
    ));
}

#[test]
fn a_message_of_a_held_topic_does_not_go_before_a_row() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "");
    accept(&mut store, texts("a", Qos::AtLeastOnce, 0..2));
    accept(&mut store, vec![message("b", Qos::ExactlyOnce, "2")]);
    let seq = take(&mut store, 2000, 3)[0].record.seq;
    let (lane, hold) = (Lane::Normal, Hold::Topic);
    settle(&mut store, vec![Change::Refused { id: None, lane, seq, hold, hold_ms: 60_000, reason: 0x97 }]);
    let begin = begin(&mut store, "");
    assert!(matches!(&begin.resume[..], [Resume::Row { .. }]), "{:?}", begin.resume);
}

#[test]
fn qos_1_messages_the_session_no_longer_holds_are_handed_out_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::AtLeastOnce, 0..3));
    let taken = take(&mut store, 2000, 3);
    let held = (taken[1].record.lane, taken[1].record.seq);
    store.begin(("", ""), OnSessionLoss::Republish, &[held], clock::now()).unwrap();
    assert_eq!(payloads(&take(&mut store, 2100, 5)), ["0", "2"]);
}

#[test]
fn an_abandoned_row_keeps_its_identifier_until_pubcomp_and_its_message_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "");
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..1));
    take(&mut store, 2000, 1);
    settle(&mut store, vec![Change::Abandoned(id(2000))]);
    let look = store.look(clock::now()).unwrap();
    assert_eq!((look.rows, look.lanes[1].messages), (1, 0));
    assert_eq!(look.dropped, [(Lane::Normal, "abandoned".to_owned(), 1)]);
    let resume = begin(&mut store, "").resume;
    assert!(matches!(resume[..], [Resume::Row { state: RowState::Abandoned, .. }]));
    settle(&mut store, vec![Change::Completed(id(2000))]);
    assert_eq!(store.look(clock::now()).unwrap().rows, 0);
}

#[test]
fn a_refused_message_holds_its_topic_and_lets_the_others_pass() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let start = clock::now();
    let both = vec![message("a", Qos::AtLeastOnce, "a1"), message("b", Qos::AtLeastOnce, "b1")];
    accept(&mut store, both);
    let taken = take(&mut store, 2000, 1);
    let refused = Change::Refused {
        id: None,
        lane: Lane::Normal,
        seq: taken[0].record.seq,
        hold: Hold::Topic,
        hold_ms: 60_000,
        reason: 0x97,
    };
    settle(&mut store, vec![refused]);
    accept(&mut store, vec![message("a", Qos::AtLeastOnce, "a2"), message("b", Qos::AtLeastOnce, "b2")]);
    assert_eq!(payloads(&take_at(&mut store, offer(2100, 9), start)), ["b1", "b2"]);
    let later = Stamp { mono_ms: start.mono_ms + 120_000, ..start };
    assert_eq!(
        payloads(&take_at(&mut store, offer(2200, 9), later)),
        ["a1"],
        "alone, or a2 might overtake it"
    );
    settle(&mut store, vec![Change::Acknowledged { lane: Lane::Normal, seq: taken[0].record.seq }]);
    assert_eq!(payloads(&take_at(&mut store, offer(2300, 9), later)), ["a2"]);
}

#[test]
fn what_a_lost_session_gives_back_goes_before_a_newer_message_that_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let start = clock::now();
    accept(&mut store, texts("t", Qos::ExactlyOnce, 1..4));
    take(&mut store, 2000, 2);
    let (lane, hold) = (Lane::Normal, Hold::Topic);
    let refused =
        Change::Refused { id: Some(id(2001)), lane, seq: Seq(2), hold, hold_ms: 1_000, reason: 0x97 };
    settle(&mut store, vec![refused]);
    let later = Stamp { mono_ms: start.mono_ms + 60_000, ..start };
    assert!(take_at(&mut store, Offer { qos2_room: 0, ..offer(2100, 9) }, later).is_empty());
    settle(&mut store, vec![Change::SessionAbsent(OnSessionLoss::Republish)]);
    assert_eq!(payloads(&take_at(&mut store, offer(2200, 9), later)), ["1"], "alone: its topic is on trial");
    settle(&mut store, vec![Change::Received(id(2200)), Change::Completed(id(2200))]);
    assert_eq!(payloads(&take_at(&mut store, offer(2300, 9), later)), ["2", "3"]);
}

#[test]
fn not_authorized_holds_the_lane_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let start = clock::now();
    accept(&mut store, texts("t", Qos::ExactlyOnce, 0..2));
    take(&mut store, 2000, 1);
    let (lane, hold) = (Lane::Normal, Hold::Lane);
    let refused =
        Change::Refused { id: Some(id(2000)), lane, seq: Seq(1), hold, hold_ms: 30_000, reason: 0x87 };
    settle(&mut store, vec![refused]);
    accept(&mut store, vec![Message { lane: Lane::Bulk, ..message("u", Qos::AtLeastOnce, "bulk") }]);
    assert_eq!(payloads(&take_at(&mut store, offer(2100, 9), start)), ["bulk"]);
    let later = Stamp { mono_ms: start.mono_ms + 120_000, ..start };
    assert_eq!(payloads(&take_at(&mut store, offer(2200, 9), later)), ["0", "1"]);
}

#[test]
fn a_message_the_broker_can_never_take_becomes_a_dead_letter_and_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    accept(
        &mut store,
        vec![message("t", Qos::ExactlyOnce, &"x".repeat(500)), message("t", Qos::ExactlyOnce, "y")],
    );
    let small = Offer { max_publish_bytes: Some(100), ..offer(2000, 5) };
    assert_eq!(payloads(&take_at(&mut store, small, clock::now())), ["y"]);
    let look = store.look(clock::now()).unwrap();
    assert_eq!((look.dead_letters, look.rows), (1, 1));
    assert_eq!(look.dropped, [(Lane::Normal, "dead_letter".to_owned(), 1)]);
}

#[test]
fn an_expired_message_is_dropped_counted_and_told_in_a_gap() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let short =
        Message { expires_after: Some(Duration::from_secs(10)), ..message("t", Qos::AtLeastOnce, "old") };
    accept(&mut store, vec![short, message("t", Qos::AtLeastOnce, "new")]);
    let now = clock::now();
    let later = Stamp { mono_ms: now.mono_ms + 11_000, ..now };
    assert_eq!(payloads(&take_at(&mut store, offer(2000, 5), later)), ["new"]);
    let gaps = store.look(later).unwrap().gaps;
    assert_eq!(
        (gaps.len(), gaps[0].reason.as_str(), gaps[0].first, gaps[0].count),
        (1, "expired", Seq(1), 1)
    );
}

#[test]
fn beyond_the_quota_the_oldest_go_first_never_what_is_in_flight_and_the_gap_adds_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(Settings { quota: 64 << 10, ..settings(folder.path()) }).unwrap();
    // Noise, so that packing does not stretch the quota.
    let noise = |n: u64| {
        let mut random = fastrand::Rng::with_seed(n);
        let mut bytes = n.to_string().into_bytes();
        bytes.resize_with(bytes.len() + 1000, || random.u8(..));
        Message { payload: Payload::Whole(bytes.into()), ..message("t", Qos::ExactlyOnce, "") }
    };
    for n in 0..10 {
        accept(&mut store, vec![noise(n)]);
    }
    let in_flight = take(&mut store, 2000, 2);
    for n in 10..200 {
        let committed = accept(&mut store, vec![noise(n)]);
        assert_eq!(committed.appends, [Ok(())]);
    }
    let look = store.look(clock::now()).unwrap();
    assert!(look.used_bytes <= 64 << 10);
    let kept = take(&mut store, 3000, 1000);
    assert_eq!(kept.last().unwrap().record.seq, Seq(200), "the newest are kept");
    let numbers: Vec<u64> = kept.iter().map(|taken| taken.record.seq.0).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "without holes: {numbers:?}");
    let gap = &look.gaps[0];
    assert_eq!((gap.first, gap.last), (Seq(3), Seq(numbers[0] - 1)));
    assert_eq!(gap.count as usize + kept.len() + in_flight.len(), 200);
    assert_eq!(look.rows, 2);
}

#[test]
fn what_may_wait_never_pushes_out_an_alarm() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(Settings { quota: 8 << 10, ..settings(folder.path()) }).unwrap();
    let noise = |seed: u64, lane| {
        let mut random = fastrand::Rng::with_seed(seed);
        let text: String = (0..500).map(|_| random.alphanumeric()).collect();
        Message { lane, ..message("t", Qos::AtLeastOnce, &text) }
    };
    for seed in 0..10 {
        assert_eq!(accept(&mut store, vec![noise(seed, Lane::Alarm)]).appends, [Ok(())]);
    }
    for seed in 100..120 {
        // Room is made among its own kind, or it is refused.
        let _accepted_or_refused = accept(&mut store, vec![noise(seed, Lane::Bulk)]).appends;
    }
    let look = store.look(clock::now()).unwrap();
    assert_eq!(
        (look.lanes[0].messages, look.dropped.iter().any(|(lane, ..)| *lane == Lane::Alarm)),
        (10, false)
    );
    for seed in 200..210 {
        assert_eq!(
            accept(&mut store, vec![noise(seed, Lane::Alarm)]).appends,
            [Ok(())],
            "an alarm pushes out the rest"
        );
    }
}

#[test]
fn a_full_queue_that_rejects_still_records_everything_else() {
    let folder = tempfile::tempdir().unwrap();
    let full = Settings { quota: 4 << 10, when_full: WhenFull::RejectNew, ..settings(folder.path()) };
    let mut store = Store::open(full).unwrap();
    let mut accepted = 0u32;
    let refusal = loop {
        let mut random = fastrand::Rng::with_seed(u64::from(accepted));
        let text: String = (0..200).map(|_| random.alphanumeric()).collect();
        match accept(&mut store, vec![message("t", Qos::ExactlyOnce, &text)]).appends.remove(0) {
            Ok(()) => accepted += 1,
            Err(refusal) => break refusal,
        }
    };
    assert!(matches!(refusal, NotAccepted::QuotaFull { .. }), "{refusal}");
    assert!(accepted > 5);
    take(&mut store, 2000, 3);
    let inbound = inbound("{}");
    settle(
        &mut store,
        vec![Change::Received(id(2000)), Change::InboundOpened { id: id(7), hash: 9, inbound }],
    );
    let report = Append {
        messages: vec![Message { lane: Lane::Alarm, ..message("gap", Qos::AtLeastOnce, "gap") }],
        closes: vec![fieldpost::store::Gap {
            lane: Lane::Normal,
            reason: "quota".into(),
            first: Seq(1),
            last: Seq(1),
            count: 1,
        }],
    };
    let committed = store.commit(Batch { appends: vec![report], ..Batch::default() }, clock::now()).unwrap();
    assert_eq!(committed.appends, [Ok(())]);
    assert_eq!(store.look(clock::now()).unwrap().inbox, 1);
}

#[test]
fn reporting_a_gap_closes_what_was_told_and_keeps_what_came_since() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let now = clock::now();
    let later = Stamp { mono_ms: now.mono_ms + 20_000, ..now };
    let short = |n: u32| Message {
        expires_after: Some(Duration::from_secs(1)),
        ..message("t", Qos::AtLeastOnce, &n.to_string())
    };
    accept(&mut store, (0..3).map(short).collect());
    take_at(&mut store, offer(2000, 5), later);
    let told = store.look(later).unwrap().gaps;
    assert_eq!(told[0].count, 3);
    accept(&mut store, vec![short(4)]);
    take_at(&mut store, offer(2000, 5), later);
    let report = Append { messages: vec![message("gap", Qos::AtLeastOnce, "3")], closes: told };
    store.commit(Batch { appends: vec![report], ..Batch::default() }, later).unwrap();
    let left = store.look(later).unwrap().gaps;
    assert_eq!((left.len(), left[0].first, left[0].last, left[0].count), (1, Seq(4), Seq(4), 1));
}

#[test]
fn an_inbound_message_and_its_open_identifier_survive_together() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    begin(&mut store, "");
    let inbound = inbound("{}");
    settle(&mut store, vec![Change::InboundOpened { id: id(7), hash: 99, inbound }]);
    drop(store);
    let mut store = open(folder.path());
    let started = begin(&mut store, "");
    assert_eq!((started.rx_open, store.look(clock::now()).unwrap().inbox), (vec![(id(7), 99)], 1));
    settle(&mut store, vec![Change::InboundReleased(id(7))]);
    assert!(begin(&mut store, "").rx_open.is_empty());
}

#[test]
fn a_second_agent_on_the_same_database_is_refused_and_the_first_is_unharmed() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = open(folder.path());
    accept(&mut first, texts("t", Qos::AtLeastOnce, 0..1));
    let second = Store::open(settings(folder.path())).unwrap_err();
    assert!(matches!(second, StoreError::InUse { .. }), "{second}");
    accept(&mut first, texts("t", Qos::AtLeastOnce, 1..2));
    assert_eq!(payloads(&take(&mut first, 2000, 5)), ["0", "1"]);
}

#[test]
fn the_database_is_readable_by_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let nested = folder.path().join("made");
    let store = open(&nested);
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&nested), mode(&nested.join("outbox.db"))), (0o750, 0o600));
    assert_eq!(mode(&nested.join("outbox.db-wal")), 0o600);
    drop(store);
}

#[test]
fn the_sqlite_inside_has_no_wal_reset_bug() {
    assert!(rusqlite::version_number() >= 3_051_003, "{}", rusqlite::version());
}

#[test]
fn every_commit_is_synchronous_full() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert_eq!(store.pragma("synchronous"), 2);
    assert_eq!(store.pragma("page_size"), 1024);
}

#[test]
fn a_hundred_thousand_messages_wait_without_being_read_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let batch = texts("t", Qos::AtLeastOnce, 0..5000);
    for _ in 0..20 {
        accept(&mut store, batch.clone());
    }
    drop(store);
    let began = std::time::Instant::now();
    let mut store = open(folder.path());
    assert_eq!(take(&mut store, 2000, 10).len(), 10);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(store.look(clock::now()).unwrap().lanes[1].messages, 100_000);
}

/// Every table and index with its columns, as SQLite reports them, whatever statement made them.
fn shape(path: &Path) -> Vec<(String, Vec<String>)> {
    let db = rusqlite::Connection::open(path).unwrap();
    let mut names = db.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").unwrap();
    let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    names
        .into_iter()
        .map(|table| {
            let rows = |sql: &str| -> Vec<String> {
                let mut statement = db.prepare(sql).unwrap();
                let columns = statement.column_count();
                let row = |row: &rusqlite::Row<'_>| {
                    let cells = (1..columns).map(|n| row.get::<_, rusqlite::types::Value>(n));
                    Ok(format!("{:?}", cells.collect::<Result<Vec<_>, _>>()?))
                };
                statement.query_map([], row).unwrap().map(Result::unwrap).collect()
            };
            let mut shape = rows(&format!("PRAGMA table_info({table})"));
            let mut indices = rows(&format!("PRAGMA index_list({table})"));
            indices.sort();
            shape.extend(indices);
            (table, shape)
        })
        .collect()
}

#[test]
fn an_older_schema_is_brought_forward_with_everything_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox.db");
    std::fs::write(&path, include_bytes!("data/store/schema_1.sqlite")).unwrap();
    let mut store = open(folder.path());
    assert_eq!(store.look(clock::now()).unwrap().damage, None);
    let taken = take(&mut store, 2000, 10);
    let expected = ["two 1", "two 2", "two 3", "one 1", "one 2", "one 3", "bulky"];
    assert_eq!(payloads(&taken), expected);
    store.close();
    let new = tempfile::tempdir().unwrap();
    open(new.path()).close();
    assert_eq!(shape(&path), shape(&new.path().join("outbox.db")));
}

/// A reader would keep the write-ahead log from being reset: it grows for as long as the reader stays.
#[test]
fn no_other_program_can_read_the_database_and_make_its_log_grow() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    let reader = rusqlite::Connection::open(folder.path().join("outbox.db")).unwrap();
    reader.busy_timeout(Duration::ZERO).unwrap();
    let mut longest = 0;
    for commit in 0..400 {
        let refused = reader.query_row("SELECT count(*) FROM segment", [], |row| row.get::<_, i64>(0));
        assert!(refused.unwrap_err().to_string().contains("locked"), "at commit {commit}");
        accept(&mut store, texts("t", Qos::AtLeastOnce, 0..500));
        let log = std::fs::metadata(folder.path().join("outbox.db-wal")).unwrap().len();
        longest = longest.max(log);
    }
    println!("after 200,000 messages the log never was longer than {longest} bytes");
    assert!(longest < 2 << 20, "{longest}");
}

#[test]
fn rows_of_an_older_schema_belong_to_the_session_they_had() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("outbox.db");
    std::fs::write(&path, include_bytes!("data/store/schema_1.sqlite")).unwrap();
    let old = rusqlite::Connection::open(&path).unwrap();
    old.execute_batch(
        "UPDATE session SET broker = 'b', client_id = 'client', clean_start = 0, canary = 1;
         INSERT OR REPLACE INTO inflight VALUES (2000, 1, 99, 1, 2);
         INSERT INTO rx_open VALUES (7, x'05000000000000000000000000000000');",
    )
    .unwrap();
    old.close().unwrap();
    let mut store = open(folder.path());
    let begun = begin(&mut store, "b");
    assert!(begun.session_uncertain && begun.canary_proven && !begun.clean_start_needed);
    assert!(states(&begun).contains(&(2000, RowState::Received)), "{:?}", begun.resume);
    assert_eq!(begun.rx_open, [(id(7), 5)]);
}

/// On 32-bit systems a C library may know no such date, and then tells nothing of the file at all.
#[test]
fn files_dated_after_2038_are_used_like_all_others() {
    let date = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(70 * 365 * 86_400);
    let folder = tempfile::tempdir().unwrap();
    let redate = || {
        for name in ["outbox.db", "outbox.db-wal"] {
            let file = std::fs::File::options().write(true).open(folder.path().join(name)).unwrap();
            file.set_modified(date).unwrap();
            assert_eq!(file.metadata().unwrap().modified().unwrap(), date, "the file system has such dates");
        }
    };
    let mut store = open(folder.path());
    accept(&mut store, texts("t", Qos::AtLeastOnce, 0..3));
    redate();
    accept(&mut store, texts("t", Qos::AtLeastOnce, 3..6));
    redate();
    store.close();
    let mut store = open(folder.path());
    redate();
    accept(&mut store, texts("t", Qos::AtLeastOnce, 6..9));
    begin(&mut store, "b");
    assert_eq!(payloads(&take(&mut store, 2000, 20)), ["0", "1", "2", "3", "4", "5", "6", "7", "8"]);
}
