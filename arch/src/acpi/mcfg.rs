//! MCFG (PCI Firmware Specification 3.2 §4.1.2): the address of the memory-mapped PCI configuration space.

use super::platform::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::PCI_ECAM;
use acpi_tables::mcfg::MCFG;

/// The table: one PCI segment with one bus.
pub(super) fn mcfg(segment: u8) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM, segment.into(), 0, 0);
    mcfg
}
