//! A million queued messages: what they weigh in memory, how soon a start says CONNECT, how fast they drain.
//!
//! Filled once on each side while nobody listens at the far end; what the fill leaves on the disk is restored before
//! each measure, from a clean stop or from a kill -9. Invariant: a drain counts only when every message arrived.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::agent::{self, Agent};
use crate::load::{Door, Gate, Messages, PAYLOAD, Producers};
use crate::mosquitto::{Bridge, MISSING, Mosquitto};
use crate::process::Process;
use crate::setting::{Failure, Setting};
use crate::sink::{Count, Sink, subscribe};
use crate::support::agent::Config;
use crate::support::mosquitto::free_port;
use crate::table::{Better, Peer, Row};

/// Messages in flight while draining, on both sides.
const WINDOW: u16 = 1000;
/// Without a message for that long, something is broken; a start may take as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Idle for that long before memory is looked at.
const IDLE: Duration = Duration::from_secs(1);

/// How long the bridge gets for its backlog at QoS 2, of which it hands on some messages a second and may never finish.
const THEIR_LIMIT_2: Duration = Duration::from_secs(60);
/// Its default while it drains.
const THEIR_WINDOW_2: u16 = 20;
/// A backlog as the design has it, and one for a peer that may not finish.
const FULL: u64 = 1_000_000;
const SOME: u64 = 200_000;

const MEGABYTE: f64 = 1e6;

/// One side: how it is started, and its files.
enum Side<'a> {
    Ours { setting: &'a Setting, config: Config },
    Theirs(Mosquitto),
}

struct Contender<'a> {
    side: Side<'a>,
    folder: PathBuf,
    /// Its files after a clean stop, and after a kill -9.
    clean: PathBuf,
    killed: PathBuf,
    /// How long a drain may take.
    limit: Duration,
    figures: Figures,
}

#[derive(Default)]
struct Figures {
    fill: Vec<f64>,
    filled: Vec<f64>,
    filled_peak: Vec<f64>,
    idle: Vec<f64>,
    start: Vec<f64>,
    start_killed: Vec<f64>,
    into_sink: Vec<f64>,
    into_sink_cpu: Vec<f64>,
    into_broker: Vec<f64>,
    drain_peak: Vec<f64>,
}

/// All rows of the backlog at QoS 1.
pub(crate) fn rows(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let count: u64 = if setting.quick { 50_000 } else { FULL };
    let far = free_port();
    let messages = Messages::ordinary(1);
    let mut ours = Contender::ours(setting, far)?;
    let mut theirs = Contender::theirs(setting, far)?;
    for contender in [Some(&mut ours), theirs.as_mut()].into_iter().flatten() {
        contender.idle(setting, far)?;
        contender.fill(&messages, count)?;
    }
    for _ in 0..setting.repeats() {
        for contender in [Some(&mut ours), theirs.as_mut()].into_iter().flatten() {
            contender.drain_into_sink(far, count)?;
        }
        for contender in [Some(&mut ours), theirs.as_mut()].into_iter().flatten() {
            contender.drain_into_broker(setting, far, count)?;
        }
        ours.start_killed(far)?;
    }
    Ok(table(count, &ours.figures, theirs.map(|theirs| theirs.figures).as_ref()))
}

/// A backlog at QoS 2, which not everybody finishes.
pub(crate) fn exactly_once(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let count: u64 = if setting.quick { 20_000 } else { SOME };
    let far = free_port();
    let messages = Messages::ordinary(2);
    let mut ours = Contender::ours(setting, far)?;
    ours.fill(&messages, count)?;
    let mut theirs = Contender::theirs(setting, far)?;
    let mut unfinished = None;
    if let Some(theirs) = &mut theirs {
        theirs.fill(&messages, count)?;
        theirs.limit = THEIR_LIMIT_2;
        let bridge = Bridge { far, in_flight: THEIR_WINDOW_2 };
        if let Some(mosquitto) = Mosquitto::bridge(&theirs.folder, free_port(), bridge)? {
            theirs.side = Side::Theirs(mosquitto);
        }
    }
    for _ in 0..setting.repeats() {
        ours.drain_into_broker(setting, far, count)?;
        if let Some(theirs) = theirs.as_mut().filter(|_| unfinished.is_none()) {
            unfinished = theirs.drain_into_broker(setting, far, count).err();
        }
    }
    let row = |name, what: &str, ours, peer, count| Row {
        name,
        what: what.to_owned(),
        unit: "msg/s",
        better: Better::Higher,
        ours,
        peer,
        aim: "completes",
        conditions: format!("{}; this one drains with its default, {THEIR_WINDOW_2}", conditions(count, 2)),
    };
    let peer = match (theirs, unfinished) {
        (Some(_), Some(failure)) => {
            let words = failure.to_string();
            let words = words.split(';').next().unwrap_or_default();
            Peer::Missing(format!("mosquitto bridge: {words}"))
        }
        (Some(theirs), None) => {
            Peer::Measured { name: "mosquitto bridge".to_owned(), figures: theirs.figures.into_broker }
        }
        (None, _) => Peer::Missing(MISSING.to_owned()),
    };
    let mut rows =
        vec![row("drain-broker-2", "drain into mosquitto, QoS 2", ours.figures.into_broker, peer, count)];
    if !setting.quick {
        let mut full = Contender::ours(setting, far)?;
        full.fill(&messages, FULL)?;
        full.drain_into_broker(setting, far, FULL)?;
        rows.push(row("drain-broker-2-full", "the same, 1M", full.figures.into_broker, Peer::None, FULL));
    }
    Ok(rows)
}

