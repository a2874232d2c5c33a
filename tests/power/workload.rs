//! A long life of one store, drawn from a seed: everything it can be asked to do, each step checked against the
//! oracle while the power is on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::clock::Stamp;
use fieldpost::command::{CommandStep, Stepped};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Seq, Topic};
use fieldpost::store::browse::{Ask, Found};
use fieldpost::store::{Append, Batch, Committed, Gap, Settings, Store, StoreError};
use fieldpost::turn::{Begin, Change, Hold, Inbound, Offer, OnSessionLoss, Resume, RowState, Taken};
use rusqlite::{Connection, params};

use crate::disk;
use crate::oracle::{START, begin_with_each, rows_of};
use crate::state::{Kept, Owner, Place, Progress, Row, State};

/// What one step hangs on, as the order table names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A producer hears "accepted".
    Accepted,
    /// The first PUBLISH of a QoS 2 message.
    Published,
    /// PUBREL.
    Received,
    /// A message is done: its producer may forget it.
    Done,
    /// PUBREC or PUBACK for an inbound message.
    Inbound,
    /// PUBCOMP for an inbound message.
    Released,
    /// Any PUBLISH on a new connection.
    Settled,
    /// CONNECT.
    Connecting,
    /// CONNECT after the database turned out to be a copy.
    Disowned,
    /// A gap record is accepted, and its gap closed.
    Told,
    /// A command's write.
    Begun,
    /// The end of a command, and its answer.
    Answered,
}

/// How the workload sets about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Right,
    /// Right, but one thing in each transaction: what is told too early then is that one thing.
    OneByOne,
    /// Negative control: done bit and row go in two transactions.
    SplitDone,
    /// Negative control: the new epoch and what it voids go in two transactions.
    SplitEpoch,
}

/// Where a gateway may send to: one broker, another, and the first as somebody else.
const OWNERS: [(&str, &str); 3] = [("broker", "client"), ("second", "client"), ("broker", "former")];

/// A message in the session's hands.
#[derive(Debug, Clone, Copy)]
struct InHand {
    place: Place,
    qos: Qos,
}

pub struct Workload {
    settings: Settings,
    store: Option<Store>,
    random: Rng,
    now: Stamp,
    pub state: State,
    in_hand: BTreeMap<u16, InHand>,
    next_id: u16,
    next_text: u64,
    last_send_no: u64,
    connected: bool,
    pub way: Way,
    /// After each step: how far the tape had come, what had been answered, and what the step was.
    pub steps: Vec<(usize, State, BTreeSet<Kind>)>,
    /// What went wrong while the power was on.
    pub wrong: Vec<String>,
    pub failed_commits: usize,
    /// Failed, and there all the same.
    pub failed_but_done: usize,
    pub counts: BTreeMap<&'static str, usize>,
}

const TOPICS: [(&str, Qos); 6] = [
    ("a/1", Qos::AtLeastOnce),
    ("a/2", Qos::ExactlyOnce),
    ("b/1", Qos::AtLeastOnce),
    ("b/2", Qos::ExactlyOnce),
    ("x/1", Qos::AtLeastOnce),
    ("x/2", Qos::ExactlyOnce),
];

impl Workload {
    pub fn new(settings: Settings, seed: u64, state: State, way: Way) -> Workload {
        Workload {
            settings,
            store: None,
            random: Rng::with_seed(seed),
            now: START,
            state,
            in_hand: BTreeMap::new(),
            next_id: 1024,
            next_text: 0,
            last_send_no: 0,
            connected: false,
            way,
            steps: Vec::new(),
            wrong: Vec::new(),
            failed_commits: 0,
            failed_but_done: 0,
            counts: BTreeMap::new(),
        }
    }

