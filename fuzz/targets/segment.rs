//! Segments: what is read of one is what was written, whatever became of its bytes.
//!
//! Two kinds of runs. *Written*: records are made of the bytes, laid out, damaged, and read; what is read under a
//! number must be what was written under it. *Foreign*: the bytes are a body that nobody wrote, with every checksum made
//! right; what is read must be what the layout in `store/segment.rs` says, which is read here a second time.

use std::ops::Range;

use bytes::Bytes;
use fieldpost::message::{Lane, Qos, Seq, Topic};
use fieldpost::store::segment::{Entry, Packing, RECORDS_MAX, decode, encode};

/// What a body may have been unpacked to, in bytes: LZ4 makes at most 255 of one.
const UNPACKED_MAX: usize = 255;

/// What is read of a segment is what was written, and bytes that nobody wrote are read as they are laid out.
pub(crate) fn segment(data: &[u8]) {
    match data {
        [0, rest @ ..] => foreign(rest),
        [_, rest @ ..] => written(rest, false),
        [] => {}
    }
}

/// The negative control: damage that comes with good checksums, so that what is read is not what was written.
pub(crate) fn forged_segment(data: &[u8]) {
    if let [1..=255, rest @ ..] = data {
        written(rest, true);
    }
}

fn written(data: &[u8], forge: bool) {
    let [lane, first, accepted, ops, rest @ ..] = data else { return };
    let (lane, first, accepted_ms) =
        (Lane::ALL[usize::from(lane % 3)], u64::from(*first) + 1, i64::from(*accepted));
    let (damage, mut rest) = rest.split_at((usize::from(ops % 8) * 4).min(rest.len()));
    let mut entries = Vec::new();
    while let Some((entry, left)) = entry(rest, accepted_ms).filter(|_| entries.len() < 40) {
        (rest, _) = (left, entries.push(entry));
    }
    let (packing, body) = encode(lane, Seq(first), accepted_ms, &entries);
    let whole = decode(lane, Seq(first), entries.len(), accepted_ms, packing as i64, body.clone());
    assert!(whole.into_iter().eq(entries.iter().cloned().map(Some)), "what was written is not read back");

    let mut row = Row { lane, first, count: entries.len(), packing: packing as i64, body };
    damage.chunks_exact(4).for_each(|op| row.damage([op[0], op[1], op[2], op[3]]));
    if forge && row.packing == Packing::Plain as i64 {
        forge_checksums(lane, first, row.count, &mut row.body);
    }
    let read = decode(row.lane, Seq(row.first), row.count, accepted_ms, row.packing, row.body);
    assert_eq!(read.len(), row.count);
    for (entry, seq) in read.into_iter().zip(row.first..) {
        let written =
            seq.checked_sub(first).and_then(|n| entries.get(n as usize)).filter(|_| row.lane == lane);
        assert!(entry.is_none() || entry.as_ref() == written, "{seq}: {entry:?} instead of {written:?}");
    }
}

/// The row of a segment, as far as its reading goes.
struct Row {
    lane: Lane,
    first: u64,
    count: usize,
    packing: i64,
    body: Vec<u8>,
}

impl Row {
    /// What a dying card does to it.
    fn damage(&mut self, [what, how, low, high]: [u8; 4]) {
        let at = usize::from(u16::from_le_bytes([low, high])) % self.body.len().max(1);
        let end = (at + usize::from(how)).min(self.body.len());
        match what % 8 {
            0 | 1 => self.body[at..].iter_mut().take(1).for_each(|byte| *byte ^= 1 << (how % 8)),
            2 => self.body[at..end].fill(if how & 1 == 0 { 0 } else { 0xff }),
            3 => self.body.truncate(at),
            4 => {
                let to = usize::from(what >> 3) % (self.body.len() - (end - at)).max(1);
                self.body.copy_within(at..end, to);
            }
            5 => drop(self.body.drain(at..end)),
            6 => {
                (self.first, self.count) =
                    (self.first + u64::from(how % 4), (at % 600).min(RECORDS_MAX as usize))
            }
            _ => (self.lane, self.packing) = (Lane::ALL[usize::from(how % 3)], i64::from(low % 4)),
        }
    }
}

/// One record of the first bytes, and the bytes that are left.
fn entry(data: &[u8], accepted_ms: i64) -> Option<(Entry, &[u8])> {
    let [flags, age, topic, repeat, length, rest @ ..] = data else { return None };
    let (payload, rest) = rest.split_at(usize::from(*length).min(rest.len()));
    const TOPICS: [&str; 4] = ["a", "a/b", "a/bc", "plant/line1/meter1/voltage"];
    let entry = Entry {
        topic: Topic::new(TOPICS[usize::from(topic % 4)]).expect("a topic"),
        qos: if flags & 1 == 0 { Qos::AtLeastOnce } else { Qos::ExactlyOnce },
        retain: flags & 2 != 0,
        at_ms: match flags & 0x30 {
            0x30 => i64::MIN + i64::from(*age),
            0x20 => accepted_ms + i64::from(*age),
            _ => accepted_ms - i64::from(*age),
        },
        expires_after_s: (flags & 4 != 0).then(|| u32::from(*age) << (topic % 32)),
        correlation_data: (flags & 8 != 0).then(|| Bytes::copy_from_slice(&payload[..payload.len() / 2])),
        payload: payload.repeat(usize::from(repeat % 16) + 1).into(),
    };
    Some((entry, rest))
}

