//! The outside of MQTT packets: where one ends, which may come from a broker, and what rumqttc leaves
//! unchecked. Pure.
//!
//! Invariant: whatever length is announced, no more than one packet of the allowed size is kept, and nothing
//! reaches rumqttc that its readers do not stand.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Buf, BytesMut};

use crate::message::{PacketId, Qos, Topic, TopicError};
use crate::uplink::packet::{Packet, Protocol, ReasonCode};

/// Packet types (MQTT 5.0 section 2.1.2), as far as a broker may send them.
pub(super) mod kind {
    pub(crate) const CONNACK: u8 = 2;
    pub(crate) const PUBLISH: u8 = 3;
    pub(crate) const PUBACK: u8 = 4;
    pub(crate) const PUBREC: u8 = 5;
    pub(crate) const PUBREL: u8 = 6;
    pub(crate) const PUBCOMP: u8 = 7;
    pub(crate) const SUBACK: u8 = 9;
    pub(crate) const UNSUBACK: u8 = 11;
    pub(crate) const PINGRESP: u8 = 13;
    pub(crate) const DISCONNECT: u8 = 14;
}

/// How packet types are called, by their number.
const NAMES: [&str; 16] = [
    "packet of type 0",
    "CONNECT",
    "CONNACK",
    "PUBLISH",
    "PUBACK",
    "PUBREC",
    "PUBREL",
    "PUBCOMP",
    "SUBSCRIBE",
    "SUBACK",
    "UNSUBSCRIBE",
    "UNSUBACK",
    "PINGREQ",
    "PINGRESP",
    "DISCONNECT",
    "AUTH",
];

/// The longest piece of an oversize packet's topic that is kept.
const TOPIC_KEPT: usize = 1024;

/// Longest string and binary data MQTT can carry (MQTT 5.0 section 1.5.4).
pub(super) const FIELD_MAX: usize = u16::MAX as usize;

/// Largest Remaining Length (MQTT 5.0 section 1.5.5).
pub(super) const REMAINING_MAX: usize = 268_435_455;

/// Bytes from the broker that are no packet a broker may send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{packet}: {why}")]
pub struct Malformed {
    /// The packet's name as the standard writes it.
    pub packet: &'static str,
    /// What is wrong with it, and the clause where there is one.
    pub why: Cow<'static, str>,
}

impl Malformed {
    pub(super) fn new(kind: u8, why: impl Into<Cow<'static, str>>) -> Self {
        Malformed { packet: NAMES[usize::from(kind & 15)], why: why.into() }
    }
}

/// One whole packet; `body` is where its variable header starts.
pub(super) struct Frame {
    pub(super) bytes: BytesMut,
    pub(super) body: usize,
}

impl Frame {
    pub(super) fn kind(&self) -> u8 {
        self.bytes[0] >> 4
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.bytes[self.body..]
    }

    pub(super) fn malformed(&self, why: impl Into<Cow<'static, str>>) -> Malformed {
        Malformed::new(self.kind(), why)
    }
}

/// What stands at the front of the received bytes.
pub(super) enum Piece {
    /// A packet to decode.
    Frame(Frame),
    /// A PUBLISH that was skipped: [`Packet::Oversize`].
    Skipped(Packet),
}

/// What a frame turned out to be.
pub(super) enum Decoded {
    /// A packet for the session.
    Packet(Packet),
    /// A PUBLISH to a topic that starts with `$`: legal, but nothing we asked for, and no [`Topic`].
    BrokerOwned { topic: String, qos: Qos, id: Option<PacketId> },
}

/// Received bytes on their way to becoming packets.
pub(super) struct Incoming {
    protocol: Protocol,
    max_packet: usize,
    /// Bytes not yet taken. Whoever reads the socket appends here.
    pub(super) buffer: BytesMut,
    skipping: Option<Skipping>,
}

impl Incoming {
    pub(super) fn new(protocol: Protocol, max_packet: usize) -> Self {
        Incoming { protocol, max_packet, buffer: BytesMut::new(), skipping: None }
    }

