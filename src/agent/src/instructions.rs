//! What the agent is told to do: `/hwvmm/instructions`, records `key=value` that end in NUL. What is about the command alone may come later,
//! on the control stream (`wait.rs`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use thiserror::Error;

/// The file with the instructions, in the initramfs.
pub(crate) const INSTRUCTIONS: &str = "/hwvmm/instructions";
/// The environment that a command has where the instructions do not say otherwise.
const DEFAULT_ENVIRONMENT: &[(&str, &str)] =
    &[("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root"), ("TERM", "linux")];

/// Why the instructions cannot be followed.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InstructionsError {
    #[error("the last record does not end in NUL")]
    CutOff,
    #[error("a record has no \"=\": {0:?}")]
    NoValue(OsString),
    #[error("unknown key {0:?}")]
    UnknownKey(OsString),
    #[error("{key}={value:?} is not {expected}")]
    Value { key: &'static str, value: OsString, expected: &'static str },
    #[error("there is no command (arg=)")]
    NoCommand,
    #[error("the command is to come later (wait=), and {0:?} is about it")]
    TooEarly(OsString),
}

/// The file system that becomes the root.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Root {
    /// The initramfs stays the root.
    #[default]
    Initramfs,
    /// The virtiofs share with this tag, read-only, under a tmpfs that takes what is written.
    Share(OsString),
    /// The ext file system on a partition (0: the whole) of the disk with this serial number, likewise.
    Disk { serial: OsString, partition: u32 },
}

/// What becomes of the signatures of modules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Signatures {
    /// The kernel checks them.
    #[default]
    Checked,
    /// They are left out, where the kernel takes modules without them.
    LeftOut,
}

/// A virtiofs share that is mounted read-write.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Writable {
    pub(crate) tag: OsString,
    /// Absolute, in the new root.
    pub(crate) path: PathBuf,
}

/// Who the command runs as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// The command, and what it finds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CommandSpec {
    /// The command and its arguments; never empty.
    pub(crate) command: Vec<OsString>,
    pub(crate) environment: Vec<(OsString, OsString)>,
    pub(crate) workdir: PathBuf,
    pub(crate) user: User,
    pub(crate) hostname: Option<OsString>,
    /// There if the command gets a pseudo-terminal.
    pub(crate) terminal: Option<Window>,
}

/// When the agent gets its command.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Task {
    /// With the instructions.
    Run(CommandSpec),
    /// On the control stream, once the guest is ready.
    #[default]
    Wait,
}

/// The instructions, as plain data.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Instructions {
    /// File names below /hwvmm/modules, in the order in which they are loaded.
    pub(crate) modules: Vec<OsString>,
    pub(crate) signatures: Signatures,
    pub(crate) root: Root,
    pub(crate) writable: Vec<Writable>,
    pub(crate) task: Task,
    /// Tests: a folder with Unix sockets named by port, in place of vsock.
    pub(crate) sockets: Option<PathBuf>,
    /// Tests: a file in place of /dev/port.
    pub(crate) ports: Option<PathBuf>,
}

fn text(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.to_vec())
}

fn split(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = bytes.iter().position(|byte| *byte == at)?;
    Some((&bytes[..position], &bytes[position + 1..]))
}

fn number<N: std::str::FromStr>(digits: &[u8]) -> Option<N> {
    std::str::from_utf8(digits).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
}

/// If a key is one that was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Known,
    Unknown,
}

fn wrong(key: &'static str, value: &[u8], expected: &'static str) -> InstructionsError {
    InstructionsError::Value { key, value: text(value), expected }
}

/// A record, taken apart.
struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
}

/// Takes records apart into keys and values.
fn records(bytes: &[u8]) -> Result<Vec<Record<'_>>, InstructionsError> {
    let records = match bytes {
        [] => return Err(InstructionsError::NoCommand),
        [records @ .., 0] => records,
        _ => return Err(InstructionsError::CutOff),
    };
    let record = |record| {
        let (key, value) = split(record, b'=').ok_or_else(|| InstructionsError::NoValue(text(record)))?;
        Ok(Record { key, value })
    };
    records.split(|byte| *byte == 0).map(record).collect()
}

impl CommandSpec {
    fn new() -> Self {
        Self {
            command: Vec::new(),
            environment: Vec::new(),
            workdir: PathBuf::from("/"),
            user: User::default(),
            hostname: None,
            terminal: None,
        }
    }

