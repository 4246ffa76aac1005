//! By what a disk is told from others when a machine goes on from a snapshot. The guest's file systems are in its memory as they are on
//! the disk: another disk, or this one after it was written, would be destroyed.

use super::image::Image;
use crate::virtio::saved::{DeviceFault, DiskState, FileMark};
use std::io;

/// Why a block device has no snapshots.
const NO_TIME: &str = "it is a block device, of which nobody can tell later whether it was written: use a file";

/// Returns the state of a disk with `image` and the device configuration `config`. The image was flushed.
pub(super) fn state(image: &Image, config: &[u8]) -> io::Result<DiskState> {
    let files = image.marks()?;
    if files.iter().any(|file| file.modified.is_none()) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, NO_TIME));
    }
    Ok(DiskState { config: config.to_vec(), files })
}

/// Checks that the disk with `image` and `config` is the one that `state` is of, as it was then, or a copy of it that has kept the times
/// (`cp -p`).
pub(super) fn check(state: &DiskState, image: &Image, config: &[u8]) -> Result<(), DeviceFault> {
    let bytes =
        |config: &[u8]| config.first_chunk().map_or(0, |sectors| u64::from_le_bytes(*sectors).saturating_mul(512));
    let (expected, found) = (bytes(&state.config), bytes(config));
    if expected != found {
        return Err(DeviceFault::DiskSize { expected, found });
    }
    if state.config != config {
        return Err(DeviceFault::DiskProperties);
    }
    let now = image.marks().map_err(DeviceFault::Io)?;
    if state.files.len() != now.len() {
        return Err(DeviceFault::DiskFiles { expected: state.files.len(), found: now.len() });
    }
    match state.files.iter().zip(&now).position(|(saved, now)| is_changed(saved, now)) {
        Some(index) => Err(DeviceFault::DiskChanged { place: index + 1 }),
        None => Ok(()),
    }
}

/// Programs that copy files keep microseconds at least.
fn is_changed(saved: &FileMark, now: &FileMark) -> bool {
    let micros = |mark: &FileMark| mark.modified.map(|(seconds, nanoseconds)| (seconds, nanoseconds / 1000));
    saved.bytes != now.bytes || saved.modified.is_none() || micros(saved) != micros(now)
}
