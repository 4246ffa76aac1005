//! Instructions in random states, by the processor itself and by the interpreter: registers, flags and memory must be the same.
//!
//! The processor runs each instruction in this process: it is put between code that loads the registers and code that stores them.
//! Instructions are made from a table of opcodes that change registers, flags and one page at a fixed address only.

use super::super::flags::{AF, CF, OF, PF, SF, STATUS, ZF};
use super::guest::{BYTES, CODE, DATA, Guest};
use vm_memory::{Bytes, GuestAddress};

/// xorshift64*.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[4]
    }

    /// Values at the edges of the widths, and others.
    fn value(&mut self) -> u64 {
        let edge = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, u64::MAX >> 1, 1 << 63, u64::MAX];
        match self.next() % 4 {
            0 => edge[usize::from(self.byte()) % edge.len()],
            1 => self.next() & 0xff,
            _ => self.next(),
        }
    }
}

/// An opcode with a ModRM byte.
struct Opcode {
    bytes: &'static [u8],
    /// The values of ModRM.reg; empty for all.
    extensions: &'static [u8],
    immediate: Immediate,
    /// Flags that the instruction leaves undefined.
    undefined: u64,
    memory: bool,
    registers: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Immediate {
    None,
    Byte,
    /// Two bytes with an operand-size prefix, else four.
    Word,
}

const fn of(bytes: &'static [u8], extensions: &'static [u8], immediate: Immediate, undefined: u64) -> Opcode {
    Opcode { bytes, extensions, immediate, undefined, memory: true, registers: true }
}

/// With memory only, with or without LOCK.
const fn locked(bytes: &'static [u8], extensions: &'static [u8], immediate: Immediate, undefined: u64) -> Opcode {
    Opcode { bytes, extensions, immediate, undefined, memory: true, registers: false }
}

const fn registers(bytes: &'static [u8], extensions: &'static [u8], immediate: Immediate, undefined: u64) -> Opcode {
    Opcode { bytes, extensions, immediate, undefined, memory: false, registers: true }
}

const SHIFTS: &[u8] = &[0, 1, 4, 5, 7];
const BITS: u64 = OF | SF | AF | PF;
const PRODUCT: u64 = SF | ZF | AF | PF;

#[allow(clippy::cast_possible_truncation, reason = "opcodes are bytes")]
fn opcodes() -> Vec<Opcode> {
    use Immediate::{Byte, None, Word};
    let mut all = vec![
        of(&[0x80], &[], Byte, AF),
        of(&[0x81], &[], Word, AF),
        of(&[0x83], &[], Byte, AF),
        of(&[0x84], &[], None, AF),
        of(&[0x85], &[], None, AF),
        registers(&[0x86], &[], None, 0),
        registers(&[0x87], &[], None, 0),
        locked(&[0x86], &[], None, 0),
        locked(&[0x87], &[], None, 0),
        locked(&[0x0f, 0xb0], &[], None, 0),
        locked(&[0x0f, 0xb1], &[], None, 0),
        locked(&[0x0f, 0xc0], &[], None, 0),
        locked(&[0x0f, 0xc1], &[], None, 0),
        registers(&[0x0f, 0xc0], &[], None, 0),
        registers(&[0x0f, 0xc1], &[], None, 0),
        locked(&[0x80], &[0, 1, 2, 3, 4, 5, 6], Byte, AF),
        locked(&[0x81], &[0, 1, 2, 3, 4, 5, 6], Word, AF),
        locked(&[0x83], &[0, 1, 2, 3, 4, 5, 6], Byte, AF),
        locked(&[0xf6], &[2, 3], None, 0),
        locked(&[0xf7], &[2, 3], None, 0),
        locked(&[0xfe], &[0, 1], None, 0),
        locked(&[0xff], &[0, 1], None, 0),
        locked(&[0x0f, 0xba], &[5, 6, 7], Byte, BITS),
        of(&[0x88], &[], None, 0),
        of(&[0x89], &[], None, 0),
        of(&[0x8a], &[], None, 0),
        of(&[0x8b], &[], None, 0),
        of(&[0xc6], &[0], Byte, 0),
        of(&[0xc7], &[0], Word, 0),
        of(&[0x63], &[], None, 0),
        of(&[0x0f, 0xb6], &[], None, 0),
        of(&[0x0f, 0xb7], &[], None, 0),
        of(&[0x0f, 0xbe], &[], None, 0),
        of(&[0x0f, 0xbf], &[], None, 0),
        of(&[0x0f, 0xaf], &[], None, PRODUCT),
        of(&[0x69], &[], Word, PRODUCT),
        of(&[0x6b], &[], Byte, PRODUCT),
        of(&[0xc0], SHIFTS, Byte, AF | OF),
        of(&[0xc1], SHIFTS, Byte, AF | OF),
        of(&[0xd0], SHIFTS, None, AF),
        of(&[0xd1], SHIFTS, None, AF),
        of(&[0xd2], SHIFTS, None, AF | OF),
        of(&[0xd3], SHIFTS, None, AF | OF),
        of(&[0xf6], &[0], Byte, AF),
        of(&[0xf7], &[0], Word, AF),
        of(&[0xf6], &[2, 3], None, 0),
        of(&[0xf7], &[2, 3], None, 0),
        registers(&[0xf6], &[4, 5], None, PRODUCT),
        registers(&[0xf7], &[4, 5], None, PRODUCT),
        of(&[0xfe], &[0, 1], None, 0),
        of(&[0xff], &[0, 1], None, 0),
        registers(&[0x0f, 0xa3], &[], None, BITS),
        registers(&[0x0f, 0xab], &[], None, BITS),
        registers(&[0x0f, 0xb3], &[], None, BITS),
        registers(&[0x0f, 0xbb], &[], None, BITS),
        of(&[0x0f, 0xba], &[4, 5, 6, 7], Byte, BITS),
    ];
    // The eight arithmetic operations, of registers and memory both ways.
    const ARITHMETIC: [u8; 32] = {
        let (mut bytes, mut at) = ([0; 32], 0);
        while at < 32 {
            bytes[at] = (at / 4 * 8 + at % 4) as u8;
            at += 1;
        }
        bytes
    };
    static ALL: [u8; 32] = ARITHMETIC;
    all.extend((0..32).map(|at| of(&ALL[at..=at], &[], None, AF)));
    // With memory as the destination, but for CMP.
    all.extend((0..28).filter(|at| at % 4 < 2).map(|at| locked(&ALL[at..=at], &[], None, AF)));
    // CMOVcc and SETcc.
    static CONDITIONAL: [[u8; 2]; 32] = {
        let (mut bytes, mut at) = ([[0x0f, 0]; 32], 0);
        while at < 32 {
            bytes[at][1] = if at < 16 { 0x40 + at as u8 } else { 0x80 + at as u8 };
            at += 1;
        }
        bytes
    };
    all.extend(CONDITIONAL.iter().map(|bytes| of(bytes, &[], None, 0)));
    all
}

/// An instruction and the flags that it leaves undefined.
fn instruction(opcode: &Opcode, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    let small = random.byte().is_multiple_of(4);
    if small {
        bytes.push(0x66);
    }
    if !opcode.registers && random.byte().is_multiple_of(2) {
        bytes.push(0xf0);
    }
    // REX: W, R, B; the index of an address is never extended.
    let rex = random.byte() & 0b1101;
    let has_rex = random.byte().is_multiple_of(2);
    let wide = has_rex && rex & 8 != 0;
    let memory = opcode.memory && (!opcode.registers || random.byte().is_multiple_of(2));
    if has_rex {
        bytes.push(0x40 | if memory { rex & !1 } else { rex });
    }
    bytes.extend(opcode.bytes);
    let field = if opcode.extensions.is_empty() {
        random.byte() % 8
    } else {
        opcode.extensions[usize::from(random.byte()) % opcode.extensions.len()]
    };
    // RSP is the stack's and stays: without REX, 4 of an 8-bit operand is AH.
    if memory {
        // disp32(%rbx)
        bytes.push(0x80 | field << 3 | 3);
        bytes.extend((u32::from(random.byte()) * 8).to_le_bytes());
    } else {
        bytes.push(0xc0 | field << 3 | (random.byte() % 8));
    }
    match opcode.immediate {
        Immediate::None => {}
        Immediate::Byte => bytes.push(random.byte()),
        Immediate::Word => {
            let count = if small && !wide { 2 } else { 4 };
            bytes.extend(&random.value().to_le_bytes()[..count]);
        }
    }
    bytes
}

/// Returns true if the instruction uses RSP, which the code around it needs.
fn uses_stack(bytes: &[u8]) -> bool {
    let mut decoder = iced_x86::Decoder::with_ip(64, bytes, CODE, iced_x86::DecoderOptions::NONE);
    let instruction = decoder.decode();
    (0..instruction.op_count()).any(|operand| {
        instruction.op_kind(operand) == iced_x86::OpKind::Register
            && instruction.op_register(operand).full_register() == iced_x86::Register::RSP
    }) || instruction.is_invalid()
        || instruction.len() != bytes.len()
}

/// The registers by number, then RFLAGS.
type State = [u64; 17];

/// Memory that can be written and run, and the page that instructions change.
struct Processor {
    code: *mut u8,
    data: *mut u8,
}

const CODE_BYTES: usize = 4096;
const DATA_BYTES: usize = 4096;

impl Processor {
    fn new() -> Option<Self> {
        let (private, fixed) = (
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
        );
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: two new mappings; MAP_FIXED_NOREPLACE replaces none.
        let (code, data) = unsafe {
            let anywhere = std::ptr::null_mut();
            let code = libc::mmap(anywhere, CODE_BYTES, writable | libc::PROT_EXEC, private, -1, 0);
            let at = std::ptr::without_provenance_mut(usize::try_from(DATA).expect("64 bits"));
            (code, libc::mmap(at, DATA_BYTES, writable, fixed, -1, 0))
        };
        let wanted = usize::try_from(DATA).expect("64 bits");
        (code != libc::MAP_FAILED && data.addr() == wanted).then_some(Self { code: code.cast(), data: data.cast() })
    }

