//! A virtual machine's file descriptor: memory slots, interrupt controllers, irqfds.

use super::routes::{IOAPIC_PINS, Routes};
use super::{KvmError, Named, Vcpu};
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

/// A machine. Guest memory stays mapped as long as it lives.
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

    /// Gives the machine its memory: one slot a region (KVM API 4.35).
    ///
    /// # Errors
    /// Where a slot is refused.
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

    /// Has the guest read `page` at `gpa` by itself; what it writes there is MMIO (KVM API 4.35, KVM_MEM_READONLY). After
    /// [`Vm::set_memory`].
    ///
    /// # Errors
    /// Where KVM lacks it.
    pub fn show_page(&self, gpa: u64, page: &RegisterPage) -> Result<(), KvmError> {
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

    /// The guest's memory, once set.
    #[must_use]
    pub fn memory(&self) -> Option<&GuestRam> {
        self.memory.as_ref()
    }

    /// The pages that Intel processors without unrestricted guests need (KVM API 4.13, 4.41); no effect elsewhere.
    ///
    /// # Errors
    /// Where an ioctl fails.
    pub fn set_real_mode_pages(&self, tss: u64, identity_map: u64) -> Result<(), KvmError> {
        self.fd.set_identity_map_address(identity_map).named("KVM_SET_IDENTITY_MAP_ADDR")?;
        let tss = usize::try_from(tss).unwrap_or(usize::MAX);
        self.fd.set_tss_address(tss).named("KVM_SET_TSS_ADDR")
    }

    /// Local APICs, I/O APIC and PIC in the kernel (KVM API 4.24).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        self.fd.create_irq_chip().named("KVM_CREATE_IRQCHIP")
    }

    /// Raises or lowers a line of the interrupt controllers in the kernel, at PIC and I/O APIC (KVM API 4.25).
    ///
    /// # Errors
    /// Where the controllers are not in the kernel.
    pub fn set_irq_line(&self, gsi: u32, high: bool) -> Result<(), KvmError> {
        self.fd.set_irq_line(gsi, high).named("KVM_IRQ_LINE")
    }

    /// Has the two PICs send their interrupts from these vectors on, none masked (KVM API 4.26, 4.27).
    ///
    /// # Errors
    /// Where they are not in the kernel.
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

    /// Local APICs in the kernel, and nothing else (KVM API 7.5): the I/O APIC is ours, its pins send messages.
    ///
    /// # Errors
    /// Where KVM lacks it (before Linux 4.4).
    pub fn split_irqchip(&self) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        cap.args[0] = u64::from(IOAPIC_PINS);
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(SPLIT_IRQCHIP)")?;
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).without_pins();
        Ok(())
    }

    /// Writes of any size to `port` wake `event`, and do not leave the kernel (KVM API 4.59).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn register_port_ioeventfd(&self, event: &EventFd, port: u16) -> Result<(), KvmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Pio(port.into()), NoDatamatch).named("KVM_IOEVENTFD")
    }

    /// Raises an edge on `gsi` whenever `event` is written (KVM API 4.75).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).named("KVM_IRQFD")
    }

    /// The first GSI that is free for messages (MSI).
    pub const FIRST_MESSAGE_GSI: u32 = IOAPIC_PINS;

    /// From now on `gsi` sends the message `data` to `address` (KVM API 4.52).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn route_message(&self, gsi: u32, address: u64, data: u32) -> Result<(), KvmError> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).set(&self.fd, gsi, address, data)
    }

    /// From now on `gsi` sends nothing.
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn unroute(&self, gsi: u32) -> Result<(), KvmError> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner).clear(&self.fd, gsi)
    }

    /// Has KVM write `event` when the guest writes to `gpa` (KVM API 4.59), instead of leaving KVM_RUN: any write, or
    /// with `datamatch` only a 32-bit write of that value.
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

    /// Sends accesses to MSRs that KVM does not know to user space (KVM API 7.26), instead of a #GP from the kernel.
    ///
    /// # Errors
    /// Where KVM lacks the capability.
    pub fn trap_unknown_msrs(&self) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        cap.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL);
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(X86_USER_SPACE_MSR)")
    }

    /// Has the guest's writes to `count` ports from `port` on wait in the ring (KVM API 4.116, KVM_CAP_COALESCED_PIO)
    /// that [`Vcpu::coalesced`] gives.
    ///
    /// # Errors
    /// Where KVM lacks it.
    pub fn coalesce_ports(&self, port: u16, count: u32) -> Result<(), KvmError> {
        if self.capability(KVM_CAP_COALESCED_PIO) <= 0 {
            return Err(kvm_ioctls::Error::new(libc::ENOSYS)).named("KVM_CAP_COALESCED_PIO");
        }
        self.fd.register_coalesced_mmio(IoEventAddress::Pio(port.into()), count).named("KVM_REGISTER_COALESCED_MMIO")
    }

    /// The same for `count` bytes of memory where a device is, from `gpa` on (KVM_CAP_COALESCED_MMIO).
    ///
    /// # Errors
    /// Where KVM lacks it.
    pub fn coalesce_memory(&self, gpa: u64, count: u32) -> Result<(), KvmError> {
        self.fd.register_coalesced_mmio(IoEventAddress::Mmio(gpa), count).named("KVM_REGISTER_COALESCED_MMIO")
    }

    /// The guest's idle instructions (KVM_X86_DISABLE_EXITS_*) do not exit (KVM API 7.13). Before the first vCPU.
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

    /// The longest time in nanoseconds that the host polls for a halted vCPU's wake-up (KVM API 7.20).
    ///
    /// # Errors
    /// Where KVM lacks the capability.
    pub fn set_halt_poll(&self, longest_ns: u64) -> Result<(), KvmError> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_HALT_POLL, ..Default::default() };
        cap.args[0] = longest_ns;
        self.fd.enable_cap(&cap).named("KVM_ENABLE_CAP(HALT_POLL)")
    }

    /// The value of a capability of this machine: 0 where it is missing.
    #[must_use]
    pub fn capability(&self, number: u32) -> i32 {
        self.fd.check_extension_raw(number.into())
    }

    /// A new vCPU whose APIC id is `id` (KVM API 4.7).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn create_vcpu(&self, id: u32) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).named("KVM_CREATE_VCPU")?;
        let sync_regs = self.capability(kvm_bindings::KVM_CAP_SYNC_REGS);
        Ok(Vcpu::new(fd, id, sync_regs, self.memory.clone(), Arc::clone(&self.pages)))
    }

    /// The machine's binary statistics (KVM API 4.133).
    ///
    /// # Errors
    /// Where KVM has none (before Linux 5.14).
    pub fn stats_fd(&self) -> Result<File, KvmError> {
        super::stats::open(&self.fd)
    }
}
