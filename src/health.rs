//! What is told about the gateway's own state: status screens, the health message, unit states, gap records.
//!
//! One task answers the control socket and HTTP, and speaks for the gateway. Invariant: what a limit or damage took is
//! told upstream (P5), and its gap is closed in the transaction that stores the telling.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use crate::clock::correction::{self, Correction};
use crate::clock::{self, Stamp};
use crate::control::wire::{self, Answer};
use crate::control::{Ask, Request};
use crate::logging::left_out;
use crate::message::{Lane, Message, Qos, Topic};
use crate::point::{Fault, Value};
use crate::policy::format::{
    self, BudgetHealth, CommandsHealth, Health, LaneHealth, LineHealth, LinkHealth, StoreHealth,
};
use crate::process;
use crate::progress::Pulse;
use crate::queue;
use crate::source::machine::{Sensor, Values};
use crate::source::modbus::LineStatus;
use crate::stats::Stats;
use crate::store::{self, Damage, Gap, Look, NotAccepted, StoreError};
use crate::summary::{self, summary};
use crate::trouble::{Trouble, counted, span};
use crate::uplink::connection::{LinkState, LinkStatus};
use crate::uplink::presence::{Announcement, Presence};

/// How often states and gaps are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Without a loss for so long, it is over: whole segments go at once, and at a low rate the next is full much later.
const LOSSES_END: Duration = Duration::from_secs(600);
/// Publish requests that wait for their commit, at most.
const PUBLISHING_MAX: usize = 4096;

/// Corrections of the clock that wait for a store that takes nothing, at most.
const CORRECTIONS_MAX: usize = 64;

/// Topics of which the broker is told that nothing is there any more, at most; beyond it the first are forgotten.
const GONE_MAX: usize = 512;

/// What a changed configuration changes of what is told.
#[derive(Debug, Clone)]
pub struct Scope {
    /// How often the health message is published.
    pub health_interval: Duration,
    /// Topics and payloads of what we say about ourselves.
    pub presence: Presence,
    /// Every line's state, in the order of the configuration.
    pub lines: Vec<watch::Receiver<LineStatus>>,
    /// What the machine said of itself last.
    pub machine: watch::Receiver<Values>,
}

/// What does not change while the agent runs.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The gateway's id.
    pub gateway: String,
    /// The database file.
    pub store_path: String,
    /// The kernel's name for this boot.
    pub boot_id: String,
    /// When the agent started.
    pub started: Stamp,
}

/// The task and what it looks at.
pub struct Reporter {
    /// What does not change.
    pub facts: Facts,
    /// What does, as it is now.
    pub scope: Scope,
    /// As it is to be.
    pub scopes: watch::Receiver<Scope>,
    /// Whoever asks for the configuration to be read again.
    pub reloads: mpsc::Sender<oneshot::Sender<Answer>>,
    /// The outbox.
    pub store: store::Handle,
    /// The counters.
    pub stats: Arc<Stats>,
    /// The link's state.
    pub link: watch::Receiver<LinkStatus>,
    /// To the uplink: what is said outside the store.
    pub announcements: mpsc::Sender<Announcement>,
    /// To the uplink: QoS 0 messages.
    pub qos0: mpsc::Sender<Message>,
    /// How the agent is, in one line.
    pub summary: watch::Sender<String>,
    /// Where the reporter says that it makes progress: the store has answered it.
    pub pulse: Pulse,
}

enum Wake {
    Asked(Request),
    Published(oneshot::Sender<Answer>, Answer),
    Changed,
    Tick,
    Stop,
}

/// A publish request that waits for its commit.
type Published = BoxFuture<'static, (oneshot::Sender<Answer>, Answer)>;

