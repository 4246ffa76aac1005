//! Userspace exits: what KVM_RUN returned with, as plain data (KVM API 5, "The kvm_run structure").
//!
//! kvm-ioctls gives the bytes of port I/O without the size of an item, which string instructions need; it is read from
//! `kvm_run` here.

#![deny(clippy::wildcard_enum_match_arm)]

use kvm_bindings::{
    KVM_EXIT_DCR, KVM_EXIT_EPR, KVM_EXIT_OSI, KVM_EXIT_PAPR_HCALL, KVM_EXIT_S390_RESET, KVM_EXIT_S390_SIEIC,
    KVM_EXIT_S390_STSI, KVM_EXIT_S390_TSCH, KVM_EXIT_S390_UCONTROL, KVM_EXIT_WATCHDOG,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::slice;

/// The direction of a port access, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads (IN, INS).
    In,
    /// The guest writes (OUT, OUTS).
    Out,
}

/// What KVM reports with KVM_EXIT_INTERNAL_ERROR (`kvm_run.internal`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// The kind of error: KVM_INTERNAL_ERROR_*.
    pub suberror: u32,
    /// The number of valid elements of `data`.
    pub count: usize,
    /// Details that depend on `suberror`: for a failed emulation flags, then the bytes of the instruction.
    pub data: [u64; 16],
}

/// A userspace exit: why KVM_RUN returned.
#[derive(Debug)]
pub enum Exit<'a> {
    /// KVM_RUN returned EINTR: a kick or another signal interrupted it.
    Interrupted,
    /// KVM_RUN returned EAGAIN: an AP that waited for its start-up IPI received it.
    Again,
    /// Port I/O: `count` items of `size` bytes.
    Pio {
        /// The number of the port.
        port: u16,
        /// The direction, which says whether `data` is read or written.
        direction: Direction,
        /// The size of an item in bytes: 1, 2 or 4.
        size: usize,
        /// `size × count` bytes: those that the guest writes, or room for those that it reads.
        data: &'a mut [u8],
    },
    /// A read from a gpa without a memslot.
    MmioRead {
        /// The address, a gpa.
        gpa: u64,
        /// Room for the 1 to 8 bytes that the guest reads.
        data: &'a mut [u8],
    },
    /// A write to a gpa without a memslot, or to a read-only one.
    MmioWrite {
        /// The address, a gpa.
        gpa: u64,
        /// The 1 to 8 bytes that the guest writes.
        data: &'a [u8],
    },
    /// RDMSR of an MSR that KVM does not know (KVM_CAP_X86_USER_SPACE_MSR).
    MsrRead {
        /// The number of the MSR (ECX).
        index: u32,
        /// Room for the value that the guest reads.
        data: &'a mut u64,
        /// Set to another value than 0, it makes KVM inject #GP.
        error: &'a mut u8,
    },
    /// WRMSR of an MSR that KVM does not know (KVM_CAP_X86_USER_SPACE_MSR).
    MsrWrite {
        /// The number of the MSR (ECX).
        index: u32,
        /// The value that the guest writes (EDX:EAX).
        data: u64,
        /// Set to another value than 0, it makes KVM inject #GP.
        error: &'a mut u8,
    },
    /// A hypercall that KVM passes on.
    Hypercall {
        /// The number of the hypercall (RAX).
        number: u64,
        /// Room for the result (RAX).
        result: &'a mut u64,
    },
    /// HLT, where the local APIC is not in the kernel.
    Hlt,
    /// The processor is in shutdown state, after a triple fault.
    Shutdown,
    /// The hardware refused the VM entry.
    FailEntry {
        /// The hardware's reason: the VMX exit reason, or the SVM EXITCODE.
        reason: u64,
        /// The number of the host processor.
        cpu: u32,
    },
    /// KVM cannot go on with the guest (KVM_EXIT_INTERNAL_ERROR).
    InternalError(InternalError),
    /// The guest asked for a system event, such as a reset, by a paravirtual interface.
    SystemEvent {
        /// The type of the event: KVM_SYSTEM_EVENT_*.
        kind: u32,
    },
    /// An access that KVM cannot resolve by the memslots (KVM_EXIT_MEMORY_FAULT).
    MemoryFault {
        /// The kind of access: KVM_MEMORY_EXIT_FLAG_*.
        flags: u64,
        /// The first gpa of the range.
        gpa: u64,
        /// The size of the range in bytes.
        size: u64,
    },
    /// A debug exception that KVM_SET_GUEST_DEBUG asked for.
    Debug {
        /// The linear address of the instruction.
        pc: u64,
    },
    /// KVM_EXIT_EXCEPTION, which KVM on x86 does not use.
    Exception,
    /// The guest can take an interrupt again (KVM_EXIT_IRQ_WINDOW_OPEN).
    IrqWindowOpen,
    /// KVM_EXIT_INTR: a signal is pending.
    Intr,
    /// The guest lowered its task priority (KVM_EXIT_SET_TPR), where the local APIC is not in the kernel.
    SetTpr,
    /// The guest accessed the task priority register (KVM_EXIT_TPR_ACCESS).
    TprAccess,
    /// KVM_EXIT_NMI, which KVM on x86 does not use.
    Nmi,
    /// The guest signalled the EOI of this vector to an I/O APIC in user space (KVM_EXIT_IOAPIC_EOI).
    IoapicEoi(u8),
    /// An event of the Hyper-V emulation (KVM_EXIT_HYPERV).
    Hyperv,
    /// An exit reason of another architecture: its KVM_EXIT_* number.
    Foreign(u32),
    /// KVM_EXIT_UNKNOWN: the hardware's exit reason is unknown to KVM.
    Unknown,
    /// An exit reason that kvm-ioctls does not know: its KVM_EXIT_* number.
    Unsupported(u32),
}

/// An exit with pointers into kvm_run instead of borrows of the vCPU, so that kvm_run can be read once more.
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

/// Runs the vCPU until KVM_RUN returns, and decodes the exit.
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

/// Decodes an exit of kvm-ioctls. The match has no wildcard, so that a new variant in kvm-ioctls breaks the build here.
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
