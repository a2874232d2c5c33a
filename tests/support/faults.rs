//! Faults below the agent: a library for LD_PRELOAD, compiled from `tests/support_faults/shim.c`, and its switches.
//!
//! Invariant: a test without a C compiler fails and says so; nothing is skipped.

use super::agent::Agent;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// What can be turned, in the order of the shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// errno of a failing sync.
    SyncError,
    /// So many syncs succeed before.
    SyncGood,
    /// So many syncs fail then; -1: all.
    SyncBad,
    /// Milliseconds each sync takes longer.
    SyncDelayMs,
    /// errno of every pwrite; -1: says that it wrote, and did not.
    WriteError,
    /// errno of every open for writing, mkdir, unlink and rename.
    OpenError,
    /// Milliseconds the wall clock is ahead.
    ClockOffsetMs,
    /// 0: what the kernel says; 1: the wall clock is not synchronised; 2: it is.
    ClockState,
    /// Counted by the shim: syncs.
    Syncs,
    /// Counted by the shim: calls that were failed or swallowed.
    Failures,
}

/// Numbers in the file of switches.
const SWITCHES: usize = Switch::Failures as usize + 1;

/// The switches of one agent.
#[derive(Debug)]
pub struct Shim {
    file: File,
}

impl Shim {
    /// Puts the shim below this agent, from its next start on.
    pub fn below(agent: &mut Agent) -> Shim {
        let path = agent.dir().join("faults");
        fs::write(&path, [0; SWITCHES * 8]).expect("the temporary directory can be written");
        agent.set_env("LD_PRELOAD", library());
        agent.set_env("FIELDPOST_TEST_FAULTS", path.clone());
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        Shim { file: file.expect("it was just written") }
    }

    /// Turns a switch.
    pub fn set(&self, switch: Switch, value: i64) {
        let at = switch as u64 * 8;
        self.file.write_all_at(&value.to_le_bytes(), at).expect("the file can be written");
    }

    /// How a switch stands.
    pub fn get(&self, switch: Switch) -> i64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, switch as u64 * 8).expect("the file can be read");
        i64::from_le_bytes(bytes)
    }
}

/// The shim as a library, compiled if this version of it was not yet. Panics, with the compiler's words, if it cannot.
fn library() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support_faults/shim.c");
    let code = fs::read(&source).expect("the shim's source is there");
    let Some(folder) = option_env!("CARGO_TARGET_TMPDIR") else {
        panic!("only integration tests have a place for it");
    };
    let folder = Path::new(folder);
    let library = folder.join(format!("shim-{}-{:08x}.so", std::env::consts::ARCH, crc32c::crc32c(&code)));
    if !library.exists() {
        // Several tests may be at it.
        let own = folder.join(format!("shim-{}.so", std::process::id()));
        let mut cc = super::c_compiler();
        cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-o"]).arg(&own).arg(&source).arg("-ldl");
        let output = cc.output().unwrap_or_else(|error| panic!("cc cannot be run ({error}): install gcc"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::rename(&own, &library).expect("both are in one folder");
    }
    library
}
