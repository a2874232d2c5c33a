//! The machine the agent runs on, as a source like the others: temperature, supply, load, memory, disk, wear, clock.
//!
//! Files below `/proc` and `/sys` are read, which is quick; the file system of the database may hang, and is asked on a
//! thread of its own. Invariant (P7, P9): nothing here waits for a disk, and what cannot be told is bad, with the
//! reason, or left out where the machine does not have it.

pub mod sensor;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until, timeout};
use tracing::{info, warn};

use super::modbus::{LineStatus, UnitStatus};
use crate::clock::{self, Stamp};
use crate::point::{Fault, PointIndex, Reading, Sample, Value};
use crate::stats::Stats;
pub use sensor::Sensor;
use sensor::{Content, Found};

/// The line of its points, which no other line may be named.
pub const LINE: &str = "gateway";
/// The unit of its points.
pub const UNIT: &str = "machine";
/// How long the file system may take to answer.
const DISK_PATIENCE: Duration = Duration::from_secs(1);
/// More than any of the files has.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What is read of the machine, and how often.
#[derive(Debug, Clone)]
pub struct Machine {
    /// The points.
    pub points: Vec<MachinePoint>,
    /// The database, whose disk is meant.
    pub store: PathBuf,
    /// When the agent started.
    pub started: Stamp,
    /// Where `proc` and `sys` are: `/`, but for tests.
    pub root: PathBuf,
}

/// One point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachinePoint {
    /// What its samples carry.
    pub index: PointIndex,
    /// What is read.
    pub sensor: Sensor,
    /// How often; at least 1 ms.
    pub every: Duration,
}

/// The status before the task has begun.
pub fn status() -> LineStatus {
    let unit = UnitStatus { name: UNIT.to_owned(), ..UnitStatus::default() };
    LineStatus { name: LINE.to_owned(), up: true, error: None, units: vec![unit] }
}

/// What each sensor said last, in the order of [`Sensor::ALL`].
pub type Values = BTreeMap<Sensor, Result<Value, Fault>>;

/// Reads what is due until `stop` holds `true` or its sender is gone.
///
/// One [`Reading`] is sent for each interval that is due. When the channel is full the reading is counted in
/// [`Stats::readings_overrun`] and dropped.
pub async fn run(
    machine: Machine,
    readings: mpsc::Sender<Reading>,
    status: watch::Sender<LineStatus>,
    values: watch::Sender<Values>,
    stats: Arc<Stats>,
    mut stop: watch::Receiver<bool>,
) {
    let mut task = Task::new(machine, readings, status, values, stats);
    tokio::select! {
        () = task.work() => {}
        _ = stop.wait_for(|stop| *stop) => {}
    }
}

struct Task {
    root: PathBuf,
    started: Stamp,
    groups: Vec<Group>,
    disk: Disk,
    /// The directory of the disk below `/sys`, once its number is known.
    block: Option<PathBuf>,
    /// Bits of throttling that were set at any look.
    seen: u32,
    /// Sensors that have told something.
    present: BTreeSet<Sensor>,
    readings: mpsc::Sender<Reading>,
    status: watch::Sender<LineStatus>,
    values: watch::Sender<Values>,
    stats: Arc<Stats>,
}

/// Points that share an interval.
struct Group {
    due: Instant,
    every: Duration,
    points: Vec<MachinePoint>,
}

impl Task {
    fn new(
        machine: Machine,
        readings: mpsc::Sender<Reading>,
        status: watch::Sender<LineStatus>,
        values: watch::Sender<Values>,
        stats: Arc<Stats>,
    ) -> Self {
        let mut groups: BTreeMap<Duration, Vec<MachinePoint>> = BTreeMap::new();
        for point in machine.points {
            groups.entry(point.every).or_default().push(point);
        }
        let due = Instant::now();
        let groups = groups.into_iter().map(|(every, points)| Group { due, every, points });
        Task {
            root: machine.root,
            started: machine.started,
            groups: groups.collect(),
            disk: Disk::new(move || look_at_disk(&machine.store)),
            block: None,
            seen: 0,
            present: BTreeSet::new(),
            readings,
            status,
            values,
            stats,
        }
    }

