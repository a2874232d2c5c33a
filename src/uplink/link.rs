//! MQTT packets over any byte stream: TCP, TLS, later a modem's pipe.
//!
//! The only place that knows rumqttc, of which it uses the packet types and codecs and nothing that runs.
//! Packets are framed and checked here before rumqttc sees them.
//!
//! Invariants: no method loses a byte when its future is dropped; memory stays bounded whatever the broker
//! announces; every write either progresses or fails after [`WRITE_STALL`].

mod metered;
mod open;
mod v4;
mod v5;
mod wire;

use std::borrow::Cow;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep_until};

use super::packet::{Packet, Protocol, ReasonCode};
use super::tls;
use crate::message::{PacketId, Qos};
use wire::{Decoded, FIELD_MAX, Incoming, Piece, REMAINING_MAX};

pub use metered::Metered;
pub use open::{ConnectError, Endpoint, Stage, Stream, open};
pub use wire::Malformed;

/// How long the stream may refuse every byte before the link is given up. A slow stream that takes some byte
/// within this time is never given up: the deadline is on progress, not on a packet.
pub const WRITE_STALL: Duration = Duration::from_secs(20);

/// Received at once.
const READ_CHUNK: usize = 16 * 1024;

/// A buffer that has grown beyond this is given back once it is empty.
const KEEP_BUFFER: usize = 256 * 1024;

/// Why a link cannot go on, or cannot send a packet.
///
/// After [`LinkError::TooLarge`] and [`LinkError::Unsendable`] it goes on as if nothing had happened; after any
/// other it must be dropped.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The broker ended the byte stream.
    #[error("the broker closed the connection")]
    Closed,
    /// The stream failed.
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    /// TLS failed after the handshake: with TLS 1.3 that is where a refused client certificate shows.
    #[error("TLS: {reason}")]
    Tls {
        /// What happened and what to try.
        reason: String,
    },
    /// The broker sent what no broker may send.
    #[error("the broker broke the protocol with a {0}")]
    Protocol(#[from] Malformed),
    /// Our own packet exceeds a limit.
    #[error("{what} of {bytes} bytes is too large: the limit is {limit} bytes")]
    TooLarge {
        /// The packet, or the field of it.
        what: &'static str,
        /// How large it is.
        bytes: usize,
        /// The broker's Maximum Packet Size, or what MQTT can carry.
        limit: usize,
    },
    /// Our own packet cannot be expressed in this protocol version.
    #[error("{packet} cannot be sent: {why}")]
    Unsendable {
        /// The packet's name.
        packet: &'static str,
        /// What is wrong with it.
        why: Cow<'static, str>,
    },
    /// The stream took nothing for [`WRITE_STALL`].
    #[error(
        "the broker took no data for {} s: the link is dead, or the broker is overloaded",
        WRITE_STALL.as_secs()
    )]
    WriteStalled,
}

impl LinkError {
    fn from_io(error: io::Error) -> Self {
        match tls::explain_io(&error) {
            Some(reason) => LinkError::Tls { reason },
            // A TLS stream that ends without a goodbye ends like a TCP stream: MQTT has packets of its own
            // length, so nothing can be cut short unnoticed.
            None if error.kind() == io::ErrorKind::UnexpectedEof => LinkError::Closed,
            None => LinkError::Io(error),
        }
    }
}

fn unsendable(packet: &Packet, why: impl Into<Cow<'static, str>>) -> LinkError {
    LinkError::Unsendable { packet: packet.name(), why: why.into() }
}

/// A connection to a broker that speaks [`Packet`]s.
pub struct Link<S> {
    stream: S,
    protocol: Protocol,
    incoming: Incoming,
    /// The first malformed packet: nothing after it can be believed.
    malformed: Option<Malformed>,
    received_bytes: u64,
    outgoing: BytesMut,
    /// The most bytes `outgoing` held since it was last empty.
    outgoing_peak: usize,
    /// Bytes were handed to the stream since it was last flushed.
    unflushed: bool,
    broker_max_packet: usize,
    stall: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    /// A link over a fresh stream. A PUBLISH of more than `max_packet_bytes` (the whole packet) is skipped and
    /// told as [`Packet::Oversize`]; any other packet of that size is an error.
    pub fn new(stream: S, protocol: Protocol, max_packet_bytes: u32) -> Self {
        Link {
            stream,
            protocol,
            incoming: Incoming::new(protocol, max_packet_bytes as usize),
            malformed: None,
            received_bytes: 0,
            outgoing: BytesMut::new(),
            outgoing_peak: 0,
            unflushed: false,
            broker_max_packet: usize::MAX,
            stall: None,
        }
    }

    /// Obeys the broker's Maximum Packet Size (MQTT 5.0 section 3.2.2.3.6) from now on.
    pub fn set_broker_max_packet(&mut self, bytes: u32) {
        self.broker_max_packet = bytes as usize;
    }

