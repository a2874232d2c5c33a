//! The MQTT delivery state machine. Pure.
