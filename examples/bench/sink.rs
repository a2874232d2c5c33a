//! A counting sink: just enough of an MQTT broker to take messages faster than any real one, so that the broker is
//! not the limit. And the count of what arrives, here or at a subscriber of a real broker.
//!
//! One thread a connection; acknowledgements of a whole read go out in one write. It keeps no session, sends nothing
//! on, and speaks both 3.1.1 and 5.0. Invariant: a message counts once it is taken over: at QoS 2 with its PUBREL.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::setting::Failure;
use crate::support::wait_until;

/// Messages whose topics begin so are counted; presence, health and the like are not.
pub(crate) const TOPIC: &str = "bench/";

/// Bytes read at once.
const READ: usize = 256 * 1024;

/// How many messages arrived so far. Clones are the same count.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count(Arc<AtomicU64>);

impl Count {
    /// So far.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    fn add(&self, messages: u64) {
        self.0.fetch_add(messages, Relaxed);
    }

    /// Waits for the first of so many.
    pub(crate) fn begin(&self, messages: u64, patience: Duration) -> Result<Instant, Failure> {
        match wait_until(patience, || self.get() > 0) {
            true => Ok(Instant::now()),
            false => {
                Err(Failure::Other(format!("none of {messages} arrived within {} s", patience.as_secs())))
            }
        }
    }

    /// Waits until so many have arrived; a failure when none comes for that long.
    pub(crate) fn reach(&self, messages: u64, patience: Duration) -> Result<(), Failure> {
        let mut last = self.get();
        while last < messages {
            if !wait_until(patience, || self.get() > last) {
                return Err(Failure::Other(format!(
                    "{last} of {messages} arrived, and none in the last {} s",
                    patience.as_secs()
                )));
            }
            last = self.get();
        }
        Ok(())
    }
}

/// A listening sink.
#[derive(Debug)]
pub(crate) struct Sink {
    port: u16,
    count: Count,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    first_byte: OnceLock<Instant>,
}

