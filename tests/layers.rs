//! The import law, read from the sources: who may use what. And that the documents speak of what is there.
//!
//! The law stands below as data: [`LAYERS`] says which of our own modules a file may import, [`PLACES`] where
//! each outside crate may be named, [`BANS`] what nobody may write, or only one file. Everything but tests is
//! checked, paths inside functions too. Invariant: a file or a dependency that is in no table fails.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

// ---- the law -------------------------------------------------------------------------------------------

/// A row of the import law; the first whose `files` match a file is the file's.
struct Layer {
    name: &'static str,
    /// Files below `src/` without their extension; a trailing `*` stands for anything.
    files: &'static [&'static str],
    /// Modules or single items they may import; their own children are always theirs. `*` is everything.
    may: &'static [&'static str],
    /// No runtime, no clock, no log, no file, no socket: a function of its arguments.
    pure: bool,
}

const LAYERS: &[Layer] = &[
    Layer {
        name: "vocabulary",
        files: &["point", "message", "command", "turn", "stats", "progress", "trouble"],
        // A stamp is plain data; only `clock::now` reads the clocks.
        may: &["clock::Stamp", "message", "point", "turn"],
        pure: true,
    },
    Layer { name: "clock", files: &["clock"], may: &["clock"], pure: false },
    Layer { name: "files with secrets", files: &["secret"], may: &[], pure: false },
    Layer { name: "our own process", files: &["process"], may: &[], pure: false },
    Layer { name: "clock's correction", files: &["clock/correction"], may: &["clock::Stamp"], pure: true },
    Layer {
        name: "how lines read",
        files: &["logging/*"],
        may: &["logging", "policy::format::rfc3339"],
        pure: true,
    },
    Layer { name: "edge: the log", files: &["logging"], may: &["clock", "logging"], pure: false },
    // ---- pure logic
    Layer { name: "schedule", files: &["source/schedule"], may: &[], pure: true },
    Layer {
        name: "modbus logic",
        files: &["source/modbus/plan", "source/modbus/register"],
        // The four tables of Modbus are that folder's own vocabulary.
        may: &["point", "source::modbus::Space"],
        pure: true,
    },
    Layer {
        name: "policy",
        files: &["policy", "policy/*"],
        may: &["clock::Stamp", "clock::correction", "message", "point", "policy"],
        pure: true,
    },
    Layer { name: "packets", files: &["uplink/packet"], may: &["message"], pure: true },
    Layer {
        name: "session",
        files: &["uplink/session", "uplink/session/*"],
        may: &["message", "turn", "uplink::packet", "uplink::session"],
        pure: true,
    },
    Layer {
        name: "examination",
        files: &["uplink/examination"],
        may: &["message", "uplink::packet"],
        pure: true,
    },
    Layer { name: "back-off", files: &["uplink/backoff"], may: &[], pure: true },
    Layer { name: "choice of brokers", files: &["uplink/choice"], may: &[], pure: true },
    Layer {
        name: "presence",
        files: &["uplink/presence"],
        // What presence says is part of the wire contract, and that is `format`.
        may: &["clock::Stamp", "message", "policy::format", "uplink::packet"],
        pure: true,
    },
    Layer {
        name: "packet codecs",
        files: &["uplink/link/v4", "uplink/link/v5", "uplink/link/wire"],
        may: &["message", "uplink::packet", "uplink::link"],
        pure: true,
    },
    Layer { name: "segment", files: &["store/segment"], may: &["message"], pure: true },
    Layer { name: "budget", files: &["store/budget"], may: &["clock::Stamp", "message"], pure: true },
    // The settings are the store's.
    Layer { name: "pace", files: &["store/pace"], may: &["store::Replay", "store::ReplayOrder"], pure: true },
    Layer { name: "machine's sensors", files: &["source/machine/sensor"], may: &["point"], pure: true },
    // ---- edges: each talks to one outside world, and none imports another
    Layer {
        name: "edge: sources",
        files: &["source", "source/machine", "source/modbus", "source/modbus/*"],
        may: &["clock", "command", "point", "progress", "stats", "source", "trouble"],
        pure: false,
    },
    Layer {
        name: "edge: store",
        files: &["store", "store/*"],
        may: &["clock", "command", "message", "progress", "stats", "turn", "store", "trouble"],
        pure: false,
    },
    Layer {
        name: "edge: link",
        files: &["uplink", "uplink/link", "uplink/link/metered", "uplink/link/open", "uplink/tls"],
        // The clock for certificates.
        may: &["clock", "message", "secret", "stats", "uplink::packet", "uplink::link", "uplink::tls"],
        pure: false,
    },
    Layer {
        name: "edge: uplink",
        files: &["uplink/connection", "uplink/log"],
        // The store is the hub: the uplink holds its handle. The speaker goes into presence.
        may: &[
            "clock",
            "message",
            "progress",
            "secret",
            "stats",
            "store",
            "uplink",
            "policy::format::Speaker",
            "trouble",
        ],
        pure: false,
    },
    Layer {
        name: "edge: control socket",
        files: &["control", "control/*"],
        may: &["clock", "message", "trouble", "control"],
        pure: false,
    },
    Layer { name: "edge: service manager", files: &["service"], may: &["clock", "progress"], pure: false },
    Layer {
        name: "requests over HTTP",
        files: &["http/body", "http/metrics", "http/route"],
        // What messages and states look like is one contract, the control socket's.
        may: &["clock::Stamp", "control::wire", "http::route", "message", "stats"],
        pure: true,
    },
    Layer {
        name: "edge: HTTP",
        // A second door to the same agent: it asks through the first one's channel, and knows no store.
        files: &["http", "http/listener"],
        may: &["clock", "control", "http", "message", "progress", "secret", "stats"],
        pure: false,
    },
    // ---- glue and assembly
    Layer {
        name: "glue: the way up",
        files: &["pipeline"],
        may: &["clock", "message", "point", "policy", "progress", "stats", "store", "trouble"],
        pure: false,
    },
    Layer {
        name: "glue: the queue on the control socket",
        files: &["queue"],
        may: &["control::wire", "message", "policy::format::rfc3339", "store::browse"],
        pure: true,
    },
    Layer {
        name: "glue: the way down",
        files: &["dispatch"],
        may: &["clock", "command", "policy::command", "progress", "stats", "store", "dispatch", "trouble"],
        pure: false,
    },
    Layer {
        name: "the desk of commands",
        files: &["dispatch/desk"],
        // It judges and answers, so it knows what may be and how an answer reads.
        may: &["clock::Stamp", "command", "message", "point", "policy::command", "policy::format", "stats"],
        pure: true,
    },
    Layer {
        name: "glue: the summary",
        files: &["summary"],
        may: &[
            "source::modbus::LineStatus",
            "uplink::connection::LinkState",
            "uplink::connection::LinkStatus",
        ],
        pure: true,
    },
    Layer {
        name: "glue: reporting",
        files: &["health"],
        // It tells how every part is doing, so it knows their status types and nothing else of them.
        may: &[
            "clock",
            "control",
            "logging::left_out",
            "message",
            "policy::format",
            "process",
            "progress",
            "queue",
            "point",
            "source::machine::Sensor",
            "source::machine::Values",
            "source::modbus::LineStatus",
            "stats",
            "store",
            "summary",
            "trouble",
            "uplink::connection::LinkState",
            "uplink::connection::LinkStatus",
            "uplink::presence",
        ],
        pure: false,
    },
    Layer {
        name: "configuration",
        files: &["config", "config/*"],
        // The parts define the settings they are made with; the configuration fills them in. So the parts
        // know no configuration, and nothing is written down twice.
        may: &[
            "config",
            "http::Listen",
            "http::Settings",
            "logging",
            "message",
            "point",
            "policy::Reporting",
            "policy::deadband::Deadband",
            "policy::topic",
            "source::machine::LINE",
            "source::machine::Sensor",
            "source::machine::UNIT",
            "source::modbus::Parity",
            "source::modbus::SerialPort",
            "source::modbus::Space",
            "source::modbus::Transport",
            "source::modbus::Writable",
            "source::modbus::register",
            "store::BudgetPeriod",
            "store::BudgetSettings",
            "store::LaneLimits",
            "store::Replay",
            "store::ReplayOrder",
            "store::WhenFull",
            "turn::OnSessionLoss",
            "uplink::packet::Protocol",
            "uplink::tls::Settings",
        ],
        pure: false,
    },
    Layer { name: "assembly", files: &["agent", "agent/*"], may: &["*"], pure: false },
    Layer {
        name: "command line: broker test",
        // A client of the broker, beside the agent's.
        files: &["cli/broker"],
        may: &["cli", "clock", "config", "message", "uplink"],
        pure: false,
    },
    Layer {
        name: "command line: queue",
        // Reads the database of an agent that is not running.
        files: &["cli/queue"],
        may: &[
            "agent",
            "cli",
            "clock",
            "config",
            "control",
            "message",
            "queue",
            "store",
            "uplink::packet::ReasonCode",
        ],
        pure: false,
    },
    Layer {
        name: "what is shown of a status",
        files: &["cli/columns", "cli/warnings", "cli/watch/screen"],
        may: &["cli", "control::wire"],
        pure: true,
    },
    Layer {
        name: "command line",
        files: &["cli", "cli/*"],
        may: &[
            "agent",
            "cli",
            "config",
            "control",
            "logging",
            "message::TopicError",
            "point",
            "policy::Reporting",
            "policy::format::rfc3339",
            "store::StoreError",
            "trouble",
        ],
        pure: false,
    },
    // `main` is one call into the library, which is how examples and tests become the agent too.
    Layer { name: "crate root", files: &["lib", "main"], may: &[], pure: false },
];

