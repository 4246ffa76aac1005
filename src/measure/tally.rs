//! Counts with times: how often, how long together, the longest, and a histogram for percentiles.

use hdrhistogram::Histogram;

/// Times are kept to one significant decimal digit or better (the histogram's buckets are at most 1/16 wide).
const DIGITS: u8 = 1;

/// Something that occurred so often and took so long.
#[derive(Clone, Debug)]
pub struct Tally {
    /// How often.
    pub count: u64,
    /// Nanoseconds together.
    pub ns: u64,
    /// The longest, in nanoseconds.
    pub max_ns: u64,
    /// `None` only where no memory was to be had for it.
    histogram: Option<Histogram<u32>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { count: 0, ns: 0, max_ns: 0, histogram: Histogram::new(DIGITS).ok() }
    }
}

impl Tally {
    /// Counts one that took `ns`.
    pub fn add(&mut self, ns: u64) {
        self.count += 1;
        self.add_time(ns);
    }

    /// The time of one that is counted already.
    pub fn add_time(&mut self, ns: u64) {
        self.ns = self.ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
        if let Some(histogram) = &mut self.histogram {
            // Fails only for values beyond what it may grow to, and it may grow to all.
            let _ = histogram.record(ns);
        }
    }

    /// Adds another's.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.ns = self.ns.saturating_add(other.ns);
        self.max_ns = self.max_ns.max(other.max_ns);
        if let (Some(mine), Some(theirs)) = (&mut self.histogram, &other.histogram) {
            let _ = mine.add(theirs);
        }
    }

    /// The histogram: (upper end of a bucket in nanoseconds, how many), smallest first.
    #[must_use]
    pub fn buckets(&self) -> Vec<(u64, u64)> {
        let Some(histogram) = &self.histogram else { return Vec::new() };
        histogram.iter_recorded().map(|step| (step.value_iterated_to(), step.count_since_last_iteration())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_add_up_and_spread() {
        let mut tally = Tally::default();
        (0..99).for_each(|_| tally.add(1_000));
        tally.add(50_000);
        let mut sum = Tally::default();
        sum.merge(&tally);
        sum.merge(&tally);
        assert_eq!((sum.count, sum.ns, sum.max_ns), (200, 2 * (99_000 + 50_000), 50_000));
        let buckets = sum.buckets();
        assert_eq!(buckets.iter().map(|(_, count)| count).sum::<u64>(), 200);
        assert!(buckets[0].0.abs_diff(1_000) <= 63, "{buckets:?}");
        sum.add(u64::MAX);
        assert_eq!(sum.ns, u64::MAX, "hostile times do not wrap");
    }
}
