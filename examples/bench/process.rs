//! Programs that are measured: started with a log, watched through `/proc`, and gone when they are dropped.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::setting::Failure;
use crate::support::wait_until;

/// How long a program may take to end after it was told to.
const PATIENCE: Duration = Duration::from_secs(60);
/// Lines of its log that a failure shows.
const LOG_LINES: usize = 15;
/// Bytes of a log that are looked at.
const LOG_BYTES: usize = 16 * 1024;

/// A running program. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it; what it writes goes to this log.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Result<Process, Failure> {
        let open = || -> io::Result<File> { File::options().create(true).append(true).open(log) };
        let file = open().map_err(Failure::at(log.display().to_string()))?;
        let other = open().map_err(Failure::at(log.display().to_string()))?;
        command.stdin(Stdio::null()).stdout(file).stderr(other);
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(Failure::at(name))?;
        Ok(Process { child, log: log.to_owned() })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a condition of this program; its log is in the failure if it never holds.
    pub(crate) fn expect(
        &mut self,
        within: Duration,
        what: &str,
        mut holds: impl FnMut() -> bool,
    ) -> Result<(), Failure> {
        let mut ended = None;
        let met = wait_until(within, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || holds()
        });
        match ended {
            Some(status) => Err(self.failure(&format!("it ended ({status}) instead of {what}"))),
            None if !met => Err(self.failure(&format!("not within {} s: {what}", within.as_secs()))),
            None => Ok(()),
        }
    }

    /// What went wrong with it, with the end of its log.
    pub(crate) fn failure(&self, what: &str) -> Failure {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_BYTES)..]);
        let lines: Vec<&str> = text.lines().collect();
        Failure::Other(format!(
            "{what}; its log:\n{}",
            lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
        ))
    }

    /// SIGTERM, and waits for its end.
    pub(crate) fn stop(mut self) -> Result<ExitStatus, Failure> {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _gone = kill_process(pid, Signal::TERM);
        }
        let mut status = None;
        wait_until(PATIENCE, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        status.ok_or_else(|| self.failure("it does not stop"))
    }

    /// SIGKILL, and waits for its end.
    pub(crate) fn kill(mut self) -> Result<(), Failure> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(Failure::at("kill -9"))
    }

    /// Processor time it has used, user and system together, in seconds; the kernel counts hundredths.
    pub(crate) fn cpu_s(&self) -> Result<f64, Failure> {
        // The name, in brackets, may hold anything; utime and stime are fields 14 and 15.
        let text = self.proc("stat")?;
        let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let field = |n: usize| rest.split_whitespace().nth(n - 3)?.parse::<f64>().ok();
        let ticks = field(14).zip(field(15)).map(|(user, system)| user + system);
        // USER_HZ is 100 wherever Linux runs.
        ticks
            .map(|ticks| ticks / 100.0)
            .ok_or_else(|| Failure::Other(format!("/proc/{}/stat: {text}", self.id())))
    }

    /// Memory it holds now, in bytes.
    pub(crate) fn resident(&self) -> Result<u64, Failure> {
        Ok(self.member("status", "VmRSS:")? * 1024)
    }

    /// The most memory it ever held, in bytes.
    pub(crate) fn resident_peak(&self) -> Result<u64, Failure> {
        Ok(self.member("status", "VmHWM:")? * 1024)
    }

    /// Bytes it had the kernel send to a disk; nothing on a tmpfs.
    pub(crate) fn disk_bytes(&self) -> Result<u64, Failure> {
        self.member("io", "write_bytes:")
    }

    fn proc(&self, file: &str) -> Result<String, Failure> {
        let path = format!("/proc/{}/{file}", self.id());
        fs::read_to_string(&path).map_err(Failure::at(path))
    }

    fn member(&self, file: &str, name: &str) -> Result<u64, Failure> {
        let text = self.proc(file)?;
        let value =
            text.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok());
        value.ok_or_else(|| Failure::Other(format!("/proc/{}/{file} has no {name}", self.id())))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _ended = self.child.wait();
    }
}
