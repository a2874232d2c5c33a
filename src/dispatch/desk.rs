//! The order of things for commands: take, judge, write down, hand to the line, answer. Pure.
//!
//! What was recorded, committed and carried out goes in with the time; steps for the store and writes for the lines
//! come out. Invariants (P8): a write comes out only after the step that begins it is committed; every command
//! comes to one answer, or is a repeat; a line that is slow or gone keeps no other waiting; bounded whatever comes.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use crate::clock::Stamp;
use crate::command::{CommandStep, Outcome, Recorded, Stepped, Ticket, Write, Written};
use crate::message::{Lane, Message, Qos};
use crate::point::Value;
use crate::policy::command::{self, Asked, Denial, Judge, Order, ReplyTo};
use crate::policy::format::{self, Answer, CommandResult};
use crate::stats::Stats;

/// Commands that wait for one line, at most.
const WAITING_MAX: usize = 100;
/// Commands taken from the inbox at once, at most.
const TAKE_MAX: u64 = 32;
/// Commands taken each second, refused ones included, at least; what comes faster waits in the inbox, and fills it.
const TAKEN_PER_SECOND: u64 = 200;
/// How soon a step that found no room, or a database that failed, is tried again, in milliseconds.
const AGAIN_MS: u64 = 1000;
const GONE: &str = "its line is gone";

/// How commands are limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Commands a second, in the long run.
    pub max_per_second: u32,
    /// Commands at once after a quiet time.
    pub burst: u32,
}

/// The rates that follow from limits.
struct Paces {
    rate: u64,
    burst: u64,
    /// At which commands are taken from the inbox.
    pace: u64,
}

impl Limits {
    fn paces(self) -> Paces {
        let rate = u64::from(self.max_per_second);
        Paces { rate, burst: u64::from(self.burst), pace: TAKEN_PER_SECOND.max(2 * rate) }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Commit this step, after those before it.
    Step(CommandStep),
    /// Hand this write to that line.
    Write {
        /// The line's number.
        line: usize,
        /// The write.
        write: Write,
    },
}

/// So many at once, and so many a second.
#[derive(Debug)]
struct Bucket {
    per_second: u64,
    /// In thousandths.
    full: u64,
    level: u64,
    filled_ms: u64,
}

impl Bucket {
    fn new(per_second: u64, full: u64, now_ms: u64) -> Self {
        Bucket { per_second, full: full * 1000, level: full * 1000, filled_ms: now_ms }
    }

    /// Another pace from now on; what has gathered stays.
    fn change(&mut self, per_second: u64, full: u64, now_ms: u64) {
        self.fill(now_ms);
        *self = Bucket { level: self.level.min(full * 1000), ..Bucket::new(per_second, full, now_ms) };
    }

    fn fill(&mut self, now_ms: u64) {
        let passed_ms = now_ms.saturating_sub(self.filled_ms);
        self.level = self.full.min(self.level.saturating_add(passed_ms.saturating_mul(self.per_second)));
        self.filled_ms = now_ms;
    }

    fn take(&mut self) -> bool {
        let enough = self.level >= 1000;
        self.level -= if enough { 1000 } else { 0 };
        enough
    }

