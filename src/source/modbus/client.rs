//! The wire of one Modbus line: opens it, sends one request at a time, checks the reply, gets back in step after
//! a reply that did not come. The only file that knows tokio-modbus and tokio-serial.
//!
//! Invariant: a reply is handed out only for the request it answers, and only with the length that was asked
//! for. Whatever else arrives is thrown away, and the line is silent or reconnected before the next request.

use std::borrow::Cow;
use std::io;
use std::pin::Pin;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_modbus::client::{Client as _, Context, rtu, tcp};
use tokio_modbus::prelude::SlaveContext as _;
use tokio_modbus::{Error, ProtocolError, Request, Response, Slave};
use tokio_serial::{ClearBuffer, SerialPort as _, SerialStream};

use super::plan::Read;
use super::register::Words;
use super::silence::Silence;
use super::{LateReplies, Line, Parity, SerialPort, Space, Transport};
use crate::point::Fault;

/// A connection is waited for at least this long: mobile links need it, whatever the reply timeout.
const SHORTEST_CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest RTU frame (Modbus over serial line V1.02, 2.5.1.1).
const LONGEST_FRAME: u32 = 256;
/// Bits of one character on the wire: start, 8 data, parity or second stop, stop (V1.02, 2.5.1).
const BITS_PER_CHARACTER: u32 = 11;
/// The silence between frames above 19200 bit/s; below it is 3.5 characters (V1.02, 2.5.1.1).
const SHORTEST_GAP: Duration = Duration::from_micros(1_750);

/// The checked content of a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// Coils or discrete inputs: at least as many as were asked for.
    Bits(Vec<bool>),
    /// Registers: exactly as many as were asked for.
    Registers(Vec<u16>),
}

/// Why a request had no success, by what it says about the unit and the line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The unit answered with this exception code: it is alive.
    Refused(u8),
    /// The unit answered, but not what was asked: it is alive, and the answer useless.
    Wrong(Fault),
    /// No answer of this unit came, or none that could be told from noise.
    Silent(Fault),
    /// The port or connection failed.
    Broken(String),
}

/// One line's port or connection.
pub struct Client {
    transport: Transport,
    timeout: Duration,
    late_replies: LateReplies,
    link: Link,
    /// Whether the open link has carried an answer.
    proven: bool,
    /// When the last byte went over the line, as far as we know.
    last_activity: Instant,
    silence: Silence,
}

enum Link {
    Tcp(Context),
    /// The receiver gets the port back when the context is dropped.
    Rtu(Context, oneshot::Receiver<SerialStream>),
    Down(String),
}

impl Client {
    /// A client of this line, not open yet.
    pub fn new(line: &Line) -> Self {
        Client {
            transport: line.transport.clone(),
            timeout: line.timeout,
            late_replies: line.late_replies,
            link: Link::Down("not opened yet".to_owned()),
            proven: false,
            last_activity: Instant::now(),
            silence: Silence::default(),
        }
    }

    /// Why the line is not open; `None` when it is.
    pub fn down(&self) -> Option<&str> {
        match &self.link {
            Link::Down(why) => Some(why),
            Link::Tcp(_) | Link::Rtu(..) => None,
        }
    }

    /// Whether the open link has carried an answer: an open that leads to nothing is no success.
    pub fn is_proven(&self) -> bool {
        self.proven
    }

    /// Opens the port, or connects, anew. Afterwards [`Self::down`] says whether and why not.
    pub async fn open(&mut self) {
        self.close("being opened");
        let opened = match &self.transport {
            Transport::Rtu(port) => open_port(port).map(lend),
            Transport::Tcp { host, port } => {
                connect(host, *port, self.timeout.max(SHORTEST_CONNECT_TIMEOUT)).await
            }
        };
        self.link = opened.unwrap_or_else(Link::Down);
    }

