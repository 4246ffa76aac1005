//! The time-stamp counter (TSC): the cheapest clock of the processor, for the flight recorder.

use std::time::Instant;

/// Reads the time-stamp counter (SDM vol. 2B, RDTSC). It may differ by a few ticks between processors.
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86_64 processor and only reads; Linux allows it to programs unless one asks for
    // the opposite by prctl, which nothing here does.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A moment on the TSC and on the monotonic clock, for converting ticks to time.
#[derive(Clone, Copy, Debug)]
pub struct Anchor {
    tsc: u64,
    at: Instant,
}

impl Anchor {
    /// Reads the TSC and the monotonic clock, one right after the other.
    #[must_use]
    pub fn now() -> Self {
        Self { tsc: tsc(), at: Instant::now() }
    }

    /// Nanoseconds from this moment to `later`, by the monotonic clock.
    #[must_use]
    pub fn ns_between(&self, later: &Self) -> u64 {
        u64::try_from(later.at.saturating_duration_since(self.at).as_nanos()).unwrap_or(u64::MAX)
    }

    /// Nanoseconds from this moment to the TSC value `tsc`, at the rate of both clocks between this moment and `end`. Returns 0
    /// for a value from before.
    #[must_use]
    pub fn ns_until(&self, tsc: u64, end: &Self) -> u64 {
        let ticks = u128::from(end.tsc.saturating_sub(self.tsc)).max(1);
        let ns = end.at.saturating_duration_since(self.at).as_nanos();
        let since = u128::from(tsc.saturating_sub(self.tsc));
        u64::try_from(since * ns / ticks).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ticks_are_converted_to_nanoseconds() {
        let start = Anchor::now();
        std::thread::sleep(Duration::from_millis(10));
        let middle = tsc();
        std::thread::sleep(Duration::from_millis(10));
        let end = Anchor::now();
        let ns = start.ns_until(middle, &end);
        assert!((9_000_000..200_000_000).contains(&ns), "{ns}");
        assert_eq!(end.ns_until(start.tsc, &end), 0);
    }
}
