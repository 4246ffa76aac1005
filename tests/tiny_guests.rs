//! Tiny guests that must make an exact number of userspace exits of each reason. They run on the host where its KVM can run
//! them, and always in the lab.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod cluster_guests;
mod guests;
mod harness;

use harness::{Outcome, Test};
use hwvmm::exit::handler::BusKind;
use hwvmm::exit::{EndReason, ExitReason, Handler};
use hwvmm::kvm::{System, kick};
use hwvmm::measure::tracer::{Tracer, VmCauseRecord, VmDetail, VmRecord};
use hwvmm::measure::user_profile::UserRecord;
use hwvmm::measure::{Counters, FlightRecorders, Measured, NoProfile};
use hwvmm::memory::{Backing, GuestRam};
use hwvmm::sandbox::{Sandbox, ThreadRole};
use hwvmm::vcpu::{Confinement, Control, Measure, Records, Stop, Threads};
use hwvmm_arch::exit_code::{AccessKind, Class};
use hwvmm_arch::layout::GpaRange;
use hwvmm_arch::regs::Entry;
use hwvmm_arch::{gdt, layout, page_table};
use hwvmm_devices::RegisterPage;
use hwvmm_devices::bus::{Action, BusBuilder, BusDevice};
use hwvmm_devices::legacy::DebugExit;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// The memory of each guest: 1 MiB.
const RAM: GpaRange = GpaRange { start: 0, bytes: 0x10_0000 };
const CODE: u64 = 0x1000;
const STRING: u64 = 0x3000;

/// A device that returns what was written last. A read of another width than the last write, and each item of a string,
/// returns the number of items so far, in every byte.
#[derive(Default)]
struct Latch {
    last: Mutex<Vec<u8>>,
    items: Mutex<Vec<Vec<u8>>>,
    reads: Mutex<u8>,
}

impl BusDevice for Latch {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let last = self.last.lock().unwrap();
        if last.len() == data.len() {
            data.copy_from_slice(&last);
        } else {
            let mut reads = self.reads.lock().unwrap();
            *reads += 1;
            data.fill(0x30 + *reads);
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        *self.last.lock().unwrap() = data.to_vec();
        self.items.lock().unwrap().push(data.to_vec());
        Action::None
    }
}

struct Machine {
    vm: hwvmm::kvm::Vm,
    handler: Handler,
    latch: Arc<Latch>,
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Real,
    Protected,
    Long,
}

impl Mode {
    fn entry(self) -> Entry {
        match self {
            Self::Real => Entry::Real { rip: CODE },
            Self::Protected => Entry::Multiboot { rip: CODE, info: 0 },
            Self::Long => Entry::Linux64 { rip: CODE },
        }
    }
}

fn flight_recorders(vcpus: usize) -> FlightRecorders {
    FlightRecorders::new(vcpus).expect("memory")
}

fn system() -> Result<System, String> {
    System::open(Path::new("/dev/kvm")).map_err(|error| error.to_string())
}

fn machine(system: &System, code: &[u8], mode: Mode, irqchip: bool) -> Machine {
    let ram = GuestRam::new(&[RAM], Backing::SmallPages).expect("1 MiB");
    let put = |bytes: &[u8], gpa| ram.get().write_slice(bytes, GuestAddress(gpa)).expect("in memory");
    put(code, CODE);
    put(b"hello", STRING);
    for (at, entry) in (layout::BOOT_GDT..).step_by(8).zip(gdt::boot_gdt(mode.entry().code_size())) {
        put(&entry.to_le_bytes(), at);
    }
    for entry in page_table::identity_4gib() {
        put(&entry.value.to_le_bytes(), entry.gpa);
    }
    let mut vm = system.create_vm().expect("a machine");
    vm.set_real_mode_pages(layout::KVM_TSS, layout::KVM_IDENTITY_MAP).expect("pages");
    vm.set_memory(ram).expect("memory");
    if irqchip {
        vm.create_irqchip().expect("irqchip");
    }
    let latch = Arc::new(Latch::default());
    let (mut pio, mut mmio) = (BusBuilder::default(), BusBuilder::default());
    pio.insert(0x10, 4, "latch", Arc::clone(&latch) as Arc<dyn BusDevice>).unwrap();
    pio.insert(0xf4, 4, "debug exit", Arc::new(DebugExit)).unwrap();
    mmio.insert(0xd000_0000, 8, "latch", Arc::clone(&latch) as Arc<dyn BusDevice>).unwrap();
    Machine { vm, handler: Handler { pio: pio.freeze(), mmio: mmio.freeze(), ring: None }, latch }
}

