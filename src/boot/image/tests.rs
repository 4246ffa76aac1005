//! Whole images: partition tables, file systems made by mke2fs and fatfs, configurations of boot loaders.

mod ext;

#[path = "../../../tests/harness/fat.rs"]
mod fat;

use super::*;
use crate::boot::initramfs::{AgentLink, Driver, LinkChoice};
use crate::sandbox::Isolation;
use crate::skip::skipped;
use fat::fat;
use proptest::prelude::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

const MIB: usize = 1 << 20;
const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

/// Makes an ext file system of `kind` with the files of `folder`; `None` where mke2fs is not there.
fn ext(kind: &str, folder: &Path) -> Option<Vec<u8>> {
    let image = tempfile::NamedTempFile::new().expect("a file");
    image.as_file().set_len(8 * MIB as u64).expect("resized");
    let made = Command::new("mke2fs")
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .args(["-q", "-F", "-t", kind, "-U", UUID, "-L", "root", "-d"])
        .args([folder, image.path()])
        .status();
    match made {
        Ok(status) => assert!(status.success(), "mke2fs failed"),
        Err(error) => {
            skipped(&format!("mke2fs: {error} (apt install e2fsprogs)"));
            return None;
        }
    }
    Some(fs::read(image.path()).expect("read"))
}

/// A disk with an MBR and these partitions, from 1 MiB on.
fn disk(partitions: &[&[u8]]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (index, partition) in partitions.iter().enumerate() {
        let entry = 446 + 16 * index;
        let sectors = |bytes: usize| u32::try_from(bytes / 512).expect("small").to_le_bytes();
        disk[entry + 4] = 0x83;
        let start = sectors(disk.len());
        disk[entry + 8..entry + 12].copy_from_slice(&start);
        disk[entry + 12..entry + 16].copy_from_slice(&sectors(partition.len()));
        disk.extend_from_slice(partition);
    }
    disk
}

struct Taken {
    found: Found,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
}

fn take(disk: &[u8], wanted: Option<&str>) -> Result<Taken, FindError> {
    let (mut kernel, mut initrd) = (Vec::new(), Vec::new());
    let range = Range::whole(Rc::new(disk.to_vec()), 256 * MIB as u64);
    let found = find(&range, wanted, &mut kernel, Some(&mut initrd))?;
    Ok(Taken { found, kernel, initrd })
}

/// A root as Debian has it: a kernel in /boot, links to it, grub.cfg.
fn debian_root() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let at = |path: &str| root.path().join(path);
    fs::create_dir_all(at("boot/grub")).expect("made");
    fs::write(at("boot/vmlinuz-6.1"), vec![7; 100_000]).expect("written");
    fs::write(at("boot/initrd.img-6.1"), b"initrd").expect("written");
    fs::write(at("boot/early.img"), b"early").expect("written");
    symlink("boot/vmlinuz-6.1", at("vmlinuz")).expect("linked");
    symlink("/boot/../../../boot/initrd.img-6.1", at("initrd.img")).expect("linked");
    symlink("loop", at("loop")).expect("linked");
    symlink("../../../../etc/passwd", at("boot/outside")).expect("linked");
    let config = format!(
        "set default=0\nmenuentry 'Debian' --id deb {{\n search --no-floppy --fs-uuid --set=root {UUID}\n\
         linux /boot/vmlinuz-6.1 root=UUID={UUID} ro quiet\n initrd /boot/early.img /boot/initrd.img-6.1\n}}\n\
         submenu 'More' {{\nmenuentry 'Links' {{ linux /vmlinuz single; initrd /initrd.img; }}\n\
         menuentry 'Loop' {{ linux /loop; }}\nmenuentry 'Outside' {{ linux /boot/outside; }}\n\
         menuentry 'Folder' {{ linux /boot; }}\nmenuentry 'Other' {{ linux (hd0,msdos2)/vmlinuz; }}\n}}\n"
    );
    fs::write(at("boot/grub/grub.cfg"), config).expect("written");
    root
}

