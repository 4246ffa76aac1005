//! Detects a guest whose vCPUs are all halted for good.

use crate::kvm::Vcpu;
use crate::kvm::stats::Reader;
use crate::vcpu::Threads;

/// Without KVM's statistics one cannot see that a guest does something; asking costs an exit.
const BLIND_TICKS: u32 = 10;

/// Detects that all vCPUs are halted permanently.
pub(super) struct HaltDetector {
    readers: Vec<Option<Reader>>,
    exits: Vec<u64>,
    asked: bool,
    blind_ticks: u32,
}

/// KVM's statistics of each vCPU, where KVM has them.
pub(super) fn stats_readers(vcpus: &[Vcpu]) -> Vec<Option<Reader>> {
    vcpus.iter().map(|vcpu| vcpu.stats_fd().ok().and_then(|file| Reader::new(file).ok())).collect()
}

impl HaltDetector {
    /// Watches `vcpus`.
    pub(super) fn new(vcpus: &[Vcpu]) -> Self {
        Self { readers: stats_readers(vcpus), exits: Vec::new(), asked: false, blind_ticks: 0 }
    }

    /// VM exits of each vCPU so far, or nothing where KVM does not tell.
    fn count_exits(&self) -> Vec<u64> {
        let exits = |reader: &Reader| {
            let stats = reader.read().ok()?;
            stats.iter().find(|stat| stat.name == "exits")?.values.first().copied()
        };
        self.readers.iter().filter_map(|reader| exits(reader.as_ref()?)).collect()
    }

    /// Called once a tick. Returns true if the guest will never run again. Its vCPUs are asked only where none has exited since the
    /// last tick, and once until one does.
    pub(super) fn tick(&mut self, threads: &Threads) -> bool {
        if self.asked && threads.all_halted() {
            return true;
        }
        let exits = self.count_exits();
        let blind = exits.is_empty();
        self.blind_ticks += 1;
        let quiet = if blind { self.blind_ticks.is_multiple_of(BLIND_TICKS) } else { exits == self.exits };
        if !quiet {
            self.asked = false;
        } else if blind || !self.asked {
            threads.request_report();
            self.asked = true;
        }
        self.exits = exits;
        false
    }
}
