//! The store's thread: gathers what arrives into batches, commits them, and only then answers.
//!
//! Invariants: an answer is sent after COMMIT; a turn commits at once and takes every waiting append with
//! it; appends alone wait at most their lane's commit interval; an offer that finds nothing stays parked,
//! so that a message is accepted and handed out in one transaction.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::browse::{Ask, Found};
use super::{Append, Batch, Committed, Gap, Look, Settings, Settled, Store, StoreError};
use crate::clock;
use crate::command::{CommandStep, Recorded, Stepped};
use crate::message::{Lane, Message, PacketId, Seq};
use crate::progress::IDLE;
use crate::stats::Stats;
use crate::turn::{Begin, Change, Offer, OnSessionLoss, Taken};

/// Requests that wait for the thread, at most.
const REQUESTS_MAX: usize = 256;
/// Turns that wait for the thread: one with changes, one with an offer, one that ends a connection.
const TURNS_MAX: usize = 8;
/// Pause between two segments of the check behind the start: it yields to everything else.
const CHECK_PAUSE: Duration = Duration::from_millis(2);
/// Messages of one commit, about.
const COMMIT_MESSAGES: usize = 4096;

/// The messages are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accepted {
    /// How many.
    pub messages: usize,
}

/// Why messages were not accepted; none of them was stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAccepted {
    /// The quota is reached and the policy is to reject, or everything older is in flight.
    #[error("the queue is full: {used} of {quota} bytes; raise [store] quota or wait for the link")]
    QuotaFull {
        /// The quota in bytes.
        quota: u64,
        /// Bytes in use.
        used: u64,
    },
    /// A limit of the lane is reached and the policy is to reject, or everything older is in flight.
    #[error(
        "lane {lane} is full: {used} of {max}; raise {limit} of [store.lane.{lane}] or wait for the link"
    )]
    LaneFull {
        /// The lane.
        lane: Lane,
        /// The setting.
        limit: &'static str,
        /// Its value.
        max: u64,
        /// Bytes or messages in the lane.
        used: u64,
    },
    /// The disk has less free space than was asked for.
    #[error(
        "the disk is nearly full: {free} bytes are free, [store] min_free_disk wants {wanted}; make space on it"
    )]
    DiskLow {
        /// Free bytes of the file system.
        free: u64,
        /// `min_free_disk`.
        wanted: u64,
    },
    /// A payload above the limit.
    #[error("a payload of {bytes} bytes is larger than the {max} that are allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// QoS 0 messages are never stored.
    #[error("QoS 0 messages are not stored")]
    Qos0,
    /// The database could not be written. After a sync that failed it may be stored all the same.
    #[error("{0}")]
    Failed(Arc<StoreError>),
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

impl PartialEq for StoreError {
    fn eq(&self, other: &Self) -> bool {
        self.to_string() == other.to_string()
    }
}

impl Eq for StoreError {}

/// One turn of the session.
#[derive(Debug)]
pub struct Turn {
    /// The connection it belongs to.
    pub connection: u64,
    /// What was learned.
    pub changes: Vec<Change>,
    /// What can be taken; at most one offer is unanswered at any time.
    pub offer: Option<Offer>,
}

/// What became of a turn.
#[derive(Debug)]
pub enum Turned {
    /// Committed.
    Done {
        /// The connection.
        connection: u64,
        /// Whether a turn's changes were in it.
        settled: Option<Settled>,
        /// Inbound identifiers whose message was refused.
        refused: Vec<PacketId>,
        /// The answer to the offer, if this is one.
        taken: Option<Vec<Taken>>,
    },
    /// The commit failed; the connection and everything the session knows must go.
    Failed(Arc<StoreError>),
}

/// Messages that are on their way into the store.
#[derive(Debug)]
pub struct HandedIn {
    answer: oneshot::Receiver<Result<Accepted, NotAccepted>>,
}

impl HandedIn {
    /// Resolves once the messages are durable, or with the reason why none of them was stored.
    ///
    /// # Errors
    /// [`NotAccepted`].
    pub async fn settled(self) -> Result<Accepted, NotAccepted> {
        self.answer.await.unwrap_or(Err(NotAccepted::Stopping))
    }
}

