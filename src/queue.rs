//! Between what the control socket says about the queue and what the store understands.
//!
//! Used by the agent, and by the command line where no agent is running: both show the same. Pure.

use crate::control::wire::{self, Answer, QueueAsk, to_hex};
use crate::message::{Lane, Seq};
use crate::policy::format::rfc3339;
use crate::store::browse::{Ask, DeadLetter, Found, State, Waiting};

/// What is asked of the store.
///
/// # Errors
/// Why it cannot be, in words.
pub fn ask(ask: &QueueAsk) -> Result<Ask, String> {
    let lane = |name: &str| {
        Lane::from_name(name)
            .ok_or_else(|| format!("there is no lane {name:?}; there are alarm, normal and bulk"))
    };
    Ok(match ask {
        QueueAsk::Messages { lane: name, from, limit, payloads } => {
            Ask::Messages { lane: lane(name)?, from: Seq(*from), limit: *limit, payloads: *payloads }
        }
        QueueAsk::DeadLetters { after, limit } => Ask::DeadLetters { after: *after, limit: *limit },
        QueueAsk::Requeue { number } => Ask::Requeue(*number),
        QueueAsk::PurgeLane { lane: name, below } => {
            Ask::PurgeLane { lane: lane(name)?, below: below.map(Seq) }
        }
        QueueAsk::PurgeDead {} => Ask::PurgeDead,
    })
}

/// What the store found, as it is told.
pub fn answer(found: Found) -> Answer {
    match found {
        Found::Messages { messages, next } => Answer::Messages {
            messages: messages.into_iter().map(message).collect(),
            next: next.map(|seq| seq.0),
        },
        Found::DeadLetters(letters) => {
            Answer::DeadLetters { letters: letters.into_iter().map(dead_letter).collect() }
        }
        Found::Changed { count, below } => Answer::Changed { count, below },
        Found::Refused(reason) => Answer::Refused { reason },
    }
}

fn message(waiting: Waiting) -> wire::QueuedMessage {
    let mut message = wire::QueuedMessage {
        lane: waiting.lane.name().into(),
        seq: waiting.seq.0,
        epoch: waiting.epoch,
        state: match waiting.state {
            State::Waiting => "waiting",
            State::InFlight => "in flight",
            State::Held => "held",
        }
        .into(),
        accepted: rfc3339(waiting.accepted_ms),
        damaged: waiting.content.is_none(),
        ..wire::QueuedMessage::default()
    };
    if let Some(content) = waiting.content {
        message.topic = Some(content.topic.as_str().to_owned());
        message.qos = Some(content.qos.number());
        message.retain = Some(content.retain);
        message.bytes = Some(content.bytes);
        message.at = Some(rfc3339(content.at_ms));
        message.expires_after_s = content.expires_after_s;
        if let Some(payload) = content.payload {
            match String::from_utf8(payload.to_vec()) {
                Ok(text) => message.text = Some(text),
                Err(_) => message.hex = Some(to_hex(&payload)),
            }
        }
    }
    message
}

fn dead_letter(letter: DeadLetter) -> wire::DeadLetter {
    wire::DeadLetter {
        number: letter.number,
        lane: letter.lane.name().into(),
        seq: letter.seq.0,
        epoch: letter.epoch,
        reason: letter.reason,
        died: rfc3339(letter.dead_ms),
        topic: letter.topic,
        qos: letter.qos,
        retain: letter.retain,
        bytes: letter.bytes,
    }
}