impl Reporter {
    /// Runs until every asker has hung up or `stop` says so.
    pub async fn run(mut self, mut requests: mpsc::Receiver<Request>, mut stop: watch::Receiver<bool>) {
        let mut publishing: FuturesUnordered<Published> = FuturesUnordered::new();
        let mut told = Told::new();
        let mut losses = Losses::new();
        let mut watch = correction::Watch::default();
        let mut corrections = Vec::new();
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wake = tokio::select! {
                Some((reply, answer)) = publishing.next() => Wake::Published(reply, answer),
                Some(request) = requests.recv(), if publishing.len() < PUBLISHING_MAX => Wake::Asked(request),
                Ok(()) = self.scopes.changed() => Wake::Changed,
                _ = ticks.tick() => Wake::Tick,
                _ = stop.wait_for(|stop| *stop) => Wake::Stop,
            };
            match wake {
                Wake::Asked(request) => publishing.extend(self.answer(request).await),
                Wake::Published(reply, answer) => tell(reply, answer),
                Wake::Changed => self.adopt(&mut told),
                Wake::Tick => {
                    corrections.extend(watch.look(clock::now()));
                    let beyond = corrections.len().saturating_sub(CORRECTIONS_MAX);
                    self.stats.clock_corrections_dropped.add(beyond as u64);
                    corrections.truncate(CORRECTIONS_MAX);
                    self.tell_corrections(&mut corrections).await;
                    self.stats.log_lines_left_out.raise_to(left_out());
                    let look = self.store.look().await;
                    self.summarise(look.as_ref());
                    let look = look.and_then(Result::ok);
                    if let Some(look) = &look {
                        losses.look(look);
                    }
                    self.speak(&mut told, look.as_ref()).await;
                    self.pulse.beat(clock::mono_ms());
                }
                Wake::Stop => break,
            }
        }
        while let Some((reply, answer)) = publishing.next().await {
            tell(reply, answer);
        }
    }

    /// Takes the new scope, and notes what the broker keeps of the old one and nobody will speak of again.
    fn adopt(&mut self, told: &mut Told) {
        let before = self.kept_topics();
        self.scope = self.scopes.borrow_and_update().clone();
        let now = self.kept_topics();
        let is_gone = |topic: &Topic| !now.contains(topic);
        told.gone.extend(before.iter().cloned());
        told.gone.retain(is_gone);
        told.gone.drain(..told.gone.len().saturating_sub(GONE_MAX));
        told.cleared = false;
        if before != now {
            // What is said once more costs a message; what is not may have been cleared.
            told.units.clear();
            told.health = None;
        }
    }

    /// Every topic on which the broker keeps something of ours.
    fn kept_topics(&self) -> Vec<Topic> {
        let lines: Vec<_> = self.scope.lines.iter().map(|line| line.borrow().clone()).collect();
        let of_line = |line: &LineStatus| -> Vec<(String, String)> {
            line.units.iter().map(|unit| (line.name.clone(), unit.name.clone())).collect()
        };
        let units: Vec<_> = lines.iter().flat_map(of_line).collect();
        self.scope.presence.kept_topics(units.iter().map(|(line, unit)| (line.as_str(), unit.as_str())))
    }

    async fn answer(&self, Request { ask, reply }: Request) -> Option<Published> {
        match ask {
            Ask::Status => tell(reply, Answer::Status(Box::new(self.status().await))),
            Ask::Queue(ask) => {
                let store = self.store.clone();
                return Some(Box::pin(async move { (reply, browse(&store, &ask).await) }));
            }
            Ask::Reload => {
                if let Err(refused) = self.reloads.try_send(reply) {
                    let reason = "the agent is stopping, or busy with other reloads; try again".to_owned();
                    tell(refused.into_inner(), Answer::Refused { reason });
                }
            }
            Ask::Publish(mut messages) => {
                if let [message] = &messages[..]
                    && message.qos == Qos::AtMostOnce
                {
                    tell(reply, self.send_once(messages.remove(0)));
                    return None;
                }
                let (stats, count) = (Arc::clone(&self.stats), messages.len() as u64);
                // In the order of the requests (P4); only their commits are awaited together.
                let handed_in = self.store.hand_in(messages).await;
                return Some(Box::pin(async move {
                    let settled = async { handed_in?.settled().await };
                    let answer = match settled.await {
                        Ok(_) => Answer::Accepted {},
                        Err(refusal) => {
                            stats.messages_not_accepted.add(count);
                            Answer::Refused { reason: refusal.to_string() }
                        }
                    };
                    (reply, answer)
                }));
            }
        }
        None
    }

    fn summarise(&self, look: Option<&Result<Look, Arc<StoreError>>>) {
        let queue = match look {
            Some(Ok(look)) => {
                let messages = look.lanes.iter().map(|lane| lane.messages).sum();
                summary::Queue::Holds(messages, look.trouble.clone())
            }
            Some(Err(error)) => summary::Queue::Unreadable(error.to_string()),
            None => return, // the agent is stopping
        };
        let lines: Vec<_> = self.scope.lines.iter().map(|line| line.borrow().clone()).collect();
        let text = summary(&self.link.borrow(), &queue, &lines);
        self.summary.send_replace(text);
    }

    /// A QoS 0 message to the uplink.
    fn send_once(&self, message: Message) -> Answer {
        match self.qos0.try_send(message) {
            Ok(()) => Answer::HandedOver {},
            Err(_) => {
                self.stats.qos0_dropped.increment();
                Answer::Refused { reason: "the link is busy; QoS 0 messages are not queued".into() }
            }
        }
    }

    /// Says what has changed since it was last told, and what is due.
    async fn speak(&mut self, told: &mut Told, look: Option<&Look>) {
        let connected = self.link.borrow().state == LinkState::Connected;
        let connects = self.stats.connects.get();
        if !connected || told.connects != connects {
            // A new connection is told everything anew: retained states may have been lost with the session, and it
            // may be to another broker.
            (told.units, told.health, told.connects) = (BTreeMap::new(), None, connects);
            told.cleared = false;
        }
        if !connected {
            return;
        }
        if !told.cleared {
            // What does not fit is told at the next look.
            let clears = |topic: &Topic| self.announcements.try_send(Presence::cleared(topic)).is_ok();
            told.cleared = told.gone.iter().all(clears);
        }
        self.tell_units(told);
        let Some(look) = look else { return };
        if let Some(damage) = look.damage.as_ref().filter(|damage| told.damage.as_ref() != Some(*damage)) {
            self.tell_damage(damage).await;
            told.damage = Some(damage.clone());
        }
        if !look.gaps.is_empty() {
            self.tell_gaps(&look.gaps, told).await;
        }
        if told.health.is_none_or(|at| at.elapsed() >= self.scope.health_interval) {
            told.health = Some(Instant::now());
            let health = self.health(look);
            self.announce(health);
        }
    }

    fn tell_units(&self, told: &mut Told) {
        for line in &self.scope.lines {
            let line = line.borrow();
            for unit in line.units.iter().filter(|unit| unit.polls > 0) {
                let key = (line.name.clone(), unit.name.clone());
                if told.units.get(&key) == Some(&unit.ok) {
                    continue;
                }
                let fault = (!unit.ok).then(|| unit.last_error.as_deref().unwrap_or("it failed"));
                match self.scope.presence.unit(&line.name, &unit.name, fault, clock::now()) {
                    Ok(announcement) => self.announce(announcement),
                    Err(error) => {
                        let (line, unit) = (&*line.name, &*unit.name);
                        if told.topics.happened(&format!("{line}/{unit}"), told.now_ms()).is_some() {
                            warn!(%error, line, unit, "its state has no topic, so nobody is told of it");
                        }
                    }
                }
                told.units.insert(key, unit.ok);
            }
        }
    }

    async fn tell_damage(&self, damage: &Damage) {
        let text =
            format::damage(&self.facts.gateway, damage.salvaged, damage.lost, &damage.what, clock::now());
        let alarm = Message {
            topic: self.scope.presence.alarm_topic().clone(),
            qos: Qos::AtLeastOnce,
            retain: false,
            lane: Lane::Alarm,
            at: clock::now(),
            expires_after: None,
            correlation_data: None,
            payload: text,
        };
        let stored = self.store.append(vec![alarm]).await;
        self.pulse.beat(clock::mono_ms());
        if let Err(error) = stored {
            warn!(%error, "the alarm about the damaged database could not be stored");
        }
    }

    /// Through the store, connected or not; what it does not take is told at the next look.
    async fn tell_corrections(&self, corrections: &mut Vec<Correction>) {
        while let Some(correction) = corrections.first() {
            let now = clock::now();
            let message = Message {
                topic: self.scope.presence.clock_topic().clone(),
                qos: Qos::AtLeastOnce,
                retain: false,
                lane: Lane::Alarm,
                at: now,
                expires_after: None,
                correlation_data: None,
                payload: format::correction(&self.facts.gateway, &self.facts.boot_id, correction, now),
            };
            let stored = self.store.append(vec![message]).await;
            self.pulse.beat(clock::mono_ms());
            if let Err(error) = stored {
                debug!(%error, "the correction of this boot's times could not be stored; it is tried again");
                return;
            }
            info!(
                add_ms = correction.add_ms,
                "the clock is right; a correction of this boot's earlier times is sent"
            );
            corrections.remove(0);
        }
    }

    async fn tell_gaps(&self, gaps: &[Gap], told: &mut Told) {
        let message = |gap: &Gap| Message {
            topic: self.scope.presence.gap_topic().clone(),
            qos: Qos::AtLeastOnce,
            retain: false,
            lane: Lane::Alarm,
            at: clock::now(),
            expires_after: None,
            correlation_data: None,
            payload: format::gap(
                &self.facts.gateway,
                &format::Gap {
                    lane: gap.lane,
                    first_seq: gap.first,
                    last_seq: gap.last,
                    count: gap.count,
                    reason: &gap.reason,
                },
            ),
        };
        let outcome = self.store.report_gaps(gaps.iter().map(message).collect(), gaps.to_vec()).await;
        self.pulse.beat(clock::mono_ms());
        match outcome {
            Ok(_) => {
                let messages: u64 = gaps.iter().map(|gap| gap.count).sum();
                debug!(messages, "a gap record says which messages were dropped");
                told.gap_error.ended(told.now_ms());
            }
            Err(NotAccepted::Stopping) => {}
            Err(error) => {
                let now_ms = told.now_ms();
                if let Some(more) = told.gap_error.happened(&error.to_string(), now_ms) {
                    warn!(%error, "gap records could not be stored; they are tried again{more}");
                }
            }
        }
    }

    fn announce(&self, announcement: Announcement) {
        // The uplink's channel is full only while the link is stuck; then the next look tells it again.
        let _full = self.announcements.try_send(announcement);
    }

    fn health(&self, look: &Look) -> Announcement {
        let now = clock::now();
        let link = self.link.borrow();
        let queue = lanes(look, |lane, depth| LaneHealth {
            lane,
            messages: depth.messages,
            bytes: depth.bytes,
            oldest_age_s: depth.oldest_age_ms.map(|ms| ms / 1000),
        });
        let dropped = dropped_by_reason(look);
        let dropped: Vec<(&str, u64)> = dropped.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
        let lines: Vec<_> = self.scope.lines.iter().map(|line| line.borrow().clone()).collect();
        let lines: Vec<_> = lines
            .iter()
            .map(|line| LineHealth {
                name: &line.name,
                error: line.error.as_deref(),
                units: line
                    .units
                    .iter()
                    .map(|unit| (unit.name.as_str(), unit.last_error.as_deref().filter(|_| !unit.ok)))
                    .collect(),
            })
            .collect();
        self.scope.presence.health(&Health {
            at: now,
            uptime_s: now.ms_since(self.facts.started) / 1000,
            epoch: look.boot.epoch,
            link: LinkHealth {
                up_s: Some(now.mono_ms.saturating_sub(link.since_mono_ms) / 1000),
                connects: self.stats.connects.get(),
                connect_failures: self.stats.connect_failures.get(),
                last_error: link.last_error.as_deref(),
                downgrades: &link.downgrades,
            },
            queue: &queue,
            dropped: &dropped,
            dead_letters: look.dead_letters,
            store: StoreHealth {
                used_bytes: look.used_bytes,
                quota_bytes: look.quota,
                error: look.trouble.as_deref(),
            },
            budget: look.budget.as_ref().map(|budget| BudgetHealth {
                used_bytes: budget.used_bytes,
                bytes: budget.bytes,
                per: budget.per.name(),
                held_back: budget.held_back.clone(),
            }),
            commands: CommandsHealth {
                waiting: look.inbox,
                done: self.stats.commands_done.get(),
                refused: self.stats.commands_refused.get(),
                expired: self.stats.commands_expired.get(),
                failed: self.stats.commands_failed.get(),
                unknown: self.stats.commands_unknown.get(),
                repeated: self.stats.commands_repeated.get(),
            },
            lines: &lines,
        })
    }

    async fn status(&self) -> wire::Status {
        let now = clock::now();
        let look = self.store.look().await;
        let (look, error) = match look {
            Some(Ok(look)) => {
                let trouble = look.trouble.clone();
                (Some(look), trouble)
            }
            Some(Err(error)) => (None, Some(error.to_string())),
            None => (None, Some("the store has stopped".to_owned())),
        };
        let process = process::look();
        wire::Status {
            gateway: self.facts.gateway.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: now.ms_since(self.facts.started),
            link: self.link_status(now),
            queue: look
                .as_ref()
                .map_or_else(Vec::new, |look| lanes(look, |lane, depth| self.lane_queue(look, lane, depth))),
            dropped: look.as_ref().map_or_else(BTreeMap::new, dropped_by_reason),
            dead_letters: look.as_ref().map_or(0, |look| look.dead_letters),
            commands_waiting: look.as_ref().map_or(0, |look| look.inbox),
            store: wire::Store {
                path: self.facts.store_path.clone(),
                quota_bytes: look.as_ref().map_or(0, |look| look.quota),
                used_bytes: look.as_ref().map_or(0, |look| look.used_bytes),
                free_disk_bytes: look.as_ref().and_then(|look| look.free_disk),
                epoch: look.as_ref().map_or(0, |look| look.boot.epoch),
                accepting: error.is_none(),
                error,
                database_bytes: look.as_ref().map_or(0, |look| look.database_bytes),
                log_bytes: look.as_ref().map_or(0, |look| look.log_bytes),
                commits: wire::Commits {
                    number: self.stats.commit_times.number(),
                    total_us: self.stats.commit_times.total_us(),
                    up_to_us: self.stats.commit_times.up_to(),
                },
            },
            budget: look.and_then(|look| look.budget).map(|budget| wire::Budget {
                used_bytes: budget.used_bytes,
                bytes: budget.bytes,
                per: budget.per.name().into(),
                held_back: budget.held_back.iter().map(|lane| lane.name().to_owned()).collect(),
            }),
            lines: self.scope.lines.iter().map(|line| line_status(&line.borrow(), now)).collect(),
            machine: self.scope.machine.borrow().iter().map(machine_value).collect(),
            counters: self.stats.all().into_iter().map(|(name, n)| (name.to_owned(), n)).collect(),
            process: wire::Process {
                resident_bytes: process.resident_bytes,
                cpu_ms: process.cpu_ms,
                written_bytes: process.written_bytes,
            },
        }
    }

    fn lane_queue(&self, look: &Look, lane: Lane, depth: &store::LaneDepth) -> wire::LaneQueue {
        let dropped = look.dropped.iter().filter(|(of, ..)| *of == lane);
        wire::LaneQueue {
            lane: lane.name().into(),
            messages: depth.messages,
            bytes: depth.bytes,
            oldest_age_ms: depth.oldest_age_ms,
            in_flight: depth.in_flight,
            accepted: depth.accepted,
            dropped: dropped_of(look, lane),
            limit_bytes: depth.limit_bytes,
            accepted_since_start: self.stats.accepted_by_lane[lane as usize].get(),
            delivered_since_start: self.stats.delivered_by_lane[lane as usize].get(),
            dropped_by_reason: dropped.map(|(_, reason, count)| (reason.clone(), *count)).collect(),
            refusing: look.refusing[lane as usize].as_ref().map(ToString::to_string),
        }
    }

    fn link_status(&self, now: Stamp) -> wire::Link {
        let link = self.link.borrow();
        let (state, retry_in_ms) = match link.state {
            LinkState::Connecting => (wire::LinkState::Connecting, None),
            LinkState::Connected => (wire::LinkState::Connected, None),
            LinkState::Waiting { until_mono_ms } => {
                (wire::LinkState::Waiting, Some(until_mono_ms.saturating_sub(now.mono_ms)))
            }
        };
        wire::Link {
            state,
            state_age_ms: now.mono_ms.saturating_sub(link.since_mono_ms),
            broker: link.broker.clone(),
            protocol: link.protocol.into(),
            session_present: link.session_present,
            last_error: link.last_error.clone(),
            retry_in_ms,
            alarm: link.alarm.clone(),
            downgrades: link.downgrades.clone(),
            in_flight: link.in_flight,
            window: link.window,
            round_trip_ms: link.round_trip_ms,
            keep_alive_s: link.keep_alive_s,
        }
    }
}

