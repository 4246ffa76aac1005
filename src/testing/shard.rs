//! Shards: the tests that one of many machines runs. Every test is in exactly one of them, whatever their number.

use std::env;
use std::fmt;
use std::path::PathBuf;
use thiserror::Error;

/// The most shards that a suite can have.
const MAX_TOTAL: u32 = 100_000;

/// One of some shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 1 to `total`.
    index: u32,
    total: u32,
}

/// A shard that does not exist.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ShardError {
    /// The text is not of the form.
    #[error(
        "'{0}' is no shard: write INDEX/TOTAL with an INDEX from 1 to TOTAL, such as 2/5 (TOTAL is at most {MAX_TOTAL})"
    )]
    Text(String),
    /// A variable of the environment is missing or wrong.
    #[error("{set} is set, and {name} is {problem}: set it to {form}, or give --shard 1/1 to run all tests")]
    Environment {
        /// The variable that is set.
        set: &'static str,
        /// The variable that is missing or wrong.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
        /// What it should be.
        form: &'static str,
    },
}

/// The variables of an engine that starts shards.
struct Engine {
    index: &'static str,
    total: &'static str,
    /// Number of the first shard, or the variable that has it.
    first: First,
}

enum First {
    Number(u32),
    /// A variable; the step between numbers is in the second one.
    Variable(&'static str, &'static str),
}

const ENGINES: [Engine; 5] = [
    // Bazel, "Test encyclopedia".
    Engine { index: "TEST_SHARD_INDEX", total: "TEST_TOTAL_SHARDS", first: First::Number(0) },
    // GitLab, `parallel`.
    Engine { index: "CI_NODE_INDEX", total: "CI_NODE_TOTAL", first: First::Number(1) },
    Engine { index: "BUILDKITE_PARALLEL_JOB", total: "BUILDKITE_PARALLEL_JOB_COUNT", first: First::Number(0) },
    // sbatch(1), job arrays.
    Engine {
        index: "SLURM_ARRAY_TASK_ID",
        total: "SLURM_ARRAY_TASK_COUNT",
        first: First::Variable("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP"),
    },
    // An indexed Job of Kubernetes, which does not tell its pods how many there are.
    Engine { index: "JOB_COMPLETION_INDEX", total: "HWVMM_SHARD_TOTAL", first: First::Number(0) },
];

impl Shard {
    /// The shard of a suite that is not split: all tests.
    pub const ALL: Self = Self { index: 1, total: 1 };

    fn new(index: u32, total: u32) -> Option<Self> {
        (1..=total.min(MAX_TOTAL)).contains(&index).then_some(Self { index, total }).filter(|_| total <= MAX_TOTAL)
    }

    /// Reads `INDEX/TOTAL`.
    ///
    /// # Errors
    /// [`ShardError::Text`].
    pub fn parse(text: &str) -> Result<Self, ShardError> {
        let number = |text: &str| text.parse::<u32>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
        text.split_once('/')
            .and_then(|(index, total)| Self::new(number(index)?, number(total)?))
            .ok_or_else(|| ShardError::Text(text.to_owned()))
    }

