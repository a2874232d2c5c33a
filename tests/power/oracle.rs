//! What the store has promised, in plain maps, and whether a store that was opened again keeps it.
//!
//! Knows the promises only, nothing of how the store keeps them: it is told what was asked and what was answered,
//! and says what must be there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use bytes::Bytes;
use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Record, Seq, Topic};
use fieldpost::store::{Append, Batch, Gap, Look, Settings, Store, StoreError};
use fieldpost::turn::{Begin, Change, Offer, OnSessionLoss, Resume, RowState};

/// Before anything was accepted: nothing is too old at this moment.
pub const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };

pub type Place = (Lane, u64);

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

/// Everything that was answered, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// The number the lane's next message gets.
    pub next: [u64; 3],
    pub waiting: BTreeMap<Place, Kept>,
    pub rows: BTreeMap<u16, Row>,
    pub rx_open: BTreeMap<u16, u128>,
    pub inbox: u64,
    pub dead_letters: u64,
    pub dropped: BTreeMap<(Lane, String), u64>,
    pub gaps: BTreeMap<(Lane, String), (u64, u64, u64)>,
    /// Ended by their last acknowledgement, or called delivered when the session was lost.
    pub delivered: [u64; 3],
    pub owner: (String, String),
    pub clean_start: bool,
    pub uncertain: bool,
    pub canary: bool,
    pub epoch: u32,
    pub boot: u32,
}

impl Default for State {
    fn default() -> Self {
        State {
            next: [1; 3],
            waiting: BTreeMap::new(),
            rows: BTreeMap::new(),
            rx_open: BTreeMap::new(),
            inbox: 0,
            dead_letters: 0,
            dropped: BTreeMap::new(),
            gaps: BTreeMap::new(),
            delivered: [0; 3],
            owner: Default::default(),
            clean_start: true,
            uncertain: false,
            canary: false,
            epoch: 1,
            boot: 0,
        }
    }
}

impl State {
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
                if let Some(row) = self.rows.get_mut(&id.get()) {
                    row.state = RowState::Received;
                }
            }
            Change::Completed(id) => {
                if let Some(row) = self.rows.remove(&id.get()) {
                    self.deliver(row.place);
                }
            }
            Change::Acknowledged { lane, seq } => self.deliver((*lane, seq.0)),
            Change::Refused { id, .. } => {
                self.rows.retain(|row, _| Some(*row) != id.map(PacketId::get));
            }
            Change::DeadLetter { id, lane, seq, .. } => {
                self.rows.retain(|row, _| Some(*row) != id.map(PacketId::get));
                self.dead_letters += 1;
                self.drop_one((*lane, seq.0), "dead_letter");
            }
            Change::Abandoned(id) => {
                if let Some(row) = self.rows.get_mut(&id.get()) {
                    row.state = RowState::Abandoned;
                    let place = row.place;
                    self.drop_one(place, "abandoned");
                }
            }
            Change::SessionAbsent(policy) | Change::RowsVoid(policy) => {
                self.lose_session(*policy);
                self.clean_start = false;
            }
            Change::SessionReplaced(policy) => {
                self.lose_session(*policy);
                self.clean_start = true;
            }
            Change::SessionPresent => self.uncertain = false,
            Change::Canary { proven } => self.canary = *proven,
            Change::InboundOpened { id, hash, .. } => {
                self.rx_open.insert(id.get(), *hash);
                self.inbox += 1;
            }
            Change::Inbound { .. } => self.inbox += 1,
            Change::InboundReleased(id) => {
                self.rx_open.remove(&id.get());
            }
        }
    }

    /// The broker holds nothing of ours.
    fn lose_session(&mut self, policy: OnSessionLoss) {
        for row in std::mem::take(&mut self.rows).into_values() {
            if row.state == RowState::Received && policy == OnSessionLoss::Drop {
                self.deliver(row.place);
            }
        }
        self.rx_open.clear();
        (self.uncertain, self.canary) = (false, false);
    }

    /// A connection begins.
    pub fn begin(&mut self, owner: (&str, &str), policy: OnSessionLoss) {
        if (self.owner.0.as_str(), self.owner.1.as_str()) != owner {
            self.lose_session(policy);
            self.clean_start = true;
            self.owner = (owner.0.to_owned(), owner.1.to_owned());
        }
        self.uncertain |= !self.rows.is_empty() || !self.rx_open.is_empty();
    }

    /// The database is a copy of the past.
    pub fn disown(&mut self, epoch: u32, boot: u32, policy: OnSessionLoss) {
        self.lose_session(policy);
        self.clean_start = true;
        (self.epoch, self.boot) = (self.epoch.max(epoch) + 1, self.boot.max(boot) + 1);
    }

    /// Messages with a row that may still be published or released: no limit may take them.
    pub fn in_exchange(&self) -> BTreeSet<Place> {
        self.rows.values().filter(|row| row.state != RowState::Abandoned).map(|row| row.place).collect()
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
        compare("inbox", look.inbox.to_string(), self.inbox.to_string());
        compare("rows", look.rows.to_string(), self.rows.len().to_string());
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

/// What is wrong with a store that was opened again.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// Messages that were accepted and are nowhere.
    pub lost: usize,
    /// Messages that are published again although their PUBREC, or their end, was committed.
    pub doubled: usize,
    /// Refused to open, set aside, or not whole.
    pub corrupt: usize,
    /// Everything else that was promised.
    pub wrong: usize,
    pub words: Vec<String>,
}

