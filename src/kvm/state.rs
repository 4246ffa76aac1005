//! The state of a vCPU and of a machine's own devices in KVM, as plain data, for snapshots.
//!
//! KVM API 4.20 ff. says what each ioctl holds; the order in which they are made is part of the state:
//!
//! - KVM_GET_MP_STATE comes first, as KVM then takes INIT and start-up IPIs that wait, which changes registers.
//! - MSRs are read before the local APIC: a TSC deadline that expires in between is then an interrupt that waits in the APIC. The
//!   other way round it would be in neither.
//! - KVM_GET_VCPU_EVENTS comes last: the others can raise and take back events.
//! - The local APIC is set before the TSC deadline, which it refuses in another mode, and the TSC before both.

use super::error::{KvmError, Named};
use super::vcpu::Vcpu;
use super::vm::Vm;
use hwvmm_arch::msr::{IA32_MCG_CAP, IA32_TSC, IA32_TSC_DEADLINE};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use serde::{Deserialize, Serialize};
use std::time::{Instant, SystemTime};

/// An MSR and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The number that RDMSR takes.
    pub index: u32,
    /// What RDMSR returns.
    pub value: u64,
}

/// A counter that goes on, and the host's time at which it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// The count at that time.
    pub value: u64,
    /// When it was read (CLOCK_REALTIME).
    pub at: SystemTime,
}

impl Counter {
    /// Calls `read`, and takes the time in the middle of the call.
    fn read<E>(read: impl FnOnce() -> Result<u64, E>) -> Result<Self, E> {
        let (at, start) = (SystemTime::now(), Instant::now());
        let value = read()?;
        Ok(Self { value, at: at + start.elapsed() / 2 })
    }

    /// Its value at `now`, where it counts `khz` thousand times a second. Where the host's clock was set back, the value is the same.
    #[must_use]
    pub fn value_at(self, now: SystemTime, khz: u32) -> u64 {
        let passed = now.duration_since(self.at).unwrap_or_default().as_nanos();
        let ticks = passed.saturating_mul(khz.into()) / 1_000_000;
        self.value.wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX))
    }
}

/// A vCPU that does not run.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// The vCPU id, which is its APIC id.
    pub id: u32,
    /// The CPUID leaves as they were set.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The frequency of its TSC in kHz, where KVM knows it.
    pub tsc_khz: Option<u32>,
    /// Its time-stamp counter, where KVM lets it be read.
    pub tsc: Option<Counter>,
    /// The other MSRs that KVM lets be read.
    pub msrs: Vec<Msr>,
    activity: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// x87, SSE and what XCR0 has besides.
    xsave: kvm_xsave,
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Returns true if the guest may run guests of its own: there is state of them that [`Vcpu::save`] does not read
    /// (KVM_GET_NESTED_STATE).
    #[must_use]
    pub fn runs_guests(&self) -> bool {
        self.sregs.efer & EFER_SVME != 0 || self.sregs.cr4 & CR4_VMXE != 0
    }

    /// A state of zeros, for tests and fuzz targets.
    #[must_use]
    pub fn empty(id: u32) -> Self {
        Self {
            id,
            cpuid: Vec::new(),
            tsc_khz: None,
            tsc: None,
            msrs: Vec::new(),
            activity: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: kvm_xsave::default(),
            xcrs: None,
            debug_regs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            events: kvm_vcpu_events::default(),
        }
    }
}

/// What KVM emulates for the whole machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState {
    /// The time of kvmclock in nanoseconds.
    pub clock: Counter,
    /// The two PICs and the I/O APIC; `None` where hwvmm has the I/O APIC (KVM_CAP_SPLIT_IRQCHIP).
    pub chips: Option<[kvm_irqchip; 3]>,
}

/// EFER.SVME: the guest may enter guests of its own (APM vol. 2, 15.4).
const EFER_SVME: u64 = 1 << 12;
/// CR4.VMXE: the guest may be in VMX operation (SDM vol. 3C, 24.7).
const CR4_VMXE: u64 = 1 << 13;

/// The frequency of a counter of nanoseconds.
const NANOSECONDS_KHZ: u32 = 1_000_000;

