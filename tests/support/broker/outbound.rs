//! Messages to clients: subscriptions, retained messages, delivery and the acknowledgements of it
//! (clauses 3.8 to 3.11, 4.3, 4.4).
//!
//! Invariant: no more PUBLISHes of QoS 1 and 2 are in flight to a client than its window allows, those of
//! earlier connections included, unless the test itself sends more.

use super::log::{ConnId, Delivered};
use super::packet::{Ack, Publish, Request, encode_codes, encode_publish};
use super::session::{Awaiting, Message, Outgoing, Stage};
use super::topic;
use super::wire::{Fault, Kind, Version};
use super::{Broker, Parcel};
use std::sync::Arc;

impl Broker {
    pub(super) fn on_subscribe(
        &mut self,
        conn: ConnId,
        id: u16,
        requests: Vec<Request>,
        now_ms: u64,
    ) -> Result<(), Fault> {
        let version = self.version(conn);
        let Some(client_id) = self.connections.get(&conn).map(|c| c.client_id.clone()) else { return Ok(()) };
        let above = |most| requests.iter().any(|request: &Request| request.qos > most);
        if self.limits.unsaid.maximum_qos.is_some_and(above) {
            return Err(Fault::unsaid("maximum_qos"));
        }
        let mut codes = Vec::new();
        let mut retained = Vec::new();
        for mut request in requests {
            let code = self.grant(&request, version);
            codes.push(code);
            if code > 2 {
                continue;
            }
            request.qos = code;
            let Some(session) = self.sessions.get_mut(&client_id) else { continue };
            let new = session.subscriptions.insert(request.filter.clone(), request.clone()).is_none();
            if request.retain_handling == 0 || (request.retain_handling == 1 && new) {
                retained.extend(self.retained_for(&request, now_ms));
            }
        }
        self.emit(conn, Kind::Suback, id, 0, encode_codes(version, Kind::Suback, id, &codes), now_ms);
        for message in retained {
            self.enqueue(&client_id, message, now_ms);
        }
        Ok(())
    }

    /// SUBACK's code for one filter: the granted QoS or why not.
    fn grant(&self, request: &Request, version: Version) -> u8 {
        let v5 = version == Version::V5;
        if self.script.deny_subscribe.iter().any(|denied| topic::matches(denied, &request.filter)) {
            return if v5 { 0x87 } else { 0x80 };
        }
        if v5 && request.filter.starts_with("$share/") {
            return 0x9e;
        }
        request.qos.min(self.limits.granted_qos)
    }

    fn retained_for(&self, request: &Request, now_ms: u64) -> Vec<Message> {
        let readable =
            |topic: &str| !self.script.deny_read.iter().any(|filter| topic::matches(filter, topic));
        (self.retained.values())
            .filter(|m| topic::matches(&request.filter, &m.topic) && readable(&m.topic) && !m.expired(now_ms))
            .map(|m| Message { qos: m.qos.min(request.qos), retain: true, ..m.clone() })
            .collect()
    }

    pub(super) fn on_unsubscribe(
        &mut self,
        conn: ConnId,
        id: u16,
        filters: &[String],
        now_ms: u64,
    ) -> Result<(), Fault> {
        let version = self.version(conn);
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let Some(session) = self.sessions.get_mut(&connection.client_id) else { return Ok(()) };
        let had = filters.iter().map(|filter| session.subscriptions.remove(filter).is_some());
        // 0x11 No subscription existed.
        let codes: Vec<u8> = had.map(|had| if had { 0 } else { 0x11 }).collect();
        let reason = codes.first().copied().unwrap_or(0);
        self.emit(
            conn,
            Kind::Unsuback,
            id,
            reason,
            encode_codes(version, Kind::Unsuback, id, &codes),
            now_ms,
        );
        Ok(())
    }

