//! The link against bytes: both protocol versions, at every split, from brokers good and bad.
//!
//! Expected bytes were written from the standards by hand, so that an encoder and a decoder of one library
//! cannot agree on a mistake.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use fieldpost::message::{PacketId, Qos, Topic};
use fieldpost::uplink::link::{Link, LinkError, WRITE_STALL, encoded_len};
use fieldpost::uplink::packet::{Connect, Packet, Protocol, Publish, ReasonCode, Subscription, Will};
use futures_util::FutureExt;
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};

const V4: Protocol = Protocol::V311;
const V5: Protocol = Protocol::V5;
const MAX_PACKET: u32 = 4096;

/// `"40 02 'ab' 00"`: hexadecimal bytes, and text in quotes.
fn bytes(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (at, part) in text.split('\'').enumerate() {
        match at % 2 {
            1 => out.extend_from_slice(part.as_bytes()),
            _ => out.extend(part.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap())),
        }
    }
    out
}

fn id(id: u16) -> PacketId {
    PacketId::new(id).unwrap()
}

/// A packet or an error in words, for comparison.
fn told(result: &Result<Packet, LinkError>) -> String {
    match result {
        Err(error) => format!("error: {error}"),
        Ok(Packet::ConnAck(ack)) => format!(
            "CONNACK present={} {:#04x} {:?} {:?}",
            ack.session_present, ack.reason.0, ack.reason_string, ack.limits
        ),
        Ok(Packet::Publish(publish)) => format!("{publish:?}"),
        Ok(packet @ (Packet::PubAck(id, code) | Packet::PubRec(id, code))) => {
            format!("{} {id} {:#04x}", packet.name(), code.0)
        }
        Ok(packet @ (Packet::PubRel(id, code) | Packet::PubComp(id, code))) => {
            format!("{} {id} {:#04x}", packet.name(), code.0)
        }
        Ok(packet @ (Packet::SubAck(id, codes) | Packet::UnsubAck(id, codes))) => {
            format!("{} {id} {:x?}", packet.name(), codes.iter().map(|code| code.0).collect::<Vec<_>>())
        }
        Ok(Packet::Disconnect(code)) => format!("DISCONNECT {:#04x}", code.0),
        Ok(Packet::Oversize { bytes, qos, id, topic }) => {
            let id = id.map(|id| id.get());
            format!("oversize of {bytes}, {qos}, id {id:?}, topic of {}: {:.8}", topic.len(), topic)
        }
        Ok(other) => other.name().to_owned(),
    }
}

/// Everything a link makes of `parts`, given one after the other. Every wait is abandoned as soon as it would
/// wait, so this also drops the future of `next` at every point.
fn receive(protocol: Protocol, max_packet: u32, parts: &[&[u8]]) -> Vec<String> {
    let (mut broker, ours) = duplex(1 << 20);
    let mut link = Link::new(ours, protocol, max_packet);
    let mut heard = Vec::new();
    for part in parts {
        broker.write_all(part).now_or_never().expect("the pipe is large enough").unwrap();
        while let Some(result) = link.next().now_or_never() {
            heard.push(told(&result));
            if result.is_err() {
                assert_eq!(heard.last(), link.next().now_or_never().map(|again| told(&again)).as_ref());
                return heard;
            }
        }
    }
    drop(broker);
    let end = link.next().now_or_never().expect("the stream has ended");
    assert!(matches!(end, Err(LinkError::Closed)), "{}", told(&end));
    heard
}

fn check_every_split(protocol: Protocol, max_packet: u32, bytes: &[u8], expected: &[&str]) {
    for split in 0..=bytes.len() {
        let (one, two) = bytes.split_at(split);
        assert_eq!(receive(protocol, max_packet, &[one, two]), expected, "{bytes:02x?} split at {split}");
    }
    let single: Vec<_> = bytes.chunks(1).collect();
    assert_eq!(receive(protocol, max_packet, &single), expected, "{bytes:02x?} byte by byte");
}

const NO_LIMITS: &str = "Limits { receive_max: None, max_qos: None, retain_available: None, \
                         max_packet_bytes: None, keep_alive_s: None, session_expiry_s: None }";

