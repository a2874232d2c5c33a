//! The main job against real brokers: what was accepted arrives, once and in order, whatever fails on the way.
//!
//! The agent is the real binary. What a broker received is counted as first-time PUBLISHes in its own log, because
//! mosquitto 2.0.11 itself repeats messages to subscribers after a restart. Its default configuration (20 in
//! flight) and an unlimited one are different brokers to a client, and so are the two protocol versions.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::time::{Duration, Instant};

use fieldpost::agent::Faults;
use fieldpost::store;
use support::aedes::Aedes;
use support::agent::{self, Agent, Config, queued};
use support::mosquitto::{LogCount, Mosquitto, Options, Subscriber};
use support::producer::{Outcome, Produced, Producer, numbered};
use support::proxy::{CutPlan, Proxy};
use support::{wait_until, wait_until_async};

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// A producer pauses above so many queued messages, so that a run ends soon after its faults.
const QUEUE_ENOUGH: u64 = 1_000;
/// Protocol version, and whether mosquitto is unlimited.
const BROKERS: [(&str, bool); 4] = [("5", false), ("5", true), ("3.1.1", false), ("3.1.1", true)];

/// Not a test: the agent with faults, as which this program starts itself again for negative controls.
#[test]
fn agent_with_faults() {
    agent::be_the_agent();
}

fn mosquitto(unlimited: bool) -> Mosquitto {
    Mosquitto::start(Options { unlimited, ..Options::default() })
}

fn persistent(unlimited: bool) -> Mosquitto {
    Mosquitto::start(Options { unlimited, persistence: true, ..Options::default() })
}

/// First receptions of messages that mosquitto also handed on.
fn handed_on(log: &LogCount, produced: &Produced) -> Outcome {
    let handed_on = log.publishes.iter().filter(|publish| publish.first_time && publish.handed_on);
    Outcome::of(produced, handed_on.map(|publish| (publish.topic.as_str(), publish.bytes)))
}

/// Seconds of the long runs; more by FIELDPOST_TORTURE_SECONDS.
fn torture_seconds() -> u64 {
    let asked = std::env::var("FIELDPOST_TORTURE_SECONDS").ok();
    asked.map_or(12, |seconds| seconds.parse().expect("FIELDPOST_TORTURE_SECONDS is a number of seconds"))
}

// ---- outages ---------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn messages_queued_during_an_outage_arrive_once_and_in_order() {
    for (protocol, unlimited) in BROKERS {
        let broker = mosquitto(unlimited);
        let proxy = Proxy::start(broker.port()).await.unwrap();
        let agent = Agent::start(&Config::new(&proxy.url()).protocol(protocol));
        let subscriber = Subscriber::start(broker.port(), "watch", "a/+", 500, &[]);
        assert!(broker.wait_for_log(PATIENCE, "Sending SUBACK to watch"));
        let payloads: Vec<String> = (0..500).map(|n| format!("message {n}")).collect();
        let payloads: Vec<&str> = payloads.iter().map(String::as_str).collect();
        agent.accept("a/b", 2, payloads[..100].iter().copied());
        proxy.refuse(true).await.unwrap();
        proxy.cut_all().await;
        agent.expect(PATIENCE, "offline", |status| status.link.last_error.is_some());
        agent.accept("a/b", 2, payloads[100..].iter().copied());
        assert!(queued(&agent.status()) >= 400, "nothing leaves during an outage");
        proxy.refuse(false).await.unwrap();
        agent.expect_drained(PATIENCE);
        let expected: Vec<String> = payloads.iter().map(|payload| format!("a/b {payload}")).collect();
        assert_eq!(subscriber.finish(), expected, "{protocol} unlimited={unlimited}");
        assert_eq!(broker.received().first_time("a/b"), 500, "{protocol} unlimited={unlimited}");
    }
}

