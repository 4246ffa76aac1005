//! Loads a kernel, its initrd or modules, and the structures of its boot protocol into guest memory.

use super::error::{FileRole, KernelError};
use super::file::open;
use super::identify::{KernelFile, KernelFormat};
use super::placement::{KernelPlacement, low_end};
use super::prepare::Prepared;
use crate::config::{BootProtocol, ModuleConfig};
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
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::File;
use std::io::{self, IoSliceMut, Seek};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = 4096;
/// How much is read at once of a file that comes from the host's disk, in bytes. The kernel then reads ahead, in folios that grow with
/// each step. One large read fills the page cache with single pages, and every later run takes longer to copy them.
const COLD_STEP: usize = 16 << 10;
/// The lowest gpa of a multiboot kernel: below it are the structures that hwvmm writes for it.
const MULTIBOOT_LOW: u64 = 0x8000;

/// What is to be loaded, and how.
pub struct Request<'a> {
    /// The kernel file, which is open and whose format is known.
    pub kernel: &'a KernelFile,
    /// What was unpacked of it, and its initrd.
    pub prepared: &'a Prepared,
    /// The multiboot modules: the path and the arguments of each.
    pub modules: &'a [ModuleConfig],
    /// The command line for Linux.
    pub cmdline: &'a str,
    /// The arguments of a multiboot kernel, which is not given `cmdline`.
    pub arguments: &'a str,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// The boot protocol asked for; with `Auto`, the kernel's format decides.
    pub boot: BootProtocol,
    /// The hardware that the ACPI tables describe.
    pub platform: &'a acpi::Platform<'a>,
}

/// How a kernel was loaded into guest memory, and how the guest enters it.
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
    let file = request.kernel.file();
    let loaded = match (request.kernel.format(), &request.prepared.unpacked) {
        (KernelFormat::Multiboot(elf), _) => loader.multiboot(file, elf)?,
        (KernelFormat::Elf(elf), _) => loader.elf(file, elf, None)?,
        (KernelFormat::BzImage(image), Some(vmlinux)) => loader.elf(&vmlinux.file, &vmlinux.elf, Some(image))?,
        (KernelFormat::BzImage(image), None) => loader.bzimage_in_guest(file, image)?,
    };
    loader.tables(&loaded.entry)?;
    Ok(loaded)
}

struct Loader<'a> {
    request: &'a Request<'a>,
    ram: &'a GuestRam,
}

