//! One point: its registers, its type, and how it is reported.

use super::Point;
use super::check::render_topic;
use super::modbus::{Defaults, Seen};
use super::raw::{Value, WRITABLE};
use super::read::{Placed, Section, Walk};
use super::value::{self, Complaint};
use crate::message::Topic;
use crate::point::{PointId, Value as Number};
use crate::policy::Reporting;
use crate::policy::deadband::Deadband;
use crate::policy::topic::Names;
use crate::source::modbus::register::{Encoding, Kind, Order};
use crate::source::modbus::{Space, Writable};

const UNIT_CHARACTERS_MAX: usize = 32;

const SPACES: [value::Choice<Space>; 4] = [
    ("input", Space::Input, &["input_register", "input register", "ir"]),
    ("holding", Space::Holding, &["holding_register", "holding register", "hr"]),
    ("coil", Space::Coil, &["coils"]),
    ("discrete", Space::DiscreteInput, &["discrete_input", "discrete input", "di"]),
];
pub(super) const KINDS: [value::Choice<Kind>; 6] = [
    ("bool", Kind::Bool, &["boolean", "bit"]),
    ("u16", Kind::U16, &["uint16", "word", "uint"]),
    ("i16", Kind::I16, &["int16", "short", "int"]),
    ("u32", Kind::U32, &["uint32", "dword"]),
    ("i32", Kind::I32, &["int32", "long"]),
    ("f32", Kind::F32, &["float", "float32", "real"]),
];
pub(super) const ORDERS: [value::Choice<Order>; 4] = [
    ("abcd", Order::Abcd, &["big", "be"]),
    ("cdab", Order::Cdab, &["word_swap", "swapped"]),
    ("badc", Order::Badc, &["byte_swap"]),
    ("dcba", Order::Dcba, &["little", "le"]),
];

pub(super) fn point(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    id: PointId,
    defaults: &Defaults,
    seen: &mut Seen<'_>,
) -> Point {
    let (space, address) = register(walk, section);
    let encoding = encoding(walk, section, space, address);
    let writable = writable(walk, section, space, &encoding);
    let unit = walk.get(section, "unit", unit_of_measure).map(|unit| unit.value);
    let topic = topic(walk, section, &id, defaults, seen);
    let deadband = match (defaults.deadband, encoding.kind) {
        (None, _) => Deadband::None,
        // A bit moves by 1 or by 100 %: a wider band meant for its neighbours would hide every change of it.
        (Some(_), Kind::Bool) => Deadband::Absolute(0.0),
        (Some(deadband), _) => deadband,
    };
    let report = Reporting {
        id,
        topic,
        qos: defaults.qos,
        retain: defaults.retain,
        lane: defaults.lane,
        unit,
        deadband,
        longest_silence: defaults.longest_silence,
        expires_after: defaults.expires_after,
    };
    Point {
        space,
        address: address.map_or(0, |address| address.value),
        encoding,
        every: defaults.every,
        writable,
        report,
    }
}

/// Register type and wire address; an address in the manual's numbering names the register type as well.
fn register(walk: &mut Walk<'_>, section: Section<'_>) -> (Space, Option<Placed<u16>>) {
    let address = walk.need(section, "address", value::address);
    let implied = address.as_ref().and_then(|address| address.value.1);
    if implied.is_none() {
        walk.must_have(section, "register");
    }
    let space = walk.get(section, "register", |value| value::choice(value, &SPACES));
    if let (Some(address), Some(implied), Some(space)) = (&address, implied, &space)
        && implied != space.value
    {
        let message =
            format!("this address is a {implied} register's, but `register` is \"{}\"", space.value);
        let help = "the first digit says which: 0 coil, 1 discrete, 3 input, 4 holding";
        walk.wrong(address.place, Complaint::new(format!("`address`: {message}")).help(help));
    }
    let space = space.map(|space| space.value).or(implied).unwrap_or(Space::Holding);
    (space, address.map(|address| Placed { value: address.value.0, place: address.place }))
}

fn encoding(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    space: Space,
    address: Option<Placed<u16>>,
) -> Encoding {
    let registers_known = section.table.get("register").is_some() || section.table.get("address").is_some();
    if !space.is_bits() && registers_known {
        walk.must_have(section, "type");
    }
    let kind = walk.get(section, "type", |value| value::choice(value, &KINDS));
    if let Some(kind) = kind {
        let complaint = match (space.is_bits(), kind.value) {
            (true, Kind::Bool) => None,
            (true, _) => {
                Some(Complaint::new(format!("`type`: a {space} is one bit")).help("write type = \"bool\""))
            }
            (false, Kind::Bool) => Some(
                Complaint::new(format!("`type`: a register of type {space} is not one bit"))
                    .help("bool is for coils and discrete inputs; for a register write \"u16\""),
            ),
            (false, _) => None,
        };
        if let Some(complaint) = complaint {
            walk.wrong(kind.place, complaint);
        }
    }
    // A type that was refused is taken for one that the other keys of the point cannot contradict.
    let fallback = if space.is_bits() { Kind::Bool } else { Kind::U32 };
    let wide = kind.is_none_or(|kind| matches!(kind.value, Kind::U32 | Kind::I32 | Kind::F32));
    if let (Some(address), Some(_), true) = (address, kind, wide && !space.is_bits())
        && address.value == u16::MAX
    {
        let complaint =
            Complaint::new("`address`: a 32-bit value needs two registers, and 65535 is the last");
        walk.wrong(address.place, complaint.help("check the address, or the type"));
    }
    let kind = kind.map_or(fallback, |kind| kind.value);
    Encoding {
        kind,
        order: order(walk, section, wide && !space.is_bits()),
        scale: scale(walk, section, kind),
    }
}

