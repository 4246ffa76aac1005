//! The processor topology: sockets, cores and threads, and the APIC ids that follow from them.

/// A processor topology. All three numbers are at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The number of sockets (packages).
    pub sockets: u32,
    /// The number of cores of a socket.
    pub cores: u32,
    /// The number of threads of a core.
    pub threads: u32,
}

/// The number of bits of a field that numbers `count` things from 0.
fn bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

impl Topology {
    /// One socket with `cpus` cores of one thread.
    #[must_use]
    pub fn flat(cpus: u32) -> Self {
        Self { sockets: 1, cores: cpus, threads: 1 }
    }

    /// The number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// The number of threads of a socket.
    #[must_use]
    pub fn threads_per_socket(&self) -> u32 {
        self.cores * self.threads
    }

    /// The number of bits by which an APIC id is shifted right to get the core's number (CPUID leaf 0xb, level 0).
    #[must_use]
    pub fn core_shift(&self) -> u32 {
        bits(self.threads)
    }

    /// The number of bits by which an APIC id is shifted right to get the socket's number (CPUID leaf 0xb, level 1).
    #[must_use]
    pub fn socket_shift(&self) -> u32 {
        bits(self.threads) + bits(self.cores)
    }

    /// The APIC id of vCPU number `index`. Each level has a bit field of its own, so that ids can have gaps (SDM vol. 3A §9.9.3,
    /// "Hierarchical ID of Logical Processors").
    #[must_use]
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.threads_per_socket();
        socket << self.socket_shift() | core << self.core_shift() | thread
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apic_ids_increase_with_the_vcpu_number() {
        for topology in [
            Topology::flat(1),
            Topology::flat(64),
            Topology { sockets: 2, cores: 3, threads: 2 },
            Topology { sockets: 3, cores: 5, threads: 1 },
        ] {
            let ids: Vec<u32> = (0..topology.cpus()).map(|i| topology.apic_id(i)).collect();
            assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{topology:?}: {ids:?}");
        }
        assert_eq!(Topology { sockets: 2, cores: 3, threads: 2 }.apic_id(6), 8);
    }
}
