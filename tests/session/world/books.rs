//! The books: what must be on the disk before a packet leaves, and what must follow from each commit.
//!
//! Invariant: they are kept from what was committed alone, never from what the session believes.

use bytes::Bytes;
use fieldpost::command::CommandStep;
use fieldpost::message::{Lane, Message, PacketId, Qos};
use fieldpost::turn::{Change, Hold, OnSessionLoss, Taken};
use fieldpost::uplink::packet::{Packet, Publish, ReasonCode};

use super::{CANARY, World};
use crate::random::number;
use crate::support::broker::Onward;

/// A message the store accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub lane: Lane,
    pub seq: u64,
    pub topic: String,
    pub qos: Qos,
    pub retain: bool,
    pub payload: Bytes,
}

/// A QoS 2 exchange that has begun.
#[derive(Debug, Clone)]
pub struct Row {
    pub payload: Bytes,
    /// Its PUBREC, or its end, is committed.
    pub received: bool,
    pub lane: Lane,
    pub seq: u64,
    /// Its message has gone to the other broker, or was given up.
    pub left: bool,
}

/// A command the broker sent.
#[derive(Debug, Clone)]
pub struct Command {
    pub payload: Bytes,
    pub qos: u8,
    /// The session it waited in is gone.
    pub may_be_lost: bool,
    /// Something did not do QoS 2.
    pub may_double: bool,
}

impl World {
    /// The producer has heard "accepted".
    pub(super) fn accept(&mut self, message: &Message) {
        let seq = self.next_seq[message.lane as usize];
        self.next_seq[message.lane as usize] += 1;
        let payload = message.payload.clone().unnumbered();
        self.by_payload.insert(payload.clone(), self.accepted.len());
        self.by_seq.insert((message.lane, seq), self.accepted.len());
        self.accepted.push(Accepted {
            lane: message.lane,
            seq,
            topic: message.topic.to_string(),
            qos: message.qos,
            retain: message.retain,
            payload,
        });
    }

    fn payload_of(&self, lane: Lane, seq: u64) -> Option<Bytes> {
        self.by_seq.get(&(lane, seq)).map(|index| self.accepted[*index].payload.clone())
    }

    /// Keeps the books of what is on the disk.
    pub(super) fn committed(&mut self, change: &Change) {
        match change {
            Change::Inbound { inbound, .. } => self.recorded.push(inbound.payload.clone()),
            Change::InboundOpened { id, inbound, .. } => {
                self.open.insert(id.get());
                self.recorded.push(inbound.payload.clone());
            }
            Change::InboundReleased(id) => drop(self.open.remove(&id.get())),
            Change::Received(id) => {
                self.tally("PUBRECs committed");
                self.rows.get_mut(&id.get()).into_iter().for_each(|row| row.received = true);
            }
            Change::Abandoned(id) => {
                self.tally("rows abandoned");
                let rows = self.rows.get_mut(&id.get()).into_iter();
                rows.for_each(|row| (row.received, row.left) = (true, true));
            }
            Change::Completed(id) => {
                if let Some(row) = self.rows.remove(&id.get()).filter(|row| !row.left) {
                    self.done.insert(row.payload);
                }
            }
            Change::Acknowledged { lane, seq } => self.done.extend(self.payload_of(*lane, seq.0)),
            Change::Refused { id, lane, seq, hold, hold_ms, .. } => {
                self.drop_row(*id);
                self.refused(*lane, seq.0, *hold, *hold_ms);
            }
            Change::DeadLetter { id, lane, seq, .. } => {
                self.tally("dead letters");
                self.drop_row(*id);
                self.buried(*lane, seq.0);
            }
            Change::SessionAbsent(policy) | Change::SessionReplaced(policy) | Change::RowsVoid(policy) => {
                let void = matches!(change, Change::RowsVoid(_));
                self.tally("sessions told to be gone");
                for row in std::mem::take(&mut self.rows).into_values().filter(|row| !row.left) {
                    self.leave(&row, *policy, void);
                }
                self.open.clear();
                if !matches!(change, Change::SessionReplaced(_)) {
                    self.take_over(*policy);
                }
            }
            Change::SessionPresent => {
                self.tally("sessions resumed");
                self.take_over(self.plan.settings.on_session_loss);
            }
            Change::Canary { .. } => {}
        }
    }

