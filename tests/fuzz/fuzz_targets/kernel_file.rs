//! Any bytes as a kernel file: its format is identified, it is unpacked and loaded into 16 MiB of guest memory.
#![no_main]

use hwvmm::boot::{KernelFile, Request, UnpackOptions, Wanted, load, prepare};
use hwvmm::config::{BootProtocol, Unpack};
use hwvmm::memory::{Backing, GuestRam};
use hwvmm::sandbox::Isolation;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::layout::{GpaRange, UARTS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(file.path(), data).expect("written");
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: 16 << 20 }], Backing::SmallPages).expect("16 MiB");
    for unpack in [Unpack::Host, Unpack::Guest] {
        let platform = Platform {
            apic_ids: &[0],
            uarts: &UARTS[..1],
            legacy_free: true,
            pins: Some(IoApicPins { first_gsi: 0, count: 24 }),
            pci: Some(1),
            virtio_mmio: &[],
            vmgenid: Some(12),
        };
        let Ok(kernel) = KernelFile::open(file.path()) else { return };
        let wanted = Wanted {
            initrd: None,
            memory_bytes: 16 << 20,
            unpack,
            boot: BootProtocol::Auto,
            how: UnpackOptions { cache: None, isolation: Isolation::None, progress: &|_| {} },
        };
        let Ok(prepared) = prepare(&kernel, &wanted) else { return };
        let request = Request {
            kernel: &kernel,
            prepared: &prepared,
            modules: &[],
            cmdline: "console=ttyS0",
            arguments: "",
            memory_bytes: 16 << 20,
            boot: BootProtocol::Auto,
            platform: &platform,
        };
        let _ = load(&request, &ram);
    }
});
