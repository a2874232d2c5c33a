//! Brokers with limits that they cannot say: a row for each kind of cloud, held against a model broker that enforces
//! exactly these limits. With the row's settings everything arrives and no connection breaks; without any one of them
//! its limit is really hit, so that the table can fail.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use fieldpost::control::wire::{Publish, Question, Status};
use support::agent::{Agent, Config, drained, publish, queued};
use support::broker::{Broker, BrokerServer, Kind, Limits, Unsaid};
use support::mosquitto::{Mosquitto, Options};
use support::proxy::Proxy;

const PATIENCE: Duration = Duration::from_secs(60);
/// Messages of each QoS.
const EACH: usize = 150;

/// One setting, what stands there when somebody does not know, and the limit that is then hit.
struct Setting {
    right: &'static str,
    wrong: &'static str,
    hit: &'static str,
}

const fn left_out(right: &'static str, hit: &'static str) -> Setting {
    Setting { right, wrong: "", hit }
}

const QOS_1: Setting = left_out("max_qos = 1", "maximum_qos");
const NO_RETAIN: Setting = left_out("retain = false", "no_retain");
const NO_WILL: Setting = left_out("will = false", "no_will");

fn keep_alive(wrong: &'static str) -> Setting {
    Setting { right: "keep_alive = \"2min\"", wrong, hit: "keep_alive" }
}

/// A kind of cloud.
struct Cloud {
    unsaid: Unsaid,
    settings: Vec<Setting>,
}

impl Cloud {
    fn config(&self, url: &str, without: Option<&Setting>) -> Config {
        let wrong = without.map(|setting| setting.hit);
        let lines = self.settings.iter().map(|setting| match wrong == Some(setting.hit) {
            true => setting.wrong,
            false => setting.right,
        });
        let config = Config::new(url).protocol("3.1.1").with("broker", "backoff_max = \"200ms\"");
        lines.filter(|line| !line.is_empty()).fold(config, |config, line| config.with("broker", line))
    }

    async fn broker(&self) -> BrokerServer {
        let limits = Limits { unsaid: self.unsaid.clone(), ..Limits::default() };
        let mut broker = Broker::with_limits(limits);
        if self.unsaid.in_flight.is_some() {
            // Or nothing is ever in flight for long.
            broker.script.delay_ms = BTreeMap::from([(Kind::Puback, 20)]);
        }
        BrokerServer::start(broker).await.unwrap()
    }

    /// What the broker's limits allow, and one message that is too large for it.
    fn messages(&self) -> Vec<Question> {
        let message = |n: usize| {
            let (qos, size) = ((n % 3) as u8, if n % 50 == 7 { 10_000 } else { 40 });
            let retain = n.is_multiple_of(5);
            Question::Publish(Publish { retain, ..publish(&format!("t/{qos}"), qos, &format!("{n:0size$}")) })
        };
        let large =
            self.unsaid.publish_bytes.map(|most| Question::Publish(publish("t/1", 1, &"x".repeat(most))));
        // QoS 0 is not stored, so nothing is promised of it.
        (0..3 * EACH).filter(|n| n % 3 > 0).map(message).chain(large).collect()
    }