    /// Encodes a packet into the outgoing buffer. Nothing is sent before [`Link::next`] or [`Link::flush`] is
    /// awaited. The buffer has no limit of its own: whoever fills it watches [`Link::queued_bytes`].
    ///
    /// # Errors
    /// [`LinkError::TooLarge`] and [`LinkError::Unsendable`], which leave the buffer as it was.
    pub fn queue(&mut self, packet: &Packet) -> Result<(), LinkError> {
        let bytes = self.encoded_len(packet)?;
        if bytes > self.broker_max_packet {
            return Err(LinkError::TooLarge { what: packet.name(), bytes, limit: self.broker_max_packet });
        }
        let before = self.outgoing.len();
        let encoded = match self.protocol {
            Protocol::V311 => v4::encode(packet, &mut self.outgoing),
            Protocol::V5 => v5::encode(packet, &mut self.outgoing),
        };
        if encoded.is_err() {
            self.outgoing.truncate(before);
        }
        self.outgoing_peak = self.outgoing_peak.max(self.outgoing.len());
        encoded
    }

    /// How many bytes the packet takes on this link, whether or not the broker takes them.
    ///
    /// # Errors
    /// As [`encoded_len`].
    pub fn encoded_len(&self, packet: &Packet) -> Result<usize, LinkError> {
        encoded_len(self.protocol, packet)
    }

    /// Bytes encoded and not yet taken by the stream.
    pub fn queued_bytes(&self) -> usize {
        self.outgoing.len()
    }

    /// Bytes received so far, of whatever packets: a sign of life even while one large packet crawls in.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// The next packet from the broker. Sends what is queued meanwhile, so that two full sockets cannot wait
    /// for each other. Cancel safe.
    ///
    /// # Errors
    /// Whatever ends the link. What the broker said before it hung up is told first, also when our own writes
    /// already fail: a DISCONNECT there holds the reason.
    pub async fn next(&mut self) -> Result<Packet, LinkError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next packet if one can be had without waiting. Reads the stream, sends nothing. Cancel safe.
    ///
    /// # Errors
    /// Whatever ends the link.
    pub async fn try_next(&mut self) -> Result<Option<Packet>, LinkError> {
        poll_fn(|cx| match self.poll_receive(cx) {
            Poll::Ready(received) => Poll::Ready(received.map(Some)),
            Poll::Pending => Poll::Ready(Ok(None)),
        })
        .await
    }

    /// Sends everything queued. Cancel safe. Does not read: use [`Link::next`] while the broker may be sending
    /// too.
    ///
    /// # Errors
    /// Whatever ends the link.
    pub async fn flush(&mut self) -> Result<(), LinkError> {
        poll_fn(|cx| self.poll_send(cx)).await
    }

