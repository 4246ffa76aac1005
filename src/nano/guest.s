# The nanobenchmarks' guest: a bare 64-bit kernel of its own, no Linux. It starts in 32-bit protected mode without paging, as
# PVH and multiboot 1 loaders leave it, at 1 MiB; measures each operation with RDTSC; and prints the results on the UART at
# 0x3f8, a line for each operation:
#
#   nano NAME COUNT CYCLES CYCLES ...    COUNT operations took this many cycles, in each of ROUNDS rounds (hexadecimal)
#   nano NAME skipped                    this processor or VMM does not have it
#   nano end
#
# and then writes 0 to port 0xf4. Ports 0x508 (marks: the operation's number, and with bit 7 at its end), 0x99 and 0x9a belong
# to the VMM. Offsets are from nano_start: the code does not depend on where the linker puts it.

.set BASE, 0x100000
.set ROUNDS, 15
.set PML4, 0x200000
.set PDPT, 0x201000
.set PD, 0x202000           # four of them
.set PML4_B, 0x206000       # a second address space over the same lower levels
.set PT_A, 0x207000         # 0x40000000: 2 MiB in pages of 4 KiB
.set PT_B, 0x208000         # 0x40200000: the same, filled and emptied by `populate`
.set IDT, 0x210000
.set STACK, 0x21f000
.set USER_STACK, 0x220000
.set RESULTS, 0x221000
.set PAGES_A, 0x800000      # what PT_A and PT_B map
.set PAGES_B, 0xa00000
.set NOT_MAPPED, 0x7fe00000
.set DEVICE, 0xd0000000     # unmapped memory
.set APIC, 0xfee00000
.set AP_CODE, 0x8000        # what a second processor starts with, in real mode
.set AP_STACK, 0x222000
.set WAKE, 0x40             # vectors: what ends a HLT here, and what asks the second processor for it
.set CALL, 0x41
.set MARK_PORT, 0x508
.set UART, 0x3f8

.code32
.globl nano_start
nano_start:
    cli
    cld
    mov $STACK, %esp
    # Zeros from the first table to the last.
    mov $PML4, %edi
    xor %eax, %eax
    mov $((IDT + 0x1000 - PML4) / 4), %ecx
    rep stosl
    movl $(PDPT + 7), PML4
    movl $(PDPT + 7), PML4_B
    mov $PDPT, %edi
    mov $(PD + 7), %eax
    mov $4, %ecx
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    loop 1b
    # 4 GiB as they are, in pages of 2 MiB, for user mode too.
    mov $PD, %edi
    mov $0x87, %eax
    mov $2048, %ecx
1:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 1b
    movl $(PT_A + 7), PD + 0x1000
    movl $(PT_B + 7), PD + 0x1008
    movl $0, PD + 0x1000 + 8 * 511
    mov $PT_A, %edi
    mov $(PAGES_A + 7), %eax
    mov $512, %ecx
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    loop 1b
    mov $PML4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx   # EFER: long mode, SYSCALL
    rdmsr
    or $0x101, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt (nano_gdt_pointer - nano_start + BASE)
    ljmp $8, $(nano_long - nano_start + BASE)

.code64
nano_long:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $STACK, %esp
    # Every vector is unexpected, but for four.
    lea unexpected(%rip), %rax
    mov $IDT, %edi
    mov $256, %ecx
1:  call set_gate
    add $16, %edi
    loop 1b
    lea wake(%rip), %rax
    mov $(IDT + WAKE * 16), %edi
    call set_gate
    lea called(%rip), %rax
    mov $(IDT + CALL * 16), %edi
    call set_gate
    lea divide_error(%rip), %rax
    mov $IDT, %edi
    call set_gate
    lea page_fault(%rip), %rax
    mov $(IDT + 14 * 16), %edi
    call set_gate
    lidt idt_pointer(%rip)
    mov $0xc0000081, %ecx   # STAR: kernel at 8, user at 0x18 (with 8 and 16 added)
    xor %eax, %eax
    mov $0x001b0008, %edx
    wrmsr
    mov $0xc0000082, %ecx   # LSTAR
    lea system_call(%rip), %rax
    mov %rax, %rdx
    shr $32, %rdx
    wrmsr
    mov $0xc0000084, %ecx   # SFMASK
    xor %eax, %eax
    xor %edx, %edx
    wrmsr

    lea tests(%rip), %r12
    xor %r13d, %r13d
