//! What we publish: our own messages, records in flight, their acknowledgements and refusals, the window.
//!
//! Invariants: PUBREL follows the commit of its PUBREC; never more in flight than this connection's limits allow.

use bytes::Bytes;

use super::{
    Broken, Counted, FLIGHT_MAX_BYTES, Flight, HOLD_LANE_MS, HOLD_TOPIC_MS, Holding, Left, OWN_ID_MAX,
    OWN_WAITING_MAX, Own, OwnMessage, Phase, REFUSED_MAX, Refusal, Session, Stage, Todo,
};
use crate::message::{Lane, Message, PacketId, Qos, Record, Seq, Topic};
use crate::turn::{Change, Hold, Offer, Taken, publish_bytes, record_bytes};
use crate::uplink::packet::{Packet, Protocol, Publish, ReasonCode};

impl Session {
    /// Publishes something of our own at QoS 1 (or what the broker allows), outside the store: presence,
    /// health. It waits for room like any other message, and is not repeated on another connection.
    /// `false`: too many wait already, or the broker takes none so large.
    pub fn publish_presence(&mut self, topic: Topic, payload: Bytes, retain: bool, now_ms: u64) -> bool {
        let bytes = publish_bytes(topic.as_str(), &payload, None, None);
        if self.own_waiting.len() >= OWN_WAITING_MAX || self.is_too_large(bytes) {
            return false;
        }
        self.own_waiting.push_back(OwnMessage { topic, payload, retain, own: Own::Presence });
        self.pump_own(now_ms);
        true
    }

    pub(super) fn pump_own(&mut self, now_ms: u64) {
        let settled = match self.phase {
            Phase::Connack | Phase::Judging { .. } | Phase::Settling { .. } | Phase::Replacing => false,
            Phase::Subscribing | Phase::Testing { .. } | Phase::Proving | Phase::Running | Phase::Closing => {
                true
            }
        };
        while settled && !self.own_waiting.is_empty() && self.own_room() > 0 {
            let Some(message) = self.own_waiting.pop_front() else { break };
            self.publish_own(message, now_ms);
        }
    }

    pub(super) fn publish_own(&mut self, message: OwnMessage, now_ms: u64) {
        let OwnMessage { topic, payload, retain, own } = message;
        let retain = self.may_retain(retain);
        let qos = Qos::AtLeastOnce.min(self.max_qos());
        let id = if qos == Qos::AtMostOnce {
            None
        } else {
            let Some(id) = self.own_id(own) else { return };
            self.progress_from_idle(now_ms);
            self.in_flight += 1;
            self.timed.get_or_insert((id, now_ms));
            Some(id)
        };
        self.send(Packet::Publish(Box::new(publish(topic, payload, qos, retain, id, None))));
    }

    /// Sends a QoS 0 message, if messages flow.
    pub fn publish_qos0(&mut self, message: Message) -> bool {
        let payload = message.payload.unnumbered();
        if self.phase != Phase::Running {
            return false;
        }
        let retain = self.may_retain(message.retain);
        if retain != message.retain {
            self.count(Counted::Downgraded, 1);
        }
        let packet = publish(message.topic, payload, Qos::AtMostOnce, retain, None, None);
        self.send(Packet::Publish(Box::new(packet)));
        true
    }

    /// RETAIN, where the broker allows it; counted where it does not.
    fn may_retain(&mut self, retain: bool) -> bool {
        let allowed = self.limits.retain_available != Some(false);
        self.count(Counted::DowngradedRetain, u64::from(retain && !allowed));
        retain && allowed
    }

    pub(super) fn own_id(&mut self, own: Own) -> Option<PacketId> {
        for _ in 0..OWN_ID_MAX {
            let id = PacketId::new(self.next_own_id)?;
            self.next_own_id = self.next_own_id % OWN_ID_MAX + 1;
            if let std::collections::btree_map::Entry::Vacant(entry) = self.own.entry(id) {
                entry.insert(own);
                return Some(id);
            }
        }
        None
    }

