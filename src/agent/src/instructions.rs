//! What the agent is told to do: `/hwvmm/instructions`, records `key=value` that end in NUL.

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

/// The instructions, as plain data.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Instructions {
    /// File names below /hwvmm/modules, in the order in which they are loaded.
    pub(crate) modules: Vec<OsString>,
    pub(crate) signatures: Signatures,
    pub(crate) root: Root,
    pub(crate) writable: Vec<Writable>,
    /// The command and its arguments; never empty.
    pub(crate) command: Vec<OsString>,
    pub(crate) environment: Vec<(OsString, OsString)>,
    pub(crate) workdir: PathBuf,
    pub(crate) user: User,
    pub(crate) hostname: Option<OsString>,
    /// There if the command gets a pseudo-terminal.
    pub(crate) terminal: Option<Window>,
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

impl Instructions {
    /// Reads the records of `/hwvmm/instructions`.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, InstructionsError> {
        let mut instructions = Self { workdir: PathBuf::from("/"), ..Self::default() };
        let records = match bytes {
            [] => return Err(InstructionsError::NoCommand),
            [records @ .., 0] => records,
            _ => return Err(InstructionsError::CutOff),
        };
        for record in records.split(|byte| *byte == 0) {
            let (key, value) = split(record, b'=').ok_or_else(|| InstructionsError::NoValue(text(record)))?;
            instructions.record(key, value)?;
        }
        if instructions.command.is_empty() {
            return Err(InstructionsError::NoCommand);
        }
        for (name, value) in DEFAULT_ENVIRONMENT {
            if !instructions.environment.iter().any(|(given, _)| given == name) {
                instructions.environment.push((name.into(), value.into()));
            }
        }
        Ok(instructions)
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), InstructionsError> {
        let wrong = |key, expected| InstructionsError::Value { key, value: text(value), expected };
        match key {
            b"module" if value.is_empty() || value.contains(&b'/') => return Err(wrong("module", "a file name")),
            b"module" => self.modules.push(text(value)),
            b"signatures" if value == b"left-out" => self.signatures = Signatures::LeftOut,
            b"signatures" => return Err(wrong("signatures", "\"left-out\"")),
            b"root" => {
                let disk = |value| {
                    let (partition, serial) = split(value, b':')?;
                    Some(Root::Disk { serial: text(serial), partition: number(partition)? })
                };
                self.root = match (value.strip_prefix(b"share:"), value.strip_prefix(b"disk:").and_then(disk)) {
                    (Some(tag), _) => Root::Share(text(tag)),
                    (None, Some(disk)) => disk,
                    (None, None) if value == b"none" => Root::Initramfs,
                    (None, None) => return Err(wrong("root", "\"none\", \"share:TAG\" or \"disk:PARTITION:SERIAL\"")),
                }
            }
            b"rw" => {
                let (tag, path) = split(value, b':').ok_or_else(|| wrong("rw", "TAG:/PATH"))?;
                if !path.starts_with(b"/") {
                    return Err(wrong("rw", "TAG:/PATH"));
                }
                self.writable.push(Writable { tag: text(tag), path: text(path).into() });
            }
            b"arg" => self.command.push(text(value)),
            b"env" => {
                let (name, value) = split(value, b'=')
                    .filter(|(name, _)| !name.is_empty())
                    .ok_or_else(|| wrong("env", "NAME=VALUE"))?;
                self.environment.push((text(name), text(value)));
            }
            b"workdir" if !value.starts_with(b"/") => return Err(wrong("workdir", "an absolute path")),
            b"workdir" => self.workdir = text(value).into(),
            b"user" => {
                let ids = split(value, b':').and_then(|(uid, gid)| Some(User { uid: number(uid)?, gid: number(gid)? }));
                self.user = ids.ok_or_else(|| wrong("user", "UID:GID"))?;
            }
            b"hostname" => self.hostname = Some(text(value)),
            b"terminal" => {
                let size = split(value, b'x')
                    .and_then(|(rows, columns)| Some(Window { rows: number(rows)?, columns: number(columns)? }));
                self.terminal = Some(size.ok_or_else(|| wrong("terminal", "ROWSxCOLS"))?);
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

    #[test]
    fn all_keys_are_read() {
        let bytes = b"module=a.ko\0module=b.ko\0root=share:hwvmm-root\0rw=hwvmm-rw0:/srv/a:b\0arg=sh\0arg=-c\0arg=\0env=A=b=c\0\
            env=TERM=\0workdir=/tmp\0user=1000:100\0hostname=guest\0terminal=24x80\0";
        let read = Instructions::parse(bytes).expect("instructions");
        assert_eq!(read.modules, ["a.ko", "b.ko"]);
        assert_eq!(read.root, Root::Share("hwvmm-root".into()));
        assert_eq!(read.writable, [Writable { tag: "hwvmm-rw0".into(), path: "/srv/a:b".into() }]);
        assert_eq!(read.command, ["sh", "-c", ""]);
        assert_eq!(read.environment[0], ("A".into(), "b=c".into()));
        let terms: Vec<_> = read.environment.iter().filter(|(name, _)| name == "TERM").collect();
        assert_eq!(terms, [&("TERM".into(), "".into())]);
        assert!(read.environment.iter().any(|(name, _)| name == "PATH"));
        assert_eq!(read.workdir, PathBuf::from("/tmp"));
        let disk = Instructions::parse(b"root=disk:3:hwvmm-root\0arg=a\0").expect("instructions");
        assert_eq!(disk.root, Root::Disk { serial: "hwvmm-root".into(), partition: 3 });
        assert_eq!((read.signatures, disk.signatures), (Signatures::Checked, Signatures::Checked));
        let unsigned = Instructions::parse(b"signatures=left-out\0arg=a\0").expect("instructions");
        assert_eq!(unsigned.signatures, Signatures::LeftOut);
        assert_eq!(read.user, User { uid: 1000, gid: 100 });
        assert_eq!(read.terminal, Some(Window { rows: 24, columns: 80 }));
    }

    #[test]
    fn bytes_that_are_not_utf8_are_kept() {
        let read = Instructions::parse(b"arg=a\xff\n\0").expect("instructions");
        assert_eq!(read.command, [OsString::from_vec(b"a\xff\n".to_vec())]);
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
            b"arg=a\0env==b\0",
            b"arg=a\0\0",
        ];
        for bytes in refused {
            assert!(Instructions::parse(bytes).is_err(), "{:?}", text(bytes));
        }
    }
}