#[test]
fn what_a_broker_may_send_is_understood_at_every_split() {
    let connack = |text: &str| format!("CONNACK {text} {NO_LIMITS}");
    let publish = |text: &str, more: &str| format!("Publish {{ {text}, {more} }}");
    let plain = "message_expiry_s: None, response_topic: None, correlation_data: None";
    let table: Vec<(Protocol, &str, Vec<String>)> = vec![
        (V4, "20 02 01 00", vec![connack("present=true 0x00 None")]),
        (V4, "20 02 00 05", vec![connack("present=false 0x87 None")]),
        (V4, "20 02 01 01", vec![connack("present=false 0x84 None")]),
        (V4, "40 02 00 05  50 02 00 06", vec!["PUBACK 5 0x00".into(), "PUBREC 6 0x00".into()]),
        (V4, "62 02 FF FF  70 02 00 01", vec!["PUBREL 65535 0x00".into(), "PUBCOMP 1 0x00".into()]),
        (V4, "90 06 00 01 00 01 02 80", vec!["SUBACK 1 [0, 1, 2, 80]".into()]),
        (V4, "B0 02 00 07  D0 00", vec!["UNSUBACK 7 []".into(), "PINGRESP".into()]),
        (
            V4,
            "3B 09 00 03 'a/b' 00 0A 'hi'",
            vec![publish(
                "dup: true, qos: AtLeastOnce, retain: true, topic: \"a/b\", id: Some(PacketId(10)), payload: b\"hi\"",
                plain,
            )],
        ),
        (
            V4,
            "30 03 00 01 't'",
            vec![publish(
                "dup: false, qos: AtMostOnce, retain: false, topic: \"t\", id: None, payload: b\"\"",
                plain,
            )],
        ),
        (V5, "20 03 01 00 00", vec![connack("present=true 0x00 None")]),
        (V5, "20 03 01 87 00", vec![connack("present=false 0x87 None")]),
        (V5, "20 08 00 97 05 1F 00 02 'no'", vec![connack("present=false 0x97 Some(\"no\")")]),
        // A broker that only knows 3.1.1.
        (V5, "20 02 00 01", vec![connack("present=false 0x84 None")]),
        (
            V5,
            "20 1A 01 00 17 21 00 14 24 01 25 00 27 00 01 00 00 13 00 3C 11 00 00 0E 10 22 00 0A",
            vec![
                "CONNACK present=true 0x00 None Limits { receive_max: Some(20), max_qos: Some(1), \
                 retain_available: Some(false), max_packet_bytes: Some(65536), keep_alive_s: Some(60), \
                 session_expiry_s: Some(3600) }"
                    .into(),
            ],
        ),
        (V5, "40 02 00 05  40 03 00 05 10", vec!["PUBACK 5 0x00".into(), "PUBACK 5 0x10".into()]),
        (V5, "50 04 00 06 97 00", vec!["PUBREC 6 0x97".into()]),
        // EMQX, with its own receive window exceeded.
        (V5, "50 04 00 06 93 00  40 03 00 06 95", vec!["PUBREC 6 0x93".into(), "PUBACK 6 0x95".into()]),
        (V5, "50 09 00 06 87 05 1F 00 02 'no'", vec!["PUBREC 6 0x87".into()]),
        (V5, "62 03 00 06 92  70 04 00 06 92 00", vec!["PUBREL 6 0x92".into(), "PUBCOMP 6 0x92".into()]),
        (V5, "90 05 00 01 00 02 87", vec!["SUBACK 1 [2, 87]".into()]),
        (V5, "B0 05 00 01 00 00 11", vec!["UNSUBACK 1 [0, 11]".into()]),
        (V5, "E0 00", vec!["DISCONNECT 0x00".into()]),
        (V5, "E0 01 8E", vec!["DISCONNECT 0x8e".into()]),
        (V5, "E0 02 8B 00", vec!["DISCONNECT 0x8b".into()]),
        (V5, "E0 07 97 05 1F 00 02 'no'", vec!["DISCONNECT 0x97".into()]),
        (
            V5,
            "34 16 00 01 't' 00 0A 0E 02 00 00 00 3C 08 00 01 'r' 09 00 02 'cd' 'hi'",
            vec![publish(
                "dup: false, qos: ExactlyOnce, retain: false, topic: \"t\", id: Some(PacketId(10)), payload: b\"hi\"",
                "message_expiry_s: Some(60), response_topic: Some(\"r\"), correlation_data: Some(b\"cd\")",
            )],
        ),
        // Subscription Identifiers, which rumqttc miscounts.
        (
            V5,
            "30 0F 00 01 't' 09 0B 01 0B 80 01 08 00 01 'r' 'hi'",
            vec![publish(
                "dup: false, qos: AtMostOnce, retain: false, topic: \"t\", id: None, payload: b\"hi\"",
                "message_expiry_s: None, response_topic: Some(\"r\"), correlation_data: None",
            )],
        ),
    ];
    for (protocol, text, expected) in table {
        let expected: Vec<_> = expected.iter().map(String::as_str).collect();
        check_every_split(protocol, MAX_PACKET, &bytes(text), &expected);
    }
}

