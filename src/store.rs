//! The outbox database: one connection on one thread, group commit.
//!
//! [`Store`] is synchronous and knows no runtime: open, commit a [`Batch`], look. [`spawn`] puts it on a
//! thread of its own and gives out [`Handle`]s.
//!
//! Invariants: `synchronous=FULL`, always; nobody is told anything before COMMIT has returned; a failed
//! commit is a crash: everything in memory is thrown away and read from disk again; never a fall-back to
//! memory.

mod inbox;
mod outbox;
mod salvage;
mod segment;
mod session;
mod thread;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use crate::clock::{self, Stamp};
use crate::message::{Lane, Message, PacketId, Qos, Seq};
use crate::turn::{Begin, Change, Offer, OnSessionLoss, Taken};
use inbox::Inbox;
use outbox::Outbox;
use session::SessionTable;

pub use outbox::LaneDepth;
pub use salvage::Damage;
pub use session::Settled;
pub use thread::{Accepted, Handle, NotAccepted, Turn, Turned, spawn};

/// "fpst": marks our files (`PRAGMA application_id`).
const APPLICATION_ID: i64 = 0x6670_7374;
/// The newest schema this program knows (`PRAGMA user_version`).
const SCHEMA: i64 = 1;
/// Page size in bytes: measured to write least for 200-byte messages.
const PAGE_BYTES: u64 = 1024;
/// The write-ahead log is moved into the database from this many pages on: 1 MiB.
const CHECKPOINT_PAGES: u64 = 1000;
/// A file kept full of nothing, given up when the disk is full: even DELETE needs space.
const RESERVE_BYTES: u64 = 4 << 20;
/// What a full queue must still be able to record above the quota: acknowledgements, commands, answers, gaps.
const HEADROOM_BYTES: u64 = 16 << 20;
/// A database up to this size is checked whole at a start after an unclean stop; a larger one is ready at
/// once, and damage in it is found when it is read.
const CHECK_AT_START_BYTES: u64 = 8 << 20;
/// Bytes of one message's payload, at most.
pub const PAYLOAD_MAX_BYTES: usize = 1 << 20;

/// Who loses when the quota is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest message of the lowest lane that is not in flight. The default.
    DropOldest,
    /// The new one: its producer hears "not accepted".
    RejectNew,
}

/// What the store is opened with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database file; its folder is made if it is missing.
    pub path: PathBuf,
    /// Bytes of messages kept at most.
    pub quota: u64,
    /// Who loses beyond it.
    pub when_full: WhenFull,
    /// Longest wait of a message for others to share its commit with, in the order of [`Lane::ALL`].
    pub commit_interval: [Duration; 3],
    /// Negative controls of tests: what a commit must survive. Production leaves it at its default.
    pub faults: Faults,
}

/// Switches for tests that must fail when a promise is broken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// How long each COMMIT is held back.
    pub commit_stall: Duration,
}

