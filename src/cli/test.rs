//! The subcommand `hwvmm test`: runs suites of boot tests.

use super::output::{fail, print_all, print_stderr, say, try_print_text};
use super::progress::{CLEAR, Progress, columns};
use crate::exit::Signal;
use crate::exit::end::status;
use crate::machine::is_disk_image;
use crate::probe::Host;
use crate::supervise::with_default_action;
use crate::testing::{
    Annotations, Baseline, Case, Colour, DEFAULT_FILE, Done, FailFast, FolderError, Header, Interrupted, Jobs, Plan,
    RanOn, ResultFolder, SAMPLE, Selection, Shard, SuiteFile, TemplateRun, TestResult, Totals, UpdateBaseline, Verdict,
    annotation, baseline_path, bazel_status_file, expand, html, junit, ktap, ktap_lines, line, merge, step_summary,
    summary, template_line,
};
use hwvmm_devices::path_text::PathText as _;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    what: Option<What>,

    /// Suites, or files of vmtest [default: hwvmm-test.toml]
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Run only tests with this in their name (can be given again: any of them)
    #[arg(short, long, value_name = "TEXT")]
    filter: Vec<String>,

    /// Run only tests whose name matches
    #[arg(long, value_name = "REGEX")]
    regex: Option<String>,

    /// Tests that run at once at most [default: as many as have their vCPUs on a processor of their own]. A guest is not
    /// started where its memory would not fit into that of the host
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,

    /// Start no more tests after one that is not good
    #[arg(long)]
    fail_fast: bool,

    /// Print the names of the tests, and run none
    #[arg(
        short,
        long,
        conflicts_with_all = ["init", "jobs", "fail_fast", "baseline", "update_baseline", "output", "format"]
    )]
    list: bool,

    /// Write a commented sample to FILE [default: hwvmm-test.toml], and run none
    #[arg(
        long,
        conflicts_with_all = [
            "filter", "regex", "jobs", "fail_fast", "shard", "baseline", "update_baseline", "output", "format"
        ]
    )]
    init: bool,

    /// Run one of TOTAL parts of the tests, from 1 [default: as Bazel, GitLab, Buildkite, Slurm or Kubernetes say, else all]
    #[arg(long, value_name = "INDEX/TOTAL", value_parser = Shard::parse)]
    shard: Option<Shard>,

    /// Hold each test to the exits that it has in this file, in place of those that the suite names
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,

    /// Write the exits of the tests that pass to their baselines, and compare none
    #[arg(long)]
    update_baseline: bool,

    /// Folder for the results, which must not exist or be empty [default: a new one in hwvmm-results]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,

    /// What is printed on stdout
    #[arg(long, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
    format: Format,
}

/// What is printed on stdout. All of it is in the folder of the results, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A line a test.
    Text,
    /// KTAP, version 1.
    Ktap,
    /// A JSON object a line.
    Json,
}

#[derive(clap::Subcommand)]
enum What {
    /// Make one report of the results of many shards
    #[command(after_help = MERGE_STATUS)]
    Merge {
        /// Folders that `hwvmm test --output` made
        #[arg(required = true, value_name = "DIR")]
        folders: Vec<PathBuf>,

        /// Folder for the results, which must not exist or be empty [default: a new one in hwvmm-results]
        #[arg(short, long, value_name = "DIR")]
        output: Option<PathBuf>,

        /// What is printed on stdout: as text only the results that are not good
        #[arg(long, value_enum, default_value_t = Format::Text, value_name = "FORMAT")]
        format: Format,
    },
}

const MERGE_STATUS: &str = "\
Exit status:
  0    all tests are good: pass, skip or flaky
  1    a test is not
  2    wrong option, or none of the folders has results
  42   hwvmm or the host failed, and no test is bad; or a shard or results are missing";

/// The command line or a file that it names is wrong.
struct Usage(Box<dyn Error>);

impl<E: Into<Box<dyn Error>>> From<E> for Usage {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    let prepared = match &args.what {
        Some(What::Merge { folders, output, format }) => return merged(folders, output.as_deref(), *format),
        None if args.init => return init(args),
        None => prepare(args),
    };
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(Usage(error)) => {
            fail(error.as_ref());
            return ExitCode::from(status::USAGE);
        }
    };
    if args.list {
        return print(&prepared.cases.iter().map(|case| format!("{}\n", case.name)).collect::<String>());
    }
    match run_suite(args, &prepared) {
        Ok(status) => ExitCode::from(status),
        Err(error) => failed(error.as_ref()),
    }
}

