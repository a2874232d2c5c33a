//! The story, scene by scene, and what must be true in each.
//!
//! Invariant: every wait has a deadline and ends in words that say what did not happen.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::agent::{Agent, GATEWAY, Home, PublishError};
use crate::device::{Device, UNITS};
use crate::ledger::{self, LedgerError};
use crate::screen::{Screen, View, queue};
use crate::support::broker::{Broker, BrokerServer, Kind, Limits, Memory};
use crate::tally::{Arrival, Known, Ledger, Tally, tally};

/// How often each unit is read.
const EVERY: Duration = Duration::from_millis(100);

/// The broker's PUBREC and PUBCOMP take this long, as over a mobile network: long enough that messages are in
/// the middle of their exchange whenever something breaks.
const ANSWER_DELAY: Duration = Duration::from_millis(100);

/// Messages the broker lets be in flight.
const RECEIVE_MAXIMUM: u16 = 20;

/// Notes handed in at once.
const NOTES: u64 = 25;

/// How often the screen and the conditions are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// For what takes a moment on an idle machine: starting, connecting, stopping.
const SOON: Duration = Duration::from_secs(10);

/// For the drain, about 3 s on an idle machine.
const DRAIN: Duration = Duration::from_secs(20);

/// What there is to see of a steady state.
const SCENE: Duration = Duration::from_secs(5);

