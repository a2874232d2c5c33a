//! The local Unix socket through which the other commands speak to the running agent.
//!
//! Only the agent's own user and group may connect (mode 0660): whoever operates the gateway is put into that group and
//! needs not be root. Requests of one connection may be sent ahead; they are answered in order. Connections, line
//! lengths, requests and bytes under way are bounded. There is no deadline for the next request: the kernel says at once
//! when the other end is gone.
//!
//! Invariant (P1): "accepted" is the agent's word, passed on; nothing here says it by itself.

pub mod client;
pub mod wire;

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::codec::{FramedRead, LinesCodec, LinesCodecError};
use tracing::{debug, warn};

use crate::clock;
use crate::message::Message;
use crate::trouble::Trouble;

use wire::{Answer, LINE_MAX_BYTES};

/// Whose the socket is: the agent's user's and group's.
const SOCKET_MODE: u32 = 0o660;

/// Connections at a time.
const CONNECTIONS_MAX: usize = 16;

/// Requests of one connection that are not answered yet.
const REQUESTS_MAX: usize = 256;

/// Bytes of requests that are not answered yet, over all connections.
const BYTES_MAX: usize = 4 * LINE_MAX_BYTES;

/// How long the agent may take to answer. A lane may wait up to 60 s for its commit.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(90);

/// How long the other end may take to read an answer.
pub(crate) const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Answers that are written together, about.
const ANSWERS_BYTES: usize = 16 << 10;

/// A request for the agent.
#[derive(Debug)]
pub struct Request {
    /// What is asked.
    pub ask: Ask,
    /// Where the answer goes. Dropping it answers "refused".
    pub reply: oneshot::Sender<Answer>,
}

/// What is asked of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// [`Answer::Status`].
    Status,
    /// Messages that are accepted together or not at all: [`Answer::Accepted`] after COMMIT. Or one at QoS 0, which is
    /// never stored: [`Answer::HandedOver`].
    Publish(Vec<Message>),
    /// [`Answer::Messages`], [`Answer::DeadLetters`] or [`Answer::Changed`].
    Queue(wire::QueueAsk),
    /// [`Answer::Reloaded`] or [`Answer::NotReloaded`].
    Reload,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody answers there.
    #[error("another agent is listening on {}; stop it first (systemctl stop fieldpost)", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name, and is left alone.
    #[error("{} is not a socket; move it away or choose another path for the socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error(
        "cannot make the socket {}: {source}; its folder must exist, belong to the agent's user, and the \
         whole path be shorter than 108 bytes",
        path.display()
    )]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The socket, listening. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// The next connection.
    pub(crate) async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.inner.accept().await?.0)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, path = %self.path.display(), "the socket was not removed");
        }
    }
}

/// Makes the control socket, in place of one that nobody listens on any more. Call it within a runtime.
///
/// # Errors
/// Somebody answers there, something else has that name, or the operating system refuses.
pub fn bind(path: &Path) -> Result<Listener, BindError> {
    bind_for(path, CONNECTIONS_MAX)
}

