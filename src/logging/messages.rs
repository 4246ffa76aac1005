//! The messages of this process: the logger of the `log` crate, and what the command says.

use super::limiter::{Limiter, Suppressed, Verdict};
use super::packet::{Kind, MESSAGE_BYTES, Packet, Place, RelaySender, Severity};
use super::stderr::{Writer, lock_in_time};
use crate::console::{LineState, line_state, set_line_state};
use crate::escape::{Bounded, escape, escape_lines};
use log::{LevelFilter, Log, Metadata, Record};
use rustix::stdio::stderr;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, OnceLock};
use std::time::Instant;

/// The longest message of the `log` crate, in bytes.
const LOG_BYTES: usize = 2 << 10;

/// Returns true if hwvmm says what it does (`-v`).
#[must_use]
pub fn is_verbose() -> bool {
    log::max_level() >= LevelFilter::Info
}

/// The destination of this process's messages.
pub enum Sink {
    /// Lines are written to stderr by this process.
    Stderr,
    /// To another process of hwvmm, which prints them ([`Relay`](super::Relay)).
    Relay(RelaySender),
}

/// The messages of one process.
struct Messages {
    limiter: Mutex<Limiter>,
    start: Instant,
    output: Output,
    /// Messages that were not printed and not counted by the limiter: a lock was held, or a socket was full.
    lost: AtomicU32,
}

enum Output {
    Stderr(Writer),
    Relay(RelaySender),
}

/// One for each process: a process that was forked starts with a new one, since a thread of its parent may have held locks of
/// the old one.
static MESSAGES: [OnceLock<Messages>; 4] = [const { OnceLock::new() }; 4];
/// The number of those in use; the last one is this process'.
static STARTED: AtomicUsize = AtomicUsize::new(0);

fn messages() -> Option<&'static Messages> {
    MESSAGES.get(STARTED.load(Ordering::Acquire).checked_sub(1)?)?.get()
}

/// The logger of the `log` crate.
struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata())
            && let Some(messages) = messages()
        {
            messages.log(record);
        }
    }

    fn flush(&self) {}
}

/// Prints what was not printed yet when it is dropped, at the end of the program.
#[must_use = "the last messages are printed when it is dropped"]
pub struct Flush(());

impl Drop for Flush {
    fn drop(&mut self) {
        finish();
    }
}

/// Prepares this process for messages up to `level`. A process that was forked calls this first, before it has threads.
/// Panics become messages, too.
pub fn init(level: LevelFilter, sink: Sink) -> Flush {
    static LOGGER: Once = Once::new();
    let output = match sink {
        Sink::Stderr => Output::Stderr(Writer::new(stderr().try_clone_to_owned().ok())),
        Sink::Relay(sender) => Output::Relay(sender),
    };
    let new = Messages { limiter: Mutex::new(Limiter::new()), start: Instant::now(), output, lost: AtomicU32::new(0) };
    // Where all are used, the last one goes on.
    let number = STARTED.load(Ordering::Acquire);
    if MESSAGES.get(number).is_some_and(|slot| slot.set(new).is_ok()) {
        // This process' copies of its parent's files.
        if let Some(Messages { output: Output::Stderr(writer), .. }) = messages() {
            writer.close();
        }
        STARTED.store(number + 1, Ordering::Release);
    }
    LOGGER.call_once(|| {
        // Only this function sets a logger, and once.
        let _ = log::set_logger(&Logger);
        std::panic::set_hook(Box::new(say_panic));
    });
    log::set_max_level(level);
    Flush(())
}

/// Set where a backtrace would end the process: names for it are read from files.
static NO_BACKTRACES: AtomicBool = AtomicBool::new(false);

/// From here on the message of a panic has no backtrace, whatever RUST_BACKTRACE says: for a process whose threads may not open files.
pub fn leave_out_backtraces() {
    NO_BACKTRACES.store(true, Ordering::Relaxed);
}

fn say_panic(info: &std::panic::PanicHookInfo<'_>) {
    let thread = std::thread::current();
    say(&format!("this is a bug in hwvmm: thread '{}' {info}", thread.name().unwrap_or("?")));
    if NO_BACKTRACES.load(Ordering::Relaxed) {
        return;
    }
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        say(&backtrace.to_string());
    }
}

/// Prints a message of the command's, at the beginning of a line. Waits at most a second for a reader that takes nothing. A
/// stderr that takes nothing is no error.
pub fn say(text: &str) {
    if let Some(messages) = messages() {
        let place = Place { id: 0, severity: Severity::Say };
        messages.send(Kind::Message, place, 0, &escape_lines(text, MESSAGE_BYTES), Wait::Yes);
    }
}

/// Prints text as it is, at the beginning of a line; otherwise as [`say`]. In a process that does not write to stderr, it is a
/// message.
pub fn print(text: &str) {
    match messages().map(|messages| &messages.output) {
        Some(Output::Stderr(writer)) => writer.print(text.to_owned()),
        Some(Output::Relay(_)) => say(text),
        None => {}
    }
}

/// The result of [`pump`]: `Yes` if text is left that stderr has not taken yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// The reader takes nothing now.
    Yes,
    /// Everything is written, or this process does not write to stderr.
    No,
}

