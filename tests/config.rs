//! Configuration files, good and bad, as a person would write them.
//!
//! Every `tests/data/config/*.toml` is wrong in its own way, and the `.txt` beside it is the report it must get, to
//! the letter. `FIELDPOST_BLESS=1` writes the reports anew; read the difference before you commit it.

#[path = "support/emulator.rs"]
mod emulator;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fieldpost::config::{
    self, Config, LaneLimits, OnSessionLoss, Parity, Problems, Replay, Transport, WhenFull,
};
use fieldpost::logging;
use fieldpost::message::{Lane, Qos};
use fieldpost::policy::Reporting;
use fieldpost::policy::deadband::Deadband;
use fieldpost::source::machine::Sensor;
use fieldpost::source::modbus::Space;
use fieldpost::source::modbus::register::{Kind, Order};
use fieldpost::uplink::packet::Protocol;
use proptest::prelude::*;

const REFERENCE: &str = include_str!("../config/fieldpost.toml");
const SMALLEST: &str = "[gateway]\nid = \"gw\"\n[broker]\nurl = \"mqtt://broker\"\n";

fn parse(text: &str) -> Result<Config, Problems> {
    config::parse(Path::new("f.toml"), text)
}

fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|problems| panic!("{problems}"))
}

fn bad(text: &str) -> Problems {
    parse(text).err().unwrap_or_else(|| panic!("this should have been refused:\n{text}"))
}

#[test]
fn every_bad_file_gets_its_report() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/config");
    let mut files = fs::read_dir(&directory)
        .expect("the directory is there")
        .map(|entry| entry.expect("it can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect::<Vec<_>>();
    files.sort();
    assert!(files.len() >= 25, "only {} bad files", files.len());
    let mut wrong = Vec::new();
    for file in &files {
        let name = PathBuf::from(file.file_name().expect("it has a name"));
        let text = fs::read_to_string(file).expect("it can be read");
        let report = match config::parse(&name, &text) {
            Ok(_) => "no problems\n".to_owned(),
            Err(problems) => format!("{problems}\n"),
        };
        let golden = file.with_extension("txt");
        if std::env::var_os("FIELDPOST_BLESS").is_some() {
            fs::write(&golden, &report).expect("it can be written");
        }
        let expected = fs::read_to_string(&golden).unwrap_or_default();
        if report != expected {
            wrong.push(format!("--- {} expected\n{expected}\n--- found\n{report}", name.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_reference_file_loads_as_it_is() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/fieldpost.toml");
    let config = config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
    assert_eq!(config.gateway.id, "press-shop-1");
    assert_eq!(config.modbus.len(), 2);
    assert_eq!(config.points.len(), 4);
    assert_eq!(config.modbus[1].units[0].points, 2..4);
    assert_eq!(config.points[1].report.id.to_string(), "line1/meter1/energy");
    assert_eq!((config.points[1].space, config.points[1].address), (Space::Holding, 10));
    assert_eq!((config.points[1].encoding.kind, config.points[1].encoding.order), (Kind::U32, Order::Cdab));
    assert_eq!((config.points[3].space, config.points[3].address), (Space::DiscreteInput, 0));
    assert_eq!(config.points[3].report.topic.as_str(), "press-shop-1/hall2/pump/overheated");
    assert_eq!(config.points[0].report.topic.as_str(), "press-shop-1/line1/meter1");
}

#[test]
fn the_settings_shown_in_comments_load_too() {
    let uncommented = REFERENCE
        .lines()
        .map(|line| {
            line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' ')).unwrap_or(line)
        })
        .map(|line| line.replace("mqtt://127.0.0.1:1883\"", "mqtts://127.0.0.1:1883\""))
        .collect::<Vec<_>>()
        .join("\n");
    let config = good(&uncommented);
    assert_eq!(config.broker.tls.map(|tls| tls.alpn), Some(vec!["mqtt".to_owned()]));
}

/// What a package installs into /etc, for a person to fill in.
#[test]
fn the_packaged_file_lacks_the_brokers_url_alone_and_what_it_suggests_is_accepted() {
    const PACKAGED: &str = include_str!("../systemd/debian/fieldpost.toml");
    let problems = bad(PACKAGED).to_string();
    assert!(problems.contains("`url` is missing in [broker]"), "{problems}");
    assert_eq!(problems.matches("help:").count(), 1, "{problems}");
    let suggested = |line: &str| {
        line.strip_prefix('#')
            .filter(|rest| !rest.starts_with(' ') || rest.starts_with("  {"))
            .map(str::to_owned)
    };
    let filled: Vec<String> =
        PACKAGED.lines().map(|line| suggested(line).unwrap_or_else(|| line.to_owned())).collect();
    let config = good(&filled.join("\n"));
    assert_eq!((config.modbus.len(), config.points.len()), (2, 3));
    assert!(config.warnings().is_empty() && config.broker.tls.is_some());
}

#[test]
fn the_defaults_are_those_of_the_reference_file() {
    let config = good(SMALLEST);
    let second = Duration::from_secs(1);
    assert_eq!(config.gateway.base_topic.as_str(), "fieldpost/gw");
    assert_eq!(config.gateway.health_interval, 300 * second);
    assert_eq!(config.gateway.drain_timeout, 5 * second);
    let broker = config.broker;
    assert_eq!((broker.host.as_str(), broker.port, broker.protocol), ("broker", 1883, Protocol::V5));
    assert_eq!((broker.client_id.as_str(), broker.username, broker.password_file), ("gw", None, None));
    assert_eq!((broker.keep_alive, broker.session_expiry), (30 * second, 604_800 * second));
    assert_eq!((broker.connect_timeout, broker.ack_timeout), (20 * second, 60 * second));
    assert_eq!((broker.backoff_max, broker.retry_refused_for), (300 * second, 86_400 * second));
    assert_eq!((broker.max_in_flight, broker.qos2_window, broker.max_packet), (1000, 1000, 256 << 10));
    assert_eq!((broker.on_session_loss, broker.will), (OnSessionLoss::Republish, true));
    assert_eq!((broker.failover_after, broker.failback_every), (60 * second, 300 * second));
    assert_eq!((broker.max_qos, broker.retain, broker.clean_start), (Qos::ExactlyOnce, true, false));
    assert_eq!(broker.max_packet_out, None);
    assert!(broker.tls.is_none());
    assert_eq!((config.store.quota, config.store.when_full), (512 << 20, WhenFull::DropOldest));
    assert_eq!((config.replay, config.budget), (Replay::default(), None));
    assert_eq!((config.store.min_free_disk, config.store.lanes), (16 << 20, [LaneLimits::default(); 3]));
    assert_eq!(config.store.commit_interval, [Duration::ZERO, Duration::from_millis(50), second]);
    assert_eq!(config.store.path, Path::new("/var/lib/fieldpost/outbox.db"));
    assert_eq!(config.control.socket, Path::new("/var/lib/fieldpost/control.sock"));
    assert_eq!(config.log, logging::Settings::default());
    assert!(config.modbus.is_empty() && config.points.is_empty());
    assert_eq!(config.http, None);
    let http = good(&format!("{SMALLEST}[http]\n")).http.expect("the table is there");
    assert_eq!((http.listen.to_string().as_str(), http.token_file), ("127.0.0.1:8090", None));
    assert_eq!((http.max_connections, http.max_waiting, http.max_body), (128, 64, 256 << 10));
    assert_eq!(http.read_timeout, 10 * second);
}

#[test]
fn http_listens_on_an_address_or_a_socket_and_needs_a_token_where_others_can_reach_it() {
    let listens = |lines: &str| {
        let parsed = parse(&format!("{SMALLEST}[http]\n{lines}\n"));
        parsed
            .map(|config| config.http.expect("the table is there").listen.to_string())
            .map_err(|p| p.to_string())
    };
    for (written, meant) in [
        ("127.0.0.1:1", "127.0.0.1:1"),
        ("127.1.2.3:8090", "127.1.2.3:8090"),
        ("[::1]:8090", "[::1]:8090"),
        ("unix:/run/fieldpost/http.sock", "unix:/run/fieldpost/http.sock"),
        ("unix:http.sock", "unix:http.sock"),
    ] {
        assert_eq!(listens(&format!("listen = \"{written}\"")).as_deref(), Ok(meant));
    }
    for address in ["0.0.0.0:8090", "[::]:8090", "192.168.1.5:8090", "[::ffff:10.0.0.1]:80"] {
        let open = listens(&format!("listen = \"{address}\"")).expect_err("others can reach it");
        assert!(
            open.contains("f.toml:6:10") && open.contains("can be reached from other machines"),
            "{open}"
        );
        assert!(open.contains("openssl rand"), "{open}");
        assert_eq!(listens(&format!("listen = \"{address}\"\ntoken_file = \"t\"")), Ok(address.into()));
    }
    for (written, help) in [
        ("8090", "write \"127.0.0.1:8090\""),
        ("\"8090\"", "write \"127.0.0.1:8090\""),
        ("\":8090\"", "write \"127.0.0.1:8090\""),
        ("\"localhost:8090\"", "write \"127.0.0.1:8090\""),
        ("\"http://127.0.0.1:8090/\"", "write \"127.0.0.1:8090\""),
        ("\"127.0.0.1\"", "write \"127.0.0.1:8090\""),
        ("\"::1\"", "write \"[::1]:8090\""),
        ("\"/run/http.sock\"", "write \"unix:/run/http.sock\""),
        ("\"127.0.0.1:0\"", "a port is 1 to 65535"),
        ("\"unix:\"", "the path is empty"),
        ("\"gateway.example:8090\"", "an IP address and port"),
        ("true", "expected a text"),
    ] {
        let told = listens(&format!("listen = {written}")).expect_err(written);
        assert!(told.contains(help), "{written}: {told}");
    }
    let long = listens(&format!("listen = \"unix:/{}\"", "x".repeat(107))).expect_err("too long");
    assert!(long.contains("108 bytes"), "{long}");
    let open = "[http]\nlisten = \"0.0.0.0:8090\"\ntoken_file = \"t\"\n";
    let warnings = good(&format!("{SMALLEST}{open}")).warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("unencrypted"), "{warnings:?}");
}

#[test]
fn the_machine_tells_only_what_it_is_asked() {
    assert!(good(SMALLEST).machine.is_none());
    let config = good(&format!("{SMALLEST}[machine]\n"));
    let points = &config.machine.as_ref().unwrap().points;
    assert_eq!(points.iter().map(|point| point.sensor).collect::<Vec<_>>(), Sensor::ALL);
    let Reporting { id, topic, deadband, unit, longest_silence, .. } = &points[0].report;
    assert_eq!(
        (id.to_string().as_str(), topic.as_str()),
        ("gateway/machine/cpu_temperature", "gw/gateway/machine")
    );
    assert_eq!((*deadband, unit.as_deref()), (Deadband::Absolute(3.0), Some("°C")));
    assert_eq!((points[0].every, *longest_silence), (Duration::from_secs(60), Duration::from_secs(3600)));
    assert_eq!(config.reporting().count(), 18);

    let table = "[machine]\nqos = 2\ndeadband = \"10%\"\n[[machine.points]]\nname = \"load\"\n[[machine.points]]\n\
                 name = \"under_voltage\"\nevery = \"10s\"\nlane = \"alarm\"\ntopic = \"{gateway}/{point}\"\n";
    let points = good(&format!("{SMALLEST}{table}")).machine.unwrap().points;
    let [load, voltage] = &points[..] else { panic!("two points, not {points:?}") };
    assert_eq!((load.sensor, load.report.qos), (Sensor::Load, Qos::ExactlyOnce));
    assert_eq!(load.report.deadband, Deadband::Percent(10.0));
    assert_eq!((voltage.every, voltage.report.topic.as_str()), (Duration::from_secs(10), "gw/under_voltage"));
    assert_eq!(voltage.report.deadband, Deadband::Absolute(0.0), "there is no small change of a bit");
}

#[test]
fn what_points_ask_for_and_the_broker_does_not_have_is_a_warning_and_no_problem() {
    let line = "[[modbus]]\nname = \"l\"\ntransport = \"tcp\"\nhost = \"h\"\n[[modbus.unit]]\nname = \"u\"\nunit = 1\n\
                points = [\n{ name = \"a\", register = \"input\", type = \"u16\", address = 0, qos = 2, retain = true, topic = \"a\" },\n\
                { name = \"b\", register = \"input\", type = \"u16\", address = 1, qos = 2, topic = \"b\" },\n\
                { name = \"c\", register = \"input\", type = \"u16\", address = 2, topic = \"c\" }]\n";
    assert_eq!(good(&format!("{SMALLEST}{line}")).warnings(), [""; 0]);
    let less = "max_qos = 1\nretain = false\nwill = false\nclean_start = true\n";
    let warnings = good(&format!("{SMALLEST}{less}{line}")).warnings();
    assert_eq!(
        warnings,
        [
            "[broker] max_qos = 1, but l/u/a and 1 more ask for more: sent at QoS 1",
            "[broker] retain = false, but l/u/a asks for it: sent without",
            "[broker] retain = false: the broker keeps neither presence nor unit states",
            "[broker] will = false: the broker does not say when the gateway is lost",
            "[broker] clean_start = true: commands sent during an outage are lost",
        ]
    );
    let never = good(&format!("{SMALLEST}max_qos = 0\n{line}")).warnings();
    assert_eq!(never[0], "[broker] max_qos = 0, but l/u/a and 2 more ask for more: sent at QoS 0");
    assert!(never[1].contains("whether it arrives or not"), "{never:?}");
    let clean = good(&format!("{SMALLEST}clean_start = true\n")).warnings();
    assert!(clean[0].contains("QoS 2 messages in flight when a link breaks may arrive twice"), "{clean:?}");
}

#[test]
fn several_brokers_are_a_list_in_the_order_of_preference_each_with_its_own_settings() {
    let gateway = "[gateway]\nid = \"gw\"\n";
    let second = "[[broker]]\nurl = \"mqtts://b\"\nmax_qos = 1\nfailback_every = \"10min\"\n";
    let config =
        good(&format!("{gateway}[[broker]]\nurl = \"mqtt://a\"\nfailover_after = \"2min\"\n{second}"));
    let told: Vec<_> = config.brokers().map(|b| (b.host.as_str(), b.port, b.max_qos.number())).collect();
    assert_eq!(told, [("a", 1883, 2), ("b", 8883, 1)]);
    let minute = Duration::from_secs(60);
    let patience: Vec<_> = config.brokers().map(|b| (b.failover_after, b.failback_every)).collect();
    assert_eq!(patience, [(2 * minute, 5 * minute), (minute, 10 * minute)]);
    assert!(good(SMALLEST).other_brokers.is_empty());
    let twice = bad(&format!("{gateway}{second}{second}")).to_string();
    assert!(
        twice.contains(
            "f.toml:7:1: this broker is there already, with the same client_id; first at f.toml:3:1"
        ),
        "{twice}"
    );
    good(&format!("{gateway}{second}{second}client_id = \"other\"\n"));
    let none = bad(&format!("broker = []\n{gateway}")).to_string();
    assert!(none.contains("f.toml:1:10: expected a table [broker]"), "{none}");
    assert!(bad(&format!("broker = [1]\n{gateway}")).to_string().contains("f.toml:1:11"));
}

#[test]
fn defaults_that_depend_on_other_settings_follow_them() {
    let broker = good(&SMALLEST.replace("mqtt:", "mqtts:")).broker;
    assert_eq!((broker.port, broker.tls.is_some()), (8883, true));
    let broker = good(&format!("{SMALLEST}protocol = \"3.1.1\"\n")).broker;
    assert_eq!(broker.qos2_window, 20);
    let broker = good(&format!("{SMALLEST}max_in_flight = 7\n")).broker;
    assert_eq!(broker.qos2_window, 7);
    let serial = "[[modbus]]\nname = \"l\"\ntransport = \"rtu\"\ndevice = \"/dev/x\"\n";
    for (extra, parity, stop_bits) in
        [("", Parity::Even, 1), ("parity = \"none\"", Parity::None, 2), ("parity = \"odd\"", Parity::Odd, 1)]
    {
        let config = good(&format!("{SMALLEST}{serial}{extra}\n"));
        let Transport::Rtu(port) = &config.modbus[0].transport else { panic!("not rtu") };
        assert_eq!((port.parity, port.stop_bits, port.baud_rate), (parity, stop_bits, 9600));
        assert_eq!(config.modbus[0].timeout, Duration::from_secs(1));
    }
}

/// A TCP line with settings of its own, a unit with settings of its own, and points.
fn line(line: &str, unit: &str, points: &[&str]) -> String {
    let points = points.iter().map(|point| format!("{{ {point} }}, ")).collect::<String>();
    format!(
        "{SMALLEST}[[modbus]]\nname = \"l\"\ntransport = \"tcp\"\nhost = \"h\"\n{line}\n\
         [[modbus.unit]]\nname = \"u\"\nunit = 1\n{unit}\npoints = [{points}]\n"
    )
}

#[test]
fn the_innermost_setting_holds() {
    let config = good(&line(
        "every = \"2s\"\nqos = 2\nretain = true",
        "every = \"3s\"\ndeadband = \"2%\"",
        &[
            "name = \"a\", register = \"input\", address = 0, type = \"u16\"",
            "name = \"b\", register = \"input\", address = 1, type = \"u16\", every = \"4s\", deadband = 1",
        ],
    ));
    let [a, b] = config.points.as_slice() else { panic!("two points") };
    assert_eq!((a.every, b.every), (Duration::from_secs(3), Duration::from_secs(4)));
    assert_eq!((a.report.qos, a.report.retain, a.report.lane), (Qos::ExactlyOnce, true, Lane::Normal));
    assert_eq!((a.report.deadband, b.report.deadband), (Deadband::Percent(2.0), Deadband::Absolute(1.0)));
    assert_eq!(a.report.longest_silence, Duration::from_secs(600));
}

#[test]
fn a_wide_dead_band_of_the_unit_does_not_hide_a_bit() {
    let config = good(&line(
        "",
        "deadband = 5",
        &[
            "name = \"a\", register = \"coil\", address = 0",
            "name = \"b\", register = \"input\", address = 0, type = \"u16\"",
        ],
    ));
    assert_eq!(config.points[0].report.deadband, Deadband::Absolute(0.0));
    assert_eq!(config.points[1].report.deadband, Deadband::Absolute(5.0));
}

#[test]
fn the_manuals_numbering_names_the_register_type() {
    let config = good(&line(
        "",
        "",
        &["name = \"a\", address = \"40011\", type = \"u16\"", "name = \"b\", address = \"00001\""],
    ));
    assert_eq!((config.points[0].space, config.points[0].address), (Space::Holding, 10));
    assert_eq!((config.points[1].space, config.points[1].address), (Space::Coil, 0));
    assert_eq!(config.points[1].encoding.kind, Kind::Bool);
}

#[test]
fn one_commit_interval_is_for_all_lanes_and_a_table_for_each() {
    let ms = Duration::from_millis;
    let config = good(&format!("{SMALLEST}[store]\ncommit_interval = \"2s\"\n"));
    assert_eq!(config.store.commit_interval, [ms(2000); 3]);
    let config = good(&format!("{SMALLEST}[store.commit_interval]\nbulk = \"5s\"\n"));
    assert_eq!(config.store.commit_interval, [ms(0), ms(50), ms(5000)]);
}

#[test]
fn two_units_may_share_a_topic_published_in_one_way() {
    let shared = line("topic = \"site/values\"", "", &["name = \"a\", register = \"coil\", address = 0"]);
    let second =
        "[[modbus.unit]]\nname = \"u2\"\nunit = 2\npoints = [{ name = \"a\", address = \"00001\" }]\n";
    assert_eq!(good(&(shared.clone() + second)).points.len(), 2);
    let problems = bad(&(shared + &second.replace("unit = 2", "unit = 2\nqos = 2")));
    assert!(problems.to_string().contains("QoS 2"), "{problems}");
}

#[test]
fn ids_take_the_environment() {
    // Cargo sets this one for every test.
    let config = good(&SMALLEST.replace("\"gw\"", "\"${CARGO_PKG_NAME}-7\""));
    assert_eq!(config.gateway.id, "fieldpost-7");
    assert_eq!(config.broker.client_id, "fieldpost-7");
    let config = good(&SMALLEST.replace("\"gw\"", "\"x-{hostname}\""));
    assert!(config.gateway.id.len() > 2);
}

#[test]
fn relative_paths_start_from_the_file_that_names_them() {
    let text = format!("{SMALLEST}password_file = \"secret\"\n[store]\npath = \"data/outbox.db\"\n");
    let config = config::parse(Path::new("/etc/fieldpost/f.toml"), &text).unwrap_or_else(|p| panic!("{p}"));
    assert_eq!(config.broker.password_file.as_deref(), Some(Path::new("/etc/fieldpost/secret")));
    assert_eq!(config.store.path, Path::new("/etc/fieldpost/data/outbox.db"));
    assert_eq!(config.control.socket, Path::new("/etc/fieldpost/data/control.sock"));
}

/// A directory with a main file, and the files of its `conf.d`.
fn directory(main: &str, others: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("fieldpost.toml");
    fs::write(&path, main).expect("written");
    fs::create_dir(directory.path().join("conf.d")).expect("made");
    for (name, text) in others {
        fs::write(directory.path().join("conf.d").join(name), text).expect("written");
    }
    (directory, path)
}

/// The report without the directory that changes with every run.
fn report(directory: &tempfile::TempDir, path: &Path) -> String {
    let problems = config::load(path).expect_err("refused");
    problems.to_string().replace(&format!("{}/", directory.path().display()), "")
}

const TCP: &str = "[[modbus]]\nname = \"NAME\"\ntransport = \"tcp\"\nhost = \"h\"\n";

#[test]
fn files_of_conf_d_are_added_in_the_order_of_their_names() {
    let (_directory, path) = directory(
        &format!("{SMALLEST}{}", TCP.replace("NAME", "one")),
        &[
            ("20.toml", &TCP.replace("NAME", "three")),
            (
                "10.toml",
                &format!(
                    "[store]\nquota = \"2MiB\"\n[broker]\npassword_file = \"p\"\n{}",
                    TCP.replace("NAME", "two")
                ),
            ),
            ("30.toml.bak", "not read"),
        ],
    );
    let config = config::load(&path).unwrap_or_else(|problems| panic!("{problems}"));
    let names = config.modbus.iter().map(|line| &*line.name).collect::<Vec<_>>();
    assert_eq!(names, ["one", "two", "three"]);
    assert_eq!(config.store.quota, 2 << 20);
    let beside = path.with_file_name("conf.d").join("p");
    assert_eq!(config.broker.password_file, Some(beside));
}

#[test]
fn what_two_files_contradict_is_told_with_both_places() {
    let (directory, path) = directory(
        &format!("{SMALLEST}{}", TCP.replace("NAME", "one")),
        &[
            ("10.toml", "[gateway]\nid = \"other\"\n"),
            ("20.toml", &TCP.replace("NAME", "one")),
            ("30.toml", "[broker]\nkeep_alvie = \"30s\"\n"),
        ],
    );
    assert_eq!(
        report(&directory, &path),
        "conf.d/10.toml:2:1: `id` is given in two files; first at fieldpost.toml:2:1\n    id = \"other\"\n    ^^\n    \
         help: remove one of the two\n\n\
         conf.d/20.toml:2:8: two lines are named \"one\"; first at fieldpost.toml:6:8\n    name = \"one\"\n           \
         ^^^^^\n    help: names tell lines apart: choose another one\n\n\
         conf.d/30.toml:2:1: unknown key `keep_alvie` in [broker]\n    keep_alvie = \"30s\"\n    ^^^^^^^^^^\n    \
         help: did you mean `keep_alive`?\n\n3 problems in 3 files"
    );
}

#[test]
fn a_file_that_cannot_be_read_says_why_and_what_to_try() {
    let (directory, path) = directory(SMALLEST, &[]);
    let missing = report(&directory, &path.with_file_name("missing.toml"));
    assert!(missing.starts_with("missing.toml: cannot be read: No such file or directory"), "{missing}");
    assert!(missing.contains("\n    help: check the path"), "{missing}");
    assert!(missing.ends_with("\n\n1 problem in missing.toml"), "{missing}");
    let folder = config::load(directory.path()).expect_err("refused").to_string();
    assert!(
        folder.contains("cannot be read: Is a directory") && folder.contains("help: name a file"),
        "{folder}"
    );
    fs::write(&path, b"[gateway]\nid = \"gw\"\n# 20 \xb0C\n").expect("written");
    let latin1 = report(&directory, &path);
    assert!(latin1.starts_with("fieldpost.toml:3:6: the byte 0xb0 is not UTF-8"), "{latin1}");
    let endless = config::load(Path::new("/dev/zero")).expect_err("refused").to_string();
    assert!(endless.contains("larger than 16 MiB"), "{endless}");
}

#[test]
fn check_exits_with_78_on_a_bad_file_and_0_on_a_good_one() {
    let (_directory, path) = directory(SMALLEST, &[]);
    let check = || {
        emulator::command(env!("CARGO_BIN_EXE_fieldpost")).arg("check").arg(&path).output().expect("it runs")
    };
    let good = check();
    assert_eq!(good.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&good.stdout).contains("no problems"));
    fs::write(&path, "[gateway]\n").expect("written");
    let bad = check();
    assert_eq!(bad.status.code(), Some(78));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("fieldpost.toml:1:1"), "{bad:?}");
}

