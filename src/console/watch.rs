//! Watches console output for lines that end a run or explain its end: the pattern of `--expect`, a kernel panic, a halt.

use crate::exit::EndReason;
use regex::bytes::Regex;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Longest line that is searched, in bytes. The first half of a longer one is dropped.
const LINE_BYTES: usize = 4096;
const PANIC: &[u8] = b"Kernel panic - not syncing";
const PANIC_END: &[u8] = b"---[ end Kernel panic - not syncing";
const HALTED: &[u8] = b"reboot: System halted";

/// What the guest's kernel has announced, on all consoles of a machine. Clones share it.
#[derive(Clone, Default)]
pub struct Announcements(Arc<Mutex<Announced>>);

#[derive(Default)]
struct Announced {
    /// Text behind "Kernel panic - not syncing:".
    panic: Option<String>,
    /// The kernel has printed "reboot: System halted".
    halted: bool,
}

impl Announcements {
    /// The message of the kernel panic, if there was one.
    #[must_use]
    pub fn panic(&self) -> Option<String> {
        self.lock().panic.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Announced> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the reason behind an end: a reset (or a hang) after a panic is that panic, an announced halt is a shutdown.
    #[must_use]
    pub fn explain(&self, end: EndReason) -> EndReason {
        let announced = self.lock();
        match (end, &announced.panic) {
            (
                EndReason::Reset
                | EndReason::Halted
                | EndReason::TripleFault
                | EndReason::TimedOut(_)
                | EndReason::Panicked(None),
                Some(panic),
            ) => EndReason::Panicked(Some(panic.clone())),
            (EndReason::Halted, None) if announced.halted => EndReason::SystemHalted,
            (end, _) => end,
        }
    }
}

/// Searches the output of one console, line by line.
pub struct Watch {
    pattern: Option<Regex>,
    announcements: Announcements,
    /// The line so far.
    line: Vec<u8>,
}

impl Watch {
    /// Searches for `pattern`, and records in `announcements` what the kernel announces.
    #[must_use]
    pub fn new(pattern: Option<Regex>, announcements: Announcements) -> Self {
        Self { pattern, announcements, line: Vec::new() }
    }

    /// Takes output. Returns the end of the run where the output calls for it.
    pub fn feed(&mut self, bytes: &[u8]) -> Option<EndReason> {
        let mut end = None;
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            end = end.or_else(|| self.matched());
            if part.ends_with(b"\n") {
                end = end.or_else(|| self.whole_line());
                self.line.clear();
            }
            if self.line.len() > LINE_BYTES {
                self.line.drain(..LINE_BYTES / 2);
            }
        }
        end
    }

    fn matched(&self) -> Option<EndReason> {
        let found = self.pattern.as_ref()?.find(&self.line)?;
        Some(EndReason::Seen(String::from_utf8_lossy(found.as_bytes()).into_owned()))
    }

    fn whole_line(&self) -> Option<EndReason> {
        let line = without_prefix(&self.line);
        let mut announced = self.announcements.lock();
        if line.starts_with(PANIC_END) {
            return Some(EndReason::Panicked(announced.panic.clone()));
        }
        if let Some(rest) = line.strip_prefix(PANIC) {
            let rest = String::from_utf8_lossy(rest);
            announced.panic.get_or_insert_with(|| rest.trim_start_matches(':').trim().to_owned());
        } else if line.starts_with(HALTED) {
            announced.halted = true;
        }
        None
    }
}

/// Removes the prefixes of printk: `<3>`, `[    1.234567]`, `[    T1]`.
fn without_prefix(mut line: &[u8]) -> &[u8] {
    loop {
        line = line.trim_ascii_start();
        let close = match line.first() {
            Some(b'[') => b']',
            Some(b'<') => b'>',
            _ => return line,
        };
        let Some(at) = line.iter().take(40).position(|byte| *byte == close) else { return line };
        line = &line[at + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(pattern: Option<&str>) -> (Watch, Announcements) {
        let announcements = Announcements::default();
        let pattern = pattern.map(|p| Regex::new(p).expect("valid"));
        (Watch::new(pattern, announcements.clone()), announcements)
    }

    #[test]
    fn a_pattern_is_seen_across_writes_and_before_the_line_ends() {
        let (mut watch, _) = watch(Some("log[i]n: $"));
        assert_eq!(watch.feed(b"Debian\r\nhost lo"), None);
        assert_eq!(watch.feed(b"gin:"), None);
        assert_eq!(watch.feed(b" "), Some(EndReason::Seen("login: ".into())));
    }

    #[test]
    fn a_pattern_does_not_reach_over_lines() {
        let (mut watch, _) = watch(Some("ab"));
        assert_eq!(watch.feed(b"a\nb"), None);
    }

    #[test]
    fn a_panic_explains_the_reset_that_follows() {
        let (mut watch, announcements) = watch(None);
        assert_eq!(watch.feed(b"[    1.234567][    T1] Kernel panic - not syncing: VFS: Unable\r\n"), None);
        assert_eq!(announcements.explain(EndReason::Reset), EndReason::Panicked(Some("VFS: Unable".into())));
        assert_eq!(announcements.explain(EndReason::PowerOff), EndReason::PowerOff);
        let end = watch.feed(b"[    2.0] ---[ end Kernel panic - not syncing: VFS: Unable ]---\n");
        assert_eq!(end, Some(EndReason::Panicked(Some("VFS: Unable".into()))));
    }

    #[test]
    fn talk_about_panics_is_not_a_panic() {
        let (mut watch, announcements) = watch(None);
        watch.feed(b"echo Kernel panic - not syncing\n");
        assert_eq!(announcements.explain(EndReason::Reset), EndReason::Reset);
    }

    #[test]
    fn an_announced_halt_is_a_shutdown() {
        let (mut watch, announcements) = watch(None);
        assert_eq!(announcements.explain(EndReason::Halted), EndReason::Halted);
        watch.feed(b"[    3.1] reboot: System halted\n");
        assert_eq!(announcements.explain(EndReason::Halted), EndReason::SystemHalted);
    }

    #[test]
    fn a_line_without_an_end_takes_no_more_memory() {
        let (mut watch, _) = watch(None);
        for _ in 0..10_000 {
            watch.feed(&[b'x'; 100]);
        }
        assert!(watch.line.capacity() <= 4 * LINE_BYTES);
    }
}
