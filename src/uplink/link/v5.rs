//! MQTT 5.0 packets to and from rumqttc's. Pure.
//!
//! Invariant: what is decoded here has the meaning the standard gives it, or is an error; rumqttc decides
//! nothing about it that `wire` has not checked first.

use bytes::{BufMut, Bytes, BytesMut};
use rumqttc::v5::mqttbytes::{Error, QoS, v5};

use super::wire::{
    Decoded, Frame, Malformed, Properties, inbound_topic, kind, packet_id, return_code,
    without_subscription_identifiers,
};
use super::{LinkError, unsendable};
use crate::message::{PacketId, Qos, Topic, TopicError};
use crate::uplink::packet::{ConnAck, Connect, Limits, Packet, Publish, ReasonCode, Subscription, Will};

/// Reads one whole frame.
pub(super) fn decode(frame: Frame) -> Result<Decoded, Malformed> {
    Ok(Decoded::Packet(match frame.kind() {
        kind::CONNACK => conn_ack(frame)?,
        kind::PUBLISH => return inbound_publish(frame),
        kind::PUBACK => acknowledgement(frame, Packet::PubAck)?,
        kind::PUBREC => acknowledgement(frame, Packet::PubRec)?,
        kind::PUBREL => acknowledgement(frame, Packet::PubRel)?,
        kind::PUBCOMP => acknowledgement(frame, Packet::PubComp)?,
        kind::SUBACK => codes(frame, Packet::SubAck)?,
        kind::UNSUBACK => codes(frame, Packet::UnsubAck)?,
        kind::PINGRESP => Packet::PingResp,
        _ => disconnect(frame)?,
    }))
}

fn read(frame: Frame) -> Result<v5::Packet, Malformed> {
    let kind = frame.kind();
    let mut bytes = frame.bytes;
    v5::Packet::read(&mut bytes, None).map_err(|why| Malformed::new(kind, words(&why)))
}

/// rumqttc calls the code of any packet "response for connect".
fn words(error: &Error) -> String {
    match error {
        Error::InvalidConnectReturnCode(code) | Error::InvalidSubscribeReasonCode(code) => {
            format!("it cannot carry reason code {code:#04x} (section 2.4)")
        }
        other => other.to_string(),
    }
}

/// The properties at `start`, which the packet must end with.
fn last_properties(frame: &Frame, start: usize) -> Result<Properties, Malformed> {
    let properties = Properties::walk(frame.body(), start).map_err(|why| frame.malformed(why))?;
    if properties.end != frame.body().len() {
        return Err(frame.malformed("bytes after its properties"));
    }
    Ok(properties)
}

fn conn_ack(frame: Frame) -> Result<Packet, Malformed> {
    // A broker that knows only older versions refuses in their form: without a Property Length.
    if let &[_, code] = frame.body() {
        return match return_code(code) {
            Some(reason) if reason.is_error() => Ok(refusal(reason)),
            _ => Err(frame.malformed("it has no Property Length, as in MQTT 3.1.1")),
        };
    }
    last_properties(&frame, 2)?;
    let (flags, code) = (frame.body()[0], frame.body()[1]);
    if flags > 1 {
        return Err(frame.malformed("reserved bits set in its flags (MQTT-3.2.2-1)"));
    }
    let v5::Packet::ConnAck(read) = read(frame)? else { return Err(confused(kind::CONNACK)) };
    let reason = ReasonCode(code);
    let mut ack = ConnAck {
        // MQTT-3.2.2-6: a refusal has no session, whatever the flag says.
        session_present: flags == 1 && !reason.is_error(),
        reason,
        reason_string: None,
        limits: Limits::default(),
    };
    if let Some(properties) = read.properties {
        ack.limits = limits(&properties)?;
        ack.reason_string = properties.reason_string;
    }
    Ok(Packet::ConnAck(ack))
}

fn refusal(reason: ReasonCode) -> Packet {
    Packet::ConnAck(ConnAck {
        session_present: false,
        reason,
        reason_string: None,
        limits: Limits::default(),
    })
}

/// rumqttc gave another packet than its first byte says; it does not, but it need not be trusted.
fn confused(kind: u8) -> Malformed {
    Malformed::new(kind, "the decoder took it for another packet")
}

