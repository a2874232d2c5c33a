//! The way down: recorded commands to the lines, and their answers to the outbox.
//!
//! What follows from what is decided by the [`Desk`]; here it is waited for and carried out.
//! Invariant (P8): a write is handed to its line after the store has said that its beginning is on the disk.

pub mod desk;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::clock;
use crate::command::{CommandStep, Recorded, Stepped, Ticket, Write, Written};
use crate::policy::command::{self, Judge};
use crate::progress::{IDLE, Pulse};
use crate::stats::Stats;
use crate::store;
use crate::trouble::Trouble;
use desk::{Desk, Effect, Limits};

/// Pause before a question to a database that failed is put again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What the task is made with, and what may change while it runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Goes up with each change.
    pub number: u64,
    /// The gateway's id.
    pub gateway: String,
    /// What commands are judged by.
    pub judge: command::Settings,
    /// How they are limited.
    pub limits: Limits,
    /// The lines, in the order of the configuration.
    pub lines: Vec<LineEnd>,
    /// Negative control of tests: a write leaves before the commit that begins it.
    pub break_order: bool,
}

/// Our end of a line.
#[derive(Debug, Clone)]
pub struct LineEnd {
    /// The line's number, never used twice.
    pub line: usize,
    /// Takes writes.
    pub writes: mpsc::Sender<Write>,
    /// How long a write that has begun may take before its end counts as unknown.
    pub patience: Duration,
}

enum Event {
    Recorded(Result<Vec<Recorded>, ()>),
    Stepped(CommandStep, Option<Stepped>),
    NotHandedOver(Ticket),
    Written(Written),
    Changed,
    Tick,
    Idle,
    Stop,
}

type Question = BoxFuture<'static, Event>;

/// Our ends of the lines, by their numbers.
type Lines = BTreeMap<usize, mpsc::Sender<Write>>;

