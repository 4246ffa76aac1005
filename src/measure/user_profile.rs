//! The userspace exits of one vCPU by cause: reason, address, width, and the guest's instruction.

use super::flight_recorder::ExitRecord;
use super::profiler::{Measured, Profiler};
use super::tally::Tally;
use super::timeline::Timeline;
use crate::exit::ExitReason;
use crate::exit::handler::{BusKind, Route};
use hwvmm_arch::layout::{PORT_MARK, PORT_POST, UARTS};
use std::collections::HashMap;
use std::time::Instant;

/// Causes that are told apart; a guest that makes more gets them counted without their instruction, then without their
/// address.
const MAX_CAUSES: usize = 8192;
/// Marks that are kept.
const MAX_MARKS: usize = 1024;
/// Where Linux' half of the address space starts.
const HIGH_HALF: u64 = 1 << 63;

/// Why a vCPU came back to user space, as exactly as KVM tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserCause {
    /// The reason.
    pub reason: ExitReason,
    /// Who answered.
    pub route: Route,
    /// Port, gpa, MSR or hypercall number; 0 where it has none or there were too many.
    pub address: u64,
    /// Bytes of one item.
    pub size: u8,
    /// The guest's instruction.
    pub rip: Option<u64>,
    /// Its privilege level.
    pub cpl: Option<u8>,
}

/// The times of one cause.
#[derive(Clone, Debug, Default)]
pub struct UserTally {
    /// From KVM_RUN's return until KVM_RUN is called again.
    pub outside: Tally,
    /// Of this, nanoseconds in hwvmm's handler.
    pub handler_ns: u64,
}

/// A moment worth a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// The first exit of an instruction in the kernel's half of the address space.
    Kernel,
    /// The first byte on a UART.
    Console,
    /// The first exit of a program (CPL 3).
    User,
    /// A write to port 0x80.
    Post(u8),
    /// A write to the mark port.
    Guest(u32),
}

/// The userspace exits of one vCPU.
#[derive(Clone, Debug)]
pub struct UserProfile {
    start: Instant,
    causes: HashMap<UserCause, UserTally>,
    timeline: Timeline<ExitReason>,
    marks: Vec<(u64, Mark)>,
    pending: Option<(UserCause, Instant)>,
}

impl UserProfile {
    /// Nothing yet; times count from `start`.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self { start, causes: HashMap::new(), timeline: Timeline::default(), marks: Vec::new(), pending: None }
    }

    /// Causes and their times.
    pub fn causes(&self) -> impl Iterator<Item = (&UserCause, &UserTally)> {
        self.causes.iter()
    }

    /// Exits over time.
    #[must_use]
    pub fn timeline(&self) -> &Timeline<ExitReason> {
        &self.timeline
    }

    /// Marks, with nanoseconds from the start.
    #[must_use]
    pub fn marks(&self) -> &[(u64, Mark)] {
        &self.marks
    }

    /// The key for a cause, coarser where there are too many already.
    fn room_for(&self, cause: UserCause) -> UserCause {
        if self.causes.len() < MAX_CAUSES || self.causes.contains_key(&cause) {
            return cause;
        }
        let anywhere = UserCause { rip: None, cpl: None, ..cause };
        if self.causes.len() < 2 * MAX_CAUSES || self.causes.contains_key(&anywhere) {
            return anywhere;
        }
        let route = match cause.route {
            Route::Unmapped(bus, _) => Route::Unmapped(bus, 0),
            Route::Msr(_) => Route::Msr(0),
            Route::Slot(..) | Route::None => cause.route,
        };
        UserCause { address: 0, route, size: 0, ..anywhere }
    }

    fn mark(&mut self, at_ns: u64, mark: Mark) {
        if self.marks.len() < MAX_MARKS {
            self.marks.push((at_ns, mark));
        }
    }

    fn mark_first(&mut self, at_ns: u64, mark: Mark) {
        if !self.marks.iter().any(|(_, known)| *known == mark) {
            self.mark(at_ns, mark);
        }
    }

    fn look_for_marks(&mut self, at_ns: u64, exit: &ExitRecord) {
        if exit.rip.is_some_and(|rip| rip >= HIGH_HALF) {
            self.mark_first(at_ns, Mark::Kernel);
        }
        if exit.cpl == Some(3) {
            self.mark_first(at_ns, Mark::User);
        }
        if exit.reason != ExitReason::PioOut {
            return;
        }
        let port = exit.detail.address;
        if port == u64::from(PORT_POST) {
            self.mark(at_ns, Mark::Post(exit.detail.data.to_le_bytes()[0]));
        } else if port == u64::from(PORT_MARK) {
            self.mark(at_ns, Mark::Guest(u32::try_from(exit.detail.data & 0xffff_ffff).unwrap_or(0)));
        } else if UARTS.iter().any(|uart| u64::from(uart.port) == port) {
            self.mark_first(at_ns, Mark::Console);
        }
    }
}