impl Sink {
    /// Listens on this port of 127.0.0.1.
    pub(crate) fn start(port: u16) -> Result<Sink, Failure> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(Failure::at("the sink's port"))?;
        let (count, shared) = (Count::default(), Arc::new(Shared::default()));
        let (counted, own) = (count.clone(), shared.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if own.stop.load(SeqCst) {
                    return;
                }
                let (counted, own) = (counted.clone(), own.clone());
                // It ends with its peer, which does not outlive its row.
                std::thread::spawn(move || serve(stream, &counted, &own));
            }
        });
        Ok(Sink { port, count, shared, thread: Some(thread) })
    }

    /// Where it listens.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// What it took.
    pub(crate) fn count(&self) -> &Count {
        &self.count
    }

    /// Waits for the first byte of the first CONNECT, and says when it came.
    pub(crate) fn first_byte(&self, within: Duration) -> Result<Instant, Failure> {
        wait_until(within, || self.shared.first_byte.get().is_some());
        let first = self.shared.first_byte.get().copied();
        first.ok_or_else(|| Failure::Other(format!("nobody connected within {} s", within.as_secs())))
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        // Wakes the thread, which then lets the port go.
        let _woken = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// Whatever goes wrong ends the connection; who is measured will notice.
fn serve(mut stream: TcpStream, count: &Count, shared: &Shared) {
    let _ = stream.set_nodelay(true);
    let mut answer = Vec::with_capacity(READ);
    let mut desk = Desk { version: 4, ours: vec![false; 1 << 16] };
    let mut reader = Packets::default();
    loop {
        let read = reader.read(&mut stream);
        if read.is_err() || shared.stop.load(Relaxed) {
            return;
        }
        let _already = shared.first_byte.set(Instant::now());
        let mut counted = 0;
        while let Some(packet) = reader.next() {
            counted += desk.answer(packet, &mut answer);
        }
        count.add(counted);
        if stream.write_all(&answer).is_err() {
            return;
        }
        answer.clear();
    }
}

/// What one connection knows.
struct Desk {
    version: u8,
    /// Packet identifiers of QoS 2 messages that count at their PUBREL.
    ours: Vec<bool>,
}

impl Desk {
    /// Answers a packet; how many messages it completes, 0 or 1.
    fn answer(&mut self, packet: &[u8], answer: &mut Vec<u8>) -> u64 {
        let v5 = self.version == 5;
        let body = body(packet);
        match packet[0] >> 4 {
            // CONNECT: length and "MQTT", then the version.
            1 => {
                self.version = body.get(6).copied().unwrap_or(4);
                let connack: &[u8] = if self.version == 5 { &[0x20, 3, 0, 0, 0] } else { &[0x20, 2, 0, 0] };
                answer.extend_from_slice(connack);
            }
            3 => {
                let topic_end = 2 + usize::from(two(body, 0));
                let counts = body.get(2..topic_end).is_some_and(|topic| topic.starts_with(TOPIC.as_bytes()));
                let id = two(body, topic_end);
                match packet[0] >> 1 & 3 {
                    0 => return u64::from(counts),
                    1 => {
                        answer.extend_from_slice(&acknowledgement(0x40, id));
                        return u64::from(counts);
                    }
                    _ => {
                        answer.extend_from_slice(&acknowledgement(0x50, id));
                        self.ours[usize::from(id)] = counts;
                    }
                }
            }
            6 => {
                let id = two(body, 0);
                answer.extend_from_slice(&acknowledgement(0x70, id));
                return u64::from(std::mem::take(&mut self.ours[usize::from(id)]));
            }
            // SUBSCRIBE, UNSUBSCRIBE: all is granted, at QoS 2.
            kind @ (8 | 10) => {
                let [high, low] = two(body, 0).to_be_bytes();
                // Properties are shorter than 128 bytes.
                let mut at = if v5 { 3 + usize::from(body.get(2).copied().unwrap_or(0)) } else { 2 };
                let mut codes = Vec::new();
                while at + 2 <= body.len() {
                    at += 2 + usize::from(two(body, at)) + usize::from(kind == 8);
                    codes.push(if kind == 8 { 2 } else { 0 });
                }
                if kind == 10 && !v5 {
                    codes.clear();
                }
                let properties: &[u8] = if v5 { &[0] } else { &[] };
                let length = 2 + properties.len() + codes.len();
                answer.extend_from_slice(&[(kind + 1) << 4, u8::try_from(length).unwrap_or(127), high, low]);
                answer.extend_from_slice(properties);
                answer.extend_from_slice(&codes);
            }
            12 => answer.extend_from_slice(&[0xd0, 0]),
            _ => {}
        }
        0
    }
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP, in the form that both versions know.
pub(crate) fn acknowledgement(first_byte: u8, id: u16) -> [u8; 4] {
    let [high, low] = id.to_be_bytes();
    [first_byte, 2, high, low]
}

/// Two bytes as a number, big-endian; 0 where there are none.
pub(crate) fn two(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |two| u16::from_be_bytes([two[0], two[1]]))
}

/// What follows the fixed header.
pub(crate) fn body(packet: &[u8]) -> &[u8] {
    let length = packet.iter().skip(1).position(|byte| byte & 0x80 == 0).unwrap_or(0);
    packet.get(length + 2..).unwrap_or_default()
}

/// Cuts a stream into MQTT packets.
#[derive(Debug, Default)]
pub(crate) struct Packets {
    buffer: Vec<u8>,
    /// The unread part.
    from: usize,
    to: usize,
}

impl Packets {
    /// Reads what there is, at least one byte.
    pub(crate) fn read(&mut self, stream: &mut impl Read) -> std::io::Result<()> {
        self.buffer.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        let room = (self.to + READ).next_multiple_of(READ);
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        match stream.read(&mut self.buffer[self.to..])? {
            0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
            bytes => {
                self.to += bytes;
                Ok(())
            }
        }
    }

    /// The next whole packet.
    pub(crate) fn next(&mut self) -> Option<&[u8]> {
        let unread = &self.buffer[self.from..self.to];
        let mut length = 0;
        for (place, byte) in unread.iter().skip(1).take(4).enumerate() {
            length |= usize::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                let end = place + 2 + length;
                let packet = unread.get(..end)?;
                self.from += end;
                return Some(packet);
            }
        }
        None
    }
}

