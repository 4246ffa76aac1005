//! Any text as a file of options (`--config`): it is refused with a message, or becomes a configuration.
#![no_main]

use hwvmm::config::parse_file;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match parse_file(Path::new("fuzz.toml"), text) {
        Ok(options) => {
            if let Ok(config) = options.into_config() {
                let _ = (config.kernel_cmdline(), config.multiboot_cmdline());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