/// The agent starts with no broker at all, and 10,000 messages wait when it comes.
fn no_broker_at_first(protocol: &str, unlimited: bool, qos: u8) {
    const MESSAGES: u64 = 10_000;
    let mut broker = mosquitto(unlimited);
    broker.stop();
    let mut agent = Agent::start(&Config::new(&broker.url()).protocol(protocol));
    agent.accept_all((0..MESSAGES).map(|n| numbered(n, qos)));
    agent.expect(PATIENCE, "refused", |status| status.link.last_error.is_some());
    assert_eq!(queued(&agent.status()), MESSAGES);
    broker.start_again();
    let began = Instant::now();
    agent.expect_drained(3 * PATIENCE);
    let drained = began.elapsed().as_secs_f64();
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&Produced::all(MESSAGES), &broker.received());
    println!("protocol={protocol} unlimited={unlimited} qos={qos} {outcome} drained in {drained:.1} s");
    outcome.assert_exactly_once();
}

#[test]
fn ten_thousand_qos_2_messages_wait_for_a_default_broker_on_5() {
    no_broker_at_first("5", false, 2);
}

#[test]
fn ten_thousand_qos_2_messages_wait_for_an_unlimited_broker_on_5() {
    no_broker_at_first("5", true, 2);
}

#[test]
fn ten_thousand_qos_2_messages_wait_for_a_default_broker_on_311() {
    no_broker_at_first("3.1.1", false, 2);
}

#[test]
fn ten_thousand_qos_2_messages_wait_for_an_unlimited_broker_on_311() {
    no_broker_at_first("3.1.1", true, 2);
}

/// Nothing is repeated where nothing fails, at QoS 1 either.
#[test]
fn ten_thousand_qos_1_messages_wait_for_a_broker() {
    no_broker_at_first("5", false, 1);
}

/// What a default mosquitto holds of us fills its window (20): nothing else may need room there before we have
/// resumed, neither presence nor what proves that the session is the old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_window_is_resumed_after_a_cut_and_after_a_kill() {
    const MESSAGES: u64 = 60;
    for (protocol, unlimited) in BROKERS {
        for kill in [false, true] {
            let broker = mosquitto(unlimited);
            let proxy = Proxy::start(broker.port()).await.unwrap();
            let mut agent = Agent::start(&Config::new(&proxy.url()).protocol(protocol));
            // The first health message would take a place in the window.
            assert!(broker.wait_for_log(PATIENCE, "fieldpost/g1/health"));
            agent.expect(PATIENCE, "idle", |status| status.link.in_flight == 0);
            proxy.stall(false, true);
            agent.accept_all((0..MESSAGES).map(|n| numbered(n, 2)));
            // One place of 20 stays free.
            let window = if unlimited && protocol == "5" { MESSAGES as usize } else { 19 };
            let full = wait_until(PATIENCE, || broker.received().first_time("n/+") >= window);
            assert!(full, "{protocol} unlimited={unlimited}: the window never was full:\n{}", agent.tail());
            if kill {
                agent.kill_9();
            }
            proxy.cut_all().await;
            proxy.stall(false, false);
            if kill {
                agent.start_again();
            }
            agent.expect_drained(PATIENCE);
            let outcome = Outcome::logged(&Produced::all(MESSAGES), &broker.received());
            println!("protocol={protocol} unlimited={unlimited} kill={kill} {outcome}");
            outcome.assert_exactly_once();
        }
    }
}

/// QoS 1 and 2 share the window of a default mosquitto, which on 3.1.1 throws away what does not fit and
/// acknowledges it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn qos_1_is_not_lost_beside_a_full_window_of_qos_2() {
    for protocol in ["5", "3.1.1"] {
        let broker = mosquitto(false);
        let proxy = Proxy::start(broker.port()).await.unwrap();
        let agent = Agent::start(&Config::new(&proxy.url()).protocol(protocol));
        proxy.delay(Duration::from_millis(20));
        agent.accept_all((0..1_000).map(|n| numbered(n, if n % 3 == 0 { 1 } else { 2 })));
        agent.expect_drained(PATIENCE);
        let outcome = Outcome::logged(&Produced::all(1_000), &broker.received());
        println!("protocol={protocol} {outcome}");
        assert_eq!((outcome.lost, outcome.duplicates), (0, 0), "{outcome} {:?}", outcome.details);
        assert_eq!(agent.status().counters["refused_for_now"], 0, "nothing asked for too much");
    }
}

