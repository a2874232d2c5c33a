//! `fieldpost check FILE`: every problem of a configuration with its place, or a summary of what it means.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;

use super::Failure;
use crate::config::{self, Config, Transport};

/// `fieldpost check`
#[derive(Debug, Args)]
pub(super) struct Check {
    /// The configuration file
    file: PathBuf,
}

impl Check {
    pub(super) fn run(self) -> Result<(), Failure> {
        let config = config::load(&self.file)?;
        io::stdout().write_all(summary(&self.file, &config).as_bytes()).map_err(Failure::Output)
    }
}

fn summary(path: &Path, config: &Config) -> String {
    let units = config.modbus.iter().map(|line| line.units.len()).sum::<usize>();
    let counts =
        [count(config.modbus.len(), "line"), count(units, "unit"), count(config.points.len(), "point")];
    let mut out = format!("{}: no problems\n", path.display());
    // Writing to a string cannot fail.
    let _ = writeln!(out, "  gateway  {}", config.gateway.id);
    for (place, broker) in config.brokers().enumerate() {
        let scheme = if broker.tls.is_some() { "mqtts" } else { "mqtt" };
        let brackets = if broker.host.contains(':') { ("[", "]") } else { ("", "") };
        let what = if place == 0 { "broker" } else { "or else" };
        let _ = writeln!(
            out,
            "  {what:<8} {scheme}://{}{}{}:{}",
            brackets.0, broker.host, brackets.1, broker.port
        );
    }
    let _ = writeln!(out, "  store    {}", config.store.path.display());
    let _ = writeln!(out, "  modbus   {}", counts.join(", "));
    for line in &config.modbus {
        let how = match &line.transport {
            Transport::Tcp { host, port } => format!("tcp {host} port {port}"),
            Transport::Rtu(serial) => format!("rtu {} at {} baud", serial.device.display(), serial.baud_rate),
        };
        let points = line.units.iter().map(|unit| unit.points.len()).sum::<usize>();
        let inside = [count(line.units.len(), "unit"), count(points, "point")].join(", ");
        let _ = writeln!(out, "    {}: {how}: {inside}", line.name);
    }
    if let Some(machine) = &config.machine {
        let _ = writeln!(out, "  machine  {}", count(machine.points.len(), "point"));
    }
    for warning in config.warnings() {
        let _ = writeln!(out, "  warning  {warning}");
    }
    out
}

fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
