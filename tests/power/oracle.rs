//! Whether a store that was opened again keeps what it has promised.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use bytes::Bytes;
use fieldpost::clock::Stamp;
use fieldpost::command::{CommandStep, Recorded, Stepped};
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Record, Topic};
use fieldpost::store::{Append, Batch, Look, Settings, Store, StoreError};
use fieldpost::turn::{Begin, Change, Inbound, Offer, OnSessionLoss, Resume, RowState};
use rusqlite::Connection;

use crate::disk::{self, Image};
use crate::state::{Flags, Kept, Owner, Place, Progress, Row, State};

/// Before anything was accepted: nothing is too old at this moment.
pub const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };

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

    fn lost(&mut self, what: String) {
        self.lost += 1;
        self.words.push(what);
    }

    fn doubled(&mut self, what: String) {
        self.doubled += 1;
        self.words.push(what);
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
    recorded: Vec<Recorded>,
    interrupted: Vec<Recorded>,
    /// Of every id that anybody used, whether it may not begin again.
    known: BTreeMap<String, bool>,
    begins: Vec<(Owner, Begin)>,
    /// In the order in which they came.
    drained: Vec<(Place, Bytes)>,
    next: [u64; 3],
    /// Of each session, before any connection began; where they were asked for.
    flags: Option<BTreeMap<Owner, Flags>>,
}

/// Opens the store over what a power cut left; it must be in one of these states: what was answered, and what was
/// just being done. The first names the violations.
pub fn examine(settings: &Settings, states: &[&State], flags: Option<BTreeMap<Owner, Flags>>) -> Verdict {
    let mut seen = match see(settings, states) {
        Ok(seen) => Seen { flags, ..seen },
        Err(error) => return Verdict::corrupt(error),
    };
    if let Some(damage) = seen.look.damage.take() {
        return Verdict::corrupt(format!("set aside: {}", damage.what));
    }
    if let Err(what) = whole(&settings.path) {
        return Verdict::corrupt(what);
    }
    let mut verdicts = states.iter().map(|state| judge(&seen, state));
    let mut first = verdicts.next().unwrap_or_default();
    if first.violations() > 0 && verdicts.any(|verdict| verdict.violations() == 0) {
        first = Verdict::default();
    }
    first
}

fn see(settings: &Settings, states: &[&State]) -> Result<Seen, String> {
    let words = |error: StoreError| error.to_string();
    let last = states[states.len() - 1];
    let mut store = Store::open(settings.clone()).map_err(words)?;
    let look = store.look(START).map_err(words)?;
    let recorded = store.recorded(0, usize::MAX >> 1, START).map_err(words)?;
    let interrupted = store.interrupted(START).map_err(words)?;
    let owners = states.iter().flat_map(|state| state.sessions.keys().cloned()).collect();
    let begins = begin_with_each(&owners, &last.owner, |owner| {
        store.begin((&owner.0, &owner.1), OnSessionLoss::Republish, &[], START).map_err(words)
    })?;
    let ids: BTreeSet<String> = states.iter().flat_map(|state| state.known_ids()).collect();
    let append =
        Append { messages: Lane::ALL.map(|lane| message(lane, "last")).to_vec(), closes: Vec::new() };
    let changes = ids.iter().map(|_| Change::Inbound { id: None, inbound: repeated() }).collect();
    let batch = Batch { appends: vec![append], changes, ..Batch::default() };
    store.commit(batch, START).map_err(words)?;
    let first = store.newest_command() + 1 - ids.len() as u64;
    let steps = (first..).zip(&ids).map(|(number, id)| CommandStep::Begin { number, id: id.clone() });
    let batch = Batch { steps: steps.collect(), ..Batch::default() };
    let stepped = store.commit(batch, START).map_err(words)?.steps;
    let known = ids.into_iter().zip(stepped.iter().map(|stepped| *stepped == Stepped::Repeated)).collect();
    let (mut drained, mut next) = (Vec::new(), [0; 3]);
    for record in drain(&mut store).map_err(words)? {
        if record.payload == "last" {
            next[record.lane as usize] = record.seq.0;
        } else {
            drained.push(((record.lane, record.seq.0), record.payload));
        }
    }
    Ok(Seen { look, recorded, interrupted, known, begins, drained, next, flags: None })
}

