//! `fieldpost broker test` against real mosquittos and the model broker's limits.

use super::support::broker::{BrokerServer, Limits};
use super::*;
use serde_json::Value;

/// Runs it with `--json`: whether it was satisfied, and the report.
fn examine(config: &Config, more: &[&str]) -> (bool, Value) {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("fieldpost.toml");
    fs::write(&file, config.text()).unwrap();
    let mut arguments = vec!["broker", "test", file.to_str().unwrap(), "--json"];
    arguments.extend(more);
    let output = fieldpost(&arguments);
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)));
    (output.status.success(), report)
}

fn found<'a>(report: &'a Value, check: &str) -> (&'a str, &'a str) {
    let findings = report["findings"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["check"] == check);
    let finding = finding.unwrap_or_else(|| panic!("{check} is missing in {report:#}"));
    (finding["outcome"].as_str().unwrap(), finding["text"].as_str().unwrap())
}

/// The outcome, and each of these words in the text.
fn expect(report: &Value, check: &str, outcome: &str, words: &[&str]) {
    let (came_out, text) = found(report, check);
    assert_eq!(came_out, outcome, "{check}: {report:#}");
    assert!(words.iter().all(|word| text.contains(word)), "{check}: {words:?} in {text:?}");
}

const ROUND: [&str; 8] =
    ["CONNACK", "Subscription", "QoS 0", "QoS 1", "QoS 2", "Retained message", "Session kept", "Will"];

/// Points at QoS 2, which makes QoS 2 and a kept session needed.
fn with_qos_2(config: Config) -> Config {
    config.and(
        "[[modbus]]\nname = \"l\"\ntransport = \"tcp\"\nhost = \"127.0.0.1\"\n\n[[modbus.unit]]\nname = \"u\"\nunit = 1\n\
         qos = 2\npoints = [{ name = \"p\", register = \"holding\", address = 0, type = \"u16\" }]\n",
    )
}

fn mosquitto_with(extra: &[&str]) -> Mosquitto {
    Mosquitto::start(Options {
        extra: extra.iter().map(|line| (*line).to_owned()).collect(),
        ..Options::default()
    })
}

#[test]
fn a_good_broker_gets_a_tick_for_every_step_and_keeps_nothing() {
    let mosquitto = mosquitto_with(&[]);
    for protocol in BOTH {
        let config = with_qos_2(Config::new(&mosquitto.url()).protocol(protocol));
        let (satisfied, report) = examine(&config, &[]);
        assert!(satisfied, "{protocol}: {report:#}");
        for check in ROUND.iter().chain(&["Nothing left behind"]) {
            expect(&report, check, "good", &[]);
        }
    }
    // Whoever subscribes afterwards gets the marker and nothing that was retained before it.
    let marked = Subscriber::start(mosquitto.port(), "reader", "#", 1, &[]);
    assert!(mosquitto.wait_for_log(PATIENCE, "Sending SUBACK to reader"));
    support::mosquitto::publish(mosquitto.port(), &["-t", "marker", "-m", "x"]);
    assert_eq!(marked.finish(), ["marker x"]);
}

#[test]
fn a_running_agent_is_not_disturbed_and_its_client_id_is_refused() {
    let (_runtime, broker) = start_broker();
    let mut agent = Agent::start(&Config::new(&broker.url()));
    expect_connected(&agent);
    let connects =
        || broker.with_blocking(|broker| broker.connects().iter().filter(|c| &*c.client_id == "g1").count());
    let before = connects();
    let file = agent.config_file();
    let output = fieldpost(&["broker", "test", file.to_str().unwrap()]);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let own = fieldpost(&["broker", "test", file.to_str().unwrap(), "--client-id", "g1"]);
    assert_eq!(own.status.code(), Some(1));
    assert!(text(&own.stderr).contains("agent's own client id"), "{}", text(&own.stderr));
    agent.accept("t", 2, ["after"]);
    agent.expect_drained(PATIENCE);
    assert!(agent.is_running());
    assert_eq!(connects(), before, "the agent had to connect again");
    let session = broker.with_blocking(|broker| broker.session("g1-test").is_some());
    assert!(!session, "the test's session is still there");
}

