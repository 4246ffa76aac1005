//! Frames from a hostile passt, in pieces of any size.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| hwvmm_devices::virtio::hostile::receive_frames(bytes, Path::new("")).expect("sockets"));
