//! A producer that outlives the agent: hands numbered messages to the control socket and says what it heard.
//!
//! Invariant: a message counts as accepted only when the agent said so; one that was under way when the agent
//! died is unknown, and is never handed in again.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use fieldpost::control::client::{self, ClientError};
use fieldpost::control::wire::{self, Question};

use crate::support::agent::publish;
use crate::tally::{Answer, payload, topic};

/// Requests sent ahead of their answers.
const AHEAD: usize = 100;
/// Messages handed in at once, at most; then comes a pause.
const BURST: usize = 40;
/// The pause, at most: about 1,000 messages a second in all.
const PAUSE_MAX_MS: u64 = 40;
/// Answers that wait to be looked at; then the producer waits too.
const HEARD_MAX: usize = 1 << 16;

/// A running producer.
#[derive(Debug)]
pub(crate) struct Producer {
    thread: JoinHandle<()>,
    orders: Arc<Orders>,
    heard: Receiver<(u64, Answer)>,
}

#[derive(Debug, Default)]
struct Orders {
    hold: AtomicBool,
    stop: AtomicBool,
    /// Nothing is under way.
    still: AtomicBool,
}

impl Producer {
    /// Hands messages in whenever an agent answers on this socket.
    pub(crate) fn start(socket: PathBuf, qos: u8) -> Producer {
        let orders = Arc::new(Orders::default());
        let (tell, heard) = sync_channel(HEARD_MAX);
        let shared = Arc::clone(&orders);
        let thread = std::thread::spawn(move || produce(&socket, qos, &shared, &tell));
        Producer { thread, orders, heard }
    }

    /// Pauses, or goes on.
    pub(crate) fn hold(&self, hold: bool) {
        self.orders.hold.store(hold, SeqCst);
    }

    /// Whether it is on hold, and has every answer it will get.
    pub(crate) fn is_still(&self) -> bool {
        self.orders.hold.load(SeqCst) && self.orders.still.load(SeqCst)
    }

    /// What was heard since the last call.
    pub(crate) fn heard(&self) -> impl Iterator<Item = (u64, Answer)> {
        self.heard.try_iter()
    }

    /// Ends it.
    pub(crate) fn stop(self) {
        self.orders.stop.store(true, SeqCst);
        // It may wait for room to tell.
        drop(self.heard);
        let _panicked = self.thread.join();
    }
}

fn produce(socket: &Path, qos: u8, orders: &Orders, tell: &SyncSender<(u64, Answer)>) {
    let mut next = 0;
    while !orders.stop.load(SeqCst) {
        // An error is the agent's end; the next one is waited for.
        let mut ahead = VecDeque::new();
        let _ended = converse(socket, qos, orders, tell, &mut next, &mut ahead);
        for n in ahead {
            let _gone = tell.send((n, Answer::Unknown));
        }
        orders.still.store(true, SeqCst);
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn converse(
    socket: &Path,
    qos: u8,
    orders: &Orders,
    tell: &SyncSender<(u64, Answer)>,
    next: &mut u64,
    ahead: &mut VecDeque<u64>,
) -> Result<(), ClientError> {
    let (mut asker, mut answers) = client::connect(socket)?;
    loop {
        // Before it is asked whether to hold: whoever says so must not find this still.
        orders.still.store(false, SeqCst);
        let hold = orders.hold.load(SeqCst);
        if !hold {
            for n in (*next..).take(fastrand::usize(1..=BURST)) {
                ahead.push_back(n);
                *next = n + 1;
                asker.ask(&Question::Publish(publish(&topic(n), qos, &payload(n))))?;
            }
            asker.flush()?;
        }
        // What was sent ahead is answered while the next burst is on its way.
        let leave = if hold { 0 } else { AHEAD - BURST };
        while ahead.len() > leave {
            let answer = match answers.hear()? {
                wire::Answer::Accepted {} => Answer::Accepted,
                _ => Answer::Refused,
            };
            let told = ahead.pop_front().map(|n| tell.send((n, answer)));
            if told.is_some_and(|told| told.is_err()) {
                return Ok(());
            }
        }
        orders.still.store(hold, SeqCst);
        if orders.stop.load(SeqCst) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(fastrand::u64(1..PAUSE_MAX_MS)));
    }
}
