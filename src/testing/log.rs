//! The log of a guest's console: written to a file of bounded length, and searched line by line.

use super::file::KtapUse;
use super::ktap::{Ktap, KtapReport};
use super::patterns::OopsKind;
use crate::console::{Lines, without_prefix};
use crate::escape::{GUEST_BYTES, escape};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};

/// Bytes of a log that are kept from its beginning.
const HEAD_BYTES: u64 = 16 << 20;
/// Bytes of a longer log that are kept from its end.
const TAIL_BYTES: usize = 256 << 10;
/// Lines of the log's end that reports show.
const TAIL_LINES: usize = 20;
/// Bytes of each of them.
const LINE_BYTES: usize = 300;
/// Complaints of the kernel that are kept of each kind: those of one kind must not hide those of another.
const MAX_COMPLAINTS: usize = 20;
/// Where the kernel says that it panics (kernel/panic.c).
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// The last line of a panic, at which hwvmm itself ends the run.
const PANIC_END: &[u8] = b"---[ end Kernel panic - not syncing";

/// What the kernel has said of a panic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Panic {
    /// No line of a panic was seen.
    None,
    /// The first line of a panic was seen.
    Begun,
    /// The last line of a panic was seen.
    Ended,
}

/// A complaint of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Complaint {
    /// The pattern that the line matched.
    pub(super) kind: OopsKind,
    /// The line, without the prefix of printk.
    pub(super) line: String,
}

/// What was found in a log.
#[derive(Clone, Debug, Default)]
pub(super) struct Findings {
    /// What the kernel said when it panicked.
    pub(super) panic: Option<String>,
    /// Its complaints, the first ones.
    pub(super) complaints: Vec<Complaint>,
    /// The last lines.
    pub(super) tail: Vec<String>,
    /// What was said in KTAP; `None` where it was not looked for.
    pub(super) ktap: Option<KtapReport>,
}

/// Whose output a log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The console of a guest: its kernel's log, and all else.
    Console,
    /// The kernel's log alone.
    KernelLog,
    /// The stdout of a command, which says nothing of the kernel.
    Command,
}

impl Findings {
    /// Those of a command's output and of its kernel's log together. The lines that say more come last.
    pub(super) fn with_kernel_log(self, kernel: Self) -> Self {
        let Self { panic, complaints, .. } = kernel;
        let (mut tail, last) = if panic.is_some() { (self.tail, kernel.tail) } else { (kernel.tail, self.tail) };
        tail.extend(last);
        Self { panic, complaints, tail, ktap: self.ktap }
    }
}

/// A log that is being written.
pub(super) struct Log {
    /// `None` where another process writes it.
    file: Option<File>,
    written: u64,
    /// The end of a log of which not all is kept.
    tail: VecDeque<u8>,
    dropped: bool,
    lines: Lines,
    seen: Seen,
}

struct Seen {
    source: Source,
    panic: Option<String>,
    panic_ended: bool,
    complaints: Vec<Complaint>,
    last: VecDeque<String>,
    ktap: Option<Ktap>,
}

impl Log {
    /// A log that is kept in `file`, where there is one.
    pub(super) fn new(source: Source, file: Option<File>, ktap: KtapUse) -> Self {
        let ktap = match (source, ktap) {
            (Source::KernelLog, _) | (_, KtapUse::Ignored) => None,
            (Source::Console | Source::Command, KtapUse::Required) => Some(Ktap::default()),
        };
        Self {
            file,
            written: 0,
            tail: VecDeque::new(),
            dropped: false,
            lines: Lines::default(),
            seen: Seen { source, panic: None, panic_ended: false, complaints: Vec::new(), last: VecDeque::new(), ktap },
        }
    }

