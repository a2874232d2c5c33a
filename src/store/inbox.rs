//! What the broker asked of us: recorded before it is acknowledged, known by its id from then on.
//!
//! Works inside a transaction that `store` opens and commits. Invariants (P8): bounded, and what does not fit is
//! refused and counted, never half recorded; an id is written down before its write may leave, and belongs to one
//! command for as long as it is known; an answer and the end of its command are one transaction.

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::Boot;
use super::outbox::Outbox;
use crate::clock::Stamp;
use crate::command::{CommandStep, Recorded, Stepped};
use crate::message::{Qos, Topic};
use crate::turn::Inbound;

/// Recorded messages that nobody has dealt with yet, at most.
pub(crate) const RECORDED_MAX: u64 = 10_000;
/// Their bytes, at most.
const RECORDED_MAX_BYTES: u64 = 4 << 20;
/// Ids of answered commands that stay known: so many that were begun, and so many that never were. Apart from each
/// other, so that a flood of refused commands makes no executed one unknown.
pub const KNOWN_MAX: u64 = 10_000;

/// How far a command has come. The numbers are the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Recorded = 0,
    /// Its write may have been carried out.
    Begun = 1,
    /// Answered without having begun.
    Declined = 2,
    /// Answered after it had begun.
    Ended = 3,
}

type Sql<T> = Result<T, rusqlite::Error>;

/// The table of commands.
#[derive(Debug)]
pub(crate) struct Inbox {
    next_number: u64,
    recorded: u64,
    recorded_bytes: u64,
    declined: u64,
    ended: u64,
}