fn vcpu(system: &System, machine: &Machine, mode: Mode) -> hwvmm::kvm::Vcpu {
    let vcpu = machine.vm.create_vcpu(0).expect("a vCPU");
    let mut cpuid = system.supported_cpuid().unwrap().as_slice().to_vec();
    // KVM_FEATURE_PV_TLB_FLUSH, with which no exits are followed.
    cpuid.iter_mut().filter(|leaf| leaf.function == 0x4000_0001).for_each(|leaf| leaf.eax &= !(1 << 9));
    vcpu.set_cpuid(&cpuid).expect("cpuid");
    vcpu.update_sregs(|sregs| mode.entry().apply(sregs)).expect("sregs");
    vcpu.set_regs(&mode.entry().regs()).expect("regs");
    vcpu
}

struct Ran {
    end: EndReason,
    counters: Counters,
    latch: Arc<Latch>,
    last: Option<hwvmm::measure::ExitRecord>,
}

/// Kicks the thread that made it when a guest takes too long: some KVMs loop where hardware would exit.
struct Guard {
    /// Dropped with the value, which ends the watching thread.
    _done: std::sync::mpsc::Sender<()>,
}

impl Guard {
    fn start() -> Self {
        kick::install().expect("the kick's handler");
        let target = kick::KickTarget::current();
        let (sender, done) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            while done.recv_timeout(Duration::from_secs(5)) == Err(RecvTimeoutError::Timeout) {
                target.kick();
            }
        });
        Self { _done: sender }
    }
}

/// Runs a guest to its end. Fails where this host's KVM cannot run it.
fn run_with(code: &[u8], mode: Mode, set_up: impl FnOnce(&Machine) -> Result<(), String>) -> Result<Ran, String> {
    let system = system()?;
    let machine = machine(&system, code, mode, false);
    set_up(&machine)?;
    run_machine(&system, machine, mode)
}

fn run_machine(system: &System, machine: Machine, mode: Mode) -> Result<Ran, String> {
    let mut vcpu = vcpu(system, &machine, mode);
    let counters = Counters::new(&machine.handler.pio, &machine.handler.mmio);
    let mut records = Records {
        counters,
        flight_recorder: flight_recorders(1).of_vcpu(0).expect("a recorder"),
        clusters: None,
        profiler: NoProfile,
    };
    let guard = Guard::start();
    let stop = hwvmm::vcpu::run(&mut vcpu.enter(), &machine.handler, &mut records, |_, _| true).expect("KVM_RUN");
    drop(guard);
    let Stop::End(end) = stop else { return Err("this host's KVM never comes back from it".into()) };
    let last = records.flight_recorder.iter().last();
    match end {
        EndReason::Kvm(why) => Err(format!("this host's KVM: {why}")),
        end => Ok(Ran { end, counters: records.counters, latch: machine.latch, last }),
    }
}

fn run(code: &[u8], mode: Mode) -> Result<Ran, String> {
    run_with(code, mode, |_| Ok(()))
}

