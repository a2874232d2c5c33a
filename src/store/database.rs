//! The open database: its connection, what memory needs of it, and what a transaction does.
//!
//! Invariant: `synchronous=FULL`, one connection, exclusively ours. An error leaves memory behind the disk; only
//! `store` decides what follows from it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use super::browse::{self, Ask, Found};
use super::budget::{Budget, Used};
use super::inbox::Inbox;
use super::outbox::{self, DiskLow, Limits, Outbox};
use super::session::{self, SessionTable};
use super::{
    Append, Batch, Boot, Committed, Damage, Gap, Look, NotAccepted, PAYLOAD_MAX_BYTES, Settings, Settled,
    StoreError, is_read_only, with_suffix,
};
use crate::clock::{self, Stamp};
use crate::command::{CommandStep, Recorded, Stepped};
use crate::message::{Lane, Message, Qos, Seq};
use crate::turn::{Begin, Change, OnSessionLoss};

/// "fpst": marks our files (`PRAGMA application_id`).
const APPLICATION_ID: i64 = 0x6670_7374;
/// The newest schema this program knows (`PRAGMA user_version`).
const SCHEMA: i64 = 2;
/// What brings an older schema forward, one step each: the first from 1 to 2. A step is never edited once released.
const MIGRATIONS: [&str; SCHEMA as usize - 1] = [include_str!("migrate_2.sql")];
/// Page size in bytes: measured to write least for 200-byte messages.
const PAGE_BYTES: u64 = 1024;
/// The write-ahead log is moved into the database from this many pages on: 1 MiB.
const CHECKPOINT_PAGES: u64 = 1000;
/// What a full queue must still be able to record above the quota: acknowledgements, commands, answers, gaps.
const HEADROOM_BYTES: u64 = 16 << 20;
/// How often the file system is asked for its free space, at most.
const LOOK_AT_DISK_MS: u64 = 1_000;
/// How far answers may go over the quota: a quarter of the headroom.
const ANSWERS_OVER_QUOTA_BYTES: u64 = HEADROOM_BYTES / 4;
/// A database up to this size is checked whole at a start after an unclean stop; a larger one is ready at
/// once, and damage in it is found when it is read.
const CHECK_AT_START_BYTES: u64 = 8 << 20;

type Sql<T> = Result<T, rusqlite::Error>;

/// An open database and what memory needs of it.
#[derive(Debug)]
pub(super) struct Database {
    db: Connection,
    settings: Settings,
    boot: Boot,
    outbox: Outbox,
    session: SessionTable,
    inbox: Inbox,
    disk: FreeDisk,
    budget: Option<Budget>,
}

/// What was last known of the file system's free space.
#[derive(Debug, Clone, Copy, Default)]
struct FreeDisk {
    looked_mono_ms: Option<u64>,
    bytes: u64,
}

/// What memory knows of the queue and the session and the tables do not.
#[derive(Debug)]
pub(super) struct Place {
    outbox: [outbox::Place; 3],
    session: session::Place,
}