    /// So many steps, the first of which opens the store.
    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            self.step();
        }
    }

    /// Closes the store as a stop does.
    pub fn finish(&mut self) {
        if let Some(store) = self.store.take() {
            store.close();
        }
        self.answered(BTreeSet::new());
    }

    fn step(&mut self) {
        self.now.mono_ms += self.random.u64(0..400);
        if self.store.is_none() {
            return self.open();
        }
        match self.random.u32(0..1000) {
            0..12 => {
                self.count("clean stops");
                let store = self.store.take().expect("it was looked for");
                store.close();
                self.answered(BTreeSet::new());
            }
            12..24 => {
                self.count("kills");
                self.store = None;
                self.answered(BTreeSet::new());
            }
            24..30 => self.disown(),
            30..80 => self.begin(),
            80..90 if self.connected => self.absent(),
            _ if !self.connected && self.random.bool() => self.begin(),
            _ => self.turn(),
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn answered(&mut self, kinds: BTreeSet<Kind>) {
        self.steps.push((disk::position(), self.state.clone(), kinds));
    }

    fn complain(&mut self, what: String) {
        if self.wrong.len() < 10 {
            self.wrong.push(format!("step {}: {what}", self.steps.len()));
        }
    }

    fn open(&mut self) {
        self.in_hand.clear();
        (self.connected, self.last_send_no) = (false, 0);
        match Store::open(self.settings.clone()) {
            Ok(store) => {
                if store.boot().boot <= self.state.boot {
                    self.complain(format!("boot {} after {}", store.boot().boot, self.state.boot));
                }
                self.state.boot = store.boot().boot;
                // A command that was forgotten before a stop had a number that may come again.
                self.state.next_command = store.newest_command() + 1;
                if self.state.commands.keys().any(|number| *number > store.newest_command()) {
                    self.complain("a command's number comes again".to_owned());
                }
                self.store = Some(store);
                self.count("starts");
                self.look();
                self.answered(BTreeSet::new());
                if self.random.u32(0..3) == 0 {
                    self.keep_owners();
                }
            }
            Err(error) if disk::refusals() == 0 => self.complain(format!("cannot be opened: {error}")),
            Err(_) => {}
        }
    }

    /// What an agent does at its start: who is not in its configuration any more is forgotten.
    fn keep_owners(&mut self) {
        let policy = self.policy();
        let owners = OWNERS[..self.random.usize(1..=2)].iter();
        let owners: Vec<Owner> =
            owners.map(|(broker, client)| ((*broker).to_owned(), (*client).to_owned())).collect();
        let Some(store) = &mut self.store else { return };
        match store.keep_owners(&owners, policy) {
            Ok(_) => {
                self.count("owners kept");
                self.state.keep_owners(&owners, policy);
                self.look();
                self.answered(BTreeSet::new());
            }
            Err(error) => {
                let mut after = self.state.clone();
                after.keep_owners(&owners, policy);
                self.failed(error, after);
            }
        }
    }

    fn disown(&mut self) {
        if self.way == Way::SplitEpoch {
            return self.disown_split();
        }
        let policy = self.policy();
        let Some(store) = &mut self.store else { return };
        match store.disown(self.state.epoch, self.state.boot, policy) {
            Ok(_) => {
                self.count("disowned");
                self.state.disown(self.state.epoch, self.state.boot, policy);
                self.in_hand.clear();
                self.connected = false;
                self.look();
                self.answered(BTreeSet::from([Kind::Disowned]));
            }
            Err(error) => {
                let mut after = self.state.clone();
                after.disown(after.epoch, after.boot, policy);
                self.failed(error, after);
            }
        }
    }

    /// The broken order: the new epoch first, and what it voids afterwards.
    fn disown_split(&mut self) {
        let Some(store) = self.store.take() else { return };
        store.close();
        let (epoch, boot) = (self.state.epoch, self.state.boot);
        self.state.disown(epoch, boot, OnSessionLoss::Republish);
        let broken = || -> rusqlite::Result<()> {
            let db = Connection::open(&self.settings.path)?;
            db.execute_batch("PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = FULL")?;
            db.execute("UPDATE meta SET epoch = ?, boot = ?", params![self.state.epoch, self.state.boot])?;
            db.execute_batch(
                "BEGIN; DELETE FROM inflight; DELETE FROM rx_open;
                 UPDATE session SET uncertain = 0, clean_start = 1, canary = 0; COMMIT",
            )
        };
        if let Err(error) = broken() {
            self.complain(error.to_string());
        }
        self.count("disowned");
        self.answered(BTreeSet::from([Kind::Disowned]));
    }

    fn policy(&mut self) -> OnSessionLoss {
        if self.random.bool() { OnSessionLoss::Republish } else { OnSessionLoss::Drop }
    }

    /// A connection begins: mostly to the same broker, sometimes to another and back.
    fn begin(&mut self) {
        let policy = self.policy();
        let owner = match self.random.usize(0..8) {
            other @ 0..3 => (OWNERS[other].0.to_owned(), OWNERS[other].1.to_owned()),
            _ if self.state.owner.0.is_empty() => (OWNERS[0].0.to_owned(), OWNERS[0].1.to_owned()),
            _ => self.state.owner.clone(),
        };
        let moved = owner != self.state.owner;
        // What QoS 1 had in flight is still in the session's hands, or it forgot it.
        let forgets = self.random.bool();
        self.in_hand.retain(|_, hand| hand.qos == Qos::AtLeastOnce && !forgets && !moved);
        let unacked: Vec<(Lane, Seq)> =
            self.in_hand.values().map(|hand| (hand.place.0, Seq(hand.place.1))).collect();
        let before = self.dropped();
        let Some(store) = &mut self.store else { return };
        let outcome = store.begin((&owner.0, &owner.1), policy, &unacked, self.now);
        let begin = match outcome {
            Ok(begun) => begun,
            Err(error) => {
                let mut after = self.state.clone();
                after.begin(&owner, policy);
                return self.failed(error, after);
            }
        };
        self.count(if moved { "connections to another broker" } else { "connections" });
        self.state.begin(&owner, policy);
        self.resume(&begin);
        self.limits_took(before);
        self.look();
        self.answered(BTreeSet::from([Kind::Connecting]));
        // Nobody answers, and so nothing moves.
        self.connected = self.random.u32(0..6) > 0;
        if !self.connected {
            return;
        }
        if begin.clean_start_needed || (begin.session_uncertain && self.random.bool()) {
            self.absent();
        } else {
            self.commit(Vec::new(), vec![Change::SessionPresent], Vec::new(), None);
        }
    }

    /// What was in flight is in the session's hands again.
    fn resume(&mut self, begin: &Begin) {
        let mut in_hand = Vec::new();
        for resume in &begin.resume {
            match resume {
                Resume::Row { id, state, lane, seq, record, .. } => {
                    let place = (*lane, seq.0);
                    in_hand.push((Some(id.get()), InHand { place, qos: Qos::ExactlyOnce }));
                    let bytes = record.as_ref().map(|record| &record.payload);
                    if *state == RowState::Published
                        && bytes != self.state.waiting.get(&place).map(|kept| &kept.payload)
                    {
                        self.complain(format!("{place:?} resumes with other bytes"));
                    }
                }
                Resume::Older(record) => {
                    let place = (record.lane, record.seq.0);
                    in_hand.push((None, InHand { place, qos: Qos::AtLeastOnce }));
                }
            }
        }
        let (rows, should) = (rows_of(begin), self.state.session().rows);
        if rows != should {
            self.complain(format!("resumes {rows:?}, should be {should:?}"));
        }
        for (id, hand) in in_hand {
            let id = id.unwrap_or_else(|| self.free_id());
            self.in_hand.insert(id, hand);
        }
    }

    /// The broker's session is gone.
    fn absent(&mut self) {
        let policy = self.policy();
        let change = match self.random.u32(0..8) {
            0..2 => Change::SessionReplaced(policy),
            2 => Change::RowsVoid(policy),
            _ => Change::SessionAbsent(policy),
        };
        self.count("sessions lost");
        self.in_hand.clear();
        self.connected = !matches!(change, Change::SessionReplaced(_));
        self.commit(Vec::new(), vec![change], Vec::new(), None);
    }

    fn free_id(&mut self) -> u16 {
        let rows = self.state.session().rows;
        loop {
            self.next_id = if self.next_id == 4000 { 1024 } else { self.next_id + 1 };
            if !self.in_hand.contains_key(&self.next_id) && !rows.contains_key(&self.next_id) {
                return self.next_id;
            }
        }
    }

    /// What one turn of the session does, and what producers hand in meanwhile.
    fn turn(&mut self) {
        let mut appends = Vec::new();
        if self.random.u32(0..100) < 45 {
            for _ in 0..self.random.usize(1..4) {
                let count = if self.random.u32(0..12) == 0 { 40 } else { self.random.usize(1..6) };
                let messages = (0..count).map(|_| self.message()).collect();
                appends.push(Append { messages, closes: Vec::new() });
            }
        }
        if self.random.u32(0..100) < 6 && !self.state.gaps.is_empty() {
            self.count("gaps told");
            let closes = self.state.gaps.iter().map(|((lane, reason), (first, last, count))| Gap {
                lane: *lane,
                reason: reason.clone(),
                first: Seq(*first),
                last: Seq(*last),
                count: *count,
            });
            let closes = closes.collect();
            let message = Message { lane: Lane::Alarm, ..self.message() };
            appends.push(Append { messages: vec![message], closes });
        }
        let mut changes = Vec::new();
        let mut offer = None;
        if self.connected {
            changes = self.changes();
            if self.random.u32(0..100) < 60 {
                let ids = self.random.usize(1..20);
                let ids: BTreeSet<u16> = (0..ids).map(|_| self.free_id()).collect();
                offer = Some(Offer {
                    ids: ids.into_iter().filter_map(PacketId::new).collect(),
                    qos2_room: self.random.usize(0..12),
                    max_bytes: self.random.usize(1..20_000),
                    max_qos: if self.random.u32(0..20) == 0 { Qos::AtLeastOnce } else { Qos::ExactlyOnce },
                    max_publish_bytes: None,
                });
            }
        }
        if self.way == Way::SplitDone {
            return self.commit_split(changes);
        }
        let steps = self.steps();
        if self.way == Way::OneByOne {
            for change in changes {
                self.commit(Vec::new(), vec![change], Vec::new(), None);
            }
            for step in steps {
                self.commit(Vec::new(), Vec::new(), vec![step], None);
            }
            for append in appends {
                self.commit(vec![append], Vec::new(), Vec::new(), None);
            }
            if offer.is_some() && self.store.is_some() && self.connected {
                self.commit(Vec::new(), Vec::new(), Vec::new(), offer);
            }
            return;
        }
        if !(appends.is_empty() && changes.is_empty() && steps.is_empty() && offer.is_none()) {
            self.commit(appends, changes, steps, offer);
        }
    }

    /// What becomes of the commands meanwhile.
    fn steps(&mut self) -> Vec<CommandStep> {
        let open: Vec<(u64, Option<String>, Progress, String)> = self
            .state
            .commands
            .iter()
            .map(|(number, command)| {
                let own = String::from_utf8_lossy(&command.payload).into_owned();
                (*number, command.id.clone(), command.progress, own)
            })
            .collect();
        let mut steps = Vec::new();
        for (number, id, progress, own) in open {
            let dice = self.random.u32(0..1000);
            let answered_as = match progress {
                Progress::Recorded if dice < 250 => {
                    steps.push(CommandStep::Begin { number, id: own });
                    continue;
                }
                Progress::Recorded if dice < 330 => (dice < 300).then_some(own),
                Progress::Recorded if dice < 360 => {
                    steps.push(CommandStep::Forget { number });
                    continue;
                }
                Progress::Begun if dice < 300 => id,
                // Somebody did not hear that it was committed.
                Progress::Answered if dice < 5 => id,
                _ => continue,
            };
            let answer = Message { lane: Lane::Alarm, ..self.message() };
            steps.push(CommandStep::Answer { number, id: answered_as, answer: Box::new(answer) });
        }
        steps
    }

    fn message(&mut self) -> Message {
        let (topic, qos) = TOPICS[self.random.usize(0..TOPICS.len())];
        let lane = Lane::ALL[[0, 1, 1, 1, 2][self.random.usize(0..5)]];
        self.next_text += 1;
        let mut text = format!("{{\"text\":{}", self.next_text).into_bytes();
        let length = match self.random.u32(0..30) {
            0 => self.random.usize(2_000..6_000),
            1..20 => self.random.usize(0..300),
            _ => 0,
        };
        // Half of them pack well.
        let noise = self.random.bool();
        text.extend((0..length).map(|_| if noise { self.random.u8(..) } else { b'.' }));
        Message {
            topic: Topic::new(topic).expect("a topic"),
            qos,
            retain: self.random.bool(),
            lane,
            at: self.now,
            expires_after: topic.starts_with('x').then(|| Duration::from_secs(self.random.u64(5..40))),
            correlation_data: None,
            payload: if self.random.bool() { Payload::Numbered(text) } else { Payload::Whole(text.into()) },
        }
    }

    /// What the broker answered since the last turn.
    fn changes(&mut self) -> Vec<Change> {
        let mut changes = Vec::new();
        let rows = self.state.session().rows;
        let hands: Vec<(u16, InHand)> = self.in_hand.iter().map(|(id, hand)| (*id, *hand)).collect();
        for (number, InHand { place: (lane, seq), qos }) in hands {
            let Some(id) = PacketId::new(number) else { continue };
            let row = rows.get(&number).map(|row| row.state);
            let expiring = self.state.waiting.get(&(lane, seq)).is_some_and(|kept| kept.expires_at.is_some());
            let seq = Seq(seq);
            let exchange = (qos == Qos::ExactlyOnce).then_some(id);
            let hold = if self.random.bool() { Hold::Topic } else { Hold::Lane };
            let hold_ms = self.random.u64(100..2_000);
            let dice = self.random.u32(0..100);
            let (change, ends) = match (row, dice) {
                (_, 60..) => continue,
                (Some(RowState::Received), 0..40) => (Change::Completed(id), true),
                (Some(RowState::Received), _) => continue,
                (Some(RowState::Abandoned | RowState::Moved), 0..20) => (Change::Completed(id), true),
                (Some(RowState::Abandoned | RowState::Moved), _) => continue,
                (_, 0..3) => (Change::DeadLetter { id: exchange, lane, seq, reason: 0x90 }, true),
                // One that expires is not refused: which of a held topic's messages are too old would be unclear.
                (_, 3..8) if !expiring => {
                    (Change::Refused { id: exchange, lane, seq, hold, hold_ms, reason: 0x97 }, true)
                }
                (Some(RowState::Published), 8..11) => (Change::Abandoned(id), false),
                (Some(RowState::Published), _) => (Change::Received(id), false),
                (None, _) => (Change::Acknowledged { lane, seq }, true),
            };
            let completes = matches!(change, Change::Received(_)) && self.random.u32(0..4) == 0;
            changes.push(change);
            if completes {
                changes.push(Change::Completed(id));
            }
            if ends || completes {
                self.in_hand.remove(&number);
            }
        }
        if self.random.u32(0..100) < 25 {
            changes.push(self.inbound());
        }
        let open: Vec<u16> = self.state.session().rx_open.keys().copied().collect();
        for id in open {
            if self.random.u32(0..100) < 15 {
                changes.extend(PacketId::new(id).map(Change::InboundReleased));
            }
        }
        if self.random.u32(0..100) < 3 {
            changes.push(Change::Canary { proven: self.random.bool() });
        }
        changes
    }

    fn inbound(&mut self) -> Change {
        self.count("inbound");
        // One in four repeats another.
        let known = self.random.u64(0..=self.next_text);
        let id = if self.random.u32(0..4) == 0 { known } else { self.next_text };
        let id = format!("command {}", id / 8);
        let inbound = Inbound {
            topic: Topic::new("command").expect("a topic"),
            payload: Bytes::from(id),
            qos: Qos::ExactlyOnce,
            retain: false,
            response_topic: Some("answer".to_owned()),
            correlation_data: None,
        };
        let id = PacketId::new(self.random.u16(1..50));
        match id {
            Some(id) if self.random.bool() => {
                Change::InboundOpened { id, hash: u128::from(self.random.u64(..)), inbound }
            }
            _ => Change::Inbound { id, inbound: Inbound { qos: Qos::AtLeastOnce, ..inbound } },
        }
    }

    /// The broken order: what must be one transaction is two, the first of which sets the done bit.
    fn commit_split(&mut self, changes: Vec<Change>) {
        let before = self.state.session();
        let done: Vec<Change> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Completed(id) => before.rows.get(&id.get()),
                _ => None,
            })
            .filter(|row| row.holds_message())
            .map(|row| Change::Acknowledged { lane: row.place.0, seq: Seq(row.place.1) })
            .collect();
        let Some(store) = &mut self.store else { return };
        let batch = Batch { changes: done, ..Batch::default() };
        if let Err(error) = store.commit(batch, self.now) {
            return self.complain(error.to_string());
        }
        let message = self.message();
        let offer = Offer {
            ids: vec![PacketId::new(self.free_id()).expect("above 1023")],
            qos2_room: 1,
            max_bytes: 1 << 20,
            max_qos: Qos::ExactlyOnce,
            max_publish_bytes: None,
        };
        let append = Append { messages: vec![message], closes: Vec::new() };
        self.commit(vec![append], changes, Vec::new(), Some(offer));
    }

    fn commit(
        &mut self,
        appends: Vec<Append>,
        changes: Vec<Change>,
        steps: Vec<CommandStep>,
        offer: Option<Offer>,
    ) {
        let before = self.dropped();
        let asked = Asked { appends: appends.clone(), changes: changes.clone(), steps: steps.clone() };
        let offered: BTreeSet<u16> =
            offer.iter().flat_map(|offer| offer.ids.iter().map(|id| id.get())).collect();
        let Some(store) = &mut self.store else { return };
        let committed = match store.commit(Batch { appends, changes, steps, offer }, self.now) {
            Ok(committed) => committed,
            Err(error) => {
                let mut after = self.state.clone();
                apply(&mut after, &asked, None, self.now);
                return self.failed(error, after);
            }
        };
        let newest_command = store.newest_command();
        self.count("commits");
        // A number may be left out, where a transaction that used it failed.
        let recorded = asked.changes.iter();
        let recorded = recorded
            .filter(|change| matches!(change, Change::Inbound { .. } | Change::InboundOpened { .. }))
            .count() as u64;
        if recorded > 0 {
            let first = newest_command + 1 - recorded;
            if first < self.state.next_command {
                self.complain(format!("command {first} comes again"));
            }
            self.state.next_command = first;
        }
        let moved = self.state.moved();
        for wrong in apply(&mut self.state, &asked, Some(&committed), self.now) {
            self.complain(wrong);
        }
        *self.counts.entry("moved to another broker").or_default() +=
            self.state.moved().saturating_sub(moved);
        self.count_changes(&asked.changes);
        self.count_steps(&asked.steps, &committed.steps);
        self.limits_took(before);
        self.take(&committed.taken, &offered);
        self.look();
        let kinds = kinds(&asked, &committed);
        self.answered(kinds);
    }

    fn count_steps(&mut self, steps: &[CommandStep], stepped: &[Stepped]) {
        for (step, stepped) in steps.iter().zip(stepped) {
            self.count(match (step, stepped) {
                (_, Stepped::Repeated) => "commands repeated",
                (CommandStep::Begin { .. }, _) => "commands begun",
                (CommandStep::Answer { .. }, _) => "commands answered",
                (CommandStep::Forget { .. }, _) => "commands forgotten",
            });
        }
    }

    fn count_changes(&mut self, changes: &[Change]) {
        for change in changes {
            self.count(match change {
                Change::Received(_) => "PUBREC",
                Change::Completed(_) => "PUBCOMP",
                Change::Acknowledged { .. } => "PUBACK",
                Change::Refused { .. } => "refused",
                Change::DeadLetter { .. } => "dead letters",
                Change::Abandoned(_) => "abandoned",
                Change::InboundReleased(_) => "released",
                _ => continue,
            });
        }
    }

    fn take(&mut self, taken: &[Taken], offered: &BTreeSet<u16>) {
        for taken in taken {
            self.count("handed out");
            let (id, place) = (taken.id.get(), (taken.record.lane, taken.record.seq.0));
            let held: BTreeSet<Place> = self.held();
            let Some(kept) = self.state.waiting.get(&place).cloned() else {
                self.complain(format!("{place:?} is handed out although it is done"));
                continue;
            };
            if held.contains(&place) {
                self.complain(format!("{place:?} is handed out twice"));
            }
            if !offered.contains(&id)
                || self.in_hand.contains_key(&id)
                || self.state.session().rows.contains_key(&id)
            {
                self.complain(format!("identifier {id} is handed out twice, or was never offered"));
            }
            if kept.payload != taken.record.payload || kept.topic != taken.record.topic {
                self.complain(format!("{place:?} is not what was accepted"));
            }
            let overtaken = self
                .state
                .waiting
                .range((place.0, 0)..place)
                .any(|(older, of)| of.topic == kept.topic && !held.contains(older));
            if overtaken {
                self.complain(format!("{place:?} overtakes an older message of its topic"));
            }
            if taken.send_no <= self.last_send_no {
                self.complain(format!("send number {} after {}", taken.send_no, self.last_send_no));
            }
            self.last_send_no = taken.send_no;
            self.in_hand.insert(id, InHand { place, qos: taken.qos });
            if taken.qos == Qos::ExactlyOnce {
                let row = Row { place, send_no: taken.send_no, state: RowState::Published };
                let owner = self.state.owner.clone();
                self.state.sessions.entry(owner).or_default().rows.insert(id, row);
            }
        }
    }

    fn held(&self) -> BTreeSet<Place> {
        let rows = self.state.session().rows;
        // What is abandoned or has moved keeps its identifier only.
        let hands = self.in_hand.iter().filter(|(id, _)| rows.get(id).is_none_or(Row::holds_message));
        hands.map(|(_, hand)| hand.place).chain(self.state.in_exchange()).collect()
    }

    fn dropped(&self) -> BTreeMap<(Lane, String), u64> {
        self.state.dropped.clone()
    }

    /// Limits say how many they took; the promise says which.
    fn limits_took(&mut self, before: BTreeMap<(Lane, String), u64>) {
        let Some(Ok(look)) = self.store.as_ref().map(|store| store.look(self.now)) else { return };
        let held = self.held();
        let (mut took, gaps) = (look.dropped, look.gaps);
        // Room is made before anything is handed out.
        took.sort_by_key(|(_, reason, _)| reason != "quota");
        for (lane, reason, count) in took {
            let known = before.get(&(lane, reason.clone())).copied().unwrap_or(0);
            let by_change = self.state.dropped.get(&(lane, reason.clone())).copied().unwrap_or(0);
            let took = count.saturating_sub(by_change.max(known)) as usize;
            let now = self.now.mono_ms;
            let expired = |expires_at: Option<u64>| expires_at.is_some_and(|at| at <= now);
            if took == 0 {
                continue;
            }
            let left = self.listed(lane);
            // What is gone and had expired may have gone for that: which of it, only the gaps can say.
            let gap = |reason: &str| {
                let gap = gaps.iter().find(|gap| gap.lane == lane && gap.reason == reason);
                gap.map_or(0..=0, |gap| gap.first.0..=gap.last.0)
            };
            let (told, told_expired) = (gap(&reason), gap("expired"));
            let rank = |(place, kept): (&Place, &Kept)| {
                let (seq, is_expired) = (place.1, expired(kept.expires_at));
                let end = seq == *told_expired.start() || seq == *told_expired.end();
                (is_expired, is_expired && told_expired.contains(&seq), end, !told.contains(&seq), *place)
            };
            let of_lane = self.state.waiting.range((lane, 0)..=(lane, u64::MAX));
            // For bytes whole segments go, and one with something in flight stays: which, the store says.
            let may_go = of_lane.filter(|(place, kept)| match reason.as_str() {
                "quota" => !left.contains(&place.1),
                "expired" => !left.contains(&place.1) && !held.contains(place) && expired(kept.expires_at),
                _ => !held.contains(place),
            });
            let mut may_go: Vec<_> = may_go.map(rank).collect();
            if reason == "quota" {
                may_go.sort();
            }
            let places: Vec<Place> = may_go.into_iter().map(|(.., place)| place).take(took).collect();
            if let Some(place) = places.iter().find(|place| held.contains(place)) {
                self.complain(format!("{place:?} was in flight and is dropped by the {reason}"));
            }
            for place in places {
                self.count(if reason == "expired" { "expired" } else { "dropped by quota" });
                self.state.drop_one(place, &reason);
            }
        }
    }

    /// The numbers of the messages of a lane that the store still has.
    fn listed(&mut self, lane: Lane) -> BTreeSet<u64> {
        let (mut numbers, mut from) = (BTreeSet::new(), Some(Seq(0)));
        while let (Some(next), Some(store)) = (from, &mut self.store) {
            let ask = Ask::Messages { lane, from: next, limit: 500, payloads: false };
            let Ok(Found::Messages { messages, next }) = store.browse(&ask, self.now) else { break };
            numbers.extend(messages.iter().map(|message| message.seq.0));
            from = next;
        }
        numbers
    }

    fn look(&mut self) {
        let Some(store) = &self.store else { return };
        match store.look(self.now) {
            Ok(look) => {
                let mut wrong = self.state.disagrees(&look);
                wrong.extend(self.commands_disagree(&self.state));
                if store.newest_command() + 1 != self.state.next_command {
                    wrong.push(format!("the newest command is {}", store.newest_command()));
                }
                let damage = look.damage.as_ref().map(|damage| format!("set aside: {}", damage.what));
                wrong.extend(damage);
                wrong.into_iter().for_each(|wrong| self.complain(wrong));
                self.state.boot = self.state.boot.max(look.boot.boot);
            }
            Err(error) => self.complain(error.to_string()),
        }
    }

    fn commands_disagree(&self, state: &State) -> Vec<String> {
        let Some(store) = &self.store else { return Vec::new() };
        match (store.recorded(0, usize::MAX >> 1, self.now), store.interrupted(self.now)) {
            (Ok(recorded), Ok(interrupted)) => state.commands_disagree(&recorded, &interrupted),
            (recorded, interrupted) => {
                let errors = [recorded.err(), interrupted.err()];
                errors.into_iter().flatten().map(|error| error.to_string()).collect()
            }
        }
    }

    /// A commit failed. Nothing of it was told to anybody, so nothing of it need be there, but all of it may be.
    fn failed(&mut self, error: StoreError, after: State) {
        self.failed_commits += 1;
        if disk::refusals() == 0 {
            self.complain(format!("a commit failed: {error}"));
        }
        self.in_hand.clear();
        (self.connected, self.last_send_no) = (false, 0);
        self.find_out(after);
        self.look();
        self.answered(BTreeSet::new());
    }

    /// A connection begins anew, as it does after every failure, and tells whether the transaction that failed is
    /// there. What it handed out, nobody heard of; what limits it took, they count.
    fn find_out(&mut self, mut after: State) {
        let owner = after.owner.clone();
        let owners: BTreeSet<Owner> =
            self.state.sessions.keys().chain(after.sessions.keys()).cloned().collect();
        let Some(store) = &mut self.store else { return };
        // Until the disk takes it.
        let begun = begin_with_each(&owners, &owner, |owner| {
            let tries =
                (0..200).map(|_| store.begin((&owner.0, &owner.1), OnSessionLoss::Republish, &[], self.now));
            tries.filter_map(Result::ok).next().ok_or(())
        });
        let Ok(begins) = begun else { return self.complain("never came back".to_owned()) };
        let Ok(look) = store.look(self.now) else { return self.complain("cannot look".to_owned()) };
        let newest_command = store.newest_command();
        let mut before = self.state.clone();
        for state in [&mut before, &mut after] {
            state.next_command = newest_command + 1;
            for (owner, _) in &begins {
                state.begin(owner, OnSessionLoss::Republish);
            }
        }
        let Some((_, begin)) = begins.last() else { return };
        let rows = rows_of(begin);
        for resume in &begin.resume {
            if let Resume::Older(record) = resume {
                let id = self.free_id();
                let place = (record.lane, record.seq.0);
                self.in_hand.insert(id, InHand { place, qos: Qos::AtLeastOnce });
            }
        }
        // If nothing of it is there: what had expired may have gone since, when connections began.
        let complaints = self.wrong.len();
        let dropped = before.dropped.clone();
        self.state = before;
        self.limits_took(dropped);
        let is_before = self.state.disagrees(&look).is_empty()
            && self.commands_disagree(&self.state).is_empty()
            && begins.iter().all(|(owner, begin)| starts_from(&self.state, owner, begin));
        if is_before {
            return;
        }
        self.wrong.truncate(complaints);
        self.failed_but_done += 1;
        let dropped = after.dropped.clone();
        self.state = after;
        self.limits_took(dropped);
        for (id, row) in rows {
            let handed_out = row.state == RowState::Published
                && self.state.waiting.contains_key(&row.place)
                && !self.state.in_exchange().contains(&row.place);
            if handed_out {
                let session = self.state.sessions.entry(owner.clone()).or_default();
                session.rows.entry(id).or_insert(row);
                session.uncertain = true;
            }
        }
        for (owner, begin) in &begins {
            if !starts_from(&self.state, owner, begin) {
                let should = self.state.sessions.get(owner);
                self.complain(format!(
                    "the session at {owner:?} starts from {begin:?}, should be {should:?}"
                ));
            }
        }
    }
}

