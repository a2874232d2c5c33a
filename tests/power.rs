//! Power cuts: the store's real code over a disk that forgets what was not synced.
//!
//! A long life of the store is recorded, then the power fails at every operation it did to the disk, and what was
//! not synced survives in part, in pieces, or not at all. Each time the store is opened again and compared with
//! what it had answered. `FIELDPOST_POWER=full` tries every crash point and every way, at every page size;
//! otherwise a part of them, another one for each seed. `FIELDPOST_SEED` repeats a run.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "power/disk.rs"]
mod disk;
#[path = "power/oracle.rs"]
mod oracle;
#[path = "power/workload.rs"]
mod workload;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use disk::{Disk, Keep, Op, Refusal, Tape};
use fastrand::Rng;
use fieldpost::store::{Faults, Look, Settings, Store};
use fieldpost::turn::OnSessionLoss;
use oracle::{State, Verdict, examine};
use workload::{Kind, Workload};

fn full() -> bool {
    std::env::var("FIELDPOST_POWER").is_ok_and(|value| value == "full")
}

/// From the environment, or drawn; printed, so that a run can be repeated.
fn seed() -> u64 {
    let given = std::env::var("FIELDPOST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| fastrand::u64(0..1_000_000));
    println!("FIELDPOST_SEED={seed}");
    seed
}

fn settings(folder: &Path, faults: Faults) -> Settings {
    Settings { quota: 40 << 10, faults, ..Settings::new(folder.join("outbox.db")) }
}

fn pages(page_bytes: u64) -> Faults {
    Faults { page_bytes: Some(page_bytes), checkpoint_pages: Some(100), ..Faults::default() }
}

/// One recorded life.
struct Life {
    tape: Tape,
    workload: Workload,
    /// What was answered before it.
    born: State,
    faults: Faults,
}

/// How the workload sets about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Right,
    /// Negative control: done bit and row go in two transactions.
    SplitDone,
}

fn live(faults: Faults, seed: u64, steps: usize, way: Way) -> Life {
    let folder = tempfile::tempdir().unwrap();
    live_on(folder.path(), State::default(), faults, seed, steps, way)
}

/// A life that goes on from what the folder holds.
fn live_on(folder: &Path, born: State, faults: Faults, seed: u64, steps: usize, way: Way) -> Life {
    let mut workload = Workload::new(settings(folder, faults), seed, born.clone());
    workload.split_done = way == Way::SplitDone;
    disk::record(folder, None);
    workload.run(steps);
    workload.finish();
    let tape = disk::stop();
    assert_eq!(workload.wrong, [""; 0], "while the power was on");
    Life { tape, workload, born, faults }
}

/// How a life is cut off.
#[derive(Clone, Copy)]
struct Cuts {
    /// Every so many operations.
    stride: usize,
    seed: u64,
    /// Negative control: this was told to the world before its commit.
    early: Option<Kind>,
    /// Negative control: the disk answers every sync and makes none.
    lies: bool,
}

#[derive(Debug, Default)]
struct Figures {
    points: usize,
    starts: usize,
    /// Of them, starts during which the power failed once more.
    twice: usize,
    verdict: Verdict,
}

impl Cuts {
    fn is_honest(self) -> bool {
        self.early.is_none() && !self.lies
    }
}

/// The power fails once more while the store starts.
fn cut_again(settings: &Settings, random: &mut Rng) {
    let folder = settings.path.parent().unwrap();
    disk::record(folder, None);
    let started = Store::open(settings.clone());
    let tape = disk::stop();
    drop(started);
    let mut disk = Disk::new(&tape.before);
    for op in &tape.ops[..random.usize(0..=tape.ops.len())] {
        disk.apply(op);
    }
    let keep = Keep::ALL[random.usize(0..Keep::ALL.len())];
    disk::lay_out(folder, &disk.cut(keep, random));
}

