//! A pair in a box: the real session, the real store and the model broker in one thread, on virtual time.
//!
//! `World` does what `uplink::connection` and the store's thread do between the three, one small step at a time,
//! so that a test decides what happens between any two of them: how many bytes arrive, when a commit returns,
//! where the link is cut and where the program dies. The bytes go through the real link and its codecs.
//! `thread` is the store's thread and the dispatch, `uplink` the connection, `outside` the broker and the faults,
//! `books` what must be true of what is on the disk.
//!
//! Invariant: same seed, same run. Nothing here reads a clock, waits, or depends on a hash's order.

#[path = "world/books.rs"]
mod books;
#[path = "world/outside.rs"]
mod outside;
#[path = "world/thread.rs"]
mod thread;
#[path = "world/uplink.rs"]
mod uplink;
#[path = "world/wire.rs"]
mod wire;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::clock::Stamp;
use fieldpost::command::CommandStep;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Topic};
use fieldpost::store::{self, Append, LaneLimits, Store, WhenFull};
use fieldpost::turn::{Change, Offer, OnSessionLoss, Taken};
use fieldpost::uplink::link::Link;
use fieldpost::uplink::packet::{Limits, Packet, Protocol};
use fieldpost::uplink::session::{Carry, Counted, Session, Settings};
use tempfile::TempDir;

use crate::rule::Rule;
use crate::support::broker::{self, Broker, ConnId};
pub use books::{Accepted, Command, Row};
use wire::Pipe;

pub const CLIENT: &str = "box";
pub const CANARY: &str = "box/canary";
pub const PRESENCE: &str = "box/state";
const OBSERVER: &str = "observer";
/// The brokers of a world: the second comes into play when messages go there.
const BROKERS: [&str; 2] = ["broker", "another"];
/// 2026-01-01, so that the wall clock is believable.
const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };

/// What a world is made with.
#[derive(Debug, Clone)]
pub struct Plan {
    pub protocol: Protocol,
    pub settings: Settings,
    /// The rule that the box breaks, to see whether it is missed.
    pub broken: Option<Rule>,
    pub quota: u64,
    pub when_full: WhenFull,
    pub lanes: [LaneLimits; 3],
    pub replay: store::Replay,
    pub limits: broker::Limits,
    /// The agent's own limit for what the broker sends.
    pub max_packet: u32,
    /// mosquitto's `max_inflight_messages`: on 3.1.1 what is above it is acknowledged and thrown away.
    pub held_limit: Option<usize>,
    /// What the broker does not let us do to the canary: subscribe, publish, read.
    pub canary_denied: Option<u8>,
    /// The broker holds identifiers of an earlier life of this client.
    pub haunted: bool,
    /// Lanes nobody subscribes to.
    pub unheard: Option<Lane>,
}

impl Plan {
    pub fn new(protocol: Protocol) -> Plan {
        Plan {
            protocol,
            settings: settings(protocol),
            broken: None,
            quota: 64 << 20,
            when_full: WhenFull::DropOldest,
            lanes: [LaneLimits::default(); 3],
            replay: store::Replay::default(),
            limits: broker::Limits::default(),
            max_packet: 1 << 20,
            held_limit: None,
            canary_denied: None,
            haunted: false,
            unheard: None,
        }
    }
}

pub fn settings(protocol: Protocol) -> Settings {
    Settings {
        protocol,
        keep_alive_ms: 60_000,
        ack_timeout_ms: 20_000,
        max_in_flight: 100,
        qos2_window: 20,
        limits: Limits::default(),
        clean_start: false,
        on_session_loss: OnSessionLoss::Republish,
        retry_refused_for_ms: 3_600_000,
        canary: Topic::new(CANARY).unwrap(),
        presence: Topic::new(PRESENCE).unwrap(),
        commands: vec![("cmd/#".to_owned(), Qos::ExactlyOnce)],
        broken: None,
    }
}

/// What the store's thread says to the session.
#[derive(Debug)]
enum Answer {
    Done { connection: u64, settled: bool, refused: Vec<PacketId>, taken: Option<Vec<Taken>> },
    Failed,
}

