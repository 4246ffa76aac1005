//! Any bytes as the compressed payload of a bzImage.
#![no_main]

use hwvmm::boot::unpack::{Limits, unpack};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let out = tempfile::tempfile().expect("a temporary file");
    let _ = unpack(data, &out, &Limits::of(16 << 20));
});
