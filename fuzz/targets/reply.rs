//! Modbus TCP replies to samples: the real task of a line against a server that says what the bytes say.
//!
//! Silence is left out: a server that has sent the half of a reply closes the connection, so that no run waits.

use std::cell::RefCell;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use fieldpost::point::{Fault, PointIndex, Sample, Value};
use fieldpost::progress::Pulse;
use fieldpost::source::modbus::register::{Encoding, Kind, Order};
use fieldpost::source::modbus::{self, LateReplies, Line, LinePoint, LineStatus, Space, Transport, Unit};
use fieldpost::stats::Stats;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

/// Every point has one sample; it is a value only if a reply of the right function and length held it; and it is one
/// (or no number at all) if every reply was as the standard has it.
pub(crate) fn reply(data: &[u8]) {
    run(data, 0);
}

/// The negative control: a server that notes another byte than it sends.
pub(crate) fn misread_reply(data: &[u8]) {
    run(data, 1);
}

fn run(data: &[u8], noted_wrong: u8) {
    let [count, rest @ ..] = data else { return };
    let Some((points, script)) = rest.split_at_checked(usize::from(count % 4 + 1) * 3) else { return };
    let points: Vec<LinePoint> =
        points.chunks_exact(3).enumerate().map(|(n, bytes)| point(n, bytes)).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let server = Server { script: RefCell::new(script), ..Server::default() };
    let samples = runtime.expect("a runtime").block_on(samples(&points, &server));
    let said = server.said.into_inner();
    assert_eq!(samples.len(), points.len());
    for (sample, point) in samples.iter().zip(&points) {
        assert_eq!(sample.point, point.index);
        let was_said = said.iter().any(|said| said.holds(point, sample, noted_wrong));
        match &sample.value {
            Ok(value) => {
                assert!(value.as_f64().is_finite());
                assert!(was_said, "{value} was never said of {point:?}");
            }
            Err(fault) if said.iter().all(|said| said.as_it_should_be) => {
                assert!(was_said, "{fault}, although every reply was good: {point:?}");
            }
            Err(fault) => assert!(!fault.to_string().is_empty()),
        }
    }
}

fn point(n: usize, bytes: &[u8]) -> LinePoint {
    const KINDS: [Kind; 5] = [Kind::U16, Kind::I16, Kind::U32, Kind::I32, Kind::F32];
    const ORDERS: [Order; 4] = [Order::Abcd, Order::Cdab, Order::Badc, Order::Dcba];
    const SCALES: [Option<f64>; 4] = [None, Some(0.1), Some(-0.001), Some(1e300)];
    const SPACES: [Space; 4] = [Space::Holding, Space::Input, Space::Coil, Space::DiscreteInput];
    let space = SPACES[usize::from(bytes[0] % 4)];
    let kind = if space.is_bits() { Kind::Bool } else { KINDS[usize::from(bytes[0] >> 2) % 5] };
    LinePoint {
        index: PointIndex(n),
        name: "point".into(),
        space,
        address: u16::from(bytes[2] % 40),
        encoding: Encoding {
            kind,
            order: ORDERS[usize::from(bytes[1] % 4)],
            scale: SCALES[usize::from(bytes[1] >> 2) % 4].filter(|_| kind != Kind::Bool),
        },
        every: Duration::from_secs(3_600),
        writable: None,
    }
}

/// What the task of a line makes of one round of replies.
async fn samples(points: &[LinePoint], server: &Server<'_>) -> Vec<Sample> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let line = Line {
        name: "line".into(),
        transport: Transport::Tcp { host: "127.0.0.1".to_owned(), port },
        timeout: Duration::from_secs(10),
        late_replies: LateReplies::Discard,
        pulse: Pulse::default(),
        units: vec![Unit { name: "unit".into(), unit: 1, points: points.to_vec() }],
    };
    let (readings, mut read) = mpsc::channel(4);
    let (_writes, no_writes) = mpsc::channel(1);
    let (written, _written) = mpsc::channel(1);
    let (status, _status) = watch::channel(LineStatus::of(&line));
    let (_stop, stop) = watch::channel(false);
    tokio::select! {
        reading = read.recv() => reading.expect("the line runs").samples,
        () = modbus::run(line, readings, no_writes, written, status, Arc::default(), stop) => panic!("the line ended"),
        () = server.serve(&listener) => panic!("the server ended"),
    }
}

/// A server that answers by a script.
#[derive(Default)]
struct Server<'a> {
    script: RefCell<&'a [u8]>,
    said: RefCell<Vec<Said>>,
}

/// One request, and everything that was sent on its connection from the connection's beginning.
#[derive(Debug)]
struct Said {
    function: u8,
    address: u16,
    count: u16,
    bytes: Vec<u8>,
    as_it_should_be: bool,
}

/// Of how a reply is made: not at all.
const CLOSE: u8 = 9;

/// Whether these bytes are whole frames, so that nobody waits for the rest of one.
fn is_whole(mut bytes: &[u8]) -> bool {
    while let [_, _, _, _, high, low, rest @ ..] = bytes {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        match rest.split_at_checked(length) {
            Some((_, rest)) if length > 0 => bytes = rest,
            _ => return false,
        }
    }
    bytes.is_empty()
}