/// Like [`bind`], for a socket on which so many connections may wait to be accepted.
pub(crate) fn bind_for(path: &Path, backlog: usize) -> Result<Listener, BindError> {
    let failed = |source| BindError::Io { path: path.to_owned(), source };
    remove_stale(path)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // Before bind, or there would be a moment in which others may connect; Linux gives the file this mode. The group is
    // let in afterwards, because a umask, which is meant for files, would take its part away.
    let only_us = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::fchmod(&socket, only_us).map_err(|errno| failed(errno.into()))?;
    socket.bind(&SockAddr::unix(path).map_err(failed)?).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
    socket.listen(i32::try_from(backlog).unwrap_or(i32::MAX)).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    let inner = UnixListener::from_std(socket.into()).map_err(failed)?;
    Ok(Listener { inner, path: path.to_owned() })
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Io { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Serves the socket until the agent drops its end of `requests`; what it has answered by then is still delivered.
pub async fn serve(listener: Listener, requests: mpsc::Sender<Request>) {
    let bytes = Arc::new(Semaphore::new(BYTES_MAX));
    let mut connections = JoinSet::new();
    let (mut deaf, started) = (Trouble::default(), Instant::now());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = requests.closed() => break,
        };
        match accepted {
            Ok(stream) if connections.len() < CONNECTIONS_MAX => {
                connections.spawn(converse(stream, requests.clone(), Arc::clone(&bytes)));
            }
            Ok(stream) => turn_away(&stream),
            Err(error) => {
                // Out of file descriptors, most likely: accept would fail again at once.
                let now_ms = started.elapsed().as_millis() as u64;
                if let Some(more) = deaf.happened(&error.to_string(), now_ms) {
                    warn!(%error, "cannot take a connection on the control socket{more}");
                }
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
    drop(listener);
    let delivered = async { while connections.join_next().await.is_some() {} };
    if timeout(WRITE_DEADLINE, delivered).await.is_err() {
        debug!("some control connections did not read their answers");
    }
}

/// One line fits into the buffer of a fresh socket, so there is nothing to wait for.
fn turn_away(stream: &UnixStream) {
    let reason = format!("{CONNECTIONS_MAX} programs are connected to the agent already; try again");
    if let Err(error) = stream.try_write(&to_line(&Answer::Refused { reason })) {
        debug!(%error, "a connection too many went away by itself");
    }
}

/// An answer, now or once the agent has given it.
enum Pending {
    Now(Answer),
    Later(oneshot::Receiver<Answer>, OwnedSemaphorePermit),
}

async fn converse(stream: UnixStream, requests: mpsc::Sender<Request>, bytes: Arc<Semaphore>) {
    let (read, write) = stream.into_split();
    let (pending, answers) = mpsc::channel(REQUESTS_MAX);
    tokio::select! {
        () = answer(write, answers) => {}
        // What was asked is still answered: `answer` ends once it has seen the last of it.
        () = async { listen(read, requests, bytes, pending).await; std::future::pending().await } => {}
    }
}

/// Reads requests until the other end has no more.
async fn listen(
    read: OwnedReadHalf,
    requests: mpsc::Sender<Request>,
    bytes: Arc<Semaphore>,
    pending: mpsc::Sender<Pending>,
) {
    let mut lines = FramedRead::new(read, LinesCodec::new_with_max_length(LINE_MAX_BYTES));
    loop {
        let line = tokio::select! {
            line = lines.next() => line,
            () = requests.closed() => None,
        };
        let Some(line) = line else { return };
        let (next, go_on) = match line {
            Ok(line) => (forward(&line, &requests, &bytes).await, true),
            Err(LinesCodecError::MaxLineLengthExceeded) => {
                (refused(format!("a line holds at most {LINE_MAX_BYTES} bytes")), false)
            }
            Err(LinesCodecError::Io(error)) => (refused(format!("the line cannot be read: {error}")), false),
        };
        if pending.send(next).await.is_err() || !go_on {
            return;
        }
    }
}

async fn forward(line: &str, requests: &mpsc::Sender<Request>, bytes: &Arc<Semaphore>) -> Pending {
    let ask = match wire::understand(line, clock::now()) {
        Ok(ask) => ask,
        Err(reason) => return refused(reason),
    };
    let size = u32::try_from(line.len()).expect("a line is at most 1 MiB");
    let Ok(Ok(permit)) = timeout(ANSWER_DEADLINE, Arc::clone(bytes).acquire_many_owned(size)).await else {
        return refused("too much is waiting to be accepted; try again".to_owned());
    };
    match put_to(requests, ask).await {
        Ok(answer) => Pending::Later(answer, permit),
        Err(answer) => Pending::Now(answer),
    }
}

/// Puts a question to the agent, which takes questions in the order in which this is awaited.
async fn put_to(requests: &mpsc::Sender<Request>, ask: Ask) -> Result<oneshot::Receiver<Answer>, Answer> {
    let (reply, answer) = oneshot::channel();
    match requests.send_timeout(Request { ask, reply }, ANSWER_DEADLINE).await {
        Ok(()) => Ok(answer),
        Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
            Err(Answer::Refused { reason: "the agent is busy; try again".to_owned() })
        }
        Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(stopping()),
    }
}

/// Puts a question to the agent and waits for its answer.
pub(crate) async fn ask(requests: &mpsc::Sender<Request>, ask: Ask) -> Answer {
    match put_to(requests, ask).await {
        Ok(answer) => agents_answer(answer).await,
        Err(answer) => answer,
    }
}

fn refused(reason: String) -> Pending {
    Pending::Now(Answer::Refused { reason })
}

/// Writes answers in the order of their requests, until there are no more or nobody reads them.
async fn answer(mut write: OwnedWriteHalf, mut answers: mpsc::Receiver<Pending>) {
    let mut lines = Vec::new();
    let mut next = answers.recv().await;
    while let Some(pending) = next {
        let answer = match pending {
            Pending::Now(answer) => answer,
            Pending::Later(mut answer, _permit) => match answer.try_recv() {
                Ok(answer) => answer,
                Err(TryRecvError::Closed) => stopping(),
                Err(TryRecvError::Empty) => {
                    // What is ready does not wait for what is not.
                    if !put(&mut write, &mut lines).await {
                        return;
                    }
                    agents_answer(answer).await
                }
            },
        };
        lines.extend(to_line(&answer));
        // A commit answers many at once; they go in one write.
        next = if lines.len() < ANSWERS_BYTES { answers.try_recv().ok() } else { None };
        if next.is_none() {
            if !put(&mut write, &mut lines).await {
                return;
            }
            next = answers.recv().await;
        }
    }
}

/// Writes the lines and forgets them; `false`: nobody reads them.
async fn put(write: &mut OwnedWriteHalf, lines: &mut Vec<u8>) -> bool {
    let written = timeout(WRITE_DEADLINE, write.write_all(lines)).await;
    lines.clear();
    match &written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "a control connection was lost"),
        Err(_) => debug!("a control connection does not read its answers"),
    }
    matches!(written, Ok(Ok(())))
}

