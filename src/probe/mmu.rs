//! KVM's MMU: nested or shadow paging. KVM decides it for a whole module when that is loaded, so who wants the other must load
//! the module again.

use super::host::{Host, Mmu};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use thiserror::Error;

/// Why the module was not loaded with the other MMU.
#[derive(Debug, Error)]
pub enum MmuError {
    /// No module at all.
    #[error("there is no KVM module on this host: load one first (modprobe kvm_amd, or kvm_intel)")]
    NoModule,
    /// A module that has one way only.
    #[error("{module} knows {} only", .has.name())]
    OneWay {
        /// The module.
        module: &'static str,
        /// What it has.
        has: Mmu,
    },
    /// Part of the kernel.
    #[error("{module} is built into this kernel: boot it with {module}.{parameter}={value}")]
    BuiltIn {
        /// The module.
        module: &'static str,
        /// Its parameter.
        parameter: &'static str,
        /// What to give it.
        value: u8,
    },
    /// Not root.
    #[error("loading a module needs root: try sudo hwvmm mmu set {0}")]
    NotRoot(&'static str),
    /// Machines run.
    #[error("{module} is in use{}: end that first", holders_text(.holders))]
    Busy {
        /// The module.
        module: &'static str,
        /// Who holds it.
        holders: Vec<Holder>,
    },
    /// modprobe refused; what was there has been put back, or not.
    #[error("{what}{}", if *.restored { "; the module is back as it was" } else { "; and the module could not be put back" })]
    Load {
        /// What failed.
        what: String,
        /// Whether the module is there again.
        restored: bool,
    },
}

fn holders_text(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return " (by whom, this user may not see)".into();
    }
    let list: Vec<String> = holders.iter().map(|holder| format!("{} ({})", holder.name, holder.pid)).collect();
    format!(" by {}", list.join(", "))
}

/// A process that has KVM open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// What there is to know of KVM's MMU on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmuState {
    /// The vendor's module, where there is one.
    pub module: Option<&'static str>,
    /// What it uses.
    pub mmu: Mmu,
    /// Parameters that bear on it: name as in /sys/module, value.
    pub parameters: Vec<(String, String)>,
    /// References to the module; `None` where it is built in.
    pub references: Option<u32>,
    /// Who has KVM open, as far as this user may see.
    pub holders: Vec<Holder>,
}

/// Parameters of the modules that bear on the MMU.
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

/// The module's parameter for nested paging.
fn parameter(module: &str) -> Option<&'static str> {
    match module {
        "kvm_amd" => Some("npt"),
        "kvm_intel" => Some("ept"),
        _ => None,
    }
}

/// The command that loads `module` with `wanted`.
#[must_use]
pub fn command_for(module: &str, wanted: Mmu) -> Option<String> {
    let value = u8::from(wanted == Mmu::Nested);
    parameter(module).map(|name| format!("modprobe -r {module} && modprobe {module} {name}={value}"))
}

impl Host {
    /// KVM's MMU as it is now.
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

    /// Processes with a file descriptor of KVM's, but for this one.
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
                holds(&entry.path())?.then(|| {
                    let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                    Holder { pid, name: name.trim().to_owned() }
                })
            })
            .collect();
        holders.sort_by_key(|holder| holder.pid);
        holders
    }

    /// Has KVM use `wanted` from now on, by loading its module again. True where it was loaded; false where it was so already.
    ///
    /// # Errors
    /// [`MmuError`]; the module is as it was then, or the error says that it is not.
    pub fn set_mmu(&self, wanted: Mmu) -> Result<bool, MmuError> {
        let module = self.vendor_module().ok_or(MmuError::NoModule)?;
        let has = self.mmu();
        if has == wanted {
            return Ok(false);
        }
        let parameter = parameter(module).ok_or(MmuError::OneWay { module, has })?;
        let value = u8::from(wanted == Mmu::Nested);
        let state = self.mmu_state();
        let Some(references) = state.references else { return Err(MmuError::BuiltIn { module, parameter, value }) };
        if !rustix::process::geteuid().is_root() {
            return Err(MmuError::NotRoot(if wanted == Mmu::Nested { "npt" } else { "shadow" }));
        }
        if references > 0 {
            return Err(MmuError::Busy { module, holders: state.holders });
        }
        modprobe(&["-r", module]).map_err(|what| MmuError::Load { what, restored: self.vendor_module().is_some() })?;
        let loaded = modprobe(&[module, &format!("{parameter}={value}")]).and_then(|()| {
            let now = self.mmu();
            if now == wanted {
                Ok(())
            } else {
                Err(format!("{module} was loaded, and uses {} all the same", now.name()))
            }
        });
        loaded.map(|()| true).map_err(|what| {
            // What it was, whatever became of it.
            let _ = modprobe(&["-r", module]);
            let restored = modprobe(&[module, &format!("{parameter}={}", 1 - value)]).is_ok();
            MmuError::Load { what, restored }
        })
    }
}

fn modprobe(arguments: &[&str]) -> Result<(), String> {
    let words = arguments.join(" ");
    let output = Command::new("modprobe").args(arguments).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("modprobe {words} failed: {}", said.trim().lines().next().unwrap_or("it does not say why")))
        }
        Err(error) => Err(format!("cannot run modprobe {words}: {error}")),
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
            ("proc/self/comm", "x\n"),
        ]);
        for (pid, target) in [(12, "anon_inode:kvm-vm"), (13, "/dev/null")] {
            fs::create_dir_all(root.path().join(format!("proc/{pid}/fd"))).expect("made");
            std::os::unix::fs::symlink(target, root.path().join(format!("proc/{pid}/fd/3"))).expect("made");
        }
        let state = host.mmu_state();
        assert_eq!((state.module, state.mmu, state.references), (Some("kvm_amd"), Mmu::Nested, Some(2)));
        let parameters = [("kvm_amd.npt", "1"), ("kvm.tdp_mmu", "Y")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(state.parameters, parameters);
        assert_eq!(state.holders, [Holder { pid: 12, name: "qemu".into() }]);
    }

    #[test]
    fn what_cannot_be_set_is_said_with_its_remedy() {
        let says = |host: &Host, wanted| host.set_mmu(wanted).expect_err("refused").to_string();
        let (_root, none) = host(&[]);
        assert!(says(&none, Mmu::Shadow).contains("modprobe"));
        let (_root, pvm) = host(&[("sys/module/kvm_pvm/refcnt", "0\n")]);
        assert!(says(&pvm, Mmu::Nested).contains("kvm_pvm knows shadow paging only"));
        assert!(!pvm.set_mmu(Mmu::Shadow).expect("it has it"));
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
