//! GRUB's configuration: what its menu has, as far as entries start Linux.

mod run;
mod syntax;
#[cfg(test)]
mod tests;
mod variables;

pub(super) use run::{By, Config, SourceError, Volumes, menu, split_device};
pub(super) use syntax::MAX_BYTES;
