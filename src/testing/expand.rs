//! Makes the list of runs from a suite: each test with each of its kernels and each combination of its matrix.

use super::case::{Case, Needs};
use super::file::{KernelEntry, Start, SuiteFile, TestEntry};
use super::options::{StdoutOf, TIMEOUT, path_value, run_options};
use super::problem::{PROBLEM_BYTES, Problem};
use super::template::Template;
use crate::escape::escape;
use crate::tune::Lever;
use hwvmm_devices::path_text::PathText as _;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use thiserror::Error;
use toml::{Table, Value};

/// Runs of all suites together, at most.
pub const MAX_TESTS: usize = 10_000;
/// Kernels of one suite at most.
const MAX_KERNELS: usize = 1000;
/// Bytes of a value in the name of a run.
const VALUE_BYTES: usize = 60;

/// A suite names runs that cannot be.
#[derive(Debug, Error)]
pub enum ExpandError {
    /// There are too many.
    #[error("there are more than {MAX_TESTS} tests: write fewer, or split the suite into files")]
    TooMany,
    /// Something in a test is wrong.
    #[error("{}: {place}: {}", .path.shown(), escape(&.problem.to_string(), PROBLEM_BYTES))]
    Content {
        /// The suite's file.
        path: PathBuf,
        /// The table in it that is wrong.
        place: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// Two runs have one name, which results and baselines could not tell apart.
    #[error("two tests have the name '{name}': {}", in_files(.first, .second))]
    Twice {
        /// The name that both tests have.
        name: String,
        /// The suite's file with the first one.
        first: PathBuf,
        /// The suite's file with the second one.
        second: PathBuf,
    },
}

fn in_files(first: &Path, second: &Path) -> String {
    if first == second {
        format!("both are in {}; give one of them another name", first.shown())
    } else {
        format!(
            "one in {}, one in {}; give one of them another name, or run the files apart",
            first.shown(),
            second.shown()
        )
    }
}

/// What the file of a [`KernelEntry`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileKind {
    /// A kernel.
    Kernel,
    /// A disk image with a kernel in it.
    Image,
}

/// A kernel that a pattern of a path has found.
struct Found<'a> {
    label: String,
    path: PathBuf,
    kind: FileKind,
    entry: &'a KernelEntry,
}

/// Returns the runs of `suites`, in the order of the files. `is_image` says whether the file at a path is a disk image.
///
/// # Errors
/// [`ExpandError`].
pub fn expand(suites: &[SuiteFile], is_image: impl Fn(&Path) -> bool) -> Result<Vec<Case>, ExpandError> {
    let mut cases = Vec::new();
    let mut places: Vec<&SuiteFile> = Vec::new();
    for suite in suites {
        let fail = |place: String, problem: Problem| ExpandError::Content {
            path: suite.path.clone(),
            place: escape(&place, 250),
            problem: Box::new(problem),
        };
        let kind = |path: &Path| if is_image(&suite.folder().join(path)) { FileKind::Image } else { FileKind::Kernel };
        let mut kernels = Vec::new();
        for entry in &suite.kernels {
            let found = find(suite.folder(), entry, kind);
            let found = found.map_err(|problem| fail(format!("kernel '{}'", entry.name), problem))?;
            kernels.extend(found);
            if kernels.len() > MAX_KERNELS {
                return Err(fail(format!("kernel '{}'", entry.name), Problem::TooManyKernels(MAX_KERNELS)));
            }
        }
        for test in &suite.tests {
            let of = format!("test '{}'", test.name);
            let chosen = choose(test, &kernels).map_err(|problem| fail(of.clone(), problem))?;
            let values = test.matrix.iter().filter(|(key, _)| key != "kernel").map(|(_, values)| values.len());
            let runs = values.fold(chosen.len(), usize::saturating_mul);
            if cases.len().saturating_add(runs) > MAX_TESTS {
                return Err(ExpandError::TooMany);
            }
            for kernel in &chosen {
                for combination in combinations(test) {
                    let case = case(suite, test, kernel, &combination, chosen.len() > 1);
                    cases.push(case.map_err(|problem| fail(of.clone(), problem))?);
                    places.push(suite);
                }
            }
        }
    }
    let mut names = HashMap::new();
    for (Case { name, .. }, suite) in cases.iter().zip(places) {
        if let Some(first) = names.insert(name.as_str(), &suite.path) {
            let (first, second) = (first.clone(), suite.path.clone());
            return Err(ExpandError::Twice { name: name.clone(), first, second });
        }
    }
    Ok(cases)
}