    /// Sends everything queued, ends our side of the stream, and waits until the broker has ended its own. (A
    /// socket closed with bytes unread sends a reset, which may overtake a DISCONNECT on its way.)
    ///
    /// Waits without limit for a broker that neither closes nor stops sending: give it a deadline.
    ///
    /// # Errors
    /// Whatever prevented sending.
    pub async fn close(mut self) -> Result<(), LinkError> {
        self.flush().await?;
        self.stream.shutdown().await.map_err(LinkError::from_io)?;
        let mut unread = [0; 1024];
        while let Ok(1..) = self.stream.read(&mut unread).await {}
        Ok(())
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Packet, LinkError>> {
        let received = self.poll_receive(cx);
        match (received, self.poll_send(cx)) {
            (Poll::Ready(received), _) => Poll::Ready(received),
            (Poll::Pending, Poll::Ready(Err(error))) => Poll::Ready(Err(error)),
            (Poll::Pending, _) => Poll::Pending,
        }
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Packet, LinkError>> {
        loop {
            if let Some(packet) = self.decode_next()? {
                return Poll::Ready(Ok(packet));
            }
            let buffer = &mut self.incoming.buffer;
            if buffer.is_empty() && buffer.capacity() > KEEP_BUFFER {
                *buffer = BytesMut::new();
            }
            buffer.reserve(READ_CHUNK);
            let read = pin!(self.stream.read_buf(buffer));
            match ready!(read.poll(cx)).map_err(LinkError::from_io)? {
                0 => return Poll::Ready(Err(LinkError::Closed)),
                bytes => self.received_bytes += bytes as u64,
            }
        }
    }

    /// The next packet among the bytes already received.
    fn decode_next(&mut self) -> Result<Option<Packet>, LinkError> {
        if let Some(malformed) = &self.malformed {
            return Err(malformed.clone().into());
        }
        loop {
            match self.decode_piece() {
                Ok(None) => return Ok(None),
                Ok(Some(Decoded::Packet(packet))) => return Ok(Some(packet)),
                Ok(Some(Decoded::BrokerOwned { topic, qos, id })) => self.decline(&topic, qos, id)?,
                Err(malformed) => {
                    self.malformed = Some(malformed.clone());
                    return Err(malformed.into());
                }
            }
        }
    }

    fn decode_piece(&mut self) -> Result<Option<Decoded>, Malformed> {
        match (self.incoming.next()?, self.protocol) {
            (None, _) => Ok(None),
            (Some(Piece::Skipped(packet)), _) => Ok(Some(Decoded::Packet(packet))),
            (Some(Piece::Frame(frame)), Protocol::V311) => v4::decode(frame).map(Some),
            (Some(Piece::Frame(frame)), Protocol::V5) => v5::decode(frame).map(Some),
        }
    }

    /// Answers a message we never subscribed to, so that it does not hold one of the broker's Packet
    /// Identifiers for ever. The PUBREL that follows at QoS 2 names an identifier the session does not know.
    fn decline(&mut self, topic: &str, qos: Qos, id: Option<PacketId>) -> Result<(), LinkError> {
        tracing::debug!(topic, %qos, "a message of the broker's own, not asked for, is dropped");
        match (qos, id) {
            (Qos::AtLeastOnce, Some(id)) => self.queue(&Packet::PubAck(id, ReasonCode::SUCCESS)),
            (Qos::ExactlyOnce, Some(id)) => self.queue(&Packet::PubRec(id, ReasonCode::SUCCESS)),
            _ => Ok(()),
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        while !self.outgoing.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.outgoing) {
                Poll::Ready(Ok(0)) => {
                    return Poll::Ready(Err(LinkError::Io(io::ErrorKind::WriteZero.into())));
                }
                Poll::Ready(Ok(bytes)) => {
                    self.outgoing.advance(bytes);
                    self.unflushed = true;
                    self.stall = None;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(LinkError::from_io(error))),
                Poll::Pending => return self.poll_stalled(cx),
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.stream).poll_flush(cx) {
                Poll::Ready(flushed) => flushed.map_err(LinkError::from_io)?,
                Poll::Pending => return self.poll_stalled(cx),
            }
            self.unflushed = false;
            self.stall = None;
            if self.outgoing_peak > KEEP_BUFFER {
                self.outgoing = BytesMut::new();
            }
            self.outgoing_peak = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + WRITE_STALL)));
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(Err(LinkError::WriteStalled))
    }
}

/// How many bytes a packet takes on the wire.
///
/// # Errors
/// [`LinkError::TooLarge`] for what MQTT cannot carry, [`LinkError::Unsendable`] for what this version cannot
/// express.
pub fn encoded_len(protocol: Protocol, packet: &Packet) -> Result<usize, LinkError> {
    check_fields(packet)?;
    let bytes = match protocol {
        Protocol::V311 => v4::encoded_len(packet),
        Protocol::V5 => v5::encoded_len(packet),
    }?;
    let limit = REMAINING_MAX + 5;
    if bytes > limit { Err(LinkError::TooLarge { what: packet.name(), bytes, limit }) } else { Ok(bytes) }
}

/// Fields that rumqttc would write with a length cut to 16 bits, or not at all.
fn check_fields(packet: &Packet) -> Result<(), LinkError> {
    let check = |what, bytes| match bytes {
        0..=FIELD_MAX => Ok(()),
        _ => Err(LinkError::TooLarge { what, bytes, limit: FIELD_MAX }),
    };
    let len = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    match packet {
        Packet::Connect(connect) => {
            check("the Client Identifier", connect.client_id.len())?;
            check("the User Name", len(&connect.username))?;
            check("the Password", len(&connect.password))?;
            check("the Will Payload", connect.will.as_ref().map_or(0, |will| will.payload.len()))
        }
        Packet::Publish(publish) => {
            if publish.id.is_some() == (publish.qos == Qos::AtMostOnce) {
                let why = "a Packet Identifier belongs to QoS 1 and 2, and only there (MQTT-2.2.1-2)";
                return Err(unsendable(packet, why));
            }
            check("the Response Topic", len(&publish.response_topic))?;
            check("the Correlation Data", publish.correlation_data.as_ref().map_or(0, |data| data.len()))
        }
        Packet::Subscribe(_, filters) if filters.is_empty() => {
            Err(unsendable(packet, "it has no Topic Filter (MQTT-3.8.3-2)"))
        }
        Packet::Unsubscribe(_, filters) if filters.is_empty() => {
            Err(unsendable(packet, "it has no Topic Filter (MQTT-3.10.3-2)"))
        }
        Packet::Subscribe(_, filters) => {
            filters.iter().try_for_each(|subscription| check("a Topic Filter", subscription.filter.len()))
        }
        Packet::Unsubscribe(_, filters) => {
            filters.iter().try_for_each(|filter| check("a Topic Filter", filter.len()))
        }
        _ => Ok(()),
    }
}
