//! `fieldpost retained clear TOPIC`: a zero-length retained PUBLISH through the outbox (MQTT-3.3.1-6).

use std::io::{self, Write};

use clap::Subcommand;

use super::{Agent, Failure};
use crate::control::client;
use crate::control::wire::{Answer, Question};

/// `fieldpost retained`
#[derive(Debug, Subcommand)]
pub(super) enum Retained {
    /// Make the broker forget the retained message of a topic
    Clear {
        /// The topic
        topic: String,
        #[command(flatten)]
        agent: Agent,
    },
}

impl Retained {
    pub(super) fn run(self) -> Result<(), Failure> {
        let Retained::Clear { topic, agent } = self;
        match client::ask(&agent.socket()?, &Question::RetainedClear { topic })? {
            Answer::Accepted {} => writeln!(io::stdout(), "accepted").map_err(Failure::Output),
            Answer::Refused { reason } => Err(Failure::Refused(super::printable(&reason))),
            _ => Err(Failure::OtherAnswer),
        }
    }
}