// ---- kill -9 and cuts ------------------------------------------------------------------------------------

/// What a run of faults left behind.
struct Tortured {
    agent: Agent,
    produced: Produced,
    words: String,
}

/// Kills the agent after random numbers of bytes, and cuts its connections to this port after others, for so many
/// seconds and until enough has failed: 30 kills and 50 cuts a minute.
async fn torture(port: u16, protocol: &str, qos: u8, seconds: u64) -> Tortured {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let proxy = Proxy::start(port).await.unwrap();
    proxy.set_plan(CutPlan::Random { seed, least: 300, most: 20_000 }).await;
    let mut agent = Agent::start(&Config::new(&proxy.url()).protocol(protocol));
    let producer = Producer::start(agent.socket(), qos);
    let (began, mut kills) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(seconds)
        || kills * 2 < seconds
        || proxy.counts().cuts * 6 < seconds * 5
    {
        let counts = proxy.counts();
        assert!(began.elapsed() < Duration::from_secs(6 * seconds), "the agent hardly connects: {counts:?}");
        let enough = counts.to_broker + random.u64(1_000..100_000);
        // Waiting out a back-off proves nothing.
        wait_until_async(Duration::from_millis(1_500), async || {
            producer.hold(queued(&agent.status()) > QUEUE_ENOUGH);
            proxy.counts().to_broker >= enough
        })
        .await;
        agent.kill_9();
        kills += 1;
        agent.start_again();
    }
    let (seconds, cuts) = (began.elapsed().as_secs(), proxy.counts().cuts);
    proxy.set_plan(CutPlan::Never).await;
    proxy.cut_all().await;
    let produced = producer.stop();
    agent.expect_drained(2 * PATIENCE);
    let words =
        format!("protocol={protocol} qos={qos} seed={seed} seconds={seconds} kills={kills} cuts={cuts}");
    Tortured { agent, produced, words }
}

async fn torture_mosquitto(protocol: &str, unlimited: bool, qos: u8, seconds: u64) -> Outcome {
    let broker = mosquitto(unlimited);
    let Tortured { mut agent, produced, words } = torture(broker.port(), protocol, qos, seconds).await;
    assert!(agent.terminate().success());
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("mosquitto unlimited={unlimited} {words} {outcome}");
    outcome
}

