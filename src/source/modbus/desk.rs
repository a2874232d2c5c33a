//! The desk of a line: takes writes one at a time, and hands back what became of each.
//!
//! Invariant (P8): a write is begun only when there is room for its outcome, and every write that was begun gets
//! exactly one. What may have been carried out is never called failed.

use std::future::pending;

use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::watch;

use super::client::Failure;
use crate::clock;
use crate::command::{Outcome, Ticket, Write, Written};
use crate::point::{Fault, Value};

/// Where writes come from, where outcomes go, and the write under way.
pub struct Desk {
    writes: mpsc::Receiver<Write>,
    written: mpsc::Sender<Written>,
    under_way: Option<UnderWay>,
    busy: watch::Sender<bool>,
    stop: watch::Receiver<bool>,
}

struct UnderWay {
    ticket: Ticket,
    room: OwnedPermit<Written>,
    /// Whether the request may have left.
    sent: bool,
}

impl Desk {
    /// A desk that takes no more writes once `stop` holds `true` or its sender is gone.
    pub fn new(
        writes: mpsc::Receiver<Write>,
        written: mpsc::Sender<Written>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Desk { writes, written, under_way: None, busy: watch::Sender::new(false), stop }
    }

    /// Whether a write is under way.
    pub fn busy(&self) -> watch::Receiver<bool> {
        self.busy.subscribe()
    }

    /// The next write; never ready once no more can come. Nothing is lost when it is dropped before it is ready.
    pub async fn take(&mut self) -> Write {
        let Ok(room) = self.written.clone().reserve_owned().await else { return pending().await };
        let Some(write) = self.writes.recv().await else { return pending().await };
        self.begin(write, room)
    }

    /// A write, if one waits.
    pub fn try_take(&mut self) -> Option<Write> {
        if *self.stop.borrow() || self.stop.has_changed().is_err() {
            return None;
        }
        self.take_waiting()
    }

    fn take_waiting(&mut self) -> Option<Write> {
        let room = self.written.clone().try_reserve_owned().ok()?;
        let write = self.writes.try_recv().ok()?;
        Some(self.begin(write, room))
    }

    fn begin(&mut self, write: Write, room: OwnedPermit<Written>) -> Write {
        self.under_way = Some(UnderWay { ticket: write.ticket, room, sent: false });
        self.busy.send_replace(true);
        write
    }

    /// The request of the write under way leaves now.
    pub fn sending(&mut self) {
        if let Some(under_way) = &mut self.under_way {
            under_way.sent = true;
        }
    }

    /// Hands back what became of the write under way.
    pub fn finish(&mut self, outcome: Outcome) {
        if let Some(UnderWay { ticket, room, .. }) = self.under_way.take() {
            room.send(Written { ticket, at: clock::now(), outcome });
        }
        self.busy.send_replace(false);
    }

    /// Ends every write: the one that was cut off, and those that wait. One for whose outcome there is no room
    /// was not begun.
    pub fn close(&mut self) {
        const STOPPING: &str = "the agent is stopping";
        match &self.under_way {
            Some(UnderWay { sent: true, .. }) => self.finish(Outcome::Unknown {
                reason: format!("{STOPPING}, and the request was sent but not answered or not read back yet"),
            }),
            Some(_) => self.finish(not_sent(STOPPING)),
            None => {}
        }
        self.writes.close();
        while self.take_waiting().is_some() {
            self.finish(not_sent(STOPPING));
        }
    }
}

/// Nothing left the gateway.
pub fn not_sent(why: impl std::fmt::Display) -> Outcome {
    Outcome::Failed { reason: format!("nothing was sent: {why}"), read_back: None }
}

/// Whether a failed write was certainly not carried out.
///
/// A unit checks function, address and value before it acts (codes 1, 2, 3; V1.1b3, 6.5, 6.6, 6.12), and says so when
/// it is too busy to begin (6). A gateway without a path has passed nothing on (0x0A). Everything else is open: 4 is
/// an error *while* acting, 5 says that it acts, 0x0B that the unit behind the gateway got the request and kept
/// silent; the other codes are not about writes.
pub fn is_certain(failure: &Failure) -> bool {
    match failure {
        Failure::Refused(code) | Failure::Silent(Fault::Exception { code }) => {
            matches!(code, 1 | 2 | 3 | 6 | 0x0A)
        }
        Failure::Wrong(_) | Failure::Silent(_) | Failure::Broken(_) => false,
    }
}

/// What became of a write that was sent: `wanted` is what its registers mean, `reply` what the unit said, and
/// `read_back` what the point held afterwards.
///
/// A point that holds what was asked for is done even when the reply was lost: the state is the one that was asked
/// for, whoever brought it about. One that holds something else without a confirmation stays unknown: the request
/// may still be on its way.
pub fn judge(wanted: &Value, reply: Result<(), Fault>, read_back: Result<Value, Fault>) -> Outcome {
    match (reply, read_back) {
        (_, Ok(found)) if found == *wanted => Outcome::Done { read_back: found },
        (Ok(()), Ok(found)) => Outcome::Failed {
            reason: format!("the unit confirmed {wanted} and reads back as {found}"),
            read_back: Some(found),
        },
        (Ok(()), Err(fault)) => {
            Outcome::Unknown { reason: format!("the unit confirmed it, but reading back failed: {fault}") }
        }
        (Err(reply), Ok(found)) => {
            Outcome::Unknown { reason: format!("sent, but {reply}; the point reads back as {found}") }
        }
        (Err(reply), Err(fault)) => {
            Outcome::Unknown { reason: format!("sent, but {reply}; reading back failed: {fault}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_confirmed_write_that_reads_back_otherwise_has_failed() {
        let (wanted, other) = (Value::Integer(7), Value::Integer(3));
        let fault = || Fault::Timeout { waited_ms: 10 };
        let done = Outcome::Done { read_back: wanted.clone() };
        assert_eq!(judge(&wanted, Ok(()), Ok(wanted.clone())), done);
        assert_eq!(judge(&wanted, Err(fault()), Ok(wanted.clone())), done);
        let failed = judge(&wanted, Ok(()), Ok(other.clone()));
        assert!(matches!(failed, Outcome::Failed { read_back: Some(found), .. } if found == other));
        for unknown in [(Ok(()), Err(fault())), (Err(fault()), Ok(other)), (Err(fault()), Err(fault()))] {
            assert!(matches!(judge(&wanted, unknown.0, unknown.1), Outcome::Unknown { .. }));
        }
    }

    #[test]
    fn an_error_while_acting_is_not_a_certain_refusal() {
        let certain = |code| is_certain(&Failure::Refused(code));
        let codes: Vec<u8> = (0..=0x10).filter(|&code| certain(code)).collect();
        assert_eq!(codes, [1, 2, 3, 6, 0x0A]);
        assert!(!is_certain(&Failure::Silent(Fault::Exception { code: 0x0B })));
        assert!(!is_certain(&Failure::Silent(Fault::Timeout { waited_ms: 1 })));
        assert!(!is_certain(&Failure::Broken("cut".to_owned())));
    }
}
