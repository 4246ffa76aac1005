//! What the machine's process tells its parent.

use crate::console::{LineState, UnreadInput};
use crate::exit::RunEnd;
use crate::kvm::stats::Stat;
use crate::measure::record::{DeviceRange, VcpuRecord, VirtioQueue};
use crate::measure::tracer::VmRecord;
use crate::measure::{MemoryUse, MenuEntry, RunRecord};
use crate::snapshot::WorkingSet;
use hwvmm_arch::boot::BootMethod;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// One message. A record is sent as many, the most important first, so that a process that is killed on the way leaves something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message {
    /// Something that takes long begins: what, for the user.
    Progress(String),
    /// The kernel is that of an entry of a boot loader's menu.
    Entry(MenuEntry),
    /// The machine could not be made, or not be run: the error with its causes.
    Failed(String),
    /// The same, and it is the kernel's fault.
    Unbootable(String),
    /// The guest is about to run.
    Started {
        boot: BootMethod,
        /// CPU time of both processes so far, in nanoseconds.
        startup_cpu_ns: u64,
        /// On CLOCK_MONOTONIC, in nanoseconds.
        started_at_ns: u64,
    },
    /// The pages that the guest has used, for later runs from the snapshot.
    WorkingSet(WorkingSet),
    /// The run has ended.
    Ended(RunEnd),
    /// Input that the guest has not read.
    Unread(UnreadInput),
    /// What is in the record once.
    Totals(Box<Totals>),
    /// The record of the next vCPU, in vCPU order.
    Vcpu(Box<VcpuRecord>),
    /// There is a trace of VM exits.
    Trace { mmu: BTreeMap<String, u64>, missing: Vec<String> },
    /// The VM exits of the next vCPU, in vCPU order.
    VcpuTrace(Option<Box<VmRecord>>),
    /// The record is complete: where the guest's output has left the terminal.
    Complete(LineState),
}

/// The parts of a [`RunRecord`] that are there once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) version: u32,
    pub(super) end: RunEnd,
    pub(super) ran_ns: u64,
    pub(super) devices: Vec<DeviceRange>,
    pub(super) coalesced_writes: u64,
    pub(super) vm_stats: Option<Vec<Stat>>,
    pub(super) virtio: Vec<VirtioQueue>,
    pub(super) memory: Option<MemoryUse>,
    pub(super) missing: Vec<String>,
}

/// Takes a record apart into messages, in the order in which they are to be sent; [`Message::Complete`] is not among them.
pub(super) fn of_record(record: RunRecord) -> impl Iterator<Item = Message> {
    let RunRecord { version, end, ran_ns, devices, coalesced_writes, vm_stats, virtio, memory, missing, .. } = record;
    let totals = Totals { version, end, ran_ns, devices, coalesced_writes, vm_stats, virtio, memory, missing };
    let vcpus = record.vcpus.into_iter().map(|vcpu| Message::Vcpu(Box::new(vcpu)));
    let trace = record.trace.into_iter().flat_map(|trace| {
        let vcpus = trace.vcpus.into_iter().map(|vcpu| Message::VcpuTrace(vcpu.map(Box::new)));
        std::iter::once(Message::Trace { mmu: trace.mmu, missing: trace.missing }).chain(vcpus)
    });
    std::iter::once(Message::Totals(Box::new(totals))).chain(vcpus).chain(trace)
}
