//! Makes a [`Profile`] of a run's record.

use super::data::{Avoided, Cause, Exits, FORMAT, Guest, Host, Mark, Phase, Profile, Timeline, VERSION};
use super::histogram;
use super::kinds::{AddressSpace, CodeMode, ExitClass, PhaseName};
use super::stats::{self, add_kvm, used_queues};
use super::symbols::Symbols;
use crate::config::RunConfig;
use crate::error::chain;
use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, Route};
use crate::measure::clusters::{AvoidedAt, ClusterEnd, EndedAt};
use crate::measure::record::DeviceRange;
use crate::measure::tally::TallyRecord;
use crate::measure::timeline;
use crate::measure::tracer::{VmCause, VmDetail, VmRecord};
use crate::measure::user_profile::{MarkKind, UserCause, UserRecord};
use crate::measure::{Measured, RunRecord};
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::exit_code::{AccessKind, Class, Register, RegisterAccess};
use hwvmm_arch::{layout, msr_name::msr_name};
use hwvmm_devices::path_text::PathText as _;
use std::collections::BTreeMap;

const HIGH_HALF: u64 = 1 << 63;
/// Where the lowest of ordinary programs are linked to (x86-64 psABI).
const LOWEST_PROGRAM: u64 = 0x40_0000;

/// Finds the functions of instructions and the devices of addresses.
struct Names<'a> {
    symbols: Option<&'a Symbols>,
    devices: &'a [DeviceRange],
    /// True if the kernel was loaded at the address that it was linked for, so that its first instructions have names too.
    in_place: bool,
}

/// What is known of whose code an instruction is.
enum Evidence {
    /// The privilege level, where it is known.
    Level(Option<u8>),
    /// True if the kernel has not run in its half of the address space yet.
    Early(bool),
}

