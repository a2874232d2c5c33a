//! Secrets stay where they were put: a canary as password and as key goes through the real agent, and is looked for
//! in everything that the agent says and writes. And what the agent makes is its own.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

mod support;

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use fieldpost::control::wire::LinkState;
use fieldpost::uplink::packet::{Connect, Packet};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use support::agent::{Agent, Config, fieldpost, queued};
use support::mosquitto::{Mosquitto, Options, Subscriber, Tls};

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(60);
/// All that we and the libraries have to say.
const EVERYTHING: &str = "trace,rustls=trace,tokio_rustls=trace,rumqttc=trace,mio=trace,tokio_util=trace,tokio_modbus=trace,mio_serial=trace";
/// Found nowhere by chance.
const CANARY: &str = "canary-Xq7-p4ssw0rd";
/// The same in the forms in which bytes are printed.
const CANARY_HEX: &str = "63616e6172792d5871372d7034737377307264";
const CANARY_BASE64: &str = "Y2FuYXJ5LVhxNy1wNHNzdzByZA";
const CANARY_NUMBERS: &str = "99, 97, 110, 97, 114, 121, 45, 88, 113, 55";

fn set_mode(file: &Path, mode: u32) {
    fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
}

fn contains(bytes: &[u8], needle: &str) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle.as_bytes())
}

/// Which of these secrets the bytes hold, in any form.
fn secrets_in<'a>(bytes: &[u8], secrets: &[&'a str]) -> Vec<&'a str> {
    secrets.iter().copied().filter(|secret| contains(bytes, secret)).collect()
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.is_file() {
            found.push(path);
        }
    }
    found
}

/// What it said, on both channels.
fn said(output: &Output) -> Vec<u8> {
    [&output.stdout[..], &output.stderr].concat()
}

/// A broker that wants TLS, a certificate and a password; files of both sides in the folder. Gives it, and the first
/// line of our private key, which is no less secret than a password.
fn strict_broker(dir: &Path) -> (Mosquitto, String) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(DnType::CommonName, "an authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, pem: String| {
        fs::write(dir.join(name), pem).unwrap();
        set_mode(&dir.join(name), 0o600);
    };
    write("ca.pem", issuer.pem());
    let mut secret = String::new();
    for name in ["broker", "ours"] {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        write(&format!("{name}.pem"), params.signed_by(&key, &issuer).unwrap().pem());
        secret = key.serialize_pem().lines().nth(1).unwrap().to_owned();
        write(&format!("{name}.key"), key.serialize_pem());
    }
    let (certificate, key) = (dir.join("broker.pem"), dir.join("broker.key"));
    let tls = Tls { certificate, key, client_authority: Some(dir.join("ca.pem")) };
    let users = vec![("gateway".to_owned(), CANARY.to_owned())];
    let options = Options { tls: Some(tls), users, unlimited: true, ..Options::default() };
    (Mosquitto::start(options), secret)
}