/// What was told.
#[derive(Debug)]
struct Told {
    /// To this connection.
    units: BTreeMap<(String, String), bool>,
    health: Option<Instant>,
    gap_error: Trouble,
    /// States of units that have no topic.
    topics: Trouble,
    started: Instant,
    /// Connections there had been.
    connects: u64,
    /// Told once, through the store: it needs no repetition.
    damage: Option<Damage>,
    /// Topics that a change of the configuration left behind at the broker.
    gone: Vec<Topic>,
    /// Whether this connection was told of them.
    cleared: bool,
}

impl Told {
    fn new() -> Self {
        Told {
            units: BTreeMap::new(),
            health: None,
            gap_error: Trouble::default(),
            topics: Trouble::default(),
            started: Instant::now(),
            connects: 0,
            damage: None,
            gone: Vec::new(),
            cleared: false,
        }
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
}

/// What the log says of messages that a limit has taken, by lane and reason, connected or not.
struct Losses {
    started: Instant,
    /// `None` before the first look: what was dropped before this start is no news.
    known: Option<BTreeMap<(Lane, String), Loss>>,
}

#[derive(Default)]
struct Loss {
    count: u64,
    grew_ms: u64,
    trouble: Trouble,
}

impl Losses {
    fn new() -> Self {
        Losses { started: Instant::now(), known: None }
    }

