//! Modbus: the reads of a line (`plan`), what the registers mean (`register`), the wire (`client`) and the silence
//! between its frames (`silence`), what is asked to be written (`desk`), and the task that owns a line and joins them
//! (`line`).
//!
//! Here stands what a line is made of and what it reports about itself. Nothing here knows the configuration.

pub mod client;
pub mod desk;
pub mod line;
pub mod plan;
pub mod register;
pub mod silence;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Stamp;
use crate::point::{PointIndex, Value};
use crate::progress::Pulse;
pub use line::run;
use register::Encoding;

/// One of the four data tables (Modbus Application Protocol V1.1b3, section 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// Read-write bits, function 1.
    Coil,
    /// Read-only bits, function 2.
    DiscreteInput,
    /// Read-write registers, function 3.
    Holding,
    /// Read-only registers, function 4.
    Input,
}

impl Space {
    /// Whether the table holds single bits.
    pub fn is_bits(self) -> bool {
        matches!(self, Space::Coil | Space::DiscreteInput)
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Coil => "coil",
            Space::DiscreteInput => "discrete",
            Space::Holding => "holding",
            Space::Input => "input",
        })
    }
}

/// One serial line or Modbus TCP server: everything its task needs.
#[derive(Debug, Clone)]
pub struct Line {
    /// Its name in messages.
    pub name: Arc<str>,
    /// How it is reached.
    pub transport: Transport,
    /// How long a reply is waited for, not counting the time its bytes take on a serial line.
    pub timeout: Duration,
    /// What is done about replies that come too late on a serial line.
    pub late_replies: LateReplies,
    /// Its units.
    pub units: Vec<Unit>,
    /// Where its task says that it makes progress.
    pub pulse: Pulse,
}

impl Line {
    /// Whether the task of one would do what the task of the other does.
    pub fn is_like(&self, other: &Line) -> bool {
        let Line { name, transport, timeout, late_replies, units, pulse: _ } = self;
        *name == other.name
            && *transport == other.transport
            && *timeout == other.timeout
            && *late_replies == other.late_replies
            && *units == other.units
    }
}

/// One unit (a slave, on a serial line).
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Its name in messages.
    pub name: Arc<str>,
    /// Unit identifier: 1 to 247 on serial lines, 0 to 255 on TCP.
    pub unit: u8,
    /// Its points.
    pub points: Vec<LinePoint>,
}

/// One point of a unit.
#[derive(Debug, Clone, PartialEq)]
pub struct LinePoint {
    /// What its samples carry.
    pub index: PointIndex,
    /// Its name in messages.
    pub name: Arc<str>,
    /// Register type.
    pub space: Space,
    /// Address on the wire, from 0.
    pub address: u16,
    /// How registers become a value.
    pub encoding: Encoding,
    /// How often it is read; at least 1 ms.
    pub every: Duration,
    /// What may be written to it; `None`: nothing.
    pub writable: Option<Writable>,
}

/// What may be written to a point.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Writable {
    /// A coil: both of its values.
    Coil,
    /// Holding registers: numbers in this range, in the point's own unit. Both bounds can be held by the registers,
    /// so that rounding to the nearest step never leads out of it.
    Range {
        /// The least.
        min: f64,
        /// The most.
        max: f64,
    },
}

impl Writable {
    /// Whether this value may be written.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn check(self, value: &Value) -> Result<(), String> {
        match (self, value) {
            (Writable::Coil, Value::Bool(_)) => Ok(()),
            (Writable::Coil, _) => Err(format!("{value} is not true or false")),
            (Writable::Range { .. }, Value::Bool(_)) => Err(format!("{value} is not a number")),
            (Writable::Range { min, max }, _) if (min..=max).contains(&value.as_f64()) => Ok(()),
            (Writable::Range { min, max }, _) => Err(format!("{value} is not within {min} to {max}")),
        }
    }
}

/// How a line is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// Modbus TCP.
    Tcp {
        /// Host name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Modbus RTU on a serial port.
    Rtu(SerialPort),
}

/// A serial port's settings; 8 data bits, as RTU demands (Modbus over serial line V1.02, 2.5.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialPort {
    /// The device, best by a `/dev/serial/by-id/` name.
    pub device: PathBuf,
    /// Bits per second.
    pub baud_rate: u32,
    /// The parity bit.
    pub parity: Parity,
    /// 1 or 2.
    pub stop_bits: u8,
}

/// Parity of a serial port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parity {
    /// No parity bit.
    None,
    /// Even parity.
    Even,
    /// Odd parity.
    Odd,
}

/// What is done about a reply that comes after its timeout. RTU replies carry nothing that says which request
/// they answer, so one that is late would be taken for the answer to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LateReplies {
    /// Nothing is sent until the longest reply would have ended, and what arrives until then is thrown away.
    #[default]
    Discard,
    /// The next request follows at once. Wrong values are the result: this is here only so that the test of
    /// [`LateReplies::Discard`] can show that it would notice.
    Trust,
}

/// How a line and its units are doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LineStatus {
    /// The line's name.
    pub name: String,
    /// Whether the port or connection is open.
    pub up: bool,
    /// Why it is not, in words.
    pub error: Option<String>,
    /// Its units, in the order of [`Line::units`].
    pub units: Vec<UnitStatus>,
}

/// How a unit is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitStatus {
    /// The unit's name.
    pub name: String,
    /// Whether every one of its points was good when it was last read. False until the first poll.
    pub ok: bool,
    /// What went wrong last, in words; it stays after recovery.
    pub last_error: Option<String>,
    /// How often points of it were due and it was asked for them.
    pub polls: u64,
    /// How many of these polls had a bad sample.
    pub errors: u64,
    /// The same by the kind of the first fault, as [`Fault::kind`] names it.
    ///
    /// [`Fault::kind`]: crate::point::Fault::kind
    pub errors_by_kind: BTreeMap<&'static str, u64>,
    /// When it last gave a good sample.
    pub last_ok: Option<Stamp>,
}

impl LineStatus {
    /// The status of a line before its task has begun.
    pub fn of(line: &Line) -> Self {
        let unit = |unit: &Unit| UnitStatus { name: unit.name.to_string(), ..UnitStatus::default() };
        LineStatus {
            name: line.name.to_string(),
            units: line.units.iter().map(unit).collect(),
            ..LineStatus::default()
        }
    }
}
