//! Certificates to a rustls configuration.
