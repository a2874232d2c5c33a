//! The rules of delivery, one test each, named after its claim.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod support;

#[path = "session/desk.rs"]
mod desk;
#[path = "session/inbound.rs"]
mod inbound;
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
#[path = "session/world.rs"]
mod world;

use fieldpost::store::{Replay, ReplayOrder};
use fieldpost::uplink::packet::Protocol;
use fieldpost::uplink::session::Counted;
use random::{Faults, Run, complains, overtakers, protocol_of, seeds};
use support::broker::Onward;
use world::{Plan, Sabotage};

const HONEST: Faults = Faults {
    cuts: 15,
    connacks_lost: 5,
    crashes: 10,
    failed_commits: 6,
    restarts: 3,
    session_losses: 0,
    lies: 0,
    forgotten_ids: 0,
    receive_maxima: 0,
    refusals: 0,
    silences: 6,
    presence: 20,
    commands: 20,
    expiring: 0,
};

fn plan(seed: u64) -> Plan {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xb0);
    let mut plan = Plan::new(protocol_of(seed));
    plan.settings.max_in_flight = 1 + world::few(&mut rng, 40) as u16;
    plan.settings.qos2_window = world::few(&mut rng, 20) as u16;
    plan.limits.onward = if rng.bool() { Onward::AtPubrel } else { Onward::AtPublish };
    plan
}

#[test]
fn cuts_and_crashes_neither_lose_nor_double_nor_reorder() {
    seeds(300, |seed| Run { plan: plan(seed), faults: HONEST, steps: 200 });
}

#[test]
fn a_lost_session_loses_nothing_and_doubles_only_the_ambiguous() {
    seeds(300, |seed| Run {
        plan: plan(seed),
        faults: Faults { session_losses: 10, connacks_lost: 15, ..HONEST },
        steps: 200,
    });
}

#[test]
fn limits_that_shrink_are_obeyed_while_resuming() {
    seeds(300, |seed| Run { plan: plan(seed), faults: Faults { receive_maxima: 15, ..HONEST }, steps: 200 });
}

#[test]
fn refused_messages_are_retried_or_counted_and_the_rest_arrives() {
    seeds(300, |seed| Run {
        plan: plan(seed),
        faults: Faults { refusals: 15, expiring: 10, ..HONEST },
        steps: 200,
    });
}

#[test]
fn forgotten_identifiers_cost_only_what_is_counted() {
    seeds(300, |seed| Run { plan: plan(seed), faults: Faults { forgotten_ids: 10, ..HONEST }, steps: 200 });
}

#[test]
fn everything_at_once() {
    seeds(300, |seed| Run {
        plan: plan(seed),
        faults: Faults {
            session_losses: 5,
            receive_maxima: 5,
            refusals: 10,
            lies: 5,
            expiring: 10,
            ..HONEST
        },
        steps: 200,
    });
}

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
    seeds(300, |seed| Run { plan: live_first(seed), faults: HONEST, steps: 200 });
}

#[test]
fn live_first_through_everything_at_once() {
    let faults =
        Faults { session_losses: 5, receive_maxima: 5, refusals: 10, lies: 5, expiring: 10, ..HONEST };
    seeds(300, |seed| Run { plan: live_first(seed), faults, steps: 200 });
}

#[test]
fn the_box_notices_a_backlog_that_is_overtaken_unasked() {
    // Judged as if the order were kept.
    let overtakes = |seed| {
        let (mut world, result) =
            random::run(&Run { plan: live_first(seed), faults: HONEST, steps: 200 }, seed, false);
        world.plan.replay.order = ReplayOrder::InOrder;
        result.is_ok() && random::judge(&mut world).is_err_and(|why| why.starts_with("ORDER"))
    };
    assert!((0..300).any(overtakes));
}

fn sabotaged(seed: u64, sabotage: Sabotage, faults: Faults) -> Run {
    let mut plan = plan(seed);
    plan.sabotage = sabotage;
    Run { plan, faults, steps: 200 }
}

#[test]
fn what_overtakes_a_refused_message_was_in_flight_and_is_counted() {
    for seed in 0..100 {
        let faults = Faults { refusals: 30, ..Faults::default() };
        let mut plan = plan(seed);
        plan.protocol = Protocol::V5;
        plan.settings.protocol = Protocol::V5;
        let (mut world, result) = random::run(&Run { plan, faults, steps: 200 }, seed, false);
        assert_eq!(result, Ok(()), "seed {seed}");
        let overtakers = overtakers(&world);
        assert!(overtakers <= world.count(Counted::OrderOvertaken), "seed {seed}: {overtakers} overtook");
        assert!(world.dropped() <= world.count(Counted::DeadLettered));
    }
}

#[test]
fn a_quota_takes_only_what_is_not_in_flight_and_counts_it() {
    seeds(100, |seed| {
        let mut plan = plan(seed);
        plan.quota = 2_000;
        Run { plan, faults: Faults { session_losses: 5, ..HONEST }, steps: 200 }
    });
}

#[test]
fn the_box_notices_a_pubrel_that_leaves_before_its_commit() {
    let broken = |seed| {
        let mut run = sabotaged(seed, Sabotage::No, HONEST);
        run.plan.settings.break_pubrel_order = true;
        run
    };
    assert!(complains(&["DUPLICATE"], broken), "a power cut shows it");
    assert!(complains(&["EARLY"], broken), "and so does the order of steps");
}

#[test]
fn the_box_notices_packets_released_before_their_commit() {
    let broken = |seed| sabotaged(seed, Sabotage::ReleaseBeforeCommit, HONEST);
    assert!(complains(&["DUPLICATE", "LOST"], broken));
}

#[test]
fn the_box_notices_a_verdict_that_is_never_committed() {
    let losing = Faults { session_losses: 10, connacks_lost: 15, ..HONEST };
    let broken = |seed| sabotaged(seed, Sabotage::IgnoreSettling, losing);
    assert!(complains(&["DUPLICATE", "LOST", "STALL"], broken));
}

#[test]
fn the_box_notices_a_missed_absent() {
    let losing = Faults { session_losses: 10, connacks_lost: 15, ..HONEST };
    let broken = |seed| sabotaged(seed, Sabotage::IgnoreUncertainty, losing);
    assert!(complains(&["LOST"], broken));
}

#[test]
fn the_box_notices_a_receive_maximum_that_is_not_obeyed() {
    let shrinking = Faults { receive_maxima: 15, ..HONEST };
    let broken = |seed| sabotaged(seed, Sabotage::IgnoreReceiveMaximum, shrinking);
    assert!(complains(&["VIOLATION"], broken));
}

#[test]
fn the_box_notices_rows_that_are_forgotten_and_failed_commits_that_are_hidden() {
    let broken = |seed| sabotaged(seed, Sabotage::ForgetRows, HONEST);
    assert!(complains(&["STALL", "LOST"], broken));
    let broken = |seed| sabotaged(seed, Sabotage::HideFailedCommits, HONEST);
    assert!(complains(&["DUPLICATE", "LOST", "STALL"], broken));
}
