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
    /// One of two variables of an engine is missing.
    #[error("{set} is set, and {missing} is not set: set it, or give --shard 1/1 to run all tests")]
    Missing {
        /// The variable that is set.
        set: &'static str,
        /// The variable that is not.
        missing: &'static str,
    },
    /// A variable has a value that it cannot have.
    #[error("{name} is '{value}': it must be a whole number from {from} to {to}; --shard 1/1 runs all tests")]
    Value {
        /// The name of the variable.
        name: &'static str,
        /// The text that the variable has.
        value: String,
        /// The least value.
        from: u32,
        /// The largest value.
        to: u32,
    },
    /// There are fewer shards than the number of this one says.
    #[error("{name} is {index} of {total} shards, of which the first is {first}; --shard 1/1 runs all tests")]
    None {
        /// The variable with the number.
        name: &'static str,
        /// The number of the shard.
        index: u32,
        /// How many shards there are.
        total: u32,
        /// The number of the first one.
        first: u32,
    },
    /// An array of Slurm's whose tasks are not those of all shards.
    #[error(
        "an array of {count} tasks from {first} to {last} does not say how many shards there are and which this one is: \
         give --shard INDEX/TOTAL (1/1 runs all tests), or start the array with all shards, such as --array=1-5"
    )]
    Array {
        /// The number of tasks.
        count: u32,
        /// The number of the first task.
        first: u32,
        /// The number of the last task.
        last: u32,
    },
}

/// The variables of an engine that starts shards.
struct Engine {
    index: &'static str,
    total: &'static str,
    first: First,
}

/// What says which number the first shard has.
enum First {
    /// It is always this one.
    Number(u32),
    /// The variables of an array of Slurm's.
    OfArray,
}

