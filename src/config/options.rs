//! The options of `hwvmm run`: the same names on the command line and in a `--config` file.

use super::devices::{BalloonConfig, DiskConfig, NetConfig, RngConfig, ShareConfig, Transport, VsockConfig};
use super::values::{Cpus, Memory, ValueError, parse_console, parse_duration, parse_serial};
use super::{
    BootProtocol, Budget, ConfigError, ConsoleTarget, MmuChoice, OnReboot, ProfileLevel, RunConfig, Slack, StatsFormat,
    Unpack,
};
use crate::tune::{Lever, Tune};
use clap::Args;
use serde::Deserialize;
use serde::de::Deserializer;
use std::path::PathBuf;

/// The kernel command line where none is given: the consoles that there are, a panic ends the run, and what levers add to
/// keep the guest from looking for what is not there.
fn default_cmdline(config: &RunConfig) -> String {
    let tune = &config.tune;
    let serial = config.serial.first().is_some_and(Option::is_some);
    let pci = config.transport == Transport::Pci && config.virtio_devices() > 0;
    // Linux numbers them in order, whichever there are.
    let uarts = format!("8250.nr_uarts={}", config.serial.iter().flatten().count());
    let words = [
        (serial, "console=ttyS0"),
        (config.console.is_some(), "console=hvc0"),
        (true, "panic=-1"),
        (!pci && tune.wants(Lever::PciProbing), "pci=conf1,noearly"),
        (pci && tune.wants(Lever::PciProbing), "pci=noearly"),
        (tune.wants(Lever::UartCount), &*uarts),
        // With more vCPUs the others would go on after a halt, and nobody would see that the guest is at its end.
        (tune.wants(Lever::AcpiReset) && config.cpus.count() == 1, "reboot=f"),
    ];
    words.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect::<Vec<_>>().join(" ")
}

/// A kernel command line, and the words that are added to it.
fn cmdline(mut cmdline: String, added: &[String]) -> String {
    for words in added {
        if !cmdline.is_empty() {
            cmdline.push(' ');
        }
        cmdline.push_str(words);
    }
    cmdline
}

