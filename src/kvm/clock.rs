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
        // 3 ticks a nanosecond.
        let start = Anchor { tsc: 5_000, at: Instant::now() };
        let end = Anchor { tsc: 5_000 + 60_000_000, at: start.at + Duration::from_millis(20) };
        assert_eq!(start.ns_until(5_000 + 15_000_000, &end), 5_000_000);
        assert_eq!(start.ns_until(5_000 + 90_000_000, &end), 30_000_000, "behind the end");
        assert_eq!(end.ns_until(start.tsc, &end), 0);
        assert_eq!((start.ns_between(&end), end.ns_between(&start)), (20_000_000, 0));
    }

    #[test]
    fn both_clocks_of_a_moment_go_on() {
        let start = Anchor::now();
        std::thread::sleep(Duration::from_millis(2));
        let end = Anchor::now();
        assert!(start.ns_between(&end) >= 2_000_000);
        assert!(end.tsc > start.tsc && start.ns_until(end.tsc, &end) == start.ns_between(&end));
    }
}
