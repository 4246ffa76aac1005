//! Levers that are settings of KVM's, and what a host can do of them.

use super::files::{Files, Source};
use crate::cluster::Follow;
use crate::config::RunConfig;
use crate::error::chain;
use crate::kvm::{CoalescedRing, KvmError, System, Vcpu, Vm};
use crate::probe::{Mmu, without_exits};
use crate::snapshot::Irqchip;
use crate::tune::{Choice, Lever, Tune};
use hwvmm_arch::acpi::VirtioMmio;
use hwvmm_arch::layout::{IOAPIC, UARTS};
use hwvmm_devices::virtio::TransportOptions;
use hwvmm_devices::virtio::mmio::{MmioDevice, RegisterRange};
use kvm_bindings::{KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE};
use std::time::Duration;

// Bits of leaf 0x4000_0001 EAX (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURE_PV_EOI: u32 = 6;
const KVM_FEATURE_PV_UNHALT: u32 = 7;
const KVM_FEATURE_PV_TLB_FLUSH: u32 = 9;
const KVM_FEATURE_PV_SEND_IPI: u32 = 11;
const KVM_FEATURE_PV_SCHED_YIELD: u32 = 13;

/// The longest time that a halted vCPU is waited for, in microseconds, where the lever is just on.
const HALT_POLL_US: u32 = 200;

/// Which exits are followed by the interpreter, in a guest with so many `vcpus`. Where that is not asked for, they are in guests of one vCPU
/// only: several are better served by KVM_FEATURE_PV_TLB_FLUSH, which these cannot have. None is where KVM has shadow page tables: it learns of
/// changes to the guest's page tables by write protection, which the interpreter's writes do not meet. Nor with the test device, which raises
/// interrupts by ioctls of its own (KVM_IRQ_LINE).
pub(super) fn follow(config: &RunConfig, mmu: Mmu, vcpus: usize) -> Option<Follow> {
    let tune = &config.tune;
    let follow = match tune.choice(Lever::ExitClusters) {
        Choice::On | Choice::Micros(_) => Some(Follow::ByCount),
        Choice::Gain => Some(Follow::ByTime),
        Choice::Auto => (vcpus == 1).then_some(Follow::ByTime),
        Choice::Off => None,
    };
    if follow.is_some() && mmu != Mmu::Nested {
        tune.cannot(Lever::ExitClusters, "the host's KVM is not known to use nested page tables");
        return None;
    }
    follow.filter(|_| !config.testdev)
}

/// KVM's paravirtual features (leaf 0x4000_0001 EAX) whose levers are off. While hwvmm interprets a vCPU, KVM shows it to the others as
/// preempted: they would take its TLB for flushed when it runs next, and the interpreter would go on with translations of before.
pub(super) fn hidden_features(tune: &Tune, follow: Option<Follow>) -> u32 {
    let bits = [
        (Lever::PvEoi, KVM_FEATURE_PV_EOI),
        (Lever::PvIpi, KVM_FEATURE_PV_SEND_IPI),
        (Lever::PvTlbFlush, KVM_FEATURE_PV_TLB_FLUSH),
        (Lever::PvSchedYield, KVM_FEATURE_PV_SCHED_YIELD),
        (Lever::PvUnhalt, KVM_FEATURE_PV_UNHALT),
    ];
    let interprets = follow.is_some();
    if interprets && tune.choice(Lever::PvTlbFlush) == Choice::On {
        tune.cannot(Lever::PvTlbFlush, "exit-clusters interprets a vCPU while it counts as preempted");
    }
    let is_hidden = |lever| !tune.wants(lever) || interprets && lever == Lever::PvTlbFlush;
    bits.into_iter().filter(|(lever, _)| is_hidden(*lever)).fold(0, |mask, (_, bit)| mask | 1 << bit)
}

/// Returns true if the local APIC timer is to have TSC-deadline mode, on a host that has it. Linux uses a timer with this mode for
/// single shots only, which the lever of the periodic tick is to avoid.
pub(super) fn wants_tsc_deadline(tune: &Tune) -> bool {
    if !tune.wants(Lever::PeriodicTick) {
        return tune.wants(Lever::TscDeadline);
    }
    if tune.choice(Lever::TscDeadline) == Choice::On {
        tune.cannot(Lever::TscDeadline, "periodic-tick=on wants a timer without this mode");
    }
    false
}