/// Whether a connection begins with what is known of the session.
fn starts_from(state: &State, owner: &Owner, begin: &Begin) -> bool {
    let session = state.sessions.get(owner).cloned().unwrap_or_default();
    let rx_open: BTreeMap<u16, u128> = begin.rx_open.iter().map(|(id, hash)| (id.get(), *hash)).collect();
    rows_of(begin) == session.rows
        && rx_open == session.rx_open
        && (begin.clean_start_needed, begin.session_uncertain, begin.canary_proven)
            == (session.clean_start, session.uncertain, session.canary)
}

/// What one transaction was asked for.
struct Asked {
    appends: Vec<Append>,
    changes: Vec<Change>,
    steps: Vec<CommandStep>,
}

/// What was asked, applied to what was answered; without an answer, as if all of it had been accepted. Says what was
/// answered otherwise than promised.
fn apply(state: &mut State, asked: &Asked, answer: Option<&Committed>, now: Stamp) -> Vec<String> {
    let accepted: Vec<&Append> = asked
        .appends
        .iter()
        .enumerate()
        .filter(|(number, _)| answer.is_none_or(|answer| answer.appends[*number] == Ok(())))
        .map(|(_, append)| append)
        .collect();
    // What goes in this transaction came after what is told of.
    for gap in accepted.iter().flat_map(|append| &append.closes) {
        state.close(gap);
    }
    for change in &asked.changes {
        state.settle(change);
    }
    let mut wrong = Vec::new();
    for (number, step) in asked.steps.iter().enumerate() {
        let foretold = state.foretell(step);
        let stepped = answer.map_or(foretold, |answer| answer.steps[number]);
        if stepped != foretold {
            wrong.push(format!("{step:?} amounts to {stepped:?}, should be {foretold:?}"));
        }
        state.step(step, stepped, now);
    }
    for append in accepted {
        state.accept(&append.messages, now);
    }
    wrong
}

