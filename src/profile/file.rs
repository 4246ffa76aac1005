//! The file of a profile: read with a limit, and checked before anything is made from it.

use super::data::{Avoided, Exits, FORMAT, Profile, Timeline, VERSION};
use crate::bounded_read::{self, ReadError};
use hwvmm_devices::path_text::PathText as _;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest file of a profile, in bytes. With 24,576 causes on each of 254 vCPUs it would have some 100 MiB.
const MAX_BYTES: u64 = 128 << 20;
/// Steps of a timeline at most, as in `measure/timeline.rs`.
const MAX_STEPS: u64 = 4096;
/// Keys of a timeline at most. There are fewer reasons and classes than that.
const MAX_KEYS: usize = 64;

/// A profile cannot be read.
#[derive(Debug, Error)]
pub enum ProfileError {
    /// The file cannot be read.
    #[error("cannot read the profile {}", .0.shown())]
    Read(PathBuf, #[source] ReadError),
    /// The file is not a profile of hwvmm.
    #[error("{} is not an hwvmm profile: {reason}; make one with `hwvmm run --profile-out FILE`", .path.shown())]
    Not {
        /// The path of the file.
        path: PathBuf,
        /// Why it is none.
        reason: NotProfile,
    },
    /// The profile has another version of the format.
    #[error(
        "{} is a profile of version {found}, and this hwvmm reads version {VERSION}: use the hwvmm that wrote it (it says {by})",
        .path.shown()
    )]
    Version {
        /// The path of the file.
        path: PathBuf,
        /// The version of the file.
        found: u64,
        /// The version of hwvmm that wrote the file.
        by: String,
    },
    /// Counts that contradict each other.
    #[error("{} is damaged: {mismatch}", .path.shown())]
    Damaged {
        /// The path of the file.
        path: PathBuf,
        /// The total and the sum that differ from each other.
        mismatch: CountMismatch,
    },
}

/// Why a file is no profile.
#[derive(Debug, Error)]
pub enum NotProfile {
    /// The path is a folder.
    #[error("it is a folder")]
    Folder,
    /// The file is larger than any profile.
    #[error("it has more than {MAX_BYTES} bytes")]
    TooLarge,
    /// The file is not JSON, or lacks a field of a profile.
    #[error("{0}")]
    Json(serde_json::Error),
    /// The JSON does not say that it is a profile.
    #[error("it has no \"format\": \"{FORMAT}\"")]
    Format,
    /// A timeline goes on after the last step that hwvmm counts.
    #[error("its timeline has step {0}, and the last is {last}", last = MAX_STEPS - 1)]
    Step(u64),
    /// A timeline has more keys than there are reasons and classes.
    #[error("its timeline has more than {MAX_KEYS} reasons")]
    Keys,
}

/// What says whether a file is a profile, and of which version. All else is skipped without being kept.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Head {
    format: Option<String>,
    version: u64,
    hwvmm: Option<String>,
}

/// Two ways of counting the exits of a profile give different sums.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("it has {total} {exits} in all, and {} {how}", .counted.map_or("too many to add up".into(), |count| count.to_string()))]
pub struct CountMismatch {
    /// The sort of exits.
    exits: &'static str,
    /// The total that the profile has.
    total: u64,
    /// The way of counting.
    how: &'static str,
    /// The sum; `None` where it is more than 64 bits hold.
    counted: Option<u64>,
}

impl Timeline {
    /// Reports draw each key in each step: both are bounded.
    fn check(&self) -> Result<(), NotProfile> {
        let mut keys = BTreeSet::new();
        for one in &self.counts {
            if one.step >= MAX_STEPS {
                return Err(NotProfile::Step(one.step));
            }
            keys.insert(&one.key);
            if keys.len() > MAX_KEYS {
                return Err(NotProfile::Keys);
            }
        }
        Ok(())
    }
}

impl Exits {
    fn check(&self, exits: &'static str) -> Result<(), CountMismatch> {
        let by_cause = self.causes.iter().try_fold(0_u64, |sum, cause| sum.checked_add(cause.count));
        let by_reason = self.by_reason.values().try_fold(0_u64, |sum, count| sum.checked_add(*count));
        for (how, counted) in [("by cause", by_cause), ("by reason", by_reason)] {
            if counted != Some(self.total) {
                return Err(CountMismatch { exits, total: self.total, how, counted });
            }
        }
        Ok(())
    }
}

impl Avoided {
    /// The rarest causes may be missing.
    fn check(&self) -> Result<(), CountMismatch> {
        let counted = self.causes.iter().try_fold(0_u64, |sum, cause| sum.checked_add(cause.count));
        if counted.is_some_and(|counted| counted <= self.total) {
            return Ok(());
        }
        Err(CountMismatch { exits: "avoided exits", total: self.total, how: "by cause", counted })
    }
}

