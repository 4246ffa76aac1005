//! Errors as text for people: an error with its causes on one line.

pub use hwvmm_devices::error::chain;