fn kinds(asked: &Asked, committed: &Committed) -> BTreeSet<Kind> {
    let mut kinds = BTreeSet::new();
    for (append, outcome) in asked.appends.iter().zip(&committed.appends) {
        if outcome.is_ok() {
            kinds.insert(if append.closes.is_empty() { Kind::Accepted } else { Kind::Told });
        }
    }
    if committed.taken.iter().any(|taken| taken.qos == Qos::ExactlyOnce) {
        kinds.insert(Kind::Published);
    }
    kinds.extend(asked.changes.iter().filter_map(|change| match change {
        Change::Received(_) => Some(Kind::Received),
        Change::Completed(_) | Change::Acknowledged { .. } | Change::DeadLetter { .. } => Some(Kind::Done),
        Change::Inbound { .. } | Change::InboundOpened { .. } => Some(Kind::Inbound),
        Change::InboundReleased(_) => Some(Kind::Released),
        Change::SessionAbsent(_)
        | Change::SessionReplaced(_)
        | Change::RowsVoid(_)
        | Change::SessionPresent => Some(Kind::Settled),
        _ => None,
    }));
    for (step, stepped) in asked.steps.iter().zip(&committed.steps) {
        match step {
            CommandStep::Begin { .. } if *stepped == Stepped::Done => kinds.insert(Kind::Begun),
            CommandStep::Answer { .. } if *stepped == Stepped::Done => kinds.insert(Kind::Answered),
            _ => false,
        };
    }
    kinds
}
