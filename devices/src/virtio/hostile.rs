//! A hostile driver for the fuzz target and for a bounded test: its input bytes decide on register writes, descriptors, ring
//! indices, requests and resets.

mod frames;
mod packets;
mod pci;
mod rings;

pub use frames::receive_frames;
pub use packets::send_packets;
pub use pci::{drive_pci, restore};
pub use rings::{drive_concurrently, place_rings};

use super::balloon::{Balloon, FreePageReporting};
use super::block::{Block, BlockOptions, Format, Image, ImageOptions, IoEngine, WhenFull};
use super::console::{Console, ConsoleSize};
use super::device::VirtioDevice;
use super::features::F_VERSION_1;
use super::fs::{Fs, FsOptions};
use super::mock::{Descriptor, Driver, MEMORY_BYTES};
use super::net::{Net, Stream};
use super::ports;
use super::rng::Rng;
use super::saved::PauseError;
use super::transport::VirtioTransport;
use super::vsock;
use std::error::Error;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The number of devices that [`drive`] can test.
pub const DEVICES: u8 = 10;

/// How long a pause may take.
const PAUSE: Duration = Duration::from_secs(10);

/// Reads numbers from the input; zeros after its end.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn short(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn word(&mut self) -> u32 {
        u32::from(self.short()) << 16 | u32::from(self.short())
    }

    /// Returns an address: in guest memory mostly, any other in one of 16 cases.
    fn gpa(&mut self) -> u64 {
        match self.byte() {
            0..=15 => u64::from(self.word()) << 32 | u64::from(self.word()),
            _ => u64::from(self.word()) % MEMORY_BYTES,
        }
    }
}

pub(super) fn device(kind: u8, folder: &Path) -> Result<Box<dyn VirtioDevice>, Box<dyn Error>> {
    Ok(match kind % DEVICES {
        0 => Box::new(Rng::new(None)?),
        1 | 2 => {
            let path = folder.join("disk");
            std::fs::File::create(&path)?.set_len(1 << 20)?;
            let options = ImageOptions { path, format: Format::Raw, read_only: false, direct: false, data_file: None };
            let image = Image::open(&options)?;
            let io_engine = if kind.is_multiple_of(2) { IoEngine::Sync } else { IoEngine::Async };
            let (serial, when_full) = (String::new(), WhenFull::Report);
            Box::new(Block::new(image, BlockOptions { queues: 2, serial, when_full, io_engine })?)
        }
        3 => {
            let size = ConsoleSize { columns: 1, rows: 1 };
            Box::new(Console::new(Box::new(io::sink()), Arc::new(EventFd::new(EFD_NONBLOCK)?), size)?)
        }
        4 => {
            let (ours, mut theirs) = UnixStream::pair()?;
            io::Write::write_all(&mut theirs, &[0, 0, 0, 4, 1, 2, 3, 4, 0, 0, 2])?;
            theirs.set_nonblocking(true)?;
            Box::new(Net::new([2; 6], vec![Box::new(Stream::new(ours)?)])?)
        }
        5 => Box::new(vsock::mock::device(3, &folder.join("vsock"))?),
        8 => Box::new(ports::mock::device()?.0),
        6 => Box::new(Balloon::new(1 << 20, FreePageReporting::On)?),
        kind => {
            let shared = folder.join("shared");
            std::fs::create_dir_all(&shared)?;
            std::fs::write(shared.join("file"), "content")?;
            Box::new(Fs::new(FsOptions {
                tag: "tag".into(),
                directory: shared,
                read_only: kind == 9,
                privileged_files: false,
            })?)
        }
    })
}

/// Tests the device that the first byte chooses with the actions that the other bytes choose. Afterwards the device must be
/// able to start after a reset. `folder` is for files of the device.
///
/// # Errors
/// Returns an error where the device cannot be made.
///
/// # Panics
/// Panics where the device does not start again.
pub fn drive(bytes: &[u8], folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut source = Source(bytes);
    let mut driver = Driver::new(device(source.byte(), folder)?);
    driver.start(u64::MAX);
    while !source.0.is_empty() {
        step(&mut driver, &mut source);
    }
    driver.start(F_VERSION_1);
    assert_eq!(driver.status(), 15, "a reset and a start");
    Ok(())
}

