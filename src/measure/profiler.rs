//! What is measured at an exit beyond its count. The run loop is generic over it and chooses once, when the vCPU's
//! thread starts, so that what is off costs nothing.

use super::flight_recorder::ExitRecord;
use super::user_profile::UserProfile;
use crate::exit::ExitReason;
use crate::exit::Route;
use std::time::Instant;

/// Measures exits.
pub trait Profiler {
    /// Taken before an exit is handled.
    type Stamp: Copy;

    /// Before the exit is handled.
    fn stamp(&self) -> Self::Stamp;

    /// After it has been handled. By value: a reference would make the compiler keep a copy even where nobody looks at it.
    fn record(&mut self, exit: ExitRecord, route: Route, stamp: Self::Stamp);

    /// Before the guest is entered (again).
    fn enter(&mut self);

    /// What was measured.
    fn finish(self) -> Measured;
}

/// What a profiler measured.
#[derive(Clone, Debug, Default)]
pub enum Measured {
    /// Nothing.
    #[default]
    Nothing,
    /// Nanoseconds in the handler, by reason.
    HandlerTime(Box<[u64; ExitReason::COUNT]>),
    /// All causes.
    Profile(Box<UserProfile>),
}

/// Measures nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProfile;

impl Profiler for NoProfile {
    type Stamp = ();

    #[inline(always)]
    fn stamp(&self) {}

    #[inline(always)]
    fn record(&mut self, _exit: ExitRecord, _route: Route, (): ()) {}

    #[inline(always)]
    fn enter(&mut self) {}

    #[inline(always)]
    fn finish(self) -> Measured {
        Measured::Nothing
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

    fn record(&mut self, exit: ExitRecord, _route: Route, stamp: Instant) {
        self.ns[exit.reason.index()] += u64::try_from(stamp.elapsed().as_nanos()).unwrap_or(u64::MAX);
    }

    fn enter(&mut self) {}

    fn finish(self) -> Measured {
        Measured::HandlerTime(Box::new(self.ns))
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
        let Measured::HandlerTime(ns) = time.finish() else { panic!("measured") };
        assert!(ns[ExitReason::PioIn.index()] >= 2_000_000);
        assert_eq!(ns[ExitReason::PioOut.index()], 0);
    }
}
