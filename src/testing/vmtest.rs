//! The file of danobi/vmtest (`vmtest.toml`): its `[[target]]` tables become kernels and tests of a suite.
//!
//! What vmtest does to the host is not done: the root file system and the folder of the file are copied on write, and only a mount
//! with `writable = true` can be written to.

use super::patterns::OopsKind;
use super::problem::{self, Problem};
use crate::config::list_item;
use crate::escape::escape;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use toml::{Table, Value};

/// The tag of the share with the folder of the file. Those of mounts have a number behind it.
const TAG: &str = "vmtest";
/// vmtest has no time-out.
const TIMEOUT: &str = "1h";
/// Variables of the environment that tell of this process, not of the user.
const OWN_VARIABLES: &[&str] = &["_", "PWD", "OLDPWD", "SHLVL"];

/// Mounts what vmtest mounts, then runs the command as vmtest does: by bash where the root has one, in the folder of the file. The
/// arguments are the command, and the tag and the place of each mount.
const SCRIPT: &str = r#"set -e
command=$1; shift
d=/run/hwvmm-vmtest
mkdir -p /mnt/vmtest $d; mount -t tmpfs tmpfs $d; mkdir $d/lower $d/upper $d/work
mount -t virtiofs vmtest $d/lower
mount -t overlay -o lowerdir=$d/lower,upperdir=$d/upper,workdir=$d/work overlay /mnt/vmtest
while [ $# -gt 0 ]; do mkdir -p "$2"; mount -t virtiofs "$1" "$2"; shift 2; done
cd /mnt/vmtest
if command -v bash >/dev/null; then exec bash -c "$command"; fi
exec sh -c "$command""#;

#[derive(Deserialize)]
struct Mount {
    host_path: String,
    #[serde(default)]
    writable: bool,
}

#[derive(Deserialize)]
#[serde(default)]
struct Vm {
    num_cpus: u8,
    memory: String,
    mounts: BTreeMap<String, Mount>,
    bios: Option<String>,
    extra_args: Vec<String>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            num_cpus: 2,
            memory: "4G".into(),
            mounts: BTreeMap::new(),
            bios: None,
            extra_args: Vec::new(),
            others: BTreeMap::new(),
        }
    }
}