/// A broker of another make, which holds QoS 2 over lost connections as well.
#[tokio::test(flavor = "multi_thread")]
async fn qos_2_is_exactly_once_through_kills_and_cuts_with_aedes() {
    let broker = Aedes::start();
    let Tortured { mut agent, produced, words } = torture(broker.port(), "3.1.1", 2, torture_seconds()).await;
    assert!(agent.terminate().success());
    let outcome = broker.outcome(&produced);
    println!("aedes {words} {outcome}");
    outcome.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_is_exactly_once_through_kills_and_cuts_with_a_default_broker_on_5() {
    torture_mosquitto("5", false, 2, torture_seconds()).await.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_is_exactly_once_through_kills_and_cuts_with_an_unlimited_broker_on_5() {
    torture_mosquitto("5", true, 2, torture_seconds()).await.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_is_exactly_once_through_kills_and_cuts_with_a_default_broker_on_311() {
    torture_mosquitto("3.1.1", false, 2, torture_seconds()).await.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_2_is_exactly_once_through_kills_and_cuts_with_an_unlimited_broker_on_311() {
    torture_mosquitto("3.1.1", true, 2, torture_seconds()).await.assert_exactly_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn qos_1_is_never_lost_through_kills_and_cuts() {
    for protocol in ["5", "3.1.1"] {
        let outcome = torture_mosquitto(protocol, false, 1, torture_seconds() / 2).await;
        assert_eq!((outcome.lost, outcome.strange), (0, 0), "{outcome}");
    }
}

/// How many messages were doubled over so many kills, each in the middle of exchanges.
fn doubled_by_kills(faults: Faults, kills: u32) -> Outcome {
    let broker = mosquitto(true);
    let mut agent = Agent::start_with_faults(&Config::new(&broker.url()), faults);
    let producer = Producer::start(agent.socket(), 2);
    for _ in 0..kills {
        let before = broker.received().publishes.len();
        let enough = || broker.received().publishes.len() > before + 100;
        assert!(wait_until(PATIENCE, enough), "nothing arrives any more:\n{}", agent.tail());
        agent.kill_9();
        agent.start_again();
    }
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    let outcome = Outcome::logged(&produced, &broker.received());
    println!("{faults:?} kills={kills} {outcome}");
    outcome
}

/// A stall before each commit stands for a slow card: without it, a kill hardly ever falls between PUBREC and its
/// commit, and the fault of the negative control would not show.
fn slow_card() -> store::Faults {
    store::Faults { commit_stall: Duration::from_millis(20), ..store::Faults::default() }
}

#[test]
fn a_slow_card_does_not_double_a_message() {
    doubled_by_kills(Faults { store: slow_card(), ..Faults::default() }, 8).assert_exactly_once();
}

/// The negative control of this file: it can see a doubled message.
#[test]
fn pubrel_before_the_commit_would_double_messages() {
    let faults = Faults { store: slow_card(), break_pubrel_order: true, ..Faults::default() };
    let outcome = doubled_by_kills(faults, 8);
    assert!(outcome.duplicates > 0, "{outcome}");
    assert_eq!(outcome.lost, 0, "{outcome}");
}

// ---- restarts of the broker ------------------------------------------------------------------------------

/// Restarts the broker while messages are being sent; gives what was produced.
fn restarts(broker: &mut Mosquitto, agent: &Agent, restarts: u32) -> Produced {
    let producer = Producer::start(agent.socket(), 2);
    for _ in 0..restarts {
        let before = broker.received().publishes.len();
        let enough = wait_until(PATIENCE, || {
            producer.hold(queued(&agent.status()) > QUEUE_ENOUGH);
            broker.received().publishes.len() > before + 300
        });
        assert!(enough, "nothing arrives any more:\n{}", agent.tail());
        broker.stop();
        broker.start_again();
    }
    let produced = producer.stop();
    agent.expect_drained(PATIENCE);
    produced
}

#[test]
fn a_broker_that_keeps_its_sessions_may_restart_while_messages_are_sent() {
    for (protocol, unlimited) in BROKERS {
        let mut broker = persistent(unlimited);
        let agent = Agent::start(&Config::new(&broker.url()).protocol(protocol));
        let produced = restarts(&mut broker, &agent, 3);
        let outcome = Outcome::logged(&produced, &broker.received());
        println!("protocol={protocol} unlimited={unlimited} {outcome}");
        outcome.assert_exactly_once();
    }
}

#[test]
fn a_lost_session_loses_nothing_and_doubles_no_more_than_is_counted() {
    for (protocol, unlimited) in BROKERS {
        let mut broker = mosquitto(unlimited);
        let agent = Agent::start(&Config::new(&broker.url()).protocol(protocol));
        let produced = restarts(&mut broker, &agent, 6);
        let counters = agent.status().counters;
        let possibly_doubled = counters["possibly_doubled"];
        let outcome = handed_on(&broker.received(), &produced);
        println!("protocol={protocol} unlimited={unlimited} {outcome} possibly_doubled={possibly_doubled}");
        assert_eq!((outcome.lost, outcome.strange), (0, 0), "{outcome}");
        assert!(outcome.duplicates <= possibly_doubled, "{outcome} possibly_doubled={possibly_doubled}");
        // The first CONNACK may have said it after more than one restart.
        assert!((1..=6).contains(&counters["sessions_lost"]), "{counters:?}");
    }
}
