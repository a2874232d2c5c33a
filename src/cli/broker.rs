//! `fieldpost broker test FILE`: what the configured broker really does, a line for each step, while it happens.
//!
//! Invariant: it is a client of its own, so a running agent is not disturbed.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Failure, Paint, Tone, printable};
use crate::clock;
use crate::config::{self, Config};
use crate::message::{Qos, Topic};
use crate::uplink::examination::{self, Check, Examination, Finding, Needs, Next, Outcome};
use crate::uplink::link::{self, ConnectError, Endpoint, Link, Stage, Stream};
use crate::uplink::tls;

/// How long each step after CONNACK may take.
const STEP: Duration = Duration::from_secs(5);
/// How long the last packets and the end of a connection may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// Appended to the configured client id.
const SUFFIX: &str = "-test";

/// `fieldpost broker`
#[derive(Debug, Subcommand)]
pub(super) enum Broker {
    /// Walk through everything the agent will ask of the broker: a tick or the reason for each step
    Test(Test),
}

/// `fieldpost broker test`
#[derive(Debug, Args)]
pub(super) struct Test {
    /// The configuration file
    file: PathBuf,
    /// Client id of the test [default: the configured one with "-test"]; never the agent's own
    #[arg(long, value_name = "ID")]
    client_id: Option<String>,
    /// One JSON object in the end, for programs
    #[arg(long)]
    json: bool,
}

impl Broker {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Broker::Test(test) = self;
        test.run()
    }
}

