//! FADT (ACPI 6.5 §5.2.9): hardware-reduced; power off and reset by two one-byte ports.

use super::platform::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{PORT_RESET, PORT_SLEEP_CONTROL, PORT_SLEEP_STATUS, RESET_VALUE};
use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

// IAPC_BOOT_ARCH (§5.2.9.3). "Legacy devices" (bit 0) and "8042" (bit 1) stay clear.
const KEYBOARD_CONTROLLER: u16 = 1 << 1;
const VGA_NOT_PRESENT: u16 = 1 << 2;
const PCIE_ASPM_CONTROLS: u16 = 1 << 4;
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

/// The table, with the DSDT at gpa `dsdt`. If `legacy_free` is false, it says that there are a keyboard controller, a CMOS
/// clock and a VGA.
pub(super) fn fadt(dsdt: u64, legacy_free: bool) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton) // no fixed power button
        .flag(Flags::SlpButton) // no fixed sleep button
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    let arch = if legacy_free { VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT } else { KEYBOARD_CONTROLLER };
    fadt.iapc_boot_arch = (arch | PCIE_ASPM_CONTROLS).into();
    fadt.reset_reg = port(PORT_RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(PORT_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"hwvmm\0\0\0").into();
    fadt.finalize()
}
