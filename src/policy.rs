//! From samples to messages: which are worth sending, what they say, and where they go. Pure.
//!
//! Invariant: what is reported together was read together. A message holds points of one unit and one reading
//! only, and every sample is reported, within its dead band, or of an unknown point.

pub mod command;
pub mod deadband;
pub mod format;
pub mod topic;

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use crate::message::{Lane, Message, Qos, Topic};
use crate::point::{PointId, PointIndex, Reading, Sample};

use deadband::{Deadband, Filter};
use format::Entry;

/// How one point is reported.
#[derive(Debug, Clone, PartialEq)]
pub struct Reporting {
    /// Which point: `line/unit/point`.
    pub id: PointId,
    /// Where it is published, rendered. Points of one unit with the same topic, QoS, retain and lane share a
    /// message.
    pub topic: Topic,
    /// At which quality of service. Default 1.
    pub qos: Qos,
    /// Whether the broker is asked to keep it. Default false.
    pub retain: bool,
    /// Which queue it joins. Default normal.
    pub lane: Lane,
    /// Unit of measure, `kWh`; 1 to 32 characters.
    pub unit: Option<String>,
    /// How far it must move to be reported. Default: every sample is. A bool with any dead band is reported when
    /// it changes: its band is 0 here.
    pub deadband: Deadband,
    /// How long it may go unreported within its dead band, or while it stays bad. Default 10 min with a dead
    /// band; 1 s to 30 d.
    pub longest_silence: Duration,
    /// How long after acceptance it is worth sending; `None` for ever, the default. 1 s to 3650 d.
    pub expires_after: Option<Duration>,
}

/// A message, and the points whose samples are in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// What to send.
    pub message: Message,
    /// What to [`Policy::forget`] if it does not get through the gateway's own door.
    pub points: Vec<PointIndex>,
}

/// Decides what is reported. One for the whole agent.
#[derive(Debug)]
pub struct Policy {
    gateway: String,
    boot_id: String,
    points: HashMap<PointIndex, Point>,
    /// Samples within their dead band so far.
    pub within_deadband: u64,
}

#[derive(Debug)]
struct Point {
    reporting: Reporting,
    filter: Filter,
    /// The first point that shares its messages.
    group: PointIndex,
    /// It was not among the points of the last change.
    is_gone: bool,
}

impl Policy {
    /// A policy for the gateway of that id, in this boot of the machine, which knows no point yet.
    pub fn new(gateway: &str, boot_id: &str) -> Self {
        let (gateway, boot_id) = (gateway.to_owned(), boot_id.to_owned());
        Policy { gateway, boot_id, points: HashMap::new(), within_deadband: 0 }
    }

    /// From now on points are reported like this. One that is reported as before keeps its dead band's memory, any
    /// other is reported at its next sample; one that is not among them goes on until [`Policy::drop_gone`], for
    /// readings that are on their way.
    pub fn change(&mut self, points: Vec<(PointIndex, Reporting)>) {
        let mut groups = HashMap::new();
        self.points.values_mut().for_each(|point| point.is_gone = true);
        for (index, reporting) in points {
            let group = *groups.entry(shared(&reporting)).or_insert(index);
            let before = self.points.remove(&index).filter(|point| point.reporting == reporting);
            let filter = match before {
                Some(before) => before.filter,
                None => Filter::new(reporting.deadband, reporting.longest_silence),
            };
            self.points.insert(index, Point { reporting, filter, group, is_gone: false });
        }
    }

    /// Forgets the points that were not among those of the last change.
    pub fn drop_gone(&mut self) {
        self.points.retain(|_, point| !point.is_gone);
    }

    /// What a reading is worth telling, in the order of the configuration.
    pub fn on_reading(&mut self, reading: &Reading) -> Vec<Report> {
        let mut worth_it: Vec<(PointIndex, &Sample)> = Vec::with_capacity(reading.samples.len());
        for sample in &reading.samples {
            let Some(point) = self.points.get_mut(&sample.point) else { continue };
            if point.filter.report(&sample.value, sample.at.mono_ms) {
                worth_it.push((point.group, sample));
            } else {
                self.within_deadband += 1;
            }
        }
        worth_it.sort_by_key(|(group, _)| *group);
        worth_it.chunk_by(|(a, _), (b, _)| a == b).map(|samples| self.report(samples)).collect()
    }

    /// Reports these points at their next sample, whatever it is: the message with the last one was not taken.
    pub fn forget(&mut self, points: &[PointIndex]) {
        for index in points {
            if let Some(point) = self.points.get_mut(index) {
                point.filter.forget();
            }
        }
    }

