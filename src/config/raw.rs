//! The file's own shape: keys as they are spelt, values as they were written, each with its place.
//!
//! The only file that knows the `toml` crate. Nothing is judged here but spelling: what TOML itself refuses,
//! and, in [`TABLES`], which keys there are.
//!
//! Invariant: any text becomes a tree, of bounded depth, and the list of what could not be read.

use toml::de::{DeTable, DeValue};

use super::place::{Place, Source, masked};

/// Deepest nesting that means anything: `modbus` / its tables / `unit` / its tables / `points` / its tables.
/// The rest is room for a mistake to be told as one.
const DEPTH_MAX: usize = 12;

/// One key of a table: what `check` accepts, and what it suggests for anything else.
#[derive(Debug)]
pub(super) struct Key {
    /// As it is written.
    pub(super) name: &'static str,
    /// What a file could say, to be shown where the key is missing.
    pub(super) example: &'static str,
    /// What people write instead.
    pub(super) also: &'static [&'static str],
}

const fn key(name: &'static str, example: &'static str) -> Key {
    Key { name, example, also: &[] }
}

const fn known(name: &'static str, example: &'static str, also: &'static [&'static str]) -> Key {
    Key { name, example, also }
}

/// A table and its keys.
#[derive(Debug)]
pub(super) struct Keys {
    /// How the table is headed, as in `[gateway]`.
    pub(super) header: &'static str,
    /// Its keys.
    pub(super) keys: &'static [Key],
}

impl Keys {
    /// The key of that name.
    pub(super) fn get(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    /// The key that was probably meant.
    pub(super) fn nearest(&self, written: &str) -> Option<&'static Key> {
        let written = written.to_lowercase().replace('-', "_");
        if let Some(key) = self.keys.iter().find(|key| key.name == written || key.also.contains(&&*written)) {
            return Some(key);
        }
        let near = |key: &&Key| strsim::damerau_levenshtein(&written, key.name);
        let best = self.keys.iter().min_by_key(near)?;
        (near(&best) <= 1.max(best.name.len().min(written.len()) / 3)).then_some(best)
    }
}

/// The top of the file.
pub(super) const ROOT: Keys = Keys {
    header: "the file",
    keys: &[
        key("gateway", "[gateway] and under it: id = \"press-shop-1\""),
        known("broker", "[broker] and under it: url = \"mqtt://127.0.0.1:1883\"", &["mqtt", "cloud"]),
        known("store", "[store]", &["database", "storage", "outbox"]),
        known("replay", "[replay]", &["backlog"]),
        known("budget", "[budget]", &["quota", "metered"]),
        key("control", "[control]"),
        known("http", "[http]", &["web", "api", "metrics", "rest"]),
        known("commands", "[commands]", &["command"]),
        known("log", "[log]", &["logging", "logs"]),
        known("machine", "[machine]", &["health", "system", "host"]),
        known("modbus", "[[modbus]]", &["line", "lines"]),
    ],
};

/// `[gateway]`
pub(super) const GATEWAY: Keys = Keys {
    header: "[gateway]",
    keys: &[
        known("id", "id = \"press-shop-1\"", &["name"]),
        key("base_topic", "base_topic = \"fieldpost/{gateway}\""),
        key("health_interval", "health_interval = \"5min\""),
        key("drain_timeout", "drain_timeout = \"5s\""),
    ],
};