#[derive(Deserialize)]
struct Target {
    name: String,
    image: Option<String>,
    #[serde(default)]
    uefi: bool,
    kernel: Option<String>,
    kernel_args: Option<String>,
    kvm_cpu_args: Option<String>,
    rootfs: Option<String>,
    arch: Option<String>,
    qemu_command: Option<String>,
    command: String,
    #[serde(default)]
    vm: Vm,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// The tables of a suite, and what of the file has no meaning here.
#[derive(Debug, Default)]
pub(super) struct Converted {
    pub(super) kernels: Vec<Table>,
    pub(super) tests: Vec<Table>,
    pub(super) notes: Vec<String>,
}

/// Makes the tables of a suite from the `[[target]]` tables of a file. `variables`: the names of the environment variables that the
/// commands get.
///
/// # Errors
/// Says which target is wrong, and why.
pub(super) fn convert(targets: Vec<Table>, variables: &[String]) -> Result<Converted, Problem> {
    let mut converted = Converted::default();
    for (index, table) in targets.into_iter().enumerate() {
        let place = match table.get("name").and_then(Value::as_str) {
            Some(name) => format!("target '{name}'"),
            None => format!("target {}", index + 1),
        };
        let wrong = |problem| Problem::Target { place: place.clone(), problem: Box::new(problem) };
        let target: Target = problem::read(table).map_err(wrong)?;
        let kernel_name = format!("target {}", index + 1);
        converted.notes.extend(notes(&target).into_iter().map(|note| escape(&format!("{place}: {note}"), 500)));
        let (kernel, test) = tables(target, &kernel_name, variables).map_err(wrong)?;
        converted.kernels.push(kernel);
        converted.tests.push(test);
    }
    Ok(converted)
}

/// What has no meaning here.
fn notes(target: &Target) -> Vec<String> {
    let vm = &target.vm;
    let unused = [
        ("uefi", target.uefi, "the kernel is entered without firmware"),
        ("rootfs", target.image.is_some() && target.rootfs.is_some(), "the root is that of the image"),
        ("kvm_cpu_args", target.kvm_cpu_args.is_some(), "the guest has the processor that KVM offers; see --tune"),
        ("qemu_command", target.qemu_command.is_some(), "hwvmm runs the guest, not QEMU"),
        ("vm.bios", vm.bios.is_some(), "the kernel is entered without firmware"),
        ("vm.extra_args", !vm.extra_args.is_empty(), "hwvmm runs the guest, not QEMU"),
    ];
    let unused =
        unused.into_iter().filter(|(_, given, _)| *given).map(|(key, _, why)| format!("{key} is ignored: {why}"));
    let unknown = target.others.keys().cloned().chain(vm.others.keys().map(|key| format!("vm.{key}")));
    unused.chain(unknown.map(|key| format!("{key} is ignored: it is no key of vmtest that is known here"))).collect()
}

fn text(value: impl Into<String>) -> Value {
    Value::String(value.into())
}

fn share(tag: &str, path: &str, writable: bool) -> Result<Value, Problem> {
    let path = list_item("path", OsStr::new(path)).into_string().map_err(|_| Problem::NotUtf8("a path"))?;
    Ok(text(format!("tag={tag},{path}{}", if writable { "" } else { ",readonly=on" })))
}

/// The `[[kernel]]` and the `[[test]]` of a target.
fn tables(target: Target, kernel_name: &str, variables: &[String]) -> Result<(Table, Table), Problem> {
    let has_image = target.image.is_some();
    let path = match (target.kernel, target.image) {
        (Some(_), Some(_)) => return Err(Problem::Both("kernel", "image")),
        (None, None) => return Err(Problem::Missing("kernel or image")),
        (Some(path), None) | (None, Some(path)) => path,
    };
    if has_image && target.kernel_args.is_some() {
        return Err(Problem::Contradiction("kernel_args", "is for a 'kernel'; an image has its own"));
    }
    if let Some(arch) = target.arch.filter(|arch| arch != "x86_64") {
        return Err(Problem::Arch(arch));
    }
    let kernel = Table::from_iter([
        ("name".to_owned(), text(kernel_name)),
        // A path of vmtest's is no pattern.
        ("path".to_owned(), text(if path.contains(['*', '?', '[']) { glob::Pattern::escape(&path) } else { path })),
    ]);
    let mut shares = vec![share(TAG, ".", false)?];
    let mut words: Vec<Value> = ["/bin/sh", "-c", SCRIPT, "vmtest", &target.command].map(text).to_vec();
    for (number, (place, mount)) in target.vm.mounts.iter().enumerate() {
        let tag = format!("{TAG}{number}");
        shares.push(share(&tag, &mount.host_path, mount.writable)?);
        words.extend([text(tag), text(place.clone())]);
    }
    let root = match target.rootfs.as_deref() {
        _ if has_image => "image".to_owned(),
        None | Some("/") => "host".to_owned(),
        Some(path @ ("host" | "none" | "image")) => format!("./{path}"),
        Some(path) => path.to_owned(),
    };
    let complaints = OopsKind::ALL.iter().filter(|kind| **kind != OopsKind::Warning);
    let list = |names: &[String]| Value::Array(names.iter().map(text).collect());
    let test = Table::from_iter([
        ("name".to_owned(), text(target.name)),
        ("kernel".to_owned(), text(kernel_name)),
        ("run".to_owned(), Value::Array(words)),
        ("root".to_owned(), text(root)),
        ("workdir".to_owned(), text("/")),
        ("env".to_owned(), list(variables)),
        ("share".to_owned(), Value::Array(shares)),
        ("append".to_owned(), Value::Array(target.kernel_args.into_iter().map(text).collect())),
        ("cpus".to_owned(), Value::Integer(target.vm.num_cpus.into())),
        ("memory".to_owned(), text(target.vm.memory)),
        // vmtest judges by the command alone. A bug of the kernel fails the test all the same; a warning does not.
        ("fail-on".to_owned(), Value::Array(complaints.map(|kind| text(kind.name())).collect())),
        ("silence".to_owned(), text("off")),
        ("timeout".to_owned(), text(TIMEOUT)),
    ]);
    Ok((kernel, test))
}

/// The environment variables of this process that commands get, as vmtest hands on its own.
pub(super) fn variables() -> Vec<String> {
    let names = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| !name.is_empty() && !OWN_VARIABLES.contains(&name.as_str())).collect()
}

#[cfg(test)]
mod tests {
    use super::super::expand::expand;
    use super::super::file::SuiteFile;
    use super::OopsKind;
    use std::path::Path;

    const TWO: &str = r#"
        [[target]]
        name = "stable [x]"
        kernel = "bzImage-v6.6"
        kernel_args = "debug panic=5"
        command = "ls -l /tmp/hosttmp"
        [target.vm]
        num_cpus = 3
        memory = "1G"
        extra_args = ["-snapshot"]
        [target.vm.mounts]
        "/tmp/hosttmp" = { host_path = "/tmp", writable = true }
        "/b" = { host_path = "b,c" }
        [[target]]
        name = "root"
        kernel = "k[1]"
        rootfs = "./rootfs"
        uefi = true
        colour = "red"
        command = "true"
    "#;

