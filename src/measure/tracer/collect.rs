//! VM exits by cause: what the tracepoints of one vCPU say, put together.

use super::format::{Field, Format, FormatError};
use crate::measure::tally::{Tally, TallyRecord};
use crate::measure::timeline::Timeline;
use hwvmm_arch::exit_code::{AccessKind, Class, Event, EventKind, Isa, RegisterAccess};
use hwvmm_arch::layout::{GpaRange, LAPIC};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// Causes that are counted one by one. Exits of more causes are counted without their instruction, then without their detail.
const MAX_CAUSES: usize = 16384;
/// Causes of a record at most: as many again without their place, and a few without more.
pub(in crate::measure) const MAX_RECORDED_CAUSES: usize = 2 * MAX_CAUSES + 1024;
const HIGH_HALF: u64 = 1 << 63;

/// The access that a VM exit was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmDetail {
    /// None that is known.
    None,
    /// An access to a port.
    Port {
        /// Number of the port.
        port: u16,
        /// Size of one item in bytes.
        size: u8,
        /// A write for OUT, a read for IN.
        kind: AccessKind,
    },
    /// Access to an MSR: RDMSR or WRMSR.
    Msr {
        /// Index of the MSR (ECX); `None` where KVM did not trace it.
        index: Option<u32>,
        /// A write for WRMSR, a read for RDMSR.
        kind: AccessKind,
    },
    /// CPUID, with its leaf (EAX).
    Leaf(u32),
    /// An exception or an interrupt.
    Event(Event),
    /// An access to a control or debug register.
    Register(RegisterAccess),
    /// A nested page fault in guest memory: a first touch, or a page that the host had taken back.
    Memory {
        /// Whether the guest read or wrote.
        kind: AccessKind,
    },
    /// An access outside of guest memory: a nested page fault, or an exit of the processor's virtual APIC.
    Device {
        /// The guest physical address.
        gpa: u64,
        /// Whether the guest read or wrote.
        kind: AccessKind,
    },
}

/// The cause of VM exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmCause {
    /// The instruction set that `code` belongs to.
    pub isa: Isa,
    /// EXITCODE (APM vol. 2, appendix C), or the basic exit reason (SDM vol. 3, appendix C).
    pub code: u64,
    /// The access that the exit was for.
    pub detail: VmDetail,
    /// Address of the guest's instruction; 0 where there were too many causes.
    pub rip: u64,
    /// True before the vCPU's first exit from the kernel's half of the address space. Low addresses are boot code until then,
    /// and programs later.
    pub early: bool,
}

/// The registers by which a guest arms the timer of its local APIC: the MSRs of the deadline and, in x2APIC mode, of the initial
/// count; and that as memory (SDM vol. 3A §10.5.4), for nested page faults and for the exits of APICv and AVIC.
const TIMER_MSRS: [u32; 2] = [0x6e0, 0x838];
const TIMER_GPA: u64 = 0xfee0_0380;

impl VmCause {
    /// The class of the exits: that of the exit code, or what its detail says better.
    #[must_use]
    pub fn class(&self) -> Class {
        match self.detail {
            VmDetail::Msr { index: Some(index), kind: AccessKind::Write } if TIMER_MSRS.contains(&index) => {
                Class::Timer
            }
            VmDetail::Device { gpa: TIMER_GPA, kind: AccessKind::Write } => Class::Timer,
            // On VMX they share an exit reason with the guest's exceptions.
            VmDetail::Event(Event { kind: EventKind::Nmi, .. }) => Class::Interrupt,
            _ => self.isa.class(self.code),
        }
    }
}

/// The exits of one [`VmCause`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCauseRecord {
    /// The cause of the exits.
    pub cause: VmCause,
    /// Number, and times from the exit until the guest was entered again.
    pub outside: TallyRecord,
}

/// The VM exits of a vCPU whose thread has ended. At most some 32,000 causes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// By cause, in the order of [`VmCause`].
    pub causes: Vec<VmCauseRecord>,
    /// The number of exits over time, by class.
    pub timeline: Timeline<Class>,
    /// Records that perf dropped because the ring was full.
    pub lost: u64,
    /// Entries without an exit before them: exits that KVM handled on its fast path without tracing them.
    pub untraced: u64,
    /// Time of the first exit from the kernel's half of the address space, in nanoseconds from the run's start.
    pub first_kernel_ns: Option<u64>,
    /// Time of the first exit from a program after that, in nanoseconds from the run's start.
    pub first_user_ns: Option<u64>,
}

/// The VM exits of one vCPU so far.
#[derive(Default)]
struct VmProfile {
    causes: HashMap<VmCause, Tally>,
    timeline: Timeline<Class>,
    lost: u64,
    untraced: u64,
    first_kernel_ns: Option<u64>,
    first_user_ns: Option<u64>,
}

impl VmProfile {
    /// Returns the key to count a cause under: without details where there are too many causes already.
    fn room_for(&self, cause: VmCause) -> VmCause {
        if self.causes.len() < MAX_CAUSES || self.causes.contains_key(&cause) {
            return cause;
        }
        let anywhere = VmCause { rip: 0, early: false, ..cause };
        if self.causes.len() < 2 * MAX_CAUSES || self.causes.contains_key(&anywhere) {
            return anywhere;
        }
        VmCause { detail: VmDetail::None, ..anywhere }
    }

