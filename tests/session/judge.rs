//! What must hold after every step, and what must hold at the end: nothing lost, doubled, reordered or stuck, but for
//! what is counted.
//!
//! Invariant: judged by what the broker handed on and by what the database says, never by what the session believes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fieldpost::message::{Lane, Qos};
use fieldpost::store::{Look, ReplayOrder};
use fieldpost::uplink::packet::Protocol;
use fieldpost::uplink::session::Counted;

use crate::random::number;
use crate::support::broker::{Broker, Onward};
use crate::world::{CLIENT, World};

/// What was looked at of one broker.
#[derive(Debug, Default)]
struct Looked {
    violations: usize,
    handed_on: usize,
    received: usize,
    /// Numbers handed on, by topic.
    before: BTreeMap<String, Vec<(u64, Bytes)>>,
    /// The highest number received, by lane.
    highest: BTreeMap<Lane, u64>,
    seen: BTreeSet<Bytes>,
}

/// Judges one world, step by step.
#[derive(Debug, Default)]
pub struct Judge {
    looked: [Looked; 2],
    times: BTreeMap<Bytes, u32>,
    arrived: BTreeSet<Bytes>,
    commits: (usize, u64, u64),
    /// The order table is judged as well, which needs no fault to be broken.
    by_the_table: bool,
}

impl Judge {
    pub fn new(by_the_table: bool) -> Judge {
        Judge { by_the_table, ..Judge::default() }
    }

    /// Judges what happened since the last look.
    pub fn look(&mut self, world: &mut World) -> Result<(), String> {
        let here = world.broker_index();
        self.look_at(world, &world.broker, here)?;
        if let Some(other) = world.other_broker() {
            self.look_at(world, other, 1 - here)?;
        }
        if let Some(complaint) = world.complaints.first() {
            return Err(complaint.clone());
        }
        if let Some(early) = world.early.first().filter(|_| self.by_the_table) {
            return Err(format!("EARLY: {early}"));
        }
        if let Some((id, times)) = world.executed.iter().find(|(_, times)| **times > 1) {
            return Err(format!("COMMAND CARRIED OUT {times} TIMES: {id}"));
        }
        let subscribed =
            |broker: &Broker| broker.session(CLIENT).is_some_and(|s| s.subscriptions.contains_key("cmd/#"));
        if world.is_running() && world.broker.connection_of(CLIENT).is_some() && !subscribed(&world.broker) {
            return Err("UNSUBSCRIBED: messages flow, and no command would come".into());
        }
        let commits = (world.accepted.len(), world.delivered, world.possibly_lost);
        if std::mem::replace(&mut self.commits, commits) != commits {
            conserved(world)?;
        }
        Ok(())
    }

    fn look_at(&mut self, world: &World, broker: &Broker, index: usize) -> Result<(), String> {
        let looked = &mut self.looked[index];
        let new = &broker.log.violations[looked.violations..];
        // The broker does not remember that it saw a refused one first.
        let forgiven = |text: &str| {
            // What was given up or has moved gets its PUBREL without a PUBREC.
            let freed = |id: &u16| {
                text.starts_with(&format!("PUBREL {id} before"))
                    || text.starts_with(&format!("PUBREL {id} out of"))
            };
            (!broker.log.refused.is_empty() && text.contains("MQTT-4.6.0-1")) || world.freed.iter().any(freed)
        };
        if let Some(violation) = new.iter().find(|violation| !forgiven(&violation.text)) {
            return Err(format!("VIOLATION: {violation}"));
        }
        looked.violations = broker.log.violations.len();
        if let Some(limit) = broker.log.limits_hit.first() {
            return Err(format!("VIOLATION: the broker's limit {limit}"));
        }
        let all_refused =
            std::iter::once(&world.broker).chain(world.other_broker()).flat_map(|b| &b.log.refused);
        let refused: BTreeSet<&str> = all_refused.map(|refused| &*refused.topic).collect();
        let live_first = world.plan.replay.order == ReplayOrder::LiveFirst;
        for received in &broker.log.received[looked.received..] {
            let Some(index) = world.by_payload.get(&received.payload) else { continue };
            let message = &world.accepted[*index];
            let (lane, new) = (message.lane, self.arrived.insert(received.payload.clone()));
            let in_lane = format!("t/{lane}/");
            let free = live_first || refused.iter().any(|topic| topic.starts_with(&in_lane));
            let highest = looked.highest.entry(lane).or_default();
            let excused = world.may_double.contains(&received.payload);
            if new && message.seq < *highest && !free && !excused {
                let text = String::from_utf8_lossy(&received.payload);
                return Err(format!("ORDER: {text} on {} after a later one of its lane", message.topic));
            }
            *highest = message.seq.max(*highest);
        }
        looked.received = broker.log.received.len();
        for handed_on in &broker.log.handed_on[looked.handed_on..] {
            let (topic, payload) = (&*handed_on.topic, &handed_on.payload);
            if !topic.starts_with("t/") {
                continue;
            }
            let Some(index) = world.by_payload.get(payload) else {
                return Err(format!("STRANGE: {payload:?} was never accepted"));
            };
            let times = self.times.entry(payload.clone()).or_default();
            *times += 1;
            let exactly_once = world.accepted[*index].qos == Qos::ExactlyOnce;
            if exactly_once && *times > 1 && !world.may_double.contains(payload) {
                return Err(format!("DUPLICATE: {payload:?} {times} times"));
            }
            looked.in_order(world, topic, payload, live_first, &refused)?;
        }
        looked.handed_on = broker.log.handed_on.len();
        Ok(())
    }