/// `[broker]`
pub(super) const BROKER: Keys = Keys {
    header: "[broker]",
    keys: &[
        known("url", "url = \"mqtt://127.0.0.1:1883\"", &["host", "address", "server", "port", "broker"]),
        known("protocol", "protocol = \"5\"", &["version"]),
        key("client_id", "client_id = \"press-shop-1\""),
        known("username", "username = \"press-shop-1\"", &["user", "login"]),
        known("password_file", "password_file = \"broker.password\"", &["password", "pass"]),
        known("keep_alive", "keep_alive = \"30s\"", &["keepalive"]),
        key("session_expiry", "session_expiry = \"7d\""),
        key("connect_timeout", "connect_timeout = \"20s\""),
        key("ack_timeout", "ack_timeout = \"60s\""),
        known("backoff_max", "backoff_max = \"5min\"", &["reconnect_delay"]),
        known("max_in_flight", "max_in_flight = 1000", &["max_inflight", "inflight"]),
        key("qos2_window", "qos2_window = 1000"),
        known("max_packet", "max_packet = \"256KiB\"", &["max_packet_size"]),
        key("on_session_loss", "on_session_loss = \"republish\""),
        key("retry_refused_for", "retry_refused_for = \"1d\""),
        key("will", "will = true"),
        known("max_qos", "max_qos = 1", &["maximum_qos", "qos"]),
        known("retain", "retain = true", &["retain_available", "retained"]),
        key("max_packet_out", "max_packet_out = \"128KiB\""),
        known("clean_start", "clean_start = false", &["clean_session"]),
        key("failover_after", "failover_after = \"1min\""),
        key("failback_every", "failback_every = \"5min\""),
        known("ca_file", "ca_file = \"ca.pem\"", &["ca", "cafile", "ca_path"]),
        known("cert_file", "cert_file = \"gateway.pem\"", &["cert", "certfile", "certificate"]),
        known("key_file", "key_file = \"gateway.key\"", &["key", "keyfile", "private_key"]),
        known("server_name", "server_name = \"broker.example.com\"", &["sni"]),
        key("alpn", "alpn = [\"mqtt\"]"),
    ],
};

/// `[store]`
pub(super) const STORE: Keys = Keys {
    header: "[store]",
    keys: &[
        known("path", "path = \"/var/lib/fieldpost/outbox.db\"", &["file", "database"]),
        known("quota", "quota = \"512MiB\"", &["max_size", "size", "limit"]),
        key("when_full", "when_full = \"drop_oldest\""),
        known("min_free_disk", "min_free_disk = \"16MiB\"", &["min_free", "free_disk"]),
        key("commit_interval", "commit_interval = \"50ms\""),
        known("lane", "[store.lane.bulk]", &["lanes"]),
    ],
};

/// `[store.lane]`
pub(super) const LANES: Keys = Keys {
    header: "[store.lane]",
    keys: &[
        key("alarm", "[store.lane.alarm]"),
        key("normal", "[store.lane.normal]"),
        key("bulk", "[store.lane.bulk]"),
    ],
};

/// `[store.lane.alarm]` and its two siblings.
pub(super) const LANE_LIMITS: Keys = Keys {
    header: "[store.lane.…]",
    keys: &[
        known("max_bytes", "max_bytes = \"64MiB\"", &["quota", "max_size"]),
        known("max_messages", "max_messages = 100000", &["max_count", "count"]),
        known("max_age", "max_age = \"7d\"", &["ttl"]),
        key("when_full", "when_full = \"drop_oldest\""),
    ],
};

/// `[replay]`
pub(super) const REPLAY: Keys = Keys {
    header: "[replay]",
    keys: &[
        key("order", "order = \"in_order\""),
        known("max_messages_per_second", "max_messages_per_second = 50", &["rate", "messages_per_second"]),
        known("max_bytes_per_second", "max_bytes_per_second = \"16KiB\"", &["bytes_per_second", "bandwidth"]),
    ],
};

/// `[budget]`
pub(super) const BUDGET: Keys = Keys {
    header: "[budget]",
    keys: &[
        known("bytes", "bytes = \"50MiB\"", &["limit", "size", "max_bytes"]),
        known("per", "per = \"month\"", &["period", "every"]),
        known("holds_back", "holds_back = [\"bulk\", \"normal\"]", &["lanes", "lane"]),
    ],
};

/// `commit_interval` in `[store]`, by lane.
pub(super) const COMMIT_INTERVAL: Keys = Keys {
    header: "commit_interval",
    keys: &[key("alarm", "alarm = \"0s\""), key("normal", "normal = \"50ms\""), key("bulk", "bulk = \"1s\"")],
};

/// `[control]`
pub(super) const CONTROL: Keys = Keys {
    header: "[control]",
    keys: &[known("socket", "socket = \"/run/fieldpost/control.sock\"", &["path"])],
};

