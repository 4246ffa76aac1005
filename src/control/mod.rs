//! The control socket of a running machine (`--api PATH`): the protocol, its server, and the client of `hwvmm ctl` and
//! `hwvmm top`.

mod client;
mod live;
pub mod protocol;
mod server;

pub use client::{ClientError, SnapshotError, request, snapshot};
pub use live::{Live, Saved, Saver};
pub use protocol::{Request, RequestError, Response};
pub use server::{ListenError, Server};
