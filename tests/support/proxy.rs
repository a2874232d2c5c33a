//! A TCP proxy that stands between client and broker and fails as links do: cut, stalled, half-open, slow.
//!
//! One task accepts, and owns the task of every connection; settings reach them through a watch channel, so a
//! change takes effect at once, also on open connections.
//!
//! Invariant: unless it cuts, the bytes that come out are the bytes that went in, in their order.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

/// Bytes moved at once.
const CHUNK: usize = 16 * 1024;

/// Where new connections are cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CutPlan {
    /// Nowhere.
    Never,
    /// After so many bytes towards the broker, or towards the client.
    After {
        /// Bytes from the client that still reach the broker.
        to_broker: Option<u64>,
        /// Bytes from the broker that still reach the client.
        to_client: Option<u64>,
    },
    /// After a number of bytes drawn for each connection, in a direction drawn as well.
    Random {
        /// Same seed, same numbers.
        seed: u64,
        /// Fewest bytes.
        least: u64,
        /// Most bytes.
        most: u64,
    },
}

/// How bytes pass; applies to open connections too.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flow {
    stall_to_broker: bool,
    stall_to_client: bool,
    delay: Duration,
    dribble: bool,
}

/// What went through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Connections accepted.
    pub connections: u64,
    /// Connections cut, by plan or by `cut_all`.
    pub cuts: u64,
    /// Bytes passed on to the broker, or being written when it broke.
    pub to_broker: u64,
    /// Bytes passed on to clients, or being written when it broke.
    pub to_client: u64,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    cuts: AtomicU64,
    to_broker: AtomicU64,
    to_client: AtomicU64,
}

/// Handle of a running proxy. Clones are handles of the same one; it ends with the last of them.
#[derive(Clone, Debug)]
pub struct Proxy {
    port: u16,
    orders: mpsc::Sender<(Order, oneshot::Sender<io::Result<()>>)>,
    flow: Arc<watch::Sender<Flow>>,
    counters: Arc<Counters>,
}

enum Order {
    Target(SocketAddr),
    Plan(CutPlan),
    Refuse(bool),
    CutAll,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and forwards to this one.
    pub async fn start(target_port: u16) -> io::Result<Proxy> {
        let listener = TcpListener::from_std(super::listen()?)?;
        let port = listener.local_addr()?.port();
        let still =
            Flow { stall_to_broker: false, stall_to_client: false, delay: Duration::ZERO, dribble: false };
        let (flow, watched) = watch::channel(still);
        let (orders, receiver) = mpsc::channel(16);
        let counters = Arc::new(Counters::default());
        let owner = Owner {
            port,
            listener: Some(listener),
            target: (Ipv4Addr::LOCALHOST, target_port).into(),
            plan: CutPlan::Never,
            random: fastrand::Rng::with_seed(0),
            orders: receiver,
            flow: watched,
            counters: counters.clone(),
            links: JoinSet::new(),
        };
        tokio::spawn(owner.run());
        Ok(Proxy { port, orders, flow: Arc::new(flow), counters })
    }

    /// The port clients connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where clients connect to, as configuration files want it.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// New connections go to this port of 127.0.0.1.
    pub async fn set_target(&self, port: u16) {
        self.order(Order::Target((Ipv4Addr::LOCALHOST, port).into())).await.expect("a target cannot fail");
    }

    /// New connections are cut by this plan.
    pub async fn set_plan(&self, plan: CutPlan) {
        self.order(Order::Plan(plan)).await.expect("a plan cannot fail");
    }

    /// Breaks every connection, on both sides, and returns when they are broken.
    pub async fn cut_all(&self) {
        self.order(Order::CutAll).await.expect("cutting cannot fail");
    }

    /// Refuses new connections as a dead port does, or listens again. Open ones are left alone.
    pub async fn refuse(&self, refuse: bool) -> io::Result<()> {
        self.order(Order::Refuse(refuse)).await
    }

    /// Stops passing bytes each way without closing anything; what a client sends piles up in its socket.
    pub fn stall(&self, to_broker: bool, to_client: bool) {
        self.flow.send_modify(|flow| {
            flow.stall_to_broker = to_broker;
            flow.stall_to_client = to_client;
        });
    }

    /// Holds each chunk back for this long.
    pub fn delay(&self, delay: Duration) {
        self.flow.send_modify(|flow| flow.delay = delay);
    }

    /// Passes one byte at a time.
    pub fn dribble(&self, dribble: bool) {
        self.flow.send_modify(|flow| flow.dribble = dribble);
    }

    /// What went through so far.
    pub fn counts(&self) -> Counts {
        let c = &self.counters;
        Counts {
            connections: c.connections.load(Relaxed),
            cuts: c.cuts.load(Relaxed),
            to_broker: c.to_broker.load(Relaxed),
            to_client: c.to_client.load(Relaxed),
        }
    }

    async fn order(&self, order: Order) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.orders
            .send((order, done))
            .await
            .map_err(drop)
            .expect("the proxy's task lives while a handle does");
        answer.await.expect("the proxy's task answers every order")
    }
}

/// The task that accepts.
struct Owner {
    port: u16,
    listener: Option<TcpListener>,
    target: SocketAddr,
    plan: CutPlan,
    random: fastrand::Rng,
    orders: mpsc::Receiver<(Order, oneshot::Sender<io::Result<()>>)>,
    flow: watch::Receiver<Flow>,
    counters: Arc<Counters>,
    links: JoinSet<()>,
}

enum Event {
    Accepted(io::Result<(TcpStream, SocketAddr)>),
    Order(Order, oneshot::Sender<io::Result<()>>),
    LinkEnded,
    HandlesGone,
}

