//! Options that are right by themselves, and contradict each other.

use super::devices::{BalloonConfig, DiskConfig, ShareConfig, VsockBackend, VsockConfig};
use super::error::ConfigError;
use super::machine::Memory;
use hwvmm_devices::path_text::PathText as _;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;

/// The id of the disk of `--seed` in counts and logs, and its serial number.
pub const SEED_ID: &str = "seed";

/// Returns an error if a name of `names` comes twice.
fn once<T>(what: &'static str, remedy: &'static str, names: impl IntoIterator<Item = T>) -> Result<(), ConfigError>
where
    T: AsRef<OsStr> + Ord,
{
    let mut seen = BTreeSet::new();
    for name in names {
        if seen.contains(&name) {
            return Err(ConfigError::Same { what, name: name.shown().to_string(), remedy });
        }
        seen.insert(name);
    }
    Ok(())
}

/// The options that are about the same names or the same memory.
pub(super) struct Related<'a> {
    pub(super) share: &'a [ShareConfig],
    pub(super) disk: &'a [DiskConfig],
    pub(super) seed: Option<&'a Path>,
    pub(super) vsock: Option<&'a VsockConfig>,
    pub(super) api: Option<&'a Path>,
    pub(super) stats_out: Option<&'a Path>,
    pub(super) profile_out: Option<&'a Path>,
    pub(super) status_file: Option<&'a Path>,
    pub(super) kernel_log: Option<&'a Path>,
    pub(super) balloon: Option<BalloonConfig>,
    pub(super) memory: Memory,
}

/// Checks that no option contradicts another.
pub(super) fn check(config: &Related<'_>) -> Result<(), ConfigError> {
    let tags = config.share.iter().map(|share| share.tag.clone());
    once("--share: the tag", "a guest finds the first only, so give each a tag of its own", tags)?;
    let ids = config.disk.iter().enumerate();
    let ids = ids.map(|(index, disk)| disk.id.clone().unwrap_or_else(|| format!("disk{index}")));
    let ids = ids.chain(config.seed.map(|_| SEED_ID.to_owned()));
    once("--disk: the id", "counts go by the id, so give each one of its own", ids)?;
    let serials = config.disk.iter().map(|disk| disk.serial.clone()).filter(|serial| !serial.is_empty());
    once("--disk: the serial number", "the guest finds a disk by it, so give each one of its own", serials)?;
    let uds = config.vsock.iter().filter_map(|vsock| match &vsock.backend {
        VsockBackend::Unix(path) => Some(path.as_path()),
        VsockBackend::Vhost | VsockBackend::Streams => None,
    });
    once("the socket", "--api and --vsock need one each", uds.chain(config.api))?;
    // A device, such as /dev/stderr, takes both.
    let files = [config.stats_out, config.profile_out, config.status_file, config.kernel_log].into_iter().flatten();
    let files = files.filter(|path| !path.starts_with("/dev"));
    once("the file", "--stats-out, --profile-out, --status-file and --kernel-log would overwrite each other", files)?;
    let (bytes, max_bytes) = (config.balloon.map_or(0, |balloon| balloon.bytes), config.memory.max_balloon_bytes());
    if bytes > max_bytes {
        return Err(ConfigError::Balloon { bytes, max_bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::config::RunOptions;

    #[test]
    fn paths_that_differ_in_a_byte_that_is_not_utf8_are_two() {
        let config = |uds: &str| {
            let text = format!(
                "kernel = 'k'\napi = {{ escaped = '/tmp/\\xff' }}\n[vsock]\ncid = 3\nuds = {{ escaped = '{uds}' }}"
            );
            toml::from_str::<RunOptions>(&text).expect("TOML").into_config().map(drop)
        };
        config(r"/tmp/\xfe").expect("two sockets");
        let error = config(r"/tmp/\xff").expect_err("one socket").to_string();
        assert!(error.starts_with(r"the socket '/tmp/\xff' is given twice"), "{error}");
    }
}
