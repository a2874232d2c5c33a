//! The line under test as a running task, and pymodbus as its server.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use fieldpost::clock;
use fieldpost::command::{Outcome, Ticket, Write, Written};
use fieldpost::point::{Fault, PointIndex, Reading, Sample, Value};
use fieldpost::progress::Pulse;
use fieldpost::source::modbus::register::{Encoding, Kind, Order};
use fieldpost::source::modbus::{
    self, LateReplies, Line, LinePoint, LineStatus, Parity, SerialPort, Space, Transport, Unit, Writable,
};
use fieldpost::stats::Stats;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

/// How long anything may take before it counts as never.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A line that is being polled.
pub struct Running {
    pub readings: mpsc::Receiver<Reading>,
    pub writes: mpsc::Sender<Write>,
    pub written: mpsc::Receiver<Written>,
    pub status: watch::Receiver<LineStatus>,
    pub stats: Arc<Stats>,
    pub stop: watch::Sender<bool>,
    pub task: JoinHandle<()>,
}

impl Running {
    pub fn new(line: Line) -> Self {
        Running::with_room_for(1_000, line)
    }

    pub fn with_room_for(readings_held: usize, line: Line) -> Self {
        let (readings_to, readings) = mpsc::channel(readings_held);
        let (status_to, status) = watch::channel(LineStatus::of(&line));
        let (stop, stopped) = watch::channel(false);
        let stats = Arc::new(Stats::default());
        let (writes, to_write) = mpsc::channel(16);
        let (outcomes, written) = mpsc::channel(16);
        let counters = Arc::clone(&stats);
        let run = modbus::run(line, readings_to, to_write, outcomes, status_to, counters, stopped);
        let task = tokio::spawn(run);
        Running { readings, writes, written, status, stats, stop, task }
    }

    /// Writes to this point and waits for what became of it.
    pub async fn write(&mut self, point: usize, value: Value) -> Outcome {
        self.ask_to_write(1, point, value).await;
        let written = timeout(PATIENCE, self.written.recv()).await.unwrap().unwrap();
        assert_eq!(written.ticket, Ticket(1));
        assert!(written.at <= clock::now());
        written.outcome
    }

    pub async fn ask_to_write(&self, ticket: u64, point: usize, value: Value) {
        let point = PointIndex(point);
        let write = Write { ticket: Ticket(ticket), point, value, not_after_mono_ms: None };
        self.writes.send(write).await.unwrap();
    }

    /// The next sample of this point that is as wished; all samples on the way go to `seen`.
    pub async fn sample_that(
        &mut self,
        what: &str,
        mut wished: impl FnMut(&Sample) -> bool,
        mut seen: impl FnMut(&Sample),
    ) -> Sample {
        let deadline = Instant::now() + PATIENCE;
        let mut last = None;
        loop {
            let Ok(Some(reading)) = timeout_at(deadline, self.readings.recv()).await else {
                panic!("no sample that {what}; last {last:?}; {:?}", self.status.borrow());
            };
            for sample in reading.samples {
                seen(&sample);
                if wished(&sample) {
                    return sample;
                }
                last = Some(sample);
            }
        }
    }

    /// Waits for a good sample of this point.
    pub async fn good(&mut self, point: usize) -> Value {
        let wished = |s: &Sample| s.point == PointIndex(point) && s.value.is_ok();
        self.sample_that(&format!("is good, of point {point}"), wished, |_| ()).await.value.unwrap()
    }

    /// Waits for a bad sample of this point for which `wished` holds.
    pub async fn bad(&mut self, point: usize, wished: impl Fn(&Fault) -> bool) -> Fault {
        let bad = |s: &Sample| s.point == PointIndex(point) && s.value.as_ref().is_err_and(&wished);
        self.sample_that(&format!("is bad as expected, of point {point}"), bad, |_| ())
            .await
            .value
            .unwrap_err()
    }

    /// Every sample of the readings that come within `duration`.
    pub async fn samples_during(&mut self, duration: Duration) -> Vec<Sample> {
        let deadline = Instant::now() + duration;
        let mut samples = Vec::new();
        while let Ok(Some(reading)) = timeout_at(deadline, self.readings.recv()).await {
            samples.extend(reading.samples);
        }
        samples
    }

    pub async fn status_that(&mut self, what: &str, wished: impl FnMut(&LineStatus) -> bool) -> LineStatus {
        let waited = timeout(PATIENCE, self.status.wait_for(wished)).await;
        match waited {
            Ok(Ok(status)) => status.clone(),
            Ok(Err(_)) | Err(_) => panic!("the status never was that {what}"),
        }
    }
}

pub fn tcp(port: u16) -> Transport {
    Transport::Tcp { host: "127.0.0.1".to_owned(), port }
}

pub fn rtu(device: &Path) -> Transport {
    let device = device.to_owned();
    Transport::Rtu(SerialPort { device, baud_rate: 19_200, parity: Parity::None, stop_bits: 1 })
}

pub fn line(transport: Transport, timeout_ms: u64, units: Vec<Unit>) -> Line {
    Line {
        name: "line1".into(),
        transport,
        timeout: Duration::from_millis(timeout_ms),
        late_replies: LateReplies::Discard,
        pulse: Pulse::default(),
        units,
    }
}

pub fn unit(unit: u8, points: Vec<LinePoint>) -> Unit {
    Unit { name: format!("unit{unit}").into(), unit, points }
}

/// A point, read every 100 ms.
pub fn point(index: usize, space: Space, address: u16, kind: Kind, order: Order) -> LinePoint {
    LinePoint {
        index: PointIndex(index),
        name: format!("point{index}").into(),
        space,
        address,
        encoding: Encoding { kind, order, scale: None },
        every: Duration::from_millis(100),
        writable: match space {
            Space::Coil => Some(Writable::Coil),
            Space::Holding => Some(Writable::Range { min: -1e9, max: 1e9 }),
            Space::DiscreteInput | Space::Input => None,
        },
    }
}

/// An unsigned holding register.
pub fn holding(index: usize, address: u16) -> LinePoint {
    point(index, Space::Holding, address, Kind::U16, Order::Abcd)
}

/// pymodbus with the content of `server.py`; killed when dropped.
pub struct Server {
    pub port: u16,
    child: Child,
}

impl Server {
    /// On TCP; port 0 is any free one.
    pub async fn tcp(port: u16) -> Self {
        Server::start("tcp", &port.to_string()).await
    }

    pub async fn rtu(device: &Path) -> Self {
        Server::start("rtu", device.to_str().unwrap()).await
    }

    async fn start(kind: &str, place: &str) -> Self {
        let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let python = std::env::var_os("FIELDPOST_TEST_PYTHON")
            .map_or_else(|| tests.join(".venv/bin/python"), PathBuf::from);
        assert!(
            python.exists(),
            "{} is missing: run tests/run, which makes the Python environment these tests need, or set \
             FIELDPOST_TEST_PYTHON to a Python with tests/requirements.txt installed",
            python.display()
        );
        let mut child = Command::new(&python)
            .arg(tests.join("support_modbus/server.py"))
            .args([kind, place])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let heard = timeout(PATIENCE, output.read_line(&mut said)).await;
        let port = said.strip_prefix("ready ").and_then(|port| port.trim().parse().ok());
        let Some(port) = port else {
            panic!(
                "pymodbus did not start ({heard:?}, {said:?}): run tests/run, which installs what it needs"
            );
        };
        Server { port, child }
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}
