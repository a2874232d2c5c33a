//! What must be committed first: one test for each row of the order table.

use fieldpost::message::{Lane, Qos, Seq};
use fieldpost::turn::{Begin, Change, OnSessionLoss, RowState};
use fieldpost::uplink::packet::{Limits, Packet, Protocol};

use crate::desk::{BOTH, Desk, OK, id, inbound, nothing, row, rows, taken, words};
use crate::world::{Plan, World};

const Q1: Qos = Qos::AtLeastOnce;
const Q2: Qos = Qos::ExactlyOnce;

#[test]
fn an_accepted_message_is_sent_as_the_bytes_that_were_accepted_after_a_crash_too() {
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 10);
        world.commit_all();
        world.crash(0);
        world.until_running();
        world.round();
        world.crash(usize::MAX);
        world.finish().unwrap();
        let sent: Vec<_> = world.broker.received().iter().filter(|r| r.topic.starts_with("t/")).collect();
        assert_eq!(sent.len(), 1, "the second time it carried the same identifier");
        assert_eq!(sent[0].payload, world.accepted[0].payload);
        assert_eq!(world.broker.violations(), [""; 0], "a repeat differs from what is held");
    }
}

#[test]
fn a_qos_2_publish_leaves_only_once_its_packet_id_is_committed() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        let (_, offer) = desk.turn();
        assert_eq!(words(&desk.sent()), [""; 0]);
        let first = offer.unwrap().ids[0];
        desk.session.on_taken(vec![taken(first.get(), 1, Q2)], desk.now_ms);
        assert_eq!(words(&desk.sent()), [format!("PUBLISH {first} \"1\"")]);
    }
}

#[test]
fn the_store_hands_out_a_qos_2_message_in_the_transaction_that_holds_its_packet_id() {
    let mut world = World::new(Plan::new(Protocol::V5));
    world.until_running();
    world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
    world.commit_all();
    world.crash(0);
    let now = world.now;
    let policy = OnSessionLoss::Republish;
    let begin = world.store().begin(("broker", "box"), policy, &[], now).unwrap();
    assert_eq!(begin.resume.len(), 1, "nothing had been sent, and the row is there");
    assert!(world.handed_on().is_empty());
}

#[test]
fn qos_1_goes_through_the_same_gate_and_does_not_overtake() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        let sent = desk.take(&[(1, Q2), (2, Q1), (3, Q2)]);
        assert_eq!(words(&sent), ["PUBLISH 1024 \"1\"", "PUBLISH 1025 \"2\"", "PUBLISH 1026 \"3\""]);
    }
}

#[test]
fn pubrel_leaves_only_once_its_pubrec_is_committed() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        desk.take(&[(1, Q2)]);
        desk.get(Packet::PubRec(id(1024), OK));
        assert_eq!(words(&desk.sent()), [""; 0]);
        assert_eq!(desk.turn().0, [Change::Received(id(1024))]);
        assert_eq!(words(&desk.sent()), [""; 0]);
        desk.session.on_committed(&[], desk.now_ms);
        assert_eq!(words(&desk.sent()), ["PUBREL 1024"]);
    }
}

#[test]
fn an_inbound_message_is_acknowledged_only_once_it_is_recorded() {
    for protocol in BOTH {
        for (qos, answer) in [(Q1, "PUBACK 5"), (Q2, "PUBREC 5")] {
            let mut desk = Desk::running(protocol, nothing(), Limits::default());
            desk.get(inbound(5, qos, false, "on"));
            let (changes, _) = desk.turn();
            assert!(matches!(changes[..], [Change::Inbound { .. } | Change::InboundOpened { .. }]));
            assert_eq!(words(&desk.sent()), [""; 0]);
            desk.session.on_committed(&[], desk.now_ms);
            assert_eq!(words(&desk.sent()), [answer]);
        }
    }
}

#[test]
fn an_inbound_pubcomp_leaves_only_once_the_open_identifier_is_gone() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        desk.get(inbound(5, Q2, false, "on"));
        desk.commit();
        desk.get(Packet::PubRel(id(5), OK));
        assert_eq!(words(&desk.sent()), ["PUBREC 5"]);
        assert_eq!(desk.turn().0, [Change::InboundReleased(id(5))]);
        assert_eq!(words(&desk.sent()), [""; 0]);
        desk.session.on_committed(&[], desk.now_ms);
        assert_eq!(words(&desk.sent()), ["PUBCOMP 5"]);
    }
}

#[test]
fn the_end_of_an_exchange_is_one_change_that_nothing_waits_for() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q1)]);
    desk.get(Packet::PubAck(id(1025), OK));
    desk.get(Packet::PubRec(id(1024), OK));
    desk.commit();
    desk.sent();
    desk.get(Packet::PubComp(id(1024), OK));
    assert_eq!(desk.turn().0, [Change::Completed(id(1024))], "done bit and row in one");
    assert_eq!(words(&desk.sent()), [""; 0]);
    assert_eq!(desk.session.in_flight(), 0, "the window is free before the commit");
}

#[test]
fn uncertainty_is_committed_before_connect_while_anything_is_open() {
    for inbound in [false, true] {
        let mut world = World::new(Plan::new(Protocol::V5));
        world.until_running();
        if inbound {
            world.command(2);
            world.agent_gets(usize::MAX);
            world.commit_all();
        } else {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            world.commit_all();
        }
        world.cut(0);
        world.connect();
        // CONNECT has not been read by anybody, and the program dies.
        world.crash(0);
        assert!(world.flags().0, "inbound {inbound}");
    }
}

