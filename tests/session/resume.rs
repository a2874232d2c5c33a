//! Window and resume: what is in flight, what is sent again, in which order and with which flags.

use std::collections::BTreeSet;

use fieldpost::message::{Lane, Qos, Record, Seq};
use fieldpost::turn::{Begin, Change, Resume, RowState, record_bytes};
use fieldpost::uplink::link::encoded_len;
use fieldpost::uplink::packet::{Limits, Packet, Protocol};
use fieldpost::uplink::session::{Carry, Counted};

use crate::desk::{BOTH, Desk, OK, id, nothing, record, row, rows, words};
use crate::support::broker;
use crate::world::{Plan, World, settings};

const Q1: Qos = Qos::AtLeastOnce;
const Q2: Qos = Qos::ExactlyOnce;

fn receive_max(receive_max: u16) -> Limits {
    Limits { receive_max: Some(receive_max), ..Limits::default() }
}

#[test]
fn the_window_counts_until_pubcomp() {
    let mut desk = Desk::running(Protocol::V5, nothing(), receive_max(3));
    let offer = desk.turn().1.unwrap();
    assert_eq!((offer.ids.len(), offer.qos2_room), (3, 2), "one place is never QoS 2's");
    desk.session
        .on_taken(vec![crate::desk::taken(1024, 1, Q2), crate::desk::taken(1025, 2, Q2)], desk.now_ms);
    desk.get(Packet::PubRec(id(1024), OK));
    let (_, offer) = desk.turn();
    assert_eq!(offer, None, "after PUBREC it still counts");
    desk.session.on_committed(&[], desk.now_ms);
    assert_eq!(desk.turn().1, None, "after PUBREL it still counts");
    desk.get(Packet::PubComp(id(1024), OK));
    assert_eq!(desk.turn().1.unwrap().qos2_room, 1, "in the same turn as the PUBCOMP");
}

#[test]
fn presence_counts_in_the_window_and_a_message_taken_meanwhile_waits() {
    let mut desk = Desk::running(Protocol::V5, nothing(), receive_max(2));
    let (_, offer) = desk.turn();
    let ids = offer.unwrap().ids;
    assert!(desk.presence());
    let taken = [1, 2].map(|seq| crate::desk::taken(ids[seq as usize - 1].get(), seq, Q1));
    desk.session.on_taken(taken.to_vec(), desk.now_ms);
    let sent = words(&desk.sent());
    assert_eq!(sent, ["PUBLISH 2 \"online\"", "PUBLISH 1024 \"1\""], "Receive Maximum is 2");
    desk.get(Packet::PubAck(id(2), OK));
    assert_eq!(words(&desk.sent()), ["PUBLISH 1025 \"2\""], "for the first time, so without DUP");
}

#[test]
fn the_canary_waits_for_room_like_everything_else() {
    let mut desk = Desk::new(Protocol::V5, Begin { canary_proven: false, ..nothing() });
    desk.connack(false, receive_max(1)).unwrap();
    desk.commit();
    assert!(desk.presence());
    assert_eq!(words(&desk.suback()), ["PUBLISH 2 \"online\""]);
    assert_eq!(words(&desk.sent()), [""; 0]);
    desk.get(Packet::PubAck(id(2), OK));
    desk.canary();
}

#[test]
fn an_offer_is_made_only_while_it_could_take_whatever_comes_first() {
    let begin = rows(vec![row(2000, 1, RowState::Published)]);
    let narrow = fieldpost::uplink::session::Settings { qos2_window: 1, ..settings(Protocol::V5) };
    let mut desk = Desk::with(narrow, begin, Carry::default());
    desk.run(Limits::default());
    assert_eq!(desk.turn().1, None, "the QoS 2 window is full, and an offer stays where it is made");
    desk.get(Packet::PubRec(id(2000), OK));
    desk.commit();
    desk.get(Packet::PubComp(id(2000), OK));
    assert_eq!(desk.turn().1.unwrap().qos2_room, 1);
}

#[test]
fn a_smaller_receive_maximum_is_obeyed_while_resuming() {
    let begin = rows(vec![
        row(2000, 1, RowState::Received),
        row(2001, 2, RowState::Published),
        row(2002, 3, RowState::Published),
    ]);
    let mut desk = Desk::running(Protocol::V5, begin, receive_max(3));
    assert_eq!(words(&desk.sent()), ["PUBREL 2000", "PUBLISH 2001 \"2\" dup"]);
    assert_eq!(desk.turn().1, None, "rows held back go before any new message");
    desk.get(Packet::PubComp(id(2000), OK));
    assert_eq!(words(&desk.sent()), ["PUBLISH 2002 \"3\" dup"]);
}

