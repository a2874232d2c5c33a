//! Where HTTP comes in: a TCP address or a Unix socket, and what its connections read and write.
//!
//! Invariant: a client that does not read its answer is left after [`WRITE_DEADLINE`].

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::time::{Sleep, sleep};
use tokio_util::either::Either;

use crate::control::{self, BindError, WRITE_DEADLINE};

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// An address and port.
    Tcp(SocketAddr),
    /// The path of a Unix socket, which the agent's user and group may open.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => address.fmt(f),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub(super) enum ListenError {
    /// The address.
    #[error("{0}; `ss -ltnp` shows who listens where")]
    Tcp(io::Error),
    /// The Unix socket.
    #[error("{0}")]
    Unix(#[from] BindError),
}

/// Listening.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(control::Listener),
}

impl Listener {
    pub(super) async fn bind(listen: &Listen, backlog: usize) -> Result<Listener, ListenError> {
        match listen {
            Listen::Tcp(address) => {
                Ok(Listener::Tcp(TcpListener::bind(address).await.map_err(ListenError::Tcp)?))
            }
            Listen::Unix(path) => Ok(Listener::Unix(control::bind_for(path, backlog)?)),
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // An answer is one write; nothing is gained by waiting for more.
                stream.set_nodelay(true)?;
                Ok(Stream::new(Either::Left(stream)))
            }
            Listener::Unix(listener) => Ok(Stream::new(Either::Right(listener.accept().await?))),
        }
    }
}

/// A connection whose writes must go on.
pub(super) struct Stream {
    inner: Either<TcpStream, UnixStream>,
    /// While a write waits for the other end to read.
    stuck: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    fn new(inner: Either<TcpStream, UnixStream>) -> Self {
        Stream { inner, stuck: None }
    }

    /// Writes what fits at once: there is nothing to wait for in a fresh connection.
    pub(super) fn say(&self, words: &[u8]) -> io::Result<usize> {
        match &self.inner {
            Either::Left(stream) => stream.try_write(words),
            Either::Right(stream) => stream.try_write(words),
        }
    }

    fn in_time<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let deadline = self.stuck.get_or_insert_with(|| Box::pin(sleep(WRITE_DEADLINE)));
        ready!(deadline.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.in_time(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.in_time(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.in_time(cx, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.in_time(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