    fn give_back(&mut self) {
        self.level = self.full.min(self.level + 1000);
    }
}

/// A command and whom to tell.
#[derive(Debug, Clone)]
struct Command {
    number: u64,
    id: Option<String>,
    point: Option<String>,
    reply_to: ReplyTo,
    correlation_data: Option<Bytes>,
    received: Stamp,
}

/// A command that may be carried out.
#[derive(Debug)]
struct Task {
    command: Command,
    id: String,
    order: Order,
}

/// What a line is doing for us.
#[derive(Debug)]
enum Doing {
    Nothing,
    /// That it begins is being committed.
    Beginning(Task),
    /// The write is with the line.
    Writing(Task, u64),
    /// The line never said what became of the write; until it does, it gets no other.
    Silent(Ticket),
}

#[derive(Debug)]
struct LineDesk {
    /// How long a write that has begun may take, in milliseconds.
    patience_ms: u64,
    waiting: VecDeque<Task>,
    doing: Doing,
    /// It gets nothing new, and is forgotten once nothing is under way.
    leaves: bool,
}

/// Everything known of the commands under way.
#[derive(Debug)]
pub struct Desk {
    gateway: String,
    judge: Judge,
    stats: Arc<Stats>,
    lines: BTreeMap<usize, LineDesk>,
    allowed: Bucket,
    taken: Bucket,
    /// Ids of what has come and is not answered.
    ids: HashSet<String>,
    /// The newest number that was taken.
    cursor: u64,
    /// Steps to try again at that time.
    again: Vec<CommandStep>,
    again_ms: u64,
    /// Answers handed to the store and not committed.
    answering: usize,
    effects: Vec<Effect>,
    /// Nothing new begins.
    stopping: bool,
    /// Negative control of tests: the write leaves before the commit that begins it.
    break_order: bool,
}

impl Desk {
    /// A desk for lines of this patience each, in milliseconds, by their numbers.
    pub fn new(
        gateway: &str,
        judge: Judge,
        limits: Limits,
        patience_ms: BTreeMap<usize, u64>,
        stats: Arc<Stats>,
        now_ms: u64,
    ) -> Self {
        let Paces { rate, burst, pace } = limits.paces();
        let lines = patience_ms.into_iter().map(|(line, ms)| (line, LineDesk::new(ms)));
        Desk {
            gateway: gateway.to_owned(),
            judge,
            stats,
            lines: lines.collect(),
            allowed: Bucket::new(rate, burst, now_ms),
            taken: Bucket::new(pace, pace.max(burst), now_ms),
            ids: HashSet::new(),
            cursor: 0,
            again: Vec::new(),
            again_ms: 0,
            answering: 0,
            effects: Vec::new(),
            stopping: false,
            break_order: false,
        }
    }

    /// Negative control of tests: writes leave before the commit that begins them.
    pub fn break_order(&mut self) {
        self.break_order = true;
    }

    /// Nothing new begins; what waits stays recorded.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.lines.values_mut().for_each(|line| line.waiting.clear());
    }

    /// Other rules, and other lines: what waits is judged again by its point's name, and answered if it may not be
    /// carried out any more. What has begun goes on where it is.
    pub fn change(&mut self, judge: Judge, limits: Limits, patience_ms: &BTreeMap<usize, u64>, now: Stamp) {
        self.judge = judge;
        let Paces { rate, burst, pace } = limits.paces();
        self.allowed.change(rate, burst, now.mono_ms);
        self.taken.change(pace, pace.max(burst), now.mono_ms);
        let mut waiting: Vec<Task> =
            self.lines.values_mut().flat_map(|line| line.waiting.drain(..)).collect();
        waiting.sort_by_key(|task| task.command.number);
        for (number, line) in &mut self.lines {
            line.leaves = !patience_ms.contains_key(number);
        }
        for (number, ms) in patience_ms {
            self.lines.entry(*number).or_insert_with(|| LineDesk::new(*ms)).patience_ms = *ms;
        }
        for Task { command, id, order } in waiting {
            let seat = self.judge.seat(command.point.as_deref().unwrap_or_default(), &order.value);
            match seat.map(|(line, point)| (self.lines.get_mut(&line), line, point)) {
                Ok((Some(desk), line, point)) => {
                    desk.waiting.push_back(Task { command, id, order: Order { line, point, ..order } });
                }
                Ok((None, ..)) => {
                    self.answer(&command, CommandResult::Refused, Some(GONE), None, Lane::Alarm, now)
                }
                Err(why) => {
                    let reason = format!("the configuration was changed before it could begin: {why}");
                    self.answer(&command, CommandResult::Refused, Some(&reason), None, Lane::Alarm, now);
                }
            }
        }
        self.pump(now);
    }

    /// Whether a write is under way on a line that gets no other.
    pub fn is_leaving(&self) -> bool {
        self.lines.values().any(|line| line.leaves)
    }

    /// Whether there is a line of that number.
    pub fn has(&self, line: usize) -> bool {
        self.lines.contains_key(&line)
    }

    /// What is to be done, in this order.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// From which number on more commands can be taken, and how many. `None`: not now.
    pub fn wants(&mut self, newest: u64, now_ms: u64) -> Option<(u64, usize)> {
        self.taken.fill(now_ms);
        let count = TAKE_MAX.min(self.taken.level / 1000);
        // Answers that find no room stop the intake: nothing piles up here.
        (!self.stopping
            && newest > self.cursor
            && count > 0
            && self.again.is_empty()
            && self.answering < WAITING_MAX)
            .then_some((self.cursor, count as usize))
    }

