//! Tiny guests: a few instructions each, assembled with the tests, whose exits can be counted by hand.

#![allow(dead_code, unused_imports, reason = "each test uses a part")]

/// Assembles instructions (AT&T syntax), and defines a function that returns their bytes.
macro_rules! payload {
    ($name:ident, $bits:literal, $($line:literal),* $(,)?) => {
        std::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".globl guest_", stringify!($name), "_start"),
            concat!(".globl guest_", stringify!($name), "_end"),
            $bits,
            concat!("guest_", stringify!($name), "_start:"),
            $($line,)*
            concat!("guest_", stringify!($name), "_end:"),
            ".code64",
            ".popsection",
            options(att_syntax)
        );

        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!("guest_", stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: both labels are in one section, START before END, and between them are initialised bytes.
            unsafe {
                let start = &raw const START;
                let bytes = (&raw const END).offset_from_unsigned(start);
                std::slice::from_raw_parts(start, bytes)
            }
        }
    };
}

mod clusters;
mod hostile;
#[macro_use]
mod programs;
mod readers;
mod suites;
mod virtio;

pub(crate) use clusters::*;
pub(crate) use hostile::*;
pub(crate) use programs::*;
pub(crate) use readers::*;
pub(crate) use suites::*;
pub(crate) use virtio::*;

// Port I/O of each width: port 0x10 returns what was written last. Ends by isa-debug-exit with status 3, or 5 where a
// value read is wrong.
macro_rules! port_io {
    ($name:ident, $bits:literal) => {
        payload!(
            $name,
            $bits,
            "mov $0x5a,%al",
            "out %al,$0x10",
            "in $0x10,%al",
            "cmp $0x5a,%al",
            "jne 9f",
            "mov $0x1234,%ax",
            "out %ax,$0x10",
            "xor %ax,%ax",
            "in $0x10,%ax",
            "cmp $0x1234,%ax",
            "jne 9f",
            "mov $0x12345678,%eax",
            "out %eax,$0x10",
            "xor %eax,%eax",
            "in $0x10,%eax",
            "cmp $0x12345678,%eax",
            "jne 9f",
            "mov $1,%al",
            "out %al,$0xf4",
            "9: mov $2,%al",
            "out %al,$0xf4",
        );
    };
}
port_io!(pio_real, ".code16");
port_io!(pio_protected, ".code32");
port_io!(pio_long, ".code64");

// Exits at known places, PROFILED_* bytes from the start: 50 times CPUID and OUT, then the end.
payload!(
    profiled_long,
    ".code64",
    "mov $50,%r8d",
    "1: xor %eax,%eax",
    "cpuid",
    "out %al,$0x10",
    "dec %r8d",
    "jnz 1b",
    "mov $1,%al",
    "out %al,$0xf4",
);
pub(crate) const PROFILED_CPUID: u64 = 8;
pub(crate) const PROFILED_OUT: u64 = 10;
pub(crate) const PROFILED_END: u64 = 19;

// String I/O: 5 bytes out from 0x3000, 4 words in to 0x3100; the words read are the port's values.
macro_rules! string_io {
    ($name:ident, $bits:literal) => {
        payload!(
            $name,
            $bits,
            "cld",
            "mov $0x10,%dx",
            "mov $0x3000,%esi",
            "mov $5,%ecx",
            "rep outsb",
            "mov $0x3100,%edi",
            "mov $4,%ecx",
            "rep insw",
            "cmpw $0x3434,0x3106",
            "jne 9f",
            "mov $1,%al",
            "out %al,$0xf4",
            "9: mov $2,%al",
            "out %al,$0xf4",
        );
    };
}
string_io!(string_real, ".code16");
string_io!(string_long, ".code64");

