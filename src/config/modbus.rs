//! `[[modbus]]`: lines, their units, and what is set for all points of either.

use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::check::{DAY, EVER, MINUTE, SECOND, template};
use super::place::Place;
use super::quantity;
use super::raw::{LINE, POINT, UNIT};
use super::read::{Section, Walk};
use super::url;
use super::value::{self, Complaint};
use super::{ModbusLine, ModbusUnit, Parity, Point, SerialPort, Transport};
use crate::message::{Lane, Qos, Topic};
use crate::policy::deadband::Deadband;
use crate::policy::topic::Template;

const EVERY: RangeInclusive<Duration> = Duration::from_millis(50)..=DAY;
const LONGEST_SILENCE: RangeInclusive<Duration> = SECOND..=Duration::from_secs(30 * 86_400);
const EXPIRES_AFTER: RangeInclusive<Duration> = SECOND..=EVER;
const TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=MINUTE;
const TOPIC_DEFAULT: &str = "{gateway}/{line}/{unit}";
const PORT_DEFAULT: u16 = 502;
const BAUD_RATE: RangeInclusive<i64> = 300..=4_000_000;
const BAUD_RATE_DEFAULT: u32 = 9600;
/// Modbus over serial line V1.02 section 2.2: 0 is broadcast, 248 to 255 are reserved.
const UNIT_ON_SERIAL: RangeInclusive<i64> = 1..=247;
const UNIT_ON_TCP: RangeInclusive<i64> = 0..=255;

const RTU_KEYS: [&str; 4] = ["device", "baud_rate", "parity", "stop_bits"];
const TCP_KEYS: [&str; 2] = ["host", "port"];

/// Which of the two transports, before its settings are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rtu,
    Tcp,
}

const TRANSPORTS: [value::Choice<Kind>; 2] =
    [("rtu", Kind::Rtu, &["serial", "rs485", "rs-485"]), ("tcp", Kind::Tcp, &["modbus-tcp", "ethernet"])];
pub(super) const PARITIES: [value::Choice<Parity>; 3] =
    [("none", Parity::None, &["n", "no"]), ("even", Parity::Even, &["e"]), ("odd", Parity::Odd, &["o"])];
const LANES: [value::Choice<Lane>; 3] = [
    ("alarm", Lane::Alarm, &["high", "alarms"]),
    ("normal", Lane::Normal, &["default"]),
    ("bulk", Lane::Bulk, &["low"]),
];

/// What line, unit and point can each set; the innermost one holds.
#[derive(Clone)]
pub(super) struct Defaults {
    pub(super) every: Duration,
    pub(super) qos: Qos,
    pub(super) retain: bool,
    pub(super) lane: Lane,
    /// The template, and where it was given unless it is the default.
    pub(super) topic: (Template, Option<Place>),
    pub(super) deadband: Option<Deadband>,
    pub(super) longest_silence: Duration,
    pub(super) expires_after: Option<Duration>,
}

impl Defaults {
    pub(super) fn standard() -> Self {
        Defaults {
            every: SECOND,
            qos: Qos::AtLeastOnce,
            retain: false,
            lane: Lane::Normal,
            topic: (Template::parse(TOPIC_DEFAULT).expect("the default is a template"), None),
            deadband: None,
            longest_silence: 10 * MINUTE,
            expires_after: None,
        }
    }

    /// These settings with what the section says instead.
    pub(super) fn within(&self, walk: &mut Walk<'_>, section: Section<'_>) -> Self {
        let qos = walk.get(section, "qos", |value| {
            let number = value::integer(value, 0..=2)?;
            u64::try_from(number).ok().and_then(Qos::from_number).ok_or_else(|| Complaint::new("not a QoS"))
        });
        let retain = walk.get(section, "retain", value::boolean);
        let lane = walk.get(section, "lane", |value| value::choice(value, &LANES));
        let topic = walk.get(section, "topic", template);
        let deadband = walk.get(section, "deadband", value::deadband);
        let expires_after =
            walk.get(section, "expires_after", |value| quantity::duration(value, EXPIRES_AFTER));
        Defaults {
            every: walk.duration(section, "every", EVERY, self.every),
            qos: qos.map_or(self.qos, |qos| qos.value),
            retain: retain.map_or(self.retain, |retain| retain.value),
            lane: lane.map_or(self.lane, |lane| lane.value),
            topic: topic.map_or_else(|| self.topic.clone(), |topic| (topic.value, Some(topic.place))),
            deadband: deadband.map(|deadband| deadband.value).or(self.deadband),
            longest_silence: walk.duration(section, "longest_silence", LONGEST_SILENCE, self.longest_silence),
            expires_after: expires_after.map(|after| after.value).or(self.expires_after),
        }
    }
}

