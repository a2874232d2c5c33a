//! The outbox database: one connection on one thread, group commit.
//!
//! [`Store`] is synchronous and knows no runtime: open, commit a [`Batch`], look. [`spawn`] puts it on a
//! thread of its own and gives out [`Handle`]s.
//!
//! Invariants: `synchronous=FULL`, always; nobody is told anything before COMMIT has returned; a failed
//! commit is a crash: everything in memory is thrown away and read from disk again; never a fall-back to
//! memory.

pub mod browse;
mod budget;
mod database;
mod inbox;
mod log;
mod outbox;
mod pace;
mod salvage;
pub mod segment;
mod session;
mod thread;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{self, Stamp};
use crate::command::{CommandStep, Recorded, Stepped};
use crate::message::{Lane, Message, PacketId, Seq};
use crate::progress::Pulse;
use crate::turn::{Begin, Change, Offer, OnSessionLoss, Taken};
use database::{Database, sqlite_error};
use log::Log;

pub use budget::{BudgetLook, Period as BudgetPeriod, Settings as BudgetSettings};
pub use inbox::KNOWN_MAX;
pub use outbox::{LaneDepth, Unretained};
pub use salvage::Damage;
pub use session::Settled;
pub use thread::{Accepted, HandedIn, Handle, NotAccepted, Turn, Turned, spawn};

/// A file kept full of nothing, given up when the disk is full: even DELETE needs space.
const RESERVE_BYTES: u64 = 4 << 20;
/// How often a full disk is asked for space, in ms.
const LOOK_FOR_SPACE_MS: u64 = 1_000;
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

/// What one lane may hold. By default as much as the quota allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LaneLimits {
    /// Bytes of its messages.
    pub max_bytes: Option<u64>,
    /// Messages, in flight included.
    pub max_messages: Option<u64>,
    /// How long a message may wait. By the monotonic clock within one boot, and across boots by the wall clock
    /// where it is believable, otherwise at least as long as the machine has been up.
    pub max_age: Option<Duration>,
    /// Who loses when a limit of the lane or the quota is reached, if not as [`Settings::when_full`] says.
    pub when_full: Option<WhenFull>,
}

/// In which order a backlog is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplayOrder {
    /// Each lane in the order of acceptance. The default.
    #[default]
    InOrder,
    /// What is accepted while connected first, and the backlog after it.
    LiveFirst,
}

/// How a backlog is sent: what was accepted before the connection began to take messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replay {
    /// Before or after what is accepted since.
    pub order: ReplayOrder,
    /// Messages of the backlog in a second; `None`: as many as the broker takes.
    pub max_messages_per_second: Option<u64>,
    /// Bytes of the backlog's PUBLISH packets in a second.
    pub max_bytes_per_second: Option<u64>,
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
    /// What each lane may hold, in the order of [`Lane::ALL`].
    pub lanes: [LaneLimits; 3],
    /// Free bytes of the file system below which the database grows no more, as if the quota were reached; 0: none.
    pub min_free_disk: u64,
    /// How a backlog is sent.
    pub replay: Replay,
    /// For a link that is paid for by the byte.
    pub budget: Option<BudgetSettings>,
    /// Longest wait of a message for others to share its commit with, in the order of [`Lane::ALL`].
    pub commit_interval: [Duration; 3],
    /// Where the store says that it makes progress.
    pub pulse: Pulse,
    /// Negative controls of tests: what a commit must survive. Production leaves it at its default.
    pub faults: Faults,
}

impl Settings {
    /// For a database at `path`, without limits but a quota of 512 MiB, and without waiting for others to share a
    /// commit with.
    pub fn new(path: PathBuf) -> Self {
        Settings {
            path,
            quota: 512 << 20,
            when_full: WhenFull::DropOldest,
            lanes: [LaneLimits::default(); 3],
            min_free_disk: 0,
            replay: Replay::default(),
            budget: None,
            commit_interval: [Duration::ZERO; 3],
            pulse: Pulse::default(),
            faults: Faults::default(),
        }
    }
}

