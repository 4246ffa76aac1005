//! The connections to the agent in a guest, and which of them there are.

use crate::machine::FIRST_AGENT_PORT;
use hwvmm_devices::virtio::vsock::JoinedPort;
use std::io;
use std::os::unix::net::UnixStream;

/// Whether the command gets a terminal, which has no stderr of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervise) enum CommandTerminal {
    /// It has three streams.
    None,
    /// It has one terminal.
    Given,
}

/// The streams that the agent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervise) enum AgentStreams {
    /// Those of the command that it boots for.
    Command(CommandTerminal),
    /// Those of any command, of which none is used yet.
    Template,
    /// The same, for a command that comes when the guest has booted.
    Late(CommandTerminal),
}

impl AgentStreams {
    pub(super) fn terminal(self) -> CommandTerminal {
        match self {
            Self::Command(terminal) | Self::Late(terminal) => terminal,
            Self::Template => CommandTerminal::None,
        }
    }
}

/// The parent's ends of the connections to the agent.
pub(in crate::supervise) struct Ends {
    pub(super) control: UnixStream,
    pub(super) stdin: UnixStream,
    pub(super) stdout: UnixStream,
    pub(super) stderr: Option<UnixStream>,
    pub(super) streams: AgentStreams,
}

impl Ends {
    /// Makes the connections. The ports are the guest's ends.
    ///
    /// # Errors
    /// Returns the error of socketpair(2).
    pub(in crate::supervise) fn new(streams: AgentStreams) -> io::Result<(Self, Vec<JoinedPort>)> {
        let mut ports = Vec::new();
        let mut next = |offset: u32| {
            let (near, far) = UnixStream::pair()?;
            near.set_nonblocking(true)?;
            far.set_nonblocking(true)?;
            ports.push(JoinedPort { port: FIRST_AGENT_PORT + offset, socket: far });
            Ok::<_, io::Error>(near)
        };
        let (control, stdin, stdout) = (next(0)?, next(1)?, next(2)?);
        // A guest that waits does not know if its command will have a terminal.
        let without_stderr = streams == AgentStreams::Command(CommandTerminal::Given);
        let stderr = if without_stderr { None } else { Some(next(3)?) };
        Ok((Self { control, stdin, stdout, stderr, streams }, ports))
    }
}
