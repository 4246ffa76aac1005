//! hwvmm: a hardware-assisted classical VMM for Linux KVM that counts its exits. The `hwvmm` command is the product;
//! this library is what it, its tests and its benches share.

pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod error;
pub mod event_loop;
pub mod exit;
pub mod kvm;
pub mod machine;
pub mod measure;
pub mod memory;
pub mod nano;
pub mod probe;
pub mod profile;
pub mod tune;
pub mod vcpu;
