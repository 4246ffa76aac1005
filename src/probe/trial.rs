//! A throw-away vCPU that does, step by step, what a Linux kernel needs.

use crate::exit::ExitReason;
use crate::kvm::kick::{self, KickTarget};
use crate::kvm::{Direction, Exit, KvmError, System};
use crate::memory::{Backing, GuestRam};
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{gdt, layout, page_table};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

/// What is tried, in order. Each step ends with a write of its number to port 0x10.
pub const STEPS: [&str; 7] =
    ["long mode", "SSE2", "cmpxchg16b", "xsave and xrstor", "port input (PIO)", "memory-mapped I/O", "HLT"];

const CODE: u64 = 0x1000;
const MEMORY_BYTES: u64 = 0x1_0000;
const STEP_PORT: u16 = 0x10;
const INPUT_PORT: u16 = 0x11;
const MMIO: u64 = 0xd000_0000;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// A trial that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// 64-bit code. The input and the MMIO read give the number of the step they end.
const PROGRAM: &[u8] = &[
    0xb0, 0x01, 0xe6, 0x10, // mov $1,%al; out %al,$0x10
    0x0f, 0x57, 0xc0, // xorps %xmm0,%xmm0
    0x66, 0x0f, 0x6e, 0xc8, // movd %eax,%xmm1
    0x66, 0x0f, 0xfe, 0xc1, // paddd %xmm1,%xmm0
    0x0f, 0x29, 0x04, 0x25, 0x00, 0x40, 0x00, 0x00, // movaps %xmm0,0x4000
    0xb0, 0x02, 0xe6, 0x10, // mov $2,%al; out %al,$0x10
    0x31, 0xc0, 0x31, 0xd2, // xor %eax,%eax; xor %edx,%edx
    0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0x10, 0x40, 0x00, 0x00, // lock cmpxchg16b 0x4010
    0xb0, 0x03, 0xe6, 0x10, // mov $3,%al; out %al,$0x10
    0xb8, 0x03, 0x00, 0x00, 0x00, 0x31, 0xd2, // mov $3,%eax; xor %edx,%edx
    0x0f, 0xae, 0x24, 0x25, 0x00, 0x50, 0x00, 0x00, // xsave 0x5000
    0x0f, 0xae, 0x2c, 0x25, 0x00, 0x50, 0x00, 0x00, // xrstor 0x5000
    0xb0, 0x04, 0xe6, 0x10, // mov $4,%al; out %al,$0x10
    0xe4, 0x11, 0xe6, 0x10, // in $0x11,%al; out %al,$0x10
    0xbb, 0x00, 0x00, 0x00, 0xd0, // mov $0xd0000000,%ebx
    0x8b, 0x03, 0xe6, 0x10, // mov (%rbx),%eax; out %al,$0x10
    0xf4, // hlt
];

/// Why a trial stopped before its last step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The vCPU left the guest for a reason that ends it.
    Exit(ExitReason),
    /// An ioctl failed.
    Kvm(String),
    /// The steps came out of order.
    Confused,
    /// Nothing happened for seconds.
    Hung,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exit(reason) => write!(f, "KVM_RUN ended with {}", reason.name()),
            Self::Kvm(what) => f.write_str(what),
            Self::Confused => f.write_str("the guest's instructions had the wrong effect"),
            Self::Hung => f.write_str("it hangs"),
        }
    }
}

/// How far a trial came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trial {
    /// Steps that worked: the first so many of [`STEPS`].
    pub done: usize,
    /// Why the next did not.
    pub failure: Option<Failure>,
}

/// Runs the trial on a machine of its own.
#[must_use]
pub fn run(system: &System) -> Trial {
    run_with(system, 0)
}

