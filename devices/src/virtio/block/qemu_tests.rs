//! Images beside QEMU's programs: what one has open for writing, the other refuses.

use super::tests::options;
use super::{Conflict, Image, ImageError, ImageOptions, NamedFileError};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// The output of a program of QEMU; `None` where it is not installed (scripts/test installs it).
fn qemu(program: &str, arguments: &[&str], path: &Path) -> Option<Output> {
    Command::new(program).args(arguments).arg(path).stdin(Stdio::null()).output().ok()
}

fn works(output: &Output) -> bool {
    output.status.success()
}

/// A disk that `qemu-img` makes; `None` where it is not installed.
fn disk(folder: &Path, format: &str) -> Option<PathBuf> {
    let path = folder.join(format);
    let made = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg("1M").status();
    made.is_ok_and(|status| status.success()).then_some(path)
}

/// A qemu-io that has an image open.
struct Holder(Child);

impl Holder {
    fn new(arguments: &[&str], path: &Path) -> Self {
        let mut command = Command::new("qemu-io");
        let mut child = command
            .args(arguments)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is installed with qemu-img");
        // It answers when the image is open.
        let stdin = child.stdin.as_mut().expect("piped");
        stdin.write_all(b"length\n").expect("written");
        stdin.flush().expect("written");
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut answer).expect("an answer");
        assert!(answer.contains("MiB"), "{answer}");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_refuses_an_image_that_is_open_here() {
    let folder = tempfile::tempdir().expect("a folder");
    for format in ["raw", "qcow2"] {
        let Some(path) = disk(folder.path(), format) else { return crate::skip::skipped("qemu-img is not installed") };
        let image = Image::open(&options(&path)).expect("an image");
        let mut refused = vec![("qemu-io", ["-f", format, "-c", "write 0 512"])];
        if format == "qcow2" {
            // Of a raw image it reads the size only.
            refused.push(("qemu-img", ["info", "-f", format, "--output=json"]));
        }
        for (program, arguments) in refused {
            let output = qemu(program, &arguments, &path).expect("installed");
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(!works(&output) && errors.contains("lock"), "{format} {program}: {errors}");
        }
        drop(image);
        let reader = Image::open(&ImageOptions { read_only: true, ..options(&path) }).expect("an image");
        let read = qemu("qemu-io", &["-r", "-f", format, "-c", "read 0 512"], &path).expect("installed");
        assert!(works(&read), "{format}: readers share it");
        let write = qemu("qemu-io", &["-f", format, "-c", "write 0 512"], &path).expect("installed");
        assert!(!works(&write), "{format}: a writer is refused");
        drop(reader);
        let write = qemu("qemu-io", &["-f", format, "-c", "write 0 512"], &path).expect("installed");
        assert!(works(&write), "{format}: it is free again");
    }
}

#[test]
fn an_image_that_qemu_has_open_is_refused_here() {
    let folder = tempfile::tempdir().expect("a folder");
    for format in ["raw", "qcow2"] {
        let Some(path) = disk(folder.path(), format) else { return crate::skip::skipped("qemu-img is not installed") };
        let reading = ImageOptions { read_only: true, ..options(&path) };
        let writer = Holder::new(&["-f", format], &path);
        for options in [&reading, &options(&path)] {
            let refused = Image::open(options).err().expect("refused");
            let ImageError::Locked { conflict, .. } = &refused else { panic!("{format}: {refused:?}") };
            assert_eq!((conflict.conflict, conflict.pid), (Conflict::Writes, None));
            assert!(refused.to_string().contains("another process writes to it"), "{refused}");
        }
        drop(writer);
        let reader = Holder::new(&["-r", "-f", format], &path);
        assert!(Image::open(&reading).is_ok() || format == "raw", "{format}: readers share it");
        if format == "qcow2" {
            let refused = Image::open(&options(&path)).err().expect("refused");
            assert!(
                matches!(&refused, ImageError::Locked { conflict, .. } if conflict.conflict == Conflict::DeniesWriting)
            );
        }
        drop(reader);
        assert!(Image::open(&options(&path)).is_ok(), "{format}: it is free again");
    }
}

#[test]
fn backing_files_are_locked_for_qemu_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(base) = disk(folder.path(), "qcow2") else { return crate::skip::skipped("qemu-img is not installed") };
    let top = folder.path().join("top");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).args([&base, &top]);
    assert!(create.status().expect("qemu-img").success());
    let chain = ImageOptions { format: super::Format::Qcow2, ..options(&top) };
    let image = Image::open(&chain).expect("a chain");
    let output = qemu("qemu-io", &["-f", "qcow2", "-c", "write 0 512"], &base).expect("installed");
    assert!(!works(&output), "a backing file is not for writing");
    let output = qemu("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512"], &base).expect("installed");
    assert!(works(&output), "but for reading");
    drop(image);
    let writer = Holder::new(&["-f", "qcow2"], &base);
    let refused = Image::open(&chain).err().expect("refused");
    assert!(matches!(refused, ImageError::NamedFile { source: NamedFileError::Locked(_), .. }), "{refused:?}");
    drop(writer);
    assert!(Image::open(&chain).is_ok());
}

/// What QEMU makes is refused, with the format's name, and stays as it is; as raw it is taken.
#[test]
fn images_of_other_formats_are_refused_unchanged() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases: [(&str, &str, &str); 11] = [
        ("vmdk", "", "VMDK"),
        ("vmdk", "subformat=streamOptimized", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "VMDK"),
        ("vdi", "", "VDI"),
        ("vpc", "", "VHD"),
        ("vpc", "subformat=fixed,force_size=on", "VHD"),
        ("vhdx", "", "VHDX"),
        ("qed", "", "QED"),
        ("parallels", "", "Parallels"),
        ("qcow", "", "qcow (version 1)"),
    ];
    for (number, (format, of, name)) in cases.into_iter().enumerate() {
        let path = folder.path().join(number.to_string());
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", format]).args(if of.is_empty() { vec![] } else { vec!["-o", of] });
        match create.arg(&path).arg("1M").stderr(Stdio::null()).status() {
            Ok(status) if status.success() => {}
            // Some builds cannot make each of them.
            Ok(_) => {
                crate::skip::skipped(&format!("qemu-img cannot make {format} {of}"));
                continue;
            }
            Err(_) => return crate::skip::skipped("qemu-img is not installed"),
        }
        let before = std::fs::read(&path).expect("there");
        let refused = Image::open(&options(&path)).err().expect("refused").to_string();
        assert!(refused.contains(&format!("is a {name} image")), "{format} {of}: {refused}");
        assert!(std::fs::read(&path).expect("there") == before, "{format} {of} is written");
        let raw = Image::open(&ImageOptions { format: super::Format::Raw, ..options(&path) });
        assert!(raw.is_ok() || !before.len().is_multiple_of(512), "{format} {of} as raw");
    }
}
