//! x86_64 values for a VMM: where things lie in guest memory, the boot protocols, page tables, registers, CPUID, MSRs
//! and ACPI tables, as plain data. No ioctl and no `/dev/kvm`: all of it can be tested anywhere.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod exit_code;
pub mod gdt;
pub mod lapic;
pub mod layout;
pub mod msr;
pub mod msr_name;
pub mod page_table;
pub mod regs;
pub mod topology;

pub use topology::Topology;
