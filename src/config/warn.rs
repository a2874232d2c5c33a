//! What a configuration asks for and a broker it names does not have, in words, and what it gives away. Nothing here is
//! a problem: the agent does what it can, counts it, and says so.

use super::http::is_open;
use super::{Broker, Config};
use crate::http::Listen;
use crate::message::Qos;
use crate::policy::Reporting;

pub(super) fn warnings(config: &Config) -> Vec<String> {
    let several = !config.other_brokers.is_empty();
    let mut warnings = Vec::new();
    let points: Vec<&Reporting> = config.reporting().collect();
    for broker in config.brokers() {
        let header = if several { format!("[[broker]] {}", broker.host) } else { "[broker]".to_owned() };
        warnings.extend(of(broker, &points).into_iter().map(|words| format!("{header} {words}")));
    }
    if let Some(Listen::Tcp(address)) = config.http.as_ref().map(|http| &http.listen)
        && is_open(*address)
    {
        warnings.push(format!(
            "[http] listen = \"{address}\": the token and the messages cross the network unencrypted; put a TLS proxy \
             in front of it where others can listen"
        ));
    }
    warnings
}

fn of(broker: &Broker, points: &[&Reporting]) -> Vec<String> {
    let mut warnings = Vec::new();
    let asking = |asks: &dyn Fn(&Reporting) -> bool| {
        let mut names = points.iter().filter(|point| asks(point)).map(|point| point.id.to_string());
        let first = names.next()?;
        Some(match names.count() {
            0 => format!("{first} asks"),
            more => format!("{first} and {more} more ask"),
        })
    };
    let max_qos = broker.max_qos.number();
    if let Some(who) = asking(&|point| point.qos > broker.max_qos) {
        warnings.push(format!("max_qos = {max_qos}, but {who} for more: sent at QoS {max_qos}"));
    }
    if broker.max_qos == Qos::AtMostOnce {
        warnings.push(
            "max_qos = 0: every message is sent once and called delivered, whether it arrives or not".into(),
        );
    }
    if !broker.retain {
        if let Some(who) = asking(&|point| point.retain) {
            warnings.push(format!("retain = false, but {who} for it: sent without"));
        }
        warnings.push("retain = false: the broker keeps neither presence nor unit states".into());
    }
    if !broker.will {
        warnings.push("will = false: the broker does not say when the gateway is lost".into());
    }
    if broker.clean_start {
        let doubled = match broker.max_qos {
            Qos::ExactlyOnce => {
                ", and QoS 2 messages in flight when a link breaks may arrive twice (counted as possibly_doubled)"
            }
            _ => "",
        };
        warnings.push(format!("clean_start = true: commands sent during an outage are lost{doubled}"));
    }
    warnings
}
