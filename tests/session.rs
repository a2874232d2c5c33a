//! The rules of delivery, one test each, named after its claim.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod support;

#[path = "session/desk.rs"]
mod desk;
#[path = "session/inbound.rs"]
mod inbound;
#[path = "session/judge.rs"]
mod judge;
#[path = "session/liveness.rs"]
mod liveness;
#[path = "session/loss.rs"]
mod loss;
#[path = "session/order.rs"]
mod order;
#[path = "session/random.rs"]
mod random;
#[path = "session/refusals.rs"]
mod refusals;
#[path = "session/resume.rs"]
mod resume;
#[path = "session/rule.rs"]
mod rule;
#[path = "session/rules.rs"]
mod rules;
#[path = "session/shrink.rs"]
mod shrink;
#[path = "session/simulation.rs"]
mod simulation;
#[path = "session/step.rs"]
mod step;
#[path = "session/world.rs"]
mod world;

use fieldpost::store::{Replay, ReplayOrder};
use fieldpost::uplink::packet::Protocol;
use fieldpost::uplink::session::Counted;
use random::{Run, Scenario, complains, overtakers, protocol_of, run, seeds};
use rule::Rule;
use step::Faults;
use support::broker::Onward;
use world::Plan;

const HONEST: Faults = Faults {
    cuts: 15,
    connacks_lost: 5,
    crashes: 10,
    failed_commits: 6,
    restarts: 3,
    session_losses: 0,
    lies: 0,
    forgotten_ids: 0,
    sent_forgotten: 0,
    receive_maxima: 0,
    maximum_qos: 0,
    packet_sizes: 0,
    retain_available: 0,
    refusals: 0,
    silences: 6,
    dead_links: 3,
    presence: 20,
    commands: 20,
    oversize: 0,
    expiring: 0,
    wrong_acknowledgements: 0,
    confusion: 0,
    other_broker: 0,
};

fn plan(seed: u64) -> Plan {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xb0);
    let mut plan = Plan::new(protocol_of(seed));
    plan.settings.max_in_flight = 1 + world::few(&mut rng, 40) as u16;
    plan.settings.qos2_window = world::few(&mut rng, 20) as u16;
    plan.limits.onward = if rng.bool() { Onward::AtPubrel } else { Onward::AtPublish };
    plan
}

fn scenario(plan: Plan, faults: Faults, seed: u64) -> Scenario {
    Run { plan, faults, steps: 200 }.draw(seed)
}

#[test]
fn cuts_and_crashes_neither_lose_nor_double_nor_reorder() {
    seeds("cuts_and_crashes_neither_lose_nor_double_nor_reorder", 200, |seed| {
        scenario(plan(seed), HONEST, seed)
    });
}

#[test]
fn a_lost_session_loses_nothing_and_doubles_only_the_ambiguous() {
    let faults = Faults { session_losses: 10, connacks_lost: 15, ..HONEST };
    seeds("a_lost_session_loses_nothing_and_doubles_only_the_ambiguous", 200, |seed| {
        scenario(plan(seed), faults, seed)
    });
}

#[test]
fn limits_that_shrink_are_obeyed_while_resuming() {
    let faults = Faults { receive_maxima: 15, ..HONEST };
    seeds("limits_that_shrink_are_obeyed_while_resuming", 200, |seed| scenario(plan(seed), faults, seed));
}

#[test]
fn refused_messages_are_retried_or_counted_and_the_rest_arrives() {
    let faults = Faults { refusals: 15, expiring: 10, ..HONEST };
    seeds("refused_messages_are_retried_or_counted_and_the_rest_arrives", 200, |seed| {
        scenario(plan(seed), faults, seed)
    });
}

#[test]
fn forgotten_identifiers_cost_only_what_is_counted() {
    let faults = Faults { forgotten_ids: 10, ..HONEST };
    seeds("forgotten_identifiers_cost_only_what_is_counted", 200, |seed| scenario(plan(seed), faults, seed));
}

const ALL_AT_ONCE: Faults =
    Faults { session_losses: 5, receive_maxima: 5, refusals: 10, lies: 5, expiring: 10, ..HONEST };

/// Live first, some of the time with a pace.
fn live_first(seed: u64) -> Plan {
    let mut plan = plan(seed);
    plan.replay = Replay {
        order: ReplayOrder::LiveFirst,
        max_messages_per_second: seed.is_multiple_of(3).then_some(1 + seed % 200),
        max_bytes_per_second: seed.is_multiple_of(5).then_some(1_000),
    };
    plan
}

