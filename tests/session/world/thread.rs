//! The store's thread, and the dispatch of commands: what they do between the session and the database.

use bytes::Bytes;
use fieldpost::command::{CommandStep, Stepped};
use fieldpost::message::{Lane, Message, Payload, Qos, Seq, Topic};
use fieldpost::store::Batch;
use fieldpost::turn::{Change, Offer};

use super::{Answer, NextCommit, World};
use crate::rule::Rule;

impl World {
    pub(super) fn take_turn(&mut self, connection: u64, changes: Vec<Change>, offer: Option<Offer>) {
        if self.failed {
            return;
        }
        if let Some(offer) = offer {
            self.offer = Some((connection, offer));
        }
        if changes.is_empty() {
            return;
        }
        match &mut self.changes {
            Some((of, waiting)) if *of == connection => waiting.extend(changes),
            Some(_) => {
                self.commit(NextCommit::Works);
                self.changes = Some((connection, changes));
            }
            None => self.changes = Some((connection, changes)),
        }
    }

    pub fn must_commit(&mut self) -> bool {
        let now = self.now;
        let (waiting, release) = self.store().waiting(now);
        let released = release.is_some_and(|at| at <= now.mono_ms);
        let asked = self.changes.is_some() || !self.waiting.is_empty() || !self.steps.is_empty();
        asked || !self.lagging.is_empty() || (self.offer.is_some() && (waiting || released))
    }

    /// One transaction with everything that waits.
    pub fn commit(&mut self, next: NextCommit) {
        let appends = std::mem::take(&mut self.waiting);
        let steps = std::mem::take(&mut self.steps);
        let changes = self.changes.take();
        let idle = appends.is_empty() && changes.is_none() && steps.is_empty() && self.lagging.is_empty();
        if idle && self.offer.is_none() {
            return;
        }
        let mut list = std::mem::take(&mut self.lagging);
        list.extend(changes.as_ref().map(|(_, changes)| changes.clone()).unwrap_or_default());
        let honest = list.clone();
        let broken = self.plan.broken;
        if let Some(rule) = broken {
            rule.change_commit(&mut list, &self.rows);
        }
        if self.breaks(Rule::DoneWithItsRow) {
            self.remove_rows_first(&mut list);
        }
        if self.breaks(Rule::InFlightIsUntouchable) && !appends.is_empty() {
            let oldest = self.rows.iter().next().map(|(id, row)| (*id, row.lane, row.seq));
            list.extend(oldest.map(|(id, lane, seq)| crate::rule::dead_letter(id, lane, seq)));
        }
        let messages: Vec<Vec<Message>> = appends.iter().map(|append| append.messages.clone()).collect();
        let offer = self.offer.as_ref().map(|(_, offer)| offer.clone());
        if next == NextCommit::Fails {
            // A number no column holds: SQLite refuses it when everything else has been written.
            let (id, lane, seq, reason) = (None, Lane::Bulk, Seq(u64::MAX), 0);
            list.push(Change::DeadLetter { id, lane, seq, reason });
        }
        self.note(|| commit_in_words(&list, &messages, &steps));
        let now = self.now;
        if offer.is_some() && self.live_from.is_none() {
            let first = World::first_number(&messages, &steps);
            self.live_from = Some(first.unwrap_or(self.next_number + 1));
        }
        let batch = Batch { appends, changes: list, steps: steps.clone(), offer };
        let mut committed = match self.store().commit(batch, now) {
            Ok(committed) => committed,
            Err(error) => {
                self.tally("commits failed");
                self.note(|| format!("FAILED: {error}"));
                self.offer = None;
                self.forget_holds();
                let hidden = self.breaks(Rule::FailedCommitIsACrash);
                self.failed = !hidden;
                // Whoever asked for a step asks again.
                self.steps.splice(0..0, steps);
                match changes {
                    Some((connection, _)) if hidden => {
                        let (refused, taken) = (Vec::new(), None);
                        self.answers.push_back(Answer::Done { connection, settled: true, refused, taken });
                    }
                    _ => self.answers.push_back(Answer::Failed),
                }
                return;
            }
        };
        // In the order of the store, which numbers answers first.
        for (step, stepped) in steps.into_iter().zip(&committed.steps) {
            self.stepped(step, *stepped);
        }
        for (messages, outcome) in messages.into_iter().zip(&committed.appends) {
            match outcome {
                Ok(()) if !self.breaks(Rule::AcceptedAfterCommit) => {
                    messages.iter().for_each(|message| self.accept(message));
                }
                Ok(()) => {}
                Err(_) => self.tally("appends refused"),
            }
        }
        self.delivered += committed.settled.delivered;
        if !self.breaks(Rule::AmbiguousIsCounted) {
            self.possibly_doubled += committed.settled.possibly_doubled;
        }
        self.possibly_lost += committed.settled.possibly_lost;
        for change in honest.iter().filter(|change| !is_refused(change, &committed.refused)) {
            self.committed(change);
        }
        if self.breaks(Rule::Qos1ThroughTheGate) {
            committed.taken.sort_by_key(|taken| taken.qos == Qos::ExactlyOnce);
        }
        for taken in &committed.taken {
            self.tally("messages handed out");
            let words = format!("{}={}", taken.id, String::from_utf8_lossy(&taken.record.payload));
            self.note(|| format!("takes {words}"));
            self.handed(taken);
        }
        let offered = if committed.taken.is_empty() { None } else { self.offer.take() };
        let changed = changes.as_ref().map(|(connection, _)| *connection);
        if let Some(connection) = changed.or(offered.as_ref().map(|(connection, _)| *connection)) {
            self.answers.push_back(Answer::Done {
                connection,
                settled: changed.is_some(),
                refused: committed.refused,
                taken: offered.map(|_| committed.taken),
            });
        }
    }

