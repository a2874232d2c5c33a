//! The durable half of the MQTT session: rows in flight, flags, open inbound identifiers.
//!
//! Works inside a transaction that `store` opens and commits.
//!
//! Invariants (design, delivery): a QoS 2 row and its message's done bit change in one transaction; each row belongs
//! to one broker and client identifier, its *owner*, and to no other. A message is in flight at one owner only: what
//! moves to another broker leaves a row behind that frees its identifier one day.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::Boot;
use super::outbox::{DropReason, Outbox};
use crate::clock::Stamp;
use crate::message::{Lane, PacketId, Qos, Record, Seq};
use crate::turn::{Begin, Change, Offer, OnSessionLoss, Resume, RowState, Taken, record_bytes};

type Sql<T> = Result<T, rusqlite::Error>;

/// A session at a broker, as the tables number it; 0 before the first connection.
type Owner = i64;

#[derive(Debug, Clone, Copy)]
struct Row {
    lane: Lane,
    seq: u64,
    send_no: u64,
    state: RowState,
    /// The flag it was sent with; `None` in rows of schema 1.
    retain: Option<bool>,
}

impl Row {
    /// Its message is neither done nor on another way.
    fn holds_message(&self) -> bool {
        matches!(self.state, RowState::Published | RowState::Received)
    }
}

/// What the settled changes amounted to, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settled {
    /// Messages whose last acknowledgement was committed.
    pub delivered: u64,
    /// The same by lane, in the order of [`Lane::ALL`].
    pub delivered_by_lane: [u64; 3],
    /// Messages in the ambiguous state when the session was lost, published anew.
    pub possibly_doubled: u64,
    /// Messages in the ambiguous state when the session was lost, called delivered.
    pub possibly_lost: u64,
    /// Abandoned messages whose exchange ended.
    pub abandoned: u64,
}

impl Settled {
    fn deliver(&mut self, lane: Lane) {
        self.delivered += 1;
        self.delivered_by_lane[lane as usize] += 1;
    }
}

/// The rows of `inflight`, by owner and packet identifier.
#[derive(Debug)]
pub(crate) struct SessionTable {
    /// Whose connection it is.
    owner: Owner,
    /// What it wants of messages whose fate nobody knows.
    policy: OnSessionLoss,
    rows: BTreeMap<(Owner, u16), Row>,
    next_send_no: u64,
    /// Nothing was handed out since the tables were read: what QoS 1 had in flight is not known.
    fresh: bool,
}

/// What of the session only memory knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    next_send_no: u64,
    fresh: bool,
}

fn row_state(number: i64) -> RowState {
    match number {
        1 => RowState::Published,
        2 => RowState::Received,
        3 => RowState::Abandoned,
        _ => RowState::Moved,
    }
}

