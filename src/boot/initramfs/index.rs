//! Which modules a kernel needs for a list of drivers, by the files that depmod(8) writes.

use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

/// The longest chain of dependencies. Real ones have fewer than ten.
const MAX_DEPTH: usize = 32;

/// A driver that a guest needs to run a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Driver {
    /// The hash of modules' signatures in vector instructions. The kernel has it without, several times slower.
    FastSha256,
    /// Finds virtio devices on MMIO.
    VirtioMmio,
    /// Finds virtio devices on PCI.
    VirtioPci,
    /// Sockets to the host: the command's streams.
    Vsock,
    /// Ports to the host, which can have the command's streams in place of sockets.
    VirtioConsole,
    /// Folders of the host.
    Virtiofs,
    /// Takes what is written to a read-only root.
    Overlay,
    /// Disks.
    VirtioBlk,
    /// A checksum that ext4 asks the kernel for by its name, which modules.dep does not say. New kernels have it built in, and no
    /// module.
    Crc32c,
    /// The file system of a disk: ext2 to ext4.
    Ext4,
}

impl Driver {
    /// The module's name, with `_` for `-`.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            Self::FastSha256 => "sha256_ssse3",
            Self::VirtioMmio => "virtio_mmio",
            Self::VirtioPci => "virtio_pci",
            Self::Vsock => "vmw_vsock_virtio_transport",
            Self::VirtioConsole => "virtio_console",
            Self::Virtiofs => "virtiofs",
            Self::Overlay => "overlay",
            Self::VirtioBlk => "virtio_blk",
            Self::Crc32c => "crc32c_generic",
            Self::Ext4 => "ext4",
        }
    }

    /// The option that a kernel is built with to have the driver.
    #[must_use]
    pub fn option(self) -> &'static str {
        match self {
            Self::FastSha256 => "CONFIG_CRYPTO_SHA256_SSSE3",
            Self::VirtioMmio => "CONFIG_VIRTIO_MMIO",
            Self::VirtioPci => "CONFIG_VIRTIO_PCI",
            Self::Vsock => "CONFIG_VIRTIO_VSOCKETS",
            Self::VirtioConsole => "CONFIG_VIRTIO_CONSOLE",
            Self::Virtiofs => "CONFIG_VIRTIO_FS",
            Self::Overlay => "CONFIG_OVERLAY_FS",
            Self::VirtioBlk => "CONFIG_VIRTIO_BLK",
            Self::Crc32c => "CONFIG_CRYPTO_CRC32C",
            Self::Ext4 => "CONFIG_EXT4_FS",
        }
    }

    /// Returns true if a kernel may be without it.
    #[must_use]
    fn is_optional(self) -> bool {
        matches!(self, Self::Crc32c | Self::FastSha256)
    }

    /// Returns true if the driver is of use only where modules are loaded after it.
    fn is_for_modules(self) -> bool {
        self == Self::FastSha256
    }
}

/// Why a driver's modules cannot be told.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IndexError {
    /// The driver is neither built in nor a module.
    #[error("the kernel has no driver {}: it has to be built with {}=y or =m", .0.module(), .0.option())]
    NoDriver(Driver),
    /// modules.dep names a module that it does not list.
    #[error("modules.dep has no line for {0:?}: run depmod")]
    NotListed(String),
    /// A path in modules.dep leads out of its folder.
    #[error("modules.dep names {0:?}, which is not in its folder")]
    Outside(String),
    /// Dependencies are too deep.
    #[error("modules.dep has dependencies more than {MAX_DEPTH} deep, at {0:?}")]
    TooDeep(String),
}

/// The files that depmod(8) writes, as text.
#[derive(Clone, Copy, Debug, Default)]
pub struct IndexFiles<'a> {
    /// The text of modules.dep; each line is `PATH: PATH...`, a module and those that it needs.
    pub dependencies: &'a str,
    /// The text of modules.builtin; each line is the path of a driver that is built in.
    pub builtin: &'a str,
    /// The text of modules.softdep; each line is `softdep NAME pre: NAME... post: NAME...`.
    pub soft: &'a str,
}

