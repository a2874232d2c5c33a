//! Vocabulary of what is asked: one write to one point, and what became of it.
//!
//! Invariant (P8): what may or may not have been carried out is never called done, and never called failed.

use crate::clock::Stamp;
use crate::point::{PointIndex, Value};

/// Names one write from the moment it is asked for to its outcome; never used twice by one run of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// One write to one point that the configuration marks writable, its value already checked against the range.
#[derive(Debug, Clone, PartialEq)]
pub struct Write {
    /// Its name.
    pub ticket: Ticket,
    /// Which point.
    pub point: PointIndex,
    /// The value, in the point's own unit: scale and encoding are the source's business.
    pub value: Value,
    /// Not begun after this moment of the monotonic clock, in milliseconds; `None`: no limit.
    pub not_after_mono_ms: Option<u64>,
}

/// What became of a write.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The write's name.
    pub ticket: Ticket,
    /// When that was known.
    pub at: Stamp,
    /// What became of it.
    pub outcome: Outcome,
}

/// The ends a write can come to.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// What was read back afterwards is this value: the one that was asked for, as closely as the register can hold
    /// it. The device confirmed the request, or its reply was lost; then the value may have been there before, but the
    /// state is the one that was asked for.
    Done {
        /// What was read back.
        read_back: Value,
    },
    /// Certainly not so: nothing was sent, the device refused before it acted, or it confirmed the request and reads
    /// back as something else. Only the last has a `read_back`, and there the device may have acted in between: a
    /// coil that resets itself reads back as off.
    Failed {
        /// Why, in words.
        reason: String,
        /// What was read back, where it was.
        read_back: Option<Value>,
    },
    /// Its time was over before it could begin; nothing was sent.
    Expired,
    /// The request was sent, and neither the reply nor reading back told whether it was carried out, or will be.
    Unknown {
        /// Why, in words.
        reason: String,
    },
}