fn conditions(count: u64, qos: u8) -> String {
    format!(
        "{count} messages of {PAYLOAD} B at QoS {qos} that LZ4 cannot shorten, filled while nobody listens; {WINDOW} \
         in flight. fieldpost: MQTT 5, each committed. Bridge: MQTT 3.1.1, without a limit of messages in flight, saved \
         when it stops. Memory: VmRSS and VmHWM"
    )
}

fn table(count: u64, ours: &Figures, theirs: Option<&Figures>) -> Vec<Row> {
    let row = |name, what: &str, unit, better, figures: fn(&Figures) -> &Vec<f64>, aim| Row {
        name,
        what: what.to_owned(),
        unit,
        better,
        ours: figures(ours).clone(),
        peer: match theirs {
            Some(theirs) if !figures(theirs).is_empty() => {
                Peer::Measured { name: "mosquitto bridge".to_owned(), figures: figures(theirs).clone() }
            }
            Some(_) => Peer::Missing("mosquitto has what it saved last, not what it took since".to_owned()),
            None => Peer::Missing(MISSING.to_owned()),
        },
        aim,
        conditions: conditions(count, 1),
    };
    use Better::{Higher, Lower};
    vec![
        row("memory-idle", "memory, idle and connected", "MB", Lower, |f| &f.idle, "<= 8"),
        row("fill", "accept a backlog", "msg/s", Higher, |f| &f.fill, "-"),
        row("memory-backlog", "memory, backlog queued", "MB", Lower, |f| &f.filled, "<= 16"),
        row("memory-fill-peak", "memory, most while filling", "MB", Lower, |f| &f.filled_peak, "-"),
        row("start", "start to CONNECT, clean stop", "s", Lower, |f| &f.start, "<= 0.1"),
        row("start-killed", "start to CONNECT, kill -9", "s", Lower, |f| &f.start_killed, "<= 0.1"),
        row("drain-sink", "drain into a counting sink", "msg/s", Higher, |f| &f.into_sink, ">= 600 000"),
        row("drain-sink-cpu", "start and drain, CPU for 1 000", "CPU s", Lower, |f| &f.into_sink_cpu, "-"),
        row("drain-broker", "drain into mosquitto", "msg/s", Higher, |f| &f.into_broker, ">= 1.0 x"),
        row("memory-drain-peak", "memory, most while draining", "MB", Lower, |f| &f.drain_peak, "<= 16"),
    ]
}

