//! An eye on what the guest says: the pattern that the user waits for, and a kernel's last words.

use crate::exit::EndReason;
use regex::bytes::Regex;
use std::sync::{Arc, Mutex, PoisonError};

/// Lines are looked at up to this many bytes; of longer ones the first half is forgotten.
const LINE_BYTES: usize = 4096;
const PANIC: &[u8] = b"Kernel panic - not syncing";
const PANIC_END: &[u8] = b"---[ end Kernel panic - not syncing";
const HALTED: &[u8] = b"reboot: System halted";

/// What has been seen, on all consoles.
#[derive(Clone, Default)]
pub struct Seen(Arc<Mutex<Words>>);

#[derive(Default)]
struct Words {
    panic: Option<String>,
    halted: bool,
}

impl Seen {
    /// What the kernel said when it panicked.
    #[must_use]
    pub fn panic(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).panic.clone()
    }

    /// What an end really was, given what was said before it: a panic that ends in a reset is a panic, a halt that was
    /// announced is a shutdown.
    #[must_use]
    pub fn explain(&self, end: EndReason) -> EndReason {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match (end, &words.panic) {
            (
                EndReason::Reset
                | EndReason::Halted
                | EndReason::TripleFault
                | EndReason::TimedOut(_)
                | EndReason::Panicked(None),
                Some(panic),
            ) => EndReason::Panicked(Some(panic.clone())),
            (EndReason::Halted, None) if words.halted => EndReason::SystemHalted,
            (end, _) => end,
        }
    }
}

/// Looks at one console's bytes as they go by.
pub struct Watch {
    pattern: Option<Regex>,
    seen: Seen,
    line: Vec<u8>,
}

impl Watch {
    /// Looks for `pattern`, and tells `seen` what it sees.
    #[must_use]
    pub fn new(pattern: Option<Regex>, seen: Seen) -> Self {
        Self { pattern, seen, line: Vec::new() }
    }

    /// Takes bytes; the end of the run, if they mean one.
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
        let line = without_stamp(&self.line);
        let mut words = self.seen.0.lock().unwrap_or_else(PoisonError::into_inner);
        if line.starts_with(PANIC_END) {
            return Some(EndReason::Panicked(words.panic.clone()));
        }
        if let Some(rest) = line.strip_prefix(PANIC) {
            let rest = String::from_utf8_lossy(rest);
            words.panic.get_or_insert_with(|| rest.trim_start_matches(':').trim().to_owned());
        } else if line.starts_with(HALTED) {
            words.halted = true;
        }
        None
    }
}

/// The line without what printk puts in front: `<3>`, `[    1.234567]`, `[    T1]`.
fn without_stamp(mut line: &[u8]) -> &[u8] {
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

    fn watch(pattern: Option<&str>) -> (Watch, Seen) {
        let seen = Seen::default();
        let pattern = pattern.map(|p| Regex::new(p).expect("valid"));
        (Watch::new(pattern, seen.clone()), seen)
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
        let (mut watch, seen) = watch(None);
        assert_eq!(watch.feed(b"[    1.234567][    T1] Kernel panic - not syncing: VFS: Unable\r\n"), None);
        assert_eq!(seen.explain(EndReason::Reset), EndReason::Panicked(Some("VFS: Unable".into())));
        assert_eq!(seen.explain(EndReason::PowerOff), EndReason::PowerOff);
        let end = watch.feed(b"[    2.0] ---[ end Kernel panic - not syncing: VFS: Unable ]---\n");
        assert_eq!(end, Some(EndReason::Panicked(Some("VFS: Unable".into()))));
    }

    #[test]
    fn talk_about_panics_is_not_a_panic() {
        let (mut watch, seen) = watch(None);
        watch.feed(b"echo Kernel panic - not syncing\n");
        assert_eq!(seen.explain(EndReason::Reset), EndReason::Reset);
    }

    #[test]
    fn an_announced_halt_is_a_shutdown() {
        let (mut watch, seen) = watch(None);
        assert_eq!(seen.explain(EndReason::Halted), EndReason::Halted);
        watch.feed(b"[    3.1] reboot: System halted\n");
        assert_eq!(seen.explain(EndReason::Halted), EndReason::SystemHalted);
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
