//! `[machine]`: what is told of the machine itself, as points like any other.

use std::collections::HashMap;
use std::time::Duration;

use super::check::MINUTE;
use super::modbus::{Defaults, Seen};
use super::place::Place;
use super::points::topic;
use super::raw::{MACHINE, MACHINE_POINT};
use super::read::{Section, Walk};
use super::value;
use super::{Machine, MachinePoint};
use crate::point::PointId;
use crate::policy::Reporting;
use crate::policy::deadband::Deadband;
use crate::source::machine::{LINE, Sensor, UNIT};

const HOUR: Duration = Duration::from_secs(3600);

const SENSORS: [value::Choice<Sensor>; 18] = [
    ("cpu_temperature", Sensor::CpuTemperature, &["temperature", "cpu_temp", "temp"]),
    ("under_voltage", Sensor::UnderVoltage, &["undervoltage", "voltage"]),
    ("under_voltage_since_boot", Sensor::UnderVoltageSinceBoot, &[]),
    ("frequency_capped", Sensor::FrequencyCapped, &[]),
    ("frequency_capped_since_boot", Sensor::FrequencyCappedSinceBoot, &[]),
    ("throttled", Sensor::Throttled, &["throttling"]),
    ("throttled_since_boot", Sensor::ThrottledSinceBoot, &[]),
    ("temperature_limited", Sensor::TemperatureLimited, &[]),
    ("temperature_limited_since_boot", Sensor::TemperatureLimitedSinceBoot, &[]),
    ("load", Sensor::Load, &["load_average", "cpu"]),
    ("memory_available", Sensor::MemoryAvailable, &["memory", "memory_free"]),
    ("disk_free", Sensor::DiskFree, &["disk"]),
    ("disk_written_per_day", Sensor::DiskWrittenPerDay, &["wear"]),
    ("agent_written_per_day", Sensor::AgentWrittenPerDay, &[]),
    ("disk_life_used", Sensor::DiskLifeUsed, &["life_time"]),
    ("clock_synchronised", Sensor::ClockSynchronised, &["clock", "ntp"]),
    ("uptime", Sensor::Uptime, &["machine_uptime"]),
    ("agent_uptime", Sensor::AgentUptime, &[]),
];

/// How far it must move to be told, where the file does not say: what is worth a message to somebody.
fn deadband(sensor: Sensor) -> Deadband {
    match sensor {
        Sensor::CpuTemperature => Deadband::Absolute(3.0),
        Sensor::Load => Deadband::Absolute(1.0),
        Sensor::MemoryAvailable => Deadband::Percent(20.0),
        Sensor::DiskFree => Deadband::Percent(5.0),
        Sensor::DiskWrittenPerDay | Sensor::AgentWrittenPerDay => Deadband::Percent(20.0),
        // A start makes it smaller; otherwise the longest silence is enough.
        Sensor::Uptime | Sensor::AgentUptime => Deadband::Absolute(86_400.0),
        _ => Deadband::Absolute(0.0),
    }
}

/// `None` where the file has no such table: what is not asked for is not sent.
pub(super) fn machine(walk: &mut Walk<'_>, root: Section<'_>, seen: &mut Seen<'_>) -> Option<Machine> {
    let header = root.table.get("machine")?.key_place;
    let section = walk.section(root, "machine", &MACHINE, false);
    seen.claim(LINE, header);
    let defaults = Defaults { every: MINUTE, longest_silence: HOUR, ..Defaults::standard() };
    let defaults = defaults.within(walk, section);
    let mut points = Vec::new();
    if section.table.get("points").is_none() {
        for sensor in Sensor::ALL {
            points.push(point(walk, section, sensor, &defaults, seen));
        }
    }
    let mut named: HashMap<Sensor, Place> = HashMap::new();
    for section in walk.tables(section, "points", &MACHINE_POINT) {
        let reporting = defaults.within(walk, section);
        let Some(sensor) = walk.need(section, "name", |value| value::choice(value, &SENSORS)) else {
            continue;
        };
        if let Some(first) = named.insert(sensor.value, sensor.place) {
            let message = format!("two points are named {}", value::quoted(sensor.value.name()));
            walk.clash(sensor.place, message, first, "remove one of the two");
        }
        points.push(point(walk, section, sensor.value, &reporting, seen));
    }
    Some(Machine { points })
}

fn point(
    walk: &mut Walk<'_>,
    section: Section<'_>,
    sensor: Sensor,
    defaults: &Defaults,
    seen: &mut Seen<'_>,
) -> MachinePoint {
    let id = PointId { line: LINE.into(), unit: UNIT.into(), point: sensor.name().into() };
    let topic = topic(walk, section, &id, defaults, seen);
    let deadband = match defaults.deadband {
        Some(_) if sensor.is_bool() => Deadband::Absolute(0.0),
        Some(deadband) => deadband,
        None => deadband(sensor),
    };
    let report = Reporting {
        id,
        topic,
        qos: defaults.qos,
        retain: defaults.retain,
        lane: defaults.lane,
        unit: sensor.unit().map(str::to_owned),
        deadband,
        longest_silence: defaults.longest_silence,
        expires_after: defaults.expires_after,
    };
    MachinePoint { sensor, every: defaults.every, report }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sensor_can_be_named() {
        let named: Vec<(&str, Sensor)> = SENSORS.iter().map(|(name, sensor, _)| (*name, *sensor)).collect();
        let all: Vec<(&str, Sensor)> = Sensor::ALL.iter().map(|sensor| (sensor.name(), *sensor)).collect();
        assert_eq!(named, all);
    }
}
