//! What the machine can tell of itself, and what the contents of the kernel's files say. Pure.
//!
//! Formats: proc(5), and `Documentation/ABI` and `Documentation/block/stat.rst` of the kernel. Invariant: what a file
//! does not say is a fault or nothing, never a number.

use crate::point::{Fault, Value};

/// One thing that the machine can tell, in the order in which it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sensor {
    /// Of the processor, °C.
    CpuTemperature,
    /// The supply is too weak, now (Raspberry Pi: below 4.63 V).
    UnderVoltage,
    /// It has been since the boot, as far as that is known.
    UnderVoltageSinceBoot,
    /// The processor's frequency is capped, now (Raspberry Pi).
    FrequencyCapped,
    /// It has been since the boot, as far as that is known.
    FrequencyCappedSinceBoot,
    /// The processor is throttled, now (Raspberry Pi).
    Throttled,
    /// It has been since the boot, as far as that is known.
    ThrottledSinceBoot,
    /// The soft limit of the temperature is reached, now (Raspberry Pi).
    TemperatureLimited,
    /// It has been since the boot, as far as that is known.
    TemperatureLimitedSinceBoot,
    /// Load average of the last minute.
    Load,
    /// Memory that programs can still get, MiB.
    MemoryAvailable,
    /// Free space of the file system that holds the database, MiB.
    DiskFree,
    /// What the disk of the database wears by, MiB a day: everything written to it since the boot, extrapolated.
    DiskWrittenPerDay,
    /// What the agent adds to that, MiB a day.
    AgentWrittenPerDay,
    /// How much of its life an eMMC has used, as it says itself: %, in steps of 10.
    DiskLifeUsed,
    /// Whether somebody keeps the clock right.
    ClockSynchronised,
    /// Of the machine, s.
    Uptime,
    /// Of the agent, s.
    AgentUptime,
}

impl Sensor {
    /// Every one.
    pub const ALL: [Sensor; 18] = [
        Sensor::CpuTemperature,
        Sensor::UnderVoltage,
        Sensor::UnderVoltageSinceBoot,
        Sensor::FrequencyCapped,
        Sensor::FrequencyCappedSinceBoot,
        Sensor::Throttled,
        Sensor::ThrottledSinceBoot,
        Sensor::TemperatureLimited,
        Sensor::TemperatureLimitedSinceBoot,
        Sensor::Load,
        Sensor::MemoryAvailable,
        Sensor::DiskFree,
        Sensor::DiskWrittenPerDay,
        Sensor::AgentWrittenPerDay,
        Sensor::DiskLifeUsed,
        Sensor::ClockSynchronised,
        Sensor::Uptime,
        Sensor::AgentUptime,
    ];

    /// Its name in the configuration and in payloads.
    pub fn name(self) -> &'static str {
        match self {
            Sensor::CpuTemperature => "cpu_temperature",
            Sensor::UnderVoltage => "under_voltage",
            Sensor::UnderVoltageSinceBoot => "under_voltage_since_boot",
            Sensor::FrequencyCapped => "frequency_capped",
            Sensor::FrequencyCappedSinceBoot => "frequency_capped_since_boot",
            Sensor::Throttled => "throttled",
            Sensor::ThrottledSinceBoot => "throttled_since_boot",
            Sensor::TemperatureLimited => "temperature_limited",
            Sensor::TemperatureLimitedSinceBoot => "temperature_limited_since_boot",
            Sensor::Load => "load",
            Sensor::MemoryAvailable => "memory_available",
            Sensor::DiskFree => "disk_free",
            Sensor::DiskWrittenPerDay => "disk_written_per_day",
            Sensor::AgentWrittenPerDay => "agent_written_per_day",
            Sensor::DiskLifeUsed => "disk_life_used",
            Sensor::ClockSynchronised => "clock_synchronised",
            Sensor::Uptime => "uptime",
            Sensor::AgentUptime => "agent_uptime",
        }
    }

    /// Its unit of measure.
    pub fn unit(self) -> Option<&'static str> {
        match self {
            Sensor::CpuTemperature => Some("°C"),
            Sensor::MemoryAvailable | Sensor::DiskFree => Some("MiB"),
            Sensor::DiskWrittenPerDay | Sensor::AgentWrittenPerDay => Some("MiB/d"),
            Sensor::DiskLifeUsed => Some("%"),
            Sensor::Uptime | Sensor::AgentUptime => Some("s"),
            _ => None,
        }
    }

    /// Whether its values are true and false.
    pub fn is_bool(self) -> bool {
        self == Sensor::ClockSynchronised || self.throttling().is_some()
    }

    /// Which of the firmware's four bits it tells, and whether since the boot.
    fn throttling(self) -> Option<(u32, bool)> {
        Some(match self {
            Sensor::UnderVoltage => (0, false),
            Sensor::FrequencyCapped => (1, false),
            Sensor::Throttled => (2, false),
            Sensor::TemperatureLimited => (3, false),
            Sensor::UnderVoltageSinceBoot => (0, true),
            Sensor::FrequencyCappedSinceBoot => (1, true),
            Sensor::ThrottledSinceBoot => (2, true),
            Sensor::TemperatureLimitedSinceBoot => (3, true),
            _ => return None,
        })
    }
}

