//! Modbus: the reads of a line (`plan`), what the registers mean (`register`), and the line itself (`client`).

pub mod client;
pub mod plan;
pub mod register;

use std::fmt;

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