    pub(super) fn on_puback(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        if let Some(own) = self.own.get(&id) {
            return match own {
                Own::Subscribe(_) => self.count(Counted::AcksUnexpected, 1),
                Own::Presence | Own::Canary => self.on_own_puback(id, reason, now_ms),
            };
        }
        match self.flights.get(&id) {
            Some(flight) if flight.stage == Stage::AwaitPuback && flight.sent => {}
            _ => return self.count(Counted::AcksUnexpected, 1),
        }
        let Some(flight) = self.land(id, now_ms) else { return };
        if reason.is_error() {
            return self.refuse(flight, reason, now_ms);
        }
        self.accepted(flight.lane, flight.seq, reason);
        self.pending.push(Change::Acknowledged { lane: flight.lane, seq: flight.seq });
    }

    fn on_own_puback(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        let own = self.own.remove(&id);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_progress_ms = now_ms;
        self.answered(id, now_ms);
        if own != Some(Own::Canary) {
            return;
        }
        match &mut self.phase {
            Phase::Testing { .. } if reason.is_error() => self.run(now_ms),
            Phase::Judging { .. } if reason.is_error() => self.canary_refused(reason, now_ms),
            // Not even we are subscribed.
            Phase::Judging { .. } if reason == ReasonCode::NO_MATCHING_SUBSCRIBERS => self.replace(),
            Phase::Judging { heard_ms, .. } | Phase::Testing { heard_ms, .. } => *heard_ms = Some(now_ms),
            _ => {}
        }
    }

    pub(super) fn on_pubrec(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        let Some(flight) = self.flights.get_mut(&id) else {
            self.count(Counted::AcksUnexpected, 1);
            if id.get() > OWN_ID_MAX && !reason.is_error() {
                // Whatever this was, PUBREL lets the broker forget it (MQTT 5.0 table 2-6, 0x92).
                self.send(Packet::PubRel(id, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND));
            }
            return;
        };
        match flight.stage {
            Stage::AwaitPubrec if flight.sent && reason.is_error() => {
                if let Some(flight) = self.land(id, now_ms) {
                    self.refuse(flight, reason, now_ms);
                }
            }
            Stage::AwaitPubrec if flight.sent => {
                flight.stage = Stage::AwaitPubcomp;
                flight.record = None;
                let (lane, seq) = (flight.lane, flight.seq);
                self.last_progress_ms = now_ms;
                self.answered(id, now_ms);
                self.accepted(lane, seq, reason);
                self.pending.push(Change::Received(id));
                match self.settings.broken {
                    Some(Broken::PubrelAfterCommit) => return self.release(id),
                    Some(Broken::WindowUntilPubcomp) => {
                        self.in_flight = self.in_flight.saturating_sub(1);
                        self.qos2_in_flight = self.qos2_in_flight.saturating_sub(1);
                    }
                    _ => {}
                }
                self.gated.push(Packet::PubRel(id, ReasonCode::SUCCESS));
            }
            Stage::Abandoned | Stage::Moved if reason.is_error() => {
                self.land(id, now_ms);
                self.pending.push(Change::Completed(id));
            }
            Stage::Abandoned | Stage::Moved => {}
            Stage::AwaitPubcomp if flight.released => {
                self.count(Counted::AcksUnexpected, 1);
                self.send(Packet::PubRel(id, ReasonCode::SUCCESS));
            }
            _ => self.count(Counted::AcksUnexpected, 1),
        }
    }

    pub(super) fn on_pubcomp(&mut self, id: PacketId, reason: ReasonCode, now_ms: u64) {
        match self.flights.get(&id) {
            Some(flight)
                if matches!(flight.stage, Stage::AwaitPubcomp | Stage::Abandoned | Stage::Moved)
                    && flight.released => {}
            _ => return self.count(Counted::AcksUnexpected, 1),
        }
        let Some(flight) = self.land(id, now_ms) else { return };
        if flight.stage == Stage::Abandoned {
            self.count(Counted::Abandoned, 1);
        } else if flight.stage == Stage::Moved {
            // Counted when it moved.
        } else if reason == ReasonCode::PACKET_IDENTIFIER_NOT_FOUND {
            // Our earlier PUBREL did it, or the broker forgot the identifier; with a message of this connection
            // it can only be the latter.
            self.count(Counted::Ambiguous, 1);
        }
        self.pending.push(Change::Completed(id));
    }

