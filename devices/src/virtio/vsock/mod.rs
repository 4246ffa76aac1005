//! The socket device (virtio 1.3 §5.10): stream connections between the guest and Unix sockets of the host, with the
//! convention of Firecracker.
//!
//! - The guest connects to port P of the host (CID 2): another process of hwvmm connects to the Unix socket `PATH_P`, and hands the
//!   connection over (`connector.rs`).
//! - A host program connects to the Unix socket `PATH` and writes `CONNECT P\n`: hwvmm connects to port P of the guest. Once
//!   the guest accepts, it answers `OK LOCAL_PORT\n`; otherwise it closes the socket.

mod connection;
mod connector;
mod device;
mod events;
mod kernel;
#[cfg(any(test, feature = "test-utils"))]
pub(in crate::virtio) mod mock;
mod muxer;
mod packet;
mod sockets;
mod spec;
#[cfg(test)]
mod tests;

pub use connector::{Answer, Connector, HostConnector, HostPorts, JoinedPort, Served, connector};
pub use device::{Vsock, VsockError};
pub use kernel::{KernelVsock, KernelVsockError};
pub use spec::FIRST_CID;
