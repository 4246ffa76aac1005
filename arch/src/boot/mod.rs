//! The formats of kernel files, and the structures that each boot protocol hands to the guest.

pub mod bzimage;
pub mod elf;
mod method;
pub mod multiboot;
pub mod pvh;
mod read;
pub mod zero_page;

pub use method::{BootMethod, Decompressor, EntryProtocol};
pub use read::{FileRange, ReadAt};
