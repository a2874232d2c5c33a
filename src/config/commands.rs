//! `[commands]`: how commands come, how long they are good for, and where answers may go.
//!
//! Which points may be written is each point's own business.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::Commands;
use super::check::{DAY, MINUTE, SECOND, render_topic, template};
use super::raw::Value;
use super::read::{Section, Walk};
use super::value::{self, Complaint};
use crate::message::Topic;
use crate::policy::topic::Names;

const TTL: RangeInclusive<Duration> = SECOND..=DAY;
const MAX_PER_SECOND: RangeInclusive<i64> = 1..=1000;
const MAX_PER_SECOND_DEFAULT: u32 = 10;
const BURST: RangeInclusive<i64> = 1..=10_000;
const BURST_DEFAULT: u32 = 50;
/// Longest name below the base topic that is our own.
const BELOW_BASE: usize = "/command".len();

pub(super) fn commands(walk: &mut Walk<'_>, section: Section<'_>, gateway: &str, base: &Topic) -> Commands {
    let names = Names { gateway, line: "", unit: "", point: "" };
    let topic = walk.get(section, "topic", |value| render_topic(&template(value)?, &names));
    let below = |name: &str| Topic::new(&format!("{base}{name}"));
    let (Ok(default_topic), Ok(answer_topic)) = (below("/command"), below("/answer")) else {
        let message = format!("[gateway] base_topic leaves no room for {BELOW_BASE} bytes below it");
        walk.wrong(section.table.place, Complaint::new(message).help("write a shorter one"));
        return Commands::standard(base.clone(), base.clone());
    };
    let standard = Commands::standard(default_topic, answer_topic);
    if let Some(topic) = topic.as_ref().filter(|topic| topic.value == standard.answer_topic) {
        let complaint = Complaint::new("`topic`: answers go there, and would come back as commands");
        walk.wrong(topic.place, complaint.help("take another topic, or leave it out"));
    }
    let ttl = walk.get(section, "ttl", |value| super::quantity::duration(value, TTL));
    let max_ttl = walk.duration(section, "max_ttl", TTL, standard.max_ttl);
    if let Some(ttl) = ttl.filter(|ttl| ttl.value > max_ttl) {
        let complaint = Complaint::new("`ttl`: this is longer than `max_ttl`");
        walk.wrong(ttl.place, complaint.help("make `max_ttl` at least as long, or this shorter"));
    }
    let mut number = |key, range| {
        let found = walk.get(section, key, |value| value::integer(value, range))?.value;
        u32::try_from(found).ok()
    };
    let max_per_second = number("max_per_second", MAX_PER_SECOND);
    let burst = number("burst", BURST);
    let response_topics = walk.get(section, "response_topics", prefixes);
    Commands {
        topic: topic.map_or(standard.topic, |topic| topic.value),
        ttl: ttl.map_or(standard.ttl.min(max_ttl), |ttl| ttl.value),
        max_ttl,
        max_per_second: max_per_second.unwrap_or(standard.max_per_second),
        burst: burst.unwrap_or(standard.burst),
        response_topics: response_topics.map_or_else(Vec::new, |prefixes| prefixes.value),
        answer_topic: standard.answer_topic,
    }
}

impl Commands {
    fn standard(topic: Topic, answer_topic: Topic) -> Self {
        Commands {
            topic,
            ttl: 30 * SECOND,
            max_ttl: 10 * MINUTE,
            max_per_second: MAX_PER_SECOND_DEFAULT,
            burst: BURST_DEFAULT,
            response_topics: Vec::new(),
            answer_topic,
        }
    }
}

/// Beginnings of topics. Without the last `/`, `plant/answers` would let `plant/answers-of-others` in.
fn prefixes(value: &Value) -> Result<Vec<String>, Complaint> {
    let Value::Array(nodes) = value else {
        let complaint = Complaint::new(format!("expected an array of texts, found {value}"));
        return Err(complaint.help("write response_topics = [\"plant/answers/\"]"));
    };
    let prefix = |text: &str| match Topic::new(text) {
        Ok(_) if text.ends_with('/') => Ok(text.to_owned()),
        Ok(_) => Err(Complaint::new(format!("{} does not end in '/'", value::quoted(text)))
            .help(format!("write \"{text}/\""))),
        Err(error) => Err(Complaint::new(error.to_string())),
    };
    nodes.iter().map(|node| prefix(value::text(&node.value)?)).collect()
}
