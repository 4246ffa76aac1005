/*
 * For guests in the shape of kvm-unit-tests: multiboot programs of 32 bits that print a line for each of their checks, and end by
 * isa-debug-exit, with 0 where all passed. A guest: SUITE_START; checks, each of which ends with ZF for what it found and
 * CHECK "text"; SUITE_END. EBP is the multiboot information's address for the guest's own use.
 */
    .section .text, "ax"
    .long 0x1badb002, 0, -0x1badb002

    .macro CHECK text
    pushf
    movl $1f, %esi
    call report
    .pushsection .rodata
1:  .asciz "\text\r\n"
    .popsection
    .endm

    .macro SAY text
    movl $1f, %esi
    call say
    .pushsection .rodata
1:  .asciz "\text"
    .popsection
    .endm

/* A gate of the interrupt descriptor table. */
    .macro GATE vector, handler
    movl $\handler, %eax
    movw %ax, idt + 8 * \vector
    movw %cs, idt + 8 * \vector + 2
    movw $0x8e00, idt + 8 * \vector + 4
    shrl $16, %eax
    movw %ax, idt + 8 * \vector + 6
    .endm

    .macro SUITE_START
    .globl _start
_start:
    movl $stack_end, %esp
    movl %ebx, %ebp
    cld
    lgdt gdt_pointer
    ljmp $8, $1f
1:  movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    lidt idt_pointer
    .endm

    .macro SUITE_END
    SAY "SUMMARY: "
    movl checks, %eax
    call number
    SAY " tests, "
    movl failures, %eax
    call number
    SAY " unexpected failures\r\n"
    xorl %eax, %eax
    cmpl $0, failures
    setne %al
    outl %eax, $0xf4
1:  hlt
    jmp 1b

/* Prints the text at ESI. Flags and other registers stay. */
say:
    pushf
    pusha
2:  movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz 2b
    lodsb
    testb %al, %al
    jz 3f
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 2b
3:  popa
    popf
    ret

/* The flags on the stack are a check's, the text at ESI its name. EDI is lost. */
report:
    incl checks
    movl %esi, %edi
    testl $0x40, 4(%esp)
    jz 2f
    SAY "PASS: "
    jmp 3f
2:  incl failures
    SAY "FAIL: "
3:  movl %edi, %esi
    call say
    ret $4

/* Prints EAX, below 100. */
number:
    movb $10, %cl
    divb %cl
    addw $0x3030, %ax
    movw %ax, digits
    movl $digits, %esi
    jmp say

    .section .rodata
    .balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt
idt_pointer:
    .word 0x7ff
    .long idt
    .data
digits:
    .long 0
    .bss
    .balign 16
idt:
    .skip 0x800
checks:
    .skip 4
failures:
    .skip 4
    .skip 4096
stack_end:
    .section .text
    .endm