/// Carries out commands until `stop` says so, then waits for the writes that are under way. The caller sets the
/// deadline of that; what is not over by then is answered as unknown at the next start.
///
/// `settings` may change: commands that wait are judged by the new ones, and a line that is not among them gets no new
/// write. `settled` is told the number of the newest settings once no other line has a write under way.
pub async fn run(
    mut settings: watch::Receiver<Settings>,
    settled: watch::Sender<u64>,
    store: store::Handle,
    mut written: mpsc::Receiver<Written>,
    stats: Arc<Stats>,
    mut stop: watch::Receiver<bool>,
    pulse: Pulse,
) {
    let mut number;
    let mut lines = Lines::new();
    let mut desk = {
        let settings = settings.borrow_and_update();
        number = settings.number;
        lines.extend(settings.lines.iter().map(|end| (end.line, end.writes.clone())));
        let (judge, patience_ms) = (Judge::new(settings.judge.clone()), patience_ms(&settings));
        let now_ms = clock::now().mono_ms;
        Desk::new(&settings.gateway, judge, settings.limits, patience_ms, Arc::clone(&stats), now_ms)
    };
    if settings.borrow().break_order {
        desk.break_order();
    }
    let mut newest = store.newest_command();
    let mut questions: FuturesUnordered<Question> = FuturesUnordered::new();
    let Some(()) = interrupted(&store, &mut desk, &mut stop, &pulse).await else { return };
    let (mut taking, mut stopping) = (false, false);
    let mut refusals = Refusals::new(stats);
    loop {
        refusals.look();
        for effect in desk.take_effects() {
            questions.extend(carry_out(effect, &store, &lines).await);
        }
        if *settled.borrow() != number && !desk.is_leaving() {
            settled.send_replace(number);
            lines.retain(|line, _| desk.has(*line));
        }
        if stopping && desk.is_idle() {
            return;
        }
        let known = *newest.borrow_and_update();
        if let Some((after, count)) = desk.wants(known, clock::now().mono_ms).filter(|_| !taking && !stopping)
        {
            taking = true;
            questions.push(take(store.clone(), after, count));
        }
        let wake_ms = desk.next_ms(known);
        let tick = async {
            match wake_ms {
                Some(at_ms) => {
                    sleep(Duration::from_millis(at_ms.saturating_sub(clock::now().mono_ms).max(1))).await;
                }
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            Some(event) = questions.next() => event,
            Some(written) = written.recv() => Event::Written(written),
            Ok(()) = settings.changed() => Event::Changed,
            Ok(()) = newest.changed() => Event::Tick,
            () = tick => Event::Tick,
            () = sleep(IDLE) => Event::Idle,
            _ = stop.wait_for(|stop| *stop), if !stopping => Event::Stop,
        };
        let now = clock::now();
        // While the store owes an answer, only an answer is progress.
        if questions.is_empty() || matches!(event, Event::Recorded(_) | Event::Stepped(..)) {
            pulse.beat(now.mono_ms);
        }
        match event {
            Event::Recorded(recorded) => {
                taking = false;
                desk.on_recorded(recorded.unwrap_or_default(), now);
            }
            Event::Stepped(step, stepped) => desk.on_stepped(step, stepped, now),
            Event::NotHandedOver(ticket) => desk.on_not_handed_over(ticket, now),
            Event::Written(written) => desk.on_written(written, now),
            Event::Changed => {
                let settings = settings.borrow_and_update();
                number = settings.number;
                lines.extend(settings.lines.iter().map(|end| (end.line, end.writes.clone())));
                let (judge, patience_ms) = (Judge::new(settings.judge.clone()), patience_ms(&settings));
                desk.change(judge, settings.limits, &patience_ms, now);
            }
            Event::Tick => desk.tick(now),
            Event::Idle => {}
            Event::Stop => {
                stopping = true;
                desk.stop();
            }
        }
    }
}

/// Commands that are not carried out, said as they repeat: whoever sends them can send many. Why, each one's answer
/// says, and those that reach a line are that line's to tell.
struct Refusals {
    stats: Arc<Stats>,
    started: Instant,
    refused: u64,
    refusal: Trouble,
    expired: u64,
    expiry: Trouble,
}

impl Refusals {
    fn new(stats: Arc<Stats>) -> Self {
        let (refused, expired) = (stats.commands_refused.get(), stats.commands_expired.get());
        let (refusal, expiry) = (Trouble::default(), Trouble::default());
        Refusals { stats, started: Instant::now(), refused, refusal, expired, expiry }
    }

    fn look(&mut self) {
        let now_ms = self.started.elapsed().as_millis() as u64;
        let (refused, expired) = (self.stats.commands_refused.get(), self.stats.commands_expired.get());
        let (refused_now, expired_now) = (refused - self.refused, expired - self.expired);
        (self.refused, self.expired) = (refused, expired);
        if refused_now > 0
            && let Some(more) = self.refusal.happened_times("", refused_now, now_ms)
        {
            warn!("{} refused; each one's answer says why", more.of("command"));
        }
        if expired_now > 0
            && let Some(more) = self.expiry.happened_times("", expired_now, now_ms)
        {
            warn!("{} came too late and not carried out", more.of("command"));
        }
    }
}

/// What had begun when the agent ended. `None`: stopped before the store could tell.
async fn interrupted(
    store: &store::Handle,
    desk: &mut Desk,
    stop: &mut watch::Receiver<bool>,
    pulse: &Pulse,
) -> Option<()> {
    let (mut waiting, started) = (Trouble::default(), Instant::now());
    loop {
        let begun = store.interrupted().await;
        pulse.beat(clock::mono_ms());
        match begun {
            Ok(begun) => {
                if !begun.is_empty() {
                    info!(
                        commands = begun.len(),
                        "commands were under way when the agent ended: answered as unknown"
                    );
                }
                desk.on_interrupted(begun, clock::now());
                return Some(());
            }
            Err(Some(error)) => {
                let now_ms = started.elapsed().as_millis() as u64;
                if let Some(more) = waiting.happened(&error.to_string(), now_ms) {
                    warn!(%error, "commands wait for the database{more}");
                }
            }
            Err(None) => return None,
        }
        tokio::select! {
            () = sleep(ASK_AGAIN) => {}
            _ = stop.wait_for(|stop| *stop) => return None,
        }
    }
}

fn patience_ms(settings: &Settings) -> BTreeMap<usize, u64> {
    let ms = |end: &LineEnd| u64::try_from(end.patience.as_millis()).unwrap_or(u64::MAX);
    settings.lines.iter().map(|end| (end.line, ms(end))).collect()
}

async fn carry_out(effect: Effect, store: &store::Handle, lines: &Lines) -> Option<Question> {
    match effect {
        Effect::Step(step) => {
            // In the order of the effects; only their commits are awaited together.
            let stepping = store.step(step.clone()).await;
            Some(Box::pin(async move {
                let stepped = match stepping {
                    Some(stepping) => stepping.settled().await.ok(),
                    None => None,
                };
                Event::Stepped(step, stepped)
            }))
        }
        Effect::Write { line, write } => {
            let ticket = write.ticket;
            let handed = lines.get(&line).is_some_and(|line| line.try_send(write).is_ok());
            (!handed).then(|| -> Question { Box::pin(std::future::ready(Event::NotHandedOver(ticket))) })
        }
    }
}

fn take(store: store::Handle, after: u64, count: usize) -> Question {
    Box::pin(async move {
        let recorded = store.recorded(after, count).await;
        if recorded.is_err() {
            sleep(ASK_AGAIN).await;
        }
        Event::Recorded(recorded.map_err(drop))
    })
}