/// Counts what a real broker hands to a subscriber, at QoS 0 so that counting costs it little. Ends with the broker.
pub(crate) fn subscribe(port: u16) -> Result<Count, Failure> {
    let failed = || Failure::at("the counting subscriber");
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(failed())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(failed())?;
    let mut reader = Packets::default();
    stream.write_all(&connect("counter")).map_err(failed())?;
    while reader.next().is_none() {
        reader.read(&mut stream).map_err(failed())?;
    }
    let filter = format!("{TOPIC}#");
    let length = u8::try_from(filter.len()).unwrap_or(0);
    stream
        .write_all(&[&[0x82, length + 5, 0, 1, 0, length], filter.as_bytes(), &[0]].concat())
        .map_err(failed())?;
    while reader.next().is_none() {
        reader.read(&mut stream).map_err(failed())?;
    }
    stream.set_read_timeout(None).map_err(failed())?;
    let count = Count::default();
    let counted = count.clone();
    std::thread::spawn(move || {
        while reader.read(&mut stream).is_ok() {
            let mut messages = 0;
            while let Some(packet) = reader.next() {
                messages += u64::from(packet[0] >> 4 == 3);
            }
            counted.add(messages);
        }
    });
    Ok(count)
}

/// CONNECT of MQTT 3.1.1 with a clean session and no keep alive.
pub(crate) fn connect(client_id: &str) -> Vec<u8> {
    let length = u8::try_from(client_id.len()).unwrap_or(0);
    let head = [0x10, 12 + length, 0, 4, b'M', b'Q', b'T', b'T', 4, 2, 0, 0, 0, length];
    [&head, client_id.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_cut_alike_however_the_stream_arrives() {
        let long = [&[0x30, 0xac, 0x02][..], &[7; 300]].concat();
        let stream = [&[0xd0, 0][..], &long, &[0x40, 2, 0, 9]].concat();
        for chunk in [1, 2, 3, 100, stream.len()] {
            let (mut reader, mut packets) = (Packets::default(), Vec::new());
            for mut part in stream.chunks(chunk) {
                reader.read(&mut part).expect("there are bytes");
                while let Some(packet) = reader.next() {
                    packets.push(packet.to_vec());
                }
            }
            assert_eq!(packets, [vec![0xd0, 0], long.clone(), vec![0x40, 2, 0, 9]], "by {chunk}");
        }
        assert_eq!(body(&long), [7; 300]);
    }

    #[test]
    fn a_message_counts_once_and_at_qos_2_with_its_pubrel() {
        let mut desk = Desk { version: 4, ours: vec![false; 1 << 16] };
        let mut answer = Vec::new();
        let publish = |first, topic: &str| {
            let length = topic.len() as u8;
            [&[first, length + 5, 0, length], topic.as_bytes(), &[0, 9, b'x']].concat()
        };
        assert_eq!(desk.answer(&publish(0x32, "bench/a"), &mut answer), 1);
        assert_eq!(desk.answer(&publish(0x32, "fieldpost/g1/state"), &mut answer), 0);
        assert_eq!(desk.answer(&publish(0x34, "bench/a"), &mut answer), 0);
        assert_eq!(desk.answer(&[0x62, 2, 0, 9], &mut answer), 1);
        assert_eq!(desk.answer(&[0x62, 2, 0, 9], &mut answer), 0);
        let expected = [[0x40, 2, 0, 9], [0x40, 2, 0, 9], [0x50, 2, 0, 9], [0x70, 2, 0, 9], [0x70, 2, 0, 9]];
        assert_eq!(answer, expected.concat());
    }
}
