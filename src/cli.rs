//! The command line: one file per command.
//!
//! Invariant: the exit status is 0 when what was asked was done, 78 for a bad configuration (EX_CONFIG of
//! sysexits.h: the service manager must not try again), and 1 for anything else.

mod broker;
mod check;
mod columns;
mod publish;
mod queue;
mod reload;
mod retained;
mod run;
mod status;
mod warnings;
mod watch;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::agent::AgentError;
use crate::config::{self, Problems};
use crate::control::client::ClientError;
use crate::logging;
use crate::message::TopicError;
use crate::store::StoreError;
use columns::{Paint, Tone, printable};

/// Where the packaged agent listens.
const DEFAULT_SOCKET: &str = "/var/lib/fieldpost/control.sock";

/// EX_CONFIG of sysexits.h.
const EXIT_CONFIGURATION: u8 = 78;

/// Store-and-forward bridge for gateways: fieldbus in, SQLite, exactly once out to an MQTT broker.
#[derive(Debug, Parser)]
#[command(name = "fieldpost", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent
    Run(run::Run),
    /// Check a configuration file: exit status 78 and every problem, or 0
    Check(check::Check),
    /// Have the running agent read its configuration again: what has changed, or why it goes on with the old one
    Reload(reload::Reload),
    /// Show how the running agent is doing
    Status(status::ShowStatus),
    /// Hand messages to the running agent; "accepted" means that they are on disk
    Publish(publish::HandIn),
    /// What waits for the broker, and what it will never take
    Queue(queue::Queue),
    /// The broker, as this gateway meets it
    #[command(subcommand)]
    Broker(broker::Broker),
    /// Retained messages of the broker
    #[command(subcommand)]
    Retained(retained::Retained),
}

/// How the running agent is found.
#[derive(Debug, Args)]
struct Agent {
    /// The agent's control socket [default: the configuration's, or /var/lib/fieldpost/control.sock]
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    /// The agent's configuration file, which names the socket
    #[arg(long, value_name = "FILE", conflicts_with = "socket", global = true)]
    config: Option<PathBuf>,
}

impl Agent {
    fn socket(&self) -> Result<PathBuf, Failure> {
        match (&self.socket, &self.config) {
            (Some(socket), _) => Ok(socket.clone()),
            (None, Some(file)) => Ok(config::load(file)?.control.socket),
            (None, None) => Ok(PathBuf::from(DEFAULT_SOCKET)),
        }
    }
}

/// Why a command did not do what was asked. The text is for standard error.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Configuration(Problems),
    #[error("fieldpost: {0}")]
    Agent(#[from] AgentError),
    #[error("fieldpost: {0}")]
    Client(#[from] ClientError),
    #[error("{0}\nfieldpost: not reloaded; the agent goes on with the configuration it has")]
    BadReload(String),
    #[error("fieldpost: not reloaded: {0}")]
    NotReloaded(String),
    #[error("fieldpost: not accepted: {0}")]
    Refused(String),
    #[error("fieldpost: the agent's answer does not fit the question; is it another version?")]
    OtherAnswer,
    #[error("fieldpost: {accepted} accepted, {refused} not; the last because: {reason}")]
    PartlyRefused { accepted: u64, refused: u64, reason: String },
    #[error("fieldpost: {accepted} accepted, then: {failure}")]
    BrokeOff { accepted: u64, failure: Box<Failure> },
    #[error("fieldpost: {0}")]
    Store(StoreError),
    #[error("fieldpost: {0}")]
    NotDone(String),
    #[error(
        "fieldpost: --watch draws on a terminal, and this is none (standard output, TERM): give --json as well for a \
         line of JSON again and again, or leave --watch out for one look"
    )]
    NoTerminal,
    #[error("fieldpost: nothing was thrown away; type yes when asked, or give --yes")]
    NotConfirmed,
    #[error("fieldpost: cannot write {}: {source}", path.display())]
    Export { path: PathBuf, source: io::Error },
    #[error("fieldpost: {0} of the checks failed")]
    BrokerUnfit(usize),
    #[error(
        "fieldpost: {0:?} is the agent's own client id: the test would end its connection and its session; \
         choose another --client-id"
    )]
    AgentsClientId(String),
    #[error("fieldpost: [gateway] base_topic: {0}")]
    BaseTopic(TopicError),
    #[error("fieldpost: cannot read the password file {}: {source}; check [broker] password_file", path.display())]
    Password { path: PathBuf, source: io::Error },
    #[error("fieldpost: cannot read standard input: {0}")]
    Input(io::Error),
    #[error("fieldpost: line {line} is longer than {max} bytes")]
    LineTooLong { line: u64, max: usize },
    #[error("fieldpost: cannot write to standard output: {0}")]
    Output(io::Error),
    #[error("fieldpost: the system gives no event queue or timer: {0}")]
    Runtime(io::Error),
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Failure::Configuration(problems)
    }
}

