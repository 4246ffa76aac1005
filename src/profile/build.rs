//! From what a run left behind to a [`Profile`].

use super::MemoryUse;
use super::data::{Cause, Exits, FORMAT, Guest, Host, Mark, Phase, Profile, Timeline, VERSION};
use super::stats::{add_kvm, nanoseconds, virtio_queues};
use super::symbols::Symbols;
use crate::config::RunConfig;
use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, Handler, Route};
use crate::machine::RunRecord;
use crate::measure::tally::Tally;
use crate::measure::timeline;
use crate::measure::tracer::{VmCause, VmDetail, VmProfile};
use crate::measure::user_profile::{self, UserCause};
use crate::measure::{Measured, UserProfile};
use hwvmm_arch::exit_code::Class;
use hwvmm_arch::{layout, msr_name::msr_name};
use std::collections::BTreeMap;

const HIGH_HALF: u64 = 1 << 63;
/// Where the lowest of ordinary programs are linked to (x86-64 psABI).
const LOWEST_PROGRAM: u64 = 0x40_0000;

/// Where instructions are, and what addresses are.
struct Names<'a> {
    symbols: Option<&'a Symbols>,
    handler: &'a Handler,
    /// Whether the kernel was loaded to where it was linked for, so that its first instructions have names too.
    in_place: bool,
}

/// Whose an instruction is, by what is known of it.
enum Whose {
    /// By its privilege level.
    Level(Option<u8>),
    /// By its address: before the kernel ran in its own half or after.
    Early(bool),
}

impl Names<'_> {
    /// Fills in whose instruction it is, and in which function.
    fn place(&self, cause: &mut Cause, whose: &Whose) {
        let Some(rip) = cause.rip else {
            cause.mode = "many".into();
            return;
        };
        cause.mode = match (rip >= HIGH_HALF, whose) {
            (_, Whose::Level(Some(3))) => "user",
            (true, _) => "kernel",
            (false, Whose::Level(Some(_)) | Whose::Early(true)) => "boot",
            // Below this nobody's programs are; the trampolines of other vCPUs are.
            (false, Whose::Early(false)) if rip >= LOWEST_PROGRAM => "user",
            (false, _) => "low",
        }
        .into();
        let place = match (&self.symbols, cause.mode.as_str()) {
            (Some(symbols), "kernel") => symbols.resolve(rip),
            (Some(symbols), "boot") if self.in_place => symbols.resolve_unmapped(rip),
            _ => None,
        };
        (cause.function, cause.offset) = place.map(|place| (place.function, place.offset)).unzip();
    }

    fn port(&self, port: u64) -> Option<String> {
        self.handler.pio.find(port).and_then(|found| self.slot(BusKind::Pio, found.slot))
    }

    fn slot(&self, bus: BusKind, slot: usize) -> Option<String> {
        let bus = if bus == BusKind::Pio { &self.handler.pio } else { &self.handler.mmio };
        bus.slots().nth(slot).map(|(_, name)| name.to_owned())
    }

    fn memory(&self, gpa: u64) -> Option<String> {
        match gpa {
            0xfec0_0000..0xfec0_1000 => Some("I/O APIC".into()),
            0xfee0_0000..0xfee0_1000 => Some("local APIC".into()),
            _ => self.handler.mmio.find(gpa).and_then(|found| self.slot(BusKind::Mmio, found.slot)),
        }
    }

    fn user(&self, cause: &UserCause) -> Cause {
        let reason = cause.reason;
        let (space, write) = match reason {
            ExitReason::PioIn => (Some("port"), Some(false)),
            ExitReason::PioOut => (Some("port"), Some(true)),
            ExitReason::MmioRead => (Some("gpa"), Some(false)),
            ExitReason::MmioWrite => (Some("gpa"), Some(true)),
            ExitReason::MsrRead => (Some("msr"), Some(false)),
            ExitReason::MsrWrite => (Some("msr"), Some(true)),
            ExitReason::Hypercall => (Some("hypercall"), None),
            ExitReason::MemoryFault => (Some("gpa"), None),
            _ => (None, None),
        };
        let device = match cause.route {
            Route::Slot(bus, slot) => self.slot(bus, slot),
            Route::Msr(index) => msr_name(index).map(Into::into),
            Route::Unmapped(..) | Route::None => None,
        };
        let class = match reason {
            ExitReason::PioIn | ExitReason::PioOut => "pio",
            ExitReason::MmioRead | ExitReason::MmioWrite => "mmio",
            ExitReason::MsrRead | ExitReason::MsrWrite => "msr",
            ExitReason::Interrupted | ExitReason::Intr | ExitReason::Again => "kick",
            ExitReason::Hlt => "hlt",
            _ => "other",
        };
        let mut named = Cause {
            reason: reason.name().into(),
            class: class.into(),
            space: space.map(Into::into),
            address: space.map(|_| cause.address),
            size: matches!(class, "pio" | "mmio").then_some(cause.size),
            write,
            device,
            rip: cause.rip,
            ..Cause::default()
        };
        self.place(&mut named, &Whose::Level(cause.cpl));
        named
    }

    fn vm(&self, cause: &VmCause) -> Cause {
        let class = cause.isa.class(cause.code);
        let mut named = Cause {
            reason: cause.isa.reason(cause.code),
            class: class.name().into(),
            rip: (cause.rip != 0).then_some(cause.rip),
            ..Cause::default()
        };
        let mut about = |space: &str, address: u64, write: Option<bool>, device: Option<String>| {
            (named.space, named.address, named.write) = (Some(space.into()), Some(address), write);
            named.device = device;
        };
        match cause.detail {
            VmDetail::None => {}
            VmDetail::Port { port, size, write } => {
                about("port", u64::from(port), Some(write), self.port(u64::from(port)));
                named.size = Some(size);
            }
            VmDetail::Msr { index: Some(index), write } => {
                about("msr", u64::from(index), Some(write), msr_name(index).map(Into::into));
            }
            VmDetail::Msr { index: None, write } => named.write = Some(write),
            VmDetail::Leaf(leaf) => about("leaf", u64::from(leaf), None, None),
            VmDetail::Memory { write } => {
                (named.device, named.write) = (Some("guest memory".into()), Some(write));
            }
            VmDetail::Device { gpa, write } => about("gpa", gpa, Some(write), self.memory(gpa)),
        }
        self.place(&mut named, &Whose::Early(cause.early));
        named
    }
}

