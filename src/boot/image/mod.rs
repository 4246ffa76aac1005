//! Disk images as vendors ship them: the kernel is taken out of their file systems, by the configuration of the boot loader; and the root file
//! system and the kernel's modules are found.
//!
//! The files build on each other in one order: `disk` (bytes), `partitions` and `filesystem` (with `file`, `inode` and `ext`); `menu` (entries), `bls` and `grub` (two
//! kinds of configuration); `volumes` (all file systems of an image), `find`, `root`, `modules`, `process` (all of it, confined).

mod bls;
mod disk;
mod ext;
mod file;
mod filesystem;
mod find;
mod grub;
mod inode;
mod menu;
mod modules;
mod partitions;
mod process;
mod root;
#[cfg(test)]
mod tests;
mod volumes;

pub use disk::{Range, ReadAt};
pub use find::{FindError, Found, find, list_seen};
pub use menu::Listed;
pub use modules::{FoundModule, FoundModules, WantedModules, find_modules};
pub use process::{
    ImageKernel, ImageKernelError, ImageModules, OpenDisk, WantedKernel, kernel_of, modules_of, root_of,
};
pub use root::{ChosenBy, Root, RootUser, WantedRoot, find_root};
pub use volumes::Seen;

/// The entries for Linux of a grub.cfg without file systems, and the text of its grubenv: for fuzz targets and tests.
///
/// # Errors
/// What is wrong with it.
pub fn grub_entries(text: &str, environment: &str) -> Result<Vec<Listed>, String> {
    let config = grub::Config { text, environment, device: "vol0", folder: "/boot/grub" };
    let menu = grub::menu(&config, &volumes::Volumes::default()).map_err(|error| error.to_string())?;
    Ok(menu.listed())
}
