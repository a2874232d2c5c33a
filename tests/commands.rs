//! Commands through everything that can fail: the real agent, a real mosquitto, a device that writes down what it
//! carries out, `kill -9`, power cuts, cut links and commands that are sent twice.
//!
//! Each command writes a value of its own, so that what the device did can be counted by command.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use fieldpost::agent::Faults;
use fieldpost::control::wire::{LinkState, Status};
use fieldpost::message::Qos;
use fieldpost::store;
use support::agent::{self, Agent, Config};
use support::asker::Asker;
use support::mosquitto::{self, Mosquitto, Options};
use support::plant::Plant;
use support::power;
use support::proxy::{CutPlan, Proxy};
use support::wait_until_async;

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// Commands that are not answered yet, at most.
const UNDER_WAY: usize = 40;
const TOPIC: &str = "fieldpost/g1/command";

/// Not a test: the agent with faults, as which this program starts itself again for negative controls.
#[test]
fn agent_with_faults() {
    agent::be_the_agent();
}

fn mosquitto() -> Mosquitto {
    Mosquitto::start(Options { unlimited: true, ..Options::default() })
}

/// Gateway `g1` with lines to these ports, each with the writable points `u/a` and `u/b`.
fn config(url: &str, ports: &[u16]) -> Config {
    let config = Config::new(url)
        .with("commands", "max_per_second = 1000")
        .with("commands", "burst = 10000")
        .with("commands", "ttl = \"10min\"")
        .with("commands", "response_topics = [\"plant/answers/\"]");
    ports.iter().enumerate().fold(config, |config, (n, port)| {
        config.and(&format!(
            r#"
[[modbus]]
name = "line{n}"
transport = "tcp"
host = "127.0.0.1"
port = {port}
[[modbus.unit]]
name = "u"
unit = 1
every = "10s"
points = [
  {{ name = "a", register = "holding", address = 1, type = "u16", writable = {{ min = 0, max = 60000 }} }},
  {{ name = "b", register = "holding", address = 2, type = "u16", writable = {{ min = 0, max = 60000 }} }},
]
"#
        ))
    })
}

/// Commands of the long runs; more by FIELDPOST_COMMANDS.
fn commands() -> u16 {
    let asked = std::env::var("FIELDPOST_COMMANDS").ok();
    asked.map_or(300, |count| count.parse().expect("FIELDPOST_COMMANDS is a number up to 50000"))
}

/// Every tenth is out of its range, and refused.
fn is_refused(number: u16) -> bool {
    number % 10 == 9
}

fn payload(number: u16) -> String {
    let value = u32::from(number) + if is_refused(number) { 60_000 } else { 0 };
    let (line, point) = (number % 2, if number % 4 < 2 { "a" } else { "b" });
    format!(r#"{{"id":"c{number}","point":"line{line}/u/{point}","value":{value}}}"#)
}

/// What became of a number of commands.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    commands: usize,
    sent_twice: usize,
    kills: usize,
    cuts: usize,
    lossy_cuts: usize,
    link_cuts: u64,
    executed: usize,
    answered: usize,
    done: usize,
    refused: usize,
    unknown: usize,
    executed_twice: usize,
    unanswered: usize,
    answered_twice: usize,
    /// Answers that do not fit what the device did, and other things that should not be.
    wrong: Vec<String>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "commands={} sent_twice={} kills={} cuts={} lossy_cuts={} link_cuts={} executed={} answered={} done={} \
             refused={} unknown={} executed_twice={} unanswered={} answered_twice={} wrong={}",
            self.commands,
            self.sent_twice,
            self.kills,
            self.cuts,
            self.lossy_cuts,
            self.link_cuts,
            self.executed,
            self.answered,
            self.done,
            self.refused,
            self.unknown,
            self.executed_twice,
            self.unanswered,
            self.answered_twice,
            self.wrong.len()
        )
    }
}