    /// Sends one read and waits for its reply.
    ///
    /// # Errors
    /// See [`Failure`]. Afterwards the line is in step again, or [`Self::down`].
    pub async fn read(&mut self, unit: u8, read: &Read) -> Result<Data, Failure> {
        let may_be_stale = self.proven && matches!(self.link, Link::Tcp(_));
        match self.attempt(unit, read).await {
            // Many servers close an idle connection. That is found out here, and is no outage.
            Err(Failure::Broken(_)) if may_be_stale => {
                self.open().await;
                self.attempt(unit, read).await
            }
            outcome => outcome,
        }
    }

    /// Sends one write, once, and waits for its confirmation. The shortest function that takes the words is used:
    /// 5 for a coil, 6 for one register, 16 for two, because half of a 32-bit value is a wrong one.
    ///
    /// # Errors
    /// See [`Failure`]; unless [`Self::down`] before, the request may have been carried out. Afterwards the line is
    /// in step again, or [`Self::down`].
    pub async fn write(&mut self, unit: u8, address: u16, words: Words) -> Result<(), Failure> {
        const LONGEST_REQUEST_AND_REPLY: u32 = 13 + 8;
        let patience = self.timeout + self.on_the_wire(LONGEST_REQUEST_AND_REPLY);
        let request = match words {
            Words::Bit(bit) => Request::WriteSingleCoil(address, bit),
            Words::One(register) => Request::WriteSingleRegister(address, register),
            Words::Two(registers) => Request::WriteMultipleRegisters(address, Cow::Owned(registers.to_vec())),
        };
        let reply = self.exchange(unit, request, patience).await;
        let outcome = reply.and_then(|response| {
            confirmed(&response, address, words).map_err(|what| Failure::Wrong(Fault::BadReply { what }))
        });
        self.settle(outcome).await
    }

    async fn attempt(&mut self, unit: u8, read: &Read) -> Result<Data, Failure> {
        let reply = self.exchange(unit, request(read), self.patience(read)).await;
        let outcome = reply.and_then(|response| {
            checked(response, read).map_err(|what| Failure::Wrong(Fault::BadReply { what }))
        });
        self.settle(outcome).await
    }

    /// Sends one request and waits for its reply; [`Self::settle`] must follow.
    async fn exchange(
        &mut self,
        unit: u8,
        request: Request<'static>,
        patience: Duration,
    ) -> Result<Response, Failure> {
        self.wait_for_gap().await;
        let context = match &mut self.link {
            Link::Tcp(context) | Link::Rtu(context, _) => context,
            Link::Down(why) => return Err(Failure::Broken(why.clone())),
        };
        context.set_slave(Slave(unit));
        let reply = timeout(patience, context.call(request)).await;
        self.last_activity = Instant::now();
        match reply {
            Err(_) => Err(Failure::Silent(Fault::Timeout { waited_ms: patience.as_millis() as u64 })),
            Ok(Err(error)) => Err(self.failure(error)),
            Ok(Ok(Err(exception))) => Err(refusal(exception.into())),
            Ok(Ok(Ok(response))) => Ok(response),
        }
    }

    /// Brings the line back in step after `outcome`.
    async fn settle<T>(&mut self, outcome: Result<T, Failure>) -> Result<T, Failure> {
        match &outcome {
            Ok(_) | Err(Failure::Refused(_) | Failure::Silent(Fault::Exception { .. })) => self.proven = true,
            Err(Failure::Broken(why)) => self.close(why),
            // On RTU a reply of the wrong length may be a late one, with the right one yet to come.
            Err(Failure::Wrong(_)) if matches!(self.link, Link::Tcp(_)) => self.proven = true,
            Err(Failure::Wrong(_) | Failure::Silent(_)) => match self.link {
                Link::Rtu(..) => self.fall_silent().await,
                // A new connection cannot carry the replies of the old one.
                Link::Tcp(_) => self.open().await,
                Link::Down(_) => {}
            },
        }
        outcome
    }

