//! The error of a failed ioctl, with the name of the ioctl.

use thiserror::Error;

/// An ioctl, or an mmap of a KVM file descriptor, that failed.
#[derive(Debug, Error)]
#[error("{what} failed{}", hint(*errno))]
pub struct KvmError {
    /// The name of the ioctl, with its purpose where it has several.
    pub what: &'static str,
    /// The error number (errno(3)).
    pub errno: i32,
    /// The system's message for the error number.
    #[source]
    pub source: std::io::Error,
}

impl KvmError {
    /// The error `errno` of the ioctl `what`.
    pub(crate) fn new(what: &'static str, errno: i32) -> Self {
        Self { what, errno, source: std::io::Error::from_raw_os_error(errno) }
    }
}

fn hint(errno: i32) -> &'static str {
    match errno {
        libc::ENOMEM => " (the host has not enough memory)",
        libc::EMFILE | libc::ENFILE => " (too many open files: raise `ulimit -n`)",
        libc::EEXIST | libc::ENOSYS | libc::ENOTTY => " (this host's KVM does not have it)",
        _ => "",
    }
}

/// Adds the name of the ioctl to a `kvm_ioctls` result.
pub(crate) trait Named<T> {
    fn named(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError { what, errno: error.errno(), source: error.into() })
    }
}