impl<'a> Contender<'a> {
    fn ours(setting: &'a Setting, far: u16) -> Result<Contender<'a>, Failure> {
        let config = Config::new(&format!("mqtt://127.0.0.1:{far}"))
            .with("broker", &format!("max_in_flight = {WINDOW}"))
            .with("broker", &format!("qos2_window = {WINDOW}"))
            .with("store", "quota = \"1GiB\"")
            .with("store", "when_full = \"reject_new\"");
        let folder = setting.folder("agent")?;
        Contender::new(setting, Side::Ours { setting, config }, folder)
    }

    fn theirs(setting: &'a Setting, far: u16) -> Result<Option<Contender<'a>>, Failure> {
        let folder = setting.folder("bridge")?;
        let bridge = Bridge { far, in_flight: 0 };
        let Some(mosquitto) = Mosquitto::bridge(&folder, free_port(), bridge)? else { return Ok(None) };
        Contender::new(setting, Side::Theirs(mosquitto), folder).map(Some)
    }

    fn new(setting: &Setting, side: Side<'a>, folder: PathBuf) -> Result<Contender<'a>, Failure> {
        let (clean, killed) = (setting.folder("clean")?, setting.folder("killed")?);
        Ok(Contender { side, folder, clean, killed, limit: Duration::MAX, figures: Figures::default() })
    }

    /// Starts it and waits for nothing; the moment is the one right before its exec.
    fn launch(&self) -> Result<(Process, Instant), Failure> {
        match &self.side {
            Side::Ours { setting, config } => {
                let mut command = agent::command(setting, &self.folder, config)?;
                let began = Instant::now();
                Ok((Agent::launch(&mut command, &self.folder)?.process, began))
            }
            Side::Theirs(mosquitto) => {
                let began = Instant::now();
                Ok((mosquitto.launch()?, began))
            }
        }
    }

    /// Starts it, and waits until messages can be handed in.
    fn ready(&self) -> Result<(Process, Door), Failure> {
        match &self.side {
            Side::Ours { setting, config } => {
                let agent = Agent::start(setting, &self.folder, config)?;
                let door = Door::Control(agent.socket());
                Ok((agent.process, door))
            }
            Side::Theirs(mosquitto) => Ok((mosquitto.start()?, Door::Broker(mosquitto.port))),
        }
    }

    fn idle(&mut self, setting: &Setting, far: u16) -> Result<(), Failure> {
        for _ in 0..setting.repeats() {
            let sink = Sink::start(far)?;
            let (process, _) = self.launch()?;
            sink.first_byte(PATIENCE)?;
            std::thread::sleep(IDLE);
            self.figures.idle.push(process.resident()? as f64 / MEGABYTE);
            process.stop()?;
            empty(&self.folder)?;
        }
        Ok(())
    }

    fn fill(&mut self, messages: &Messages, count: u64) -> Result<(), Failure> {
        let (process, door) = self.ready()?;
        let began = Instant::now();
        Producers::start(&door, messages, &Gate::fill(count))?
            .finish()
            .map_err(|failure| process.failure(&failure.to_string()))?;
        self.figures.fill.push(count as f64 / began.elapsed().as_secs_f64());
        self.figures.filled.push(process.resident()? as f64 / MEGABYTE);
        self.figures.filled_peak.push(process.resident_peak()? as f64 / MEGABYTE);
        if let Side::Ours { .. } = self.side {
            process.kill()?;
            restore(&self.folder, &self.killed)?;
            self.ready()?.0.stop()?;
        } else {
            process.stop()?;
        }
        restore(&self.folder, &self.clean)
    }

    fn drain_into_sink(&mut self, far: u16, count: u64) -> Result<(), Failure> {
        restore(&self.clean, &self.folder)?;
        let sink = Sink::start(far)?;
        let (process, began) = self.launch()?;
        let first_byte = sink.first_byte(PATIENCE)?;
        self.figures.start.push((first_byte - began).as_secs_f64());
        self.figures.into_sink.push(self.drained(&process, sink.count(), count, first_byte)?);
        self.figures.into_sink_cpu.push(process.cpu_s()? / count as f64 * 1000.0);
        self.figures.drain_peak.push(process.resident_peak()? as f64 / MEGABYTE);
        Ok(())
    }

    fn drain_into_broker(&mut self, setting: &Setting, far: u16, count: u64) -> Result<(), Failure> {
        restore(&self.clean, &self.folder)?;
        let Some(broker) = Mosquitto::far(&setting.folder("far")?, far)? else { return Ok(()) };
        let _broker_process = broker.start()?;
        let arrived = subscribe(far)?;
        let (process, _) = self.launch()?;
        let begun = arrived.begin(count, PATIENCE);
        let began = begun.map_err(|failure| process.failure(&failure.to_string()))?;
        self.figures.into_broker.push(self.drained(&process, &arrived, count, began)?);
        Ok(())
    }

    /// Waits until all have arrived; messages a second.
    fn drained(
        &self,
        process: &Process,
        arrived: &Count,
        count: u64,
        began: Instant,
    ) -> Result<f64, Failure> {
        let told = |failure: Failure| process.failure(&failure.to_string());
        let mut last = arrived.get();
        while last < count {
            arrived.reach(last + 1, PATIENCE).map_err(told)?;
            last = arrived.get();
            if last < count && began.elapsed() > self.limit {
                let seconds = self.limit.as_secs();
                return Err(process.failure(&format!("{last} of {count} arrived in {seconds} s")));
            }
        }
        Ok(count as f64 / began.elapsed().as_secs_f64())
    }

    fn start_killed(&mut self, far: u16) -> Result<(), Failure> {
        restore(&self.killed, &self.folder)?;
        let sink = Sink::start(far)?;
        let (_process, began) = self.launch()?;
        self.figures.start_killed.push((sink.first_byte(PATIENCE)? - began).as_secs_f64());
        Ok(())
    }
}

/// Makes one folder's files those of the other, and durable, so that no later sync pays for them.
fn restore(from: &Path, to: &Path) -> Result<(), Failure> {
    empty(to)?;
    for entry in fs::read_dir(from).map_err(Failure::at(from.display().to_string()))?.flatten() {
        let copy = to.join(entry.file_name());
        if entry.file_type().is_ok_and(|kind| kind.is_file()) {
            fs::copy(entry.path(), &copy).map_err(Failure::at(copy.display().to_string()))?;
            File::open(&copy)
                .and_then(|file| file.sync_all())
                .map_err(Failure::at(copy.display().to_string()))?;
        }
    }
    Ok(())
}

/// Removes every file; a configuration is written at each start.
fn empty(folder: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(folder).map_err(Failure::at(folder.display().to_string()))?.flatten() {
        fs::remove_file(entry.path()).map_err(Failure::at(entry.path().display().to_string()))?;
    }
    Ok(())
}
