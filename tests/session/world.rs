//! A pair in a box: the real session, the real store and the model broker in one thread, on virtual time.
//!
//! `World` does what `uplink::connection` and the store's thread do between the three, one small step at a time,
//! so that a test decides what happens between any two of them: how many bytes arrive, when a commit returns,
//! where the link is cut and where the program dies. The bytes go through the real link and its codecs.
//!
//! Invariant: same seed, same run. Nothing here reads a clock, waits, or depends on a hash's order.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::Bytes;
use fastrand::Rng;
use fieldpost::clock::Stamp;
use fieldpost::message::{Lane, Message, PacketId, Payload, Qos, Seq, Topic};
use fieldpost::store::{self, Append, Batch, Store};
use fieldpost::turn::{Begin, Change, Offer, OnSessionLoss, Taken};
use fieldpost::uplink::link::{Link, LinkError};
use fieldpost::uplink::packet::{Connect, Limits, Packet, Protocol, Publish, ReasonCode, Subscription};
use fieldpost::uplink::session::{Carry, Counted, Event, Session, Settings};
use futures_util::FutureExt;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::random::number;
use crate::support::broker::{self, Broker, ConnId, Output};

pub const CLIENT: &str = "box";
pub const CANARY: &str = "box/canary";
pub const PRESENCE: &str = "box/state";
const OBSERVER: &str = "observer";
/// The agent's own limit for what the broker sends.
const MAX_PACKET: u32 = 1 << 20;
/// 2026-01-01, so that the wall clock is believable.
const START: Stamp = Stamp { wall_ms: 1_767_225_600_000, mono_ms: 1_000_000, synchronised: true };

/// Bytes under way, and bytes that have arrived.
#[derive(Debug, Default)]
struct Wire {
    to_broker: VecDeque<u8>,
    to_agent: VecDeque<u8>,
    arrived: VecDeque<u8>,
    closed: bool,
}