/// The kernels at the path of `entry`.
fn find<'a>(
    folder: &Path,
    entry: &'a KernelEntry,
    kind: impl Fn(&Path) -> FileKind,
) -> Result<Vec<Found<'a>>, Problem> {
    if !entry.path.contains(['*', '?', '[']) {
        let path = PathBuf::from(&entry.path);
        return Ok(vec![Found { label: entry.name.clone(), kind: kind(&path), path, entry }]);
    }
    let within =
        folder.to_str().ok_or(Problem::NotUtf8("the path of the suite's folder, where a kernel's has a pattern,"))?;
    let pattern = if Path::new(&entry.path).is_absolute() {
        entry.path.clone()
    } else {
        format!("{}/{}", glob::Pattern::escape(within), entry.path)
    };
    let options =
        glob::MatchOptions { require_literal_separator: true, require_literal_leading_dot: true, ..Default::default() };
    let paths = glob::glob_with(&pattern, options).map_err(|error| Problem::Pattern { key: "path".into(), error })?;
    let mut found = Vec::new();
    for path in paths.take(MAX_KERNELS + 1) {
        let path = path.map_err(Problem::Glob)?;
        let name = path.file_name().unwrap_or_default().shown().to_string();
        let path = path.strip_prefix(folder).map_or(path.clone(), Path::to_owned);
        found.push(Found { label: format!("{}:{name}", entry.name), kind: kind(&path), path, entry });
    }
    if found.is_empty() {
        return Err(Problem::NoMatch(entry.path.clone()));
    }
    Ok(found)
}

/// The kernels of a test.
fn choose<'a>(test: &TestEntry, kernels: &'a [Found<'a>]) -> Result<Vec<&'a Found<'a>>, Problem> {
    let in_matrix = test.matrix.iter().find(|(key, _)| key == "kernel").map(|(_, values)| values);
    let names: Option<Vec<&str>> = match in_matrix {
        Some(values) => {
            let names: Option<Vec<&str>> = values.iter().map(Value::as_str).collect();
            Some(names.ok_or_else(|| Problem::Kind {
                key: "matrix: kernel".into(),
                wanted: "a list of names",
                found: None,
            })?)
        }
        None => test.kernels.as_ref().map(|names| names.iter().map(String::as_str).collect()),
    };
    let Some(names) = names else {
        return if kernels.is_empty() {
            Err(Problem::NoTables { place: "there is", table: "kernel" })
        } else {
            Ok(kernels.iter().collect())
        };
    };
    let mut chosen: Vec<bool> = vec![false; kernels.len()];
    for name in names {
        let pattern = glob::Pattern::new(name)
            .map_err(|error| Problem::Pattern { key: format!("kernel '{}'", escape(name, VALUE_BYTES)), error })?;
        let mut any = false;
        for (index, kernel) in kernels.iter().enumerate() {
            if kernel.entry.name == name || pattern.matches(&kernel.entry.name) || pattern.matches(&kernel.label) {
                (any, chosen[index]) = (true, true);
            }
        }
        if !any {
            let mut known: Vec<String> = kernels.iter().map(|kernel| kernel.entry.name.clone()).collect();
            known.dedup();
            return Err(Problem::NoKernel { name: name.to_owned(), known });
        }
    }
    Ok(kernels.iter().zip(chosen).filter(|(_, chosen)| *chosen).map(|(kernel, _)| kernel).collect())
}

/// Each combination of the values of a matrix.
fn combinations(test: &TestEntry) -> Vec<Vec<(&str, &Value)>> {
    let mut all = vec![Vec::new()];
    for (key, values) in test.matrix.iter().filter(|(key, _)| key != "kernel") {
        all = all
            .into_iter()
            .flat_map(|before: Vec<(&str, &Value)>| {
                values.iter().map(move |value| {
                    let mut with = before.clone();
                    with.push((key.as_str(), value));
                    with
                })
            })
            .collect();
    }
    all
}

