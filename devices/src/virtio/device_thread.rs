//! What the threads of devices are for, and what they do first when they start.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

/// What a device thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceThread {
    /// A queue of a disk.
    Block,
    /// A queue pair of a network card, or its control queue.
    Net,
    /// The socket device with Unix sockets.
    Vsock,
    /// A queue of a shared directory.
    Fs,
    /// A direction of a console.
    Console,
    /// The balloon's pages, or its statistics.
    Balloon,
    /// The queue of the entropy device.
    Rng,
    /// Queues that vhost-net or vhost-vsock works on.
    Vhost,
}

impl fmt::Display for DeviceThread {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Block => "block",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Fs => "fs",
            Self::Console => "console",
            Self::Balloon => "balloon",
            Self::Rng => "rng",
            Self::Vhost => "vhost",
        })
    }
}

/// Called by each device thread when it starts, before it sees anything of the guest, so that the caller can confine it. The
/// thread's event loop exists then. Where it fails, the device cannot be started.
pub type ThreadStart = Arc<dyn Fn(DeviceThread) -> Result<(), Box<dyn Error + Send + Sync>> + Send + Sync>;

/// What a device does on each of its threads when the thread starts, before [`ThreadStart`].
pub type ThreadPreparation = Arc<dyn Fn() -> Result<(), Box<dyn Error + Send + Sync>> + Send + Sync>;
