//! What we say about ourselves: Will, online and offline, health, unit states. Pure.
//!
//! Under the base topic: `state` (retained presence), `health`, `unit/{line}/{unit}` (retained), `gap`, `alarm`,
//! `clock`.
//!
//! Invariant: while we are connected, the retained presence says so. We listen to it ourselves, because a Will
//! can arrive late, after a takeover, and because whoever else speaks there under our name is the only witness
//! that our database is a copy of the past, or that there is a second one of us.

use bytes::Bytes;

use crate::clock::Stamp;
use crate::message::{Qos, Topic, TopicError};
use crate::policy::format::{self, Health, HeardPresence, Speaker};
use crate::uplink::packet::Will;

/// Something to publish that does not pass through the outbox: only the newest is worth sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Where.
    pub topic: Topic,
    /// What.
    pub payload: Bytes,
    /// At which quality of service.
    pub qos: Qos,
    /// Whether the broker keeps it.
    pub retain: bool,
}

/// What follows from a message on our own presence topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// The broker now says that we are offline: publish [`Presence::online`] again.
    AnnounceAgain,
    /// Somebody has counted at least as far as our database, under our name, before this start: the database
    /// is a copy of the past. It needs an epoch and a boot counter above these, and a clean start.
    CopyOfThePast {
        /// The boot counter that was heard.
        boot: u64,
        /// The epoch that was heard, if it was told.
        epoch: Option<u32>,
    },
    /// Another agent with our name is running: alarm, long back-off, QoS 2 held.
    InUseElsewhere {
        /// Its boot counter.
        boot: u64,
        /// Its instance.
        instance: u64,
    },
}

/// How far this connection's presence has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has been said on this connection.
    Silent,
    /// `online` was handed to the session.
    Announced,
    /// Our own `online` came back: a topic keeps its order, so what follows was published after it.
    Echoed,
    /// The planned `offline` was handed to the session.
    Stopped,
}

/// Who we are to the broker, and where we say it.
#[derive(Debug, Clone)]
pub struct Presence {
    speaker: Speaker,
    base: Topic,
    state: Topic,
    health: Topic,
    gap: Topic,
    alarm: Topic,
    clock: Topic,
    stage: Stage,
    /// Until we have spoken ourselves, what is heard was said before this start of ours.
    past_still_speaks: bool,
}

impl Presence {
    /// Presence under `base`, for this start of the agent.
    ///
    /// # Errors
    /// The base topic is so long that there is no room for what comes below it.
    pub fn new(base: &Topic, speaker: Speaker) -> Result<Self, TopicError> {
        Ok(Presence {
            speaker,
            base: base.clone(),
            state: Topic::new(&format!("{base}/state"))?,
            health: Topic::new(&format!("{base}/health"))?,
            gap: Topic::new(&format!("{base}/gap"))?,
            alarm: Topic::new(&format!("{base}/alarm"))?,
            clock: Topic::new(&format!("{base}/clock"))?,
            stage: Stage::Silent,
            past_still_speaks: true,
        })
    }

    /// This start's number, once the store has told it; who was heard before has no say any more.
    pub fn set_boot(&mut self, boot: u64) {
        self.speaker.boot = boot;
    }

    /// The presence topic: subscribe to it at QoS 1, without No Local, so that our own words come back.
    pub fn topic(&self) -> &Topic {
        &self.state
    }

    /// Where gap records go.
    pub fn gap_topic(&self) -> &Topic {
        &self.gap
    }

    /// Where alarms about the gateway itself go.
    pub fn alarm_topic(&self) -> &Topic {
        &self.alarm
    }

    /// Where corrections of the clock go.
    pub fn clock_topic(&self) -> &Topic {
        &self.clock
    }

    /// The Will for CONNECT: retained `offline`, reason `lost`.
    pub fn will(&self) -> Will {
        let payload = format::lost(&self.speaker).into();
        Will { topic: self.state.clone(), payload, qos: Qos::AtLeastOnce, retain: true }
    }

    /// CONNACK with success: whatever was said before was on another connection.
    pub fn on_connected(&mut self) {
        if self.stage != Stage::Silent {
            self.past_still_speaks = false;
        }
        self.stage = Stage::Silent;
    }

    /// Retained `online`, to be published after CONNACK and before any backlog; `queued` messages wait.
    pub fn online(&mut self, epoch: u32, queued: u64, at: Stamp) -> Announcement {
        self.stage = Stage::Announced;
        self.retained(&self.state, format::online(&self.speaker, epoch, queued, at))
    }

    /// Retained `offline`, reason `stopped`, to be published before a planned DISCONNECT, which makes the
    /// broker discard the Will (MQTT-3.14.4-3).
    pub fn stopped(&mut self, at: Stamp) -> Announcement {
        self.stage = Stage::Stopped;
        self.retained(&self.state, format::stopped(&self.speaker, at))
    }

    /// The health message. Sent at QoS 0: the next one replaces it.
    pub fn health(&self, health: &Health<'_>) -> Announcement {
        let payload = format::health(&self.speaker, health).into();
        Announcement { topic: self.health.clone(), payload, qos: Qos::AtMostOnce, retain: true }
    }