fn cut_off(life: &Life, cuts: Cuts) -> Figures {
    let Life { tape, workload, born, faults } = life;
    let mut random = Rng::with_seed(cuts.seed);
    let mut disk = Disk::new(&tape.before);
    disk.lies = cuts.lies;
    let folder = tempfile::tempdir().unwrap();
    // Nothing is dropped while looking.
    let settings = Settings { quota: 64 << 20, ..settings(folder.path(), *faults) };
    let mut figures = Figures::default();
    let mut answered = 0;
    let mut last_nothing = None;
    let first = random.usize(0..cuts.stride);
    for point in 0..=tape.ops.len() {
        if point > 0 {
            disk.apply(&tape.ops[point - 1]);
        }
        while workload.steps.get(answered).is_some_and(|(end, ..)| *end <= point) {
            answered += 1;
        }
        let told = workload
            .steps
            .get(answered)
            .is_some_and(|(.., kinds)| cuts.early.is_some_and(|early| kinds.contains(&early)));
        if point % cuts.stride != first || (cuts.early.is_some() && !told) {
            continue;
        }
        figures.points += 1;
        let so_far = answered.checked_sub(1).map_or(born, |last| &workload.steps[last].1);
        let mut states = vec![so_far];
        if let Some((_, next, _)) = workload.steps.get(answered) {
            states.push(next);
        }
        if told {
            states.remove(0);
        }
        for keep in Keep::ALL {
            // Nothing is pending, or nothing kept is what shows it best.
            if (disk.is_settled() || told) && keep != Keep::Nothing {
                continue;
            }
            // The same disk, of which the same is expected.
            if keep == Keep::Nothing
                && last_nothing.replace((disk.generation, answered)) == Some((disk.generation, answered))
            {
                continue;
            }
            disk::lay_out(folder.path(), &disk.cut(keep, &mut random));
            figures.starts += 1;
            if cuts.is_honest() && figures.starts % 6 == 0 {
                figures.twice += 1;
                cut_again(&settings, &mut random);
            }
            let mut verdict = examine(&settings, &states);
            for words in &mut verdict.words {
                *words = format!("operation {point}, {keep:?} kept, after step {answered}: {words}");
            }
            figures.verdict.add(verdict);
        }
    }
    figures
}

fn report(name: &str, life: &Life, figures: &Figures, began: Instant) {
    println!(
        "{name}: steps={} operations={} points={} starts={} cut_twice={} {} in {:.1?}",
        life.workload.steps.len(),
        life.tape.ops.len(),
        figures.points,
        figures.starts,
        figures.twice,
        figures.verdict,
        began.elapsed(),
    );
}

fn cut_at_any_operation(page_bytes: u64) {
    let seed = seed();
    let began = Instant::now();
    let steps = if full() { 400 } else { 160 };
    let life = live(pages(page_bytes), seed, steps, Way::Right);
    let stride = if full() { 1 } else { 50 };
    let figures = cut_off(&life, Cuts { stride, seed, early: None, lies: false });
    report(&format!("page={page_bytes}"), &life, &figures, began);
    println!("  {:?}", life.workload.counts);
    assert_eq!(figures.verdict.violations(), 0, "{:#?}", figures.verdict.words);
}

#[test]
fn a_power_cut_at_any_operation_loses_and_doubles_nothing() {
    cut_at_any_operation(1024);
}

#[test]
fn a_power_cut_with_small_pages_loses_and_doubles_nothing() {
    cut_at_any_operation(512);
}

#[test]
fn a_power_cut_with_large_pages_loses_and_doubles_nothing() {
    cut_at_any_operation(4096);
}

/// What of a verdict shows one thing.
type Measure = fn(&Verdict) -> usize;

