//! The control socket of a running machine.

mod live;
mod server;

pub use live::Live;
pub use server::{ApiError, Server};