/// What became of reading a file: its text, nothing where there is none, or why it cannot be read.
pub type Content = Result<Option<String>, String>;

/// What was found at one look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `temp` of the processor's thermal zone.
    pub temperature: Content,
    /// `get_throttled` of the Raspberry Pi's firmware.
    pub throttled: Content,
    /// `in0_lcrit_alarm` of the kernel's `rpi_volt`.
    pub low_voltage: Content,
    /// `/proc/loadavg`.
    pub load: Content,
    /// `/proc/meminfo`.
    pub memory: Content,
    /// `/proc/uptime`.
    pub uptime: Content,
    /// `/proc/self/io`.
    pub io: Content,
    /// `stat` of the database's disk.
    pub disk: Content,
    /// `life_time` of the database's disk.
    pub life: Content,
    /// Free bytes of the database's file system; `None` where nobody asked.
    pub free: Option<Result<u64, Fault>>,
    /// Whether somebody keeps the clock right.
    pub clock_is_right: bool,
    /// Of the agent.
    pub agent_uptime_s: u64,
}

/// The firmware's four bits. A bit that is not known is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Throttling {
    /// What is so now.
    pub now: u32,
    /// What has been so since the boot.
    since_boot: u32,
    /// Which of them the machine tells.
    known: u32,
}

impl Found {
    /// What the firmware and the kernel say of supply and throttling.
    ///
    /// # Errors
    /// One of the two cannot be read.
    pub fn throttling(&self) -> Result<Throttling, Fault> {
        const ALL: u32 = 0b1111;
        let mut found = Throttling::default();
        // Hexadecimal without 0x in the kernel's file, with it in what vcgencmd prints.
        let bits = |text: &str| u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok();
        if let Some(bits) = parsed(&self.throttled, bits)? {
            found = Throttling { now: bits & ALL, since_boot: bits >> 16 & ALL, known: ALL };
        }
        // The kernel's own look every two seconds: it catches what is over when the firmware is asked.
        if let Some(alarm) =
            parsed(&self.low_voltage, |text| text.parse::<u32>().ok().filter(|bit| *bit <= 1))?
        {
            found.now |= alarm;
            found.known |= 1;
        }
        Ok(found)
    }

    /// What this sensor says; `None` where the machine does not have it.
    ///
    /// The kernel clears the firmware's memory of what has been with every look of its own, so `seen` adds the bits
    /// that were set since the agent started.
    pub fn value(&self, sensor: Sensor, seen: u32) -> Option<Result<Value, Fault>> {
        if let Some((bit, since_boot)) = sensor.throttling() {
            let told = |found: Throttling| {
                let bits = if since_boot { found.since_boot | found.now | seen } else { found.now };
                (found.known >> bit & 1 == 1).then_some(Value::Bool(bits >> bit & 1 == 1))
            };
            return self.throttling().map(told).transpose();
        }
        let value = match sensor {
            Sensor::CpuTemperature => parsed(&self.temperature, temperature),
            Sensor::Load => parsed(&self.load, |text| finite(text.split_whitespace().next()?)),
            Sensor::MemoryAvailable => parsed(&self.memory, memory_available),
            Sensor::DiskFree => {
                let free = self.free.clone().map(|free| free.map(|bytes| Value::Integer(mib(bytes))));
                return free;
            }
            Sensor::DiskWrittenPerDay => {
                parsed(&self.disk, bytes_written).and_then(|bytes| self.per_day_of_boot(bytes))
            }
            Sensor::AgentWrittenPerDay => parsed(&self.io, |text| {
                let bytes =
                    text.lines().find_map(|line| line.strip_prefix("write_bytes:"))?.trim().parse().ok()?;
                Some(per_day(bytes, self.agent_uptime_s))
            }),
            Sensor::DiskLifeUsed => parsed(&self.life, life_used),
            Sensor::ClockSynchronised => Ok(Some(Value::Bool(self.clock_is_right))),
            Sensor::Uptime => parsed(&self.uptime, |text| Some(Value::Integer(uptime_s(text)? as i64))),
            _ => Ok(Some(Value::Integer(self.agent_uptime_s as i64))),
        };
        value.transpose()
    }

    fn per_day_of_boot(&self, bytes: Option<u64>) -> Result<Option<Value>, Fault> {
        let uptime = parsed(&self.uptime, uptime_s)?;
        Ok(bytes.zip(uptime).map(|(bytes, uptime_s)| per_day(bytes, uptime_s)))
    }
}

