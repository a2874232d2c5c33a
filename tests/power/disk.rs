//! A disk that forgets: everything the store does to its files is written down, operation by operation, so that
//! the disk of any moment at which the power might have failed can be made.
//!
//! The store and SQLite work on real files, which are what the process sees. A VFS, registered as SQLite's
//! default, notes each write, truncate and sync; `rename`, `unlink` and `fsync` of the C library, which SQLite's
//! own VFS and `std::fs` call alike, are noted too, so that quarantine and salvage run as they are.
//! [`Disk`] plays such notes back and knows what is durable and what was never synced.
//!
//! Model: a write or truncate is durable after the next sync of its file, in whole 512-byte sectors. A directory
//! entry (new name, rename, unlink) is durable after a sync of the folder, or of the file it names; entries that
//! are not durable yet are lost from the newest backwards, as a journalling file system loses them. A sync that
//! fails leaves what it was asked to write down for ever undone, although the process goes on seeing it.
//! Not modelled: rot, misdirected writes, more than one process.

// SQLite asks for a VFS as a table of C functions, and the C library's functions can be replaced only by
// functions of the same name: neither can be said in safe Rust.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, OnceLock, PoisonError};

use fastrand::Rng;
use rusqlite::ffi;

/// What a sector-atomic disk writes at once.
const SECTOR: usize = 512;
/// What the store gives up on a full disk; its bytes do not matter.
const RESERVE: &str = ".reserve";
const RESERVE_BYTES: u64 = 4 << 20;

/// One file, whatever its name is now.
type Node = usize;

/// One thing done to the disk.
#[derive(Debug, Clone)]
pub enum Op {
    Write { node: Node, at: usize, bytes: Vec<u8> },
    Truncate { node: Node, size: usize },
    Sync { node: Node, failed: bool },
    Enter { name: String, node: Node },
    Rename { from: String, to: String },
    Unlink { name: String },
    SyncFolder,
}

/// What the disk is made to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A sync fails with EIO.
    Sync,
    /// A write finds no space.
    Write,
}

/// Everything that was done to one folder since [`record`].
#[derive(Debug, Default)]
pub struct Tape {
    folder: PathBuf,
    /// What was there, and durable, when recording began.
    pub before: BTreeMap<String, Vec<u8>>,
    pub ops: Vec<Op>,
    names: BTreeMap<String, Node>,
    nodes: Node,
    open: HashMap<usize, Node>,
    /// What is refused, from which occurrence on (the first is 1), and how often.
    refuse: Option<(Refusal, usize, usize)>,
    seen: [usize; 2],
    pub refused: usize,
    /// How far the tape had come at the first refusal.
    pub refused_at: Option<usize>,
}

thread_local! {
    static TAPE: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

fn with_tape<T>(work: impl FnOnce(&mut Tape) -> Option<T>) -> Option<T> {
    // While it is being put away there is nothing to note.
    TAPE.try_with(|tape| tape.try_borrow_mut().ok()?.as_mut().and_then(work)).ok().flatten()
}

/// Notes from now on what this thread does to the folder's files.
pub fn record(folder: &Path, refuse: Option<(Refusal, usize, usize)>) {
    register();
    let mut tape = Tape { folder: folder.to_owned(), refuse, ..Tape::default() };
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("the folder can be listed").path();
        let name = name_of(&path);
        let bytes =
            if name.ends_with(RESERVE) { Vec::new() } else { fs::read(&path).expect("a file can be read") };
        tape.before.insert(name, bytes);
    }
    tape.names = tape.before.keys().cloned().zip(0..).collect();
    tape.nodes = tape.names.len();
    TAPE.with(|slot| *slot.borrow_mut() = Some(tape));
}

/// Ends the recording.
pub fn stop() -> Tape {
    TAPE.with(|slot| slot.borrow_mut().take()).expect("a recording was begun")
}

/// Operations noted so far.
pub fn position() -> usize {
    with_tape(|tape| Some(tape.ops.len())).unwrap_or(0)
}

