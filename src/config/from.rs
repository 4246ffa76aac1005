//! Options of a run that goes on from a snapshot (`--from`), which has settled what the machine is.

use super::choices::OnReboot;
use super::devices::Toggle;
use super::error::ConfigError;
use super::options::RunOptions;
use std::time::Duration;

impl RunOptions {
    /// For how long the pages that the guest uses are written down.
    pub(super) fn recording(&self) -> Result<Option<Duration>, ConfigError> {
        match (self.record_working_set, &self.from) {
            (Some(_), None) => Err(ConfigError::OnlyWithFrom("--record-working-set")),
            (time, _) => Ok(time),
        }
    }

    /// The first option that is given and is settled by a snapshot, or about a device that no snapshot has.
    pub(super) fn refused_with_snapshot(&self) -> Option<&'static str> {
        let on = |option: Option<bool>| option == Some(true);
        let options = [
            ("KERNEL", self.kernel.is_some()),
            ("--kernel-from", self.kernel_from.is_some()),
            ("--entry", self.entry.is_some()),
            ("--memory (-m)", self.memory.is_some()),
            ("--cpus (-c)", self.cpus.is_some()),
            ("--initrd", self.initrd.is_some()),
            ("--cmdline", self.cmdline.is_some()),
            ("--append", !self.append.is_empty()),
            ("--module", !self.module.is_empty()),
            ("--boot", self.boot.is_some()),
            ("--unpack", self.unpack.is_some()),
            ("--watchdog", on(self.watchdog)),
            ("--debug-exit", on(self.debug_exit)),
            ("--testdev", on(self.testdev)),
            ("--seed", self.seed.is_some()),
            ("--rng", self.rng.and_then(Toggle::device).is_some()),
            ("--balloon", self.balloon.and_then(Toggle::device).is_some()),
            ("--transport", self.transport.is_some()),
            ("--template", self.template.is_some()),
            ("--on-reboot restart", self.on_reboot == Some(OnReboot::Restart)),
        ];
        options.into_iter().find(|(_, given)| *given).map(|(option, _)| option)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_settles_what_the_machine_is() {
        let config = read("from = 's'\napi = 'a'\nserial = ['1=null']\nwatchdog = false").into_config().expect("valid");
        assert_eq!((config.from, config.kernel), (Some("s".into()), "s".into()));
        let config = read("from = 's'\nrecord-working-set = '2s'").into_config().expect("valid");
        assert_eq!(config.record_working_set, Some(Duration::from_secs(2)));
        let error = read("kernel = 'k'\nrecord-working-set = '2s'").into_config().expect_err("refused").to_string();
        assert!(error.contains("--record-working-set") && error.contains("--from DIR"), "{error}");
        // What its disks and consoles are connected to is this run's.
        let config = read("from = 's'\ndisk = ['d']\nconsole = 'virtio=null'").into_config().expect("valid");
        assert!(config.disk.len() == 1 && config.console.is_some());
        for (text, words) in [
            ("kernel = 'k'", "KERNEL"),
            ("memory = '64M'", "--memory (-m)"),
            ("cpus = 1", "--cpus (-c)"),
            ("seed = 'd'", "--seed"),
            ("rng = true", "--rng"),
            ("append = 'x'", "--append"),
            ("on-reboot = 'restart'", "--on-reboot restart"),
        ] {
            let error = read(&format!("from = 's'\n{text}")).into_config().expect_err("refused").to_string();
            assert!(error.contains(words) && error.contains("--from"), "{error}");
        }
    }

    fn read(text: &str) -> RunOptions {
        toml::from_str(text).expect("valid TOML")
    }
}
