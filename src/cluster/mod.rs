//! Exit clusters (Agesen, Mattson, Rugina and Sheldon, USENIX ATC 2012): after a userspace exit has been answered, the guest's next
//! instructions are interpreted, up to the first that cannot be, so that those among them that would exit again do not.
//!
//! README.md in this folder says what is interpreted, when, and what is not done.

mod arith;
mod blocks;
mod cpu;
mod decode;
mod exec;
mod flags;
mod mmu;
mod op;
mod places;
mod port_exit;
mod ports;
mod price;
mod rare;
mod site;
pub mod standalone;
mod steps;
#[cfg(test)]
mod tests;

use crate::exit::{EndReason, Handler};
use crate::kvm::vcpu::{Running, SyncedState};
use crate::kvm::{Direction, KvmError, clock};
use crate::measure::clusters::ClusterEnd as End;
use crate::measure::clusters::{ClusterCounts, ClusterRecord};
use crate::memory::GuestRam;
use blocks::Blocks;
use cpu::Cpu;
use exec::Limits;
use flags::Flags;
use kvm_bindings::kvm_regs;
use mmu::{Mmu, Paging};
use places::Places;
pub use port_exit::PortExit;
use ports::{Deadline, HandlerPorts};
use price::Price;
pub use site::Follow;
use site::{Gain, Sites};

/// The instructions of a cluster: a line on a UART takes about 90 a byte. Where there is no access in a while, the cluster's gain is over.
const LIMITS: Limits = Limits { most: 16_384, alone: 1_024 };
/// The longest time of a cluster, in nanoseconds: what an interrupt may have to wait that comes meanwhile.
const MOST_NS: u64 = 20_000;
/// The same while the guest takes no interrupts. A host on which [`LIMITS`] take longer is as slow as the lab.
const MOST_NS_MASKED: u64 = 4_000_000;
/// Exits of port I/O before KVM is asked for the whole state at each exit: more than a boot has that prints nothing. It would gain some
/// twenty exits by clusters, and need 1 MiB more.
const WARM_UP: u32 = 96;
/// Exits of port I/O in a row, none of which has led to a cluster with a gain, after which KVM is no longer asked for it.
const IDLE: u32 = 512;

const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
/// VMXE, CET, PKS and LAM_SUP: the guest may run nested guests, has shadow stacks, or its addresses mean something else.
const CR4_REFUSED: u64 = 1 << 13 | 1 << 23 | 1 << 24 | 1 << 28;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const EFER_SVME: u64 = 1 << 12;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;

/// What an exit that was answered has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// No device has raised an interrupt.
    None,
    /// A device has raised an interrupt.
    Raised,
}

/// How KVM completes port I/O. Each step is tried once, on an exit that is completed in the way that is always right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Completion {
    /// It has not been tried.
    Unknown,
    /// RIP at the exit is the instruction's, and moves on when it is completed; whether a change of RIP is seen has not been tried.
    AtInstruction,
    /// As above, and nothing is completed where RIP has changed: KVM's fast path of port I/O.
    Dropped,
    /// In another way, as by a KVM that emulates the instruction: it must be completed before the registers are changed.
    Always,
}

/// What a vCPU's thread has for following exits.
pub struct Clusters {
    ram: GuestRam,
    blocks: Blocks,
    sites: Sites,
    price: Price,
    completion: Completion,
    /// Calls of KVM_RUN with immediate_exit since they were last taken.
    runs: u32,
    warm: u32,
    /// Exits of port I/O since a cluster had a gain.
    idle: u32,
    khz: u64,
    ticks: u64,
    counts: ClusterCounts,
    places: Places,
}

/// A cluster that has ended.
struct Ended {
    /// The end of the run, where an access has ended it.
    run: Option<EndReason>,
    /// The exits avoided.
    avoided: u64,
    /// The instructions interpreted.
    instructions: u64,
    /// The address of the next instruction.
    rip: u64,
    /// Why it ended.
    reason: End,
    /// Walks of the guest's page tables.
    walks: u64,
}

impl Ended {
    /// A cluster without instructions.
    fn at_once(rip: u64, reason: End) -> Self {
        Self { run: None, avoided: 0, instructions: 0, rip, reason, walks: 0 }
    }
}

impl Clusters {
    /// Makes what is needed for the vCPU. `None` where this
    /// KVM does not copy the registers at exits (KVM_CAP_SYNC_REGS), and where the guest flushes TLBs by KVM_FEATURE_PV_TLB_FLUSH: KVM
    /// shows a vCPU outside of KVM_RUN to the others as preempted, and they would not wait for what is interpreted meanwhile.
    #[must_use]
    pub fn new(vcpu: &mut Running<'_>, follow: Follow) -> Option<Self> {
        let ram = vcpu.memory()?;
        vcpu.vcpu().syncs_regs().then_some(())?;
        if vcpu.vcpu().has_pv_tlb_flush() {
            // Asked for, or only tried.
            let level = if follow == Follow::ByTime { log::Level::Info } else { log::Level::Warn };
            log::log!(
                level,
                "exit clusters: the guest has KVM_FEATURE_PV_TLB_FLUSH, as a snapshot may; exits are not followed"
            );
            return None;
        }
        // Without a known frequency a slow processor's is assumed: the time is shorter then.
        let khz = u64::from(vcpu.vcpu().tsc_khz().unwrap_or(1_000_000));
        Some(Self {
            ram,
            blocks: Blocks::new(),
            sites: Sites::new(follow),
            price: Price::new(),
            completion: Completion::Unknown,
            runs: 0,
            warm: if follow == Follow::Always { WARM_UP } else { 0 },
            idle: 0,
            khz: khz.max(1),
            ticks: 0,
            counts: ClusterCounts::default(),
            places: Places::default(),
        })
    }

