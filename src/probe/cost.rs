//! The cost of one exit of each kind on this host: a small guest makes many, and the host's clock is read before and after.

use super::ProbeError;
use crate::exit::ExitReason;
use crate::kvm::kick;
use crate::kvm::{Direction, Exit, System, Vcpu, Vm, clock};
use crate::memory::{Backing, GuestRam};
use hwvmm_arch::gdt::{self, CodeSize};
use hwvmm_arch::layout::GpaRange;
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{layout, page_table};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const CODE: u64 = 0x1000;
const IDT: u64 = 0x2000;
const HANDLER: u64 = 0x3000;
const MEMORY_BYTES: u64 = 16 << 20;
const PAGE_FAULTS: u32 = 2048;
/// The guest writes it before its first round and after its last.
const MARK_PORT: u16 = 0x10;
const USER_PORT: u16 = 0x11;
/// The guest writes it before each HLT.
const HALT_PORT: u16 = 0x12;
const VECTOR: u8 = 0x40;
const ROUNDS: usize = 3;
const WAKES: u32 = 200;
/// Time from the write of [`HALT_PORT`] to the interrupt: enough for the vCPU to be halted by then.
const SLEEP: Duration = Duration::from_micros(300);
/// Time after which a measurement is taken to hang.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A kind of exit, in the order in which they are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// CPUID: the shortest exit, and its re-entry.
    Cpuid,
    /// RDMSR of IA32_APIC_BASE, which KVM answers itself.
    Msr,
    /// IN from a port that KVM answers itself.
    Pio,
    /// A read of memory that KVM answers itself (the I/O APIC).
    Mmio,
    /// A hypercall that KVM answers itself.
    Hypercall,
    /// A first touch of memory.
    PageFault,
    /// IN from a port that exits to hwvmm.
    UserPio,
    /// A read of a gpa that exits to hwvmm.
    UserMmio,
    /// From the signal of an interrupt to a halted vCPU until its next exit to hwvmm.
    HltWake,
}

impl Kind {
    /// All kinds, in the order in which they are measured.
    pub const ALL: [Self; 9] = [
        Self::Cpuid,
        Self::Msr,
        Self::Pio,
        Self::Mmio,
        Self::Hypercall,
        Self::PageFault,
        Self::UserPio,
        Self::UserMmio,
        Self::HltWake,
    ];

