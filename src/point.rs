//! Vocabulary of what is measured: points, values, and how far a value can be trusted.
//!
//! Invariant (P9): a value without an acquisition time and a quality cannot be expressed, and a bad sample
//! carries no value at all, so an old one can never be dressed as a fresh one.

use std::fmt;
use std::sync::Arc;

use crate::clock::Stamp;

/// Where a point is, as people name it: `line1/meter1/voltage`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PointId {
    /// Name of the serial line or TCP server; `gateway` for the machine itself.
    pub line: Arc<str>,
    /// Name of the unit on that line.
    pub unit: Arc<str>,
    /// Name of the point of that unit.
    pub point: Arc<str>,
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.line, self.unit, self.point)
    }
}

/// A point's place in the agent-wide table of points, given out in the order of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PointIndex(pub usize);

/// A decoded value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A coil, a discrete input, or one bit.
    Bool(bool),
    /// Any unscaled integer register type.
    Integer(i64),
    /// A floating-point or scaled value; always finite.
    Float(f64),
}

impl Value {
    /// The value as a number, for comparing against a dead band; a bool counts as 0 or 1.
    pub fn as_f64(&self) -> f64 {
        match self {
            Value::Bool(bit) => f64::from(u8::from(*bit)),
            Value::Integer(integer) => *integer as f64,
            Value::Float(float) => *float,
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(bit) => bit.fmt(f),
            Value::Integer(integer) => integer.fmt(f),
            Value::Float(float) => float.fmt(f),
        }
    }
}

/// Why there is no value. The text is what the person in front of the cabinet reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Fault {
    /// The unit did not answer in time.
    #[error("no answer within {waited_ms} ms")]
    Timeout {
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The unit answered with an exception code (Modbus Application Protocol V1.1b3, section 7).
    #[error("the unit refused: exception {code} ({})", exception_name(*.code))]
    Exception {
        /// The exception code.
        code: u8,
    },
    /// The unit answered something that does not fit the request.
    #[error("the reply does not fit the request: {what}")]
    BadReply {
        /// What does not fit, in words.
        what: String,
    },
    /// The register holds a float that is not a number or is infinite.
    #[error("the register holds {what}, which is not a number")]
    NotANumber {
        /// `NaN`, `inf` or `-inf`.
        what: String,
    },
    /// The serial port or TCP connection could not be used.
    #[error("line down: {what}")]
    LineDown {
        /// The operating system's reason.
        what: String,
    },
    /// A file of the machine could not be read, or does not say what it should.
    #[error("cannot be read: {what}")]
    Unreadable {
        /// The operating system's reason, or what the file holds.
        what: String,
    },
    /// The unit failed several times in a row and is now tried rarely.
    #[error("not tried: the unit has failed {failures} times in a row and is probed rarely")]
    Resting {
        /// Failures in a row so far.
        failures: u32,
    },
}

impl Fault {
    /// One stable word for payloads and counters.
    pub fn kind(&self) -> &'static str {
        match self {
            Fault::Timeout { .. } => "timeout",
            Fault::Exception { .. } => "exception",
            Fault::BadReply { .. } => "bad_reply",
            Fault::NotANumber { .. } => "not_a_number",
            Fault::LineDown { .. } => "line_down",
            Fault::Unreadable { .. } => "unreadable",
            Fault::Resting { .. } => "resting",
        }
    }
}

fn exception_name(code: u8) -> &'static str {
    match code {
        1 => "illegal function: the unit does not know this register type",
        2 => "illegal data address: check the address and its numbering base",
        3 => "illegal data value",
        4 => "server device failure",
        5 => "acknowledge: the unit needs more time",
        6 => "server device busy",
        8 => "memory parity error",
        10 => "gateway path unavailable",
        11 => "gateway target device failed to respond",
        _ => "not in the standard",
    }
}

/// One point, read once.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Which point.
    pub point: PointIndex,
    /// When it was read, taken at the source when the reply had arrived.
    pub at: Stamp,
    /// The value, or the reason why there is none.
    pub value: Result<Value, Fault>,
}

/// Everything one unit yielded at one due time.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The samples, in the order of the configuration.
    pub samples: Vec<Sample>,
}
