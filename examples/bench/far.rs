//! Links as gateways have them: far away, or slow. The same closed loop as `forward`, through a long line into a sink.

use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::distance::{Kind, Line};
use crate::load::{Door, Gate, Messages, PAYLOAD, Producers};
use crate::mosquitto::{Bridge, MISSING, Mosquitto};
use crate::process::Process;
use crate::setting::{Failure, Setting};
use crate::sink::{Count, Sink};
use crate::support::agent::Config;
use crate::support::mosquitto::free_port;
use crate::table::{Better, Peer, Row};

/// Messages under way from producer to sink, at most: more than the window, so that the queue is never empty.
const UNDER_WAY: u64 = 20_000;
/// Messages in flight: the default of fieldpost, and as many as MQTT has packet identifiers.
const WINDOW: u16 = 1000;
const WIDE: u16 = 64_000;
/// Without a message for that long, something is broken.
const PATIENCE: Duration = Duration::from_secs(40);

/// A link, and how it is measured.
#[derive(Debug)]
pub(crate) struct Case {
    name: &'static str,
    what: &'static str,
    /// Messages that fieldpost may have in flight.
    window: u16,
    kind: Kind,
    /// Until it flows evenly, and how long it is then measured.
    warm: Duration,
    long: Duration,
}

const fn case(name: &'static str, what: &'static str, window: u16, kind: Kind, seconds: [u64; 2]) -> Case {
    let [warm, long] = [Duration::from_secs(seconds[0]), Duration::from_secs(seconds[1])];
    Case { name, what, window, kind, warm, long }
}

const fn long_way(round_trip_ms: u64) -> Kind {
    Kind { delay: Duration::from_millis(round_trip_ms / 2), bytes_per_s: None }
}

const SLOW: Kind = Kind { delay: Duration::ZERO, bytes_per_s: Some(32_000) };

/// Another continent.
pub(crate) const FAR: Case = case("far-100", "forward at 100 ms round trip", WINDOW, long_way(100), [1, 4]);
/// A satellite.
pub(crate) const FARTHER: Case =
    case("far-600", "forward at 600 ms round trip", WINDOW, long_way(600), [3, 4]);
/// A satellite, and a window that fits.
pub(crate) const WIDER: Case = case("far-600-wide", "the same, wide window", WIDE, long_way(600), [3, 4]);
/// A bad cell.
pub(crate) const SLOWER: Case = case("slow-32", "forward at 32 kB/s", WINDOW, SLOW, [3, 6]);

/// One row.
pub(crate) fn rows(setting: &Setting, case: &Case) -> Result<Vec<Row>, Failure> {
    row(setting, case).map(|row| vec![row])
}

fn row(setting: &Setting, case: &Case) -> Result<Row, Failure> {
    let messages = Messages::ordinary(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..setting.repeats() {
        ours.push(fieldpost(setting, case, &messages)?);
        theirs.extend(mosquitto(setting, case, &messages)?);
    }
    Ok(Row {
        name: case.name,
        what: case.what.to_owned(),
        unit: "msg/s",
        better: Better::Higher,
        ours,
        peer: if theirs.is_empty() {
            Peer::Missing(MISSING.to_owned())
        } else {
            Peer::Measured { name: "mosquitto bridge, not durable".to_owned(), figures: theirs }
        },
        aim: "-",
        conditions: format!(
            "{PAYLOAD} B at QoS 1, {} in flight, {UNDER_WAY} under way, into a counting sink. fieldpost: MQTT 5, each \
             committed; bridge: MQTT 3.1.1, without a limit of messages in flight",
            case.window
        ),
    })
}

fn fieldpost(setting: &Setting, case: &Case, messages: &Messages) -> Result<f64, Failure> {
    let sink = Sink::start(free_port())?;
    let line = Line::start(sink.port(), case.kind)?;
    let config = Config::new(&format!("mqtt://127.0.0.1:{}", line.port()))
        .with("broker", &format!("max_in_flight = {}", case.window));
    let agent = Agent::start(setting, &setting.folder("agent")?, &config)?;
    measure(case, &agent.process, &Door::Control(agent.socket()), messages, sink.count())
}

fn mosquitto(setting: &Setting, case: &Case, messages: &Messages) -> Result<Option<f64>, Failure> {
    let sink = Sink::start(free_port())?;
    let line = Line::start(sink.port(), case.kind)?;
    let bridge = Bridge { far: line.port(), in_flight: 0 };
    let local = Mosquitto::bridge(&setting.folder("bridge")?, free_port(), bridge)?;
    let Some(local) = local else { return Ok(None) };
    let process = local.start()?;
    measure(case, &process, &Door::Broker(local.port), messages, sink.count()).map(Some)
}

fn measure(
    case: &Case,
    process: &Process,
    door: &Door,
    messages: &Messages,
    arrived: &Count,
) -> Result<f64, Failure> {
    let gate = Gate::closed_loop(arrived, UNDER_WAY);
    let producers = Producers::start(door, messages, &gate)?;
    let told = |failure: Failure| process.failure(&failure.to_string());
    arrived.reach(1, PATIENCE).map_err(told)?;
    std::thread::sleep(case.warm);
    let (first, began) = (arrived.get(), Instant::now());
    std::thread::sleep(case.long);
    let rate = (arrived.get() - first) as f64 / began.elapsed().as_secs_f64();
    producers.stop().map_err(told)?;
    if rate > 0.0 { Ok(rate) } else { Err(process.failure("nothing arrived while it was measured")) }
}
