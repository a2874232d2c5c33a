//! A segment: the records of one lane and one commit, as the bytes of one database row. Pure.
//!
//! Layout, before packing: `topics`, then `records`, integers as LEB128.
//!
//! ```text
//! topics  = count, { length, UTF-8 bytes }…
//! record  = flags, topic index, zigzag(acquired − accepted, ms), [expires after, s],
//!           [length, Correlation Data], length, payload, CRC32C
//! flags   = bit 0 QoS 2, bit 1 retain, bit 2 has an expiry, bit 3 has Correlation Data
//! ```
//!
//! The topics stand in the segment itself, so that a segment can be read when nothing else can. The checksum
//! covers lane, number, topic and record: a record that is read is the record that was written.

use bytes::Bytes;

use crate::message::{Lane, Qos, Record, Seq, Topic};

const QOS_2: u8 = 1;
const RETAIN: u8 = 2;
const EXPIRES: u8 = 4;
const CORRELATES: u8 = 8;
const FLAGS: u8 = QOS_2 | RETAIN | EXPIRES | CORRELATES;

/// Records of one segment, and so its topics, at most; a bigger commit makes several.
pub const RECORDS_MAX: u32 = 512;
/// Bodies shorter than this are not worth packing.
const PACK_FROM_BYTES: usize = 256;
/// A body is unpacked only up to this size, whatever it claims to hold.
const PLAIN_MAX_BYTES: usize = 64 << 20;

/// How a body is stored. The numbers are the database's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// As laid out above.
    Plain = 0,
    /// LZ4 block with its size in front.
    Lz4 = 1,
}

/// What a record says about its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it is published.
    pub topic: Topic,
    /// QoS 1 or 2.
    pub qos: Qos,
    /// The retain flag.
    pub retain: bool,
    /// Acquisition time, Unix time in milliseconds.
    pub at_ms: i64,
    /// Seconds after acceptance for which it is worth sending; `None` for ever.
    pub expires_after_s: Option<u32>,
    /// MQTT 5 Correlation Data.
    pub correlation_data: Option<Bytes>,
    /// The application message.
    pub payload: Bytes,
}

impl Entry {
    /// The record this entry is, with `expires_s` seconds left.
    pub fn into_record(self, lane: Lane, seq: Seq, expires_s: Option<u32>) -> Record {
        Record {
            lane,
            seq,
            topic: self.topic,
            qos: self.qos,
            retain: self.retain,
            at_ms: self.at_ms,
            expires_s,
            correlation_data: self.correlation_data,
            payload: self.payload,
        }
    }
}

/// Lays out and, where it saves at least an eighth, packs the entries numbered from `first`.
pub fn encode(lane: Lane, first: Seq, accepted_ms: i64, entries: &[Entry]) -> (Packing, Vec<u8>) {
    let mut topics: Vec<&Topic> = Vec::new();
    let mut records = Vec::new();
    for (entry, seq) in entries.iter().zip(first.0..) {
        let index = topics.iter().position(|topic| **topic == entry.topic).unwrap_or_else(|| {
            topics.push(&entry.topic);
            topics.len() - 1
        });
        let start = records.len();
        let flags = if entry.qos == Qos::ExactlyOnce { QOS_2 } else { 0 }
            | if entry.retain { RETAIN } else { 0 }
            | if entry.expires_after_s.is_some() { EXPIRES } else { 0 }
            | if entry.correlation_data.is_some() { CORRELATES } else { 0 };
        records.push(flags);
        put(&mut records, index as u64);
        put(&mut records, zigzag(entry.at_ms.wrapping_sub(accepted_ms)));
        if let Some(seconds) = entry.expires_after_s {
            put(&mut records, u64::from(seconds));
        }
        if let Some(data) = &entry.correlation_data {
            put(&mut records, data.len() as u64);
            records.extend_from_slice(data);
        }
        put(&mut records, entry.payload.len() as u64);
        records.extend_from_slice(&entry.payload);
        let sum = checksum(lane, seq, &entry.topic, &records[start..]);
        records.extend_from_slice(&sum.to_le_bytes());
    }
    let mut body = Vec::with_capacity(records.len() + 64);
    put(&mut body, topics.len() as u64);
    for topic in topics {
        put(&mut body, topic.as_str().len() as u64);
        body.extend_from_slice(topic.as_str().as_bytes());
    }
    body.extend_from_slice(&records);
    pack(body)
}

