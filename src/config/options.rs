//! The options of `hwvmm run`. One table defines each: its names, its help text, how it is read from the command line and
//! from TOML, its default, and the field of [`RunConfig`] that it becomes.

use super::budget::{Budget, Slack};
use super::choices::{
    BootProtocol, KernelCache, Levers, MmuChoice, OnReboot, ProfileLevel, SandboxMode, StatsFormat, Unpack,
};
use super::command::{
    AgentTask, CommandOptions, CommandRelated, EnvChoice, PutChoice, Requirement, RootChoice, UserChoice,
};
use super::console::{ConsoleChoice, ConsoleTarget, Pattern, SerialChoice, UARTS, uarts};
use super::contradictions::{Related, check};
use super::devices::{BalloonConfig, DiskConfig, NetConfig, RngConfig, ShareConfig, Toggle, Transport, VsockConfig};
use super::error::ConfigError;
use super::given::{Given, from_toml};
use super::machine::{Cpus, Memory};
use super::module::ModuleConfig;
use super::snapshot_at::SnapshotAt;
use super::value::Value;
use crate::tune::{Lever, Tune};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

/// Returns the help text of an option: what it is, and behind the first sentence of that the form of its values; whether it
/// can be given again; and its default.
fn help<T: Value, G: Given>(text: &str, default: Option<&str>) -> String {
    let mut help = text.trim().to_owned();
    if let Some(form) = T::usage() {
        let end = [". ", "; ", " ["].iter().filter_map(|mark| help.find(mark)).min().unwrap_or(help.len());
        // With spaces between the keys, so that the terminal's width can break the line.
        help.insert_str(end, &format!(": {}", form.replace("[,", " [,")));
    }
    if G::REPEATS {
        help += " (can be given again)";
    }
    if let Some(default) = default {
        help = format!("{help} [default: {default}]");
    }
    help
}

