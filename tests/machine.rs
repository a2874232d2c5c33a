//! What the machine tells of itself: files of the kernel to messages at a real broker.
//!
//! Real agent and mosquitto. The machine is a tree of files with what a Raspberry Pi 4 has in them.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use fieldpost::agent::Faults;
use fieldpost::control::wire::{LinkState, Status};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use support::agent::{Agent, Config};
use support::mosquitto::{Mosquitto, Options, Subscriber};
use support::wait_until;
use tempfile::TempDir;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const THROTTLED: &str = "sys/devices/platform/soc/soc:firmware/get_throttled";
const TEMPERATURE: &str = "sys/class/thermal/thermal_zone0/temp";

/// The agent, for [`Agent::start_with_faults`].
#[test]
fn agent_with_faults() {
    support::agent::be_the_agent();
}

/// A machine that is a tree of files. It is not dropped before its agent.
struct Machine {
    root: TempDir,
}

impl Machine {
    fn new(files: &[(&str, &str)]) -> Machine {
        let machine = Machine { root: TempDir::new().unwrap() };
        files.iter().for_each(|(name, text)| machine.write(name, text));
        machine
    }

    /// A Raspberry Pi 4, whose card holds the agent's database on its second partition.
    fn raspberry_pi() -> Machine {
        let card = "sys/devices/platform/emmc2bus/fe340000.mmc/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0";
        let stat = "   21482     9321  1586774    31251    44571    61313  2097152   412345        0   123456   443596\n";
        let machine = Machine::new(&[
            (TEMPERATURE, "48199\n"),
            ("sys/class/thermal/thermal_zone0/type", "cpu-thermal\n"),
            (THROTTLED, "0\n"),
            ("sys/class/hwmon/hwmon0/name", "cpu_thermal\n"),
            ("sys/class/hwmon/hwmon1/name", "rpi_volt\n"),
            ("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "0\n"),
            ("proc/loadavg", "0.52 0.58 0.59 1/467 12345\n"),
            ("proc/meminfo", "MemTotal:        3884360 kB\nMemAvailable:    3146120 kB\n"),
            ("proc/uptime", "86400.41 345222.08\n"),
            (
                "proc/self/io",
                "rchar: 1\nwchar: 2\nread_bytes: 5\nwrite_bytes: 10485760\ncancelled_write_bytes: 0\n",
            ),
            (&format!("{card}/stat"), stat),
            (&format!("{card}/mmcblk0p2/stat"), "1 1 1 1 1 1 1 1 1 1 1\n"),
            (&format!("{card}/mmcblk0p2/partition"), "2\n"),
            (&format!("{card}/device/life_time"), "0x02 0x01\n"),
        ]);
        // The kernel's name for the disk that the database is on.
        let device = fs::metadata(machine.root.path()).unwrap().dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let numbers = machine.root.path().join("sys/dev/block");
        fs::create_dir_all(&numbers).unwrap();
        let partition = format!("../../../{card}/mmcblk0p2");
        std::os::unix::fs::symlink(partition, numbers.join(format!("{major}:{minor}"))).unwrap();
        machine
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // A reader sees the one or the other.
        let new = path.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, path).unwrap();
    }

    fn agent(&self, config: &Config) -> Agent {
        let root: &'static Path = Box::leak(self.root.path().to_owned().into_boxed_path());
        let agent =
            Agent::start_with_faults(config, Faults { machine_root: Some(root), ..Faults::default() });
        agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
        agent
    }
}

fn mosquitto() -> Mosquitto {
    Mosquitto::start(Options { unlimited: true, ..Options::default() })
}

fn config(broker: &Mosquitto, table: &str) -> Config {
    Config::new(&broker.url()).and(table)
}

/// The last retained values payload of the machine that fits.
fn expect_values(broker: &Mosquitto, agent: &Agent, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    let found = wait_until(PATIENCE, || {
        let retained = Subscriber::start(broker.port(), "person", "g1/gateway/machine", 1, &[]).finish();
        let payload = retained.first().and_then(|line| line.split_once(' '));
        last = payload.map_or(Value::Null, |(_, payload)| serde_json::from_str(payload).unwrap());
        fits(&last["values"])
    });
    assert!(found, "the broker never had {what}: {last:#}\n{}", agent.tail());
    last
}

fn unit(status: &Status) -> fieldpost::control::wire::Unit {
    status.lines.iter().find(|line| line.name == "gateway").unwrap().units[0].clone()
}

