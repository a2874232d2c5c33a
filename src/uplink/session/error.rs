//! Why a connection must end, in words for the person in front of the cabinet.

use crate::uplink::packet::ReasonCode;

/// Why a connection must end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The broker refused the CONNECT.
    #[error("the broker refused the connection: {} (0x{:02X}){}", connack_advice(*.reason), .reason.0, quoted(.said))]
    Refused {
        /// The reason code; 3.1.1 return codes are mapped to their MQTT 5 counterparts.
        reason: ReasonCode,
        /// The broker's own words.
        said: Option<String>,
    },
    /// The broker broke the protocol.
    #[error("the broker broke the protocol: {0}")]
    Protocol(String),
    /// The broker said goodbye.
    #[error("the broker closed the connection: {} (0x{:02X})", disconnect_reason(*.0), .0.0)]
    Disconnected(ReasonCode),
    /// Another client uses our client identifier.
    #[error(
        "another client uses the same client identifier (0x8E Session taken over); give each gateway its own \
         [broker] client_id"
    )]
    TakenOver,
    /// The broker kept a session that a clean start should have ended.
    #[error(
        "the broker still has the old session after a clean start; its messages cannot be told from ours"
    )]
    NotClean,
    /// The canary proved that the broker has begun a new session without our knowing. What it may have under our
    /// name by now cannot be told from what was ours, so the next connection begins clean.
    #[error("the broker has lost the session; it is begun anew")]
    Replaced,
    /// Whether the session is the old one cannot be found out now.
    #[error(
        "the broker refuses to take the message that would prove the session to be the old one: {} (0x{:02X})",
        disconnect_reason(*.0), .0.0
    )]
    CanaryRefused(ReasonCode),
    /// Nothing was heard for 1.5 times the keep alive.
    #[error("nothing heard from the broker for {idle_ms} ms")]
    Silent {
        /// How long, in milliseconds.
        idle_ms: u64,
    },
    /// The link is up, but nothing is acknowledged.
    #[error("the broker has acknowledged nothing for {waited_ms} ms")]
    NoProgress {
        /// How long, in milliseconds.
        waited_ms: u64,
    },
}

fn quoted(words: &Option<String>) -> String {
    words.as_ref().map(|words| format!("; it says: {words:?}")).unwrap_or_default()
}

fn connack_advice(reason: ReasonCode) -> &'static str {
    match reason.0 {
        0x81 => "Malformed Packet",
        0x82 => "Protocol Error",
        0x84 => "Unsupported Protocol Version; set [broker] protocol to the other one",
        0x85 => "Client Identifier not valid; check [broker] client_id",
        0x86 => "Bad User Name or Password; check [broker] username and password_file",
        0x87 => "Not authorized; ask the broker's owner what this client id and user may do",
        0x88 => "Server unavailable",
        0x89 => "Server busy",
        0x8A => "Banned; ask the broker's owner",
        0x8C => "Bad authentication method",
        0x90 => "Topic Name invalid: the broker does not like the Will's topic; check [gateway] base_topic",
        0x95 => "Packet too large",
        0x97 => "Quota exceeded",
        0x99 => "Payload format invalid",
        0x9A => "Retain not supported; set [broker] retain = false",
        0x9B => "QoS not supported; set [broker] max_qos = 0, or will = false",
        0x9C => "Use another server",
        0x9D => "Server moved",
        0x9F => "Connection rate exceeded",
        _ => "Unspecified error",
    }
}

fn disconnect_reason(reason: ReasonCode) -> &'static str {
    match reason.0 {
        0x00 => "Normal disconnection",
        0x81 => "Malformed Packet",
        0x82 => "Protocol Error",
        0x87 => "Not authorized",
        0x89 => "Server busy",
        0x8B => "Server shutting down",
        0x8D => "Keep Alive timeout",
        0x8E => "Session taken over",
        0x93 => "Receive Maximum exceeded",
        0x94 => "Topic Alias invalid",
        0x95 => "Packet too large",
        0x96 => "Message rate too high",
        0x97 => "Quota exceeded",
        0x98 => "Administrative action",
        0x9C => "Use another server",
        0x9D => "Server moved",
        _ => "Unspecified error",
    }
}