#[test]
fn twenty_qos_2_messages_in_flight_are_not_too_many_for_mosquitto() {
    // One place is left free for what is not QoS 2.
    for window in [21, 22] {
        let mut plan = Plan::new(Protocol::V311);
        plan.settings.qos2_window = window;
        let mut world = World::new(plan);
        world.broker.script.silent_limit = Some(20);
        for _ in 0..60 {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        }
        world.finish().unwrap();
        let lost = 60 - world.texts().len();
        assert_eq!(lost > 0, window > 21, "{lost} of 60 were acknowledged and thrown away");
    }
}

#[test]
fn rows_resume_in_the_order_of_sending_with_the_same_identifier_and_dup() {
    for protocol in BOTH {
        let begin = rows(vec![
            row(3000, 1, RowState::Received),
            row(1024, 2, RowState::Published),
            row(2000, 3, RowState::Received),
            row(1500, 4, RowState::Published),
        ]);
        let mut desk = Desk::running(protocol, begin, Limits::default());
        let again = ["PUBREL 3000", "PUBLISH 1024 \"2\" dup", "PUBREL 2000", "PUBLISH 1500 \"4\" dup"];
        assert_eq!(words(&desk.sent()), again);
        assert_eq!(desk.count(Counted::ResentWithDup), 2);
    }
}

#[test]
fn nothing_is_sent_twice_on_one_connection_however_long_the_answer_takes() {
    let begin = rows(vec![row(1024, 1, RowState::Received), row(1025, 2, RowState::Published)]);
    let mut desk = Desk::running(Protocol::V5, begin, Limits::default());
    desk.sent();
    for _ in 0..19 {
        desk.pass(1000).unwrap();
        desk.commit();
        assert_eq!(words(&desk.sent()), [""; 0]);
    }
}

#[test]
fn dup_is_not_set_where_the_bytes_have_certainly_not_left() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2)]);
    // The second row was committed, but the connection ended before the session heard of it.
    let carry = desk.session.into_carry();
    let begin = rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Published)]);
    let mut desk = Desk::with(settings(Protocol::V5), begin, carry);
    desk.run(Limits::default());
    assert_eq!(words(&desk.sent()), ["PUBLISH 1024 \"1\" dup", "PUBLISH 1025 \"2\""]);
    assert_eq!(desk.count(Counted::ResentWithDup), 1);
}

#[test]
fn dup_is_set_where_a_failed_commit_hides_how_far_it_had_come() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2)]);
    desk.get(Packet::PubRec(id(1024), fieldpost::uplink::packet::ReasonCode::QUOTA_EXCEEDED));
    let carry = desk.session.into_carry().after_store_failure();
    let begin = rows(vec![row(1024, 1, RowState::Published)]);
    let mut desk = Desk::with(settings(Protocol::V5), begin, carry);
    desk.run(Limits::default());
    assert_eq!(words(&desk.sent()), ["PUBLISH 1024 \"1\" dup"]);
}

#[test]
fn qos_1_of_the_last_connection_resumes_between_the_rows_as_it_was_sent() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q1), (3, Q2), (4, Q1)]);
    let carry = desk.session.into_carry();
    let begin = rows(vec![row(1024, 1, RowState::Published), row(1026, 3, RowState::Published)]);
    let mut desk = Desk::with(settings(Protocol::V5), begin, carry);
    desk.run(Limits::default());
    let again = [1024, 1025, 1026, 1027].map(|id| format!("PUBLISH {id} \"{}\" dup", id - 1023));
    assert_eq!(words(&desk.sent()), again);
}