/// What can go wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process holds the database.
    #[error(
        "{path} is in use by another process; is fieldpost already running? (`systemctl status fieldpost`)"
    )]
    InUse {
        /// The database file.
        path: PathBuf,
    },
    /// The file cannot be trusted; it is set aside and what is readable carried over.
    #[error("the database {path} is damaged: {what}")]
    Damaged {
        /// The database file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The file was written by a newer fieldpost.
    #[error("{path} has schema {found}, this program knows up to {known}; install the newer fieldpost again")]
    Newer {
        /// The database file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The folder or file could not be made or opened.
    #[error("cannot open {path}: {source}; check that the folder exists and that this user may write there")]
    Open {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The disk has no space left.
    #[error("the disk that holds {path} is full: nothing can be stored until space is freed")]
    DiskFull {
        /// The database file.
        path: PathBuf,
    },
    /// SQLite refused.
    #[error("the database {path} failed: {source}")]
    Sqlite {
        /// The database file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
}

/// Which start of what this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// The store's epoch: numbers are unique within it.
    pub epoch: u32,
    /// Starts of the agent on this database.
    pub boot: u32,
    /// Boots of the machine seen so far.
    pub kernel_boot: u32,
}

impl Boot {
    /// Milliseconds from `then`, taken in boot `kernel_boot`, to `now`: by the monotonic clock within one
    /// boot, by the wall clock across boots where both readings are believable, otherwise unknown.
    pub(crate) fn elapsed_ms(&self, kernel_boot: u32, then: Stamp, now: Stamp) -> Option<u64> {
        if kernel_boot == self.kernel_boot {
            return Some(now.ms_since(then));
        }
        let believable = then.wall_is_believable() && now.wall_is_believable();
        believable.then(|| now.wall_ms.saturating_sub(then.wall_ms).max(0) as u64)
    }
}

/// What limits or damage took and no gap record has told yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The lane.
    pub lane: Lane,
    /// `quota`, `expired`, `damaged`, `dead_letter` or `abandoned`.
    pub reason: String,
    /// The lowest number dropped.
    pub first: Seq,
    /// The highest number dropped.
    pub last: Seq,
    /// How many.
    pub count: u64,
}

/// Messages to accept together or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Append {
    /// The messages, QoS 1 and 2 only.
    pub messages: Vec<Message>,
    /// Gaps these messages tell of: closed in the same transaction. Such messages may exceed the quota.
    pub closes: Vec<Gap>,
}

/// Everything one transaction does.
#[derive(Debug, Default)]
pub struct Batch {
    /// New messages.
    pub appends: Vec<Append>,
    /// What the session learned.
    pub changes: Vec<Change>,
    /// What the session can take.
    pub offer: Option<Offer>,
}

/// What a committed transaction did.
#[derive(Debug, Default)]
pub struct Committed {
    /// For each append, whether it was accepted.
    pub appends: Vec<Result<(), NotAccepted>>,
    /// Messages handed to the session.
    pub taken: Vec<Taken>,
    /// Inbound identifiers whose message was refused because the inbox is full.
    pub refused: Vec<PacketId>,
    /// What the changes amounted to.
    pub settled: Settled,
}

/// An open database and what memory needs of it.
struct Parts {
    db: Connection,
    boot: Boot,
    outbox: Outbox,
    session: SessionTable,
    inbox: Inbox,
}

/// What screens and the health message show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// The lanes, in the order of [`Lane::ALL`].
    pub lanes: [LaneDepth; 3],
    /// Everything ever dropped: lane, reason, count.
    pub dropped: Vec<(Lane, String, u64)>,
    /// What no gap record has told yet.
    pub gaps: Vec<Gap>,
    /// Messages the broker will never take, kept to look at.
    pub dead_letters: u64,
    /// Inbound messages recorded and not dealt with.
    pub inbox: u64,
    /// QoS 2 exchanges that have begun.
    pub rows: u64,
    /// Bytes of message segments, against the quota.
    pub used_bytes: u64,
    /// The quota.
    pub quota: u64,
    /// Which start this is.
    pub boot: Boot,
    /// The last damage found since the start.
    pub damage: Option<Damage>,
}

/// The database, opened and exclusively ours.
#[derive(Debug)]
pub struct Store {
    /// The last damage found since the start, until the next one.
    damage: Option<Damage>,
    /// Where the check behind the start goes on; `None` when it is done.
    check_from: Option<i64>,
    db: Connection,
    settings: Settings,
    boot: Boot,
    outbox: Outbox,
    session: SessionTable,
    inbox: Inbox,
}

