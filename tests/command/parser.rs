//! The process that reads foreign files: what becomes of a command when it crashes, does not end, or does what it must not.

use super::harness::{Outcome, Test};
use super::{file, folder, hwvmm, text};
use hwvmm::boot::unpack::{Content, Job, Limits, UnpackError};
use hwvmm::sandbox::{ConfinedError, Isolation, Mode, confined};
use hwvmm_arch::boot::FileRange;
use rustix::process::{Pid, WaitOptions, waitpid};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const LIMITS: hwvmm::sandbox::Limits = hwvmm::sandbox::Limits {
    memory_bytes: 64 << 20,
    cpu: Duration::from_secs(5),
    wall: Duration::from_secs(10),
    file_bytes: 1 << 20,
    answer_bytes: 1000,
};

/// Runs a job as this process, which has one thread, would.
fn run(mode: Mode, limits: &hwvmm::sandbox::Limits, job: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, ConfinedError> {
    let result = confined(Isolation::Process(mode), limits, &[], job);
    assert!(waitpid(None::<Pid>, WaitOptions::NOHANG).is_err(), "a process is left");
    result
}

fn an_answer_comes_back_whole() -> Outcome {
    for mode in [Mode::On, Mode::Log, Mode::Off] {
        for length in [0, 1, 1000] {
            let answer = run(mode, &LIMITS, || vec![7; length]).expect("an answer");
            assert_eq!(answer, vec![7; length], "{mode:?}");
        }
        let error = run(mode, &LIMITS, || vec![7; 1001]).expect_err("too long");
        assert!(error.to_string().contains("more than 1000 bytes"), "{error}");
    }
    let large = hwvmm::sandbox::Limits { answer_bytes: 1 << 20, ..LIMITS };
    assert_eq!(run(Mode::On, &large, || vec![9; 1 << 20]).expect("an answer"), vec![9; 1 << 20]);
    Outcome::Passed
}

/// The limits hold without filters, too.
fn limits_hold_without_filters() -> Outcome {
    for mode in [Mode::On, Mode::Off] {
        let memory = run(mode, &LIMITS, || vec![1; 256 << 20]).expect_err("too much").to_string();
        assert!(memory.contains(": memory allocation of 268435456 bytes failed"), "{memory}");
    }
    let start = Instant::now();
    let late = hwvmm::sandbox::Limits { wall: Duration::from_millis(300), ..LIMITS };
    let sleep = || {
        std::thread::sleep(Duration::from_secs(60));
        Vec::new()
    };
    let error = run(Mode::Off, &late, sleep).expect_err("late").to_string();
    assert!(error.contains("did not end within 0.3 s, and was killed"), "{error}");
    let error = run(Mode::On, &late, sleep).expect_err("refused").to_string();
    assert!(error.contains("SIGSYS: its thread parser called clock_nanosleep"), "{error}");
    let cpu = hwvmm::sandbox::Limits { cpu: Duration::from_secs(1), ..LIMITS };
    #[allow(clippy::empty_loop, reason = "it is to end at its limit")]
    let error = run(Mode::Off, &cpu, || loop {}).expect_err("spins").to_string();
    assert!(error.contains("more than 1 s of CPU time"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    Outcome::Passed
}

/// It has the files that it is given, and no others.
fn other_files_are_closed() -> Outcome {
    let (given, other) = (File::open("/etc/passwd").expect("open"), File::open("/etc/hostname").expect("open"));
    let read = |file: &File| u8::from(file.read_at(&mut [0], 0).is_ok());
    let job = || vec![read(&given), read(&other)];
    let answer = confined(Isolation::Process(Mode::On), &LIMITS, &[given.as_fd()], job).expect("an answer");
    assert_eq!(answer, [1, 0]);
    assert!(other.read_at(&mut [0], 0).is_ok(), "this process keeps it");
    Outcome::Passed
}

fn a_process_with_threads_does_not_fork() -> Outcome {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || stopped.recv().is_ok());
    let error = confined(Isolation::Process(Mode::On), &LIMITS, &[], Vec::new).expect_err("refused");
    assert!(error.to_string().contains("hwvmm has 2 threads already"), "{error}");
    drop(stop);
    thread.join().expect("no panic");
    // The kernel forgets a thread a moment after it has ended.
    std::thread::sleep(Duration::from_millis(100));
    Outcome::Passed
}

fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let packed = lz4_flex::block::compress(data);
    let size = u32::try_from(packed.len()).expect("small").to_le_bytes();
    [b"\x02\x21\x4c\x18".as_slice(), &size, &packed].concat()
}

fn lzop(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x89LZO\0\r\n\x1a\n\x10\x30\x20\x80\x09\x40\x01\x09".to_vec();
    out.extend([0; 4 + 12 + 1 + 4]);
    for block in data.chunks(256 << 10) {
        let packed = lzokay::compress::compress(block).expect("compresses");
        for size in [block.len(), packed.len()] {
            out.extend(u32::try_from(size).expect("small").to_be_bytes());
        }
        out.extend(packed);
    }
    out.extend([0; 4]);
    out
}

fn xz(data: &[u8], stream: liblzma::stream::Stream) -> Vec<u8> {
    let mut out = Vec::new();
    liblzma::read::XzEncoder::new_stream(data, stream).read_to_end(&mut out).expect("compresses");
    out
}

/// No decompressor needs more than the process may do.
fn every_compression_is_unpacked_by_the_process() -> Outcome {
    use liblzma::stream::{Check, LzmaOptions, Stream};
    let data: Vec<u8> = (0..400_000_u32).flat_map(|number| (number / 7).to_le_bytes()).collect();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&data).expect("compresses");
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&data).expect("compresses");
    let lzma = LzmaOptions::new_preset(1).expect("a preset");
    for (name, packed) in [
        ("gzip", gzip.finish().expect("compresses")),
        ("bzip2", bzip2.finish().expect("compresses")),
        ("xz", xz(&data, Stream::new_easy_encoder(1, Check::Crc32).expect("an encoder"))),
        ("lzma", xz(&data, Stream::new_lzma_encoder(&lzma).expect("an encoder"))),
        ("zstd", zstd::encode_all(data.as_slice(), 1).expect("compresses")),
        ("lz4", lz4_legacy(&data)),
        ("lzo", lzop(&data)),
    ] {
        let packed_file = tempfile::tempfile().expect("a file");
        packed_file.write_all_at(&packed, 0).expect("written");
        let out = tempfile::tempfile().expect("a file");
        let range = FileRange { offset: 0, bytes: packed.len() as u64 };
        let job = Job { range, content: Content::Parts, limits: Limits::of(64 << 20) };
        let bytes = job.run_confined(&packed_file, &out, Isolation::Process(Mode::On));
        assert_eq!(bytes.map_err(|error| format!("{error:?}")), Ok(data.len() as u64), "{name}");
        let mut found = vec![0; data.len()];
        out.read_exact_at(&mut found, 0).expect("readable");
        assert!(found == data, "{name}");
        let small = Job { limits: Limits { output_bytes: 1000, ..job.limits }, ..job };
        let error = small.run_confined(&packed_file, &out, Isolation::Process(Mode::On)).expect_err("too large");
        assert!(matches!(error, UnpackError::Limit(_)), "{name}: {error:?}");
        let cut = Job { range: FileRange { bytes: range.bytes / 2, ..range }, ..job };
        let error = cut.run_confined(&packed_file, &out, Isolation::Process(Mode::On)).expect_err("cut off");
        assert!(error.to_string().contains("damaged or cut off"), "{name}: {error:?}");
    }
    Outcome::Passed
}

fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/kernel_file").join(name)
}

fn unpack_writes_what_is_in_a_bzimage() -> Outcome {
    let [a, b] = ["gzip", "xz"].map(|kind| {
        let out = folder().join(format!("unpacked-{kind}"));
        let status = hwvmm().arg("unpack").arg(corpus(&format!("bzimage-{kind}"))).arg("-o").arg(&out).status();
        assert!(status.expect("started").success(), "{kind}");
        fs::read(out).expect("written")
    });
    assert!(a == b && a.starts_with(b"\x7fELF"));
    Outcome::Passed
}

fn a_file_that_cannot_be_unpacked_keeps_its_error() -> Outcome {
    let mut bytes = fs::read(corpus("bzimage-xz")).expect("readable");
    let end = bytes.len() - 100;
    bytes[end..].fill(0xa5);
    let path = file("damaged", &bytes);
    let out = hwvmm().arg("unpack").arg(path).arg("-o").arg(folder().join("none")).output().expect("started");
    let errors = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{errors}");
    assert!(errors.contains("cannot be unpacked: its xz data are damaged or cut off"), "{errors}");
    Outcome::Passed
}

/// Faults that hwvmm injects into itself: not in release builds.
#[cfg(any(debug_assertions, feature = "fault-injection"))]
mod faults {
    use super::super::fat::fat;
    use super::super::{file, folder, guests, hwvmm, kernel, text, when_it_runs};
    use super::{Outcome, corpus};
    use std::path::PathBuf;
    use std::process::Output;

