//! The interpreter by itself: its instructions against the processor, and what ends a cluster.

mod guest;
mod native;

use super::End;
use super::flags::{AF, CF, DF, IF, OF, PF, SF, STATUS, ZF};
use super::standalone::run_bytes;
use guest::{CODE, DATA, Guest, STACK};

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSP: usize = 4;
const RSI: usize = 6;

#[test]
fn a_loop_of_port_io_is_run_to_its_end() {
    // mov $3,%ecx; 1: in (%dx),%al; inc %al; out %al,(%dx); dec %ecx; jnz 1b; hlt
    let code = [0xb9, 3, 0, 0, 0, 0xec, 0xfe, 0xc0, 0xee, 0xff, 0xc9, 0x75, 0xf8, 0xf4];
    let mut guest = Guest::new(&code);
    guest.cpu.regs[RDX] = 0x3f8;
    guest.cpu.regs[RAX] = 0x1122_3344_5566_7788;
    let (instructions, end) = guest.run();
    assert_eq!((instructions, end), (16, End::Unsupported));
    assert_eq!(guest.cpu.rip, CODE + 13, "before HLT");
    assert_eq!(guest.ports.log, ["in 3f8", "out 3f8 1", "in 3f8", "out 3f8 2", "in 3f8", "out 3f8 3"]);
    assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RCX]), (0x1122_3344_5566_7703, 0));
}

#[test]
fn calls_and_the_stack() {
    // call 1f; push $-2; pushfq; pop %rcx; hlt; 1: mov (%rsp),%rax; lea 2f(%rip),%rdx; push %rdx; ret; nop; 2: ret
    let code = [
        0xe8, 5, 0, 0, 0, 0x6a, 0xfe, 0x9c, 0x59, 0xf4, 0x48, 0x8b, 0x04, 0x24, 0x48, 0x8d, 0x15, 3, 0, 0, 0, 0x52,
        0xc3, 0x90, 0xc3,
    ];
    let mut guest = Guest::new(&code);
    guest.cpu.flags.set(STATUS, CF | ZF);
    assert_eq!(guest.run(), (9, End::Unsupported));
    assert_eq!((guest.cpu.rip, guest.cpu.regs[RAX]), (CODE + 9, CODE + 5));
    assert_eq!(guest.cpu.regs[RDX], CODE + 24);
    assert_eq!(guest.cpu.regs[RCX] & 0xfff, guest.cpu.flags.get() & 0xfff);
    assert_eq!((guest.cpu.regs[RSP], guest.word(STACK - 8)), (STACK - 8, (-2_i64).cast_unsigned()));
}

#[test]
fn conditions_follow_the_flags() {
    for number in 0..16_u8 {
        for bits in 0..32_u64 {
            let flag = |bit: u64, flag: u64| if bits >> bit & 1 != 0 { flag } else { 0 };
            let flags = flag(0, CF) | flag(1, ZF) | flag(2, SF) | flag(3, OF) | flag(4, PF);
            // jcc +1; hlt; nop; hlt
            let mut guest = Guest::new(&[0x70 + number, 1, 0xf4, 0x90, 0xf4]);
            guest.cpu.flags.set(STATUS, flags);
            guest.run();
            let is = |flag| flags & flag != 0;
            let base = match number / 2 {
                0 => is(OF),
                1 => is(CF),
                2 => is(ZF),
                3 => is(CF) || is(ZF),
                4 => is(SF),
                5 => is(PF),
                6 => is(SF) != is(OF),
                _ => is(ZF) || is(SF) != is(OF),
            };
            let taken = base != (number % 2 == 1);
            assert_eq!(guest.cpu.rip, CODE + if taken { 4 } else { 2 }, "condition {number}, flags {flags:#x}");
        }
    }
}

#[test]
fn segments_and_absolute_addresses() {
    // mov %gs:0x40,%rax (absolute disp32); mov %fs:8(%rbx),%ecx; incl %gs:0x48; hlt
    let code =
        [0x65, 0x48, 0x8b, 0x04, 0x25, 0x40, 0, 0, 0, 0x64, 0x8b, 0x4b, 8, 0x65, 0xff, 0x04, 0x25, 0x48, 0, 0, 0, 0xf4];
    let mut guest = Guest::new(&code);
    guest.cpu.bases = [0, DATA + 0x100, DATA, 0];
    guest.cpu.regs[RBX] = 0x10;
    guest.put(DATA + 0x40, &0x1234_5678_9abc_def0_u64.to_le_bytes());
    guest.put(DATA + 0x118, &[5, 0, 0, 0, 9]);
    assert_eq!(guest.run(), (3, End::Unsupported));
    assert_eq!((guest.cpu.regs[RAX], guest.cpu.regs[RCX]), (0x1234_5678_9abc_def0, 5));
    assert_eq!(guest.word(DATA + 0x48), 1);
}

