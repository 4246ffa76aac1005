//! The subcommand `hwvmm doctor`: finds out if this host can run Linux guests, and what is missing.

use super::output::{print_all, print_json};
use crate::error::chain;
use crate::kvm::caps::{Capability, KernelVersion, Need, USED};
use crate::kvm::system::DEFAULT_PATH;
use crate::kvm::{OpenError, System};
use crate::probe::{ApicVirtualization, Host, HugePages, Mmu, STEPS, run_trial};
use crate::sandbox::{OwnView, Support, ViewError};
use hwvmm_devices::path_text::PathText as _;
use serde::Serialize;
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// KVM's device
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH)]
    kvm: PathBuf,
}

/// What a check has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Linux runs all the same, at a cost.
    Note,
    /// Linux cannot run as a guest on this host.
    Fault,
}

/// One property of the host.
#[derive(Debug, Serialize)]
struct Check {
    name: String,
    verdict: Verdict,
    found: String,
    /// The command or the step that fixes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Ok, found: found.into(), remedy: None }
    }

    fn note(name: impl Into<String>, found: impl Into<String>, remedy: Option<&str>) -> Self {
        Self { verdict: Verdict::Note, remedy: remedy.map(str::to_owned), ..Self::ok(name, found) }
    }

    fn fault(name: impl Into<String>, found: impl Into<String>, remedy: &str) -> Self {
        Self { verdict: Verdict::Fault, remedy: Some(remedy.to_owned()), ..Self::ok(name, found) }
    }
}

/// The JSON object that `hwvmm doctor --json` prints.
#[derive(Debug, Serialize)]
struct Report {
    schema: u32,
    can_run_linux: bool,
    module: Option<&'static str>,
    nested: bool,
    mmu: &'static str,
    checks: Vec<Check>,
}

pub(super) fn run(args: &Args) -> ExitCode {
    // KVM has threads.
    let own_view = OwnView::try_out();
    let report = examine(&args.kvm, &Host::at(Path::new("/")), &own_view);
    let printed = if args.json {
        print_json(&report)
    } else {
        let colours = if io::stdout().is_terminal() { Colours::Ansi } else { Colours::None };
        print_all(render(&report, colours).as_bytes())
    };
    if report.can_run_linux { printed } else { ExitCode::from(crate::exit::end::status::FAILURE) }
}

fn examine(kvm: &Path, host: &Host, own_view: &Result<OwnView, ViewError>) -> Report {
    let mut checks = vec![Check::ok("kernel", host.kernel())];
    checks.push(module_check(host));
    let can_run_linux = match System::open(kvm) {
        Ok(system) => {
            checks.push(Check::ok(kvm.shown().to_string(), "opens, API version 12"));
            let trial = trial_checks(&system, host);
            let works = trial.iter().all(|check| check.verdict != Verdict::Fault);
            checks.extend(trial);
            let caps = capability_checks(&system, host.kernel().parse().ok());
            let complete = caps.iter().all(|check| check.verdict != Verdict::Fault);
            checks.extend(caps);
            works && complete
        }
        Err(error) => {
            checks.push(open_fault(kvm, &error, host));
            false
        }
    };
    checks.extend(page_checks(host));
    checks.extend(interrupt_checks(host));
    checks.extend(sandbox_checks(&Support::of_this_kernel()));
    checks.push(view_check(own_view));
    Report {
        schema: 1,
        can_run_linux,
        module: host.vendor_module(),
        nested: host.is_virtual(),
        mmu: host.mmu().name(),
        checks,
    }
}

fn module_check(host: &Host) -> Check {
    let nested = if host.is_virtual() {
        "this host is a virtual machine: each exit costs 10 to 50 times more"
    } else {
        "bare metal"
    };
    match host.vendor_module() {
        None if host.has_virtualization() => {
            Check::fault("module", "no vendor module of KVM is loaded", "modprobe kvm_intel || modprobe kvm_amd")
        }
        None => Check::fault(
            "module",
            "no vendor module of KVM, and the processor shows no virtualization",
            "turn it on in the firmware (VT-x, SVM); in a virtual machine, ask for nested virtualization; or use scripts/lab",
        ),
        Some(name @ "kvm_pvm") => Check::note(
            "module",
            format!("{name}: software virtualization, {}; {nested}", host.mmu().name()),
            Some("for Linux use a host with kvm_intel or kvm_amd, or scripts/lab (tiny guests run here)"),
        ),
        Some(name) => match host.mmu() {
            Mmu::Shadow => Check::note(
                "module",
                format!("{name}, shadow paging; {nested}"),
                Some(if name == "kvm_amd" {
                    "modprobe -r kvm_amd; modprobe kvm_amd npt=1"
                } else {
                    "modprobe -r kvm_intel; modprobe kvm_intel ept=1"
                }),
            ),
            mmu => Check::ok("module", format!("{name}, {}; {nested}", mmu.name())),
        },
    }
}

