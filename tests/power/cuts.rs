//! A recorded life, the power failing at its operations, and what came of it in figures.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use fieldpost::store::{Faults, Settings, Store};

use crate::disk::{self, Disk, Keep, Tape};
use crate::oracle::{Verdict, examine, flags};
use crate::state::State;
use crate::workload::{Kind, Way, Workload};

/// How much of it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// A part, another one for each seed, on one core.
    Part,
    /// Everything, on every core.
    Whole,
}

impl Extent {
    pub fn pick<T>(self, part: T, whole: T) -> T {
        if self == Extent::Part { part } else { whole }
    }

    pub fn workers(self) -> usize {
        self.pick(1, thread::available_parallelism().map_or(1, usize::from))
    }
}

pub fn settings(folder: &Path, faults: Faults) -> Settings {
    Settings { quota: 40 << 10, faults, ..Settings::new(folder.join("outbox.db")) }
}

/// The same for looking: nothing is dropped meanwhile.
pub fn roomy(folder: &Path, faults: Faults) -> Settings {
    Settings { quota: 64 << 20, ..settings(folder, faults) }
}

pub fn pages(page_bytes: u64) -> Faults {
    Faults { page_bytes: Some(page_bytes), checkpoint_pages: Some(100), ..Faults::default() }
}

/// One recorded life.
pub struct Life {
    pub tape: Tape,
    /// After each step: how far the tape had come, what had been answered, and what the step was.
    pub steps: Vec<(usize, State, BTreeSet<Kind>)>,
    pub counts: BTreeMap<&'static str, usize>,
    /// What was answered before it.
    born: State,
    faults: Faults,
}

pub fn live(faults: Faults, seed: u64, steps: usize, way: Way) -> Life {
    let folder = tempfile::tempdir().expect("a folder can be made");
    live_on(folder.path(), State::default(), faults, seed, steps, way)
}

/// A life that goes on from what the folder holds.
pub fn live_on(folder: &Path, born: State, faults: Faults, seed: u64, steps: usize, way: Way) -> Life {
    let mut workload = Workload::new(settings(folder, faults), seed, born.clone(), way);
    disk::record(folder, None);
    workload.run(steps);
    workload.finish();
    let tape = disk::stop();
    assert_eq!(workload.wrong, [""; 0], "while the power was on, with FIELDPOST_SEED={seed}");
    Life { tape, steps: workload.steps, counts: workload.counts, born, faults }
}

/// How a life is cut off.
#[derive(Clone, Copy)]
pub struct Cuts {
    /// Every so many operations.
    pub stride: usize,
    pub seed: u64,
    pub workers: usize,
    /// Only during steps of this kind.
    pub during: Option<Kind>,
    /// Negative control: this was told to the world before its commit.
    pub early: Option<Kind>,
    /// Negative control: the disk answers every sync and makes none.
    pub lies: bool,
}

impl Cuts {
    pub fn every(stride: usize, seed: u64, workers: usize) -> Cuts {
        Cuts { stride, seed, workers, during: None, early: None, lies: false }
    }

    fn is_honest(self) -> bool {
        self.early.is_none() && !self.lies
    }
}

#[derive(Debug, Default)]
pub struct Figures {
    /// Operations after which the power failed, times the ways in which something survives.
    pub points: usize,
    /// Of them, starts from a disk unlike the one before.
    pub starts: usize,
    /// Of them, starts during which the power failed once more.
    pub twice: usize,
    /// Of them, starts at which a promise was broken.
    pub broken: usize,
    pub verdict: Verdict,
    last_nothing: Option<(usize, usize)>,
}

impl Figures {
    pub fn add(&mut self, other: Figures) {
        self.points += other.points;
        self.starts += other.starts;
        self.twice += other.twice;
        self.broken += other.broken;
        self.verdict.add(other.verdict);
    }

    pub fn judged(&mut self, mut verdict: Verdict, place: &str) {
        for words in &mut verdict.words {
            *words = format!("{place}: {words}");
        }
        self.broken += usize::from(verdict.violations() > 0);
        self.verdict.add(verdict);
    }
}

/// Lets each worker go through the tape and visit its share of the points, with the disk as it is there.
pub fn walk(
    tape: &Tape,
    workers: usize,
    lies: bool,
    visit: impl Fn(&mut Figures, usize, &Disk, &Path) + Sync,
) -> Figures {
    // In blocks, because neighbours have much in common.
    const BLOCK: usize = 64;
    let share = |worker: usize| {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let mut figures = Figures::default();
        let mut disk = Disk::new(&tape.before);
        disk.lies = lies;
        for point in 0..=tape.ops.len() {
            if point > 0 {
                disk.apply(&tape.ops[point - 1]);
            }
            if point / BLOCK % workers == worker {
                visit(&mut figures, point, &disk, folder.path());
            }
        }
        figures
    };
    share_out(workers, share)
}

