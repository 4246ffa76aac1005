//! GSI routing: which interrupt a GSI raises (KVM API 4.52, KVM_SET_GSI_ROUTING). The ioctl replaces the whole table, so a
//! copy of it is kept here.

use super::error::{KvmError, Named};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;

/// The number of pins of the in-kernel I/O APIC. GSIs from here on are free for MSIs.
pub(super) const IOAPIC_PINS: u32 = 24;
/// The number of pins of each of the two PICs.
const PIC_PINS: u32 = 8;

/// The routing table of a machine.
#[derive(Default)]
pub(super) struct Routes {
    /// The MSI of each GSI that has one.
    messages: BTreeMap<u32, Message>,
    /// If true, I/O APIC and PICs are not in the kernel (KVM_CAP_SPLIT_IRQCHIP), and the table has no pins.
    split: bool,
}

/// The address and data of a message-signalled interrupt (PCI 3.0 §6.8.1).
#[derive(Clone, Copy, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

/// The pins of I/O APIC and PICs. KVM sets them up when it creates the interrupt controllers, and the first table that is
/// set replaces them.
fn pins() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::new();
    for gsi in 0..IOAPIC_PINS {
        match gsi {
            0..PIC_PINS => entries.push(pin(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)),
            PIC_PINS..16 => entries.push(pin(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)),
            _ => {}
        }
        entries.push(pin(gsi, KVM_IRQCHIP_IOAPIC, gsi));
    }
    entries
}

fn message(gsi: u32, Message { address, data }: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let [low, high] = [address & 0xffff_ffff, address >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    entry.u.msi.address_lo = low;
    entry.u.msi.address_hi = high;
    entry.u.msi.data = data;
    entry
}

impl Routes {
    /// Leaves the pins out of the table from now on: there is no I/O APIC or PIC in the kernel.
    pub(super) fn set_split(&mut self) {
        self.split = true;
    }

    pub(super) fn is_split(&self) -> bool {
        self.split
    }

    /// Removes the MSI of `gsi`.
    pub(super) fn clear(&mut self, fd: &VmFd, gsi: u32) -> Result<(), KvmError> {
        if self.messages.remove(&gsi).is_none() { Ok(()) } else { self.update(fd) }
    }

    /// Makes `gsi` raise the MSI `data` at `address`.
    pub(super) fn set(&mut self, fd: &VmFd, gsi: u32, address: u64, data: u32) -> Result<(), KvmError> {
        let message = Message { address, data };
        if self.messages.insert(gsi, message) == Some(message) {
            return Ok(());
        }
        self.update(fd)
    }

    /// Sets the table in KVM.
    fn update(&self, fd: &VmFd) -> Result<(), KvmError> {
        let mut entries = if self.split { Vec::new() } else { pins() };
        entries.extend(self.messages.iter().map(|(gsi, msi)| message(*gsi, *msi)));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG));
        let table = table.named("KVM_SET_GSI_ROUTING")?;
        fd.set_gsi_routing(&table).named("KVM_SET_GSI_ROUTING")
    }
}