struct Online {
    session: Session,
    link: Link<Pipe>,
    pipe: Pipe,
    conn: ConnId,
    /// CONNACK has been handled.
    greeted: bool,
    /// The link is dead and nobody has noticed: nothing arrives on either side.
    dead: bool,
    /// PUBLISHes sent on this connection, for a rule that sends them again.
    sent: Vec<Packet>,
    /// What each identifier stood for last on this connection.
    published: BTreeMap<PacketId, Bytes>,
}

/// Whether the next commit fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextCommit {
    Works,
    Fails,
}

/// The broker that messages do not go to now, and what is in flight there, as committed.
#[derive(Default)]
struct Away {
    broker: Broker,
    rows: BTreeMap<u16, Row>,
    open: BTreeSet<u16>,
}

pub struct World {
    pub plan: Plan,
    pub broker: Broker,
    pub now: Stamp,
    store: Option<Store>,
    path: PathBuf,
    _folder: TempDir,
    online: Option<Online>,
    carry: Carry,
    connections: u64,
    observer: ConnId,
    /// Which of the brokers it is.
    at: usize,
    /// The other one, and what is open there.
    away: Option<Away>,
    // The store's thread.
    waiting: Vec<Append>,
    changes: Option<(u64, Vec<Change>)>,
    offer: Option<(u64, Offer)>,
    answers: VecDeque<Answer>,
    /// A commit failed: what a session knows from before is void until the next connection begins.
    failed: bool,
    /// Done bits that follow the removal of their rows, where that rule is broken.
    lagging: Vec<Change>,
    // The dispatch.
    cursor: u64,
    steps: Vec<CommandStep>,
    // The books.
    pub accepted: Vec<Accepted>,
    pub by_payload: BTreeMap<Bytes, usize>,
    by_seq: BTreeMap<(Lane, u64), usize>,
    next_seq: [u64; 3],
    pub counts: BTreeMap<String, u64>,
    /// How often what happened: coverage.
    pub tally: BTreeMap<&'static str, u64>,
    /// Commands the broker sent.
    pub commanded: Vec<Command>,
    /// Commands the store recorded.
    pub recorded: Vec<Bytes>,
    /// How often each command with an id was carried out.
    pub executed: BTreeMap<String, u32>,
    pub sessions_lost: u32,
    pub delivered: u64,
    pub possibly_doubled: u64,
    pub possibly_lost: u64,
    /// "Present" was believed although nothing proved it: so many rows.
    pub believed: u64,
    /// The broker has forgotten identifiers at some time.
    pub forgotten: bool,
    /// What is in flight at QoS 2, as committed.
    pub rows: BTreeMap<u16, Row>,
    /// Inbound identifiers that wait for PUBREL, as committed.
    open: BTreeSet<u16>,
    /// Inbound identifiers of this connection whose messages are not commands.
    unrecorded: BTreeSet<u16>,
    /// What this connection's CONNACK meant is committed.
    verdict: bool,
    /// What was sent before it was committed.
    pub early: Vec<String>,
    /// Rules broken that nobody but the books can see.
    pub complaints: Vec<String>,
    /// Payloads known to be done, as committed.
    pub done: BTreeSet<Bytes>,
    /// Until when lanes and topics are held, and since when each message is refused.
    held_lanes: BTreeMap<Lane, u64>,
    held_topics: BTreeMap<String, u64>,
    refused_since: BTreeMap<Bytes, u64>,
    /// How many refusals of each message the session has read, of those that ask to try again.
    pub refusals_heard: BTreeMap<Bytes, usize>,
    /// How many refusals of each message were looked at.
    refusals_seen: BTreeMap<Bytes, usize>,
    /// `retry_refused_for`, whatever the session makes of it.
    patience_ms: u64,
    /// The broker has announced a Maximum Packet Size at some time.
    pub is_size_limited: bool,
    /// The broker has announced a Maximum QoS at some time.
    pub was_limited: bool,
    /// Identifiers freed by PUBREL alone, whether there was a PUBREC or not: their messages were given up.
    pub freed: BTreeSet<u16>,
    pub ends: Vec<String>,
    pub next_number: u64,
    /// What went over the wire or into the database since the last look, in words.
    pub wire: Vec<String>,
    pub keep_trace: bool,
    /// Payloads whose second arrival is not held against anybody: the broker lost the session between its taking
    /// the message and our knowing that it was done.
    pub may_double: BTreeSet<Bytes>,
    /// Payloads that are lost without anybody being able to tell.
    pub may_be_lost: BTreeSet<Bytes>,
    /// The first number accepted since this connection began to take.
    live_from: Option<u64>,
    /// For each payload, what was live where when it was handed out.
    pub handed_out: BTreeMap<Bytes, BTreeSet<u64>>,
}

