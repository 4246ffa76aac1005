use super::*;
use std::fs;
use std::io::Write;

/// A tree as `dpkg -x` leaves it, after depmod: the kernel in boot, a plain and a compressed module.
fn tree() -> (tempfile::TempDir, PathBuf) {
    let tree = tempfile::tempdir().expect("a folder");
    let folder = tree.path().join("lib/modules/6.1-x");
    fs::create_dir_all(folder.join("kernel")).expect("made");
    fs::create_dir(tree.path().join("boot")).expect("made");
    fs::write(folder.join("modules.order"), "").expect("written");
    fs::write(folder.join("kernel/overlay.ko.zst"), zstd::encode_all(&b"\x7fELF overlay"[..], 1).expect("packed"))
        .expect("written");
    fs::write(folder.join("kernel/base.ko"), b"\x7fELF base").expect("written");
    (tree, folder)
}

fn look(tree: &Path, given: Option<&Path>, drivers: &[Driver]) -> Result<Modules, ModulesError> {
    find(
        Places { kernel: &tree.join("boot/vmlinuz"), given },
        "6.1-x",
        drivers,
        LinkChoice::VsockFirst,
        Isolation::None,
    )
}

#[test]
fn modules_are_found_and_unpacked() {
    let (tree, folder) = tree();
    assert!(matches!(look(tree.path(), None, &[Driver::Overlay]), Err(ModulesError::NoIndex(_))));
    fs::write(folder.join("modules.dep"), "kernel/overlay.ko.zst: kernel/base.ko\nkernel/base.ko:\n").expect("written");
    fs::write(folder.join("modules.builtin"), "kernel/virtiofs.ko\n").expect("written");
    for given in [None, Some(tree.path().to_owned()), Some(folder.clone()), folder.parent().map(Path::to_owned)] {
        let found = look(tree.path(), given.as_deref(), &[Driver::Overlay, Driver::Virtiofs]).expect("modules");
        let names: Vec<_> = found.modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["00-base.ko", "01-overlay.ko"]);
        assert_eq!(found.modules[1].bytes, b"\x7fELF overlay");
    }
    let error = look(tree.path(), None, &[Driver::Vsock]).expect_err("missing");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("CONFIG_VIRTIO_VSOCKETS"), "{source}");
}

#[test]
fn damaged_modules_are_named() {
    let (tree, folder) = tree();
    fs::write(folder.join("modules.dep"), "kernel/overlay.ko.zst:\n").expect("written");
    fs::write(folder.join("kernel/overlay.ko.zst"), b"\x28\xb5\x2f\xfd damaged").expect("written");
    let error = look(tree.path(), None, &[Driver::Overlay]).expect_err("damaged");
    assert!(matches!(error, ModulesError::Unpack { .. }), "{error}");
    fs::remove_file(folder.join("kernel/overlay.ko.zst")).expect("removed");
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.join("kernel/overlay.ko.zst"), rustix::fs::Mode::RUSR)
        .expect("a FIFO");
    let error = look(tree.path(), None, &[Driver::Overlay]).expect_err("a FIFO");
    assert!(matches!(error, ModulesError::Open { source: OpenError::Kind, .. }), "{error}");
}

#[test]
fn an_index_that_is_no_file_is_not_waited_for() {
    let (tree, folder) = tree();
    fs::write(folder.join("modules.dep"), "kernel/base.ko:\n").expect("written");
    rustix::fs::mkfifoat(rustix::fs::CWD, folder.join("modules.softdep"), rustix::fs::Mode::RUSR).expect("a FIFO");
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(look(tree.path(), None, &[]).map(|_| ()).map_err(|error| error.to_string())));
    let said = wait.recv_timeout(std::time::Duration::from_secs(10)).expect("it waits for a writer");
    assert!(said.expect_err("refused").contains("modules.softdep"));
}

#[test]
fn all_modules_together_are_bounded() {
    let (tree, folder) = tree();
    let count = TOTAL_BYTES / MODULE_BYTES + 1;
    let names: Vec<String> = (0..count).map(|number| format!("kernel/m{number}.ko")).collect();
    for name in &names {
        fs::File::create(folder.join(name)).and_then(|file| file.set_len(MODULE_BYTES)).expect("a sparse file");
    }
    let lines: String = names.iter().map(|name| format!("{name}:\n")).collect();
    let all = format!("kernel/overlay.ko.zst: {}\n{lines}", names.join(" "));
    fs::write(folder.join("modules.dep"), all).expect("written");
    let error = look(tree.path(), None, &[Driver::Overlay]).map(|_| ()).expect_err("too large");
    assert!(matches!(error, ModulesError::TooMuch(_)), "{error}");
}

