//! What a request is for, and whether it may: by its head alone. Pure.
//!
//! Without a token, whoever reaches a loopback address may ask; but a web page that is open in a browser of the
//! gateway reaches it too. So the Host must be this machine by its own name (a page of another host whose name was
//! made to lead here carries its own), and a POST with an Origin, or with a content type that pages may send without
//! asking first, is refused. Invariant: nothing is said of what there is before the token was right.

use hyper::header::{self, HeaderMap};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode};
use subtle::ConstantTimeEq;

use crate::message::Lane;

/// Who may ask.
#[derive(Debug)]
pub(super) enum Admission {
    /// Whoever knows this.
    Token(String),
    /// Whoever is on this machine and comes to a loopback address.
    Loopback,
    /// Whoever may open the Unix socket.
    Socket,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// `GET /healthz`
    Health,
    /// `GET /readyz`, or `/readyz?lane=bulk`
    Ready(Lane),
    /// `GET /metrics`
    Metrics,
    /// `GET /status`
    Status,
    /// `POST /publish`
    Publish(Form),
}

/// How the messages of a request are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One object, or an array of them.
    Json,
    /// One object a line.
    Lines,
}

/// Why a request is not for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Denied {
    pub(super) status: StatusCode,
    /// In words, with what to do.
    pub(super) reason: String,
    /// A header that goes with the status: name and value.
    pub(super) header: Option<(&'static str, &'static str)>,
}

impl Denied {
    fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Denied { status, reason: reason.into(), header: None }
    }
}

const PATHS: &str = "there are GET /healthz, /readyz, /metrics and /status, and POST /publish";

/// What the head asks for.
///
/// # Errors
/// Why it may not, or what is wrong with it.
pub(super) fn route(head: &Parts, admission: &Admission) -> Result<Route, Denied> {
    admit(head, admission)?;
    let route = match head.uri.path() {
        "/healthz" => Route::Health,
        "/readyz" => Route::Ready(lane(head.uri.query())?),
        "/metrics" => Route::Metrics,
        "/status" => Route::Status,
        "/publish" => Route::Publish(Form::Json),
        _ => return Err(Denied::new(StatusCode::NOT_FOUND, PATHS)),
    };
    let posts = matches!(route, Route::Publish(_));
    let (fits, allow) = match posts {
        true => (head.method == Method::POST, "POST"),
        false => (head.method == Method::GET || head.method == Method::HEAD, "GET, HEAD"),
    };
    if !fits {
        let denied = Denied::new(StatusCode::METHOD_NOT_ALLOWED, format!("this takes {allow}"));
        return Err(Denied { header: Some(("allow", allow)), ..denied });
    }
    if !posts {
        return Ok(route);
    }
    if head.headers.contains_key(header::ORIGIN) {
        let reason = "requests of web pages (with an Origin header) may not publish";
        return Err(Denied::new(StatusCode::FORBIDDEN, reason));
    }
    Ok(Route::Publish(form(&head.headers)?))
}

fn admit(head: &Parts, admission: &Admission) -> Result<(), Denied> {
    match admission {
        Admission::Socket => Ok(()),
        Admission::Token(token) => {
            let given = head.headers.get(header::AUTHORIZATION).map(|value| value.as_bytes());
            let given = given.and_then(bearer).unwrap_or_default();
            // Takes as long whatever the first wrong character is.
            match bool::from(given.ct_eq(token.as_bytes())) {
                true => Ok(()),
                false => {
                    let reason = "the token is missing or wrong: send Authorization: Bearer and the content of token_file";
                    let denied = Denied::new(StatusCode::UNAUTHORIZED, reason);
                    Err(Denied { header: Some(("www-authenticate", "Bearer realm=\"fieldpost\"")), ..denied })
                }
            }
        }
        Admission::Loopback => {
            let host = head.headers.get(header::HOST).and_then(|host| host.to_str().ok());
            // An absolute target outweighs the header (RFC 9112, 3.2.2).
            let host = head.uri.authority().map(|authority| authority.as_str()).or(host);
            match host.is_some_and(is_this_machine) {
                true => Ok(()),
                false => Err(Denied::new(
                    StatusCode::FORBIDDEN,
                    "the Host header must be localhost or a loopback address; to be reached by another name, set [http] token_file",
                )),
            }
        }
    }
}

/// The credentials of the scheme Bearer, which is written in any case (RFC 9110, 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// Whether a Host is this machine itself, whatever the port.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or("", |(address, _)| address),
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

fn lane(query: Option<&str>) -> Result<Lane, Denied> {
    let Some(query) = query.filter(|query| !query.is_empty()) else { return Ok(Lane::Normal) };
    query.strip_prefix("lane=").and_then(Lane::from_name).ok_or_else(|| {
        Denied::new(
            StatusCode::BAD_REQUEST,
            "only ?lane=alarm, ?lane=normal and ?lane=bulk have a meaning here",
        )
    })
}