    /// The name in JSON: that of the class of exits, with "userspace_" before those that exit to hwvmm.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpuid => "cpuid",
            Self::Msr => "msr",
            Self::Pio => "pio",
            Self::Mmio => "mmio",
            Self::Hypercall => "hypercall",
            Self::PageFault => "npf",
            Self::UserPio => "userspace_pio",
            Self::UserMmio => "userspace_mmio",
            Self::HltWake => "hlt_wake",
        }
    }

    /// Returns what the guest does to cause the exit, and where it is handled, for tables.
    #[must_use]
    pub fn what(self) -> &'static str {
        match self {
            Self::Cpuid => "CPUID, in the kernel",
            Self::Msr => "RDMSR, in the kernel",
            Self::Pio => "port read, in the kernel (PIC)",
            Self::Mmio => "memory-mapped read, in the kernel (I/O APIC)",
            Self::Hypercall => "hypercall, in the kernel",
            Self::PageFault => "first touch of a page",
            Self::UserPio => "port read, in hwvmm",
            Self::UserMmio => "memory-mapped read, in hwvmm",
            Self::HltWake => "waking from HLT by an interrupt",
        }
    }

    /// Instructions before the loop, and the loop's body.
    fn code(self, extension: Extension) -> (Vec<u8>, Vec<u8>) {
        let one = |body: &[u8]| (Vec::new(), body.to_vec());
        match self {
            Self::Cpuid => one(&[0x31, 0xc0, 0x0f, 0xa2]), // xor %eax,%eax; cpuid
            Self::Msr => one(&[0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32]), // mov $0x1b,%ecx; rdmsr
            Self::Pio => one(&[0xe4, 0x21]),               // in $0x21,%al
            Self::UserPio => one(&[0xe4, 0x11]),           // in $0x11,%al
            // mov $address,%ebx; then mov (%rbx),%eax
            Self::Mmio => (vec![0xbb, 0, 0, 0xc0, 0xfe], vec![0x8b, 0x03]),
            Self::UserMmio => (vec![0xbb, 0, 0, 0, 0xd0], vec![0x8b, 0x03]),
            // mov $1,%eax (KVM_HC_VAPIC_POLL_IRQ: does nothing); vmmcall or vmcall
            Self::Hypercall => {
                one(&[0xb8, 1, 0, 0, 0, 0x0f, 0x01, if extension == Extension::Svm { 0xd9 } else { 0xc1 }])
            }
            // mov $0x200000,%edi (memory that is untouched until then); then mov %al,(%rdi); add $0x1000,%rdi
            Self::PageFault => (vec![0xbf, 0, 0, 0x20, 0], vec![0x88, 0x07, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0]),
            // out %al,$0x12; sti; hlt; cli
            Self::HltWake => (HLT_SETUP.to_vec(), vec![0xe6, 0x12, 0xfb, 0xf4, 0xfa]),
        }
    }

    fn count(self) -> u32 {
        match self {
            Self::PageFault => PAGE_FAULTS,
            Self::HltWake => WAKES,
            Self::Cpuid | Self::Msr | Self::Pio | Self::Mmio | Self::Hypercall | Self::UserPio | Self::UserMmio => {
                10_000
            }
        }
    }
}

/// The x2APIC on, its spurious vector set; the interrupt table loaded by 0x2800, where its limit and address are.
const HLT_SETUP: &[u8] = &[
    0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, // mov $0x1b,%ecx; rdmsr
    0x0d, 0x00, 0x0c, 0, 0, 0x0f, 0x30, // or $0xc00,%eax; wrmsr
    0xb9, 0x0f, 0x08, 0, 0, 0xb8, 0xff, 0x01, 0, 0, 0x31, 0xd2, 0x0f,
    0x30, // mov $0x80f,%ecx; mov $0x1ff,%eax; wrmsr
    0x0f, 0x01, 0x1c, 0x25, 0x00, 0x28, 0, 0, // lidt 0x2800
    0xbc, 0x00, 0x50, 0, 0, // mov $0x5000,%esp
];
const IDT_POINTER: u64 = IDT + 0x800;
/// The interrupt's handler: end of interrupt, and back.
const HLT_HANDLER: &[u8] = &[
    0x50, 0x51, 0x52, // push %rax, %rcx, %rdx
    0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, // mov $0x80b,%ecx; xor; xor; wrmsr
    0x5a, 0x59, 0x58, 0x48, 0xcf, // pop %rdx, %rcx, %rax; iretq
];

/// The processor's virtualization extension, which decides the instruction of a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extension {
    /// AMD SVM, where the instruction is VMMCALL.
    Svm,
    /// Intel VMX, where the instruction is VMCALL.
    Vmx,
}

/// The measured cost of a kind.
#[derive(Debug)]
pub struct Cost {
    /// The kind of exit.
    pub kind: Kind,
    /// The best of three rounds, or why it could not be measured.
    pub result: Result<Price, ProbeError>,
}

/// Cost of one exit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Price {
    /// Nanoseconds of the monotonic clock.
    pub ns: f64,
    /// Cycles of the host's time-stamp counter.
    pub cycles: f64,
}

