//! Counts with times: the count, the sum, the longest, and a histogram for percentiles.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Times are kept to one significant decimal digit or better (the histogram's buckets are at most 1/16 wide).
const DIGITS: u8 = 1;

/// One bucket of a histogram of times. In JSON a pair of its two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Bucket {
    /// Longest time that the bucket counts, in nanoseconds.
    pub up_to_ns: u64,
    /// Number of times in the bucket.
    pub count: u64,
}

impl From<(u64, u64)> for Bucket {
    fn from((up_to_ns, count): (u64, u64)) -> Self {
        Self { up_to_ns, count }
    }
}

impl From<Bucket> for (u64, u64) {
    fn from(bucket: Bucket) -> Self {
        (bucket.up_to_ns, bucket.count)
    }
}

/// A [`Tally`] as plain data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TallyRecord {
    /// Number of events, those without a time included.
    pub count: u64,
    /// Sum of their times, in nanoseconds.
    pub ns: u64,
    /// The longest time, in nanoseconds.
    pub max_ns: u64,
    /// Histogram of the times, shortest first.
    pub histogram: Vec<Bucket>,
}

/// Counts events and their times.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Number of events, those without a time included.
    pub count: u64,
    /// Sum of their times, in nanoseconds.
    pub ns: u64,
    /// The longest time, in nanoseconds.
    pub max_ns: u64,
    /// `None` if it could not be made.
    histogram: Option<Histogram<u32>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { count: 0, ns: 0, max_ns: 0, histogram: Histogram::new(DIGITS).ok() }
    }
}

impl Tally {
    /// Counts an event that took `ns` nanoseconds.
    pub fn add(&mut self, ns: u64) {
        self.count += 1;
        self.add_time(ns);
    }

    /// Adds the time of an event that is counted already.
    pub fn add_time(&mut self, ns: u64) {
        self.ns = self.ns.saturating_add(ns);
        self.max_ns = self.max_ns.max(ns);
        if let Some(histogram) = &mut self.histogram {
            // Fails for values beyond its range only, and its range grows.
            let _ = histogram.record(ns);
        }
    }

    /// Returns the tally as plain data.
    #[must_use]
    pub fn record(&self) -> TallyRecord {
        let buckets = self.histogram.iter().flat_map(Histogram::iter_recorded);
        let bucket = |step: hdrhistogram::iterators::IterationValue<u32>| Bucket {
            up_to_ns: step.value_iterated_to(),
            count: step.count_since_last_iteration(),
        };
        let histogram = buckets.map(bucket).collect();
        TallyRecord { count: self.count, ns: self.ns, max_ns: self.max_ns, histogram }
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
        let record = tally.record();
        assert_eq!((record.count, record.ns, record.max_ns), (100, 99_000 + 50_000, 50_000));
        assert_eq!(record.histogram.iter().map(|bucket| bucket.count).sum::<u64>(), 100);
        assert!(record.histogram[0].up_to_ns.abs_diff(1_000) <= 63, "{record:?}");
        let json = serde_json::to_string(&record.histogram).expect("JSON");
        assert!(json.starts_with("[[1") && json.contains(",99],["), "{json}");
        tally.add(u64::MAX);
        assert_eq!(tally.ns, u64::MAX, "hostile times do not wrap");
    }
}