    /// The faults, and what is said of them.
    const FAULTS: [(&str, &str); 8] = [
        ("open", "it was ended by SIGSYS: its thread parser called openat (257), which its sandbox does not permit"),
        ("exec", "it was ended by SIGSYS: its thread parser called execve (59), which its sandbox does not permit"),
        ("abort", "it was ended by SIGABRT"),
        ("panic", "it panicked: panicked at src/sandbox/fault.rs"),
        ("alloc", "it was ended by SIGABRT: memory allocation of 8589934592 bytes failed"),
        ("spin", "it took more than 1 s of CPU time, and was ended (SIGXCPU)"),
        ("write", "bytes, and was ended (SIGXFSZ)"),
        ("answer", "it answered with more than 4096 bytes, and was killed"),
    ];

    fn unpack(fault: &str) -> Output {
        let out = folder().join("not-unpacked");
        let mut hwvmm = hwvmm();
        hwvmm.arg("unpack").arg(corpus("bzimage-gzip")).arg("-o").arg(&out).env("HWVMM_FAULT", fault);
        let output = hwvmm.output().expect("started");
        assert!(!out.exists());
        output
    }

    pub(super) fn a_fault_of_the_process_is_an_error_with_a_name() -> Outcome {
        for (fault, said) in FAULTS {
            let out = unpack(&format!("Parser:{fault}"));
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(1), "{fault}: {errors}");
            let whole = "bzimage-gzip cannot be unpacked: the process that unpacks it failed: it ";
            assert!(errors.contains(whole) && errors.contains(said), "{fault}: {errors}");
            assert!(errors.contains("do not trust the file") && !errors.contains('\x1b'), "{fault}: {errors}");
            assert_eq!(errors.lines().count(), 1, "{errors}");
        }
        Outcome::Passed
    }

    fn run(fault: &str, options: &[&str]) -> String {
        let mut hwvmm = hwvmm();
        hwvmm.args(["run", "-m", "64M", "--timeout", "5s", "--kernel-cache", "off"]).args(options);
        hwvmm.arg(corpus("bzimage-gzip")).env("HWVMM_FAULT", fault).env("HWVMM_ANY_KVM", "1");
        text(&hwvmm.output().expect("started").stderr)
    }

    pub(super) fn a_profile_goes_without_names_where_the_process_fails() -> Outcome {
        when_it_runs(|| {
            let map = file("map", b"ffffffff81000000 T _text\nffffffff81000100 T entry_SYSCALL_64\n");
            let kernel = kernel("unnamed", guests::power_off());
            let run = |fault: &str| {
                let mut hwvmm = hwvmm();
                hwvmm
                    .args(["run", "-m", "16M", "--timeout", "60s", "--profile=user", "--symbols"])
                    .arg(&map)
                    .arg(&kernel);
                let out = hwvmm.env("HWVMM_FAULT", fault).output().expect("started");
                assert_eq!(out.status.code(), Some(0), "{out:?}");
                // The report breaks its lines.
                text(&out.stderr).split_whitespace().collect::<Vec<_>>().join(" ")
            };
            assert!(run("").contains("2 symbols of a System.map"), "{}", run(""));
            for (fault, said) in FAULTS.into_iter().filter(|(fault, _)| !["write", "answer"].contains(fault)) {
                let errors = run(&format!("Parser:{fault}"));
                assert!(
                    errors.contains(&format!(
                        "cannot read the symbols of {}: the process that reads them failed: it",
                        map.display()
                    )),
                    "{fault}: {errors}"
                );
                assert!(errors.contains(said), "{fault}: {errors}");
            }
        })
    }

    /// The smallest qcow2 image: header, refcount table, refcount block, L1 table.
    fn qcow2(name: &str) -> PathBuf {
        let mut bytes = vec![0_u8; 4 * 4096];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let numbers: [(usize, u64, usize); 10] = [
            (20, 12, 4),
            (24, 1 << 20, 8),
            (36, 1, 4),
            (40, 3 * 4096, 8),
            (48, 4096, 8),
            (56, 1, 4),
            (96, 4, 4),
            (100, 104, 4),
            (4096, 2 * 4096, 8),
            (2 * 4096, 0x0001_0001_0001_0001, 8),
        ];
        for (at, value, width) in numbers {
            bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
        file(name, &bytes)
    }

    pub(super) fn a_qcow2_image_is_checked_by_the_process() -> Outcome {
        when_it_runs(|| {
            let disks = ["one.qcow2", "two.qcow2"].map(qcow2);
            let kernel = kernel("disks", guests::power_off());
            let run = |fault: &str, mode: &str| {
                let mut hwvmm = hwvmm();
                hwvmm.args(["run", "-m", "16M", "--timeout", "60s", "--sandbox", mode]);
                for disk in &disks {
                    hwvmm.arg("--disk").arg(disk);
                }
                let out = hwvmm.arg(&kernel).env("HWVMM_FAULT", fault).output().expect("started");
                (out.status.code(), text(&out.stderr))
            };
            for mode in ["on", "log", "off"] {
                let (status, errors) = run("", mode);
                assert_eq!(status, Some(0), "{mode}: {errors}");
                assert!(!errors.contains("sandbox:"), "{mode}: {errors}");
            }
            for (fault, said) in FAULTS.into_iter().filter(|(fault, _)| *fault != "write") {
                let (status, errors) = run(&format!("Parser:{fault}"), "on");
                assert_eq!(status, Some(42), "{fault}: {errors}");
                let said = if fault == "answer" { "it answered with more than 8192 bytes" } else { said };
                assert!(
                    errors.contains("the process that reads its header and tables failed: it "),
                    "{fault}: {errors}"
                );
                assert!(errors.contains("one.qcow2") && errors.contains(said), "{fault}: {errors}");
            }
            // It has the image for reading only.
            assert_eq!(run("Parser:write", "on").0, Some(0));
            let mut bytes = std::fs::read(&disks[1]).expect("readable");
            bytes[2 * 4096..2 * 4096 + 8].fill(0);
            std::fs::write(&disks[1], bytes).expect("written");
            let (status, errors) = run("", "on");
            assert_eq!(status, Some(42), "{errors}");
            assert!(errors.contains("two.qcow2") && errors.contains("reference count of 0"), "{errors}");
        })
    }

    pub(super) fn file_systems_of_an_image_are_read_by_the_process() -> Outcome {
        when_it_runs(|| {
            let entry: (&str, &[u8]) = ("/loader/entries/a.conf", b"title A\nlinux /linux\n");
            let disk = fat(2 << 20, &[entry, ("/linux", &guests::multiboot(guests::power_off()))]);
            let image = file("faults.img", &disk);
            let run = |fault: &str, mode: &str| {
                let mut hwvmm = hwvmm();
                hwvmm.args(["run", "-m", "16M", "--timeout", "60s", "--sandbox", mode]).arg(&image);
                let out = hwvmm.env("HWVMM_FAULT", fault).output().expect("started");
                (out.status.code(), text(&out.stderr))
            };
            for mode in ["on", "log", "off"] {
                let (status, errors) = run("", mode);
                assert_eq!(status, Some(0), "{mode}: {errors}");
                assert!(!errors.contains("sandbox:"), "{mode}: {errors}");
            }
            // It may take a minute of CPU time, and write 512 MiB: what spins or writes is left out.
            for (fault, said) in FAULTS.into_iter().filter(|(fault, _)| !["spin", "write"].contains(fault)) {
                let (status, errors) = run(&format!("Parser:{fault}"), "on");
                assert_eq!(status, Some(42), "{fault}: {errors}");
                let said = if fault == "answer" { "it answered with more than 1048576 bytes" } else { said };
                assert!(errors.contains("faults.img: its file systems were not read: it "), "{fault}: {errors}");
                assert!(errors.contains(said) && !errors.contains('\x1b'), "{fault}: {errors}");
            }
            assert!(std::fs::read(&image).expect("readable") == disk, "the guest has written nothing");
        })
    }

    pub(super) fn a_run_leaves_the_file_to_the_guest() -> Outcome {
        when_it_runs(|| {
            let left = "bzimage-gzip cannot be unpacked here (the process that unpacks it failed: it was ended by SIG";
            for fault in ["Parser:abort", "Parser:open"] {
                let errors = run(fault, &[]);
                assert!(errors.contains(left) && errors.contains("the guest unpacks it itself"), "{fault}: {errors}");
            }
            for mode in ["log", "off"] {
                let errors = run("Parser:open", &["--sandbox", mode]);
                assert!(!errors.contains("cannot be unpacked"), "{mode}: {errors}");
                let told = errors.contains("thread parser called openat (257): --sandbox=on refuses that");
                assert_eq!(told, mode == "log", "{mode}: {errors}");
            }
            let errors = run("Parser:spin", &["--sandbox", "off"]);
            assert!(errors.contains("it took more than 1 s of CPU time"), "{errors}");
        })
    }
}

