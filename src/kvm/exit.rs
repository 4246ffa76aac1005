//! What KVM_RUN came back with, as plain data (KVM API 5, "The kvm_run structure").
//!
//! kvm-ioctls hands port I/O over as bytes without size and count, which loses string instructions; they are read
//! from `kvm_run` here.

#![deny(clippy::wildcard_enum_match_arm)]

use kvm_bindings::{
    KVM_EXIT_DCR, KVM_EXIT_EPR, KVM_EXIT_OSI, KVM_EXIT_PAPR_HCALL, KVM_EXIT_S390_RESET, KVM_EXIT_S390_SIEIC,
    KVM_EXIT_S390_STSI, KVM_EXIT_S390_TSCH, KVM_EXIT_S390_UCONTROL, KVM_EXIT_WATCHDOG,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::slice;

/// Which way a port access goes, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads.
    In,
    /// The guest writes.
    Out,
}

/// Data of KVM_EXIT_INTERNAL_ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// KVM_INTERNAL_ERROR_*.
    pub suberror: u32,
    /// How many of `data` are valid.
    pub count: usize,
    /// Depends on the suberror: for a failed emulation flags, then the instruction's bytes.
    pub data: [u64; 16],
}

/// Why the guest stopped running.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The system call was interrupted (EINTR): a kick, or a signal.
    Interrupted,
    /// A vCPU that waited for its start-up message got it (EAGAIN).
    Again,
    /// Port I/O: `count` items of `size` bytes.
    Pio {
        /// The port.
        port: u16,
        /// Which way.
        direction: Direction,
        /// Bytes in an item: 1, 2 or 4.
        size: usize,
        /// `size × count` bytes, to be filled or taken.
        data: &'a mut [u8],
    },
    /// A read from guest physical memory that is no memory.
    MmioRead {
        /// The address.
        gpa: u64,
        /// 1 to 8 bytes to be filled.
        data: &'a mut [u8],
    },
    /// A write to guest physical memory that is no memory.
    MmioWrite {
        /// The address.
        gpa: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// RDMSR that the kernel left to us.
    MsrRead {
        /// ECX.
        index: u32,
        /// The value to give.
        data: &'a mut u64,
        /// Not 0: #GP instead.
        error: &'a mut u8,
    },
    /// WRMSR that the kernel left to us.
    MsrWrite {
        /// ECX.
        index: u32,
        /// EDX:EAX.
        data: u64,
        /// Not 0: #GP.
        error: &'a mut u8,
    },
    /// A hypercall that the kernel left to us.
    Hypercall {
        /// Its number.
        number: u64,
        /// The result to give.
        result: &'a mut u64,
    },
    /// HLT, where no APIC is in the kernel.
    Hlt,
    /// A shutdown of the processor: a triple fault.
    Shutdown,
    /// The hardware refused to enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
        /// The host processor.
        cpu: u32,
    },
    /// KVM gave up.
    InternalError(InternalError),
    /// The guest asked for something by an event (KVM_SYSTEM_EVENT_*).
    SystemEvent {
        /// Which.
        kind: u32,
    },
    /// An access that the memory slots do not allow.
    MemoryFault {
        /// KVM_MEMORY_EXIT_FLAG_*.
        flags: u64,
        /// The address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// A guest-debug event.
    Debug {
        /// Where.
        pc: u64,
    },
    /// An exception (not used by today's KVM).
    Exception,
    /// The interrupt window opened.
    IrqWindowOpen,
    /// An interrupt for the host (not used by today's KVM).
    Intr,
    /// The task priority changed.
    SetTpr,
    /// The task priority was accessed.
    TprAccess,
    /// A non-maskable interrupt.
    Nmi,
    /// An interrupt was acknowledged at a user-space I/O APIC.
    IoapicEoi(u8),
    /// Hyper-V emulation.
    Hyperv,
    /// An exit reason of another architecture.
    Foreign(u32),
    /// KVM_EXIT_UNKNOWN: hardware left for a reason that KVM does not know.
    Unknown,
    /// A reason that kvm-ioctls does not know; its number.
    Unsupported(u32),
}

