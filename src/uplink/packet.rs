//! MQTT control packets in one form for 3.1.1 and 5.0: what the session thinks in.
//!
//! Pure data. Translation to and from rumqttc's types is in `link`, and nowhere else.

use bytes::Bytes;

use crate::message::{PacketId, Qos, Topic};

/// Which protocol is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// MQTT 3.1.1, protocol level 4.
    V311,
    /// MQTT 5.0.
    V5,
}

impl Protocol {
    /// As settings and screens name it.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::V311 => "3.1.1",
            Protocol::V5 => "5",
        }
    }
}

/// A Reason Code (MQTT 5.0 section 2.4). On 3.1.1, which has none in acknowledgements, [`ReasonCode::SUCCESS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReasonCode(pub u8);

impl ReasonCode {
    /// 0x00
    pub const SUCCESS: ReasonCode = ReasonCode(0x00);
    /// 0x10: accepted, but nobody is subscribed.
    pub const NO_MATCHING_SUBSCRIBERS: ReasonCode = ReasonCode(0x10);
    /// 0x11: UNSUBSCRIBE found no such subscription.
    pub const NO_SUBSCRIPTION_EXISTED: ReasonCode = ReasonCode(0x11);
    /// 0x80
    pub const UNSPECIFIED_ERROR: ReasonCode = ReasonCode(0x80);
    /// 0x83
    pub const IMPLEMENTATION_SPECIFIC_ERROR: ReasonCode = ReasonCode(0x83);
    /// 0x87
    pub const NOT_AUTHORIZED: ReasonCode = ReasonCode(0x87);
    /// 0x8E: another connection uses the same client identifier.
    pub const SESSION_TAKEN_OVER: ReasonCode = ReasonCode(0x8E);
    /// 0x90
    pub const TOPIC_NAME_INVALID: ReasonCode = ReasonCode(0x90);
    /// 0x91
    pub const PACKET_IDENTIFIER_IN_USE: ReasonCode = ReasonCode(0x91);
    /// 0x92
    pub const PACKET_IDENTIFIER_NOT_FOUND: ReasonCode = ReasonCode(0x92);
    /// 0x93
    pub const RECEIVE_MAXIMUM_EXCEEDED: ReasonCode = ReasonCode(0x93);
    /// 0x95
    pub const PACKET_TOO_LARGE: ReasonCode = ReasonCode(0x95);
    /// 0x97
    pub const QUOTA_EXCEEDED: ReasonCode = ReasonCode(0x97);
    /// 0x99
    pub const PAYLOAD_FORMAT_INVALID: ReasonCode = ReasonCode(0x99);

    /// Its name in the standard (MQTT 5.0 section 2.4).
    pub fn name(self) -> &'static str {
        match self.0 {
            0x00 => "Success",
            0x04 => "Disconnect with Will Message",
            0x10 => "No matching subscribers",
            0x11 => "No subscription existed",
            0x80 => "Unspecified error",
            0x81 => "Malformed Packet",
            0x82 => "Protocol Error",
            0x83 => "Implementation specific error",
            0x84 => "Unsupported Protocol Version",
            0x85 => "Client Identifier not valid",
            0x86 => "Bad User Name or Password",
            0x87 => "Not authorized",
            0x88 => "Server unavailable",
            0x89 => "Server busy",
            0x8A => "Banned",
            0x8B => "Server shutting down",
            0x8C => "Bad authentication method",
            0x8D => "Keep Alive timeout",
            0x8E => "Session taken over",
            0x8F => "Topic Filter invalid",
            0x90 => "Topic Name invalid",
            0x91 => "Packet Identifier in use",
            0x92 => "Packet Identifier not found",
            0x93 => "Receive Maximum exceeded",
            0x94 => "Topic Alias invalid",
            0x95 => "Packet too large",
            0x96 => "Message rate too high",
            0x97 => "Quota exceeded",
            0x98 => "Administrative action",
            0x99 => "Payload format invalid",
            0x9A => "Retain not supported",
            0x9B => "QoS not supported",
            0x9C => "Use another server",
            0x9D => "Server moved",
            0x9E => "Shared Subscriptions not supported",
            0x9F => "Connection rate exceeded",
            0xA0 => "Maximum connect time",
            0xA1 => "Subscription Identifiers not supported",
            0xA2 => "Wildcard Subscriptions not supported",
            _ => "a reason that the standard does not know",
        }
    }

    /// 0x80 and above (MQTT 5.0 section 2.4).
    pub fn is_error(self) -> bool {
        self.0 >= 0x80
    }
}

/// The Will Message (MQTT 5.0 section 3.1.2.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Will {
    /// Where the broker publishes it.
    pub topic: Topic,
    /// What it publishes.
    pub payload: Bytes,
    /// At which quality of service.
    pub qos: Qos,
    /// Whether it is retained.
    pub retain: bool,
}

/// CONNECT.
#[derive(Clone, PartialEq, Eq)]
pub struct Connect {
    /// Client Identifier.
    pub client_id: String,
    /// Clean Start (5.0) or Clean Session (3.1.1).
    pub clean: bool,
    /// Keep Alive, in seconds; 0 turns it off.
    pub keep_alive_s: u16,
    /// Session Expiry Interval in seconds (5.0 only; 0xFFFFFFFF never expires).
    pub session_expiry_s: u32,
    /// How many unacknowledged QoS 1 and 2 PUBLISH packets we take at once (5.0 only).
    pub receive_max: u16,
    /// The largest packet we take, in bytes (announced on 5.0, enforced on both).
    pub max_packet_bytes: u32,
    /// The Will, unless the broker does not allow one.
    pub will: Option<Will>,
    /// User name.
    pub username: Option<String>,
    /// Password. Never printed.
    pub password: Option<String>,
}