    /// Reads the records that are about a command, where they come by themselves.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, InstructionsError> {
        let mut spec = Self::new();
        for Record { key, value } in records(bytes)? {
            if spec.record(key, value)? == Key::Unknown {
                return Err(InstructionsError::UnknownKey(text(key)));
            }
        }
        spec.finish()
    }

    /// Fills in what was not given.
    fn finish(mut self) -> Result<Self, InstructionsError> {
        if self.command.is_empty() {
            return Err(InstructionsError::NoCommand);
        }
        for (name, value) in DEFAULT_ENVIRONMENT {
            if !self.environment.iter().any(|(given, _)| given == name) {
                self.environment.push((name.into(), value.into()));
            }
        }
        Ok(self)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<Key, InstructionsError> {
        match key {
            b"arg" => self.command.push(text(value)),
            b"env" => {
                let (name, value) = split(value, b'=')
                    .filter(|(name, _)| !name.is_empty())
                    .ok_or_else(|| wrong("env", value, "NAME=VALUE"))?;
                self.environment.push((text(name), text(value)));
            }
            b"workdir" if !value.starts_with(b"/") => return Err(wrong("workdir", value, "an absolute path")),
            b"workdir" => self.workdir = text(value).into(),
            b"user" => {
                let ids = split(value, b':').and_then(|(uid, gid)| Some(User { uid: number(uid)?, gid: number(gid)? }));
                self.user = ids.ok_or_else(|| wrong("user", value, "UID:GID"))?;
            }
            b"hostname" => self.hostname = Some(text(value)),
            b"terminal" => {
                let size = split(value, b'x')
                    .and_then(|(rows, columns)| Some(Window { rows: number(rows)?, columns: number(columns)? }));
                self.terminal = Some(size.ok_or_else(|| wrong("terminal", value, "ROWSxCOLS"))?);
            }
            _ => return Ok(Key::Unknown),
        }
        Ok(Key::Known)
    }
}

