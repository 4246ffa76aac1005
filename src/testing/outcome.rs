//! From what is known of a run to its verdict. The run's own end, from its statistics and its exit status, comes first; what the guest
//! has printed can make its test worse, and never better.

use super::file::Settings;
use super::ktap::KtapReport;
use super::log::Findings;
use super::stats::{Stats, StatsError};
use super::verdict::Verdict;
use crate::error::chain;
use crate::escape::escape;
use crate::exit::EndKind;
use crate::exit::end::status;
use std::time::Duration;

/// Bytes of a message.
const MESSAGE_BYTES: usize = 600;

/// The message of [`Stop::LogTooLong`].
const LOG_TOO_LONG: &str = "the kernel's log is too long to keep";
/// The exit status of a command that was not to be run here.
const SKIP: u8 = 4;

/// Why the run was ended from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The guest printed nothing for this long.
    Silence(Duration),
    /// The guest's kernel had panicked, and printed nothing more.
    Panic,
    /// The run did not end at its time-out.
    Late,
    /// Its output could not be kept.
    Output(String),
    /// The kernel's log has more bytes than are kept.
    LogTooLong,
    /// The user ended the suite.
    Interrupted,
}

/// How the process of a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcessEnd {
    /// With this exit status.
    Exited(u8),
    /// Killed by the signal with this number.
    Killed(i32),
}

/// What is known of a run.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) end: ProcessEnd,
    pub(super) stop: Option<Stop>,
    pub(super) stats: Result<Stats, StatsError>,
    pub(super) findings: Findings,
    /// The last message of hwvmm, for people.
    pub(super) said: String,
}

/// A verdict, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Judgement {
    pub(super) verdict: Verdict,
    pub(super) message: String,
}

impl Judgement {
    pub(super) fn new(verdict: Verdict, message: &str) -> Self {
        Self { verdict, message: escape(message, MESSAGE_BYTES) }
    }
}

/// The verdict on a run, apart from its baseline.
pub(super) fn judge(facts: &Facts, settings: &Settings) -> Judgement {
    if let Some(Stop::Output(why)) = &facts.stop {
        return Judgement::new(Verdict::Infrastructure, &format!("its output cannot be kept: {why}"));
    }
    let stats = match stats_of(facts) {
        Ok(stats) => stats,
        Err(judgement) => return judgement,
    };
    if matches!(stats.end_kind, EndKind::Failed | EndKind::Crashed) {
        return Judgement::new(Verdict::Infrastructure, &stats.end);
    }
    if stats.end_kind == EndKind::Unbootable {
        return Judgement::new(Verdict::Fail, &stats.end);
    }
    if let Some(panic) = &facts.findings.panic {
        return Judgement::new(Verdict::Panic, &panic_text(panic));
    }
    let complaints = complaints(&facts.findings, settings);
    if let Some(judgement) = of_end(facts, stats, complaints.as_deref()) {
        return judgement;
    }
    if let Some(complaints) = complaints {
        return Judgement::new(Verdict::Oops, &complaints);
    }
    if facts.stop == Some(Stop::LogTooLong) {
        // Also where the run ended by itself just then: the rest of the log was not searched.
        return Judgement::new(Verdict::Fail, LOG_TOO_LONG);
    }
    of_run(facts, stats, settings)
}

/// The statistics of a run; where they say nothing, the verdict.
fn stats_of(facts: &Facts) -> Result<&Stats, Judgement> {
    match (&facts.stats, facts.end) {
        (Ok(stats), ProcessEnd::Exited(_)) => Ok(stats),
        // It had ended just when it was asked to: it has written its statistics, and nothing handled the signal any more.
        (Ok(stats), ProcessEnd::Killed(_)) if facts.stop.is_some() => Ok(stats),
        (_, ProcessEnd::Killed(_)) if facts.stop == Some(Stop::Panic) => {
            let panic = facts.findings.panic.as_deref().unwrap_or_default();
            Err(Judgement::new(Verdict::Panic, &panic_text(panic)))
        }
        (_, ProcessEnd::Killed(signal)) => {
            Err(Judgement::new(Verdict::Infrastructure, &format!("hwvmm was killed by signal {signal}")))
        }
        (Err(why), ProcessEnd::Exited(status)) => {
            let said = if facts.said.is_empty() { chain(why) } else { facts.said.clone() };
            Err(Judgement::new(Verdict::Infrastructure, &format!("hwvmm failed with status {status}: {said}")))
        }
    }
}

