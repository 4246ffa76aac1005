//! What the thread of a share may do on the host.

use super::policy::PrivilegedFiles;
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities};
use std::io;

/// Where hwvmm runs as root, the guest's root is root in the shared directory: it can act as each user (CHOWN, SETUID, SETGID,
/// FOWNER), read and write all files (`DAC_OVERRIDE`) and link them (`DAC_READ_SEARCH`).
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);
/// Without FSETID, Linux clears the set-user-ID and set-group-ID bits of a file that this thread writes.
const FOR_PRIVILEGED_FILES: CapabilitySet = CapabilitySet::FSETID.union(CapabilitySet::MKNOD);

/// Gives up the capabilities of this thread that a share does not need, and its umask: the guest's kernel has applied the umask
/// of its process already.
///
/// # Errors
/// Returns the error of unshare(2), capget(2) or capset(2).
pub(super) fn limit(privileged_files: PrivilegedFiles) -> io::Result<()> {
    let now = capabilities(None)?;
    let needed = match privileged_files {
        PrivilegedFiles::Refused => CAPABILITIES,
        PrivilegedFiles::Allowed => CAPABILITIES | FOR_PRIVILEGED_FILES,
    };
    // The permitted ones as well, as a change of the user back to root makes all permitted ones effective.
    let sets = CapabilitySets {
        effective: now.effective & needed,
        permitted: now.permitted & needed,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)?;
    unshare_file_system_attributes()?;
    umask(Mode::empty());
    Ok(())
}

/// Gives this thread a umask of its own.
///
/// # Errors
/// Returns the error of unshare(2).
#[allow(deprecated, reason = "unshare_unsafe is unsafe for flags that are not used here")]
pub(super) fn unshare_file_system_attributes() -> io::Result<()> {
    rustix::thread::unshare(UnshareFlags::FS).map_err(Into::into)
}
