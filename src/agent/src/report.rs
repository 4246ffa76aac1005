//! How a run ends, and how the host gets to know.

use crate::control::{End, ToHost, printable};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, pwrite};
use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// The I/O port of the exit status or the signal's number.
const STATUS_PORT: u64 = 0x5e8;
/// The I/O port of the kind of the end. hwvmm ends the run at a write to it.
const KIND_PORT: u64 = 0x5e9;
/// How long one wait at the end of a run may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What the agent was doing, as the host is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Mounts,
    Instructions,
    Modules,
    Connect,
    Root,
    Workdir,
    Terminal,
    Command,
    Streams,
}

impl Stage {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Mounts => "mounts",
            Self::Instructions => "instructions",
            Self::Modules => "modules",
            Self::Connect => "connect",
            Self::Root => "root",
            Self::Workdir => "workdir",
            Self::Terminal => "terminal",
            Self::Command => "command",
            Self::Streams => "streams",
        }
    }

    pub(crate) fn failed(self, what: impl fmt::Display, source: impl fmt::Display) -> Failure {
        Failure { stage: self, text: format!("{what}: {source}") }
    }
}

/// The agent cannot go on.
#[derive(Debug, Error)]
#[error("{}: {text}", .stage.name())]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    pub(crate) text: String,
}

/// Writes a line to the kernel's log. Nothing is left to do where that fails.
pub(crate) fn kernel_log(text: &str) {
    if let Ok(mut log) = std::fs::OpenOptions::new().write(true).open("/dev/kmsg") {
        // 3 is KERN_ERR, which `quiet` lets through.
        let _ = log.write_all(format!("<3>hwvmm-agent: {}\n", printable(text)).as_bytes());
    }
}

/// Tells the host how the run ends.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    ports: Option<OwnedFd>,
    control: Option<Rc<OwnedFd>>,
}

impl Reporter {
    /// Opens the I/O ports while the initramfs is the root; `file` stands for them in tests.
    pub(crate) fn open(&mut self, file: Option<&Path>) {
        let path = file.unwrap_or(Path::new("/dev/port"));
        match rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(ports) => self.ports = Some(ports),
            // Debian's cloud kernels are built without CONFIG_DEVPORT: the host takes the status of the control stream.
            Err(Errno::NOENT) => {}
            Err(error) => kernel_log(&format!("{}: {error}", path.display())),
        }
    }

    /// Takes the control stream.
    pub(crate) fn control(&mut self, socket: OwnedFd) -> Result<Rc<OwnedFd>, Failure> {
        rustix::io::ioctl_fionbio(&socket, true).map_err(|error| Stage::Connect.failed("control", error))?;
        let control = Rc::new(socket);
        self.control = Some(Rc::clone(&control));
        Ok(control)
    }

    /// Sends a line to the host, which has to take it within [`PATIENCE`].
    pub(crate) fn say(&self, message: &ToHost<'_>) -> Result<(), Errno> {
        let Some(control) = &self.control else { return Ok(()) };
        let text = message.to_string();
        let mut rest = text.as_bytes();
        let deadline = Instant::now() + PATIENCE;
        while !rest.is_empty() {
            match rustix::io::write(control, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {
                    crate::streams::wait_for(control, rustix::event::PollFlags::OUT, deadline)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the host why the agent cannot go on, where there is a connection.
    pub(crate) fn failed(&self, failure: &Failure) {
        // The kernel's log and the status port say so too.
        let _ = self.say(&ToHost::Failed { stage: failure.stage.name(), text: &failure.text });
    }

    /// Writes the status to the I/O ports, where hwvmm ends the run. Powers the machine off where nothing listens there.
    pub(crate) fn end(&self, end: End) {
        let (done, wait) = mpsc::channel();
        std::thread::spawn(move || {
            rustix::fs::sync();
            let _ = done.send(());
        });
        // A share whose host does not answer must not hold the status back.
        let _ = wait.recv_timeout(PATIENCE);
        let (status, kind) = match end {
            End::Exited(status) => (status, 1),
            End::Signaled(signal) => (signal, 2),
            End::Failed => (0, 3),
        };
        if let Some(ports) = &self.ports {
            for (port, byte) in [(STATUS_PORT, status), (KIND_PORT, kind)] {
                if let Err(error) = pwrite(ports, &[byte], port) {
                    kernel_log(&format!("port {port:#x}: {error}"));
                }
            }
        }
        if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
            kernel_log(&format!("power off: {error}"));
        }
    }
}