    /// The retained state of one unit; `fault` is what its last poll failed with.
    ///
    /// # Errors
    /// The names do not fit into a topic.
    pub fn unit(
        &self,
        line: &str,
        unit: &str,
        fault: Option<&str>,
        at: Stamp,
    ) -> Result<Announcement, TopicError> {
        let topic = self.unit_topic(line, unit)?;
        Ok(self.retained(&topic, format::unit_state(&self.speaker.gateway, line, unit, fault, at)))
    }

    /// Every topic on which the broker keeps something of ours, with these units, by line and name.
    pub fn kept_topics<'a>(&self, units: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<Topic> {
        let units = units.filter_map(|(line, unit)| self.unit_topic(line, unit).ok());
        [self.state.clone(), self.health.clone()].into_iter().chain(units).collect()
    }

    /// A zero-length retained message, which removes what the broker keeps on that topic (MQTT-3.3.1-6).
    pub fn cleared(topic: &Topic) -> Announcement {
        Announcement { topic: topic.clone(), payload: Bytes::new(), qos: Qos::AtLeastOnce, retain: true }
    }

    fn unit_topic(&self, line: &str, unit: &str) -> Result<Topic, TopicError> {
        if line.contains('/') || unit.contains('/') {
            return Err(TopicError::Character('/'));
        }
        Topic::new(&format!("{}/unit/{line}/{unit}", self.base))
    }

    /// What to do about a PUBLISH from the broker, which may hold anything. For any topic but the presence
    /// topic, and for any payload that this program would not have written, nothing.
    pub fn heard(&mut self, topic: &Topic, payload: &[u8]) -> Heard {
        if *topic != self.state || self.stage == Stage::Stopped {
            return Heard::Nothing;
        }
        match format::read_presence(payload) {
            Some(heard) if heard.gateway == self.speaker.gateway => self.judge(&heard),
            Some(_) | None => Heard::Nothing,
        }
    }

    fn judge(&mut self, heard: &HeardPresence) -> Heard {
        let ours = heard.instance == self.speaker.instance && heard.boot == self.speaker.boot;
        let spoken = matches!(self.stage, Stage::Announced | Stage::Echoed);
        if ours && heard.online {
            if self.stage == Stage::Announced {
                self.stage = Stage::Echoed;
                self.past_still_speaks = false;
            }
            return Heard::Nothing;
        }
        let HeardPresence { boot, instance, epoch, .. } = *heard;
        if !ours && boot >= self.speaker.boot {
            return match self.past_still_speaks {
                true => Heard::CopyOfThePast { boot, epoch },
                false => Heard::InUseElsewhere { boot, instance },
            };
        }
        match heard.online {
            // A predecessor of ours may still sit in the session's queue, but not behind our own word.
            true if self.stage == Stage::Echoed => Heard::InUseElsewhere { boot, instance },
            // A Will of ours, or of an earlier start, that came late.
            false if spoken => Heard::AnnounceAgain,
            true | false => Heard::Nothing,
        }
    }

    fn retained(&self, topic: &Topic, payload: String) -> Announcement {
        Announcement { topic: topic.clone(), payload: payload.into(), qos: Qos::AtLeastOnce, retain: true }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AT: Stamp = Stamp { wall_ms: 1_795_255_200_123, mono_ms: 5_000, synchronised: true };

    fn speaker(boot: u64, instance: u64) -> Speaker {
        Speaker { gateway: "g1".into(), version: "0.1.0".into(), boot, instance }
    }

    fn presence() -> Presence {
        let base = Topic::new("fieldpost/g1").expect("a topic");
        Presence::new(&base, speaker(7, 0xa)).expect("short enough")
    }

    fn online(boot: u64, instance: u64) -> String {
        format::online(&speaker(boot, instance), 3, 0, AT)
    }

    fn lost(boot: u64, instance: u64) -> String {
        format::lost(&speaker(boot, instance))
    }

    /// What has happened before something is heard.
    #[derive(Debug, Clone, Copy)]
    enum Before {
        FirstConnected,
        FirstAnnounced,
        FirstEchoed,
        AgainConnected,
        AgainAnnounced,
        AgainEchoed,
        Stopped,
    }

    fn after(before: Before) -> Presence {
        let mut presence = presence();
        let topic = presence.topic().clone();
        let announce = |presence: &mut Presence| presence.online(3, 0, AT);
        let echo = |presence: &mut Presence| {
            let own = announce(presence);
            assert_eq!(presence.heard(&topic, &own.payload), Heard::Nothing);
        };
        presence.on_connected();
        if matches!(before, Before::AgainConnected | Before::AgainAnnounced | Before::AgainEchoed) {
            announce(&mut presence);
            presence.on_connected();
        }
        match before {
            Before::FirstConnected | Before::AgainConnected => {}
            Before::FirstAnnounced | Before::AgainAnnounced => drop(announce(&mut presence)),
            Before::FirstEchoed | Before::AgainEchoed => echo(&mut presence),
            Before::Stopped => {
                echo(&mut presence);
                presence.stopped(AT);
            }
        }
        presence
    }

    #[test]
    fn what_is_heard_decides_what_is_done() {
        use Before::*;
        let copy = |boot, epoch| Heard::CopyOfThePast { boot, epoch };
        let elsewhere = |boot, instance| Heard::InUseElsewhere { boot, instance };
        let own = || online(7, 0xa);
        for (before, payload, expected) in [
            // Read back at the start: our own past is no news, a future of ours is.
            (FirstConnected, online(6, 0xb), Heard::Nothing),
            (FirstConnected, lost(6, 0xb), Heard::Nothing),
            (FirstConnected, online(8, 0xb), copy(8, Some(3))),
            (FirstConnected, lost(8, 0xb), copy(8, None)),
            (FirstConnected, online(7, 0xb), copy(7, Some(3))),
            (FirstAnnounced, online(8, 0xb), copy(8, Some(3))),
            // A late Will is corrected, whichever connection or start of ours it belongs to.
            (FirstAnnounced, lost(7, 0xa), Heard::AnnounceAgain),
            (FirstAnnounced, lost(6, 0xb), Heard::AnnounceAgain),
            (FirstEchoed, lost(7, 0xa), Heard::AnnounceAgain),
            (FirstEchoed, lost(3, 0xb), Heard::AnnounceAgain),
            (AgainAnnounced, lost(7, 0xa), Heard::AnnounceAgain),
            (AgainConnected, lost(7, 0xa), Heard::Nothing),
            // Our own words.
            (FirstConnected, own(), Heard::Nothing),
            (FirstEchoed, own(), Heard::Nothing),
            (AgainEchoed, own(), Heard::Nothing),
            // A predecessor may still be queued for us before our own word, but not after it.
            (FirstAnnounced, online(6, 0xb), Heard::Nothing),
            (AgainAnnounced, online(6, 0xb), Heard::Nothing),
            (FirstEchoed, online(6, 0xb), elsewhere(6, 0xb)),
            (AgainEchoed, online(6, 0xb), elsewhere(6, 0xb)),
            // Once we have spoken, whoever has counted as far as us is somebody else.
            (FirstEchoed, online(7, 0xb), elsewhere(7, 0xb)),
            (AgainConnected, online(9, 0xb), elsewhere(9, 0xb)),
            (AgainAnnounced, lost(9, 0xb), elsewhere(9, 0xb)),
            // We are leaving.
            (Stopped, format::stopped(&speaker(7, 0xa), AT), Heard::Nothing),
            (Stopped, lost(7, 0xa), Heard::Nothing),
        ] {
            let mut presence = after(before);
            let topic = presence.topic().clone();
            assert_eq!(presence.heard(&topic, payload.as_bytes()), expected, "{before:?} {payload}");
        }
    }

    #[test]
    fn other_topics_gateways_and_nonsense_mean_nothing() {
        let mut presence = after(Before::FirstEchoed);
        let state = presence.topic().clone();
        let other = Topic::new("fieldpost/g2/state").expect("a topic");
        assert_eq!(presence.heard(&other, online(9, 1).as_bytes()), Heard::Nothing);
        let other_gateway = online(9, 1).replace("g1", "g2");
        for payload in ["", "offline", "{}", "[[[[", &other_gateway, &" ".repeat(1 << 20)] {
            assert_eq!(presence.heard(&state, payload.as_bytes()), Heard::Nothing);
        }
    }

    #[test]
    fn presence_is_retained_and_the_will_says_lost() {
        let mut presence = presence();
        let will = presence.will();
        assert_eq!((will.topic.as_str(), will.retain), ("fieldpost/g1/state", true));
        assert_eq!(will.payload, lost(7, 0xa));
        for announcement in [presence.online(3, 0, AT), presence.stopped(AT)] {
            assert_eq!(announcement.topic, will.topic);
            assert_eq!((announcement.qos, announcement.retain), (Qos::AtLeastOnce, true));
        }
        assert_eq!(presence.gap_topic().as_str(), "fieldpost/g1/gap");
    }

    #[test]
    fn a_unit_has_a_topic_of_its_own() {
        let presence = presence();
        let state = presence.unit("line1", "meter1", None, AT).expect("names that fit");
        assert_eq!(state.topic.as_str(), "fieldpost/g1/unit/line1/meter1");
        assert!(state.retain);
        for (line, unit) in [("a/b", "c"), ("a", "b/c"), ("a", "+")] {
            assert!(presence.unit(line, unit, None, AT).is_err(), "{line} {unit}");
        }
        let long = Topic::new(&"x".repeat(65_530)).expect("a topic");
        assert!(Presence::new(&long, speaker(1, 1)).is_err());
    }

    proptest! {
        #[test]
        fn no_payload_panics(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut presence = presence();
            let topic = presence.topic().clone();
            let _ = presence.heard(&topic, &payload);
        }
    }
}
