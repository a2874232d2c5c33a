//! The durable half of the MQTT session: rows in flight, flags, open inbound identifiers.
//!
//! Works inside a transaction that `store` opens and commits.
//!
//! Invariants (design, delivery): a QoS 2 row and its message's done bit change in one transaction; rows
//! belong to one broker and client identifier, and to no other.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};

use super::Boot;
use super::outbox::{DropReason, Outbox};
use crate::clock::Stamp;
use crate::message::{Lane, PacketId, Qos, Record, Seq};
use crate::turn::{Begin, Change, Offer, OnSessionLoss, Resume, RowState, Taken, record_bytes};

type Sql<T> = Result<T, rusqlite::Error>;

#[derive(Debug, Clone, Copy)]
struct Row {
    lane: Lane,
    seq: u64,
    send_no: u64,
    state: RowState,
    /// The flag it was sent with; `None` in rows of schema 1.
    retain: Option<bool>,
}

/// What the settled changes amounted to, for the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settled {
    /// Messages whose last acknowledgement was committed.
    pub delivered: u64,
    /// Messages in the ambiguous state when the session was lost, published anew.
    pub possibly_doubled: u64,
    /// Messages in the ambiguous state when the session was lost, called delivered.
    pub possibly_lost: u64,
    /// Abandoned messages whose exchange ended.
    pub abandoned: u64,
}

/// The rows of `inflight`, by packet identifier.
#[derive(Debug)]
pub(crate) struct SessionTable {
    rows: BTreeMap<u16, Row>,
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
        _ => RowState::Abandoned,
    }
}

