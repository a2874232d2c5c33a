//! `[log]`: which lines the agent writes, and how.

use super::read::{Section, Walk};
use super::value::{self, Choice, Complaint};
use crate::logging::levels::BadLevels;
use crate::logging::{Format, Settings};

pub(super) const FORMAT: [Choice<Format>; 2] =
    [("text", Format::Text, &["plain", "human", "auto", "journal"]), ("json", Format::Json, &["jsonl"])];

pub(super) fn log(walk: &mut Walk<'_>, section: Section<'_>) -> Settings {
    let levels = walk.get(section, "level", |value| {
        value::text(value)?.parse().map_err(|error: BadLevels| Complaint::new(error.to_string()))
    });
    let format = walk.get(section, "format", |value| value::choice(value, &FORMAT));
    Settings {
        levels: levels.map_or_else(Default::default, |levels| levels.value),
        format: format.map_or_else(Default::default, |format| format.value),
    }
}
