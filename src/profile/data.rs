//! A profile as data: what `--profile-out` writes and `hwvmm report` reads.
//!
//! The format is JSON with `"format": "hwvmm-profile"` and a version. The version changes when a field changes its
//! meaning or goes; new fields may come without. All counts are exact; times are nanoseconds; histograms are pairs of (upper
//! end of a bucket in nanoseconds, how many).

use super::kinds::{AddressSpace, CodeMode, ExitClass, PhaseName};
use crate::measure::MemoryUse;
use crate::measure::record::VirtioQueue;
use crate::measure::tally::Bucket;
pub use crate::measure::user_profile::Mark;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the file says it is.
pub const FORMAT: &str = "hwvmm-profile";
/// The version of the format.
pub const VERSION: u32 = 1;
/// Where Linux puts modules (Documentation/arch/x86/x86_64/mm.rst), whose symbols are not in the kernel's image.
const MODULES: u64 = 0xffff_ffff_c000_0000;

/// A profile: what a run did, and what its exits cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The name of the format: [`FORMAT`].
    pub format: String,
    /// The version of the format: [`VERSION`].
    pub version: u32,
    /// The version of hwvmm that wrote it.
    pub hwvmm: String,
    /// How the run ended, in words.
    pub end: String,
    /// The exit status of the run.
    pub status: u8,
    /// The guest that ran.
    pub guest: Guest,
    /// The host that it ran on.
    pub host: Host,
    /// How often the guest was started (--on-reboot=restart); all else is of the last start.
    pub starts: u32,
    /// How long the guest ran.
    pub ran_ns: u64,
    /// CPU time of hwvmm until the guest ran first.
    pub startup_cpu_ns: u64,
    /// Parts of the run, in order; the first ends at 0, when the guest first ran.
    pub phases: Vec<Phase>,
    /// The marks on the timeline, in order.
    pub marks: Vec<Mark>,
    /// VM exits: the hardware's, by KVM's tracepoints. `None`: they were not traced.
    pub vm_exits: Option<Exits>,
    /// Userspace exits: KVM_RUN returned to hwvmm.
    pub userspace_exits: Exits,
    /// Exits that were avoided; `None` where none were followed in software (--tune exit-clusters).
    #[serde(default)]
    pub avoided: Option<Avoided>,
    /// KVM's statistics, of the machine and all vCPUs together.
    pub kvm: BTreeMap<String, u64>,
    /// Queues of virtio devices.
    pub virtio: Vec<VirtioQueue>,
    /// Memory at the end.
    pub memory: Option<MemoryUse>,
    /// Data that could not be collected, and how to get it.
    pub missing: Vec<String>,
    /// What exits of each kind cost on this host, by `hwvmm bench exits`, where it was measured.
    #[serde(default)]
    pub costs: BTreeMap<String, f64>,
}

/// The guest of a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// The path of the kernel.
    pub kernel: String,
    /// The command line of the kernel.
    pub cmdline: String,
    /// How it was loaded and entered.
    pub boot: String,
    /// The number of vCPUs.
    pub vcpus: usize,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Where the names of functions come from.
    pub symbols: Option<String>,
    /// By how much its kernel was moved (KASLR).
    pub slide: u64,
}

/// The host of a profile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The host kernel's release.
    pub kernel: String,
    /// "svm" or "vmx", where VM exits were traced.
    pub isa: Option<String>,
}

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// Name of the phase.
    pub name: PhaseName,
    /// Start in nanoseconds since the guest first ran; for those before the guest ([`PhaseName::is_before_the_guest`]) since hwvmm's start.
    pub start_ns: u64,
    /// End, counted as the start.
    pub end_ns: u64,
}

impl Phase {
    /// Returns the length in nanoseconds.
    #[must_use]
    pub fn length_ns(&self) -> u64 {
        self.end_ns.saturating_sub(self.start_ns)
    }
}

/// Exits of one of the two sorts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Exits {
    /// The number of exits of all reasons.
    pub total: u64,
    /// Records that were lost: so many exits more there were at most.
    pub lost: u64,
    /// Exits that KVM answered without a trace.
    pub untraced: u64,
    /// The number of exits by reason.
    pub by_reason: BTreeMap<String, u64>,
    /// The number of exits of each vCPU, in vCPU order.
    pub by_vcpu: Vec<u64>,
    /// The exits by cause, in descending order of time.
    pub causes: Vec<Cause>,
    /// The number of exits over time.
    pub timeline: Timeline,
}

