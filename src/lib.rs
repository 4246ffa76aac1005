//! hwvmm: a hardware-assisted classical VMM for Linux KVM that counts its exits. The `hwvmm` command is the product;
//! this library is what it, its tests and its benches share.

// They panic where stdout or stderr takes nothing (a pipe without a reader).
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod boot;
pub mod bounded_read;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod console;
pub mod control;
pub mod error;
pub mod escape;
pub mod event_loop;
pub mod exit;
pub mod kvm;
pub mod logging;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod nano;
pub mod probe;
pub mod profile;
pub mod sandbox;
mod seqpacket;
#[cfg(test)]
mod skip;
pub mod snapshot;
pub mod supervise;
pub mod testing;
pub mod tune;
pub mod vcpu;
