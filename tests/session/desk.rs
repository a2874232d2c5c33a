//! A session on the desk: hand-made packets and commits go in, packets and changes come out.

use std::num::NonZeroU16;

use bytes::Bytes;
use fieldpost::message::{Lane, PacketId, Qos, Record, Seq, Topic};
use fieldpost::turn::{Begin, Change, Offer, Resume, RowState, Taken};
use fieldpost::uplink::packet::{ConnAck, Limits, Packet, Protocol, Publish, ReasonCode};
use fieldpost::uplink::session::{Carry, Counted, Event, Session, SessionError, Settings};

use crate::world::{CANARY, PRESENCE, settings};

pub const BOTH: [Protocol; 2] = [Protocol::V5, Protocol::V311];
pub const OK: ReasonCode = ReasonCode::SUCCESS;

pub fn id(number: u16) -> PacketId {
    PacketId::new(number).unwrap()
}

/// What a store says that knows of nothing in flight, and whose canary is proven.
pub fn nothing() -> Begin {
    Begin {
        clean_start_needed: false,
        session_uncertain: false,
        canary_proven: true,
        resume: Vec::new(),
        rx_open: Vec::new(),
        boot: 1,
        epoch: 1,
        queued: 0,
    }
}

pub fn record(seq: u64, topic: &str, qos: Qos) -> Record {
    Record {
        lane: Lane::Normal,
        seq: Seq(seq),
        topic: Topic::new(topic).unwrap(),
        qos,
        retain: false,
        at_ms: 0,
        expires_s: None,
        correlation_data: None,
        payload: Bytes::from(seq.to_string()),
    }
}

/// A row of `inflight`, sent as number `seq`.
pub fn row(number: u16, seq: u64, state: RowState) -> Resume {
    let record = (state == RowState::Published).then(|| record(seq, "t", Qos::ExactlyOnce));
    Resume::Row { id: id(number), state, send_no: seq, record, lane: Lane::Normal, seq: Seq(seq) }
}

pub fn taken(number: u16, seq: u64, qos: Qos) -> Taken {
    Taken { id: id(number), send_no: seq, qos, record: record(seq, "t", qos) }
}

pub fn rows(rows: Vec<Resume>) -> Begin {
    Begin { resume: rows, ..nothing() }
}

pub struct Desk {
    pub session: Session,
    pub now_ms: u64,
    events: Vec<Event>,
    /// The offer that is out.
    offer: Option<Offer>,
}

impl Desk {
    pub fn with(settings: Settings, begin: Begin, carry: Carry) -> Desk {
        let now_ms = 1_000_000;
        let session = Session::new(settings, 7, 7, begin, carry, now_ms);
        Desk { session, now_ms, events: Vec::new(), offer: None }
    }

    pub fn new(protocol: Protocol, begin: Begin) -> Desk {
        Desk::with(settings(protocol), begin, Carry::default())
    }

    /// Running, with these limits, a session that was present, and nothing left to send but what `begin` asks for.
    pub fn running(protocol: Protocol, begin: Begin, limits: Limits) -> Desk {
        let mut desk = Desk::new(protocol, begin);
        desk.run(limits);
        desk
    }

    pub fn run(&mut self, limits: Limits) {
        self.connack(true, limits).unwrap();
        self.commit();
        self.suback();
        assert!(self.session.is_running());
    }

    pub fn connack(&mut self, present: bool, limits: Limits) -> Result<(), SessionError> {
        let connack = ConnAck { session_present: present, reason: OK, reason_string: None, limits };
        self.session.on_packet(Packet::ConnAck(connack), self.now_ms)
    }

    pub fn get(&mut self, packet: Packet) {
        self.session.on_packet(packet, self.now_ms).unwrap();
    }

    /// Whatever has been queued for the broker so far.
    pub fn sent(&mut self) -> Vec<Packet> {
        std::iter::from_fn(|| self.session.next_packet()).collect()
    }

    pub fn turn(&mut self) -> (Vec<Change>, Option<Offer>) {
        let (changes, offer) = self.session.turn().unwrap_or_default();
        self.offer = offer.clone().or(self.offer.take());
        (changes, offer)
    }

