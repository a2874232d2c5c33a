//! CONNECT, DISCONNECT, and the lives of connections, sessions and Wills (clauses 3.1, 3.2, 3.14, 4.1).
//!
//! Invariant: a session has at most one connection, and a connection that is open has exactly one session.

use super::log::{ConnId, Connected};
use super::packet::{self, Connect, Will};
use super::script::{ConnectScript, Unsaid};
use super::session::{Connection, Message, Session, Stage};
use super::wire::{Fault, Kind, Properties, Value, Version, property as p};
use super::{Broker, Output};
use std::sync::Arc;

/// Session Expiry Interval that means "never" (5.0 clause 3.1.2.11.2).
const NEVER: u32 = u32::MAX;

impl Broker {
    pub(super) fn on_connect(&mut self, conn: ConnId, connect: Connect, now_ms: u64) -> Result<(), Fault> {
        self.log.connects.push(connected(conn, &connect, now_ms));
        let script =
            self.script.next_connects.pop_front().unwrap_or_else(|| self.script.every_connect.clone());
        let Some(connection) = self.connections.get_mut(&conn) else { return Ok(()) };
        connection.version = Some(connect.version);
        if script.mute {
            connection.stage = Stage::Mute;
            return Ok(());
        }
        self.send(conn, &script.before);
        if script.close {
            self.close(conn, false, now_ms);
            return Ok(());
        }
        if let Some(code) = script.refuse.or_else(|| self.refusal(&connect)) {
            self.refuse(conn, connect.version, code, now_ms);
            return Ok(());
        }
        self.accept(conn, connect, &script, now_ms);
        Ok(())
    }

    /// The code an honest broker would refuse this CONNECT with.
    fn refusal(&mut self, connect: &Connect) -> Option<u8> {
        let v5 = connect.version == Version::V5;
        if let Some(limit) = self.limits.unsaid.broken_by(connect) {
            self.log.limits_hit.push(limit);
            // 3.1.1: identifier rejected, which is what Huawei answers to a Keep Alive out of range.
            return Some(if v5 { 0x83 } else { 2 });
        }
        if connect.properties.get(p::AUTHENTICATION_METHOD).is_some() {
            return Some(0x8c);
        }
        // MQTT-3.1.3-8 of 3.1.1: an empty id needs Clean Session 1. On 5.0 an id is assigned.
        if !v5 && connect.client_id.is_empty() && !connect.clean {
            return Some(2);
        }
        if let Some((name, password)) = &self.limits.login {
            let right = connect.username.as_deref() == Some(name)
                && connect.password.as_deref() == Some(password.as_bytes());
            if !right {
                return Some(if v5 { 0x86 } else { 4 });
            }
        }
        let will = connect.will.as_ref().filter(|_| v5)?;
        if will.qos > self.limits.maximum_qos {
            return Some(0x9b);
        }
        (will.retain && !self.limits.retain_available).then_some(0x9a)
    }

    fn refuse(&mut self, conn: ConnId, version: Version, code: u8, now_ms: u64) {
        self.answered(conn, false, code);
        let bytes = packet::connack(version, false, code, &Properties::default());
        self.emit(conn, Kind::Connack, 0, code, bytes, now_ms);
        self.close(conn, false, now_ms);
    }

    fn answered(&mut self, conn: ConnId, session_present: bool, code: u8) {
        if let Some(entry) = self.log.connects.iter_mut().rev().find(|c| c.conn == conn) {
            entry.answer = Some((session_present, code));
        }
    }

    fn accept(&mut self, conn: ConnId, connect: Connect, script: &ConnectScript, now_ms: u64) {
        let client_id: Arc<str> = match connect.client_id.as_str() {
            "" => format!("assigned-{conn}").into(),
            id => id.into(),
        };
        self.take_over(&client_id, now_ms);
        if connect.clean || script.forget_session {
            self.end_session(&client_id, now_ms);
        }
        let present = self.sessions.contains_key(&client_id);
        let said = script.session_present.unwrap_or(present);
        let session =
            (self.sessions.entry(client_id.clone())).or_insert_with(|| Session::new(client_id.clone()));
        session.connection = Some(conn);
        session.ends_at_ms = None;
        session.will = None;
        session.reuses_ids = self.limits.reuses_ids;
        session.outlives_ms = outlives_ms(&connect, self.limits.session_expiry);
        session.tampered |= said != present;

        let keep_alive = self.keep_alive(&connect);
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.stage = Stage::Open(false);
        connection.client_id = client_id.clone();
        connection.silence_ms = u64::from(keep_alive) * 1500;
        if let Some(maximum) = connect.properties.number(p::RECEIVE_MAXIMUM) {
            connection.receive_maximum = maximum as usize;
        }
        if let Some(maximum) = connect.properties.number(p::MAXIMUM_PACKET_SIZE) {
            connection.maximum_packet_size = maximum as usize;
        }
        let properties = self.connack_properties(&connect, &client_id);
        if let Some(connection) = self.connections.get_mut(&conn) {
            connection.will = connect.will;
        }
        self.answered(conn, said, 0);
        let mut bytes = packet::connack(connect.version, said, 0, &properties);
        bytes.extend_from_slice(&script.after);
        self.emit(conn, Kind::Connack, 0, 0, bytes, now_ms);
    }