    /// Runs one instruction in a state.
    fn run(&self, instruction: &[u8], state: &mut State) {
        let mut code = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x57]; // push of what is kept, then %rdi
        let access = |opcode: u8, register: u8| {
            let disp = (u32::from(register) * 8).to_le_bytes();
            [0x48 | register >> 3 << 2, opcode, 0x87 | (register & 7) << 3, disp[0], disp[1], disp[2], disp[3]]
        };
        let others = (0..16_u8).filter(|register| !matches!(register, 4 | 7));
        code.extend([0xff, 0xb7, 0x80, 0, 0, 0, 0x9d]); // pushq 128(%rdi); popfq
        others.clone().for_each(|register| code.extend(access(0x8b, register)));
        code.extend(access(0x8b, 7));
        code.extend(instruction);
        code.extend([0x57, 0x48, 0x8b, 0x7c, 0x24, 8]); // push %rdi; mov 8(%rsp),%rdi
        others.for_each(|register| code.extend(access(0x89, register)));
        code.extend([0x9c, 0x8f, 0x87, 0x80, 0, 0, 0]); // pushfq; popq 128(%rdi)
        code.push(0x58); // pop %rax
        code.extend([0x48, 0x89, 0x47, 0x38]); // mov %rax,56(%rdi)
        code.extend([0x5f, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        assert!(code.len() <= CODE_BYTES);
        // SAFETY: the code fits its mapping. It is a function of the C calling convention with one argument: it keeps the registers that
        // must be kept, leaves the stack as it was, and writes to `state` and to the page at DATA, which is mapped, only: `instruction` is
        // one of the table's, with registers other than RSP, and with memory at DATA by RBX.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.code, code.len());
            let function: extern "C" fn(*mut u64) = std::mem::transmute(self.code);
            function(state.as_mut_ptr());
        }
    }

