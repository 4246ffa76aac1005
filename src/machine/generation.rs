//! The generation identifier of the machine (VMGenID; Microsoft, "Virtual Machine Generation ID", 2012): each run has another one. Linux
//! seeds its random numbers anew when it changes, so that no two runs from one snapshot have the same.

use super::error::MachineError;
use crate::kvm::Vm;
use crate::memory::GuestRam;
use hwvmm_arch::layout::{VMGENID, VMGENID_BYTES};
use rustix::rand::{GetRandomFlags, getrandom};
use std::io;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The identifier in guest memory, and the interrupt that says that it has changed.
pub(super) struct GenerationId {
    changed: EventFd,
}

impl GenerationId {
    /// Makes the identifier's interrupt, with the GSI `gsi`.
    ///
    /// # Errors
    /// Where the eventfd cannot be made or given to KVM.
    pub(super) fn new(vm: &Vm, gsi: u32) -> Result<Self, MachineError> {
        let changed = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&changed, gsi)?;
        Ok(Self { changed })
    }

    /// Writes a new identifier to guest memory. The guest must not run.
    ///
    /// # Errors
    /// Where the host has no random numbers, or the memory cannot be written.
    pub(super) fn renew(ram: &GuestRam) -> io::Result<()> {
        let mut id = [0; VMGENID_BYTES];
        getrandom(&mut id, GetRandomFlags::empty())?;
        ram.get().write_slice(&id, GuestAddress(VMGENID)).map_err(io::Error::other)
    }

    /// Raises the interrupt. The interrupt controllers must have their state.
    ///
    /// # Errors
    /// Where the eventfd cannot be written.
    pub(super) fn announce(&self) -> io::Result<()> {
        self.changed.write(1)
    }
}
