//! Runs the guest of the nanobenchmarks on a machine of its own, and counts the exits between its marks.

use super::image::{LOAD, MEMORY_BYTES, guest};
use super::{Column, Measured, OPERATIONS, ParseError, parse};
use crate::exit::ExitReason;
use crate::kvm::kick::{self, KickTarget};
use crate::kvm::stats::Reader;
use crate::kvm::{Direction, Exit, KvmError, System, Vcpu, Vm};
use crate::memory::{Backing, GuestRam, MemoryError};
use hwvmm_arch::gdt::{self, CodeSize};
use hwvmm_arch::layout::{self, GpaRange};
use hwvmm_arch::regs::Entry;
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The guest writes the number of an operation here before it, and the same with bit 7 set after it.
const MARK_PORT: u16 = 0x508;
const UART_DATA: u16 = 0x3f8;
const UART_STATUS: u16 = 0x3fd;
/// The guest writes here at its end.
const END_PORT: u16 = 0xf4;
/// The port whose writes KVM handles by an ioeventfd.
const KERNEL_PORT: u16 = 0x9a;
/// The UART's line status: the transmitter is empty.
const READY: u8 = 0x60;
/// The number of rounds of each operation (ROUNDS in guest.s).
const ROUNDS: f64 = 15.0;
/// The longest accepted output of the guest, in bytes.
const MOST_TEXT: usize = 1 << 16;
/// The timeout of the run: a guest that takes longer hangs.
const TIMEOUT: Duration = Duration::from_secs(300);
/// KVM's counters that are not causes of exits.
const NO_CAUSES: [&str; 6] =
    ["exits", "irq_exits", "guest_mode", "preemption_reported", "preemption_other", "host_state_reload"];

/// Counters at a mark: those of KVM, and userspace exits by reason.
type Counts = BTreeMap<String, u64>;

/// Why the nanobenchmarks cannot be run.
#[derive(Debug, Error)]
pub enum NanoError {
    /// Guest memory cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory cannot be written.
    #[error("cannot write guest memory")]
    Write(#[from] GuestMemoryError),
    /// An ioctl of KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The file descriptor for the ioeventfd cannot be made.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    /// The guest made an exit that it should not make.
    #[error("the guest ended with the userspace exit {}", .0.name())]
    Exit(ExitReason),
    /// The guest did not end in time.
    #[error("the guest runs for more than {} s", TIMEOUT.as_secs())]
    Timeout,
    /// The thread of the guest cannot be made, or panicked.
    #[error("the thread that runs the guest ended early")]
    Thread,
    /// The guest's output is not complete.
    #[error(transparent)]
    Parse(#[from] ParseError),
}

/// What the guest printed, and the counters of each operation.
struct Output {
    text: String,
    counts: Vec<Option<Counts>>,
}

struct Machine {
    vcpu: Vcpu,
    second: Vcpu,
    /// Kept as long as its vCPUs.
    _vm: Vm,
    _event: EventFd,
}

fn machine(system: &System) -> Result<Machine, NanoError> {
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY_BYTES }], Backing::TransparentHugePages)?;
    let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa));
    put(guest(), LOAD.into())?;
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(CodeSize::Bits32)) {
        put(&entry.to_le_bytes(), at)?;
    }
    // All pages are filled first, so that no operation includes a first touch.
    ram.populate()?;
    let mut vm = system.create_vm()?;
    vm.set_real_mode_pages(layout::KVM_TSS, layout::KVM_IDENTITY_MAP)?;
    vm.set_memory(ram)?;
    vm.create_irqchip()?;
    let event = EventFd::new(EFD_NONBLOCK).map_err(NanoError::EventFd)?;
    vm.register_port_ioeventfd(&event, KERNEL_PORT)?;
    let vcpu = vm.create_vcpu(0)?;
    let second = vm.create_vcpu(1)?;
    let cpuid = system.supported_cpuid()?;
    for vcpu in [&vcpu, &second] {
        vcpu.set_cpuid(cpuid.as_slice())?;
    }
    let entry = Entry::Multiboot { rip: LOAD.into(), info: 0 };
    vcpu.update_sregs(|sregs| entry.apply(sregs))?;
    vcpu.set_regs(&entry.regs())?;
    Ok(Machine { vcpu, second, _vm: vm, _event: event })
}

/// KVM's counters, summed over all vCPUs.
fn read_stats(readers: &[Reader]) -> Counts {
    let mut counts = Counts::new();
    for stat in readers.iter().filter_map(|reader| reader.read().ok()).flatten() {
        if let Some(value) = stat.values.first() {
            *counts.entry(stat.name).or_default() += value;
        }
    }
    counts
}

/// Runs the second vCPU until `done`. It makes no userspace exits unless something goes wrong; then the operations that need it
/// are missing from the results.
fn run_second(vcpu: &mut Vcpu, done: &AtomicBool) {
    let mut running = vcpu.enter();
    while !done.load(Ordering::Acquire) && matches!(running.run(), Ok(Exit::Again | Exit::Interrupted)) {}
}