/// Switches for tests that must fail when a promise is broken.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// How long each COMMIT is held back.
    pub commit_stall: Duration,
    /// Another `PRAGMA synchronous` than FULL.
    pub synchronous: Option<&'static str>,
    /// Another page size for a new database than the one that wears flash least, in bytes.
    pub page_bytes: Option<u64>,
    /// Another number of pages from which on the log is moved into the database.
    pub checkpoint_pages: Option<u64>,
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
    /// The file was written by an older fieldpost, whose schema the agent has not brought forward yet.
    #[error(
        "{path} has schema {found}, this program reads {known}; start the agent once, which brings it forward"
    )]
    Older {
        /// The database file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// Ours.
        known: i64,
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
    /// The file system takes no writes.
    #[error(
        "the file system that holds {path} is read-only: nothing can be stored until it can be written again; \
         a card that fails often ends so, look at `dmesg`"
    )]
    ReadOnly {
        /// The database file.
        path: PathBuf,
    },
    /// It could not be opened again after a failure.
    #[error("the database {path} cannot be opened again since it failed: {why}")]
    Gone {
        /// The database file.
        path: PathBuf,
        /// The failure.
        why: String,
    },
    /// Reading, writing or syncing failed.
    #[error(
        "the disk that holds {path} fails: {source}; look at `dmesg` (a card may be dying) and at limits on file \
         sizes (`ulimit -f`)"
    )]
    Io {
        /// The database file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
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
    /// boot, by the wall clock across boots where it was right both times, otherwise unknown.
    pub(crate) fn elapsed_ms(&self, kernel_boot: u32, then: Stamp, now: Stamp) -> Option<u64> {
        if kernel_boot == self.kernel_boot {
            return Some(now.ms_since(then));
        }
        let right = then.wall_is_right() && now.wall_is_right();
        right.then(|| now.wall_ms.saturating_sub(then.wall_ms).max(0) as u64)
    }

    /// The same, where only the machine's up time is known of the wait: at least so long.
    pub(crate) fn waited(&self, kernel_boot: u32, then: Stamp, now: Stamp) -> Duration {
        Duration::from_millis(self.elapsed_ms(kernel_boot, then, now).unwrap_or(now.mono_ms))
    }
}

/// What limits or damage took and no gap record has told yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The lane.
    pub lane: Lane,
    /// The setting that did it (`quota`, `max_messages`, `max_bytes`, `max_age`, `min_free_disk`), or `expired`,
    /// `damaged`, `dead_letter`, `abandoned` or `purged`.
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
    /// What becomes of commands.
    pub steps: Vec<CommandStep>,
    /// What the session can take.
    pub offer: Option<Offer>,
}

/// What a committed transaction did.
#[derive(Debug, Default)]
pub struct Committed {
    /// For each append, whether it was accepted.
    pub appends: Vec<Result<(), NotAccepted>>,
    /// What each step amounted to.
    pub steps: Vec<Stepped>,
    /// Messages handed to the session.
    pub taken: Vec<Taken>,
    /// Inbound identifiers whose message was refused because the inbox is full.
    pub refused: Vec<PacketId>,
    /// What the changes amounted to.
    pub settled: Settled,
    /// Messages handed out without their retain flag.
    pub unretained: Unretained,
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
    /// Why a small message of a lane would be refused as things are, in the order of [`Lane::ALL`].
    pub refusing: [Option<NotAccepted>; 3],
    /// Bytes of message segments, against the quota.
    pub used_bytes: u64,
    /// The quota.
    pub quota: u64,
    /// Free bytes of its file system; `None` where the system does not know.
    pub free_disk: Option<u64>,
    /// Bytes of the database file.
    pub database_bytes: u64,
    /// Bytes of its write-ahead log.
    pub log_bytes: u64,
    /// The byte budget, if there is one.
    pub budget: Option<BudgetLook>,
    /// Which start this is.
    pub boot: Boot,
    /// The last damage found since the start.
    pub damage: Option<Damage>,
    /// Why the last commit failed, while no other has succeeded: nothing is accepted.
    pub trouble: Option<String>,
}

/// The database, exclusively ours.
#[derive(Debug)]
pub struct Store {
    settings: Settings,
    /// `None` after a failure that left nothing to work with; every later commit tries to open it again.
    database: Option<Database>,
    boot: Boot,
    damage: Option<Damage>,
    trouble: Option<String>,
    /// Outlives a database that is replaced: numbers must not repeat in one run.
    newest_command: u64,
    /// The reserve was given up: nothing is accepted until it can be made again, so that what the session does
    /// has the space. Holds when that was last tried (monotonic ms).
    disk_full: Option<u64>,
    /// Where the check behind the start goes on; `None` when it is done.
    check_from: Option<i64>,
    log: Log,
}

