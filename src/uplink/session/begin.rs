//! How a connection begins: what CONNACK means, whose session it is, the canary, SUBSCRIBE; up to "running".
//!
//! Invariant: until what CONNACK meant is committed, nothing leaves but the canary, SUBSCRIBE and our presence.

use std::collections::HashSet;

use super::outbound::is_hopeless;
use super::outbound::next_after;
use super::outbound::publish;
use super::{Counted, Event, Flight, Left, Own, OwnMessage, Phase, Session, SessionError, Stage, Todo};
use crate::message::{PacketId, Qos, Topic};
use crate::turn::{Change, Resume, RowState};
use crate::uplink::packet::{ConnAck, Packet, Protocol, ReasonCode, Subscription};

impl Session {
    /// What is in flight, in the order of sending: rows, QoS 1 messages of the last connection, and older
    /// QoS 1 messages found after a crash.
    pub(super) fn plan_resume(
        &mut self,
        resume: Vec<Resume>,
        unacked: Vec<Flight>,
        may_have_left: Option<&HashSet<PacketId>>,
    ) {
        let mut unacked = unacked.into_iter().peekable();
        let mut older = Vec::new();
        for item in resume {
            match item {
                Resume::Older(record) => older.push(record),
                Resume::Row { id, state, send_no, record, lane, seq } => {
                    // With the same place: what an earlier connection found before this row, older still.
                    while let Some(flight) = unacked.next_if(|flight| flight.send_no <= send_no) {
                        self.plan(flight);
                    }
                    self.todo.extend(older.drain(..).map(|record| Todo::Older(record, send_no)));
                    let left = match may_have_left.map(|ids| ids.contains(&id)) {
                        Some(false) => Left::No,
                        Some(true) => Left::Yes,
                        None => Left::Unknown,
                    };
                    let stage = match state {
                        RowState::Published => Stage::AwaitPubrec,
                        RowState::Received => Stage::AwaitPubcomp,
                        RowState::Abandoned => Stage::Abandoned,
                        RowState::Moved => Stage::Moved,
                    };
                    self.plan(Flight {
                        id,
                        lane,
                        seq,
                        send_no,
                        qos: Qos::ExactlyOnce,
                        stage,
                        record,
                        left,
                        sent: false,
                        released: false,
                    });
                }
            }
        }
        for flight in unacked {
            self.plan(flight);
        }
        self.todo.extend(older.into_iter().map(|record| Todo::Older(record, u64::MAX)));
    }

    fn plan(&mut self, flight: Flight) {
        self.todo.push_back(Todo::Flight(flight.id));
        self.next_id = next_after(flight.id);
        self.flights.insert(flight.id, flight);
    }

    /// CONNACK arrived.
    ///
    /// # Errors
    /// The refusal, or a session that should not be there.
    pub fn on_connack(&mut self, connack: &ConnAck, now_ms: u64) -> Result<(), SessionError> {
        self.heard(now_ms);
        if self.phase != Phase::Connack {
            return Err(SessionError::Protocol("a second CONNACK".into()));
        }
        if connack.reason != ReasonCode::SUCCESS {
            let (reason, said) = (connack.reason, connack.reason_string.clone());
            return Err(SessionError::Refused { reason, said });
        }
        if connack.limits.receive_max == Some(0) || connack.limits.max_packet_bytes == Some(0) {
            return Err(SessionError::Protocol("CONNACK with a limit of zero".into()));
        }
        self.limits = connack.limits.within(self.settings.limits);
        if let Some(seconds) = connack.limits.keep_alive_s {
            self.settings.keep_alive_ms = u64::from(seconds) * 1000;
        }
        match (connack.session_present, self.clean_start) {
            (true, true) => Err(SessionError::NotClean),
            (present, _) if self.are_rows_void() => {
                self.forget();
                self.settle(Change::RowsVoid(self.settings.on_session_loss), present);
                Ok(())
            }
            (false, _) => {
                self.settle_absent();
                Ok(())
            }
            (true, false) if self.uncertain && self.canary_proven => {
                self.phase = Phase::Judging { heard_ms: None, refused: None };
                self.ask_canary(self.canary_qos(), now_ms);
                Ok(())
            }
            (true, false) => {
                if self.uncertain {
                    self.believe();
                }
                self.settle(Change::SessionPresent, true);
                Ok(())
            }
        }
    }

