//! Any bytes as a disk: partition table, file systems, and on them the boot loader's configuration and a kernel's modules.
#![no_main]

use hwvmm::boot::image::{Range, WantedModules, WantedRoot, find, find_modules, find_root};
use hwvmm::boot::initramfs::{Driver, LinkChoice};
use libfuzzer_sys::fuzz_target;
use std::rc::Rc;

fuzz_target!(|data: &[u8]| {
    let disk = Range::whole(Rc::new(data.to_vec()), 8 << 20);
    match find(&disk, None, &mut Vec::new(), Some(&mut Vec::new())) {
        Ok(found) => assert!(!found.cmdline.contains(char::is_control)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    match find_root(&disk, WantedRoot { entry: None, user: Some("root") }) {
        Ok(root) => assert!(root.partition.is_none_or(|partition| !root.others.contains(&partition))),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    let mut copied = Vec::new();
    let wanted = WantedModules { release: "6.1", drivers: &[Driver::Overlay], links: LinkChoice::Vsock };
    match find_modules(&disk, wanted, &mut copied) {
        Ok(found) => assert_eq!(found.modules.iter().map(|module| module.bytes).sum::<u64>(), copied.len() as u64),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
