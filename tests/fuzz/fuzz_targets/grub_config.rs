//! Any text as a grub.cfg and a grubenv, with NUL between them.
#![no_main]

use hwvmm::boot::image::grub_entries;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (script, environment) = text.split_once('\0').unwrap_or((text, ""));
    match grub_entries(script, environment) {
        Ok(entries) => assert!(entries.len() <= 256),
        Err(error) => assert!(!error.is_empty()),
    }
});
