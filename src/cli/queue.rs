//! `fieldpost queue`: what waits, what died, taking it out, sending it again, throwing it away.
//!
//! Through the running agent; where none runs, on its database, exclusively. Invariants: everything comes a page at
//! a time; nothing is thrown away that a person or `--yes` has not confirmed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::status::{bytes, grouped, span};
use super::{Agent, Failure, complain, printable};
use crate::agent::{self, Faults};
use crate::clock;
use crate::config;
use crate::control::client::{self, Answers, Asker, ClientError};
use crate::control::wire::{Answer, DeadLetter, LaneQueue, Question, QueueAsk, QueuedMessage};
use crate::message::Lane;
use crate::queue;
use crate::store::Store;
use crate::uplink::packet::ReasonCode;

/// Messages or dead letters asked for at once.
const PAGE: u32 = 500;

/// `fieldpost queue`
#[derive(Debug, Args)]
pub(super) struct Queue {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    agent: Agent,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List what waits: a line for each lane, or the messages of one, or dead letters
    Ls {
        /// The messages of this lane, the oldest first
        #[arg(long, value_parser = ["alarm", "normal", "bulk"])]
        lane: Option<String>,
        /// How many at most
        #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..))]
        limit: u64,
        /// Dead letters: what the broker will never take
        #[arg(long, conflicts_with = "lane")]
        dead: bool,
        /// JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Write every message that waits as a line of JSON; the queue stays as it is
    Export {
        /// A file that does not exist yet [default: standard output]
        file: Option<PathBuf>,
        /// This lane only
        #[arg(long, value_parser = ["alarm", "normal", "bulk"])]
        lane: Option<String>,
    },
    /// Put dead letters into the queue again, as new messages
    Requeue {
        /// Their numbers, as `queue ls --dead` shows them
        #[arg(required_unless_present = "all", value_name = "NUMBER")]
        numbers: Vec<u64>,
        /// Every dead letter
        #[arg(long, conflicts_with = "numbers")]
        all: bool,
    },
    /// Throw messages away that are not in flight; they are counted and reported as a gap
    #[command(group = clap::ArgGroup::new("what").required(true))]
    Purge {
        /// This lane
        #[arg(long, group = "what", value_parser = ["alarm", "normal", "bulk"])]
        lane: Option<String>,
        /// Dead letters
        #[arg(long, group = "what")]
        dead: bool,
        /// Every lane, and dead letters
        #[arg(long, group = "what")]
        all: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
}

impl Queue {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut end = End::find(&self.agent)?;
        match self.command {
            Command::Ls { dead: true, limit, json, .. } => list_dead(&mut end, limit, json),
            Command::Ls { lane: Some(lane), limit, json, .. } => list_messages(&mut end, &lane, limit, json),
            Command::Ls { json, .. } => list_lanes(&mut end, json),
            Command::Export { file, lane } => export(&mut end, file, lane.as_deref()),
            Command::Requeue { numbers, .. } => requeue(&mut end, numbers),
            Command::Purge { lane, dead, all, yes } => purge(&mut end, lane, dead || all, all, yes),
        }
    }
}

/// Who answers.
enum End {
    Agent(Box<(Asker, Answers)>),
    Database(Box<Store>),
}

/// The lanes, and how many dead letters there are.
struct Depth {
    lanes: Vec<LaneQueue>,
    dead_letters: u64,
}

impl End {
    /// The running agent, or else the database that the configuration names.
    fn find(agent: &Agent) -> Result<Self, Failure> {
        match (client::connect(&agent.socket()?), &agent.config) {
            (Ok(ends), _) => Ok(End::Agent(Box::new(ends))),
            (Err(ClientError::Connect { .. }), Some(file)) => {
                let settings = agent::store_settings(&config::load(file)?, Faults::default());
                let path = settings.path.display().to_string();
                let store = Store::visit(settings).map_err(Failure::Store)?;
                complain(format_args!("no agent is running: looking into {path}"));
                Ok(End::Database(Box::new(store)))
            }
            (Err(error), _) => Err(error.into()),
        }
    }

