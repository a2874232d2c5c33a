//! Lost sessions: what "absent" does, how a missed one is found out, and how a session is begun clean.

use fieldpost::message::{Lane, Qos};
use fieldpost::turn::{Begin, Change, OnSessionLoss, RowState};
use fieldpost::uplink::packet::{Limits, Packet, Protocol, ReasonCode};
use fieldpost::uplink::session::{Carry, Counted, Event, SessionError, Settings};

use crate::desk::{BOTH, Desk, OK, id, nothing, row, rows, topic_of, words};
use crate::support::broker::{ConnectScript, Onward};
use crate::world::{CANARY, Plan, World, settings};

const Q1: Qos = Qos::AtLeastOnce;
const Q2: Qos = Qos::ExactlyOnce;
const REPUBLISH: OnSessionLoss = OnSessionLoss::Republish;

fn uncertain() -> Begin {
    let resume = vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)];
    Begin { session_uncertain: true, resume, ..nothing() }
}

#[test]
fn an_absent_session_queues_the_rows_again_and_subscribes_again() {
    for policy in [REPUBLISH, OnSessionLoss::Drop] {
        let chosen =
            fieldpost::uplink::session::Settings { on_session_loss: policy, ..settings(Protocol::V5) };
        let mut desk = Desk::with(chosen, uncertain(), Carry::default());
        desk.connack(false, Limits::default()).unwrap();
        assert_eq!(desk.commit(), [Change::SessionAbsent(policy)]);
        assert_eq!(words(&desk.sent()), ["SUBSCRIBE"], "and no PUBREL of the old session");
        assert_eq!(desk.count(Counted::SessionsLost), 1);
        assert!(desk.events().contains(&Event::SessionSettled { present: false }));
    }
}

#[test]
fn the_ambiguous_are_republished_or_dropped_and_counted_either_way() {
    for protocol in BOTH {
        for (policy, texts) in [(REPUBLISH, vec!["1", "2", "1"]), (OnSessionLoss::Drop, vec!["1", "2"])] {
            let mut plan = Plan::new(protocol);
            plan.settings.on_session_loss = policy;
            let mut world = World::new(plan);
            world.until_running();
            // The first is released at the broker, and its PUBCOMP lost; the second has not arrived.
            receive_one(&mut world);
            world.broker_gets(usize::MAX);
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            world.cut(0);
            world.lose_session();
            world.finish().unwrap();
            let mut sorted = world.texts();
            assert_eq!(sorted.len(), texts.len(), "{sorted:?}");
            sorted.sort();
            sorted.dedup();
            assert_eq!(sorted, ["1", "2"]);
            let (doubled, lost) = (world.possibly_doubled, world.possibly_lost);
            assert_eq!((doubled, lost), if policy == REPUBLISH { (1, 0) } else { (0, 1) });
        }
    }
}

#[test]
fn an_absent_that_nobody_heard_is_found_out_by_the_canary() {
    for protocol in BOTH {
        let mut world = with_a_released_row(protocol);
        world.lose_session();
        world.connect();
        world.cut(usize::MAX);
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1"], "the PUBREL alone would have lost it");
        assert_eq!(world.count(Counted::SessionsLost), 1);
    }
}

/// A world with one message of which PUBREC is committed, and PUBREL lost.
fn with_a_released_row(protocol: Protocol) -> World {
    let mut world = World::new(Plan::new(protocol));
    world.until_running();
    receive_one(&mut world);
    world.cut(0);
    world
}

/// One message up to its PUBREC, which is committed, and its PUBREL, which has not arrived.
fn receive_one(world: &mut World) {
    world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
    world.commit_all();
    world.round();
    world.round();
    let received = world.rows.values().filter(|row| row.received).count();
    assert_eq!((received, world.texts().len()), (1, 0));
}

#[test]
fn the_old_session_is_not_mistaken_for_a_new_one() {
    for protocol in BOTH {
        let mut world = with_a_released_row(protocol);
        world.crash(0);
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1"]);
        assert_eq!((world.count(Counted::SessionsLost), world.count(Counted::Ambiguous)), (0, 0));
    }
}

