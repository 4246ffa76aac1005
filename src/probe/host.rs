//! The host as /sys and /proc describe it: KVM's module, its MMU, nesting, huge pages.

use std::fs;
use std::path::{Path, PathBuf};

/// How KVM translates guest addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mmu {
    /// By the processor, with nested page tables (NPT, EPT).
    Nested,
    /// With shadow page tables.
    Shadow,
    /// The host does not say.
    Unknown,
}

impl Mmu {
    /// The name in messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nested => "nested paging",
            Self::Shadow => "shadow paging",
            Self::Unknown => "unknown",
        }
    }
}

/// Huge pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HugePages {
    /// Size of one page in KiB.
    pub size_kib: u64,
    /// Pages that are free.
    pub free: u64,
    /// Pages that are reserved in all.
    pub total: u64,
}

/// Whether the processor delivers interrupts to a guest without an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicVirtualization {
    /// APICv, or AVIC with x2AVIC: for the registers of xAPIC and of x2APIC.
    Full,
    /// AVIC without x2AVIC: for the registers of xAPIC only.
    XapicOnly,
    /// The module does not use it, by its parameter of this name or because the processor has none.
    Off(&'static str),
    /// The host does not say.
    Unknown,
}

/// The host, as /sys and /proc show it below `root`.
pub struct Host {
    root: PathBuf,
}

const MODULES: [&str; 3] = ["kvm_amd", "kvm_intel", "kvm_pvm"];