/// Where an outside crate may be named, so that replacing it means touching that place. `*`: anywhere but in
/// pure files. Every dependency has a row.
const PLACES: &[(&str, &[&str])] = &[
    ("clap", &["cli*"]),
    ("crc32c", &["store/segment"]),
    ("fastrand", &["agent", "uplink/connection"]),
    ("futures_util", &["*"]),
    ("http_body_util", &["http"]),
    ("hyper", &["http", "http/route"]),
    ("hyper_util", &["http"]),
    ("indicatif", &["cli*"]),
    // Payload times, the dates of certificates in messages for people, and where a month begins.
    ("jiff", &["policy/format", "store/budget", "uplink/tls"]),
    // Named nowhere: it is there for its version and its C code, which rusqlite calls.
    // Whether the clock is synchronised: one question to the kernel that no other crate asks.
    ("libc", &["clock"]),
    ("libsqlite3_sys", &["store*"]),
    // The bridge from it to our log.
    ("log_crate", &["logging"]),
    ("lz4_flex", &["store/segment"]),
    ("rumqttc", &["uplink/link*"]),
    ("rusqlite", &["store*"]),
    // In Modbus for a timer finer than tokio's.
    (
        "rustix",
        &[
            "agent",
            "clock",
            "cli*",
            "config*",
            "control",
            "health",
            "logging",
            "process",
            "service",
            "source/machine",
            "source/modbus/silence",
            "store*",
        ],
    ),
    ("rustls", &["uplink/link*", "uplink/tls"]),
    ("rustls_native_certs", &["uplink/tls"]),
    // Inner types are not `Serialize`: what is written for others to read is a contract, and has its file.
    // A command is read member by member, so that one that stands there twice is noticed.
    ("serde", &["control/wire", "policy/command"]),
    (
        "serde_json",
        &[
            "cli/broker",
            "cli/queue",
            "cli/reload",
            "cli/status",
            "cli/watch",
            "control*",
            "http",
            "http/body",
            "logging*",
            "policy/command",
            "policy/format",
        ],
    ),
    ("socket2", &["control", "uplink/link/open"]),
    ("strsim", &["config*"]),
    ("subtle", &["http/route"]),
    ("tokio", &["*"]),
    ("tokio_modbus", &["source/modbus/client"]),
    ("tokio_rustls", &["uplink/link*", "uplink/tls"]),
    ("tokio_serial", &["source/modbus/client"]),
    ("tokio_util", &["control", "http/listener", "uplink/link*"]),
    ("toml", &["config*"]),
    ("tracing", &["*"]),
    ("unicode_width", &["cli/columns"]),
];

