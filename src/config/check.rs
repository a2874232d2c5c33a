//! From the file's shape to a checked [`Config`]: every problem at once, each with its place and a remedy.
//!
//! The only file of the configuration that reads files (`modbus` asks where a device's links lead); `[broker]`, `[store]` with
//! `[replay]` and `[budget]`, `[machine]` and `[[modbus]]` are walked by `broker`, `store`, `machine` and `modbus`.

use std::io::{ErrorKind, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::place::{Place, Problem, Problems, Source};
use super::raw::{self, BUDGET, COMMANDS, CONTROL, GATEWAY, HTTP, LOG, REPLAY, ROOT, STORE, Value};
use super::read::{Section, Walk};
use super::value::{self, Complaint, Surroundings};
use super::{Config, Control, Files, Gateway};
use crate::message::Topic;
use crate::policy::topic::{Names, Template, TemplateError};

/// Larger than any configuration; smaller than what would hurt a gateway when someone names a device file.
const FILE_BYTES_MAX: u64 = 16 << 20;

pub(super) const SECOND: Duration = Duration::from_secs(1);
pub(super) const MINUTE: Duration = Duration::from_secs(60);
pub(super) const DAY: Duration = Duration::from_secs(86_400);
/// Ten years: longer than a gateway lives.
pub(super) const EVER: Duration = Duration::from_secs(3650 * 86_400);

const HEALTH_INTERVAL: RangeInclusive<Duration> = Duration::from_secs(10)..=DAY;
const DRAIN_TIMEOUT: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(600);
/// `sun_path` holds 108 bytes with the final NUL (unix(7)).
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;

pub(super) fn load(path: &Path) -> Result<Config, Problems> {
    let mut unreadable = Vec::new();
    let mut sources = Vec::new();
    for file in std::iter::once(path.to_owned()).chain(conf_d(path, &mut unreadable)) {
        match read_file(&file) {
            Ok(source) => sources.push(source),
            // Nothing can be said about a configuration whose main file is not there.
            Err(problem) if sources.is_empty() => return Err(Problems(vec![*problem])),
            Err(problem) => unreadable.push(*problem),
        }
    }
    match (check(&sources), unreadable.is_empty()) {
        (checked, true) => checked.map(with_files),
        (Ok(_), false) => Err(Problems(unreadable)),
        (Err(problems), false) => Err(Problems(problems.0.into_iter().chain(unreadable).collect())),
    }
}

/// With what the files hold that the configuration names.
fn with_files(mut config: Config) -> Config {
    for broker in std::iter::once(&mut config.broker).chain(&mut config.other_brokers) {
        broker.files = Files::of(broker);
    }
    config
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Config, Problems> {
    check(&[Source::new(path, text)])
}

/// The files `conf.d/*.toml` beside the main file, in the order of their names.
fn conf_d(path: &Path, unreadable: &mut Vec<Problem>) -> Vec<PathBuf> {
    let directory = path.parent().unwrap_or(Path::new("")).join("conf.d");
    let mut files = Vec::new();
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return files,
        Err(error) => {
            unreadable.push(cannot_read(&directory, &error));
            return files;
        }
    };
    for entry in entries {
        match entry {
            Ok(entry) => files.push(entry.path()),
            Err(error) => unreadable.push(cannot_read(&directory, &error)),
        }
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort_unstable();
    files
}

fn read_file(path: &Path) -> Result<Source, Box<Problem>> {
    let mut bytes = Vec::new();
    let read =
        std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|error| cannot_read(path, &error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let message = format!("the file is larger than {} MiB", FILE_BYTES_MAX >> 20);
        let help = Some("is this a configuration file?".to_owned());
        return Err(Box::new(Problem { file: path.to_owned(), spot: None, message, help }));
    }
    let invalid = match str::from_utf8(&bytes) {
        Ok(text) => return Ok(Source::new(path, text)),
        Err(error) => error.valid_up_to(),
    };
    let source = Source::new(path, &String::from_utf8_lossy(&bytes));
    Err(Box::new(Problem {
        file: path.to_owned(),
        spot: Some(source.spot(Place { file: 0, start: invalid, end: invalid + 1 })),
        message: format!("the byte {:#04x} is not UTF-8", bytes[invalid]),
        help: Some("save the file as UTF-8; degree and micro signs are the usual cause".to_owned()),
    }))
}

fn cannot_read(path: &Path, error: &std::io::Error) -> Problem {
    let help = match error.kind() {
        ErrorKind::NotFound => {
            Some("check the path; config/fieldpost.toml of the source is a commented example")
        }
        ErrorKind::PermissionDenied => {
            Some("check the owner and mode of the file, or run as the service's user")
        }
        ErrorKind::IsADirectory => {
            Some("name a file; files in a directory conf.d beside it are read as well")
        }
        _ => None,
    };
    let message = format!("cannot be read: {error}");
    Problem { file: path.to_owned(), spot: None, message, help: help.map(str::to_owned) }
}

fn check(sources: &[Source]) -> Result<Config, Problems> {
    let host = rustix::system::uname();
    let variable = |name: &str| std::env::var(name).ok();
    let around = Surroundings { hostname: &host.nodename().to_string_lossy(), variable: &variable };
    check_in(sources, &around)
}

pub(super) fn check_in(sources: &[Source], around: &Surroundings<'_>) -> Result<Config, Problems> {
    let mut trees = Vec::new();
    let mut refused = Vec::new();
    for (file, source) in sources.iter().enumerate() {
        let (tree, mut errors) = raw::read(file, source);
        trees.push(tree);
        refused.append(&mut errors);
    }
    let mut walk = Walk::new(sources, around, refused);
    let mut trees = trees.into_iter();
    let mut root = trees.next().expect("both callers give a main file");
    for tree in trees {
        for (key, first, again) in raw::merge(&mut root, tree) {
            walk.clash(again, format!("`{key}` is given in two files"), first, "remove one of the two");
        }
    }
    let config = whole(&mut walk, &root);
    walk.finish()?;
    Ok(config)
}

fn whole(walk: &mut Walk<'_>, root: &raw::Table) -> Config {
    walk.only_known(root, &ROOT);
    let root = Section { table: root, keys: &ROOT };
    let section = walk.section(root, "gateway", &GATEWAY, true);
    let gateway = gateway(walk, section);
    let (broker, other_brokers) = super::broker::brokers(walk, root, &gateway.id);
    let section = walk.section(root, "store", &STORE, false);
    let store = super::store::store(walk, section);
    let store_place = section.table.get("path").map_or(section.table.place, |entry| entry.node.place);
    let section = walk.section(root, "replay", &REPLAY, false);
    let replay = super::store::replay(walk, section);
    let is_metered = root.table.get("budget").is_some();
    let section = walk.section(root, "budget", &BUDGET, false);
    let budget = is_metered.then(|| super::store::budget(walk, section));
    let section = walk.section(root, "control", &CONTROL, false);
    let control = control(walk, section, &store.path, store_place);
    let is_served = root.table.get("http").is_some();
    let section = walk.section(root, "http", &HTTP, false);
    let http = is_served.then(|| super::http::http(walk, section));
    let section = walk.section(root, "commands", &COMMANDS, false);
    let commands = super::commands::commands(walk, section, &gateway.id, &gateway.base_topic);
    let section = walk.section(root, "log", &LOG, false);
    let log = super::log::log(walk, section);
    let mut seen = super::modbus::Seen::new(&gateway.id);
    let machine = super::machine::machine(walk, root, &mut seen);
    let (modbus, points) = super::modbus::lines(walk, root, &mut seen);
    Config {
        gateway,
        broker,
        other_brokers,
        store,
        replay,
        budget,
        control,
        http,
        commands,
        log,
        modbus,
        points,
        machine,
    }
}

fn gateway(walk: &mut Walk<'_>, section: Section<'_>) -> Gateway {
    let around = walk.around;
    let id = walk.need(section, "id", |value| {
        let id = value::substitute(value::text(value)?, around)?;
        value::name(&id).map(|()| id)
    });
    // Stands in for an id that was refused, so that topics can still be checked.
    let id = id.map_or_else(|| "gateway".to_owned(), |id| id.value);
    let names = Names { gateway: &id, line: "", unit: "", point: "" };
    let base = walk.get(section, "base_topic", |value| {
        let template = template(value)?;
        render_topic(&template, &names)
    });
    let base_topic = base.map(|topic| topic.value).or_else(|| Topic::new(&format!("fieldpost/{id}")).ok());
    Gateway {
        base_topic: base_topic.expect("a fixed prefix and a name that was checked make a topic"),
        health_interval: walk.duration(section, "health_interval", HEALTH_INTERVAL, 5 * MINUTE),
        drain_timeout: walk.duration(section, "drain_timeout", DRAIN_TIMEOUT, 5 * SECOND),
        id,
    }
}

fn control(walk: &mut Walk<'_>, section: Section<'_>, store: &Path, store_place: Place) -> Control {
    let given = walk.path(section, "socket");
    let place = given.as_ref().map_or(store_place, |given| given.place);
    let socket = given.map_or_else(|| store.with_file_name("control.sock"), |given| given.value);
    let bytes = socket.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        let message =
            format!("the control socket's path has {bytes} bytes, the system takes {SOCKET_PATH_BYTES_MAX}");
        let help = "give a shorter one: [control] socket = \"/run/fieldpost/control.sock\"";
        walk.wrong(place, Complaint::new(message).help(help));
    }
    Control { socket }
}

/// A checked topic template.
pub(super) fn template(value: &Value) -> Result<Template, Complaint> {
    Template::parse(value::text(value)?).map_err(|error| topic_complaint(&error))
}

/// The topic that a template makes of these names.
pub(super) fn render_topic(template: &Template, names: &Names<'_>) -> Result<Topic, Complaint> {
    template.render(names).map_err(|error| topic_complaint(&error))
}

fn topic_complaint(error: &TemplateError) -> Complaint {
    let complaint = Complaint::new(error.to_string());
    match error {
        TemplateError::NoName { .. } => complaint.help("only {gateway} has a meaning here"),
        _ => complaint,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_systemd_credential_comes_before_the_file_beside_the_configuration() {
        let credentials = tempfile::tempdir().expect("a directory");
        let secret = credentials.path().join("broker.password");
        std::fs::write(&secret, "secret").expect("written");
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o440)).expect("ours");
        let directory = credentials.path().display().to_string();
        let variable = |name: &str| (name == "CREDENTIALS_DIRECTORY").then(|| directory.clone());
        let around = Surroundings { hostname: "pi", variable: &variable };
        let text = "[gateway]\nid = \"{hostname}\"\n[broker]\nurl = \"mqtts://b\"\npassword_file = \"broker.password\"\n\
                    cert_file = \"c.pem\"\nkey_file = \"c.key\"\n";
        let config = check_in(&[Source::new(Path::new("/etc/f.toml"), text)], &around);
        let config = config.unwrap_or_else(|problems| panic!("{problems}"));
        assert_eq!(config.gateway.id, "pi");
        assert_eq!(config.broker.password_file, Some(credentials.path().join("broker.password")));
        let tls = config.broker.tls.expect("mqtts");
        assert_eq!(tls.key_file.as_deref(), Some(Path::new("/etc/c.key")));
        assert_eq!(tls.cert_file.as_deref(), Some(Path::new("/etc/c.pem")));
    }
}