impl Store {
    /// Opens the database, making it if it is missing, and counts this start. One that is damaged or another
    /// program's is set aside, and what is readable of ours carried over.
    ///
    /// # Errors
    /// [`StoreError`]; the file is not touched when it is newer or in use.
    pub fn open(settings: Settings) -> Result<Self, StoreError> {
        let mut log = Log::default();
        let opened = match open_or_start_over(&settings) {
            Err(StoreError::DiskFull { .. }) => {
                give_up_reserve(&settings.path, &mut log);
                open_or_start_over(&settings)
            }
            opened => opened,
        };
        let (database, damage) = opened?;
        let boot = database.boot().clone();
        let newest_command = database.newest_command();
        let mut store = Store {
            settings,
            database: Some(database),
            boot,
            damage,
            trouble: None,
            newest_command,
            disk_full: None,
            check_from: Some(0),
            log,
        };
        if !store.keep_reserve() {
            store.disk_is_full();
        }
        Ok(store)
    }

    /// Opens the database of an agent that is not running, to look at the queue or to do what people ask. No start
    /// is counted, nothing is made, set aside or brought to another schema.
    ///
    /// # Errors
    /// [`StoreError`]: it is not there, in use, damaged, or of another schema.
    pub fn visit(settings: Settings) -> Result<Self, StoreError> {
        fs::metadata(&settings.path)
            .map_err(|source| StoreError::Open { path: settings.path.clone(), source })?;
        let database = Database::visit(&settings)?;
        let boot = database.boot().clone();
        let database = Some(database);
        Ok(Store {
            settings,
            database,
            boot,
            damage: None,
            trouble: None,
            newest_command: 0,
            disk_full: None,
            check_from: None,
            log: Log::default(),
        })
    }

