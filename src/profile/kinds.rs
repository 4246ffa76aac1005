//! The kinds of things that a profile names. Each has a name that tables and the profile's JSON share.

pub use crate::config::AddressSpace;
use hwvmm_arch::exit_code::Class;
use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! named {
    ($(#[$meta:meta])* $type:ident { $($(#[$doc:meta])* $variant:ident $name:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $type {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl $type {
            /// Returns the name in tables, the same as in JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

named! {
    /// The kind of an exit, the same on all processors: of VM exits a [`Class`], of userspace exits one of these too.
    #[derive(Default)]
    ExitClass {
        /// An access to a port.
        Pio "pio",
        /// An access to device memory that came to user space.
        Mmio "mmio",
        /// An access to an MSR.
        Msr "msr",
        /// An execution of the CPUID instruction.
        Cpuid "cpuid",
        /// A nested page fault (APM vol. 2, 15.25.6), or an EPT violation or misconfiguration (SDM vol. 3, 29.3.3).
        NestedPageFault "npf",
        /// An execution of HLT: the vCPU waits for an interrupt.
        Hlt "hlt",
        /// An interrupt, NMI or SMI for the host.
        Interrupt "intr",
        /// A window for an interrupt or NMI of the guest's: it can take one now.
        Window "window",
        /// The guest's timer: it arms the timer, or the timer's time has come.
        Timer "timer",
        /// An access to a control or debug register.
        ControlRegister "cr",
        /// An exception: with shadow paging, page faults.
        Exception "exception",
        /// PAUSE, MWAIT or MONITOR.
        Pause "pause",
        /// A hypercall: VMCALL or VMMCALL.
        Hypercall "hypercall",
        /// An access to the local APIC that the processor helps with (AVIC, APICv).
        Apic "apic",
        /// A signal to the vCPU's thread.
        Kick "kick",
        /// Any other VM exit.
        #[default]
        Other "other",
    }
}

impl From<Class> for ExitClass {
    fn from(class: Class) -> Self {
        match class {
            Class::Pio => Self::Pio,
            Class::Msr => Self::Msr,
            Class::Cpuid => Self::Cpuid,
            Class::NestedPageFault => Self::NestedPageFault,
            Class::Hlt => Self::Hlt,
            Class::Interrupt => Self::Interrupt,
            Class::Window => Self::Window,
            Class::Timer => Self::Timer,
            Class::ControlRegister => Self::ControlRegister,
            Class::Exception => Self::Exception,
            Class::Pause => Self::Pause,
            Class::Hypercall => Self::Hypercall,
            Class::Apic => Self::Apic,
            Class::Other => Self::Other,
        }
    }
}

named! {
    /// Whose code an instruction belongs to.
    #[derive(Default)]
    CodeMode {
        /// The kernel's, in its half of the address space.
        Kernel "kernel",
        /// The instruction is a program's (CPL 3).
        User "user",
        /// That of the boot, before the kernel runs in its half of the address space.
        Boot "boot",
        /// Unknown: the address is below the kernel's half, and no program's.
        Low "low",
        /// The instruction is not known: there were too many causes.
        #[default]
        Many "many",
    }
}

named! {
    /// A part of a run.
    PhaseName {
        /// hwvmm makes the machine and loads the kernel. It ends when the guest first runs.
        Load "load",
        /// The guest decompresses its kernel.
        Decompress "decompress",
        /// The guest's kernel executed its first instruction.
        Kernel "kernel",
        /// Programs run, from the first exit of a program on; in a run from a snapshot, from the first answer on.
        Init "init",
        /// hwvmm makes the machine anew from a snapshot. It ends when the guest first runs.
        Restore "restore",
        /// The guest goes on from a snapshot, until its first output on a UART; without one, until the run's end, which is a command's answer.
        FirstAnswer "first-answer",
    }
}

impl PhaseName {
    /// Whether the guest does not run yet: the phase has a clock of its own, hwvmm's.
    #[must_use]
    pub fn is_before_the_guest(self) -> bool {
        matches!(self, Self::Load | Self::Restore)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_exits_keep_the_names_of_their_classes() {
        for class in Class::ALL {
            assert_eq!(ExitClass::from(class).name(), class.name());
            let json = serde_json::to_string(&ExitClass::from(class)).expect("JSON");
            assert_eq!(json, serde_json::to_string(&class).expect("JSON"));
            assert_eq!(json, format!("\"{}\"", class.name()));
        }
    }
}
