//! Where exits were avoided, and where clusters ended.

use crate::kvm::Direction;
use crate::measure::clusters::{AvoidedAt, ClusterEnd, EndedAt, MOST_PLACES};
use std::collections::BTreeMap;

/// Counts by the guest's instructions. What is beyond [`MOST_PLACES`] of a kind is in the totals only.
#[derive(Default)]
pub(super) struct Places {
    avoided: BTreeMap<(u64, u16, bool), u64>,
    ended: BTreeMap<(u64, usize), u64>,
}

/// Counts one more of a key, where there is room for it.
fn count<K: Ord>(counts: &mut BTreeMap<K, u64>, key: K) {
    if let Some(count) = counts.get_mut(&key) {
        *count += 1;
    } else if counts.len() < MOST_PLACES {
        counts.insert(key, 1);
    }
}

impl Places {
    /// An access by the instruction at `rip` was answered without an exit.
    pub(super) fn avoided(&mut self, rip: u64, port: u16, direction: Direction) {
        count(&mut self.avoided, (rip, port, direction == Direction::Out));
    }

    /// A cluster ended before the instruction at `rip`.
    pub(super) fn ended(&mut self, rip: u64, end: ClusterEnd) {
        count(&mut self.ended, (rip, end as usize));
    }

    /// The exits that were avoided, by instruction and port.
    pub(super) fn all_avoided(&self) -> Vec<AvoidedAt> {
        let at = |(&(rip, port, write), &count): (&(u64, u16, bool), &u64)| AvoidedAt { rip, port, write, count };
        self.avoided.iter().map(at).collect()
    }

    /// The ends of clusters, by the instruction before which they ended.
    pub(super) fn all_ended(&self) -> Vec<EndedAt> {
        let at = |(&(rip, end), &count): (&(u64, usize), &u64)| EndedAt { rip, end, count };
        self.ended.iter().map(at).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_and_bounded() {
        let mut places = Places::default();
        for rip in 0..2 * MOST_PLACES as u64 {
            for _ in 0..3 {
                places.avoided(rip, 0x3f8, Direction::Out);
                places.ended(rip, ClusterEnd::Page);
            }
            places.avoided(0, 0x3fd, Direction::In);
        }
        let (avoided, ended) = (places.all_avoided(), places.all_ended());
        assert_eq!((avoided.len(), ended.len()), (MOST_PLACES, MOST_PLACES));
        assert_eq!(avoided[0], AvoidedAt { rip: 0, port: 0x3f8, write: true, count: 3 });
        assert_eq!(avoided[1].count, 2 * MOST_PLACES as u64);
        assert_eq!(ended[7], EndedAt { rip: 7, end: ClusterEnd::Page as usize, count: 3 });
    }
}
