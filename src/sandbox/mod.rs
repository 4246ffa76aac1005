//! The sandbox of the machine's process: what is left of its user's rights while the guest runs.
//!
//! [README](README.md) says what is confined and in which order.

mod capabilities;
mod confined;
#[cfg(any(debug_assertions, feature = "fault-injection"))]
mod fault;
mod fork;
mod inherited;
mod landlock;
mod numbers;
mod roles;
mod seccomp;
mod share_mount;
mod support;
mod sys;
#[cfg(test)]
pub(crate) mod test_mounts;
#[cfg(test)]
mod test_process;
#[cfg(test)]
mod tests;
mod trap;
mod trial;
mod view;
#[cfg(test)]
mod view_tests;
mod watch;

pub use confined::{ConfinedError, Isolation, Limits, confined, confined_with};
pub use fork::{Child, ForkError, PANICKED, fork};
pub use inherited::{keep_from_machine, note_inherited_files};
pub use landlock::{Access, LandlockError, Reach};
pub use roles::ThreadRole;
pub use support::{OwnView, Support};
pub use trap::Refused;
pub use trial::ViewError;
pub use view::ViewRight;

use hwvmm_devices::path_text::PathText as _;
use landlock::Enforced;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use seccomp::{Filter, Mismatch};
use share_mount::{MountError, ShareMount};
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};
use thiserror::Error;
use view::View;
use watch::Watcher;

/// How the machine's process is confined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// What is not permitted ends the process.
    #[default]
    On,
    /// System calls that would end the process are told on stderr, and carried out. Nothing is refused.
    Log,
    /// The process is not confined: no seccomp filters, no Landlock rules, and its capabilities are kept.
    Off,
}