    /// `samples` is not empty, and all are of points of one group.
    fn report(&self, samples: &[(PointIndex, &Sample)]) -> Report {
        let shared = &self.points[&samples[0].0].reporting;
        let entries: Vec<Entry<'_>> = samples
            .iter()
            .map(|(_, sample)| {
                let Reporting { id, unit, .. } = &self.points[&sample.point].reporting;
                Entry { name: &id.point, unit: unit.as_deref(), at: sample.at, value: &sample.value }
            })
            .collect();
        let message = Message {
            topic: shared.topic.clone(),
            qos: shared.qos,
            retain: shared.retain,
            lane: shared.lane,
            at: format::oldest(samples.iter().map(|(_, sample)| sample.at)),
            expires_after: shared.expires_after,
            correlation_data: None,
            payload: format::values(&self.gateway, &self.boot_id, &shared.id.line, &shared.id.unit, &entries),
        };
        Report { message, points: samples.iter().map(|(_, sample)| sample.point).collect() }
    }
}

/// What points must have in common to share a message.
fn shared(reporting: &Reporting) -> impl Eq + Hash + use<> {
    let Reporting { id, topic, qos, retain, lane, expires_after, .. } = reporting;
    (Arc::clone(&id.line), Arc::clone(&id.unit), topic.clone(), *qos, *retain, *lane, *expires_after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Stamp;
    use crate::message::{Payload, Seq};
    use crate::point::{Fault, Value};

    fn reporting(unit: &str, point: &str, topic: &str) -> Reporting {
        Reporting {
            id: PointId { line: "line1".into(), unit: unit.into(), point: point.into() },
            topic: Topic::new(topic).expect("a topic"),
            qos: Qos::AtLeastOnce,
            retain: false,
            lane: Lane::Normal,
            unit: None,
            deadband: Deadband::Absolute(0.5),
            longest_silence: Duration::from_secs(600),
            expires_after: None,
        }
    }

    fn reading(mono_ms: u64, samples: &[(usize, Result<Value, Fault>)]) -> Reading {
        let at = Stamp { wall_ms: 1_795_255_200_123, mono_ms, synchronised: true };
        let samples = samples.iter().map(|(point, value)| Sample {
            point: PointIndex(*point),
            at,
            value: value.clone(),
        });
        Reading { samples: samples.collect() }
    }

    /// A policy for these points, numbered in their order.
    fn policy(gateway: &str, points: Vec<Reporting>) -> Policy {
        let mut policy = Policy::new(gateway, "boot");
        policy.change(numbered(points));
        policy
    }

    fn numbered(points: Vec<Reporting>) -> Vec<(PointIndex, Reporting)> {
        points.into_iter().enumerate().map(|(index, point)| (PointIndex(index), point)).collect()
    }

    /// Topic and the names of the points of each report.
    fn summary(policy: &Policy, reports: &[Report]) -> Vec<(String, Vec<String>)> {
        let names = |report: &Report| {
            let name = |point: &PointIndex| policy.points[point].reporting.id.point.to_string();
            report.points.iter().map(name).collect()
        };
        reports.iter().map(|report| (report.message.topic.to_string(), names(report))).collect()
    }

    fn good(value: f64) -> Result<Value, Fault> {
        Ok(Value::Float(value))
    }

    #[test]
    fn points_share_a_message_when_everything_but_their_values_is_the_same() {
        let same = |point| reporting("meter1", point, "t");
        let points = vec![
            same("a"),
            reporting("meter1", "other topic", "t/2"),
            same("b"),
            Reporting { qos: Qos::ExactlyOnce, ..same("other qos") },
            Reporting { retain: true, ..same("other retain") },
            Reporting { lane: Lane::Bulk, ..same("other lane") },
            Reporting { expires_after: Some(Duration::from_secs(1)), ..same("other expiry") },
            reporting("meter2", "other unit", "t"),
            Reporting { unit: Some("V".into()), deadband: Deadband::None, ..same("c") },
        ];
        let all: Vec<_> = (0..points.len()).map(|point| (point, good(1.0))).collect();
        let mut policy = policy("g", points);
        let reports = policy.on_reading(&reading(1, &all));
        let expected = [
            ("t", vec!["a", "b", "c"]),
            ("t/2", vec!["other topic"]),
            ("t", vec!["other qos"]),
            ("t", vec!["other retain"]),
            ("t", vec!["other lane"]),
            ("t", vec!["other expiry"]),
            ("t", vec!["other unit"]),
        ];
        let expected: Vec<(String, Vec<String>)> = expected
            .into_iter()
            .map(|(topic, points)| (topic.into(), points.into_iter().map(String::from).collect()))
            .collect();
        assert_eq!(summary(&policy, &reports), expected);
        assert_eq!(reports[2].message.qos, Qos::ExactlyOnce);
        assert!(reports[3].message.retain);
        assert_eq!(reports[4].message.lane, Lane::Bulk);
        assert_eq!(reports[5].message.expires_after, Some(Duration::from_secs(1)));
    }

    #[test]
    fn a_message_says_what_was_read() {
        let mut policy = policy("press-shop-1", vec![reporting("meter1", "voltage", "a/b")]);
        let reports = policy.on_reading(&reading(5, &[(0, good(230.1))]));
        let [report] = &reports[..] else { panic!("one report, not {reports:?}") };
        assert_eq!(report.message.at.mono_ms, 5);
        let Payload::Numbered(_) = report.message.payload else { panic!("values are numbered") };
        let payload = report.message.payload.clone().finish(1, Seq(2));
        assert_eq!(
            std::str::from_utf8(&payload).expect("UTF-8"),
            concat!(
                r#"{"v":1,"gateway":"press-shop-1","line":"line1","unit":"meter1","#,
                r#""at":"2026-11-21T10:00:00.123Z","clock":"ok","#,
                r#""values":{"voltage":{"value":230.1,"quality":"good"}},"epoch":1,"seq":2}"#
            )
        );
    }

    #[test]
    fn only_what_left_its_dead_band_is_told_and_the_rest_is_counted() {
        let points = vec![reporting("m", "a", "t"), reporting("m", "b", "t")];
        let mut policy = policy("g", points);
        assert_eq!(policy.on_reading(&reading(0, &[(0, good(1.0)), (1, good(1.0))])).len(), 1);
        let reports = policy.on_reading(&reading(1000, &[(0, good(1.1)), (1, good(2.0))]));
        assert_eq!(summary(&policy, &reports), [("t".to_owned(), vec!["b".to_owned()])]);
        assert_eq!(policy.within_deadband, 1);
        assert!(policy.on_reading(&reading(2000, &[(0, good(1.1)), (1, good(2.1))])).is_empty());
        assert_eq!(policy.within_deadband, 3);
    }

    #[test]
    fn a_report_that_was_not_taken_is_made_again() {
        let mut policy = policy("g", vec![reporting("m", "a", "t"), reporting("m", "b", "u")]);
        let samples = [(0, good(1.0)), (1, good(1.0))];
        let reports = policy.on_reading(&reading(0, &samples));
        policy.forget(&reports[0].points);
        let again = policy.on_reading(&reading(1000, &samples));
        assert_eq!(summary(&policy, &again), [("t".to_owned(), vec!["a".to_owned()])]);
    }

    #[test]
    fn what_is_reported_as_before_keeps_its_memory_and_what_is_not_is_told_anew() {
        let points =
            |topic| vec![reporting("m", "a", "t"), reporting("m", "b", topic), reporting("m", "c", "t")];
        let mut policy = policy("g", points("t"));
        let all = [(0, good(1.0)), (1, good(1.0)), (2, good(1.0))];
        assert_eq!(policy.on_reading(&reading(0, &all)).len(), 1);
        let (mut left, new) = (points("u"), reporting("m", "new", "t"));
        let last = left.pop();
        policy.change(numbered(left).into_iter().chain([(PointIndex(7), new)]).collect());
        let all = [(0, good(1.1)), (1, good(1.1)), (2, good(9.0)), (7, good(1.0))];
        let reports = policy.on_reading(&reading(1000, &all));
        let expected = [("t", vec!["c", "new"]), ("u", vec!["b"])];
        let expected =
            expected.map(|(topic, names)| (topic.into(), names.into_iter().map(str::to_owned).collect()));
        assert_eq!(summary(&policy, &reports), expected, "what is on its way is still told");
        assert_eq!(policy.within_deadband, 1);
        policy.drop_gone();
        assert!(policy.on_reading(&reading(2000, &[(2, good(99.0))])).is_empty());
        policy.change(last.map(|last| (PointIndex(8), last)).into_iter().collect());
        policy.drop_gone();
        assert_eq!(policy.on_reading(&reading(3000, &[(0, good(5.0)), (8, good(9.0))])).len(), 1);
    }

    #[test]
    fn an_empty_reading_and_an_unknown_point_are_no_message() {
        let mut policy = policy("g", Vec::new());
        assert!(policy.on_reading(&reading(0, &[])).is_empty());
        assert!(policy.on_reading(&reading(0, &[(7, good(1.0))])).is_empty());
        policy.forget(&[PointIndex(7)]);
    }
}