    /// The next packet, or `None` until more bytes have come.
    pub(super) fn next(&mut self) -> Result<Option<Piece>, Malformed> {
        if self.skipping.is_none() {
            let Some(header) = Header::read(self.protocol, &self.buffer)? else { return Ok(None) };
            if header.total() <= self.max_packet {
                return Ok(self.frame(&header));
            }
            self.skipping = Some(Skipping::start(&header, self.max_packet)?);
            self.buffer.advance(header.bytes);
        }
        match self.skipping.as_mut().map(|skipping| skipping.eat(&mut self.buffer)).transpose()?.flatten() {
            Some(packet) => {
                self.skipping = None;
                Ok(Some(Piece::Skipped(packet)))
            }
            None => Ok(None),
        }
    }

    fn frame(&mut self, header: &Header) -> Option<Piece> {
        let total = header.total();
        if self.buffer.len() < total {
            return None;
        }
        // A copy: a payload cut out of the read buffer would keep all of that buffer alive.
        let bytes = BytesMut::from(&self.buffer[..total]);
        self.buffer.advance(total);
        Some(Piece::Frame(Frame { bytes, body: header.bytes }))
    }
}

/// A fixed header (MQTT 5.0 section 2.1).
#[derive(Debug)]
struct Header {
    kind: u8,
    flags: u8,
    /// Length of the header itself, 2 to 5.
    bytes: usize,
    remaining: usize,
}

impl Header {
    /// `None` until the header is complete. Every check that the header alone allows is made here, before a
    /// byte of the body is waited for.
    fn read(protocol: Protocol, buffer: &[u8]) -> Result<Option<Header>, Malformed> {
        let Some(&first) = buffer.first() else { return Ok(None) };
        let (kind, flags) = (first >> 4, first & 15);
        check_first_byte(protocol, kind, flags)?;
        let Some((bytes, remaining)) = variable_byte_integer(&buffer[1..])
            .map_err(|()| Malformed::new(kind, "its Remaining Length is malformed (section 2.1.4)"))?
        else {
            return Ok(None);
        };
        let (least, most) = body_bounds(protocol, kind);
        if remaining < least || remaining > most {
            return Err(Malformed::new(kind, format!("it cannot have a Remaining Length of {remaining}")));
        }
        Ok(Some(Header { kind, flags, bytes: 1 + bytes, remaining }))
    }

    fn total(&self) -> usize {
        self.bytes + self.remaining
    }

    fn qos(&self) -> Qos {
        publish_qos(self.flags).unwrap_or(Qos::AtMostOnce)
    }
}

fn publish_qos(flags: u8) -> Option<Qos> {
    Qos::from_number(u64::from((flags >> 1) & 3))
}

/// Which packets a broker may send, and their flag bits (MQTT 5.0 section 2.1.3): rumqttc takes reserved
/// bits in most packets for granted.
fn check_first_byte(protocol: Protocol, kind: u8, flags: u8) -> Result<(), Malformed> {
    let known = match kind {
        kind::CONNACK..=kind::PUBCOMP | kind::SUBACK | kind::UNSUBACK | kind::PINGRESP => true,
        kind::DISCONNECT => protocol == Protocol::V5,
        // AUTH too: it belongs to enhanced authentication, which we never start (MQTT-4.12.0-6).
        _ => false,
    };
    if !known {
        return Err(Malformed::new(kind, "a broker may not send this packet"));
    }
    if kind == kind::PUBLISH {
        if publish_qos(flags).is_none() {
            return Err(Malformed::new(kind, "QoS 3 (MQTT-3.3.1-4)"));
        }
        if flags & 0b1110 == 0b1000 {
            return Err(Malformed::new(kind, "DUP set at QoS 0 (MQTT-3.3.1-2)"));
        }
        return Ok(());
    }
    let expected = if kind == kind::PUBREL { 0b0010 } else { 0 };
    if flags != expected {
        let why = format!("reserved flag bits {flags:#06b} instead of {expected:#06b} (MQTT-2.1.3-1)");
        return Err(Malformed::new(kind, why));
    }
    Ok(())
}