/// Each of these ends the cluster before it: nothing has changed.
#[test]
fn what_is_not_interpreted_ends_the_cluster_before_it() {
    let instructions: [&[u8]; 22] = [
        &[0xf4],                               // hlt
        &[0xfb],                               // sti
        &[0x9d],                               // popf
        &[0xcf],                               // iret
        &[0x0f, 0xa2],                         // cpuid
        &[0x0f, 0x30],                         // wrmsr
        &[0x0f, 0x22, 0xd8],                   // mov %rax,%cr3
        &[0x0f, 0x23, 0xf8],                   // mov %rax,%dr7
        &[0x8e, 0xd0],                         // mov %eax,%ss
        &[0xf0, 0x39, 0x03],                   // lock cmp %eax,(%rbx), which is invalid
        &[0xf0, 0x0f, 0xc7, 0x0b],             // lock cmpxchg8b (%rbx)
        &[0xf3, 0xa4],                         // rep movsb
        &[0x6e],                               // outsb
        &[0xf7, 0xf1],                         // div %ecx
        &[0xcc],                               // int3
        &[0x0f, 0x0b],                         // ud2
        &[0x67, 0x8b, 0x03],                   // mov (%ebx),%eax
        &[0x67, 0x8b, 0x04, 0x25, 0, 0, 0, 0], // mov with a 32-bit absolute address
        &[0xca, 0, 0],                         // lret
        &[0x0f, 0x01, 0xf8],                   // swapgs
        &[0x0f, 0x01, 0x3b],                   // invlpg (%rbx)
        &[0x66, 0xe9, 0, 0, 0, 0],             // jmp with an operand-size prefix
    ];
    for bytes in instructions {
        let code: Vec<u8> = [0x90].iter().chain(bytes).copied().collect();
        let mut guest = Guest::new(&code);
        guest.cpu.regs[RBX] = DATA;
        let before = (guest.cpu.regs, guest.cpu.flags.get());
        assert_eq!(guest.run(), (1, End::Unsupported), "{bytes:x?}");
        assert_eq!(
            (guest.cpu.rip, guest.cpu.regs, guest.cpu.flags.get()),
            (CODE + 1, before.0, before.1),
            "{bytes:x?}"
        );
    }
}

#[test]
fn pages_that_would_fault_or_change_end_the_cluster() {
    // The 4-KiB page's entry, and whether it can be read and written.
    let cases = [
        (0x63_u64, true, true),
        (0x62, false, false),           // not present
        (0x61, true, false),            // read-only
        (0x67, true, true),             // user at this level only: a supervisor page
        (0x43, false, false),           // not accessed
        (0x23, true, false),            // not dirty
        (0x63 | 1 << 63, true, true),   // no-execute
        (0x63 | 1 << 40, false, false), // no memory there
    ];
    for (flags, readable, writable) in cases {
        for (write, works) in [(false, readable), (true, writable)] {
            // mov (%rbx),%eax or mov %eax,(%rbx); hlt
            let mut guest = Guest::new(&[if write { 0x89 } else { 0x8b }, 0x03, 0xf4]);
            guest.cpu.regs[RBX] = guest.map_small(DATA, flags);
            let (done, end) = guest.run();
            assert_eq!(done == 1, works, "{flags:#x} {write}: {end:?}");
            assert_eq!(matches!(end, End::Page | End::NoMemory), !works, "{flags:#x} {write}: {end:?}");
            assert_eq!(guest.cpu.rip, CODE + if works { 2 } else { 0 });
        }
    }
    let mut guest = Guest::new(&[0x8b, 0x03, 0xf4]);
    guest.cpu.regs[RBX] = guest.map_small(DATA, 0x67);
    guest.make_user();
    assert_eq!(guest.run(), (0, End::Page), "a user page");
    guest.cpu.regs[RBX] = 0x8000_0000_0000;
    assert_eq!(guest.run(), (0, End::Page), "not canonical");
}

