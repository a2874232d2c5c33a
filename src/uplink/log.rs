//! What the uplink says in the log, and how often.
//!
//! Invariant: what can repeat goes through a [`Trouble`] of its own, so that no outage, however long, and no broker,
//! however odd, fills the log.

use std::collections::BTreeMap;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::session::Counted;
use crate::trouble::{More, Trouble, counted, span};

/// Different sentences that are counted each by itself; more of them share one.
const SENTENCES_MAX: usize = 64;

/// What was said, and when.
pub(super) struct Log {
    started: Instant,
    /// There is no connection.
    outage: Trouble,
    others: BTreeMap<String, Trouble>,
}

impl Log {
    pub(super) fn new() -> Self {
        Log { started: Instant::now(), outage: Trouble::default(), others: BTreeMap::new() }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A connection or an attempt has ended.
    pub(super) fn failed(&mut self, broker: &str, reason: &str, was_connected: bool) {
        let what = match was_connected {
            true => "the connection to the broker ended",
            false => "no connection to the broker",
        };
        let now_ms = self.now_ms();
        match self.outage.happened(reason, now_ms) {
            Some(more) => warn!(broker, reason, "{what}{more}"),
            None => debug!(broker, reason, "{what}"),
        }
    }

    /// Messages may flow.
    pub(super) fn connected(&mut self, broker: &str, session_present: bool) {
        let (now_ms, was_on) = (self.now_ms(), self.outage.is_on());
        let what = "connected to the broker";
        if let Some(ended) = self.outage.ended(now_ms) {
            let (after, failures) = (span(ended.lasted_ms), counted(ended.times, "failure"));
            info!(broker, session_present, "{what} again after {after}, {failures}");
        } else if let Some(more) = self.say(what).filter(|_| !was_on) {
            info!(broker, session_present, "{what}{more}");
        } else {
            debug!(broker, session_present, "{what}");
        }
    }

    /// Something is not as it should be.
    pub(super) fn warn(&mut self, words: &str) {
        match self.say(words) {
            Some(more) => warn!("{words}{more}"),
            None => debug!("{words}"),
        }
    }

    /// Something has changed.
    pub(super) fn info(&mut self, words: &str) {
        match self.say(words) {
            Some(more) => info!("{words}{more}"),
            None => debug!("{words}"),
        }
    }

    /// The session has counted something.
    pub(super) fn counted(&mut self, what: Counted, n: u64) {
        let words = match what {
            Counted::RefusedForNow => {
                "the broker refuses messages for now: their topics wait, and they are tried again"
            }
            Counted::DeadLettered => {
                "the broker will never take some messages: `fieldpost queue ls --dead` shows them and why"
            }
            Counted::InboundRefused => {
                "messages to this gateway were refused: they are too large, or too many commands wait"
            }
            Counted::SessionsLost => "the broker has lost the session; what was in flight is sent again",
            Counted::PossiblyDoubled => {
                "messages may have reached the broker twice: it lost what it knew of them"
            }
            Counted::AcksUnexpected => "the broker acknowledges what is not in flight",
            _ => return,
        };
        let now_ms = self.now_ms();
        if let Some(more) = self.trouble(words).happened_times(words, n, now_ms) {
            warn!("{words}{more}");
        }
    }

    fn say(&mut self, words: &str) -> Option<More> {
        let now_ms = self.now_ms();
        self.trouble(words).happened(words, now_ms)
    }

    fn trouble(&mut self, words: &str) -> &mut Trouble {
        let is_known = self.others.len() < SENTENCES_MAX || self.others.contains_key(words);
        self.others.entry(if is_known { words.to_owned() } else { String::new() }).or_default()
    }
}