    /// Returns what was done so far.
    #[must_use]
    pub fn record(&self) -> ClusterRecord {
        let ns = |ticks: u64| u128::from(ticks) * 1_000_000 / u128::from(self.khz);
        log::debug!("exit clusters: an exit for port I/O took {} ns or more", ns(self.price.of(1)));
        let ns = ns(self.ticks);
        let (compared, decoded) = (self.blocks.compared(), self.blocks.decoded());
        let counts = ClusterCounts { ns: u64::try_from(ns).unwrap_or(u64::MAX), compared, decoded, ..self.counts };
        ClusterRecord { counts, avoided_at: self.places.all_avoided(), ended_at: self.places.all_ended() }
    }

    /// Returns how often KVM_RUN was called since the last time, with immediate_exit: an exit each, though the guest did not run.
    pub fn take_runs(&mut self) -> u32 {
        std::mem::take(&mut self.runs)
    }

    /// Follows an exit that has been answered, which has led to `interrupt`. Returns how the run ended, where an access to a device in the cluster has ended it.
    ///
    /// # Errors
    /// Where KVM cannot complete the instruction of the exit.
    pub fn follow(
        &mut self,
        vcpu: &mut Running<'_>,
        handler: &Handler,
        exit: PortExit,
        interrupt: Interrupt,
    ) -> Result<Option<EndReason>, KvmError> {
        let start = clock::tsc();
        self.price.answered(start);
        let ended = self.follow_at(vcpu, handler, exit, interrupt, start)?;
        self.price.goes_on_at(clock::tsc());
        Ok(ended)
    }

    /// As [`Self::follow`]; `start` is the TSC.
    fn follow_at(
        &mut self,
        vcpu: &mut Running<'_>,
        handler: &Handler,
        exit: PortExit,
        interrupt: Interrupt,
        start: u64,
    ) -> Result<Option<EndReason>, KvmError> {
        let Some(rip) = vcpu.vcpu().synced_rip() else { return Ok(None) };
        self.idle = self.idle.saturating_add(1);
        if self.idle >= IDLE && self.sites.may_be_left() {
            vcpu.vcpu_mut().unsync_state();
            (self.idle, self.warm) = (0, 0);
        }
        if !self.sites.is_followed(rip) {
            return Ok(None);
        }
        let Some(state) = vcpu.synced_state() else {
            self.warm = self.warm.saturating_add(1);
            if self.warm >= WARM_UP {
                vcpu.vcpu_mut().sync_state();
            }
            return Ok(None);
        };
        // The guest takes the interrupt before its next instruction.
        if interrupt == Interrupt::Raised && state.regs.rflags & flags::IF != 0 {
            return Ok(None);
        }
        self.counts.clusters += 1;
        let ended = if vcpu.has_breakpoints() {
            Ended::at_once(rip, End::State)
        } else {
            self.interpret(vcpu, handler, exit, &state)?
        };
        let ticks = clock::tsc().wrapping_sub(start);
        if self.sites.judge(rip, Gain { avoided: ended.avoided, instructions: ended.instructions, ticks }, &self.price)
        {
            self.idle = 0;
        }
        self.counts.avoided_exits += ended.avoided;
        self.counts.instructions += ended.instructions;
        self.counts.walks += ended.walks;
        self.ticks += ticks;
        self.counts.ends[ended.reason as usize] += 1;
        self.places.ended(ended.rip, ended.reason);
        Ok(ended.run)
    }

