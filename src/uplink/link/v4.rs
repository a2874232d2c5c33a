//! MQTT 3.1.1 packets to and from rumqttc's. Pure.
//!
//! Invariant: what is decoded here has the meaning the standard gives it, or is an error; rumqttc decides
//! nothing about it that `wire` has not checked first.

use bytes::BytesMut;
use rumqttc::mqttbytes::{QoS, v4};

use super::wire::{Decoded, Frame, Malformed, inbound_topic, kind, packet_id, return_code};
use super::{LinkError, unsendable};
use crate::message::Qos;
use crate::uplink::packet::{ConnAck, Connect, Limits, Packet, Publish, ReasonCode};

/// Reads one whole frame.
pub(super) fn decode(frame: Frame) -> Result<Decoded, Malformed> {
    let kind = frame.kind();
    if kind == kind::CONNACK {
        return conn_ack(&frame).map(Decoded::Packet);
    }
    let malformed = |why: rumqttc::mqttbytes::Error| Malformed::new(kind, why.to_string());
    let mut bytes = frame.bytes;
    let acknowledged = |id| Ok((packet_id(kind, id)?, ReasonCode::SUCCESS));
    Ok(Decoded::Packet(match v4::Packet::read(&mut bytes, usize::MAX).map_err(malformed)? {
        v4::Packet::Publish(publish) => return inbound_publish(publish),
        v4::Packet::PubAck(ack) => acknowledged(ack.pkid).map(|(id, code)| Packet::PubAck(id, code))?,
        v4::Packet::PubRec(ack) => acknowledged(ack.pkid).map(|(id, code)| Packet::PubRec(id, code))?,
        v4::Packet::PubRel(ack) => acknowledged(ack.pkid).map(|(id, code)| Packet::PubRel(id, code))?,
        v4::Packet::PubComp(ack) => acknowledged(ack.pkid).map(|(id, code)| Packet::PubComp(id, code))?,
        v4::Packet::SubAck(ack) => {
            let codes = ack.return_codes.into_iter().map(granted).collect();
            Packet::SubAck(packet_id(kind, ack.pkid)?, codes)
        }
        v4::Packet::UnsubAck(ack) => Packet::UnsubAck(packet_id(kind, ack.pkid)?, Vec::new()),
        v4::Packet::PingResp => Packet::PingResp,
        _ => return Err(Malformed::new(kind, "a broker may not send this packet")),
    }))
}

/// Read here: rumqttc ignores the reserved bits of the acknowledge flags (MQTT-3.2.2-1).
fn conn_ack(frame: &Frame) -> Result<Packet, Malformed> {
    let &[flags, code] = frame.body() else { return Err(frame.malformed("it must have two bytes")) };
    if flags > 1 {
        return Err(frame.malformed("reserved bits set in its flags (section 3.2.2.1)"));
    }
    let reason = return_code(code)
        .ok_or_else(|| frame.malformed(format!("unknown return code {code} (section 3.2.2.3)")))?;
    Ok(Packet::ConnAck(ConnAck {
        // MQTT-3.2.2-4: a refusal has no session, whatever the flag says.
        session_present: flags == 1 && !reason.is_error(),
        reason,
        reason_string: None,
        limits: Limits::default(),
    }))
}

fn inbound_publish(publish: v4::Publish) -> Result<Decoded, Malformed> {
    let qos = match publish.qos {
        QoS::AtMostOnce => Qos::AtMostOnce,
        QoS::AtLeastOnce => Qos::AtLeastOnce,
        QoS::ExactlyOnce => Qos::ExactlyOnce,
    };
    let id = match qos {
        Qos::AtMostOnce => None,
        _ => Some(packet_id(kind::PUBLISH, publish.pkid)?),
    };
    let Some(topic) = inbound_topic(&publish.topic)? else {
        return Ok(Decoded::BrokerOwned { topic: publish.topic, qos, id });
    };
    Ok(Decoded::Packet(Packet::Publish(Box::new(Publish {
        dup: publish.dup,
        qos,
        retain: publish.retain,
        topic,
        id,
        payload: publish.payload,
        message_expiry_s: None,
        response_topic: None,
        correlation_data: None,
    }))))
}