#[test]
fn grubs_entries_give_kernel_and_initrd() {
    let root = debian_root();
    for kind in ["ext2", "ext3", "ext4"] {
        let Some(ext) = ext(kind, root.path()) else { return };
        // A disk that is one file system, and one with partitions.
        for image in [ext.clone(), disk(&[&fat(2 * MIB, &[]), &ext])] {
            let Taken { found, kernel, initrd } = take(&image, None).expect("found");
            assert_eq!(kernel, vec![7; 100_000], "{kind}");
            assert_eq!(initrd, b"early\0\0\0initrd", "behind each other, at multiples of four bytes");
            assert_eq!((found.entry.number.as_str(), found.entry.title.as_str()), ("0", "Debian"));
            assert_eq!(found.cmdline, format!("root=UUID={UUID} ro quiet"));
            let links = take(&image, Some("1>0")).expect("found");
            assert_eq!(
                (links.kernel.len(), &links.initrd[..], &*links.found.cmdline),
                (100_000, &b"initrd"[..], "single")
            );
        }
    }
}

#[test]
fn what_is_missing_is_named() {
    let root = debian_root();
    let Some(ext) = ext("ext4", root.path()) else { return };
    let mut xfs = vec![0; MIB];
    xfs[..4].copy_from_slice(b"XFSB");
    let image = disk(&[&ext, &xfs]);
    let failure = |wanted: &str| take(&image, Some(wanted)).err().expect("refused").to_string();
    let none = failure("Nix");
    assert!(none.contains("--entry Nix") && none.contains("0 (Debian), 1>0 (More > Links)"), "{none}");
    for (entry, why) in [
        ("Loop", "symbolic links"),
        ("Outside", "no such file"),
        ("Folder", "no regular file"),
        ("Other", "partition 2 has xfs"),
    ] {
        let error = failure(entry);
        assert!(error.contains(why) && error.contains(entry), "{error}");
    }
    let error = take(&disk(&[&xfs]), None).err().expect("no menu").to_string();
    assert!(error.contains("grub.cfg") && error.contains("partition 1 has xfs"), "{error}");
    let error = take(&[0; 4096], None).err().expect("no menu").to_string();
    assert!(error.contains("no partitions, but no file system that hwvmm knows"), "{error}");
}

#[test]
fn entries_of_the_boot_loader_specification_are_found_on_fat() {
    let files: &[(&str, &[u8])] = &[
        ("/loader/loader.conf", b"default b-*\n"),
        ("/loader/entries/a-2.conf", b"title New\nlinux /a/linux\noptions quiet\n"),
        ("/loader/entries/b-1.conf", b"title Old\nlinux /b/linux\ninitrd /b/initrd\noptions ro\n"),
        ("/a/linux", b"new"),
        ("/b/linux", &[9; 50_000]),
        ("/b/initrd", b"initrd"),
    ];
    for bytes in [2 * MIB, 20 * MIB, 80 * MIB] {
        let image = disk(&[&fat(bytes, files)]);
        let taken = take(&image, None).expect("found");
        assert_eq!((taken.kernel, &taken.initrd[..]), (vec![9; 50_000], &b"initrd"[..]), "{bytes} bytes");
        assert_eq!((taken.found.entry.title.as_str(), &*taken.found.cmdline), ("Old", "ro"));
        let first = take(&image, Some("b-1")).expect("found").found.entry;
        assert_eq!(first.number, "0", "the newest name is first");
        assert_eq!(take(&image, Some("New")).expect("found").kernel, b"new");
    }
}

#[test]
fn a_process_of_its_own_reads_the_image() {
    // Tests have threads: here it is this one.
    let files: &[(&str, &[u8])] = &[("/loader/entries/a.conf", b"linux /linux\noptions a\n"), ("/linux", b"kernel")];
    let mut image = tempfile::tempfile().expect("a file");
    image.write_all(&fat(2 * MIB, files)).expect("written");
    let disk = OpenDisk { disk: Rc::new(image), files: Vec::new() };
    let ImageKernel { found, kernel, initrd } =
        kernel_of(&disk, WantedKernel { entry: None, initrd: true }, Isolation::None).expect("found");
    assert_eq!((kernel.metadata().expect("known").len(), initrd.is_none()), (6, true));
    assert_eq!(found.cmdline, "a");
    let wanted = WantedKernel { entry: Some("\x1b[2J"), initrd: true };
    let error = kernel_of(&disk, wanted, Isolation::None).err().expect("no such entry").to_string();
    assert!(!error.contains(char::is_control), "{error}");
}

