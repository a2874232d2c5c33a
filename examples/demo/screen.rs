//! What the person in front of it sees: on a terminal a live block below the story, elsewhere plain lines.
//!
//! Invariant: it only shows. Nothing is decided here, and without a terminal nothing moves the cursor.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use fieldpost::control::wire::{LaneQueue, LinkState, Status};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::device::Measured;

/// Redraws a second, at most.
const REDRAWS: u8 = 20;

/// Without a terminal, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// A full queue bar, in messages, unless there are more.
const QUEUE_FULL: u64 = 300;

/// Everything there is to see at one moment.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// What the device measures; `None` when it is off.
    pub(crate) device: Option<Measured>,
    /// The agent's process, and which start it is.
    pub(crate) agent: Option<(i32, u32)>,
    /// What the agent says; `None` while it does not answer.
    pub(crate) status: Option<Status>,
    /// Whether the broker runs.
    pub(crate) broker_up: bool,
    /// First-time PUBLISHes of readings and notes so far.
    pub(crate) received: u64,
    /// Repeats the broker recognised by their packet identifier.
    pub(crate) recognised: u64,
}

impl View {
    /// Messages in the outbox that are not finally acknowledged.
    pub(crate) fn queue(&self) -> Option<u64> {
        self.status.as_ref().map(queue)
    }

    /// Whether messages flow.
    pub(crate) fn connected(&self) -> bool {
        self.status.as_ref().is_some_and(|status| status.link.state == LinkState::Connected)
    }

    /// Age of the oldest message in the outbox; zero if there is none.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let status = self.status.as_ref()?;
        let oldest = status.queue.iter().filter_map(|lane| lane.oldest_age_ms).max();
        Some(Duration::from_millis(oldest.unwrap_or(0)))
    }
}

/// Messages in all lanes of the outbox.
pub(crate) fn queue(status: &Status) -> u64 {
    status.queue.iter().map(|lane: &LaneQueue| lane.messages).sum()
}

/// The screen.
pub(crate) struct Screen {
    began: Instant,
    colours: bool,
    kind: Kind,
    /// Messages queued when the drain began; `None` while there is none to show.
    drain: Option<u64>,
}

enum Kind {
    Terminal(Box<Block>),
    Plain { last_line: Option<Instant> },
}

/// The live block.
struct Block {
    all: MultiProgress,
    device: ProgressBar,
    agent: ProgressBar,
    link: ProgressBar,
    queue: ProgressBar,
    broker: ProgressBar,
}

impl Screen {
    /// Standard output, as it is.
    pub(crate) fn new() -> Screen {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = io::stdout().is_terminal() && !dumb;
        let kind = match terminal {
            true => Kind::Terminal(Box::new(Block::new())),
            false => Kind::Plain { last_line: None },
        };
        let colours = terminal && std::env::var_os("NO_COLOR").is_none();
        Screen { began: Instant::now(), colours, kind, drain: None }
    }

    /// Writes lines that stay.
    pub(crate) fn say(&self, text: &str) {
        match &self.kind {
            Kind::Terminal(block) => drop(block.all.println(text)),
            // Standard output may be closed; then there is nobody to tell.
            Kind::Plain { .. } => drop(writeln!(io::stdout(), "{text}")),
        }
    }