/// The sum of what the workers bring.
pub fn share_out(workers: usize, share: impl Fn(usize) -> Figures + Sync) -> Figures {
    let mut all = Figures::default();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|worker| {
                scope.spawn({
                    let share = &share;
                    move || share(worker)
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(figures) => all.add(figures),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    all
}

/// What chance decides at one point; the same whoever visits it.
pub fn chance(seed: u64, point: usize) -> Rng {
    Rng::with_seed(seed ^ (point as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The power fails once more while the store starts.
pub fn cut_again(settings: &Settings, random: &mut Rng) {
    let folder = settings.path.parent().expect("it is in a folder");
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

pub fn cut_off(life: &Life, cuts: Cuts) -> Figures {
    walk(&life.tape, cuts.workers, cuts.lies, |figures, point, disk, folder| {
        if (point as u64 + cuts.seed).is_multiple_of(cuts.stride as u64) {
            cut_at(life, cuts, figures, point, disk, folder);
        }
    })
}

fn cut_at(life: &Life, cuts: Cuts, figures: &mut Figures, point: usize, disk: &Disk, folder: &Path) {
    let Life { steps, born, faults, .. } = life;
    let answered = steps.partition_point(|(end, ..)| *end <= point);
    let so_far = answered.checked_sub(1).map_or(born, |last| &steps[last].1);
    let next = steps.get(answered);
    let told = next.is_some_and(|(.., kinds)| cuts.early.is_some_and(|early| kinds.contains(&early)));
    let aside = cuts.during.is_some_and(|kind| !next.is_some_and(|(.., kinds)| kinds.contains(&kind)));
    if aside || (cuts.early.is_some() && !told) {
        return;
    }
    let mut states: Vec<&State> = [so_far].into_iter().chain(next.map(|(_, state, _)| state)).collect();
    if told {
        states.remove(0);
    }
    let is_connecting = |step: Option<&(usize, State, BTreeSet<Kind>)>| {
        step.is_some_and(|(.., kinds)| kinds.contains(&Kind::Connecting))
    };
    let connecting = is_connecting(next) || is_connecting(answered.checked_sub(1).map(|last| &steps[last]));
    let settings = roomy(folder, *faults);
    let mut random = chance(cuts.seed, point);
    for keep in Keep::ALL {
        // Nothing kept is what shows it best.
        if told && keep != Keep::Nothing {
            continue;
        }
        figures.points += 1;
        // Nothing is pending, or it is the same disk, of which the same is expected.
        let same = (disk.generation, answered);
        if (disk.is_settled() && keep != Keep::Nothing)
            || (keep == Keep::Nothing && figures.last_nothing.replace(same) == Some(same))
        {
            continue;
        }
        let image = disk.cut(keep, &mut random);
        let flags = connecting.then(|| flags(&image));
        disk::lay_out(folder, &image);
        figures.starts += 1;
        if cuts.is_honest() && random.usize(0..6) == 0 {
            figures.twice += 1;
            cut_again(&settings, &mut random);
        }
        let verdict = examine(&settings, &states, flags);
        figures.judged(verdict, &format!("operation {point}, {keep:?} kept, after step {answered}"));
    }
}

// ---- the report ----------------------------------------------------------------------------------------

/// What became of one series of cuts.
pub struct Line {
    pub name: String,
    pub page_bytes: u64,
    pub steps: usize,
    pub operations: usize,
    pub figures: Figures,
    took: Duration,
}

impl Line {
    pub fn new(
        name: &str,
        page_bytes: u64,
        began: Instant,
        (steps, operations): (usize, usize),
        figures: Figures,
    ) -> Line {
        let line =
            Line { name: name.to_owned(), page_bytes, steps, operations, figures, took: began.elapsed() };
        println!("{}", line.show());
        line
    }

    fn show(&self) -> String {
        let Line { name, page_bytes, steps, operations, figures, took } = self;
        let Figures { points, starts, twice, broken, verdict, .. } = figures;
        let Verdict { lost, doubled, corrupt, wrong, .. } = verdict;
        format!(
            "| {name:<40} | {page_bytes:>4} | {steps:>5} | {operations:>10} | {points:>8} | {starts:>7} | {twice:>6} | {broken:>6} \
             | {lost:>6} | {doubled:>7} | {corrupt:>7} | {wrong:>6} | {:>7.1} |",
            took.as_secs_f64()
        )
    }

    pub fn is_clean(&self) -> bool {
        self.figures.starts > 0 && self.figures.broken == 0
    }
}

/// A table as Markdown has it.
pub fn print_table(title: &str, lines: &[Line]) {
    let head = "| page | steps | operations |   points |  starts |  twice | broken |   lost | doubled | corrupt |  wrong | seconds |";
    println!("\n| {title:<40} {head}");
    let dashes: Vec<String> = head.split('|').skip(1).map(|column| "-".repeat(column.len())).collect();
    println!(
        "|{}|{}",
        "-".repeat(42),
        dashes.join("|").trim_end_matches('-').trim_end_matches('|').to_owned() + "|"
    );
    for line in lines {
        println!("{}", line.show());
    }
}