impl Failure {
    fn exit(&self) -> ExitCode {
        match self {
            Failure::Configuration(problems) => {
                complain(problems);
                ExitCode::from(EXIT_CONFIGURATION)
            }
            Failure::BadReload(_) => {
                complain(self);
                ExitCode::from(EXIT_CONFIGURATION)
            }
            // What ends the agent belongs into its log, with its priority.
            Failure::Agent(error) if tracing::enabled!(tracing::Level::ERROR) => {
                tracing::error!("{error}");
                ExitCode::FAILURE
            }
            // Whoever reads our output has seen enough, as in `fieldpost status | head -1`.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
            failure => {
                complain(failure);
                ExitCode::FAILURE
            }
        }
    }
}

/// Standard error may be closed; then there is nobody to tell.
fn complain(what: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{what}");
}

/// The command line as its parser knows it, for the manual pages and the shells' completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program.
pub fn main() -> ExitCode {
    die_on_panic();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    if !matches!(cli.command, Command::Run(_)) {
        logging::start(&logging::Settings::default()); // the agent's are in its configuration
    }
    let outcome = match cli.command {
        Command::Run(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Reload(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Publish(command) => command.run(),
        Command::Queue(command) => command.run(),
        Command::Broker(command) => command.run(),
        Command::Retained(command) => command.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.exit(),
    }
}

/// A panic is a bug of ours, and tokio would end one task and carry on with the rest. The store makes it safe
/// to end all of it (P1), and the service manager starts it again.
fn die_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let words = format!("{panic}; this is a bug in fieldpost, please report it");
        match tracing::enabled!(tracing::Level::ERROR) {
            true => tracing::error!("{words}"),
            false => complain(words),
        }
        std::process::abort();
    }));
}

/// Whether colours are welcome there.
fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

impl Paint {
    /// As is welcome there.
    fn of(stream: &impl IsTerminal) -> Self {
        Paint { colours: colours(stream) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn commands_are_spelt_as_documented() {
        for line in [
            "run gateway.toml",
            "run gateway.toml --dry",
            "check gateway.toml",
            "reload",
            "reload gateway.toml --json",
            "reload --socket /run/x.sock",
            "status",
            "status --json --socket /run/x.sock",
            "status gateway.toml",
            "status --config gateway.toml",
            "status --watch",
            "status --watch --interval 500ms gateway.toml",
            "status --watch --json --interval 5min",
            "publish --topic a/b 21.5",
            "publish --topic a/b --qos 2 --retain --lane alarm --socket x",
            "publish --topic a/b -- -1",
            "publish --topic a/b -1.5",
            "queue ls",
            "queue --config gateway.toml ls --lane bulk --limit 3 --json",
            "queue ls --dead",
            "queue export all.jsonl --lane normal",
            "queue requeue 1 2",
            "queue requeue --all",
            "queue purge --lane bulk --yes",
            "broker test gateway.toml",
            "broker test gateway.toml --json --client-id x",
            "retained clear a/b --config gateway.toml",
        ] {
            let parsed = Cli::try_parse_from(std::iter::once("fieldpost").chain(line.split(' ')));
            assert!(parsed.is_ok(), "{line}: {}", parsed.expect_err("not ok"));
        }
        for line in [
            "",
            "run",
            "publish 21.5",
            "publish --topic a --qos 3 x",
            "publish --topic a --lane fast x",
            "status --socket a --config b",
            "status --socket a b",
            "status --interval 1s",
            "status --watch --interval 1",
            "status --watch --interval 10ms",
            "retained clear",
            "queue requeue",
            "queue purge --yes",
            "queue purge --lane bulk --all",
        ] {
            let parsed = Cli::try_parse_from(std::iter::once("fieldpost").chain(line.split(' ')));
            assert!(parsed.is_err(), "{line}");
        }
    }
}
