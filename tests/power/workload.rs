//! A long life of one store, drawn from a seed: everything it can be asked to do, each step checked against the
//! oracle while the power is on.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Seq, Topic};
use fieldpost::store::browse::{Ask, Found};
use fieldpost::store::{Append, Batch, Committed, Gap, Settings, Store, StoreError};
use fieldpost::turn::{Change, Hold, Inbound, Offer, OnSessionLoss, Resume, RowState, Taken};

use crate::disk;
use crate::oracle::{Place, Row, START, State};

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
    /// CONNECT after another owner or a copied database.
    Disowned,
    /// A gap record is accepted, and its gap closed.
    Told,
}

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
    /// Done bit and row in two transactions: what the store never does.
    pub split_done: bool,
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
    pub fn new(settings: Settings, seed: u64, state: State) -> Workload {
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
            split_done: false,
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
            30..50 => self.begin(),
            50..60 if self.connected => self.absent(),
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
                self.store = Some(store);
                self.count("starts");
                self.look();
                self.answered(BTreeSet::new());
            }
            Err(error) if disk::refusals() == 0 => self.complain(format!("cannot be opened: {error}")),
            Err(_) => {}
        }
    }

    fn disown(&mut self) {
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

    fn policy(&mut self) -> OnSessionLoss {
        if self.random.bool() { OnSessionLoss::Republish } else { OnSessionLoss::Drop }
    }

    /// A connection begins; mostly to the same broker.
    fn begin(&mut self) {
        let policy = OnSessionLoss::Republish;
        // One broker: what moves between several is the concern of `tests/store.rs` and `tests/failover.rs`.
        let owner = ("broker".to_owned(), "client".to_owned());
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
                after.begin((&owner.0, &owner.1), policy);
                return self.failed(error, after);
            }
        };
        self.count("connections");
        self.state.begin((&owner.0, &owner.1), policy);
        let mut rows = BTreeMap::new();
        let mut in_hand = Vec::new();
        for resume in &begin.resume {
            match resume {
                Resume::Row { id, state, send_no, lane, seq, record } => {
                    let place = (*lane, seq.0);
                    rows.insert(id.get(), Row { place, send_no: *send_no, state: *state });
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
        if rows != self.state.rows {
            self.complain(format!("resumes {rows:?}, should be {:?}", self.state.rows));
        }
        self.limits_took(before);
        for (id, hand) in in_hand {
            let id = id.unwrap_or_else(|| self.free_id());
            self.in_hand.insert(id, hand);
        }
        self.connected = true;
        self.look();
        self.answered(if moved { BTreeSet::from([Kind::Disowned]) } else { BTreeSet::new() });
        if begin.clean_start_needed || (begin.session_uncertain && self.random.bool()) {
            self.absent();
        } else {
            self.commit(Vec::new(), vec![Change::SessionPresent], None);
        }
    }

    /// The broker's session is gone.
    fn absent(&mut self) {
        let policy = self.policy();
        let change = match self.random.u32(0..4) {
            0 => Change::SessionReplaced(policy),
            _ => Change::SessionAbsent(policy),
        };
        self.count("sessions lost");
        self.in_hand.clear();
        self.connected = matches!(change, Change::SessionAbsent(_));
        self.commit(Vec::new(), vec![change], None);
    }

    fn free_id(&mut self) -> u16 {
        loop {
            self.next_id = if self.next_id == 4000 { 1024 } else { self.next_id + 1 };
            if !self.in_hand.contains_key(&self.next_id) && !self.state.rows.contains_key(&self.next_id) {
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
        if self.split_done {
            return self.commit_split(changes);
        }
        if !(appends.is_empty() && changes.is_empty() && offer.is_none()) {
            self.commit(appends, changes, offer);
        }
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
        let hands: Vec<(u16, InHand)> = self.in_hand.iter().map(|(id, hand)| (*id, *hand)).collect();
        for (number, InHand { place: (lane, seq), qos }) in hands {
            let Some(id) = PacketId::new(number) else { continue };
            let row = self.state.rows.get(&number).map(|row| row.state);
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
        if self.random.u32(0..100) < 8 {
            changes.push(self.inbound());
        }
        let open: Vec<u16> = self.state.rx_open.keys().copied().collect();
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
        let inbound = Inbound {
            topic: Topic::new("command").expect("a topic"),
            payload: Bytes::from(format!("{{\"id\":{}}}", self.next_text)),
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
        let before = self.state.clone();
        let done: Vec<Change> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Completed(id) => before.rows.get(&id.get()),
                _ => None,
            })
            .filter(|row| row.state != RowState::Abandoned)
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
        self.commit(vec![Append { messages: vec![message], closes: Vec::new() }], changes, Some(offer));
    }

    fn commit(&mut self, appends: Vec<Append>, changes: Vec<Change>, offer: Option<Offer>) {
        let before = self.dropped();
        let (asked, learned) = (appends.clone(), changes.clone());
        let offered: BTreeSet<u16> =
            offer.iter().flat_map(|offer| offer.ids.iter().map(|id| id.get())).collect();
        let Some(store) = &mut self.store else { return };
        let committed = match store.commit(Batch { appends, changes, offer, ..Batch::default() }, self.now) {
            Ok(committed) => committed,
            Err(error) => {
                let mut after = self.state.clone();
                apply(&mut after, &asked, &learned, None, self.now);
                return self.failed(error, after);
            }
        };
        self.count("commits");
        apply(&mut self.state, &asked, &learned, Some(&committed), self.now);
        self.count_changes(&learned);
        self.limits_took(before);
        self.take(&committed.taken, &offered);
        self.look();
        let kinds = kinds(&asked, &learned, &committed);
        self.answered(kinds);
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
            if !offered.contains(&id) || self.in_hand.contains_key(&id) || self.state.rows.contains_key(&id) {
                self.complain(format!("identifier {id} is handed out twice, or was never offered"));
            }
            if kept.payload != taken.record.payload || kept.topic != taken.record.topic {
                self.complain(format!("{place:?} is not what was accepted"));
            }
            let overtaken = self.state.waiting.range((place.0, 0)..place).any(|(older, of)| {
                of.topic == kept.topic
                    && !held.contains(older)
                    && !self.state.rows.values().any(|row| row.place == *older)
            });
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
                self.state.rows.insert(id, row);
            }
        }
    }

    fn held(&self) -> BTreeSet<Place> {
        let hands = self.in_hand.values().map(|hand| hand.place);
        hands.chain(self.state.in_exchange()).collect()
    }

    fn dropped(&self) -> BTreeMap<(Lane, String), u64> {
        self.state.dropped.clone()
    }

    /// Limits say how many they took; the promise says which.
    fn limits_took(&mut self, before: BTreeMap<(Lane, String), u64>) {
        let Some(Ok(look)) = self.store.as_ref().map(|store| store.look(self.now)) else { return };
        let held = self.held();
        let mut took = look.dropped;
        // Room is made before anything is handed out.
        took.sort_by_key(|(_, reason, _)| reason != "quota");
        for (lane, reason, count) in took {
            let known = before.get(&(lane, reason.clone())).copied().unwrap_or(0);
            let by_change = self.state.dropped.get(&(lane, reason.clone())).copied().unwrap_or(0);
            let took = count.saturating_sub(by_change.max(known)) as usize;
            let now = self.now.mono_ms;
            let expired = |expires_at: Option<u64>| expires_at.is_some_and(|at| at <= now);
            let left = if reason == "quota" { self.listed(lane) } else { BTreeSet::new() };
            let of_lane = self.state.waiting.range((lane, 0)..=(lane, u64::MAX));
            // For bytes whole segments go, and one with something in flight stays: which, the store says.
            let may_go = of_lane.filter(|(place, kept)| match reason.as_str() {
                "quota" => !left.contains(&place.1),
                "expired" => !held.contains(place) && expired(kept.expires_at),
                _ => !held.contains(place),
            });
            let mut may_go: Vec<(bool, Place)> =
                may_go.map(|(place, kept)| (expired(kept.expires_at), *place)).collect();
            if reason == "quota" {
                // What is gone and had expired may have gone for that.
                may_go.sort();
            }
            let places: Vec<Place> = may_go.into_iter().map(|(_, place)| place).take(took).collect();
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
                if let Some(damage) = &look.damage {
                    let what = damage.what.clone();
                    self.complain(format!("set aside: {what}"));
                }
                for wrong in self.state.disagrees(&look) {
                    self.complain(wrong);
                }
                self.state.boot = self.state.boot.max(look.boot.boot);
            }
            Err(error) => self.complain(error.to_string()),
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
        let Some(store) = &mut self.store else { return };
        // Until the disk takes it.
        let begun = (0..200)
            .map(|_| store.begin((&owner.0, &owner.1), OnSessionLoss::Republish, &[], self.now))
            .find_map(Result::ok);
        let Some(begin) = begun else { return self.complain("never came back".to_owned()) };
        let Ok(look) = store.look(self.now) else { return self.complain("cannot look".to_owned()) };
        let mut before = self.state.clone();
        for state in [&mut before, &mut after] {
            state.begin((&owner.0, &owner.1), OnSessionLoss::Republish);
        }
        let flags = (begin.clean_start_needed, begin.session_uncertain, begin.canary_proven);
        let rows = begin.resume.iter().filter_map(|resume| match resume {
            Resume::Row { id, state, send_no, lane, seq, .. } => {
                Some((id.get(), Row { place: (*lane, seq.0), send_no: *send_no, state: *state }))
            }
            Resume::Older(_) => None,
        });
        let rows: BTreeMap<u16, Row> = rows.collect();
        for resume in &begin.resume {
            if let Resume::Older(record) = resume {
                let id = self.free_id();
                let place = (record.lane, record.seq.0);
                self.in_hand.insert(id, InHand { place, qos: Qos::AtLeastOnce });
            }
        }
        let open: Vec<u16> = begin.rx_open.iter().map(|(id, _)| id.get()).collect();
        let is_before = before.disagrees(&look).is_empty()
            && flags == (before.clean_start, before.uncertain, before.canary)
            && rows == before.rows
            && open == before.rx_open.keys().copied().collect::<Vec<_>>();
        if is_before {
            self.state = before;
            return;
        }
        self.failed_but_done += 1;
        let dropped = after.dropped.clone();
        self.state = after;
        self.limits_took(dropped);
        for (id, row) in rows {
            let handed_out = row.state == RowState::Published
                && self.state.waiting.contains_key(&row.place)
                && !self.state.in_exchange().contains(&row.place);
            if handed_out {
                self.state.rows.entry(id).or_insert(row);
                self.state.uncertain = true;
            }
        }
        if flags != (self.state.clean_start, self.state.uncertain, self.state.canary) {
            self.complain(format!("flags {flags:?} are neither what they were nor what they should be"));
        }
    }
}

/// What was asked, applied to what was answered; without an answer, as if all of it had been accepted.
fn apply(state: &mut State, appends: &[Append], changes: &[Change], answer: Option<&Committed>, now: Stamp) {
    let accepted: Vec<&Append> = appends
        .iter()
        .enumerate()
        .filter(|(number, _)| answer.is_none_or(|answer| answer.appends[*number] == Ok(())))
        .map(|(_, append)| append)
        .collect();
    // What goes in this transaction came after what is told of.
    for gap in accepted.iter().flat_map(|append| &append.closes) {
        state.close(gap);
    }
    for change in changes {
        state.settle(change);
    }
    for append in accepted {
        state.accept(&append.messages, now);
    }
}

fn kinds(appends: &[Append], changes: &[Change], committed: &Committed) -> BTreeSet<Kind> {
    let mut kinds = BTreeSet::new();
    for (append, outcome) in appends.iter().zip(&committed.appends) {
        if outcome.is_ok() {
            kinds.insert(if append.closes.is_empty() { Kind::Accepted } else { Kind::Told });
        }
    }
    if committed.taken.iter().any(|taken| taken.qos == Qos::ExactlyOnce) {
        kinds.insert(Kind::Published);
    }
    kinds.extend(changes.iter().filter_map(|change| match change {
        Change::Received(_) => Some(Kind::Received),
        Change::Completed(_) | Change::Acknowledged { .. } | Change::DeadLetter { .. } => Some(Kind::Done),
        Change::Inbound { .. } | Change::InboundOpened { .. } => Some(Kind::Inbound),
        Change::InboundReleased(_) => Some(Kind::Released),
        Change::SessionAbsent(_) | Change::SessionReplaced(_) | Change::SessionPresent => Some(Kind::Settled),
        _ => None,
    }));
    kinds
}
