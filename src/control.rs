//! The local Unix socket.