fn open_fault(kvm: &Path, error: &OpenError, host: &Host) -> Check {
    let remedy = match error {
        OpenError::Missing(_) if host.has_virtualization() => "modprobe kvm_intel || modprobe kvm_amd",
        OpenError::Missing(_) => "have /dev/kvm passed in, or use scripts/lab",
        OpenError::Permission(_) => "sudo usermod -aG kvm $USER, then log in again",
        OpenError::Other(..) | OpenError::Version(..) => "see `ls -l` and `dmesg | grep -i kvm`",
    };
    Check::fault(kvm.shown().to_string(), chain(error), remedy)
}

/// The trial's steps: those that worked, the one that failed, those not reached.
fn trial_checks(system: &System, host: &Host) -> Vec<Check> {
    let trial = run_trial(system);
    let remedy = match host.vendor_module() {
        Some("kvm_pvm") => {
            "kvm_pvm emulates instructions, and not all that Linux needs: use kvm_intel or kvm_amd, or scripts/lab"
        }
        _ => "see `dmesg | grep -i kvm`; in a virtual machine, ask the host for nested virtualization",
    };
    let mut checks: Vec<Check> =
        STEPS.iter().take(trial.done).map(|step| Check::ok(format!("vCPU: {step}"), "works")).collect();
    if let (Some(failure), Some(step)) = (&trial.failure, STEPS.get(trial.done)) {
        checks.push(Check::fault(format!("vCPU: {step}"), chain(failure), remedy));
        let not_reached = STEPS.iter().skip(trial.done + 1);
        checks.extend(not_reached.map(|step| Check::note(format!("vCPU: {step}"), "not tried", None)));
    }
    checks
}

fn capability_checks(system: &System, kernel: Option<KernelVersion>) -> Vec<Check> {
    let check = |capability: &Capability| {
        if system.capability(capability.number) > 0 {
            return Check::ok(capability.name, "available");
        }
        missing_capability(capability, kernel)
    };
    USED.iter().map(check).collect()
}

/// The check of a capability that is missing on a host with this kernel.
fn missing_capability(capability: &Capability, kernel: Option<KernelVersion>) -> Check {
    let Capability { name, need, lost, since, .. } = *capability;
    let too_old = since.zip(kernel).is_some_and(|(since, kernel)| kernel < since);
    let reason = match since {
        Some(since) if too_old => format!(" (before Linux {since})"),
        Some(since) => format!(" (in Linux since {since}, but not in this host's KVM)"),
        None => String::new(),
    };
    let found = format!("missing: {lost}{reason}");
    match need {
        Need::Required if too_old => Check::fault(name, found, "use a newer kernel on the host"),
        Need::Required => Check::fault(name, found, "use a host with kvm_intel or kvm_amd, or a newer kernel"),
        Need::Useful => Check::note(name, found, None),
    }
}

