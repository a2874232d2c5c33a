//! What registers mean: 16-bit words to a value, by type, word order and scale. Pure.
//!
//! Invariant: a slice of the wrong length, a float that is not finite and a scale that overflows are faults,
//! never a panic and never a made-up value.

use crate::point::{Fault, Value};

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

/// Powers of ten up to this one are exact in an `f64`, and so is a decimal scale with so many digits.
const MOST_DECIMALS: i32 = 15;

/// Integers up to this one are exact in an `f64`.
const EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;

impl Encoding {
    /// How many registers (or bits, for [`Kind::Bool`]) the value takes.
    pub fn words(&self) -> u16 {
        match self.kind {
            Kind::Bool | Kind::U16 | Kind::I16 => 1,
            Kind::U32 | Kind::I32 | Kind::F32 => 2,
        }
    }

    /// The value of [`Self::words`] registers, scaled.
    ///
    /// # Errors
    /// [`Fault::BadReply`] when the number of registers does not fit the type, [`Fault::NotANumber`] when the
    /// registers hold NaN or an infinity, or the scaled value is one.
    pub fn decode_registers(&self, registers: &[u16]) -> Result<Value, Fault> {
        let integer = match (self.kind, registers) {
            (Kind::U16, &[word]) => i64::from(word),
            (Kind::I16, &[word]) => i64::from(word.cast_signed()),
            (Kind::U32, &[first, second]) => i64::from(self.order.join(first, second)),
            (Kind::I32, &[first, second]) => i64::from(self.order.join(first, second).cast_signed()),
            (Kind::F32, &[first, second]) => {
                let float = finite(widen(f32::from_bits(self.order.join(first, second))))?;
                let scaled = self.scale.map_or(float, |scale| fifteen_digits(scaled(float, scale)));
                return finite(scaled).map(Value::Float);
            }
            _ => return Err(self.wrong_length(registers.len())),
        };
        match self.scale {
            None => Ok(Value::Integer(integer)),
            Some(scale) => finite(scaled(integer as f64, scale)).map(Value::Float),
        }
    }

    /// The value of one coil or discrete input.
    ///
    /// # Errors
    /// [`Fault::BadReply`] when the type is not [`Kind::Bool`].
    pub fn decode_bit(&self, bit: bool) -> Result<Value, Fault> {
        match self.kind {
            Kind::Bool => Ok(Value::Bool(bit)),
            _ => Err(Fault::BadReply { what: format!("one bit cannot hold a {:?}", self.kind) }),
        }
    }

    fn wrong_length(&self, found: usize) -> Fault {
        Fault::BadReply { what: format!("{found} registers cannot hold a {:?}", self.kind) }
    }
}

impl Order {
    /// Two registers, in the order they came, to 32 bits.
    fn join(self, first: u16, second: u16) -> u32 {
        let (high, low) = match self {
            Order::Abcd => (first, second),
            Order::Cdab => (second, first),
            Order::Badc => (first.swap_bytes(), second.swap_bytes()),
            Order::Dcba => (second.swap_bytes(), first.swap_bytes()),
        };
        u32::from(high) << 16 | u32::from(low)
    }
}

/// The `f64` nearest to the shortest decimal that names this `f32`: the meter that shows 230.1 is reported
/// as 230.1, not as 230.10000610351563.
fn widen(float: f32) -> f64 {
    format!("{float:e}").parse().unwrap_or(f64::from(float))
}

/// Rounds to the digits an `f64` always holds: a scaled `f32` has at most 9 that mean anything.
fn fifteen_digits(number: f64) -> f64 {
    format!("{number:.14e}").parse().unwrap_or(number)
}

/// `number * scale` without binary dust: 3 * 0.1 is 0.3, not 0.30000000000000004. A scale of few decimals is
/// m / 10^k with both exact, so that only the one division rounds.
fn scaled(number: f64, scale: f64) -> f64 {
    for decimals in 0..=MOST_DECIMALS {
        let power = 10f64.powi(decimals);
        let mantissa = (scale * power).round();
        let product = number * mantissa;
        if product.abs() > EXACT_INTEGER {
            break;
        }
        if mantissa / power == scale {
            return product / power + 0.0; // + 0.0 makes a negative zero an ordinary one
        }
    }
    number * scale + 0.0
}

