//! Images with ext4 in the states that mke2fs alone does not make: debugfs makes them.

use super::{MIB, debian_root, disk, ext, take};
use crate::boot::image::disk::Range;
use crate::boot::image::ext::Ext;
use crate::boot::image::process::answer;
use crate::boot::image::{ChosenBy, FindError, OpenDisk, ReadAt, Root, RootUser, WantedRoot, find_root};
use crate::sandbox::Isolation;
use crate::skip::skipped;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::rc::Rc;

/// Has debugfs change an ext file system; `None` where it is not there.
fn debugfs(image: &[u8], commands: &[&str]) -> Option<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), image).expect("written");
    for command in commands {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let done = Command::new("debugfs").env("PATH", path).args(["-w", "-R", command]).arg(file.path()).output();
        match done {
            Ok(out) => assert!(out.status.success(), "debugfs {command}: {out:?}"),
            Err(error) => {
                skipped(&format!("debugfs: {error} (apt install e2fsprogs)"));
                return None;
            }
        }
    }
    Some(fs::read(file.path()).expect("read"))
}

/// A kernel whose file has extents that were never written, on blocks that had a file's data before.
#[test]
fn blocks_that_were_never_written_are_zeroes() {
    let root = debian_root();
    let kernel = root.path().join("boot/vmlinuz-6.1");
    let block = 1024;
    // Data, a hole, data; and a file to delete, whose blocks are free then.
    let mut content = vec![7; 40 * block];
    content[10 * block..30 * block].fill(0);
    content.truncate(39 * block + 17);
    let file = fs::File::create(&kernel).expect("made");
    let piece = |from: usize, to: usize| {
        file.write_all_at(&content[from..to], from as u64).expect("written");
    };
    piece(0, 10 * block);
    piece(30 * block, content.len());
    fs::write(root.path().join("secret"), vec![0x55; 1 << 20]).expect("written");
    let Some(ext) = ext("ext4", root.path()) else { return };
    assert_eq!(take(&ext, None).expect("found").kernel, content, "a hole");
    // Once on all of the hole, once on two parts of it.
    for places in [&["12 27"][..], &["10 12", "20 29"]] {
        let mut commands = vec!["rm /secret".to_owned()];
        commands.extend(places.iter().map(|place| format!("fallocate /boot/vmlinuz-6.1 {place}")));
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        let Some(image) = debugfs(&ext, &commands) else { return };
        assert!(image.windows(block).any(|bytes| bytes.iter().all(|byte| *byte == 0x55)), "old data is there");
        let taken = take(&disk(&[&image]), None).expect("found").kernel;
        assert_eq!(taken.len(), content.len());
        assert_eq!(taken.iter().zip(&content).position(|(a, b)| a != b), None, "{places:?}");
    }
    // All of a file, and beyond its end.
    fs::write(root.path().join("boot/early.img"), "").expect("written");
    fs::File::options()
        .write(true)
        .open(root.path().join("boot/early.img"))
        .and_then(|file| file.set_len(5000))
        .expect("resized");
    let Some(ext) = super::ext("ext4", root.path()) else { return };
    let Some(image) = debugfs(&ext, &["rm /secret", "fallocate /boot/early.img 0 30"]) else { return };
    let initrd = take(&image, None).expect("found").initrd;
    assert_eq!((initrd.len(), initrd[..5000].iter().all(|byte| *byte == 0)), (5006, true));
}

/// What is read by ext4-view and what is read here is the same, whatever the layout.
#[test]
fn inodes_and_extents_are_found_as_ext4_view_finds_them() {
    let root = debian_root();
    let many = root.path().join("many/folders/in each other");
    fs::create_dir_all(&many).expect("made");
    for number in 0..600 {
        fs::write(many.join(format!("{number:0>40}")), number.to_string()).expect("written");
    }
    // 200 pieces, so that the extents do not fit in the inode.
    let file = fs::File::create(many.join("pieces")).expect("made");
    for number in 0..200_u8 {
        let at = u64::from(number) * 8192;
        file.write_all_at(&[number + 1; 1000], at).expect("written");
    }
    for kind in ["ext2", "ext3", "ext4"] {
        let Some(image) = ext(kind, root.path()) else { return };
        let disk = Range::whole(Rc::new(image), 1 << 30);
        let ext = Ext::load(&disk).unwrap_or_else(|error| panic!("{kind}: {error}"));
        let folder = "/many/folders/in each other";
        let paths = (0..600).step_by(71).map(|number| format!("{folder}/{number:0>40}"));
        for path in paths.chain([format!("{folder}/pieces"), "/boot/vmlinuz-6.1".into(), "/vmlinuz".into()]) {
            let (mut view, mut own) = (Vec::new(), Vec::new());
            ext.copy(&path, 1 << 30, &mut view).unwrap_or_else(|error| panic!("{kind}: {path}: {error}"));
            let on_host = root.path().join(path.trim_start_matches('/'));
            assert_eq!(view, fs::read(on_host).expect("read"), "{kind}: {path}");
            if kind == "ext4" {
                ext.copy_own(&path, &mut own).unwrap_or_else(|error| panic!("{kind}: {path}: {error}"));
                assert!(own == view, "{path}");
            }
        }
    }
}

