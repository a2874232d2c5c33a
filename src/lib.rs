//! fieldpost: a store-and-forward bridge for gateways.
//!
//! ```text
//!  devices ─► source/* ──Reading─► pipeline(policy) ──Message──► store/outbox ──► uplink ──PUBLISH──► broker
//!                                                                        ▲           │
//!                                                                        └─ settle ──┘ PUBACK / PUBREC / PUBCOMP
//!  devices ◄─ source/* ◄──Write── dispatch ◄──Command── store/inbox ◄── uplink ◄──PUBLISH── broker
//! ```
//!
//! **The database is the truth; everything in memory can be thrown away.** A message exists when its
//! transaction commits and ends when its last acknowledgement commits.
//!
//! The import law (its text is the tables in `tests/layers.rs`, which hold it):
//! - vocabulary ([`point`], [`message`], [`command`], [`turn`], [`stats`], [`trouble`], [`clock::Stamp`]) imports vocabulary only;
//! - pure logic (schedule, plan, register, policy, session, backoff, presence) imports vocabulary and what its row
//!   in the table names, and knows no runtime, no clock, no socket and no file;
//! - each I/O crate is named in one place: rumqttc in `uplink/link*`, rusqlite in `store*`, tokio-modbus in
//!   `source/modbus/client`, toml in `config*`;
//! - edges never import each other: the store is the only hub, and [`agent`] alone sees all.

pub mod agent;
pub mod cli;
pub mod clock;
pub mod command;
pub mod config;
pub mod control;
pub mod dispatch;
pub mod health;
pub mod http;
pub mod logging;
pub mod message;
pub mod pipeline;
pub mod point;
pub mod policy;
mod process;
pub mod progress;
pub mod queue;
mod secret;
pub mod service;
pub mod source;
pub mod stats;
pub mod store;
pub mod summary;
pub mod trouble;
pub mod turn;
pub mod uplink;
