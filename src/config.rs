//! The checked configuration: what the rest of the program is built from.
//!
//! [`load`] turns a file into a [`Config`] or into *every* problem it has, each with its place. Nothing here
//! knows the file's spelling (`raw`), and nothing outside knows TOML.

mod broker;
mod change;
mod check;
mod commands;
mod files;
mod http;
mod log;
mod machine;
mod modbus;
mod place;
mod points;
mod quantity;
mod raw;
mod read;
mod store;
mod url;
mod value;
mod warn;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::logging;
use crate::message::{Qos, Topic};
use crate::policy::Reporting;
use crate::source::machine::Sensor;
use crate::source::modbus::register::Encoding;
use crate::source::modbus::{Space, Writable};
use crate::uplink::packet::Protocol;

pub use crate::source::modbus::{Parity, SerialPort, Transport};
pub use crate::store::{BudgetPeriod, BudgetSettings, LaneLimits, Replay, ReplayOrder, WhenFull};
pub use crate::turn::OnSessionLoss;
pub use crate::uplink::tls::Settings as Tls;
pub use change::{Difference, Needs};
pub use files::Files;
pub use place::{Problem, Problems, Spot};

/// Everything the agent needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[gateway]`
    pub gateway: Gateway,
    /// `[broker]`, or the first `[[broker]]`
    pub broker: Broker,
    /// The other `[[broker]]`, to fail over to, in the order of preference.
    pub other_brokers: Vec<Broker>,
    /// `[store]`
    pub store: Store,
    /// `[replay]`
    pub replay: Replay,
    /// `[budget]`
    pub budget: Option<BudgetSettings>,
    /// `[control]`
    pub control: Control,
    /// `[http]`
    pub http: Option<crate::http::Settings>,
    /// `[commands]`
    pub commands: Commands,
    /// `[log]`
    pub log: logging::Settings,
    /// `[[modbus]]`
    pub modbus: Vec<ModbusLine>,
    /// Every point of every unit of every line, in the order of the file: [`crate::point::PointIndex`] counts here.
    pub points: Vec<Point>,
    /// `[machine]`; [`crate::point::PointIndex`] goes on in it.
    pub machine: Option<Machine>,
}

impl Config {
    /// Every broker, in the order of preference.
    pub fn brokers(&self) -> impl Iterator<Item = &Broker> {
        std::iter::once(&self.broker).chain(&self.other_brokers)
    }

    /// How each point is reported: [`crate::point::PointIndex`] counts here.
    pub fn reporting(&self) -> impl Iterator<Item = &Reporting> {
        let machine = self.machine.iter().flat_map(|machine| &machine.points);
        self.points.iter().map(|point| &point.report).chain(machine.map(|point| &point.report))
    }

    /// What is different in another configuration, in the order of the file; empty: it is the same.
    pub fn differences(&self, new: &Config) -> Vec<Difference> {
        change::differences(self, new)
    }

    /// What will not be done as the points ask for it, because the broker is configured not to have it; a sentence
    /// each, for a person.
    pub fn warnings(&self) -> Vec<String> {
        warn::warnings(self)
    }
}

/// Who we are.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// The gateway's name in topics and payloads. One topic level: no `/`, `+`, `#`, no leading `$`.
    pub id: String,
    /// Topic prefix of everything that is not a value: presence, health, unit states, gap records.
    /// Default `fieldpost/{gateway}`, rendered.
    pub base_topic: Topic,
    /// How often a health message is published. Default 5 min, 10 s to 1 d.
    pub health_interval: Duration,
    /// How long a planned stop may take before what is left is left in the database. Default 5 s,
    /// 0 to 10 min.
    pub drain_timeout: Duration,
}

