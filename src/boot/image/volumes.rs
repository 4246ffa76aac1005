//! The file systems of an image, and the menu of the boot loader that is installed on them.

use super::bls::{self, BlsEntry};
use super::disk::Range;
use super::file::FileError;
use super::filesystem::{Content, FileSystem, content};
use super::grub::{self, By, SourceError};
use super::menu::{Entry, MAX_ENTRIES, Menu};
use super::partitions::partitions;
use glob::Pattern;
use serde::{Deserialize, Serialize};

/// The most partitions that are looked at.
const MAX_VOLUMES: usize = 128;
/// The most names of a folder that are looked at.
const MAX_NAMES: usize = 4096;
/// The size of GRUB's environment is 1024 bytes.
const GRUBENV_BYTES: u64 = 4096;
/// The configuration of systemd-boot.
const LOADER_CONF: &str = "/loader/loader.conf";
/// The largest loader.conf in bytes.
const LOADER_CONF_BYTES: u64 = 64 << 10;
/// Folders of GRUB, from the root of a file system: that of the root, or one of its own for /boot.
const GRUB: [&str; 4] = ["/boot/grub", "/boot/grub2", "/grub", "/grub2"];
/// Folders of the Boot Loader Specification, in the same places.
const LOADER: [&str; 2] = ["/loader", "/boot/loader"];
/// Folders with those of the modules of each kernel, from the root of a file system.
const MODULES: [&str; 2] = ["/lib/modules", "/usr/lib/modules"];
/// Names of devices begin with this in what is read here; a number follows.
const NAME: &str = "vol";

/// A partition, or a whole disk without partitions, as messages name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The number of the partition; `None` for the whole disk.
    pub partition: Option<u32>,
    /// What is on it.
    pub what: String,
}

struct Volume {
    /// The number of its partition; `None` for the whole disk.
    partition: Option<u32>,
    /// The UUID of the partition (`PARTUUID=`); empty for the whole disk.
    uuid: String,
    content: Content,
}

/// The file systems of an image.
#[derive(Default)]
pub(super) struct Volumes(Vec<Volume>);

impl Volumes {
    /// Reads the partition table and the superblocks of `disk`.
    #[must_use]
    pub(super) fn of(disk: &Range) -> Self {
        let table = partitions(disk);
        if table.is_empty() {
            return Self(vec![Volume { partition: None, uuid: String::new(), content: content(disk) }]);
        }
        let volume = |partition: &super::partitions::Partition| {
            let range = disk.part(partition.start, partition.bytes)?;
            Some(Volume { partition: Some(partition.number), uuid: partition.uuid.clone(), content: content(&range) })
        };
        Self(table.iter().take(MAX_VOLUMES).filter_map(volume).collect())
    }

    fn readable(&self) -> impl Iterator<Item = (usize, &FileSystem)> {
        self.0.iter().enumerate().filter_map(|(index, volume)| match &volume.content {
            Content::FileSystem(fs) => Some((index, fs)),
            Content::Other(_) => None,
        })
    }

    /// What is on each partition.
    #[must_use]
    pub(super) fn seen(&self) -> Vec<Seen> {
        let what = |content: &Content| match content {
            Content::FileSystem(fs @ FileSystem::Ext(_)) if fs.needs_recovery() => {
                "ext4 whose journal was not replayed".to_owned()
            }
            Content::FileSystem(FileSystem::Ext(_)) => "ext4".to_owned(),
            Content::FileSystem(FileSystem::Fat(_)) => "FAT".to_owned(),
            Content::Other(what) => what.clone(),
        };
        self.0.iter().map(|volume| Seen { partition: volume.partition, what: what(&volume.content) }).collect()
    }

    /// Returns true if the journal of one was not replayed.
    #[must_use]
    pub(super) fn needs_recovery(&self) -> bool {
        self.readable().any(|(_, fs)| fs.needs_recovery())
    }

    /// The file systems that Linux can have for a root, and the numbers of their partitions; `None` for the whole disk.
    pub(super) fn roots(&self) -> impl Iterator<Item = (Option<u32>, &FileSystem)> {
        let is_root = |fs: &FileSystem| {
            matches!(fs, FileSystem::Ext(_))
                && fs.exists("/etc")
                && ["/bin", "/usr/bin", "/sbin"].iter().any(|folder| fs.exists(folder))
        };
        let roots = self.readable().filter(move |(_, fs)| is_root(fs));
        roots.filter_map(|(index, fs)| Some((self.0.get(index)?.partition, fs)))
    }