/// Defines the options. A row is
///
/// ```text
/// /// Help text
/// name: Option<Type>, [short, long] "VALUE";
/// ```
///
/// with `Vec<Type>` for an option that can be given again, and behind `"VALUE"`
///
/// - `or "text"`: the value that the option has if it is given without one (as `--stats`);
/// - `default "text"`: the default; the field of `RunConfig` then is a `Type`;
/// - `becomes Type = expression`: what the field of `RunConfig` is, with `given` for all options.
macro_rules! options {
    ($given:ident; $($heading:literal { $(
        $(#[doc = $text:literal])+
        $name:ident: $kind:ident<$type:ty>, [$($flag:tt)*] $value:literal $(or $missing:literal)?
        $(default $default:literal)? $(becomes $becomes:ty = $expression:expr)?;
    )* })*) => {
        /// The options as given on the command line or in a file; `None` or an empty list if not given.
        #[derive(clap::Args, serde::Deserialize, Clone, Debug, Default)]
        #[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
        pub struct RunOptions {
            $($(
                #[arg(
                    value_name = $value,
                    help_heading = $heading,
                    help = help::<$type, $kind<$type>>(concat!($($text),+), options!(@text $($default)?)),
                    value_parser = <$type as Value>::parser(),
                    $(num_args = 0..=1, default_missing_value = $missing, require_equals = true,)?
                    $($flag)*
                )]
                #[serde(deserialize_with = "from_toml")]
                pub(super) $name: $kind<$type>,
            )*)*
        }

        /// The configuration of a run: all options, checked, with their defaults.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct RunConfig {
            $($($(#[doc = $text])+ pub $name: options!(@type $kind<$type> $(default $default)? $(becomes $becomes)?),)*)*
        }

        impl RunOptions {
            /// The names of the options: the keys of a file.
            #[must_use]
            pub fn keys() -> Vec<String> {
                let names = [$($(stringify!($name)),*),*];
                names.map(|name| name.replace('_', "-")).to_vec()
            }

            fn joined(self, file: Self) -> Self {
                Self { $($($name: Given::merge(self.$name, file.$name),)*)* }
            }

            /// Checks the options and fills in the defaults.
            ///
            /// # Errors
            /// Returns an error if there is no kernel, or if options contradict each other.
            pub fn into_config(self) -> Result<RunConfig, ConfigError> {
                let $given = &self;
                let config = RunConfig {
                    $($($name: options!(@value $given.$name, $type $(, default $default)? $(, becomes $expression)?),)*)*
                };
                check(&Related {
                    share: &config.share,
                    disk: &config.disk,
                    seed: config.seed.as_deref(),
                    vsock: config.vsock.as_ref(),
                    api: config.api.as_deref(),
                    stats_out: config.stats_out.as_deref(),
                    profile_out: config.profile_out.as_deref(),
                    status_file: config.status_file.as_deref(),
                    kernel_log: config.kernel_log.as_deref(),
                    balloon: config.balloon,
                    memory: config.memory,
                })?;
                super::command::check(&CommandRelated {
                    task: $given.task(),
                    command: &config.command,
                    from: config.from.as_deref(),
                    expect: config.expect.as_ref(),
                    api: config.api.as_deref(),
                    root: &config.root,
                    rw: &config.rw,
                    env: &config.env,
                    workdir: config.workdir.as_deref(),
                    user: &config.user,
                    put: &config.put,
                    modules: config.modules.as_deref(),
                    tty: config.tty,
                    kernel_log: config.kernel_log.as_deref(),
                    initrd: config.initrd.as_deref(),
                    on_reboot: config.on_reboot,
                    vsock: config.vsock.as_ref(),
                    module: &config.module,
                })?;
                Ok(config)
            }
        }
    };
    (@text) => { None };
    (@text $default:literal) => { Some($default) };
    (@type $kind:ident<$type:ty>) => { $kind<$type> };
    (@type $kind:ident<$type:ty> default $default:literal) => { $type };
    (@type $kind:ident<$type:ty> becomes $becomes:ty) => { $becomes };
    (@value $given:ident.$name:ident, $type:ty) => { $given.$name.clone() };
    (@value $given:ident.$name:ident, $type:ty, default $default:literal) => {
        match $given.$name.clone() {
            Some(value) => value,
            None => <$type as Value>::parse(OsStr::new($default))?,
        }
    };
    (@value $given:ident.$name:ident, $type:ty, becomes $expression:expr) => { $expression };
}

options! {
    given;

    "Boot" {
        /// The kernel: a distribution's vmlinuz (bzImage), an ELF vmlinux, or a multiboot ELF
        kernel: Option<PathBuf>, [help_heading = None::<&str>] "KERNEL" becomes PathBuf = given.kernel_path()?;
        /// Go on from a snapshot that --template or `hwvmm ctl SOCKET snapshot` has made, in place of a boot; one of --template runs a
        /// COMMAND. Memory, vCPUs and devices are those of the snapshot; what consoles are connected to, the images of disks (--disk for each, as it was then), the control socket, time-outs and
        /// measurements are those of this run
        from: Option<PathBuf>, [long] "DIR";
        /// With --from: write down in DIR (file working-set) which pages of memory the guest uses, until it has run for this time or has ended.
        /// Later runs from DIR then have these pages ready before the guest runs (--tune working-set). The first run from a --template does it by itself
        record_working_set: Option<Duration>, [long] "TIME" or "10s" becomes Option<Duration> = given.recording()?;
        /// Take kernel, initrd and the kernel's parameters out of this disk image, which is a disk of the guest: as the image's boot
        /// loader would (grub.cfg, or /loader/entries; on ext2 to ext4 and FAT). The default parameters come behind the image's;
        /// --cmdline replaces both. A KERNEL that is a disk image means the same. A COMMAND has only the kernel and its modules from
        /// the image, which is read-only then
        kernel_from: Option<PathBuf>, [long, conflicts_with = "kernel"] "IMAGE";
        /// The entry of the image's boot loader: its number (0; 1>0 in a submenu), its title or its id [default: the boot loader's]
        entry: Option<String>, [long] "N|TITLE";
        /// Initial RAM disk
        initrd: Option<PathBuf>, [short, long] "FILE";
        /// Kernel command line, in place of the default, which multiboot kernels do not get [default: "console=ttyS0
        /// panic=-1 pci=conf1,noearly 8250.nr_uarts=1 reboot=f"; no reboot= with more than one vCPU; console=hvc0 with
        /// --console virtio; pci=noearly with PCI devices; see --tune help]
        cmdline: Option<String>, [short = 'p', long] "TEXT";
        /// Words added to the kernel command line
        append: Vec<String>, [short, long, allow_hyphen_values = true] "TEXT";
        /// Multiboot module
        module: Vec<ModuleConfig>, [long] "FILE";
        /// Boot protocol
        boot: Option<BootProtocol>, [long] "PROTOCOL" default "auto";
        /// Who unpacks a bzImage [default: host; guest with --tune host-unpack=off]
        unpack: Option<Unpack>, [long] "WHO" becomes Unpack = given.unpack.unwrap_or(
            if given.levers()?.wants(Lever::HostUnpack) { Unpack::Host } else { Unpack::Guest }
        );
        /// Folder that keeps unpacked kernels for the next run; "off" keeps none [default: ~/.cache/hwvmm]
        kernel_cache: Option<KernelCache>, [long] "DIR"
            becomes Option<PathBuf> = given.kernel_cache.clone().unwrap_or_default().folder();
    }

    "Machine" {
        /// Guest memory
        memory: Option<Memory>, [short, long] "SIZE" default "512M";
        /// vCPUs
        cpus: Option<Cpus>, [short, long] "N" default "1";
        /// MMU of KVM: auto (that of this host), npt (nested paging; ept is the same) or shadow. It is a setting of the whole
        /// host: if KVM uses the other one, the run is refused (see hwvmm mmu)
        mmu: Option<MmuChoice>, [long] "MMU" default "auto";
        /// Watchdog timer (IB700, ports 0x441 and 0x443): if the guest starts it and does not feed it, the run ends with
        /// status 36
        watchdog: Option<bool>, [long] "on|off" or "on" default "off";
        /// isa-debug-exit at port 0xf4: a write of V by the guest ends the run with status V*2+1
        debug_exit: Option<bool>, [long] "on|off" or "on" default "off";
        /// Devices for kvm-unit-tests: QEMU's test device (ports 0xe0 and 0x2000, memory at 0xff000000), its fw_cfg (0x510),
        /// and interrupt controllers in the state in which PC firmware leaves them
        testdev: Option<bool>, [long] "on|off" or "on" default "off";
        /// Unix socket by which `hwvmm ctl` and `hwvmm top` reach the running machine
        api: Option<PathBuf>, [long] "PATH";
        /// Confine the process that runs the guest to the files and system calls that it needs (seccomp, Landlock, an empty
        /// root folder, no capabilities). A system call that is not permitted ends the run (on), or is printed and allowed (log)
        sandbox: Option<SandboxMode>, [long] "MODE" default "on";
        /// KVM's device
        kvm: Option<PathBuf>, [long] "PATH" default "/dev/kvm";
    }

    "Devices" {
        /// Disk
        disk: Vec<DiskConfig>, [short, long] "PATH" becomes Vec<DiskConfig> = given.disks();
        /// A disk for cloud-init (NoCloud): read-only, with the label cidata, made in memory of DIR's file user-data and, where it has
        /// them, meta-data, vendor-data and network-config
        seed: Option<PathBuf>, [long] "DIR";
        /// Network card
        net: Vec<NetConfig>, [short, long] "BACKEND";
        /// Shared folder (virtiofs)
        share: Vec<ShareConfig>, [long] "tag=NAME,path=DIR"
            becomes Vec<ShareConfig> = given.of_command().shares(&given.share)?;
        /// UART [default: 1=stdio]
        serial: Vec<SerialChoice>, [long] "N=TARGET"
            becomes [Option<ConsoleTarget>; UARTS] = uarts(&given.serial, given.virtio_console().as_ref(), given.usual_console())?;
        /// Console of the guest: serial, or a virtio console (hvc0) on virtio[=stdio|file:PATH|null] [default: serial]
        console: Option<ConsoleChoice>, [long] "CONSOLE" becomes Option<ConsoleTarget> = given.virtio_console();
        /// Stream sockets between guest and host (vsock). With uds, host programs connect to PATH and send "CONNECT PORT";
        /// connections of the guest go to PATH_PORT. With vhost, the host uses its own vsock sockets
        vsock: Option<VsockConfig>, [long] "cid=N,uds=PATH"
            becomes Option<VsockConfig> = given.of_command().vsock(given.vsock.as_ref());
        /// Entropy device; RATE is the largest number of bytes a second
        rng: Option<Toggle<RngConfig>>, [long] "RATE" or "on"
            becomes Option<RngConfig> = given.rng.and_then(Toggle::device);
        /// Memory balloon; SIZE is its size at the start [default: 0]. It also returns memory that the guest has free
        balloon: Option<Toggle<BalloonConfig>>, [long] "SIZE" or "on"
            becomes Option<BalloonConfig> = given.balloon.and_then(Toggle::device);
        /// Transport of virtio devices [default: mmio with consoles, entropy and balloon alone, and for a command with a
        /// read-only root, where the kernel has the driver: fewest exits at boot; else pci: fewest exits a request]
        transport: Option<Transport>, [long] "BUS" becomes Transport = given.transport();
    }

    "Command" {
        /// Run this command in the guest, and end with its status. stdin, stdout and stderr are the command's, and not the
        /// console's. hwvmm makes the initramfs: with an agent, and the modules that the kernel needs for it
        command: Vec<OsString>, [last = true, help_heading = None::<&str>] "COMMAND";
        /// Boot the guest, save it in this folder when it is ready for a COMMAND, and end. Then `hwvmm run --from DIR -- COMMAND` runs
        /// commands in copies of it, as often and as many at once as wanted, each without a boot
        template: Option<PathBuf>, [long, conflicts_with = "command"] "DIR";
        /// The root file system that the command finds: host (that of this host), DIR, IMAGE (a disk image, raw or qcow2, with ext2
        /// to ext4), image (that of --kernel-from), or none (an empty one, with the files of --put). It is read-only for the guest;
        /// what the guest writes goes to its memory, and is gone after the run [default: host]
        root: Option<RootChoice>, [long] "host|none|image|DIR|IMAGE" becomes RootChoice = given.root_choice()?;
        /// Folder of the host that the guest can write to, at the same path
        rw: Vec<PathBuf>, [long] "DIR";
        /// Environment variable of the command; without =VALUE it has that of hwvmm
        env: Vec<EnvChoice>, [long] "NAME[=VALUE]";
        /// Folder that the command starts in [default: the current one, where the root has it; else /]
        workdir: Option<PathBuf>, [long] "DIR";
        /// User and group that the command runs as: numbers, or a name of the root's /etc/passwd [default: 0:0]
        user: Option<UserChoice>, [long] "UID[:GID]" becomes UserChoice = given.user.clone().unwrap_or_default();
        /// Put a file or a folder into the initramfs, which is the root with --root none
        put: Vec<PutChoice>, [long] "SRC:DST";
        /// Where the kernel's modules are: a folder with modules.dep, or one with lib/modules/RELEASE [default: beside the
        /// kernel, or /lib/modules/RELEASE; in the image of --kernel-from]
        modules: Option<PathBuf>, [long] "DIR";
        /// Give the command a terminal. stdin must be one: its size, and keys such as Ctrl-C, are for the command
        tty: Option<bool>, [short = 't', long] "on|off" or "on" default "off";
        /// Write the kernel's log to this file, of whatever length. Without it the kernel is quiet, and its last lines are printed
        /// after a failure
        kernel_log: Option<PathBuf>, [long] "FILE";
    }

    "End of the run" {
        /// Write to this file how the run ended, as JSON: what tells a command's status from one of hwvmm's own
        status_file: Option<PathBuf>, [long] "FILE";
        /// Fail with status 42 where this host does not have this: hardware (a KVM that uses the processor's
        /// virtualization extensions, and does not emulate the guest's instructions)
        require: Option<Requirement>, [long] "WHAT";
        /// End the run after this time with status 124: 30s, 500ms, 2m
        timeout: Option<Duration>, [long] "TIME";
        /// End the run with status 124 if the guest has not booted after this time: if its COMMAND has not started; without
        /// one, if no console has had output
        boot_timeout: Option<Duration>, [long] "TIME";
        /// End the run with status 0 when a line of a console matches; with status 38 if the guest ends before. A line is
        /// matched whole, when it has ended (LF, CR LF or CR), without escape sequences, NUL and BEL; only the first
        /// 64 KiB of a longer one. A line without an end, such as a prompt, is matched when no console has had output for 200 ms, and
        /// when the guest has shut down, halted or reset itself
        expect: Option<Pattern>, [long] "REGEX";
        /// Save the machine in the new folder DIR, and end the run with status 0, when the guest has written the number N to the mark port
        /// (0x508), or a line of a console matches, as with --expect. Status 38 if the guest ends before. `hwvmm run --from DIR` goes on from it
        snapshot_at: Option<SnapshotAt>, [long] "WHEN" becomes Option<SnapshotAt> = given.saving()?;
        /// What a reset by the guest does
        on_reboot: Option<OnReboot>, [long] "ACTION" default "exit";
    }

    "Exits" {
        /// After the run, print exits by reason and device, and KVM's own statistics
        stats: Option<StatsFormat>, [long] "FORMAT" or "text"
            becomes Option<StatsFormat> = given.stats.or(given.stats_out.as_ref().map(|_| StatsFormat::Json));
        /// Write the statistics to this file instead of stderr (as JSON, unless --stats says otherwise)
        stats_out: Option<PathBuf>, [long] "FILE";
        /// After the run, print what caused the exits, where in the guest, what they cost, and what avoids them: userspace
        /// exits (user), or all VM exits (full)
        profile: Option<ProfileLevel>, [long] "LEVEL" or "full"
            becomes Option<ProfileLevel> = given.profile.or(given.implies_profile().then_some(ProfileLevel::Full));
        /// Write the profile to this file, for hwvmm report (implies --profile)
        profile_out: Option<PathBuf>, [long] "FILE";
        /// Largest numbers of exits; a run with more ends with status 39. NAME is as in
        /// total=4500,userspace=100,pio=50,npf=100,port.0x3f8=0 (implies --profile)
        budget: Option<Budget>, [long] "LIMITS";
        /// Take the counts of this profile as limits for each kind of exit, except for those that come with time: the
        /// host's interrupts, the guest's timer, and windows for its interrupts
        budget_from: Option<PathBuf>, [long] "FILE";
        /// By how much the counts of --budget-from may be exceeded
        slack: Option<Slack>, [long] "PERCENT" default "2%";
        /// The guest kernel's symbols (ELF or System.map), if the kernel has none
        symbols: Option<PathBuf>, [long] "FILE";
        /// Let accesses to MSRs that KVM does not know exit to hwvmm, so that they are counted
        trap_msrs: Option<bool>, [long] "on|off" or "on" default "off";
        /// Levers that avoid exits; "all=off" turns all off, "help" lists them and what each saves
        tune: Vec<Levers>, [long] "LIST" becomes Tune = given.levers()?;
    }
}

impl RunOptions {
    /// Returns true if the list of levers is asked for (`--tune help`), not a run.
    #[must_use]
    pub fn asks_for_levers(&self) -> bool {
        self.tune.contains(&Levers::Help)
    }

    fn levers(&self) -> Result<Tune, ConfigError> {
        let mut tune = Tune::default();
        for levers in &self.tune {
            levers.apply(&mut tune)?;
        }
        Ok(tune)
    }

    /// Joins the options of the command line, `self`, with those of a file. An option of the command line replaces that of the
    /// file; of an option that can be given again the file's values come first. A command is replaced as a whole.
    #[must_use]
    pub fn or(self, mut file: Self) -> Self {
        if !self.command.is_empty() {
            file.command.clear();
        }
        self.joined(file)
    }

    fn of_command(&self) -> CommandOptions<'_> {
        CommandOptions { task: self.task(), root: self.root.as_ref(), rw: &self.rw }
    }

    /// What a console is connected to that is on stdin and stdout where no command has these.
    fn usual_console(&self) -> ConsoleTarget {
        if self.task() == AgentTask::None { ConsoleTarget::Stdio } else { ConsoleTarget::Log }
    }

    pub(super) fn virtio_console(&self) -> Option<ConsoleTarget> {
        match self.console.as_ref().and_then(ConsoleChoice::virtio)? {
            ConsoleTarget::Stdio => Some(self.usual_console()),
            target => Some(target.clone()),
        }
    }

    fn implies_profile(&self) -> bool {
        self.profile_out.is_some() || self.budget.is_some() || self.budget_from.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> RunOptions {
        toml::from_str(text).expect("valid TOML")
    }

    fn config(text: &str) -> RunConfig {
        read(&format!("kernel = 'k'\n{text}")).into_config().expect("valid")
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = read("kernel = 'k'\nmemory = '1G'\ncpus = 4\nappend = ['quiet']\nwatchdog = true");
        let flags = RunOptions {
            memory: Some(Memory::parse(OsStr::new("256M")).expect("a size")),
            append: vec!["debug".into()],
            watchdog: Some(false),
            ..RunOptions::default()
        };
        let config = flags.or(file).into_config().expect("valid");
        assert_eq!(config.memory.bytes, 256 << 20);
        assert_eq!(config.cpus.count(), 4);
        assert_eq!(config.kernel_cmdline(), "console=ttyS0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 quiet debug");
        assert!(!config.watchdog);
    }

    #[test]
    fn devices_are_strings_or_tables() {
        let strings = config("disk = ['a.img,readonly=on', 'b']\nnet = ['user,hostfwd=tcp::2222-:22']\nrng = 65536");
        let tables = config(
            "[[disk]]\npath = 'a.img'\nreadonly = true\n[[disk]]\npath = 'b'\n[[net]]\nuser = true\n\
             hostfwd = ['tcp::2222-:22']\n[rng]\nrate = '64K'",
        );
        assert_eq!(strings, tables);
        assert_eq!(config("disk = 'a'"), config("[disk]\npath = 'a'"));
        assert_eq!(config("memory = '1G,prefault=on'"), config("[memory]\nsize = '1G'\nprefault = 'on'"));
        assert_eq!(config("serial = ['2=null']"), config("[[serial]]\nport = 2\ntarget = 'null'"));
        assert_eq!(config("budget = 'port.0x3f8=2,total=1'"), config("[budget]\ntotal = 1\n'port.0x3f8' = '2'"));
        assert_eq!(
            config("tune = ['all=off,acpi-reset=on,halt-poll=30']"),
            config("[tune]\nacpi-reset = 'on'\nall = 'off'\nhalt-poll = 30")
        );
        assert_eq!(config("rng = true\nballoon = 'off'").rng, Some(RngConfig::default()));
        assert_eq!(
            (config("slack = 0.5").slack, config("timeout = 1.5").timeout),
            (Slack::parse("0.5%").expect("a percentage"), Some(Duration::from_millis(1500)))
        );
    }

    #[test]
    fn the_example_in_the_readme_is_right() {
        let readme = include_str!("../README.md");
        let example = readme.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
        let config = read(example).into_config().expect("valid");
        assert_eq!((config.disk.len(), config.net.len()), (1, 1));
        assert!(config.disk[0].read_only && !config.tune.wants(Lever::BusyPoll));
    }

    #[test]
    fn what_contradicts_is_refused_with_the_name() {
        for (text, words) in [
            ("share = ['tag=a,path=x', 'tag=a,path=y']", "the tag 'a'"),
            ("disk = ['a,id=x', 'b,id=x']", "the id 'x'"),
            ("disk = ['a', 'b,id=disk0']", "the id 'disk0'"),
            ("disk = ['a,id=seed']\nseed = 'd'", "the id 'seed'"),
            ("api = 's'\nvsock = 'cid=3,uds=s'", "the socket 's'"),
            ("stats-out = 'f'\nprofile-out = 'f'", "the file 'f'"),
            ("memory = '64M'\nballoon = '49M'", "51380224 bytes are more than 50331648"),
        ] {
            let error = read(&format!("kernel = 'k'\n{text}")).into_config().expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
        for text in [
            "share = ['tag=a,path=x', 'tag=b,path=x']\ndisk = ['a', 'a,id=x']\nmemory = '64M'\nballoon = '48M'",
            "api = 's'\nvsock = 'cid=3,uds=t'\nstats-out = '/dev/null'\nprofile-out = '/dev/null'",
        ] {
            config(text);
        }
        let error = toml::from_str::<RunOptions>("rng = 0").expect_err("refused").to_string();
        assert!(error.contains("a rate of 0 is not valid"), "{error}");
    }

    #[test]
    fn errors_name_option_value_and_remedy() {
        assert!(matches!(RunOptions::default().into_config(), Err(ConfigError::NoKernel)));
        for (text, words) in [
            ("memory = '1M'", vec!["memory = '1M'", "16M"]),
            ("colour = 1", vec!["colour", "kernel-cache"]),
            ("kernel = 1", vec!["1 is not a string"]),
            ("watchdog = 'maybe'", vec!["'maybe'", "true"]),
            ("[[disk]]\npath = 'a'\nqueues = 17", vec!["queues: '17'", "16"]),
            ("transport = 'isa'", vec!["'isa'", "pci, mmio"]),
            ("expect = '('", vec!["expect", "regular expression"]),
            ("tune = ['colour=on']", vec!["'colour'", "--tune help"]),
            ("cpus = []", vec!["a number"]),
            ("[kvm]\npath = 'a'", vec!["a table"]),
        ] {
            let error = toml::from_str::<RunOptions>(text).expect_err("wrong").to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn one_option_implies_another() {
        assert_eq!(config("budget = 'total=1'").profile, Some(ProfileLevel::Full));
        assert_eq!(config("profile = 'user'\nprofile-out = 'p'").profile, Some(ProfileLevel::User));
        assert_eq!(config("stats-out = 's'").stats, Some(StatsFormat::Json));
        assert_eq!(config("tune = ['host-unpack=off']").unpack, Unpack::Guest);
        assert_eq!(config("share = ['tag=a,path=b']").transport, Transport::Pci);
        assert_eq!(config("seed = 'd'").transport, Transport::Pci);
        assert_eq!(config("").transport, Transport::Mmio);
        assert_eq!(config("kernel-cache = 'off'").kernel_cache, None);
        assert_eq!(config("kernel-cache = 'c'").kernel_cache, Some("c".into()));
    }
}
