//! What happens to a database that cannot be trusted: its readable part carried over into a new one, then set
//! aside whole.
//!
//! Invariants (P6): nothing of the damaged files is moved before what is readable is in a new database on the disk,
//! and the database and its log stay together; a record is carried over only with a good checksum; the new database
//! knows of no session, so the broker's is discarded, and what was in flight is counted as possibly doubled. The
//! new database is `.salvage` while it is filled and `.salvaged` when it is complete: a start that finds the one
//! begins anew, a start that finds the other puts it into its place.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rusqlite::types::Value;
use rusqlite::{Connection, Row, params, params_from_iter};

use super::outbox::{DropReason, seq_of};
use super::{segment, with_suffix};
use crate::clock;
use crate::message::{Lane, Seq};
use crate::progress::Pulse;

/// Files set aside that are kept.
const KEPT: usize = 2;
/// Queries one salvage makes at most: damage that needs more is not worth the wait.
const QUERIES_MAX: u32 = 200_000;

/// What the slowest card that is worth waiting for writes, in bytes a second.
const SLOWEST_CARD: u64 = 512 << 10;

/// What was found and what was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// What was wrong, in words.
    pub what: String,
    /// Where the damaged database was put.
    pub aside: PathBuf,
    /// Messages carried over, not yet delivered.
    pub salvaged: u64,
    /// Messages known to be lost.
    pub lost: u64,
    /// Messages that were in flight and are published anew.
    pub possibly_doubled: u64,
}

fn unfinished(path: &Path) -> PathBuf {
    with_suffix(path, ".salvage")
}

fn complete_at(path: &Path) -> PathBuf {
    with_suffix(path, ".salvaged")
}

/// Where the new database is to be filled; what an interrupted salvage has left there goes.
pub(super) fn begin(path: &Path) -> io::Result<PathBuf> {
    let new = unfinished(path);
    // The log first: SQLite would take an old log for that of a new database of the same name.
    for old in [with_suffix(&new, "-wal"), with_suffix(&new, "-journal"), new.clone()] {
        match fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(new)
}

/// The new database is complete and synced: from here on it is the one that counts.
pub(super) fn complete(path: &Path) -> io::Result<()> {
    fs::rename(unfinished(path), complete_at(path))?;
    sync_folder(path)
}

/// Sets the damaged database aside and puts the complete new one into its place, if there is one; returns where the
/// damaged one is. Interrupted at any point, it goes on at the next start, under the same name.
pub(super) fn finish(path: &Path) -> io::Result<Option<PathBuf>> {
    let new = complete_at(path);
    let written = match fs::metadata(&new) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata?.modified()?,
    };
    let written_ms = written.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".corrupt-{written_ms}"));
    let aside = path.with_file_name(name);
    // The log first: SQLite would take it for the new database's.
    rename(&with_suffix(path, "-wal"), &with_suffix(&aside, "-wal"))?;
    rename(path, &aside)?;
    sync_folder(path)?;
    fs::rename(new, path)?;
    sync_folder(path)?;
    forget_oldest(path)?;
    Ok(Some(aside))
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

fn forget_oldest(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut prefix = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    prefix.push_str(".corrupt-");
    let mut aside: Vec<PathBuf> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.strip_prefix(&prefix).is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
        })
        .collect();
    aside.sort();
    for path in aside.iter().rev().skip(KEPT) {
        fs::remove_file(path)?;
        let _none = fs::remove_file(with_suffix(path, "-wal"));
    }
    Ok(())
}

/// Carries everything readable from the database at `path` into the new, empty one `db`. That may take minutes; each
/// row is progress.
pub(super) fn carry_over(
    path: &Path,
    db: &Connection,
    what: String,
    pulse: &Pulse,
) -> Result<Damage, rusqlite::Error> {
    let mut damage = Damage { what, aside: PathBuf::new(), salvaged: 0, lost: 0, possibly_doubled: 0 };
    let old = match open_damaged(path) {
        Ok(old) => old,
        Err(error) => {
            tracing::error!(%error, "nothing of the damaged database can be read");
            return Ok(damage);
        }
    };
    db.execute_batch("BEGIN IMMEDIATE")?;
    let mut carrier = Carrier { old: &old, db, queries_left: QUERIES_MAX, pulse };
    carrier.carry(&mut damage)?;
    // From here to the end of the salvage nothing more is heard: what was carried over goes to the log, and from there
    // into the new database.
    let bytes = 2 * fs::metadata(path).map_or(0, |file| file.len());
    pulse.busy(clock::mono_ms(), Duration::from_secs(bytes / SLOWEST_CARD));
    db.execute_batch("COMMIT")?;
    Ok(damage)
}

fn open_damaged(path: &Path) -> Result<Connection, rusqlite::Error> {
    let old = Connection::open(path)?;
    old.execute_batch("PRAGMA writable_schema = ON; PRAGMA locking_mode = EXCLUSIVE;")?;
    Ok(old)
}

