//! Everything at once: the seed draws the broker's nature, the settings and the faults, and what happens.
//!
//! `FIELDPOST_SEEDS=10000 cargo nextest run --release --test session --no-capture -E 'test(everything_a_seed_can_draw)'`
//! takes ten thousand seeds; its last line says how often what happened.

use std::time::Duration;

use fastrand::Rng;
use fieldpost::message::Lane;
use fieldpost::store::{LaneLimits, Replay, ReplayOrder, WhenFull};
use fieldpost::turn::OnSessionLoss;
use fieldpost::uplink::packet::Protocol;

use crate::random::{Run, Scenario, run, seeds};
use crate::rule::Rule;
use crate::shrink::{kind, shrink};
use crate::step::Faults;
use crate::support::broker::Onward;
use crate::world::{Plan, few};

/// What kind of broker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Nature {
    Plain,
    /// What is above `max_inflight_messages` is refused, on 3.1.1 in silence.
    Mosquitto,
    /// Hands on at PUBLISH, and forgets identifiers.
    Emqx,
    /// Does less than the standard.
    Cloud,
    /// Keeps no session.
    Sessionless,
}

/// Draws one.
pub fn scenario(seed: u64) -> Scenario {
    drawn(seed, None)
}

/// The same, with this rule broken, and judged by what the broker sees and the database says alone.
pub fn broken(seed: u64, rule: Rule) -> Scenario {
    // It takes a crash in the right moment, and then the same command with the same identifier: rarer than one in a
    // thousand seeds, so that here the order of packets and commits must show it.
    let by_the_table = rule == Rule::ForgottenBeforePubcomp;
    Scenario { by_the_table, ..drawn(seed, Some(rule)) }
}

fn drawn(seed: u64, broken: Option<Rule>) -> Scenario {
    let mut rng = Rng::with_seed(seed);
    let rng = &mut rng;
    let protocol = if rng.bool() { Protocol::V5 } else { Protocol::V311 };
    let natures = [Nature::Plain, Nature::Plain, Nature::Mosquitto, Nature::Mosquitto, Nature::Emqx];
    let nature = match rng.u8(0..12) {
        0 => Nature::Cloud,
        1 => Nature::Sessionless,
        other => natures[usize::from(other) % natures.len()],
    };
    let mut plan = Plan { broken, max_packet: 2_000, ..Plan::new(protocol) };
    settings(&mut plan, nature, rng);
    store(&mut plan, rng);
    let mut faults = faults(rng, nature, protocol);
    if plan.limits.maximum_qos < 2 {
        faults.maximum_qos = 0;
    }
    let steps = 80 + few(rng, 240);
    Run { plan, faults, steps }.draw(rng.u64(..))
}

fn settings(plan: &mut Plan, nature: Nature, rng: &mut Rng) {
    let v5 = plan.protocol == Protocol::V5;
    let settings = &mut plan.settings;
    settings.max_in_flight = 1 + few(rng, 40) as u16;
    settings.qos2_window = few(rng, 20) as u16;
    settings.keep_alive_ms = [10_000, 60_000][rng.usize(0..2)];
    settings.ack_timeout_ms = [5_000, 20_000][rng.usize(0..2)];
    settings.retry_refused_for_ms = [3_600_000, 60_000, 0][rng.usize(0..3)];
    if rng.u8(0..4) == 0 {
        settings.on_session_loss = OnSessionLoss::Drop;
    }
    let limits = &mut plan.limits;
    limits.onward = if rng.u8(0..3) == 0 { Onward::AtPublish } else { Onward::AtPubrel };
    limits.reuses_ids = rng.bool();
    limits.tell_no_subscribers = rng.bool();
    limits.receive_maximum = (v5 && rng.bool()).then(|| few(rng, 30) as u16);
    limits.server_keep_alive = (v5 && rng.u8(0..4) == 0).then_some(5);
    limits.granted_qos = if rng.u8(0..10) == 0 { 1 } else { 2 };
    plan.unheard = (rng.u8(0..6) == 0).then_some(Lane::Bulk);
    plan.haunted = rng.u8(0..3) == 0;
    plan.canary_denied = (rng.u8(0..12) == 0).then(|| rng.u8(0..3));
    match nature {
        Nature::Plain => {}
        Nature::Mosquitto => plan.held_limit = Some(20),
        Nature::Emqx => limits.onward = Onward::AtPublish,
        Nature::Cloud if v5 => {
            limits.maximum_qos = rng.u8(0..3);
            limits.retain_available = rng.bool();
        }
        Nature::Cloud => {
            settings.limits.max_qos = Some(rng.u8(0..2));
            settings.limits.retain_available = Some(false);
            limits.unsaid.maximum_qos = settings.limits.max_qos;
            limits.unsaid.no_retain = true;
            plan.haunted = false;
        }
        Nature::Sessionless => {
            settings.clean_start = true;
            limits.unsaid.no_session = true;
            plan.haunted = false;
        }
    }
}

