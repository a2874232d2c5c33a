//! From the checked configuration to what each part is made with.
//!
//! Functions of their arguments: nothing here starts, opens or reads anything.

use std::path::Path;
use std::time::Duration;

use super::Faults;
use super::field::Field;
use crate::clock;
use crate::config::{self, Config};
use crate::dispatch::desk::Limits;
use crate::dispatch::{self, LineEnd};
use crate::health::{Facts, Scope};
use crate::message::{Qos, Topic, TopicError};
use crate::point::PointIndex;
use crate::policy::Reporting;
use crate::policy::command::{self, Allowed, WritablePoint};
use crate::policy::format::Speaker;
use crate::progress::Pulse;
use crate::source::machine::{Machine, MachinePoint};
use crate::source::modbus::{self, LateReplies, Line, LinePoint, Unit};
use crate::store;
use crate::uplink::connection::{self, Orders};
use crate::uplink::packet;
use crate::uplink::presence::Presence;
use crate::uplink::session;

/// What the store of this configuration is opened with.
pub(crate) fn store_settings(config: &Config, faults: Faults) -> store::Settings {
    store::Settings {
        path: config.store.path.clone(),
        quota: config.store.quota,
        when_full: config.store.when_full,
        lanes: config.store.lanes,
        min_free_disk: config.store.min_free_disk,
        replay: config.replay,
        budget: config.budget,
        commit_interval: config.store.commit_interval,
        pulse: Pulse::default(),
        faults: faults.store,
    }
}

/// Where the uplink connects, and as whom.
///
/// # Errors
/// The base topic leaves no room for what comes below it.
pub(super) fn orders(config: &Config, speaker: &Speaker, faults: Faults) -> Result<Orders, TopicError> {
    let brokers = config.brokers().map(|broker| uplink_settings(config, broker, faults));
    let presence = Presence::new(&config.gateway.base_topic, speaker.clone())?;
    Ok(Orders { brokers: brokers.collect::<Result<Vec<_>, _>>()?, presence })
}

fn uplink_settings(
    config: &Config,
    broker: &config::Broker,
    faults: Faults,
) -> Result<connection::Settings, TopicError> {
    let base = &config.gateway.base_topic;
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let session = session::Settings {
        protocol: broker.protocol,
        keep_alive_ms: ms(broker.keep_alive),
        ack_timeout_ms: ms(broker.ack_timeout),
        max_in_flight: broker.max_in_flight,
        qos2_window: broker.qos2_window,
        limits: packet::Limits {
            max_qos: Some(broker.max_qos.number()),
            retain_available: Some(broker.retain),
            max_packet_bytes: broker.max_packet_out,
            ..packet::Limits::default()
        },
        clean_start: broker.clean_start,
        on_session_loss: broker.on_session_loss,
        retry_refused_for_ms: ms(broker.retry_refused_for),
        canary: Topic::new(&format!("{base}/canary"))?,
        presence: Topic::new(&format!("{base}/state"))?,
        // What nobody may write to is not asked for: some brokers disconnect whoever subscribes to what he may not.
        commands: match config.points.iter().any(|point| point.writable.is_some()) {
            true => vec![(config.commands.topic.to_string(), Qos::ExactlyOnce)],
            false => Vec::new(),
        },
        broken: faults.break_pubrel_order.then_some(session::Broken::PubrelAfterCommit),
    };
    Ok(connection::Settings {
        host: broker.host.clone(),
        port: broker.port,
        tls: broker.tls.clone(),
        client_id: broker.client_id.clone(),
        username: broker.username.clone(),
        password_file: broker.password_file.clone(),
        session_expiry: broker.session_expiry,
        connect_timeout: broker.connect_timeout,
        backoff_max: broker.backoff_max,
        max_packet: broker.max_packet,
        will: broker.will,
        failover_after: broker.failover_after,
        failback_every: broker.failback_every,
        files: broker.files.number(),
        session,
    })
}

/// Where a running line stands in the agent's tables. Neither number is ever used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seat {
    /// The line, as dispatch knows it.
    pub(super) line: usize,
    /// Its first point; the others follow in the order of the configuration.
    pub(super) first_point: usize,
}

impl Seat {
    /// The index of the point at that place in [`Config::points`].
    fn point(self, line: &config::ModbusLine, place: usize) -> PointIndex {
        let first = line.units.first().map_or(0, |unit| unit.points.start);
        PointIndex(self.first_point + place - first)
    }
}