/// Crates that are data types or macros, which pure files may use too.
const ANYWHERE: &[&str] = &["bytes", "thiserror"];

/// What is written nowhere, or only in the files named: paths by their beginning or their end, and why.
const BANS: &[(&str, &[&str], &str)] = &[
    ("Mutex", &[], "one owner per thing; others hold a channel end"),
    ("RwLock", &[], "one owner per thing; others hold a channel end"),
    ("unbounded_channel", &[], "every queue has a limit"),
    ("std::sync::mpsc::channel", &[], "every queue has a limit; take sync_channel"),
    // The store's fault switch holds a COMMIT back, which is what its thread would do on a slow card.
    ("thread::sleep", &["store/database"], "wait for an event, with a deadline"),
    ("SystemTime::now", &["clock"], "clock::now is the one place that reads the wall clock"),
    ("open_in_memory", &[], "durability never falls back to memory"),
    ("tokio::spawn", &[], "a task without an owner ends or panics unseen; spawn it into a JoinSet"),
    ("spawn_blocking", &[], "what blocks has a thread of its own, with an owner"),
    ("std::process::exit", &[], "it skips every destructor; return an ExitCode"),
    ("print!", &[], "it panics when the reader is gone; write to io::stdout() and look at the result"),
    ("println!", &[], "it panics when the reader is gone; write to io::stdout() and look at the result"),
    ("eprint!", &[], "it panics when the reader is gone; write to io::stderr()"),
    ("eprintln!", &[], "it panics when the reader is gone; write to io::stderr()"),
    ("panic!", &[], "no input may end the agent"),
    ("todo!", &[], "no input may end the agent"),
    ("unimplemented!", &[], "no input may end the agent"),
    ("dbg!", &[], "log with tracing"),
];

