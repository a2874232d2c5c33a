//! Control packets: what a client may send, decoded strictly, and what a server sends, encoded.
//!
//! Invariant: whatever decodes here satisfies every rule a single packet can break by itself; rules that need
//! a session (ids in use, Receive Maximum, limits) are checked by the broker.

use super::topic;
use super::wire::{
    Fault, Frame, Kind, Properties, Reader, Value, Version, packet, property as p, put_binary, put_two,
};
use bytes::Bytes;

/// A packet from a client.
#[derive(Clone, Debug)]
pub enum Packet {
    /// First packet of a connection.
    Connect(Box<Connect>),
    /// An application message.
    Publish(Publish),
    /// PUBACK, PUBREC, PUBREL or PUBCOMP.
    Ack(Ack),
    /// Packet id and requested filters.
    Subscribe(u16, Vec<Request>),
    /// Packet id and filters.
    Unsubscribe(u16, Vec<String>),
    /// Keep-alive.
    Pingreq,
    /// Last packet of a connection: reason code and, if given, a new Session Expiry Interval in seconds.
    Disconnect(u8, Option<u32>),
}

/// CONNECT (clause 3.1).
#[derive(Clone, Debug)]
pub struct Connect {
    /// Protocol version.
    pub version: Version,
    /// Client Identifier, may be empty.
    pub client_id: String,
    /// Clean Session (3.1.1) or Clean Start (5.0).
    pub clean: bool,
    /// Keep Alive in seconds, 0 for none.
    pub keep_alive: u16,
    /// Will Message.
    pub will: Option<Will>,
    /// User Name.
    pub username: Option<String>,
    /// Password.
    pub password: Option<Vec<u8>>,
    /// Properties; empty on 3.1.1.
    pub properties: Properties,
}

/// Will Message of a CONNECT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Will {
    /// Will Topic.
    pub topic: String,
    /// Will Payload.
    pub payload: Bytes,
    /// Will QoS.
    pub qos: u8,
    /// Will Retain.
    pub retain: bool,
    /// Will Delay Interval in seconds.
    pub delay_s: u32,
    /// Properties that travel with the message.
    pub properties: Properties,
}

/// PUBLISH in either direction (clause 3.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Publish {
    /// DUP flag.
    pub dup: bool,
    /// QoS level, 0 to 2.
    pub qos: u8,
    /// RETAIN flag.
    pub retain: bool,
    /// Topic Name; empty only with a Topic Alias.
    pub topic: String,
    /// Packet Identifier; 0 at QoS 0.
    pub id: u16,
    /// Application message.
    pub payload: Bytes,
    /// Properties; empty on 3.1.1.
    pub properties: Properties,
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP (clauses 3.4 to 3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Which of the four.
    pub kind: Kind,
    /// Packet Identifier.
    pub id: u16,
    /// Reason code; 0 on 3.1.1.
    pub reason: u8,
}

/// One Topic Filter of a SUBSCRIBE with its options (5.0 clause 3.8.3.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Topic Filter.
    pub filter: String,
    /// Requested maximum QoS.
    pub qos: u8,
    /// Not to be sent to the connection that published.
    pub no_local: bool,
    /// RETAIN flag is forwarded as it came.
    pub retain_as_published: bool,
    /// 0 send retained messages, 1 only for a new subscription, 2 never.
    pub retain_handling: u8,
}

/// Decodes one packet; `version` is `None` until CONNECT told it.
pub fn decode(frame: &Frame, version: Option<Version>) -> Result<Packet, Fault> {
    let kind =
        Kind::of(frame.first).ok_or_else(|| Fault::malformed("packet type 0 is reserved (clause 2.1.2)"))?;
    let flags = frame.first & 0x0f;
    let Some(version) = version else {
        if kind != Kind::Connect {
            return Err(Fault::protocol(format!("{kind:?} as the first packet (MQTT-3.1.0-1)")));
        }
        expect_flags(kind, flags, 0)?;
        return connect(&frame.body).map(|connect| Packet::Connect(Box::new(connect)));
    };
    let mut reader = Reader::new(&frame.body);
    let expected = if matches!(kind, Kind::Pubrel | Kind::Subscribe | Kind::Unsubscribe) { 2 } else { 0 };
    if kind != Kind::Publish {
        expect_flags(kind, flags, expected)?;
    }
    match kind {
        Kind::Connect => Err(Fault::protocol("a second CONNECT on one connection (MQTT-3.1.0-2)")),
        Kind::Publish => publish(flags, &mut reader, version).map(Packet::Publish),
        Kind::Puback | Kind::Pubrec | Kind::Pubrel | Kind::Pubcomp => {
            ack(kind, &mut reader, version).map(Packet::Ack)
        }
        Kind::Subscribe => subscribe(&mut reader, version),
        Kind::Unsubscribe => unsubscribe(&mut reader, version),
        Kind::Pingreq => reader.finish("PINGREQ").map(|()| Packet::Pingreq),
        Kind::Disconnect => disconnect(&mut reader, version),
        Kind::Auth => {
            Err(Fault::protocol("AUTH without an Authentication Method in CONNECT (MQTT-4.12.0-6)"))
        }
        Kind::Connack | Kind::Suback | Kind::Unsuback | Kind::Pingresp => {
            Err(Fault::protocol(format!("{kind:?} from a client; only a server sends it (clause 2.1.2)")))
        }
    }
}

