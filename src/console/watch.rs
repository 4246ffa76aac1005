//! Watches the lines of consoles for those that end a run or explain its end: the pattern of `--expect`, a kernel panic, a halt.
//!
//! A line is matched once, when it has ended, so that `^`, `$` and `\b` apply to whole lines. A line that does not go on is
//! matched as it is after [`QUIET`], and where the guest has ended in an orderly way: that is what a prompt is.

#[cfg(test)]
mod tests;

use super::lines::{Line, Lines, without_prefix};
use super::pattern::Pattern;
use crate::escape::{GUEST_BYTES, escape};
use crate::exit::EndReason;
use regex::bytes::Regex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long no console may have had output before a line without an end is matched.
pub const QUIET: Duration = Duration::from_millis(200);
/// How long to wait between two looks for output that is held back to be written.
const FLUSH_CHECK: Duration = Duration::from_millis(10);
/// A look that comes so much too late shows that the host had no time for hwvmm, and perhaps none for the guest. The wait then
/// starts again.
const MAX_LATENESS: Duration = Duration::from_millis(50);
/// How often the wait for one piece of a line starts again.
const MAX_AGAIN: u32 = 10;

const PANIC: &[u8] = b"Kernel panic - not syncing";
const PANIC_END: &[u8] = b"---[ end Kernel panic - not syncing";
const HALTED: &[u8] = b"reboot: System halted";

/// What the guest has announced, on all consoles of a machine. Clones share it.
#[derive(Clone, Default)]
pub struct Announcements(Arc<Shared>);

#[derive(Default)]
struct Shared {
    announced: Mutex<Announced>,
    /// Consoles that are writing output at the moment. There may be more output behind it.
    writing: AtomicUsize,
    /// When a console last had output.
    last_output: Mutex<Option<Instant>>,
    /// Output from before this time is written. `None` where none is held back.
    flushed: Mutex<Option<Instant>>,
    /// A console has had output.
    any_output: AtomicBool,
}

#[derive(Default)]
struct Announced {
    /// Text behind "Kernel panic - not syncing:", escaped.
    panic: Option<String>,
    /// The kernel has printed "reboot: System halted".
    halted: bool,
    /// The first line that ends the run.
    end: Option<EndReason>,
}

impl Announcements {
    /// The message of the kernel panic, if there was one.
    #[must_use]
    pub fn panic(&self) -> Option<String> {
        self.lock().panic.clone()
    }

    /// Returns true once a console has had output.
    #[must_use]
    pub fn has_output(&self) -> bool {
        self.0.any_output.load(Ordering::Relaxed)
    }

    /// A console has output.
    fn output(&self, now: Instant) {
        *self.0.last_output.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Returns when all consoles will have been quiet for [`QUIET`], if none has output until then.
    fn quiet_at(&self) -> Option<Instant> {
        self.0.last_output.lock().unwrap_or_else(PoisonError::into_inner).map(|last| last + QUIET)
    }

    fn flushed(&self) -> Option<Instant> {
        *self.0.flushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, Announced> {
        self.0.announced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the reason behind an end of the guest's: a reset (or a hang) after a panic is that panic, an announced halt is a
    /// shutdown. A line that `--expect` matches comes before the guest's end, whenever the line is read.
    #[must_use]
    pub fn explain(&self, end: EndReason) -> EndReason {
        let announced = self.lock();
        match (&announced.end, &announced.panic, end) {
            (
                Some(seen @ EndReason::Seen(_)),
                _,
                EndReason::PowerOff
                | EndReason::SystemHalted
                | EndReason::Reset
                | EndReason::TripleFault
                | EndReason::Panicked(_)
                | EndReason::Halted
                | EndReason::DebugExit(_)
                | EndReason::Command(_)
                | EndReason::NoCommand(_)
                | EndReason::NoCommandStatus(_)
                | EndReason::Watchdog
                | EndReason::Stopped
                | EndReason::TimedOut(_)
                | EndReason::NotBooted(_),
            ) => seen.clone(),
            (
                _,
                Some(panic),
                EndReason::Reset
                | EndReason::Halted
                | EndReason::TripleFault
                | EndReason::TimedOut(_)
                | EndReason::NotBooted(_)
                | EndReason::Panicked(None),
            ) => EndReason::Panicked(Some(panic.clone())),
            (_, None, EndReason::Halted) if announced.halted => EndReason::SystemHalted,
            (_, _, end) => end,
        }
    }
}

/// What output calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fed {
    /// Nothing has to be done.
    Nothing,
    /// A line has begun: [`Watch::look`] is to be called from now on.
    LineBegan,
    /// The end of the run.
    End(EndReason),
}

/// What a look at a console has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// No line waits. No further look is needed until there is one.
    NoLine,
    /// A line waits: when to look again.
    Again(Instant),
    /// As `Again`. Output that is held back is to be written until then, and [`Watch::note_flush`] to be called.
    Flush(Instant),
    /// The end of the run.
    End(EndReason),
}

/// Searches the output of one console, line by line. Clones are of the same console.
#[derive(Clone)]
pub struct Watch(Arc<Console>);

struct Console {
    pattern: Option<Pattern>,
    announcements: Announcements,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lines: Lines,
    /// `None` where no unfinished line is looked at.
    due: Option<Due>,
}

/// When an unfinished line is matched.
#[derive(Clone, Copy)]
struct Due {
    /// When no console will have had output for [`QUIET`].
    quiet: Instant,
    /// When the next look is to come.
    next: Instant,
    /// How often the wait has started again.
    again: u32,
}

impl Due {
    fn at(quiet: Instant, again: u32) -> Self {
        Self { quiet, next: quiet, again }
    }
}

/// A console is writing output, until this is dropped.
pub struct Writing<'a>(&'a AtomicUsize);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Watch {
    /// Searches for `pattern`, and records in `announcements` what the guest announces.
    #[must_use]
    pub fn new(pattern: Option<Regex>, announcements: Announcements) -> Self {
        Self(Arc::new(Console { pattern: pattern.map(Pattern::new), announcements, state: Mutex::default() }))
    }

