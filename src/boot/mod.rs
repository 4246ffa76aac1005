//! Kernels and initial RAM disks: identified, unpacked, and loaded into guest memory.
//!
//! The files build on each other in one order: `unpack` (compression formats), `error`, `file`, `identify`, `cache`,
//! `prepare` (unpacked files), `load` (guest memory).

pub mod cache;
mod error;
mod file;
mod identify;
mod load;
mod prepare;
pub mod unpack;

pub use error::{FileRole, KernelError};
pub(crate) use file::open;
pub use identify::{KernelFormat, identify, is_linux, is_multiboot};
pub use load::{Loaded, Request, load};
pub use prepare::{unpack_bzimage, unpack_initrd, unpacked};