/// What each of these brokers' sessions starts from; the last is the one that is gone on with.
pub fn begin_with_each<E>(
    owners: &BTreeSet<Owner>,
    last: &Owner,
    mut begin: impl FnMut(&Owner) -> Result<Begin, E>,
) -> Result<Vec<(Owner, Begin)>, E> {
    let others = owners.iter().filter(|owner| *owner != last);
    others.chain([last]).map(|owner| Ok((owner.clone(), begin(owner)?))).collect()
}

/// The rows a session starts from.
pub fn rows_of(begin: &Begin) -> BTreeMap<u16, Row> {
    let rows = begin.resume.iter().filter_map(|resume| match resume {
        Resume::Row { id, state, send_no, lane, seq, .. } => {
            Some((id.get(), Row { place: (*lane, seq.0), send_no: *send_no, state: *state }))
        }
        Resume::Older(_) => None,
    });
    rows.collect()
}

/// What the tables say of each session before anybody connects. Read from a copy, so that the store finds its files
/// as the power cut left them.
pub fn flags(image: &Image) -> BTreeMap<Owner, Flags> {
    let folder = tempfile::tempdir().expect("a folder can be made");
    disk::lay_out(folder.path(), image);
    let read = || -> rusqlite::Result<BTreeMap<Owner, Flags>> {
        let db = Connection::open(folder.path().join("outbox.db"))?;
        let mut statement =
            db.prepare("SELECT broker, client_id, clean_start, uncertain, canary FROM session")?;
        let rows = statement
            .query_map([], |row| Ok(((row.get(0)?, row.get(1)?), (row.get(2)?, row.get(3)?, row.get(4)?))))?;
        rows.collect()
    };
    // Without tables nothing is known of any session.
    read().unwrap_or_default()
}

fn repeated() -> Inbound {
    Inbound {
        topic: Topic::new("command").expect("a topic"),
        payload: Bytes::from_static(b"again"),
        qos: Qos::AtLeastOnce,
        retain: false,
        response_topic: None,
        correlation_data: None,
    }
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
    judge_commands(seen, state, &mut verdict);
    for (owner, begin) in &seen.begins {
        judge_session(owner, begin, state, &mut verdict);
    }
    if let Some(flags) = seen.flags.as_ref().filter(|flags| **flags != state.flags()) {
        verdict.wrong(format!("before CONNECT {flags:?}, should be {:?}", state.flags()));
    }
    judge_messages(seen, state, &mut verdict);
    if seen.look.boot.boot <= state.boot {
        verdict.wrong(format!("boot {} follows boot {}", seen.look.boot.boot, state.boot));
    }
    verdict
}

/// At most once, and answered.
fn judge_commands(seen: &Seen, state: &State, verdict: &mut Verdict) {
    for wrong in state.commands_disagree(&seen.recorded, &seen.interrupted) {
        verdict.wrong(wrong);
    }
    let is_in = |list: &[Recorded], number: u64| list.iter().any(|recorded| recorded.number == number);
    for (number, command) in &state.commands {
        let fresh = is_in(&seen.recorded, *number);
        let begun = is_in(&seen.interrupted, *number);
        match command.progress {
            Progress::Recorded if !fresh && !begun => verdict.lost(format!("command {number} is lost")),
            Progress::Begun if fresh => verdict.doubled(format!("command {number} would begin again")),
            Progress::Begun if !begun => verdict.lost(format!("command {number} is never answered")),
            Progress::Answered if fresh || begun => {
                verdict.doubled(format!("command {number} would be answered again"));
            }
            _ => {}
        }
    }
    let known = state.known_ids();
    for (id, is_known) in &seen.known {
        match (known.contains(id), is_known) {
            (true, false) => verdict.doubled(format!("command {id:?} could be repeated")),
            (false, true) => verdict.wrong(format!("command {id:?} is known and was never begun")),
            _ => {}
        }
    }
}