/// What a broker said it can do, in CONNACK (MQTT 5.0 section 3.2.2.3); `None` where it said nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Receive Maximum: QoS 1 and 2 messages in flight.
    pub receive_max: Option<u16>,
    /// Maximum QoS.
    pub max_qos: Option<u8>,
    /// Retain Available.
    pub retain_available: Option<bool>,
    /// Maximum Packet Size, in bytes.
    pub max_packet_bytes: Option<u32>,
    /// Server Keep Alive, in seconds.
    pub keep_alive_s: Option<u16>,
    /// Session Expiry Interval the broker will really keep, in seconds.
    pub session_expiry_s: Option<u32>,
}

impl Limits {
    /// Both at once: the stricter in each respect.
    pub fn within(self, other: Limits) -> Limits {
        fn least<T: Ord>(one: Option<T>, other: Option<T>) -> Option<T> {
            one.into_iter().chain(other).min()
        }
        Limits {
            receive_max: least(self.receive_max, other.receive_max),
            max_qos: least(self.max_qos, other.max_qos),
            retain_available: least(self.retain_available, other.retain_available),
            max_packet_bytes: least(self.max_packet_bytes, other.max_packet_bytes),
            keep_alive_s: least(self.keep_alive_s, other.keep_alive_s),
            session_expiry_s: least(self.session_expiry_s, other.session_expiry_s),
        }
    }
}

/// CONNACK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnAck {
    /// Session Present.
    pub session_present: bool,
    /// 5.0: the reason code as sent. 3.1.1: return code 0 as 0x00, 1 to 5 as 0x84, 0x85, 0x88, 0x86, 0x87.
    pub reason: ReasonCode,
    /// The broker's own words, if it sent any (5.0).
    pub reason_string: Option<String>,
    /// The broker's limits.
    pub limits: Limits,
}

/// PUBLISH, in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The DUP flag.
    pub dup: bool,
    /// The quality of service; `id` is `Some` exactly for QoS 1 and 2.
    pub qos: Qos,
    /// The RETAIN flag.
    pub retain: bool,
    /// The topic name. Inbound names have passed the same check as ours.
    pub topic: Topic,
    /// The Packet Identifier.
    pub id: Option<PacketId>,
    /// The application message.
    pub payload: Bytes,
    /// Message Expiry Interval in seconds (5.0).
    pub message_expiry_s: Option<u32>,
    /// Response Topic (5.0).
    pub response_topic: Option<String>,
    /// Correlation Data (5.0).
    pub correlation_data: Option<Bytes>,
}

/// One subscription of a SUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The Topic Filter.
    pub filter: String,
    /// The quality of service asked for.
    pub qos: Qos,
    /// Whether retained messages are asked for (5.0: Retain Handling 0 or 2; 3.1.1 always sends them).
    pub retained: bool,
}

impl std::fmt::Debug for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect")
            .field("client_id", &self.client_id)
            .field("clean", &self.clean)
            .field("keep_alive_s", &self.keep_alive_s)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

/// Every packet a client sends or receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Ours only.
    Connect(Box<Connect>),
    /// The broker's only.
    ConnAck(ConnAck),
    /// Both ways.
    Publish(Box<Publish>),
    /// Both ways.
    PubAck(PacketId, ReasonCode),
    /// Both ways.
    PubRec(PacketId, ReasonCode),
    /// Both ways.
    PubRel(PacketId, ReasonCode),
    /// Both ways.
    PubComp(PacketId, ReasonCode),
    /// Ours only.
    Subscribe(PacketId, Vec<Subscription>),
    /// The broker's only: one reason code for each filter; below 0x80 it is the granted QoS.
    SubAck(PacketId, Vec<ReasonCode>),
    /// Ours only: topic filters.
    Unsubscribe(PacketId, Vec<String>),
    /// The broker's only: one reason code for each filter on 5.0 (0x11: there was no such subscription); none
    /// on 3.1.1.
    UnsubAck(PacketId, Vec<ReasonCode>),
    /// Ours only.
    PingReq,
    /// The broker's only.
    PingResp,
    /// Both ways on 5.0, ours only on 3.1.1.
    Disconnect(ReasonCode),
    /// The broker's only: a PUBLISH larger than we take was skipped on the wire. `id` and `qos` are what an
    /// answer needs.
    Oversize {
        /// How many bytes the packet had.
        bytes: u64,
        /// Its quality of service.
        qos: Qos,
        /// Its Packet Identifier, if it had one.
        id: Option<PacketId>,
        /// Its topic as far as it could be read.
        topic: String,
    },
}

impl Packet {
    /// The packet's name as the standard writes it.
    pub fn name(&self) -> &'static str {
        match self {
            Packet::Connect(_) => "CONNECT",
            Packet::ConnAck(_) => "CONNACK",
            Packet::Publish(_) | Packet::Oversize { .. } => "PUBLISH",
            Packet::PubAck(..) => "PUBACK",
            Packet::PubRec(..) => "PUBREC",
            Packet::PubRel(..) => "PUBREL",
            Packet::PubComp(..) => "PUBCOMP",
            Packet::Subscribe(..) => "SUBSCRIBE",
            Packet::SubAck(..) => "SUBACK",
            Packet::Unsubscribe(..) => "UNSUBSCRIBE",
            Packet::UnsubAck(..) => "UNSUBACK",
            Packet::PingReq => "PINGREQ",
            Packet::PingResp => "PINGRESP",
            Packet::Disconnect(_) => "DISCONNECT",
        }
    }
}
