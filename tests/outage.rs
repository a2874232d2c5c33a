//! A day of outage in the log: the whole agent, on simulated time.
//!
//! Every task of the agent runs as it is: lines, pipeline, store, uplink, reporter, real sockets, a real database, in the
//! end a real mosquitto. tokio's clock is paused and moved by hand, a step at a time, and after each step there is some
//! real time for the store's thread, the kernel and the peers. What reads the clocks by itself does not see the day go
//! by: the times in payloads, expiry, and how long a connection has lasted, so that every connection of that day counts
//! as a short one.
//!
//! What is counted is what the agent hands to the log, at every level: what repeats and is kept quiet is a debug line, so
//! one run shows both, the log with the policy and the log without.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::fmt::{self, Write as _};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use fieldpost::agent::{self, Faults};
use fieldpost::config;
use fieldpost::trouble;
use support::agent::Config;
use support::mosquitto::{Mosquitto, Options};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// How far the clock moves at once while nobody answers, and when answers are waited for.
const STEP: Duration = Duration::from_secs(20);
const SMALL_STEP: Duration = Duration::from_millis(100);
/// Real time after each step.
const REAL: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// How many of the small steps the way back to normal may take.
const PATIENCE_STEPS: usize = 60_000;
const NO_ANSWER: &str = "no answer within";
/// meter1 answers again: its fields and the message, as they are written here.
const WELL: &str = "line \"line1\" unit \"meter1\"";
/// What is said again and again in such a day, or kept quiet.
const REPEATING: [&str; 6] = [
    "no connection to the broker",
    "the connection to the broker ended",
    "connected to the broker",
    NO_ANSWER,
    "dropped",
    "not accepted by the database",
];
/// The promise.
const LINES_MAX: usize = 200;

/// Everything that was handed to the log since it was last taken.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<(Level, String)>>>);

#[derive(Default)]
struct Words(String);

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let name = if field.name() == "message" { "" } else { field.name() };
        let _ = write!(self.0, "{name} {value:?} ");
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("fieldpost")
    }
    fn event(&self, event: &Event<'_>) {
        let mut words = Words::default();
        event.record(&mut words);
        self.0.lock().unwrap().push((*event.metadata().level(), words.0));
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl Lines {
    fn take(&self) -> Vec<(Level, String)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }

    fn says(&self, words: &str) -> bool {
        self.0.lock().unwrap().iter().any(|(level, line)| *level <= Level::INFO && line.contains(words))
    }
}

/// What answers at the broker's port.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Broker {
    Nobody,
    /// Closes each connection at once.
    HangsUp,
    /// CONNACK with 0x87, Not authorized.
    Refuses,
    /// A real broker behind a link that breaks every 30 ms of real time.
    Flaps(u16),
}

/// Somebody in the place of the broker, until it is dropped.
struct Stand {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stand {
    fn new(port: u16, broker: Broker) -> Option<Stand> {
        if broker == Broker::Nobody {
            return None;
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                match broker {
                    Broker::Nobody | Broker::HangsUp => {}
                    Broker::Refuses => {
                        let _asked = stream.read(&mut [0; 1024]);
                        let _told = stream.write_all(&[0x20, 3, 0, 0x87, 0]);
                    }
                    Broker::Flaps(to) => {
                        relay(&stream, &TcpStream::connect((Ipv4Addr::LOCALHOST, to)).unwrap())
                    }
                }
            }
        });
        STAND_PORT.store(u64::from(port), Ordering::Relaxed);
        Some(Stand { stop, thread: Some(thread) })
    }
}

/// For 30 ms.
fn relay(ours: &TcpStream, theirs: &TcpStream) {
    let copy = |from: &TcpStream, to: &TcpStream| {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from, &mut to))
    };
    let copies = [copy(ours, theirs), copy(theirs, ours)];
    std::thread::sleep(Duration::from_millis(30));
    let _gone = [ours, theirs].map(|stream| stream.shutdown(std::net::Shutdown::Both));
    let _ended = copies.map(JoinHandle::join);
}

