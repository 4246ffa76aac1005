//! The table of levers.

/// The part of the machine that a lever is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Guest memory and its page faults.
    Memory,
    /// Hardware that the guest probes for at boot.
    Probing,
    /// Interrupt controllers, timers and IPIs.
    Interrupts,
    /// Kicks and interrupts of virtio devices.
    Devices,
    /// Output on serial ports.
    Console,
    /// CPUID, MSRs and idle instructions.
    Cpu,
}

impl Group {
    /// The heading in `--tune help`.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Memory => "Memory",
            Self::Probing => "Hardware probing",
            Self::Interrupts => "Interrupts and timers",
            Self::Devices => "Virtio devices",
            Self::Console => "Console",
            Self::Cpu => "Processor",
        }
    }
}

/// The values that a lever takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `on`, `off` or `auto`.
    Switch,
    /// The same, or a number of microseconds.
    Time,
}

struct Row {
    name: &'static str,
    group: Group,
    on: bool,
    what: &'static str,
    without: &'static str,
}

macro_rules! levers {
    ($($variant:ident: $name:literal, $group:ident, $on:literal, $what:literal, $without:literal;)*) => {
        /// The name of a lever; see [`Lever::what`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Lever {
            $(#[doc = $what] $variant,)*
        }

        impl Lever {
            /// All levers, in the order of the table.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),*];
            /// The number of levers.
            pub const COUNT: usize = [$($name),*].len();
            const ROWS: [Row; Self::COUNT] =
                [$(Row { name: $name, group: Group::$group, on: $on, what: $what, without: $without }),*];
        }
    };
}

