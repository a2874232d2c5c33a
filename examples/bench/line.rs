//! A serial line at its baud rate, with units that answer at once: a pseudo terminal whose characters arrive when a
//! wire would have brought them.
//!
//! Half duplex, 11 bits a character (8E1). A request leaves character by character from the moment it was written;
//! after the silence that ends it (3.5 characters, above 19200 bit/s 1.75 ms; Modbus over serial line V1.02,
//! 2.5.1.1) the unit answers; its characters are handed over at start + n × character, up to a millisecond of them
//! together. Invariant: nothing ever arrives before its time, and what the line itself was late is counted.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::pty;

const BITS_PER_CHARACTER: u32 = 11;
/// As a serial port's FIFO hands them over.
const CHUNK: Duration = Duration::from_millis(1);
/// Of a request to read registers.
const REQUEST_LENGTH: usize = 8;

/// One request and its reply.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Transaction {
    /// When the request's first character began to leave.
    pub(crate) asked: Instant,
    /// The shortest that the standard permits: both frames and the silence after each.
    pub(crate) shortest: Duration,
    /// How much later than a wire the line handed over the last character.
    pub(crate) late: Duration,
    /// Whether the request came before the silence after the last reply was over.
    pub(crate) rushed: bool,
}

/// A line in use.
pub(crate) struct Line {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Transaction>>>,
    slave: OwnedFd,
    wire: Option<JoinHandle<io::Result<()>>>,
    /// Whether the line's thread goes before all others when a character is due.
    pub(crate) prompt: bool,
}

impl Line {
    pub(crate) fn new(baud_rate: u32) -> io::Result<Line> {
        let (path, master, slave) = pty::open()?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (stopped, transactions) = (Arc::clone(&stop), Arc::clone(&seen));
        let wire = std::thread::spawn(move || {
            let _gone = ready.send(go_first());
            Wire::new(baud_rate, File::from(master)).carry(&stopped, &transactions)
        });
        let prompt = is_ready.recv().unwrap_or(false);
        Ok(Line { path, stop, seen, slave, wire: Some(wire), prompt })
    }

    /// The port for the client.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Every transaction whose reply has been handed over.
    pub(crate) fn transactions(&self) -> Vec<Transaction> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Whatever arrives ends the wire's wait for a request.
        let _gone = rustix::io::write(self.slave.as_fd(), &[0; REQUEST_LENGTH]);
        if let Some(wire) = self.wire.take() {
            let _result = wire.join();
        }
    }
}

/// The bits, at their pace.
struct Wire {
    character: Duration,
    silence: Duration,
    port: File,
}

impl Wire {
    fn new(baud_rate: u32, port: File) -> Wire {
        let character = Duration::from_secs(1) * BITS_PER_CHARACTER / baud_rate;
        let silence = if baud_rate > 19_200 { Duration::from_micros(1_750) } else { character * 7 / 2 };
        Wire { character, silence, port }
    }

    fn carry(mut self, stop: &AtomicBool, seen: &Mutex<Vec<Transaction>>) -> io::Result<()> {
        let mut free: Option<Instant> = None;
        loop {
            let mut request = [0; REQUEST_LENGTH];
            let length = self.port.read(&mut request)?;
            let asked = Instant::now();
            self.port.read_exact(&mut request[length..])?;
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let reply = answer(&request)?;
            let frames = self.character * (request.len() + reply.len()) as u32;
            let begin = asked + self.character * request.len() as u32 + self.silence;
            let late = self.deliver(begin, &reply)?;
            let rushed = free.is_some_and(|free| asked < free);
            let transaction = Transaction { asked, shortest: frames + self.silence * 2, late, rushed };
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(transaction);
            free = Some(asked + transaction.shortest);
        }
    }

    /// Returns how late the last character was.
    fn deliver(&mut self, begin: Instant, reply: &[u8]) -> io::Result<Duration> {
        let per_chunk = (CHUNK.as_nanos() / self.character.as_nanos()).max(1) as usize;
        let mut due = begin;
        for chunk in reply.chunks(per_chunk) {
            due += self.character * chunk.len() as u32;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            self.port.write_all(chunk)?;
        }
        Ok(due.elapsed())
    }
}

/// The reply to a read of registers: every register holds its own address.
fn answer(request: &[u8; REQUEST_LENGTH]) -> io::Result<Vec<u8>> {
    let [unit, function @ (3 | 4), a, b, c, d, check @ ..] = *request else {
        return Err(io::Error::other(format!("a request that reads no registers: {request:02x?}")));
    };
    if crc(&request[..6]) != check {
        return Err(io::Error::other(format!("a request with a wrong CRC: {request:02x?}")));
    }
    let (address, count) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    let mut reply = vec![unit, function, (count * 2) as u8];
    reply.extend((address..address + count).flat_map(u16::to_be_bytes));
    reply.extend(crc(&reply));
    Ok(reply)
}

/// The CRC in the order it is sent (V1.02, 6.2.2).
fn crc(bytes: &[u8]) -> [u8; 2] {
    let mut crc = 0xFFFFu16;
    for byte in bytes {
        crc ^= u16::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xA001 } else { crc >> 1 };
        }
    }
    crc.to_le_bytes()
}

/// Has this thread scheduled before all others, as a wire's characters wait for nobody; false where that takes more
/// rights than we have.
fn go_first() -> bool {
    let Ok(thread) = std::fs::read_link("/proc/thread-self") else { return false };
    let Some(id) = thread.file_name() else { return false };
    let mut chrt = Command::new("chrt");
    chrt.args(["--fifo", "--pid", "20"])
        .arg(id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    chrt.status().is_ok_and(|status| status.success())
}