impl Inbox {
    pub(crate) fn load(db: &Connection) -> Sql<Self> {
        let count = |state: State| {
            db.query_row("SELECT count(*) FROM command WHERE state = ?", [state as i64], |row| row.get(0))
        };
        let recorded_bytes = db.query_row(
            "SELECT coalesce(sum(length(payload) + length(topic) + coalesce(length(response_topic), 0)
                                 + coalesce(length(correlation), 0)), 0) FROM command WHERE state = 0",
            [],
            |row| row.get(0),
        )?;
        let last: Option<u64> = db.query_row("SELECT max(number) FROM command", [], |row| row.get(0))?;
        Ok(Inbox {
            next_number: last.unwrap_or(0) + 1,
            recorded: count(State::Recorded)?,
            recorded_bytes,
            declined: count(State::Declined)?,
            ended: count(State::Ended)?,
        })
    }

    /// Records a message; `false` when the inbox is full.
    pub(crate) fn record(
        &mut self,
        db: &Connection,
        inbound: &Inbound,
        boot: &Boot,
        now: Stamp,
    ) -> Sql<bool> {
        let bytes = bytes(inbound);
        if self.recorded >= RECORDED_MAX || self.recorded_bytes + bytes > RECORDED_MAX_BYTES {
            return Ok(false);
        }
        db.prepare_cached(
            "INSERT INTO command (number, topic, payload, qos, retain, response_topic, correlation,
                                  received_ms, received_mono, kernel_boot, state, synchronised)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, ?)",
        )?
        .execute(params![
            self.next_number,
            inbound.topic.as_str(),
            &inbound.payload[..],
            inbound.qos.number(),
            inbound.retain,
            inbound.response_topic,
            inbound.correlation_data.as_deref(),
            now.wall_ms,
            now.mono_ms,
            boot.kernel_boot,
            now.synchronised,
        ])?;
        self.next_number += 1;
        self.recorded += 1;
        self.recorded_bytes += bytes;
        Ok(true)
    }

    /// Recorded messages that nobody has dealt with yet.
    pub(crate) fn recorded(&self) -> u64 {
        self.recorded
    }

    /// The number of the newest message.
    pub(crate) fn newest(&self) -> u64 {
        self.next_number - 1
    }

    /// Numbers go on above this one, although the rows that had them may be gone.
    pub(crate) fn go_on_above(&mut self, newest: u64) {
        self.next_number = self.next_number.max(newest + 1);
    }

    /// The first recorded commands with a number above `after`, in order.
    pub(crate) fn take(
        db: &Connection,
        after: u64,
        count: usize,
        boot: &Boot,
        now: Stamp,
    ) -> Sql<Vec<Recorded>> {
        select(db, "state = 0 AND number > ?1 ORDER BY number LIMIT ?2", (after, count), (boot, now))
    }

    /// Commands that had begun when the agent ended, in order.
    pub(crate) fn interrupted(db: &Connection, boot: &Boot, now: Stamp) -> Sql<Vec<Recorded>> {
        select(db, "state = 1 AND number > ?1 ORDER BY number LIMIT ?2", (0, usize::MAX >> 1), (boot, now))
    }

    /// Does one step. `room` is what the outbox may hold, answers included.
    pub(crate) fn step(
        &mut self,
        db: &Connection,
        outbox: &mut Outbox,
        step: CommandStep,
        room: u64,
        (boot, now): (&Boot, Stamp),
    ) -> Sql<Stepped> {
        let (CommandStep::Begin { number, .. }
        | CommandStep::Answer { number, .. }
        | CommandStep::Forget { number }) = step;
        let row = self.state(db, number)?;
        let known_id = match &step {
            CommandStep::Begin { id, .. } => Some(id.as_str()),
            CommandStep::Answer { id, .. } => id.as_deref(),
            CommandStep::Forget { .. } => None,
        };
        if row.is_none_or(|(state, _)| state == State::Recorded) && self.is_known(db, known_id, number)? {
            self.forget(db, number, row.map_or(0, |(_, bytes)| bytes))?;
            return Ok(Stepped::Repeated);
        }
        let (state, bytes) = match (row, &step) {
            (Some(row), _) => row,
            (None, CommandStep::Answer { .. }) => self.restore(db, number, (boot, now))?,
            (None, _) => return Ok(Stepped::Gone),
        };
        match step {
            CommandStep::Forget { .. } if state == State::Recorded => self.forget(db, number, bytes)?,
            CommandStep::Forget { .. } => {}
            CommandStep::Begin { id, .. } => {
                db.prepare_cached("UPDATE command SET state = 1, id = ?2 WHERE number = ?1 AND state = 0")?
                    .execute(params![number, id.as_bytes()])?;
                if state == State::Recorded {
                    self.leave_recorded(bytes);
                }
            }
            CommandStep::Answer { .. } if matches!(state, State::Declined | State::Ended) => {}
            CommandStep::Answer { id, answer, .. } => {
                let answer = vec![*answer];
                if outbox.bytes() + Outbox::cost(&answer) > room {
                    return Ok(Stepped::NoRoom);
                }
                outbox.append(db, answer, boot, now)?;
                self.close(db, number, id.as_deref(), (state, bytes))?;
            }
        }
        Ok(Stepped::Done)
    }

    /// Damage took the row of a command under way; its answer closes it all the same.
    fn restore(&mut self, db: &Connection, number: u64, (boot, now): (&Boot, Stamp)) -> Sql<(State, u64)> {
        db.prepare_cached(
            "INSERT INTO command (number, topic, payload, qos, retain, received_ms, received_mono, kernel_boot, state)
             VALUES (?, '', x'', 0, 0, ?, ?, ?, 1)",
        )?
        .execute(params![number, now.wall_ms, now.mono_ms, boot.kernel_boot])?;
        self.go_on_above(number);
        Ok((State::Begun, 0))
    }

    fn state(&self, db: &Connection, number: u64) -> Sql<Option<(State, u64)>> {
        db.prepare_cached(
            "SELECT state, length(payload) + length(topic) + coalesce(length(response_topic), 0)
                    + coalesce(length(correlation), 0) FROM command WHERE number = ?",
        )?
        .query_row([number], |row| {
            let state = match row.get::<_, i64>(0)? {
                0 => State::Recorded,
                1 => State::Begun,
                2 => State::Declined,
                _ => State::Ended,
            };
            Ok((state, row.get(1)?))
        })
        .optional()
    }

    fn is_known(&self, db: &Connection, id: Option<&str>, number: u64) -> Sql<bool> {
        let Some(id) = id else { return Ok(false) };
        db.prepare_cached("SELECT 1 FROM command WHERE id = ? AND number <> ?")?
            .exists(params![id.as_bytes(), number])
    }

    /// The command is over. Its id stays known; one without goes.
    fn close(
        &mut self,
        db: &Connection,
        number: u64,
        id: Option<&str>,
        (state, bytes): (State, u64),
    ) -> Sql<()> {
        if state == State::Recorded && id.is_none() {
            return self.forget(db, number, bytes);
        }
        let over = if state == State::Recorded { State::Declined } else { State::Ended };
        db.prepare_cached(
            "UPDATE command SET state = ?2, id = coalesce(id, ?3), topic = '', payload = x'', response_topic = NULL,
                                correlation = NULL WHERE number = ?1",
        )?
        .execute(params![number, over as i64, id.map(str::as_bytes)])?;
        if state == State::Recorded {
            self.leave_recorded(bytes);
        }
        let known = if over == State::Declined { &mut self.declined } else { &mut self.ended };
        *known += 1;
        if *known > KNOWN_MAX {
            *known -= 1;
            db.prepare_cached(
                "DELETE FROM command WHERE number = (SELECT min(number) FROM command WHERE state = ?)",
            )?
            .execute([over as i64])?;
        }
        Ok(())
    }

    fn forget(&mut self, db: &Connection, number: u64, bytes: u64) -> Sql<()> {
        db.prepare_cached("DELETE FROM command WHERE number = ?")?.execute([number])?;
        self.leave_recorded(bytes);
        Ok(())
    }

    fn leave_recorded(&mut self, bytes: u64) {
        self.recorded = self.recorded.saturating_sub(1);
        self.recorded_bytes = self.recorded_bytes.saturating_sub(bytes);
    }
}

