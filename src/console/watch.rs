//! Watches the lines of consoles for those that end a run or explain its end: the pattern of `--expect`, a kernel panic, a halt.
//!
//! A line is matched once, when it has ended, so that `^`, `$` and `\b` apply to whole lines. A line that does not go on is
//! matched as it is after [`QUIET`], and where the guest has ended in an orderly way: that is what a prompt is.

use super::lines::{Line, Lines, without_prefix};
use super::pattern::Pattern;
use crate::escape::{GUEST_BYTES, escape};
use crate::exit::EndReason;
use regex::bytes::Regex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long no console may have had output before a line without an end is matched. Longer than coalesced writes wait.
pub const QUIET: Duration = Duration::from_millis(200);
/// A look that comes so much too late shows that the host had no time for hwvmm, and perhaps none for the guest. The wait then
/// starts again.
const LATE: Duration = Duration::from_millis(50);
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

    /// A console has output.
    fn output(&self, now: Instant) {
        *self.0.last_output.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Returns when all consoles will have been quiet for [`QUIET`], if none has output until then.
    fn quiet_at(&self) -> Option<Instant> {
        self.0.last_output.lock().unwrap_or_else(PoisonError::into_inner).map(|last| last + QUIET)
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
                | EndReason::TimedOut(_),
            ) => seen.clone(),
            (
                _,
                Some(panic),
                EndReason::Reset
                | EndReason::Halted
                | EndReason::TripleFault
                | EndReason::TimedOut(_)
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
    /// When an unfinished line is matched, and how often that was put off; `None` where it is not looked at.
    due: Option<(Instant, u32)>,
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

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the next bytes of output and searches every line that ends in them. Returns what the caller has to do.
    pub fn feed(&self, bytes: &[u8]) -> Fed {
        let now = Instant::now();
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
        match state.due.replace((now + QUIET, 0)) {
            None => Fed::LineBegan,
            Some(_) => Fed::Nothing,
        }
    }

    /// Looks for an unfinished line that does not go on, at the time `now`.
    #[must_use]
    pub fn look(&self, now: Instant) -> Look {
        let mut state = self.lock();
        let Some((due, again)) = state.due else { return Look::NoLine };
        if state.lines.unfinished().is_none() {
            state.due = None;
            return Look::NoLine;
        }
        // The guest may be at work on the output of another console before it goes on with this line.
        let due = self.0.announcements.quiet_at().map_or(due, |quiet| quiet.max(due));
        if now < due {
            state.due = Some((due, again));
            return Look::Again(due);
        }
        let late = now.saturating_duration_since(due) > LATE && again < MAX_AGAIN;
        if late || self.0.announcements.0.writing.load(Ordering::Acquire) > 0 {
            let next = now + QUIET;
            state.due = Some((next, again + u32::from(late)));
            return Look::Again(next);
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
            | EndReason::Quit
            | EndReason::Stopped
            | EndReason::Signal(_)
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn watch(pattern: Option<&str>) -> (Watch, Announcements) {
        let announcements = Announcements::default();
        let pattern = pattern.map(|p| Regex::new(p).expect("valid"));
        (Watch::new(pattern, announcements.clone()), announcements)
    }

    fn seen(text: &str) -> EndReason {
        EndReason::Seen(text.into())
    }

    /// The verdict on a whole output, fed in these pieces, for a guest that ends with `end`.
    fn verdict<'a>(pattern: &str, pieces: impl IntoIterator<Item = &'a [u8]>, end: EndReason) -> EndReason {
        let (watch, announcements) = watch(Some(pattern));
        for piece in pieces {
            if let Fed::End(end) = watch.feed(piece) {
                return end;
            }
        }
        watch.finish(&end);
        announcements.explain(end)
    }

    #[test]
    fn a_line_that_goes_on_does_not_end() {
        for pattern in ["fail=1$", r"fail=1\b", "^23", "^1", r"\b23"] {
            let (watch, _) = watch(Some(pattern));
            assert_eq!(watch.feed(b"tests: fail=1"), Fed::LineBegan);
            assert_eq!(watch.feed(b"23"), Fed::Nothing);
            assert_eq!(watch.feed(b"\r\n"), Fed::Nothing, "{pattern}");
        }
    }

    #[test]
    fn a_line_has_an_end_with_and_without_a_carriage_return() {
        for line in ["all done\n", "all done\r\n", "all done\r", "\x1b[32mall done\x1b[0m\r\n", "\0all done\0\n"] {
            let (watch, _) = watch(Some("^all done$"));
            assert_eq!(watch.feed(line.as_bytes()), Fed::End(seen("all done")), "{line:?}");
        }
    }

    #[test]
    fn a_prompt_is_seen_when_nothing_follows_for_a_while() {
        let (watch, _) = watch(Some("log[i]n: $"));
        // Times from before the output: how long this thread waits for a processor does not count.
        let before = Instant::now();
        assert_eq!(watch.feed(b"Debian\r\nhost \x1b[1mlo"), Fed::LineBegan);
        assert_eq!(watch.feed(b"gin: \x1b[0m"), Fed::Nothing, "the line is looked at already");
        let Look::Again(due) = watch.look(before) else { panic!("it waits") };
        assert_eq!(watch.look(due), Look::End(seen("login: ")));
        let before = Instant::now();
        assert_eq!(watch.feed(b"root"), Fed::LineBegan, "the line is not looked at any more");
        let Look::Again(due) = watch.look(before) else { panic!("it waits") };
        assert_eq!(watch.look(due), Look::NoLine);
    }

    #[test]
    fn a_line_that_ends_is_not_looked_at_again() {
        let (watch, _) = watch(Some("x$"));
        assert_eq!(watch.look(Instant::now()), Look::NoLine);
        assert_eq!(watch.feed(b"fail=1"), Fed::LineBegan);
        assert_eq!(watch.feed(b"23\n"), Fed::Nothing);
        assert_eq!(watch.look(Instant::now() + 2 * QUIET), Look::NoLine);
        assert_eq!(watch.feed(b"next"), Fed::LineBegan);
    }

    #[test]
    fn a_slow_host_is_no_quiet_guest() {
        let (watch, _) = watch(Some("fail=1$"));
        watch.feed(b"fail=1");
        let mut now = Instant::now() + 2 * QUIET;
        for _ in 0..MAX_AGAIN {
            let Look::Again(next) = watch.look(now) else { panic!("too late to be sure") };
            now = next + 2 * LATE;
        }
        assert_eq!(watch.look(now), Look::End(seen("fail=1")), "not put off for ever");
        // Output that is being written, here or on another console, may be followed by more.
        watch.feed(b"x\nfail=1");
        let writing = watch.writing();
        let Look::Again(next) = watch.look(Instant::now() + QUIET) else { panic!("it is written to") };
        drop(writing);
        assert_eq!(watch.look(next), Look::End(seen("fail=1")));
    }

    #[test]
    fn output_of_another_console_puts_a_look_off() {
        let (watch, announcements) = watch(Some("fail=1$"));
        let other = Watch::new(Some(Regex::new("fail=1$").expect("valid")), announcements);
        // A time from before the output: how long this thread waits for a processor does not count.
        let before = Instant::now();
        watch.feed(b"fail=1");
        let Look::Again(due) = watch.look(before) else { panic!("it waits") };
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(other.feed(b"log\n"), Fed::Nothing);
        let Look::Again(later) = watch.look(due) else { panic!("the other console was not quiet") };
        assert!(later >= due + Duration::from_millis(10), "200 ms from the output of the other");
        assert_eq!(other.look(later), Look::NoLine);
        assert_eq!(watch.look(later), Look::End(seen("fail=1")));
    }

    #[test]
    fn a_line_without_an_end_counts_where_the_guest_ended_in_an_orderly_way() {
        assert_eq!(verdict("done$", [&b"all done"[..]], EndReason::PowerOff), seen("done"));
        assert_eq!(verdict("done$", [&b"all done"[..]], EndReason::TripleFault), EndReason::TripleFault);
        let late = EndReason::TimedOut(Duration::from_secs(1));
        assert_eq!(verdict("done$", [&b"all done"[..]], late.clone()), late, "it may have gone on");
    }

    #[test]
    fn a_line_that_is_read_after_the_end_was_written_before_it() {
        let (watch, announcements) = watch(Some("^done$"));
        assert_eq!(announcements.explain(EndReason::PowerOff), EndReason::PowerOff);
        assert_eq!(watch.feed(b"done\n"), Fed::End(seen("done")));
        assert_eq!(announcements.explain(EndReason::PowerOff), seen("done"));
        assert_eq!(announcements.explain(EndReason::Quit), EndReason::Quit);
    }

    #[test]
    fn the_first_line_that_ends_the_run_counts() {
        let (watch, announcements) = watch(Some("^done$"));
        let panicked = EndReason::Panicked(None);
        assert_eq!(watch.feed(b"---[ end Kernel panic - not syncing\n"), Fed::End(panicked.clone()));
        watch.feed(b"done\n");
        assert_eq!(announcements.explain(panicked.clone()), panicked);
    }

    #[test]
    fn bytes_that_are_not_utf8_match_as_themselves_and_as_a_replacement() {
        for pattern in ["^a.*b$", r"a(?-u:\xff)b", "a\u{fffd}b"] {
            let end = verdict(pattern, [&b"a\xffb\n"[..]], EndReason::PowerOff);
            assert!(matches!(end, EndReason::Seen(_)), "{pattern}: {end:?}");
        }
    }

    #[test]
    fn a_match_in_a_long_line_does_not_depend_on_what_was_dropped() {
        use super::super::lines::LINE_BYTES;
        let long = |end: &str, more: &str| {
            let mut line = vec![b'.'; LINE_BYTES - end.len()];
            line.extend(end.bytes().chain(more.bytes()));
            line.push(b'\n');
            line
        };
        let of = |pattern: &str, line: Vec<u8>| verdict(pattern, [&line[..]], EndReason::Quit) != EndReason::Quit;
        for pattern in ["fail=1$", r"fail=1\b", r"fail=1\B"] {
            assert!(!of(pattern, long("fail=1", "23")), "{pattern}");
        }
        assert!(of("fail=1", long("fail=1", "23")) && of("=1.*", long("fail=1", "23")));
        assert!(of("fail=1$", long("fail=1", "")) && !of("fail=123", long("fail=1", "23")));
    }

    #[test]
    fn a_pattern_does_not_reach_over_lines() {
        assert_eq!(verdict("ab", [&b"a\nb\n"[..]], EndReason::Quit), EndReason::Quit);
        assert_eq!(verdict(r"(?s)a.*b", [&b"a\r\nb\n"[..]], EndReason::Quit), EndReason::Quit);
    }

    #[test]
    fn a_panic_explains_the_reset_that_follows() {
        let (watch, announcements) = watch(None);
        assert_eq!(watch.feed(b"[    1.234567][    T1] Kernel panic - not syncing: VFS: Unable\r\n"), Fed::Nothing);
        assert_eq!(announcements.explain(EndReason::Reset), EndReason::Panicked(Some("VFS: Unable".into())));
        assert_eq!(announcements.explain(EndReason::PowerOff), EndReason::PowerOff);
        let end = watch.feed(b"[    2.0] ---[ end Kernel panic - not syncing: VFS: Unable ]---\n");
        assert_eq!(end, Fed::End(EndReason::Panicked(Some("VFS: Unable".into()))));
    }

    #[test]
    fn what_is_kept_of_the_output_has_no_escape_sequences_and_is_short() {
        let (watch, announcements) = watch(Some("lo[^$]*gin"));
        let end = watch.feed(b"lo\x1b[2J\xc2\x9bgin\n");
        assert_eq!(end, Fed::End(seen("lo\\u{9b}gin")));
        watch.feed(b"Kernel panic - not syncing: \x1b]0;owned\x07 \x08\xe2\x80\xae");
        watch.feed(&[b'x'; 4000]);
        watch.feed(b"\n");
        let panic = announcements.panic().expect("a panic");
        assert!(panic.starts_with(r"\x08\u{202e}xxx"), "{panic}");
        assert!(panic.len() < GUEST_BYTES + 40, "{panic}");
    }

    #[test]
    fn talk_about_panics_is_not_a_panic() {
        let (watch, announcements) = watch(None);
        watch.feed(b"echo Kernel panic - not syncing\n");
        assert_eq!(announcements.explain(EndReason::Reset), EndReason::Reset);
    }

    #[test]
    fn an_announced_halt_is_a_shutdown() {
        let (watch, announcements) = watch(None);
        assert_eq!(announcements.explain(EndReason::Halted), EndReason::Halted);
        watch.feed(b"[    3.1] reboot: System halted\n");
        assert_eq!(announcements.explain(EndReason::Halted), EndReason::SystemHalted);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            output in "(fail=1|23|done|login: |\r\n|\n|\r|\x1b\\[1m|\x1b|\x00|\\[|é| ){0,30}",
            pattern in prop_oneof![
                Just("fail=1$"), Just("^done$"), Just(r"done\b"), Just("^$"), Just("login: $"), Just("."), Just("^[^ ]*$")
            ],
            cuts in proptest::collection::vec(0_usize..200, 0..30),
        ) {
            let output = output.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(output.len())).collect();
            cuts.extend([0, output.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|pair| &output[pair[0]..pair[1]]);
            let end = EndReason::PowerOff;
            prop_assert_eq!(verdict(pattern, pieces, end.clone()), verdict(pattern, [output], end));
        }
    }
}