struct Carrier<'a> {
    old: &'a Connection,
    db: &'a Connection,
    queries_left: u32,
    pulse: &'a Pulse,
}

/// What was found of a lane.
#[derive(Default)]
struct Found {
    next_seq: u64,
    segments: u64,
    bytes: u64,
    left: u64,
    /// From the first number carried over to the last.
    first: Option<u64>,
}

impl Carrier<'_> {
    fn carry(&mut self, damage: &mut Damage) -> Result<(), rusqlite::Error> {
        let mut progress = BTreeMap::new();
        self.walk(
            "SELECT segment, done FROM progress WHERE segment BETWEEN ? AND ? ORDER BY segment",
            &mut |row| {
                progress.insert(row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?);
                Ok(())
            },
        )?;
        let mut lanes: [Found; 3] = Default::default();
        let mut newest = (0u32, 0u32);
        let db = self.db;
        let sql = "SELECT id, epoch, kernel_boot, accepted_ms, accepted_mono, packing, body FROM segment
                   WHERE id BETWEEN ? AND ? ORDER BY id";
        self.walk(sql, &mut |row| carry_segment(db, row, &progress, &mut lanes, &mut newest))?;
        self.carry_meta(newest)?;
        self.carry_lanes(&lanes, damage)?;
        for table in ["command", "dead_letter", "gap", "dropped", "retained_ahead", "budget"] {
            self.carry_rows(table)?;
        }
        let in_flight =
            self.old.query_row("SELECT count(*) FROM inflight WHERE state IN (1, 2)", [], |row| {
                row.get::<_, u64>(0)
            });
        damage.possibly_doubled = in_flight.unwrap_or(0);
        Ok(())
    }

    /// Every row that can be read, of a table whose key is the statement's range: a range that fails is halved
    /// until what fails is one row.
    fn walk(
        &mut self,
        sql: &str,
        sink: &mut dyn FnMut(&Row<'_>) -> Result<(), rusqlite::Error>,
    ) -> Result<(), rusqlite::Error> {
        let mut ranges = vec![(0i64, i64::MAX)];
        while let Some((from, to)) = ranges.pop() {
            if self.queries_left == 0 {
                return Ok(());
            }
            self.queries_left -= 1;
            self.pulse.beat(clock::mono_ms());
            let Some(at) = self.walk_range(sql, from, to, sink)? else { continue };
            if at < to {
                let middle = at + (to - at) / 2;
                // The lower half is looked at first, so that rows arrive in order.
                ranges.push((middle + 1, to));
                ranges.push((at, middle));
            }
        }
        Ok(())
    }

    /// `Some`: reading failed at or after this key. Only the sink's errors are errors.
    fn walk_range(
        &self,
        sql: &str,
        from: i64,
        to: i64,
        sink: &mut dyn FnMut(&Row<'_>) -> Result<(), rusqlite::Error>,
    ) -> Result<Option<i64>, rusqlite::Error> {
        let mut at = from;
        let Ok(mut statement) = self.old.prepare_cached(sql) else { return Ok(None) };
        let Ok(mut rows) = statement.query(params![from, to]) else { return Ok(Some(at)) };
        loop {
            match rows.next() {
                Ok(Some(row)) => {
                    let Ok(key) = row.get::<_, i64>(0) else { return Ok(Some(at)) };
                    at = at.max(key.saturating_add(1));
                    sink(row)?;
                    self.pulse.beat(clock::mono_ms());
                }
                Ok(None) => return Ok(None),
                Err(_) => return Ok(Some(at)),
            }
        }
    }

    /// Numbers may repeat from here on, hence a new epoch; the boots go on being counted where that is known.
    fn carry_meta(&self, newest: (u32, u32)) -> Result<(), rusqlite::Error> {
        let meta = self.old.query_row(
            "SELECT epoch, boot, machine, kernel_boot, kernel_boot_id FROM meta",
            [],
            |row| {
                Ok((
                    row.get::<_, u32>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, String>(2)?,
                    row.get::<_, u32>(3)?,
                    row.get::<_, String>(4)?,
                ))
            },
        );
        let (epoch, boot, machine, kernel_boot, id) =
            meta.unwrap_or((newest.0, 0, String::new(), newest.1, String::new()));
        self.db
            .execute(
                "UPDATE meta SET epoch = ?, boot = ?, machine = ?, kernel_boot = ?, kernel_boot_id = ?",
                params![epoch.max(newest.0).saturating_add(1), boot, machine, kernel_boot.max(newest.1), id],
            )
            .map(drop)
    }

    fn carry_lanes(&self, lanes: &[Found; 3], damage: &mut Damage) -> Result<(), rusqlite::Error> {
        for lane in Lane::ALL {
            let found = &lanes[lane as usize];
            let known = self.old.query_row(
                "SELECT next_seq, messages FROM lane WHERE lane = ?",
                [lane as i64],
                |row| Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?)),
            );
            let (next_seq, messages) = known.unwrap_or((found.next_seq, found.left));
            let next_seq = next_seq.max(found.next_seq).max(1);
            self.db.execute(
                "UPDATE lane SET next_seq = ?, messages = ?, bytes = ? WHERE lane = ?",
                params![next_seq, found.left, found.bytes, lane as i64],
            )?;
            let lost = messages.saturating_sub(found.left);
            damage.salvaged += found.left;
            damage.lost += lost;
            if lost > 0 {
                let (reason, first) = (DropReason::Damaged.name(), found.first.unwrap_or(1));
                let (lane, last) = (lane as i64, next_seq - 1);
                self.db.execute(
                    "INSERT INTO gap VALUES (?, ?, ?, ?, ?)",
                    params![lane, reason, first, last, lost],
                )?;
                self.db.execute("INSERT INTO dropped VALUES (?, ?, ?)", params![lane, reason, lost])?;
            }
        }
        Ok(())
    }

    /// A table of an older schema has fewer columns: new ones are added at its end.
    fn carry_rows(&self, table: &str) -> Result<(), rusqlite::Error> {
        let Ok(mut statement) = self.old.prepare(&format!("SELECT * FROM {table}")) else { return Ok(()) };
        // Of the new table: the old names may be damaged too.
        let ours = self.db.prepare(&format!("SELECT * FROM {table}"))?;
        let columns = statement.column_count().min(ours.column_count());
        let names = ours.column_names().take(columns).collect::<Vec<_>>().join(", ");
        let Ok(mut rows) = statement.query([]) else { return Ok(()) };
        let places = vec!["?"; columns].join(", ");
        let insert = format!("INSERT OR IGNORE INTO {table} ({names}) VALUES ({places})");
        while let Ok(Some(row)) = rows.next() {
            self.pulse.beat(clock::mono_ms());
            let values: Result<Vec<Value>, _> = (0..columns).map(|column| row.get(column)).collect();
            let Ok(values) = values else { continue };
            // A row that no longer fits its table is part of the damage.
            let _unfit = self.db.prepare_cached(&insert)?.execute(params_from_iter(values));
        }
        Ok(())
    }
}

