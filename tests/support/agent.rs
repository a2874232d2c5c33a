//! The real agent as a child process: configured, started, asked, killed, started again on the same files.
//!
//! Everything here blocks; call it from a test's own thread. What the agent logs is kept, and its tail is shown
//! when something does not happen.
//!
//! Invariant: the agent and its files are gone when the value is dropped.

use super::wait_until;
use fieldpost::agent::{Faults, Part};
use fieldpost::control::client::{self, ClientError};
use fieldpost::control::wire::{Answer, Publish, Question, Status};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long the agent may take to start, or to end after it was told to.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests sent ahead of their answers.
const AHEAD: usize = 200;
/// Name of the test that is the agent when this variable names a configuration file; see [`be_the_agent`].
const CONFIG_VARIABLE: &str = "FIELDPOST_TEST_AGENT_CONFIG";
/// Faults of that agent: two orders that are broken, a number of milliseconds, a part that is frozen, and haste.
const BREAK_PUBREL_ORDER_VARIABLE: &str = "FIELDPOST_TEST_AGENT_BREAKS_PUBREL_ORDER";
const BREAK_COMMAND_ORDER_VARIABLE: &str = "FIELDPOST_TEST_AGENT_BREAKS_COMMAND_ORDER";
const COMMIT_STALL_VARIABLE: &str = "FIELDPOST_TEST_AGENT_COMMIT_STALL_MS";
const FROZEN_VARIABLE: &str = "FIELDPOST_TEST_AGENT_FREEZES";
const HASTE_VARIABLE: &str = "FIELDPOST_TEST_AGENT_HASTE";
/// What can be frozen.
const PARTS: [Part; 5] = [Part::Line, Part::Pipeline, Part::Dispatch, Part::Uplink, Part::Reporter];
/// Where that agent finds its machine.
const MACHINE_ROOT_VARIABLE: &str = "FIELDPOST_TEST_AGENT_MACHINE_ROOT";

/// The binary under test; only integration tests are told where it is.
pub fn binary() -> PathBuf {
    match option_env!("CARGO_BIN_EXE_fieldpost") {
        Some(path) => PathBuf::from(path),
        None => panic!("only integration tests are built with the binary"),
    }
}

/// Runs `fieldpost` with these arguments to its end.
pub fn fieldpost(arguments: &[&str]) -> Output {
    super::command(binary())
        .args(arguments)
        .env_remove("FIELDPOST_LOG")
        .stdin(Stdio::null())
        .output()
        .expect("the binary under test can be run")
}

/// A configuration file as text, table by table.
#[derive(Clone, Debug)]
pub struct Config {
    tables: BTreeMap<&'static str, Vec<String>>,
    other_brokers: Vec<String>,
    rest: String,
}

impl Config {
    /// Gateway `g1`, which publishes to this broker and tries again at least every second.
    pub fn new(url: &str) -> Config {
        let config = Config { tables: BTreeMap::new(), other_brokers: Vec::new(), rest: String::new() };
        config
            .with("gateway", "id = \"g1\"")
            .with("broker", &format!("url = \"{url}\""))
            .with("broker", "backoff_max = \"1s\"")
            .with("store", "path = \"outbox.db\"")
    }

    /// One more line in a table; it replaces the line with the same key.
    pub fn with(mut self, table: &'static str, line: &str) -> Config {
        let key = |line: &str| line.split('=').next().map(|key| key.trim().to_owned());
        let lines = self.tables.entry(table).or_default();
        lines.retain(|other| key(other) != key(line));
        lines.push(line.to_owned());
        self
    }

    /// Speaks this protocol, `5` or `3.1.1`.
    pub fn protocol(self, version: &str) -> Config {
        self.with("broker", &format!("protocol = \"{version}\""))
    }

    /// Another broker to fail over to, with its settings, line by line.
    pub fn or_else(mut self, lines: &[&str]) -> Config {
        self.other_brokers.push(format!("[[broker]]\n{}\n", lines.join("\n")));
        self
    }

