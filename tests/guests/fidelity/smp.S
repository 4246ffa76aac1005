/* Starts all other processors as kvm-unit-tests do: a trampoline in page 0, INIT and SIPI to all but itself, once each. */
#include "suite.h"

    SUITE_START
    movl $trampoline, %esi
    xorl %edi, %edi
    movl $trampoline_end - trampoline, %ecx
    rep movsb
    movl $0, 0x600
    movl $0, 0x604
    movl $0x1ff, 0xfee000f0
    cmpl $0, 0xfee00020
    CHECK "the first processor's APIC id is 0"
    movl $0xc4500, 0xfee00300
    movl $0xc4600, 0xfee00300
    movw $0x510, %dx
    movw $5, %ax
    outw %ax, %dx
    incl %edx
    inb %dx, %al
    movzbl %al, %ebx
    movl $50000000, %ecx
1:  pause
    movl 0x600, %eax
    incl %eax
    cmpl %ebx, %eax
    loopne 1b
    cmpl %ebx, %eax
    CHECK "as many processors start as fw_cfg tells"
    /* A bit for each id from 1 on. */
    movl %ebx, %ecx
    movl $1, %eax
    shll %cl, %eax
    subl $2, %eax
    movl $50000000, %ecx
1:  pause
    cmpl %eax, 0x604
    loopne 1b
    cmpl %eax, 0x604
    CHECK "their APIC ids are 1 and on"
    SUITE_END

    .section .text
    .code16
trampoline:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movl $1, %eax
    cpuid
    shrl $24, %ebx
    movl %ebx, %ecx
    movl $1, %eax
    shll %cl, %eax
    lock orl %eax, 0x604
    lock incl 0x600
1:  hlt
    jmp 1b
trampoline_end:
