//! Certificates to a rustls configuration, and rustls' errors to words for people.
//!
//! Invariant: the broker's certificate is always verified. There is no switch that turns it off, and a clock
//! that is wrong only means that we try again.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{AlertDescription, CertificateError, ClientConfig, Error, RootCertStore};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::clock;
use crate::secret::{self, Unusable};
use crate::uplink::link::Metered;

/// Encrypted bytes rustls may hold unsent. Small, for the same reason as the kernel's limit in `link`: what
/// hides there makes a stalled link look alive.
const TLS_BUFFER: usize = 16 * 1024;

/// How the broker proves who it is, and we who we are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// PEM file of certificate authorities; `None` takes the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM file with our certificate chain. Always together with `key_file`.
    pub cert_file: Option<PathBuf>,
    /// PEM file with our private key; others must not be able to read it.
    pub key_file: Option<PathBuf>,
    /// The name the certificate must carry. Default: the host.
    pub server_name: Option<String>,
    /// Application protocols offered (ALPN).
    pub alpn: Vec<String>,
}

/// Why the settings make no TLS client.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A PEM file cannot be read or understood.
    #[error("{what} {}: {why}", .path.display())]
    File {
        /// Which setting named it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The private key is readable by everyone on the gateway.
    #[error(
        "key_file {path} can be read by every user of this machine (mode {mode:03o}): \
         run `chmod 640 {path}`, and give the file to the user fieldpost runs as",
        path = .path.display()
    )]
    KeyReadable {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Only one of the two was given.
    #[error("cert_file and key_file belong together: only {given} is set")]
    Half {
        /// The one that is set.
        given: &'static str,
    },
    /// The system has no certificate authorities.
    #[error(
        "this system has no certificate authorities{}: install them (Debian: `apt install ca-certificates`), \
         or set ca_file",
        .errors
    )]
    NoSystemRoots {
        /// What went wrong on the way, if anything did.
        errors: String,
    },
    /// The name the certificate must carry is neither a host name nor an address.
    #[error(
        "{name:?} is neither a host name nor an address, so no certificate can carry it; set server_name"
    )]
    Name {
        /// That name.
        name: String,
    },
    /// rustls refuses the certificate and key.
    #[error("cert_file and key_file cannot be used: {0}")]
    Identity(#[source] Error),
    /// rustls refuses to be configured.
    #[error("TLS cannot be set up: {0}")]
    Library(#[source] Error),
}

/// What is needed to open TLS connections to one broker. Keep it as long as the files have not changed: it
/// remembers sessions, which makes the next handshake shorter.
#[derive(Clone)]
pub struct Client {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    /// Where the authorities come from, for messages.
    authorities: String,
    unusable: Option<String>,
}

/// The time by which certificates are judged: that of [`clock::wall_ms`], which every 32-bit system has past 2038.
#[derive(Debug)]
struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        let since = Duration::from_millis(u64::try_from(clock::wall_ms()).ok()?);
        Some(UnixTime::since_unix_epoch(since))
    }
}

impl Client {
    /// Reads the files. `host` is the name expected in the certificate unless the settings say another.
    ///
    /// # Errors
    /// What is wrong with which file, and what to do about it.
    pub fn new(settings: &Settings, host: &str) -> Result<Self, SetupError> {
        let expected = settings.server_name.as_deref().unwrap_or(host);
        let name = ServerName::try_from(expected.to_owned())
            .map_err(|_| SetupError::Name { name: expected.to_owned() })?;
        let ((roots, unusable), authorities) = match &settings.ca_file {
            Some(path) => ((roots_from(path)?, None), path.display().to_string()),
            None => (system_roots()?, "this system's certificate authorities".to_owned()),
        };
        // Named, not the process-wide default: another crate could set that one.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_details(provider, Arc::new(WallClock))
            .with_safe_default_protocol_versions()
            .map_err(SetupError::Library)?
            .with_root_certificates(roots);
        let mut config = match identity(settings)? {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => builder.with_client_auth_cert(chain, key).map_err(SetupError::Identity)?,
        };
        config.alpn_protocols = settings.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        Ok(Client { config: Arc::new(config), name, authorities, unusable })
    }