    async fn work(&mut self) {
        let mut first = true;
        loop {
            let Some(next) = (0..self.groups.len()).min_by_key(|at| self.groups[*at].due) else {
                return std::future::pending().await; // no points: nothing to do, and no end either
            };
            sleep_until(self.groups[next].due).await;
            let points = self.groups[next].points.clone();
            self.read(&points).await;
            let group = &mut self.groups[next];
            // Times that passed meanwhile are not made up for.
            group.due = (group.due + group.every).max(Instant::now());
            if std::mem::take(&mut first) {
                self.say_what_is_missing();
            }
        }
    }

    async fn read(&mut self, points: &[MachinePoint]) {
        let free = match self.disk.ask().await {
            Ok(answer) => {
                if self.block.is_none() {
                    self.block = block(&self.root, answer.device);
                }
                answer.free
            }
            Err(fault) => Err(fault),
        };
        let found = self.look(free);
        if let Ok(throttling) = found.throttling() {
            self.seen |= throttling.now;
        }
        let at = clock::now();
        let mut samples = Vec::with_capacity(points.len());
        for point in points {
            let value = match found.value(point.sensor, self.seen) {
                Some(value) => value,
                None if self.present.contains(&point.sensor) => {
                    Err(Fault::Unreadable { what: "its file was there and is gone".to_owned() })
                }
                None => continue,
            };
            self.present.insert(point.sensor);
            samples.push((point.sensor, Sample { point: point.index, at, value }));
        }
        self.hand_on(samples);
    }

    fn look(&self, free: Result<u64, Fault>) -> Found {
        let file = |name: &str| content(&self.root.join(name));
        let block = |name: &str| self.block.as_ref().map_or(Ok(None), |block| content(&block.join(name)));
        let now = clock::now();
        Found {
            temperature: thermal_zone(&self.root).map_or(Ok(None), |zone| content(&zone.join("temp"))),
            // A newer kernel says once in its log that this file is old; it is the only one that tells of throttling.
            throttled: file("sys/devices/platform/soc/soc:firmware/get_throttled"),
            low_voltage: rpi_volt(&self.root).map_or(Ok(None), |volt| content(&volt.join("in0_lcrit_alarm"))),
            load: file("proc/loadavg"),
            memory: file("proc/meminfo"),
            uptime: file("proc/uptime"),
            io: file("proc/self/io"),
            disk: block("stat"),
            life: block("device/life_time"),
            free: Some(free),
            clock_is_right: now.wall_is_right(),
            agent_uptime_s: now.ms_since(self.started) / 1000,
        }
    }

    fn hand_on(&mut self, samples: Vec<(Sensor, Sample)>) {
        let bad = samples.iter().filter(|(_, sample)| sample.value.is_err()).count();
        self.stats.samples_read.add(samples.len() as u64);
        self.stats.samples_bad.add(bad as u64);
        let error = samples.iter().find_map(|(sensor, sample)| {
            Some(format!("{}: {}", sensor.name(), sample.value.as_ref().err()?))
        });
        let last_ok = samples.iter().find(|(_, sample)| sample.value.is_ok()).map(|(_, sample)| sample.at);
        self.status.send_modify(|status| {
            let Some(unit) = status.units.first_mut() else { return };
            match &error {
                Some(error) if unit.ok || unit.polls == 0 => warn!(line = LINE, unit = UNIT, "{error}"),
                None if !unit.ok && unit.polls > 0 => info!(line = LINE, unit = UNIT, "well again"),
                _ => {}
            }
            unit.ok = error.is_none();
            unit.polls += 1;
            unit.errors += u64::from(error.is_some());
            unit.last_ok = last_ok.or(unit.last_ok);
            unit.last_error = error.or(unit.last_error.take());
        });
        if samples.is_empty() {
            return;
        }
        self.values.send_modify(|values| {
            values.extend(samples.iter().map(|(sensor, sample)| (*sensor, sample.value.clone())));
        });
        let reading = Reading { samples: samples.into_iter().map(|(_, sample)| sample).collect() };
        match self.readings.try_send(reading) {
            Ok(()) | Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(_)) => self.stats.readings_overrun.increment(),
        }
    }

    fn say_what_is_missing(&self) {
        let asked = self.groups.iter().flat_map(|group| &group.points).map(|point| point.sensor);
        let missing: Vec<&str> =
            asked.filter(|sensor| !self.present.contains(sensor)).map(Sensor::name).collect();
        if !missing.is_empty() {
            info!("this machine does not tell of {}: left out", missing.join(", "));
        }
    }
}