/// Smallest and largest Remaining Length of a packet type.
fn body_bounds(protocol: Protocol, kind: u8) -> (usize, usize) {
    let v5 = protocol == Protocol::V5;
    match kind {
        kind::PINGRESP => (0, 0),
        kind::DISCONNECT => (0, REMAINING_MAX),
        kind::PUBLISH => (2, REMAINING_MAX),
        kind::SUBACK => (if v5 { 4 } else { 3 }, REMAINING_MAX),
        kind::UNSUBACK if v5 => (4, REMAINING_MAX),
        _ => (2, if v5 { REMAINING_MAX } else { 2 }),
    }
}

/// A Variable Byte Integer (MQTT 5.0 section 1.5.5): how many bytes it has, and its value. `None` if it goes
/// on after the end, an error if it goes on after four bytes.
fn variable_byte_integer(bytes: &[u8]) -> Result<Option<(usize, usize)>, ()> {
    let mut value = 0;
    for (at, &byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some((at + 1, value)));
        }
    }
    if bytes.len() >= 4 { Err(()) } else { Ok(None) }
}

/// Writes a Variable Byte Integer.
fn put_variable_byte_integer(out: &mut BytesMut, mut value: usize) {
    loop {
        let low = (value & 0x7F) as u8;
        value >>= 7;
        out.extend_from_slice(&[if value == 0 { low } else { low | 0x80 }]);
        if value == 0 {
            return;
        }
    }
}

/// A PUBLISH larger than we take, on its way past.
struct Skipping {
    bytes: u64,
    qos: Qos,
    /// What is still to come of the packet.
    left: usize,
    topic: Vec<u8>,
    topic_left: Option<usize>,
    id: Option<PacketId>,
}

impl Skipping {
    fn start(header: &Header, max_packet: usize) -> Result<Self, Malformed> {
        if header.kind != kind::PUBLISH {
            let why = format!("it has {} bytes, we take {max_packet}", header.total());
            return Err(Malformed::new(header.kind, why));
        }
        Ok(Skipping {
            bytes: header.total() as u64,
            qos: header.qos(),
            left: header.remaining,
            topic: Vec::new(),
            topic_left: None,
            id: None,
        })
    }

    /// Takes what it can from the front of `buffer`; the packet is told when its last byte has gone by.
    fn eat(&mut self, buffer: &mut BytesMut) -> Result<Option<Packet>, Malformed> {
        if self.topic_left.is_none() {
            if buffer.len() < 2 {
                return Ok(None);
            }
            let topic = self.number(buffer)?;
            let id = if self.qos == Qos::AtMostOnce { 0 } else { 2 };
            if usize::from(topic) + id > self.left {
                return Err(Malformed::new(kind::PUBLISH, "its topic is longer than the packet"));
            }
            self.topic_left = Some(usize::from(topic));
        }
        while let Some(left) = self.topic_left.filter(|&left| left > 0) {
            if buffer.is_empty() {
                return Ok(None);
            }
            let part = left.min(buffer.len());
            let kept = part.min(TOPIC_KEPT - self.topic.len());
            self.topic.extend_from_slice(&buffer[..kept]);
            self.topic_left = Some(left - part);
            self.skip(buffer, part);
        }
        if self.qos != Qos::AtMostOnce && self.id.is_none() {
            if buffer.len() < 2 {
                return Ok(None);
            }
            let id = self.number(buffer)?;
            self.id = Some(packet_id(kind::PUBLISH, id)?);
        }
        self.skip(buffer, self.left.min(buffer.len()));
        Ok((self.left == 0).then(|| self.told()))
    }

    fn number(&mut self, buffer: &mut BytesMut) -> Result<u16, Malformed> {
        if self.left < 2 {
            return Err(Malformed::new(kind::PUBLISH, "it ends before its topic"));
        }
        self.left -= 2;
        Ok(buffer.get_u16())
    }

    fn skip(&mut self, buffer: &mut BytesMut, bytes: usize) {
        buffer.advance(bytes);
        self.left -= bytes;
    }

    fn told(&mut self) -> Packet {
        Packet::Oversize {
            bytes: self.bytes,
            qos: self.qos,
            id: self.id,
            topic: String::from_utf8_lossy(&self.topic).into_owned(),
        }
    }
}

/// A Packet Identifier from the wire (MQTT-2.2.1-3: never zero).
pub(super) fn packet_id(kind: u8, id: u16) -> Result<PacketId, Malformed> {
    PacketId::new(id).ok_or_else(|| Malformed::new(kind, "Packet Identifier 0 (section 2.2.1)"))
}