#[test]
fn nothing_but_subscribe_is_sent_before_what_connack_meant_is_committed() {
    for protocol in BOTH {
        for present in [true, false] {
            let mut desk = Desk::new(
                protocol,
                rows(vec![row(2000, 1, RowState::Published), row(2001, 2, RowState::Received)]),
            );
            desk.connack(present, Limits::default()).unwrap();
            assert!(desk.presence());
            let (changes, offer) = desk.turn();
            assert!(matches!(changes[..], [Change::SessionPresent | Change::SessionAbsent(_)]));
            assert_eq!((offer, words(&desk.sent())), (None, vec![]), "not even presence");
            desk.session.on_committed(&[], desk.now_ms);
            let sent = words(&desk.sent());
            assert_eq!(sent, ["SUBSCRIBE", "PUBLISH 2 \"online\""], "presence goes before any backlog");
        }
    }
}

#[test]
fn another_broker_gets_everything_by_a_clean_start() {
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.until_running();
        for _ in 0..4 {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        }
        world.commit_all();
        world.round();
        world.cut(usize::MAX);
        // The other broker once knew this client, and holds what has the identifiers of our rows.
        let first = world.move_to_another_broker();
        world.finish().unwrap();
        assert!(first.received().iter().any(|received| received.topic.starts_with("t/")));
        assert_eq!(world.texts(), ["1", "2", "3", "4"]);
        let clean = world.broker.connects().iter().filter(|c| c.client_id == "box" && c.clean).count();
        assert_eq!(clean, 1, "once, not on every connection");
    }
}

#[test]
fn a_new_database_begins_clean_and_no_ghost_of_an_old_one_swallows_its_messages() {
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.haunt(1024..1034);
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.commit_all();
        // The first answer is lost, so that the broker has a session when it is asked again.
        world.connect();
        world.cut(usize::MAX);
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1"]);
        assert!(!world.flags().1, "once is enough");
    }
}

#[test]
fn one_turn_is_one_commit_and_pubrels_go_before_publishes_in_the_order_of_the_pubrecs() {
    let mut desk =
        Desk::running(Protocol::V5, nothing(), Limits { receive_max: Some(4), ..Limits::default() });
    desk.take(&[(1, Q2), (2, Q2), (3, Q1)]);
    desk.get(Packet::PubRec(id(1025), OK));
    desk.get(Packet::PubRec(id(1024), OK));
    desk.get(Packet::PubAck(id(1026), OK));
    let (changes, offer) = desk.turn();
    let acknowledged = Change::Acknowledged { lane: Lane::Normal, seq: Seq(3) };
    assert_eq!(changes, [Change::Received(id(1025)), Change::Received(id(1024)), acknowledged]);
    assert_eq!(offer.as_ref().map(|offer| offer.ids.len()), Some(2), "with what the PUBACK made free");
    desk.session.on_committed(&[], desk.now_ms);
    desk.session.on_taken(vec![taken(1027, 4, Q1)], desk.now_ms);
    assert_eq!(words(&desk.sent()), ["PUBREL 1025", "PUBREL 1024", "PUBLISH 1027 \"4\""]);
}

#[test]
fn while_a_commit_is_out_nothing_new_is_handed_over() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q2)]);
    desk.get(Packet::PubRec(id(1024), OK));
    desk.turn();
    desk.get(Packet::PubRec(id(1025), OK));
    assert_eq!(desk.session.turn(), None);
    desk.session.on_committed(&[], desk.now_ms);
    assert_eq!(words(&desk.sent()), ["PUBREL 1024"], "the second PUBREC is not on the disk");
    assert_eq!(desk.commit(), [Change::Received(id(1025))]);
    assert_eq!(words(&desk.sent()), ["PUBREL 1025"]);
}

#[test]
fn what_was_gated_on_a_dead_connection_is_never_sent() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q2)]);
    desk.get(Packet::PubRec(id(1024), OK));
    desk.turn();
    desk.get(Packet::PubRec(id(1025), OK));
    // The connection ends: one PUBREC is on its way to the disk, the other is handed over now.
    assert_eq!(desk.session.take_unsaved(), [Change::Received(id(1025))]);
    assert_eq!(words(&desk.sent()), [""; 0]);
    let begin = Begin {
        resume: vec![row(1024, 1, RowState::Received), row(1025, 2, RowState::Received)],
        ..nothing()
    };
    let settings = crate::world::settings(Protocol::V5);
    let mut next = Desk::with(settings, begin, desk.session.into_carry());
    next.connack(false, Limits::default()).unwrap();
    next.commit();
    next.sent();
    assert_eq!(next.commit(), [], "the session is new, and nobody sends the PUBRELs of the old one");
}

#[test]
fn an_uncommitted_verdict_does_not_outlive_its_connection() {
    for present in [true, false] {
        let mut desk = Desk::new(Protocol::V5, nothing());
        desk.connack(present, Limits::default()).unwrap();
        assert_eq!(desk.session.take_unsaved(), []);
    }
}

#[test]
fn carry_of_a_session_that_never_was_greeted_keeps_everything() {
    let begin = rows(vec![row(1024, 1, RowState::Published)]);
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2), (2, Q1)]);
    let carry = desk.session.into_carry();
    assert_eq!(carry.unacked(), [(Lane::Normal, Seq(2))]);
    let settings = crate::world::settings(Protocol::V5);
    let carry = Desk::with(settings.clone(), begin.clone(), carry).session.into_carry();
    assert_eq!(carry.unacked(), [(Lane::Normal, Seq(2))]);
    let mut desk = Desk::with(settings, begin, carry);
    desk.run(Limits::default());
    assert_eq!(words(&desk.sent()), ["PUBLISH 1024 \"1\" dup", "PUBLISH 1025 \"2\" dup"]);
}
