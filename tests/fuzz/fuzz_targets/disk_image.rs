//! Any bytes as a disk: partition table, file systems, and the boot loader's configuration on them.
#![no_main]

use hwvmm::boot::image::{Range, find};
use libfuzzer_sys::fuzz_target;
use std::rc::Rc;

fuzz_target!(|data: &[u8]| {
    let disk = Range::whole(Rc::new(data.to_vec()), 8 << 20);
    match find(&disk, None, &mut Vec::new(), Some(&mut Vec::new())) {
        Ok(found) => assert!(!found.cmdline.contains(char::is_control)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
