//! x86_64 values for a VMM, as plain data: the guest physical address map, boot protocols, page tables, registers, CPUID,
//! MSRs, ACPI tables and VM exit codes. It issues no ioctl, so that all of it can be tested anywhere.
//!
//! "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual, "APM" the AMD64 Architecture Programmer's
//! Manual.

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
