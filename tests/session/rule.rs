//! The rules of delivery, and how the box breaks each one of them, to see that it is missed.
//!
//! Almost all are broken from outside: what the session, the store or the broker hears is altered, held back or told
//! too soon. Invariant: a broken rule changes what happens, never what is judged.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use fieldpost::message::{Lane, PacketId, Qos, Seq};
use fieldpost::turn::{Begin, Change, Hold, Offer, OnSessionLoss, Resume, RowState};
use fieldpost::uplink::packet::{Packet, ReasonCode};
use fieldpost::uplink::session::{Broken, Settings};

use crate::world::{Row, World};

macro_rules! rules {
    ($($name:ident: $words:literal,)*) => {
        /// One row of the order table, or one rule.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Rule { $(#[doc = $words] $name,)* }

        impl Rule {
            /// All of them, the order table first.
            pub const ALL: &[Rule] = &[$(Rule::$name,)*];

            /// The rule in words.
            pub fn words(self) -> &'static str {
                match self { $(Rule::$name => $words,)* }
            }
        }
    };
}

rules! {
    // The order table.
    AcceptedAfterCommit: "\"accepted\" is said after the commit that holds the message",
    RowBeforePublish: "a QoS 2 message's row is on the disk before its first PUBLISH",
    Qos1ThroughTheGate: "QoS 1 goes through the same gate as QoS 2",
    PubrelAfterCommit: "PUBREL leaves after the commit of state 2",
    RecordedBeforeAcknowledged: "an inbound message is on the disk before PUBACK or PUBREC",
    ForgottenBeforePubcomp: "an inbound identifier is forgotten on the disk before PUBCOMP",
    DoneWithItsRow: "done bit and row in one transaction",
    UncertainBeforeConnect: "session_uncertain is on the disk before CONNECT",
    VerdictBeforePublish: "what CONNACK meant is on the disk before any PUBLISH",
    OwnerOfTheRows: "rows belong to one broker and go to no other",
    CleanStartForANewDatabase: "a new database asks for a clean start",
    // Gates.
    GatedByTheCommit: "whatever is gated leaves after its commit",
    AnswersOfThisConnection: "what is gated belongs to its connection",
    FailedCommitIsACrash: "a failed commit is a crash",
    VerdictIsCommitted: "the verdict is committed at all",
    // Window.
    WindowUntilPubcomp: "the window counts until PUBCOMP",
    ReceiveMaximum: "this CONNACK's Receive Maximum is obeyed",
    HeldBackFirst: "what is held back goes before new messages",
    QuietWindow: "QoS 2 in flight stays below the broker's quiet limit",
    PresenceCounts: "presence counts in the window",
    WindowAfterFreeing: "the window is computed after freeing what was acknowledged",
    OwnIdentifiers: "identifiers below 1024 are not for messages",
    // Resume.
    RowsAreResumed: "rows are resumed",
    ResumeInOrder: "resumed in the order of sending",
    SameIdentifier: "resumed with the same identifier",
    SameBytes: "resumed with the same bytes",
    OlderBeforeARow: "older QoS 1 messages go before a row",
    OnceAConnection: "sent again once a connection, never on a timer",
    DupIsSet: "DUP is set where the bytes may have left",
    PubrelsInOrder: "PUBRELs in the order of their PUBRECs",
    // Session absent.
    AbsentRequeues: "absent: rows are queued again",
    AmbiguousByPolicy: "absent: the ambiguous are treated by the policy",
    AmbiguousIsCounted: "absent: the ambiguous are counted",
    SubscribedAgain: "absent: subscribed again",
    CanaryDecides: "while uncertain, the canary decides and not \"present\"",
    // Untouchable.
    InFlightIsUntouchable: "what is in flight is not dropped",
    AbandonedKeepsItsIdentifier: "what is abandoned keeps its identifier until PUBCOMP",
    SegmentUntilDone: "PUBREC is not done: the message stays until PUBCOMP",
    // Inbound.
    OtherContentIsNew: "same identifier, other content: a new message",
    IdsForEver: "a command's own id is known for ever",
    SubscribedAtQos2: "subscribed at QoS 2",
    // Refusals.
    RefusalsWait: "0x80, 0x83, 0x93, 0x97: wait and retry",
    RefusedTopicIsHeld: "a refused message holds its topic",
    RefusalsEnd: "retried for retry_refused_for at most",
    NotAuthorizedHolds: "0x87 empties no backlog",
    NotAuthorizedHoldsTheLane: "0x87 holds the lane",
    HopelessIsBuried: "0x90, 0x95, 0x99: dead letter",
    NobodySubscribedIsSuccess: "0x10 is a success",
    NotFoundIsCounted: "PUBCOMP 0x92 is counted as ambiguous",
    // The broker's limits.
    MaximumQos: "Maximum QoS is obeyed",
    RetainAvailable: "Retain Available is obeyed",
    MaximumPacketSize: "Maximum Packet Size is obeyed",
    ServerKeepAlive: "Server Keep Alive is obeyed",
    NoOldRetained: "an old value does not overwrite a newer retained one",
    // Liveness.
    AckTimeout: "nothing acknowledged for ack_timeout: reconnect",
    SilenceIsNoticed: "nothing heard for 1.5 keep alives: reconnect",
    UnknownPubrel: "an unknown PUBREL is answered PUBCOMP",
    UnknownPubrec: "an unknown PUBREC is answered PUBREL",
    MisfitsCompleteNothing: "acknowledgements that do not fit complete nothing",
    OversizeIsSkipped: "an oversize inbound packet is skipped",
}

