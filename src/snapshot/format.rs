//! The file `state`: a header, and what serde makes of [`State`] in postcard's encoding.
//!
//! | Offset | Bytes | |
//! |---|---|---|
//! | 0 | 8 | magic, `hwvmm\0SN` |
//! | 8 | 4 | version, little-endian |
//! | 12 | 4 | CRC-32 of the payload |
//! | 16 | 8 | length of the payload |
//! | 24 | | payload |

use super::description::Description;
use crate::kvm::state::{VcpuState, VmState};
use hwvmm_devices::legacy::{IoApicState, UartState};
use hwvmm_devices::pci::PciState;
use hwvmm_devices::virtio::{MAX_QUEUES, VirtioState};
use serde::{Deserialize, Serialize};
use std::time::Duration;
use thiserror::Error;

const MAGIC: [u8; 8] = *b"hwvmm\0SN";
const HEADER: usize = 24;

/// The version of the format. It goes up with each change of what is in it.
pub const STATE_VERSION: u32 = 3;

/// The longest file in bytes: 254 vCPUs take less than 4 MiB.
pub const MAX_STATE_BYTES: usize = 16 << 20;

/// The most that is kept of a vCPU: leaves of CPUID, and MSRs.
const MAX_ITEMS: usize = 4096;

/// The state of a machine, without its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// What the machine is; the same as in `machine.json`.
    pub description: Description,
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
    /// What KVM has besides.
    pub vm: VmState,
    /// The I/O APIC, where hwvmm has it.
    pub io_apic: Option<IoApicState>,
    /// The UARTs, in the order of [`Description::uarts`].
    pub uarts: Vec<UartState>,
    /// How long until the watchdog expires; `None` where it does not run.
    pub watchdog: Option<Duration>,
    /// The last POST code.
    pub post: u8,
    /// The PCI bus; its ports are there without devices, too.
    pub pci: PciState,
    /// The virtio devices, in the order of their places.
    pub virtio: Vec<VirtioState>,
}

/// A file is no state of a machine that can be used.
#[derive(Debug, Error)]
pub enum FormatError {
    /// The header is cut off, or has another magic.
    #[error("it is no state of hwvmm")]
    Magic,
    /// The file is of another version of the format.
    #[error("its state has version {found}, and this hwvmm reads version {STATE_VERSION}: make the snapshot anew")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// The file is not as long as its header says, or longer than [`MAX_STATE_BYTES`].
    #[error("its state has {found} bytes of {expected}: it is not whole")]
    Length {
        /// The length of the payload.
        found: u64,
        /// The length in the header.
        expected: u64,
    },
    /// The file is longer than a state is.
    #[error("its state has more than {MAX_STATE_BYTES} bytes")]
    TooLong,
    /// The checksum is wrong.
    #[error("the checksum of its state is wrong: it is damaged")]
    Checksum,
    /// The payload is none.
    #[error("its state cannot be read")]
    Payload(#[source] postcard::Error),
    /// Its parts contradict each other.
    #[error("its state is none of a machine: {0}")]
    Contradiction(&'static str),
    /// The state cannot be put into bytes.
    #[error("the state cannot be written")]
    Encode(#[source] postcard::Error),
}

/// Returns the checksum of a payload (CRC-32 of IEEE 802.3).
#[must_use]
pub fn checksum(payload: &[u8]) -> u32 {
    crc32fast::hash(payload)
}

/// Returns the bytes of the file.
///
/// # Errors
/// [`FormatError::Encode`], or [`FormatError::TooLong`].
pub fn encode(state: &State) -> Result<Vec<u8>, FormatError> {
    let mut file = postcard::to_extend(state, vec![0; HEADER]).map_err(FormatError::Encode)?;
    if file.len() > MAX_STATE_BYTES {
        return Err(FormatError::TooLong);
    }
    let (header, payload) = file.split_at_mut(HEADER);
    let length = payload.len() as u64;
    let fields = MAGIC
        .into_iter()
        .chain(STATE_VERSION.to_le_bytes())
        .chain(checksum(payload).to_le_bytes())
        .chain(length.to_le_bytes());
    header.iter_mut().zip(fields).for_each(|(byte, field)| *byte = field);
    Ok(file)
}

/// Takes the next `N` bytes.
fn field<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], FormatError> {
    let (field, rest) = bytes.split_first_chunk().ok_or(FormatError::Magic)?;
    *bytes = rest;
    Ok(*field)
}

/// Reads the bytes of the file, and checks that they are the state of one machine. Whether KVM takes the state of its vCPUs is not
/// known then.
///
/// # Errors
/// [`FormatError`].
pub fn decode(mut bytes: &[u8]) -> Result<State, FormatError> {
    if bytes.len() > MAX_STATE_BYTES {
        return Err(FormatError::TooLong);
    }
    if field(&mut bytes)? != MAGIC {
        return Err(FormatError::Magic);
    }
    let found = u32::from_le_bytes(field(&mut bytes)?);
    if found != STATE_VERSION {
        return Err(FormatError::Version { found });
    }
    let checksum = u32::from_le_bytes(field(&mut bytes)?);
    let (found, expected) = (bytes.len().saturating_sub(8) as u64, u64::from_le_bytes(field(&mut bytes)?));
    if found != expected {
        return Err(FormatError::Length { found, expected });
    }
    if self::checksum(bytes) != checksum {
        return Err(FormatError::Checksum);
    }
    let (state, rest): (State, _) = postcard::take_from_bytes(bytes).map_err(FormatError::Payload)?;
    let fault = if rest.is_empty() { state.fault() } else { Some("there are bytes behind it") };
    fault.map_or(Ok(state), |fault| Err(FormatError::Contradiction(fault)))
}

impl State {
    /// Has the description name the processor that the vCPUs were given.
    pub fn describe_processor(&mut self) {
        let leaves = self.vcpus.first().map_or(&[][..], |vcpu| &vcpu.cpuid);
        self.description.cpu_vendor = super::features::vendor_name(leaves);
        self.description.cpu_features = super::features::named(leaves);
    }

    /// What contradicts, in English.
    fn fault(&self) -> Option<&'static str> {
        let Self { description, vcpus, vm, io_apic, uarts, watchdog, virtio, .. } = self;
        let split = description.irqchip == super::Irqchip::Split;
        if let Some(fault) = description.fault() {
            Some(fault)
        } else if vcpus.len() != usize::try_from(description.vcpus().count()).unwrap_or(0) {
            Some("the number of vCPUs is another than that of the machine")
        } else if vcpus.iter().any(|vcpu| vcpu.cpuid.len() > MAX_ITEMS || vcpu.msrs.len() > MAX_ITEMS) {
            Some("a vCPU has more CPUID leaves or MSRs than there are")
        } else if vm.chips.is_some() == split || io_apic.is_some() && !split {
            Some("the interrupt controllers are those of another machine")
        } else if uarts.len() != description.uarts.len() {
            Some("the number of UARTs is another than that of the machine")
        } else if watchdog.is_some_and(|left| !description.watchdog || left > Duration::from_secs(60)) {
            Some("the watchdog has a time that it cannot have")
        } else if virtio.len() != description.virtio_devices() {
            Some("the number of virtio devices is another than that of the machine")
        } else if virtio.iter().any(|device| device.queues.len() > MAX_QUEUES) {
            Some("a virtio device has more queues than there are")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests;
