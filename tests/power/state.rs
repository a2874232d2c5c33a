//! What the store has promised, in plain maps.
//!
//! Knows the promises only, nothing of how the store keeps them: it is told what was asked and what was answered,
//! and says what must be there.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fieldpost::clock::Stamp;
use fieldpost::command::{CommandStep, Recorded, Stepped};
use fieldpost::message::{Lane, Message, PacketId, Qos, Seq, Topic};
use fieldpost::store::{Gap, Look};
use fieldpost::turn::{Change, Inbound, OnSessionLoss, RowState};

pub type Place = (Lane, u64);

/// A broker and a client identifier.
pub type Owner = (String, String);

/// A message that was accepted and is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub topic: Topic,
    pub qos: Qos,
    pub payload: Bytes,
    /// By the monotonic clock, in milliseconds.
    pub expires_at: Option<u64>,
}

/// A QoS 2 exchange that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    pub place: Place,
    pub send_no: u64,
    pub state: RowState,
}

impl Row {
    /// Its message is neither done nor on another way.
    pub fn holds_message(&self) -> bool {
        matches!(self.state, RowState::Published | RowState::Received)
    }
}

/// What is known of the session at one broker. One of which nothing is known begins clean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    pub rows: BTreeMap<u16, Row>,
    pub rx_open: BTreeMap<u16, u128>,
    pub clean_start: bool,
    pub uncertain: bool,
    pub canary: bool,
}

impl Default for Session {
    fn default() -> Self {
        Session {
            rows: BTreeMap::new(),
            rx_open: BTreeMap::new(),
            clean_start: true,
            uncertain: false,
            canary: false,
        }
    }
}

impl Session {
    fn begin(&mut self) {
        self.uncertain |= !self.rows.is_empty() || !self.rx_open.is_empty();
    }
}

/// How far a command has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Recorded,
    Begun,
    Answered,
}

/// What the broker asked of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    pub payload: Bytes,
    pub id: Option<String>,
    pub progress: Progress,
}

/// Clean start, uncertain, canary.
pub type Flags = (bool, bool, bool);

/// Everything that was answered, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The number the lane's next message gets.
    pub next: [u64; 3],
    pub waiting: BTreeMap<Place, Kept>,
    pub sessions: BTreeMap<Owner, Session>,
    /// Whose connection it is, and what it wants of messages whose fate nobody knows.
    pub owner: Owner,
    pub policy: OnSessionLoss,
    pub commands: BTreeMap<u64, Command>,
    pub next_command: u64,
    pub dead_letters: u64,
    pub dropped: BTreeMap<(Lane, String), u64>,
    pub gaps: BTreeMap<(Lane, String), (u64, u64, u64)>,
    /// Ended by their last acknowledgement, or called delivered when the session was lost.
    pub delivered: [u64; 3],
    pub epoch: u32,
    pub boot: u32,
}

impl Default for State {
    fn default() -> Self {
        State {
            next: [1; 3],
            waiting: BTreeMap::new(),
            sessions: BTreeMap::new(),
            owner: Default::default(),
            policy: OnSessionLoss::Republish,
            commands: BTreeMap::new(),
            next_command: 1,
            dead_letters: 0,
            dropped: BTreeMap::new(),
            gaps: BTreeMap::new(),
            delivered: [0; 3],
            epoch: 1,
            boot: 0,
        }
    }
}

impl State {
    /// What is known of the session of this connection's broker.
    pub fn session(&self) -> Session {
        self.sessions.get(&self.owner).cloned().unwrap_or_default()
    }

    fn own(&mut self) -> &mut Session {
        self.sessions.entry(self.owner.clone()).or_default()
    }

    pub fn flags(&self) -> BTreeMap<Owner, Flags> {
        let flags = |session: &Session| (session.clean_start, session.uncertain, session.canary);
        self.sessions.iter().map(|(owner, session)| (owner.clone(), flags(session))).collect()
    }

    /// Messages were accepted together.
    pub fn accept(&mut self, messages: &[Message], now: Stamp) {
        for message in messages {
            let seq = self.next[message.lane as usize];
            self.next[message.lane as usize] += 1;
            let kept = Kept {
                topic: message.topic.clone(),
                qos: message.qos,
                payload: message.payload.clone().finish(self.epoch, Seq(seq)),
                expires_at: message.expires_after.map(|after| now.mono_ms + after.as_millis() as u64),
            };
            self.waiting.insert((message.lane, seq), kept);
        }
    }

    /// A gap was told: what came since stays open.
    pub fn close(&mut self, told: &Gap) {
        let key = (told.lane, told.reason.clone());
        if let Some(gap) = self.gaps.get_mut(&key) {
            gap.0 = gap.0.max(told.last.0 + 1);
            gap.2 = gap.2.saturating_sub(told.count);
            if gap.2 == 0 {
                self.gaps.remove(&key);
            }
        }
    }

