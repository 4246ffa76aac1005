//! Any bytes as a compressed initrd: several streams in a row. What is unpacked stays within its limits.
#![no_main]

use hwvmm::boot::unpack::{Limits, unpack_parts};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let limits = Limits { parts: 32, blocks: 256, decoder_bytes: 16 << 20, ..Limits::of(4 << 20) };
    let out = tempfile::tempfile().expect("a temporary file");
    let result = unpack_parts(data, &out, &limits);
    let bytes = out.metadata().expect("metadata").len();
    assert!(bytes <= limits.output_bytes);
    if let Ok(count) = result {
        assert_eq!(count, bytes);
    }
});