    /// More text, after the tables: lines and units.
    pub fn and(mut self, text: &str) -> Config {
        self.rest.push_str(text);
        self
    }

    /// The file's content.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (table, lines) in &self.tables {
            let several = *table == "broker" && !self.other_brokers.is_empty();
            let header = if several { format!("[[{table}]]") } else { format!("[{table}]") };
            let _ = writeln!(text, "{header}\n{}\n", lines.join("\n"));
        }
        text + &self.other_brokers.join("\n") + &self.rest
    }
}

/// An agent and its files. It need not be running.
#[derive(Debug)]
pub struct Agent {
    dir: TempDir,
    faults: Option<Faults>,
    env: Vec<(&'static str, OsString)>,
    first: Option<String>,
    child: Option<Child>,
}

impl Agent {
    /// Writes the configuration and starts the binary. Panics, with its log, unless its control socket answers.
    pub fn start(config: &Config) -> Agent {
        let mut agent = Agent::prepared(config);
        agent.start_again();
        agent
    }

    /// Writes the configuration and starts nothing.
    pub fn prepared(config: &Config) -> Agent {
        let dir = TempDir::new().expect("a temporary directory");
        let agent = Agent { dir, faults: None, env: Vec::new(), first: None, child: None };
        agent.configure(config);
        agent
    }

    /// The same agent with faults: this test binary as the agent. It must hold a test `agent_with_faults` that
    /// calls [`be_the_agent`].
    pub fn start_with_faults(config: &Config, faults: Faults) -> Agent {
        let mut agent = Agent::prepared(config);
        agent.faults = Some(faults);
        agent.start_again();
        agent
    }

    /// Loads this library into every later start of it.
    pub fn preload(&mut self, library: PathBuf) {
        self.set_env("LD_PRELOAD", library);
    }

    /// Has these faults from the next start on; see [`Agent::start_with_faults`].
    pub fn have_faults(&mut self, faults: Faults) {
        self.faults = Some(faults);
    }

    /// Sets an environment variable for its next starts.
    pub fn set_env(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.env.retain(|(other, _)| *other != name);
        self.env.push((name, value.into()));
    }

    /// Before its next starts a shell runs this, `umask 0` for one.
    pub fn run_first(&mut self, command: &str) {
        self.first = Some(command.to_owned());
    }

    /// Takes the limit on file sizes from the running agent.
    pub fn raise_file_size(&self) {
        let pid = self.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        let unlimited = Rlimit { current: None, maximum: None };
        prlimit(pid, Resource::Fsize, unlimited).expect("a child's limit may be raised to its hard limit");
    }

    /// Replaces the configuration; the next start reads it.
    pub fn configure(&self, config: &Config) {
        fs::write(self.config_file(), config.text()).expect("the temporary directory can be written");
    }

    /// Replaces the configuration and has the running agent read it, through the program.
    pub fn reload(&self, config: &Config) -> Output {
        self.configure(config);
        self.reload_file()
    }

    /// Has the running agent read its configuration again, through the program.
    pub fn reload_file(&self) -> Output {
        let socket = self.socket();
        fieldpost(&["reload", "--socket", socket.to_str().expect("the path is UTF-8")])
    }

    /// Starts it on the files it has. Panics, with its log, unless its control socket answers.
    pub fn start_again(&mut self) {
        self.spawn();
        let mut ended = None;
        let answers = wait_until(PATIENCE, || {
            ended = self.ended();
            ended.is_some() || self.ask(&Question::Status {}).is_ok()
        });
        assert!(answers && ended.is_none(), "the agent did not start ({ended:?}):\n{}", self.tail());
    }