    /// Takes a flight out of the air.
    fn land(&mut self, id: PacketId, now_ms: u64) -> Option<Flight> {
        let flight = self.flights.remove(&id)?;
        self.last_progress_ms = now_ms;
        self.answered(id, now_ms);
        if flight.sent {
            self.in_flight = self.in_flight.saturating_sub(1);
            if flight.qos == Qos::ExactlyOnce {
                self.qos2_in_flight = self.qos2_in_flight.saturating_sub(1);
            }
        }
        Some(flight)
    }

    fn answered(&mut self, id: PacketId, now_ms: u64) {
        if let Some((_, sent_ms)) = self.timed.take_if(|(timed, _)| *timed == id) {
            self.round_trip_ms = Some(now_ms.saturating_sub(sent_ms));
        }
    }

    fn accepted(&mut self, lane: Lane, seq: Seq, reason: ReasonCode) {
        if reason == ReasonCode::NO_MATCHING_SUBSCRIBERS {
            self.count(Counted::NoMatchingSubscribers, 1);
        }
        if !self.refused.is_empty() {
            self.refused.remove(&(lane, seq));
        }
    }

    /// A failure code ended the exchange (MQTT 5.0 section 4.3): wait and retry, hold the lane, or give up.
    fn refuse(&mut self, flight: Flight, reason: ReasonCode, now_ms: u64) {
        let (lane, seq) = (flight.lane, flight.seq);
        let id = (flight.qos == Qos::ExactlyOnce).then_some(flight.id);
        let hopeless = is_hopeless(reason);
        if self.refused.len() >= REFUSED_MAX {
            self.refused.clear();
        }
        let refusal = self.refused.entry((lane, seq)).or_insert(Refusal { first_ms: now_ms, times: 0 });
        refusal.times += 1;
        let Refusal { first_ms, times } = *refusal;
        if hopeless || now_ms.saturating_sub(first_ms) >= self.settings.retry_refused_for_ms {
            self.refused.remove(&(lane, seq));
            self.count(Counted::DeadLettered, 1);
            return self.pending.push(Change::DeadLetter { id, lane, seq, reason: reason.0 });
        }
        let (hold, (first, longest)) = match reason {
            ReasonCode::NOT_AUTHORIZED => (Hold::Lane, HOLD_LANE_MS),
            _ => (Hold::Topic, HOLD_TOPIC_MS),
        };
        let hold_ms = first.saturating_mul(1 << (times - 1).min(16)).min(longest);
        self.count(Counted::RefusedForNow, 1);
        self.pending.push(Change::Refused { id, lane, seq, hold, hold_ms, reason: reason.0 });
        let Some(Record { topic, .. }) = flight.record else { return };
        let holding = Holding { lane, topic, hold, hold_ms, reason };
        self.hold_back_unsent(&holding);
        let overtakes = |other: &&Flight| {
            let record = other.record.as_ref();
            other.seq > seq
                && record.is_some_and(|other| (other.lane, &other.topic) == (lane, &holding.topic))
        };
        let overtaking = self.flights.values().filter(overtakes).count() as u64;
        self.holding.push(holding);
        self.count(Counted::OrderOvertaken, overtaking);
    }