    /// Judges the end.
    pub fn end(&mut self, world: &mut World) -> Result<(), String> {
        self.look(world)?;
        conserved(world)?;
        self.nothing_lost(world)?;
        self.nothing_doubled_uncounted(world)?;
        commands(world)?;
        answers(world)?;
        retained(world)?;
        Ok(())
    }

    fn nothing_lost(&self, world: &mut World) -> Result<(), String> {
        let brokers = || std::iter::once(&world.broker).chain(world.other_broker());
        // On 3.1.1 a broker that refuses says nothing.
        let swallowed: BTreeSet<&Bytes> = brokers()
            .flat_map(|broker| &broker.log.refused)
            .filter(|refused| refused.reason == 0 && !refused.by_limit)
            .map(|refused| &refused.payload)
            .collect();
        let missing = |payload: &Bytes| !self.times.contains_key(payload) && !swallowed.contains(payload);
        let lost = world.accepted.iter().filter(|accepted| missing(&accepted.payload));
        let (excused, lost): (Vec<_>, Vec<_>) =
            lost.cloned().partition(|a| world.may_be_lost.contains(&a.payload));
        let look = look(world);
        let ambiguous = world.count(Counted::Ambiguous);
        let told = world.plan.protocol == Protocol::V5 && world.plan.settings.limits.max_qos.is_none();
        let told = told && world.broker.limits.maximum_qos == 2;
        let counted = ambiguous + world.possibly_lost + dropped(&look, None);
        if told && excused.len() as u64 > counted {
            return Err(format!("LOST: {} are ambiguous, {counted} counted", excused.len()));
        }
        for lane in Lane::ALL {
            let of_lane: Vec<_> = lost.iter().filter(|lost| lost.lane == lane).collect();
            let dropped = dropped(&look, Some(lane)) + world.believed;
            if of_lane.len() as u64 > dropped {
                let texts: Vec<_> =
                    of_lane.iter().map(|l| format!("{:?} on {}", l.payload, l.topic)).collect();
                return Err(format!("LOST: {texts:?}, and {dropped} dropped"));
            }
            let told = |seq: u64| {
                look.gaps.iter().any(|gap| gap.lane == lane && (gap.first.0..=gap.last.0).contains(&seq))
            };
            if let Some(untold) = of_lane.iter().find(|lost| !told(lost.seq) && world.believed == 0) {
                return Err(format!("LOST: {:?} is in no gap", untold.payload));
            }
        }
        Ok(())
    }

    /// Copies beyond the first of QoS 2 messages. Where a broker hands on at PUBLISH, or does no QoS 2, what was only
    /// published doubles too.
    fn nothing_doubled_uncounted(&self, world: &World) -> Result<(), String> {
        let is_counted = world.plan.limits.onward == Onward::AtPubrel
            && !world.plan.settings.clean_start
            && world.count(Counted::DowngradedQos) == 0;
        let exactly_once =
            |payload: &&Bytes| world.accepted[world.by_payload[*payload]].qos == Qos::ExactlyOnce;
        let copies: u64 = self
            .times
            .iter()
            .filter(|(payload, _)| exactly_once(payload))
            .map(|(_, n)| u64::from(n - 1))
            .sum();
        let counted = world.possibly_doubled + world.believed;
        if is_counted && copies > counted {
            return Err(format!("UNCOUNTED: {copies} doubled, {counted} counted"));
        }
        Ok(())
    }
}

