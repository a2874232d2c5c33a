//! The real agent, a real mosquitto, and the kernel between them: packets lost, refused or swallowed, the line slow or
//! taken down. What a proxy cannot do, because it acknowledges what it does not pass on.
//!
//! Each test starts itself again in a network namespace of its own (`unshare`), where `nft`, `tc` and `ip` act on
//! nothing but its loopback. That needs root or unprivileged user namespaces; where there are neither, it fails and
//! says so.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::agent::{Agent, Config, queued};
use support::mosquitto::{Mosquitto, Options};
use support::producer::{Outcome, Produced, numbered};

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// Set in the process that has a network of its own.
const INSIDE: &str = "FIELDPOST_TEST_OWN_NETWORK";

/// Runs a test of this file again, inside a network of its own; `false` in the process that is to run it.
fn runs_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        // As on a wire: with the 64 KiB of a loopback a whole backlog would be one packet.
        run("ip", "link set lo mtu 1500 up");
        return false;
    }
    let root = rustix::process::geteuid().is_root();
    let this = support::command(std::env::current_exe().unwrap());
    let status = Command::new("unshare")
        .args(if root { &["--net"][..] } else { &["--map-root-user", "--net"] })
        .arg(this.get_program())
        .args(this.get_args())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .status()
        .expect("unshare (util-linux) can be run");
    assert!(
        status.success(),
        "{test} failed in a network of its own; without root it needs unprivileged user namespaces (sysctl \
         kernel.unprivileged_userns_clone=1), and it needs iproute2 and nftables"
    );
    true
}

fn run(program: &str, arguments: &str) {
    let output = Command::new(program).args(arguments.split(' ')).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program} can be run: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {said}");
}

const BOTH_WAYS: &[&str] = &["sport", "dport"];
/// A reset must come through itself.
const TO_BROKER: &[&str] = &["dport"];

/// Does this to every packet to the port, or from it too, until [`pass`].
fn packets(port: u16, ways: &[&str], verdict: &str) {
    run("nft", "add table inet faults");
    run("nft", "add chain inet faults input { type filter hook input priority 0 ; }");
    for end in ways {
        run("nft", &format!("add rule inet faults input tcp {end} {port} {verdict}"));
    }
}

/// Packets that the last rules were applied to.
fn hit() -> u64 {
    let rules = Command::new("nft").args(["list", "table", "inet", "faults"]).output().unwrap();
    let rules = String::from_utf8(rules.stdout).unwrap();
    let counts = rules
        .split("counter packets ")
        .skip(1)
        .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok());
    counts.sum()
}

/// Packets pass again.
fn pass() {
    run("nft", "delete table inet faults");
}

/// A silent link is noticed by these before anything else.
fn watchful(url: &str) -> Config {
    Config::new(url).with("broker", "keep_alive = \"5s\"").with("broker", "ack_timeout = \"5s\"")
}

struct Pair {
    broker: Mosquitto,
    agent: Agent,
}

impl Pair {
    fn start() -> Pair {
        let broker = Mosquitto::start(Options { unlimited: true, ..Options::default() });
        let agent = Agent::start(&watchful(&broker.url()));
        agent.expect(PATIENCE, "online", |status| status.link.last_error.is_none());
        Pair { broker, agent }
    }

    fn accept(&self, range: std::ops::Range<u64>) {
        self.agent.accept_all(range.map(|n| numbered(n, 2)));
    }

    /// How long it took to say that the link is gone.
    fn notices(&self) -> Duration {
        let began = Instant::now();
        self.agent.expect(PATIENCE, "offline", |status| status.link.last_error.is_some());
        began.elapsed()
    }

    /// All of the messages are at the broker, each once and in order.
    fn settle(mut self, messages: u64, words: &str) {
        self.agent.expect_drained(2 * PATIENCE);
        assert!(self.agent.terminate().success());
        let outcome = Outcome::logged(&Produced::all(messages), &self.broker.received());
        println!("{words} {outcome}");
        outcome.assert_exactly_once();
    }
}

#[test]
fn a_black_hole_is_noticed_within_ten_seconds_and_costs_nothing() {
    if runs_inside("a_black_hole_is_noticed_within_ten_seconds_and_costs_nothing") {
        return;
    }
    let pair = Pair::start();
    pair.accept(0..100);
    packets(pair.broker.port(), BOTH_WAYS, "drop");
    pair.accept(100..300);
    let noticed = pair.notices();
    assert!(noticed < Duration::from_secs(10), "{noticed:?}");
    assert!(queued(&pair.agent.status()) >= 200);
    pass();
    pair.settle(300, &format!("black hole, noticed after {:.1} s:", noticed.as_secs_f64()));
}

#[test]
fn a_reset_connection_is_noticed_at_once_and_costs_nothing() {
    if runs_inside("a_reset_connection_is_noticed_at_once_and_costs_nothing") {
        return;
    }
    let pair = Pair::start();
    pair.accept(0..100);
    packets(pair.broker.port(), TO_BROKER, "reject with tcp reset");
    pair.accept(100..300);
    let noticed = pair.notices();
    assert!(noticed < Duration::from_secs(3), "{noticed:?}");
    pass();
    pair.settle(300, &format!("reset, noticed after {:.1} s:", noticed.as_secs_f64()));
}

#[test]
fn a_link_that_is_taken_down_comes_back_and_costs_nothing() {
    if runs_inside("a_link_that_is_taken_down_comes_back_and_costs_nothing") {
        return;
    }
    let pair = Pair::start();
    pair.accept(0..100);
    run("ip", "link set lo down");
    pair.accept(100..300);
    let noticed = pair.notices();
    assert!(noticed < Duration::from_secs(10), "{noticed:?}");
    run("ip", "link set lo up");
    pair.settle(300, &format!("link down, noticed after {:.1} s:", noticed.as_secs_f64()));
}

#[test]
fn every_fifth_packet_may_be_lost() {
    const MESSAGES: u64 = 5_000;
    if runs_inside("every_fifth_packet_may_be_lost") {
        return;
    }
    let pair = Pair::start();
    packets(pair.broker.port(), BOTH_WAYS, "numgen random mod 100 < 20 counter drop");
    pair.accept(0..MESSAGES);
    pair.agent.expect_drained(2 * PATIENCE);
    let lost = hit();
    assert!(lost > 10, "only {lost} packets were lost");
    pass();
    pair.settle(MESSAGES, &format!("20 % of packets, {lost} of them, lost:"));
}

#[test]
fn a_line_of_64_kbit_a_second_is_enough() {
    if runs_inside("a_line_of_64_kbit_a_second_is_enough") {
        return;
    }
    let pair = Pair::start();
    run("tc", "qdisc add dev lo root tbf rate 64kbit burst 4kb latency 2s");
    let began = Instant::now();
    pair.accept(0..500);
    let connects = pair.agent.status().counters["connects"];
    pair.agent.expect_drained(2 * PATIENCE);
    let seconds = began.elapsed().as_secs_f64();
    assert_eq!(pair.agent.status().counters["connects"], connects, "a slow line is not a dead one");
    pair.settle(500, &format!("64 kbit/s, drained in {seconds:.1} s:"));
}