#[test]
fn unfinished_qos_1_older_than_a_row_goes_before_it_however_often_it_takes() {
    let older = |seq| Resume::Older(record(seq, "t", Q1));
    let begin = rows(vec![older(1), older(2), older(3), row(1030, 4, RowState::Published)]);
    let desk = |begin: &Begin, carry| {
        let mut desk = Desk::with(settings(Protocol::V5), begin.clone(), carry);
        desk.run(receive_max(1));
        (words(&desk.sent()), desk)
    };
    let (sent, first) = desk(&begin, Carry::default());
    assert_eq!(sent, ["PUBLISH 1031 \"1\""]);
    // The link broke before the others had room: the store tells again of what the session does not hold.
    let carry = first.session.into_carry();
    assert_eq!(carry.unacked().len(), 2);
    let again = Begin { resume: begin.resume[2..].to_vec(), ..begin };
    let (sent, mut desk) = desk(&again, carry);
    assert_eq!(sent, ["PUBLISH 1031 \"1\" dup"]);
    desk.get(Packet::PubAck(id(1031), OK));
    assert_eq!(words(&desk.sent()), ["PUBLISH 1032 \"2\""]);
    desk.get(Packet::PubAck(id(1032), OK));
    let sent = desk.sent();
    assert!(matches!(&sent[..], [Packet::Publish(publish)] if publish.payload == "3"), "{sent:?}");
    let Packet::Publish(publish) = &sent[0] else { panic!() };
    desk.get(Packet::PubAck(publish.id.unwrap(), OK));
    assert_eq!(words(&desk.sent()), ["PUBLISH 1030 \"4\" dup"]);
}

#[test]
fn what_was_found_after_a_crash_keeps_its_place_on_every_later_connection() {
    // MQTT-4.6.0-1: PUBLISHes are sent again in the order in which they were sent first.
    let (first, last) = (row(1024, 1, RowState::Published), row(1030, 4, RowState::Published));
    let older = |seq| Resume::Older(record(seq, "t", Q1));
    let begin = rows(vec![first.clone(), older(2), older(3), last.clone()]);
    let mut desk = Desk::running(Protocol::V5, begin, Limits::default());
    let sent = words(&desk.sent());
    let wanted =
        ["PUBLISH 1024 \"1\" dup", "PUBLISH 1031 \"2\"", "PUBLISH 1032 \"3\"", "PUBLISH 1030 \"4\" dup"];
    assert_eq!(sent, wanted);
    let carry = desk.session.into_carry();
    let mut desk = Desk::with(settings(Protocol::V5), rows(vec![first, last]), carry);
    desk.run(Limits::default());
    let again =
        [(1024, 1), (1031, 2), (1032, 3), (1030, 4)].map(|(id, n)| format!("PUBLISH {id} \"{n}\" dup"));
    assert_eq!(words(&desk.sent()), again);
}

#[test]
fn a_connection_that_came_to_nothing_does_not_change_the_order() {
    let mut world = World::new(Plan::new(Protocol::V5));
    world.until_running();
    world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
    world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
    world.commit_all();
    while world.has_answers() {
        world.answer();
    }
    world.crash(0);
    // CONNACK never comes: what was to be sent first is asked for again.
    world.connect();
    world.cut(0);
    world.finish().unwrap();
    assert_eq!(world.texts(), ["1", "2"]);
}

#[test]
fn what_limits_take_meanwhile_does_not_come_back() {
    // A held message that is dropped is not in the queue any more when the hold ends.
    let mut plan = Plan::new(Protocol::V5);
    plan.quota = 6_000;
    let mut world = World::new(plan);
    let refusal = broker::Refusal { filter: "t/bulk/#".into(), reason: 0x97, times: broker::Times::Only(1) };
    world.broker.script.refuse.push(refusal);
    world.until_running();
    // One commit, so that the segment outlives the dropped record.
    world.noise(Lane::Bulk, 2, 500);
    world.round();
    world.rounds(5);
    world.cut(0);
    for _ in 0..40 {
        world.noise(Lane::Normal, 1, 500);
        world.commit_all();
    }
    let dropped = world.dropped();
    world.finish().unwrap();
    let arrived: BTreeSet<_> = world.texts().into_iter().collect();
    assert!(dropped > 0);
    assert_eq!(world.accepted.len() as u64, arrived.len() as u64 + world.dropped());
}

#[test]
fn qos_1_in_flight_is_handed_out_once_even_if_a_commit_failed_between_two_connections() {
    let mut world = World::new(Plan::new(Protocol::V311));
    world.until_running();
    for _ in 0..5 {
        world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
    }
    world.commit_all();
    while world.has_answers() {
        world.answer();
    }
    world.cut(0);
    world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
    world.commit(crate::world::NextCommit::Fails);
    world.finish().unwrap();
    assert_eq!(world.texts(), ["1", "2", "3", "4", "5"], "each once, though everything was read again");
}

#[test]
fn packet_ids_below_1024_are_our_own_and_messages_go_round_above() {
    let mut desk =
        Desk::running(Protocol::V5, rows(vec![row(65535, 1, RowState::Received)]), Limits::default());
    desk.presence();
    let sent = desk.take(&[(2, Q2), (3, Q1)]);
    let expected = ["PUBREL 65535", "PUBLISH 2 \"online\"", "PUBLISH 1024 \"2\"", "PUBLISH 1025 \"3\""];
    assert_eq!(words(&sent), expected);
}

