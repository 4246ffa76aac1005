//! DSDT (ACPI 6.5 §5.2.11.1): the UARTs that exist, the panic port and the soft-off state.

use super::platform::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, VirtioMmio};
use crate::layout::{
    PCI_ECAM, PCI_ECAM_BYTES, PCI_WINDOW, PCI_WINDOW_BYTES, PORT_PVPANIC, SLEEP_TYPE_S5, Uart, VMGENID,
};
use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

/// The notification that the generation identifier has changed (its specification, §2.4).
const VMGENID_CHANGED: u8 = 0x80;

/// One 16550 as ACPI names it: PNP0501, with its eight ports and its interrupt.
fn uart(index: usize, Uart { port, gsi }: Uart) -> Vec<u8> {
    let mut aml = Vec::new();
    Device::new(
        Path::new(&format!("COM{}", index + 1)),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &(index + 1)),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, gsi),
                    &IO::new(port, port, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// The panic port, under the id that Linux' pvpanic driver matches.
fn pvpanic() -> Vec<u8> {
    let mut aml = Vec::new();
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(PORT_PVPANIC, PORT_PVPANIC, 1, 1)])),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// The PCI bus, with a window for the BARs. There is no _PRT, because no device has an INTx line.
fn pci(segment: u8) -> Vec<u8> {
    let mut aml = Vec::new();
    let last = PCI_WINDOW + (PCI_WINDOW_BYTES - 1);
    Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &segment),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0_u16, 0_u16),
                    &IO::new(0xcf8, 0xcf8, 1, 8),
                    &AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, PCI_WINDOW, last, None),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// The configuration space of the PCI bus, reserved as the PCI firmware specification (3.3, §4.1.2) wants it: among the motherboard's
/// resources. Linux 6.12.117 does not use it otherwise, even where the memory map reserves it.
fn ecam() -> Vec<u8> {
    let mut aml = Vec::new();
    let (base, bytes) = (u32::try_from(PCI_ECAM).unwrap_or(0), u32::try_from(PCI_ECAM_BYTES).unwrap_or(0));
    Device::new(
        Path::new("ECAM"),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Memory32Fixed::new(true, base, bytes)])),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// A virtio-mmio device. Virtio 1.3 §4.2.1 leaves its discovery to the platform; drivers match the id LNRO0005.
fn virtio_mmio(index: usize, VirtioMmio { range, gsi }: VirtioMmio) -> Vec<u8> {
    let mut aml = Vec::new();
    let (base, bytes) = (u32::try_from(range.start).unwrap_or(0), u32::try_from(range.bytes).unwrap_or(0));
    Device::new(
        Path::new(&format!("VR{index:02}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, bytes),
                    &Interrupt::new(true, true, false, false, gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// The generation identifier (Microsoft, "Virtual Machine Generation ID", 2012), under the id that Linux' vmgenid driver matches, and a
/// generic event device (ACPI 6.5 §5.6.9) with interrupt `gsi` that notifies its driver of a change. A hardware-reduced platform has no
/// general-purpose event for it.
fn vmgenid(gsi: u32) -> Vec<u8> {
    let (low, high) = (u32::try_from(VMGENID & 0xffff_ffff).unwrap_or(0), u32::try_from(VMGENID >> 32).unwrap_or(0));
    let mut aml = Vec::new();
    Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(&mut aml);
    Device::new(
        Path::new("GED0"),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi)])),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &VMGENID_CHANGED)]),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// The bytes of the DSDT.
pub(super) fn dsdt(platform: &Platform<'_>) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut devices: Vec<u8> = platform.uarts.iter().enumerate().flat_map(|(i, place)| uart(i, *place)).collect();
    devices.extend(pvpanic());
    if let Some(segment) = platform.pci {
        devices.extend(pci(segment));
        devices.extend(ecam());
    }
    for (index, place) in platform.virtio_mmio.iter().enumerate() {
        devices.extend(virtio_mmio(index, *place));
    }
    if let Some(gsi) = platform.vmgenid {
        devices.extend(vmgenid(gsi));
    }
    sdt.append_slice(&Scope::raw("_SB_".into(), devices));
    let mut s5 = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut s5);
    sdt.append_slice(&s5);
    sdt.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Linux checks that firmware reserves the configuration space (arch/x86/pci/mmconfig-shared.c).
    #[test]
    fn the_configuration_space_is_reserved_where_there_is_a_pci_bus() {
        let platform = Platform {
            apic_ids: &[0],
            uarts: &[],
            legacy_free: true,
            pins: None,
            pci: Some(1),
            virtio_mmio: &[],
            vmgenid: None,
        };
        // A 32-bit fixed memory range (ACPI 6.5 §6.4.3.4): tag, length, read-write, base, length.
        let mut range = vec![0x86, 9, 0, 1];
        range.extend(u32::try_from(PCI_ECAM).expect("below 4 GiB").to_le_bytes());
        range.extend(u32::try_from(PCI_ECAM_BYTES).expect("below 4 GiB").to_le_bytes());
        let has = |platform: &Platform<'_>| dsdt(platform).windows(range.len()).any(|bytes| bytes == range);
        assert!(has(&platform));
        assert!(!has(&Platform { pci: None, ..platform }));
    }
}