fn parsed<T>(content: &Content, parse: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>, Fault> {
    const SHOWN: usize = 40;
    match content {
        Ok(None) => Ok(None),
        Ok(Some(text)) => parse(text.trim()).map(Some).ok_or_else(|| {
            let begins: String = text.trim().chars().take(SHOWN).collect();
            Fault::Unreadable { what: format!("{begins:?} is not what the kernel writes there") }
        }),
        Err(what) => Err(Fault::Unreadable { what: what.clone() }),
    }
}

fn finite(text: &str) -> Option<Value> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).map(Value::Float)
}

/// Thousandths of a degree, to a tenth.
fn temperature(text: &str) -> Option<Value> {
    Some(Value::Float(tenths(f64::from(text.parse::<i32>().ok()?) / 1000.0)))
}

fn memory_available(text: &str) -> Option<Value> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Value::Integer((kib / 1024) as i64))
}

/// The seventh number: sectors of 512 bytes, whatever the disk's own are.
fn bytes_written(text: &str) -> Option<u64> {
    let sectors: u64 = text.split_whitespace().nth(6)?.parse().ok()?;
    sectors.checked_mul(512)
}

/// Two numbers, for the two kinds of memory in it (JEDEC 84-B50, DEVICE_LIFE_TIME_EST): 1 is up to 10 %, 0 is not told.
fn life_used(text: &str) -> Option<Value> {
    let number = |text: &str| i64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let numbers = text.split_whitespace().map(number).collect::<Option<Vec<_>>>()?;
    Some(Value::Integer(10 * numbers.into_iter().max()?))
}

fn uptime_s(text: &str) -> Option<u64> {
    text.split(['.', ' ']).next()?.parse().ok()
}

/// What it would be in a day. A start writes more than the hours after it, so that less than an hour counts as one.
fn per_day(bytes: u64, in_s: u64) -> Value {
    const AT_LEAST_S: u64 = 3600;
    let mib = bytes as f64 / f64::from(1 << 20);
    Value::Float(tenths(mib * 86_400.0 / in_s.max(AT_LEAST_S) as f64))
}

