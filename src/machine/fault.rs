//! Whose fault it is that a machine cannot be made.

use super::command::CommandError;
use super::error::MachineError;
use super::files::FilesError;
use super::image::ImageError;
use crate::boot::KernelError;
use crate::boot::initramfs::{IndexError, InitramfsError, ModulesError};

/// Returns true if `error`, of this room or of `boot`, says that the kernel itself cannot be booted so: it is no kernel, it
/// is damaged, or it was built without a driver that the run needs. Files that cannot be read are no fault of the kernel's.
#[must_use]
pub fn is_fault_of_kernel(error: &(dyn std::error::Error + 'static)) -> bool {
    let kernel = error.downcast_ref::<KernelError>().or_else(|| match error.downcast_ref::<FilesError>() {
        Some(FilesError::Kernel(kernel)) => Some(kernel),
        _ => match (error.downcast_ref::<MachineError>(), error.downcast_ref::<ImageError>()) {
            (Some(MachineError::Kernel(kernel)), _) | (_, Some(ImageError::Kernel(kernel))) => Some(kernel),
            _ => None,
        },
    });
    let lacks_driver = matches!(
        error.downcast_ref::<FilesError>(),
        Some(FilesError::Command(CommandError::Initramfs(InitramfsError::Modules(ModulesError::Index {
            source: IndexError::NoDriver(_),
            ..
        }))))
    );
    lacks_driver || kernel.is_some_and(KernelError::is_of_kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::FileRole;
    use crate::boot::initramfs::Driver;
    use std::io;

    #[test]
    fn faults_of_the_kernel_are_told_from_those_of_the_host() {
        let no_kernel = || KernelError::NotKernel { path: "k".into(), what: "a text".into() };
        let unread =
            KernelError::Read { role: FileRole::Kernel, path: "k".into(), source: io::ErrorKind::NotFound.into() };
        let index = |source| {
            let modules = ModulesError::Index { folder: "m".into(), source };
            FilesError::Command(CommandError::Initramfs(InitramfsError::Modules(modules)))
        };
        assert!(is_fault_of_kernel(&no_kernel()));
        assert!(is_fault_of_kernel(&MachineError::Kernel(no_kernel())));
        assert!(is_fault_of_kernel(&FilesError::Kernel(no_kernel())));
        assert!(is_fault_of_kernel(&ImageError::Kernel(no_kernel())));
        assert!(is_fault_of_kernel(&index(IndexError::NoDriver(Driver::Virtiofs))));
        assert!(!is_fault_of_kernel(&index(IndexError::NotListed("a".into()))));
        assert!(!is_fault_of_kernel(&unread) && !is_fault_of_kernel(&FilesError::Kernel(unread)));
        assert!(!is_fault_of_kernel(&MachineError::Fd(io::ErrorKind::OutOfMemory.into())));
    }
}