/// Where messages go.
#[derive(Debug, Clone)]
pub struct Broker {
    /// Host name or address, without brackets.
    pub host: String,
    /// Port. Default 1883, or 8883 with TLS.
    pub port: u16,
    /// `Some` for `mqtts://`.
    pub tls: Option<Tls>,
    /// 3.1.1 or 5. Default 5.
    pub protocol: Protocol,
    /// Client Identifier, not empty. Default: the gateway's id.
    pub client_id: String,
    /// User name.
    pub username: Option<String>,
    /// File that holds the password; a trailing line break is not part of it. Read at every connect.
    /// Whether it is there is not checked before that.
    pub password_file: Option<PathBuf>,
    /// Keep Alive. Default 30 s, 5 s to 18 h, 0 not allowed.
    pub keep_alive: Duration,
    /// Session Expiry Interval (MQTT 5). Default 7 d, 1 s to 3650 d.
    pub session_expiry: Duration,
    /// TCP connect, TLS handshake and CONNACK, together. Default 20 s, 100 ms to 10 min.
    pub connect_timeout: Duration,
    /// Reconnect when nothing was acknowledged for this long although the link is up. Default 60 s, 100 ms
    /// to 1 d.
    pub ack_timeout: Duration,
    /// Longest delay between two attempts to connect. Default 5 min, 100 ms to 1 d.
    pub backoff_max: Duration,
    /// QoS 1 and 2 messages in flight; the broker's Receive Maximum still applies. Default 1000, 1 to 65535.
    pub max_in_flight: u16,
    /// QoS 2 messages in flight. Default 1000 on MQTT 5, 20 on 3.1.1 (mosquitto's default silently loses the 21st),
    /// never more than `max_in_flight` unless set; 1 to 65535.
    pub qos2_window: u16,
    /// Largest packet taken from the broker. Default 256 KiB, 4 KiB to 16 MiB.
    pub max_packet: u32,
    /// What becomes of messages between PUBREC and PUBCOMP when the broker lost the session.
    pub on_session_loss: OnSessionLoss,
    /// How long a message the broker refuses for now is tried before it is a dead letter. Default 1 d, up to
    /// 3650 d.
    pub retry_refused_for: Duration,
    /// Whether a Will is registered. Default yes.
    pub will: bool,
    /// The highest QoS the broker takes; what asks for more is sent at this one. Default 2.
    pub max_qos: Qos,
    /// Whether the broker takes retained messages; what asks for it is otherwise sent without. Default yes.
    pub retain: bool,
    /// Largest packet the broker takes, where it cannot say so itself: larger messages become dead letters. 1 KiB to
    /// 256 MiB; default: no limit but its own Maximum Packet Size.
    pub max_packet_out: Option<u32>,
    /// Whether each connection begins a new session, for brokers that keep none. Default no.
    pub clean_start: bool,
    /// How long it may fail before the next broker is tried, if there is one. Default 1 min, 1 s to 1 d.
    pub failover_after: Duration,
    /// While messages go here, how often the brokers before it are asked whether they are back. Default 5 min, 1 s to
    /// 1 d.
    pub failback_every: Duration,
    /// What the files named above hold.
    pub files: Files,
}

/// Where messages wait.
#[derive(Debug, Clone)]
pub struct Store {
    /// The database file. Default `/var/lib/fieldpost/outbox.db`.
    pub path: PathBuf,
    /// Bytes of messages kept at most. Default 512 MiB, 1 MiB to 1 TiB.
    pub quota: u64,
    /// What happens to a new message when the quota is reached.
    pub when_full: WhenFull,
    /// What each lane may hold, in the order of [`Lane::ALL`]; nothing but the quota by default. 64 KiB to 1 TiB,
    /// 1 to 1,000,000,000 messages, 1 s to 3650 d.
    ///
    /// [`Lane::ALL`]: crate::message::Lane::ALL
    pub lanes: [LaneLimits; 3],
    /// Free bytes of the disk below which the database grows no more. Default 16 MiB, 0 to 1 TiB.
    pub min_free_disk: u64,
    /// Longest time a message of the lane waits for others to share its commit with, in the order of
    /// [`Lane::ALL`]. Defaults 0, 50 ms and 1 s; up to 60 s. Longer wears flash less.
    pub commit_interval: [Duration; 3],
}

