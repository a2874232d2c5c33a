//! The torture: the agent is killed, its power is cut, its link, its broker and its disk fail, again and again,
//! and every message it accepted arrives once.
//!
//! ```text
//! cargo run --release --example torture [-- --cycles 10000]
//! ```
//!
//! The real agent is a child process on real files, the broker a real mosquitto; what arrived is counted in the
//! broker's own log. Needs no root; mosquitto and a C compiler. Invariant: exit status 0 if and only if nothing
//! was lost, doubled, dropped or corrupt, and something real happened; the last line says it either way.

#[path = "torture/agent.rs"]
mod agent;
#[path = "torture/disk.rs"]
mod disk;
#[path = "torture/log.rs"]
mod log;
#[path = "torture/plan.rs"]
mod plan;
#[path = "torture/producer.rs"]
mod producer;
#[path = "torture/screen.rs"]
mod screen;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "torture/tally.rs"]
mod tally;
#[path = "torture/trial.rs"]
mod trial;
#[path = "torture/witness.rs"]
mod witness;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

use agent::Broken;
use trial::{Failure, Outcome, Settings, Trial};

/// Lines of the agent's log that are shown when something went wrong.
const LOG_LINES: usize = 40;

/// Kills, power cuts, broken links, restarts of the broker, full disks: every accepted message exactly once.
#[derive(Debug, Parser)]
#[command(name = "torture")]
struct Arguments {
    /// Faults, one after the other; 100 take about a minute, 10000 one to two hours
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    cycles: u64,
    /// What draws the faults and their moments [default: another each time]
    #[arg(long)]
    seed: Option<u64>,
    /// MQTT version
    #[arg(long, default_value = "5", value_parser = ["5", "3.1.1"])]
    protocol: String,
    /// QoS of the messages; 1 permits duplicates
    #[arg(long, default_value = "2", value_parser = ["1", "2"])]
    qos: String,
    /// Negative control: PUBREL leaves before its commit, which must be found out
    #[arg(long)]
    break_order: bool,
    /// Negative control: another setting than "full" must be found out
    #[arg(long, default_value = "full", value_parser = agent::SYNC)]
    sync: String,
    /// Keep the files also when all went well
    #[arg(long)]
    keep: bool,
}

impl Arguments {
    fn settings(&self) -> Settings {
        let sync = agent::SYNC.into_iter().find(|name| *name == self.sync).filter(|name| *name != "full");
        Settings {
            cycles: self.cycles,
            seed: self.seed.unwrap_or_else(|| fastrand::u64(..1_000_000)),
            protocol: self.protocol.clone(),
            qos: if self.qos == "1" { 1 } else { 2 },
            broken: Broken { order: self.break_order, sync },
        }
    }
}

fn main() -> ExitCode {
    if let Some(exit) = agent::become_agent() {
        return exit;
    }
    let arguments = Arguments::parse();
    // The proxy goes on while the main thread waits for a process.
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("torture: the system gives no event queue, timer or thread: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let exit = runtime.block_on(run(&arguments));
    runtime.shutdown_background();
    exit
}

async fn run(arguments: &Arguments) -> ExitCode {
    let settings = arguments.settings();
    let seed = settings.seed;
    let mut trial = match Box::pin(Trial::prepare(settings)).await {
        Ok(trial) => trial,
        Err(failure) => {
            complain(&format!("torture: {failure}"));
            return ExitCode::FAILURE;
        }
    };
    trial.say_what_is_tried();
    let ran = tokio::select! {
        ran = Box::pin(trial.run()) => ran,
        () = interrupted() => Err(Failure::Interrupted),
    };
    let Outcome { verdict, screen, mut agent, failure, last } = Box::pin(trial.end(ran)).await;
    let clean = verdict.is_clean();
    if !clean {
        complain(&format!("\ntorture: --seed {seed}, cycle {}: {last}", verdict.cycles));
        for words in
            failure.iter().map(ToString::to_string).chain(verdict.details.iter().map(|(_, w)| w.clone()))
        {
            complain(&format!("  {words}"));
        }
        if let Some((n, _)) = verdict.details.first() {
            complain(&format!(
                "\nWhat the broker's log has of message {n}:\n{}",
                trial::receptions(&agent, *n)
            ));
        }
        complain(&format!("The end of the agent's log:\n{}", agent.tail(LOG_LINES)));
    }
    if arguments.keep {
        agent.keep();
        complain(&format!("The files are in {}", agent.folder().display()));
    } else if !clean {
        complain("With --keep the files stay.");
    }
    screen.say(&verdict.to_string());
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// SIGINT or SIGTERM: after both the broker and the agent must go.
async fn interrupted() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

/// Standard error may be closed; then there is nobody to tell.
fn complain(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}
