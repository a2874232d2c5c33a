//! Points to the fewest legal read requests. Pure.
//!
//! Invariant: every point is in exactly one part of exactly one request, whole, and no request asks for more
//! than the standard allows (Modbus Application Protocol V1.1b3, 6.1 to 6.4).

use super::Space;

/// What one point needs of its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Want {
    /// Which table.
    pub space: Space,
    /// First register or bit, on the wire, from 0.
    pub address: u16,
    /// How many registers or bits.
    pub words: u16,
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Registers nobody asked for that may be read along to join two requests. 0 joins only what adjoins:
    /// a device may refuse a whole block for one address it does not have.
    pub max_gap: u16,
    /// Most registers in one request, at most 125 (6.3, 6.4).
    pub registers: u16,
    /// Most bits in one request, at most 2000 (6.1, 6.2).
    pub bits: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { max_gap: 0, registers: 125, bits: 2000 }
    }
}

/// One read request, and what of its reply belongs to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read {
    /// Which table.
    pub space: Space,
    /// First register or bit.
    pub address: u16,
    /// How many of them.
    pub count: u16,
    /// The points in it, by address.
    pub parts: Vec<Part>,
}

/// The part of a reply that is one point's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The point's place in the slice that was planned.
    pub point: usize,
    /// Where it begins in the reply, in registers or bits.
    pub offset: u16,
    /// How many registers or bits it takes.
    pub words: u16,
}

/// The fewest requests that read all of `wants`, which are points of one unit due together.
///
/// Beginning each request at the first address not yet read and filling it up is optimal, because no point is
/// ever split. A single point larger than the limits still gets a request of its own.
pub fn plan(wants: &[Want], limits: Limits) -> Vec<Read> {
    let mut order: Vec<usize> = (0..wants.len()).collect();
    order.sort_by_key(|&point| (wants[point].space, wants[point].address, wants[point].words));
    let mut reads: Vec<Read> = Vec::new();
    for point in order {
        let want = wants[point];
        match reads.last_mut() {
            Some(read) if joins(read, want, limits) => extend(read, want, point),
            _ => reads.push(Read {
                space: want.space,
                address: want.address,
                count: want.words,
                parts: vec![Part { point, offset: 0, words: want.words }],
            }),
        }
    }
    reads
}

/// The two halves of a request, by points; `None` when it reads a single point.
///
/// For a unit that refuses the whole: the points it does have must not suffer for the one it does not.
pub fn split(read: &Read) -> Option<(Read, Read)> {
    if read.parts.len() < 2 {
        return None;
    }
    let (left, right) = read.parts.split_at(read.parts.len() / 2);
    Some((part_of(read, left), part_of(read, right)))
}

fn joins(read: &Read, want: Want, limits: Limits) -> bool {
    let limit = u32::from(if want.space.is_bits() { limits.bits } else { limits.registers });
    let start = u32::from(read.address);
    let end = start + u32::from(read.count);
    let wanted_end = u32::from(want.address) + u32::from(want.words);
    read.space == want.space
        && u32::from(want.address) <= end + u32::from(limits.max_gap)
        && wanted_end.max(end) - start <= limit
}

fn extend(read: &mut Read, want: Want, point: usize) {
    let offset = want.address - read.address; // sorted by address, so never below the first
    read.parts.push(Part { point, offset, words: want.words });
    read.count = read.count.max(offset + want.words);
}