    /// Gives back what was taken, still waits for room, and would overtake a refused message.
    pub(super) fn hold_back_unsent(&mut self, holding: &Holding) {
        let unsent = |flight: &Flight| !flight.sent && flight.left == Left::No;
        let held = self.flights.values().filter(|flight| {
            unsent(flight) && flight.record.as_ref().is_some_and(|record| holding.holds(record))
        });
        let ids: Vec<PacketId> = held.map(|flight| flight.id).collect();
        for id in ids {
            if let Some(Flight { qos, record: Some(record), .. }) = self.flights.remove(&id) {
                self.todo.retain(|todo| !matches!(todo, Todo::Flight(waiting) if *waiting == id));
                self.pending.push(held_back(holding, (qos == Qos::ExactlyOnce).then_some(id), &record));
            }
        }
        // What was found after a crash has no identifier yet.
        let pending = &mut self.pending;
        self.todo.retain(|todo| match todo {
            Todo::Older(record, _) if holding.holds(record) => {
                pending.push(held_back(holding, None, record));
                false
            }
            _ => true,
        });
    }

    /// Sends what the limits allow of what has to be resumed.
    pub(super) fn pump(&mut self, now_ms: u64) {
        self.pump_own(now_ms);
        if self.phase != Phase::Running {
            return;
        }
        while let Some(todo) = self.todo.pop_front() {
            let id = match todo {
                Todo::Flight(id) => Some(id),
                Todo::Older(record, send_no) => self.older(record, send_no),
            };
            if let Some(id) = id.and_then(|id| self.resume(id, now_ms)) {
                self.todo.push_front(Todo::Flight(id));
                break;
            }
        }
    }

    /// Sends a flight, for the first time or again; `Some`: there is no room for it yet.
    fn resume(&mut self, id: PacketId, now_ms: u64) -> Option<PacketId> {
        let (room, qos2_room, max_qos) = (self.room(), self.qos2_room(), self.max_qos());
        let flight = self.flights.get(&id)?;
        match flight.stage {
            Stage::AwaitPubcomp | Stage::Abandoned | Stage::Moved => self.release(id),
            Stage::AwaitPubrec | Stage::AwaitPuback => {
                if room == 0 || (flight.qos == Qos::ExactlyOnce && qos2_room == 0) {
                    return Some(id);
                }
                let record = flight.record.clone()?;
                let dup = flight.left != Left::No;
                let bytes = record_bytes(&record);
                if self.is_too_large(bytes) || (flight.qos == Qos::ExactlyOnce && flight.qos > max_qos) {
                    self.give_up(id, now_ms);
                    return None;
                }
                if max_qos == Qos::AtMostOnce {
                    let Flight { send_no, .. } = self.flights.remove(&id)?;
                    return self.begin_flight(Taken { id, send_no, qos: max_qos, record });
                }
                self.launch(id, record, dup, now_ms);
                if dup {
                    self.count(Counted::ResentWithDup, 1);
                }
            }
        }
        None
    }