    #[test]
    fn targets_are_tests_with_a_kernel_each() {
        let suite = SuiteFile::parse(Path::new("vmtest.toml"), TWO).expect("a suite");
        assert_eq!(suite.notes.len(), 3, "{:?}", suite.notes);
        assert!(suite.notes[0].contains("target 'stable [x]': vm.extra_args is ignored"), "{:?}", suite.notes);
        assert!(suite.notes.iter().any(|note| note.contains("target 'root': colour is ignored")), "{:?}", suite.notes);
        let cases = expand(std::slice::from_ref(&suite), |_| false).expect_err("k[1] is not there");
        assert!(cases.to_string().contains("no file matches 'k[[]1[]]'"), "{cases}");
        let cases =
            expand(&[SuiteFile::parse(Path::new("vmtest.toml"), &TWO.replace("k[1]", "k")).expect("a suite")], |_| {
                false
            });
        let cases = cases.expect("tests");
        let [a, b] = &cases[..] else { panic!("two") };
        assert_eq!((a.name.as_str(), a.needs.vcpus, a.needs.memory_bytes), ("stable [x]", 3, 1 << 30));
        assert_eq!((b.name.as_str(), b.needs.vcpus, b.needs.memory_bytes), ("root", 2, 4 << 30));
        let option = |index: usize, key: &str| cases[index].options.get(key).expect(key).to_string();
        assert_eq!(option(0, "kernel"), "\"bzImage-v6.6\"");
        assert_eq!(option(0, "append"), "[\"debug panic=5\"]");
        assert_eq!((option(0, "root").as_str(), option(1, "root").as_str()), ("\"host\"", "\"./rootfs\""));
        let shares = option(0, "share");
        assert!(shares.contains("tag=vmtest,path=.,readonly=on"), "{shares}");
        assert!(shares.contains("tag=vmtest0,path=b,,c,readonly=on"), "{shares}");
        assert!(shares.contains("tag=vmtest1,path=/tmp\""), "the one that is writable: {shares}");
        let command = a.options.get("command").and_then(toml::Value::as_array).expect("words");
        let words: Vec<_> = command.iter().filter_map(toml::Value::as_str).collect();
        assert_eq!(words[4..], ["ls -l /tmp/hosttmp", "vmtest0", "/b", "vmtest1", "/tmp/hosttmp"]);
        let fail_on = &a.settings.fail_on;
        assert!(!fail_on.contains(&OopsKind::Warning) && fail_on.contains(&OopsKind::Bug), "{fail_on:?}");
        assert_eq!((a.settings.silence, a.needs.timeout.as_secs()), (None, 3600));
    }

    #[test]
    fn an_image_has_kernel_and_root() {
        let text = "[[target]]\nname = 'a'\nimage = 'x.qcow2'\nuefi = true\nrootfs = 'y'\ncommand = 'c'";
        let suite = SuiteFile::parse(Path::new("vmtest.toml"), text).expect("a suite");
        assert!(suite.notes.iter().any(|note| note.contains("rootfs is ignored")), "{:?}", suite.notes);
        let case = expand(std::slice::from_ref(&suite), |_| true).expect("a test").remove(0);
        let option = |key: &str| case.options.get(key).and_then(toml::Value::as_str);
        assert_eq!((option("kernel-from"), option("kernel"), option("root")), (Some("x.qcow2"), None, Some("image")));
        let error = expand(&[suite], |_| false).expect_err("it is no image").to_string();
        assert!(error.contains("x.qcow2 is none, or cannot be read"), "{error}");
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        for (text, words) in [
            (
                "[[target]]\nname = 'a'\nimage = 'x'\nkernel = 'k'\ncommand = 'c'",
                "target 'a': kernel and image: give one of them",
            ),
            (
                "[[target]]\nname = 'a'\nimage = 'x'\nkernel_args = 'quiet'\ncommand = 'c'",
                "target 'a': kernel_args is for a 'kernel'",
            ),
            ("[[target]]\nname = 'a'\ncommand = 'c'", "target 'a': kernel or image is missing"),
            ("[[target]]\nname = 'a'\nkernel = 'k'", "target 'a': missing field `command`"),
            ("[[target]]\nkernel = 'k'\ncommand = 'c'", "target 1: missing field `name`"),
            (
                "[[target]]\nname = 'a'\nkernel = 'k'\ncommand = 'c'\narch = 's390x'",
                "arch = 's390x': guests are x86_64",
            ),
            ("[[target]]\nname = 'a'\nkernel = 1\ncommand = 'c'", "target 'a': invalid type"),
            ("[[target]]\nname = 'a'\nkernel = 'k'\ncommand = 'c'\n[[test]]\nname = 'b'", "[[target]] and [[test]]"),
            ("target = 1", "must be a list of tables"),
        ] {
            let error = SuiteFile::parse(Path::new("vmtest.toml"), text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
