//! A vCPU of hwvmm's own that does, step by step, what a Linux kernel needs.

use super::{Host, ProbeError};
use crate::error::chain;
use crate::exit::ExitReason;
use crate::kvm::kick;
use crate::kvm::{Direction, Exit, System};
use crate::memory::{Backing, GuestRam};
use hwvmm_arch::gdt::{self, CodeSize};
use hwvmm_arch::layout::GpaRange;
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{layout, page_table};
use std::time::Duration;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

/// What is tried, in order. Each step ends with a write of its number (from 1 on) to port 0x10.
pub const STEPS: [&str; 7] =
    ["long mode", "SSE2", "cmpxchg16b", "xsave and xrstor", "port input (PIO)", "memory-mapped I/O", "HLT"];

const CODE: u64 = 0x1000;
const MEMORY_BYTES: u64 = 0x1_0000;
const STEP_PORT: u16 = 0x10;
const INPUT_PORT: u16 = 0x11;
const MMIO: u64 = 0xd000_0000;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// Time after which a trial is taken to hang.
const TIMEOUT: Duration = Duration::from_secs(5);

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

/// Result of a trial.
#[derive(Debug)]
pub struct Trial {
    /// How many of [`STEPS`] worked, from the first on.
    pub done: usize,
    /// Why the next one did not work; `None` if all did.
    pub failure: Option<ProbeError>,
}

/// Environment variable: with the value 1, `hwvmm run` starts a Linux kernel without [`check_linux`].
pub const ANY_KVM: &str = "HWVMM_ANY_KVM";

/// This host's KVM fails at something that every Linux kernel does.
#[derive(Debug, Error)]
#[error(
    "this host's KVM{} cannot run Linux: a vCPU failed at {step} ({}); `hwvmm doctor` shows what works, and scripts/lab runs \
     hwvmm on an emulated processor ({ANY_KVM}=1 starts the kernel all the same)", .module.map(|name| format!(" ({name})")).unwrap_or_default(), chain(.failure)
)]
pub struct CannotRunLinux {
    /// KVM's vendor module, where it is known.
    pub module: Option<&'static str>,
    /// The step that failed: one of [`STEPS`].
    pub step: &'static str,
    /// Why the step failed.
    pub failure: ProbeError,
}

/// Runs the trial on a machine of its own.
#[must_use]
pub fn run(system: &System) -> Trial {
    run_with(system, 0)
}

/// Checks that KVM can run Linux, before a kernel is started that would only hang. Costs nothing where KVM's module uses the
/// processor's virtualization extensions; elsewhere the trial is run, which takes some milliseconds.
///
/// # Errors
/// [`CannotRunLinux`].
pub fn check_linux(system: &System, host: &Host) -> Result<(), CannotRunLinux> {
    if host.has_hardware_kvm() {
        return Ok(());
    }
    let Trial { done, failure } = run(system);
    let step = STEPS.get(done).copied().unwrap_or("its end");
    failure.map_or(Ok(()), |failure| Err(CannotRunLinux { module: host.vendor_module(), step, failure }))
}

/// Checks that a vCPU still runs where the idle instructions of `instructions` (KVM_X86_DISABLE_EXITS_*) do not exit: some
/// hosts accept the setting, and then cannot enter the guest.
///
/// # Errors
/// [`ProbeError`].
pub fn without_exits(system: &System, instructions: u32) -> Result<(), ProbeError> {
    run_with(system, instructions).failure.map_or(Ok(()), Err)
}

fn run_with(system: &System, disabled: u32) -> Trial {
    let body = || {
        let mut done = 0;
        let failure = attempt(system, disabled, &mut done).err();
        Trial { done, failure }
    };
    kick::guarded(TIMEOUT, body).unwrap_or(Trial { done: 0, failure: Some(ProbeError::Thread) })
}

/// Runs the steps, and counts in `done` those that worked.
fn attempt(system: &System, disabled: u32, done: &mut usize) -> Result<(), ProbeError> {
    let ram = prepare()?;
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
    while *done < steps {
        match &mut running.run()? {
            Exit::Pio { port: STEP_PORT, direction: Direction::Out, data, .. } => {
                if data.first().copied().map(usize::from) != Some(*done + 1) {
                    return Err(ProbeError::WrongEffect);
                }
                *done += 1;
            }
            Exit::Pio { port: INPUT_PORT, direction: Direction::In, data, .. } => data.fill(5),
            Exit::MmioRead { gpa: MMIO, data } => {
                data.fill(0);
                data[0] = 6;
            }
            Exit::Hlt if *done + 1 == STEPS.len() => *done += 1,
            Exit::Interrupted => return Err(ProbeError::Hung),
            other => return Err(ProbeError::Exit(ExitReason::of(other))),
        }
    }
    Ok(())
}

/// The guest's memory: code, GDT, page tables.
fn prepare() -> Result<GuestRam, ProbeError> {
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY_BYTES }], Backing::SmallPages)?;
    let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa));
    put(PROGRAM, CODE)?;
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(CodeSize::Bits64)) {
        put(&entry.to_le_bytes(), at)?;
    }
    for entry in page_table::identity_4gib() {
        put(&entry.value.to_le_bytes(), entry.gpa)?;
    }
    Ok(ram)
}
