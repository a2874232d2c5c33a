//! What integration tests and the demo share: a model broker, a TCP proxy that fails on demand, a real
//! mosquitto, and waiting for conditions.
//!
//! Included by `mod support;`, or `#[path = "../tests/support/mod.rs"] mod support;` from `examples/`. Each
//! crate that includes it uses a part of it, hence the `allow`s.
#![allow(dead_code, unreachable_pub, unused_imports)]

pub mod aedes;
pub mod agent;
pub mod asker;
pub mod broker;
pub mod emulator;
pub mod faults;
pub mod http;
pub mod mosquitto;
pub mod plant;
pub mod power;
pub mod producer;
pub mod proxy;

pub use emulator::{c_compiler, command, patient};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::time::{Duration, Instant};

/// Ports below those the system gives to outgoing connections (32768 on Linux): a server that stops for a while
/// finds its port free again.
const PORTS: std::ops::Range<u16> = 15_000..32_000;

/// Listens on a free port of 127.0.0.1 to which a stopped server can come back.
pub fn listen() -> io::Result<TcpListener> {
    let mut result = TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(PORTS)));
    for _ in 0..100 {
        if result.is_ok() {
            break;
        }
        result = TcpListener::bind((Ipv4Addr::LOCALHOST, fastrand::u16(PORTS)));
    }
    let listener = result?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Keeps a failed test's files for whoever has set FIELDPOST_TEST_KEEP, and says where they are.
fn keep(dir: &mut tempfile::TempDir) {
    if std::env::var_os("FIELDPOST_TEST_KEEP").is_some() {
        eprintln!("its files are in {}", dir.path().display());
        dir.disable_cleanup(true);
    }
}

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Blocks until the condition holds; false if it does not within the time.
pub fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + patient(within);
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}

/// Waits until the condition holds; false if it does not within the time.
pub async fn wait_until_async(within: Duration, mut condition: impl AsyncFnMut() -> bool) -> bool {
    let deadline = tokio::time::Instant::now() + patient(within);
    loop {
        if condition().await {
            return true;
        }
        if tokio::time::Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
}