next_test:
    cmpb $0, (%r12)
    je the_end
    mov %rsp, saved_stack(%rip)
    lea nano_start(%rip), %r15
    # Its preparation, which says in EAX whether there is such a thing here.
    mov 16(%r12), %eax
    add %r15, %rax
    call *%rax
    test %eax, %eax
    jz skip_test
    mov %r13d, %eax
    mov $MARK_PORT, %edx
    out %al, (%dx)
    xor %ebp, %ebp
1:  rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov %rax, %r14
    mov 28(%r12), %r8d
    mov 20(%r12), %eax
    add %r15, %rax
    call *%rax
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    sub %r14, %rax
    mov %rax, RESULTS(, %rbp, 8)
    inc %ebp
    cmp $ROUNDS, %ebp
    jne 1b
    mov %r13d, %eax
    or $0x80, %eax
    mov $MARK_PORT, %edx
    out %al, (%dx)
    # What follows it, so that the next finds all as it was.
    mov 24(%r12), %eax
    add %r15, %rax
    call *%rax
    call print_name
    mov 28(%r12), %eax
    call print_hex
    xor %ebp, %ebp
1:  mov RESULTS(, %rbp, 8), %rax
    call print_hex
    inc %ebp
    cmp $ROUNDS, %ebp
    jne 1b
    call print_newline
    jmp advance
skip_test:
    call print_name
    lea text_skipped(%rip), %rsi
    call print
advance:
    add $32, %r12
    inc %r13d
    jmp next_test
the_end:
    lea text_end(%rip), %rsi
    call print
    xor %eax, %eax
    mov $0xf4, %edx
    out %al, (%dx)
1:  hlt
    jmp 1b

# EDI: a gate for the handler in RAX.
set_gate:
    mov %rax, %rdx
    mov %dx, (%rdi)
    movl $0x8e000008, 2(%rdi)
    shr $16, %rdx
    mov %dx, 6(%rdi)
    shr $16, %rdx
    mov %edx, 8(%rdi)
    movl $0, 12(%rdi)
    ret

# A fault that no operation wants: the operation is not to be had.
unexpected:
    mov saved_stack(%rip), %rsp
    jmp skip_test
# Both instructions that fault on purpose have two bytes.
divide_error:
    addq $2, (%rsp)
    iretq
page_fault:
    add $8, %rsp
    addq $2, (%rsp)
    iretq
system_call:
    test %eax, %eax
    jnz 1f
    sysretq
1:  mov kernel_stack(%rip), %rsp
    ret

# Wakes the vCPU that waits in HLT.
wake:
    movb $1, awake(%rip)
    push %rax
    push %rbx
    push %rcx
    push %rdx
    jmp end_of_interrupt
# On the second processor: the first is to go on.
called:
    push %rax
    push %rbx
    push %rcx
    push %rdx
    mov $(0x4000 + WAKE), %eax
    xor %edx, %edx
    call send_ipi
end_of_interrupt:
    mov $0xb0, %ecx
    xor %eax, %eax
    call apic_write
    pop %rdx
    pop %rcx
    pop %rbx
    pop %rax
    iretq
# EAX into the local APIC's register at offset ECX. RBX, RCX, RDX are lost.
apic_write:
    cmpb $0, has_x2apic(%rip)
    jne 1f
    mov $APIC, %ebx
    mov %eax, (%rbx, %rcx)
    ret
1:  shr $4, %ecx
    add $0x800, %ecx
    xor %edx, %edx
    wrmsr
    ret
# EAX as interrupt command for the processor EDX.
send_ipi:
    cmpb $0, has_x2apic(%rip)
    jne 1f
    mov $APIC, %ebx
    shl $24, %edx
    mov %edx, 0x310(%rbx)
    mov %eax, 0x300(%rbx)
    ret
1:  mov $0x830, %ecx
    wrmsr
    ret
# HLT until WAKE has come.
sleep:
    sti
    hlt
    cli
    cmpb $0, awake(%rip)
    je sleep
    ret

print_name:
    lea text_nano(%rip), %rsi
    call print
    mov %r12, %rsi
    jmp print
print_newline:
    lea text_newline(%rip), %rsi
# RSI: a text that a zero ends.
print:
    lodsb
    test %al, %al
    jz 1f
    call print_byte
    jmp print