/// As SQL counts them: a text's length there is in characters.
fn bytes(inbound: &Inbound) -> u64 {
    let text = |text: &str| text.chars().count();
    let bytes = inbound.payload.len()
        + text(inbound.topic.as_str())
        + inbound.response_topic.as_deref().map_or(0, text)
        + inbound.correlation_data.as_ref().map_or(0, |data| data.len());
    bytes as u64
}

fn select(
    db: &Connection,
    which: &str,
    (after, count): (u64, usize),
    (boot, now): (&Boot, Stamp),
) -> Sql<Vec<Recorded>> {
    db.prepare_cached(&format!(
        "SELECT number, id, topic, payload, qos, retain, response_topic, correlation,
                received_ms, received_mono, kernel_boot, synchronised FROM command WHERE {which}"
    ))?
    .query_map(params![after, count], |row| recorded(row, boot, now))?
    .collect()
}

fn recorded(row: &Row<'_>, boot: &Boot, now: Stamp) -> Sql<Recorded> {
    let topic: String = row.get(2)?;
    let topic = Topic::new(&topic).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(2, rusqlite::types::Type::Text, error.into())
    })?;
    let received = Stamp { wall_ms: row.get(8)?, mono_ms: row.get(9)?, synchronised: row.get(11)? };
    Ok(Recorded {
        number: row.get(0)?,
        id: row.get::<_, Option<Vec<u8>>>(1)?.map(|id| String::from_utf8_lossy(&id).into_owned()),
        inbound: Inbound {
            topic,
            payload: row.get::<_, Vec<u8>>(3)?.into(),
            qos: Qos::from_number(row.get(4)?).unwrap_or(Qos::AtMostOnce),
            retain: row.get(5)?,
            response_topic: row.get(6)?,
            correlation_data: row.get::<_, Option<Vec<u8>>>(7)?.map(Into::into),
        },
        received,
        age_ms: boot.elapsed_ms(row.get(10)?, received, now),
    })
}
