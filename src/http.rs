//! The local HTTP interface, beside the control socket: the same questions to the same agent.
//!
//! ```text
//! GET  /healthz           200: every part of the agent makes progress             503: who does not
//! GET  /readyz            200: a message would be accepted                        503: why not
//! GET  /metrics           OpenMetrics
//! GET  /status            what `fieldpost status --json` prints
//! POST /publish           200: {"accepted":{"messages":3}}, once all of them are durable
//!                         202: {"handed_over":{"messages":1}}, the one QoS 0 message is on its way and may be lost
//!                         anything else: {"refused":{"reason":"..."}}; none of them was stored, unless it says so
//! ```
//!
//! Connections, headers, bodies, time and what waits are bounded and counted. What may be asked and by whom is `route`,
//! what messages look like is `body`, and the page of metrics is `metrics`; here are only the wires.
//!
//! Invariants: no way into the store but [`Ask`] (P1); a request is never logged with its headers (P10).

mod body;
mod listener;
pub mod metrics;
mod route;

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};

use crate::clock;
use crate::control::wire::{Answer, Status};
use crate::control::{self, Ask, Request, WRITE_DEADLINE};
use crate::message::Lane;
use crate::progress::{Stuck, Watch};
use crate::secret::{self, Unusable};
use crate::stats::Stats;
use listener::{Listener, Stream};
use route::{Admission, Form, Route};

pub use listener::Listen;

/// Bytes of a request's line and headers, at most.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Bytes of bodies that are being received or wait for their commit, over all connections.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// Pause before an address is tried again that could not be listened on.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// When a client that was refused for now may come again, in seconds.
const RETRY_AFTER_S: &str = "1";

const JSON: &str = "application/json";

/// What the interface is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where it listens. Default 127.0.0.1:8090.
    pub listen: Listen,
    /// File that holds the token every request must carry; a trailing line break is not part of it. Read at every
    /// request, so that another token counts at once. An address that is not loopback needs one.
    pub token_file: Option<PathBuf>,
    /// Connections at a time. Default 128, 1 to 1024.
    pub max_connections: usize,
    /// POST requests that wait for their answer. Default 64, 1 to 1024.
    pub max_waiting: usize,
    /// Bytes of a body. Default 256 KiB, 1 KiB to 1 MiB.
    pub max_body: usize,
    /// How long a request's headers, and then its body, may take to arrive, and how long a connection may be idle.
    /// Default 10 s, 100 ms to 10 min.
    pub read_timeout: Duration,
}

