//! Message signalled interrupts (PCI Local Bus 3.0 §6.8): messages, and their routes to interrupts of the host's KVM.

use std::error::Error as StdError;
use std::sync::Arc;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// A message signalled interrupt: a write of `data` to `address` (SDM vol. 3A §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address, with the destination in its bits.
    pub address: u64,
    /// The data: vector, delivery mode and trigger mode.
    pub data: u32,
}

/// A GSI cannot be routed.
#[derive(Debug, Error)]
#[error("cannot change the route of GSI {gsi}")]
pub struct RouteError {
    /// The global system interrupt (GSI) whose route was to be changed.
    pub gsi: u32,
    /// The error of the router: with KVM, of `KVM_SET_GSI_ROUTING`.
    pub source: Box<dyn StdError + Send + Sync>,
}

/// Routes GSIs to messages. KVM does so with its GSI routing table (KVM API §4.52, `KVM_SET_GSI_ROUTING`).
pub trait MsiRouter: Send + Sync {
    /// Makes `gsi` send `message` from now on.
    ///
    /// # Errors
    /// Returns [`RouteError`] where the routing table cannot be changed.
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), RouteError>;

    /// Makes `gsi` send nothing from now on.
    ///
    /// # Errors
    /// Returns [`RouteError`] where the routing table cannot be changed.
    fn unroute(&self, gsi: u32) -> Result<(), RouteError>;
}

/// A GSI for a message, and its irqfd.
#[derive(Clone)]
pub struct MsiVector {
    /// The GSI, to be routed by an [`MsiRouter`].
    pub gsi: u32,
    /// The irqfd: a write sends the message that `gsi` is routed to.
    pub event: Arc<EventFd>,
}
