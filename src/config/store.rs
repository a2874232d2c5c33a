//! The tables `[store]`, `[replay]` and `[budget]`: where messages wait, how many, who loses, how a backlog is sent,
//! and who waits when the link's bytes are used up.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::check::{EVER, MINUTE, SECOND};
use super::quantity;
use super::raw::{COMMIT_INTERVAL, LANE_LIMITS, LANES, Value};
use super::read::{Section, Walk};
use super::value::{self, Choice, Complaint};
use super::{BudgetPeriod, BudgetSettings, LaneLimits, Replay, ReplayOrder, Store, WhenFull};
use crate::message::Lane;

const QUOTA: RangeInclusive<u64> = 1 << 20..=1 << 40;
const QUOTA_DEFAULT: u64 = 512 << 20;
const MIN_FREE_DISK: RangeInclusive<u64> = 0..=1 << 40;
const MIN_FREE_DISK_DEFAULT: u64 = 16 << 20;
const LANE_BYTES: RangeInclusive<u64> = 64 << 10..=1 << 40;
const LANE_MESSAGES: RangeInclusive<i64> = 1..=1_000_000_000;
const RATE_MESSAGES: RangeInclusive<i64> = 1..=1_000_000;
const RATE_BYTES: RangeInclusive<u64> = 100..=1 << 30;
const BUDGET_BYTES: RangeInclusive<u64> = 64 << 10..=1 << 40;
const COMMIT_WAIT: RangeInclusive<Duration> = Duration::ZERO..=MINUTE;
const COMMIT_WAIT_DEFAULT: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), SECOND];
pub(super) const WHEN_FULL: [Choice<WhenFull>; 2] =
    [("drop_oldest", WhenFull::DropOldest, &["drop"]), ("reject_new", WhenFull::RejectNew, &["reject"])];
pub(super) const ORDER: [Choice<ReplayOrder>; 2] = [
    ("in_order", ReplayOrder::InOrder, &["ordered", "fifo", "oldest_first"]),
    ("live_first", ReplayOrder::LiveFirst, &["live", "newest_first", "lifo"]),
];

pub(super) fn store(walk: &mut Walk<'_>, section: Section<'_>) -> Store {
    let path = walk.path(section, "path");
    let quota = walk.get(section, "quota", |value| quantity::size(value, QUOTA));
    let when_full = walk.get(section, "when_full", |value| value::choice(value, &WHEN_FULL));
    let min_free_disk = walk.get(section, "min_free_disk", |value| quantity::size(value, MIN_FREE_DISK));
    Store {
        path: path.map_or_else(|| PathBuf::from("/var/lib/fieldpost/outbox.db"), |path| path.value),
        quota: quota.map_or(QUOTA_DEFAULT, |quota| quota.value),
        when_full: when_full.map_or(WhenFull::DropOldest, |when_full| when_full.value),
        lanes: lanes(walk, section),
        min_free_disk: min_free_disk.map_or(MIN_FREE_DISK_DEFAULT, |bytes| bytes.value),
        commit_interval: commit_interval(walk, section),
    }
}

/// `[store.lane.alarm]` and its siblings.
fn lanes(walk: &mut Walk<'_>, section: Section<'_>) -> [LaneLimits; 3] {
    let table = section.table.get("lane").and_then(|entry| walk.table(&entry.node, &LANES));
    let Some(lanes) = table else { return [LaneLimits::default(); 3] };
    Lane::ALL.map(|lane| {
        let table = lanes.table.get(lane.name()).and_then(|entry| walk.table(&entry.node, &LANE_LIMITS));
        table.map_or_else(LaneLimits::default, |table| limits(walk, table))
    })
}

fn limits(walk: &mut Walk<'_>, lane: Section<'_>) -> LaneLimits {
    let max_bytes = walk.get(lane, "max_bytes", |value| quantity::size(value, LANE_BYTES));
    let max_messages = walk.get(lane, "max_messages", |value| value::integer(value, LANE_MESSAGES));
    let max_age = walk.get(lane, "max_age", |value| quantity::duration(value, SECOND..=EVER));
    let when_full = walk.get(lane, "when_full", |value| value::choice(value, &WHEN_FULL));
    LaneLimits {
        max_bytes: max_bytes.map(|bytes| bytes.value),
        max_messages: max_messages.map(|messages| messages.value as u64),
        max_age: max_age.map(|age| age.value),
        when_full: when_full.map(|when_full| when_full.value),
    }
}

pub(super) fn replay(walk: &mut Walk<'_>, section: Section<'_>) -> Replay {
    let order = walk.get(section, "order", |value| value::choice(value, &ORDER));
    let messages = walk.get(section, "max_messages_per_second", |value| value::integer(value, RATE_MESSAGES));
    let bytes = walk.get(section, "max_bytes_per_second", |value| quantity::size(value, RATE_BYTES));
    Replay {
        order: order.map_or(ReplayOrder::InOrder, |order| order.value),
        max_messages_per_second: messages.map(|messages| messages.value as u64),
        max_bytes_per_second: bytes.map(|bytes| bytes.value),
    }
}

pub(super) fn budget(walk: &mut Walk<'_>, section: Section<'_>) -> BudgetSettings {
    const PER: [Choice<BudgetPeriod>; 2] =
        [("day", BudgetPeriod::Day, &["daily"]), ("month", BudgetPeriod::Month, &["monthly"])];
    let bytes = walk.need(section, "bytes", |value| quantity::size(value, BUDGET_BYTES));
    let per = walk.get(section, "per", |value| value::choice(value, &PER));
    let holds_back = walk.get(section, "holds_back", lane_list);
    BudgetSettings {
        bytes: bytes.map_or(*BUDGET_BYTES.start(), |bytes| bytes.value),
        per: per.map_or(BudgetPeriod::Month, |per| per.value),
        holds_back: holds_back.map_or([false, true, true], |lanes| lanes.value),
    }
}

/// `["bulk", "normal"]`
fn lane_list(value: &Value) -> Result<[bool; 3], Complaint> {
    const LANES: [Choice<Lane>; 3] =
        [("alarm", Lane::Alarm, &[]), ("normal", Lane::Normal, &[]), ("bulk", Lane::Bulk, &[])];
    let Value::Array(nodes) = value else { return Err(value::expected("a list of lanes", value)) };
    let mut lanes = [false; 3];
    for node in nodes {
        lanes[value::choice(&node.value, &LANES)? as usize] = true;
    }
    Ok(lanes)
}

/// One duration for every lane, or a table with one for each.
fn commit_interval(walk: &mut Walk<'_>, section: Section<'_>) -> [Duration; 3] {
    let table = section.table.get("commit_interval").map(|entry| &entry.node);
    let Some(node) = table.filter(|node| matches!(node.value, Value::Table(_))) else {
        let one = walk.get(section, "commit_interval", |value| quantity::duration(value, COMMIT_WAIT));
        return one.map_or(COMMIT_WAIT_DEFAULT, |one| [one.value; 3]);
    };
    let Some(lanes) = walk.table(node, &COMMIT_INTERVAL) else { return COMMIT_WAIT_DEFAULT };
    Lane::ALL.map(|lane| walk.duration(lanes, lane.name(), COMMIT_WAIT, COMMIT_WAIT_DEFAULT[lane as usize]))
}
