//! Which of the tests are run: by parts of their names, by regular expressions, by shard.

use super::case::Case;
use super::shard::Shard;
use crate::escape::escape;
use regex::{Regex, RegexBuilder};
use thiserror::Error;

/// Bytes of a compiled regular expression at most.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// Bytes of a filter in a message.
const SHOWN_BYTES: usize = 200;

/// A filter cannot be used.
#[derive(Debug, Error)]
pub enum SelectionError {
    /// It is no regular expression.
    #[error("--regex {0}")]
    Regex(String, #[source] regex::Error),
    /// No test has a name that the options ask for: these options.
    #[error("no test is chosen by {0}; `hwvmm test --list` prints all names")]
    Nothing(String),
}

/// A choice of tests.
#[derive(Clone, Debug)]
pub struct Selection {
    parts: Vec<String>,
    regex: Option<Regex>,
    shard: Shard,
}

impl Selection {
    /// Tests whose name has one of `parts` in it (any, without parts), matches `regex`, and that are in `shard`.
    ///
    /// # Errors
    /// [`SelectionError::Regex`].
    pub fn new(parts: Vec<String>, regex: Option<&str>, shard: Shard) -> Result<Self, SelectionError> {
        let compile = |text: &str| {
            let regex = RegexBuilder::new(text).size_limit(MAX_REGEX_BYTES).build();
            regex.map_err(|error| SelectionError::Regex(text.to_owned(), error))
        };
        Ok(Self { parts, regex: regex.map(compile).transpose()?, shard })
    }

    /// Takes those that are chosen. The shard is one of the tests that the filters leave, so that all shards have as many.
    ///
    /// # Errors
    /// [`SelectionError::Nothing`] where the filters leave none. A shard may be empty.
    pub fn take(&self, cases: Vec<Case>) -> Result<Vec<Case>, SelectionError> {
        let named = |case: &Case| {
            (self.parts.is_empty() || self.parts.iter().any(|part| case.name.contains(part)))
                && self.regex.as_ref().is_none_or(|regex| regex.is_match(&case.name))
        };
        let left: Vec<Case> = cases.into_iter().filter(named).collect();
        if left.is_empty() {
            let parts = self.parts.iter().map(|part| format!("--filter '{}'", escape(part, SHOWN_BYTES)));
            let regex = self.regex.iter().map(|regex| format!("--regex '{}'", escape(regex.as_str(), SHOWN_BYTES)));
            return Err(SelectionError::Nothing(parts.chain(regex).collect::<Vec<_>>().join(" ")));
        }
        Ok(left.into_iter().enumerate().filter(|(place, _)| self.shard.has(*place)).map(|(_, case)| case).collect())
    }

    /// Returns the shard that is selected.
    #[must_use]
    pub fn shard(&self) -> Shard {
        self.shard
    }
}

#[cfg(test)]
mod tests {
    use super::super::{SuiteFile, expand};
    use super::*;
    use std::path::Path;

    fn chosen(parts: &[&str], regex: Option<&str>, shard: &str) -> Result<Vec<String>, SelectionError> {
        let text = "[[kernel]]\nname = 'k'\npath = 'k'\n[[test]]\nname = 'boot'\n[test.matrix]\ncpus = [1, 2, 3]\n[[test]]\nname = 'net'";
        let cases = expand(&[SuiteFile::parse(Path::new("s"), text).expect("a suite")], |_| false).expect("runs");
        let shard = Shard::parse(shard).expect("a shard");
        let parts = parts.iter().map(|part| (*part).to_owned()).collect();
        Ok(Selection::new(parts, regex, shard)?.take(cases)?.into_iter().map(|case| case.name).collect())
    }

    #[test]
    fn tests_are_chosen_by_name_and_shard() {
        assert_eq!(chosen(&[], None, "1/1").expect("all").len(), 4);
        assert_eq!(chosen(&["=2", "net"], None, "1/1").expect("two"), ["boot[cpus=2]", "net"]);
        assert_eq!(chosen(&[], Some("cpus=[12]"), "1/1").expect("two"), ["boot[cpus=1]", "boot[cpus=2]"]);
        assert_eq!(
            chosen(&["boot"], Some("^net"), "1/1").expect_err("none").to_string(),
            "no test is chosen by --filter 'boot' --regex '^net'; `hwvmm test --list` prints all names"
        );
        assert_eq!(chosen(&["boot"], None, "2/2").expect("one"), ["boot[cpus=2]"]);
        assert!(chosen(&["net"], None, "2/2").expect("an empty shard").is_empty());
        assert!(matches!(chosen(&[], Some("("), "1/1"), Err(SelectionError::Regex(..))));
    }
}
