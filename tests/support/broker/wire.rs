//! MQTT's data representation (3.1.1 clauses 1.5 and 2.2, 5.0 clauses 1.5 and 2): integers, strings, the
//! variable byte integer, properties, and the split of a byte stream into packets.
//!
//! Invariant: no input panics and no declared length makes this file allocate before the bytes are there.

use bytes::{Buf, Bytes, BytesMut};

/// Protocol version a CONNECT asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1, protocol level 4.
    V311,
    /// MQTT 5.0, protocol version 5.
    V5,
}

/// Control packet types with their numbers on the wire (5.0 table 2-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    Connect = 1,
    Connack = 2,
    Publish = 3,
    Puback = 4,
    Pubrec = 5,
    Pubrel = 6,
    Pubcomp = 7,
    Subscribe = 8,
    Suback = 9,
    Unsubscribe = 10,
    Unsuback = 11,
    Pingreq = 12,
    Pingresp = 13,
    Disconnect = 14,
    Auth = 15,
}

impl Kind {
    /// The type in the upper four bits of a packet's first byte; `None` for the forbidden 0.
    pub fn of(first: u8) -> Option<Kind> {
        use Kind::*;
        const ALL: [Kind; 15] = [
            Connect,
            Connack,
            Publish,
            Puback,
            Pubrec,
            Pubrel,
            Pubcomp,
            Subscribe,
            Suback,
            Unsubscribe,
            Unsuback,
            Pingreq,
            Pingresp,
            Disconnect,
            Auth,
        ];
        ALL.get(usize::from(first >> 4).checked_sub(1)?).copied()
    }
}

/// What a client did wrong: the 5.0 reason code that names it, and a sentence for the test's reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Reason code for DISCONNECT or CONNACK (5.0 clause 4.13).
    pub reason: u8,
    /// What was seen and which clause forbids it.
    pub text: String,
    /// The limit that was broken, where no clause but the broker's owner forbids it.
    pub unsaid: Option<&'static str>,
}

impl Fault {
    /// Any reason code.
    pub fn new(reason: u8, text: impl Into<String>) -> Fault {
        Fault { reason, text: text.into(), unsaid: None }
    }

    /// A limit of `script::Unsaid`: the connection is closed without a word.
    pub fn unsaid(limit: &'static str) -> Fault {
        Fault { unsaid: Some(limit), ..Fault::new(0x80, limit) }
    }

    /// 0x81 Malformed Packet.
    pub fn malformed(text: impl Into<String>) -> Fault {
        Fault::new(0x81, text)
    }

    /// 0x82 Protocol Error.
    pub fn protocol(text: impl Into<String>) -> Fault {
        Fault::new(0x82, text)
    }
}

/// Reads one packet's body from front to back.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// Number of bytes not read yet.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        if count > self.rest.len() {
            return Err(Fault::malformed(format!(
                "a field of {count} bytes runs past the packet's end, {} bytes are left",
                self.rest.len()
            )));
        }
        let (taken, rest) = self.rest.split_at(count);
        self.rest = rest;
        Ok(taken)
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    /// Two Byte Integer, big-endian.
    pub fn two(&mut self) -> Result<u16, Fault> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    /// Four Byte Integer, big-endian.
    pub fn four(&mut self) -> Result<u32, Fault> {
        self.take(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    /// Variable Byte Integer, in the fewest bytes possible (MQTT-1.5.5-1).
    pub fn variable(&mut self) -> Result<u32, Fault> {
        match variable(self.rest)? {
            Some(read) if read.longer_than_needed => {
                Err(Fault::malformed("a Variable Byte Integer uses more bytes than needed (MQTT-1.5.5-1)"))
            }
            Some(read) => {
                self.rest = &self.rest[read.used..];
                Ok(read.value)
            }
            None => Err(Fault::malformed("a Variable Byte Integer runs past the packet's end")),
        }
    }

    /// Binary Data: two length bytes and as many bytes.
    pub fn binary(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.two()?;
        self.take(usize::from(length))
    }

    /// UTF-8 Encoded String, without U+0000 (MQTT-1.5.4-1, MQTT-1.5.4-2).
    pub fn text(&mut self) -> Result<&'a str, Fault> {
        let text = std::str::from_utf8(self.binary()?)
            .map_err(|_| Fault::malformed("a string is not well-formed UTF-8 (MQTT-1.5.4-1)"))?;
        if text.contains('\0') {
            return Err(Fault::malformed("a string contains U+0000 (MQTT-1.5.4-2)"));
        }
        Ok(text)
    }

    /// Fails if anything is left.
    pub fn finish(&self, what: &str) -> Result<(), Fault> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(Fault::malformed(format!("{what} has {left} bytes too many"))),
        }
    }
}