fn expect_flags(kind: Kind, flags: u8, expected: u8) -> Result<(), Fault> {
    if flags == expected {
        return Ok(());
    }
    Err(Fault::malformed(format!(
        "{kind:?} with fixed header flags {flags:#06b}, reserved as {expected:#06b}"
    )))
}

fn packet_id(reader: &mut Reader<'_>, kind: Kind) -> Result<u16, Fault> {
    match reader.two()? {
        0 => Err(Fault::protocol(format!(
            "{kind:?} with Packet Identifier 0 (MQTT-2.2.1-3; 3.1.1 MQTT-2.3.1-1)"
        ))),
        id => Ok(id),
    }
}

fn properties(reader: &mut Reader<'_>, version: Version, allowed: &[u8]) -> Result<Properties, Fault> {
    match version {
        Version::V311 => Ok(Properties::default()),
        Version::V5 => Properties::read(reader, allowed),
    }
}

/// Properties a PUBLISH or Will hands on to subscribers (5.0 clause 3.3.2.3).
pub const MESSAGE_PROPERTIES: [u8; 6] = [
    p::PAYLOAD_FORMAT,
    p::MESSAGE_EXPIRY,
    p::CONTENT_TYPE,
    p::RESPONSE_TOPIC,
    p::CORRELATION_DATA,
    p::USER_PROPERTY,
];

const CONNECT_PROPERTIES: [u8; 9] = [
    p::SESSION_EXPIRY,
    p::RECEIVE_MAXIMUM,
    p::MAXIMUM_PACKET_SIZE,
    p::TOPIC_ALIAS_MAXIMUM,
    p::REQUEST_RESPONSE,
    p::REQUEST_PROBLEM,
    p::USER_PROPERTY,
    p::AUTHENTICATION_METHOD,
    p::AUTHENTICATION_DATA,
];

fn connect(body: &[u8]) -> Result<Connect, Fault> {
    let mut reader = Reader::new(body);
    if reader.text()? != "MQTT" {
        return Err(Fault::new(0x84, "the protocol name is not MQTT (MQTT-3.1.2-1)"));
    }
    let version = match reader.byte()? {
        4 => Version::V311,
        5 => Version::V5,
        level => {
            return Err(Fault::new(0x84, format!("protocol level {level} is not 4 or 5 (MQTT-3.1.2-2)")));
        }
    };
    let flags = reader.byte()?;
    if flags & 1 != 0 {
        return Err(Fault::malformed("the reserved Connect Flag is set (MQTT-3.1.2-3)"));
    }
    let keep_alive = reader.two()?;
    let properties = properties(&mut reader, version, &CONNECT_PROPERTIES)?;
    let client_id = reader.text()?.to_owned();
    let will = will(&mut reader, version, flags)?;
    let username = if flags & 0x80 != 0 { Some(reader.text()?.to_owned()) } else { None };
    if version == Version::V311 && flags & 0xc0 == 0x40 {
        return Err(Fault::malformed("a password without a user name (3.1.1 MQTT-3.1.2-22)"));
    }
    let password = if flags & 0x40 != 0 { Some(reader.binary()?.to_vec()) } else { None };
    reader.finish("CONNECT")?;
    Ok(Connect {
        version,
        client_id,
        clean: flags & 2 != 0,
        keep_alive,
        will,
        username,
        password,
        properties,
    })
}