/// Options as given; what is not given is `None`.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RunOptions {
    /// The kernel: a distribution's vmlinuz (bzImage), an ELF vmlinux, or a multiboot ELF
    #[arg(value_name = "KERNEL")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(short, long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Guest memory: SIZE[,hugepages=thp|off|2M|1G][,prefault=on|off] [default: 512M]
    #[arg(short, long, value_name = "SIZE")]
    #[serde(default, deserialize_with = "text")]
    pub memory: Option<String>,

    /// vCPUs: N[,sockets=S][,cores=C][,threads=T] [default: 1]
    #[arg(short, long, value_name = "N")]
    #[serde(default, deserialize_with = "text")]
    pub cpus: Option<String>,

    /// Kernel command line, in place of the default, which multiboot programs do not get [default: "console=ttyS0 panic=-1
    /// pci=conf1,noearly 8250.nr_uarts=1 reboot=f"; no reboot= with more vCPUs; console=hvc0 with --console virtio; pci=noearly with PCI devices; see --tune help]
    #[arg(short = 'p', long, value_name = "TEXT")]
    pub cmdline: Option<String>,

    /// Words added to the kernel command line (again for more)
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    #[serde(default)]
    pub append: Vec<String>,

    /// Multiboot module: FILE[,ARGUMENTS] (again for more)
    #[arg(long, value_name = "FILE")]
    #[serde(default)]
    pub module: Vec<String>,

    /// A UART: N=stdio, N=file:PATH or N=null for N from 1 (0x3f8) to 4 (0x2e8); none [default: 1=stdio]
    #[arg(long, value_name = "N=TARGET")]
    #[serde(default)]
    pub serial: Vec<String>,

    /// The console: serial, or a virtio console (hvc0) on virtio[=stdio|file:PATH|null] [default: serial]
    #[arg(long, value_name = "WHAT")]
    pub console: Option<String>,

    /// A disk: PATH, and of these what is wanted: ,format=auto|raw|qcow2 ,readonly=on ,direct=on ,queues=N ,serial=S
    /// ,id=S ,werror=report|stop ,io=auto|plain (again for more)
    #[arg(short, long, value_name = "PATH")]
    #[serde(default)]
    pub disk: Vec<String>,

    /// A network card: tap=NAME[,mac=A][,queues=N][,vhost=on], or user[,hostfwd=tcp:127.0.0.1:2222-:22]... (again for
    /// more)
    #[arg(short, long, value_name = "BACKEND")]
    #[serde(default)]
    pub net: Vec<String>,

    /// Entropy from the host, at most RATE bytes a second where it is given
    #[arg(long, num_args = 0..=1, default_missing_value = "on", require_equals = true, value_name = "RATE")]
    #[serde(default, deserialize_with = "text")]
    pub rng: Option<String>,

    /// Streams between guest and host (vsock): cid=N,uds=PATH. Host programs connect to PATH and say "CONNECT PORT"; the
    /// guest's connections go to PATH_PORT. Or cid=N,vhost=on, for the host's own vsock sockets
    #[arg(long, value_name = "cid=N,uds=PATH")]
    pub vsock: Option<String>,

    /// A memory balloon that takes SIZE from the guest [default: 0], and gives the host what the guest has free
    #[arg(long, num_args = 0..=1, default_missing_value = "on", require_equals = true, value_name = "SIZE")]
    #[serde(default, deserialize_with = "text")]
    pub balloon: Option<String>,

    /// A folder for the guest (virtiofs): tag=NAME,path=DIR[,readonly=on] (again for more)
    #[arg(long, value_name = "tag=NAME,path=DIR")]
    #[serde(default)]
    pub share: Vec<String>,

    /// A Unix socket to control the running machine by, with `hwvmm ctl`
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,

    /// What carries virtio devices [default: mmio for consoles, entropy and balloon alone: fewest exits at boot; else pci:
    /// fewest at work]
    #[arg(long, value_name = "BUS")]
    pub transport: Option<Transport>,

    /// Who unpacks a bzImage: hwvmm, or the kernel's own decompressor in the guest [default: host]
    #[arg(long, value_name = "WHO")]
    pub unpack: Option<Unpack>,

    /// How the kernel is entered [default: auto]
    #[arg(long, value_name = "PROTOCOL")]
    pub boot: Option<BootProtocol>,

    /// Where unpacked kernels are kept for the next run; "off" keeps none [default: ~/.cache/hwvmm]
    #[arg(long, value_name = "DIR")]
    pub kernel_cache: Option<String>,

    /// End the run after this time (status 124): 30s, 500ms, 2m
    #[arg(long, value_name = "TIME")]
    #[serde(default, deserialize_with = "text")]
    pub timeout: Option<String>,

    /// End the run with status 0 when a line of the console matches; 38 if the guest ends before
    #[arg(long, value_name = "REGEX")]
    pub expect: Option<String>,

    /// What a reset of the guest does [default: exit]
    #[arg(long, value_name = "WHAT")]
    pub on_reboot: Option<OnReboot>,

    /// isa-debug-exit at port 0xf4: a guest's write of V ends the run with status V*2+1
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub debug_exit: Option<bool>,

    /// What kvm-unit-tests want of a machine: QEMU's test device (ports 0xe0 and 0x2000, memory at 0xff000000), its fw_cfg
    /// (0x510), and interrupt controllers as a PC's firmware leaves them
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub testdev: Option<bool>,

    /// KVM's MMU: auto (what this host has), npt (nested paging; ept is the same), or shadow. KVM decides it for the whole
    /// host (see hwvmm mmu): the other one is an error [default: auto]
    #[arg(long, value_name = "MMU")]
    pub mmu: Option<MmuChoice>,

    /// A watchdog (IB700, ports 0x441 and 0x443): a guest that starts and neglects it ends with status 36
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub watchdog: Option<bool>,

    /// Let MSRs that KVM does not know exit to hwvmm, so that they are counted by number
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub trap_msrs: Option<bool>,

    /// After the run, print exits by reason and device, and KVM's own figures
    #[arg(long, num_args = 0..=1, default_missing_value = "text", require_equals = true, value_name = "FORMAT")]
    pub stats: Option<StatsFormat>,

    /// Write the statistics to this file, not to stderr
    #[arg(long, value_name = "FILE")]
    pub stats_out: Option<PathBuf>,

    /// After the run, print who made the guest exit, where, at what cost, and what to do: the userspace exits, or all
    /// VM exits too [default with no LEVEL: full]
    #[arg(long, num_args = 0..=1, default_missing_value = "full", require_equals = true, value_name = "LEVEL")]
    pub profile: Option<ProfileLevel>,

    /// Write the profile to this file, for `hwvmm report` (implies --profile)
    #[arg(long, value_name = "FILE")]
    pub profile_out: Option<PathBuf>,

    /// At most so many exits, else the run ends with status 39: total=4500,userspace=100,pio=50,npf=100,port.0x3f8=0,
    /// or a file with such lines (implies --profile)
    #[arg(long, value_name = "LIMITS")]
    pub budget: Option<String>,

    /// At most as many exits of each kind as in this profile, but for the host's interrupts
    #[arg(long, value_name = "FILE")]
    pub budget_from: Option<PathBuf>,

    /// How much more than in --budget-from there may be [default: 2%]
    #[arg(long, value_name = "PERCENT")]
    #[serde(default, deserialize_with = "text")]
    pub slack: Option<String>,

    /// The guest kernel's symbols, an ELF or a System.map, where the kernel itself has none
    #[arg(long, value_name = "FILE")]
    pub symbols: Option<PathBuf>,

    /// Levers against exits: NAME=on|off|auto,...; all=off; "help" lists them with what they are worth (again for more)
    #[arg(long, value_name = "LIST")]
    #[serde(default)]
    pub tune: Vec<String>,

    /// KVM's device [default: /dev/kvm]
    #[arg(long, value_name = "PATH")]
    pub kvm: Option<PathBuf>,
}

