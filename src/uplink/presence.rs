//! What we say about ourselves: Will, online and offline, health, unit states. Pure.
