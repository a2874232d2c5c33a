//! Files that hold secrets: passwords, our private key, the token of the HTTP interface.
//!
//! Invariant: one that every user of the machine may read is not used, or nobody would notice.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Why a file with a secret is not used.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// It cannot be opened or read.
    Io(io::Error),
    /// Users other than its owner and group may use it.
    Open {
        /// Its permission bits.
        mode: u32,
    },
}

/// Opens the file for reading.
pub(crate) fn open(path: &Path) -> Result<File, Unusable> {
    let file = File::open(path).map_err(Unusable::Io)?;
    // Asked of the open file: the path may lead elsewhere a moment later.
    match file.metadata().map_err(Unusable::Io)?.mode() & 0o777 {
        mode if mode & 0o007 == 0 => Ok(file),
        mode => Err(Unusable::Open { mode }),
    }
}

/// What the file says; a line break at its end is not part of the secret.
pub(crate) fn read(path: &Path) -> Result<String, Unusable> {
    let mut text = String::new();
    open(path)?.read_to_string(&mut text).map_err(Unusable::Io)?;
    text.truncate(text.trim_end_matches(['\r', '\n']).len());
    Ok(text)
}