#[test]
fn live_first_neither_loses_nor_doubles_and_overtakes_only_the_backlog() {
    seeds("live_first_neither_loses_nor_doubles_and_overtakes_only_the_backlog", 200, |seed| {
        scenario(live_first(seed), HONEST, seed)
    });
}

#[test]
fn live_first_through_everything_at_once() {
    seeds("live_first_through_everything_at_once", 200, |seed| scenario(live_first(seed), ALL_AT_ONCE, seed));
}

#[test]
fn the_box_notices_a_backlog_that_is_overtaken_unasked() {
    // Judged as if the order were kept.
    let overtakes = |seed| {
        let mut world = run(&scenario(live_first(seed), HONEST, seed), false).world;
        world.plan.replay.order = ReplayOrder::InOrder;
        judge::Judge::default().look(&mut world).is_err_and(|why| why.starts_with("ORDER"))
    };
    assert!((0..300).any(overtakes));
}

#[test]
fn what_overtakes_a_refused_message_was_in_flight_and_is_counted() {
    for faults in [Faults::default(), HONEST] {
        let mut across_reconnects = 0;
        for seed in 0..100 {
            let faults = Faults { refusals: 30, ..faults };
            let mut plan = plan(seed);
            plan.protocol = Protocol::V5;
            plan.settings.protocol = Protocol::V5;
            let mut outcome = run(&scenario(plan, faults, seed), false);
            assert_eq!(outcome.result, Ok(()), "seed {seed}");
            let overtakers = overtakers(&outcome.world);
            let counted = outcome.world.count(Counted::OrderOvertaken);
            assert!(overtakers <= counted, "seed {seed}: {overtakers} overtook, {counted} counted");
            assert!(outcome.world.dropped() <= outcome.world.count(Counted::DeadLettered));
            // The last end is the quiet link's.
            across_reconnects += overtakers * u64::from(outcome.world.ends.len() > 1);
        }
        assert!(across_reconnects > 0, "not only within one connection");
    }
}

#[test]
fn a_quota_takes_only_what_is_not_in_flight_and_counts_it() {
    seeds("a_quota_takes_only_what_is_not_in_flight_and_counts_it", 100, |seed| {
        let mut plan = plan(seed);
        plan.quota = 2_000;
        scenario(plan, Faults { session_losses: 5, ..HONEST }, seed)
    });
}

fn broken(seed: u64, rule: Rule, faults: Faults) -> Scenario {
    let mut plan = plan(seed);
    plan.broken = Some(rule);
    Scenario { by_the_table: false, ..scenario(plan, faults, seed) }
}

#[test]
fn the_box_notices_a_pubrel_that_leaves_before_its_commit() {
    let broken = |seed| broken(seed, Rule::PubrelAfterCommit, HONEST);
    assert!(complains(&["DUPLICATE"], broken), "a power cut shows it");
    let by_the_table = |seed| Scenario { by_the_table: true, ..broken(seed) };
    assert!(complains(&["EARLY"], by_the_table), "and so does the order of steps");
}

#[test]
fn the_box_notices_packets_released_before_their_commit() {
    let broken = |seed| broken(seed, Rule::GatedByTheCommit, HONEST);
    assert!(complains(&["DUPLICATE", "LOST"], broken));
}

const LOSING: Faults = Faults { session_losses: 10, connacks_lost: 15, ..HONEST };

#[test]
fn the_box_notices_a_verdict_that_is_never_committed() {
    assert!(complains(&["DUPLICATE", "LOST", "STALL"], |seed| broken(
        seed,
        Rule::VerdictIsCommitted,
        LOSING
    )));
}

#[test]
fn the_box_notices_a_missed_absent() {
    assert!(complains(&["LOST"], |seed| broken(seed, Rule::UncertainBeforeConnect, LOSING)));
}

#[test]
fn the_box_notices_a_receive_maximum_that_is_not_obeyed() {
    let shrinking = Faults { receive_maxima: 15, ..HONEST };
    assert!(complains(&["VIOLATION"], |seed| broken(seed, Rule::ReceiveMaximum, shrinking)));
}

#[test]
fn the_box_notices_rows_that_are_forgotten_and_failed_commits_that_are_hidden() {
    assert!(complains(&["STALL", "LOST"], |seed| broken(seed, Rule::RowsAreResumed, HONEST)));
    let hidden = |seed| broken(seed, Rule::FailedCommitIsACrash, HONEST);
    assert!(complains(&["DUPLICATE", "LOST", "STALL"], hidden));
}
