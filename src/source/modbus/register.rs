//! What registers mean: 16-bit words to a value and back, by type, word order and scale. Pure.
//!
//! Invariant: a slice of the wrong length, a float that is not finite and a scale that overflows are faults,
//! never a panic and never a made-up value. What is encoded decodes to the nearest value the registers can hold.

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

/// What is written for one value: which of these it is decides the function that writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// One coil.
    Bit(bool),
    /// One register.
    One(u16),
    /// Two registers, in the order they are sent.
    Two([u16; 2]),
}

/// Why a value cannot be written to a point.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// A number for a bit, a bit for a number, or no number at all.
    #[error("{value} is not a value of type {}", .kind.name())]
    Type {
        /// The value.
        value: Value,
        /// The point's type.
        kind: Kind,
    },
    /// The registers cannot hold it.
    #[error("{value} is beyond what the type {} can hold{}", .kind.name(), scaled_by(*.scale))]
    Range {
        /// The value.
        value: Value,
        /// The point's type.
        kind: Kind,
        /// The point's scale.
        scale: Option<f64>,
    },
}

fn scaled_by(scale: Option<f64>) -> String {
    scale.map_or_else(String::new, |scale| format!(" at a scale of {scale}"))
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

impl Kind {
    /// Its name in the configuration.
    fn name(self) -> &'static str {
        match self {
            Kind::Bool => "bool",
            Kind::U16 => "u16",
            Kind::I16 => "i16",
            Kind::U32 => "u32",
            Kind::I32 => "i32",
            Kind::F32 => "f32",
        }
    }
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

    /// What is sent to write `value`: the registers that decode to the nearest value they can hold. A number half
    /// way between two steps goes away from zero. Reading back gives [`Self::decode`] of these words, which is not
    /// `value` where `value` is between two steps.
    ///
    /// # Errors
    /// [`Unfit`]: the value has another type, is not finite, or is beyond the registers' range.
    pub fn encode(&self, value: &Value) -> Result<Words, Unfit> {
        let unfit = || Unfit::Type { value: value.clone(), kind: self.kind };
        let number = match (self.kind, value) {
            (Kind::Bool, &Value::Bool(bit)) => return Ok(Words::Bit(bit)),
            (Kind::Bool, _) | (_, Value::Bool(_)) => return Err(unfit()),
            (_, value) => value.as_f64(),
        };
        if !number.is_finite() {
            return Err(unfit());
        }
        let raw = self.scale.map_or(number, |scale| number / scale);
        // Every type's limits are exact in an f64, and a whole number beyond 2^53 is beyond all of them.
        let whole = |min: f64, max: f64| Some(raw.round()).filter(|raw| (min..=max).contains(raw));
        let two = |bits: u32| Words::Two(self.order.cut(bits));
        let words = match self.kind {
            Kind::Bool => None,
            Kind::U16 => whole(0.0, u16::MAX.into()).map(|raw| Words::One(raw as u16)),
            Kind::I16 => {
                whole(i16::MIN.into(), i16::MAX.into()).map(|raw| Words::One((raw as i16).cast_unsigned()))
            }
            Kind::U32 => whole(0.0, u32::MAX.into()).map(|raw| two(raw as u32)),
            Kind::I32 => whole(i32::MIN.into(), i32::MAX.into()).map(|raw| two((raw as i32).cast_unsigned())),
            Kind::F32 => Some(raw as f32).filter(|raw| raw.is_finite()).map(|raw| two(raw.to_bits())),
        };
        words.ok_or_else(|| Unfit::Range { value: value.clone(), kind: self.kind, scale: self.scale })
    }

    /// The value of these words.
    ///
    /// # Errors
    /// As [`Self::decode_registers`] and [`Self::decode_bit`].
    pub fn decode(&self, words: &Words) -> Result<Value, Fault> {
        match words {
            Words::Bit(bit) => self.decode_bit(*bit),
            Words::One(register) => self.decode_registers(&[*register]),
            Words::Two(registers) => self.decode_registers(registers),
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

    /// 32 bits to two registers, in the order they are sent: the inverse of [`Self::join`].
    fn cut(self, bits: u32) -> [u16; 2] {
        let (high, low) = ((bits >> 16) as u16, bits as u16);
        match self {
            Order::Abcd => [high, low],
            Order::Cdab => [low, high],
            Order::Badc => [high.swap_bytes(), low.swap_bytes()],
            Order::Dcba => [low.swap_bytes(), high.swap_bytes()],
        }
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

    #[test]
    fn a_value_is_encoded_as_the_nearest_step_or_refused() {
        use Value::{Bool, Float, Integer};
        let one = |raw: u16| Some(Words::One(raw));
        let table = [
            (Kind::Bool, None, Bool(true), Some(Words::Bit(true))),
            (Kind::Bool, None, Integer(1), None),
            (Kind::U16, None, Bool(true), None),
            (Kind::U16, None, Integer(65_535), one(65_535)),
            (Kind::U16, None, Integer(65_536), None),
            (Kind::U16, None, Integer(-1), None),
            (Kind::U16, None, Float(2.4), one(2)),
            (Kind::U16, None, Float(2.5), one(3)),
            (Kind::U16, None, Float(65_535.5), None),
            (Kind::U16, None, Float(f64::NAN), None),
            (Kind::U16, None, Float(f64::INFINITY), None),
            (Kind::U16, Some(0.1), Float(21.5), one(215)),
            (Kind::U16, Some(0.1), Float(0.3), one(3)),
            (Kind::U16, Some(0.1), Float(6_553.6), None),
            (Kind::U16, Some(-1.0), Integer(-5), one(5)),
            (Kind::I16, None, Integer(-1), one(0xFFFF)),
            (Kind::I16, None, Integer(-32_769), None),
            (Kind::U32, None, Integer(0x1234_5678), Some(Words::Two([0x1234, 0x5678]))),
            (Kind::U32, None, Integer(i64::MAX), None),
            (Kind::I32, None, Integer(-2), Some(Words::Two([0xFFFF, 0xFFFE]))),
            (Kind::F32, None, Float(230.1), Some(Words::Two([0x4366, 0x199A]))),
            (Kind::F32, None, Float(1e39), None),
            (Kind::F32, Some(1e-300), Float(1e300), None),
        ];
        for (kind, scale, value, expected) in table {
            let found = encoding(kind, Order::Abcd, scale).encode(&value);
            assert_eq!(found.ok(), expected, "{kind:?} {scale:?} {value:?}");
        }
    }

    proptest! {
        #[test]
        fn what_was_read_can_be_written_back_and_reads_the_same(
            registers in any::<[u16; 2]>(), kind in 1usize..6, order in 0usize..4,
            scale in proptest::option::of(prop_oneof![
                (0u32..6).prop_map(|decimals| format!("1e-{decimals}").parse::<f64>().unwrap()),
                0.001f64..1000.0,
                -1000.0f64..-0.001,
            ]),
        ) {
            let kind = [Kind::Bool, Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32][kind];
            let encoding = encoding(kind, ORDERS[order], scale);
            let registers = &registers[..encoding.words().into()];
            if let Ok(value) = encoding.decode_registers(registers)
                && value.as_f64().abs() < 1e35
            {
                let words = encoding.encode(&value).unwrap();
                let again = encoding.decode(&words).unwrap();
                if kind != Kind::F32 {
                    prop_assert_eq!(&again, &value);
                    prop_assert!(matches!(
                        (words, registers),
                        (Words::One(a), &[b]) if a == b
                    ) || matches!((words, registers), (Words::Two(a), b) if a == b));
                }
                // A scaled f32 may fall on its neighbour: one part in 2^23, or one step next to zero.
                let (again, value) = (again.as_f64(), value.as_f64());
                let step = f64::from(f32::from_bits(1)) * scale.unwrap_or(1.0).abs();
                prop_assert!((again - value).abs() <= value.abs() * 1.2e-7 + step, "{} {}", again, value);
            }
        }

        #[test]
        fn no_value_and_no_scale_can_make_encoding_panic(
            number in any::<f64>(), integer in any::<i64>(),
            kind in 0usize..6, order in 0usize..4, scale in proptest::option::of(any::<f64>()),
        ) {
            let kind = [Kind::Bool, Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32][kind];
            let encoding = encoding(kind, ORDERS[order], scale);
            let _fits_or_not = encoding.encode(&Value::Float(number));
            let _fits_or_not = encoding.encode(&Value::Integer(integer));
        }

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
