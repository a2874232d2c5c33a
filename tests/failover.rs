//! Several brokers: over to the next one while one cannot be reached, back when it answers again, each with a session
//! of its own.
//!
//! What arrived is counted over all brokers together, because that is what a cloud behind them sees: nothing is lost,
//! and what arrives twice is counted.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::time::Duration;

use support::agent::{Agent, Config};
use support::broker::{Broker, BrokerServer, Kind};
use support::mosquitto::{Mosquitto, Options};
use support::producer::{Outcome, Produced, numbered};
use support::proxy::Proxy;

const PATIENCE: Duration = Duration::from_secs(60);

/// Both brokers are reached through proxies; the agent has little patience.
fn config(protocol: &str, first: &str, second: &str) -> Config {
    let quick = ["backoff_max = \"1s\"", "failover_after = \"1s\"", "failback_every = \"1s\""];
    let config =
        quick.iter().fold(Config::new(first).protocol(protocol), |config, line| config.with("broker", line));
    let (url, protocol) = (format!("url = \"{second}\""), format!("protocol = \"{protocol}\""));
    config.or_else(&[&[url.as_str(), protocol.as_str()][..], &quick[..]].concat())
}

fn is_at(agent: &Agent, url: &str, what: &str) {
    agent.expect(PATIENCE, what, |status| {
        status.link.broker == url && status.link.state == fieldpost::control::wire::LinkState::Connected
    });
}

