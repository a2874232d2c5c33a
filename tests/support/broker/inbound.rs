//! Messages from clients: PUBLISH and PUBREL (clauses 3.3, 3.6, 4.3, 4.4, 4.6, 4.9).
//!
//! Invariant: a PUBLISH enters `Log::received` exactly when the broker takes responsibility for it.

use super::Broker;
use super::log::{ConnId, HandedOn, Received, Refused};
use super::packet::{Ack, Publish, encode_ack};
use super::script::Onward;
use super::session::{Connection, Held, Message};
use super::topic;
use super::wire::{Fault, Kind, Version, property as p};
use super::{Parcel, packet};
use std::sync::Arc;

/// What becomes of a PUBLISH.
enum Verdict {
    Take,
    /// Answered with this reason code, and thrown away.
    Refuse(u8),
    /// Acknowledged as if all were well, and thrown away.
    Swallow,
    /// Above a limit: refused where that can be said, otherwise swallowed.
    Limit,
}

impl Broker {
    pub(super) fn on_publish(
        &mut self,
        conn: ConnId,
        mut publish: Publish,
        now_ms: u64,
    ) -> Result<(), Fault> {
        self.check_limits(&publish, conn)?;
        self.resolve_alias(conn, &mut publish)?;
        self.count_outstanding(conn, &publish)?;
        if publish.qos == 2 && self.is_held(conn, publish.id) {
            self.repeated(conn, &publish, now_ms);
        } else {
            self.first_time(conn, publish, now_ms);
        }
        Ok(())
    }

    /// What CONNACK announced; on 3.1.1 it could not announce anything.
    fn check_limits(&self, publish: &Publish, conn: ConnId) -> Result<(), Fault> {
        self.check_unsaid(publish, conn)?;
        if self.version(conn) != Version::V5 {
            return Ok(());
        }
        if publish.qos > self.limits.maximum_qos {
            let text =
                format!("QoS {} above Maximum QoS {} (MQTT-3.2.2-11)", publish.qos, self.limits.maximum_qos);
            return Err(Fault::new(0x9b, text));
        }
        if publish.retain && !self.limits.retain_available {
            return Err(Fault::new(0x9a, "RETAIN although Retain Available is 0 (MQTT-3.2.2-14)"));
        }
        Ok(())
    }

    fn check_unsaid(&self, publish: &Publish, conn: ConnId) -> Result<(), Fault> {
        let unsaid = &self.limits.unsaid;
        let (version, outstanding) =
            self.connections.get(&conn).map_or((Version::V311, 0), |c| (self.version(conn), c.outstanding));
        let bytes = packet::encode_publish(version, publish).len();
        if unsaid.maximum_qos.is_some_and(|maximum| publish.qos > maximum) {
            return Err(Fault::unsaid("maximum_qos"));
        }
        if unsaid.no_retain && publish.retain {
            return Err(Fault::unsaid("no_retain"));
        }
        if unsaid.publish_bytes.is_some_and(|maximum| bytes > maximum) {
            return Err(Fault::unsaid("publish_bytes"));
        }
        if unsaid.in_flight.is_some_and(|maximum| publish.qos > 0 && outstanding >= maximum) {
            return Err(Fault::unsaid("in_flight"));
        }
        Ok(())
    }

    fn resolve_alias(&mut self, conn: ConnId, publish: &mut Publish) -> Result<(), Fault> {
        let Some(alias) = publish.properties.number(p::TOPIC_ALIAS) else { return Ok(()) };
        let alias = u16::try_from(alias).unwrap_or(0);
        if alias > self.limits.topic_alias_maximum {
            return Err(Fault::new(
                0x94,
                format!("Topic Alias {alias} above Topic Alias Maximum (MQTT-3.3.2-9)"),
            ));
        }
        publish.properties.keep(&packet::MESSAGE_PROPERTIES);
        let Some(connection) = self.connections.get_mut(&conn) else { return Ok(()) };
        if !publish.topic.is_empty() {
            connection.aliases.insert(alias, publish.topic.clone());
            return Ok(());
        }
        match connection.aliases.get(&alias) {
            Some(topic) => publish.topic.clone_from(topic),
            None => {
                return Err(Fault::protocol(format!(
                    "Topic Alias {alias} has no topic (5.0 clause 3.3.2.3.4)"
                )));
            }
        }
        Ok(())
    }