/// Asserts the count of every exit reason; those that are not listed must be 0.
fn assert_exits(ran: &Ran, expected: &[(ExitReason, u64)]) {
    for reason in ExitReason::ALL {
        let wanted = expected.iter().find(|(r, _)| r == reason).map_or(0, |(_, count)| *count);
        assert_eq!(ran.counters.reason(*reason), wanted, "{} (all: {expected:?})", reason.name());
    }
    assert_eq!(ran.counters.total(), expected.iter().map(|(_, count)| count).sum::<u64>());
}

fn outcome(result: Result<(), String>) -> Outcome {
    result.map_or_else(Outcome::Skipped, |()| Outcome::Passed)
}

fn pio(code: &[u8], mode: Mode) -> Outcome {
    outcome(run(code, mode).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3), "all values read back");
        assert_exits(&ran, &[(ExitReason::PioOut, 4), (ExitReason::PioIn, 3)]);
        let slots = ran.counters.slots(BusKind::Pio);
        assert_eq!((slots[0].reads, slots[0].writes, slots[1].writes), (3, 3, 1));
        let widths: Vec<usize> = ran.latch.items.lock().unwrap().iter().map(Vec::len).collect();
        assert_eq!(widths, [1, 2, 4]);
        let last = ran.last.expect("remembered");
        assert_eq!((last.detail.address, last.detail.data, last.detail.size), (0xf4, 1, 1));
    }))
}

/// KVM may split a string instruction into several exits; no item may be lost or doubled.
fn string(code: &[u8], mode: Mode) -> Outcome {
    outcome(run(code, mode).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3), "the fourth word read is 0x3434");
        let items: Vec<u8> = ran.latch.items.lock().unwrap().concat();
        assert_eq!(items, b"hello");
        let (out, read) = (ran.counters.reason(ExitReason::PioOut), ran.counters.reason(ExitReason::PioIn));
        assert!((2..=6).contains(&out) && (1..=4).contains(&read), "{out} out, {read} in");
        assert_eq!(ran.counters.total(), out + read);
    }))
}

fn mmio(code: &[u8], mode: Mode, accesses: u64) -> Outcome {
    outcome(run(code, mode).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3), "all values read back");
        let expected = [(ExitReason::MmioWrite, accesses), (ExitReason::MmioRead, accesses), (ExitReason::PioOut, 1)];
        assert_exits(&ran, &expected);
        let slot = ran.counters.slots(BusKind::Mmio)[0];
        assert_eq!((slot.reads, slot.writes), (accesses, accesses));
    }))
}

/// Reads of a read-only register page make no exit. A write makes one, and does not change the page.
fn register_page() -> Outcome {
    let page = RegisterPage::new().expect("a page");
    page.write_register(4, 0x1122_3344);
    let shown = page.clone();
    let show =
        move |machine: &Machine| machine.vm.map_register_page(0xd200_0000, &shown).map_err(|error| error.to_string());
    outcome(run_with(guests::register_page_long(), Mode::Long, show).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3), "every read gives what is shown");
        assert_exits(&ran, &[(ExitReason::MmioWrite, 1), (ExitReason::PioOut, 1)]);
        let unmapped: Vec<_> = ran.counters.unmapped().map(|(bus, gpa, n)| (bus, gpa, n.reads, n.writes)).collect();
        assert_eq!(unmapped, [(BusKind::Mmio, 0xd200_0004, 0, 1)]);
    }))
}

fn unmapped() -> Outcome {
    outcome(run(guests::unmapped_long(), Mode::Long).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3), "unmapped reads return all ones");
        let one = 1;
        assert_exits(
            &ran,
            &[
                (ExitReason::PioIn, one),
                (ExitReason::PioOut, 2),
                (ExitReason::MmioRead, one),
                (ExitReason::MmioWrite, one),
            ],
        );
        let unmapped: Vec<_> = ran.counters.unmapped().map(|(bus, gpa, n)| (bus, gpa, n.reads, n.writes)).collect();
        assert_eq!(unmapped, [(BusKind::Pio, 0x99, 1, 1), (BusKind::Mmio, 0xd100_0000, 1, 1)]);
    }))
}

