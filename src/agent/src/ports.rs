//! Ports of a virtio console (virtio 1.3, 5.3): /dev/vportNpM, by their names in sysfs.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Where Linux names the ports.
const CLASS: &str = "/sys/class/virtio-ports";
/// What the host's names begin with.
const PREFIX: &str = "hwvmm.";
/// How long a port may take to be there, and to be connected: as a connection by vsock.
const CONNECT: Duration = Duration::from_secs(2);
/// How often that is looked at. The driver tells nobody but udev, and poll(2) does not wait for a port that is hung up.
const LOOK: Duration = Duration::from_millis(1);

/// There is no port.
#[derive(Debug, Error)]
pub(crate) enum PortError {
    #[error("neither has it ports of a virtio console (CONFIG_VIRTIO_CONSOLE)")]
    NoDriver,
    #[error("there is none")]
    Missing,
    #[error("the host does not connect it")]
    NotConnected,
    #[error("{0}")]
    Io(#[from] Errno),
}

/// The folder with the ports' devices. It is kept open: the command's root may have another /dev.
#[derive(Debug)]
pub(crate) struct Ports {
    dev: Rc<OwnedFd>,
}

/// A port's device, which can be opened again.
#[derive(Clone, Debug)]
pub(crate) struct PortDevice {
    dev: Rc<OwnedFd>,
    name: String,
}

impl PortDevice {
    pub(crate) fn open(&self) -> Result<OwnedFd, Errno> {
        openat(&*self.dev, &*self.name, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
    }
}

impl Ports {
    /// # Errors
    /// Where the kernel has no driver for ports.
    pub(crate) fn find() -> Result<Self, PortError> {
        if !Path::new(CLASS).exists() {
            return Err(PortError::NoDriver);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dev = rustix::fs::open("/dev", flags, Mode::empty())?;
        Ok(Self { dev: Rc::new(dev) })
    }

    /// Opens the port that the host has given `name`. The host may not have connected it yet.
    pub(crate) fn open(&self, name: &str) -> Result<(OwnedFd, PortDevice), PortError> {
        let found = until(Instant::now() + CONNECT, || named(Path::new(CLASS), name)).ok_or(PortError::Missing)?;
        let device = PortDevice { dev: Rc::clone(&self.dev), name: found };
        Ok((device.open()?, device))
    }

    /// As [`Self::open`], and waits until the host has connected the port.
    pub(crate) fn open_connected(&self, name: &str) -> Result<(OwnedFd, PortDevice), PortError> {
        let (file, device) = self.open(name)?;
        wait_connected(&file)?;
        Ok((file, device))
    }
}

/// Waits until the host has connected the port.
pub(crate) fn wait_connected(file: impl AsFd) -> Result<(), PortError> {
    let is_connected = || {
        let mut polled = [PollFd::new(&file, PollFlags::OUT)];
        let done = poll(&mut polled, Some(&Timespec::default()));
        let [polled] = polled;
        done.is_ok().then(|| polled.revents()).filter(|events| !events.contains(PollFlags::HUP))
    };
    until(Instant::now() + CONNECT, is_connected).map(drop).ok_or(PortError::NotConnected)
}

/// Asks `look` until it has an answer, or the deadline has passed.
fn until<T>(deadline: Instant, look: impl Fn() -> Option<T>) -> Option<T> {
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(LOOK);
    }
}

/// The device of the port that the host calls `name`, among those of the folder `class`.
fn named(class: &Path, name: &str) -> Option<String> {
    let entries = std::fs::read_dir(class).ok()?;
    let found = entries.flatten().find(|entry| {
        let text = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        text.trim_end().strip_prefix(PREFIX) == Some(name)
    })?;
    found.file_name().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_its_name() {
        let class = std::env::temp_dir().join(format!("hwvmm-agent-ports-{}", std::process::id()));
        for (device, name) in
            [("vport0p0", None), ("vport1p0", Some("hwvmm.stdin\n")), ("vport1p1", Some("hwvmm.stdout\n"))]
        {
            std::fs::create_dir_all(class.join(device)).expect("made");
            if let Some(name) = name {
                std::fs::write(class.join(device).join("name"), name).expect("written");
            }
        }
        assert_eq!(named(&class, "stdout").as_deref(), Some("vport1p1"));
        assert_eq!((named(&class, "std"), named(Path::new("/nonexistent"), "stdout")), (None, None));
        let start = Instant::now();
        assert_eq!(until(start + Duration::from_millis(5), || named(&class, "stderr")), None);
        assert!(start.elapsed() >= Duration::from_millis(5));
        std::fs::remove_dir_all(&class).expect("removed");
    }

    /// A device node that stands for a port: what was opened can be opened again from another root.
    #[test]
    fn a_port_is_opened_again_by_its_folder() {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dev = Rc::new(rustix::fs::open("/dev", flags, Mode::empty()).expect("/dev"));
        let device = PortDevice { dev: Rc::clone(&dev), name: "null".into() };
        assert!(device.open().is_ok() && device.clone().open().is_ok());
        assert_eq!(PortDevice { dev, name: "no-such-port".into() }.open().err(), Some(Errno::NOENT));
    }
}