    /// A broker that keeps no session, or does no QoS 2, holds none of our identifiers: a PUBREL would tell it
    /// nothing, or cost the connection.
    fn are_rows_void(&self) -> bool {
        let no_qos2 = self.settings.limits.max_qos.is_some_and(|qos| qos < Qos::ExactlyOnce.number());
        let qos2 = self.flights.values().any(|flight| flight.qos == Qos::ExactlyOnce);
        self.settings.clean_start || (no_qos2 && (qos2 || !self.rx_open.is_empty()))
    }

    /// A broker that counts what it holds from the last connection may have no place left for a QoS 1 canary; and on
    /// 3.1.1 it cannot say so. At QoS 0 it needs none.
    fn canary_qos(&self) -> Qos {
        match self.settings.protocol {
            Protocol::V311 if self.window().min(self.settings.qos2_window) < 2 => Qos::AtMostOnce,
            _ => Qos::AtLeastOnce,
        }
    }

    /// Publishes the canary, to be judged by its echo. At QoS 0 PINGRESP stands for the PUBACK: a broker answers in
    /// the order in which it reads.
    fn ask_canary(&mut self, qos: Qos, now_ms: u64) {
        let canary = self.canary();
        match qos.min(self.max_qos()) {
            Qos::AtMostOnce => {
                let packet = publish(canary.topic, canary.payload, Qos::AtMostOnce, false, None, None);
                self.send(Packet::Publish(Box::new(packet)));
                self.ping_ms = Some(now_ms);
                self.send(Packet::PingReq);
            }
            _ => self.publish_own(canary, now_ms),
        }
    }

    fn settle_absent(&mut self) {
        if !self.clean_start {
            self.count(Counted::SessionsLost, 1);
        }
        self.forget();
        self.settle(Change::SessionAbsent(self.settings.on_session_loss), false);
    }

    /// The canary's echo did not come: "present" was said of a new session.
    ///
    /// Silence is weaker than a word. Were it the old session after all, it would hold identifiers that we give
    /// to other messages one day, and those would be lost. So nothing is published in it: it is discarded.
    pub(super) fn replace(&mut self) {
        self.count(Counted::SessionsLost, 1);
        self.forget();
        self.phase = Phase::Replacing;
        self.phase_in_pending = true;
        self.pending.push(Change::SessionReplaced(self.settings.on_session_loss));
    }

    fn forget(&mut self) {
        self.flights.clear();
        self.todo.clear();
        self.rx_open.clear();
        self.in_flight = self.own.values().filter(|own| !matches!(own, Own::Subscribe(_))).count();
        self.qos2_in_flight = 0;
        self.canary_proven = false;
    }

    /// No canary can tell: the broker is believed, and what that may cost is counted.
    fn believe(&mut self) {
        let rows = self.flights.values().filter(|flight| flight.qos == Qos::ExactlyOnce).count();
        self.count(Counted::Ambiguous, rows as u64);
    }

    fn settle(&mut self, change: Change, present: bool) {
        self.phase = Phase::Settling { present };
        self.phase_in_pending = true;
        self.pending.push(change);
    }

    fn canary(&self) -> OwnMessage {
        let (topic, payload) = (self.settings.canary.clone(), self.nonce.clone());
        OwnMessage { topic, payload, retain: false, own: Own::Canary }
    }

    pub(super) fn on_pingresp(&mut self, now_ms: u64) {
        if let Some(sent_ms) = self.ping_ms.take() {
            self.round_trip_ms = Some(now_ms.saturating_sub(sent_ms));
        }
        let canary_is_out = self.own.values().any(|own| *own == Own::Canary);
        if let Phase::Judging { heard_ms: heard_ms @ None, .. } = &mut self.phase
            && !canary_is_out
        {
            *heard_ms = Some(now_ms);
        }
    }

    /// A canary that was not published proves nothing by its silence.
    pub(super) fn canary_refused(&mut self, reason: ReasonCode, now_ms: u64) {
        if reason == ReasonCode::NOT_AUTHORIZED || is_hopeless(reason) {
            self.believe();
            self.canary_proven = false;
            self.settle(Change::SessionPresent, true);
            self.pending.push(Change::Canary { proven: false });
        } else if matches!(reason, ReasonCode::RECEIVE_MAXIMUM_EXCEEDED | ReasonCode::QUOTA_EXCEEDED) {
            // What the broker holds of us may fill its window, and only what is resumed after the verdict frees it.
            self.phase = Phase::Judging { heard_ms: None, refused: Some(reason) };
            self.ask_canary(Qos::AtMostOnce, now_ms);
        } else {
            self.end = Some(SessionError::CanaryRefused(reason));
        }
    }