    /// A message in flight that this connection cannot carry, because of its size or its QoS: QoS 1 is a dead
    /// letter, QoS 2 is abandoned, which needs its own PUBREL and PUBCOMP before the identifier is free.
    fn give_up(&mut self, id: PacketId, now_ms: u64) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        if flight.stage == Stage::AwaitPubrec {
            flight.stage = Stage::Abandoned;
            flight.record = None;
            self.pending.push(Change::Abandoned(id));
            self.gated.push(Packet::PubRel(id, ReasonCode::SUCCESS));
        } else if let Some(flight) = self.land(id, now_ms) {
            let (lane, seq, reason) = (flight.lane, flight.seq, ReasonCode::PACKET_TOO_LARGE.0);
            self.count(Counted::DeadLettered, 1);
            self.pending.push(Change::DeadLetter { id: None, lane, seq, reason });
        }
    }

    fn older(&mut self, record: Record, send_no: u64) -> Option<PacketId> {
        let id = self.free_ids(1).first().copied()?;
        self.begin_flight(Taken { id, send_no, qos: record.qos.min(self.max_qos()), record })
    }

    /// A message that this process has not sent before; `None`: at QoS 0 it has left already.
    fn begin_flight(&mut self, taken: Taken) -> Option<PacketId> {
        let Taken { id, send_no, qos, record } = taken;
        let (lane, seq) = (record.lane, record.seq);
        let retain = self.may_retain(record.retain);
        self.count(Counted::DowngradedQos, u64::from(qos < record.qos));
        self.count(Counted::Downgraded, u64::from(qos < record.qos || retain != record.retain));
        if qos == Qos::AtMostOnce {
            let packet = self.publish_record(record, qos, retain, None);
            self.send(Packet::Publish(Box::new(packet)));
            self.pending.push(Change::Acknowledged { lane, seq });
            return None;
        }
        let stage = if qos == Qos::ExactlyOnce { Stage::AwaitPubrec } else { Stage::AwaitPuback };
        self.next_id = next_after(id);
        self.flights.insert(
            id,
            Flight {
                id,
                lane,
                seq,
                send_no,
                qos,
                stage,
                record: Some(record),
                left: Left::No,
                sent: false,
                released: false,
            },
        );
        Some(id)
    }

    /// Puts a PUBLISH on its way.
    fn launch(&mut self, id: PacketId, record: Record, dup: bool, now_ms: u64) {
        self.progress_from_idle(now_ms);
        let retain = record.retain && self.limits.retain_available != Some(false);
        let Some(flight) = self.flights.get_mut(&id) else { return };
        flight.sent = true;
        flight.left = Left::Yes;
        let qos = flight.qos;
        let mut packet = self.publish_record(record, qos, retain, Some(id));
        packet.dup = dup;
        self.in_flight += 1;
        if qos == Qos::ExactlyOnce {
            self.qos2_in_flight += 1;
        }
        self.timed.get_or_insert((id, now_ms));
        self.send(Packet::Publish(Box::new(packet)));
    }

    fn publish_record(&self, record: Record, qos: Qos, retain: bool, id: Option<PacketId>) -> Publish {
        let packet = publish(record.topic, record.payload, qos, retain, id, record.expires_s);
        // 3.1.1 has no properties.
        let data = record.correlation_data.filter(|_| self.settings.protocol == Protocol::V5);
        Publish { correlation_data: data, ..packet }
    }

    /// Puts a PUBREL on its way; what it depends on is committed.
    pub(super) fn release(&mut self, id: PacketId) {
        if let Some(flight) = self.flights.get_mut(&id) {
            flight.released = true;
            if !flight.sent {
                flight.sent = true;
                self.in_flight += 1;
                self.qos2_in_flight += 1;
            }
        }
        self.send(Packet::PubRel(id, ReasonCode::SUCCESS));
    }

    pub(super) fn max_qos(&self) -> Qos {
        self.limits.max_qos.and_then(|qos| Qos::from_number(u64::from(qos))).unwrap_or(Qos::ExactlyOnce)
    }

    fn is_too_large(&self, bytes: usize) -> bool {
        self.limits.max_packet_bytes.is_some_and(|max| bytes > max as usize)
    }

    /// QoS 1 and 2 messages that may be in flight at once.
    pub fn window(&self) -> u16 {
        self.settings.max_in_flight.min(self.limits.receive_max.unwrap_or(u16::MAX))
    }

    fn room(&self) -> usize {
        usize::from(self.window()).saturating_sub(self.in_flight)
    }

    /// Room for our own messages: what the broker holds of us and we have not resumed yet has its place already.
    fn own_room(&self) -> usize {
        let held = |flight: &&Flight| flight.qos == Qos::ExactlyOnce && !flight.sent;
        self.room().saturating_sub(self.flights.values().filter(held).count())
    }

    /// QoS 2 leaves one place of the window free. mosquitto counts what it holds from the last connection against
    /// a new one: were that all of the window, it would refuse the canary and presence with 0x97, and on 3.1.1,
    /// where PUBACK carries no reason, throw them and every QoS 1 message away in silence.
    fn qos2_room(&self) -> usize {
        let window = usize::from(self.settings.qos2_window.min(self.window()));
        let window = window.saturating_sub(1).max(1);
        window.saturating_sub(self.qos2_in_flight).min(self.room())
    }

    fn flight_bytes(&self) -> usize {
        let held = |flight: &Flight| flight.record.as_ref().map_or(0, |record| record.payload.len());
        self.flights.values().map(held).sum()
    }

    /// Identifiers that nothing uses, going round, so that one is used again as late as possible.
    fn free_ids(&mut self, count: usize) -> Vec<PacketId> {
        let mut ids = Vec::with_capacity(count);
        for _ in OWN_ID_MAX..u16::MAX {
            if ids.len() == count {
                break;
            }
            let id = PacketId::new(self.next_id).filter(|id| !self.flights.contains_key(id));
            self.next_id = self.next_id.checked_add(1).unwrap_or(OWN_ID_MAX + 1);
            ids.extend(id);
        }
        ids
    }

    pub(super) fn offer(&mut self) -> Option<Offer> {
        let held_back_first = self.settings.broken != Some(Broken::HeldBackFirst);
        let holds_back = held_back_first && !self.todo.is_empty();
        if self.offered || self.draining || self.phase != Phase::Running || holds_back {
            return None;
        }
        let (room, qos2_room) = (self.room(), self.qos2_room());
        // At QoS 0 nothing stays in flight: only the link's own backlog tells that the broker does not keep up.
        let held_bytes = match self.max_qos() {
            Qos::AtMostOnce => self.unsent_bytes,
            _ => self.flight_bytes(),
        };
        let max_bytes = FLIGHT_MAX_BYTES.saturating_sub(held_bytes);
        // The store keeps an offer until it can answer it: one that could not take whatever comes first would
        // stay there for ever.
        if room == 0 || qos2_room == 0 || max_bytes == 0 {
            return None;
        }
        self.offered = true;
        Some(Offer {
            ids: self.free_ids(room),
            qos2_room,
            max_bytes,
            max_qos: self.max_qos(),
            max_publish_bytes: self.limits.max_packet_bytes,
        })
    }

    /// The store answered the offer; the rows of these messages are on the disk.
    ///
    /// What has no room any more, because presence took it while the offer was out, waits like a resumed message.
    pub fn on_taken(&mut self, taken: Vec<Taken>, now_ms: u64) {
        self.offered = false;
        if let Some(last) = taken.last() {
            // The rest of the offer was not used: the round goes on behind the last that was.
            self.next_id = next_after(last.id);
        }
        for taken in taken {
            if let Some(holding) = self.holding.iter().find(|holding| holding.holds(&taken.record)) {
                let Taken { id, qos, record, .. } = taken;
                let row = (qos == Qos::ExactlyOnce).then_some(id);
                self.pending.push(held_back(holding, row, &record));
                continue;
            }
            let waits = self.begin_flight(taken).map(Todo::Flight);
            match self.settings.broken {
                Some(Broken::HeldBackFirst) => waits.into_iter().for_each(|todo| self.todo.push_front(todo)),
                _ => self.todo.extend(waits),
            }
        }
        self.pump(now_ms);
    }
}

/// A message that was taken and never sent goes back and shares the hold. `id`: that of its row.
fn held_back(holding: &Holding, id: Option<PacketId>, record: &Record) -> Change {
    let Holding { hold, hold_ms, reason, .. } = *holding;
    Change::Refused { id, lane: record.lane, seq: record.seq, hold, hold_ms, reason: reason.0 }
}

/// Reason codes that no waiting changes.
pub(super) fn is_hopeless(reason: ReasonCode) -> bool {
    matches!(
        reason,
        ReasonCode::TOPIC_NAME_INVALID | ReasonCode::PACKET_TOO_LARGE | ReasonCode::PAYLOAD_FORMAT_INVALID
    )
}

/// Messages' identifiers go round above our own.
pub(super) fn next_after(id: PacketId) -> u16 {
    id.get().checked_add(1).unwrap_or(OWN_ID_MAX + 1)
}

pub(super) fn publish(
    topic: Topic,
    payload: Bytes,
    qos: Qos,
    retain: bool,
    id: Option<PacketId>,
    message_expiry_s: Option<u32>,
) -> Publish {
    Publish {
        dup: false,
        qos,
        retain,
        topic,
        id,
        payload,
        message_expiry_s,
        response_topic: None,
        correlation_data: None,
    }
}
