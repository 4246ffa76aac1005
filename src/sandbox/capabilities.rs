//! Capabilities (capabilities(7)): what root may do beyond the rights of files.

use rustix::io;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities,
};

/// Drops all capabilities of the calling thread.
///
/// # Errors
/// Returns the error of capget(2) or capset(2).
pub(super) fn drop_all() -> io::Result<()> {
    let none = CapabilitySet::empty();
    if capabilities(None)?.permitted == none {
        return Ok(());
    }
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// Empties the bounding and the ambient set, so that no program that the process starts gets capabilities. Without
/// CAP_SETPCAP there are none to give, as no_new_privs is set.
///
/// # Errors
/// Returns the error of prctl(2).
pub(super) fn bound() -> io::Result<()> {
    if capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        for capability in CapabilitySet::all() {
            match remove_capability_from_bounding_set(capability) {
                // A capability that this kernel does not have.
                Ok(()) | Err(io::Errno::INVAL) => {}
                Err(error) => return Err(error),
            }
        }
    }
    match clear_ambient_capability_set() {
        // Before Linux 4.3 there is no ambient set.
        Ok(()) | Err(io::Errno::INVAL) => Ok(()),
        Err(error) => Err(error),
    }
}
