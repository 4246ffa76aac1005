//! Builds the agent (src/agent), a static program for guests, which `boot::initramfs` embeds.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the agent is built from. Cargo runs this program again only where one of them changed.
const SOURCES: &[&str] = &["build.rs", "Cargo.lock", "src/agent/Cargo.toml", "src/agent/src"];
/// The agent's release profile: as small as it gets. A panic ends PID 1, and so the guest.
const PROFILE: &[(&str, &str)] =
    &[("PANIC", "abort"), ("OPT_LEVEL", "z"), ("LTO", "fat"), ("CODEGEN_UNITS", "1"), ("STRIP", "symbols")];
/// Static, so that it needs nothing of the guest's root. Flags are separated by 0x1f.
const FLAGS: &str = "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static";

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let folder = variable("OUT_DIR").join("agent");
    let program = match build(&variable("CARGO_MANIFEST_DIR"), &folder) {
        Ok(program) => program,
        Err(reason) => {
            println!("cargo::error={reason}");
            return;
        }
    };
    println!("cargo::rustc-env=HWVMM_AGENT={}", program.display());
}

fn variable(name: &str) -> PathBuf {
    env::var_os(name).map(PathBuf::from).unwrap_or_default()
}

/// Builds the agent below `folder`, and returns the path of the program.
fn build(package: &Path, folder: &Path) -> Result<PathBuf, String> {
    let target = env::var("TARGET").unwrap_or_default();
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command
        .current_dir(package)
        .args(["build", "--release", "--package", "hwvmm-agent", "--bin", "hwvmm-agent", "--target", &target])
        // A folder of its own: the one of the build that this is part of is locked.
        .arg("--target-dir")
        .arg(folder)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS)
        // Wrappers of clippy and of coverage are for hwvmm.
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("CARGO_TARGET_DIR")
        .env_remove("CARGO_BUILD_TARGET")
        .env_remove("CARGO_BUILD_TARGET_DIR");
    for (key, value) in PROFILE {
        command.env(format!("CARGO_PROFILE_RELEASE_{key}"), value);
    }
    let output = command.output().map_err(|error| format!("cannot start cargo to build src/agent: {error}"))?;
    if output.status.success() {
        return Ok(folder.join(target).join("release/hwvmm-agent"));
    }
    let text = String::from_utf8_lossy(&output.stderr);
    // rustc warns of each line that it cannot understand; cargo shows these only where the build fails.
    for line in text.lines() {
        println!("cargo::warning={line}");
    }
    let missing = ["-lc", "libc.a", "crt1.o"].iter().any(|part| text.contains(part));
    let remedy = if missing { " (the static C library is missing: install libc6-dev, or glibc-static)" } else { "" };
    Err(format!("cannot build src/agent, the program that runs a command in a guest{remedy}"))
}
