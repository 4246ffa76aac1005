//! qcow2 images: what is checked before imago, which reads and writes them, sees them, and the files that they name.
//!
//! A header cannot be trusted: an image can come from others, and a guest can have written it to a raw disk. imago trusts the tables of an image: it
//! overwrites the header, or calls itself without end, where a cluster that is in use has a reference count of 0. So header and
//! tables are checked when an image is opened. From then on only imago writes them, and a guest writes data clusters only.

mod chain;
#[cfg(test)]
mod chain_tests;
mod device;
mod error;
mod header;
mod inspect;
mod tables;
#[cfg(test)]
mod tests;

pub(super) use chain::{OpenChain, open};
pub(super) use device::warn_of_device;
pub use error::{FeatureBit, NamedFileError, Qcow2Error, Table};
pub use inspect::{CheckJob, CheckPlace};
pub(super) use tables::FormatSource;
