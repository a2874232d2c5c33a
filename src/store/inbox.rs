//! What the broker asked of us, recorded before it is acknowledged.
//!
//! Works inside a transaction that `store` opens and commits. Invariant: bounded; a message that does not
//! fit is refused and counted, never half recorded.

use rusqlite::{Connection, params};

use super::Boot;
use crate::clock::Stamp;
use crate::turn::Inbound;

/// Recorded messages that nobody has dealt with yet, at most.
pub(crate) const RECORDED_MAX: u64 = 10_000;

/// The table of inbound messages.
#[derive(Debug)]
pub(crate) struct Inbox {
    recorded: u64,
}

impl Inbox {
    pub(crate) fn load(db: &Connection) -> Result<Self, rusqlite::Error> {
        let recorded = db.query_row("SELECT count(*) FROM command WHERE state = 0", [], |row| row.get(0))?;
        Ok(Inbox { recorded })
    }

    /// Records a message; `false` when the inbox is full.
    pub(crate) fn record(
        &mut self,
        db: &Connection,
        inbound: &Inbound,
        boot: &Boot,
        now: Stamp,
    ) -> Result<bool, rusqlite::Error> {
        if self.recorded >= RECORDED_MAX {
            return Ok(false);
        }
        db.prepare_cached(
            "INSERT INTO command (topic, payload, qos, retain, response_topic, correlation,
                                  received_ms, received_mono, kernel_boot, state)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
        )?
        .execute(params![
            inbound.topic.as_str(),
            &inbound.payload[..],
            inbound.qos.number(),
            inbound.retain,
            inbound.response_topic,
            inbound.correlation_data.as_deref(),
            now.wall_ms,
            now.mono_ms,
            boot.kernel_boot,
        ])?;
        self.recorded += 1;
        Ok(true)
    }

    /// Recorded messages that nobody has dealt with yet.
    pub(crate) fn recorded(&self) -> u64 {
        self.recorded
    }
}