/// Each of these must be noticed; how often is printed.
#[test]
fn the_simulation_notices_what_breaks_a_promise() {
    // One in whose life everything happens that is told too early below.
    let seed = 6;
    let honest = Cuts { stride: if full() { 3 } else { 60 }, seed, early: None, lies: false };
    let steps = 120;
    let faults = |synchronous| Faults { synchronous, ..pages(1024) };
    let mut unnoticed = Vec::new();
    let mut control = |name: &str, life: &Life, cuts: Cuts| {
        let began = Instant::now();
        let figures = cut_off(life, cuts);
        report(name, life, &figures, began);
        if let Some(words) = figures.verdict.words.first() {
            println!("  {words}");
        } else {
            unnoticed.push(name.to_owned());
        }
        figures.verdict
    };
    let rarely = Cuts { stride: 3 * honest.stride, ..honest };
    let normal =
        control("synchronous=NORMAL", &live(faults(Some("NORMAL")), seed, steps, Way::Right), honest);
    assert!(normal.lost > 0, "NORMAL loses the last commits: {normal}");
    let off = control("synchronous=OFF", &live(faults(Some("OFF")), seed, steps, Way::Right), rarely);
    assert!(off.corrupt > 0, "OFF corrupts: {off}");
    let life = live(faults(None), seed, steps, Way::Right);
    let lies = control("syncs that lie", &life, Cuts { lies: true, ..rarely });
    assert!(lies.corrupt > 0 && lies.lost > 0, "syncs that lie corrupt and lose: {lies}");
    // Told before its commit: what must then be missing or doubled after some power cut.
    let early: [(Kind, Measure); 9] = [
        (Kind::Accepted, |verdict| verdict.lost),
        (Kind::Published, |verdict| verdict.wrong),
        (Kind::Received, |verdict| verdict.doubled),
        (Kind::Done, |verdict| verdict.doubled),
        (Kind::Inbound, |verdict| verdict.wrong),
        (Kind::Released, |verdict| verdict.wrong),
        (Kind::Settled, |verdict| verdict.wrong),
        (Kind::Disowned, |verdict| verdict.wrong),
        (Kind::Told, |verdict| verdict.lost),
    ];
    for (kind, measure) in early {
        let verdict = control(
            &format!("{kind:?} before its commit"),
            &life,
            Cuts { early: Some(kind), stride: 1, ..honest },
        );
        assert!(measure(&verdict) > 0, "{kind:?}: {verdict}");
    }
    let split = live(faults(None), seed, steps, Way::SplitDone);
    let split = control("done bit and row in two transactions", &split, Cuts { stride: 12, ..honest });
    assert!(split.lost > 0, "a message is done and its row is there: {split}");
    assert_eq!(unnoticed, [""; 0], "not noticed");
}

/// What the database of schema 1 in the test data holds.
fn schema_1() -> (Vec<u8>, State) {
    let bytes = include_bytes!("data/store/schema_1.sqlite").to_vec();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("outbox.db"), &bytes).unwrap();
    let messages = oracle::hand_out_all(&settings(folder.path(), Faults::default()));
    let texts: Vec<&[u8]> = messages.values().map(|kept| &kept.payload[..]).collect();
    let expected: [&[u8]; 7] = [b"two 1", b"two 2", b"two 3", b"one 1", b"one 2", b"one 3", b"bulky"];
    assert_eq!(texts[..6], expected[..6]);
    let state = State {
        next: [4, 4, 2],
        waiting: messages,
        owner: ("127.0.0.1:9".to_owned(), "press-shop-1".to_owned()),
        boot: 1,
        ..State::default()
    };
    (bytes, state)
}

#[test]
fn a_power_cut_while_an_older_schema_is_brought_forward_costs_nothing() {
    let seed = seed();
    let (bytes, born) = schema_1();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("outbox.db"), bytes).unwrap();
    let began = Instant::now();
    let life = live_on(folder.path(), born, pages(1024), seed, 10, Way::Right);
    let figures = cut_off(&life, Cuts { stride: if full() { 1 } else { 3 }, seed, early: None, lies: false });
    report("schema 1 to 2", &life, &figures, began);
    assert_eq!(figures.verdict.violations(), 0, "{:#?}", figures.verdict.words);
}

// ---- salvage -------------------------------------------------------------------------------------------

