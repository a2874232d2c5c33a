//! What was accepted against what arrived, message by message: pure counting, and the verdict.
//!
//! One byte a message, whatever the run's length. Invariant: nothing is judged before both sides were heard:
//! an arrival may be seen before its answer, and a message that had no answer may arrive once or not at all.

use std::fmt;

/// Messages that share a topic; mosquitto's log tells topic and length, and these differ in length.
pub(crate) const PER_TOPIC: u64 = 100;
/// Bytes of the shortest payload.
pub(crate) const SHORTEST: usize = 20;
/// Fewer messages prove nothing.
const FEWEST: u64 = 100;
/// Things that went wrong and are told in words.
const DETAILS: usize = 10;

/// What became of a message on its producer's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// "Accepted".
    Accepted,
    /// "Not accepted".
    Refused,
    /// The agent died over it.
    Unknown,
}

/// Two bits of answer, the others count arrivals.
const ANSWERS: [Option<Answer>; 4] =
    [None, Some(Answer::Accepted), Some(Answer::Refused), Some(Answer::Unknown)];
const ANSWER_BITS: u8 = 0b11;
const ARRIVAL: u8 = 0b100;

/// The topic of message `n`.
pub(crate) fn topic(n: u64) -> String {
    format!("n/{}", n / PER_TOPIC)
}

/// The payload of message `n`: nobody else's, and of a length of its own in its topic.
pub(crate) fn payload(n: u64) -> String {
    let mut text = format!("{n} ");
    let mut random = fastrand::Rng::with_seed(n);
    let bytes = SHORTEST + (n % PER_TOPIC) as usize;
    text.extend(std::iter::repeat_with(|| random.alphanumeric()).take(bytes - text.len()));
    text
}

/// The number of a message, of which topic and length are known; `None` if it is none of ours.
pub(crate) fn number(topic: &str, bytes: usize) -> Option<u64> {
    let hundreds: u64 = topic.strip_prefix("n/")?.parse().ok()?;
    let rest = u64::try_from(bytes.checked_sub(SHORTEST)?).ok()?;
    (rest < PER_TOPIC).then_some(hundreds * PER_TOPIC + rest)
}

/// The books of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    messages: Vec<u8>,
    /// One more than the highest of each topic's that arrived, 0 to 100.
    highest: Vec<u8>,
    accepted: u64,
    refused: u64,
    unknown: u64,
    /// Accepted and arrived.
    delivered: u64,
    arrived: u64,
    duplicates: u64,
    out_of_order: u64,
    /// Arrived although they were not accepted, or never handed in.
    strange: u64,
    /// The first few of these, and their numbers.
    details: Vec<(u64, String)>,
}

impl Tally {
    fn message(&mut self, n: u64) -> &mut u8 {
        let index = n as usize;
        if self.messages.len() <= index {
            self.messages.resize(index + 1, 0);
        }
        &mut self.messages[index]
    }

    /// The producer heard this.
    pub(crate) fn answered(&mut self, n: u64, answer: Answer) {
        let message = self.message(n);
        *message |= ANSWERS.iter().position(|other| *other == Some(answer)).unwrap_or_default() as u8;
        let arrived = *message >= ARRIVAL;
        match (answer, arrived) {
            (Answer::Accepted, _) => {
                self.accepted += 1;
                self.delivered += u64::from(arrived);
            }
            (Answer::Refused, _) => {
                self.refused += 1;
                if arrived {
                    self.is_strange(n);
                }
            }
            (Answer::Unknown, _) => self.unknown += 1,
        }
    }