    fn ask(&mut self, ask: QueueAsk) -> Result<Answer, Failure> {
        let answer = match self {
            End::Agent(ends) => {
                ends.0.ask(&Question::Queue(ask))?;
                ends.0.flush()?;
                ends.1.hear()?
            }
            End::Database(store) => match queue::ask(&ask) {
                Ok(ask) => queue::answer(store.browse(&ask, clock::now()).map_err(Failure::Store)?),
                Err(reason) => Answer::Refused { reason },
            },
        };
        match answer {
            Answer::Refused { reason } => Err(Failure::NotDone(printable(&reason))),
            answer => Ok(answer),
        }
    }

    fn depth(&mut self) -> Result<Depth, Failure> {
        match self {
            End::Agent(ends) => {
                ends.0.ask(&Question::Status {})?;
                ends.0.flush()?;
                match ends.1.hear()? {
                    Answer::Status(status) => {
                        Ok(Depth { lanes: status.queue, dead_letters: status.dead_letters })
                    }
                    _ => Err(Failure::OtherAnswer),
                }
            }
            End::Database(store) => {
                let look = store.look(clock::now()).map_err(Failure::Store)?;
                let lane = |(lane, depth): (Lane, &crate::store::LaneDepth)| LaneQueue {
                    lane: lane.name().into(),
                    messages: depth.messages,
                    bytes: depth.bytes,
                    oldest_age_ms: depth.oldest_age_ms,
                    in_flight: depth.in_flight,
                    accepted: depth.accepted,
                    dropped: look
                        .dropped
                        .iter()
                        .filter(|(of, ..)| *of == lane)
                        .map(|(.., count)| count)
                        .sum(),
                    limit_bytes: depth.limit_bytes,
                    ..LaneQueue::default()
                };
                let lanes = Lane::ALL.into_iter().zip(&look.lanes).map(lane).collect();
                Ok(Depth { lanes, dead_letters: look.dead_letters })
            }
        }
    }

    /// Up to `limit` messages of a lane, page by page; where it would go on.
    fn messages(
        &mut self,
        lane: &str,
        limit: u64,
        payloads: bool,
        mut each: impl FnMut(QueuedMessage) -> Result<(), Failure>,
    ) -> Result<Option<u64>, Failure> {
        let (mut from, mut left) = (0, limit);
        while left > 0 {
            let limit = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
            let ask = QueueAsk::Messages { lane: lane.to_owned(), from, limit, payloads };
            let Answer::Messages { messages, next } = self.ask(ask)? else {
                return Err(Failure::OtherAnswer);
            };
            left = left.saturating_sub(messages.len() as u64);
            messages.into_iter().try_for_each(&mut each)?;
            match next {
                Some(next) => from = next,
                None => return Ok(None),
            }
        }
        Ok(Some(from))
    }

