//! Any bytes as the state of a snapshot, and as its `machine.json`: refused with a message, or the state of one machine. The checksum is
//! set right first, as it would refuse all else. Devices are given the states of virtio devices that are in it.
#![no_main]

use hwvmm::snapshot::{decode, encode, parse_description};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(description) = parse_description(data) {
        let _ = description.fault();
    }
    let mut bytes = data.to_vec();
    if let Some((header, payload)) = bytes.split_at_mut_checked(24) {
        header[12..16].copy_from_slice(&hwvmm::snapshot::checksum(payload).to_le_bytes());
        header[16..24].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    }
    match decode(&bytes) {
        Ok(state) => {
            assert!(encode(&state).is_ok());
            let folder = std::env::temp_dir();
            for device in state.virtio.iter().take(4) {
                let _ = hwvmm_devices::virtio::hostile::restore(device, &folder);
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