#[test]
fn a_byte_order_mark_and_windows_line_ends_are_no_problem() {
    good(&format!("\u{feff}{}", SMALLEST.replace('\n', "\r\n")));
}

/// What a slip of the hand does to a file.
#[derive(Debug, Clone)]
enum Slip {
    Remove(usize, usize),
    Insert(usize, String),
    Copy(usize, usize, usize),
}

fn slip() -> impl Strategy<Value = Slip> {
    let token = prop::sample::select(vec![
        "\"",
        "'",
        "[",
        "]",
        "[[",
        "{",
        "}",
        "=",
        ",",
        ".",
        "\n",
        "#",
        "0",
        "-1",
        "1e999",
        "nan",
        "true",
        "µ",
        "\u{0}",
        "\"\"\"",
        "\\",
        "${",
        "{hostname}",
        "modbus",
        "[gateway]",
        "[[modbus.unit]]",
        "points",
        "99999999999999999999",
        "1979-05-27",
        "\r",
        "\u{feff}",
        "\"40001\"",
        "\"2%\"",
        "\"1d\"",
    ]);
    prop_oneof![
        (any::<usize>(), 0..40_usize).prop_map(|(at, length)| Slip::Remove(at, length)),
        (any::<usize>(), token).prop_map(|(at, token)| Slip::Insert(at, token.to_owned())),
        (any::<usize>(), 0..200_usize, any::<usize>())
            .prop_map(|(from, length, to)| Slip::Copy(from, length, to)),
    ]
}

