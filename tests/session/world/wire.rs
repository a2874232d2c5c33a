//! Bytes under way between the agent's link and the model broker, in memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use fieldpost::uplink::link::Link;
use fieldpost::uplink::packet::{Connect, Packet, Protocol};
use futures_util::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes under way, and bytes that have arrived.
#[derive(Debug, Default)]
pub(super) struct Wire {
    pub(super) to_broker: VecDeque<u8>,
    pub(super) to_agent: VecDeque<u8>,
    pub(super) arrived: VecDeque<u8>,
    pub(super) closed: bool,
}

/// The agent's end of a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Pipe(pub(super) Rc<RefCell<Wire>>);

impl Pipe {
    /// Takes at most so many bytes that are on their way to the broker.
    pub(super) fn to_broker(&self, count: usize) -> Vec<u8> {
        let mut wire = self.0.borrow_mut();
        let count = count.min(wire.to_broker.len());
        wire.to_broker.drain(..count).collect()
    }
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut wire = self.0.borrow_mut();
        if wire.arrived.is_empty() {
            return if wire.closed && wire.to_agent.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending };
        }
        let count = wire.arrived.len().min(buf.remaining());
        for byte in wire.arrived.drain(..count) {
            buf.put_slice(&[byte]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.borrow_mut().to_broker.extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The bytes of these packets, as the agent's link writes them.
pub(super) fn bytes_of(protocol: Protocol, packets: &[Packet]) -> Vec<u8> {
    let pipe = Pipe::default();
    let mut link = Link::new(pipe.clone(), protocol, u32::MAX);
    packets.iter().for_each(|packet| link.queue(packet).unwrap());
    flush(&mut link);
    pipe.to_broker(usize::MAX)
}

pub(super) fn flush(link: &mut Link<Pipe>) {
    link.flush().now_or_never().expect("the pipe takes everything").expect("the pipe never fails");
}

pub(super) fn connect(client_id: &str, clean: bool, keep_alive_ms: u64, max_packet_bytes: u32) -> Packet {
    Packet::Connect(Box::new(Connect {
        client_id: client_id.into(),
        clean,
        keep_alive_s: u16::try_from(keep_alive_ms / 1000).unwrap(),
        session_expiry_s: if clean { 0 } else { u32::MAX },
        receive_max: 64,
        max_packet_bytes,
        will: None,
        username: None,
        password: None,
    }))
}