fn add(into: &mut Cause, vcpu: usize, tally: &Tally, handler_ns: u64) {
    into.count += tally.count;
    *into.by_vcpu.entry(vcpu).or_default() += tally.count;
    into.time_ns = into.time_ns.saturating_add(tally.ns);
    into.max_ns = into.max_ns.max(tally.max_ns);
    into.handler_ns = into.handler_ns.saturating_add(handler_ns);
    merge_histogram(&mut into.histogram, &tally.buckets());
}

/// Adds one histogram to another.
pub(super) fn merge_histogram(into: &mut Vec<(u64, u64)>, other: &[(u64, u64)]) {
    let mut sum: BTreeMap<u64, u64> = into.iter().copied().collect();
    for (value, count) in other {
        let place = sum.entry(*value).or_default();
        *place = place.saturating_add(*count);
    }
    *into = sum.into_iter().collect();
}

fn named_timeline<K: Ord + Copy>(line: &timeline::Timeline<K>, name: impl Fn(K) -> &'static str) -> Timeline {
    let counts = line.iter().map(|(step, key, count)| (step, name(key).to_owned(), count)).collect();
    Timeline { step_ns: line.step_ns(), counts }
}

fn finish_exits(mut exits: Exits, causes: impl Iterator<Item = Cause>) -> Exits {
    exits.causes = causes.collect();
    exits
        .causes
        .sort_by(|a, b| b.time_ns.cmp(&a.time_ns).then_with(|| b.count.cmp(&a.count)).then_with(|| a.rip.cmp(&b.rip)));
    for cause in &exits.causes {
        *exits.by_reason.entry(cause.reason.clone()).or_default() += cause.count;
        for (vcpu, count) in &cause.by_vcpu {
            if let Some(sum) = exits.by_vcpu.get_mut(*vcpu) {
                *sum += count;
            }
        }
    }
    exits.total = exits.by_reason.values().sum();
    exits
}