impl Outcome {
    fn count(&mut self, numbers: impl Iterator<Item = u16>, plants: &[&Plant], asker: &Asker) {
        let mut times: BTreeMap<u16, usize> = BTreeMap::new();
        for (value, count) in plants.iter().flat_map(|plant| plant.times()) {
            *times.entry(value).or_default() += count;
        }
        let mut answers = asker.answers();
        for number in numbers {
            let executed = times.remove(&number).unwrap_or(0);
            let answers = answers.remove(&format!("c{number}")).unwrap_or_default();
            self.commands += 1;
            self.executed += usize::from(executed > 0);
            self.executed_twice += usize::from(executed > 1);
            self.answered += usize::from(!answers.is_empty());
            self.unanswered += usize::from(answers.is_empty());
            self.answered_twice += usize::from(answers.len() > 1);
            for answer in answers {
                let fits = match answer["result"].as_str() {
                    Some("done") => {
                        self.done += 1;
                        executed > 0 && answer["read_back"] == number && !is_refused(number)
                    }
                    Some("refused") => {
                        self.refused += 1;
                        executed == 0 && is_refused(number)
                    }
                    Some("unknown") => {
                        self.unknown += 1;
                        !is_refused(number)
                    }
                    _ => false,
                };
                if !fits {
                    self.wrong.push(format!("executed {executed} times and answered {answer}"));
                }
            }
        }
        self.wrong.extend(times.keys().map(|value| format!("nobody asked for {value}")));
        self.wrong.extend(answers.keys().map(|id| format!("an answer to {id:?}")));
    }

    fn assert_once(&self) {
        let twice = (self.executed_twice, self.unanswered, self.answered_twice);
        assert_eq!(twice, (0, 0, 0), "{self}\n{:#?}", self.wrong);
        assert_eq!(self.wrong, Vec::<String>::new(), "{self}");
    }
}