    /// Hands the changes over and hears that they are committed.
    pub fn commit(&mut self) -> Vec<Change> {
        let (changes, _) = self.turn();
        if !changes.is_empty() {
            self.session.on_committed(&[], self.now_ms);
        }
        changes
    }

    /// Grants every subscription of a SUBSCRIBE that is among the packets sent; the others are returned.
    pub fn suback(&mut self) -> Vec<Packet> {
        let (subscribes, others): (Vec<_>, Vec<_>) =
            self.sent().into_iter().partition(|packet| matches!(packet, Packet::Subscribe(..)));
        let [Packet::Subscribe(id, filters)] = &subscribes[..] else { panic!("no SUBSCRIBE: {others:?}") };
        let granted = filters.iter().map(|s| ReasonCode(s.qos.number())).collect();
        self.get(Packet::SubAck(*id, granted));
        others
    }

    /// Takes what the session offers to take.
    pub fn take(&mut self, messages: &[(u64, Qos)]) -> Vec<Packet> {
        self.commit();
        let offer = self.offer.take().expect("room for messages");
        let taken = messages.iter().zip(offer.ids).map(|((seq, qos), id)| taken(id.get(), *seq, *qos));
        self.session.on_taken(taken.collect(), self.now_ms);
        self.sent()
    }

    pub fn events(&mut self) -> Vec<Event> {
        self.events.extend(self.session.take_events());
        self.events.clone()
    }

    pub fn count(&mut self, what: Counted) -> u64 {
        let counted = |event: &Event| match event {
            Event::Count(counted, n) if *counted == what => *n,
            _ => 0,
        };
        self.events().iter().map(counted).sum()
    }

    pub fn pass(&mut self, ms: u64) -> Result<(), SessionError> {
        self.now_ms += ms;
        self.session.tick(self.now_ms)
    }

    /// The broker sends back what was published to the canary.
    pub fn echo(&mut self, canary: &Packet) {
        let Packet::Publish(publish) = canary else { panic!("{canary:?}") };
        assert_eq!(publish.topic.as_str(), CANARY);
        let echo = Publish { qos: Qos::AtMostOnce, id: None, ..(**publish).clone() };
        self.get(Packet::Publish(Box::new(echo)));
    }

    /// The canary among the packets sent, with its identifier.
    pub fn canary(&mut self) -> (Packet, PacketId) {
        let sent = self.sent();
        let found = sent.into_iter().find(|packet| topic_of(packet) == Some(CANARY));
        let canary = found.expect("a canary");
        let Packet::Publish(publish) = &canary else { unreachable!() };
        let id = publish.id.unwrap();
        (canary, id)
    }

    pub fn presence(&mut self) -> bool {
        self.session.publish_presence(Topic::new(PRESENCE).unwrap(), "online".into(), true, self.now_ms)
    }
}

pub fn topic_of(packet: &Packet) -> Option<&str> {
    match packet {
        Packet::Publish(publish) => Some(publish.topic.as_str()),
        _ => None,
    }
}

/// Packets in words: `PUBLISH 1024 "1" dup`, `PUBREL 1024`.
pub fn words(packets: &[Packet]) -> Vec<String> {
    let word = |packet: &Packet| match packet {
        Packet::Publish(publish) => {
            let text = String::from_utf8_lossy(&publish.payload).into_owned();
            let dup = if publish.dup { " dup" } else { "" };
            format!("PUBLISH {} {text:?}{dup}", publish.id.map_or(0, PacketId::get))
        }
        Packet::PubAck(id, reason)
        | Packet::PubRec(id, reason)
        | Packet::PubRel(id, reason)
        | Packet::PubComp(id, reason) => {
            let reason = if *reason == OK { String::new() } else { format!(" 0x{:02X}", reason.0) };
            format!("{} {id}{reason}", packet.name())
        }
        _ => packet.name().to_owned(),
    };
    packets.iter().map(word).collect()
}

pub fn inbound(number: u16, qos: Qos, dup: bool, text: &str) -> Packet {
    Packet::Publish(Box::new(Publish {
        dup,
        qos,
        retain: false,
        topic: Topic::new("cmd/x").unwrap(),
        id: NonZeroU16::new(number).map(|number| id(number.get())),
        payload: Bytes::copy_from_slice(text.as_bytes()),
        message_expiry_s: None,
        response_topic: None,
        correlation_data: None,
    }))
}
