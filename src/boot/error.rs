//! Why a guest cannot be loaded.

use super::unpack::UnpackError;
use hwvmm_arch::acpi::AcpiTooLarge;
use hwvmm_arch::boot::bzimage::BzImageError;
use hwvmm_arch::boot::elf::ElfError;
use hwvmm_arch::boot::multiboot::MultibootError;
use hwvmm_devices::path_text::PathText as _;
use std::fmt;
use std::io;
use std::path::PathBuf;
use thiserror::Error;
use vm_memory::GuestMemoryError;

/// What a file on the command line is for, as messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The kernel to boot.
    Kernel,
    /// The initial RAM disk.
    Initrd,
    /// A module for a multiboot kernel (`--module`).
    Module,
    /// The ELF file that `hwvmm unpack` writes.
    UnpackedKernel,
}

impl fmt::Display for FileRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::Module => "module",
            Self::UnpackedKernel => "unpacked kernel",
        })
    }
}

/// Why a guest cannot be loaded. Each message names the file, the figures and the remedy.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file cannot be opened or read.
    #[error("cannot read the {role} {}{}", .path.shown(), remedy(.source))]
    Read {
        /// What the file is for.
        role: FileRole,
        /// The path as it was given.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write the {role} {}", .path.shown())]
    WriteFile {
        /// What the file is for.
        role: FileRole,
        /// The path as it was given.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The path leads to a directory, a device or a FIFO.
    #[error("the {role} {} is not a regular file", .path.shown())]
    NotFile {
        /// What the file is for.
        role: FileRole,
        /// The path as it was given.
        path: PathBuf,
    },
    /// The file has a format that hwvmm does not boot.
    #[error("{} is not a kernel that hwvmm can boot: {what}; it takes a bzImage (vmlinuz), an x86 ELF (vmlinux) or a multiboot ELF", .path.shown())]
    NotKernel {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// What was found instead, for people.
        what: String,
    },
    /// The bzImage's setup header is damaged.
    #[error("{}", .path.shown())]
    BzImage {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: BzImageError,
    },
    /// The ELF file's headers are damaged, or it is for another machine.
    #[error("{}", .path.shown())]
    Elf {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: ElfError,
    },
    /// The multiboot kernel asks for what hwvmm does not have.
    #[error("{}", .path.shown())]
    Multiboot {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// What is wrong with it.
        source: MultibootError,
    },
    /// The compressed kernel in a bzImage cannot be unpacked.
    #[error("the kernel in {} cannot be unpacked", .path.shown())]
    Unpack {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// What is wrong with the payload.
        source: UnpackError,
    },
    /// The kernel does not have the boot protocol that `--boot` asks for.
    #[error("--boot {asked}: {} {why}", .path.shown())]
    Protocol {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// The value of `--boot`.
        asked: &'static str,
        /// Why the kernel cannot be entered so, for people.
        why: &'static str,
    },
    /// A range that has to be loaded ends beyond the memory below the hole.
    #[error(
        "the {role} takes gpa {start:#x} to {end:#x}, and guest memory below the hole ends at {memory_end:#x}: give the guest more with -m"
    )]
    NoRoom {
        /// What the file is for.
        role: FileRole,
        /// The first gpa of the range.
        start: u64,
        /// The gpa behind the range's last byte.
        end: u64,
        /// The gpa behind the last byte of memory below the hole.
        memory_end: u64,
    },
    /// The initrd or a module does not fit between the kernel and the end of memory.
    #[error(
        "the {role} has {bytes} bytes, and {room} bytes of guest memory are left for it: give the guest more with -m"
    )]
    TooLarge {
        /// What the file is for.
        role: FileRole,
        /// The file's size in bytes.
        bytes: u64,
        /// The bytes of guest memory that are left.
        room: u64,
    },
    /// The kernel's load address is among hwvmm's own boot data.
    #[error("{} is to be loaded at gpa {start:#x}, where hwvmm keeps page tables and boot data (below {limit:#x})", .path.shown())]
    LowAddress {
        /// The path of the kernel as it was given.
        path: PathBuf,
        /// The first gpa that the kernel asks for.
        start: u64,
        /// The lowest gpa at which a kernel may start.
        limit: u64,
    },
    /// The command line is longer than the kernel takes (boot.rst, `cmdline_size`).
    #[error("the kernel command line has {bytes} bytes, and this kernel takes {limit}: shorten --cmdline or --append")]
    CmdlineTooLong {
        /// The command line's length in bytes, without the NUL.
        bytes: usize,
        /// The longest that the kernel takes, in bytes.
        limit: usize,
    },
    /// The command line has a NUL, where the kernel would stop reading.
    #[error("the kernel command line has a NUL character: remove it from --cmdline or --append")]
    CmdlineNul,
    /// The ACPI tables do not fit into the area that is reserved for them.
    #[error(transparent)]
    Acpi(#[from] AcpiTooLarge),
    /// A structure of the boot protocol cannot be written to guest memory.
    #[error("cannot write {what} to guest memory: give the guest more with -m")]
    WriteMemory {
        /// The structure, for people: "the zero page".
        what: &'static str,
        /// vm-memory's error: the range is not all guest memory.
        source: GuestMemoryError,
    },
    /// A file's bytes cannot be read into guest memory.
    #[error("cannot load the {role} {} into guest memory", .path.shown())]
    Load {
        /// What the file is for.
        role: FileRole,
        /// The path as it was given.
        path: PathBuf,
        /// vm-memory's error: the range is not all guest memory, or the file cannot be read.
        source: GuestMemoryError,
    },
}

impl KernelError {
    /// Returns true if the kernel itself is at fault, and not the host, nor an option: another try would end the same.
    #[must_use]
    pub fn is_of_kernel(&self) -> bool {
        match self {
            Self::NotKernel { .. }
            | Self::BzImage { .. }
            | Self::Elf { .. }
            | Self::Multiboot { .. }
            | Self::Protocol { .. }
            | Self::LowAddress { .. } => true,
            Self::Unpack { source, .. } => match source {
                UnpackError::NoPayload | UnpackError::Unknown(_) | UnpackError::Data(..) | UnpackError::Limit(_) => {
                    true
                }
                UnpackError::Read(_) | UnpackError::Write(_) | UnpackError::Process(_) => false,
            },
            Self::Read { .. }
            | Self::WriteFile { .. }
            | Self::NotFile { .. }
            | Self::NoRoom { .. }
            | Self::TooLarge { .. }
            | Self::CmdlineTooLong { .. }
            | Self::CmdlineNul
            | Self::Acpi(_)
            | Self::WriteMemory { .. }
            | Self::Load { .. } => false,
        }
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path)",
        io::ErrorKind::PermissionDenied => {
            " (check its permissions; distributions often let only root read /boot/vmlinuz: copy it, or run as root)"
        }
        _ => "",
    }
}
