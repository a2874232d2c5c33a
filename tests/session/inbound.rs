//! Messages from the broker: recorded once, acknowledged after that, in both directions of a crash.

use fieldpost::message::Qos;
use fieldpost::turn::{Begin, Change, RowState};
use fieldpost::uplink::packet::{Limits, Packet, Protocol, Publish, ReasonCode, Subscription};
use fieldpost::uplink::session::{Counted, Event};

use crate::desk::{BOTH, Desk, OK, id, inbound, nothing, row, rows, words};
use crate::support::broker;
use crate::world::{Plan, World};

const Q1: Qos = Qos::AtLeastOnce;
const Q2: Qos = Qos::ExactlyOnce;

#[test]
fn a_repeated_inbound_message_is_acknowledged_again_and_recorded_once() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        desk.get(inbound(5, Q2, false, "on"));
        desk.get(inbound(5, Q2, true, "on"));
        assert_eq!(desk.commit().len(), 1);
        assert_eq!(words(&desk.sent()), ["PUBREC 5", "PUBREC 5"]);
        assert_eq!(desk.count(Counted::InboundRepeated), 1);
    }
}

#[test]
fn a_repeat_after_a_restart_is_known_by_what_was_committed() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.get(inbound(5, Q2, false, "on"));
    let changes = desk.commit();
    let [Change::InboundOpened { hash, .. }] = &changes[..] else { panic!("{changes:?}") };
    let begin = Begin { rx_open: vec![(id(5), *hash)], ..nothing() };
    let mut desk = Desk::running(Protocol::V5, begin, Limits::default());
    desk.get(inbound(5, Q2, true, "on"));
    assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec!["PUBREC 5".to_owned()]));
}

#[test]
fn same_identifier_and_other_content_is_a_new_message_whatever_dup_says() {
    for dup in [false, true] {
        let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
        desk.get(inbound(5, Q2, false, "on"));
        desk.commit();
        desk.get(inbound(5, Q2, dup, "off"));
        assert!(matches!(desk.commit()[..], [Change::InboundOpened { .. }]));
    }
}

#[test]
fn an_unknown_pubrel_is_answered_pubcomp() {
    for (protocol, answer) in [(Protocol::V5, "PUBCOMP 5 0x92"), (Protocol::V311, "PUBCOMP 5")] {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        desk.get(Packet::PubRel(id(5), OK));
        assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec![answer.to_owned()]));
    }
}

#[test]
fn inbound_messages_are_recorded_before_connack_is_settled_too() {
    let mut desk = Desk::new(Protocol::V5, rows(vec![row(1024, 1, RowState::Published)]));
    desk.connack(true, Limits::default()).unwrap();
    desk.get(inbound(5, Q2, true, "on"));
    let (changes, _) = desk.turn();
    assert!(matches!(changes[..], [Change::SessionPresent, Change::InboundOpened { .. }]));
    assert_eq!(words(&desk.sent()), [""; 0]);
    desk.session.on_committed(&[], desk.now_ms);
    assert_eq!(words(&desk.sent())[0], "PUBREC 5");
}

#[test]
fn a_message_the_inbox_has_no_room_for_is_refused_and_forgotten() {
    for (protocol, reason) in [(Protocol::V5, " 0x97"), (Protocol::V311, "")] {
        for (qos, answer) in [(Q1, "PUBACK 5"), (Q2, "PUBREC 5")] {
            let mut desk = Desk::running(protocol, nothing(), Limits::default());
            desk.get(inbound(5, qos, false, "on"));
            desk.turn();
            desk.session.on_committed(&[id(5)], desk.now_ms);
            assert_eq!(words(&desk.sent()), [format!("{answer}{reason}")]);
            assert_eq!(desk.count(Counted::InboundRefused), 1);
            desk.get(inbound(5, qos, true, "on"));
            assert_eq!(desk.commit().len(), 1, "the next attempt is a new one");
        }
    }
}