impl Names<'_> {
    /// Sets whose instruction the cause is, and in which function.
    fn place(&self, cause: &mut Cause, evidence: &Evidence) {
        let Some(rip) = cause.rip else {
            cause.mode = CodeMode::Many;
            return;
        };
        cause.mode = match (rip >= HIGH_HALF, evidence) {
            (_, Evidence::Level(Some(3))) => CodeMode::User,
            (true, _) => CodeMode::Kernel,
            (false, Evidence::Level(Some(_)) | Evidence::Early(true)) => CodeMode::Boot,
            // Below this there are no programs, but the trampolines of other vCPUs.
            (false, Evidence::Early(false)) if rip >= LOWEST_PROGRAM => CodeMode::User,
            (false, _) => CodeMode::Low,
        };
        let place = match (&self.symbols, cause.mode) {
            (Some(symbols), CodeMode::Kernel) => symbols.resolve(rip),
            (Some(symbols), CodeMode::Boot) if self.in_place => symbols.resolve_unmapped(rip),
            _ => None,
        };
        (cause.function, cause.offset) = place.map(|place| (place.function, place.offset)).unzip();
    }

    fn at(&self, bus: BusKind, address: u64) -> Option<String> {
        let claims = |device: &&DeviceRange| device.bus == bus && (device.first..=device.last).contains(&address);
        self.devices.iter().find(claims).map(|device| device.name.clone())
    }

    fn slot(&self, bus: BusKind, slot: usize) -> Option<String> {
        self.devices.iter().filter(|device| device.bus == bus).nth(slot).map(|device| device.name.clone())
    }

    fn memory(&self, gpa: u64) -> Option<String> {
        match gpa {
            0xfec0_0000..0xfec0_1000 => Some("I/O APIC".into()),
            0xfee0_0000..0xfee0_1000 => Some("local APIC".into()),
            _ => self.at(BusKind::Mmio, gpa),
        }
    }

    fn user(&self, cause: &UserCause) -> Cause {
        let reason = cause.reason;
        let (space, write) = match reason {
            ExitReason::PioIn => (Some(AddressSpace::Port), Some(false)),
            ExitReason::PioOut => (Some(AddressSpace::Port), Some(true)),
            ExitReason::MmioRead => (Some(AddressSpace::Gpa), Some(false)),
            ExitReason::MmioWrite => (Some(AddressSpace::Gpa), Some(true)),
            ExitReason::MsrRead => (Some(AddressSpace::Msr), Some(false)),
            ExitReason::MsrWrite => (Some(AddressSpace::Msr), Some(true)),
            ExitReason::Hypercall => (Some(AddressSpace::Hypercall), None),
            ExitReason::MemoryFault => (Some(AddressSpace::Gpa), None),
            _ => (None, None),
        };
        let device = match cause.route {
            Route::Slot(bus, slot) => self.slot(bus, slot),
            Route::Msr(index) => msr_name(index).map(Into::into),
            Route::Unmapped(..) | Route::None => None,
        };
        let class = match reason {
            ExitReason::PioIn | ExitReason::PioOut => ExitClass::Pio,
            ExitReason::MmioRead | ExitReason::MmioWrite => ExitClass::Mmio,
            ExitReason::MsrRead | ExitReason::MsrWrite => ExitClass::Msr,
            ExitReason::Interrupted | ExitReason::Intr | ExitReason::Again => ExitClass::Kick,
            ExitReason::Hlt => ExitClass::Hlt,
            _ => ExitClass::Other,
        };
        let mut named = Cause {
            reason: reason.name().into(),
            class,
            space,
            address: space.map(|_| cause.address),
            size: matches!(class, ExitClass::Pio | ExitClass::Mmio).then_some(cause.size),
            write,
            device,
            rip: cause.rip,
            ..Cause::default()
        };
        self.place(&mut named, &Evidence::Level(cause.cpl));
        named
    }

    fn avoided(&self, at: &AvoidedAt) -> Cause {
        let reason = if at.write { ExitReason::PioOut } else { ExitReason::PioIn };
        let mut named = Cause {
            reason: reason.name().into(),
            class: ExitClass::Pio,
            space: Some(AddressSpace::Port),
            address: Some(at.port.into()),
            write: Some(at.write),
            device: self.at(BusKind::Pio, at.port.into()),
            rip: Some(at.rip),
            ..Cause::default()
        };
        self.place(&mut named, &Evidence::Level(Some(0)));
        named
    }

    fn ended(&self, at: &EndedAt) -> Cause {
        let reason = ClusterEnd::NAMES.get(at.end).copied().unwrap_or("unknown");
        let mut named = Cause { reason: reason.into(), rip: Some(at.rip), ..Cause::default() };
        self.place(&mut named, &Evidence::Level(Some(0)));
        named
    }

    fn vm(&self, cause: &VmCause) -> Cause {
        let mut named = Cause {
            reason: cause.isa.reason(cause.code),
            class: cause.class().into(),
            rip: (cause.rip != 0).then_some(cause.rip),
            ..Cause::default()
        };
        let mut about = |space: AddressSpace, address: u64, kind: Option<AccessKind>, device: Option<String>| {
            (named.space, named.address) = (Some(space), Some(address));
            named.write = kind.map(|kind| kind == AccessKind::Write);
            named.device = device;
        };
        match cause.detail {
            VmDetail::None => {}
            VmDetail::Port { port, size, kind } => {
                about(AddressSpace::Port, port.into(), Some(kind), self.at(BusKind::Pio, port.into()));
                named.size = Some(size);
            }
            VmDetail::Msr { index: Some(index), kind } => {
                about(AddressSpace::Msr, index.into(), Some(kind), msr_name(index).map(Into::into));
            }
            VmDetail::Msr { index: None, kind } => named.write = Some(kind == AccessKind::Write),
            VmDetail::Leaf(leaf) => about(AddressSpace::Leaf, leaf.into(), None, None),
            VmDetail::Event(event) => {
                about(AddressSpace::Vector, event.vector.into(), None, event.name().map(Into::into));
            }
            VmDetail::Register(RegisterAccess { register: Register::Control(number), kind }) => {
                about(AddressSpace::ControlRegister, number.into(), Some(kind), Some(format!("CR{number}")));
            }
            VmDetail::Register(RegisterAccess { register: Register::Debug(number), kind }) => {
                about(AddressSpace::DebugRegister, number.into(), Some(kind), Some(format!("DR{number}")));
            }
            VmDetail::Memory { kind } => {
                (named.device, named.write) = (Some("guest memory".into()), Some(kind == AccessKind::Write));
            }
            VmDetail::Device { gpa, kind } => about(AddressSpace::Gpa, gpa, Some(kind), self.memory(gpa)),
        }
        self.place(&mut named, &Evidence::Early(cause.early));
        named
    }
}

fn add(into: &mut Cause, vcpu: usize, tally: &TallyRecord, handler_ns: u64) {
    into.count = into.count.saturating_add(tally.count);
    let of_vcpu = into.by_vcpu.entry(vcpu).or_default();
    *of_vcpu = of_vcpu.saturating_add(tally.count);
    into.time_ns = into.time_ns.saturating_add(tally.ns);
    into.max_ns = into.max_ns.max(tally.max_ns);
    into.handler_ns = into.handler_ns.saturating_add(handler_ns);
    histogram::merge(&mut into.histogram, &tally.histogram);
}