impl Store {
    /// Opens the database, making it if it is missing, and counts this start. One that is damaged or another
    /// program's is set aside, and what is readable of ours carried over.
    ///
    /// # Errors
    /// [`StoreError`]; the file is not touched when it is newer or in use.
    pub fn open(settings: Settings) -> Result<Self, StoreError> {
        prepare_files(&settings.path)?;
        match Store::open_file(&settings) {
            Ok(parts) => Ok(Store::of(parts, settings, None)),
            Err(StoreError::Damaged { what, .. }) => {
                let (parts, damage) = start_over(&settings, what)?;
                Ok(Store::of(parts, settings, Some(damage)))
            }
            Err(error) => Err(error),
        }
    }

    fn of(parts: Parts, settings: Settings, damage: Option<Damage>) -> Self {
        let Parts { db, boot, outbox, session, inbox } = parts;
        keep_reserve(&settings.path);
        Store { damage, check_from: Some(0), db, settings, boot, outbox, session, inbox }
    }

    fn open_file(settings: &Settings) -> Result<Parts, StoreError> {
        let fail = |source| sqlite_error(&settings.path, source);
        let damaged = |what: &str| StoreError::Damaged { path: settings.path.clone(), what: what.into() };
        let unclean = fs::metadata(with_suffix(&settings.path, "-wal")).is_ok_and(|wal| wal.len() > 0);
        let bytes = fs::metadata(&settings.path).map_or(0, |file| file.len());
        if bytes == 0 && reserve_path(&settings.path).exists() {
            return Err(damaged("it is empty, although there was one before"));
        }
        let db = connect(settings).map_err(fail)?;
        check_identity(&db, &settings.path)?;
        if unclean && bytes <= CHECK_AT_START_BYTES {
            let verdict: String =
                db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(fail)?;
            if verdict != "ok" {
                return Err(damaged(&verdict));
            }
        }
        let boot = start(&db).map_err(fail)?;
        let (outbox, session, inbox) = load(&db).map_err(fail)?;
        Ok(Parts { db, boot, outbox, session, inbox })
    }

    /// Which start this is.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// Does everything in one transaction; when this returns, it is on the disk.
    ///
    /// # Errors
    /// Nothing was done; everything in memory has been read from disk again.
    pub fn commit(&mut self, batch: Batch, now: Stamp) -> Result<Committed, StoreError> {
        let outcome = self.transaction(|store| store.apply(batch, now));
        outcome.map_err(|source| self.recover(source))
    }