    /// Gives a session one message at the QoS it carries now.
    pub(super) fn enqueue(&mut self, client_id: &Arc<str>, message: Message, now_ms: u64) {
        let Some(session) = self.sessions.get_mut(client_id) else { return };
        if message.qos == 0 {
            let open = session
                .connection
                .filter(|conn| self.connections.get(conn).is_some_and(|c| c.stage == Stage::Open(true)));
            if let Some(conn) = open {
                let publish = message.publish(0, false, now_ms);
                self.send_publish(conn, client_id, &publish, now_ms);
            }
            return;
        }
        if session.queue.len() >= self.limits.queue_maximum {
            self.log.counters.queue_drops += 1;
            return;
        }
        session.queue.push_back(message);
        self.pump(client_id, now_ms);
    }

    /// Sends what the window allows.
    pub(super) fn pump(&mut self, client_id: &Arc<str>, now_ms: u64) {
        loop {
            let Some(session) = self.sessions.get_mut(client_id) else { return };
            let Some(conn) = session.connection else { return };
            let Some(connection) = self.connections.get(&conn) else { return };
            if connection.stage != Stage::Open(true) {
                return;
            }
            let window = self.limits.outgoing_window.min(connection.receive_maximum);
            match session.next_outgoing(conn, window, now_ms) {
                Some(Outgoing::Publish(publish)) => self.send_publish(conn, client_id, &publish, now_ms),
                Some(Outgoing::Ack(ack)) => self.answer(conn, ack, now_ms),
                None => return,
            }
        }
    }

    /// Sends one PUBLISH, unless the client said it is too large (MQTT-3.1.2-24, MQTT-3.1.2-25).
    pub(super) fn send_publish(
        &mut self,
        conn: ConnId,
        client_id: &Arc<str>,
        publish: &Publish,
        now_ms: u64,
    ) {
        let bytes = encode_publish(self.version(conn), publish);
        if self.connections.get(&conn).is_some_and(|c| bytes.len() > c.maximum_packet_size) {
            self.log.counters.queue_drops += 1;
            if let Some(session) = self.sessions.get_mut(client_id) {
                session.in_flight.retain(|m| m.id != publish.id);
            }
            return;
        }
        let delivered = Delivered {
            conn,
            client_id: client_id.clone(),
            topic: publish.topic.as_str().into(),
            payload: publish.payload.clone(),
            qos: publish.qos,
            retain: publish.retain,
            dup: publish.dup,
            id: publish.id,
        };
        let delivered = Some(Box::new(delivered));
        self.dispatch(
            Parcel { conn, kind: Kind::Publish, id: publish.id, reason: 0, bytes, delivered },
            now_ms,
        );
    }

    /// PUBACK, PUBREC or PUBCOMP for a message of ours.
    pub(super) fn on_ack(&mut self, conn: ConnId, ack: Ack, now_ms: u64) -> Result<(), Fault> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        let client_id = connection.client_id.clone();
        let Some(session) = self.sessions.get_mut(&client_id) else { return Ok(()) };
        let honest = !connection.tampered && !session.tampered;
        let Some(at) = session.in_flight.iter().position(|m| m.id == ack.id) else {
            if honest {
                self.violation(
                    conn,
                    format!("{:?} {} for no message in flight (clause 4.3)", ack.kind, ack.id),
                );
            }
            if ack.kind == Kind::Pubrec {
                self.answer(conn, Ack { kind: Kind::Pubrel, id: ack.id, reason: 0x92 }, now_ms);
            }
            return Ok(());
        };
        let message = &mut session.in_flight[at];
        match (message.awaiting, ack.kind) {
            (Awaiting::Puback, Kind::Puback) | (Awaiting::Pubcomp, Kind::Pubcomp) => {
                session.in_flight.remove(at);
            }
            // A refusal ends it, but not once PUBREL has been sent.
            (Awaiting::Pubrec, Kind::Pubrec) if ack.reason >= 0x80 => {
                session.in_flight.remove(at);
            }
            (Awaiting::Pubrec | Awaiting::Pubcomp, Kind::Pubrec) => {
                message.awaiting = Awaiting::Pubcomp;
                self.answer(conn, Ack { kind: Kind::Pubrel, id: ack.id, reason: 0 }, now_ms);
            }
            (awaiting, kind) => {
                let text = format!("{kind:?} {} while {awaiting:?} was due (clause 4.3)", ack.id);
                return Err(Fault::protocol(text));
            }
        }
        self.pump(&client_id, now_ms);
        Ok(())
    }
}