static STAND_PORT: AtomicU64 = AtomicU64::new(0);

impl Drop for Stand {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let port = STAND_PORT.load(Ordering::Relaxed) as u16;
        let _wakes_it = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// A Modbus TCP server: unit 1 is dead until it is told otherwise, the others answer with numbers that change.
fn device(unit_1: Arc<AtomicBool>) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let unit_1 = Arc::clone(&unit_1);
            std::thread::spawn(move || serve(stream.unwrap(), &unit_1));
        }
    });
    port
}

fn serve(mut stream: TcpStream, unit_1: &AtomicBool) {
    let mut request = [0; 12];
    let mut polls: u16 = 0;
    while stream.read_exact(&mut request).is_ok() {
        if request[6] == 1 && !unit_1.load(Ordering::Relaxed) {
            continue;
        }
        polls = polls.wrapping_add(1);
        let registers = u16::from_be_bytes([request[10], request[11]]);
        let mut reply = request[..4].to_vec();
        reply.extend((3 + 2 * registers).to_be_bytes());
        reply.extend([request[6], request[7], 2 * registers as u8]);
        reply.extend((0..registers).flat_map(|n| n.wrapping_add(polls).to_be_bytes()));
        if stream.write_all(&reply).is_err() {
            return;
        }
    }
}

/// meter1 is dead; what meter2 says is more than the queue holds, and the oldest is dropped all the time; what meter3
/// says is refused all the time.
fn config(broker: u16, device: u16) -> Config {
    let points: String = (0..60)
        .map(|n| format!("  {{ name = \"p{n}\", register = \"holding\", address = {n}, type = \"u16\" }},\n"))
        .collect();
    let unit = |name: &str, unit: u8, more: &str, points: &str| {
        format!("[[modbus.unit]]\nname = \"{name}\"\nunit = {unit}\n{more}\npoints = [\n{points}]\n")
    };
    let one = "  { name = \"voltage\", register = \"holding\", address = 0, type = \"u16\" },\n";
    Config::new(&format!("mqtt://127.0.0.1:{broker}"))
        .with("broker", "backoff_max = \"5min\"")
        .with("broker", "connect_timeout = \"10min\"")
        .with("store", "quota = \"4MiB\"")
        .with("store", "lane.normal = { max_bytes = \"512KiB\" }")
        .with("store", "lane.bulk = { max_messages = 100, when_full = \"reject_new\" }")
        .and(&format!(
            "[[modbus]]\nname = \"line1\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {device}\n\
             timeout = \"1min\"\n"
        ))
        .and(&unit("meter1", 1, "", one))
        .and(&unit("meter2", 2, "", &points))
        .and(&unit("meter3", 3, "lane = \"bulk\"", one))
}

/// Moves the clock. While a blocking task runs, tokio does not move it by itself.
async fn step(by: Duration) {
    tokio::time::advance(by).await;
    tokio::task::spawn_blocking(|| std::thread::sleep(REAL)).await.unwrap();
}

async fn pass(time: Duration) {
    for _ in 0..time.as_millis() / STEP.as_millis() {
        step(STEP).await;
    }
}