    /// This broker has answered: what is in flight at the other one goes here too.
    fn take_over(&mut self, policy: OnSessionLoss) {
        self.verdict = true;
        let away = self.away.take().map(|mut away| {
            for row in away.rows.values_mut().filter(|row| !row.left) {
                self.tally("rows moved to the other broker");
                self.leave(row, policy, true);
                (row.received, row.left) = (true, true);
            }
            away
        });
        self.away = away;
    }

    /// A message leaves an exchange that will not be finished: what the policy and the moment allow.
    fn leave(&mut self, row: &Row, policy: OnSessionLoss, elsewhere: bool) {
        match policy {
            OnSessionLoss::Drop if row.received => {
                self.may_be_lost.insert(row.payload.clone());
                if elsewhere {
                    // Its PUBREL completes it there one day; it is called delivered, and not sent again.
                    self.done.insert(row.payload.clone());
                }
            }
            _ if row.received || elsewhere || self.plan.limits.onward == Onward::AtPublish => {
                self.may_double.insert(row.payload.clone());
            }
            _ => {}
        }
    }

    fn drop_row(&mut self, id: Option<PacketId>) {
        id.into_iter().for_each(|id| drop(self.rows.remove(&id.get())));
    }

    /// The last refusal of a message: its reason, how long ago the first one was, and whether it is a new one.
    fn last_refusal(&mut self, payload: &Bytes) -> Option<(u8, u64, bool)> {
        let refused = self.broker.log.refused.iter().filter(|refused| refused.payload == *payload);
        let (last, count) = (refused.clone().last()?, refused.clone().count());
        let seen = self.refusals_seen.insert(payload.clone(), count).unwrap_or(0);
        let first_ms = refused.map(|refused| refused.at_ms).min()?;
        Some((last.reason, self.now.mono_ms.saturating_sub(first_ms), count > seen))
    }

    /// Whether a refusal of what arrived in the end came to nothing: lost on its way, so that nobody but the broker
    /// knows of it, or for good, which a crash undid.
    pub fn was_refused_in_vain(&self, payload: &Bytes) -> bool {
        let refused = self.broker.log.refused.iter().filter(|refused| refused.payload == *payload);
        refused.count() > self.refusals_heard.get(payload).copied().unwrap_or(0)
    }

    /// A message goes back to its queue and is held.
    fn refused(&mut self, lane: Lane, seq: u64, hold: Hold, hold_ms: u64) {
        self.tally("refusals");
        let now_ms = self.now.mono_ms;
        let Some(payload) = self.payload_of(lane, seq) else { return };
        let topic = self.accepted[self.by_payload[&payload]].topic.clone();
        match hold {
            Hold::Lane => drop(self.held_lanes.insert(lane, now_ms + hold_ms)),
            Hold::Topic => drop(self.held_topics.insert(topic, now_ms + hold_ms)),
        }
        // One that was never sent shares the hold of the message before it.
        let Some((reason, _, true)) = self.last_refusal(&payload) else { return };
        let since = *self.refused_since.entry(payload.clone()).or_insert(now_ms);
        let right = match reason {
            0x90 | 0x95 | 0x99 => false,
            0x87 => hold == Hold::Lane && hold_ms >= 30_000,
            _ => hold == Hold::Topic && hold_ms >= 5_000,
        };
        if !right {
            self.complaints.push(format!("HELD WRONG: {payload:?}, refused with {reason:#04x}: {hold:?}"));
        }
        if now_ms - since >= self.patience_ms {
            self.complaints.push(format!("RETRIED FOR TOO LONG: {payload:?} since {} ms", now_ms - since));
        }
    }

    /// A message is given up for good.
    fn buried(&mut self, lane: Lane, seq: u64) {
        let Some(payload) = self.payload_of(lane, seq) else { return };
        let right = match self.last_refusal(&payload) {
            None => self.is_size_limited,
            Some((0x90 | 0x95 | 0x99, ..)) => true,
            Some((_, since_ms, _)) => since_ms >= self.patience_ms || self.is_size_limited,
        };
        if !right {
            self.complaints.push(format!("BURIED TOO SOON: {payload:?}"));
        }
    }

