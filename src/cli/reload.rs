//! `fieldpost reload`: has the running agent read its configuration again, and tells what became of that.
//!
//! Exit status 0 when the agent runs by what the file says, 78 when the file is bad, 1 when it cannot be taken over
//! while the agent runs, or no agent answers.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;

use super::{Agent, Failure, printable};
use crate::config;
use crate::control::client;
use crate::control::wire::{Answer, Question};

/// `fieldpost reload`
#[derive(Debug, Args)]
pub(super) struct Reload {
    /// The agent's answer, as JSON, for programs
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    agent: Agent,
    /// The agent's configuration file, which names the socket
    #[arg(conflicts_with_all = ["socket", "config"])]
    file: Option<PathBuf>,
}

impl Reload {
    pub(super) fn run(self) -> Result<(), Failure> {
        let socket = match &self.file {
            Some(file) => config::load(file)?.control.socket,
            None => self.agent.socket()?,
        };
        let answer = client::ask(&socket, &Question::Reload {})?;
        if self.json {
            let json = serde_json::to_string_pretty(&answer).expect("answers have text keys only");
            writeln!(io::stdout(), "{json}").map_err(Failure::Output)?;
        }
        match answer {
            Answer::Reloaded { .. } if self.json => Ok(()),
            Answer::Reloaded { changes, warnings } => {
                io::stdout().write_all(told(&changes, &warnings).as_bytes()).map_err(Failure::Output)
            }
            Answer::NotReloaded { reason, problems, .. } if problems.is_empty() => {
                Err(Failure::NotReloaded(printable(&reason)))
            }
            Answer::NotReloaded { reason, .. } => {
                let lines: Vec<String> = reason.lines().map(printable).collect();
                Err(Failure::BadReload(lines.join("\n")))
            }
            Answer::Refused { reason } => Err(Failure::NotReloaded(printable(&reason))),
            _ => Err(Failure::OtherAnswer),
        }
    }
}

fn told(changes: &[String], warnings: &[String]) -> String {
    if changes.is_empty() {
        return "nothing changed\n".to_owned();
    }
    let warnings = warnings.iter().map(|warning| format!("warning: {warning}"));
    let lines = changes.iter().cloned().chain(warnings).map(|line| format!("{}\n", printable(&line)));
    lines.collect()
}
