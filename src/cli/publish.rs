//! `fieldpost publish`: one message, or one a line of standard input, into the running agent's outbox.
//!
//! Invariant (P1): "accepted" is printed only for a message the agent has called durable.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;

use clap::Args;

use super::{Agent, Failure, printable};
use crate::control::client::{self, Answers, Asker};
use crate::control::wire::{Answer, LINE_MAX_BYTES, Publish, Question, to_hex};

/// Requests sent ahead of their answers.
const AHEAD_MAX: usize = 256;

/// `fieldpost publish`
#[derive(Debug, Args)]
pub(super) struct HandIn {
    /// Where to publish
    #[arg(long, short)]
    topic: String,
    /// Quality of service; QoS 0 is not stored
    #[arg(long, short, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=2))]
    qos: u8,
    /// Ask the broker to keep it as the topic's retained message
    #[arg(long, short)]
    retain: bool,
    /// The queue to join
    #[arg(long, default_value = "normal", value_parser = ["alarm", "normal", "bulk"])]
    lane: String,
    /// Print how many were accepted in the end, instead of a line for each
    #[arg(long)]
    count: bool,
    #[command(flatten)]
    agent: Agent,
    /// The message; without it, one message a line is read from standard input
    #[arg(allow_hyphen_values = true)]
    message: Option<String>,
}

impl HandIn {
    pub(super) fn run(self) -> Result<(), Failure> {
        let socket = self.agent.socket()?;
        let HandIn { topic, qos, retain, lane, count, message, .. } = self;
        let draft = Publish { topic, qos, retain, lane: Some(lane), text: None, json: None, hex: None };
        match message {
            Some(message) => {
                hand_in(&socket, draft, io::Cursor::new(message), true, count, &mut io::stdout())
            }
            None => hand_in(&socket, draft, io::stdin(), false, count, &mut io::stdout()),
        }
    }
}

/// Hands in the lines of `input`, or all of it as one message, and prints what became of each.
///
/// Reading is another thread's work, so that an answer is printed while the next line is being waited for,
/// and so that a connection that breaks ends the command at once.
fn hand_in(
    socket: &Path,
    draft: Publish,
    input: impl Read + Send + 'static,
    whole: bool,
    count: bool,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let (asker, answers) = client::connect(socket)?;
    let (asked, to_hear) = sync_channel(AHEAD_MAX);
    let mut sender = Sender { asker, asked, draft };
    let reader = thread::spawn(move || match whole {
        true => sender.send_whole(input),
        false => sender.send_lines(input),
    });
    let mut tally = Tally { each: !count, ..Tally::default() };
    if let Err(failure) = tally.hear(answers, &to_hear, out) {
        return Err(Failure::BrokeOff { accepted: tally.accepted, failure: Box::new(failure) });
    }
    let read = reader.join().expect("a panic ends the process");
    tally.conclude(read, out)
}

struct Sender {
    asker: Asker,
    /// One for each request, so that the hearer knows how many answers there will be.
    asked: SyncSender<()>,
    draft: Publish,
}

impl Sender {
    fn send_whole(&mut self, mut input: impl Read) -> Result<(), Failure> {
        let mut message = Vec::new();
        input.read_to_end(&mut message).map_err(Failure::Input)?;
        self.send(message)?;
        Ok(self.asker.flush()?)
    }

    fn send_lines(&mut self, input: impl Read) -> Result<(), Failure> {
        let mut input = BufReader::new(input);
        for number in 1.. {
            if input.buffer().is_empty() {
                // The next line may be long in coming.
                self.asker.flush()?;
            }
            let mut line = Vec::new();
            let limited = &mut input.by_ref().take(LINE_MAX_BYTES as u64);
            limited.read_until(b'\n', &mut line).map_err(Failure::Input)?;
            match line.last() {
                None => break,
                Some(b'\n') => drop(line.pop()),
                Some(_) if line.len() == LINE_MAX_BYTES => {
                    return Err(Failure::LineTooLong { line: number, max: LINE_MAX_BYTES });
                }
                Some(_) => {}
            }
            self.send(line)?;
        }
        Ok(self.asker.flush()?)
    }

    fn send(&mut self, message: Vec<u8>) -> Result<(), Failure> {
        let (text, hex) = match String::from_utf8(message) {
            Ok(text) => (Some(text), None),
            Err(bytes) => (None, Some(to_hex(bytes.as_bytes()))),
        };
        self.asker.ask(&Question::Publish(Publish { text, hex, ..self.draft.clone() }))?;
        if let Err(TrySendError::Full(())) = self.asked.try_send(()) {
            self.asker.flush()?;
            // An error means that the hearer has given up, and says why.
            let _ = self.asked.send(());
        }
        Ok(())
    }
}

#[derive(Default)]
struct Tally {
    each: bool,
    accepted: u64,
    handed_over: u64,
    refused: u64,
    reason: String,
}

impl Tally {
    /// Takes down the answers until everything asked has one.
    fn hear(
        &mut self,
        mut answers: Answers,
        to_hear: &Receiver<()>,
        out: &mut impl Write,
    ) -> Result<(), Failure> {
        while to_hear.recv().is_ok() {
            let word = match answers.hear()? {
                Answer::Accepted {} => {
                    self.accepted += 1;
                    "accepted".to_owned()
                }
                Answer::HandedOver {} => {
                    self.handed_over += 1;
                    "handed over, not stored (QoS 0)".to_owned()
                }
                Answer::Refused { reason } => {
                    self.refused += 1;
                    self.reason = printable(&reason);
                    format!("not accepted: {}", self.reason)
                }
                _ => return Err(Failure::OtherAnswer),
            };
            if self.each {
                writeln!(out, "{word}").and_then(|()| out.flush()).map_err(Failure::Output)?;
            }
        }
        Ok(())
    }