fn mib(bytes: u64) -> i64 {
    (bytes >> 20) as i64
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Content {
        Ok(Some(text.to_owned()))
    }

    /// A Raspberry Pi 4 with a weak supply.
    fn pi() -> Found {
        Found {
            temperature: text("48199\n"),
            throttled: text("50005\n"),
            low_voltage: text("1\n"),
            load: text("0.52 0.58 0.59 1/467 12345\n"),
            memory: text(
                "MemTotal:        3884360 kB\nMemFree:          218904 kB\nMemAvailable:    3146120 kB\n",
            ),
            uptime: text("86400.41 345222.08\n"),
            io: text(
                "rchar: 1\nwchar: 2\nsyscr: 3\nsyscw: 4\nread_bytes: 5\nwrite_bytes: 10485760\ncancelled_write_bytes: 9999\n",
            ),
            disk: text(
                "   21482     9321  1586774    31251    44571    61313  2097152   412345        0   123456   443596        0        0        0        0\n",
            ),
            life: text("0x02 0x01\n"),
            free: Some(Ok(24_117 << 20)),
            clock_is_right: true,
            agent_uptime_s: 43_200,
        }
    }

    fn nothing() -> Found {
        let none = || Ok(None);
        Found {
            temperature: none(),
            throttled: none(),
            low_voltage: none(),
            load: none(),
            memory: none(),
            uptime: none(),
            io: none(),
            disk: none(),
            life: none(),
            free: None,
            clock_is_right: false,
            agent_uptime_s: 1,
        }
    }

    #[test]
    fn a_raspberry_pi_tells_everything() {
        let (yes, no) = (Value::Bool(true), Value::Bool(false));
        let expected = [
            Value::Float(48.2),
            yes.clone(),
            yes.clone(),
            no.clone(),
            no.clone(),
            yes.clone(),
            yes.clone(),
            no.clone(),
            no,
            Value::Float(0.52),
            Value::Integer(3072),
            Value::Integer(24_117),
            Value::Float(1024.0),
            Value::Float(20.0),
            Value::Integer(20),
            yes,
            Value::Integer(86_400),
            Value::Integer(43_200),
        ];
        for (sensor, expected) in Sensor::ALL.into_iter().zip(expected) {
            assert_eq!(pi().value(sensor, 0), Some(Ok(expected)), "{}", sensor.name());
        }
    }

    #[test]
    fn what_a_machine_does_not_have_is_left_out() {
        let told: Vec<Sensor> =
            Sensor::ALL.into_iter().filter(|sensor| nothing().value(*sensor, 0).is_some()).collect();
        assert_eq!(told, [Sensor::ClockSynchronised, Sensor::AgentUptime]);
        // The kernel's alarm alone tells of the voltage and of nothing else.
        let found = Found { low_voltage: text("0\n"), ..nothing() };
        let told: Vec<Sensor> =
            Sensor::ALL.into_iter().filter(|sensor| found.value(*sensor, 0).is_some()).collect();
        let expected = [
            Sensor::UnderVoltage,
            Sensor::UnderVoltageSinceBoot,
            Sensor::ClockSynchronised,
            Sensor::AgentUptime,
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn throttling_is_told_bit_by_bit() {
        use Sensor::*;
        let is_set = |throttled: &str, low_voltage: Content, seen| {
            let found = Found { throttled: text(throttled), low_voltage, ..nothing() };
            let set = |sensor: &Sensor| found.value(*sensor, seen) == Some(Ok(Value::Bool(true)));
            Sensor::ALL
                .into_iter()
                .filter(|sensor| sensor.throttling().is_some())
                .filter(set)
                .collect::<Vec<_>>()
        };
        for (throttled, expected) in [
            ("0", vec![]),
            ("0x0\n", vec![]),
            ("1\n", vec![UnderVoltage, UnderVoltageSinceBoot]),
            ("2\n", vec![FrequencyCapped, FrequencyCappedSinceBoot]),
            ("4\n", vec![Throttled, ThrottledSinceBoot]),
            ("0x80008", vec![TemperatureLimited, TemperatureLimitedSinceBoot]),
            ("50000\n", vec![UnderVoltageSinceBoot, ThrottledSinceBoot]),
            ("e0000", vec![FrequencyCappedSinceBoot, ThrottledSinceBoot, TemperatureLimitedSinceBoot]),
        ] {
            assert_eq!(is_set(throttled, Ok(None), 0), expected, "{throttled}");
        }
        // What only the kernel saw, and what is over and was forgotten by the kernel.
        assert_eq!(is_set("0", text("1"), 0), [UnderVoltage, UnderVoltageSinceBoot]);
        assert_eq!(is_set("0", text("0"), 0b101), [UnderVoltageSinceBoot, ThrottledSinceBoot]);
    }

    #[test]
    fn what_is_not_understood_is_a_fault_and_never_a_number() {
        type Broken = (Sensor, fn(&mut Found) -> &mut Content, &'static [&'static str]);
        let broken: [Broken; 8] = [
            (Sensor::CpuTemperature, |found| &mut found.temperature, &["", "hot", "48.2", "99999999999"]),
            (Sensor::UnderVoltage, |found| &mut found.throttled, &["", "0x", "zz", "123456789"]),
            (Sensor::UnderVoltageSinceBoot, |found| &mut found.low_voltage, &["", "2", "-1", "yes"]),
            (Sensor::Load, |found| &mut found.load, &["", "nan 1 2", "inf", "x"]),
            (
                Sensor::MemoryAvailable,
                |found| &mut found.memory,
                &["", "MemFree: 12 kB", "MemAvailable: 12 MB"],
            ),
            (
                Sensor::DiskWrittenPerDay,
                |found| &mut found.disk,
                &["", "1 2 3 4 5 6", "1 2 3 4 5 6 x", "1 2 3 4 5 6 18446744073709551615"],
            ),
            (
                Sensor::AgentWrittenPerDay,
                |found| &mut found.io,
                &["", "write_bytes: x", "cancelled_write_bytes: 5"],
            ),
            (Sensor::DiskLifeUsed, |found| &mut found.life, &["", "1 2", "0xzz 0x01"]),
        ];
        for (sensor, content, texts) in broken {
            for written in texts {
                let mut found = pi();
                *content(&mut found) = text(written);
                let told = found.value(sensor, 0);
                assert!(
                    matches!(told, Some(Err(Fault::Unreadable { .. }))),
                    "{sensor:?} {written:?}: {told:?}"
                );
            }
            let mut found = pi();
            *content(&mut found) = Err("Input/output error".to_owned());
            let fault = Fault::Unreadable { what: "Input/output error".to_owned() };
            assert_eq!(found.value(sensor, 0), Some(Err(fault)), "{sensor:?}");
        }
    }

    #[test]
    fn what_is_written_in_the_first_hour_is_not_extrapolated_from_less() {
        let written = |in_s| per_day(10 << 20, in_s);
        assert_eq!([1, 3600].map(written), [Value::Float(240.0), Value::Float(240.0)]);
        assert_eq!([7200, 864_000].map(written), [Value::Float(120.0), Value::Float(1.0)]);
    }

    #[test]
    fn no_two_sensors_share_a_name() {
        let names: std::collections::BTreeSet<&str> =
            Sensor::ALL.iter().map(|sensor| sensor.name()).collect();
        assert_eq!(names.len(), Sensor::ALL.len());
    }
}
