//! What the UART and the virtio console have in common.

use std::io;
use std::time::Duration;
use thiserror::Error;

/// Input cannot be passed to the guest.
#[derive(Debug, Error)]
pub enum InputError {
    /// The interrupt line, or the eventfd of the console's worker, cannot be written.
    #[error("cannot signal the console that there is input")]
    Signal(#[source] io::Error),
}

/// A console that takes input for the guest.
pub trait ConsoleInput: Send + Sync {
    /// Passes as much of `input` to the guest as fits and returns the number of bytes. Where that is 0, the console signals
    /// when it can take more input. Does not block.
    ///
    /// # Errors
    /// Returns [`InputError`] where the guest cannot be interrupted.
    fn enqueue(&self, input: &[u8]) -> Result<usize, InputError>;

    /// Notifies the guest again where it has left input unread that it was notified of. Must be called after input was passed
    /// on, and again after the time that it returns; `None` where nothing waits. Does not block.
    fn remind(&self) -> Option<Duration> {
        None
    }

    /// Returns the input that was passed, and that the guest has not read, in order. For the end of the guest: the next one can
    /// have it.
    fn unread(&self) -> Vec<u8>;
}