/// A step of a command that is on its way into the store.
#[derive(Debug)]
pub struct Stepping {
    answer: oneshot::Receiver<Result<Stepped, Arc<StoreError>>>,
}

impl Stepping {
    /// Resolves once the step is durable.
    ///
    /// # Errors
    /// The store's, and then nothing is known of the step, which can be handed in again; `None` when it has stopped.
    pub async fn settled(self) -> Result<Stepped, Option<Arc<StoreError>>> {
        self.answer.await.map_err(|_| None)?.map_err(Some)
    }
}

type StepReply = oneshot::Sender<Result<Stepped, Arc<StoreError>>>;

enum Request {
    Step {
        step: CommandStep,
        reply: StepReply,
    },
    Recorded {
        after: u64,
        count: usize,
        reply: oneshot::Sender<Result<Vec<Recorded>, Arc<StoreError>>>,
    },
    Interrupted(oneshot::Sender<Result<Vec<Recorded>, Arc<StoreError>>>),
    Append {
        append: Append,
        reply: oneshot::Sender<Result<Accepted, NotAccepted>>,
    },
    Begin {
        owner: (String, String),
        policy: OnSessionLoss,
        unacked: Vec<(Lane, Seq)>,
        turned: mpsc::Sender<Turned>,
        reply: oneshot::Sender<Result<Begin, Arc<StoreError>>>,
    },
    Disown {
        epoch: u32,
        boot: u32,
        policy: OnSessionLoss,
        reply: oneshot::Sender<Result<Settled, Arc<StoreError>>>,
    },
    KeepOwners {
        owners: Vec<(String, String)>,
        policy: OnSessionLoss,
        reply: oneshot::Sender<Result<Settled, Arc<StoreError>>>,
    },
    Look(oneshot::Sender<Result<Look, Arc<StoreError>>>),
    Browse(Ask, oneshot::Sender<Result<Found, Arc<StoreError>>>),
    Close(oneshot::Sender<()>),
}

/// A way to the store's thread; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    /// Apart from the rest, so that the session never waits behind a crowd of producers.
    turns: mpsc::Sender<Turn>,
    settings: watch::Sender<Settings>,
    newest_command: watch::Receiver<u64>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Request")
    }
}

impl Handle {
    /// Resolves once the messages are durable, or with the reason why none of them was stored.
    ///
    /// # Errors
    /// [`NotAccepted`].
    pub async fn append(&self, messages: Vec<Message>) -> Result<Accepted, NotAccepted> {
        self.hand_in(messages).await?.settled().await
    }

    /// The first half of [`Handle::append`]: when it resolves, the messages have their place in the order. Whoever
    /// has several appends under way awaits this half of each in turn. (Polled together, as futures of one task,
    /// they may reach the store in any order: a budget that is used up or a full channel sends some back.)
    ///
    /// # Errors
    /// [`NotAccepted::Stopping`].
    pub async fn hand_in(&self, messages: Vec<Message>) -> Result<HandedIn, NotAccepted> {
        self.send(Append { messages, closes: Vec::new() }).await
    }

    /// Like [`Handle::append`], for messages that tell of gaps and close them.
    ///
    /// # Errors
    /// [`NotAccepted`].
    pub async fn report_gaps(
        &self,
        messages: Vec<Message>,
        closes: Vec<Gap>,
    ) -> Result<Accepted, NotAccepted> {
        self.send(Append { messages, closes }).await?.settled().await
    }

    /// The number of the newest recorded command, whenever it changes.
    pub fn newest_command(&self) -> watch::Receiver<u64> {
        self.newest_command.clone()
    }