/// The verdict on an end that has one of its own, whatever the test wants.
fn of_end(facts: &Facts, stats: &Stats, complaints: Option<&str>) -> Option<Judgement> {
    let of = |verdict, message: &str| Some(Judgement::new(verdict, message));
    let with_complaints = |verdict, message: &str| match complaints {
        Some(complaints) => of(verdict, &format!("{message}; {complaints}")),
        None => of(verdict, message),
    };
    match stats.end_kind {
        EndKind::Panicked => of(Verdict::Panic, &stats.end),
        EndKind::TripleFault => with_complaints(Verdict::TripleFault, &stats.end),
        EndKind::TimedOut | EndKind::NotBooted => with_complaints(Verdict::TimeOut, &stats.end),
        EndKind::Signal | EndKind::Quit | EndKind::Stopped => match &facts.stop {
            Some(Stop::Silence(time)) => {
                with_complaints(Verdict::Hang, &format!("no output for {} s", time.as_secs_f64()))
            }
            Some(Stop::Panic) => of(Verdict::Panic, "the guest panicked"),
            Some(Stop::LogTooLong) => of(Verdict::Fail, LOG_TOO_LONG),
            Some(Stop::Late) => of(Verdict::Infrastructure, "hwvmm did not end at the time-out"),
            Some(Stop::Interrupted) => of(Verdict::Infrastructure, "interrupted"),
            Some(Stop::Output(_)) | None => of(Verdict::Infrastructure, &stats.end),
        },
        EndKind::PowerOff
        | EndKind::SystemHalted
        | EndKind::Reset
        | EndKind::Halted
        | EndKind::DebugExit
        | EndKind::Saved
        | EndKind::NotSaved
        | EndKind::Command
        | EndKind::NoCommand
        | EndKind::NoCommandStatus
        | EndKind::Watchdog
        | EndKind::Kvm
        | EndKind::Seen
        | EndKind::NotSeen
        | EndKind::Unbootable
        | EndKind::Failed
        | EndKind::Crashed => None,
    }
}

/// The verdict on a run that ended by itself, and whose kernel complained of nothing, by its status and its sub-tests.
fn of_run(facts: &Facts, stats: &Stats, settings: &Settings) -> Judgement {
    let failed_subtests = facts.findings.ktap.as_ref().filter(|report| report.failed > 0).and_then(of_subtests);
    // As for kselftest (Linux, tools/testing/selftests/kselftest.h, KSFT_SKIP). Sub-tests that have failed are not made good by it.
    if stats.end_kind == EndKind::Command && stats.status == SKIP && settings.status != SKIP {
        return failed_subtests.unwrap_or_else(|| Judgement::new(Verdict::Skip, &stats.end));
    }
    if stats.status != settings.status {
        return Judgement::new(Verdict::Fail, &format!("status {}: {}", stats.status, stats.end));
    }
    match &facts.findings.ktap {
        Some(report) => of_subtests(report).unwrap_or_else(|| of_status(facts, stats)),
        None => of_status(facts, stats),
    }
}

fn panic_text(panic: &str) -> String {
    format!("the guest panicked: {panic}")
}

/// The verdict on a run that ended as it should, by the exit status of its process.
fn of_status(facts: &Facts, stats: &Stats) -> Judgement {
    match facts.end {
        ProcessEnd::Exited(exited) if exited == stats.status => Judgement::new(Verdict::Pass, ""),
        ProcessEnd::Exited(status::OVER_BUDGET) => {
            Judgement::new(Verdict::OverBudget, &format!("more exits than its budget allows: {}", facts.said))
        }
        ProcessEnd::Exited(status) => {
            Judgement::new(Verdict::Infrastructure, &format!("hwvmm failed with status {status}: {}", facts.said))
        }
        ProcessEnd::Killed(signal) => {
            Judgement::new(Verdict::Infrastructure, &format!("hwvmm was killed by signal {signal}"))
        }
    }
}

/// The complaints that fail the test, in one line.
fn complaints(findings: &Findings, settings: &Settings) -> Option<String> {
    let mut failing = findings.complaints.iter().filter(|complaint| settings.fail_on.contains(&complaint.kind));
    let first = failing.next()?;
    let more = failing.count();
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    Some(format!("{}: {}{more}", first.kind.name(), first.line))
}