#[test]
fn copies_are_read_from_their_places() {
    let mut file = tempfile::tempfile().expect("a file");
    let packed = zstd::encode_all(&b"\x7fELF packed"[..], 1).expect("packed");
    file.write_all(b"\x7fELF plain").and_then(|()| file.write_all(&packed)).expect("written");
    let at = |path: &str, offset, bytes| CopiedModule { path: path.into(), range: FileRange { offset, bytes } };
    let length = packed.len() as u64;
    let modules = vec![at("i.img:/m/b/x-y.ko", 0, 10), at("i.img:/m/a.ko.zst", 10, length)];
    let copied = CopiedModules { folder: Some("i.img:/m".into()), file, modules, link: Some(AgentLink::Ports) };
    let found = of_copies(&copied, Isolation::None).expect("modules");
    let all: Vec<_> = found.modules.iter().map(|module| (module.name.as_str(), &module.bytes[..])).collect();
    assert_eq!(all, [("00-x-y.ko", &b"\x7fELF plain"[..]), ("01-a.ko", b"\x7fELF packed")]);
    assert_eq!(found.folder.as_deref(), Some(Path::new("i.img:/m")));
    assert_eq!(found.link, Some(AgentLink::Ports));
    let cut = CopiedModules { modules: vec![at("i.img:/m/a.ko", 5, 10 + length)], ..copied };
    assert!(matches!(of_copies(&cut, Isolation::None), Err(ModulesError::Read { .. })), "behind the end");
    let none = CopiedModules { folder: None, ..cut };
    assert!(of_copies(&none, Isolation::None).expect("none").folder.is_none());
}

/// A guest that can write to the folder could read any file of the host by the next run.
#[test]
fn links_lead_to_modules_alone() {
    let (tree, folder) = tree();
    let (inside, outside) = (folder.join("kernel/other.ko"), tree.path().join("outside.ko"));
    for (target, is_module) in [(&inside, true), (&outside, false)] {
        fs::write(target, b"\x7fELF overlay").expect("written");
        let link = folder.join("kernel/overlay.ko");
        fs::write(folder.join("modules.dep"), "kernel/overlay.ko:\n").expect("written");
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(target, &link).expect("linked");
        let found = look(tree.path(), None, &[Driver::Overlay]);
        assert_eq!(found.is_ok(), is_module, "{:?}", found.err());
    }
}

#[test]
fn the_current_folder_is_looked_at() {
    let places = Places { kernel: Path::new("vmlinuz"), given: None };
    let folders = candidates(places, "6.1");
    assert_eq!(folders.first().map(PathBuf::as_path), Some(Path::new(".")));
    assert!(folders.contains(&PathBuf::from("./modules")));
    assert!(folders.iter().all(|folder| !folder.as_os_str().is_empty()));
}

#[test]
fn a_kernel_without_modules_is_taken_as_it_is() {
    let tree = tempfile::tempdir().expect("a folder");
    let found = look(tree.path(), None, &[Driver::Overlay]).expect("none");
    assert!(found.folder.is_none() && found.modules.is_empty());
    let error = look(tree.path(), Some(tree.path()), &[Driver::Overlay]).expect_err("nothing there");
    assert!(matches!(error, ModulesError::NotThere { .. }), "{error}");
}
#[test]
fn names_from_modules_dep_are_shown_on_one_line() {
    let (tree, folder) = tree();
    let module = "kernel/\u{1b}[1m\u{202e}/overlay.ko";
    fs::write(folder.join("modules.dep"), format!("{module}:\n")).expect("written");
    let error = look(tree.path(), None, &[Driver::Overlay]).expect_err("there is no such file");
    let said = crate::error::chain(&error);
    assert!(said.contains(r"kernel/\u{1b}[1m\u{202e}/overlay.ko"), "{said:?}");
    assert!(!said.chars().any(hwvmm_devices::path_text::is_active), "{said:?}");
}
