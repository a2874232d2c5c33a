//! The disk below the agent: a shim that keeps what was synced, and what a power cut makes of it.
//!
//! `powercut.c` is compiled here and preloaded into the agent. Invariant: what [`Disk::cut_power`] leaves behind is
//! a state that a disk may be in: of every sector the synced content, or that of a write that was not synced.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The shim's source.
const SOURCE: &str = include_str!("powercut.c");

/// The database's files: what follows its name.
const SUFFIXES: [&str; 3] = ["", "-wal", "-journal"];

/// Bytes that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Words of the panel, each of 64 bits; see `struct panel`.
const PANEL_WORDS: usize = 9;
const ROOM: u64 = 0;
const SYNC_US: u64 = 1;
const SYNCS: usize = 2;
const REFUSED: usize = 3;
const SAME: usize = 4;
const ATTACHED: usize = 7;
const SYNCING: usize = 8;

/// Why there is no such disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    /// No compiler, or it refused.
    #[error(
        "cannot compile the shim that stands for the disk: {0}; it needs a C compiler: apt-get install gcc libc6-dev"
    )]
    Compiler(String),
    /// Reading or writing its files.
    #[error("the disk's files: {0}")]
    Io(#[from] io::Error),
    /// The agent runs without it.
    #[error("the shim was not loaded into the agent: is this program linked statically?")]
    NotLoaded,
}

/// What is left of writes that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Nothing.
    Nothing,
    /// Some sectors, and some lengths.
    Some,
}

/// What a power cut did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Sectors that had been written and were not there afterwards.
    pub(crate) sectors: u64,
}

/// What the shim counted.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    /// Files synced.
    pub(crate) syncs: u64,
    /// Writes refused because the disk was full.
    pub(crate) refused: u64,
}

/// The disk of one database.
#[derive(Debug)]
pub(crate) struct Disk {
    database: PathBuf,
    durable: PathBuf,
    shim: PathBuf,
    panel_path: PathBuf,
    panel: File,
}