impl SessionTable {
    pub(crate) fn load(db: &Connection, outbox: &mut Outbox) -> Sql<Self> {
        let mut statement = db.prepare("SELECT pkid, lane, seq, send_no, state, retain FROM inflight")?;
        let mut rows = BTreeMap::new();
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let lane = Lane::ALL[row.get::<_, usize>(1)?.min(2)];
            let (seq, send_no): (u64, u64) = (row.get(2)?, row.get(3)?);
            let state = row_state(row.get(4)?);
            if state != RowState::Abandoned {
                outbox.mark_taken(lane, seq);
            }
            rows.insert(row.get(0)?, Row { lane, seq, send_no, state, retain: row.get(5)? });
        }
        let next_send_no = rows.values().map(|row| row.send_no).max().unwrap_or(0) + 1;
        Ok(SessionTable { rows, next_send_no, fresh: true })
    }

    pub(super) fn place(&self) -> Place {
        Place { next_send_no: self.next_send_no, fresh: self.fresh }
    }

    /// Into a table that was just read from the disk, which has not changed since the place was noted.
    pub(super) fn restore(&mut self, place: Place) {
        (self.next_send_no, self.fresh) = (place.next_send_no, place.fresh);
    }

    /// What must be committed before CONNECT: the owner, and whether "present" could still be believed.
    pub(crate) fn begin(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        owner: (&str, &str),
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        let (broker, client_id): (String, String) =
            db.query_row("SELECT broker, client_id FROM session", [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if (broker.as_str(), client_id.as_str()) != owner {
            self.requeue_all(db, outbox, policy, settled)?;
            db.execute(
                "UPDATE session SET broker = ?, client_id = ?, uncertain = 0, clean_start = 1, canary = 0",
                params![owner.0, owner.1],
            )?;
        }
        let rx_open: i64 = db.query_row("SELECT count(*) FROM rx_open", [], |row| row.get(0))?;
        if !self.rows.is_empty() || rx_open > 0 {
            db.execute("UPDATE session SET uncertain = 1 WHERE uncertain = 0", [])?;
        }
        Ok(())
    }

    /// The database turned out to be a copy of the past, or the broker's session to be another one: what the rows
    /// say of it is void.
    pub(crate) fn disown(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        self.requeue_all(db, outbox, policy, settled)?;
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
        let rows: Vec<Row> =
            self.rows.values().copied().filter(|row| row.state != RowState::Abandoned).collect();
        for (lane, seq) in unacked {
            // After a failed commit nobody here remembers them.
            outbox.keep_taken(db, *lane, seq.0)?;
        }
        outbox.give_back_unless(|lane, seq| {
            unacked.contains(&(lane, Seq(seq))) || rows.iter().any(|row| (row.lane, row.seq) == (lane, seq))
        });
        let mut in_order: Vec<(u16, Row)> = self.rows.iter().map(|(id, row)| (*id, *row)).collect();
        in_order.sort_by_key(|(_, row)| row.send_no);
        let mut resume = Vec::new();
        for (id, row) in in_order {
            let Some(id) = PacketId::new(id) else { continue };
            let mut state = row.state;
            let mut record = None;
            if state == RowState::Published {
                if self.fresh {
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
        let mut statement = db.prepare("SELECT pkid, hash FROM rx_open")?;
        let mut rx_open = Vec::new();
        let mut found = statement.query([])?;
        while let Some(row) = found.next()? {
            let hash: Vec<u8> = row.get(1)?;
            let hash = hash.try_into().map_or(0, u128::from_le_bytes);
            rx_open.extend(PacketId::new(row.get(0)?).map(|id| (id, hash)));
        }
        db.query_row("SELECT clean_start, uncertain, canary FROM session", [], |row| {
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
                if row.state == RowState::Abandoned {
                    settled.abandoned += 1;
                    return Ok(());
                }
                settled.delivered += 1;
                outbox.finish(db, row.lane, row.seq)
            }
            Change::Acknowledged { lane, seq } => {
                settled.delivered += 1;
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
                self.requeue_all(db, outbox, *policy, settled)?;
                db.execute("UPDATE session SET uncertain = 0, clean_start = 0, canary = 0", []).map(drop)
            }
            Change::SessionReplaced(policy) => self.disown(db, outbox, *policy, settled),
            Change::SessionPresent => {
                db.execute("UPDATE session SET uncertain = 0 WHERE uncertain = 1", []).map(drop)
            }
            Change::Canary { proven } => db.execute("UPDATE session SET canary = ?", [proven]).map(drop),
            Change::InboundOpened { id, hash, .. } => db
                .prepare_cached("INSERT OR REPLACE INTO rx_open VALUES (?, ?)")?
                .execute(params![id.get(), hash.to_le_bytes()])
                .map(drop),
            Change::InboundReleased(id) => {
                db.prepare_cached("DELETE FROM rx_open WHERE pkid = ?")?.execute([id.get()]).map(drop)
            }
            Change::Inbound { .. } => Ok(()),
        }
    }

    /// Hands out waiting messages, alarms first (live ones before that, if so asked), and writes the rows of the QoS 2 ones.
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
        self.rows.insert(id.get(), row);
        db.prepare_cached("INSERT INTO inflight VALUES (?, ?, ?, ?, 1, ?)")?
            .execute(params![id.get(), row.lane as i64, row.seq, row.send_no, row.retain])
            .map(drop)
    }

    fn set_state(&mut self, db: &Connection, id: PacketId, state: RowState) -> Sql<()> {
        if let Some(row) = self.rows.get_mut(&id.get()) {
            row.state = state;
            db.prepare_cached("UPDATE inflight SET state = ? WHERE pkid = ?")?
                .execute(params![state as i64, id.get()])?;
        }
        Ok(())
    }

    /// The message counts as dropped (its fate is unknown), the row waits for PUBCOMP.
    fn abandon(&mut self, db: &Connection, outbox: &mut Outbox, id: PacketId) -> Sql<()> {
        let Some(row) = self.rows.get(&id.get()).copied() else { return Ok(()) };
        self.set_state(db, id, RowState::Abandoned)?;
        outbox.drop_record(db, row.lane, row.seq, DropReason::Abandoned)
    }

    fn remove(&mut self, db: &Connection, id: PacketId) -> Sql<Option<Row>> {
        let row = self.rows.remove(&id.get());
        if row.is_some() {
            db.prepare_cached("DELETE FROM inflight WHERE pkid = ?")?.execute([id.get()])?;
        }
        Ok(row)
    }

    fn remove_row(&mut self, db: &Connection, id: Option<PacketId>) -> Sql<()> {
        match id {
            Some(id) => self.remove(db, id).map(drop),
            None => Ok(()),
        }
    }

    /// The broker holds nothing of ours: every exchange begins anew, or ends by policy.
    fn requeue_all(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        policy: OnSessionLoss,
        settled: &mut Settled,
    ) -> Sql<()> {
        for row in std::mem::take(&mut self.rows).into_values() {
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
                (RowState::Abandoned, _) => settled.abandoned += 1,
            }
        }
        outbox.give_back_unless(|_, _| false);
        db.execute("DELETE FROM inflight", [])?;
        db.execute("DELETE FROM rx_open", []).map(drop)
    }
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
