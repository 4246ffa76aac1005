//! What a machine is: the readable part of a snapshot (`machine.json`), and what a restored run has to have as well.

use crate::config::{Cpus, MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::layout::UARTS;
use serde::{Deserialize, Serialize};

/// Where a machine's I/O APIC is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// In KVM, with two PICs.
    Kernel,
    /// In hwvmm.
    Split,
}

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The version of hwvmm that made the snapshot.
    pub hwvmm: String,
    /// The version of the state's format ([`super::STATE_VERSION`]).
    pub state_version: u32,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Sockets, cores of a socket, and threads of a core.
    pub cpus: [u32; 3],
    /// The machine has a UART at these places (1 is COM1).
    pub uarts: Vec<u8>,
    /// The machine has a watchdog (`--watchdog`).
    pub watchdog: bool,
    /// The machine has isa-debug-exit (`--debug-exit`).
    pub debug_exit: bool,
    /// Where the I/O APIC is.
    pub irqchip: Irqchip,
    /// How the kernel was loaded.
    pub boot: BootMethod,
    /// The machine has a generation identifier (VMGenID).
    pub vmgenid: bool,
    /// The vendor of the processor, as CPUID has it.
    pub cpu_vendor: String,
    /// Features of the processor that the guest was told of, those that have a name here.
    pub cpu_features: Vec<String>,
}

impl Description {
    /// The vCPUs as a configuration has them.
    #[must_use]
    pub fn vcpus(&self) -> Cpus {
        let [sockets, cores, threads] = self.cpus;
        Cpus { sockets, cores, threads }
    }

    /// Returns what is wrong with it, in English; `None` where a machine can be made from it.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        let [sockets, cores, threads] = self.cpus.map(u64::from);
        let vcpus = sockets.saturating_mul(cores).saturating_mul(threads);
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes)
            || !self.memory_bytes.is_multiple_of(4096)
        {
            Some("its size of memory is none that a machine has")
        } else if !(1..=u64::from(crate::config::MAX_CPUS)).contains(&vcpus) {
            Some("its number of vCPUs is none that a machine has")
        } else if !self.uarts.is_sorted_by(|one, next| one < next)
            || !self.uarts.iter().all(|uart| (1..=UARTS.len()).contains(&usize::from(*uart)))
        {
            Some("its UARTs are none that a machine has")
        } else {
            None
        }
    }
}