/// The modules of a kernel.
#[derive(Debug, Default)]
pub struct ModuleIndex<'a> {
    /// By path: the paths of those that it depends on.
    dependencies: BTreeMap<&'a str, &'a str>,
    paths: BTreeMap<String, &'a str>,
    builtin: BTreeSet<String>,
    /// By name: names of those that should be loaded before.
    soft: BTreeMap<String, Vec<String>>,
}

/// The module's name in a path: `a/snd-x.ko.xz` is `snd_x`.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

impl<'a> ModuleIndex<'a> {
    /// Reads the files. Lines that make no sense are left out.
    #[must_use]
    pub fn parse(files: IndexFiles<'a>) -> Self {
        let mut index = Self::default();
        for (path, needs) in files.dependencies.lines().filter_map(|line| line.split_once(':')) {
            index.dependencies.insert(path, needs);
            index.paths.insert(name(path), path);
        }
        index.builtin.extend(files.builtin.lines().map(|line| name(line.trim())));
        for line in files.soft.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("softdep"), Some(of)) = (words.next(), words.next()) else { continue };
            let before = words.skip_while(|word| *word != "pre:").skip(1).take_while(|word| !word.ends_with(':'));
            index.soft.entry(name(of)).or_default().extend(before.map(name));
        }
        index
    }

    /// The paths of the modules that `drivers` need, in the order in which they are to be loaded. Empty if all are built in.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn resolve(&self, drivers: &[Driver]) -> Result<Vec<&'a str>, IndexError> {
        let own = self.resolve_all(drivers.iter().filter(|driver| !driver.is_for_modules()))?;
        if own.is_empty() { Ok(own) } else { self.resolve_all(drivers.iter()) }
    }

    fn resolve_all<'d>(&self, drivers: impl Iterator<Item = &'d Driver>) -> Result<Vec<&'a str>, IndexError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for driver in drivers {
            match self.paths.get(driver.module()) {
                Some(path) => self.visit(path, 0, &mut seen, &mut order)?,
                None if self.builtin.contains(driver.module()) || driver.is_optional() => {}
                None => return Err(IndexError::NoDriver(*driver)),
            }
        }
        Ok(order)
    }

    fn visit(
        &self,
        path: &'a str,
        depth: usize,
        seen: &mut BTreeSet<&'a str>,
        order: &mut Vec<&'a str>,
    ) -> Result<(), IndexError> {
        if depth > MAX_DEPTH {
            return Err(IndexError::TooDeep(path.to_owned()));
        }
        if path.is_empty() || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(IndexError::Outside(path.to_owned()));
        }
        if !seen.insert(path) {
            return Ok(());
        }
        let needs = *self.dependencies.get(path).ok_or_else(|| IndexError::NotListed(path.to_owned()))?;
        // Those that are missing do no harm: a soft dependency is a wish (modprobe.d(5)).
        let soft = self.soft.get(&name(path)).into_iter().flatten();
        for before in soft.filter_map(|before| self.paths.get(before)) {
            self.visit(before, depth + 1, seen, order)?;
        }
        // depmod lists the one that is loaded first last.
        for need in needs.split_ascii_whitespace().rev() {
            self.visit(need, depth + 1, seen, order)?;
        }
        order.push(path);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOCK: IndexFiles<'static> = IndexFiles {
        dependencies: "k/virtio.ko: k/virtio_ring.ko\nk/virtio_ring.ko:\nk/virtio_mmio.ko: k/virtio.ko k/virtio_ring.ko\n\
            k/fuse/virtiofs.ko: k/virtio.ko k/virtio_ring.ko k/fuse/fuse.ko\nk/fuse/fuse.ko:\n\
            k/vmw_vsock_virtio_transport.ko: k/common.ko k/vsock.ko k/virtio.ko k/virtio_ring.ko\n\
            k/common.ko: k/vsock.ko k/virtio.ko k/virtio_ring.ko\nk/vsock.ko:\nk/wish-a.ko.xz:\n",
        builtin: "k/overlay.ko\n",
        soft: "# comment\nsoftdep vsock pre: wish_a nothere post: virtiofs\n",
    };

    #[test]
    fn modules_come_after_those_they_need() {
        let order = ModuleIndex::parse(STOCK)
            .resolve(&[Driver::VirtioMmio, Driver::Vsock, Driver::Virtiofs, Driver::Overlay])
            .expect("an order");
        let expected = [
            "k/virtio_ring.ko",
            "k/virtio.ko",
            "k/virtio_mmio.ko",
            "k/wish-a.ko.xz",
            "k/vsock.ko",
            "k/common.ko",
            "k/vmw_vsock_virtio_transport.ko",
            "k/fuse/fuse.ko",
            "k/fuse/virtiofs.ko",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn a_driver_that_is_missing_is_named_with_its_option() {
        let error = ModuleIndex::parse(STOCK).resolve(&[Driver::VirtioPci]).expect_err("missing");
        assert_eq!(error, IndexError::NoDriver(Driver::VirtioPci));
        assert!(error.to_string().contains("CONFIG_VIRTIO_PCI"));
    }

    #[test]
    fn ext4_has_its_checksum() {
        let dependencies = "k/crc32c_generic.ko:\nk/ext4.ko: k/jbd2.ko k/crc16.ko\nk/jbd2.ko:\nk/crc16.ko:\n";
        let resolve = |dependencies| {
            let index = ModuleIndex::parse(IndexFiles { dependencies, ..IndexFiles::default() });
            index.resolve(&[Driver::Crc32c, Driver::Ext4]).map(|paths| paths.join(" "))
        };
        let all = "k/crc32c_generic.ko k/crc16.ko k/jbd2.ko k/ext4.ko";
        assert_eq!(resolve(dependencies).as_deref(), Ok(all));
        let newer = dependencies.replace("k/crc32c_generic.ko:\n", "");
        let index = ModuleIndex::parse(IndexFiles { dependencies: &newer, ..IndexFiles::default() });
        assert_eq!(index.resolve(&[Driver::Crc32c, Driver::Ext4]).map(|paths| paths.len()), Ok(3));
    }

    #[test]
    fn a_fast_hash_is_loaded_before_modules_and_not_alone() {
        let resolve = |dependencies, builtin| {
            let index = ModuleIndex::parse(IndexFiles { dependencies, builtin, soft: "" });
            index.resolve(&[Driver::FastSha256, Driver::Overlay]).map(|paths| paths.join(" "))
        };
        let both = "k/sha256-ssse3.ko:\nk/overlay.ko:\n";
        assert_eq!(resolve(both, "").as_deref(), Ok("k/sha256-ssse3.ko k/overlay.ko"));
        assert_eq!(resolve("k/overlay.ko:\n", "").as_deref(), Ok("k/overlay.ko"));
        assert_eq!(resolve("k/sha256-ssse3.ko:\n", "k/overlay.ko\n").as_deref(), Ok(""));
    }

    #[test]
    fn damaged_files_are_refused() {
        let resolve = |dependencies: &str| {
            ModuleIndex::parse(IndexFiles { dependencies, ..IndexFiles::default() })
                .resolve(&[Driver::Overlay])
                .map(|_| ())
        };
        assert_eq!(resolve("overlay.ko: a.ko\n"), Err(IndexError::NotListed("a.ko".into())));
        assert_eq!(resolve("overlay.ko: /a.ko\n/a.ko:\n"), Err(IndexError::Outside("/a.ko".into())));
        assert_eq!(resolve("../overlay.ko:\n"), Err(IndexError::Outside("../overlay.ko".into())));
        assert_eq!(resolve("overlay.ko: a.ko\na.ko: overlay.ko\n"), Ok(()), "a circle ends");
        let chain: String = (0..10_000).map(|i| format!("m{i}.ko: m{}.ko\n", i + 1)).collect();
        assert!(matches!(resolve(&format!("overlay.ko: m0.ko\n{chain}")), Err(IndexError::TooDeep(_))));
    }
}