/// MQTT 5.0 section 3.2.2.3, where a value outside its range is a Protocol Error; rumqttc takes any.
fn limits(properties: &v5::ConnAckProperties) -> Result<Limits, Malformed> {
    let wrong = |why: &'static str| Err(Malformed::new(kind::CONNACK, why));
    if properties.receive_max == Some(0) {
        return wrong("Receive Maximum 0 (section 3.2.2.3.3)");
    }
    if properties.max_qos.is_some_and(|qos| qos > 1) {
        return wrong("Maximum QoS other than 0 or 1 (section 3.2.2.3.4)");
    }
    if properties.retain_available.is_some_and(|available| available > 1) {
        return wrong("Retain Available other than 0 or 1 (section 3.2.2.3.5)");
    }
    if properties.max_packet_size == Some(0) {
        return wrong("Maximum Packet Size 0 (section 3.2.2.3.6)");
    }
    Ok(Limits {
        receive_max: properties.receive_max,
        max_qos: properties.max_qos,
        retain_available: properties.retain_available.map(|available| available == 1),
        max_packet_bytes: properties.max_packet_size,
        keep_alive_s: properties.server_keep_alive,
        session_expiry_s: properties.session_expiry_interval,
    })
}

fn inbound_publish(frame: Frame) -> Result<Decoded, Malformed> {
    let body = frame.body();
    let topic = usize::from(u16::from_be_bytes([body[0], body[1]]));
    let identifier = if frame.bytes[0] & 0b0110 == 0 { 0 } else { 2 };
    let properties = Properties::walk(body, 2 + topic + identifier).map_err(|why| frame.malformed(why))?;
    if properties.topic_alias {
        return Err(frame.malformed("a Topic Alias, of which we allow none (MQTT-3.1.2-26)"));
    }
    let frame = without_subscription_identifiers(frame, &properties);
    let v5::Packet::Publish(publish) = read(frame)? else { return Err(confused(kind::PUBLISH)) };
    let qos = match publish.qos {
        QoS::AtMostOnce => Qos::AtMostOnce,
        QoS::AtLeastOnce => Qos::AtLeastOnce,
        QoS::ExactlyOnce => Qos::ExactlyOnce,
    };
    let id = match qos {
        Qos::AtMostOnce => None,
        _ => Some(packet_id(kind::PUBLISH, publish.pkid)?),
    };
    let name = std::str::from_utf8(&publish.topic)
        .map_err(|_| Malformed::new(kind::PUBLISH, "its topic is not UTF-8 (MQTT-1.5.4-1)"))?;
    let Some(topic) = inbound_topic(name)? else {
        return Ok(Decoded::BrokerOwned { topic: name.to_owned(), qos, id });
    };
    let properties = publish.properties.unwrap_or_default();
    check_response_topic(properties.response_topic.as_deref())?;
    Ok(Decoded::Packet(Packet::Publish(Box::new(Publish {
        dup: publish.dup,
        qos,
        retain: publish.retain,
        topic,
        id,
        payload: publish.payload,
        message_expiry_s: properties.message_expiry_interval,
        response_topic: properties.response_topic,
        correlation_data: properties.correlation_data,
    }))))
}

/// A Response Topic has no wildcards (MQTT-3.3.2-14). One that starts with `$` is legal.
fn check_response_topic(name: Option<&str>) -> Result<(), Malformed> {
    match name.map(Topic::new) {
        None | Some(Ok(_) | Err(TopicError::Dollar)) => Ok(()),
        Some(Err(wrong)) => Err(Malformed::new(kind::PUBLISH, format!("its Response Topic: {wrong}"))),
    }
}

fn acknowledgement(
    mut frame: Frame,
    packet: fn(PacketId, ReasonCode) -> Packet,
) -> Result<Packet, Malformed> {
    let kind = frame.kind();
    let body = frame.body();
    let id = packet_id(kind, u16::from_be_bytes([body[0], body[1]]))?;
    if body.len() > 3 {
        last_properties(&frame, 3)?;
    }
    let reason = ReasonCode(frame.body().get(2).copied().unwrap_or(0));
    // PUBACK and PUBREC have nine codes of their own (sections 3.4.2.1, 3.5.2.1), and rumqttc knows no other.
    // But EMQX refuses with 0x93, and any code of section 2.4 from 0x80 on says clearly enough "not taken":
    // closing the connection over it would send the same message again, for ever.
    if matches!(kind, kind::PUBACK | kind::PUBREC) && matches!(reason.0, 0x80..=0xA2) {
        let at = frame.body + 2;
        frame.bytes[at] = ReasonCode::UNSPECIFIED_ERROR.0;
    }
    read(frame)?;
    Ok(packet(id, reason))
}

