//! Live forwarding, end to end: producers, the agent or a mosquitto with its bridge, a far mosquitto, a subscriber.
//!
//! A closed loop: what a producer hands in next waits until something has arrived, so the queue between stays as long
//! as it is, and the slowest part says how fast it goes.

use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::load::{AHEAD, Door, Gate, Messages, PAYLOAD, PRODUCERS, Producers};
use crate::mosquitto::{Bridge, MISSING, Mosquitto};
use crate::process::Process;
use crate::setting::{Failure, Setting};
use crate::sink::{Count, subscribe};
use crate::support::agent::Config;
use crate::support::mosquitto::free_port;
use crate::table::{Better, Peer, Row};

/// Messages under way from producer to subscriber, at most.
const UNDER_WAY: u64 = 4000;
/// Messages that fieldpost may have in flight, its default.
const WINDOW: u16 = 1000;
/// Without a message for that long, something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// QoS 1.
pub(crate) fn at_least_once(setting: &Setting) -> Result<Vec<Row>, Failure> {
    rows(setting, 1, ["forward-1", "forward-1-cpu"], [">= 1.2 x", "<= 0.010"])
}

/// QoS 2.
pub(crate) fn exactly_once(setting: &Setting) -> Result<Vec<Row>, Failure> {
    rows(setting, 2, ["forward-2", "forward-2-cpu"], [">= 1.0 x", "-"])
}

/// Messages a second, and processor seconds for 1,000 of them.
struct Measured {
    rate: f64,
    cpu: f64,
}

fn rows(
    setting: &Setting,
    qos: u8,
    names: [&'static str; 2],
    aims: [&'static str; 2],
) -> Result<Vec<Row>, Failure> {
    let messages = Messages::ordinary(qos);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..setting.repeats() {
        ours.extend(fieldpost(setting, &messages)?);
        theirs.extend(mosquitto(setting, &messages)?);
    }
    let conditions = format!(
        "{PAYLOAD} B, one PUBLISH a message, {PRODUCERS} producers with {AHEAD} each ahead of their answers, {UNDER_WAY} \
         under way end to end; far mosquitto without limits, counted at a subscriber of QoS 0. \
         fieldpost: MQTT 5, {WINDOW} in flight, each message committed with synchronous=FULL before it is accepted. \
         Bridge: MQTT 3.1.1, no limit of messages in flight, saved on exit alone, so nothing is durable"
    );
    let row = |which: usize, what: &str, unit, better, figure: fn(&Measured) -> f64| {
        let name = "mosquitto bridge, not durable".to_owned();
        Row {
            name: names[which],
            what: format!("forward QoS {qos}, {what}"),
            unit,
            better,
            ours: ours.iter().map(figure).collect(),
            // It is the far broker, too: without it there is nothing to measure.
            peer: match theirs.is_empty() {
                true => Peer::Missing(MISSING.to_owned()),
                false => Peer::Measured { name, figures: theirs.iter().map(figure).collect() },
            },
            aim: aims[which],
            conditions: conditions.clone(),
        }
    };
    Ok(vec![
        row(0, "throughput", "msg/s", Better::Higher, |measured| measured.rate),
        row(1, "CPU for 1 000", "CPU s", Better::Lower, |measured| measured.cpu),
    ])
}

fn fieldpost(setting: &Setting, messages: &Messages) -> Result<Option<Measured>, Failure> {
    let Some(far) = Mosquitto::far(&setting.folder("far")?, free_port())? else { return Ok(None) };
    let _far_process = far.start()?;
    let arrived = subscribe(far.port)?;
    let config = Config::new(&format!("mqtt://127.0.0.1:{}", far.port))
        .with("broker", &format!("max_in_flight = {WINDOW}"))
        .with("broker", &format!("qos2_window = {WINDOW}"));
    let agent = Agent::start(setting, &setting.folder("agent")?, &config)?;
    let door = Door::Control(agent.socket());
    measure(setting, &agent.process, &door, messages, &arrived).map(Some)
}

fn mosquitto(setting: &Setting, messages: &Messages) -> Result<Option<Measured>, Failure> {
    let Some(far) = Mosquitto::far(&setting.folder("far")?, free_port())? else { return Ok(None) };
    let _far_process = far.start()?;
    let arrived = subscribe(far.port)?;
    let bridge = Bridge { far: far.port, in_flight: 0 };
    let Some(local) = Mosquitto::bridge(&setting.folder("bridge")?, free_port(), bridge)? else {
        return Ok(None);
    };
    let process = local.start()?;
    measure(setting, &process, &Door::Broker(local.port), messages, &arrived).map(Some)
}

fn measure(
    setting: &Setting,
    process: &Process,
    door: &Door,
    messages: &Messages,
    arrived: &Count,
) -> Result<Measured, Failure> {
    let producers = Producers::start(door, messages, &Gate::closed_loop(arrived, UNDER_WAY))?;
    let measured = steady(setting, process, arrived)?;
    producers.stop().map_err(|failure| process.failure(&failure.to_string()))?;
    Ok(measured)
}

fn steady(setting: &Setting, process: &Process, arrived: &Count) -> Result<Measured, Failure> {
    let (warm, long) = if setting.quick { (500, 1000) } else { (1000, 4000) };
    arrived.reach(UNDER_WAY * 2, PATIENCE)?;
    std::thread::sleep(Duration::from_millis(warm));
    let (first, cpu_first, began) = (arrived.get(), process.cpu_s()?, Instant::now());
    std::thread::sleep(Duration::from_millis(long));
    let (last, cpu_last, took) = (arrived.get(), process.cpu_s()?, began.elapsed());
    if last == first {
        return Err(process.failure("nothing arrived while it was measured"));
    }
    let count = (last - first) as f64;
    Ok(Measured { rate: count / took.as_secs_f64(), cpu: (cpu_last - cpu_first) / count * 1000.0 })
}