#[test]
fn present_is_believed_once_the_canarys_echo_has_come() {
    for protocol in BOTH {
        let mut desk = Desk::new(protocol, uncertain());
        desk.connack(true, Limits::default()).unwrap();
        assert_eq!(desk.commit(), []);
        let (canary, _) = desk.canary();
        assert!(desk.presence());
        assert_eq!(words(&desk.sent()), [""; 0], "nothing else leaves before the verdict");
        desk.echo(&canary);
        assert_eq!(desk.commit(), [Change::SessionPresent]);
        desk.suback();
        assert_eq!(words(&desk.sent()), ["PUBLISH 1024 \"1\" dup", "PUBREL 1025"]);
    }
}

#[test]
fn an_echo_of_another_connection_proves_nothing() {
    let mut desk = Desk::new(Protocol::V5, uncertain());
    desk.connack(true, Limits::default()).unwrap();
    let (canary, _) = desk.canary();
    let Packet::Publish(mut stale) = canary else { panic!() };
    stale.payload = "another".into();
    desk.echo(&Packet::Publish(stale));
    assert_eq!(desk.commit(), []);
}

#[test]
fn a_canary_without_echo_discards_the_session_before_anything_is_published() {
    for (reason, wait_ms) in [(OK, 2000), (ReasonCode::NO_MATCHING_SUBSCRIBERS, 0)] {
        let mut desk = Desk::new(Protocol::V5, uncertain());
        desk.connack(true, Limits::default()).unwrap();
        let (_, canary) = desk.canary();
        desk.get(Packet::PubAck(canary, reason));
        desk.pass(wait_ms).unwrap();
        assert_eq!(desk.turn().0, [Change::SessionReplaced(REPUBLISH)]);
        assert_eq!(words(&desk.sent()), [""; 0]);
        desk.session.on_committed(&[], desk.now_ms);
        assert_eq!(desk.pass(0), Err(SessionError::Replaced));
    }
}

#[test]
fn an_echo_that_never_comes_costs_a_session_but_no_identifier() {
    // Rights are taken away behind our back: the session is the old one, and nobody can tell.
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.until_running();
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.commit_all();
        world.round();
        world.cut(0);
        world.broker.script.deny_read.push(CANARY.into());
        world.connect();
        world.rounds(3000);
        let held = world.broker.session("box").map(|session| session.held.len());
        assert_eq!(held, Some(0), "an identifier left behind would swallow a later message");
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1"]);
    }
}

#[test]
fn a_canary_refused_for_now_is_asked_again_on_another_connection() {
    let mut desk = Desk::new(Protocol::V5, uncertain());
    desk.connack(true, Limits::default()).unwrap();
    let (_, canary) = desk.canary();
    let busy = ReasonCode(0x80);
    let refused = desk.session.on_packet(Packet::PubAck(canary, busy), desk.now_ms);
    assert_eq!(refused, Err(SessionError::CanaryRefused(busy)));
    assert_eq!(desk.session.take_unsaved(), []);
}

#[test]
fn a_canary_that_finds_the_window_full_is_asked_at_qos_0() {
    for echoes in [true, false] {
        let begin = Begin { session_uncertain: true, ..rows(vec![row(1025, 2, RowState::Received)]) };
        let mut desk = Desk::new(Protocol::V5, begin);
        desk.connack(true, Limits { receive_max: Some(1), ..Limits::default() }).unwrap();
        let (_, refused) = desk.canary();
        desk.get(Packet::PubAck(refused, ReasonCode::QUOTA_EXCEEDED));
        let sent = desk.sent();
        let [Packet::Publish(canary), Packet::PingReq] = &sent[..] else { panic!("{sent:?}") };
        assert_eq!((canary.qos, canary.id), (Qos::AtMostOnce, None));
        assert!(desk.presence());
        desk.get(Packet::PingResp);
        if echoes {
            desk.echo(&sent[0]);
            assert_eq!(desk.commit(), [Change::SessionPresent]);
            desk.suback();
            assert_eq!(words(&desk.sent()), ["PUBREL 1025"], "presence waits until the broker has room");
        } else {
            // A message at QoS 0 may be lost: its silence proves nothing.
            assert_eq!(desk.pass(2000), Ok(()), "the next tick tells");
            assert_eq!(desk.pass(0), Err(SessionError::CanaryRefused(ReasonCode::QUOTA_EXCEEDED)));
        }
    }
}