/// An exit with the borrow of the vCPU replaced by pointers into its kvm_run, so that kvm_run can be looked at again.
enum Raw {
    Pio { port: u16, direction: Direction, data: *mut u8, bytes: usize },
    MmioRead { gpa: u64, data: *mut u8, bytes: usize },
    MmioWrite { gpa: u64, data: *const u8, bytes: usize },
    MsrRead { index: u32, data: *mut u64, error: *mut u8 },
    MsrWrite { index: u32, data: u64, error: *mut u8 },
    Hypercall { number: u64, result: *mut u64 },
    InternalError,
    Done(Exit<'static>),
}

/// Runs the vCPU until it exits, and says why.
pub(super) fn run(fd: &mut VcpuFd) -> Result<Exit<'_>, kvm_ioctls::Error> {
    let raw = match fd.run() {
        Ok(exit) => classify(exit),
        Err(error) if error.errno() == libc::EINTR => Raw::Done(Exit::Interrupted),
        Err(error) if error.errno() == libc::EAGAIN => Raw::Done(Exit::Again),
        Err(error) => return Err(error),
    };
    let size = match raw {
        // SAFETY: KVM_RUN returned KVM_EXIT_IO, so `io` is the valid member of the union.
        Raw::Pio { .. } => usize::from(unsafe { fd.get_kvm_run().__bindgen_anon_1.io }.size).max(1),
        Raw::InternalError => return Ok(Exit::InternalError(internal_error(fd))),
        Raw::MmioRead { .. }
        | Raw::MmioWrite { .. }
        | Raw::MsrRead { .. }
        | Raw::MsrWrite { .. }
        | Raw::Hypercall { .. }
        | Raw::Done(_) => 0,
    };
    // SAFETY: every pointer below was made from a reference into the vCPU's mapping of kvm_run that kvm-ioctls handed
    // out for this exit. Those references are gone; the mapping lives as long as `fd`; only KVM_RUN changes it, which
    // needs `fd`, which the result borrows mutably. No two pointers of one exit overlap.
    Ok(unsafe {
        match raw {
            Raw::Pio { port, direction, data, bytes } => {
                Exit::Pio { port, direction, size, data: slice::from_raw_parts_mut(data, bytes) }
            }
            Raw::MmioRead { gpa, data, bytes } => Exit::MmioRead { gpa, data: slice::from_raw_parts_mut(data, bytes) },
            Raw::MmioWrite { gpa, data, bytes } => Exit::MmioWrite { gpa, data: slice::from_raw_parts(data, bytes) },
            Raw::MsrRead { index, data, error } => Exit::MsrRead { index, data: &mut *data, error: &mut *error },
            Raw::MsrWrite { index, data, error } => Exit::MsrWrite { index, data, error: &mut *error },
            Raw::Hypercall { number, result } => Exit::Hypercall { number, result: &mut *result },
            Raw::InternalError => Exit::Unknown,
            Raw::Done(exit) => exit,
        }
    })
}

/// Names every variant: a new one in kvm-ioctls breaks the build here.
fn classify(exit: VcpuExit<'_>) -> Raw {
    Raw::Done(match exit {
        VcpuExit::IoIn(port, data) => {
            return Raw::Pio { port, direction: Direction::In, bytes: data.len(), data: data.as_mut_ptr() };
        }
        VcpuExit::IoOut(port, data) => {
            return Raw::Pio { port, direction: Direction::Out, bytes: data.len(), data: data.as_ptr().cast_mut() };
        }
        VcpuExit::MmioRead(gpa, data) => {
            return Raw::MmioRead { gpa, bytes: data.len(), data: data.as_mut_ptr() };
        }
        VcpuExit::MmioWrite(gpa, data) => return Raw::MmioWrite { gpa, bytes: data.len(), data: data.as_ptr() },
        VcpuExit::X86Rdmsr(msr) => return Raw::MsrRead { index: msr.index, data: msr.data, error: msr.error },
        VcpuExit::X86Wrmsr(msr) => return Raw::MsrWrite { index: msr.index, data: msr.data, error: msr.error },
        VcpuExit::Hypercall(call) => return Raw::Hypercall { number: call.nr, result: call.ret },
        VcpuExit::InternalError => return Raw::InternalError,
        VcpuExit::Unknown => Exit::Unknown,
        VcpuExit::Exception => Exit::Exception,
        VcpuExit::Debug(debug) => Exit::Debug { pc: debug.pc },
        VcpuExit::Hlt => Exit::Hlt,
        VcpuExit::IrqWindowOpen => Exit::IrqWindowOpen,
        VcpuExit::Shutdown => Exit::Shutdown,
        VcpuExit::FailEntry(reason, cpu) => Exit::FailEntry { reason, cpu },
        VcpuExit::Intr => Exit::Intr,
        VcpuExit::SetTpr => Exit::SetTpr,
        VcpuExit::TprAccess => Exit::TprAccess,
        VcpuExit::Nmi => Exit::Nmi,
        VcpuExit::SystemEvent(kind, _) => Exit::SystemEvent { kind },
        VcpuExit::IoapicEoi(vector) => Exit::IoapicEoi(vector),
        VcpuExit::Hyperv => Exit::Hyperv,
        VcpuExit::MemoryFault { flags, gpa, size } => Exit::MemoryFault { flags, gpa, size },
        VcpuExit::S390Sieic => Exit::Foreign(KVM_EXIT_S390_SIEIC),
        VcpuExit::S390Reset => Exit::Foreign(KVM_EXIT_S390_RESET),
        VcpuExit::S390Ucontrol => Exit::Foreign(KVM_EXIT_S390_UCONTROL),
        VcpuExit::S390Tsch => Exit::Foreign(KVM_EXIT_S390_TSCH),
        VcpuExit::S390Stsi => Exit::Foreign(KVM_EXIT_S390_STSI),
        VcpuExit::Dcr => Exit::Foreign(KVM_EXIT_DCR),
        VcpuExit::Osi => Exit::Foreign(KVM_EXIT_OSI),
        VcpuExit::PaprHcall => Exit::Foreign(KVM_EXIT_PAPR_HCALL),
        VcpuExit::Watchdog => Exit::Foreign(KVM_EXIT_WATCHDOG),
        VcpuExit::Epr => Exit::Foreign(KVM_EXIT_EPR),
        VcpuExit::Unsupported(number) => Exit::Unsupported(number),
    })
}

fn internal_error(fd: &mut VcpuFd) -> InternalError {
    // SAFETY: KVM_RUN returned KVM_EXIT_INTERNAL_ERROR, so `internal` is the valid member of the union.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX).min(internal.data.len());
    InternalError { suberror: internal.suberror, count, data: internal.data }
}