/// A text, or a number as people write it in TOML (`cpus = 4`).
fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Text {
        Words(String),
        Number(i64),
    }
    Ok(Some(match Text::deserialize(deserializer)? {
        Text::Words(words) => words,
        Text::Number(number) => number.to_string(),
    }))
}

fn value<T>(
    option: &'static str,
    given: Option<&String>,
    parse: impl FnOnce(&str) -> Result<T, ValueError>,
) -> Result<Option<T>, ConfigError> {
    let Some(text) = given else { return Ok(None) };
    parse(text).map(Some).map_err(|source| ConfigError::Value { option, value: text.clone(), source })
}

fn list<T>(
    option: &'static str,
    given: &[String],
    parse: impl Fn(&str) -> Result<T, ValueError>,
) -> Result<Vec<T>, ConfigError> {
    let one = |text: &String| parse(text).map_err(|source| ConfigError::Value { option, value: text.clone(), source });
    given.iter().map(one).collect()
}

impl RunOptions {
    /// These options, and those of `file` where these say nothing. Lists of both are joined, the file's first.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        let join = |mut first: Vec<String>, second: Vec<String>| {
            first.extend(second);
            first
        };
        Self {
            kernel: self.kernel.or(file.kernel),
            initrd: self.initrd.or(file.initrd),
            memory: self.memory.or(file.memory),
            cpus: self.cpus.or(file.cpus),
            cmdline: self.cmdline.or(file.cmdline),
            append: join(file.append, self.append),
            module: join(file.module, self.module),
            serial: join(file.serial, self.serial),
            console: self.console.or(file.console),
            disk: join(file.disk, self.disk),
            net: join(file.net, self.net),
            rng: self.rng.or(file.rng),
            vsock: self.vsock.or(file.vsock),
            balloon: self.balloon.or(file.balloon),
            share: join(file.share, self.share),
            api: self.api.or(file.api),
            transport: self.transport.or(file.transport),
            unpack: self.unpack.or(file.unpack),
            boot: self.boot.or(file.boot),
            kernel_cache: self.kernel_cache.or(file.kernel_cache),
            timeout: self.timeout.or(file.timeout),
            expect: self.expect.or(file.expect),
            on_reboot: self.on_reboot.or(file.on_reboot),
            debug_exit: self.debug_exit.or(file.debug_exit),
            testdev: self.testdev.or(file.testdev),
            mmu: self.mmu.or(file.mmu),
            watchdog: self.watchdog.or(file.watchdog),
            trap_msrs: self.trap_msrs.or(file.trap_msrs),
            stats: self.stats.or(file.stats),
            stats_out: self.stats_out.or(file.stats_out),
            profile: self.profile.or(file.profile),
            profile_out: self.profile_out.or(file.profile_out),
            budget: self.budget.or(file.budget),
            budget_from: self.budget_from.or(file.budget_from),
            slack: self.slack.or(file.slack),
            symbols: self.symbols.or(file.symbols),
            tune: join(file.tune, self.tune),
            kvm: self.kvm.or(file.kvm),
        }
    }

    /// The configuration, checked, with the defaults filled in.
    ///
    /// # Errors
    /// [`ConfigError`], naming the option and its value.
    pub fn into_config(self) -> Result<RunConfig, ConfigError> {
        let memory = value("memory", self.memory.as_ref(), Memory::parse)?.unwrap_or_default();
        let cpus = value("cpus", self.cpus.as_ref(), Cpus::parse)?.unwrap_or_default();
        let timeout = value("timeout", self.timeout.as_ref(), parse_duration)?;
        let console = value("console", self.console.as_ref(), parse_console)?.flatten();
        let on_stdio = console == Some(ConsoleTarget::Stdio);
        let disks = list("disk", &self.disk, DiskConfig::parse)?;
        let nets = list("net", &self.net, NetConfig::parse)?;
        let rng = value("rng", self.rng.as_ref(), RngConfig::parse)?;
        let vsock = value("vsock", self.vsock.as_ref(), VsockConfig::parse)?;
        let balloon = value("balloon", self.balloon.as_ref(), BalloonConfig::parse)?;
        let shares = list("share", &self.share, ShareConfig::parse)?;
        let busy = !(disks.is_empty() && nets.is_empty() && shares.is_empty() && vsock.is_none());
        let transport = self.transport.unwrap_or(if busy { Transport::Pci } else { Transport::Mmio });
        let serial = parse_serial(&self.serial, on_stdio).map_err(|(value, source)| ConfigError::Value {
            option: "serial",
            value,
            source,
        })?;
        let module = |text: &String| {
            let (file, arguments) = text.split_once(',').unwrap_or((text, ""));
            (PathBuf::from(file), arguments.to_owned())
        };
        let mut tune = Tune::default();
        for text in &self.tune {
            tune.set(text).map_err(|error| ConfigError::Tune(text.clone(), error))?;
        }
        let compile = |pattern: &str| {
            let error = |error| ConfigError::Expect(pattern.to_owned(), error);
            regex::bytes::Regex::new(pattern).map(super::Pattern).map_err(error)
        };
        let expect = self.expect.as_deref().map(compile).transpose()?;
        let limits =
            |text: &str| Budget::parse(text).map_err(|error| ConfigError::Budget("budget", text.to_owned(), error));
        let budget = self.budget.as_deref().map(limits).transpose()?;
        let slack = self.slack.as_deref().unwrap_or("2%");
        let slack = Slack::parse(slack).map_err(|error| ConfigError::Budget("slack", slack.to_owned(), error))?;
        let wants_profile = self.profile_out.is_some() || self.budget.is_some() || self.budget_from.is_some();
        let mut config = RunConfig {
            kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
            initrd: self.initrd,
            modules: self.module.iter().map(module).collect(),
            cmdline: String::new(),
            arguments: String::new(),
            memory,
            cpus,
            serial,
            console,
            transport,
            disks,
            nets,
            rng,
            vsock,
            balloon,
            shares,
            api: self.api,
            unpack: self.unpack.unwrap_or(if tune.wants(Lever::HostUnpack) { Unpack::Host } else { Unpack::Guest }),
            boot: self.boot.unwrap_or_default(),
            kernel_cache: kernel_cache(self.kernel_cache.as_deref()),
            debug_exit: self.debug_exit.unwrap_or(false),
            testdev: self.testdev.unwrap_or(false),
            mmu: self.mmu.unwrap_or_default(),
            watchdog: self.watchdog.unwrap_or(false),
            trap_msrs: self.trap_msrs.unwrap_or(false),
            on_reboot: self.on_reboot.unwrap_or_default(),
            timeout,
            expect,
            stats: self.stats.or(self.stats_out.as_ref().map(|_| StatsFormat::Json)),
            stats_out: self.stats_out,
            profile: self.profile.or(wants_profile.then_some(ProfileLevel::Full)),
            profile_out: self.profile_out,
            budget,
            budget_from: self.budget_from,
            slack,
            symbols: self.symbols,
            tune,
            kvm: self.kvm.unwrap_or_else(|| PathBuf::from("/dev/kvm")),
        };
        config.arguments = cmdline(self.cmdline.clone().unwrap_or_default(), &self.append);
        config.cmdline = cmdline(self.cmdline.unwrap_or_else(|| default_cmdline(&config)), &self.append);
        Ok(config)
    }
}