    /// When [`Desk::tick`] has something to do, in milliseconds of the monotonic clock.
    pub fn next_ms(&self, newest: u64) -> Option<u64> {
        let again = (!self.again.is_empty()).then_some(self.again_ms);
        let paced = (!self.stopping && newest > self.cursor && self.taken.level < 1000)
            .then_some(self.taken.filled_ms + 100);
        let lines = self.lines.values().flat_map(|line| {
            let writing = match &line.doing {
                Doing::Writing(_, deadline_ms) => Some(*deadline_ms),
                _ => None,
            };
            writing.into_iter().chain(line.waiting.iter().map(|task| task.order.not_after_mono_ms))
        });
        lines.chain(again).chain(paced).min()
    }

    /// Whether no write is under way and nothing waits for its commit.
    pub fn is_idle(&self) -> bool {
        let at_rest = |line: &LineDesk| matches!(line.doing, Doing::Nothing | Doing::Silent(_));
        self.answering == 0 && self.again.is_empty() && self.lines.values().all(at_rest)
    }

    /// What had begun when the agent ended: it may have been carried out, and never will be again.
    pub fn on_interrupted(&mut self, interrupted: Vec<Recorded>, now: Stamp) {
        for recorded in interrupted {
            let point = self.judge.judge(&asked(&recorded, now)).point;
            let command = Command { id: recorded.id.clone(), point, ..self.command(recorded) };
            let reason = "the agent ended while it was carried out; it is not tried again";
            self.answer(&command, CommandResult::Unknown, Some(reason), None, Lane::Alarm, now);
        }
    }

    /// Commands taken from the inbox, in order. `looked` is when their age was told.
    pub fn on_recorded(&mut self, recorded: Vec<Recorded>, now: Stamp) {
        self.allowed.fill(now.mono_ms);
        for recorded in recorded {
            self.taken.take();
            self.cursor = self.cursor.max(recorded.number);
            self.stats.commands_received.increment();
            self.on_command(recorded, now);
        }
        self.pump(now);
    }

    fn command(&self, recorded: Recorded) -> Command {
        let Recorded { number, inbound, received, .. } = recorded;
        let fits = command::correlates(inbound.correlation_data.as_ref());
        Command {
            number,
            id: None,
            point: None,
            reply_to: self.judge.reply_to(inbound.response_topic.as_deref()),
            correlation_data: inbound.correlation_data.filter(|_| fits),
            received,
        }
    }

    fn on_command(&mut self, recorded: Recorded, now: Stamp) {
        let verdict = self.judge.judge(&asked(&recorded, now));
        let correlates = command::correlates(recorded.inbound.correlation_data.as_ref());
        let command = Command { id: verdict.id.clone(), point: verdict.point, ..self.command(recorded) };
        if verdict.id.as_ref().is_some_and(|id| self.ids.contains(id)) {
            self.stats.commands_repeated.increment();
            return self.effects.push(Effect::Step(CommandStep::Forget { number: command.number }));
        }
        if !self.allowed.take() {
            self.stats.commands_over_limit.increment();
            // Behind everything else that is queued: whoever floods us does not delay a measured value.
            let reason = Some("too many commands: see [commands] max_per_second");
            return self.answer(&command, CommandResult::Refused, reason, None, Lane::Bulk, now);
        }
        let refused = |reason: String| Err(Denial::Refused(reason));
        let outcome = match (verdict.outcome, verdict.id) {
            (Ok(_), _) if !correlates => refused("its Correlation Data is too long to be given back".into()),
            (Ok(order), Some(id)) => match self.lines.get_mut(&order.line) {
                Some(line) if line.waiting.len() < WAITING_MAX => {
                    self.ids.insert(id.clone());
                    line.waiting.push_back(Task { command, id, order });
                    return;
                }
                Some(_) => refused(format!("{WAITING_MAX} commands wait for this line already")),
                None => refused(GONE.into()),
            },
            (Ok(_), None) => refused("it has no id".into()),
            (Err(denial), _) => Err::<(), Denial>(denial),
        };
        if let Err(denial) = outcome {
            let (result, reason) = match denial {
                Denial::Refused(reason) => (CommandResult::Refused, reason),
                Denial::Expired(reason) => (CommandResult::Expired, reason),
            };
            self.answer(&command, result, Some(&reason), None, Lane::Alarm, now);
        }
    }