/// Runs both vCPUs until the guest's end.
fn run(machine: &mut Machine) -> Result<Output, NanoError> {
    let open = |vcpu: &Vcpu| vcpu.stats_fd().ok().and_then(|file| Reader::new(file).ok());
    let readers: Vec<Reader> = [&machine.vcpu, &machine.second].into_iter().filter_map(open).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (started, start) = channel();
        let (vcpu, second, done) = (&mut machine.vcpu, &mut machine.second, &done);
        let thread = scope.spawn(move || {
            let _ = started.send(KickTarget::current());
            run_second(second, done);
        });
        let ran = run_first(vcpu, &readers);
        done.store(true, Ordering::Release);
        if let Ok(target) = start.recv() {
            while !thread.is_finished() {
                target.kick();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        ran
    })
}

/// The differences of the counters between two marks, without the exit of the second mark.
fn between(first: &Counts, second: &Counts) -> Counts {
    let less = |(name, value): (&String, &u64)| {
        let own = u64::from(["exits", "io_exits", "userspace pio_out"].contains(&name.as_str()));
        let moved = value.saturating_sub(first.get(name).copied().unwrap_or(0)).saturating_sub(own);
        (moved > 0).then(|| (name.clone(), moved))
    };
    second.iter().filter_map(less).collect()
}

/// Runs the first vCPU until the guest's end, and counts between its marks.
fn run_first(vcpu: &mut Vcpu, readers: &[Reader]) -> Result<Output, NanoError> {
    let mut text = Vec::new();
    let mut user = Counts::new();
    let mut counts = vec![None; OPERATIONS.len()];
    let mut begun: Option<(u8, Counts)> = None;
    let mut running = vcpu.enter();
    loop {
        let mut exit = running.run()?;
        *user.entry(format!("userspace {}", ExitReason::of(&exit).name())).or_default() += 1;
        match &mut exit {
            Exit::Pio { port: UART_DATA, direction: Direction::Out, data, .. } => {
                text.extend(data.iter().take(MOST_TEXT.saturating_sub(text.len())));
            }
            Exit::Pio { port: UART_STATUS, direction: Direction::In, data, .. } => data.fill(READY),
            Exit::Pio { port: END_PORT, direction: Direction::Out, .. } => {
                return Ok(Output { text: String::from_utf8_lossy(&text).into_owned(), counts });
            }
            Exit::Pio { port: MARK_PORT, direction: Direction::Out, data, .. } => {
                let mark = data.first().copied().unwrap_or(0);
                let mut now = read_stats(readers);
                let counted = !now.is_empty();
                now.extend(user.clone());
                match begun.take() {
                    Some((number, first)) if mark == number | 0x80 && counted => {
                        if let Some(place) = counts.get_mut(usize::from(number)) {
                            *place = Some(between(&first, &now));
                        }
                    }
                    _ => begun = Some((mark, now)),
                }
            }
            Exit::Pio { direction: Direction::In, data, .. } => data.fill(0xff),
            Exit::MmioRead { data, .. } => data.fill(0xff),
            Exit::Pio { .. } | Exit::MmioWrite { .. } => {}
            Exit::Interrupted => return Err(NanoError::Timeout),
            other => return Err(NanoError::Exit(ExitReason::of(other))),
        }
    }
}

/// The number of operations in a round, from the guest's output.
fn count_of(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.split_whitespace().nth(1) == Some(name))?;
    u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok().map(f64::from)
}

fn exits_of(measured: &mut Measured, counts: &Counts, operations: f64) {
    // The counts are below 2^53, which an f64 holds exactly.
    #[allow(clippy::cast_precision_loss, reason = "see above")]
    let each = |value: u64| value as f64 / operations;
    let of = |name: &str| counts.get(name).copied().unwrap_or(0);
    measured.exits = Some(each(of("exits").saturating_sub(of("irq_exits"))));
    measured.by = counts
        .iter()
        .filter(|(name, _)| !NO_CAUSES.contains(&name.as_str()) && !name.ends_with("_ns"))
        .filter(|(_, value)| each(**value) >= 0.01)
        .map(|(name, value)| (name.clone(), each(*value)))
        .collect();
}

/// Runs the guest with KVM, and adds the results to `column`, which has the description of the host.
///
/// # Errors
/// [`NanoError`] where KVM cannot run the guest.
pub fn measure(system: &System, mut column: Column) -> Result<Column, NanoError> {
    let ran = kick::guarded(TIMEOUT, || run(&mut machine(system)?));
    let Output { text, counts } = ran.unwrap_or(Err(NanoError::Thread))?;
    column.results = parse(&text)?;
    for (operation, counts) in OPERATIONS.iter().zip(&counts) {
        if let (Some(measured), Some(counts), Some(count)) =
            (column.results.get_mut(operation.name), counts, count_of(&text, operation.name))
        {
            exits_of(measured, counts, count * ROUNDS);
        }
    }
    Ok(column)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_of_a_mark_is_not_counted() {
        let counts = |exits, io, cpuid| {
            BTreeMap::from([("exits".to_owned(), exits), ("io_exits".to_owned(), io), ("cpuid".to_owned(), cpuid)])
        };
        let moved = between(&counts(100, 10, 0), &counts(301, 11, 200));
        assert_eq!(moved, BTreeMap::from([("exits".to_owned(), 200), ("cpuid".to_owned(), 200)]));
        let mut measured = Measured::default();
        exits_of(&mut measured, &moved, 200.0);
        assert_eq!((measured.exits, measured.by["cpuid"]), (Some(1.0), 1.0));
    }
}
