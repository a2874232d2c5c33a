//! Whoever sends commands: an MQTT 5 client of its own that publishes them and keeps every answer.
//!
//! It speaks through our own link, and keeps its connection for as long as it lives: what is cut and killed is the
//! agent. Invariant: each answer stands in the list as often as the broker handed it on.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use fieldpost::message::{PacketId, Qos, Topic};
use fieldpost::uplink::link::{Endpoint, Link, open};
use fieldpost::uplink::packet::{Connect, Packet, Protocol, Publish, ReasonCode, Subscription};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// A message the asker received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Where.
    pub topic: String,
    /// What.
    pub payload: Bytes,
    /// MQTT 5 Correlation Data.
    pub correlation_data: Option<Bytes>,
}

impl Heard {
    /// The payload as JSON. Panics if it is none.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.payload).unwrap_or_else(|error| panic!("{error}: {:?}", self.payload))
    }
}

/// The client, connected and subscribed.
#[derive(Debug)]
pub struct Asker {
    to_publish: mpsc::Sender<Publish>,
    heard: Arc<Mutex<Vec<Heard>>>,
    task: JoinHandle<()>,
}

impl Asker {
    /// Connects to a port of 127.0.0.1 and subscribes at QoS 2. Panics if the broker does not let it.
    pub async fn start(port: u16, filters: &[&str]) -> Asker {
        let timeout = Duration::from_secs(10);
        let endpoint = Endpoint {
            host: "127.0.0.1",
            port,
            tls: None,
            timeout,
            user_timeout: timeout,
            stats: &std::sync::Arc::default(),
        };
        let mut link = Link::new(open(&endpoint).await.unwrap(), Protocol::V5, 1 << 20);
        let connect = Connect {
            client_id: "asker".into(),
            clean: true,
            keep_alive_s: 0,
            session_expiry_s: 0,
            receive_max: 1000,
            max_packet_bytes: 1 << 20,
            will: None,
            username: None,
            password: None,
        };
        link.queue(&Packet::Connect(Box::new(connect))).unwrap();
        assert!(matches!(link.next().await, Ok(Packet::ConnAck(ack)) if ack.reason == ReasonCode::SUCCESS));
        let subscription = |filter: &&str| Subscription {
            filter: (*filter).to_owned(),
            qos: Qos::ExactlyOnce,
            retained: false,
        };
        let first = PacketId::new(1).unwrap();
        link.queue(&Packet::Subscribe(first, filters.iter().map(subscription).collect())).unwrap();
        assert!(matches!(link.next().await, Ok(Packet::SubAck(..))));
        let (to_publish, publishes) = mpsc::channel(1000);
        let heard = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(converse(link, publishes, Arc::clone(&heard)));
        Asker { to_publish, heard, task }
    }

    /// Publishes a command; the broker's acknowledgement is not waited for.
    pub async fn ask(&self, topic: &str, payload: &str, qos: Qos, reply: Option<(&str, &[u8])>) {
        let publish = Publish {
            dup: false,
            qos,
            retain: false,
            topic: Topic::new(topic).unwrap(),
            id: None,
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            message_expiry_s: None,
            response_topic: reply.map(|(topic, _)| topic.to_owned()),
            correlation_data: reply.map(|(_, data)| Bytes::copy_from_slice(data)),
        };
        self.to_publish.send(publish).await.expect("the asker is connected");
    }

    /// Everything heard so far.
    pub fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }

    /// How many answers each id has so far; those without one count under the empty id.
    pub fn answers(&self) -> BTreeMap<String, Vec<serde_json::Value>> {
        let mut answers: BTreeMap<String, Vec<serde_json::Value>> = BTreeMap::new();
        for heard in self.heard.lock().unwrap().iter() {
            let json = heard.json();
            answers.entry(json["id"].as_str().unwrap_or_default().to_owned()).or_default().push(json);
        }
        answers
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn converse(
    mut link: Link<fieldpost::uplink::link::Stream>,
    mut publishes: mpsc::Receiver<Publish>,
    heard: Arc<Mutex<Vec<Heard>>>,
) {
    let mut next_id = 1u16;
    loop {
        tokio::select! {
            Some(mut publish) = publishes.recv() => {
                next_id = next_id % 60_000 + 1;
                publish.id = PacketId::new(next_id).filter(|_| publish.qos != Qos::AtMostOnce);
                link.queue(&Packet::Publish(Box::new(publish))).unwrap();
            }
            packet = link.next() => match packet.expect("the broker keeps its connection to the asker") {
                Packet::Publish(publish) => {
                    let Publish { topic, payload, correlation_data, id, qos, .. } = *publish;
                    heard.lock().unwrap().push(Heard { topic: topic.to_string(), payload, correlation_data });
                    match (qos, id) {
                        (Qos::ExactlyOnce, Some(id)) => link.queue(&Packet::PubRec(id, ReasonCode::SUCCESS)).unwrap(),
                        (_, Some(id)) => link.queue(&Packet::PubAck(id, ReasonCode::SUCCESS)).unwrap(),
                        _ => {}
                    }
                }
                Packet::PubRec(id, reason) => {
                    assert!(!reason.is_error(), "the broker refused a command: {reason:?}");
                    link.queue(&Packet::PubRel(id, ReasonCode::SUCCESS)).unwrap();
                }
                Packet::PubRel(id, _) => link.queue(&Packet::PubComp(id, ReasonCode::SUCCESS)).unwrap(),
                _ => {}
            }
        }
    }
}