/// Who made the guest exit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// The reason: as in KVM_EXIT_*, or the manual's name of the exit code.
    pub reason: String,
    /// Its kind, the same on all processors.
    pub class: ExitClass,
    /// What `address` is a number of; `None` for an exit without an address.
    pub space: Option<AddressSpace>,
    /// Port, gpa, MSR index, CPUID leaf or hypercall number.
    pub address: Option<u64>,
    /// Bytes of an item, for ports and memory.
    pub size: Option<u8>,
    /// True for a write, false for a read, `None` where there is no direction.
    pub write: Option<bool>,
    /// The device, or the register's name.
    pub device: Option<String>,
    /// The guest's instruction; `None` where there were too many to tell apart.
    pub rip: Option<u64>,
    /// The kernel's function it is in.
    pub function: Option<String>,
    /// Bytes from the function's start.
    pub offset: Option<u64>,
    /// Whose instruction it is.
    pub mode: CodeMode,
    /// Exits by index of the vCPU.
    pub by_vcpu: BTreeMap<usize, u64>,
    /// The number of exits.
    pub count: u64,
    /// From the exit until the guest was entered again, together. For HLT this is sleep.
    pub time_ns: u64,
    /// The longest time of one exit, in nanoseconds.
    pub max_ns: u64,
    /// Of the time, what hwvmm's handler took (userspace exits).
    pub handler_ns: u64,
    /// Histogram of the times.
    pub histogram: Vec<Bucket>,
}

/// Exits that were avoided: accesses that hwvmm answered while it interpreted the guest after an exit. They are no exits.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Avoided {
    /// The accesses.
    pub total: u64,
    /// The exits that were followed.
    pub clusters: u64,
    /// The instructions that were interpreted.
    pub instructions: u64,
    /// The time that took, with what devices did in it.
    pub time_ns: u64,
    /// The accesses by port and instruction, most first; without times. The rarest may be missing.
    pub causes: Vec<Cause>,
    /// Why the interpreter stopped, and before which instruction, most first: `reason` is that of the end. The rarest may be missing.
    pub ends: Vec<Cause>,
}

/// Counts of exits over time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Length of a step in nanoseconds.
    pub step_ns: u64,
    /// Exits by step, then by key.
    pub counts: Vec<TimelineStep>,
}

/// The exits of one key in one step of a timeline. In JSON a list of its three fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, String, u64)", into = "(u64, String, u64)")]
pub struct TimelineStep {
    /// Index of the step.
    pub step: u64,
    /// Reason of userspace exits, class of VM exits.
    pub key: String,
    /// The number of exits in the step.
    pub count: u64,
}

impl From<(u64, String, u64)> for TimelineStep {
    fn from((step, key, count): (u64, String, u64)) -> Self {
        Self { step, key, count }
    }
}

impl From<TimelineStep> for (u64, String, u64) {
    fn from(step: TimelineStep) -> Self {
        (step.step, step.key, step.count)
    }
}

impl Cause {
    /// What it was about, for people: `0x3f8 write UART 1`.
    #[must_use]
    pub fn what(&self) -> String {
        let direction = match self.write {
            Some(true) => " write",
            Some(false) => " read",
            None => "",
        };
        match (&self.device, self.space, self.address) {
            (
                Some(name),
                Some(AddressSpace::Vector | AddressSpace::ControlRegister | AddressSpace::DebugRegister),
                _,
            ) => {
                format!("{name}{direction}")
            }
            (Some(device), Some(_), Some(address)) => format!("{device} {address:#x}{direction}"),
            (Some(device), ..) => format!("{device}{direction}"),
            (None, Some(AddressSpace::Port | AddressSpace::Gpa), Some(address)) => {
                format!("(unmapped) {address:#x}{direction}")
            }
            (None, Some(space), Some(address)) => format!("{space} {address:#x}{direction}"),
            (None, _, _) => direction.trim().to_owned(),
        }
    }

