//! Multiboot programs that read what the first UART receives.

// Reads its first UART by interrupts (vector 0x40, by the I/O APIC), and prints a hash of all bytes: h = h * 33 + byte. The handler
// counts them in ESI, has the hash in EBP, and goes on at 8, or at 5 where it has all.
macro_rules! uart_reader {
    ($name:ident, $($handler:literal),* $(,)?) => {
        payload!(
            $name,
            ".code32",
            "mov $0x80000,%esp",
            "call 1f",
            // The interrupt handler of the program.
            $($handler,)*
            // In place of IRET, which some hosts' KVM cannot emulate.
            "8: movl $0,0xfee000b0",
            "mov $0x80000,%esp",
            "jmp 2f",
            // The hash in hexadecimal.
            "5: mov $0x3f8,%edx",
            "mov $8,%ecx",
            "6: rol $4,%ebp",
            "mov %ebp,%eax",
            "and $15,%al",
            "cmp $10,%al",
            "sbb $0x69,%al",
            "das",
            "out %al,%dx",
            "loop 6b",
            "mov $10,%al",
            "out %al,%dx",
            "mov $0x600,%dx",
            "mov $0x34,%al",
            "out %al,%dx",
            "hlt",
            // The segments, the interrupt descriptor table, the local APIC, and entry 4 of the I/O APIC.
            "1: pop %eax",
            "movl $0xffff,0x91008",
            "movl $0xcf9a00,0x9100c",
            "movw $0xf,0x8ffe0",
            "movl $0x91000,0x8ffe2",
            "lgdt 0x8ffe0",
            "push $8",
            "call 3f",
            "jmp 4f",
            "3: lret",
            "4: mov %ax,0x90200",
            "movw $8,0x90202",
            "movw $0x8e00,0x90204",
            "shr $16,%eax",
            "mov %ax,0x90206",
            "movw $0x7ff,0x8fff0",
            "movl $0x90000,0x8fff2",
            "lidt 0x8fff0",
            "movl $0x1ff,0xfee000f0",
            "movl $0x19,0xfec00000",
            "movl $0,0xfec00010",
            "movl $0x18,0xfec00000",
            "movl $0x40,0xfec00010",
            "xor %esi,%esi",
            "xor %ebp,%ebp",
            // The PIC has its interrupts masked.
            "mov $0xff,%al",
            "out %al,$0x21",
            "out %al,$0xa1",
            // FIFO on, interrupts for received data.
            "mov $0x3fa,%edx",
            "mov $0x87,%al",
            "out %al,%dx",
            "mov $0x3f9,%edx",
            "mov $1,%al",
            "out %al,%dx",
            "2: sti",
            "hlt",
            "jmp 2b",
        );
    };
}

// 1 MiB: the 8 bytes that the interrupt identification promises, by a string instruction, or one after a time-out.
uart_reader!(
    read_in_bursts,
    "mov $0x3fa,%edx",
    "in %dx,%al",
    "mov $0x3f8,%edx",
    "mov $1,%ecx",
    "and $15,%al",
    "cmp $12,%al",
    "je 6f",
    "mov $8,%ecx",
    "cmp $4,%al",
    "jne 8f",
    "6: mov $0x8f000,%edi",
    "mov %edi,%ebx",
    "add %ecx,%esi",
    "cld",
    "rep insb",
    "6: movzbl (%ebx),%eax",
    "imul $33,%ebp,%ebp",
    "add %eax,%ebp",
    "inc %ebx",
    "cmp %edi,%ebx",
    "jb 6b",
    "cmp $1048576,%esi",
    "je 5f",
);
// 16 KiB: one for each interrupt.
uart_reader!(
    read_by_the_byte,
    "mov $0x3fd,%edx",
    "in %dx,%al",
    "test $1,%al",
    "jz 8f",
    "mov $0x3f8,%edx",
    "xor %eax,%eax",
    "in %dx,%al",
    "imul $33,%ebp,%ebp",
    "add %eax,%ebp",
    "inc %esi",
    "cmp $16384,%esi",
    "je 5f",
);
