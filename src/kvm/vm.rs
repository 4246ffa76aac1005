//! A virtual machine: memslots, interrupt controllers, irqfds, ioeventfds, capabilities.

use super::error::{KvmError, Named};
use super::routes::{IOAPIC_PINS, Routes};
use super::stats;
use super::vcpu::Vcpu;
use crate::memory::GuestRam;
use hwvmm_devices::RegisterPage;
use kvm_bindings::{
    KVM_CAP_COALESCED_PIO, KVM_CAP_HALT_POLL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

/// The level of a pin of an interrupt controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinLevel {
    /// No interrupt is asked for.
    Low,
    /// An interrupt is asked for.
    High,
}

/// A virtual machine. Guest memory stays mapped as long as the value lives.
pub struct Vm {
    fd: VmFd,
    routes: Mutex<Routes>,
    memory: Option<GuestRam>,
    pages: Arc<Mutex<Vec<RegisterPage>>>,
}

impl Vm {
    pub(super) fn new(fd: VmFd) -> Self {
        Self { fd, routes: Mutex::default(), memory: None, pages: Arc::default() }
    }

    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Returns true if the I/O APIC is not in the kernel (see [`Vm::split_irqchip`]).
    #[must_use]
    pub fn is_split(&self) -> bool {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).is_split()
    }

    /// Sets the machine's memory: one memslot for each region (KVM API 4.35, KVM_SET_USER_MEMORY_REGION).
    ///
    /// # Errors
    /// Where KVM refuses a memslot.
    pub fn set_memory(&mut self, memory: GuestRam) -> Result<(), KvmError> {
        for (slot, region) in (0_u32..).zip(memory.get().iter()) {
            self.set_slot(slot, region)?;
        }
        self.memory = Some(memory);
        Ok(())
    }

    fn set_slot(&self, slot: u32, region: &GuestRegionMmap) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a whole mapping that `GuestRam` owns, and `self` keeps that memory until the
        // machine is gone: `memory` is declared after `fd`, so it is dropped after it, and vCPU fds that outlive this
        // value hold a clone of the memory (see `create_vcpu`).
        unsafe { self.fd.set_user_memory_region(slot) }.named("KVM_SET_USER_MEMORY_REGION (guest memory)")
    }

    /// Maps `page` read-only at `gpa`: the guest's reads make no exit, its writes are MMIO exits (KVM API 4.35,
    /// KVM_MEM_READONLY). To be called after [`Vm::set_memory`].
    ///
    /// # Errors
    /// Where KVM does not have KVM_CAP_READONLY_MEM.
    pub fn map_register_page(&self, gpa: u64, page: &RegisterPage) -> Result<(), KvmError> {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let banks = self.memory.as_ref().map_or(0, |memory| memory.get().num_regions());
        let slot = kvm_userspace_memory_region {
            slot: u32::try_from(banks + pages.len()).unwrap_or(u32::MAX),
            flags: KVM_MEM_READONLY,
            guest_phys_addr: gpa,
            memory_size: RegisterPage::BYTES as u64,
            userspace_addr: page.address() as u64,
        };
        // SAFETY: the range is the whole page, which stays mapped while the clone in `pages` lives: that is dropped after
        // `fd`, and vCPU fds that outlive this value hold on to it too (see `create_vcpu`).
        unsafe { self.fd.set_user_memory_region(slot) }.named("KVM_SET_USER_MEMORY_REGION (read-only page)")?;
        pages.push(page.clone());
        Ok(())
    }

    /// The machine's memory, once it is set.
    #[must_use]
    pub fn memory(&self) -> Option<&GuestRam> {
        self.memory.as_ref()
    }

    /// Sets the pages that KVM needs on Intel processors without unrestricted guest mode (KVM_SET_TSS_ADDR,
    /// KVM_SET_IDENTITY_MAP_ADDR); they have no effect elsewhere. Both are gpas.
    ///
    /// # Errors
    /// Where an ioctl fails.
    pub fn set_real_mode_pages(&self, tss: u64, identity_map: u64) -> Result<(), KvmError> {
        self.fd.set_identity_map_address(identity_map).named("KVM_SET_IDENTITY_MAP_ADDR")?;
        let tss = usize::try_from(tss).unwrap_or(usize::MAX);
        self.fd.set_tss_address(tss).named("KVM_SET_TSS_ADDR")
    }

    /// Creates local APICs, I/O APIC and PICs in the kernel (KVM API 4.24, KVM_CREATE_IRQCHIP).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().named("KVM_CREATE_IRQCHIP")
    }

    /// Sets the level of a pin of the in-kernel PICs and I/O APIC (KVM API 4.25, KVM_IRQ_LINE).
    ///
    /// # Errors
    /// Where the interrupt controllers are not in the kernel.
    pub fn set_irq_line(&self, gsi: u32, level: PinLevel) -> Result<(), KvmError> {
        self.fd.set_irq_line(gsi, level == PinLevel::High).named("KVM_IRQ_LINE")
    }

    /// Sets the first vector of each of the two PICs, and unmasks all of their interrupts (KVM API 4.26, 4.27).
    ///
    /// # Errors
    /// Where the PICs are not in the kernel.
    pub fn set_pic_vectors(&self, vectors: [u8; 2]) -> Result<(), KvmError> {
        for (chip_id, vector) in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(vectors) {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd.get_irqchip(&mut chip).named("KVM_GET_IRQCHIP")?;
            // SAFETY: KVM filled the member that goes with `chip_id`, plain bytes of which every value is valid.
            let pic = unsafe { &mut chip.chip.pic };
            (pic.irq_base, pic.imr) = (vector, 0);
            self.fd.set_irqchip(&chip).named("KVM_SET_IRQCHIP")?;
        }
        Ok(())
    }

    /// Creates the local APICs in the kernel, and no I/O APIC or PIC (KVM API 7.5, KVM_CAP_SPLIT_IRQCHIP). The I/O APIC is
    /// then emulated by hwvmm and sends its interrupts as MSIs.
    ///
    /// # Errors
    /// Where KVM does not have the capability (before Linux 4.4).
    pub fn split_irqchip(&self) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        cap.args[0] = u64::from(IOAPIC_PINS);
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(SPLIT_IRQCHIP)")?;
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).set_split();
        Ok(())
    }

    /// Makes KVM signal `event` at a write of any size to `port`, instead of returning from KVM_RUN (KVM API 4.59,
    /// KVM_IOEVENTFD).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn register_port_ioeventfd(&self, event: &EventFd, port: u16) -> Result<(), KvmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Pio(port.into()), NoDatamatch).named("KVM_IOEVENTFD")
    }

    /// Makes KVM raise an edge on `gsi` whenever `event` is signalled (KVM API 4.75, KVM_IRQFD).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).named("KVM_IRQFD")
    }

    /// The first GSI that is free for MSIs: those below are the pins of the I/O APIC.
    pub const FIRST_MESSAGE_GSI: u32 = IOAPIC_PINS;

    /// Makes `gsi` raise the MSI `data` at `address` (KVM API 4.52, KVM_SET_GSI_ROUTING).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn route_message(&self, gsi: u32, address: u64, data: u32) -> Result<(), KvmError> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).set(&self.fd, gsi, address, data)
    }

    /// Removes the MSI of `gsi`.
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn unroute(&self, gsi: u32) -> Result<(), KvmError> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).clear(&self.fd, gsi)
    }

    /// Makes KVM signal `event` at a write to `gpa`, instead of returning from KVM_RUN (KVM API 4.59, KVM_IOEVENTFD): at any
    /// write, or with `datamatch` only at a 32-bit write of that value.
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn register_ioeventfd(&self, event: &EventFd, gpa: u64, datamatch: Option<u32>) -> Result<(), KvmError> {
        let address = IoEventAddress::Mmio(gpa);
        match datamatch {
            Some(value) => self.fd.register_ioevent(event, &address, value),
            None => self.fd.register_ioevent(event, &address, NoDatamatch),
        }
        .named("KVM_IOEVENTFD")
    }

    /// Makes accesses to MSRs that KVM does not know exit to user space, instead of raising #GP (KVM API 7.21,
    /// KVM_CAP_X86_USER_SPACE_MSR).
    ///
    /// # Errors
    /// Where KVM does not have the capability (before Linux 5.10).
    pub fn trap_unknown_msrs(&self) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL);
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(X86_USER_SPACE_MSR)")
    }

    /// Makes KVM put writes to `count` ports from `port` on into the ring of [`Vcpu::coalesced_ring`], instead of returning
    /// from KVM_RUN (KVM API 4.116, KVM_CAP_COALESCED_PIO).
    ///
    /// # Errors
    /// Where KVM does not have the capability.
    pub fn coalesce_ports(&self, port: u16, count: u32) -> Result<(), KvmError> {
        if self.capability(KVM_CAP_COALESCED_PIO) <= 0 {
            return Err(kvm_ioctls::Error::new(libc::ENOSYS)).named("KVM_CAP_COALESCED_PIO");
        }
        self.fd.register_coalesced_mmio(IoEventAddress::Pio(port.into()), count).named("KVM_REGISTER_COALESCED_MMIO")
    }

    /// As [`Vm::coalesce_ports`], for writes to `count` bytes of device memory from `gpa` on (KVM_CAP_COALESCED_MMIO).
    ///
    /// # Errors
    /// Where KVM does not have the capability.
    pub fn coalesce_memory(&self, gpa: u64, count: u32) -> Result<(), KvmError> {
        self.fd.register_coalesced_mmio(IoEventAddress::Mmio(gpa), count).named("KVM_REGISTER_COALESCED_MMIO")
    }

    /// Disables the exits of `instructions`, a mask of KVM_X86_DISABLE_EXITS_* (KVM API 7.13). To be called before the first
    /// vCPU is created.
    ///
    /// # Errors
    /// Where KVM does not allow it on this host.
    pub fn disable_exits(&self, instructions: u32) -> Result<(), KvmError> {
        let allowed = u32::try_from(self.capability(KVM_CAP_X86_DISABLE_EXITS)).unwrap_or(0);
        if instructions & !allowed != 0 {
            return Err(kvm_ioctls::Error::new(libc::EOPNOTSUPP)).named("KVM_CAP_X86_DISABLE_EXITS");
        }
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_DISABLE_EXITS, ..Default::default() };
        cap.args[0] = u64::from(instructions);
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(X86_DISABLE_EXITS)")
    }

    /// Sets the longest time in nanoseconds that the host polls for the wake-up of a halted vCPU (KVM API 7.20,
    /// KVM_CAP_HALT_POLL).
    ///
    /// # Errors
    /// Where KVM does not have the capability.
    pub fn set_halt_poll(&self, longest_ns: u64) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_HALT_POLL, ..Default::default() };
        cap.args[0] = longest_ns;
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(HALT_POLL)")
    }

    /// The value of a capability of this machine (KVM API 4.4, KVM_CHECK_EXTENSION): 0 where it is missing.
    #[must_use]
    pub fn capability(&self, number: u32) -> i32 {
        self.fd.check_extension_raw(number.into())
    }

    /// Creates a vCPU with the APIC id `id` (KVM API 4.7, KVM_CREATE_VCPU).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).named("KVM_CREATE_VCPU")?;
        let sync_regs = self.capability(kvm_bindings::KVM_CAP_SYNC_REGS);
        Ok(Vcpu::new(fd, id, sync_regs, self.memory.clone(), Arc::clone(&self.pages)))
    }

    /// Opens the machine's binary statistics (KVM API 4.133, KVM_GET_STATS_FD).
    ///
    /// # Errors
    /// Where KVM has none (before Linux 5.14).
    pub fn stats_fd(&self) -> Result<File, KvmError> {
        stats::open(&self.fd)
    }
}