fn named_timeline<K: Ord + Copy>(line: &timeline::Timeline<K>, name: impl Fn(K) -> &'static str) -> Timeline {
    let counts = line.iter().map(|count| (count.step, name(count.key).to_owned(), count.count).into()).collect();
    Timeline { step_ns: line.step_ns(), counts }
}

fn finish_exits(mut exits: Exits, causes: impl Iterator<Item = Cause>) -> Exits {
    exits.causes = causes.collect();
    exits
        .causes
        .sort_by(|a, b| b.time_ns.cmp(&a.time_ns).then_with(|| b.count.cmp(&a.count)).then_with(|| a.rip.cmp(&b.rip)));
    for cause in &exits.causes {
        let of_reason = exits.by_reason.entry(cause.reason.clone()).or_default();
        *of_reason = of_reason.saturating_add(cause.count);
        for (vcpu, count) in &cause.by_vcpu {
            if let Some(sum) = exits.by_vcpu.get_mut(*vcpu) {
                *sum = sum.saturating_add(*count);
            }
        }
    }
    exits.total = exits.by_reason.values().fold(0, |sum, count| sum.saturating_add(*count));
    exits
}

fn userspace_exits(records: &[&UserRecord], names: &Names<'_>) -> Exits {
    let mut causes: BTreeMap<UserCause, Cause> = BTreeMap::new();
    let mut line = timeline::Timeline::default();
    for (vcpu, record) in records.iter().enumerate() {
        line.merge(&record.timeline);
        for one in &record.causes {
            let named = causes.entry(one.cause).or_insert_with(|| names.user(&one.cause));
            add(named, vcpu, &one.outside, one.handler_ns);
        }
    }
    let exits = Exits {
        by_vcpu: vec![0; records.len()],
        timeline: named_timeline(&line, ExitReason::name),
        ..Exits::default()
    };
    finish_exits(exits, causes.into_values())
}

fn vm_exits(records: &[Option<VmRecord>], names: &Names<'_>) -> Option<Exits> {
    let mut causes: BTreeMap<VmCause, Cause> = BTreeMap::new();
    let mut line = timeline::Timeline::default();
    let mut exits = Exits { by_vcpu: vec![0; records.len()], ..Exits::default() };
    for (vcpu, record) in records.iter().enumerate() {
        // Where one vCPU could not be traced, the sums would be wrong.
        let record = record.as_ref()?;
        line.merge(&record.timeline);
        exits.lost = exits.lost.saturating_add(record.lost);
        exits.untraced = exits.untraced.saturating_add(record.untraced);
        for one in &record.causes {
            add(causes.entry(one.cause).or_insert_with(|| names.vm(&one.cause)), vcpu, &one.outside, 0);
        }
    }
    exits.timeline = named_timeline(&line, Class::name);
    Some(finish_exits(exits, causes.into_values()))
}

/// What exit clusters have avoided, and where they ended. A port's RIP is that of the kernel: only it is interpreted.
fn avoided(record: &RunRecord, names: &Names<'_>) -> Option<Avoided> {
    let counts = stats::clusters(record)?;
    let mut avoided = Avoided {
        total: counts.avoided_exits,
        clusters: counts.clusters,
        instructions: counts.instructions,
        time_ns: counts.ns,
        ..Avoided::default()
    };
    let (mut causes, mut ends) = (BTreeMap::new(), BTreeMap::new());
    for (vcpu, record) in record.vcpus.iter().enumerate() {
        let Some(clusters) = &record.clusters else { continue };
        for at in &clusters.avoided_at {
            let cause = causes.entry((at.rip, at.port, at.write)).or_insert_with(|| names.avoided(at));
            add_count(cause, vcpu, at.count);
        }
        for at in &clusters.ended_at {
            add_count(ends.entry((at.rip, at.end)).or_insert_with(|| names.ended(at)), vcpu, at.count);
        }
    }
    let most_first = |causes: &mut Vec<Cause>| causes.sort_by_key(|cause| (std::cmp::Reverse(cause.count), cause.rip));
    avoided.causes = causes.into_values().collect();
    avoided.ends = ends.into_values().collect();
    most_first(&mut avoided.causes);
    most_first(&mut avoided.ends);
    Some(avoided)
}

