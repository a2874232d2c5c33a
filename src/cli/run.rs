//! `fieldpost run FILE`: the agent itself; with `--dry`, the readings on the terminal and no broker.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use tokio::sync::mpsc;

use super::{Failure, colours, printable};
use crate::agent;
use crate::config::{self, Config};
use crate::logging;
use crate::point::{Fault, Reading, Sample, Value};
use crate::policy::Reporting;
use crate::policy::format::rfc3339;

/// Readings under way to the terminal; sources drop what does not fit.
const READINGS_MAX: usize = 256;

/// `fieldpost run`
#[derive(Debug, Args)]
pub(super) struct Run {
    /// The configuration file
    file: PathBuf,
    /// Show readings on the terminal; no broker, no database
    #[arg(long)]
    dry: bool,
}

impl Run {
    pub(super) fn run(self) -> Result<(), Failure> {
        // Where it is found again when it is to be reloaded, and the paths in it mean the same then.
        let file = std::path::absolute(&self.file).map_err(Failure::Input)?;
        let config = config::load(&file)?;
        logging::start(&config.log);
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::Runtime)?;
        let outcome = match self.dry {
            true => runtime.block_on(run_dry(config)),
            false => runtime.block_on(agent::run(config, file)).map_err(Failure::from),
        };
        // A name that is being resolved cannot be interrupted, and may take longer than anybody wants to wait.
        runtime.shutdown_background();
        outcome
    }
}

async fn run_dry(config: Config) -> Result<(), Failure> {
    let label = |point: &Reporting| Label { name: point.id.to_string(), unit: point.unit.clone() };
    let points = config.reporting().map(label);
    let table = Table::new(points.collect(), colours(&io::stdout()));
    let (sender, readings) = mpsc::channel(READINGS_MAX);
    let mut out = io::stdout();
    let (ran, shown) = tokio::join!(agent::run_dry(config, sender), show(readings, table, &mut out));
    shown.map_err(Failure::Output)?;
    Ok(ran?)
}

/// Writes a line for every point that changed, until the sources hang up or nobody looks any more.
async fn show(
    mut readings: mpsc::Receiver<Reading>,
    mut table: Table,
    out: &mut impl Write,
) -> io::Result<()> {
    while let Some(reading) = readings.recv().await {
        out.write_all(table.changes(&reading).as_bytes())?;
        out.flush()?;
    }
    Ok(())
}

/// What a point is called, and what its values are measured in.
struct Label {
    name: String,
    unit: Option<String>,
}

/// The readings so far, as a log of changes: the latest line of a point is what it reads now.
struct Table {
    points: Vec<(Label, Option<Result<Value, Fault>>)>,
    name_width: usize,
    colours: bool,
}

impl Table {
    fn new(labels: Vec<Label>, colours: bool) -> Self {
        let name_width = labels.iter().map(|label| label.name.chars().count()).max().unwrap_or(0);
        Table { points: labels.into_iter().map(|label| (label, None)).collect(), name_width, colours }
    }

    fn changes(&mut self, reading: &Reading) -> String {
        let mut lines = String::new();
        for Sample { point, at, value } in &reading.samples {
            let Some((label, last)) = self.points.get_mut(point.0) else { continue };
            if last.as_ref() == Some(value) {
                continue;
            }
            let time = rfc3339(at.wall_ms);
            // Only the time of day: who watches knows the date.
            let time = time.get(11..23).unwrap_or(&time);
            let shown = match value {
                Ok(value) => {
                    format!("{value}{}", label.unit.as_ref().map_or(String::new(), |u| format!(" {u}")))
                }
                Err(fault) if self.colours => {
                    format!("\x1b[31mbad: {}\x1b[0m", printable(&fault.to_string()))
                }
                Err(fault) => format!("bad: {}", printable(&fault.to_string())),
            };
            let width = self.name_width;
            writeln!(lines, "{time}  {:width$}  {shown}", label.name)
                .expect("a String takes all it is given");
            *last = Some(value.clone());
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Stamp;
    use crate::point::PointIndex;

    fn table(colours: bool) -> Table {
        let labels = [("line1/meter1/voltage", Some("V")), ("line1/meter1/on", None)];
        let label =
            |(name, unit): (&str, Option<&str>)| Label { name: name.into(), unit: unit.map(Into::into) };
        Table::new(labels.into_iter().map(label).collect(), colours)
    }

    fn reading(after_ms: i64, samples: &[(usize, Result<Value, Fault>)]) -> Reading {
        let at = Stamp { wall_ms: 1_795_255_200_123 + after_ms, mono_ms: 1, synchronised: true };
        let sample = |(point, value): &(usize, Result<Value, Fault>)| Sample {
            point: PointIndex(*point),
            at,
            value: value.clone(),
        };
        Reading { samples: samples.iter().map(sample).collect() }
    }

    #[tokio::test]
    async fn each_change_of_a_point_is_a_line() {
        let (sender, readings) = mpsc::channel(8);
        let timeout = Err(Fault::Timeout { waited_ms: 1000 });
        for reading in [
            reading(0, &[(0, Ok(Value::Float(230.1))), (1, Ok(Value::Bool(true)))]),
            reading(1000, &[(0, Ok(Value::Float(230.1))), (1, Ok(Value::Bool(false)))]),
            reading(2000, &[(0, timeout.clone())]),
            reading(3000, &[(0, timeout), (7, Ok(Value::Integer(1)))]),
            reading(4000, &[(0, Ok(Value::Float(230.1)))]),
        ] {
            sender.send(reading).await.expect("room");
        }
        drop(sender);
        let mut out = Vec::new();
        show(readings, table(false), &mut out).await.expect("written");
        assert_eq!(
            String::from_utf8(out).expect("text"),
            "10:00:00.123  line1/meter1/voltage  230.1 V\n\
             10:00:00.123  line1/meter1/on       true\n\
             10:00:01.123  line1/meter1/on       false\n\
             10:00:02.123  line1/meter1/voltage  bad: no answer within 1000 ms\n\
             10:00:04.123  line1/meter1/voltage  230.1 V\n"
        );
    }

    #[test]
    fn what_is_bad_is_red_and_cannot_move_the_cursor() {
        let fault = Err(Fault::LineDown { what: "\u{1b}[2Jgone".into() });
        let line = table(true).changes(&reading(0, &[(1, fault)]));
        let expected = "10:00:00.123  line1/meter1/on       \x1b[31mbad: line down: \u{fffd}[2Jgone\x1b[0m\n";
        assert_eq!(line, expected);
    }
}
