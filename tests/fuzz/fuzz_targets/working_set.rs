//! Any bytes as the working set of a snapshot: refused with a message, or ranges of pages that lie in the memory. The checksum is set right
//! first, as it would refuse all else.
#![no_main]

use hwvmm::snapshot::{WorkingSet, checksum};
use libfuzzer_sys::fuzz_target;

const MEMORY: u64 = 16 << 20;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    if let Some((header, payload)) = bytes.split_at_mut_checked(16) {
        header[12..16].copy_from_slice(&checksum(payload).to_le_bytes());
    }
    match WorkingSet::decode(&bytes, MEMORY) {
        Ok(set) => {
            let mut end = 0;
            for range in &set.ranges {
                assert!(u64::from(range.first) >= end && range.end() > u64::from(range.first));
                end = range.end();
            }
            assert!(end <= MEMORY >> 12);
            assert_eq!(WorkingSet::decode(&set.encode().expect("encoded"), MEMORY).expect("read back"), set);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
