//! Raw mode of the terminal on stdin, and its restoration on every way out of the program.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::termios::{OptionalActions, OutputModes, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr};
use std::io::{stderr, stdin, stdout};
use std::os::fd::AsFd;
use std::sync::{Mutex, Once, PoisonError};

/// The terminal's settings as they were, while it is raw.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);

fn restore() {
    let original = ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(original) = original
        && let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &original)
    {
        log::error!("cannot restore the terminal: {error}; the command `reset` restores it");
    }
}

/// Returns the columns and rows of the terminal on stdin; both 0 where it is no terminal.
#[must_use]
pub fn terminal_size() -> (u16, u16) {
    rustix::termios::tcgetwinsize(stdin()).map_or((0, 0), |size| (size.ws_col, size.ws_row))
}

/// Leaves a raw terminal as it is when this process, a copy of the one that made it raw, ends or panics.
pub fn leave_terminal_to_parent() {
    *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

/// The terminal in raw mode. Its settings are restored when this is dropped (a signal ends the run and drops it, too) and
/// when the program panics.
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw; `None` where stdin is no terminal. Output processing stays on, so that lines of
    /// hwvmm's own start at the left margin.
    #[must_use]
    pub fn enter() -> Option<Self> {
        static HOOK: Once = Once::new();
        let original = tcgetattr(stdin()).ok()?;
        let mut raw = original.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        HOOK.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                previous(info);
            }));
        });
        *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(original);
        if let Err(error) = tcsetattr(stdin(), OptionalActions::Now, &raw) {
            log::warn!("cannot make the terminal raw: {error}");
        }
        Some(Self(()))
    }
}

/// Discards what was typed and not read: a guest that crashed was to have it, and not the shell.
pub fn discard_input() {
    // It fails where stdin is no terminal.
    let _ = tcflush(stdin(), QueueSelector::IFlush);
}

/// The status flags (fcntl(2), `F_GETFL`) of stdin, stdout and stderr, which hwvmm shares with the shell that has started it. The
/// machine's process can change them; when this is dropped, they are as they were.
pub struct StreamFlags([Option<OFlags>; 3]);

impl StreamFlags {
    /// Returns the flags as they are now. Those of a stream that is closed are left alone.
    #[must_use]
    pub fn save() -> Self {
        Self([fcntl_getfl(stdin()).ok(), fcntl_getfl(stdout()).ok(), fcntl_getfl(stderr()).ok()])
    }
}

impl Drop for StreamFlags {
    fn drop(&mut self) {
        let [input, output, errors] = self.0;
        restore_flags(&stdin(), input);
        restore_flags(&stdout(), output);
        restore_flags(&stderr(), errors);
    }
}

fn restore_flags(stream: &impl AsFd, saved: Option<OFlags>) {
    if let Some(saved) = saved
        && fcntl_getfl(stream) != Ok(saved)
        && let Err(error) = fcntl_setfl(stream, saved)
    {
        log::error!("cannot restore the flags of a standard stream: {error}");
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}
