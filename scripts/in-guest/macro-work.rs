//! The work of `scripts/paper --macro`: what the paper's larger programs did, each by itself. Built with rustc alone, statically,
//! so that it runs in an initramfs. Arguments: which, and how many. Prints `macro WHICH COUNT NANOSECONDS`.

use std::ffi::c_int;
use std::hint::black_box;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::time::Instant;

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(status: c_int) -> !;
    fn getppid() -> c_int;
    fn pipe(ends: *mut c_int) -> c_int;
    fn mmap(at: *mut u8, bytes: usize, access: c_int, flags: c_int, file: c_int, offset: i64) -> *mut u8;
    fn munmap(at: *mut u8, bytes: usize) -> c_int;
}

const PAGE: usize = 4096;
/// Pages that are touched between a mapping and its end.
const PAGES: usize = 256;
const PROT_READ_WRITE: c_int = 3;
const MAP_PRIVATE_ANONYMOUS: c_int = 0x22;

/// The paper's forkwait: a process is made and waited for, again and again.
fn forkwait(count: usize) {
    for _ in 0..count {
        // SAFETY: this process has one thread; the child does nothing but end.
        let pid = unsafe { fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            // SAFETY: ends the child at once, without what Rust would do at an end.
            unsafe { _exit(0) };
        }
        // SAFETY: no status is asked for.
        assert_eq!(unsafe { waitpid(pid, std::ptr::null_mut(), 0) }, pid);
    }
}

fn system_calls(count: usize) {
    for _ in 0..count {
        // SAFETY: it has no arguments, and cannot fail.
        black_box(unsafe { getppid() });
    }
}

fn two_pipes() -> [(std::fs::File, std::fs::File); 2] {
    [(); 2].map(|()| {
        let mut ends = [0; 2];
        // SAFETY: there is room for two descriptors, which no other thread uses.
        unsafe {
            assert_eq!(pipe(ends.as_mut_ptr()), 0, "pipe failed");
            (std::fs::File::from_raw_fd(ends[0]), std::fs::File::from_raw_fd(ends[1]))
        }
    })
}

/// Two processes hand a byte back and forth: two switches each time.
fn switches(count: usize) {
    let [(mut there, mut to), (mut back, mut from)] = two_pipes();
    let mut byte = [0];
    // SAFETY: as in forkwait; the child only reads and writes.
    let pid = unsafe { fork() };
    assert!(pid >= 0, "fork failed");
    for _ in 0..count {
        if pid == 0 {
            there.read_exact(&mut byte).expect("a byte");
            from.write_all(&byte).expect("room");
        } else {
            to.write_all(&byte).expect("room");
            back.read_exact(&mut byte).expect("a byte");
        }
    }
    if pid == 0 {
        // SAFETY: as in forkwait.
        unsafe { _exit(0) };
    }
    // SAFETY: as in forkwait.
    unsafe { waitpid(pid, std::ptr::null_mut(), 0) };
}

/// Memory is mapped, touched page by page, and given back.
fn faults(count: usize) {
    for _ in 0..count.div_ceil(PAGES) {
        // SAFETY: a new mapping at an address of the kernel's choice, written within its bounds and unmapped once.
        unsafe {
            let bytes = PAGES * PAGE;
            let at = mmap(std::ptr::null_mut(), bytes, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0);
            assert!(at.addr() != usize::MAX, "mmap failed");
            for page in 0..PAGES {
                at.add(page * PAGE).write_volatile(1);
            }
            assert_eq!(munmap(at, bytes), 0);
        }
    }
}

/// No system call, no fault: what a processor does by itself.
fn compute(count: usize) {
    let mut value = 1_u64;
    for step in 0..count as u64 {
        value = black_box(value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(step));
    }
}

/// A C program of a thousand small functions is compiled by tcc, from source to object file.
fn compile(count: usize) {
    let function = |number: usize| {
        format!(
            "struct s{number} {{ int a, b[4]; struct s{number} *next; }};\n\
             static int f{number}(struct s{number} *s, int n) {{\n    int i, sum = {number};\n    for (i = 0; i < n; i++) {{\n        \
             if (s->b[i & 3] > i * {number}) sum += s->a << (i & 7); else sum ^= s->b[(i + 1) & 3];\n        \
             s = s->next ? s->next : s;\n    }}\n    return sum;\n}}\n\
             int g{number}(void) {{ struct s{number} s = {{ {number}, {{ 1, 2, 3, 4 }}, 0 }}; return f{number}(&s, 100); }}\n"
        )
    };
    let source: String = (0..1000).map(function).collect();
    std::fs::write("/tmp/work.c", source).expect("room in /tmp");
    for _ in 0..count {
        let status = std::process::Command::new("tcc").args(["-c", "/tmp/work.c", "-o", "/tmp/work.o"]).status();
        assert!(status.expect("tcc").success(), "tcc failed");
        assert!(std::fs::metadata("/tmp/work.o").expect("an object file").len() > 100_000);
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let which = arguments.next().unwrap_or_default();
    let count = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(1000);
    let work = match which.as_str() {
        "forkwait" => forkwait,
        "syscalls" => system_calls,
        "switches" => switches,
        "faults" => faults,
        "compute" => compute,
        "compile" => compile,
        "nothing" => |_| {},
        _ => {
            eprintln!("macro: forkwait, syscalls, switches, faults, compute, compile or nothing, not '{which}'");
            std::process::exit(2);
        }
    };
    let start = Instant::now();
    work(count);
    println!("macro {which} {count} {}", start.elapsed().as_nanos());
}
