//! The interpreter on guest memory alone, without KVM: for its tests, its bench and its fuzz target.

use super::blocks::Blocks;
use super::cpu::Cpu;
use super::exec::{Access, Interrupts, Limits, PortEnd, Ports, run};
use super::flags::{DF, Flags, IF, STATUS};
use super::mmu::{Mmu, Paging};
use crate::measure::clusters::ClusterEnd as End;
use crate::memory::{Backing, GuestRam, MemoryError};
use hwvmm_arch::layout::GpaRange;
use vm_memory::{Bytes, GuestAddress};

/// The size of the memory in bytes. Supervisor pages of 2 MiB map it at the same linear addresses.
pub const BYTES: u64 = 8 << 20;
/// The address of the code.
pub const CODE: u64 = 0x1_0000;
/// The stack pointer at the start.
pub const STACK: u64 = 0x2_0000;
/// An address in another large page than the code.
pub const DATA: u64 = 0x40_0000;
/// The linear address of the small pages.
pub(super) const SMALL: u64 = 1 << 30;
/// The top page table. The table of small pages is the fifth page from here on.
pub(super) const TABLES: u64 = 0x1000;

/// The gpa of the pages that [`Standalone::map_guarded`] maps.
const GUARDED: u64 = 0x60_0000;
const GUARDED_PAGES: usize = 8;
const PAGE: u64 = 4096;

const TABLE: u64 = 0x67;
const LARGE: u64 = 0xe3;

/// Makes guest memory with page tables and with `code` at [`CODE`].
pub(super) fn memory(code: &[u8]) -> Result<GuestRam, MemoryError> {
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: BYTES }], Backing::SmallPages)?;
    let tables = (0..4).map(|level| TABLES + level * 0x1000).collect::<Vec<_>>();
    let mut entries = vec![
        (tables[0], tables[1] | TABLE),
        (tables[1], tables[2] | TABLE),
        // 1 GiB and on: small pages.
        (tables[1] + 8, tables[3] | TABLE),
        (tables[3], (TABLES + 0x4000) | 0x63),
    ];
    entries.extend((0..BYTES >> 21).map(|page| (tables[2] + page * 8, page << 21 | LARGE)));
    let put = |bytes: &[u8], gpa| {
        ram.get().write_slice(bytes, GuestAddress(gpa)).map_err(|source| MemoryError::NoMemory { gpa, source })
    };
    entries.into_iter().try_for_each(|(gpa, entry): (u64, u64)| put(&entry.to_le_bytes(), gpa))?;
    put(code, CODE)?;
    Ok(ram)
}

/// All ports read as 0x60, the line status of a UART that has sent everything; what is written is counted.
struct Counting(u64);

impl Ports for Counting {
    fn input(&mut self, _access: Access) -> Option<(u64, PortEnd)> {
        Some((0x60, PortEnd::Nothing))
    }

    fn output(&mut self, _access: Access, _value: u64) -> Option<PortEnd> {
        self.0 += 1;
        Some(PortEnd::Nothing)
    }

    fn interrupted(&mut self, _interrupts: Interrupts) -> Option<End> {
        None
    }
}

/// A vCPU that is only interpreted.
pub struct Standalone {
    ram: GuestRam,
    blocks: Blocks,
    cpu: Cpu,
    ports: Counting,
}

impl Standalone {
    /// Makes a vCPU in 64-bit kernel mode whose next instruction is the first of `code`. All registers but RSP are 0.
    ///
    /// # Errors
    /// Where there is no memory, or the code is too long.
    pub fn new(code: &[u8]) -> Result<Self, MemoryError> {
        let mut cpu = Cpu::new([0; 32], CODE, Flags::new(2), [0; 4]);
        cpu.regs[4] = STACK;
        Ok(Self { ram: memory(code)?, blocks: Blocks::new(), cpu, ports: Counting(0) })
    }

    /// Sets the general-purpose register with this number (0 to 15; RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 and on).
    pub fn set_register(&mut self, number: u8, value: u64) {
        self.cpu.regs[usize::from(number & 15)] = value;
    }