fn case(
    suite: &SuiteFile,
    test: &TestEntry,
    kernel: &Found<'_>,
    combination: &[(&str, &Value)],
    names_kernel: bool,
) -> Result<Case, Problem> {
    let mut options = test.defaults.clone();
    options.extend(kernel.entry.options.clone());
    options.extend(test.options.clone());
    let mut parts: Vec<String> = names_kernel.then(|| kernel.label.clone()).into_iter().collect();
    for (key, value) in combination {
        options.insert((*key).to_owned(), (*value).clone());
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        parts.push(format!("{key}={}", escape(&value, VALUE_BYTES)));
    }
    let key = match kernel.kind {
        FileKind::Kernel => "kernel",
        FileKind::Image => "kernel-from",
    };
    options.insert(key.into(), path_value(&kernel.path));
    // A command leaves it as it is.
    let is_boot = kernel.kind == FileKind::Image && !options.contains_key("command");
    if is_boot && !run_options(&options)?.has_disk(&kernel.path) {
        add_read_only_disk(&mut options, &kernel.path);
    }
    with_default_levers(&mut options);
    options.entry("timeout").or_insert_with(|| Value::String(TIMEOUT.into()));
    let needs = Needs::of(&options)?;
    let is_template = test.settings.start == Start::Template && needs.stdout == StdoutOf::Command;
    let template = is_template.then(|| Template::of(&options)).transpose()?;
    let name = if parts.is_empty() { test.name.clone() } else { format!("{}[{}]", test.name, parts.join(",")) };
    Ok(Case { name, folder: suite.folder().to_owned(), options, settings: test.settings.clone(), needs, template })
}

/// Sets the lever that is on for tests alone. What the suite sets comes behind it, and wins.
fn with_default_levers(options: &mut Table) {
    let mut levers = vec![Value::String(format!("{}=on", Lever::NoCryptoSelftests.name()))];
    match options.remove("tune") {
        None => {}
        Some(Value::Array(given)) => levers.extend(given),
        Some(one) => levers.push(one),
    }
    options.insert("tune".into(), Value::Array(levers));
}

