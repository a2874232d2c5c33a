//! Where samples come from. A source knows no store and no broker: it is handed a sender of readings.

pub mod machine;
pub mod modbus;
pub mod schedule;
