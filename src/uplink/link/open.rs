//! Opens the byte stream to a broker: name resolution, TCP, and TLS where it is configured.
//!
//! Invariant: no byte of MQTT is sent before the broker's certificate has been accepted.

use std::fmt::{self, Write as _};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::metered::Metered;
use crate::stats::Stats;
use crate::uplink::tls;

/// The stream to a broker: TCP, or TLS over it.
pub type Stream = Either<Metered, Box<TlsStream<Metered>>>;

/// TCP probes an idle connection after this long; MQTT's own Keep Alive usually speaks first.
const KEEP_ALIVE_AFTER: Duration = Duration::from_secs(120);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);

/// Bytes the kernel may hold unsent. Its default of megabytes would hide for minutes that a slow link has
/// stopped, and that a queued packet has not left.
const UNSENT_MAX: u32 = 32 * 1024;

/// Where a broker is and how it is reached.
#[derive(Clone)]
pub struct Endpoint<'a> {
    /// Host name or address, without brackets.
    pub host: &'a str,
    /// Port.
    pub port: u16,
    /// `Some` for TLS.
    pub tls: Option<&'a tls::Client>,
    /// For everything here together; each address gets its share, so that a dead one leaves time for the next.
    pub timeout: Duration,
    /// TCP_USER_TIMEOUT: how long sent bytes may stay unacknowledged before the kernel ends the connection.
    pub user_timeout: Duration,
    /// Where the bytes are counted.
    pub stats: &'a Arc<Stats>,
}

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Asking for the host's addresses.
    Resolve,
    /// The TLS handshake.
    Handshake,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Resolve => "the name server's answer",
            Stage::Handshake => "the TLS handshake (is this the broker's TLS port?)",
        })
    }
}

/// Why there is no stream to the broker.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host name has no address.
    #[error("cannot resolve {host:?}: {source}; check the broker's name, and the gateway's name server")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's words.
        source: io::Error,
    },
    /// No address accepted a connection.
    #[error("cannot connect to {}: {}", target(.host, *.port, .attempts), list(.host, .attempts))]
    Refused {
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// Every address tried, and what came of it.
        attempts: Vec<(SocketAddr, io::Error)>,
    },
    /// Time ran out.
    #[error("no connection to {host}:{port} within {} s: waited for {stage}", .after.as_secs())]
    TimedOut {
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// What was being waited for.
        stage: Stage,
        /// The time allowed.
        after: Duration,
    },
    /// The TLS handshake failed; nothing was sent to the broker.
    #[error("TLS with {host}:{port} ({address}) failed: {reason}")]
    Tls {
        /// The name.
        host: String,
        /// The port.
        port: u16,
        /// The address it was tried with.
        address: SocketAddr,
        /// What happened and what to try.
        reason: String,
        /// The library's words.
        source: io::Error,
    },
}

/// The broker's name, unless it is an address that the list of attempts shows already.
fn target(host: &str, port: u16, attempts: &[(SocketAddr, io::Error)]) -> String {
    match attempts {
        [(address, _)] if address.ip().to_string() == host => address.to_string(),
        _ => format!("{host}:{port}"),
    }
}

fn list(host: &str, attempts: &[(SocketAddr, io::Error)]) -> String {
    if let [(address, error)] = attempts
        && address.ip().to_string() == host
    {
        return error.to_string();
    }
    let mut text = String::new();
    for (address, error) in attempts {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{address}: {error}");
    }
    text
}

/// Connects. Every address of the host is tried in the resolver's order until one accepts; TLS is tried with
/// that one only, since a wrong certificate is no reason to go looking for a better one.
///
/// # Errors
/// What failed, with host, port and addresses, and what to try.
pub async fn open(endpoint: &Endpoint<'_>) -> Result<Stream, ConnectError> {
    let deadline = Instant::now() + endpoint.timeout;
    let (tcp, address) = connect(endpoint, &resolve(endpoint, deadline).await?, deadline).await?;
    let tcp = Metered::new(tcp, Arc::clone(endpoint.stats));
    match endpoint.tls {
        None => Ok(Either::Left(tcp)),
        Some(client) => handshake(endpoint, client, tcp, address, deadline).await,
    }
}

async fn resolve(endpoint: &Endpoint<'_>, deadline: Instant) -> Result<Vec<SocketAddr>, ConnectError> {
    let failed = |source| ConnectError::Resolve { host: endpoint.host.to_owned(), source };
    let addresses: Vec<_> = timeout_at(deadline, lookup_host((endpoint.host, endpoint.port)))
        .await
        .map_err(|_| timed_out(endpoint, Stage::Resolve))?
        .map_err(failed)?
        .collect();
    if addresses.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::NotFound, "it has no address")));
    }
    Ok(addresses)
}

async fn connect(
    endpoint: &Endpoint<'_>,
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<(TcpStream, SocketAddr), ConnectError> {
    let mut attempts = Vec::new();
    for (tried, &address) in addresses.iter().enumerate() {
        let share = deadline.saturating_duration_since(Instant::now()) / (addresses.len() - tried) as u32;
        let connected = match timeout_at(Instant::now() + share, TcpStream::connect(address)).await {
            Ok(connected) => connected.and_then(|tcp| prepare(tcp, endpoint.user_timeout)),
            Err(_) => {
                let text = format!("no answer within {:.1} s", share.as_secs_f32());
                Err(io::Error::new(io::ErrorKind::TimedOut, text))
            }
        };
        match connected {
            Ok(tcp) => return Ok((tcp, address)),
            Err(error) => attempts.push((address, error)),
        }
    }
    Err(ConnectError::Refused { host: endpoint.host.to_owned(), port: endpoint.port, attempts })
}

fn prepare(tcp: TcpStream, user_timeout: Duration) -> io::Result<TcpStream> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new().with_time(KEEP_ALIVE_AFTER).with_interval(KEEP_ALIVE_EVERY),
    )?;
    socket.set_tcp_user_timeout(Some(user_timeout))?;
    socket.set_tcp_notsent_lowat(UNSENT_MAX)?;
    Ok(tcp)
}

async fn handshake(
    endpoint: &Endpoint<'_>,
    client: &tls::Client,
    tcp: Metered,
    address: SocketAddr,
    deadline: Instant,
) -> Result<Stream, ConnectError> {
    let shaken =
        timeout_at(deadline, client.connect(tcp)).await.map_err(|_| timed_out(endpoint, Stage::Handshake))?;
    shaken.map(|stream| Either::Right(Box::new(stream))).map_err(|source| ConnectError::Tls {
        host: endpoint.host.to_owned(),
        port: endpoint.port,
        address,
        reason: client.explain(&source),
        source,
    })
}

fn timed_out(endpoint: &Endpoint<'_>, stage: Stage) -> ConnectError {
    ConnectError::TimedOut {
        host: endpoint.host.to_owned(),
        port: endpoint.port,
        stage,
        after: endpoint.timeout,
    }
}
