//! A vCPU's file descriptor: registers, CPUID, MSRs, and running it.

use super::exit::{self, Exit};
use super::kick::Kickable;
use super::{Coalesced, KvmError, Named};
use crate::memory::GuestRam;
use hwvmm_devices::RegisterPage;
use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, KVM_SYNC_X86_REGS,
    KVM_SYNC_X86_SREGS, Msrs, kvm_cpuid_entry2, kvm_lapic_state, kvm_msr_entry, kvm_pre_fault_memory, kvm_regs,
    kvm_sregs,
};
use kvm_ioctls::{SyncReg, VcpuFd};
use number::{KVM_PRE_FAULT_MEMORY, KVM_X86_SETUP_MCE};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

#[allow(missing_docs, reason = "the macro makes a public function without documentation")]
mod number {
    use kvm_bindings::kvm_pre_fault_memory;
    vmm_sys_util::ioctl_iow_nr!(KVM_X86_SETUP_MCE, kvm_bindings::KVMIO, 0x9c, u64);
    vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, kvm_bindings::KVMIO, 0xd5, kvm_pre_fault_memory);
}

/// What a vCPU waits for, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuActivity {
    /// It runs, or something can wake it.
    Awake,
    /// Halted with interrupts off: nothing but an NMI or a reset wakes it.
    HaltedForGood,
    /// Never started by the guest, or parked again.
    NotStarted,
}

/// A vCPU. Belongs to one thread at a time.
pub struct Vcpu {
    fd: VcpuFd,
    id: u32,
    syncs_regs: bool,
    syncs_sregs: bool,
    can_sync_sregs: bool,
    // Keeps the guest's memory mapped as long as this vCPU could run.
    _memory: Option<GuestRam>,
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
            syncs_regs,
            syncs_sregs: false,
            can_sync_sregs: syncs(KVM_SYNC_X86_SREGS),
            _memory: memory,
            _pages: pages,
        }
    }

    /// The APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether RIP comes with every exit, without a system call.
    #[must_use]
    pub fn syncs_regs(&self) -> bool {
        self.syncs_regs
    }

    /// Sets the CPUID leaves (KVM API 4.20).
    ///
    /// # Errors
    /// Where there are too many, or KVM refuses.
    pub fn set_cpuid(&self, leaves: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let too_many = |_| KvmError {
            what: "KVM_SET_CPUID2 (too many leaves)",
            errno: libc::E2BIG,
            source: std::io::Error::from_raw_os_error(libc::E2BIG),
        };
        let leaves = CpuId::from_entries(leaves).map_err(too_many)?;
        self.fd.set_cpuid2(&leaves).named("KVM_SET_CPUID2")
    }

    /// Sets MSRs; those that KVM does not have are left out (KVM API 4.19 stops at the first it refuses).
    ///
    /// # Errors
    /// Where the ioctl itself fails.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        for entry in entries {
            let Ok(one) = Msrs::from_entries(std::slice::from_ref(entry)) else { continue };
            if self.fd.set_msrs(&one).named("KVM_SET_MSRS")? == 0 {
                log::debug!("vCPU {}: KVM does not take MSR {:#x}", self.id, entry.index);
            }
        }
        Ok(())
    }

    /// So many banks of machine-check registers (KVM API 4.107, KVM_X86_SETUP_MCE).
    ///
    /// # Errors
    /// Where KVM refuses.
    pub fn set_machine_check_banks(&self, banks: u8) -> Result<(), KvmError> {
        let capabilities = u64::from(banks);
        // SAFETY: the fd is a vCPU's, and the ioctl reads one 64-bit word.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_X86_SETUP_MCE(), &capabilities) };
        if result == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()).named("KVM_X86_SETUP_MCE") }
    }

    /// The ring of its machine's coalesced writes.
    ///
    /// # Errors
    /// Where it cannot be mapped.
    pub fn coalesced(&self) -> Result<Coalesced, KvmError> {
        Coalesced::new(self.fd.as_raw_fd())
    }

    /// The TSC's frequency in kHz (KVM API 4.56), where KVM tells it.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// General registers (KVM API 4.11).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().named("KVM_GET_REGS")
    }

    /// Sets the general registers (KVM API 4.12).
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

    /// Maps `size` bytes of guest memory from `gpa` on, before the guest touches them (KVM API 4.143, Linux 6.11).
    ///
    /// # Errors
    /// Where KVM lacks it or refuses.
    pub fn pre_fault(&self, gpa: u64, size: u64) -> Result<(), KvmError> {
        let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        while range.size > 0 {
            // SAFETY: the fd is a vCPU's and the argument is the structure that this ioctl takes; KVM moves `gpa` and
            // `size` on by what it did.
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

    /// Whether this vCPU will ever run again by itself (KVM API 4.38).
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

    /// RIP at the last exit, where it came with it (see [`Vcpu::syncs_regs`]).
    #[must_use]
    pub fn synced_rip(&self) -> Option<u64> {
        self.syncs_regs.then(|| self.fd.sync_regs().regs.rip)
    }

    /// Has the privilege level come with every exit from now on, where KVM can: it costs some time at each.
    pub fn sync_cpl(&mut self) {
        if self.can_sync_sregs {
            self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
            self.syncs_sregs = true;
        }
    }

    /// The privilege level at the last exit (SDM vol. 3A §6.5: SS.DPL), where it came with it (see
    /// [`Vcpu::sync_cpl`]).
    #[must_use]
    pub fn synced_cpl(&self) -> Option<u8> {
        self.syncs_sregs.then(|| self.fd.sync_regs().sregs.ss.dpl)
    }

    /// An MSR's value (KVM API 4.18); `None` where KVM does not have it.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
        let read = self.fd.get_msrs(&mut one).ok()?;
        one.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
    }

    /// The vCPU's binary statistics (KVM API 4.133).
    ///
    /// # Errors
    /// Where KVM has none.
    pub fn stats_fd(&self) -> Result<File, KvmError> {
        super::stats::open(&self.fd)
    }

    /// Makes this thread the one that runs the vCPU; kicks reach it from here on.
    #[must_use]
    pub fn enter(&mut self) -> Running<'_> {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        Running { _kickable: Kickable::new(immediate_exit), vcpu: self }
    }
}

/// A vCPU on its thread.
pub struct Running<'a> {
    _kickable: Kickable,
    vcpu: &'a mut Vcpu,
}

impl Running<'_> {
    /// Runs the guest until it exits (KVM API 4.10).
    ///
    /// # Errors
    /// Where KVM_RUN fails for another reason than a signal.
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        exit::run(&mut self.vcpu.fd).named("KVM_RUN")
    }

    /// Lets KVM_RUN run again after a kick.
    pub fn clear_kick(&mut self) {
        self.vcpu.fd.set_kvm_immediate_exit(0);
    }

    /// Lets KVM finish the instruction that the last exit was for, without running the guest further.
    ///
    /// # Errors
    /// As [`Running::run`].
    pub fn complete(&mut self) -> Result<(), KvmError> {
        self.vcpu.fd.set_kvm_immediate_exit(1);
        let result = self.run().map(|_| ());
        self.clear_kick();
        result
    }

    /// The vCPU itself.
    #[must_use]
    pub fn vcpu(&self) -> &Vcpu {
        self.vcpu
    }
}
