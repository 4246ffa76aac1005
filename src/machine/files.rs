//! The files that a machine's guest is loaded from.

use super::command::{self, CommandError};
use super::drivers::links;
use super::image::{DiskParts, FromImage};
use crate::boot::cache::Cache;
use crate::boot::initramfs::{AgentLink, LinkChoice, TerminalSize};
use crate::boot::{self, InitrdSource, KernelError, KernelFile, Prepared};
use crate::config::RunConfig;
use crate::exit::EndReason;
use crate::snapshot::{FolderError, Opened, SocketsDescription, State, WorkingSet};
use crate::tune::Lever;
use std::fs::File;
use std::io;
use thiserror::Error;

/// Why the files that a guest is loaded from cannot be had.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The kernel or the initrd.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs of the command.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The kernel's drivers.
    #[error("cannot search the kernel for its drivers")]
    Search(#[source] io::Error),
    /// The state of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] FolderError),
    /// The memory of a snapshot.
    #[error("cannot use the memory of the snapshot")]
    Memory(#[source] io::Error),
}

/// What a guest starts from.
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
pub(super) enum Source {
    /// A kernel, which is booted.
    Kernel {
        /// Its file.
        kernel: KernelFile,
        /// What else is loaded.
        prepared: Prepared,
    },
    /// A snapshot: its state and the file of its memory.
    Snapshot {
        /// All but its memory.
        state: State,
        /// The file that guest memory is mapped from.
        memory: File,
        /// The pages that are made ready.
        working_set: Option<WorkingSet>,
    },
}

/// The files that a machine's guest is loaded from: opened, identified and unpacked once for each start, before the machine is
/// made.
pub struct Files {
    pub(super) source: Source,
    /// The parameters of a kernel from an image.
    pub(super) cmdline: Option<String>,
    /// If the agent of a command fails: what may have been missing.
    hint: Option<String>,
    /// What the agent of a command reaches the host by.
    pub(super) link: AgentLink,
}

impl Files {
    /// As [`Files::open`], with the kernel of an image, and its initrd unless `config` has one.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn of_image(config: &RunConfig, image: FromImage, progress: &dyn Fn(&str)) -> Result<Self, FilesError> {
        let initrd = match (config.initrd.as_deref(), &image.initrd) {
            (Some(path), _) => Some(InitrdSource::Path(path)),
            (None, Some(file)) => Some(InitrdSource::Image(file)),
            (None, None) => None,
        };
        let prepared = prepare(config, &image.kernel, initrd, progress)?;
        let source = Source::Kernel { kernel: image.kernel, prepared };
        Ok(Self { source, cmdline: Some(image.cmdline), hint: None, link: AgentLink::default() })
    }

    /// Unpacks `kernel`, or finds it in the cache, and opens and unpacks the initrd of `config`, or makes the one of its command,
    /// which has `parts` from disks, and a terminal of the size `terminal`. `progress` is called with a message before anything that
    /// takes long.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn open(
        config: &RunConfig,
        kernel: KernelFile,
        parts: &DiskParts,
        terminal: Option<TerminalSize>,
        progress: &dyn Fn(&str),
    ) -> Result<Self, FilesError> {
        let made = config.has_agent().then(|| command::make(config, &kernel, parts, terminal)).transpose()?;
        let initrd = match &made {
            Some(made) => Some(InitrdSource::Made(&made.file)),
            None => config.initrd.as_deref().map(InitrdSource::Path),
        };
        let prepared = prepare(config, &kernel, initrd, progress)?;
        let link = match &made {
            Some(made) => made.link.map_or_else(|| link_of(config, &kernel, &prepared), Ok)?,
            None => AgentLink::default(),
        };
        let source = Source::Kernel { kernel, prepared };
        Ok(Self { source, cmdline: None, hint: made.and_then(|made| made.hint), link })
    }

    /// Reads the state of a snapshot, and the pages that a run before has used. One that writes these down does without.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn of_snapshot(config: &RunConfig, snapshot: &Opened) -> Result<Self, FilesError> {
        let memory = snapshot.memory().try_clone().map_err(FilesError::Memory)?;
        let link = match snapshot.description().sockets {
            Some(SocketsDescription::Ports) => AgentLink::Ports,
            Some(SocketsDescription::Vsock { .. }) | None => AgentLink::Vsock,
        };
        let wants_pages = config.record_working_set.is_none() && config.tune.wants(Lever::WorkingSet);
        let working_set = if wants_pages { snapshot.working_set() } else { None };
        Ok(Self {
            source: Source::Snapshot { state: snapshot.state()?, memory, working_set },
            cmdline: None,
            hint: None,
            link,
        })
    }

    /// Returns true if the guest is a multiboot kernel that is booted.
    pub(super) fn is_multiboot(&self) -> bool {
        match &self.source {
            Source::Kernel { kernel, .. } => kernel.is_multiboot(),
            Source::Snapshot { .. } => false,
        }
    }

    /// The end of a run with what may have been missing, where the agent failed.
    pub(super) fn explain(&self, end: EndReason) -> EndReason {
        match (end, &self.hint) {
            (EndReason::NoCommand(None), Some(hint)) => EndReason::NoCommand(Some(hint.clone())),
            (end, _) => end,
        }
    }
}

/// What the agent reaches the host by, as the kernel itself says: no list of its modules was found.
fn link_of(config: &RunConfig, kernel: &KernelFile, prepared: &Prepared) -> Result<AgentLink, FilesError> {
    match (links(config), prepared.vmlinux(kernel)) {
        (LinkChoice::Vsock, _) | (_, None) => Ok(AgentLink::Vsock),
        (choice, Some(vmlinux)) => AgentLink::of_vmlinux(vmlinux, choice).map_err(FilesError::Search),
    }
}

fn prepare(
    config: &RunConfig,
    kernel: &KernelFile,
    initrd: Option<InitrdSource<'_>>,
    progress: &dyn Fn(&str),
) -> Result<Prepared, KernelError> {
    let cache = config.kernel_cache.as_deref().map(Cache::new);
    let wanted = boot::Wanted {
        initrd,
        memory_bytes: config.memory.bytes,
        unpack: config.unpack,
        boot: config.boot,
        how: boot::UnpackOptions { cache: cache.as_ref(), isolation: boot::isolation(config.sandbox), progress },
    };
    boot::prepare(kernel, &wanted)
}
