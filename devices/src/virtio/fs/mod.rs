//! The file system device (virtio 1.3 §5.11), which shares a directory of the host by FUSE. The file system is the passthrough
//! file system of fuse-backend-rs, in this process. It opens names one component at a time and never by a path, so that no
//! name and no symbolic link leads out of the directory.

mod bounce;
#[cfg(test)]
mod tests;
mod worker;

use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::worker::Worker;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;
use worker::{Access, FsWorker};

/// Size in bytes of the tag in the device configuration.
const TAG_BYTES: usize = 36;
/// Number of queues: the high priority queue (for FORGET) and one request queue.
const QUEUES: u16 = 2;
/// Maximum size of a queue, in descriptors.
const QUEUE_SIZE: u16 = 256;

/// A directory cannot be shared.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The tag has an invalid length.
    #[error("the tag '{0}' of a shared directory must have 1 to {TAG_BYTES} bytes")]
    Tag(String),
    /// The path does not exist or cannot be accessed.
    #[error("cannot share {}", .0.display())]
    Access(PathBuf, #[source] io::Error),
    /// The path is not a directory.
    #[error("cannot share {}: it is not a directory", .0.display())]
    NotDirectory(PathBuf),
}

/// What to share, and how.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// The name by which the guest mounts the directory, 1 to 36 bytes.
    pub tag: String,
    /// Path of the directory on the host.
    pub directory: PathBuf,
    /// The guest cannot change files.
    pub read_only: bool,
}

/// The file system device.
pub struct Fs {
    options: FsOptions,
}

impl Fs {
    /// Makes a device that shares a directory.
    ///
    /// # Errors
    /// Returns [`ShareError`] where the tag is invalid, or where the path is not a directory.
    pub fn new(options: FsOptions) -> Result<Self, ShareError> {
        let FsOptions { tag, directory, read_only } = options;
        if !(1..=TAG_BYTES).contains(&tag.len()) {
            return Err(ShareError::Tag(tag));
        }
        let absolute = directory.canonicalize().map_err(|error| ShareError::Access(directory, error))?;
        if !absolute.is_dir() {
            return Err(ShareError::NotDirectory(absolute));
        }
        raise_file_limit();
        Ok(Self { options: FsOptions { tag, directory: absolute, read_only } })
    }

    fn server(&self) -> io::Result<Server<PassthroughFs>> {
        let config = Config {
            root_dir: self.options.directory.to_string_lossy().into_owned(),
            // The guest sees changes on the host after one second.
            attr_timeout: std::time::Duration::from_secs(1),
            entry_timeout: std::time::Duration::from_secs(1),
            cache_policy: CachePolicy::Auto,
            ..Config::default()
        };
        PassthroughFs::new(config).map(Server::new)
    }
}

/// Raises the limit of open files, as each file that the guest knows is open in this process.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 1 << 20;
    let now = getrlimit(Resource::Nofile);
    let limits = [
        Rlimit { current: Some(WANTED), maximum: Some(WANTED.max(now.maximum.unwrap_or(WANTED))) },
        Rlimit { current: now.maximum, maximum: now.maximum },
    ];
    if now.current.is_some_and(|current| current < WANTED)
        && limits.into_iter().all(|limit| setrlimit(Resource::Nofile, limit).is_err())
    {
        log::warn!(
            "fs: the guest can use {:?} files of the shared directory at most; raise the limit with `ulimit -n`",
            now.current
        );
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 26, name: "fs", pci_class: 0x0180 }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(QUEUES)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        let tag = self.options.tag.as_bytes();
        config[..tag.len()].copy_from_slice(tag);
        config[TAG_BYTES..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let server = Arc::new(self.server().map_err(ActivateError::io("share the directory"))?);
        let access = if self.options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let mut workers: Vec<Worker> = Vec::new();
        for index in 0..QUEUES {
            let worker = FsWorker::new(activation.take_queue(index)?, Arc::clone(&server), access);
            workers.push(Box::new(worker.map_err(|error| ActivateError::Device(Box::new(error)))?));
        }
        Ok(workers)
    }
}
