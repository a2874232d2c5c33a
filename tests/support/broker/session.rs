//! Session state (5.0 clause 4.1) and the state of one network connection.
//!
//! Invariant: a session's held ids leave only by PUBREL, by the session's end, or by the test's hand; a message
//! to the client leaves `in_flight` only by its last acknowledgement.

use super::log::ConnId;
use super::packet::{Ack, Publish, Request, Will, set_expiry};
use super::topic;
use super::wire::{Kind, Properties, Version};
use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// An application message inside the broker.
#[derive(Clone, Debug)]
pub struct Message {
    /// Topic Name.
    pub topic: Arc<str>,
    /// Application message.
    pub payload: Bytes,
    /// QoS it was published with, 0 to 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// What a 5.0 subscriber also gets.
    pub properties: Properties,
    /// When it is no longer of interest (Message Expiry Interval).
    pub expires_at_ms: Option<u64>,
    /// Client that published it, empty for the broker itself.
    pub from: Arc<str>,
}

impl Message {
    /// A message of the test's own.
    pub fn new(topic: &str, payload: impl Into<Bytes>, qos: u8) -> Message {
        Message {
            topic: topic.into(),
            payload: payload.into(),
            qos,
            retain: false,
            properties: Properties::default(),
            expires_at_ms: None,
            from: "".into(),
        }
    }

    /// The same, retained.
    pub fn retained(self) -> Message {
        Message { retain: true, ..self }
    }

    /// Whether a PUBLISH could be this message sent again.
    pub fn is_same_as(&self, publish: &Publish) -> bool {
        let named = publish.topic.is_empty() || *self.topic == *publish.topic;
        named && self.payload == publish.payload && self.qos == publish.qos && self.retain == publish.retain
    }

    /// Whether its Message Expiry Interval has passed (MQTT-3.3.2-5).
    pub fn expired(&self, now_ms: u64) -> bool {
        self.expires_at_ms.is_some_and(|at| at <= now_ms)
    }

    /// As a PUBLISH with this id.
    pub fn publish(&self, id: u16, dup: bool, now_ms: u64) -> Publish {
        let mut properties = self.properties.clone();
        if let Some(at) = self.expires_at_ms {
            let left_s = at.saturating_sub(now_ms) / 1000;
            set_expiry(&mut properties, u32::try_from(left_s).unwrap_or(u32::MAX));
        }
        Publish {
            dup,
            qos: self.qos,
            retain: self.retain,
            topic: self.topic.to_string(),
            id,
            payload: self.payload.clone(),
            properties,
        }
    }
}

/// A QoS 2 PUBLISH taken whose PUBREL has not come.
#[derive(Clone, Debug)]
pub struct Held {
    /// The message.
    pub message: Message,
    /// Its number among all received ones.
    pub received_no: u64,
    /// Reason code of its PUBREC.
    pub reason: u8,
    /// Number of the latest PUBREC sent for it, `None` while none was.
    pub pubrec_no: Option<u64>,
    /// Order in which it first arrived.
    pub arrived_no: u64,
    /// Whether subscribers have it already (method B).
    pub onward: bool,
}

/// What the client owes for a message sent to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaiting {
    /// QoS 1.
    Puback,
    /// QoS 2, first half.
    Pubrec,
    /// QoS 2, second half.
    Pubcomp,
}

/// A message sent to the client and not acknowledged to the end.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// Packet Identifier.
    pub id: u16,
    /// The message.
    pub message: Message,
    /// What is missing.
    pub awaiting: Awaiting,
    /// Connection on which PUBLISH or PUBREL went last.
    pub sent_on: ConnId,
}

/// The next packet a session wants to send.
pub enum Outgoing {
    /// A message, new or repeated.
    Publish(Publish),
    /// PUBREL, repeated after a reconnect.
    Ack(Ack),
}

/// One client's session.
#[derive(Clone, Debug)]
pub struct Session {
    /// Client Identifier.
    pub client_id: Arc<str>,
    /// Its connection, if there is one.
    pub connection: Option<ConnId>,
    /// Subscriptions by filter; `qos` is the granted one.
    pub subscriptions: BTreeMap<String, Request>,
    /// QoS 2 packet ids held for PUBREL.
    pub held: BTreeMap<u16, Held>,
    /// Messages sent, in order.
    pub in_flight: Vec<InFlight>,
    /// Messages waiting to be sent.
    pub queue: VecDeque<Message>,
    /// Milliseconds the session outlives its connection; `None` for ever.
    pub outlives_ms: Option<u64>,
    /// When a session without connection ends.
    pub ends_at_ms: Option<u64>,
    /// Will waiting for its Will Delay Interval, and when that ends.
    pub will: Option<(u64, Will)>,
    /// The test made the broker forget or lie, so what the client does next proves nothing against it.
    pub tampered: bool,
    /// Packet Identifier given last.
    pub last_id: u16,
    /// The lowest free one comes next.
    pub reuses_ids: bool,
}

impl Session {
    /// A new session, not connected.
    pub fn new(client_id: Arc<str>) -> Session {
        Session {
            client_id,
            connection: None,
            subscriptions: BTreeMap::new(),
            held: BTreeMap::new(),
            in_flight: Vec::new(),
            queue: VecDeque::new(),
            outlives_ms: None,
            ends_at_ms: None,
            will: None,
            tampered: false,
            last_id: 0,
            reuses_ids: false,
        }
    }

