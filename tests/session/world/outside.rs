//! The outside: the broker's side of things, and the faults that come from there and from the gateway's own death.

use bytes::Bytes;
use fieldpost::message::{PacketId, Qos, Topic};
use fieldpost::turn::OnSessionLoss;
use fieldpost::uplink::packet::{Packet, Protocol, Publish, Subscription};
use fieldpost::uplink::session::Carry;

use super::books::Command;
use super::wire::{bytes_of, connect};
use super::{Away, BROKERS, CANARY, CLIENT, OBSERVER, World};
use crate::rule::Rule;
use crate::support::broker::{self, Broker, Kind, Output};

/// Identifiers that an earlier life of this client left at the broker.
const HAUNTED: std::ops::Range<u16> = 1024..1034;

impl World {
    // ---- faults ------------------------------------------------------------------------------------------

    /// The link breaks; of the bytes under way to the broker, `still_arrive` do.
    pub fn cut(&mut self, still_arrive: usize) {
        self.broker_gets(still_arrive);
        self.hang_up("cut");
    }

    /// The link dies without a word: nothing arrives any more, and nobody is told.
    pub fn deaden(&mut self) {
        if let Some(online) = &mut self.online {
            online.dead = true;
            self.tally("links that die without a word");
        }
    }

    /// From now on the broker acknowledges nothing on this connection, and goes on answering PINGREQ.
    pub fn never_acknowledge(&mut self) {
        if self.is_online() {
            self.tally("brokers that never acknowledge");
            let kinds = [Kind::Puback, Kind::Pubrec, Kind::Pubcomp, Kind::Suback, Kind::Connack];
            self.broker.script.withhold.extend(kinds);
        }
    }

    /// The program dies: whatever is not committed is gone.
    pub fn crash(&mut self, still_arrive: usize) {
        self.note(|| "the program dies".into());
        self.tally("crashes");
        self.broker_gets(still_arrive);
        if let Some(mut online) = self.online.take() {
            // What was counted is lost with the program, but not to the books.
            let events = online.session.take_events();
            self.count_events(events);
            self.broker.closed(online.conn, self.now.mono_ms);
            self.broker.script.withhold.clear();
        }
        self.broker.let_go(CLIENT);
        self.route();
        self.waiting.clear();
        self.changes = None;
        self.offer = None;
        self.answers.clear();
        self.lagging.clear();
        self.failed = false;
        self.carry = Carry::default();
        self.forget_holds();
        self.store = None;
        if self.breaks(Rule::RowBeforePublish) {
            self.alter("DELETE FROM inflight WHERE state = 1");
            self.rows.retain(|_, row| row.received);
        }
        self.open();
        self.dispatch_anew();
    }

    /// Changes the closed database.
    fn alter(&self, sql: &str) {
        rusqlite::Connection::open(&self.path).unwrap().execute_batch(sql).unwrap();
    }

    /// The database as it is now.
    pub fn copy(&mut self) -> Vec<u8> {
        if let Some(store) = self.store.take() {
            store.close();
        }
        let bytes = std::fs::read(&self.path).unwrap();
        self.open();
        self.cut(0);
        bytes
    }

    /// The card is exchanged for one with an old copy.
    pub fn restore(&mut self, copy: Vec<u8>) {
        self.crash(0);
        self.store = None;
        std::fs::write(&self.path, copy).unwrap();
        self.open();
    }

    /// The broker loses the session; what it had handed on and we do not know to be done may come twice.
    pub fn lose_session(&mut self) {
        self.note(|| "the broker loses everything".into());
        self.tally("sessions lost");
        self.sessions_lost += 1;
        self.excuse_doubles();
        self.excuse_commands();
        self.broker.restart(broker::Memory::Lost);
        self.route();
        self.furnish_broker();
    }

    /// The broker forgets which QoS 2 identifiers it holds, and nothing else: what it had not handed on is lost,
    /// and only MQTT 5 has a way to say so.
    pub fn forget_identifiers(&mut self) {
        self.note(|| "the broker forgets its identifiers".into());
        self.excuse_doubles();
        let held = self.broker.session(CLIENT).into_iter().flat_map(|session| session.held.values());
        let unheard = held.filter(|held| !held.onward).map(|held| held.message.payload.clone());
        self.may_be_lost.extend(unheard);
        if self.broker.forget_packet_ids(CLIENT) > 0 {
            self.tally("identifiers forgotten");
            self.forgotten = true;
        }
    }