impl Instructions {
    /// Reads the records of `/hwvmm/instructions`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, InstructionsError> {
        let mut instructions = Self::default();
        let mut spec = CommandSpec::new();
        let (mut waits, mut of_command) = (false, None);
        for Record { key, value } in records(bytes)? {
            if key == b"wait" {
                if !value.is_empty() {
                    return Err(wrong("wait", value, "empty"));
                }
                waits = true;
            } else if spec.record(key, value)? == Key::Known {
                of_command.get_or_insert(key);
            } else {
                instructions.record(key, value)?;
            }
        }
        instructions.task = match (waits, of_command) {
            (true, Some(key)) => return Err(InstructionsError::TooEarly(text(key))),
            (true, None) => Task::Wait,
            (false, _) => Task::Run(spec.finish()?),
        };
        Ok(instructions)
    }

    /// Takes a record that is not about the command.
    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), InstructionsError> {
        match key {
            b"module" if value.is_empty() || value.contains(&b'/') => {
                return Err(wrong("module", value, "a file name"));
            }
            b"module" => self.modules.push(text(value)),
            b"signatures" if value == b"left-out" => self.signatures = Signatures::LeftOut,
            b"signatures" => return Err(wrong("signatures", value, "\"left-out\"")),
            b"root" => {
                let disk = |value| {
                    let (partition, serial) = split(value, b':')?;
                    Some(Root::Disk { serial: text(serial), partition: number(partition)? })
                };
                self.root = match (value.strip_prefix(b"share:"), value.strip_prefix(b"disk:").and_then(disk)) {
                    (Some(tag), _) => Root::Share(text(tag)),
                    (None, Some(disk)) => disk,
                    (None, None) if value == b"none" => Root::Initramfs,
                    (None, None) => {
                        return Err(wrong("root", value, "\"none\", \"share:TAG\" or \"disk:PARTITION:SERIAL\""));
                    }
                }
            }
            b"rw" => {
                let (tag, path) = split(value, b':').ok_or_else(|| wrong("rw", value, "TAG:/PATH"))?;
                if !path.starts_with(b"/") {
                    return Err(wrong("rw", value, "TAG:/PATH"));
                }
                self.writable.push(Writable { tag: text(tag), path: text(path).into() });
            }
            b"test-sockets" => self.sockets = Some(text(value).into()),
            b"test-ports" => self.ports = Some(text(value).into()),
            _ => return Err(InstructionsError::UnknownKey(text(key))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(instructions: Instructions) -> CommandSpec {
        match instructions.task {
            Task::Run(spec) => spec,
            Task::Wait => panic!("no command"),
        }
    }

    #[test]
    fn all_keys_are_read() {
        let bytes = b"module=a.ko\0module=b.ko\0root=share:hwvmm-root\0rw=hwvmm-rw0:/srv/a:b\0arg=sh\0arg=-c\0arg=\0env=A=b=c\0\
            env=TERM=\0workdir=/tmp\0user=1000:100\0hostname=guest\0terminal=24x80\0";
        let read = Instructions::parse(bytes).expect("instructions");
        assert_eq!(read.modules, ["a.ko", "b.ko"]);
        assert_eq!(read.root, Root::Share("hwvmm-root".into()));
        assert_eq!(read.writable, [Writable { tag: "hwvmm-rw0".into(), path: "/srv/a:b".into() }]);
        let disk = Instructions::parse(b"root=disk:3:hwvmm-root\0arg=a\0").expect("instructions");
        assert_eq!(disk.root, Root::Disk { serial: "hwvmm-root".into(), partition: 3 });
        assert_eq!((read.signatures, disk.signatures), (Signatures::Checked, Signatures::Checked));
        let unsigned = Instructions::parse(b"signatures=left-out\0arg=a\0").expect("instructions");
        assert_eq!(unsigned.signatures, Signatures::LeftOut);
        let spec = command(read);
        assert_eq!(spec.command, ["sh", "-c", ""]);
        assert_eq!(spec.environment[0], ("A".into(), "b=c".into()));
        let terms: Vec<_> = spec.environment.iter().filter(|(name, _)| name == "TERM").collect();
        assert_eq!(terms, [&("TERM".into(), "".into())]);
        assert!(spec.environment.iter().any(|(name, _)| name == "PATH"));
        assert_eq!(spec.workdir, PathBuf::from("/tmp"));
        assert_eq!(spec.user, User { uid: 1000, gid: 100 });
        assert_eq!(spec.terminal, Some(Window { rows: 24, columns: 80 }));
        assert_eq!(spec.hostname, Some("guest".into()));
    }

    #[test]
    fn a_command_may_come_later() {
        let read = Instructions::parse(b"module=a.ko\0root=share:hwvmm-root\0wait=\0").expect("instructions");
        assert_eq!((read.task, read.modules.len()), (Task::Wait, 1));
        for early in ["arg=a", "env=A=b", "workdir=/", "user=0:0", "hostname=a", "terminal=1x1"] {
            let bytes = format!("wait=\0{early}\0");
            let error = Instructions::parse(bytes.as_bytes()).expect_err(early);
            assert!(matches!(error, InstructionsError::TooEarly(_)), "{error}");
        }
        let records = b"arg=sh\0arg=-c\0env=A=b\0workdir=/tmp\0user=1000:100\0hostname=guest\0terminal=24x80\0";
        let later = CommandSpec::parse(records).expect("a command");
        assert_eq!(later, command(Instructions::parse(records).expect("instructions")), "one parser for both");
    }

    #[test]
    fn a_command_that_comes_later_is_a_command_alone() {
        let refused: &[&[u8]] = &[
            b"",
            b"\0",
            b"arg=a",
            b"user=0:0\0",
            b"arg=a\0workdir=tmp\0",
            b"arg=a\0module=a.ko\0",
            b"arg=a\0root=none\0",
            b"arg=a\0rw=tag:/tmp\0",
            b"arg=a\0wait=\0",
            b"arg=a\0test-sockets=/\0",
        ];
        for bytes in refused {
            assert!(CommandSpec::parse(bytes).is_err(), "{:?}", text(bytes));
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_kept() {
        let read = Instructions::parse(b"arg=a\xff\n\0").expect("instructions");
        assert_eq!(command(read).command, [OsString::from_vec(b"a\xff\n".to_vec())]);
    }

    #[test]
    fn wrong_instructions_are_refused() {
        let refused: &[&[u8]] = &[
            b"",
            b"arg=a",
            b"arg\0",
            b"what=a\0arg=a\0",
            b"root=none\0",
            b"arg=a\0root=disk\0",
            b"arg=a\0root=disk:x:y\0",
            b"arg=a\0module=../a\0",
            b"arg=a\0module=\0",
            b"arg=a\0user=0\0",
            b"arg=a\0user=+1:1\0",
            b"arg=a\0user=4294967296:1\0",
            b"arg=a\0terminal=70000x1\0",
            b"arg=a\0workdir=tmp\0",
            b"arg=a\0signatures=x\0",
            b"arg=a\0rw=tag:tmp\0",
            b"wait=1\0",
            b"wait\0",
            b"arg=a\0env==b\0",
            b"arg=a\0\0",
        ];
        for bytes in refused {
            assert!(Instructions::parse(bytes).is_err(), "{:?}", text(bytes));
        }
    }
}
