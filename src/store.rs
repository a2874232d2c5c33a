//! The outbox database: one connection on one thread, group commit.