impl Disk {
    /// Compiles the shim; everything of it stands in `folder`, the database elsewhere.
    pub(crate) fn prepare(folder: &Path, database: &Path) -> Result<Disk, DiskError> {
        let source = folder.join("powercut.c");
        fs::write(&source, SOURCE)?;
        let shim = folder.join("powercut.so");
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-shared", "-fPIC", "-o"]).arg(&shim).arg(&source).args(["-ldl", "-lpthread"]);
        let output = compiler.stdin(Stdio::null()).output();
        let output = output.map_err(|error| DiskError::Compiler(format!("cc: {error}")))?;
        if !output.status.success() {
            return Err(DiskError::Compiler(String::from_utf8_lossy(&output.stderr).into_owned()));
        }
        let panel_path = folder.join("panel");
        let panel =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&panel_path)?;
        panel.set_len(8 * PANEL_WORDS as u64)?;
        let durable = folder.join("durable");
        fs::create_dir(&durable)?;
        let durable = durable.join("database");
        let disk = Disk { database: database.to_owned(), durable, shim, panel_path, panel };
        disk.empty()?;
        Ok(disk)
    }

    /// What the agent's environment needs.
    pub(crate) fn environment(&self) -> [(&'static str, &OsStr); 4] {
        [
            ("LD_PRELOAD", self.shim.as_os_str()),
            ("POWERCUT_PANEL", self.panel_path.as_os_str()),
            ("POWERCUT_DATABASE", self.database.as_os_str()),
            ("POWERCUT_DURABLE", self.durable.as_os_str()),
        ]
    }

    fn words(&self) -> io::Result<[u64; PANEL_WORDS]> {
        let mut words = [0; PANEL_WORDS];
        for (at, word) in (0..).step_by(8).zip(&mut words) {
            let mut bytes = [0; 8];
            self.panel.read_exact_at(&mut bytes, at)?;
            *word = u64::from_ne_bytes(bytes);
        }
        Ok(words)
    }

    /// What was counted over all agents.
    pub(crate) fn counts(&self) -> io::Result<Counts> {
        let words = self.words()?;
        Ok(Counts { syncs: words[SYNCS], refused: words[REFUSED] })
    }

    /// Whether an agent ran on this disk at all.
    pub(crate) fn check_loaded(&self) -> Result<(), DiskError> {
        if self.words()?[ATTACHED] > 0 { Ok(()) } else { Err(DiskError::NotLoaded) }
    }

    /// Lets so many bytes be written and no more.
    pub(crate) fn fill_up(&self, room: u32) -> io::Result<()> {
        self.set(ROOM, u64::from(room))
    }

    /// Gives all the room there is.
    pub(crate) fn empty(&self) -> io::Result<()> {
        self.set(ROOM, u64::MAX)
    }

    /// How long a sync takes from now on; nothing of it is durable before its end.
    pub(crate) fn sync_takes(&self, time: Duration) -> io::Result<()> {
        self.set(SYNC_US, u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
    }

    /// Whether a file is being synced right now: the worst moment there is.
    pub(crate) fn is_syncing(&self) -> io::Result<bool> {
        Ok(self.words()?[SYNCING] > 0)
    }

    fn set(&self, word: u64, value: u64) -> io::Result<()> {
        self.panel.write_all_at(&value.to_ne_bytes(), 8 * word)
    }

    /// Puts what is on the disk in place of what the dead agent had written. Nobody may have the files open.
    pub(crate) fn cut_power(&self, keep: Keep, random: &mut fastrand::Rng) -> io::Result<Lost> {
        let words = self.words()?;
        self.set(SYNCING as u64, 0)?;
        let mut lost = Lost::default();
        for (kind, suffix) in SUFFIXES.iter().enumerate() {
            let real = with_suffix(&self.database, suffix);
            let durable = with_suffix(&self.durable, suffix);
            // One that was half synced as a whole.
            remove(&with_suffix(&self.durable, &format!("{suffix}.new")))?;
            let (Some(written), synced) = (read(&real)?, read(&durable)?) else {
                // Its removal was not synced, or there was none.
                if durable.exists() {
                    fs::copy(&durable, &real)?;
                }
                continue;
            };
            let left = match synced {
                Some(synced) if keep == Keep::Some && words[SAME + kind] == 1 => {
                    Some(mix(&synced, &written, random))
                }
                synced => synced,
            };
            lost.sectors += differing_sectors(left.as_deref().unwrap_or_default(), &written);
            let mode = fs::metadata(&real)?.mode();
            remove(&real)?;
            remove(&durable)?;
            if let Some(left) = left {
                write(&real, &left, mode)?;
                write(&durable, &left, mode)?;
            }
        }
        Ok(lost)
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt;
    OpenOptions::new().write(true).create_new(true).mode(mode & 0o777).open(path)?.write_all(bytes)
}

/// A file of which some sectors, and perhaps the length, are as written, and the others as synced.
fn mix(synced: &[u8], written: &[u8], random: &mut fastrand::Rng) -> Vec<u8> {
    let length = if random.bool() { synced.len() } else { written.len() };
    // Now many survive, now few.
    let share = random.f64();
    let mut left = vec![0; length];
    for (number, sector) in left.chunks_mut(SECTOR).enumerate() {
        let from = if random.f64() < share { written } else { synced };
        let from = from.get(number * SECTOR..).unwrap_or_default();
        let count = from.len().min(sector.len());
        sector[..count].copy_from_slice(&from[..count]);
    }
    left
}

fn differing_sectors(left: &[u8], written: &[u8]) -> u64 {
    let sectors = left.len().max(written.len()).div_ceil(SECTOR);
    let sector = |bytes: &[u8], number: usize| {
        let from = (number * SECTOR).min(bytes.len());
        bytes[from..(from + SECTOR).min(bytes.len())].to_vec()
    };
    (0..sectors).filter(|number| sector(left, *number) != sector(written, *number)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::ExitStatus;

    /// Set in the child that is the writer.
    const SCRIPT: &str = "FIELDPOST_TORTURE_DISK_TEST";

    /// Not a test: what the other tests run on the disk, and then abort without any goodbye.
    #[test]
    fn writer() {
        let Some(script) = std::env::var_os(SCRIPT) else { return };
        let database = PathBuf::from(std::env::var_os("POWERCUT_DATABASE").expect("the parent set it"));
        let wal = with_suffix(&database, "-wal");
        let open = |path: &Path| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
        };
        let sync_folder = || File::open(database.parent().unwrap()).unwrap().sync_all().unwrap();
        match script.to_str().unwrap() {
            "writes" => {
                let file = open(&database);
                file.write_all_at(b"one two three", 0).unwrap();
                file.sync_data().unwrap();
                file.write_all_at(b"ONE", 0).unwrap();
                file.write_all_at(b"and four", 13).unwrap();
            }
            // Runs after "writes", whose process was killed and whose disk was not cut off.
            "syncs what another left" => open(&database).sync_all().unwrap(),
            "truncates" => {
                let file = open(&database);
                file.write_all_at(&[b'x'; 3000], 0).unwrap();
                file.sync_all().unwrap();
                file.set_len(1000).unwrap();
            }
            "truncates and syncs" => {
                let file = open(&database);
                file.write_all_at(&[b'x'; 3000], 0).unwrap();
                file.sync_all().unwrap();
                file.set_len(1000).unwrap();
                file.write_all_at(b"yy", 2000).unwrap();
                file.sync_all().unwrap();
            }
            "removes" => {
                let file = open(&wal);
                file.write_all_at(b"log", 0).unwrap();
                file.sync_all().unwrap();
                sync_folder();
                fs::remove_file(&wal).unwrap();
            }
            "removes for good" => {
                let file = open(&wal);
                file.write_all_at(b"log", 0).unwrap();
                file.sync_all().unwrap();
                fs::remove_file(&wal).unwrap();
                sync_folder();
                file.write_all_at(b"LOG", 0).unwrap();
                file.sync_all().unwrap();
            }
            "removes and makes anew" => {
                let old = open(&wal);
                old.write_all_at(b"old log", 0).unwrap();
                old.sync_all().unwrap();
                fs::remove_file(&wal).unwrap();
                let new = open(&wal);
                new.write_all_at(b"new log", 0).unwrap();
                old.write_all_at(b"OLD", 0).unwrap();
                old.sync_all().unwrap();
            }
            "makes anew and syncs" => {
                let old = open(&wal);
                old.write_all_at(b"old log", 0).unwrap();
                old.sync_all().unwrap();
                fs::remove_file(&wal).unwrap();
                let new = open(&wal);
                new.write_all_at(b"new", 0).unwrap();
                new.sync_all().unwrap();
            }
            "makes and does not sync" => open(&wal).write_all_at(b"log", 0).unwrap(),
            "makes and syncs the folder" => {
                open(&wal).write_all_at(b"log", 0).unwrap();
                sync_folder();
            }
            "fills the disk" => {
                let file = open(&database);
                let full = (0..).find_map(|n| file.write_all_at(&[b'f'; 100], n * 100).err()).unwrap();
                assert_eq!(full.kind(), io::ErrorKind::StorageFull);
                assert_eq!(file.set_len(1 << 20).unwrap_err().kind(), io::ErrorKind::StorageFull);
                file.set_len(120).unwrap();
                file.sync_all().unwrap();
            }
            other => panic!("no such script: {other}"),
        }
        std::process::abort();
    }

    struct Bench {
        dir: tempfile::TempDir,
        disk: Disk,
    }

    impl Bench {
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap();
            let (folder, data) = (path.join("disk"), path.join("data"));
            fs::create_dir(&folder).unwrap();
            fs::create_dir(&data).unwrap();
            let disk = Disk::prepare(&folder, &data.join("outbox.db")).unwrap();
            Bench { dir, disk }
        }

        fn run(&self, script: &str) -> &Bench {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", "disk::tests::writer", "--nocapture"]).env(SCRIPT, script);
            let output = command.envs(self.disk.environment()).output().unwrap();
            let aborted =
                |status: ExitStatus| std::os::unix::process::ExitStatusExt::signal(&status) == Some(6);
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(aborted(output.status) && text.is_empty(), "{script}: {text}");
            self.disk.check_loaded().unwrap();
            self
        }

        /// Database and log, after a cut that leaves nothing unsynced.
        fn cut(&self) -> [Option<String>; 2] {
            self.disk.cut_power(Keep::Nothing, &mut fastrand::Rng::with_seed(1)).unwrap();
            ["outbox.db", "outbox.db-wal"].map(|name| {
                let bytes = read(&self.dir.path().join("data").join(name)).unwrap();
                bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            })
        }
    }

    fn text(words: &str) -> Option<String> {
        Some(words.to_owned())
    }

    #[test]
    fn what_was_not_synced_is_gone_after_the_cut() {
        assert_eq!(Bench::new().run("writes").cut(), [text("one two three"), None]);
    }

    #[test]
    fn what_a_killed_process_wrote_is_synced_by_the_next_one() {
        let bench = Bench::new();
        bench.run("writes").run("syncs what another left");
        assert_eq!(bench.cut(), [text("ONE two threeand four"), None]);
    }

    #[test]
    fn a_truncation_counts_once_it_is_synced() {
        assert_eq!(Bench::new().run("truncates").cut(), [text(&"x".repeat(3000)), None]);
        let holes = "x".repeat(1000) + &"\0".repeat(1000) + "yy";
        assert_eq!(Bench::new().run("truncates and syncs").cut(), [text(&holes), None]);
    }

    #[test]
    fn a_removal_counts_once_the_folder_is_synced() {
        assert_eq!(Bench::new().run("removes").cut(), [None, text("log")]);
        assert_eq!(Bench::new().run("removes for good").cut(), [None, None]);
        assert_eq!(Bench::new().run("removes and makes anew").cut(), [None, text("old log")]);
        assert_eq!(Bench::new().run("makes anew and syncs").cut(), [None, text("new")]);
    }

    #[test]
    fn a_new_file_is_there_once_it_or_its_folder_is_synced() {
        assert_eq!(Bench::new().run("makes and does not sync").cut(), [None, None]);
        assert_eq!(Bench::new().run("makes and syncs the folder").cut(), [None, text("")]);
    }

    #[test]
    fn a_full_disk_takes_what_fits_and_refuses_the_rest() {
        let bench = Bench::new();
        bench.disk.fill_up(250).unwrap();
        bench.run("fills the disk");
        assert_eq!(bench.cut(), [text(&"f".repeat(120)), None]);
        assert_eq!(bench.disk.counts().unwrap().refused, 2);
        assert_eq!(bench.disk.counts().unwrap().syncs, 1);
    }

    #[test]
    fn some_sectors_are_left_and_no_other_bytes_appear() {
        let (synced, written) = (vec![b's'; 5 * SECTOR], vec![b'w'; 9 * SECTOR + 7]);
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let left = mix(&synced, &written, &mut fastrand::Rng::with_seed(seed));
            assert!([synced.len(), written.len()].contains(&left.len()));
            for (number, sector) in left.chunks(SECTOR).enumerate() {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is torn");
                let fits = [Some(b'w'), Some(if number < 5 { b's' } else { 0 })].contains(&Some(sector[0]));
                assert!(fits, "sector {number} holds {}", sector[0]);
            }
            seen.insert(left);
        }
        assert!(seen.len() > 100);
        assert_eq!(differing_sectors(&synced, &written), 10);
        assert_eq!(differing_sectors(&written, &written), 0);
    }
}
