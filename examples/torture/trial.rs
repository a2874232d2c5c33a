//! The torture itself: one cycle after the other, an audit now and then, and the verdict.
//!
//! Invariant: every wait has a deadline and ends in words that say what did not happen.

use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use fieldpost::control::wire::LinkState;
use tokio::time::sleep;

use crate::agent::{Agent, Broken};
use crate::disk::{Counts, DiskError};
use crate::log::BrokerLog;
use crate::plan::{Aim, Cycle, End, Fault, Plan};
use crate::producer::Producer;
use crate::screen::Screen;
use crate::support::agent::drained;
use crate::support::mosquitto::{self, Mosquitto, Options};
use crate::support::proxy::{CutPlan, Proxy};
use crate::tally::{Tally, Verdict, topic};
use crate::witness::Witness;

/// How often everything is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// For what takes a moment on an idle machine: starting, stopping.
const SOON: Duration = Duration::from_secs(30);
/// For the delivery of everything that waits, about a second on an idle machine.
const DRAIN: Duration = Duration::from_secs(60);
/// How far the broker's log may be behind its acknowledgements.
const LOG_BEHIND: Duration = Duration::from_secs(5);
/// The producer pauses above so many messages under way.
const UNDER_WAY_MAX: u64 = 1_500;
/// Cycles between two audits.
const AUDIT_EVERY: u64 = 20;
/// So many faults of a kind that changed nothing mean that they did not take place.
const ENOUGH_TO_PROVE: u64 = 15;
/// How long a commit may be waited for, to end the agent in the middle of it.
const SYNCING_WITHIN: Duration = Duration::from_millis(100);
/// How long a link that is to break after some bytes may take.
const LINK_CUT_WITHIN: Duration = Duration::from_millis(1_500);

/// What is tried.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) cycles: u64,
    pub(crate) seed: u64,
    pub(crate) protocol: String,
    pub(crate) qos: u8,
    pub(crate) broken: Broken,
}

