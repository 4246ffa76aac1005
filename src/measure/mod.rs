//! What is written down about exits: counters, the flight recorder, profiles of userspace exits, and VM exits from KVM's
//! tracepoints. [`record::RunRecord`] is what is left of them when a run has ended.

pub mod clusters;
pub mod counters;
pub mod flight_recorder;
pub mod memory_use;
pub mod profiler;
pub mod record;
mod record_check;
pub mod tally;
pub mod timeline;
pub mod tracer;
pub mod user_profile;

pub use counters::{Accesses, Counters};
pub use flight_recorder::{ExitRecord, FlightRecorder, FlightRecorders};
pub use memory_use::{MemoryFiles, MemoryUse};
pub use profiler::{HandlerTime, NoProfile, Profiler};
pub use record::{Measured, MenuEntry, RunRecord, VcpuRecord};
pub use record_check::{RecordError, check_totals, check_trace};
pub use user_profile::UserProfile;

/// Memory that the profile of a vCPU takes at most, in bytes: some 49,000 causes of VM exits and userspace exits. Each has a histogram, of 1.2 KiB
/// where its longest exit took 1 ms, 1.9 KiB for 1 s.
pub const MAX_PROFILE_BYTES: u64 = 128 << 20;

/// Returns the CPU time that this process has used, in nanoseconds.
#[must_use]
pub fn cpu_time_ns() -> u64 {
    nanoseconds(rustix::time::ClockId::ProcessCPUTime)
}

/// Returns the time of CLOCK_MONOTONIC in nanoseconds, which all processes and perf's records share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    nanoseconds(rustix::time::ClockId::Monotonic)
}

fn nanoseconds(clock: rustix::time::ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec).saturating_mul(1_000_000_000).saturating_add(part(now.tv_nsec))
}
