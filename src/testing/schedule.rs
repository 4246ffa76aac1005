//! Runs the tests of a suite, as many at once as the host has room for.

use super::attempt::{AttemptError, Files, Launch, Profiled, attempt};
use super::baseline::{Baseline, Comparison, Counts, counts};
use super::case::Case;
use super::folder::ResultFolder;
use super::host;
use super::log::Findings;
use super::outcome::{Facts, Judgement, Stop, judge};
use super::record::{Attempt, RanOn, TemplateRun, TestResult};
use super::templates::{Made, Templates};
use super::verdict::{Meaning, Verdict};
use crate::config::MmuChoice;
use crate::error::chain;
use crate::escape::escape;
use crate::memory::available_bytes;
use crate::probe::{self, Mmu};
use crate::profile::Profile;
use hwvmm_devices::path_text::PathText as _;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Tests that run at once at most.
const MAX_JOBS: usize = 1024;
/// Bytes of a path in a report.
const PATH_BYTES: usize = 4096;

/// How many tests run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jobs {
    /// As many as have their vCPUs on a processor of their own.
    Processors,
    /// At most so many.
    AtMost(usize),
}

/// Whether tests are started after one has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailFast {
    /// After a failure no test is started.
    Yes,
    /// All tests are started.
    No,
}

/// The user's wish to end the suite. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Interrupted(pub Arc<AtomicBool>);

/// What is to be run, and how.
pub struct Plan<'a> {
    /// The tests to run; the results have the same order.
    pub cases: &'a [Case],
    /// Where they leave what they leave.
    pub folder: &'a ResultFolder,
    /// How many tests run at once.
    pub jobs: Jobs,
    /// Whether to go on after a failure.
    pub fail_fast: FailFast,
    /// The baselines, by the path that [`Plan::baseline_of`] is.
    pub baselines: &'a BTreeMap<PathBuf, Baseline>,
    /// What the tests run on.
    pub ran_on: &'a RanOn,
    /// The baseline of all tests, in place of their own.
    pub baseline: Option<&'a Path>,
    /// Whether baselines are made from these runs: then nothing is compared.
    pub update: UpdateBaseline,
    /// Set when the user ends the suite.
    pub interrupted: &'a Interrupted,
    /// Called with the name of each test as it is started.
    pub started: &'a (dyn Fn(&str) + Sync),
    /// Called with each result as it comes.
    pub each: &'a (dyn Fn(&TestResult) + Sync),
}

/// Whether a run of a suite is compared with its baselines, or makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateBaseline {
    /// The baselines are made from the run.
    Yes,
    /// The run is compared with the baselines.
    No,
}

/// What a suite came to.
#[derive(Debug, Default)]
pub struct Done {
    /// The results, in the order of the tests.
    pub results: Vec<TestResult>,
    /// Tests that were not run, as the suite was ended before.
    pub not_run: usize,
    /// The counts of tests that passed, by the path of their baseline and by name, for --update-baseline.
    pub counts: BTreeMap<PathBuf, BTreeMap<String, Counts>>,
    /// The boots that tests shared, in the order in which they were begun.
    pub templates: Vec<TemplateRun>,
}

impl Plan<'_> {
    /// The path of the baseline of a test.
    #[must_use]
    pub fn baseline_of(&self, case: &Case) -> Option<PathBuf> {
        baseline_path(self.baseline, case)
    }
}

/// The path of the baseline of a test: `given` for all, or its own, which is relative to the folder of its suite.
#[must_use]
pub fn baseline_path(given: Option<&Path>, case: &Case) -> Option<PathBuf> {
    given.map(Path::to_owned).or_else(|| case.settings.baseline.as_ref().map(|path| case.folder.join(path)))
}

/// A test that has ended.
struct CaseResult {
    result: TestResult,
    counts: Option<Counts>,
}

#[derive(Default)]
struct State {
    /// Places of the tests that wait.
    waiting: VecDeque<usize>,
    running: usize,
    /// Of the host's memory, what running tests may take.
    memory_taken: u64,
    /// Of the host's processors or of -j.
    slots_taken: usize,
    /// No more tests are started.
    stopped: bool,
    finished: BTreeMap<usize, CaseResult>,
}

/// What the host has for tests.
struct Room {
    memory_bytes: u64,
    slots: usize,
    jobs: Jobs,
}

