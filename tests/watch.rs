//! `fieldpost status --watch` on a real pseudo terminal, looked at through a terminal emulator.
//!
//! Real agent, model broker. util-linux's `setsid` gives the command the terminal as its own, so that the kernel sends it
//! Ctrl-C and the change of the window's size.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use fieldpost::control::wire::{LinkState, Status};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;
use support::agent::{Agent, Config, binary};
use support::broker::{Broker, BrokerServer};
use support::wait_until;
use tokio::runtime::Runtime;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

fn start_broker() -> (Runtime, BrokerServer) {
    let runtime = Runtime::new().unwrap();
    let broker = runtime.block_on(BrokerServer::start(Broker::new())).unwrap();
    (runtime, broker)
}

fn connected_agent(broker: &BrokerServer) -> Agent {
    let agent = Agent::start(&Config::new(&broker.url()));
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    agent
}

/// A terminal with the command in it.
struct Person {
    master: OwnedFd,
    slave: OwnedFd,
    before: Termios,
    terminal: vt100::Parser,
    written: Vec<u8>,
    child: Child,
}

impl Person {
    /// Watches this agent in a window of 80 columns and 24 rows.
    fn watching(agent: &Agent, env: &[(&str, &str)]) -> Person {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let slave = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        tcsetwinsize(&slave, winsize(80, 24)).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(binary()).args(["status", "--watch", "--interval", "200ms", "--socket"]);
        command.arg(agent.socket()).env("TERM", "xterm-256color").env_remove("NO_COLOR");
        command.envs(env.iter().copied()).stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().expect("setsid of util-linux is installed");
        let terminal = vt100::Parser::new(24, 80, 0);
        Person { master, slave, before, terminal, written: Vec::new(), child }
    }

    /// Reads what was written since.
    fn look(&mut self) -> String {
        let mut some = [0; 4096];
        while let Ok(length @ 1..) = rustix::io::read(&self.master, &mut some) {
            self.terminal.process(&some[..length]);
            self.written.extend_from_slice(&some[..length]);
        }
        self.terminal.screen().contents()
    }

    /// Waits until the screen is as wished, and returns it.
    fn expect(&mut self, what: &str, mut wished: impl FnMut(&str) -> bool) -> String {
        let mut last = String::new();
        let shown = wait_until(PATIENCE, || {
            last = self.look();
            wished(&last)
        });
        assert!(shown, "the screen never showed {what}:\n{last}");
        last
    }

    fn types(&self, keys: &[u8]) {
        rustix::io::write(&self.master, keys).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        tcsetwinsize(&self.master, winsize(columns, rows)).unwrap();
        self.terminal.screen_mut().set_size(rows, columns);
    }