impl Owner {
    async fn run(mut self) {
        loop {
            match self.wait().await {
                Event::Accepted(Ok((stream, _))) => self.accepted(stream),
                // No file descriptors left, perhaps: not to be tried in a busy loop.
                Event::Accepted(Err(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
                Event::Order(order, done) => {
                    let _ = done.send(self.obey(order).await);
                }
                Event::LinkEnded => {}
                Event::HandlesGone => return,
            }
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
            order = self.orders.recv() => order.map_or(Event::HandlesGone, |(o, done)| Event::Order(o, done)),
            Some(_) = self.links.join_next() => Event::LinkEnded,
        }
    }

    async fn obey(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Target(target) => self.target = target,
            Order::Plan(plan) => {
                if let CutPlan::Random { seed, .. } = plan {
                    self.random = fastrand::Rng::with_seed(seed);
                }
                self.plan = plan;
            }
            Order::Refuse(true) => self.listener = None,
            Order::Refuse(false) if self.listener.is_none() => {
                self.listener = Some(TcpListener::bind((Ipv4Addr::LOCALHOST, self.port)).await?);
            }
            Order::Refuse(false) => {}
            Order::CutAll => {
                while self.links.try_join_next().is_some() {}
                self.counters.cuts.fetch_add(self.links.len() as u64, Relaxed);
                self.links.shutdown().await;
            }
        }
        Ok(())
    }

    fn accepted(&mut self, client: TcpStream) {
        self.counters.connections.fetch_add(1, Relaxed);
        let (to_broker, to_client) = self.budgets();
        let link = Link { flow: self.flow.clone(), counters: self.counters.clone(), to_broker, to_client };
        self.links.spawn(link.run(client, self.target));
    }

    /// Bytes a new connection may pass each way before it is cut.
    fn budgets(&mut self) -> (Option<u64>, Option<u64>) {
        match self.plan {
            CutPlan::Never => (None, None),
            CutPlan::After { to_broker, to_client } => (to_broker, to_client),
            CutPlan::Random { least, most, .. } => {
                let bytes = Some(self.random.u64(least..=most.max(least)));
                if self.random.bool() { (bytes, None) } else { (None, bytes) }
            }
        }
    }
}

/// One client's connection and its twin to the broker.
struct Link {
    flow: watch::Receiver<Flow>,
    counters: Arc<Counters>,
    to_broker: Option<u64>,
    to_client: Option<u64>,
}

/// How one direction ended.
#[derive(PartialEq, Eq)]
enum Ended {
    /// The sender closed; the other direction may go on.
    Finished,
    /// Cut by plan, or a socket failed.
    Broken,
}

/// One direction.
struct Pump<'a> {
    flow: watch::Receiver<Flow>,
    stalled: fn(&Flow) -> bool,
    budget: Option<u64>,
    passed: &'a AtomicU64,
    cuts: &'a AtomicU64,
}

impl Link {
    async fn run(self, client: TcpStream, target: SocketAddr) {
        let Ok(broker) = TcpStream::connect(target).await else { return };
        let _ = (client.set_nodelay(true), broker.set_nodelay(true));
        let (client_reads, client_writes) = client.into_split();
        let (broker_reads, broker_writes) = broker.into_split();
        let up = Pump {
            flow: self.flow.clone(),
            stalled: |flow| flow.stall_to_broker,
            budget: self.to_broker,
            passed: &self.counters.to_broker,
            cuts: &self.counters.cuts,
        };
        let down = Pump {
            flow: self.flow.clone(),
            stalled: |flow| flow.stall_to_client,
            budget: self.to_client,
            passed: &self.counters.to_client,
            cuts: &self.counters.cuts,
        };
        let (up, down) = (up.run(client_reads, broker_writes), down.run(broker_reads, client_writes));
        tokio::pin!(up, down);
        // A side that only finished leaves the other direction open, as TCP does.
        tokio::select! {
            ended = &mut up => if ended == Ended::Finished { down.await; },
            ended = &mut down => if ended == Ended::Finished { up.await; },
        }
    }
}

impl Pump<'_> {
    async fn run(mut self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Ended {
        let mut buffer = vec![0; CHUNK];
        loop {
            if self.budget == Some(0) {
                self.cuts.fetch_add(1, Relaxed);
                return Ended::Broken;
            }
            let flow = self.flowing().await;
            let most = if flow.dribble { 1 } else { CHUNK };
            let most = self.budget.map_or(most, |left| most.min(usize::try_from(left).unwrap_or(most)));
            // A change made before a byte was sent must already hold for that byte, hence the order.
            let read = tokio::select! {
                biased;
                Ok(()) = self.flow.changed() => continue,
                read = from.read(&mut buffer[..most]) => read,
            };
            let Ok(count) = read else { return Ended::Broken };
            if count == 0 {
                let _ = to.shutdown().await;
                return Ended::Finished;
            }
            tokio::time::sleep(flow.delay).await;
            // Counted first, so that whoever has received a byte finds it counted.
            self.passed.fetch_add(count as u64, Relaxed);
            if to.write_all(&buffer[..count]).await.is_err() {
                return Ended::Broken;
            }
            self.budget = self.budget.map(|left| left - count as u64);
        }
    }

    /// Waits while stalled.
    async fn flowing(&mut self) -> Flow {
        let stalled = self.stalled;
        if let Ok(flow) = self.flow.wait_for(|flow| !stalled(flow)).await {
            return flow.clone();
        }
        // The last handle is gone; the owner ends, and this with it.
        std::future::pending().await
    }
}
