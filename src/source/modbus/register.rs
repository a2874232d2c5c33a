//! What registers mean: 16-bit words to a value, by type, word order and scale. Pure.

/// How registers (or one bit) become a value.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoding {
    /// The type.
    pub kind: Kind,
    /// The order of the bytes on the wire, for 32-bit types.
    pub order: Order,
    /// The decoded number is multiplied by this; `None` keeps an integer an integer.
    pub scale: Option<f64>,
}

/// A point's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One coil or discrete input.
    Bool,
    /// One register, unsigned.
    U16,
    /// One register, two's complement.
    I16,
    /// Two registers, unsigned.
    U32,
    /// Two registers, two's complement.
    I32,
    /// Two registers, IEEE 754 single precision.
    F32,
}

/// Where the bytes A (most significant) to D of a 32-bit value stand on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Big-endian, the standard's own.
    Abcd,
    /// Words swapped.
    Cdab,
    /// Bytes swapped within each word.
    Badc,
    /// Little-endian.
    Dcba,
}
