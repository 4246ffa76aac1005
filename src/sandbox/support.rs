//! What this kernel has for a sandbox, for `hwvmm doctor` and for warnings.

use super::landlock::Access;
use super::sys;
use super::trial::ViewError;
use super::view::{View, ViewRight};
use std::io;
use std::path::Path;

/// What this kernel has for a sandbox.
#[derive(Debug)]
pub struct Support {
    /// The version of Landlock's ABI, or why there is none.
    pub landlock_abi: io::Result<u32>,
    /// The actions of seccomp filters, by name, or why there are none.
    pub seccomp_actions: io::Result<Vec<String>>,
}

/// Settings (Linux Documentation/admin-guide/sysctl, Debian, Ubuntu) that refuse user namespaces to users without rights, with the value
/// that does.
const REFUSALS: [(&str, &str); 3] = [
    ("/proc/sys/user/max_user_namespaces", "0"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0"),
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"),
];

/// What a run gets of a view of the file system of its own.
#[derive(Debug)]
pub struct OwnView {
    /// What gives a run a mount namespace.
    pub right: ViewRight,
    /// Why a shared folder is no mount of its own there, or lacks attributes.
    pub shares: Result<(), ViewError>,
}

impl OwnView {
    /// Tries in child processes what a run does. To be called by a process with one thread.
    ///
    /// # Errors
    /// [`ViewError`]: why a run has no mount namespace.
    pub fn try_out() -> Result<Self, ViewError> {
        let right = View::try_out(|_| Ok(()))?;
        let shares = View::try_out(|view| match view.mount_of(Path::new("/"), Access::Read)?.lacks {
            Some(lack) => Err(lack.into()),
            None => Ok(()),
        });
        Ok(Self { right, shares: shares.map(drop) })
    }

    /// Returns the setting of this host that refuses user namespaces to users without rights, as "path is value"; `None` for a process that
    /// needs none.
    #[must_use]
    pub fn refusing_setting() -> Option<String> {
        if !matches!(ViewRight::of_this_process(), Ok(ViewRight::UserNamespace)) {
            return None;
        }
        let refuses =
            |(path, value): &&(&str, &str)| std::fs::read_to_string(path).is_ok_and(|text| text.trim() == *value);
        REFUSALS.iter().find(refuses).map(|(path, value)| format!("{path} is {value}"))
    }
}

impl Support {
    /// Reads from the running kernel which sandboxing it supports.
    #[must_use]
    pub fn of_this_kernel() -> Self {
        let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
        let words = |text: String| text.split_whitespace().map(str::to_owned).collect();
        Self { landlock_abi: sys::landlock_abi(), seccomp_actions: actions.map(words) }
    }

    /// Returns true if filters can have the action. Where the list of actions cannot be read (/proc is not mounted), they are
    /// taken to be there: a filter that cannot be installed is an error later.
    #[must_use]
    pub fn has_seccomp(&self, action: &str) -> bool {
        match &self.seccomp_actions {
            Ok(actions) => actions.iter().any(|one| one == action),
            Err(_) => !Path::new("/proc/sys/kernel").exists(),
        }
    }
}