    /// Begins a scene.
    pub(crate) fn scene(&mut self, title: &str, explanation: &str) {
        let (bold, dim, off) = if self.colours { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
        self.say(&format!("\n{bold}{title}{off}\n{dim}{explanation}{off}"));
        if let Kind::Plain { last_line } = &mut self.kind {
            *last_line = None;
        }
    }

    /// Says what a scene has shown.
    pub(crate) fn shown(&self, text: &str) {
        let (green, off) = if self.colours { ("\x1b[32m", "\x1b[0m") } else { ("", "") };
        self.say(&format!("{green}  => {text}{off}"));
    }

    /// From here on the queue is shown as what is left of this many messages.
    pub(crate) fn begin_drain(&mut self, messages: u64) {
        self.drain = Some(messages.max(1));
        if let Kind::Terminal(block) = &self.kind {
            block.queue.set_style(style("  drain    {bar:32.green/black.bright} {wide_msg}"));
        }
    }

    /// The queue is shown as such again.
    pub(crate) fn end_drain(&mut self) {
        self.drain = None;
        if let Kind::Terminal(block) = &self.kind {
            block.queue.set_style(queue_style());
        }
    }

    /// Shows a moment.
    pub(crate) fn show(&mut self, view: &View) {
        match &mut self.kind {
            Kind::Terminal(block) => block.show(view, self.drain),
            Kind::Plain { last_line } => {
                let every = if self.drain.is_some() { LINE_EVERY / 2 } else { LINE_EVERY };
                if last_line.is_some_and(|at| at.elapsed() < every) {
                    return;
                }
                *last_line = Some(Instant::now());
                let time = self.began.elapsed().as_secs_f32();
                let _ = writeln!(io::stdout(), "  {time:5.1} s  {}", line(view, self.drain));
            }
        }
    }

    /// The last line of all, once the live block is gone.
    pub(crate) fn last_line(&self, text: &str) {
        let mut out = io::stdout();
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }

    /// Removes the live block; what was said stays.
    pub(crate) fn close(&self) {
        if let Kind::Terminal(block) = &self.kind {
            drop(block.all.clear());
            block.all.set_draw_target(ProgressDrawTarget::hidden());
        }
    }
}

impl Block {
    fn new() -> Block {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(REDRAWS));
        let bar = |style| all.add(ProgressBar::new(QUEUE_FULL).with_style(style));
        bar(style(" ")).tick(); // an empty line between the story and the block
        let device = bar(style("  device   {wide_msg}"));
        let agent = bar(style("  agent    {wide_msg}"));
        let link = bar(style("  link     {wide_msg}"));
        let queue = bar(queue_style());
        let broker = bar(style("  broker   {wide_msg}"));
        Block { device, agent, link, queue, broker, all }
    }

    fn show(&self, view: &View, drain: Option<u64>) {
        self.device.set_message(device(view));
        self.agent.set_message(agent(view));
        self.link.set_message(link(view));
        let queue = view.queue().unwrap_or(0);
        let (length, position) = match drain {
            Some(all) => (all, all.saturating_sub(queue)),
            None => (QUEUE_FULL.max(queue), queue),
        };
        self.queue.set_length(length);
        self.queue.set_position(position);
        self.queue.set_message(queue_words(view, drain));
        self.broker.set_message(broker(view));
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the template is ours").progress_chars("█▓░")
}

fn queue_style() -> ProgressStyle {
    style("  queue    {bar:32.yellow/black.bright} {wide_msg}")
}

/// A moment in one line.
fn line(view: &View, drain: Option<u64>) -> String {
    let queue = match (view.queue(), drain) {
        (Some(queue), Some(all)) => {
            let done = all.saturating_sub(queue);
            let filled = (done * 20 / all) as usize;
            format!("drain [{}{}] {done}/{all}", "#".repeat(filled), ".".repeat(20 - filled))
        }
        (Some(queue), None) => format!("queue {queue:3}"),
        (None, _) => "queue   ?".into(),
    };
    format!("{:38} | {:27} | {queue} | broker has {}", device(view), link(view), view.received)
}

fn device(view: &View) -> String {
    match view.device {
        None => "switched off".into(),
        Some(Measured { temperature, pressure, flow, power }) => {
            let (pressure, power) = (f32::from(pressure) / 100.0, f32::from(power) / 100.0);
            format!("{temperature:.1} °C  {pressure:.2} bar  {flow:4.1} m³/h  {power:.2} kW")
        }
    }
}

fn agent(view: &View) -> String {
    match view.agent {
        None => "not running".into(),
        Some((pid, start)) => format!("process {pid}, start {start} on this database"),
    }
}

fn link(view: &View) -> String {
    let Some(link) = view.status.as_ref().map(|status| &status.link) else { return "no agent to ask".into() };
    match link.state {
        LinkState::Connected => format!("connected, {} in flight", link.in_flight),
        LinkState::Connecting => "connecting".into(),
        LinkState::Waiting => {
            let retry = link.retry_in_ms.unwrap_or(0) as f32 / 1000.0;
            format!("down, next attempt in {retry:.1} s")
        }
    }
}

fn queue_words(view: &View, drain: Option<u64>) -> String {
    let (Some(queue), Some(oldest)) = (view.queue(), view.oldest()) else {
        return "on disk, and nobody to ask".into();
    };
    match drain {
        Some(all) => format!("{} of {all}", all.saturating_sub(queue)),
        None => format!("{queue} on disk, the oldest {:.1} s old", oldest.as_secs_f32()),
    }
}

fn broker(view: &View) -> String {
    let state = if view.broker_up { "up" } else { "away" };
    let View { received, recognised, .. } = view;
    format!("{state}, has {received} messages; {recognised} resent ones recognised and not taken twice")
}
