//! The model broker behind a TCP port of this machine.
//!
//! One task owns the `Broker`; each connection has a task that only moves bytes. The handle talks to the owner
//! through a channel, so nothing is shared and a closure passed to `with` sees one consistent moment.
//!
//! Invariant: a connection's bytes reach the core in order, and its output leaves in order before it is closed.

use super::{Broker, ConnId, Memory, Output};
use bytes::{Bytes, BytesMut};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior};

/// How exactly the broker's clock runs.
const TICK: Duration = Duration::from_millis(5);
/// Bytes read at once from a client.
const READ: usize = 64 * 1024;
/// Chunks read but not handled, over all connections.
const EVENTS: usize = 256;
/// Writes a client may be behind with; one that is further behind is disconnected.
const WRITES: usize = 4096;
/// How long a closed connection may take to swallow its last bytes.
const LINGER: Duration = Duration::from_millis(500);

/// Handle of a running broker. Clones are handles of the same one; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct BrokerServer {
    port: u16,
    calls: mpsc::Sender<Call>,
}

type Visit = Box<dyn FnOnce(&mut Broker) + Send>;

enum Call {
    With(Visit),
    Stop(Memory, oneshot::Sender<()>),
    Start(oneshot::Sender<io::Result<()>>),
}

enum Event {
    Accepted(io::Result<(TcpStream, SocketAddr)>),
    Bytes(ConnId, Bytes),
    Closed(ConnId),
    Call(Call),
    Tick,
    HandlesGone,
}

impl BrokerServer {
    /// Listens on a free port of 127.0.0.1.
    pub async fn start(broker: Broker) -> io::Result<BrokerServer> {
        BrokerServer::serve(TcpListener::from_std(super::super::listen()?)?, broker)
    }

    /// Listens on this port of 127.0.0.1.
    pub async fn start_on(port: u16, broker: Broker) -> io::Result<BrokerServer> {
        BrokerServer::serve(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?, broker)
    }

    fn serve(listener: TcpListener, broker: Broker) -> io::Result<BrokerServer> {
        let port = listener.local_addr()?.port();
        let (calls, receiver) = mpsc::channel(16);
        tokio::spawn(Owner::new(port, listener, receiver, broker).run());
        Ok(BrokerServer { port, calls })
    }