fn order(walk: &mut Walk<'_>, section: Section<'_>, wide: bool) -> Order {
    let Some(order) = walk.get(section, "order", |value| value::choice(value, &ORDERS)) else {
        return Order::Abcd;
    };
    if !wide {
        let complaint = Complaint::new("`order` is for 32-bit types; this one has a single register or bit");
        walk.wrong(order.place, complaint.help("remove it"));
    }
    order.value
}

fn scale(walk: &mut Walk<'_>, section: Section<'_>, kind: Kind) -> Option<f64> {
    let scale = walk.get(section, "scale", value::scale)?;
    if kind == Kind::Bool {
        walk.wrong(
            scale.place,
            Complaint::new("`scale` is for numbers, and this is a bool").help("remove it"),
        );
    }
    Some(scale.value)
}

/// `true` for a coil, a range for holding registers. What may be written is never guessed: a range has both ends.
fn writable(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    space: Space,
    encoding: &Encoding,
) -> Option<Writable> {
    const RANGE: &str = "write the range that is safe, such as writable = { min = 0, max = 100 }";
    let node = &section.table.get("writable")?.node;
    let complaint = match (space, &node.value) {
        (_, Value::Bool(false)) => return None,
        (Space::DiscreteInput | Space::Input, _) => Complaint::new(format!(
            "`writable`: only coils and holding registers can be written, this is \"{space}\""
        ))
        .help("remove it"),
        (Space::Coil, Value::Bool(true)) => return Some(Writable::Coil),
        (Space::Coil, found) => Complaint {
            message: format!("`writable`: a coil has no range: expected true or false, found {found}"),
            help: Some("write writable = true".to_owned()),
        },
        (Space::Holding, Value::Table(_)) => {
            let range = walk.table(node, &WRITABLE)?;
            let bound = |walk: &mut Walk<'_>, key| {
                walk.need(range, key, |value| within(value, encoding)).map(|bound| bound.value)
            };
            let (min, max) = (bound(walk, "min"), bound(walk, "max"));
            let (min, max) = (min?, max?);
            if min <= max {
                return Some(Writable::Range { min, max });
            }
            Complaint::new(format!("`writable`: min is {min} and max is {max}")).help("swap them")
        }
        (Space::Holding, found) => {
            Complaint::new(format!("`writable`: expected a range, found {found}")).help(RANGE)
        }
    };
    walk.wrong(node.place, complaint);
    None
}

/// A bound that the registers can hold: rounding to their steps then never leads out of the range.
fn within(value: &Value, encoding: &Encoding) -> Result<f64, Complaint> {
    const ROUNDING: f64 = 1e-9;
    let number = match value {
        Value::Integer(number) => *number as f64,
        Value::Float(number) => *number,
        other => return Err(value::expected("a number in the point's own unit", other)),
    };
    let words = encoding.encode(&Number::Float(number)).map_err(|unfit| Complaint::new(unfit.to_string()))?;
    match encoding.decode(&words) {
        Ok(nearest) if (nearest.as_f64() - number).abs() <= ROUNDING * number.abs() => Ok(number),
        Ok(nearest) => Err(Complaint::new(format!("{number} is between two steps of the register"))
            .help(format!("the nearest value it can hold is {nearest}"))),
        Err(fault) => Err(Complaint::new(fault.to_string())),
    }
}

fn unit_of_measure(value: &Value) -> Result<String, Complaint> {
    let text = value::text(value)?;
    let length = text.chars().count();
    if !(1..=UNIT_CHARACTERS_MAX).contains(&length) || text.chars().any(char::is_control) {
        let limits =
            format!("a unit of measure has 1 to {UNIT_CHARACTERS_MAX} characters, no control characters");
        return Err(Complaint::new(format!("{} will not do: {limits}", value::quoted(text))));
    }
    Ok(text.to_owned())
}

/// The rendered topic, published like every other point on it (P4: order is kept per topic, QoS and lane).
pub(super) fn topic(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    id: &PointId,
    defaults: &Defaults,
    seen: &mut Seen<'_>,
) -> Topic {
    let place_of = |key| section.table.get(key).map(|entry| entry.node.place);
    let here = place_of("name").unwrap_or(section.table.place);
    let names = Names { gateway: seen.gateway, line: &id.line, unit: &id.unit, point: &id.point };
    let (template, given) = &defaults.topic;
    let topic = match render_topic(template, &names) {
        Ok(topic) => topic,
        Err(complaint) => {
            let message = format!("`topic`: {}", complaint.message);
            walk.wrong(given.unwrap_or(here), Complaint { message, ..complaint });
            return Topic::new("refused").expect("a plain word is a topic");
        }
    };
    let ways = seen.topics.entry(topic.clone()).or_default();
    let (qos, lane) = (defaults.qos, defaults.lane);
    if !ways.iter().any(|way| (way.0, way.1) == (qos, lane)) {
        let place = place_of("qos").or(place_of("lane")).unwrap_or(here);
        if let Some((first_qos, first_lane, first)) = ways.first() {
            let message = format!(
                "topic {} is used at {qos} in lane {lane} here, but at {first_qos} in lane {first_lane} at {}",
                value::quoted(topic.as_str()),
                walk.name_of(*first),
            );
            let help = "order is kept only within one QoS and lane: give one of them a topic of its own, such as \
                        topic = \"{gateway}/{line}/{unit}/{point}\"";
            walk.wrong(place, Complaint::new(message).help(help));
        }
        ways.push((qos, lane, place));
    }
    topic
}
