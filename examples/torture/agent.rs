//! The real agent as a child process on the disk that forgets, and its folder.
//!
//! The child is this same program, which becomes the agent when [`AS_AGENT`] is set: exactly `fieldpost run`, or
//! the same with faults. Invariant: no child outlives the torture, however that ends: it is killed when its
//! handle is dropped, and by the kernel when its parent dies.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use fieldpost::agent::Faults;
use fieldpost::control::client;
use fieldpost::control::wire::{Answer, Question, Status};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::disk::{Disk, DiskError, Keep, Lost};
use crate::support::agent::Config;

/// Set in the environment of the child.
const AS_AGENT: &str = "FIELDPOST_TORTURE_AGENT";
/// Its faults: milliseconds, anything, the name of a setting.
const STALL_MS: &str = "FIELDPOST_TORTURE_STALL_MS";
const BREAK_ORDER: &str = "FIELDPOST_TORTURE_BREAK_ORDER";
const SYNCHRONOUS: &str = "FIELDPOST_TORTURE_SYNCHRONOUS";

/// What `PRAGMA synchronous` may be set to.
pub(crate) const SYNC: [&str; 3] = ["full", "normal", "off"];

/// Becomes the agent if this process was started as the child.
pub(crate) fn become_agent() -> Option<ExitCode> {
    std::env::var_os(AS_AGENT)?;
    // Best effort: a torture that is killed with -9 cannot do it.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let faults = [STALL_MS, BREAK_ORDER, SYNCHRONOUS].map(|name| std::env::var(name).ok());
    if faults == [None, None, None] {
        return Some(fieldpost::cli::main());
    }
    let file = std::env::args_os().next_back().map(PathBuf::from).unwrap_or_default();
    match run_with_faults(&file, faults) {
        Ok(()) => Some(ExitCode::SUCCESS),
        Err(error) => {
            tracing::error!(%error, "ended");
            Some(ExitCode::FAILURE)
        }
    }
}

fn run_with_faults(
    config: &Path,
    [stall, order, sync]: [Option<String>; 3],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut faults = Faults { break_pubrel_order: order.is_some(), ..Faults::default() };
    faults.store.commit_stall = Duration::from_millis(stall.map_or(Ok(0), |ms| ms.parse())?);
    faults.store.synchronous = SYNC.into_iter().find(|name| Some(*name) == sync.as_deref());
    let file = config.to_owned();
    let config = fieldpost::config::load(&file).map_err(|problems| problems.to_string())?;
    fieldpost::logging::start(&config.log);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(fieldpost::agent::run_with(config, file, faults))?)
}

/// What is broken in every agent of a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Broken {
    /// PUBREL leaves before its commit.
    pub(crate) order: bool,
    /// `PRAGMA synchronous`, if another than FULL.
    pub(crate) sync: Option<&'static str>,
}

/// An agent, its folder and its disk. It need not be running.
#[derive(Debug)]
pub(crate) struct Agent {
    folder: TempDir,
    data: PathBuf,
    disk: Disk,
    broken: Broken,
    child: Option<Child>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended = self.kill();
    }
}

impl Agent {
    /// Makes the folder, and starts nothing.
    pub(crate) fn prepare(url: &str, protocol: &str, broken: Broken) -> Result<Agent, DiskError> {
        let folder = tempfile::Builder::new().prefix("fieldpost-torture-").tempdir()?;
        let path = folder.path().canonicalize()?;
        let (data, below) = (path.join("data"), path.join("disk"));
        std::fs::create_dir(&data)?;
        std::fs::create_dir(&below)?;
        let disk = Disk::prepare(&below, &data.join("outbox.db"))?;
        std::fs::write(data.join("fieldpost.toml"), configuration(url, protocol).text())?;
        Ok(Agent { folder, data, disk, broken, child: None })
    }

    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Keeps the folder for whoever wants to know what went wrong.
    pub(crate) fn keep(&mut self) {
        self.folder.disable_cleanup(true);
    }

    /// Its disk.
    pub(crate) fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Its control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.data.join("control.sock")
    }

    /// Its log, over all starts.
    pub(crate) fn log(&self) -> PathBuf {
        self.data.join("agent.log")
    }

    /// Starts it and waits for nothing. Call it on the main thread: the kernel's signal at the parent's death
    /// comes when the thread that started the child ends.
    pub(crate) fn start(&mut self, stall: Duration) -> io::Result<()> {
        let log = OpenOptions::new().create(true).append(true).open(self.log())?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").arg(self.data.join("fieldpost.toml"));
        command.env(AS_AGENT, "1").env("NO_COLOR", "1").envs(self.disk.environment());
        if !stall.is_zero() {
            command.env(STALL_MS, stall.as_millis().to_string());
        }
        if self.broken.order {
            command.env(BREAK_ORDER, "1");
        }
        if let Some(sync) = self.broken.sync {
            command.env(SYNCHRONOUS, sync);
        }
        use std::os::unix::process::CommandExt;
        // A group of its own: Ctrl-C on the terminal is for the torture, which then ends its child.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        self.child = Some(command.spawn()?);
        Ok(())
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.as_mut().map_or(Ok(None), Child::try_wait)
    }

    /// Whether it was started and has not ended.
    pub(crate) fn is_running(&mut self) -> io::Result<bool> {
        Ok(self.child.is_some() && self.ended()?.is_none())
    }

    /// SIGKILL, which no process can catch; returns when it is gone.
    pub(crate) fn kill(&mut self) -> io::Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill()?;
        child.wait().map(drop)
    }

    /// SIGTERM, and nothing else: see [`Agent::is_running`].
    pub(crate) fn ask_to_stop(&self) -> io::Result<()> {
        let pid = self.child.as_ref().and_then(|child| Pid::from_raw(child.id().cast_signed()));
        pid.map_or(Ok(()), |pid| Ok(rustix::process::kill_process(pid, Signal::TERM)?))
    }

    /// What a power cut leaves of a dead agent's disk.
    pub(crate) fn cut_power(&self, keep: Keep, random: &mut fastrand::Rng) -> io::Result<Lost> {
        self.disk.cut_power(keep, random)
    }

    /// What it says about itself.
    pub(crate) fn status(&self) -> Option<Status> {
        match client::ask(&self.socket(), &Question::Status {}) {
            Ok(Answer::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Databases that were set aside as damaged, by name.
    pub(crate) fn quarantined(&self) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(&self.data)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<io::Result<Vec<_>>>()?.into_iter();
        let names = names.map(|name| name.to_string_lossy().into_owned());
        Ok(names.filter(|name| name.starts_with("outbox.db.corrupt-") && !name.ends_with("-wal")).collect())
    }

    /// The last lines of its log.
    pub(crate) fn tail(&self, lines: usize) -> String {
        let text = std::fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// Ordinary settings, but for short patience: faults last less than a second or two. A full queue refuses, so
/// that whatever is dropped is a failure.
fn configuration(url: &str, protocol: &str) -> Config {
    Config::new(url)
        .protocol(protocol)
        .with("gateway", "drain_timeout = \"200ms\"")
        .with("broker", "connect_timeout = \"1s\"")
        .with("broker", "ack_timeout = \"1s\"")
        .with("broker", "keep_alive = \"5s\"")
        .with("store", "when_full = \"reject_new\"")
        .with("store", "quota = \"1MiB\"")
        .with("store", "commit_interval = \"5ms\"")
}
