//! A guest in memory, without KVM.

use super::super::End;
use super::super::blocks::Blocks;
use super::super::cpu::Cpu;
use super::super::exec::{Access, Interrupts, Limits, PortEnd, Ports, run};
use super::super::flags::Flags;
use super::super::mmu::{Mmu, Paging};
pub(super) use super::super::standalone::{BYTES, CODE, DATA, STACK};
use super::super::standalone::{SMALL, TABLES, memory};
use crate::memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

#[derive(Default)]
pub(super) struct FakePorts {
    pub(super) log: Vec<String>,
    pub(super) raises: bool,
    pub(super) absent: bool,
    pub(super) late: bool,
    value: u64,
}

impl Ports for FakePorts {
    fn input(&mut self, access: Access) -> Option<(u64, PortEnd)> {
        self.log.push(format!("in {:x}", access.port));
        (!self.absent).then_some((self.value, PortEnd::Nothing))
    }

    fn output(&mut self, access: Access, value: u64) -> Option<PortEnd> {
        self.log.push(format!("out {:x} {value:x}", access.port));
        self.value = value;
        (!self.absent).then_some(if self.raises { PortEnd::Interrupt } else { PortEnd::Nothing })
    }

    fn interrupted(&mut self, _interrupts: Interrupts) -> Option<End> {
        self.late.then_some(End::Time)
    }
}

pub(super) struct Guest {
    pub(super) ram: GuestRam,
    pub(super) cpu: Cpu,
    pub(super) ports: FakePorts,
    pub(super) limits: Limits,
    /// Walks of the page tables in the last cluster.
    pub(super) walks: u64,
    blocks: Blocks,
}

impl Guest {
    pub(super) fn new(code: &[u8]) -> Self {
        let cpu = Cpu::new([0; 32], CODE, Flags::new(2), [0; 4]);
        let ram = memory(code).expect("memory");
        let mut guest = Self {
            ram,
            cpu,
            ports: FakePorts::default(),
            limits: Limits { most: 4096, alone: 4096 },
            walks: 0,
            blocks: Blocks::new(),
        };
        guest.cpu.regs[4] = STACK;
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
        self.put(TABLES + 0x3000, &((TABLES + 0x4000) | 0x67).to_le_bytes());
    }

    pub(super) fn run(&mut self) -> (u64, End) {
        let mut mmu = Mmu::new(&self.ram, Paging { root: TABLES, levels: 4, no_execute: true });
        let ran = run(&mut self.cpu, &mut mmu, &mut self.blocks, &mut self.ports, self.limits);
        self.walks = mmu.walks();
        ran
    }
}