    /// 5.0 clause 4.9: every PUBLISH of QoS 1 or 2 on this connection takes one from the quota.
    fn count_outstanding(&mut self, conn: ConnId, publish: &Publish) -> Result<(), Fault> {
        let limit = self.limits.receive_maximum.map_or(usize::from(u16::MAX), usize::from);
        let Some(connection) = self.connections.get_mut(&conn) else { return Ok(()) };
        if publish.qos == 0 {
            return Ok(());
        }
        connection.outstanding += 1;
        if connection.outstanding > limit && connection.version == Some(Version::V5) {
            let text =
                format!("{} PUBLISHes unfinished, Receive Maximum is {limit} (MQTT-3.3.4-9)", limit + 1);
            return Err(Fault::new(0x93, text));
        }
        Ok(())
    }

    fn note_peak(&mut self, conn: ConnId) {
        let Some(connection) = self.connections.get(&conn) else { return };
        let held = self.sessions.get(&connection.client_id).map_or(0, |s| s.held.len());
        let open = (held + connection.unacked.len()).max(connection.outstanding);
        let log = self.log.connections.entry(conn).or_default();
        log.peak_unfinished = log.peak_unfinished.max(open);
    }

    pub(super) fn version(&self, conn: ConnId) -> Version {
        self.connections.get(&conn).and_then(|c| c.version).unwrap_or(Version::V311)
    }

    fn is_held(&self, conn: ConnId, id: u16) -> bool {
        let client_id = self.connections.get(&conn).map(|c| &c.client_id);
        client_id.and_then(|c| self.sessions.get(c)).is_some_and(|s| s.held.contains_key(&id))
    }

    /// MQTT-4.3.3-10 (3.1.1 figure 4.3): a held id is acknowledged again and nothing more.
    fn repeated(&mut self, conn: ConnId, publish: &Publish, now_ms: u64) {
        self.log.counters.repeats += 1;
        let complaints = self.complaints_about_repeat(conn, publish);
        for text in complaints {
            self.violation(conn, text);
        }
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.published.insert(publish.id);
        let reason = self.sessions.get(&connection.client_id).and_then(|s| s.held.get(&publish.id));
        let reason = reason.map_or(0, |held| held.reason);
        self.note_peak(conn);
        self.answer(conn, Ack { kind: Kind::Pubrec, id: publish.id, reason }, now_ms);
    }

    fn complaints_about_repeat(&mut self, conn: ConnId, publish: &Publish) -> Vec<String> {
        let mut complaints = Vec::new();
        let retain_available = self.limits.retain_available;
        let Some((connection, held)) = self.judged(conn, publish.id) else { return complaints };
        let id = publish.id;
        // A broker that takes RETAIN no more cannot want it again.
        let retain = if retain_available { publish.retain } else { held.message.retain };
        if !held.message.is_same_as(&Publish { retain, ..publish.clone() }) {
            complaints.push(format!(
                "Packet Identifier {id} is held for {:?} and used again for {:?} (MQTT-2.2.1-4; 3.1.1 MQTT-2.3.1-3)",
                held.message.topic, publish.topic
            ));
        }
        if !publish.dup {
            complaints.push(format!("PUBLISH {id} sent again without DUP (MQTT-3.3.1-1)"));
        }
        if connection.published.contains(&id) {
            complaints.push(format!("PUBLISH {id} sent twice on one connection (MQTT-4.4.0-1)"));
        } else if held.arrived_no < connection.last_arrived_no {
            complaints
                .push(format!("PUBLISH {id} sent again after one that was first sent later (MQTT-4.6.0-1)"));
        }
        connection.last_arrived_no = connection.last_arrived_no.max(held.arrived_no);
        complaints
    }

    /// The connection and a held id, if what the client does may be held against it.
    fn judged(&mut self, conn: ConnId, id: u16) -> Option<(&mut Connection, &Held)> {
        let connection = self.connections.get_mut(&conn).filter(|c| !c.tampered)?;
        let session = self.sessions.get(&connection.client_id).filter(|s| !s.tampered)?;
        session.held.get(&id).map(|held| (connection, held))
    }

    fn first_time(&mut self, conn: ConnId, publish: Publish, now_ms: u64) {
        self.complain_about_id(conn, &publish);
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if publish.qos == 2 {
            connection.no_pubrel.remove(&publish.id);
        }
        let expiry = publish.properties.number(p::MESSAGE_EXPIRY);
        let message = Message {
            topic: publish.topic.as_str().into(),
            payload: publish.payload,
            qos: publish.qos,
            retain: publish.retain,
            properties: publish.properties,
            expires_at_ms: expiry.map(|s| now_ms + u64::from(s) * 1000),
            from: connection.client_id.clone(),
        };
        match self.verdict(conn, &message) {
            Verdict::Take => self.take(conn, message, publish.id, publish.dup, now_ms),
            Verdict::Refuse(reason) => self.throw_away(conn, message, publish.id, (reason, false), now_ms),
            Verdict::Swallow => self.throw_away(conn, message, publish.id, (0, false), now_ms),
            Verdict::Limit => {
                let reason = if self.version(conn) == Version::V5 { 0x97 } else { 0 };
                self.throw_away(conn, message, publish.id, (reason, true), now_ms);
            }
        }
    }