1:  ret
# RAX in hexadecimal, behind a space, without zeros in front.
print_hex:
    push %rax
    mov $' ', %al
    call print_byte
    pop %rax
    mov $16, %ecx
1:  rol $4, %rax
    dec %ecx
    jz 2f
    test $15, %al
    jz 1b
2:  mov %rax, %rbx
    and $15, %al
    add $'0', %al
    cmp $'9', %al
    jbe 3f
    add $('a' - '0' - 10), %al
3:  call print_byte
    mov %rbx, %rax
    test %ecx, %ecx
    jz 4f
    rol $4, %rax
    dec %ecx
    jmp 2b
4:  ret
print_byte:
    push %rax
    push %rdx
    mov %al, %ah
    mov $(UART + 5), %edx
1:  in (%dx), %al
    test $0x20, %al
    jz 1b
    mov $UART, %edx
    mov %ah, %al
    out %al, (%dx)
    pop %rdx
    pop %rax
    ret

# Preparations: EAX is 0 where the operation is not to be had.
always:
    mov $1, %eax
nothing:
    ret
touch_page:
    mov $0x40005000, %ebx
    movb $1, (%rbx)
    jmp always
x2apic_on:
    mov $1, %eax
    cpuid
    xor %eax, %eax
    bt $21, %ecx
    jnc nothing
    mov $0x1b, %ecx
    rdmsr
    or $0xc00, %eax
    wrmsr
    movb $1, has_x2apic(%rip)
    jmp always
# The local APIC with its timer: one-shot, divided by 1. The PICs are masked: a PC's timer may run.
timer_on:
    mov $0xff, %al
    out %al, $0x21
    out %al, $0xa1
    call x2apic_on
    mov $0xf0, %ecx
    mov $0x1ff, %eax
    call apic_write
    mov $0x320, %ecx
    mov $WAKE, %eax
    call apic_write
    mov $0x3e0, %ecx
    mov $0xb, %eax
    call apic_write
    jmp always
# A second processor, where there is one: it comes within 2^31 cycles.
second_on:
    call timer_on
    lea ap_start(%rip), %rsi
    mov $AP_CODE, %edi
    mov $(ap_start_end - ap_start), %ecx
    rep movsb
    mov $0x4500, %eax
    mov $1, %edx
    call send_ipi
    mov $(0x4600 + AP_CODE / 4096), %eax
    mov $1, %edx
    call send_ipi
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    mov $(1 << 31), %ecx
    add %rax, %rcx
1:  pause
    mov second_is_up(%rip), %bl
    test %bl, %bl
    jnz always
    rdtsc
    shl $32, %rdx
    or %rdx, %rax
    cmp %rcx, %rax
    jb 1b
    xor %eax, %eax
    ret
.code16
ap_start:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl (AP_CODE + ap_gdt_pointer - ap_start)
    mov $0x20, %eax
    mov %eax, %cr4
    mov $PML4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x101, %eax
    wrmsr
    mov %cr0, %eax
    and $0x9fffffff, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmpl $8, $(ap_long - nano_start + BASE)
ap_gdt_pointer:
    .word nano_gdt_end - nano_gdt - 1
    .long nano_gdt - nano_start + BASE
ap_start_end:
.code64
ap_long:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $AP_STACK, %esp
    lidt idt_pointer(%rip)
    cmpb $0, has_x2apic(%rip)
    je 1f
    mov $0x1b, %ecx
    rdmsr
    or $0xc00, %eax
    wrmsr
1:  mov $0xf0, %ecx
    mov $0x1ff, %eax
    call apic_write
    movb $1, second_is_up(%rip)
1:  sti
    hlt
    jmp 1b
kvm_only:
    mov $0x40000000, %eax
    cpuid
    xor %eax, %eax
    cmp $0x4b4d564b, %ebx
    jne nothing
    cpuid
    # "Auth" and "Hygo": VMMCALL; else VMCALL.
    mov $1, %al
    cmp $0x68747541, %ebx
    je 1f
    cmp $0x6f677948, %ebx
    je 1f
    xor %al, %al
1:  mov %al, is_amd(%rip)
    jmp always
pcid_on:
    mov $1, %eax
    cpuid
    xor %eax, %eax
    bt $17, %ecx
    jnc nothing
    mov %cr4, %rax
    or $0x20000, %eax
    mov %rax, %cr4
    jmp always
