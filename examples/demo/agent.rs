//! The real agent as a child process, its folder, and the control socket to it.
//!
//! The child is this same program, which becomes the agent when [`AS_AGENT`] is set. Invariant: no child
//! outlives the demo, however that ends: it is killed when its handle is dropped, and by the kernel when its
//! parent dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use fieldpost::control::client::{self, ClientError};
use fieldpost::control::wire::{Answer, Publish, Question, Status};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::device::UNITS;

/// Set in the environment of the child.
const AS_AGENT: &str = "FIELDPOST_DEMO_AGENT";

/// The gateway's id, first level of every topic of its own messages, and its client id.
pub(crate) const GATEWAY: &str = "press-shop-1";

/// How often the agent is asked how it is.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// How long notes may take to be accepted.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);

/// Becomes the agent if this process was started as the child.
pub(crate) fn become_agent() -> Option<ExitCode> {
    std::env::var_os(AS_AGENT)?;
    // Best effort: a demo that is killed with -9 cannot do it.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    Some(fieldpost::cli::main())
}

/// Where the agent lives: its configuration, database, control socket and log.
#[derive(Debug)]
pub(crate) struct Home {
    folder: TempDir,
}

impl Home {
    /// A new folder with a configuration in it. `every` is how often each unit is read.
    pub(crate) fn new(broker: &str, protocol: &str, device_port: u16, every: Duration) -> io::Result<Home> {
        let folder = tempfile::Builder::new().prefix("fieldpost-demo-").tempdir()?;
        let home = Home { folder };
        std::fs::write(home.path("fieldpost.toml"), configuration(broker, protocol, device_port, every))?;
        Ok(home)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The database.
    pub(crate) fn database(&self) -> PathBuf {
        self.path("outbox.db")
    }

    /// The log of every agent that lived here.
    pub(crate) fn log(&self) -> PathBuf {
        self.path("agent.log")
    }

    fn socket(&self) -> PathBuf {
        self.path("control.sock")
    }

    /// Topic of the readings of each unit.
    pub(crate) fn topics(&self) -> [String; UNITS.len()] {
        UNITS.map(|unit| format!("{GATEWAY}/plant/{unit}"))
    }

    /// Topic of the notes.
    pub(crate) fn notes_topic(&self) -> String {
        format!("{GATEWAY}/notes")
    }

    /// Keeps the folder for whoever wants to know what went wrong.
    pub(crate) fn keep(self) -> PathBuf {
        self.folder.keep()
    }
}

/// Ordinary settings but for three: a device that is read often, a broker that is looked for often, QoS 2.
fn configuration(broker: &str, protocol: &str, device_port: u16, every: Duration) -> String {
    let [boiler, pump] = UNITS;
    let every = every.as_millis();
    format!(
        r#"[gateway]
id = "{GATEWAY}"

[broker]
url = "{broker}"
protocol = "{protocol}"
backoff_max = "1s"

[store]
path = "outbox.db"

[[modbus]]
name = "plant"
transport = "tcp"
host = "127.0.0.1"
port = {device_port}
every = "{every}ms"
qos = 2
# Every change of a value, and of "bad", is told once.
deadband = 0

[[modbus.unit]]
name = "{boiler}"
unit = 1
points = [
  {{ name = "reading", register = "input", address = 0, type = "u32" }},
  {{ name = "temperature", register = "input", address = 2, type = "f32", unit = "°C" }},
  {{ name = "pressure", register = "input", address = 4, type = "u16", scale = 0.01, unit = "bar" }},
]

[[modbus.unit]]
name = "{pump}"
unit = 2
points = [
  {{ name = "reading", register = "input", address = 0, type = "u32" }},
  {{ name = "flow", register = "input", address = 2, type = "f32", unit = "m³/h" }},
  {{ name = "power", register = "input", address = 4, type = "u16", scale = 0.01, unit = "kW" }},
]
"#
    )
}

/// Why notes were not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PublishError {
    /// The agent could not be asked.
    #[error("{0}")]
    Client(#[from] ClientError),
    /// The agent said no.
    #[error("the agent did not accept a note: {0}")]
    Refused(String),
    /// The agent said nothing.
    #[error("the agent did not answer within {} s", PUBLISH_DEADLINE.as_secs())]
    Silent,
}

/// A running agent.
#[derive(Debug)]
pub(crate) struct Agent {
    child: Child,
    pid: Pid,
    status: watch::Receiver<Option<Status>>,
    asker: JoinHandle<()>,
    socket: PathBuf,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.asker.abort();
    }
}

