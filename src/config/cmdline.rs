//! The kernel command line.

use super::{RunConfig, Transport, VsockBackend};
use crate::tune::Lever;
use std::path::{Path, PathBuf};

impl RunConfig {
    /// Returns true if the guest runs one command.
    #[must_use]
    pub fn has_command(&self) -> bool {
        !self.command.is_empty()
    }

    /// Returns true if the guest has an agent: it runs one command, or waits for it.
    #[must_use]
    pub fn has_agent(&self) -> bool {
        self.has_command() || self.template.is_some()
    }

    /// Returns true if the machine may be saved: when it is asked for, or by the run itself.
    #[must_use]
    pub fn may_be_saved(&self) -> bool {
        self.api.is_some() || self.saved_to().is_some()
    }

    /// Returns the folder in which the run saves its machine.
    #[must_use]
    pub fn saved_to(&self) -> Option<&Path> {
        self.template.as_deref().or(self.snapshot_at.as_ref().map(|at| at.dir.as_path()))
    }

    /// Returns true if the parameters of the kernel are those of its image, too. A command has the image's kernel alone: its parameters
    /// are for the system in the image.
    #[must_use]
    pub fn has_image_cmdline(&self) -> bool {
        self.kernel_from.is_some() && !self.has_agent()
    }

    /// Returns the number of virtio devices.
    #[must_use]
    pub fn virtio_devices(&self) -> usize {
        let lists = self.disk.len() + self.net.len() + self.share.len();
        let single = [
            self.seed.is_some(),
            self.rng.is_some(),
            self.console.is_some(),
            self.vsock.is_some(),
            self.balloon.is_some(),
        ];
        lists + single.iter().filter(|there| **there).count()
    }

    /// Returns the path of the vsock device's Unix sockets; `None` where there is no such device.
    #[must_use]
    pub fn vsock_path(&self) -> Option<&Path> {
        match &self.vsock.as_ref()?.backend {
            VsockBackend::Unix(path) => Some(path),
            VsockBackend::Vhost | VsockBackend::Streams => None,
        }
    }

    /// Returns the paths at which the machine listens on Unix sockets.
    pub fn socket_paths(&self) -> impl Iterator<Item = &Path> {
        self.api.iter().map(PathBuf::as_path).chain(self.vsock_path())
    }

    /// Returns the command line of a Linux kernel: the one given, else the default, and the words added.
    #[must_use]
    pub fn kernel_cmdline(&self) -> String {
        self.kernel_cmdline_with(None)
    }

    /// As [`RunConfig::kernel_cmdline`], for a kernel to which its `image` gives these parameters: they come before the default ones,
    /// of which the last console is the one that programs write to, and none of both is there if a command line was given. What the
    /// image has for init, behind a `--`, stays the last.
    #[must_use]
    pub fn kernel_cmdline_with(&self, image: Option<&str>) -> String {
        let image = match (image, &self.cmdline) {
            (Some(image), None) => Parameters::of(image),
            (None, None) => Parameters::default(),
            (_, Some(given)) => return self.with_added_words(given.clone()),
        };
        let own = format!("{} {}", image.kernel, self.default_cmdline()).trim().to_owned();
        let text = self.with_added_words(own);
        match image.init {
            "" => text,
            // The first `--` counts: a second one would be an argument of init.
            init if self.append.iter().any(|words| Parameters::of(words).has_end) => format!("{text} {init}"),
            init => format!("{text} -- {init}"),
        }
    }

    /// Returns the command line of a multiboot kernel, which gets no parameters of Linux: only what was given.
    #[must_use]
    pub fn multiboot_cmdline(&self) -> String {
        self.with_added_words(self.cmdline.clone().unwrap_or_default())
    }

    fn with_added_words(&self, mut cmdline: String) -> String {
        for words in &self.append {
            if !cmdline.is_empty() {
                cmdline.push(' ');
            }
            cmdline.push_str(words);
        }
        cmdline
    }