    /// What an error of tokio-modbus means. Its decoder's errors come as `io::Error` too, but only those of
    /// the operating system carry a number.
    fn failure(&self, error: Error) -> Failure {
        use io::ErrorKind::{InvalidData, InvalidInput, UnexpectedEof, Unsupported};
        let noise = |what: String| Failure::Silent(Fault::BadReply { what });
        match error {
            Error::Protocol(ProtocolError::HeaderMismatch { message, .. }) => {
                noise(format!("it answers another request or comes from another unit ({message})"))
            }
            Error::Protocol(ProtocolError::FunctionCodeMismatch { request, .. }) => {
                noise(format!("it has another function code than the request's {:#04x}", request.value()))
            }
            Error::Transport(error)
                if error.raw_os_error().is_none()
                    && matches!(error.kind(), InvalidData | InvalidInput | UnexpectedEof | Unsupported) =>
            {
                noise(format!("it is malformed ({error})"))
            }
            Error::Transport(error) => Failure::Broken(match &self.transport {
                Transport::Tcp { host, port } => format!("{host}:{port}: {error}"),
                Transport::Rtu(port) => {
                    format!("{} failed: {error}; will be opened again", port.device.display())
                }
            }),
        }
    }

    /// How long the reply to `read` is waited for: the timeout, and on a serial line the time of the bytes.
    fn patience(&self, read: &Read) -> Duration {
        const REQUEST_AND_REPLY_FRAMES: u32 = 8 + 5;
        let data = if read.space.is_bits() { read.count.div_ceil(8) } else { read.count.saturating_mul(2) };
        self.timeout + self.on_the_wire(REQUEST_AND_REPLY_FRAMES + u32::from(data))
    }

    /// How long so many characters take; nothing on TCP.
    fn on_the_wire(&self, characters: u32) -> Duration {
        match &self.transport {
            Transport::Tcp { .. } => Duration::ZERO,
            Transport::Rtu(port) => {
                Duration::from_secs(1) * characters * BITS_PER_CHARACTER / port.baud_rate.max(1)
            }
        }
    }

    /// The silence that separates two frames (V1.02, 2.5.1.1).
    fn gap(&self) -> Duration {
        match &self.transport {
            Transport::Tcp { .. } => Duration::ZERO,
            Transport::Rtu(port) if port.baud_rate > 19_200 => SHORTEST_GAP,
            Transport::Rtu(_) => self.on_the_wire(7) / 2,
        }
    }

    async fn wait_for_gap(&mut self) {
        let free = self.last_activity + self.gap();
        if Instant::now() < free {
            self.silence.until(free).await;
        }
    }

    /// Sends nothing until the longest reply would have ended, and throws away what arrives: a late reply
    /// would otherwise be taken for the answer to the next request (measured).
    async fn fall_silent(&mut self) {
        if self.late_replies == LateReplies::Trust {
            return;
        }
        let Some(mut port) = self.take_port() else { return self.close("the port was lost") };
        let longest_reply = self.on_the_wire(LONGEST_FRAME);
        let until = Instant::now() + self.timeout + longest_reply;
        match drain(&mut port, until, self.gap(), until + self.timeout + longest_reply).await {
            Ok(()) => self.link = lend(port),
            Err(error) => self.close(&format!("the port failed: {error}; will be opened again")),
        }
        self.last_activity = Instant::now();
    }

    fn take_port(&mut self) -> Option<SerialStream> {
        match std::mem::replace(&mut self.link, Link::Down("being drained".to_owned())) {
            Link::Rtu(context, mut home) => {
                drop(context);
                home.try_recv().ok()
            }
            Link::Tcp(_) | Link::Down(_) => None,
        }
    }

    fn close(&mut self, why: &str) {
        if let Some(port) = self.take_port() {
            // Closing a port waits for unsent bytes to leave, for ever if nothing takes them.
            let _gone_anyway = port.clear(ClearBuffer::All);
        }
        self.link = Link::Down(why.to_owned());
        self.proven = false;
    }
}

/// Reads and forgets until `until`, and then until the line has been quiet for `gap`, at most until `limit`.
async fn drain(port: &mut SerialStream, until: Instant, gap: Duration, limit: Instant) -> io::Result<()> {
    let mut rubbish = [0; LONGEST_FRAME as usize];
    let mut quiet_at = until;
    while let Ok(arrived) = timeout_at(quiet_at.min(limit), port.read(&mut rubbish)).await {
        if arrived? == 0 {
            return Err(hung_up());
        }
        quiet_at = quiet_at.max(Instant::now() + gap);
        if Instant::now() >= limit {
            break;
        }
    }
    Ok(())
}

