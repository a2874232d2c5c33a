//! The connection: what `uplink::connection` does between link and session.

use std::collections::BTreeMap;

use bytes::Bytes;
use fieldpost::message::{PacketId, Qos};
use fieldpost::turn::Change;
use fieldpost::uplink::link::{Link, LinkError};
use fieldpost::uplink::packet::{Packet, Publish, ReasonCode};
use fieldpost::uplink::session::{Counted, Event, Session};
use futures_util::FutureExt;

use super::wire::{Pipe, Wire, bytes_of, connect, flush};
use super::{BROKERS, CANARY, CLIENT, NextCommit, Online, World};
use crate::desk::words;
use crate::rule::{Read, Rule};
use crate::support::broker::Output;

impl World {
    pub fn is_online(&self) -> bool {
        self.online.is_some()
    }

    pub fn session(&mut self) -> Option<&mut Session> {
        self.online.as_mut().map(|online| &mut online.session)
    }

    pub fn is_running(&self) -> bool {
        self.online.as_ref().is_some_and(|online| online.session.is_running())
    }

    /// Whether the link is dead and nobody has noticed.
    pub fn is_deceived(&self) -> bool {
        self.online.as_ref().is_some_and(|online| online.dead)
    }

    pub(super) fn end(&mut self, why: &str) {
        self.broker.script.withhold.clear();
        self.broker.let_go(CLIENT);
        self.tally("connections ended");
        self.ends.push(why.to_owned());
    }

    /// Begins a connection: what must be committed first, and CONNECT on its way.
    pub fn connect(&mut self) {
        self.hang_up("connect");
        // What the last connection left is committed first.
        self.commit(NextCommit::Works);
        self.offer = None;
        self.failed = false;
        self.verdict = false;
        self.unrecorded.clear();
        self.live_from = None;
        if !self.breaks(Rule::AnswersOfThisConnection) {
            self.answers.clear();
        }
        let carry = std::mem::take(&mut self.carry);
        let (now, policy) = (self.now, self.plan.settings.on_session_loss);
        let owner = if self.breaks(Rule::OwnerOfTheRows) { BROKERS[0] } else { BROKERS[self.at] };
        let unacked = carry.unacked();
        let mut begin = self.store().begin((owner, CLIENT), policy, &unacked, now).unwrap();
        if let Some(rule) = self.plan.broken {
            rule.change_begin(&mut begin);
        }
        self.tally("connections begun");
        let (resumed, uncertain) = (begin.resume.len(), begin.session_uncertain);
        self.note(|| format!("begins with {resumed} to resume, uncertain {uncertain}"));
        self.connections += 1;
        let (protocol, max_packet) = (self.plan.protocol, self.plan.max_packet);
        let (always_clean, keep_alive_ms) =
            (self.plan.settings.clean_start, self.plan.settings.keep_alive_ms);
        if begin.clean_start_needed && !always_clean && !self.discard_session() {
            self.carry = carry;
            return self.end("no CONNACK");
        }
        if always_clean {
            self.excuse_commands();
        }
        let (settings, nonce) = (self.plan.settings.clone(), self.connections);
        let session = Session::new(settings, self.connections, nonce, begin, carry, self.now.mono_ms);
        let conn = self.broker.connect(self.now.mono_ms);
        let pipe = Pipe::default();
        let mut link = Link::new(pipe.clone(), protocol, max_packet);
        link.queue(&connect(CLIENT, always_clean, keep_alive_ms, max_packet)).unwrap();
        flush(&mut link);
        let (sent, published) = (Vec::new(), BTreeMap::new());
        self.online =
            Some(Online { session, link, pipe, conn, greeted: false, dead: false, sent, published });
    }

