//! What is measured at an exit beyond its count. The run loop is generic over it and chooses once, when the vCPU's
//! thread starts, so that what is off costs nothing.

use super::reason::ExitReason;
use std::time::Instant;

/// Measures exits.
pub trait Profiler {
    /// Taken before an exit is handled.
    type Stamp: Copy;

    /// Before the exit is handled.
    fn stamp(&self) -> Self::Stamp;

    /// After it has been handled.
    fn record(&mut self, reason: ExitReason, stamp: Self::Stamp);

    /// Nanoseconds spent in the handler, by reason, where they were measured.
    fn handler_ns(&self) -> Option<[u64; ExitReason::COUNT]>;
}

/// Measures nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProfile;

impl Profiler for NoProfile {
    type Stamp = ();

    fn stamp(&self) {}

    fn record(&mut self, _reason: ExitReason, (): ()) {}

    fn handler_ns(&self) -> Option<[u64; ExitReason::COUNT]> {
        None
    }
}

/// Measures the time from KVM_RUN's return until the exit has been answered.
#[derive(Clone, Debug)]
pub struct HandlerTime {
    ns: [u64; ExitReason::COUNT],
}

impl Default for HandlerTime {
    fn default() -> Self {
        Self { ns: [0; ExitReason::COUNT] }
    }
}

impl Profiler for HandlerTime {
    type Stamp = Instant;

    fn stamp(&self) -> Instant {
        Instant::now()
    }

    fn record(&mut self, reason: ExitReason, stamp: Instant) {
        self.ns[reason.index()] += u64::try_from(stamp.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    fn handler_ns(&self) -> Option<[u64; ExitReason::COUNT]> {
        Some(self.ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_takes_no_space_and_on_adds_up() {
        assert_eq!(size_of::<NoProfile>(), 0);
        assert_eq!(size_of::<<NoProfile as Profiler>::Stamp>(), 0);
        let mut time = HandlerTime::default();
        let stamp = time.stamp();
        std::thread::sleep(std::time::Duration::from_millis(2));
        time.record(ExitReason::PioIn, stamp);
        let ns = time.handler_ns().expect("measured");
        assert!(ns[ExitReason::PioIn.index()] >= 2_000_000);
        assert_eq!(ns[ExitReason::PioOut.index()], 0);
    }
}
