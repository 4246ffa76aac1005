//! What this host can do. What matters is tried on a vCPU of its own, rather than read from the host's own descriptions.

mod cost;
mod host;
mod mmu;
mod trial;

pub use cost::{Cost, Kind as CostKind, Price, costs};
pub use host::{ApicVirtualization, Host, HugePages, Mmu};
pub use mmu::{Holder, MmuChange, MmuError, MmuState, ModprobeError, command_for};
pub use trial::{ANY_KVM, CannotRunLinux, STEPS, Trial, check_linux, run as run_trial, without_exits};

use crate::exit::ExitReason;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use std::io;
use thiserror::Error;
use vm_memory::GuestMemoryError;

/// A probe's guest could not be made, or did not do what it should.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// An ioctl on KVM, the virtual machine or the vCPU failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The host has no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest's memory cannot be written.
    #[error("cannot write the guest's memory")]
    Write(#[from] GuestMemoryError),
    /// The eventfd that signals an interrupt to the guest cannot be created.
    #[error("cannot make an eventfd")]
    EventFd(#[source] io::Error),
    /// The vCPU left the guest for a reason that ends the probe.
    #[error("KVM_RUN ended with {}", .0.name())]
    Exit(ExitReason),
    /// The guest's code ran, and its result is wrong.
    #[error("the guest's instructions had the wrong effect")]
    WrongEffect,
    /// The guest did not get on within the probe's time.
    #[error("the guest hangs")]
    Hung,
    /// The probe's thread cannot be started, or panicked.
    #[error("the probe's thread failed")]
    Thread,
}
