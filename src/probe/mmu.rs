//! KVM's MMU: nested or shadow paging. KVM decides it for all guests when its vendor module is loaded, so changing it means to
//! load the module again.

use super::host::{Host, Mmu};
use crate::escape::{GUEST_BYTES, escape};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use thiserror::Error;

/// The module was not loaded with the other MMU.
#[derive(Debug, Error)]
pub enum MmuError {
    /// No vendor module is loaded.
    #[error("there is no KVM module on this host: load one first (modprobe kvm_amd, or kvm_intel)")]
    NoModule,
    /// The module has one MMU only.
    #[error("{module} has {} only", .has.name())]
    Fixed {
        /// Name of the module.
        module: &'static str,
        /// The MMU that it has.
        has: Mmu,
    },
    /// The module is part of the kernel image.
    #[error("{module} is built into this kernel: boot it with {module}.{parameter}={value}")]
    BuiltIn {
        /// Name of the module.
        module: &'static str,
        /// Name of its parameter for nested paging.
        parameter: &'static str,
        /// Value of the parameter for the MMU that is wanted.
        value: u8,
    },
    /// The user is not root. The field is the argument of `hwvmm mmu set`.
    #[error("loading a module needs root: try sudo hwvmm mmu set {0}")]
    NotRoot(&'static str),
    /// The module is in use, so that it cannot be unloaded: virtual machines run.
    #[error("{module} is in use{}: end that first", holders_text(.holders))]
    Busy {
        /// Name of the module.
        module: &'static str,
        /// Processes that use KVM, as far as this user may see.
        holders: Vec<Holder>,
    },
    /// modprobe failed, and the module is loaded as it was before.
    #[error("the MMU was not changed, and the module is loaded as before")]
    Unchanged(#[source] ModprobeError),
    /// modprobe failed, and so did loading the module as it was before.
    #[error("the MMU was not changed, and the module could not be loaded again: load it with modprobe")]
    Unloaded(#[source] ModprobeError),
}

/// modprobe did not do what was asked for.
#[derive(Debug, Error)]
pub enum ModprobeError {
    /// The program cannot be started.
    #[error("cannot run modprobe {arguments}")]
    Start {
        /// The arguments that modprobe would have had, with spaces between.
        arguments: String,
        /// The error of starting the process.
        source: io::Error,
    },
    /// The program ended with a failure status.
    #[error("modprobe {arguments} failed: {message}")]
    Failed {
        /// The arguments that modprobe had, with spaces between.
        arguments: String,
        /// The first line of its stderr.
        message: String,
    },
    /// The module was loaded, and does not use the MMU of its parameter.
    #[error("{module} was loaded, and still uses {}", .has.name())]
    Ineffective {
        /// Name of the module.
        module: &'static str,
        /// The MMU that it uses.
        has: Mmu,
    },
}

/// What setting the MMU has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MmuChange {
    /// The module was loaded again.
    Loaded,
    /// KVM uses that MMU already.
    None,
}

fn holders_text(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return " (only root can see by which processes)".into();
    }
    let list: Vec<String> =
        holders.iter().map(|holder| format!("{} ({})", escape(&holder.name, GUEST_BYTES), holder.pid)).collect();
    format!(" by {}", list.join(", "))
}

/// A process that has KVM open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The ID of the process (PID).
    pub pid: u32,
    /// Name of the program, cut to 15 bytes by the kernel.
    pub name: String,
}

/// The state of KVM's MMU on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmuState {
    /// Name of the vendor module; `None` where none is loaded.
    pub module: Option<&'static str>,
    /// The MMU that the module uses.
    pub mmu: Mmu,
    /// Module parameters that matter for it: name (such as `kvm_amd.npt`) and value.
    pub parameters: Vec<(String, String)>,
    /// Reference count of the module; `None` where it is built in.
    pub references: Option<u32>,
    /// Processes that have KVM open, as far as this user may see.
    pub holders: Vec<Holder>,
}