fn apply(slip: &Slip, text: &mut String) {
    let boundary = |text: &str, at: usize| {
        let at = at % (text.len() + 1);
        (at..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len())
    };
    let stretch = |text: &str, at: usize, length: usize| {
        let start = boundary(text, at);
        let end = (start + length).min(text.len());
        start..(end..=text.len()).find(|end| text.is_char_boundary(*end)).unwrap_or(text.len())
    };
    match slip {
        Slip::Remove(at, length) => {
            let range = stretch(text, *at, *length);
            text.replace_range(range, "");
        }
        Slip::Insert(at, token) => text.insert_str(boundary(text, *at), token),
        Slip::Copy(from, length, to) => {
            let copied = text[stretch(text, *from, *length)].to_owned();
            text.insert_str(boundary(text, *to), &copied);
        }
    }
}

/// A problem's place is in the file, and its report can be printed.
fn holds(text: &str) {
    let Err(problems) = parse(text) else { return };
    assert!(!problems.0.is_empty());
    let lines = text.split('\n').count();
    for problem in &problems.0 {
        let spot = problem.spot.as_ref().expect("the text could be read");
        assert!((1..=lines).contains(&spot.line) && spot.column >= 1, "{problem}");
        assert!(!problem.to_string().chars().any(|c| c.is_control() && c != '\n'), "{problem:?}");
    }
    assert!(problems.to_string().ends_with("in f.toml"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_slip_of_the_hand_panics(slips in prop::collection::vec(slip(), 1..8)) {
        let mut text = REFERENCE.lines().filter(|line| !line.starts_with("# ")).collect::<Vec<_>>().join("\n");
        for slip in &slips {
            apply(slip, &mut text);
        }
        holds(&text);
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        holds(&text);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        holds(&String::from_utf8_lossy(&bytes));
    }
}
