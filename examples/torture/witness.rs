//! A subscriber that reads every payload and compares it with what was handed in.
//!
//! Plain MQTT 3.1.1 at QoS 1 over a lasting session, straight to the broker. What it misses or gets twice says
//! nothing: mosquitto repeats messages to subscribers after a restart. Invariant: it only compares.

use std::io::{self, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::tally::{number, payload};

/// A running witness.
#[derive(Debug)]
pub(crate) struct Witness {
    thread: JoinHandle<()>,
    seen: Arc<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    subscribed: AtomicBool,
    compared: AtomicU64,
    corrupt: AtomicU64,
    /// One more than the number of the first corrupt message.
    first: AtomicU64,
}

impl Witness {
    /// Subscribes at a broker on this port of 127.0.0.1, and again whenever the connection breaks.
    pub(crate) fn start(port: u16) -> Witness {
        let seen = Arc::new(Seen::default());
        let shared = Arc::clone(&seen);
        let thread = std::thread::spawn(move || {
            while !shared.stop.load(Relaxed) {
                // The broker is away now and then.
                let _broken = listen(port, &shared);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        Witness { thread, seen }
    }

    /// Whether its session exists.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.seen.subscribed.load(Relaxed)
    }

    /// Payloads compared.
    pub(crate) fn compared(&self) -> u64 {
        self.seen.compared.load(Relaxed)
    }

    /// Payloads that were other than what was handed in.
    pub(crate) fn corrupt(&self) -> u64 {
        self.seen.corrupt.load(Relaxed)
    }

    /// The first message of which that is true.
    pub(crate) fn first_corrupt(&self) -> Option<u64> {
        self.seen.first.load(Relaxed).checked_sub(1)
    }

    /// Ends it.
    pub(crate) fn stop(self) {
        self.seen.stop.store(true, Relaxed);
        let _panicked = self.thread.join();
    }
}

fn listen(port: u16, seen: &Seen) -> io::Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_nodelay(true)?;
    // CONNECT: version 4, no clean session, keep alive 0, client "witness"; SUBSCRIBE "n/#" at QoS 1.
    stream.write_all(b"\x10\x13\x00\x04MQTT\x04\x00\x00\x00\x00\x07witness")?;
    stream.write_all(b"\x82\x08\x00\x01\x00\x03n/#\x01")?;
    let mut reader = BufReader::new(stream.try_clone()?);
    // One that is told to stop while nothing comes.
    stream.set_read_timeout(Some(Duration::from_millis(200)))?;
    while !seen.stop.load(Relaxed) {
        let waits = |error: io::Error| error.kind() == io::ErrorKind::WouldBlock;
        if reader.buffer().is_empty() && reader.get_ref().peek(&mut [0]).is_err_and(waits) {
            continue;
        }
        let (kind, body) = packet(&mut reader)?;
        match kind >> 4 {
            3 => stream.write_all(&published(kind, &body, seen)?)?,
            9 => seen.subscribed.store(true, Relaxed),
            _ => {}
        }
    }
    Ok(())
}

/// First byte and body of a packet.
fn packet(reader: &mut impl Read) -> io::Result<(u8, Vec<u8>)> {
    let mut byte = [0];
    reader.read_exact(&mut byte)?;
    let kind = byte[0];
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        reader.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] < 0x80 || shift > 21 {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok((kind, body))
}

/// Compares a PUBLISH; gives the PUBACK.
fn published(kind: u8, body: &[u8], seen: &Seen) -> io::Result<Vec<u8>> {
    let short = || io::Error::from(io::ErrorKind::InvalidData);
    let (length, rest) = body.split_first_chunk::<2>().ok_or_else(short)?;
    let (topic, rest) = rest.split_at_checked(u16::from_be_bytes(*length).into()).ok_or_else(short)?;
    let (id, content) = match kind >> 1 & 3 {
        0 => (None, rest),
        _ => rest.split_first_chunk::<2>().map(|(id, rest)| (Some(*id), rest)).ok_or_else(short)?,
    };
    seen.compared.fetch_add(1, Relaxed);
    let topic = String::from_utf8_lossy(topic);
    let n = number(&topic, content.len());
    if n.is_none_or(|n| payload(n).as_bytes() != content) {
        seen.corrupt.fetch_add(1, Relaxed);
        let first = n.unwrap_or_default() + 1;
        let _later = seen.first.compare_exchange(0, first, Relaxed, Relaxed);
    }
    Ok(id.map(|[high, low]| vec![0x40, 2, high, low]).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tally::topic;

    #[test]
    fn a_payload_that_is_not_what_was_handed_in_is_counted() {
        let seen = Seen::default();
        let publish = |topic: &str, content: &str| {
            let mut body = (topic.len() as u16).to_be_bytes().to_vec();
            body.extend_from_slice(topic.as_bytes());
            body.extend_from_slice(&[4, 1]);
            body.extend_from_slice(content.as_bytes());
            published(0x32, &body, &seen).expect("it is whole")
        };
        assert_eq!(publish(&topic(123), &payload(123)), [0x40, 2, 4, 1]);
        assert_eq!((seen.compared.load(Relaxed), seen.corrupt.load(Relaxed)), (1, 0));
        publish(&topic(123), &payload(123).to_uppercase());
        publish(&topic(223), &payload(123));
        publish(&topic(223), "");
        assert_eq!((seen.compared.load(Relaxed), seen.corrupt.load(Relaxed)), (4, 3));
        assert_eq!(seen.first.load(Relaxed), 124);
        assert!(published(0x32, &[0, 9, b'n'], &seen).is_err());
    }

    #[test]
    fn packets_are_taken_apart() {
        let mut bytes: &[u8] = b"\x30\x02ab\x90\x80\x01";
        assert_eq!(packet(&mut bytes).expect("it is whole"), (0x30, b"ab".to_vec()));
        assert!(packet(&mut bytes).is_err());
    }
}