impl Loader<'_> {
    fn low_end(&self) -> u64 {
        low_end(self.request.memory_bytes)
    }

    /// The kernel's path, for errors.
    fn path(&self) -> PathBuf {
        self.request.kernel.path().to_owned()
    }

    /// The kernel's bytes in `file`: the file itself, or what was unpacked from it.
    fn kernel<'f>(&'f self, file: &'f File) -> Source<'f> {
        Source { role: FileRole::Kernel, path: self.request.kernel.path(), file }
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
        let placement = KernelPlacement::of_guest_unpacked(image);
        self.check_room(image.guest_unpack_range().start.min(BZIMAGE_LOAD), placement.kernel_end)?;
        self.read(&self.kernel(file), image.code, BZIMAGE_LOAD)?;
        self.linux64(placement, Some(image))?;
        let entry = Entry::Linux64 { rip: BZIMAGE_LOAD + ENTRY_64_OFFSET };
        let method = BootMethod { decompressor: Decompressor::Guest, protocol: EntryProtocol::Linux64 };
        Ok(Loaded { entry, method })
    }

    fn elf(&self, file: &File, elf: &ElfImage, image: Option<&BzImage>) -> Result<Loaded, KernelError> {
        self.segments(file, elf, HIGH_RAM_START)?;
        let placement = KernelPlacement::of_elf(elf, image, self.request.boot);
        let decompressor = if image.is_some() { Decompressor::Host } else { Decompressor::None };
        match self.way_in(elf, image)? {
            WayIn::Pvh(entry) => {
                let method = BootMethod { decompressor, protocol: EntryProtocol::Pvh };
                Ok(Loaded { entry: self.pvh(entry, elf, placement)?, method })
            }
            WayIn::Linux64 => {
                self.check_entry(elf.entry, elf)?;
                self.linux64(placement, image)?;
                let method = BootMethod { decompressor, protocol: EntryProtocol::Linux64 };
                Ok(Loaded { entry: Entry::Linux64 { rip: elf.entry }, method })
            }
        }
    }

    /// Finds how an ELF kernel is entered. `image` is the bzImage that an unpacked kernel comes from.
    fn way_in(&self, elf: &ElfImage, image: Option<&BzImage>) -> Result<WayIn, KernelError> {
        let pvh = elf.notes.pvh_entry.map(|entry| WayIn::Pvh(entry.into()));
        let protocol = |asked, why| KernelError::Protocol { path: self.path(), asked, why };
        match (self.request.boot, elf.class) {
            (BootProtocol::Pvh, _) => pvh.ok_or_else(|| protocol("pvh", "has no PVH note (CONFIG_PVH)")),
            (BootProtocol::Linux64, ElfClass::Elf64) => Ok(WayIn::Linux64),
            (BootProtocol::Linux64, ElfClass::Elf32) => Err(protocol("linux64", "is a 32-bit kernel")),
            (BootProtocol::Auto, ElfClass::Elf64) => {
                // The PVH entry of Linux searches for Xen by 256 CPUIDs. Where other kernels have one, it is the one that they
                // are made for.
                let is_linux = image.is_some() || elf.notes.is_linux && elf.contains(elf.entry);
                Ok(pvh.filter(|_| !is_linux).unwrap_or(WayIn::Linux64))
            }
            (BootProtocol::Auto, ElfClass::Elf32) => pvh.ok_or_else(|| {
                let what = match image {
                    Some(_) => "a 32-bit kernel without a PVH note (CONFIG_PVH)",
                    None => "a 32-bit ELF with neither a multiboot header nor a PVH note",
                };
                KernelError::NotKernel { path: self.path(), what: what.into() }
            }),
        }
    }

    fn pvh(&self, entry: u64, elf: &ElfImage, placement: KernelPlacement) -> Result<Entry, KernelError> {
        self.check_entry(entry, elf)?;
        let initrd = self.initrd(placement)?;
        self.cmdline(zero_page::CMDLINE_MAX_BYTES)?;
        let map = layout::memory_map(self.request.memory_bytes);
        self.write("the start info", layout::PVH_START_INFO, &pvh::start_info(&map, CMDLINE, initrd))?;
        Ok(Entry::Pvh { rip: entry, start_info: layout::PVH_START_INFO })
    }

    fn linux64(&self, placement: KernelPlacement, image: Option<&BzImage>) -> Result<(), KernelError> {
        let initrd = self.initrd(placement)?;
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
        let mut add = |path: &Path, file: &File, arguments: &str| {
            let start = next.next_multiple_of(PAGE);
            let bytes = self.module(path, file, start)?;
            modules.push(Module { start, end: start + bytes, name: with_arguments(path, arguments) });
            next = start + bytes;
            Ok::<_, KernelError>(())
        };
        if let Some(initrd) = &self.request.prepared.initrd {
            add(&initrd.path, &initrd.file, "")?;
        }
        for ModuleConfig { path, arguments } in self.request.modules {
            add(path, &open(FileRole::Module, path)?, arguments)?;
        }
        // By custom the first word is the program's name.
        let cmdline = with_arguments(self.request.kernel.path(), self.request.arguments);
        let map = layout::memory_map(self.request.memory_bytes);
        let info = multiboot::info(self.request.memory_bytes, &map, &cmdline, &modules)
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

    /// Loads the initrd as high as `placement` lets it.
    fn initrd(&self, placement: KernelPlacement) -> Result<Option<GpaRange>, KernelError> {
        let Some(initrd) = &self.request.prepared.initrd else { return Ok(None) };
        let role = FileRole::Initrd;
        let room = placement.initrd_room(self.request.memory_bytes);
        let source = Source { role, path: &initrd.path, file: &initrd.file };
        let bytes = source.size()?;
        let start = room.end().checked_sub(bytes).map(|start| start & !(PAGE - 1)).filter(|start| *start >= room.start);
        let Some(start) = start else {
            return Err(KernelError::TooLarge { role, bytes, room: room.bytes });
        };
        self.read(&source, FileRange { offset: 0, bytes }, start)?;
        Ok(Some(GpaRange { start, bytes }))
    }

    /// Loads a multiboot module at gpa `start`. Returns its size in bytes.
    fn module(&self, path: &Path, file: &File, start: u64) -> Result<u64, KernelError> {
        let role = FileRole::Module;
        let source = Source { role, path, file };
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
        let count = source.seek(range).map_err(|error| source.error(error))?;
        let step = if is_cached(source.file, range.offset) { usize::MAX } else { COLD_STEP };
        let failed = |error| KernelError::Load { role: source.role, path: source.path.to_owned(), source: error };
        let (mut gpa, mut left) = (gpa, count);
        while left > 0 {
            let now = left.min(step);
            let ram = self.ram.get();
            ram.read_exact_volatile_from(GuestAddress(gpa), &mut source.file.as_fd(), now).map_err(failed)?;
            (gpa, left) = (gpa + now as u64, left - now);
        }
        Ok(())
    }
}

/// How an ELF kernel is entered.
enum WayIn {
    /// At `e_entry`, by Linux' 64-bit boot protocol.
    Linux64,
    /// At this gpa, by PVH.
    Pvh(u64),
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

    /// Moves the position of the file to the start of `range`. Returns the range's length.
    fn seek(&self, range: FileRange) -> io::Result<usize> {
        let mut file = self.file;
        file.seek(io::SeekFrom::Start(range.offset))?;
        usize::try_from(range.bytes).map_err(|_| io::ErrorKind::FileTooLarge.into())
    }
}

/// Returns true if the byte at `offset` is in the host's page cache, or where the kernel does not tell.
fn is_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    let read = preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, ReadWriteFlags::NOWAIT);
    read != Err(Errno::AGAIN)
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

/// Returns the command line of a multiboot kernel or module: its path, and behind a space its arguments.
fn with_arguments(path: &Path, arguments: &str) -> Vec<u8> {
    let path = path.as_os_str().as_bytes();
    [path, b" ", arguments.as_bytes()].concat().trim_ascii_end().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Advice, fadvise};
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_not_in_the_page_cache_is_found() {
        let file = tempfile::tempfile_in("/var/tmp").expect("a file");
        file.write_all_at(&[1; 1 << 20], 0).expect("written");
        assert!(is_cached(&file, 0) && is_cached(&file, 1 << 19));
        assert!(is_cached(&file, 1 << 30), "behind the end nothing is read from the disk");
        file.sync_all().expect("synced");
        fadvise(&file, 0, None, Advice::DontNeed).expect("dropped");
        if is_cached(&file, 1 << 19) {
            return crate::skip::skipped("the file system of /var/tmp keeps its files in memory");
        }
        file.read_exact_at(&mut [0; 4096], 1 << 19).expect("read");
        assert!(is_cached(&file, 1 << 19));
    }
}