    /// Starts it on the files it has and waits for nothing.
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the agent is running already");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_file());
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).envs(self.env.iter().cloned());
        command.stderr(log.expect("the temporary directory can be written"));
        self.child = Some(command.spawn().expect("the agent's program can be run"));
    }

    fn command(&self) -> Command {
        let Some(first) = &self.first else { return self.bare_command() };
        let bare = self.bare_command();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{first} && exec \"$0\" \"$@\"")]);
        command.arg(bare.get_program()).args(bare.get_args()).env_remove("FIELDPOST_LOG");
        command
    }

    fn bare_command(&self) -> Command {
        let Some(faults) = self.faults else {
            let mut command = super::command(binary());
            command.arg("run").arg(self.config_file()).env_remove("FIELDPOST_LOG");
            return command;
        };
        let this = std::env::current_exe().expect("the system knows which program this is");
        let mut command = super::command(this);
        command.args(["--exact", "agent_with_faults", "--nocapture"]);
        command.env(CONFIG_VARIABLE, self.config_file());
        command.env(COMMIT_STALL_VARIABLE, faults.store.commit_stall.as_millis().to_string());
        command.env(HASTE_VARIABLE, faults.haste.to_string());
        if let Some(part) = faults.frozen {
            command.env(FROZEN_VARIABLE, format!("{part:?}"));
        }
        if faults.break_pubrel_order {
            command.env(BREAK_PUBREL_ORDER_VARIABLE, "1");
        }
        if faults.break_command_order {
            command.env(BREAK_COMMAND_ORDER_VARIABLE, "1");
        }
        if let Some(root) = faults.machine_root {
            command.env(MACHINE_ROOT_VARIABLE, root);
        }
        command
    }

    /// Where its files are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.dir.path().join("fieldpost.toml")
    }

    /// Its database.
    pub fn database(&self) -> PathBuf {
        self.dir.path().join("outbox.db")
    }

    /// Its control socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    fn log_file(&self) -> PathBuf {
        self.dir.path().join("agent.log")
    }

    /// Its whole log, over all starts, without colours.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// The last lines of its log.
    pub fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// How often a text stands in its log.
    pub fn logged(&self, text: &str) -> usize {
        self.log().matches(text).count()
    }

    /// Waits until its log holds this text. Panics, with the log's tail, if it never does.
    pub fn expect_log(&self, within: Duration, text: &str) {
        let found = wait_until(within, || self.logged(text) > 0);
        assert!(found, "the agent did not log {text:?}:\n{}", self.tail());
    }

    /// Waits until its log holds this text so many times. Panics, with the log's tail, if it never does.
    pub fn expect_log_times(&self, within: Duration, text: &str, times: usize) {
        let found = wait_until(within, || self.logged(text) >= times);
        assert!(found, "the agent did not log {text:?} {times} times:\n{}", self.tail());
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Memory it holds, in KiB. Panics if it is not running.
    pub fn resident_kib(&self) -> u64 {
        let pid = self.pid().expect("the agent is running");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.unwrap_or_else(|| panic!("the agent is gone:\n{}", self.tail()))
    }

    /// Whether it runs; one that has ended by itself does not.
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.ended().is_none()
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Asks its control socket one thing.
    pub fn ask(&self, question: &Question) -> Result<Answer, ClientError> {
        client::ask(&self.socket(), question)
    }

    /// How it is doing. Panics, with its log, if it does not say.
    pub fn status(&self) -> Status {
        match self.ask(&Question::Status {}) {
            Ok(Answer::Status(status)) => *status,
            other => panic!("no status but {other:?}:\n{}", self.tail()),
        }
    }

    /// Waits until its status is as wished. Panics, with the last one and its log, if it never is.
    pub fn expect(&self, within: Duration, what: &str, mut wished: impl FnMut(&Status) -> bool) -> Status {
        let mut last = self.status();
        let fits = wait_until(within, || {
            last = self.status();
            wished(&last)
        });
        assert!(fits, "never {what}; last {last:#?}\n{}", self.tail());
        last
    }

    /// Waits until nothing is queued and nothing in flight.
    pub fn expect_drained(&self, within: Duration) -> Status {
        self.expect(within, "drained", drained)
    }

    /// Hands messages over, in order, and returns when all are accepted. Panics if one is not.
    pub fn accept<'a>(&self, topic: &str, qos: u8, payloads: impl IntoIterator<Item = &'a str>) {
        let question = |payload: &str| Question::Publish(publish(topic, qos, payload));
        self.accept_all(payloads.into_iter().map(question));
    }

    /// Asks all of these things, in order, and returns when all are accepted. Panics if one is not.
    pub fn accept_all(&self, questions: impl IntoIterator<Item = Question>) {
        let (mut asker, mut answers) = client::connect(&self.socket()).expect("the agent answers");
        let mut ahead = VecDeque::new();
        let mut questions = questions.into_iter().fuse();
        loop {
            for question in questions.by_ref().take(AHEAD - ahead.len()) {
                asker.ask(&question).expect("the agent listens");
                ahead.push_back(question);
            }
            let Some(question) = ahead.pop_front() else { return };
            asker.flush().expect("the agent listens");
            match answers.hear() {
                Ok(Answer::Accepted {}) => {}
                other => panic!("{question:?} was answered {other:?}:\n{}", self.tail()),
            }
        }
    }

    /// Sends it a signal. No effect if it is not running.
    pub fn signal(&self, signal: Signal) {
        // Only for a child not waited for is the number still that child's.
        if let Some(pid) = self.pid().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
            let _gone = kill_process(pid, signal);
        }
    }

    /// Kills it with SIGKILL and waits for its end.
    pub fn kill_9(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ended = child.kill();
            let _status = child.wait();
        }
    }

    /// Tells it to stop with SIGTERM and waits for its end.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait(PATIENCE)
    }

    /// Waits for its end. Panics, with its log, if it goes on.
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let mut status = None;
        wait_until(within, || {
            status = self.ended();
            status.is_some()
        });
        let status = status.unwrap_or_else(|| panic!("the agent did not end:\n{}", self.tail()));
        self.child = None;
        status
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the agent's log ends so:\n{}", self.tail());
            super::keep(&mut self.dir);
        }
        self.kill_9();
    }
}