    /// What people ask of the queue.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn browse(&mut self, ask: &browse::Ask, now: Stamp) -> Result<browse::Found, StoreError> {
        if ask.changes() {
            return self.transaction(|database| database.change(ask, now));
        }
        let database = self.database.as_ref().ok_or_else(|| self.gone())?;
        database.browse(ask, now).map_err(|source| sqlite_error(&self.settings.path, source))
    }

    /// Which start this is.
    pub fn boot(&self) -> &Boot {
        &self.boot
    }

    /// Does everything in one transaction; when this returns, it is on the disk. On a full disk the appends alone
    /// are refused, and the session goes on: what it finishes makes room.
    ///
    /// # Errors
    /// Nothing was done; everything in memory has been read from disk again.
    pub fn commit(&mut self, batch: Batch, now: Stamp) -> Result<Committed, StoreError> {
        let mut rest = batch;
        let appends = std::mem::take(&mut rest.appends);
        let asked = appends.len();
        self.look_for_space(now);
        if self.disk_full.is_none() {
            let before = self.database.as_ref().map(|database| (database.boot().clone(), database.place()));
            let committed = self.transaction(|database| database.apply(appends, &rest, now));
            if !matches!(committed, Err(StoreError::DiskFull { .. })) {
                return committed;
            }
            // Opening it again counts a start; then it is not the same place any more.
            match (&mut self.database, before) {
                (Some(database), Some((boot, place))) if *database.boot() == boot => database.restore(place),
                _ => return committed,
            }
        }
        let mut committed = match rest.changes.is_empty() && rest.steps.is_empty() && rest.offer.is_none() {
            true => Committed::default(),
            false => self.transaction(|database| database.apply(Vec::new(), &rest, now))?,
        };
        let full = Arc::new(StoreError::DiskFull { path: self.settings.path.clone() });
        committed.appends = vec![Err(NotAccepted::Failed(full)); asked];
        Ok(committed)
    }

    /// On a full disk, once a second: whether there is space for the reserve again, and so for messages.
    pub fn look_for_space(&mut self, now: Stamp) {
        let Some(looked_ms) = self.disk_full else { return };
        if now.mono_ms.saturating_sub(looked_ms) < LOOK_FOR_SPACE_MS {
            return;
        }
        self.disk_full = Some(now.mono_ms);
        if self.keep_reserve() {
            self.disk_full = None;
            self.trouble = None;
            self.log.has_space();
        }
    }

    /// Keeps the reserve file filled. `false`: there is no space for it. Where the file system cannot keep space for a
    /// file, the agent runs without, so that is only logged.
    fn keep_reserve(&mut self) -> bool {
        let reserve = reserve_path(&self.settings.path);
        match fill(&reserve) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => false,
            Err(error) => {
                self.log.reserve("no reserve for a full disk could be kept", &reserve, &error);
                true
            }
        }
    }

    /// Asks the file system for its free space, so that [`Store::look`] knows whether messages are refused for it.
    pub fn look_at_disk(&mut self, now: Stamp) {
        if let Some(database) = &mut self.database {
            database.look_at_disk(now);
        }
    }

    /// What a new connection starts from: the owner is recorded (broker and client identifier), and whether "session
    /// present" can still be believed. `unacked` are the QoS 1 messages the session still holds itself.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn begin(
        &mut self,
        owner: (&str, &str),
        policy: OnSessionLoss,
        unacked: &[(Lane, Seq)],
        now: Stamp,
    ) -> Result<Begin, StoreError> {
        self.transaction(|database| database.begin(owner, policy, unacked, now))
    }

    /// Forgets every session but those of these brokers and client identifiers.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn keep_owners(
        &mut self,
        owners: &[(String, String)],
        policy: OnSessionLoss,
    ) -> Result<Settled, StoreError> {
        self.transaction(|database| database.keep_owners(owners, policy))
    }

    /// Other settings from now on, but for the path, the pulse and the faults.
    ///
    /// # Errors
    /// The database failed; see [`Store::commit`]. The settings hold all the same.
    pub fn change(&mut self, settings: Settings) -> Result<(), StoreError> {
        let Settings { path, pulse, faults, .. } = self.settings.clone();
        self.settings = Settings { path, pulse, faults, ..settings };
        match self.database.as_mut().map(|database| database.change_settings(&self.settings)) {
            None | Some(Ok(())) => Ok(()),
            Some(Err(source)) => Err(self.recover(source)),
        }
    }

    /// Takes an epoch and a boot counter above those that were heard of, and asks for a clean start: the
    /// database is a copy of the past.
    ///
    /// # Errors
    /// Nothing was done; see [`Store::commit`].
    pub fn disown(&mut self, epoch: u32, boot: u32, policy: OnSessionLoss) -> Result<Settled, StoreError> {
        let epoch = self.boot.epoch.max(epoch).saturating_add(1);
        let boot = self.boot.boot.max(boot).saturating_add(1);
        self.transaction(|database| database.disown(epoch, boot, policy))
    }

    /// Counts bytes sent to and received from the broker against the budget. They are written down with later
    /// commits, so that a crash forgets less than a thousandth of the budget, or than 16 KiB if that is more, and
    /// what moved since the last commit.
    pub fn count_link_bytes(&mut self, bytes: u64, now: Stamp) {
        if let Some(database) = &mut self.database {
            database.count_link_bytes(bytes, now);
        }
    }

    /// Reads one more segment from end to end, so that damage is found before its turn comes; `false`: all
    /// were read. Whole again or not, records are checked once more when they are sent.
    ///
    /// # Errors
    /// [`StoreError::Damaged`]: the database has been replaced by what could be carried over.
    pub fn check_next(&mut self) -> Result<bool, StoreError> {
        let (Some(from), Some(database)) = (self.check_from, &self.database) else { return Ok(false) };
        match database.read_through(from) {
            Ok(next) => self.check_from = next,
            Err(source) => {
                self.check_from = None;
                return Err(self.recover(source));
            }
        }
        Ok(self.check_from.is_some())
    }

    /// The number of the newest recorded command; 0 when there never was one.
    pub fn newest_command(&self) -> u64 {
        self.newest_command
    }

    /// The first `count` recorded commands with a number above `after`, in order.
    ///
    /// # Errors
    /// The table cannot be read, or the database could not be opened again.
    pub fn recorded(&self, after: u64, count: usize, now: Stamp) -> Result<Vec<Recorded>, StoreError> {
        let database = self.database.as_ref().ok_or_else(|| self.gone())?;
        database.recorded(after, count, now).map_err(|source| sqlite_error(&self.settings.path, source))
    }

    /// Commands that had begun and were not answered: whether they were carried out is unknown.
    ///
    /// # Errors
    /// As [`Store::recorded`].
    pub fn interrupted(&self, now: Stamp) -> Result<Vec<Recorded>, StoreError> {
        let database = self.database.as_ref().ok_or_else(|| self.gone())?;
        database.interrupted(now).map_err(|source| sqlite_error(&self.settings.path, source))
    }

    /// What screens show.
    ///
    /// # Errors
    /// The tables cannot be read, or the database could not be opened again.
    pub fn look(&self, now: Stamp) -> Result<Look, StoreError> {
        let database = self.database.as_ref().ok_or_else(|| self.gone())?;
        let look = database.look(now).map_err(|source| sqlite_error(&self.settings.path, source))?;
        let size = |path: &Path| fs::metadata(path).map_or(0, |file| file.len());
        Ok(Look {
            damage: self.damage.clone(),
            trouble: self.trouble.clone(),
            database_bytes: size(&self.settings.path),
            log_bytes: size(&with_suffix(&self.settings.path, "-wal")),
            ..look
        })
    }

    /// A number SQLite reports of itself, `synchronous` for one; -1 when it does not know it.
    pub fn pragma(&self, name: &str) -> i64 {
        self.database.as_ref().and_then(|database| database.pragma(name).ok()).unwrap_or(-1)
    }

    /// Whether anything waits to be taken, and when the next held message is free again (monotonic ms).
    pub fn waiting(&self, now: Stamp) -> (bool, Option<u64>) {
        self.database.as_ref().map_or((false, None), |database| database.waiting(now))
    }

    /// Moves the write-ahead log into the database and closes it.
    pub fn close(self) {
        if let Some(Err(error)) = self.database.map(Database::close) {
            tracing::warn!(%error, "the database was closed without a checkpoint; nothing is lost");
        }
    }

    fn gone(&self) -> StoreError {
        let why = self.trouble.clone().unwrap_or_default();
        StoreError::Gone { path: self.settings.path.clone(), why }
    }

    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&mut Database) -> Result<T, rusqlite::Error>,
    ) -> Result<T, StoreError> {
        if self.database.is_none() {
            self.open_again().inspect_err(|error| self.log.failed(error))?;
        }
        let Some(database) = &mut self.database else { return Err(self.gone()) };
        match database.transaction(work) {
            Ok(done) => {
                self.boot = database.boot().clone();
                self.newest_command = database.newest_command();
                if self.disk_full.is_none() && self.trouble.take().is_some() {
                    self.log.works();
                }
                Ok(done)
            }
            Err(source) => Err(self.recover(source)),
        }
    }

    /// After a failed transaction: everything in memory is forgotten and read again. A file whose contents
    /// could not be read or synced is closed and opened anew, because what the system's cache holds of it may
    /// not be what the disk holds; a damaged one is replaced; a full disk gets the reserve.
    fn recover(&mut self, source: rusqlite::Error) -> StoreError {
        let io_failed = database::is_io_failure(&source);
        let error = sqlite_error(&self.settings.path, source);
        self.trouble = Some(error.to_string());
        if matches!(error, StoreError::DiskFull { .. }) {
            give_up_reserve(&self.settings.path, &mut self.log);
            self.disk_is_full();
        } else if !matches!(error, StoreError::Damaged { .. }) {
            self.log.failed(&error); // damage is said by what repairs it
        }
        let in_place = !io_failed && !matches!(error, StoreError::Damaged { .. });
        let reloaded = in_place && self.database.as_mut().is_some_and(|database| database.reload().is_ok());
        if let (true, StoreError::DiskFull { .. }, Some(database)) = (reloaded, &error, &self.database) {
            // While there is space: what the database grows by, before somebody else takes it.
            if let Err(error) = database.keep_log_space() {
                let what = "the database's log could not be moved into it on the full disk";
                self.log.reserve(what, &self.settings.path, &error);
            }
        }
        if !reloaded {
            // Closed before it is opened again: SQLite removes the log by its name when it closes.
            self.database = None;
            let outcome = match &error {
                StoreError::Damaged { what, .. } => self.replace(what.clone()),
                _ => self.open_again(),
            };
            if let Err(error) = outcome {
                self.log.failed(&error);
            }
        }
        error
    }

    fn disk_is_full(&mut self) {
        if self.disk_full.is_none() {
            self.log.full();
        }
        self.disk_full = Some(clock::now().mono_ms);
        self.trouble = Some(StoreError::DiskFull { path: self.settings.path.clone() }.to_string());
    }

    fn open_again(&mut self) -> Result<(), StoreError> {
        let (mut database, damage) = open_or_start_over(&self.settings)?;
        database.number_commands_above(self.newest_command);
        self.boot = database.boot().clone();
        self.database = Some(database);
        self.damage = damage.or(self.damage.take());
        Ok(())
    }

    fn replace(&mut self, what: String) -> Result<(), StoreError> {
        let (mut database, damage) = start_over(&self.settings, what)?;
        database.number_commands_above(self.newest_command);
        self.boot = database.boot().clone();
        (self.database, self.damage) = (Some(database), Some(damage));
        Ok(())
    }
}

