//! Any bytes as a kernel image or a System.map from which symbols are read.
#![no_main]

use hwvmm::profile::symbols::Symbols;
use libfuzzer_sys::fuzz_target;
use std::io::Write;

fuzz_target!(|data: &[u8]| {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(data).expect("written");
    let Ok(Some(mut symbols)) = Symbols::read(&file) else { return };
    let _ = symbols.locate(0xffff_ffff_8100_0000);
    for rip in [0, 0x100_0000, 0xffff_ffff_8100_0010, u64::MAX] {
        let _ = (symbols.resolve(rip), symbols.resolve_unmapped(rip));
    }
});