    /// Runs one cluster of about `most` instructions at most. Returns the number of instructions run.
    pub fn run(&mut self, most: u64) -> u64 {
        let mut mmu = Mmu::new(&self.ram, Paging { root: TABLES, levels: 4, no_execute: true });
        run(&mut self.cpu, &mut mmu, &mut self.blocks, &mut self.ports, Limits { most, alone: most }).0
    }

    /// The number of port writes so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.ports.0
    }
}

/// Bits of a page-table entry: a write is carried out where all of the first four are set, and the last is not (SDM vol. 3A §4.5).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;

impl Standalone {
    fn put(&self, gpa: u64, entry: u64) -> Result<(), MemoryError> {
        let written = self.ram.get().write_obj(entry, GuestAddress(gpa));
        written.map_err(|source| MemoryError::NoMemory { gpa, source })
    }

    /// Takes the last large page away and maps its first pages as small ones, with these entries' bits.
    fn map_guarded(&self, bits: &[u64; GUARDED_PAGES]) -> Result<(), MemoryError> {
        self.put(TABLES + 0x2000 + (GUARDED >> 21) * 8, 0)?;
        self.put(TABLES + 0x3000, (TABLES + 0x4000) | TABLE)?;
        (0_u64..)
            .zip(bits)
            .try_for_each(|(page, bits)| self.put(TABLES + 0x4000 + page * 8, (GUARDED + page * PAGE) | bits))
    }

    fn read(&self, gpa: u64, pages: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(pages * PAGE).unwrap_or(0)];
        let read = self.ram.get().read_slice(&mut bytes, GuestAddress(gpa));
        read.map(|()| bytes).unwrap_or_default()
    }
}

/// Runs any bytes as a guest: 16 that choose registers, 8 that choose how the guarded pages are mapped, 8 of RFLAGS, then code. For
/// the fuzz target, and for the test over its corpus.
///
/// # Panics
/// Where the interpreter does not come back in time, or has written to a page to which the guest could not.
pub fn run_bytes(data: &[u8]) {
    const MOST: u64 = 4_096;
    let Some((registers, data)) = data.split_first_chunk::<16>() else { return };
    let Some((pages, data)) = data.split_first_chunk::<GUARDED_PAGES>() else { return };
    let Some((flags, code)) = data.split_first_chunk::<8>() else { return };
    let code = &code[..code.len().min(4_096)];
    let Ok(mut vcpu) = Standalone::new(code) else { return };
    let bits = pages.map(|choice| {
        let bit = |number: u32, bit: u64| if choice >> number & 1 != 0 { bit } else { 0 };
        bit(0, PRESENT) | bit(1, WRITABLE) | bit(2, ACCESSED) | bit(3, DIRTY) | bit(4, USER) | bit(5, NO_EXECUTE)
    });
    vcpu.map_guarded(&bits).expect("memory");
    for (number, choice) in (0..16).zip(registers) {
        let offset = u64::from(choice >> 3);
        let value = match choice & 7 {
            0 => offset,
            1 => DATA + offset * 8,
            2 => STACK - offset * 8,
            3 => SMALL + (offset & 7) * PAGE + 0xff8,
            4 => SMALL + (offset & 7) * PAGE,
            5 => CODE + offset,
            6 => TABLES + offset * 0x400,
            _ => (1 << 47) - offset,
        };
        vcpu.set_register(number, value);
    }
    vcpu.cpu.flags = Flags::new(u64::from_le_bytes(*flags) & (STATUS | DF | IF) | 2);
    let tables = vcpu.read(TABLES, 5);
    let done = vcpu.run(MOST);
    assert!(done < MOST + 512, "{done} instructions");
    // A guest may write to its own page tables.
    if vcpu.read(TABLES, 5) != tables {
        return;
    }
    for (page, bits) in (0_u64..).zip(bits) {
        let may = bits & (PRESENT | WRITABLE | ACCESSED | DIRTY | USER) == PRESENT | WRITABLE | ACCESSED | DIRTY;
        let is_empty = vcpu.read(GUARDED + page * PAGE, 1).iter().all(|byte| *byte == 0);
        assert!(may || is_empty, "page {page}, whose entry has {bits:#x}, was written to");
    }
}
