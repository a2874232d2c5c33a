//! Which log lines are wanted: a level, and others for single modules. Pure.
//!
//! Invariant: libraries are quiet unless they are named. Whatever they have to say that matters comes back to us as an
//! error and is said in our words, once; theirs would come again with each attempt to connect.

use std::str::FromStr;

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something is lost, or will not work again by itself.
    Error,
    /// Something does not work at the moment.
    Warn,
    /// Something has changed.
    Info,
    /// What a developer asks for.
    Debug,
    /// What only a developer understands.
    Trace,
}

impl Level {
    /// Every level, the most important first.
    pub const ALL: [Level; 5] = [Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        }
    }
}

/// What is ours begins with this.
const OURS: &str = "fieldpost";

/// The levels wanted: `info`, or `info,fieldpost::uplink=debug,rustls=warn`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Levels {
    /// Modules and their levels, the longest names first. `None`: off.
    of: Vec<(String, Option<Level>)>,
}

impl Default for Levels {
    /// `info` for what is ours.
    fn default() -> Self {
        Levels { of: vec![(OURS.to_owned(), Some(Level::Info))] }
    }
}

/// Levels that are not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLevels {
    /// Not the name of a level.
    #[error(
        "{0:?} is no level: write error, warn, info, debug, trace or off, and MODULE=LEVEL for one module, with commas \
         between"
    )]
    Level(String),
    /// `=info`
    #[error("{0:?} names no module before the =: write MODULE=LEVEL, as in fieldpost::uplink=debug")]
    NoModule(String),
}

impl FromStr for Levels {
    type Err = BadLevels;

    fn from_str(text: &str) -> Result<Self, BadLevels> {
        let mut levels = Levels::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (module, level) = match part.split_once('=') {
                Some((module, level)) => (module.trim(), level.trim()),
                None => (OURS, part),
            };
            if module.is_empty() {
                return Err(BadLevels::NoModule(part.to_owned()));
            }
            let known = Level::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(level));
            if known.is_none() && !level.eq_ignore_ascii_case("off") {
                return Err(BadLevels::Level(level.to_owned()));
            }
            levels.of.retain(|(other, _)| other != module);
            levels.of.push((module.to_owned(), known));
        }
        levels.of.sort_by_key(|(module, _)| std::cmp::Reverse(module.len()));
        Ok(levels)
    }
}

impl Levels {
    /// Whether a line of this level and module is wanted. The longest name that fits the module decides.
    pub fn want(&self, level: Level, module: &str) -> bool {
        let fits = |name: &str| {
            module.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        let wanted = self.of.iter().find(|(name, _)| fits(name)).and_then(|(_, wanted)| *wanted);
        wanted.is_some_and(|wanted| level <= wanted)
    }

    /// The most talkative level that is wanted of anything; `None`: nothing is.
    pub fn most(&self) -> Option<Level> {
        self.of.iter().filter_map(|(_, level)| *level).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(levels: &str, module: &str) -> Option<Level> {
        let levels: Levels = levels.parse().unwrap_or_else(|error| panic!("{levels}: {error}"));
        Level::ALL.into_iter().filter(|level| levels.want(*level, module)).max()
    }

    #[test]
    fn the_longest_name_decides_and_libraries_are_quiet_unless_they_are_named() {
        let uplink = "fieldpost::uplink::connection";
        for (levels, module, expected) in [
            ("", "fieldpost::store", Some(Level::Info)),
            ("", "rustls::client::hs", None),
            ("debug", uplink, Some(Level::Debug)),
            ("trace", "rustls::client::hs", None),
            ("WARN", "fieldpost", Some(Level::Warn)),
            ("off", uplink, None),
            ("info, fieldpost::uplink=trace", uplink, Some(Level::Trace)),
            ("fieldpost::uplink=trace,info", uplink, Some(Level::Trace)),
            ("info,fieldpost::uplink=trace", "fieldpost::uplinks", Some(Level::Info)),
            ("info,fieldpost::uplink=off", uplink, None),
            ("rustls=debug", "rustls::client::hs", Some(Level::Debug)),
            ("rustls=debug", uplink, Some(Level::Info)),
            ("info,debug", uplink, Some(Level::Debug)),
        ] {
            assert_eq!(wanted(levels, module), expected, "{levels:?} {module}");
        }
        assert_eq!("warn,rustls=trace".parse::<Levels>().map(|levels| levels.most()), Ok(Some(Level::Trace)));
        assert_eq!("off".parse::<Levels>().map(|levels| levels.most()), Ok(None));
    }

    #[test]
    fn what_is_no_level_is_named() {
        for (levels, words) in [
            ("verbose", "\"verbose\" is no level: write error, warn, info, debug, trace or off"),
            ("info,rustls=loud", "\"loud\" is no level"),
            ("=info", "names no module"),
            ("rustls=", "\"\" is no level"),
        ] {
            let error = levels.parse::<Levels>().expect_err(levels).to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
