//! Where the broker is: `mqtt://host[:port]`, and hosts as such. Pure.
//!
//! Invariant: no message repeats a text that may hold a password (P10).

use std::net::Ipv6Addr;

use super::value::{Complaint, quoted};

/// Where the broker is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) tls: bool,
    pub(super) host: String,
    pub(super) port: Option<u16>,
}

/// `mqtt://host[:port]` or `mqtts://host[:port]`; IPv6 addresses stand in brackets (RFC 3986 section 3.2.2).
pub(super) fn url(text: &str) -> Result<Url, Complaint> {
    const EXAMPLE: &str = "write mqtt://host:1883, or mqtts://host:8883 for TLS";
    // First of all, so that no other message repeats a password.
    if text.contains('@') {
        return Err(Complaint::new("the URL holds a user name or password").help(
            "take it out of the URL: `username` gives the name, `password_file` a file with the password",
        ));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(Complaint::new(format!("{} is not a URL", quoted(text))).help(EXAMPLE));
    };
    let tls = match scheme {
        "mqtt" => false,
        "mqtts" => true,
        _ => {
            let complaint = Complaint::new(format!("{} is not a scheme that is known", quoted(scheme)));
            return Err(complaint.help(match scheme {
                "tcp" => format!("write mqtt://{rest}"),
                "ssl" | "tls" => format!("write mqtts://{rest}"),
                "ws" | "wss" => "MQTT over WebSocket is not supported; ".to_owned() + EXAMPLE,
                _ => EXAMPLE.to_owned(),
            }));
        }
    };
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if rest.contains(['/', '?']) {
        return Err(Complaint::new("there is something after host and port").help(EXAMPLE));
    }
    let (host, port) = host_and_port(rest)?;
    let port = port.map(broker_port).transpose()?;
    Ok(Url { tls, host: self::host(host)?.to_owned(), port })
}

fn host_and_port(rest: &str) -> Result<(&str, Option<&str>), Complaint> {
    if let Some(bracketed) = rest.strip_prefix('[') {
        let (address, after) = bracketed
            .split_once(']')
            .ok_or_else(|| Complaint::new("the '[' is never closed").help("write [::1] or [::1]:1883"))?;
        return match after.strip_prefix(':') {
            Some(port) => Ok((address, Some(port))),
            None if after.is_empty() => Ok((address, None)),
            None => Err(Complaint::new(format!("{} after ']' is not a port", quoted(after)))),
        };
    }
    if rest.parse::<Ipv6Addr>().is_ok() || rest.matches(':').count() > 1 {
        return Err(Complaint::new("an IPv6 address in a URL stands in brackets").help("write [::1]:1883"));
    }
    Ok(rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port))))
}

fn broker_port(text: &str) -> Result<u16, Complaint> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Complaint::new(format!("{} is not a port: 1 to 65535", quoted(text)))),
    }
}

/// A host name or address, without brackets.
pub(super) fn host(text: &str) -> Result<&str, Complaint> {
    const LENGTH_MAX: usize = 253;
    if text.is_empty() {
        return Err(Complaint::new("there is no host"));
    }
    let known = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name = text.len() <= LENGTH_MAX && text.chars().all(known);
    // A zone (`fe80::1%eth0`) is for the operating system to judge.
    if name || text.split('%').next().is_some_and(|address| address.parse::<Ipv6Addr>().is_ok()) {
        return Ok(text);
    }
    Err(Complaint::new(format!("{} is neither a host name nor an address", quoted(text))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_host_and_perhaps_a_port() {
        for (written, meant) in [
            ("mqtt://broker", Some((false, "broker", None))),
            ("mqtts://broker.example.com:8883/", Some((true, "broker.example.com", Some(8883)))),
            ("mqtt://[::1]:1883", Some((false, "::1", Some(1883)))),
            ("mqtt://[fe80::1%eth0]", Some((false, "fe80::1%eth0", None))),
            ("mqtt://127.0.0.1:1883", Some((false, "127.0.0.1", Some(1883)))),
            ("mqtt://::1", None),
            ("mqtt://[::1", None),
            ("mqtt://[::1]x", None),
            ("mqtt://[broker:1]", None),
            ("mqtt://", None),
            ("mqtt://:1883", None),
            ("mqtt://a:0", None),
            ("mqtt://a:65536", None),
            ("mqtt://a b", None),
            ("mqtt://me:secret@broker", None),
            ("tcp://me:secret@broker", None),
            ("mqtt://broker/path", None),
            ("tcp://broker", None),
            ("broker", None),
        ] {
            let meant = meant.map(|(tls, host, port)| Url { tls, host: host.to_owned(), port });
            assert_eq!(url(written).ok(), meant, "{written}");
        }
    }

    #[test]
    fn a_secret_in_a_url_is_not_repeated() {
        for written in ["mqtt://me:hunter2@broker", "tcp://me:hunter2@broker", "me:hunter2@broker"] {
            let complaint = url(written).expect_err("refused");
            assert!(!format!("{complaint:?}").contains("hunter2"));
        }
    }
}
