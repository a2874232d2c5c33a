//! Seeded random runs of the pair in a box, and what must hold at their end.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::message::{Lane, Message, Payload, Qos, Topic};
use fieldpost::store::ReplayOrder;
use fieldpost::uplink::packet::Protocol;
use fieldpost::uplink::session::Counted;

use crate::support::broker::{self, Kind, Refusal, Times};
use crate::world::{NextCommit, PRESENCE, Plan, World, few};

/// Which faults a run may meet, each as its weight against 1000 ordinary steps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// The link breaks.
    pub cuts: u32,
    /// The link breaks after the broker handled CONNECT and before we know.
    pub connacks_lost: u32,
    /// The program dies.
    pub crashes: u32,
    /// A transaction fails at its end.
    pub failed_commits: u32,
    /// The broker restarts and keeps everything.
    pub restarts: u32,
    /// The broker loses everything.
    pub session_losses: u32,
    /// The broker says "session present" whatever the truth is.
    pub lies: u32,
    /// The broker forgets the QoS 2 identifiers it holds.
    pub forgotten_ids: u32,
    /// The broker announces another Receive Maximum from the next connection on.
    pub receive_maxima: u32,
    /// The broker refuses the next messages, for now or for ever.
    pub refusals: u32,
    /// The broker stops sending packets of one kind for a while.
    pub silences: u32,
    /// Our own presence is published again.
    pub presence: u32,
    /// The broker sends a command.
    pub commands: u32,
    /// A message that expires soon.
    pub expiring: u32,
}

impl Faults {
    fn weights(&self) -> [u32; 14] {
        [
            self.cuts,
            self.connacks_lost,
            self.crashes,
            self.failed_commits,
            self.restarts,
            self.session_losses,
            self.lies,
            self.forgotten_ids,
            self.receive_maxima,
            self.refusals,
            self.silences,
            self.presence,
            self.commands,
            self.expiring,
        ]
    }
}

pub struct Run {
    pub plan: Plan,
    pub faults: Faults,
    pub steps: usize,
}

/// One run; what went wrong, if anything.
pub fn run(run: &Run, seed: u64, trace: bool) -> (World, Result<(), String>) {
    let mut rng = Rng::with_seed(seed);
    let mut world = World::new(run.plan.clone());
    world.keep_trace = trace;
    for _ in 0..run.steps {
        step(&mut world, &mut rng, &run.faults);
    }
    calm(&mut world);
    let result = world.finish().and_then(|()| judge(&mut world));
    (world, result)
}

/// No new faults any more.
fn calm(world: &mut World) {
    if !world.broker.script.withhold.is_empty() {
        // An honest broker does not leave out one acknowledgement and send the next.
        world.cut(0);
    }
    let deny = std::mem::take(&mut world.broker.script.deny_read);
    world.broker.script = broker::Script { deny_read: deny, ..broker::Script::default() };
}

fn step(world: &mut World, rng: &mut Rng, faults: &Faults) {
    let weights = faults.weights();
    let mut dice = rng.u32(0..1000 + weights.iter().sum::<u32>());
    if dice < 1000 {
        return ordinary(world, rng, dice);
    }
    dice -= 1000;
    for (index, weight) in weights.into_iter().enumerate() {
        if dice < weight {
            return fault(world, rng, index);
        }
        dice -= weight;
    }
}

fn ordinary(world: &mut World, rng: &mut Rng, dice: u32) {
    match dice {
        0..150 => {
            for _ in 0..few(rng, 6) {
                produce(world, rng);
            }
        }
        150..400 => world.broker_gets(few(rng, 400)),
        400..650 => world.agent_gets(few(rng, 200)),
        650..800 => world.commit(NextCommit::Works),
        800..930 => world.answer(),
        930..960 => world.pass(rng.u64(1..400)),
        _ if !world.is_online() => world.connect(),
        _ => {
            world.broker_gets(usize::MAX);
            world.agent_gets(usize::MAX);
        }
    }
}

