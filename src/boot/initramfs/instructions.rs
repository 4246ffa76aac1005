//! What the agent is told to do, in the form that it reads (src/agent/src/instructions.rs).

use super::error::InitramfsError;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// The most bytes of instructions: as much as execve(2) takes of arguments and environment on most hosts.
const MAX_BYTES: usize = 2 << 20;

/// The file system that becomes the guest's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestRoot {
    /// The initramfs stays the root.
    Initramfs,
    /// The virtiofs share with this tag, read-only, under a tmpfs that takes what is written.
    Share(OsString),
    /// The ext file system of a disk, read-only, under a tmpfs that takes what is written.
    Disk {
        /// The serial number of the virtio disk (virtio 1.3 section 5.2.6.1).
        serial: String,
        /// The number of its partition; 0 for the whole disk.
        partition: u32,
    },
}

/// What becomes of the signatures of modules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Signatures {
    /// The kernel checks them.
    #[default]
    Checked,
    /// They are left out, where the kernel takes modules without them.
    LeftOut,
}

/// A virtiofs share that the agent mounts read-write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritableShare {
    /// The tag of the virtiofs device (virtio 1.3 section 5.11.4), by which it is mounted.
    pub tag: OsString,
    /// The mount point: an absolute path in the new root.
    pub path: PathBuf,
}

/// An environment variable of the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// The name, without `=`.
    pub name: OsString,
    /// The value: any bytes but NUL.
    pub value: OsString,
}

/// Who the command runs as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestUser {
    /// The numeric user ID (setuid(2)).
    pub uid: u32,
    /// The numeric group ID (setgid(2)).
    pub gid: u32,
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// The height in lines.
    pub rows: u16,
    /// The width in characters.
    pub columns: u16,
}

/// A command, and what it finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandSpec {
    /// The command and its arguments.
    pub command: Vec<OsString>,
    /// Beside these the command has PATH, HOME and TERM.
    pub environment: Vec<Variable>,
    /// The command's working directory: an absolute path in the new root.
    pub workdir: PathBuf,
    /// Who the command runs as.
    pub user: GuestUser,
    /// The guest's host name; the kernel's own where it is `None`.
    pub hostname: Option<OsString>,
    /// The size of the command's terminal; `None` if it gets none.
    pub terminal: Option<TerminalSize>,
}

/// When the agent gets its command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentTask {
    /// With the instructions.
    Run(CommandSpec),
    /// Later, on the control stream ([`CommandSpec::message`]).
    Wait,
}

/// What the agent is told to do, as plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instructions {
    /// What becomes of the signatures of modules.
    pub signatures: Signatures,
    /// Where the command's root file system comes from.
    pub root: GuestRoot,
    /// Shares over folders of the root.
    pub writable: Vec<WritableShare>,
    /// What the agent is to do then.
    pub task: AgentTask,
}

impl CommandSpec {
    /// The message by which an agent gets the command that waits for one: the line `command LENGTH`, and as many bytes of records.
    ///
    /// # Errors
    /// [`InitramfsError::Nul`] and [`InitramfsError::TooMuch`].
    pub fn message(&self) -> Result<Vec<u8>, InitramfsError> {
        let mut records = Records::default();
        self.records(&mut records)?;
        let mut message = format!("command {}\n", records.bytes.len()).into_bytes();
        message.append(&mut records.bytes);
        Ok(message)
    }

    fn records(&self, records: &mut Records) -> Result<(), InitramfsError> {
        for argument in &self.command {
            records.add("arg", [argument.as_bytes()])?;
        }
        for variable in &self.environment {
            records.add("env", [variable.name.as_bytes(), b"=", variable.value.as_bytes()])?;
        }
        records.add("workdir", [self.workdir.as_os_str().as_bytes()])?;
        records.add("user", [format!("{}:{}", self.user.uid, self.user.gid).as_bytes()])?;
        if let Some(name) = &self.hostname {
            records.add("hostname", [name.as_bytes()])?;
        }
        if let Some(size) = self.terminal {
            records.add("terminal", [format!("{}x{}", size.rows, size.columns).as_bytes()])?;
        }
        Ok(())
    }
}