    /// See [`Store::recorded`].
    ///
    /// # Errors
    /// The store's; `None` when it has stopped.
    pub async fn recorded(&self, after: u64, count: usize) -> Result<Vec<Recorded>, Option<Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Recorded { after, count, reply }).await.map_err(|_| None)?;
        answer.await.map_err(|_| None)?.map_err(Some)
    }

    /// See [`Store::interrupted`].
    ///
    /// # Errors
    /// As [`Handle::recorded`].
    pub async fn interrupted(&self) -> Result<Vec<Recorded>, Option<Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Interrupted(reply)).await.map_err(|_| None)?;
        answer.await.map_err(|_| None)?.map_err(Some)
    }

    /// Hands a command's step in; when this resolves it has its place in the order. `None`: the store has stopped.
    pub async fn step(&self, step: CommandStep) -> Option<Stepping> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Step { step, reply }).await.ok()?;
        Some(Stepping { answer })
    }

    async fn send(&self, append: Append) -> Result<HandedIn, NotAccepted> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Append { append, reply };
        self.requests.send(request).await.map_err(|_| NotAccepted::Stopping)?;
        Ok(HandedIn { answer })
    }

    /// Hands a turn over; its outcome comes through the channel given to [`Handle::begin`].
    /// `false`: the store has stopped.
    pub async fn turn(&self, turn: Turn) -> bool {
        self.turns.send(turn).await.is_ok()
    }

    /// Begins a connection; see [`Store::begin`]. Outcomes of its turns go to `turned`.
    ///
    /// # Errors
    /// The store's; `None` when it has stopped.
    pub async fn begin(
        &self,
        owner: (String, String),
        policy: OnSessionLoss,
        unacked: Vec<(Lane, Seq)>,
        turned: mpsc::Sender<Turned>,
    ) -> Result<Begin, Option<Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Begin { owner, policy, unacked, turned, reply };
        self.requests.send(request).await.map_err(|_| None)?;
        answer.await.map_err(|_| None)?.map_err(Some)
    }

    /// The database is a copy of the past; see [`Store::disown`].
    ///
    /// # Errors
    /// The store's; `None` when it has stopped.
    pub async fn disown(
        &self,
        epoch: u32,
        boot: u32,
        policy: OnSessionLoss,
    ) -> Result<Settled, Option<Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Disown { epoch, boot, policy, reply }).await.map_err(|_| None)?;
        answer.await.map_err(|_| None)?.map_err(Some)
    }

    /// Between two connections; see [`Store::keep_owners`].
    ///
    /// # Errors
    /// The store's; `None` when it has stopped.
    pub async fn keep_owners(
        &self,
        owners: Vec<(String, String)>,
        policy: OnSessionLoss,
    ) -> Result<Settled, Option<Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::KeepOwners { owners, policy, reply }).await.map_err(|_| None)?;
        answer.await.map_err(|_| None)?.map_err(Some)
    }

    /// Other settings from the next commit on; see [`Store::change`]. Nothing is waited for.
    pub fn change(&self, settings: Settings) {
        self.settings.send_replace(settings);
    }

    /// What screens show; `None` when the store has stopped.
    pub async fn look(&self) -> Option<Result<Look, Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Look(reply)).await.ok()?;
        answer.await.ok()
    }

    /// What people ask of the queue; `None` when the store has stopped.
    pub async fn browse(&self, ask: Ask) -> Option<Result<Found, Arc<StoreError>>> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Browse(ask, reply)).await.ok()?;
        answer.await.ok()
    }

    /// Commits what waits, moves the log into the database and closes it.
    pub async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            let _closed = answer.await;
        }
    }
}

/// Moves an open store onto its thread. Outcomes of turns that belong to no connection are thrown away.
///
/// # Errors
/// The operating system's, when it gives no thread.
pub fn spawn(store: Store, stats: Arc<Stats>) -> io::Result<(Handle, JoinHandle<()>)> {
    let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
    let (turns, session) = mpsc::channel(TURNS_MAX);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let commit_interval = store.settings.commit_interval;
    let (settings, changes) = watch::channel(store.settings.clone());
    let (newest_to, newest_command) = watch::channel(store.newest_command());
    let worker = Worker {
        store,
        stats,
        commit_interval,
        waiting: Vec::new(),
        waiting_messages: 0,
        steps: Vec::new(),
        newest_command: newest_to,
        due: None,
        changes: None,
        offer: None,
        turned: None,
        failed: false,
        checking: true,
        link_bytes: 0,
    };
    let thread = std::thread::Builder::new()
        .name("store".into())
        .spawn(move || runtime.block_on(worker.run(inbox, session, changes)))?;
    Ok((Handle { requests, turns, settings, newest_command }, thread))
}