    /// The broker took this message for the first time, as far as it can know.
    pub(crate) fn arrived(&mut self, n: u64, qos: u8) {
        let message = self.message(n);
        let (before, answer) = (*message / ARRIVAL, ANSWERS[usize::from(*message & ANSWER_BITS)]);
        *message = message.saturating_add(if before < u8::MAX / ARRIVAL { ARRIVAL } else { 0 });
        self.arrived += 1;
        if before > 0 {
            self.duplicates += 1;
            if qos == 2 {
                self.detail(n, format!("message {n} arrived {} times", before + 1));
            }
            return;
        }
        match answer {
            Some(Answer::Accepted) => self.delivered += 1,
            Some(Answer::Refused) => self.is_strange(n),
            Some(Answer::Unknown) | None => {}
        }
        let (topic, place) = ((n / PER_TOPIC) as usize, (n % PER_TOPIC) as u8 + 1);
        if self.highest.len() <= topic {
            self.highest.resize(topic + 1, 0);
        }
        let highest = self.highest[topic];
        self.highest[topic] = highest.max(place);
        if highest > place && qos == 2 {
            self.out_of_order += 1;
            let after = topic as u64 * PER_TOPIC + u64::from(highest) - 1;
            self.detail(n, format!("message {n} arrived after {after}, of the same topic"));
        }
    }

    /// The broker took it and then refused it after all.
    pub(crate) fn withdrawn(&mut self, n: u64) {
        let message = self.message(n);
        if *message < ARRIVAL {
            return;
        }
        *message -= ARRIVAL;
        let (left, answer) = (*message / ARRIVAL, ANSWERS[usize::from(*message & ANSWER_BITS)]);
        self.arrived -= 1;
        self.duplicates -= u64::from(left > 0);
        self.delivered -= u64::from(left == 0 && answer == Some(Answer::Accepted));
    }

    fn is_strange(&mut self, n: u64) {
        self.strange += 1;
        self.detail(n, format!("message {n} was not accepted, and arrived"));
    }

    fn detail(&mut self, n: u64, words: String) {
        if self.details.len() < DETAILS {
            self.details.push((n, words));
        }
    }

    /// Messages accepted.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Messages refused, and messages without an answer.
    pub(crate) fn not_accepted(&self) -> (u64, u64) {
        (self.refused, self.unknown)
    }

    /// First-time PUBLISHes so far.
    pub(crate) fn arrivals(&self) -> u64 {
        self.arrived
    }

    /// Accepted messages that have not arrived: under way, or lost.
    pub(crate) fn missing(&self) -> u64 {
        self.accepted - self.delivered
    }

    /// The lowest number of these.
    fn first_missing(&self) -> Option<u64> {
        let accepted = |message: &u8| ANSWERS[usize::from(*message)] == Some(Answer::Accepted);
        self.messages.iter().position(|message| *message < ARRIVAL && accepted(message)).map(|n| n as u64)
    }

    /// Whether something is wrong that no waiting can mend. At QoS 1 duplicates are permitted.
    pub(crate) fn is_spoilt(&self, qos: u8) -> bool {
        (self.duplicates > 0 && qos == 2) || self.out_of_order > 0 || self.strange > 0
    }

    /// The end of it. Every answer and every arrival must have been heard; only if it ended early may messages
    /// be under way.
    pub(crate) fn close(mut self, cycles: u64, qos: u8, gaps: u64, corrupt: u64, early: bool) -> Verdict {
        let nobodys = |message: &u8| *message >= ARRIVAL && *message & ANSWER_BITS == 0;
        let nobodys: Vec<u64> =
            (0..).zip(&self.messages).filter(|(_, m)| nobodys(m)).map(|(n, _)| n).collect();
        for n in nobodys {
            self.strange += 1;
            self.detail(n, format!("message {n} was never handed in, and arrived"));
        }
        if let Some(n) = self.first_missing().filter(|_| !early) {
            self.detail(n, format!("message {n} was accepted and never arrived"));
        }
        let mut faults = Vec::new();
        let mut fault = |count: u64, words: &str| {
            if count > 0 {
                faults.push(format!("{count} {words}"));
            }
        };
        fault(self.missing(), if early { "not delivered when it ended" } else { "lost" });
        fault(if qos == 2 { self.duplicates } else { 0 }, "came twice");
        fault(gaps, "dropped by the agent");
        fault(corrupt, "corrupt");
        fault(self.out_of_order, "out of order");
        fault(self.strange, "arrived without having been accepted");
        Verdict {
            cycles,
            qos,
            accepted: self.accepted,
            delivered: self.delivered,
            lost: self.missing(),
            duplicates: self.duplicates,
            gaps,
            corrupt,
            faults,
            details: self.details,
        }
    }
}

