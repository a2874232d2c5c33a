//! The test's hands inside the broker: forget, deliver, repeat, break, at a moment of the test's choosing.
//! Faults that wait for an occasion are in `script`.
//!
//! Invariant: whatever makes an honest client look guilty marks its session or connection as tampered with, and
//! the rules that could then not be held against it are not checked there.

use super::Broker;
use super::log::ConnId;
use super::packet::{self, Ack};
use super::session::{Awaiting, Held, InFlight, Message, Session, Stage};
use super::wire::{Kind, Version};
use std::sync::Arc;

/// What a broker still knows after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Sessions, packet ids and retained messages.
    Kept,
    /// Nothing; the log is the test's and stays.
    Lost,
}

impl Broker {
    /// The broker dies and comes back: every connection breaks, without DISCONNECT.
    pub fn restart(&mut self, memory: Memory) {
        self.break_all(self.now_ms);
        if memory == Memory::Lost {
            self.sessions.clear();
            self.retained.clear();
        }
    }

    /// Loses a client's session, also under a living connection. False if there was none.
    pub fn forget_session(&mut self, client_id: &str) -> bool {
        let Some(session) = self.sessions.get_mut(client_id) else { return false };
        if session.connection.is_none() {
            self.sessions.remove(client_id);
            return true;
        }
        let fresh = Session {
            connection: session.connection,
            outlives_ms: session.outlives_ms,
            tampered: true,
            ..Session::new(session.client_id.clone())
        };
        *session = fresh;
        true
    }

    /// Loses the QoS 2 packet ids held for a client and nothing else, as EMQX does after `await_rel_timeout`.
    /// Says how many.
    pub fn forget_packet_ids(&mut self, client_id: &str) -> usize {
        let Some(session) = self.sessions.get_mut(client_id) else { return 0 };
        session.tampered = true;
        std::mem::take(&mut session.held).len()
    }

    /// Loses what was sent to a client and not acknowledged to the end, so that its identifiers are free. Says how many.
    pub fn forget_sent(&mut self, client_id: &str) -> usize {
        let Some(session) = self.sessions.get_mut(client_id) else { return 0 };
        session.tampered = true;
        std::mem::take(&mut session.in_flight).len()
    }

    /// Publishes as if a client had done so: retained if it says so, and to whoever subscribed.
    pub fn publish(&mut self, message: &Message) {
        self.route(message, self.now_ms);
    }

    /// Queues a message for one client, subscribed or not. False if it has no session.
    pub fn deliver(&mut self, client_id: &str, message: Message) -> bool {
        let Some(client_id) = self.sessions.get(client_id).map(|s| s.client_id.clone()) else { return false };
        self.enqueue(&client_id, message, self.now_ms);
        true
    }

    /// Sends a message at once with an id and DUP of the test's choice, whatever is in flight; the client's
    /// acknowledgements are then handled as for any other. False if it is not connected.
    pub fn deliver_as(&mut self, client_id: &str, id: u16, dup: bool, message: Message) -> bool {
        let Some(conn) = self.connection_of(client_id) else { return false };
        let Some(session) = self.sessions.get_mut(client_id) else { return false };
        let publish = message.publish(id, dup, self.now_ms);
        let client_id = session.client_id.clone();
        if message.qos > 0 {
            session.sent(conn, id, message);
        }
        self.send_publish(conn, &client_id, &publish, self.now_ms);
        true
    }

    /// Sends the latest QoS 1 or 2 message to a client once more, with the same id and DUP, acknowledged or not.
    /// Gives the id; `None` if there is no such message or no connection.
    pub fn repeat(&mut self, client_id: &str) -> Option<u16> {
        let conn = self.connection_of(client_id)?;
        let last = self.log.delivered.iter().rev().find(|d| *d.client_id == *client_id && d.qos > 0)?;
        let (id, retain) = (last.id, last.retain);
        let message = Message { retain, ..Message::new(&last.topic, last.payload.clone(), last.qos) };
        let publish = message.publish(id, true, self.now_ms);
        let session = self.sessions.get_mut(client_id)?;
        let client_id: Arc<str> = session.client_id.clone();
        let known = |m: &InFlight| m.id == id;
        if !session.in_flight.iter().any(known) {
            session.sent(conn, id, message);
        }
        self.send_publish(conn, &client_id, &publish, self.now_ms);
        Some(id)
    }

