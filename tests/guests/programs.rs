//! Multiboot programs for whole runs.

// Multiboot programs (32-bit) for whole runs: they print "hello\n" on the first UART, then each ends in another way.
macro_rules! program {
    ($name:ident, $($line:literal),* $(,)?) => {
        payload!(
            $name, ".code32",
            "mov $0x80000,%esp", "mov $0x3f8,%edx", "call 2f", ".ascii \"hello\\n\\0\"",
            "2: pop %esi",
            "3: lodsb", "test %al,%al", "jz 4f", "out %al,%dx", "jmp 3b",
            "4:",
            $($line),*
        );
    };
}

program!(power_off, "mov $0x600,%dx", "mov $0x34,%al", "out %al,%dx", "hlt");
program!(reset, "mov $0x602,%dx", "mov $1,%al", "out %al,%dx", "hlt");
program!(reset_i8042, "mov $0xfe,%al", "out %al,$0x64", "hlt");
program!(pvpanic, "mov $0x505,%dx", "mov $1,%al", "out %al,%dx", "hlt");
program!(triple_fault, "ud2");
program!(halt, "5: cli", "hlt", "jmp 5b");
program!(spin, "5: jmp 5b");
program!(debug_exit, "mov $38,%eax", "out %eax,$0xf4", "hlt");
program!(expired_watchdog, "mov $0x443,%dx", "mov $0xf,%al", "out %al,%dx", "5: jmp 5b");
// A prompt: text without a newline, then nothing.
payload!(
    prompt,
    ".code32",
    "mov $0x3f8,%edx",
    "mov $0x80000,%esp",
    "call 2f",
    ".ascii \"login: \\0\"",
    "2: pop %esi",
    "3: lodsb",
    "test %al,%al",
    "jz 4f",
    "out %al,%dx",
    "jmp 3b",
    "4: jmp 4b",
);
// The last line of a Linux panic, then a reset.
payload!(
    panic_line,
    ".code32",
    "mov $0x3f8,%edx",
    "mov $0x80000,%esp",
    "call 2f",
    ".ascii \"[    0.5] Kernel panic - not syncing: out of luck\\r\\n\\0\"",
    "2: pop %esi",
    "3: lodsb",
    "test %al,%al",
    "jz 4f",
    "out %al,%dx",
    "jmp 3b",
    "4: mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
);
// Prints the command line that it was given, and the first bytes of its first module.
payload!(
    show_boot,
    ".code32",
    "mov $0x3f8,%edx",
    "mov $0x80000,%esp",
    "mov 16(%ebx),%esi",
    "call 3f",
    "mov $32,%al",
    "out %al,%dx",
    "mov 24(%ebx),%ecx",
    "mov (%ecx),%esi",
    "call 3f",
    "mov $10,%al",
    "out %al,%dx",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
    "3: lodsb",
    "test %al,%al",
    "jz 4f",
    "out %al,%dx",
    "jmp 3b",
    "4: ret",
);
// Echoes each byte that it reads from the first UART, until a '.'.
payload!(
    echo,
    ".code32",
    "mov $0x3f9,%edx",
    "mov $1,%al",
    "out %al,%dx",
    "5: mov $0x3fd,%edx",
    "in %dx,%al",
    "test $1,%al",
    "jz 5b",
    "mov $0x3f8,%edx",
    "in %dx,%al",
    "out %al,%dx",
    "cmp $0x2e,%al",
    "jne 5b",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
// Prints 4,000 lines of 50 characters with string instructions, then powers off: output for a slow reader.
payload!(
    flood,
    ".code32",
    "mov $0x80000,%esp",
    "call 2f",
    ".ascii \"0123456789012345678901234567890123456789012345678\\n\"",
    "2: pop %ebx",
    "mov $4000,%ebp",
    "3: mov %ebx,%esi",
    "mov $50,%ecx",
    "mov $0x3f8,%edx",
    "cld",
    "rep outsb",
    "dec %ebp",
    "jnz 3b",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
// Prints the types of the entries in its memory map.
payload!(
    memory_map,
    ".code32",
    "mov 44(%ebx),%ecx",
    "mov 48(%ebx),%esi",
    "lea (%esi,%ecx),%edi",
    "mov $0x3f8,%edx",
    "3: mov 20(%esi),%al",
    "add $0x30,%al",
    "out %al,%dx",
    "add $24,%esi",
    "cmp %edi,%esi",
    "jb 3b",
    "mov $10,%al",
    "out %al,%dx",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);

// Reads each port, and each 64 KiB of memory from the end of its own (32 MiB) to 4 GiB. Prints the addresses, in hexadecimal, at
// which not all bits are ones. Then resets itself.
payload!(
    reach,
    ".code32",
    "mov $0x80000,%esp",
    "xor %edx,%edx",
    "2: in %dx,%al",
    "cmp $0xff,%al",
    "je 3f",
    "mov %edx,%ebx",
    "call 5f",
    "3: inc %dx",
    "jnz 2b",
    "mov $0x2000000,%ebx",
    "2: cmpl $-1,(%ebx)",
    "je 3f",
    "call 5f",
    "3: add $0x10000,%ebx",
    "jnz 2b",
    "mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
    // EBX, eight digits and a space.
    "5: push %edx",
    "mov $0x3f8,%edx",
    "mov $8,%ecx",
    "6: rol $4,%ebx",
    "mov %bl,%al",
    "and $15,%al",
    "cmp $10,%al",
    "sbb $0x69,%al",
    "das",
    "out %al,%dx",
    "loop 6b",
    "mov $32,%al",
    "out %al,%dx",
    "pop %edx",
    "ret",
);
