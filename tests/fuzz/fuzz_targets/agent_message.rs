//! Any bytes as what the host sends to an agent that waits for its command: they make a command or an error, within the limits and whatever
//! pieces they come in. The agent's own code is compiled in, as it is a program of its own. The first byte is the size of the pieces.
#![no_main]
#![allow(dead_code, reason = "the agent uses the rest")]

#[path = "../../../src/agent/src/instructions.rs"]
mod instructions;
#[path = "../../../src/agent/src/message.rs"]
mod message;

use instructions::{CommandSpec, Instructions, Task};
use libfuzzer_sys::fuzz_target;
use message::{CommandMessage, MessageError};

/// Returns the command with the bytes behind its message, or the error, with the bytes given in pieces of `size`.
fn read(bytes: &[u8], size: usize) -> Result<Option<(CommandSpec, &[u8])>, MessageError> {
    let (mut message, mut rest) = (CommandMessage::default(), bytes);
    while !rest.is_empty() {
        assert!((1..=message::MAX_BYTES).contains(&message.wanted()));
        let (piece, behind) = rest.split_at(size.min(message.wanted()).clamp(1, rest.len()));
        rest = behind;
        if let Some(spec) = message.push(piece)? {
            return Ok(Some((spec, rest)));
        }
    }
    Ok(None)
}

fuzz_target!(|data: &[u8]| {
    let [size, bytes @ ..] = data else { return };
    let whole = read(bytes, usize::MAX);
    assert_eq!(whole, read(bytes, usize::from(*size).max(1)));
    match whole {
        Ok(Some((spec, _))) => assert!(!spec.command.is_empty() && spec.workdir.is_absolute()),
        Ok(None) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    // The same records as instructions: a command that comes late is one that could have come with them.
    if let Ok(spec) = CommandSpec::parse(bytes) {
        assert_eq!(Instructions::parse(bytes).map(|read| read.task), Ok(Task::Run(spec)));
    }
    if let Ok(Instructions { task: Task::Wait, .. }) = Instructions::parse(bytes) {
        assert!(CommandSpec::parse(bytes).is_err());
    }
});
