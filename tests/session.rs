//! The rules of delivery, one test each, named after its claim.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod support;

#[path = "session/random.rs"]
mod random;
#[path = "session/world.rs"]
mod world;

use random::{Faults, Run, first_complaint, protocol_of, seeds};
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

fn sabotaged(seed: u64, sabotage: Sabotage, faults: Faults) -> Run {
    let mut plan = plan(seed);
    plan.sabotage = sabotage;
    Run { plan, faults, steps: 200 }
}

#[test]
fn the_box_notices_a_pubrel_that_leaves_before_its_commit() {
    let complaint = first_complaint(300, |seed| {
        let mut run = sabotaged(seed, Sabotage::No, HONEST);
        run.plan.settings.break_pubrel_order = true;
        run
    });
    assert!(complaint.as_ref().is_some_and(|complaint| complaint.starts_with("DUPLICATE")), "{complaint:?}");
}

#[test]
fn the_box_notices_each_broken_rule() {
    let losing = Faults { session_losses: 10, connacks_lost: 15, ..HONEST };
    let shrinking = Faults { receive_maxima: 15, ..HONEST };
    for (sabotage, faults) in [
        (Sabotage::ReleaseBeforeCommit, HONEST),
        (Sabotage::IgnoreSettling, losing),
        (Sabotage::IgnoreUncertainty, losing),
        (Sabotage::IgnoreReceiveMaximum, shrinking),
        (Sabotage::ForgetRows, HONEST),
        (Sabotage::HideFailedCommits, HONEST),
    ] {
        let complaint = first_complaint(300, |seed| sabotaged(seed, sabotage, faults));
        println!("{sabotage:?}: {complaint:?}");
        assert!(complaint.is_some(), "{sabotage:?} went unnoticed");
    }
}
