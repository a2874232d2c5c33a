//! Vocabulary of what is asked: a recorded command, one write to one point, and what became of either.
//!
//! Invariant (P8): what may or may not have been carried out is never called done, and never called failed.

use crate::clock::Stamp;
use crate::message::Message;
use crate::point::{PointIndex, Value};
use crate::turn::Inbound;

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

/// A command, as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its number: the order of arrival. Never used twice by one run of the agent.
    pub number: u64,
    /// Its id, once it was begun.
    pub id: Option<String>,
    /// What was received.
    pub inbound: Inbound,
    /// When.
    pub received: Stamp,
    /// How long ago that is, in milliseconds; `None` where another boot and an unset clock hide it.
    pub age_ms: Option<u64>,
}

/// One thing that becomes of a command, committed before anybody acts on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandStep {
    /// It is about to be carried out: its id is known from here on, and a crash leaves its end unknown.
    Begin {
        /// Its number.
        number: u64,
        /// Its id.
        id: String,
    },
    /// It has come to its end. The answer joins the outbox in the same transaction, above the quota if need be.
    Answer {
        /// Its number.
        number: u64,
        /// Its id, if it has a readable one.
        id: Option<String>,
        /// The answer.
        answer: Box<Message>,
    },
    /// It repeats one that waits: neither carried out nor answered.
    Forget {
        /// Its number.
        number: u64,
    },
}

/// What a committed step amounted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stepped {
    /// It is on the disk.
    Done,
    /// Its id belongs to an earlier command: this one is forgotten, and neither carried out nor answered.
    Repeated,
    /// There is no room for the answer even above the quota: nothing was done.
    NoRoom,
    /// There is no such command any more, because the database was damaged meanwhile: nothing was done. An answer is
    /// stored all the same.
    Gone,
}