    /// Gives each line that does nothing its next command, and forgets one that does nothing and leaves.
    fn pump(&mut self, now: Stamp) {
        self.lines
            .retain(|_, line| !line.leaves || matches!(line.doing, Doing::Beginning(_) | Doing::Writing(..)));
        if self.stopping {
            return;
        }
        self.expire(now);
        for line in self.lines.values_mut().filter(|line| matches!(line.doing, Doing::Nothing)) {
            let Some(task) = line.waiting.pop_front() else { continue };
            let begin = CommandStep::Begin { number: task.command.number, id: task.id.clone() };
            if self.break_order {
                self.effects.push(line.write(task));
            } else {
                line.doing = Doing::Beginning(task);
            }
            self.effects.push(Effect::Step(begin));
        }
    }

    /// Answers those that have waited too long.
    fn expire(&mut self, now: Stamp) {
        let over = |task: &Task| task.order.not_after_mono_ms <= now.mono_ms;
        let mut expired = Vec::new();
        for line in self.lines.values_mut() {
            let (late, waiting) = std::mem::take(&mut line.waiting).into_iter().partition(over);
            line.waiting = waiting;
            let late: VecDeque<Task> = late;
            expired.extend(late);
        }
        for task in expired {
            let reason = Some("its time was over while it waited for its line");
            self.answer(&task.command, CommandResult::Expired, reason, None, Lane::Alarm, now);
        }
    }

    /// A step was committed, or (`None`) the database failed.
    pub fn on_stepped(&mut self, step: CommandStep, stepped: Option<Stepped>, now: Stamp) {
        match stepped {
            None | Some(Stepped::NoRoom) => {
                self.stats.command_steps_retried.increment();
                self.again_ms = now.mono_ms + AGAIN_MS;
                self.again.push(step);
            }
            Some(stepped) => match step {
                CommandStep::Begin { number, id } => self.on_begun(number, &id, stepped, now),
                CommandStep::Forget { .. } => {}
                CommandStep::Answer { id, .. } => {
                    self.answering -= 1;
                    self.ids.retain(|waiting| Some(waiting) != id.as_ref());
                    if stepped == Stepped::Repeated {
                        self.on_repeated();
                    }
                }
            },
        }
        self.pump(now);
    }

    fn on_begun(&mut self, number: u64, id: &str, stepped: Stepped, now: Stamp) {
        let begins =
            |line: &LineDesk| matches!(&line.doing, Doing::Beginning(t) if t.command.number == number);
        let Some(line) = self.lines.values_mut().find(|line| begins(line)) else { return };
        let Doing::Beginning(task) = std::mem::replace(&mut line.doing, Doing::Nothing) else {
            return;
        };
        match stepped {
            Stepped::Done => {
                let write = line.write(task);
                self.effects.push(write);
            }
            Stepped::Gone => {
                let reason = Some("nothing was sent: the database was damaged before it could begin");
                self.answer(&task.command, CommandResult::Failed, reason, None, Lane::Alarm, now);
            }
            Stepped::Repeated | Stepped::NoRoom => {
                self.ids.remove(id);
                self.on_repeated();
            }
        }
    }

    fn on_repeated(&mut self) {
        self.stats.commands_repeated.increment();
        // Being sent a command again is nobody's fault.
        self.allowed.give_back();
    }

    /// The line took no write: certainly nothing was sent.
    pub fn on_not_handed_over(&mut self, ticket: Ticket, now: Stamp) {
        let outcome =
            Outcome::Failed { reason: "its line takes no writes at present".into(), read_back: None };
        self.on_written(Written { ticket, at: now, outcome }, now);
    }

