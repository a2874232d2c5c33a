//! What the store says in the log of a disk in trouble, and how often.
//!
//! Invariant: each commit may fail, for days, and many a second: what repeats goes through a [`Trouble`] of its own.

use std::fmt::Display;
use std::path::Path;

use tracing::{debug, error, info, warn};

use super::StoreError;
use crate::clock;
use crate::trouble::{Trouble, counted, span};

/// What was said, and when.
#[derive(Debug, Default)]
pub(super) struct Log {
    failure: Trouble,
    full: Trouble,
    reserve: Trouble,
}

impl Log {
    /// A transaction failed, or the database could not be opened again.
    pub(super) fn failed(&mut self, error: &StoreError) {
        match self.failure.happened(&error.to_string(), clock::mono_ms()) {
            Some(more) => error!(%error, "nothing is accepted until the database works again{more}"),
            None => debug!(%error, "the database failed again"),
        }
    }

    /// A transaction succeeded.
    pub(super) fn works(&mut self) {
        if let Some(ended) = self.failure.ended(clock::mono_ms()) {
            let (after, failures) = (span(ended.lasted_ms), counted(ended.times, "failure"));
            info!("the database takes messages again after {after}, {failures}");
        }
    }

    /// There is no space for more messages.
    pub(super) fn full(&mut self) {
        let what = "nothing is accepted, and what is queued is sent; make space, or lower [store] quota";
        match self.full.happened("", clock::mono_ms()) {
            Some(more) => error!("the disk is full{more}: {what}"),
            None => debug!("the disk is full again"),
        }
    }

    /// There is space again.
    pub(super) fn has_space(&mut self) {
        if let Some(ended) = self.full.ended(clock::mono_ms()) {
            info!("there is space on the disk again after {}: messages are accepted", span(ended.lasted_ms));
        }
    }

    /// Something about the space that is kept for a full disk. It works without, as long as the disk is not full.
    pub(super) fn reserve(&mut self, what: &str, file: &Path, error: &dyn Display) {
        if let Some(more) = self.reserve.happened(what, clock::mono_ms()) {
            warn!(%error, file = %file.display(), "{what}{more}");
        }
    }
}
