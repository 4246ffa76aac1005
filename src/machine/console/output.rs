//! Output: every byte is written before the guest goes on.

use super::watch::Watch;
use crate::exit::End;
use crate::vcpu::Control;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

/// Where a UART's output goes.
pub struct Output {
    file: Option<File>,
    watch: Watch,
    control: Arc<Control>,
}

impl Output {
    /// Writes to `file` (nowhere, if `None`), watched by `watch`, which can end the run.
    #[must_use]
    pub fn new(file: Option<File>, watch: Watch, control: Arc<Control>) -> Self {
        Self { file, watch, control }
    }

    /// Writes what it can; waits while the other side does not take it, unless the run is over.
    fn write_some(&self, file: &File, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(file, bytes) {
                Ok(count) => return Ok(count),
                Err(Errno::INTR | Errno::AGAIN) if self.control.is_stopping() => return Ok(bytes.len()),
                Err(Errno::INTR) => {}
                // The terminal may be non-blocking because whoever shares it made it so.
                Err(Errno::AGAIN) => match poll(&mut [PollFd::new(file, PollFlags::OUT)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                },
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match &self.file {
            Some(file) => self.write_some(file, bytes).inspect_err(|error| {
                let what = format!("cannot write the console's output: {error}");
                self.control.end(End::Failed(what), None);
            })?,
            None => bytes.len(),
        };
        if let Some(end) = self.watch.feed(&bytes[..count]) {
            self.control.end(end, None);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