impl World {
    pub fn new(mut plan: Plan) -> World {
        let patience_ms = plan.settings.retry_refused_for_ms;
        if let Some(rule) = plan.broken {
            rule.change_settings(&mut plan.settings);
        }
        let folder = folder();
        let path = folder.path().join("outbox.db");
        let broker = Broker::with_limits(plan.limits.clone());
        let mut world = World {
            store: None,
            broker,
            now: START,
            path,
            _folder: folder,
            online: None,
            carry: Carry::default(),
            connections: 0,
            observer: 0,
            at: 0,
            away: None,
            waiting: Vec::new(),
            changes: None,
            offer: None,
            answers: VecDeque::new(),
            failed: false,
            lagging: Vec::new(),
            cursor: 0,
            steps: Vec::new(),
            accepted: Vec::new(),
            by_payload: BTreeMap::new(),
            by_seq: BTreeMap::new(),
            next_seq: [1; 3],
            counts: BTreeMap::new(),
            tally: BTreeMap::new(),
            commanded: Vec::new(),
            recorded: Vec::new(),
            executed: BTreeMap::new(),
            sessions_lost: 0,
            delivered: 0,
            possibly_doubled: 0,
            possibly_lost: 0,
            believed: 0,
            forgotten: false,
            rows: BTreeMap::new(),
            open: BTreeSet::new(),
            unrecorded: BTreeSet::new(),
            verdict: false,
            early: Vec::new(),
            complaints: Vec::new(),
            done: BTreeSet::new(),
            held_lanes: BTreeMap::new(),
            held_topics: BTreeMap::new(),
            refused_since: BTreeMap::new(),
            refusals_heard: BTreeMap::new(),
            refusals_seen: BTreeMap::new(),
            patience_ms,
            was_limited: false,
            freed: BTreeSet::new(),
            is_size_limited: plan.limits.maximum_packet_size.is_some(),
            ends: Vec::new(),
            next_number: 0,
            wire: Vec::new(),
            keep_trace: false,
            may_double: BTreeSet::new(),
            may_be_lost: BTreeSet::new(),
            live_from: None,
            handed_out: BTreeMap::new(),
            plan,
        };
        world.open();
        world.furnish_broker();
        world
    }

    fn open(&mut self) {
        let Plan { quota, replay, when_full, lanes, .. } = self.plan;
        let settings =
            store::Settings { quota, replay, when_full, lanes, ..store::Settings::new(self.path.clone()) };
        self.store = Some(Store::open(settings).unwrap());
    }