/// Kills and cuts while commands are sent, some of them twice, until all are answered.
async fn torture(protocol: &str, count: u16) -> Outcome {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    println!("protocol={protocol} seed={seed}");
    let broker = mosquitto();
    let proxy = Proxy::start(broker.port()).await.unwrap();
    let plants = [Plant::start().await, Plant::start().await];
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer", "plant/answers/+"]).await;
    let tools = tempfile::tempdir().unwrap();
    let ports = [plants[0].port(), plants[1].port()];
    let mut agent = Agent::prepared(&config(&proxy.url(), &ports).protocol(protocol));
    agent.preload(power::library(tools.path()));
    agent.start_again();
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    proxy.set_plan(CutPlan::Random { seed, least: 1_000, most: 30_000 }).await;
    let mut outcome = Outcome::default();
    let (mut sent, began) = (0, Instant::now());
    let mut answered_before = 0;
    let written = || plants[0].writes() + plants[1].writes();
    while asker.answers().len() < usize::from(count) {
        let enough = written() + random.usize(1..15);
        // What a kill falls into is left to chance.
        let moment = Instant::now() + Duration::from_millis(random.u64(200..1_500));
        wait_until_async(PATIENCE, async || {
            let answered = asker.answers().len();
            while sent < count && usize::from(sent) < answered + UNDER_WAY {
                let qos = if random.bool() { Qos::ExactlyOnce } else { Qos::AtLeastOnce };
                let (topic, data) = (format!("plant/answers/{}", sent % 5), sent.to_be_bytes());
                let reply = random.bool().then(|| (topic.as_str(), &data[..]));
                asker.ask(TOPIC, &payload(sent), qos, reply).await;
                sent += 1;
                if random.u8(..) < 50 {
                    let again = random.u16(sent.saturating_sub(60)..sent);
                    asker.ask(TOPIC, &payload(again), qos, None).await;
                    outcome.sent_twice += 1;
                }
            }
            answered == usize::from(count) || written() >= enough || Instant::now() >= moment
        })
        .await;
        if asker.answers().len() == usize::from(count) {
            break;
        }
        // On a busy machine a kill may always come before the agent has connected.
        let goes_on = wait_until_async(PATIENCE, async || asker.answers().len() > answered_before).await;
        assert!(goes_on, "{} of {sent} are answered, and no more:\n{}", answered_before, agent.log());
        answered_before = asker.answers().len();
        agent.kill_9();
        outcome.kills += 1;
        if random.bool() {
            outcome.cuts += 1;
            outcome.lossy_cuts += usize::from(power::cut(&agent.database()));
        } else {
            power::write_back(&agent.database());
        }
        agent.start_again();
    }
    outcome.link_cuts = proxy.counts().cuts;
    proxy.set_plan(CutPlan::Never).await;
    // Whatever is repeated now would be one answer too many.
    agent.expect_drained(PATIENCE);
    agent.expect(PATIENCE, "through its inbox", |status| status.commands_waiting == 0);
    for number in 0..count.min(50) {
        asker.ask(TOPIC, &payload(number), Qos::ExactlyOnce, None).await;
        outcome.sent_twice += 1;
    }
    let again = u64::from(count.min(50));
    agent.expect(PATIENCE, "repeated", |status| status.counters["commands_repeated"] >= again);
    agent.expect_drained(PATIENCE);
    outcome.count(0..count, &[&plants[0], &plants[1]], &asker);
    if protocol == "5" {
        for heard in asker.heard().iter().filter(|heard| heard.topic.starts_with("plant/")) {
            let number: u16 = heard.json()["id"].as_str().unwrap()[1..].parse().unwrap();
            if heard.correlation_data.as_deref() != Some(&number.to_be_bytes()[..]) {
                outcome.wrong.push(format!("its Correlation Data is not that of {number}: {heard:?}"));
            }
        }
    }
    assert!(agent.terminate().success());
    println!("protocol={protocol} seconds={} {outcome}", began.elapsed().as_secs());
    assert!(outcome.kills >= 5 && outcome.executed > 0, "nothing was proven: {outcome}");
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_executed_at_most_once_and_answered_once_through_kills_and_cuts_on_5() {
    torture("5", commands()).await.assert_once();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_executed_at_most_once_and_answered_once_through_kills_and_cuts_on_311() {
    torture("3.1.1", commands() / 2).await.assert_once();
}

/// Retained commands are kept by the broker, and given to whoever subscribes: on 3.1.1 there is no way not to get them.
#[tokio::test(flavor = "multi_thread")]
async fn a_retained_command_is_refused_on_311_and_not_even_sent_on_5() {
    for protocol in ["3.1.1", "5"] {
        let broker = mosquitto();
        let plant = Plant::start().await;
        let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
        mosquitto::publish(broker.port(), &["-q", "1", "-r", "-t", TOPIC, "-m", &payload(2)]);
        let agent = Agent::start(&config(&broker.url(), &[plant.port()]).protocol(protocol));
        agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
        asker.ask(TOPIC, &payload(4), Qos::AtLeastOnce, None).await;
        let all = if protocol == "5" { 1 } else { 2 };
        let answered = wait_until_async(PATIENCE, async || asker.answers().len() == all).await;
        assert!(answered, "{:?}\n{}", asker.answers(), agent.tail());
        let answers = asker.answers();
        assert_eq!(answers["c4"][0]["result"], "done");
        if let Some(retained) = answers.get("c2") {
            assert_eq!(retained[0]["result"], "refused");
            assert!(retained[0]["reason"].as_str().unwrap().starts_with("retained"), "{retained:?}");
        }
        assert_eq!(plant.times(), BTreeMap::from([(4, 1)]), "{protocol}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_down_fails_its_own_commands_and_no_other_line_waits() {
    let broker = mosquitto();
    let plant = Plant::start().await;
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
    let agent = Agent::start(&config(&broker.url(), &[mosquitto::free_port(), plant.port()]));
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    for number in 0..8 {
        asker.ask(TOPIC, &payload(number), Qos::AtLeastOnce, None).await;
    }
    let answered = wait_until_async(PATIENCE, async || asker.answers().len() == 8).await;
    assert!(answered, "{:?}\n{}", asker.answers(), agent.tail());
    for (id, answers) in asker.answers() {
        let result = if id.ends_with(['1', '3', '5', '7']) { "done" } else { "failed" };
        assert_eq!((answers.len(), &answers[0]["result"]), (1, &result.into()), "{answers:?}");
    }
    assert_eq!(plant.writes(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_writable_point_the_command_topic_is_not_subscribed_to() {
    let broker = mosquitto();
    let agent = Agent::start(&Config::new(&broker.url()));
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    assert!(broker.wait_for_log(PATIENCE, "fieldpost/g1/state (QoS"), "presence is subscribed to");
    assert!(!broker.log().contains(TOPIC));
}

/// Measured values go out while a flood is worked off, and memory stays where it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_commands_is_refused_and_starves_nothing() {
    const FLOOD: u16 = 5_000;
    let broker = mosquitto();
    let plant = Plant::start().await;
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
    let limits = config(&broker.url(), &[plant.port(), plant.port()])
        .with("commands", "max_per_second = 5")
        .with("commands", "burst = 20");
    let agent = Agent::start(&limits);
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    let (before_kib, began) = (agent.resident_kib(), Instant::now());
    for number in 0..FLOOD {
        asker.ask(TOPIC, &payload(number), Qos::AtLeastOnce, None).await;
    }
    agent.expect(PATIENCE, "flooded", |status| status.counters["commands_over_limit"] > 100);
    agent.accept("t", 1, (0..500).map(|_| "a measured value"));
    let normal = |status: &Status| status.queue.iter().find(|lane| lane.lane == "normal").unwrap().messages;
    let status = agent.expect(PATIENCE, "through with what was measured", |status| normal(status) == 0);
    assert!(status.commands_waiting > 0, "the flood was over too soon to prove anything");
    let within_limit = 20 + 5 * (began.elapsed().as_secs() + 1);
    assert!(plant.writes() as u64 <= within_limit, "{} writes, {within_limit} allowed", plant.writes());
    let grown_kib = agent.resident_kib().saturating_sub(before_kib);
    println!(
        "flood={FLOOD} waiting={} writes={} grown={grown_kib} KiB",
        status.commands_waiting,
        plant.writes()
    );
    assert!(grown_kib < 32 << 10, "{grown_kib} KiB");
    let lines = agent.log().lines().count();
    println!("{lines} lines in the log");
    assert!(lines <= 100 && agent.logged("each one's answer says why") > 0, "{}", agent.log());
}

/// How often commands were executed twice over so many kills, each right after the device has written.
async fn executed_around_kills(faults: Faults, kills: usize) -> Outcome {
    let broker = mosquitto();
    let plant = Plant::start().await;
    let asker = Asker::start(broker.port(), &["fieldpost/g1/answer"]).await;
    let mut agent = Agent::prepared(&config(&broker.url(), &[plant.port(), plant.port()]));
    agent.have_faults(faults);
    agent.start_again();
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    let mut outcome = Outcome::default();
    let mut number = 0;
    while outcome.kills < kills {
        number += if is_refused(number + 1) { 2 } else { 1 };
        let before = plant.writes();
        asker.ask(TOPIC, &payload(number), Qos::ExactlyOnce, None).await;
        let written = wait_until_async(PATIENCE, async || plant.writes() > before).await;
        assert!(written, "nothing is written any more:\n{}", agent.tail());
        agent.kill_9();
        outcome.kills += 1;
        agent.start_again();
    }
    let answered = wait_until_async(PATIENCE, async || asker.answers().len() >= kills).await;
    assert!(answered, "{} of {kills} are answered:\n{}", asker.answers().len(), agent.tail());
    agent.expect_drained(PATIENCE);
    outcome.count((0..=number).filter(|number| !is_refused(*number) && *number > 0), &[&plant], &asker);
    println!("{faults:?} {outcome}");
    outcome
}

/// A stall before each commit stands for a slow card: the kill falls between a write and its commit.
fn slow_card() -> store::Faults {
    store::Faults { commit_stall: Duration::from_millis(20), ..store::Faults::default() }
}

/// Commands that are interrupted by a kill. With the order broken, some 1 to 7 of 8 are executed twice.
const ROUNDS: usize = 24;

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_card_executes_no_command_twice() {
    let outcome = executed_around_kills(Faults { store: slow_card(), ..Faults::default() }, ROUNDS).await;
    assert_eq!((outcome.executed_twice, outcome.answered_twice), (0, 0), "{outcome}");
}

/// The negative control of this file: it can see a command that is executed twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_before_the_commit_of_its_beginning_would_be_executed_twice() {
    let faults = Faults { store: slow_card(), break_command_order: true, ..Faults::default() };
    let outcome = executed_around_kills(faults, ROUNDS).await;
    assert!(outcome.executed_twice > 0, "{outcome}");
}
