//! Any bytes as a guest in the interpreter of exit clusters: it comes back, and writes to no page to which the guest could not.
#![no_main]

use hwvmm::cluster::standalone::run_bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| run_bytes(data));
