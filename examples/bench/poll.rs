//! What a poll over Modbus TCP costs: processor time of the agent, libmodbus and pymodbus for the same requests.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::gateway::{Block, Place, Plan, Reader};
use crate::setting::{Failure, Setting};
use crate::table::{Better, Peer, Row};

/// So many that the shortest interval is never enough for a round: the agent reads back to back, as the others do.
const UNITS: u8 = 100;
const BLOCKS: u16 = 20;
const REGISTERS: u16 = 10;
/// How long a reader may take until it reads.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn rows(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let device = Device::new().map_err(Failure::at("a Modbus TCP server"))?;
    let peers = [Reader::libmodbus(setting)?, Reader::pymodbus()];
    let (mut ours, mut reporting, mut dropped) = (Vec::new(), Vec::new(), 0);
    let mut theirs = [Vec::new(), Vec::new()];
    for _ in 0..setting.repeats() {
        ours.push(measure(setting, &Reader::Agent, &device, false)?.us);
        for (peer, figures) in peers.iter().zip(&mut theirs) {
            if let Ok(peer) = peer {
                figures.push(measure(setting, peer, &device, false)?.us);
            }
        }
        let stored = measure(setting, &Reader::Agent, &device, true)?;
        reporting.push(stored.us);
        dropped += stored.dropped;
    }
    let [libmodbus, pymodbus] = [("libmodbus", 0), ("pymodbus", 1)].map(|(name, at)| match &peers[at] {
        Ok(_) => Peer::Measured { name: name.to_owned(), figures: theirs[at].clone() },
        Err(missing) => Peer::Missing(missing.clone()),
    });
    let row = |name, what: &str, ours: &[f64], peer, aim, conditions: &str| Row {
        name,
        what: what.to_owned(),
        unit: "µs",
        better: Better::Lower,
        ours: ours.to_vec(),
        peer,
        aim,
        conditions: conditions.to_owned(),
    };
    let polling = format!(
        "user and system time of the whole program, divided by the requests it sent back to back to a server on \
         127.0.0.1: {UNITS} units, {BLOCKS} blocks of {REGISTERS} registers in each. The agent decodes every block as \
         {} values and compares each with its dead band, which none leaves; the peer only reads",
        REGISTERS / 2
    );
    let stored = format!(
        "the same, but every value changes at every poll and is stored: one message of {} values a unit and round, \
         with fsync, in the queue of a gateway without its broker; {dropped} were dropped as too many. The peer only \
         reads",
        BLOCKS * REGISTERS / 2
    );
    Ok(vec![
        row("poll-cpu", "CPU per Modbus TCP poll", &ours, libmodbus.clone(), "<= 2 x libmodbus", &polling),
        row("poll-cpu-python", "CPU per Modbus TCP poll", &ours, pymodbus, "", "as poll-cpu"),
        row(
            "poll-cpu-stored",
            "CPU per Modbus TCP poll, every value stored",
            &reporting,
            libmodbus,
            "",
            &stored,
        ),
    ])
}

/// What a poll cost.
struct Cost {
    us: f64,
    /// What the agent dropped because something was too slow for it: a poll that stores nothing is cheap.
    dropped: u64,
}

fn measure(setting: &Setting, reader: &Reader, device: &Device, reports: bool) -> Result<Cost, Failure> {
    let block = |n: u16| Block { function: 3, address: n * (REGISTERS + 2), registers: REGISTERS };
    let plan = Plan { units: UNITS, blocks: (0..BLOCKS).map(block).collect(), reports };
    let before = device.answered();
    let mut running = reader.start(setting, &plan, Place::Tcp { port: device.port }, false)?;
    let process = &mut running.process;
    // The first rounds also bring out what happens once only: every value is reported.
    let warm = before + plan.requests() as u64 * 2;
    process.expect(PATIENCE, "it has read every unit", || device.answered() > warm)?;
    let (polls, cpu_s, began) = (device.answered(), process.cpu_s()?, Instant::now());
    let enough = Duration::from_secs(if setting.quick { 1 } else { 4 });
    process.expect(PATIENCE, "it reads", || began.elapsed() > enough)?;
    let polls = device.answered() - polls;
    if polls == 0 {
        return Err(process.failure("it has stopped reading"));
    }
    let us = (process.cpu_s()? - cpu_s) * 1e6 / polls as f64;
    Ok(Cost { us, dropped: if reports { running.dropped()? } else { 0 } })
}

/// A Modbus TCP server that does nothing but answer. Every register holds its address and the number of the request, so
/// that each value changes each time.
struct Device {
    port: u16,
    answered: Arc<AtomicU64>,
}

impl Device {
    fn new() -> io::Result<Device> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let answered = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&answered);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let count = Arc::clone(&count);
                std::thread::spawn(move || serve(stream, &count));
            }
        });
        Ok(Device { port, answered })
    }

    fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

/// Until the connection ends.
fn serve(mut stream: TcpStream, answered: &AtomicU64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reply = Vec::with_capacity(260);
    loop {
        let mut request = [0; 12];
        stream.read_exact(&mut request)?;
        let address = u16::from_be_bytes([request[8], request[9]]);
        let count = u16::from_be_bytes([request[10], request[11]]);
        reply.clear();
        reply.extend(&request[..4]);
        reply.extend((3 + count * 2).to_be_bytes());
        reply.extend([request[6], request[7], (count * 2) as u8]);
        let first = address.wrapping_add(answered.fetch_add(1, Ordering::Relaxed) as u16);
        reply.extend((0..count).flat_map(|n| first.wrapping_add(n).to_be_bytes()));
        stream.write_all(&reply)?;
    }
}
