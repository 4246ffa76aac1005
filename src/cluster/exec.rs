//! The interpreter's loop.

use super::blocks::Blocks;
use super::cpu::{Cpu, Flow, RAX, RDX};
use super::flags::IF;
use super::mmu::Mmu;
use super::op::{Kind, Op};
use super::steps::Step;
use crate::measure::clusters::ClusterEnd as End;

/// How many instructions are run between two looks at the clock.
const STRIDE: u64 = 64;

/// What a port access has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortEnd {
    /// Nothing: the guest goes on.
    Nothing,
    /// A device has raised an interrupt.
    Interrupt,
    /// The run is over.
    Stop,
}

/// If the guest takes interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupts {
    /// RFLAGS.IF is set.
    Taken,
    /// RFLAGS.IF is clear.
    Masked,
}

/// An access to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// The address of the instruction.
    pub(super) rip: u64,
    pub(super) port: u16,
    /// The log2 of its bytes.
    pub(super) width: u8,
}

/// The ports of a machine.
pub(super) trait Ports {
    /// Reads. `None`, and nothing is read, where no device of hwvmm's has the port.
    fn input(&mut self, access: Access) -> Option<(u64, PortEnd)>;
    /// Writes. `None`, and nothing is written, where no device of hwvmm's has the port.
    fn output(&mut self, access: Access, value: u64) -> Option<PortEnd>;
    /// Returns the reason where time is up, or the thread is wanted elsewhere.
    fn interrupted(&mut self, interrupts: Interrupts) -> Option<End>;
}

/// The instructions of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// In all.
    pub(super) most: u64,
    /// In a row without a port access.
    pub(super) alone: u64,
}

/// Runs instructions from RIP on until one cannot be interpreted, or the time is up. Returns the number of instructions run and the
/// reason for the end; RIP is that of the next instruction.
pub(super) fn run(
    cpu: &mut Cpu,
    mmu: &mut Mmu<'_>,
    blocks: &mut Blocks,
    ports: &mut impl Ports,
    limits: Limits,
) -> (u64, End) {
    blocks.start();
    let (mut done, mut check, mut accessed) = (0, STRIDE, 0);
    'blocks: loop {
        if done >= check {
            if let Some(end) = limit(done, accessed, limits).or_else(|| ports.interrupted(interrupts(cpu))) {
                return (done, end);
            }
            check = done + STRIDE;
        }
        let steps = match blocks.at(cpu.rip, mmu) {
            Ok(block) if !block.steps.is_empty() => &block.steps,
            Ok(_) => return (done, End::Unsupported),
            Err(end) => return (done, end),
        };
        let start = cpu.rip;
        let mut rest = steps.iter();
        while let Some(step) = rest.next() {
            let flow = step.run(cpu, mmu);
            done += 1;
            // Most lead to the next one.
            if flow == Flow::Next {
                continue;
            }
            if flow == Flow::Jumped {
                continue 'blocks;
            }
            cpu.rip = start.wrapping_add(offset(steps, rest.len()));
            let end = if flow == Flow::End { Err(cpu.end) } else { port_io(cpu, &step.op, ports) };
            match end {
                Err(end) => return (done - 1, end),
                Ok(None) => accessed = done,
                Ok(Some(end)) => {
                    cpu.rip = start.wrapping_add(step.op.next.into());
                    return (done, end);
                }
            }
        }
        cpu.rip = start.wrapping_add(steps.last().map_or(0, |step| step.op.next.into()));
    }
}

/// The offset from the block's start of the step behind which `rest` steps are left.
fn offset(steps: &[Step], rest: usize) -> u64 {
    let number = steps.len().saturating_sub(rest + 1);
    number.checked_sub(1).and_then(|before| steps.get(before)).map_or(0, |step| step.op.next.into())
}

/// The reason where a cluster has run enough instructions.
fn limit(done: u64, accessed: u64, limits: Limits) -> Option<End> {
    if done >= limits.most {
        return Some(End::Instructions);
    }
    (done - accessed >= limits.alone).then_some(End::NoAccess)
}

fn interrupts(cpu: &Cpu) -> Interrupts {
    if cpu.flags.control(IF) == 0 { Interrupts::Masked } else { Interrupts::Taken }
}

/// Carries out IN or OUT at RIP. Returns the reason where the cluster ends behind it.
#[inline(never)]
#[allow(clippy::cast_possible_truncation, reason = "a port's number is 16 bits")]
fn port_io(cpu: &mut Cpu, op: &Op, ports: &mut impl Ports) -> Result<Option<End>, End> {
    let port = if matches!(op.kind, Kind::InDx | Kind::OutDx) { cpu.whole(RDX) } else { op.imm };
    let access = Access { rip: cpu.rip, port: port as u16, width: op.width };
    let end = if matches!(op.kind, Kind::InDx | Kind::InImm) {
        let (value, end) = ports.input(access).ok_or(End::Port)?;
        cpu.set(RAX, op.width, value);
        end
    } else {
        ports.output(access, cpu.get(RAX, op.width)).ok_or(End::Port)?
    };
    // An access may take a device long.
    let interrupts = interrupts(cpu);
    Ok(match end {
        PortEnd::Stop => Some(End::Stopped),
        PortEnd::Interrupt if interrupts == Interrupts::Taken => Some(End::Interrupt),
        PortEnd::Nothing | PortEnd::Interrupt => ports.interrupted(interrupts),
    })
}
