//! Counts over time, in steps of a millisecond. Memory is bounded: when a run gets long, the steps get wider.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// Steps of a timeline at most.
const MAX_STEPS: u64 = 4096;
const MILLISECOND_NS: u64 = 1_000_000;

/// Counts over time, by key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "Steps<K>", try_from = "Steps<K>")]
#[serde(bound(serialize = "K: Ord + Copy + Serialize", deserialize = "K: Ord + Copy + Deserialize<'de>"))]
pub struct Timeline<K: Ord> {
    /// Length of a step in nanoseconds: a millisecond, doubled some times.
    step_ns: u64,
    counts: BTreeMap<(u64, K), u64>,
}

/// A timeline in JSON.
#[derive(Serialize, Deserialize)]
struct Steps<K> {
    step_ns: u64,
    counts: Vec<(u64, K, u64)>,
}

/// A timeline that no [`Timeline`] makes.
#[derive(Debug, Error)]
enum TimelineError {
    #[error("a timeline with steps of {0} ns: a step is a millisecond times a power of two")]
    StepLength(u64),
    #[error("a timeline with step {0}: the last valid one is {last}", last = MAX_STEPS - 1)]
    Step(u64),
}

impl<K: Ord + Copy> From<Timeline<K>> for Steps<K> {
    fn from(line: Timeline<K>) -> Self {
        let counts = line.iter().map(|TimelineCount { step, key, count }| (step, key, count)).collect();
        Self { step_ns: line.step_ns, counts }
    }
}

impl<K: Ord> TryFrom<Steps<K>> for Timeline<K> {
    type Error = TimelineError;

    fn try_from(steps: Steps<K>) -> Result<Self, TimelineError> {
        let Steps { step_ns, counts } = steps;
        if !step_ns.is_multiple_of(MILLISECOND_NS) || !(step_ns / MILLISECOND_NS).is_power_of_two() {
            return Err(TimelineError::StepLength(step_ns));
        }
        if let Some((step, _, _)) = counts.iter().find(|(step, _, _)| *step >= MAX_STEPS) {
            return Err(TimelineError::Step(*step));
        }
        Ok(Self { step_ns, counts: counts.into_iter().map(|(step, key, count)| ((step, key), count)).collect() })
    }
}

/// The events of one key in one step of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineCount<K> {
    /// Index of the step.
    pub step: u64,
    /// What was counted, such as an exit reason.
    pub key: K,
    /// The number of events in the step.
    pub count: u64,
}

impl<K: Ord> Default for Timeline<K> {
    fn default() -> Self {
        Self { step_ns: MILLISECOND_NS, counts: BTreeMap::new() }
    }
}

impl<K: Ord + Copy> Timeline<K> {
    /// Counts an event at `at_ns` nanoseconds from the start.
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
            let sum = self.counts.entry((step / 2, key)).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    /// Adds the counts of another timeline with the same start.
    pub fn merge(&mut self, other: &Self) {
        let mut other = other.clone();
        while self.step_ns < other.step_ns {
            self.widen();
        }
        while other.step_ns < self.step_ns {
            other.widen();
        }
        for (place, count) in other.counts {
            let sum = self.counts.entry(place).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    /// Returns the length of a step in nanoseconds.
    #[must_use]
    pub fn step_ns(&self) -> u64 {
        self.step_ns
    }

    /// The counts by step, then by key.
    pub fn iter(&self) -> impl Iterator<Item = TimelineCount<K>> {
        self.counts.iter().map(|((step, key), count)| TimelineCount { step: *step, key: *key, count: *count })
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
        assert!(line.iter().all(|count| count.step < MAX_STEPS));
        let total = |line: &Timeline<char>| line.iter().map(|count| count.count).sum::<u64>();
        assert_eq!(total(&line), 20_001);
        let mut short = Timeline::default();
        short.add(5, 'a');
        short.merge(&line);
        assert_eq!((short.step_ns(), total(&short)), (line.step_ns(), 20_002));
        let json = serde_json::to_string(&line).expect("JSON");
        assert_eq!(serde_json::from_str::<Timeline<char>>(&json).expect("a timeline"), line);
    }

    #[test]
    fn a_timeline_that_would_not_end_is_refused() {
        for (json, words) in [
            (r#"{"step_ns":0,"counts":[]}"#, "steps of 0 ns"),
            (r#"{"step_ns":3000000,"counts":[]}"#, "steps of 3000000 ns"),
            (r#"{"step_ns":18446744073709551615,"counts":[]}"#, "a power of two"),
            (r#"{"step_ns":1000000,"counts":[[4096,"a",1]]}"#, "step 4096"),
        ] {
            let error = serde_json::from_str::<Timeline<char>>(json).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
