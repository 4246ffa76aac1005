//! The cost of an interpreted instruction of an exit cluster (src/cluster): a driver's loop that writes a text to a UART, a byte for
//! each two port accesses, as Linux' 8250 driver does. The aim is 25 ns at most. Run it with `cargo bench --bench cluster`.

use hwvmm::cluster::standalone::{DATA, Standalone};
use std::time::Instant;

const ROUNDS: usize = 7;
const CLUSTERS: u64 = 2_000;

std::arch::global_asm!(
    ".pushsection .rodata",
    ".globl bench_uart_start",
    ".globl bench_uart_end",
    "bench_uart_start:",
    // %rbx: a structure with the port at 0x18 and the functions at 0x20 and 0x28; %r12: the text, %r13: its end.
    "1: mov %r12,%rbp",
    "2: movzbl (%rbp),%esi",
    "cmp $10,%sil",
    "je 3f",
    "mov %rbx,%rdi",
    "call 4f",
    "3: add $1,%rbp",
    "cmp %r13,%rbp",
    "jne 2b",
    "jmp 1b",
    // Writes a byte: waits until the transmitter is empty.
    "4: push %rbx",
    "push %rbp",
    "mov %rdi,%rbx",
    "mov %esi,%ebp",
    "mov $10000,%r14d",
    "5: mov $5,%esi",
    "mov %rbx,%rdi",
    "mov 0x20(%rbx),%rax",
    "call 8f",
    "mov %eax,%edx",
    "or 0x30(%rbx),%dl",
    "mov %dl,0x30(%rbx)",
    "and $0x20,%eax",
    "test %eax,%eax",
    "jne 6f",
    "sub $1,%r14d",
    "jne 5b",
    "6: mov %ebp,%edx",
    "xor %esi,%esi",
    "mov %rbx,%rdi",
    "mov 0x28(%rbx),%rax",
    "call 9f",
    "pop %rbp",
    "pop %rbx",
    "ret",
    // Register reads and writes: the port's number is the base and the shifted offset.
    "8: movzbl 0x38(%rdi),%ecx",
    "mov 0x18(%rdi),%rdx",
    "shl %cl,%esi",
    "add %esi,%edx",
    "in (%dx),%al",
    "movzbl %al,%eax",
    "ret",
    "9: movzbl 0x38(%rdi),%ecx",
    "mov %edx,%eax",
    "mov 0x18(%rdi),%rdx",
    "shl %cl,%esi",
    "add %esi,%edx",
    "out %al,(%dx)",
    "ret",
    "bench_uart_end:",
    ".popsection",
    options(att_syntax)
);

fn code() -> &'static [u8] {
    unsafe extern "C" {
        #[link_name = "bench_uart_start"]
        static START: u8;
        #[link_name = "bench_uart_end"]
        static END: u8;
    }
    // SAFETY: both labels are in one section, START before END, and between them are initialised bytes.
    unsafe {
        let start = &raw const START;
        std::slice::from_raw_parts(start, (&raw const END).offset_from_unsigned(start))
    }
}

fn main() {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let mut vcpu = Standalone::new(code()).expect("memory");
        vcpu.set_register(3, DATA);
        vcpu.set_register(12, DATA + 0x100);
        vcpu.set_register(13, DATA + 0x140);
        let start = Instant::now();
        let instructions: u64 = (0..CLUSTERS).map(|_| vcpu.run(2_048)).sum();
        let ns = start.elapsed().as_secs_f64() * 1e9;
        assert!(instructions >= CLUSTERS * 2_048 && vcpu.written() > instructions / 60, "{instructions}");
        best = best.min(ns / instructions as f64);
    }
    println!("an interpreted instruction: {best:.1} ns");
}
