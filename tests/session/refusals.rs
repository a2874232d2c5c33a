//! Refusals and limits: what a reason code leads to, and what this broker cannot carry.

use fieldpost::message::{Lane, Qos, Record, Seq};
use fieldpost::turn::{Change, Hold, Resume, RowState};
use fieldpost::uplink::packet::{Limits, Packet, Protocol, ReasonCode};
use fieldpost::uplink::session::{Carry, Counted, Settings};

use crate::desk::{BOTH, Desk, OK, id, nothing, record, row, rows, words};
use crate::support::broker::{self, Refusal, Times};
use crate::world::{Plan, World, settings};

const Q1: Qos = Qos::AtLeastOnce;
const Q2: Qos = Qos::ExactlyOnce;
const QUOTA: ReasonCode = ReasonCode::QUOTA_EXCEEDED;

/// What becomes of one message whose answer is this reason code.
fn answered(qos: Qos, reason: u8) -> (Vec<Change>, Desk) {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, qos)]);
    desk.get(match qos {
        Q2 => Packet::PubRec(id(1024), ReasonCode(reason)),
        _ => Packet::PubAck(id(1024), ReasonCode(reason)),
    });
    (desk.commit(), desk)
}

#[test]
fn a_failure_code_ends_the_exchange_and_each_has_its_consequence() {
    for qos in [Q1, Q2] {
        let row = (qos == Q2).then(|| id(1024));
        let (lane, seq) = (Lane::Normal, Seq(1));
        for reason in [0x80, 0x83, 0x91, 0x93, 0x97] {
            let (changes, mut desk) = answered(qos, reason);
            let (hold, hold_ms) = (Hold::Topic, 5_000);
            assert_eq!(changes, [Change::Refused { id: row, lane, seq, hold, hold_ms, reason }]);
            assert_eq!(words(&desk.sent()), [""; 0], "there is no PUBREL after a PUBREC that failed");
            assert_eq!((desk.session.in_flight(), desk.count(Counted::RefusedForNow)), (0, 1));
        }
        let (changes, _) = answered(qos, 0x87);
        let (hold, hold_ms, reason) = (Hold::Lane, 30_000, 0x87);
        assert_eq!(changes, [Change::Refused { id: row, lane, seq, hold, hold_ms, reason }]);
        for reason in [0x90, 0x95, 0x99] {
            let (changes, mut desk) = answered(qos, reason);
            assert_eq!(changes, [Change::DeadLetter { id: row, lane, seq, reason }]);
            assert_eq!(desk.count(Counted::DeadLettered), 1);
        }
    }
}

#[test]
fn no_matching_subscribers_is_a_success_that_is_counted() {
    for (qos, change) in
        [(Q1, Change::Acknowledged { lane: Lane::Normal, seq: Seq(1) }), (Q2, Change::Received(id(1024)))]
    {
        let (changes, mut desk) = answered(qos, 0x10);
        assert_eq!(changes, [change]);
        assert_eq!(desk.count(Counted::NoMatchingSubscribers), 1);
    }
}

#[test]
fn a_refusal_is_retried_ever_later_and_becomes_a_dead_letter_in_the_end() {
    let short = Settings { retry_refused_for_ms: 60_000, ..settings(Protocol::V5) };
    let mut desk = Desk::with(short, nothing(), Carry::default());
    desk.run(Limits::default());
    let mut waited = Vec::new();
    loop {
        let Packet::Publish(publish) = &desk.take(&[(1, Q2)])[0] else { panic!() };
        desk.get(Packet::PubRec(publish.id.unwrap(), QUOTA));
        match &desk.commit()[..] {
            [Change::Refused { hold_ms, .. }] => {
                waited.push(*hold_ms);
                desk.now_ms += hold_ms;
            }
            [Change::DeadLetter { reason: 0x97, .. }] => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(waited, [5_000, 10_000, 20_000, 40_000]);
}

#[test]
fn a_refusal_is_remembered_over_a_reconnect() {
    let (_, desk) = answered(Q1, 0x97);
    let mut desk = Desk::with(settings(Protocol::V5), nothing(), desk.session.into_carry());
    desk.run(Limits::default());
    desk.take(&[(1, Q1)]);
    desk.get(Packet::PubAck(id(1024), QUOTA));
    assert!(matches!(desk.commit()[..], [Change::Refused { hold_ms: 10_000, .. }]));
}

#[test]
fn what_was_in_flight_may_overtake_a_refused_message_and_is_counted() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q2), (3, Q2)]);
    desk.get(Packet::PubRec(id(1024), QUOTA));
    assert_eq!(desk.count(Counted::OrderOvertaken), 2);
}

