//! Multiboot programs for whole runs.

// Multiboot programs (32-bit) for whole runs: they print a text on the first UART, then go on at 4. The text ends with a zero.
macro_rules! printer {
    ($name:ident, [$($text:literal),* $(,)?], $($line:literal),* $(,)?) => {
        payload!(
            $name, ".code32",
            "mov $0x80000,%esp", "mov $0x3f8,%edx", "call 2f", $($text,)*
            "2: pop %esi",
            "3: lodsb", "test %al,%al", "jz 4f", "out %al,%dx", "jmp 3b",
            "4:",
            $($line),*
        );
    };
}

// They print "hello\n", then each ends in another way.
macro_rules! program {
    ($name:ident, $($line:literal),* $(,)?) => {
        printer!($name, [".ascii \"hello\\n\\0\""], $($line),*);
    };
}

program!(power_off, "mov $0x600,%dx", "mov $0x34,%al", "out %al,%dx", "hlt");
program!(reset, "mov $0x602,%dx", "mov $1,%al", "out %al,%dx", "hlt");
program!(reset_i8042, "mov $0xfe,%al", "out %al,$0x64", "hlt");
program!(pvpanic, "mov $0x505,%dx", "mov $1,%al", "out %al,%dx", "hlt");
program!(triple_fault, "ud2");
program!(halt, "5: cli", "hlt", "jmp 5b");
program!(spin, "5: jmp 5b");
// An exit to user space each time: the status of the i8042.
program!(poll, "5: in $0x64,%al", "jmp 5b");
// Counts in memory, and prints each number: eight digits from '0' to '?'.
program!(
    count,
    "movl $0,0x90000",
    "5: mov 0x90000,%ebx",
    "mov $8,%ecx",
    "6: rol $4,%ebx",
    "mov %bl,%al",
    "and $0xf,%al",
    "add $0x30,%al",
    "out %al,%dx",
    "loop 6b",
    "mov $10,%al",
    "out %al,%dx",
    "incl 0x90000",
    "mov $20000,%ecx",
    "7: loop 7b",
    "jmp 5b"
);
// In rounds: reads each page from 4 to 8 MiB, counts in each page from 8 to 9 MiB, writes the number to the mark port, and prints it: eight
// digits from '0' to '?'.
program!(
    touch,
    "5: mov $0x400000,%edi",
    "mov $1024,%ecx",
    "6: mov (%edi),%al",
    "add $0x1000,%edi",
    "loop 6b",
    "mov $256,%ecx",
    "7: incl (%edi)",
    "add $0x1000,%edi",
    "loop 7b",
    "mov 0x800000,%ebx",
    "mov %ebx,%eax",
    "mov $0x508,%dx",
    "out %eax,%dx",
    "mov $0x3f8,%dx",
    "mov $8,%ecx",
    "8: rol $4,%ebx",
    "mov %bl,%al",
    "and $0xf,%al",
    "add $0x30,%al",
    "out %al,%dx",
    "loop 8b",
    "mov $10,%al",
    "out %al,%dx",
    "mov $20000,%ecx",
    "9: loop 9b",
    "jmp 5b"
);
// Prints the generation identifier again and again: 32 digits from '0' to '?', the upper one of each byte first.
program!(
    generation,
    "5: mov $0xdf000,%esi",
    "mov $16,%ecx",
    "6: lodsb",
    "mov %al,%bl",
    "shr $4,%al",
    "add $0x30,%al",
    "out %al,%dx",
    "mov %bl,%al",
    "and $0xf,%al",
    "add $0x30,%al",
    "out %al,%dx",
    "loop 6b",
    "mov $10,%al",
    "out %al,%dx",
    "mov $20000,%ecx",
    "7: loop 7b",
    "jmp 5b"
);
program!(debug_exit, "mov $38,%eax", "out %eax,$0xf4", "hlt");
// They say how a command ended, as the agent does.
program!(
    command_exited,
    "mov $0x5e8,%dx",
    "mov $34,%al",
    "out %al,%dx",
    "inc %dx",
    "mov $1,%al",
    "out %al,%dx",
    "5: jmp 5b"
);
program!(
    command_signaled,
    "mov $0x5e8,%dx",
    "mov $9,%al",
    "out %al,%dx",
    "inc %dx",
    "mov $2,%al",
    "out %al,%dx",
    "5: jmp 5b"
);
program!(command_failed, "mov $0x5e9,%dx", "mov $3,%al", "out %al,%dx", "5: jmp 5b");
// Ends of no kind, a signal 0, and writes of other widths; then it powers off.
program!(
    command_no_ends,
    "mov $0x5e9,%dx",
    "xor %eax,%eax",
    "out %al,%dx",
    "mov $2,%al",
    "out %al,%dx",
    "mov $4,%al",
    "out %al,%dx",
    "mov $1,%al",
    "out %ax,%dx",
    "out %eax,%dx",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
program!(expired_watchdog, "mov $0x443,%dx", "mov $0xf,%al", "out %al,%dx", "5: jmp 5b");
// Two lines that end in CR LF, the first with colours, and one without an end; then it powers off.
printer!(
    three_lines,
    [".ascii \"tests: fail=123\\r\\n\\033[32mall done\\033[0m\\r\\ngood bye\\0\""],
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
// A prompt: text without a newline, then nothing.
printer!(prompt, [".ascii \"login: \\0\""], "5: jmp 5b");
// A panic with escape sequences (they name and clear the terminal) and a backspace in its message, then its last line.
printer!(
    panic_with_escapes,
    [
        ".ascii \"Kernel panic - not syncing: \\033]0;owned\\007\\033[2J\\010x\\r\\n\"",
        ".ascii \"---[ end Kernel panic - not syncing: x ]---\\n\\0\""
    ],
    "5: jmp 5b",
);
// Moves BAR 0 of the first PCI device again and again, by the ports of configuration mechanism 1. Each write is a warning.
payload!(
    bar_flood,
    ".code32",
    "mov $0xcf8,%dx",
    "mov $0x80000810,%eax",
    "out %eax,%dx",
    "mov $0xcfc,%dx",
    "mov $0xd0000000,%eax",
    "2: out %eax,%dx",
    "jmp 2b",
);
// As [`bar_flood`], 50 writes; then a reset.
payload!(
    bar_flood_and_reset,
    ".code32",
    "mov $0xcf8,%dx",
    "mov $0x80000810,%eax",
    "out %eax,%dx",
    "mov $0xcfc,%dx",
    "mov $0xd0000000,%eax",
    "mov $50,%ecx",
    "2: out %eax,%dx",
    "loop 2b",
    "mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
);
// The last line of a Linux panic, then a reset.
printer!(
    panic_line,
    [".ascii \"[    0.5] Kernel panic - not syncing: out of luck\\r\\n\\0\""],
    "mov $0x602,%dx",
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
// Echoes each byte that it reads from the first UART: resets itself after a '!', powers off after a '.'.
payload!(
    echo_and_reset,
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
    "cmp $0x21,%al",
    "je 6f",
    "cmp $0x2e,%al",
    "jne 5b",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
    "6: mov $0x602,%dx",
    "mov $1,%al",
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
// Prints 200 lines of 50 characters as printk's console of Linux does: it reads the line status before each byte, and has the
// UART's interrupts off. Then it prints "end" without an end of the line, and powers off.
payload!(
    polled_lines,
    ".code32",
    "mov $0x80000,%esp",
    "call 2f",
    ".ascii \"0123456789012345678901234567890123456789012345678\\n\"",
    "2: pop %ebx",
    "cld",
    "mov $200,%ebp",
    "3: mov %ebx,%esi",
    "mov $50,%ecx",
    "call 6f",
    "dec %ebp",
    "jnz 3b",
    "call 4f",
    ".ascii \"end\"",
    "4: pop %esi",
    "mov $3,%ecx",
    "call 6f",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
    // Prints %ecx characters from %esi.
    "6: mov $0x3fd,%edx",
    "7: in %dx,%al",
    "test $0x20,%al",
    "jz 7b",
    "mov $0x3f8,%dx",
    "lodsb",
    "out %al,%dx",
    "loop 6b",
    "ret",
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
