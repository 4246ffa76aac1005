//! Files that hwvmm's caller has left open: what a shell, make(1) or a service manager passes on to its children.
//!
//! The parent process keeps them, as a caller may need that: a lock by flock(2) lasts until its last copy is closed. The machine's process
//! has no use for them once the files of the run are open; a path such as /dev/fd/3 is opened again by then. No program that hwvmm
//! starts gets them.

use super::sys;
use rustix::fs::{FileType, Stat, fstat};
use std::fs::File;
use std::io::{self, stderr, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// The list of this process's open files.
const OPEN_FILES: &str = "/proc/self/fd";
/// The first file descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// What was open at the start; `None` before [`note_inherited_files`].
static INHERITED: Mutex<Option<io::Result<Vec<RawFd>>>> = Mutex::new(None);

/// Notes which files are open, and has no other program inherit them; to be called before this program opens anything. A standard
/// stream that is a folder becomes /dev/null: it can be neither read nor written, but names could be opened from it.
pub fn note_inherited_files() {
    let found = open_files().map(|mut files| {
        // The list has the folder that it was read from, which is closed by now.
        files.retain(|fd| *fd >= FIRST && sys::set_close_on_exec(*fd).is_ok());
        files
    });
    *INHERITED.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    replace_folders();
}

/// Has /dev/null replace the standard streams that are folders. Where this fails, later uses of the stream fail too.
fn replace_folders() {
    let is_folder = |stream: &dyn AsFd| fstat(stream.as_fd()).is_ok_and(|stat| is_folder(&stat));
    let folders = [is_folder(&stdin()), is_folder(&stdout()), is_folder(&stderr())];
    if folders == [false; 3] {
        return;
    }
    let Ok(null) = File::options().read(true).write(true).open("/dev/null") else { return };
    let [input, output, errors] = folders;
    if input {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    if output {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
    if errors {
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}

/// Has the machine's process close a file of the parent, too: one that the parent opens before the guest runs, and that is
/// none of the machine's.
pub fn keep_from_machine(file: BorrowedFd<'_>) {
    let mut inherited = INHERITED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Ok(files) = inherited.get_or_insert_with(|| Ok(Vec::new())) {
        files.push(file.as_raw_fd());
    }
}

/// Closes the files that were open at the start, once.
///
/// # Errors
/// Where they could not be listed.
pub(super) fn close_inherited_files() -> io::Result<()> {
    let Some(inherited) = INHERITED.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
    for fd in inherited? {
        if let Ok(fd) = u32::try_from(fd) {
            sys::close_range(fd, fd);
        }
    }
    Ok(())
}

fn open_files() -> io::Result<Vec<RawFd>> {
    let names = std::fs::read_dir(OPEN_FILES)?.map(|entry| Ok(entry?.file_name()));
    let names: Vec<_> = names.collect::<io::Result<_>>()?;
    Ok(names.iter().filter_map(|name| name.to_str()?.parse().ok()).collect())
}

fn is_folder(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Panics if the process has a folder open that is none of `reach`: its `..` leads to the host's files. Those of procfs have been
/// detached by then (view.rs).
#[cfg(debug_assertions)]
#[allow(clippy::panic, reason = "what debug builds are for")]
pub(super) fn assert_no_folders(reach: &[super::Reach]) {
    use std::os::unix::fs::MetadataExt;
    let shares: Vec<_> = reach.iter().filter_map(|reach| std::fs::metadata(&reach.path).ok()).collect();
    for fd in open_files().unwrap_or_default() {
        let Ok(folder) = std::fs::metadata(format!("{OPEN_FILES}/{fd}")) else { continue };
        let is_share = shares.iter().any(|share| (share.dev(), share.ino()) == (folder.dev(), folder.ino()));
        let file_system = || rustix::fs::statfs(format!("{OPEN_FILES}/{fd}")).map(|found| found.f_type);
        if folder.is_dir() && !is_share && file_system() != Ok(rustix::fs::PROC_SUPER_MAGIC) {
            let name = std::fs::read_link(format!("{OPEN_FILES}/{fd}")).unwrap_or_default();
            panic!("the folder {} is open in the machine's process: {fd}", name.display());
        }
    }
}