/// An inbound topic name; `None` if it starts with `$`.
pub(super) fn inbound_topic(name: &str) -> Result<Option<Topic>, Malformed> {
    match Topic::new(name) {
        Ok(topic) => Ok(Some(topic)),
        Err(TopicError::Dollar) => Ok(None),
        // We never announce a Topic Alias Maximum, so an empty topic cannot be an alias (MQTT-3.1.2-26).
        Err(wrong) => Err(Malformed::new(kind::PUBLISH, format!("{wrong} (MQTT-3.3.2-1, MQTT-3.3.2-2)"))),
    }
}

/// A CONNACK return code of MQTT 3.1.1 (section 3.2.2.3) as the reason code of 5.0 that means the same.
pub(super) fn return_code(code: u8) -> Option<ReasonCode> {
    match code {
        0 => Some(ReasonCode(0x00)),
        1 => Some(ReasonCode(0x84)),
        2 => Some(ReasonCode(0x85)),
        3 => Some(ReasonCode(0x88)),
        4 => Some(ReasonCode(0x86)),
        5 => Some(ReasonCode(0x87)),
        _ => None,
    }
}

/// The properties of an MQTT 5.0 packet, walked but not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Properties {
    /// Where the Property Length starts.
    start: usize,
    /// Where the first property starts.
    first: usize,
    /// Where the last property ends.
    pub(super) end: usize,
    /// Whether there is a Topic Alias.
    pub(super) topic_alias: bool,
    /// Where Subscription Identifiers stand, each with its own identifier byte.
    subscription_identifiers: Vec<Range<usize>>,
}

impl Properties {
    /// Walks the properties that start at `start`: each one whole, none twice (MQTT 5.0 section 2.2.2.2), the
    /// last one ending where the Property Length says. rumqttc checks neither: a property that crosses the end
    /// eats the payload. Which property belongs in which packet is left to rumqttc, which does check it.
    pub(super) fn walk(body: &[u8], start: usize) -> Result<Self, &'static str> {
        let rest = body.get(start..).unwrap_or_default();
        let Ok(Some((bytes, length))) = variable_byte_integer(rest) else {
            return Err("its Property Length is malformed (section 2.2.2.1)");
        };
        let first = start + bytes;
        let end = first + length;
        if end > body.len() {
            return Err("its properties are longer than the packet");
        }
        let mut found =
            Properties { start, first, end, topic_alias: false, subscription_identifiers: Vec::new() };
        let (mut at, mut seen) = (first, 0u64);
        while at < end {
            let property = body[at];
            let next = at + 1 + property_length(property, &body[at + 1..end])?;
            match property {
                SUBSCRIPTION_IDENTIFIER => found.subscription_identifiers.push(at..next),
                USER_PROPERTY => {}
                _ if seen & (1 << property) != 0 => return Err("it has a property twice (section 2.2.2.2)"),
                _ => seen |= 1 << property,
            }
            found.topic_alias |= property == TOPIC_ALIAS;
            at = next;
        }
        Ok(found)
    }
}

const SUBSCRIPTION_IDENTIFIER: u8 = 11;
const TOPIC_ALIAS: u8 = 35;
const USER_PROPERTY: u8 = 38;

/// The length of a property's value (MQTT 5.0 section 2.2.2.2, table 2-4), which starts at `value`. Known
/// identifiers are below 64.
fn property_length(property: u8, value: &[u8]) -> Result<usize, &'static str> {
    const CROSSES: &str = "a property crosses the end of the properties";
    let field = |at: usize| match value.get(at..at + 2) {
        Some(length) => Ok(2 + usize::from(u16::from_be_bytes([length[0], length[1]]))),
        None => Err(CROSSES),
    };
    let length = match property {
        1 | 23 | 25 | 36 | 37 | 40 | 41 | 42 => 1,
        19 | 33 | 34 | TOPIC_ALIAS => 2,
        2 | 17 | 24 | 39 => 4,
        3 | 8 | 9 | 18 | 21 | 22 | 26 | 28 | 31 => field(0)?,
        SUBSCRIPTION_IDENTIFIER => match variable_byte_integer(value) {
            Ok(Some((bytes, 1..))) => bytes,
            _ => return Err("its Subscription Identifier is malformed (section 3.3.2.3.8)"),
        },
        USER_PROPERTY => {
            let key = field(0)?;
            key + field(key)?
        }
        _ => return Err("it has a property of unknown type (section 2.2.2.2)"),
    };
    if length > value.len() { Err(CROSSES) } else { Ok(length) }
}