/// Refusals so far.
pub fn refusals() -> usize {
    with_tape(|tape| Some(tape.refused)).unwrap_or(0)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Tape {
    fn inside(&self, path: &Path) -> Option<String> {
        (path.parent() == Some(&self.folder)).then(|| name_of(path))
    }

    fn enter(&mut self, name: String) -> Node {
        if let Some(node) = self.names.get(&name) {
            return *node;
        }
        let node = self.nodes;
        self.nodes += 1;
        self.names.insert(name.clone(), node);
        self.ops.push(Op::Enter { name, node });
        node
    }

    /// The reserve is made and filled without the C library, so it is looked for.
    fn notice_reserve(&mut self) {
        let name = format!("outbox.db{RESERVE}");
        if !self.names.contains_key(&name) && self.folder.join(&name).exists() {
            self.enter(name);
        }
    }

    fn note(&mut self, op: Op) {
        self.notice_reserve();
        self.ops.push(op);
    }

    fn refuses(&mut self, what: Refusal) -> bool {
        self.seen[what as usize] += 1;
        let now = self.seen[what as usize];
        let refuses = self
            .refuse
            .is_some_and(|(kind, from, times)| kind == what && (from..from + times).contains(&now));
        if refuses {
            self.refused += 1;
            self.refused_at.get_or_insert(self.ops.len());
        }
        refuses
    }
}

// ---- the VFS -------------------------------------------------------------------------------------------

/// What SQLite's own VFS opens files with.
static OWN_OPEN: OnceLock<OpenFile> = OnceLock::new();
/// What SQLite is shown as an open file's methods, and behind it SQLite's own. It has a few such tables, one for
/// files with locks and one for files without; each gets its copy, kept for as long as the process lives.
#[repr(C)]
struct Methods {
    ours: ffi::sqlite3_io_methods,
    own: &'static ffi::sqlite3_io_methods,
}

static METHODS: Mutex<Vec<&'static Methods>> = Mutex::new(Vec::new());

type OpenFile = unsafe extern "C" fn(
    *mut ffi::sqlite3_vfs,
    ffi::sqlite3_filename,
    *mut ffi::sqlite3_file,
    c_int,
    *mut c_int,
) -> c_int;

/// A copy of SQLite's default VFS with `xOpen` replaced becomes the default, so that the store opens through it
/// unchanged.
fn register() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| unsafe {
        ffi::sqlite3_initialize();
        let own = ffi::sqlite3_vfs_find(std::ptr::null());
        let mut vfs = *own;
        OWN_OPEN.set(vfs.xOpen.expect("every VFS opens files")).expect("this is done once");
        vfs.zName = c"power".as_ptr();
        vfs.pNext = std::ptr::null_mut();
        vfs.xOpen = Some(open);
        // SQLite keeps the pointer for as long as the process lives.
        let registered = ffi::sqlite3_vfs_register(Box::leak(Box::new(vfs)), 1);
        assert_eq!(registered, ffi::SQLITE_OK);
    });
}

unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    path: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    unsafe {
        let Some(own) = OWN_OPEN.get() else { return ffi::SQLITE_CANTOPEN };
        let outcome = own(vfs, path, file, flags, out_flags);
        if outcome != ffi::SQLITE_OK || path.is_null() || (*file).pMethods.is_null() {
            return outcome;
        }
        (*file).pMethods = &raw const methods(&*(*file).pMethods).ours;
        let path = path_of(path);
        with_tape(|tape| {
            let name = tape.inside(&path)?;
            tape.notice_reserve();
            let node = tape.enter(name);
            tape.open.insert(file as usize, node)
        });
        outcome
    }
}

fn methods(own: &'static ffi::sqlite3_io_methods) -> &'static Methods {
    let mut known = METHODS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(methods) = known.iter().find(|methods| std::ptr::eq(methods.own, own)) {
        return methods;
    }
    let ours = ffi::sqlite3_io_methods {
        xClose: Some(close),
        xWrite: Some(write),
        xTruncate: Some(truncate),
        xSync: Some(sync),
        ..*own
    };
    let methods = &*Box::leak(Box::new(Methods { ours, own }));
    known.push(methods);
    methods
}

/// SQLite's own methods of a file that `open` has given ours.
unsafe fn own(file: *mut ffi::sqlite3_file) -> &'static ffi::sqlite3_io_methods {
    unsafe { (*(*file).pMethods.cast::<Methods>()).own }
}

fn node_of(tape: &Tape, file: *mut ffi::sqlite3_file) -> Option<Node> {
    tape.open.get(&(file as usize)).copied()
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    with_tape(|tape| tape.open.remove(&(file as usize)));
    unsafe { own(file).xClose.map_or(ffi::SQLITE_IOERR, |close| close(file)) }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    bytes: *const c_void,
    count: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    let full = with_tape(|tape| {
        let node = node_of(tape, file)?;
        if tape.refuses(Refusal::Write) {
            return Some(ffi::SQLITE_FULL);
        }
        let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), count as usize) }.to_vec();
        tape.note(Op::Write { node, at: at as usize, bytes });
        None
    });
    match full {
        Some(full) => full,
        None => unsafe { own(file).xWrite.map_or(ffi::SQLITE_IOERR, |write| write(file, bytes, count, at)) },
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    with_tape(|tape| {
        let node = node_of(tape, file)?;
        tape.note(Op::Truncate { node, size: size as usize });
        Some(())
    });
    unsafe { own(file).xTruncate.map_or(ffi::SQLITE_IOERR, |truncate| truncate(file, size)) }
}

