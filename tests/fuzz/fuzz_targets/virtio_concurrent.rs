//! Guest memory that changes while the device works on requests.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::OnceLock;

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let folder = FOLDER.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("hwvmm-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        path
    });
    let _ = hwvmm_devices::virtio::hostile::drive_concurrently(bytes, folder);
});