fn root(image: &[u8], user: Option<&str>) -> Result<Root, FindError> {
    find_root(&Range::whole(Rc::new(image.to_vec()), 256 * MIB as u64), WantedRoot { entry: None, user })
}

/// A folder with what makes a root, and this list of users.
fn root_with(passwd: &[u8]) -> tempfile::TempDir {
    let root = debian_root();
    for folder in ["etc", "bin"] {
        fs::create_dir(root.path().join(folder)).expect("made");
    }
    fs::write(root.path().join("etc/passwd"), passwd).expect("written");
    root
}

#[test]
fn a_user_is_found_in_a_long_list() {
    let mut list: String = (0..20_000).map(|number| format!("user{number}:x:{number}:{number}::/:/bin/sh\n")).collect();
    assert!(list.len() > 512 << 10);
    list += "mail:x:8:12::/var/mail:/bin/false\n";
    list += &format!("long:x:9:9:{}:/:/bin/false\n", "x".repeat(5000));
    let folder = root_with(list.as_bytes());
    let Some(image) = ext("ext4", folder.path()) else { return };
    let user = |name: Option<&str>| root(&image, name).expect("a root").user;
    assert_eq!(user(Some("mail")), RootUser::Line("mail:x:8:12::/var/mail:/bin/false".into()));
    assert_eq!((user(Some("none")), user(None)), (RootUser::None, RootUser::NotAsked));
    assert!(matches!(user(Some("long")), RootUser::Unreadable(why) if why.contains("4096 bytes")));
    fs::File::create(folder.path().join("etc/passwd")).and_then(|file| file.set_len(5 << 20)).expect("a hole");
    let Some(image) = ext("ext4", folder.path()) else { return };
    let user = root(&image, Some("mail")).expect("a root").user;
    assert!(matches!(&user, RootUser::Unreadable(why) if why.contains("hwvmm reads at most")), "{user:?}");
}

/// An image with two systems: the first is taken, and that there is another is known.
#[test]
fn other_partitions_that_look_like_a_root_are_listed() {
    let folder = root_with(b"root:x:0:0::/root:/bin/sh\n");
    let Some(system) = ext("ext4", folder.path()) else { return };
    let found = |partitions: &[&[u8]]| root(&disk(partitions), None).map(|root| (root.partition, root.others));
    assert_eq!(found(&[&system]).expect("a root"), (Some(1), vec![]));
    assert_eq!(found(&[&[0; 4096], &system, &system]).expect("a root"), (Some(2), vec![3]));
}

/// Of two systems, it is the one that the boot loader's entry starts.
#[test]
fn the_root_is_the_one_that_the_kernel_is_told() {
    let folder = root_with(b"root:x:0:0::/root:/bin/sh\n");
    let Some(other) = ext("ext4", folder.path()) else { return };
    let Some(second) = debugfs(
        &other,
        &["feature -metadata_csum", "ssv uuid 99999999-89ab-cdef-0123-456789abcdef", "ssv volume_name second"],
    ) else {
        return;
    };
    // The configuration of the first partition counts: it is found first.
    let found = |parameters: &str, entry| {
        let config = format!(
            "menuentry 'One' {{ linux /boot/vmlinuz-6.1 {parameters}\n}}\nmenuentry 'First' {{ linux /boot/vmlinuz-6.1 root=/dev/sda1\n}}\n"
        );
        fs::write(folder.path().join("boot/grub/grub.cfg"), config).expect("written");
        let first = ext("ext4", folder.path()).expect("mke2fs is there");
        let mut image = disk(&[&first, &second]);
        image[440..444].copy_from_slice(&0x1234_abcd_u32.to_le_bytes());
        let range = Range::whole(Rc::new(image), 256 * MIB as u64);
        let root = find_root(&range, WantedRoot { entry, user: None }).expect("a root");
        assert_eq!(root.others, [3 - root.partition.expect("a partition")]);
        (root.partition, root.chosen_by)
    };
    for second in [
        "root=UUID=99999999-89AB-cdef-0123-456789abcdef",
        "ro root=LABEL=second",
        "root=PARTUUID=1234ABCD-02",
        "root=/dev/sda1 quiet root=/dev/vda2 x",
        "\"root=/dev/nvme0n1p2\"",
        "root=/dev/disk/by-uuid/99999999-89ab-cdef-0123-456789abcdef",
    ] {
        assert_eq!(found(second, None), (Some(2), ChosenBy::Parameters), "{second}");
    }
    assert_eq!(found("root=/dev/vda2", Some("First")), (Some(1), ChosenBy::Parameters));
    for none in ["root=/dev/mapper/a-root2", "root=/dev/nvme0n2", "root=UUID=1", "root=/dev/vda3", "root=", "quiet"] {
        assert_eq!(found(none, None), (Some(1), ChosenBy::Order), "{none}");
    }
    assert_eq!(found("root=/dev/vda2", Some("none")), (Some(1), ChosenBy::Order), "there is no such entry");
}