/// `[http]`
pub(super) const HTTP: Keys = Keys {
    header: "[http]",
    keys: &[
        known("listen", "listen = \"127.0.0.1:8090\"", &["address", "bind", "port", "url"]),
        known("token_file", "token_file = \"http.token\"", &["token", "password_file", "password", "bearer"]),
        known("max_connections", "max_connections = 128", &["connections"]),
        known("max_waiting", "max_waiting = 64", &["max_requests", "queue"]),
        known("max_body", "max_body = \"256KiB\"", &["max_size", "body_limit"]),
        known("read_timeout", "read_timeout = \"10s\"", &["timeout", "header_timeout"]),
    ],
};

/// `[commands]`
pub(super) const COMMANDS: Keys = Keys {
    header: "[commands]",
    keys: &[
        key("topic", "topic = \"fieldpost/{gateway}/command\""),
        known("ttl", "ttl = \"30s\"", &["expires_after", "expiry"]),
        key("max_ttl", "max_ttl = \"10min\""),
        known("max_per_second", "max_per_second = 10", &["rate", "rate_limit"]),
        key("burst", "burst = 50"),
        known(
            "response_topics",
            "response_topics = [\"plant/answers/\"]",
            &["response_topic", "answer_topic"],
        ),
    ],
};

/// `[log]`
pub(super) const LOG: Keys = Keys {
    header: "[log]",
    keys: &[
        known("level", "level = \"info\"", &["levels", "verbosity", "filter"]),
        known("format", "format = \"json\"", &["style", "output"]),
    ],
};

const EVERY: Key = known("every", "every = \"1s\"", &["interval", "poll", "poll_interval", "period", "rate"]);
const QOS: Key = key("qos", "qos = 1");
const RETAIN: Key = known("retain", "retain = false", &["retained"]);
const LANE: Key = known("lane", "lane = \"normal\"", &["priority"]);
const TOPIC: Key = key("topic", "topic = \"{gateway}/{line}/{unit}\"");
const DEADBAND: Key = known("deadband", "deadband = 0.5", &["dead_band", "threshold"]);
const LONGEST_SILENCE: Key = known("longest_silence", "longest_silence = \"10min\"", &["heartbeat"]);
const EXPIRES_AFTER: Key = known("expires_after", "expires_after = \"1d\"", &["expiry", "ttl"]);

/// `[machine]`
pub(super) const MACHINE: Keys = Keys {
    header: "[machine]",
    keys: &[
        EVERY,
        QOS,
        RETAIN,
        LANE,
        TOPIC,
        DEADBAND,
        LONGEST_SILENCE,
        EXPIRES_AFTER,
        known("points", "points = [{ name = \"cpu_temperature\" }]", &["point", "sensors"]),
    ],
};

/// One point of the machine.
pub(super) const MACHINE_POINT: Keys = Keys {
    header: "[[machine.points]]",
    keys: &[
        known("name", "name = \"cpu_temperature\"", &["id", "sensor"]),
        EVERY,
        QOS,
        RETAIN,
        LANE,
        TOPIC,
        DEADBAND,
        LONGEST_SILENCE,
        EXPIRES_AFTER,
    ],
};

/// `[[modbus]]`
pub(super) const LINE: Keys = Keys {
    header: "[[modbus]]",
    keys: &[
        known("name", "name = \"line1\"", &["id"]),
        known("transport", "transport = \"rtu\"", &["type", "mode"]),
        known("device", "device = \"/dev/ttyUSB0\"", &["port_name", "path", "serial"]),
        known("baud_rate", "baud_rate = 9600", &["baud", "speed", "baudrate"]),
        key("parity", "parity = \"even\""),
        known("stop_bits", "stop_bits = 1", &["stop", "stopbits"]),
        known("host", "host = \"192.168.1.20\"", &["address", "ip", "hostname"]),
        key("port", "port = 502"),
        key("timeout", "timeout = \"1s\""),
        EVERY,
        QOS,
        RETAIN,
        LANE,
        TOPIC,
        DEADBAND,
        LONGEST_SILENCE,
        EXPIRES_AFTER,
        known("unit", "[[modbus.unit]]", &["units", "slave", "slaves"]),
    ],
};

/// `[[modbus.unit]]`
pub(super) const UNIT: Keys = Keys {
    header: "[[modbus.unit]]",
    keys: &[
        key("name", "name = \"meter1\""),
        known("unit", "unit = 1", &["id", "slave", "slave_id", "unit_id", "address"]),
        EVERY,
        QOS,
        RETAIN,
        LANE,
        TOPIC,
        DEADBAND,
        LONGEST_SILENCE,
        EXPIRES_AFTER,
        known(
            "points",
            "points = [{ name = \"voltage\", register = \"input\", address = 0, type = \"f32\" }]",
            &["point", "registers"],
        ),
    ],
};