fn pack(body: Vec<u8>) -> (Packing, Vec<u8>) {
    if body.len() >= PACK_FROM_BYTES {
        let packed = lz4_flex::block::compress_prepend_size(&body);
        if packed.len() + packed.len() / 8 < body.len() {
            return (Packing::Lz4, packed);
        }
    }
    (Packing::Plain, body)
}

/// Reads a body back: one element per record, `None` where the record is damaged. The result has `count`
/// elements (at most [`RECORDS_MAX`]) whatever the bytes are; once the layout is lost, everything after it counts as
/// damaged.
pub fn decode(
    lane: Lane,
    first: Seq,
    count: usize,
    accepted_ms: i64,
    packing: i64,
    body: Vec<u8>,
) -> Vec<Option<Entry>> {
    // A count that is damaged must not cost memory.
    let count = count.min(RECORDS_MAX as usize);
    let mut entries = Vec::with_capacity(count);
    if let Some(plain) = unpack(packing, body) {
        let mut reader = Reader { body: plain.into(), at: 0 };
        if let Some(topics) = reader.topics() {
            for seq in (first.0..).take(count) {
                match reader.record(lane, seq, accepted_ms, &topics) {
                    Some(entry) => entries.push(entry),
                    None => break,
                }
            }
        }
    }
    entries.resize(count, None);
    entries
}

fn unpack(packing: i64, body: Vec<u8>) -> Option<Vec<u8>> {
    if packing == Packing::Plain as i64 {
        return Some(body);
    }
    let claimed = u32::from_le_bytes(body.get(..4)?.try_into().ok()?) as usize;
    if packing != Packing::Lz4 as i64 || claimed > PLAIN_MAX_BYTES {
        return None;
    }
    lz4_flex::block::decompress_size_prepended(&body).ok()
}

struct Reader {
    body: Bytes,
    at: usize,
}

impl Reader {
    fn topics(&mut self) -> Option<Vec<Option<Topic>>> {
        let count = self.number().filter(|count| *count <= u64::from(RECORDS_MAX))?;
        let mut topics = Vec::new();
        for _ in 0..count {
            let length = self.number()?;
            let name = self.bytes(length)?;
            topics.push(std::str::from_utf8(&name).ok().and_then(|name| Topic::new(name).ok()));
        }
        Some(topics)
    }

    /// `None`: the layout is lost. `Some(None)`: this record is damaged, the next one may be whole.
    fn record(
        &mut self,
        lane: Lane,
        seq: u64,
        accepted_ms: i64,
        topics: &[Option<Topic>],
    ) -> Option<Option<Entry>> {
        let start = self.at;
        let flags = self.bytes(1)?[0];
        let index = self.number()?;
        let at_ms = accepted_ms.wrapping_add(unzigzag(self.number()?));
        let expires_after_s = if flags & EXPIRES != 0 { Some(self.number()?) } else { None };
        let correlation_data = match flags & CORRELATES {
            0 => None,
            _ => {
                let length = self.number()?;
                Some(self.bytes(length)?)
            }
        };
        let length = self.number()?;
        let payload = self.bytes(length)?;
        let record = self.body.slice(start..self.at);
        let sum = u32::from_le_bytes(self.bytes(4)?.as_ref().try_into().ok()?);
        let Some(Some(topic)) = usize::try_from(index).ok().and_then(|index| topics.get(index)) else {
            return Some(None);
        };
        // A border between topic and record that has moved is not in the checksum, but it makes the first byte of the
        // record one of the topic's, and these are no flags.
        if flags & !FLAGS != 0 || sum != checksum(lane, seq, topic, &record) {
            return Some(None);
        }
        Some(Some(Entry {
            topic: topic.clone(),
            qos: if flags & QOS_2 != 0 { Qos::ExactlyOnce } else { Qos::AtLeastOnce },
            retain: flags & RETAIN != 0,
            at_ms,
            expires_after_s: expires_after_s.map(|seconds| u32::try_from(seconds).unwrap_or(u32::MAX)),
            correlation_data,
            payload,
        }))
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.body.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn bytes(&mut self, length: u64) -> Option<Bytes> {
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        if end > self.body.len() {
            return None;
        }
        let slice = self.body.slice(self.at..end);
        self.at = end;
        Some(slice)
    }
}

fn checksum(lane: Lane, seq: u64, topic: &Topic, record: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&(((lane as u64) << 56) | seq).to_le_bytes());
    let sum = crc32c::crc32c_append(sum, topic.as_str().as_bytes());
    crc32c::crc32c_append(sum, record)
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(topic: &str, qos: Qos, payload: &[u8]) -> Entry {
        Entry {
            topic: Topic::new(topic).unwrap(),
            qos,
            retain: payload.len().is_multiple_of(2),
            at_ms: 1_000 - payload.len() as i64 * 7,
            expires_after_s: payload.len().is_multiple_of(3).then_some(payload.len() as u32),
            correlation_data: (payload.len() > 3).then(|| Bytes::from_static(b"\0who asked")),
            payload: Bytes::copy_from_slice(payload),
        }
    }

