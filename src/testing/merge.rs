//! One report of the results of many shards.

use super::record::{FORMAT, Header, Line, MAX_HOSTS, RanOn, TestResult, VERSION};
use super::verdict::{Meaning, Verdict};
use crate::bounded_read::{self, ReadError};
use crate::escape::escape;
use hwvmm_devices::path_text::PathText as _;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The file with the results, in the folder of a run.
pub(super) const RESULTS: &str = "results.jsonl";
/// The largest file, in bytes.
const MAX_BYTES: u64 = 512 << 20;
/// Folders that are read at most.
const MAX_FOLDERS: u32 = 100_000;

/// Results cannot be merged.
#[derive(Debug, Error)]
pub enum MergeError {
    /// A file cannot be read.
    #[error("cannot read the results {}", .0.shown())]
    Read(PathBuf, #[source] ReadError),
    /// A file has no results of `hwvmm test`.
    #[error("{}, line {line}: {why}", .path.shown())]
    Content {
        /// The results.jsonl of the folder that was given.
        path: PathBuf,
        /// The number of the line.
        line: usize,
        /// The fault, for the message.
        why: String,
    },
    /// The folders are of runs with another number of shards.
    #[error("{} is one of {found} shards, and those before it of {expected}", .path.shown())]
    Shards {
        /// The results.jsonl of the folder that was given.
        path: PathBuf,
        /// Its number of shards.
        found: u32,
        /// That of the others.
        expected: u32,
    },
    /// A test is in two shards.
    #[error("{}: '{name}' has a result in another shard already: merge the folders of one run only", .path.shown())]
    Twice {
        /// The results.jsonl of the folder that was given.
        path: PathBuf,
        /// The test's name.
        name: String,
    },
    /// More folders are named than can be merged.
    #[error("more than {MAX_FOLDERS} folders")]
    TooMany,
}

/// The results of all shards.
#[derive(Debug, Default)]
pub struct Merged {
    /// The results, by the order of the folders.
    pub results: Vec<TestResult>,
    /// Tests that are missing in the folders that there are.
    pub not_run: usize,
    /// Shards of which there is no folder.
    pub missing_shards: Vec<u32>,
    /// Folders that have no whole results, with the reason: a node that crashed, a full disk. They are as good as missing.
    pub broken: Vec<MergeError>,
    /// The number of shards.
    pub shards: u32,
    /// What they ran on, each kind once.
    pub ran_on: Vec<RanOn>,
}

/// Returns true if `new` counts, of two results of a test whose shard was run again: what hwvmm or the host did is replaced, and a
/// failure, or a retry, is not made good by another run.
fn counts_more(new: Verdict, before: Verdict) -> bool {
    match (before.meaning(), new.meaning()) {
        (Meaning::Unknown, _) | (Meaning::Good, Meaning::Bad) => true,
        (Meaning::Good, Meaning::Good) => before == Verdict::Pass && new == Verdict::Flaky,
        (Meaning::Bad, _) | (Meaning::Good, Meaning::Unknown) => false,
    }
}

/// Reads `results.jsonl` in each of `folders`. Folders of the same shard are of a shard that was run again.
///
/// # Errors
/// [`MergeError`] where the folders are not of one run, or none of them can be read.
pub fn merge(folders: &[PathBuf]) -> Result<Merged, MergeError> {
    if folders.len() as u64 > u64::from(MAX_FOLDERS) {
        return Err(MergeError::TooMany);
    }
    let mut merged = Merged::default();
    // By name: the place of the result, and its shard.
    let mut places: BTreeMap<String, (usize, u32)> = BTreeMap::new();
    // By shard: the tests that it has, and those that have results.
    let mut sizes: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
    for folder in folders {
        let path = folder.join(RESULTS);
        let (header, results) = match read(&path) {
            Ok(read) => read,
            Err(error) => {
                merged.broken.push(error);
                continue;
            }
        };
        if merged.shards != 0 && merged.shards != header.shards {
            return Err(MergeError::Shards { path, found: header.shards, expected: merged.shards });
        }
        merged.shards = header.shards;
        for ran_on in header.ran_on.into_iter().map(RanOn::escaped) {
            if merged.ran_on.len() < MAX_HOSTS && !merged.ran_on.contains(&ran_on) {
                merged.ran_on.push(ran_on);
            }
        }
        let (size, found) = sizes.entry(header.shard).or_default();
        *size = header.tests.max(*size);
        for result in results {
            let name = result.name.clone();
            match places.get(&name) {
                None => {
                    *found += 1;
                    places.insert(name, (merged.results.len(), header.shard));
                    merged.results.push(result);
                }
                Some((_, shard)) if *shard != header.shard => return Err(MergeError::Twice { path, name }),
                Some((place, _)) => {
                    if let Some(before) = merged.results.get_mut(*place)
                        && counts_more(result.verdict, before.verdict)
                    {
                        *before = result;
                    }
                }
            }
        }
    }
    if merged.shards == 0 && !merged.broken.is_empty() {
        return Err(merged.broken.remove(0));
    }
    // Each shard by itself: the results of one do not stand for those of another.
    let missing = sizes.values().map(|(size, found)| size.saturating_sub(*found));
    merged.not_run = missing.fold(0, usize::saturating_add);
    let there: BTreeSet<u32> = sizes.into_keys().collect();
    merged.missing_shards = (1..=merged.shards).filter(|shard| !there.contains(shard)).collect();
    Ok(merged)
}

fn read(path: &Path) -> Result<(Header, Vec<TestResult>), MergeError> {
    let text = bounded_read::read_text(path, MAX_BYTES).map_err(|error| MergeError::Read(path.to_owned(), error))?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<(Header, Vec<TestResult>), MergeError> {
    let fail = |line: usize, why: String| MergeError::Content { path: path.to_owned(), line, why: escape(&why, 300) };
    let mut lines = text.lines().enumerate();
    let header: Line = serde_json::from_str(lines.next().map_or("", |(_, line)| line))
        .map_err(|error| fail(1, format!("these are no results of hwvmm test: {error}")))?;
    let header = match header {
        Line::Header(header) if header.format == FORMAT && header.version == VERSION => header,
        Line::Header(header) if header.format == FORMAT => {
            return Err(fail(1, format!("version {}; this hwvmm reads version {VERSION}", header.version)));
        }
        Line::Header(_) | Line::Result(_) => return Err(fail(1, "these are no results of hwvmm test".into())),
    };
    if !(1..=header.shards).contains(&header.shard) || header.shards > MAX_FOLDERS {
        return Err(fail(1, format!("there is no shard {} of {}", header.shard, header.shards)));
    }
    if header.tests > super::MAX_TESTS {
        return Err(fail(1, format!("{} tests are more than a suite has", header.tests)));
    }
    let mut results = Vec::new();
    for (index, line) in lines {
        match serde_json::from_str(line) {
            Ok(Line::Result(_)) if results.len() == header.tests => {
                return Err(fail(index + 1, format!("more results than its {} tests", header.tests)));
            }
            Ok(Line::Result(result)) => results.push(result.escaped()),
            Ok(Line::Header(_)) => return Err(fail(index + 1, "a second header".into())),
            Err(error) => return Err(fail(index + 1, error.to_string())),
        }
    }
    Ok((header, results))
}

#[cfg(test)]
mod tests {
    use super::super::Shard;
    use super::super::record::tests::sample;
    use super::*;

    fn host(shard: &str) -> RanOn {
        let kvm = Some(if shard.starts_with('2') { "kvm_amd" } else { "kvm_intel" }.to_owned());
        RanOn { hwvmm: "1".into(), kvm, mmu: "nested paging".into(), nested: false }
    }

    /// A folder with the results of a shard of `tests` tests.
    fn shard(base: &Path, name: &str, shard: &str, tests: usize, results: &[TestResult]) -> PathBuf {
        let folder = base.join(name);
        std::fs::create_dir(&folder).expect("made");
        let mut text =
            Header::new(Shard::parse(shard).expect("a shard"), tests, vec![host(shard)]).json().expect("JSON");
        results.iter().for_each(|result| text += &result.json().expect("JSON"));
        std::fs::write(folder.join(RESULTS), text).expect("written");
        folder
    }

    #[test]
    fn shards_make_one_report() {
        let base = tempfile::tempdir().expect("a folder");
        let one =
            shard(base.path(), "1", "1/3", 2, &[sample("a", Verdict::Pass), sample("b", Verdict::Infrastructure)]);
        let two = shard(base.path(), "2", "2/3", 2, &[sample("c", Verdict::Fail)]);
        let again = shard(base.path(), "3", "1/3", 2, &[sample("b", Verdict::Pass)]);
        for folders in [[&one, &two, &again], [&again, &one, &two]] {
            let merged = merge(&folders.map(Clone::clone)).expect("merged");
            let mut verdicts: Vec<_> = merged.results.iter().map(|result| (&*result.name, result.verdict)).collect();
            verdicts.sort();
            assert_eq!(verdicts, [("a", Verdict::Pass), ("b", Verdict::Pass), ("c", Verdict::Fail)]);
            assert_eq!((merged.not_run, &merged.missing_shards[..]), (1, &[3][..]));
        }
        let overlapping = shard(base.path(), "overlapping", "2/3", 2, &[sample("a", Verdict::Pass)]);
        let twice = merge(&[one.clone(), overlapping]).expect_err("refused").to_string();
        assert!(twice.contains("'a' has a result in another shard already"), "{twice}");
        let other = shard(base.path(), "4", "1/2", 0, &[]);
        assert!(matches!(merge(&[one, other]), Err(MergeError::Shards { found: 2, expected: 3, .. })));
        assert!(matches!(merge(&[base.path().join("none")]), Err(MergeError::Read(..))));
    }

    #[test]
    fn a_folder_that_is_broken_costs_no_report() {
        let base = tempfile::tempdir().expect("a folder");
        let whole = shard(base.path(), "1", "1/2", 1, &[sample("a", Verdict::Pass)]);
        let cut = shard(base.path(), "2", "2/2", 1, &[sample("b", Verdict::Pass)]);
        let text = std::fs::read_to_string(cut.join(RESULTS)).expect("read");
        std::fs::write(cut.join(RESULTS), &text[..text.len() - 9]).expect("written");
        let missing = base.path().join("none");
        let merged = merge(&[missing.clone(), whole, cut.clone()]).expect("merged");
        assert_eq!((merged.results.len(), &merged.missing_shards[..]), (1, &[2][..]));
        let [first, second] = &merged.broken[..] else { panic!("{:?}", merged.broken) };
        assert!(matches!(first, MergeError::Read(..)) && second.to_string().contains("line 2: EOF"), "{second}");
        assert!(matches!(merge(&[missing, cut]), Err(MergeError::Read(..))), "nothing to report");
    }

    #[test]
    fn a_shard_that_was_run_again_hides_no_failure() {
        use Verdict::{Fail, Flaky, Infrastructure, Pass, Skip};
        let base = tempfile::tempdir().expect("a folder");
        let pairs = [
            (Pass, Infrastructure, Pass),
            (Pass, Fail, Fail),
            (Fail, Infrastructure, Fail),
            (Pass, Flaky, Flaky),
            (Skip, Pass, Skip),
            (Infrastructure, Infrastructure, Infrastructure),
        ];
        for (number, (one, two, both)) in pairs.into_iter().enumerate() {
            let folder = |try_number: u32, verdict| {
                shard(base.path(), &format!("{number}-{try_number}"), "1/1", 1, &[sample("a", verdict)])
            };
            let (one, two) = (folder(1, one), folder(2, two));
            let of = |folders: &[PathBuf]| merge(folders).expect("merged").results[0].verdict;
            assert_eq!(of(&[one.clone(), two.clone()]), both);
            // Which of two good ones it is does not matter.
            assert_eq!(of(&[two, one]).meaning(), both.meaning());
        }
    }

    #[test]
    fn results_of_one_shard_do_not_stand_for_those_of_another() {
        let base = tempfile::tempdir().expect("a folder");
        let one = shard(base.path(), "1", "1/2", 1, &[sample("a", Verdict::Pass)]);
        let renamed = shard(base.path(), "2", "1/2", 1, &[sample("a2", Verdict::Pass)]);
        let two = shard(base.path(), "3", "2/2", 1, &[]);
        let merged = merge(&[one, renamed, two]).expect("merged");
        assert_eq!((merged.results.len(), merged.not_run), (2, 1));
    }

    #[test]
    fn what_are_no_results_is_refused() {
        let header = Header::new(Shard::ALL, 1, Vec::new()).json().expect("JSON");
        let result = sample("a", Verdict::Pass).json().expect("JSON");
        for (text, words) in [
            (String::new(), "line 1: these are no results"),
            (result.clone(), "line 1: these are no results"),
            (header.replace("\"version\":1", "\"version\":2"), "version 2; this hwvmm reads version 1"),
            (header.replace("\"shard\":1", "\"shard\":0"), "no shard 0 of 1"),
            (header.replace("\"tests\":1", "\"tests\":10001"), "more than a suite has"),
            (format!("{header}{result}{result}"), "line 3: more results than its 1 tests"),
            (format!("{header}{header}"), "line 2: a second header"),
            (format!("{header}x"), "line 2: expected value"),
        ] {
            let error = parse(Path::new("r"), &text).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