/// Makes the image of a kernel the first disk. It is read-only: other tests, also at the same time, find it as this one does.
fn add_read_only_disk(options: &mut Table, path: &Path) {
    let disk = [("path".to_owned(), path_value(path)), ("readonly".to_owned(), Value::Boolean(true))];
    let mut disks = vec![Value::Table(Table::from_iter(disk))];
    match options.remove("disk") {
        None => {}
        Some(Value::Array(given)) => disks.extend(given),
        Some(one) => disks.push(one),
    }
    options.insert("disk".into(), Value::Array(disks));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RootChoice;

    fn cases_of(text: &str) -> Result<Vec<Case>, ExpandError> {
        let is_image = |path: &Path| path.extension().is_some_and(|extension| extension == "img");
        expand(&[SuiteFile::parse(Path::new("suite.toml"), text).expect("a suite")], is_image)
    }

    fn names(text: &str) -> Vec<String> {
        cases_of(text).expect("runs").into_iter().map(|case| case.name).collect()
    }

    const KERNELS: &str = "[[kernel]]\nname = 'a'\npath = 'ka'\ncpus = 3\n[[kernel]]\nname = 'b'\npath = 'kb'\n";

    #[test]
    fn a_test_is_run_with_each_kernel_and_combination() {
        let all = names(&format!("{KERNELS}[[test]]\nname = 't'\n[test.matrix]\ncpus = [1, 2]\nappend = ['', 'x y']"));
        assert_eq!(all.len(), 8);
        assert_eq!(all[0], "t[a,append=,cpus=1]", "{all:?}");
        assert_eq!(names(&format!("{KERNELS}[[test]]\nname = 't'\nkernel = 'b'")), ["t"]);
        assert_eq!(names(&format!("{KERNELS}[[test]]\nname = 't'\nkernel = '*'")), ["t[a]", "t[b]"]);
        assert_eq!(names(&format!("{KERNELS}[[test]]\nname = 't'\n[test.matrix]\nkernel = ['a']")), ["t"]);
    }

    #[test]
    fn options_come_from_the_defaults_the_kernel_the_test_and_the_matrix() {
        let of = |text: &str| {
            cases_of(&format!("[defaults]\ncpus = 2\nmemory = '1G'\n{KERNELS}[[test]]\nname = 't'\n{text}"))
        };
        let vcpus = |text: &str| of(text).expect("runs").iter().map(|case| case.needs.vcpus).collect::<Vec<_>>();
        assert_eq!(vcpus(""), [3, 2], "the kernel's before the defaults");
        assert_eq!(vcpus("cpus = 4"), [4, 4]);
        assert_eq!(vcpus("kernel = 'a'\n[test.matrix]\ncpus = [5, 6]"), [5, 6]);
        let roots = of("kernel = 'a'\nrun = 'x'\n[test.matrix]\nroot = ['none', 'a/root']").expect("runs");
        assert_eq!(roots.iter().map(|case| case.name.as_str()).collect::<Vec<_>>(), ["t[root=none]", "t[root=a/root]"]);
        assert_eq!(roots[1].options.get("root").and_then(Value::as_str), Some("a/root"));
        let case = of("kernel = 'a'").expect("runs").remove(0);
        assert_eq!((case.needs.memory_bytes, case.needs.timeout.as_secs()), (1 << 30, 300));
        assert_eq!(case.options.get("kernel").and_then(Value::as_str), Some("ka"));
    }

    #[test]
    fn tests_with_the_same_kernel_and_options_share_a_template() {
        let all = cases_of(&format!(
            "[defaults]\ntemplate = true\n{KERNELS}[[test]]\nname = 't'\nrun = 'x'\n[[test]]\nname = 'u'\nkernel = 'a'\n\
             run = 'y'\nsilence = '5s'\n[[test]]\nname = 'boot'\n[[test]]\nname = 'v'\nrun = 'z'\ntemplate = false\n"
        ))
        .expect("runs");
        let named = |name: &str| all.iter().find(|case| case.name == name).expect("a test");
        let [a, b, u] = ["t[a]", "t[b]", "u"].map(|name| named(name).template.as_ref().expect("a template"));
        assert!(a.boot == u.boot && a.boot != b.boot);
        assert!(["boot[a]", "boot[b]", "v[a]"].iter().all(|name| named(name).template.is_none()));
    }

    #[test]
    fn ciphers_are_not_tested_unless_the_suite_asks() {
        let cmdline = |text: &str| {
            let case =
                cases_of(&format!("{KERNELS}[[test]]\nname = 't'\nkernel = 'a'\n{text}")).expect("runs").remove(0);
            let options: crate::config::RunOptions = Value::Table(case.options).try_into().expect("options");
            options.into_config().expect("valid").kernel_cmdline()
        };
        assert!(cmdline("").contains("cryptomgr.notests"));
        assert!(cmdline("tune = 'x2apic=off'").contains("cryptomgr.notests"));
        for own in ["tune = 'no-crypto-selftests=off'", "tune = ['all=off']", "cmdline = 'console=ttyS0'"] {
            assert!(!cmdline(own).contains("cryptomgr"), "{own}");
        }
    }

    #[test]
    fn patterns_find_kernels() {
        let folder = tempfile::tempdir().expect("a folder");
        let boot = folder.path().join("b[o]ot");
        std::fs::create_dir(&boot).expect("made");
        for name in ["vmlinuz-1", "vmlinuz-2", "other", ".vmlinuz-3"] {
            std::fs::write(boot.join(name), "").expect("written");
        }
        let of = |path: &str| {
            let text = format!("[[kernel]]\nname = 'k'\npath = '{path}'\n[[test]]\nname = 't'");
            expand(&[SuiteFile::parse(&boot.join("s.toml"), &text).expect("a suite")], |path| {
                path.ends_with("vmlinuz-2")
            })
        };
        let found = of("vmlinuz-*").expect("two");
        assert_eq!(
            found.iter().map(|case| case.name.as_str()).collect::<Vec<_>>(),
            ["t[k:vmlinuz-1]", "t[k:vmlinuz-2]"]
        );
        assert_eq!(found[0].options.get("kernel").and_then(Value::as_str), Some("vmlinuz-1"));
        assert!(found[1].options.contains_key("kernel-from"), "it is looked at in the suite's folder");
        assert_eq!(of("vmlinuz-2*").expect("one")[0].name, "t", "one kernel needs no name");
        assert!(of("none-*").expect_err("none").to_string().contains("no file matches 'none-*'"));
    }

    #[test]
    fn a_kernel_can_be_in_a_disk_image() {
        const IMAGES: &str = "[[kernel]]\nname = 'a'\npath = 'a,b.img'\nentry = '1>0'\n";
        let of = |text: &str| {
            let all = cases_of(&format!("{IMAGES}[[test]]\nname = 't'\n{text}")).map(|mut cases| cases.remove(0));
            all.map(|case| {
                // As the run reads it.
                let text = toml::to_string(&case.options).expect("TOML");
                let options: crate::config::RunOptions = toml::from_str(&text).expect("options");
                (case.needs.stdout, options.into_config().expect("valid"))
            })
        };
        let disks = |config: &crate::config::RunConfig| {
            config.disk.iter().map(|disk| (disk.path.display().to_string(), disk.read_only)).collect::<Vec<_>>()
        };
        let at = |path: &str, read_only| (path.to_owned(), read_only);
        let (_, boot) = of("disk = 'd'\nseed = 's'").expect("a boot");
        assert_eq!((boot.kernel_from.as_deref(), boot.entry.as_deref()), (Some(Path::new("a,b.img")), Some("1>0")));
        assert_eq!(disks(&boot), [at("a,b.img", true), at("d", false)]);
        assert_eq!(boot.seed.as_deref(), Some(Path::new("s")));
        let (_, own) = of("disk = ['d', { path = 'a,b.img' }]").expect("a boot");
        assert_eq!(disks(&own), [at("d", false), at("a,b.img", false)], "the suite says that it is written");
        let (stdout, command) = of("run = 'x'\nroot = 'image'").expect("a command");
        assert_eq!(disks(&command), [at("a,b.img", true)]);
        assert_eq!((stdout, command.root), (StdoutOf::Command, RootChoice::Image("a,b.img".into())));
        let kernel = "[[kernel]]\nname = 'a'\npath = 'k'\n";
        for (key, words) in
            [("entry = '0'", "--entry is for a kernel from a disk image"), ("root = 'image'", "k is none")]
        {
            let error = cases_of(&format!("{kernel}[[test]]\nname = 't'\nrun = 'x'\n{key}")).expect_err("no image");
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    /// `hwvmm test tests/boots/*.toml`, as the help has it.
    #[test]
    fn this_repositorys_suites_can_be_run_together() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boots");
        let paths = std::fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("a file").path());
        let suites = paths.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
        let suites: Vec<SuiteFile> = suites.map(|path| SuiteFile::read(&path).expect("a suite")).collect();
        assert!(suites.len() >= 3);
        assert!(expand(&suites, |_| false).expect("names of their own").len() > 30);
    }

    #[test]
    fn two_tests_of_one_name_are_named_with_their_files() {
        let suite = |path: &str| {
            SuiteFile::parse(Path::new(path), "[[kernel]]\nname = 'k'\npath = 'k'\n[[test]]\nname = 't'")
                .expect("a suite")
        };
        let error = expand(&[suite("a.toml"), suite("b/c.toml")], |_| false).expect_err("twice").to_string();
        assert!(error.contains("name 't': one in a.toml, one in b/c.toml; give one of them another name"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("[[test]]\nname = 't'".to_owned(), "there is no [[kernel]]"),
            (format!("{KERNELS}[[test]]\nname = 't'\nkernel = 'c'"), "no kernel 'c'; the kernels are: a, b"),
            (format!("{KERNELS}[[test]]\nname = 't'\ncpus = 'many'"), "in `cpus`"),
            (format!("{KERNELS}[[test]]\nname = 't'\ncpus = [1]"), "in `cpus`"),
            (format!("{KERNELS}[[test]]\nname = 't'\ntimeout = 'x'"), "in `timeout`"),
            (format!("{KERNELS}[[test]]\nname = 't'\nslack = 'x'"), "in `slack`"),
            (format!("{KERNELS}[[test]]\nname = 't'\nboot = 'foo'"), "in `boot`"),
            (format!("{KERNELS}[[test]]\nname = 't'\nexpect = '('"), "in `expect`"),
            (format!("{KERNELS}[[test]]\nname = 't'\n[[test]]\nname = 't'"), "two tests have the name 't[a]'"),
            (format!("{KERNELS}[[test]]\nname = 't'\n[test.matrix]\ncpus = [1, 1]"), "two tests have the name"),
        ] {
            let error = cases_of(&text).expect_err("refused").to_string();
            assert!(error.contains(words) && !error.contains("\\n"), "{error}");
        }
    }

    #[test]
    fn ten_thousand_tests_are_allowed_and_no_more() {
        let many = |count: usize| {
            let tests: String = (0..count).map(|n| format!("[[test]]\nname = 't{n}'\n")).collect();
            format!("[[kernel]]\nname = 'a'\npath = 'k'\n{tests}")
        };
        assert_eq!(names(&many(MAX_TESTS)).len(), MAX_TESTS);
        assert!(matches!(cases_of(&many(MAX_TESTS + 1)), Err(ExpandError::TooMany)));
        let values = (1..=100).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        let product = format!(
            "[[kernel]]\nname = 'a'\npath = 'k'\n[[test]]\nname = 't'\n[test.matrix]\ncpus = [{values}]\n\
                               memory = [{values}]\nappend = ['{}']",
            values.replace(',', "','")
        );
        assert!(matches!(cases_of(&product), Err(ExpandError::TooMany)), "100 × 100 × 100, not made first");
    }
}