/// What pure files may not name: everything that knows the time, waits, logs, or talks to somebody.
const IMPURE: &[&str] = &[
    "tokio",
    "tokio_util",
    "futures_util",
    "tracing",
    "fastrand",
    "rustix",
    "socket2",
    "std::fs",
    "std::thread",
    "std::process",
    "std::env",
    "std::os",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "Instant::now",
    "clock::now",
    "clock::mono_ms",
    "clock::wall_ms",
];

/// Breaches that are known and wait for their repair: file and what is said of it. One that is gone must go
/// from here too, so this list only shrinks.
const KNOWN: &[(&str, &str)] = &[];

// ---- reading sources -----------------------------------------------------------------------------------

/// A word, a `::` or a single other character, and its line.
#[derive(Debug, Clone, PartialEq)]
struct Token {
    text: String,
    line: usize,
}

/// The tokens of a source, without comments and the contents of texts.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut line = 1;
    while let Some(&c) = chars.get(at) {
        let start = at;
        let rest = |n: usize| chars.get(at + n).copied().unwrap_or('\0');
        let mut text = String::new();
        if c == '/' && rest(1) == '/' {
            at += chars[at..].iter().take_while(|c| **c != '\n').count();
        } else if c == '/' && rest(1) == '*' {
            at = end_of_comment(&chars, at);
        } else if c == '"' {
            at = end_of_text(&chars, at + 1);
        } else if c == '\'' {
            // 'a' and '\n' are characters, 'a without the second quote is a lifetime.
            at += if rest(1) == '\\' {
                4 + chars[at + 3..].iter().take_while(|c| **c != '\'').count()
            } else if rest(2) == '\'' {
                3
            } else {
                1
            };
        } else if c.is_alphanumeric() || c == '_' {
            text = chars[at..].iter().take_while(|c| c.is_alphanumeric() || **c == '_').collect();
            at += text.chars().count();
            let raw = ["r", "br", "cr"].contains(&text.as_str()) && matches!(chars.get(at), Some('#' | '"'));
            if let Some(end) = end_of_raw_text(&chars, at).filter(|_| raw) {
                at = end;
                text.clear();
            }
        } else if c == ':' && rest(1) == ':' {
            text = "::".to_owned();
            at += 2;
        } else {
            text = if c.is_whitespace() { String::new() } else { c.to_string() };
            at += 1;
        }
        if !text.is_empty() {
            tokens.push(Token { text, line });
        }
        line += chars[start..at.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn end_of_comment(chars: &[char], mut at: usize) -> usize {
    let mut depth = 0;
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_text(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// `at` is behind the `r`; `None` for a raw identifier.
fn end_of_raw_text(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
    if chars.get(at + hashes) != Some(&'"') {
        return None;
    }
    let mut end = at + hashes + 1;
    while end < chars.len() {
        let closes = chars[end] == '"'
            && chars[end + 1..].iter().take(hashes).filter(|c| **c == '#').count() == hashes;
        if closes {
            return Some(end + 1 + hashes);
        }
        end += 1;
    }
    Some(end)
}

/// The tokens without `#[cfg(test)]` items.
fn without_tests(tokens: Vec<Token>) -> Vec<Token> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let marked =
            tokens.len() >= at + MARK.len() && MARK.iter().zip(&tokens[at..]).all(|(m, t)| *m == t.text);
        if marked {
            at = end_of_item(&tokens, at + MARK.len());
        } else {
            kept.push(tokens[at].clone());
            at += 1;
        }
    }
    kept
}

/// Behind the item's closing brace, or its semicolon.
fn end_of_item(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0;
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            ";" if depth == 0 => break,
            _ => continue,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Every path that is named, `use` trees written out; a macro's name ends in `!`.
fn paths(tokens: &[Token]) -> Vec<(Vec<String>, usize)> {
    let mut paths = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        // `pub(in path)` gives away and imports nothing.
        at = if tokens[at].text == "in" && at > 0 && tokens[at - 1].text == "(" {
            at + tokens[at..].iter().take_while(|token| token.text != ")").count()
        } else {
            path(tokens, at, &[], &mut paths)
        };
    }
    paths
}

fn path(tokens: &[Token], mut at: usize, prefix: &[String], paths: &mut Vec<(Vec<String>, usize)>) -> usize {
    let is_word = |token: &Token| token.text.chars().all(|c| c.is_alphanumeric() || c == '_');
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text.as_str());
    let mut segments = prefix.to_vec();
    let Some(first) =
        tokens.get(at).filter(|token| is_word(token) || (token.text == "*" && !prefix.is_empty()))
    else {
        return at + 1;
    };
    loop {
        if text(at) == "{" {
            at += 1;
            while at < tokens.len() && text(at) != "}" {
                at = match text(at) {
                    "," => at + 1,
                    "as" => at + 2,
                    _ => path(tokens, at, &segments, paths),
                };
            }
            return at + 1;
        }
        if text(at) != "self" || segments.is_empty() {
            segments.push(text(at).to_owned());
        }
        at += 1;
        let goes_on = text(at) == "::"
            && tokens.get(at + 1).is_some_and(|next| is_word(next) || ["{", "*"].contains(&text(at + 1)));
        if !goes_on {
            break;
        }
        at += 1;
    }
    if text(at) == "!" && text(at + 1) != "=" {
        segments.last_mut().expect("one was pushed").push('!');
    }
    paths.push((segments, first.line));
    at
}

// ---- judging -------------------------------------------------------------------------------------------

fn matches(pattern: &str, file: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(beginning) => file.starts_with(beginning),
        None => pattern == file,
    }
}