    fn look(&mut self, look: &Look) {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let is_first = self.known.is_none();
        let known = self.known.get_or_insert_default();
        for (lane, reason, count) in &look.dropped {
            let loss = known.entry((*lane, reason.clone())).or_default();
            let more = count.saturating_sub(std::mem::replace(&mut loss.count, *count));
            if is_first || more == 0 {
                continue;
            }
            loss.grew_ms = now_ms;
            let lane = lane.name();
            match loss.trouble.happened_times("", more, now_ms) {
                Some(more) => {
                    let messages = more.of("message");
                    warn!(lane, reason, "{messages} dropped, and a gap record says so upstream");
                }
                None => debug!(lane, reason, "{} dropped", counted(more, "message")),
            }
        }
        let quiet_ms = LOSSES_END.as_millis() as u64;
        for ((lane, reason), loss) in known.iter_mut().filter(|(_, loss)| loss.grew_ms + quiet_ms <= now_ms) {
            if let Some(ended) = loss.trouble.ended(now_ms) {
                let (messages, within) = (counted(ended.times, "message"), span(ended.lasted_ms));
                info!(
                    lane = lane.name(),
                    reason, "no more messages are dropped; it was {messages} in {within}"
                );
            }
        }
    }
}

async fn browse(store: &store::Handle, ask: &wire::QueueAsk) -> Answer {
    match queue::ask(ask) {
        Err(reason) => Answer::Refused { reason },
        Ok(ask) => match store.browse(ask).await {
            Some(Ok(found)) => queue::answer(found),
            Some(Err(error)) => Answer::Refused { reason: error.to_string() },
            None => Answer::Refused { reason: "the agent is stopping".to_owned() },
        },
    }
}

fn tell(reply: oneshot::Sender<Answer>, answer: Answer) {
    // Whoever asked may have gone.
    let _gone = reply.send(answer);
}

fn lanes<T>(look: &Look, show: impl Fn(Lane, &store::LaneDepth) -> T) -> Vec<T> {
    Lane::ALL.into_iter().zip(&look.lanes).map(|(lane, depth)| show(lane, depth)).collect()
}

fn dropped_of(look: &Look, lane: Lane) -> u64 {
    look.dropped.iter().filter(|(of, ..)| *of == lane).map(|(.., count)| count).sum()
}

fn dropped_by_reason(look: &Look) -> BTreeMap<String, u64> {
    let mut dropped = BTreeMap::new();
    for (_, reason, count) in &look.dropped {
        *dropped.entry(reason.clone()).or_insert(0) += count;
    }
    dropped
}

fn machine_value((sensor, value): (&Sensor, &Result<Value, Fault>)) -> wire::MachineValue {
    wire::MachineValue {
        name: sensor.name().into(),
        value: value.as_ref().ok().map(format::number),
        unit: sensor.unit().map(str::to_owned),
        error: value.as_ref().err().map(Fault::to_string),
    }
}

fn line_status(line: &LineStatus, now: Stamp) -> wire::Line {
    wire::Line {
        name: line.name.clone(),
        up: line.up,
        error: line.error.clone(),
        units: line
            .units
            .iter()
            .map(|unit| wire::Unit {
                name: unit.name.clone(),
                ok: unit.ok,
                last_error: unit.last_error.clone(),
                polls: unit.polls,
                errors: unit.errors,
                errors_by_kind: unit.errors_by_kind.iter().map(|(kind, n)| ((*kind).into(), *n)).collect(),
                last_ok_age_ms: unit.last_ok.map(|at| now.ms_since(at)),
            })
            .collect(),
    }
}
