//! The ports at which a guest says how its one command ended: no driver stands between them and the end of the run.

use crate::bus::{Action, BusDevice, CommandEnd};
use std::sync::atomic::{AtomicU8, Ordering};

const STATUS: u64 = 0;
const KIND: u64 = 1;
const EXITED: u8 = 1;
const SIGNALED: u8 = 2;
const FAILED: u8 = 3;

/// Two ports: the exit status or the number of the signal, and the kind of the end, at which the run ends. All writes are of one byte.
#[derive(Default)]
pub struct CommandPort {
    status: AtomicU8,
}

impl BusDevice for CommandPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let [value] = *data else { return Action::None };
        let status = self.status.load(Ordering::Relaxed);
        match (offset, value) {
            (STATUS, status) => {
                self.status.store(status, Ordering::Relaxed);
                Action::None
            }
            (KIND, EXITED) => Action::CommandEnd(CommandEnd::Exited(status)),
            // Linux has the signals 1 to 64.
            (KIND, SIGNALED) if (1..=64).contains(&status) => Action::CommandEnd(CommandEnd::Signaled(status)),
            (KIND, FAILED) => Action::CommandEnd(CommandEnd::Failed),
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(status: u8, kind: u8) -> Action {
        let port = CommandPort::default();
        assert_eq!(port.write(STATUS, &[status]), Action::None);
        port.write(KIND, &[kind])
    }

    #[test]
    fn the_kind_ends_the_run_with_the_status_before_it() {
        assert_eq!(end(7, EXITED), Action::CommandEnd(CommandEnd::Exited(7)));
        assert_eq!(end(9, SIGNALED), Action::CommandEnd(CommandEnd::Signaled(9)));
        assert_eq!(end(7, FAILED), Action::CommandEnd(CommandEnd::Failed));
        assert_eq!(CommandPort::default().write(KIND, &[EXITED]), Action::CommandEnd(CommandEnd::Exited(0)));
    }

    #[test]
    fn what_is_no_end_does_nothing() {
        for (status, kind) in [(7, 0), (7, 4), (7, 0xff), (0, SIGNALED), (65, SIGNALED)] {
            assert_eq!(end(status, kind), Action::None, "{status} {kind}");
        }
        for data in [&[][..], &[EXITED, 0], &[EXITED, 0, 0, 0]] {
            assert_eq!(CommandPort::default().write(KIND, data), Action::None);
        }
        assert_eq!(CommandPort::default().write(2, &[EXITED]), Action::None);
    }
}