/// Creates the interrupt controllers: all of them in KVM (KVM_CREATE_IRQCHIP), or the local APICs in KVM, the I/O APIC in hwvmm
/// and no PIC (KVM_CAP_SPLIT_IRQCHIP). A snapshot has those that it was made with.
///
/// # Errors
/// Where KVM can do neither.
pub(super) fn create_irqchip(vm: &Vm, config: &RunConfig, files: &Files) -> Result<Irqchip, KvmError> {
    if let Source::Snapshot { state, .. } = &files.source {
        match state.description.irqchip {
            Irqchip::Kernel => vm.create_irqchip()?,
            Irqchip::Split => vm.split_irqchip()?,
        }
        return Ok(state.description.irqchip);
    }
    // Test kernels want the whole PC.
    if config.tune.wants(Lever::SplitIrqchip) && !config.testdev && !files.is_multiboot() {
        match vm.split_irqchip() {
            Ok(()) => return Ok(Irqchip::Split),
            Err(error) => config.tune.cannot(Lever::SplitIrqchip, &format!("{error}: {}", error.source)),
        }
    }
    vm.create_irqchip()?;
    Ok(Irqchip::Kernel)
}

/// Linux looks there for a Super-I/O chip behind each UART: eight times five writes into the void.
const SUPER_IO: [u16; 2] = [0x2e, 0x4e];
/// The PCI configuration address.
const PCI_ADDRESS: u16 = 0xcf8;

/// A UART's registers whose writes the guest sees by reading only: data (or divisor), FIFO, line and modem control, scratch.
/// A write to interrupt enable may raise one at once.
const UART_QUIET: [u16; 5] = [0, 2, 3, 4, 7];

/// The virtio-mmio devices of a machine.
pub(super) struct VirtioMmioRegisters<'a> {
    pub(super) devices: &'a [VirtioMmio],
    /// If true, the guest reads the registers from read-only pages, without an exit.
    pub(super) readonly_pages: bool,
}

/// Registers those writes for coalescing (KVM_REGISTER_COALESCED_MMIO) that change nothing that the guest could see before
/// its next exit: a UART's bytes, the PCI configuration address, I/O APIC entries (a device is started by an exit), and
/// unmapped ports. Returns `None` where the lever is off or this host cannot.
pub(super) fn coalesced_io(
    vm: &Vm,
    vcpu: &Vcpu,
    config: &RunConfig,
    irqchip: Irqchip,
    virtio_mmio: &VirtioMmioRegisters<'_>,
) -> Option<CoalescedRing> {
    let tune = &config.tune;
    if !tune.wants(Lever::CoalescedIo) {
        return None;
    }
    let uarts = UARTS.iter().zip(&config.serial).filter(|(_, target)| target.is_some()).map(|(uart, _)| uart.port);
    let mut zones: Vec<(u16, u32)> = SUPER_IO.into_iter().map(|port| (port, 1)).collect();
    zones.extend(uarts.flat_map(|base| UART_QUIET.map(|register| (base + register, 1))));
    // The address matters at the next read of the data or of the address.
    zones.push((PCI_ADDRESS, 4));
    let cannot = |error: &KvmError| tune.cannot(Lever::CoalescedIo, &format!("{error}: {}", error.source));
    // The ring is mapped first: coalesced writes must be drained.
    let ring = vcpu.coalesced_ring().inspect_err(cannot).ok()?;
    for (port, count) in zones {
        if let Err(error) = vm.coalesce_ports(port, count) {
            cannot(&error);
            break;
        }
    }
    let io_apic = u64::from(IOAPIC);
    let mut zones: Vec<(u64, u32)> = match irqchip {
        Irqchip::Split => vec![(io_apic, 4), (io_apic + 0x10, 4)],
        Irqchip::Kernel => Vec::new(),
    };
    // Not the interrupt's acknowledgement: taken late, it would clear a later interrupt's bit.
    let ranges: &[RegisterRange] =
        if virtio_mmio.readonly_pages { &MmioDevice::COALESCIBLE } else { &MmioDevice::COALESCIBLE_WITHOUT_PAGE };
    for device in virtio_mmio.devices {
        zones.extend(ranges.iter().map(|range| (device.range.start + range.offset, range.bytes)));
    }
    for (gpa, bytes) in zones {
        if let Err(error) = vm.coalesce_memory(gpa, bytes) {
            cannot(&error);
            break;
        }
    }
    Some(ring)
}

/// The longest look for a request, in microseconds, where the lever is just on: as long as KVM looks for work for a halted
/// vCPU.
const POLL_US: u32 = 200;