#[test]
fn unaligned_accesses_and_ends_of_pages() {
    let mut guest = Guest::new(&[0x8b, 0x03, 0xf4]);
    guest.cpu.regs[RBX] = DATA + 2;
    assert_eq!(guest.run(), (0, End::Unaligned));
    guest.cpu.regs[RBX] = DATA + 0xffe;
    assert_eq!(guest.run(), (0, End::Unaligned));
    guest.cpu.regs[RBX] = DATA + 0xffc;
    assert_eq!(guest.run(), (1, End::Unsupported));
}

#[test]
fn code_that_writes_its_own_page_ends_and_changed_code_is_decoded_again() {
    // movb $0x40,5(%rbx); inc %eax; hlt
    let code = [0xc6, 0x43, 5, 0xc8, 0xff, 0xc0, 0xf4];
    let mut guest = Guest::new(&code);
    guest.cpu.regs[RBX] = CODE;
    assert_eq!(guest.run(), (0, End::OwnCode));
    // Another vCPU writes the code: inc becomes dec.
    guest.cpu.regs[RBX] = DATA;
    assert_eq!(guest.run(), (2, End::Unsupported));
    assert_eq!(guest.cpu.regs[RAX], 1);
    guest.put(CODE + 5, &[0xc8]);
    guest.cpu.rip = CODE;
    assert_eq!(guest.run(), (2, End::Unsupported));
    assert_eq!(guest.cpu.regs[RAX], 0);
}

/// Blocks are compared with memory once a cluster, so a write to any page of which code was run must end it.
#[test]
fn a_write_to_a_page_whose_code_was_run_ends_the_cluster() {
    let target = CODE + 0x3000;
    // mov %al,(%rbx); call *%rcx; mov %al,(%rbx); hlt
    let code = [0x88, 0x03, 0xff, 0xd1, 0x88, 0x03, 0xf4];
    let mut guest = Guest::new(&code);
    // ret. The first write makes the page's translation writable, before its code is run.
    guest.put(target, &[0xc3]);
    (guest.cpu.regs[RAX], guest.cpu.regs[RBX], guest.cpu.regs[RCX]) = (0xf4, target + 8, target);
    assert_eq!(guest.run(), (3, End::OwnCode));
    assert_eq!(guest.cpu.rip, CODE + 4, "before the second write");
    // A write before the page's code is run is seen: it runs into the HLT that is written over RET.
    (guest.cpu.rip, guest.cpu.regs[RBX], guest.cpu.regs[4]) = (CODE, target, STACK);
    assert_eq!(guest.run(), (2, End::Unsupported));
    assert_eq!(guest.cpu.rip, target);
}

/// More pages of code than are kept: a page that is forgotten may be written to, and its code is compared again.
#[test]
fn code_that_is_changed_after_its_page_was_forgotten_is_decoded_again() {
    let (first, other) = (CODE + 0x1000, CODE + 0x41000);
    // call *%rcx; call *%rsi; mov %al,(%rcx); call *%rcx; hlt
    let mut guest = Guest::new(&[0xff, 0xd1, 0xff, 0xd6, 0x88, 0x01, 0xff, 0xd1, 0xf4]);
    guest.put(first, &[0xc3]);
    guest.put(other, &[0xc3]);
    // 64 pages lie between the two: they have the same place among the translations.
    (guest.cpu.regs[RAX], guest.cpu.regs[RCX], guest.cpu.regs[RSI]) = (0xf4, first, other);
    assert_eq!(guest.run(), (6, End::Unsupported));
    assert_eq!(guest.cpu.rip, first, "before the HLT that replaced RET");
}

#[test]
fn a_page_table_changed_by_the_guest_counts_from_the_next_cluster() {
    let mut guest = Guest::new(&[0x8b, 0x03, 0xf4]);
    guest.cpu.regs[RBX] = guest.map_small(DATA, 0x63);
    guest.put(DATA, &[7, 0, 0, 0]);
    assert_eq!(guest.run(), (1, End::Unsupported));
    assert_eq!(guest.cpu.regs[RAX], 7);
    guest.cpu.regs[RBX] = guest.map_small(DATA + 0x1000, 0x63);
    guest.put(DATA + 0x1000, &[9, 0, 0, 0]);
    guest.cpu.rip = CODE;
    assert_eq!(guest.run(), (1, End::Unsupported));
    assert_eq!(guest.cpu.regs[RAX], 9);
}