impl Instructions {
    /// The bytes of /hwvmm/instructions; `modules` are file names in /hwvmm/modules.
    ///
    /// # Errors
    /// [`InitramfsError::Nul`] and [`InitramfsError::TooMuch`].
    pub(super) fn encode<'a>(&self, modules: impl Iterator<Item = &'a str>) -> Result<Vec<u8>, InitramfsError> {
        let mut records = Records::default();
        for module in modules {
            records.add("module", [module.as_bytes()])?;
        }
        if self.signatures == Signatures::LeftOut {
            records.add("signatures", [&b"left-out"[..]])?;
        }
        match &self.root {
            GuestRoot::Initramfs => records.add("root", [&b"none"[..]])?,
            GuestRoot::Share(tag) => records.add("root", [b"share:", tag.as_bytes()])?,
            GuestRoot::Disk { serial, partition } => {
                records.add("root", [format!("disk:{partition}:{serial}").as_bytes()])?;
            }
        }
        for share in &self.writable {
            records.add("rw", [share.tag.as_bytes(), b":", share.path.as_os_str().as_bytes()])?;
        }
        match &self.task {
            AgentTask::Run(command) => command.records(&mut records)?,
            AgentTask::Wait => records.add("wait", [])?,
        }
        Ok(records.bytes)
    }
}

#[derive(Default)]
struct Records {
    bytes: Vec<u8>,
}

impl Records {
    fn add<'a>(&mut self, key: &str, parts: impl IntoIterator<Item = &'a [u8]>) -> Result<(), InitramfsError> {
        self.bytes.extend_from_slice(key.as_bytes());
        self.bytes.push(b'=');
        for part in parts {
            if part.contains(&0) {
                return Err(InitramfsError::Nul(OsStr::from_bytes(part).to_owned()));
            }
            self.bytes.extend_from_slice(part);
        }
        self.bytes.push(0);
        if self.bytes.len() > MAX_BYTES {
            return Err(InitramfsError::TooMuch {
                what: "the command, its arguments and its environment have",
                max_bytes: MAX_BYTES,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instructions() -> Instructions {
        Instructions {
            signatures: Signatures::Checked,
            root: GuestRoot::Share("hwvmm-root".into()),
            writable: vec![WritableShare { tag: "hwvmm-rw0".into(), path: "/srv".into() }],
            task: AgentTask::Run(command()),
        }
    }

    fn command() -> CommandSpec {
        CommandSpec {
            command: vec!["sh".into(), "".into()],
            environment: vec![Variable { name: "A".into(), value: "b=c".into() }],
            workdir: "/tmp".into(),
            user: GuestUser { uid: 1000, gid: 100 },
            hostname: Some("guest".into()),
            terminal: Some(TerminalSize { rows: 24, columns: 80 }),
        }
    }

    #[test]
    fn a_command_that_comes_later_is_a_message_with_its_length() {
        let waiting = Instructions { task: AgentTask::Wait, writable: Vec::new(), ..instructions() };
        let bytes = waiting.encode(["a.ko"].into_iter()).expect("bytes");
        assert_eq!(bytes, b"module=a.ko\0root=share:hwvmm-root\0wait=\0");
        // The agent's tests read the same records.
        let records = b"arg=sh\0arg=\0env=A=b=c\0workdir=/tmp\0user=1000:100\0hostname=guest\0terminal=24x80\0";
        let message = command().message().expect("bytes");
        assert_eq!(message, [format!("command {}\n", records.len()).as_bytes(), records].concat());
        let long = CommandSpec { command: vec!["a".repeat(MAX_BYTES).into()], ..command() };
        assert!(matches!(long.message(), Err(InitramfsError::TooMuch { .. })));
    }

    #[test]
    fn records_are_as_the_agent_reads_them() {
        let bytes = instructions().encode(["a.ko", "b.ko"].into_iter()).expect("bytes");
        // The agent's test has the same bytes, but for a second argument.
        let expected = b"module=a.ko\0module=b.ko\0root=share:hwvmm-root\0rw=hwvmm-rw0:/srv\0arg=sh\0arg=\0env=A=b=c\0\
            workdir=/tmp\0user=1000:100\0hostname=guest\0terminal=24x80\0";
        assert_eq!(String::from_utf8_lossy(&bytes), String::from_utf8_lossy(expected));
        let root = GuestRoot::Disk { serial: "hwvmm-root".into(), partition: 3 };
        let disk = Instructions { root, ..instructions() }.encode(std::iter::empty()).expect("bytes");
        assert!(disk.starts_with(b"root=disk:3:hwvmm-root\0"));
        let unsigned = Instructions { signatures: Signatures::LeftOut, ..instructions() };
        assert!(
            unsigned
                .encode(["a.ko"].into_iter())
                .expect("bytes")
                .starts_with(b"module=a.ko\0signatures=left-out\0root=")
        );
    }

    #[test]
    fn what_cannot_be_a_record_is_refused() {
        let with = |argument: String| {
            let task = AgentTask::Run(CommandSpec { command: vec![argument.into()], ..command() });
            Instructions { task, ..instructions() }
        };
        assert!(matches!(with("a\0arg=b".into()).encode(std::iter::empty()), Err(InitramfsError::Nul(_))));
        let long = with("a".repeat(MAX_BYTES));
        assert!(matches!(long.encode(std::iter::empty()), Err(InitramfsError::TooMuch { .. })));
    }
}