impl Verdict {
    pub fn violations(&self) -> usize {
        self.lost + self.doubled + self.corrupt + self.wrong
    }

    pub fn add(&mut self, other: Verdict) {
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.corrupt += other.corrupt;
        self.wrong += other.wrong;
        if self.words.len() < 5 {
            self.words.extend(other.words);
        }
    }

    fn corrupt(what: String) -> Verdict {
        Verdict { corrupt: 1, words: vec![what], ..Verdict::default() }
    }

    fn wrong(&mut self, what: String) {
        self.wrong += 1;
        self.words.push(what);
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { lost, doubled, corrupt, wrong, .. } = self;
        write!(f, "lost={lost} doubled={doubled} corrupt={corrupt} wrong={wrong}")
    }
}

/// What a store that was opened again says and hands out.
struct Seen {
    look: Look,
    begin: Begin,
    /// In the order in which they came.
    drained: Vec<(Place, Bytes)>,
    next: [u64; 3],
}

/// Opens the store over what a power cut left; it must be in one of these states: what was answered, and what was
/// just being done. The first names the violations.
pub fn examine(settings: &Settings, states: &[&State]) -> Verdict {
    let mut seen = match see(settings, states[states.len() - 1]) {
        Ok(seen) => seen,
        Err(error) => return Verdict::corrupt(error),
    };
    if let Some(damage) = seen.look.damage.take() {
        return Verdict::corrupt(format!("set aside: {}", damage.what));
    }
    if let Err(what) = whole(&settings.path) {
        return Verdict::corrupt(what);
    }
    // A changed owner has been applied by the look itself.
    let owner = &states[states.len() - 1].owner;
    let mut verdicts = states.iter().filter(|state| state.owner == *owner).map(|state| judge(&seen, state));
    let mut first = verdicts.next().unwrap_or_default();
    if first.violations() > 0 && verdicts.any(|verdict| verdict.violations() == 0) {
        first = Verdict::default();
    }
    first
}

fn see(settings: &Settings, state: &State) -> Result<Seen, String> {
    let words = |error: StoreError| error.to_string();
    let mut store = Store::open(settings.clone()).map_err(words)?;
    let look = store.look(START).map_err(words)?;
    let owner = (state.owner.0.as_str(), state.owner.1.as_str());
    let begin = store.begin(owner, OnSessionLoss::Republish, &[], START).map_err(words)?;
    let append =
        Append { messages: Lane::ALL.map(|lane| message(lane, "last")).to_vec(), closes: Vec::new() };
    store.commit(Batch { appends: vec![append], ..Batch::default() }, START).map_err(words)?;
    let (mut drained, mut next) = (Vec::new(), [0; 3]);
    for record in drain(&mut store).map_err(words)? {
        if record.payload == "last" {
            next[record.lane as usize] = record.seq.0;
        } else {
            drained.push(((record.lane, record.seq.0), record.payload));
        }
    }
    Ok(Seen { look, begin, drained, next })
}

fn message(lane: Lane, text: &str) -> Message {
    Message {
        topic: Topic::new("last").expect("a topic"),
        qos: Qos::AtLeastOnce,
        retain: false,
        lane,
        at: START,
        expires_after: None,
        correlation_data: None,
        payload: Payload::Whole(Bytes::copy_from_slice(text.as_bytes())),
    }
}

/// Everything that is not in flight, in the order in which it is handed out.
fn drain(store: &mut Store) -> Result<Vec<Record>, StoreError> {
    let mut records = Vec::new();
    loop {
        // At QoS 1, so that looking writes no rows.
        let offer = Offer {
            ids: (1024..1524).filter_map(PacketId::new).collect(),
            qos2_room: 0,
            max_bytes: usize::MAX,
            max_qos: Qos::AtLeastOnce,
            max_publish_bytes: None,
        };
        let taken = store.commit(Batch { offer: Some(offer), ..Batch::default() }, START)?.taken;
        if taken.is_empty() {
            return Ok(records);
        }
        records.extend(taken.into_iter().map(|taken| taken.record));
    }
}

