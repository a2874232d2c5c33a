//! mosquitto twice: as the far broker, without limits of its own, and as the peer, a local broker with a bridge.
//!
//! Its log holds errors and notices alone; a log of every packet would be most of its work.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::process::Process;
use crate::setting::Failure;
use crate::support::mosquitto::find;

/// How long it may take to listen; reading a million messages takes seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is said where the peer is not installed.
pub(crate) const MISSING: &str = "mosquitto is not installed: apt-get install mosquitto";

/// How the bridge forwards.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bridge {
    /// Port of the far broker.
    pub(crate) far: u16,
    /// Messages in flight, `max_inflight_messages`; 0 is unlimited.
    pub(crate) in_flight: u16,
}

/// A mosquitto that can be started.
#[derive(Debug)]
pub(crate) struct Mosquitto {
    /// Where it listens.
    pub(crate) port: u16,
    folder: PathBuf,
    program: PathBuf,
    config: String,
}

impl Mosquitto {
    /// A far broker without limits and persistence; `None` if mosquitto is not installed.
    pub(crate) fn far(folder: &Path, port: u16) -> Result<Option<Mosquitto>, Failure> {
        Mosquitto::with(folder, port, "max_inflight_messages 0\nmax_queued_messages 0\n")
    }

    /// A local broker that forwards what is published below `bench/`, and saves what it holds when it stops.
    pub(crate) fn bridge(folder: &Path, port: u16, bridge: Bridge) -> Result<Option<Mosquitto>, Failure> {
        let Bridge { far, in_flight } = bridge;
        let lines = format!(
            "max_inflight_messages {in_flight}\nmax_queued_messages 0\npersistence true\npersistence_location {}/\n\
             connection far\naddress 127.0.0.1:{far}\ntopic bench/# out 2\ncleansession false\nnotifications false\n\
             restart_timeout 1\n",
            folder.display()
        );
        Mosquitto::with(folder, port, &lines)
    }

    fn with(folder: &Path, port: u16, lines: &str) -> Result<Option<Mosquitto>, Failure> {
        let Some(program) = find("mosquitto") else { return Ok(None) };
        // When started by root it would become `mosquitto`, who may not write here.
        let head = format!(
            "user root\nlog_type error\nlog_type warning\nlog_type notice\nlistener {port} 127.0.0.1"
        );
        let config = format!("{head}\nallow_anonymous true\n{lines}");
        Ok(Some(Mosquitto { port, folder: folder.to_owned(), program, config }))
    }

    /// Starts it and waits for nothing.
    pub(crate) fn launch(&self) -> Result<Process, Failure> {
        let file = self.folder.join("mosquitto.conf");
        fs::write(&file, &self.config).map_err(Failure::at(file.display().to_string()))?;
        let mut command = Command::new(&self.program);
        Process::start(command.arg("-c").arg(file), &self.folder.join("mosquitto.log"))
    }

    /// Starts it and waits until it listens.
    pub(crate) fn start(&self) -> Result<Process, Failure> {
        let mut process = self.launch()?;
        let listens = || TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).is_ok();
        process.expect(PATIENCE, "mosquitto listens", listens)?;
        Ok(process)
    }
}
