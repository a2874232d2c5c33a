//! Builds every task from the configuration, joins them with channels, stops them in order.

use tokio::sync::mpsc;

use crate::config::Config;
use crate::point::Reading;

/// Why the agent could not start, or ended without being asked to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Not written yet.
    #[error("there is no agent yet")]
    Unwritten,
}

/// Runs until it is asked to stop.
///
/// # Errors
/// It could not start, or ended without being asked to.
pub async fn run(_config: Config) -> Result<(), AgentError> {
    Err(AgentError::Unwritten)
}

/// Runs the sources alone, until it is asked to stop or `readings` is closed.
///
/// # Errors
/// It could not start, or ended without being asked to.
pub async fn run_dry(_config: Config, _readings: mpsc::Sender<Reading>) -> Result<(), AgentError> {
    Err(AgentError::Unwritten)
}
