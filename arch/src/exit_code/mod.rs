//! The processors' own exit codes and their names.

pub mod svm;
pub mod vmx;
