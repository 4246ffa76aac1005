//! KVM: the only code that issues its ioctls (Linux Documentation/virt/kvm/api.rst, "KVM API" below).

pub mod caps;
pub mod clock;
mod coalesced;
pub mod exit;
pub mod kick;
mod routes;
pub mod stats;
pub mod system;
pub mod vcpu;
pub mod vm;

pub use coalesced::Coalesced;
pub use exit::{Direction, Exit};
pub use system::{OpenError, System};
pub use vcpu::Vcpu;
pub use vm::Vm;

use thiserror::Error;

/// An ioctl that failed.
#[derive(Debug, Error)]
#[error("{what} failed{}", hint(*errno))]
pub struct KvmError {
    /// The ioctl's name and what it was for.
    pub what: &'static str,
    /// The system's error number.
    pub errno: i32,
    /// The system's words for it.
    #[source]
    pub source: std::io::Error,
}

fn hint(errno: i32) -> &'static str {
    match errno {
        libc::ENOMEM => " (the host has not enough memory)",
        libc::EMFILE | libc::ENFILE => " (too many open files: raise `ulimit -n`)",
        libc::EEXIST | libc::ENOSYS | libc::ENOTTY => " (this host's KVM does not have it)",
        _ => "",
    }
}

/// Gives a `kvm_ioctls` result the name of its ioctl.
pub(crate) trait Named<T> {
    fn named(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError { what, errno: error.errno(), source: error.into() })
    }
}