/// Whether a vCPU still runs where idle instructions (KVM_X86_DISABLE_EXITS_*) do not exit: some hosts take the setting,
/// and then fail to enter the guest.
///
/// # Errors
/// Why not, for people.
pub fn without_exits(system: &System, instructions: u32) -> Result<(), String> {
    match run_with(system, instructions).failure {
        None => Ok(()),
        Some(why) => Err(why.to_string()),
    }
}

fn run_with(system: &System, disabled: u32) -> Trial {
    let failed = |error: String| Trial { done: 0, failure: Some(Failure::Kvm(error)) };
    if let Err(error) = kick::install() {
        return failed(error.to_string());
    }
    std::thread::scope(|scope| {
        let (started, start) = channel();
        let (finished, result) = channel();
        scope.spawn(move || {
            let _ = started.send(KickTarget::current());
            let trial = attempt(system, disabled).unwrap_or_else(|error| failed(format!("{error}: {}", error.source)));
            let _ = finished.send(trial);
        });
        let target = start.recv().ok();
        let mut hung = false;
        loop {
            match result.recv_timeout(if hung { Duration::from_millis(10) } else { PATIENCE }) {
                Ok(trial) if hung => return Trial { failure: Some(Failure::Hung), ..trial },
                Ok(trial) => return trial,
                Err(RecvTimeoutError::Timeout) => {
                    hung = true;
                    target.inspect(|target| target.kick());
                }
                Err(RecvTimeoutError::Disconnected) => return failed("the trial's thread died".into()),
            }
        }
    })
}

fn attempt(system: &System, disabled: u32) -> Result<Trial, KvmError> {
    let ram = match prepare() {
        Ok(ram) => ram,
        Err(error) => return Ok(Trial { done: 0, failure: Some(Failure::Kvm(error)) }),
    };
    let mut vm = system.create_vm()?;
    if disabled != 0 {
        vm.disable_exits(disabled)?;
    }
    // A HLT that does not exit is not tried: nothing would end it.
    let steps = if disabled == 0 { STEPS.len() } else { STEPS.len() - 1 };
    vm.set_real_mode_pages(layout::KVM_TSS, layout::KVM_IDENTITY_MAP)?;
    vm.set_memory(ram)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid(system.supported_cpuid()?.as_slice())?;
    let entry = Entry::Linux64 { rip: CODE };
    vcpu.update_sregs(|sregs| {
        entry.apply(sregs);
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
    })?;
    vcpu.set_regs(&entry.regs())?;
    let mut running = vcpu.enter();
    let mut done = 0;
    loop {
        let mut exit = running.run()?;
        let failure = match &mut exit {
            Exit::Pio { port: STEP_PORT, direction: Direction::Out, data, .. } => {
                let step = data.first().copied().map_or(0, usize::from);
                if step != done + 1 {
                    Failure::Confused
                } else {
                    done = step;
                    if done == steps {
                        return Ok(Trial { done, failure: None });
                    }
                    continue;
                }
            }
            Exit::Pio { port: INPUT_PORT, direction: Direction::In, data, .. } => {
                data.fill(5);
                continue;
            }
            Exit::MmioRead { gpa: MMIO, data } => {
                data.fill(0);
                data[0] = 6;
                continue;
            }
            Exit::Hlt if done + 1 == STEPS.len() => return Ok(Trial { done: STEPS.len(), failure: None }),
            other => Failure::Exit(ExitReason::of(other)),
        };
        return Ok(Trial { done, failure: Some(failure) });
    }
}

/// The guest's memory: code, GDT, page tables.
fn prepare() -> Result<GuestRam, String> {
    let ram = GuestRam::new(&[(0, MEMORY_BYTES)], Backing::Anonymous(false)).map_err(|error| error.to_string())?;
    let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa)).map_err(|error| error.to_string());
    put(PROGRAM, CODE)?;
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(true)) {
        put(&entry.to_le_bytes(), at)?;
    }
    for (at, entry) in page_table::identity_4gib() {
        put(&entry.to_le_bytes(), at)?;
    }
    Ok(ram)
}
