//! Putting a kernel, its initrd and what it is told into guest memory.

use super::cache::Cache;
use super::{KernelError, Kind, identify, open, unpack_bzimage, unpack_initrd};
use crate::config::{BootProtocol, Unpack};
use crate::memory::GuestRam;
use hwvmm_arch::boot::bzimage::{BzImage, ENTRY_64_OFFSET};
use hwvmm_arch::boot::elf::ElfImage;
use hwvmm_arch::boot::multiboot::{self, Module};
use hwvmm_arch::boot::{pvh, zero_page};
use hwvmm_arch::layout::{self, BZIMAGE_LOAD, CMDLINE, CMDLINE_MAX_BYTES, HIGH_RAM_START};
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{acpi, gdt, page_table};
use rustix::fs::SeekFrom;
use std::fs::File;
use std::io::Seek;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Kernels since 2.6.x take an initrd anywhere below this.
const INITRD_LIMIT: u64 = 0x7fff_ffff;
/// The largest part of the guest's memory that an unpacked initrd may take: one in so many.
const INITRD_SHARE: u64 = 4;
const PAGE: u64 = 4096;
/// Where multiboot kernels may start: behind what hwvmm writes for them.
const MULTIBOOT_LOW: u64 = 0x8000;

/// What is to be loaded.
pub struct Request<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Multiboot modules.
    pub modules: &'a [(PathBuf, String)],
    /// The command line.
    pub cmdline: &'a str,
    /// A multiboot program's.
    pub arguments: &'a str,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Who unpacks a bzImage.
    pub unpack: Unpack,
    /// How to enter.
    pub boot: BootProtocol,
    /// Where unpacked kernels are.
    pub cache: Option<&'a Cache>,
    /// What the ACPI tables describe.
    pub platform: &'a acpi::Platform<'a>,
    /// Told about what takes long.
    pub progress: &'a dyn Fn(&str),
}

/// What was loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// How the boot vCPU starts.
    pub entry: Entry,
    /// For people: what was loaded and how it is entered.
    pub description: &'static str,
}

