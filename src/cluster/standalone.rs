//! The interpreter on guest memory alone, without KVM: for its tests, its bench and its fuzz target.

use super::blocks::Blocks;
use super::cpu::Cpu;
use super::exec::{Access, Interrupts, Limits, PortEnd, Ports, run};
use super::flags::Flags;
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
/// The top page table. The table of small pages is the fifth page from here on.
pub(super) const TABLES: u64 = 0x1000;

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
        let mut cpu = Cpu { regs: [0; 32], rip: CODE, flags: Flags::new(2), bases: [0; 4] };
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