    /// One clean connection on which nothing is published.
    fn discard_session(&mut self) -> bool {
        self.tally("clean starts");
        self.excuse_commands();
        let conn = self.broker.connect(self.now.mono_ms);
        let packets =
            [connect(CLIENT, true, 0, self.plan.max_packet), Packet::Disconnect(ReasonCode::SUCCESS)];
        let bytes = bytes_of(self.plan.protocol, &packets);
        self.broker.input(conn, &bytes, self.now.mono_ms);
        let outputs = self.broker.take_output();
        self.broker.closed(conn, self.now.mono_ms);
        self.route();
        outputs.iter().any(|output| matches!(output, Output::Send(to, _) if *to == conn))
    }

    /// Delivers bytes to the broker.
    pub fn broker_gets(&mut self, count: usize) {
        let Some(online) = self.online.as_ref().filter(|online| !online.dead) else { return };
        let (conn, bytes) = (online.conn, online.pipe.to_broker(count));
        if !bytes.is_empty() {
            self.broker.input(conn, &bytes, self.now.mono_ms);
            self.route();
        }
    }

    /// Delivers bytes to the agent and lets it act.
    pub fn agent_gets(&mut self, count: usize) {
        let Some(online) = self.online.as_mut().filter(|online| !online.dead) else { return };
        {
            let mut wire = online.pipe.0.borrow_mut();
            let count = count.min(wire.to_agent.len());
            let Wire { to_agent, arrived, .. } = &mut *wire;
            arrived.extend(to_agent.drain(..count));
        }
        if let Err(why) = self.read() {
            return self.hang_up(&why);
        }
        self.act();
    }