fn hung_up() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "closed by the other side")
}

async fn connect(host: &str, port: u16, patience: Duration) -> Result<Link, String> {
    let advice = "will be tried again; is it the right address, and is the device on?";
    match timeout(patience, TcpStream::connect((host, port))).await {
        Err(_) => Err(format!("{host}:{port}: no connection within {} ms; {advice}", patience.as_millis())),
        Ok(Err(error)) => Err(format!("{host}:{port}: {error}; {advice}")),
        Ok(Ok(stream)) => {
            // Without it a request may wait for the acknowledgement of the last; it is only slower.
            let _slower = stream.set_nodelay(true);
            Ok(Link::Tcp(tcp::attach(Closing(stream))))
        }
    }
}

fn open_port(port: &SerialPort) -> Result<SerialStream, String> {
    let device = port.device.display();
    let parity = match port.parity {
        Parity::None => tokio_serial::Parity::None,
        Parity::Even => tokio_serial::Parity::Even,
        Parity::Odd => tokio_serial::Parity::Odd,
    };
    let stop_bits =
        if port.stop_bits == 2 { tokio_serial::StopBits::Two } else { tokio_serial::StopBits::One };
    let builder = tokio_serial::new(port.device.to_string_lossy(), port.baud_rate)
        .parity(parity)
        .stop_bits(stop_bits)
        .data_bits(tokio_serial::DataBits::Eight)
        .exclusive(true); // two programs on one line take each other's replies
    SerialStream::open(&builder).map_err(|error| match error.kind() {
        tokio_serial::ErrorKind::Io(io::ErrorKind::NotFound) => {
            format!("{device} is missing: {error}; will be opened again when it returns")
        }
        tokio_serial::ErrorKind::Io(io::ErrorKind::PermissionDenied) => {
            format!("{device} cannot be opened: {error}; add the user to its group, often dialout")
        }
        tokio_serial::ErrorKind::NoDevice => {
            format!("{device} cannot be opened: {error}; does another program use it?")
        }
        _ => format!("{device} cannot be opened: {error}; will be tried again"),
    })
}

fn lend(port: SerialStream) -> Link {
    let (give_back, home) = oneshot::channel();
    let lent = LentPort { port: Some(port), give_back: Some(give_back) };
    Link::Rtu(rtu::attach(lent), home)
}

fn request(read: &Read) -> Request<'static> {
    match read.space {
        Space::Coil => Request::ReadCoils(read.address, read.count),
        Space::DiscreteInput => Request::ReadDiscreteInputs(read.address, read.count),
        Space::Holding => Request::ReadHoldingRegisters(read.address, read.count),
        Space::Input => Request::ReadInputRegisters(read.address, read.count),
    }
}

/// A gateway's word that the unit behind it is silent is as good as silence, and costs as long (V1.1b3, 7).
fn refusal(code: u8) -> Failure {
    match code {
        0x0A | 0x0B => Failure::Silent(Fault::Exception { code }),
        _ => Failure::Refused(code),
    }
}

/// The reply's data, if it has the length that was asked for: tokio-modbus accepts any.
fn checked(response: Response, read: &Read) -> Result<Data, String> {
    match (response, read.space) {
        (Response::ReadCoils(bits), Space::Coil)
        | (Response::ReadDiscreteInputs(bits), Space::DiscreteInput) => {
            let expected = usize::from(read.count).next_multiple_of(8); // whole bytes (V1.1b3, 6.1)
            if bits.len() == expected {
                Ok(Data::Bits(bits))
            } else {
                Err(format!("{} bytes of bits for {} bits", bits.len() / 8, read.count))
            }
        }
        (Response::ReadHoldingRegisters(registers), Space::Holding)
        | (Response::ReadInputRegisters(registers), Space::Input) => {
            if registers.len() == usize::from(read.count) {
                Ok(Data::Registers(registers))
            } else {
                Err(format!("{} registers instead of {}", registers.len(), read.count))
            }
        }
        _ => Err("it answers another function".to_owned()),
    }
}