#[test]
fn what_no_broker_may_send_ends_the_link_at_every_split() {
    let table: &[(Protocol, &str, &str)] = &[
        // Packets only a client sends, and AUTH, which we never ask for.
        (V4, "10 00", "CONNECT: a broker may not send this packet"),
        (V5, "82 06 00 01 00 00 01 'a' 00", "SUBSCRIBE: a broker may not send this packet"),
        (V4, "A2 00", "UNSUBSCRIBE: a broker may not send this packet"),
        (V5, "C0 00", "PINGREQ: a broker may not send this packet"),
        (V4, "E0 00", "DISCONNECT: a broker may not send this packet"),
        (V4, "F0 00", "AUTH: a broker may not send this packet"),
        (V5, "F0 00", "AUTH: a broker may not send this packet"),
        (V5, "00 00", "packet of type 0: a broker may not send this packet"),
        // Reserved flag bits.
        (V4, "21 02 00 00", "CONNACK: reserved flag bits 0b0001 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V5, "28 03 00 00 00", "CONNACK: reserved flag bits 0b1000 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V5, "42 02 00 01", "PUBACK: reserved flag bits 0b0010 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V4, "51 02 00 01", "PUBREC: reserved flag bits 0b0001 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V4, "60 02 00 01", "PUBREL: reserved flag bits 0b0000 instead of 0b0010 (MQTT-2.1.3-1)"),
        (V5, "63 02 00 01", "PUBREL: reserved flag bits 0b0011 instead of 0b0010 (MQTT-2.1.3-1)"),
        (V4, "74 02 00 01", "PUBCOMP: reserved flag bits 0b0100 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V4, "91 03 00 01 00", "SUBACK: reserved flag bits 0b0001 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V4, "B2 02 00 01", "UNSUBACK: reserved flag bits 0b0010 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V4, "D1 00", "PINGRESP: reserved flag bits 0b0001 instead of 0b0000 (MQTT-2.1.3-1)"),
        (V5, "E1 00", "DISCONNECT: reserved flag bits 0b0001 instead of 0b0000 (MQTT-2.1.3-1)"),
        // Lengths.
        (V4, "40 FF FF FF FF 01", "PUBACK: its Remaining Length is malformed (section 2.1.4)"),
        (V5, "30 80 80 80 80", "PUBLISH: its Remaining Length is malformed (section 2.1.4)"),
        (V4, "20 03 00 00 00", "CONNACK: it cannot have a Remaining Length of 3"),
        (V4, "20 00", "CONNACK: it cannot have a Remaining Length of 0"),
        (V5, "20 01 00", "CONNACK: it cannot have a Remaining Length of 1"),
        (V4, "40 03 00 01 00", "PUBACK: it cannot have a Remaining Length of 3"),
        (V5, "40 01 00", "PUBACK: it cannot have a Remaining Length of 1"),
        (V4, "90 02 00 01", "SUBACK: it cannot have a Remaining Length of 2"),
        (V5, "90 03 00 01 00", "SUBACK: it cannot have a Remaining Length of 3"),
        (V4, "B0 03 00 01 00", "UNSUBACK: it cannot have a Remaining Length of 3"),
        (V5, "B0 02 00 01", "UNSUBACK: it cannot have a Remaining Length of 2"),
        (V5, "D0 01 00", "PINGRESP: it cannot have a Remaining Length of 1"),
        (V5, "30 00", "PUBLISH: it cannot have a Remaining Length of 0"),
        (V4, "90 FF FF FF 7F", "SUBACK: it has 268435460 bytes, we take 4096"),
        (V5, "20 FF FF FF 7F", "CONNACK: it has 268435460 bytes, we take 4096"),
        // CONNACK.
        (V4, "20 02 02 00", "CONNACK: reserved bits set in its flags (section 3.2.2.1)"),
        (V5, "20 03 80 00 00", "CONNACK: reserved bits set in its flags (MQTT-3.2.2-1)"),
        (V4, "20 02 00 06", "CONNACK: unknown return code 6 (section 3.2.2.3)"),
        (V5, "20 03 00 01 00", "CONNACK: it cannot carry reason code 0x01 (section 2.4)"),
        (V5, "20 02 00 00", "CONNACK: it has no Property Length, as in MQTT 3.1.1"),
        (V5, "20 04 00 00 00 00", "CONNACK: bytes after its properties"),
        (V5, "20 06 00 00 03 21 00 00", "CONNACK: Receive Maximum 0 (section 3.2.2.3.3)"),
        (V5, "20 05 00 00 02 24 02", "CONNACK: Maximum QoS other than 0 or 1 (section 3.2.2.3.4)"),
        (V5, "20 05 00 00 02 25 02", "CONNACK: Retain Available other than 0 or 1 (section 3.2.2.3.5)"),
        (V5, "20 08 00 00 05 27 00 00 00 00", "CONNACK: Maximum Packet Size 0 (section 3.2.2.3.6)"),
        (V5, "20 09 00 00 06 21 00 01 21 00 01", "CONNACK: it has a property twice (section 2.2.2.2)"),
        (V5, "20 04 00 00 05 21", "CONNACK: its properties are longer than the packet"),
        (V5, "20 05 00 00 02 21 00", "CONNACK: a property crosses the end of the properties"),
        (V5, "20 05 00 00 02 01 00", "CONNACK: Invalid property type = 1"),
        (V5, "20 05 00 00 02 63 00", "CONNACK: it has a property of unknown type (section 2.2.2.2)"),
        (V5, "20 07 00 00 04 1F 00 01 FF", "CONNACK: Topic not utf-8"),
        // Packet identifiers and codes.
        (V4, "40 02 00 00", "PUBACK: Packet Identifier 0 (section 2.2.1)"),
        (V5, "50 04 00 00 00 00", "PUBREC: Packet Identifier 0 (section 2.2.1)"),
        (V4, "62 02 00 00", "PUBREL: Packet Identifier 0 (section 2.2.1)"),
        (V5, "70 02 00 00", "PUBCOMP: Packet Identifier 0 (section 2.2.1)"),
        (V4, "90 03 00 00 00", "SUBACK: Packet Identifier 0 (section 2.2.1)"),
        (V4, "B0 02 00 00", "UNSUBACK: Packet Identifier 0 (section 2.2.1)"),
        (V4, "32 05 00 01 't' 00 00", "PUBLISH: Packet id Zero"),
        (V5, "32 06 00 01 't' 00 00 00", "PUBLISH: Packet received has id Zero"),
        (V5, "40 03 00 01 01", "PUBACK: it cannot carry reason code 0x01 (section 2.4)"),
        (V5, "50 04 00 01 FF 00", "PUBREC: it cannot carry reason code 0xff (section 2.4)"),
        (V5, "70 03 00 01 80", "PUBCOMP: it cannot carry reason code 0x80 (section 2.4)"),
        (V5, "50 05 00 01 00 00 00", "PUBREC: bytes after its properties"),
        (V4, "90 03 00 01 03", "SUBACK: Invalid subscribe reason code: 3"),
        (V5, "90 04 00 01 00 03", "SUBACK: it cannot carry reason code 0x03 (section 2.4)"),
        (V5, "B0 04 00 01 00 10", "UNSUBACK: it cannot carry reason code 0x10 (section 2.4)"),
        (V5, "E0 01 7F", "DISCONNECT: it cannot carry reason code 0x7f (section 2.4)"),
        (V5, "E0 03 00 00 00", "DISCONNECT: bytes after its properties"),
        // PUBLISH.
        (V4, "36 05 00 01 't' 00 01", "PUBLISH: QoS 3 (MQTT-3.3.1-4)"),
        (V5, "38 04 00 01 't' 00", "PUBLISH: DUP set at QoS 0 (MQTT-3.3.1-2)"),
        (V4, "30 02 00 00", "PUBLISH: a topic must not be empty (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V5, "30 03 00 00 00", "PUBLISH: a topic must not be empty (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V5, "30 06 00 00 03 23 00 01", "PUBLISH: a Topic Alias, of which we allow none (MQTT-3.1.2-26)"),
        (V4, "30 05 00 03 'a/+'", "PUBLISH: a topic must not hold '+' (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V5, "30 06 00 03 'a/#' 00", "PUBLISH: a topic must not hold '#' (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V4, "30 03 00 01 00", "PUBLISH: a topic must not hold '\\0' (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V4, "30 03 00 01 1F", "PUBLISH: a topic must not hold '\\u{1f}' (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V5, "30 05 00 02 C2 9F 00", "PUBLISH: a topic must not hold '\\u{9f}' (MQTT-3.3.2-1, MQTT-3.3.2-2)"),
        (V4, "30 04 00 02 C3 28", "PUBLISH: Topic is not UTF-8"),
        (V5, "30 05 00 02 C3 28 00", "PUBLISH: its topic is not UTF-8 (MQTT-1.5.4-1)"),
        (V4, "30 03 00 09 't'", "PUBLISH: Promised boundary crossed: 9"),
        (V4, "32 04 00 01 't' 00", "PUBLISH: Malformed packet"),
        (V5, "32 04 00 01 't' 00", "PUBLISH: its Property Length is malformed (section 2.2.2.1)"),
        (V5, "30 08 00 01 't' 04 08 00 09 'r'", "PUBLISH: a property crosses the end of the properties"),
        (V5, "30 08 00 01 't' 04 08 00 01 '+'", "PUBLISH: its Response Topic: a topic must not hold '+'"),
        (
            V5,
            "30 06 00 01 't' 02 0B 00",
            "PUBLISH: its Subscription Identifier is malformed (section 3.3.2.3.8)",
        ),
    ];
    for (protocol, text, expected) in table {
        let expected = format!("error: the broker broke the protocol with a {expected}");
        check_every_split(*protocol, MAX_PACKET, &bytes(text), &[&expected]);
    }
}

#[test]
fn a_packet_before_the_bad_one_is_still_told() {
    let bytes = bytes("D0 00  40 02 00 05  36 05 00 01 't' 00 01");
    let error = "error: the broker broke the protocol with a PUBLISH: QoS 3 (MQTT-3.3.1-4)";
    check_every_split(V4, MAX_PACKET, &bytes, &["PINGRESP", "PUBACK 5 0x00", error]);
}

/// A PUBLISH at QoS 1 with Packet Identifier 7.
fn publish_bytes(protocol: Protocol, topic: &str, payload: usize) -> Vec<u8> {
    let mut body = (topic.len() as u16).to_be_bytes().to_vec();
    body.extend_from_slice(topic.as_bytes());
    body.extend_from_slice(&[0, 7]);
    if protocol == V5 {
        body.push(0);
    }
    body.resize(body.len() + payload, b'x');
    let mut packet = vec![0x32];
    let mut rest = body.len();
    while rest > 127 {
        packet.push(rest as u8 & 0x7F | 0x80);
        rest >>= 7;
    }
    packet.push(rest as u8);
    packet.extend_from_slice(&body);
    packet
}

#[test]
fn an_oversize_publish_is_skipped_and_told_and_the_link_goes_on() {
    for protocol in [V4, V5] {
        for (topic, payload, told_topic) in [
            ("a/b".to_owned(), 300, "3: a/b".to_owned()),
            ("t".repeat(200), 0, "200: tttttttt".to_owned()),
            ("$SYS/x".to_owned(), 300, "6: $SYS/x".to_owned()),
        ] {
            let mut stream = publish_bytes(protocol, &topic, payload);
            let told = format!("oversize of {}, QoS 1, id Some(7), topic of {told_topic}", stream.len());
            stream.extend_from_slice(&[0xD0, 0x00]);
            check_every_split(protocol, 128, &stream, &[&told, "PINGRESP"]);
        }
    }
    let mut long = publish_bytes(V4, &"t".repeat(60_000), 10);
    long.extend_from_slice(&[0xD0, 0x00]);
    let chunks: Vec<_> = long.chunks(1000).collect();
    let told = "oversize of 60018, QoS 1, id Some(7), topic of 1024: tttttttt";
    assert_eq!(receive(V4, 128, &chunks), [told, "PINGRESP"]);
}

#[test]
fn a_packet_of_exactly_the_largest_size_is_taken() {
    let packet = publish_bytes(V5, "a/b", 200);
    let size = packet.len() as u32;
    assert!(receive(V5, size, &[&packet])[0].starts_with("Publish"));
    assert!(receive(V5, size - 1, &[&packet])[0].starts_with("oversize"));
}

#[test]
fn a_malformed_oversize_publish_ends_the_link() {
    for (text, why) in [
        ("30 80 02 FF FF", "its topic is longer than the packet"),
        ("32 80 02 00 FF 00", "its topic is longer than the packet"),
        ("32 80 02 00 01 't' 00 00", "Packet Identifier 0 (section 2.2.1)"),
    ] {
        let expected = format!("error: the broker broke the protocol with a PUBLISH: {why}");
        check_every_split(V4, 128, &bytes(text), &[&expected]);
    }
}

/// A broker that sends a header and then zeros for ever.
struct Endless {
    header: &'static [u8],
}

impl AsyncRead for Endless {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let header = self.header.len().min(buf.remaining());
        buf.put_slice(&self.header[..header]);
        self.header = &self.header[header..];
        let zeros = buf.initialize_unfilled().len();
        buf.advance(zeros);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn peak_memory_kb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_stays_bounded_while_a_packet_of_256_mb_goes_by() {
    // PUBLISH at QoS 1, the largest Remaining Length, topic "t", Packet Identifier 7.
    let broker = Endless { header: &[0x32, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1, b't', 0, 7] };
    let mut link = Link::new(broker, V5, MAX_PACKET);
    let before = peak_memory_kb();
    let skipped = link.next().now_or_never().unwrap();
    assert_eq!(told(&skipped), "oversize of 268435460, QoS 1, id Some(7), topic of 1: t");
    assert!(link.received_bytes() >= 268_435_460);
    let grown = peak_memory_kb() - before;
    // Other tests may run in this process: their few megabytes are allowed for.
    assert!(grown < 32 * 1024, "memory grew by {grown} KiB");
}

#[test]
fn a_message_of_the_brokers_own_is_acknowledged_and_dropped() {
    let table = [
        (V4, "30 06 00 04 '$S/x'  D0 00", ""),
        (V4, "32 08 00 04 '$S/x' 00 07  D0 00", "40 02 00 07"),
        (V5, "34 09 00 04 '$S/x' 00 07 00  D0 00", "50 02 00 07"),
    ];
    for (protocol, text, answer) in table {
        let (mut broker, ours) = duplex(1024);
        let mut link = Link::new(ours, protocol, MAX_PACKET);
        broker.write_all(&bytes(text)).now_or_never().unwrap().unwrap();
        assert_eq!(told(&link.next().now_or_never().unwrap()), "PINGRESP");
        drop(link);
        let mut answered = Vec::new();
        broker.read_to_end(&mut answered).now_or_never().unwrap().unwrap();
        assert_eq!(answered, bytes(answer));
    }
}

fn connect() -> Connect {
    Connect {
        client_id: "gw".into(),
        clean: false,
        keep_alive_s: 30,
        session_expiry_s: 3600,
        receive_max: 20,
        max_packet_bytes: 65536,
        will: Some(Will {
            topic: Topic::new("w").unwrap(),
            payload: Bytes::from_static(b"off"),
            qos: Qos::AtLeastOnce,
            retain: true,
        }),
        username: Some("u".into()),
        password: Some("p".into()),
    }
}

fn publish() -> Publish {
    Publish {
        dup: false,
        qos: Qos::AtLeastOnce,
        retain: false,
        topic: Topic::new("a/b").unwrap(),
        id: Some(id(10)),
        payload: Bytes::from_static(b"hi"),
        message_expiry_s: None,
        response_topic: None,
        correlation_data: None,
    }
}

/// Every packet a client sends, with the bytes of both versions; `None` where a version cannot express it.
fn outgoing() -> Vec<(Packet, Option<&'static str>, Option<&'static str>)> {
    let requesting = Publish {
        message_expiry_s: Some(60),
        response_topic: Some("r".into()),
        correlation_data: Some(Bytes::from_static(b"cd")),
        qos: Qos::AtMostOnce,
        id: None,
        retain: true,
        ..publish()
    };
    let bare = Connect { clean: true, will: None, username: None, password: None, ..connect() };
    let nameless = Connect { username: None, ..connect() };
    vec![
        (
            Packet::Connect(Box::new(connect())),
            Some("10 1C 00 04 'MQTT' 04 EC 00 1E 00 02 'gw' 00 01 'w' 00 03 'off' 00 01 'u' 00 01 'p'"),
            Some(
                "10 2D 00 04 'MQTT' 05 EC 00 1E 0F 11 00 00 0E 10 21 00 14 27 00 01 00 00 17 01 \
                 00 02 'gw' 00 00 01 'w' 00 03 'off' 00 01 'u' 00 01 'p'",
            ),
        ),
        (
            Packet::Connect(Box::new(bare)),
            Some("10 0E 00 04 'MQTT' 04 02 00 1E 00 02 'gw'"),
            Some("10 1E 00 04 'MQTT' 05 02 00 1E 0F 11 00 00 0E 10 21 00 14 27 00 01 00 00 17 01 00 02 'gw'"),
        ),
        (
            Packet::Connect(Box::new(nameless)),
            None,
            Some(
                "10 2A 00 04 'MQTT' 05 6C 00 1E 0F 11 00 00 0E 10 21 00 14 27 00 01 00 00 17 01 \
                 00 02 'gw' 00 00 01 'w' 00 03 'off' 00 01 'p'",
            ),
        ),
        (
            Packet::Publish(Box::new(publish())),
            Some("32 09 00 03 'a/b' 00 0A 'hi'"),
            Some("32 0A 00 03 'a/b' 00 0A 00 'hi'"),
        ),
        (
            Packet::Publish(Box::new(Publish { dup: true, qos: Qos::ExactlyOnce, ..publish() })),
            Some("3C 09 00 03 'a/b' 00 0A 'hi'"),
            Some("3C 0A 00 03 'a/b' 00 0A 00 'hi'"),
        ),
        (
            Packet::Publish(Box::new(requesting)),
            Some("31 07 00 03 'a/b' 'hi'"),
            Some("31 16 00 03 'a/b' 0E 02 00 00 00 3C 08 00 01 'r' 09 00 02 'cd' 'hi'"),
        ),
        (Packet::Publish(Box::new(Publish { id: None, ..publish() })), None, None),
        (Packet::PubAck(id(5), ReasonCode::SUCCESS), Some("40 02 00 05"), Some("40 02 00 05")),
        (Packet::PubAck(id(5), ReasonCode::QUOTA_EXCEEDED), Some("40 02 00 05"), Some("40 04 00 05 97 00")),
        (Packet::PubRec(id(5), ReasonCode::NOT_AUTHORIZED), Some("50 02 00 05"), Some("50 04 00 05 87 00")),
        (Packet::PubRec(id(5), ReasonCode::PACKET_TOO_LARGE), Some("50 02 00 05"), None),
        (Packet::PubRel(id(5), ReasonCode::SUCCESS), Some("62 02 00 05"), Some("62 02 00 05")),
        (
            Packet::PubComp(id(5), ReasonCode::PACKET_IDENTIFIER_NOT_FOUND),
            Some("70 02 00 05"),
            Some("70 04 00 05 92 00"),
        ),
        (Packet::PubComp(id(5), ReasonCode::QUOTA_EXCEEDED), Some("70 02 00 05"), None),
        (
            Packet::Subscribe(
                id(1),
                vec![
                    subscription("a/#".into(), Qos::ExactlyOnce),
                    Subscription { retained: false, ..subscription("b".into(), Qos::AtMostOnce) },
                ],
            ),
            Some("82 0C 00 01 00 03 'a/#' 02 00 01 'b' 00"),
            Some("82 0D 00 01 00 00 03 'a/#' 02 00 01 'b' 20"),
        ),
        (Packet::Subscribe(id(1), Vec::new()), None, None),
        (
            Packet::Unsubscribe(id(2), vec!["a/#".into()]),
            Some("A2 07 00 02 00 03 'a/#'"),
            Some("A2 08 00 02 00 00 03 'a/#'"),
        ),
        (Packet::PingReq, Some("C0 00"), Some("C0 00")),
        (Packet::Disconnect(ReasonCode::SUCCESS), Some("E0 00"), Some("E0 00")),
        (Packet::Disconnect(ReasonCode(0x04)), Some("E0 00"), Some("E0 01 04")),
        (Packet::Disconnect(ReasonCode(0x01)), Some("E0 00"), None),
        (Packet::PingResp, None, None),
    ]
}

fn expected_bytes(protocol: Protocol) -> Vec<u8> {
    let texts = outgoing().into_iter().filter_map(|(_, v4, v5)| if protocol == V4 { v4 } else { v5 });
    texts.flat_map(bytes).collect()
}

#[test]
fn every_packet_is_written_as_the_standard_says() {
    for (packet, in_v4, in_v5) in outgoing() {
        for (protocol, expected) in [(V4, in_v4), (V5, in_v5)] {
            let (mut broker, ours) = duplex(1024);
            let mut link = Link::new(ours, protocol, MAX_PACKET);
            // Behind another packet, because rumqttc's CONNECT counts from the start of the buffer.
            link.queue(&Packet::PingReq).unwrap();
            let queued = link.queue(&packet);
            assert_eq!(queued.is_ok(), expected.is_some(), "{} {protocol:?} {queued:?}", packet.name());
            let written = bytes(expected.unwrap_or_default());
            assert_eq!(link.queued_bytes(), 2 + written.len(), "{} {protocol:?}", packet.name());
            if expected.is_some() {
                assert_eq!(encoded_len(protocol, &packet).unwrap(), written.len(), "{}", packet.name());
            }
            link.flush().now_or_never().unwrap().unwrap();
            drop(link);
            let mut sent = Vec::new();
            broker.read_to_end(&mut sent).now_or_never().unwrap().unwrap();
            assert_eq!(sent[2..], written, "{} {protocol:?}", packet.name());
        }
    }
}

#[test]
fn nothing_is_lost_or_doubled_when_sending_is_abandoned_at_every_byte() {
    for protocol in [V4, V5] {
        for capacity in 1..8 {
            let (mut broker, ours) = duplex(capacity);
            let mut link = Link::new(ours, protocol, MAX_PACKET);
            for (packet, _, _) in outgoing() {
                let _ = link.queue(&packet);
            }
            let mut sent = Vec::new();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            for turn in 0.. {
                let done = match turn % 2 {
                    0 => link.flush().now_or_never().is_some(),
                    _ => link.next().now_or_never().is_some(),
                };
                let mut part = [0; 8];
                let read = broker.read(&mut part).now_or_never();
                let Some(read) = read else {
                    assert!(done || link.queued_bytes() == 0);
                    break;
                };
                sent.extend_from_slice(&part[..read.unwrap()]);
            }
            assert_eq!(sent, expected_bytes(protocol), "{protocol:?} through {capacity} bytes");
        }
    }
}

#[test]
fn a_packet_larger_than_the_broker_takes_is_refused_and_the_others_go_out() {
    let (mut broker, ours) = duplex(1024);
    let mut link = Link::new(ours, V5, MAX_PACKET);
    link.set_broker_max_packet(12);
    link.queue(&Packet::Publish(Box::new(publish()))).unwrap();
    let larger = Publish { payload: Bytes::from_static(b"him"), ..publish() };
    let refused = link.queue(&Packet::Publish(Box::new(larger)));
    assert!(matches!(refused, Err(LinkError::TooLarge { what: "PUBLISH", bytes: 13, limit: 12 })));
    link.queue(&Packet::PingReq).unwrap();
    link.flush().now_or_never().unwrap().unwrap();
    drop(link);
    let mut sent = Vec::new();
    broker.read_to_end(&mut sent).now_or_never().unwrap().unwrap();
    assert_eq!(sent, bytes("32 0A 00 03 'a/b' 00 0A 00 'hi' C0 00"));
}

#[test]
fn a_field_longer_than_mqtt_can_carry_is_refused() {
    let long = "x".repeat(65_536);
    let data = Some(Bytes::from(vec![0; 65_536]));
    let will = Will { payload: Bytes::from(vec![0; 65_536]), ..connect().will.unwrap() };
    for packet in [
        Packet::Connect(Box::new(Connect { client_id: long.clone(), ..connect() })),
        Packet::Connect(Box::new(Connect { username: Some(long.clone()), ..connect() })),
        Packet::Connect(Box::new(Connect { password: Some(long.clone()), ..connect() })),
        Packet::Connect(Box::new(Connect { will: Some(will), ..connect() })),
        Packet::Publish(Box::new(Publish { response_topic: Some(long.clone()), ..publish() })),
        Packet::Publish(Box::new(Publish { correlation_data: data, ..publish() })),
        Packet::Subscribe(id(1), vec![subscription(long.clone(), Qos::AtMostOnce)]),
        Packet::Unsubscribe(id(1), vec![long.clone()]),
    ] {
        for protocol in [V4, V5] {
            let refused = encoded_len(protocol, &packet);
            let whole = matches!(refused, Err(LinkError::TooLarge { bytes: 65_536, limit: 65_535, .. }));
            assert!(whole, "{} {refused:?}", packet.name());
        }
    }
}

#[test]
fn packets_already_here_are_had_without_waiting() {
    let (mut broker, ours) = duplex(1024);
    let mut link = Link::new(ours, V4, MAX_PACKET);
    let mut try_next = || link.try_next().now_or_never().expect("it never waits");
    assert!(matches!(try_next(), Ok(None)));
    broker.write_all(&bytes("40 02 00 01 40 02 00 02 40 02")).now_or_never().unwrap().unwrap();
    assert!(matches!(try_next(), Ok(Some(Packet::PubAck(..)))));
    assert!(matches!(try_next(), Ok(Some(Packet::PubAck(..)))));
    assert!(matches!(try_next(), Ok(None)));
    broker.write_all(&bytes("00 03")).now_or_never().unwrap().unwrap();
    assert!(matches!(try_next(), Ok(Some(Packet::PubAck(..)))));
    drop(broker);
    assert!(matches!(try_next(), Err(LinkError::Closed)));
}

#[test]
fn what_the_broker_said_before_it_hung_up_is_told_although_writing_fails() {
    let (mut broker, ours) = duplex(64);
    let mut link = Link::new(ours, V5, MAX_PACKET);
    broker.write_all(&bytes("E0 01 8E")).now_or_never().unwrap().unwrap();
    drop(broker);
    link.queue(&Packet::Publish(Box::new(publish()))).unwrap();
    assert_eq!(told(&link.next().now_or_never().unwrap()), "DISCONNECT 0x8e");
    assert!(matches!(link.next().now_or_never(), Some(Err(LinkError::Closed))));
}

/// Waits for a future that must end, in virtual time.
async fn within<F: Future>(limit: Duration, future: F) -> F::Output {
    tokio::time::timeout(limit, future).await.expect("it must have ended by now")
}

#[tokio::test(start_paused = true)]
async fn two_sides_that_both_send_first_do_not_wait_for_each_other() {
    let (broker, ours) = duplex(256);
    let (mut from_us, mut to_us) = tokio::io::split(broker);
    let mut link = Link::new(ours, V4, MAX_PACKET);
    for _ in 0..10_000 {
        link.queue(&Packet::Publish(Box::new(publish()))).unwrap();
    }
    let expected = link.queued_bytes();
    let broker = tokio::spawn(async move {
        to_us.write_all(&bytes("D0 00").repeat(10_000)).await.unwrap();
        let mut received = vec![0; expected];
        from_us.read_exact(&mut received).await.unwrap();
        to_us.write_all(&bytes("40 02 00 05")).await.unwrap();
        (received, to_us)
    });
    for _ in 0..10_000 {
        let packet = within(Duration::from_secs(5), link.next()).await.unwrap();
        assert_eq!(packet.name(), "PINGRESP");
    }
    let packet = within(Duration::from_secs(5), link.next()).await.unwrap();
    assert_eq!(packet.name(), "PUBACK");
    let (received, _open) = broker.await.unwrap();
    assert_eq!(received, bytes("32 09 00 03 'a/b' 00 0A 'hi'").repeat(10_000));
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_takes_nothing_is_given_up_after_the_stall_time() {
    let (_broker, ours) = duplex(16);
    let mut link = Link::new(ours, V4, MAX_PACKET);
    for _ in 0..100 {
        link.queue(&Packet::PingReq).unwrap();
    }
    let start = tokio::time::Instant::now();
    assert!(matches!(link.next().await, Err(LinkError::WriteStalled)));
    assert_eq!(start.elapsed().as_secs(), WRITE_STALL.as_secs());
    assert!(matches!(link.flush().await, Err(LinkError::WriteStalled)));
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_takes_a_byte_now_and_then_is_not_given_up() {
    let (mut broker, ours) = duplex(1);
    let mut link = Link::new(ours, V4, MAX_PACKET);
    for _ in 0..50 {
        link.queue(&Packet::PingReq).unwrap();
    }
    let slow = tokio::spawn(async move {
        for _ in 0..100 {
            tokio::time::sleep(WRITE_STALL - Duration::from_secs(1)).await;
            broker.read_u8().await.unwrap();
        }
        broker
    });
    link.flush().await.unwrap();
    slow.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_sends_what_is_queued_and_waits_for_the_broker() {
    let (mut broker, ours) = duplex(4);
    let mut link = Link::new(ours, V5, MAX_PACKET);
    for _ in 0..10 {
        link.queue(&Packet::PingReq).unwrap();
    }
    link.queue(&Packet::Disconnect(ReasonCode::SUCCESS)).unwrap();
    let broker = tokio::spawn(async move {
        let mut received = Vec::new();
        broker.read_to_end(&mut received).await.unwrap();
        broker.write_all(&bytes("D0 00")).await.unwrap();
        received
    });
    within(Duration::from_secs(5), link.close()).await.unwrap();
    let received = broker.await.unwrap();
    assert_eq!(received.len(), 22);
    assert!(received.ends_with(&[0xE0, 0x00]));
}

/// Bytes of packets a broker may send, to be spoilt.
fn broker_packets(protocol: Protocol) -> Vec<Vec<u8>> {
    let texts: &[&str] = match protocol {
        Protocol::V311 => &[
            "20 02 01 00",
            "40 02 00 05",
            "50 02 00 06",
            "62 02 FF FF",
            "70 02 00 01",
            "90 06 00 01 00 01 02 80",
            "B0 02 00 07",
            "D0 00",
            "3B 09 00 03 'a/b' 00 0A 'hi'",
            "30 06 00 04 '$S/x'",
        ],
        Protocol::V5 => &[
            "20 1A 01 00 17 21 00 14 24 01 25 00 27 00 01 00 00 13 00 3C 11 00 00 0E 10 22 00 0A",
            "20 1C 00 87 19 1F 00 02 'no' 26 00 01 'k' 00 01 'v' 12 00 02 'id' 15 00 01 'm' 16 00 01 01",
            "40 04 00 05 10 00",
            "50 09 00 06 87 05 1F 00 02 'no'",
            "62 03 00 06 92",
            "70 0B 00 06 00 07 26 00 01 'k' 00 01 'v'",
            "90 05 00 01 00 02 87",
            "B0 05 00 01 00 00 11",
            "D0 00",
            "E0 07 97 05 1F 00 02 'no'",
            "34 16 00 01 't' 00 0A 0E 02 00 00 00 3C 08 00 01 'r' 09 00 02 'cd' 'hi'",
            "30 0F 00 01 't' 09 0B 01 0B 80 01 08 00 01 'r' 'hi'",
        ],
    };
    texts.iter().map(|text| bytes(text)).collect()
}

/// A change to a stream of bytes: at a place (of 0 to 1), overwrite, insert or remove.
type Spoil = (f64, u8, u8);

fn spoilt(mut stream: Vec<u8>, spoils: &[Spoil]) -> Vec<u8> {
    for &(place, how, byte) in spoils {
        let at = (place * stream.len() as f64) as usize;
        match how % 4 {
            _ if at >= stream.len() => stream.push(byte),
            0 => stream[at] = byte,
            1 => stream[at] ^= 1 << (byte % 8),
            2 => stream.insert(at, byte),
            _ => drop(stream.remove(at)),
        }
    }
    stream
}

fn streams(protocol: Protocol) -> impl Strategy<Value = Vec<u8>> {
    let packets = broker_packets(protocol);
    let valid = prop::collection::vec(0..packets.len(), 1..6);
    let spoils = prop::collection::vec((0.0..1.0, any::<u8>(), any::<u8>()), 0..4);
    let mutated = (valid, spoils).prop_map(move |(indexes, spoils)| {
        spoilt(indexes.into_iter().flat_map(|index| packets[index].clone()).collect(), &spoils)
    });
    prop_oneof![4 => mutated, 1 => prop::collection::vec(any::<u8>(), 0..64)]
}

fn assert_split_does_not_matter(protocol: Protocol, stream: &[u8], at: f64) {
    // Small enough that oversize packets are among them.
    const MAX: u32 = 30;
    let whole = receive(protocol, MAX, &[stream]);
    let (one, two) = stream.split_at((at * stream.len() as f64) as usize);
    assert_eq!(whole, receive(protocol, MAX, &[one, two]));
    let single: Vec<_> = stream.chunks(1).collect();
    assert_eq!(whole, receive(protocol, MAX, &single));
    receive(protocol, 4096, &[stream]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..Default::default() })]

    #[test]
    fn no_bytes_make_3_1_1_panic_or_depend_on_how_they_arrive(stream in streams(V4), at in 0.0..1.0) {
        assert_split_does_not_matter(V4, &stream, at);
    }

    #[test]
    fn no_bytes_make_5_0_panic_or_depend_on_how_they_arrive(stream in streams(V5), at in 0.0..1.0) {
        assert_split_does_not_matter(V5, &stream, at);
    }
}

#[test]
fn the_packets_the_property_spoils_are_good_ones() {
    for protocol in [V4, V5] {
        for packet in broker_packets(protocol) {
            let heard = receive(protocol, MAX_PACKET, &[&packet]);
            assert!(heard.iter().all(|heard| !heard.starts_with("error")), "{heard:?}");
        }
    }
}

#[test]
fn a_link_is_unpinned_and_can_be_sent_to_another_thread() {
    fn sendable<T: Send + Unpin>() {}
    sendable::<Link<DuplexStream>>();
    sendable::<Link<fieldpost::uplink::link::Stream>>();
}

fn subscription(filter: String, qos: Qos) -> Subscription {
    Subscription { filter, qos, retained: true }
}