    fn read(&mut self) -> Result<(), String> {
        while let Some(online) = &mut self.online {
            let next = online.link.try_next().now_or_never().ok_or("the link waits")?;
            let mut packet = match next {
                Ok(None) => return Ok(()),
                Ok(Some(packet)) => packet,
                Err(LinkError::Closed) => return Err("closed".into()),
                Err(error) => return Err(error.to_string()),
            };
            self.note(|| format!("<- {}", in_words(&packet)));
            if let Some(rule) = self.plan.broken {
                match rule.change_read(packet, &self.rows, &self.open) {
                    Read::Packet(changed) => packet = changed,
                    Read::Answer(answer) => {
                        self.send(answer);
                        continue;
                    }
                    Read::Breaks => return Err("what was too large ended the connection".into()),
                }
            }
            match &packet {
                Packet::Oversize { id, .. } => {
                    self.unrecorded.extend(id.map(PacketId::get));
                    self.tally("oversize packets skipped");
                }
                Packet::Publish(publish) => {
                    let id = publish.id.map(PacketId::get);
                    match publish.topic.as_str().starts_with("cmd/") {
                        true => self.unrecorded.retain(|known| Some(*known) != id),
                        false => self.unrecorded.extend(id),
                    }
                }
                _ => {}
            }
            let Some(online) = &mut self.online else { return Ok(()) };
            if let Packet::PubAck(id, reason) | Packet::PubRec(id, reason) = &packet
                && let Some(payload) = online.published.get(id).filter(|_| reason.is_error())
                && !matches!(reason.0, 0x90 | 0x95 | 0x99)
            {
                *self.refusals_heard.entry(payload.clone()).or_default() += 1;
            }
            let greeting = matches!(packet, Packet::ConnAck(_));
            let outcome = online.session.on_packet(packet, self.now.mono_ms);
            let events = online.session.take_events();
            if !online.greeted {
                online.greeted = true;
                if let Some(bytes) = online.session.limits().max_packet_bytes {
                    online.link.set_broker_max_packet(bytes);
                }
            }
            let believes = greeting || !online.session.is_running();
            for event in &events {
                if let (Event::Count(Counted::Ambiguous, rows), true) = (event, believes) {
                    self.believed += rows;
                }
            }
            self.handle_events(events);
            outcome.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(super) fn count_events(&mut self, events: Vec<Event>) {
        for event in events {
            if let Event::Count(what, n) = event {
                self.note(|| format!("counts {n} {what:?}"));
                *self.counts.entry(format!("{what:?}")).or_default() += n;
            }
        }
    }

    fn handle_events(&mut self, events: Vec<Event>) {
        let settled = events.iter().any(|event| matches!(event, Event::SessionSettled { .. }));
        if events.iter().any(|event| matches!(event, Event::Running)) {
            self.tally("sessions running");
        }
        self.count_events(events);
        if settled {
            self.say_online("online");
        }
    }

    /// Publishes our presence.
    pub fn say_online(&mut self, text: &str) {
        let now_ms = self.now.mono_ms;
        if self.breaks(Rule::PresenceCounts) && self.is_running() {
            let (dup, retain, qos) = (false, false, Qos::AtLeastOnce);
            let (id, topic, payload) = (PacketId::new(900), World::presence_topic(), "extra".into());
            let (message_expiry_s, response_topic, correlation_data) = (None, None, None);
            self.send(Packet::Publish(Box::new(Publish {
                dup,
                qos,
                retain,
                topic,
                id,
                payload,
                message_expiry_s,
                response_topic,
                correlation_data,
            })));
            return;
        }
        let text = text.to_owned();
        if let Some(session) = self.session() {
            session.publish_presence(World::presence_topic(), text.into(), true, now_ms);
        }
    }

    /// What the uplink does after every wake: events, turns, packets.
    pub fn act(&mut self) {
        if self.online.as_ref().is_none_or(|online| !online.greeted) {
            return;
        }
        let now_ms = self.now.mono_ms;
        let events = self.session().map(Session::take_events).unwrap_or_default();
        self.handle_events(events);
        while let Some(online) = &mut self.online
            && let Some((mut changes, mut offer)) = online.session.turn()
        {
            let connection = online.session.connection();
            let mut early = false;
            if let Some(rule) = self.plan.broken {
                early = rule.tells_early(&changes);
                rule.change_offer(&mut offer, &mut changes);
            }
            self.take_turn(connection, changes, offer);
            if early && let Some(session) = self.session() {
                session.on_committed(&[], now_ms);
            }
        }
        let Some(online) = &mut self.online else { return };
        let mut packets: Vec<Packet> = std::iter::from_fn(|| online.session.next_packet()).collect();
        let may_retain = online.session.limits().retain_available != Some(false);
        if let Some(rule) = self.plan.broken {
            let retained = |payload: &Bytes| {
                may_retain && self.by_payload.get(payload).is_some_and(|index| self.accepted[*index].retain)
            };
            rule.change_sent(&mut packets, self.connections, &self.rows, retained);
        }
        for packet in packets {
            self.check_order(&packet);
            match packet {
                Packet::Publish(publish) if self.believes_without_proof(&publish) => {
                    self.forge_echo(*publish)
                }
                packet => self.send(packet),
            }
        }
    }

    /// That rule is broken, and this is the canary of a session that is uncertain.
    fn believes_without_proof(&self, publish: &Publish) -> bool {
        let asked = publish.topic.as_str() == CANARY && !self.verdict;
        asked && self.breaks(Rule::CanaryDecides)
    }

    /// The echo that says "the old session", whatever the truth is.
    fn forge_echo(&mut self, canary: Publish) {
        let now_ms = self.now.mono_ms;
        let Some(session) = self.session() else { return };
        let id = canary.id;
        let echo = Publish { qos: Qos::AtMostOnce, id: None, ..canary };
        let _believed = session.on_packet(Packet::Publish(Box::new(echo)), now_ms);
        if let Some(id) = id {
            let _acknowledged = session.on_packet(Packet::PubAck(id, ReasonCode::SUCCESS), now_ms);
        }
        self.act();
    }

    /// Puts a packet on the wire.
    fn send(&mut self, packet: Packet) {
        self.note(|| format!("-> {}", in_words(&packet)));
        match &packet {
            Packet::Publish(publish) if publish.dup => self.tally("PUBLISHes sent again"),
            Packet::Publish(_) => self.tally("PUBLISHes"),
            Packet::PubRel(id, _) if self.rows.get(&id.get()).is_some_and(|row| row.left) => {
                self.freed.insert(id.get());
                self.tally("PUBRELs that only free an identifier");
            }
            Packet::PubRel(..) => self.tally("PUBRELs"),
            Packet::PubComp(_, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND) => {
                self.tally("unknown PUBRELs answered")
            }
            _ => {}
        }
        let keeps = self.breaks(Rule::OnceAConnection) && matches!(packet, Packet::Publish(_));
        let now_ms = self.now.mono_ms;
        let Some(online) = &mut self.online else { return };
        if let Packet::Publish(publish) = &packet {
            online.published.extend(publish.id.map(|id| (id, publish.payload.clone())));
        }
        online.link.queue(&packet).unwrap_or_else(|error| panic!("the session sent {packet:?}: {error}"));
        online.session.on_written(now_ms);
        flush(&mut online.link);
        if keeps {
            online.sent.push(packet);
        }
    }

    /// The connection is over; what the session learned goes to the store.
    pub fn hang_up(&mut self, why: &str) {
        let Some(mut online) = self.online.take() else { return };
        self.note(|| format!("hangs up: {why}"));
        self.end(why);
        self.count_events(online.session.take_events());
        let unsaved = online.session.take_unsaved();
        self.take_turn(online.session.connection(), unsaved, None);
        self.carry = online.session.into_carry();
        self.broker.closed(online.conn, self.now.mono_ms);
        self.route();
    }

    pub(super) fn tick_session(&mut self) {
        let now_ms = self.now.mono_ms;
        let Some(online) = self.online.as_mut() else { return };
        if let Err(error) = online.session.tick(now_ms) {
            self.hang_up(&error.to_string());
        }
    }

    /// Time passes for everybody.
    pub fn pass(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.wall_ms += ms as i64;
        self.broker.tick(self.now.mono_ms);
        self.route();
        if self.breaks(Rule::OnceAConnection) {
            self.send_again();
        }
        self.tick_session();
        self.act();
    }

    /// A timer that sends again, which there must not be.
    fn send_again(&mut self) {
        let Some(online) = &mut self.online else { return };
        let unfinished = |packet: &Packet| match packet {
            Packet::Publish(publish) => {
                publish.id.is_some_and(|id| self.rows.get(&id.get()).is_some_and(|row| !row.received))
            }
            _ => false,
        };
        let again = online.sent.iter().rev().find(|packet| unfinished(packet)).cloned();
        if let Some(Packet::Publish(mut publish)) = again {
            publish.dup = true;
            self.send(Packet::Publish(publish));
        }
    }

    /// Whether the changes of a turn hold what CONNACK meant.
    pub(crate) fn is_verdict(change: &Change) -> bool {
        matches!(
            change,
            Change::SessionAbsent(_)
                | Change::SessionReplaced(_)
                | Change::RowsVoid(_)
                | Change::SessionPresent
        )
    }
}

/// A packet for people: `PUBLISH 1024 "1" dup`, `CONNACK present`.
fn in_words(packet: &Packet) -> String {
    match packet {
        Packet::ConnAck(connack) => {
            let limits = &connack.limits;
            let said =
                |what: &str, value: Option<String>| value.map_or(String::new(), |v| format!(" {what} {v}"));
            format!(
                "CONNACK {}{}{}{}",
                if connack.session_present { "present" } else { "absent" },
                said("receive_max", limits.receive_max.map(|n| n.to_string())),
                said("max_qos", limits.max_qos.map(|n| n.to_string())),
                said("max_packet", limits.max_packet_bytes.map(|n| n.to_string())),
            )
        }
        Packet::Publish(publish) => {
            let text = words(std::slice::from_ref(packet)).concat();
            format!("{} on {} at {}", text.replace("...", ""), publish.topic, publish.qos.number())
        }
        packet => words(std::slice::from_ref(packet)).concat(),
    }
}
