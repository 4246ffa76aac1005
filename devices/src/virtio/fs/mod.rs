//! The file system device (virtio 1.3 §5.11): a folder of the host, by FUSE. The file system itself is fuse-backend-rs'
//! passthrough, in this process: it opens what a guest names one component at a time, never by a path, so that no name
//! and no symbolic link leads out of the folder.

mod bounce;
#[cfg(test)]
mod tests;
mod worker;

use super::{ActivateError, Activation, DeviceKind, VirtioDevice, Worker, read_config_bytes};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use worker::Requests;

const TAG_BYTES: usize = 36;
/// The high-priority queue (for FORGET), and one for requests.
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 256;

/// A folder cannot be shared.
#[derive(Debug, Error)]
pub enum ShareError {
    /// The tag.
    #[error("the tag '{0}' of a shared folder must be 1 to {TAG_BYTES} bytes long")]
    Tag(String),
    /// The folder.
    #[error("cannot share {}", .0.display())]
    Folder(PathBuf, #[source] io::Error),
    /// Not a folder.
    #[error("cannot share {}: it is not a folder", .0.display())]
    NotFolder(PathBuf),
}

/// The device.
pub struct Fs {
    tag: String,
    folder: PathBuf,
    read_only: bool,
}

impl Fs {
    /// Shares `folder` under the name `tag`, by which the guest mounts it.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn new(tag: &str, folder: &Path, read_only: bool) -> Result<Self, ShareError> {
        if !(1..=TAG_BYTES).contains(&tag.len()) {
            return Err(ShareError::Tag(tag.to_owned()));
        }
        let absolute = folder.canonicalize().map_err(|error| ShareError::Folder(folder.to_owned(), error))?;
        if !absolute.is_dir() {
            return Err(ShareError::NotFolder(absolute));
        }
        raise_file_limit();
        Ok(Self { tag: tag.to_owned(), folder: absolute, read_only })
    }

    fn server(&self) -> io::Result<Server<PassthroughFs>> {
        let config = Config {
            root_dir: self.folder.to_string_lossy().into_owned(),
            // The guest asks again after a second: changes on the host are seen.
            attr_timeout: std::time::Duration::from_secs(1),
            entry_timeout: std::time::Duration::from_secs(1),
            cache_policy: CachePolicy::Auto,
            ..Config::default()
        };
        PassthroughFs::new(config).map(Server::new)
    }
}

/// Each file that the guest knows costs an open one here.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const WANTED: u64 = 1 << 20;
    let now = getrlimit(Resource::Nofile);
    let ways = [
        Rlimit { current: Some(WANTED), maximum: Some(WANTED.max(now.maximum.unwrap_or(WANTED))) },
        Rlimit { current: now.maximum, maximum: now.maximum },
    ];
    if now.current.is_some_and(|current| current < WANTED)
        && ways.into_iter().all(|way| setrlimit(Resource::Nofile, way).is_err())
    {
        log::warn!(
            "fs: at most {:?} files of the shared folder can be known to the guest: see `ulimit -n`",
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
        config[..self.tag.len()].copy_from_slice(self.tag.as_bytes());
        config[TAG_BYTES..].copy_from_slice(&u32::from(QUEUES - 1).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let server = Arc::new(self.server().map_err(|error| ActivateError::Io("share the folder", error))?);
        let mut workers: Vec<Worker> = Vec::new();
        for index in 0..QUEUES {
            let requests = Requests::new(activation.queue(index)?, Arc::clone(&server), self.read_only);
            workers.push(Box::new(requests.map_err(|error| ActivateError::Io("get memory", error))?));
        }
        Ok(workers)
    }
}