impl Database {
    /// Opens the file, checks that it is ours and whole, and counts this start.
    pub(super) fn open(settings: &Settings) -> Result<Self, StoreError> {
        let fail = |source| sqlite_error(&settings.path, source);
        let damaged = |what: &str| StoreError::Damaged { path: settings.path.clone(), what: what.into() };
        let unclean = fs::metadata(with_suffix(&settings.path, "-wal")).is_ok_and(|wal| wal.len() > 0);
        let bytes = fs::metadata(&settings.path).map_or(0, |file| file.len());
        if bytes == 0 && with_suffix(&settings.path, ".reserve").exists() {
            return Err(damaged("it is empty, although there was one before"));
        }
        let db = Database::connect(settings)?;
        if unclean && bytes <= CHECK_AT_START_BYTES {
            let verdict: String =
                db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(fail)?;
            if verdict != "ok" {
                return Err(damaged(&verdict));
            }
        }
        if unclean {
            // After a sync that failed, the system shows what the disk may not have, and no later sync writes it. What
            // is appended to such a log is lost with it; moved into the database, it is written anew.
            match db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
                Err(error) if error.sqlite_error_code() != Some(ErrorCode::DiskFull) => {
                    return Err(fail(error));
                }
                _ => {}
            }
        }
        Database::over(db, settings)
    }

    /// A connection to a database that is ours, made if there is none.
    pub(super) fn connect(settings: &Settings) -> Result<Connection, StoreError> {
        let db = connect(settings).map_err(|source| sqlite_error(&settings.path, source))?;
        check_identity(&db, &settings.path)?;
        Ok(db)
    }

    /// Counts this start and reads what memory needs.
    pub(super) fn over(db: Connection, settings: &Settings) -> Result<Self, StoreError> {
        let fail = |source| unreadable(&settings.path, source);
        let boot = start(&db).map_err(fail)?;
        let (outbox, session, inbox) = load(&db, settings).map_err(fail)?;
        let disk = FreeDisk::default();
        let budget = load_budget(&db, settings).map_err(fail)?;
        Ok(Database { db, settings: settings.clone(), boot, outbox, session, inbox, disk, budget })
    }

    /// Opens a database without counting a start; see [`super::Store::visit`].
    pub(super) fn visit(settings: &Settings) -> Result<Self, StoreError> {
        let path = &settings.path;
        let fail = |source| unreadable(path, source);
        let db = connect(settings).map_err(fail)?;
        let pragma = |name: &str| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0)).map_err(fail);
        let (application, schema) = (pragma("application_id")?, pragma("user_version")?);
        match schema {
            _ if application != APPLICATION_ID => {
                let what = "it belongs to another program, or is empty".to_owned();
                return Err(StoreError::Damaged { path: path.clone(), what });
            }
            SCHEMA => {}
            ..SCHEMA => return Err(StoreError::Older { path: path.clone(), found: schema, known: SCHEMA }),
            _ => return Err(StoreError::Newer { path: path.clone(), found: schema, known: SCHEMA }),
        }
        let boot = visited(&db).map_err(fail)?;
        let (outbox, session, inbox) = load(&db, settings).map_err(fail)?;
        let disk = FreeDisk::default();
        // Nothing is sent and nothing counted.
        Ok(Database { db, settings: settings.clone(), boot, outbox, session, inbox, disk, budget: None })
    }

    /// See [`super::Store::browse`].
    pub(super) fn browse(&self, ask: &Ask, now: Stamp) -> Sql<Found> {
        match ask {
            Ask::Messages { lane, from, limit, payloads } => {
                browse::messages(&self.db, &self.outbox, (*lane, *from, *limit, *payloads), now)
            }
            Ask::DeadLetters { after, limit } => browse::dead_letters(&self.db, *after, *limit),
            Ask::Requeue(_) | Ask::PurgeLane { .. } | Ask::PurgeDead => {
                Ok(Found::Refused("a change needs a transaction".to_owned()))
            }
        }
    }

    /// The same for what changes something.
    pub(super) fn change(&mut self, ask: &Ask, now: Stamp) -> Sql<Found> {
        let found = match ask {
            Ask::Requeue(number) => self.requeue(*number, now)?,
            Ask::PurgeLane { lane, below } => browse::purge(&self.db, &mut self.outbox, *lane, *below)?,
            Ask::PurgeDead => {
                let count = self.db.execute("DELETE FROM dead_letter", [])? as u64;
                Found::Changed { count, below: None }
            }
            Ask::Messages { .. } | Ask::DeadLetters { .. } => self.browse(ask, now)?,
        };
        self.outbox.write_changes(&self.db)?;
        Ok(found)
    }

    /// One dead letter becomes a message with a new number, in the transaction that removes it.
    fn requeue(&mut self, number: u64, now: Stamp) -> Sql<Found> {
        let Some(message) = browse::dead_message(&self.db, number, now)? else {
            return Ok(Found::Changed { count: 0, below: None });
        };
        let Some(message) = message else {
            return Ok(Found::Refused(format!(
                "dead letter {number} is damaged; only `queue purge --dead` is left"
            )));
        };
        let append = Append { messages: vec![message], closes: Vec::new() };
        if let Err(refusal) = self.accept(append, now)? {
            return Ok(Found::Refused(format!("dead letter {number} stays one: {refusal}")));
        }
        self.db.execute("DELETE FROM dead_letter WHERE number = ?", [number])?;
        Ok(Found::Changed { count: 1, below: None })
    }

    pub(super) fn boot(&self) -> &Boot {
        &self.boot
    }

    pub(super) fn pragma(&self, name: &str) -> Sql<i64> {
        self.db.pragma_query_value(None, name, |row| row.get(0))
    }

    pub(super) fn waiting(&self, now: Stamp) -> (bool, Option<u64>) {
        let held_back = self.held_back(now);
        let look_again = self.budget.as_ref().and_then(|budget| budget.look_again_at(now));
        let look_again = look_again.filter(|_| self.outbox.has_any_of(held_back));
        let release = self.outbox.next_release(now, held_back);
        (self.outbox.has_waiting(now, held_back), release.into_iter().chain(look_again).min())
    }

    /// See [`super::Store::count_link_bytes`].
    pub(super) fn count_link_bytes(&mut self, bytes: u64, now: Stamp) {
        let Some(budget) = &mut self.budget else { return };
        if let Some(percent) = budget.count(bytes, now) {
            let look = budget.look(now);
            let held_back: Vec<&str> = look.held_back.iter().map(|lane| lane.name()).collect();
            let held_back = (!held_back.is_empty()).then(|| held_back.join(", "));
            tracing::warn!(
                used = look.used_bytes,
                budget = look.bytes,
                held_back,
                "{percent} % of the byte budget of this {} are used",
                look.per.name()
            );
        }
    }

    /// The lanes that wait for the next budget.
    fn held_back(&self, now: Stamp) -> [bool; 3] {
        self.budget.as_ref().map_or([false; 3], |budget| budget.held_back(now))
    }

    fn write_budget(&self, used: Option<Used>) -> Sql<()> {
        let (Some(Used { period, bytes, ran_ms }), Some(budget)) = (used, self.settings.budget) else {
            return Ok(());
        };
        self.db
            .prepare_cached("INSERT OR REPLACE INTO budget VALUES (1, ?, ?, ?, ?)")?
            .execute(params![budget.per.name(), period, bytes, ran_ms])
            .map(drop)
    }

    /// Moves the write-ahead log into the database and begins it anew, its file as large as it is.
    pub(super) fn keep_log_space(&self) -> Sql<()> {
        self.db.execute_batch("PRAGMA wal_checkpoint(RESTART)")
    }

    /// Moves the write-ahead log into the database and closes it.
    pub(super) fn close(mut self) -> Sql<()> {
        let used = self.budget.as_mut().map(Budget::take_all);
        self.write_budget(used)?;
        close(self.db)
    }

    /// What a salvage that an earlier run could not finish has brought.
    pub(super) fn salvaged(&self, aside: PathBuf) -> Sql<Damage> {
        let lost = "SELECT coalesce(sum(count), 0) FROM dropped WHERE reason = 'damaged'";
        Ok(Damage {
            what: "found earlier; its salvage was interrupted and is now complete".into(),
            aside,
            salvaged: self.outbox.messages(),
            lost: self.db.query_row(lost, [], |row| row.get(0))?,
            possibly_doubled: 0,
        })
    }

    pub(super) fn transaction<T>(&mut self, work: impl FnOnce(&mut Self) -> Sql<T>) -> Sql<T> {
        self.db.execute_batch("BEGIN IMMEDIATE")?;
        let done = work(self)?;
        let used = self.budget.as_mut().and_then(Budget::take_due);
        self.write_budget(used)?;
        if !self.settings.faults.commit_stall.is_zero() {
            std::thread::sleep(self.settings.faults.commit_stall);
        }
        self.db.execute_batch("COMMIT")?;
        Ok(done)
    }

    /// Ends a failed transaction and reads again what memory had changed.
    pub(super) fn reload(&mut self) -> Sql<()> {
        if !self.db.is_autocommit() {
            self.db.execute_batch("ROLLBACK")?;
        }
        let pace = self.outbox.pace();
        let newest = self.inbox.newest();
        let (outbox, session, inbox) = load(&self.db, &self.settings)?;
        (self.outbox, self.session, self.inbox) = (outbox, session.continued(&self.session), inbox);
        (self.boot.epoch, self.boot.boot) =
            self.db.query_row("SELECT epoch, boot FROM meta", [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        self.inbox.go_on_above(newest);
        self.outbox.keep_pace(pace);
        self.budget.iter_mut().for_each(Budget::distrust_saved);
        Ok(())
    }

    /// What only memory knows: see [`Database::restore`].
    pub(super) fn place(&self) -> Place {
        Place { outbox: self.outbox.place(), session: self.session.place() }
    }

    /// After [`Database::reload`]: what the session holds is still in its hands, as before the transaction that
    /// failed.
    pub(super) fn restore(&mut self, place: Place) {
        self.outbox.restore(place.outbox);
        self.session.restore(place.session);
    }

    /// See [`super::Store::begin`].
    pub(super) fn begin(
        &mut self,
        owner: (&str, &str),
        policy: OnSessionLoss,
        unacked: &[(Lane, Seq)],
        now: Stamp,
    ) -> Sql<Begin> {
        self.outbox.all_is_backlog();
        self.session.begin(&self.db, owner, policy)?;
        let begin = self.session.resume(&self.db, &mut self.outbox, unacked, &self.boot, now)?;
        self.outbox.write_changes(&self.db)?;
        Ok(begin)
    }

    /// See [`super::Store::keep_owners`].
    pub(super) fn keep_owners(&mut self, owners: &[(String, String)], policy: OnSessionLoss) -> Sql<Settled> {
        let mut settled = Settled::default();
        self.session.keep_owners(&self.db, &mut self.outbox, owners, policy, &mut settled)?;
        self.outbox.write_changes(&self.db)?;
        Ok(settled)
    }

    /// See [`super::Store::change`]. Memory has the new settings also when this fails.
    pub(super) fn change_settings(&mut self, settings: &Settings) -> Sql<()> {
        let used = self.budget.as_mut().map(Budget::take_all);
        let written = self.write_budget(used);
        self.settings = settings.clone();
        self.outbox.change(settings);
        let budget = written.and_then(|()| load_budget(&self.db, settings));
        // What could not be written down is forgotten, as by a crash.
        self.budget = match &budget {
            Ok(budget) => budget.clone(),
            Err(_) => settings.budget.map(|budget| Budget::new(budget, None)),
        };
        // A database that is larger already keeps its size, and what is dropped makes room in it.
        self.db.execute_batch(&format!("PRAGMA max_page_count = {}", pages_max(settings)))?;
        budget.map(drop)
    }

    /// See [`super::Store::disown`].
    pub(super) fn disown(&mut self, epoch: u32, boot: u32, policy: OnSessionLoss) -> Sql<Settled> {
        let mut settled = Settled::default();
        self.session.disown(&self.db, &mut self.outbox, policy, &mut settled)?;
        self.db.execute("UPDATE meta SET epoch = ?, boot = ?", params![epoch, boot])?;
        self.outbox.write_changes(&self.db)?;
        (self.boot.epoch, self.boot.boot) = (epoch, boot);
        Ok(settled)
    }

    /// See [`super::Store::check_next`].
    pub(super) fn read_through(&self, from: i64) -> Sql<Option<i64>> {
        Outbox::read_through(&self.db, from)
    }

    /// The number of the newest recorded command.
    pub(super) fn newest_command(&self) -> u64 {
        self.inbox.newest()
    }

    /// Commands are numbered above this from now on: the agent has seen it.
    pub(super) fn number_commands_above(&mut self, newest: u64) {
        self.inbox.go_on_above(newest);
    }

    /// See [`super::Store::recorded`].
    pub(super) fn recorded(&self, after: u64, count: usize, now: Stamp) -> Sql<Vec<Recorded>> {
        Inbox::take(&self.db, after, count, &self.boot, now)
    }

    /// See [`super::Store::interrupted`].
    pub(super) fn interrupted(&self, now: Stamp) -> Sql<Vec<Recorded>> {
        Inbox::interrupted(&self.db, &self.boot, now)
    }

    /// Everything one transaction does: these appends, and what else the batch asks for.
    pub(super) fn apply(&mut self, appends: Vec<Append>, rest: &Batch, now: Stamp) -> Sql<Committed> {
        let mut committed = Committed::default();
        let when = (&self.boot, now);
        for change in &rest.changes {
            let recorded = match change {
                Change::Inbound { inbound, .. } | Change::InboundOpened { inbound, .. } => {
                    self.inbox.record(&self.db, inbound, &self.boot, now)?
                }
                _ => true,
            };
            match change {
                Change::InboundOpened { id, .. } if !recorded => committed.refused.push(*id),
                Change::Inbound { id, .. } if !recorded => committed.refused.extend(*id),
                _ => {
                    self.session.settle(&self.db, &mut self.outbox, change, &mut committed.settled, when)?;
                }
            }
        }
        self.outbox.drop_aged(&self.db, &self.boot, now)?;
        if rest.offer.is_some() {
            self.outbox.go_live(&self.db)?;
            self.outbox.hold_back(self.held_back(now));
        }
        for step in &rest.steps {
            let stepped = self.step(step.clone(), now)?;
            committed.steps.push(stepped);
        }
        committed.appends = self.accept_all(appends, now)?;
        if let Some(offer) = &rest.offer {
            committed.taken = self.session.take(&self.db, &mut self.outbox, offer, (&self.boot, now))?;
            self.outbox.check_ends()?;
            committed.unretained = self.outbox.take_unretained();
        }
        self.outbox.write_changes(&self.db)?;
        Ok(committed)
    }

    fn step(&mut self, step: CommandStep, now: Stamp) -> Sql<Stepped> {
        let room = self.settings.quota + ANSWERS_OVER_QUOTA_BYTES;
        self.inbox.step(&self.db, &mut self.outbox, step, room, (&self.boot, now))
    }

    /// Appends that can share segments do: a segment of many messages is smaller on the disk and sooner read than
    /// many segments. For what has to make room only its own lane's neighbours count, because an alarm may push out
    /// what others may not.
    fn accept_all(&mut self, appends: Vec<Append>, now: Stamp) -> Sql<Vec<Result<(), NotAccepted>>> {
        if appends.is_empty() {
            return Ok(Vec::new());
        }
        let limits = self.limits(now)?;
        let all_fit = self.outbox.has_room(messages(&appends), &limits);
        let mut outcomes = Vec::with_capacity(appends.len());
        let mut run: Vec<Append> = Vec::new();
        for append in appends {
            let joins = |last: &Append| {
                is_plain(last)
                    && is_plain(&append)
                    && (all_fit || only_lane(last).is_some_and(|lane| only_lane(&append) == Some(lane)))
            };
            if !run.last().is_some_and(joins) {
                outcomes.extend(self.accept_run(std::mem::take(&mut run), now)?);
            }
            run.push(append);
        }
        outcomes.extend(self.accept_run(run, now)?);
        Ok(outcomes)
    }

    /// All of them together, or else each for itself.
    fn accept_run(&mut self, run: Vec<Append>, now: Stamp) -> Sql<Vec<Result<(), NotAccepted>>> {
        if run.len() > 1 {
            let limits = self.limits(now)?;
            if self.outbox.make_room(&self.db, messages(&run), &limits)?.is_ok() {
                let accepted = vec![Ok(()); run.len()];
                let messages = run.into_iter().flat_map(|append| append.messages).collect();
                self.outbox.append(&self.db, messages, &self.boot, now)?;
                return Ok(accepted);
            }
        }
        run.into_iter().map(|append| self.accept(append, now)).collect()
    }

    fn accept(&mut self, append: Append, now: Stamp) -> Sql<Result<(), NotAccepted>> {
        if let Some(refusal) = never_acceptable(&append) {
            return Ok(Err(refusal));
        }
        if append.closes.is_empty() {
            let limits = self.limits(now)?;
            if let Err(refusal) = self.outbox.make_room(&self.db, append.messages.iter(), &limits)? {
                return Ok(Err(refusal));
            }
        }
        for gap in &append.closes {
            self.close_gap(gap)?;
        }
        self.outbox.append(&self.db, append.messages, &self.boot, now)?;
        Ok(Ok(()))
    }

    /// What the queue may hold now.
    fn limits(&mut self, now: Stamp) -> Sql<Limits> {
        self.look_at_disk(now);
        self.known_limits()
    }

    /// The same, by what is known of the disk.
    fn known_limits(&self) -> Sql<Limits> {
        let Settings { quota, when_full, min_free_disk: wanted, .. } = self.settings;
        let free = self.disk.looked_mono_ms.map(|_| self.disk.bytes);
        let disk_low = match free.filter(|free| *free < wanted) {
            None => None,
            Some(free) => {
                let spare = self.pragma("freelist_count")?.max(0) as u64 * PAGE_BYTES;
                Some(DiskLow { room: self.outbox.bytes() + spare / 4 * 3, free, wanted })
            }
        };
        Ok(Limits { quota, disk_low, when_full })
    }

    /// Asks for the free bytes of the file system, unless nobody wants a minimum or the answer is younger than
    /// [`LOOK_AT_DISK_MS`]. Where the system does not know, nothing is known.
    pub(super) fn look_at_disk(&mut self, now: Stamp) {
        let is_fresh = |looked: u64| now.mono_ms.saturating_sub(looked) < LOOK_AT_DISK_MS;
        if self.settings.min_free_disk == 0 || self.disk.looked_mono_ms.is_some_and(is_fresh) {
            return;
        }
        let bytes = free_bytes(&self.settings.path);
        self.disk = FreeDisk { looked_mono_ms: bytes.map(|_| now.mono_ms), bytes: bytes.unwrap_or(0) };
    }

    /// What was dropped since the gap was looked at stays open.
    fn close_gap(&self, gap: &Gap) -> Sql<()> {
        let (lane, reason) = (gap.lane as i64, &gap.reason);
        self.db.execute(
            "UPDATE gap SET count = count - ?3, first_seq = max(first_seq, ?4) WHERE lane = ?1 AND reason = ?2",
            params![lane, reason, gap.count, gap.last.0 + 1],
        )?;
        self.db.execute("DELETE FROM gap WHERE count <= 0", []).map(drop)
    }

    /// What screens show.
    pub(super) fn look(&self, now: Stamp) -> Sql<Look> {
        let lane = |number: i64| Lane::ALL[number.clamp(0, 2) as usize];
        let mut dropped = self.db.prepare_cached("SELECT lane, reason, count FROM dropped")?;
        let mut gaps = self.db.prepare_cached("SELECT lane, reason, first_seq, last_seq, count FROM gap")?;
        Ok(Look {
            lanes: self.outbox.depth(&self.db, &self.boot, self.settings.quota, now)?,
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
            refusing: self.outbox.refusing(&self.known_limits()?),
            used_bytes: self.outbox.bytes(),
            quota: self.settings.quota,
            free_disk: free_bytes(&self.settings.path),
            database_bytes: 0,
            log_bytes: 0,
            budget: self.budget.as_ref().map(|budget| budget.look(now)),
            boot: self.boot.clone(),
            damage: None,
            trouble: None,
        })
    }
}

/// Free bytes of the file system that holds this, for users without privileges.
fn free_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Moves the write-ahead log into the database and closes it.
pub(super) fn close(db: Connection) -> Sql<()> {
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?;
    db.close().map_err(|(_, error)| error)
}

fn connect(settings: &Settings) -> Result<Connection, rusqlite::Error> {
    let db = Connection::open(&settings.path)?;
    db.set_prepared_statement_cache_capacity(64);
    // An agent that is just stopping may still hold the file.
    db.busy_timeout(Duration::from_secs(1))?;
    let page_bytes = settings.faults.page_bytes.unwrap_or(PAGE_BYTES);
    let checkpoint_pages = settings.faults.checkpoint_pages.unwrap_or(CHECKPOINT_PAGES);
    let synchronous = settings.faults.synchronous.unwrap_or("FULL");
    let pages_max = pages_max(settings);
    db.execute_batch(&format!(
        "PRAGMA page_size = {page_bytes};
         PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA synchronous = {synchronous};
         PRAGMA wal_autocheckpoint = {checkpoint_pages};
         PRAGMA journal_size_limit = {};
         PRAGMA max_page_count = {pages_max};
         PRAGMA cache_size = -2000;
         PRAGMA temp_store = MEMORY;",
        4 * checkpoint_pages * page_bytes
    ))?;
    // Read to its end: SQLite says "wal" before it has written that down, and an error of that comes only afterwards.
    // In any other mode FULL is less, and a power cut takes the last commits.
    let mut change = db.prepare("PRAGMA journal_mode = WAL")?;
    let modes = change.query_map([], |row| row.get::<_, String>(0))?.collect::<Result<Vec<_>, _>>()?;
    drop(change);
    if modes != ["wal"] {
        let failed = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_IOERR);
        let words = format!("its journal mode stays {modes:?} and cannot be changed to \"wal\"");
        return Err(rusqlite::Error::SqliteFailure(failed, Some(words)));
    }
    Ok(db)
}