    /// Everything arrives, though the link is cut on the way, and the broker never has to complain.
    async fn takes_everything_with_its_settings(&self) {
        let broker = self.broker().await;
        let proxy = Proxy::start(broker.port()).await.unwrap();
        let agent = Agent::start(&self.config(&proxy.url(), None));
        agent.expect(PATIENCE, "connected", |status| status.counters["connects"] == 1);
        let messages = self.messages();
        let (before, after) = messages.split_at(messages.len() / 2);
        agent.accept_all(before.iter().cloned());
        agent.expect_drained(PATIENCE);
        proxy.cut_all().await;
        agent.accept_all(after.iter().cloned());
        agent.expect(PATIENCE, "connected again", |status| status.counters["connects"] == 2);
        let status = agent.expect_drained(PATIENCE);
        let (received, hit, violations) = broker
            .with(|broker| {
                let mut texts: Vec<_> = (broker.received().iter())
                    .filter(|received| received.topic.starts_with("t/"))
                    .map(|received| {
                        String::from_utf8_lossy(&received.payload).trim_start_matches('0').to_owned()
                    })
                    .collect();
                texts.sort();
                (texts, broker.log.limits_hit.clone(), broker.violations())
            })
            .await;
        let mut expected: Vec<String> = (0..3 * EACH).filter(|n| n % 3 > 0).map(|n| n.to_string()).collect();
        expected.sort();
        assert_eq!(hit, [""; 0], "{}", agent.tail());
        assert_eq!(violations, [""; 0]);
        assert_eq!(received, expected);
        let too_large = u64::from(self.unsaid.publish_bytes.is_some());
        assert_eq!((status.dead_letters, status.counters["connects"]), (too_large, 2), "{}", agent.tail());
        let (qos, retain) = (status.counters["downgraded_qos"], status.counters["downgraded_retain"]);
        let words = status.link.downgrades.join("\n");
        assert_eq!(qos > 0, self.unsaid.maximum_qos.is_some_and(|most| most < 2), "{words}");
        assert_eq!(retain > 0, self.unsaid.no_retain, "{words}");
        for (limited, word) in [
            (self.unsaid.maximum_qos.is_some(), "QoS 1 at most"),
            (self.unsaid.no_retain, "no retained messages"),
            (self.unsaid.no_will, "no Will is registered"),
            (self.unsaid.no_session, "keeps no session"),
        ] {
            assert_eq!(words.matches(word).count(), usize::from(limited), "{word}: {words}");
        }
        println!("{} received, downgraded: {qos} QoS, {retain} retain", received.len());
    }

    /// The control: without any one of the settings, its limit is hit.
    async fn is_hit_without_any_one_of_them(&self) {
        for setting in &self.settings {
            let broker = self.broker().await;
            let agent = Agent::start(&self.config(&broker.url(), Some(setting)));
            agent.accept_all(self.messages());
            let hit = setting.hit;
            let seen = broker.wait_for(PATIENCE, move |broker| broker.log.limits_hit.contains(&hit)).await;
            let hits = broker.with(|broker| broker.log.limits_hit.clone()).await;
            assert!(seen, "without {} {hit} was not hit, but {hits:?}", setting.right);
            agent.expect(PATIENCE, "refused", |status| status.link.last_error.is_some());
        }
    }

    async fn holds(&self) {
        self.takes_everything_with_its_settings().await;
        self.is_hit_without_any_one_of_them().await;
    }
}

/// Huawei IoTDA: QoS 0 and 1, no retain, no Will, Keep Alive 30 to 1200 s or the CONNECT is refused, 1 MB.
#[tokio::test(flavor = "multi_thread")]
async fn huawei_iotda() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        no_retain: true,
        no_will: true,
        keep_alive: Some(30..=1200),
        ..Unsaid::default()
    };
    Cloud { unsaid, settings: vec![QOS_1, NO_RETAIN, NO_WILL, keep_alive("keep_alive = \"10s\"")] }
        .holds()
        .await;
}

/// Alibaba Cloud: as Huawei, and 256 KB.
#[tokio::test(flavor = "multi_thread")]
async fn alibaba_cloud() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        no_retain: true,
        no_will: true,
        keep_alive: Some(30..=1200),
        publish_bytes: Some(256 << 10),
        ..Unsaid::default()
    };
    let size = left_out("max_packet_out = \"256KiB\"", "publish_bytes");
    let settings = vec![QOS_1, NO_RETAIN, NO_WILL, keep_alive("keep_alive = \"1201s\""), size];
    Cloud { unsaid, settings }.holds().await;
}

/// Tencent IoT Explorer: Keep Alive up to 900 s, about 16 KB.
#[tokio::test(flavor = "multi_thread")]
async fn tencent_iot_explorer() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        no_retain: true,
        no_will: true,
        keep_alive: Some(0..=900),
        publish_bytes: Some(16 << 10),
        ..Unsaid::default()
    };
    let size = left_out("max_packet_out = \"16KiB\"", "publish_bytes");
    let settings = vec![QOS_1, NO_RETAIN, NO_WILL, keep_alive("keep_alive = \"16min\""), size];
    Cloud { unsaid, settings }.holds().await;
}

/// OneNET: Keep Alive 10 to 1800 s.
#[tokio::test(flavor = "multi_thread")]
async fn onenet() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        no_retain: true,
        no_will: true,
        keep_alive: Some(10..=1800),
        ..Unsaid::default()
    };
    Cloud { unsaid, settings: vec![QOS_1, NO_RETAIN, NO_WILL, keep_alive("keep_alive = \"5s\"")] }
        .holds()
        .await;
}