/// The sandbox cannot be set up.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// A filter cannot be made from the table.
    #[error("cannot make the seccomp filters: {0}")]
    Filter(#[source] seccompiler::BackendError),
    /// A filter cannot be installed.
    #[error("cannot install the seccomp filter of the thread {thread}")]
    Install {
        /// The name of the thread.
        thread: String,
        /// The error of the host's kernel.
        source: io::Error,
    },
    /// Something of the process cannot be set.
    #[error("cannot {what}")]
    Process {
        /// The step that failed, as it follows "cannot" in the message.
        what: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// Landlock cannot be set up, as the error in it says.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
}

fn process(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> SandboxError {
    move |error| SandboxError::Process { what, source: error.into() }
}

/// How many bytes more than at the guest's start the machine's process may map, without a profile: the tables of a share with all of its inodes take about
/// 100 MiB, what host programs leave unread of a vsock device 16 MiB.
const MAX_GROWTH: u64 = 512 << 20;

/// Returns the bytes that the process has mapped: the first number of `statm` (proc_pid_statm(5)), in pages.
fn mapped_bytes(statm: &File) -> io::Result<u64> {
    let mut text = [0; 128];
    let len = statm.read_at(&mut text, 0)?;
    let first = text.get(..len).and_then(|text| text.split(|byte| *byte == b' ').next()).unwrap_or_default();
    let pages =
        std::str::from_utf8(first).ok().and_then(|text| text.parse::<u64>().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok(pages.saturating_mul(rustix::param::page_size() as u64))
}

/// The text of what `error` comes from.
fn cause(error: &dyn Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

fn warn_of_view(error: &ViewError) {
    log::warn!(
        "sandbox: chmod, chown and touch can reach files outside of the shared folders: {error}: {}",
        cause(error)
    );
}

/// The sandbox of a process: made before it has threads, entered by each of them.
pub struct Sandbox {
    mode: Mode,
    /// What the filters do; `None` where nothing is filtered.
    mismatch: Option<Mismatch>,
    /// One for each role, in their order, made when its first thread starts.
    filters: [OnceLock<Filter>; ThreadRole::ALL.len()],
    watcher: Option<Mutex<Watcher>>,
    /// The process' own mount namespace, where it has one.
    view: Option<View>,
    /// The size of the process (/proc/self/statm).
    size: Option<File>,
    /// How many bytes more than at the guest's start it may map.
    growth_bytes: u64,
}

impl Sandbox {
    /// A sandbox that confines nothing.
    #[must_use]
    pub fn off() -> Self {
        Self {
            mode: Mode::Off,
            mismatch: None,
            filters: [const { OnceLock::new() }; _],
            watcher: None,
            view: None,
            size: None,
            growth_bytes: MAX_GROWTH,
        }
    }

    /// Prepares the sandbox of the calling process. What a filter refuses is written to `reports`, a pipe that does not block,
    /// for [`Refused::read`]. What the kernel lacks is one warning in the log.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub fn new(mode: Mode, reports: OwnedFd) -> Result<Self, SandboxError> {
        let mut sandbox = Self { mode, ..Self::off() };
        let (action, mismatch) = match mode {
            Mode::On => ("trap", Mismatch::End),
            Mode::Log => ("user_notif", Mismatch::Ask),
            Mode::Off => return Ok(sandbox),
        };
        if !Support::of_this_kernel().has_seccomp(action) {
            log::warn!(
                "sandbox: this kernel has no seccomp filters with the action {action}: system calls are not confined"
            );
            return Ok(sandbox);
        }
        sys::limit_heaps();
        match mismatch {
            Mismatch::End => {
                trap::install(reports).map_err(|source| SandboxError::Process { what: "catch SIGSYS", source })?;
            }
            Mismatch::Ask => {
                let watcher =
                    Watcher::start().map_err(|source| SandboxError::Process { what: "start a thread", source })?;
                sandbox.watcher = Some(Mutex::new(watcher));
            }
        }
        sandbox.mismatch = Some(mismatch);
        Ok(sandbox)
    }

    /// Gives the calling process a mount namespace of its own, for [`Sandbox::mount_of`] and [`Sandbox::confine_process`]; to be called
    /// before anything is opened, by a process with one thread. Where the host refuses, one warning in the log says so. From here on a
    /// failed allocation prints no backtrace.
    #[must_use]
    pub fn with_own_view(mut self) -> Self {
        if self.mode == Mode::On {
            // It has no name once the process is confined.
            self.size = File::open("/proc/self/statm").ok();
            sys::no_backtrace();
            match View::separate() {
                Ok(view) => self.view = Some(view),
                Err(error) => warn_of_view(&error),
            }
        }
        self
    }

    /// Lets the process map `bytes` more while the guest runs.
    #[must_use]
    pub fn with_growth(self, bytes: u64) -> Self {
        Self { growth_bytes: self.growth_bytes.saturating_add(bytes), ..self }
    }

    /// Returns a mount of the folder `path` that leads nowhere else; `None` where the process has no mount namespace of its own, or
    /// where the folder cannot be had so. What the host refuses is a warning in the log.
    pub fn mount_of(&self, Reach { path, access }: &Reach) -> Option<OwnedFd> {
        let path_shown = path.shown();
        match self.view.as_ref()?.mount_of(path, *access) {
            Ok(ShareMount { mount, lacks }) => {
                if let Some(lack) = lacks {
                    log::warn!("sandbox: share {path_shown}: {lack}: {}", cause(&lack));
                }
                Some(mount)
            }
            // The code that opens it logs this too.
            Err(MountError::Folder(_)) => None,
            Err(error) => {
                log::warn!(
                    "sandbox: share {path_shown}: it has no mount of its own, so that paths of the host can be reached: {error}: {}",
                    cause(&error)
                );
                None
            }
        }
    }

    /// Returns true if nothing can be opened or removed by name once the process is confined.
    #[must_use]
    pub fn refuses(&self) -> bool {
        self.mode == Mode::On
    }

    /// Confines the calling thread, and all that it starts from here on, to `reach`, and closes what hwvmm's caller has left open; to
    /// be called before the process has threads that are to be confined, and after everything else was opened.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub fn confine_process(&self, reach: &[Reach]) -> Result<(), SandboxError> {
        if self.mode == Mode::Off {
            return Ok(());
        }
        inherited::close_inherited_files()
            .map_err(|source| SandboxError::Process { what: "list the files that were open at the start", source })?;
        rustix::thread::set_no_new_privs(true).map_err(process("set no_new_privs"))?;
        if self.mode == Mode::Log {
            return Ok(());
        }
        // Guest memory and keys in it must not end up in a core file, and no other process may trace this one.
        let no_core = Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(Resource::Core, no_core).map_err(process("set RLIMIT_CORE to 0"))?;
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(process("set PR_SET_DUMPABLE"))?;
        #[cfg(debug_assertions)]
        inherited::assert_no_folders(reach);
        let rules = landlock::rules(reach)?;
        if let Some(Err(error)) = self.view.as_ref().map(View::empty) {
            warn_of_view(&error);
        }
        match rules.restrict()? {
            Enforced::Fully => {}
            Enforced::Partly => log::info!("sandbox: this kernel's Landlock is older than that of Linux 6.12"),
            Enforced::Not => {
                log::warn!("sandbox: this kernel has no Landlock: files are not confined to those of the run");
            }
        }
        capabilities::bound().map_err(process("empty the bounding set of capabilities"))
    }

    /// Gives the calling thread, called `name`, the rights of `role` and no others. They cannot be widened again. A thread of a shared folder keeps
    /// the capabilities that it has: it has dropped those that it does not need.
    ///
    /// # Errors
    /// [`SandboxError`]. The thread must not go on then.
    pub fn enter(&self, role: ThreadRole, name: &str) -> Result<(), SandboxError> {
        if self.mode == Mode::On && role == ThreadRole::Main {
            self.limit()?;
        }
        if self.mode == Mode::On && role != ThreadRole::Fs {
            capabilities::drop_all().map_err(process("drop capabilities"))?;
        }
        if let (Some(mismatch), Some(place)) = (self.mismatch, self.filters.get(role as usize)) {
            self.filter(role, place, mismatch, name)?;
        }
        #[cfg(any(debug_assertions, feature = "fault-injection"))]
        fault::inject(role);
        Ok(())
    }

    /// Limits what the process takes from here on: its memory and its open files. RLIMIT_NPROC stays as it is: the kernel counts workers
    /// of io_uring and KVM, which it starts in this process as it needs them, and no filter permits clone(2).
    fn limit(&self) -> Result<(), SandboxError> {
        let set = |resource, limit| {
            let limits = Rlimit { current: Some(limit), maximum: Some(limit) };
            rustix::process::setrlimit(resource, limits).map_err(process("set the limits of the process"))
        };
        if let Some(files) = rustix::process::getrlimit(Resource::Nofile).current {
            set(Resource::Nofile, files)?;
        }
        match self.size.as_ref().and_then(|file| mapped_bytes(file).ok()) {
            Some(now) => {
                let before = rustix::process::getrlimit(Resource::As).current.unwrap_or(u64::MAX);
                set(Resource::As, now.saturating_add(self.growth_bytes).min(before))
            }
            None => {
                log::warn!("sandbox: /proc/self/statm cannot be read: the memory of the process is not limited");
                Ok(())
            }
        }
    }

    fn filter(
        &self,
        role: ThreadRole,
        place: &OnceLock<Filter>,
        mismatch: Mismatch,
        name: &str,
    ) -> Result<(), SandboxError> {
        let filter = match place.get() {
            Some(filter) => filter,
            None => {
                let new = Filter::new(role, mismatch).map_err(SandboxError::Filter)?;
                place.get_or_init(|| new)
            }
        };
        trap::set_name(name);
        let install_error = |source| SandboxError::Install { thread: name.to_owned(), source };
        let listener = filter.install().map_err(install_error)?;
        if let (Some(watcher), Some(listener)) = (&self.watcher, listener) {
            let watcher = watcher.lock().unwrap_or_else(PoisonError::into_inner);
            watcher.watch(name.to_owned(), listener).map_err(install_error)?;
        }
        Ok(())
    }
}
