//! GSI routing: which interrupt a GSI raises (KVM API 4.52). KVM takes the whole table at once, so it is kept here.

use super::{KvmError, Named};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;

/// Pins of the in-kernel I/O APIC. GSIs from here on are free for messages.
pub(super) const IOAPIC_PINS: u32 = 24;
const PIC_PINS: u32 = 8;

/// The table.
#[derive(Default)]
pub(super) struct Routes {
    messages: BTreeMap<u32, (u64, u32)>,
    /// The interrupt controllers with pins are not in the kernel.
    no_pins: bool,
}

fn pin(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

/// What KVM has by itself once the interrupt controllers are made, and loses with the first table of ours.
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

fn message(gsi: u32, address: u64, data: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let [low, high] = [address & 0xffff_ffff, address >> 32].map(|half| u32::try_from(half).unwrap_or(0));
    entry.u.msi.address_lo = low;
    entry.u.msi.address_hi = high;
    entry.u.msi.data = data;
    entry
}

impl Routes {
    /// There are messages only.
    pub(super) fn without_pins(&mut self) {
        self.no_pins = true;
    }

    /// From now on `gsi` sends nothing.
    pub(super) fn clear(&mut self, fd: &VmFd, gsi: u32) -> Result<(), KvmError> {
        if self.messages.remove(&gsi).is_none() { Ok(()) } else { self.tell(fd) }
    }

    /// From now on `gsi` sends `data` to `address`.
    pub(super) fn set(&mut self, fd: &VmFd, gsi: u32, address: u64, data: u32) -> Result<(), KvmError> {
        if self.messages.insert(gsi, (address, data)) == Some((address, data)) {
            return Ok(());
        }
        self.tell(fd)
    }

    fn tell(&self, fd: &VmFd) -> Result<(), KvmError> {
        let mut entries = if self.no_pins { Vec::new() } else { pins() };
        entries.extend(self.messages.iter().map(|(gsi, (address, data))| message(*gsi, *address, *data)));
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG));
        let table = table.named("KVM_SET_GSI_ROUTING")?;
        fd.set_gsi_routing(&table).named("KVM_SET_GSI_ROUTING")
    }
}
