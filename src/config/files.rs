//! What the password file, the key and the certificates hold, as numbers: other contents are another configuration.
//!
//! Invariant (P10): of the contents only these numbers are kept, and they are never shown.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read;
use std::path::Path;

use super::Broker;

/// Larger than any certificate; beyond it a change is not noticed.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Stands for the contents of one file; for none where there is no such file or it cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Contents(Option<u64>);

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Contents")
    }
}

/// The contents of a broker's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Files {
    /// Of `password_file`.
    pub password_file: Contents,
    /// Of `ca_file`.
    pub ca_file: Contents,
    /// Of `cert_file`.
    pub cert_file: Contents,
    /// Of `key_file`.
    pub key_file: Contents,
}

impl Files {
    /// As they are at this moment.
    pub(super) fn of(broker: &Broker) -> Self {
        let tls = broker.tls.as_ref();
        Files {
            password_file: contents(broker.password_file.as_deref()),
            ca_file: contents(tls.and_then(|tls| tls.ca_file.as_deref())),
            cert_file: contents(tls.and_then(|tls| tls.cert_file.as_deref())),
            key_file: contents(tls.and_then(|tls| tls.key_file.as_deref())),
        }
    }

    /// One number for all of them.
    pub fn number(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

fn contents(path: Option<&Path>) -> Contents {
    // Nothing but a file: what a pipe holds is gone once it is read.
    let Some(path) = path.filter(|path| path.is_file()) else { return Contents::default() };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(READ_BYTES_MAX).read_to_end(&mut bytes));
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    Contents(read.is_ok().then(|| hasher.finish()))
}