/// Serves until the agent drops its end of `requests`; what it has answered by then is still delivered.
pub async fn serve(
    settings: Settings,
    requests: mpsc::Sender<Request>,
    stats: Arc<Stats>,
    parts: watch::Receiver<Watch>,
) {
    let Some(listener) = listen(&settings, &requests).await else { return };
    let desk = Arc::new(Desk {
        waiting: Semaphore::new(settings.max_waiting),
        bytes: Semaphore::new(WAITING_BYTES_MAX),
        token_is_told: AtomicBool::new(false),
        settings,
        requests,
        stats,
        parts,
    });
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = desk.requests.closed() => break,
        };
        match accepted {
            Ok(stream) if connections.len() < desk.settings.max_connections => {
                connections.spawn(converse(stream, Arc::clone(&desk)));
            }
            Ok(stream) => desk.turn_away(&stream),
            Err(error) => {
                // Out of file descriptors, most likely: accept would fail again at once.
                warn!(%error, "cannot take an HTTP connection");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
    drop(listener);
    let delivered = async { while connections.join_next().await.is_some() {} };
    if timeout(WRITE_DEADLINE, delivered).await.is_err() {
        debug!("some HTTP connections did not read their answers");
    }
}

/// Listens, or tries again: an address may be late at boot or still in use, and nothing else waits for it. `None`: the
/// agent has stopped before.
async fn listen(settings: &Settings, requests: &mpsc::Sender<Request>) -> Option<Listener> {
    let at = &settings.listen;
    let mut told = false;
    loop {
        match Listener::bind(at, settings.max_connections).await {
            Ok(listener) => {
                info!("HTTP on {at}");
                return Some(listener);
            }
            Err(error) if !told => warn!("no HTTP on {at}: {error}; it is tried again"),
            Err(_) => {}
        }
        told = true;
        tokio::select! {
            () = sleep(LISTEN_AGAIN) => {}
            () = requests.closed() => return None,
        }
    }
}

async fn converse(stream: Stream, desk: Arc<Desk>) {
    let service = service_fn(|request| {
        let desk = Arc::clone(&desk);
        async move { Ok::<_, Infallible>(desk.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(desk.settings.read_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        // Who has said all he has to say may still listen.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = desk.requests.closed() => {
            // What was asked is still answered.
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        if error.is_parse() || error.is_timeout() {
            desk.stats.http_headers_refused.increment();
        }
        debug!(%error, "an HTTP connection ended early");
    }
}

/// What is said to a request.
struct Said {
    status: StatusCode,
    content_type: &'static str,
    body: Bytes,
    /// One more header: name and value.
    header: Option<(&'static str, &'static str)>,
}

impl Said {
    fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Said { status, content_type: JSON, body: body.into(), header: None }
    }

    /// In the words of the control socket.
    fn refused(status: StatusCode, reason: impl Into<String>) -> Self {
        let answer = Answer::Refused { reason: reason.into() };
        let mut body = serde_json::to_vec(&answer).expect("answers have text keys only");
        body.push(b'\n');
        let later = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        let header = later.then_some(("retry-after", RETRY_AFTER_S));
        Said { header, ..Said::json(status, body) }
    }

    fn response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some((name, value)) = self.header {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        response
    }
}

/// What all connections share.
struct Desk {
    settings: Settings,
    requests: mpsc::Sender<Request>,
    stats: Arc<Stats>,
    /// Who of the agent should make progress.
    parts: watch::Receiver<Watch>,
    /// One permit for each POST that may wait.
    waiting: Semaphore,
    /// One permit for each byte of a body.
    bytes: Semaphore,
    /// Whether the log has heard that the token cannot be read.
    token_is_told: AtomicBool,
}

impl Desk {
    async fn answer(&self, request: hyper::Request<Incoming>) -> Response<Full<Bytes>> {
        let (head, body) = request.into_parts();
        let said = match self.route(&head) {
            Err(refused) => refused,
            Ok(Route::Health) => self.health(),
            Ok(Route::Ready(lane)) => self.ready(lane).await,
            Ok(Route::Metrics) => self.metrics().await,
            Ok(Route::Status) => self.status_page().await,
            Ok(Route::Publish(form)) => self.publish(form, body).await,
        };
        self.stats.http_requests.increment();
        debug!(method = %head.method, path = head.uri.path(), status = said.status.as_u16(), "HTTP");
        said.response()
    }

    fn route(&self, head: &Parts) -> Result<Route, Said> {
        let admission = self.admission()?;
        route::route(head, &admission).map_err(|denied| {
            match denied.status {
                StatusCode::UNAUTHORIZED => self.stats.http_unauthorized.increment(),
                StatusCode::FORBIDDEN => self.stats.http_forbidden.increment(),
                _ => {}
            }
            let said = Said::refused(denied.status, denied.reason);
            Said { header: denied.header.or(said.header), ..said }
        })
    }

    fn admission(&self) -> Result<Admission, Said> {
        let Some(path) = &self.settings.token_file else {
            return Ok(match self.settings.listen {
                Listen::Tcp(_) => Admission::Loopback,
                Listen::Unix(_) => Admission::Socket,
            });
        };
        match token(path) {
            Ok(token) => {
                self.token_is_told.store(false, Ordering::Relaxed);
                Ok(Admission::Token(token))
            }
            Err(why) => {
                if !self.token_is_told.swap(true, Ordering::Relaxed) {
                    warn!("[http] token_file {}: {why}; nobody is let in", path.display());
                }
                Err(Said::refused(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "the token_file cannot be used; the agent's log says why",
                ))
            }
        }
    }

    async fn status(&self) -> Result<Box<Status>, Said> {
        match control::ask(&self.requests, Ask::Status).await {
            Answer::Status(status) => Ok(status),
            Answer::Refused { reason } => Err(Said::refused(StatusCode::SERVICE_UNAVAILABLE, reason)),
            _ => {
                Err(Said::refused(StatusCode::INTERNAL_SERVER_ERROR, "the answer does not fit the question"))
            }
        }
    }

    fn health(&self) -> Said {
        let stuck = self.parts.borrow().stuck(clock::mono_ms());
        if stuck.is_empty() {
            return Said::json(StatusCode::OK, "{\"healthy\":{}}\n");
        }
        let name =
            |stuck: &Stuck| format!("{} has made no progress for {} s", stuck.part, stuck.silent_ms / 1000);
        let reason = stuck.iter().map(name).collect::<Vec<_>>().join(", ");
        Said::refused(StatusCode::SERVICE_UNAVAILABLE, reason)
    }

    async fn ready(&self, lane: Lane) -> Said {
        let status = match self.status().await {
            Ok(status) => status,
            Err(refused) => return refused,
        };
        let queue = status.queue.into_iter().find(|queue| queue.lane == lane.name());
        match status.store.error.or(queue.and_then(|queue| queue.refusing)) {
            None => Said::json(StatusCode::OK, "{\"ready\":{}}\n"),
            Some(reason) => Said::refused(StatusCode::SERVICE_UNAVAILABLE, reason),
        }
    }

    async fn metrics(&self) -> Said {
        match self.status().await {
            Ok(status) => Said {
                content_type: metrics::CONTENT_TYPE,
                ..Said::json(StatusCode::OK, metrics::render(&status))
            },
            Err(refused) => refused,
        }
    }

    async fn status_page(&self) -> Said {
        match self.status().await {
            Ok(status) => {
                let mut body = serde_json::to_vec_pretty(&status).expect("a status has text keys only");
                body.push(b'\n');
                Said::json(StatusCode::OK, body)
            }
            Err(refused) => refused,
        }
    }

    async fn publish(&self, form: Form, body: Incoming) -> Said {
        let Ok(_place) = self.waiting.try_acquire() else {
            return self.busy(format!("{} requests are waiting already", self.settings.max_waiting));
        };
        let max = self.settings.max_body;
        // Of a body that does not say how long it is, the most.
        let announced =
            body.size_hint().exact().map_or(max, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        if announced > max {
            return self.too_large(format!("a body holds at most {max} bytes"));
        }
        let Ok(_bytes) = self.bytes.try_acquire_many(u32::try_from(announced).unwrap_or(u32::MAX)) else {
            return self.busy("too many bytes are waiting already".to_owned());
        };
        let body = match timeout(self.settings.read_timeout, Limited::new(body, max).collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                return self.too_large(format!("a body holds at most {max} bytes"));
            }
            Ok(Err(error)) => {
                return Said::refused(StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}"));
            }
            Err(_) => {
                self.stats.http_bodies_refused.increment();
                let reason = format!("the body took longer than {:?}", self.settings.read_timeout);
                return Said::refused(StatusCode::REQUEST_TIMEOUT, reason);
            }
        };
        let messages = match body::messages(form, &body, clock::now()) {
            Ok(messages) => messages,
            Err(body::Wrong::Bad(reason)) => return Said::refused(StatusCode::BAD_REQUEST, reason),
            Err(body::Wrong::TooMany(count)) => {
                return self.too_large(format!(
                    "a request holds at most {} messages, not {count}",
                    body::MESSAGES_MAX
                ));
            }
        };
        let count = messages.len();
        match control::ask(&self.requests, Ask::Publish(messages)).await {
            Answer::Accepted {} => {
                Said::json(StatusCode::OK, format!("{{\"accepted\":{{\"messages\":{count}}}}}\n"))
            }
            Answer::HandedOver {} => {
                Said::json(StatusCode::ACCEPTED, format!("{{\"handed_over\":{{\"messages\":{count}}}}}\n"))
            }
            Answer::Refused { reason } => Said::refused(StatusCode::SERVICE_UNAVAILABLE, reason),
            _ => Said::refused(StatusCode::INTERNAL_SERVER_ERROR, "the answer does not fit the question"),
        }
    }

    fn busy(&self, reason: String) -> Said {
        self.stats.http_busy.increment();
        Said::refused(StatusCode::TOO_MANY_REQUESTS, reason + "; try again")
    }

    fn too_large(&self, reason: String) -> Said {
        self.stats.http_bodies_refused.increment();
        Said::refused(StatusCode::PAYLOAD_TOO_LARGE, reason)
    }

    /// Says so to a connection too many; it is closed then.
    fn turn_away(&self, stream: &Stream) {
        self.stats.http_connections_refused.increment();
        let reason = format!("{} connections are open already; try again", self.settings.max_connections);
        let said = Said::refused(StatusCode::SERVICE_UNAVAILABLE, reason);
        let head = format!(
            "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: {RETRY_AFTER_S}\r\ncontent-type: {JSON}\r\n\
             content-length: {}\r\n\r\n",
            said.body.len()
        );
        if let Err(error) = stream.say(&[head.as_bytes(), &said.body].concat()) {
            debug!(%error, "an HTTP connection too many went away by itself");
        }
    }
}

/// The token that requests must carry.
fn token(path: &Path) -> Result<String, String> {
    match secret::read(path) {
        Ok(text) => match text.trim() {
            "" => Err("it is empty".to_owned()),
            token => Ok(token.to_owned()),
        },
        Err(Unusable::Io(error)) => Err(error.to_string()),
        Err(Unusable::Open { mode }) => {
            Err(format!("every user of this machine may read it (mode {mode:03o}): run chmod 640 on it"))
        }
    }
}