    /// What a new connection starts from: the owner is recorded, and whether "session present" can still
    /// be believed. `unacked` are the QoS 1 messages the session still holds itself.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn begin(
        &mut self,
        owner: (&str, &str),
        policy: OnSessionLoss,
        unacked: &[(Lane, Seq)],
        now: Stamp,
    ) -> Result<(Begin, Settled), StoreError> {
        let outcome = self.transaction(|store| {
            let mut settled = Settled::default();
            store.session.begin(&store.db, &mut store.outbox, owner, policy, &mut settled)?;
            let begin = store.session.resume(&store.db, &mut store.outbox, unacked, &store.boot, now)?;
            store.outbox.write_changes(&store.db)?;
            Ok((begin, settled))
        });
        outcome.map_err(|source| self.recover(source))
    }

    /// Takes an epoch and a boot counter above those that were heard of, and asks for a clean start: the
    /// database is a copy of the past.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn disown(&mut self, epoch: u32, boot: u32, policy: OnSessionLoss) -> Result<Settled, StoreError> {
        let boot = Boot {
            epoch: self.boot.epoch.max(epoch).saturating_add(1),
            boot: self.boot.boot.max(boot).saturating_add(1),
            kernel_boot: self.boot.kernel_boot,
        };
        let outcome = self.transaction(|store| {
            let mut settled = Settled::default();
            store.session.disown(&store.db, &mut store.outbox, policy, &mut settled)?;
            store.db.execute("UPDATE meta SET epoch = ?, boot = ?", params![boot.epoch, boot.boot])?;
            store.outbox.write_changes(&store.db)?;
            Ok(settled)
        });
        let settled = outcome.map_err(|source| self.recover(source))?;
        self.boot = boot;
        Ok(settled)
    }

    /// Reads one more segment from end to end, so that damage is found before its turn comes; `false`: all
    /// were read. Whole again or not, records are checked once more when they are sent.
    ///
    /// # Errors
    /// [`StoreError::Damaged`]: the database has been replaced by what could be carried over.
    pub fn check_next(&mut self) -> Result<bool, StoreError> {
        let Some(from) = self.check_from else { return Ok(false) };
        match Outbox::read_through(&self.db, from) {
            Ok(next) => self.check_from = next,
            Err(source) => {
                self.check_from = None;
                return Err(self.recover(source));
            }
        }
        Ok(self.check_from.is_some())
    }

    /// What screens show.
    ///
    /// # Errors
    /// SQLite's, when the tables cannot be read.
    pub fn look(&self, now: Stamp) -> Result<Look, StoreError> {
        self.read(now).map_err(|source| sqlite_error(&self.settings.path, source))
    }

    /// A number SQLite reports of itself, `synchronous` for one; -1 when it does not know it.
    pub fn pragma(&self, name: &str) -> i64 {
        self.db.pragma_query_value(None, name, |row| row.get(0)).unwrap_or(-1)
    }

    /// Whether anything waits to be taken, and when the next held message is free again (monotonic ms).
    pub fn waiting(&self, now: Stamp) -> (bool, Option<u64>) {
        (self.outbox.has_waiting(), self.outbox.next_release(now))
    }

    /// Moves the write-ahead log into the database and closes it.
    pub fn close(self) {
        let checkpoint = self.db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)");
        if let Err(error) = checkpoint.and(self.db.close().map_err(|(_, error)| error)) {
            tracing::warn!(%error, "the database was closed without a checkpoint; nothing is lost");
        }
    }

    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, rusqlite::Error>,
    ) -> Result<T, rusqlite::Error> {
        self.db.execute_batch("BEGIN IMMEDIATE")?;
        let done = work(self)?;
        if !self.settings.faults.commit_stall.is_zero() {
            std::thread::sleep(self.settings.faults.commit_stall);
        }
        self.db.execute_batch("COMMIT")?;
        Ok(done)
    }

    fn apply(&mut self, batch: Batch, now: Stamp) -> Result<Committed, rusqlite::Error> {
        let mut committed = Committed::default();
        let when = (&self.boot, now);
        for change in &batch.changes {
            let recorded = match change {
                Change::Inbound(inbound) | Change::InboundOpened { inbound, .. } => {
                    self.inbox.record(&self.db, inbound, &self.boot, now)?
                }
                _ => true,
            };
            match change {
                Change::InboundOpened { id, .. } if !recorded => committed.refused.push(*id),
                _ => {
                    self.session.settle(&self.db, &mut self.outbox, change, &mut committed.settled, when)?;
                }
            }
        }
        for append in batch.appends {
            let accepted = self.accept(append, now)?;
            committed.appends.push(accepted);
        }
        if let Some(offer) = &batch.offer {
            committed.taken = self.session.take(&self.db, &mut self.outbox, offer, (&self.boot, now))?;
            if let Some((lane, missing)) = self.outbox.missing() {
                let what = format!("{missing} messages of lane {lane} cannot be found");
                let corrupt = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
                return Err(rusqlite::Error::SqliteFailure(corrupt, Some(what)));
            }
        }
        self.outbox.write_changes(&self.db)?;
        Ok(committed)
    }

    fn accept(&mut self, append: Append, now: Stamp) -> Result<Result<(), NotAccepted>, rusqlite::Error> {
        if let Some(message) = append.messages.iter().find(|m| m.payload.len_max() > PAYLOAD_MAX_BYTES) {
            let refusal = NotAccepted::TooLarge { bytes: message.payload.len_max(), max: PAYLOAD_MAX_BYTES };
            return Ok(Err(refusal));
        }
        if append.messages.iter().any(|message| message.qos == Qos::AtMostOnce) {
            return Ok(Err(NotAccepted::Qos0));
        }
        let quota = self.settings.quota;
        if append.closes.is_empty()
            && !self.outbox.make_room(
                &self.db,
                Outbox::cost(&append.messages),
                quota,
                self.settings.when_full,
            )?
        {
            return Ok(Err(NotAccepted::QuotaFull { quota, used: self.outbox.bytes() }));
        }
        for gap in &append.closes {
            self.close_gap(gap)?;
        }
        self.outbox.append(&self.db, append.messages, &self.boot, now)?;
        Ok(Ok(()))
    }

    /// What was dropped since the gap was looked at stays open.
    fn close_gap(&self, gap: &Gap) -> Result<(), rusqlite::Error> {
        let (lane, reason) = (gap.lane as i64, &gap.reason);
        self.db.execute(
            "UPDATE gap SET count = count - ?3, first_seq = max(first_seq, ?4) WHERE lane = ?1 AND reason = ?2",
            params![lane, reason, gap.count, gap.last.0 + 1],
        )?;
        self.db.execute("DELETE FROM gap WHERE count <= 0", []).map(drop)
    }

    /// After a failed transaction: forget everything in memory, read it again; make room on a full disk.
    fn recover(&mut self, source: rusqlite::Error) -> StoreError {
        if !self.db.is_autocommit()
            && let Err(error) = self.db.execute_batch("ROLLBACK")
        {
            tracing::warn!(%error, "rolling back failed");
        }
        let error = sqlite_error(&self.settings.path, source);
        if matches!(error, StoreError::DiskFull { .. }) {
            give_up_reserve(&self.settings.path);
        }
        if let StoreError::Damaged { what, .. } = &error {
            self.replace(what.clone());
            return error;
        }
        match load(&self.db) {
            Ok((outbox, session, inbox)) => {
                self.outbox = outbox;
                self.session = session;
                self.inbox = inbox;
            }
            Err(error) => {
                tracing::error!(%error, "the database could not be read again after a failed commit")
            }
        }
        error
    }

    /// Damage was found at work: everything starts over with what can be carried over.
    fn replace(&mut self, what: String) {
        let closed = Connection::open_in_memory().map(|nothing| std::mem::replace(&mut self.db, nothing));
        // Closing may fail on a damaged database; the file handles are gone all the same.
        drop(closed);
        match start_over(&self.settings, what) {
            Ok((parts, damage)) => {
                let Parts { db, boot, outbox, session, inbox } = parts;
                (self.db, self.boot, self.outbox) = (db, boot, outbox);
                (self.session, self.inbox, self.damage) = (session, inbox, Some(damage));
            }
            Err(error) => {
                tracing::error!(%error, "no new database could be made in place of the damaged one")
            }
        }
    }

    fn read(&self, now: Stamp) -> Result<Look, rusqlite::Error> {
        let lane = |number: i64| Lane::ALL[number.clamp(0, 2) as usize];
        let mut dropped = self.db.prepare_cached("SELECT lane, reason, count FROM dropped")?;
        let mut gaps = self.db.prepare_cached("SELECT lane, reason, first_seq, last_seq, count FROM gap")?;
        Ok(Look {
            lanes: self.outbox.depth(&self.db, &self.boot, now)?,
            dropped: dropped
                .query_map([], |row| Ok((lane(row.get(0)?), row.get(1)?, row.get(2)?)))?
                .collect::<Result<_, _>>()?,
            gaps: gaps
                .query_map([], |row| {
                    Ok(Gap {
                        lane: lane(row.get(0)?),
                        reason: row.get(1)?,
                        first: Seq(row.get(2)?),
                        last: Seq(row.get(3)?),
                        count: row.get(4)?,
                    })
                })?
                .collect::<Result<_, _>>()?,
            dead_letters: self.db.query_row("SELECT count(*) FROM dead_letter", [], |row| row.get(0))?,
            inbox: self.inbox.recorded(),
            rows: self.session.rows(),
            used_bytes: self.outbox.bytes(),
            quota: self.settings.quota,
            boot: self.boot.clone(),
            damage: self.damage.clone(),
        })
    }
}