pub(crate) const TESTS: &[Test] = &[
    ("an_answer_comes_back_whole", an_answer_comes_back_whole),
    ("limits_hold_without_filters", limits_hold_without_filters),
    ("other_files_are_closed", other_files_are_closed),
    ("a_process_with_threads_does_not_fork", a_process_with_threads_does_not_fork),
    ("every_compression_is_unpacked_by_the_process", every_compression_is_unpacked_by_the_process),
    ("unpack_writes_what_is_in_a_bzimage", unpack_writes_what_is_in_a_bzimage),
    ("a_file_that_cannot_be_unpacked_keeps_its_error", a_file_that_cannot_be_unpacked_keeps_its_error),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_fault_of_the_process_is_an_error_with_a_name", faults::a_fault_of_the_process_is_an_error_with_a_name),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_run_leaves_the_file_to_the_guest", faults::a_run_leaves_the_file_to_the_guest),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_qcow2_image_is_checked_by_the_process", faults::a_qcow2_image_is_checked_by_the_process),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("file_systems_of_an_image_are_read_by_the_process", faults::file_systems_of_an_image_are_read_by_the_process),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    (
        "a_profile_goes_without_names_where_the_process_fails",
        faults::a_profile_goes_without_names_where_the_process_fails,
    ),
];
