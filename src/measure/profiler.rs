//! What is measured at an exit besides its count. The run loop is generic over it, and the choice is made once, when the
//! vCPU's thread starts: what is off costs nothing.

use super::flight_recorder::ExitRecord;
use crate::exit::{ExitReason, Route};
use std::collections::BTreeMap;
use std::time::Instant;

/// A profiler: it measures the exits of one vCPU.
pub trait Profiler {
    /// What is noted before an exit is handled.
    type Stamp: Copy;
    /// What is left at the end: plain data.
    type Measured;

    /// Called after KVM_RUN has returned, before the exit is handled.
    fn stamp(&self) -> Self::Stamp;

    /// Called after the exit has been handled. By value: for a reference the compiler would keep a copy even where it is unused.
    fn record(&mut self, exit: ExitRecord, route: Route, stamp: Self::Stamp);

    /// Called before each KVM_RUN.
    fn enter(&mut self);

    /// Ends the measurement and returns its result.
    fn finish(self) -> Self::Measured;
}

/// The profiler that measures nothing. It has no size, and its calls compile to nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProfile;

impl Profiler for NoProfile {
    type Stamp = ();
    type Measured = ();

    #[inline(always)]
    fn stamp(&self) {}

    #[inline(always)]
    fn record(&mut self, _exit: ExitRecord, _route: Route, (): ()) {}

    #[inline(always)]
    fn enter(&mut self) {}

    #[inline(always)]
    fn finish(self) {}
}

/// Measures the time from the return of KVM_RUN until the exit has been handled, by reason.
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
    /// Nanoseconds in the handler, by reason; reasons without an exit are left out.
    type Measured = BTreeMap<ExitReason, u64>;

    fn stamp(&self) -> Instant {
        Instant::now()
    }

    fn record(&mut self, exit: ExitRecord, _route: Route, stamp: Instant) {
        self.ns[exit.reason.index()] += u64::try_from(stamp.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    fn enter(&mut self) {}

    fn finish(self) -> BTreeMap<ExitReason, u64> {
        let times = ExitReason::ALL.iter().map(|reason| (*reason, self.ns[reason.index()]));
        times.filter(|(_, ns)| *ns > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::flight_recorder::Detail;

    #[test]
    fn off_takes_no_space_and_on_adds_up() {
        assert_eq!(size_of::<NoProfile>(), 0);
        assert_eq!(size_of::<<NoProfile as Profiler>::Stamp>(), 0);
        let mut time = HandlerTime::default();
        let stamp = time.stamp();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let exit = ExitRecord { reason: ExitReason::PioIn, detail: Detail::default(), rip: None, cpl: None, tsc: 0 };
        time.record(exit, Route::None, stamp);
        let ns = time.finish();
        assert!(ns[&ExitReason::PioIn] >= 2_000_000);
        assert!(!ns.contains_key(&ExitReason::PioOut));
    }
}
