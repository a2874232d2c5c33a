//! What a message costs the flash: bytes the agent has the kernel write, and syncs, by how many share a commit.
//!
//! An outage and its end: messages are accepted while nobody listens, a group at a time, each group one commit; then
//! they drain. Bytes are those of `/proc/PID/io`: pages of 4 KiB that the agent made dirty, each counted again after
//! every sync. The file system's own journal comes on top. Syncs are counted by the shim of the tests.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fieldpost::control::client;
use fieldpost::control::wire::{Answer, Question};

use crate::agent::{self, Agent};
use crate::load;
use crate::setting::{Failure, Setting};
use crate::sink::{Sink, TOPIC};
use crate::support::agent::{Config, publish};
use crate::support::mosquitto::free_port;
use crate::table::{Better, Peer, Row, median};

/// Without a message for that long, something is broken.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the shim counts syncs: the ninth of ten numbers of eight bytes.
const SYNCS: usize = 8;
const SWITCHES: usize = 10;

/// Messages that share a commit, and how many are measured.
const GROUPS: [(usize, usize); 3] = [(1, 1000), (10, 5000), (100, MOST)];
const MOST: usize = 20_000;

/// One measure: bytes and syncs for a message.
#[derive(Debug, Default, Clone, Copy)]
struct Cost {
    bytes_in: f64,
    bytes_out: f64,
    syncs_in: f64,
    syncs_out: f64,
}

/// Random payloads.
pub(crate) fn incompressible(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let names = [("disk-1", "syncs-1"), ("disk-10", "syncs-10"), ("disk-100", "syncs-100")];
    rows(setting, "incompressible", &load::incompressible(MOST), names, "<= 350")
}

/// Payloads as meters make them.
pub(crate) fn telemetry(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let names = [
        ("disk-telemetry-1", "syncs-telemetry-1"),
        ("disk-telemetry-10", "syncs-telemetry-10"),
        ("disk-telemetry-100", "syncs-telemetry-100"),
    ];
    rows(setting, "telemetry", &load::telemetry(MOST), names, "<= 150")
}

fn rows(
    setting: &Setting,
    kind: &str,
    payloads: &[String],
    names: [(&'static str, &'static str); 3],
    aim: &'static str,
) -> Result<Vec<Row>, Failure> {
    let library = shim(setting)?;
    let mut rows = Vec::new();
    for ((group, count), (disk, syncs)) in GROUPS.into_iter().zip(names) {
        let count = if setting.quick { (count / 10).max(100) } else { count };
        let mut costs = Vec::new();
        for _ in 0..setting.repeats() {
            costs.push(measure(setting, &library, group, &payloads[..count])?);
        }
        let part = |figure: fn(&Cost) -> f64| costs.iter().map(figure).collect::<Vec<_>>();
        let middle = |figure| median(&part(figure)).unwrap_or_default();
        let bytes = payloads.iter().map(String::len).sum::<usize>() / payloads.len();
        let conditions = format!(
            "{count} messages of {bytes} B at QoS 1, accepted offline {group} at a time and then drained; accepting \
             {:.0} B and {:.3} syncs, draining {:.0} B and {:.3} syncs a message; /proc/PID/io write_bytes, pages of \
             4 KiB, without the file system's journal",
            middle(|cost| cost.bytes_in),
            middle(|cost| cost.syncs_in),
            middle(|cost| cost.bytes_out),
            middle(|cost| cost.syncs_out),
        );
        let row = |name, what: &str, unit, ours, aim| Row {
            name,
            what: format!("{what}, {kind}, {group} a commit"),
            unit,
            better: Better::Lower,
            ours,
            peer: Peer::None,
            aim,
            conditions: conditions.clone(),
        };
        let aim = if group == 100 { aim } else { "-" };
        rows.push(row(disk, "disk", "B/msg", part(|cost| cost.bytes_in + cost.bytes_out), aim));
        rows.push(row(syncs, "syncs", "syncs/msg", part(|cost| cost.syncs_in + cost.syncs_out), "-"));
    }
    Ok(rows)
}

fn measure(setting: &Setting, library: &Path, group: usize, payloads: &[String]) -> Result<Cost, Failure> {
    let folder = setting.folder("disk")?;
    let switches = folder.join("faults");
    fs::write(&switches, [0; SWITCHES * 8]).map_err(Failure::at(switches.display().to_string()))?;
    let far = free_port();
    // Whole groups arrive well within the interval, so that each is one commit.
    let interval = if group == 1 { "1ms" } else { "10ms" };
    let config = Config::new(&format!("mqtt://127.0.0.1:{far}"))
        .with("store", &format!("commit_interval = \"{interval}\""));
    let mut command = agent::command(setting, &folder, &config)?;
    command.env("LD_PRELOAD", library).env("FIELDPOST_TEST_FAULTS", &switches);
    let mut agent = Agent::launch(&mut command, &folder)?;
    agent.answers()?;

    let before = (agent.process.disk_bytes()?, syncs(&switches)?);
    accept(&agent, group, payloads)?;
    let accepted = (agent.process.disk_bytes()?, syncs(&switches)?);
    let sink = Sink::start(far)?;
    let count = payloads.len() as u64;
    sink.count().reach(count, PATIENCE).map_err(|failure| agent.process.failure(&failure.to_string()))?;
    agent.drained()?;
    let drained = (agent.process.disk_bytes()?, syncs(&switches)?);

    let each = |after: u64, before: u64| (after - before) as f64 / count as f64;
    if drained.0 == before.0 {
        let folder = folder.display();
        return Err(Failure::Other(format!("{folder} is on a file system that writes to no disk (tmpfs?)")));
    }
    Ok(Cost {
        bytes_in: each(accepted.0, before.0),
        bytes_out: each(drained.0, accepted.0),
        syncs_in: each(accepted.1, before.1),
        syncs_out: each(drained.1, accepted.1),
    })
}

fn accept(agent: &Agent, group: usize, payloads: &[String]) -> Result<(), Failure> {
    let failed = |error: client::ClientError| agent.process.failure(&error.to_string());
    let (mut asker, mut answers) = client::connect(&agent.socket()).map_err(failed)?;
    for (n, payloads) in payloads.chunks(group).enumerate() {
        for payload in payloads {
            let topic = format!("{TOPIC}t{}", n % 8);
            asker.ask(&Question::Publish(publish(&topic, 1, payload))).map_err(failed)?;
        }
        asker.flush().map_err(failed)?;
        for _ in payloads {
            match answers.hear().map_err(failed)? {
                Answer::Accepted {} => {}
                other => return Err(agent.process.failure(&format!("not accepted: {other:?}"))),
            }
        }
    }
    Ok(())
}

fn syncs(switches: &Path) -> Result<u64, Failure> {
    let bytes = fs::read(switches).map_err(Failure::at(switches.display().to_string()))?;
    let number = bytes.get(SYNCS * 8..).and_then(|rest| rest.first_chunk());
    number
        .map(|number| u64::from_le_bytes(*number))
        .ok_or_else(|| Failure::Other("no count of syncs".to_owned()))
}

/// The shim as a library for LD_PRELOAD.
fn shim(setting: &Setting) -> Result<PathBuf, Failure> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support_faults/shim.c");
    let library = setting.folder("shim")?.join("shim.so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl");
    let output = cc.output().map_err(Failure::at("cc (install gcc)"))?;
    match output.status.success() {
        true => Ok(library),
        false => Err(Failure::Other(format!("cc: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}