fn add_count(into: &mut Cause, vcpu: usize, count: u64) {
    into.count = into.count.saturating_add(count);
    let of_vcpu = into.by_vcpu.entry(vcpu).or_default();
    *of_vcpu = of_vcpu.saturating_add(count);
}

fn marks(records: &[&UserRecord]) -> Vec<Mark> {
    let mut marks: Vec<Mark> = records.iter().flat_map(|record| &record.marks).copied().collect();
    marks.sort_by_key(|mark| (mark.at_ns, mark.name));
    marks
}

/// Returns the phases: loading, decompression in the guest, the kernel, and the programs that it starts.
fn phases(record: &RunRecord, marks: &[Mark], vm: &[Option<VmRecord>]) -> Vec<Phase> {
    let first = |name: MarkKind| marks.iter().find(|mark| mark.name == name).map(|mark| mark.at_ns);
    let earliest = |get: fn(&VmRecord) -> Option<u64>| vm.iter().flatten().filter_map(get).min();
    let ran_ns = record.ran_ns;
    let kernel = first(MarkKind::Kernel).into_iter().chain(earliest(|vm| vm.first_kernel_ns)).min();
    let init = first(MarkKind::User).into_iter().chain(earliest(|vm| vm.first_user_ns)).min();
    let mut phases = vec![Phase { name: PhaseName::Load, start_ns: 0, end_ns: record.startup_cpu_ns }];
    let mut add = |name: PhaseName, start_ns: u64, end_ns: u64| {
        phases.push(Phase {
            name,
            start_ns: start_ns.min(ran_ns),
            end_ns: end_ns.min(ran_ns).max(start_ns.min(ran_ns)),
        });
    };
    let kernel_start = if is_decompressed_by_guest(record) {
        add(PhaseName::Decompress, 0, kernel.unwrap_or(ran_ns));
        kernel.unwrap_or(ran_ns)
    } else {
        0
    };
    add(PhaseName::Kernel, kernel_start, init.unwrap_or(ran_ns));
    if let Some(init) = init {
        add(PhaseName::Init, init, ran_ns);
    }
    phases
}

/// Returns the phases of a run from a snapshot: the restore, the time until the first answer, and what comes after it.
fn phases_from_snapshot(record: &RunRecord, marks: &[Mark]) -> Vec<Phase> {
    let ran_ns = record.ran_ns;
    let answer = marks.iter().find(|mark| mark.name == MarkKind::Console).map(|mark| mark.at_ns.min(ran_ns));
    let phase = |name, start_ns, end_ns| Phase { name, start_ns, end_ns };
    let before = phase(PhaseName::Restore, 0, record.startup_cpu_ns);
    let until = phase(PhaseName::FirstAnswer, 0, answer.unwrap_or(ran_ns));
    [before, until].into_iter().chain(answer.map(|at| phase(PhaseName::Init, at, ran_ns))).collect()
}

/// The symbols of a run's kernel, or why there are none.
#[derive(Default)]
pub struct RunSymbols {
    symbols: Option<Symbols>,
    missing: Option<String>,
}

impl RunSymbols {
    /// Loads the symbols of a run's kernel and moves them to where it lay. It can take as long as reading a file of symbols may.
    #[must_use]
    pub fn load(config: &RunConfig, record: &RunRecord) -> Self {
        let none = |why: String| Self { symbols: None, missing: Some(format!("no names of functions: {why}")) };
        let mut symbols = match Symbols::load(config) {
            Ok(symbols) => symbols,
            Err(error) => return none(chain(&error)),
        };
        match record.vcpus.iter().find_map(|vcpu| vcpu.lstar) {
            Some(lstar) if !symbols.locate(lstar) => {
                none(format!("the symbols are not those of the kernel that ran (LSTAR {lstar:#x})"))
            }
            // The guest's decompressor may have moved the kernel, which did not run until it set LSTAR.
            None if is_decompressed_by_guest(record) => Self::default(),
            _ => Self { symbols: Some(symbols), missing: None },
        }
    }

    /// The symbols, if there are any.
    #[must_use]
    pub fn get(&self) -> Option<&Symbols> {
        self.symbols.as_ref()
    }
}