impl Host {
    /// The host whose /sys and /proc are below `root`, which is "/" outside of tests.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    pub(super) fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok().map(|text| text.trim().to_owned())
    }

    /// Name of KVM's vendor module, built in or loaded; `None` where there is none that this hwvmm knows.
    #[must_use]
    pub fn vendor_module(&self) -> Option<&'static str> {
        MODULES.into_iter().find(|name| self.root.join("sys/module").join(name).is_dir())
    }

    /// Returns true if KVM's module runs guests with the processor's virtualization extensions (SVM, VMX), as opposed to one
    /// that emulates instructions, and to one that this hwvmm does not know.
    #[must_use]
    pub fn has_hardware_kvm(&self) -> bool {
        matches!(self.vendor_module(), Some("kvm_amd" | "kvm_intel"))
    }

    /// How the module translates guest addresses.
    #[must_use]
    pub fn mmu(&self) -> Mmu {
        let parameter = match self.vendor_module() {
            Some("kvm_amd") => "npt",
            Some("kvm_intel") => "ept",
            Some(_) => return Mmu::Shadow,
            None => return Mmu::Unknown,
        };
        let module = self.vendor_module().unwrap_or_default();
        match self.switch(&format!("{module}/parameters/{parameter}")) {
            Some(true) => Mmu::Nested,
            Some(false) => Mmu::Shadow,
            None => Mmu::Unknown,
        }
    }

    /// Whether the processor delivers interrupts to guests without an exit, as far as the module's parameters say.
    #[must_use]
    pub fn apic_virtualization(&self) -> ApicVirtualization {
        let (module, parameter) = match self.vendor_module() {
            Some(module @ "kvm_amd") => (module, "avic"),
            Some(module @ "kvm_intel") => (module, "enable_apicv"),
            Some(_) | None => return ApicVirtualization::Unknown,
        };
        match self.switch(&format!("{module}/parameters/{parameter}")) {
            Some(true) if module == "kvm_amd" && !self.has_cpu_flag("x2avic") => ApicVirtualization::XapicOnly,
            Some(true) => ApicVirtualization::Full,
            Some(false) => ApicVirtualization::Off(parameter),
            None => ApicVirtualization::Unknown,
        }
    }

    /// Returns true if KVM may send a guest's timer interrupts from another processor (`pi_inject_timer`, Linux 5.4); `None` where
    /// it has no such parameter.
    #[must_use]
    pub fn posts_timers(&self) -> Option<bool> {
        self.switch("kvm/parameters/pi_inject_timer")
    }

    /// The value of a module's parameter that is on or off.
    fn switch(&self, parameter: &str) -> Option<bool> {
        match self.read(&format!("sys/module/{parameter}"))?.as_str() {
            "Y" | "1" => Some(true),
            "N" | "0" => Some(false),
            _ => None,
        }
    }

    /// Returns true if this host is a virtual machine itself.
    #[must_use]
    pub fn is_virtual(&self) -> bool {
        self.has_cpu_flag("hypervisor")
    }

    /// Returns true if the processor has virtualization extensions that the kernel may use (SVM, VMX).
    #[must_use]
    pub fn has_virtualization(&self) -> bool {
        self.has_cpu_flag("svm") || self.has_cpu_flag("vmx")
    }

    fn has_cpu_flag(&self, flag: &str) -> bool {
        let info = self.read("proc/cpuinfo").unwrap_or_default();
        let line = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        line.split_whitespace().any(|word| word == flag)
    }

    /// The processor's model name; "unknown" where /proc/cpuinfo has none.
    #[must_use]
    pub fn cpu(&self) -> String {
        let info = self.read("proc/cpuinfo").unwrap_or_default();
        let line = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        line.map_or_else(|| "unknown".into(), |(_, name)| name.trim().to_owned())
    }

    /// The mode of transparent huge pages: "always", "madvise" or "never"; `None` for a kernel without them.
    #[must_use]
    pub fn transparent_huge_pages(&self) -> Option<String> {
        let text = self.read("sys/kernel/mm/transparent_hugepage/enabled")?;
        let chosen = text.split_once('[')?.1.split_once(']')?.0;
        Some(chosen.to_owned())
    }

    /// Huge pages by size, smallest first.
    #[must_use]
    pub fn huge_pages(&self) -> Vec<HugePages> {
        let folder = "sys/kernel/mm/hugepages";
        let Ok(entries) = fs::read_dir(self.root.join(folder)) else { return Vec::new() };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let size_kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
                let number = |file| self.read(&format!("{folder}/{name}/{file}"))?.parse().ok();
                Some(HugePages { size_kib, free: number("free_hugepages")?, total: number("nr_hugepages")? })
            })
            .collect();
        found.sort_unstable_by_key(|pages: &HugePages| pages.size_kib);
        found
    }

    /// Release of the running kernel, such as `6.1.0-56-amd64`; "unknown" where /proc does not say.
    #[must_use]
    pub fn kernel(&self) -> String {
        self.read("proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file below `root`, with the folders above it.
    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    #[test]
    fn module_mmu_and_pages_are_read() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let put = |path, text| put(root.path(), path, text);
        let host = Host::at(root.path());
        assert_eq!((host.vendor_module(), host.mmu(), host.is_virtual()), (None, Mmu::Unknown, false));
        put("sys/module/kvm_intel/parameters/ept", "N\n");
        put("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vmx hypervisor\n");
        put("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "4\n");
        assert_eq!((host.vendor_module(), host.mmu()), (Some("kvm_intel"), Mmu::Shadow));
        assert!(host.is_virtual() && host.has_virtualization());
        assert_eq!(host.transparent_huge_pages().as_deref(), Some("madvise"));
        assert_eq!(host.huge_pages(), [HugePages { size_kib: 2048, free: 3, total: 4 }]);
        put("sys/module/kvm_amd/parameters/npt", "1\n");
        assert_eq!(host.mmu(), Mmu::Nested);
    }

    #[test]
    fn interrupts_without_exits_are_what_the_parameters_say() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let put = |path, text| put(root.path(), path, text);
        let host = Host::at(root.path());
        assert_eq!((host.apic_virtualization(), host.posts_timers()), (ApicVirtualization::Unknown, None));
        put("sys/module/kvm_intel/parameters/enable_apicv", "Y\n");
        put("sys/module/kvm/parameters/pi_inject_timer", "1\n");
        assert_eq!((host.apic_virtualization(), host.posts_timers()), (ApicVirtualization::Full, Some(true)));
        put("sys/module/kvm_amd/parameters/avic", "N\n");
        assert_eq!(host.apic_virtualization(), ApicVirtualization::Off("avic"));
        put("sys/module/kvm_amd/parameters/avic", "Y\n");
        put("proc/cpuinfo", "flags\t\t: svm avic\n");
        assert_eq!(host.apic_virtualization(), ApicVirtualization::XapicOnly);
        put("proc/cpuinfo", "flags\t\t: svm avic x2avic\n");
        assert_eq!(host.apic_virtualization(), ApicVirtualization::Full);
        put("sys/module/kvm/parameters/pi_inject_timer", "-1\n");
        assert_eq!(host.posts_timers(), None, "neither on nor off");
    }
}