fn cpuid() -> Outcome {
    outcome(run(guests::cpuid_long(), Mode::Long).map(|ran| {
        assert_eq!(ran.end, EndReason::DebugExit(3));
        assert_exits(&ran, &[(ExitReason::PioOut, 1)]);
    }))
}

/// Each interrupt is delivered once, however long its handler takes (see scripts/lib/lab-qemu.sh for an emulator that fails).
fn interrupts() -> Outcome {
    let body = || {
        let system = system()?;
        let machine = machine(&system, guests::interrupts_long(), Mode::Long, true);
        let ran = run_machine(&system, machine, Mode::Long)?;
        assert_eq!(ran.end, EndReason::DebugExit(3), "3: each interrupt once; 5: one of them twice");
        Ok(())
    };
    outcome(body())
}

fn hlt(code: &[u8], mode: Mode) -> Outcome {
    outcome(run(code, mode).map(|ran| {
        assert_eq!(ran.end, EndReason::Halted);
        assert_exits(&ran, &[(ExitReason::Hlt, 1)]);
    }))
}

fn triple_fault(code: &[u8], mode: Mode) -> Outcome {
    outcome(run(code, mode).map(|ran| {
        assert_eq!(ran.end, EndReason::TripleFault);
        assert_exits(&ran, &[(ExitReason::Shutdown, 1)]);
    }))
}

/// An unknown MSR raises #GP in the kernel. With KVM_CAP_X86_USER_SPACE_MSR it makes one exit first, which injects the #GP.
fn msr(code: &'static [u8], reason: ExitReason) -> Outcome {
    let body = || -> Result<(), String> {
        let plain = run(code, Mode::Long)?;
        assert_eq!(plain.end, EndReason::TripleFault);
        assert_exits(&plain, &[(ExitReason::Shutdown, 1)]);
        let trapped =
            run_with(code, Mode::Long, |machine| machine.vm.trap_unknown_msrs().map_err(|error| error.to_string()))?;
        assert_eq!(trapped.end, EndReason::TripleFault);
        assert_exits(&trapped, &[(reason, 1), (ExitReason::Shutdown, 1)]);
        assert_eq!(trapped.counters.msrs().next().map(|(index, n)| (index, n.total())), Some((0x12345, 1)));
        Ok(())
    };
    outcome(body())
}

fn unconfined() -> Confinement {
    Confinement { sandbox: Arc::new(Sandbox::off()), role: ThreadRole::Vcpu }
}

/// Runs a guest on a vCPU thread. Returns true if hwvmm finds within 3 s that no interrupt can wake it from HLT, and the number of
/// kicks.
fn is_found_halted(code: &[u8]) -> Result<(bool, u64), String> {
    let system = system()?;
    let machine = machine(&system, code, Mode::Long, true);
    let vcpu = vcpu(&system, &machine, Mode::Long);
    let control = Arc::new(Control::new().expect("control"));
    let handler = Arc::new(machine.handler);
    let threads =
        Threads::start(vec![vcpu], &handler, &control, &Measure::Nothing, &flight_recorders(1), &unconfined(), None)
            .expect("a thread");
    let deadline = Instant::now() + Duration::from_secs(3);
    let mut halted = false;
    while !halted && control.ended().is_none() && Instant::now() < deadline {
        threads.request_report();
        std::thread::sleep(Duration::from_millis(20));
        halted = threads.all_halted();
    }
    let finished = threads.stop();
    if let Some(ended) = control.ended() {
        return Err(format!("this host's KVM: {}", ended.reason));
    }
    let counts = &finished[0].counts;
    assert_eq!(
        counts.total(),
        counts.by_reason.get(&ExitReason::Interrupted).copied().unwrap_or(0),
        "kicks and nothing else"
    );
    Ok((halted, counts.total()))
}

