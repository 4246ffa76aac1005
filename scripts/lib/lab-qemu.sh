# The QEMU that the lab runs on: a copy of Debian's with one instruction taken out. Source it after common.sh.
# shellcheck shell=bash
#
# The fault. VMRUN with an event to inject (helper_vmrun, target/i386/tcg/*/svm_helper.c) delivers an external interrupt
# at once, by do_interrupt_x86_hardirq, but has stored its vector in CPUState.exception_index before, and leaves it there.
# The other kinds of events are delivered by cpu_loop_exit, which needs the store; this one does not. If the emulation
# loop is left before the next #VMEXIT (another thread asks for it, or the instruction budget of a counted run is used
# up), cpu_handle_exception finds the vector and delivers the interrupt a second time, whether or not the guest has
# interrupts enabled. Linux' timer handler then waits for a lock that it holds itself. The fewer exits a guest makes,
# the likelier that is: in one of a few counted boots Linux hangs.
#
# What is done. The store is replaced by a NOP of the same length, so that exception_index keeps its -1 ("none").
# The fix for QEMU itself: in the case SVM_EVTINJ_TYPE_INTR of helper_vmrun, do not set cs->exception_index.
#
# Where it is needed. The fault is in QEMU 7.2 (Debian 12), 10.0.2 (Debian 12's backports), 10.0.13 (Debian 13), and is
# still in the source after 10.1. The same pattern of bytes finds the store in all three of Debian's binaries, once in each.
# The lab asks for nothing newer than Debian 12's own: 10.0.2 has both faults, this one and the lost interrupt that
# scripts/lab's heartbeat is for. Its counts are the same, its speed is too (three counted boots: 37 to 49 s), and on Debian
# 12 it needs another apt source. Where it is installed, the lab runs on it.
#
# The test. scripts/check-lab-qemu fails on a QEMU in which the store is not found, and runs a guest in a counted lab
# that sees an interrupt that comes twice: it does on QEMU 7.2 and 10.0.2 as Debian has them (--stock), each time.

# lab_qemu_store QEMU: prints the offset of the store in the file QEMU. Fails where it is not found exactly once.
lab_qemu_store() {
    # mov [error_code], r13d; the store: mov [exception_index], esi; mov dword [exception_is_int], 0;
    # mov qword [exception_next_eip], -1; test byte [qemu_loglevel], ... (the registers of the addresses vary).
    local before='\x44\x89[\xa8-\xaf]..\x00\x00' store='\x89[\xb0-\xb7]..\xff\xff'
    local after='\xc7[\x80-\x87]..\x00\x00\x00\x00\x00\x00\x48\xc7[\x80-\x87]..\x00\x00\xff\xff\xff\xff\xf6\x05'
    local at
    at=$(LC_ALL=C grep -obUaP "$before\K$store(?=$after)" "$1" | cut -d: -f1) || true
    case $at in '' | *[!0-9]*) return 1 ;; esac
    echo "$at"
}

# lab_qemu: prints the path of the QEMU to run the lab on, and makes the copy where there is none yet.
# HWVMM_LAB_QEMU=PATH: that program, unchanged.
lab_qemu() {
    [ -z "${HWVMM_LAB_QEMU-}" ] || { echo "$HWVMM_LAB_QEMU"; return 0; }
    local stock copy at
    stock=$(command -v qemu-system-x86_64) || die "there is no qemu-system-x86_64 on the PATH"
    # By size, date and this file: packages keep their files' dates, so that a newer QEMU may be older than the copy.
    copy=$HWVMM_LAB/qemu/$(stat -L -c %s-%Y "$stock")-$(cksum <"${BASH_SOURCE[0]}" | cut -d' ' -f1)/qemu-system-x86_64
    [ -x "$copy" ] && { echo "$copy"; return 0; }
    if ! at=$(lab_qemu_store "$stock"); then
        say "lab: $("$stock" --version | head -n 1) is not known here: the lab may hang until its --timeout. Use Debian 12's or 13's, or see scripts/lib/lab-qemu.sh"
        echo "$stock"
        return 0
    fi
    rm -rf "$HWVMM_LAB/qemu/qemu-system-x86_64"
    mkdir -p "${copy%/*}"
    cp "$stock" "$copy.$$"
    # NOP word [rax + rax + 0], 6 bytes.
    printf '\x66\x0f\x1f\x44\x00\x00' | dd of="$copy.$$" bs=1 seek="$at" conv=notrunc status=none
    mv "$copy.$$" "$copy"
    echo "$copy"
}