/// Module parameters that matter for the MMU.
const PARAMETERS: [&str; 13] = [
    "kvm_amd/parameters/npt",
    "kvm_amd/parameters/nested",
    "kvm_amd/parameters/avic",
    "kvm_intel/parameters/ept",
    "kvm_intel/parameters/eptad",
    "kvm_intel/parameters/unrestricted_guest",
    "kvm_intel/parameters/nested",
    "kvm_intel/parameters/pml",
    "kvm/parameters/tdp_mmu",
    "kvm/parameters/nx_huge_pages",
    "kvm/parameters/nx_huge_pages_recovery_ratio",
    "kvm/parameters/flush_on_reuse",
    "kvm/parameters/mmio_caching",
];

/// The name of a module's parameter for nested paging.
fn parameter(module: &str) -> Option<&'static str> {
    match module {
        "kvm_amd" => Some("npt"),
        "kvm_intel" => Some("ept"),
        _ => None,
    }
}

/// Returns the shell command that loads `module` with `wanted`; `None` for a module that has one MMU only.
#[must_use]
pub fn command_for(module: &str, wanted: Mmu) -> Option<String> {
    let value = u8::from(wanted == Mmu::Nested);
    parameter(module).map(|name| format!("modprobe -r {module} && modprobe {module} {name}={value}"))
}

impl Host {
    /// Reads the state of KVM's MMU.
    #[must_use]
    pub fn mmu_state(&self) -> MmuState {
        let value = |name: &str| Some((name.replace("/parameters/", "."), self.read(&format!("sys/module/{name}"))?));
        let module = self.vendor_module();
        MmuState {
            module,
            mmu: self.mmu(),
            parameters: PARAMETERS.into_iter().filter_map(value).collect(),
            references: module.and_then(|name| self.read(&format!("sys/module/{name}/refcnt"))?.parse().ok()),
            holders: self.kvm_holders(),
        }
    }

    /// Finds the other processes that have a file descriptor of KVM's.
    fn kvm_holders(&self) -> Vec<Holder> {
        let Ok(processes) = fs::read_dir(self.path("proc")) else { return Vec::new() };
        let holds = |folder: &PathBuf| {
            let files = fs::read_dir(folder.join("fd")).ok()?;
            let is_kvm = |path: PathBuf| {
                let path = path.to_string_lossy().into_owned();
                path == "/dev/kvm" || path.starts_with("anon_inode:kvm-")
            };
            Some(files.flatten().filter_map(|file| fs::read_link(file.path()).ok()).any(is_kvm))
        };
        let mut holders: Vec<Holder> = processes
            .flatten()
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok().filter(|pid| *pid != std::process::id())?;
                holds(&entry.path())?.then(|| self.holder(pid))
            })
            .collect();
        holders.sort_by_key(|holder| holder.pid);
        holders.dedup();
        holders
    }

    /// The process to end so that process `pid` ends: itself, or for a machine of hwvmm's the process that has started it.
    fn holder(&self, pid: u32) -> Holder {
        let name = |pid: u32| self.read(&format!("proc/{pid}/comm")).unwrap_or_default();
        let own = name(pid);
        let status = self.read(&format!("proc/{pid}/status")).unwrap_or_default();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        match parent.filter(|parent| own == "hwvmm" && name(*parent) == own) {
            Some(parent) => Holder { pid: parent, name: own },
            None => Holder { pid, name: own },
        }
    }

    /// Makes KVM use `wanted` from now on, by loading its module again where it uses the other MMU.
    ///
    /// # Errors
    /// [`MmuError`]. The module is loaded as it was before, except for [`MmuError::Unloaded`].
    pub fn set_mmu(&self, wanted: Mmu) -> Result<MmuChange, MmuError> {
        let module = self.vendor_module().ok_or(MmuError::NoModule)?;
        let has = self.mmu();
        if has == wanted {
            return Ok(MmuChange::None);
        }
        let parameter = parameter(module).ok_or(MmuError::Fixed { module, has })?;
        let value = u8::from(wanted == Mmu::Nested);
        let state = self.mmu_state();
        let Some(references) = state.references else { return Err(MmuError::BuiltIn { module, parameter, value }) };
        if !rustix::process::geteuid().is_root() {
            return Err(MmuError::NotRoot(if wanted == Mmu::Nested { "npt" } else { "shadow" }));
        }
        if references > 0 {
            return Err(MmuError::Busy { module, holders: state.holders });
        }
        if let Err(error) = modprobe(&["-r", module]) {
            let loaded = self.vendor_module().is_some();
            return Err(if loaded { MmuError::Unchanged(error) } else { MmuError::Unloaded(error) });
        }
        let loaded = modprobe(&[module, &format!("{parameter}={value}")]).and_then(|()| {
            let has = self.mmu();
            if has == wanted { Ok(MmuChange::Loaded) } else { Err(ModprobeError::Ineffective { module, has }) }
        });
        loaded.map_err(|error| {
            // It may be loaded with the wrong MMU, or not at all.
            let _ = modprobe(&["-r", module]);
            match modprobe(&[module, &format!("{parameter}={}", 1 - value)]) {
                Ok(()) => MmuError::Unchanged(error),
                Err(_) => MmuError::Unloaded(error),
            }
        })
    }
}

