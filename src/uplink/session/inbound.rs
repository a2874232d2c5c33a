//! What the broker publishes to us (MQTT 5.0 section 4.3, receiver side).
//!
//! Invariant: PUBACK, PUBREC and PUBCOMP follow the commit of what they acknowledge.

use super::begin::filter_matches;
use super::{Counted, Event, Session};
use crate::message::{PacketId, Qos};
use crate::turn::{Change, Inbound};
use crate::uplink::packet::{Packet, Protocol, Publish, ReasonCode};

impl Session {
    pub(super) fn on_publish(&mut self, publish: Publish) {
        let (id, qos) = (publish.id, publish.qos);
        if publish.topic == self.settings.canary || publish.topic == self.settings.presence {
            if publish.topic == self.settings.presence {
                self.events.push(Event::Presence(publish.payload));
            } else if publish.payload == self.nonce {
                self.on_echo();
            }
            return self.acknowledge_unrecorded(qos, id, ReasonCode::SUCCESS);
        }
        if !self.settings.commands.iter().any(|(filter, _)| filter_matches(filter, publish.topic.as_str())) {
            self.count(Counted::InboundRefused, 1);
            return self.acknowledge_unrecorded(qos, id, ReasonCode::SUCCESS);
        }
        let hash = content_hash(&publish);
        let inbound = Inbound {
            topic: publish.topic,
            payload: publish.payload,
            qos,
            retain: publish.retain,
            response_topic: publish.response_topic,
            correlation_data: publish.correlation_data,
        };
        match (qos, id) {
            (Qos::ExactlyOnce, Some(id)) => {
                if self.rx_open.get(&id) == Some(&hash) {
                    self.count(Counted::InboundRepeated, 1);
                } else {
                    // Same identifier, other content: a new message, whatever DUP says. The broker may use
                    // an identifier again only after PUBCOMP, so ours was lost.
                    self.rx_open.insert(id, hash);
                    self.count(Counted::InboundRecorded, 1);
                    self.pending.push(Change::InboundOpened { id, hash, inbound });
                }
                self.gated.push(Packet::PubRec(id, ReasonCode::SUCCESS));
            }
            (_, id) => {
                self.count(Counted::InboundRecorded, 1);
                self.pending.push(Change::Inbound { id, inbound });
                self.gated.extend(id.map(|id| Packet::PubAck(id, ReasonCode::SUCCESS)));
            }
        }
    }

    pub(super) fn on_oversize(&mut self, qos: Qos, id: Option<PacketId>) {
        self.count(Counted::InboundRefused, 1);
        self.acknowledge_unrecorded(qos, id, self.no_room());
    }

    /// 3.1.1 has no way to refuse, and a message without an answer would come again for ever.
    pub(super) fn no_room(&self) -> ReasonCode {
        match self.settings.protocol {
            Protocol::V5 => ReasonCode::QUOTA_EXCEEDED,
            Protocol::V311 => ReasonCode::SUCCESS,
        }
    }

    /// Acknowledges what is not recorded: nothing has to be committed for it. The PUBREL that may follow
    /// finds nothing open and is answered all the same.
    fn acknowledge_unrecorded(&mut self, qos: Qos, id: Option<PacketId>, reason: ReasonCode) {
        let Some(id) = id else { return };
        match qos {
            Qos::AtMostOnce => {}
            Qos::AtLeastOnce => self.send(Packet::PubAck(id, reason)),
            Qos::ExactlyOnce => self.send(Packet::PubRec(id, reason)),
        }
    }

    pub(super) fn on_pubrel(&mut self, id: PacketId) {
        if self.rx_open.remove(&id).is_some() {
            self.pending.push(Change::InboundReleased(id));
            self.gated.push(Packet::PubComp(id, ReasonCode::SUCCESS));
        } else {
            // Our PUBCOMP was lost, or we forgot: without an answer the broker asks for ever.
            self.gated.push(Packet::PubComp(id, self.not_found()));
        }
    }

    fn not_found(&self) -> ReasonCode {
        match self.settings.protocol {
            Protocol::V5 => ReasonCode::PACKET_IDENTIFIER_NOT_FOUND,
            Protocol::V311 => ReasonCode::SUCCESS,
        }
    }
}

/// FNV-1a over everything that makes a message what it is; stable across versions of this program, because
/// it is kept in the database.
fn content_hash(publish: &Publish) -> u128 {
    let fields: [&[u8]; 4] = [
        publish.topic.as_str().as_bytes(),
        &publish.payload,
        publish.response_topic.as_deref().unwrap_or_default().as_bytes(),
        publish.correlation_data.as_deref().unwrap_or_default(),
    ];
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let mut add = |byte: u8| hash = (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013B);
    for field in fields {
        (field.len() as u64).to_le_bytes().into_iter().for_each(&mut add);
        field.iter().copied().for_each(&mut add);
    }
    hash
}