impl SessionTable {
    pub(crate) fn load(db: &Connection, outbox: &mut Outbox) -> Sql<Self> {
        let mut statement =
            db.prepare("SELECT owner, pkid, lane, seq, send_no, state, retain FROM inflight")?;
        let mut rows = BTreeMap::new();
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let key = (row.get(0)?, row.get(1)?);
            let lane = Lane::ALL[row.get::<_, usize>(2)?.min(2)];
            let (seq, send_no): (u64, u64) = (row.get(3)?, row.get(4)?);
            let row = Row { lane, seq, send_no, state: row_state(row.get(5)?), retain: row.get(6)? };
            if row.holds_message() {
                outbox.mark_taken(lane, seq);
            }
            rows.insert(key, row);
        }
        let next_send_no = rows.values().map(|row| row.send_no).max().unwrap_or(0) + 1;
        // Until the next connection says whose it is: whose the last one was.
        let last = rows.iter().max_by_key(|(_, row)| row.send_no).map(|((owner, _), _)| *owner);
        let owner = match last {
            Some(owner) => owner,
            None => db.query_row("SELECT coalesce(min(owner), 0) FROM session", [], |row| row.get(0))?,
        };
        Ok(SessionTable { owner, policy: OnSessionLoss::Republish, rows, next_send_no, fresh: true })
    }

    pub(super) fn place(&self) -> Place {
        Place { next_send_no: self.next_send_no, fresh: self.fresh }
    }

    /// Into a table that was just read from the disk, which has not changed since the place was noted.
    pub(super) fn restore(&mut self, place: Place) {
        (self.next_send_no, self.fresh) = (place.next_send_no, place.fresh);
    }

    /// Goes on as what was forgotten after a failed commit.
    pub(crate) fn continued(self, before: &SessionTable) -> Self {
        let owner = if before.owner == 0 { self.owner } else { before.owner };
        SessionTable { owner, policy: before.policy, ..self }
    }

    /// What must be committed before CONNECT: whose connection it will be, and whether "present" could still be
    /// believed. What is in flight at another broker stays there until this one has answered: while there is no way
    /// to any of them, nothing must move.
    pub(crate) fn begin(
        &mut self,
        db: &Connection,
        (broker, client_id): (&str, &str),
        policy: OnSessionLoss,
    ) -> Sql<()> {
        let known = db
            .query_row(
                "SELECT owner FROM session WHERE broker = ? AND client_id = ?",
                [broker, client_id],
                |row| row.get::<_, Owner>(0),
            )
            .optional()?;
        let owner = match known {
            Some(owner) => owner,
            None => {
                // Nothing is known of it, so whatever it holds under our name is not ours.
                let mut insert = db.prepare("INSERT INTO session VALUES (NULL, ?, ?, 0, 1, 0)")?;
                insert.insert([broker, client_id])?
            }
        };
        self.fresh |= owner != self.owner;
        (self.owner, self.policy) = (owner, policy);
        let mut count = db.prepare_cached("SELECT count(*) FROM rx_open WHERE owner = ?")?;
        let rx_open: i64 = count.query_row([owner], |row| row.get(0))?;
        if rx_open > 0 || self.rows.keys().any(|(of, _)| *of == owner) {
            db.execute("UPDATE session SET uncertain = 1 WHERE owner = ? AND uncertain = 0", [owner])?;
        }
        Ok(())
    }

    /// Forgets every session but these: their brokers are not in the configuration any more. One that comes back
    /// begins clean.
    pub(crate) fn keep_owners(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        owners: &[(String, String)],
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        let mut statement = db.prepare("SELECT owner, broker, client_id FROM session")?;
        let known = statement.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?;
        let known = known.collect::<Sql<Vec<(Owner, (String, String))>>>()?;
        for (owner, _) in known.iter().filter(|(_, name)| !owners.contains(name)) {
            self.count_published(|of| of == *owner, settled);
            self.requeue(db, outbox, |of| of == *owner, policy, settled)?;
            // Its number may be given to another.
            self.fresh |= *owner == self.owner;
            db.execute("DELETE FROM rx_open WHERE owner = ?", [owner])?;
            db.execute("DELETE FROM session WHERE owner = ?", [owner])?;
        }
        Ok(())
    }

    /// The database turned out to be a copy of the past: what its rows say of any session is void.
    pub(crate) fn disown(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        self.requeue(db, outbox, |_| true, policy, settled)?;
        db.execute("DELETE FROM rx_open", [])?;
        db.execute("UPDATE session SET uncertain = 0, clean_start = 1, canary = 0", []).map(drop)
    }

    /// What the session starts from. `unacked`: QoS 1 messages it still holds itself.
    pub(crate) fn resume(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        unacked: &[(Lane, Seq)],
        boot: &Boot,
        now: Stamp,
    ) -> Sql<Begin> {
        let rows: Vec<Row> = self.rows.values().copied().filter(Row::holds_message).collect();
        for (lane, seq) in unacked {
            // After a failed commit nobody here remembers them.
            outbox.keep_taken(db, *lane, seq.0)?;
        }
        let came_back = outbox.give_back_unless(|lane, seq| {
            unacked.contains(&(lane, Seq(seq))) || rows.iter().any(|row| (row.lane, row.seq) == (lane, seq))
        });
        let own = self.rows.iter().filter(|((of, _), _)| *of == self.owner);
        let mut in_order: Vec<(u16, Row)> = own.map(|((_, id), row)| (*id, *row)).collect();
        in_order.sort_by_key(|(_, row)| row.send_no);
        let mut resume = Vec::new();
        for (id, row) in in_order {
            let Some(id) = PacketId::new(id) else { continue };
            let mut state = row.state;
            let mut record = None;
            if state == RowState::Published {
                // What QoS 1 had in flight and the session holds no more.
                if self.fresh || came_back {
                    let older = outbox.older(db, row.lane, row.seq, boot, now)?;
                    resume.extend(older.into_iter().map(Resume::Older));
                }
                record = outbox.record(db, row.lane, row.seq)?;
                if let (Some(record), Some(retain)) = (&mut record, row.retain) {
                    record.retain = retain;
                }
                if record.is_none() {
                    // The bytes are damaged: they cannot be sent again, but the broker may hold the id.
                    self.abandon(db, outbox, id)?;
                    state = RowState::Abandoned;
                }
            }
            resume.push(Resume::Row {
                id,
                state,
                send_no: row.send_no,
                record,
                lane: row.lane,
                seq: Seq(row.seq),
            });
        }
        let mut statement = db.prepare_cached("SELECT pkid, hash FROM rx_open WHERE owner = ?")?;
        let mut rx_open = Vec::new();
        let mut found = statement.query([self.owner])?;
        while let Some(row) = found.next()? {
            let hash: Vec<u8> = row.get(1)?;
            let hash = hash.try_into().map_or(0, u128::from_le_bytes);
            rx_open.extend(PacketId::new(row.get(0)?).map(|id| (id, hash)));
        }
        let flags = "SELECT clean_start, uncertain, canary FROM session WHERE owner = ?";
        db.query_row(flags, [self.owner], |row| {
            Ok(Begin {
                clean_start_needed: row.get(0)?,
                session_uncertain: row.get(1)?,
                canary_proven: row.get(2)?,
                resume,
                rx_open,
                boot: boot.boot,
                epoch: boot.epoch,
                queued: outbox.messages(),
            })
        })
    }

    /// Applies one thing the session learned.
    pub(crate) fn settle(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        change: &Change,
        settled: &mut Settled,
        (boot, now): (&Boot, Stamp),
    ) -> Sql<()> {
        match change {
            Change::Received(id) => self.set_state(db, *id, RowState::Received),
            Change::Completed(id) => {
                let Some(row) = self.remove(db, *id)? else { return Ok(()) };
                if !row.holds_message() {
                    settled.abandoned += u64::from(row.state == RowState::Abandoned);
                    return Ok(());
                }
                settled.deliver(row.lane);
                outbox.finish(db, row.lane, row.seq)
            }
            Change::Acknowledged { lane, seq } => {
                settled.deliver(*lane);
                outbox.finish(db, *lane, seq.0)
            }
            Change::Refused { id, lane, seq, hold, hold_ms, .. } => {
                self.remove_row(db, *id)?;
                outbox.hold(db, *lane, seq.0, *hold, now.mono_ms + hold_ms)
            }
            Change::DeadLetter { id, lane, seq, reason } => {
                self.remove_row(db, *id)?;
                let record = outbox.record(db, *lane, seq.0)?;
                bury(db, outbox, *lane, *seq, *reason, record, (boot, now))
            }
            Change::Abandoned(id) => self.abandon(db, outbox, *id),
            Change::SessionAbsent(policy) => {
                self.end_session(db, outbox, *policy, false, settled)?;
                self.take_over(db, outbox, settled)
            }
            Change::RowsVoid(policy) => {
                let owner = self.owner;
                self.count_published(|of| of == owner, settled);
                self.end_session(db, outbox, *policy, false, settled)?;
                self.take_over(db, outbox, settled)
            }
            Change::SessionReplaced(policy) => self.end_session(db, outbox, *policy, true, settled),
            Change::SessionPresent => {
                db.execute(
                    "UPDATE session SET uncertain = 0 WHERE owner = ? AND uncertain = 1",
                    [self.owner],
                )?;
                self.take_over(db, outbox, settled)
            }
            Change::Canary { proven } => db
                .execute("UPDATE session SET canary = ? WHERE owner = ?", params![proven, self.owner])
                .map(drop),
            Change::InboundOpened { id, hash, .. } => db
                .prepare_cached("INSERT OR REPLACE INTO rx_open VALUES (?, ?, ?)")?
                .execute(params![self.owner, id.get(), hash.to_le_bytes()])
                .map(drop),
            Change::InboundReleased(id) => db
                .prepare_cached("DELETE FROM rx_open WHERE owner = ? AND pkid = ?")?
                .execute(params![self.owner, id.get()])
                .map(drop),
            Change::Inbound { .. } => Ok(()),
        }
    }

    /// Hands out waiting messages, alarms first (live ones before that, if so asked), and writes the rows of the
    /// QoS 2 ones.
    pub(crate) fn take(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        offer: &Offer,
        (boot, now): (&Boot, Stamp),
    ) -> Sql<Vec<Taken>> {
        let mut taken = Vec::new();
        let mut qos2_room = offer.qos2_room;
        let mut bytes_left = offer.max_bytes;
        let mut ids = offer.ids.iter().copied();
        let mut next_id = ids.next();
        'turns: for turn in outbox.turns() {
            while let Some(id) = next_id.filter(|_| bytes_left > 0) {
                let Some(record) = outbox.take(db, *turn, boot, now)? else { continue 'turns };
                let bytes = record_bytes(&record);
                if offer.max_publish_bytes.is_some_and(|max| bytes > max as usize) {
                    let (lane, seq) = (record.lane, record.seq);
                    bury(db, outbox, lane, seq, PACKET_TOO_LARGE, Some(record), (boot, now))?;
                    continue;
                }
                let qos = record.qos.min(offer.max_qos);
                if qos == Qos::ExactlyOnce {
                    if qos2_room == 0 {
                        outbox.give_back(record.lane, record.seq.0);
                        break 'turns;
                    }
                    qos2_room -= 1;
                    self.insert(db, id, &record)?;
                }
                outbox.pay(&record, now);
                bytes_left = bytes_left.saturating_sub(record.payload.len());
                taken.push(Taken { id, send_no: self.next_send_no, qos, record });
                self.next_send_no += 1;
                next_id = ids.next();
            }
            break;
        }
        self.fresh &= taken.is_empty();
        Ok(taken)
    }

    /// QoS 2 rows, whatever their state.
    pub(crate) fn rows(&self) -> u64 {
        self.rows.len() as u64
    }

    fn insert(&mut self, db: &Connection, id: PacketId, record: &Record) -> Sql<()> {
        let row = Row {
            lane: record.lane,
            seq: record.seq.0,
            send_no: self.next_send_no,
            state: RowState::Published,
            retain: Some(record.retain),
        };
        self.rows.insert((self.owner, id.get()), row);
        db.prepare_cached("INSERT INTO inflight VALUES (?, ?, ?, ?, ?, 1, ?)")?
            .execute(params![self.owner, id.get(), row.lane as i64, row.seq, row.send_no, row.retain])
            .map(drop)
    }

    fn set_state(&mut self, db: &Connection, id: PacketId, state: RowState) -> Sql<()> {
        if let Some(row) = self.rows.get_mut(&(self.owner, id.get())) {
            row.state = state;
            db.prepare_cached("UPDATE inflight SET state = ? WHERE owner = ? AND pkid = ?")?
                .execute(params![state as i64, self.owner, id.get()])?;
        }
        Ok(())
    }

    /// The message counts as dropped (its fate is unknown), the row waits for PUBCOMP.
    fn abandon(&mut self, db: &Connection, outbox: &mut Outbox, id: PacketId) -> Sql<()> {
        let Some(row) = self.rows.get(&(self.owner, id.get())).copied() else { return Ok(()) };
        self.set_state(db, id, RowState::Abandoned)?;
        outbox.drop_record(db, row.lane, row.seq, DropReason::Abandoned)
    }

    fn remove(&mut self, db: &Connection, id: PacketId) -> Sql<Option<Row>> {
        let row = self.rows.remove(&(self.owner, id.get()));
        if row.is_some() {
            db.prepare_cached("DELETE FROM inflight WHERE owner = ? AND pkid = ?")?
                .execute(params![self.owner, id.get()])?;
        }
        Ok(row)
    }

    fn remove_row(&mut self, db: &Connection, id: Option<PacketId>) -> Sql<()> {
        match id {
            Some(id) => self.remove(db, id).map(drop),
            None => Ok(()),
        }
    }

    /// The broker has no session of this owner's any more, or (`clean_start`) one that must go.
    fn end_session(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        policy: OnSessionLoss,
        clean_start: bool,
        settled: &mut Settled,
    ) -> Sql<()> {
        let owner = self.owner;
        self.requeue(db, outbox, |of| of == owner, policy, settled)?;
        // What was taken at QoS 1 goes back too; what is in flight elsewhere stays there.
        let elsewhere: Vec<Row> = self.rows.values().copied().filter(Row::holds_message).collect();
        outbox.give_back_unless(|lane, seq| elsewhere.iter().any(|row| (row.lane, row.seq) == (lane, seq)));
        db.execute("DELETE FROM rx_open WHERE owner = ?", [owner])?;
        db.execute(
            "UPDATE session SET uncertain = 0, clean_start = ?, canary = 0 WHERE owner = ?",
            params![clean_start, owner],
        )
        .map(drop)
    }

    /// These brokers hold nothing of ours: every exchange begins anew, or ends by policy.
    fn requeue(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        whose: impl Fn(Owner) -> bool,
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        let keys: Vec<_> = self.rows.keys().copied().filter(|(owner, _)| whose(*owner)).collect();
        for (owner, id) in keys {
            let Some(row) = self.rows.remove(&(owner, id)) else { continue };
            db.prepare_cached("DELETE FROM inflight WHERE owner = ? AND pkid = ?")?
                .execute(params![owner, id])?;
            settled.abandoned += u64::from(row.state == RowState::Abandoned);
            leave(db, outbox, row, policy, settled)?;
        }
        Ok(())
    }

    /// This broker has answered, and is where messages go from now on. What was in flight at another one goes here
    /// too, and may arrive there as well: also what had only been published, because the PUBREL that frees its
    /// identifier one day completes it. The rows stay behind for that.
    fn take_over(&mut self, db: &Connection, outbox: &mut Outbox, settled: &mut Settled) -> Sql<()> {
        let owner = self.owner;
        if !self.rows.iter().any(|((of, _), row)| *of != owner && row.holds_message()) {
            return Ok(());
        }
        self.count_published(|of| of != owner, settled);
        for row in self.rows.iter_mut().filter(|((of, _), _)| *of != owner).map(|(_, row)| row) {
            leave(db, outbox, *row, self.policy, settled)?;
            row.state = if row.holds_message() { RowState::Moved } else { row.state };
        }
        db.execute("UPDATE inflight SET state = 4 WHERE owner <> ? AND state IN (1, 2)", [owner]).map(drop)
    }

    /// What had been published and not acknowledged may be there, or not, and is sent anew.
    fn count_published(&self, whose: impl Fn(Owner) -> bool, settled: &mut Settled) {
        let published =
            self.rows.iter().filter(|((of, _), row)| whose(*of) && row.state == RowState::Published);
        settled.possibly_doubled += published.count() as u64;
    }
}