    fn conclude(self, read: Result<(), Failure>, out: &mut impl Write) -> Result<(), Failure> {
        if !self.each {
            let word = if self.handed_over > 0 { "handed over, not stored (QoS 0)" } else { "accepted" };
            writeln!(out, "{} {word}", self.accepted + self.handed_over).map_err(Failure::Output)?;
        }
        if let Err(failure) = read {
            return Err(Failure::BrokeOff { accepted: self.accepted, failure: Box::new(failure) });
        }
        match (self.accepted + self.handed_over, self.refused) {
            (_, 0) => Ok(()),
            (0, 1) => Err(Failure::Refused(self.reason)),
            (accepted, refused) => Err(Failure::PartlyRefused { accepted, refused, reason: self.reason }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{self, Ask, Request};
    use crate::message::{Message, Payload};

    /// An agent behind a real socket that refuses what says "no"; yields what it was handed.
    struct FakeAgent {
        folder: tempfile::TempDir,
        taken: Receiver<Message>,
    }

    fn agent() -> FakeAgent {
        let folder = tempfile::tempdir().expect("a folder");
        let (tell, taken) = std::sync::mpsc::channel();
        let path = folder.path().join("s");
        let (ready, is_ready) = sync_channel(1);
        thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let (sender, mut requests) = tokio::sync::mpsc::channel(4);
                tokio::spawn(control::serve(control::bind(&path).expect("a free name"), sender));
                ready.send(()).expect("somebody waits");
                while let Some(Request { ask, reply }) = requests.recv().await {
                    let Ask::Publish(messages) = ask else { continue };
                    let [message] = <[Message; 1]>::try_from(messages).expect("one at a time");
                    let answer = match message.payload == Payload::Whole("no".into()) {
                        true => Answer::Refused { reason: "the outbox is full".into() },
                        false => Answer::Accepted {},
                    };
                    tell.send(message).expect("the test lives");
                    reply.send(answer).expect("somebody waits");
                }
            });
        });
        is_ready.recv().expect("a socket");
        FakeAgent { folder, taken }
    }

    impl FakeAgent {
        fn hand_in(&self, input: &[u8], whole: bool, count: bool) -> (String, Result<(), String>) {
            let draft = Publish {
                topic: "a/b".into(),
                qos: 2,
                retain: false,
                lane: Some("bulk".into()),
                text: None,
                json: None,
                hex: None,
            };
            let mut out = Vec::new();
            let input = io::Cursor::new(input.to_vec());
            let outcome = hand_in(&self.folder.path().join("s"), draft, input, whole, count, &mut out);
            (String::from_utf8(out).expect("text"), outcome.map_err(|failure| failure.to_string()))
        }

        fn taken(&self) -> Vec<Vec<u8>> {
            let payload = |message: Message| match message.payload {
                Payload::Whole(bytes) => bytes.to_vec(),
                Payload::Numbered(_) => panic!("what is handed in is published as it is"),
            };
            self.taken.try_iter().map(payload).collect()
        }
    }

    #[test]
    fn one_message_is_published_as_it_is() {
        let agent = agent();
        assert_eq!(agent.hand_in(b"21.5\n", true, false), ("accepted\n".into(), Ok(())));
        assert_eq!(agent.taken(), [b"21.5\n"]);
    }

    #[test]
    fn each_line_is_a_message_and_is_accounted_for() {
        let agent = agent();
        let (out, outcome) = agent.hand_in(b"one\n\nno\n\xff\xfe\nlast", false, false);
        assert_eq!(out, "accepted\naccepted\nnot accepted: the outbox is full\naccepted\naccepted\n");
        let told = "fieldpost: 4 accepted, 1 not; the last because: the outbox is full";
        assert_eq!(outcome, Err(told.into()));
        assert_eq!(agent.taken(), [&b"one"[..], b"", b"no", b"\xff\xfe", b"last"]);
    }

    #[test]
    fn many_lines_are_sent_ahead_and_counted() {
        let agent = agent();
        let input: Vec<u8> = (0..5_000).flat_map(|number| format!("{number}\n").into_bytes()).collect();
        assert_eq!(agent.hand_in(&input, false, true), ("5000 accepted\n".into(), Ok(())));
        let taken = agent.taken();
        assert_eq!((taken.len(), &taken[4_999][..]), (5_000, &b"4999"[..]));
        assert_eq!(agent.hand_in(b"", false, true), ("0 accepted\n".into(), Ok(())));
    }

    #[test]
    fn a_refused_message_and_a_giant_line_are_failures() {
        let agent = agent();
        let (_, outcome) = agent.hand_in(b"no", true, false);
        assert_eq!(outcome, Err("fieldpost: not accepted: the outbox is full".into()));
        let mut giant = b"one\n".to_vec();
        giant.resize(LINE_MAX_BYTES + 10, b'x');
        let (out, outcome) = agent.hand_in(&giant, false, false);
        assert_eq!(out, "accepted\n");
        let reason = outcome.expect_err("too long");
        assert!(reason.starts_with("fieldpost: 1 accepted, then:"), "{reason}");
        assert!(reason.contains("line 2 is longer than 1048576 bytes"), "{reason}");
    }

    #[test]
    fn nobody_listening_is_told_with_the_place() {
        let agent = agent();
        let socket = agent.folder.path().join("other");
        let (topic, lane) = ("t".into(), None);
        let draft = Publish { topic, qos: 1, retain: false, lane, text: None, json: None, hex: None };
        let outcome = hand_in(&socket, draft, io::empty(), true, false, &mut Vec::new());
        let reason = outcome.expect_err("nobody is there").to_string();
        assert!(reason.contains("no agent answers on") && reason.contains("other"), "{reason}");
    }
}
