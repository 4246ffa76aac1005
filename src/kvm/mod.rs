//! KVM: the only code that issues its ioctls. "KVM API" in comments is Linux' Documentation/virt/kvm/api.rst.
//!
//! The files build on each other in one order: `error`, `kick`, `exit`, `stats`, `coalesced`, `routes`, `vcpu`, `vm`,
//! `state`, `system`.

pub mod caps;
pub mod clock;
mod coalesced;
mod error;
pub mod exit;
pub mod kick;
mod routes;
pub mod state;
pub mod stats;
pub mod system;
pub mod vcpu;
pub mod vm;

pub use coalesced::{CoalescedAddress, CoalescedRing, CoalescedWrite};
pub use error::KvmError;
pub use exit::{Direction, Exit};
pub use system::{OpenError, System};
pub use vcpu::Vcpu;
pub use vm::{PinLevel, Vm};