/// Sets the damaged database aside and carries over what is readable.
fn start_over(settings: &Settings, what: String) -> Result<(Parts, Damage), StoreError> {
    let path = &settings.path;
    let fail = |source| sqlite_error(path, source);
    let aside = salvage::set_aside(path, clock::now().wall_ms)
        .map_err(|source| StoreError::Open { path: path.clone(), source })?;
    prepare_files(path)?;
    let db = connect(settings).map_err(fail)?;
    check_identity(&db, path)?;
    let damage = salvage::carry_over(&aside, &db, what).map_err(fail)?;
    let boot = start(&db).map_err(fail)?;
    let (outbox, session, inbox) = load(&db).map_err(fail)?;
    tracing::error!(
        what = damage.what,
        aside = %damage.aside.display(),
        salvaged = damage.salvaged,
        lost = damage.lost,
        possibly_doubled = damage.possibly_doubled,
        "the database was damaged: it was set aside, and what was readable carried over"
    );
    Ok((Parts { db, boot, outbox, session, inbox }, damage))
}

/// The folder (0750) and the file (0600), before SQLite makes them with other modes.
fn prepare_files(path: &Path) -> Result<(), StoreError> {
    let fail = |path: &Path, source| StoreError::Open { path: path.to_owned(), source };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::DirBuilder::new().recursive(true).mode(0o750).create(folder).map_err(|e| fail(folder, e))?;
    }
    fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
        .map(drop)
        .map_err(|e| fail(path, e))
}