/// A closed database of 120 messages, one of whose pages is gone. The start does not meet it, the check behind
/// the start does.
fn damaged(folder: &Path) {
    let mut store = Store::open(settings(folder, Faults::default())).unwrap();
    for batch in 0..30 {
        let text = |n: u32| {
            let mut random = Rng::with_seed(u64::from(batch * 4 + n));
            let noise: String = (0..180).map(|_| random.alphanumeric()).collect();
            format!("{:03} {noise}", batch * 4 + n)
        };
        oracle::accept(&mut store, (0..4).map(text).collect());
    }
    store.close();
    let path = folder.join("outbox.db");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|window| window == b"060 ").unwrap() / 1024 * 1024;
    bytes[at..at + 1024].fill(0);
    std::fs::write(&path, bytes).unwrap();
}

/// Starts, checks everything as the store's thread does behind the start, and hands out what is there.
fn salvaged(settings: &Settings) -> Result<(BTreeSet<Bytes>, Look), String> {
    let mut store = Store::open(settings.clone()).map_err(|error| error.to_string())?;
    while store.check_next().unwrap_or(false) {}
    let look = store.look(oracle::START).map_err(|error| error.to_string())?;
    drop(store);
    let messages = oracle::hand_out_all(settings);
    let count = messages.len();
    let texts: BTreeSet<Bytes> = messages.into_values().map(|kept| kept.payload).collect();
    if texts.len() == count { Ok((texts, look)) } else { Err("a message is there twice".to_owned()) }
}

/// The damaged database is set aside once, and nothing of the salvage is left.
fn untidy(folder: &Path) -> Option<String> {
    let names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    let aside = names.iter().filter(|name| name.contains(".corrupt-") && !name.ends_with("-wal")).count();
    let left = names.iter().any(|name| name.contains(".salvage"));
    (aside != 1 || left).then(|| format!("the folder holds {names:?}"))
}

#[test]
fn a_power_cut_during_a_salvage_costs_nothing_more() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    damaged(folder.path());
    let settings_here = settings(folder.path(), pages(1024));
    let undisturbed = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("outbox.db"), undisturbed.path().join("outbox.db")).unwrap();
    let (survivors, look) = salvaged(&settings(undisturbed.path(), Faults::default())).unwrap();
    let lost: u64 = look.dropped.iter().map(|(.., count)| count).sum();
    assert!(survivors.len() > 100 && survivors.len() as u64 + lost == 120, "{}", survivors.len());

    disk::record(folder.path(), None);
    let mut store = Store::open(settings_here).unwrap();
    while store.check_next().unwrap_or(false) {}
    oracle::accept(&mut store, vec!["accepted afterwards".to_owned()]);
    let answered = disk::position();
    store.close();
    let tape = disk::stop();

    let began = Instant::now();
    let mut random = Rng::with_seed(seed);
    let mut disk = Disk::new(&tape.before);
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { quota: 64 << 20, ..settings(folder.path(), pages(1024)) };
    let (mut starts, mut words) = (0, Vec::new());
    let stride = if full() { 1 } else { 9 };
    for point in 0..=tape.ops.len() {
        if point > 0 {
            disk.apply(&tape.ops[point - 1]);
        }
        for keep in Keep::ALL {
            if point % stride != 0 || (disk.is_settled() && keep != Keep::Nothing) {
                continue;
            }
            disk::lay_out(folder.path(), &disk.cut(keep, &mut random));
            starts += 1;
            let wrong = match salvaged(&settings) {
                Err(error) => Some(error),
                Ok((texts, _)) if !texts.is_superset(&survivors) => Some(format!(
                    "{} of {} are there",
                    texts.intersection(&survivors).count(),
                    survivors.len()
                )),
                Ok((texts, _)) if point >= answered && !texts.contains(&b"accepted afterwards"[..]) => {
                    Some("what was accepted afterwards is lost".to_owned())
                }
                Ok((_, look)) if look.dropped.iter().map(|(.., count)| count).sum::<u64>() != lost => {
                    Some(format!("counted as dropped: {:?}, should be {lost}", look.dropped))
                }
                Ok(_) => untidy(folder.path()),
            };
            words.extend(wrong.map(|wrong| format!("operation {point}, {keep:?} kept: {wrong}")));
        }
    }
    println!(
        "salvage: operations={} starts={starts} survivors={} violations={} in {:.1?}",
        tape.ops.len(),
        survivors.len(),
        words.len(),
        began.elapsed()
    );
    assert!(words.is_empty(), "{:#?}", &words[..words.len().min(10)]);
}