fn fault(world: &mut World, rng: &mut Rng, index: usize) {
    let still = if rng.bool() { 0 } else { few(rng, 300) };
    let number = world.next_number;
    match index {
        0 => world.cut(still),
        1 => {
            world.connect();
            world.cut(usize::MAX);
        }
        2 => world.crash(still),
        3 => world.commit(NextCommit::Fails),
        4 => world.restart_broker(),
        5 => world.lose_session(),
        6 => {
            let lie = broker::ConnectScript { session_present: Some(true), ..Default::default() };
            world.broker.script.next_connects.push_back(lie);
        }
        7 => world.forget_identifiers(),
        8 => {
            // A broker may not change it under a living connection.
            world.cut(still);
            world.broker.limits.receive_maximum = (rng.u8(0..4) > 0).then(|| few(rng, 12) as u16);
        }
        9 => {
            let reason = [0x80, 0x83, 0x93, 0x97, 0x87, 0x90, 0x95, 0x99][rng.usize(0..8)];
            let filter = format!("t/{}/+/{}", Lane::ALL[rng.usize(0..3)], rng.u8(0..2));
            let times = Times::Only(few(rng, 4) as u32);
            world.broker.script.refuse.push(Refusal { filter, reason, times });
        }
        10 => {
            let kinds = [Kind::Puback, Kind::Pubrec, Kind::Pubcomp, Kind::Suback, Kind::Connack];
            if !world.broker.script.withhold.insert(kinds[rng.usize(0..kinds.len())]) {
                world.broker.script.withhold.clear();
                // What was withheld never comes, so only another connection helps.
                world.cut(still);
            }
        }
        11 => {
            let now_ms = world.now.mono_ms;
            if let Some(session) = world.session() {
                let topic = Topic::new(PRESENCE).unwrap();
                session.publish_presence(topic, format!("again {number}").into(), true, now_ms);
            }
            world.act();
        }
        12 => world.command(rng.u8(0..3)),
        _ => {
            let topic = Topic::new("t/normal/2/expiring").unwrap();
            world.next_number += 1;
            let message = Message {
                topic,
                qos: Qos::ExactlyOnce,
                retain: false,
                lane: Lane::Normal,
                at: world.now,
                expires_after: Some(Duration::from_secs(1)),
                correlation_data: None,
                payload: Payload::Whole(world.next_number.to_string().into()),
            };
            world.append(vec![message]);
        }
    }
}

fn produce(world: &mut World, rng: &mut Rng) {
    let lane = Lane::ALL[rng.usize(0..3)];
    let qos = if rng.u8(0..5) < 2 { Qos::AtLeastOnce } else { Qos::ExactlyOnce };
    let topic = format!("t/{lane}/{}/{}", qos.number(), rng.u8(0..2));
    world.produce(lane, qos, &topic, rng.usize(0..40));
}

/// Nothing lost, nothing doubled, in order, no rule broken, but for what is counted.
pub fn judge(world: &mut World) -> Result<(), String> {
    let mut violations = world.broker.violations();
    if !world.broker.log.refused.is_empty() {
        // The broker does not remember that it saw the refused one first.
        violations.retain(|text| !text.contains("MQTT-4.6.0-1"));
    }
    if !violations.is_empty() {
        return Err(format!("VIOLATION: {violations:?}"));
    }
    let mut times: BTreeMap<Bytes, u32> = BTreeMap::new();
    for (_, payload) in world.handed_on() {
        *times.entry(payload.clone()).or_default() += 1;
    }
    let mut lost = Vec::new();
    let mut qos_of = BTreeMap::new();
    let swallowed: BTreeSet<&Bytes> =
        world.broker.log.refused.iter().filter(|r| r.reason == 0).map(|refused| &refused.payload).collect();
    for accepted in &world.accepted {
        qos_of.insert(accepted.payload.clone(), accepted.qos);
        if swallowed.contains(&accepted.payload) || world.may_be_lost.contains(&accepted.payload) {
            continue;
        }
        if !times.contains_key(&accepted.payload) {
            lost.push(format!("{:?} on {}", accepted.payload, accepted.topic));
        }
    }
    let now = world.now;
    let look = world.store().look(now).unwrap();
    let dropped: u64 = look.dropped.iter().map(|(_, _, count)| count).sum();
    // A repeated PUBREL that finds nothing looks the same, so this excuses nothing where nothing was forgotten.
    let ambiguous = if world.forgotten { world.count(Counted::Ambiguous) } else { 0 };
    // What a quota takes after a crash may have arrived before it.
    let exact = world.plan.quota > 1 << 20 && ambiguous == 0 && world.may_double.is_empty();
    if exact && (lost.len() as u64) < dropped {
        return Err(format!("MISCOUNTED: {dropped} dropped, lost are {lost:?}"));
    }
    if lost.len() as u64 > dropped + ambiguous {
        return Err(format!("LOST: {lost:?}, counted {dropped} dropped and {ambiguous} ambiguous"));
    }
    for (payload, times) in &times {
        let Some(qos) = qos_of.get(payload) else {
            return Err(format!("STRANGE: {payload:?} was never accepted"));
        };
        if *qos == Qos::ExactlyOnce && *times > 1 && !world.may_double.contains(payload) {
            return Err(format!("DUPLICATE: {payload:?} {times} times"));
        }
    }
    commands(world)?;
    in_order(world)?;
    match world.early.first() {
        Some(early) => Err(format!("EARLY: {early}")),
        None => Ok(()),
    }
}

