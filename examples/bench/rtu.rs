//! How much of a serial line's limit is used: on a line at its pace, the agent and libmodbus with the same requests.

use std::time::{Duration, Instant};

use crate::gateway::{Block, Place, Plan, Reader, Running};
use crate::line::{Line, Transaction};
use crate::setting::{Failure, Setting};
use crate::table::{Better, Peer, Row, median};

/// Of each of four meters: 2, 10 and 20 registers.
const BLOCKS: [Block; 3] = [
    Block { function: 3, address: 100, registers: 2 },
    Block { function: 4, address: 0, registers: 10 },
    Block { function: 4, address: 40, registers: 20 },
];
const UNITS: u8 = 4;
/// How long a reader may take until it reads.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn rows(setting: &Setting) -> Result<Vec<Row>, Failure> {
    let peer = Reader::libmodbus(setting)?;
    [
        (9_600, "rtu-9600", "use of an RTU line, 9600 bit/s", ">= 99 %"),
        (115_200, "rtu-115200", "use of an RTU line, 115200 bit/s", ">= 95 %"),
    ]
    .into_iter()
    .map(|(baud_rate, name, what, aim)| row(setting, peer.as_ref(), baud_rate, (name, what, aim)))
    .collect()
}

fn row(
    setting: &Setting,
    peer: Result<&Reader, &String>,
    baud_rate: u32,
    (name, what, aim): (&'static str, &str, &'static str),
) -> Result<Row, Failure> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..setting.repeats() {
        ours.push(measure(setting, &Reader::Agent, baud_rate)?);
        if let Ok(peer) = peer {
            theirs.push(measure(setting, peer, baud_rate)?);
        }
    }
    let share = |uses: &[Use]| uses.iter().map(|one| one.percent).collect::<Vec<_>>();
    let peer = match peer {
        Ok(_) => Peer::Measured { name: "libmodbus".to_owned(), figures: share(&theirs) },
        Err(missing) => Peer::Missing(missing.clone()),
    };
    let all: Vec<&Use> = ours.iter().chain(&theirs).collect();
    let late = median(&all.iter().map(|one| one.late_us).collect::<Vec<_>>()).unwrap_or_default();
    let middle = |uses: &[Use]| {
        let of = |figure: fn(&Use) -> f64| median(&uses.iter().map(figure).collect::<Vec<_>>());
        let both = of(|one| one.middle_percent).zip(of(|one| one.lost_us));
        both.map_or("-".to_owned(), |(percent, lost)| format!("{percent:.1} % ({lost:.0} µs lost)"))
    };
    let rushed = |uses: &[Use]| uses.iter().map(|one| one.rushed).sum::<usize>();
    let conditions = format!(
        "the time that the standard requires for each request and reply (11 bits a character, both frames and after \
         each the silence of 3.5 characters, above 19200 bit/s 1.75 ms), divided by the time it took. A pseudo \
         terminal at the pace of a wire, half duplex; units that answer at once; {UNITS} units with blocks of 2, 10 \
         and 20 registers, read back to back. libmodbus keeps no silence by itself: its loop does. {}. The \
         transaction in the middle: {} here, {} with libmodbus, {late:.0} µs of it lost by the line itself. Requests \
         before the silence was over: {} here, {} with libmodbus",
        if all.iter().all(|one| one.prompt) {
            "Line and readers go before the machine's other work, the kernel's threads for terminals do not"
        } else {
            "Line and readers have no priority here (that takes root): other work of the machine counts against both"
        },
        middle(&ours),
        middle(&theirs),
        rushed(&ours),
        rushed(&theirs),
    );
    let what = what.to_owned();
    Ok(Row { name, what, unit: "%", better: Better::Higher, ours: share(&ours), peer, aim, conditions })
}

/// What a reader made of the line.
struct Use {
    percent: f64,
    rushed: usize,
    /// Of the transaction in the middle, which no stall of the machine touches: its share, its time beyond what the
    /// standard requires, and what of that is the line's own lateness.
    middle_percent: f64,
    lost_us: f64,
    late_us: f64,
    prompt: bool,
}

fn measure(setting: &Setting, reader: &Reader, baud_rate: u32) -> Result<Use, Failure> {
    let line = Line::new(baud_rate).map_err(Failure::at("a pseudo terminal"))?;
    let plan = Plan { units: UNITS, blocks: BLOCKS.to_vec(), reports: false };
    let Running { mut process, .. } =
        reader.start(setting, &plan, Place::Rtu { device: line.path(), baud_rate }, line.prompt)?;
    // The first round also brings out what happens once only.
    let first = plan.requests();
    process.expect(PATIENCE, "it has read every unit", || line.transactions().len() > first)?;
    let enough = Duration::from_secs(if setting.quick { 2 } else { 8 });
    let began = Instant::now();
    process.expect(PATIENCE, "it reads", || began.elapsed() > enough)?;
    let seen = line.transactions();
    used(&seen[first..], line.prompt).ok_or_else(|| process.failure("it has stopped reading"))
}

/// From the first request to the last, whose own time is not known yet.
fn used(seen: &[Transaction], prompt: bool) -> Option<Use> {
    let ([first, ..], [counted @ .., last]) = (seen, seen) else { return None };
    let took = last.asked.duration_since(first.asked);
    if took.is_zero() {
        return None;
    }
    let us = |time: Duration| time.as_secs_f64() * 1e6;
    let took_us = |pair: &[Transaction]| us(pair[1].asked - pair[0].asked);
    let lost = |pair: &[Transaction]| took_us(pair) - us(pair[0].shortest);
    let share = |pair: &[Transaction]| 100.0 * us(pair[0].shortest) / took_us(pair);
    let middle =
        |figure: &dyn Fn(&[Transaction]) -> f64| median(&seen.windows(2).map(figure).collect::<Vec<_>>());
    let shortest: Duration = counted.iter().map(|one| one.shortest).sum();
    Some(Use {
        percent: 100.0 * shortest.as_secs_f64() / took.as_secs_f64(),
        rushed: counted.iter().filter(|one| one.rushed).count(),
        middle_percent: middle(&share)?,
        lost_us: middle(&lost)?,
        late_us: median(&counted.iter().map(|one| us(one.late)).collect::<Vec<_>>())?,
        prompt,
    })
}