impl Room {
    fn new(jobs: Jobs) -> Self {
        let slots = match jobs {
            Jobs::Processors => host::processors(),
            Jobs::AtMost(jobs) => jobs,
        };
        let slots = slots.clamp(1, MAX_JOBS);
        Self { memory_bytes: available_bytes().unwrap_or(u64::MAX), slots, jobs }
    }

    fn slots_of(&self, case: &Case) -> usize {
        match self.jobs {
            Jobs::Processors => usize::try_from(case.needs.vcpus).unwrap_or(usize::MAX).clamp(1, self.slots),
            Jobs::AtMost(_) => 1,
        }
    }

    fn memory_of(case: &Case) -> u64 {
        case.needs.memory_bytes.saturating_add(host::OVERHEAD_BYTES)
    }

    fn has_room(&self, state: &State, case: &Case) -> bool {
        let slots = state.slots_taken.saturating_add(self.slots_of(case)) <= self.slots;
        slots && state.memory_taken.saturating_add(Self::memory_of(case)) <= self.memory_bytes
    }
}

/// What tests run on, and from.
struct Host {
    room: Room,
    mmu: Mmu,
    templates: Templates,
}

/// Runs the tests of `plan`.
#[must_use]
pub fn run(plan: &Plan<'_>) -> Done {
    let room = Room::new(plan.jobs);
    let state = Mutex::new(State { waiting: (0..plan.cases.len()).collect(), ..State::default() });
    let changed = Condvar::new();
    let host = Host { room, mmu: probe::Host::at(Path::new("/")).mmu(), templates: Templates::default() };
    let work = || {
        while let Some(place) = take(plan, &host.room, &state, &changed) {
            let Some(case) = plan.cases.get(place) else { continue };
            (plan.started)(&escape(&case.name, PATH_BYTES));
            let finished = run_case(plan, place, case, &host);
            let mut state = lock(&state);
            state.running -= 1;
            state.slots_taken -= host.room.slots_of(case);
            state.memory_taken -= Room::memory_of(case);
            if let Some(finished) = finished {
                (plan.each)(&finished.result);
                let bad = finished.result.verdict.meaning() != Meaning::Good;
                state.stopped |= bad && plan.fail_fast == FailFast::Yes;
                state.finished.insert(place, finished);
            }
            changed.notify_all();
        }
    };
    thread::scope(|scope| {
        for _ in 1..host.room.slots.min(plan.cases.len()) {
            // Where the host has no room for a thread, the others do its work.
            if let Err(error) = thread::Builder::new().spawn_scoped(scope, work) {
                log::debug!("a thread for tests cannot be started: {error}");
                break;
            }
        }
        work();
    });
    let finished = state.into_inner().unwrap_or_else(PoisonError::into_inner).finished;
    let templates = host.templates.finish();
    let mut done = Done { not_run: plan.cases.len() - finished.len(), templates, ..Done::default() };
    for (place, CaseResult { result, counts }) in finished {
        let path = plan.cases.get(place).and_then(|case| plan.baseline_of(case));
        if let Some((path, counts)) = path.zip(counts) {
            done.counts.entry(path).or_default().insert(result.name.clone(), counts);
        }
        done.results.push(result);
    }
    done
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the first test that there is room for, and waits until there is some. `None` where no test waits any more.
fn take(plan: &Plan<'_>, room: &Room, state: &Mutex<State>, changed: &Condvar) -> Option<usize> {
    let mut state = lock(state);
    loop {
        if state.waiting.is_empty() || state.stopped || plan.interrupted.0.load(Ordering::Relaxed) {
            return None;
        }
        let fits = |place: &usize| plan.cases.get(*place).is_some_and(|case| room.has_room(&state, case));
        let found = state.waiting.iter().position(fits);
        // Where nothing runs, no room will come: the test says so itself.
        let found = found.or((state.running == 0).then_some(0));
        if let Some(place) = found.and_then(|index| state.waiting.remove(index)) {
            if let Some(case) = plan.cases.get(place) {
                state.running += 1;
                state.slots_taken += room.slots_of(case);
                state.memory_taken += Room::memory_of(case);
            }
            return Some(place);
        }
        // The wish to end the suite is looked for again and again.
        let waited = changed.wait_timeout(state, Duration::from_millis(200));
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Why a test is not run here.
fn not_here(case: &Case, room: &Room, mmu: Mmu) -> Option<Judgement> {
    let wanted = match case.needs.mmu {
        MmuChoice::Auto => None,
        MmuChoice::Nested => Some(Mmu::Nested),
        MmuChoice::Shadow => Some(Mmu::Shadow),
    };
    if let Some(wanted) = wanted.filter(|wanted| *wanted != mmu) {
        let message = format!("it wants {}, and this host's KVM uses {}", wanted.name(), mmu.name());
        return Some(Judgement::new(Verdict::Skip, &message));
    }
    let needed = Room::memory_of(case);
    (needed > room.memory_bytes).then(|| {
        let message = format!(
            "it needs {} MiB of memory, and this host has {} MiB",
            needed.div_ceil(1 << 20),
            room.memory_bytes >> 20
        );
        Judgement::new(Verdict::Infrastructure, &message)
    })
}

/// Runs a test until it passes, or as often as it may be tried. `None` where the user has ended the suite meanwhile.
fn run_case(plan: &Plan<'_>, place: usize, case: &Case, host: &Host) -> Option<CaseResult> {
    let name = escape(&case.name, PATH_BYTES);
    let empty = || TestResult {
        name: name.clone(),
        verdict: Verdict::Pass,
        message: String::new(),
        duration_ms: 0,
        exits: None,
        attempts: Vec::new(),
        ktap: None,
        log_end: Vec::new(),
        again: String::new(),
    };
    if let Some(Judgement { verdict, message }) = not_here(case, &host.room, host.mmu) {
        return Some(CaseResult { result: TestResult { verdict, message, ..empty() }, counts: None });
    }
    let mut result = empty();
    let mut last_counts = None;
    for number in 1..=case.settings.retries.saturating_add(1) {
        let tried = match try_once(plan, place, case, number, &host.templates) {
            Ok(tried) => tried,
            Err(error) => Tried::failed(&chain(&error)),
        };
        let duration_ms = u64::try_from(tried.duration.as_millis()).unwrap_or(u64::MAX);
        if tried.interrupted {
            return None;
        }
        let Judgement { verdict, message } = tried.judgement;
        let good = verdict.meaning() == Meaning::Good;
        result.attempts.push(Attempt { verdict, message: message.clone(), duration_ms, artifacts: tried.artifacts });
        result.duration_ms = result.duration_ms.saturating_add(duration_ms);
        (result.verdict, result.message, result.exits, result.again) = (verdict, message, tried.exits, tried.again);
        result.ktap = tried.findings.ktap;
        if !good {
            result.log_end = tried.findings.tail;
        }
        last_counts = tried.counts;
        if good {
            break;
        }
    }
    if let Some((verdict, message)) = of_tries(&result.attempts) {
        (result.verdict, result.message) = (verdict, escape(&message, PATH_BYTES));
    }
    let passed = matches!(result.verdict, Verdict::Pass | Verdict::Flaky);
    Some(CaseResult { result, counts: last_counts.filter(|_| passed) })
}

/// What several tries come to, where that is not what the last one did. A try that says nothing of the guest, or was skipped, does not
/// make good that one before it has failed.
fn of_tries(tries: &[Attempt]) -> Option<(Verdict, String)> {
    let (last, before) = tries.split_last()?;
    let number = tries.len();
    match last.verdict {
        Verdict::Pass => {
            let Attempt { verdict, message, .. } = before.last()?;
            Some((Verdict::Flaky, format!("passed on try {number}; before: {verdict}: {message}")))
        }
        Verdict::Skip | Verdict::Infrastructure => {
            let bad = before.iter().rev().find(|attempt| attempt.verdict.meaning() == Meaning::Bad)?;
            Some((bad.verdict, format!("{}; try {number}: {}: {}", bad.message, last.verdict, last.message)))
        }
        _ => None,
    }
}

/// A try that has ended.
struct Tried {
    judgement: Judgement,
    /// Without the boot of a template.
    duration: Duration,
    interrupted: bool,
    findings: Findings,
    exits: Option<super::stats::ExitCounts>,
    counts: Option<Counts>,
    artifacts: String,
    again: String,
}

impl Tried {
    /// A test whose guest did not boot.
    fn without_template(judgement: Judgement, made: &Made, again: &str) -> Self {
        let facts = made.facts();
        Self {
            judgement,
            duration: Duration::ZERO,
            interrupted: facts.is_some_and(|facts| facts.stop == Some(Stop::Interrupted)),
            findings: facts.map(|facts| facts.findings.clone()).unwrap_or_default(),
            exits: None,
            counts: None,
            artifacts: made.artifacts().to_owned(),
            again: escape(again, PATH_BYTES),
        }
    }

    /// A try that could not be made.
    fn failed(why: &str) -> Self {
        Self {
            judgement: Judgement::new(Verdict::Infrastructure, why),
            duration: Duration::ZERO,
            interrupted: false,
            findings: Findings::default(),
            exits: None,
            counts: None,
            artifacts: String::new(),
            again: String::new(),
        }
    }
}

fn try_once(
    plan: &Plan<'_>,
    place: usize,
    case: &Case,
    number: u32,
    templates: &Templates,
) -> Result<Tried, AttemptError> {
    let path = plan.baseline_of(case);
    let profiled = if path.is_some() { Profiled::Yes } else { Profiled::No };
    let files = Files::new(plan.folder.of_try(place, &case.name, number)?, profiled);
    files.write_again(case)?;
    let interrupted = &plan.interrupted.0;
    let mut began = Instant::now();
    let facts = match &case.template {
        None => attempt(case, &files, Launch::Boot, interrupted)?,
        Some(template) => {
            let made = templates.of(case, template, plan.folder, number, interrupted);
            // The time of the boot is that of no test.
            began = Instant::now();
            // It is there: `of` waits for it.
            let Some(made) = made.get() else { return Ok(Tried::failed("its template was not made")) };
            match made.snapshot(&case.settings) {
                Ok(snapshot) => attempt(case, &files, Launch::From(template, snapshot), interrupted)?,
                Err(judgement) => return Ok(Tried::without_template(judgement, made, &files.again(case))),
            }
        }
    };
    let duration = began.elapsed();
    let mut judgement = judge(&facts, &case.settings);
    let mut counted = None;
    if let Some(path) = path.filter(|_| judgement.verdict == Verdict::Pass) {
        match Profile::read(&files.profile()) {
            Ok(profile) => {
                counted = Some(counts(&profile));
                judgement = compared(plan, &path, case, &profile);
            }
            Err(error) => judgement = Judgement::new(Verdict::Infrastructure, &chain(&error)),
        }
    }
    let Facts { stop, stats, findings, .. } = facts;
    Ok(Tried {
        judgement,
        duration,
        interrupted: stop == Some(Stop::Interrupted),
        findings,
        exits: stats.ok().map(|stats| stats.exits()),
        counts: counted,
        artifacts: escape(&files.folder().shown().to_string(), PATH_BYTES),
        again: escape(&files.again(case), PATH_BYTES),
    })
}

/// The verdict on a run that has passed, by its baseline.
fn compared(plan: &Plan<'_>, path: &Path, case: &Case, profile: &Profile) -> Judgement {
    if plan.update == UpdateBaseline::Yes {
        return Judgement::new(Verdict::Pass, "");
    }
    let comparison = plan
        .baselines
        .get(path)
        .map_or(Comparison::Unknown, |baseline| baseline.compare(&case.name, profile, case.needs.slack, plan.ran_on));
    match comparison {
        Comparison::Held => Judgement::new(Verdict::Pass, ""),
        Comparison::Unknown => Judgement::new(Verdict::Pass, "its baseline does not have it yet"),
        Comparison::Exceeded(lines) => Judgement::new(Verdict::OverBudget, &lines.join("; ")),
        Comparison::NotMeasured(why) => Judgement::new(Verdict::Infrastructure, &why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_made_good_by_a_pass_alone_and_that_is_said() {
        use Verdict::{Fail, Flaky, Hang, Infrastructure, Panic, Pass, Skip};
        let of = |verdicts: &[Verdict]| {
            let attempt = |verdict: &Verdict| Attempt {
                verdict: *verdict,
                message: format!("of {verdict}"),
                duration_ms: 1,
                artifacts: String::new(),
            };
            let tries: Vec<_> = verdicts.iter().map(attempt).collect();
            of_tries(&tries).map(|(verdict, _)| verdict)
        };
        assert_eq!(of(&[]), None);
        for alone in Verdict::ALL {
            assert_eq!(of(&[*alone]), None);
        }
        assert_eq!(of(&[Fail, Hang]), None);
        assert_eq!(of(&[Fail, Pass]), Some(Flaky));
        assert_eq!(of(&[Infrastructure, Pass]), Some(Flaky));
        assert_eq!(of(&[Panic, Skip]), Some(Panic));
        assert_eq!(of(&[Panic, Infrastructure, Infrastructure]), Some(Panic));
        assert_eq!(of(&[Infrastructure, Skip]), None);
    }
}