/// The last line, and what is behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) cycles: u64,
    pub(crate) qos: u8,
    pub(crate) accepted: u64,
    /// Of these, those the broker took.
    pub(crate) delivered: u64,
    /// Of these, those it never saw.
    pub(crate) lost: u64,
    /// First-time receptions beyond the first.
    pub(crate) duplicates: u64,
    /// Messages the agent says it dropped.
    pub(crate) gaps: u64,
    /// Payloads that are not what was accepted, and databases that were set aside.
    pub(crate) corrupt: u64,
    /// What must not be, in words.
    pub(crate) faults: Vec<String>,
    /// The first few messages that show it.
    pub(crate) details: Vec<(u64, String)>,
}

impl Verdict {
    /// Whether every promise was kept, by enough messages to mean something.
    pub(crate) fn is_clean(&self) -> bool {
        self.faults.is_empty()
            && self.cycles > 0
            && self.accepted >= FEWEST
            && self.accepted == self.delivered
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict { cycles, qos, accepted, delivered, lost, duplicates, gaps, corrupt, faults, .. } = self;
        write!(
            f,
            "cycles={cycles} accepted={accepted} delivered={delivered} lost={lost} duplicates={duplicates} \
             gaps={gaps} corrupt={corrupt}"
        )?;
        if *qos == 1 && *duplicates > 0 {
            write!(f, " (QoS 1 permits duplicates)")?;
        }
        match self.is_clean() {
            true => Ok(()),
            false if faults.is_empty() => write!(f, " FAILED: too little happened to prove anything"),
            false => write!(f, " FAILED: {}", faults.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 300 messages that were accepted, and all arrived in order.
    fn good() -> Tally {
        let mut tally = Tally::default();
        for n in 0..300 {
            tally.answered(n, Answer::Accepted);
            tally.arrived(n, 2);
        }
        tally
    }

    fn verdict(change: impl FnOnce(&mut Tally)) -> (String, String, bool) {
        let mut tally = good();
        change(&mut tally);
        let verdict = tally.close(7, 2, 0, 0, false);
        let details: Vec<String> = verdict.details.iter().map(|(_, words)| words.clone()).collect();
        (verdict.to_string(), details.join("; "), verdict.is_clean())
    }

    #[test]
    fn a_message_is_known_by_its_topic_and_length() {
        for n in [0, 1, 99, 100, 101, 12_345, 9_999_999] {
            assert_eq!(number(&topic(n), payload(n).len()), Some(n));
        }
        assert_ne!(payload(7), payload(107));
        for (topic, bytes) in
            [("n/1", 19), ("n/1", 120), ("m/1", 20), ("n/x", 20), ("fieldpost/g1/state", 20)]
        {
            assert_eq!(number(topic, bytes), None, "{topic} {bytes}");
        }
    }

    #[test]
    fn all_is_well_when_everything_came_once() {
        let line = "cycles=7 accepted=300 delivered=300 lost=0 duplicates=0 gaps=0 corrupt=0".to_owned();
        assert_eq!(verdict(|_| {}), (line, String::new(), true));
    }

    #[test]
    fn whatever_is_wrong_is_counted_and_named() {
        type Change = fn(&mut Tally);
        let cases: [(Change, &str, &str); 7] = [
            (|t| t.answered(300, Answer::Accepted), "lost=1", "message 300 was accepted and never arrived"),
            (|t| t.arrived(7, 2), "duplicates=1", "message 7 arrived 2 times"),
            (|t| t.withdrawn(7), "lost=1", "message 7 was accepted and never arrived"),
            (|t| t.arrived(300, 2), "1 arrived without", "message 300 was never handed in"),
            (
                |t| {
                    t.answered(300, Answer::Refused);
                    t.arrived(300, 2);
                },
                "1 arrived without",
                "message 300 was not accepted, and arrived",
            ),
            (
                |t| {
                    t.arrived(301, 2);
                    t.arrived(300, 2);
                    t.answered(300, Answer::Accepted);
                    t.answered(301, Answer::Accepted);
                },
                "1 out of order",
                "message 300 arrived after 301",
            ),
            (
                |t| {
                    t.arrived(5, 2);
                    t.answered(300, Answer::Accepted);
                },
                "delivered=300 lost=1 duplicates=1",
                "message 5 arrived 2 times; message 300",
            ),
        ];
        for (change, part, words) in cases {
            let (line, details, clean) = verdict(change);
            assert!(line.contains(part) && line.contains("FAILED"), "{part}: {line}");
            assert!(details.contains(words) && !clean, "{words}: {details}");
        }
        let failed = |gaps, corrupt| good().close(7, 2, gaps, corrupt, false).to_string();
        assert!(failed(3, 0).ends_with("gaps=3 corrupt=0 FAILED: 3 dropped by the agent"));
        assert!(failed(0, 2).ends_with("gaps=0 corrupt=2 FAILED: 2 corrupt"));
    }

    #[test]
    fn what_had_no_answer_may_arrive_once_or_not_at_all() {
        let unknown = |t: &mut Tally| {
            t.answered(300, Answer::Unknown);
            t.answered(301, Answer::Unknown);
            t.arrived(301, 2);
        };
        assert!(verdict(unknown).2);
        let (line, _, clean) = verdict(|t| {
            unknown(t);
            t.arrived(301, 2);
        });
        assert!(line.contains("duplicates=1") && !clean, "{line}");
    }

    #[test]
    fn an_arrival_may_be_heard_of_before_its_answer() {
        let (line, _, clean) = verdict(|t| {
            t.arrived(300, 2);
            t.answered(300, Answer::Accepted);
        });
        assert!(line.contains("accepted=301 delivered=301") && clean, "{line}");
    }

    #[test]
    fn a_duplicate_never_hides_a_loss_however_often_it_comes() {
        let (line, _, _) = verdict(|t| {
            (0..1000).for_each(|_| t.arrived(3, 2));
            t.answered(300, Answer::Accepted);
        });
        assert!(line.contains("accepted=301 delivered=300 lost=1 duplicates=1000"), "{line}");
    }

    #[test]
    fn at_qos_1_a_duplicate_is_no_failure_and_a_loss_is() {
        let mut tally = good();
        tally.arrived(3, 1);
        assert!(!tally.is_spoilt(1) && tally.is_spoilt(2));
        let verdict = tally.close(7, 1, 0, 0, false);
        assert!(
            verdict.is_clean() && verdict.to_string().ends_with("(QoS 1 permits duplicates)"),
            "{verdict}"
        );
        let mut tally = good();
        tally.answered(300, Answer::Accepted);
        assert!(!tally.close(7, 1, 0, 0, false).is_clean());
    }

    #[test]
    fn what_is_under_way_at_an_early_end_is_not_called_lost() {
        let mut tally = good();
        tally.answered(300, Answer::Accepted);
        let verdict = tally.close(7, 2, 0, 0, true);
        assert!(verdict.to_string().ends_with("FAILED: 1 not delivered when it ended"), "{verdict}");
        assert!(verdict.details.is_empty() && !verdict.is_clean());
    }

    #[test]
    fn little_proves_nothing() {
        let mut tally = Tally::default();
        tally.answered(0, Answer::Accepted);
        tally.arrived(0, 2);
        let verdict = tally.close(7, 2, 0, 0, false);
        assert!(!verdict.is_clean() && verdict.to_string().contains("too little happened"), "{verdict}");
        assert!(!good().close(0, 2, 0, 0, false).is_clean());
    }
}