    fn dead_letters(&mut self, limit: u64) -> Result<Vec<DeadLetter>, Failure> {
        let (mut found, mut after) = (Vec::new(), 0);
        loop {
            let left = u32::try_from(limit - found.len() as u64).unwrap_or(PAGE).min(PAGE);
            if left == 0 {
                return Ok(found);
            }
            let Answer::DeadLetters { letters } = self.ask(QueueAsk::DeadLetters { after, limit: left })?
            else {
                return Err(Failure::OtherAnswer);
            };
            let Some(last) = letters.last() else { return Ok(found) };
            after = last.number;
            found.extend(letters);
        }
    }
}

fn write(text: &str) -> Result<(), Failure> {
    io::stdout().write_all(text.as_bytes()).map_err(Failure::Output)
}

fn list_lanes(end: &mut End, json: bool) -> Result<(), Failure> {
    let depth = end.depth()?;
    if json {
        let object = json!({
            "agent_running": matches!(end, End::Agent(_)),
            "lanes": depth.lanes,
            "dead_letters": depth.dead_letters,
        });
        return write(&format!("{object:#}\n"));
    }
    write(&format!("{:8}{:>12}{:>12}{:>14}{:>11}\n", "lane", "messages", "bytes", "oldest", "in flight"))?;
    for lane in &depth.lanes {
        write(&format!(
            "{:8}{:>12}{:>12}{:>14}{:>11}\n",
            printable(&lane.lane),
            grouped(lane.messages),
            bytes(lane.bytes),
            lane.oldest_age_ms.map_or("-".to_owned(), span),
            grouped(lane.in_flight),
        ))?;
    }
    match depth.dead_letters {
        0 => Ok(()),
        dead => write(&format!("{} dead letters: `fieldpost queue ls --dead` shows them\n", grouped(dead))),
    }
}

fn list_messages(end: &mut End, lane: &str, limit: u64, json: bool) -> Result<(), Failure> {
    if !json {
        write(&format!(
            "{:>10}  {:9}  {:24}  {:>3}  {:6}  {:>10}  topic\n",
            "seq", "state", "accepted", "qos", "retain", "bytes"
        ))?;
    }
    let more = end.messages(lane, limit, false, |message| match json {
        true => write(&format!("{}\n", to_json(&message)?)),
        false => write(&message_line(&message)),
    })?;
    match more {
        Some(_) if !json => write("there are more: --limit shows them\n"),
        _ => Ok(()),
    }
}

fn message_line(message: &QueuedMessage) -> String {
    let (state, accepted) = (printable(&message.state), printable(&message.accepted));
    let start = format!("{:>10}  {state:9}  {accepted:24}", message.seq);
    match (message.damaged, &message.topic) {
        (false, Some(topic)) => format!(
            "{start}  {:>3}  {:6}  {:>10}  {}\n",
            message.qos.unwrap_or_default(),
            if message.retain == Some(true) { "retain" } else { "" },
            message.bytes.unwrap_or_default(),
            printable(topic)
        ),
        _ => format!("{start}  DAMAGED: it is dropped and counted when its turn comes\n"),
    }
}

fn to_json(message: &QueuedMessage) -> Result<String, Failure> {
    serde_json::to_string(message).map_err(|error| Failure::Client(error.into()))
}

fn list_dead(end: &mut End, limit: u64, json: bool) -> Result<(), Failure> {
    let letters = end.dead_letters(limit)?;
    if !json {
        write(&format!(
            "{:>6}  {:24}  {:6}  {:>10}  {:>3}  {:>10}  topic and reason\n",
            "number", "died", "lane", "seq", "qos", "bytes"
        ))?;
    }
    for letter in letters {
        let reason = ReasonCode(letter.reason).name();
        match json {
            true => {
                let mut object = json!(letter);
                object["reason_name"] = json!(reason);
                write(&format!("{object}\n"))?;
            }
            false => write(&format!(
                "{:>6}  {:24}  {:6}  {:>10}  {:>3}  {:>10}  {}: {reason} (0x{:02X})\n",
                letter.number,
                printable(&letter.died),
                printable(&letter.lane),
                letter.seq,
                letter.qos,
                letter.bytes,
                printable(&letter.topic),
                letter.reason
            ))?,
        }
    }
    Ok(())
}

fn export(end: &mut End, file: Option<PathBuf>, lane: Option<&str>) -> Result<(), Failure> {
    let depth = end.depth()?;
    let lanes: Vec<LaneQueue> =
        depth.lanes.into_iter().filter(|one| lane.is_none_or(|lane| one.lane == lane)).collect();
    let name = file.as_ref().map_or_else(|| "standard output".to_owned(), |path| path.display().to_string());
    let failed = |source| match &file {
        None => Failure::Output(source),
        Some(path) => Failure::Export { path: path.clone(), source },
    };
    let mut out: BufWriter<Box<dyn Write>> = BufWriter::new(match &file {
        None => Box::new(io::stdout()),
        Some(path) => Box::new(create(path).map_err(failed)?),
    });
    let bar = progress(lanes.iter().map(|lane| lane.messages).sum());
    let mut count = 0_u64;
    for lane in &lanes {
        end.messages(&lane.lane, u64::MAX, true, |message| {
            count += 1;
            bar.inc(1);
            writeln!(out, "{}", to_json(&message)?).map_err(failed)
        })?;
    }
    out.flush().map_err(failed)?;
    bar.finish_and_clear();
    complain(format_args!("{} messages written to {name}; the queue is as it was", grouped(count)));
    Ok(())
}

/// For its owner only: payloads are nobody else's business.
fn create(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// On standard error, and only where somebody looks.
fn progress(total: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {human_pos} of {human_len} messages, {eta} left");
    ProgressBar::new(total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn requeue(end: &mut End, mut numbers: Vec<u64>) -> Result<(), Failure> {
    if numbers.is_empty() {
        numbers = end.dead_letters(u64::MAX)?.iter().map(|letter| letter.number).collect();
    }
    let mut count = 0;
    for number in numbers {
        match end.ask(QueueAsk::Requeue { number }) {
            Ok(Answer::Changed { count: 0, .. }) => {
                let reason =
                    format!("there is no dead letter {number}; {count} were put into the queue before");
                return Err(Failure::NotDone(reason));
            }
            Ok(Answer::Changed { .. }) => count += 1,
            Ok(_) => return Err(Failure::OtherAnswer),
            Err(Failure::NotDone(reason)) => {
                return Err(Failure::NotDone(format!("{reason}; {count} were put into the queue before")));
            }
            Err(failure) => return Err(failure),
        }
    }
    write(&format!("{} dead letters are messages again\n", grouped(count)))
}

fn purge(end: &mut End, lane: Option<String>, dead: bool, all: bool, yes: bool) -> Result<(), Failure> {
    let depth = end.depth()?;
    let lanes: Vec<&LaneQueue> =
        depth.lanes.iter().filter(|one| all || lane.as_ref() == Some(&one.lane)).collect();
    let mut what: Vec<String> = lanes
        .iter()
        .map(|lane| {
            format!(
                "{} messages of lane {}",
                grouped(lane.messages.saturating_sub(lane.in_flight)),
                lane.lane
            )
        })
        .collect();
    what.extend(dead.then(|| format!("{} dead letters", grouped(depth.dead_letters))));
    if !yes {
        confirm(&what.join(", "))?;
    }
    let mut changed = Vec::new();
    for lane in lanes {
        let (mut total, mut below) = (0, None);
        loop {
            let ask = QueueAsk::PurgeLane { lane: lane.lane.clone(), below };
            let Answer::Changed { count, below: next } = end.ask(ask)? else {
                return Err(Failure::OtherAnswer);
            };
            total += count;
            below = next;
            if below.is_none() {
                break;
            }
        }
        changed.push(format!("{} messages of lane {}", grouped(total), lane.lane));
    }
    if dead {
        let Answer::Changed { count, .. } = end.ask(QueueAsk::PurgeDead {})? else {
            return Err(Failure::OtherAnswer);
        };
        changed.push(format!("{} dead letters", grouped(count)));
    }
    write(&format!("purged {}\n", changed.join(", ")))
}

fn confirm(what: &str) -> Result<(), Failure> {
    if !io::stdin().is_terminal() {
        return Err(Failure::NotConfirmed);
    }
    let mut err = io::stderr();
    let asked =
        write!(err, "Throw away {what}? This cannot be undone. Type yes: ").and_then(|()| err.flush());
    asked.map_err(Failure::Output)?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(Failure::Input)?;
    if answer.trim() == "yes" { Ok(()) } else { Err(Failure::NotConfirmed) }
}