    /// Two transactions where there must be one: the rows go now, the done bits with the next commit.
    fn remove_rows_first(&mut self, list: &mut Vec<Change>) {
        let mut lagging = Vec::new();
        for change in list.iter_mut() {
            let Change::Completed(id) = change else { continue };
            let Some(row) = self.rows.get(&id.get()).filter(|row| !row.left) else { continue };
            let (id, lane, seq) = (Some(*id), row.lane, Seq(row.seq));
            lagging.push(Change::Acknowledged { lane, seq });
            let hold = fieldpost::turn::Hold::Topic;
            *change = Change::Refused { id, lane, seq, hold, hold_ms: 0, reason: 0 };
        }
        if lagging.is_empty() {
            return;
        }
        let first: Vec<Change> =
            list.extract_if(.., |c| matches!(c, Change::Refused { reason: 0, .. })).collect();
        let now = self.now;
        self.store().commit(Batch { changes: first, ..Batch::default() }, now).unwrap();
        list.splice(0..0, lagging);
    }

    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Delivers one answer of the store.
    pub fn answer(&mut self) {
        let Some(answer) = self.answers.pop_front() else { return };
        let now_ms = self.now.mono_ms;
        let any = self.breaks(Rule::AnswersOfThisConnection);
        match answer {
            Answer::Failed => self.crash_of_the_store(),
            Answer::Done { connection, settled, refused, taken } => {
                let ours = |session: &&mut fieldpost::uplink::session::Session| {
                    any || session.connection() == connection
                };
                let Some(session) = self.session().filter(ours) else { return };
                if settled {
                    session.on_committed(&refused, now_ms);
                }
                if let Some(taken) = taken {
                    session.on_taken(taken, now_ms);
                }
                self.tick_session();
                self.act();
            }
        }
    }

    fn crash_of_the_store(&mut self) {
        if let Some(mut online) = self.online.take() {
            self.broker.closed(online.conn, self.now.mono_ms);
            let events = online.session.take_events();
            self.count_events(events);
            self.carry = online.session.into_carry().after_store_failure();
            self.end("the store failed");
            self.route();
        }
    }

    // ---- the dispatch ------------------------------------------------------------------------------------

