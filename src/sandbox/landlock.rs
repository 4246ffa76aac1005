//! Landlock: the files and folders that the process reaches by name.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, PathFdError,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use std::path::PathBuf;
use thiserror::Error;

/// The ABI whose restrictions are asked for (Linux 6.12): what an older kernel lacks of it is left out.
const WANTED: ABI = ABI::V6;

/// What may be done below a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Files and folders are read.
    Read,
    /// Files and folders are read, written, made, renamed and removed. Devices are not made.
    ReadWrite,
    /// As [`Access::ReadWrite`], and devices are made.
    ReadWriteDevices,
}

/// A folder or file that stays within reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The path, which is opened when the sandbox is entered.
    pub path: PathBuf,
    /// What may be done there.
    pub access: Access,
}

/// How much of what was asked for the kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enforced {
    /// The kernel enforces every access right of [`WANTED`].
    Fully,
    /// It is older than [`WANTED`].
    Partly,
    /// There is no Landlock.
    Not,
}

/// Landlock cannot be set up.
#[derive(Debug, Error)]
pub enum LandlockError {
    /// A path that is to stay within reach cannot be opened.
    #[error("cannot open a path that the sandbox permits")]
    Path(#[from] PathFdError),
    /// The kernel refuses the rules.
    #[error("Landlock refuses the rules of the sandbox")]
    Rules(#[from] RulesetError),
}

fn rights(access: Access) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    match access {
        Access::Read => read,
        Access::ReadWrite => rights(Access::ReadWriteDevices) & !(AccessFs::MakeChar | AccessFs::MakeBlock),
        Access::ReadWriteDevices => (read | AccessFs::from_write(WANTED)) & !AccessFs::IoctlDev,
    }
}

/// Rules that can still be added once their paths cannot be resolved.
pub(super) struct Rules(RulesetCreated);

/// Makes the rules for `reach`, and opens its paths.
///
/// # Errors
/// [`LandlockError`]; a kernel without Landlock is no error.
pub(super) fn rules(reach: &[Reach]) -> Result<Rules, LandlockError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .scope(Scope::from_all(WANTED))?
        .create()?;
    for Reach { path, access } in reach {
        let fd = PathFd::new(path)?;
        // A rule for a file must not have the rights of folders.
        let rights = if path.is_dir() { rights(*access) } else { rights(*access) & AccessFs::from_file(WANTED) };
        rules = rules.add_rule(PathBeneath::new(fd, rights))?;
    }
    Ok(Rules(rules))
}

impl Rules {
    /// Confines the calling thread, and the threads that it starts from here on, to what the rules permit: no other file is
    /// opened, made or removed, no TCP port is bound or connected to, and no abstract socket or process outside is reached. Files that
    /// are open stay open. Sets no_new_privs.
    ///
    /// # Errors
    /// [`LandlockError`]; a kernel without Landlock is no error.
    pub(super) fn restrict(self) -> Result<Enforced, LandlockError> {
        Ok(match self.0.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => Enforced::Fully,
            RulesetStatus::PartiallyEnforced => Enforced::Partly,
            RulesetStatus::NotEnforced => Enforced::Not,
        })
    }
}
