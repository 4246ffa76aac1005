//! Loads a kernel, its initrd or modules, and the structures of its boot protocol into guest memory.

use super::cache::Cache;
use super::error::{FileRole, KernelError};
use super::file::open;
use super::identify::{KernelFormat, identify};
use super::prepare::{unpack_bzimage, unpack_initrd};
use crate::config::{BootProtocol, ModuleConfig, Unpack};
use crate::memory::GuestRam;
use hwvmm_arch::boot::FileRange;
use hwvmm_arch::boot::bzimage::{BzImage, ENTRY_64_OFFSET};
use hwvmm_arch::boot::elf::{ElfClass, ElfImage};
use hwvmm_arch::boot::multiboot::{self, Module};
use hwvmm_arch::boot::{BootMethod, Decompressor, EntryProtocol, pvh, zero_page};
use hwvmm_arch::gdt::{self, CodeSize};
use hwvmm_arch::layout::{self, BZIMAGE_LOAD, CMDLINE, CMDLINE_MAX_BYTES, GpaRange, HIGH_RAM_START};
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{acpi, page_table};
use rustix::fs::SeekFrom;
use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// The highest gpa of an initrd for a kernel whose header does not say (boot.rst, `initrd_addr_max`).
const INITRD_LIMIT: u64 = 0x7fff_ffff;
/// An unpacked initrd may take at most one part in this many of the guest's free memory.
const INITRD_SHARE: u64 = 4;
const PAGE: u64 = 4096;
/// The lowest gpa of a multiboot kernel: below it are the structures that hwvmm writes for it.
const MULTIBOOT_LOW: u64 = 0x8000;

/// What is to be loaded, and how.
pub struct Request<'a> {
    /// The path of the kernel.
    pub kernel: &'a Path,
    /// The path of the initial RAM disk. For a multiboot kernel it is the first module.
    pub initrd: Option<&'a Path>,
    /// The multiboot modules: the path and the arguments of each.
    pub modules: &'a [ModuleConfig],
    /// The command line for Linux.
    pub cmdline: &'a str,
    /// The arguments of a multiboot kernel, which is not given `cmdline`.
    pub arguments: &'a str,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Who unpacks a bzImage: hwvmm, or the guest by the decompressor in it.
    pub unpack: Unpack,
    /// The boot protocol.
    pub boot: BootProtocol,
    /// The cache of unpacked kernels and initrds.
    pub cache: Option<&'a Cache>,
    /// The hardware that the ACPI tables describe.
    pub platform: &'a acpi::Platform<'a>,
    /// Called with a message before anything that takes long.
    pub progress: &'a dyn Fn(&str),
}

/// What was loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How the bootstrap processor (BSP) enters the guest.
    pub entry: Entry,
    /// How the kernel was loaded, and how it is entered.
    pub method: BootMethod,
}

/// Loads kernel, initrd or modules, boot structures, page tables and ACPI tables into `ram`, which must be zero.
///
/// # Errors
/// [`KernelError`], with file, figures and remedy.
pub fn load(request: &Request<'_>, ram: &GuestRam) -> Result<Loaded, KernelError> {
    let loader = Loader { request, ram };
    if request.cmdline.contains('\0') {
        return Err(KernelError::CmdlineNul);
    }
    let file = open(FileRole::Kernel, request.kernel)?;
    let loaded = match identify(request.kernel, &file)? {
        KernelFormat::Multiboot(elf) => loader.multiboot(&file, &elf)?,
        KernelFormat::Elf(elf) => loader.elf(&file, &elf, None)?,
        KernelFormat::BzImage(image) => loader.bzimage(&file, &image)?,
    };
    loader.tables(&loaded.entry)?;
    Ok(loaded)
}

struct Loader<'a> {
    request: &'a Request<'a>,
    ram: &'a GuestRam,
}