fn page_checks(host: &Host) -> Vec<Check> {
    let transparent = match host.transparent_huge_pages().as_deref() {
        Some(mode @ ("always" | "madvise")) => Check::ok("transparent huge pages", mode),
        Some(mode) => Check::note(
            "transparent huge pages",
            format!("{mode}: guest memory comes in small pages, and first touches cost 500 times the exits"),
            Some("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
        ),
        None => Check::note("transparent huge pages", "this kernel has none", None),
    };
    let pages = host.huge_pages().into_iter().map(|HugePages { size_kib, free, total }| {
        let size =
            if size_kib >= 1 << 20 { format!("{} GiB", size_kib >> 20) } else { format!("{} MiB", size_kib >> 10) };
        Check::ok(format!("huge pages of {size}"), format!("{free} free of {total} (for -m SIZE,hugepages=)"))
    });
    std::iter::once(transparent).chain(pages).collect()
}

/// Whether guests get interrupts without exits. None where the host does not say.
fn interrupt_checks(host: &Host) -> Vec<Check> {
    const NAME: &str = "interrupts";
    let apic = match host.apic_virtualization() {
        ApicVirtualization::Unknown => return Vec::new(),
        ApicVirtualization::Full => Check::ok(NAME, "reach a running guest without an exit"),
        ApicVirtualization::XapicOnly => Check::note(
            NAME,
            "AVIC without x2AVIC: accesses to an x2APIC, which guests have by default, still exit",
            Some("where IPIs between vCPUs matter, hwvmm run --tune x2apic=off"),
        ),
        ApicVirtualization::Off(parameter) => Check::note(
            NAME,
            format!("each one for a running guest is an exit ({parameter} is off, or the processor has none)"),
            Some(match parameter {
                "avic" => "modprobe -r kvm_amd; modprobe kvm_amd avic=1, if the processor has it",
                _ => "modprobe -r kvm_intel; modprobe kvm_intel enable_apicv=1, if the processor has it",
            }),
        ),
    };
    let has_apic = !matches!(host.apic_virtualization(), ApicVirtualization::Off(_));
    let timer = match host.posts_timers() {
        Some(true) if has_apic => Some(Check::ok("timer interrupts", "without an exit, with --tune disable-hlt=on")),
        // Only of use for guests with processors of their own.
        Some(false) if has_apic => Some(Check::ok(
            "timer interrupts",
            "with an exit each; without, for --tune disable-hlt=on: nohz_full= for the vCPUs' processors on this kernel's command line",
        )),
        _ => None,
    };
    std::iter::once(apic).chain(timer).collect()
}

/// What the kernel has for the sandbox (`hwvmm run --sandbox`).
fn sandbox_checks(support: &Support) -> [Check; 2] {
    let landlock = match &support.landlock_abi {
        Ok(abi @ 6..) => Check::ok("Landlock", format!("ABI {abi}")),
        Ok(abi) => {
            let found =
                format!("ABI {abi}: 4 (Linux 6.7) confines TCP too, 6 (Linux 6.12) abstract sockets and signals");
            Check::note("Landlock", found, Some("use a newer kernel on the host"))
        }
        Err(error) => {
            let found = format!("none ({error}): what a run opens is not confined to its own files");
            Check::note("Landlock", found, Some("add landlock to lsm= on the kernel's command line (Linux 5.13)"))
        }
    };
    let lost = "system calls of a run are not confined";
    let seccomp = match &support.seccomp_actions {
        Ok(actions) if support.has_seccomp("trap") => Check::ok("seccomp", actions.join(", ")),
        Ok(actions) => Check::note("seccomp", format!("without trap ({}): {lost}", actions.join(", ")), None),
        Err(error) => {
            Check::note("seccomp", format!("unknown ({error}): {lost}"), Some("CONFIG_SECCOMP_FILTER, Linux 4.14"))
        }
    };
    [landlock, seccomp]
}

/// What a run gets of a mount namespace of its own.
fn view_check(own_view: &Result<OwnView, ViewError>) -> Check {
    const NAME: &str = "mount namespace";
    match own_view {
        Ok(OwnView { right, shares: Ok(()) }) => Check::ok(NAME, format!("by {right}")),
        Ok(OwnView { right, shares: Err(why) }) => {
            let found = format!("by {right}, but {}", chain(why));
            Check::note(NAME, found, Some("a newer kernel; in a container, permit open_tree and mount_setattr"))
        }
        Err(why) => {
            let setting = OwnView::refusing_setting().map(|setting| format!("; {setting}")).unwrap_or_default();
            let lost = "with --share, chmod and touch can reach files outside of the shared folders";
            let found = format!("none ({}{setting}): {lost}", chain(why));
            Check::note(NAME, found, Some("permit user namespaces to users, or run hwvmm as root"))
        }
    }
}

/// How verdicts are coloured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colours {
    /// With the escape sequences of terminals (ECMA-48).
    Ansi,
    /// Plain text, without escape sequences.
    None,
}