    /// A line says what became of a write.
    pub fn on_written(&mut self, written: Written, now: Stamp) {
        let Written { ticket, at, outcome } = written;
        let Some(line) = self.lines.values_mut().find(|line| line.ticket() == Some(ticket)) else { return };
        if let Doing::Writing(task, _) = std::mem::replace(&mut line.doing, Doing::Nothing) {
            let (result, reason, read_back) = match &outcome {
                Outcome::Done { read_back } => (CommandResult::Done, None, Some(read_back)),
                Outcome::Failed { reason, read_back } => {
                    (CommandResult::Failed, Some(reason.as_str()), read_back.as_ref())
                }
                Outcome::Expired => {
                    (CommandResult::Expired, Some("its time was over before its line could begin"), None)
                }
                Outcome::Unknown { reason } => (CommandResult::Unknown, Some(reason.as_str()), None),
            };
            self.answer(&task.command, result, reason, read_back, Lane::Alarm, at);
        }
        self.pump(now);
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Stamp) {
        if !self.again.is_empty() && now.mono_ms >= self.again_ms {
            self.effects.extend(std::mem::take(&mut self.again).into_iter().map(Effect::Step));
        }
        let is_late = |line: &LineDesk| matches!(&line.doing, Doing::Writing(_, deadline_ms) if *deadline_ms <= now.mono_ms);
        let mut silent = Vec::new();
        for line in self.lines.values_mut().filter(|line| is_late(line)) {
            let Some(ticket) = line.ticket() else { continue };
            if let Doing::Writing(task, _) = std::mem::replace(&mut line.doing, Doing::Silent(ticket)) {
                silent.push(task);
            }
        }
        for task in silent {
            let reason = Some("its line has not said what became of it");
            self.answer(&task.command, CommandResult::Unknown, reason, None, Lane::Alarm, now);
        }
        self.pump(now);
    }

    fn answer(
        &mut self,
        command: &Command,
        result: CommandResult,
        reason: Option<&str>,
        read_back: Option<&Value>,
        lane: Lane,
        at: Stamp,
    ) {
        let counter = match result {
            CommandResult::Done => &self.stats.commands_done,
            CommandResult::Refused => &self.stats.commands_refused,
            CommandResult::Expired => &self.stats.commands_expired,
            CommandResult::Failed => &self.stats.commands_failed,
            CommandResult::Unknown => &self.stats.commands_unknown,
        };
        counter.increment();
        self.ids.extend(command.id.clone());
        let answer = Answer {
            id: command.id.as_deref(),
            point: command.point.as_deref(),
            result,
            reason,
            read_back,
            note: command.reply_to.note.as_deref(),
            received: command.received,
            at,
        };
        let message = Message {
            topic: command.reply_to.topic.clone(),
            qos: Qos::ExactlyOnce,
            retain: false,
            lane,
            at,
            expires_after: None,
            correlation_data: command.correlation_data.clone(),
            payload: format::answer(&self.gateway, &answer),
        };
        self.answering += 1;
        self.effects.push(Effect::Step(CommandStep::Answer {
            number: command.number,
            id: command.id.clone(),
            answer: Box::new(message),
        }));
    }
}

impl LineDesk {
    fn new(patience_ms: u64) -> Self {
        LineDesk { patience_ms, waiting: VecDeque::new(), doing: Doing::Nothing, leaves: false }
    }

    /// Its beginning is committed: the write goes to its line.
    fn write(&mut self, task: Task) -> Effect {
        let Order { line, point, ref value, not_after_mono_ms } = task.order;
        let write = Write {
            ticket: Ticket(task.command.number),
            point,
            value: value.clone(),
            not_after_mono_ms: Some(not_after_mono_ms),
        };
        self.doing = Doing::Writing(task, not_after_mono_ms.saturating_add(self.patience_ms));
        Effect::Write { line, write }
    }

    fn ticket(&self) -> Option<Ticket> {
        match &self.doing {
            Doing::Writing(task, _) => Some(Ticket(task.command.number)),
            Doing::Silent(ticket) => Some(*ticket),
            Doing::Nothing | Doing::Beginning(_) => None,
        }
    }
}