/// Whether a path begins or ends with the segments of `rule`.
fn names(path: &[String], rule: &str) -> bool {
    let rule: Vec<&str> = rule.split("::").collect();
    path.len() >= rule.len()
        && (path[..rule.len()] == rule[..] || path[path.len() - rule.len()..] == rule[..])
}

/// What of our own a path means, from the crate's root; `None` for other crates and local names.
fn ours(path: &[String], file: &str) -> Option<Vec<String>> {
    let mut module: Vec<String> = match file {
        "lib" | "main" => Vec::new(),
        file => file.split('/').map(str::to_owned).collect(),
    };
    let ups = path.iter().take_while(|segment| *segment == "super").count();
    let named = match path.first()?.as_str() {
        "crate" => return (path.len() > 1).then(|| path[1..].to_vec()),
        "fieldpost" => return (path.len() > 1).then(|| path[1..].to_vec()),
        "super" => &path[ups..],
        "self" => &path[1..],
        _ => return None,
    };
    module.truncate(module.len().saturating_sub(ups));
    (!named.is_empty()).then(|| module.into_iter().chain(named.iter().cloned()).collect())
}

/// Everything a file does against the law, as `src/file.rs:line: what`.
fn breaches(file: &str, source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut breach = |line: usize, what: String| found.push(format!("src/{file}.rs:{line}: {what}"));
    if !source.starts_with("//! ") {
        breach(1, "the first line is no `//!` that says what this file is".to_owned());
    }
    let Some(layer) = LAYERS.iter().find(|layer| layer.files.iter().any(|pattern| matches(pattern, file)))
    else {
        breach(1, "this file is in no layer of tests/layers.rs: give it one".to_owned());
        return found;
    };
    let tokens = without_tests(tokens(source));
    for (path, line) in paths(&tokens) {
        for what in judge(layer, file, &path) {
            breach(line, what);
        }
    }
    for window in tokens.windows(4) {
        if window.iter().map(|token| token.text.as_str()).eq([".", "unwrap", "(", ")"]) {
            breach(
                window[1].line,
                "`unwrap()`: an error is for a decision, or for an `expect` that says why not".to_owned(),
            );
        }
    }
    found
}

fn judge(layer: &Layer, file: &str, path: &[String]) -> Vec<String> {
    let written = path.join("::");
    let mut wrong = Vec::new();
    if let Some(ours) = ours(path, file) {
        let own = ours.join("/").starts_with(&format!("{file}/"));
        let root = matches!(file, "lib" | "main");
        let allowed = |rule: &&str| **rule == *"*" || ours.starts_with(&split(rule));
        if !own && !root && !layer.may.iter().any(allowed) {
            wrong.push(format!("`{written}`: {} may not import this", layer.name));
        }
    }
    let first = path[0].as_str();
    let place = PLACES.iter().find(|(name, _)| *name == first);
    if let Some((_, places)) = place.filter(|(_, places)| !places.iter().any(|place| matches(place, file))) {
        wrong.push(format!("`{written}`: {first} is named in {} only", places.join(", ")));
    }
    for (ban, only, why) in BANS.iter().filter(|(ban, ..)| names(path, ban)) {
        if !only.contains(&file) {
            wrong.push(format!("`{ban}`: {why}"));
        }
    }
    if layer.pure && IMPURE.iter().any(|rule| names(path, rule)) {
        wrong.push(format!("`{written}`: {} is pure; hand it the time, the bytes or the answer", layer.name));
    }
    wrong
}

