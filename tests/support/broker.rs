//! A model broker for tests: MQTT 3.1.1 and 5.0, written from the specifications alone.
//!
//! `Broker` is pure: bytes and the time in milliseconds go in, bytes and closed connections come out, so that
//! it runs behind a socket (`server`) and in a simulation with virtual time alike. Same inputs, same outputs:
//! nothing here is random or depends on a hash's order.
//!
//! It does three things a real broker does not: it writes down every rule a client breaks (`Log::violations`),
//! it counts first-time PUBLISHes (`Log::received`), and it misbehaves on demand (`Script`).
//!
//! Invariant: a QoS 2 PUBLISH whose packet id is held is never taken a second time, on whatever connection, and
//! its id stays held until PUBREL, the session's end, or a fault the test asked for.

mod connect;
mod control;
mod inbound;
pub mod log;
mod outbound;
pub mod packet;
pub mod script;
pub mod server;
pub mod session;
pub mod topic;
pub mod wire;

pub use control::Memory;
pub use log::{ConnId, Log, Seen, Tally, Way};
pub use script::{ConnectScript, Cut, CutAt, CutWhen, Limits, Onward, Refusal, Script, Times, Unsaid};
pub use server::BrokerServer;
pub use session::Message;
pub use wire::{Kind, Version};

use bytes::Bytes;
use log::{Delivered, Violation};
use packet::Packet;
use session::{Connection, Session, Stage};
use std::collections::BTreeMap;
use std::sync::Arc;
use wire::Fault;

/// What must happen on the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send these bytes.
    Send(ConnId, Vec<u8>),
    /// Close, once everything before has been sent. The broker has forgotten the connection already.
    Close(ConnId),
}

/// A packet on its way out.
#[derive(Clone, Debug)]
struct Parcel {
    conn: ConnId,
    kind: Kind,
    id: u16,
    reason: u8,
    bytes: Vec<u8>,
    delivered: Option<Box<Delivered>>,
}

/// The broker.
#[derive(Clone, Debug, Default)]
pub struct Broker {
    /// Honest limits; change them at any time.
    pub limits: Limits,
    /// Faults; change them at any time.
    pub script: Script,
    /// Everything seen.
    pub log: Log,
    connections: BTreeMap<ConnId, Connection>,
    sessions: BTreeMap<Arc<str>, Session>,
    retained: BTreeMap<Arc<str>, Message>,
    delayed: BTreeMap<(u64, u64), Parcel>,
    output: Vec<Output>,
    doomed: Vec<ConnId>,
    last_conn: ConnId,
    last_serial: u64,
    now_ms: u64,
}

impl Broker {
    /// A broker that follows the specification, with no limits worth mentioning.
    pub fn new() -> Broker {
        Broker::default()
    }

    /// The same with limits of its own.
    pub fn with_limits(limits: Limits) -> Broker {
        Broker { limits, ..Broker::default() }
    }

    /// A client's network connection is open.
    pub fn connect(&mut self, now_ms: u64) -> ConnId {
        self.now_ms = now_ms;
        self.last_conn += 1;
        self.connections.insert(self.last_conn, Connection::new(now_ms));
        self.last_conn
    }

    /// Bytes came from a client; any split will do. Ignored on a connection the broker has closed.
    pub fn input(&mut self, conn: ConnId, bytes: &[u8], now_ms: u64) {
        self.now_ms = now_ms;
        let cut_after = self.byte_cut(bytes.len());
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        let bytes = &bytes[..cut_after.unwrap_or(bytes.len())];
        connection.buffer.extend_from_slice(bytes);
        self.log.connections.entry(conn).or_default().bytes_in += bytes.len() as u64;
        while self.step(conn, now_ms) {}
        if cut_after.is_some() {
            self.cut(conn, now_ms);
        }
        self.cut_doomed(now_ms);
    }

    /// A client's network connection is gone without DISCONNECT: its Will is due. Harmless if it was closed.
    pub fn closed(&mut self, conn: ConnId, now_ms: u64) {
        self.now_ms = now_ms;
        self.end(conn, true, now_ms);
    }