/// Why the torture did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A program that it needs.
    #[error("mosquitto is not installed; the torture needs it: apt-get install mosquitto")]
    NoBroker,
    /// The disk below the agent.
    #[error("{0}")]
    Disk(#[from] DiskError),
    /// The operating system refused.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    /// The agent ended by itself.
    #[error("the agent ended by itself: {0}")]
    Ended(ExitStatus),
    /// A deadline passed.
    #[error("{what} did not happen within {} s", within.as_secs())]
    TooLate { what: &'static str, within: Duration },
    /// SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure::System { what, source }
}

/// What was done to the agent.
#[derive(Debug, Default)]
pub(crate) struct Done {
    kills: u64,
    power_cuts: u64,
    /// Of these, those after which something written was not there.
    power_cuts_that_lost: u64,
    sectors_lost: u64,
    link_cuts: u64,
    half_open: u64,
    broker_restarts: u64,
    disk_full: u64,
    slow_starts: u64,
    starts: u64,
    /// What the disk counted.
    disk: Counts,
}

impl Done {
    /// Why a clean run means little, if it does: faults that were meant and did not take place.
    fn proves_nothing(&self) -> Option<String> {
        if self.power_cuts >= ENOUGH_TO_PROVE && self.power_cuts_that_lost == 0 {
            return Some("no power cut destroyed anything: the disk does not forget".into());
        }
        if self.disk_full >= ENOUGH_TO_PROVE && self.disk.refused == 0 {
            return Some("no write was refused: the disk is never full".into());
        }
        None
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Done { kills, power_cuts, power_cuts_that_lost, sectors_lost, link_cuts, .. } = self;
        let Done { half_open, broker_restarts, disk_full, slow_starts, starts, disk, .. } = self;
        let Counts { syncs, refused } = disk;
        write!(
            f,
            "{kills} kill -9, {power_cuts} power cuts ({power_cuts_that_lost} destroyed {sectors_lost} written sectors), \
             {link_cuts} link cuts,\n              {half_open} half-open links, {broker_restarts} broker restarts, \
             {disk_full} full disks ({refused} writes refused);\n              {slow_starts} of {starts} starts \
             with slow commits; {syncs} syncs"
        )
    }
}

/// Everything that takes part.
pub(crate) struct Trial {
    settings: Settings,
    plan: Plan,
    broker: Mosquitto,
    log: BrokerLog,
    proxy: Proxy,
    agent: Agent,
    producer: Producer,
    witness: Witness,
    screen: Screen,
    tally: Tally,
    done: Done,
    cycles: u64,
    now: String,
    auditing: bool,
    gaps: u64,
    quarantined: u64,
}

/// What is left when it is over.
pub(crate) struct Outcome {
    pub(crate) verdict: Verdict,
    pub(crate) screen: Screen,
    pub(crate) agent: Agent,
    /// Why it ended early.
    pub(crate) failure: Option<Failure>,
    /// The last fault.
    pub(crate) last: String,
}

impl Trial {
    /// Starts broker, proxy, agent, producer and witness.
    pub(crate) async fn prepare(settings: Settings) -> Result<Trial, Failure> {
        if mosquitto::find("mosquitto").is_none() {
            return Err(Failure::NoBroker);
        }
        let options = Options { unlimited: true, persistence: true, ..Options::default() };
        let broker = Mosquitto::start(options);
        let log = BrokerLog::open(broker.log_path()).map_err(system("cannot read mosquitto's log"))?;
        let proxy = Proxy::start(broker.port()).await.map_err(system("cannot start the proxy"))?;
        let agent = Agent::prepare(&proxy.url(), &settings.protocol, settings.broken)?;
        let witness = Witness::start(broker.port());
        let producer = Producer::start(agent.socket(), settings.qos);
        producer.hold(true);
        let aim = match settings.broken {
            Broken { order: true, .. } => Aim::BrokenOrder,
            Broken { sync: Some(_), .. } => Aim::NoSync,
            Broken { .. } => Aim::Everything,
        };
        let mut trial = Trial {
            plan: Plan::new(settings.seed, aim),
            screen: Screen::new(settings.cycles),
            settings,
            broker,
            log,
            proxy,
            agent,
            producer,
            witness,
            tally: Tally::default(),
            done: Done::default(),
            cycles: 0,
            now: "starting".into(),
            auditing: true,
            gaps: 0,
            quarantined: 0,
        };
        let subscribed = |trial: &mut Trial| trial.witness.is_subscribed();
        trial.until(SOON, "the witness's subscription", subscribed).await?;
        trial.start(Duration::ZERO).await?;
        trial.agent.disk().check_loaded()?;
        trial.connect_twice().await?;
        trial.auditing = false;
        Ok(trial)
    }

    /// mosquitto 2.0.11 keeps over its own restart only a session that was resumed once. What it forgets of a new
    /// one is its own fault, and would be counted as ours.
    async fn connect_twice(&mut self) -> Result<(), Failure> {
        let link = |trial: &mut Trial| trial.agent.status().map(|status| status.link);
        let connected =
            |trial: &mut Trial| link(trial).is_some_and(|link| link.state == LinkState::Connected);
        self.until(SOON, "the agent's first connection to the broker", connected).await?;
        self.proxy.cut_all().await;
        let resumed = |trial: &mut Trial| link(trial).is_some_and(|link| link.session_present == Some(true));
        self.until(SOON, "the agent's second connection to the broker", resumed).await
    }

    /// Says what is going to happen.
    pub(crate) fn say_what_is_tried(&self) {
        let Settings { cycles, seed, protocol, qos, .. } = &self.settings;
        self.screen.say(&format!(
            "torture: {cycles} faults, MQTT {protocol}, QoS {qos}, --seed {seed}, in {}",
            self.agent.folder().display()
        ));
    }

    /// All cycles, or as far as nothing is wrong.
    pub(crate) async fn run(&mut self) -> Result<(), Failure> {
        while self.cycles < self.settings.cycles && !self.is_spoilt()? {
            let cycle = self.plan.draw();
            self.cycles += 1;
            self.now = cycle.fault.to_string();
            self.cycle(cycle).await?;
            if self.cycles.is_multiple_of(AUDIT_EVERY) {
                self.audit().await?;
                self.auditing = false;
            }
        }
        Ok(())
    }

    /// Ends what runs, after a last audit unless something failed already.
    pub(crate) async fn end(mut self, ran: Result<(), Failure>) -> Outcome {
        let failure = match ran {
            Ok(()) => self.audit().await.err(),
            Err(failure) => Some(failure),
        };
        // What is accepted from here on would be counted and not delivered.
        self.auditing = true;
        self.producer.hold(true);
        let _asked = self.agent.ask_to_stop();
        // Whatever it does then, it is killed when its time is over.
        let _stopped = self.until_stopped().await;
        let _ended = self.agent.kill();
        for (n, answer) in self.producer.heard() {
            self.tally.answered(n, answer);
        }
        self.producer.stop();
        self.broker.stop();
        let _unread = self.log.follow(&mut self.tally);
        let _copied = std::fs::copy(self.log.path(), self.agent.folder().join("mosquitto.log"));
        self.screen.close();
        let (compared, corrupt, first) =
            (self.witness.compared(), self.witness.corrupt(), self.witness.first_corrupt());
        self.witness.stop();
        self.done.disk = self.agent.disk().counts().unwrap_or_default();
        self.screen.say(&format!("  faults      {}", self.done));
        self.screen.say(&format!("  compared    {compared} payloads, by a subscriber"));
        let (refused, unknown) = self.tally.not_accepted();
        self.screen.say(&format!(
            "  producer    heard \"not accepted\" {refused} times, and nothing {unknown} times"
        ));
        let arrivals = self.tally.arrivals();
        let corrupt = corrupt + self.quarantined;
        let mut verdict =
            self.tally.close(self.cycles, self.settings.qos, self.gaps, corrupt, failure.is_some());
        verdict
            .details
            .extend(first.map(|n| (n, format!("message {n} has another payload than was accepted"))));
        if self.quarantined > 0 {
            verdict.faults.push(format!("{} databases set aside as damaged", self.quarantined));
        }
        if verdict.is_clean() {
            verdict.faults.extend(self.done.proves_nothing());
            if compared < arrivals / 2 {
                verdict.faults.push(format!("only {compared} of {arrivals} payloads were compared"));
            }
        }
        if let Some(failure) = &failure {
            verdict.faults.push(failure.to_string());
        }
        let (screen, agent, last) = (self.screen, self.agent, self.now);
        Outcome { verdict, screen, agent, failure, last }
    }

    async fn cycle(&mut self, cycle: Cycle) -> Result<(), Failure> {
        self.agent.disk().sync_takes(cycle.sync).map_err(system("cannot slow the disk down"))?;
        let enough = self.proxy.counts().to_broker + cycle.bytes;
        let deadline = Instant::now() + cycle.at_most;
        while self.proxy.counts().to_broker < enough && Instant::now() < deadline {
            self.look()?;
            sleep(LOOK_EVERY).await;
        }
        let Cycle { fault, stall, .. } = cycle;
        match fault {
            Fault::End(end) => self.end_and_start(end, stall).await?,
            Fault::LinkCut => {
                self.done.link_cuts += 1;
                self.proxy.cut_all().await;
            }
            Fault::LinkCutAfter { bytes, to_broker } => {
                self.done.link_cuts += 1;
                let bytes = Some(bytes);
                let (to_broker, to_client) = if to_broker { (bytes, None) } else { (None, bytes) };
                self.proxy.set_plan(CutPlan::After { to_broker, to_client }).await;
                self.proxy.cut_all().await;
                let cuts = self.proxy.counts().cuts;
                let deadline = Instant::now() + LINK_CUT_WITHIN;
                while self.proxy.counts().cuts == cuts && Instant::now() < deadline {
                    self.look()?;
                    sleep(LOOK_EVERY).await;
                }
                self.proxy.set_plan(CutPlan::Never).await;
            }
            Fault::HalfOpen { to_broker, to_client, lasts, end } => {
                self.done.half_open += 1;
                self.proxy.stall(to_broker, to_client);
                self.pass(lasts).await?;
                if let Some(end) = end {
                    self.end_and_start(end, stall).await?;
                }
                self.proxy.stall(false, false);
            }
            Fault::BrokerRestart { away, end } => {
                self.done.broker_restarts += 1;
                self.broker.stop();
                let before = self.agent.folder().join("mosquitto-before.log");
                self.log.empty(&mut self.tally, &before).map_err(system("cannot read mosquitto's log"))?;
                self.pass(away).await?;
                if let Some(end) = end {
                    self.end_and_start(end, stall).await?;
                }
                self.broker.start_again();
            }
            Fault::DiskFull { room, lasts, end } => {
                self.done.disk_full += 1;
                self.agent.disk().fill_up(room).map_err(system("cannot fill the disk"))?;
                self.pass(lasts).await?;
                if let Some(end) = end {
                    self.finish(end).await?;
                }
                self.agent.disk().empty().map_err(system("cannot empty the disk"))?;
                if end.is_some() {
                    self.start(stall).await?;
                }
            }
        }
        Ok(())
    }

    async fn end_and_start(&mut self, end: End, stall: Duration) -> Result<(), Failure> {
        self.finish(end).await?;
        self.start(stall).await
    }

    /// Waits, but not long, for a commit that is not durable yet. Milliseconds decide: it does not sleep.
    fn until_syncing(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + SYNCING_WITHIN;
        let syncing = || self.agent.disk().is_syncing().map_err(system("cannot ask the disk"));
        while Instant::now() < deadline && !syncing()? {}
        Ok(())
    }

    /// Ends the agent.
    async fn finish(&mut self, end: End) -> Result<(), Failure> {
        if !matches!(end, End::StopThenPowerCut(_)) && self.plan.random().bool() {
            self.until_syncing()?;
        }
        let keep = match end {
            End::Kill => {
                self.done.kills += 1;
                return self.agent.kill().map_err(system("cannot kill the agent"));
            }
            End::PowerCut(keep) => keep,
            End::StopThenPowerCut(keep) => {
                self.agent.ask_to_stop().map_err(system("cannot stop the agent"))?;
                self.until_stopped().await?;
                keep
            }
        };
        self.agent.kill().map_err(system("cannot kill the agent"))?;
        // What it had sent may have come through or not.
        if self.plan.random().bool() {
            self.proxy.cut_all().await;
        }
        let lost = self.agent.cut_power(keep, self.plan.random());
        let lost = lost.map_err(system("cannot put the synced files in place"))?;
        self.done.power_cuts += 1;
        self.done.power_cuts_that_lost += u64::from(lost.sectors > 0);
        self.done.sectors_lost += lost.sectors;
        Ok(())
    }

    async fn until_stopped(&mut self) -> Result<(), Failure> {
        let deadline = Instant::now() + SOON;
        while self.agent.is_running().map_err(system("cannot ask after the agent's process"))? {
            self.look_at_messages()?;
            if Instant::now() >= deadline {
                return Err(Failure::TooLate { what: "the agent's end after SIGTERM", within: SOON });
            }
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    async fn start(&mut self, stall: Duration) -> Result<(), Failure> {
        self.done.starts += 1;
        self.done.slow_starts += u64::from(!stall.is_zero());
        self.agent.start(stall).map_err(system("cannot start the agent"))?;
        self.until(SOON, "the agent's start", |trial| trial.agent.status().is_some()).await
    }

    /// Nothing new comes in, everything that waits is delivered, and the books are compared.
    async fn audit(&mut self) -> Result<(), Failure> {
        self.auditing = true;
        let mut last = None;
        let quiet = |trial: &mut Trial| {
            // In this order: what is accepted after it was asked would not be in its answer.
            if !trial.producer.is_still() {
                return false;
            }
            last = trial.agent.status();
            last.as_ref().is_some_and(drained)
        };
        self.until(DRAIN, "the delivery of everything that waits", quiet).await?;
        self.look()?;
        let deadline = Instant::now() + LOG_BEHIND;
        while self.tally.missing() > 0 && Instant::now() < deadline {
            self.look()?;
            sleep(LOOK_EVERY).await;
        }
        self.gaps = last.map_or(0, |status| status.dropped.values().sum::<u64>() + status.dead_letters);
        Ok(())
    }

    /// Right after an audit nothing may be missing; at any other time that says nothing.
    fn is_spoilt(&mut self) -> Result<bool, Failure> {
        let quarantined = self.agent.quarantined().map_err(system("cannot read the agent's folder"))?;
        self.quarantined = quarantined.len() as u64;
        let audited = self.cycles > 0 && self.cycles.is_multiple_of(AUDIT_EVERY);
        let missing = audited && self.tally.missing() > 0;
        let corrupt = self.quarantined > 0 || self.witness.corrupt() > 0;
        Ok(missing || corrupt || self.gaps > 0 || self.tally.is_spoilt(self.settings.qos))
    }

    async fn pass(&mut self, time: Duration) -> Result<(), Failure> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.look()?;
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    async fn until(
        &mut self,
        within: Duration,
        what: &'static str,
        mut condition: impl FnMut(&mut Trial) -> bool,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + within;
        loop {
            self.look()?;
            if condition(self) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Failure::TooLate { what, within });
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Looks at everything once, and shows it. The agent must be running, or not have been started.
    fn look(&mut self) -> Result<(), Failure> {
        self.look_at_messages()?;
        match self.agent.ended().map_err(system("cannot ask after the agent's process"))? {
            Some(status) => Err(Failure::Ended(status)),
            None => Ok(()),
        }
    }

    fn look_at_messages(&mut self) -> Result<(), Failure> {
        for (n, answer) in self.producer.heard() {
            self.tally.answered(n, answer);
        }
        self.log.follow(&mut self.tally).map_err(system("cannot read mosquitto's log"))?;
        self.producer.hold(self.auditing || self.tally.missing() > UNDER_WAY_MAX);
        let (accepted, missing, now) = (self.tally.accepted(), self.tally.missing(), &self.now);
        self.screen.show(self.cycles, || format!("{accepted} accepted, {missing} under way; {now}"));
        Ok(())
    }
}

/// The lines of mosquitto's logs that tell of a message's PUBLISHes.
pub(crate) fn receptions(agent: &Agent, n: u64) -> String {
    let bytes = crate::tally::payload(n).len();
    let ends = format!("'{}', ... ({bytes} bytes))", topic(n));
    let logs = ["mosquitto-before.log", "mosquitto.log"].map(|name| agent.folder().join(name));
    let texts = logs.map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let lines = texts.iter().flat_map(|text| text.lines());
    let ours = lines.filter(|line| line.contains("Received PUBLISH from") && line.ends_with(&ends));
    ours.map(|line| format!("    {line}\n")).collect()
}