#[test]
fn what_was_found_after_a_crash_does_not_overtake_a_refused_message() {
    let older = |seq, topic| Resume::Older(record(seq, topic, Q1));
    let begin = rows(vec![
        older(1, "u"),
        older(2, "u"),
        older(3, "u"),
        older(4, "v"),
        row(1030, 5, RowState::Published),
    ]);
    let one_at_a_time = Limits { receive_max: Some(1), ..Limits::default() };
    let mut desk = Desk::running(Protocol::V5, begin, one_at_a_time);
    assert_eq!(words(&desk.sent()), ["PUBLISH 1031 \"1\""]);
    desk.get(Packet::PubAck(id(1031), QUOTA));
    let held = |change: &Change| match change {
        Change::Refused { id: None, seq, hold: Hold::Topic, hold_ms: 5_000, .. } => seq.0,
        other => panic!("{other:?}"),
    };
    assert_eq!(desk.commit().iter().map(held).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(words(&desk.sent())[0].ends_with("\"4\""), "the other topic goes on");
    assert_eq!(desk.count(Counted::OrderOvertaken), 0);
}

#[test]
fn what_was_taken_behind_a_refused_message_and_never_sent_does_not_overtake_it_on_the_next_connection() {
    let (_, mut desk) = answered(Q2, 0x10);
    desk.take(&[(2, Q2)]);
    desk.get(Packet::PubRec(id(1025), QUOTA));
    // The commit that was out took 3 and 4, and the connection ended before the session heard of it.
    assert!(matches!(desk.session.take_unsaved()[..], [Change::Refused { seq: Seq(2), .. }]));
    let other = Resume::Row {
        id: id(1027),
        state: RowState::Published,
        send_no: 4,
        record: Some(record(4, "u", Q2)),
        lane: Lane::Normal,
        seq: Seq(4),
    };
    let begin = rows(vec![row(1026, 3, RowState::Published), other]);
    let mut desk = Desk::with(settings(Protocol::V5), begin, desk.session.into_carry());
    desk.connack(true, Limits::default()).unwrap();
    let (lane, hold, hold_ms, reason) = (Lane::Normal, Hold::Topic, 5_000, QUOTA.0);
    let held = Change::Refused { id: Some(id(1026)), lane, seq: Seq(3), hold, hold_ms, reason };
    assert_eq!(desk.commit(), [held, Change::SessionPresent]);
    desk.suback();
    assert_eq!(words(&desk.sent()), ["PUBLISH 1027 \"4\""]);
    assert_eq!(desk.count(Counted::OrderOvertaken), 0);
}

#[test]
fn a_refused_message_holds_its_topic_until_it_is_taken_and_no_other() {
    let mut world = World::new(Plan::new(Protocol::V5));
    world.until_running();
    let refusal = Refusal { filter: "t/normal/2/0".into(), reason: 0x97, times: Times::Only(2) };
    world.broker.script.refuse.push(refusal);
    world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
    world.commit_all();
    world.rounds(4);
    for _ in 0..3 {
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.produce(Lane::Normal, Q2, "t/normal/2/1", 0);
    }
    world.commit_all();
    world.rounds(10);
    assert_eq!(world.texts(), ["3", "5", "7"], "the other topic goes on");
    world.finish().unwrap();
    assert_eq!(world.texts(), ["3", "5", "7", "1", "2", "4", "6"]);
    assert_eq!(world.broker.violations(), [""; 0]);
}

#[test]
fn not_authorized_holds_the_lane_and_empties_no_backlog() {
    let mut world = World::new(Plan::new(Protocol::V5));
    world.until_running();
    world.broker.script.deny_publish.push("t/normal/#".into());
    for _ in 0..20 {
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.produce(Lane::Bulk, Q1, "t/bulk/1/0", 0);
    }
    world.commit_all();
    world.rounds(20);
    assert_eq!(world.texts().len(), 20, "the other lane goes on");
    world.broker.script.deny_publish.clear();
    world.finish().unwrap();
    assert_eq!((world.texts().len(), world.dropped()), (40, 0));
}

#[test]
fn a_hopeless_message_is_buried_with_its_row_and_the_next_one_goes_on() {
    for reason in [0x90, 0x95, 0x99] {
        let mut world = World::new(Plan::new(Protocol::V5));
        let refusal = Refusal { filter: "t/normal/2/0".into(), reason, times: Times::Only(1) };
        world.broker.script.refuse.push(refusal);
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.finish().unwrap();
        let now = world.now;
        let look = world.store().look(now).unwrap();
        assert_eq!((world.texts(), look.dead_letters, look.rows), (vec!["2".to_owned()], 1, 0));
        assert_eq!(look.gaps.len(), 1, "the cloud is told");
    }
}

#[test]
fn pubcomp_that_knows_no_identifier_is_counted_as_ambiguous() {
    let mut desk =
        Desk::running(Protocol::V5, rows(vec![row(1024, 1, RowState::Received)]), Limits::default());
    desk.get(Packet::PubComp(id(1024), ReasonCode::PACKET_IDENTIFIER_NOT_FOUND));
    assert_eq!(desk.commit(), [Change::Completed(id(1024))]);
    assert_eq!(desk.count(Counted::Ambiguous), 1);
    // Within one connection nothing but a broker that forgot can say so.
    desk.take(&[(2, Q2)]);
    desk.get(Packet::PubRec(id(1025), OK));
    desk.commit();
    desk.get(Packet::PubComp(id(1025), ReasonCode::PACKET_IDENTIFIER_NOT_FOUND));
    assert_eq!(desk.count(Counted::Ambiguous), 2);
}

#[test]
fn acknowledgements_that_do_not_fit_complete_nothing_and_are_counted() {
    let begin = || rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)]);
    for protocol in BOTH {
        for wrong in [
            Packet::PubAck(id(1024), OK),
            Packet::PubComp(id(1024), OK),
            Packet::PubAck(id(1025), OK),
            Packet::PubAck(id(3000), OK),
            Packet::PubComp(id(3000), OK),
            Packet::PubAck(id(9), OK),
            Packet::PubComp(id(9), OK),
            Packet::PubRec(id(9), OK),
            Packet::SubAck(id(9), vec![OK]),
        ] {
            let mut desk = Desk::running(protocol, begin(), Limits::default());
            desk.sent();
            desk.get(wrong.clone());
            assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec![]), "{wrong:?}");
            assert_eq!(desk.count(Counted::AcksUnexpected), 1, "{wrong:?}");
        }
    }
}