    /// The shard that the environment names: of Bazel, GitLab, Buildkite, Slurm or Kubernetes; all tests where it names none.
    ///
    /// # Errors
    /// [`ShardError::Environment`]
    pub fn of_environment() -> Result<Self, ShardError> {
        Self::of(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self, ShardError> {
        // GitLab sets the total in every job, and the index in those with `parallel` only.
        let Some((engine, index)) = ENGINES.iter().find_map(|engine| Some((engine, variable(engine.index)?))) else {
            return Ok(Self::ALL);
        };
        let wrong = |name, problem: String, form| ShardError::Environment { set: engine.index, name, problem, form };
        let number = |name: &'static str, text: &str| {
            text.trim().parse::<u32>().map_err(|_| wrong(name, format!("'{text}'"), "a whole number"))
        };
        let index = number(engine.index, &index)?;
        let total =
            variable(engine.total).ok_or_else(|| wrong(engine.total, "not set".into(), "the number of shards"))?;
        let total = number(engine.total, &total)?;
        let place = match engine.first {
            First::Number(first) => index.checked_sub(first),
            First::Variable(first, step) => {
                let first = variable(first).map_or(Ok(0), |text| number(first, &text))?;
                let step = variable(step).map_or(Ok(1), |text| number(step, &text))?;
                index.checked_sub(first).and_then(|behind| behind.checked_div(step))
            }
        };
        place
            .and_then(|place| Self::new(place.checked_add(1)?, total))
            .ok_or_else(|| wrong(engine.index, format!("{index} of {total}"), "the number of one of the shards"))
    }

    /// Returns true if the test with this place in the list of all tests (from 0) is in this shard.
    #[must_use]
    pub fn has(self, place: usize) -> bool {
        // A usize has 64 bits on x86_64.
        place as u64 % u64::from(self.total) + 1 == u64::from(self.index)
    }

    /// Its number, from 1.
    #[must_use]
    pub fn index(self) -> u32 {
        self.index
    }

    /// How many there are.
    #[must_use]
    pub fn total(self) -> u32 {
        self.total
    }
}

/// The file by which a test tells Bazel that it knows of shards ("Test encyclopedia"): to be made by it.
#[must_use]
pub fn bazel_status_file() -> Option<PathBuf> {
    env::var_os("TEST_SHARD_STATUS_FILE").filter(|path| !path.is_empty()).map(PathBuf::from)
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn of(variables: &[(&str, &str)]) -> Result<Shard, ShardError> {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        Shard::of(|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn engines_name_their_shards() {
        let shard = |text| Ok(Shard::parse(text).expect("a shard"));
        assert_eq!(of(&[]), Ok(Shard::ALL));
        assert_eq!(of(&[("CI_NODE_TOTAL", "1")]), Ok(Shard::ALL), "GitLab without `parallel`");
        assert_eq!(of(&[("TEST_SHARD_INDEX", "0"), ("TEST_TOTAL_SHARDS", "3")]), shard("1/3"));
        assert_eq!(of(&[("CI_NODE_INDEX", "3"), ("CI_NODE_TOTAL", "3")]), shard("3/3"));
        assert_eq!(of(&[("BUILDKITE_PARALLEL_JOB", "4"), ("BUILDKITE_PARALLEL_JOB_COUNT", "5")]), shard("5/5"));
        assert_eq!(of(&[("JOB_COMPLETION_INDEX", "1"), ("HWVMM_SHARD_TOTAL", "2")]), shard("2/2"));
        let slurm = [("SLURM_ARRAY_TASK_COUNT", "3"), ("SLURM_ARRAY_TASK_MIN", "2"), ("SLURM_ARRAY_TASK_STEP", "2")];
        for (id, place) in [("2", "1/3"), ("4", "2/3"), ("6", "3/3")] {
            assert_eq!(of(&[&slurm[..], &[("SLURM_ARRAY_TASK_ID", id)]].concat()), shard(place));
        }
    }

    #[test]
    fn an_environment_that_is_wrong_is_refused() {
        for (variables, words) in [
            (&[("JOB_COMPLETION_INDEX", "1")][..], "HWVMM_SHARD_TOTAL is not set"),
            (&[("CI_NODE_INDEX", "0"), ("CI_NODE_TOTAL", "3")], "CI_NODE_INDEX is 0 of 3"),
            (&[("CI_NODE_INDEX", "4"), ("CI_NODE_TOTAL", "3")], "CI_NODE_INDEX is 4 of 3"),
            (&[("TEST_SHARD_INDEX", "x"), ("TEST_TOTAL_SHARDS", "3")], "TEST_SHARD_INDEX is 'x'"),
            (
                &[("SLURM_ARRAY_TASK_ID", "1"), ("SLURM_ARRAY_TASK_COUNT", "2"), ("SLURM_ARRAY_TASK_STEP", "0")],
                "is 1 of 2",
            ),
        ] {
            let error = of(variables).expect_err("refused").to_string();
            assert!(error.contains(words) && error.contains("--shard 1/1"), "{error}");
        }
        for text in ["", "1", "0/2", "3/2", "1/0", "+1/2", "1/2/3", "1/100001", "a/b"] {
            assert_eq!(Shard::parse(text), Err(ShardError::Text(text.to_owned())));
        }
    }

    proptest! {
        #[test]
        fn every_test_is_in_one_shard(total in 1_u32..200, tests in 0_usize..500) {
            let shards: Vec<Shard> = (1..=total).map(|index| Shard::new(index, total).expect("a shard")).collect();
            let sizes: Vec<usize> = shards.iter().map(|shard| (0..tests).filter(|place| shard.has(*place)).count()).collect();
            for place in 0..tests {
                prop_assert_eq!(shards.iter().filter(|shard| shard.has(place)).count(), 1);
            }
            let (least, most) = (sizes.iter().min().expect("some"), sizes.iter().max().expect("some"));
            prop_assert!(most - least <= 1, "{:?}", sizes);
        }

        #[test]
        fn no_text_panics(text in ".*|[0-9/]*") {
            let _ = Shard::parse(&text);
        }
    }
}
