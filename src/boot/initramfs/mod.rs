//! The initramfs of a guest that runs one command: the agent (src/agent), the modules that the kernel needs, and what the agent is
//! to do. It is made in memory, the same bytes from the same files.

mod cpio;
mod error;
mod index;
mod instructions;
mod link;
mod modules;
mod put;
mod release;

pub use cpio::{Archive, CpioError, DeviceNumber};
pub use error::InitramfsError;
pub use index::{Driver, IndexError, IndexFiles, ModuleIndex};
pub use instructions::{
    AgentTask, CommandSpec, GuestRoot, GuestUser, Instructions, Signatures, TerminalSize, Variable, WritableShare,
};
pub use link::{AgentLink, LinkChoice, Resolved};
pub use modules::{CopiedModule, CopiedModules, ModulesError, Places};
pub use put::Put;
pub use release::kernel_release;

use super::identify::KernelFile;
use crate::sandbox::Isolation;
use std::path::{Path, PathBuf};

/// The agent, which build.rs builds.
const AGENT: &[u8] = include_bytes!(env!("HWVMM_AGENT"));

/// Where the modules of a kernel are.
#[derive(Clone, Copy, Debug)]
pub enum ModuleSource<'a> {
    /// On the host: in the folder of `--modules`, or else beside the kernel, and where distributions keep them.
    Host(Option<&'a Path>),
    /// In a disk image, which they were copied from.
    Copied(&'a CopiedModules),
}

/// What an initramfs is made of.
#[derive(Clone, Copy)]
pub struct InitramfsRequest<'a> {
    /// The kernel, whose release says which modules it takes.
    pub kernel: &'a KernelFile,
    /// Where its modules are.
    pub modules: ModuleSource<'a>,
    /// The drivers that the guest needs, in the order in which they are loaded. Vsock is among them, for what the agent uses.
    pub drivers: &'a [Driver],
    /// What the agent may use.
    pub links: LinkChoice,
    /// What the agent is to do.
    pub instructions: &'a Instructions,
    /// Files of the host that the initramfs has.
    pub put: &'a [Put],
    /// Where compressed modules are unpacked.
    pub isolation: Isolation,
}

/// An initramfs that runs a command, and the modules that were put into it.
#[derive(Debug)]
pub struct Initramfs {
    /// The archive: newc, not compressed.
    pub archive: Vec<u8>,
    /// The folder that the modules are from. `None` if none was found: then the kernel has to have all drivers built in.
    pub modules_folder: Option<PathBuf>,
    /// The modules' names, in the order in which they are loaded.
    pub modules: Vec<String>,
    /// What the agent reaches the host by, as the kernel's list of modules says; `None` where there is no list.
    pub link: Option<AgentLink>,
}

/// Makes the initramfs.
///
/// # Errors
/// [`InitramfsError`].
pub fn build(request: &InitramfsRequest<'_>) -> Result<Initramfs, InitramfsError> {
    let kernel = request.kernel;
    let release =
        kernel_release(kernel).map_err(|source| InitramfsError::Release { path: kernel.path().to_owned(), source })?;
    let found = match (release, request.modules) {
        (Some(release), ModuleSource::Host(given)) => {
            let places = Places { kernel: kernel.path(), given };
            modules::find(places, &release, request.drivers, request.links, request.isolation)?
        }
        (_, ModuleSource::Copied(copied)) => modules::of_copies(copied, request.isolation)?,
        (None, ModuleSource::Host(Some(_))) => return Err(InitramfsError::NoRelease(kernel.path().to_owned())),
        (None, ModuleSource::Host(None)) => modules::Modules::default(),
    };
    let names: Vec<String> = found.modules.iter().map(|module| module.name.clone()).collect();
    let mut archive = Archive::default();
    // The kernel opens /dev/console for /init, and Rust's runtime /dev/null where a standard stream is missing.
    archive.device(Path::new("/dev/console"), 0o600, DeviceNumber { major: 5, minor: 1 })?;
    archive.device(Path::new("/dev/null"), 0o666, DeviceNumber { major: 1, minor: 3 })?;
    archive.file(Path::new("/init"), 0o755, AGENT)?;
    let instructions = request.instructions.encode(names.iter().map(String::as_str))?;
    archive.file(Path::new("/hwvmm/instructions"), 0o600, &instructions)?;
    for module in &found.modules {
        archive.file(&Path::new("/hwvmm/modules").join(&module.name), 0o600, &module.bytes)?;
    }
    put::all(&mut archive, request.put)?;
    Ok(Initramfs { archive: archive.finish()?, modules_folder: found.folder, modules: names, link: found.link })
}
