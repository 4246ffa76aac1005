//! The userspace exits of one vCPU by cause: reason, address, width, and the guest's instruction.

use super::flight_recorder::ExitRecord;
use super::profiler::Profiler;
use super::tally::{Tally, TallyRecord};
use super::timeline::Timeline;
use crate::exit::ExitReason;
use crate::exit::handler::Route;
use hwvmm_arch::layout::{PORT_MARK, PORT_POST, UARTS};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::time::Instant;
use thiserror::Error;

/// Causes that are counted one by one. Exits of more causes are counted without their instruction, then without their address.
const MAX_CAUSES: usize = 8192;
/// Causes of a record at most: as many again without their place, and a few without more.
pub(super) const MAX_RECORDED_CAUSES: usize = 2 * MAX_CAUSES + 1024;
/// Marks that are kept, the first ones.
pub(super) const MAX_MARKS: usize = 1024;
/// Where Linux' half of the address space starts.
const HIGH_HALF: u64 = 1 << 63;

/// The cause of userspace exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct UserCause {
    /// Reason of the exit.
    pub reason: ExitReason,
    /// Destination of the exit.
    pub route: Route,
    /// Port, gpa, MSR index or hypercall number; 0 where there is none, or there were too many causes.
    pub address: u64,
    /// Size of one item in bytes.
    pub size: u8,
    /// Address of the instruction; `None` where KVM does not say it, or there were too many causes.
    pub rip: Option<u64>,
    /// Privilege level, 0 to 3.
    pub cpl: Option<u8>,
}

/// The times of one cause.
#[derive(Clone, Debug, Default)]
struct UserTally {
    /// From the return of KVM_RUN until it is called again.
    outside: Tally,
    /// Of this, nanoseconds in hwvmm's exit handler.
    handler_ns: u64,
}

/// What a [`Mark`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum MarkKind {
    /// The first exit of an instruction in the kernel's half of the address space.
    Kernel,
    /// The first byte to a UART.
    Console,
    /// The first exit of a program (CPL 3).
    User,
    /// A POST code: the value written to port 0x80.
    Post(u8),
    /// A mark of the guest's own: the value written to the mark port.
    Guest(u32),
}

/// A text that is no [`MarkKind`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("unknown mark '{0}'; known are: kernel, console, user, POST 0xNN, mark N")]
pub struct UnknownMark(String);

impl fmt::Display for MarkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel => f.write_str("kernel"),
            Self::Console => f.write_str("console"),
            Self::User => f.write_str("user"),
            Self::Post(code) => write!(f, "POST {code:#04x}"),
            Self::Guest(number) => write!(f, "mark {number}"),
        }
    }
}

impl FromStr for MarkKind {
    type Err = UnknownMark;

    fn from_str(text: &str) -> Result<Self, UnknownMark> {
        let known = match text {
            "kernel" => Some(Self::Kernel),
            "console" => Some(Self::Console),
            "user" => Some(Self::User),
            _ => match text.split_once(' ') {
                Some(("POST", code)) => {
                    let digits = code.strip_prefix("0x");
                    digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).map(Self::Post)
                }
                Some(("mark", number)) => number.parse().ok().map(Self::Guest),
                _ => None,
            },
        };
        known.ok_or_else(|| UnknownMark(text.to_owned()))
    }
}

impl From<MarkKind> for String {
    fn from(kind: MarkKind) -> Self {
        kind.to_string()
    }
}

impl TryFrom<String> for MarkKind {
    type Error = UnknownMark;

    fn try_from(text: String) -> Result<Self, UnknownMark> {
        text.parse()
    }
}

/// A moment of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// What the mark is for.
    pub name: MarkKind,
    /// Time since the run's start, in nanoseconds.
    pub at_ns: u64,
}

/// The exits of one [`UserCause`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserCauseRecord {
    /// The cause of the exits.
    pub cause: UserCause,
    /// Number, and times from the return of KVM_RUN until it is called again.
    pub outside: TallyRecord,
    /// Of the times, nanoseconds in hwvmm's exit handler.
    pub handler_ns: u64,
}

/// The userspace exits of a vCPU whose thread has ended. At most some 16,000 causes and 1024 marks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserRecord {
    /// By cause, in the order of [`UserCause`].
    pub causes: Vec<UserCauseRecord>,
    /// The number of exits over time, by reason.
    pub timeline: Timeline<ExitReason>,
    /// Moments of the run, earliest first.
    pub marks: Vec<Mark>,
}

/// Profiles the userspace exits of one vCPU.
#[derive(Clone, Debug)]
pub struct UserProfile {
    start: Instant,
    causes: HashMap<UserCause, UserTally>,
    timeline: Timeline<ExitReason>,
    marks: Vec<Mark>,
    pending: Option<(UserCause, Instant)>,
}

