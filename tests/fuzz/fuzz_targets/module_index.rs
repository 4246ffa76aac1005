//! Any text as modules.dep, modules.builtin and modules.softdep, with NUL between them: no path that comes out leads out of the folder.
#![no_main]

use hwvmm::boot::initramfs::{Driver, IndexFiles, ModuleIndex};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut parts = text.splitn(3, '\0');
    let mut part = || parts.next().unwrap_or_default();
    let index = ModuleIndex::parse(IndexFiles { dependencies: part(), builtin: part(), soft: part() });
    match index.resolve(&[Driver::VirtioMmio, Driver::VirtioPci, Driver::Vsock, Driver::Virtiofs, Driver::Overlay]) {
        Ok(paths) => {
            assert!(paths.iter().all(|path| !path.starts_with('/') && path.split('/').all(|part| part != "..")))
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