/// What must be unlike across the whole file, with the place of the first of its kind.
pub(super) struct Seen<'g> {
    pub(super) gateway: &'g str,
    /// How each topic is published, once for every way.
    pub(super) topics: HashMap<Topic, Vec<(Qos, Lane, Place)>>,
    lines: HashMap<String, Place>,
    devices: HashMap<PathBuf, Place>,
}

impl<'g> Seen<'g> {
    pub(super) fn new(gateway: &'g str) -> Self {
        Seen { gateway, topics: HashMap::new(), lines: HashMap::new(), devices: HashMap::new() }
    }

    /// Takes the name of a line.
    pub(super) fn claim(&mut self, line: &str, place: Place) {
        self.lines.insert(line.to_owned(), place);
    }
}

/// Every line, and every point of every unit in the order of the file.
pub(super) fn lines(
    walk: &mut Walk<'_>,
    root: Section<'_>,
    seen: &mut Seen<'_>,
) -> (Vec<ModbusLine>, Vec<Point>) {
    let mut points = Vec::new();
    let sections = walk.tables(root, "modbus", &LINE);
    let lines = sections.into_iter().map(|section| line(walk, section, seen, &mut points)).collect();
    (lines, points)
}

fn line(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    seen: &mut Seen<'_>,
    points: &mut Vec<Point>,
) -> ModbusLine {
    let name = name(walk, section, &mut seen.lines, "line");
    let kind = transport_kind(walk, section);
    let transport = match kind {
        Some(Kind::Rtu) => Transport::Rtu(serial_port(walk, section, &mut seen.devices)),
        Some(Kind::Tcp) | None => tcp(walk, section, kind.is_some()),
    };
    let patience = if kind == Some(Kind::Rtu) { SECOND } else { 3 * SECOND };
    let timeout = walk.duration(section, "timeout", TIMEOUT, patience);
    let reporting = Defaults::standard().within(walk, section);
    let sections = walk.tables(section, "unit", &UNIT);
    let mut names = HashMap::new();
    let mut numbers = HashMap::new();
    let mut units = Vec::with_capacity(sections.len());
    for section in sections {
        let unit_name = self::name(walk, section, &mut names, "unit");
        let number = unit_number(walk, section, kind, &mut numbers);
        let reporting = reporting.within(walk, section);
        let line_and_unit = (&name, &unit_name);
        let range = unit_points(walk, section, line_and_unit, &reporting, seen, points);
        units.push(ModbusUnit { name: unit_name, unit: number, points: range });
    }
    ModbusLine { name, transport, timeout, units }
}

fn unit_points(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    (line, unit): (&Arc<str>, &Arc<str>),
    reporting: &Defaults,
    seen: &mut Seen<'_>,
    points: &mut Vec<Point>,
) -> Range<usize> {
    let first = points.len();
    let mut names = HashMap::new();
    for section in walk.tables(section, "points", &POINT) {
        let reporting = reporting.within(walk, section);
        let point = name(walk, section, &mut names, "point");
        let id = crate::point::PointId { line: Arc::clone(line), unit: Arc::clone(unit), point };
        points.push(super::points::point(walk, section, id, &reporting, seen));
    }
    first..points.len()
}

/// The `name` of a line, unit or point, unlike the others of its kind.
fn name(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    seen: &mut HashMap<String, Place>,
    what: &str,
) -> Arc<str> {
    let found = walk.need(section, "name", |value| {
        let text = value::text(value)?;
        value::name(text).map(|()| text.to_owned())
    });
    // Stands in for a name that was refused, so that topics can still be checked.
    let Some(name) = found else { return Arc::from("unnamed") };
    if let Some(first) = seen.get(&name.value) {
        let message = format!("two {what}s are named {}", value::quoted(&name.value));
        walk.clash(name.place, message, *first, &format!("names tell {what}s apart: choose another one"));
    } else {
        seen.insert(name.value.clone(), name.place);
    }
    Arc::from(name.value)
}

