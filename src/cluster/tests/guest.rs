//! A guest in memory, without KVM.

use super::super::End;
use super::super::blocks::Blocks;
use super::super::exec::{Cpu, PortEnd, Ports, run};
use super::super::flags::Flags;
use super::super::mmu::{Mmu, Paging};
use crate::memory::{Backing, GuestRam};
use hwvmm_arch::layout::GpaRange;
use vm_memory::{Bytes, GuestAddress};

/// The size of its memory, mapped at the same linear addresses by supervisor pages of 2 MiB.
pub(super) const BYTES: u64 = 8 << 20;
pub(super) const CODE: u64 = 0x1_0000;
pub(super) const STACK: u64 = 0x2_0000;
/// In another large page than the code.
pub(super) const DATA: u64 = 0x40_0000;
const TABLES: u64 = 0x1000;
/// A linear address that no large page maps: 1 GiB.
const SMALL: u64 = 1 << 30;
const LARGE: u64 = 0xe3;

#[derive(Default)]
pub(super) struct FakePorts {
    pub(super) log: Vec<String>,
    pub(super) raises: bool,
    pub(super) absent: bool,
    pub(super) late: bool,
    value: u64,
}

impl Ports for FakePorts {
    fn input(&mut self, port: u16, _width: u8) -> Option<(u64, PortEnd)> {
        self.log.push(format!("in {port:x}"));
        (!self.absent).then_some((self.value, PortEnd::Nothing))
    }

    fn output(&mut self, port: u16, _width: u8, value: u64) -> Option<PortEnd> {
        self.log.push(format!("out {port:x} {value:x}"));
        self.value = value;
        (!self.absent).then_some(if self.raises { PortEnd::Interrupt } else { PortEnd::Nothing })
    }

    fn interrupted(&mut self) -> Option<End> {
        self.late.then_some(End::Time)
    }
}

pub(super) struct Guest {
    pub(super) ram: GuestRam,
    pub(super) cpu: Cpu,
    pub(super) ports: FakePorts,
    blocks: Blocks,
}

impl Guest {
    pub(super) fn new(code: &[u8]) -> Self {
        let ram = GuestRam::new(&[GpaRange { start: 0, bytes: BYTES }], Backing::SmallPages).expect("memory");
        let cpu = Cpu { regs: [0; 32], rip: CODE, flags: Flags::new(2), bases: [0; 4] };
        let mut guest = Self { ram, cpu, ports: FakePorts::default(), blocks: Blocks::new() };
        guest.cpu.regs[4] = STACK;
        let entry = |at: u64, value: u64| guest.ram.get().write_obj(value, GuestAddress(at)).expect("memory");
        entry(TABLES, TABLES + 0x1000 | 0x67);
        entry(TABLES + 0x1000, TABLES + 0x2000 | 0x67);
        (0..BYTES >> 21).for_each(|page| entry(TABLES + 0x2000 + page * 8, page << 21 | LARGE));
        // The table of small pages.
        entry(TABLES + 0x1008, TABLES + 0x3000 | 0x67);
        entry(TABLES + 0x3000, TABLES + 0x4000 | 0x63);
        guest.put(CODE, code);
        guest
    }

    pub(super) fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.get().write_slice(bytes, GuestAddress(gpa)).expect("memory");
    }

    pub(super) fn word(&self, gpa: u64) -> u64 {
        self.ram.get().read_obj(GuestAddress(gpa)).expect("memory")
    }

    /// Maps a small page to `gpa` with these flags; returns its linear address.
    pub(super) fn map_small(&self, gpa: u64, flags: u64) -> u64 {
        self.put(TABLES + 0x4000, &(gpa | flags).to_le_bytes());
        SMALL
    }

    /// Makes the small page accessible to user mode at every level.
    pub(super) fn make_user(&self) {
        self.put(TABLES + 0x3000, &(TABLES + 0x4000 | 0x67).to_le_bytes());
    }

    pub(super) fn run(&mut self) -> (u64, End) {
        let mut mmu = Mmu::new(&self.ram, Paging { root: TABLES, levels: 4, no_execute: true });
        run(&mut self.cpu, &mut mmu, &mut self.blocks, &mut self.ports, 4096, false)
    }
}
