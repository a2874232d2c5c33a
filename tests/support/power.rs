//! Power cuts for a real process: a preloaded library (`../support_power/power.c`) keeps beside each database file
//! what a sync has put on the disk, and the cut puts that in the file's place.
//!
//! Invariant: what was synced is there after a cut, and what was not is gone. After each kill one of [`cut`] and
//! [`write_back`] is called.

use std::fs;
use std::path::{Path, PathBuf};

/// Builds the library into `dir`. Panics, with the compiler's words, if it cannot.
pub fn library(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support_power/power.c");
    let library = dir.join("power.so");
    let mut compiler = super::c_compiler();
    compiler
        .args(["-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(&source)
        .arg("-ldl");
    let output = compiler.output().expect("a C compiler is needed for this test: apt-get install gcc");
    assert!(output.status.success(), "cc: {}", String::from_utf8_lossy(&output.stderr));
    library
}

/// After a kill without a cut: the kernel still writes what the process had written.
pub fn write_back(database: &Path) {
    for file in ["", "-wal"].map(|suffix| with_suffix(database, suffix)) {
        if let Ok(written) = fs::read(&file) {
            fs::write(with_suffix(&file, ".disk"), written).expect("the database's folder can be written");
        }
    }
}

/// Cuts the power of a database whose process has just been killed. Returns whether anything was lost.
pub fn cut(database: &Path) -> bool {
    let mut lost = false;
    for suffix in ["", "-wal"] {
        let file = with_suffix(database, suffix);
        let disk = with_suffix(&file, ".disk");
        // A file that never was opened under the library was never synced either.
        let Ok(synced) = fs::read(&disk) else { continue };
        lost |= fs::read(&file).unwrap_or_default() != synced;
        fs::write(&file, synced).expect("the database's folder can be written");
    }
    lost
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}
