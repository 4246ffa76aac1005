//! A vCPU: its registers, CPUID and MSRs, and KVM_RUN.

use super::coalesced::CoalescedRing;
use super::error::{KvmError, Named};
use super::exit::{self, Exit};
use super::kick::Kickable;
use super::stats;
use crate::memory::GuestRam;
use hwvmm_arch::layout::GpaRange;
use hwvmm_devices::RegisterPage;
use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYNC_X86_EVENTS,
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry,
    kvm_pre_fault_memory, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use number::{KVM_PRE_FAULT_MEMORY, KVM_X86_SETUP_MCE};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

#[allow(missing_docs, reason = "the macro makes a public function without documentation")]
mod number {
    use kvm_bindings::kvm_pre_fault_memory;
    vmm_sys_util::ioctl_iow_nr!(KVM_X86_SETUP_MCE, kvm_bindings::KVMIO, 0x9c, u64);
    vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, kvm_bindings::KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// What a vCPU is doing (KVM API 4.38, KVM_GET_MP_STATE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuActivity {
    /// It runs guest code, or an interrupt can wake it.
    Awake,
    /// It halted with RFLAGS.IF clear: only an NMI, an SMI or INIT can wake it.
    HaltedForGood,
    /// It is an application processor (AP) that waits for INIT or for a start-up IPI.
    NotStarted,
}

/// A vCPU. It is used by one thread at a time (KVM API 2).
pub struct Vcpu {
    fd: VcpuFd,
    id: u32,
    /// As it was set last.
    cpuid: Mutex<Vec<kvm_cpuid_entry2>>,
    syncs_regs: bool,
    syncs_sregs: bool,
    /// The special registers are copied whether the whole state is or not.
    wants_cpl: bool,
    can_sync_sregs: bool,
    can_sync_events: bool,
    syncs_events: bool,
    // Keeps guest memory mapped as long as this vCPU can run.
    memory: Option<GuestRam>,
    _pages: Arc<Mutex<Vec<RegisterPage>>>,
}

impl Vcpu {
    pub(super) fn new(
        mut fd: VcpuFd,
        id: u32,
        sync_regs: i32,
        memory: Option<GuestRam>,
        pages: Arc<Mutex<Vec<RegisterPage>>>,
    ) -> Self {
        let syncs = |bit: u32| u32::try_from(sync_regs).is_ok_and(|bits| bits & bit != 0);
        let syncs_regs = syncs(KVM_SYNC_X86_REGS);
        if syncs_regs {
            fd.set_sync_valid_reg(SyncReg::Register);
        }
        Self {
            fd,
            id,
            cpuid: Mutex::default(),
            syncs_regs,
            syncs_sregs: false,
            wants_cpl: false,
            can_sync_sregs: syncs(KVM_SYNC_X86_SREGS),
            can_sync_events: syncs(KVM_SYNC_X86_EVENTS),
            syncs_events: false,
            memory,
            _pages: pages,
        }
    }

    /// The vCPU id, which is its APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns true if KVM copies the general-purpose registers into kvm_run at every exit (KVM_CAP_SYNC_REGS).
    #[must_use]
    pub fn syncs_regs(&self) -> bool {
        self.syncs_regs
    }

    /// Sets the CPUID leaves (KVM API 4.20, KVM_SET_CPUID2).
    ///
    /// # Errors
    /// Where there are too many leaves, or KVM refuses them.
    pub fn set_cpuid(&self, leaves: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let too_many = |_| KvmError::new("KVM_SET_CPUID2 (too many leaves)", libc::E2BIG);
        let entries = CpuId::from_entries(leaves).map_err(too_many)?;
        self.fd.set_cpuid2(&entries).named("KVM_SET_CPUID2")?;
        *self.cpuid.lock().unwrap_or_else(PoisonError::into_inner) = leaves.to_vec();
        Ok(())
    }

