//! VM exit codes of the hardware: VMX basic exit reasons and SVM EXITCODEs, their names, and the decoding of their details.

pub mod detail;
pub mod event;
pub mod svm;
pub mod vmx;

pub use detail::{ApicAccess, Class, IoAccess, Isa};
pub use event::{AccessKind, Event, EventKind, Register, RegisterAccess};