/// The XDG cache folder's `hwvmm`, for what can be made again.
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("hwvmm"))
}

/// The folder for unpacked kernels: what was asked for, else the XDG cache folder's `hwvmm`.
fn kernel_cache(asked: Option<&str>) -> Option<PathBuf> {
    match asked {
        Some("off") => None,
        Some(path) => Some(PathBuf::from(path)),
        None => cache_folder(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_toml(text: &str) -> RunOptions {
        toml::from_str(text).expect("valid TOML")
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = from_toml("kernel = 'k'\nmemory = '1G'\ncpus = 4\nappend = ['quiet']\nwatchdog = true");
        let flags = RunOptions {
            memory: Some("256M".into()),
            append: vec!["debug".into()],
            watchdog: Some(false),
            ..RunOptions::default()
        };
        let config = flags.or(file).into_config().expect("valid");
        assert_eq!(config.memory.bytes, 256 << 20);
        assert_eq!(config.cpus.count(), 4);
        assert_eq!(config.cmdline, "console=ttyS0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 quiet debug");
        assert!(!config.watchdog);
    }

    #[test]
    fn the_default_command_line_follows_the_devices() {
        let of = |text: &str| from_toml(&format!("kernel = 'k'\n{text}")).into_config().expect("valid");
        assert_eq!(of("disk = ['d']").cmdline, "console=ttyS0 panic=-1 pci=noearly 8250.nr_uarts=1 reboot=f");
        assert_eq!(of("disk = ['d']\ntune = ['all=off']").cmdline, "console=ttyS0 panic=-1");
        assert!(!of("cpus = 2").cmdline.contains("reboot"), "a halt must stop all vCPUs");
        let mmio = of("disk = ['d']\ntransport = 'mmio'\ntune = ['uart-count=off']");
        assert_eq!(mmio.cmdline, "console=ttyS0 panic=-1 pci=conf1,noearly reboot=f");
        assert_eq!(
            of("console = 'virtio'").cmdline,
            "console=hvc0 panic=-1 pci=conf1,noearly 8250.nr_uarts=0 reboot=f"
        );
        let both = of("console = 'virtio'\nserial = ['1=null']\ntransport = 'mmio'\nrng = 65536");
        assert_eq!(both.cmdline, "console=ttyS0 console=hvc0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 reboot=f");
        assert_eq!(both.rng.and_then(|rng| rng.bytes_per_second), Some(65536));
        let error = from_toml("kernel = 'k'\nconsole = 'virtio'\nserial = ['1=stdio']").into_config();
        assert!(error.expect_err("two on stdio").to_string().contains("virtio=file:"));
    }

    #[test]
    fn errors_name_option_value_and_remedy() {
        assert!(matches!(RunOptions::default().into_config(), Err(ConfigError::NoKernel)));
        let bad = from_toml("kernel = 'k'\nmemory = '1M'").into_config().expect_err("too small").to_string();
        assert!(bad.contains("--memory 1M") && bad.contains("16M"), "{bad}");
        let unknown = toml::from_str::<RunOptions>("colour = 1").expect_err("unknown").to_string();
        assert!(unknown.contains("colour") && unknown.contains("kernel-cache"), "{unknown}");
    }

    #[test]
    fn the_command_line_is_replaced_or_added_to() {
        let config = from_toml("kernel = 'k'\ncmdline = ''\nappend = ['a', 'b']").into_config().expect("valid");
        assert_eq!(config.cmdline, "a b");
    }
}