/// The smallest request for some neighbouring parts of another.
fn part_of(read: &Read, parts: &[Part]) -> Read {
    let first = parts.first().map_or(0, |part| part.offset);
    let end = parts.iter().map(|part| part.offset + part.words).max().unwrap_or(first);
    Read {
        space: read.space,
        address: read.address + first,
        count: end - first,
        parts: parts.iter().map(|part| Part { offset: part.offset - first, ..*part }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn want(space: Space, address: u16, words: u16) -> Want {
        Want { space, address, words }
    }

    /// Requests as `space address+count`, in order.
    fn planned(wants: &[Want], limits: Limits) -> Vec<String> {
        plan(wants, limits).iter().map(|r| format!("{} {}+{}", r.space, r.address, r.count)).collect()
    }

    #[test]
    fn adjoining_points_share_a_request() {
        use Space::{Coil, Holding, Input};
        let table: [(&[Want], u16, &[&str]); 8] = [
            (&[], 0, &[]),
            (&[want(Holding, 10, 1)], 0, &["holding 10+1"]),
            (&[want(Holding, 12, 2), want(Holding, 10, 2)], 0, &["holding 10+4"]),
            (&[want(Holding, 10, 1), want(Input, 11, 1)], 0, &["holding 10+1", "input 11+1"]),
            (&[want(Holding, 10, 1), want(Holding, 12, 1)], 0, &["holding 10+1", "holding 12+1"]),
            (&[want(Holding, 10, 1), want(Holding, 12, 1)], 1, &["holding 10+3"]),
            (&[want(Holding, 10, 2), want(Holding, 10, 1), want(Holding, 11, 1)], 0, &["holding 10+2"]),
            (&[want(Coil, 65534, 1), want(Coil, 65535, 1)], 0, &["coil 65534+2"]),
        ];
        for (wants, max_gap, expected) in table {
            assert_eq!(planned(wants, Limits { max_gap, ..Limits::default() }), expected, "{wants:?}");
        }
    }

    #[test]
    fn the_standard_s_limits_are_kept_and_no_point_is_split() {
        let registers: Vec<Want> = (0..126).map(|n| want(Space::Input, n, 1)).collect();
        assert_eq!(planned(&registers, Limits::default()), ["input 0+125", "input 125+1"]);
        let doubles: Vec<Want> = (0..63).map(|n| want(Space::Input, n * 2, 2)).collect();
        assert_eq!(planned(&doubles, Limits::default()), ["input 0+124", "input 124+2"]);
        let bits: Vec<Want> = (0..2001).map(|n| want(Space::DiscreteInput, n, 1)).collect();
        assert_eq!(planned(&bits, Limits::default()), ["discrete 0+2000", "discrete 2000+1"]);
    }

    #[test]
    fn each_point_is_told_where_it_stands_in_the_reply() {
        let wants = [want(Space::Input, 14, 2), want(Space::Input, 10, 1), want(Space::Input, 11, 2)];
        let reads = plan(&wants, Limits { max_gap: 1, ..Limits::default() });
        let parts =
            [(1, 0, 1), (2, 1, 2), (0, 4, 2)].map(|(point, offset, words)| Part { point, offset, words });
        assert_eq!(reads, [Read { space: Space::Input, address: 10, count: 6, parts: parts.to_vec() }]);
    }

    #[test]
    fn a_refused_request_is_halved_until_one_point_is_left() {
        let wants: Vec<Want> = (0..5).map(|n| want(Space::Holding, 100 + n * 2, 2)).collect();
        let (left, right) = split(&plan(&wants, Limits::default())[0]).unwrap();
        assert_eq!((left.address, left.count, left.parts.len()), (100, 4, 2));
        assert_eq!((right.address, right.count, right.parts.len()), (104, 6, 3));
        assert_eq!(right.parts[0], Part { point: 2, offset: 0, words: 2 });
        assert_eq!(split(&split(&left).unwrap().0), None);
    }

    fn wants() -> impl Strategy<Value = Vec<Want>> {
        let space = prop_oneof![Just(Space::Coil), Just(Space::Holding), Just(Space::Input)];
        let one = (space, prop_oneof![0u16..40, 0u16..4000, 65_500u16..65_534], 1u16..=2).prop_map(
            |(space, address, words)| want(space, address, if space.is_bits() { 1 } else { words }),
        );
        proptest::collection::vec(one, 0..200)
    }

    fn assert_covers(wants: &[Want], reads: &[Read], limits: Limits) -> Result<(), TestCaseError> {
        let mut seen = vec![0; wants.len()];
        for read in reads {
            let limit = if read.space.is_bits() { limits.bits } else { limits.registers };
            prop_assert!(read.count >= 1 && read.count <= limit, "{read:?}");
            prop_assert!(u32::from(read.address) + u32::from(read.count) <= 65_536);
            for part in &read.parts {
                let want = wants[part.point];
                seen[part.point] += 1;
                prop_assert_eq!((want.space, want.words), (read.space, part.words));
                prop_assert_eq!(want.address, read.address + part.offset);
                prop_assert!(part.offset + part.words <= read.count);
            }
        }
        prop_assert!(seen.iter().all(|&times| times == 1));
        Ok(())
    }

    /// The fewest requests by trying every way to cut the sorted points: slow and obviously right.
    fn fewest(wants: &[Want], limits: Limits) -> usize {
        let mut sorted = wants.to_vec();
        sorted.sort_by_key(|want| (want.space, want.address, want.words));
        let mut best = vec![0; sorted.len() + 1];
        for end in 1..=sorted.len() {
            best[end] = (0..end)
                .filter(|&start| plan(&sorted[start..end], limits).len() == 1)
                .map(|start| best[start] + 1)
                .min()
                .unwrap();
        }
        best[sorted.len()]
    }

    proptest! {
        #[test]
        fn every_point_is_read_exactly_once_within_the_limits(wants in wants(), max_gap in 0u16..10) {
            let limits = Limits { max_gap, ..Limits::default() };
            assert_covers(&wants, &plan(&wants, limits), limits)?;
        }

        #[test]
        fn splitting_loses_no_point(wants in wants(), max_gap in 0u16..10) {
            let limits = Limits { max_gap, ..Limits::default() };
            let mut todo = plan(&wants, limits);
            let mut single = Vec::new();
            while let Some(read) = todo.pop() {
                match split(&read) {
                    Some((left, right)) => todo.extend([left, right]),
                    None => single.push(read),
                }
            }
            prop_assert_eq!(single.len(), wants.len());
            assert_covers(&wants, &single, limits)?;
        }

        #[test]
        fn no_plan_has_fewer_requests(mut wants in wants(), max_gap in 0u16..10) {
            wants.truncate(40);
            let limits = Limits { max_gap, registers: 5, bits: 7 };
            prop_assert_eq!(plan(&wants, limits).len(), fewest(&wants, limits));
        }
    }
}