/// Loads everything.
///
/// # Errors
/// [`KernelError`], naming file, figures and remedy.
pub fn load(request: &Request<'_>, ram: &GuestRam) -> Result<Loaded, KernelError> {
    let loader = Loader { request, ram };
    if request.cmdline.contains('\0') {
        return Err(KernelError::CmdlineNul);
    }
    let file = open("kernel", request.kernel)?;
    let loaded = match identify(request.kernel, &file)? {
        Kind::Multiboot(elf) => loader.multiboot(&file, &elf)?,
        Kind::Elf(elf) => loader.elf(&file, &elf, None)?,
        Kind::BzImage(image) => loader.bzimage(&file, &image)?,
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
        layout::ram_banks(self.request.memory_bytes).first().map_or(0, |(_, size)| *size)
    }

    fn path(&self) -> PathBuf {
        self.request.kernel.to_owned()
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

    /// The protected-mode code as it is; the kernel's decompressor does the rest.
    fn bzimage_in_guest(&self, file: &File, image: &BzImage) -> Result<Loaded, KernelError> {
        if !image.has_64bit_entry() {
            let what = "this bzImage has no 64-bit entry point: it is older than Linux 3.8, or 32-bit".to_owned();
            return Err(KernelError::NotKernel { path: self.path(), what });
        }
        if self.request.boot == BootProtocol::Pvh {
            let why = "is unpacked by the guest, whose decompressor has the 64-bit entry only";
            return Err(KernelError::Protocol { path: self.path(), asked: "pvh", why });
        }
        let (start, bytes) = image.guest_unpack_range();
        let end = start.saturating_add(bytes).max(BZIMAGE_LOAD + image.code_bytes);
        self.check_room("kernel", start.min(BZIMAGE_LOAD), end)?;
        self.read("kernel", file, image.code_offset, image.code_bytes, BZIMAGE_LOAD)?;
        self.linux64(end, Some(image))?;
        let entry = Entry::Linux64 { rip: BZIMAGE_LOAD + ENTRY_64_OFFSET };
        Ok(Loaded { entry, description: "bzImage, unpacked by the guest" })
    }

    fn elf(&self, file: &File, elf: &ElfImage, image: Option<&BzImage>) -> Result<Loaded, KernelError> {
        self.segments(file, elf, HIGH_RAM_START)?;
        let pvh = match (self.request.boot, elf.pvh_entry) {
            (BootProtocol::Linux64, _) => None,
            // A bzImage's setup header says what PVH cannot, and the kernel's PVH entry looks for Xen: 256 CPUIDs.
            (BootProtocol::Auto, _) if image.is_some() => None,
            (BootProtocol::Pvh, None) => {
                let why = "has no PVH note (CONFIG_PVH)";
                return Err(KernelError::Protocol { path: self.path(), asked: "pvh", why });
            }
            (BootProtocol::Auto | BootProtocol::Pvh, entry) => entry,
        };
        if let Some(entry) = pvh {
            return self.pvh(u64::from(entry), elf);
        }
        if !elf.is_64 {
            let what = "a 32-bit ELF with neither a multiboot header nor a PVH note".to_owned();
            return Err(KernelError::NotKernel { path: self.path(), what });
        }
        self.check_entry(elf.entry, elf)?;
        self.linux64(elf.end(), image)?;
        let description =
            if image.is_some() { "bzImage, unpacked by hwvmm, 64-bit entry" } else { "vmlinux, 64-bit entry" };
        Ok(Loaded { entry: Entry::Linux64 { rip: elf.entry }, description })
    }

    fn pvh(&self, entry: u64, elf: &ElfImage) -> Result<Loaded, KernelError> {
        self.check_entry(entry, elf)?;
        let initrd = self.initrd(elf.end(), INITRD_LIMIT)?;
        self.cmdline(zero_page::CMDLINE_MAX_BYTES)?;
        let map = layout::memory_map(self.request.memory_bytes);
        self.write("the start info", layout::PVH_START_INFO, &pvh::start_info(&map, CMDLINE, initrd))?;
        let entry = Entry::Pvh { rip: entry, start_info: layout::PVH_START_INFO };
        Ok(Loaded { entry, description: "ELF kernel, PVH entry" })
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
        let initrd = self.request.initrd.map(|path| (path.to_owned(), String::new()));
        for (path, arguments) in initrd.iter().chain(self.request.modules) {
            let start = next.next_multiple_of(PAGE);
            let bytes = self.file_below("module", path, start, self.low_end())?;
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
        Ok(Loaded { entry, description: "multiboot kernel" })
    }

    fn check_entry(&self, entry: u64, elf: &ElfImage) -> Result<(), KernelError> {
        if elf.contains(entry) {
            return Ok(());
        }
        let what = format!("its entry point {entry:#x} lies outside of its segments");
        Err(KernelError::NotKernel { path: self.path(), what })
    }

    fn check_room(&self, what: &'static str, start: u64, end: u64) -> Result<(), KernelError> {
        let memory_end = self.low_end();
        if end > memory_end {
            return Err(KernelError::NoRoom { what, start, end, memory_end });
        }
        Ok(())
    }

    /// Reads the segments straight from the file into guest memory, each byte once. Guest memory is zero before, so
    /// that holes in the file and what the file does not have need no writing.
    fn segments(&self, file: &File, elf: &ElfImage, limit: u64) -> Result<(), KernelError> {
        for segment in &elf.segments {
            if segment.address < limit {
                return Err(KernelError::LowAddress { path: self.path(), start: segment.address, limit });
            }
            self.check_room("kernel", segment.address, segment.address + segment.memory_bytes)?;
            let end = segment.offset + segment.file_bytes;
            let mut at = segment.offset;
            while at < end {
                let (start, stop) = data_from(file, at, end);
                self.read("kernel", file, start, stop - start, segment.address + (start - segment.offset))?;
                at = stop;
            }
        }
        Ok(())
    }

    fn initrd(&self, kernel_end: u64, limit: u64) -> Result<Option<(u64, u64)>, KernelError> {
        let Some(path) = self.request.initrd else { return Ok(None) };
        let end = self.low_end().min(limit + 1);
        let floor = kernel_end.next_multiple_of(PAGE);
        let mut file = open("initrd", path)?;
        let room = end.saturating_sub(floor);
        // The guest has it in memory twice while it makes files of it: that must not be what takes its memory.
        if self.request.unpack == Unpack::Host
            && let Some(unpacked) = unpack_initrd(&file, self.request.cache, room / INITRD_SHARE)
        {
            file = unpacked;
        }
        let bytes = self.size("initrd", path, &file)?;
        let start = end.checked_sub(bytes).map(|start| start & !(PAGE - 1)).filter(|start| *start >= floor);
        let Some(start) = start else {
            return Err(KernelError::TooLarge { what: "initrd", bytes, room });
        };
        self.read("initrd", &file, 0, bytes, start)?;
        Ok(Some((start, bytes)))
    }

    /// Loads a whole file at `start`; its size in bytes.
    fn file_below(&self, what: &'static str, path: &Path, start: u64, end: u64) -> Result<u64, KernelError> {
        let file = open(what, path)?;
        let bytes = self.size(what, path, &file)?;
        let room = end.saturating_sub(start);
        if bytes > room {
            return Err(KernelError::TooLarge { what, bytes, room });
        }
        self.read(what, &file, 0, bytes, start)?;
        Ok(bytes)
    }

    fn size(&self, what: &'static str, path: &Path, file: &File) -> Result<u64, KernelError> {
        let read = |source| KernelError::Read { what, path: path.to_owned(), source };
        Ok(file.metadata().map_err(read)?.len())
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

    /// GDT, page tables, ACPI tables, and what there is of firmware.
    fn tables(&self, entry: &Entry) -> Result<(), KernelError> {
        let gdt: Vec<u8> = gdt::boot_gdt(entry.is_long()).iter().flat_map(|d| d.to_le_bytes()).collect();
        self.write("the GDT", layout::BOOT_GDT, &gdt)?;
        if entry.is_long() {
            let mut tables = vec![0; usize::try_from(page_table::SIZE_BYTES).unwrap_or(0)];
            for (gpa, value) in page_table::identity_4gib() {
                let at = usize::try_from(gpa - layout::BOOT_PML4).unwrap_or(0);
                tables[at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
            self.write("the page tables", layout::BOOT_PML4, &tables)?;
        }
        self.write("the reset code", layout::RESET_VECTOR, &layout::RESET_CODE)?;
        for table in acpi::tables(self.request.platform)? {
            self.write("the ACPI tables", table.address, &table.bytes)?;
        }
        Ok(())
    }

    fn write(&self, what: &'static str, gpa: u64, bytes: &[u8]) -> Result<(), KernelError> {
        let result = self.ram.get().write_slice(bytes, GuestAddress(gpa));
        result.map_err(|error| KernelError::Write { what, why: error.to_string() })
    }

    /// Reads a part of a file straight into guest memory.
    fn read(&self, what: &'static str, file: &File, offset: u64, bytes: u64, gpa: u64) -> Result<(), KernelError> {
        let mut source = file;
        let error = |why: String| KernelError::Write { what, why };
        source.seek(std::io::SeekFrom::Start(offset)).map_err(|e| error(e.to_string()))?;
        let count = usize::try_from(bytes).map_err(|e| error(e.to_string()))?;
        let mut source = source.try_clone().map_err(|e| error(e.to_string()))?;
        let result = self.ram.get().read_exact_volatile_from(GuestAddress(gpa), &mut source, count);
        result.map_err(|e| error(e.to_string()))
    }
}

/// The next stretch of data in `file` between `at` and `end`: holes are left out where the file system tells them.
fn data_from(file: &File, at: u64, end: u64) -> (u64, u64) {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start.min(end),
        Err(rustix::io::Errno::NXIO) => return (end, end),
        Err(_) => return (at, end),
    };
    let stop = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(end).clamp(start, end);
    (start, stop)
}