struct Worker {
    store: Store,
    stats: Arc<Stats>,
    commit_interval: [Duration; 3],
    waiting: Vec<(Append, oneshot::Sender<Result<Accepted, NotAccepted>>)>,
    waiting_messages: usize,
    /// They commit at once: a device waits.
    steps: Vec<(CommandStep, StepReply)>,
    newest_command: watch::Sender<u64>,
    /// When the waiting appends commit at the latest.
    due: Option<Instant>,
    changes: Option<(u64, Vec<Change>)>,
    /// The unanswered offer and its connection.
    offer: Option<(u64, Offer)>,
    turned: Option<mpsc::Sender<Turned>>,
    /// A commit failed: what the session learned since hangs on what was lost, until a connection begins anew.
    failed: bool,
    /// The check behind the start goes on.
    checking: bool,
    /// Bytes of the broker's connections that the store has been told of.
    link_bytes: u64,
}

impl Worker {
    async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut turns: mpsc::Receiver<Turn>,
        mut changes: watch::Receiver<Settings>,
    ) {
        let mut closing = None;
        while closing.is_none() {
            // Here everything that was asked has its answer, or waits for a time that has not come.
            self.store.settings.pulse.beat(clock::mono_ms());
            match self.wait(&mut requests, &mut turns, &mut changes).await {
                Wake::Turn(turn) => self.take_turn(turn),
                Wake::Request(request) => closing = self.handle(request, &mut turns),
                Wake::Due => {}
                Wake::Check => self.check(),
                Wake::Changed => self.change(changes.borrow_and_update().clone()),
                Wake::Closed => break,
            }
            // Whatever has arrived meanwhile shares the commit.
            while let Ok(turn) = turns.try_recv() {
                self.take_turn(turn);
            }
            while closing.is_none() && self.waiting_messages < COMMIT_MESSAGES {
                let Ok(request) = requests.try_recv() else { break };
                closing = self.handle(request, &mut turns);
            }
            if self.must_commit() || closing.is_some() {
                self.commit();
            }
        }
        self.count_link_bytes();
        self.store.close();
        if let Some(reply) = closing {
            let _gone = reply.send(());
        }
    }

    async fn wait(
        &self,
        requests: &mut mpsc::Receiver<Request>,
        turns: &mut mpsc::Receiver<Turn>,
        changes: &mut watch::Receiver<Settings>,
    ) -> Wake {
        let idle = Instant::now() + IDLE;
        let due = tokio::time::sleep_until(self.wake_at().map_or(idle, |at| at.min(idle)));
        tokio::select! {
            biased;
            Ok(()) = changes.changed() => Wake::Changed,
            Some(turn) = turns.recv() => Wake::Turn(turn),
            request = requests.recv() => request.map_or(Wake::Closed, Wake::Request),
            () = due => Wake::Due,
            () = tokio::time::sleep(CHECK_PAUSE), if self.checking => Wake::Check,
        }
    }

    /// The waiting appends' deadline, or the end of a hold that a parked offer waits for.
    fn wake_at(&self) -> Option<Instant> {
        let release = self.offer.as_ref().and_then(|_| {
            let now = clock::now();
            let (_, release) = self.store.waiting(now);
            release.map(|at| Instant::now() + Duration::from_millis(at.saturating_sub(now.mono_ms).max(1)))
        });
        [self.due, release].into_iter().flatten().min()
    }

    /// Takes a request in; the reply of the last one of all is returned.
    fn handle(&mut self, request: Request, turns: &mut mpsc::Receiver<Turn>) -> Option<oneshot::Sender<()>> {
        match request {
            Request::Append { append, reply } => {
                let interval = append.messages.iter().map(|m| self.commit_interval[m.lane as usize]).min();
                let due = Instant::now() + interval.unwrap_or_default();
                self.due = Some(self.due.map_or(due, |at| at.min(due)));
                self.waiting_messages += append.messages.len();
                self.waiting.push((append, reply));
            }
            Request::Step { step, reply } => self.steps.push((step, reply)),
            Request::Recorded { after, count, reply } => {
                let _gone = reply.send(self.store.recorded(after, count, clock::now()).map_err(Arc::new));
            }
            Request::Interrupted(reply) => {
                let _gone = reply.send(self.store.interrupted(clock::now()).map_err(Arc::new));
            }
            Request::Begin { owner, policy, unacked, turned, reply } => {
                // What the last connection left is committed first.
                while let Ok(turn) = turns.try_recv() {
                    self.take_turn(turn);
                }
                self.commit();
                self.offer = None;
                self.failed = false;
                self.turned = Some(turned);
                let begun = self.store.begin((&owner.0, &owner.1), policy, &unacked, clock::now());
                let _gone = reply.send(begun.map_err(Arc::new));
            }
            Request::Disown { epoch, boot, policy, reply } => {
                self.offer = None;
                let disowned = self.store.disown(epoch, boot, policy);
                let _gone = reply.send(disowned.map_err(Arc::new));
            }
            Request::KeepOwners { owners, policy, reply } => {
                // What the last connection left is committed first.
                while let Ok(turn) = turns.try_recv() {
                    self.take_turn(turn);
                }
                self.commit();
                self.offer = None;
                let kept = self.store.keep_owners(&owners, policy).map_err(Arc::new);
                if let Err(error) = &kept {
                    self.tell_failure(Arc::clone(error), Vec::new());
                }
                let _gone = reply.send(kept);
            }
            Request::Look(reply) => {
                self.count_link_bytes();
                self.store.look_for_space(clock::now());
                self.store.look_at_disk(clock::now());
                let _gone = reply.send(self.store.look(clock::now()).map_err(Arc::new));
            }
            Request::Browse(ask, reply) => {
                let _gone = reply.send(self.browse(&ask));
            }
            Request::Close(reply) => return Some(reply),
        }
        None
    }

    fn browse(&mut self, ask: &Ask) -> Result<Found, Arc<StoreError>> {
        if ask.changes() {
            self.commit();
        }
        let found = self.store.browse(ask, clock::now()).map_err(Arc::new);
        match &found {
            Err(error) if ask.changes() => self.tell_failure(Arc::clone(error), Vec::new()),
            Ok(Found::Changed { count, .. }) if matches!(ask, Ask::Requeue(_)) => {
                self.stats.requeued.add(*count);
            }
            _ => {}
        }
        found
    }

    fn take_turn(&mut self, turn: Turn) {
        if self.failed {
            return;
        }
        let Turn { connection, changes, offer } = turn;
        if self.changes.as_ref().is_some_and(|(of, _)| *of != connection) {
            self.commit();
        }
        // Both in one commit: what is taken may hang on what was learned.
        if let Some(offer) = offer {
            self.offer = Some((connection, offer));
        }
        match &mut self.changes {
            Some((_, waiting)) => waiting.extend(changes),
            None if changes.is_empty() => {}
            None => self.changes = Some((connection, changes)),
        }
    }

    /// What has moved since this was last asked counts against the budget.
    fn count_link_bytes(&mut self) {
        let moved = self.stats.link_bytes_sent.get() + self.stats.link_bytes_received.get();
        self.store.count_link_bytes(moved - self.link_bytes, clock::now());
        self.link_bytes = moved;
    }

    fn change(&mut self, settings: Settings) {
        self.commit();
        self.commit_interval = settings.commit_interval;
        if let Err(error) = self.store.change(settings) {
            self.tell_failure(Arc::new(error), Vec::new());
        }
    }

    fn check(&mut self) {
        match self.store.check_next() {
            Ok(more) => self.checking = more,
            Err(error) => {
                self.checking = false;
                self.tell_failure(Arc::new(error), Vec::new());
            }
        }
    }

    fn must_commit(&self) -> bool {
        let due = self.due.is_some_and(|at| at <= Instant::now());
        let work_for_offer = self.offer.is_some() && self.store.waiting(clock::now()).0;
        let released = self.offer.is_some()
            && self.store.waiting(clock::now()).1.is_some_and(|at| at <= clock::now().mono_ms);
        self.changes.is_some()
            || !self.steps.is_empty()
            || due
            || work_for_offer
            || released
            || self.waiting_messages >= COMMIT_MESSAGES
    }

    fn commit(&mut self) {
        // An offer whose connection is gone would take messages out of the reach of expiry and quota.
        if self.turned.as_ref().is_none_or(mpsc::Sender::is_closed) {
            self.offer = None;
        }
        self.due = None;
        self.waiting_messages = 0;
        let (appends, replies): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting).into_iter().unzip();
        let counts: Vec<[usize; 3]> = appends.iter().map(by_lane).collect();
        let changes = self.changes.take();
        let (steps, asked): (Vec<_>, Vec<_>) = std::mem::take(&mut self.steps).into_iter().unzip();
        if appends.is_empty() && changes.is_none() && steps.is_empty() && self.offer.is_none() {
            return;
        }
        self.count_link_bytes();
        let batch = Batch {
            appends,
            changes: changes.as_ref().map(|(_, changes)| changes.clone()).unwrap_or_default(),
            steps,
            offer: self.offer.as_ref().map(|(_, offer)| offer.clone()),
        };
        let began = Instant::now();
        let outcome = self.store.commit(batch, clock::now());
        self.stats.commit_times.count(began.elapsed());
        match outcome {
            Ok(mut committed) => {
                self.stats.commits.increment();
                self.stats.commit_us.add(began.elapsed().as_micros() as u64);
                for (reply, stepped) in asked.into_iter().zip(std::mem::take(&mut committed.steps)) {
                    let _gone = reply.send(Ok(stepped));
                }
                self.tell(committed, changes.map(|(connection, _)| connection), replies, &counts)
            }
            Err(error) => {
                let error = Arc::new(error);
                for reply in asked {
                    let _gone = reply.send(Err(Arc::clone(&error)));
                }
                self.tell_failure(error, replies);
            }
        }
        let newest = self.store.newest_command();
        self.newest_command.send_if_modified(|known| std::mem::replace(known, newest) != newest);
    }

    fn tell(
        &mut self,
        committed: Committed,
        changed: Option<u64>,
        replies: Vec<oneshot::Sender<Result<Accepted, NotAccepted>>>,
        counts: &[[usize; 3]],
    ) {
        for ((reply, outcome), counts) in replies.into_iter().zip(committed.appends).zip(counts) {
            let messages = counts.iter().sum();
            if outcome.is_ok() {
                self.stats.messages_accepted.add(messages as u64);
                for (counter, count) in self.stats.accepted_by_lane.iter().zip(counts) {
                    counter.add(*count as u64);
                }
            }
            let _gone = reply.send(outcome.map(|()| Accepted { messages }));
        }
        self.stats.messages_delivered.add(committed.settled.delivered);
        for (counter, count) in self.stats.delivered_by_lane.iter().zip(committed.settled.delivered_by_lane) {
            counter.add(count);
        }
        self.stats.possibly_doubled.add(committed.settled.possibly_doubled);
        self.stats.possibly_lost.add(committed.settled.possibly_lost);
        self.stats.retain_cleared.add(committed.unretained.overtaken);
        self.stats.retain_cleared_unknown.add(committed.unretained.unknown);
        let offered = if committed.taken.is_empty() { None } else { self.offer.take() };
        let connection = changed.or(offered.as_ref().map(|(connection, _)| *connection));
        if let Some(connection) = connection {
            self.turned(Turned::Done {
                connection,
                settled: changed.map(|_| committed.settled),
                refused: committed.refused,
                taken: offered.map(|_| committed.taken),
            });
        }
    }

    fn tell_failure(
        &mut self,
        error: Arc<StoreError>,
        replies: Vec<oneshot::Sender<Result<Accepted, NotAccepted>>>,
    ) {
        tracing::debug!(%error, "a commit failed; nothing of it was told to anybody");
        self.offer = None;
        self.failed = true;
        for reply in replies {
            let _gone = reply.send(Err(NotAccepted::Failed(error.clone())));
        }
        self.turned(Turned::Failed(error));
    }

    /// The session has at most one turn with changes and one offer unanswered, so its channel of four never
    /// fills; if it is gone, the connection is.
    fn turned(&mut self, turned: Turned) {
        if let Some(channel) = &self.turned
            && channel.try_send(turned).is_err()
        {
            self.turned = None;
        }
    }
}

/// Messages of each lane, in the order of [`Lane::ALL`].
fn by_lane(append: &Append) -> [usize; 3] {
    let mut counts = [0; 3];
    for message in &append.messages {
        counts[message.lane as usize] += 1;
    }
    counts
}

enum Wake {
    Check,
    Changed,
    Turn(Turn),
    Request(Request),
    Due,
    Closed,
}