fn will(reader: &mut Reader<'_>, version: Version, flags: u8) -> Result<Option<Will>, Fault> {
    let (qos, retain) = ((flags >> 3) & 3, flags & 0x20 != 0);
    if flags & 4 == 0 {
        if qos != 0 || retain {
            return Err(Fault::malformed("Will QoS or Will Retain without Will Flag (MQTT-3.1.2-11, -13)"));
        }
        return Ok(None);
    }
    if qos == 3 {
        return Err(Fault::malformed("Will QoS 3 (MQTT-3.1.2-12; 3.1.1 MQTT-3.1.2-14)"));
    }
    let mut allowed = MESSAGE_PROPERTIES.to_vec();
    allowed.push(p::WILL_DELAY);
    let mut properties = properties(reader, version, &allowed)?;
    let delay_s = properties.number(p::WILL_DELAY).unwrap_or(0);
    properties.keep(&MESSAGE_PROPERTIES);
    let topic = reader.text()?.to_owned();
    if !topic::valid_name(&topic) {
        return Err(Fault::new(
            0x90,
            format!("Will Topic {topic:?} is empty or has a wildcard (MQTT-3.3.2-2)"),
        ));
    }
    let payload = Bytes::copy_from_slice(reader.binary()?);
    Ok(Some(Will { topic, payload, qos, retain, delay_s, properties }))
}

fn publish(flags: u8, reader: &mut Reader<'_>, version: Version) -> Result<Publish, Fault> {
    let (dup, qos, retain) = (flags & 8 != 0, (flags >> 1) & 3, flags & 1 != 0);
    if qos == 3 {
        return Err(Fault::malformed("PUBLISH with QoS 3 (MQTT-3.3.1-4)"));
    }
    if dup && qos == 0 {
        return Err(Fault::malformed("PUBLISH with DUP at QoS 0 (MQTT-3.3.1-2)"));
    }
    let topic = reader.text()?.to_owned();
    let id = if qos > 0 { packet_id(reader, Kind::Publish)? } else { 0 };
    let mut allowed = MESSAGE_PROPERTIES.to_vec();
    allowed.push(p::TOPIC_ALIAS);
    let properties = properties(reader, version, &allowed)?;
    let by_alias = topic.is_empty() && properties.number(p::TOPIC_ALIAS).is_some();
    if !by_alias && !topic::valid_name(&topic) {
        return Err(Fault::new(
            0x90,
            format!("PUBLISH topic {topic:?} is empty or has a wildcard (MQTT-3.3.2-2)"),
        ));
    }
    let payload = Bytes::copy_from_slice(reader.take(reader.left())?);
    Ok(Publish { dup, qos, retain, topic, id, payload, properties })
}

fn ack(kind: Kind, reader: &mut Reader<'_>, version: Version) -> Result<Ack, Fault> {
    let id = packet_id(reader, kind)?;
    let mut reason = 0;
    if version == Version::V5 && reader.left() > 0 {
        reason = reader.byte()?;
        if reader.left() > 0 {
            Properties::read(reader, &[p::REASON_STRING, p::USER_PROPERTY])?;
        }
    }
    reader.finish("an acknowledgement")?;
    let known: &[u8] = match kind {
        Kind::Pubrel | Kind::Pubcomp => &[0x00, 0x92],
        _ => &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99],
    };
    if !known.contains(&reason) {
        return Err(Fault::protocol(format!(
            "{kind:?} with reason code {reason:#04x}, which it does not have"
        )));
    }
    Ok(Ack { kind, id, reason })
}

fn subscribe(reader: &mut Reader<'_>, version: Version) -> Result<Packet, Fault> {
    let id = packet_id(reader, Kind::Subscribe)?;
    let given = properties(reader, version, &[p::SUBSCRIPTION_ID, p::USER_PROPERTY])?;
    if given.get(p::SUBSCRIPTION_ID).is_some() {
        return Err(Fault::new(0xa1, "a Subscription Identifier, which CONNACK said is not available"));
    }
    let mut requests = Vec::new();
    while reader.left() > 0 {
        let filter = filter(reader)?;
        let options = reader.byte()?;
        let reserved = if version == Version::V5 { 0xc0 } else { 0xfc };
        if options & reserved != 0 || options & 3 == 3 || options & 0x30 == 0x30 {
            return Err(Fault::malformed(format!("subscription options {options:#010b} (MQTT-3.8.3-5)")));
        }
        requests.push(Request {
            filter,
            qos: options & 3,
            no_local: options & 4 != 0,
            retain_as_published: options & 8 != 0,
            retain_handling: (options >> 4) & 3,
        });
    }
    if requests.is_empty() {
        return Err(Fault::protocol("SUBSCRIBE without a Topic Filter (MQTT-3.8.3-2; 3.1.1 MQTT-3.8.3-3)"));
    }
    Ok(Packet::Subscribe(id, requests))
}

