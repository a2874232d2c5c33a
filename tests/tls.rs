//! Opening streams: certificates good and bad, made here, against a TLS server here and a real mosquitto.

#![allow(clippy::unwrap_used)] // also in the helpers of tests, where Clippy does not expect it

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fieldpost::message::{PacketId, Qos, Topic};
use fieldpost::stats::Stats;
use fieldpost::uplink::link::{ConnectError, Endpoint, Link, LinkError, Stage, Stream, open};
use fieldpost::uplink::packet::{Connect, Limits, Packet, Protocol, Publish, ReasonCode, Subscription};
use fieldpost::uplink::tls::{Client, Settings, SetupError};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// An authority, and a directory for files.
struct Authority {
    directory: TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate's file and its key's.
#[derive(Clone)]
struct Identity {
    cert: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        Authority { directory, issuer }
    }

    fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, "broker");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let number = fs::read_dir(self.directory.path()).unwrap().count();
        let file = |kind: &str| self.directory.path().join(format!("{number}.{kind}"));
        let identity = Identity { cert: file("crt"), key: file("key") };
        fs::write(&identity.cert, certificate.pem()).unwrap();
        fs::write(&identity.key, key.serialize_pem()).unwrap();
        fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o600)).unwrap();
        identity
    }

    fn trusting(&self) -> Settings {
        Settings { ca_file: Some(self.ca_file()), ..Settings::default() }
    }

    /// A server that shows `identity`, and asks for a certificate of ours if `ask`.
    fn server(&self, identity: &Identity, ask: bool, alpn: &[&str], tls12: bool) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = if tls12 { &[&rustls::version::TLS12][..] } else { rustls::DEFAULT_VERSIONS };
        let builder =
            ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions).unwrap();
        let builder = match ask {
            false => builder.with_no_client_auth(),
            true => {
                let mut roots = RootCertStore::empty();
                roots.add(self.issuer.as_ref().der().clone()).unwrap();
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
                builder.with_client_cert_verifier(verifier)
            }
        };
        let chain = CertificateDer::pem_file_iter(&identity.cert).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
        let mut config = builder.with_single_cert(chain, key).unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

/// What the server saw of one connection: the handshake's error, or the first application bytes.
type Seen = JoinHandle<Result<Vec<u8>, String>>;

/// Serves one connection; a CONNECT is answered with a PINGRESP, to have an answer.
async fn serve(config: Arc<ServerConfig>) -> (SocketAddr, Seen) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(config).accept(tcp).await.map_err(|error| error.to_string())?;
        let mut received = vec![0; 1024];
        let length = tls.read(&mut received).await.unwrap_or(0);
        received.truncate(length);
        if length > 0 {
            tls.write_all(&[0xD0, 0x00]).await.unwrap();
            tls.flush().await.unwrap();
            let mut rest = Vec::new();
            let _ = tls.read_to_end(&mut rest).await;
        }
        Ok(received)
    });
    (address, seen)
}

fn connect_packet(client_id: &str) -> Packet {
    Packet::Connect(Box::new(Connect {
        client_id: client_id.into(),
        clean: false,
        keep_alive_s: 30,
        session_expiry_s: 60,
        receive_max: 20,
        max_packet_bytes: 65_536,
        will: None,
        username: Some("user".into()),
        password: Some("a secret".into()),
    }))
}

/// Connects as the uplink does: opens, and sends CONNECT at once.
async fn connect(
    host: &str,
    port: u16,
    tls: Option<&Client>,
    protocol: Protocol,
) -> Result<Link<Stream>, ConnectError> {
    let timeout = Duration::from_secs(10);
    let endpoint = Endpoint { host, port, tls, timeout, user_timeout: timeout, stats: &Arc::default() };
    let mut link = Link::new(open(&endpoint).await?, protocol, 65_536);
    link.queue(&connect_packet("gw")).unwrap();
    link.flush().await.unwrap();
    Ok(link)
}

async fn next(link: &mut Link<Stream>) -> Result<Packet, LinkError> {
    tokio::time::timeout(Duration::from_secs(10), link.next()).await.expect("an answer in time")
}

