//! Files that hold secrets: the password, our private key.
//!
//! Invariant: one that every user of the machine may read is not used, or nobody would notice.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Why a file with a secret is not used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It cannot be opened.
    Io(io::Error),
    /// Users other than its owner and group may use it.
    Open {
        /// Its permission bits.
        mode: u32,
    },
}

/// Opens the file for reading.
pub(super) fn open(path: &Path) -> Result<File, Unusable> {
    let file = File::open(path).map_err(Unusable::Io)?;
    // Asked of the open file: the path may lead elsewhere a moment later.
    match file.metadata().map_err(Unusable::Io)?.mode() & 0o777 {
        mode if mode & 0o007 == 0 => Ok(file),
        mode => Err(Unusable::Open { mode }),
    }
}