/// Writes what waits for the reader of stderr, as far as it takes it now.
pub fn pump() -> Pending {
    match messages().map(|messages| &messages.output) {
        Some(Output::Stderr(writer)) if !writer.pump() => Pending::Yes,
        _ => Pending::No,
    }
}

/// Says how many messages were not printed so far.
pub fn report_suppressed() {
    if let Some(messages) = messages() {
        messages.report_suppressed();
    }
}

/// Says how many messages were not printed, and waits at most a second for a reader that takes nothing.
pub fn finish() {
    if let Some(messages) = messages() {
        messages.report_suppressed();
        match &messages.output {
            Output::Stderr(writer) => {
                writer.lost(messages.lost.swap(0, Ordering::Relaxed).into());
                writer.flush();
            }
            Output::Relay(sender) if messages.lost.load(Ordering::Relaxed) > 0 => {
                sender.wait_for_room();
                let place = Place { id: 0, severity: Severity::Warning };
                messages.send(Kind::Count, place, 0, "", Wait::No);
            }
            Output::Relay(_) => {}
        }
    }
}

/// Prints a packet of another process'.
pub(super) fn print_packet(packet: &Packet) {
    if let Some(messages) = messages() {
        messages.forward(packet);
    }
}

/// How a message is sent: with `Yes` the caller waits until it is written, with `No` it is queued, and dropped where the
/// queue is full.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    Yes,
    No,
}

fn place(record: &Record<'_>) -> Place {
    let mut hasher = DefaultHasher::new();
    (record.module_path(), record.line()).hash(&mut hasher);
    Place { id: hasher.finish(), severity: record.level().into() }
}

impl Messages {
    fn log(&self, record: &Record<'_>) {
        let place = place(record);
        // An error means that the rest is left out.
        let text = || {
            let mut text = Bounded::new(LOG_BYTES);
            let _ = write!(text, "{}", record.args());
            text.into_string()
        };
        self.limited(place, 0, text);
    }

    /// Prints a packet of another process'.
    fn forward(&self, packet: &Packet) {
        let Output::Stderr(writer) = &self.output else { return };
        writer.lost(packet.lost.into());
        let Packet { kind, place, more, line, text, .. } = packet;
        if *line == LineState::Middle {
            set_line_state(LineState::Middle);
        }
        if place.severity == Severity::Verbose && log::max_level() < LevelFilter::Info {
            return;
        }
        match kind {
            Kind::Message => {
                let text = || match place.severity {
                    Severity::Say => escape_lines(text, MESSAGE_BYTES),
                    Severity::Error | Severity::Warning | Severity::Verbose => escape(text, MESSAGE_BYTES),
                };
                self.limited(*place, *more, text);
            }
            Kind::Count => {
                if let Some(mut limiter) = lock_in_time(&self.limiter) {
                    limiter.add(*place, *more, text);
                }
            }
        }
    }

    /// Sends a message if the limiter lets it pass. `more` like it were suppressed elsewhere.
    fn limited(&self, place: Place, more: u64, text: impl FnOnce() -> String) {
        let now = self.start.elapsed();
        let Some(mut limiter) = lock_in_time(&self.limiter) else {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let (verdict, due) = (limiter.check(place, more, now), limiter.due(now));
        drop(limiter);
        if let Verdict::Print { suppressed } = verdict {
            let text = text();
            if let Some(mut limiter) = lock_in_time(&self.limiter) {
                limiter.keep(place, &text);
            }
            self.send(Kind::Message, place, suppressed, &text, Wait::No);
        }
        due.iter().for_each(|suppressed| self.report(suppressed));
    }

    fn report_suppressed(&self) {
        let rest = lock_in_time(&self.limiter).map(|mut limiter| limiter.rest()).unwrap_or_default();
        rest.iter().for_each(|suppressed| self.report(suppressed));
    }

    fn report(&self, suppressed: &Suppressed) {
        let Suppressed { place, count, like } = suppressed;
        self.send(Kind::Count, *place, *count, like, Wait::No);
    }

    /// Sends a message whose text is escaped, or a count.
    fn send(&self, kind: Kind, place: Place, more: u64, text: &str, wait: Wait) {
        match &self.output {
            Output::Stderr(writer) => {
                let text = match (kind, more) {
                    (Kind::Message, 0) => text.to_owned(),
                    (Kind::Message, more) => format!("{text} ({more} more like this)"),
                    (Kind::Count, more) if text.is_empty() => format!("{more} more messages of several kinds"),
                    (Kind::Count, more) => format!("{more} more like this: {text}"),
                };
                let text = format!("{}{text}\n", place.severity.prefix());
                match wait {
                    Wait::Yes => writer.print(text),
                    Wait::No => {
                        writer.lost(self.lost.swap(0, Ordering::Relaxed).into());
                        writer.line(text);
                    }
                }
            }
            Output::Relay(sender) => {
                let lost = self.lost.swap(0, Ordering::Relaxed);
                let packet = Packet { kind, place, more, line: line_state(), lost, text: text.to_owned() };
                if sender.send(&packet) {
                    set_line_state(LineState::Start);
                } else {
                    self.lost.fetch_add(lost.saturating_add(1), Ordering::Relaxed);
                }
            }
        }
    }
}