fn unsubscribe(reader: &mut Reader<'_>, version: Version) -> Result<Packet, Fault> {
    let id = packet_id(reader, Kind::Unsubscribe)?;
    properties(reader, version, &[p::USER_PROPERTY])?;
    let mut filters = Vec::new();
    while reader.left() > 0 {
        filters.push(filter(reader)?);
    }
    if filters.is_empty() {
        return Err(Fault::protocol("UNSUBSCRIBE without a Topic Filter (MQTT-3.10.3-2)"));
    }
    Ok(Packet::Unsubscribe(id, filters))
}

fn filter(reader: &mut Reader<'_>) -> Result<String, Fault> {
    let filter = reader.text()?;
    if topic::valid_filter(filter) {
        return Ok(filter.to_owned());
    }
    Err(Fault::new(0x8f, format!("Topic Filter {filter:?} is not valid (clause 4.7.1)")))
}

fn disconnect(reader: &mut Reader<'_>, version: Version) -> Result<Packet, Fault> {
    let (mut reason, mut expiry) = (0, None);
    if version == Version::V5 && reader.left() > 0 {
        reason = reader.byte()?;
        if reader.left() > 0 {
            let allowed = [p::SESSION_EXPIRY, p::REASON_STRING, p::USER_PROPERTY];
            expiry = Properties::read(reader, &allowed)?.number(p::SESSION_EXPIRY);
        }
    }
    reader.finish("DISCONNECT")?;
    // 5.0 table 3-13: the codes marked as a client's.
    let client = [0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99];
    if !client.contains(&reason) {
        return Err(Fault::protocol(format!(
            "DISCONNECT with reason code {reason:#04x}, which is not a client's"
        )));
    }
    Ok(Packet::Disconnect(reason, expiry))
}

/// CONNACK; `code` is written as given, so that a test may send one that does not exist.
pub fn connack(version: Version, session_present: bool, code: u8, properties: &Properties) -> Vec<u8> {
    let mut body = vec![u8::from(session_present), code];
    if version == Version::V5 {
        properties.write(&mut body);
    }
    packet((Kind::Connack as u8) << 4, &body)
}

/// PUBLISH to a client.
pub fn encode_publish(version: Version, publish: &Publish) -> Vec<u8> {
    let mut body = Vec::with_capacity(publish.topic.len() + publish.payload.len() + 8);
    put_binary(&mut body, publish.topic.as_bytes());
    if publish.qos > 0 {
        put_two(&mut body, publish.id);
    }
    if version == Version::V5 {
        publish.properties.write(&mut body);
    }
    body.extend_from_slice(&publish.payload);
    let flags = u8::from(publish.dup) << 3 | publish.qos << 1 | u8::from(publish.retain);
    packet((Kind::Publish as u8) << 4 | flags, &body)
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP. On 5.0 reason 0 is left out, as clause 3.4.2.1 allows.
pub fn encode_ack(version: Version, ack: Ack) -> Vec<u8> {
    let flags = if ack.kind == Kind::Pubrel { 2 } else { 0 };
    let [high, low] = ack.id.to_be_bytes();
    let first = (ack.kind as u8) << 4 | flags;
    match version {
        Version::V5 if ack.reason != 0 => vec![first, 3, high, low, ack.reason],
        Version::V5 | Version::V311 => vec![first, 2, high, low],
    }
}

/// SUBACK, or UNSUBACK, which on 3.1.1 has no codes.
pub fn encode_codes(version: Version, kind: Kind, id: u16, codes: &[u8]) -> Vec<u8> {
    let mut body = id.to_be_bytes().to_vec();
    if version == Version::V5 {
        Properties::default().write(&mut body);
    }
    if version == Version::V5 || kind == Kind::Suback {
        body.extend_from_slice(codes);
    }
    packet((kind as u8) << 4, &body)
}

/// PINGRESP.
pub fn pingresp() -> Vec<u8> {
    vec![(Kind::Pingresp as u8) << 4, 0]
}

/// DISCONNECT; only 5.0 lets a server send it.
pub fn encode_disconnect(reason: u8) -> Vec<u8> {
    vec![(Kind::Disconnect as u8) << 4, 1, reason]
}

/// The message expiry property, rewritten with what is left of it (MQTT-3.3.2-6).
pub fn set_expiry(properties: &mut Properties, seconds: u32) {
    properties.set(p::MESSAGE_EXPIRY, Value::Four(seconds));
}