    /// The CPUID leaves as they were set.
    pub(super) fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        self.cpuid.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns true if the guest is told of KVM_FEATURE_PV_TLB_FLUSH (Documentation/virt/kvm/x86/cpuid.rst): it takes the TLB of a vCPU
    /// that is not in KVM_RUN for flushed before the vCPU goes on.
    #[must_use]
    pub fn has_pv_tlb_flush(&self) -> bool {
        const KVM_FEATURES: u32 = 0x4000_0001;
        const PV_TLB_FLUSH: u32 = 1 << 9;
        let leaves = self.cpuid.lock().unwrap_or_else(PoisonError::into_inner);
        leaves.iter().any(|leaf| leaf.function == KVM_FEATURES && leaf.eax & PV_TLB_FLUSH != 0)
    }

    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Sets MSRs (KVM API 4.19). An MSR that KVM does not have is left out: the ioctl stops at the first that it refuses, so
    /// each is set by its own.
    ///
    /// # Errors
    /// Where the ioctl itself fails.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        for entry in entries {
            let Ok(one) = Msrs::from_entries(std::slice::from_ref(entry)) else { continue };
            if self.fd.set_msrs(&one).named("KVM_SET_MSRS")? == 0 {
                log::debug!("vCPU {}: KVM refuses MSR {:#x}", self.id, entry.index);
            }
        }
        Ok(())
    }

    /// Sets the number of machine-check banks (KVM API 4.105, KVM_X86_SETUP_MCE).
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn set_machine_check_banks(&self, banks: u8) -> Result<(), KvmError> {
        let capabilities = u64::from(banks);
        // SAFETY: the fd is a vCPU's, and the ioctl reads one 64-bit word.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_X86_SETUP_MCE(), &capabilities) };
        if result == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()).named("KVM_X86_SETUP_MCE") }
    }

    /// Maps the ring of coalesced writes of the vCPU's machine.
    ///
    /// # Errors
    /// Where it cannot be mapped.
    pub fn coalesced_ring(&self) -> Result<CoalescedRing, KvmError> {
        CoalescedRing::new(self.fd.as_raw_fd())
    }

    /// The frequency of the guest's TSC in kHz (KVM API 4.56, KVM_GET_TSC_KHZ); `None` where KVM does not know it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// The general-purpose registers, RIP and RFLAGS (KVM API 4.11, KVM_GET_REGS).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().named("KVM_GET_REGS")
    }

    /// Sets the general-purpose registers, RIP and RFLAGS (KVM API 4.12, KVM_SET_REGS).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn set_regs(&self, regs: &kvm_regs) -> Result<(), KvmError> {
        self.fd.set_regs(regs).named("KVM_SET_REGS")
    }

    /// Changes the special registers (KVM API 4.13, 4.14).
    ///
    /// # Errors
    /// Where an ioctl fails.
    pub fn update_sregs(&self, change: impl FnOnce(&mut kvm_sregs)) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().named("KVM_GET_SREGS")?;
        change(&mut sregs);
        self.fd.set_sregs(&sregs).named("KVM_SET_SREGS")
    }

    /// Changes the local APIC's registers (KVM API 4.57, 4.58).
    ///
    /// # Errors
    /// Where an ioctl fails.
    pub fn update_lapic(&self, change: impl FnOnce(&mut kvm_lapic_state)) -> Result<(), KvmError> {
        let mut lapic = self.fd.get_lapic().named("KVM_GET_LAPIC")?;
        change(&mut lapic);
        self.fd.set_lapic(&lapic).named("KVM_SET_LAPIC")
    }

    /// Fills the nested page tables for `range` before the guest touches it (KVM API 4.143, KVM_PRE_FAULT_MEMORY, Linux 6.11).
    ///
    /// # Errors
    /// Where KVM does not have the ioctl or refuses the range.
    pub fn pre_fault(&self, range: GpaRange) -> Result<(), KvmError> {
        let mut range = kvm_pre_fault_memory { gpa: range.start, size: range.bytes, ..Default::default() };
        while range.size > 0 {
            // SAFETY: the fd is a vCPU's and the argument is the structure that this ioctl takes; KVM advances `gpa`
            // and `size` by what it has done.
            let result = unsafe { ioctl_with_mut_ref(&self.fd, KVM_PRE_FAULT_MEMORY(), &mut range) };
            if result != 0 {
                let error = kvm_ioctls::Error::last();
                if matches!(error.errno(), libc::EINTR | libc::EAGAIN) {
                    continue;
                }
                return Err(error).named("KVM_PRE_FAULT_MEMORY");
            }
        }
        Ok(())
    }

    /// Finds out what the vCPU is doing (KVM API 4.38, KVM_GET_MP_STATE).
    ///
    /// # Errors
    /// Where an ioctl fails.
    pub fn activity(&self) -> Result<VcpuActivity, KvmError> {
        let state = self.fd.get_mp_state().named("KVM_GET_MP_STATE")?.mp_state;
        Ok(match state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => VcpuActivity::NotStarted,
            KVM_MP_STATE_HALTED if self.regs()?.rflags & hwvmm_arch::regs::RFLAGS_IF == 0 => {
                VcpuActivity::HaltedForGood
            }
            _ => VcpuActivity::Awake,
        })
    }

    /// Tells a Linux guest that its vCPU was paused, by way of kvmclock, so that its watchdogs do not take the time for a
    /// lock-up (KVM API 4.62, KVM_KVMCLOCK_CTRL). Does nothing where the guest has no kvmclock.
    pub fn note_pause(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            log::debug!("vCPU {}: the guest is not told that it was paused: KVM_KVMCLOCK_CTRL: {error}", self.id);
        }
    }

    /// RIP at the last exit; `None` where KVM does not copy the registers (see [`Vcpu::syncs_regs`]).
    #[must_use]
    pub fn synced_rip(&self) -> Option<u64> {
        self.syncs_regs.then(|| self.fd.sync_regs().regs.rip)
    }

    /// Makes KVM copy the special registers into kvm_run at every exit, where it can; this takes some time at each exit.
    pub fn sync_cpl(&mut self) {
        if self.can_sync_sregs {
            self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            (self.syncs_sregs, self.wants_cpl) = (true, true);
        }
    }

    /// The current privilege level (CPL) at the last exit, which is SS.DPL (SDM vol. 3A §6.5); `None` unless
    /// [`Vcpu::sync_cpl`] was called.
    #[must_use]
    pub fn synced_cpl(&self) -> Option<u8> {
        self.syncs_sregs.then(|| self.fd.sync_regs().sregs.ss.dpl)
    }

    /// Guest memory; `None` before it is set.
    #[must_use]
    pub fn memory(&self) -> Option<&GuestRam> {
        self.memory.as_ref()
    }

    /// Makes KVM copy the whole state that [`Running::synced_state`] returns into kvm_run at every exit. Returns false where it
    /// cannot.
    pub fn sync_state(&mut self) -> bool {
        let can = self.syncs_regs && self.can_sync_sregs && self.can_sync_events;
        if can {
            self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            self.fd.set_sync_valid_reg(SyncReg::VcpuEvents);
            (self.syncs_sregs, self.syncs_events) = (true, true);
        }
        can
    }

    /// Takes [`Vcpu::sync_state`] back: exits take less time.
    pub fn unsync_state(&mut self) {
        if self.syncs_events {
            self.fd.clear_sync_valid_reg(SyncReg::VcpuEvents);
            self.syncs_events = false;
        }
        if self.syncs_sregs && !self.wants_cpl {
            self.fd.clear_sync_valid_reg(SyncReg::SystemRegister);
            self.syncs_sregs = false;
        }
    }

    /// The value of the MSR `index` (KVM API 4.18, KVM_GET_MSRS); `None` where KVM does not have it.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
        let read = self.fd.get_msrs(&mut one).ok()?;
        one.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
    }

    /// Opens the vCPU's binary statistics (KVM API 4.133, KVM_GET_STATS_FD).
    ///
    /// # Errors
    /// Where KVM has none (before Linux 5.14).
    pub fn stats_fd(&self) -> Result<File, KvmError> {
        stats::open(&self.fd)
    }

    /// Makes the calling thread the one that runs the vCPU. Kicks of this thread interrupt KVM_RUN from here on.
    #[must_use]
    pub fn enter(&mut self) -> Running<'_> {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        Running { _kickable: Kickable::new(immediate_exit), vcpu: self }
    }
}