/// Runs `profiled_long` with a full profile, which has VM exits where this host allows tracing.
fn profiled() -> Result<(Box<UserRecord>, Result<VmRecord, String>), String> {
    let system = system()?;
    let machine = machine(&system, guests::profiled_long(), Mode::Long, false);
    let vcpu = vcpu(&system, &machine, Mode::Long);
    let control = Arc::new(Control::new().expect("control"));
    let handler = Arc::new(machine.handler);
    let mut tracer = Tracer::new(vec![RAM], 1, 0).map_err(|error| error.to_string());
    if let Ok(tracer) = &mut tracer {
        tracer.start(&Arc::new(Sandbox::off())).expect("a thread");
    }
    let handle = tracer.as_ref().ok().map(Tracer::handle);
    let measure = Measure::Profile { start: Instant::now(), tracer: handle };
    let threads = Threads::start(vec![vcpu], &handler, &control, &measure, &flight_recorders(1), &unconfined(), None)
        .expect("a thread");
    let deadline = Instant::now() + Duration::from_secs(10);
    while control.ended().is_none() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let finished = threads.stop().remove(0);
    match control.ended().map(|end| end.reason) {
        Some(EndReason::DebugExit(3)) => {}
        other => return Err(format!("this host's KVM: {other:?}")),
    }
    let traced = tracer.and_then(|tracer| {
        let traced = tracer.finish();
        traced.vcpus.into_iter().next().flatten().ok_or_else(|| traced.missing.join("; "))
    });
    let Measured::Profile(profile) = finished.measured else { return Err("no profile was made".into()) };
    assert_eq!(finished.counts.total(), profile.causes.iter().map(|one| one.outside.count).sum::<u64>());
    Ok((profile, traced))
}

fn userspace_causes() -> Outcome {
    outcome(profiled().map(|(profile, _)| {
        let mut causes: Vec<_> = profile
            .causes
            .iter()
            .map(|one| (one.cause.reason, one.cause.address, one.cause.size, one.cause.rip, one.outside.count))
            .collect();
        causes.sort();
        // A KVM that emulates instructions reports the RIP behind the instruction: two bytes further here.
        let hardware = std::env::var_os("HWVMM_REQUIRE_KVM").is_some();
        let behind = if !hardware && causes.iter().any(|cause| cause.3 == Some(CODE + guests::PROFILED_OUT + 2)) {
            2
        } else {
            0
        };
        let at = |offset| Some(CODE + offset + behind);
        let expected = [
            (ExitReason::PioOut, 0x10, 1, at(guests::PROFILED_OUT), 50),
            (ExitReason::PioOut, 0xf4, 1, at(guests::PROFILED_END), 1),
        ];
        assert_eq!(causes, expected);
        assert!(profile.causes.iter().all(|one| one.cause.cpl.is_none_or(|cpl| cpl == 0)));
    }))
}

fn vm_causes() -> Outcome {
    outcome(profiled().and_then(|(_, traced)| {
        let traced = traced?;
        assert_eq!(traced.lost, 0);
        let class_of = |one: &VmCauseRecord| one.cause.isa.class(one.cause.code);
        let place = |class, offset| {
            let here = |one: &&VmCauseRecord| class_of(one) == class && one.cause.rip == CODE + offset;
            traced.causes.iter().filter(here).map(|one| (one.cause.detail, one.outside.count)).collect()
        };
        let cpuids: Vec<_> = place(Class::Cpuid, guests::PROFILED_CPUID);
        assert_eq!(cpuids, [(VmDetail::Leaf(0), 50)]);
        let outs: Vec<_> = place(Class::Pio, guests::PROFILED_OUT);
        assert_eq!(outs, [(VmDetail::Port { port: 0x10, size: 1, kind: AccessKind::Write }, 50)]);
        let ends: Vec<_> = place(Class::Pio, guests::PROFILED_END);
        assert_eq!(ends, [(VmDetail::Port { port: 0xf4, size: 1, kind: AccessKind::Write }, 1)]);
        // There may also be exits for host interrupts and for page faults (nested, or of shadow paging).
        let known = [Class::Cpuid, Class::Pio, Class::Interrupt, Class::NestedPageFault, Class::Exception];
        assert!(traced.causes.iter().all(|one| known.contains(&class_of(one))));
        let exact = |class| -> u64 {
            traced.causes.iter().filter(|one| class_of(one) == class).map(|one| one.outside.count).sum()
        };
        assert_eq!((exact(Class::Cpuid), exact(Class::Pio)), (50, 51));
        Ok(())
    }))
}