/// One variable byte integer as it stood on the wire.
struct Variable {
    value: u32,
    used: usize,
    longer_than_needed: bool,
}

/// Reads a variable byte integer; `None` while its end has not arrived.
fn variable(bytes: &[u8]) -> Result<Option<Variable>, Fault> {
    let mut value = 0_u32;
    for (at, byte) in bytes.iter().take(4).enumerate() {
        value |= u32::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Ok(Some(Variable { value, used: at + 1, longer_than_needed: at > 0 && *byte == 0 }));
        }
    }
    if bytes.len() >= 4 {
        return Err(Fault::malformed("a Variable Byte Integer has more than four bytes (5.0 clause 1.5.5)"));
    }
    Ok(None)
}

/// One packet cut out of the stream.
pub struct Frame {
    /// Type and flags.
    pub first: u8,
    /// Everything after the fixed header.
    pub body: Bytes,
}

/// Takes the next whole packet from `buffer`. Refuses it with 0x95 as soon as its fixed header announces more
/// than `limit` bytes in all, and so never waits for a giant.
pub fn next_frame(
    buffer: &mut BytesMut,
    limit: usize,
    version: Option<Version>,
) -> Result<Option<Frame>, Fault> {
    let Some(&first) = buffer.first() else { return Ok(None) };
    let Some(length) = variable(&buffer[1..])? else { return Ok(None) };
    if length.longer_than_needed && version == Some(Version::V5) {
        return Err(Fault::malformed("Remaining Length uses more bytes than needed (MQTT-1.5.5-1)"));
    }
    let header = 1 + length.used;
    let whole = header + length.value as usize;
    if whole > limit {
        return Err(Fault::new(0x95, format!("a packet of {whole} bytes, Maximum Packet Size is {limit}")));
    }
    if buffer.len() < whole {
        return Ok(None);
    }
    buffer.advance(header);
    Ok(Some(Frame { first, body: buffer.split_to(length.value as usize).freeze() }))
}

