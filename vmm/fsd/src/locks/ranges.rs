//! The ranges of one file that one owner has locked, as the kernel keeps them.
//!
//! Before it locks, `locks` asks what the kernel would hold afterwards. So a guest that splits its
//! ranges without end is stopped at a number.
//!
//! Invariant: the ranges are sorted and disjoint, and neighbours of one kind are one range
//! (fcntl(2)).

/// What others may do beside a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shared: others may lock for reading, too.
    Read,
    Write,
}

/// Bytes of a file, including the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub start: u64,
    /// Not before `start`. [`Range::LAST`]: however long the file gets.
    pub end: u64,
}

impl Range {
    /// The last byte that a file can have (OFFSET_MAX).
    pub const LAST: u64 = i64::MAX.cast_unsigned();

    /// `None`: these are no bytes of a file.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start <= end && end <= Self::LAST).then_some(Self { start, end })
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(Range, Kind)>);

impl Ranges {
    /// The ranges after `kind` was set on `range`; `None` unlocks it.
    pub fn with(&self, range: Range, kind: Option<Kind>) -> Self {
        let mut all = Vec::with_capacity(self.0.len() + 2);
        for &(old, held) in &self.0 {
            // No overflow: the range starts behind the ranges before it, and ends before those
            // behind it.
            if old.start < range.start {
                let end = old.end.min(range.start - 1);
                all.push((Range { end, ..old }, held));
            }
            if old.end > range.end {
                let start = old.start.max(range.end + 1);
                all.push((Range { start, ..old }, held));
            }
        }
        all.extend(kind.map(|kind| (range, kind)));
        all.sort_unstable_by_key(|(range, _)| range.start);
        all.dedup_by(|next, last| {
            let joined = next.1 == last.1 && next.0.start == last.0.end + 1;
            if joined {
                last.0.end = next.0.end;
            }
            joined
        });
        Self(all)
    }

    /// How many locks the kernel holds for these ranges.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = (Range, Kind)> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::Kind::{Read, Write};
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range::new(start, end).unwrap()
    }

    fn set(steps: &[(u64, u64, Option<Kind>)]) -> Vec<(u64, u64, Kind)> {
        let start = Ranges::default();
        let end = steps.iter().fold(start, |ranges, &(start, end, kind)| {
            ranges.with(range(start, end), kind)
        });
        end.iter()
            .map(|(range, kind)| (range.start, range.end, kind))
            .collect()
    }

    #[test]
    fn neighbours_of_one_kind_are_one_and_others_stay_apart() {
        let joined = set(&[
            (0, 9, Some(Read)),
            (20, 29, Some(Read)),
            (10, 19, Some(Read)),
        ]);
        assert_eq!(joined, [(0, 29, Read)]);
        let apart = set(&[(0, 9, Some(Read)), (10, 19, Some(Write))]);
        assert_eq!(apart, [(0, 9, Read), (10, 19, Write)]);
        let gap = set(&[(0, 9, Some(Read)), (11, 19, Some(Read))]);
        assert_eq!(gap, [(0, 9, Read), (11, 19, Read)]);
    }

    /// Every way to lock seven bytes, then every change: as if each byte were kept by itself.
    #[test]
    fn ranges_are_what_single_bytes_would_be() {
        const BYTES: usize = 7;
        let kinds = [None, Some(Read), Some(Write)];
        for number in 0..3usize.pow(BYTES as u32) {
            let kind = |byte: usize| kinds[number / 3usize.pow(byte as u32) % 3];
            let mut bytes: [Option<Kind>; BYTES] = std::array::from_fn(kind);
            let locked = bytes.iter().enumerate();
            let ranges = locked.fold(Ranges::default(), |ranges, (byte, kind)| {
                ranges.with(range(byte as u64, byte as u64), *kind)
            });
            let before = bytes;
            for (start, end) in (0..BYTES).flat_map(|end| (0..=end).map(move |start| (start, end)))
            {
                for kind in kinds {
                    bytes = before;
                    bytes[start..=end].fill(kind);
                    let after = ranges.with(range(start as u64, end as u64), kind);
                    let mut found = [None; BYTES];
                    for (range, kind) in after.iter() {
                        found[range.start as usize..=range.end as usize].fill(Some(kind));
                    }
                    assert_eq!(found, bytes, "{before:?} {start} {end} {kind:?}");
                    // As few as there can be: one for each row of equal bytes.
                    let rows = bytes.chunk_by(|one, next| one == next);
                    assert_eq!(after.count(), rows.filter(|row| row[0].is_some()).count());
                }
            }
        }
    }

    #[test]
    fn the_last_word_counts_and_splits_what_was_there() {
        let whole = (0, Range::LAST, Some(Write));
        let split = set(&[whole, (10, 19, Some(Read)), (12, 13, None)]);
        let wanted = [
            (0, 9, Write),
            (10, 11, Read),
            (14, 19, Read),
            (20, Range::LAST, Write),
        ];
        assert_eq!(split, wanted);
        assert_eq!(
            set(&[whole, (5, 5, Some(Read)), whole]),
            [(0, Range::LAST, Write)]
        );
        assert_eq!(
            set(&[whole, (5, 5, Some(Read)), (0, Range::LAST, None)]),
            []
        );
        assert_eq!(set(&[(5, 5, None)]), []);
    }

    #[test]
    fn what_is_no_range_of_a_file_is_refused() {
        assert_eq!(Range::new(2, 1), None);
        assert_eq!(Range::new(0, u64::MAX), None);
        assert_eq!(Range::new(Range::LAST + 1, Range::LAST + 1), None);
        assert!(Range::new(Range::LAST, Range::LAST).is_some());
    }
}
