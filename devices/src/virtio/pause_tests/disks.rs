//! Disks that are paused, and go on as other machines' disks.

use super::super::block::{Block, BlockOptions, Format, Image, ImageOptions, IoEngine, WhenChanged, WhenFull};
use super::super::device::VirtioDevice;
use super::super::mock::Driver;
use super::{pause, rng, state_of_rng};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

const DISK: u64 = 1 << 20;

fn image(path: &Path) -> Image {
    let options =
        ImageOptions { path: path.into(), format: Format::Raw, read_only: false, direct: false, data_file: None };
    Image::open(&options).expect("an image")
}

fn block_options(io_engine: IoEngine) -> BlockOptions {
    BlockOptions { queues: 1, serial: "s".into(), when_full: WhenFull::Report, io_engine }
}

fn disk(path: &Path, io_engine: IoEngine) -> Box<dyn VirtioDevice> {
    Box::new(Block::new(image(path), block_options(io_engine)).expect("a timer"))
}

fn header(write: bool, sector: u64) -> Vec<u8> {
    [u32::from(write).to_le_bytes(), [0; 4]].concat().into_iter().chain(sector.to_le_bytes()).collect()
}

/// Writes in flight at each pause: all of them are on the disk, and completed once.
#[test]
fn writes_are_complete_when_a_disk_is_paused() {
    for io_engine in [IoEngine::Async, IoEngine::Sync] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk");
        File::create(&path).expect("made").set_len(DISK).expect("long");
        let mut driver = Driver::running(disk(&path, io_engine));
        let mut completed = 0;
        for round in 1..=20_u8 {
            let writes: Vec<_> = (0..16_u8)
                .map(|number| driver.submit(0, &[&header(true, u64::from(number)), &[round ^ number; 512]], &[1]))
                .collect();
            pause(&driver).expect("paused");
            let file = File::open(&path).expect("open");
            for number in 0..16_u8 {
                let mut sector = [0; 512];
                file.read_exact_at(&mut sector, u64::from(number) * 512).expect("read");
                assert_eq!(sector, [round ^ number; 512], "round {round}, sector {number}");
            }
            drop(file);
            assert!(driver.device().resume());
            let heads: BTreeSet<u32> = (0..16).map(|_| driver.wait_used(0).head).collect();
            assert_eq!(heads, writes.iter().map(|write| u32::from(write.head)).collect());
            assert!(writes.iter().all(|write| driver.contents(write, 1) == [0]), "status OK");
            completed += 16;
            assert_eq!(driver.used_index(0), completed);
        }
    }
}

#[test]
fn another_disk_or_one_that_was_written_since_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let [path, copy, larger] = ["disk", "copy", "larger"].map(|name| folder.path().join(name));
    for (path, bytes) in [(&path, DISK), (&larger, DISK + 512)] {
        File::create(path).expect("made").set_len(bytes).expect("long");
    }
    let mut driver = Driver::running(disk(&path, IoEngine::Async));
    driver.request(0, &[&header(true, 1), &[7; 512]], &[1]);
    pause(&driver).expect("paused");
    let state = driver.device().save().expect("a state");
    // The first machine ends: its disk is closed. Its memory stays.
    driver.replace_with(rng(), &state_of_rng()).expect("out of the way");
    let modified = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).expect("a time");
    std::fs::copy(&path, &copy).expect("copied");
    // As cp -p does.
    File::options().write(true).open(&copy).and_then(|file| file.set_modified(modified)).expect("set");
    let mut restored = |path: &Path| driver.replace_with(disk(path, IoEngine::Async), &state);
    restored(&path).expect("as it was");
    restored(&copy).expect("a copy");
    let error = crate::error::chain(&restored(&larger).expect_err("refused"));
    assert!(error.contains("1048576 bytes") && error.contains("1049088"), "{error}");
    std::thread::sleep(Duration::from_millis(20));
    // A copy without the time of the original may have been made at any time.
    std::fs::copy(&path, &larger).expect("copied");
    for (path, sets_time_back) in [(&path, false), (&path, true), (&larger, false)] {
        let file = File::options().write(true).open(path).expect("open");
        file.write_all_at(&[1], 5).expect("written");
        if sets_time_back {
            file.set_modified(modified).expect("set");
        }
        drop(file);
        let error = crate::error::chain(&restored(path).expect_err("refused"));
        assert!(error.contains("changed since") && error.contains("changed=accept"), "{error}");
    }
    let accepting = Block::new(image(&path), block_options(IoEngine::Async)).expect("a timer");
    driver.replace_with(Box::new(accepting.when_changed(WhenChanged::Accept)), &state).expect("the user says so");
    assert!(driver.device().resume());
    let data = driver.request(0, &[&header(false, 1)], &[512, 1]);
    assert_eq!((&data[..512], data[512]), (&[7; 512][..], 0));
}