fn finite(float: f64) -> Result<f64, Fault> {
    if float.is_finite() { Ok(float) } else { Err(Fault::NotANumber { what: float.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ORDERS: [Order; 4] = [Order::Abcd, Order::Cdab, Order::Badc, Order::Dcba];

    fn encoding(kind: Kind, order: Order, scale: Option<f64>) -> Encoding {
        Encoding { kind, order, scale }
    }

    /// The two registers a device of this word order sends for the bytes A, B, C, D.
    fn on_the_wire(order: Order, [a, b, c, d]: [u8; 4]) -> [u16; 2] {
        let bytes = match order {
            Order::Abcd => [a, b, c, d],
            Order::Cdab => [c, d, a, b],
            Order::Badc => [b, a, d, c],
            Order::Dcba => [d, c, b, a],
        };
        [u16::from_be_bytes([bytes[0], bytes[1]]), u16::from_be_bytes([bytes[2], bytes[3]])]
    }

    #[test]
    fn one_register_is_one_integer_in_every_order() {
        let table = [
            (Kind::U16, 0x0000, 0),
            (Kind::U16, 0x1234, 0x1234),
            (Kind::U16, 0xFFFF, 65535),
            (Kind::I16, 0x7FFF, 32767),
            (Kind::I16, 0x8000, -32768),
            (Kind::I16, 0xFFFF, -1),
        ];
        for (kind, register, expected) in table {
            for order in ORDERS {
                let found = encoding(kind, order, None).decode_registers(&[register]);
                assert_eq!(found, Ok(Value::Integer(expected)), "{kind:?} {order:?} {register:#06x}");
            }
        }
    }

    #[test]
    fn two_registers_are_one_value_in_every_order() {
        let table = [
            (Kind::U32, [0x12, 0x34, 0x56, 0x78], Value::Integer(0x1234_5678)),
            (Kind::U32, [0xFF, 0xFF, 0xFF, 0xFF], Value::Integer(4_294_967_295)),
            (Kind::I32, [0x12, 0x34, 0x56, 0x78], Value::Integer(0x1234_5678)),
            (Kind::I32, [0x80, 0x00, 0x00, 0x00], Value::Integer(-2_147_483_648)),
            (Kind::I32, [0xFF, 0xFF, 0xFF, 0xFE], Value::Integer(-2)),
            (Kind::F32, 230.1f32.to_be_bytes(), Value::Float(230.1)),
            (Kind::F32, (-0.05f32).to_be_bytes(), Value::Float(-0.05)),
            (Kind::F32, 1e-40f32.to_be_bytes(), Value::Float(1e-40)),
            (Kind::F32, f32::MAX.to_be_bytes(), Value::Float(3.4028235e38)),
        ];
        for (kind, bytes, expected) in table {
            for order in ORDERS {
                let found = encoding(kind, order, None).decode_registers(&on_the_wire(order, bytes));
                assert_eq!(found, Ok(expected.clone()), "{kind:?} {order:?} {bytes:02x?}");
            }
        }
    }

    #[test]
    fn the_orders_differ_as_the_wire_does() {
        let table = [
            (Order::Abcd, 0x1234_5678),
            (Order::Cdab, 0x5678_1234),
            (Order::Badc, 0x3412_7856),
            (Order::Dcba, 0x7856_3412),
        ];
        for (order, expected) in table {
            let found = encoding(Kind::U32, order, None).decode_registers(&[0x1234, 0x5678]);
            assert_eq!(found, Ok(Value::Integer(expected)), "{order:?}");
        }
    }

    #[test]
    fn scaled_values_are_the_decimals_people_expect() {
        let table: [(Kind, &[u16], f64, &str); 16] = [
            (Kind::U16, &[3], 0.1, "0.3"),
            (Kind::U16, &[30], 0.01, "0.3"),
            (Kind::U16, &[7], 0.1, "0.7"),
            (Kind::U16, &[2301], 0.1, "230.1"),
            (Kind::U16, &[0], 0.1, "0"),
            (Kind::I16, &[0], -0.1, "0"),
            (Kind::I16, &[0xFFFD], 0.1, "-0.3"),
            (Kind::I16, &[3], -0.001, "-0.003"),
            (Kind::U16, &[3], 0.3, "0.9"),
            (Kind::U16, &[7], 0.15, "1.05"),
            (Kind::U16, &[3], 10.0, "30"),
            (Kind::U16, &[3], 1.5, "4.5"),
            (Kind::U32, &[0xFFFF, 0xFFFF], 0.01, "42949672.95"),
            (Kind::I32, &[0x8000, 0x0000], 0.001, "-2147483.648"),
            (Kind::U16, &[9], 1.0 / 3.0, "3"),
            (Kind::F32, &[0x4366, 0x199A], 0.1, "23.01"),
        ];
        for (kind, registers, scale, expected) in table {
            let found = encoding(kind, Order::Abcd, Some(scale)).decode_registers(registers).unwrap();
            assert!(matches!(found, Value::Float(_)), "scaled values are floats");
            assert_eq!(found.to_string(), expected, "{kind:?} {registers:?} * {scale}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_a_fault() {
        for (float, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
            for order in ORDERS {
                for scale in [None, Some(0.1)] {
                    let registers = on_the_wire(order, float.to_be_bytes());
                    let found = encoding(Kind::F32, order, scale).decode_registers(&registers);
                    assert_eq!(
                        found,
                        Err(Fault::NotANumber { what: name.to_owned() }),
                        "{order:?} {scale:?}"
                    );
                }
            }
        }
        let overflow = encoding(Kind::F32, Order::Abcd, Some(1e300)).decode_registers(&[0x7F7F, 0xFFFF]);
        assert_eq!(overflow, Err(Fault::NotANumber { what: "inf".to_owned() }));
    }

    #[test]
    fn a_bit_is_a_bool_and_nothing_else() {
        assert_eq!(encoding(Kind::Bool, Order::Abcd, None).decode_bit(true), Ok(Value::Bool(true)));
        assert_eq!(encoding(Kind::Bool, Order::Abcd, None).decode_bit(false), Ok(Value::Bool(false)));
        assert!(encoding(Kind::U16, Order::Abcd, None).decode_bit(true).is_err());
        assert!(encoding(Kind::Bool, Order::Abcd, None).decode_registers(&[1]).is_err());
    }

    #[test]
    fn a_wrong_number_of_registers_is_a_fault() {
        for kind in [Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32] {
            let encoding = encoding(kind, Order::Abcd, None);
            for length in 0..5u16 {
                let found = encoding.decode_registers(&vec![0; length.into()]);
                assert_eq!(found.is_ok(), length == encoding.words(), "{kind:?} of {length}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_registers_and_no_scale_can_cause_a_panic_or_an_endless_number(
            registers in proptest::collection::vec(any::<u16>(), 0..4),
            kind in 0usize..6, order in 0usize..4, scale in proptest::option::of(any::<f64>()),
        ) {
            let kind = [Kind::Bool, Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32][kind];
            if let Ok(value) = encoding(kind, ORDERS[order], scale).decode_registers(&registers) {
                prop_assert!(value.as_f64().is_finite());
            }
        }

        #[test]
        fn a_widened_float_is_still_the_same_float(bits in any::<u32>()) {
            let float = f32::from_bits(bits);
            if float.is_finite() {
                prop_assert_eq!(widen(float) as f32, float);
            }
        }

        #[test]
        fn a_decimal_scale_gives_the_decimal(number in -100_000i32..100_000, decimals in 0u32..6) {
            let scale: f64 = format!("1e-{decimals}").parse().unwrap();
            let expected: f64 = format!("{number}e-{decimals}").parse().unwrap();
            prop_assert_eq!(scaled(f64::from(number), scale), expected);
        }
    }
}