/// One point.
pub(super) const POINT: Keys = Keys {
    header: "[[modbus.unit.points]]",
    keys: &[
        known("name", "name = \"voltage\"", &["id"]),
        known("register", "register = \"holding\"", &["space", "table", "kind", "function"]),
        known("address", "address = 0", &["addr", "offset"]),
        known("type", "type = \"u16\"", &["datatype", "data_type", "format"]),
        known("order", "order = \"abcd\"", &["byte_order", "word_order", "endian", "byteorder"]),
        known("scale", "scale = 0.01", &["factor", "multiplier"]),
        known("unit", "unit = \"kWh\"", &["units"]),
        known("writable", "writable = true", &["write", "writeable", "access"]),
        EVERY,
        QOS,
        RETAIN,
        LANE,
        TOPIC,
        DEADBAND,
        LONGEST_SILENCE,
        EXPIRES_AFTER,
    ],
};

/// What may be written to a point.
pub(super) const WRITABLE: Keys = Keys {
    header: "writable",
    keys: &[
        known("min", "min = 0", &["minimum", "low", "from"]),
        known("max", "max = 100", &["maximum", "high", "to"]),
    ],
};

/// Every table that a file can hold.
pub(super) const TABLES: &[&Keys] = &[
    &ROOT,
    &GATEWAY,
    &BROKER,
    &STORE,
    &LANES,
    &LANE_LIMITS,
    &REPLAY,
    &BUDGET,
    &COMMIT_INTERVAL,
    &CONTROL,
    &HTTP,
    &COMMANDS,
    &LOG,
    &MACHINE,
    &MACHINE_POINT,
    &LINE,
    &UNIT,
    &POINT,
    &WRITABLE,
];

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) place: Place,
    pub(super) value: Value,
}

/// A value as the file says it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Bool(bool),
    Date,
    Array(Vec<Node>),
    Table(Table),
}

/// A table: its header (or its braces), and its entries in the order of the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Table {
    pub(super) place: Place,
    pub(super) entries: Vec<Entry>,
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) key_place: Place,
    pub(super) node: Node,
}

impl Table {
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }
}

/// What TOML itself refuses.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refused {
    pub(super) place: Place,
    pub(super) message: String,
    pub(super) help: Option<String>,
    /// Whether keys may have been lost or taken for another table's, so that "missing" means little.
    pub(super) structural: bool,
}

/// Reads one file's text as far as it can be read.
pub(super) fn read(file: usize, source: &Source) -> (Table, Vec<Refused>) {
    let (tree, errors) = DeTable::parse_recoverable(&source.text);
    let mut reader = Reader { file, refused: Vec::new() };
    let table = reader.table(tree.get_ref(), 0..0, 0);
    let mut refused = reader.refused;
    for error in &errors {
        let span = error.span().unwrap_or(source.text.len()..source.text.len());
        let place = Place { file, start: span.start, end: span.end };
        refused.push(explain(error.message(), place, &table, source));
    }
    (table, refused)
}

struct Reader {
    file: usize,
    refused: Vec<Refused>,
}

impl Reader {
    fn table(&mut self, tree: &DeTable<'_>, span: std::ops::Range<usize>, depth: usize) -> Table {
        let mut entries = Vec::with_capacity(tree.len());
        for (key, value) in tree {
            let key_place = self.place(key.span());
            // The parser's own stand-in for a value it could not read has an empty place.
            let placed = !value.span().is_empty();
            let read = placed.then(|| self.value(value.get_ref(), value.span(), depth + 1)).flatten();
            if let Some(value_read) = read {
                let node = Node { place: self.place(value.span()), value: value_read };
                entries.push(Entry { key: key.get_ref().to_string(), key_place, node });
            }
        }
        entries.sort_by_key(|entry| entry.key_place);
        Table { place: self.place(span), entries }
    }