fn open_or_start_over(settings: &Settings) -> Result<(Database, Option<Damage>), StoreError> {
    let path = &settings.path;
    let finished = salvage::finish(path).map_err(|source| StoreError::Open { path: path.clone(), source })?;
    prepare_files(path)?;
    match Database::open(settings) {
        Ok(database) => {
            let damage = finished.map(|aside| database.salvaged(aside)).transpose();
            Ok((database, damage.map_err(|source| sqlite_error(path, source))?))
        }
        Err(StoreError::Damaged { what, .. }) => {
            let (database, damage) = start_over(settings, what)?;
            Ok((database, Some(damage)))
        }
        Err(error) => Err(error),
    }
}

/// Carries what is readable of the damaged database over into a new one, then puts that into its place. The damaged
/// one stays where it is until the new one is complete and on the disk, so that a power cut between costs nothing.
fn start_over(settings: &Settings, what: String) -> Result<(Database, Damage), StoreError> {
    let path = &settings.path;
    let moved = |source| StoreError::Open { path: path.clone(), source };
    let new = Settings { path: salvage::begin(path).map_err(moved)?, ..settings.clone() };
    prepare_files(&new.path)?;
    let db = Database::connect(&new)?;
    let mut damage =
        salvage::carry_over(path, &db, what, &settings.pulse).map_err(|source| sqlite_error(path, source))?;
    database::close(db).map_err(|source| sqlite_error(&new.path, source))?;
    salvage::complete(path).map_err(moved)?;
    damage.aside = salvage::finish(path).map_err(moved)?.unwrap_or_default();
    let database = Database::over(Database::connect(settings)?, settings)?;
    tracing::error!(
        what = damage.what,
        aside = %damage.aside.display(),
        salvaged = damage.salvaged,
        lost = damage.lost,
        possibly_doubled = damage.possibly_doubled,
        "the database was damaged: it was set aside, and what was readable carried over"
    );
    Ok((database, damage))
}

