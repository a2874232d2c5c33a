//! What the Modbus rows read, and the programs that read it: the agent, libmodbus, pymodbus, all with the same
//! requests in the same order.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use fieldpost::control::client;
use fieldpost::control::wire::{Answer, Question};

use crate::process::Process;
use crate::setting::{Failure, Setting};
use crate::support::agent::Config;

/// The reads of a round, unit by unit, in the order of the wire. Between two blocks of one function is a gap, or the
/// agent would join them.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Units 1 to this.
    pub(crate) units: u8,
    /// The same in every unit.
    pub(crate) blocks: Vec<Block>,
    /// Whether the agent reports each value that changes; otherwise none a second time.
    pub(crate) reports: bool,
}

/// Registers that are read at once, as 32-bit values.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block {
    /// 3 (holding) or 4 (input).
    pub(crate) function: u8,
    pub(crate) address: u16,
    /// Even.
    pub(crate) registers: u16,
}

/// Where the units are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place<'a> {
    Rtu { device: &'a Path, baud_rate: u32 },
    Tcp { port: u16 },
}

impl Plan {
    /// Requests in a round of all units.
    pub(crate) fn requests(&self) -> usize {
        usize::from(self.units) * self.blocks.len()
    }

    /// As the peers take it.
    fn arguments(&self) -> impl Iterator<Item = String> {
        (1..=self.units).flat_map(|unit| {
            let argument = move |block: &Block| {
                format!("{unit}:{}:{}:{}", block.function, block.address, block.registers)
            };
            self.blocks.iter().map(argument)
        })
    }

    /// As the agent takes it. It reads as often as it may, and no broker is there.
    fn configuration(&self, place: Place<'_>) -> Config {
        let deadband = if self.reports { "0" } else { "1e10" };
        let mut text = format!("\n[[modbus]]\nname = \"line\"\nevery = \"50ms\"\ndeadband = {deadband}\n");
        let _ = match place {
            Place::Rtu { device, baud_rate } => writeln!(
                text,
                "transport = \"rtu\"\ndevice = \"{}\"\nbaud_rate = {baud_rate}",
                device.display()
            ),
            Place::Tcp { port } => {
                writeln!(text, "transport = \"tcp\"\nhost = \"127.0.0.1\"\nport = {port}")
            }
        };
        for unit in 1..=self.units {
            let _ = writeln!(text, "\n[[modbus.unit]]\nname = \"u{unit}\"\nunit = {unit}\npoints = [");
            for block in &self.blocks {
                let register = if block.function == 3 { "holding" } else { "input" };
                for address in (block.address..block.address + block.registers).step_by(2) {
                    let _ = writeln!(
                        text,
                        "  {{ name = \"{register}{address}\", register = \"{register}\", address = {address}, \
                         type = \"u32\" }},"
                    );
                }
            }
            text.push_str("]\n");
        }
        Config::new("mqtt://127.0.0.1:1").and(&text)
    }
}

/// A program that reads a plan for ever.
#[derive(Debug)]
pub(crate) enum Reader {
    Agent,
    Libmodbus(PathBuf),
    Pymodbus(PathBuf),
}

impl Reader {
    /// libmodbus behind a loop in C, compiled here; or why not, and what to install.
    pub(crate) fn libmodbus(setting: &Setting) -> Result<Result<Reader, String>, Failure> {
        let program = setting.folder("libmodbus")?.join("libmodbus");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bench/peers/libmodbus.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-Wall", "-Wextra", "-o"]).arg(&program).arg(source).arg("-lmodbus");
        Ok(match compiler.output() {
            Ok(output) if output.status.success() => Ok(Reader::Libmodbus(program)),
            Ok(_) | Err(_) => Err("libmodbus: missing (apt-get install gcc libmodbus-dev)".to_owned()),
        })
    }

    /// pymodbus from the environment of the tests; or why not.
    pub(crate) fn pymodbus() -> Result<Reader, String> {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.venv/bin/python");
        let found = Command::new(&python).args(["-c", "import pymodbus"]).output();
        match found {
            Ok(output) if output.status.success() => Ok(Reader::Pymodbus(python)),
            Ok(_) | Err(_) => Err("pymodbus: missing (tests/run sets it up)".to_owned()),
        }
    }

    /// Starts it; if `first`, so that it goes before all other work of the machine, as the line does.
    pub(crate) fn start(
        &self,
        setting: &Setting,
        plan: &Plan,
        place: Place<'_>,
        first: bool,
    ) -> Result<Running, Failure> {
        let folder = setting.folder("reader")?;
        let mut command = match self {
            Reader::Agent => crate::agent::command(setting, &folder, &plan.configuration(place))?,
            Reader::Libmodbus(program) => Command::new(program),
            Reader::Pymodbus(python) => {
                let mut command = Command::new(python);
                command
                    .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/bench/peers/pymodbus_poll.py"));
                command
            }
        };
        match (self, place) {
            (Reader::Agent, _) => {}
            (Reader::Pymodbus(_), Place::Tcp { port }) => {
                command.arg(port.to_string()).args(plan.arguments());
            }
            (_, Place::Tcp { port }) => {
                command.args(["tcp", &port.to_string()]).args(plan.arguments());
            }
            (_, Place::Rtu { device, baud_rate }) => {
                command.arg("rtu").arg(device).arg(baud_rate.to_string()).args(plan.arguments());
            }
        }
        if first {
            let mut chrt = Command::new("chrt");
            chrt.args(["--fifo", "10"]).arg(command.get_program()).args(command.get_args());
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => chrt.env(name, value),
                    None => chrt.env_remove(name),
                };
            }
            command = chrt;
        }
        let process = Process::start(&mut command, &folder.join("log"))?;
        Ok(Running { process, folder })
    }
}

/// A reader at work. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) process: Process,
    folder: PathBuf,
}

impl Running {
    /// Of the agent: readings and messages that were dropped because something was too slow for them.
    pub(crate) fn dropped(&self) -> Result<u64, Failure> {
        match client::ask(&self.folder.join("control.sock"), &Question::Status {}) {
            Ok(Answer::Status(status)) => {
                let counters = ["readings_overrun", "messages_not_accepted"];
                Ok(counters.iter().filter_map(|name| status.counters.get(*name)).sum())
            }
            Ok(other) => Err(self.process.failure(&format!("no status but {other:?}"))),
            Err(error) => Err(self.process.failure(&error.to_string())),
        }
    }
}
