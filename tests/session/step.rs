//! Steps as data: what happens in a run is drawn from its seed before it begins, whatever state the world is in, so
//! that steps can be left out again to find the few that matter.

use std::time::Duration;

use fastrand::Rng;
use fieldpost::message::{Lane, Message, Qos};

use crate::support::broker::{self, Refusal, Times};
use crate::world::{NextCommit, World, few};

/// A message to come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Post {
    lane: Lane,
    qos: Qos,
    topic: u8,
    padding: usize,
    retain: bool,
    expires: bool,
}

/// One thing that happens. `still` is how many of the bytes under way to the broker arrive all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Produce(Vec<Post>),
    BrokerReads(usize),
    AgentReads(usize),
    Commit,
    Answer,
    Pass {
        ms: u64,
    },
    /// Connects if there is no connection, otherwise all bytes arrive.
    Exchange,
    /// All of it: bytes, commands, commit and answers.
    Round,
    Dispatch,
    Cut {
        still: usize,
    },
    /// The link breaks after the broker handled CONNECT and before we know.
    LoseConnack,
    Crash {
        still: usize,
    },
    CommitFails,
    BrokerRestarts,
    SessionLost,
    /// "Session present", whatever the truth is.
    Lie,
    IdentifiersForgotten,
    /// The broker forgets what it has sent us and we have not acknowledged to the end.
    SentForgotten,
    /// From the next connection on, which begins now: a broker may not change it under a living one.
    ReceiveMaximum {
        still: usize,
        max: Option<u16>,
    },
    MaximumQos {
        still: usize,
        max: u8,
    },
    PacketSize {
        still: usize,
        max: Option<u32>,
    },
    RetainNotAvailable {
        still: usize,
    },
    Refuse {
        filter: String,
        reason: u8,
        times: u32,
    },
    NeverAcknowledge,
    LinkDies,
    Presence,
    Command {
        qos: u8,
        own_id: Option<u8>,
        same: bool,
    },
    OversizeCommand {
        qos: u8,
    },
    WrongAcknowledgement {
        which: usize,
        other: u16,
    },
    Confuse {
        id: u16,
        inbound: bool,
    },
    ChangeBroker,
}

/// Which faults a run may meet, each as its weight against 1000 ordinary steps.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    pub cuts: u32,
    pub connacks_lost: u32,
    pub crashes: u32,
    pub failed_commits: u32,
    pub restarts: u32,
    pub session_losses: u32,
    pub lies: u32,
    pub forgotten_ids: u32,
    pub sent_forgotten: u32,
    pub receive_maxima: u32,
    pub maximum_qos: u32,
    pub packet_sizes: u32,
    pub retain_available: u32,
    pub refusals: u32,
    pub silences: u32,
    pub dead_links: u32,
    pub presence: u32,
    pub commands: u32,
    pub oversize: u32,
    pub expiring: u32,
    pub wrong_acknowledgements: u32,
    pub confusion: u32,
    pub other_broker: u32,
}

type Draw = fn(&mut Rng) -> Step;