/// What becomes of a packet that was read.
pub enum Read {
    /// The session gets this one.
    Packet(Packet),
    /// The session gets nothing, and the broker this answer.
    Answer(Packet),
    /// The connection ends.
    Breaks,
}

/// A row and its message are given up.
pub fn dead_letter(id: u16, lane: Lane, seq: u64) -> Change {
    Change::DeadLetter { id: PacketId::new(id), lane, seq: Seq(seq), reason: 0x95 }
}

impl Rule {
    pub fn change_settings(self, settings: &mut Settings) {
        match self {
            Rule::PubrelAfterCommit => settings.broken = Some(Broken::PubrelAfterCommit),
            Rule::WindowUntilPubcomp => settings.broken = Some(Broken::WindowUntilPubcomp),
            Rule::HeldBackFirst => settings.broken = Some(Broken::HeldBackFirst),
            Rule::QuietWindow => (settings.max_in_flight, settings.qos2_window) = (200, 200),
            Rule::SubscribedAtQos2 => settings.commands[0].1 = Qos::AtLeastOnce,
            Rule::RefusalsEnd => settings.retry_refused_for_ms = u64::MAX,
            Rule::AckTimeout => settings.ack_timeout_ms = u64::MAX,
            Rule::SilenceIsNoticed => settings.keep_alive_ms = 0,
            _ => {}
        }
    }

    pub fn change_begin(self, begin: &mut Begin) {
        let rows = &mut begin.resume;
        match self {
            Rule::UncertainBeforeConnect => begin.session_uncertain = false,
            Rule::CleanStartForANewDatabase => begin.clean_start_needed = false,
            Rule::RowsAreResumed => rows.clear(),
            Rule::ResumeInOrder => rows.reverse(),
            Rule::OlderBeforeARow => rows.sort_by_key(|item| matches!(item, Resume::Older(_))),
            Rule::SameIdentifier => {
                for row in rows {
                    if let Resume::Row { id, state: RowState::Published, .. } = row {
                        *id = PacketId::new(id.get() ^ 0x4000).expect("at least 1024");
                    }
                }
            }
            Rule::SameBytes => {
                for row in rows {
                    if let Resume::Row { record: Some(record), .. } = row {
                        record.payload = [&record.payload[..], b" "].concat().into();
                    }
                }
            }
            _ => {}
        }
    }

    pub fn change_read(self, packet: Packet, rows: &BTreeMap<u16, Row>, open: &BTreeSet<u16>) -> Read {
        let retried = |reason: ReasonCode| matches!(reason.0, 0x80 | 0x83 | 0x93 | 0x97);
        let hopeless = |reason: ReasonCode| matches!(reason.0, 0x90 | 0x95 | 0x99);
        let said = |reason: ReasonCode| match self {
            Rule::RefusalsWait if retried(reason) => ReasonCode::SUCCESS,
            Rule::NotAuthorizedHolds if reason.0 == 0x87 => ReasonCode(0x90),
            Rule::HopelessIsBuried if hopeless(reason) => ReasonCode(0x80),
            Rule::NobodySubscribedIsSuccess if reason.0 == 0x10 => ReasonCode(0x80),
            _ => reason,
        };
        let misfit = self == Rule::MisfitsCompleteNothing;
        let published = |id: &PacketId| misfit && rows.get(&id.get()).is_some_and(|row| !row.received);
        Read::Packet(match packet {
            Packet::ConnAck(mut connack) => {
                let limits = &mut connack.limits;
                match self {
                    Rule::ReceiveMaximum => limits.receive_max = None,
                    Rule::MaximumQos => limits.max_qos = None,
                    Rule::RetainAvailable => limits.retain_available = None,
                    Rule::MaximumPacketSize => limits.max_packet_bytes = None,
                    Rule::ServerKeepAlive => limits.keep_alive_s = None,
                    _ => {}
                }
                Packet::ConnAck(connack)
            }
            Packet::PubAck(id, _) | Packet::PubComp(id, _) if published(&id) => {
                Packet::PubRec(id, ReasonCode::SUCCESS)
            }
            Packet::PubAck(id, reason) if id.get() > 1023 => Packet::PubAck(id, said(reason)),
            Packet::PubRec(id, reason) if id.get() > 1023 => Packet::PubRec(id, said(reason)),
            Packet::PubComp(id, _) if self == Rule::NotFoundIsCounted => {
                Packet::PubComp(id, ReasonCode::SUCCESS)
            }
            Packet::Publish(publish)
                if self == Rule::OtherContentIsNew
                    && publish.id.is_some_and(|id| open.contains(&id.get())) =>
            {
                let id = publish.id.expect("just looked at");
                return match publish.qos {
                    Qos::ExactlyOnce => Read::Answer(Packet::PubRec(id, ReasonCode::SUCCESS)),
                    _ => Read::Packet(Packet::Publish(publish)),
                };
            }
            Packet::Oversize { .. } if self == Rule::OversizeIsSkipped => return Read::Breaks,
            packet => packet,
        })
    }