fn judge_session(owner: &Owner, begin: &Begin, state: &State, verdict: &mut Verdict) {
    // One that is not known begins clean.
    let session = state.sessions.get(owner).cloned().unwrap_or_default();
    let rows = rows_of(begin);
    let send_nos: Vec<u64> = begin
        .resume
        .iter()
        .filter_map(|resume| match resume {
            Resume::Row { send_no, .. } => Some(*send_no),
            Resume::Older(_) => None,
        })
        .collect();
    if !send_nos.is_sorted() {
        verdict.wrong("rows resume out of order".to_owned());
    }
    if rows != session.rows {
        verdict.wrong(format!("rows {rows:?}, should be {:?}", session.rows));
    }
    let rx_open: BTreeMap<u16, u128> = begin.rx_open.iter().map(|(id, hash)| (id.get(), *hash)).collect();
    if rx_open != session.rx_open {
        verdict.wrong(format!("open identifiers {rx_open:?}, should be {:?}", session.rx_open));
    }
    let flags = (begin.clean_start_needed, begin.session_uncertain, begin.canary_proven);
    let uncertain = session.uncertain || !session.rows.is_empty() || !session.rx_open.is_empty();
    let should = (session.clean_start, uncertain, session.canary);
    if flags != should {
        verdict.wrong(format!("clean start, uncertain, canary: {flags:?}, should be {should:?}"));
    }
}

/// Everything that waits is published once, in its order, at whichever broker.
fn judge_messages(seen: &Seen, state: &State, verdict: &mut Verdict) {
    let mut published: BTreeMap<Place, &Bytes> = BTreeMap::new();
    let mut hand_out = |place: Place, payload| {
        if published.insert(place, payload).is_some() {
            verdict.doubled(format!("{place:?} is published twice"));
        }
    };
    let mut there = BTreeSet::new();
    for (number, (_, begin)) in seen.begins.iter().enumerate() {
        let is_last = number + 1 == seen.begins.len();
        for resume in &begin.resume {
            match resume {
                Resume::Row { state, record, lane, seq, .. } => {
                    there.insert((*lane, seq.0));
                    if let (RowState::Published, Some(record)) = (state, record) {
                        hand_out((record.lane, record.seq.0), &record.payload);
                    }
                }
                // Given back when another connection begins.
                Resume::Older(record) if is_last => hand_out((record.lane, record.seq.0), &record.payload),
                Resume::Older(_) => {}
            }
        }
    }
    for (place, payload) in &seen.drained {
        hand_out(*place, payload);
    }
    for lane in Lane::ALL {
        let of_lane: Vec<u64> =
            seen.drained.iter().filter(|((of, _), _)| *of == lane).map(|((_, seq), _)| *seq).collect();
        if !of_lane.is_sorted() {
            verdict.wrong(format!("messages of lane {lane} come out of order"));
        }
        if seen.next[lane as usize] != state.next[lane as usize] {
            let (is, should) = (seen.next[lane as usize], state.next[lane as usize]);
            verdict.wrong(format!("the next message of lane {lane} gets {is}, should be {should}"));
        }
    }
    let rows = state.sessions.values().flat_map(|session| session.rows.values());
    let received: BTreeSet<Place> =
        rows.filter(|row| row.state == RowState::Received).map(|row| row.place).collect();
    for (place, kept) in &state.waiting {
        let is_there = match published.get(place) {
            Some(payload) => **payload == kept.payload,
            None => received.contains(place) && there.contains(place),
        };
        if !is_there {
            verdict.lost(format!("{place:?} is lost, or not what was accepted"));
        }
    }
    for place in published.keys() {
        if !state.waiting.contains_key(place) || received.contains(place) {
            verdict.doubled(format!("{place:?} is published again"));
        }
    }
}