    /// To be called before output is written, which may take any time: the console is not quiet meanwhile.
    #[must_use]
    pub fn writing(&self) -> Writing<'_> {
        let writing = &self.0.announcements.0.writing;
        writing.fetch_add(1, Ordering::AcqRel);
        Writing(writing)
    }

    /// To be called where output can be held back (in the kernel, or in a device): before the guest runs, and after each time that
    /// all of it was written. `began` is when that began.
    pub fn note_flush(&self, began: Instant) {
        *self.0.announcements.0.flushed.lock().unwrap_or_else(PoisonError::into_inner) = Some(began);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next bytes of output and searches every line that ends in them. Returns what the caller has to do.
    pub fn feed(&self, bytes: &[u8]) -> Fed {
        self.feed_at(bytes, Instant::now())
    }

    fn feed_at(&self, bytes: &[u8], now: Instant) -> Fed {
        self.0.announcements.0.any_output.store(true, Ordering::Relaxed);
        if self.0.pattern.is_some() {
            self.0.announcements.output(now);
        }
        let mut state = self.lock();
        let mut end = None;
        state.lines.feed(bytes, |line| {
            let of_line = self.0.matched(line).or_else(|| self.0.announced(line));
            end = end.take().or(of_line);
        });
        if let Some(end) = end {
            return Fed::End(end);
        }
        if self.0.pattern.is_none() || state.lines.unfinished().is_none() {
            return Fed::Nothing;
        }
        match state.due.replace(Due::at(now + QUIET, 0)) {
            None => Fed::LineBegan,
            Some(_) => Fed::Nothing,
        }
    }

    /// Looks for an unfinished line that does not go on, at the time `now`.
    #[must_use]
    pub fn look(&self, now: Instant) -> Look {
        let mut state = self.lock();
        let Some(due) = state.due else { return Look::NoLine };
        if state.lines.unfinished().is_none() {
            state.due = None;
            return Look::NoLine;
        }
        // Read before the time of the last output, which may be that of this flush.
        let flushed = self.0.announcements.flushed();
        // The guest may be at work on the output of another console before it goes on with this line.
        let quiet = self.0.announcements.quiet_at().map_or(due.quiet, |quiet| quiet.max(due.quiet));
        if now < quiet {
            state.due = Some(Due::at(quiet, due.again));
            return Look::Again(quiet);
        }
        let late = now.saturating_duration_since(due.next.max(quiet)) > MAX_LATENESS && due.again < MAX_AGAIN;
        if late || self.0.announcements.0.writing.load(Ordering::Acquire) > 0 {
            let next = now + QUIET;
            state.due = Some(Due::at(next, due.again + u32::from(late)));
            return Look::Again(next);
        }
        // The guest may have gone on with this line, and what it wrote is held back.
        if flushed.is_some_and(|flushed| flushed < quiet) {
            let next = now + FLUSH_CHECK;
            state.due = Some(Due { quiet, next, ..due });
            return Look::Flush(next);
        }
        state.due = None;
        let end = state.lines.unfinished().and_then(|line| self.0.matched(line));
        end.map_or(Look::NoLine, Look::End)
    }

    /// Takes an unfinished line as it is, after a guest that ended with `end` and whose final output has been fed.
    pub fn finish(&self, end: &EndReason) {
        let complete = match end {
            EndReason::PowerOff
            | EndReason::SystemHalted
            | EndReason::Reset
            | EndReason::Halted
            | EndReason::DebugExit(_)
            | EndReason::Command(_)
            | EndReason::NoCommand(_)
            | EndReason::NoCommandStatus(_) => true,
            // The guest was stopped, or stopped being a guest: the line may have gone on.
            EndReason::TripleFault
            | EndReason::Panicked(_)
            | EndReason::Watchdog
            | EndReason::Kvm(_)
            | EndReason::Seen(_)
            | EndReason::NotSeen(_)
            | EndReason::TimedOut(_)
            | EndReason::NotBooted(_)
            | EndReason::Quit
            | EndReason::Stopped
            | EndReason::Saved
            | EndReason::NotSaved(_)
            | EndReason::Signal(_)
            | EndReason::Unbootable(_)
            | EndReason::Failed(_)
            | EndReason::Crashed(_) => false,
        };
        if complete && let Some(line) = self.lock().lines.unfinished() {
            let _ = self.0.matched(line).or_else(|| self.0.announced(line));
        }
    }
}

impl Console {
    fn matched(&self, line: Line<'_>) -> Option<EndReason> {
        let found = self.pattern.as_ref()?.find(line)?;
        let end = EndReason::Seen(escape(&String::from_utf8_lossy(&found), GUEST_BYTES));
        Some(self.announcements.lock().end.get_or_insert(end).clone())
    }

    fn announced(&self, line: Line<'_>) -> Option<EndReason> {
        let line = without_prefix(line.text);
        let mut announced = self.announcements.lock();
        if line.starts_with(PANIC_END) {
            let end = EndReason::Panicked(announced.panic.clone());
            return Some(announced.end.get_or_insert(end).clone());
        }
        if let Some(rest) = line.strip_prefix(PANIC) {
            let rest = String::from_utf8_lossy(rest);
            announced.panic.get_or_insert_with(|| escape(rest.trim_start_matches(':').trim(), GUEST_BYTES));
        } else if line.starts_with(HALTED) {
            announced.halted = true;
        }
        None
    }
}