fn split(rule: &str) -> Vec<String> {
    rule.split("::").map(str::to_owned).collect()
}

// ---- the tree ------------------------------------------------------------------------------------------

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every Rust file below a directory of the package, as it is named from there.
fn rust_files(directory: &str) -> Vec<PathBuf> {
    let mut folders = vec![root().join(directory)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.expect("a readable folder").path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|extension| extension == "rs") => files.push(path),
                false => {}
            }
        }
    }
    files.sort();
    assert!(!files.is_empty() || directory != "src", "no sources");
    files
}

fn sources() -> Vec<(String, String)> {
    let src = root().join("src");
    let named = |path: &PathBuf| {
        let name = path.strip_prefix(&src).expect("it was found there").with_extension("");
        (name.to_str().expect("our names are UTF-8").to_owned(), read(path))
    };
    rust_files("src").iter().map(named).collect()
}

fn is_known(breach: &str) -> bool {
    KNOWN.iter().any(|(file, what)| breach.starts_with(&format!("src/{file}.rs:")) && breach.contains(what))
}

// ---- the tests -----------------------------------------------------------------------------------------

#[test]
fn every_file_keeps_the_import_law() {
    let all: Vec<String> = sources().iter().flat_map(|(file, source)| breaches(file, source)).collect();
    let new: Vec<&String> = all.iter().filter(|breach| !is_known(breach)).collect();
    assert!(
        new.is_empty(),
        "against the import law (the tables above say what is allowed and why):\n{new:#?}"
    );
    for (file, what) in KNOWN {
        let still =
            all.iter().any(|breach| breach.starts_with(&format!("src/{file}.rs:")) && breach.contains(what));
        assert!(still, "{file} no longer has {what}: take it out of KNOWN");
    }
}

#[test]
fn every_file_of_the_law_exists() {
    let sources = sources();
    let exists = |pattern: &str| sources.iter().any(|(file, _)| matches(pattern, file));
    for layer in LAYERS {
        for pattern in layer.files {
            assert!(exists(pattern), "layer {:?} speaks of {pattern}, which is not there", layer.name);
        }
    }
    for (name, places) in PLACES {
        assert!(places.iter().any(|place| exists(place)), "no place of {name} is there");
    }
}