/// Nothing is ever really synced: no test cuts the power of the machine it runs on.
unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    let failed = with_tape(|tape| {
        let node = node_of(tape, file)?;
        let failed = tape.refuses(Refusal::Sync);
        tape.note(Op::Sync { node, failed });
        Some(failed)
    });
    if failed == Some(true) { ffi::SQLITE_IOERR_FSYNC } else { ffi::SQLITE_OK }
}

// ---- what goes round SQLite ----------------------------------------------------------------------------

unsafe extern "C" {
    fn __errno_location() -> *mut c_int;
}

fn answer(outcome: rustix::io::Result<()>) -> c_int {
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            unsafe { *__errno_location() = error.raw_os_error() };
            -1
        }
    }
}

unsafe fn path_of(path: *const c_char) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()))
}

/// Takes the place of the C library's function for the whole program, `std::fs::rename` included.
#[unsafe(no_mangle)]
unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    let (from, to) = unsafe { (path_of(from), path_of(to)) };
    let outcome = rustix::fs::rename(&from, &to);
    if outcome.is_ok() {
        with_tape(|tape| {
            tape.notice_reserve();
            let (from, to) = (tape.inside(&from)?, tape.inside(&to)?);
            let node = tape.names.remove(&from).unwrap_or_else(|| tape.enter(from.clone()));
            tape.names.insert(to.clone(), node);
            tape.note(Op::Rename { from, to });
            Some(())
        });
    }
    answer(outcome)
}

/// The same for `unlink`, which SQLite's `xDelete` calls too.
#[unsafe(no_mangle)]
unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    let path = unsafe { path_of(path) };
    with_tape(|tape| {
        tape.notice_reserve();
        Some(())
    });
    let outcome = rustix::fs::unlink(&path);
    if outcome.is_ok() {
        with_tape(|tape| {
            let name = tape.inside(&path)?;
            tape.names.remove(&name);
            tape.note(Op::Unlink { name });
            Some(())
        });
    }
    answer(outcome)
}

fn sync_descriptor(descriptor: c_int) -> c_int {
    let path = fs::read_link(format!("/proc/self/fd/{descriptor}")).unwrap_or_default();
    with_tape(|tape| {
        if path == tape.folder {
            tape.note(Op::SyncFolder);
        }
        Some(())
    });
    // As above: it need not really happen.
    answer(rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(descriptor) }).map(drop))
}

/// The same for `fsync`.
#[unsafe(no_mangle)]
extern "C" fn fsync(descriptor: c_int) -> c_int {
    sync_descriptor(descriptor)
}

/// The same for `fdatasync`, with which SQLite syncs folders.
#[unsafe(no_mangle)]
extern "C" fn fdatasync(descriptor: c_int) -> c_int {
    sync_descriptor(descriptor)
}

// ---- playing it back -----------------------------------------------------------------------------------

/// What survives of that which was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    Everything,
    /// What was done up to some moment.
    Prefix,
    /// Any of it.
    Subset,
    /// Any sectors of any of it.
    Torn,
}

impl Keep {
    pub const ALL: [Keep; 5] = [Keep::Nothing, Keep::Everything, Keep::Prefix, Keep::Subset, Keep::Torn];
}

/// The files of a folder, as a start after the power cut finds them.
pub type Image = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Clone, Default)]
struct File {
    durable: Vec<u8>,
    /// With their places among everything that was done.
    pending: Vec<(usize, Op)>,
}

/// The disk after some of a tape's operations.
#[derive(Debug, Default)]
pub struct Disk {
    files: BTreeMap<Node, File>,
    names: BTreeMap<String, Node>,
    entries: Vec<(usize, Op)>,
    done: usize,
    /// Every sync is answered, none is made.
    pub lies: bool,
    /// Grows whenever what is durable changes.
    pub generation: usize,
}

impl Disk {
    pub fn new(before: &Image) -> Disk {
        let mut disk = Disk::default();
        for (node, (name, bytes)) in before.iter().enumerate() {
            disk.names.insert(name.clone(), node);
            disk.files.insert(node, File { durable: bytes.clone(), pending: Vec::new() });
        }
        disk
    }