/// Takes a message out of an exchange that this broker will not finish.
fn leave(
    db: &Connection,
    outbox: &mut Outbox,
    row: Row,
    policy: OnSessionLoss,
    settled: &mut Settled,
) -> Sql<()> {
    match (row.state, policy) {
        (RowState::Received, OnSessionLoss::Drop) => {
            settled.possibly_lost += 1;
            outbox.finish(db, row.lane, row.seq)?;
        }
        (RowState::Received, OnSessionLoss::Republish) => {
            settled.possibly_doubled += 1;
            outbox.give_back(row.lane, row.seq);
        }
        (RowState::Published, _) => outbox.give_back(row.lane, row.seq),
        (RowState::Abandoned | RowState::Moved, _) => {}
    }
    Ok(())
}

/// Reason code 0x95, given to a message that no connection to this broker can carry.
const PACKET_TOO_LARGE: u8 = 0x95;

/// Done bit, drop counter and dead letter in one transaction.
fn bury(
    db: &Connection,
    outbox: &mut Outbox,
    lane: Lane,
    seq: Seq,
    reason: u8,
    record: Option<Record>,
    (boot, now): (&Boot, Stamp),
) -> Sql<()> {
    if let Some(record) = record {
        db.prepare_cached(
            "INSERT INTO dead_letter (lane, seq, epoch, reason, dead_ms, topic, qos, retain, at_ms, payload,
                                      expires_s, correlation)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        )?
        .execute(params![
            lane as i64,
            seq.0,
            boot.epoch,
            reason,
            now.wall_ms,
            record.topic.as_str(),
            record.qos.number(),
            record.retain,
            record.at_ms,
            &record.payload[..],
            record.expires_s,
            record.correlation_data.as_deref(),
        ])?;
        db.prepare_cached(
            "DELETE FROM dead_letter WHERE number <= (SELECT max(number) FROM dead_letter) - ?",
        )?
        .execute([DEAD_LETTERS_MAX])?;
    }
    outbox.drop_record(db, lane, seq.0, DropReason::DeadLetter)
}

/// Dead letters kept for people to look at; the oldest goes first. Each is counted when it dies.
const DEAD_LETTERS_MAX: u64 = 1_000;
