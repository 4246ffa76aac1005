//! The command's process. With a terminal the agent starts itself once more, which makes a session, takes the terminal and the user's
//! rights, and then becomes the command. Without one that is left out: what the agent's C library asks of the processor when it starts is
//! some 35 VM exits.

use crate::instructions::{CommandSpec, User};
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

/// Starts the command. Its process is the leader of a process group, and with a terminal of a session.
pub(crate) fn start(spec: &CommandSpec, stdios: Stdios) -> Result<Pid, Failure> {
    let directly = match spec.terminal {
        None => start_directly(spec, &stdios).ok(),
        Some(_) => None,
    };
    // What cannot be started is said by the second start, on the command's own stderr.
    let id = match directly {
        Some(id) => id,
        None => start_again(spec, stdios).map_err(|error| Stage::Command.failed("the command's process", error))?,
    };
    Pid::from_raw(id.cast_signed()).ok_or_else(|| Stage::Command.failed("the command's process", "it has no id"))
}

/// Starts the command as a child of this process, in its session. Returns the child's id.
fn start_directly(spec: &CommandSpec, stdios: &Stdios) -> io::Result<u32> {
    let [program, arguments @ ..] = spec.command.as_slice() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let copy = |stream: &OwnedFd| stream.try_clone();
    let stdios = Stdios { stdin: copy(&stdios.stdin)?, stdout: copy(&stdios.stdout)?, stderr: copy(&stdios.stderr)? };
    let mut command = Command::new(program);
    command.args(arguments).process_group(0);
    // The agent itself has the default ones.
    if spec.user != User::default() {
        command.gid(spec.user.gid).uid(spec.user.uid);
    }
    spawn(&mut command, spec, stdios)
}

fn start_again(spec: &CommandSpec, stdios: Stdios) -> io::Result<u32> {
    let mode = if spec.terminal.is_some() { TERMINAL } else { PIPES };
    let User { uid, gid } = spec.user;
    let mut command = Command::new("/proc/self/exe");
    command.args([EXEC, mode, &uid.to_string(), &gid.to_string()]).args(&spec.command);
    spawn(&mut command, spec, stdios)
}

/// Starts a process in the command's folder, with its environment and its streams. Returns the process' id.
fn spawn(command: &mut Command, spec: &CommandSpec, stdios: Stdios) -> io::Result<u32> {
    let child = command
        .env_clear()
        .envs(spec.environment.iter().map(|(name, value)| (name, value)))
        .current_dir(&spec.workdir)
        .stdin(Stdio::from(stdios.stdin))
        .stdout(Stdio::from(stdios.stdout))
        .stderr(Stdio::from(stdios.stderr))
        .spawn()?;
    Ok(child.id())
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitOptions, WaitStatus, waitpid};
    use std::fs::File;
    use std::io::Read;
    use std::path::PathBuf;

    fn run(command: &[&str]) -> (String, Option<i32>) {
        let (mut output, stdout) = std::io::pipe().expect("a pipe");
        let null = || OwnedFd::from(File::open("/dev/null").expect("/dev/null"));
        let stdios = Stdios { stdin: null(), stdout: stdout.into(), stderr: null() };
        let spec = CommandSpec {
            command: command.iter().map(OsString::from).collect(),
            environment: vec![("PATH".into(), "/usr/bin:/bin".into()), ("A".into(), "b c".into())],
            workdir: PathBuf::from("/"),
            user: User::default(),
            hostname: None,
            terminal: None,
        };
        let child = start_directly(&spec, &stdios).and_then(|id| {
            drop(stdios);
            Pid::from_raw(id.cast_signed()).ok_or_else(|| io::ErrorKind::Other.into())
        });
        let Ok(child) = child else { return (String::new(), None) };
        let mut text = String::new();
        output.read_to_string(&mut text).expect("text");
        let ended = waitpid(Some(child), WaitOptions::empty()).expect("waited").map(|(_, status)| status);
        (text, ended.and_then(WaitStatus::exit_status))
    }

    #[test]
    fn a_command_without_a_terminal_has_its_folder_environment_and_process_group() {
        let script = "pwd; echo $A; [ $(cut -d ' ' -f 5 /proc/$$/stat) = $$ ] && exit 7";
        assert_eq!(run(&["sh", "-c", script]), ("/\nb c\n".to_owned(), Some(7)));
    }

    #[test]
    fn a_command_that_is_not_there_is_left_to_the_second_start() {
        assert_eq!(run(&["no-such-command"]).1, None);
        assert_eq!(run(&["/etc/passwd"]).1, None);
    }
}