/// Whether the reply repeats the request, as it must (V1.1b3, 6.5, 6.6, 6.12).
fn confirmed(response: &Response, address: u16, words: Words) -> Result<(), String> {
    let repeats = match (response, words) {
        (Response::WriteSingleCoil(at, coil), Words::Bit(bit)) => (*at, *coil) == (address, bit),
        (Response::WriteSingleRegister(at, word), Words::One(register)) => {
            (*at, *word) == (address, register)
        }
        (Response::WriteMultipleRegisters(at, count), Words::Two(_)) => (*at, *count) == (address, 2),
        _ => false,
    };
    if repeats { Ok(()) } else { Err(format!("it does not repeat the write, but says {response:?}")) }
}

/// A TCP connection whose end is an error that says so; tokio-modbus reports it as whatever error the thread
/// saw last.
#[derive(Debug)]
struct Closing(TcpStream);

impl AsyncRead for Closing {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
        Poll::Ready(if buf.filled().len() == before { Err(hung_up()) } else { Ok(()) })
    }
}

impl AsyncWrite for Closing {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A serial port lent to a tokio-modbus context, which keeps what it is given: when the context is dropped,
/// with its buffers, the port comes back and can be drained and lent again without being closed.
#[derive(Debug)]
struct LentPort {
    port: Option<SerialStream>,
    give_back: Option<oneshot::Sender<SerialStream>>,
}

impl LentPort {
    fn port(&mut self) -> io::Result<Pin<&mut SerialStream>> {
        self.port.as_mut().map(Pin::new).ok_or_else(hung_up)
    }
}

impl Drop for LentPort {
    fn drop(&mut self) {
        if let (Some(port), Some(give_back)) = (self.port.take(), self.give_back.take()) {
            let _nobody_wants_it = give_back.send(port);
        }
    }
}

impl AsyncRead for LentPort {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(self.port()?.poll_read(cx, buf))?;
        Poll::Ready(if buf.filled().len() == before { Err(hung_up()) } else { Ok(()) })
    }
}