    /// Which of the system's authorities cannot be used, in words; `None`: all can.
    pub fn unusable(&self) -> Option<&str> {
        self.unusable.as_deref()
    }

    /// The handshake over a connected socket.
    pub(super) async fn connect(&self, tcp: Metered) -> io::Result<TlsStream<Metered>> {
        TlsConnector::from(self.config.clone())
            .connect_with(self.name.clone(), tcp, |session| session.set_buffer_limit(Some(TLS_BUFFER)))
            .await
    }

    /// Why [`Client::connect`] failed, and what to try.
    pub(super) fn explain(&self, error: &io::Error) -> String {
        match rustls_error(error) {
            Some(error) => explain(error, &self.authorities),
            None if error.kind() == io::ErrorKind::UnexpectedEof => {
                "the broker closed the connection instead of answering: is this its TLS port?".to_owned()
            }
            None => error.to_string(),
        }
    }
}

/// The words for an error on an established stream, if it is one of TLS's.
pub(super) fn explain_io(error: &io::Error) -> Option<String> {
    rustls_error(error).map(|error| explain(error, "the known authorities"))
}

fn rustls_error(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref::<Error>()
}

fn explain(error: &Error, authorities: &str) -> String {
    match error {
        Error::InvalidCertificate(why) => explain_certificate(why, authorities),
        Error::AlertReceived(alert) => explain_alert(*alert),
        Error::InvalidMessage(_) => "the answer is not TLS: is this the broker's TLS port?".to_owned(),
        Error::PeerIncompatible(why) => {
            format!(
                "the broker and fieldpost have no TLS version or cipher in common ({why:?}): it needs TLS 1.2"
            )
        }
        Error::NoApplicationProtocol => NO_PROTOCOL.to_owned(),
        other => other.to_string(),
    }
}

const NO_PROTOCOL: &str = "the broker accepts none of the application protocols offered: check alpn";

fn explain_certificate(why: &CertificateError, authorities: &str) -> String {
    match why {
        CertificateError::ExpiredContext { time, not_after } => format!(
            "the broker's certificate expired on {}, and the clock here says {}: renew the certificate, or set \
             the clock",
            when(*not_after),
            when(*time)
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "the broker's certificate is not valid before {}, and the clock here says {}: check the clock \
             (`timedatectl`); fieldpost keeps trying",
            when(*not_before),
            when(*time)
        ),
        CertificateError::Expired => "the broker's certificate has expired; check the clock too".to_owned(),
        CertificateError::NotValidYet => "the broker's certificate is not valid yet: check the clock".to_owned(),
        CertificateError::UnknownIssuer => format!(
            "the broker's certificate was not issued by any of {authorities}: put the certificate of its \
             authority into a PEM file and set ca_file to it"
        ),
        CertificateError::BadSignature => format!(
            "an authority in {authorities} has the name of the one that issued the broker's certificate, but \
             another key: was the authority made anew? Set ca_file to the present one"
        ),
        CertificateError::NotValidForNameContext { expected, presented } => wrong_name(expected, presented),
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => {
            "the broker presents an authority's certificate as its own (CA:TRUE): have the authority issue a \
             certificate for the broker, without CA:TRUE"
                .to_owned()
        }
        CertificateError::Other(other) if other.to_string().contains("UnsupportedCertVersion") => {
            "the broker's certificate is of X.509 version 1, which names no host: issue it anew as version 3, \
             with a subjectAltName"
                .to_owned()
        }
        other => format!("the broker's certificate cannot be accepted: {other}"),
    }
}

fn wrong_name(expected: &ServerName<'_>, presented: &[String]) -> String {
    let expected = expected.to_str();
    if presented.is_empty() {
        return format!(
            "the broker's certificate names no host in its subjectAltName (a common name does not count), and \
             must name {expected}"
        );
    }
    // rustls writes `DnsName("broker.example")` and `IpAddress(10.1.2.3)`.
    let bare = |name: &String| name.split(['(', ')']).nth(1).unwrap_or(name).trim_matches('"').to_owned();
    let names: Vec<_> = presented.iter().map(bare).collect();
    format!(
        "the broker's certificate is for {}, not for {expected}: connect by that name, or set server_name",
        names.join(", ")
    )
}