    /// MQTT-2.2.1-4 (3.1.1 MQTT-2.3.1-3): the id must not be in use, at whatever QoS.
    fn complain_about_id(&mut self, conn: ConnId, publish: &Publish) {
        let id = publish.id;
        let held = publish.qos == 1 && self.judged(conn, id).is_some();
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let unacked = publish.qos > 0 && !connection.tampered && connection.unacked.contains_key(&id);
        if held || unacked {
            self.violation(
                conn,
                format!("PUBLISH at QoS {} with Packet Identifier {id}, in use", publish.qos),
            );
        }
    }

    fn verdict(&mut self, conn: ConnId, message: &Message) -> Verdict {
        let v5 = self.version(conn) == Version::V5;
        let mut refusals =
            self.script.refuse.iter_mut().filter(|r| topic::matches(&r.filter, &message.topic));
        let refusal = refusals.find_map(|r| r.times.next().then_some(r.reason));
        let denied = self.script.deny_publish.iter().any(|filter| topic::matches(filter, &message.topic));
        let reason = refusal.or(denied.then_some(0x87));
        match reason {
            Some(reason) if v5 && message.qos > 0 => return Verdict::Refuse(reason),
            Some(_) => return Verdict::Swallow,
            None => {}
        }
        let held = self.sessions.get(&message.from).map_or(0, |s| s.held.len());
        if message.qos > 0 && self.script.held_limit.is_some_and(|limit| held >= limit) {
            return Verdict::Limit;
        }
        match self.script.silent_limit {
            Some(limit) if !v5 && message.qos == 2 && held >= limit => Verdict::Limit,
            _ => Verdict::Take,
        }
    }

    fn throw_away(
        &mut self,
        conn: ConnId,
        message: Message,
        id: u16,
        (reason, by_limit): (u8, bool),
        now_ms: u64,
    ) {
        let counters = &mut self.log.counters;
        *(if reason == 0 { &mut counters.swallowed } else { &mut counters.refused }) += 1;
        let Message { topic, payload, qos, .. } = message;
        self.log.refused.push(Refused { conn, topic, payload, qos, reason, by_limit, at_ms: now_ms });
        match qos {
            0 => {}
            1 => self.acknowledge(conn, Ack { kind: Kind::Puback, id, reason }, now_ms),
            _ => self.acknowledge(conn, Ack { kind: Kind::Pubrec, id, reason }, now_ms),
        }
    }

    fn take(&mut self, conn: ConnId, message: Message, id: u16, dup: bool, now_ms: u64) {
        let arrived_no = self.serial();
        let at_once = message.qos < 2 || self.limits.onward == Onward::AtPublish;
        self.log.received.push(Received {
            conn,
            client_id: message.from.clone(),
            topic: message.topic.clone(),
            payload: message.payload.clone(),
            qos: message.qos,
            retain: message.retain,
            dup,
            id,
            at_ms: now_ms,
            onward: at_once,
        });
        let reason = self.success(conn, &message);
        if let Some(connection) = self.connections.get_mut(&conn) {
            match message.qos {
                0 => {}
                1 => drop(connection.unacked.insert(id, message.clone())),
                _ => {
                    connection.published.insert(id);
                    // A first arrival with DUP may stand before others that did arrive earlier.
                    if !dup {
                        connection.last_arrived_no = arrived_no;
                    }
                }
            }
        }
        if at_once {
            self.hand_on(&message, now_ms);
        }
        match message.qos {
            0 => {}
            1 => self.acknowledge(conn, Ack { kind: Kind::Puback, id, reason }, now_ms),
            _ => {
                let received_no = self.log.received_before + self.log.received.len() as u64 - 1;
                let held =
                    Held { message, received_no, reason, pubrec_no: None, arrived_no, onward: at_once };
                self.hold(conn, id, held);
                self.acknowledge(conn, Ack { kind: Kind::Pubrec, id, reason }, now_ms);
            }
        }
    }

    fn hold(&mut self, conn: ConnId, id: u16, held: Held) {
        let client_id: Option<&Arc<str>> = self.connections.get(&conn).map(|c| &c.client_id);
        if let Some(session) = client_id.and_then(|c| self.sessions.get_mut(c)) {
            session.held.insert(id, held);
        }
    }