impl AsyncWrite for LentPort {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let port = self.port()?;
        // What came before the request left cannot be its answer. If this fails, so does the write.
        let _write_fails_too = port.clear(ClearBuffer::Input);
        port.poll_write(cx, bytes)
    }

    /// The bytes are the kernel's. Waiting for them to leave (tcdrain) would block the thread, for ever if
    /// nothing takes them; the reply's deadline has their time in it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Pulse;
    use tokio::io::AsyncWriteExt as _;

    fn read(space: Space, count: u16) -> Read {
        Read { space, address: 0, count, parts: Vec::new() }
    }

    #[test]
    fn only_a_reply_of_the_length_asked_for_is_handed_out() {
        use Space::{Coil, DiscreteInput, Holding, Input};
        let bits = |n| vec![true; n];
        let words = |n| vec![7; n];
        let table = [
            (Response::ReadHoldingRegisters(words(2)), Holding, 2, true),
            (Response::ReadHoldingRegisters(words(0)), Holding, 1, false),
            (Response::ReadHoldingRegisters(words(2)), Holding, 1, false),
            (Response::ReadInputRegisters(words(125)), Input, 125, true),
            (Response::ReadInputRegisters(words(1)), Holding, 1, false),
            (Response::ReadCoils(bits(8)), Coil, 1, true),
            (Response::ReadCoils(bits(8)), Coil, 8, true),
            (Response::ReadCoils(bits(8)), Coil, 9, false),
            (Response::ReadCoils(bits(16)), Coil, 8, false),
            (Response::ReadDiscreteInputs(bits(0)), DiscreteInput, 1, false),
            (Response::ReadDiscreteInputs(bits(2000)), DiscreteInput, 2000, true),
        ];
        for (response, space, count, good) in table {
            assert_eq!(
                checked(response.clone(), &read(space, count)).is_ok(),
                good,
                "{response:?} for {count}"
            );
        }
    }

    #[test]
    fn only_a_reply_that_repeats_the_write_confirms_it() {
        let table = [
            (Response::WriteSingleCoil(7, true), Words::Bit(true), true),
            (Response::WriteSingleCoil(7, false), Words::Bit(true), false),
            (Response::WriteSingleCoil(8, true), Words::Bit(true), false),
            (Response::WriteSingleRegister(7, 5), Words::One(5), true),
            (Response::WriteSingleRegister(7, 6), Words::One(5), false),
            (Response::WriteSingleRegister(8, 5), Words::One(5), false),
            (Response::WriteMultipleRegisters(7, 2), Words::Two([1, 2]), true),
            (Response::WriteMultipleRegisters(7, 1), Words::Two([1, 2]), false),
            (Response::WriteMultipleRegisters(7, 1), Words::One(5), false),
            (Response::ReadHoldingRegisters(vec![5]), Words::One(5), false),
        ];
        for (response, words, good) in table {
            assert_eq!(confirmed(&response, 7, words).is_ok(), good, "{response:?} for {words:?}");
        }
    }

    fn line(transport: Transport, timeout: Duration) -> Line {
        let late_replies = LateReplies::Discard;
        Line {
            name: "line1".into(),
            transport,
            timeout,
            late_replies,
            units: Vec::new(),
            pulse: Pulse::default(),
        }
    }

    fn serial(baud_rate: u32) -> Transport {
        let device = "/nowhere".into();
        Transport::Rtu(SerialPort { device, baud_rate, parity: Parity::Even, stop_bits: 1 })
    }

    #[test]
    fn a_serial_line_is_given_the_time_its_bytes_take() {
        let client = |baud_rate| Client::new(&line(serial(baud_rate), Duration::from_secs(1)));
        // 8 + 5 + 250 characters of 11 bits at 300 bit/s are 9.643 s.
        assert_eq!(client(300).patience(&read(Space::Input, 125)).as_millis(), 10_643);
        assert_eq!(client(9_600).gap().as_micros(), 4_010);
        assert_eq!(client(115_200).gap(), SHORTEST_GAP);
    }

    /// What a wire full of noise, or an evil device, may send for one request.
    fn noise(random: &mut fastrand::Rng) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..random.usize(1..300)).map(|_| random.u8(..)).collect();
        bytes[0] = 1; // the right unit (RTU)
        if let Some(function) = bytes.get_mut(1) {
            *function = *random.choice(&[1, 3, 4, 0x11, 0x17, 0x18, 0x2B, 0x83, 0xFF]).unwrap();
        }
        bytes
    }

    #[tokio::test]
    async fn no_noise_on_tcp_is_taken_for_data() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (host, port) = ("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(1);
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 12];
                while stream.read_exact(&mut request).await.is_ok() {
                    let mut reply = noise(&mut random);
                    if random.bool() {
                        // A proper header, so that the content is looked at.
                        let length = reply.len() as u16;
                        reply.splice(0..0, [&request[..4], &length.to_be_bytes()].concat());
                    }
                    let _client_has_seen_enough = stream.write_all(&reply).await;
                }
            }
        });
        let mut client = Client::new(&line(Transport::Tcp { host, port }, Duration::from_millis(10)));
        client.open().await;
        for _ in 0..500 {
            let reply = client.read(1, &read(Space::Holding, 125)).await;
            assert!(!matches!(reply, Ok(_) | Err(Failure::Broken(_))), "{reply:?}");
        }
    }

    #[tokio::test]
    async fn no_noise_on_a_serial_line_is_taken_for_data() {
        let (ours, mut theirs) = SerialStream::pair().unwrap();
        tokio::spawn(async move {
            let (mut random, mut request) = (fastrand::Rng::with_seed(1), [0; 8]);
            while theirs.read_exact(&mut request).await.is_ok() {
                theirs.write_all(&noise(&mut random)).await.unwrap();
            }
        });
        let mut client = Client::new(&line(serial(4_000_000), Duration::from_millis(5)));
        client.link = lend(ours);
        for _ in 0..100 {
            let reply = client.read(1, &read(Space::Holding, 125)).await;
            assert!(!matches!(reply, Ok(_) | Err(Failure::Broken(_))), "{reply:?}");
            assert_eq!(client.down(), None);
        }
    }
}
