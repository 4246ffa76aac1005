//! MADT (ACPI 6.5 §5.2.12): the processors and the one I/O APIC.

use super::platform::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, bytes_of};
use crate::layout::{IOAPIC, LAPIC};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};

/// A processor-local x2APIC structure (§5.2.12.12), for ids that do not fit into one byte.
struct LocalX2Apic {
    apic_id: u32,
    uid: u32,
}

impl Aml for LocalX2Apic {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&[9, 16, 0, 0]);
        sink.dword(self.apic_id);
        sink.dword(1);
        sink.dword(self.uid);
    }
}

/// The bytes of the MADT.
pub(super) fn madt(platform: &Platform<'_>) -> Vec<u8> {
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC));
    if let Some(pins) = platform.pins {
        madt.add_structure(IoApic::new(0, IOAPIC, pins.first_gsi));
    }
    let mut wide = Vec::new();
    for (uid, &apic_id) in (0_u32..).zip(platform.apic_ids) {
        match (u8::try_from(uid), u8::try_from(apic_id)) {
            (Ok(uid8), Ok(id8)) if id8 < 0xff => {
                madt.add_structure(ProcessorLocalApic::new(uid8, id8, EnabledStatus::Enabled));
            }
            _ => LocalX2Apic { apic_id, uid }.to_aml_bytes(&mut wide),
        }
    }
    let mut bytes = bytes_of(&madt);
    if !wide.is_empty() {
        bytes.extend_from_slice(&wide);
        finish(&mut bytes);
    }
    bytes
}

/// Sets length and checksum in the table's header.
fn finish(table: &mut [u8]) {
    let length = u32::try_from(table.len()).unwrap_or(u32::MAX);
    table[4..8].copy_from_slice(&length.to_le_bytes());
    table[9] = 0;
    table[9] = table.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte));
}