#[test]
fn acknowledgements_of_what_this_connection_has_not_sent_yet_complete_nothing() {
    let begin = rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)]);
    let mut desk = Desk::new(Protocol::V5, begin);
    desk.connack(true, Limits::default()).unwrap();
    desk.get(Packet::PubRec(id(1024), OK));
    desk.get(Packet::PubComp(id(1025), OK));
    assert_eq!(desk.commit(), [Change::SessionPresent]);
    assert_eq!(desk.count(Counted::AcksUnexpected), 2);
}

#[test]
fn a_second_pubrec_is_answered_by_pubrel_once_more_and_changes_nothing() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2)]);
    desk.get(Packet::PubRec(id(1024), OK));
    desk.get(Packet::PubRec(id(1024), OK));
    assert_eq!(desk.commit(), [Change::Received(id(1024))]);
    assert_eq!(words(&desk.sent()), ["PUBREL 1024"], "the PUBREL that waits for its commit answers both");
    desk.get(Packet::PubRec(id(1024), OK));
    assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec!["PUBREL 1024".to_owned()]));
}

#[test]
fn an_unknown_pubrec_is_answered_by_pubrel_so_that_the_broker_can_forget_it() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        desk.get(Packet::PubRec(id(4000), OK));
        assert_eq!(words(&desk.sent()), ["PUBREL 4000 0x92"]);
        desk.get(Packet::PubRec(id(4000), QUOTA));
        assert_eq!(words(&desk.sent()), [""; 0], "a refusal has ended it already");
    }
}

#[test]
fn maximum_qos_and_retain_available_are_obeyed_and_counted() {
    for (max_qos, word) in [(1, "PUBLISH 1024 \"1\""), (0, "PUBLISH 0 \"1\"")] {
        let limits = Limits { max_qos: Some(max_qos), retain_available: Some(false), ..Limits::default() };
        let mut desk = Desk::running(Protocol::V5, nothing(), limits);
        let offer = desk.turn().1.unwrap();
        assert_eq!(offer.max_qos.number(), max_qos);
        let retained = Record { retain: true, ..record(1, "t", Q2) };
        let qos = offer.max_qos;
        let taken = fieldpost::turn::Taken { id: offer.ids[0], send_no: 1, qos, record: retained };
        desk.session.on_taken(vec![taken], desk.now_ms);
        let sent = desk.sent();
        assert_eq!(words(&sent), [word]);
        assert!(matches!(&sent[0], Packet::Publish(publish) if !publish.retain));
        assert_eq!(desk.count(Counted::Downgraded), 1);
    }
}

#[test]
fn a_broker_that_takes_less_is_given_less() {
    for maximum_qos in [0, 1] {
        let mut plan = Plan::new(Protocol::V5);
        plan.limits = broker::Limits { maximum_qos, retain_available: false, ..broker::Limits::default() };
        let mut world = World::new(plan);
        for _ in 0..5 {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
        }
        world.finish().unwrap();
        assert_eq!((world.texts().len(), world.broker.violations()), (10, vec![]));
    }
}

#[test]
fn a_broker_that_takes_less_than_before_is_not_sent_more_while_resuming() {
    for maximum_qos in [0, 1] {
        let mut world = World::new(Plan::new(Protocol::V5));
        world.until_running();
        for _ in 0..3 {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
        }
        world.commit_all();
        world.answer();
        world.cut(0);
        world.broker.limits.maximum_qos = maximum_qos;
        world.finish().unwrap();
        assert_eq!(world.broker.violations(), [""; 0]);
        assert_eq!(world.texts().len() as u64 + world.dropped(), 6, "what cannot be sent is counted");
    }
}