    /// A message went for a reason.
    pub fn drop_one(&mut self, place: Place, reason: &str) {
        if self.waiting.remove(&place).is_none() {
            return;
        }
        let (lane, seq) = place;
        *self.dropped.entry((lane, reason.to_owned())).or_default() += 1;
        let gap = self.gaps.entry((lane, reason.to_owned())).or_insert((seq, seq, 0));
        *gap = (gap.0.min(seq), gap.1.max(seq), gap.2 + 1);
    }

    fn deliver(&mut self, place: Place) {
        if self.waiting.remove(&place).is_some() {
            self.delivered[place.0 as usize] += 1;
        }
    }

    /// What the session learned.
    pub fn settle(&mut self, change: &Change) {
        match change {
            Change::Received(id) => {
                if let Some(row) = self.own().rows.get_mut(&id.get()) {
                    row.state = RowState::Received;
                }
            }
            Change::Completed(id) => {
                if let Some(row) = self.own().rows.remove(&id.get()).filter(Row::holds_message) {
                    self.deliver(row.place);
                }
            }
            Change::Acknowledged { lane, seq } => self.deliver((*lane, seq.0)),
            Change::Refused { id, .. } => {
                self.own().rows.retain(|row, _| Some(*row) != id.map(PacketId::get));
            }
            Change::DeadLetter { id, lane, seq, .. } => {
                self.own().rows.retain(|row, _| Some(*row) != id.map(PacketId::get));
                self.dead_letters += 1;
                self.drop_one((*lane, seq.0), "dead_letter");
            }
            Change::Abandoned(id) => {
                if let Some(row) = self.own().rows.get_mut(&id.get()) {
                    row.state = RowState::Abandoned;
                    let place = row.place;
                    self.drop_one(place, "abandoned");
                }
            }
            Change::SessionAbsent(policy) | Change::RowsVoid(policy) => {
                self.end_session(*policy, false);
                self.take_over();
            }
            Change::SessionReplaced(policy) => self.end_session(*policy, true),
            Change::SessionPresent => {
                self.own().uncertain = false;
                self.take_over();
            }
            Change::Canary { proven } => self.own().canary = *proven,
            Change::InboundOpened { id, hash, inbound } => {
                self.own().rx_open.insert(id.get(), *hash);
                self.record(inbound);
            }
            Change::Inbound { inbound, .. } => self.record(inbound),
            Change::InboundReleased(id) => {
                self.own().rx_open.remove(&id.get());
            }
        }
    }

    /// A broker will not finish what was in flight there.
    fn leave(&mut self, rows: impl IntoIterator<Item = Row>, policy: OnSessionLoss) {
        for row in rows {
            if row.state == RowState::Received && policy == OnSessionLoss::Drop {
                self.deliver(row.place);
            }
        }
    }

    /// The broker holds nothing of ours, or (`clean_start`) something that must go.
    fn end_session(&mut self, policy: OnSessionLoss, clean_start: bool) {
        let ended = std::mem::take(self.own());
        self.leave(ended.rows.into_values(), policy);
        self.own().clean_start = clean_start;
    }

    /// This connection's broker has answered: what was in flight at another goes here.
    fn take_over(&mut self) {
        let owner = self.owner.clone();
        let elsewhere = self.sessions.iter_mut().filter(|(of, _)| **of != owner);
        let mut left = Vec::new();
        for row in elsewhere.flat_map(|(_, session)| session.rows.values_mut()) {
            if row.holds_message() {
                left.push(*row);
                row.state = RowState::Moved;
            }
        }
        self.leave(left, self.policy);
    }

    /// A connection begins.
    pub fn begin(&mut self, owner: &Owner, policy: OnSessionLoss) {
        (self.owner, self.policy) = (owner.clone(), policy);
        self.own().begin();
    }

    /// Only these brokers are in the configuration.
    pub fn keep_owners(&mut self, owners: &[Owner], policy: OnSessionLoss) {
        let (kept, gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.sessions).into_iter().partition(|(owner, _)| owners.contains(owner));
        self.sessions = kept;
        self.leave(gone.into_values().flat_map(|session| session.rows.into_values()), policy);
    }

    /// The database is a copy of the past.
    pub fn disown(&mut self, epoch: u32, boot: u32, policy: OnSessionLoss) {
        for session in self.sessions.clone().into_values() {
            self.leave(session.rows.into_values(), policy);
        }
        for session in self.sessions.values_mut() {
            *session = Session::default();
        }
        (self.epoch, self.boot) = (self.epoch.max(epoch) + 1, self.boot.max(boot) + 1);
    }

    /// Messages with a row that may still be published or released: no limit may take them.
    pub fn in_exchange(&self) -> BTreeSet<Place> {
        let rows = self.sessions.values().flat_map(|session| session.rows.values());
        rows.filter(|row| row.holds_message()).map(|row| row.place).collect()
    }

    /// Rows of what went to another broker.
    pub fn moved(&self) -> usize {
        let rows = self.sessions.values().flat_map(|session| session.rows.values());
        rows.filter(|row| row.state == RowState::Moved).count()
    }

    // ---- commands --------------------------------------------------------------------------------------

