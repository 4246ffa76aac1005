//! What exit clusters have done ([`crate::measure::record::VcpuRecord`]).

use serde::{Deserialize, Serialize};

macro_rules! ends {
    ($($variant:ident: $name:literal, $what:literal;)*) => {
        /// Why a cluster ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ClusterEnd {
            $(#[doc = $what] $variant,)*
        }

        impl ClusterEnd {
            /// The number of reasons.
            pub const COUNT: usize = [$($name),*].len();
            /// The names, in the order of the reasons.
            pub const NAMES: [&'static str; Self::COUNT] = [$($name),*];
        }
    };
}

ends! {
    Unsupported: "instruction", "The next instruction is not interpreted.";
    Page: "page", "A page is not present, not permitted, or its accessed or dirty bit is clear.";
    NoMemory: "no-memory", "An access is not to guest memory.";
    Unaligned: "unaligned", "An access is not naturally aligned.";
    OwnCode: "own-code", "A write is to the page of the code that is run.";
    Port: "port", "A port is not a device's of hwvmm.";
    Interrupt: "interrupt", "A device has raised an interrupt, and the guest takes interrupts.";
    Stopped: "stopped", "A device access ended the run.";
    Instructions: "instructions", "The most instructions of a cluster were run.";
    Time: "time", "The time of a cluster was up.";
    Kicked: "kicked", "Another thread has kicked the vCPU.";
    State: "state", "The vCPU is in a state in which nothing is interpreted.";
}

/// What the clusters of one vCPU, or of several together, have done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterCounts {
    /// Exits that were followed.
    pub clusters: u64,
    /// Accesses that were answered without an exit. They are no exits, and are not among them.
    pub avoided_exits: u64,
    /// Instructions interpreted.
    pub instructions: u64,
    /// Nanoseconds spent in clusters, with what devices did in them.
    pub ns: u64,
    /// The number of clusters by the reason for their end, in the order of [`ClusterEnd::NAMES`].
    pub ends: [u64; ClusterEnd::COUNT],
}

impl ClusterCounts {
    /// Adds the counts of another vCPU, or of a later start.
    pub fn add(&mut self, more: &Self) {
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        add(&mut self.clusters, more.clusters);
        add(&mut self.avoided_exits, more.avoided_exits);
        add(&mut self.instructions, more.instructions);
        add(&mut self.ns, more.ns);
        self.ends.iter_mut().zip(more.ends).for_each(|(sum, more)| add(sum, more));
    }
}