/// AWS IoT Core: retain and Will are there, QoS 2 ends the connection, 128 KB, 100 unacknowledged at once.
#[tokio::test(flavor = "multi_thread")]
async fn aws_iot_core() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        keep_alive: Some(30..=1200),
        publish_bytes: Some(128 << 10),
        in_flight: Some(100),
        ..Unsaid::default()
    };
    let size = left_out("max_packet_out = \"128KiB\"", "publish_bytes");
    let window = left_out("max_in_flight = 100", "in_flight");
    Cloud { unsaid, settings: vec![QOS_1, keep_alive("keep_alive = \"20s\""), size, window] }.holds().await;
}

/// Azure IoT Hub: no QoS 2, retain is a property only, Keep Alive up to 1177 s, 256 KB.
#[tokio::test(flavor = "multi_thread")]
async fn azure_iot_hub() {
    let unsaid = Unsaid {
        maximum_qos: Some(1),
        keep_alive: Some(0..=1177),
        publish_bytes: Some(256 << 10),
        ..Unsaid::default()
    };
    let size = left_out("max_packet_out = \"256KiB\"", "publish_bytes");
    Cloud { unsaid, settings: vec![QOS_1, keep_alive("keep_alive = \"20min\""), size] }.holds().await;
}

/// ThingsBoard: QoS 0 and 1, no retain, no Will.
#[tokio::test(flavor = "multi_thread")]
async fn thingsboard() {
    let unsaid = Unsaid { maximum_qos: Some(1), no_retain: true, no_will: true, ..Unsaid::default() };
    Cloud { unsaid, settings: vec![QOS_1, NO_RETAIN, NO_WILL] }.holds().await;
}

/// A broker that keeps no session, and says so by refusing whoever asks for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_without_sessions() {
    let unsaid = Unsaid { no_session: true, ..Unsaid::default() };
    Cloud { unsaid, settings: vec![left_out("clean_start = true", "no_session")] }.holds().await;
}

/// Mosquitto, EMQX, HiveMQ: everything, with the defaults. The limit that mosquitto does not say on 3.1.1 (20 QoS 2
/// messages held) is one that the defaults know.
#[tokio::test(flavor = "multi_thread")]
async fn mosquitto_emqx_hivemq() {
    Cloud { unsaid: Unsaid::default(), settings: Vec::new() }.takes_everything_with_its_settings().await;
    for (window, loses) in [("", false), ("qos2_window = 100", true)] {
        let mut model = Broker::new();
        model.script.held_limit = Some(20);
        // So that a window fills before its first message is released.
        model.script.delay_ms = BTreeMap::from([(Kind::Pubrec, 20)]);
        let broker = BrokerServer::start(model).await.unwrap();
        let config = Config::new(&broker.url()).protocol("3.1.1");
        let config = if window.is_empty() { config } else { config.with("broker", window) };
        let agent = Agent::start(&config);
        agent.accept_all((0..200).map(|n| Question::Publish(publish("t/2", 2, &n.to_string()))));
        agent.expect_drained(PATIENCE);
        let swallowed = broker.with(|broker| broker.log.counters.swallowed).await;
        assert_eq!(swallowed > 0, loses, "{swallowed} of 200 were acknowledged and thrown away");
    }
}

/// What cannot be kept over a link that breaks is counted.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_session_qos_2_in_flight_may_arrive_twice_and_is_counted() {
    for protocol in ["5", "3.1.1"] {
        let mut model = Broker::new();
        model.script.withhold.insert(Kind::Pubcomp);
        let broker = BrokerServer::start(model).await.unwrap();
        let proxy = Proxy::start(broker.port()).await.unwrap();
        let config = Config::new(&proxy.url()).protocol(protocol).with("broker", "clean_start = true");
        let agent = Agent::start(&config.with("broker", "backoff_max = \"200ms\""));
        agent.accept("t/2", 2, (0..10).map(|_| "x"));
        assert!(broker.wait_for(PATIENCE, |broker| broker.received().len() >= 10).await);
        agent.expect(PATIENCE, "in flight", |status| status.link.in_flight == 10);
        let heard = move |broker: &Broker| {
            let connection = broker.log.connections.values().flat_map(|log| &log.packets);
            connection.filter(|seen| seen.kind == Kind::Pubrel).count() >= 10
        };
        assert!(broker.wait_for(PATIENCE, heard).await);
        broker.with(|broker| broker.script.withhold.clear()).await;
        proxy.cut_all().await;
        let status = agent.expect_drained(PATIENCE);
        let twice =
            broker.with(|broker| broker.received().iter().filter(|r| &*r.topic == "t/2").count()).await - 10;
        assert_eq!((twice, status.counters["possibly_doubled"]), (10, 10), "{protocol}");
        assert_eq!(broker.with(|broker| broker.violations()).await, [""; 0]);
    }
}

