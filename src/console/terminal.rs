//! Raw mode, and back out of it on every way.

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
        log::error!("cannot restore the terminal: {error}; `reset` does");
    }
}

/// Columns and rows of the terminal on stdin; 0 where they are not known.
#[must_use]
pub fn terminal_size() -> (u16, u16) {
    rustix::termios::tcgetwinsize(stdin()).map_or((0, 0), |size| (size.ws_col, size.ws_row))
}

/// The terminal in raw mode, until this goes or the program panics. Signals end the run in order, so this goes then
/// too.
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw, if there is one. Output processing stays on, so that hwvmm's own lines keep
    /// their left margin.
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