/// Returns KVM's statistics of the machine and all vCPUs together.
fn kvm_statistics(record: &RunRecord) -> BTreeMap<String, u64> {
    let mut kvm = BTreeMap::new();
    let of_vcpus = record.vcpus.iter().filter_map(|vcpu| vcpu.stats.as_ref());
    record.vm_stats.iter().chain(of_vcpus).for_each(|stats| add_kvm(&mut kvm, stats));
    // Values of the moment, but the machine's own: the pages that its memory is mapped in at the end.
    let mapped = record.vm_stats.iter().flatten().filter(|stat| stat.name.starts_with("pages_"));
    kvm.extend(mapped.filter_map(|stat| Some((stat.name.clone(), *stat.values.first()?))));
    let mmu = record.trace.iter().flat_map(|trace| &trace.mmu);
    kvm.extend(mmu.map(|(name, count)| (format!("kvmmmu:{name}"), *count)));
    kvm
}

impl Profile {
    /// Makes the profile of one start of a machine.
    #[must_use]
    pub fn new(config: &RunConfig, record: &RunRecord, symbols: &RunSymbols) -> Self {
        let mut missing: Vec<String> = record.trace.iter().flat_map(|trace| trace.missing.clone()).collect();
        missing.extend(record.missing.iter().cloned());
        missing.extend(symbols.missing.clone());
        let symbols = symbols.get();
        let users: Vec<&UserRecord> = record
            .vcpus
            .iter()
            .filter_map(|vcpu| match &vcpu.measured {
                Measured::Profile(profile) => Some(&**profile),
                Measured::Nothing | Measured::HandlerTime(_) => None,
            })
            .collect();
        let vm: &[Option<VmRecord>] = record.trace.as_ref().map_or(&[], |trace| &trace.vcpus);
        let marks = marks(&users);
        let in_place = !is_decompressed_by_guest(record);
        let names = Names { symbols, devices: &record.devices, in_place };
        let isa = vm.iter().flatten().find_map(|vm| vm.causes.first()).map(|one| one.cause.isa.name().to_owned());
        Self {
            format: FORMAT.into(),
            version: VERSION,
            hwvmm: env!("CARGO_PKG_VERSION").into(),
            end: record.end.reason.to_string(),
            status: record.end.reason.status(),
            guest: Guest {
                kernel: config.kernel.shown().to_string(),
                cmdline: config.kernel_cmdline_with(config.has_image_cmdline().then_some("(those of the image)")),
                boot: record.boot_text(),
                vcpus: record.vcpus.len(),
                memory_bytes: layout::ram_banks(config.memory.bytes).iter().map(|bank| bank.bytes).sum(),
                symbols: symbols.map(Symbols::description),
                slide: symbols.map_or(0, Symbols::slide),
            },
            host: Host { kernel: host_kernel(), isa },
            starts: 1,
            ran_ns: record.ran_ns,
            startup_cpu_ns: record.startup_cpu_ns,
            phases: match config.from {
                Some(_) => phases_from_snapshot(record, &marks),
                None => phases(record, &marks, vm),
            },
            marks,
            vm_exits: (!vm.is_empty()).then(|| vm_exits(vm, &names)).flatten(),
            userspace_exits: userspace_exits(&users, &names),
            avoided: avoided(record, &names),
            kvm: kvm_statistics(record),
            virtio: used_queues(record),
            memory: record.memory,
            missing,
            costs: BTreeMap::new(),
        }
    }
}

fn host_kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Returns true if the guest decompressed its kernel itself.
fn is_decompressed_by_guest(record: &RunRecord) -> bool {
    record.boot.is_some_and(BootMethod::is_decompressed_by_guest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{EndReason, RunEnd};

    #[test]
    fn a_run_from_a_snapshot_has_the_phases_until_its_first_answer() {
        let ended = RunRecord::ended(RunEnd { reason: EndReason::PowerOff, vcpu: None });
        let record = RunRecord { ran_ns: 50, startup_cpu_ns: 70, ..ended };
        let phases = |marks: &[Mark]| -> Vec<_> {
            let phases = phases_from_snapshot(&record, marks);
            phases.iter().map(|phase| (phase.name.name(), phase.start_ns, phase.end_ns)).collect()
        };
        let mark = |name, at_ns| Mark { name, at_ns };
        let until_the_end = [("restore", 0, 70), ("first-answer", 0, 50)];
        assert_eq!(phases(&[mark(MarkKind::User, 3)]), until_the_end);
        let with_output = phases(&[mark(MarkKind::User, 3), mark(MarkKind::Console, 20), mark(MarkKind::Console, 30)]);
        assert_eq!(with_output, [("restore", 0, 70), ("first-answer", 0, 20), ("init", 20, 50)]);
        // A mark comes from the machine's process, which may say anything.
        assert_eq!(phases(&[mark(MarkKind::Console, 90)])[1..], [("first-answer", 0, 50), ("init", 50, 50)]);
    }
}