#[test]
fn an_identifier_in_flight_is_not_given_out_again() {
    let begin = rows(vec![row(1025, 1, RowState::Received), row(65534, 2, RowState::Received)]);
    let mut desk = Desk::running(Protocol::V5, begin, Limits::default());
    let sent = desk.take(&[(3, Q2), (4, Q2), (5, Q2)]);
    let published = ["PUBLISH 65535 \"3\"", "PUBLISH 1024 \"4\"", "PUBLISH 1026 \"5\""];
    assert_eq!(words(&sent)[2..], published);
}

#[test]
fn what_is_too_large_for_this_connack_is_abandoned_and_its_identifier_freed_at_pubcomp() {
    let small = Limits { max_packet_bytes: Some(20), ..Limits::default() };
    let large = fieldpost::message::Record { payload: vec![b'x'; 30].into(), ..record(1, "t", Q2) };
    let row = |number| Resume::Row {
        id: id(number),
        state: RowState::Published,
        send_no: 1,
        record: Some(large.clone()),
        lane: Lane::Normal,
        seq: Seq(1),
    };
    let mut desk = Desk::running(Protocol::V5, rows(vec![row(1024)]), small);
    assert_eq!(words(&desk.sent()), [""; 0]);
    assert_eq!(desk.commit(), [Change::Abandoned(id(1024))]);
    assert_eq!(words(&desk.sent()), ["PUBREL 1024"]);
    desk.get(Packet::PubComp(id(1024), OK));
    assert_eq!(desk.commit(), [Change::Completed(id(1024))]);
    assert_eq!(desk.count(Counted::Abandoned), 1);
}

#[test]
fn a_row_is_not_sent_above_the_maximum_qos_of_this_connack() {
    let begin = rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)]);
    let limits = Limits { max_qos: Some(1), ..Limits::default() };
    let mut desk = Desk::running(Protocol::V5, begin, limits);
    assert_eq!(words(&desk.sent()), ["PUBREL 1025"]);
    assert_eq!(desk.commit(), [Change::Abandoned(id(1024))]);
}

#[test]
fn a_message_just_small_enough_is_sent() {
    for payload in [1, 90, 100, 110, 120, 130, 200] {
        let topic = "t/normal/2/0";
        let bytes = fieldpost::turn::publish_bytes(topic, &vec![0; payload], None, None);
        for (limit, arrives) in [(bytes, true), (bytes - 1, false)] {
            let mut plan = Plan::new(Protocol::V5);
            plan.limits.maximum_packet_size = Some(limit.max(80) as u32);
            let mut world = World::new(plan);
            world.produce(Lane::Normal, Q2, topic, payload - 1);
            world.finish().unwrap();
            assert_eq!(world.broker.violations(), [""; 0]);
            assert_eq!(world.texts().len() == 1, arrives || limit < 80, "{payload} bytes under {limit}");
        }
    }
}

#[test]
fn correlation_data_is_sent_again_and_counted_on_5_and_left_out_on_311() {
    for protocol in BOTH {
        let data = bytes::Bytes::from(vec![0xFF; 200]);
        let record = Record { correlation_data: Some(data.clone()), ..record(1, "t", Q2) };
        let bytes = record_bytes(&record);
        let state = RowState::Published;
        let (lane, seq, send_no) = (Lane::Normal, Seq(1), 1);
        let row = Resume::Row { id: id(1024), state, send_no, record: Some(record), lane, seq };
        let mut desk = Desk::running(protocol, rows(vec![row]), Limits::default());
        let sent = desk.sent();
        let [packet @ Packet::Publish(publish)] = &sent[..] else { panic!("{sent:?}") };
        let wanted = Some(data).filter(|_| protocol == Protocol::V5);
        assert_eq!((&publish.correlation_data, publish.dup), (&wanted, true));
        if protocol == Protocol::V5 {
            assert_eq!(encoded_len(protocol, packet).unwrap(), bytes);
        }
    }
}

#[test]
fn presence_too_large_for_the_broker_is_not_sent_and_ends_no_connection() {
    let mut desk =
        Desk::running(Protocol::V5, nothing(), Limits { max_packet_bytes: Some(15), ..Limits::default() });
    assert!(!desk.presence());
    assert_eq!(words(&desk.sent()), [""; 0]);
}
