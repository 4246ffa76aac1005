//! What all consoles have in common.

use std::io;

/// The guest's side of a console's input.
pub trait ConsoleInput: Send + Sync {
    /// Hands over what the guest takes of `input`, and says how many bytes that was; 0 means: wait until the console
    /// says that it wants more.
    ///
    /// # Errors
    /// Where the interrupt cannot be raised.
    fn enqueue(&self, input: &[u8]) -> io::Result<usize>;
}