#[test]
fn a_raspberry_pi_tells_of_itself_like_a_device() {
    let (broker, machine) = (mosquitto(), Machine::raspberry_pi());
    let agent = machine.agent(&config(&broker, "[machine]\nevery = \"100ms\"\nretain = true\n"));
    let told = expect_values(&broker, &agent, "all values", |values| values["uptime"].is_object());
    println!("{told}");
    assert_eq!(
        (&told["gateway"], &told["line"], &told["unit"]),
        (&"g1".into(), &"gateway".into(), &"machine".into())
    );
    for (name, value, measured_in) in [
        ("cpu_temperature", 48.2.into(), Some("°C")),
        ("under_voltage", false.into(), None),
        ("throttled_since_boot", false.into(), None),
        ("load", 0.52.into(), None),
        ("memory_available", 3072.into(), Some("MiB")),
        ("disk_written_per_day", 1024.0.into(), Some("MiB/d")),
        ("agent_written_per_day", 240.0.into(), Some("MiB/d")),
        ("disk_life_used", 20.into(), Some("%")),
        ("uptime", 86_400.into(), Some("s")),
    ] {
        let point = &told["values"][name];
        let expected: Value = value;
        assert_eq!((&point["value"], &point["quality"]), (&expected, &"good".into()), "{name}: {told}");
        assert_eq!(point["unit"].as_str(), measured_in, "{name}");
    }
    assert!(told["values"]["disk_free"]["value"].as_i64().unwrap() > 0);
    assert_eq!(told["values"].as_object().unwrap().len(), 18);
    let status = agent.expect(PATIENCE, "a good look", |status| unit(status).ok);
    assert!(unit(&status).polls > 0);
}

#[test]
fn a_pi_whose_supply_breaks_down_says_so_and_remembers_it() {
    let (broker, machine) = (mosquitto(), Machine::raspberry_pi());
    let agent = machine.agent(&config(&broker, "[machine]\nevery = \"100ms\"\nretain = true\n"));
    let is = |name: &'static str, wished: bool| move |values: &Value| values[name]["value"] == wished;
    expect_values(&broker, &agent, "a good supply", is("under_voltage", false));
    machine.write(THROTTLED, "50005\n");
    let told = expect_values(&broker, &agent, "the weak supply", is("under_voltage", true));
    println!("{told}");
    for name in ["under_voltage", "throttled", "under_voltage_since_boot", "throttled_since_boot"] {
        assert_eq!(told["values"][name]["value"], true, "{name}: {told}");
    }
    assert_eq!(told["values"].as_object().unwrap().len(), 4, "what did not change is not repeated: {told}");
    // The kernel's own look clears the bits of what has been.
    machine.write(THROTTLED, "0\n");
    let told = expect_values(&broker, &agent, "the good supply", is("under_voltage", false));
    assert!(told["values"].get("under_voltage_since_boot").is_none(), "it has been: {told}");
}

#[test]
fn a_sensor_that_fails_is_bad_with_the_reason_and_one_that_is_missing_is_left_out_and_named_once() {
    let broker = mosquitto();
    let machine = Machine::new(&[
        (TEMPERATURE, "48199\n"),
        ("proc/loadavg", "0.52 0.58 0.59 1/467 12345\n"),
        ("proc/uptime", "86400.41 345222.08\n"),
    ]);
    let table = "[machine]\nevery = \"100ms\"\nretain = true\npoints = [{ name = \"cpu_temperature\" }, \
                 { name = \"under_voltage\" }, { name = \"disk_life_used\" }, { name = \"uptime\" }]\n";
    let agent = machine.agent(&config(&broker, table));
    let told =
        expect_values(&broker, &agent, "a temperature", |values| values["cpu_temperature"].is_object());
    assert_eq!(told["values"].as_object().unwrap().len(), 2, "{told}");
    agent.expect_log(PATIENCE, "this machine does not tell of under_voltage, disk_life_used: left out");
    machine.write(TEMPERATURE, "hot\n");
    let bad = |values: &Value| values["cpu_temperature"]["quality"] == "bad";
    let told = expect_values(&broker, &agent, "a bad temperature", bad);
    println!("{told}");
    let point = &told["values"]["cpu_temperature"];
    assert_eq!((&point["value"], &point["fault"]), (&Value::Null, &"unreadable".into()));
    assert!(point["reason"].as_str().unwrap().contains("hot"), "{point}");
    let status = agent.expect(PATIENCE, "a bad unit", |status| !unit(status).ok);
    assert!(unit(&status).last_error.unwrap().starts_with("cpu_temperature: "));
    // One that was there and is gone is bad, too.
    machine.write(TEMPERATURE, "48199\n");
    expect_values(&broker, &agent, "a temperature again", |values| {
        values["cpu_temperature"]["quality"] == "good"
    });
    fs::remove_file(machine.root.path().join(TEMPERATURE)).unwrap();
    let told = expect_values(&broker, &agent, "a missing temperature", bad);
    assert!(told["values"]["cpu_temperature"]["reason"].as_str().unwrap().contains("gone"), "{told}");
    assert_eq!(agent.logged("this machine does not tell of"), 1);
}

#[test]
fn this_machine_tells_what_it_has() {
    let broker = mosquitto();
    let agent = Agent::start(&config(&broker, "[machine]\nevery = \"200ms\"\nretain = true\n"));
    let has =
        |values: &Value| values["load"]["quality"] == "good" && values["disk_free"]["quality"] == "good";
    let told = expect_values(&broker, &agent, "load and disk", has);
    println!("{told}");
    for name in ["memory_available", "uptime", "agent_uptime", "clock_synchronised"] {
        assert_eq!(told["values"][name]["quality"], "good", "{name}: {told}");
    }
}