/// The folder (0750) and the file (0600), before SQLite makes them with other modes.
fn prepare_files(path: &Path) -> Result<(), StoreError> {
    let fail = |path: &Path, source: io::Error| match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly { path: path.to_owned() },
        _ => StoreError::Open { path: path.to_owned(), source },
    };
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

fn reserve_path(path: &Path) -> PathBuf {
    with_suffix(path, ".reserve")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

fn fill(reserve: &Path) -> io::Result<()> {
    let mut options = fs::OpenOptions::new();
    let file = options.create(true).truncate(false).write(true).mode(0o600).open(reserve)?;
    if file.metadata()?.len() < RESERVE_BYTES {
        let whole = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES);
        // What it got of it is better used by the queue.
        whole.inspect_err(|_| drop(file.set_len(0)))?;
    }
    Ok(())
}

/// Its name stays: it says that there was a database here.
fn give_up_reserve(path: &Path, log: &mut Log) {
    let reserve = reserve_path(path);
    if fs::metadata(&reserve).is_ok_and(|file| file.len() == 0) {
        return;
    }
    match fs::OpenOptions::new().write(true).open(&reserve).and_then(|file| file.set_len(0)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log.reserve("the reserve could not be given up on the full disk", &reserve, &error);
        }
        _ => {}
    }
}

/// Whether the file system takes no writes. Asked of the reserve: to close another handle of the database itself
/// would give up its lock.
fn is_read_only(path: &Path) -> bool {
    // Not made where it is missing: beside an empty database it says that one was lost.
    let opened = fs::OpenOptions::new().write(true).open(reserve_path(path));
    opened.is_err_and(|error| error.kind() == io::ErrorKind::ReadOnlyFilesystem)
}