fn asked(recorded: &Recorded, now: Stamp) -> Asked<'_> {
    let Recorded { inbound, age_ms, .. } = recorded;
    Asked { payload: &inbound.payload, retain: inbound.retain, age_ms: *age_ms, now }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::message::Topic;
    use crate::point::PointIndex;
    use crate::policy::command::{Allowed, Settings, WritablePoint};
    use crate::turn::Inbound;

    fn at(ms: u64) -> Stamp {
        Stamp { wall_ms: 1_795_255_200_000 + ms as i64, mono_ms: ms, synchronised: true }
    }

    fn desk() -> Desk {
        let limits = Limits { max_per_second: 10, burst: 5 };
        Desk::new("g", judge(&[0, 1], 100.0), limits, [(0, 1000), (1, 1000)].into(), Arc::default(), 0)
    }

    /// For a writable point on each of two lines, which have these numbers.
    fn judge(lines: &[usize], max: f64) -> Judge {
        let point = |(n, line): (usize, &usize)| WritablePoint {
            name: format!("l{n}/u/p"),
            index: PointIndex(*line),
            line: *line,
            allowed: Allowed::Number { min: 0.0, max },
        };
        Judge::new(Settings {
            points: lines.iter().enumerate().map(point).collect(),
            ttl: Duration::from_secs(30),
            max_ttl: Duration::from_secs(60),
            answer_topic: Topic::new("g/answer").expect("a topic"),
            response_topics: vec!["r/".into()],
        })
    }

    fn recorded(number: u64, payload: &str) -> Recorded {
        let inbound = Inbound {
            topic: Topic::new("g/command").expect("a topic"),
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            qos: Qos::ExactlyOnce,
            retain: false,
            response_topic: Some("r/1".into()),
            correlation_data: Some(Bytes::from_static(b"\0\xff")),
        };
        Recorded { number, id: None, inbound, received: at(0), age_ms: Some(0) }
    }

    fn command(number: u64, id: &str, line: usize) -> Recorded {
        recorded(number, &format!(r#"{{"id":"{id}","point":"l{line}/u/p","value":{number}}}"#))
    }

    fn begin(number: u64, id: &str) -> CommandStep {
        CommandStep::Begin { number, id: id.into() }
    }

    fn step_of(effect: &Effect) -> &CommandStep {
        match effect {
            Effect::Step(step) => step,
            Effect::Write { .. } => panic!("a write: {effect:?}"),
        }
    }

    /// The answers among the effects: number, id, what they say, lane.
    fn answers(effects: &[Effect]) -> Vec<(u64, Option<String>, String, Lane)> {
        let answer = |effect: &Effect| match effect {
            Effect::Step(CommandStep::Answer { number, id, answer }) => {
                assert_eq!(answer.correlation_data.as_deref(), Some(&b"\0\xff"[..]));
                assert_eq!((answer.topic.as_str(), answer.qos), ("r/1", Qos::ExactlyOnce));
                let text = answer.payload.clone().unnumbered();
                let json: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
                let said = format!("{} {}", json["result"], json["reason"]).replace('"', "");
                Some((*number, id.clone(), said, answer.lane))
            }
            _ => None,
        };
        effects.iter().filter_map(answer).collect()
    }

    fn written(number: u64, outcome: Outcome) -> Written {
        Written { ticket: Ticket(number), at: at(5), outcome }
    }

    fn done() -> Outcome {
        Outcome::Done { read_back: Value::Integer(1) }
    }

    #[test]
    fn a_write_leaves_only_once_its_beginning_is_committed_and_one_at_a_time_for_each_line() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0), command(2, "b", 0), command(3, "c", 1)], at(1));
        assert_eq!(desk.take_effects(), [Effect::Step(begin(1, "a")), Effect::Step(begin(3, "c"))]);
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(2));
        let write = Write {
            ticket: Ticket(1),
            point: PointIndex(0),
            value: Value::Integer(1),
            not_after_mono_ms: Some(30_001),
        };
        assert_eq!(desk.take_effects(), [Effect::Write { line: 0, write }]);
        desk.on_written(written(1, done()), at(5));
        let effects = desk.take_effects();
        assert_eq!(answers(&effects), [(1, Some("a".into()), "done null".into(), Lane::Alarm)]);
        assert_eq!(effects[1], Effect::Step(begin(2, "b")));
        desk.on_written(written(1, done()), at(6));
        assert_eq!(desk.take_effects(), [], "said once more");
    }

    #[test]
    fn the_ends_of_a_write_are_answered_for_what_they_are() {
        let failed = Outcome::Failed { reason: "exception 2".into(), read_back: None };
        let unknown = Outcome::Unknown { reason: "no reply".into() };
        for (outcome, said) in [
            (failed, "failed exception 2"),
            (unknown, "unknown no reply"),
            (Outcome::Expired, "expired its time was over before its line could begin"),
        ] {
            let mut desk = desk();
            desk.on_recorded(vec![command(1, "a", 0)], at(1));
            desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(2));
            desk.take_effects();
            desk.on_written(written(1, outcome), at(5));
            assert_eq!(answers(&desk.take_effects())[0].2, said);
        }
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0)], at(1));
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(2));
        desk.take_effects();
        desk.on_not_handed_over(Ticket(1), at(3));
        assert_eq!(answers(&desk.take_effects())[0].2, "failed its line takes no writes at present");
    }

    #[test]
    fn an_id_that_is_known_is_neither_carried_out_nor_answered_again() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0), command(2, "a", 1)], at(1));
        assert_eq!(
            desk.take_effects(),
            [Effect::Step(CommandStep::Forget { number: 2 }), Effect::Step(begin(1, "a"))]
        );
        desk.on_stepped(begin(1, "a"), Some(Stepped::Repeated), at(2));
        assert_eq!(desk.take_effects(), []);
        assert_eq!((desk.stats.commands_repeated.get(), desk.is_idle()), (2, true));
        desk.on_recorded(vec![recorded(3, r#"{"id":"x"}"#)], at(3));
        let effects = desk.take_effects();
        desk.on_recorded(vec![command(4, "x", 0)], at(3));
        assert_eq!(desk.take_effects(), [Effect::Step(CommandStep::Forget { number: 4 })], "being answered");
        desk.on_stepped(step_of(&effects[0]).clone(), Some(Stepped::Done), at(4));
        assert!(desk.ids.is_empty());
    }

    #[test]
    fn what_had_begun_before_a_crash_is_answered_as_unknown_and_not_tried_again() {
        let mut desk = desk();
        let begun = Recorded { id: Some("a".into()), ..command(7, "a", 0) };
        desk.on_interrupted(vec![begun], at(1));
        let effects = desk.take_effects();
        let said = "unknown the agent ended while it was carried out; it is not tried again";
        assert_eq!(answers(&effects), [(7, Some("a".into()), said.into(), Lane::Alarm)]);
        assert_eq!(effects.len(), 1);
    }

    #[test]
    fn a_line_that_never_answers_keeps_no_other_waiting_and_its_own_commands_expire() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0), command(2, "b", 0), command(3, "c", 1)], at(0));
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(1));
        desk.on_stepped(begin(3, "c"), Some(Stepped::Done), at(1));
        desk.take_effects();
        desk.on_written(written(3, done()), at(2));
        assert_eq!(answers(&desk.take_effects()).len(), 1, "the other line goes on");
        assert_eq!(desk.next_ms(0), Some(30_000));
        desk.tick(at(30_000));
        let said = "expired its time was over while it waited for its line";
        assert_eq!(answers(&desk.take_effects()), [(2, Some("b".into()), said.into(), Lane::Alarm)]);
        assert_eq!(desk.next_ms(0), Some(31_000));
        desk.tick(at(31_000));
        let said = "unknown its line has not said what became of it";
        assert_eq!(answers(&desk.take_effects()), [(1, Some("a".into()), said.into(), Lane::Alarm)]);
        desk.on_recorded(vec![command(4, "d", 0)], at(31_001));
        assert_eq!(desk.take_effects(), [], "it still has the first");
        desk.on_written(written(1, done()), at(31_002));
        assert_eq!(desk.take_effects(), [Effect::Step(begin(4, "d"))], "and is not answered twice");
    }

    #[test]
    fn commands_above_the_limit_are_refused_behind_everything_else() {
        let mut desk = desk();
        let flood = (1..=20).map(|n| command(n, &format!("id {n}"), 0)).collect();
        desk.on_recorded(flood, at(0));
        let refused = answers(&desk.take_effects());
        assert_eq!(refused.len(), 15);
        assert!(refused.iter().all(|(_, _, said, lane)| {
            said.starts_with("refused too many commands") && *lane == Lane::Bulk
        }));
        desk.on_recorded(vec![command(21, "later", 0)], at(100));
        assert_eq!(answers(&desk.take_effects()), [], "a tenth of a second later there is room for one");
        assert_eq!(desk.stats.commands_over_limit.get(), 15);
    }

    #[test]
    fn the_intake_is_paced_and_stops_while_answers_find_no_room() {
        let mut desk = desk();
        let mut taken = 0;
        while let Some((after, count)) = desk.wants(100_000, 0) {
            desk.on_recorded((1..=count as u64).map(|n| recorded(after + n, "x")).collect(), at(0));
            for effect in desk.take_effects() {
                desk.on_stepped(step_of(&effect).clone(), Some(Stepped::Done), at(0));
            }
            taken += count;
        }
        assert_eq!(taken, 200);
        assert_eq!(desk.next_ms(100_000), Some(100));
        assert_eq!(desk.wants(100_000, 100).map(|(after, _)| after), Some(200));
        desk.on_recorded(vec![recorded(201, "x")], at(100));
        let [effect] = &desk.take_effects()[..] else { panic!("one answer") };
        desk.on_stepped(step_of(effect).clone(), Some(Stepped::NoRoom), at(100));
        assert_eq!(desk.wants(100_000, 500), None);
        assert!(desk.next_ms(100_000).is_some_and(|at_ms| at_ms <= 1_100));
        desk.tick(at(1_100));
        assert_eq!(&desk.take_effects()[..], std::slice::from_ref(effect));
        assert_eq!(desk.stats.command_steps_retried.get(), 1);
    }

    #[test]
    fn the_beginning_is_committed_again_after_the_database_failed_and_nothing_is_written_before() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0)], at(1));
        desk.take_effects();
        desk.on_stepped(begin(1, "a"), None, at(2));
        assert_eq!(desk.take_effects(), []);
        desk.tick(at(1_002));
        assert_eq!(desk.take_effects(), [Effect::Step(begin(1, "a"))]);
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(1_003));
        assert!(matches!(desk.take_effects()[..], [Effect::Write { .. }]));
    }

    #[test]
    fn a_command_whose_row_was_lost_to_damage_is_not_carried_out_and_still_answered() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0)], at(1));
        desk.take_effects();
        desk.on_stepped(begin(1, "a"), Some(Stepped::Gone), at(2));
        let said = "failed nothing was sent: the database was damaged before it could begin";
        assert_eq!(answers(&desk.take_effects()), [(1, Some("a".into()), said.into(), Lane::Alarm)]);
    }

    #[test]
    fn a_change_moves_what_waits_to_the_new_line_and_the_old_one_finishes_what_it_has() {
        let mut desk = desk();
        let waiting = vec![command(1, "a", 0), command(2, "b", 0), command(60, "c", 0), command(4, "d", 1)];
        desk.on_recorded(waiting, at(1));
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(2));
        desk.take_effects();
        // Line 0 is made anew as number 7, its range is smaller; line 1 is gone before its command has begun.
        let limits = Limits { max_per_second: 10, burst: 5 };
        desk.change(judge(&[7], 50.0), limits, &[(7, 1000)].into(), at(3));
        assert!(desk.is_leaving() && desk.has(0) && desk.has(1) && desk.has(7));
        let effects = desk.take_effects();
        let said =
            "refused the configuration was changed before it could begin: value: 60 is out of range, 0 to 50";
        assert_eq!(answers(&effects), [(60, Some("c".into()), said.into(), Lane::Alarm)]);
        assert_eq!(effects[1], Effect::Step(begin(2, "b")), "at once, on the new line");
        desk.on_stepped(begin(2, "b"), Some(Stepped::Done), at(4));
        assert!(matches!(desk.take_effects()[..], [Effect::Write { line: 7, .. }]));
        desk.on_stepped(begin(4, "d"), Some(Stepped::Done), at(4));
        assert!(matches!(desk.take_effects()[..], [Effect::Write { line: 1, .. }]), "it had begun");
        desk.on_written(written(1, done()), at(5));
        assert_eq!(answers(&desk.take_effects()).len(), 1);
        assert!(desk.is_leaving() && !desk.has(0));
        desk.on_not_handed_over(Ticket(4), at(6));
        assert_eq!(answers(&desk.take_effects())[0].2, "failed its line takes no writes at present");
        assert!(!desk.is_leaving() && !desk.has(1));
        desk.on_recorded(vec![command(5, "e", 1)], at(7));
        let said = answers(&desk.take_effects());
        assert_eq!(said.len(), 1, "line 1 is not known any more: {said:?}");
    }

    #[test]
    fn a_stop_begins_nothing_and_waits_for_what_has_begun() {
        let mut desk = desk();
        desk.on_recorded(vec![command(1, "a", 0), command(2, "b", 0)], at(1));
        desk.on_stepped(begin(1, "a"), Some(Stepped::Done), at(2));
        desk.take_effects();
        desk.stop();
        assert_eq!((desk.is_idle(), desk.wants(9, 3)), (false, None));
        desk.on_written(written(1, done()), at(4));
        let effects = desk.take_effects();
        assert_eq!((effects.len(), desk.is_idle()), (1, false));
        desk.on_stepped(step_of(&effects[0]).clone(), Some(Stepped::Done), at(5));
        assert!(desk.is_idle() && desk.take_effects().is_empty());
    }
}
