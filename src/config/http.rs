//! `[http]`: the local interface over HTTP, where there is one, and who may use it.
//!
//! Invariant: an address that other machines can reach needs a token.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::{SECOND, SOCKET_PATH_BYTES_MAX};
use super::quantity;
use super::raw::Value;
use super::read::{Placed, Section, Walk};
use super::value::{self, Complaint};
use crate::http::{Listen, Settings};

const LISTEN_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8090);
const CONNECTIONS: RangeInclusive<i64> = 1..=1024;
const CONNECTIONS_DEFAULT: usize = 128;
const WAITING: RangeInclusive<i64> = 1..=1024;
const WAITING_DEFAULT: usize = 64;
const BODY: RangeInclusive<u64> = 1 << 10..=1 << 20;
const BODY_DEFAULT: usize = 256 << 10;
const READ_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(100)..=Duration::from_secs(600);

pub(super) fn http(walk: &mut Walk<'_>, section: Section<'_>) -> Settings {
    let listen = walk.get(section, "listen", listen);
    let token_file = walk.secret_path(section, "token_file");
    if let Some(Placed { value: Listen::Tcp(address), place }) = &listen
        && is_open(*address)
        && section.table.get("token_file").is_none()
    {
        let message =
            format!("`listen`: {address} can be reached from other machines, and there is no `token_file`");
        let help = "add token_file = \"http.token\" (`openssl rand -hex 32 > http.token && chmod 640 http.token`), \
                    or listen on 127.0.0.1";
        walk.wrong(*place, Complaint::new(message).help(help));
    }
    let listen = listen.map_or(Listen::Tcp(LISTEN_DEFAULT), |listen| beside(walk, listen));
    let mut number = |key, range, default| {
        let found = walk.get(section, key, |value| value::integer(value, range));
        found.and_then(|found| usize::try_from(found.value).ok()).unwrap_or(default)
    };
    let max_connections = number("max_connections", CONNECTIONS, CONNECTIONS_DEFAULT);
    let max_waiting = number("max_waiting", WAITING, WAITING_DEFAULT);
    let max_body = walk.get(section, "max_body", |value| quantity::size(value, BODY));
    Settings {
        listen,
        token_file,
        max_connections,
        max_waiting,
        max_body: max_body.and_then(|bytes| usize::try_from(bytes.value).ok()).unwrap_or(BODY_DEFAULT),
        read_timeout: walk.duration(section, "read_timeout", READ_TIMEOUT, 10 * SECOND),
    }
}

/// Whether other machines can reach the address.
pub(super) fn is_open(address: SocketAddr) -> bool {
    !address.ip().to_canonical().is_loopback()
}

/// `127.0.0.1:8090`, `[::1]:8090`, `unix:/run/fieldpost/http.sock`.
fn listen(value: &Value) -> Result<Listen, Complaint> {
    const WHAT: &str = "an IP address and port, \"127.0.0.1:8090\", or \"unix:\" and the path of a socket";
    let text = match value {
        Value::Integer(port) if (1..=65_535).contains(port) => {
            return Err(value::expected(WHAT, value).help(format!("write \"127.0.0.1:{port}\"")));
        }
        _ => value::text(value)?.trim(),
    };
    if let Some(path) = text.strip_prefix("unix:") {
        return match path {
            "" => Err(Complaint::new("the path is empty")),
            path if path.contains('\0') => Err(Complaint::new("a path holds no NUL character")),
            path => Ok(Listen::Unix(PathBuf::from(path))),
        };
    }
    let complaint = value::expected(WHAT, value);
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() == 0 => Err(complaint.help("a port is 1 to 65535")),
        Ok(address) => Ok(Listen::Tcp(address)),
        Err(_) if text.starts_with('/') => Err(complaint.help(format!("write \"unix:{text}\""))),
        Err(_) => Err(match meant(text) {
            Some(address) => complaint.help(format!("write \"{address}\"")),
            None => complaint,
        }),
    }
}

/// The address that was probably meant: `8090`, `:8090`, `localhost:8090`, `http://127.0.0.1:8090/`, `192.168.1.5`.
fn meant(text: &str) -> Option<SocketAddr> {
    let bare =
        text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/').replace("localhost", "127.0.0.1");
    let port = || Some(SocketAddr::new(LISTEN_DEFAULT.ip(), bare.trim_start_matches(':').parse().ok()?));
    let host = || Some(SocketAddr::new(bare.parse().ok()?, LISTEN_DEFAULT.port()));
    bare.parse().ok().or_else(host).or_else(port)
}

/// A socket's path starts from the directory of the file that names it.
fn beside(walk: &mut Walk<'_>, listen: Placed<Listen>) -> Listen {
    let Listen::Unix(path) = listen.value else { return listen.value };
    let directory = walk.sources[listen.place.file].path.parent().unwrap_or(Path::new(""));
    let path = directory.join(path);
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_BYTES_MAX {
        let message = format!(
            "`listen`: the socket's path has {bytes} bytes, the system takes {SOCKET_PATH_BYTES_MAX}"
        );
        let help = "give a shorter one: listen = \"unix:/run/fieldpost/http.sock\"";
        walk.wrong(listen.place, Complaint::new(message).help(help));
    }
    Listen::Unix(path)
}
