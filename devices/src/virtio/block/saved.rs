//! By what a disk is told from others when a machine goes on from a snapshot. The guest's file systems are in its memory as they are on
//! the disk: another disk, or this one after it was written, would be destroyed. What is not known to be as it was is refused.

use super::image::Image;
use super::options::WhenChanged;
use crate::virtio::saved::{DeviceFault, DiskState, FileMark};
use std::io;

/// Returns the state of a disk with `image` and the device configuration `config`. The image was flushed.
pub(super) fn state(image: &Image, config: &[u8]) -> io::Result<DiskState> {
    Ok(DiskState { config: config.to_vec(), files: image.flushed_marks()? })
}

/// Checks that the disk with `image` and `config` is the one that `state` is of, as it was then, or a copy of it. With
/// [`WhenChanged::Accept`] only its size and properties are compared.
pub(super) fn check(
    state: &DiskState,
    image: &Image,
    config: &[u8],
    when_changed: WhenChanged,
) -> Result<(), DeviceFault> {
    let bytes =
        |config: &[u8]| config.first_chunk().map_or(0, |sectors| u64::from_le_bytes(*sectors).saturating_mul(512));
    let (expected, found) = (bytes(&state.config), bytes(config));
    if expected != found {
        return Err(DeviceFault::DiskSize { expected, found });
    }
    if state.config != config {
        return Err(DeviceFault::DiskProperties);
    }
    if when_changed == WhenChanged::Accept {
        return Ok(());
    }
    same_files(&state.files, &image.marks().map_err(DeviceFault::Io)?)
}

/// Checks that the files of an image are those that `saved` is of, as they were, or copies with the time of the original's last write.
fn same_files(saved: &[FileMark], now: &[FileMark]) -> Result<(), DeviceFault> {
    if saved.len() != now.len() {
        return Err(DeviceFault::DiskFiles { expected: saved.len(), found: now.len() });
    }
    for (place, (saved, now)) in (1..).zip(saved.iter().zip(now)) {
        if saved.modified.is_none() || now.modified.is_none() {
            return Err(DeviceFault::DiskUnknown { place });
        }
        // Numbers of devices change with a restart of the host, and on some file systems with each mount: with another one, the file may
        // be the same. The time of the last change of an inode cannot be set, and a copy has its own.
        let is_copy = saved.number != now.number;
        let same = (saved.bytes, saved.modified) == (now.bytes, now.modified);
        if !same || !is_copy && saved.changed != now.changed {
            return Err(DeviceFault::DiskChanged { place });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileMark =
        FileMark { number: [8, 77], bytes: 1 << 20, modified: Some((1000, 5)), changed: Some((1000, 6)) };

    #[test]
    fn only_what_is_known_to_be_as_it_was_is_taken() {
        same_files(&[FILE, FILE], &[FILE, FILE]).expect("the same");
        let copy = FileMark { number: [9, 78], changed: Some((2000, 0)), ..FILE };
        same_files(&[FILE], &[copy]).expect("a copy with its times");
        for changed in [
            FileMark { modified: Some((1000, 6)), ..FILE },
            FileMark { bytes: 5, ..FILE },
            // The time of the last write was set back.
            FileMark { changed: Some((1000, 7)), ..FILE },
            // The file under another number, written since; a copy without its times.
            FileMark { number: [9, 77], modified: Some((1000, 6)), ..FILE },
            FileMark { bytes: 5, ..copy },
        ] {
            let error = same_files(&[FILE, FILE], &[FILE, changed]).expect_err("refused");
            assert!(matches!(error, DeviceFault::DiskChanged { place: 2 }), "{error}");
            assert!(error.to_string().contains("changed=accept"), "{error}");
        }
        let device = FileMark { modified: None, changed: None, ..FILE };
        let error = same_files(&[device], &[device]).expect_err("refused");
        assert!(matches!(error, DeviceFault::DiskUnknown { place: 1 }), "{error}");
        assert!(error.to_string().contains("changed=accept"), "{error}");
        for (saved, now) in [(&[FILE][..], &[FILE, FILE][..]), (&[FILE, FILE], &[FILE]), (&[], &[FILE])] {
            assert!(matches!(same_files(saved, now), Err(DeviceFault::DiskFiles { .. })));
        }
    }
}