/// Prints why the suite has no result, and returns the exit status for it: hwvmm or the host failed, or the folder that was named
/// cannot be used.
fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    fail(error);
    let is_usage = error.downcast_ref::<FolderError>().is_some_and(FolderError::is_usage);
    ExitCode::from(if is_usage { status::USAGE } else { status::ERROR })
}

/// Prints text. That it cannot be printed is not that a test is bad.
fn print(text: &str) -> ExitCode {
    match try_print_text(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

/// What is known before the first test runs.
struct Prepared {
    cases: Vec<Case>,
    shard: Shard,
    baselines: BTreeMap<PathBuf, Baseline>,
}

fn prepare(args: &Args) -> Result<Prepared, Usage> {
    let default = [PathBuf::from(DEFAULT_FILE)];
    let files = if args.files.is_empty() { &default[..] } else { &args.files };
    let suites = files.iter().map(|path| SuiteFile::read(path)).collect::<Result<Vec<_>, _>>()?;
    suites.iter().flat_map(|suite| &suite.notes).for_each(|note| say(note));
    let shard = args.shard.map_or_else(Shard::of_environment, Ok)?;
    let selection = Selection::new(args.filter.clone(), args.regex.as_deref(), shard)?;
    let cases = selection.take(expand(&suites, is_disk_image)?)?;
    let paths = cases.iter().filter_map(|case| baseline_path(args.baseline.as_deref(), case));
    let mut baselines = BTreeMap::new();
    for path in paths {
        if !baselines.contains_key(&path) && !args.list {
            // One that is made now need not exist.
            let is_new = args.update_baseline && !path.exists();
            let baseline = if is_new { Baseline::default() } else { Baseline::read(&path)? };
            baselines.insert(path, baseline);
        }
    }
    if args.update_baseline && baselines.is_empty() && !cases.is_empty() {
        return Err("--update-baseline needs --baseline FILE, or a suite with `baseline`".into());
    }
    Ok(Prepared { cases, shard, baselines })
}

fn init(args: &Args) -> ExitCode {
    let path = match &args.files[..] {
        [] => PathBuf::from(DEFAULT_FILE),
        [path] => path.clone(),
        [..] => {
            say("--init writes one file: name one FILE");
            return ExitCode::from(status::USAGE);
        }
    };
    // What is there stays.
    let file = File::options().write(true).create_new(true).mode(0o644).open(&path);
    match file.and_then(|mut file| file.write_all(SAMPLE.as_bytes())) {
        Ok(()) => print(&format!("{} is a sample: change it, and run `hwvmm test`\n", path.shown())),
        Err(error) => {
            say(&format!("cannot write {}: {error}: name another FILE", path.shown()));
            ExitCode::from(status::USAGE)
        }
    }
}

/// Sets `interrupted` on SIGINT, SIGTERM, SIGHUP and SIGQUIT, where they are not ignored as nohup(1) has it.
fn catch_signals(interrupted: &Interrupted) -> io::Result<()> {
    for signal in with_default_action([Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]) {
        signal_hook::flag::register(signal.number().into(), Arc::clone(&interrupted.0))?;
    }
    // A handler that does nothing: a write beyond RLIMIT_FSIZE fails with EFBIG.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default())?;
    Ok(())
}

fn run_suite(args: &Args, prepared: &Prepared) -> Result<u8, Box<dyn Error>> {
    if let Some(path) = bazel_status_file() {
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|error| format!("cannot write {}: {error}", path.shown()))?;
    }
    let folder = ResultFolder::create(args.output.as_deref())?;
    let interrupted = Interrupted::default();
    catch_signals(&interrupted).map_err(|error| format!("cannot catch signals: {error}"))?;
    let ran_on = RanOn::new(&Host::at(Path::new("/")));
    let header = Header::new(prepared.shard, prepared.cases.len(), vec![ran_on.clone()]);
    let lines = ResultLines::new(&folder, &header)?;
    let printer = Printer::new(args.format, prepared.cases.len());
    printer.begin(&header);
    let plan = Plan {
        cases: &prepared.cases,
        folder: &folder,
        jobs: args.jobs.map_or(Jobs::Processors, |jobs| Jobs::AtMost(jobs.into())),
        fail_fast: if args.fail_fast { FailFast::Yes } else { FailFast::No },
        baselines: &prepared.baselines,
        ran_on: &ran_on,
        baseline: args.baseline.as_deref(),
        update: if args.update_baseline { UpdateBaseline::Yes } else { UpdateBaseline::No },
        interrupted: &interrupted,
        started: &|name| printer.started(name),
        each: &|result| {
            lines.add(result);
            printer.result(result);
        },
    };
    let done = crate::testing::run(&plan);
    let totals = Totals::new(&done.results, done.not_run);
    printer.templates(&done.templates);
    // One that cannot be written is no reason to lose the others, or the summary.
    let written = [
        lines.finish(),
        if args.update_baseline { update_baselines(prepared, &done, &ran_on) } else { Ok(()) },
        write_reports(&folder, &done.results, &totals, &header.ran_on),
    ];
    printer.end(&totals, folder.path(), &header.ran_on);
    written.into_iter().collect::<Result<(), _>>()?;
    if interrupted.0.load(Ordering::Relaxed) {
        return Ok(status::QUIT);
    }
    Ok(totals.status())
}

fn update_baselines(prepared: &Prepared, done: &Done, ran_on: &RanOn) -> Result<(), Box<dyn Error>> {
    for (path, tests) in &done.counts {
        let mut baseline = prepared.baselines.get(path).cloned().unwrap_or_default();
        for (name, counts) in tests {
            baseline.set(name, counts.clone());
        }
        baseline.made_on(ran_on.clone());
        baseline.write(path)?;
    }
    Ok(())
}

/// The file `results.jsonl`, which has each result once it is known: where this process is killed, they are not lost.
struct ResultLines {
    file: Mutex<(File, io::Result<()>)>,
}

impl ResultLines {
    fn new(folder: &ResultFolder, header: &Header) -> Result<Self, Box<dyn Error>> {
        let path = folder.write("results.jsonl", &header.json()?)?;
        let file = File::options().append(true).open(&path)?;
        Ok(Self { file: Mutex::new((file, Ok(()))) })
    }

    fn add(&self, result: &TestResult) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, written) = &mut *file;
        if written.is_ok() {
            *written = result.json().map_err(io::Error::from).and_then(|line| file.write_all(line.as_bytes()));
        }
    }

    /// The first error there was.
    fn finish(self) -> Result<(), Box<dyn Error>> {
        let (_, written) = self.file.into_inner().unwrap_or_else(PoisonError::into_inner);
        written.map_err(|error| format!("cannot write results.jsonl: {error}").into())
    }
}