    fn acknowledge(&mut self, conn: ConnId, ack: Ack, now_ms: u64) {
        self.note_peak(conn);
        self.answer(conn, ack, now_ms);
    }

    /// Success, or 0x10 No matching subscribers.
    fn success(&self, conn: ConnId, message: &Message) -> u8 {
        let told = self.limits.tell_no_subscribers && self.version(conn) == Version::V5;
        if told && !self.sessions.values().any(|s| s.wants(message).is_some()) { 0x10 } else { 0 }
    }

    pub(super) fn on_pubrel(&mut self, conn: ConnId, ack: Ack, now_ms: u64) -> Result<(), Fault> {
        let complaint = self.complaint_about_pubrel(conn, ack.id);
        if let Some(text) = complaint {
            self.violation(conn, text);
        }
        let Some(connection) = self.connections.get_mut(&conn) else { return Ok(()) };
        let session = self.sessions.get_mut(&connection.client_id);
        let reason = match session.and_then(|s| s.held.remove(&ack.id)) {
            Some(held) => {
                connection.no_pubrel.insert(ack.id, "it was sent already on this connection");
                self.released(held, now_ms);
                0
            }
            None => {
                self.log.counters.unknown_pubrels += 1;
                // 5.0 clause 3.7.2.1: Packet Identifier not found; not an error during recovery.
                0x92
            }
        };
        self.answer(conn, Ack { kind: Kind::Pubcomp, id: ack.id, reason }, now_ms);
        Ok(())
    }

    fn released(&mut self, held: Held, now_ms: u64) {
        if held.onward {
            return;
        }
        let index = held.received_no.checked_sub(self.log.received_before);
        if let Some(received) = index.and_then(|at| self.log.received.get_mut(at as usize)) {
            received.onward = true;
        }
        self.hand_on(&held.message, now_ms);
    }

    fn hand_on(&mut self, message: &Message, now_ms: u64) {
        let Message { topic, payload, retain, .. } = message.clone();
        self.log.handed_on.push(HandedOn { topic, payload, retain });
        self.route(message, now_ms);
    }

    /// MQTT-4.3.3-4 and MQTT-4.6.0-4: one PUBREL for each PUBREC, in the order of the PUBRECs.
    fn complaint_about_pubrel(&mut self, conn: ConnId, id: u16) -> Option<String> {
        let connection = self.connections.get(&conn).filter(|c| !c.tampered)?;
        if let Some(why) = connection.no_pubrel.get(&id) {
            return Some(format!("PUBREL {id}, but {why} (MQTT-4.3.3-4)"));
        }
        let (connection, held) = self.judged(conn, id)?;
        let Some(pubrec_no) = held.pubrec_no else {
            return Some(format!("PUBREL {id} before its PUBREC (MQTT-4.3.3-4)"));
        };
        let late = pubrec_no < connection.last_pubrec_no;
        connection.last_pubrec_no = connection.last_pubrec_no.max(pubrec_no);
        late.then(|| format!("PUBREL {id} out of the order of the PUBRECs (MQTT-4.6.0-4)"))
    }

    /// Sends an acknowledgement; on 3.1.1 it has no reason code.
    pub(super) fn answer(&mut self, conn: ConnId, mut ack: Ack, now_ms: u64) {
        let version = self.version(conn);
        if version == Version::V311 {
            ack.reason = 0;
        }
        self.emit(conn, ack.kind, ack.id, ack.reason, encode_ack(version, ack), now_ms);
    }

    /// What an acknowledgement changes once it really leaves.
    pub(super) fn account(&mut self, parcel: &Parcel, serial: u64) {
        let Some(connection) = self.connections.get_mut(&parcel.conn) else { return };
        let refused = parcel.kind == Kind::Pubrec && parcel.reason >= 0x80;
        if refused || matches!(parcel.kind, Kind::Puback | Kind::Pubcomp) {
            connection.outstanding = connection.outstanding.saturating_sub(1);
        }
        match parcel.kind {
            Kind::Puback => drop(connection.unacked.remove(&parcel.id)),
            Kind::Pubcomp => drop(connection.published.remove(&parcel.id)),
            Kind::Pubrec if refused => {
                connection.no_pubrel.insert(parcel.id, "its PUBREC refused the message");
            }
            Kind::Pubrec => {
                let session = self.sessions.get_mut(&connection.client_id);
                if let Some(held) = session.and_then(|s| s.held.get_mut(&parcel.id)) {
                    held.pubrec_no = Some(serial);
                }
            }
            _ => {}
        }
    }
}
