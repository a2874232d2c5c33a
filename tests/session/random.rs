//! Seeded runs of the pair in a box: drawn, run, judged, and shrunk to the steps that matter when one fails.
//!
//! `FIELDPOST_SEEDS=10000` takes so many seeds instead of the usual ones, `FIELDPOST_SEED=17` that one alone, and
//! `FIELDPOST_TRACE=1` tells its steps although it does not fail.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::uplink::packet::Protocol;

use crate::judge::Judge;
use crate::shrink;
use crate::step::{self, Faults, Step};
use crate::support::broker;
use crate::world::{Plan, World};

/// How long a finished world is watched, in seconds, twice: dead links must be noticed, then nothing may happen.
const QUIET_S: usize = 200;

/// What a run is drawn from.
pub struct Run {
    pub plan: Plan,
    pub faults: Faults,
    pub steps: usize,
}

/// A run, drawn.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub plan: Plan,
    pub steps: Vec<Step>,
    /// The order table is judged by itself too.
    pub by_the_table: bool,
}

impl Run {
    pub fn draw(self, seed: u64) -> Scenario {
        let steps = step::draw(&mut Rng::with_seed(seed), &self.faults, self.steps);
        Scenario { plan: self.plan, steps, by_the_table: true }
    }
}

/// What a run came to.
pub struct Outcome {
    pub world: World,
    pub result: Result<(), String>,
    /// One line for each step, if it was asked for.
    pub trace: Vec<String>,
}

/// Runs it to its end, or to its first violation.
pub fn run(scenario: &Scenario, traced: bool) -> Outcome {
    let mut world = World::new(scenario.plan.clone());
    world.keep_trace = traced;
    let mut judge = Judge::new(scenario.by_the_table);
    let mut trace = Vec::new();
    let mut result = Ok(());
    for (index, step) in scenario.steps.iter().enumerate() {
        // A panic is told, with the steps that led there.
        let acted = catch_unwind(AssertUnwindSafe(|| step.act(&mut world)));
        result = match acted {
            Ok(()) => judge.look(&mut world),
            Err(_) => Err("PANIC".to_owned()),
        };
        if traced {
            trace.push(line(&index.to_string(), &step.to_string(), &mut world));
        }
        if result.is_err() {
            return Outcome { world, result, trace };
        }
    }
    calm(&mut world);
    if result.is_ok() {
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let finished = world.finish();
            judge.look(&mut world)?;
            finished.and_then(|()| quiet(&mut world)).and_then(|()| judge.end(&mut world))
        }));
        result = ended.unwrap_or_else(|_| Err("PANIC".to_owned()));
    }
    if traced {
        trace.push(line("end", "no more faults, until all is done", &mut world));
    }
    Outcome { world, result, trace }
}

fn line(number: &str, step: &str, world: &mut World) -> String {
    let mut wire = std::mem::take(&mut world.wire);
    let more = wire.len().saturating_sub(30);
    wire.truncate(30);
    let more = if more > 0 { format!("; and {more} more") } else { String::new() };
    format!("{number:>4} {:>8} {step:<28} {}{more}", world.now.mono_ms, wire.join("; "))
}

/// No new faults any more. What goes on is the broker's nature, and what the connection has to find out by itself.
fn calm(world: &mut World) {
    let script = std::mem::take(&mut world.broker.script);
    world.broker.script = broker::Script {
        deny_subscribe: script.deny_subscribe,
        deny_publish: script.deny_publish,
        deny_read: script.deny_read,
        held_limit: script.held_limit,
        withhold: script.withhold,
        ..broker::Script::default()
    };
}

/// A link that is dead is noticed, and one that is not is kept.
fn quiet(world: &mut World) -> Result<(), String> {
    world.deaden();
    for round in 0..2 * QUIET_S {
        let ends = world.ends.len();
        world.round();
        world.pass(1000);
        if round == QUIET_S && world.is_deceived() {
            return Err("UNNOTICED: nothing comes from the broker any more".into());
        }
        if round > QUIET_S && world.ends.len() > ends {
            return Err(format!("RESTLESS: a quiet connection ended: {:?}", world.ends.last()));
        }
    }
    Ok(())
}

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

/// Runs seeds on every core; the lowest that fails is shrunk and told. `test` is the test's own name.
pub fn seeds(test: &str, count: u64, make: impl Fn(u64) -> Scenario + Sync) {
    let only = from_env("FIELDPOST_SEED");
    let count = from_env("FIELDPOST_SEEDS").unwrap_or(count);
    let range = only.map_or(0..count, |seed| seed..seed + 1);
    let began = Instant::now();
    let (next, failed) = (AtomicU64::new(range.start), AtomicU64::new(u64::MAX));
    let tallies: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= range.end || seed > failed.load(Ordering::Relaxed) {
                return;
            }
            let outcome = run(&make(seed), false);
            if outcome.result.is_err() {
                failed.fetch_min(seed, Ordering::Relaxed);
            }
            let mut sums = tallies.lock().unwrap();
            let counts = outcome.world.counts.iter().map(|(name, n)| (name.clone(), *n));
            let tally = outcome.world.tally.iter().map(|(name, n)| ((*name).to_owned(), *n));
            for (name, n) in tally.chain(counts) {
                *sums.entry(name).or_default() += n;
            }
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()).min(range.clone().count());
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner();
    if failed != u64::MAX {
        panic!("{}", shrink::report(test, failed, &make(failed)));
    }
    if only.is_some() && from_env("FIELDPOST_TRACE").is_some() {
        println!("{}", run(&make(range.start), true).trace.join("\n"));
    }
    let tallies = tallies.into_inner().unwrap();
    let events: Vec<String> = tallies.iter().map(|(name, n)| format!("{n} {name}")).collect();
    let (count, seconds) = (range.count(), began.elapsed().as_secs_f64());
    println!("{test}: {count} seeds, no violation, {seconds:.0} s: {}", events.join(", "));
}

/// Whether some seed ends in one of these complaints, for negative controls.
pub fn complains(of: &[&str], make: impl Fn(u64) -> Scenario) -> bool {
    (0..300).any(|seed| {
        let complaint = run(&make(seed), false).result.err();
        complaint.is_some_and(|complaint| of.iter().any(|of| complaint.starts_with(of)))
    })
}

/// Messages that arrived before an earlier one of their topic, as far as the session can know. What arrives again at
/// QoS 1 was not overtaken by what was sent after it (MQTT 5.0 section 4.6); and when the connection ends before a
/// refusal is read or what follows from it is committed, the message is sent again, and nobody but the broker knows that
/// what followed it went ahead.
pub fn overtakers(world: &World) -> u64 {
    let mut firsts: BTreeMap<&str, Vec<&Bytes>> = BTreeMap::new();
    for (topic, payload) in world.handed_on() {
        let firsts = firsts.entry(topic).or_default();
        if !firsts.contains(&payload) {
            firsts.push(payload);
        }
    }
    let overtakes = |(at, payload): (usize, &&Bytes), all: &[&Bytes]| {
        let is_earlier = |later: &&Bytes| number(later) < number(payload);
        all[at..].iter().any(|later| is_earlier(later) && !world.was_refused_in_vain(later))
    };
    let of_topic =
        |all: &Vec<&Bytes>| all.iter().enumerate().filter(|each| overtakes(*each, all)).count() as u64;
    firsts.values().map(of_topic).sum()
}

pub fn number(payload: &[u8]) -> u64 {
    let digits = payload.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0'))
}

pub fn protocol_of(seed: u64) -> Protocol {
    if seed.is_multiple_of(2) { Protocol::V5 } else { Protocol::V311 }
}