levers! {
    HugePages: "huge-pages", Memory, true,
        "Guest memory at multiples of 2 MiB on both sides, transparent huge pages asked for (-m hugepages= wins)",
        "pages of 4 KiB, a fault for each";
    Prefault: "prefault", Memory, false,
        "All guest memory filled before the guest runs, in parallel, and mapped by KVM_PRE_FAULT_MEMORY where there is one: no \
         first-touch faults, for time and memory at the start",
        "each page on its first touch";
    FreePages: "free-pages", Memory, true,
        "With --balloon the guest reports its free pages, which go back to the host",
        "the host keeps pages that the guest has free";
    HostUnpack: "host-unpack", Memory, true,
        "Kernel and initrd are unpacked on the host, once, and kept (--unpack wins)",
        "the guest unpacks them in every boot";
    LegacyFree: "legacy-free", Probing, true,
        "ACPI says that there is no keyboard controller, no CMOS clock, no VGA",
        "the guest probes for them";
    UartCount: "uart-count", Probing, true,
        "8250.nr_uarts=N in the default command line: Linux probes for no other UARTs than those that exist",
        "Linux probes for four";
    PciProbing: "pci-probing", Probing, true,
        "pci=conf1,noearly in the default command line of a machine without PCI devices (ACPI cannot say it): Linux tries the \
         ports, scans no bus, and prints no error, as with pci=off; pci=noearly with PCI devices: no scan for bridges that \
         need early quirks",
        "Linux makes 300 accesses to find nothing";
    AcpiReset: "acpi-reset", Probing, true,
        "reboot=f in the default command line of a guest of one vCPU: Linux resets by ACPI at once, and does not first take the \
         I/O APIC apart and try a PC's CMOS (with more vCPUs it would leave the others running after a halt)",
        "40 accesses at the end of a run";
    SplitIrqchip: "split-irqchip", Interrupts, true,
        "Split irqchip, for Linux guests: an I/O APIC in hwvmm with as many pins as are connected, or none at all",
        "KVM's I/O APIC, whose 24 pins the guest programs three times";
    X2Apic: "x2apic", Interrupts, true,
        "x2APIC: the local APIC's registers are MSRs",
        "they are memory, and each access is emulated";
    TscDeadline: "tsc-deadline", Interrupts, true,
        "The APIC timer's TSC-deadline mode: one write for each timer",
        "the timer's counter registers, whose rate the guest calibrates";
    PvEoi: "pv-eoi", Interrupts, true,
        "KVM's paravirtual end of interrupt: a bit in memory",
        "a write to the APIC (an exit without APICv or AVIC)";
    PvIpi: "pv-ipi", Interrupts, true,
        "KVM's hypercall for interrupts to many vCPUs",
        "an APIC write for each";
    PvTlbFlush: "pv-tlb-flush", Interrupts, true,
        "The TLB of a vCPU that does not run is flushed when it runs next",
        "an IPI to each";
    PvSchedYield: "pv-sched-yield", Interrupts, true,
        "A vCPU that waits for another yields its processor to it",
        "it spins";
    PvUnhalt: "pv-unhalt", Interrupts, true,
        "Spinning vCPUs halt until they are kicked",
        "they spin, and exit by PAUSE";
    Ioeventfd: "ioeventfd", Devices, true,
        "KVM signals a queue's kick to the device thread (ioeventfd), without an exit to user space",
        "a userspace exit for each kick";
    ReadonlyRegisters: "readonly-registers", Devices, true,
        "virtio-mmio registers and PCI configuration space are mapped read-only into the guest (KVM_MEM_READONLY); the PCI bus is \
         in segment 1, because Linux accesses segment 0 by ports",
        "a userspace exit for each read";
    EventIdx: "event-idx", Devices, true,
        "VIRTIO_F_EVENT_IDX: each side says from which ring entry on it wants to be notified",
        "flags, which often come too late";
    BusyPoll: "busy-poll", Devices, true,
        "After a request the device polls for the next one, for as long as requests have taken to arrive, at most this many \
         microseconds (200); auto: where the host has more processors than the guest",
        "a kick for each request";
    NotifyCoalescing: "notify-coalescing", Devices, true,
        "With many requests in flight an interrupt is delayed for a moment, so that it reports several",
        "an interrupt as soon as one is done";
    CoalescedIo: "coalesced-io", Console, true,
        "KVM coalesces bytes for a UART, entries of the I/O APIC, virtio-mmio's queue addresses and writes to unmapped ports until \
         the next exit, at most for 100 ms (KVM_CAP_COALESCED_PIO, KVM_CAP_COALESCED_MMIO)",
        "a userspace exit for each write";
    CpuidTsc: "cpuid-tsc", Cpu, true,
        "CPUID reports the frequencies of TSC and APIC timer",
        "the guest takes kvmclock's, or calibrates them";
    MceBanks: "mce-banks", Cpu, true,
        "One bank of machine-check registers: hwvmm injects no machine checks, so that no more are ever used",
        "KVM's 32, each of which the guest reads and writes";
    HideMtrr: "hide-mtrr", Cpu, false,
        "CPUID reports no MTRRs, so that the guest does not read 40 of them. Off by default: Linux then disables PAT too, and \
         write-combining mappings (graphics) become slow",
        "the guest reads and sets them up, without effect";
    HaltPoll: "halt-poll", Cpu, false,
        "The host polls for this many microseconds (on: 200) before a halted vCPU sleeps: it wakes faster, and takes host time",
        "as the host's KVM is set";
    DisableHlt: "disable-hlt", Cpu, false,
        "HLT does not exit. Off by default: an idle guest takes a whole host processor, and the host cannot see that it is idle",
        "HLT exits";
    DisablePause: "disable-pause", Cpu, false,
        "PAUSE does not exit. Off by default: a vCPU that spins for one that does not run takes the host processor from it",
        "loops of PAUSE exit";
    DisableMwait: "disable-mwait", Cpu, false,
        "MWAIT does not exit. Off by default: as disable-hlt, and it puts the host processor to sleep",
        "MWAIT is an invalid instruction to the guest";
}

impl Lever {
    fn row(self) -> &'static Row {
        &Self::ROWS[self.index()]
    }

    /// The index in [`Lever::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The name of the lever in `--tune`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The lever with the given name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lever| lever.name() == name)
    }

    /// The part of the machine that the lever is about.
    #[must_use]
    pub fn group(self) -> Group {
        self.row().group
    }

    /// Returns true if the lever is used by default.
    #[must_use]
    pub fn is_default_on(self) -> bool {
        self.row().on
    }

    /// The values that the lever takes.
    #[must_use]
    pub fn value_kind(self) -> ValueKind {
        if matches!(self, Self::HaltPoll | Self::BusyPoll) { ValueKind::Time } else { ValueKind::Switch }
    }

    /// What the lever does, in a sentence for people.
    #[must_use]
    pub fn what(self) -> &'static str {
        self.row().what
    }

    /// What happens without the lever, for people.
    #[must_use]
    pub fn without(self) -> &'static str {
        self.row().without
    }
}