/// What virtio devices do against kicks and interrupts, in a machine of `vcpus` vCPUs.
pub(super) fn options(tune: &Tune, vcpus: u32) -> TransportOptions {
    // A device that looks takes a processor that a vCPU may need.
    let spare = || std::thread::available_parallelism().is_ok_and(|host| host.get() > vcpus as usize);
    let micros = match tune.choice(Lever::BusyPoll) {
        Choice::Auto => spare().then_some(POLL_US),
        Choice::On | Choice::Gain => Some(POLL_US),
        Choice::Micros(micros) => Some(micros),
        Choice::Off => None,
    };
    TransportOptions {
        event_idx: tune.wants(Lever::EventIdx),
        coalesce_notifications: tune.wants(Lever::NotifyCoalescing),
        busy_poll: micros.map(|micros| Duration::from_micros(micros.into())),
    }
}

/// Sets what is a machine's. What this host cannot is said, and left.
pub(super) fn set_vm(vm: &Vm, system: &System, tune: &Tune) {
    let idle_levers = [
        (Lever::DisableHlt, KVM_X86_DISABLE_EXITS_HLT),
        (Lever::DisablePause, KVM_X86_DISABLE_EXITS_PAUSE),
        (Lever::DisableMwait, KVM_X86_DISABLE_EXITS_MWAIT),
    ];
    let mut bits = 0;
    for (lever, bit) in idle_levers.into_iter().filter(|(lever, _)| tune.wants(*lever)) {
        // On some hosts the call succeeds, and the guest cannot be entered afterwards.
        match without_exits(system, bit) {
            Ok(()) => bits |= bit,
            Err(error) => tune.cannot(lever, &chain(&error)),
        }
    }
    if bits != 0
        && let Err(error) = vm.disable_exits(bits)
    {
        tune.cannot(Lever::DisableHlt, &format!("{error}: {}", error.source));
    }
    if tune.wants(Lever::HaltPoll) {
        let micros = if let Choice::Micros(micros) = tune.choice(Lever::HaltPoll) { micros } else { HALT_POLL_US };
        if let Err(error) = vm.set_halt_poll(u64::from(micros) * 1000) {
            tune.cannot(Lever::HaltPoll, &format!("{error}: {}", error.source));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunOptions;

    #[test]
    fn a_periodic_tick_is_without_the_tsc_deadline() {
        let wants = |text: &str| {
            let mut tune = Tune::default();
            tune.set(text).expect("valid");
            wants_tsc_deadline(&tune)
        };
        assert!(wants("") && wants("periodic-tick=off") && !wants("tsc-deadline=off"));
        assert!(!wants("periodic-tick=on") && !wants("periodic-tick=on,tsc-deadline=on"));
    }

    #[test]
    fn each_feature_has_its_own_bit() {
        let mut tune = Tune::default();
        assert_eq!(hidden_features(&tune, None), 0);
        tune.set("pv-eoi=off,pv-ipi=off").expect("valid");
        assert_eq!(hidden_features(&tune, None), 1 << 6 | 1 << 11);
        tune.set("all=off").expect("valid");
        assert_eq!(hidden_features(&tune, None).count_ones(), 5);
        let hidden = hidden_features(&Tune::default(), Some(Follow::ByTime));
        assert_eq!(hidden, 1 << KVM_FEATURE_PV_TLB_FLUSH, "an interpreted vCPU counts as preempted");
    }

    #[test]
    fn exits_of_several_vcpus_are_followed_where_that_is_asked_for() {
        let of = |text: &str, mmu, vcpus, testdev| {
            let options: RunOptions = toml::from_str("kernel = 'k'").expect("TOML");
            let mut config = RunConfig { testdev, ..options.into_config().expect("a configuration") };
            config.tune.set(text).expect("valid");
            follow(&config, mmu, vcpus)
        };
        let follow = |text: &str, vcpus, testdev| of(text, Mmu::Nested, vcpus, testdev);
        assert_eq!((follow("", 1, false), follow("", 2, false)), (Some(Follow::ByTime), None));
        assert_eq!(follow("exit-clusters=gain", 2, false), Some(Follow::ByTime));
        let asked = "exit-clusters=on";
        assert_eq!((follow(asked, 1, false), follow(asked, 4, false)), (Some(Follow::ByCount), Some(Follow::ByCount)));
        assert_eq!((follow("exit-clusters=off", 1, false), follow(asked, 1, true)), (None, None));
        for (text, mmu) in
            [("", Mmu::Shadow), (asked, Mmu::Shadow), ("", Mmu::Unknown), ("exit-clusters=gain", Mmu::Unknown)]
        {
            assert_eq!(of(text, mmu, 1, false), None, "KVM would not see writes to page tables");
        }
    }
}
