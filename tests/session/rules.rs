//! Every row of the order table and every rule of delivery, broken one at a time: each must show.
//!
//! `FIELDPOST_RULES=1000 cargo nextest run --release --test session --no-capture -E 'test(each_rule_that_is_broken_shows)'`
//! looks for the first seed of each among so many; otherwise the recorded one is tried first. `FIELDPOST_RULE=DupIsSet`
//! takes that rule alone.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::random::run;
use crate::rule::Rule;
use crate::simulation::broken;

/// Seeds in which a broken rule must show.
const SEEDS_MAX: u64 = 1_000;

/// The first seed that shows each rule, as it was found last.
const KNOWN: &[(Rule, u64)] = &[
    (Rule::AcceptedAfterCommit, 0),
    (Rule::RowBeforePublish, 1),
    (Rule::Qos1ThroughTheGate, 2),
    (Rule::PubrelAfterCommit, 3),
    (Rule::RecordedBeforeAcknowledged, 162),
    (Rule::ForgottenBeforePubcomp, 1),
    (Rule::DoneWithItsRow, 11),
    (Rule::UncertainBeforeConnect, 132),
    (Rule::VerdictBeforePublish, 318),
    (Rule::OwnerOfTheRows, 35),
    (Rule::CleanStartForANewDatabase, 7),
    (Rule::GatedByTheCommit, 16),
    (Rule::AnswersOfThisConnection, 2),
    (Rule::FailedCommitIsACrash, 67),
    (Rule::VerdictIsCommitted, 0),
    (Rule::WindowUntilPubcomp, 3),
    (Rule::ReceiveMaximum, 35),
    (Rule::HeldBackFirst, 0),
    (Rule::QuietWindow, 93),
    (Rule::PresenceCounts, 242),
    (Rule::WindowAfterFreeing, 6),
    (Rule::OwnIdentifiers, 1),
    (Rule::RowsAreResumed, 1),
    (Rule::ResumeInOrder, 2),
    (Rule::SameIdentifier, 1),
    (Rule::SameBytes, 1),
    (Rule::OlderBeforeARow, 16),
    (Rule::OnceAConnection, 0),
    (Rule::DupIsSet, 1),
    (Rule::PubrelsInOrder, 2),
    (Rule::AbsentRequeues, 1),
    (Rule::AmbiguousByPolicy, 7),
    (Rule::AmbiguousIsCounted, 53),
    (Rule::SubscribedAgain, 0),
    (Rule::CanaryDecides, 132),
    (Rule::InFlightIsUntouchable, 0),
    (Rule::AbandonedKeepsItsIdentifier, 13),
    (Rule::SegmentUntilDone, 0),
    (Rule::OtherContentIsNew, 467),
    (Rule::IdsForEver, 0),
    (Rule::SubscribedAtQos2, 1),
    (Rule::RefusalsWait, 2),
    (Rule::RefusedTopicIsHeld, 2),
    (Rule::RefusalsEnd, 25),
    (Rule::NotAuthorizedHolds, 2),
    (Rule::NotAuthorizedHoldsTheLane, 12),
    (Rule::HopelessIsBuried, 2),
    (Rule::NobodySubscribedIsSuccess, 0),
    (Rule::NotFoundIsCounted, 254),
    (Rule::MaximumQos, 6),
    (Rule::RetainAvailable, 5),
    (Rule::MaximumPacketSize, 37),
    (Rule::ServerKeepAlive, 12),
    (Rule::NoOldRetained, 285),
    (Rule::AckTimeout, 19),
    (Rule::SilenceIsNoticed, 0),
    (Rule::UnknownPubrel, 2),
    (Rule::UnknownPubrec, 23),
    (Rule::MisfitsCompleteNothing, 291),
    (Rule::OversizeIsSkipped, 47),
];

#[test]
fn each_rule_that_is_broken_shows() {
    let search = std::env::var("FIELDPOST_RULES").ok().and_then(|count| count.parse().ok());
    let shows = |rule: Rule, seed: u64| run(&broken(seed, rule), false).result.err().map(|why| (seed, why));
    let find = |rule: Rule| {
        let known = KNOWN.iter().find(|(known, _)| *known == rule).filter(|_| search.is_none());
        let found = known.and_then(|(_, seed)| shows(rule, *seed));
        found.or_else(|| (0..search.unwrap_or(SEEDS_MAX)).find_map(|seed| shows(rule, seed)))
    };
    let only = std::env::var("FIELDPOST_RULE").ok();
    let is_wanted = |rule: &&Rule| only.as_ref().is_none_or(|only| format!("{rule:?}") == *only);
    let rules: Vec<Rule> = Rule::ALL.iter().filter(is_wanted).copied().collect();
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(rule) = rules.get(next.fetch_add(1, Ordering::Relaxed)) {
            let shown = find(*rule);
            found.lock().unwrap().push((*rule as usize, *rule, shown));
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let mut found = found.into_inner().unwrap();
    found.sort_by_key(|(number, ..)| *number);
    println!("| rule | | seed | what shows |\n|---|---|---|---|");
    for (_, rule, shown) in &found {
        let Some((seed, why)) = shown else { continue };
        let why: String = why.lines().next().unwrap_or_default().chars().take(110).collect();
        println!("| {} | `{rule:?}` | {seed} | {} |", rule.words(), why.replace('|', "/"));
    }
    let silent: Vec<Rule> =
        found.iter().filter(|(.., shown)| shown.is_none()).map(|(_, rule, _)| *rule).collect();
    assert!(silent.is_empty(), "broken, and nothing shows: {silent:?}");
}