fn explain_alert(alert: AlertDescription) -> String {
    use AlertDescription as Alert;
    let text = match alert {
        Alert::CertificateRequired | Alert::NoCertificate => {
            "the broker wants a client certificate: set cert_file and key_file"
        }
        Alert::UnknownCA => "the broker does not know the authority that issued our certificate (cert_file)",
        Alert::CertificateExpired => "the broker says that our certificate (cert_file) has expired",
        Alert::CertificateRevoked => "the broker says that our certificate (cert_file) was revoked",
        Alert::BadCertificate | Alert::UnsupportedCertificate | Alert::CertificateUnknown => {
            "the broker does not accept our certificate (cert_file)"
        }
        Alert::AccessDenied => "the broker denies access to our certificate (cert_file)",
        Alert::HandshakeFailure => {
            "the broker refused the handshake: it may want a client certificate (cert_file, key_file), or have \
             no cipher in common"
        }
        Alert::ProtocolVersion => "the broker refused our TLS version: it needs TLS 1.2",
        Alert::UnrecognisedName => "the broker does not know the name we asked for: check server_name",
        Alert::NoApplicationProtocol => NO_PROTOCOL,
        other => return format!("the broker ended TLS with the alert {other:?}"),
    };
    text.to_owned()
}

fn when(time: UnixTime) -> String {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_second(seconds) {
        Ok(timestamp) => timestamp.to_string(),
        Err(_) => format!("second {seconds} of Unix time"),
    }
}

fn roots_from(path: &Path) -> Result<RootCertStore, SetupError> {
    let what = "ca_file";
    let mut roots = RootCertStore::empty();
    for (at, certificate) in certificates(what, path)?.into_iter().enumerate() {
        roots.add(certificate).map_err(|error| {
            let why = format!("its certificate number {} cannot be used: {error}", at + 1);
            SetupError::File { what, path: path.to_owned(), why }
        })?;
    }
    Ok(roots)
}

/// One damaged file among the system's must not keep the others from being used. Which ones cannot be, in words.
fn system_roots() -> Result<(RootCertStore, Option<String>), SetupError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (used, skipped) = roots.add_parsable_certificates(found.certs);
    let errors = found.errors.first().map_or_else(String::new, |error| format!(" ({error})"));
    if roots.is_empty() {
        return Err(SetupError::NoSystemRoots { errors });
    }
    let unusable = (skipped > 0 || !found.errors.is_empty()).then(|| {
        format!("{skipped} of this system's certificate authorities cannot be used, {used} can{errors}")
    });
    Ok((roots, unusable))
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(settings: &Settings) -> Result<Option<Identity>, SetupError> {
    match (&settings.cert_file, &settings.key_file) {
        (None, None) => Ok(None),
        (Some(_), None) => Err(SetupError::Half { given: "cert_file" }),
        (None, Some(_)) => Err(SetupError::Half { given: "key_file" }),
        (Some(cert), Some(key)) => Ok(Some((certificates("cert_file", cert)?, private_key(key)?))),
    }
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let wrong =
        |error| SetupError::File { what, path: path.to_owned(), why: pem_words(&error, "certificate") };
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if certificates.is_empty() { Err(wrong(pem::Error::NoItemsFound)) } else { Ok(certificates) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, SetupError> {
    let wrong = |why: String| SetupError::File { what: "key_file", path: path.to_owned(), why };
    let mut file = secret::open(path).map_err(|error| match error {
        Unusable::Io(error) => wrong(error.to_string()),
        Unusable::Open { mode } => SetupError::KeyReadable { path: path.to_owned(), mode },
    })?;
    PrivateKeyDer::from_pem_reader(&mut file).map_err(|error| wrong(pem_words(&error, "private key")))
}

fn pem_words(error: &pem::Error, item: &str) -> String {
    match error {
        pem::Error::Io(error) => error.to_string(),
        pem::Error::NoItemsFound if item == "private key" => {
            "it holds no private key in PEM form that can be read without a passphrase".to_owned()
        }
        pem::Error::NoItemsFound => format!("it holds no {item} in PEM form"),
        other => format!("it is not a PEM file: {other}"),
    }
}