fn unit_number(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    kind: Option<Kind>,
    seen: &mut HashMap<i64, Place>,
) -> u8 {
    let range = if kind == Some(Kind::Rtu) { UNIT_ON_SERIAL } else { UNIT_ON_TCP };
    let Some(number) = walk.need(section, "unit", |value| value::integer(value, range)) else { return 0 };
    if let Some(first) = seen.get(&number.value) {
        let message = format!("two units of this line have the unit identifier {}", number.value);
        walk.clash(number.place, message, *first, "list the points of one device under one [[modbus.unit]]");
    } else {
        seen.insert(number.value, number.place);
    }
    u8::try_from(number.value).unwrap_or(0)
}

/// Which transport, with the keys of the other one refused.
fn transport_kind(walk: &mut Walk<'_>, section: Section<'_>) -> Option<Kind> {
    let kind = walk.need(section, "transport", |value| match value::text(value)? {
        "rtu-over-tcp" => Err(Complaint::new("\"rtu-over-tcp\" is not supported yet")
            .help("many serial device servers can speak Modbus TCP themselves: then write \"tcp\"")),
        _ => value::choice(value, &TRANSPORTS),
    })?;
    let (foreign, own, other) = match kind.value {
        Kind::Rtu => (&TCP_KEYS[..], "rtu", "tcp"),
        Kind::Tcp => (&RTU_KEYS[..], "tcp", "rtu"),
    };
    for entry in section.table.entries.iter().filter(|entry| foreign.contains(&&*entry.key)) {
        let message = format!("`{}` is for transport \"{other}\", this line has \"{own}\"", entry.key);
        walk.wrong(entry.key_place, Complaint::new(message).help("remove it, or change `transport`"));
    }
    Some(kind.value)
}

fn tcp(walk: &mut Walk<'_>, section: Section<'_>, needed: bool) -> Transport {
    if needed {
        walk.must_have(section, "host");
    }
    let host = walk.get(section, "host", |value| {
        let text = value::text(value)?;
        match text.strip_prefix('[').and_then(|text| text.strip_suffix(']')) {
            Some(inner) => Err(Complaint::new("brackets are for URLs").help(format!("write \"{inner}\""))),
            None => Ok(url::host(text)?.to_owned()),
        }
    });
    let port = walk.get(section, "port", |value| value::integer(value, 1..=i64::from(u16::MAX)));
    let port = port.and_then(|port| u16::try_from(port.value).ok()).unwrap_or(PORT_DEFAULT);
    Transport::Tcp { host: host.map_or_else(String::new, |host| host.value), port }
}

fn serial_port(walk: &mut Walk<'_>, section: Section<'_>, seen: &mut HashMap<PathBuf, Place>) -> SerialPort {
    let device = walk.need(section, "device", |value| {
        let text = value::text(value)?;
        if text.starts_with('/') && !text.contains('\0') {
            return Ok(PathBuf::from(text));
        }
        let complaint = Complaint::new(format!("{} is not the full path of a device", value::quoted(text)));
        Err(complaint
            .help("write \"/dev/ttyUSB0\", or better a name from /dev/serial/by-id/, which stays the same"))
    });
    if let Some(device) = &device {
        // Two names of one device are seen through where the device is present.
        let real = std::fs::canonicalize(&device.value).unwrap_or_else(|_| device.value.clone());
        if let Some(first) = seen.get(&real) {
            let message = format!("two lines use the serial device {}", device.value.display());
            walk.clash(
                device.place,
                message,
                *first,
                "put all units of one serial port under one [[modbus]]",
            );
        } else {
            seen.insert(real, device.place);
        }
    }
    let baud_rate = walk.get(section, "baud_rate", |value| value::integer(value, BAUD_RATE));
    let parity = walk.get(section, "parity", |value| value::choice(value, &PARITIES));
    let parity = parity.map_or(Parity::Even, |parity| parity.value);
    let stop_bits = walk.get(section, "stop_bits", |value| value::integer(value, 1..=2));
    // A character has 11 bits (Modbus over serial line V1.02 section 2.5.1): without parity, a second stop bit.
    let stop_bits_default = if parity == Parity::None { 2 } else { 1 };
    SerialPort {
        device: device.map_or_else(|| Path::new("").to_owned(), |device| device.value),
        baud_rate: baud_rate.and_then(|rate| u32::try_from(rate.value).ok()).unwrap_or(BAUD_RATE_DEFAULT),
        parity,
        stop_bits: stop_bits.and_then(|bits| u8::try_from(bits.value).ok()).unwrap_or(stop_bits_default),
    }
}