fn userspace_exits(profiles: &[&UserProfile], names: &Names<'_>) -> Exits {
    let mut causes: BTreeMap<UserCause, Cause> = BTreeMap::new();
    let mut line = timeline::Timeline::default();
    for (vcpu, profile) in profiles.iter().enumerate() {
        line.merge(profile.timeline());
        for (cause, tally) in profile.causes() {
            let named = causes.entry(*cause).or_insert_with(|| names.user(cause));
            add(named, vcpu, &tally.outside, tally.handler_ns);
        }
    }
    let exits = Exits {
        by_vcpu: vec![0; profiles.len()],
        timeline: named_timeline(&line, ExitReason::name),
        ..Exits::default()
    };
    finish_exits(exits, causes.into_values())
}

fn vm_exits(profiles: &[Option<VmProfile>], names: &Names<'_>) -> Option<Exits> {
    let mut causes: BTreeMap<VmCause, Cause> = BTreeMap::new();
    let mut line = timeline::Timeline::default();
    let mut exits = Exits { by_vcpu: vec![0; profiles.len()], ..Exits::default() };
    for (vcpu, profile) in profiles.iter().enumerate() {
        // Where one vCPU could not be traced, the sums would be wrong.
        let profile = profile.as_ref()?;
        line.merge(profile.timeline());
        exits.lost += profile.lost;
        exits.untraced += profile.untraced;
        for (cause, tally) in profile.causes() {
            add(causes.entry(*cause).or_insert_with(|| names.vm(cause)), vcpu, tally, 0);
        }
    }
    exits.timeline = named_timeline(&line, Class::name);
    Some(finish_exits(exits, causes.into_values()))
}

fn marks(profiles: &[&UserProfile]) -> Vec<Mark> {
    let mut marks: Vec<(u64, user_profile::Mark)> =
        profiles.iter().flat_map(|profile| profile.marks()).copied().collect();
    marks.sort();
    let name = |mark: user_profile::Mark| match mark {
        user_profile::Mark::Kernel => "kernel".to_owned(),
        user_profile::Mark::Console => "console".to_owned(),
        user_profile::Mark::User => "user".to_owned(),
        user_profile::Mark::Post(code) => format!("POST {code:#04x}"),
        user_profile::Mark::Guest(number) => format!("mark {number}"),
    };
    marks.into_iter().map(|(at_ns, mark)| Mark { name: name(mark), at_ns }).collect()
}

/// Loading, unpacking in the guest, the kernel, and what it starts.
fn phases(finish: &RunRecord, marks: &[Mark], vm: &[Option<VmProfile>]) -> Vec<Phase> {
    let first = |name: &str| marks.iter().find(|mark| mark.name == name).map(|mark| mark.at_ns);
    let earliest = |get: fn(&VmProfile) -> Option<u64>| vm.iter().flatten().filter_map(get).min();
    let ran = nanoseconds(finish.ran);
    let kernel = first("kernel").into_iter().chain(earliest(|vm| vm.first_kernel_ns)).min();
    let init = first("user").into_iter().chain(earliest(|vm| vm.first_user_ns)).min();
    let mut phases = vec![Phase { name: "load".into(), start_ns: 0, end_ns: nanoseconds(finish.startup_cpu) }];
    let mut add = |name: &str, start_ns: u64, end_ns: u64| {
        phases.push(Phase {
            name: name.into(),
            start_ns: start_ns.min(ran),
            end_ns: end_ns.min(ran).max(start_ns.min(ran)),
        });
    };
    let kernel_start = if finish.description.contains("by the guest") {
        add("decompress", 0, kernel.unwrap_or(ran));
        kernel.unwrap_or(ran)
    } else {
        0
    };
    add("kernel", kernel_start, init.unwrap_or(ran));
    if let Some(init) = init {
        add("init", init, ran);
    }
    phases
}

