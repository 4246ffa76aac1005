//! The import rules. Cargo keeps `arch` and `devices` apart from each other and from KVM. These tests keep the modules (folders) of
//! the package `hwvmm` in order, and the files of all packages without a circle.

mod import_graph;

use import_graph::Graph;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// For each module, those it may import; lowest first.
const ALLOWED: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("escape", &[]),
    ("bounded_read", &[]),
    ("seqpacket", &[]),
    // Of tests only.
    ("skip", &[]),
    ("tune", &[]),
    ("config", &["bounded_read", "tune"]),
    ("memory", &[]),
    ("event_loop", &[]),
    ("sandbox", &["escape"]),
    ("kvm", &["memory"]),
    ("exit", &["escape", "kvm"]),
    ("measure", &["error", "exit", "kvm", "memory", "sandbox"]),
    ("cluster", &["exit", "kvm", "measure", "memory", "skip"]),
    ("vcpu", &["cluster", "error", "exit", "kvm", "measure", "sandbox"]),
    ("probe", &["error", "escape", "exit", "kvm", "memory"]),
    ("nano", &["escape", "exit", "kvm", "measure", "memory"]),
    ("boot", &["bounded_read", "config", "error", "escape", "memory", "sandbox", "skip"]),
    ("console", &["escape", "exit", "vcpu"]),
    ("logging", &["console", "escape", "seqpacket"]),
    // The state of a machine in a folder.
    ("snapshot", &["config", "error", "kvm", "memory"]),
    ("control", &["config", "exit", "kvm", "measure", "snapshot", "vcpu"]),
    (
        "machine",
        &[
            "boot",
            "bounded_read",
            "cluster",
            "config",
            "console",
            "control",
            "event_loop",
            "error",
            "escape",
            "exit",
            "kvm",
            "measure",
            "memory",
            "probe",
            "sandbox",
            "snapshot",
            "tune",
            "vcpu",
        ],
    ),
    ("profile", &["boot", "bounded_read", "config", "error", "escape", "exit", "kvm", "measure", "sandbox"]),
    (
        "supervise",
        &[
            "boot",
            "config",
            "console",
            "error",
            "escape",
            "exit",
            "kvm",
            "logging",
            "machine",
            "measure",
            "memory",
            "probe",
            "sandbox",
            "seqpacket",
            "snapshot",
        ],
    ),
    (
        "testing",
        &["bounded_read", "config", "console", "error", "escape", "exit", "memory", "probe", "profile", "tune"],
    ),
    (
        "cli",
        &[
            "boot",
            "bounded_read",
            "config",
            "console",
            "control",
            "error",
            "escape",
            "exit",
            "kvm",
            "logging",
            "machine",
            "measure",
            "nano",
            "probe",
            "profile",
            "sandbox",
            "snapshot",
            "supervise",
            "testing",
            "tune",
        ],
    ),
];

/// Only these may have `unsafe` in them.
const UNSAFE: &[&str] = &[
    "src/kvm/",
    "src/memory/",
    // The bytes of a guest that the assembler put between two labels.
    "src/nano/image.rs",
    // An ioctl of perf's that perf-event2 has no call for.
    "src/measure/tracer/output.rs",
    // fork(2), calls with flags that no crate passes, and a signal handler.
    "src/sandbox/fork.rs",
    "src/sandbox/sys.rs",
    "src/sandbox/trap.rs",
    // A test that runs generated instructions on the processor.
    "src/cluster/tests/native.rs",
    "tests/guests/",
    "devices/src/memory.rs",
    // io_uring entries and tap ioctls: no crate makes them safe.
    "devices/src/virtio/block/uring.rs",
    "devices/src/virtio/net/tap.rs",
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The module of a file below src: its folder, or its own name.
fn module_of(file: &str) -> &str {
    file.split('/').next().unwrap_or(file).trim_end_matches(".rs")
}

#[test]
fn modules_import_only_what_they_may() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (file, imports) in Graph::of_folder(&root().join("src")).imports {
        let from = module_of(&file);
        if from == "lib" {
            continue;
        }
        let may = allowed.get(from).unwrap_or_else(|| panic!("module {from} has no rule here"));
        for other in imports {
            let to = module_of(&other);
            assert!(to == from || may.contains(&to), "{file} imports {other}, but {from} may import only {may:?}");
        }
    }
}

#[test]
fn no_files_import_each_other() {
    let circles = |folder: &str| Graph::of_folder(&root().join(folder)).circles();
    let found: Vec<_> = ["src", "src/agent/src", "arch/src", "devices/src"].into_iter().flat_map(circles).collect();
    assert!(found.is_empty(), "files import each other: {found:#?}");
}

#[test]
fn the_rules_have_no_circle() {
    // What a module imports stands above it in the list.
    let mut above: Vec<&str> = Vec::new();
    for (module, may) in ALLOWED {
        for other in *may {
            assert!(above.contains(other), "{module} uses {other}, which stands below it");
        }
        above.push(module);
    }
}

#[test]
fn unsafe_stays_in_its_modules() {
    for folder in ["src", "arch/src", "devices/src", "tests"] {
        for path in sources(&root().join(folder)) {
            let relative = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("readable");
            let word = ["unsafe", " {"].concat();
            let has = text.contains(&word) || text.contains(&["unsafe", " impl"].concat());
            let may = UNSAFE.iter().any(|module| relative.starts_with(module));
            assert!(!has || may, "{relative} has unsafe code");
        }
    }
}

#[test]
fn files_stay_small() {
    for folder in ["src", "arch/src", "devices/src"] {
        for path in sources(&root().join(folder)) {
            let lines = fs::read_to_string(&path).expect("readable").lines().count();
            assert!(lines <= 500, "{} has {lines} lines: split it into modules", path.display());
        }
    }
}