/// What a file holds.
fn content(path: &Path) -> Content {
    let mut text = String::new();
    let read = fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text));
    match read {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

/// The zone of the processor, or else the first.
fn thermal_zone(root: &Path) -> Option<PathBuf> {
    let zones = beginning_with(&root.join("sys/class/thermal"), "thermal_zone");
    let of_cpu = |zone: &&PathBuf| {
        let kind = fs::read_to_string(zone.join("type")).unwrap_or_default();
        ["cpu", "soc", "x86_pkg_temp"].iter().any(|word| kind.contains(word))
    };
    zones.iter().find(of_cpu).or(zones.first()).cloned()
}

fn rpi_volt(root: &Path) -> Option<PathBuf> {
    let chips = beginning_with(&root.join("sys/class/hwmon"), "hwmon");
    chips
        .into_iter()
        .find(|chip| fs::read_to_string(chip.join("name")).is_ok_and(|name| name.trim() == "rpi_volt"))
}

/// What is in a directory and begins so, in order.
fn beginning_with(directory: &Path, beginning: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let begins =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(beginning));
    let mut paths: Vec<PathBuf> = paths.filter(begins).collect();
    paths.sort();
    paths
}

/// Where the kernel tells of this disk; of the whole of it, where the number is a partition's.
fn block(root: &Path, device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let block = fs::canonicalize(root.join(format!("sys/dev/block/{major}:{minor}"))).ok()?;
    match block.join("partition").exists() {
        true => block.parent().map(Path::to_owned),
        false => Some(block),
    }
}

/// The file system of the database, asked on a thread that may hang.
struct Disk {
    /// `None` where the system gave no thread.
    questions: Option<SyncSender<()>>,
    answers: mpsc::Receiver<DiskAnswer>,
    /// The last question has no answer yet.
    waiting: bool,
}

struct DiskAnswer {
    /// The number of its device.
    device: u64,
    free: Result<u64, Fault>,
}

impl Disk {
    fn new(look: impl Fn() -> DiskAnswer + Send + 'static) -> Self {
        let (questions, asked) = sync_channel(1);
        let (answers, heard) = mpsc::channel(1);
        // It ends once nobody asks.
        let thread = std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || while asked.recv().is_ok() && answers.blocking_send(look()).is_ok() {});
        Disk { questions: thread.is_ok().then_some(questions), answers: heard, waiting: false }
    }

    /// What it says now; an answer to an earlier question is no answer to this one.
    async fn ask(&mut self) -> Result<DiskAnswer, Fault> {
        let silent = Fault::Timeout { waited_ms: DISK_PATIENCE.as_millis() as u64 };
        if self.waiting && self.answers.try_recv().is_ok() {
            self.waiting = false;
        }
        let asked = !self.waiting && self.questions.as_ref().is_some_and(|ask| ask.try_send(()).is_ok());
        if !asked {
            return Err(silent);
        }
        self.waiting = true;
        match timeout(DISK_PATIENCE, self.answers.recv()).await {
            Ok(Some(answer)) => {
                self.waiting = false;
                Ok(answer)
            }
            Ok(None) | Err(_) => Err(silent),
        }
    }
}

