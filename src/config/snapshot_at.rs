//! When a run saves its machine by itself (`--snapshot-at`).

use super::console::Pattern;
use super::error::ValueError;
use super::spec::device_spec;
use super::value::{Items, Value, usage};
use std::ffi::OsStr;
use std::path::PathBuf;

device_spec! {
    /// As it is given.
    #[derive(Clone)]
    struct Spec {
        mark: Option<u32> = "mark" "N", number (0..=u32::MAX);
        expect: Option<Pattern> = "expect" "REGEX", optional;
        dir: PathBuf = "dir" "DIR", required ("dir=DIR");
    }
}

/// What a run waits for before it saves its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The guest writes this number to the mark port.
    Mark(u32),
    /// A line of a console matches.
    Line(Pattern),
}

/// When and where a run saves its machine (`--snapshot-at`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotAt {
    /// What it waits for.
    pub moment: Moment,
    /// The folder that is made.
    pub dir: PathBuf,
}

impl Value for SnapshotAt {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        Self::from_items(Items::from_text(text, Spec::KEYS)?)
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        let Spec { mark, expect, dir } = Spec::from_items(items)?;
        let moment = match (mark, expect) {
            (Some(number), None) => Moment::Mark(number),
            (None, Some(pattern)) => Moment::Line(pattern),
            (None, None) | (Some(_), Some(_)) => return Err(ValueError::Needs("either mark=N or expect=REGEX")),
        };
        Ok(Self { moment, dir })
    }

    fn usage() -> Option<String> {
        Some(usage(Spec::KEYS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunOptions;
    use std::path::Path;

    fn parse(text: &str) -> Result<SnapshotAt, String> {
        SnapshotAt::parse(OsStr::new(text)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_moment_is_a_mark_or_a_line() {
        assert_eq!(parse("mark=7,dir=/s"), Ok(SnapshotAt { moment: Moment::Mark(7), dir: "/s".into() }));
        let line = parse("dir=s,expect=^up: [0-9]{1,,2}$").expect("valid");
        assert!(matches!(&line.moment, Moment::Line(pattern) if pattern.0.as_str() == "^up: [0-9]{1,2}$"));
        for (text, words) in [
            ("mark=7", "it needs dir=DIR"),
            ("dir=s", "either mark=N or expect=REGEX"),
            ("dir=s,mark=1,expect=x", "either mark=N or expect=REGEX"),
            ("dir=s,mark=4294967296", "'4294967296' is not a whole number"),
            ("dir=s,expect=(", "expect"),
            ("dir=s,line=x", "unknown key 'line'"),
        ] {
            let error = parse(text).expect_err("refused");
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_table_is_the_same() {
        let read =
            |text: &str| toml::from_str::<RunOptions>(&format!("kernel = 'k'\n{text}")).expect("TOML").into_config();
        let table = read("[snapshot-at]\nmark = 7\ndir = 's'").expect("valid");
        assert_eq!(table.snapshot_at, read("snapshot-at = 'mark=7,dir=s'").expect("valid").snapshot_at);
        assert!(table.may_be_saved() && !read("").expect("valid").may_be_saved());
        assert_eq!(table.saved_to(), Some(Path::new("s")));
        for other in ["expect", "template"] {
            let error = read(&format!("snapshot-at = 'mark=7,dir=s'\n{other} = 'x'")).expect_err("refused").to_string();
            assert!(error.contains(&format!("--{other}")) && error.contains("--snapshot-at"), "{error}");
        }
    }
}
