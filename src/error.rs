//! Errors as text.

pub use hwvmm_devices::error::chain;
