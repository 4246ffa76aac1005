//! The file system device (virtio 1.3 §5.11), which shares a directory of the host by FUSE. The file system is the passthrough
//! file system of fuse-backend-rs, in this process, behind the rules of `guard.rs`. It opens names one component at a time
//! and never by a path, and `.` and `..` are not names, so that no name and no symbolic link leads out of the directory. A
//! directory that the host moves out while the guest knows it stays known, with all below it, until the guest forgets it.

mod bounce;
mod guard;
mod policy;
mod requests;
mod root;
mod saved;
mod session;
mod tables;
#[cfg(test)]
mod tests;
mod thread;
mod worker;
mod xattr;

pub use policy::OPEN_FLAGS;

use crate::path_text::PathText as _;
use crate::virtio::device::{
    ActivateError, Activation, DeviceKind, FlushWork, InterruptVectors, VirtioDevice, read_config_bytes,
};
use crate::virtio::device_thread::{DeviceThread, ThreadPreparation};
use crate::virtio::saved::{DeviceFault, DeviceState, FileId, SaveFault};
use crate::virtio::worker::Worker;
use guard::GuardedFs;
use policy::{Access, PrivilegedFiles, Rules, Users};
use root::ImportError;
use rustix::fs::fstat;
use session::Session;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use tables::Limits;
use thiserror::Error;
use worker::FsWorker;
use xattr::Attributes;

/// Size in bytes of the tag in the device configuration.
const TAG_BYTES: usize = 36;
/// Number of queues: the high priority queue (for FORGET) and one request queue.
const QUEUES: u16 = 2;
/// Maximum size of a queue, in descriptors: a request of 1 MiB has 256 for its pages, and up to four for its headers. Linux from 5.14 on
/// makes its requests smaller than the queue, older ones do not.
const QUEUE_SIZE: u16 = 512;

/// A directory cannot be shared.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The tag has an invalid length.
    #[error("the tag '{0}' of a shared directory must have 1 to {TAG_BYTES} bytes")]
    Tag(String),
    /// The path does not exist or cannot be accessed.
    #[error("cannot share {}", .0.shown())]
    Access(PathBuf, #[source] io::Error),
    /// The thread that opens the directory panicked.
    #[error("cannot share {}: the thread that opens it panicked: this is a bug in hwvmm", .0.shown())]
    Panicked(PathBuf),
    /// The path is not a directory.
    #[error("cannot share {}: it is not a directory", .0.shown())]
    NotDirectory(PathBuf),
    /// A request from before a reset has not ended.
    #[error("the host's file system has not answered a request of the former driver")]
    Busy,
}

/// A guest cannot go on with what it knew of a directory.
#[derive(Debug, Error)]
#[error("the snapshot cannot be used: its state of the shared directory")]
struct RestoreError(#[source] DeviceFault);

/// What to share, and how.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// The name by which the guest mounts the directory, 1 to 36 bytes.
    pub tag: String,
    /// Path of the directory on the host.
    pub directory: PathBuf,
    /// The guest cannot change files.
    pub read_only: bool,
    /// The guest can make device nodes, and files with a set-user-ID or set-group-ID bit.
    pub privileged_files: bool,
}

impl FsOptions {
    fn cannot_share(&self, error: io::Error) -> ShareError {
        match error.kind() {
            io::ErrorKind::NotADirectory => ShareError::NotDirectory(self.directory.clone()),
            _ => ShareError::Access(self.directory.clone(), error),
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            access: if self.read_only { Access::ReadOnly } else { Access::ReadWrite },
            privileged_files: if self.privileged_files { PrivilegedFiles::Allowed } else { PrivilegedFiles::Refused },
            users: Users::of_this_process(),
        }
    }
}

/// The file system device.
pub struct Fs {
    tag: String,
    fs: Arc<GuardedFs>,
    /// Where the directory is a mount in no namespace, the mounts below it end when this is closed.
    _mount: Option<OwnedFd>,
}

