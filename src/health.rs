//! What is told about the gateway's own state.