/// Writes the reports to `folder`, and to GitHub's summary of the step.
fn write_reports(
    folder: &ResultFolder,
    results: &[TestResult],
    totals: &Totals,
    ran_on: &[RanOn],
) -> Result<(), Box<dyn Error>> {
    folder.write("junit.xml", &junit(results)?)?;
    folder.write("results.ktap", &ktap(results))?;
    folder.write("index.html", &html(results, totals, folder.path(), ran_on))?;
    if Annotations::of_environment() == Annotations::Yes
        && let Some(path) = std::env::var_os("GITHUB_STEP_SUMMARY").filter(|path| !path.is_empty())
    {
        let path = Path::new(&path);
        let file = File::options().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(step_summary(results, totals).as_bytes()))
            .map_err(|error| format!("cannot write {}: {error}", path.shown()))?;
    }
    Ok(())
}

/// Prints results as they come.
struct Printer {
    format: Format,
    tests: usize,
    colour: Colour,
    annotations: Annotations,
    printed: AtomicUsize,
    annotated: AtomicUsize,
    /// What a terminal shows below the results. One result is printed at a time.
    progress: Mutex<Option<Progress>>,
}

impl Printer {
    fn new(format: Format, tests: usize) -> Self {
        let on_terminal = format == Format::Text && io::stdout().is_terminal();
        Self {
            format,
            tests,
            colour: if io::stdout().is_terminal() { Colour::Yes } else { Colour::No },
            annotations: Annotations::of_environment(),
            printed: AtomicUsize::new(0),
            annotated: AtomicUsize::new(0),
            progress: Mutex::new(on_terminal.then(|| Progress::new(tests))),
        }
    }