/// A message as the control socket takes it.
pub fn publish(topic: &str, qos: u8, payload: &str) -> Publish {
    let (topic, text) = (topic.to_owned(), Some(payload.to_owned()));
    Publish { topic, qos, retain: false, lane: None, text, json: None, hex: None }
}

/// Messages in all lanes that are not delivered to the end.
pub fn queued(status: &Status) -> u64 {
    status.queue.iter().map(|lane| lane.messages).sum()
}

/// Nothing is queued and nothing in flight. A store that cannot be read at the moment shows no lanes: that is not
/// an empty queue.
pub fn drained(status: &Status) -> bool {
    !status.queue.is_empty() && queued(status) == 0 && status.link.in_flight == 0
}

/// The agent with faults, if that is what this process was started for; otherwise nothing. To be called by a test
/// named `agent_with_faults`.
pub fn be_the_agent() {
    let Some(file) = std::env::var_os(CONFIG_VARIABLE) else { return };
    let number = |variable| std::env::var(variable).ok()?.parse().ok();
    let stall_ms = number(COMMIT_STALL_VARIABLE).unwrap_or(0);
    let frozen = std::env::var(FROZEN_VARIABLE).ok();
    let store =
        fieldpost::store::Faults { commit_stall: Duration::from_millis(stall_ms), ..Default::default() };
    let is_set = |variable| std::env::var_os(variable).is_some();
    let faults = Faults {
        store,
        break_pubrel_order: is_set(BREAK_PUBREL_ORDER_VARIABLE),
        break_command_order: is_set(BREAK_COMMAND_ORDER_VARIABLE),
        frozen: PARTS.into_iter().find(|part| frozen.as_deref() == Some(&format!("{part:?}"))),
        haste: number(HASTE_VARIABLE).and_then(|haste| u32::try_from(haste).ok()).unwrap_or(0),
        machine_root: std::env::var_os(MACHINE_ROOT_VARIABLE)
            .map(|root| &*Box::leak(PathBuf::from(root).into_boxed_path())),
    };
    let file = PathBuf::from(file);
    let config = fieldpost::config::load(&file).expect("the test wrote a good configuration");
    fieldpost::logging::start(&config.log);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("the system gives an event queue");
    runtime.block_on(fieldpost::agent::run_with(config, file, faults)).expect("the agent runs");
}