/// The lines of 24 hours in which the broker's port behaves so, and the lines of the way back to normal.
fn day(lines: &Lines, told: &Told) -> [Vec<(Level, String)>; 2] {
    let dir = tempfile::tempdir().unwrap();
    let unit_1 = Arc::new(AtomicBool::new(false));
    let mut mosquitto = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    mosquitto.stop();
    let file = dir.path().join("fieldpost.toml");
    std::fs::write(&file, config(mosquitto.port(), device(Arc::clone(&unit_1))).text()).unwrap();
    let config = load(&file);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    lines.take();
    runtime.block_on(async {
        let day = async {
            for (time, broker) in &told.phases {
                let _stand = Stand::new(mosquitto.port(), *broker);
                pass(*time).await;
            }
            let of_the_day = lines.take();
            mosquitto.start_again();
            unit_1.store(true, Ordering::Relaxed);
            for _ in 0..PATIENCE_STEPS {
                step(SMALL_STEP).await;
                if told.ends.iter().all(|words| lines.says(words)) {
                    break;
                }
            }
            [of_the_day, lines.take()]
        };
        tokio::select! {
            ended = agent::run_with(config, std::path::PathBuf::new(), Faults::default()) => panic!("the agent has ended: {ended:?}"),
            lines = day => lines,
        }
    })
}

fn load(file: &Path) -> config::Config {
    config::load(file).unwrap_or_else(|problems| panic!("{problems}"))
}

fn said(lines: &[(Level, String)]) -> Vec<&str> {
    lines.iter().filter(|(level, _)| *level <= Level::INFO).map(|(_, line)| line.as_str()).collect()
}

/// How often it happened, said or not.
fn occurred(lines: &[(Level, String)], words: &str) -> usize {
    lines.iter().filter(|(_, line)| line.contains(words)).count()
}

/// What a day must say beside its number of lines.
struct Told {
    what: &'static str,
    phases: Vec<(Duration, Broker)>,
    /// In the day, and on the way back to normal.
    begins: &'static [&'static str],
    ends: &'static [&'static str],
    /// So many lines would it be without the policy, at least.
    without: usize,
}

/// One test for both days, because there is one log in a process.
#[test]
fn a_day_without_broker_and_devices_makes_fewer_than_200_lines() {
    let lines = Lines::default();
    tracing::subscriber::set_global_default(lines.clone()).unwrap();
    let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
    let gone = Told {
        what: "gone",
        phases: vec![(12 * HOUR, Broker::Nobody), (6 * HOUR, Broker::HangsUp), (6 * HOUR, Broker::Refuses)],
        begins: &["no connection to the broker", NO_ANSWER, "dropped", "not accepted by the database"],
        ends: &[
            "connected to the broker again after 1 d 0 h",
            WELL,
            "accepts messages again after 2",
            "no more messages are dropped",
        ],
        without: 10 * LINES_MAX,
    };
    let flapping = Told {
        what: "flapping",
        phases: vec![(24 * HOUR, Broker::Flaps(broker.port()))],
        begins: &["the connection to the broker ended", "connected to the broker again", NO_ANSWER],
        ends: &[WELL],
        without: 2 * LINES_MAX,
    };
    for told in [gone, flapping] {
        let (what, began) = (told.what, std::time::Instant::now());
        let [day, after] = day(&lines, &told);
        let (of_day, of_end) = (said(&day), said(&after));
        let all = of_day.len() + of_end.len();
        let occurrences: usize =
            REPEATING.iter().map(|words| occurred(&day, words) + occurred(&after, words)).sum();
        println!("--- {what}: {all} lines, {occurrences} without the policy; took {:?}", began.elapsed());
        for line in of_day.iter().chain(&of_end) {
            println!("{line}");
        }
        assert!(all < LINES_MAX, "{what}: {all} lines");
        for (words, lines) in
            told.begins.iter().map(|w| (w, &of_day)).chain(told.ends.iter().map(|w| (w, &of_end)))
        {
            assert!(lines.iter().any(|line| line.contains(words)), "{what}: nothing says {words:?}");
        }
        if what == "gone" {
            let failures = occurred(&day, REPEATING[0]) + occurred(&after, REPEATING[0]);
            let total = trouble::counted(failures as u64, "failure");
            assert!(of_end.iter().any(|line| line.contains(&total)), "the end says {total}");
        }
        // The negative control: were each occurrence a line, there would be far too many.
        assert!(occurrences > told.without, "{what}: only {occurrences} occurrences prove nothing");
    }
}