pcid_off:
    mov $PML4, %eax
    mov %rax, %cr3
    mov %cr4, %rax
    and $~0x20000, %eax
    mov %rax, %cr4
    ret

# The operations: R8 of them. R12 to R15 and RBP are not theirs.
op_loop:
    dec %r8d
    jnz op_loop
    ret
op_syscall:
    mov %rsp, kernel_stack(%rip)
    lea user_code(%rip), %rcx
    mov $2, %r11d
    mov $USER_STACK, %esp
    sysretq
user_code:
    xor %eax, %eax
1:  syscall
    dec %r8d
    jnz 1b
    inc %eax
    syscall
op_in:
    in $0x80, %al
    dec %r8d
    jnz op_in
    ret
op_cr8wr:
    xor %eax, %eax
1:  mov %rax, %cr8
    dec %r8d
    jnz 1b
    ret
op_callret:
    lea nothing(%rip), %rbx
1:  call *%rbx
    dec %r8d
    jnz 1b
    ret
op_pgfault:
    mov $NOT_MAPPED, %ebx
1:  mov (%rbx), %al
    dec %r8d
    jnz 1b
    ret
op_divzero:
    xor %ecx, %ecx
1:  div %ecx
    dec %r8d
    jnz 1b
    ret
# A bit that the processor leaves alone, in the entry of a page that is in use.
op_ptemod:
    mov $(PT_A + 8 * 5), %ebx
1:  xorq $0x200, (%rbx)
    dec %r8d
    jnz 1b
    ret
# The same, and then the page is used through the entry: the tables must agree again.
op_pteuse:
    mov $(PT_A + 8 * 5), %ebx
    mov $0x40005000, %ecx
1:  xorq $0x200, (%rbx)
    invlpg (%rcx)
    movb $1, (%rcx)
    dec %r8d
    jnz 1b
    ret
# An entry one level up, and then the page is used through it.
op_pdemod:
    mov $(PD + 0x1000), %ebx
    mov $0x40005000, %ecx
1:  xorq $0x200, (%rbx)
    movb $1, (%rcx)
    dec %r8d
    jnz 1b
    ret
op_cpuid:
    xor %eax, %eax
    cpuid
    dec %r8d
    jnz op_cpuid
    ret
op_rdmsr:
    mov $0x1b, %ecx
1:  rdmsr
    dec %r8d
    jnz 1b
    ret
op_wrmsr:
    mov $0x80b, %ecx
    xor %eax, %eax
    xor %edx, %edx
1:  wrmsr
    dec %r8d
    jnz 1b
    ret
op_rdtsc:
    rdtsc
    dec %r8d
    jnz op_rdtsc
    ret
op_out:
    out %al, $0x99
    dec %r8d
    jnz op_out
    ret
op_outk:
    out %al, $0x9a
    dec %r8d
    jnz op_outk
    ret
op_strout:
    mov $0x99, %edx
1:  mov $RESULTS, %esi
    mov $64, %ecx
    rep outsb
    dec %r8d
    jnz 1b
    ret
op_mmio:
    mov $DEVICE, %ebx
1:  mov (%rbx), %eax
    dec %r8d
    jnz 1b
    ret
op_mmiosplit:
    mov $(DEVICE + 0xffe), %ebx
1:  mov (%rbx), %eax
    dec %r8d
    jnz 1b
    ret
op_hypercall:
    cmpb $0, is_amd(%rip)
    je 2f
1:  mov $1, %eax
    vmmcall
    dec %r8d
    jnz 1b
    ret
2:  mov $1, %eax
    vmcall
    dec %r8d
    jnz 2b
    ret
op_invlpg:
    mov $0x40005000, %ebx
1:  invlpg (%rbx)
    dec %r8d
    jnz 1b
    ret
op_cr3wr:
    mov $PML4, %eax
1:  mov %rax, %cr3
    dec %r8d
    jnz 1b
    ret
op_cr3pcid:
    mov $PML4 + 1, %eax
    bts $63, %rax
1:  mov %rax, %cr3
    dec %r8d
    jnz 1b
    ret
# To the other address space, and 16 of its pages.
op_switch:
    mov $PML4, %ebx
1:  xor $(PML4 ^ PML4_B), %ebx
    mov %rbx, %cr3
    mov $0x40000000, %esi
    mov $16, %ecx
2:  mov (%rsi), %al
    add $0x1000, %esi
    dec %ecx
    jnz 2b
    dec %r8d
    jnz 1b
    mov $PML4, %eax
    mov %rax, %cr3
    ret