    fn interpret(
        &mut self,
        vcpu: &mut Running<'_>,
        handler: &Handler,
        exit: PortExit,
        state: &SyncedState,
    ) -> Result<Ended, KvmError> {
        let nothing = |reason| Ok(Ended::at_once(state.regs.rip, reason));
        let Some(paging) = paging(state) else { return nothing(End::State) };
        let Self { ram, blocks, places, .. } = self;
        let mut mmu = Mmu::new(ram, paging);
        // What was compared with memory in the cluster before may have changed.
        blocks.start();
        // The instruction of the exit must be the one that KVM says it is: code is read later than the processor read it.
        // Where it is not, as with a string of one item, nothing is done: KVM may have more to ask to complete it.
        let length = blocks.at(state.regs.rip, &mut mmu).ok().and_then(|block| block.port_io(&exit));
        let Some(length) = length else { return nothing(End::Unsupported) };
        let (mut cpu, answered);
        match self.completion {
            Completion::Unknown | Completion::Always => {
                self.runs += 1;
                vcpu.complete_port_io()?;
                let Some(completed) = vcpu.synced_state() else { return nothing(End::State) };
                if self.completion == Completion::Unknown {
                    self.completion = completion(state, &completed, length);
                }
                // The access may have led to an exception.
                if self::paging(&completed).is_none() {
                    return nothing(End::State);
                }
                (cpu, answered) = (Cpu::of(&completed), false);
            }
            Completion::AtInstruction | Completion::Dropped => {
                if self.completion == Completion::AtInstruction {
                    self.runs += 1;
                    let dropped = vcpu.abandon_port_io(state.regs, state.regs.rip)?;
                    self.completion = if dropped { Completion::Dropped } else { Completion::Always };
                }
                // The instruction is carried out here, whatever comes behind it: where RIP stayed, the guest would do it again.
                (cpu, answered) = (Cpu::of(state), true);
                cpu.rip = cpu.rip.wrapping_add(length);
                if exit.direction == Direction::In {
                    cpu.set_accumulator(exit.width, exit.value);
                }
            }
        }
        let start = clock::tsc();
        let ticks = |ns| self.khz * ns / 1_000_000;
        let deadline = Deadline { start, taken: ticks(MOST_NS), masked: ticks(MOST_NS_MASKED) };
        let mut ports = HandlerPorts::new(handler, vcpu, places, deadline);
        let (instructions, reason) = exec::run(&mut cpu, &mut mmu, blocks, &mut ports, LIMITS);
        let (avoided, run) = (ports.answered, ports.end.take());
        let mut regs = state.regs;
        cpu.write_to(&mut regs);
        if answered && regs.rip == state.regs.rip {
            // KVM would complete the access once more.
            self.runs += 1;
            vcpu.abandon_port_io(regs, state.regs.rip)?;
        }
        vcpu.set_synced_regs(regs);
        Ok(Ended { run, avoided, instructions, rip: cpu.rip, reason, walks: mmu.walks() })
    }
}

/// Judges by a first completion how KVM completes port I/O; `length` is that of the instruction at RIP.
fn completion(before: &SyncedState, after: &SyncedState, length: u64) -> Completion {
    let moved = after.regs.rip.wrapping_sub(before.regs.rip);
    let completion = if length == moved { Completion::AtInstruction } else { Completion::Always };
    log::debug!("exit clusters: RIP moves on by {moved} when port I/O is completed: {completion:?}");
    completion
}

/// Returns how linear addresses are translated; `None` where the state is one in which nothing is interpreted.
fn paging(state: &SyncedState) -> Option<Paging> {
    let (sregs, events, rflags) = (&state.sregs, &state.events, state.regs.rflags);
    let protected = sregs.cr0 & (CR0_PE | CR0_PG) == CR0_PE | CR0_PG && sregs.cr4 & CR4_PAE != 0;
    let long = sregs.efer & EFER_LMA != 0 && sregs.cs.l == 1 && sregs.cs.db == 0;
    let kernel = sregs.cs.selector & 3 == 0 && sregs.cs.dpl == 0 && sregs.ss.dpl == 0;
    let refused = sregs.cr4 & CR4_REFUSED != 0
        || sregs.efer & EFER_SVME != 0
        || rflags & (RFLAGS_TF | RFLAGS_RF | RFLAGS_VM) != 0;
    let pending = events.exception.injected != 0
        || events.exception.pending != 0
        || events.interrupt.injected != 0
        || events.interrupt.shadow != 0
        || events.nmi.injected != 0
        || events.nmi.pending != 0
        || events.smi.pending != 0
        || events.smi.smm != 0
        || events.triple_fault.pending != 0;
    (protected && long && kernel && !refused && !pending).then_some(Paging {
        root: sregs.cr3,
        levels: if sregs.cr4 & CR4_LA57 != 0 { 5 } else { 4 },
        no_execute: sregs.efer & EFER_NXE != 0,
    })
}

/// The registers in the order of their numbers (SDM vol. 2A, table 2-2).
fn by_number(regs: &mut kvm_regs) -> [&mut u64; 16] {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, .. } = regs;
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
}

impl Cpu {
    fn of(state: &SyncedState) -> Self {
        let (mut regs, mut from) = ([0; 32], state.regs);
        regs.iter_mut().zip(by_number(&mut from)).for_each(|(register, value)| *register = *value);
        let bases = [0, state.sregs.fs.base, state.sregs.gs.base, 0];
        Self::new(regs, state.regs.rip, Flags::new(state.regs.rflags), bases)
    }

    /// Sets AL, AX or EAX, as IN does.
    fn set_accumulator(&mut self, width: u8, value: u64) {
        self.regs[0] = match width {
            0 => self.regs[0] & !0xff | value & 0xff,
            1 => self.regs[0] & !0xffff | value & 0xffff,
            _ => value & 0xffff_ffff,
        };
    }

    fn write_to(&self, regs: &mut kvm_regs) {
        by_number(regs).into_iter().zip(self.regs).for_each(|(register, value)| *register = value);
        (regs.rip, regs.rflags) = (self.rip, self.flags.get());
    }
}
