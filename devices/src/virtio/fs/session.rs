//! A share from DRIVER_OK to the reset of the device.

use super::guard::{FsServer, GuardedFs};
use std::sync::Arc;

/// What the workers share from DRIVER_OK to the reset of the device.
pub(super) struct Session {
    pub(super) server: FsServer,
    fs: Arc<GuardedFs>,
}

impl Session {
    pub(super) fn new(fs: &Arc<GuardedFs>) -> Self {
        Self { server: FsServer::new(Arc::clone(fs)), fs: Arc::clone(fs) }
    }
}

impl Drop for Session {
    /// On the thread of the worker that ends last: forgets the files that the guest knew, which closes them.
    fn drop(&mut self) {
        if !self.fs.keeps() {
            // Where a request still waits for the host, the next activation tries again.
            let _ = self.fs.try_reset();
        }
    }
}
