//! A PCI bus whose devices have one function each (PCI Local Bus 3.0, PCI Express Base 4.0 §7).

mod config;
mod msi;
mod msix;
mod root;

pub use config::{BarLayout, Capability, ConfigSpace, ConfigSpaceState, Identity};
pub use msi::{MsiMessage, MsiRouter, MsiVector, RouteError};
pub use msix::{Msix, MsixControl, MsixState};
pub use root::{
    ConfigPorts, ECAM_BUS_BYTES, Ecam, PCI_CFG_CAPABILITY_BYTES, PCI_CFG_DATA_BYTES, PciFunction, PciRoot,
    PciRootError, PciState,
};
