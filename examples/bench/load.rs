//! Producers: messages handed to fieldpost's control socket or to a local broker, each waiting for its "accepted".
//!
//! Invariant: never more messages between producer and far end than the gate lets in, and a message counts as handed
//! in only when it was acknowledged.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::setting::Failure;
use crate::sink::{Count, Packets, TOPIC, acknowledgement, body, connect, two};

/// Bytes of a payload.
pub(crate) const PAYLOAD: usize = 200;
/// Messages a producer hands in ahead of their answers: as many as the agent reads ahead on a control connection.
pub(crate) const AHEAD: u64 = 250;
/// Producers at a time.
pub(crate) const PRODUCERS: u64 = 4;
/// Different messages; then they come again.
const POOL: usize = 5000;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a producer looks whether the far end has caught up.
const LOOK: Duration = Duration::from_micros(200);

/// Payloads that nothing like LZ4 makes shorter: random letters and digits, 6 bits each.
pub(crate) fn incompressible(count: usize) -> Vec<String> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut random = fastrand::Rng::with_seed(1);
    let mut letter = || char::from(DIGITS[random.usize(..DIGITS.len())]);
    (0..count).map(|_| (0..PAYLOAD).map(|_| letter()).collect()).collect()
}

/// Payloads as the agent makes them from a meter that is read each second: its format, values that change slowly.
pub(crate) fn telemetry(count: usize) -> Vec<String> {
    let mut random = fastrand::Rng::with_seed(1);
    let (mut voltage, mut energy) = (2301_i32, 4_012_345_u32);
    let mut payload = |n: usize| {
        voltage += random.i32(-2..=2);
        energy += random.u32(0..=1);
        let (hour, minute, second) = (n / 3600 % 24, n / 60 % 60, n % 60);
        format!(
            "{{\"v\":1,\"gateway\":\"press-shop-1\",\"line\":\"line1\",\"unit\":\"meter1\",\
             \"at\":\"2026-11-21T{hour:02}:{minute:02}:{second:02}.{}Z\",\"clock\":\"ok\",\"values\":\
             {{\"voltage\":{{\"value\":{}.{},\"unit\":\"V\",\"quality\":\"good\"}},\
             \"energy\":{{\"value\":{}.{:02},\"quality\":\"good\"}}}},\"epoch\":1,\"seq\":{}}}",
            random.u32(660..663),
            voltage / 10,
            voltage % 10,
            energy / 100,
            energy % 100,
            n + 1
        )
    };
    (0..count).map(&mut payload).collect()
}

/// Where messages are handed in.
#[derive(Debug, Clone)]
pub(crate) enum Door {
    /// The agent's control socket.
    Control(PathBuf),
    /// A broker on 127.0.0.1.
    Broker(u16),
}

/// Messages as their bytes on the wire, of one QoS; packet identifiers are written into them later.
#[derive(Debug, Clone)]
pub(crate) struct Messages {
    qos: u8,
    payloads: Arc<Vec<String>>,
}

impl Messages {
    /// Of these payloads, one after the other, again and again.
    pub(crate) fn of(qos: u8, payloads: Vec<String>) -> Messages {
        Messages { qos, payloads: Arc::new(payloads) }
    }

    /// Incompressible ones.
    pub(crate) fn ordinary(qos: u8) -> Messages {
        Messages::of(qos, incompressible(POOL))
    }

    fn rendered(&self, door: &Door) -> Vec<Vec<u8>> {
        let topic = |n: usize| format!("{TOPIC}t{}", n % 8);
        let one = |(n, payload): (usize, &String)| match door {
            Door::Control(_) => {
                let publish = serde_json::json!({"topic": topic(n), "qos": self.qos, "text": payload});
                format!("{}\n", serde_json::json!({"publish": publish})).into_bytes()
            }
            Door::Broker(_) => {
                let topic = topic(n);
                let mut length = 2 + topic.len() + 2 + payload.len();
                let mut packet = vec![0x30 | self.qos << 1];
                while length >= 128 {
                    packet.push((length % 128) as u8 | 0x80);
                    length /= 128;
                }
                packet.push(length as u8);
                packet.extend_from_slice(&[0, topic.len() as u8]);
                packet.extend_from_slice(topic.as_bytes());
                packet.extend_from_slice(&[0, 0]);
                packet.extend_from_slice(payload.as_bytes());
                packet
            }
        };
        self.payloads.iter().enumerate().map(one).collect()
    }
}

/// How many messages may be under way, from producer to far end.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    /// Handed in, or being handed in.
    begun: Arc<AtomicU64>,
    /// What arrived at the far end, and how many more may be under way; `None` for a fill.
    bound: Option<(Count, u64)>,
    /// All that there are.
    total: u64,
}

impl Gate {
    /// As many messages as possible, but never more than so many that have not arrived.
    pub(crate) fn closed_loop(arrived: &Count, most: u64) -> Gate {
        Gate { begun: Arc::default(), bound: Some((arrived.clone(), most)), total: u64::MAX }
    }

    /// So many messages, whether they arrive or not.
    pub(crate) fn fill(total: u64) -> Gate {
        Gate { begun: Arc::default(), bound: None, total }
    }

    /// Room for up to so many more, which are then begun.
    fn enter(&self, wanted: u64) -> u64 {
        let begun = self.begun.load(Relaxed);
        let room = self
            .bound
            .as_ref()
            .map_or(u64::MAX, |(arrived, most)| most.saturating_sub(begun.saturating_sub(arrived.get())));
        let granted = wanted.min(room).min(self.total.saturating_sub(begun));
        match self.begun.compare_exchange(begun, begun + granted, Relaxed, Relaxed) {
            Ok(_) => granted,
            Err(_) => 0,
        }
    }

