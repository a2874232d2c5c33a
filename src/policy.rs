//! From samples to messages: which are worth sending, what they say, and where they go. Pure.

pub mod deadband;
pub mod format;
pub mod topic;