    fn record(&mut self, inbound: &Inbound) {
        let command = Command { payload: inbound.payload.clone(), id: None, progress: Progress::Recorded };
        self.commands.insert(self.next_command, command);
        self.next_command += 1;
    }

    /// Every id that may never begin again.
    pub fn known_ids(&self) -> BTreeSet<String> {
        self.commands.values().filter_map(|command| command.id.clone()).collect()
    }

    /// What a step must amount to.
    pub fn foretell(&self, step: &CommandStep) -> Stepped {
        let (number, id) = match step {
            CommandStep::Begin { number, id } => (number, Some(id)),
            CommandStep::Answer { number, id, .. } => (number, id.as_ref()),
            CommandStep::Forget { number } => (number, None),
        };
        let mut others = self.commands.iter().filter(|(of, _)| *of != number);
        let is_known = id.is_some_and(|id| others.any(|(_, command)| command.id.as_ref() == Some(id)));
        match self.commands.get(number).map(|command| command.progress) {
            None | Some(Progress::Recorded) if is_known => Stepped::Repeated,
            None => Stepped::Gone,
            Some(_) => Stepped::Done,
        }
    }

    /// What becomes of a command.
    pub fn step(&mut self, step: &CommandStep, stepped: Stepped, now: Stamp) {
        let (CommandStep::Begin { number, .. }
        | CommandStep::Answer { number, .. }
        | CommandStep::Forget { number }) = step;
        if stepped == Stepped::Repeated {
            self.commands.remove(number);
        }
        let Some(command) = self.commands.get_mut(number).filter(|_| stepped == Stepped::Done) else {
            return;
        };
        let recorded = command.progress == Progress::Recorded;
        match step {
            CommandStep::Begin { id, .. } if recorded => {
                (command.id, command.progress) = (Some(id.clone()), Progress::Begun);
            }
            CommandStep::Answer { id, answer, .. } if command.progress != Progress::Answered => {
                command.progress = Progress::Answered;
                command.id = command.id.take().or_else(|| id.clone());
                if recorded && command.id.is_none() {
                    self.commands.remove(number);
                }
                self.accept(std::slice::from_ref(answer), now);
            }
            CommandStep::Forget { .. } if recorded => {
                self.commands.remove(number);
            }
            _ => {}
        }
    }

    /// What is to be carried out, and what may have been.
    pub fn commands_disagree(&self, recorded: &[Recorded], interrupted: &[Recorded]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (what, seen, progress) in [
            ("to be carried out", recorded, Progress::Recorded),
            ("interrupted", interrupted, Progress::Begun),
        ] {
            let is: Vec<_> = seen.iter().map(|of| (of.number, &of.id, &of.inbound.payload)).collect();
            let of_state = self.commands.iter().filter(|(_, command)| command.progress == progress);
            let should: Vec<_> =
                of_state.map(|(number, command)| (*number, &command.id, &command.payload)).collect();
            if is != should {
                wrong.push(format!("commands {what}: {is:?}, should be {should:?}"));
            }
        }
        wrong
    }

    /// What a look must show.
    pub fn disagrees(&self, look: &Look) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut compare = |what: &str, is: String, should: String| {
            if is != should {
                wrong.push(format!("{what}: {is}, should be {should}"));
            }
        };
        for lane in Lane::ALL {
            let waiting = self.waiting.range((lane, 0)..=(lane, u64::MAX)).count();
            let depth = &look.lanes[lane as usize];
            compare(&format!("messages in lane {lane}"), depth.messages.to_string(), waiting.to_string());
        }
        let dropped: BTreeMap<(Lane, String), u64> =
            look.dropped.iter().map(|(lane, reason, count)| ((*lane, reason.clone()), *count)).collect();
        compare("dropped", format!("{dropped:?}"), format!("{:?}", self.dropped));
        let gaps: BTreeMap<(Lane, String), (u64, u64, u64)> = look
            .gaps
            .iter()
            .map(|gap| ((gap.lane, gap.reason.clone()), (gap.first.0, gap.last.0, gap.count)))
            .collect();
        compare("gaps", format!("{gaps:?}"), format!("{:?}", self.gaps));
        compare("dead letters", look.dead_letters.to_string(), self.dead_letters.to_string());
        let recorded = self.commands.values().filter(|command| command.progress == Progress::Recorded);
        compare("inbox", look.inbox.to_string(), recorded.count().to_string());
        let rows: usize = self.sessions.values().map(|session| session.rows.len()).sum();
        compare("rows", look.rows.to_string(), rows.to_string());
        compare("epoch", look.boot.epoch.to_string(), self.epoch.to_string());
        for lane in Lane::ALL {
            let index = lane as usize;
            let dropped: u64 = look.dropped.iter().filter(|(of, ..)| *of == lane).map(|(.., n)| n).sum();
            let sum = self.delivered[index] + dropped + look.lanes[index].messages;
            compare(&format!("lane {lane} adds up to"), sum.to_string(), (self.next[index] - 1).to_string());
        }
        wrong
    }
}
