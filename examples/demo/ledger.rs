//! Reads the outbox database when no agent has it open, through a copy: the evidence stays as it was left.

use std::fs;
use std::io;
use std::path::Path;

use rusqlite::Connection;

use crate::tally::Ledger;

/// Why the database could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    /// It could not be copied.
    #[error("cannot copy the agent's database: {0}")]
    Copy(#[from] io::Error),
    /// SQLite refused.
    #[error("cannot read a copy of the agent's database: {0}")]
    Sqlite(#[from] rusqlite::Error),
}

/// Copies the database and its write-ahead log, and reads the copy. No process may have it open.
pub(crate) fn read(database: &Path) -> Result<Ledger, LedgerError> {
    let folder = tempfile::tempdir()?;
    let copy = folder.path().join("copy.db");
    fs::copy(database, &copy)?;
    let mut log = database.as_os_str().to_owned();
    log.push("-wal");
    if Path::new(&log).exists() {
        fs::copy(log, folder.path().join("copy.db-wal"))?;
    }
    let db = Connection::open(&copy)?;
    let number = |sql: &str| db.query_row(sql, [], |row| row.get::<_, u64>(0));
    Ok(Ledger {
        epoch: number("SELECT epoch FROM meta")?,
        // Lanes: 0 alarm, 1 normal, 2 bulk. A number is given in the transaction that accepts its message.
        readings: number("SELECT next_seq - 1 FROM lane WHERE lane = 1")?,
        notes: number("SELECT next_seq - 1 FROM lane WHERE lane = 0")?,
        waiting: number("SELECT SUM(messages) FROM lane")?,
        in_exchange: number("SELECT COUNT(*) FROM inflight")?,
        given_up: number(
            "SELECT (SELECT COUNT(*) FROM dead_letter) + (SELECT IFNULL(SUM(count), 0) FROM dropped)",
        )?,
    })
}
