/* The test device, fw_cfg, and the interrupt controllers as --testdev leaves them. Words behind the program's name: "one two". */
#include "suite.h"

    SUITE_START

    /* The command line: a name, then the words given, and no others. */
    movl 16(%ebp), %esi
1:  lodsb
    cmpb $' ', %al
    ja 1b
    movl $words, %edi
    movl $8, %ecx
    repe cmpsb
    CHECK "the words given are the arguments"

    /* Each width, at the latch and at its other name. */
    movl $0x12345678, %eax
    outl %eax, $0xe0
    xorl %eax, %eax
    inl $0xe0, %eax
    cmpl $0x12345678, %eax
    CHECK "the latch keeps 32 bits"
    movw $0xabcd, %ax
    outw %ax, $0xe2
    inl $0xe0, %eax
    cmpl $0xabcd5678, %eax
    CHECK "16 bits of it change alone"
    movb $0x5a, %al
    outb %al, $0xe1
    inl $0xe0, %eax
    cmpl $0xabcd5a78, %eax
    CHECK "8 bits of it change alone"
    inb $0xeb, %al
    cmpb $0xab, %al
    CHECK "the latch has a second place"

    /* String instructions, both ways. */
    movl $0xa5c3a5c3, %eax
    outl %eax, $0xe0
    movl $buffer, %edi
    movl $1024, %ecx
    movw $0xe0, %dx
    rep insb
    cmpl $buffer + 1024, %edi
    CHECK "1024 bytes by rep insb: the index"
    movl $buffer, %edi
    movl $1024, %ecx
    movb $0xc3, %al
    repe scasb
    CHECK "1024 bytes by rep insb: the bytes"
    std
    movl $buffer + 2046, %edi
    movl $1024, %ecx
    rep insw
    cld
    cmpl $buffer - 2, %edi
    CHECK "1024 words by rep insw, downwards: the index"
    movl $buffer, %edi
    movl $512, %ecx
    movl $0xa5c3a5c3, %eax
    repe scasl
    CHECK "1024 words by rep insw, downwards: the words"
    movl $sequence, %esi
    movl $5, %ecx
    rep outsb
    inb $0xe0, %al
    cmpb $5, %al
    CHECK "the last byte of rep outsb stays"

    /* Memory that exits. */
    movl $0x12345678, 0xff000000
    cmpl $0x12345678, 0xff000000
    CHECK "the test memory keeps 32 bits"
    cmpw $0x3456, 0xff000001
    CHECK "it can be read at odd addresses"
    movl $0xcafe1234, 0xff000ffe
    cmpl $0xcafe1234, 0xff000ffe
    CHECK "it can be written across a page's end"
    movb $0x77, 0xff00ffff
    cmpb $0x77, 0xff00ffff
    CHECK "it has 64 KiB"
    lock incl 0xff000000
    cmpl $0x12345679, 0xff000000
    CHECK "it can be counted up"

    /* A page that is taken from under the translations keeps what it holds. */
    movl $0x600d600d, page + 0x10
    movl $page, %eax
    outl %eax, $0xe4
    cmpl $0x600d600d, page + 0x10
    CHECK "a flushed page reads as before"
    movl $page, %eax
    outl %eax, $0xe4
    incl page + 0x10
    cmpl $0x600d600e, page + 0x10
    CHECK "a flushed page can be written"

    /* Interrupt line 11 by the PIC, where a PC's firmware has it. */
    GATE 0x73, by_pic
    GATE 0x50, by_io_apic
    movb $0xfb, %al
    outb %al, $0x21
    movb $0xf7, %al
    outb %al, $0xa1
    movw $0x200b, %dx
    movl $1, %eax
    outl %eax, %dx
    sti
    movl $1000000, %ecx
1:  cmpl $0, pic_count
    loope 1b
    cli
    cmpl $1, pic_count
    CHECK "a line comes by the PIC, at the firmware's vector"
    movb $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    movl $1, %eax
    outl %eax, %dx
    sti
    movl $10000, %ecx
1:  loop 1b
    cli
    movb $0, %al
    outb %al, %dx
    cmpl $1, pic_count
    CHECK "and does not where it is masked"

    /* Line 14 by the I/O APIC. */
    movl $0x1ff, 0xfee000f0
    movl $0x10 + 2 * 14, 0xfec00000
    movl $0x50, 0xfec00010
    movw $0x200e, %dx
    movb $1, %al
    outb %al, %dx
    movb $0, %al
    outb %al, %dx
    sti
    movl $1000000, %ecx
1:  cmpl $0, io_apic_count
    loope 1b
    cli
    cmpl $1, io_apic_count
    CHECK "an edge comes by the I/O APIC, once"

    /* What QEMU's firmware configuration says. */
    movw $0x510, %dx
    movw $5, %ax
    outw %ax, %dx
    movw $0x511, %dx
    inb %dx, %al
    cmpb $1, %al
    CHECK "fw_cfg tells the number of vCPUs"
    movw $0x510, %dx
    movw $3, %ax
    outw %ax, %dx
    movw $0x511, %dx
    movl $8, %ecx
    movl $buffer, %edi
1:  inb %dx, %al
    stosb
    loop 1b
    movl 8(%ebp), %eax
    shll $10, %eax
    cmpl %eax, buffer
    sbbl %eax, %eax
    CHECK "fw_cfg tells of no less memory than multiboot"

    /* Unmapped. */
    movl $0x80000000 + (31 << 11), %eax
    movw $0xcf8, %dx
    outl %eax, %dx
    movw $0xcfc, %dx
    inl %dx, %eax
    cmpl $0xffffffff, %eax
    CHECK "a PCI device that is not there reads as all ones"

    SUITE_END

by_pic:
    incl pic_count
    pushl %eax
    pushl %edx
    movw $0x200b, %dx
    movb $0, %al
    outb %al, %dx
    movb $0x20, %al
    outb %al, $0xa0
    outb %al, $0x20
    popl %edx
    popl %eax
    iret
by_io_apic:
    incl io_apic_count
    movl $0, 0xfee000b0
    iret

    .section .rodata
words:
    .asciz "one two"
sequence:
    .byte 1, 2, 3, 4, 5
    .bss
    .balign 4096
page:
    .skip 4096
buffer:
    .skip 4096
pic_count:
    .skip 4
io_apic_count:
    .skip 4
