//! Log lines to standard error, as the journal, a terminal or a program wants them; those of libraries too.
//!
//! Invariant: no line is added to a flood ([`net`]), no line is more than one line ([`line`]), and nothing waits for
//! a line to be read but the write itself.

pub mod levels;
mod line;
mod net;

use std::cell::RefCell;
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Metadata, Subscriber, span};

use crate::clock;
use levels::{Level, Levels};
use line::{Entry, Style};
use net::Net;

/// Overrides `[log] level`.
const VARIABLE: &str = "FIELDPOST_LOG";

/// What the log is made with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Which lines are wanted.
    pub levels: Levels,
    /// How they are written.
    pub format: Format,
}

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// As words: with a time and, on a terminal, colours; for the journal, which has both itself, with its `<N>`.
    #[default]
    Text,
    /// One JSON object each: `time`, `level`, `target`, `message`, `fields`.
    Json,
}

/// Lines the last net has held back.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// A net for each of the few threads: no lock is needed, and each place belongs to one of them anyway.
    static NET: RefCell<Net> = RefCell::default();
}

/// How many lines were left out since the start, because too many came from one place.
pub fn left_out() -> u64 {
    LEFT_OUT.load(Ordering::Relaxed)
}

/// Begins to write the log, for the rest of the process. `FIELDPOST_LOG` overrides the levels; what is wrong with it is
/// logged. No effect when there is a log already, as in a test that runs the agent in itself.
pub fn start(settings: &Settings) {
    let wanted = std::env::var_os(VARIABLE).filter(|text| !text.is_empty());
    let wanted = wanted.map(|text| text.to_string_lossy().into_owned());
    let (levels, refused) = match wanted.as_deref().map(str::parse::<Levels>) {
        None => (settings.levels.clone(), None),
        Some(Ok(levels)) => (levels, None),
        Some(Err(error)) => (settings.levels.clone(), Some(error)),
    };
    let json = settings.format == Format::Json;
    let journal = is_journal();
    let colours = !journal && io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let most = levels.most();
    let log = Log { levels: Arc::new(levels), style: Style { json, journal, colours } };
    if tracing::subscriber::set_global_default(log.clone()).is_err() {
        return;
    }
    if log_crate::set_boxed_logger(Box::new(log)).is_ok() {
        log_crate::set_max_level(most.map_or(log_crate::LevelFilter::Off, |level| match level {
            Level::Error => log_crate::LevelFilter::Error,
            Level::Warn => log_crate::LevelFilter::Warn,
            Level::Info => log_crate::LevelFilter::Info,
            Level::Debug => log_crate::LevelFilter::Debug,
            Level::Trace => log_crate::LevelFilter::Trace,
        }));
    }
    if let Some(error) = refused {
        tracing::warn!(%error, "{VARIABLE} is not understood, [log] level holds");
    }
}

/// Whether standard error goes to the journal: `JOURNAL_STREAM` names its device and inode (systemd.exec(5)).
fn is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let ours = rustix::fs::fstat(io::stderr().as_fd()).map(|file| format!("{}:{}", file.st_dev, file.st_ino));
    ours.is_ok_and(|ours| ours == named)
}

/// What takes the events of `tracing`, which are ours, and of `log`, which are those of libraries.
#[derive(Debug, Clone)]
struct Log {
    levels: Arc<Levels>,
    style: Style,
}

impl Log {
    /// `place`: one in the sources.
    fn write(&self, mut entry: Entry<'_>, place: usize) {
        // Who asks for debug lines wants all of them.
        if entry.level <= Level::Info {
            let now_ms = clock::mono_ms();
            // Borrowed already only if printing a value logs: then that line passes.
            let pass =
                NET.with(|net| net.try_borrow_mut().map_or(Some(0), |mut net| net.pass(place, now_ms)));
            let Some(left_out) = pass else {
                LEFT_OUT.fetch_add(1, Ordering::Relaxed);
                return;
            };
            if left_out > 0 {
                entry.fields.push(("left_out", left_out.into()));
            }
        }
        let line = line::render(self.style, &entry);
        // In one piece, so that lines of two threads do not mix. Where nobody reads them there is nobody to tell.
        let _unread = io::stderr().write_all(line.as_bytes());
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && self.levels.want(level(*metadata.level()), metadata.target())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.levels.most().map_or(LevelFilter::OFF, |level| match level {
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
            Level::Trace => LevelFilter::TRACE,
        }))
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        let entry = Entry {
            wall_ms: clock::now().wall_ms,
            level: level(*metadata.level()),
            module: metadata.target(),
            message: fields.message,
            fields: fields.others,
        };
        // Each place in the sources has one, for ever.
        self.write(entry, std::ptr::from_ref(metadata).addr());
    }

    // There are no spans.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

impl log_crate::Log for Log {
    fn enabled(&self, metadata: &log_crate::Metadata<'_>) -> bool {
        self.levels.want(library_level(metadata.level()), metadata.target())
    }

    fn log(&self, record: &log_crate::Record<'_>) {
        if !log_crate::Log::enabled(self, record.metadata()) {
            return;
        }
        let mut place = DefaultHasher::new();
        (record.target(), record.line()).hash(&mut place);
        let entry = Entry {
            wall_ms: clock::now().wall_ms,
            level: library_level(record.level()),
            module: record.target(),
            message: record.args().to_string(),
            fields: Vec::new(),
        };
        self.write(entry, place.finish() as usize);
    }

    fn flush(&self) {}
}

fn level(level: tracing::Level) -> Level {
    match level {
        tracing::Level::ERROR => Level::Error,
        tracing::Level::WARN => Level::Warn,
        tracing::Level::INFO => Level::Info,
        tracing::Level::DEBUG => Level::Debug,
        tracing::Level::TRACE => Level::Trace,
    }
}

fn library_level(level: log_crate::Level) -> Level {
    match level {
        log_crate::Level::Error => Level::Error,
        log_crate::Level::Warn => Level::Warn,
        log_crate::Level::Info => Level::Info,
        log_crate::Level::Debug => Level::Debug,
        log_crate::Level::Trace => Level::Trace,
    }
}

/// The fields of an event, as they are written.
#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => self.others.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_floods_the_log_is_cut_off_and_counted() {
        let style = Style { json: false, journal: true, colours: false };
        let log = Log { levels: Arc::new(Levels::default()), style };
        let before = left_out();
        tracing::subscriber::with_default(log, || {
            for n in 0..1_000 {
                tracing::info!(n, "a flood");
            }
            tracing::info!("another place is heard");
        });
        assert_eq!(left_out() - before, 940);
    }
}