    pub fn apply(&mut self, op: &Op) {
        let place = self.done;
        self.done += 1;
        match op {
            Op::Write { node, .. } | Op::Truncate { node, .. } => {
                self.files.entry(*node).or_default().pending.push((place, op.clone()));
            }
            Op::Enter { .. } | Op::Rename { .. } | Op::Unlink { .. } => {
                self.entries.push((place, op.clone()));
            }
            Op::Sync { .. } | Op::SyncFolder if self.lies => {}
            Op::Sync { node, failed: true } => {
                self.files.entry(*node).or_default().pending.clear();
            }
            Op::Sync { node, failed: false } => {
                let file = self.files.entry(*node).or_default();
                for (_, op) in std::mem::take(&mut file.pending) {
                    carry_out(&mut file.durable, &op);
                }
                let mut names = self.names.clone();
                let mut up_to = 0;
                for (index, (_, entry)) in self.entries.iter().enumerate() {
                    name(&mut names, entry);
                    let named = match entry {
                        Op::Enter { name, .. } | Op::Rename { to: name, .. } => names.get(name) == Some(node),
                        _ => false,
                    };
                    up_to = if named { index + 1 } else { up_to };
                }
                self.settle_entries(up_to);
            }
            Op::SyncFolder => self.settle_entries(self.entries.len()),
        }
    }

    fn settle_entries(&mut self, up_to: usize) {
        for (_, entry) in self.entries.drain(..up_to) {
            name(&mut self.names, &entry);
        }
        self.generation += 1;
    }

    /// Nothing waits for a sync.
    pub fn is_settled(&self) -> bool {
        self.entries.is_empty() && self.files.values().all(|file| file.pending.is_empty())
    }

    /// The disk as the power cut leaves it.
    pub fn cut(&self, keep: Keep, random: &mut Rng) -> Image {
        let oldest = self
            .files
            .values()
            .filter_map(|file| file.pending.first())
            .chain(self.entries.first())
            .map(|(place, _)| *place)
            .min()
            .unwrap_or(self.done);
        let moment = random.usize(oldest..=self.done);
        let entries = match keep {
            Keep::Nothing => 0,
            Keep::Everything => self.entries.len(),
            Keep::Prefix => self.entries.iter().take_while(|(place, _)| *place < moment).count(),
            Keep::Subset | Keep::Torn => random.usize(0..=self.entries.len()),
        };
        let mut names = self.names.clone();
        for (_, entry) in &self.entries[..entries] {
            name(&mut names, entry);
        }
        names
            .into_iter()
            .map(|(name, node)| {
                let mut bytes = Vec::new();
                if let Some(file) = self.files.get(&node) {
                    bytes.clone_from(&file.durable);
                    for (place, op) in &file.pending {
                        match keep {
                            Keep::Nothing => {}
                            Keep::Everything => carry_out(&mut bytes, op),
                            Keep::Prefix if *place < moment => carry_out(&mut bytes, op),
                            Keep::Subset if random.bool() => carry_out(&mut bytes, op),
                            Keep::Torn => tear(&mut bytes, op, random),
                            Keep::Prefix | Keep::Subset => {}
                        }
                    }
                }
                (name, bytes)
            })
            .collect()
    }
}

fn name(names: &mut BTreeMap<String, Node>, entry: &Op) {
    match entry {
        Op::Enter { name, node } => {
            names.insert(name.clone(), *node);
        }
        Op::Rename { from, to } => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
        Op::Unlink { name } => {
            names.remove(name);
        }
        _ => {}
    }
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if file.len() < at + bytes.len() {
        file.resize(at + bytes.len(), 0);
    }
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

fn carry_out(file: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write { at, bytes, .. } => put(file, *at, bytes),
        Op::Truncate { size, .. } => file.resize(*size, 0),
        _ => {}
    }
}

/// Each sector of a write, or not.
fn tear(file: &mut Vec<u8>, op: &Op, random: &mut Rng) {
    let Op::Write { at, bytes, .. } = op else {
        if random.bool() {
            carry_out(file, op);
        }
        return;
    };
    let mut from = 0;
    while from < bytes.len() {
        let to = bytes.len().min(((at + from) / SECTOR + 1) * SECTOR - at);
        if random.bool() {
            put(file, at + from, &bytes[from..to]);
        }
        from = to;
    }
}

/// Makes the folder hold what the image says.
pub fn lay_out(folder: &Path, image: &Image) {
    for entry in fs::read_dir(folder).expect("the folder is there") {
        fs::remove_file(entry.expect("the folder can be listed").path()).expect("a file can be removed");
    }
    for (name, bytes) in image {
        let path = folder.join(name);
        if name.ends_with(RESERVE) {
            let reserve = fs::File::create(path).expect("a file can be made");
            reserve.set_len(RESERVE_BYTES).expect("a file can be as long as it likes");
        } else {
            fs::write(path, bytes).expect("a file can be written");
        }
    }
}