/// Every command is recorded, and those at QoS 2 once.
fn commands(world: &World) -> Result<(), String> {
    for (payload, qos) in &world.commanded {
        let times = world.recorded.iter().filter(|recorded| *recorded == payload).count();
        let excused = world.sessions_lost > 0;
        if times == 0 && *qos > 0 && !excused {
            return Err(format!("COMMAND LOST: {payload:?}"));
        }
        if times > 1 && *qos == 2 && !excused {
            return Err(format!("COMMAND DOUBLED: {payload:?} {times} times"));
        }
    }
    Ok(())
}

/// First arrivals on each topic (one lane and one QoS each) come in the order of acceptance; with live first, a
/// message may overtake what was accepted before the connection began to take on which it was handed out, and
/// nothing else. What was in flight may overtake a refused message, so topics of which one was refused are judged by
/// the direct tests.
fn in_order(world: &World) -> Result<(), String> {
    let live_first = world.plan.replay.order == ReplayOrder::LiveFirst;
    let refused: BTreeSet<&str> = world.broker.log.refused.iter().map(|refused| &*refused.topic).collect();
    let mut seen: BTreeSet<&Bytes> = BTreeSet::new();
    let mut before: BTreeMap<&str, Vec<(u64, &Bytes)>> = BTreeMap::new();
    for (topic, payload) in world.handed_on() {
        if !seen.insert(payload) || refused.contains(topic) {
            continue;
        }
        let number = number(payload);
        let before = before.entry(topic).or_default();
        for (earlier, payload) in before.iter().filter(|(earlier, _)| *earlier > number) {
            let live_from = world.handed_out.get(*payload).into_iter().flatten();
            let was_live = live_from.into_iter().any(|from| number < *from && from <= earlier);
            if !live_first || !was_live {
                return Err(format!("ORDER: {number} after {earlier} on {topic}"));
            }
        }
        before.push((number, payload));
    }
    Ok(())
}

/// Messages that arrived before an earlier one of their topic.
pub fn overtakers(world: &World) -> u64 {
    let mut numbers: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (topic, payload) in world.handed_on() {
        numbers.entry(topic).or_default().push(number(payload));
    }
    let overtakes = |(at, number): (usize, &u64), all: &[u64]| all[at..].iter().any(|later| later < number);
    let of_topic =
        |all: &Vec<u64>| all.iter().enumerate().filter(|each| overtakes(*each, all)).count() as u64;
    numbers.values().map(of_topic).sum()
}

pub fn number(payload: &[u8]) -> u64 {
    let digits = payload.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

/// Runs seeds; the first failure is run again for the end of its trace.
pub fn seeds(count: u64, make: impl Fn(u64) -> Run) {
    let count = from_env("FIELDPOST_SEEDS").unwrap_or(count);
    let range = from_env("FIELDPOST_SEED").map_or(0..count, |seed| seed..seed + 1);
    for seed in range {
        let plan = make(seed);
        let result = std::panic::catch_unwind(|| run(&plan, seed, false).1);
        let Some(why) = result.unwrap_or_else(|_| Err("PANIC".into())).err() else { continue };
        let (world, _) = run(&plan, seed, true);
        let lines = from_env("FIELDPOST_TRACE").unwrap_or(60) as usize;
        let tail = &world.trace[world.trace.len().saturating_sub(lines)..];
        panic!("seed {seed} (FIELDPOST_SEED={seed} runs it alone): {why}\n{}", tail.join("\n"));
    }
}

/// Whether some seed ends in one of these complaints, for negative controls.
pub fn complains(of: &[&str], make: impl Fn(u64) -> Run + std::panic::RefUnwindSafe) -> bool {
    (0..300).any(|seed| {
        let result = std::panic::catch_unwind(|| run(&make(seed), seed, false).1);
        let complaint = result.unwrap_or_else(|_| Err("PANIC".into())).err();
        complaint.is_some_and(|complaint| of.iter().any(|of| complaint.starts_with(of)))
    })
}

pub fn protocol_of(seed: u64) -> Protocol {
    if seed.is_multiple_of(2) { Protocol::V5 } else { Protocol::V311 }
}