#[test]
fn a_wrong_password_is_told_and_the_right_one_passes() {
    let users = vec![("press".to_owned(), "right".to_owned())];
    let mosquitto = Mosquitto::start(Options { users, ..Options::default() });
    let dir = TempDir::new().unwrap();
    let password = dir.path().join("password");
    for (word, passes) in [("right", true), ("wrong", false)] {
        fs::write(&password, format!("{word}\n")).unwrap();
        rustix::fs::chmod(&password, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        for protocol in BOTH {
            let config = Config::new(&mosquitto.url())
                .protocol(protocol)
                .with("broker", "username = \"press\"")
                .with("broker", &format!("password_file = \"{}\"", password.display()));
            let (satisfied, report) = examine(&config, &[]);
            assert_eq!(satisfied, passes, "{protocol}: {report:#}");
            if !passes {
                expect(&report, "CONNACK", "bad", &["Not authorized"]);
                expect(&report, "QoS 1", "untested", &[]);
                assert!(!format!("{report}").contains("wrong"), "{report:#}");
            }
        }
    }
}

#[test]
fn a_topic_the_broker_forbids_is_found_out_also_where_it_says_nothing() {
    let dir = TempDir::new().unwrap();
    let acl = dir.path().join("acl");
    fs::write(&acl, "topic readwrite other/#\n").unwrap();
    let mosquitto = mosquitto_with(&[&format!("acl_file {}", acl.display())]);
    for (protocol, word) in [("5", "Not authorized"), ("3.1.1", "did not come back")] {
        let (satisfied, report) = examine(&Config::new(&mosquitto.url()).protocol(protocol), &[]);
        assert!(!satisfied, "{protocol}: {report:#}");
        expect(&report, "QoS 1", "bad", &[word]);
    }
}

#[test]
fn certificates_that_do_not_verify_and_wrong_ports_are_named() {
    let (authority, other) = (Authority::new(), Authority::new());
    let mosquitto = authority.broker();
    let right = trusting(Config::new(&mosquitto.url()), &authority.file("ca.pem"));
    let (satisfied, report) = examine(&right, &[]);
    assert!(satisfied, "{report:#}");
    expect(&report, "TLS", "good", &[]);
    let wrong_ca = trusting(Config::new(&mosquitto.url()), &other.file("ca.pem"));
    let wrong_host = right.clone().with("broker", "server_name = \"elsewhere.example\"");
    for config in [wrong_ca, wrong_host] {
        let (satisfied, report) = examine(&config, &[]);
        assert!(!satisfied);
        expect(&report, "TCP", "good", &[]);
        expect(&report, "TLS", "bad", &["certificate"]);
        expect(&report, "CONNACK", "untested", &[]);
    }
    let port = support::mosquitto::free_port();
    let (satisfied, report) = examine(&Config::new(&format!("mqtt://127.0.0.1:{port}")), &[]);
    assert!(!satisfied);
    expect(&report, "TCP", "bad", &["refused"]);
    let (satisfied, report) = examine(&Config::new("mqtt://no-such-host.invalid"), &[]);
    assert!(!satisfied);
    expect(&report, "DNS", "bad", &["no-such-host.invalid"]);
}

#[test]
fn a_server_that_never_answers_costs_no_more_than_the_deadline() {
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("mqtt://{}", mute.local_addr().unwrap());
    let asked = Instant::now();
    let (satisfied, report) = examine(&Config::new(&url).with("broker", "connect_timeout = \"1s\""), &[]);
    assert!(!satisfied);
    expect(&report, "CONNACK", "bad", &["no CONNACK within 1 s"]);
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
}

#[test]
fn limits_of_a_broker_are_told_and_matter_where_the_configuration_needs_more() {
    let limits = Limits {
        maximum_qos: 1,
        retain_available: false,
        receive_maximum: Some(5),
        maximum_packet_size: Some(2_000),
        server_keep_alive: Some(12),
        ..Limits::default()
    };
    let runtime = Runtime::new().unwrap();
    let broker = runtime.block_on(BrokerServer::start(Broker::with_limits(limits))).unwrap();
    let plain = Config::new(&broker.url()).with("broker", "will = false");
    let (satisfied, report) = examine(&plain, &[]);
    assert!(satisfied, "{report:#}");
    expect(&report, "Receive Maximum", "noted", &["5"]);
    expect(&report, "Maximum Packet Size", "noted", &["2000"]);
    expect(&report, "Server Keep Alive", "noted", &["12 s instead of 30 s"]);
    expect(&report, "Maximum QoS", "noted", &["1"]);
    expect(&report, "Retain Available", "noted", &["no"]);
    expect(&report, "QoS 2", "noted", &[]);
    let (satisfied, report) = examine(&with_qos_2(plain), &[]);
    assert!(!satisfied, "{report:#}");
    expect(&report, "Maximum QoS", "bad", &["1"]);
    let (satisfied, report) = examine(&Config::new(&broker.url()), &[]);
    assert!(!satisfied, "a Will is a retained message: {report:#}");
    let violations = broker.with_blocking(|broker| broker.violations());
    assert!(violations.iter().all(|violation| violation.contains("ill")), "{violations:?}");
}

#[test]
fn a_broker_that_keeps_no_session_is_found_out() {
    let runtime = Runtime::new().unwrap();
    let limits = Limits { session_expiry: Some(0), ..Limits::default() };
    let broker = runtime.block_on(BrokerServer::start(Broker::with_limits(limits))).unwrap();
    let config = Config::new(&broker.url());
    let (satisfied, report) = examine(&config, &[]);
    assert!(satisfied, "{report:#}");
    expect(&report, "Session kept", "noted", &["forgotten"]);
    let (satisfied, report) = examine(&with_qos_2(config), &[]);
    assert!(!satisfied);
    expect(&report, "Session kept", "bad", &["forgotten"]);
}