# An empty table is filled, entry by entry, and each page used as soon as it is there.
op_populate:
    mov $PT_B, %edi
    xor %eax, %eax
    mov $512, %ecx
    rep stosq
    mov %cr3, %rax
    mov %rax, %cr3
    mov $PT_B, %edi
    mov $(PAGES_B + 7), %eax
    mov $0x40200000, %ebx
1:  mov %rax, (%rdi)
    movb $1, (%rbx)
    add $0x1000, %eax
    add $0x1000, %ebx
    add $8, %edi
    dec %r8d
    jnz 1b
    ret

# A timer of 20,000 of the APIC's ticks, and HLT until it shoots.
op_hltwake:
    movb $0, awake(%rip)
    mov $20000, %eax
    mov $0x380, %ecx
    call apic_write
    call sleep
    dec %r8d
    jnz op_hltwake
    ret
# Both processors wait in HLT but for the one whose turn it is.
op_ipi:
    movb $0, awake(%rip)
    mov $(0x4000 + CALL), %eax
    mov $1, %edx
    call send_ipi
    call sleep
    dec %r8d
    jnz op_ipi
    ret

# Name (16 bytes), preparation, operation, what follows, how many.
.macro nano_test name, prepare, operation, after, count
    .ascii "\name"
    .byte 0
    .balign 16, 0
    .long \prepare - nano_start
    .long \operation - nano_start
    .long \after - nano_start
    .long \count
.endm
.balign 16, 0
tests:
    nano_test loop, always, op_loop, nothing, 2000
    nano_test syscall, always, op_syscall, nothing, 2000
    nano_test in, always, op_in, nothing, 200
    nano_test cr8wr, always, op_cr8wr, nothing, 2000
    nano_test callret, always, op_callret, nothing, 2000
    nano_test pgfault, always, op_pgfault, nothing, 1000
    nano_test divzero, always, op_divzero, nothing, 1000
    nano_test ptemod, touch_page, op_ptemod, nothing, 1000
    nano_test pteuse, touch_page, op_pteuse, nothing, 500
    nano_test pdemod, touch_page, op_pdemod, nothing, 500
    nano_test cpuid, always, op_cpuid, nothing, 200
    nano_test rdmsr, always, op_rdmsr, nothing, 200
    nano_test wrmsr, x2apic_on, op_wrmsr, nothing, 200
    nano_test rdtsc, always, op_rdtsc, nothing, 1000
    nano_test out, always, op_out, nothing, 200
    nano_test outk, always, op_outk, nothing, 200
    nano_test strout, always, op_strout, nothing, 20
    nano_test mmio, always, op_mmio, nothing, 200
    nano_test mmiosplit, always, op_mmiosplit, nothing, 200
    nano_test hypercall, kvm_only, op_hypercall, nothing, 200
    nano_test invlpg, touch_page, op_invlpg, nothing, 500
    nano_test cr3wr, always, op_cr3wr, nothing, 500
    nano_test cr3pcid, pcid_on, op_cr3pcid, pcid_off, 500
    nano_test switch, always, op_switch, nothing, 200
    nano_test populate, always, op_populate, nothing, 512
    nano_test hltwake, timer_on, op_hltwake, nothing, 100
    nano_test ipi, second_on, op_ipi, nothing, 100
    .byte 0
.purgem nano_test
text_nano: .asciz "nano "
text_skipped: .asciz " skipped\r\n"
text_newline: .asciz "\r\n"
text_end: .asciz "nano end\r\n"

.balign 8, 0
saved_stack: .quad 0
kernel_stack: .quad 0
is_amd: .byte 0
has_x2apic: .byte 0
awake: .byte 0
second_is_up: .byte 0
.balign 8, 0
nano_gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08: code
    .quad 0x00cf93000000ffff    # 0x10: data
    .quad 0x00cffb000000ffff    # 0x18: user code of 32 bits
    .quad 0x00cff3000000ffff    # 0x20: user data
    .quad 0x00affb000000ffff    # 0x28: user code
nano_gdt_end:
nano_gdt_pointer:
    .word nano_gdt_end - nano_gdt - 1
    .long nano_gdt - nano_start + BASE
idt_pointer:
    .word 256 * 16 - 1
    .quad IDT
.globl nano_end
nano_end:
