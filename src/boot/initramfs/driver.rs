//! Whether a kernel has a driver, before it is decided which devices it gets.

use super::index::{Driver, is_module};
use super::modules::{Places, candidates, text_if_there};
use super::release::kernel_release;
use crate::boot::identify::KernelFile;
use std::path::Path;

/// Returns true if `kernel` has `driver` for certain: its modules are found, in the folder `given` by `--modules` or else beside the kernel and
/// where distributions keep them, and it is one of them or built in.
#[must_use]
pub fn has_driver(kernel: &KernelFile, given: Option<&Path>, driver: Driver) -> bool {
    let places = Places { kernel: kernel.path(), given };
    kernel_release(kernel).ok().flatten().is_some_and(|release| has(places, &release, driver))
}

/// Files that cannot be read name no driver: that they cannot be is said when they are needed.
fn has(places: Places<'_>, release: &str, driver: Driver) -> bool {
    let folders = candidates(places, release);
    let Some(folder) = folders.iter().find(|folder| folder.join("modules.dep").is_file()) else { return false };
    let lists = ["modules.dep", "modules.builtin"].map(|list| text_if_there(&folder.join(list)).unwrap_or_default());
    lists.iter().flat_map(|list| list.lines()).any(|line| is_module(line, driver))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_driver_is_there_as_a_module_or_built_in() {
        let tree = tempfile::tempdir().expect("a folder");
        let folder = tree.path().join("lib/modules/6.1-x");
        fs::create_dir_all(&folder).expect("made");
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).expect("written");
        let has =
            |release: &str, driver| has(Places { kernel: &tree.path().join("vmlinuz"), given: None }, release, driver);
        assert!(!has("6.1-x", Driver::VirtioMmio), "nothing is known");
        write("modules.dep", "kernel/virtio_mmio_x.ko:\nkernel/x.ko: kernel/virtio_mmio.ko\n");
        assert!(!has("6.1-x", Driver::VirtioMmio), "others");
        write("modules.builtin", "kernel/drivers/virtio/virtio_mmio.ko\n");
        assert!(has("6.1-x", Driver::VirtioMmio) && !has("6.1-y", Driver::VirtioMmio));
        write("modules.dep", "kernel/virtio-pci.ko.xz: kernel/virtio.ko.xz\n");
        assert!(has("6.1-x", Driver::VirtioPci));
    }
}