    fn is_done(&self) -> bool {
        self.begun.load(Relaxed) >= self.total
    }
}

/// Running producers.
#[derive(Debug)]
pub(crate) struct Producers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<(), Failure>>>,
}

impl Producers {
    /// Connects them, and starts.
    pub(crate) fn start(door: &Door, messages: &Messages, gate: &Gate) -> Result<Producers, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let rendered = Arc::new(messages.rendered(door));
        for n in 0..PRODUCERS {
            let mut producer = Producer::connect(door, n, messages.qos, rendered.clone())?;
            let (gate, stop) = (gate.clone(), stop.clone());
            threads.push(std::thread::spawn(move || producer.run(&gate, &stop)));
        }
        Ok(Producers { stop, threads })
    }

    /// Waits for the answers that are still to come, and hands in nothing more.
    pub(crate) fn stop(self) -> Result<(), Failure> {
        self.stop.store(true, Relaxed);
        self.finish()
    }

    /// Waits until everything is handed in.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        let panicked = |_| Failure::Other("a producer panicked".to_owned());
        self.threads.into_iter().try_for_each(|thread| thread.join().map_err(panicked)?)
    }
}

enum Stream {
    Control(UnixStream),
    Broker(TcpStream),
}

impl Stream {
    fn parts(&mut self) -> (&mut dyn Read, bool) {
        match self {
            Stream::Control(stream) => (stream, true),
            Stream::Broker(stream) => (stream, false),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stream::Control(stream) => stream.write_all(bytes),
            Stream::Broker(stream) => stream.write_all(bytes),
        }
    }
}

struct Producer {
    stream: Stream,
    qos: u8,
    rendered: Arc<Vec<Vec<u8>>>,
    next: usize,
    id: u16,
    out: Vec<u8>,
    lines: Vec<u8>,
    packets: Packets,
}

impl Producer {
    fn connect(door: &Door, n: u64, qos: u8, rendered: Arc<Vec<Vec<u8>>>) -> Result<Producer, Failure> {
        let failed = || Failure::at("a producer's connection");
        let mut packets = Packets::default();
        let stream = match door {
            Door::Control(path) => {
                let stream = UnixStream::connect(path).map_err(failed())?;
                stream.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
                Stream::Control(stream)
            }
            Door::Broker(port) => {
                let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).map_err(failed())?;
                stream.set_nodelay(true).map_err(failed())?;
                stream.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
                stream.write_all(&connect(&format!("producer{n}"))).map_err(failed())?;
                while packets.next().is_none() {
                    packets.read(&mut stream).map_err(failed())?;
                }
                Stream::Broker(stream)
            }
        };
        let next = n as usize * rendered.len() / PRODUCERS as usize;
        Ok(Producer { stream, qos, rendered, next, id: 0, out: Vec::new(), lines: Vec::new(), packets })
    }

    fn run(&mut self, gate: &Gate, stop: &AtomicBool) -> Result<(), Failure> {
        let mut ahead = 0;
        loop {
            let goes_on = !stop.load(Relaxed);
            if goes_on {
                let granted = gate.enter(AHEAD - ahead);
                (0..granted).for_each(|_| self.add());
                ahead += granted;
            }
            self.stream.write(&self.out).map_err(Failure::at("handing messages in"))?;
            self.out.clear();
            if ahead == 0 {
                if !goes_on || gate.is_done() {
                    return Ok(());
                }
                std::thread::sleep(LOOK);
                continue;
            }
            ahead -= self.hear()?;
        }
    }

    fn add(&mut self) {
        let message = &self.rendered[self.next % self.rendered.len()];
        self.next += 1;
        let begin = self.out.len();
        self.out.extend_from_slice(message);
        if matches!(self.stream, Stream::Broker(_)) {
            self.id = if self.id == u16::MAX { 1 } else { self.id + 1 };
            let content = body(message);
            let header = message.len() - content.len();
            let at = begin + header + 2 + usize::from(two(content, 0));
            self.out[at..at + 2].copy_from_slice(&self.id.to_be_bytes());
        }
    }

    /// Waits for answers; how many messages were accepted.
    fn hear(&mut self) -> Result<u64, Failure> {
        let (stream, control) = self.stream.parts();
        if control { Producer::hear_lines(stream, &mut self.lines) } else { self.hear_packets() }
    }

    fn hear_lines(stream: &mut dyn Read, lines: &mut Vec<u8>) -> Result<u64, Failure> {
        let mut buffer = [0; 16 * 1024];
        let bytes = stream.read(&mut buffer).map_err(Failure::at("an answer of the control socket"))?;
        if bytes == 0 {
            return Err(Failure::Other("the agent closed its control socket".to_owned()));
        }
        lines.extend_from_slice(&buffer[..bytes]);
        let end = lines.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let mut accepted = 0;
        for line in lines[..end].split_inclusive(|byte| *byte == b'\n') {
            if !line.starts_with(br#"{"accepted""#) {
                return Err(Failure::Other(format!("not accepted: {}", String::from_utf8_lossy(line))));
            }
            accepted += 1;
        }
        lines.drain(..end);
        Ok(accepted)
    }

    fn hear_packets(&mut self) -> Result<u64, Failure> {
        let Stream::Broker(stream) = &mut self.stream else { return Ok(0) };
        self.packets.read(stream).map_err(Failure::at("an acknowledgement of the local broker"))?;
        let last = if self.qos == 2 { 7 } else { 4 };
        let mut accepted = 0;
        while let Some(packet) = self.packets.next() {
            match packet[0] >> 4 {
                5 => self.out.extend_from_slice(&acknowledgement(0x62, two(body(packet), 0))),
                kind if kind == last => accepted += 1,
                _ => {}
            }
        }
        Ok(accepted)
    }
}