fn foreign(data: &[u8]) {
    let [lane, first, count, packing, body @ ..] = data else { return };
    let (lane, first, accepted_ms) = (Lane::ALL[usize::from(lane % 3)], u64::from(*first), 1_000);
    let (count, packing, mut body) = (usize::from(*count) * 4, i64::from(packing % 3), body.to_vec());
    let forged = if packing == Packing::Plain as i64 {
        forge_checksums(lane, first, count, &mut body)
    } else {
        Vec::new()
    };
    let read = decode(lane, Seq(first), count, accepted_ms, packing, body.clone());
    assert_eq!(read.len(), count.min(RECORDS_MAX as usize));
    let bytes: usize = read.iter().flatten().map(|entry| entry.payload.len()).sum();
    assert!(bytes <= body.len() * UNPACKED_MAX, "{bytes} bytes out of {}", body.len());
    if packing == Packing::Plain as i64 {
        for (n, entry) in read.iter().enumerate() {
            let (laid, sum_is_good) = match forged.get(n) {
                Some(laid) => (laid, laid.known_flags),
                None => {
                    assert!(entry.is_none(), "{n}: {entry:?} beyond the layout");
                    continue;
                }
            };
            let topic = laid.topic.as_ref().filter(|_| sum_is_good);
            assert_eq!(entry.as_ref().map(|entry| &entry.topic), topic, "{n}: {laid:?}");
            if let Some(entry) = entry {
                assert_eq!(entry.payload, body[laid.payload.clone()], "{n}: {laid:?}");
            }
        }
    }
    // What was read can be written, and says the same.
    for (entry, seq) in read.into_iter().zip(first..) {
        let Some(entry) = entry else { continue };
        let (packing, body) = encode(lane, Seq(seq), accepted_ms, std::slice::from_ref(&entry));
        assert_eq!(decode(lane, Seq(seq), 1, accepted_ms, packing as i64, body), [Some(entry)]);
    }
}

/// Where a record stands in a body.
#[derive(Debug)]
struct Laid {
    /// From its flags to before its checksum.
    record: Range<usize>,
    payload: Range<usize>,
    /// Its topic, if that is one.
    topic: Option<Topic>,
    /// Whether it says nothing that this version does not know.
    known_flags: bool,
}

/// Gives every record of a plain body the checksum that it should have; where the records are.
fn forge_checksums(lane: Lane, first: u64, count: usize, body: &mut [u8]) -> Vec<Laid> {
    let laid = Layout { body, at: 0 }.records(count.min(RECORDS_MAX as usize)).unwrap_or_default();
    for (laid, seq) in laid.iter().zip(first..) {
        let Some(topic) = &laid.topic else { continue };
        let head = (((lane as u64) << 56) | seq).to_le_bytes();
        let sum = crc32c::crc32c(&[&head, topic.as_str().as_bytes(), &body[laid.record.clone()]].concat());
        body[laid.record.end..laid.record.end + 4].copy_from_slice(&sum.to_le_bytes());
    }
    laid
}

/// Reads the layout, as the head of `store/segment.rs` has it, without a look at the checksums.
struct Layout<'a> {
    body: &'a [u8],
    at: usize,
}

impl Layout<'_> {
    fn records(mut self, count: usize) -> Option<Vec<Laid>> {
        let topics = self.number().filter(|topics| *topics <= u64::from(RECORDS_MAX))?;
        let topics: Vec<Range<usize>> = (0..topics).map(|_| self.bytes()).collect::<Option<_>>()?;
        Some(std::iter::from_fn(|| self.record(&topics)).take(count).collect())
    }

    fn record(&mut self, topics: &[Range<usize>]) -> Option<Laid> {
        let start = self.at;
        let flags = *self.body.get(self.at)?;
        self.at += 1;
        let index = self.number()?;
        self.number()?;
        if flags & 4 != 0 {
            self.number()?;
        }
        if flags & 8 != 0 {
            self.bytes()?;
        }
        let payload = self.bytes()?;
        let record = start..self.at;
        self.at = self.at.checked_add(4).filter(|end| *end <= self.body.len())?;
        let name = usize::try_from(index).ok().and_then(|index| topics.get(index));
        let topic =
            name.and_then(|name| Topic::new(std::str::from_utf8(&self.body[name.clone()]).ok()?).ok());
        Some(Laid { record, payload, topic, known_flags: flags < 16 })
    }

    /// A length and where so many bytes stand.
    fn bytes(&mut self) -> Option<Range<usize>> {
        let length = usize::try_from(self.number()?).ok()?;
        let end = self.at.checked_add(length).filter(|end| *end <= self.body.len())?;
        Some(std::mem::replace(&mut self.at, end)..end)
    }

    /// LEB128; what is beyond 64 bits is lost.
    fn number(&mut self) -> Option<u64> {
        let rest = &self.body[self.at..];
        let length = rest.iter().take(10).position(|byte| byte & 0x80 == 0)? + 1;
        self.at += length;
        Some(rest[..length].iter().rev().fold(0u64, |value, byte| value << 7 | u64::from(byte & 0x7f)))
    }
}