impl Looked {
    /// First arrivals on each topic (one lane and one QoS each) come in the order of acceptance; with live first, a
    /// message may overtake what was accepted before the connection began to take on which it was handed out, and
    /// nothing else. What was in flight may overtake a refused message, so topics of which one was refused are judged
    /// by the direct tests.
    fn in_order(
        &mut self,
        world: &World,
        topic: &str,
        payload: &Bytes,
        live_first: bool,
        refused: &BTreeSet<&str>,
    ) -> Result<(), String> {
        if !self.seen.insert(payload.clone()) || refused.contains(topic) || world.may_double.contains(payload)
        {
            return Ok(());
        }
        let number = number(payload);
        let before = self.before.entry(topic.to_owned()).or_default();
        for (earlier, payload) in before.iter().filter(|(earlier, _)| *earlier > number) {
            let live_from = world.handed_out.get(payload).into_iter().flatten();
            let was_live = live_from.into_iter().any(|from| number < *from && from <= earlier);
            if !live_first || !was_live {
                return Err(format!("ORDER: {number} after {earlier} on {topic}"));
            }
        }
        before.push((number, payload.clone()));
        Ok(())
    }
}

fn look(world: &mut World) -> Look {
    let now = world.now;
    world.store().look(now).unwrap()
}

fn dropped(look: &Look, lane: Option<Lane>) -> u64 {
    let of = look.dropped.iter().filter(|(of, ..)| lane.is_none_or(|lane| lane == *of));
    of.map(|(_, _, count)| count).sum()
}

/// Every message that was accepted is queued, delivered, dropped and counted, or given up by policy and counted.
fn conserved(world: &mut World) -> Result<(), String> {
    let look = look(world);
    let queued: u64 = look.lanes.iter().map(|lane| lane.messages).sum();
    let (accepted, delivered) = (world.accepted.len() as u64, world.delivered);
    let (dropped, given_up) = (dropped(&look, None), world.possibly_lost);
    // After a failed commit the store does not know what is in flight at QoS 1: until the session has told it, a limit
    // may take it, and it counts as dropped and as delivered.
    let counted = queued + delivered + dropped + given_up;
    let exactly = !world.tally.contains_key("commits failed");
    if counted < accepted || (exactly && counted > accepted) {
        return Err(format!(
            "MISCOUNTED: {accepted} accepted, {queued} queued, {delivered} delivered, {dropped} dropped, {given_up} given \
             up"
        ));
    }
    Ok(())
}

/// Every command is recorded, and those at QoS 2 once.
fn commands(world: &World) -> Result<(), String> {
    let mut sent: BTreeMap<&Bytes, Vec<_>> = BTreeMap::new();
    for command in &world.commanded {
        sent.entry(&command.payload).or_default().push(command);
    }
    for (payload, commands) in sent {
        let times = world.recorded.iter().filter(|recorded| *recorded == payload).count();
        let due = commands.iter().filter(|command| command.qos > 0 && !command.may_be_lost).count();
        // What looks the same and has the identifier of one whose session is gone cannot be told from it.
        let alike = commands.len() > 1 && commands.iter().any(|command| command.may_be_lost);
        if times < due && !alike {
            return Err(format!("COMMAND LOST: {payload:?} {times} times instead of {due}"));
        }
        if times > commands.len() && commands.iter().all(|command| !command.may_double) {
            return Err(format!("COMMAND DOUBLED: {payload:?} {times} times instead of {}", commands.len()));
        }
    }
    Ok(())
}

/// Every command that was carried out is answered once.
fn answers(world: &World) -> Result<(), String> {
    for id in world.executed.keys() {
        let ends = format!(" answers {id}");
        let answers = world.accepted.iter().filter(|a| a.payload.ends_with(ends.as_bytes())).count();
        if answers != 1 {
            return Err(format!("ANSWERED {answers} TIMES: {id}"));
        }
    }
    Ok(())
}

/// The newest retained message of a topic is the one the broker keeps.
fn retained(world: &World) -> Result<(), String> {
    let disturbed = world.sessions_lost > 0
        || world.forgotten
        || world.other_broker().is_some()
        || world.count(Counted::DowngradedRetain) > 0
        || world.plan.settings.clean_start
        || world.count(Counted::DowngradedQos) > 0
        || !world.broker.log.refused.is_empty();
    if disturbed {
        return Ok(());
    }
    let mut newest: BTreeMap<&str, u64> = BTreeMap::new();
    for (topic, payload) in world.handed_on() {
        if world.by_payload.get(payload).is_some_and(|index| world.accepted[*index].retain) {
            let newest = newest.entry(topic).or_default();
            *newest = (*newest).max(number(payload));
        }
    }
    for (topic, newest) in newest {
        let kept = world.broker.retained(topic).map(|payload| number(payload));
        if kept != Some(newest) {
            return Err(format!("RETAINED: {topic} keeps {kept:?}, the newest is {newest}"));
        }
    }
    Ok(())
}