// MMIO of each width to a device at 0xd000_0000 that returns what was written last.
payload!(
    mmio_long,
    ".code64",
    "mov $0xd0000000,%ebx",
    "movb $0x5a,(%rbx)",
    "mov (%rbx),%al",
    "cmp $0x5a,%al",
    "jne 9f",
    "movw $0x1234,(%rbx)",
    "mov (%rbx),%ax",
    "cmp $0x1234,%ax",
    "jne 9f",
    "movl $0x12345678,(%rbx)",
    "mov (%rbx),%eax",
    "cmp $0x12345678,%eax",
    "jne 9f",
    "mov $0x123456789abcdef0,%rcx",
    "mov %rcx,(%rbx)",
    "mov (%rbx),%rax",
    "cmp %rcx,%rax",
    "jne 9f",
    "mov $1,%al",
    "out %al,$0xf4",
    "9: mov $2,%al",
    "out %al,$0xf4",
);
payload!(
    mmio_protected,
    ".code32",
    "mov $0xd0000000,%ebx",
    "movl $0x12345678,(%ebx)",
    "mov (%ebx),%eax",
    "cmp $0x12345678,%eax",
    "jne 9f",
    "mov $1,%al",
    "out %al,$0xf4",
    "9: mov $2,%al",
    "out %al,$0xf4",
);

// A hundred reads of a read-only page, and a write to it.
payload!(
    register_page_long,
    ".code64",
    "mov $0xd2000004,%ebx",
    "mov $100,%ecx",
    "1: cmpl $0x11223344,(%rbx)",
    "jne 9f",
    "dec %ecx",
    "jnz 1b",
    "movl $0x55,(%rbx)",
    "cmpl $0x11223344,(%rbx)",
    "jne 9f",
    "mov $1,%al",
    "out %al,$0xf4",
    "9: mov $2,%al",
    "out %al,$0xf4",
);
// Port 0x99 and gpa 0xd100_0000 are unmapped: reads return all ones, writes are dropped.
payload!(
    unmapped_long,
    ".code64",
    "in $0x99,%eax",
    "cmp $-1,%eax",
    "jne 9f",
    "out %al,$0x99",
    "mov $0xd1000000,%ebx",
    "mov (%rbx),%rax",
    "cmp $-1,%rax",
    "jne 9f",
    "mov %rax,(%rbx)",
    "mov $1,%al",
    "out %al,$0xf4",
    "9: mov $2,%al",
    "out %al,$0xf4",
);

// A hundred CPUIDs, then the end.
payload!(
    cpuid_long,
    ".code64",
    "mov $100,%esi",
    "1: xor %eax,%eax",
    "cpuid",
    "dec %esi",
    "jnz 1b",
    "mov $1,%al",
    "out %al,$0xf4",
);

// An MSR that no processor has. There is no IDT, so that the #GP becomes a triple fault.
payload!(msr_read_long, ".code64", "mov $0x12345,%ecx", "rdmsr", "mov $1,%al", "out %al,$0xf4");
payload!(msr_write_long, ".code64", "mov $0x12345,%ecx", "xor %eax,%eax", "xor %edx,%edx", "wrmsr");

payload!(hlt_real, ".code16", "hlt");
payload!(hlt_protected, ".code32", "hlt");
payload!(hlt_long, ".code64", "hlt");
payload!(halt_for_good, ".code64", "1: cli", "hlt", "jmp 1b");
payload!(spin_protected, ".code32", "1: jmp 1b");
payload!(spin_long, ".code64", "1: jmp 1b");

// No IDT in long and protected mode; in real mode a limit of 0.
payload!(triple_fault_real, ".code16", "lidt 0x3200", "int $3");
payload!(triple_fault_protected, ".code32", "ud2");
payload!(triple_fault_long, ".code64", "ud2");

