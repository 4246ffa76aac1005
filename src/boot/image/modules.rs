//! The modules of a kernel that are in an image.

use super::disk::Range;
use super::file::FileError;
use super::filesystem::FileSystem;
use super::find::{FindError, cut};
use super::volumes::{Seen, Volumes};
use crate::boot::initramfs::{AgentLink, Driver, IndexFiles, LinkChoice, ModuleIndex, Resolved};
use serde::{Deserialize, Serialize};
use std::io::Write;

/// The most modules that are copied. A guest needs about ten.
pub(super) const MAX_MODULES: usize = 256;
/// The largest module, as it is in the image, in bytes.
const MODULE_BYTES: u64 = 64 << 20;
/// The largest size of all modules together, in bytes.
const TOTAL_BYTES: u64 = 256 << 20;
/// The largest file of depmod(8) that is read. modules.dep of a distribution has less than 1 MiB.
const INDEX_BYTES: u64 = 16 << 20;

/// Which modules are taken out of an image.
#[derive(Clone, Copy, Debug)]
pub struct WantedModules<'a> {
    /// The kernel's release, as `uname -r` prints it.
    pub release: &'a str,
    /// The drivers that a guest needs, in the order in which they are loaded.
    pub drivers: &'a [Driver],
    /// What the agent may use where the kernel has no vsock.
    pub links: LinkChoice,
}

/// The modules of a kernel that were found in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundModules {
    /// Their folder in the image; `None` if it has none of this kernel.
    pub folder: Option<String>,
    /// In the order in which they are to be loaded, which is that of their bytes.
    pub modules: Vec<FoundModule>,
    /// What the agent reaches the host by, as the list of them says; `None` where there is no list.
    pub link: Option<AgentLink>,
    /// Where there are none: what is on the image.
    pub seen: Vec<Seen>,
}

/// A module that was copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundModule {
    /// Its path in the folder of modules.
    pub path: String,
    /// Its size as it is in the image, perhaps compressed, in bytes.
    pub bytes: u64,
}

/// Copies the modules that are `wanted` to `out`, one behind the other.
///
/// # Errors
/// [`FindError::Modules`] where the image has modules of this kernel, and not those, or they cannot be read.
pub fn find_modules(disk: &Range, wanted: WantedModules<'_>, out: &mut dyn Write) -> Result<FoundModules, FindError> {
    let volumes = Volumes::of(disk);
    let Some((folder, fs)) = volumes.modules(wanted.release) else {
        let seen = volumes.seen().into_iter().map(|seen| Seen { what: cut(&seen.what), ..seen });
        return Ok(FoundModules { seen: seen.collect(), ..FoundModules::default() });
    };
    copy_modules(fs, &folder, wanted, out).map_err(|why| FindError::Modules { folder: cut(&folder), why: cut(&why) })
}

/// Copies modules of a folder. The error is what is wrong with it.
fn copy_modules(
    fs: &FileSystem,
    folder: &str,
    wanted: WantedModules<'_>,
    out: &mut dyn Write,
) -> Result<FoundModules, String> {
    let text = |name: &str| match fs.read(&format!("{folder}/{name}"), INDEX_BYTES) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(FileError::NotFound) => Ok(String::new()),
        Err(error) => Err(format!("{name}: {error}")),
    };
    let (dependencies, builtin, soft) = (text("modules.dep")?, text("modules.builtin")?, text("modules.softdep")?);
    let index = ModuleIndex::parse(IndexFiles { dependencies: &dependencies, builtin: &builtin, soft: &soft });
    let resolved = Resolved::of(&index, wanted.drivers, wanted.links);
    let Resolved { paths, link } = resolved.map_err(|error| error.to_string())?;
    if paths.len() > MAX_MODULES {
        return Err(format!("modules.dep names {} modules, and hwvmm copies at most {MAX_MODULES}", paths.len()));
    }
    let mut left = TOTAL_BYTES;
    let mut modules = Vec::new();
    for path in paths {
        let bytes = fs
            .copy(&format!("{folder}/{path}"), MODULE_BYTES.min(left), out)
            .map_err(|error| format!("{path}: {error}"))?;
        left = left.saturating_sub(bytes);
        modules.push(FoundModule { path: path.to_owned(), bytes });
    }
    Ok(FoundModules { folder: Some(folder.to_owned()), modules, link: Some(link), seen: Vec::new() })
}