impl Faults {
    fn weighted(&self) -> [(u32, Draw); 23] {
        [
            (self.cuts, |rng| Step::Cut { still: still(rng) }),
            (self.connacks_lost, |_| Step::LoseConnack),
            (self.crashes, |rng| Step::Crash { still: still(rng) }),
            (self.failed_commits, |_| Step::CommitFails),
            (self.restarts, |_| Step::BrokerRestarts),
            (self.session_losses, |_| Step::SessionLost),
            (self.lies, |_| Step::Lie),
            (self.forgotten_ids, |_| Step::IdentifiersForgotten),
            (self.sent_forgotten, |_| Step::SentForgotten),
            (self.receive_maxima, |rng| Step::ReceiveMaximum {
                still: still(rng),
                max: (rng.u8(0..4) > 0).then(|| few(rng, 12) as u16),
            }),
            (self.maximum_qos, |rng| Step::MaximumQos { still: still(rng), max: rng.u8(1..3) }),
            (self.packet_sizes, |rng| Step::PacketSize {
                still: still(rng),
                max: (rng.u8(0..3) > 0).then(|| rng.u32(44..70)),
            }),
            (self.retain_available, |rng| Step::RetainNotAvailable { still: still(rng) }),
            (self.refusals, refuse),
            (self.silences, |_| Step::NeverAcknowledge),
            (self.dead_links, |_| Step::LinkDies),
            (self.presence, |_| Step::Presence),
            (self.commands, |rng| Step::Command {
                qos: rng.u8(0..3),
                own_id: (rng.u8(0..3) == 0).then(|| rng.u8(0..12)),
                same: rng.u8(0..3) > 0,
            }),
            (self.oversize, |rng| Step::OversizeCommand { qos: rng.u8(1..3) }),
            (self.expiring, |rng| Step::Produce(vec![Post { expires: true, ..post(rng) }])),
            (self.wrong_acknowledgements, |rng| Step::WrongAcknowledgement {
                which: rng.usize(0..64),
                other: rng.u16(60_000..60_100),
            }),
            (self.confusion, |rng| Step::Confuse { id: rng.u16(60_000..60_100), inbound: rng.bool() }),
            (self.other_broker, |_| Step::ChangeBroker),
        ]
    }
}

/// So many steps.
pub fn draw(rng: &mut Rng, faults: &Faults, count: usize) -> Vec<Step> {
    let weighted = faults.weighted();
    let all = weighted.iter().map(|(weight, _)| weight).sum::<u32>();
    let draw = |_| {
        let mut dice = rng.u32(0..1000 + all);
        if dice < 1000 {
            return ordinary(rng, dice);
        }
        dice -= 1000;
        let (_, fault) = weighted
            .iter()
            .find(|(weight, _)| {
                let found = dice < *weight;
                dice = dice.saturating_sub(*weight);
                found
            })
            .expect("the dice is below the sum");
        fault(rng)
    };
    (0..count).map(draw).collect()
}

fn ordinary(rng: &mut Rng, dice: u32) -> Step {
    match dice {
        0..150 => {
            let count = few(rng, 6);
            Step::Produce((0..count).map(|_| post(rng)).collect())
        }
        150..310 => Step::BrokerReads(few(rng, 400)),
        310..470 => Step::AgentReads(few(rng, 200)),
        470..590 => Step::Commit,
        590..700 => Step::Answer,
        700..720 => Step::Dispatch,
        720..750 => Step::Pass { ms: rng.u64(1..400) },
        750..760 => Step::Pass { ms: rng.u64(400..60_000) },
        760..850 => Step::Exchange,
        _ => Step::Round,
    }
}

fn still(rng: &mut Rng) -> usize {
    if rng.bool() { 0 } else { few(rng, 300) }
}

fn post(rng: &mut Rng) -> Post {
    Post {
        lane: Lane::ALL[rng.usize(0..3)],
        qos: if rng.u8(0..5) < 2 { Qos::AtLeastOnce } else { Qos::ExactlyOnce },
        topic: rng.u8(0..2),
        padding: rng.usize(0..40),
        retain: rng.u8(0..6) == 0,
        expires: false,
    }
}

fn refuse(rng: &mut Rng) -> Step {
    let reason = [0x80, 0x83, 0x93, 0x97, 0x87, 0x90, 0x95, 0x99][rng.usize(0..8)];
    let lane = Lane::ALL[rng.usize(0..3)];
    let filter = if rng.bool() { format!("t/{lane}/#") } else { format!("t/{lane}/+/{}", rng.u8(0..2)) };
    Step::Refuse { filter, reason, times: few(rng, 4) as u32 }
}