impl Agent {
    /// Starts it; its log goes on where the last one's ended. Call it on the main thread: the kernel's signal
    /// at the parent's death comes when the thread that started the child ends.
    pub(crate) fn start(home: &Home) -> io::Result<Agent> {
        let log = OpenOptions::new().create(true).append(true).open(home.log())?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("run").arg(home.path("fieldpost.toml"));
        command.env(AS_AGENT, "1").env("NO_COLOR", "1");
        // A group of its own: Ctrl-C on the terminal is for the demo, which then ends its child.
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = command.kill_on_drop(true).spawn()?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        let pid = pid.ok_or_else(|| io::Error::other("the child ended before it began"))?;
        let (sender, status) = watch::channel(None);
        let asker = tokio::spawn(keep_asking(home.socket(), sender));
        Ok(Agent { child, pid, status, asker, socket: home.socket() })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// What it last said about itself.
    pub(crate) fn status(&self) -> Option<Status> {
        self.status.borrow().clone()
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// SIGKILL, which no process can catch; returns when it is gone.
    pub(crate) async fn kill(mut self) -> io::Result<()> {
        self.child.kill().await
    }

    /// SIGTERM; how it ended, or `None` if it did not in time.
    pub(crate) async fn stop(mut self, within: Duration) -> io::Result<Option<ExitStatus>> {
        rustix::process::kill_process(self.pid, Signal::TERM)?;
        match timeout(within, self.child.wait()).await {
            Ok(status) => status.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Hands in messages at QoS 2 in the lane that is sent first, all at once; returns when every one is
    /// accepted, which means on disk.
    pub(crate) async fn publish(&self, topic: &str, payloads: Vec<String>) -> Result<(), PublishError> {
        let (socket, topic) = (self.socket.clone(), topic.to_owned());
        let handed_in = tokio::task::spawn_blocking(move || hand_in(&socket, &topic, payloads));
        match timeout(PUBLISH_DEADLINE, handed_in).await {
            Ok(outcome) => outcome.expect("a panic ends the process"),
            Err(_) => Err(PublishError::Silent),
        }
    }
}

fn hand_in(socket: &Path, topic: &str, payloads: Vec<String>) -> Result<(), PublishError> {
    let (mut asker, mut answers) = client::connect(socket)?;
    let count = payloads.len();
    for payload in payloads {
        asker.ask(&Question::Publish(Publish {
            topic: topic.to_owned(),
            qos: 2,
            retain: false,
            lane: Some("alarm".into()),
            text: Some(payload),
            json: None,
            hex: None,
        }))?;
    }
    asker.flush()?;
    for _ in 0..count {
        match answers.hear()? {
            Answer::Accepted {} => {}
            other => return Err(PublishError::Refused(format!("{other:?}"))),
        }
    }
    Ok(())
}

/// Asks until nobody wants to know, or the agent is gone; one that has just started does not answer yet.
async fn keep_asking(socket: PathBuf, status: watch::Sender<Option<Status>>) {
    while !status.is_closed() {
        let socket = socket.clone();
        let asked = tokio::task::spawn_blocking(move || client::ask(&socket, &Question::Status {}));
        if let Ok(Ok(Answer::Status(answer))) = asked.await {
            status.send_replace(Some(*answer));
        }
        sleep(ASK_EVERY).await;
    }
}

/// The last lines of the log.
pub(crate) fn log_tail(log: &Path, lines: usize) -> String {
    let text = File::open(log).and_then(io::read_to_string).unwrap_or_else(|error| error.to_string());
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("    {line}\n")).collect()
}