    /// Highest granted QoS among the subscriptions a message belongs to, and whether RETAIN stays as it was.
    pub fn wants(&self, message: &Message) -> Option<(u8, bool)> {
        let fitting = self.subscriptions.values().filter(|s| topic::matches(&s.filter, &message.topic));
        fitting
            .filter(|s| !(s.no_local && *message.from == *self.client_id))
            .map(|s| (s.qos, s.retain_as_published))
            .reduce(|a, b| (a.0.max(b.0), a.1 || b.1))
    }

    /// An id no message in flight has.
    pub fn free_id(&mut self) -> u16 {
        if self.reuses_ids {
            self.last_id = 0;
        }
        loop {
            self.last_id = self.last_id.checked_add(1).unwrap_or(1);
            if !self.in_flight.iter().any(|m| m.id == self.last_id) {
                return self.last_id;
            }
        }
    }

    /// What to send next on `conn`: first whatever earlier connections left unfinished, in its order and with
    /// DUP (MQTT-4.4.0-1, MQTT-4.6.0-1), then what waits. `None` when the window is full or nothing is left.
    pub fn next_outgoing(&mut self, conn: ConnId, window: usize, now_ms: u64) -> Option<Outgoing> {
        let open = self.in_flight.iter().filter(|m| m.sent_on == conn).count();
        if let Some(old) = self.in_flight.iter_mut().find(|m| m.sent_on != conn) {
            if old.awaiting == Awaiting::Pubcomp {
                old.sent_on = conn;
                return Some(Outgoing::Ack(Ack { kind: Kind::Pubrel, id: old.id, reason: 0 }));
            }
            if open >= window {
                return None;
            }
            old.sent_on = conn;
            return Some(Outgoing::Publish(old.message.publish(old.id, true, now_ms)));
        }
        if open >= window {
            return None;
        }
        let message = loop {
            let message = self.queue.pop_front()?;
            if !message.expired(now_ms) {
                break message;
            }
        };
        let id = self.free_id();
        let publish = message.publish(id, false, now_ms);
        self.sent(conn, id, message);
        Some(Outgoing::Publish(publish))
    }

    /// Notes a QoS 1 or 2 message as sent; one with the same id is replaced.
    pub fn sent(&mut self, conn: ConnId, id: u16, message: Message) {
        let awaiting = if message.qos == 2 { Awaiting::Pubrec } else { Awaiting::Puback };
        self.in_flight.retain(|m| m.id != id);
        self.in_flight.push(InFlight { id, message, awaiting, sent_on: conn });
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// CONNECT has not come.
    New,
    /// CONNECT was accepted; the flag says whether CONNACK has left.
    Open(bool),
    /// The script left CONNECT unanswered.
    Mute,
}

/// One network connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// How far it has come.
    pub stage: Stage,
    /// Bytes not decoded yet.
    pub buffer: BytesMut,
    /// Known from CONNECT on.
    pub version: Option<Version>,
    /// Empty until CONNECT was accepted.
    pub client_id: Arc<str>,
    /// 1.5 × Keep Alive, 0 for none.
    pub silence_ms: u64,
    /// When the last packet came, or the connection.
    pub last_packet_ms: u64,
    /// Will Message.
    pub will: Option<Will>,
    /// The client's Receive Maximum.
    pub receive_maximum: usize,
    /// The client's Maximum Packet Size.
    pub maximum_packet_size: usize,
    /// PUBLISHes of QoS 1 and 2 not finished, as 5.0 clause 4.9 counts them: from 0 on each connection.
    pub outstanding: usize,
    /// QoS 1 PUBLISHes whose PUBACK has not left.
    pub unacked: BTreeMap<u16, Message>,
    /// QoS 2 ids whose PUBLISH came on this connection and whose PUBCOMP has not left.
    pub published: BTreeSet<u16>,
    /// QoS 2 ids for which another PUBREL would be wrong, and why.
    pub no_pubrel: BTreeMap<u16, &'static str>,
    /// Number of the latest PUBREC answered by a PUBREL here.
    pub last_pubrec_no: u64,
    /// Latest arrival order of a QoS 2 PUBLISH here.
    pub last_arrived_no: u64,
    /// Topic Aliases (5.0 clause 3.3.2.3.4).
    pub aliases: BTreeMap<u16, String>,
    /// Output is thrown away: the connection is about to be cut.
    pub muted: bool,
    /// The script sent something that was not honest here.
    pub tampered: bool,
}

impl Connection {
    /// A connection just accepted.
    pub fn new(now_ms: u64) -> Connection {
        Connection {
            stage: Stage::New,
            buffer: BytesMut::new(),
            version: None,
            client_id: "".into(),
            silence_ms: 0,
            last_packet_ms: now_ms,
            will: None,
            receive_maximum: usize::from(u16::MAX),
            maximum_packet_size: usize::MAX,
            outstanding: 0,
            unacked: BTreeMap::new(),
            published: BTreeSet::new(),
            no_pubrel: BTreeMap::new(),
            last_pubrec_no: 0,
            last_arrived_no: 0,
            aliases: BTreeMap::new(),
            muted: false,
            tampered: false,
        }
    }
}