    pub fn change_commit(self, list: &mut Vec<Change>, rows: &BTreeMap<u16, Row>) {
        let row = |id: &PacketId| rows.get(&id.get()).map(|row| (row.lane, row.seq));
        let other = |policy: OnSessionLoss| match policy {
            OnSessionLoss::Republish => OnSessionLoss::Drop,
            OnSessionLoss::Drop => OnSessionLoss::Republish,
        };
        if self == Rule::VerdictIsCommitted {
            list.retain(|change| !World::is_verdict(change));
        }
        let mut more = Vec::new();
        for change in list.iter_mut() {
            match (self, &mut *change) {
                (Rule::AbsentRequeues, Change::SessionAbsent(_)) => *change = Change::SessionPresent,
                (
                    Rule::AmbiguousByPolicy,
                    Change::SessionAbsent(policy) | Change::SessionReplaced(policy),
                ) => *policy = other(*policy),
                (Rule::RefusedTopicIsHeld, Change::Refused { hold: Hold::Topic, hold_ms, .. }) => {
                    *hold_ms = 0;
                }
                (Rule::NotAuthorizedHoldsTheLane, Change::Refused { hold, .. }) => *hold = Hold::Topic,
                (Rule::AbandonedKeepsItsIdentifier, Change::Abandoned(id)) => {
                    if let Some((lane, seq)) = row(id) {
                        *change = dead_letter(id.get(), lane, seq);
                    }
                }
                (Rule::SegmentUntilDone, Change::Received(id)) => {
                    let done = row(id).map(|(lane, seq)| Change::Acknowledged { lane, seq: Seq(seq) });
                    more.extend(done);
                }
                _ => {}
            }
        }
        list.extend(more);
    }

    /// The session hears that these changes are committed before they are.
    pub fn tells_early(self, changes: &[Change]) -> bool {
        let early = |change: &Change| match self {
            Rule::GatedByTheCommit => true,
            Rule::RecordedBeforeAcknowledged => {
                matches!(change, Change::Inbound { .. } | Change::InboundOpened { .. })
            }
            Rule::ForgottenBeforePubcomp => matches!(change, Change::InboundReleased(_)),
            Rule::VerdictBeforePublish => World::is_verdict(change),
            _ => false,
        };
        // Nothing else may be told early with it.
        !changes.is_empty() && changes.iter().all(early)
    }

    pub fn change_offer(self, offer: &mut Option<Offer>, changes: &mut [Change]) {
        let Some(made) = offer else { return };
        match self {
            Rule::OwnIdentifiers => {
                for id in &mut made.ids {
                    *id = PacketId::new(id.get() % 1024 + 1).expect("at least 1");
                }
            }
            Rule::WindowAfterFreeing => {
                let frees = |c: &&Change| matches!(c, Change::Completed(_) | Change::Acknowledged { .. });
                let freed = changes.iter().filter(frees).count();
                made.ids.truncate(made.ids.len().saturating_sub(freed));
                if made.ids.is_empty() {
                    *offer = None;
                }
            }
            _ => {}
        }
    }

    pub fn change_sent(
        self,
        packets: &mut Vec<Packet>,
        connections: u64,
        rows: &BTreeMap<u16, Row>,
        retained: impl Fn(&Bytes) -> bool,
    ) {
        let unknown = |packet: &Packet| match packet {
            Packet::PubComp(_, reason) => self == Rule::UnknownPubrel && reason.is_error(),
            Packet::PubRel(_, reason) if reason.is_error() => self == Rule::UnknownPubrec,
            Packet::PubRel(id, _) => {
                let left = rows.get(&id.get()).is_some_and(|row| row.left);
                self == Rule::AbandonedKeepsItsIdentifier && left
            }
            _ => false,
        };
        packets.retain(|packet| !unknown(packet));
        if self == Rule::PubrelsInOrder {
            packets
                .chunk_by_mut(|a, b| matches!((a, b), (Packet::PubRel(..), Packet::PubRel(..))))
                .for_each(|pubrels| pubrels.reverse());
        }
        for packet in packets {
            match (self, packet) {
                (Rule::DupIsSet, Packet::Publish(publish)) => publish.dup = false,
                (Rule::NoOldRetained, Packet::Publish(publish)) => {
                    publish.retain |= retained(&publish.payload);
                }
                (Rule::SubscribedAgain, Packet::Subscribe(_, filters)) if connections > 1 => {
                    filters.iter_mut().filter(|s| s.filter == "cmd/#").for_each(|s| s.filter = "no/#".into());
                }
                _ => {}
            }
        }
    }
}