/// The guest's code and how often it runs the body: a mark, the body in a loop, a mark, HLT.
fn program(kind: Option<Kind>, extension: Extension) -> (Vec<u8>, u32) {
    let (setup, body) = kind.map_or((Vec::new(), vec![0x90]), |kind| kind.code(extension));
    let count = kind.map_or(10_000, Kind::count);
    let mut code = setup;
    code.extend([0xe6, 0x10]); // out %al,$0x10
    code.extend([0x41, 0xb8]); // mov $count,%r8d
    code.extend(count.to_le_bytes());
    code.extend(&body);
    code.extend([0x41, 0xff, 0xc8]); // dec %r8d
    let back = i8::try_from(-(i32::try_from(body.len()).unwrap_or(0) + 5)).unwrap_or(0);
    code.extend([0x75, back.to_le_bytes()[0]]); // jnz to the body
    code.extend([0xe6, 0x10, 0xf4]); // out %al,$0x10; hlt
    (code, count)
}

/// One guest, ready to run.
struct Guest {
    vm: Vm,
    vcpu: Vcpu,
}

impl Guest {
    fn new(system: &System, code: &[u8]) -> Result<Self, ProbeError> {
        let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY_BYTES }], Backing::SmallPages)?;
        let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa));
        put(code, CODE)?;
        put(HLT_HANDLER, HANDLER)?;
        // A gate: offset, code selector, present interrupt gate (APM vol. 2 §4.8.4).
        let mut gate = [0_u8; 16];
        gate[..2].copy_from_slice(&u16::try_from(HANDLER).unwrap_or(0).to_le_bytes());
        gate[2..4].copy_from_slice(&gdt::CODE_SELECTOR.to_le_bytes());
        gate[5] = 0x8e;
        put(&gate, IDT + 16 * u64::from(VECTOR))?;
        put(&0x7ff_u16.to_le_bytes(), IDT_POINTER)?;
        put(&IDT.to_le_bytes(), IDT_POINTER + 2)?;
        for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(CodeSize::Bits64)) {
            put(&entry.to_le_bytes(), at)?;
        }
        for entry in page_table::identity_4gib() {
            put(&entry.value.to_le_bytes(), entry.gpa)?;
        }
        let mut vm = system.create_vm()?;
        vm.set_real_mode_pages(layout::KVM_TSS, layout::KVM_IDENTITY_MAP)?;
        vm.set_memory(ram)?;
        vm.create_irqchip()?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid(system.supported_cpuid()?.as_slice())?;
        let entry = Entry::Linux64 { rip: CODE };
        vcpu.update_sregs(|sregs| entry.apply(sregs))?;
        vcpu.set_regs(&entry.regs())?;
        Ok(Self { vm, vcpu })
    }
}

/// Time and cycles between the marks; for [`Kind::HltWake`], the median of all wakes instead.
fn measure(guest: &mut Guest) -> Result<Price, ProbeError> {
    let wake = EventFd::new(EFD_NONBLOCK).map_err(ProbeError::EventFd)?;
    guest.vm.register_irqfd(&wake, Vm::FIRST_MESSAGE_GSI)?;
    guest.vm.route_message(Vm::FIRST_MESSAGE_GSI, 0xfee0_0000, u32::from(VECTOR))?;
    let mut start = None;
    let mut wakes: Vec<Duration> = Vec::new();
    std::thread::scope(|scope| {
        let (halting, halts) = channel::<()>();
        let (woken, signals) = channel::<Instant>();
        scope.spawn(move || {
            while halts.recv().is_ok() {
                std::thread::sleep(SLEEP);
                let at = Instant::now();
                if wake.write(1).is_err() || woken.send(at).is_err() {
                    return;
                }
            }
        });
        let mut running = guest.vcpu.enter();
        loop {
            let mut exit = running.run()?;
            match &mut exit {
                Exit::Pio { port: MARK_PORT, direction: Direction::Out, .. } => match start {
                    None => start = Some((Instant::now(), clock::tsc())),
                    Some((at, tsc)) => {
                        let (ns, cycles) = (at.elapsed(), clock::tsc().saturating_sub(tsc));
                        return Ok(price(ns, cycles, &mut wakes));
                    }
                },
                Exit::Pio { port: USER_PORT, data, .. } => data.fill(0),
                Exit::MmioRead { data, .. } => data.fill(0),
                Exit::Pio { port: HALT_PORT, .. } => {
                    wakes.extend(signals.try_iter().map(|at| at.elapsed()));
                    let _ = halting.send(());
                }
                Exit::Interrupted => return Err(ProbeError::Hung),
                other => return Err(ProbeError::Exit(ExitReason::of(other))),
            }
        }
    })
}