fn count(agent: &Agent, name: &str) -> u64 {
    agent.status().counters[name]
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_go_to_the_second_broker_and_back_and_what_arrives_twice_is_counted() {
    for protocol in ["5", "3.1.1"] {
        let brokers = [(); 2].map(|()| Mosquitto::start(Options::default()));
        let (first, second) =
            (Proxy::start(brokers[0].port()).await.unwrap(), Proxy::start(brokers[1].port()).await.unwrap());
        let mut agent = Agent::start(&config(protocol, &first.url(), &second.url()));
        agent.accept_all((0..200).map(|n| numbered(n, 2)));
        agent.expect_drained(PATIENCE);
        // The first broker gets a window of messages, and is not heard any more.
        first.stall(false, true);
        agent.accept_all((200..500).map(|n| numbered(n, 2)));
        assert!(support::wait_until(PATIENCE, || brokers[0].received().first_time("n/+") >= 200 + 15));
        first.refuse(true).await.unwrap();
        first.cut_all().await;
        first.stall(false, false);
        is_at(&agent, &second.url(), "at the second broker");
        let words = agent.status().link.downgrades.join("\n");
        assert!(words.contains(&format!("{} could not be reached", first.url())), "{words}");
        agent.accept_all((500..700).map(|n| numbered(n, 2)));
        agent.expect_drained(PATIENCE);
        assert_eq!(count(&agent, "failovers"), 1);
        first.refuse(false).await.unwrap();
        is_at(&agent, &first.url(), "back at the first broker");
        assert_eq!(agent.status().link.downgrades, [""; 0]);
        agent.accept_all((700..900).map(|n| numbered(n, 2)));
        let status = agent.expect_drained(PATIENCE);
        assert!(support::wait_until(PATIENCE, || {
            brokers[0].received().publishes.iter().all(|publish| publish.qos < 2 || publish.handed_on)
        }));
        assert!(agent.terminate().success());
        let logs = [brokers[0].received(), brokers[1].received()];
        let each = |log: usize| {
            let taken = logs[log].publishes.iter().filter(|publish| publish.first_time);
            taken.map(|publish| (publish.topic.as_str(), publish.bytes))
        };
        let all = Outcome::of(&Produced::all(900), each(0).chain(each(1)));
        let doubled = status.counters["possibly_doubled"];
        println!("{protocol}: {all}; counted as possibly doubled: {doubled}");
        assert_eq!((all.lost, all.strange), (0, 0), "{all} {:?}", all.details);
        assert!(all.duplicates > 0 && all.duplicates <= doubled && doubled < 30, "{all}, counted {doubled}");
        for log in [0, 1] {
            let alone = Outcome::of(&Produced::all(900), each(log));
            assert_eq!(alone.duplicates, 0, "exactly once at each broker: {alone} {:?}", alone.details);
        }
        let (failbacks, lost) = (status.counters["failbacks"], status.counters["sessions_lost"]);
        assert_eq!((failbacks, lost), (1, 0), "{}", agent.tail());
        // Once in the beginning: nothing that was queued for us is discarded by going away and coming back.
        for broker in &brokers {
            let log = broker.log();
            let connects = log.lines().filter(|line| line.contains("as g1 (p"));
            let clean = connects.filter(|line| line.contains(", c1,")).count();
            assert_eq!(clean, 1, "{log}");
        }
    }
}

/// Both model brokers, and what they received of a topic together, in the order of the brokers.
async fn model_brokers() -> [(BrokerServer, Proxy); 2] {
    let mut both = Vec::new();
    for _ in 0..2 {
        let broker = BrokerServer::start(Broker::new()).await.unwrap();
        let proxy = Proxy::start(broker.port()).await.unwrap();
        both.push((broker, proxy));
    }
    both.try_into().ok().unwrap()
}

async fn received(broker: &BrokerServer) -> Vec<(String, usize)> {
    broker
        .with(|broker| {
            let ours = broker.received().iter().filter(|received| received.topic.starts_with("n/"));
            ours.map(|received| (received.topic.to_string(), received.payload.len())).collect()
        })
        .await
}

fn outcome(count: u64, received: &[(String, usize)]) -> Outcome {
    Outcome::of(&Produced::all(count), received.iter().map(|(topic, bytes)| (topic.as_str(), *bytes)))
}

/// The link of the gateway itself is down: nobody can be reached, and nothing may be doubled by looking for somebody.
#[tokio::test(flavor = "multi_thread")]
async fn while_no_broker_can_be_reached_what_is_in_flight_stays_where_it_is() {
    for protocol in ["5", "3.1.1"] {
        for kill in [false, true] {
            let [(first, to_first), (second, to_second)] = model_brokers().await;
            let mut agent = Agent::start(&config(protocol, &to_first.url(), &to_second.url()));
            is_at(&agent, &to_first.url(), "connected");
            to_first.stall(false, true);
            agent.accept_all((0..100).map(|n| numbered(n, 2)));
            let some = |broker: &Broker| {
                broker.received().iter().filter(|r| r.topic.starts_with("n/")).count() >= 15
            };
            assert!(first.wait_for(PATIENCE, some).await);
            for proxy in [&to_first, &to_second] {
                proxy.refuse(true).await.unwrap();
                proxy.cut_all().await;
                proxy.stall(false, false);
            }
            agent.expect(PATIENCE, "round all brokers", |status| status.counters["failovers"] >= 3);
            if kill {
                agent.kill_9();
                agent.start_again();
                agent.expect(PATIENCE, "at the second", |status| status.counters["failovers"] >= 1);
            }
            to_first.refuse(false).await.unwrap();
            let status = agent.expect_drained(PATIENCE);
            assert_eq!(status.counters["possibly_doubled"], 0);
            outcome(100, &received(&first).await).assert_exactly_once();
            assert_eq!(received(&second).await, []);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_between_two_brokers_loses_nothing_and_doubles_only_what_is_counted() {
    for protocol in ["5", "3.1.1"] {
        let [(first, to_first), (second, to_second)] = model_brokers().await;
        let mut agent = Agent::start(&config(protocol, &to_first.url(), &to_second.url()));
        is_at(&agent, &to_first.url(), "connected");
        // The first broker has taken all and is not heard; half of the window is beyond PUBREC.
        first.with(|broker| broker.script.withhold.insert(Kind::Pubcomp)).await;
        agent.accept_all((0..10).map(|n| numbered(n, 2)));
        agent.expect(PATIENCE, "in flight", |status| status.link.in_flight == 10);
        let released = |broker: &Broker| {
            let packets = broker.log.connections.values().flat_map(|log| &log.packets);
            packets.filter(|seen| seen.kind == Kind::Pubrel).count() >= 10
        };
        assert!(first.wait_for(PATIENCE, released).await);
        first.with(|broker| broker.script.withhold.insert(Kind::Pubrec)).await;
        agent.accept_all((10..15).map(|n| numbered(n, 2)));
        let all =
            |broker: &Broker| broker.received().iter().filter(|r| r.topic.starts_with("n/")).count() == 15;
        assert!(first.wait_for(PATIENCE, all).await);
        to_first.refuse(true).await.unwrap();
        agent.kill_9();
        first.with(|broker| broker.script.withhold.clear()).await;
        agent.start_again();
        is_at(&agent, &to_second.url(), "at the second broker");
        agent.accept_all((15..30).map(|n| numbered(n, 2)));
        agent.expect_drained(PATIENCE);
        let doubled = count(&agent, "possibly_doubled");
        // The rows that stayed behind outlive another kill.
        agent.kill_9();
        to_first.refuse(false).await.unwrap();
        agent.start_again();
        is_at(&agent, &to_first.url(), "at the first broker again");
        agent.accept_all((30..40).map(|n| numbered(n, 2)));
        agent.expect_drained(PATIENCE);
        let freed = |broker: &Broker| broker.session("g1").is_some_and(|session| session.held.is_empty());
        assert!(first.wait_for(PATIENCE, freed).await, "identifiers left behind");
        let (at_first, at_second) = (received(&first).await, received(&second).await);
        let together = outcome(40, &[at_first.clone(), at_second.clone()].concat());
        println!("{protocol}: {together}; counted as possibly doubled: {doubled}");
        assert_eq!((together.lost, together.duplicates, doubled), (0, 15, 15), "{:?}", together.details);
        assert_eq!((outcome(40, &at_first).duplicates, outcome(40, &at_second).duplicates), (0, 0));
        for broker in [&first, &second] {
            // What had only been published at a broker that was left is not published there again, because it may go
            // elsewhere meanwhile: the PUBREL alone frees its identifier.
            let violations = broker.with(|broker| broker.violations()).await;
            let unfounded = violations.iter().filter(|text| !text.contains("before its PUBREC"));
            assert_eq!(unfounded.collect::<Vec<_>>(), [""; 0]);
            let clean =
                broker.with(|broker| broker.connects().iter().filter(|connect| connect.clean).count()).await;
            assert_eq!(clean, 1, "in the beginning only");
        }
    }
}

/// What was last said on the presence topic, Wills included.
async fn presence(broker: &BrokerServer) -> String {
    broker
        .with(|broker| {
            let said = broker.received().iter().filter(|received| received.topic.ends_with("/state"));
            said.last().map_or_else(String::new, |said| String::from_utf8_lossy(&said.payload).into_owned())
        })
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planned_return_doubles_nothing_and_each_broker_is_told_where_we_are() {
    let [(first, to_first), (second, to_second)] = model_brokers().await;
    to_first.refuse(true).await.unwrap();
    let agent = Agent::start(&config("5", &to_first.url(), &to_second.url()));
    is_at(&agent, &to_second.url(), "at the second broker");
    agent.accept_all((0..100).map(|n| numbered(n, 2)));
    assert!(presence(&second).await.contains(r#""state":"online""#));
    to_first.refuse(false).await.unwrap();
    is_at(&agent, &to_first.url(), "at the first broker");
    agent.accept_all((100..200).map(|n| numbered(n, 2)));
    let status = agent.expect_drained(PATIENCE);
    assert!(presence(&first).await.contains(r#""state":"online""#));
    let said = presence(&second).await;
    assert!(said.contains(r#""state":"offline""#) && said.contains("stopped"), "{said}");
    let together = [received(&second).await, received(&first).await].concat();
    outcome(200, &together).assert_exactly_once();
    assert_eq!(status.counters["possibly_doubled"], 0);
    let subscribed = |broker: &Broker| broker.session("g1").map(|session| session.subscriptions.len());
    assert_eq!(first.with(move |broker| subscribed(broker)).await, Some(2));
    assert_eq!(
        second.with(move |broker| subscribed(broker)).await,
        Some(2),
        "its session is kept for another time"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_whose_port_alone_is_back_costs_one_short_absence() {
    let [(first, to_first), (second, to_second)] = model_brokers().await;
    first.with(|broker| broker.script.every_connect.refuse = Some(0x88)).await;
    let agent = Agent::start(&config("5", &to_first.url(), &to_second.url()));
    is_at(&agent, &to_second.url(), "at the second broker");
    agent.expect(PATIENCE, "tried to go back", |status| status.counters["failbacks"] >= 2);
    is_at(&agent, &to_second.url(), "at the second broker again");
    agent.accept_all((0..100).map(|n| numbered(n, 2)));
    agent.expect_drained(PATIENCE);
    outcome(100, &received(&second).await).assert_exactly_once();
    first.with(|broker| broker.script.every_connect.refuse = None).await;
    is_at(&agent, &to_first.url(), "at the first broker in the end");
}