#[test]
fn a_full_inbox_refuses_at_every_qos_and_tells_whom() {
    let mut world = World::new(Plan::new(Protocol::V5));
    let now = world.now;
    let change = |number: u16| {
        let Packet::Publish(publish) = inbound(number, Q1, false, "on") else { panic!() };
        let Publish { topic, payload, qos, retain, .. } = *publish;
        let (response_topic, correlation_data) = (None, None);
        let inbound =
            fieldpost::turn::Inbound { topic, payload, qos, retain, response_topic, correlation_data };
        Change::Inbound { id: Some(id(number)), inbound }
    };
    let batch = |changes| fieldpost::store::Batch { changes, ..Default::default() };
    let room = world.store().commit(batch((1..=10_000).map(change).collect()), now).unwrap();
    assert_eq!(room.refused, []);
    let full = world.store().commit(batch(vec![change(10_001)]), now).unwrap();
    assert_eq!(full.refused, [id(10_001)]);
}

#[test]
fn an_oversize_inbound_message_is_skipped_and_answered() {
    for (protocol, reason) in [(Protocol::V5, " 0x97"), (Protocol::V311, "")] {
        for (qos, answer) in [(Q1, "PUBACK 5"), (Q2, "PUBREC 5")] {
            let mut desk = Desk::running(protocol, nothing(), Limits::default());
            desk.get(Packet::Oversize { bytes: 1 << 30, qos, id: Some(id(5)), topic: "cmd/x".into() });
            assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec![format!("{answer}{reason}")]));
            assert_eq!(desk.count(Counted::InboundRefused), 1);
        }
    }
}

#[test]
fn a_message_nobody_subscribed_to_is_acknowledged_and_not_recorded() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    let Packet::Publish(publish) = inbound(5, Q2, false, "on") else { panic!() };
    let stray = Publish { topic: fieldpost::message::Topic::new("stray").unwrap(), ..*publish };
    desk.get(Packet::Publish(Box::new(stray)));
    assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec!["PUBREC 5".to_owned()]));
}

#[test]
fn presence_that_is_heard_is_told_and_not_recorded() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    let Packet::Publish(publish) = inbound(5, Q1, false, "offline") else { panic!() };
    let topic = fieldpost::message::Topic::new(crate::world::PRESENCE).unwrap();
    desk.get(Packet::Publish(Box::new(Publish { topic, ..*publish })));
    assert_eq!((desk.commit(), words(&desk.sent())), (vec![], vec!["PUBACK 5".to_owned()]));
    assert!(desk.events().contains(&Event::Presence("offline".into())));
}

#[test]
fn a_subscription_at_less_than_was_asked_for_is_told() {
    let mut desk = Desk::new(Protocol::V5, nothing());
    desk.connack(true, Limits::default()).unwrap();
    desk.commit();
    let sent = desk.sent();
    let [Packet::Subscribe(subscribe, filters)] = &sent[..] else { panic!("{sent:?}") };
    let wanted = Subscription { filter: "cmd/#".into(), qos: Q2, retained: false };
    assert_eq!(filters.last(), Some(&wanted), "QoS 2 where it is granted");
    desk.get(Packet::SubAck(*subscribe, vec![ReasonCode(1), ReasonCode(1), ReasonCode(1)]));
    let (filter, asked, granted) = ("cmd/#".to_owned(), Q2, Some(Q1));
    assert!(desk.events().contains(&Event::Downgraded { filter, asked, granted }));
    assert!(desk.session.is_running());
}

#[test]
fn every_command_is_recorded_once_through_cuts_crashes_and_repeats() {
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.broker.script.double.insert(broker::Kind::Pubrel);
        for step in 0..40 {
            world.until_running();
            world.command(2);
            // Stopped at every stage of the exchange in turn.
            for _ in 0..step % 5 {
                world.agent_gets(usize::MAX);
                world.commit_all();
                world.answer();
                world.broker_gets(usize::MAX);
            }
            if step % 2 == 0 { world.cut(0) } else { world.crash(0) }
        }
        world.finish().unwrap();
        let mut recorded = world.recorded.clone();
        recorded.sort();
        let mut commanded: Vec<_> = world.commanded.iter().map(|command| command.payload.clone()).collect();
        commanded.sort();
        assert_eq!((commanded.len(), recorded), (40, commanded));
    }
}
