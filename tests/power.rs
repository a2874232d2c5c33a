//! Power cuts: the store's real code over a disk that forgets what was not synced.
//!
//! A long life of the store is recorded, then the power fails at every operation it did to the disk, and what was
//! not synced survives in part, in pieces, or not at all. Each time the store is opened again and compared with
//! what it had answered. Each test takes a part of the operations, another one for each seed; `FIELDPOST_SEED`
//! repeats a run. All of it, at every page size and with two tables at the end, takes some minutes in memory and
//! longer on a disk: `TMPDIR=/dev/shm cargo test --test power -- --ignored --nocapture`.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "power/cuts.rs"]
mod cuts;
#[path = "power/disk.rs"]
mod disk;
#[path = "power/oracle.rs"]
mod oracle;
#[path = "power/rescue.rs"]
mod rescue;
#[path = "power/state.rs"]
mod state;
#[path = "power/workload.rs"]
mod workload;

use std::path::Path;
use std::time::Instant;

use cuts::{
    Cuts, Extent, Figures, Life, Line, chance, cut_off, live, live_on, pages, print_table, roomy, settings,
};
use disk::{Disk, Keep, Op, Refusal, Tape};
use fieldpost::store::{Faults, Store};
use fieldpost::turn::OnSessionLoss;
use oracle::{Verdict, examine};
use rescue::{Found, schema_1};
use state::State;
use workload::{Kind, Way, Workload};