fn stopping() -> Answer {
    Answer::Refused { reason: "the agent is stopping".to_owned() }
}

async fn agents_answer(answer: oneshot::Receiver<Answer>) -> Answer {
    match timeout(ANSWER_DEADLINE, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => stopping(),
        Err(_) => Answer::Refused {
            reason: format!("no answer within {} s; it may still be accepted", ANSWER_DEADLINE.as_secs()),
        },
    }
}

fn to_line(answer: &Answer) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).expect("answers have text keys only");
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A served socket, and the agent's end of it.
    struct Served {
        path: PathBuf,
        requests: mpsc::Receiver<Request>,
        _folder: tempfile::TempDir,
    }

    fn served() -> Served {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control.sock");
        let (sender, requests) = mpsc::channel(4);
        tokio::spawn(serve(bind(&path).expect("a free name"), sender));
        Served { path, requests, _folder: folder }
    }

    /// Accepts what it is asked, under the names of the topics `no` (refused) and `silent` (reply dropped).
    async fn agent(mut requests: mpsc::Receiver<Request>) {
        while let Some(Request { ask, reply }) = requests.recv().await {
            let answer = match &ask {
                Ask::Publish(messages) if messages[0].topic.as_str() == "silent" => continue,
                Ask::Publish(messages) if messages[0].topic.as_str() == "no" => {
                    Answer::Refused { reason: "full".into() }
                }
                _ => Answer::Accepted {},
            };
            let _ = reply.send(answer);
        }
    }

    async fn ask(path: &Path, lines: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).await.expect("a listener");
        let mut answers = String::new();
        let talk = async {
            // The server may close before it has read all of an overlong line.
            let _ = stream.write_all(lines).await;
            let _ = stream.shutdown().await;
            let _ = stream.read_to_string(&mut answers).await;
        };
        timeout(PATIENCE, talk).await.expect("an answer in time");
        answers
    }

    fn publish(topic: &str) -> String {
        format!("{{\"publish\":{{\"topic\":\"{topic}\",\"text\":\"x\"}}}}\n")
    }

    #[tokio::test]
    async fn many_requests_sent_ahead_are_answered_in_order() {
        let served = served();
        tokio::spawn(agent(served.requests));
        let mut lines = String::new();
        let mut expected = String::new();
        for number in 0..REQUESTS_MAX * 2 {
            let (topic, answer) = match number % 4 {
                0 => ("no", r#"{"refused":{"reason":"full"}}"#),
                1 => ("silent", r#"{"refused":{"reason":"the agent is stopping"}}"#),
                2 => ("a/+", r#"{"refused":{"reason":"a topic must not hold '+'"}}"#),
                _ => ("yes", r#"{"accepted":{}}"#),
            };
            lines += &publish(topic);
            expected += &format!("{answer}\n");
        }
        assert_eq!(ask(&served.path, lines.as_bytes()).await, expected);
    }

    #[tokio::test]
    async fn nothing_is_accepted_before_the_agent_says_so() {
        let mut served = served();
        let stream = UnixStream::connect(&served.path).await.expect("a listener");
        let (read, mut write) = stream.into_split();
        write.write_all(publish("a/b").as_bytes()).await.expect("written");
        let Request { ask, reply } = timeout(PATIENCE, served.requests.recv()).await.unwrap().unwrap();
        let Ask::Publish(messages) = ask else { panic!("a message, not {ask:?}") };
        assert_eq!(messages[0].topic.as_str(), "a/b");
        let mut lines = BufReader::new(read).lines();
        let early = timeout(Duration::from_millis(50), lines.next_line()).await;
        assert!(early.is_err(), "an answer before there was one: {early:?}");
        reply.send(Answer::Accepted {}).expect("somebody waits");
        let line = timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
        assert_eq!(line.as_deref(), Some(r#"{"accepted":{}}"#));
    }

    #[tokio::test]
    async fn broken_lines_are_refused_and_an_overlong_one_ends_the_connection() {
        let served = served();
        tokio::spawn(agent(served.requests));
        let answers = ask(&served.path, format!("nonsense\n{}", publish("yes")).as_bytes()).await;
        let (first, second) = answers.split_once('\n').expect("two lines");
        assert!(first.contains("not a request"), "{first}");
        assert_eq!(second, "{\"accepted\":{}}\n");

        let answers = ask(&served.path, b"{\"publish\":{\"topic\":\"\xff\"}}\n").await;
        assert!(answers.contains("cannot be read"), "{answers}");

        let long = format!("{}\n{}", "x".repeat(LINE_MAX_BYTES + 1), publish("yes"));
        let answers = ask(&served.path, long.as_bytes()).await;
        assert!(answers.is_empty() || answers.contains("a line holds at most"), "{answers}");
        assert!(!answers.contains("accepted"), "{answers}");
    }

    #[tokio::test]
    async fn one_connection_too_many_is_told_so() {
        let served = served();
        tokio::spawn(agent(served.requests));
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = UnixStream::connect(&served.path).await.expect("a listener");
            stream.write_all(publish("yes").as_bytes()).await.expect("written");
            let mut line = String::new();
            timeout(PATIENCE, BufReader::new(&mut stream).read_line(&mut line)).await.unwrap().unwrap();
            open.push(stream);
        }
        assert!(ask(&served.path, b"").await.contains("connected to the agent already"));
        drop(open);
        let free_again = async {
            while ask(&served.path, publish("yes").as_bytes()).await != "{\"accepted\":{}}\n" {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, free_again).await.expect("the others have gone");
    }

    #[tokio::test]
    async fn only_the_agents_user_and_group_may_connect_and_the_file_goes_with_the_listener() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control.sock");
        let listener = bind(&path).expect("a free name");
        let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a free name"));
        assert!(path.exists(), "killed agents leave their socket behind");
        let listener = bind(&path).expect("a stale socket is in nobody's way");
        assert!(matches!(bind(&path), Err(BindError::InUse { .. })));
        assert!(path.exists());
        drop(listener);

        std::fs::write(&path, "a letter").expect("written");
        assert!(matches!(bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).expect("still there"), b"a letter");
        assert!(matches!(bind(&folder.path().join("no/folder")), Err(BindError::Io { .. })));
    }

    #[tokio::test]
    async fn a_stopping_agent_still_delivers_what_it_has_answered() {
        let mut served = served();
        let mut stream = UnixStream::connect(&served.path).await.expect("a listener");
        stream.write_all(publish("yes").as_bytes()).await.expect("written");
        let request = timeout(PATIENCE, served.requests.recv()).await.unwrap().unwrap();
        drop(served.requests);
        request.reply.send(Answer::Accepted {}).expect("somebody waits");
        let mut answers = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answers)).await.unwrap().unwrap();
        assert_eq!(answers, "{\"accepted\":{}}\n");
        assert!(!served.path.exists(), "nobody listens any more");
    }
}
