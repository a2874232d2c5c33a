//! The way to the broker: a pure session, a link that carries its packets, and the task that joins them.

pub mod backoff;
pub mod choice;
pub mod connection;
pub mod examination;
pub mod link;
mod log;
pub mod packet;
pub mod presence;
pub mod session;
pub mod tls;
