//! The benchmark: the table of what fieldpost must reach, each row beside its named peer in the same run.
//!
//! ```text
//! cargo run --release --example bench [-- --quick] [--only NAME] [--json]
//! ```
//!
//! The shipped program is measured, on a real disk, with real brokers. It has no thresholds: it measures, and says
//! under which conditions. A peer that is not installed is named with what to install. Invariant: exit status 0 if
//! and only if every row that was asked for was measured, apart from missing peers.

#[path = "bench/agent.rs"]
mod agent;
#[path = "bench/backlog.rs"]
mod backlog;
#[path = "bench/disk.rs"]
mod disk;
#[path = "bench/distance.rs"]
mod distance;
#[path = "bench/far.rs"]
mod far;
#[path = "bench/forward.rs"]
mod forward;
#[path = "bench/gateway.rs"]
mod gateway;
#[path = "bench/line.rs"]
mod line;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/mosquitto.rs"]
mod mosquitto;
#[path = "bench/poll.rs"]
mod poll;
#[path = "bench/process.rs"]
mod process;
#[allow(dead_code, unreachable_pub)] // a line needs less than the tests
#[path = "../tests/support_modbus/pty.rs"]
mod pty;
#[path = "bench/rtu.rs"]
mod rtu;
#[path = "bench/setting.rs"]
mod setting;
#[path = "bench/sink.rs"]
mod sink;
#[path = "bench/size.rs"]
mod size;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "bench/table.rs"]
mod table;

use std::fs;
use std::io::{self, Write};
use std::process::{Command, ExitCode};
use std::time::Instant;

use clap::Parser;

use setting::{Failure, Setting};
use table::{Row, Table};

/// Measures some rows that share their preparation.
type Measure = fn(&Setting) -> Result<Vec<Row>, Failure>;

/// In the order of measuring, by the names of `--only`.
const ROWS: &[(&str, Measure)] = &[
    ("forward-1", forward::at_least_once),
    ("forward-2", forward::exactly_once),
    ("backlog", backlog::rows),
    ("backlog-2", backlog::exactly_once),
    ("disk", disk::incompressible),
    ("disk-telemetry", disk::telemetry),
    ("far-100", |setting| far::rows(setting, &far::FAR)),
    ("far-600", |setting| far::rows(setting, &far::FARTHER)),
    ("far-600-wide", |setting| far::rows(setting, &far::WIDER)),
    ("slow-32", |setting| far::rows(setting, &far::SLOWER)),
    ("rtu", rtu::rows),
    ("poll", poll::rows),
    ("size", size::rows),
];

/// What fieldpost reaches, beside its peers, measured here and now.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Arguments {
    /// These rows alone; may be given several times
    #[arg(long, value_name = "NAME", value_parser = ROWS.iter().map(|(name, _)| *name).collect::<Vec<_>>())]
    only: Vec<String>,
    /// Fewer messages and repeats, to see that everything works; not to be quoted
    #[arg(long)]
    quick: bool,
    /// Paired repeats of each row [default: 5, with --quick 1]; fewer than 5 are not to be quoted
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    repeats: Option<u16>,
    /// JSON with every single figure
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Markdown
    #[arg(long)]
    markdown: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut setting = match Setting::new(arguments.quick, arguments.repeats) {
        Ok(setting) => setting,
        Err(failure) => {
            say(&format!("bench: {failure}"));
            return ExitCode::FAILURE;
        }
    };
    let mut table = Table { about: about(&setting), ..Table::default() };
    let began = Instant::now();
    let asked = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    for (name, measure) in ROWS.iter().filter(|(name, _)| asked(name)) {
        say(&format!("{:5} s  {name}", began.elapsed().as_secs()));
        match measure(&setting).and_then(|rows| setting.clear().map(|()| rows)) {
            Ok(rows) => table.rows.extend(rows),
            Err(failure) => {
                say(&format!("         {name} was not measured: {failure}"));
                table.failures.push((name, failure.to_string()));
            }
        }
    }
    say(&format!("{:5} s  done", began.elapsed().as_secs()));
    let text = match (arguments.json, arguments.markdown) {
        (true, _) => format!("{:#}\n", table.json()),
        (_, true) => table.markdown(),
        _ => table.text(),
    };
    let written = io::stdout().write_all(text.as_bytes());
    if table.failures.is_empty() && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The machine and the versions: without them no figure means anything.
fn about(setting: &Setting) -> Vec<String> {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = model.map_or(std::env::consts::ARCH, |(_, model)| model);
    let mut about = vec![
        format!("fieldpost {}", env!("CARGO_PKG_VERSION")),
        format!("{cores} x {model}, Linux {}", kernel.trim()),
    ];
    // It prints its version with its help, and a status that means nothing.
    let mosquitto =
        support::mosquitto::find("mosquitto").and_then(|path| Command::new(path).arg("-h").output().ok());
    let version = mosquitto.and_then(|output| String::from_utf8(output.stdout).ok());
    about.extend(version.iter().filter_map(|text| text.lines().next()).map(str::to_owned));
    if setting.quick {
        about.push("--quick: small and once, not to be quoted".to_owned());
    }
    if cfg!(debug_assertions) {
        about.push("A debug build: not to be quoted; use cargo run --release".to_owned());
    }
    about
}

/// Progress and failures. Standard error may be closed; then there is nobody to tell.
fn say(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}