/// Has a store take some texts.
pub fn accept(store: &mut Store, texts: Vec<String>) {
    let messages = texts.iter().map(|text| message(Lane::Normal, text)).collect();
    let append = Append { messages, closes: Vec::new() };
    let committed = store.commit(Batch { appends: vec![append], ..Batch::default() }, START);
    assert_eq!(committed.expect("the disk is in order").appends, [Ok(())]);
}

/// Everything a store without exchanges holds.
pub fn hand_out_all(settings: &Settings) -> BTreeMap<Place, Kept> {
    let mut store = Store::open(settings.clone()).expect("it can be opened");
    let records = drain(&mut store).expect("it can be read");
    let kept = records.into_iter().map(|record| {
        let Record { lane, seq, topic, qos, payload, .. } = record;
        ((lane, seq.0), Kept { topic, qos, payload, expires_at: None })
    });
    kept.collect()
}

fn whole(path: &Path) -> Result<(), String> {
    let check = || -> rusqlite::Result<String> {
        let db = rusqlite::Connection::open(path)?;
        db.execute_batch("PRAGMA locking_mode = EXCLUSIVE")?;
        db.query_row("PRAGMA integrity_check", [], |row| row.get(0))
    };
    match check() {
        Ok(verdict) if verdict == "ok" => Ok(()),
        Ok(verdict) => Err(verdict),
        Err(error) => Err(error.to_string()),
    }
}

fn judge(seen: &Seen, state: &State) -> Verdict {
    let mut verdict = Verdict::default();
    for wrong in state.disagrees(&seen.look) {
        verdict.wrong(wrong);
    }
    let mut published: BTreeMap<Place, &Bytes> = BTreeMap::new();
    let mut rows = BTreeMap::new();
    let mut hand_out = |place: Place, payload| {
        if published.insert(place, payload).is_some() {
            verdict.doubled += 1;
            verdict.words.push(format!("{place:?} is published twice"));
        }
    };
    let mut order = 0;
    let mut out_of_order = 0;
    for resume in &seen.begin.resume {
        match resume {
            Resume::Row { id, state, send_no, record, lane, seq } => {
                out_of_order += usize::from(*send_no <= order);
                order = *send_no;
                rows.insert(id.get(), Row { place: (*lane, seq.0), send_no: *send_no, state: *state });
                if let (RowState::Published, Some(record)) = (state, record) {
                    hand_out((record.lane, record.seq.0), &record.payload);
                }
            }
            Resume::Older(record) => hand_out((record.lane, record.seq.0), &record.payload),
        }
    }
    for (place, payload) in &seen.drained {
        hand_out(*place, payload);
    }
    for lane in Lane::ALL {
        let of_lane: Vec<u64> =
            seen.drained.iter().filter(|((of, _), _)| *of == lane).map(|((_, seq), _)| *seq).collect();
        out_of_order += usize::from(!of_lane.is_sorted());
        if seen.next[lane as usize] != state.next[lane as usize] {
            let (is, should) = (seen.next[lane as usize], state.next[lane as usize]);
            verdict.wrong(format!("the next message of lane {lane} gets {is}, should be {should}"));
        }
    }
    if out_of_order > 0 {
        verdict.wrong("messages come out of order".to_owned());
    }
    let received: BTreeSet<Place> =
        state.rows.values().filter(|row| row.state == RowState::Received).map(|row| row.place).collect();
    for (place, kept) in &state.waiting {
        let there = match published.get(place) {
            Some(payload) => **payload == kept.payload,
            None => received.contains(place) && rows.values().any(|row| row.place == *place),
        };
        if !there {
            verdict.lost += 1;
            verdict.words.push(format!("{place:?} is lost, or not what was accepted"));
        }
    }
    for place in published.keys() {
        if !state.waiting.contains_key(place) || received.contains(place) {
            verdict.doubled += 1;
            verdict.words.push(format!("{place:?} is published again"));
        }
    }
    if rows != state.rows {
        verdict.wrong(format!("rows {rows:?}, should be {:?}", state.rows));
    }
    let rx_open: BTreeMap<u16, u128> =
        seen.begin.rx_open.iter().map(|(id, hash)| (id.get(), *hash)).collect();
    if rx_open != state.rx_open {
        verdict.wrong(format!("open identifiers {rx_open:?}, should be {:?}", state.rx_open));
    }
    let flags = (seen.begin.clean_start_needed, seen.begin.session_uncertain, seen.begin.canary_proven);
    let uncertain = state.uncertain || !state.rows.is_empty() || !state.rx_open.is_empty();
    let should = (state.clean_start, uncertain, state.canary);
    if flags != should {
        verdict.wrong(format!("clean start, uncertain, canary: {flags:?}, should be {should:?}"));
    }
    if seen.look.boot.boot <= state.boot {
        verdict.wrong(format!("boot {} follows boot {}", seen.look.boot.boot, state.boot));
    }
    verdict
}