    fn record(self) -> VmRecord {
        let Self { causes, timeline, lost, untraced, first_kernel_ns, first_user_ns } = self;
        let record = |(cause, tally): (VmCause, Tally)| VmCauseRecord { cause, outside: tally.record() };
        let mut causes: Vec<VmCauseRecord> = causes.into_iter().map(record).collect();
        causes.sort_by_key(|record| record.cause);
        VmRecord { causes, timeline, lost, untraced, first_kernel_ns, first_user_ns }
    }
}

struct ExitFields {
    id: u16,
    reason: Field,
    rip: Field,
    isa: Field,
    info1: Field,
    info2: Field,
    /// `None` where the kernel's tracepoint has no such field: before Linux 5.10.
    intr_info: Option<Field>,
}

/// A tracepoint that says more about an exit, and the field that says it.
struct More {
    id: u16,
    what: Field,
}

/// The tracepoints that are read, and what their fields are.
pub(super) struct Events {
    exit: ExitFields,
    entry: u16,
    msr: Option<More>,
    cpuid: Option<More>,
    /// Where an Intel processor's nested page faults have their address.
    faults: Vec<More>,
    /// Those of KVM's MMU that are counted, by name.
    mmu: Vec<(&'static str, u16)>,
}

/// What shadow paging does to its tables, which KVM's statistics do not tell as counts.
const MMU: [&str; 4] = ["kvm_mmu_get_page", "kvm_mmu_unsync_page", "kvm_mmu_sync_page", "kvm_mmu_prepare_zap_page"];

impl Events {
    /// Reads the formats below the tracefs at `tracefs`. The sysfs at `sysfs` says whose processor it is.
    ///
    /// # Errors
    /// [`FormatError`] where the tracepoints of exits and entries cannot be used.
    pub(super) fn read(tracefs: &Path, sysfs: &Path) -> Result<Self, FormatError> {
        let exit = Format::read(tracefs, "kvm/kvm_exit")?;
        let field = |name: &'static str| exit.field(name).ok_or(FormatError::NoField(name));
        let exit = ExitFields {
            id: exit.id,
            reason: field("exit_reason")?,
            rip: field("guest_rip")?,
            isa: field("isa")?,
            info1: field("info1")?,
            info2: field("info2")?,
            intr_info: exit.field("intr_info"),
        };
        let more = |name: &str, what: &str| {
            let format = Format::read(tracefs, name).ok()?;
            Some(More { id: format.id, what: format.field(what)? })
        };
        let intel = sysfs.join("module/kvm_intel").exists();
        let faults = [("kvm/kvm_page_fault", "fault_address"), ("kvm/kvm_mmio", "gpa"), ("kvm/kvm_fast_mmio", "gpa")];
        Ok(Self {
            exit,
            entry: Format::read(tracefs, "kvm/kvm_entry")?.id,
            msr: more("kvm/kvm_msr", "ecx"),
            cpuid: more("kvm/kvm_cpuid", "function"),
            mmu: MMU
                .iter()
                .filter_map(|name| Some((*name, Format::read(tracefs, &format!("kvmmmu/{name}")).ok()?.id)))
                .collect(),
            faults: faults.iter().filter(|_| intel).filter_map(|(name, what)| more(name, what)).collect(),
        })
    }

    /// The MMU's tracepoints: names and numbers.
    pub(super) fn mmu(&self) -> &[(&'static str, u16)] {
        &self.mmu
    }

    /// The tracepoints' numbers, the exit's first.
    pub(super) fn ids(&self) -> Vec<u16> {
        let more = self.msr.iter().chain(&self.cpuid).chain(&self.faults).map(|more| more.id);
        [self.exit.id, self.entry].into_iter().chain(more).collect()
    }
}

/// Puts the records of one vCPU together.
pub(super) struct Collector {
    /// The guest's memory: (gpa, bytes).
    ram: Vec<GpaRange>,
    /// perf's clock when the run started.
    start_ns: u64,
    pending: Option<(u64, VmCause)>,
    /// An MSR that was traced before its exit, as KVM's fast path does.
    early_msr: Option<u32>,
    /// Before the first exit, entries say nothing.
    begun: bool,
    profile: VmProfile,
}

impl Collector {
    pub(super) fn new(ram: Vec<GpaRange>, start_ns: u64) -> Self {
        Self { ram, start_ns, pending: None, early_msr: None, begun: false, profile: VmProfile::default() }
    }