fn render(report: &Report, colours: Colours) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let (word, code) = match check.verdict {
            Verdict::Ok => ("ok   ", "32"),
            Verdict::Note => ("note ", "33"),
            Verdict::Fault => ("FAULT", "31"),
        };
        let word = match colours {
            Colours::Ansi => format!("\x1b[{code}m{word}\x1b[0m"),
            Colours::None => word.to_owned(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{word} {:<24} {}", check.name, check.found);
        if let Some(remedy) = &check.remedy {
            let _ = writeln!(text, "      {:<24} fix: {remedy}", "");
        }
    }
    let _ = match report.can_run_linux {
        true => writeln!(text, "Linux guests can run on this host."),
        false => writeln!(text, "Linux guests cannot run on this host's KVM; scripts/lab runs them without it."),
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::ViewRight;

    #[test]
    fn without_kvm_every_fault_has_a_remedy() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let report = examine(Path::new("/no/such/kvm"), &Host::at(root.path()), &Err(ViewError::Trial("why")));
        assert!(!report.can_run_linux);
        let faults: Vec<_> = report.checks.iter().filter(|check| check.verdict == Verdict::Fault).collect();
        assert!(faults.len() >= 2 && faults.iter().all(|check| check.remedy.is_some()), "{faults:?}");
        let text = render(&report, Colours::None);
        assert!(text.contains("FAULT") && text.contains("fix:") && !text.contains('\x1b'));
        assert!(serde_json::to_string(&report).expect("JSON").contains("\"can_run_linux\":false"));
    }

    #[test]
    fn interrupts_that_exit_are_noted_with_a_remedy() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        let checks = || interrupt_checks(&Host::at(root.path()));
        assert!(checks().is_empty(), "nothing is known");
        put("sys/module/kvm_amd/parameters/avic", "N\n");
        put("sys/module/kvm/parameters/pi_inject_timer", "1\n");
        let off = checks();
        assert!(off.len() == 1 && off[0].verdict == Verdict::Note, "no timers without AVIC: {off:?}");
        assert!(off[0].remedy.as_ref().is_some_and(|remedy| remedy.contains("avic=1")), "{off:?}");
        put("sys/module/kvm_amd/parameters/avic", "Y\n");
        let xapic = checks();
        assert!(
            xapic.len() == 2 && xapic[0].remedy.as_ref().is_some_and(|text| text.contains("x2apic=off")),
            "{xapic:?}"
        );
        assert!(xapic[1].found.contains("disable-hlt=on") && !xapic[1].found.contains("nohz_full"), "{xapic:?}");
        put("proc/cpuinfo", "flags: svm x2avic\n");
        put("sys/module/kvm/parameters/pi_inject_timer", "0\n");
        let full = checks();
        assert!(full.iter().all(|check| check.verdict == Verdict::Ok), "{full:?}");
        assert!(full[1].found.contains("nohz_full"), "{full:?}");
    }

    #[test]
    fn what_a_kernel_lacks_for_the_sandbox_is_said() {
        let none = || io::Error::from(io::ErrorKind::Unsupported);
        let words = |actions: &str| Ok(actions.split(' ').map(str::to_owned).collect());
        let there = Support { landlock_abi: Ok(7), seccomp_actions: words("kill trap") };
        let [landlock, seccomp] = sandbox_checks(&there);
        assert_eq!((landlock.verdict, landlock.found.as_str()), (Verdict::Ok, "ABI 7"));
        assert_eq!((seccomp.verdict, seccomp.found.as_str()), (Verdict::Ok, "kill, trap"));
        for support in [
            Support { landlock_abi: Ok(3), seccomp_actions: words("kill") },
            Support { landlock_abi: Err(none()), seccomp_actions: Err(none()) },
        ] {
            let checks = sandbox_checks(&support);
            assert!(checks.iter().all(|check| check.verdict == Verdict::Note), "{checks:?}");
        }
        let refused = || ViewError::Step { what: "write".into(), source: none() };
        let view = |shares| view_check(&Ok(OwnView { right: ViewRight::Own, shares }));
        assert_eq!((view(Ok(())).verdict, view(Ok(())).found.as_str()), (Verdict::Ok, "by CAP_SYS_ADMIN"));
        for check in [view(Err(refused())), view_check(&Err(refused()))] {
            assert!(check.verdict == Verdict::Note && check.found.contains("cannot write: unsupported"), "{check:?}");
        }
    }

    #[test]
    fn a_missing_capability_is_not_blamed_on_a_kernel_that_has_it() {
        let capability = USED.iter().find(|capability| capability.name == "PRE_FAULT_MEMORY").expect("it is used");
        let found = |kernel: Option<&str>| {
            missing_capability(capability, kernel.map(|text| text.parse().expect("a version"))).found
        };
        assert!(found(Some("6.1.0-56-amd64")).ends_with("(before Linux 6.11)"));
        for kernel in [Some("6.18.44"), Some("6.11.0"), Some("10.0"), None] {
            assert!(found(kernel).ends_with("(in Linux since 6.11, but not in this host's KVM)"), "{kernel:?}");
        }
    }
}