fn form(headers: &HeaderMap) -> Result<Form, Denied> {
    let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = named.split(';').next().unwrap_or_default().trim();
    [("application/json", Form::Json), ("application/x-ndjson", Form::Lines)]
        .into_iter()
        .find_map(|(name, form)| essence.eq_ignore_ascii_case(name).then_some(form))
        .ok_or_else(|| {
            let reason = "send Content-Type: application/json, or application/x-ndjson for one object a line";
            Denied::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: (&str, &str) = ("content-type", "application/json");

    fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = hyper::Request::builder().method(method).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    fn status(
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        admission: &Admission,
    ) -> Result<Route, u16> {
        route(&head(method, target, headers), admission).map_err(|denied| denied.status.as_u16())
    }

    #[test]
    fn each_path_has_its_methods() {
        for (method, target, expected) in [
            ("GET", "/healthz", Ok(Route::Health)),
            ("HEAD", "/healthz", Ok(Route::Health)),
            ("GET", "/readyz", Ok(Route::Ready(Lane::Normal))),
            ("GET", "/readyz?lane=bulk", Ok(Route::Ready(Lane::Bulk))),
            ("GET", "/readyz?lane=fast", Err(400)),
            ("GET", "/metrics?x=y", Ok(Route::Metrics)),
            ("GET", "/status", Ok(Route::Status)),
            ("POST", "/publish", Ok(Route::Publish(Form::Json))),
            ("POST", "/status", Err(405)),
            ("GET", "/publish", Err(405)),
            ("PUT", "/publish", Err(405)),
            ("GET", "/", Err(404)),
            ("GET", "/publish/", Err(404)),
        ] {
            assert_eq!(status(method, target, &[JSON], &Admission::Socket), expected, "{method} {target}");
        }
        let denied = route(&head("GET", "/publish", &[]), &Admission::Socket).expect_err("POST only");
        assert_eq!(denied.header, Some(("allow", "POST")));
    }

    #[test]
    fn what_a_web_page_could_send_is_refused() {
        let publish = |headers: &[(&str, &str)]| status("POST", "/publish", headers, &Admission::Loopback);
        let local = ("host", "127.0.0.1:8090");
        assert_eq!(publish(&[local, JSON]), Ok(Route::Publish(Form::Json)));
        for content_type in ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""] {
            assert_eq!(publish(&[local, ("content-type", content_type)]), Err(415), "{content_type}");
        }
        assert_eq!(publish(&[local]), Err(415));
        for origin in ["https://evil.example", "null", "http://127.0.0.1:8090"] {
            assert_eq!(publish(&[local, JSON, ("origin", origin)]), Err(403), "{origin}");
        }
        let lines = ("content-type", "Application/X-NDJSON; charset=utf-8");
        assert_eq!(publish(&[local, lines]), Ok(Route::Publish(Form::Lines)));
    }

    #[test]
    fn without_a_token_only_this_machines_own_names_are_answered() {
        let by = |host: &str| status("GET", "/status", &[("host", host)], &Admission::Loopback).is_ok();
        for host in
            ["localhost", "LOCALHOST:8090", "127.0.0.1", "127.0.0.2:1", "[::1]:8090", "[::ffff:127.0.0.1]"]
        {
            assert!(by(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:8090",
            "192.168.1.5",
            "[::2]",
            "[",
            "::1",
        ] {
            assert!(!by(host), "{host}");
        }
        let absolute = head("GET", "http://evil.example/status", &[("host", "127.0.0.1")]);
        assert!(route(&absolute, &Admission::Loopback).is_err());
        assert!(route(&head("GET", "/status", &[]), &Admission::Loopback).is_err(), "no Host at all");
        assert!(route(&head("GET", "/status", &[]), &Admission::Socket).is_ok());
    }

    #[test]
    fn the_token_and_nothing_like_it_is_the_token() {
        let admission = Admission::Token("s3cret".into());
        let with = |value: &str| status("GET", "/nowhere", &[("authorization", value)], &admission);
        for right in ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "] {
            assert_eq!(with(right), Err(404), "{right}");
        }
        for wrong in
            ["s3cret", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cretx", "Basic s3cret", "Bearer S3CRET"]
        {
            assert_eq!(with(wrong), Err(401), "{wrong}");
        }
        assert_eq!(status("GET", "/nowhere", &[], &admission), Err(401));
        let denied = route(&head("GET", "/status", &[]), &admission).expect_err("no token");
        assert!(!denied.reason.contains("s3cret"));
    }
}