fn connect(settings: &Settings) -> Result<Connection, rusqlite::Error> {
    let db = Connection::open(&settings.path)?;
    db.set_prepared_statement_cache_capacity(64);
    // An agent that is just stopping may still hold the file.
    db.busy_timeout(Duration::from_secs(1))?;
    let pages_max = (settings.quota + settings.quota / 4 + HEADROOM_BYTES) / PAGE_BYTES;
    db.execute_batch(&format!(
        "PRAGMA page_size = {PAGE_BYTES};
         PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES};
         PRAGMA journal_size_limit = {};
         PRAGMA max_page_count = {pages_max};
         PRAGMA cache_size = -2000;
         PRAGMA temp_store = MEMORY;",
        4 * CHECKPOINT_PAGES * PAGE_BYTES
    ))?;
    Ok(db)
}

/// Refuses what is not ours or too new; makes the tables where there are none.
fn check_identity(db: &Connection, path: &Path) -> Result<(), StoreError> {
    let fail = |source| sqlite_error(path, source);
    let pragma = |name: &str| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(fail);
    let tables: i64 =
        db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(fail)?;
    let (application, schema) = (pragma("application_id")?, pragma("user_version")?);
    if tables == 0 && application == 0 {
        return create(db).map_err(fail);
    }
    if application != APPLICATION_ID {
        let what = "it belongs to another program".to_owned();
        return Err(StoreError::Damaged { path: path.to_owned(), what });
    }
    if schema > SCHEMA {
        return Err(StoreError::Newer { path: path.to_owned(), found: schema, known: SCHEMA });
    }
    Ok(())
}

/// A new database knows of no session, so whatever the broker holds under our name must be discarded:
/// `clean_start` is set in the transaction that makes it.
fn create(db: &Connection) -> Result<(), rusqlite::Error> {
    let schema = include_str!("store/schema.sql");
    db.execute_batch(&format!(
        "BEGIN IMMEDIATE;
         {schema}
         INSERT INTO meta VALUES (1, 1, 0, '', 0, '');
         INSERT INTO lane VALUES (0, 1, 0, 0), (1, 1, 0, 0), (2, 1, 0, 0);
         INSERT INTO session VALUES (1, '', '', 0, 1, 0);
         PRAGMA application_id = {APPLICATION_ID};
         PRAGMA user_version = {SCHEMA};
         COMMIT;"
    ))
}