/// Pauses the device, and lets it go on. Whatever the driver has done, its state can be saved, where it has one.
fn pause(device: &dyn VirtioTransport) {
    if device.pause(Instant::now() + PAUSE).is_ok() {
        let state = device.save();
        assert!(matches!(state, Ok(_) | Err(PauseError::Unsaved { .. } | PauseError::State { .. })), "{state:?}");
    }
    let start = Instant::now();
    while !device.resume() {
        assert!(start.elapsed() < PAUSE, "it does not go on");
        std::thread::yield_now();
    }
}

fn step(driver: &mut Driver, source: &mut Source<'_>) {
    let queue = usize::from(source.byte()) % driver.queues();
    match source.byte() % 10 {
        0 => driver.write(u64::from(source.byte()) * 4, source.word()),
        1 => {
            let offset = u64::from(source.short()) % 0x400;
            let data = source.word().to_le_bytes();
            driver.write_bytes(offset, &data[..usize::from(source.byte() % 5)]);
            driver.read_bytes(offset, &mut [0; 7]);
        }
        2 => driver.set_available_index(queue, source.short()),
        3 => {
            let (index, gpa) = (source.short() % 256, source.gpa());
            let (len, flags, next) = (source.word() % 0x2_0000, source.short() % 8, source.short() % 300);
            driver.put_descriptor(queue, index, Descriptor { gpa, len, flags, next });
        }
        4 => driver.make_available(queue, source.short() % 300),
        5 => {
            let gpa = source.gpa().min(MEMORY_BYTES - 64);
            let mut data = [0; 64];
            data.iter_mut().for_each(|byte| *byte = source.byte());
            let _ = driver.memory.write_slice(&data, GuestAddress(gpa));
        }
        6 => driver.start(u64::MAX),
        7 => pause(driver.device()),
        // Requests with the layout that devices expect and any content.
        _ => {
            let mut header = [0; 48];
            let len = usize::from(source.byte()) % header.len();
            header[..len].iter_mut().for_each(|byte| *byte = source.byte());
            let mut writable = vec![u32::from(source.short()) % 8192];
            if source.byte().is_multiple_of(2) {
                writable.push(1);
            }
            if driver.status() & 4 != 0 {
                driver.submit(queue, &[&header[..len]], &writable);
            }
        }
    }
    driver.kick(queue);
}

#[cfg(test)]
mod tests {
    use super::*;

    type Target = fn(&[u8], &Path) -> Result<(), Box<dyn Error>>;

    /// Runs the corpus of a fuzz target, and generated input.
    fn survives(name: &str, target: Target, rounds: u32) {
        let folder = tempfile::tempdir().expect("a folder");
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
        for entry in std::fs::read_dir(corpus).expect("the corpus").flatten() {
            target(&std::fs::read(entry.path()).expect("readable"), folder.path()).expect("a device");
        }
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for round in 0..rounds {
            let mut bytes = vec![u8::try_from(round % u32::from(DEVICES)).expect("small")];
            for _ in 0..400 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.push(state.to_le_bytes()[3]);
            }
            target(&bytes, folder.path()).expect("a device");
        }
    }

    #[test]
    fn devices_survive_a_hostile_driver() {
        survives("virtio", drive, 240);
    }

    #[test]
    fn the_pci_transport_survives_a_hostile_driver() {
        survives("virtio_pci", drive_pci, 240);
    }

    /// The states of devices whose drivers run, as the fuzz target for snapshots has them.
    #[test]
    fn devices_with_something_of_the_host_are_restored() {
        let folder = tempfile::tempdir().expect("a folder");
        for kind in [5, 8, 9] {
            let old = folder.path().join(format!("of-{kind}"));
            std::fs::create_dir(&old).expect("made");
            let driver = Driver::running(device(kind, &old).expect("a device"));
            driver.device().pause(Instant::now() + PAUSE).expect("paused");
            let state = driver.device().save().expect("a state");
            for _ in 0..3 {
                restore(&state, folder.path()).expect("restored");
            }
        }
    }

    #[test]
    fn devices_survive_rings_that_lie_anywhere() {
        survives("virtio_rings", place_rings, 160);
    }

    #[test]
    fn devices_survive_memory_that_changes_during_a_request() {
        survives("virtio_concurrent", drive_concurrently, 80);
    }

    #[test]
    fn a_stream_survives_a_hostile_peer() {
        survives("passt_frames", receive_frames, 240);
    }

    #[test]
    fn vsock_survives_hostile_packets_and_programs() {
        survives("vsock_packets", send_packets, 120);
    }
}
