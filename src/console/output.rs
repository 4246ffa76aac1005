//! Output of a console: what a device hands on is written before the vCPU, or the device's thread, goes on.

use super::line;
use super::watch::{Fed, Watch};
use crate::exit::EndReason;
use crate::vcpu::Control;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

/// How long to wait for room in a pipe or terminal before checking whether the run has ended.
const CHECK_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How many [`CHECK_INTERVAL`]s after the end of the run the final output may take. The rest is dropped.
const FINAL_OUTPUT_CHECKS: u32 = 10;

/// Where a console's output goes.
#[derive(Debug)]
pub enum Sink {
    /// To a copy of stdout.
    Stdout(File),
    /// To another file, terminal or pipe.
    File(File),
    /// To nowhere: output is discarded.
    Null,
}

/// Writes a console's output.
pub struct Output {
    sink: Sink,
    watch: Watch,
    control: Arc<Control>,
    on_a_device_thread: bool,
    /// The run has ended, and the final output had no reader in time.
    dropped: bool,
}

/// What waiting for room has come to.
enum Room {
    /// The file takes bytes.
    Ready,
    /// The run has ended, and the file takes nothing.
    GivenUp,
}

impl Output {
    /// Writes to `sink`. `watch` reads the bytes, too, and can end the run.
    #[must_use]
    pub fn new(sink: Sink, watch: Watch, control: Arc<Control>) -> Self {
        Self { sink, watch, control, on_a_device_thread: false, dropped: false }
    }

    /// Prepares it for a thread that no signal interrupts: it never blocks in `write`, and drops what has not been taken
    /// 1 s after the end of the run.
    #[must_use]
    pub fn on_a_device_thread(self) -> Self {
        Self { on_a_device_thread: true, ..self }
    }

    /// Waits until `file` takes bytes, or until the final output's time is over.
    fn wait_for_room(&self, file: &File) -> io::Result<Room> {
        let mut checks = FINAL_OUTPUT_CHECKS;
        loop {
            match poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&CHECK_INTERVAL)) {
                Ok(0) if self.control.is_stopping() => match checks.checked_sub(1) {
                    Some(fewer) => checks = fewer,
                    None => return Ok(Room::GivenUp),
                },
                // A vCPU that is kicked to stop.
                Err(Errno::INTR) if self.control.is_stopping() => return Ok(Room::GivenUp),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(Room::Ready),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes some bytes and returns how many. Waits while the reader takes none, unless the run has ended: then they are
    /// dropped, and count as written.
    fn write_some(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (Sink::Stdout(file) | Sink::File(file)) = &self.sink else { return Ok(bytes.len()) };
        if self.dropped {
            return Ok(bytes.len());
        }
        loop {
            if self.on_a_device_thread && matches!(self.wait_for_room(file)?, Room::GivenUp) {
                self.dropped = true;
                return Ok(bytes.len());
            }
            match rustix::io::write(file, bytes) {
                Ok(count) => return Ok(count),
                Err(Errno::INTR | Errno::AGAIN) if self.control.is_stopping() => return Ok(bytes.len()),
                Err(Errno::INTR) => {}
                // Another process that shares the terminal may have made it non-blocking.
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
        let watch = self.watch.clone();
        let _writing = watch.writing();
        let count = self.write_some(bytes).inspect_err(|error| {
            let what = format!("cannot write the console's output: {error}");
            self.control.end(EndReason::Failed(what), None);
        })?;
        if matches!(self.sink, Sink::Stdout(_)) {
            line::written(&bytes[..count]);
        }
        match watch.feed(&bytes[..count]) {
            Fed::Nothing => {}
            Fed::LineBegan => self.control.wake(),
            Fed::End(end) => self.control.line_seen(end),
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
