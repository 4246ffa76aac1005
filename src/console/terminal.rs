//! Raw mode of the terminal on stdin, and its restoration on every way out of the program.

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use std::io::stdin;
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

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}