    /// Takes recorded commands; one with an id is begun, carried out and answered.
    pub fn dispatch(&mut self) {
        let (now, cursor) = (self.now, self.cursor);
        if self.store().newest_command() <= cursor {
            return;
        }
        for recorded in self.store().recorded(cursor, 4, now).unwrap() {
            let number = recorded.number;
            self.cursor = number;
            self.steps.push(match id_of(&recorded.inbound.payload) {
                Some(id) if self.breaks(Rule::IdsForEver) => {
                    CommandStep::Begin { number, id: format!("{id}/{number}") }
                }
                Some(id) => CommandStep::Begin { number, id },
                None => CommandStep::Forget { number },
            });
        }
    }

    /// After a start: what had begun is answered, and never carried out again.
    pub(super) fn dispatch_anew(&mut self) {
        let now = self.now;
        self.cursor = 0;
        self.steps.clear();
        for recorded in self.store().interrupted(now).unwrap() {
            let id = recorded.id.unwrap_or_default();
            self.push_answer(recorded.number, id);
        }
    }

    fn push_answer(&mut self, number: u64, id: String) {
        let message = Message {
            payload: Payload::Whole(format!("{} answers {id}", self.next_number + 1).into()),
            ..self.message(Lane::Alarm, Qos::ExactlyOnce, "t/alarm/2/answer", 0)
        };
        self.steps.push(CommandStep::Answer { number, id: Some(id), answer: Box::new(message) });
    }

    fn stepped(&mut self, step: CommandStep, stepped: Stepped) {
        match (step, stepped) {
            (CommandStep::Begin { number, id }, Stepped::Done) => {
                self.tally("commands carried out");
                let plain = id.split('/').next().unwrap_or_default().to_owned();
                *self.executed.entry(plain).or_default() += 1;
                self.push_answer(number, id);
            }
            (CommandStep::Begin { .. }, Stepped::Repeated) => self.tally("commands repeated"),
            (CommandStep::Answer { answer, .. }, Stepped::Done) => {
                self.tally("commands answered");
                self.accept(&answer);
            }
            (step @ CommandStep::Answer { .. }, Stepped::NoRoom) => {
                self.tally("answers without room");
                self.steps.push(step);
            }
            _ => {}
        }
    }
}

/// A command's own id, which only some have.
pub fn id_of(payload: &Bytes) -> Option<String> {
    let text = String::from_utf8_lossy(payload);
    text.strip_prefix("id ").map(str::to_owned)
}

fn is_refused(change: &Change, refused: &[fieldpost::message::PacketId]) -> bool {
    match change {
        Change::InboundOpened { id, .. } | Change::Inbound { id: Some(id), .. } => refused.contains(id),
        _ => false,
    }
}

fn commit_in_words(list: &[Change], messages: &[Vec<Message>], steps: &[CommandStep]) -> String {
    let change = |change: &Change| match change {
        Change::Inbound { inbound, .. } => format!("Inbound({:?})", inbound.payload),
        Change::InboundOpened { id, inbound, .. } => format!("InboundOpened({id}, {:?})", inbound.payload),
        change => format!("{change:?}").replace("PacketId", ""),
    };
    let step = |step: &CommandStep| match step {
        CommandStep::Begin { id, .. } => format!("Begin({id})"),
        CommandStep::Answer { id, .. } => format!("Answer({})", id.as_deref().unwrap_or_default()),
        CommandStep::Forget { number } => format!("Forget({number})"),
    };
    let text = |message: &Message| {
        String::from_utf8_lossy(&message.payload.clone().unnumbered()).trim_end_matches('.').to_owned()
    };
    let mut words: Vec<String> = list.iter().map(change).collect();
    words.extend(steps.iter().map(step));
    words.extend(
        messages.iter().flatten().map(|message| format!("accepts {} on {}", text(message), message.topic)),
    );
    format!("commits [{}]", words.join(", "))
}

impl World {
    /// The messages' own topic for presence.
    pub(super) fn presence_topic() -> Topic {
        Topic::new(super::PRESENCE).unwrap()
    }
}