#[tokio::test]
async fn a_good_certificate_is_accepted_by_name_and_by_address() {
    let authority = Authority::new("good");
    let identity = authority.issue(&["localhost", "127.0.0.1"], |_| {});
    for host in ["localhost", "127.0.0.1"] {
        let (address, seen) = serve(authority.server(&identity, false, &[], false)).await;
        let client = Client::new(&authority.trusting(), host).unwrap();
        let mut link = connect(host, address.port(), Some(&client), Protocol::V5).await.unwrap();
        assert!(matches!(next(&mut link).await, Ok(Packet::PingResp)));
        drop(link);
        assert_eq!(seen.await.unwrap().unwrap()[0], 0x10);
    }
}

#[tokio::test]
async fn every_byte_on_the_wire_is_counted_the_handshake_too() {
    let authority = Authority::new("metered");
    let identity = authority.issue(&["localhost"], |_| {});
    let (address, seen) = serve(authority.server(&identity, false, &[], false)).await;
    let client = Client::new(&authority.trusting(), "localhost").unwrap();
    let stats = Arc::<Stats>::default();
    let timeout = Duration::from_secs(10);
    let endpoint = Endpoint {
        host: "localhost",
        port: address.port(),
        tls: Some(&client),
        timeout,
        user_timeout: timeout,
        stats: &stats,
    };
    let mut link = Link::new(open(&endpoint).await.unwrap(), Protocol::V5, 65_536);
    let (sent, received) = (stats.link_bytes_sent.get(), stats.link_bytes_received.get());
    assert!(sent > 200 && received > 500, "a handshake is {sent} bytes up and {received} down");
    let packet = connect_packet("gw");
    let bytes = link.encoded_len(&packet).unwrap() as u64;
    link.queue(&packet).unwrap();
    link.flush().await.unwrap();
    assert!(matches!(next(&mut link).await, Ok(Packet::PingResp)));
    let sent = stats.link_bytes_sent.get() - sent;
    assert!((bytes + 1..bytes + 200).contains(&sent), "{bytes} bytes of MQTT were {sent} on the wire");
    assert!(stats.link_bytes_received.get() > received);
    drop(link);
    seen.await.unwrap().unwrap();
}