    /// Does what has become due: delayed packets, keep-alive, Wills, ends of sessions.
    pub fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        while let Some(entry) = self.delayed.first_entry() {
            if entry.key().0 > now_ms {
                break;
            }
            let parcel = entry.remove();
            self.release(parcel, now_ms);
        }
        self.close_silent(now_ms);
        self.end_sessions(now_ms);
        self.cut_doomed(now_ms);
    }

    /// When `tick` has something to do next.
    pub fn next_deadline(&self) -> Option<u64> {
        let delayed = self.delayed.keys().next().map(|key| key.0);
        let silent = self.connections.values().filter_map(|c| self.silence_ends(c)).min();
        let sessions = self.sessions.values().filter(|s| s.connection.is_none());
        let ends = sessions.flat_map(|s| [s.ends_at_ms, s.will.as_ref().map(|w| w.0)]).flatten().min();
        [delayed, silent, ends].into_iter().flatten().min()
    }

    /// The time it was told last; what a test does with its own hands happens then.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// Takes what must be sent and closed, in order.
    pub fn take_output(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.output)
    }

    /// Handles one packet of the connection's buffer; false when none is complete.
    fn step(&mut self, conn: ConnId, now_ms: u64) -> bool {
        let limit = self.limits.maximum_packet_size.map_or(usize::MAX, |limit| limit as usize);
        let Some(connection) = self.connections.get_mut(&conn) else { return false };
        if connection.stage == Stage::Mute {
            connection.buffer.clear();
            return false;
        }
        let version = connection.version;
        let outcome = match wire::next_frame(&mut connection.buffer, limit, version) {
            Ok(None) => return false,
            Ok(Some(frame)) => packet::decode(&frame, version),
            Err(fault) => Err(fault),
        };
        connection.last_packet_ms = now_ms;
        match outcome {
            Ok(packet) => self.packet(conn, packet, now_ms),
            Err(fault) => self.fail(conn, &fault, now_ms),
        }
        true
    }

    /// Handles a decoded packet, with the cuts the script wants around it.
    fn packet(&mut self, conn: ConnId, packet: Packet, now_ms: u64) {
        let seen = seen(&packet);
        self.log.saw(conn, seen);
        let cut = self.packet_cut(seen.kind);
        if cut == Some(CutWhen::Before) {
            return self.cut(conn, now_ms);
        }
        if cut == Some(CutWhen::Unanswered)
            && let Some(connection) = self.connections.get_mut(&conn)
        {
            connection.muted = true;
        }
        if let Err(fault) = self.handle(conn, packet, now_ms) {
            self.fail(conn, &fault, now_ms);
        }
        if cut.is_some() {
            self.cut(conn, now_ms);
        }
    }

    fn handle(&mut self, conn: ConnId, packet: Packet, now_ms: u64) -> Result<(), Fault> {
        match packet {
            Packet::Connect(connect) => self.on_connect(conn, *connect, now_ms),
            Packet::Publish(publish) => self.on_publish(conn, publish, now_ms),
            Packet::Ack(ack) if ack.kind == Kind::Pubrel => self.on_pubrel(conn, ack, now_ms),
            Packet::Ack(ack) => self.on_ack(conn, ack, now_ms),
            Packet::Subscribe(id, requests) => self.on_subscribe(conn, id, requests, now_ms),
            Packet::Unsubscribe(id, filters) => self.on_unsubscribe(conn, id, &filters, now_ms),
            Packet::Pingreq => {
                self.emit(conn, Kind::Pingresp, 0, 0, packet::pingresp(), now_ms);
                Ok(())
            }
            Packet::Disconnect(reason, expiry) => self.on_disconnect(conn, reason, expiry, now_ms),
        }
    }

    /// A rule was broken that costs the connection (5.0 clause 4.13; 3.1.1 clause 4.8).
    fn fail(&mut self, conn: ConnId, fault: &Fault, now_ms: u64) {
        let Some(connection) = self.connections.get(&conn) else { return };
        if let Some(limit) = fault.unsaid {
            self.log.limits_hit.push(limit);
            return self.close(conn, true, now_ms);
        }
        let (stage, version) = (connection.stage, connection.version);
        // 3.1.1 has no way to announce Maximum Packet Size, so a client cannot break it.
        if fault.reason != 0x95 || version != Some(Version::V311) {
            self.violation(conn, fault.text.clone());
        }
        match (stage, version) {
            (Stage::Open(true), Some(Version::V5)) => {
                let bytes = packet::encode_disconnect(fault.reason);
                self.emit(conn, Kind::Disconnect, 0, fault.reason, bytes, now_ms);
            }
            // MQTT-3.1.2-2: return code 0x01, unacceptable protocol level; a newer client knows it as well.
            (Stage::New, _) if fault.reason == 0x84 => {
                let bytes = packet::connack(Version::V311, false, 1, &wire::Properties::default());
                self.emit(conn, Kind::Connack, 0, 1, bytes, now_ms);
            }
            _ => {}
        }
        self.close(conn, true, now_ms);
    }

    /// Writes down a broken rule.
    fn violation(&mut self, conn: ConnId, text: String) {
        let client_id = self.connections.get(&conn).map_or_else(|| "".into(), |c| c.client_id.clone());
        self.log.violations.push(Violation { conn, client_id, text });
    }

    /// Closes after what is on its way, and ends the connection here.
    fn close(&mut self, conn: ConnId, will: bool, now_ms: u64) {
        if self.connections.contains_key(&conn) {
            self.output.push(Output::Close(conn));
            self.end(conn, will, now_ms);
        }
    }

    /// Closes because the script says so.
    fn cut(&mut self, conn: ConnId, now_ms: u64) {
        if self.connections.contains_key(&conn) {
            self.log.counters.cuts += 1;
            self.close(conn, true, now_ms);
        }
    }

    fn cut_doomed(&mut self, now_ms: u64) {
        for conn in std::mem::take(&mut self.doomed) {
            self.cut(conn, now_ms);
        }
    }

    /// Counts a packet from a client towards the cuts.
    fn packet_cut(&mut self, kind: Kind) -> Option<CutWhen> {
        let limit = |at| if let CutAt::Packet(k, n) = at { (k == kind).then_some(n.into()) } else { None };
        self.count(1, limit).map(|cut| cut.when)
    }

    /// Counts a packet to a client towards the cuts.
    fn sent_cut(&mut self, kind: Kind) -> bool {
        let limit = |at| if let CutAt::Sent(k, n) = at { (k == kind).then_some(n.into()) } else { None };
        self.count(1, limit).is_some()
    }

    /// Counts bytes from a client towards the cuts: how many of them still count.
    fn byte_cut(&mut self, length: usize) -> Option<usize> {
        let limit = |at| if let CutAt::Byte(n) = at { Some(n) } else { None };
        let cut = self.count(length as u64, limit)?;
        let beyond = cut.seen.saturating_sub(limit(cut.at)?);
        Some(length.saturating_sub(beyond as usize))
    }

    /// Counts towards every cut that has a limit for this; gives the first that has reached it, as it was then,
    /// and removes it or starts it again.
    fn count(&mut self, more: u64, limit: impl Fn(CutAt) -> Option<u64>) -> Option<Cut> {
        let mut reached = None;
        for (index, cut) in self.script.cuts.iter_mut().enumerate() {
            let Some(limit) = limit(cut.at) else { continue };
            cut.seen += more;
            if cut.seen >= limit && reached.is_none() {
                reached = Some(index);
            }
        }
        let index = reached?;
        let fired = self.script.cuts[index];
        if fired.again {
            self.script.cuts[index].seen = 0;
        } else {
            self.script.cuts.remove(index);
        }
        Some(fired)
    }

    fn serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// Sends an ordinary packet: every packet but PUBLISH leaves through here.
    fn emit(&mut self, conn: ConnId, kind: Kind, id: u16, reason: u8, bytes: Vec<u8>, now_ms: u64) {
        self.dispatch(Parcel { conn, kind, id, reason, bytes, delivered: None }, now_ms);
    }

    /// Withholds, delays or sends a packet, as the script has it.
    fn dispatch(&mut self, parcel: Parcel, now_ms: u64) {
        if self.script.withhold.contains(&parcel.kind) {
            self.log.counters.withheld += 1;
            return;
        }
        match self.script.delay_ms.get(&parcel.kind) {
            Some(&delay) if delay > 0 => {
                let key = (now_ms + delay, self.serial());
                self.delayed.insert(key, parcel);
            }
            _ => self.release(parcel, now_ms),
        }
    }

    /// The one way out: accounts, writes down, sends.
    fn release(&mut self, mut parcel: Parcel, now_ms: u64) {
        let serial = self.serial();
        let Some(connection) = self.connections.get_mut(&parcel.conn) else { return };
        if connection.muted {
            return;
        }
        let (conn, kind) = (parcel.conn, parcel.kind);
        let mut again = self.script.double.contains(&kind);
        if let Some(bytes) = self.script.replace.remove(&kind) {
            parcel.bytes = bytes;
            again = false;
            connection.tampered = true;
        }
        connection.tampered |= again;
        self.account(&parcel, serial);
        let seen = Seen {
            way: Way::Out,
            kind,
            id: parcel.id,
            reason: parcel.reason,
            dup: parcel.delivered.as_ref().is_some_and(|d| d.dup),
        };
        self.log.saw(conn, seen);
        self.log.delivered.extend(parcel.delivered.take().map(|delivered| *delivered));
        self.send(conn, &parcel.bytes);
        if again {
            self.send(conn, &parcel.bytes);
        }
        if self.sent_cut(kind) {
            self.doomed.push(conn);
        }
        if kind == Kind::Connack && parcel.reason == 0 {
            self.connack_left(conn, now_ms);
        }
    }

    fn send(&mut self, conn: ConnId, bytes: &[u8]) {
        // Joined, so that a burst of acknowledgements is one write.
        match self.output.last_mut() {
            Some(Output::Send(last, out)) if *last == conn => out.extend_from_slice(bytes),
            _ => self.output.push(Output::Send(conn, bytes.to_vec())),
        }
    }

    /// Publishes for the broker itself or a client: keeps it if retained, and hands it to whoever subscribed.
    fn route(&mut self, message: &Message, now_ms: u64) {
        if message.retain && self.limits.retain_available {
            self.retain(message);
        }
        if self.script.deny_read.iter().any(|filter| topic::matches(filter, &message.topic)) {
            return;
        }
        let wanted: Vec<(Arc<str>, u8, bool)> = (self.sessions.values())
            .filter_map(|s| s.wants(message).map(|(qos, keep)| (s.client_id.clone(), qos, keep)))
            .collect();
        for (client_id, qos, keep) in wanted {
            let copy =
                Message { qos: qos.min(message.qos), retain: keep && message.retain, ..message.clone() };
            self.enqueue(&client_id, copy, now_ms);
        }
    }

    fn retain(&mut self, message: &Message) {
        // MQTT-3.3.1-6, MQTT-3.3.1-7: an empty payload removes and is not kept.
        if message.payload.is_empty() {
            self.retained.remove(&message.topic);
        } else {
            self.retained.insert(message.topic.clone(), message.clone());
        }
    }

    /// Payload of a retained message.
    pub fn retained(&self, topic: &str) -> Option<&Bytes> {
        self.retained.get(topic).map(|message| &message.payload)
    }

    /// Topics that have a retained message, sorted.
    pub fn retained_topics(&self) -> Vec<Arc<str>> {
        self.retained.keys().cloned().collect()
    }

    /// A client's session, connected or not.
    pub fn session(&self, client_id: &str) -> Option<&Session> {
        self.sessions.get(client_id)
    }

    /// The connection of a client whose CONNACK has left.
    pub fn connection_of(&self, client_id: &str) -> Option<ConnId> {
        let conn = self.sessions.get(client_id)?.connection?;
        (self.connections.get(&conn)?.stage == Stage::Open(true)).then_some(conn)
    }

    /// Number of open network connections.
    pub fn open_connections(&self) -> usize {
        self.connections.len()
    }

    /// Rules clients broke, in words; empty is what a test wants.
    pub fn violations(&self) -> Vec<String> {
        self.log.violations.iter().map(Violation::to_string).collect()
    }

    /// First-time PUBLISHes taken, in order.
    pub fn received(&self) -> &[log::Received] {
        &self.log.received
    }

    /// CONNECTs, in order.
    pub fn connects(&self) -> &[log::Connected] {
        &self.log.connects
    }

    /// Packets of one connection, both ways, in order.
    pub fn packets(&self, conn: ConnId) -> &[Seen] {
        self.log.connections.get(&conn).map_or(&[], |log| &log.packets)
    }
}

/// What the log says of a packet from a client.
fn seen(packet: &Packet) -> Seen {
    let (kind, id, reason, dup) = match packet {
        Packet::Connect(_) => (Kind::Connect, 0, 0, false),
        Packet::Publish(publish) => (Kind::Publish, publish.id, 0, publish.dup),
        Packet::Ack(ack) => (ack.kind, ack.id, ack.reason, false),
        Packet::Subscribe(id, _) => (Kind::Subscribe, *id, 0, false),
        Packet::Unsubscribe(id, _) => (Kind::Unsubscribe, *id, 0, false),
        Packet::Pingreq => (Kind::Pingreq, 0, 0, false),
        Packet::Disconnect(reason, _) => (Kind::Disconnect, 0, *reason, false),
    };
    Seen { way: Way::In, kind, id, reason, dup }
}