fn granted(code: v4::SubscribeReasonCode) -> ReasonCode {
    match code {
        v4::SubscribeReasonCode::Success(qos) => ReasonCode(qos as u8),
        v4::SubscribeReasonCode::Failure => ReasonCode::UNSPECIFIED_ERROR,
    }
}

/// Appends the packet to `out`; after an error `out` may hold part of it.
pub(super) fn encode(packet: &Packet, out: &mut BytesMut) -> Result<(), LinkError> {
    let written = match translate(packet)? {
        // rumqttc patches the flags byte at an index counted from the start of the buffer, not of the packet.
        connect @ v4::Packet::Connect(_) => {
            let mut alone = BytesMut::new();
            let written = connect.write(&mut alone, usize::MAX);
            out.extend_from_slice(&alone);
            written
        }
        other => other.write(out, usize::MAX),
    };
    written.map(drop).map_err(|why| unsendable(packet, why.to_string()))
}

/// How many bytes [`encode`] would write.
pub(super) fn encoded_len(packet: &Packet) -> Result<usize, LinkError> {
    translate(packet).map(|translated| translated.size())
}

fn translate(packet: &Packet) -> Result<v4::Packet, LinkError> {
    Ok(match packet {
        Packet::Connect(connect) => v4::Packet::Connect(translate_connect(packet, connect)?),
        Packet::Publish(publish) => v4::Packet::Publish(v4::Publish {
            dup: publish.dup,
            qos: translate_qos(publish.qos),
            retain: publish.retain,
            topic: publish.topic.as_str().to_owned(),
            pkid: publish.id.map_or(0, |id| id.get()),
            payload: publish.payload.clone(),
        }),
        // Acknowledgements of 3.1.1 carry no reason: whatever it is, the exchange goes on.
        Packet::PubAck(id, _) => v4::Packet::PubAck(v4::PubAck::new(id.get())),
        Packet::PubRec(id, _) => v4::Packet::PubRec(v4::PubRec::new(id.get())),
        Packet::PubRel(id, _) => v4::Packet::PubRel(v4::PubRel::new(id.get())),
        Packet::PubComp(id, _) => v4::Packet::PubComp(v4::PubComp::new(id.get())),
        Packet::Subscribe(id, filters) => {
            let filters = filters
                .iter()
                .map(|s| v4::SubscribeFilter::new(s.filter.clone(), translate_qos(s.qos)))
                .collect();
            v4::Packet::Subscribe(v4::Subscribe { pkid: id.get(), filters })
        }
        Packet::Unsubscribe(id, filters) => {
            v4::Packet::Unsubscribe(v4::Unsubscribe { pkid: id.get(), topics: filters.clone() })
        }
        Packet::PingReq => v4::Packet::PingReq,
        Packet::Disconnect(_) => v4::Packet::Disconnect,
        _ => return Err(unsendable(packet, "a client may not send this packet")),
    })
}

fn translate_connect(packet: &Packet, connect: &Connect) -> Result<v4::Connect, LinkError> {
    let username = connect.username.clone().unwrap_or_default();
    let password = connect.password.clone().unwrap_or_default();
    if username.is_empty() && !password.is_empty() {
        return Err(unsendable(packet, "MQTT 3.1.1 has no password without a user name (MQTT-3.1.2-22)"));
    }
    Ok(v4::Connect {
        protocol: rumqttc::mqttbytes::Protocol::V4,
        keep_alive: connect.keep_alive_s,
        client_id: connect.client_id.clone(),
        clean_session: connect.clean,
        last_will: connect.will.as_ref().map(|will| v4::LastWill {
            topic: will.topic.as_str().to_owned(),
            message: will.payload.clone(),
            qos: translate_qos(will.qos),
            retain: will.retain,
        }),
        login: Some(v4::Login { username, password }),
    })
}

fn translate_qos(qos: Qos) -> QoS {
    match qos {
        Qos::AtMostOnce => QoS::AtMostOnce,
        Qos::AtLeastOnce => QoS::AtLeastOnce,
        Qos::ExactlyOnce => QoS::ExactlyOnce,
    }
}