    /// Returns the parameters that name the consoles, end the run at a panic, and keep Linux from probing for hardware that
    /// the machine does not have.
    fn default_cmdline(&self) -> String {
        let tune = &self.tune;
        let serial = self.serial.first().is_some_and(Option::is_some);
        let pci = self.transport != Transport::Mmio && self.virtio_devices() > 0;
        // Linux numbers the UARTs that exist in order.
        let uarts = format!("8250.nr_uarts={}", self.serial.iter().flatten().count());
        let words = [
            (serial, "console=ttyS0"),
            (self.console.is_some(), "console=hvc0"),
            (true, "panic=-1"),
            (!pci && tune.wants(Lever::PciProbing), "pci=conf1,noearly"),
            (pci && tune.wants(Lever::PciProbing), "pci=noearly"),
            (tune.wants(Lever::UartCount), &*uarts),
            // Either alone makes Linux use the timer for single shots.
            (tune.wants(Lever::PeriodicTick), "nohz=off highres=off"),
            // With more vCPUs the others would go on after a halt, and the end of the guest would not be noticed.
            (tune.wants(Lever::AcpiReset) && self.cpus.count() == 1, "reboot=f"),
            (tune.wants(Lever::NoCryptoSelftests), "cryptomgr.notests"),
            // Each byte on a UART is an exit, and they are of use only where something fails.
            (self.has_agent() && self.kernel_log.is_none(), "quiet"),
        ];
        words.iter().filter(|(on, _)| *on).map(|(_, word)| *word).collect::<Vec<_>>().join(" ")
    }
}

/// The parameters of a command line that is not hwvmm's own, as Linux splits them (lib/cmdline.c, `next_arg`; kernel/params.c,
/// `parse_args`).
#[derive(Debug, Default)]
struct Parameters<'a> {
    /// Those of the kernel. A quote that is not closed is, so that it takes in nothing which is added.
    kernel: String,
    /// True if a `--` ends those of the kernel.
    has_end: bool,
    /// The arguments of init, behind it.
    init: &'a str,
}

/// Linux' isspace (lib/ctype.c), which goes by bytes: 0xa0 is also the second one of an `à`.
fn is_space(byte: u8) -> bool {
    matches!(byte, b'\t'..=b'\r' | b' ' | 0xa0)
}