    /// The number of the partition that Linux' parameter `root=` names with this value. A name like /dev/sda2 is of the disk that the
    /// image is, whatever disks its system had.
    #[must_use]
    pub(super) fn named(&self, root: &str) -> Option<u32> {
        let (kind, value) = match root.strip_prefix("/dev/disk/by-") {
            Some(link) => link.split_once('/')?,
            None => root.split_once('=').unwrap_or(("device", root)),
        };
        let is_it = |index: usize, volume: &Volume| {
            let fs = || self.readable().find(|(readable, _)| *readable == index).map(|(_, fs)| fs);
            match kind.to_ascii_lowercase().as_str() {
                "uuid" => fs().is_some_and(|fs| fs.uuid().eq_ignore_ascii_case(value)),
                "label" => fs().is_some_and(|fs| fs.label() == value),
                "partuuid" => volume.uuid.eq_ignore_ascii_case(value),
                "device" => volume.partition.is_some() && partition_of_device(value) == volume.partition,
                _ => false,
            }
        };
        let (_, volume) = self.0.iter().enumerate().find(|(index, volume)| is_it(*index, volume))?;
        volume.partition
    }

    /// The folder with the modules of the kernel `release`, which has a modules.dep, and its file system.
    #[must_use]
    pub(super) fn modules(&self, release: &str) -> Option<(String, &FileSystem)> {
        self.readable().find_map(|(_, fs)| {
            let mut folders = MODULES.iter().map(|folder| format!("{folder}/{release}"));
            folders.find(|folder| fs.exists(&format!("{folder}/modules.dep"))).map(|folder| (folder, fs))
        })
    }

    /// The file system that a boot loader calls `device`: by the name given here, or by the number of its partition (`hd0,gpt1`).
    #[must_use]
    pub(super) fn device(&self, device: &str) -> Option<&FileSystem> {
        let index = match device.strip_prefix(NAME) {
            Some(index) => index.parse().ok()?,
            None => {
                let partition = device.split_once(',').map(|(_, partition)| partition);
                let number = partition.map(|text| text.trim_start_matches(|c: char| c.is_ascii_alphabetic()).parse());
                let number: Option<u32> = number.transpose().ok()?;
                self.0.iter().position(|volume| volume.partition == number)?
            }
        };
        match &self.0.get(index)?.content {
            Content::FileSystem(fs) => Some(fs),
            Content::Other(_) => None,
        }
    }

    /// The menu of the boot loader: GRUB's, or else that of the Boot Loader Specification. `None` where there is none with an entry
    /// for Linux.
    ///
    /// # Errors
    /// Where a configuration is there and cannot be read: its path, and why.
    pub(super) fn menu(&self) -> Result<Option<Menu>, (String, String)> {
        for (index, fs) in self.readable() {
            for folder in GRUB {
                let path = format!("{folder}/grub.cfg");
                // What is there and cannot be read may be what the boot loader reads: another configuration would be a guess.
                let menu = self.grub_menu(index, fs, folder, &path).map_err(|why| (path, why))?;
                if let Some(menu) = menu.filter(Menu::has_linux) {
                    return Ok(Some(menu));
                }
            }
        }
        Ok(Some(self.loader_menu()?).filter(|menu| !menu.entries.is_empty()))
    }

    fn grub_menu(&self, index: usize, fs: &FileSystem, folder: &str, path: &str) -> Result<Option<Menu>, String> {
        let Some(text) = read(fs, path, grub::MAX_BYTES as u64)? else { return Ok(None) };
        let environment = read(fs, &format!("{folder}/grubenv"), GRUBENV_BYTES);
        let environment = environment.map_err(|why| format!("its grubenv: {why}"))?.unwrap_or_default();
        let config = grub::Config { text: &text, environment: &environment, device: &format!("{NAME}{index}"), folder };
        grub::menu(&config, self).map(Some).map_err(|error| error.to_string())
    }