    /// Takes output of the guest.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let seen = &mut self.seen;
        self.lines.feed(bytes, |line| seen.line(line.text));
        let Some(file) = &mut self.file else { return Ok(()) };
        let room = usize::try_from(HEAD_BYTES - self.written).unwrap_or(usize::MAX).min(bytes.len());
        let (head, rest) = bytes.split_at(room);
        file.write_all(head)?;
        self.written += head.len() as u64;
        self.tail.extend(rest);
        if let Some(more) = self.tail.len().checked_sub(TAIL_BYTES) {
            self.tail.drain(..more);
            self.dropped |= more > 0;
        }
        Ok(())
    }

    /// What the kernel has said of a panic.
    pub(super) fn panic(&self) -> Panic {
        match (self.seen.panic_ended, &self.seen.panic) {
            (true, _) => Panic::Ended,
            (false, Some(_)) => Panic::Begun,
            (false, None) => Panic::None,
        }
    }

    /// The end of the output.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub(super) fn finish(mut self) -> io::Result<Findings> {
        if let Some(line) = self.lines.unfinished() {
            self.seen.line(line.text);
        }
        if let Some(file) = &mut self.file {
            if self.dropped {
                file.write_all(b"\n[hwvmm: a part of the log is left out here]\n")?;
            }
            let (first, second) = self.tail.as_slices();
            file.write_all(first)?;
            file.write_all(second)?;
        }
        let Seen { panic, complaints, last, ktap, .. } = self.seen;
        Ok(Findings { panic, complaints, tail: last.into(), ktap: ktap.map(Ktap::finish) })
    }
}

impl Seen {
    fn line(&mut self, line: &[u8]) {
        if self.last.len() == TAIL_LINES {
            self.last.pop_front();
        }
        self.last.push_back(shown(line, LINE_BYTES));
        if let Some(ktap) = &mut self.ktap {
            ktap.line(line);
        }
        if self.source == Source::Command {
            return;
        }
        messages(line).for_each(|message| self.message(without_prefix(message)));
    }

    /// Takes what may be a message of the kernel.
    fn message(&mut self, message: &[u8]) {
        self.panic_ended |= message.starts_with(PANIC_END);
        if message.starts_with(PANIC) {
            let rest = message[PANIC.len()..].trim_ascii().strip_prefix(b":").unwrap_or_default();
            self.panic.get_or_insert_with(|| shown(rest.trim_ascii(), GUEST_BYTES));
        } else if let Some(kind) = OopsKind::of_line(message)
            && self.complaints.iter().filter(|complaint| complaint.kind == kind).count() < MAX_COMPLAINTS
        {
            self.complaints.push(Complaint { kind, line: shown(message, LINE_BYTES) });
        }
    }
}

/// The line up to the first time of printk that is not at its beginning, and what begins with each of those: a program may have printed
/// no end of line when the kernel begins to print.
fn messages(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    let times = memchr::memchr_iter(b'[', line).filter(|at| *at > 0 && begins_with_time(&line[*at..]));
    let mut starts = std::iter::once(0).chain(times).peekable();
    std::iter::from_fn(move || {
        let start = starts.next()?;
        line.get(start..starts.peek().copied().unwrap_or(line.len()))
    })
}

/// Returns true for `[    1.234567]`, and what follows it.
fn begins_with_time(text: &[u8]) -> bool {
    let inner = text.get(1..).unwrap_or_default();
    let Some(end) = inner.iter().take(24).position(|byte| *byte == b']') else { return false };
    let Some(point) = inner[..end].iter().position(|byte| *byte == b'.') else { return false };
    let is_number = |digits: &[u8]| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    is_number(inner[..point].trim_ascii_start()) && is_number(&inner[point + 1..end])
}