    /// Takes one record: perf's time and the tracepoint's bytes.
    pub(super) fn record(&mut self, events: &Events, time_ns: u64, raw: &[u8]) {
        let Some(id) = raw.get(..2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])) else { return };
        if id == events.exit.id {
            self.exit(&events.exit, time_ns, raw);
        } else if id == events.entry {
            self.entry(time_ns);
        } else if let Some(more) = events.msr.as_ref().filter(|more| more.id == id) {
            self.msr(more.what.get(raw));
        } else if let Some(more) = events.cpuid.as_ref().filter(|more| more.id == id) {
            let leaf = more.what.get(raw).and_then(|leaf| u32::try_from(leaf).ok());
            self.refine(Class::Cpuid, |_| leaf.map(VmDetail::Leaf));
        } else if let Some(more) = events.faults.iter().find(|more| more.id == id) {
            let gpa = more.what.get(raw);
            let ram = std::mem::take(&mut self.ram);
            self.refine(Class::NestedPageFault, |detail| Some(fault(&ram, gpa?, access_kind(detail))));
            self.ram = ram;
        }
    }

    fn exit(&mut self, fields: &ExitFields, time_ns: u64, raw: &[u8]) {
        self.settle(None);
        let get = |field: Field| field.get(raw).unwrap_or(0);
        let Some(isa) = Isa::from_kvm(get(fields.isa)) else { return };
        let (code, rip) = (get(fields.reason), get(fields.rip));
        let (info1, info2) = (get(fields.info1), get(fields.info2));
        let detail = match isa.class(code) {
            Class::Pio => {
                let io = isa.io(info1);
                VmDetail::Port { port: io.port, size: io.size, kind: io.kind }
            }
            Class::Msr => VmDetail::Msr { index: self.early_msr.take(), kind: isa.msr_access(code, info1) },
            Class::NestedPageFault => {
                let kind = isa.fault_access(info1);
                isa.fault_gpa(info2).map_or(VmDetail::Memory { kind }, |gpa| fault(&self.ram, gpa, kind))
            }
            Class::Interrupt | Class::Exception => {
                let intr_info = fields.intr_info.map_or(0, get);
                isa.event(code, intr_info).map_or(VmDetail::None, VmDetail::Event)
            }
            Class::Apic => isa.apic(code, info1).map_or(VmDetail::None, |access| VmDetail::Device {
                gpa: u64::from(LAPIC) + u64::from(access.offset),
                kind: access.kind,
            }),
            Class::ControlRegister => isa.register(code, info1).map_or(VmDetail::None, VmDetail::Register),
            _ => VmDetail::None,
        };
        self.early_msr = None;
        self.begun = true;
        let early = rip < HIGH_HALF && self.profile.first_kernel_ns.is_none();
        let at_ns = time_ns.saturating_sub(self.start_ns);
        let cause = VmCause { isa, code, detail, rip, early };
        self.profile.timeline.add(at_ns, cause.class());
        if rip >= HIGH_HALF {
            self.profile.first_kernel_ns.get_or_insert(at_ns);
        } else if self.profile.first_kernel_ns.is_some() && rip >= 0x40_0000 {
            self.profile.first_user_ns.get_or_insert(at_ns);
        }
        self.pending = Some((time_ns, cause));
    }

    fn entry(&mut self, time_ns: u64) {
        if self.pending.is_none() && self.begun {
            self.profile.untraced += 1;
        }
        self.settle(Some(time_ns));
    }

    fn msr(&mut self, index: Option<u64>) {
        let index = index.and_then(|index| u32::try_from(index).ok());
        match &mut self.pending {
            Some((_, VmCause { detail: VmDetail::Msr { index: known, .. }, .. })) => *known = index.or(*known),
            Some(_) => {}
            None => self.early_msr = index,
        }
    }

    /// Says more about the exit that is being answered, if it is of this kind.
    fn refine(&mut self, class: Class, more: impl FnOnce(VmDetail) -> Option<VmDetail>) {
        if let Some((_, cause)) = &mut self.pending
            && cause.isa.class(cause.code) == class
            && let Some(detail) = more(cause.detail)
        {
            cause.detail = detail;
        }
    }

    /// Counts the exit that was being answered.
    fn settle(&mut self, until_ns: Option<u64>) {
        let Some((since_ns, cause)) = self.pending.take() else { return };
        let cause = self.profile.room_for(cause);
        let tally = self.profile.causes.entry(cause).or_default();
        match until_ns {
            Some(until_ns) => tally.add(until_ns.saturating_sub(since_ns)),
            None => tally.count += 1,
        }
    }

    pub(super) fn lost(&mut self, records: u64) {
        self.profile.lost += records;
    }

    pub(super) fn finish(mut self) -> VmRecord {
        self.settle(None);
        self.profile.record()
    }
}

fn fault(ram: &[GpaRange], gpa: u64, kind: AccessKind) -> VmDetail {
    if ram.iter().any(|bank| bank.contains(gpa)) { VmDetail::Memory { kind } } else { VmDetail::Device { gpa, kind } }
}

/// The direction of an access; a read where there is none.
fn access_kind(detail: VmDetail) -> AccessKind {
    match detail {
        VmDetail::None | VmDetail::Leaf(_) | VmDetail::Event(_) => AccessKind::Read,
        VmDetail::Port { kind, .. }
        | VmDetail::Msr { kind, .. }
        | VmDetail::Memory { kind }
        | VmDetail::Device { kind, .. } => kind,
        VmDetail::Register(access) => access.kind,
    }
}

#[cfg(test)]
pub(crate) mod recorded;
#[cfg(test)]
mod tests;