/// The agent's end of a connection.
#[derive(Debug, Clone, Default)]
struct Pipe(Rc<RefCell<Wire>>);

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        if wire.arrived.is_empty() {
            return if wire.closed && wire.to_agent.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
        let count = wire.arrived.len().min(buf.remaining());
        for byte in wire.arrived.drain(..count) {
            buf.put_slice(&[byte]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().to_broker.extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Rules the harness itself breaks, to see whether it would notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// None.
    No,
    /// The session hears of every commit before it is made.
    ReleaseBeforeCommit,
    /// What CONNACK meant is never committed, though the session hears that it was.
    IgnoreSettling,
    /// `session_uncertain` is kept from the session.
    IgnoreUncertainty,
    /// The broker's Receive Maximum is kept from the session.
    IgnoreReceiveMaximum,
    /// Whatever was in flight at QoS 2 is kept from the next connection.
    ForgetRows,
    /// A failed commit is told as a good one.
    HideFailedCommits,
}

/// What a world is made with.
#[derive(Debug, Clone)]
pub struct Plan {
    pub protocol: Protocol,
    pub settings: Settings,
    pub sabotage: Sabotage,
    pub quota: u64,
    pub replay: store::Replay,
    pub limits: broker::Limits,
}

impl Plan {
    pub fn new(protocol: Protocol) -> Plan {
        Plan {
            protocol,
            settings: settings(protocol),
            sabotage: Sabotage::No,
            quota: 64 << 20,
            replay: store::Replay::default(),
            limits: broker::Limits::default(),
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
        break_pubrel_order: false,
    }
}

/// A message the store accepted.
#[derive(Debug, Clone)]
pub struct Accepted {
    pub topic: String,
    pub qos: Qos,
    pub payload: Bytes,
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
}

/// How many of the next commits fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextCommit {
    Works,
    Fails,
}

pub struct World {
    pub plan: Plan,
    pub broker: Broker,
    pub now: Stamp,
    store: Option<Store>,
    path: PathBuf,
    owner: String,
    _folder: TempDir,
    online: Option<Online>,
    carry: Carry,
    connections: u64,
    observer: ConnId,
    // The store's thread.
    waiting: Vec<Append>,
    changes: Option<(u64, Vec<Change>)>,
    offer: Option<(u64, Offer)>,
    answers: VecDeque<Answer>,
    /// A commit failed: what a session knows from before is void until the next connection begins.
    failed: bool,
    // What happened.
    pub accepted: Vec<Accepted>,
    pub counts: BTreeMap<String, u64>,
    /// Commands the broker sent, with their QoS.
    pub commanded: Vec<(Bytes, u8)>,
    /// Commands the store recorded.
    pub recorded: Vec<Bytes>,
    pub sessions_lost: u32,
    pub possibly_doubled: u64,
    pub possibly_lost: u64,
    /// The broker has forgotten identifiers at some time.
    pub forgotten: bool,
    /// Payloads in flight at QoS 2 and whether their PUBREC or their end is known, as committed.
    pub rows: BTreeMap<u16, (Bytes, bool)>,
    /// Inbound identifiers that wait for PUBREL, as committed.
    open: BTreeSet<u16>,
    /// What this connection's CONNACK meant is committed.
    verdict: bool,
    /// What was sent before it was committed.
    pub early: Vec<String>,
    /// QoS 2 payloads known to be done, as committed.
    done: BTreeSet<Bytes>,
    pub ends: Vec<String>,
    pub next_number: u64,
    pub trace: Vec<String>,
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
    pub fn new(plan: Plan) -> World {
        let folder = folder();
        let path = folder.path().join("outbox.db");
        let broker = Broker::with_limits(plan.limits.clone());
        let mut world = World {
            store: None,
            broker,
            now: START,
            path,
            owner: "broker".into(),
            _folder: folder,
            online: None,
            carry: Carry::default(),
            connections: 0,
            observer: 0,
            waiting: Vec::new(),
            changes: None,
            offer: None,
            answers: VecDeque::new(),
            failed: false,
            accepted: Vec::new(),
            counts: BTreeMap::new(),
            commanded: Vec::new(),
            recorded: Vec::new(),
            sessions_lost: 0,
            possibly_doubled: 0,
            possibly_lost: 0,
            forgotten: false,
            rows: BTreeMap::new(),
            open: BTreeSet::new(),
            verdict: false,
            early: Vec::new(),
            done: BTreeSet::new(),
            ends: Vec::new(),
            next_number: 0,
            trace: Vec::new(),
            keep_trace: false,
            may_double: BTreeSet::new(),
            may_be_lost: BTreeSet::new(),
            live_from: None,
            handed_out: BTreeMap::new(),
            plan,
        };
        world.open();
        world.observe();
        world
    }

    fn open(&mut self) {
        let (quota, replay) = (self.plan.quota, self.plan.replay);
        let settings = store::Settings { quota, replay, ..store::Settings::new(self.path.clone()) };
        self.store = Some(Store::open(settings).unwrap());
    }

    pub fn store(&mut self) -> &mut Store {
        self.store.as_mut().unwrap()
    }

    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if self.keep_trace {
            self.trace.push(format!("{:>9} {}", self.now.mono_ms, what()));
        }
    }

    pub fn count(&self, what: Counted) -> u64 {
        self.counts.get(&format!("{what:?}")).copied().unwrap_or(0)
    }

    // ---- the producer ------------------------------------------------------------------------------------

    /// Hands a message to the store's thread; it is accepted by the next commit.
    pub fn produce(&mut self, lane: Lane, qos: Qos, topic: &str, padding: usize) -> u64 {
        self.next_number += 1;
        let number = self.next_number;
        let mut payload = number.to_string();
        payload.extend(std::iter::repeat_n('.', padding));
        let message = Message {
            topic: Topic::new(topic).unwrap(),
            qos,
            retain: false,
            lane,
            at: self.now,
            expires_after: None,
            correlation_data: None,
            payload: Payload::Whole(payload.into()),
        };
        self.append(vec![message]);
        number
    }

    /// Messages that no packing makes smaller.
    pub fn noise(&mut self, lane: Lane, count: usize, bytes: usize) {
        let messages = (0..count).map(|_| {
            self.next_number += 1;
            let mut random = Rng::with_seed(self.next_number);
            let mut text = format!("{} ", self.next_number);
            text.extend((0..bytes).map(|_| random.alphanumeric()));
            Message {
                topic: Topic::new(&format!("t/{lane}/2/0")).unwrap(),
                qos: Qos::ExactlyOnce,
                retain: false,
                lane,
                at: self.now,
                expires_after: None,
                correlation_data: None,
                payload: Payload::Whole(text.into()),
            }
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
        self.waiting.push(Append { messages, closes: Vec::new() });
    }

    // ---- the store's thread ------------------------------------------------------------------------------

    fn take_turn(&mut self, connection: u64, changes: Vec<Change>, offer: Option<Offer>) {
        if self.failed {
            return;
        }
        if let Some(offer) = offer {
            self.offer = Some((connection, offer));
        }
        if changes.is_empty() {
            return;
        }
        match &mut self.changes {
            Some((of, waiting)) if *of == connection => waiting.extend(changes),
            Some(_) => {
                self.commit(NextCommit::Works);
                self.changes = Some((connection, changes));
            }
            None => self.changes = Some((connection, changes)),
        }
    }

    pub fn must_commit(&mut self) -> bool {
        let now = self.now;
        let (waiting, release) = self.store().waiting(now);
        let released = release.is_some_and(|at| at <= now.mono_ms);
        self.changes.is_some() || !self.waiting.is_empty() || (self.offer.is_some() && (waiting || released))
    }

    /// One transaction with everything that waits.
    pub fn commit(&mut self, next: NextCommit) {
        let appends = std::mem::take(&mut self.waiting);
        let changes = self.changes.take();
        if appends.is_empty() && changes.is_none() && self.offer.is_none() {
            return;
        }
        let mut list = changes.as_ref().map(|(_, changes)| changes.clone()).unwrap_or_default();
        if self.plan.sabotage == Sabotage::IgnoreSettling {
            list.retain(|change| !matches!(change, Change::SessionAbsent(_) | Change::SessionPresent));
        }
        let messages: Vec<Vec<Message>> = appends.iter().map(|append| append.messages.clone()).collect();
        let offer = self.offer.as_ref().map(|(_, offer)| offer.clone());
        if next == NextCommit::Fails {
            // A number no column holds: SQLite refuses it when everything else has been written.
            let (id, lane, seq, reason) = (None, Lane::Bulk, Seq(u64::MAX), 0);
            list.push(Change::DeadLetter { id, lane, seq, reason });
        }
        self.note(|| format!("commit {list:?} offer {}", offer.is_some()));
        let now = self.now;
        if offer.is_some() && self.live_from.is_none() {
            let new = messages.iter().flatten().map(|m| number(&m.payload.clone().unnumbered()));
            self.live_from = Some(new.min().unwrap_or(self.next_number + 1));
        }
        let batch = Batch { appends, changes: list.clone(), offer, ..Batch::default() };
        let committed = match self.store().commit(batch, now) {
            Ok(committed) => committed,
            Err(error) => {
                self.note(|| format!("commit failed: {error}"));
                self.offer = None;
                self.failed = self.plan.sabotage != Sabotage::HideFailedCommits;
                if self.plan.sabotage == Sabotage::HideFailedCommits
                    && let Some((connection, _)) = changes
                {
                    let (refused, taken) = (Vec::new(), None);
                    self.answers.push_back(Answer::Done { connection, settled: true, refused, taken });
                } else {
                    self.answers.push_back(Answer::Failed);
                }
                return;
            }
        };
        for (messages, outcome) in messages.into_iter().zip(&committed.appends) {
            if outcome.is_ok() {
                self.accepted.extend(messages.into_iter().map(|message| Accepted {
                    topic: message.topic.to_string(),
                    qos: message.qos,
                    payload: message.payload.unnumbered(),
                }));
            }
        }
        self.possibly_doubled += committed.settled.possibly_doubled;
        self.possibly_lost += committed.settled.possibly_lost;
        list.iter().filter(|change| !is_refused(change, &committed.refused)).for_each(|c| self.committed(c));
        for taken in &committed.taken {
            let payload = taken.record.payload.clone();
            self.handed_out.entry(payload).or_default().extend(self.live_from);
        }
        for taken in committed.taken.iter().filter(|taken| taken.qos == Qos::ExactlyOnce) {
            self.rows.insert(taken.id.get(), (taken.record.payload.clone(), false));
        }
        let offered = if committed.taken.is_empty() { None } else { self.offer.take() };
        let changed = changes.as_ref().map(|(connection, _)| *connection);
        if let Some(connection) = changed.or(offered.as_ref().map(|(connection, _)| *connection)) {
            self.answers.push_back(Answer::Done {
                connection,
                settled: changed.is_some(),
                refused: committed.refused,
                taken: offered.map(|_| committed.taken),
            });
        }
    }

    /// Keeps the books of what is on the disk.
    fn committed(&mut self, change: &Change) {
        match change {
            Change::Inbound { inbound, .. } => self.recorded.push(inbound.payload.clone()),
            Change::InboundOpened { id, inbound, .. } => {
                self.open.insert(id.get());
                self.recorded.push(inbound.payload.clone());
            }
            Change::InboundReleased(id) => drop(self.open.remove(&id.get())),
            Change::Received(id) | Change::Abandoned(id) => {
                self.rows.get_mut(&id.get()).into_iter().for_each(|row| row.1 = true);
            }
            Change::Completed(id) => self.done.extend(self.rows.remove(&id.get()).map(|row| row.0)),
            Change::Refused { id: Some(id), .. } | Change::DeadLetter { id: Some(id), .. } => {
                self.rows.remove(&id.get());
            }
            Change::SessionAbsent(_) | Change::SessionReplaced(_) => {
                self.rows.clear();
                self.open.clear();
                self.verdict = true;
            }
            Change::SessionPresent => self.verdict = true,
            _ => {}
        }
    }

    /// The order table: what must be on the disk before this packet leaves.
    fn check_order(&mut self, packet: &Packet) {
        let row = |id: &PacketId| self.rows.get(&id.get());
        let right = match packet {
            Packet::Publish(publish) if publish.topic.as_str() == CANARY => true,
            Packet::Publish(publish) => {
                let Publish { qos, id, payload, .. } = &**publish;
                let has_row = id.as_ref().and_then(row).is_some_and(|row| row.0 == *payload);
                self.verdict && (*qos != Qos::ExactlyOnce || has_row)
            }
            Packet::PubRel(_, ReasonCode::PACKET_IDENTIFIER_NOT_FOUND) => true,
            Packet::PubRel(id, _) => self.verdict && row(id).is_none_or(|row| row.1),
            Packet::PubRec(id, reason) => reason.is_error() || self.open.contains(&id.get()),
            Packet::PubComp(id, _) => !self.open.contains(&id.get()),
            _ => true,
        };
        if !right {
            self.early.push(format!("{packet:?} before its commit"));
        }
    }

    // ---- the uplink --------------------------------------------------------------------------------------

    pub fn is_online(&self) -> bool {
        self.online.is_some()
    }

    pub fn session(&mut self) -> Option<&mut Session> {
        self.online.as_mut().map(|online| &mut online.session)
    }

    pub fn is_running(&self) -> bool {
        self.online.as_ref().is_some_and(|online| online.session.is_running())
    }

    /// Begins a connection: what must be committed first, and CONNECT on its way.
    pub fn connect(&mut self) {
        self.hang_up("connect");
        // What the last connection left is committed first.
        self.commit(NextCommit::Works);
        self.offer = None;
        self.failed = false;
        self.verdict = false;
        self.live_from = None;
        self.answers.clear();
        let carry = std::mem::take(&mut self.carry);
        let (now, policy) = (self.now, self.plan.settings.on_session_loss);
        let (unacked, owner) = (carry.unacked(), self.owner.clone());
        let mut begin = self.store().begin((&owner, CLIENT), policy, &unacked, now).unwrap();
        match self.plan.sabotage {
            Sabotage::IgnoreUncertainty => begin.session_uncertain = false,
            Sabotage::ForgetRows => begin.resume.clear(),
            _ => {}
        }
        self.note(|| format!("begin {begin:?}"));
        self.connections += 1;
        let clean = begin.clean_start_needed;
        if clean && self.plan.protocol == Protocol::V311 && !self.discard_session() {
            self.carry = carry;
            return self.ends.push("no CONNACK".into());
        }
        let session = self.new_session(begin, carry);
        let conn = self.broker.connect(self.now.mono_ms);
        let pipe = Pipe::default();
        let mut link = Link::new(pipe.clone(), self.plan.protocol, MAX_PACKET);
        let clean = clean && self.plan.protocol == Protocol::V5;
        link.queue(&Packet::Connect(Box::new(connect(CLIENT, clean)))).unwrap();
        flush(&mut link);
        self.online = Some(Online { session, link, pipe, conn, greeted: false });
    }

    fn new_session(&self, begin: Begin, carry: Carry) -> Session {
        let (settings, nonce) = (self.plan.settings.clone(), self.connections);
        Session::new(settings, self.connections, nonce, begin, carry, self.now.mono_ms)
    }

    /// MQTT 3.1.1: one clean connection on which nothing is published.
    fn discard_session(&mut self) -> bool {
        let conn = self.broker.connect(self.now.mono_ms);
        let pipe = Pipe::default();
        let mut link = Link::new(pipe.clone(), self.plan.protocol, MAX_PACKET);
        link.queue(&Packet::Connect(Box::new(connect(CLIENT, true)))).unwrap();
        link.queue(&Packet::Disconnect(ReasonCode::SUCCESS)).unwrap();
        flush(&mut link);
        let bytes: Vec<u8> = pipe.0.borrow_mut().to_broker.drain(..).collect();
        self.broker.input(conn, &bytes, self.now.mono_ms);
        let outputs = self.broker.take_output();
        self.broker.closed(conn, self.now.mono_ms);
        self.route();
        outputs.iter().any(|output| matches!(output, Output::Send(to, _) if *to == conn))
    }

    /// Delivers bytes to the broker.
    pub fn broker_gets(&mut self, count: usize) {
        let Some(online) = &self.online else { return };
        let (conn, bytes) = {
            let mut wire = online.pipe.0.borrow_mut();
            let count = count.min(wire.to_broker.len());
            (online.conn, wire.to_broker.drain(..count).collect::<Vec<u8>>())
        };
        if !bytes.is_empty() {
            self.broker.input(conn, &bytes, self.now.mono_ms);
            self.route();
        }
    }

    /// Delivers bytes to the agent and lets it act.
    pub fn agent_gets(&mut self, count: usize) {
        let Some(online) = &mut self.online else { return };
        {
            let mut wire = online.pipe.0.borrow_mut();
            let count = count.min(wire.to_agent.len());
            let Wire { to_agent, arrived, .. } = &mut *wire;
            arrived.extend(to_agent.drain(..count));
        }
        if let Err(why) = self.read() {
            return self.hang_up(&why);
        }
        self.act();
    }

    fn read(&mut self) -> Result<(), String> {
        while let Some(online) = &mut self.online {
            let next = online.link.try_next().now_or_never().ok_or("the link waits")?;
            let mut packet = match next {
                Ok(None) => return Ok(()),
                Ok(Some(packet)) => packet,
                Err(LinkError::Closed) => return Err("closed".into()),
                Err(error) => return Err(error.to_string()),
            };
            if let (Packet::ConnAck(connack), Sabotage::IgnoreReceiveMaximum) =
                (&mut packet, self.plan.sabotage)
            {
                connack.limits.receive_max = None;
            }
            if self.keep_trace {
                self.trace.push(format!("{:>9} agent  <- {packet:?}", self.now.mono_ms));
            }
            online.session.on_packet(packet, self.now.mono_ms).map_err(|error| error.to_string())?;
            if !online.greeted {
                online.greeted = true;
                if let Some(bytes) = online.session.limits().max_packet_bytes {
                    online.link.set_broker_max_packet(bytes);
                }
            }
        }
        Ok(())
    }

    fn count_events(&mut self, events: Vec<Event>) {
        for event in events {
            if let Event::Count(what, n) = event {
                *self.counts.entry(format!("{what:?}")).or_default() += n;
            }
        }
    }

    /// What the uplink does after every wake: events, turns, packets.
    pub fn act(&mut self) {
        let Some(mut online) = self.online.take_if(|online| online.greeted) else { return };
        let events = online.session.take_events();
        self.note(|| format!("events {events:?}"));
        for _ in events.iter().filter(|event| matches!(event, Event::SessionSettled { .. })) {
            let topic = Topic::new(PRESENCE).unwrap();
            online.session.publish_presence(topic, "online".into(), true, self.now.mono_ms);
        }
        self.count_events(events);
        while let Some((changes, offer)) = online.session.turn() {
            let settles = !changes.is_empty();
            self.take_turn(online.session.connection(), changes, offer);
            if self.plan.sabotage == Sabotage::ReleaseBeforeCommit && settles {
                online.session.on_committed(&[], self.now.mono_ms);
            }
        }
        while let Some(packet) = online.session.next_packet() {
            self.note(|| format!("agent  -> {packet:?}"));
            self.check_order(&packet);
            online.link.queue(&packet).unwrap_or_else(|error| panic!("the session sent {packet:?}: {error}"));
            online.session.on_written(self.now.mono_ms);
        }
        flush(&mut online.link);
        self.online = Some(online);
    }

    /// Delivers one answer of the store.
    pub fn answer(&mut self) {
        let Some(answer) = self.answers.pop_front() else { return };
        let now_ms = self.now.mono_ms;
        match answer {
            Answer::Failed => self.crash_of_the_store(),
            Answer::Done { connection, settled, refused, taken } => {
                let Some(session) = self.session().filter(|session| session.connection() == connection)
                else {
                    return;
                };
                if settled {
                    session.on_committed(&refused, now_ms);
                }
                if let Some(taken) = taken {
                    session.on_taken(taken, now_ms);
                }
                self.tick_session();
                self.act();
            }
        }
    }

    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    fn crash_of_the_store(&mut self) {
        if let Some(online) = self.online.take() {
            self.broker.closed(online.conn, self.now.mono_ms);
            self.carry = online.session.into_carry().after_store_failure();
            self.ends.push("the store failed".into());
            self.route();
        }
    }

    /// The connection is over; what the session learned goes to the store.
    pub fn hang_up(&mut self, why: &str) {
        let Some(mut online) = self.online.take() else { return };
        self.note(|| format!("hang up: {why}"));
        self.ends.push(why.to_owned());
        self.count_events(online.session.take_events());
        let unsaved = online.session.take_unsaved();
        self.take_turn(online.session.connection(), unsaved, None);
        self.carry = online.session.into_carry();
        self.broker.closed(online.conn, self.now.mono_ms);
        self.route();
    }

    fn tick_session(&mut self) {
        let now_ms = self.now.mono_ms;
        let Some(online) = self.online.as_mut() else { return };
        if let Err(error) = online.session.tick(now_ms) {
            self.hang_up(&error.to_string());
        }
    }

    /// Time passes for everybody.
    pub fn pass(&mut self, ms: u64) {
        self.now.mono_ms += ms;
        self.now.wall_ms += ms as i64;
        self.broker.tick(self.now.mono_ms);
        self.route();
        self.tick_session();
        self.act();
    }

    // ---- faults ------------------------------------------------------------------------------------------

    /// The link breaks; of the bytes under way to the broker, `still_arrive` do.
    pub fn cut(&mut self, still_arrive: usize) {
        self.broker_gets(still_arrive);
        self.hang_up("cut");
    }

    /// The program dies: whatever is not committed is gone.
    pub fn crash(&mut self, still_arrive: usize) {
        self.note(|| "crash".into());
        self.broker_gets(still_arrive);
        if let Some(online) = self.online.take() {
            self.broker.closed(online.conn, self.now.mono_ms);
        }
        self.route();
        self.waiting.clear();
        self.changes = None;
        self.offer = None;
        self.answers.clear();
        self.failed = false;
        self.carry = Carry::default();
        self.store = None;
        self.open();
    }

    /// The database as it is now.
    pub fn copy(&mut self) -> Vec<u8> {
        self.store = None;
        let bytes = std::fs::read(&self.path).unwrap();
        self.open();
        self.cut(0);
        bytes
    }

    /// The card is exchanged for one with an old copy.
    pub fn restore(&mut self, copy: Vec<u8>) {
        self.crash(0);
        self.store = None;
        std::fs::write(&self.path, copy).unwrap();
        self.open();
    }

    /// The broker loses the session; what it had handed on and we do not know to be done may come twice.
    pub fn lose_session(&mut self) {
        self.note(|| "the broker loses everything".into());
        self.sessions_lost += 1;
        self.excuse_doubles();
        self.broker.restart(broker::Memory::Lost);
        self.route();
        self.observe();
    }

    /// The broker forgets which QoS 2 identifiers it holds, and nothing else: what it had not handed on is lost,
    /// and only MQTT 5 has a way to say so.
    pub fn forget_identifiers(&mut self) {
        self.note(|| "the broker forgets its identifiers".into());
        self.excuse_doubles();
        if self.plan.protocol == Protocol::V311 {
            let held = self.broker.session(CLIENT).into_iter().flat_map(|session| session.held.values());
            self.may_be_lost.extend(held.map(|held| held.message.payload.clone()));
        }
        self.forgotten |= self.broker.forget_packet_ids(CLIENT) > 0;
    }

    fn excuse_doubles(&mut self) {
        let onward = self.broker.received().iter().filter(|received| received.onward);
        let unfinished = onward.filter(|received| !self.done.contains(&received.payload));
        self.may_double.extend(unfinished.map(|received| received.payload.clone()));
    }

    /// The broker sends a command; only a client with a session and a subscription is sent one.
    pub fn command(&mut self, qos: u8) {
        let subscribed = self.broker.session(CLIENT).is_some_and(|s| s.subscriptions.contains_key("cmd/#"));
        if !subscribed || self.broker.connection_of(CLIENT).is_none() {
            return;
        }
        self.next_number += 1;
        let payload: Bytes = format!("command {}", self.next_number).into();
        self.commanded.push((payload.clone(), qos));
        self.broker.publish(&broker::Message::new("cmd/x", payload, qos));
        self.route();
    }

    pub fn restart_broker(&mut self) {
        self.broker.restart(broker::Memory::Kept);
        self.route();
        self.observe();
    }

    // ---- the broker's side -------------------------------------------------------------------------------

    /// A subscriber at QoS 0: what it gets is what the broker handed on, in that order.
    fn observe(&mut self) {
        let script = std::mem::take(&mut self.broker.script);
        self.observer = self.broker.connect(self.now.mono_ms);
        let pipe = Pipe::default();
        let mut link = Link::new(pipe.clone(), Protocol::V5, MAX_PACKET);
        link.queue(&Packet::Connect(Box::new(connect(OBSERVER, true)))).unwrap();
        let id = PacketId::new(1).unwrap();
        link.queue(&Packet::Subscribe(
            id,
            vec![Subscription { filter: "t/#".into(), qos: Qos::AtMostOnce, retained: true }],
        ))
        .unwrap();
        flush(&mut link);
        let bytes: Vec<u8> = pipe.0.borrow_mut().to_broker.drain(..).collect();
        self.broker.input(self.observer, &bytes, self.now.mono_ms);
        self.broker.script = script;
        self.route();
    }

    /// Puts what the broker sends on the wire.
    fn route(&mut self) {
        for output in self.broker.take_output() {
            let Some(online) = &self.online else { continue };
            match output {
                Output::Send(conn, bytes) if conn == online.conn => {
                    online.pipe.0.borrow_mut().to_agent.extend(bytes);
                }
                Output::Close(conn) if conn == online.conn => online.pipe.0.borrow_mut().closed = true,
                Output::Send(..) | Output::Close(_) => {}
            }
        }
    }

    /// Payloads handed on, in order, with their topics.
    pub fn handed_on(&self) -> Vec<(&str, &Bytes)> {
        let delivered =
            self.broker.log.delivered.iter().filter(|delivered| &*delivered.client_id == OBSERVER);
        delivered.map(|delivered| (&*delivered.topic, &delivered.payload)).collect()
    }

    /// Their text, for short ones.
    pub fn texts(&self) -> Vec<String> {
        self.handed_on()
            .into_iter()
            .map(|(_, payload)| String::from_utf8_lossy(payload).into_owned())
            .collect()
    }

    /// From now on everything goes to another broker, which holds identifiers of an earlier life of this client.
    pub fn move_to_another_broker(&mut self) -> Broker {
        self.owner = "another".into();
        // As the agent does when it starts with another configuration.
        let owners = [(self.owner.clone(), CLIENT.to_owned())];
        let policy = self.plan.settings.on_session_loss;
        let settled = self.store().keep_owners(&owners, policy).unwrap();
        self.possibly_doubled += settled.possibly_doubled;
        self.possibly_lost += settled.possibly_lost;
        let first = std::mem::replace(&mut self.broker, Broker::with_limits(self.plan.limits.clone()));
        self.observe();
        self.haunt(1024..1034);
        first
    }

    /// The broker holds these identifiers for a client of our name whose database is gone.
    pub fn haunt(&mut self, ids: std::ops::Range<u16>) {
        let conn = self.broker.connect(self.now.mono_ms);
        let pipe = Pipe::default();
        let mut link = Link::new(pipe.clone(), self.plan.protocol, MAX_PACKET);
        link.queue(&Packet::Connect(Box::new(connect(CLIENT, false)))).unwrap();
        for number in ids {
            link.queue(&Packet::Publish(Box::new(Publish {
                dup: false,
                qos: Qos::ExactlyOnce,
                retain: false,
                topic: Topic::new("ghost").unwrap(),
                id: PacketId::new(number),
                payload: "ghost".into(),
                message_expiry_s: None,
                response_topic: None,
                correlation_data: None,
            })))
            .unwrap();
        }
        flush(&mut link);
        let bytes: Vec<u8> = pipe.0.borrow_mut().to_broker.drain(..).collect();
        self.broker.input(conn, &bytes, self.now.mono_ms);
        self.broker.closed(conn, self.now.mono_ms);
        self.route();
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

    pub fn is_finished(&mut self) -> bool {
        let now = self.now;
        let look = self.store().look(now).unwrap();
        let queued: u64 = look.lanes.iter().map(|lane| lane.messages).sum();
        let idle = self.session().is_some_and(|session| session.is_running() && session.is_idle());
        queued == 0 && look.rows == 0 && idle && self.waiting.is_empty() && self.changes.is_none()
    }

    /// Goes on without faults until everything is done; what is stuck is told.
    pub fn finish(&mut self) -> Result<(), String> {
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
            "STALL: {look:?}\nwaiting {:?}\nsession {session:?}\nends {:?}",
            self.store().waiting(now),
            self.ends.iter().rev().take(5).collect::<Vec<_>>(),
        ))
    }
}

fn is_refused(change: &Change, refused: &[PacketId]) -> bool {
    match change {
        Change::InboundOpened { id, .. } | Change::Inbound { id: Some(id), .. } => refused.contains(id),
        _ => false,
    }
}

fn connect(client_id: &str, clean: bool) -> Connect {
    Connect {
        client_id: client_id.into(),
        clean,
        keep_alive_s: 0,
        session_expiry_s: u32::MAX,
        receive_max: 64,
        max_packet_bytes: MAX_PACKET,
        will: None,
        username: None,
        password: None,
    }
}

fn flush(link: &mut Link<Pipe>) {
    link.flush().now_or_never().expect("the pipe takes everything").expect("the pipe never fails");
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
