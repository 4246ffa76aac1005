//! The kernel modules that the guest needs.

use crate::instructions::Signatures;
use crate::report::{Failure, Stage};
use rustix::io::Errno;
use rustix::system::{finit_module, init_module};
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

/// Where the modules are in the initramfs.
const MODULES: &str = "/hwvmm/modules";
/// What a signed module ends in (Linux: include/linux/module_signature.h, `MODULE_SIG_STRING`).
const MARK: &[u8] = b"~Module signature appended~\n";
/// The size in bytes of `struct module_signature` before it, whose last four bytes are the length of the signature, big-endian.
const DESCRIPTION_BYTES: usize = 12;

/// Loads the modules in their order.
pub(crate) fn load(names: &[OsString], signatures: Signatures) -> Result<(), Failure> {
    for name in names {
        let path = Path::new(MODULES).join(name);
        let failed = |error: &dyn std::fmt::Display| Stage::Modules.failed(path.display(), error);
        let loaded = match signatures {
            Signatures::LeftOut => load_unsigned(&path),
            Signatures::Checked => None,
        };
        let loaded = match loaded {
            Some(loaded) => loaded,
            None => finit_module(File::open(&path).map_err(|error| failed(&error))?, c"", 0),
        };
        match loaded {
            // NODEV: the processor does not have what the module is for.
            Ok(()) | Err(Errno::EXIST | Errno::NODEV) => {}
            Err(error) => return Err(failed(&error)),
        }
        // The initramfs is memory of the guest.
        let _ = fs::remove_file(&path);
    }
    Ok(())
}

/// Loads a signed module without its signature. `None` where it has none, and where the kernel takes only modules that have one
/// (CONFIG_MODULE_SIG_FORCE, module.sig_enforce, lockdown).
fn load_unsigned(path: &Path) -> Option<Result<(), Errno>> {
    let bytes = fs::read(path).ok()?;
    match init_module(without_signature(&bytes)?, c"") {
        Err(Errno::KEYREJECTED | Errno::NOKEY | Errno::PERM) => None,
        loaded => Some(loaded),
    }
}

/// The module before its signature; `None` if it is not signed.
fn without_signature(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_suffix(MARK)?;
    let (rest, description) = rest.split_at_checked(rest.len().checked_sub(DESCRIPTION_BYTES)?)?;
    let length = u32::from_be_bytes(description.last_chunk().copied()?);
    rest.get(..rest.len().checked_sub(usize::try_from(length).ok()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signed(length: u32) -> Vec<u8> {
        let mut bytes = b"\x7fELF module, signature".to_vec();
        bytes.extend([0, 0, 2, 0, 0, 0, 0, 0]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(MARK);
        bytes
    }

    #[test]
    fn a_signature_is_left_out() {
        assert_eq!(without_signature(&signed(11)), Some(&b"\x7fELF module"[..]));
        for length in [24, u32::MAX] {
            assert_eq!(without_signature(&signed(length)), None, "longer than the module: {length}");
        }
        for unsigned in [&b"\x7fELF module"[..], b"", MARK] {
            assert_eq!(without_signature(unsigned), None);
        }
    }
}