    /// The broker had the canary, and no echo came.
    pub(super) fn canary_is_silent(&mut self, refused: Option<ReasonCode>) {
        match refused {
            Some(reason) => self.end = Some(SessionError::CanaryRefused(reason)),
            None => self.replace(),
        }
    }

    /// The canary's echo: the subscription is alive in this session.
    pub(super) fn on_echo(&mut self) {
        match self.phase {
            Phase::Judging { .. } => self.settle(Change::SessionPresent, true),
            Phase::Testing { .. } => {
                self.canary_proven = true;
                self.phase = Phase::Proving;
                self.phase_in_pending = true;
                self.pending.push(Change::Canary { proven: true });
            }
            _ => {}
        }
    }

    pub(super) fn subscribe(&mut self, now_ms: u64) {
        let own =
            |topic: &Topic| Subscription { filter: topic.to_string(), qos: Qos::AtLeastOnce, retained: true };
        let mut filters = Vec::new();
        if self.is_canary_of_use() {
            // A broker may drop what it sends at QoS 0, and silence would be taken for a new session.
            filters.push(own(&self.settings.canary));
        }
        filters.push(own(&self.settings.presence));
        // A command is meant for now, not for whoever subscribes one day.
        let command = |(filter, qos): &(String, Qos)| Subscription {
            filter: filter.clone(),
            qos: *qos,
            retained: false,
        };
        filters.extend(self.settings.commands.iter().map(command));
        // Some brokers that do no QoS 2 grant less, others close the connection.
        let max_qos = self.max_qos();
        filters.iter_mut().for_each(|filter| filter.qos = max_qos.min(filter.qos));
        self.phase = Phase::Subscribing;
        self.last_progress_ms = now_ms;
        if let Some(id) = self.own_id(Own::Subscribe(filters.clone())) {
            self.send(Packet::Subscribe(id, filters));
        }
    }

    pub(super) fn on_suback(
        &mut self,
        id: PacketId,
        reasons: &[ReasonCode],
        now_ms: u64,
    ) -> Result<(), SessionError> {
        let Some(Own::Subscribe(filters)) = self.own.get(&id).cloned() else {
            self.count(Counted::AcksUnexpected, 1);
            return Ok(());
        };
        if reasons.len() != filters.len() {
            let (sent, got) = (filters.len(), reasons.len());
            return Err(SessionError::Protocol(format!("SUBACK with {got} reason codes for {sent} filters")));
        }
        self.own.remove(&id);
        self.last_progress_ms = now_ms;
        let mut canary_granted = None;
        for (Subscription { filter, qos: asked, .. }, reason) in filters.into_iter().zip(reasons) {
            if filter == self.settings.canary.as_str() {
                canary_granted = Some(!reason.is_error());
            }
            let granted = Qos::from_number(u64::from(reason.0));
            if granted.is_none_or(|granted| granted < asked) {
                self.events.push(Event::Downgraded { filter, asked, granted });
            }
        }
        if canary_granted == Some(false) && self.canary_proven {
            self.canary_proven = false;
            self.phase = Phase::Proving;
            self.phase_in_pending = true;
            self.pending.push(Change::Canary { proven: false });
        } else if canary_granted == Some(true) && !self.canary_proven && !self.is_window_held() {
            self.phase = Phase::Testing { since_ms: now_ms, heard_ms: None };
            // Presence may have taken all the room that Receive Maximum leaves.
            let canary = self.canary();
            self.own_waiting.push_front(canary);
            self.pump_own(now_ms);
        } else {
            self.run(now_ms);
        }
        Ok(())
    }

    /// Where no row is ever resumed, nothing has to be proven.
    fn is_canary_of_use(&self) -> bool {
        !self.settings.clean_start && self.max_qos() == Qos::ExactlyOnce
    }

    /// What is to be resumed takes all the room: another connection must try the canary out.
    fn is_window_held(&self) -> bool {
        self.flights.values().filter(|flight| flight.qos == Qos::ExactlyOnce).count()
            >= usize::from(self.window())
    }

    pub(super) fn run(&mut self, now_ms: u64) {
        self.phase = Phase::Running;
        self.events.push(Event::Running);
        self.pump(now_ms);
    }
}

/// Whether a topic filter matches a topic name (MQTT 5.0 section 4.7).
pub(super) fn filter_matches(filter: &str, topic: &str) -> bool {
    let mut levels = topic.split('/');
    for part in filter.split('/') {
        match (part, levels.next()) {
            ("#", _) => return true,
            ("+", Some(_)) => {}
            (part, Some(level)) if part == level => {}
            _ => return false,
        }
    }
    levels.next().is_none()
}
