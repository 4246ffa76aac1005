//! Histograms of times: lists of buckets, shortest time first.

use crate::measure::tally::Bucket;
use std::collections::BTreeMap;

/// A sum of histograms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sum(BTreeMap<u64, u64>);

impl Sum {
    /// Adds the counts of a histogram, in time that does not depend on the number of buckets that are there.
    pub(super) fn add(&mut self, histogram: &[Bucket]) {
        for bucket in histogram {
            let place = self.0.entry(bucket.up_to_ns).or_default();
            *place = place.saturating_add(bucket.count);
        }
    }

    /// Returns the sum as buckets, shortest time first.
    pub(super) fn buckets(&self) -> Vec<Bucket> {
        self.0.iter().map(|(up_to_ns, count)| Bucket::from((*up_to_ns, *count))).collect()
    }
}

/// Adds the counts of `other` to `into`.
pub(super) fn merge(into: &mut Vec<Bucket>, other: &[Bucket]) {
    let mut sum = Sum::default();
    sum.add(into);
    sum.add(other);
    *into = sum.buckets();
}

/// Returns the upper end, in nanoseconds, of the first bucket at which `per_cent` of all times are counted; 0 for an empty
/// histogram.
pub(super) fn percentile(histogram: &[Bucket], per_cent: u64) -> u64 {
    let all = histogram.iter().fold(0_u64, |sum, bucket| sum.saturating_add(bucket.count));
    let wanted = u64::try_from((u128::from(all) * u128::from(per_cent)).div_ceil(100)).unwrap_or(u64::MAX);
    let mut seen = 0_u64;
    for bucket in histogram {
        seen = seen.saturating_add(bucket.count);
        if seen >= wanted {
            return bucket.up_to_ns;
        }
    }
    histogram.last().map_or(0, |bucket| bucket.up_to_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_upper_ends() {
        let histogram = [(10, 98), (100, 1), (1000, 1)].map(Bucket::from);
        assert_eq!(
            (percentile(&histogram, 50), percentile(&histogram, 99), percentile(&histogram, 100)),
            (10, 100, 1000)
        );
        assert_eq!(percentile(&[], 99), 0);
        let hostile = [(5, u64::MAX), (6, u64::MAX)].map(Bucket::from);
        assert_eq!(percentile(&hostile, 100), 5, "hostile counts do not overflow");
    }

    #[test]
    fn equal_buckets_add_up() {
        let mut sum = vec![Bucket::from((10, 1))];
        merge(&mut sum, &[(5, 2), (10, u64::MAX)].map(Bucket::from));
        assert_eq!(sum, [(5, 2), (10, u64::MAX)].map(Bucket::from));
    }
}