/// Why the show did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// A deadline passed.
    #[error("{what} did not happen within {} s", within.as_secs())]
    TooLate { what: &'static str, within: Duration },
    /// The agent ended by itself.
    #[error("the agent ended by itself: {0}")]
    Ended(ExitStatus),
    /// The agent did not stop as asked.
    #[error("the agent was asked to stop and ended with {0}")]
    BadStop(ExitStatus),
    /// A note was not accepted.
    #[error("{0}")]
    Publish(#[from] PublishError),
    /// The database could not be read.
    #[error("{0}")]
    Ledger(#[from] LedgerError),
    /// Less was found than had been accepted.
    #[error("{what}: {before} before, {after} after")]
    Shrunk { what: &'static str, before: u64, after: u64 },
    /// The operating system refused.
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    /// The whole took too long.
    #[error("the demo did not end within {} s", .0.as_secs())]
    TooLong(Duration),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |source| Failure::System { what, source }
}

/// Everything on the stage.
pub(crate) struct Show {
    screen: Screen,
    device: Device,
    device_on: bool,
    broker: BrokerServer,
    broker_up: bool,
    home: Home,
    protocol: String,
    agent: Option<Agent>,
    starts: u32,
    notes: u64,
}

impl Show {
    /// Sets the stage: device and broker run, the agent does not yet.
    pub(crate) async fn prepare(protocol: &str) -> Result<Show, Failure> {
        let device = Device::start().await.map_err(system("cannot start the simulated device"))?;
        let limits = Limits { receive_maximum: Some(RECEIVE_MAXIMUM), ..Limits::default() };
        let mut broker = Broker::with_limits(limits);
        broker.log.keep_packets = false;
        let delay_ms = ANSWER_DELAY.as_millis() as u64;
        broker.script.delay_ms = [(Kind::Pubrec, delay_ms), (Kind::Pubcomp, delay_ms)].into();
        let broker = BrokerServer::start(broker).await.map_err(system("cannot start the broker"))?;
        let home = Home::new(&broker.url(), protocol, device.port(), EVERY)
            .map_err(system("cannot write into the temporary folder"))?;
        Ok(Show {
            screen: Screen::new(),
            device,
            device_on: true,
            broker,
            broker_up: true,
            home,
            protocol: protocol.to_owned(),
            agent: None,
            starts: 0,
            notes: 0,
        })
    }

    /// Plays all of it.
    pub(crate) async fn play(&mut self) -> Result<Tally, Failure> {
        self.say_what_is_shown();
        self.normal_operation().await?;
        let before = self.broker_goes_away().await?;
        let served_at_kill = self.agent_is_killed(before).await?;
        self.agent_starts_again().await?;
        self.broker_comes_back().await?;
        let ledger = self.all_goes_quiet().await?;
        let known = Known {
            topics: self.home.topics(),
            notes_topic: self.home.notes_topic(),
            notes: self.notes,
            served_at_kill,
            served: self.device.served(),
        };
        let verdict = self.verdict(&ledger, &known).await;
        Ok(verdict)
    }

    /// Ends what runs, and leaves the screen as it is. For every way out.
    pub(crate) async fn end(mut self) -> (Screen, Home) {
        if let Some(agent) = self.agent.take() {
            // It may have ended by itself.
            let _ = agent.kill().await;
        }
        self.screen.close();
        (self.screen, self.home)
    }

    fn say_what_is_shown(&self) {
        let (rate, protocol) = (UNITS.len() as u128 * 1000 / EVERY.as_millis(), &self.protocol);
        let delay = ANSWER_DELAY.as_millis();
        self.screen.say(&format!(
            "fieldpost: nothing is lost, nothing comes twice\n\
             \n\
             \x20 a Modbus TCP device      the agent, for real           an MQTT {protocol} broker\n\
             \x20 simulated in here   -->  a process of its own     -->  in here, answers after {delay} ms\n\
             \x20 {rate} readings a second     every message on disk first   counts each message once\n\
             \n\
             \x20 All messages go at QoS 2, exactly once. The agent's log: {}",
            self.home.log().display()
        ));
    }

    async fn normal_operation(&mut self) -> Result<(), Failure> {
        self.screen.scene(
            "1  Normal operation",
            "   The agent reads the device, writes every reading to its database, and then publishes it.",
        );
        self.start_agent()?;
        self.until(SOON, "the agent's connection to the broker", View::connected).await?;
        self.until(SOON, "the first reading's arrival at the broker", |view| view.received > 0).await?;
        self.watch(SCENE).await?;
        let view = self.look().await?;
        let oldest = view.oldest().unwrap_or_default();
        self.screen.shown(&format!(
            "{} readings have arrived; the queue is short: {} messages, the oldest {} ms old",
            view.received,
            view.queue().unwrap_or(0),
            oldest.as_millis()
        ));
        Ok(())
    }

    /// Returns what the agent says it has accepted.
    async fn broker_goes_away(&mut self) -> Result<u64, Failure> {
        self.screen.scene(
            "2  The broker goes away, in the middle of it",
            "   Reading goes on at full rate. What cannot be sent waits on disk, and so do notes handed in by hand.",
        );
        if !self.broker.wait_for(SOON, has_unanswered).await {
            return Err(Failure::TooLate { what: "a message in the middle of its exchange", within: SOON });
        }
        self.broker.stop(Memory::Kept).await;
        self.broker_up = false;
        self.until(SOON, "the agent's notice that the broker is gone", |view| !view.connected()).await?;
        self.watch(SCENE / 2).await?;
        self.hand_in_notes().await?;
        self.watch(SCENE).await?;
        let status = self.look().await?.status;
        let Some(status) = status else {
            return Err(Failure::TooLate { what: "the agent's answer", within: SOON });
        };
        let accepted = status.counters.get("messages_accepted").copied().unwrap_or(0);
        self.screen.shown(&format!("{} messages wait, {accepted} were accepted so far", queue(&status)));
        Ok(accepted)
    }

    /// Returns how many readings of each unit the device has served by then.
    async fn agent_is_killed(&mut self, accepted: u64) -> Result<[u32; UNITS.len()], Failure> {
        self.screen.scene(
            "3  The agent is killed: kill -9",
            "   No goodbye, no flush. What it had only in memory is gone; what it had accepted must be on disk.",
        );
        let agent = self.agent.take().expect("it runs since scene 1");
        let pid = agent.pid();
        agent.kill().await.map_err(system("cannot kill the agent"))?;
        let ledger = ledger::read(&self.home.database())?;
        let found = ledger.readings + ledger.notes;
        if found < accepted {
            let what = "accepted messages, before the kill and in the database after it";
            return Err(Failure::Shrunk { what, before: accepted, after: found });
        }
        self.screen.shown(&format!(
            "process {pid} is dead; of {found} accepted messages {} wait in its database, {} of them half sent",
            ledger.waiting, ledger.in_exchange
        ));
        self.watch(SCENE / 2).await?;
        // What had been asked before the kill has been answered by now.
        Ok(self.device.served())
    }

    async fn agent_starts_again(&mut self) -> Result<(), Failure> {
        self.screen.scene(
            "4  It starts again: nothing was lost",
            "   The queue is where it was, and grows on: there is still no broker.",
        );
        let before = ledger::read(&self.home.database())?;
        self.start_agent()?;
        let view = self.until(SOON, "the new agent's answer", |view| view.status.is_some()).await?;
        let after = view.queue().unwrap_or(0);
        if after < before.waiting {
            let what = "messages in the queue, before the restart and after it";
            return Err(Failure::Shrunk { what, before: before.waiting, after });
        }
        let pid = self.agent.as_ref().map_or(0, Agent::pid);
        let before = before.waiting;
        self.screen.shown(&format!(
            "process {pid} found {before} messages in the database, and queues {after} by now"
        ));
        self.hand_in_notes().await?;
        self.watch(SCENE).await
    }

    async fn broker_comes_back(&mut self) -> Result<(), Failure> {
        self.screen.scene(
            "5  The broker comes back: the queue drains",
            "   Exchanges that were cut go on where they were, notes go first, then the readings in their order.",
        );
        let backlog = self.look().await?.queue().unwrap_or(0);
        self.broker.start_again().await.map_err(system("the broker cannot listen again"))?;
        self.broker_up = true;
        self.screen.begin_drain(backlog);
        let began = Instant::now();
        let drained = |view: &View| {
            view.connected() && view.oldest().is_some_and(|oldest| oldest < Duration::from_secs(1))
        };
        self.until(DRAIN, "the queue's drain", drained).await?;
        self.screen.end_drain();
        let took = began.elapsed().as_secs_f32();
        self.screen.shown(&format!("{backlog} messages drained in {took:.1} s, while the reading went on"));
        self.watch(SCENE / 5).await
    }

    /// Returns what the database says in the end.
    async fn all_goes_quiet(&mut self) -> Result<Ledger, Failure> {
        self.screen.scene(
            "6  The device is switched off, and the agent stops",
            "   \"bad\" is reported, once and with the reason, never an old value. Then all is counted.",
        );
        self.device.switch_off();
        self.device_on = false;
        let quiet = |view: &View| {
            let noticed = |status: &fieldpost::control::wire::Status| {
                status.lines.iter().all(|line| !line.up && line.units.iter().all(|unit| !unit.ok))
            };
            view.status.as_ref().is_some_and(noticed) && view.queue() == Some(0)
        };
        self.until(SOON, "the last message's delivery", quiet).await?;
        // A unit's "bad" may be on its way to the outbox while the queue is empty.
        self.watch(Duration::from_millis(500)).await?;
        self.until(SOON, "the last message's delivery", quiet).await?;
        let agent = self.agent.take().expect("it runs since scene 4");
        match agent.stop(SOON).await.map_err(system("cannot stop the agent"))? {
            None => return Err(Failure::TooLate { what: "the agent's stop", within: SOON }),
            Some(status) if !status.success() => return Err(Failure::BadStop(status)),
            Some(_) => {}
        }
        Ok(ledger::read(&self.home.database())?)
    }

    async fn verdict(&mut self, ledger: &Ledger, known: &Known) -> Tally {
        let (arrivals, violations, resent) = self
            .broker
            .with(|broker| (arrivals(broker), broker.violations(), broker.log.counters.repeats))
            .await;
        let mut verdict = tally(&arrivals, ledger, known);
        let violation = |text: String| format!("the agent broke a rule of MQTT: {text}");
        verdict.faults.extend(violations.into_iter().map(violation));
        let Tally { in_memory, bad, .. } = verdict;
        self.screen.say(&format!(
            "\n  accepted    {} readings and {} notes: the numbers that the outbox has given, read from its database\n\
             \x20 delivered   PUBLISHes that the broker took for the first time; {resent} resent ones it recognised\n\
             \x20 not counted {in_memory} readings that were in memory, and not yet accepted, when the agent was killed\n\
             \x20 checked     order by topic; every reading of the device once; {bad} times \"bad\"; the rules of MQTT\n",
            ledger.readings, ledger.notes
        ));
        verdict
    }

    fn start_agent(&mut self) -> Result<(), Failure> {
        self.starts += 1;
        self.agent = Some(Agent::start(&self.home).map_err(system("cannot start the agent"))?);
        Ok(())
    }

    /// Nothing is killed meanwhile, so that every note is either accepted or the end of the show.
    async fn hand_in_notes(&mut self) -> Result<(), Failure> {
        let Some(agent) = &self.agent else { return Ok(()) };
        let notes = (self.notes + 1)..=(self.notes + NOTES);
        let payloads = notes.map(|note| format!(r#"{{"note":{note},"text":"valve 7 checked"}}"#)).collect();
        agent.publish(&self.home.notes_topic(), payloads).await?;
        self.notes += NOTES;
        self.screen.shown(&format!("{NOTES} notes were handed in, and all are accepted: they are on disk"));
        Ok(())
    }

    /// Shows what happens for some time.
    async fn watch(&mut self, time: Duration) -> Result<(), Failure> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.look().await?;
            sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Shows what happens until the condition holds.
    async fn until(
        &mut self,
        within: Duration,
        what: &'static str,
        condition: impl Fn(&View) -> bool,
    ) -> Result<View, Failure> {
        let deadline = Instant::now() + within;
        loop {
            let view = self.look().await?;
            if condition(&view) {
                return Ok(view);
            }
            if Instant::now() >= deadline {
                return Err(Failure::TooLate { what, within });
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Looks at everything once, and shows it.
    async fn look(&mut self) -> Result<View, Failure> {
        let ended = self.agent.as_mut().map_or(Ok(None), Agent::ended);
        if let Some(status) = ended.map_err(system("cannot ask after the agent's process"))? {
            return Err(Failure::Ended(status));
        }
        let (received, recognised) = self
            .broker
            .with(|broker| {
                let ours = broker.received().iter().filter(|received| is_ours(&received.topic));
                (ours.count() as u64, broker.log.counters.repeats)
            })
            .await;
        let view = View {
            device: self.device_on.then(|| self.device.measured()),
            agent: self.agent.as_ref().map(|agent| (agent.pid(), self.starts)),
            status: self.agent.as_ref().and_then(Agent::status),
            broker_up: self.broker_up,
            received,
            recognised,
        };
        self.screen.show(&view);
        Ok(view)
    }
}

/// Whether a QoS 2 message is here whose PUBREC has not left: its resend would be a duplicate to any broker or
/// agent that kept no record of it.
fn has_unanswered(broker: &Broker) -> bool {
    broker.session(GATEWAY).is_some_and(|session| session.held.values().any(|held| held.pubrec_no.is_none()))
}

/// What the agent says about itself is not stored, and so not counted.
fn is_ours(topic: &str) -> bool {
    !topic.starts_with("fieldpost/")
}

fn arrivals(broker: &Broker) -> Vec<Arrival> {
    let ours = broker.received().iter().filter(|received| is_ours(&received.topic));
    ours.map(|received| Arrival {
        topic: received.topic.to_string(),
        qos: received.qos,
        payload: received.payload.to_vec(),
        released: received.onward,
    })
    .collect()
}
