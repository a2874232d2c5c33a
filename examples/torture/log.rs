//! The broker's own log, read as it grows: what it took, and for the first time.
//!
//! Invariant: every line is read once, however often the file is emptied; what is kept of it does not grow.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::support::mosquitto::{LogReader, Logged};
use crate::tally::{Tally, number};

/// The agent's client identifier.
pub(crate) const CLIENT_ID: &str = "g1";

/// A log that is followed.
#[derive(Debug)]
pub(crate) struct BrokerLog {
    path: PathBuf,
    file: File,
    /// A line that is not whole yet.
    rest: Vec<u8>,
    reader: LogReader,
    /// The message that last had a packet id, while it may still be refused.
    latest: BTreeMap<u16, u64>,
}

impl BrokerLog {
    /// Follows this file from its beginning.
    pub(crate) fn open(path: PathBuf) -> io::Result<BrokerLog> {
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        Ok(BrokerLog { path, file, rest: Vec::new(), reader: LogReader::default(), latest: BTreeMap::new() })
    }

    /// Enters in the books what has come since.
    pub(crate) fn follow(&mut self, tally: &mut Tally) -> io::Result<()> {
        let mut bytes = std::mem::take(&mut self.rest);
        self.file.read_to_end(&mut bytes)?;
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        self.rest = bytes.split_off(end);
        for line in String::from_utf8_lossy(&bytes).lines() {
            match self.reader.take(line) {
                Some(Logged::Publish(publish)) if publish.client_id == CLIENT_ID => {
                    let Some(n) = number(&publish.topic, publish.bytes) else { continue };
                    if publish.first_time {
                        tally.arrived(n, publish.qos);
                        self.latest.insert(publish.id, n);
                    }
                }
                Some(Logged::Refused(client_id, id)) if client_id == CLIENT_ID => {
                    if let Some(n) = self.latest.remove(&id) {
                        tally.withdrawn(n);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Empties the file, which nobody must be writing; what it held goes to another one.
    pub(crate) fn empty(&mut self, tally: &mut Tally, into: &Path) -> io::Result<()> {
        self.follow(tally)?;
        std::fs::copy(&self.path, into)?;
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0)).map(drop)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::{Answer, payload};
    use std::io::Write;

    fn publish(n: u64, id: u16, dup: u8) -> String {
        let (hundreds, bytes) = (n / 100, payload(n).len());
        format!("17: Received PUBLISH from g1 (d{dup}, q2, r0, m{id}, 'n/{hundreds}', ... ({bytes} bytes))\n")
    }

    #[test]
    fn the_log_is_read_once_through_split_lines_and_emptying() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mosquitto.log");
        let mut writer = OpenOptions::new().create(true).append(true).open(&path).unwrap();
        let (mut log, mut tally) = (BrokerLog::open(path).unwrap(), Tally::default());
        (0..200).for_each(|n| tally.answered(n, Answer::Accepted));
        let first = publish(7, 1024, 0);
        let (half, rest) = first.split_at(30);
        writer.write_all(half.as_bytes()).unwrap();
        log.follow(&mut tally).unwrap();
        assert_eq!(tally.arrivals(), 0);
        writer.write_all(rest.as_bytes()).unwrap();
        log.empty(&mut tally, &dir.path().join("before.log")).unwrap();
        assert_eq!(tally.arrivals(), 1);
        // A resend, another one that is refused, one of another client's, and a new message with the first id.
        let lines = publish(7, 1024, 1)
            + &publish(8, 1025, 0)
            + "18: Sending PUBREC to g1 (m1025, rc151)\n"
            + &publish(9, 1, 0).replace("g1", "g2")
            + "18: Sending PUBCOMP to g1 (m1024)\n"
            + &publish(110, 1024, 0);
        writer.write_all(lines.as_bytes()).unwrap();
        log.follow(&mut tally).unwrap();
        assert_eq!((tally.arrivals(), tally.missing()), (2, 198));
    }
}
