//! The files that a machine's guest is loaded from.

use crate::boot::cache::Cache;
use crate::boot::{self, KernelError, KernelFile, Prepared};
use crate::config::RunConfig;

/// The files that a machine's guest is loaded from: opened, identified and unpacked once for each start, before the machine is
/// made.
pub struct Files {
    pub(super) kernel: KernelFile,
    pub(super) prepared: Prepared,
}

impl Files {
    /// Unpacks `kernel`, or finds it in the cache, and opens and unpacks the initrd of `config`. `progress` is called with a
    /// message before anything that takes long.
    ///
    /// # Errors
    /// [`KernelError`] where the initrd cannot be opened.
    pub fn open(config: &RunConfig, kernel: KernelFile, progress: &dyn Fn(&str)) -> Result<Self, KernelError> {
        let cache = config.kernel_cache.as_deref().map(Cache::new);
        let wanted = boot::Wanted {
            initrd: config.initrd.as_deref(),
            memory_bytes: config.memory.bytes,
            unpack: config.unpack,
            boot: config.boot,
            how: boot::UnpackOptions { cache: cache.as_ref(), isolation: boot::isolation(config.sandbox), progress },
        };
        let prepared = boot::prepare(&kernel, &wanted)?;
        Ok(Self { kernel, prepared })
    }
}