fn store(plan: &mut Plan, rng: &mut Rng) {
    if rng.u8(0..4) == 0 {
        plan.quota = rng.u64(1_500..8_000);
    }
    let reject = |rng: &mut Rng| if rng.u8(0..4) == 0 { WhenFull::RejectNew } else { WhenFull::DropOldest };
    plan.when_full = reject(rng);
    for lane in Lane::ALL.into_iter().skip(1) {
        plan.lanes[lane as usize] = LaneLimits {
            max_messages: (rng.u8(0..6) == 0).then(|| rng.u64(3..30)),
            max_bytes: (rng.u8(0..8) == 0).then(|| rng.u64(800..4_000)),
            max_age: (rng.u8(0..8) == 0).then(|| Duration::from_secs(rng.u64(1..60))),
            when_full: (rng.u8(0..4) == 0).then(|| reject(rng)),
        };
    }
    if rng.u8(0..4) == 0 {
        plan.replay = Replay {
            order: ReplayOrder::LiveFirst,
            max_messages_per_second: rng.bool().then(|| rng.u64(1..200)),
            max_bytes_per_second: (rng.u8(0..4) == 0).then_some(1_000),
        };
    }
}

fn faults(rng: &mut Rng, nature: Nature, protocol: Protocol) -> Faults {
    let v5 = protocol == Protocol::V5;
    let mut maybe = |most: u32, wanted: bool| match rng.bool() {
        true if wanted => rng.u32(1..=most),
        _ => 0,
    };
    Faults {
        cuts: maybe(40, true),
        connacks_lost: maybe(20, true),
        crashes: maybe(25, true),
        failed_commits: maybe(15, true),
        restarts: maybe(8, true),
        session_losses: maybe(12, nature != Nature::Sessionless),
        lies: maybe(8, nature != Nature::Sessionless),
        forgotten_ids: maybe(15, nature == Nature::Emqx || nature == Nature::Plain),
        sent_forgotten: maybe(12, true),
        receive_maxima: maybe(15, v5),
        maximum_qos: maybe(6, v5),
        packet_sizes: maybe(6, v5),
        retain_available: maybe(6, v5),
        refusals: maybe(40, true),
        silences: maybe(6, true),
        dead_links: maybe(6, true),
        presence: maybe(40, true),
        commands: maybe(100, true),
        oversize: maybe(5, !v5),
        expiring: maybe(10, true),
        wrong_acknowledgements: maybe(40, true),
        confusion: maybe(10, true),
        other_broker: maybe(6, nature == Nature::Plain || nature == Nature::Mosquitto),
    }
}

#[test]
fn everything_a_seed_can_draw() {
    seeds("everything_a_seed_can_draw", 300, scenario);
}

#[test]
fn a_failing_seed_shrinks_to_a_few_steps_that_still_fail() {
    let rule = Rule::PubrelAfterCommit;
    let found = (0..1_000).find_map(|seed| {
        let scenario = broken(seed, rule);
        let complaint = run(&scenario, false).result.err()?;
        complaint.starts_with("DUPLICATE").then_some((scenario, complaint))
    });
    let (scenario, complaint) = found.unwrap();
    let steps = shrink(&scenario, &kind(&complaint));
    let small = Scenario { steps, ..scenario.clone() };
    let outcome = run(&small, true);
    println!("{}\n{}", outcome.trace.join("\n"), outcome.result.clone().unwrap_err());
    assert_eq!(outcome.result.map_err(|complaint| kind(&complaint)), Err(kind(&complaint)));
    assert!(small.steps.len() < 30, "{} of {} steps", small.steps.len(), scenario.steps.len());
    assert!(outcome.trace.len() <= small.steps.len() + 1, "one line a step, and one for the end");
}
