//! Device models: the devices that a guest accesses through ports and memory-mapped registers. They depend on the bus, on
//! interrupt lines and on files of the host, and not on KVM or the processor.

// They panic where stdout or stderr takes nothing (a pipe without a reader).
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod bus;
pub mod console;
pub mod error;
mod half;
pub mod irq;
pub mod legacy;
pub mod memory;
pub mod page;
pub mod path_text;
pub mod pci;
#[cfg(test)]
#[path = "../../src/skip.rs"]
mod skip;
pub mod socket;
pub mod virtio;

pub use bus::{Action, Bus, BusBuilder, BusDevice, BusError};
pub use page::RegisterPage;
