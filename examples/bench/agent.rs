//! The agent that is measured: the shipped program with a configuration, its folder and its control socket.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fieldpost::control::client;
use fieldpost::control::wire::{Answer, Question, Status};

use crate::process::Process;
use crate::setting::{Failure, Setting};
use crate::support::agent::{Config, drained};
use crate::support::wait_until;

/// How long it may take to answer after its start.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent. Killed when dropped; its folder stays for the next start.
#[derive(Debug)]
pub(crate) struct Agent {
    /// Its process.
    pub(crate) process: Process,
    folder: PathBuf,
}

impl Agent {
    /// Starts one in this folder, on the files that are there, and waits until it answers.
    pub(crate) fn start(setting: &Setting, folder: &Path, config: &Config) -> Result<Agent, Failure> {
        let mut agent = Agent::launch(&mut command(setting, folder, config)?, folder)?;
        agent.answers()?;
        Ok(agent)
    }

    /// Waits until it answers.
    pub(crate) fn answers(&mut self) -> Result<(), Failure> {
        let socket = self.socket();
        let answers = || client::ask(&socket, &Question::Status {}).is_ok();
        self.process.expect(PATIENCE, "the agent answers", answers)
    }

    /// Waits until it has nothing queued and nothing in flight.
    pub(crate) fn drained(&self) -> Result<(), Failure> {
        if wait_until(PATIENCE, || self.status().is_ok_and(|status| drained(&status))) {
            return Ok(());
        }
        Err(self.process.failure("its queue does not become empty"))
    }

    /// Starts what [`command`] made, and waits for nothing.
    pub(crate) fn launch(command: &mut Command, folder: &Path) -> Result<Agent, Failure> {
        let process = Process::start(command, &folder.join("agent.log"))?;
        Ok(Agent { process, folder: folder.to_owned() })
    }

    /// Its control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// How it is doing.
    pub(crate) fn status(&self) -> Result<Status, Failure> {
        match client::ask(&self.socket(), &Question::Status {}) {
            Ok(Answer::Status(status)) => Ok(*status),
            Ok(other) => Err(self.process.failure(&format!("no status but {other:?}"))),
            Err(error) => Err(self.process.failure(&error.to_string())),
        }
    }
}

/// The program in this folder with this configuration, not started.
pub(crate) fn command(setting: &Setting, folder: &Path, config: &Config) -> Result<Command, Failure> {
    let file = folder.join("fieldpost.toml");
    std::fs::write(&file, config.text()).map_err(Failure::at(file.display().to_string()))?;
    let mut command = Command::new(&setting.program);
    command.arg("run").arg(file).env_remove("FIELDPOST_LOG").env("NO_COLOR", "1");
    Ok(command)
}
