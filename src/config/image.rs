//! Options that name disk images: with a kernel (`hwvmm run IMAGE`, `--kernel-from`), or with the root of a command (`--root IMAGE`).

use super::command::{AgentTask, RootChoice};
use super::devices::{ChangedDisk, DiskConfig, DiskFormat, DiskIo, WriteError};
use super::error::ConfigError;
use super::options::RunOptions;
use hwvmm_devices::path_text::PathText as _;
use std::path::{Path, PathBuf};

/// The serial number of the disk with the root of a command, by which the agent finds it.
pub const ROOT_DISK: &str = "hwvmm-root";

/// A disk with the image at `path`, and all else as if nothing was given.
fn disk(path: &Path) -> DiskConfig {
    DiskConfig {
        path: path.to_owned(),
        format: DiskFormat::Auto,
        data_file: None,
        read_only: false,
        direct: false,
        queues: 1,
        serial: String::new(),
        id: None,
        write_error: WriteError::Report,
        changed: ChangedDisk::Refuse,
        io: DiskIo::Auto,
    }
}

impl RunOptions {
    /// Takes the path of the kernel for that of an image with it, if `is_image` says that it is one, and that of the root if it
    /// is no folder.
    pub fn find_images(&mut self, is_image: impl Fn(&Path) -> bool) {
        if self.kernel_from.is_none() {
            self.kernel_from = self.kernel.take_if(|kernel| is_image(kernel));
        }
        if let Some(RootChoice::Folder(path)) = &self.root
            && path.metadata().is_ok_and(|metadata| !metadata.is_dir())
        {
            self.root = Some(RootChoice::Image(path.clone()));
        }
    }

    pub(super) fn kernel_path(&self) -> Result<PathBuf, ConfigError> {
        if let Some(folder) = &self.from {
            let refused = self.refused_with_snapshot();
            return refused.map_or(Ok(folder.clone()), |option| Err(ConfigError::NotWithFrom(option)));
        }
        match (&self.kernel, &self.kernel_from) {
            (Some(_), Some(_)) => Err(ConfigError::TwoKernels),
            (Some(path), None) if self.entry.is_none() => Ok(path.clone()),
            (Some(_), None) => Err(self.no_image("--entry")),
            (None, Some(path)) => Ok(path.clone()),
            (None, None) => Err(ConfigError::NoKernel),
        }
    }

    fn no_image(&self, option: &'static str) -> ConfigError {
        let kernel = self.kernel.as_deref().or(self.from.as_deref()).unwrap_or(Path::new(""));
        ConfigError::NoImage { option, kernel: kernel.shown().to_string() }
    }

    /// The root of a command, with the path of the image where it is that of the kernel.
    pub(super) fn root_choice(&self) -> Result<RootChoice, ConfigError> {
        match &self.root {
            Some(RootChoice::KernelImage) => {
                self.kernel_from.clone().map(RootChoice::Image).ok_or_else(|| self.no_image("--root image"))
            }
            given => Ok(given.clone().unwrap_or_default()),
        }
    }

    /// Returns true if the image at `path` is one of the disks that were given.
    #[must_use]
    pub fn has_disk(&self, path: &Path) -> bool {
        self.disk.iter().any(|disk| disk.path == path)
    }

    /// The disks that were given, behind the image with the kernel if it is none of them, and before that with the root. A command leaves
    /// both images as they are.
    pub(super) fn disks(&self) -> Vec<DiskConfig> {
        let read_only = self.task() != AgentTask::None;
        let root = match self.root_choice() {
            Ok(RootChoice::Image(path)) if read_only => {
                Some(DiskConfig { serial: ROOT_DISK.into(), read_only, ..disk(&path) })
            }
            _ => None,
        };
        let is_there = |path: &Path| self.disk.iter().chain(&root).any(|disk| disk.path == path);
        let kernel = self.kernel_from.as_ref().filter(|path| !is_there(path));
        let kernel = kernel.map(|path| DiskConfig { read_only, ..disk(path) });
        kernel.into_iter().chain(self.disk.iter().cloned()).chain(root).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{RunConfig, Transport};

    fn read(text: &str) -> RunOptions {
        toml::from_str(text).expect("valid TOML")
    }

    #[test]
    fn an_image_with_a_kernel_is_a_disk() {
        let of = |text: &str| read(text).into_config();
        let paths = |config: &RunConfig| config.disk.iter().map(|disk| disk.path.clone()).collect::<Vec<_>>();
        let image = of("kernel-from = 'a=b,c.img'\ndisk = ['d']\nentry = '1>0'").expect("valid");
        assert_eq!((image.kernel.as_path(), image.transport), (Path::new("a=b,c.img"), Transport::Pci));
        assert_eq!(paths(&image), [Path::new("a=b,c.img"), Path::new("d")]);
        let own = of("kernel-from = 'i'\ndisk = ['d', 'i,readonly=on']").expect("valid");
        assert!(paths(&own) == [Path::new("d"), Path::new("i")] && own.disk[1].read_only);
        assert!(matches!(of("kernel = 'k'\nkernel-from = 'i'"), Err(ConfigError::TwoKernels)));
        assert!(matches!(of("kernel = 'k'\nentry = '0'"), Err(ConfigError::NoImage { option: "--entry", .. })));
        let command = of("kernel-from = 'i'\ncommand = 'sh'\ndisk = ['d']").expect("valid");
        assert!(paths(&command) == [Path::new("i"), Path::new("d")] && command.disk[0].read_only);
        assert!(!command.has_image_cmdline() && image.has_image_cmdline() && !image.disk[0].read_only);
        let mut options = read("kernel = 'i'");
        options.find_images(|path| path == Path::new("j"));
        assert!(options.kernel_from.is_none());
        options.find_images(|path| path == Path::new("i"));
        assert_eq!(options.into_config().expect("valid").disk.len(), 1);
    }

    #[test]
    fn an_image_with_a_root_is_a_disk_that_cannot_be_written() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let root = |path: &Path, command: &str| {
            let mut options = read(&format!("kernel = 'k'\nroot = '{}'\n{command}disk = ['d']", path.display()));
            options.find_images(|_| false);
            options.into_config()
        };
        let image = root(file.path(), "command = 'sh'\n").expect("valid");
        assert_eq!(image.root, RootChoice::Image(file.path().to_owned()));
        assert!(image.share.is_empty() && image.disk.len() == 2);
        assert!(image.disk[1].read_only && image.disk[1].serial == ROOT_DISK && image.disk[1].path == file.path());
        let text = format!("kernel-from = '{0}'\nroot = '{0}'\ncommand = 'sh'", file.path().display());
        let mut both = read(&text);
        both.find_images(|_| false);
        let both = both.into_config().expect("valid");
        assert!(both.disk.len() == 1 && both.disk[0].serial == ROOT_DISK, "one disk has kernel and root");
        let named = both.root.clone();
        let image = |kernel: &str| read(&format!("{kernel}\nroot = 'image'\ncommand = 'sh'")).into_config();
        let kernels = image(&format!("kernel-from = '{}'", file.path().display())).expect("valid");
        assert!(kernels.root == named && kernels.disk == both.disk && kernels.share.is_empty());
        let error = image("kernel = 'k'").expect_err("a file").to_string();
        assert!(
            error.starts_with("--root image is for a kernel from a disk image") && error.contains("k is none"),
            "{error}"
        );
        let folder = root(Path::new("/"), "command = 'sh'\n").expect("valid");
        assert!(folder.root == RootChoice::Folder("/".into()) && folder.disk.len() == 1 && folder.share.len() == 1);
        assert!(root(file.path(), "").is_err(), "there is no command");
    }
}