    fn keep_alive(&self, connect: &Connect) -> u16 {
        match self.limits.server_keep_alive {
            Some(seconds) if connect.version == Version::V5 => seconds,
            _ => connect.keep_alive,
        }
    }

    /// What 5.0 clause 3.2.2.3 has the broker announce; nothing that equals the default.
    fn connack_properties(&self, connect: &Connect, client_id: &str) -> Properties {
        let limits = &self.limits;
        let mut properties = Properties::default();
        properties.set(p::SUBSCRIPTION_ID_AVAILABLE, Value::Byte(0));
        properties.set(p::SHARED_SUBSCRIPTION_AVAILABLE, Value::Byte(0));
        if let Some(seconds) = limits.session_expiry {
            properties.set(p::SESSION_EXPIRY, Value::Four(seconds));
        }
        if let Some(maximum) = limits.receive_maximum {
            properties.set(p::RECEIVE_MAXIMUM, Value::Two(maximum));
        }
        if limits.maximum_qos < 2 {
            properties.set(p::MAXIMUM_QOS, Value::Byte(limits.maximum_qos));
        }
        if !limits.retain_available {
            properties.set(p::RETAIN_AVAILABLE, Value::Byte(0));
        }
        if let Some(size) = limits.maximum_packet_size {
            properties.set(p::MAXIMUM_PACKET_SIZE, Value::Four(size));
        }
        if limits.topic_alias_maximum > 0 {
            properties.set(p::TOPIC_ALIAS_MAXIMUM, Value::Two(limits.topic_alias_maximum));
        }
        if let Some(seconds) = limits.server_keep_alive {
            properties.set(p::SERVER_KEEP_ALIVE, Value::Two(seconds));
        }
        if connect.client_id.is_empty() {
            properties.set(p::ASSIGNED_CLIENT_ID, Value::Text(client_id.to_owned()));
        }
        properties
    }

    /// CONNACK has left: now the session may send (MQTT-3.2.0-1: CONNACK is the first packet).
    pub(super) fn connack_left(&mut self, conn: ConnId, now_ms: u64) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        connection.stage = Stage::Open(true);
        let client_id = connection.client_id.clone();
        self.pump(&client_id, now_ms);
    }

    /// MQTT-3.1.4-3 (3.1.1 MQTT-3.1.4-2): the older connection of the same client id goes.
    fn take_over(&mut self, client_id: &str, now_ms: u64) {
        let Some(old) = self.sessions.get(client_id).and_then(|s| s.connection) else { return };
        self.log.counters.takeovers += 1;
        if self.connections.get(&old).is_some_and(|c| c.version == Some(Version::V5)) {
            self.emit(old, Kind::Disconnect, 0, 0x8e, packet::encode_disconnect(0x8e), now_ms);
        }
        self.close(old, true, now_ms);
    }

    pub(super) fn on_disconnect(
        &mut self,
        conn: ConnId,
        reason: u8,
        expiry: Option<u32>,
        now_ms: u64,
    ) -> Result<(), Fault> {
        let Some(connection) = self.connections.get(&conn) else { return Ok(()) };
        if let (Some(seconds), Some(session)) = (expiry, self.sessions.get_mut(&connection.client_id)) {
            if session.outlives_ms == Some(0) && seconds > 0 {
                return Err(Fault::protocol("Session Expiry Interval 0 in CONNECT, not 0 in DISCONNECT"));
            }
            session.outlives_ms = interval_ms(seconds);
        }
        if !connection.buffer.is_empty() {
            self.violation(conn, "data after DISCONNECT (MQTT-3.14.4-2)".to_owned());
        }
        // 0x04 Disconnect with Will Message; any other code but 0 publishes it as well (5.0 clause 3.1.2.5).
        self.close(conn, reason != 0, now_ms);
        Ok(())
    }

    /// The network connection is no more. Its session stays or ends, its Will is published, kept or dropped.
    pub(super) fn end(&mut self, conn: ConnId, will: bool, now_ms: u64) {
        let Some(connection) = self.connections.remove(&conn) else { return };
        self.delayed.retain(|_, parcel| parcel.conn != conn);
        let Some(session) = self.sessions.get_mut(&connection.client_id) else { return };
        if session.connection != Some(conn) {
            return;
        }
        session.connection = None;
        session.ends_at_ms = session.outlives_ms.map(|ms| now_ms + ms);
        // 5.0 clause 3.1.3.2.2: published when the delay has passed or the session ends, whichever is first.
        session.will = connection.will.filter(|_| will).map(|w| (now_ms + u64::from(w.delay_s) * 1000, w));
        self.end_sessions(now_ms);
    }

    /// Publishes Wills and ends sessions whose time has come.
    pub(super) fn end_sessions(&mut self, now_ms: u64) {
        let due = |at: u64| at <= now_ms;
        let ended: Vec<Arc<str>> = (self.sessions.values())
            .filter(|s| s.connection.is_none() && s.ends_at_ms.is_some_and(due))
            .map(|s| s.client_id.clone())
            .collect();
        let wills: Vec<Will> = (self.sessions.values_mut())
            .filter(|s| s.connection.is_none())
            .filter_map(|s| s.will.take_if(|will| due(will.0)))
            .map(|(_, will)| will)
            .collect();
        for will in wills {
            self.publish_will(will, now_ms);
        }
        for client_id in ended {
            self.end_session(&client_id, now_ms);
        }
    }

    /// Forgets a session that is not connected; a Will that still waits is published (MQTT-3.1.2-8).
    fn end_session(&mut self, client_id: &str, now_ms: u64) {
        if let Some(session) = self.sessions.remove(client_id)
            && let Some((_, will)) = session.will
        {
            self.publish_will(will, now_ms);
        }
    }

    fn publish_will(&mut self, will: Will, now_ms: u64) {
        self.log.counters.wills += 1;
        let expiry = will.properties.number(p::MESSAGE_EXPIRY);
        let message = Message {
            retain: will.retain,
            properties: will.properties.clone(),
            expires_at_ms: expiry.map(|s| now_ms + u64::from(s) * 1000),
            ..Message::new(&will.topic, will.payload.clone(), will.qos)
        };
        self.log.wills.push(will);
        self.route(&message, now_ms);
    }

    /// When a connection will have been silent for too long.
    pub(super) fn silence_ends(&self, connection: &Connection) -> Option<u64> {
        let allowed = match connection.stage {
            Stage::New => self.limits.connect_timeout_ms,
            Stage::Open(_) if connection.silence_ms > 0 => connection.silence_ms,
            Stage::Open(_) | Stage::Mute => return None,
        };
        Some(connection.last_packet_ms + allowed)
    }

    /// MQTT-3.1.2-22 (3.1.1 MQTT-3.1.2-24): 1.5 × Keep Alive without a packet ends the connection.
    pub(super) fn close_silent(&mut self, now_ms: u64) {
        let silent: Vec<ConnId> = (self.connections.iter())
            .filter(|(_, c)| self.silence_ends(c).is_some_and(|at| at <= now_ms))
            .map(|(conn, _)| *conn)
            .collect();
        for conn in silent {
            self.log.counters.keep_alive_timeouts += 1;
            if self
                .connections
                .get(&conn)
                .is_some_and(|c| c.stage != Stage::New && c.version == Some(Version::V5))
            {
                self.emit(conn, Kind::Disconnect, 0, 0x8d, packet::encode_disconnect(0x8d), now_ms);
            }
            self.close(conn, true, now_ms);
        }
    }

    /// Every connection breaks at once, as when the broker's process dies.
    pub(super) fn break_all(&mut self, now_ms: u64) {
        for conn in self.connections.keys().copied().collect::<Vec<_>>() {
            self.output.push(Output::Close(conn));
            self.end(conn, true, now_ms);
        }
    }
}