/// From the environment, or drawn; printed, so that a run can be repeated.
fn seed() -> u64 {
    let given = std::env::var("FIELDPOST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| fastrand::u64(0..1_000_000));
    println!("FIELDPOST_SEED={seed}");
    seed
}

/// Steps of each life that is cut off at every operation: `FIELDPOST_STEPS`, or 200.
fn steps() -> usize {
    std::env::var("FIELDPOST_STEPS").ok().and_then(|steps| steps.parse().ok()).unwrap_or(200)
}

#[track_caller]
fn assert_clean(lines: &[Line]) {
    for line in lines {
        assert!(line.is_clean(), "{}: {:#?}", line.name, line.figures.verdict.words);
    }
}

/// The whole of what the other tests take a part of.
#[test]
#[ignore = "takes minutes: `TMPDIR=/dev/shm cargo test --test power -- --ignored --nocapture`"]
fn every_cut_at_every_page_size_is_survived_and_every_broken_order_noticed() {
    let (seed, whole, began) = (seed(), Extent::Whole, Instant::now());
    let mut lines = Vec::new();
    for page_bytes in [1024, 512, 4096] {
        for found in [Found::AtStart, Found::BehindStart] {
            lines.push(rescue::cut_during_a_salvage(page_bytes, found, seed, whole));
        }
    }
    for page_bytes in [1024, 512, 4096] {
        lines.push(cut_at_any_operation(page_bytes, seed, whole));
    }
    let controls = controls(whole);
    lines.push(cut_while_brought_forward(seed, whole));
    for page_bytes in [1024, 512, 4096] {
        lines.extend(refuse_at_any_place(page_bytes, seed, whole));
    }
    print_table("what is survived", &lines);
    print_table("negative controls: what is noticed", &controls);
    println!("\nFIELDPOST_SEED={seed}, {} workers, {:.0?}", whole.workers(), began.elapsed());
    assert_clean(&lines);
}

// ---- cuts ----------------------------------------------------------------------------------------------

fn cut_at_any_operation(page_bytes: u64, seed: u64, extent: Extent) -> Line {
    let began = Instant::now();
    let life = live(pages(page_bytes), seed, extent.pick(160, steps()), Way::Right);
    println!("{:?}", life.counts);
    let stride = extent.pick(50, 1);
    let figures = cut_off(&life, Cuts::every(stride, seed, extent.workers()));
    let size = (life.steps.len(), life.tape.ops.len());
    Line::new("a power cut at any operation", page_bytes, began, size, figures)
}

#[test]
fn a_power_cut_at_any_operation_loses_and_doubles_nothing() {
    assert_clean(&[cut_at_any_operation(1024, seed(), Extent::Part)]);
}

#[test]
fn a_power_cut_with_small_pages_loses_and_doubles_nothing() {
    assert_clean(&[cut_at_any_operation(512, seed(), Extent::Part)]);
}

#[test]
fn a_power_cut_with_large_pages_loses_and_doubles_nothing() {
    assert_clean(&[cut_at_any_operation(4096, seed(), Extent::Part)]);
}

fn cut_while_brought_forward(seed: u64, extent: Extent) -> Line {
    let folder = tempfile::tempdir().unwrap();
    let born = schema_1(folder.path());
    let began = Instant::now();
    let life = live_on(folder.path(), born, pages(1024), seed, extent.pick(10, steps() / 4), Way::Right);
    let stride = extent.pick(3, 1);
    let figures = cut_off(&life, Cuts::every(stride, seed, extent.workers()));
    let size = (life.steps.len(), life.tape.ops.len());
    Line::new("schema 1 is brought to 2", 1024, began, size, figures)
}

#[test]
fn a_power_cut_while_an_older_schema_is_brought_forward_costs_nothing() {
    assert_clean(&[cut_while_brought_forward(seed(), Extent::Part)]);
}

#[test]
fn a_power_cut_during_a_salvage_costs_nothing_more() {
    let seed = seed();
    let salvage = |found| rescue::cut_during_a_salvage(1024, found, seed, Extent::Part);
    assert_clean(&[salvage(Found::BehindStart), salvage(Found::AtStart)]);
}

// ---- negative controls ---------------------------------------------------------------------------------

/// What of a verdict shows one thing.
type Measure = fn(&Verdict) -> usize;

/// Each of these must be noticed; how often is in the lines.
fn controls(extent: Extent) -> Vec<Line> {
    // One in whose life everything happens that is told too early below.
    let seed = 6;
    let workers = extent.workers();
    let cuts = |stride| Cuts::every(stride, seed, workers);
    let faults = |synchronous| Faults { synchronous, ..pages(1024) };
    let steps = 120;
    let mut lines = Vec::new();
    let mut control = |name: &str, life: &Life, cuts: Cuts, shown_by: &[Measure]| {
        let began = Instant::now();
        let figures = cut_off(life, cuts);
        let line = Line::new(name, 1024, began, (life.steps.len(), life.tape.ops.len()), figures);
        println!("    {}", line.figures.verdict.words.first().map_or("not noticed", String::as_str));
        for measure in shown_by {
            assert!(measure(&line.figures.verdict) > 0, "{name} is not noticed as it should be");
        }
        lines.push(line);
    };
    let (lost, doubled): (Measure, Measure) = (|verdict| verdict.lost, |verdict| verdict.doubled);
    let (corrupt, wrong): (Measure, Measure) = (|verdict| verdict.corrupt, |verdict| verdict.wrong);

    // It loses the last commits, and never more.
    let normal = live(faults(Some("NORMAL")), seed, steps, Way::Right);
    control("synchronous=NORMAL", &normal, cuts(extent.pick(60, 8)), &[lost, doubled]);
    let off = live(faults(Some("OFF")), seed, steps, Way::Right);
    control("synchronous=OFF", &off, cuts(extent.pick(180, 40)), &[lost, corrupt]);
    let right = live(faults(None), seed, steps, Way::Right);
    let lies = Cuts { lies: true, ..cuts(extent.pick(180, 40)) };
    control("syncs that lie", &right, lies, &[lost, corrupt]);

    // Told before its commit: what must then be missing or doubled after some power cut.
    let one_by_one = live(faults(None), seed, 2 * steps, Way::OneByOne);
    let early: [(&str, Kind, Measure); 12] = [
        ("\"accepted\" before the message", Kind::Accepted, lost),
        ("a gap record before its gap is closed", Kind::Told, lost),
        ("PUBLISH at QoS 2 before its row", Kind::Published, wrong),
        ("PUBREL before its PUBREC", Kind::Received, doubled),
        ("the end before PUBACK or PUBCOMP", Kind::Done, doubled),
        ("PUBREC or PUBACK before what came in", Kind::Inbound, lost),
        ("PUBCOMP before its id is forgotten", Kind::Released, wrong),
        ("CONNECT before \"uncertain\" or the owner", Kind::Connecting, wrong),
        ("CONNECT before the new epoch", Kind::Disowned, wrong),
        ("PUBLISH before what CONNACK meant", Kind::Settled, wrong),
        ("a write before its command has begun", Kind::Begun, doubled),
        ("an answer before its command's end", Kind::Answered, lost),
    ];
    for (name, kind, measure) in early {
        control(name, &one_by_one, Cuts { early: Some(kind), ..cuts(1) }, &[measure]);
    }
    let split = live(faults(None), seed, steps, Way::SplitDone);
    control("done bit and row in two transactions", &split, cuts(extent.pick(24, 8)), &[lost]);
    let split = live(faults(None), seed, steps, Way::SplitEpoch);
    let disowned = Cuts { during: Some(Kind::Disowned), ..cuts(1) };
    control("epoch and clean start in two transactions", &split, disowned, &[wrong]);
    lines
}

#[test]
fn the_simulation_notices_what_breaks_a_promise() {
    controls(Extent::Part);
}

// ---- a disk that refuses -------------------------------------------------------------------------------

/// Syncs that fail and writes that find no space, each of a life's in turn, once or several times on end; the store
/// recovers, goes on, and later the power fails.
fn refuse_at_any_place(page_bytes: u64, seed: u64, extent: Extent) -> Vec<Line> {
    let steps = extent.pick(60, steps() / 5);
    let quiet = live(pages(page_bytes), seed, steps, Way::Right);
    let syncs = quiet.tape.ops.iter().filter(|op| matches!(op, Op::Sync { .. })).count();
    let writes = quiet.tape.ops.iter().filter(|op| matches!(op, Op::Write { .. })).count();
    let plans = [
        ("EIO at each sync", Refusal::Sync, syncs, 1),
        ("EIO at 3 syncs on end", Refusal::Sync, syncs, 3),
        ("EIO at 30 syncs on end", Refusal::Sync, syncs, 30),
        ("ENOSPC at each write", Refusal::Write, writes, 1),
        ("ENOSPC at 50 writes on end", Refusal::Write, writes, 50),
    ];
    let mut lines = Vec::new();
    for (name, refusal, places, times) in plans {
        let began = Instant::now();
        let stride = extent.pick(places.div_ceil(8), 1);
        let places: Vec<usize> = (1 + seed as usize % stride..=places).step_by(stride).collect();
        let workers = extent.workers();
        let figures = cuts::share_out(workers, |worker| {
            let mut figures = Figures::default();
            for place in places.iter().skip(worker).step_by(workers) {
                refuse_at(page_bytes, seed, steps, (refusal, *place, times), &mut figures);
            }
            figures
        });
        lines.push(Line::new(name, page_bytes, began, (steps, places.len()), figures));
    }
    lines
}

fn refuse_at(
    page_bytes: u64,
    seed: u64,
    steps: usize,
    refuse: (Refusal, usize, usize),
    figures: &mut Figures,
) {
    let folder = tempfile::tempdir().unwrap();
    let mut workload =
        Workload::new(settings(folder.path(), pages(page_bytes)), seed, State::default(), Way::Right);
    disk::record(folder.path(), Some(refuse));
    workload.run(steps);
    let tape = disk::stop();
    for wrong in &workload.wrong {
        let verdict = Verdict { wrong: 1, words: vec![wrong.clone()], ..Verdict::default() };
        figures.judged(verdict, &format!("{refuse:?}"));
    }
    // The power fails at the end of a commit, whose answer says what is there.
    let mut disk = Disk::new(&tape.before);
    let mut random = chance(seed, refuse.1);
    let folder = tempfile::tempdir().unwrap();
    let settings = roomy(folder.path(), pages(page_bytes));
    let refused_at = tape.refused_at.unwrap_or(usize::MAX);
    let ends = workload.steps.iter().filter(|(end, _, kinds)| *end > refused_at && !kinds.is_empty());
    let mut applied = 0;
    for (number, (end, state, _)) in ends.enumerate() {
        for op in &tape.ops[applied..*end] {
            disk.apply(op);
        }
        applied = *end;
        if number > 1 && number % 12 != 0 {
            continue;
        }
        for keep in [Keep::Nothing, Keep::Torn] {
            disk::lay_out(folder.path(), &disk.cut(keep, &mut random));
            figures.points += 1;
            figures.starts += 1;
            let verdict = examine(&settings, &[state], None);
            figures.judged(verdict, &format!("{refuse:?}, cut at operation {end}, {keep:?} kept"));
        }
    }
}

#[test]
fn whatever_the_disk_refuses_costs_nothing_that_was_accepted() {
    assert_clean(&refuse_at_any_place(1024, seed(), Extent::Part));
}

/// A store over a disk that refuses so many times from the n-th time on.
fn refusing(folder: &Path, refusal: Refusal, from: usize) -> Result<Store, fieldpost::store::StoreError> {
    disk::record(folder, Some((refusal, from, 1)));
    Store::open(settings(folder, pages(1024)))
}

#[test]
fn a_database_whose_journal_mode_cannot_be_changed_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    // The first two are the journal's of the transaction that writes the mode, the third is the database's.
    let refused = refusing(folder.path(), Refusal::Sync, 3).unwrap_err();
    disk::stop();
    assert!(refused.to_string().contains("disk I/O error"), "{refused}");
    Store::open(settings(folder.path(), pages(1024))).unwrap();
}

#[test]
fn a_new_epoch_that_could_not_be_committed_is_not_used() {
    let writes = |tape: &Tape| tape.ops.iter().filter(|op| matches!(op, Op::Write { .. })).count();
    let quiet = tempfile::tempdir().unwrap();
    disk::record(quiet.path(), None);
    let store = Store::open(settings(quiet.path(), pages(1024))).unwrap();
    let before = writes(&disk::stop());
    drop(store);
    let folder = tempfile::tempdir().unwrap();
    let mut store = refusing(folder.path(), Refusal::Write, before + 1).unwrap();
    store.disown(7, 7, OnSessionLoss::Republish).unwrap_err();
    disk::stop();
    let look = store.look(oracle::START).unwrap();
    assert_eq!((look.boot.epoch, look.boot.boot), (1, 1));
    store.disown(7, 7, OnSessionLoss::Republish).unwrap();
    assert_eq!((store.boot().epoch, store.boot().boot), (8, 8));
}