    pub fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    fn breaks(&self, rule: Rule) -> bool {
        self.plan.broken == Some(rule)
    }

    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if self.keep_trace {
            self.wire.push(what());
        }
    }

    pub fn tally(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    pub fn count(&self, what: Counted) -> u64 {
        self.counts.get(&format!("{what:?}")).copied().unwrap_or(0)
    }

    // ---- the producer ------------------------------------------------------------------------------------

    /// Hands a message to the store's thread; it is accepted by the next commit.
    pub fn produce(&mut self, lane: Lane, qos: Qos, topic: &str, padding: usize) -> u64 {
        let message = self.message(lane, qos, topic, padding);
        self.append(vec![message]);
        self.next_number
    }

    /// A message whose payload is the next number.
    pub fn message(&mut self, lane: Lane, qos: Qos, topic: &str, padding: usize) -> Message {
        self.next_number += 1;
        let mut payload = self.next_number.to_string();
        payload.extend(std::iter::repeat_n('.', padding));
        Message {
            topic: Topic::new(topic).unwrap(),
            qos,
            retain: false,
            lane,
            at: self.now,
            expires_after: None,
            correlation_data: None,
            payload: Payload::Whole(payload.into()),
        }
    }

    /// Messages that no packing makes smaller.
    pub fn noise(&mut self, lane: Lane, count: usize, bytes: usize) {
        let messages = (0..count).map(|_| {
            let message = self.message(lane, Qos::ExactlyOnce, &format!("t/{lane}/2/0"), 0);
            let mut random = Rng::with_seed(self.next_number);
            let mut text = format!("{} ", self.next_number);
            text.extend((0..bytes).map(|_| random.alphanumeric()));
            Message { payload: Payload::Whole(text.into()), ..message }
        });
        let messages = messages.collect();
        self.append(messages);
    }

    /// Everything ever dropped.
    pub fn dropped(&mut self) -> u64 {
        let now = self.now;
        self.store().look(now).unwrap().dropped.iter().map(|(_, _, count)| count).sum()
    }

    pub fn append(&mut self, messages: Vec<Message>) {
        if self.breaks(Rule::AcceptedAfterCommit) {
            messages.iter().for_each(|message| self.accept(message));
        }
        self.waiting.push(Append { messages, closes: Vec::new() });
    }

    // ---- to the end --------------------------------------------------------------------------------------

    /// Commits until nothing waits.
    pub fn commit_all(&mut self) {
        while self.must_commit() {
            self.commit(NextCommit::Works);
        }
    }

    /// Rounds until messages flow.
    pub fn until_running(&mut self) {
        for _ in 0..100 {
            if self.is_running() {
                return;
            }
            self.round();
            self.pass(50);
        }
        panic!("the session does not get to run: {:?}", self.ends);
    }

    /// Whether the session is uncertain and whether a clean start is needed, as the database says.
    pub fn flags(&mut self) -> (bool, bool) {
        self.store = None;
        let db = rusqlite::Connection::open(&self.path).unwrap();
        let flags = db.query_row("SELECT uncertain, clean_start FROM session", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        });
        drop(db);
        self.open();
        flags.unwrap()
    }

    /// One round without faults: everything that is under way arrives.
    pub fn round(&mut self) {
        if self.online.is_none() {
            self.connect();
        }
        self.broker_gets(usize::MAX);
        self.agent_gets(usize::MAX);
        self.dispatch();
        if self.must_commit() {
            self.commit(NextCommit::Works);
        }
        while self.has_answers() {
            self.answer();
        }
    }

    pub fn rounds(&mut self, count: usize) {
        for _ in 0..count {
            self.round();
            self.pass(1);
        }
    }

    /// Nothing is queued or in flight, and nothing is left of us at this broker. Rows that only the other broker can
    /// free may stay.
    pub fn is_finished(&mut self) -> bool {
        let now = self.now;
        let idle = self.session().is_some_and(|session| session.is_running() && session.is_idle());
        if !idle || !self.waiting.is_empty() || self.changes.is_some() || !self.steps.is_empty() {
            return false;
        }
        let elsewhere = self.away.as_ref().map_or(0, |away| away.rows.len()) as u64;
        let look = self.store().look(now).unwrap();
        let queued: u64 = look.lanes.iter().map(|lane| lane.messages).sum();
        let held = self.broker.session(CLIENT).map_or(0, |session| session.held.len());
        let at_broker = held + self.broker.unfinished(CLIENT);
        queued == 0 && look.rows <= elsewhere && look.inbox == 0 && at_broker == 0
    }

    /// Goes on without faults until everything is done, at both brokers; what is stuck is told.
    pub fn finish(&mut self) -> Result<(), String> {
        self.finish_here()?;
        if self.away.is_some() {
            self.change_broker();
            self.finish_here()?;
        }
        Ok(())
    }

    fn finish_here(&mut self) -> Result<(), String> {
        for round in 0..6_000u64 {
            self.round();
            if self.is_finished() {
                return Ok(());
            }
            self.pass(if round < 200 { 1 } else { 500 });
        }
        let now = self.now;
        let look = self.store().look(now).unwrap();
        let session = self.online.as_ref().map(|online| format!("{:?}", online.session));
        Err(format!(
            "STALL: {look:?}\nwaiting {:?}, unfinished at the broker: {} to us, {:?} of ours\nsession {session:?}\nends {:?}",
            self.store().waiting(now),
            self.broker.unfinished(CLIENT),
            self.broker.session(CLIENT).map(|session| session.held.keys().collect::<Vec<_>>()),
            self.ends.iter().rev().take(5).collect::<Vec<_>>(),
        ))
    }
}

/// In memory where there is such a folder: the order of steps is tested here, not the disk.
fn folder() -> TempDir {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    }
}

/// A number between bounds, small ones more often.
pub fn few(rng: &mut Rng, most: usize) -> usize {
    let most = rng.usize(1..=most);
    rng.usize(1..=most)
}