#[test]
fn the_modules_of_a_kernel_are_copied() {
    let root = debian_root();
    let folder = root.path().join("usr/lib/modules/6.1-x");
    fs::create_dir_all(folder.join("kernel")).expect("made");
    symlink("usr/lib", root.path().join("lib")).expect("linked");
    let write = |name: &str, content: &str| fs::write(folder.join(name), content).expect("written");
    write(
        "modules.dep",
        "kernel/overlay.ko.xz: kernel/base.ko\nkernel/base.ko:\nkernel/virtiofs.ko:\nkernel/ext4.ko:\n\
            kernel/virtio_console.ko: kernel/base.ko\n",
    );
    write("modules.builtin", "kernel/virtio_pci.ko\n");
    write("kernel/overlay.ko.xz", "overlay");
    write("kernel/base.ko", "base");
    write("kernel/virtio_console.ko", "console");
    symlink("/etc/passwd", folder.join("kernel/virtiofs.ko")).expect("linked");
    fs::File::create(folder.join("kernel/ext4.ko")).and_then(|file| file.set_len(65 << 20)).expect("a hole");
    let Some(ext) = ext("ext4", root.path()) else { return };
    let image = disk(&[&fat(2 * MIB, &[]), &ext]);
    fn wanted<'a>(release: &'a str, drivers: &'a [Driver]) -> WantedModules<'a> {
        WantedModules { release, drivers, links: LinkChoice::VsockFirst }
    }
    let copy = |release: &str, drivers: &[Driver]| {
        let mut out = Vec::new();
        let range = Range::whole(Rc::new(image.clone()), 256 * MIB as u64);
        find_modules(&range, wanted(release, drivers), &mut out).map(|found| (found, out))
    };
    let (found, out) = copy("6.1-x", &[Driver::VirtioPci, Driver::Overlay]).expect("found");
    assert_eq!(found.folder.as_deref(), Some("/lib/modules/6.1-x"));
    let modules: Vec<_> = found.modules.iter().map(|module| (module.path.as_str(), module.bytes)).collect();
    assert_eq!(modules, [("kernel/base.ko", 4), ("kernel/overlay.ko.xz", 7)]);
    assert_eq!((&out[..], found.link), (&b"baseoverlay"[..], Some(AgentLink::Vsock)));
    let (found, out) = copy("6.1-x", &[Driver::VirtioPci, Driver::Vsock]).expect("found");
    assert_eq!((&out[..], found.link), (&b"baseconsole"[..], Some(AgentLink::Ports)), "the kernel has no vsock");
    let (none, out) = copy("6.2", &[Driver::Overlay]).expect("none");
    assert!(none.folder.is_none() && none.link.is_none() && none.modules.is_empty() && out.is_empty());
    assert_eq!(list_seen(&none.seen), "partition 1 has FAT, partition 2 has ext4");
    for (driver, why) in [
        (Driver::VirtioMmio, "CONFIG_VIRTIO_MMIO"),
        (Driver::Virtiofs, "kernel/virtiofs.ko: there is no such file"),
        (Driver::Ext4, "hwvmm reads at most"),
    ] {
        let error = copy("6.1-x", &[driver]).expect_err("refused").to_string();
        assert!(error.contains(why) && error.contains("/lib/modules/6.1-x"), "{error}");
    }
    let disk = OpenDisk { disk: Rc::new(image), files: Vec::new() };
    let taken = modules_of(&disk, wanted("6.1-x", &[Driver::Overlay]), Isolation::None).expect("taken");
    assert_eq!((taken.found.modules.len(), taken.file.metadata().expect("known").len()), (2, 11));
    let wanted = WantedKernel { entry: None, initrd: false };
    assert!(kernel_of(&disk, wanted, Isolation::None).expect("found").initrd.is_none());
}