impl Server<'_> {
    async fn serve(&self, listener: &TcpListener) {
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            stream.set_nodelay(true).expect("a TCP connection");
            self.talk(stream).await;
        }
    }

    /// Until the other side, or the script, closes the connection.
    async fn talk(&self, mut stream: TcpStream) {
        let mut sent = Vec::new();
        let mut request = [0; 12];
        while stream.read_exact(&mut request).await.is_ok() {
            let (bytes, how) = self.next(&request);
            sent.extend_from_slice(&bytes);
            self.said.borrow_mut().push(Said {
                function: request[7],
                address: u16::from_be_bytes([request[8], request[9]]),
                count: u16::from_be_bytes([request[10], request[11]]),
                bytes: sent.clone(),
                as_it_should_be: how & 0x0f == 0,
            });
            for piece in bytes.chunks(if how & 0x10 != 0 { 5 } else { 512 }) {
                if stream.write_all(piece).await.is_err() {
                    return;
                }
                tokio::task::yield_now().await;
            }
            if bytes.is_empty() || !is_whole(&sent) {
                return;
            }
        }
    }

    /// The reply to a request, and how it was made: 0 in the low four bits is as the standard has it.
    fn next(&self, request: &[u8; 12]) -> (Vec<u8>, u8) {
        let mut script = self.script.borrow_mut();
        let mut take = |count: usize| -> Vec<u8> {
            let (taken, rest) = script.split_at(count.min(script.len()));
            *script = rest;
            taken.to_vec()
        };
        let how = take(1).first().copied().unwrap_or(CLOSE);
        let count = usize::from(u16::from_be_bytes([request[10], request[11]]));
        let bytes = if request[7] <= 2 { count.div_ceil(8) } else { count * 2 };
        let mut content = take(bytes);
        content.resize(bytes, 0);
        let mut pdu = [&[request[7], bytes as u8], &content[..]].concat();
        let mut header = request[..7].to_vec();
        let mut extra = Vec::new();
        let odd = |bytes: Vec<u8>| bytes.first().copied().unwrap_or(1);
        match how & 0x0f {
            0 => {}
            1 => pdu = vec![request[7] | 0x80, odd(take(1))],
            2 => pdu[0] = odd(take(1)),
            3 => pdu[1] = odd(take(1)),
            4 => pdu.truncate(usize::from(odd(take(1)))),
            5 => pdu.extend(take(4)),
            6 => header[1] ^= odd(take(1)),
            7 => header[6] = odd(take(1)),
            8 => extra = take(16),
            CLOSE => return (Vec::new(), CLOSE),
            10 => return (take(24), 10),
            11 => pdu = [&pdu[..], &take(255)].concat(),
            12 => pdu = take(16),
            13 => header[2] = odd(take(1)),
            14 => {
                let count = usize::from(odd(take(1)) % 8);
                pdu = [&[request[7], (count * 2) as u8], &take(count * 2)[..]].concat();
            }
            _ => {}
        }
        let length = (pdu.len() as u16 + 1).to_be_bytes();
        header[4..6].copy_from_slice(&length);
        if how & 0x0f == 15 {
            header[5] = odd(take(1));
        }
        ([header, pdu, extra].concat(), how)
    }
}

impl Said {
    /// Whether the sample could be read out of what was said, by its function and length alone.
    fn holds(&self, point: &LinePoint, sample: &Sample, wrong: u8) -> bool {
        let function = match point.space {
            Space::Coil => 1,
            Space::DiscreteInput => 2,
            Space::Holding => 3,
            Space::Input => 4,
        };
        let bits = point.space.is_bits();
        let (count, words) = (usize::from(self.count), usize::from(point.encoding.words()));
        let offset = usize::from(point.address.wrapping_sub(self.address));
        let length = if bits { count.div_ceil(8) } else { count * 2 };
        let is_asked = self.function == function && offset + words <= count;
        let is_reply = |pdu: &&[u8]| is_asked && usize::from(pdu[1]) == length && pdu[0] == function;
        self.bytes.windows(2 + length).filter(is_reply).any(|pdu| {
            if bits {
                let bit = (pdu[2 + offset / 8] >> (offset % 8)) & 1 != wrong;
                return sample.value == Ok(Value::Bool(bit));
            }
            let mut bytes = [0; 4];
            bytes[..words * 2].copy_from_slice(&pdu[2 + offset * 2..][..words * 2]);
            bytes[0] ^= wrong;
            means(&point.encoding, bytes, &sample.value)
        })
    }
}

/// Whether `sample` is what these bytes mean, of which a 16-bit type has the first two.
fn means(encoding: &Encoding, [a, b, c, d]: [u8; 4], sample: &Result<Value, Fault>) -> bool {
    let bytes = match encoding.order {
        Order::Abcd => [a, b, c, d],
        Order::Cdab => [c, d, a, b],
        Order::Badc => [b, a, d, c],
        Order::Dcba => [d, c, b, a],
    };
    let number = match encoding.kind {
        Kind::U16 => f64::from(u16::from_be_bytes([a, b])),
        Kind::I16 => f64::from(i16::from_be_bytes([a, b])),
        Kind::U32 => f64::from(u32::from_be_bytes(bytes)),
        Kind::I32 => f64::from(i32::from_be_bytes(bytes)),
        Kind::F32 | Kind::Bool => f64::from(f32::from_be_bytes(bytes)),
    };
    let scale = encoding.scale.unwrap_or(1.0);
    match sample {
        Ok(Value::Integer(integer)) => {
            encoding.scale.is_none() && encoding.kind != Kind::F32 && *integer as f64 == number
        }
        // A float is told by the shortest decimal that names it: of the smallest, that is a coarse one.
        Ok(Value::Float(float)) => (float / scale - number).abs() <= number.abs() * 1e-6 + 1e-44,
        Err(Fault::NotANumber { .. }) => !(number * scale).is_finite(),
        _ => false,
    }
}