    /// The port, the same for the broker's whole life.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Where it listens, as configuration files want it.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Runs a closure on the core, between two packets; what it makes the broker send is sent after it.
    pub async fn with<R: Send + 'static>(&self, visit: impl FnOnce(&mut Broker) -> R + Send + 'static) -> R {
        let (call, answer) = visit_call(visit);
        self.calls.send(call).await.map_err(drop).expect("the broker's task lives while a handle does");
        answer.await.expect("the broker's task answers every call")
    }

    /// The same from a thread outside the runtime; panics inside it, where it could block for ever.
    pub fn with_blocking<R: Send + 'static>(
        &self,
        visit: impl FnOnce(&mut Broker) -> R + Send + 'static,
    ) -> R {
        let (call, answer) = visit_call(visit);
        self.calls.blocking_send(call).map_err(drop).expect("the broker's task lives while a handle does");
        answer.blocking_recv().expect("the broker's task answers every call")
    }

    /// Waits until the condition holds; false if it does not within the time.
    pub async fn wait_for(
        &self,
        within: Duration,
        condition: impl Fn(&Broker) -> bool + Clone + Send + 'static,
    ) -> bool {
        let deadline = Instant::now() + within;
        loop {
            let condition = condition.clone();
            if self.with(move |broker| condition(broker)).await {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// The broker dies: no listener, every connection broken. The handle still inspects it.
    pub async fn stop(&self, memory: Memory) {
        let (done, stopped) = oneshot::channel();
        self.calls.send(Call::Stop(memory, done)).await.map_err(drop).expect("the broker's task lives");
        stopped.await.expect("the broker's task answers every call");
    }

    /// Listens again on the same port; no effect if it does already.
    pub async fn start_again(&self) -> io::Result<()> {
        let (done, started) = oneshot::channel();
        self.calls.send(Call::Start(done)).await.map_err(drop).expect("the broker's task lives");
        started.await.expect("the broker's task answers every call")
    }

    /// Stops and listens again.
    pub async fn restart(&self, memory: Memory) -> io::Result<()> {
        self.stop(memory).await;
        self.start_again().await
    }
}

fn visit_call<R: Send + 'static>(
    visit: impl FnOnce(&mut Broker) -> R + Send + 'static,
) -> (Call, oneshot::Receiver<R>) {
    let (sender, answer) = oneshot::channel();
    let call = Call::With(Box::new(move |broker| {
        // A caller that no longer waits does not mind.
        let _ = sender.send(visit(broker));
    }));
    (call, answer)
}

/// The task that owns the broker.
struct Owner {
    port: u16,
    listener: Option<TcpListener>,
    calls: mpsc::Receiver<Call>,
    events: mpsc::Receiver<(ConnId, Option<Bytes>)>,
    to_events: mpsc::Sender<(ConnId, Option<Bytes>)>,
    ticks: Interval,
    started: Instant,
    broker: Broker,
    writers: BTreeMap<ConnId, mpsc::Sender<Vec<u8>>>,
    tasks: JoinSet<()>,
}

impl Owner {
    fn new(port: u16, listener: TcpListener, calls: mpsc::Receiver<Call>, broker: Broker) -> Owner {
        let (to_events, events) = mpsc::channel(EVENTS);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Owner {
            port,
            listener: Some(listener),
            calls,
            events,
            to_events,
            ticks,
            started: Instant::now(),
            broker,
            writers: BTreeMap::new(),
            tasks: JoinSet::new(),
        }
    }

    async fn run(mut self) {
        loop {
            let event = self.wait().await;
            if matches!(event, Event::HandlesGone) {
                return;
            }
            self.handle(event).await;
            self.write_output();
        }
    }

    async fn wait(&mut self) -> Event {
        let listener = &self.listener;
        let accept = async {
            match listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = accept => Event::Accepted(accepted),
            Some((conn, bytes)) = self.events.recv() => match bytes {
                Some(bytes) => Event::Bytes(conn, bytes),
                None => Event::Closed(conn),
            },
            call = self.calls.recv() => call.map_or(Event::HandlesGone, Event::Call),
            _ = self.ticks.tick() => Event::Tick,
        }
    }

    async fn handle(&mut self, event: Event) {
        let now_ms = self.now_ms();
        match event {
            Event::Accepted(Ok((stream, _))) => self.accepted(stream, now_ms),
            // The client gave up, or there are no file descriptors left: not to be tried in a busy loop.
            Event::Accepted(Err(_)) => tokio::time::sleep(TICK).await,
            Event::Bytes(conn, bytes) => self.broker.input(conn, &bytes, now_ms),
            Event::Closed(conn) => {
                self.writers.remove(&conn);
                self.broker.closed(conn, now_ms);
            }
            Event::Call(Call::With(visit)) => {
                self.broker.tick(now_ms);
                visit(&mut self.broker);
            }
            Event::Call(Call::Stop(memory, done)) => {
                self.stop(memory).await;
                let _ = done.send(());
            }
            Event::Call(Call::Start(done)) => {
                let _ = done.send(self.listen().await);
            }
            Event::Tick => {
                self.broker.tick(now_ms);
                while self.tasks.try_join_next().is_some() {}
            }
            Event::HandlesGone => {}
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn accepted(&mut self, stream: TcpStream, now_ms: u64) {
        // Acknowledgements are small; a client waits for each window of them.
        let _ = stream.set_nodelay(true);
        let conn = self.broker.connect(now_ms);
        let (writer, writes) = mpsc::channel(WRITES);
        self.writers.insert(conn, writer);
        self.tasks.spawn(serve(conn, stream, self.to_events.clone(), writes));
    }

    async fn stop(&mut self, memory: Memory) {
        self.listener = None;
        self.tasks.shutdown().await;
        self.writers.clear();
        self.broker.tick(self.now_ms());
        self.broker.restart(memory);
        self.broker.take_output();
    }

    async fn listen(&mut self) -> io::Result<()> {
        if self.listener.is_none() {
            self.listener = Some(TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).await?);
        }
        Ok(())
    }

    fn write_output(&mut self) {
        for output in self.broker.take_output() {
            match output {
                Output::Send(conn, bytes) => self.write(conn, bytes),
                // The task sends what it was given, then sees its channel closed.
                Output::Close(conn) => drop(self.writers.remove(&conn)),
            }
        }
    }

    fn write(&mut self, conn: ConnId, bytes: Vec<u8>) {
        let Some(writer) = self.writers.get(&conn) else { return };
        if let Err(mpsc::error::TrySendError::Full(_)) = writer.try_send(bytes) {
            self.writers.remove(&conn);
            self.broker.cut_slow_reader(conn);
        }
    }
}

/// Moves one connection's bytes until either side is done.
async fn serve(
    conn: ConnId,
    stream: TcpStream,
    events: mpsc::Sender<(ConnId, Option<Bytes>)>,
    writes: mpsc::Receiver<Vec<u8>>,
) {
    let (mut reader, writer) = stream.into_split();
    let closed_by_broker = tokio::select! {
        () = read(conn, &mut reader, &events) => false,
        flushed = write(writer, writes) => flushed,
    };
    if closed_by_broker {
        // Closing with unread input resets the connection, and the client might never see the last packet.
        let _ = tokio::time::timeout(LINGER, tokio::io::copy(&mut reader, &mut tokio::io::sink())).await;
    }
    let _ = events.send((conn, None)).await;
}

async fn read(conn: ConnId, reader: &mut OwnedReadHalf, events: &mpsc::Sender<(ConnId, Option<Bytes>)>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(READ);
        match reader.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if events.send((conn, Some(buffer.split().freeze()))).await.is_err() {
            return;
        }
    }
}

/// Writes until the broker closes; false if the client went first.
async fn write(mut writer: OwnedWriteHalf, mut writes: mpsc::Receiver<Vec<u8>>) -> bool {
    while let Some(bytes) = writes.recv().await {
        if writer.write_all(&bytes).await.is_err() {
            return false;
        }
    }
    writer.shutdown().await.is_ok()
}