    fn value(&mut self, value: &DeValue<'_>, span: std::ops::Range<usize>, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            self.refuse(span, "this is nested deeper than anything in this file can be");
            return None;
        }
        Some(match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Boolean(yes) => Value::Bool(*yes),
            DeValue::Datetime(_) => Value::Date,
            DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => {
                    self.refuse(span, "this number does not fit 64 bits");
                    return None;
                }
            },
            DeValue::Float(float) => match float.as_str().parse() {
                Ok(number) => Value::Float(number),
                Err(_) => {
                    self.refuse(span, "this is not a number");
                    return None;
                }
            },
            DeValue::Table(table) => Value::Table(self.table(table, span, depth)),
            DeValue::Array(array) => {
                let mut nodes = Vec::with_capacity(array.len());
                for item in array {
                    if let Some(value) = self.value(item.get_ref(), item.span(), depth + 1) {
                        nodes.push(Node { place: self.place(item.span()), value });
                    }
                }
                Value::Array(nodes)
            }
        })
    }

    fn place(&self, span: std::ops::Range<usize>) -> Place {
        Place { file: self.file, start: span.start, end: span.end }
    }

    fn refuse(&mut self, span: std::ops::Range<usize>, message: &str) {
        // The key is there although its value is not: nothing may be called missing because of this.
        let place = self.place(span);
        self.refused.push(Refused { place, message: message.to_owned(), help: None, structural: true });
    }
}

/// The parser's message in our words where ours say more.
fn explain(message: &str, place: Place, table: &Table, source: &Source) -> Refused {
    if message == "duplicate key" {
        let key = source.text_of(place);
        let first = match first_given(table, place, source) {
            Some(first) => format!("; first at {}", source.name_of(first)),
            None => String::new(),
        };
        let message = format!("`{key}` is given twice{first}");
        return Refused { place, message, help: Some("remove one of the two".to_owned()), structural: false };
    }
    if message.starts_with("string values must be quoted") {
        let written = source.text_of(place);
        let line = source.line(source.line_of(place.start)).1;
        let (message, help) = match written {
            "" => ("there is no value after the `=`".to_owned(), None),
            _ if line.trim_start().starts_with('[') => {
                let message = "this table header stands inside an array".to_owned();
                let help = Some("close the array above it with `]`".to_owned());
                return Refused { place, message, help, structural: true };
            }
            _ if masked(line) != line => ("a text must stand in quotes".to_owned(), None),
            _ => (format!("a text must stand in quotes: {written}"), Some(format!("write \"{written}\""))),
        };
        return Refused { place, message, help, structural: written.is_empty() };
    }
    Refused { place, message: message.to_owned(), help: None, structural: true }
}

/// Where the key or header at `again` was given before.
fn first_given(table: &Table, again: Place, source: &Source) -> Option<Place> {
    let number = source.line_of(again.start);
    let (_, line) = source.line(number);
    if line.trim_start().starts_with('[') {
        // The tree keeps only the last of two headers, so the first one is looked for in the text.
        let first = (0..number).find(|earlier| source.line(*earlier).1.trim() == line.trim())?;
        let (start, text) = source.line(first);
        return Some(Place { file: again.file, start, end: start + text.len() });
    }
    let owner = owner_of(table, again, source)?;
    owner.get(source.text_of(again)).map(|entry| entry.key_place).filter(|first| *first < again)
}

/// The innermost table that the place belongs to: the braces around it, or the last header before it.
fn owner_of<'t>(table: &'t Table, inner: Place, source: &Source) -> Option<&'t Table> {
    let mut best = table;
    let mut waiting = vec![table];
    while let Some(candidate) = waiting.pop() {
        let inline = source.text_of(candidate.place).starts_with('{');
        let holds = candidate.place.start <= inner.start && (!inline || inner.end <= candidate.place.end);
        if holds && candidate.place >= best.place {
            best = candidate;
        }
        for entry in &candidate.entries {
            match &entry.node.value {
                Value::Table(table) => waiting.push(table),
                Value::Array(nodes) => waiting.extend(nodes.iter().filter_map(|node| match &node.value {
                    Value::Table(table) => Some(table),
                    _ => None,
                })),
                _ => {}
            }
        }
    }
    Some(best)
}

