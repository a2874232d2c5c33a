//! `[broker]`: where messages go, and how both sides prove who they are.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::check::{DAY, EVER, MINUTE, SECOND};
use super::place::Place;
use super::quantity;
use super::read::{Placed, Section, Walk};
use super::url::{self, Url};
use super::value::{self, Complaint};
use super::{Broker, Files, OnSessionLoss, Tls};
use crate::config::raw::{self, Value};
use crate::message::Qos;
use crate::uplink::packet::Protocol;

const PORT: u16 = 1883;
const PORT_TLS: u16 = 8883;

/// Keep Alive is a two byte number of seconds: 18 h 12 min 15 s (MQTT 5.0 section 3.1.2.10). 0 would turn it off.
const KEEP_ALIVE: RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(18 * 3600);
const SESSION_EXPIRY: RangeInclusive<Duration> = SECOND..=EVER;
const CONNECT_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);
const ACK_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=DAY;
const BACKOFF_MAX: RangeInclusive<Duration> = Duration::from_millis(100)..=DAY;
const TURN: RangeInclusive<Duration> = SECOND..=DAY;
const RETRY_REFUSED: RangeInclusive<Duration> = Duration::ZERO..=EVER;
const MAX_PACKET: RangeInclusive<u64> = 4 << 10..=16 << 20;
/// A Remaining Length has four bytes at most (MQTT 5.0 section 1.5.5).
const MAX_PACKET_OUT: RangeInclusive<u64> = 1 << 10..=256 << 20;
const MAX_PACKET_DEFAULT: u32 = 256 << 10;
const WINDOW_DEFAULT: u16 = 1000;
/// mosquitto's default configuration answers the 21st QoS 2 PUBLISH with a PUBREC it has not stored (measured).
const WINDOW_QOS2_V311: u16 = 20;
/// Strings in MQTT hold at most 65,535 bytes (MQTT 5.0 section 1.5.4).
const STRING_BYTES_MAX: usize = 65_535;
/// One protocol name has 1 to 255 bytes (RFC 7301 section 3.1).
const ALPN_BYTES_MAX: usize = 255;

const TLS_KEYS: [&str; 5] = ["ca_file", "cert_file", "key_file", "server_name", "alpn"];

const PROTOCOLS: [value::Choice<Protocol>; 2] =
    [("5", Protocol::V5, &["5.0", "v5"]), ("3.1.1", Protocol::V311, &["4", "3.1", "v3", "v3.1.1"])];
pub(super) const SESSION_LOSS: [value::Choice<OnSessionLoss>; 2] =
    [("republish", OnSessionLoss::Republish, &["resend"]), ("drop", OnSessionLoss::Drop, &["discard"])];

/// `[broker]`, or every `[[broker]]` in the order of preference: at least one.
pub(super) fn brokers(walk: &mut Walk<'_>, root: Section<'_>, gateway: &str) -> (Broker, Vec<Broker>) {
    let several = |value: &Value| matches!(value, Value::Array(brokers) if !brokers.is_empty());
    if !root.table.get("broker").is_some_and(|entry| several(&entry.node.value)) {
        let section = walk.section(root, "broker", &raw::BROKER, true);
        return (broker(walk, section, gateway), Vec::new());
    }
    let sections = walk.tables(root, "broker", &raw::BROKER);
    let mut brokers = Vec::<(Broker, Place)>::new();
    for section in sections {
        let (broker, place) = (broker(walk, section, gateway), section.table.place);
        let owner = |broker: &Broker| (broker.host.clone(), broker.port, broker.client_id.clone());
        let same =
            brokers.iter().find(|(other, _)| !broker.host.is_empty() && owner(other) == owner(&broker));
        if let Some((_, first)) = same {
            let message = "this broker is there already, with the same client_id".to_owned();
            walk.clash(place, message, *first, "remove one of the two");
        }
        brokers.push((broker, place));
    }
    let mut brokers = brokers.into_iter().map(|(broker, _)| broker);
    match brokers.next() {
        Some(first) => (first, brokers.collect()),
        // None of them was a table, which has been told.
        None => (broker(walk, Section { table: root.table, keys: &raw::BROKER }, gateway), Vec::new()),
    }
}