const TESTS: &[Test] = &[
    ("userspace_exits_are_attributed_to_their_instructions", userspace_causes),
    ("vm_exits_are_attributed_to_their_instructions", vm_causes),
    ("pio_in_real_mode", || pio(guests::pio_real(), Mode::Real)),
    ("pio_in_protected_mode", || pio(guests::pio_protected(), Mode::Protected)),
    ("pio_in_long_mode", || pio(guests::pio_long(), Mode::Long)),
    ("string_pio_in_real_mode", || string(guests::string_real(), Mode::Real)),
    ("string_pio_in_long_mode", || string(guests::string_long(), Mode::Long)),
    ("mmio_in_protected_mode", || mmio(guests::mmio_protected(), Mode::Protected, 1)),
    ("mmio_in_long_mode", || mmio(guests::mmio_long(), Mode::Long, 4)),
    ("unmapped_accesses_are_counted_by_address", unmapped),
    ("reads_of_a_register_page_make_no_exit", register_page),
    ("cpuid_does_not_reach_user_space", cpuid),
    ("interrupts_are_delivered_once", interrupts),
    ("unknown_msr_read", || msr(guests::msr_read_long(), ExitReason::MsrRead)),
    ("unknown_msr_write", || msr(guests::msr_write_long(), ExitReason::MsrWrite)),
    ("hlt_in_real_mode", || hlt(guests::hlt_real(), Mode::Real)),
    ("hlt_in_protected_mode", || hlt(guests::hlt_protected(), Mode::Protected)),
    ("hlt_in_long_mode", || hlt(guests::hlt_long(), Mode::Long)),
    ("triple_fault_in_real_mode", || triple_fault(guests::triple_fault_real(), Mode::Real)),
    ("triple_fault_in_protected_mode", || triple_fault(guests::triple_fault_protected(), Mode::Protected)),
    ("triple_fault_in_long_mode", || triple_fault(guests::triple_fault_long(), Mode::Long)),
    ("a_loop_of_port_io_is_followed", cluster_guests::a_loop),
    ("accesses_that_are_alone_are_done_once", cluster_guests::accesses_alone),
    ("a_poll_loop_is_followed", cluster_guests::a_poll_loop),
    ("self_modifying_code_is_followed", cluster_guests::self_modifying_code),
    ("a_fault_between_followed_accesses", cluster_guests::a_fault_in_the_middle),
    ("locked_instructions_between_followed_accesses", cluster_guests::locked_instructions),
    ("a_site_without_gain_is_left_until_there_is_one", cluster_guests::a_site_that_is_left),
    ("a_site_is_followed_by_its_time", cluster_guests::a_site_that_may_cost_less),
    ("accesses_in_the_shadow_of_sti", cluster_guests::the_shadow_of_sti),
    ("a_guest_that_no_interrupt_can_wake_is_detected", || {
        outcome(is_found_halted(guests::halt_for_good()).map(|(halted, _)| assert!(halted)))
    }),
    ("a_spinning_guest_is_not_halted_and_can_be_stopped", || {
        outcome(is_found_halted(guests::spin_long()).map(|(halted, kicks)| assert!(!halted && kicks > 10)))
    }),
];

fn main() -> ExitCode {
    harness::run("tiny guests", TESTS)
}