/// Counts this start, and notices another boot of the machine or another machine: a copied database takes a
/// new epoch and a clean start, because what its rows say of the broker's session may be long past.
fn start(db: &Connection) -> Result<Boot, rusqlite::Error> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let machine_now = read("/etc/machine-id");
    let kernel_boot_id_now = read("/proc/sys/kernel/random/boot_id");
    db.execute_batch("BEGIN IMMEDIATE")?;
    let (epoch, boot, machine, kernel_boot, kernel_boot_id): (u32, u32, String, u32, String) = db
        .query_row("SELECT epoch, boot, machine, kernel_boot, kernel_boot_id FROM meta", [], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
        })
        .optional()?
        .unwrap_or((1, 0, String::new(), 0, String::new()));
    let copied = !machine.is_empty() && machine != machine_now;
    if copied {
        tracing::warn!(
            "the database comes from another machine: new epoch, the broker's session is discarded"
        );
        db.execute("UPDATE session SET clean_start = 1, canary = 0", [])?;
    }
    let boot = Boot {
        epoch: epoch + u32::from(copied),
        boot: boot + 1,
        kernel_boot: kernel_boot + u32::from(kernel_boot_id != kernel_boot_id_now),
    };
    db.execute(
        "UPDATE meta SET epoch = ?, boot = ?, machine = ?, kernel_boot = ?, kernel_boot_id = ?",
        params![boot.epoch, boot.boot, machine_now, boot.kernel_boot, kernel_boot_id_now],
    )?;
    db.execute_batch("COMMIT")?;
    Ok(boot)
}

fn load(db: &Connection) -> Result<(Outbox, SessionTable, Inbox), rusqlite::Error> {
    let mut outbox = Outbox::load(db)?;
    let session = SessionTable::load(db, &mut outbox)?;
    Ok((outbox, session, Inbox::load(db)?))
}

fn reserve_path(path: &Path) -> PathBuf {
    with_suffix(path, ".reserve")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Keeps the reserve file filled; without it the agent still runs, so a failure is only logged.
fn keep_reserve(path: &Path) {
    let reserve = reserve_path(path);
    let fill = || -> io::Result<()> {
        let file =
            fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&reserve)?;
        if file.metadata()?.len() < RESERVE_BYTES {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES)?;
        }
        Ok(())
    };
    if let Err(error) = fill() {
        tracing::warn!(%error, file = %reserve.display(), "no reserve for a full disk could be kept");
    }
}

fn give_up_reserve(path: &Path) {
    match fs::remove_file(reserve_path(path)) {
        Ok(()) => tracing::warn!("the disk is full: the reserve was given up so that the queue can drain"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(%error, "the reserve could not be given up"),
    }
}

/// A table or column that must be there is not, a number where text must be: the schema page itself is
/// damaged, or a row is.
fn is_schema_damage(source: &rusqlite::Error) -> bool {
    match source {
        rusqlite::Error::SqliteFailure(_, Some(words)) => words.starts_with("no such "),
        rusqlite::Error::SqlInputError { msg, .. } => msg.starts_with("no such "),
        rusqlite::Error::QueryReturnedNoRows
        | rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::FromSqlConversionFailure(..) => true,
        _ => false,
    }
}

fn sqlite_error(path: &Path, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::InUse { path },
        Some(ErrorCode::DiskFull) => StoreError::DiskFull { path },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Damaged { path, what: source.to_string() }
        }
        _ if is_schema_damage(&source) => StoreError::Damaged { path, what: source.to_string() },
        _ => StoreError::Sqlite { path, source },
    }
}