    /// Holds a Packet Identifier the client never used, and asks for its PUBREL. False if the client is not connected.
    pub fn hold_stranger(&mut self, client_id: &str, id: u16, message: Message) -> bool {
        let Some(conn) = self.connection_of(client_id) else { return false };
        let Some(session) = self.sessions.get_mut(client_id) else { return false };
        let (received_no, arrived_no) = (u64::MAX, 0);
        let held = Held { message, received_no, reason: 0, pubrec_no: None, arrived_no, onward: true };
        session.held.insert(id, held);
        self.connections.get_mut(&conn).into_iter().for_each(|connection| connection.tampered = true);
        self.answer(conn, Ack { kind: Kind::Pubrec, id, reason: 0 }, self.now_ms);
        true
    }

    /// Lets go of what [`Broker::hold_stranger`] made it hold.
    pub fn let_go(&mut self, client_id: &str) {
        if let Some(session) = self.sessions.get_mut(client_id) {
            session.held.retain(|_, held| held.received_no != u64::MAX);
        }
    }

    /// Believes that the client has received this message, and sends PUBREL. False if it is not connected.
    pub fn ask_for_pubcomp(&mut self, client_id: &str, message: Message) -> bool {
        let Some(conn) = self.connection_of(client_id) else { return false };
        let Some(session) = self.sessions.get_mut(client_id) else { return false };
        let id = session.free_id();
        session.in_flight.push(InFlight { id, message, awaiting: Awaiting::Pubcomp, sent_on: conn });
        self.connections.get_mut(&conn).into_iter().for_each(|connection| connection.tampered = true);
        self.answer(conn, Ack { kind: Kind::Pubrel, id, reason: 0 }, self.now_ms);
        true
    }

    /// Sends any bytes to a client. False if it is not connected.
    pub fn send_raw(&mut self, client_id: &str, bytes: &[u8]) -> bool {
        let Some(conn) = self.connection_of(client_id) else { return false };
        self.send_raw_on(conn, bytes)
    }

    /// Sends any bytes on a connection, before CONNECT too. False if it is closed.
    pub fn send_raw_on(&mut self, conn: ConnId, bytes: &[u8]) -> bool {
        let Some(connection) = self.connections.get_mut(&conn) else { return false };
        connection.tampered = true;
        self.send(conn, bytes);
        true
    }

    /// Closes a client's connection, on 5.0 with DISCONNECT and this reason code. False if it is not connected.
    pub fn disconnect(&mut self, client_id: &str, reason: u8) -> bool {
        let Some(conn) = self.connection_of(client_id) else { return false };
        if self.version(conn) == Version::V5 {
            self.emit(conn, Kind::Disconnect, 0, reason, packet::encode_disconnect(reason), self.now_ms);
        }
        self.close(conn, true, self.now_ms);
        true
    }

    /// Breaks every connection without DISCONNECT.
    pub fn cut_all(&mut self) {
        self.break_all(self.now_ms);
    }

    /// Breaks one connection because its client does not read.
    pub fn cut_slow_reader(&mut self, conn: ConnId) {
        self.log.counters.slow_readers += 1;
        self.close(conn, true, self.now_ms);
    }

    /// Messages of a client's session that are not acknowledged to the end: in flight, and waiting.
    pub fn unfinished(&self, client_id: &str) -> usize {
        self.sessions.get(client_id).map_or(0, |s| s.in_flight.len() + s.queue.len())
    }

    /// Connections on which the script leaves CONNECT unanswered.
    pub fn mute_connections(&self) -> usize {
        self.connections.values().filter(|c| c.stage == Stage::Mute).count()
    }
}