fn carry_segment(
    db: &Connection,
    row: &Row<'_>,
    progress: &BTreeMap<i64, Vec<u8>>,
    lanes: &mut [Found; 3],
    newest: &mut (u32, u32),
) -> Result<(), rusqlite::Error> {
    let read = || -> Result<_, rusqlite::Error> {
        Ok((
            row.get::<_, i64>(0)?,
            row.get::<_, u32>(1)?,
            row.get::<_, u32>(2)?,
            row.get::<_, i64>(3)?,
            row.get::<_, u64>(4)?,
            row.get::<_, i64>(5)?,
            row.get::<_, Vec<u8>>(6)?,
        ))
    };
    let Ok((id, epoch, kernel_boot, accepted_ms, accepted_mono, packing, body)) = read() else {
        return Ok(());
    };
    let Some(lane) = Lane::ALL.get((id >> 56) as usize).copied() else { return Ok(()) };
    let first = seq_of(id);
    // The row's count may be damaged too: carried over as it is, it would cover up the segments behind it, which the
    // store would find missing and begin a salvage again. So it ends with the last record that is good.
    let most = segment::RECORDS_MAX as usize;
    let mut entries = segment::decode(lane, Seq(first), most, accepted_ms, packing, body.clone());
    entries.truncate(entries.iter().rposition(Option::is_some).map_or(0, |last| last + 1));
    let count = entries.len() as u64;
    let done = progress.get(&id).cloned().unwrap_or_default();
    let is_done = |n: usize| done.get(n / 8).is_some_and(|byte| byte & (1 << (n % 8)) != 0);
    let good = entries.iter().enumerate().filter(|(n, entry)| entry.is_some() && !is_done(*n)).count() as u64;
    if good == 0 {
        return Ok(());
    }
    // Records without a good checksum are done: lost, and counted with the rest of what is missing.
    let mut bits = vec![0u8; entries.len().div_ceil(8)];
    for (n, entry) in entries.iter().enumerate() {
        if entry.is_none() || is_done(n) {
            bits[n / 8] |= 1 << (n % 8);
        }
    }
    let bytes = body.len() as u64;
    // Whether the clock was right is not read: then nothing expires that outlived its boot.
    db.prepare_cached(
        "INSERT INTO segment (id, count, epoch, kernel_boot, accepted_ms, accepted_mono, packing, body)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
    )?
    .execute(params![id, count, epoch, kernel_boot, accepted_ms, accepted_mono, packing, body])?;
    if good < count {
        db.prepare_cached("INSERT INTO progress VALUES (?, ?)")?.execute(params![id, bits])?;
    }
    let found = &mut lanes[lane as usize];
    found.first.get_or_insert(first);
    found.segments += 1;
    found.left += good;
    found.bytes += bytes + super::outbox::SEGMENT_OVERHEAD;
    found.next_seq = found.next_seq.max(first + count);
    *newest = (newest.0.max(epoch), newest.1.max(kernel_boot));
    Ok(())
}