impl Test {
    fn run(self) -> Result<(), Failure> {
        let config = config::load(&self.file)?;
        let client_id = self.client_id.unwrap_or_else(|| format!("{}{SUFFIX}", config.broker.client_id));
        if client_id == config.broker.client_id {
            return Err(Failure::AgentsClientId(client_id));
        }
        let topic = Topic::new(&format!("{}/test", config.gateway.base_topic)).map_err(Failure::BaseTopic)?;
        let settings = settings(&config, client_id, topic)?;
        let mut report = Report { lines: !self.json, paint: Paint::of(&io::stdout()), findings: Vec::new() };
        if report.lines {
            let broker = &config.broker;
            let broker = printable(&format!("{}:{}", broker.host, broker.port));
            report
                .write(&format!("{broker} as {:?}, test topic {}\n", settings.client_id, settings.topic))?;
        }
        let about = json!({
            "broker": format!("{}:{}", config.broker.host, config.broker.port),
            "client_id": settings.client_id,
            "topic": settings.topic.as_str(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(Failure::Runtime)?.block_on(examine(&config, settings, &mut report))?;
        report.conclude(about)
    }
}

fn settings(config: &Config, client_id: String, topic: Topic) -> Result<examination::Settings, Failure> {
    let broker = &config.broker;
    let password = match &broker.password_file {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text.map_err(|source| Failure::Password { path: path.clone(), source })?;
            Some(text.trim_end_matches(['\r', '\n']).to_owned())
        }
    };
    let seconds = |duration: Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX);
    Ok(examination::Settings {
        protocol: broker.protocol,
        client_id,
        topic,
        keep_alive_s: u16::try_from(broker.keep_alive.as_secs()).unwrap_or(u16::MAX),
        max_packet_bytes: broker.max_packet,
        username: broker.username.clone(),
        password,
        needs: Needs {
            qos2: config.reporting().any(|point| point.qos == Qos::ExactlyOnce),
            retain: config.reporting().any(|point| point.retain),
            will: broker.will,
            session_expiry_s: seconds(broker.session_expiry),
            max_in_flight: broker.max_in_flight,
        },
        nonce: clock::now().wall_ms as u64 ^ u64::from(std::process::id()) << 44,
        connack_ms: millis(broker.connect_timeout),
        step_ms: millis(STEP),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Opens connections for the examination until it is over.
async fn examine(
    config: &Config,
    settings: examination::Settings,
    report: &mut Report,
) -> Result<(), Failure> {
    let began = Instant::now();
    let now_ms = || millis(began.elapsed());
    let mut examination = Examination::new(settings);
    while examination.next() == Next::Reconnect {
        match open(config).await {
            Ok(stream) => {
                report.opened(config, Ok(&stream))?;
                let mut link = Link::new(stream, config.broker.protocol, config.broker.max_packet);
                examination.connect(now_ms());
                converse(&mut link, &mut examination, began, report).await?;
                let _gone = timeout(GOODBYE, link.close()).await;
            }
            Err(error) if !report.has(Check::Tcp) => return report.opened(config, Err(error)),
            Err(error) => examination.on_end(&error.to_string(), now_ms()),
        }
        report.take(&mut examination)?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("{0}")]
    Setup(#[from] tls::SetupError),
    #[error("{0}")]
    Connect(#[from] ConnectError),
}

async fn open(config: &Config) -> Result<Stream, OpenError> {
    let broker = &config.broker;
    let client = broker.tls.as_ref().map(|tls| tls::Client::new(tls, &broker.host)).transpose()?;
    let endpoint = Endpoint {
        host: &broker.host,
        port: broker.port,
        tls: client.as_ref(),
        timeout: broker.connect_timeout,
        user_timeout: broker.connect_timeout,
        stats: &Arc::default(),
    };
    Ok(link::open(&endpoint).await?)
}

async fn converse(
    link: &mut Link<Stream>,
    examination: &mut Examination,
    began: Instant,
    report: &mut Report,
) -> Result<(), Failure> {
    let now_ms = || millis(began.elapsed());
    loop {
        for packet in examination.take_out() {
            if let Err(error) = link.queue(&packet) {
                examination.on_end(&error.to_string(), now_ms());
            }
        }
        report.take(examination)?;
        if examination.next() != Next::Converse {
            return Ok(());
        }
        let deadline = began + Duration::from_millis(examination.deadline_ms());
        tokio::select! {
            packet = link.next() => match packet {
                Ok(packet) => examination.on_packet(packet, now_ms()),
                Err(error) => examination.on_end(&error.to_string(), now_ms()),
            },
            () = sleep_until(deadline) => examination.on_tick(now_ms()),
        }
    }
}

/// Says what is found as it is found.
struct Report {
    /// Lines for people; otherwise everything is told in the end.
    lines: bool,
    paint: Paint,
    findings: Vec<Finding>,
}

impl Report {
    fn take(&mut self, examination: &mut Examination) -> Result<(), Failure> {
        examination.take_findings().into_iter().try_for_each(|finding| self.add(finding))
    }

    fn has(&self, check: Check) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }

    fn add(&mut self, finding: Finding) -> Result<(), Failure> {
        if self.lines {
            self.write(&line(&finding, self.paint))?;
        }
        self.findings.push(finding);
        Ok(())
    }

    fn write(&self, text: &str) -> Result<(), Failure> {
        let mut out = io::stdout();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
    }

    /// How the first connection was opened; later ones tell only what is new.
    fn opened(&mut self, config: &Config, opened: Result<&Stream, OpenError>) -> Result<(), Failure> {
        if self.has(Check::Tcp) {
            return Ok(());
        }
        opening(config, opened).into_iter().try_for_each(|finding| self.add(finding))
    }

    fn conclude(self, mut about: serde_json::Value) -> Result<(), Failure> {
        let bad = self.findings.iter().filter(|finding| finding.outcome == Outcome::Bad).count();
        if self.lines {
            if bad == 0 {
                self.write("everything that this configuration needs works\n")?;
            }
        } else {
            let findings: Vec<_> = self.findings.iter().map(to_json).collect();
            about["ok"] = json!(bad == 0);
            about["findings"] = json!(findings);
            self.write(&format!("{about:#}\n"))?;
        }
        if bad == 0 { Ok(()) } else { Err(Failure::BrokerUnfit(bad)) }
    }
}

fn to_json(finding: &Finding) -> serde_json::Value {
    let outcome = match finding.outcome {
        Outcome::Good => "good",
        Outcome::Noted => "noted",
        Outcome::Bad => "bad",
        Outcome::Untested => "untested",
    };
    json!({ "check": finding.check.name(), "outcome": outcome, "text": finding.text, "advice": finding.advice })
}

fn line(finding: &Finding, paint: Paint) -> String {
    let mark = match finding.outcome {
        Outcome::Good => paint.dab(Tone::Good, "\u{2713}"),
        Outcome::Noted => paint.dab(Tone::Waiting, "!"),
        Outcome::Bad => paint.dab(Tone::Bad, "\u{2717}"),
        Outcome::Untested => "-".to_owned(),
    };
    let mut line = format!("{mark} {:24}{}\n", finding.check.name(), printable(&finding.text));
    if let Some(advice) = &finding.advice {
        line += &format!("  {:24}try: {}\n", "", printable(advice));
    }
    line
}

/// DNS, TCP and TLS, from how far the first connection came.
fn opening(config: &Config, opened: Result<&Stream, OpenError>) -> Vec<Finding> {
    let broker = &config.broker;
    let finding = |check, outcome, text: String| Finding { check, outcome, text, advice: None };
    let good = |check, text: &str| finding(check, Outcome::Good, text.to_owned());
    let bad = |check, error: &dyn std::fmt::Display| finding(check, Outcome::Bad, error.to_string());
    let untested = |check| finding(check, Outcome::Untested, "not reached".into());
    let dns = good(Check::Dns, &format!("{} has an address", broker.host));
    let tcp = good(Check::Tcp, &format!("port {} accepts connections", broker.port));
    let mut findings = match opened {
        Ok(stream) => {
            let address = match stream {
                Stream::Left(tcp) => tcp.tcp().peer_addr(),
                Stream::Right(tls) => tls.get_ref().0.tcp().peer_addr(),
            };
            let address = address.map_or_else(|_| broker.host.clone(), |address| address.to_string());
            let tls = match broker.tls {
                Some(_) => good(Check::Tls, "the broker's certificate is good"),
                None => finding(
                    Check::Tls,
                    Outcome::Noted,
                    "not used: whoever sits in between can read along".into(),
                ),
            };
            return vec![dns, good(Check::Tcp, &format!("connected to {address}")), tls];
        }
        Err(OpenError::Setup(error)) => {
            vec![untested(Check::Dns), untested(Check::Tcp), bad(Check::Tls, &error)]
        }
        Err(OpenError::Connect(error)) => match &error {
            ConnectError::Resolve { .. } | ConnectError::TimedOut { stage: Stage::Resolve, .. } => {
                vec![bad(Check::Dns, &error), untested(Check::Tcp)]
            }
            ConnectError::Refused { .. } => {
                let advice =
                    "is the broker running there, is the port right, does a firewall stand in between?";
                let refused = bad(Check::Tcp, &error);
                vec![dns, Finding { advice: Some(advice.into()), ..refused }]
            }
            ConnectError::Tls { .. } | ConnectError::TimedOut { stage: Stage::Handshake, .. } => {
                vec![dns, tcp, bad(Check::Tls, &error)]
            }
        },
    };
    findings.push(untested(Check::Connack));
    findings
}
