//! Liveness: when a connection is given up, what keeps it alive, and what presence needs.

use fieldpost::message::Qos;
use fieldpost::uplink::packet::{ConnAck, Limits, Packet, Protocol, ReasonCode};
use fieldpost::uplink::session::{Carry, SessionError, Settings};

use crate::desk::{BOTH, Desk, OK, id, nothing, words};
use crate::support::broker::Kind;
use crate::world::{Plan, World, settings};

const Q2: Qos = Qos::ExactlyOnce;

/// Time passes in steps, and the broker answers every PINGREQ.
fn pass_awake(desk: &mut Desk, ms: u64) -> Result<usize, SessionError> {
    let mut pings = 0;
    for _ in 0..ms / 1000 {
        desk.pass(1000)?;
        let count = desk.sent().iter().filter(|packet| **packet == Packet::PingReq).count();
        if count > 0 {
            desk.session.on_written(desk.now_ms);
            desk.get(Packet::PingResp);
        }
        pings += count;
    }
    Ok(pings)
}

#[test]
fn nothing_acknowledged_for_the_ack_timeout_ends_a_healthy_looking_connection() {
    for protocol in BOTH {
        let mut desk = Desk::running(protocol, nothing(), Limits::default());
        assert!(
            pass_awake(&mut desk, 100_000).is_ok(),
            "with nothing in flight there is nothing to wait for"
        );
        desk.take(&[(1, Q2)]);
        pass_awake(&mut desk, 19_000).unwrap();
        let ended = pass_awake(&mut desk, 2_000);
        assert!(matches!(ended, Err(SessionError::NoProgress { waited_ms: 20_000.. })), "{ended:?}");
    }
}

#[test]
fn a_connack_that_never_comes_and_a_suback_that_never_comes_end_it_too() {
    let mut desk = Desk::new(Protocol::V5, nothing());
    assert!(matches!(desk.pass(20_000), Err(SessionError::NoProgress { .. })));
    let mut desk = Desk::new(Protocol::V5, nothing());
    desk.connack(true, Limits::default()).unwrap();
    desk.commit();
    assert!(matches!(desk.pass(20_000), Err(SessionError::NoProgress { .. })));
}

#[test]
fn silence_for_one_and_a_half_keep_alives_ends_it() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.pass(89_999).unwrap();
    assert_eq!(desk.pass(1), Err(SessionError::Silent { idle_ms: 90_000 }));
}

#[test]
fn a_ping_leaves_before_the_keep_alive_is_over_and_obeys_the_servers_own() {
    for (server_s, pings) in [(None, 6), (Some(10), 37)] {
        let limits = Limits { keep_alive_s: server_s, ..Limits::default() };
        let mut desk = Desk::running(Protocol::V5, nothing(), limits);
        desk.sent();
        desk.session.on_written(desk.now_ms);
        assert_eq!(pass_awake(&mut desk, 300_000), Ok(pings));
    }
}

#[test]
fn a_broker_that_accepts_and_never_acknowledges_is_left_and_nothing_is_lost() {
    for protocol in BOTH {
        for kind in [Kind::Puback, Kind::Pubrec, Kind::Pubcomp, Kind::Suback, Kind::Connack] {
            let mut world = World::new(Plan::new(protocol));
            world.broker.script.withhold.insert(kind);
            world.produce(fieldpost::message::Lane::Normal, Q2, "t/normal/2/0", 0);
            world.commit_all();
            for _ in 0..100 {
                world.round();
                world.pass(500);
            }
            assert!(!world.ends.is_empty(), "{kind:?} is waited for, for ever");
            world.broker.script.withhold.clear();
            world.cut(0);
            world.finish().unwrap();
            assert_eq!((world.texts(), world.broker.violations()), (vec!["1".to_owned()], vec![]));
        }
    }
}

