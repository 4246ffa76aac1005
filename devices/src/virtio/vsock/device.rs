//! The socket device in userspace.

use super::connector::Connector;
use super::events::Events;
use super::muxer::{Muxer, MuxerSetup};
use super::sockets::{MAX_UNANSWERED, Sockets};
use super::spec::{KIND, QUEUE_SIZE, QUEUES};
use crate::path_text::PathText as _;
use crate::socket::Listener;
use crate::virtio::device::{ActivateError, Activation, DeviceKind, InterruptVectors, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault, VsockState};
use crate::virtio::slot::Slot;
use crate::virtio::worker::Worker;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// The Unix socket for host programs cannot be created.
#[derive(Debug, Error)]
#[error("cannot listen on the socket {}{}", .path.shown(), Listener::remedy(.source))]
pub struct VsockError {
    path: PathBuf,
    source: io::Error,
}

/// The socket device with Unix sockets of the host.
pub struct Vsock {
    cid: u32,
    listener: Option<Arc<Listener>>,
    connector: Arc<Connector>,
    /// The connections while no worker has them.
    sockets: Slot<Sockets>,
    /// The guest is to be told that its connections are closed.
    reset_due: Arc<AtomicBool>,
}

impl Vsock {
    /// Makes a device for a guest with the context ID `cid`, at least [`super::FIRST_CID`]. `path` is the Unix socket for host
    /// programs, without which none can connect, and `connector` reaches those that the guest can connect to.
    ///
    /// # Errors
    /// Returns [`VsockError`] where the socket at `path` cannot be created.
    pub fn new(cid: u32, path: Option<&Path>, connector: Arc<Connector>) -> Result<Self, VsockError> {
        let listen = |path: &Path| Listener::new(path).map_err(|source| VsockError { path: path.to_owned(), source });
        let listener = path.map(listen).transpose()?.map(Arc::new);
        Ok(Self { cid, listener, connector, sockets: Slot::new(None), reset_due: Arc::default() })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        KIND
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn interrupt_vectors(&self) -> InterruptVectors {
        InterruptVectors::Shared
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Vsock
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let (receive, transmit) = (activation.take_queue(0)?, activation.take_queue(1)?);
        // Only where there is something to tell: kicks of that queue would wake the worker for nothing.
        let events = if self.reset_due.load(Ordering::Acquire) { activation.take_queue(2).ok() } else { None };
        let muxer = Muxer::new(MuxerSetup {
            cid: u64::from(self.cid),
            listener: self.listener.clone(),
            connector: Arc::clone(&self.connector),
            receive,
            transmit,
            events: events.map(|queue| Events::new(queue, Arc::clone(&self.reset_due))),
            slot: self.sockets.clone(),
        });
        Ok(vec![Box::new(muxer)])
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        let sockets = self.sockets.take();
        let unanswered = sockets.as_ref().map(Sockets::unanswered).unwrap_or_default();
        self.sockets.put(sockets);
        Ok(Some(DeviceState::Vsock(VsockState { cid: self.cid, unanswered })))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Vsock(VsockState { cid, unanswered }) = state else { return Err(DeviceFault::Other) };
        if *cid != self.cid || unanswered.len() > MAX_UNANSWERED {
            return Err(DeviceFault::Vsock);
        }
        self.sockets.put(Some(Sockets::refusing(*cid, unanswered)));
        self.reset_due.store(true, Ordering::Release);
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.sockets.take());
        self.reset_due.store(false, Ordering::Release);
    }
}
