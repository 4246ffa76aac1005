//! What the ACPI tables describe, and what all of them have in common.

use crate::layout::{GpaRange, Uart};
use acpi_tables::Aml;

/// The OEM id in every table's header (ACPI 6.5 §5.2.6).
pub(super) const OEM_ID: [u8; 6] = *b"HWVMM ";
/// The OEM table id in every table's header.
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"HWVMMTBL";
/// The OEM revision in every table's header.
pub(super) const OEM_REVISION: u32 = 1;

/// The interrupt inputs of the I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApicPins {
    /// The GSI of the first pin.
    pub first_gsi: u32,
    /// The number of pins.
    pub count: u32,
}

/// Where a virtio-mmio device is (virtio 1.3 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// The guest physical addresses of its registers.
    pub range: GpaRange,
    /// The GSI that it raises, edge-triggered.
    pub gsi: u32,
}

/// The hardware that the ACPI tables describe.
#[derive(Clone, Debug)]
pub struct Platform<'a> {
    /// The APIC id of each vCPU, in vCPU order.
    pub apic_ids: &'a [u32],
    /// The UARTs that exist.
    pub uarts: &'a [Uart],
    /// If true, the tables say that the PC's legacy devices (keyboard controller, CMOS clock, VGA) are absent.
    pub legacy_free: bool,
    /// The pins of the I/O APIC; `None` where there is no I/O APIC.
    pub pins: Option<IoApicPins>,
    /// The segment of the PCI bus, where there is one. Linux accesses the configuration space of segment 0 by ports where
    /// they respond, and that of every other segment by ECAM.
    pub pci: Option<u8>,
    /// The virtio-mmio devices, each of which gets a device node in the DSDT.
    pub virtio_mmio: &'a [VirtioMmio],
    /// The GSI that says that the generation identifier has changed, edge-triggered; `None` where there is no identifier.
    pub vmgenid: Option<u32>,
}

/// The bytes of a table.
pub(super) fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}