// Five interrupts by the local APIC's timer (one-shot, vector 0x40), each while the guest spins. The handler runs for 20 million
// ticks of the TSC, makes no exit meanwhile, and counts its entries (r8) and how deep it is nested (r10). Ends with status
// 5 where it is entered with interrupts off, within itself, or more often than the timer was set.
payload!(
    interrupts_long,
    ".code64",
    "mov $0x8000,%esp",
    "lea 8f(%rip),%rax",
    "mov %ax,0x4400",
    "movw $0x10,0x4402",
    "movw $0x8e00,0x4404",
    "movw $0xfff,0x3f00",
    "movl $0x4000,0x3f02",
    "lidt 0x3f00",
    "mov $0xfee00000,%ebx",
    "movl $0x1ff,0xf0(%rbx)",
    "movl $0x40,0x320(%rbx)",
    "movl $0xb,0x3e0(%rbx)",
    "xor %r8d,%r8d",
    "xor %r10d,%r10d",
    "mov $1,%r9d",
    "1: movl $100000,0x380(%rbx)",
    "sti",
    "2: cmp %r9d,%r8d",
    "jb 2b",
    "cli",
    "jne 9f",
    "inc %r9d",
    "cmp $6,%r9d",
    "jne 1b",
    "mov $1,%al",
    "out %al,$0xf4",
    "8: inc %r10d",
    "cmp $1,%r10d",
    "jne 9f",
    "inc %r8d",
    "rdtsc",
    "mov %eax,%esi",
    "7: rdtsc",
    "sub %esi,%eax",
    "cmp $20000000,%eax",
    "jb 7b",
    "movl $0,0xb0(%rbx)",
    "dec %r10d",
    "iretq",
    "9: mov $2,%al",
    "out %al,$0xf4",
);

/// A multiboot kernel: an ELF of one segment at 1 MiB that starts with the multiboot header; the entry is behind it.
pub(crate) fn multiboot(code: &[u8]) -> Vec<u8> {
    const HEADERS: u32 = 52 + 32;
    const LOAD: u32 = 0x10_0000;
    let bytes = 12 + u32::try_from(code.len()).unwrap();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    half(&mut file, 2);
    half(&mut file, 3);
    for word in [1, LOAD + 12, 52, 0, 0] {
        file.extend(u32::to_le_bytes(word));
    }
    for value in [52, 32, 1, 40, 0, 0] {
        half(&mut file, value);
    }
    for word in [1, HEADERS, LOAD, LOAD, bytes, bytes + 0x1000, 7, 4] {
        file.extend(u32::to_le_bytes(word));
    }
    for word in [0x1bad_b002, 0, 0_u32.wrapping_sub(0x1bad_b002)] {
        file.extend(u32::to_le_bytes(word));
    }
    file.extend(code);
    file
}

/// A 32-bit ELF file that is entered by its PVH note, as kernels of Linux are, with `code` at the same address as in [`multiboot`].
pub(crate) fn pvh(code: &[u8]) -> Vec<u8> {
    const HEADERS: u32 = 52 + 2 * 32;
    const LOAD: u32 = 0x10_0000;
    const NOTE_BYTES: u32 = 24;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    half(&mut file, 2);
    half(&mut file, 3);
    let bytes = 12 + u32::try_from(code.len()).unwrap();
    let (note, program) = (HEADERS, HEADERS + NOTE_BYTES);
    let word = |file: &mut Vec<u8>, words: &[u32]| file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    word(&mut file, &[1, LOAD + 12, 52, 0, 0]);
    for value in [52, 32, 2, 40, 0, 0] {
        half(&mut file, value);
    }
    word(&mut file, &[1, program, LOAD, LOAD, bytes, bytes + 0x1000, 7, 4]);
    word(&mut file, &[4, note, 0, 0, NOTE_BYTES, NOTE_BYTES, 4, 4]);
    // XEN_ELFNOTE_PHYS32_ENTRY.
    word(&mut file, &[4, 8, 18]);
    file.extend(b"Xen\0");
    word(&mut file, &[LOAD + 12, 0]);
    file.extend([0; 12]);
    file.extend(code);
    file
}
