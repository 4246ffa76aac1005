//! The formats of kernel files, and the structures that each boot protocol hands to the guest.

pub mod bzimage;
pub mod elf;
pub mod multiboot;
pub mod pvh;
mod read;
pub mod zero_page;

pub use read::{FileRange, ReadAt};