impl Profile {
    /// Reads and checks a profile.
    ///
    /// # Errors
    /// [`ProfileError`].
    pub fn read(path: &Path) -> Result<Self, ProfileError> {
        let bytes = bounded_read::read(path, MAX_BYTES).map_err(|error| {
            let reason = match error {
                ReadError::TooLarge { .. } => NotProfile::TooLarge,
                ReadError::Io(error) if error.kind() == std::io::ErrorKind::IsADirectory => NotProfile::Folder,
                error @ ReadError::Io(_) => return ProfileError::Read(path.to_owned(), error),
            };
            ProfileError::Not { path: path.to_owned(), reason }
        })?;
        Self::from_json(&bytes, path)
    }

    /// Checks what was read from `path`.
    ///
    /// # Errors
    /// [`ProfileError`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self, ProfileError> {
        let not = |reason| ProfileError::Not { path: path.to_owned(), reason };
        let head: Head = serde_json::from_slice(bytes).map_err(|error| not(NotProfile::Json(error)))?;
        if head.format.as_deref() != Some(FORMAT) {
            return Err(not(NotProfile::Format));
        }
        if head.version != u64::from(VERSION) {
            let by = head.hwvmm.unwrap_or_else(|| "not which".to_owned());
            return Err(ProfileError::Version { path: path.to_owned(), found: head.version, by });
        }
        let profile: Self = serde_json::from_slice(bytes).map_err(|error| not(NotProfile::Json(error)))?;
        for exits in profile.vm_exits.iter().chain([&profile.userspace_exits]) {
            exits.timeline.check().map_err(not)?;
        }
        let checked = profile.userspace_exits.check("userspace exits").and_then(|()| match &profile.vm_exits {
            Some(exits) => exits.check("VM exits"),
            None => Ok(()),
        });
        let checked = checked.and_then(|()| profile.avoided.as_ref().map_or(Ok(()), Avoided::check));
        checked.map_err(|mismatch| ProfileError::Damaged { path: path.to_owned(), mismatch })?;
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::super::data::TimelineStep;
    use super::super::data::tests::sample;
    use super::*;

    fn parse(text: &str) -> Result<Profile, ProfileError> {
        Profile::from_json(text.as_bytes(), Path::new("p.json"))
    }

    #[test]
    fn a_profile_survives_the_file() {
        let text = serde_json::to_string(&sample()).expect("JSON");
        assert_eq!(parse(&text).expect("a profile"), sample());
    }

    #[test]
    fn what_is_no_profile_is_told() {
        for (text, words) in [
            ("", "not an hwvmm profile"),
            ("[]", "\"format\""),
            (
                "{\"format\":\"hwvmm-profile\",\"version\":9,\"hwvmm\":\"7.0\"}",
                "version 9, and this hwvmm reads version 1",
            ),
            ("{\"format\":\"hwvmm-profile\",\"version\":1}", "missing field"),
        ] {
            let error = parse(text).expect_err("no profile").to_string();
            assert!(error.contains(words) && error.contains("p.json"), "{error}");
        }
        let mut damaged = sample();
        damaged.avoided.as_mut().expect("there").total = 6_999;
        let error = parse(&serde_json::to_string(&damaged).expect("JSON")).expect_err("damaged").to_string();
        assert!(error.contains("is damaged") && error.contains("avoided exits"), "{error}");
        let mut damaged = sample();
        damaged.userspace_exits.causes[0].count = u64::MAX;
        damaged.userspace_exits.causes.push(damaged.userspace_exits.causes[0].clone());
        let error = parse(&serde_json::to_string(&damaged).expect("JSON")).expect_err("damaged").to_string();
        assert!(error.contains("is damaged") && error.contains("by cause"), "{error}");
    }

    #[test]
    fn reports_do_not_draw_timelines_that_no_run_has() {
        let with = |counts: Vec<(u64, String, u64)>| {
            let mut profile = sample();
            profile.userspace_exits.timeline.counts = counts.into_iter().map(TimelineStep::from).collect();
            parse(&serde_json::to_string(&profile).expect("JSON"))
        };
        assert!(with((0..64).map(|key| (4095, key.to_string(), 1)).collect()).is_ok());
        let error = with(vec![(4096, "pio_out".into(), 1)]).expect_err("a step too far").to_string();
        assert!(error.contains("step 4096, and the last is 4095"), "{error}");
        let error = with((0..65).map(|key| (0, key.to_string(), 1)).collect()).expect_err("many keys").to_string();
        assert!(error.contains("more than 64 reasons"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_profile_is_not_kept_in_memory() {
        let folder = Profile::read(Path::new("/")).expect_err("a folder").to_string();
        assert!(folder.contains("it is a folder"), "{folder}");
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(MAX_BYTES + 1).expect("sparse");
        let error = Profile::read(file.path()).expect_err("too large").to_string();
        assert!(error.contains("more than 134217728 bytes"), "{error}");
        let other = format!("{{\"x\":[{}0]}}", "{\"\":0},".repeat(1 << 16));
        assert!(matches!(parse(&other), Err(ProfileError::Not { reason: NotProfile::Format, .. })));
    }
}