#[test]
fn a_window_of_one_that_the_broker_still_holds_is_resumed() {
    for protocol in BOTH {
        for receive_maximum in [Some(1), None] {
            let mut plan = Plan::new(protocol);
            (plan.settings.max_in_flight, plan.settings.qos2_window) = (1, 1);
            plan.limits.receive_maximum = receive_maximum;
            let mut world = World::new(plan);
            world.broker.script.held_limit = Some(1);
            world.until_running();
            for _ in 0..5 {
                world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
                world.commit_all();
                world.round();
                world.crash(0);
            }
            world.finish().unwrap();
            assert_eq!(world.texts(), ["1", "2", "3", "4", "5"], "{protocol:?} {receive_maximum:?}");
            let lost = (
                world.count(Counted::SessionsLost),
                world.possibly_doubled,
                world.broker.log.counters.swallowed,
            );
            assert_eq!(lost, (0, 0, 0), "{protocol:?} {receive_maximum:?} {:?}", world.ends);
        }
    }
}

#[test]
fn a_broker_that_keeps_no_session_is_asked_for_none() {
    for protocol in BOTH {
        let clean = Settings { clean_start: true, ..settings(protocol) };
        let begin = rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)]);
        let mut desk = Desk::with(clean, Begin { session_uncertain: true, ..begin }, Carry::default());
        assert!(desk.session.clean_start());
        desk.connack(false, Limits::default()).unwrap();
        assert_eq!(desk.commit(), [Change::RowsVoid(REPUBLISH)]);
        desk.suback();
        assert!(desk.session.is_running(), "there is nothing that a canary could prove");
        assert_eq!((words(&desk.sent()), desk.count(Counted::SessionsLost)), (vec![], 0));
    }
}

#[test]
fn rows_of_a_broker_that_turns_out_to_do_no_qos_2_are_published_anew_at_qos_1() {
    for protocol in BOTH {
        let limits = Limits { max_qos: Some(1), ..Limits::default() };
        let begin = rows(vec![row(1024, 1, RowState::Published), row(1025, 2, RowState::Received)]);
        let mut desk = Desk::with(Settings { limits, ..settings(protocol) }, begin, Carry::default());
        desk.connack(true, Limits::default()).unwrap();
        assert_eq!(desk.commit(), [Change::RowsVoid(REPUBLISH)]);
        desk.suback();
        assert_eq!(words(&desk.sent()), [""; 0], "a PUBREL would cost the connection");
        assert_eq!(desk.turn().1.unwrap().max_qos, Qos::AtLeastOnce);
    }
}

#[test]
fn without_a_canary_present_is_believed_and_what_that_may_cost_is_counted() {
    // Never proven, or not allowed any more.
    let mut desk = Desk::new(Protocol::V5, Begin { canary_proven: false, ..uncertain() });
    desk.connack(true, Limits::default()).unwrap();
    assert_eq!(desk.commit(), [Change::SessionPresent]);
    assert_eq!(desk.count(Counted::Ambiguous), 2);

    let mut desk = Desk::new(Protocol::V5, uncertain());
    desk.connack(true, Limits::default()).unwrap();
    let (_, canary) = desk.canary();
    desk.get(Packet::PubAck(canary, ReasonCode::NOT_AUTHORIZED));
    assert_eq!(desk.commit(), [Change::SessionPresent, Change::Canary { proven: false }]);
    assert_eq!(desk.count(Counted::Ambiguous), 2);
}

#[test]
fn the_canary_is_proven_and_committed_before_the_first_qos_2_publish() {
    for protocol in BOTH {
        let mut desk = Desk::new(protocol, Begin { canary_proven: false, ..nothing() });
        desk.connack(false, Limits::default()).unwrap();
        desk.commit();
        desk.suback();
        let (canary, _) = desk.canary();
        assert_eq!(desk.turn(), (vec![], None));
        desk.echo(&canary);
        assert_eq!(desk.turn(), (vec![Change::Canary { proven: true }], None));
        desk.session.on_committed(&[], desk.now_ms);
        assert!(desk.turn().1.is_some(), "now messages are taken");
    }
}

#[test]
fn a_broker_that_denies_the_canary_is_served_all_the_same() {
    for protocol in BOTH {
        for deny in ["subscribe", "publish", "read"] {
            let mut world = World::new(Plan::new(protocol));
            let script = &mut world.broker.script;
            match deny {
                "subscribe" => script.deny_subscribe.push(CANARY.into()),
                "publish" => script.deny_publish.push(CANARY.into()),
                _ => script.deny_read.push(CANARY.into()),
            }
            for _ in 0..5 {
                world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            }
            world.finish().unwrap();
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
            world.commit_all();
            world.round();
            world.crash(0);
            world.finish().unwrap();
            assert_eq!(world.texts(), ["1", "2", "3", "4", "5", "6"], "{protocol:?} {deny}");
        }
    }
}

