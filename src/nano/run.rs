//! Runs the nanobenchmarks' guest on a machine of its own, and counts the exits between its marks.

use super::image::{LOAD, MEMORY_BYTES, guest};
use super::{Column, Measured, OPERATIONS, parse};
use crate::exit::ExitReason;
use crate::kvm::kick::{self, KickTarget};
use crate::kvm::stats::Reader;
use crate::kvm::{Direction, Exit, KvmError, System, Vcpu, Vm};
use crate::memory::{Backing, GuestRam};
use hwvmm_arch::gdt::{self, CodeSize};
use hwvmm_arch::layout::{self, GpaRange};
use hwvmm_arch::regs::Entry;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MARK_PORT: u16 = 0x508;
const UART_DATA: u16 = 0x3f8;
const UART_STATUS: u16 = 0x3fd;
const END_PORT: u16 = 0xf4;
const KERNEL_PORT: u16 = 0x9a;
/// The transmitter is ready.
const READY: u8 = 0x60;
/// Rounds of each operation in the guest.
const ROUNDS: f64 = 15.0;
/// The longest text that the guest has a use for, in bytes.
const MOST_TEXT: usize = 1 << 16;
/// A guest that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// Counters that say nothing of exits.
const NO_CAUSES: [&str; 6] =
    ["exits", "irq_exits", "guest_mode", "preemption_reported", "preemption_other", "host_state_reload"];

/// Counters at a mark: KVM's, and userspace exits by reason.
type Counts = BTreeMap<String, u64>;

struct Machine {
    vcpu: Vcpu,
    second: Vcpu,
    /// Kept for its kernel port, and because the vCPU is its.
    _vm: Vm,
    _event: EventFd,
}

fn machine(system: &System) -> Result<Machine, String> {
    let text = |error: KvmError| format!("{error}: {}", error.source);
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY_BYTES }], Backing::TransparentHugePages)
        .map_err(|error| error.to_string())?;
    let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa)).map_err(|error| error.to_string());
    put(guest(), LOAD.into())?;
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(CodeSize::Bits32)) {
        put(&entry.to_le_bytes(), at)?;
    }
    // First touches are no part of any operation.
    ram.populate().map_err(|error| error.to_string())?;
    let mut vm = system.create_vm().map_err(text)?;
    vm.set_real_mode_pages(layout::KVM_TSS, layout::KVM_IDENTITY_MAP).map_err(text)?;
    vm.set_memory(ram).map_err(text)?;
    vm.create_irqchip().map_err(text)?;
    let event = EventFd::new(EFD_NONBLOCK).map_err(|error| error.to_string())?;
    vm.register_port_ioeventfd(&event, KERNEL_PORT).map_err(text)?;
    let vcpu = vm.create_vcpu(0).map_err(text)?;
    let second = vm.create_vcpu(1).map_err(text)?;
    let cpuid = system.supported_cpuid().map_err(text)?;
    for vcpu in [&vcpu, &second] {
        vcpu.set_cpuid(cpuid.as_slice()).map_err(text)?;
    }
    let entry = Entry::Multiboot { rip: LOAD.into(), info: 0 };
    vcpu.update_sregs(|sregs| entry.apply(sregs)).map_err(text)?;
    vcpu.set_regs(&entry.regs()).map_err(text)?;
    Ok(Machine { vcpu, second, _vm: vm, _event: event })
}

/// KVM's counters of all vCPUs together.
fn read_stats(readers: &[Reader]) -> Counts {
    let mut counts = Counts::new();
    for stat in readers.iter().filter_map(|reader| reader.read().ok()).flatten() {
        if let Some(value) = stat.values.first() {
            *counts.entry(stat.name).or_default() += value;
        }
    }
    counts
}

/// Runs the second vCPU until `done`. It makes no exits to user space but by what goes wrong, and then the operation that needs
/// it is not to be had.
fn run_second(vcpu: &mut Vcpu, done: &AtomicBool) {
    let mut running = vcpu.enter();
    while !done.load(Ordering::Acquire) && matches!(running.run(), Ok(Exit::Again | Exit::Interrupted)) {}
}

/// What the guest said, and what was counted of each operation.
fn run(machine: &mut Machine) -> Result<(String, Vec<Option<Counts>>), String> {
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

/// What lies between two marks, the exit of the second mark itself left out.
fn between(first: &Counts, second: &Counts) -> Counts {
    let less = |(name, value): (&String, &u64)| {
        let own = u64::from(["exits", "io_exits", "userspace pio_out"].contains(&name.as_str()));
        let moved = value.saturating_sub(first.get(name).copied().unwrap_or(0)).saturating_sub(own);
        (moved > 0).then(|| (name.clone(), moved))
    };
    second.iter().filter_map(less).collect()
}

/// Runs the first vCPU to the guest's end, and counts between its marks.
fn run_first(vcpu: &mut Vcpu, readers: &[Reader]) -> Result<(String, Vec<Option<Counts>>), String> {
    let mut text = Vec::new();
    let mut user = Counts::new();
    let mut counts = vec![None; OPERATIONS.len()];
    let mut begun: Option<(u8, Counts)> = None;
    let mut running = vcpu.enter();
    loop {
        let mut exit = running.run().map_err(|error| format!("{error}: {}", error.source))?;
        *user.entry(format!("userspace {}", ExitReason::of(&exit).name())).or_default() += 1;
        match &mut exit {
            Exit::Pio { port: UART_DATA, direction: Direction::Out, data, .. } => {
                text.extend(data.iter().take(MOST_TEXT.saturating_sub(text.len())));
            }
            Exit::Pio { port: UART_STATUS, direction: Direction::In, data, .. } => data.fill(READY),
            Exit::Pio { port: END_PORT, direction: Direction::Out, .. } => {
                return Ok((String::from_utf8_lossy(&text).into_owned(), counts));
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
            Exit::Interrupted => return Err("it takes longer than five minutes".into()),
            other => return Err(format!("KVM_RUN ended with {}", ExitReason::of(other).name())),
        }
    }
}

/// How many of an operation the guest makes in a round, by what it says itself.
fn count_of(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.split_whitespace().nth(1) == Some(name))?;
    u32::from_str_radix(line.split_whitespace().nth(2)?, 16).ok().map(f64::from)
}

fn exits_of(measured: &mut Measured, counts: &Counts, operations: f64) {
    // Counts of one operation's rounds are small.
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

/// Runs the guest under `system`'s KVM and says what each operation took; `column` has what is known of the host.
///
/// # Errors
/// Where KVM cannot run the guest, with the reason.
pub fn measure(system: &System, mut column: Column) -> Result<Column, String> {
    let ran = kick::guarded(PATIENCE, || run(&mut machine(system)?));
    let (text, counts) = ran.unwrap_or_else(|| Err("its thread died".into()))?;
    column.results = parse(&text).map_err(|error| error.to_string())?;
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
    fn a_marks_own_exit_is_left_out() {
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
