//! The processors' own exit codes, their names, and what their details say.

pub mod detail;
pub mod svm;
pub mod vmx;

pub use detail::{Class, IoAccess, Isa};