impl Unsaid {
    /// The first of these limits that a CONNECT breaks.
    fn broken_by(&self, connect: &Connect) -> Option<&'static str> {
        let will = connect.will.as_ref();
        let broken = [
            ("no_session", self.no_session && !connect.clean),
            (
                "keep_alive",
                self.keep_alive.as_ref().is_some_and(|range| !range.contains(&connect.keep_alive)),
            ),
            ("no_will", self.no_will && will.is_some()),
            ("no_retain", self.no_retain && will.is_some_and(|will| will.retain)),
            ("maximum_qos", will.is_some_and(|will| self.maximum_qos.is_some_and(|most| will.qos > most))),
        ];
        broken.into_iter().find_map(|(limit, broken)| broken.then_some(limit))
    }
}

/// How long the session outlives its connection: on 3.1.1 not at all or for ever (MQTT-3.1.2-4 to -6).
fn outlives_ms(connect: &Connect, imposed_s: Option<u32>) -> Option<u64> {
    match connect.version {
        Version::V311 if connect.clean => Some(0),
        Version::V311 => None,
        Version::V5 => interval_ms(imposed_s.or(connect.properties.number(p::SESSION_EXPIRY)).unwrap_or(0)),
    }
}

fn interval_ms(seconds: u32) -> Option<u64> {
    (seconds != NEVER).then_some(u64::from(seconds) * 1000)
}

fn connected(conn: ConnId, connect: &Connect, now_ms: u64) -> Connected {
    let number = |id| connect.properties.number(id);
    Connected {
        conn,
        at_ms: now_ms,
        version: connect.version,
        client_id: connect.client_id.clone(),
        clean: connect.clean,
        keep_alive: connect.keep_alive,
        session_expiry: number(p::SESSION_EXPIRY),
        receive_maximum: number(p::RECEIVE_MAXIMUM).and_then(|n| u16::try_from(n).ok()),
        maximum_packet_size: number(p::MAXIMUM_PACKET_SIZE),
        will: connect.will.clone(),
        username: connect.username.clone(),
        password: connect.password.clone(),
        answer: None,
    }
}