/// A broker at QoS 0: everything is sent once, and called delivered.
#[tokio::test(flavor = "multi_thread")]
async fn at_qos_0_messages_are_sent_once_and_the_status_says_what_that_means() {
    let broker = BrokerServer::start(Broker::new()).await.unwrap();
    let agent = Agent::start(&Config::new(&broker.url()).with("broker", "max_qos = 0"));
    let payloads: Vec<String> = (0..5_000).map(|n| n.to_string()).collect();
    agent.accept("t/2", 2, payloads.iter().map(String::as_str));
    let status = agent.expect_drained(PATIENCE);
    let all = |broker: &Broker| {
        broker.received().iter().filter(|r| &*r.topic == "t/2" && r.qos == 0).count() == 5_000
    };
    assert!(broker.wait_for(PATIENCE, all).await);
    assert_eq!(status.counters["downgraded_qos"], 5_000);
    assert!(status.link.downgrades[0].contains("whether it arrives or not"));
    assert_eq!(
        agent.logged("whether it arrives or not"),
        2,
        "the configuration's warning, and the connection's"
    );
}

/// At QoS 0 nothing waits for an answer, so only the link's own backlog bounds memory.
#[tokio::test(flavor = "multi_thread")]
async fn at_qos_0_a_broker_that_does_not_read_costs_bounded_memory() {
    let broker = BrokerServer::start(Broker::new()).await.unwrap();
    let proxy = Proxy::start(broker.port()).await.unwrap();
    let agent = Agent::start(&Config::new(&proxy.url()).with("broker", "max_qos = 0"));
    agent.expect(PATIENCE, "connected", |status| status.counters["connects"] == 1);
    proxy.stall(true, false);
    let text = "x".repeat(20_000);
    agent.accept("t/1", 1, (0..3_000).map(|_| text.as_str()));
    let kib = agent.resident_kib();
    let left = queued(&agent.status());
    println!("{left} of 3000 wait in the database, {kib} KiB in memory");
    assert!(left > 2_000 && kib < 50_000, "{left} wait, {kib} KiB");
    proxy.stall(false, false);
    agent.expect_drained(PATIENCE);
    let all = |broker: &Broker| broker.received().iter().filter(|r| &*r.topic == "t/1").count() == 3_000;
    assert!(broker.wait_for(PATIENCE, all).await);
}

/// mosquitto counts what it holds from the last connection, also where it has place for one message only.
#[tokio::test(flavor = "multi_thread")]
async fn a_mosquitto_with_place_for_one_message_is_served_after_every_cut() {
    for protocol in ["5", "3.1.1"] {
        let extra = vec!["max_inflight_messages 1".to_owned()];
        let broker = Mosquitto::start(Options { extra, ..Options::default() });
        let proxy = Proxy::start(broker.port()).await.unwrap();
        let config = Config::new(&proxy.url()).protocol(protocol).with("broker", "backoff_max = \"200ms\"");
        let agent = Agent::start(&config.with("broker", "max_in_flight = 1"));
        let (mut accepted, mut cuts) = (0, 0);
        while cuts < 5 {
            let idle = |status: &Status| status.counters["connects"] == cuts + 1 && drained(status);
            agent.expect(PATIENCE, "idle", idle);
            // What the broker answers is not heard any more.
            proxy.stall(false, true);
            agent.accept("t/2", 2, ["held", "next"]);
            let held = || broker.received().first_time("t/+") == accepted + 1;
            // A health message may have taken the only place.
            if support::wait_until(Duration::from_secs(1), held) {
                proxy.cut_all().await;
                cuts += 1;
            }
            accepted += 2;
            proxy.stall(false, false);
            agent.expect_drained(PATIENCE);
        }
        let status = agent.status();
        println!("{protocol}: {:?}", status.counters);
        assert_eq!(broker.received().first_time("t/+"), accepted, "{protocol}: {}", agent.tail());
        assert_eq!((status.counters["sessions_lost"], status.counters["possibly_doubled"]), (0, 0));
        assert_eq!(status.counters["connects"], 6, "{protocol}: {}", agent.tail());
    }
}