fn shown(line: &[u8], limit: usize) -> String {
    // Each byte is one of text at least, so that no more are needed.
    escape(&String::from_utf8_lossy(&line[..line.len().min(limit * 2)]), limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn log(pieces: &[&[u8]]) -> (Findings, Vec<u8>) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let mut log = Log::new(Source::Console, Some(file.reopen().expect("opened")), KtapUse::Required);
        pieces.iter().for_each(|piece| log.take(piece).expect("written"));
        (log.finish().expect("written"), fs::read(file.path()).expect("there"))
    }

    #[test]
    fn panics_and_complaints_are_found_in_whole_lines() {
        let (findings, file) = log(&[
            b"[    0.1] WARN",
            b"ING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\r\nBUG: KASAN: use-after-free in g\n",
            b"[    0.4][    T1] [ BUG: Invalid wait context ]\n",
            b"[    0.5][    T1] Kernel panic - not syncing: no \x1b[31minit\x07\n---[ end ]---",
        ]);
        let kinds: Vec<_> = findings.complaints.iter().map(|complaint| complaint.kind).collect();
        assert_eq!(kinds, [OopsKind::Warning, OopsKind::Kasan, OopsKind::Lockdep]);
        assert_eq!(findings.panic.as_deref(), Some("no init"));
        assert_eq!(findings.tail.last().map(String::as_str), Some("---[ end ]---"));
        assert!(file.starts_with(b"[    0.1] WARNING"), "the file has every byte");
    }

    #[test]
    fn complaints_of_one_kind_do_not_hide_those_of_another() {
        let warning = b"WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\n";
        let mut pieces: Vec<&[u8]> = vec![warning; 1000];
        pieces.push(b"BUG: KASAN: use-after-free in g\n");
        let (findings, _) = log(&pieces);
        let kasan = findings.complaints.iter().filter(|complaint| complaint.kind == OopsKind::Kasan).count();
        assert_eq!(kasan, 1);
        assert!(findings.complaints.len() <= MAX_COMPLAINTS + 1, "{}", findings.complaints.len());
    }

    /// A program has printed no end of line when the kernel begins to print.
    #[test]
    fn what_the_kernel_says_behind_other_text_is_found() {
        let (findings, _) = log(&[
            b"..[    5.1] WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\n# [    6.000001][    T1] BUG: KASAN: use-after-free in g\n",
            b"login: [   12.345678] Kernel panic - not syncing: x\nroot [1.x] Oops: 0000 [#1]\n",
        ]);
        let kinds: Vec<_> = findings.complaints.iter().map(|complaint| complaint.kind).collect();
        assert_eq!(kinds, [OopsKind::Warning, OopsKind::Kasan]);
        assert!(findings.complaints[0].line.starts_with("WARNING: "), "{:?}", findings.complaints);
        assert_eq!(findings.panic.as_deref(), Some("x"));
        let many = b"[    5.1] ".repeat(6000);
        assert!(log(&[&many, b"\n"]).0.complaints.is_empty());
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let full = || File::options().write(true).open("/dev/full").expect("/dev/full");
        assert!(Log::new(Source::Console, Some(full()), KtapUse::Ignored).take(b"x").is_err());
    }

    #[test]
    fn the_output_of_a_command_comes_last_unless_the_kernel_panicked() {
        let of = |panic: Option<&str>| {
            let complaints = vec![Complaint { kind: OopsKind::Warning, line: "WARNING".into() }];
            let kernel = Findings { panic: panic.map(Into::into), complaints, tail: vec!["kernel".into()], ktap: None };
            Findings { tail: vec!["command".into()], ..Findings::default() }.with_kernel_log(kernel).tail
        };
        assert_eq!(of(None), ["kernel", "command"]);
        assert_eq!(of(Some("x")), ["command", "kernel"]);
    }

    #[test]
    fn a_command_says_nothing_of_the_kernel_and_its_log_nothing_of_sub_tests() {
        let findings = |source| {
            let mut log = Log::new(source, None, KtapUse::Required);
            log.take(b"BUG: x\nKernel panic - not syncing: x\nok 1 a\n").expect("taken");
            log.finish().expect("taken")
        };
        let (command, kernel) = (findings(Source::Command), findings(Source::KernelLog));
        assert!(command.panic.is_none() && command.complaints.is_empty());
        assert_eq!(command.ktap.map(|report| report.passed), Some(1));
        assert!(kernel.panic.is_some() && kernel.complaints.len() == 1 && kernel.ktap.is_none());
    }

    #[test]
    fn what_a_hostile_guest_prints_is_bounded_and_has_no_control_characters() {
        let long = vec![b'x'; 1 << 20];
        let mut pieces: Vec<&[u8]> = vec![b"\x9b\x00\x08\xffBUG: a\n"; 100];
        pieces.extend((0..20).map(|_| &long[..]));
        pieces.push(b"\nKernel panic - not syncing: \x08\xe2\x80\xae");
        let (findings, file) = log(&pieces);
        assert!(file.len() as u64 - HEAD_BYTES < 2 * TAIL_BYTES as u64, "{}", file.len());
        assert!(findings.tail.len() <= TAIL_LINES && findings.complaints.len() <= MAX_COMPLAINTS);
        let text = findings.tail.iter().chain(&findings.panic);
        for line in text {
            assert!(line.len() <= GUEST_BYTES + 3 && !line.chars().any(crate::escape::is_active), "{line:?}");
        }
        assert_eq!(findings.panic.as_deref(), Some("\\x08\\u{202e}"));
    }
}