    fn memory(&self) -> Vec<u8> {
        // SAFETY: the page is mapped and nothing else uses it.
        unsafe { std::slice::from_raw_parts(self.data, DATA_BYTES) }.to_vec()
    }

    fn set_memory(&self, bytes: &[u8]) {
        assert!(bytes.len() <= DATA_BYTES);
        // SAFETY: as above, and writable.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.data, bytes.len()) };
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        // SAFETY: both were mapped by `new`.
        unsafe {
            libc::munmap(self.code.cast(), CODE_BYTES);
            libc::munmap(self.data.cast(), DATA_BYTES);
        }
    }
}

fn compare(cases: u32, seed: u64) {
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(processor) = Processor::new() else {
        crate::skip::skipped("this process may not map executable memory, or memory at a low address");
        return;
    };
    const { assert!(DATA + 4096 <= BYTES) };
    let (mut random, opcodes) = (Random(seed), opcodes());
    let mut guest = Guest::new(&[]);
    let mut memory: Vec<u8> = (0..DATA_BYTES).map(|_| random.byte()).collect();
    let mut compared = 0;
    while compared < cases {
        let opcode = &opcodes[usize::from(random.byte()) % opcodes.len()];
        let bytes = instruction(opcode, &mut random);
        if uses_stack(&bytes) {
            continue;
        }
        let mut state: State = [0; 17];
        state.iter_mut().for_each(|register| *register = random.value());
        state[3] = DATA;
        // So that CMPXCHG is equal at times: the displacement comes last.
        if opcode.bytes[0] == 0x0f
            && opcode.bytes[1] & 0xfe == 0xb0
            && random.byte().is_multiple_of(2)
            && let Some(disp) = bytes.last_chunk().map(|disp| u32::from_le_bytes(*disp) as usize)
        {
            state[0] = u64::from_le_bytes(memory[disp..disp + 8].try_into().expect("8 bytes"));
        }
        state[16] = state[16] & STATUS | 0x202;
        guest.cpu.regs[..16].copy_from_slice(&state[..16]);
        guest.cpu.flags = super::super::flags::Flags::new(state[16]);
        guest.cpu.rip = CODE;
        guest.put(CODE, &bytes);
        guest.put(CODE + bytes.len() as u64, &[0xf4]);
        guest.put(DATA, &memory);
        processor.set_memory(&memory);
        let before = state;
        let (done, end) = guest.run();
        assert_eq!(done, 1, "{bytes:02x?} is not interpreted: {end:?}");
        processor.run(&bytes, &mut state);
        let mut mine: State = [0; 17];
        mine[..16].copy_from_slice(&guest.cpu.regs[..16]);
        mine[16] = guest.cpu.flags.get();
        let defined = !undefined(opcode, &bytes, before[1]);
        (mine[16], state[16]) = (mine[16] & defined, state[16] & defined);
        (mine[4], state[4]) = (0, 0);
        assert_eq!(mine, state, "{bytes:02x?} in {before:x?}: the interpreter's left, the processor's right");
        memory = processor.memory();
        let mut guests = vec![0; DATA_BYTES];
        guest.ram.get().read_slice(&mut guests, GuestAddress(DATA)).expect("memory");
        assert!(guests == memory, "{bytes:02x?} in {before:x?}: memory differs");
        compared += 1;
    }
}

/// The undefined flags; with a count of 0 a shift changes none, by 1 it defines OF.
fn undefined(opcode: &Opcode, bytes: &[u8], rcx: u64) -> u64 {
    let is_shift = matches!(opcode.bytes, [0xc0 | 0xc1 | 0xd2 | 0xd3]);
    if !is_shift {
        return opcode.undefined;
    }
    let count = if opcode.immediate == Immediate::Byte { bytes[bytes.len() - 1].into() } else { rcx & 0xff };
    match count & 0x1f {
        0 if count & 0x3f == 0 => 0,
        1 => AF,
        // A count beyond an operand of 8 or 16 bits leaves CF undefined.
        8.. => AF | OF | CF,
        _ => AF | OF,
    }
}

#[test]
fn the_interpreter_agrees_with_the_processor() {
    compare(30_000, 0x0123_4567_89ab_cdef);
}

/// `cargo test -p hwvmm --lib -- --ignored a_million`
#[test]
#[ignore = "takes a minute"]
fn a_million_cases_agree_with_the_processor() {
    compare(1_200_000, 0xfeed_5eed_0bad_cafe);
}
