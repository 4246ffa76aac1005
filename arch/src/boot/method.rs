//! How a kernel was put into guest memory and how the boot processor enters it.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Who decompresses the kernel of a bzImage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decompressor {
    /// The file is an uncompressed ELF; nothing is unpacked.
    None,
    /// The VMM, before the guest runs.
    Host,
    /// The bzImage's own decompressor in the guest. It may also move the kernel (KASLR).
    Guest,
}

/// The protocol by which the boot processor enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryProtocol {
    /// The 64-bit boot protocol of Linux (Documentation/arch/x86/boot.rst).
    Linux64,
    /// PVH (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, paging off.
    Pvh,
    /// Multiboot 0.6.96: 32-bit protected mode, paging off.
    Multiboot,
}

/// How a kernel was loaded and entered; its [`Display`](fmt::Display) is the sentence for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootMethod {
    /// Who decompressed the kernel.
    pub decompressor: Decompressor,
    /// How it was entered.
    pub protocol: EntryProtocol,
}

impl BootMethod {
    /// Returns true if the guest decompresses its kernel itself, so that the first instructions are the decompressor's and
    /// the kernel's address is not known before it runs.
    #[must_use]
    pub fn is_decompressed_by_guest(self) -> bool {
        self.decompressor == Decompressor::Guest
    }
}

impl fmt::Display for BootMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.decompressor, self.protocol) {
            (_, EntryProtocol::Multiboot) => "multiboot kernel",
            (Decompressor::Guest, _) => "bzImage, unpacked by the guest",
            (Decompressor::Host, EntryProtocol::Linux64) => "bzImage, unpacked by hwvmm, 64-bit entry",
            (Decompressor::Host, EntryProtocol::Pvh) => "bzImage, unpacked by hwvmm, PVH entry",
            (Decompressor::None, EntryProtocol::Linux64) => "vmlinux, 64-bit entry",
            (Decompressor::None, EntryProtocol::Pvh) => "ELF kernel, PVH entry",
        })
    }
}