impl Loader<'_> {
    /// The gpa behind the last byte of memory below the hole.
    fn low_end(&self) -> u64 {
        layout::ram_banks(self.request.memory_bytes).first().map_or(0, |bank| bank.end())
    }

    /// The kernel's path, for errors.
    fn path(&self) -> PathBuf {
        self.request.kernel.to_owned()
    }

    /// The kernel's bytes in `file`: the file itself, or what was unpacked from it.
    fn kernel<'f>(&'f self, file: &'f File) -> Source<'f> {
        Source { role: FileRole::Kernel, path: self.request.kernel, file }
    }

    fn bzimage(&self, file: &File, image: &BzImage) -> Result<Loaded, KernelError> {
        if self.request.unpack == Unpack::Guest {
            return self.bzimage_in_guest(file, image);
        }
        let unpacked = unpack_bzimage(file, image, self.request.cache, self.request.progress);
        let unpacked = unpacked
            .map_err(|error| error.to_string())
            .and_then(|vmlinux| ElfImage::parse(&vmlinux).map(|elf| (vmlinux, elf)).map_err(|error| error.to_string()));
        match unpacked {
            Ok((vmlinux, elf)) => self.elf(&vmlinux, &elf, Some(image)),
            Err(why) => {
                log::warn!("{} cannot be unpacked here ({why}): the guest unpacks it itself", self.path().display());
                self.bzimage_in_guest(file, image)
            }
        }
    }

    /// Loads the protected-mode code of a bzImage; the decompressor in it unpacks the kernel.
    fn bzimage_in_guest(&self, file: &File, image: &BzImage) -> Result<Loaded, KernelError> {
        if !image.has_64bit_entry() {
            let what = "this bzImage has no 64-bit entry point: it is older than Linux 3.8, or 32-bit".to_owned();
            return Err(KernelError::NotKernel { path: self.path(), what });
        }
        if self.request.boot == BootProtocol::Pvh {
            let why = "is unpacked by the guest, whose decompressor has the 64-bit entry only";
            return Err(KernelError::Protocol { path: self.path(), asked: "pvh", why });
        }
        let work = image.guest_unpack_range();
        let end = work.end().max(BZIMAGE_LOAD + image.code.bytes);
        self.check_room(work.start.min(BZIMAGE_LOAD), end)?;
        self.read(&self.kernel(file), image.code, BZIMAGE_LOAD)?;
        self.linux64(end, Some(image))?;
        let entry = Entry::Linux64 { rip: BZIMAGE_LOAD + ENTRY_64_OFFSET };
        let method = BootMethod { decompressor: Decompressor::Guest, protocol: EntryProtocol::Linux64 };
        Ok(Loaded { entry, method })
    }

    fn elf(&self, file: &File, elf: &ElfImage, image: Option<&BzImage>) -> Result<Loaded, KernelError> {
        self.segments(file, elf, HIGH_RAM_START)?;
        let decompressor = if image.is_some() { Decompressor::Host } else { Decompressor::None };
        if let Some(entry) = self.pvh_entry(elf, image)? {
            let method = BootMethod { decompressor, protocol: EntryProtocol::Pvh };
            return Ok(Loaded { entry: self.pvh(entry, elf)?, method });
        }
        if elf.class == ElfClass::Elf32 {
            let what = "a 32-bit ELF with neither a multiboot header nor a PVH note".to_owned();
            return Err(KernelError::NotKernel { path: self.path(), what });
        }
        self.check_entry(elf.entry, elf)?;
        self.linux64(elf.end(), image)?;
        let method = BootMethod { decompressor, protocol: EntryProtocol::Linux64 };
        Ok(Loaded { entry: Entry::Linux64 { rip: elf.entry }, method })
    }

    /// The PVH entry point, or `None` where the kernel is entered by the 64-bit boot protocol. `image` is the bzImage that an
    /// unpacked kernel comes from.
    fn pvh_entry(&self, elf: &ElfImage, image: Option<&BzImage>) -> Result<Option<u64>, KernelError> {
        let entry = elf.pvh_entry.map(u64::from);
        match self.request.boot {
            BootProtocol::Linux64 => Ok(None),
            // A bzImage's setup header has fields that PVH lacks, and the PVH entry of Linux searches for Xen: 256 CPUIDs.
            BootProtocol::Auto => Ok(entry.filter(|_| image.is_none())),
            BootProtocol::Pvh if entry.is_some() => Ok(entry),
            BootProtocol::Pvh => {
                let why = "has no PVH note (CONFIG_PVH)";
                Err(KernelError::Protocol { path: self.path(), asked: "pvh", why })
            }
        }
    }

    fn pvh(&self, entry: u64, elf: &ElfImage) -> Result<Entry, KernelError> {
        self.check_entry(entry, elf)?;
        let initrd = self.initrd(elf.end(), INITRD_LIMIT)?;
        self.cmdline(zero_page::CMDLINE_MAX_BYTES)?;
        let map = layout::memory_map(self.request.memory_bytes);
        self.write("the start info", layout::PVH_START_INFO, &pvh::start_info(&map, CMDLINE, initrd))?;
        Ok(Entry::Pvh { rip: entry, start_info: layout::PVH_START_INFO })
    }

    fn linux64(&self, end: u64, image: Option<&BzImage>) -> Result<(), KernelError> {
        let limit = image.map_or(INITRD_LIMIT, |image| match image.header.initrd_addr_max {
            0 => INITRD_LIMIT,
            limit => u64::from(limit).min(INITRD_LIMIT),
        });
        let initrd = self.initrd(end, limit)?;
        let cmdline_limit = image.map_or(zero_page::CMDLINE_MAX_BYTES, BzImage::cmdline_max_bytes);
        self.cmdline(cmdline_limit)?;
        let map = layout::memory_map(self.request.memory_bytes);
        let header = image.map(|image| &image.header);
        let page = zero_page::zero_page(header, &map, self.request.cmdline.len(), initrd);
        self.write("the zero page", layout::ZERO_PAGE, &page)
    }

    fn multiboot(&self, file: &File, elf: &ElfImage) -> Result<Loaded, KernelError> {
        self.segments(file, elf, MULTIBOOT_LOW)?;
        self.check_entry(elf.entry, elf)?;
        let mut modules = Vec::new();
        let mut next = elf.end().max(HIGH_RAM_START);
        let initrd = self.request.initrd.map(|path| ModuleConfig { path: path.to_owned(), arguments: String::new() });
        for ModuleConfig { path, arguments } in initrd.iter().chain(self.request.modules) {
            let start = next.next_multiple_of(PAGE);
            let bytes = self.module(path, start)?;
            let name = format!("{} {arguments}", path.display());
            modules.push(Module { start, end: start + bytes, name: name.trim_end().to_owned() });
            next = start + bytes;
        }
        // By custom the first word is the program's name.
        let cmdline = format!("{} {}", self.request.kernel.display(), self.request.arguments);
        let map = layout::memory_map(self.request.memory_bytes);
        let info = multiboot::info(self.request.memory_bytes, &map, cmdline.trim_end(), &modules)
            .map_err(|source| KernelError::Multiboot { path: self.path(), source })?;
        self.write("the multiboot information", layout::MULTIBOOT_INFO, &info)?;
        let entry = Entry::Multiboot { rip: elf.entry, info: layout::MULTIBOOT_INFO };
        let method = BootMethod { decompressor: Decompressor::None, protocol: EntryProtocol::Multiboot };
        Ok(Loaded { entry, method })
    }

    fn check_entry(&self, entry: u64, elf: &ElfImage) -> Result<(), KernelError> {
        if elf.contains(entry) {
            return Ok(());
        }
        let what = format!("its entry point {entry:#x} lies outside of its segments");
        Err(KernelError::NotKernel { path: self.path(), what })
    }

    /// Checks that the kernel's memory from gpa `start` to gpa `end` lies below the hole.
    fn check_room(&self, start: u64, end: u64) -> Result<(), KernelError> {
        let memory_end = self.low_end();
        if end > memory_end {
            return Err(KernelError::NoRoom { role: FileRole::Kernel, start, end, memory_end });
        }
        Ok(())
    }

    /// Reads the segments from the file into guest memory, each byte once. Guest memory is zero before, so holes in the file
    /// and the part of a segment that the file does not have are not written.
    fn segments(&self, file: &File, elf: &ElfImage, limit: u64) -> Result<(), KernelError> {
        for segment in &elf.segments {
            if segment.address < limit {
                return Err(KernelError::LowAddress { path: self.path(), start: segment.address, limit });
            }
            self.check_room(segment.address, segment.address + segment.memory_bytes)?;
            let end = segment.offset + segment.file_bytes;
            let mut at = segment.offset;
            while at < end {
                let data = next_data(file, at, end);
                self.read(&self.kernel(file), data, segment.address + (data.offset - segment.offset))?;
                at = data.offset + data.bytes;
            }
        }
        Ok(())
    }

    /// Loads the initrd as high as the kernel's end and `limit`, the highest gpa that the kernel takes, let it.
    fn initrd(&self, kernel_end: u64, limit: u64) -> Result<Option<GpaRange>, KernelError> {
        let Some(path) = self.request.initrd else { return Ok(None) };
        let role = FileRole::Initrd;
        let end = self.low_end().min(limit + 1);
        let floor = kernel_end.next_multiple_of(PAGE);
        let mut file = open(role, path)?;
        let room = end.saturating_sub(floor);
        // The guest holds the archive and its files at the same time while it unpacks it, hence the smaller limit.
        if self.request.unpack == Unpack::Host
            && let Some(unpacked) = unpack_initrd(&file, self.request.cache, room / INITRD_SHARE)
        {
            file = unpacked;
        }
        let source = Source { role, path, file: &file };
        let bytes = source.size()?;
        let start = end.checked_sub(bytes).map(|start| start & !(PAGE - 1)).filter(|start| *start >= floor);
        let Some(start) = start else {
            return Err(KernelError::TooLarge { role, bytes, room });
        };
        self.read(&source, FileRange { offset: 0, bytes }, start)?;
        Ok(Some(GpaRange { start, bytes }))
    }

    /// Loads a multiboot module at gpa `start`. Returns its size in bytes.
    fn module(&self, path: &Path, start: u64) -> Result<u64, KernelError> {
        let role = FileRole::Module;
        let file = open(role, path)?;
        let source = Source { role, path, file: &file };
        let bytes = source.size()?;
        let room = self.low_end().saturating_sub(start);
        if bytes > room {
            return Err(KernelError::TooLarge { role, bytes, room });
        }
        self.read(&source, FileRange { offset: 0, bytes }, start)?;
        Ok(bytes)
    }

    fn cmdline(&self, limit: usize) -> Result<(), KernelError> {
        let (bytes, limit) = (self.request.cmdline.len(), limit.min(CMDLINE_MAX_BYTES - 1));
        if bytes > limit {
            return Err(KernelError::CmdlineTooLong { bytes, limit });
        }
        let mut text = self.request.cmdline.as_bytes().to_vec();
        text.push(0);
        self.write("the command line", CMDLINE, &text)
    }

    /// Writes the GDT, the page tables for long mode, the reset code and the ACPI tables.
    fn tables(&self, entry: &Entry) -> Result<(), KernelError> {
        let gdt: Vec<u8> = gdt::boot_gdt(entry.code_size()).iter().flat_map(|d| d.to_le_bytes()).collect();
        self.write("the GDT", layout::BOOT_GDT, &gdt)?;
        if entry.code_size() == CodeSize::Bits64 {
            let mut tables = vec![0; usize::try_from(page_table::SIZE_BYTES).unwrap_or(0)];
            for page_table::Entry { gpa, value } in page_table::identity_4gib() {
                let at = usize::try_from(gpa - layout::BOOT_PML4).unwrap_or(0);
                tables[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            self.write("the page tables", layout::BOOT_PML4, &tables)?;
        }
        self.write("the reset code", layout::RESET_VECTOR, &layout::RESET_CODE)?;
        for table in acpi::tables(self.request.platform)? {
            self.write("the ACPI tables", table.gpa, &table.bytes)?;
        }
        Ok(())
    }

    fn write(&self, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), KernelError> {
        let result = self.ram.get().write_slice(bytes, GuestAddress(gpa));
        result.map_err(|source| KernelError::WriteMemory { what, source })
    }

    /// Reads `range` of a file into guest memory from `gpa` on.
    fn read(&self, source: &Source<'_>, range: FileRange, gpa: u64) -> Result<(), KernelError> {
        let (mut file, count) = source.at(range).map_err(|error| source.error(error))?;
        let result = self.ram.get().read_exact_volatile_from(GuestAddress(gpa), &mut file, count);
        result.map_err(|error| KernelError::Load { role: source.role, path: source.path.to_owned(), source: error })
    }
}

/// A file whose bytes go into guest memory.
struct Source<'a> {
    role: FileRole,
    /// The path that the user gave. `file` may hold what was unpacked from it.
    path: &'a Path,
    file: &'a File,
}

impl Source<'_> {
    fn error(&self, source: io::Error) -> KernelError {
        KernelError::Read { role: self.role, path: self.path.to_owned(), source }
    }

    /// The size in bytes.
    fn size(&self) -> Result<u64, KernelError> {
        Ok(self.file.metadata().map_err(|error| self.error(error))?.len())
    }

    /// A handle of the file positioned at the start of `range`, and the range's length.
    fn at(&self, range: FileRange) -> io::Result<(File, usize)> {
        let mut file = self.file.try_clone()?;
        file.seek(io::SeekFrom::Start(range.offset))?;
        let count = usize::try_from(range.bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        Ok((file, count))
    }
}

/// The next range of data in `file` between the offsets `at` and `end`. Holes are left out where the file system reports
/// them (lseek(2), SEEK_DATA and SEEK_HOLE); a range without bytes at `end` means that only a hole is left.
fn next_data(file: &File, at: u64, end: u64) -> FileRange {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start.min(end),
        Err(rustix::io::Errno::NXIO) => return FileRange { offset: end, bytes: 0 },
        Err(_) => return FileRange { offset: at, bytes: end - at },
    };
    let stop = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(end).clamp(start, end);
    FileRange { offset: start, bytes: stop - start }
}
