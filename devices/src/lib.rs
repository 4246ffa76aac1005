//! Device models: what a guest finds behind its ports and its memory-mapped registers. They know the bus, an interrupt
//! line and host files; they know neither KVM nor the processor.

pub mod bus;
pub mod console;
pub mod irq;
pub mod legacy;
pub mod memory;
pub mod page;
pub mod pci;
pub mod socket;
pub mod virtio;

pub use bus::{Action, Bus, BusBuilder, BusDevice, BusError};
pub use page::RegisterPage;