fn nanoseconds(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

impl Profiler for UserProfile {
    type Stamp = Instant;

    fn stamp(&self) -> Instant {
        Instant::now()
    }

    fn record(&mut self, exit: ExitRecord, route: Route, stamp: Instant) {
        let at_ns = nanoseconds(self.start, stamp);
        self.timeline.add(at_ns, exit.reason);
        self.look_for_marks(at_ns, &exit);
        let size = u8::try_from(exit.detail.size).unwrap_or(u8::MAX);
        let address = exit.detail.address;
        let cause = UserCause { reason: exit.reason, route, address, size, rip: exit.rip, cpl: exit.cpl };
        let cause = self.room_for(cause);
        let tally = self.causes.entry(cause).or_default();
        tally.outside.count += 1;
        tally.handler_ns += nanoseconds(stamp, Instant::now());
        self.pending = Some((cause, stamp));
    }

    fn enter(&mut self) {
        if let Some((cause, stamp)) = self.pending.take()
            && let Some(tally) = self.causes.get_mut(&cause)
        {
            tally.outside.add_time(nanoseconds(stamp, Instant::now()));
        }
    }

    fn finish(mut self) -> Measured {
        // The last exit was never followed by an entry: it took until now.
        self.enter();
        Measured::Profile(Box::new(self))
    }
}

/// The bus and address of a route's unmapped access.
impl UserCause {
    /// Whether nobody answered.
    #[must_use]
    pub fn is_unmapped(&self) -> bool {
        matches!(self.route, Route::Unmapped(BusKind::Pio | BusKind::Mmio, _))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::flight_recorder::Detail;

    fn exit(reason: ExitReason, address: u64, rip: u64) -> ExitRecord {
        let detail = Detail { address, data: 0x41, size: 1, count: 1 };
        ExitRecord { reason, detail, rip: Some(rip), cpl: Some(0), tsc: 0 }
    }

    #[test]
    fn every_exit_has_one_cause_and_its_times() {
        let mut profile = UserProfile::new(Instant::now());
        for rip in [0x1000, 0x1000, 0xffff_ffff_8100_0000] {
            profile.enter();
            let stamp = profile.stamp();
            profile.record(exit(ExitReason::PioOut, 0x3f8, rip), Route::Slot(BusKind::Pio, 0), stamp);
        }
        let Measured::Profile(profile) = profile.finish() else { panic!("a profile") };
        let mut counts: Vec<_> = profile.causes().map(|(c, t)| (c.rip, t.outside.count, t.outside.buckets())).collect();
        counts.sort();
        assert_eq!((counts[0].0, counts[0].1), (Some(0x1000), 2));
        assert!(counts.iter().all(|(_, count, buckets)| buckets.iter().map(|(_, n)| n).sum::<u64>() == *count));
        let marks: Vec<_> = profile.marks().iter().map(|(_, mark)| *mark).collect();
        assert_eq!(marks, [Mark::Console, Mark::Kernel]);
    }

    #[test]
    fn a_guest_cannot_make_a_profile_grow_without_end() {
        let mut profile = UserProfile::new(Instant::now());
        for n in 0..100_000_u64 {
            let stamp = profile.stamp();
            profile.record(exit(ExitReason::MmioRead, n << 3, n), Route::Unmapped(BusKind::Mmio, n << 3), stamp);
        }
        assert!(profile.causes.len() <= 2 * MAX_CAUSES + 1);
        assert_eq!(profile.causes().map(|(_, tally)| tally.outside.count).sum::<u64>(), 100_000);
    }

    #[test]
    fn the_guest_marks_its_own_moments() {
        let mut profile = UserProfile::new(Instant::now());
        for (port, data) in [(u64::from(PORT_POST), 0x42), (u64::from(PORT_MARK), 0x1234_5678)] {
            let mut snapshot = exit(ExitReason::PioOut, port, 0);
            snapshot.detail.data = data;
            profile.record(snapshot, Route::None, Instant::now());
        }
        let marks: Vec<_> = profile.marks().iter().map(|(_, mark)| *mark).collect();
        assert_eq!(marks, [Mark::Post(0x42), Mark::Guest(0x1234_5678)]);
    }
}