    /// Where it came from, for people: `serial8250_console_putchar+0x12`.
    #[must_use]
    pub fn place(&self) -> String {
        match (&self.function, self.offset, self.rip, self.mode) {
            (Some(function), Some(offset), _, _) => format!("{function}+{offset:#x}"),
            (_, _, None, _) => "(many places)".into(),
            (_, _, Some(rip), CodeMode::User) => format!("user {rip:#x}"),
            (_, _, Some(rip), _) => format!("{rip:#x}"),
        }
    }

    /// The function alone, or whose code it is.
    #[must_use]
    pub fn function(&self) -> String {
        match (&self.function, self.rip, self.mode) {
            (Some(function), _, _) => function.clone(),
            (None, _, CodeMode::User) => "user space".into(),
            (None, None, _) => "(many places)".into(),
            (None, Some(MODULES..), CodeMode::Kernel) => "(a module)".into(),
            (None, Some(rip), _) => format!("{rip:#x}"),
        }
    }
}

impl Exits {
    /// Time outside of the guest, without what it slept in HLT.
    #[must_use]
    pub fn busy_ns(&self) -> u64 {
        self.causes
            .iter()
            .filter(|cause| cause.class != ExitClass::Hlt)
            .fold(0, |sum, cause| sum.saturating_add(cause.time_ns))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::measure::user_profile::MarkKind;

    /// A small profile with one cause of each sort.
    pub(crate) fn sample() -> Profile {
        let cause = Cause {
            reason: "pio_out".into(),
            class: ExitClass::Pio,
            space: Some(AddressSpace::Port),
            address: Some(0x3f8),
            size: Some(1),
            write: Some(true),
            device: Some("UART 1".into()),
            rip: Some(0xffff_ffff_8123_4567),
            function: Some("io_serial_out".into()),
            offset: Some(0x16),
            mode: CodeMode::Kernel,
            by_vcpu: BTreeMap::from([(0, 300)]),
            count: 300,
            time_ns: 3_000_000,
            max_ns: 50_000,
            handler_ns: 600_000,
            histogram: [(9_983, 290), (51_199, 10)].map(Bucket::from).into(),
        };
        let exits = |cause: Cause| Exits {
            total: cause.count,
            by_reason: BTreeMap::from([(cause.reason.clone(), cause.count)]),
            by_vcpu: vec![cause.count],
            timeline: Timeline {
                step_ns: 1_000_000,
                counts: [(0, 100), (7, 200)].map(|(step, count)| (step, cause.class.to_string(), count).into()).into(),
            },
            causes: vec![cause],
            ..Exits::default()
        };
        let cpuid = Cause {
            reason: "CPUID".into(),
            class: ExitClass::Cpuid,
            space: Some(AddressSpace::Leaf),
            address: Some(0x4000_0000),
            write: None,
            device: None,
            size: None,
            ..cause.clone()
        };
        Profile {
            format: FORMAT.into(),
            version: VERSION,
            hwvmm: "0.1.0".into(),
            end: "the guest powered off".into(),
            guest: Guest { kernel: "vmlinuz".into(), vcpus: 1, memory_bytes: 256 << 20, ..Guest::default() },
            starts: 1,
            ran_ns: 8_000_000,
            startup_cpu_ns: 9_000_000,
            phases: vec![
                Phase { name: PhaseName::Load, start_ns: 0, end_ns: 9_000_000 },
                Phase { name: PhaseName::Kernel, start_ns: 0, end_ns: 8_000_000 },
            ],
            marks: vec![Mark { name: MarkKind::Console, at_ns: 5_000_000 }],
            vm_exits: Some(exits(cpuid)),
            userspace_exits: exits(cause.clone()),
            avoided: Some(Avoided {
                total: 7_000,
                clusters: 250,
                instructions: 300_000,
                time_ns: 4_500_000,
                causes: vec![Cause { count: 7_000, time_ns: 0, histogram: Vec::new(), ..cause.clone() }],
                ends: vec![Cause {
                    reason: "instruction".into(),
                    class: ExitClass::Other,
                    space: None,
                    device: None,
                    function: Some("console_unlock".into()),
                    count: 250,
                    ..cause
                }],
            }),
            ..Profile::default()
        }
    }
}