/// SUBACK and UNSUBACK: a Packet Identifier, properties, and one code a filter.
fn codes(frame: Frame, packet: fn(PacketId, Vec<ReasonCode>) -> Packet) -> Result<Packet, Malformed> {
    let body = frame.body();
    let id = packet_id(frame.kind(), u16::from_be_bytes([body[0], body[1]]))?;
    let end = Properties::walk(body, 2).map_err(|why| frame.malformed(why))?.end;
    let codes = body[end..].iter().map(|&code| ReasonCode(code)).collect();
    read(frame)?;
    Ok(packet(id, codes))
}

fn disconnect(frame: Frame) -> Result<Packet, Malformed> {
    let reason = match *frame.body() {
        // Section 3.14.2.1: no code means normal disconnection. rumqttc refuses it.
        [] => return Ok(Packet::Disconnect(ReasonCode::SUCCESS)),
        [code] | [code, ..] => code,
    };
    // Section 3.14.2.2.1: with a Remaining Length below 2 there are no properties. rumqttc would wait for them.
    if frame.body().len() == 1 {
        return match v5::DisconnectReasonCode::try_from(reason) {
            Ok(_) => Ok(Packet::Disconnect(ReasonCode(reason))),
            Err(why) => Err(frame.malformed(words(&why))),
        };
    }
    last_properties(&frame, 1)?;
    read(frame)?;
    Ok(Packet::Disconnect(ReasonCode(reason)))
}

/// Appends the packet to `out`; after an error `out` may hold part of it.
pub(super) fn encode(packet: &Packet, out: &mut BytesMut) -> Result<(), LinkError> {
    if let Packet::Disconnect(reason) = packet {
        write_disconnect(packet, *reason, out)?;
        return Ok(());
    }
    let written = match translate(packet)? {
        // rumqttc patches the flags byte at an index counted from the start of the buffer, not of the packet.
        connect @ v5::Packet::Connect(..) => {
            let mut alone = BytesMut::new();
            let written = connect.write(&mut alone, None);
            out.extend_from_slice(&alone);
            written
        }
        other => other.write(out, None),
    };
    written.map(drop).map_err(|why| unsendable(packet, why.to_string()))
}

/// Written here: rumqttc 0.25.1 writes a reason without properties with a Remaining Length of 1, and two bytes.
fn write_disconnect(packet: &Packet, reason: ReasonCode, out: &mut BytesMut) -> Result<(), LinkError> {
    v5::DisconnectReasonCode::try_from(reason.0).map_err(|why| unsendable(packet, words(&why)))?;
    match reason {
        ReasonCode::SUCCESS => out.put_slice(&[0xE0, 0]),
        ReasonCode(code) => out.put_slice(&[0xE0, 1, code]),
    }
    Ok(())
}

/// How many bytes [`encode`] would write.
pub(super) fn encoded_len(packet: &Packet) -> Result<usize, LinkError> {
    match packet {
        Packet::Disconnect(ReasonCode::SUCCESS) => Ok(2),
        Packet::Disconnect(_) => Ok(3),
        _ => translate(packet).map(|translated| translated.size()),
    }
}

/// The reason codes of PUBACK and PUBREC (sections 3.4.2.1 and 3.5.2.1), which rumqttc has as two types.
macro_rules! publish_reason {
    ($reason:ident, $code:expr) => {
        match $code.0 {
            0x00 => Some(v5::$reason::Success),
            0x10 => Some(v5::$reason::NoMatchingSubscribers),
            0x80 => Some(v5::$reason::UnspecifiedError),
            0x83 => Some(v5::$reason::ImplementationSpecificError),
            0x87 => Some(v5::$reason::NotAuthorized),
            0x90 => Some(v5::$reason::TopicNameInvalid),
            0x91 => Some(v5::$reason::PacketIdentifierInUse),
            0x97 => Some(v5::$reason::QuotaExceeded),
            0x99 => Some(v5::$reason::PayloadFormatInvalid),
            _ => None,
        }
    };
}

/// The reason codes of PUBREL and PUBCOMP (sections 3.6.2.1 and 3.7.2.1).
macro_rules! release_reason {
    ($reason:ident, $code:expr) => {
        match $code.0 {
            0x00 => Some(v5::$reason::Success),
            0x92 => Some(v5::$reason::PacketIdentifierNotFound),
            _ => None,
        }
    };
}

