//! The capabilities in the configuration space of the PCI transport (virtio 1.3 §4.1.4).

use super::{
    COMMON, COMMON_BYTES, DEVICE_CONFIG, DEVICE_CONFIG_BYTES, ISR, MSIX_ENABLE, MSIX_MASK_ALL, MSIX_PENDING,
    MSIX_TABLE, NOTIFY, NOTIFY_STRIDE,
};
use crate::pci::{Capability, ConfigSpace};

// Capability IDs (PCI Local Bus 3.0, appendix H).
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

// `cfg_type` of struct virtio_pci_cap (virtio 1.3 §4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Adds the MSI-X capability and returns its offset. `None` where it does not fit.
pub(super) fn add_msix_capability(config: &mut ConfigSpace, vectors: u16) -> Option<usize> {
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors.saturating_sub(1)).to_le_bytes());
    body[2..6].copy_from_slice(&MSIX_TABLE.to_le_bytes());
    body[6..10].copy_from_slice(&MSIX_PENDING.to_le_bytes());
    let writable = [0, MSIX_ENABLE | MSIX_MASK_ALL];
    config.add_capability(&Capability { id: CAP_MSIX, body: &body, writable: &writable })
}

/// Adds the five virtio capabilities and returns the offset of the last, the PCI configuration access capability. `None`
/// where they do not fit.
pub(super) fn add_virtio_capabilities(config: &mut ConfigSpace, queues: usize) -> Option<usize> {
    let notify_bytes = u32::try_from(queues).ok()?.checked_mul(NOTIFY_STRIDE)?;
    let mut add = |kind: u8, offset: u32, length: u32, extra: &[u8], writable: &[u8]| {
        // struct virtio_pci_cap without its first two bytes (cap_vndr, cap_next): cap_len, cfg_type, bar, id, padding, offset, length.
        let mut body = vec![u8::try_from(16 + extra.len()).unwrap_or(0), kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(extra);
        config.add_capability(&Capability { id: CAP_VENDOR, body: &body, writable })
    };
    add(CFG_COMMON, COMMON, COMMON_BYTES, &[], &[])?;
    add(CFG_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_STRIDE.to_le_bytes(), &[])?;
    add(CFG_ISR, ISR, 1, &[], &[])?;
    add(CFG_DEVICE, DEVICE_CONFIG, DEVICE_CONFIG_BYTES, &[], &[])?;
    let mut writable = [0; 18];
    writable[2] = 0xff; // bar
    writable[6..14].fill(0xff); // offset, length
    add(CFG_PCI, 0, 0, &[0; 4], &writable)
}
