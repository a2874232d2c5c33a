//! A long line: a TCP proxy that holds every byte back for as long as the way takes, or lets so many through a second.
//!
//! Unlike the proxy of the tests, which holds up whatever follows, bytes here travel behind one another: a line may
//! hold as many as fit into its delay. Invariant: the bytes that come out are those that went in, in their order.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::setting::Failure;

/// Bytes that travel together, as in a packet of Ethernet.
const PACKET: usize = 1460;
/// Packets that may be on a line; beyond, the sender waits.
const PACKETS: usize = 8192;
/// On a slow line only so many bytes wait before it, at each socket: a modem has no more.
const BUFFER: usize = 16 * 1024;

/// What kind of line it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// How long a byte is under way, each way.
    pub(crate) delay: Duration,
    /// Bytes a second, each way; as many as there are if `None`.
    pub(crate) bytes_per_s: Option<u32>,
}

/// A line to a port of 127.0.0.1.
#[derive(Debug)]
pub(crate) struct Line {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// Listens at its near end.
    pub(crate) fn start(to: u16, kind: Kind) -> Result<Line, Failure> {
        let listen = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            if kind.bytes_per_s.is_some() {
                // Before it listens: connections inherit it.
                socket.set_recv_buffer_size(BUFFER)?;
            }
            socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
            socket.listen(16)?;
            let listener = TcpListener::from(socket);
            Ok((listener.local_addr()?.port(), listener))
        };
        let (port, listener) = listen().map_err(Failure::at("the line's near end"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if stopped.load(SeqCst) {
                    return;
                }
                // A far end that is not there is a connection that ends at once.
                let _refused = join(near, to, kind);
            }
        });
        Ok(Line { port, stop, thread: Some(thread) })
    }

    /// The port of its near end.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        // Wakes the thread; connections end with their ends.
        let _woken = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

fn join(near: TcpStream, to: u16, kind: Kind) -> std::io::Result<()> {
    let far = TcpStream::connect((Ipv4Addr::LOCALHOST, to))?;
    for (from, to) in [(near.try_clone()?, far.try_clone()?), (far, near)] {
        to.set_nodelay(true)?;
        let packets = if kind.bytes_per_s.is_some() { BUFFER / PACKET } else { PACKETS };
        let (put, take) = sync_channel(packets);
        std::thread::spawn(move || depart(from, &put, kind.delay));
        std::thread::spawn(move || arrive(to, &take, kind.bytes_per_s));
    }
    Ok(())
}

fn depart(mut from: TcpStream, put: &SyncSender<(Instant, Vec<u8>)>, delay: Duration) {
    let mut buffer = [0; PACKET];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        if put.send((Instant::now() + delay, buffer[..bytes].to_vec())).is_err() {
            return;
        }
    }
}

fn arrive(mut to: TcpStream, take: &Receiver<(Instant, Vec<u8>)>, bytes_per_s: Option<u32>) {
    let mut free = Instant::now();
    for (due, bytes) in take {
        if let Some(rate) = bytes_per_s {
            free = free.max(due) + Duration::from_secs_f64(bytes.len() as f64 / f64::from(rate));
        } else {
            free = due;
        }
        // The way takes its time; nobody waits for a condition here.
        std::thread::sleep(free.saturating_duration_since(Instant::now()));
        if to.write_all(&bytes).is_err() {
            return;
        }
    }
    let _closed = to.shutdown(std::net::Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                std::thread::spawn(move || {
                    let mut reader = stream.try_clone()?;
                    std::io::copy(&mut reader, &mut stream)
                });
            }
        });
        port
    }

    fn round(kind: Kind, bytes: usize) -> Duration {
        let line = Line::start(echo(), kind).expect("a line");
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, line.port())).expect("it listens");
        let sent: Vec<u8> = (0..bytes).map(|n| n as u8).collect();
        let began = Instant::now();
        stream.write_all(&sent).expect("it takes them");
        let mut received = vec![0; bytes];
        stream.read_exact(&mut received).expect("they come back");
        assert_eq!(received, sent);
        began.elapsed()
    }

    #[test]
    fn a_long_line_delays_everything_alike_and_holds_many_bytes() {
        let took = round(Kind { delay: Duration::from_millis(50), bytes_per_s: None }, 200_000);
        // Were each packet to wait for the one before it, this would take 14 seconds.
        assert!((100..2000).contains(&took.as_millis()), "{took:?}");
    }

    #[test]
    fn a_slow_line_takes_as_long_as_its_bytes() {
        let took = round(Kind { delay: Duration::ZERO, bytes_per_s: Some(100_000) }, 30_000);
        assert!((300..2000).contains(&took.as_millis()), "{took:?}");
    }
}
