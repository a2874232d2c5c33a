//! A failing run, made small: steps are left out as long as what is left fails in the same way, and what is left is
//! told, one line a step.

use crate::random::{Scenario, run};
use crate::step::Step;

/// Runs that shrinking may take.
const RUNS_MAX: usize = 3_000;

/// The first word or words of a complaint, which say of what kind it is.
pub fn kind(complaint: &str) -> String {
    complaint.split(':').next().unwrap_or_default().chars().filter(|c| !c.is_ascii_digit()).collect()
}

fn fails(scenario: &Scenario, steps: &[Step], wanted: &str) -> bool {
    let less = Scenario { steps: steps.to_vec(), ..scenario.clone() };
    run(&less, false).result.is_err_and(|complaint| kind(&complaint) == wanted)
}

/// Fewer steps that still fail with the same kind of complaint: no single one of them can be left out.
pub fn shrink(scenario: &Scenario, wanted: &str) -> Vec<Step> {
    let mut steps = scenario.steps.clone();
    let mut runs = 0;
    let mut size = steps.len().div_ceil(2).max(1);
    loop {
        let (mut at, mut less) = (0, false);
        while at < steps.len() && runs < RUNS_MAX {
            let end = (at + size).min(steps.len());
            let rest: Vec<Step> = [&steps[..at], &steps[end..]].concat();
            runs += 1;
            if fails(scenario, &rest, wanted) {
                (steps, less) = (rest, true);
            } else {
                at = end;
            }
        }
        if runs >= RUNS_MAX || (size == 1 && !less) {
            break;
        }
        size = if size > 1 { size.div_ceil(2) } else { 1 };
    }
    // And of what is produced at once, no more than it takes.
    for at in 0..steps.len() {
        while let Some(smaller) = steps[at].smaller().filter(|_| runs < RUNS_MAX) {
            let mut rest = steps.clone();
            rest[at] = smaller;
            runs += 1;
            if !fails(scenario, &rest, wanted) {
                break;
            }
            steps = rest;
        }
    }
    steps
}

/// What there is to say of a seed that fails.
pub fn report(test: &str, seed: u64, scenario: &Scenario) -> String {
    let Err(complaint) = run(scenario, false).result else { return format!("seed {seed} fails no more") };
    let steps = shrink(scenario, &kind(&complaint));
    let small = Scenario { steps, ..scenario.clone() };
    let outcome = run(&small, true);
    format!(
        "seed {seed}: {complaint}\n\
         again: FIELDPOST_SEED={seed} cargo nextest run --test session --no-capture -E 'test({test})'\n\
         {:?}, broken: {:?}; {} of {} steps are enough:\n{}\nin the end: {}",
        scenario.plan.protocol,
        scenario.plan.broken,
        small.steps.len(),
        scenario.steps.len(),
        outcome.trace.join("\n"),
        outcome.result.err().unwrap_or_else(|| "nothing".into()),
    )
}
