//! PCI: one bus, one function a device (PCI Local Bus 3.0, PCI Express Base 4.0 §7).

mod config;
mod msix;
mod root;

pub use config::{BarLayout, Capability, ConfigSpace, Identity};
pub use msix::{MsiRouter, MsiVector, Msix};
pub use root::{ConfigPorts, ECAM_BUS_BYTES, Ecam, PciFunction, Root, RootError};