#[test]
fn an_interrupt_ends_the_cluster_behind_the_access_if_the_guest_takes_it() {
    for (flags, end, done) in [(IF, End::Interrupt, 1), (0, End::Unsupported, 2)] {
        // out %al,(%dx); nop; hlt
        let mut guest = Guest::new(&[0xee, 0x90, 0xf4]);
        guest.ports.raises = true;
        guest.cpu.flags.set(IF, flags);
        assert_eq!(guest.run(), (done, end));
        assert_eq!(guest.cpu.rip, CODE + done);
    }
    let mut guest = Guest::new(&[0xee, 0xf4]);
    guest.ports.absent = true;
    assert_eq!(guest.run(), (0, End::Port));
}

#[test]
fn a_loop_without_an_end_is_left() {
    // jmp .
    let mut guest = Guest::new(&[0xeb, 0xfe]);
    let (done, end) = guest.run();
    assert!(end == End::Instructions && (4096..4096 + 512).contains(&done), "{done} {end:?}");
    let mut guest = Guest::new(&[0xeb, 0xfe]);
    guest.ports.late = true;
    let (done, end) = guest.run();
    assert!(end == End::Time && done < 512, "{done} {end:?}");
}

#[test]
fn cld_clears_its_flag_and_cli_is_left_to_the_processor_where_if_is_set() {
    // cld; cli; hlt
    for (interrupts, done) in [(0, 2), (IF, 1)] {
        let mut guest = Guest::new(&[0xfc, 0xfa, 0xf4]);
        guest.cpu.flags.set(DF | IF | STATUS, DF | interrupts | AF);
        assert_eq!(guest.run(), (done, End::Unsupported));
        assert_eq!(guest.cpu.flags.get() & (DF | IF | STATUS), interrupts | AF);
        assert_eq!(guest.cpu.rip, CODE + done);
    }
}

#[test]
fn a_block_may_end_with_its_page() {
    let mut guest = Guest::new(&[]);
    guest.put(CODE + 0xffe, &[0x90, 0x90, 0x90, 0xf4]);
    guest.cpu.rip = CODE + 0xffe;
    assert_eq!(guest.run(), (3, End::Unsupported));
}

#[test]
fn an_instruction_may_lie_across_two_pages() {
    // nop; mov %ebx,%eax; hlt
    let mut guest = Guest::new(&[]);
    guest.put(CODE + 0xffe, &[0x90, 0x89, 0xd8, 0xf4]);
    guest.cpu.regs[RBX] = 7;
    for value in [7, 9] {
        guest.cpu.regs[RBX] = value;
        guest.cpu.rip = CODE + 0xffe;
        assert_eq!(guest.run(), (2, End::Unsupported));
        assert_eq!((guest.cpu.rip, guest.cpu.regs[RAX]), (CODE + 0x1001, value));
    }
    // The second byte is changed: mov %ebx,%ecx.
    guest.put(CODE + 0x1000, &[0xd9]);
    guest.cpu.rip = CODE + 0xffe;
    assert_eq!(guest.run(), (2, End::Unsupported));
    assert_eq!(guest.cpu.regs[RCX], 9);
    // A write to the second page ends the cluster: mov %eax,(%rbx).
    guest.put(CODE + 0xfff, &[0x89, 0x03, 0xf4]);
    for (address, end) in
        [(CODE + 0x1800, End::OwnCode), (CODE + 0x800, End::OwnCode), (CODE + 0x2000, End::Unsupported)]
    {
        guest.cpu.regs[RBX] = address;
        guest.cpu.rip = CODE + 0xfff;
        assert_eq!(guest.run().1, end, "{address:#x}");
    }
}

/// Arbitrary bytes as code: the interpreter comes back, and never writes where the guest could not.
#[test]
fn arbitrary_code_comes_back() {
    let mut random = native::Random(0x1234_5678_9abc_def1);
    for _ in 0..3_000 {
        let code: Vec<u8> = (0..64).map(|_| random.next().to_le_bytes()[3]).collect();
        let mut guest = Guest::new(&code);
        guest.cpu.regs[..16].iter_mut().for_each(|register| *register = DATA + random.next() % 0x1000);
        guest.cpu.regs[RSI] = random.next();
        let (done, _) = guest.run();
        assert!(done < 4096 + 512);
    }
}

