//! How many of what in each millisecond, in bounded memory: when a run gets long, the steps get wider.

use std::collections::BTreeMap;

/// Steps that are kept apart.
const MAX_STEPS: u64 = 4096;
const MILLISECOND_NS: u64 = 1_000_000;

/// Counts over time, by key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeline<K: Ord> {
    /// How wide a step is, in nanoseconds.
    step_ns: u64,
    counts: BTreeMap<(u64, K), u64>,
}

impl<K: Ord> Default for Timeline<K> {
    fn default() -> Self {
        Self { step_ns: MILLISECOND_NS, counts: BTreeMap::new() }
    }
}

impl<K: Ord + Copy> Timeline<K> {
    /// Counts one at `at_ns` nanoseconds from the start.
    pub fn add(&mut self, at_ns: u64, key: K) {
        while at_ns / self.step_ns >= MAX_STEPS {
            self.widen();
        }
        *self.counts.entry((at_ns / self.step_ns, key)).or_default() += 1;
    }

    fn widen(&mut self) {
        self.step_ns *= 2;
        let old = std::mem::take(&mut self.counts);
        for ((step, key), count) in old {
            *self.counts.entry((step / 2, key)).or_default() += count;
        }
    }

    /// Adds another timeline with the same start.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        while self.step_ns < other.step_ns {
            self.widen();
        }
        while other.step_ns < self.step_ns {
            other.widen();
        }
        for (place, count) in other.counts {
            *self.counts.entry(place).or_default() += count;
        }
    }

    /// How wide a step is, in nanoseconds.
    #[must_use]
    pub fn step_ns(&self) -> u64 {
        self.step_ns
    }

    /// Steps, keys and counts, in this order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, K, u64)> {
        self.counts.iter().map(|((step, key), count)| (*step, *key, *count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_gets_wider_steps_and_loses_nothing() {
        let mut line = Timeline::default();
        (0..20_000_u64).for_each(|ms| line.add(ms * MILLISECOND_NS, 'a'));
        line.add(u64::MAX / 2, 'b');
        assert!(line.iter().all(|(step, _, _)| step < MAX_STEPS));
        assert_eq!(line.iter().map(|(_, _, count)| count).sum::<u64>(), 20_001);
        let mut short = Timeline::default();
        short.add(5, 'a');
        short.merge(&line);
        assert_eq!((short.step_ns(), short.iter().map(|(_, _, count)| count).sum::<u64>()), (line.step_ns(), 20_002));
    }
}