#[test]
fn a_password_and_a_key_are_found_nowhere_but_in_their_files() {
    let certificates = tempfile::tempdir().unwrap();
    let dir = certificates.path().display();
    let (broker, key) = strict_broker(certificates.path());
    let secrets = [CANARY, CANARY_HEX, CANARY_BASE64, CANARY_NUMBERS, &key];
    let config = Config::new(&broker.url())
        .with("gateway", "health_interval = \"10s\"")
        .with("broker", "username = \"gateway\"")
        .with("broker", "password_file = \"password\"")
        .with("broker", &format!("ca_file = \"{dir}/ca.pem\""))
        .with("broker", &format!("cert_file = \"{dir}/ours.pem\""))
        .with("broker", &format!("key_file = \"{dir}/ours.key\""));
    let tls = ["--cafile", "ca.pem", "--cert", "ours.pem", "--key", "ours.key"]
        .map(|word| if word.starts_with('-') { word.to_owned() } else { format!("{dir}/{word}") });
    let mut arguments: Vec<&str> = tls.iter().map(String::as_str).collect();
    arguments.extend(["-u", "gateway", "-P", CANARY]);
    let mut heard = Vec::new();
    for level in ["error", "warn", "info", "debug", "trace", EVERYTHING] {
        let mut agent = Agent::prepared(&config);
        agent.set_env("FIELDPOST_LOG", level);
        let password = agent.dir().join("password");
        // A wrong one first, which is as secret: it is somebody's.
        fs::write(&password, format!("{CANARY}-not\n")).unwrap();
        set_mode(&password, 0o600);
        agent.start_again();
        agent.accept("t", 2, ["a", "b"]);
        let status = agent.expect(PATIENCE, "refused", |status| status.link.last_error.is_some());
        let subscriber = Subscriber::start(broker.port(), "watch", "fieldpost/#", 3, &arguments);
        fs::write(&password, format!("{CANARY}\n")).unwrap();
        agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
        agent.expect_drained(PATIENCE);
        heard.extend(subscriber.finish());
        // The restart finds a damaged database and sets it aside.
        assert!(agent.terminate().success());
        let mut bytes = fs::read(agent.database()).unwrap();
        bytes[..100].fill(0);
        fs::write(agent.database(), bytes).unwrap();
        agent.start_again();
        agent.accept("t", 2, ["c"]);
        let config = agent.config_file().display().to_string();
        let mut all = format!("{status:?}").into_bytes();
        for arguments in [
            &["check", &config][..],
            &["status", "--config", &config, "--json"],
            &["status", "--config", &config],
        ] {
            all.extend(said(&fieldpost(arguments)));
        }
        assert_eq!(secrets_in(&all, &secrets), [""; 0], "{level}: {}", String::from_utf8_lossy(&all));
        let talks = ["debug", "trace", EVERYTHING].contains(&level);
        assert_eq!(agent.logged("DEBUG") > 0, talks, "the log level counts");
        assert_eq!(
            agent.logged("rustls::") > 0,
            level == EVERYTHING,
            "libraries are heard when they are named"
        );
        let mut seen = Vec::new();
        for file in files(agent.dir()).into_iter().filter(|file| *file != password) {
            assert_eq!(
                secrets_in(&fs::read(&file).unwrap(), &secrets),
                [""; 0],
                "{level}: {}",
                file.display()
            );
            seen.extend(file.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        for part in ["agent.log", "outbox.db", "outbox.db-wal", "corrupt-"] {
            assert!(seen.iter().any(|name| name.contains(part)), "{part} was looked at: {seen:?}");
        }
        // The negative control: where it is, it is found.
        assert_eq!(secrets_in(&fs::read(&password).unwrap(), &secrets), [CANARY]);
        assert!(agent.terminate().success());
    }
    assert_eq!(
        secrets_in(&fs::read(certificates.path().join("ours.key")).unwrap(), &secrets),
        [key.as_str()]
    );
    assert!(heard.iter().any(|line| line.contains("/health")) || heard.len() >= 15, "{heard:?}");
    assert_eq!(secrets_in(heard.join("\n").as_bytes(), &secrets), [""; 0]);
}

#[test]
fn a_secret_written_in_the_wrong_place_is_not_repeated() {
    let written = [
        format!("url = \"mqtt://gateway:{CANARY}@127.0.0.1\""),
        format!("url = \"mqtt://gateway:{CANARY}@\""),
        format!("url = \"http://gateway:{CANARY}@127.0.0.1:1883/x?y\""),
        format!("url = \"mqtt://127.0.0.1\"\npassword = \"{CANARY}\""),
        format!("url = \"mqtt://127.0.0.1\"\npasword = \"{CANARY}\""),
        format!("url = \"mqtt://127.0.0.1\"\npassword = {{ text = \"{CANARY}\" }}"),
    ];
    let secrets = [CANARY, CANARY_HEX, CANARY_BASE64, CANARY_NUMBERS];
    for text in written {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("fieldpost.toml");
        fs::write(
            &file,
            format!("[gateway]\nid = \"g1\"\n[broker]\n{text}\n[store]\npath = \"outbox.db\"\n"),
        )
        .unwrap();
        for command in ["check", "run"] {
            let output = fieldpost(&[command, &file.display().to_string()]);
            assert_eq!(output.status.code(), Some(78), "{text}");
            let all = said(&output);
            assert!(!all.is_empty());
            assert_eq!(secrets_in(&all, &secrets), [""; 0], "{text}\n{}", String::from_utf8_lossy(&all));
        }
    }
}

/// The agent starts with no umask at all, so that every mode is its own choice.
#[test]
fn everything_the_agent_makes_is_closed_to_others() {
    let broker = Mosquitto::start(Options::default());
    let config = Config::new(&broker.url())
        .with("store", "path = \"state/data/outbox.db\"")
        .with("control", "socket = \"state/control.sock\"");
    let mut agent = Agent::prepared(&config);
    let before = files(agent.dir());
    let state = agent.dir().join("state");
    agent.run_first("umask 0");
    agent.spawn();
    let socket = state.join("control.sock");
    let listens =
        || socket.exists() && agent.logged("is running") == 1 && agent.logged("connected to the broker") == 1;
    assert!(support::wait_until(PATIENCE, listens), "{}", agent.tail());
    assert!(agent.terminate().success());
    let database = state.join("data/outbox.db");
    let mut bytes = fs::read(&database).unwrap();
    bytes[..100].fill(0);
    fs::write(&database, bytes).unwrap();
    // As under a service manager; the group is let in all the same.
    agent.run_first("umask 077");
    agent.spawn();
    assert!(support::wait_until(PATIENCE, || agent.logged("is running") == 2), "{}", agent.tail());
    let mut made = Vec::new();
    let mut folders = vec![state];
    while let Some(folder) = folders.pop() {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o750, "{}", folder.display());
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            // Whoever is in the agent's group may ask it, and read none of its files.
            let expected = if entry.file_type().unwrap().is_socket() { 0o660 } else { 0o600 };
            assert_eq!(mode(&entry.path()), expected, "{name}");
            made.push(if entry.file_type().unwrap().is_socket() { format!("{name} (socket)") } else { name });
        }
    }
    made.sort();
    println!("{made:?}");
    for part in ["outbox.db", "outbox.db-wal", "outbox.db.reserve", "corrupt-", "(socket)"] {
        assert!(made.iter().any(|name| name.contains(part)), "{part} is not among {made:?}");
    }
    let outside: Vec<_> =
        files(agent.dir()).into_iter().filter(|file| !file.starts_with(agent.dir().join("state"))).collect();
    assert_eq!(outside.len(), before.len() + 1, "nothing else but the log, which the test made: {outside:?}");
}