    fn three() -> Vec<Entry> {
        vec![
            entry("a/b", Qos::AtLeastOnce, b"one"),
            entry("a/c", Qos::ExactlyOnce, b""),
            entry("a/b", Qos::ExactlyOnce, &[7; 900]),
        ]
    }

    #[test]
    fn what_was_written_is_read_back() {
        for entries in [three(), vec![entry("x", Qos::AtLeastOnce, b"tiny")]] {
            let (packing, body) = encode(Lane::Normal, Seq(41), 1_000, &entries);
            let read = decode(Lane::Normal, Seq(41), entries.len(), 1_000, packing as i64, body);
            assert_eq!(read, entries.into_iter().map(Some).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_long_body_that_repeats_itself_is_packed() {
        assert_eq!(encode(Lane::Bulk, Seq(1), 0, &three()).0, Packing::Lz4);
    }

    #[test]
    fn a_record_read_under_another_number_or_lane_is_damaged() {
        let (packing, body) = encode(Lane::Normal, Seq(41), 0, &three());
        let count = |lane, seq| {
            decode(lane, Seq(seq), 3, 0, packing as i64, body.clone()).into_iter().flatten().count()
        };
        assert_eq!((count(Lane::Normal, 41), count(Lane::Normal, 42), count(Lane::Alarm, 41)), (3, 0, 0));
    }

    #[test]
    fn a_flipped_bit_never_changes_what_is_read() {
        let entries =
            vec![entry("a/b", Qos::AtLeastOnce, b"first"), entry("a/b", Qos::ExactlyOnce, b"second")];
        let (_, body) = encode(Lane::Normal, Seq(1), 0, &entries);
        for bit in 0..body.len() * 8 {
            let mut damaged = body.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let read = decode(Lane::Normal, Seq(1), 2, 0, Packing::Plain as i64, damaged);
            for (read, written) in read.iter().zip(&entries) {
                assert!(read.is_none() || read.as_ref() == Some(written), "bit {bit}: {read:?}");
            }
        }
    }

    /// Topic and record stand side by side under the checksum: a border that moves between them must be noticed.
    #[test]
    fn a_byte_of_its_topic_does_not_become_part_of_a_record() {
        let written = Entry { at_ms: 997, expires_after_s: None, ..entry("a/b", Qos::AtLeastOnce, b"four") };
        let written = Entry { correlation_data: None, retain: false, ..written };
        let (_, mut body) = encode(Lane::Normal, Seq(1), 1_000, std::slice::from_ref(&written));
        body[1] ^= 1; // "a/b" is "a/" now, and 'b' the first byte of the record
        assert_eq!(decode(Lane::Normal, Seq(1), 1, 1_000, Packing::Plain as i64, body), [None]);
    }

    #[test]
    fn a_count_or_a_number_of_topics_that_no_segment_has_costs_no_memory() {
        let (packing, body) = encode(Lane::Normal, Seq(1), 0, &three());
        let read = decode(Lane::Normal, Seq(1), usize::MAX, 0, packing as i64, body);
        assert_eq!((read.len(), read.iter().flatten().count()), (RECORDS_MAX as usize, 3));
        // 32 million topics without a name, out of 128 KiB.
        let mut topics = vec![0; 32 << 20];
        topics[..4].copy_from_slice(&[0xf0, 0xff, 0xff, 0x0f]);
        assert!(Reader { body: topics.into(), at: 0 }.topics().is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_as_many_elements_as_asked(
            body in proptest::collection::vec(any::<u8>(), 0..300), packing in 0i64..3, count in 0usize..50
        ) {
            prop_assert_eq!(decode(Lane::Normal, Seq(1), count, 0, packing, body).len(), count);
        }
    }
}
