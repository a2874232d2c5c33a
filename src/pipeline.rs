//! The way up: readings to messages to the outbox.
