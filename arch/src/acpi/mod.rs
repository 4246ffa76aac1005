//! The ACPI tables (ACPI 6.5 §5.2) of a hardware-reduced platform. They list only the devices that exist, so that the guest
//! does not probe for a PIC, a PIT, a CMOS clock, a keyboard controller or a VGA: each probe is a VM exit.

mod dsdt;
mod fadt;
mod madt;
mod mcfg;
mod platform;

pub use platform::{IoApicPins, Platform, VirtioMmio};

use crate::layout::{ACPI_END, ACPI_RSDP};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use platform::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use thiserror::Error;

/// The tables do not fit into the firmware area.
#[derive(Debug, Error)]
#[error("the ACPI tables take {bytes} bytes, and there is room for {room}: use fewer vCPUs")]
pub struct AcpiTooLarge {
    bytes: u64,
    room: u64,
}

/// A table for guest memory.
pub struct PlacedTable {
    /// The gpa of its first byte.
    pub gpa: u64,
    /// The table, with header and checksum.
    pub bytes: Vec<u8>,
}

/// All tables for `platform`: the RSDP at [`ACPI_RSDP`], the others behind it, each at a multiple of 16.
///
/// # Errors
/// [`AcpiTooLarge`] where they do not fit below [`ACPI_END`].
pub fn tables(platform: &Platform<'_>) -> Result<Vec<PlacedTable>, AcpiTooLarge> {
    let mut next = ACPI_RSDP + 64;
    let mut placed = Vec::new();
    let mut place = |bytes: Vec<u8>| {
        let gpa = next;
        next = (gpa + bytes.len() as u64).next_multiple_of(16);
        placed.push(PlacedTable { gpa, bytes });
        gpa
    };
    let dsdt = place(dsdt::dsdt(platform));
    let fadt = place(bytes_of(&fadt::fadt(dsdt, platform.legacy_free)));
    let madt = place(madt::madt(platform));
    let mcfg = platform.pci.map(|segment| place(bytes_of(&mcfg::mcfg(segment))));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let Some(mcfg) = mcfg {
        xsdt.add_entry(mcfg);
    }
    let xsdt = place(bytes_of(&xsdt));
    placed.push(PlacedTable { gpa: ACPI_RSDP, bytes: bytes_of(&Rsdp::new(OEM_ID, xsdt)) });
    if next > ACPI_END {
        return Err(AcpiTooLarge { bytes: next - ACPI_RSDP, room: ACPI_END - ACPI_RSDP });
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GpaRange, UARTS};

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn tables_have_valid_checksums_and_do_not_overlap() {
        let apic_ids: Vec<u32> = (0..254).collect();
        let platform = Platform {
            apic_ids: &apic_ids,
            uarts: &UARTS[..2],
            legacy_free: true,
            pins: Some(IoApicPins { first_gsi: 0, count: 24 }),
            pci: Some(1),
            virtio_mmio: &[VirtioMmio { range: GpaRange { start: 0xd000_0000, bytes: 4096 }, gsi: 16 }],
            vmgenid: Some(12),
        };
        let mut all = tables(&platform).expect("254 vCPUs fit");
        for table in &all {
            assert_eq!(sum(&table.bytes), 0, "{:?}", std::str::from_utf8(&table.bytes[..4]));
        }
        all.sort_by_key(|table| table.gpa);
        assert!(all.windows(2).all(|p| p[0].gpa + p[0].bytes.len() as u64 <= p[1].gpa));
        assert_eq!(&all[0].bytes[..8], b"RSD PTR ");
    }
}