    /// The store has handed this message to the session.
    pub(super) fn handed(&mut self, taken: &Taken) {
        let record = &taken.record;
        self.handed_out.entry(record.payload.clone()).or_default().extend(self.live_from);
        let now_ms = self.now.mono_ms;
        let held = |until: Option<&u64>| until.is_some_and(|until| *until > now_ms);
        let topic = record.topic.as_str();
        if held(self.held_lanes.get(&record.lane)) || held(self.held_topics.get(topic)) {
            self.complaints.push(format!("NOT HELD: {:?} on {topic}", record.payload));
        }
        if taken.qos < record.qos {
            // The broker does no QoS 2.
            self.may_double.insert(record.payload.clone());
        }
        if taken.qos == Qos::AtMostOnce {
            self.may_be_lost.insert(record.payload.clone());
        }
        if taken.qos == Qos::ExactlyOnce {
            let (payload, lane, seq) = (record.payload.clone(), record.lane, record.seq.0);
            self.rows.insert(taken.id.get(), Row { payload, received: false, lane, seq, left: false });
        }
    }

    /// Memory is gone: nothing is held any more, and nobody knows since when what is refused.
    pub(super) fn forget_holds(&mut self) {
        self.held_lanes.clear();
        self.held_topics.clear();
        self.refused_since.clear();
    }

    /// The order table: what must be on the disk before this packet leaves.
    pub(super) fn check_order(&mut self, packet: &Packet) {
        let row = |id: &PacketId| self.rows.get(&id.get());
        let right = match packet {
            Packet::Publish(publish) if publish.topic.as_str() == CANARY => true,
            Packet::Publish(publish) => {
                let Publish { qos, id, payload, .. } = &**publish;
                let has_row = id.as_ref().and_then(row).is_some_and(|row| row.payload == *payload);
                self.verdict && (*qos != Qos::ExactlyOnce || has_row)
            }
            Packet::PubRel(_, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND) => true,
            Packet::PubRel(id, _) => self.verdict && row(id).is_none_or(|row| row.received),
            Packet::PubRec(id, reason) => {
                reason.is_error() || self.open.contains(&id.get()) || self.unrecorded.contains(&id.get())
            }
            Packet::PubComp(id, _) => !self.open.contains(&id.get()),
            _ => true,
        };
        if !right {
            self.early.push(format!("{packet:?} before its commit"));
        }
    }

    /// What the broker has handed on and we do not know to be done may come twice.
    pub(super) fn excuse_doubles(&mut self) {
        let onward = self.broker.received().iter().filter(|received| received.onward);
        let unfinished = onward.filter(|received| !self.done.contains(&received.payload));
        self.may_double.extend(unfinished.map(|received| received.payload.clone()));
    }

    /// The broker's session of ours is gone, and with it the commands that waited there.
    pub(super) fn excuse_commands(&mut self) {
        let Some(session) = self.broker.session(super::CLIENT) else { return };
        let waiting =
            session.queue.iter().chain(session.in_flight.iter().map(|in_flight| &in_flight.message));
        let waiting: Vec<Bytes> = waiting.map(|message| message.payload.clone()).collect();
        for command in &mut self.commanded {
            command.may_be_lost |= waiting.contains(&command.payload);
        }
    }

    /// Payloads handed on, in order, with their topics; the broker's own subscribers and nobody else.
    pub fn handed_on(&self) -> Vec<(&str, &Bytes)> {
        let handed_on =
            self.broker.log.handed_on.iter().filter(|handed_on| handed_on.topic.starts_with("t/"));
        handed_on.map(|handed_on| (&*handed_on.topic, &handed_on.payload)).collect()
    }

    /// Their text, for short ones.
    pub fn texts(&self) -> Vec<String> {
        self.handed_on()
            .into_iter()
            .map(|(_, payload)| String::from_utf8_lossy(payload).into_owned())
            .collect()
    }

    /// The lowest number among new messages; for live first.
    pub(super) fn first_number(messages: &[Vec<Message>], steps: &[CommandStep]) -> Option<u64> {
        let answers = steps.iter().filter_map(|step| match step {
            CommandStep::Answer { answer, .. } => Some(&**answer),
            _ => None,
        });
        let new = messages.iter().flatten().chain(answers);
        new.map(|message| number(&message.payload.clone().unnumbered())).min()
    }
}