/// The same frame without Subscription Identifiers. rumqttc 0.25.1 counts each one byte too long and then
/// takes the last properties for payload. We ask for none, but a session left by another program may.
pub(super) fn without_subscription_identifiers(frame: Frame, properties: &Properties) -> Frame {
    if properties.subscription_identifiers.is_empty() {
        return frame;
    }
    let body = frame.body();
    let mut kept = BytesMut::new();
    let mut from = properties.first;
    for identifier in &properties.subscription_identifiers {
        kept.extend_from_slice(&body[from..identifier.start]);
        from = identifier.end;
    }
    kept.extend_from_slice(&body[from..properties.end]);
    let mut middle = BytesMut::new();
    put_variable_byte_integer(&mut middle, kept.len());
    let parts = [&body[..properties.start], &middle, &kept, &body[properties.end..]];
    let mut bytes = BytesMut::from(&frame.bytes[..1]);
    put_variable_byte_integer(&mut bytes, parts.iter().map(|part| part.len()).sum());
    let start = bytes.len();
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    Frame { bytes, body: start }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variable_byte_integers_are_read_as_the_standard_writes_them() {
        type Integer = Result<Option<(usize, usize)>, ()>;
        let table: [(&[u8], Integer); 10] = [
            (&[], Ok(None)),
            (&[0x80], Ok(None)),
            (&[0x80, 0x80, 0x80], Ok(None)),
            (&[0x00], Ok(Some((1, 0)))),
            (&[0x7F, 0xFF], Ok(Some((1, 127)))),
            (&[0x80, 0x01], Ok(Some((2, 128)))),
            (&[0xFF, 0x7F], Ok(Some((2, 16_383)))),
            (&[0xFF, 0xFF, 0xFF, 0x7F], Ok(Some((4, REMAINING_MAX)))),
            (&[0xFF, 0xFF, 0xFF, 0x80], Err(())),
            (&[0x80, 0x80, 0x80, 0x80, 0x00], Err(())),
        ];
        for (bytes, expected) in table {
            assert_eq!(variable_byte_integer(bytes), expected, "{bytes:02x?}");
        }
        for value in [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, REMAINING_MAX] {
            let mut out = BytesMut::new();
            put_variable_byte_integer(&mut out, value);
            assert_eq!(variable_byte_integer(&out), Ok(Some((out.len(), value))));
        }
    }

    #[test]
    fn properties_are_whole_once_each_and_end_where_they_say() {
        let table: [(&[u8], Result<usize, &str>); 12] = [
            (&[], Err("its Property Length is malformed (section 2.2.2.1)")),
            (&[0x80], Err("its Property Length is malformed (section 2.2.2.1)")),
            (&[0x00, 0xAA], Ok(1)),
            (&[0x01], Err("its properties are longer than the packet")),
            (&[0x03, 33, 0, 1], Ok(4)),
            (&[0x02, 33, 0, 1], Err("a property crosses the end of the properties")),
            (&[0x03, 31, 0, 5], Err("a property crosses the end of the properties")),
            (&[0x04, 37, 1, 37, 1], Err("it has a property twice (section 2.2.2.2)")),
            (&[0x0E, 38, 0, 1, b'k', 0, 1, b'v', 38, 0, 1, b'k', 0, 1, b'v'], Ok(15)),
            (&[0x02, 11, 0], Err("its Subscription Identifier is malformed (section 3.3.2.3.8)")),
            (&[0x02, 99, 0], Err("it has a property of unknown type (section 2.2.2.2)")),
            (&[0x04, 11, 1, 11, 2], Ok(5)),
        ];
        for (bytes, expected) in table {
            assert_eq!(Properties::walk(bytes, 0).map(|found| found.end), expected, "{bytes:02x?}");
        }
    }
}