#[test]
fn a_secret_that_everybody_may_read_is_refused_with_what_to_do() {
    let users = vec![("gateway".to_owned(), CANARY.to_owned())];
    let broker = Mosquitto::start(Options { users, unlimited: true, ..Options::default() });
    let config = Config::new(&broker.url())
        .with("broker", "username = \"gateway\"")
        .with("broker", "password_file = \"password\"");
    let mut agent = Agent::prepared(&config);
    let password = agent.dir().join("password");
    fs::write(&password, format!("{CANARY}\n")).unwrap();
    for mode in [0o644, 0o604, 0o602] {
        set_mode(&password, mode);
        for command in ["check", "run"] {
            let output = fieldpost(&[command, &agent.config_file().display().to_string()]);
            let words = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            assert_eq!(output.status.code(), Some(78), "{mode:o}: {words}");
            assert!(words.contains("chmod 640") && words.contains(&format!("mode {mode:03o}")), "{words}");
        }
    }
    // As systemd hands credentials out.
    for mode in [0o600, 0o400, 0o440, 0o640] {
        set_mode(&password, mode);
        let output = fieldpost(&["check", &agent.config_file().display().to_string()]);
        assert!(output.status.success(), "{mode:o}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // It is read at every connect, and so it is looked at then.
    agent.start_again();
    agent.expect(PATIENCE, "connected", |status| status.link.state == LinkState::Connected);
    set_mode(&password, 0o644);
    let socket = broker.port();
    agent.accept("t", 2, ["a"]);
    agent.expect_drained(PATIENCE);
    let mut broker = broker;
    broker.stop();
    broker.start_again();
    assert_eq!(broker.port(), socket);
    let refused = |error: &str| error.contains("chmod 640") && error.contains("password");
    let status =
        agent.expect(PATIENCE, "refused", |status| status.link.last_error.as_deref().is_some_and(refused));
    assert_ne!(status.link.state, LinkState::Connected);
    agent.accept("t", 2, ["b"]);
    assert_eq!(queued(&agent.status()), 1);
    set_mode(&password, 0o600);
    agent.expect_drained(PATIENCE);
}

/// What a panic or a log would print of it.
#[test]
fn a_connect_packet_prints_itself_without_its_password() {
    let connect = Connect {
        client_id: "g1".into(),
        clean: false,
        keep_alive_s: 30,
        session_expiry_s: 60,
        receive_max: 20,
        max_packet_bytes: 65_536,
        will: None,
        username: Some("gateway".into()),
        password: Some(CANARY.into()),
    };
    let packet = Packet::Connect(Box::new(connect));
    let printed = format!("{packet:?} {packet:#?}");
    assert!(printed.contains("gateway"), "{printed}");
    assert_eq!(secrets_in(printed.as_bytes(), &[CANARY, CANARY_HEX, CANARY_BASE64, CANARY_NUMBERS]), [""; 0]);
}