/// The symbols of a run, moved to where its kernel lies; what cannot be had goes to `missing`.
pub fn symbols(config: &RunConfig, finish: &RunRecord, missing: &mut Vec<String>) -> Option<Symbols> {
    let mut symbols = match Symbols::load(config) {
        Ok(symbols) => symbols,
        Err(error) => {
            missing.push(format!("no names of functions: {error}"));
            return None;
        }
    };
    let lstar = finish.vcpus.iter().find_map(|vcpu| vcpu.lstar);
    match lstar {
        Some(lstar) if !symbols.locate(lstar) => {
            missing.push(format!(
                "no names of functions: the symbols are not those of the kernel that ran (LSTAR {lstar:#x})"
            ));
            None
        }
        // The guest's decompressor may have moved it, and it did not live to say to where.
        None if finish.description.contains("by the guest") => None,
        _ => Some(symbols),
    }
}

impl Profile {
    /// The profile of one start.
    #[must_use]
    pub fn new(config: &RunConfig, finish: &RunRecord) -> Self {
        let mut missing = finish.traced.as_ref().map(|traced| traced.missing.clone()).unwrap_or_default();
        let symbols = symbols(config, finish, &mut missing);
        let users: Vec<&UserProfile> = finish
            .vcpus
            .iter()
            .filter_map(|vcpu| match &vcpu.measured {
                Measured::Profile(profile) => Some(&**profile),
                Measured::Nothing | Measured::HandlerTime(_) => None,
            })
            .collect();
        let vm: &[Option<VmProfile>] = finish.traced.as_ref().map_or(&[], |traced| &traced.vcpus);
        let marks = marks(&users);
        let in_place = !finish.description.contains("by the guest");
        let names = Names { symbols: symbols.as_ref(), handler: &finish.handler, in_place };
        let mut kvm = BTreeMap::new();
        finish.vm_stats.iter().chain(finish.vcpu_stats.iter().flatten()).for_each(|stats| add_kvm(&mut kvm, stats));
        // Momentary, but the machine's own: what its memory is mapped in at the end.
        let mapped = finish.vm_stats.iter().flatten().filter(|stat| stat.name.starts_with("pages_"));
        kvm.extend(mapped.filter_map(|stat| Some((stat.name.clone(), *stat.values.first()?))));
        let mmu = finish.traced.iter().flat_map(|traced| &traced.mmu);
        kvm.extend(mmu.map(|(name, count)| (format!("kvmmmu:{name}"), *count)));
        let guest_memory: Vec<_> = finish.ram.host_ranges().map(|range| (range.start, range.bytes)).collect();
        let isa = vm.iter().flatten().flat_map(VmProfile::reasons).map(|(isa, _, _)| isa.name().to_owned()).next();
        Self {
            format: FORMAT.into(),
            version: VERSION,
            hwvmm: env!("CARGO_PKG_VERSION").into(),
            end: finish.ended.end.to_string(),
            status: finish.ended.end.status(),
            guest: Guest {
                kernel: config.kernel.display().to_string(),
                cmdline: config.kernel_cmdline(),
                boot: finish.description.into(),
                vcpus: finish.vcpus.len(),
                memory_bytes: layout::ram_banks(config.memory.bytes).iter().map(|bank| bank.bytes).sum(),
                symbols: symbols.as_ref().map(Symbols::description),
                slide: symbols.as_ref().map_or(0, Symbols::slide),
            },
            host: Host { kernel: host_kernel(), isa },
            starts: 1,
            ran_ns: nanoseconds(finish.ran),
            startup_cpu_ns: nanoseconds(finish.startup_cpu),
            phases: phases(finish, &marks, vm),
            marks,
            vm_exits: (!vm.is_empty()).then(|| vm_exits(vm, &names)).flatten(),
            userspace_exits: userspace_exits(&users, &names),
            kvm,
            virtio: virtio_queues(finish),
            memory: MemoryUse::now(&guest_memory).ok(),
            missing,
            costs: BTreeMap::new(),
        }
    }
}

fn host_kernel() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