fn modprobe(arguments: &[&str]) -> Result<(), ModprobeError> {
    let output = Command::new("modprobe").args(arguments).output();
    let arguments = arguments.join(" ");
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let message = stderr.trim().lines().next().unwrap_or("without a message").to_owned();
            Err(ModprobeError::Failed { arguments, message })
        }
        Err(source) => Err(ModprobeError::Start { arguments, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        }
        let host = Host::at(root.path());
        (root, host)
    }

    #[test]
    fn the_state_has_parameters_and_holders() {
        let (root, host) = host(&[
            ("sys/module/kvm_amd/parameters/npt", "1\n"),
            ("sys/module/kvm_amd/refcnt", "2\n"),
            ("sys/module/kvm/parameters/tdp_mmu", "Y\n"),
            ("proc/12/comm", "qemu\n"),
            ("proc/13/comm", "sh\n"),
            ("proc/13/status", "Name:\tsh\nPPid:\t1\n"),
            ("proc/14/comm", "hwvmm\n"),
            ("proc/15/comm", "hwvmm\n"),
            ("proc/15/status", "Name:\thwvmm\nPPid:\t14\n"),
            ("proc/self/comm", "x\n"),
        ]);
        for (pid, target) in [(12, "anon_inode:kvm-vm"), (13, "/dev/null"), (15, "anon_inode:kvm-vm")] {
            fs::create_dir_all(root.path().join(format!("proc/{pid}/fd"))).expect("made");
            std::os::unix::fs::symlink(target, root.path().join(format!("proc/{pid}/fd/3"))).expect("made");
        }
        let state = host.mmu_state();
        assert_eq!((state.module, state.mmu, state.references), (Some("kvm_amd"), Mmu::Nested, Some(2)));
        let parameters = [("kvm_amd.npt", "1"), ("kvm.tdp_mmu", "Y")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(state.parameters, parameters);
        let machine = Holder { pid: 14, name: "hwvmm".into() };
        assert_eq!(state.holders, [Holder { pid: 12, name: "qemu".into() }, machine]);
    }

    #[test]
    fn what_cannot_be_set_is_said_with_its_remedy() {
        let says = |host: &Host, wanted| host.set_mmu(wanted).expect_err("refused").to_string();
        let (_root, none) = host(&[]);
        assert!(says(&none, Mmu::Shadow).contains("modprobe"));
        let (_root, pvm) = host(&[("sys/module/kvm_pvm/refcnt", "0\n")]);
        assert!(says(&pvm, Mmu::Nested).contains("kvm_pvm has shadow paging only"));
        assert_eq!(pvm.set_mmu(Mmu::Shadow).expect("it has it"), MmuChange::None);
        let (_root, built_in) = host(&[("sys/module/kvm_intel/parameters/ept", "Y\n")]);
        assert!(says(&built_in, Mmu::Shadow).contains("kvm_intel.ept=0"));
        let (_root, busy) = host(&[("sys/module/kvm_amd/parameters/npt", "1\n"), ("sys/module/kvm_amd/refcnt", "1\n")]);
        let words = says(&busy, Mmu::Shadow);
        assert!(words.contains("in use") || words.contains("root"), "{words}");
        assert_eq!(
            command_for("kvm_amd", Mmu::Shadow).as_deref(),
            Some("modprobe -r kvm_amd && modprobe kvm_amd npt=0")
        );
    }
}