/// What KVM has copied into kvm_run at an exit (KVM_CAP_SYNC_REGS).
#[derive(Clone, Copy)]
pub struct SyncedState {
    /// The general-purpose registers, RIP and RFLAGS.
    pub regs: kvm_regs,
    /// The segments, the control registers and EFER.
    pub sregs: kvm_sregs,
    /// Exceptions, interrupts and NMIs on their way to the guest.
    pub events: kvm_vcpu_events,
}

/// A vCPU on the thread that runs it.
pub struct Running<'a> {
    _kickable: Kickable,
    vcpu: &'a mut Vcpu,
}

impl Running<'_> {
    /// Runs the guest until KVM_RUN returns (KVM API 4.10).
    ///
    /// # Errors
    /// Where KVM_RUN fails with another error than EINTR or EAGAIN.
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        exit::run(&mut self.vcpu.fd).named("KVM_RUN")
    }

    /// Clears immediate_exit, which a kick has set, so that KVM_RUN runs the guest again.
    pub fn clear_kick(&mut self) {
        self.vcpu.fd.set_kvm_immediate_exit(0);
    }

    /// Completes the instruction of the last exit, without running the guest any further: KVM_RUN with immediate_exit set
    /// (KVM API 5, the note on completing I/O).
    ///
    /// # Errors
    /// As [`Running::run`].
    pub fn complete(&mut self) -> Result<(), KvmError> {
        self.vcpu.fd.set_kvm_immediate_exit(1);
        let result = self.run().map(|_| ());
        self.clear_kick();
        result
    }

    /// The vCPU's state at the last exit; `None` unless [`Vcpu::sync_state`] has returned true before it.
    #[must_use]
    pub fn synced_state(&self) -> Option<SyncedState> {
        let sync = self.vcpu.syncs_events.then(|| self.vcpu.fd.sync_regs())?;
        Some(SyncedState { regs: sync.regs, sregs: sync.sregs, events: sync.events })
    }

    /// Has KVM take over these registers before it runs the guest again, and before it completes the instruction of the last exit.
    /// Port I/O that is not a string's is completed only where RIP is unchanged (complete_fast_pio_in and complete_fast_pio_out of
    /// KVM's x86.c).
    pub fn set_synced_regs(&mut self, regs: kvm_regs) {
        self.vcpu.fd.sync_regs_mut().regs = regs;
        self.vcpu.fd.set_sync_dirty_reg(SyncReg::Register);
    }

    /// Gives up the instruction of the last exit, port I/O at `rip`: nothing of it is carried out any more. Returns false where KVM has
    /// completed it nonetheless, as one does that emulates the instruction. The registers must be set afterwards.
    ///
    /// # Errors
    /// As [`Running::run`].
    pub fn abandon_port_io(&mut self, mut regs: kvm_regs, rip: u64) -> Result<bool, KvmError> {
        // Any other address does: the guest is not entered.
        let elsewhere = rip ^ 0x40_0000;
        regs.rip = elsewhere;
        self.set_synced_regs(regs);
        self.complete_port_io()?;
        Ok(self.vcpu.synced_rip() == Some(elsewhere))
    }

    /// As [`Running::complete`], but a kick that comes meanwhile, or has come before, is not lost.
    ///
    /// # Errors
    /// As [`Running::run`].
    pub fn complete_port_io(&mut self) -> Result<(), KvmError> {
        const NO_KICK: u8 = 0;
        // KVM takes any value but 0; a kick writes 1.
        const OWN: u8 = 2;
        let flag = &raw mut self.vcpu.fd.get_kvm_run().immediate_exit;
        // SAFETY: the flag is one byte of the mapping of kvm_run, which lives as long as the vCPU; besides KVM, which reads it, only this
        // thread and its signal handler use it.
        let flag = unsafe { AtomicU8::from_ptr(flag) };
        let _ = flag.compare_exchange(NO_KICK, OWN, Ordering::SeqCst, Ordering::SeqCst);
        let result = self.run().map(|_| ());
        let _ = flag.compare_exchange(OWN, NO_KICK, Ordering::SeqCst, Ordering::SeqCst);
        result
    }

    /// Returns true if a kick has come, so that KVM_RUN will not run the guest.
    #[must_use]
    pub fn is_kicked(&mut self) -> bool {
        let flag = &raw const self.vcpu.fd.get_kvm_run().immediate_exit;
        // SAFETY: the pointer is into the mapping of kvm_run, which lives as long as the vCPU. Volatile, because a signal handler of
        // this thread writes it.
        unsafe { flag.read_volatile() != 0 }
    }

    /// Returns true unless the guest's debug registers are known to be unarmed (KVM API 4.21, KVM_GET_DEBUGREGS): a breakpoint or
    /// general detection is enabled in DR7.
    #[must_use]
    pub fn has_breakpoints(&self) -> bool {
        const ENABLED: u64 = 0xff | 1 << 13;
        self.vcpu.fd.get_debug_regs().map_or(true, |debug| debug.dr7 & ENABLED != 0)
    }

    /// Guest memory, for as long as the vCPU is not run.
    #[must_use]
    pub fn memory(&self) -> Option<GuestRam> {
        self.vcpu.memory.clone()
    }

    /// Returns the vCPU that this thread runs, for changing what KVM copies at exits.
    #[must_use]
    pub fn vcpu_mut(&mut self) -> &mut Vcpu {
        self.vcpu
    }

    /// Returns the vCPU that this thread runs.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu {
        self.vcpu
    }
}