    /// Waits for the command's end, and sees that the terminal is as it was.
    fn expect_end(mut self) -> ExitStatus {
        let mut ended = None;
        wait_until(PATIENCE, || {
            self.look();
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        let ended = ended.unwrap_or_else(|| panic!("it goes on:\n{}", self.terminal.screen().contents()));
        self.look();
        let screen = self.terminal.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "{:?}", screen.contents());
        assert_eq!(screen.contents().trim(), "", "nothing is left on the shell's screen");
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes, "its echo is back");
        ended
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

fn winsize(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

#[test]
fn the_live_screen_shows_the_agent_and_follows_the_window() {
    let (_runtime, broker) = start_broker();
    let agent = connected_agent(&broker);
    let mut person = Person::watching(&agent, &[]);
    let screen = person.expect("a connected agent", |screen| screen.contains("connected for"));
    assert!(person.terminal.screen().alternate_screen() && person.terminal.screen().hide_cursor());
    for words in
        ["g1", "fieldpost 0.", "round trip", "in flight 0 of 1,000", "Lanes", "alarm", "Warnings  none"]
    {
        assert!(screen.contains(words), "{words} is missing in\n{screen}");
    }
    // Rates, while messages flow.
    let mut rate_seen = false;
    person.expect("a rate above 0", |screen| {
        agent.accept("t", 1, ["x"; 20]);
        let flow = screen.lines().find(|line| line.starts_with("Flow")).unwrap_or_default();
        rate_seen = flow.contains("delivered/s") && !flow.contains(" 0.0 delivered/s");
        rate_seen
    });
    // A smaller window: cut, not wrapped.
    person.resize(50, 12);
    let small = person.expect("a smaller screen", |screen| {
        let rows: Vec<&str> = screen.lines().collect();
        rows.len() <= 12
            && screen.contains('…')
            && rows.iter().filter(|row| row.starts_with("Lanes")).count() == 1
    });
    assert!(small.lines().all(|row| row.chars().count() <= 50), "{small}");
    person.resize(100, 30);
    person.expect("the whole address", |screen| screen.contains(&broker.url()));
    person.types(b"q");
    assert!(person.expect_end().success());
}

#[test]
fn however_it_ends_the_terminal_is_as_before() {
    let (_runtime, broker) = start_broker();
    let agent = connected_agent(&broker);
    type End = fn(&Person);
    let ends: [(&str, End); 4] = [
        ("Ctrl-C", |person| person.types(b"\x03")),
        ("q", |person| person.types(b"q")),
        ("SIGTERM", |person| person.signal(Signal::TERM)),
        ("SIGHUP", |person| person.signal(Signal::HUP)),
    ];
    for (name, end) in ends {
        let mut person = Person::watching(&agent, &[]);
        person.expect("the agent", |screen| screen.contains("connected for"));
        // What is typed is not shown.
        person.types(b"xyz\r\n");
        end(&person);
        assert!(person.expect_end().success(), "{name}");
    }
}

#[test]
fn a_suspended_screen_gives_the_terminal_back_and_returns() {
    let (_runtime, broker) = start_broker();
    let agent = connected_agent(&broker);
    let mut person = Person::watching(&agent, &[]);
    person.expect("the agent", |screen| screen.contains("connected for"));
    person.signal(Signal::TSTP);
    let stopped = wait_until(PATIENCE, || {
        person.look();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", person.child.id())).unwrap();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    });
    assert!(stopped, "{}", person.look());
    person.look();
    assert!(!person.terminal.screen().alternate_screen() && !person.terminal.screen().hide_cursor());
    assert_eq!(tcgetattr(&person.slave).unwrap().local_modes, person.before.local_modes);
    person.signal(Signal::CONT);
    person.expect("the agent again", |screen| screen.contains("connected for"));
    assert!(person.terminal.screen().alternate_screen());
    person.types(b"q");
    assert!(person.expect_end().success());
}

#[test]
fn an_agent_that_goes_is_missed_and_one_that_returns_is_shown() {
    let (_runtime, broker) = start_broker();
    let mut agent = connected_agent(&broker);
    let mut person = Person::watching(&agent, &[]);
    person.expect("the agent", |screen| screen.contains("connected for"));
    agent.terminate();
    let screen = person.expect("that it is gone", |screen| screen.contains("has not answered for"));
    assert!(!screen.contains("connected for"), "no old value is shown as if it were one of now:\n{screen}");
    assert!(screen.contains("control.sock") && screen.contains("systemctl status fieldpost"), "{screen}");
    agent.start_again();
    person.expect("the agent again", |screen| screen.contains("connected for"));
    // One that is there and does not answer is missed too.
    agent.signal(Signal::STOP);
    person.expect("that it is silent", |screen| screen.contains("is silent"));
    agent.signal(Signal::CONT);
    person.expect("the agent again", |screen| screen.contains("connected for"));
    person.types(b"q");
    assert!(person.expect_end().success());
}

#[test]
fn colours_are_for_those_who_want_them() {
    let (_runtime, broker) = start_broker();
    let agent = connected_agent(&broker);
    for (env, coloured) in [(&[][..], true), (&[("NO_COLOR", "1")][..], false)] {
        let mut person = Person::watching(&agent, env);
        person.expect("the agent", |screen| screen.contains("connected for"));
        let written = String::from_utf8_lossy(&person.written).into_owned();
        assert_eq!(written.contains("\x1b[32m"), coloured, "{env:?}");
        person.types(b"q");
        assert!(person.expect_end().success());
    }
}

#[test]
fn without_a_terminal_there_are_lines_of_json_or_a_word_on_what_to_do() {
    let (_runtime, broker) = start_broker();
    let mut agent = connected_agent(&broker);
    let mut command = Command::new(binary());
    command.args(["status", "--watch", "--socket"]).arg(agent.socket());
    let refused = command.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("--json"), "{said}");
    assert!(refused.stdout.is_empty());

    let mut command = Command::new(binary());
    command.args(["status", "--watch", "--json", "--interval", "200ms", "--socket"]).arg(agent.socket());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let of_an_agent = |line: &String| serde_json::from_str::<Status>(line).ok();
    let first: Vec<Status> = lines.by_ref().take(2).map(|line| of_an_agent(&line).unwrap()).collect();
    assert!(first[0].gateway == "g1" && first[1].uptime_ms > first[0].uptime_ms);
    agent.terminate();
    let gone = lines.by_ref().find(|line| of_an_agent(line).is_none()).unwrap();
    assert!(gone.starts_with("{\"no_answer\":\"no agent answers on "), "{gone}");
    agent.start_again();
    assert!(lines.by_ref().any(|line| of_an_agent(&line).is_some()), "it comes back");
    // Whoever reads has seen enough.
    drop(lines);
    let ended = wait_until(PATIENCE, || child.try_wait().unwrap().is_some());
    assert!(ended && child.wait().unwrap().success());
}