#[test]
fn what_no_broker_may_say_ends_the_connection() {
    let refused = ConnAck {
        session_present: false,
        reason: ReasonCode::NOT_AUTHORIZED,
        reason_string: Some("no".into()),
        limits: Limits::default(),
    };
    let mut desk = Desk::new(Protocol::V5, nothing());
    let ended = desk.session.on_packet(Packet::ConnAck(refused), desk.now_ms);
    assert!(matches!(ended, Err(SessionError::Refused { .. })));
    for (limits, before) in [
        (Limits { receive_max: Some(0), ..Limits::default() }, None),
        (Limits { max_packet_bytes: Some(0), ..Limits::default() }, None),
        (Limits::default(), Some(Packet::PubAck(id(1), OK))),
    ] {
        let mut desk = Desk::new(Protocol::V5, nothing());
        let early = before.map(|packet| desk.session.on_packet(packet, desk.now_ms));
        let ended = early.unwrap_or_else(|| desk.connack(false, limits));
        assert!(matches!(ended, Err(SessionError::Protocol(_))), "{ended:?}");
    }
    for packet in
        [Packet::PingReq, Packet::Disconnect(ReasonCode(0x8B)), Packet::Disconnect(ReasonCode(0x8E))]
    {
        let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
        assert!(desk.session.on_packet(packet, desk.now_ms).is_err());
    }
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    assert!(desk.connack(true, Limits::default()).is_err(), "a second CONNACK");
}

#[test]
fn nothing_leaves_after_disconnect_and_nothing_new_while_draining() {
    let mut desk = Desk::running(Protocol::V5, nothing(), Limits::default());
    desk.take(&[(1, Q2)]);
    desk.session.drain();
    desk.get(Packet::PubRec(id(1024), OK));
    assert!(!desk.session.is_idle());
    desk.commit();
    desk.get(Packet::PubComp(id(1024), OK));
    let (_, offer) = desk.turn();
    assert_eq!(offer, None);
    desk.session.on_committed(&[], desk.now_ms);
    assert_eq!(words(&desk.sent()), ["PUBREL 1024"]);
    assert!(desk.session.is_idle());
    desk.session.disconnect();
    desk.get(Packet::PubRel(id(4), OK));
    assert!(desk.presence());
    desk.commit();
    assert_eq!(words(&desk.sent()), ["DISCONNECT"]);
}

#[test]
fn presence_waits_for_its_turn_and_the_crowd_of_it_is_bounded() {
    let narrow = Settings { max_in_flight: 1, ..settings(Protocol::V5) };
    let mut desk = Desk::with(narrow, nothing(), Carry::default());
    desk.run(Limits::default());
    desk.take(&[(1, Q2)]);
    let taken = (0..2000).filter(|_| desk.presence()).count();
    assert_eq!((taken, words(&desk.sent())), (1024, vec![]));
    desk.get(Packet::PubRec(id(1024), OK));
    desk.commit();
    desk.get(Packet::PubComp(id(1024), OK));
    assert_eq!(words(&desk.sent()), ["PUBREL 1024", "PUBLISH 2 \"online\""]);
    assert_eq!(desk.session.in_flight(), 1);
}

#[test]
fn qos_0_is_sent_while_messages_flow_and_not_before() {
    let message = || fieldpost::message::Message {
        topic: fieldpost::message::Topic::new("t").unwrap(),
        qos: Qos::AtMostOnce,
        retain: true,
        lane: fieldpost::message::Lane::Normal,
        at: fieldpost::clock::Stamp { wall_ms: 0, mono_ms: 0, synchronised: false },
        expires_after: None,
        correlation_data: None,
        payload: fieldpost::message::Payload::Whole("now".into()),
    };
    let mut desk = Desk::new(Protocol::V5, nothing());
    assert!(!desk.session.publish_qos0(message()));
    desk.run(Limits::default());
    assert!(desk.session.publish_qos0(message()));
    assert_eq!(words(&desk.sent()), ["PUBLISH 0 \"now\""]);
}