fn float(value: u64) -> f64 {
    Duration::from_nanos(value).as_secs_f64() * 1e9
}

fn price(time: Duration, cycles: u64, wakes: &mut [Duration]) -> Price {
    let ns = time.as_secs_f64() * 1e9;
    if wakes.is_empty() {
        return Price { ns, cycles: float(cycles) };
    }
    wakes.sort();
    let median = wakes[wakes.len() / 2].as_secs_f64() * 1e9;
    Price { ns: median, cycles: median * float(cycles) / ns.max(1.0) }
}

/// The best of [`ROUNDS`], each on a machine of its own. Without a kind, that of the empty loop.
fn best(system: &System, kind: Option<Kind>, extension: Extension) -> Result<Price, ProbeError> {
    let (code, count) = program(kind, extension);
    let mut best: Option<Price> = None;
    for _ in 0..ROUNDS {
        let mut guest = Guest::new(system, &code)?;
        let all = measure(&mut guest)?;
        let divisor = if kind == Some(Kind::HltWake) { 1.0 } else { f64::from(count) };
        let one = Price { ns: all.ns / divisor, cycles: all.cycles / divisor };
        best = Some(best.filter(|best| best.ns <= one.ns).unwrap_or(one));
    }
    best.ok_or(ProbeError::WrongEffect)
}

/// Measures all kinds, and calls `progress` before each.
#[must_use]
pub fn costs(system: &System, mut progress: impl FnMut(Kind)) -> Vec<Cost> {
    let amd = std::path::Path::new("/sys/module/kvm_amd").exists();
    let extension = if amd { Extension::Svm } else { Extension::Vmx };
    // What the loop itself takes.
    let empty = kick::guarded(TIMEOUT, || best(system, None, extension))
        .and_then(Result::ok)
        .unwrap_or(Price { ns: 0.0, cycles: 0.0 });
    let one = |kind: Kind| {
        progress(kind);
        let result = kick::guarded(TIMEOUT, || best(system, Some(kind), extension)).unwrap_or(Err(ProbeError::Thread));
        let less =
            |all: Price| Price { ns: (all.ns - empty.ns).max(0.0), cycles: (all.cycles - empty.cycles).max(0.0) };
        Cost { kind, result: result.map(less) }
    };
    Kind::ALL.map(one).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kinds_loop_goes_back_to_its_body() {
        for kind in Kind::ALL {
            let (setup, body) = kind.code(Extension::Svm);
            let (code, count) = program(Some(kind), Extension::Svm);
            // The jump's own end, less what it jumps back.
            let jump = code.len() - 3;
            let target = i64::try_from(jump).expect("small") + i64::from(i8::from_le_bytes([code[jump - 1]]));
            assert_eq!(target, i64::try_from(setup.len() + 8).expect("small"), "{}", kind.name());
            assert_eq!(code[setup.len() + 4..setup.len() + 8], count.to_le_bytes());
            assert_eq!(code[setup.len() + 8..setup.len() + 8 + body.len()], body);
        }
        assert!(0x20_0000 + u64::from(PAGE_FAULTS) * 4096 <= MEMORY_BYTES);
    }

    #[test]
    fn wakes_are_told_by_their_median() {
        let mut wakes = [9, 1, 5].map(Duration::from_micros);
        let price = price(Duration::from_millis(1), 2_000_000, &mut wakes);
        assert!((price.ns - 5000.0).abs() < 1.0 && (price.cycles - 10_000.0).abs() < 1.0, "{price:?}");
    }
}
