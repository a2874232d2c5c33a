//! The uplink task: connects, turns, reconnects.