fn look_at_disk(path: &Path) -> DiskAnswer {
    let unreadable = |error: io::Error| Fault::Unreadable { what: format!("{}: {error}", path.display()) };
    let device = fs::metadata(path).map_or(0, |metadata| metadata.dev());
    let free = rustix::fs::statvfs(path).map(|found| found.f_bavail.saturating_mul(found.f_frsize));
    DiskAnswer { device, free: free.map_err(|errno| unreadable(errno.into())) }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn machine(root: &Path, points: &[Sensor]) -> Machine {
        let point = |(index, sensor): (usize, &Sensor)| MachinePoint {
            index: PointIndex(index),
            sensor: *sensor,
            every: Duration::from_secs(60),
        };
        let (started, root) = (clock::now(), root.to_owned());
        Machine { points: points.iter().enumerate().map(point).collect(), store: root.clone(), started, root }
    }

    #[tokio::test]
    async fn a_disk_that_hangs_costs_its_own_point_and_no_other() {
        let root = tempfile::tempdir().expect("a directory");
        fs::create_dir(root.path().join("proc")).expect("ours");
        fs::write(root.path().join("proc/loadavg"), "0.5 0.5 0.5 1/1 1").expect("ours");
        let machine = machine(root.path(), &[Sensor::Load, Sensor::DiskFree]);
        let points = machine.points.clone();
        let (readings, mut read) = tokio::sync::mpsc::channel(8);
        let ((status, _), (values, _)) = (watch::channel(status()), watch::channel(Values::new()));
        let mut task = Task::new(machine, readings, status, values, Arc::default());
        let (go_on, held) = mpsc::sync_channel::<()>(0);
        task.disk = Disk::new(move || {
            let _ended = held.recv();
            DiskAnswer { device: 0, free: Ok(7 << 20) }
        });
        let silent = Err(Fault::Timeout { waited_ms: 1000 });
        for _ in 0..2 {
            task.read(&points).await;
            let values: Vec<_> =
                read.try_recv().expect("a reading").samples.into_iter().map(|s| s.value).collect();
            assert_eq!(values, [Ok(Value::Float(0.5)), silent.clone()]);
        }
        // It goes on: the first answer is to an old question, and the next one counts.
        go_on.send(()).expect("it waits");
        drop(go_on);
        let answers = async {
            loop {
                task.read(&points).await;
                let value = read.try_recv().expect("a reading").samples.remove(1).value;
                if value != silent {
                    return value;
                }
                tokio::task::yield_now().await;
            }
        };
        let answer = timeout(Duration::from_secs(30), answers).await;
        assert_eq!(answer.expect("the disk goes on"), Ok(Value::Integer(7)));
    }

    #[test]
    fn the_processors_zone_is_taken_before_the_others() {
        let root = tempfile::tempdir().expect("a directory");
        let zone = |name: &str, kind: &str| {
            let zone = root.path().join("sys/class/thermal").join(name);
            fs::create_dir_all(&zone).expect("ours");
            fs::write(zone.join("type"), kind).expect("ours");
        };
        assert_eq!(thermal_zone(root.path()), None);
        zone("thermal_zone0", "acpitz\n");
        zone("cooling_device0", "cpu\n");
        let chosen = |root: &Path| thermal_zone(root).and_then(|zone| Some(zone.file_name()?.to_owned()));
        assert_eq!(chosen(root.path()), Some("thermal_zone0".into()));
        zone("thermal_zone1", "cpu-thermal\n");
        assert_eq!(chosen(root.path()), Some("thermal_zone1".into()));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_no_missing_file() {
        let root = tempfile::tempdir().expect("a directory");
        assert_eq!(content(&root.path().join("none")), Ok(None));
        let error = content(root.path()).expect_err("a directory is no file");
        assert!(error.contains("directory"), "{error}");
    }
}