/// The verdict of sub-tests; `None` where they have passed.
fn of_subtests(report: &KtapReport) -> Option<Judgement> {
    let KtapReport { passed, failed, skipped, problem, skip, .. } = report;
    if *failed > 0 {
        let first = report.subtests.iter().find(|subtest| subtest.result == super::SubtestResult::Fail);
        let name = first.map_or("", |subtest| &subtest.name);
        let all = passed.saturating_add(*failed).saturating_add(*skipped);
        return Some(Judgement::new(Verdict::Fail, &format!("{failed} of {all} sub-tests failed: {name}")));
    }
    if let Some(problem) = problem {
        return Some(Judgement::new(Verdict::Fail, problem));
    }
    if report.is_empty() {
        return Some(Judgement::new(Verdict::Fail, "its console has no KTAP"));
    }
    match (skip, passed) {
        (Some(why), 0) => Some(Judgement::new(Verdict::Skip, why)),
        (None, 0) => Some(Judgement::new(Verdict::Skip, &format!("all {skipped} sub-tests were skipped"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::{KtapUse, Start};
    use super::super::ktap::Ktap;
    use super::super::log::Complaint;
    use super::super::patterns::OopsKind;
    use super::*;
    use crate::exit::{CommandEnd, Crash, EndReason, Signal};

    fn settings() -> Settings {
        Settings {
            silence: None,
            retries: 0,
            baseline: None,
            status: 0,
            ktap: KtapUse::Required,
            fail_on: vec![OopsKind::Bug],
            start: Start::Boot,
        }
    }

    fn facts(end: &EndReason) -> Facts {
        Facts {
            end: ProcessEnd::Exited(end.status()),
            stop: None,
            stats: Ok(Stats::of_end(end)),
            findings: Findings::default(),
            said: "said".into(),
        }
    }

    fn no_stats() -> Result<Stats, StatsError> {
        Stats::read(std::path::Path::new("/nowhere/stats.json"))
    }

    fn verdict(facts: &Facts) -> Verdict {
        judge(facts, &settings()).verdict
    }

    #[test]
    fn ends_of_runs_have_their_verdicts() {
        for (end, expected) in [
            (EndReason::PowerOff, Verdict::Pass),
            (EndReason::SystemHalted, Verdict::Pass),
            (EndReason::Seen("x".into()), Verdict::Pass),
            (EndReason::NotSeen(Box::new(EndReason::PowerOff)), Verdict::Fail),
            (EndReason::Reset, Verdict::Fail),
            (EndReason::Halted, Verdict::Fail),
            (EndReason::Watchdog, Verdict::Fail),
            (EndReason::Kvm("x".into()), Verdict::Fail),
            (EndReason::Command(CommandEnd::Exited(0)), Verdict::Pass),
            (EndReason::Command(CommandEnd::Exited(1)), Verdict::Fail),
            (EndReason::Command(CommandEnd::Exited(4)), Verdict::Skip),
            (EndReason::Command(CommandEnd::Exited(39)), Verdict::Fail),
            (EndReason::Command(CommandEnd::Exited(42)), Verdict::Fail),
            (EndReason::Command(CommandEnd::Signaled(9)), Verdict::Fail),
            (EndReason::NoCommand(None), Verdict::Fail),
            (EndReason::NoCommandStatus(Box::new(EndReason::PowerOff)), Verdict::Fail),
            (EndReason::Panicked(None), Verdict::Panic),
            (EndReason::TripleFault, Verdict::TripleFault),
            (EndReason::TimedOut(Duration::from_secs(1)), Verdict::TimeOut),
            (EndReason::NotBooted(Duration::from_secs(1)), Verdict::TimeOut),
            (EndReason::Unbootable("x".into()), Verdict::Fail),
            (EndReason::Failed("x".into()), Verdict::Infrastructure),
            (EndReason::Crashed(Crash::Panicked), Verdict::Infrastructure),
            (EndReason::Signal(Signal::TERM), Verdict::Infrastructure),
            (EndReason::Stopped, Verdict::Infrastructure),
        ] {
            assert_eq!(verdict(&facts(&end)), expected, "{end}");
        }
        // The statuses of these are those of other ends.
        for status in [33, 35, 37, 39] {
            assert_eq!(verdict(&facts(&EndReason::DebugExit(status))), Verdict::Fail);
            let wanted = Settings { status, ..settings() };
            assert_eq!(judge(&facts(&EndReason::DebugExit(status)), &wanted).verdict, Verdict::Pass);
        }
    }

    #[test]
    fn stops_have_their_verdicts_where_the_run_had_not_ended() {
        let stopped = |stop: Stop, end: EndReason| verdict(&Facts { stop: Some(stop), ..facts(&end) });
        let quit = || EndReason::Signal(Signal::QUIT);
        let silence = || Stop::Silence(Duration::from_secs(1));
        assert_eq!(stopped(silence(), quit()), Verdict::Hang);
        assert_eq!(stopped(silence(), EndReason::PowerOff), Verdict::Pass, "it ended by itself just then");
        assert_eq!(stopped(Stop::Panic, quit()), Verdict::Panic);
        assert_eq!(stopped(Stop::LogTooLong, quit()), Verdict::Fail);
        assert_eq!(stopped(Stop::LogTooLong, EndReason::PowerOff), Verdict::Fail, "its rest was not searched");
        let killed = |stop, stats| {
            let end = ProcessEnd::Killed(15);
            verdict(&Facts { stop, end, stats, ..facts(&EndReason::PowerOff) })
        };
        let stats = |end| Ok(Stats::of_end(&end));
        assert_eq!(killed(Some(Stop::Panic), stats(EndReason::Panicked(None))), Verdict::Panic);
        assert_eq!(killed(Some(silence()), stats(EndReason::Reset)), Verdict::Fail);
        assert_eq!(killed(Some(silence()), no_stats()), Verdict::Infrastructure);
        assert_eq!(killed(None, stats(EndReason::Reset)), Verdict::Infrastructure);
        assert_eq!(stopped(Stop::Late, quit()), Verdict::Infrastructure);
        assert_eq!(stopped(Stop::Output("full".into()), EndReason::PowerOff), Verdict::Infrastructure);
    }

    #[test]
    fn what_hwvmm_cannot_do_is_infrastructure() {
        let no_stats = Facts { stats: no_stats(), end: ProcessEnd::Exited(42), ..facts(&EndReason::PowerOff) };
        assert_eq!(judge(&no_stats, &settings()).message, "hwvmm failed with status 42: said");
        let killed = Facts { end: ProcessEnd::Killed(9), ..facts(&EndReason::PowerOff) };
        assert_eq!(verdict(&killed), Verdict::Infrastructure);
        let results_lost = Facts { end: ProcessEnd::Exited(42), ..facts(&EndReason::PowerOff) };
        assert_eq!(verdict(&results_lost), Verdict::Infrastructure);
        let over = Facts { end: ProcessEnd::Exited(39), ..facts(&EndReason::PowerOff) };
        assert_eq!(verdict(&over), Verdict::OverBudget);
    }

    #[test]
    fn a_guests_words_make_its_test_worse_and_never_better() {
        let ktap = |text: &str| {
            let mut ktap = Ktap::default();
            text.lines().for_each(|line| ktap.line(line.as_bytes()));
            Some(ktap.finish())
        };
        let with = |end: &EndReason, text: &str| {
            let findings = Findings { ktap: ktap(text), ..Findings::default() };
            verdict(&Facts { findings, ..facts(end) })
        };
        let good = "1..1\nok 1 a";
        assert_eq!(with(&EndReason::PowerOff, good), Verdict::Pass);
        assert_eq!(with(&EndReason::Reset, good), Verdict::Fail);
        assert_eq!(with(&EndReason::Reset, "1..0 # SKIP"), Verdict::Fail, "the status counts first");
        assert_eq!(with(&EndReason::PowerOff, "1..0 # SKIP"), Verdict::Skip);
        assert_eq!(with(&EndReason::PowerOff, "1..1\nok 1 a # SKIP"), Verdict::Skip);
        assert_eq!(with(&EndReason::PowerOff, "1..2\nok 1 a\nnot ok 2 b"), Verdict::Fail);
        assert_eq!(with(&EndReason::PowerOff, "1..2\nok 1 a"), Verdict::Fail);
        assert_eq!(with(&EndReason::PowerOff, ""), Verdict::Fail);
        assert_eq!(with(&EndReason::PowerOff, "ok 1 a"), Verdict::Fail, "there is no plan");
        let skips = EndReason::Command(CommandEnd::Exited(4));
        assert_eq!(with(&skips, "1..2\nok 1 a # SKIP"), Verdict::Skip);
        assert_eq!(with(&skips, "1..2\nok 1 a\nnot ok 2 b"), Verdict::Fail, "a failure is not skipped");
        let complaint =
            |kind| Findings { complaints: vec![Complaint { kind, line: "BUG: x".into() }], ..Findings::default() };
        let complains = |kind, end: &EndReason| verdict(&Facts { findings: complaint(kind), ..facts(end) });
        assert_eq!(complains(OopsKind::Bug, &EndReason::PowerOff), Verdict::Oops);
        assert_eq!(complains(OopsKind::Bug, &EndReason::Reset), Verdict::Oops);
        assert_eq!(complains(OopsKind::Bug, &EndReason::TripleFault), Verdict::TripleFault);
        assert_eq!(complains(OopsKind::Warning, &EndReason::PowerOff), Verdict::Pass, "it is not to fail");
        let panicked = Findings { panic: Some("x".into()), ..Findings::default() };
        assert_eq!(verdict(&Facts { findings: panicked, ..facts(&EndReason::PowerOff) }), Verdict::Panic);
    }
}