#[test]
fn a_canary_whose_right_is_gone_is_not_asked_any_more() {
    let mut desk = Desk::new(Protocol::V5, nothing());
    desk.connack(true, Limits::default()).unwrap();
    desk.commit();
    let sent = desk.sent();
    let [Packet::Subscribe(subscribe, filters)] = &sent[..] else { panic!("{sent:?}") };
    assert_eq!(filters[0].filter, CANARY);
    let mut granted: Vec<_> = filters.iter().map(|s| ReasonCode(s.qos.number())).collect();
    granted[0] = ReasonCode::NOT_AUTHORIZED;
    desk.get(Packet::SubAck(*subscribe, granted));
    assert_eq!(desk.turn(), (vec![Change::Canary { proven: false }], None));
    desk.session.on_committed(&[], desk.now_ms);
    assert!(desk.session.is_running());
}

#[test]
fn a_lie_about_the_session_is_found_out_while_anything_is_at_stake() {
    for protocol in BOTH {
        let mut world = with_a_released_row(protocol);
        world.lose_session();
        let lie = ConnectScript { session_present: Some(true), ..ConnectScript::default() };
        world.broker.script.next_connects.push_back(lie);
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1"]);
    }
}

#[test]
fn qos_1_survives_the_loss_of_a_session_in_order() {
    for protocol in BOTH {
        let mut world = World::new(Plan::new(protocol));
        world.until_running();
        for _ in 0..5 {
            world.produce(Lane::Normal, Q1, "t/normal/1/0", 0);
        }
        world.commit_all();
        world.answer();
        world.cut(0);
        world.lose_session();
        world.finish().unwrap();
        assert_eq!(world.texts(), ["1", "2", "3", "4", "5"]);
    }
}

#[test]
fn a_clean_start_is_told_by_absent_and_counts_as_no_loss() {
    let mut desk = Desk::new(Protocol::V5, Begin { clean_start_needed: true, ..nothing() });
    assert!(desk.session.clean_start());
    assert_eq!(desk.connack(true, Limits::default()), Err(SessionError::NotClean));
    let mut desk = Desk::new(Protocol::V5, Begin { clean_start_needed: true, ..nothing() });
    desk.connack(false, Limits::default()).unwrap();
    assert_eq!(desk.commit(), [Change::SessionAbsent(REPUBLISH)]);
    assert_eq!(desk.count(Counted::SessionsLost), 0);
}

#[test]
fn a_copy_of_the_past_takes_a_new_epoch_and_a_clean_session() {
    for protocol in BOTH {
        let mut plan = Plan::new(protocol);
        plan.limits.onward = Onward::AtPubrel;
        let mut world = World::new(plan);
        world.until_running();
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.commit_all();
        let copy = world.copy();
        world.finish().unwrap();
        // Other messages have the copied rows' identifiers by now.
        for _ in 0..5 {
            world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        }
        world.finish().unwrap();
        let epoch = world.store().boot().epoch;
        world.restore(copy);
        world.store().disown(epoch, 7, REPUBLISH).unwrap();
        assert!(world.store().boot().epoch > epoch);
        world.next_number = 100;
        world.produce(Lane::Normal, Q2, "t/normal/2/0", 0);
        world.finish().unwrap();
        let texts = world.texts();
        assert_eq!(texts.last().map(String::as_str), Some("101"), "{texts:?}");
        let again = texts.iter().filter(|text| *text == "1").count();
        assert_eq!(again, 2, "what the copy does not know to be done is sent again, and never swallowed");
    }
}

#[test]
fn the_canary_is_ours_alone_and_not_a_message_of_the_queue() {
    let mut desk = Desk::new(Protocol::V5, uncertain());
    desk.connack(true, Limits::default()).unwrap();
    let sent = desk.sent();
    assert_eq!(sent.iter().filter_map(topic_of).collect::<Vec<_>>(), [CANARY]);
    let Packet::Publish(publish) = &sent[0] else { panic!() };
    assert!(!publish.retain && publish.id.is_some_and(|own| own < id(1024)));
}
