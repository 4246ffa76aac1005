//! The house's import rules: which module may use which. Cargo keeps `arch` and `devices` apart from each other and
//! from KVM; this keeps the modules of the package `hwvmm` in order, and the layers without a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// For each module, those it may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("tune", &[]),
    ("config", &["tune"]),
    ("memory", &[]),
    ("event_loop", &[]),
    ("kvm", &["memory"]),
    ("exit", &["kvm"]),
    ("measure", &["exit", "kvm", "memory"]),
    ("vcpu", &["exit", "kvm", "measure"]),
    ("probe", &["error", "exit", "kvm", "memory"]),
    ("nano", &["exit", "kvm", "measure", "memory"]),
    ("boot", &["config", "memory"]),
    ("console", &["exit", "vcpu"]),
    ("control", &["config", "exit", "kvm", "measure", "vcpu"]),
    (
        "machine",
        &[
            "boot",
            "config",
            "console",
            "control",
            "event_loop",
            "error",
            "exit",
            "kvm",
            "measure",
            "memory",
            "probe",
            "tune",
            "vcpu",
        ],
    ),
    ("profile", &["boot", "config", "exit", "kvm", "measure"]),
    (
        "cli",
        &[
            "boot", "config", "console", "control", "error", "exit", "kvm", "machine", "measure", "nano", "probe",
            "profile", "tune",
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

/// The top-level modules that a source file names after `crate::`.
fn named(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut found = BTreeSet::new();
    for line in code {
        for part in line.split("crate::").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
            if !name.is_empty() {
                found.insert(name);
            }
        }
    }
    found
}

fn uses() -> BTreeMap<String, BTreeSet<String>> {
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let source = root().join("src");
    for path in sources(&source) {
        let relative = path.strip_prefix(&source).expect("below src").to_owned();
        let module = relative.components().next().expect("a name").as_os_str().to_string_lossy();
        let module = module.trim_end_matches(".rs").to_owned();
        let text = fs::read_to_string(&path).expect("readable");
        uses.entry(module.clone()).or_default().extend(named(&text).into_iter().filter(|name| *name != module));
    }
    uses
}

#[test]
fn modules_use_only_what_they_may() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    for (module, used) in uses() {
        if module == "lib" || module == "main" {
            continue;
        }
        let may = allowed.get(module.as_str()).unwrap_or_else(|| panic!("module {module} has no rule here"));
        for other in used {
            assert!(may.contains(&other.as_str()), "{module} may not use {other}: it may use {may:?}");
        }
    }
}

#[test]
fn the_rules_have_no_circle() {
    // Each module's uses stand above it in the list.
    let mut above: Vec<&str> = Vec::new();
    for (module, may) in ALLOWED {
        for other in *may {
            assert!(above.contains(other), "{module} uses {other}, which stands below it");
        }
        above.push(module);
    }
}

#[test]
fn unsafe_stays_in_its_rooms() {
    for folder in ["src", "arch/src", "devices/src", "tests"] {
        for path in sources(&root().join(folder)) {
            let relative = path.strip_prefix(root()).expect("below the root").to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).expect("readable");
            let word = ["unsafe", " {"].concat();
            let has = text.contains(&word) || text.contains(&["unsafe", " impl"].concat());
            let may = UNSAFE.iter().any(|room| relative.starts_with(room));
            assert!(!has || may, "{relative} has unsafe code");
        }
    }
}

#[test]
fn files_stay_small() {
    for folder in ["src", "arch/src", "devices/src"] {
        for path in sources(&root().join(folder)) {
            let lines = fs::read_to_string(&path).expect("readable").lines().count();
            assert!(lines <= 500, "{} has {lines} lines: it wants a second room", path.display());
        }
    }
}