/// Negative controls: what must be caught, and with which words.
#[test]
fn the_checker_catches_what_it_is_there_for() {
    for (file, source, words) in [
        ("uplink/session", "use crate::store::Handle;", "`crate::store::Handle`: session may not import"),
        ("uplink/session", "use crate::{message::Qos, store::{self, Turn}};", "`crate::store::Turn`"),
        ("uplink/session", "fn f() -> super::link::Link<u8> {}", "`super::link::Link`"),
        ("uplink/session", "use super::super::agent;", "`super::super::agent`"),
        ("uplink/session", "use crate::clock;", "`crate::clock`"),
        ("uplink/session", "use super::*;", "`super::*`"),
        ("policy/topic", "fn f() { let t = crate::clock::now(); }", "policy is pure"),
        ("point", "use crate::policy::Policy;", "vocabulary may not import"),
        ("store/outbox", "use crate::uplink::packet::Packet;", "edge: store may not import"),
        ("source/modbus/line", "use crate::store;", "edge: sources may not import"),
        ("control", "use crate::config::Config;", "edge: control socket may not import"),
        ("http", "use crate::store::Handle;", "edge: HTTP may not import"),
        ("http/route", "use tokio::time::sleep;", "requests over HTTP is pure"),
        ("control", "use hyper::Request;", "hyper is named in http"),
        ("config/broker", "use crate::uplink::connection::Uplink;", "configuration may not import"),
        ("config", "pub use crate::store::{self, WhenFull};", "`crate::store`: configuration"),
        ("pipeline", "use crate::agent;", "the way up may not import"),
        ("cli/run", "use crate::store::Store;", "command line may not import"),
        ("uplink/connection", "use rumqttc::v5;", "rumqttc is named in uplink/link*"),
        ("uplink/connection", "fn f(e: rusqlite::Error) {}", "rusqlite is named in store*"),
        ("store", "use toml::de::DeTable;", "toml is named in config*"),
        ("source/modbus/line", "use tokio_modbus::Slave;", "tokio_modbus is named in"),
        ("source/modbus/line", "use tokio_serial as serial;", "tokio_serial is named in"),
        ("agent", "use rustls::ClientConfig;", "rustls is named in"),
        ("health", "use tokio_rustls::TlsConnector;", "tokio_rustls is named in"),
        ("message", "#[derive(serde::Serialize)] struct M;", "serde is named in control/wire"),
        ("store", "use serde::{Deserialize, Serialize};", "serde is named in control/wire"),
        ("health", "use std::sync::Mutex; type T = std::sync::Arc<Mutex<u8>>;", "`Mutex`: one owner"),
        ("health", "type T = Arc<tokio::sync::Mutex<u8>>;", "`Mutex`: one owner"),
        ("agent", "let (a, b) = mpsc::unbounded_channel();", "`unbounded_channel`"),
        ("agent", "use std::sync::mpsc::{channel, sync_channel};", "`std::sync::mpsc::channel`"),
        ("agent", "fn f() { std::thread::sleep(D); }", "`thread::sleep`"),
        ("store/thread", "fn f() { thread::sleep(D); }", "`thread::sleep`"),
        ("uplink/backoff", "fn f() { std::time::Instant::now(); }", "back-off is pure"),
        ("health", "fn f() { std::time::SystemTime::now(); }", "`SystemTime::now`"),
        ("uplink/presence", "use tokio::time::Duration;", "presence is pure"),
        ("uplink/presence", "fn f() { tracing::warn!(\"x\"); }", "presence is pure"),
        ("policy/format", "use std::fs::File;", "policy is pure"),
        ("store", "fn f() { Connection::open_in_memory(); }", "never falls back to memory"),
        ("store", "fn f(x: Option<u8>) { x.unwrap(); }", "`unwrap()`"),
        ("store", "fn f(x: Option<u8>) { x\n  .unwrap ( ) ; }", "src/store.rs:3:"),
        ("cli/status", "fn f() { println!(\"x\"); }", "`println!`"),
        ("health", "fn f() { panic!(\"x\"); }", "`panic!`"),
        ("health", "fn f() { tokio::spawn(g()); }", "`tokio::spawn`: a task without an owner"),
        ("helpers", "fn f() {}", "is in no layer"),
    ] {
        let found = breaches(file, &format!("//! A file.\n{source}\n"));
        assert!(
            found.iter().any(|breach| breach.contains(words)),
            "{file}: {source}\nnot caught: {found:#?}"
        );
    }
    assert!(breaches("store", "use std::io;\n")[0].contains("no `//!`"));
}

/// What looks like a breach and is none.
#[test]
fn the_checker_lets_pass_what_is_allowed() {
    for (file, source) in [
        (
            "uplink/session",
            "// use crate::store::Handle;\n/// See [`crate::store`].\n/* tokio /* tokio */ */",
        ),
        ("uplink/session", "const A: &str = \"crate::store \\\" tokio::spawn\"; const B: char = '\"';"),
        ("uplink/session", "const A: &str = r#\"use tokio::{spawn}; \"#; fn r#type<'a>(x: &'a str) {}"),
        ("uplink/session", "#[cfg(test)]\nmod tests { use super::*; fn f() { tokio::spawn(x).unwrap(); } }"),
        (
            "uplink/session",
            "pub(super) fn f(x: Option<u8>) -> u8 { x.unwrap_or(0) } pub(in crate::uplink) fn g() {}",
        ),
        ("uplink/session", "use crate::message::{Lane, Qos as Q}; use super::packet::Packet;"),
        ("source/modbus/plan", "use super::Space;"),
        (
            "uplink/link",
            "use super::packet; use crate::uplink::link::wire::Frame; mod wire; use wire::Frame;",
        ),
        ("store/database", "fn f() { std::thread::sleep(D); }"),
        ("clock", "fn f() { SystemTime::now(); }"),
        ("config", "pub use crate::store::WhenFull; pub use crate::uplink::tls::Settings as Tls;"),
        ("health", "fn f() { if a != b {} matches!(x, Y) }"),
    ] {
        let found = breaches(file, &format!("//! A file.\n{source}\n"));
        assert_eq!(found, Vec::<String>::new(), "{file}: {source}");
    }
}

#[test]
fn every_dependency_says_why_it_is_there_and_has_its_place() {
    let manifest = read(&root().join("Cargo.toml"));
    let mut section = "";
    for (number, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim();
        } else if section.ends_with("dependencies]") && line.contains('=') {
            let (entry, reason) = line.split_once(" # ").unwrap_or((line, ""));
            assert!(!reason.trim().is_empty(), "Cargo.toml:{}: no reason: {entry}", number + 1);
            let name = entry.split(' ').next().unwrap_or_default().replace('-', "_");
            let placed = ANYWHERE.contains(&&*name) || PLACES.iter().any(|(place, _)| *place == name);
            assert!(placed || section != "[dependencies]", "{name} has no row in PLACES");
        }
    }
}