    /// The menu of the Boot Loader Specification, from the files of all file systems. The error is the path of what cannot be read,
    /// and why.
    fn loader_menu(&self) -> Result<Menu, (String, String)> {
        let mut found: Vec<(usize, BlsEntry)> = Vec::new();
        let mut pattern = String::new();
        for (index, fs) in self.readable() {
            found.extend(entries(fs, &str::to_owned)?.into_iter().map(|entry| (index, entry)));
            let conf = read(fs, LOADER_CONF, LOADER_CONF_BYTES).map_err(|why| (LOADER_CONF.to_owned(), why))?;
            if pattern.is_empty() {
                pattern = bls::default_pattern(&conf.unwrap_or_default()).to_owned();
            }
        }
        found.sort_by(|(_, a), (_, b)| a.compare(b));
        found.truncate(MAX_ENTRIES);
        let entries: Vec<Entry> = (0..)
            .zip(found)
            .map(|(number, (index, entry))| entry.into_entry(number, &format!("{NAME}{index}")))
            .collect();
        let pattern = Pattern::new(pattern.trim_end_matches(".conf")).ok();
        let chosen = pattern.and_then(|pattern| entries.iter().find(|entry| pattern.matches(&entry.id)));
        let default = chosen.map(|entry| entry.id.clone()).unwrap_or_default();
        Ok(Menu { entries, default })
    }
}

/// The number of the partition in the name of a device: 2 of /dev/sda2 and of /dev/nvme0n1p2.
fn partition_of_device(name: &str) -> Option<u32> {
    let name = name.strip_prefix("/dev/")?;
    let disk = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let is_partition = match disk.strip_suffix('p') {
        Some(disk) => disk.ends_with(|c: char| c.is_ascii_digit()),
        None => ["sd", "vd", "hd", "xvd"].iter().any(|kind| disk.starts_with(kind)),
    };
    name.get(disk.len()..)?.parse().ok().filter(|_| is_partition)
}

/// The text of a file; `None` where there is none. The error is why it cannot be read.
fn read(fs: &FileSystem, path: &str, limit: u64) -> Result<Option<String>, String> {
    match fs.read(path, limit) {
        Ok(text) => Ok(Some(String::from_utf8_lossy(&text).into_owned())),
        Err(FileError::NotFound | FileError::Kind) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

/// The entries of the Boot Loader Specification on a file system, in no order. The error is the path of what cannot be read, and why.
fn entries(fs: &FileSystem, expand: &dyn Fn(&str) -> String) -> Result<Vec<BlsEntry>, (String, String)> {
    for folder in LOADER.map(|folder| format!("{folder}/entries")) {
        let names = match fs.names(&folder, MAX_NAMES) {
            Ok(names) => names,
            Err(FileError::NotFound | FileError::Kind) => continue,
            Err(error) => return Err((folder, error.to_string())),
        };
        let files: Vec<String> = names.into_iter().filter(|name| name.ends_with(".conf")).collect();
        if files.len() > MAX_ENTRIES {
            return Err((folder, format!("it has more than {MAX_ENTRIES} entries")));
        }
        let mut found = Vec::new();
        for name in files {
            let path = format!("{folder}/{name}");
            let text = read(fs, &path, bls::MAX_BYTES).map_err(|why| (path, why))?;
            found.extend(text.and_then(|text| BlsEntry::parse(&name, &text, expand)));
        }
        if !found.is_empty() {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

impl grub::Volumes for Volumes {
    fn search(&self, by: By, what: &str) -> Option<String> {
        let is_it = |fs: &FileSystem| match by {
            By::Uuid => fs.uuid().eq_ignore_ascii_case(what),
            By::Label => fs.label() == what,
            By::File => fs.exists(what),
        };
        self.readable().find(|(_, fs)| is_it(fs)).map(|(index, _)| format!("{NAME}{index}"))
    }

    fn exists(&self, device: &str, path: &str) -> bool {
        self.device(device).is_some_and(|fs| fs.exists(path))
    }

    fn read(&self, device: &str, path: &str) -> Result<Option<String>, SourceError> {
        let Some(fs) = self.device(device) else { return Ok(None) };
        read(fs, path, grub::MAX_BYTES as u64).map_err(|why| SourceError { path: path.to_owned(), why })
    }

    fn bls(&self, device: &str, expand: &dyn Fn(&str) -> String) -> Result<Vec<BlsEntry>, SourceError> {
        let found = self.device(device).map(|fs| entries(fs, expand)).transpose();
        let mut found = found.map_err(|(path, why)| SourceError { path, why })?.unwrap_or_default();
        found.sort_by(BlsEntry::compare);
        Ok(found)
    }
}
