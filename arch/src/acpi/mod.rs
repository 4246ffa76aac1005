//! The ACPI tables (ACPI 6.5 §5.2): a hardware-reduced platform with only what is there, so that the guest does not
//! probe for a PIC, a PIT, a CMOS clock, a keyboard controller or a VGA.

mod dsdt;
mod fadt;
mod madt;
mod mcfg;

use crate::layout::{ACPI_END, ACPI_RSDP};
use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;

pub(crate) const OEM_ID: [u8; 6] = *b"HWVMM ";
pub(crate) const OEM_TABLE_ID: [u8; 8] = *b"HWVMMTBL";
pub(crate) const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Clone, Debug)]
pub struct Platform<'a> {
    /// The APIC id of each vCPU, in vCPU order.
    pub apic_ids: &'a [u32],
    /// The UARTs that exist: (first port, gsi).
    pub uarts: &'a [(u16, u32)],
    /// Whether the tables say that the PC's legacy devices are not there.
    pub legacy_free: bool,
    /// Pins of the I/O APIC: the first one's GSI, and how many; `None` where there is no I/O APIC.
    pub pins: Option<(u32, u32)>,
    /// The segment of the PCI bus, where there is one. Linux asks for the registers of segment 0 by ports, where those
    /// answer, and for those of all others by memory.
    pub pci: Option<u8>,
    /// The virtio-mmio devices: (gpa, bytes, gsi).
    pub virtio_mmio: &'a [(u64, u64, u32)],
}

/// The tables do not fit into the firmware area.
#[derive(Debug, Error)]
#[error("the ACPI tables take {0} bytes, and there is room for {1}: use fewer vCPUs")]
pub struct AcpiTooLarge(u64, u64);

/// One table and where it goes.
pub struct Placed {
    /// gpa.
    pub address: u64,
    /// The table.
    pub bytes: Vec<u8>,
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// All tables with their places: the RSDP at [`ACPI_RSDP`], the others behind it, each at a multiple of 16.
///
/// # Errors
/// [`AcpiTooLarge`] where they do not fit below [`ACPI_END`].
pub fn tables(platform: &Platform<'_>) -> Result<Vec<Placed>, AcpiTooLarge> {
    let mut next = ACPI_RSDP + 64;
    let mut placed = Vec::new();
    let mut place = |bytes: Vec<u8>| {
        let address = next;
        next = (address + bytes.len() as u64).next_multiple_of(16);
        placed.push(Placed { address, bytes });
        address
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
    placed.push(Placed { address: ACPI_RSDP, bytes: bytes_of(&Rsdp::new(OEM_ID, xsdt)) });
    if next > ACPI_END {
        return Err(AcpiTooLarge(next - ACPI_RSDP, ACPI_END - ACPI_RSDP));
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_has_its_checksum_and_they_do_not_overlap() {
        let apic_ids: Vec<u32> = (0..254).collect();
        let platform = Platform {
            apic_ids: &apic_ids,
            uarts: &[(0x3f8, 4), (0x2f8, 3)],
            legacy_free: true,
            pins: Some((0, 24)),
            pci: Some(1),
            virtio_mmio: &[(0xd000_0000, 4096, 16)],
        };
        let mut all = tables(&platform).expect("254 vCPUs fit");
        for table in &all {
            assert_eq!(sum(&table.bytes), 0, "{:?}", std::str::from_utf8(&table.bytes[..4]));
        }
        all.sort_by_key(|table| table.address);
        assert!(all.windows(2).all(|p| p[0].address + p[0].bytes.len() as u64 <= p[1].address));
        assert_eq!(&all[0].bytes[..8], b"RSD PTR ");
    }
}
