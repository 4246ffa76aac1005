//! The device `/dev/kvm`: capabilities, and new machines.

use super::error::{KvmError, Named};
use super::vm::Vm;
use hwvmm_arch::msr::MTRRS;
use hwvmm_devices::path_text::PathText as _;
use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The path of the KVM device.
pub const DEFAULT_PATH: &str = "/dev/kvm";

/// Why KVM cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such device.
    #[error(
        "there is no {}: load KVM (`modprobe kvm_intel` or `modprobe kvm_amd`), or turn virtualization on in the firmware, \
         or (in a virtual machine or container) have the device passed in; `scripts/lab` runs hwvmm without it", .0.shown()
    )]
    Missing(PathBuf),
    /// The user has no permission to open the device.
    #[error(
        "no permission to open {}: add yourself to its group (`sudo usermod -aG kvm $USER`, then log in again) or run as \
         root", .0.shown()
    )]
    Permission(PathBuf),
    /// Any other error of open(2).
    #[error("cannot open {}", .0.shown())]
    Other(PathBuf, #[source] io::Error),
    /// The device answers KVM_GET_API_VERSION with another number than 12: it is not KVM.
    #[error("{path} has KVM API version {version}, hwvmm needs {KVM_API_VERSION}: is it KVM?", path = .0.shown(), version = .1)]
    Version(PathBuf, i32),
}

/// The open device `/dev/kvm`.
pub struct System {
    kvm: Kvm,
}

impl System {
    /// Opens the device at `path`.
    ///
    /// # Errors
    /// [`OpenError`], each with its remedy.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let other = |error| OpenError::Other(path.to_owned(), error);
        let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| other(e.into()))?;
        let kvm = Kvm::new_with_path(name).map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => OpenError::Missing(path.to_owned()),
            libc::EACCES | libc::EPERM => OpenError::Permission(path.to_owned()),
            _ => other(error.into()),
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version).ok() != Some(KVM_API_VERSION) {
            return Err(OpenError::Version(path.to_owned(), version));
        }
        Ok(Self { kvm })
    }

    /// The value of a capability (KVM API 4.4): 0 where it is missing.
    #[must_use]
    pub fn capability(&self, number: u32) -> i32 {
        self.kvm.check_extension_raw(number.into())
    }

    /// Returns true if KVM's local APIC has the TSC-deadline timer (KVM_CAP_TSC_DEADLINE_TIMER).
    #[must_use]
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// The largest number of vCPUs of a machine (KVM_CAP_MAX_VCPUS).
    #[must_use]
    pub fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// The upper limit of vCPU ids, exclusive (KVM_CAP_MAX_VCPU_ID).
    #[must_use]
    pub fn max_vcpu_id(&self) -> usize {
        self.kvm.get_max_vcpu_id()
    }

    /// The CPUID leaves that this host and KVM support for guests (KVM API 4.46, KVM_GET_SUPPORTED_CPUID).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).named("KVM_GET_SUPPORTED_CPUID")
    }

    /// The numbers of the MSRs that make up the state of a vCPU: those that KVM lists (KVM API 4.3, KVM_GET_MSR_INDEX_LIST),
    /// and the MTRRs.
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn msrs(&self) -> Result<Vec<u32>, KvmError> {
        let listed = self.kvm.get_msr_index_list().named("KVM_GET_MSR_INDEX_LIST")?;
        let mut all: Vec<u32> = listed.as_slice().iter().copied().chain(MTRRS).collect();
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// Creates a machine without memory and vCPUs (KVM API 4.2, KVM_CREATE_VM).
    ///
    /// # Errors
    /// Where the ioctl fails.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        // A signal that arrives while KVM takes its locks makes this fail with EINTR.
        loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => {}
                result => return result.named("KVM_CREATE_VM").map(Vm::new),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_device_and_the_remedy() {
        let message = |path: &str| System::open(Path::new(path)).err().expect("no KVM").to_string();
        assert!(message("/no/such/device").contains("modprobe"));
        assert!(message("/dev/null").contains("/dev/null"));
    }
}
