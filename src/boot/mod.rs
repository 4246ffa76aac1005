//! Kernels and initial RAM disks: identified, unpacked, and loaded into guest memory.
//!
//! The files build on each other in one order: `unpack` (compression formats), `error`, `file`, `identify`, `cache`,
//! `placement` (where they go), `prepare` (unpacked files), `load` (guest memory).

pub mod cache;
mod error;
mod file;
mod identify;
pub mod image;
pub mod initramfs;
mod load;
mod placement;
mod prepare;
pub mod unpack;

pub use error::{FileRole, KernelError};
pub use identify::{KernelFile, KernelFormat};
pub use load::{Loaded, Request, load};
pub use prepare::{
    InitrdSource, Prepared, UnpackOptions, Wanted, isolation, prepare, unpack_bzimage, unpack_initrd, unpacked,
};