/// The corpus of the fuzz target, and mutations of it.
#[test]
fn the_fuzz_corpus_and_mutations_of_it_come_back() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/cluster");
    let mut random = native::Random(0x0bad_cafe_dead_beef);
    let mut files = 0;
    for entry in std::fs::read_dir(folder).expect("the corpus") {
        let bytes = std::fs::read(entry.expect("an entry").path()).expect("readable");
        run_bytes(&bytes);
        for _ in 0..200 {
            let mut mutated = bytes.clone();
            for _ in 0..=random.next() % 8 {
                let at = usize::try_from(random.next() % mutated.len() as u64).expect("small");
                mutated[at] = random.next().to_le_bytes()[3];
            }
            run_bytes(&mutated);
        }
        files += 1;
    }
    assert!(files >= 3, "{files}");
}

/// Two processors add to one word: none of the additions is lost.
#[test]
fn locked_instructions_are_atomic() {
    const TIMES: u64 = 20_000;
    // 1: lock incl (%rbx); lock xadd %eax,4(%rbx); dec %ecx; jnz 1b; hlt, and %eax is 1 each time.
    let code = [0xf0, 0xff, 0x03, 0xb8, 1, 0, 0, 0, 0xf0, 0x0f, 0xc1, 0x43, 4, 0xff, 0xc9, 0x75, 0xef, 0xf4];
    let mut guest = Guest::new(&code);
    let ram = guest.ram.clone();
    let other = std::thread::spawn(move || {
        let page = ram.page(DATA).expect("memory");
        for _ in 0..TIMES {
            for offset in [0, 4] {
                let mut old = page.load(offset, 2).expect("aligned");
                loop {
                    let found = page.compare_exchange(offset, 2, old, old + 1).expect("aligned");
                    if found == old {
                        break;
                    }
                    old = found;
                }
            }
        }
    });
    (guest.cpu.regs[RBX], guest.cpu.regs[RCX]) = (DATA, TIMES);
    while !matches!(guest.run().1, End::Unsupported) {}
    other.join().expect("no panic");
    assert_eq!(guest.word(DATA), (2 * TIMES) << 32 | (2 * TIMES));
}

#[test]
fn a_cluster_without_accesses_is_left_early() {
    // jmp .
    let mut guest = Guest::new(&[0xeb, 0xfe]);
    guest.limits.alone = 256;
    let (done, end) = guest.run();
    assert!(end == End::NoAccess && (256..256 + 128).contains(&done), "{done} {end:?}");
    // 1: in (%dx),%al; jmp 1b
    let mut guest = Guest::new(&[0xec, 0xeb, 0xfd]);
    guest.limits.alone = 256;
    assert_eq!(guest.run().1, End::Instructions);
}

/// Pages that have the same place among the translations are not translated each time.
#[test]
fn pages_in_turn_are_translated_once() {
    // 1: mov (%rbx),%eax; mov %eax,(%rsi); mov %eax,(%rdi); dec %ecx; jnz 1b; hlt
    let code = [0x8b, 0x03, 0x89, 0x06, 0x89, 0x07, 0xff, 0xc9, 0x75, 0xf6, 0xf4];
    let mut guest = Guest::new(&code);
    (guest.cpu.regs[RBX], guest.cpu.regs[RSI], guest.cpu.regs[RCX]) = (DATA, DATA + 0x10_0000, 100);
    guest.cpu.regs[7] = DATA + 0x20_0000;
    assert_eq!(guest.run(), (500, End::Unsupported));
    assert_eq!(guest.walks, 4, "of the code, and of three pages");
}

/// A translation that is kept aside is no way around the watch on pages of code.
#[test]
fn a_write_to_code_by_a_translation_kept_aside_ends_the_cluster() {
    let target = CODE + 0x3000;
    // mov %al,8(%rcx); mov %al,(%rsi); call *%rcx; mov %al,8(%rcx); hlt: the second write has the same place as the first.
    let mut guest = Guest::new(&[0x88, 0x41, 8, 0x88, 0x06, 0xff, 0xd1, 0x88, 0x41, 8, 0xf4]);
    guest.put(target, &[0xc3]);
    (guest.cpu.regs[RCX], guest.cpu.regs[RSI]) = (target, target + 0x10_0000);
    assert_eq!(guest.run(), (4, End::OwnCode));
}