const ENGINES: [Engine; 5] = [
    // Bazel, "Test encyclopedia".
    Engine { index: "TEST_SHARD_INDEX", total: "TEST_TOTAL_SHARDS", first: First::Number(0) },
    // GitLab, `parallel`.
    Engine { index: "CI_NODE_INDEX", total: "CI_NODE_TOTAL", first: First::Number(1) },
    Engine { index: "BUILDKITE_PARALLEL_JOB", total: "BUILDKITE_PARALLEL_JOB_COUNT", first: First::Number(0) },
    // sbatch(1), job arrays.
    Engine { index: "SLURM_ARRAY_TASK_ID", total: "SLURM_ARRAY_TASK_COUNT", first: First::OfArray },
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
    /// [`ShardError`], but for [`ShardError::Text`].
    pub fn of_environment() -> Result<Self, ShardError> {
        Self::of(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self, ShardError> {
        let number = |name: &'static str, from: u32, to: u32| {
            let read = |value: String| {
                let number = value.trim().parse().ok().filter(|number| (from..=to).contains(number));
                number.ok_or(ShardError::Value { name, value, from, to })
            };
            variable(name).map(read).transpose()
        };
        let Some(engine) = ENGINES.iter().find(|engine| variable(engine.index).is_some()) else {
            // GitLab sets the total in every job, and the index in those with `parallel` only. More than one shard, and none of
            // them to be this one, would be all tests on each machine.
            for Engine { index, total, .. } in &ENGINES {
                if number(total, 1, MAX_TOTAL)?.is_some_and(|shards| shards > 1) {
                    return Err(ShardError::Missing { set: total, missing: index });
                }
            }
            return Ok(Self::ALL);
        };
        let missing = |missing| ShardError::Missing { set: engine.index, missing };
        let index = number(engine.index, 0, u32::MAX)?.ok_or_else(|| missing(engine.index))?;
        let total = number(engine.total, 1, MAX_TOTAL)?.ok_or_else(|| missing(engine.total))?;
        let (first, step) = match engine.first {
            First::Number(first) => (first, 1),
            First::OfArray => {
                let first = number("SLURM_ARRAY_TASK_MIN", 0, u32::MAX)?.unwrap_or(0);
                let step = number("SLURM_ARRAY_TASK_STEP", 1, u32::MAX)?.unwrap_or(1);
                let last = number("SLURM_ARRAY_TASK_MAX", 0, u32::MAX)?;
                let has_all =
                    last.is_none_or(|last| last.checked_sub(first).is_some_and(|all| all / step + 1 == total));
                // One task is the whole, or one that is run again alone.
                if total == 1 || !has_all {
                    return Err(ShardError::Array { count: total, first, last: last.unwrap_or(first) });
                }
                (first, step)
            }
        };
        let place = index.checked_sub(first).filter(|behind| behind % step == 0).map(|behind| behind / step);
        place.and_then(|place| Self::new(place.checked_add(1)?, total)).ok_or(ShardError::None {
            name: engine.index,
            index,
            total,
            first,
        })
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
        assert_eq!(of(&[("HWVMM_SHARD_TOTAL", "1")]), Ok(Shard::ALL), "it is the only one");
        let slurm = [
            ("SLURM_ARRAY_TASK_COUNT", "3"),
            ("SLURM_ARRAY_TASK_MIN", "2"),
            ("SLURM_ARRAY_TASK_MAX", "7"),
            ("SLURM_ARRAY_TASK_STEP", "2"),
        ];
        for (id, place) in [("2", "1/3"), ("4", "2/3"), ("6", "3/3")] {
            assert_eq!(of(&[&slurm[..], &[("SLURM_ARRAY_TASK_ID", id)]].concat()), shard(place));
        }
    }

    #[test]
    fn an_environment_that_is_wrong_is_refused() {
        for (variables, words) in [
            (&[("JOB_COMPLETION_INDEX", "1")][..], "HWVMM_SHARD_TOTAL is not set"),
            (&[("HWVMM_SHARD_TOTAL", "3")], "HWVMM_SHARD_TOTAL is set, and JOB_COMPLETION_INDEX is not set"),
            (&[("TEST_TOTAL_SHARDS", "2")], "TEST_SHARD_INDEX is not set"),
            (&[("CI_NODE_TOTAL", "x")], "CI_NODE_TOTAL is 'x'"),
            (
                &[("CI_NODE_INDEX", "0"), ("CI_NODE_TOTAL", "3")],
                "CI_NODE_INDEX is 0 of 3 shards, of which the first is 1",
            ),
            (&[("CI_NODE_INDEX", "4"), ("CI_NODE_TOTAL", "3")], "CI_NODE_INDEX is 4 of 3"),
            (
                &[("CI_NODE_INDEX", "1"), ("CI_NODE_TOTAL", "200000")],
                "CI_NODE_TOTAL is '200000': it must be a whole number from 1 to 100000",
            ),
            (&[("CI_NODE_INDEX", "1"), ("CI_NODE_TOTAL", "0")], "CI_NODE_TOTAL is '0'"),
            (&[("TEST_SHARD_INDEX", "x"), ("TEST_TOTAL_SHARDS", "3")], "TEST_SHARD_INDEX is 'x'"),
        ] {
            let error = of(variables).expect_err("refused").to_string();
            assert!(error.contains(words) && !error.contains("is set, and TEST_SHARD_INDEX is 'x'"), "{error}");
            assert!(error.contains("--shard 1/1"), "{error}");
        }
        for text in ["", "1", "0/2", "3/2", "1/0", "+1/2", "1/2/3", "1/100001", "a/b"] {
            assert_eq!(Shard::parse(text), Err(ShardError::Text(text.to_owned())));
        }
    }

    /// `sbatch --array=`: its tasks are shards only where they are all there, at equal distances.
    #[test]
    fn an_array_of_slurms_that_does_not_say_how_many_shards_there_are_is_refused() {
        let task = |id, count, min, max, step| {
            of(&[
                ("SLURM_ARRAY_TASK_ID", id),
                ("SLURM_ARRAY_TASK_COUNT", count),
                ("SLURM_ARRAY_TASK_MIN", min),
                ("SLURM_ARRAY_TASK_MAX", max),
                ("SLURM_ARRAY_TASK_STEP", step),
            ])
        };
        assert_eq!(task("5", "5", "1", "5", "1"), Shard::parse("5/5"));
        let sparse = task("5", "3", "2", "9", "1").expect_err("2,5,9");
        assert_eq!(sparse, ShardError::Array { count: 3, first: 2, last: 9 });
        assert!(sparse.to_string().contains("give --shard INDEX/TOTAL"), "{sparse}");
        assert_eq!(
            task("2", "1", "2", "2", "1"),
            Err(ShardError::Array { count: 1, first: 2, last: 2 }),
            "again, alone"
        );
        assert!(matches!(task("1", "2", "0", "1", "0"), Err(ShardError::Value { name: "SLURM_ARRAY_TASK_STEP", .. })));
        assert!(matches!(task("3", "2", "0", "2", "2"), Err(ShardError::None { index: 3, .. })));
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
