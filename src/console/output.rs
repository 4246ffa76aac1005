//! Output: every byte is written before the guest goes on.

use super::watch::Watch;
use crate::exit::EndReason;
use crate::vcpu::Control;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

/// How long one waits before looking whether the run is over.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How often, after the run, before output that nobody takes is given up.
const LAST_WORDS: u32 = 20;

/// Where a console's output goes.
pub struct Output {
    file: Option<File>,
    watch: Watch,
    control: Arc<Control>,
    on_a_device_thread: bool,
    /// The run is over and nobody takes what is left.
    given_up: bool,
}

impl Output {
    /// Writes to `file` (nowhere, if `None`), watched by `watch`, which can end the run.
    #[must_use]
    pub fn new(file: Option<File>, watch: Watch, control: Arc<Control>) -> Self {
        Self { file, watch, control, on_a_device_thread: false, given_up: false }
    }

    /// For a thread that no signal reaches: it never waits in `write`, and gives up some time after the run is over.
    #[must_use]
    pub fn on_a_device_thread(self) -> Self {
        Self { on_a_device_thread: true, ..self }
    }

    /// Waits until `file` takes something; false where nobody will take it any more.
    fn wait_for_room(&self, file: &File) -> io::Result<bool> {
        let mut patience = LAST_WORDS;
        loop {
            match poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&LOOK_AGAIN)) {
                Ok(0) if self.control.is_stopping() => match patience.checked_sub(1) {
                    Some(less) => patience = less,
                    None => return Ok(false),
                },
                // A vCPU that is kicked to stop.
                Err(Errno::INTR) if self.control.is_stopping() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes what it can; waits while the other side does not take it, unless the run is over.
    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(file) = self.file.as_ref().filter(|_| !self.given_up) else { return Ok(bytes.len()) };
        loop {
            if self.on_a_device_thread && !self.wait_for_room(file)? {
                self.given_up = true;
                return Ok(bytes.len());
            }
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
        let count = self.write_some(bytes).inspect_err(|error| {
            let what = format!("cannot write the console's output: {error}");
            self.control.end(EndReason::Failed(what), None);
        })?;
        if let Some(end) = self.watch.feed(&bytes[..count]) {
            self.control.end(end, None);
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
