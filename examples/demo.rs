//! The demo: a gateway whose broker goes away and that is killed on the way, and every message arrives once.
//!
//! ```text
//! cargo run --release --example demo [-- --protocol 3.1.1]
//! ```
//!
//! Needs no root, no network and no broker: a simulated device and a model broker run in here, and the real
//! agent is a child process. Invariant: exit status 0 if and only if the last line says
//! `accepted=N delivered=N lost=0 duplicates=0` with N over 100, and nothing else was wrong.

#[path = "demo/agent.rs"]
mod agent;
#[path = "demo/device.rs"]
mod device;
#[path = "demo/ledger.rs"]
mod ledger;
#[path = "demo/screen.rs"]
mod screen;
#[path = "demo/show.rs"]
mod show;
#[path = "../tests/support/mod.rs"]
mod support;
#[path = "demo/tally.rs"]
mod tally;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

use show::{Failure, Show};
use tally::Tally;

/// The whole show; about 28 s on an idle machine.
const TOO_LONG: Duration = Duration::from_secs(55);

/// Lines of the agent's log that are shown when something went wrong.
const LOG_LINES: usize = 20;

/// A simulated device, the real agent, a model broker: an outage, a kill -9, and every message exactly once.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// MQTT version
    #[arg(long, default_value = "5", value_parser = ["5", "3.1.1"])]
    protocol: String,
    /// Keep the agent's folder (configuration, database, log) also when all went well
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    if let Some(exit) = agent::become_agent() {
        return exit;
    }
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&format!("demo: the system gives no event queue or timer: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let exit = runtime.block_on(run(&arguments));
    // A question to an agent that hangs may still wait for its answer.
    runtime.shutdown_background();
    exit
}

async fn run(arguments: &Arguments) -> ExitCode {
    let mut show = match Show::prepare(&arguments.protocol).await {
        Ok(show) => show,
        Err(failure) => {
            complain(&format!("demo: {failure}"));
            return ExitCode::FAILURE;
        }
    };
    let outcome = tokio::select! {
        outcome = show.play() => outcome,
        () = tokio::time::sleep(TOO_LONG) => Err(Failure::TooLong(TOO_LONG)),
        _ = tokio::signal::ctrl_c() => Err(Failure::Interrupted),
    };
    let (screen, home) = show.end().await;
    let clean = outcome.as_ref().is_ok_and(Tally::is_clean);
    if !clean {
        for words in troubles(&outcome) {
            complain(&format!("demo: {words}"));
        }
        let tail = agent::log_tail(&home.log(), LOG_LINES);
        complain(&format!("\nThe end of the agent's log:\n{tail}All of it is in {}", home.keep().display()));
    } else if arguments.keep {
        screen.say(&format!("The agent's folder is {}\n", home.keep().display()));
    }
    if let Ok(tally) = outcome {
        screen.last_line(&tally.to_string());
    }
    if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn troubles(outcome: &Result<Tally, Failure>) -> Vec<String> {
    match outcome {
        Err(failure) => vec![failure.to_string()],
        Ok(tally) if tally.faults.is_empty() => vec!["the numbers below do not fit together".into()],
        Ok(tally) => tally.faults.clone(),
    }
}

/// Standard error may be closed; then there is nobody to tell.
fn complain(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}