fn broker(walk: &mut Walk<'_>, section: Section<'_>, gateway: &str) -> Broker {
    let around = walk.around;
    let url = walk.need(section, "url", |value| url::url(&value::substitute(value::text(value)?, around)?));
    let protocol = walk.get(section, "protocol", |value| value::choice(value, &PROTOCOLS));
    let protocol = protocol.map_or(Protocol::V5, |protocol| protocol.value);
    let (max_in_flight, qos2_window) = windows(walk, section, protocol);
    let session_loss = walk.get(section, "on_session_loss", |value| value::choice(value, &SESSION_LOSS));
    let max_packet = walk.get(section, "max_packet", |value| quantity::size(value, MAX_PACKET));
    let max_packet = max_packet.and_then(|bytes| u32::try_from(bytes.value).ok());
    let max_packet_out = walk.get(section, "max_packet_out", |value| quantity::size(value, MAX_PACKET_OUT));
    let max_qos = walk.get(section, "max_qos", max_qos);
    let tls = tls(walk, section, url.as_ref());
    let url = url.map_or_else(|| Url { tls: false, host: String::new(), port: None }, |url| url.value);
    Broker {
        port: url.port.unwrap_or(if url.tls { PORT_TLS } else { PORT }),
        host: url.host,
        tls,
        protocol,
        client_id: mqtt_string(walk, section, "client_id").unwrap_or_else(|| gateway.to_owned()),
        username: mqtt_string(walk, section, "username"),
        password_file: walk.secret_path(section, "password_file"),
        keep_alive: walk.duration(section, "keep_alive", KEEP_ALIVE, 30 * SECOND),
        session_expiry: walk.duration(section, "session_expiry", SESSION_EXPIRY, 7 * DAY),
        connect_timeout: walk.duration(section, "connect_timeout", CONNECT_TIMEOUT, 20 * SECOND),
        ack_timeout: walk.duration(section, "ack_timeout", ACK_TIMEOUT, MINUTE),
        backoff_max: walk.duration(section, "backoff_max", BACKOFF_MAX, 5 * MINUTE),
        max_in_flight,
        qos2_window,
        max_packet: max_packet.unwrap_or(MAX_PACKET_DEFAULT),
        on_session_loss: session_loss.map_or(OnSessionLoss::Republish, |policy| policy.value),
        retry_refused_for: walk.duration(section, "retry_refused_for", RETRY_REFUSED, DAY),
        will: walk.get(section, "will", value::boolean).is_none_or(|will| will.value),
        max_qos: max_qos.map_or(Qos::ExactlyOnce, |qos| qos.value),
        retain: walk.get(section, "retain", value::boolean).is_none_or(|retain| retain.value),
        max_packet_out: max_packet_out.and_then(|bytes| u32::try_from(bytes.value).ok()),
        failover_after: walk.duration(section, "failover_after", TURN, MINUTE),
        failback_every: walk.duration(section, "failback_every", TURN, 5 * MINUTE),
        clean_start: walk.get(section, "clean_start", value::boolean).is_some_and(|clean| clean.value),
        files: Files::default(),
    }
}

/// `max_in_flight` and `qos2_window`.
fn windows(walk: &mut Walk<'_>, section: Section<'_>, protocol: Protocol) -> (u16, u16) {
    let mut window = |key| {
        let number = walk.get(section, key, |value| value::integer(value, 1..=i64::from(u16::MAX)))?.value;
        u16::try_from(number).ok()
    };
    let max_in_flight = window("max_in_flight").unwrap_or(WINDOW_DEFAULT);
    let qos2_default = match protocol {
        Protocol::V5 => WINDOW_DEFAULT,
        Protocol::V311 => WINDOW_QOS2_V311,
    };
    (max_in_flight, window("qos2_window").unwrap_or(qos2_default.min(max_in_flight)))
}

fn max_qos(value: &Value) -> Result<Qos, Complaint> {
    let number = value::integer(value, 0..=2)?;
    Ok(u64::try_from(number).ok().and_then(Qos::from_number).unwrap_or(Qos::ExactlyOnce))
}

/// A text that goes into CONNECT, with `{hostname}` and `${NAME}` replaced.
fn mqtt_string(walk: &mut Walk<'_>, section: Section<'_>, key: &str) -> Option<String> {
    let around = walk.around;
    let found = walk.get(section, key, |value| {
        let text = value::substitute(value::text(value)?, around)?;
        match text.len() {
            0 => Err(Complaint::new("this is empty").help("leave the line out for the default")),
            1..=STRING_BYTES_MAX if text.chars().any(char::is_control) => {
                Err(Complaint::new("there is a control character in it, which brokers refuse"))
            }
            1..=STRING_BYTES_MAX => Ok(text),
            long => Err(Complaint::new(format!("{long} bytes are too many: MQTT takes {STRING_BYTES_MAX}"))),
        }
    });
    found.map(|found| found.value)
}

fn tls(walk: &mut Walk<'_>, section: Section<'_>, url: Option<&Placed<Url>>) -> Option<Tls> {
    let plain = url.filter(|url| !url.value.tls);
    for entry in section.table.entries.iter().filter(|entry| TLS_KEYS.contains(&&*entry.key)) {
        if let Some(url) = plain {
            let message =
                format!("`{}` is for TLS, but the URL at {} is not", entry.key, walk.name_of(url.place));
            walk.wrong(
                entry.key_place,
                Complaint::new(message).help("write mqtts:// in the URL, or remove this"),
            );
        }
    }
    for (one, other) in [("cert_file", "key_file"), ("key_file", "cert_file")] {
        if let (Some(entry), None) = (section.table.get(one), section.table.get(other)) {
            let complaint = Complaint::new(format!("`{one}` without `{other}`"));
            walk.wrong(
                entry.key_place,
                complaint.help(format!("a client certificate needs both: add `{other}`")),
            );
        }
    }
    let ca_file: Option<PathBuf> = walk.path(section, "ca_file").map(|path| path.value);
    let cert_file = walk.path(section, "cert_file").map(|path| path.value);
    let key_file = walk.secret_path(section, "key_file");
    let server_name =
        walk.get(section, "server_name", |value| Ok(url::host(value::text(value)?)?.to_owned()));
    let alpn = walk.get(section, "alpn", alpn).map_or_else(Vec::new, |alpn| alpn.value);
    let server_name = server_name.map(|name| name.value);
    url.filter(|url| url.value.tls).map(|_| Tls { ca_file, cert_file, key_file, server_name, alpn })
}

fn alpn(value: &Value) -> Result<Vec<String>, Complaint> {
    let Value::Array(nodes) = value else {
        let complaint = Complaint::new(format!("expected an array of texts, found {value}"));
        return Err(complaint.help("write alpn = [\"mqtt\"]"));
    };
    nodes
        .iter()
        .map(|node| match value::text(&node.value)? {
            text if (1..=ALPN_BYTES_MAX).contains(&text.len()) => Ok(text.to_owned()),
            _ => Err(Complaint::new(format!("a protocol name has 1 to {ALPN_BYTES_MAX} bytes"))),
        })
        .collect()
}