    fn begin(&self, header: &Header) {
        match self.format {
            Format::Text => {}
            Format::Ktap => self.print(format!("KTAP version 1\n1..{}\n", self.tests)),
            Format::Json => self.print(header.json().unwrap_or_default()),
        }
    }

    /// What stdout does not take is in the folder of the results.
    fn print(&self, text: String) {
        let _ = print_all(self.annotations.disarm(text).as_bytes());
    }

    fn started(&self, name: &str) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(progress) = &mut *progress {
            progress.start(name);
            show(progress);
        }
    }

    fn result(&self, result: &TestResult) {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.is_some() {
            let _ = print_all(CLEAR.as_bytes());
        }
        let number = self.printed.fetch_add(1, Ordering::Relaxed) + 1;
        match self.format {
            Format::Text => self.print(line(result, self.colour)),
            Format::Ktap => self.print(ktap_lines(result, number)),
            Format::Json => self.print(result.json().unwrap_or_default()),
        }
        if self.annotations == Annotations::Yes && self.format == Format::Text {
            let text = annotation(result, self.annotated.load(Ordering::Relaxed) + 1);
            if !text.is_empty() {
                self.annotated.fetch_add(1, Ordering::Relaxed);
                let _ = print_all(text.as_bytes());
            }
        }
        if let Some(progress) = &mut *progress {
            progress.end(&result.name);
            show(progress);
        }
    }

    /// The boots that tests shared: their time and exits are in no test's.
    fn templates(&self, templates: &[TemplateRun]) {
        let text: String = templates.iter().map(template_line).collect();
        match self.format {
            Format::Text => {
                if self.progress.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                    let _ = print_all(CLEAR.as_bytes());
                }
                self.print(text);
            }
            Format::Ktap | Format::Json => print_stderr(&text),
        }
    }

    fn end(&self, totals: &Totals, folder: &Path, ran_on: &[RanOn]) {
        if self.progress.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            let _ = print_all(CLEAR.as_bytes());
        }
        let ran_on: String = ran_on.iter().map(|ran_on| format!("ran on: {ran_on}\n")).collect();
        let text = format!("{}{ran_on}results: {}\n", summary(totals, self.colour), folder.shown());
        match self.format {
            Format::Text => self.print(text),
            Format::Ktap | Format::Json => print_stderr(&text),
        }
    }
}

/// Shows how far the suite is, in place of what the line had.
fn show(progress: &Progress) {
    let _ = print_all(format!("{CLEAR}{}", progress.line(columns())).as_bytes());
}

fn merged(folders: &[PathBuf], output: Option<&Path>, format: Format) -> ExitCode {
    let merged = match merge(folders) {
        Ok(merged) => merged,
        Err(error) => {
            fail(&error);
            return ExitCode::from(status::USAGE);
        }
    };
    // Their shards are missing, or there is another folder of each.
    merged.broken.iter().take(20).for_each(|error| say(&format!("left out: {}", crate::error::chain(error))));
    let header = Header::new(Shard::ALL, merged.results.len(), merged.ran_on.clone());
    let printer = Printer::new(format, merged.results.len());
    printer.begin(&header);
    let is_shown =
        |result: &&TestResult| format != Format::Text || !matches!(result.verdict, Verdict::Pass | Verdict::Skip);
    merged.results.iter().filter(is_shown).for_each(|result| printer.result(result));
    if !merged.missing_shards.is_empty() {
        let missing: Vec<String> = merged.missing_shards.iter().take(20).map(ToString::to_string).collect();
        say(&format!("of {} shards there is no folder of: {}", merged.shards, missing.join(", ")));
    }
    // A shard that is missing has an unknown number of tests.
    let totals = Totals::new(&merged.results, merged.not_run.saturating_add(merged.missing_shards.len()));
    let write = || -> Result<(), Box<dyn Error>> {
        let folder = ResultFolder::create(output)?;
        let lines = ResultLines::new(&folder, &header)?;
        merged.results.iter().for_each(|result| lines.add(result));
        lines.finish()?;
        write_reports(&folder, &merged.results, &totals, &header.ran_on)?;
        printer.end(&totals, folder.path(), &header.ran_on);
        Ok(())
    };
    match write() {
        Ok(()) => ExitCode::from(totals.status()),
        Err(error) => failed(error.as_ref()),
    }
}