/// With this certificate the stream is refused, for this reason, and the broker sees no byte of MQTT.
async fn check_refused(authority: &Authority, settings: &Settings, identity: &Identity, expected: &str) {
    for tls12 in [false, true] {
        let (address, seen) = serve(authority.server(identity, false, &[], tls12)).await;
        let client = Client::new(settings, "localhost").unwrap();
        let refused = connect("localhost", address.port(), Some(&client), Protocol::V311).await;
        let error = refused.err().expect("the certificate must be refused");
        assert!(matches!(error, ConnectError::Tls { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains(&format!("localhost:{}", address.port())), "{error}");
        let seen = seen.await.unwrap();
        assert!(seen.as_ref().is_err_and(|alert| alert.contains("alert")), "the broker saw {seen:?}");
    }
}

#[tokio::test]
async fn a_certificate_for_another_name_gets_no_connect() {
    let authority = Authority::new("names");
    let identity = authority.issue(&["broker.example", "10.1.2.3"], |_| {});
    let expected =
        "is for broker.example, 10.1.2.3, not for localhost: connect by that name, or set server_name";
    check_refused(&authority, &authority.trusting(), &identity, expected).await;
    let nameless = authority.issue(&[], |_| {});
    check_refused(&authority, &authority.trusting(), &nameless, "names no host in its subjectAltName").await;
}

#[tokio::test]
async fn the_name_to_expect_can_be_set() {
    let authority = Authority::new("names");
    let identity = authority.issue(&["broker.example"], |_| {});
    let (address, _seen) = serve(authority.server(&identity, false, &[], false)).await;
    let settings = Settings { server_name: Some("broker.example".into()), ..authority.trusting() };
    let client = Client::new(&settings, "127.0.0.1").unwrap();
    let mut link = connect("127.0.0.1", address.port(), Some(&client), Protocol::V5).await.unwrap();
    assert!(matches!(next(&mut link).await, Ok(Packet::PingResp)));
}

#[tokio::test]
async fn an_expired_certificate_gets_no_connect() {
    let authority = Authority::new("expired");
    let identity = authority.issue(&["localhost"], |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    check_refused(&authority, &authority.trusting(), &identity, "expired on 2002-01-01T00:00:00Z").await;
}

#[tokio::test]
async fn a_certificate_not_yet_valid_gets_no_connect_and_points_at_the_clock() {
    let authority = Authority::new("future");
    let identity = authority.issue(&["localhost"], |params| {
        params.not_before = date_time_ymd(2200, 1, 1);
        params.not_after = date_time_ymd(2201, 1, 1);
    });
    let settings = authority.trusting();
    check_refused(&authority, &settings, &identity, "not valid before 2200-01-01T00:00:00Z").await;
    check_refused(&authority, &settings, &identity, "check the clock").await;
}

#[tokio::test]
async fn a_certificate_of_an_unknown_authority_gets_no_connect() {
    let (theirs, ours) = (Authority::new("theirs"), Authority::new("ours"));
    let identity = theirs.issue(&["localhost"], |_| {});
    let expected = format!("not issued by any of {}", ours.ca_file().display());
    check_refused(&theirs, &ours.trusting(), &identity, &expected).await;
    check_refused(&theirs, &ours.trusting(), &identity, "set ca_file").await;
}

#[tokio::test]
async fn a_certificate_of_an_authority_made_anew_gets_no_connect() {
    let (theirs, ours) = (Authority::new("same"), Authority::new("same"));
    let identity = theirs.issue(&["localhost"], |_| {});
    check_refused(&theirs, &ours.trusting(), &identity, "was the authority made anew?").await;
}

#[tokio::test]
async fn an_authoritys_certificate_is_no_brokers() {
    let authority = Authority::new("root");
    let identity =
        authority.issue(&["localhost"], |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    check_refused(&authority, &authority.trusting(), &identity, "without CA:TRUE").await;
}

#[tokio::test]
async fn a_broker_that_wants_a_certificate_gets_ours_or_says_so() {
    let authority = Authority::new("mutual");
    let server = authority.issue(&["localhost"], |_| {});
    let device = authority.issue(&["gw"], |_| {});
    let with = Settings {
        cert_file: Some(device.cert.clone()),
        key_file: Some(device.key.clone()),
        ..authority.trusting()
    };
    for tls12 in [false, true] {
        let config = authority.server(&server, true, &[], tls12);

        let (address, _seen) = serve(config.clone()).await;
        let client = Client::new(&with, "localhost").unwrap();
        let mut link = connect("localhost", address.port(), Some(&client), Protocol::V5).await.unwrap();
        assert!(matches!(next(&mut link).await, Ok(Packet::PingResp)));

        let (address, seen) = serve(config).await;
        let client = Client::new(&authority.trusting(), "localhost").unwrap();
        let timeout = Duration::from_secs(10);
        let endpoint = Endpoint {
            host: "localhost",
            port: address.port(),
            tls: Some(&client),
            timeout,
            user_timeout: timeout,
            stats: &Arc::default(),
        };
        // With TLS 1.3 the server's refusal comes after the handshake.
        let error = match open(&endpoint).await {
            Err(error) => error.to_string(),
            Ok(stream) => next(&mut Link::new(stream, Protocol::V5, 65_536)).await.err().unwrap().to_string(),
        };
        assert!(error.contains("client certificate"), "{error}");
        assert!(error.contains("cert_file"), "{error}");
        assert!(seen.await.unwrap().is_err());
    }
}

#[tokio::test]
async fn application_protocols_are_offered() {
    let authority = Authority::new("alpn");
    let identity = authority.issue(&["localhost"], |_| {});
    let settings = Settings { alpn: vec!["mqtt".into()], ..authority.trusting() };
    let client = Client::new(&settings, "localhost").unwrap();

    let (address, _seen) = serve(authority.server(&identity, false, &["mqtt"], false)).await;
    connect("localhost", address.port(), Some(&client), Protocol::V5).await.unwrap();

    let (address, _seen) = serve(authority.server(&identity, false, &["h2"], false)).await;
    let error = connect("localhost", address.port(), Some(&client), Protocol::V5).await.err().unwrap();
    assert!(error.to_string().contains("check alpn"), "{error}");
}

/// A TCP server that answers the first bytes it gets with `answer` and hangs up, or says nothing at all.
async fn plain_server(answer: Option<&'static [u8]>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut request = [0; 4096];
        let _ = tcp.read(&mut request).await;
        match answer {
            Some(answer) => tcp.write_all(answer).await.unwrap(),
            None => std::future::pending().await,
        }
        tcp.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = tcp.read_to_end(&mut rest).await;
    });
    address
}

#[tokio::test]
async fn a_port_without_tls_is_named_as_such() {
    let authority = Authority::new("plain");
    let client = Client::new(&authority.trusting(), "127.0.0.1").unwrap();
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0x20, 0x02, 0x00, 0x01, 0x00, 0x00], b""] {
        let address = plain_server(Some(answer)).await;
        let error = connect("127.0.0.1", address.port(), Some(&client), Protocol::V5).await.err().unwrap();
        assert!(error.to_string().contains("TLS port?"), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_no_more_than_the_time_allowed() {
    let authority = Authority::new("mute");
    let client = Client::new(&authority.trusting(), "127.0.0.1").unwrap();
    let address = plain_server(None).await;
    let endpoint = Endpoint {
        host: "127.0.0.1",
        port: address.port(),
        tls: Some(&client),
        timeout: Duration::from_millis(300),
        user_timeout: Duration::from_secs(1),
        stats: &Arc::default(),
    };
    let error = open(&endpoint).await.err().unwrap();
    assert!(matches!(error, ConnectError::TimedOut { stage: Stage::Handshake, .. }), "{error}");
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_named_with_its_address() {
    let port = free_port();
    let error = connect("127.0.0.1", port, None, Protocol::V5).await.err().unwrap();
    let text = error.to_string();
    assert!(text.starts_with(&format!("cannot connect to 127.0.0.1:{port}: Connection refused")), "{text}");
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_named() {
    let error = connect("no-such-broker.invalid", 1883, None, Protocol::V5).await.err().unwrap();
    assert!(error.to_string().contains("no-such-broker.invalid"), "{error}");
}

fn check_setup(settings: &Settings, host: &str, expected: &str) {
    let error = Client::new(settings, host).err().expect("these settings are wrong").to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn settings_that_cannot_work_say_which_file_and_why() {
    let authority = Authority::new("setup");
    let directory = authority.directory.path();
    let (one, two) = (authority.issue(&["a"], |_| {}), authority.issue(&["b"], |_| {}));
    let write = |name: &str, text: &str| {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let ca = |path: &Path| Settings { ca_file: Some(path.to_owned()), ..Settings::default() };
    let pair = |cert: &Path, key: &Path| Settings {
        cert_file: Some(cert.to_owned()),
        key_file: Some(key.to_owned()),
        ..authority.trusting()
    };

    check_setup(&ca(&directory.join("missing")), "h", "missing: No such file or directory");
    check_setup(&ca(&write("empty", "")), "h", "empty: it holds no certificate in PEM form");
    check_setup(&ca(&one.key), "h", "it holds no certificate in PEM form");
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    check_setup(&ca(&write("broken", broken)), "h", "its certificate number 1 cannot be used");
    check_setup(&ca(&write("cut", "-----BEGIN CERTIFICATE-----\nAAAA\n")), "h", "cut: it is not a PEM file");

    check_setup(&pair(&one.cert, &two.key), "h", "cert_file and key_file cannot be used");
    check_setup(&pair(&one.cert, &write("no.key", "")), "h", "it holds no private key");
    let half = Settings { cert_file: Some(one.cert.clone()), ..authority.trusting() };
    check_setup(&half, "h", "only cert_file is set");
    let half = Settings { key_file: Some(one.key.clone()), ..authority.trusting() };
    check_setup(&half, "h", "only key_file is set");
    check_setup(&authority.trusting(), "not a host", "\"not a host\" is neither a host name nor an address");

    fs::set_permissions(&one.key, fs::Permissions::from_mode(0o644)).unwrap();
    let readable = Client::new(&pair(&one.cert, &one.key), "h").err().unwrap();
    assert!(matches!(&readable, SetupError::KeyReadable { mode: 0o644, .. }), "{readable}");
    assert!(readable.to_string().contains("chmod 640"), "{readable}");
    fs::set_permissions(&one.key, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(Client::new(&pair(&one.cert, &one.key), "h").is_ok());
}

#[test]
fn without_a_ca_file_the_systems_authorities_are_used_or_missed() {
    match Client::new(&Settings::default(), "localhost") {
        Ok(_) => {}
        Err(error) => assert!(error.to_string().contains("apt install ca-certificates"), "{error}"),
    }
}

#[tokio::test]
async fn the_socket_is_set_up_for_slow_and_dying_links() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint {
        host: "localhost",
        port: listener.local_addr().unwrap().port(),
        tls: None,
        timeout: Duration::from_secs(10),
        user_timeout: Duration::from_secs(30),
        stats: &Arc::default(),
    };
    let Stream::Left(tcp) = open(&endpoint).await.unwrap() else { panic!("TLS was not asked for") };
    assert!(tcp.tcp().nodelay().unwrap());
    let socket = socket2::SockRef::from(tcp.tcp());
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
    assert!(socket.tcp_notsent_lowat().unwrap() <= 64 * 1024);
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A real mosquitto with TLS, which ends with the value.
async fn mosquitto(authority: &Authority, identity: &Identity) -> (u16, tokio::process::Child) {
    let port = free_port();
    let directory = authority.directory.path();
    let config = format!(
        "listener {port} 127.0.0.1\nuser root\nallow_anonymous true\nmax_packet_size 100000\n\
         max_keepalive 20\ncafile {}\ncertfile {}\nkeyfile {}\nlog_dest file {}\n",
        authority.ca_file().display(),
        identity.cert.display(),
        identity.key.display(),
        directory.join("log").display()
    );
    fs::write(directory.join("mosquitto.conf"), config).unwrap();
    // Debian has it in a directory that is not on everyone's path.
    let path = format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap_or_default());
    let child = tokio::process::Command::new("mosquitto")
        .env("PATH", path)
        .arg("-c")
        .arg(directory.join("mosquitto.conf"))
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("mosquitto is needed for this test: `apt install mosquitto`");
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "mosquitto does not listen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    (port, child)
}

#[tokio::test]
async fn a_real_mosquitto_with_tls_takes_a_message_in_both_versions() {
    let authority = Authority::new("mosquitto");
    let identity = authority.issue(&["localhost"], |_| {});
    let (port, _mosquitto) = mosquitto(&authority, &identity).await;
    let client = Client::new(&authority.trusting(), "localhost").unwrap();
    for protocol in [Protocol::V311, Protocol::V5] {
        let mut link = connect("localhost", port, Some(&client), protocol).await.unwrap();
        let Ok(Packet::ConnAck(ack)) = next(&mut link).await else { panic!("no CONNACK") };
        // The second connection finds the session of the first.
        assert_eq!((ack.reason, ack.session_present), (ReasonCode::SUCCESS, protocol == Protocol::V5));
        let limits = match protocol {
            Protocol::V311 => Limits::default(),
            Protocol::V5 => Limits {
                receive_max: Some(20),
                max_packet_bytes: Some(100_000),
                keep_alive_s: Some(20),
                ..Limits::default()
            },
        };
        assert_eq!(ack.limits, limits);
        let id = PacketId::new(1024).unwrap();
        let publish = Publish {
            dup: false,
            qos: Qos::AtLeastOnce,
            retain: true,
            topic: Topic::new("a/b").unwrap(),
            id: Some(id),
            payload: Bytes::from(vec![b'x'; 50_000]),
            message_expiry_s: Some(60),
            response_topic: Some("r".into()),
            correlation_data: Some(Bytes::from_static(b"cd")),
        };
        link.queue(&Packet::Publish(Box::new(publish.clone()))).unwrap();
        let expected = match protocol {
            Protocol::V311 => ReasonCode::SUCCESS,
            Protocol::V5 => ReasonCode::NO_MATCHING_SUBSCRIBERS,
        };
        assert!(matches!(next(&mut link).await, Ok(Packet::PubAck(acked, code))
            if acked == id && code == expected));

        link.queue(&Packet::Subscribe(
            id,
            vec![Subscription { filter: "a/#".into(), qos: Qos::ExactlyOnce, retained: true }],
        ))
        .unwrap();
        assert!(matches!(next(&mut link).await, Ok(Packet::SubAck(_, codes)) if codes == [ReasonCode(2)]));
        let Ok(Packet::Publish(echo)) = next(&mut link).await else { panic!("no retained message") };
        assert_eq!((&echo.topic, &echo.payload, echo.retain), (&publish.topic, &publish.payload, true));
        let asked = protocol == Protocol::V5;
        assert_eq!(echo.response_topic.is_some(), asked);
        assert_eq!(echo.correlation_data.is_some(), asked);
        link.queue(&Packet::PubAck(echo.id.unwrap(), ReasonCode::SUCCESS)).unwrap();
        link.queue(&Packet::Unsubscribe(id, vec!["a/#".into()])).unwrap();
        assert!(matches!(next(&mut link).await, Ok(Packet::UnsubAck(..))));
        link.queue(&Packet::PingReq).unwrap();
        assert!(matches!(next(&mut link).await, Ok(Packet::PingResp)));
        link.queue(&Packet::Disconnect(ReasonCode::SUCCESS)).unwrap();
        tokio::time::timeout(Duration::from_secs(10), link.close()).await.unwrap().unwrap();
    }
}