/// Adds another file's tables to those read before. Returns the keys that both give, the earlier place first.
pub(super) fn merge(into: &mut Table, other: Table) -> Vec<(String, Place, Place)> {
    let mut twice = Vec::new();
    for theirs in other.entries {
        let Some(ours) = into.entries.iter_mut().find(|entry| entry.key == theirs.key) else {
            into.entries.push(theirs);
            continue;
        };
        match (&mut ours.node.value, theirs.node.value) {
            (Value::Array(ours), Value::Array(theirs)) => ours.extend(theirs),
            (Value::Table(ours), Value::Table(theirs)) => {
                for entry in theirs.entries {
                    match ours.get(&entry.key) {
                        Some(first) => twice.push((entry.key, first.key_place, entry.key_place)),
                        None => ours.entries.push(entry),
                    }
                }
            }
            _ => twice.push((theirs.key, ours.key_place, theirs.key_place)),
        }
    }
    twice
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_misspelt_key_finds_the_one_that_was_meant() {
        for (keys, written, meant) in [
            (&POINT, "deadbnad", Some("deadband")),
            (&POINT, "adress", Some("address")),
            (&POINT, "interval", Some("every")),
            (&POINT, "Type", Some("type")),
            (&LINE, "baudrate", Some("baud_rate")),
            (&LINE, "baud-rate", Some("baud_rate")),
            (&BROKER, "password", Some("password_file")),
            (&UNIT, "slave_id", Some("unit")),
            (&STORE, "colour", None),
            (&POINT, "x", None),
        ] {
            assert_eq!(keys.nearest(written).map(|key| key.name), meant, "{written}");
        }
    }

    #[test]
    fn no_two_keys_of_a_table_share_a_name() {
        for table in TABLES {
            let mut names =
                table.keys.iter().flat_map(|key| key.also.iter().chain([&key.name])).collect::<Vec<_>>();
            names.sort_unstable();
            let before = names.len();
            names.dedup();
            assert_eq!(names.len(), before, "{}", table.header);
        }
    }

    #[test]
    fn any_depth_of_nesting_is_read_or_refused() {
        for text in [
            format!("{}a = 1", "a.".repeat(50_000)),
            format!("a = {}", "[".repeat(50_000)),
            format!("a = {}1{}", "{a = ".repeat(60), "}".repeat(60)),
            format!("[{}a]\n{}a = 1", "a.".repeat(70), "b.".repeat(70)),
        ] {
            let (_, refused) = read(0, &Source::new(Path::new("f.toml"), &text));
            assert!(!refused.is_empty());
        }
    }

    #[test]
    fn the_reference_file_shows_every_key_in_its_own_table() {
        let text = include_str!("../../config/fieldpost.toml");
        let mut header = "the file".to_owned();
        let mut shown = std::collections::BTreeSet::new();
        for line in text.lines() {
            // A setting that is commented out begins with `#` and no space; prose begins with `# `.
            let line = line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line).trim();
            if line.starts_with('[') {
                header = line.split(" #").next().unwrap_or(line).trim().to_owned();
                let top = header.trim_matches(['[', ']']).split('.').next().unwrap_or_default();
                shown.insert(("the file".to_owned(), top.to_owned()));
                if let Some(lane) = header.strip_prefix("[store.lane.") {
                    shown.insert(("[store]".to_owned(), "lane".to_owned()));
                    shown.insert(("[store.lane]".to_owned(), lane.trim_end_matches(']').to_owned()));
                    header = LANE_LIMITS.header.to_owned();
                }
                if header == "[[modbus.unit]]" {
                    shown.insert(("[[modbus]]".to_owned(), "unit".to_owned()));
                }
                if header == MACHINE_POINT.header {
                    shown.insert((MACHINE.header.to_owned(), "points".to_owned()));
                }
                if header == "[[modbus.unit.points]]" {
                    shown.insert(("[[modbus.unit]]".to_owned(), "points".to_owned()));
                }
            } else if let Some((key, value)) = line.split_once('=') {
                shown.insert((header.clone(), key.trim().to_owned()));
                for part in value.split(['{', ',']).filter_map(|part| part.split_once('=')) {
                    shown.insert((key.trim().to_owned(), part.0.trim().to_owned()));
                }
            }
        }
        for table in TABLES {
            for key in table.keys {
                let wanted = (table.header.to_owned(), key.name.to_owned());
                assert!(shown.contains(&wanted), "{} is not shown in {}", key.name, table.header);
            }
        }
    }
}
