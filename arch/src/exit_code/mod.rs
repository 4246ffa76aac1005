//! VM exit codes of the hardware: VMX basic exit reasons and SVM EXITCODEs, their names, and the decoding of their details.

pub mod access;
pub mod detail;
pub mod event;
pub mod svm;
pub mod vmx;

pub use access::AccessKind;
pub use detail::{ApicAccess, Class, IoAccess, Isa};
pub use event::{Event, EventKind, Register, RegisterAccess};