/// The local socket that `fieldpost status` and `fieldpost publish` speak to.
#[derive(Debug, Clone)]
pub struct Control {
    /// Path of the Unix socket. Default: `control.sock` beside the database. At most 107 bytes.
    pub socket: PathBuf,
}

/// What the gateway lets itself be told. Which points may be written is said at each point; none is by default.
#[derive(Debug, Clone)]
pub struct Commands {
    /// Where commands come in. Default `{base_topic}/command`.
    pub topic: Topic,
    /// How long a command that does not say is worth carrying out, from its reception. Default 30 s, 1 s to 1 d.
    pub ttl: Duration,
    /// The longest a command may ask for. Default 10 min, 1 s to 1 d.
    pub max_ttl: Duration,
    /// Commands taken each second, in the long run. Default 10, 1 to 1000.
    pub max_per_second: u32,
    /// Commands taken at once after a quiet time. Default 50, 1 to 10000.
    pub burst: u32,
    /// Below which topics an answer may go where its command says; each ends in `/`. Default none.
    pub response_topics: Vec<String>,
    /// Where answers go otherwise: `{base_topic}/answer`.
    pub answer_topic: Topic,
}

/// What is told of the machine the agent runs on, as points of a line `gateway` and a unit `machine`.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its points; those the machine does not have are left out while it runs.
    pub points: Vec<MachinePoint>,
}

/// One point of the machine.
#[derive(Debug, Clone)]
pub struct MachinePoint {
    /// What is read.
    pub sensor: Sensor,
    /// How often it is read. Default 1 min; 50 ms to 1 d.
    pub every: Duration,
    /// How it is reported. Defaults: a dead band of its own, a longest silence of 1 h.
    pub report: Reporting,
}

/// One serial line or Modbus TCP server, with its units.
#[derive(Debug, Clone)]
pub struct ModbusLine {
    /// Its name in topics and messages.
    pub name: Arc<str>,
    /// How it is reached.
    pub transport: Transport,
    /// How long a reply is waited for. Default 1 s (RTU), 3 s (TCP); 10 ms to 60 s.
    pub timeout: Duration,
    /// Its units.
    pub units: Vec<ModbusUnit>,
}

/// One unit (a slave, on a serial line).
#[derive(Debug, Clone)]
pub struct ModbusUnit {
    /// Its name in topics and messages.
    pub name: Arc<str>,
    /// Unit identifier: 1 to 247 on serial lines, 0 to 255 on TCP.
    pub unit: u8,
    /// Its points: places in [`Config::points`].
    pub points: std::ops::Range<usize>,
}

/// One point: what is read, and how it is reported.
#[derive(Debug, Clone)]
pub struct Point {
    /// Register type.
    pub space: Space,
    /// Address on the wire, from 0.
    pub address: u16,
    /// How registers become a value.
    pub encoding: Encoding,
    /// How often it is read. Default 1 s; 50 ms to 1 d.
    pub every: Duration,
    /// What may be written to it. Default: nothing.
    pub writable: Option<Writable>,
    /// How it is reported.
    pub report: Reporting,
}

/// Reads and checks a configuration file, and the files `conf.d/*.toml` beside it in the order of their names:
/// their arrays of tables are added, their other tables may only give keys that were not given before.
///
/// # Errors
/// Every problem found, in the order of their places, or the one that made the file unreadable.
pub fn load(path: &Path) -> Result<Config, Problems> {
    check::load(path)
}

/// A duration as the file writes it, `500ms` or `5min`, within a range.
///
/// # Errors
/// What is wrong with it, and what to write.
pub fn duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let complaint = |found: value::Complaint| match found.help {
        Some(help) => format!("{}; {help}", found.message),
        None => found.message,
    };
    quantity::duration(&raw::Value::Text(text.to_owned()), range).map_err(complaint)
}

/// Checks a configuration given as text; `path` is what problems name and what relative paths start from.
///
/// # Errors
/// Every problem found, in the order of their places.
pub fn parse(path: &Path, text: &str) -> Result<Config, Problems> {
    check::parse(path, text)
}
