//! The parent process: it starts each machine in a process of its own, and outlives it.
//!
//! `hwvmm run` is two processes. The parent reads options and files, keeps the terminal, holds the time-out, takes the signals,
//! and writes statistics and profiles. The child makes the machine and runs the guest. What the child leaves is plain data
//! ([`RunRecord`](crate::measure::RunRecord)), sent in bounded messages (`message`, `channel`) and checked by the parent. A child that
//! does not end in time is killed, and what it had sent by then is used.

mod assembly;
mod channel;
mod channels;
mod child;
mod clones;
mod crash;
mod error;
mod kernel_log;
mod message;
mod mounts;
mod parent;
mod parent_death;
mod plan;
mod share_tree;
mod signals;
mod streams;
mod writable_shares;

pub use clones::{CloneError, CloneOutput, ClonePlan, CloneResult, clone_arguments, run_clones};
pub use error::SuperviseError;
pub use kernel_log::{Echo, KernelLogTarget};
pub use parent::{Supervised, run};
pub use parent_death::{ParentDeathError, end_with_parent};
pub use plan::{Check, Plan};
pub use signals::{Signals, with_default_action};
pub use writable_shares::{InWritableShare, WritableShareError, check_writable_shares, is_in_writable_share};
