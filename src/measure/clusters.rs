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
    NoAccess: "no-access", "Many instructions in a row were run without an access to a device.";
    Contended: "contended", "Other vCPUs kept on changing the operand of a LOCK instruction.";
    Time: "time", "The time of a cluster was up.";
    Kicked: "kicked", "Another thread has kicked the vCPU.";
    State: "state", "The vCPU is in a state in which nothing is interpreted.";
}

/// The most places of each kind that are told apart.
pub const MOST_PLACES: usize = 256;

/// Exits that were avoided at one instruction of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AvoidedAt {
    /// The address of the instruction.
    pub rip: u64,
    /// The port that it accessed.
    pub port: u16,
    /// True for a write, false for a read.
    pub write: bool,
    /// The number of accesses.
    pub count: u64,
}

/// Clusters that ended before one instruction of the guest, for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedAt {
    /// The address of the instruction.
    pub rip: u64,
    /// The index of the reason in [`ClusterEnd::NAMES`].
    pub end: usize,
    /// The number of clusters.
    pub count: u64,
}

/// What the clusters of one vCPU have done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Counts over all clusters.
    pub counts: ClusterCounts,
    /// Exits avoided by instruction and port; at most [`MOST_PLACES`].
    pub avoided_at: Vec<AvoidedAt>,
    /// Ends of clusters by instruction; at most [`MOST_PLACES`].
    pub ended_at: Vec<EndedAt>,
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
    /// Walks of the guest's page tables.
    pub walks: u64,
    /// Blocks of instructions that were compared with memory or decoded.
    pub compared: u64,
    /// Of these, blocks that were decoded.
    pub decoded: u64,
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
        add(&mut self.walks, more.walks);
        add(&mut self.compared, more.compared);
        add(&mut self.decoded, more.decoded);
        self.ends.iter_mut().zip(more.ends).for_each(|(sum, more)| add(sum, more));
    }
}