// ---- documents -----------------------------------------------------------------------------------------

/// What stands in backticks outside of code blocks, with its line.
fn quoted(document: &str) -> Vec<(usize, &str)> {
    let mut quoted = Vec::new();
    let mut in_block = false;
    for (number, line) in document.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            quoted.extend(line.split('`').skip(1).step_by(2).map(|words| (number + 1, words)));
        }
    }
    quoted
}

/// The words of every source, test, example and configuration, and the names of all functions among them.
fn vocabulary() -> (BTreeSet<String>, BTreeSet<String>) {
    let mut words = BTreeSet::new();
    let mut functions = BTreeSet::new();
    let extra = ["Cargo.toml", "config/fieldpost.toml", "src/store/schema.sql"].map(|file| root().join(file));
    // Not this file: its own tables and samples prove nothing.
    let rust = ["src", "tests", "examples"]
        .into_iter()
        .flat_map(rust_files)
        .filter(|file| !file.ends_with("tests/layers.rs"));
    for file in rust.chain(extra) {
        let text = read(&file);
        let split = |c: char| !c.is_alphanumeric() && c != '_';
        words.extend(text.split(split).map(str::to_owned));
        functions
            .extend(text.split("fn ").skip(1).filter_map(|rest| rest.split(split).next()).map(str::to_owned));
    }
    let own = read(&root().join("tests/layers.rs"));
    let tests = own.split("#[test]\nfn ").skip(1).filter_map(|rest| rest.split('(').next());
    functions.extend(tests.map(str::to_owned));
    (words, functions)
}

/// A name of four words or more is a claim, and so a test. `TODO(test)` on its line says that it is still to come.
#[test]
fn every_test_and_name_in_the_architecture_exists() {
    let document = read(&root().join("ARCHITECTURE.md"));
    let (words, functions) = vocabulary();
    let mut missing = Vec::new();
    for (line, name) in quoted(&document) {
        let segments: Vec<&str> = name.split("::").collect();
        let is_word = |word: &&str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_');
        let is_test = name.matches('_').count() >= 3 && name == name.to_lowercase();
        let exists = match is_test {
            true => functions.contains(name),
            false => segments.iter().all(|word| words.contains(*word)),
        };
        let to_come = document.lines().nth(line - 1).is_some_and(|line| line.contains("TODO(test)"));
        if segments.iter().all(is_word) && !exists && !to_come {
            missing.push(format!("ARCHITECTURE.md:{line}: `{name}`"));
        }
    }
    assert!(missing.is_empty(), "named, but not there:\n{missing:#?}");
}

#[test]
fn every_source_file_is_on_the_code_map() {
    let document = read(&root().join("ARCHITECTURE.md"));
    for (file, _) in sources() {
        let named = format!("{file}.rs");
        assert!(document.contains(&format!("`{named}`")), "src/{named} is missing in ARCHITECTURE.md");
    }
}

#[test]
fn what_the_documents_point_to_is_there() {
    for name in ["README.md", "ARCHITECTURE.md"] {
        let document = read(&root().join(name));
        for (line, words) in quoted(&document) {
            let folders = ["config/", "examples/", "tests/", "systemd/", "cross/"];
            let path = words.split(' ').next().unwrap_or_default();
            if folders.iter().any(|folder| path.starts_with(folder)) {
                let below = |folder: &str| root().join(folder).join(path).exists();
                assert!(below("") || below("src"), "{name}:{line}: {path} is not there");
            }
        }
    }
}

#[test]
fn the_configurations_shown_to_newcomers_are_good_ones() {
    for name in ["README.md", "README.zh-TW.md"] {
        let document = read(&root().join(name));
        let shown = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next());
        let checked = fieldpost::config::parse(Path::new(name), shown.expect("it shows a configuration"));
        assert!(checked.is_ok(), "{}", checked.expect_err("it is not good"));
    }
    let mut files = 0;
    for file in fs::read_dir(root().join("config")).expect("a folder") {
        let path = file.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files += 1;
            let checked = fieldpost::config::load(&path);
            assert!(checked.is_ok(), "{}", checked.expect_err("it is not good"));
        }
    }
    assert!(files >= 5, "{files} configurations");
}

#[test]
fn the_documents_stay_short_enough_to_be_read() {
    for (name, most) in [("ARCHITECTURE.md", 430), ("README.md", 400)] {
        let lines = read(&root().join(name)).lines().count();
        assert!(lines <= most, "{name} has {lines} lines, {most} are enough");
    }
}
