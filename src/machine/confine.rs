//! The machine's process in its sandbox: what stays within reach, and the roles of its threads.

use crate::config::{RunConfig, ShareConfig};
use crate::sandbox::{Access, Reach, Sandbox, ThreadRole};
use crate::vcpu::Confinement;
use hwvmm_devices::virtio::{DeviceThread, ThreadStart};
use std::sync::Arc;

/// What is opened by name while the guest runs: files of shared folders.
pub(super) fn reach(config: &RunConfig) -> Vec<Reach> {
    config.share.iter().map(folder).collect()
}

/// What may be done in a shared folder.
pub(super) fn folder(share: &ShareConfig) -> Reach {
    let access = match (share.read_only, share.privileged_files) {
        (true, _) => Access::Read,
        (false, false) => Access::ReadWrite,
        (false, true) => Access::ReadWriteDevices,
    };
    Reach { path: share.path.clone(), access }
}

/// What the vCPUs' threads enter.
pub(super) fn vcpus(config: &RunConfig, sandbox: &Arc<Sandbox>) -> Confinement {
    let role = if config.testdev { ThreadRole::TestVcpu } else { ThreadRole::Vcpu };
    Confinement { sandbox: Arc::clone(sandbox), role }
}

/// What the threads of devices do first.
pub(super) fn device_threads(sandbox: &Arc<Sandbox>) -> ThreadStart {
    let sandbox = Arc::clone(sandbox);
    Arc::new(move |thread| {
        let role = match thread {
            DeviceThread::Block => ThreadRole::Block,
            DeviceThread::Net => ThreadRole::Net,
            DeviceThread::Vsock => ThreadRole::Vsock,
            DeviceThread::Fs => ThreadRole::Fs,
            DeviceThread::Console => ThreadRole::Console,
            DeviceThread::Balloon => ThreadRole::Balloon,
            DeviceThread::Rng => ThreadRole::Rng,
            DeviceThread::Vhost => ThreadRole::Vhost,
        };
        let this = std::thread::current();
        Ok(sandbox.enter(role, this.name().unwrap_or("a device's"))?)
    })
}