/// As many groups as a hostile superblock says, of blocks that a sparse image has: memory is not asked for.
#[test]
fn groups_are_bounded() {
    struct Sparse(Vec<u8>);
    impl ReadAt for Sparse {
        fn bytes(&self) -> u64 {
            1 << 50
        }

        fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
            buffer.fill(0);
            let from = self.0.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
            let count = from.len().min(buffer.len());
            buffer[..count].copy_from_slice(&from[..count]);
            Ok(())
        }
    }
    let folder = debian_root();
    let Some(image) = ext("ext4", folder.path()) else { return };
    let Some(mut image) = debugfs(&image, &["feature -metadata_csum"]) else { return };
    // 2³² blocks in groups of 8.
    image[1024 + 4..1024 + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    image[1024 + 32..1024 + 36].copy_from_slice(&8_u32.to_le_bytes());
    let disk = Range::whole(Rc::new(Sparse(image)), 1 << 30);
    let error = Ext::load(&disk).err().expect("refused");
    assert_eq!(error, "ext4 of more than 1048576 groups of blocks");
}

/// A guest that cannot write the disk mounts it without its journal, and GRUB reads it so: all see the same files.
#[test]
fn a_journal_that_was_not_replayed_is_left_out_and_said() {
    let folder = root_with(b"old:x:1:1::/:/bin/sh\n");
    for options in [&[][..], &["feature -metadata_csum"]] {
        let Some(clean) = ext("ext4", folder.path()) else { return };
        let Some(clean) = debugfs(&clean, options) else { return };
        let found = root(&clean, Some("old")).expect("a root");
        assert!(!found.needs_recovery && !take(&clean, None).expect("found").found.needs_recovery);
        let Some(dirty) = dirty(&clean) else { return };
        let found = root(&disk(&[&dirty]), Some("old")).expect("a root");
        assert_eq!((found.partition, found.needs_recovery), (Some(1), true), "{options:?}");
        assert_eq!(found.user, RootUser::Line("old:x:1:1::/:/bin/sh".into()), "not what the journal has");
        let taken = take(&dirty, None).expect("found");
        assert!(taken.found.needs_recovery && taken.kernel == vec![7; 100_000]);
        let missing = take(&dirty, Some("Other")).err().expect("no such file").to_string();
        assert!(missing.contains("ext4 whose journal was not replayed"), "{missing}");
        // A superblock that is damaged as well is still seen to be.
        if options.is_empty() {
            let mut damaged = dirty.clone();
            damaged[1024 + 0x78] ^= 1;
            assert!(root(&damaged, None).is_err());
        }
    }
}

/// A file system with a journal in which the block of /etc/passwd has other users.
fn dirty(clean: &[u8]) -> Option<Vec<u8>> {
    let at = clean.windows(8).position(|bytes| bytes == b"old:x:1:").expect("the list of users");
    let (block, mut new) = (at / 1024, vec![0; 1024]);
    new[..21].copy_from_slice(b"new:x:2:2::/:/bin/sh\n");
    let content = tempfile::NamedTempFile::new().expect("a file");
    fs::write(content.path(), new).expect("written");
    let commands = tempfile::NamedTempFile::new().expect("a file");
    let text = format!("jo\njw -b {block} {}\njc\n", content.path().display());
    fs::write(commands.path(), text).expect("written");
    let image = tempfile::NamedTempFile::new().expect("a file");
    fs::write(image.path(), clean).expect("written");
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let out =
        Command::new("debugfs").env("PATH", path).arg("-w").arg("-f").arg(commands.path()).arg(image.path()).output();
    let out = out.map_err(|error| skipped(&format!("debugfs: {error}"))).ok()?;
    assert!(out.status.success(), "{out:?}");
    Some(fs::read(image.path()).expect("read"))
}

/// The readers are other crates: a panic in one is an error of the image, and no end of the process.
#[test]
fn a_panic_of_a_reader_is_an_error_of_the_image() {
    let disk = OpenDisk { disk: Rc::new(vec![0; 512]), files: Vec::new() };
    let error = |job: fn() -> Result<Root, FindError>| {
        answer(&disk, &[], Isolation::None, job).expect_err("an error").to_string()
    };
    let text = error(|| panic!("index out of bounds\u{1b}[2J"));
    assert!(text.contains("file systems are damaged") && text.contains("index out of bounds"), "{text}");
    assert!(!text.contains('\u{1b}'), "{text}");
    assert!(error(|| std::panic::panic_any(7)).contains("without a message"));
}