/// The interrupt controllers of a machine that has all of them in KVM.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl Vcpu {
    /// Reads the whole state, with the MSRs `msrs`, those of them that can be read. To be called by the thread that runs the
    /// vCPU, after KVM_RUN was interrupted: KVM_RUN has then completed what the last exit left to do (KVM API 5, immediate_exit).
    ///
    /// # Errors
    /// Where an ioctl fails, with its name.
    pub fn save(&self, msrs: &[u32]) -> Result<VcpuState, KvmError> {
        let fd = self.fd();
        let activity = fd.get_mp_state().named("KVM_GET_MP_STATE")?;
        let regs = fd.get_regs().named("KVM_GET_REGS")?;
        let sregs = fd.get_sregs().named("KVM_GET_SREGS")?;
        let xsave = fd.get_xsave().named("KVM_GET_XSAVE")?;
        // A processor without XSAVE has none.
        let xcrs = fd.get_xcrs().ok();
        let debug_regs = fd.get_debug_regs().named("KVM_GET_DEBUGREGS")?;
        let read = |&index: &u32| Some(Msr { index, value: self.msr(index)? });
        let tsc = Counter::read(|| self.msr(IA32_TSC).ok_or(())).ok();
        let msrs = msrs.iter().filter(|index| **index != IA32_TSC).filter_map(read).collect();
        let lapic = fd.get_lapic().named("KVM_GET_LAPIC")?;
        let events = fd.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        Ok(VcpuState {
            id: self.id(),
            cpuid: self.cpuid(),
            tsc_khz: self.tsc_khz(),
            tsc,
            msrs,
            activity,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            events,
        })
    }

    /// Sets the whole state of a new vCPU. Its time-stamp counter goes on by the host's time that has passed: each counter by its own,
    /// since they were neither read nor are set at the same moment. KVM takes values that fit to each other, as those of the
    /// vCPUs do, as the wish that the counters run together.
    ///
    /// # Errors
    /// Where KVM refuses a part of the state, with the name of the ioctl.
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        self.set_cpuid(&state.cpuid)?;
        self.restore_machine_check_banks(state)?;
        let fd = self.fd();
        if state.tsc_khz.is_some() && state.tsc_khz != self.tsc_khz() {
            fd.set_tsc_khz(state.tsc_khz.unwrap_or(0))
                .named("KVM_SET_TSC_KHZ (another TSC frequency than this host's)")?;
        }
        fd.set_mp_state(state.activity).named("KVM_SET_MP_STATE")?;
        fd.set_regs(&state.regs).named("KVM_SET_REGS")?;
        fd.set_sregs(&state.sregs).named("KVM_SET_SREGS")?;
        if let Some(xcrs) = &state.xcrs {
            fd.set_xcrs(xcrs).named("KVM_SET_XCRS")?;
        }
        // SAFETY: KVM reads as many bytes as the state of the features takes that this process has asked for permission to use
        // (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM). It asks for none, so that these are the 4096 of the structure.
        unsafe { fd.set_xsave(&state.xsave) }.named("KVM_SET_XSAVE")?;
        fd.set_debug_regs(&state.debug_regs).named("KVM_SET_DEBUGREGS")?;
        if let Some(tsc) = state.tsc {
            let value = tsc.value_at(SystemTime::now(), state.tsc_khz.unwrap_or(0));
            self.set_msr(Msr { index: IA32_TSC, value })?;
        }
        fd.set_lapic(&state.lapic).named("KVM_SET_LAPIC")?;
        let (deadline, others): (Vec<&Msr>, Vec<&Msr>) =
            state.msrs.iter().filter(|msr| msr.index != IA32_TSC).partition(|msr| msr.index == IA32_TSC_DEADLINE);
        others.into_iter().chain(deadline).try_for_each(|msr| self.set_msr(*msr))?;
        fd.set_vcpu_events(&state.events).named("KVM_SET_VCPU_EVENTS")?;
        self.note_pause();
        Ok(())
    }

    fn restore_machine_check_banks(&self, state: &VcpuState) -> Result<(), KvmError> {
        let banks = |value: u64| u8::try_from(value & 0xff).unwrap_or(0);
        let wanted = state.msrs.iter().find(|msr| msr.index == IA32_MCG_CAP).map(|msr| banks(msr.value));
        match wanted {
            Some(wanted) if self.msr(IA32_MCG_CAP).map(banks) != Some(wanted) => self.set_machine_check_banks(wanted),
            _ => Ok(()),
        }
    }

    /// Sets an MSR. One that is read-only may be set to the value that it has.
    fn set_msr(&self, Msr { index, value }: Msr) -> Result<(), KvmError> {
        let one = kvm_bindings::Msrs::from_entries(&[kvm_msr_entry { index, data: value, ..Default::default() }]);
        let one = one.map_err(|_| KvmError::new("KVM_SET_MSRS", libc::E2BIG))?;
        if self.fd().set_msrs(&one).named("KVM_SET_MSRS")? == 1 || self.msr(index) == Some(value) {
            return Ok(());
        }
        log::error!("vCPU {}: KVM refuses {value:#x} for the MSR {index:#x}", self.id());
        Err(KvmError::new("KVM_SET_MSRS", libc::EINVAL))
    }
}

impl Vm {
    /// Reads what KVM emulates for the whole machine. No vCPU may run meanwhile.
    ///
    /// # Errors
    /// Where an ioctl fails, with its name.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let clock = Counter::read(|| self.fd().get_clock().map(|clock| clock.clock)).named("KVM_GET_CLOCK")?;
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd().get_irqchip(&mut chip).named("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        let [master, slave, io_apic] = CHIPS;
        let chips = if self.is_split() { None } else { Some([chip(master)?, chip(slave)?, chip(io_apic)?]) };
        Ok(VmState { clock, chips })
    }

    /// Sets what KVM emulates for the whole machine, whose clock goes on by the host's time that has passed. To be called after the vCPUs were restored.
    ///
    /// # Errors
    /// Where KVM refuses a part of the state, with the name of the ioctl.
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        for (chip, number) in state.chips.iter().flatten().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id: number, ..*chip };
            self.fd().set_irqchip(&chip).named("KVM_SET_IRQCHIP")?;
        }
        let clock =
            kvm_clock_data { clock: state.clock.value_at(SystemTime::now(), NANOSECONDS_KHZ), ..Default::default() };
        self.fd().set_clock(&clock).named("KVM_SET_CLOCK")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn counters_go_on_by_the_time_that_has_passed() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let counter = Counter { value: 7, at };
        assert_eq!(counter.value_at(at + Duration::from_millis(1500), 2_000_000), 3_000_000_007);
        assert_eq!(counter.value_at(at + Duration::from_secs(1 << 30), NANOSECONDS_KHZ), (1_000_000_000 << 30) + 7);
        assert_eq!(counter.value_at(at - Duration::from_secs(5), 2_000_000), 7, "the clock was set back");
        assert_eq!(counter.value_at(at + Duration::from_secs(5), 0), 7, "of unknown frequency");
        let read = Counter::read(|| Ok::<_, ()>(9)).expect("read");
        assert!(read.value == 9 && read.at.elapsed().is_ok_and(|since| since < Duration::from_secs(5)));
    }
}