impl Step {
    /// What happens.
    pub fn act(&self, world: &mut World) {
        match self.clone() {
            Step::Produce(posts) => {
                let messages = posts.iter().map(|post| post.message(world)).collect();
                world.append(messages);
            }
            Step::BrokerReads(count) => world.broker_gets(count),
            Step::AgentReads(count) => world.agent_gets(count),
            Step::Commit => world.commit(NextCommit::Works),
            Step::Answer => world.answer(),
            Step::Pass { ms } => world.pass(ms),
            Step::Exchange if !world.is_online() => world.connect(),
            Step::Exchange => {
                world.broker_gets(usize::MAX);
                world.agent_gets(usize::MAX);
            }
            Step::Round => world.round(),
            Step::Dispatch => world.dispatch(),
            Step::Cut { still } => world.cut(still),
            Step::LoseConnack => {
                world.connect();
                world.cut(usize::MAX);
            }
            Step::Crash { still } => world.crash(still),
            Step::CommitFails => world.commit(NextCommit::Fails),
            Step::BrokerRestarts => world.restart_broker(),
            Step::SessionLost => world.lose_session(),
            Step::Lie => {
                let lie = broker::ConnectScript { session_present: Some(true), ..Default::default() };
                world.broker.script.next_connects.push_back(lie);
            }
            Step::IdentifiersForgotten => world.forget_identifiers(),
            Step::SentForgotten => world.forget_sent(),
            Step::ReceiveMaximum { still, max } => {
                world.cut(still);
                world.broker.limits.receive_maximum = max;
            }
            Step::MaximumQos { still, max } => {
                world.cut(still);
                world.broker.limits.maximum_qos = max;
                world.was_limited |= max < 2;
            }
            Step::PacketSize { still, max } => {
                world.cut(still);
                world.broker.limits.maximum_packet_size = max;
                world.is_size_limited |= max.is_some();
            }
            Step::RetainNotAvailable { still } => {
                world.cut(still);
                world.broker.limits.retain_available = false;
            }
            Step::Refuse { filter, reason, times } => {
                let times = Times::Only(times);
                world.broker.script.refuse.push(Refusal { filter, reason, times });
            }
            Step::NeverAcknowledge => world.never_acknowledge(),
            Step::LinkDies => world.deaden(),
            Step::Presence => {
                world.say_online("again");
                world.act();
            }
            Step::Command { qos, own_id, same } => {
                world.next_number += 1;
                let payload = match own_id {
                    Some(id) => format!("id {id}"),
                    None if same => "on".to_owned(),
                    None => format!("command {}", world.next_number),
                };
                // What cannot be told apart by anything but its exchange is counted, so that it must be QoS 2.
                world.command_with(payload, if same && own_id.is_none() { 2 } else { qos });
            }
            Step::OversizeCommand { qos } => world.oversize_command(qos),
            Step::WrongAcknowledgement { which, other } => world.acknowledge_wrongly(which, other),
            Step::Confuse { id, inbound } => world.confuse(id, inbound),
            Step::ChangeBroker => world.change_broker(),
        }
    }
}

impl Post {
    fn message(&self, world: &mut World) -> Message {
        let (lane, qos) = (self.lane, self.qos);
        let topic = if self.expires { "expiring".to_owned() } else { self.topic.to_string() };
        let topic = format!("t/{lane}/{}/{topic}", qos.number());
        let message = world.message(lane, qos, &topic, self.padding);
        let expires_after = self.expires.then(|| Duration::from_secs(1));
        Message { retain: self.retain, expires_after, ..message }
    }
}

impl Step {
    /// The same with less in it.
    pub fn smaller(&self) -> Option<Step> {
        match self {
            Step::Produce(posts) if posts.len() > 1 => Some(Step::Produce(posts[1..].to_vec())),
            _ => None,
        }
    }
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Step::Produce(posts) => write!(f, "produce {}", posts.len()),
            other => write!(f, "{other:?}"),
        }
    }
}