/// Appends a variable byte integer; values above 268,435,455 cannot be written and are a bug of the caller.
pub fn put_variable(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a two byte integer.
pub fn put_two(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

/// Appends Binary Data or a string; what is longer than 65,535 bytes is cut there.
pub fn put_binary(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
    put_two(out, length);
    out.extend_from_slice(&bytes[..usize::from(length)]);
}

/// Puts the fixed header before a body.
pub fn packet(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(first);
    put_variable(&mut out, body.len());
    out.extend_from_slice(body);
    out
}

/// Property identifiers (5.0 table 2-4).
pub mod property {
    pub const PAYLOAD_FORMAT: u8 = 0x01;
    pub const MESSAGE_EXPIRY: u8 = 0x02;
    pub const CONTENT_TYPE: u8 = 0x03;
    pub const RESPONSE_TOPIC: u8 = 0x08;
    pub const CORRELATION_DATA: u8 = 0x09;
    pub const SUBSCRIPTION_ID: u8 = 0x0b;
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const AUTHENTICATION_METHOD: u8 = 0x15;
    pub const AUTHENTICATION_DATA: u8 = 0x16;
    pub const REQUEST_PROBLEM: u8 = 0x17;
    pub const WILL_DELAY: u8 = 0x18;
    pub const REQUEST_RESPONSE: u8 = 0x19;
    pub const REASON_STRING: u8 = 0x1f;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const MAXIMUM_QOS: u8 = 0x24;
    pub const RETAIN_AVAILABLE: u8 = 0x25;
    pub const USER_PROPERTY: u8 = 0x26;
    pub const MAXIMUM_PACKET_SIZE: u8 = 0x27;
    pub const SUBSCRIPTION_ID_AVAILABLE: u8 = 0x29;
    pub const SHARED_SUBSCRIPTION_AVAILABLE: u8 = 0x2a;
}

/// A property's value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Byte(u8),
    Two(u16),
    Four(u32),
    Variable(u32),
    Text(String),
    Binary(Vec<u8>),
    Pair(String, String),
}

/// The properties of one packet, in the order they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties(Vec<(u8, Value)>);

impl Properties {
    /// Reads length and properties; `allowed` are the identifiers this packet may carry.
    pub fn read(reader: &mut Reader<'_>, allowed: &[u8]) -> Result<Properties, Fault> {
        let length = reader.variable()? as usize;
        let mut inner = Reader::new(reader.take(length)?);
        let mut found = Properties::default();
        while inner.left() > 0 {
            let id = u8::try_from(inner.variable()?).unwrap_or(0);
            let value = read_value(&mut inner, id)?;
            if !allowed.contains(&id) {
                return Err(Fault::protocol(format!(
                    "property {id:#04x} is not for this packet (5.0 table 2-4)"
                )));
            }
            if id != property::USER_PROPERTY && found.get(id).is_some() {
                return Err(Fault::protocol(format!(
                    "property {id:#04x} is given twice (5.0 clause 2.2.2.2)"
                )));
            }
            check_value(id, &value)?;
            found.0.push((id, value));
        }
        Ok(found)
    }

    /// The first property with this identifier.
    pub fn get(&self, id: u8) -> Option<&Value> {
        self.0.iter().find(|(has, _)| *has == id).map(|(_, value)| value)
    }

    /// A property of any integer type.
    pub fn number(&self, id: u8) -> Option<u32> {
        match self.get(id)? {
            Value::Byte(n) => Some(u32::from(*n)),
            Value::Two(n) => Some(u32::from(*n)),
            Value::Four(n) | Value::Variable(n) => Some(*n),
            Value::Text(_) | Value::Binary(_) | Value::Pair(..) => None,
        }
    }

    /// Adds one, replacing an earlier one with the same identifier.
    pub fn set(&mut self, id: u8, value: Value) {
        self.0.retain(|(has, _)| *has != id);
        self.0.push((id, value));
    }

    /// Keeps only these identifiers.
    pub fn keep(&mut self, ids: &[u8]) {
        self.0.retain(|(has, _)| ids.contains(has));
    }

    /// Appends length and properties.
    pub fn write(&self, out: &mut Vec<u8>) {
        if self.0.is_empty() {
            return out.push(0);
        }
        let mut inner = Vec::new();
        for (id, value) in &self.0 {
            inner.push(*id);
            match value {
                Value::Byte(n) => inner.push(*n),
                Value::Two(n) => put_two(&mut inner, *n),
                Value::Four(n) => inner.extend_from_slice(&n.to_be_bytes()),
                Value::Variable(n) => put_variable(&mut inner, *n as usize),
                Value::Text(text) => put_binary(&mut inner, text.as_bytes()),
                Value::Binary(bytes) => put_binary(&mut inner, bytes),
                Value::Pair(name, text) => {
                    put_binary(&mut inner, name.as_bytes());
                    put_binary(&mut inner, text.as_bytes());
                }
            }
        }
        put_variable(out, inner.len());
        out.extend_from_slice(&inner);
    }
}

/// The value's type follows from the identifier (5.0 table 2-4).
fn read_value(reader: &mut Reader<'_>, id: u8) -> Result<Value, Fault> {
    Ok(match id {
        0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2a => Value::Byte(reader.byte()?),
        0x13 | 0x21 | 0x22 | 0x23 => Value::Two(reader.two()?),
        0x02 | 0x11 | 0x18 | 0x27 => Value::Four(reader.four()?),
        0x0b => Value::Variable(reader.variable()?),
        0x03 | 0x08 | 0x12 | 0x15 | 0x1a | 0x1c | 0x1f => Value::Text(reader.text()?.to_owned()),
        0x09 | 0x16 => Value::Binary(reader.binary()?.to_vec()),
        0x26 => Value::Pair(reader.text()?.to_owned(), reader.text()?.to_owned()),
        _ => return Err(Fault::malformed("an unknown property identifier (5.0 table 2-4)")),
    })
}

/// Values the clauses of each property forbid.
fn check_value(id: u8, value: &Value) -> Result<(), Fault> {
    let forbidden = match (id, value) {
        (
            property::PAYLOAD_FORMAT | property::REQUEST_PROBLEM | property::REQUEST_RESPONSE,
            Value::Byte(n),
        ) => *n > 1,
        (property::RECEIVE_MAXIMUM, Value::Two(n)) => *n == 0,
        (property::MAXIMUM_PACKET_SIZE, Value::Four(n)) => *n == 0,
        (property::SUBSCRIPTION_ID, Value::Variable(n)) => *n == 0,
        (property::RESPONSE_TOPIC, Value::Text(topic)) => topic.contains(['+', '#']),
        (property::TOPIC_ALIAS, Value::Two(0)) => {
            return Err(Fault::new(0x94, "Topic Alias 0 (MQTT-3.3.2-8)"));
        }
        _ => false,
    };
    if forbidden {
        return Err(Fault::protocol(format!("property {id:#04x} has a forbidden value, {value:?}")));
    }
    Ok(())
}