fn translate(packet: &Packet) -> Result<v5::Packet, LinkError> {
    let unknown =
        |code: &ReasonCode| unsendable(packet, format!("it cannot carry reason code {:#04x}", code.0));
    Ok(match packet {
        Packet::Connect(connect) => translate_connect(connect),
        Packet::Publish(publish) => v5::Packet::Publish(translate_publish(publish)),
        Packet::PubAck(id, code) => v5::Packet::PubAck(v5::PubAck {
            pkid: id.get(),
            reason: publish_reason!(PubAckReason, code).ok_or_else(|| unknown(code))?,
            properties: None,
        }),
        Packet::PubRec(id, code) => v5::Packet::PubRec(v5::PubRec {
            pkid: id.get(),
            reason: publish_reason!(PubRecReason, code).ok_or_else(|| unknown(code))?,
            properties: None,
        }),
        Packet::PubRel(id, code) => v5::Packet::PubRel(v5::PubRel {
            pkid: id.get(),
            reason: release_reason!(PubRelReason, code).ok_or_else(|| unknown(code))?,
            properties: None,
        }),
        Packet::PubComp(id, code) => v5::Packet::PubComp(v5::PubComp {
            pkid: id.get(),
            reason: release_reason!(PubCompReason, code).ok_or_else(|| unknown(code))?,
            properties: None,
        }),
        Packet::Subscribe(id, filters) => v5::Packet::Subscribe(v5::Subscribe {
            pkid: id.get(),
            filters: filters.iter().map(translate_subscription).collect(),
            properties: None,
        }),
        Packet::Unsubscribe(id, filters) => v5::Packet::Unsubscribe(v5::Unsubscribe {
            pkid: id.get(),
            filters: filters.clone(),
            properties: None,
        }),
        Packet::PingReq => v5::Packet::PingReq(v5::PingReq),
        _ => return Err(unsendable(packet, "a client may not send this packet")),
    })
}

fn translate_subscription(subscription: &Subscription) -> v5::Filter {
    let mut filter = v5::Filter::new(subscription.filter.clone(), translate_qos(subscription.qos));
    if !subscription.retained {
        filter.retain_forward_rule = v5::RetainForwardRule::Never;
    }
    filter
}

fn translate_connect(connect: &Connect) -> v5::Packet {
    let properties = v5::ConnectProperties {
        session_expiry_interval: Some(connect.session_expiry_s),
        // Zero is a Protocol Error in both (sections 3.1.2.11.3 and 3.1.2.11.4).
        receive_maximum: Some(connect.receive_max).filter(|&max| max > 0),
        max_packet_size: Some(connect.max_packet_bytes).filter(|&max| max > 0),
        // A Reason String says more than a code to the person who reads the log.
        request_problem_info: Some(1),
        ..v5::ConnectProperties::new()
    };
    v5::Packet::Connect(
        v5::Connect {
            keep_alive: connect.keep_alive_s,
            client_id: connect.client_id.clone(),
            clean_start: connect.clean,
            properties: Some(properties),
        },
        connect.will.as_ref().map(translate_will),
        Some(v5::Login {
            username: connect.username.clone().unwrap_or_default(),
            password: connect.password.clone().unwrap_or_default(),
        }),
    )
}

/// Without properties: a Will Delay Interval of 0 is the default (section 3.1.3.2.2).
fn translate_will(will: &Will) -> v5::LastWill {
    v5::LastWill {
        topic: Bytes::copy_from_slice(will.topic.as_str().as_bytes()),
        message: will.payload.clone(),
        qos: translate_qos(will.qos),
        retain: will.retain,
        properties: None,
    }
}

fn translate_publish(publish: &Publish) -> v5::Publish {
    let plain = publish.message_expiry_s.is_none()
        && publish.response_topic.is_none()
        && publish.correlation_data.is_none();
    v5::Publish {
        dup: publish.dup,
        qos: translate_qos(publish.qos),
        retain: publish.retain,
        topic: Bytes::copy_from_slice(publish.topic.as_str().as_bytes()),
        pkid: publish.id.map_or(0, |id| id.get()),
        payload: publish.payload.clone(),
        properties: (!plain).then(|| v5::PublishProperties {
            message_expiry_interval: publish.message_expiry_s,
            response_topic: publish.response_topic.clone(),
            correlation_data: publish.correlation_data.clone(),
            ..Default::default()
        }),
    }
}

fn translate_qos(qos: Qos) -> QoS {
    match qos {
        Qos::AtMostOnce => QoS::AtMostOnce,
        Qos::AtLeastOnce => QoS::AtLeastOnce,
        Qos::ExactlyOnce => QoS::ExactlyOnce,
    }
}
