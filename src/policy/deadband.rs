//! Whether a sample is worth reporting: absolute and percent dead bands, with a longest silence. Pure.

/// How far a value must move from the last reported one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Deadband {
    /// Every sample is reported.
    None,
    /// Reported when it moved by more than this, in the point's own unit.
    Absolute(f64),
    /// Reported when it moved by more than this percentage of the last reported value.
    Percent(f64),
}