impl Fs {
    /// Makes a device that shares a directory, and opens the directory. Raises the process's limit of open files.
    ///
    /// # Errors
    /// Returns [`ShareError`] where the tag is invalid, or where the path is not a directory.
    pub fn new(options: FsOptions) -> Result<Self, ShareError> {
        let directory = root::open(&options.directory).map_err(|error| options.cannot_share(error))?;
        Self::with_limits(options, &directory, Limits::reserve())
    }

    /// As [`Fs::new`], with the directory as a mount of its own (open_tree(2)), which is kept open.
    ///
    /// # Errors
    /// As of [`Fs::new`].
    pub fn of_mount(options: FsOptions, mount: OwnedFd) -> Result<Self, ShareError> {
        let device = Self::with_limits(options, &mount, Limits::reserve())?;
        Ok(Self { _mount: Some(mount), ..device })
    }

    fn with_limits(options: FsOptions, directory: &OwnedFd, limits: Limits) -> Result<Self, ShareError> {
        if !(1..=TAG_BYTES).contains(&options.tag.len()) {
            return Err(ShareError::Tag(options.tag));
        }
        let inner = root::import(directory.as_fd()).map_err(|error| match error {
            ImportError::Host(error) => options.cannot_share(error),
            ImportError::Panicked => ShareError::Panicked(options.directory.clone()),
        })?;
        let attributes = Attributes::new().map_err(|error| options.cannot_share(error))?;
        let stat = fstat(directory).map_err(|error| options.cannot_share(error.into()))?;
        let root =
            FileId { device: stat.st_dev, inode: stat.st_ino, kind: stat.st_mode & libc::S_IFMT, link_made_ns: 0 };
        let fs = Arc::new(GuardedFs::new(inner, root, attributes, options.rules(), limits));
        Ok(Self { tag: options.tag, fs, _mount: None })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 26, name: "fs", pci_class: 0x0180 }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(QUEUES)]
    }

    fn interrupt_vectors(&self) -> InterruptVectors {
        InterruptVectors::Shared
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Fs
    }

    fn thread_count(&self) -> usize {
        usize::from(QUEUES)
    }

    fn thread_preparation(&self) -> ThreadPreparation {
        let privileged_files = self.fs.rules().privileged_files;
        let fs = Arc::clone(&self.fs);
        Arc::new(move || {
            thread::limit(privileged_files)?;
            fs.finish_restore().map_err(|source| Box::new(RestoreError(source)) as _)
        })
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        let tag = self.tag.as_bytes();
        config[..tag.len()].copy_from_slice(tag);
        config[TAG_BYTES..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        if !self.fs.keeps() && !self.fs.try_reset() {
            return Err(ActivateError::Device(Box::new(ShareError::Busy)));
        }
        self.fs.keep(false);
        let session = Arc::new(Session::new(&self.fs));
        let mut workers: Vec<Worker> = Vec::new();
        for index in 0..QUEUES {
            let worker = FsWorker::new(activation.take_queue(index)?, Arc::clone(&session));
            workers.push(Box::new(worker.map_err(|error| ActivateError::Device(Box::new(error)))?));
        }
        Ok(workers)
    }

    fn prepare_pause(&mut self) {
        self.fs.keep(true);
    }

    /// Nothing is written, but what is open is looked at where the host can be asked.
    fn flush(&self) -> Option<FlushWork> {
        let fs = Arc::clone(&self.fs);
        Some(Box::new(move || {
            fs.mark_open_files();
            Ok(())
        }))
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(self.fs.save()?.map(DeviceState::Share))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Share(state) = state else { return Err(DeviceFault::Other) };
        self.fs.restore(state)
    }

    /// What the guest knew is forgotten by the worker that ended last, or when the device is activated again.
    fn reset(&mut self) {
        self.fs.keep(false);
    }
}