impl UserProfile {
    /// Makes an empty profile. Times count from `start`.
    #[must_use]
    pub fn new(start: Instant) -> Self {
        Self { start, causes: HashMap::new(), timeline: Timeline::default(), marks: Vec::new(), pending: None }
    }

    /// Returns the key to count a cause under: without details where there are too many causes already.
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

    fn mark(&mut self, at_ns: u64, name: MarkKind) {
        if self.marks.len() < MAX_MARKS {
            self.marks.push(Mark { name, at_ns });
        }
    }

    fn mark_first(&mut self, at_ns: u64, name: MarkKind) {
        if !self.marks.iter().any(|known| known.name == name) {
            self.mark(at_ns, name);
        }
    }

    fn look_for_marks(&mut self, at_ns: u64, exit: &ExitRecord) {
        if exit.rip.is_some_and(|rip| rip >= HIGH_HALF) {
            self.mark_first(at_ns, MarkKind::Kernel);
        }
        if exit.cpl == Some(3) {
            self.mark_first(at_ns, MarkKind::User);
        }
        if exit.reason != ExitReason::PioOut {
            return;
        }
        let port = exit.detail.address;
        if port == u64::from(PORT_POST) {
            self.mark(at_ns, MarkKind::Post(exit.detail.data.to_le_bytes()[0]));
        } else if port == u64::from(PORT_MARK) {
            self.mark(at_ns, MarkKind::Guest(u32::try_from(exit.detail.data & 0xffff_ffff).unwrap_or(0)));
        } else if UARTS.iter().any(|uart| u64::from(uart.port) == port) {
            self.mark_first(at_ns, MarkKind::Console);
        }
    }
}

fn nanoseconds(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}

impl Profiler for UserProfile {
    type Stamp = Instant;
    type Measured = UserRecord;

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

    fn finish(mut self) -> UserRecord {
        // The last exit was not followed by an entry: it took until now.
        self.enter();
        let record = |(cause, tally): (&UserCause, &UserTally)| UserCauseRecord {
            cause: *cause,
            outside: tally.outside.record(),
            handler_ns: tally.handler_ns,
        };
        let mut causes: Vec<UserCauseRecord> = self.causes.iter().map(record).collect();
        causes.sort_by_key(|record| record.cause);
        UserRecord { causes, timeline: self.timeline, marks: self.marks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::handler::BusKind;
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
        let record = profile.finish();
        assert_eq!((record.causes[0].cause.rip, record.causes[0].outside.count), (Some(0x1000), 2));
        let in_histogram =
            |record: &UserCauseRecord| record.outside.histogram.iter().map(|bucket| bucket.count).sum::<u64>();
        assert!(record.causes.iter().all(|record| record.outside.count == in_histogram(record)));
        let marks: Vec<_> = record.marks.iter().map(|mark| mark.name).collect();
        assert_eq!(marks, [MarkKind::Console, MarkKind::Kernel]);
    }

    #[test]
    fn a_guest_cannot_make_a_profile_grow_without_end() {
        let mut profile = UserProfile::new(Instant::now());
        for n in 0..100_000_u64 {
            let stamp = profile.stamp();
            profile.record(exit(ExitReason::MmioRead, n << 3, n), Route::Unmapped(BusKind::Mmio, n << 3), stamp);
        }
        assert!(profile.causes.len() <= 2 * MAX_CAUSES + 1);
        let record = profile.finish();
        assert_eq!(record.causes.iter().map(|record| record.outside.count).sum::<u64>(), 100_000);
    }

    #[test]
    fn the_guest_marks_its_own_moments() {
        let mut profile = UserProfile::new(Instant::now());
        for (port, data) in [(u64::from(PORT_POST), 0x42), (u64::from(PORT_MARK), 0x1234_5678)] {
            let mut record = exit(ExitReason::PioOut, port, 0);
            record.detail.data = data;
            profile.record(record, Route::None, Instant::now());
        }
        let marks: Vec<_> = profile.marks.iter().map(|mark| mark.name).collect();
        assert_eq!(marks, [MarkKind::Post(0x42), MarkKind::Guest(0x1234_5678)]);
        let json = serde_json::to_string(&marks).expect("JSON");
        assert_eq!(json, r#"["POST 0x42","mark 305419896"]"#);
        assert_eq!(serde_json::from_str::<Vec<MarkKind>>(&json).expect("marks"), marks);
        assert!(serde_json::from_str::<MarkKind>("\"POST 300\"").is_err());
    }
}