// ---- a disk that refuses -------------------------------------------------------------------------------

/// Syncs that fail and writes that find no space, each of a life's in turn, once or several times on end; the store
/// recovers, goes on, and later the power fails.
#[test]
fn whatever_the_disk_refuses_costs_nothing_that_was_accepted() {
    let seed = seed();
    let steps = 60;
    let quiet = live(pages(1024), seed, steps, Way::Right);
    let syncs = quiet.tape.ops.iter().filter(|op| matches!(op, Op::Sync { .. })).count();
    let writes = quiet.tape.ops.iter().filter(|op| matches!(op, Op::Write { .. })).count();
    let plans = [
        ("EIO at sync", Refusal::Sync, syncs, 1),
        ("EIO at 3 syncs on end", Refusal::Sync, syncs, 3),
        ("EIO at 30 syncs on end", Refusal::Sync, syncs, 30),
        ("ENOSPC at write", Refusal::Write, writes, 1),
        ("ENOSPC at 50 writes on end", Refusal::Write, writes, 50),
    ];
    let mut words = Vec::new();
    for (name, refusal, places, times) in plans {
        let began = Instant::now();
        let stride = if full() { 1 } else { places.div_ceil(8) };
        let (mut lives, mut refused, mut failed, mut done_all_the_same, mut starts) = (0, 0, 0, 0, 0);
        let mut all = Verdict::default();
        for place in (1 + seed as usize % stride..=places).step_by(stride) {
            let folder = tempfile::tempdir().unwrap();
            let mut workload = Workload::new(settings(folder.path(), pages(1024)), seed, State::default());
            disk::record(folder.path(), Some((refusal, place, times)));
            workload.run(steps);
            let tape = disk::stop();
            lives += 1;
            refused += tape.refused;
            failed += workload.failed_commits;
            done_all_the_same += workload.failed_but_done;
            words.extend(workload.wrong.iter().map(|wrong| format!("{name} {place}: {wrong}")));
            // The power fails at the end of a commit, whose answer says what is there.
            let mut disk = Disk::new(&tape.before);
            let mut random = Rng::with_seed(seed);
            let folder = tempfile::tempdir().unwrap();
            let settings = Settings { quota: 64 << 20, ..settings(folder.path(), pages(1024)) };
            let refused_at = tape.refused_at.unwrap_or(usize::MAX);
            let ends = workload.steps.iter().filter(|(end, _, kinds)| *end > refused_at && !kinds.is_empty());
            let mut applied = 0;
            for (number, (end, state, _)) in ends.enumerate() {
                for op in &tape.ops[applied..*end] {
                    disk.apply(op);
                }
                applied = *end;
                if number > 2 && number % 12 != 0 {
                    continue;
                }
                for keep in [Keep::Nothing, Keep::Torn] {
                    disk::lay_out(folder.path(), &disk.cut(keep, &mut random));
                    starts += 1;
                    let mut verdict = examine(&settings, &[state]);
                    for words in &mut verdict.words {
                        *words = format!("{name} {place}, cut at operation {end}, {keep:?} kept: {words}");
                    }
                    all.add(verdict);
                }
            }
        }
        println!(
            "{name}: places={places} lives={lives} refused={refused} failed_commits={failed} done_all_the_same={done_all_the_same} starts={starts} {all} in {:.1?}",
            began.elapsed()
        );
        words.extend(all.words);
    }
    assert!(words.is_empty(), "{:#?}", &words[..words.len().min(20)]);
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