    /// The broker forgets what it has sent and we have not acknowledged to the end, and gives the identifiers to others.
    pub fn forget_sent(&mut self) {
        // With the link, or acknowledgements under way would meet other messages.
        self.cut(0);
        self.excuse_commands();
        if self.broker.forget_sent(CLIENT) > 0 {
            self.tally("messages to us forgotten");
        }
    }

    /// The broker sends a command; only a client with a session and a subscription is sent one.
    pub fn command(&mut self, qos: u8) {
        self.next_number += 1;
        let payload = format!("command {}", self.next_number);
        self.command_with(payload, qos);
    }

    /// The same with a payload of the caller's own.
    pub fn command_with(&mut self, payload: String, qos: u8) {
        let subscription = self.broker.session(CLIENT).and_then(|s| s.subscriptions.get("cmd/#"));
        let Some(granted) = subscription.map(|subscription| subscription.qos) else { return };
        if self.broker.connection_of(CLIENT).is_none() {
            return;
        }
        self.tally("commands sent");
        let payload = Bytes::from(payload);
        // What we ask for is QoS 2; a broker that grants less doubles, and nobody can be blamed.
        let limits = [Some(self.broker.limits.granted_qos), Some(self.broker.limits.maximum_qos)];
        let mut limits = limits.into_iter().chain([self.plan.settings.limits.max_qos]).flatten();
        let may_double = qos < 2 || limits.any(|limit| limit < 2) || self.was_limited;
        let may_be_lost = self.plan.settings.clean_start;
        let effective = qos.min(granted);
        self.commanded.push(Command { payload: payload.clone(), qos: effective, may_be_lost, may_double });
        self.broker.publish(&broker::Message::new("cmd/x", payload, qos));
        self.route();
    }

    /// Something larger than we take.
    pub fn oversize_command(&mut self, qos: u8) {
        if self.plan.protocol == Protocol::V5 || self.broker.connection_of(CLIENT).is_none() {
            // An honest MQTT 5 broker obeys our Maximum Packet Size.
            return;
        }
        let payload = vec![b'.'; self.plan.max_packet as usize + 10];
        self.broker.publish(&broker::Message::new("cmd/large", payload, qos));
        self.route();
    }

    pub fn restart_broker(&mut self) {
        self.tally("broker restarts");
        self.broker.restart(broker::Memory::Kept);
        self.route();
        self.furnish_broker();
    }

    /// The broker acknowledges what it should not: nothing may follow from it. `which` chooses among what is in
    /// flight, `other` an identifier that is not.
    pub fn acknowledge_wrongly(&mut self, which: usize, other: u16) {
        let known =
            |id: &u16| self.broker.session(CLIENT).is_some_and(|session| session.held.contains_key(id));
        let rows: Vec<u16> = self.rows.keys().copied().collect();
        let row = rows.get(which % rows.len().max(1)).copied();
        let (kind, id) = match (row, which % 4) {
            // PUBCOMP before anything else; once PUBREC is under way, only PUBACK is certainly wrong.
            (Some(id), 0 | 1) if !self.rows[&id].received && !known(&id) => (0x70, id),
            (Some(id), 0..=2) => (0x40, id),
            _ => (if other.is_multiple_of(2) { 0x40 } else { 0x70 }, other),
        };
        let [high, low] = id.to_be_bytes();
        if self.broker.send_raw(CLIENT, &[kind, 2, high, low]) {
            self.tally("wrong acknowledgements");
            self.note(|| format!("the broker acknowledges {id} wrongly, {kind:#04x}"));
        }
        self.route();
    }

    /// The broker believes that we owe it a PUBREL, or it us a PUBCOMP, for an identifier that nobody uses.
    pub fn confuse(&mut self, id: u16, inbound: bool) {
        if !self.broker.script.withhold.is_empty() {
            return;
        }
        let ghost = broker::Message::new("ghost", "ghost", 2);
        let confused = match inbound {
            true => self.broker.ask_for_pubcomp(CLIENT, ghost),
            false => self.broker.hold_stranger(CLIENT, id, ghost),
        };
        if confused {
            self.tally("confused brokers");
        }
        self.route();
    }

    // ---- the broker's side -------------------------------------------------------------------------------

    /// What a test wants of every broker: its limits, and a subscriber at QoS 0.
    pub(super) fn furnish_broker(&mut self) {
        self.broker.script.held_limit = self.plan.held_limit;
        match self.plan.canary_denied {
            Some(0) => self.broker.script.deny_subscribe = vec![CANARY.into()],
            Some(1) => self.broker.script.deny_publish = vec![CANARY.into()],
            Some(_) => self.broker.script.deny_read = vec![CANARY.into()],
            None => {}
        }
        if self.plan.haunted && self.broker.session(CLIENT).is_none() && self.connections == 0 {
            self.haunt(HAUNTED);
        }
        self.observe();
    }

