//! Any bytes as a kernel file: told apart, unpacked, loaded into 16 MiB of guest memory.
#![no_main]

use hwvmm::config::{BootProtocol, Unpack};
use hwvmm::machine::kernel::{Request, load};
use hwvmm::memory::{Backing, GuestRam};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), data).expect("written");
    let ram = GuestRam::new(&[(0, 16 << 20)], Backing::Anonymous(false)).expect("16 MiB");
    for unpack in [Unpack::Host, Unpack::Guest] {
        let request = Request {
            kernel: file.path(),
            initrd: None,
            modules: &[],
            cmdline: "console=ttyS0",
            memory_bytes: 16 << 20,
            unpack,
            boot: BootProtocol::Auto,
            cache: None,
            apic_ids: &[0],
            uarts: &[], pci: true, virtio_mmio: &[],
            progress: &|_| {},
        };
        let _ = load(&request, &ram);
    }
});
