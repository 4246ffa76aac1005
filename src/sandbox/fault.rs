//! For tests: a thread that misbehaves as soon as it is confined. Not in release builds, but with the feature
//! `fault-injection`.

use super::roles::ThreadRole;
use super::sys::call;
use std::ffi::CString;
use std::fs::File;

/// The environment variable that asks for a fault: a role and what its threads do, such as `Fs:open`. They can exec, open, abort,
/// panic, alloc (8 GiB), spin or touch=PATH; a Parser can answer or write more than it may.
const VARIABLE: &str = "HWVMM_FAULT";

/// Returns true if the environment asks threads with this role for this fault.
pub(super) fn is_asked(role: ThreadRole, fault: &str) -> bool {
    std::env::var(VARIABLE).is_ok_and(|asked| asked == format!("{role:?}:{fault}"))
}

/// Does what the environment asks of threads with this role.
#[allow(clippy::panic, reason = "a fault that tests ask for")]
pub(super) fn inject(role: ThreadRole) {
    if is_asked(role, "exec") {
        let arguments = [c"/bin/true".as_ptr().addr(), 0, 0, 0];
        let result = call(libc::SYS_execve, arguments);
        log::error!("{VARIABLE}: execve: {result:?}");
    } else if is_asked(role, "open") {
        let result = File::open("/etc/shadow");
        log::error!("{VARIABLE}: open: {:?}", result.map(|_| ()));
    } else if is_asked(role, "abort") {
        std::process::abort();
    } else if is_asked(role, "panic") {
        panic!("{VARIABLE}: a panic\x1b[2J");
    } else if is_asked(role, "alloc") {
        std::hint::black_box(vec![1_u8; 8 << 30]);
    } else if is_asked(role, "spin") {
        loop {
            std::hint::spin_loop();
        }
    } else if let Ok(asked) = std::env::var(VARIABLE)
        && let Some(path) = asked.strip_prefix(&format!("{role:?}:touch="))
    {
        touch(path);
    }
}

/// Tries to set the mode, the owner and the times of `path`: by its name, and from each folder that the process has open.
fn touch(path: &str) {
    let way_up = format!("{}{}", "../".repeat(20), path.trim_start_matches('/'));
    let paths = [path, way_up.as_str()].map(|path| CString::new(path).unwrap_or_default());
    let mut done = 0;
    // Most of these are not open.
    for file in 0..1000 {
        for path in paths.iter().map(|path| path.as_ptr().addr()) {
            for (number, arguments) in [
                (libc::SYS_fchmodat, [file, path, 0o777, 0]),
                (libc::SYS_fchownat, [file, path, 1, 1]),
                (libc::SYS_utimensat, [file, path, 0, 0]),
                (libc::SYS_openat, [file, path, 0, 0]),
            ] {
                done += u32::from(call(number, arguments).is_ok());
            }
        }
    }
    log::error!("{VARIABLE}: touch: {done} calls were carried out");
}