/// For these lines, in the order of the configuration; orders are numbered.
pub(super) fn dispatch_settings(
    config: &Config,
    seats: &[Seat],
    lines: Vec<LineEnd>,
    number: u64,
    faults: Faults,
) -> dispatch::Settings {
    let commands = &config.commands;
    dispatch::Settings {
        number,
        gateway: config.gateway.id.clone(),
        judge: command::Settings {
            points: writable_points(config, seats),
            ttl: commands.ttl,
            max_ttl: commands.max_ttl,
            answer_topic: commands.answer_topic.clone(),
            response_topics: commands.response_topics.clone(),
        },
        limits: Limits { max_per_second: commands.max_per_second, burst: commands.burst },
        lines,
        break_order: faults.break_command_order,
    }
}

fn writable_points(config: &Config, seats: &[Seat]) -> Vec<WritablePoint> {
    let mut points = Vec::new();
    for (line, seat) in config.modbus.iter().zip(seats) {
        for place in line.units.iter().flat_map(|unit| unit.points.clone()) {
            let point = &config.points[place];
            let allowed = match point.writable {
                None => continue,
                Some(modbus::Writable::Coil) => Allowed::Bool,
                Some(modbus::Writable::Range { min, max }) => Allowed::Number { min, max },
            };
            let (name, index) = (point.report.id.to_string(), seat.point(line, place));
            points.push(WritablePoint { name, index, line: seat.line, allowed });
        }
    }
    points
}

/// How every point is reported; those of the machine are numbered from `machine` on.
pub(super) fn reporting(config: &Config, seats: &[Seat], machine: usize) -> Vec<(PointIndex, Reporting)> {
    let mut points = Vec::new();
    for (line, seat) in config.modbus.iter().zip(seats) {
        let places = line.units.iter().flat_map(|unit| unit.points.clone());
        points.extend(places.map(|place| (seat.point(line, place), config.points[place].report.clone())));
    }
    let of_machine = config.machine.iter().flat_map(|machine| &machine.points).enumerate();
    points.extend(of_machine.map(|(at, point)| (PointIndex(machine + at), point.report.clone())));
    points
}

/// What the reporter tells that does not change while the agent runs.
pub(super) fn facts(config: &Config, started: clock::Stamp) -> Facts {
    Facts {
        gateway: config.gateway.id.clone(),
        store_path: config.store.path.display().to_string(),
        boot_id: clock::boot_id(),
        started,
    }
}

/// What it tells that does.
pub(super) fn scope(config: &Config, presence: &Presence, field: &Field) -> Scope {
    Scope {
        health_interval: config.gateway.health_interval,
        presence: presence.clone(),
        lines: field.states(),
        machine: field.machine_values(),
    }
}

/// What the source is made with that tells of the machine, its points from this index on.
pub(super) fn machine(
    config: &Config,
    first_point: usize,
    started: clock::Stamp,
    faults: Faults,
) -> Option<Machine> {
    let point = |(at, point): (usize, &config::MachinePoint)| MachinePoint {
        index: PointIndex(first_point + at),
        sensor: point.sensor,
        every: point.every,
    };
    Some(Machine {
        points: config.machine.as_ref()?.points.iter().enumerate().map(point).collect(),
        store: config.store.path.clone(),
        started,
        root: faults.machine_root.unwrap_or(Path::new("/")).to_owned(),
    })
}

/// What the task of a line is made with.
pub(super) fn modbus_line(config: &Config, line: &config::ModbusLine, seat: Seat) -> Line {
    let point = |place: usize| {
        let point = &config.points[place];
        LinePoint {
            index: seat.point(line, place),
            name: point.report.id.point.clone(),
            space: point.space,
            address: point.address,
            encoding: point.encoding.clone(),
            every: point.every,
            writable: point.writable,
        }
    };
    let unit = |unit: &config::ModbusUnit| Unit {
        name: unit.name.clone(),
        unit: unit.unit,
        points: unit.points.clone().map(point).collect(),
    };
    Line {
        name: line.name.clone(),
        transport: line.transport.clone(),
        timeout: line.timeout,
        late_replies: LateReplies::Discard,
        units: line.units.iter().map(unit).collect(),
        pulse: Pulse::default(),
    }
}
