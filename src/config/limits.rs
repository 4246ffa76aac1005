//! The bounds of a machine's size.

/// The smallest guest memory, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// The largest guest memory, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 1 << 42;
/// The largest number of vCPUs: APIC IDs of one byte, less those of the I/O APIC and of broadcasts.
pub const MAX_CPUS: u32 = 254;
