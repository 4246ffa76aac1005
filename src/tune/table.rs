//! The table of levers.

/// What a lever is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Guest memory.
    Memory,
    /// What the guest looks for at boot.
    Probing,
    /// Interrupts and timers.
    Interrupts,
    /// Doorbells.
    Devices,
    /// Consoles.
    Console,
    /// The processor.
    Cpu,
}

impl Group {
    /// For people.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Memory => "Memory",
            Self::Probing => "What the guest looks for",
            Self::Interrupts => "Interrupts and timers",
            Self::Devices => "Doorbells",
            Self::Console => "Console",
            Self::Cpu => "Processor",
        }
    }
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
        /// A lever.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Lever {
            $(#[doc = $what] $variant,)*
        }

        impl Lever {
            /// All of them, in the table's order.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),*];
            /// How many there are.
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
        "the guest looks for them";
    UartCount: "uart-count", Probing, true,
        "8250.nr_uarts=N in the default command line: Linux looks for no other UARTs than those that are there",
        "it looks for four";
    PciProbing: "pci-probing", Probing, true,
        "pci=conf1,noearly in the default command line of a machine without PCI devices (ACPI cannot say it): Linux tries the \
         ports, looks at no bus, and has no error to print, as with pci=off; pci=noearly with PCI devices: no search for \
         bridges of old that need quirks",
        "Linux makes 300 accesses to find nothing";
    AcpiReset: "acpi-reset", Probing, true,
        "reboot=f in the default command line of a guest of one vCPU: Linux resets by ACPI at once, and does not first take the \
         I/O APIC apart and try a PC's CMOS (with more vCPUs it would leave the others running after a halt)",
        "40 accesses at the end of a run";
    SplitIrqchip: "split-irqchip", Interrupts, true,
        "Split irqchip: an I/O APIC in hwvmm with as many pins as are wired, or none at all, for Linux guests",
        "KVM's, whose 24 pins the guest programs three times over";
    X2Apic: "x2apic", Interrupts, true,
        "x2APIC: the APIC by MSRs",
        "by memory, each access emulated";
    TscDeadline: "tsc-deadline", Interrupts, true,
        "The APIC timer's TSC-deadline mode: one write a timer",
        "the counter's registers, and its rate calibrated";
    PvEoi: "pv-eoi", Interrupts, true,
        "KVM's paravirtual end of interrupt: a bit in memory",
        "a write to the APIC (an exit without APICv or AVIC)";
    PvIpi: "pv-ipi", Interrupts, true,
        "KVM's hypercall for interrupts to many vCPUs",
        "an APIC write for each";
    PvTlbFlush: "pv-tlb-flush", Interrupts, true,
        "vCPUs that do not run are flushed when they run next",
        "an interrupt to each";
    PvSchedYield: "pv-sched-yield", Interrupts, true,
        "A vCPU that waits for another gives it the processor",
        "it spins";
    PvUnhalt: "pv-unhalt", Interrupts, true,
        "Spinning vCPUs halt until they are kicked",
        "they spin, and leave by PAUSE";
    Ioeventfd: "ioeventfd", Devices, true,
        "A queue's doorbell rings in the kernel, without an exit to user space",
        "a userspace exit a kick";
    ReadonlyRegisters: "readonly-registers", Devices, true,
        "virtio-mmio registers and PCI configuration space are memory to the guest's reads, mapped read-only (KVM_MEM_READONLY); \
         the PCI bus is in segment 1, since Linux asks segment 0 by ports",
        "a userspace exit a read";
    EventIdx: "event-idx", Devices, true,
        "VIRTIO_F_EVENT_IDX: each side says from which entry on it wants to hear",
        "flags, that come too late";
    BusyPoll: "busy-poll", Devices, true,
        "After a request is done the device looks for the next one itself, for as long as those take to come, at most so many \
         microseconds (200); auto: where the host has more processors than the guest",
        "a kick a request";
    NotifyCoalescing: "notify-coalescing", Devices, true,
        "With many requests in flight an interrupt waits a moment for more",
        "an interrupt as soon as one is done";
    CoalescedIo: "coalesced-io", Console, true,
        "Bytes for a UART, entries of the I/O APIC, virtio-mmio's queue addresses, and writes to ports where nobody is, wait in the kernel for the next exit, 100 ms at most \
         (KVM_CAP_COALESCED_PIO)",
        "a userspace exit a byte";
    CpuidTsc: "cpuid-tsc", Cpu, true,
        "CPUID tells the frequencies of TSC and APIC timer",
        "the guest takes kvmclock's, or calibrates";
    MceBanks: "mce-banks", Cpu, true,
        "One bank of machine-check registers: hwvmm injects no machine checks, so that no more are ever used",
        "KVM's 32, each of which the guest reads and writes";
    HideMtrr: "hide-mtrr", Cpu, false,
        "The guest is told of no MTRRs, and does not read 40 of them. Off by default: Linux then does without PAT too, and what \
         maps memory for writes in a row (graphics) becomes slow",
        "they are read and set up, for nothing";
    HaltPoll: "halt-poll", Cpu, false,
        "The host looks for work for so many microseconds (on: 200) before a halted vCPU sleeps: wakes faster, burns host time",
        "as the host's KVM is set";
    DisableHlt: "disable-hlt", Cpu, false,
        "HLT does not exit. Off by default: an idle guest takes a whole host processor, and the host cannot see that it is idle",
        "HLT exits";
    DisablePause: "disable-pause", Cpu, false,
        "PAUSE does not exit. Off by default: a vCPU that spins for one that does not run burns its time slice",
        "loops of PAUSE exit";
    DisableMwait: "disable-mwait", Cpu, false,
        "MWAIT does not exit. Off by default: as disable-hlt, and it puts the host processor to sleep",
        "MWAIT is an invalid instruction to the guest";
}

impl Lever {
    fn row(self) -> &'static Row {
        &Self::ROWS[self.index()]
    }

    /// Its place in [`Lever::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The name that `--tune` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The lever called `name`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lever| lever.name() == name)
    }

    /// What it is about.
    #[must_use]
    pub fn group(self) -> Group {
        self.row().group
    }

    /// Whether it is used unless told otherwise.
    #[must_use]
    pub fn is_default_on(self) -> bool {
        self.row().on
    }

    /// Whether it takes a number of microseconds.
    #[must_use]
    pub fn is_time(self) -> bool {
        matches!(self, Self::HaltPoll | Self::BusyPoll)
    }

    /// What it does, in a sentence.
    #[must_use]
    pub fn what(self) -> &'static str {
        self.row().what
    }

    /// What happens without it.
    #[must_use]
    pub fn without(self) -> &'static str {
        self.row().without
    }
}