#[test]
fn damaged_images_are_errors() {
    let root = debian_root();
    let fat = fat(2 * MIB, &[("/loader/entries/a.conf", b"linux /linux\n"), ("/linux", b"kernel")]);
    let images: Vec<Vec<u8>> = ext("ext4", root.path()).into_iter().chain([fat]).collect();
    // Where the structures are: superblocks, group descriptors, boot sector, tables, the first folders.
    let place = prop_oneof![0_usize..4096, 1024_usize..1280, 0..512 * 1024_usize];
    let changes = proptest::collection::vec((place, any::<u8>()), 1..8);
    proptest!(ProptestConfig::with_cases(300), |(changes in changes)| {
        for image in &images {
            let mut image = image.clone();
            for (at, byte) in &changes {
                image[*at] = *byte;
            }
            let range = Range::whole(Rc::new(image), 64 * MIB as u64);
            let _ = find(&range, None, &mut Vec::new(), Some(&mut Vec::new()));
            let wanted = WantedModules { release: "6.1", drivers: &[Driver::Overlay], links: LinkChoice::Vsock };
            let _ = find_modules(&range, wanted, &mut Vec::new());
        }
    });
}

#[test]
fn a_file_that_breaks_off_is_an_error() {
    let config = "menuentry 'A' { linux /linux; }\n";
    let files: [(&str, &[u8]); 2] = [("/linux", &[7; 50_000]), ("/grub/grub.cfg", config.as_bytes())];
    let mut volume = fat(2 * MIB, &files);
    assert!(take(&disk(&[&volume]), None).is_ok());
    // The second cluster of the chain is made a free one, in both copies of the FAT: FAT12 or FAT16, whichever fatfs has made.
    let u16_at = |at: usize| usize::from(u16::from_le_bytes([volume[at], volume[at + 1]]));
    let (first, sectors) = (u16_at(14) * 512, u16_at(22));
    for copy in 0..2 {
        let at = first + copy * sectors * 512;
        // Clusters 3 to 6, whatever the width of an entry: all are of the chain.
        volume[at + 6..at + 9].fill(0);
    }
    let error = take(&disk(&[&volume]), None).err().expect("an error").to_string();
    assert!(error.contains("50000 bytes, and ends after"), "{error}");
}

#[test]
fn what_is_there_and_cannot_be_read_is_not_passed_over() {
    let entry: (&str, &[u8]) = ("/loader/entries/a.conf", b"linux /linux\n");
    let linux: (&str, &[u8]) = ("/linux", b"kernel");
    let taken = |files: &[(&str, &[u8])]| take(&disk(&[&fat(4 * MIB, files)]), None).map(|_| ());
    assert_eq!(taken(&[entry, linux]), Ok(()));
    let open: (&str, &[u8]) = ("/grub/grub.cfg", b"menuentry 'x");
    assert!(matches!(taken(&[entry, linux, open]), Err(FindError::Menu { path, .. }) if path == "/grub/grub.cfg"));
    let long = vec![b'#'; 70_000];
    let large: (&str, &[u8]) = ("/loader/entries/b.conf", &long);
    assert!(matches!(taken(&[entry, linux, large]), Err(FindError::Menu { path, .. }) if path.ends_with("b.conf")));
    let many = format!("linux /linux\n{}", "initrd /linux\n".repeat(17));
    let many: (&str, &[u8]) = ("/loader/entries/a.conf", many.as_bytes());
    let error = taken(&[many, linux]).expect_err("17 initrds").to_string();
    assert!(error.contains("more than 16 initrds"), "{error}");
    // Only the Boot Loader Specification looks for files in /boot.
    let grub: (&str, &[u8]) = ("/grub/grub.cfg", b"menuentry A { linux /gone; }");
    let elsewhere: (&str, &[u8]) = ("/boot/gone", b"another");
    assert!(matches!(taken(&[grub, elsewhere]), Err(FindError::File { .. })));
}

#[test]
fn numbers_of_an_ext_superblock_that_cannot_be_are_refused() {
    let root = debian_root();
    let Some(mut image) = ext("ext2", root.path()) else { return };
    for (at, byte) in [(24, 20), (24, 255), (4 + 3, 255), (32, 0)] {
        let before = image.clone();
        image[1024 + at] = byte;
        if at == 32 {
            image[1024 + 32..1024 + 36].fill(0);
        }
        let error = take(&disk(&[&image]), None).err().expect("an error").to_string();
        assert!(error.contains("partition 1 has a damaged ext2"), "{error}");
        image = before;
    }
}