    /// A subscriber at QoS 0: what it gets is what the broker handed on, in that order.
    fn observe(&mut self) {
        let script = std::mem::take(&mut self.broker.script);
        self.observer = self.broker.connect(self.now.mono_ms);
        let heard = fieldpost::message::Lane::ALL.into_iter().filter(|lane| Some(*lane) != self.plan.unheard);
        let filters = heard.map(|lane| Subscription {
            filter: format!("t/{lane}/#"),
            qos: Qos::AtMostOnce,
            retained: true,
        });
        let id = PacketId::new(1).unwrap();
        let packets = [connect(OBSERVER, true, 0, 1 << 20), Packet::Subscribe(id, filters.collect())];
        let bytes = bytes_of(Protocol::V5, &packets);
        self.broker.input(self.observer, &bytes, self.now.mono_ms);
        self.broker.script = script;
        self.route();
    }

    /// Puts what the broker sends on the wire.
    pub(super) fn route(&mut self) {
        for output in self.broker.take_output() {
            let Some(online) = self.online.as_ref().filter(|online| !online.dead) else { continue };
            match output {
                Output::Send(conn, bytes) if conn == online.conn => {
                    online.pipe.0.borrow_mut().to_agent.extend(bytes);
                }
                Output::Close(conn) if conn == online.conn => online.pipe.0.borrow_mut().closed = true,
                Output::Send(..) | Output::Close(_) => {}
            }
        }
    }

    /// Messages go to the other broker of the list from now on; what is in flight here goes there once it has
    /// answered.
    pub fn change_broker(&mut self) {
        self.hang_up("another broker");
        self.commit(super::NextCommit::Works);
        self.tally("changes of the broker");
        self.offer = None;
        self.carry = Carry::default();
        self.refused_since.clear();
        let is_new = self.away.is_none();
        let there = self.away.take().unwrap_or_else(|| {
            let mut broker = Broker::with_limits(self.plan.limits.clone());
            broker.tick(self.now.mono_ms);
            Away { broker, ..Away::default() }
        });
        self.away = Some(Away {
            broker: std::mem::replace(&mut self.broker, there.broker),
            rows: std::mem::replace(&mut self.rows, there.rows),
            open: std::mem::replace(&mut self.open, there.open),
        });
        self.at = 1 - self.at;
        if is_new {
            self.haunt(HAUNTED);
            self.furnish_broker();
        }
    }

    /// The other broker, if messages ever went there.
    pub fn other_broker(&self) -> Option<&Broker> {
        self.away.as_ref().map(|away| &away.broker)
    }

    /// Which of the brokers it is.
    pub fn broker_index(&self) -> usize {
        self.at
    }

    /// From now on everything goes to another broker, which holds identifiers of an earlier life of this client.
    pub fn move_to_another_broker(&mut self) -> Broker {
        self.change_broker();
        // As the agent does when it starts with another configuration.
        let owners = [(BROKERS[self.at].to_owned(), CLIENT.to_owned())];
        let policy: OnSessionLoss = self.plan.settings.on_session_loss;
        let settled = self.store().keep_owners(&owners, policy).unwrap();
        self.possibly_doubled += settled.possibly_doubled;
        self.possibly_lost += settled.possibly_lost;
        self.away.take().map(|away| away.broker).unwrap()
    }

    /// The broker holds these identifiers for a client of our name whose database is gone.
    pub fn haunt(&mut self, ids: std::ops::Range<u16>) {
        let conn = self.broker.connect(self.now.mono_ms);
        let mut packets = vec![connect(CLIENT, false, 0, 1 << 20)];
        packets.extend(ids.map(|number| {
            Packet::Publish(Box::new(Publish {
                dup: false,
                qos: Qos::ExactlyOnce,
                retain: false,
                topic: Topic::new("ghost").unwrap(),
                id: PacketId::new(number),
                payload: "ghost".into(),
                message_expiry_s: None,
                response_topic: None,
                correlation_data: None,
            }))
        }));
        let (script, limits) =
            (std::mem::take(&mut self.broker.script), std::mem::take(&mut self.broker.limits));
        let bytes = bytes_of(self.plan.protocol, &packets);
        self.broker.input(conn, &bytes, self.now.mono_ms);
        self.broker.closed(conn, self.now.mono_ms);
        (self.broker.script, self.broker.limits) = (script, limits);
        self.route();
    }
}
