//! The command's process. The agent starts itself once more, which makes a session, takes the terminal and the user's rights,
//! and then becomes the command.

use crate::instructions::CommandSpec;
use crate::report::{Failure, Stage};
use rustix::process::Pid;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// The first argument of the second start.
pub(crate) const EXEC: &str = "--exec";
/// The second argument: if stdin is to become the controlling terminal.
const TERMINAL: &str = "terminal";
const PIPES: &str = "pipes";
/// What a shell returns for a command that is not there, and for one that cannot be executed (POSIX, 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// The command's own stdin, stdout and stderr.
#[derive(Debug)]
pub(crate) struct Stdios {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

/// Starts the command. Its process is the leader of a session and of a process group.
pub(crate) fn start(spec: &CommandSpec, stdios: Stdios) -> Result<Pid, Failure> {
    let mode = if spec.terminal.is_some() { TERMINAL } else { PIPES };
    let child = Command::new("/proc/self/exe")
        .args([EXEC, mode, &spec.user.uid.to_string(), &spec.user.gid.to_string()])
        .args(&spec.command)
        .env_clear()
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&spec.workdir)
        .stdin(Stdio::from(stdios.stdin))
        .stdout(Stdio::from(stdios.stdout))
        .stderr(Stdio::from(stdios.stderr))
        .spawn()
        .map_err(|error| Stage::Command.failed("the command's process", error))?;
    Pid::from_raw(child.id().cast_signed())
        .ok_or_else(|| Stage::Command.failed("the command's process", "it has no id"))
}

/// Becomes the command. Returns what the process exits with if that fails.
pub(crate) fn replace(arguments: &[OsString]) -> ExitCode {
    let [mode, uid, gid, program, rest @ ..] = arguments else { return ExitCode::from(NOT_EXECUTABLE) };
    let error = become_command(mode, [uid, gid], program, rest);
    eprintln!("hwvmm: cannot run {}: {error}", program.display());
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE })
}

fn become_command(mode: &OsStr, ids: [&OsString; 2], program: &OsStr, arguments: &[OsString]) -> io::Error {
    let [Some(uid), Some(gid)] = ids.map(|id| id.to_str().and_then(|digits| digits.parse().ok())) else {
        return io::ErrorKind::InvalidInput.into();
    };
    if let Err(error) = rustix::process::setsid() {
        return error.into();
    }
    if mode == TERMINAL
        && let Err(error) = rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())
    {
        return error.into();
    }
    Command::new(program).args(arguments).gid(gid).uid(uid).exec()
}
