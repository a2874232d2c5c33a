//! How long to wait before connecting again: exponential, full jitter, reset after a stable time. Pure.
