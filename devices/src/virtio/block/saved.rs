//! By what a disk is told from others when a machine goes on from a snapshot. The guest's file systems are in its memory as they are on
//! the disk: another disk, or this one after it was written, would be destroyed.

use super::image::Image;
use crate::virtio::saved::{DeviceFault, DiskState, FileMark};
use std::io;

/// Returns the state of a disk with `image` and the device configuration `config`. The image was flushed.
pub(super) fn state(image: &Image, config: &[u8]) -> io::Result<DiskState> {
    Ok(DiskState { config: config.to_vec(), files: image.marks()? })
}

/// Checks that the disk with `image` and `config` is the one that `state` is of, as it was then, or looks like a copy of it: a file
/// with another number may have been written at any time.
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
    let changed = |(saved, now): (&FileMark, &FileMark)| saved.number == now.number && saved != now;
    match state.files.iter().zip(&now).position(changed) {
        Some(index) => Err(DeviceFault::DiskChanged { place: index + 1 }),
        None => Ok(()),
    }
}
