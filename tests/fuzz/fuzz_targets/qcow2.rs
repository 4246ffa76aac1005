//! qcow2 images: the input changes fields, tables and reference counts of a sound image, and then makes requests to its disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

fuzz_target!(|bytes: &[u8]| {
    let folder = FOLDER.get_or_init(|| {
        // In memory where that is possible, as each input is a file that is synced.
        let shared = Path::new("/dev/shm");
        let parent = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("hwvmm-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        path
    });
    hwvmm_devices::virtio::block::hostile::drive(bytes, folder).expect("the host's file system works");
});