impl<'a> Parameters<'a> {
    fn of(text: &'a str) -> Self {
        let (mut quoted, mut word) = (false, 0);
        for (at, byte) in text.bytes().chain([b' ']).enumerate() {
            quoted ^= byte == b'"';
            let is_end = at == text.len() || !quoted && is_space(byte);
            if !is_end {
                continue;
            }
            // Such a word begins and ends between two characters, as a hyphen is no part of another one.
            if matches!(text.get(word..at), Some("--" | "\"--\"")) {
                let kernel = text.get(..word).unwrap_or_default().trim_end().to_owned();
                return Self { kernel, has_end: true, init: text.get(at..).unwrap_or_default().trim() };
            }
            word = at + 1;
        }
        Self { kernel: format!("{}{}", text.trim_end(), if quoted { "\"" } else { "" }), has_end: false, init: "" }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{RunConfig, RunOptions};

    fn config(text: &str) -> RunConfig {
        let options: RunOptions = toml::from_str(&format!("kernel = 'k'\n{text}")).expect("valid TOML");
        options.into_config().expect("valid")
    }

    #[test]
    fn the_default_command_line_follows_the_devices() {
        let of = |text: &str| config(text).kernel_cmdline();
        assert_eq!(of("disk = ['d']"), "console=ttyS0 panic=-1 pci=noearly 8250.nr_uarts=1 reboot=f");
        assert_eq!(of("disk = ['d']\ntune = ['all=off']"), "console=ttyS0 panic=-1");
        assert!(!of("").contains("cryptomgr") && !of("tune = ['all=auto']").contains("cryptomgr"));
        let untested = of("tune = ['no-crypto-selftests=on']");
        assert_eq!(untested, "console=ttyS0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 reboot=f cryptomgr.notests");
        let tick = of("tune = ['periodic-tick=on']");
        assert_eq!(tick, "console=ttyS0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 nohz=off highres=off reboot=f");
        assert!(!of("cpus = 2").contains("reboot"), "a halt must stop all vCPUs");
        let mmio = of("disk = ['d']\ntransport = 'mmio'\ntune = ['uart-count=off']");
        assert_eq!(mmio, "console=ttyS0 panic=-1 pci=conf1,noearly reboot=f");
        assert_eq!(of("console = 'virtio'"), "console=hvc0 panic=-1 pci=conf1,noearly 8250.nr_uarts=0 reboot=f");
        assert_eq!(of("seed = 's'"), of("disk = ['d']"), "it is a disk");
        let both = of("console = 'virtio'\nserial = ['1=null']\ntransport = 'mmio'\nrng = 65536");
        assert_eq!(both, "console=ttyS0 console=hvc0 panic=-1 pci=conf1,noearly 8250.nr_uarts=1 reboot=f");
    }

    #[test]
    fn the_command_line_is_replaced_or_added_to() {
        let replaced = config("cmdline = ''\nappend = ['a', 'b']");
        assert_eq!((replaced.kernel_cmdline(), replaced.multiboot_cmdline()), ("a b".into(), "a b".into()));
        assert_eq!(config("append = ['a']").multiboot_cmdline(), "a");
        assert_eq!(replaced.kernel_cmdline_with(Some("root=x")), "a b");
        let image = config("append = ['a']\ntune = ['all=off']").kernel_cmdline_with(Some("root=x console=tty0"));
        assert_eq!(image, "root=x console=tty0 console=ttyS0 panic=-1 a");
    }

    #[test]
    fn what_an_image_has_for_init_stays_behind_what_is_added() {
        let plain = config("append = ['a']\ntune = ['all=off']");
        let of = |image| plain.kernel_cmdline_with(Some(image));
        assert_eq!(of("ro -- single  x"), "ro console=ttyS0 panic=-1 a -- single  x");
        assert_eq!(of("ro \"--\" single"), "ro console=ttyS0 panic=-1 a -- single");
        assert_eq!(of("ro --"), "ro console=ttyS0 panic=-1 a");
        assert_eq!(of("-- single"), "console=ttyS0 panic=-1 a -- single");
        // What is space to Linux: a vertical tab, and the second byte of an à.
        assert_eq!(of("ro\u{b}--\u{b}single"), "ro console=ttyS0 panic=-1 a -- single");
        assert_eq!(of("x=à-- single"), "x=à console=ttyS0 panic=-1 a -- single");
        for none in ["a--b --c", "x=á-- b", "⠀--⠀", "x=\"a -- b\" ro", "\"x=a -- b\"", "--="] {
            assert_eq!(of(none), format!("{none} console=ttyS0 panic=-1 a"));
        }
        let own = config("append = ['a -- b']\ntune = ['all=off']").kernel_cmdline_with(Some("ro -- single"));
        assert_eq!(own, "ro console=ttyS0 panic=-1 a -- b single");
        assert_eq!(config("cmdline = 'x -- y'").kernel_cmdline_with(Some("ro -- single")), "x -- y");
    }

    #[test]
    fn a_quote_that_an_image_leaves_open_takes_in_nothing() {
        let plain = config("tune = ['all=off']");
        let of = |image| plain.kernel_cmdline_with(Some(image));
        assert_eq!(of("ro dyndbg=\"file a +p"), "ro dyndbg=\"file a +p\" console=ttyS0 panic=-1");
        assert_eq!(of("ro x=\"a -- b"), "ro x=\"a -- b\" console=ttyS0 panic=-1");
        assert_eq!(of("ro x=\"a b\""), "ro x=\"a b\" console=ttyS0 panic=-1");
    }
}
