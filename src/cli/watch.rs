//! `fieldpost status --watch`: the status as a live screen, or as a line of JSON again and again.
//!
//! The agent is asked on a thread of its own, so that one that hangs delays neither a key nor a signal.
//! Invariant: what the screen shows is what the agent said last, and when it does not answer the screen says so.

mod screen;
mod terminal;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::columns::{Paint, Row};
use super::status::ask;
use super::{Failure, colours};
use crate::control::client::ClientError;
use crate::control::wire::Status;
use screen::{Rates, Size, View, rows};
use terminal::Terminal;

/// Rates are taken over so many intervals, so that they do not flicker.
const SAMPLES: usize = 5;
/// An agent that takes longer is said not to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Watches the agent that listens there until it is told to stop.
pub(super) fn run(socket: PathBuf, every: Duration, json: bool) -> Result<(), Failure> {
    if !json && !terminal::is_there() {
        return Err(Failure::NoTerminal);
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::Runtime)?;
    let watched = match json {
        true => runtime.block_on(lines(&socket, every)),
        false => runtime.block_on(watch(socket, every)),
    };
    runtime.shutdown_background();
    watched
}

/// A line for each answer, and one that says why where there is none. A signal ends it as it ends any program.
async fn lines(socket: &Path, every: Duration) -> Result<(), Failure> {
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let line = match ask(socket) {
            Ok(status) => serde_json::to_string(&status).map_err(ClientError::from)?,
            Err(failure) => json!({ "no_answer": words(&failure) }).to_string(),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Failure::Output)?;
    }
}

/// Without the name that a message on standard error begins with.
fn words(failure: &Failure) -> String {
    let words = failure.to_string();
    words.strip_prefix("fieldpost: ").unwrap_or(&words).to_owned()
}

enum Wake {
    Tick,
    Heard(Result<Box<Status>, Failure>),
    Key(u8),
    Resized,
    Suspended,
    Stop,
}

async fn watch(socket: PathBuf, every: Duration) -> Result<(), Failure> {
    let mut signals = Signals::new().map_err(Failure::Runtime)?;
    let (questions, mut answers) = asker(socket).map_err(Failure::Runtime)?;
    let mut keys = keys().map_err(Failure::Runtime)?;
    let mut terminal = Terminal::enter(Paint { colours: colours(&io::stdout()) }).map_err(Failure::Output)?;
    let mut watched = Watched::new(Instant::now());
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let wake = tokio::select! {
            _ = ticks.tick() => Wake::Tick,
            Some(answer) = answers.recv() => Wake::Heard(answer),
            Some(key) = keys.recv() => Wake::Key(key),
            wake = signals.next() => wake,
        };
        match wake {
            Wake::Tick => {
                // One question at a time.
                if watched.asked.is_none() && questions.try_send(()).is_ok() {
                    watched.asked = Some(Instant::now());
                }
            }
            Wake::Heard(answer) => watched.hear(answer, Instant::now()),
            Wake::Resized => {}
            Wake::Suspended => terminal.suspend().map_err(Failure::Output)?,
            Wake::Key(b'q' | b'Q') | Wake::Stop => return Ok(()),
            Wake::Key(_) => continue,
        }
        let size = terminal.size();
        terminal.draw(&watched.rows(size, Instant::now()), size).map_err(Failure::Output)?;
    }
}

/// Signals that mean something to a screen.
struct Signals {
    resized: Signal,
    suspended: Signal,
    stops: [Signal; 3],
}

impl Signals {
    fn new() -> io::Result<Self> {
        let stops = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = stops.map(signal);
        Ok(Signals {
            resized: signal(SignalKind::window_change())?,
            suspended: signal(SignalKind::from_raw(rustix::process::Signal::TSTP.as_raw()))?,
            stops: [interrupt?, terminate?, hangup?],
        })
    }

    async fn next(&mut self) -> Wake {
        let [interrupt, terminate, hangup] = &mut self.stops;
        tokio::select! {
            _ = self.resized.recv() => Wake::Resized,
            _ = self.suspended.recv() => Wake::Suspended,
            _ = interrupt.recv() => Wake::Stop,
            _ = terminate.recv() => Wake::Stop,
            _ = hangup.recv() => Wake::Stop,
        }
    }
}

type Answers = mpsc::Receiver<Result<Box<Status>, Failure>>;

/// A thread that asks the agent whenever it is told to. It ends with the program, or once nobody listens.
fn asker(socket: PathBuf) -> io::Result<(SyncSender<()>, Answers)> {
    let (questions, asked) = sync_channel(1);
    let (answers, heard) = mpsc::channel(1);
    std::thread::Builder::new().name("asker".into()).spawn(move || {
        while asked.recv().is_ok() && answers.blocking_send(ask(&socket).map(Box::new)).is_ok() {}
    })?;
    Ok((questions, heard))
}

/// A thread that hands on what is typed. It ends with the program, or at the end of the input.
fn keys() -> io::Result<mpsc::Receiver<u8>> {
    let (typed, keys) = mpsc::channel(1);
    std::thread::Builder::new().name("keys".into()).spawn(move || {
        let mut key = [0];
        while matches!(io::stdin().read(&mut key), Ok(1)) && typed.blocking_send(key[0]).is_ok() {}
    })?;
    Ok(keys)
}

/// What is known of the agent.
struct Watched {
    /// The newest last.
    samples: VecDeque<Box<Status>>,
    rates: Option<Rates>,
    /// Why the last question had no answer.
    silence: Option<String>,
    /// When the question was asked that has no answer yet.
    asked: Option<Instant>,
    /// When it answered last, or the watch began.
    heard: Instant,
    was_there: bool,
}

impl Watched {
    fn new(now: Instant) -> Self {
        let samples = VecDeque::with_capacity(SAMPLES + 1);
        Watched { samples, rates: None, silence: None, asked: None, heard: now, was_there: false }
    }

    fn hear(&mut self, answer: Result<Box<Status>, Failure>, now: Instant) {
        self.asked = None;
        match answer {
            Ok(status) => {
                let earlier = self.samples.iter().find_map(|before| Rates::between(before, &status));
                if earlier.is_none() {
                    self.samples.clear();
                }
                self.rates = earlier;
                self.samples.push_back(status);
                if self.samples.len() > SAMPLES {
                    self.samples.pop_front();
                }
                self.silence = None;
                self.heard = now;
                self.was_there = true;
            }
            Err(failure) => {
                self.samples.clear();
                self.silence = Some(words(&failure));
            }
        }
    }

    fn rows(&self, size: Size, now: Instant) -> Vec<Row> {
        let for_ms = u64::try_from(now.duration_since(self.heard).as_millis()).unwrap_or(u64::MAX);
        let late = self.asked.is_some_and(|asked| now.duration_since(asked) > PATIENCE);
        let view = match (&self.silence, self.samples.back()) {
            (Some(reason), _) => View::Gone { reason, for_ms, was_there: self.was_there },
            (None, _) if late => {
                View::Gone { reason: "It has the question and is silent.", for_ms, was_there: self.was_there }
            }
            (None, Some(status)) => View::Live { status, rates: self.rates.as_ref() },
            (None, None) => return Vec::new(), // it was asked a moment ago
        };
        rows(view, size)
    }
}
