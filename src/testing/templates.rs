//! The templates of a suite's run: booted, saved, given to tests, removed.

use super::attempt::{AttemptError, Files, Launch, Profiled, attempt};
use super::case::{Case, Needs};
use super::file::{KtapUse, Settings, Start};
use super::folder::ResultFolder;
use super::options::StdoutOf;
use super::outcome::{Facts, Judgement, judge};
use super::record::TemplateRun;
use super::stats::Stats;
use super::template::Template;
use super::verdict::Verdict;
use crate::error::chain;
use crate::escape::escape;
use hwvmm_devices::path_text::PathText as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;
use toml::Table;

/// Bytes of a path in a report.
const PATH_BYTES: usize = 4096;

/// What became of a template.
pub(super) struct Made {
    /// What is known of its boot; or why it could not be tried.
    boot: Result<Facts, String>,
    /// Where it is saved, if the boot went well.
    snapshot: PathBuf,
    run: TemplateRun,
}

impl Made {
    /// Where a test with these settings goes on from, or the verdict on it if its guest did not boot.
    pub(super) fn snapshot(&self, settings: &Settings) -> Result<&Path, Judgement> {
        let facts = match &self.boot {
            Ok(facts) => facts,
            Err(why) => return Err(Judgement::new(Verdict::Infrastructure, &format!("its template: {why}"))),
        };
        let Judgement { verdict, message } = judge(facts, &of_boot(settings));
        if verdict == Verdict::Pass {
            Ok(&self.snapshot)
        } else {
            Err(Judgement::new(verdict, &format!("its template: {message}")))
        }
    }

    /// What is known of its boot.
    pub(super) fn facts(&self) -> Option<&Facts> {
        self.boot.as_ref().ok()
    }

    /// The folder with what the boot left.
    pub(super) fn artifacts(&self) -> &str {
        &self.run.artifacts
    }
}

/// How a boot is judged for a test with these settings.
fn of_boot(settings: &Settings) -> Settings {
    Settings {
        retries: 0,
        baseline: None,
        status: 0,
        ktap: KtapUse::Ignored,
        start: Start::Boot,
        // Tests may differ in it, and the boot has a time-out.
        silence: None,
        fail_on: settings.fail_on.clone(),
    }
}

/// A template, and what became of it once that is known.
struct Entry {
    /// The folder that paths in the options are relative to.
    folder: PathBuf,
    boot: Table,
    made: Arc<OnceLock<Made>>,
}

/// The templates of a suite's run. Each boots when the first test needs it; others that need it wait for it.
#[derive(Default)]
pub(super) struct Templates {
    entries: Mutex<Vec<Entry>>,
}

impl Templates {
    /// Returns the template of `case`, which is made where it is not yet, and anew where the boot was not good and this is another try.
    pub(super) fn of(
        &self,
        case: &Case,
        template: &Template,
        folder: &ResultFolder,
        number_of_try: u32,
        interrupted: &AtomicBool,
    ) -> Arc<OnceLock<Made>> {
        let (made, number) = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            let same = |entry: &Entry| entry.folder == case.folder && entry.boot == template.boot;
            let is_bad = |entry: &Entry| entry.made.get().is_some_and(|made| made.snapshot(&case.settings).is_err());
            // The last one: those before it were not good.
            let found = entries.iter().rposition(same);
            let found = found.filter(|index| number_of_try == 1 || !entries.get(*index).is_some_and(is_bad));
            let index = found.unwrap_or_else(|| {
                let (folder, boot) = (case.folder.clone(), template.boot.clone());
                entries.push(Entry { folder, boot, made: Arc::default() });
                entries.len() - 1
            });
            (entries.get(index).map(|entry| Arc::clone(&entry.made)).unwrap_or_default(), index + 1)
        };
        made.get_or_init(|| make(case, template, folder, number, interrupted));
        made
    }

    /// Removes the saved guests, which have as many bytes as the memory that they used. Returns the boots.
    pub(super) fn finish(self) -> Vec<TemplateRun> {
        let entries = self.entries.into_inner().unwrap_or_else(PoisonError::into_inner);
        let made = entries.iter().filter_map(|entry| entry.made.get());
        made.map(|made| {
            if let Err(error) = std::fs::remove_dir_all(&made.snapshot)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                log::warn!("cannot remove {}: {error}", made.snapshot.shown());
            }
            made.run.clone()
        })
        .collect()
    }
}

/// Boots the guest of `template`, and saves it.
fn make(case: &Case, template: &Template, folder: &ResultFolder, number: usize, interrupted: &AtomicBool) -> Made {
    let started = Instant::now();
    let (boot, path) = match try_to_make(case, template, folder, number, interrupted) {
        Ok((facts, path)) => (Ok(facts), path),
        Err(error) => (Err(chain(&error)), folder.path().to_owned()),
    };
    let exits = boot.as_ref().ok().and_then(|facts| facts.stats.as_ref().ok()).map(Stats::exits);
    let run = TemplateRun {
        artifacts: escape(&path.shown().to_string(), PATH_BYTES),
        duration_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        exits,
    };
    Made { boot, snapshot: snapshot_in(&path), run }
}

fn snapshot_in(folder: &Path) -> PathBuf {
    folder.join("snapshot")
}

fn try_to_make(
    case: &Case,
    template: &Template,
    folder: &ResultFolder,
    number: usize,
    interrupted: &AtomicBool,
) -> Result<(Facts, PathBuf), AttemptError> {
    let path = folder.of_template(number)?;
    let options = template.options_of_boot(&snapshot_in(&path));
    let needs = Needs { stdout: StdoutOf::Command, ..Needs::of(&options)? };
    let boot = Case {
        name: format!("template-{number}"),
        folder: case.folder.clone(),
        options,
        settings: of_boot(&case.settings),
        needs,
        template: None,
    };
    let files = Files::new(path.clone(), Profiled::No);
    files.write_again(&boot)?;
    let facts = attempt(&boot, &files, Launch::Boot, interrupted)?;
    Ok((facts, path))
}