fn pages_max(settings: &Settings) -> u64 {
    (settings.quota + settings.quota / 4 + HEADROOM_BYTES) / settings.faults.page_bytes.unwrap_or(PAGE_BYTES)
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
    for (from, step) in (1..).zip(MIGRATIONS).skip_while(|(from, _)| *from < schema) {
        let to = from + 1;
        let step = format!("BEGIN IMMEDIATE; {step}; PRAGMA user_version = {to}; COMMIT;");
        db.execute_batch(&step).map_err(fail)?;
        tracing::info!(from, to, "the database was brought to a newer schema");
    }
    Ok(())
}

/// A new database knows of no session, so whatever a broker holds under our name must be discarded: an owner that is
/// not in the table begins clean.
fn create(db: &Connection) -> Result<(), rusqlite::Error> {
    let schema = include_str!("schema.sql");
    db.execute_batch(&format!(
        "BEGIN IMMEDIATE;
         {schema}
         INSERT INTO meta VALUES (1, 1, 0, '', 0, '');
         INSERT INTO lane VALUES (0, 1, 0, 0), (1, 1, 0, 0), (2, 1, 0, 0);
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
    let kernel_boot_id_now = clock::boot_id();
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

/// As [`start`] sees it, without writing anything down.
fn visited(db: &Connection) -> Result<Boot, rusqlite::Error> {
    let now = clock::boot_id();
    db.query_row("SELECT epoch, boot, kernel_boot, kernel_boot_id FROM meta", [], |row| {
        let another = row.get::<_, String>(3)? != now;
        let kernel_boot = row.get::<_, u32>(2)? + u32::from(another);
        Ok(Boot { epoch: row.get(0)?, boot: row.get(1)?, kernel_boot })
    })
}

fn load(db: &Connection, settings: &Settings) -> Result<(Outbox, SessionTable, Inbox), rusqlite::Error> {
    let mut outbox = Outbox::load(db, settings)?;
    let session = SessionTable::load(db, &mut outbox)?;
    Ok((outbox, session, Inbox::load(db)?))
}

/// What was used of another kind of period counts in this one.
fn load_budget(db: &Connection, settings: &Settings) -> Result<Option<Budget>, rusqlite::Error> {
    let Some(budget) = settings.budget else { return Ok(None) };
    let saved = db
        .query_row("SELECT per, period, used, ran_ms FROM budget", [], |row| {
            let same = row.get::<_, String>(0)? == budget.per.name();
            let period = row.get::<_, Option<i64>>(1)?.filter(|_| same);
            Ok(Used { period, bytes: row.get(2)?, ran_ms: row.get(3)? })
        })
        .optional()?;
    Ok(Some(Budget::new(budget, saved)))
}

/// At an opening, a row that must be there and is not is damage too.
fn unreadable(path: &Path, source: rusqlite::Error) -> StoreError {
    match source {
        rusqlite::Error::QueryReturnedNoRows => {
            StoreError::Damaged { path: path.to_owned(), what: "a row that is always there is not".into() }
        }
        source => sqlite_error(path, source),
    }
}

/// Reading, writing or syncing failed: what the system's cache holds may not be what the disk holds.
pub(super) fn is_io_failure(source: &rusqlite::Error) -> bool {
    matches!(
        source.sqlite_error_code(),
        Some(ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::ReadOnly)
    )
}

pub(super) fn sqlite_error(path: &Path, source: rusqlite::Error) -> StoreError {
    let path = path.to_owned();
    match source.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::InUse { path },
        Some(ErrorCode::DiskFull) => StoreError::DiskFull { path },
        _ if is_io_failure(&source) && is_read_only(&path) => StoreError::ReadOnly { path },
        _ if is_io_failure(&source) => StoreError::Io { path, source },
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
            StoreError::Damaged { path, what: source.to_string() }
        }
        _ if cannot_be_ours(&source) => StoreError::Damaged { path, what: source.to_string() },
        _ => StoreError::Sqlite { path, source },
    }
}

/// A table that must be there is not, or a column holds what we never wrote.
fn cannot_be_ours(source: &rusqlite::Error) -> bool {
    match source {
        rusqlite::Error::SqliteFailure(_, Some(words)) => words.starts_with("no such "),
        rusqlite::Error::SqlInputError { msg, .. } => msg.starts_with("no such "),
        rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        | rusqlite::Error::FromSqlConversionFailure(..) => true,
        _ => false,
    }
}

fn messages(appends: &[Append]) -> impl Iterator<Item = &Message> + Clone {
    appends.iter().flat_map(|append| &append.messages)
}

/// Nothing but messages that may be stored.
fn is_plain(append: &Append) -> bool {
    append.closes.is_empty() && never_acceptable(append).is_none()
}

/// The lane of all its messages.
fn only_lane(append: &Append) -> Option<Lane> {
    let lane = append.messages.first()?.lane;
    append.messages.iter().all(|message| message.lane == lane).then_some(lane)
}

fn never_acceptable(append: &Append) -> Option<NotAccepted> {
    let sizes = append.messages.iter().map(|message| message.payload.len_max());
    match sizes.max() {
        Some(bytes) if bytes > PAYLOAD_MAX_BYTES => {
            Some(NotAccepted::TooLarge { bytes, max: PAYLOAD_MAX_BYTES })
        }
        _ => {
            append.messages.iter().any(|message| message.qos == Qos::AtMostOnce).then_some(NotAccepted::Qos0)
        }
    }
}
