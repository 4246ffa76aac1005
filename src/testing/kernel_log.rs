//! The kernel's log of a run whose stdout is a command's: a file that the run writes (`--kernel-log`), read as it grows.

use super::log::{Findings, Log, Panic};
use std::fs::File;
use std::io::{self, Read};

/// Bytes that a log may have. It is a guest's, which may print for ever.
const MAX_BYTES: u64 = 64 << 20;
/// Bytes of one read.
const READ_BYTES: usize = 256 << 10;

/// A log that is read.
pub(super) struct KernelLog {
    file: File,
    log: Log,
}

/// What there was in a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// No bytes: the log has nothing new.
    Nothing,
    /// New bytes were read.
    Some,
    /// The log has more bytes than its limit: it is not read again.
    TooMuch,
}

impl KernelLog {
    pub(super) fn new(file: File, log: Log) -> Self {
        Self { file, log }
    }

    /// Takes what has come, a bounded amount.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub(super) fn read(&mut self) -> io::Result<Taken> {
        if self.file.metadata()?.len() > MAX_BYTES {
            return Ok(Taken::TooMuch);
        }
        let mut bytes = vec![0; READ_BYTES];
        let count = self.file.read(&mut bytes)?;
        self.log.take(bytes.get(..count).unwrap_or_default())?;
        Ok(if count == 0 { Taken::Nothing } else { Taken::Some })
    }

    /// What the kernel has said of a panic.
    pub(super) fn panic(&self) -> Panic {
        self.log.panic()
    }

    /// What was found in the log.
    ///
    /// # Errors
    /// As [`Log::finish`].
    pub(super) fn finish(self) -> io::Result<Findings> {
        self.log.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::KtapUse;
    use super::super::log::Source;
    use super::*;
    use std::io::Write;

    #[test]
    fn a_log_is_read_as_it_grows_and_has_a_limit() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut writer = file.reopen().expect("opened");
        let mut log =
            KernelLog::new(file.reopen().expect("opened"), Log::new(Source::KernelLog, None, KtapUse::Ignored));
        assert_eq!(log.read().expect("read"), Taken::Nothing);
        writer.write_all(b"Kernel panic - not").expect("written");
        assert_eq!(log.read().expect("read"), Taken::Some);
        assert_eq!(log.panic(), Panic::None);
        writer.write_all(b" syncing: x\n").expect("written");
        assert_eq!((log.read().expect("read"), log.panic()), (Taken::Some, Panic::Begun));
        writer.set_len(MAX_BYTES + 1).expect("longer");
        assert_eq!(log.read().expect("read"), Taken::TooMuch);
        assert_eq!(log.finish().expect("taken").panic.as_deref(), Some("x"));
    }
}
