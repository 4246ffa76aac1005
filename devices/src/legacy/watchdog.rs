//! The watchdog timer of the IB700 board (Linux: drivers/watchdog/ib700wdt.c): a write to one port starts or restarts the
//! timer, a write to another stops it.

use crate::bus::{Action, BusDevice};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const STOP: u64 = 0;
const START: u64 = 2;

/// The watchdog, on three ports: stop, unused, start.
#[derive(Default)]
pub struct Watchdog {
    deadline: Mutex<Option<Instant>>,
}

impl Watchdog {
    /// The port that stops the timer, the first one of the device.
    pub const BASE: u64 = 0x441;
    /// The number of ports.
    pub const LEN: u64 = 3;

    /// Returns when the timer expires; `None` while it is stopped.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the timer expire after `left`, or stops it.
    pub fn restore(&self, left: Option<Duration>) {
        let mut deadline = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        *deadline = left.and_then(|left| Instant::now().checked_add(left));
    }

    /// Has a timer that runs expire later by `time`, in which the guest was not run.
    pub fn extend(&self, time: Duration) {
        let mut deadline = self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        *deadline = deadline.map(|at| at + time);
    }
}

impl BusDevice for Watchdog {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    /// Starts or stops the timer. The low four bits n of a value written to start set the timeout to 30 − 2n seconds.
    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let deadline = match (offset, data.first()) {
            (START, Some(value)) => Some(Instant::now() + Duration::from_secs(30 - 2 * u64::from(value & 0xf))),
            (STOP, _) => None,
            _ => return Action::None,
        };
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_the_last_start_and_can_be_stopped() {
        let watchdog = Watchdog::default();
        assert_eq!(watchdog.deadline(), None);
        watchdog.write(START, &[0xf]);
        let short = watchdog.deadline().expect("running");
        watchdog.write(START, &[0]);
        let long = watchdog.deadline().expect("running");
        assert!(long > short + Duration::from_secs(29), "{short:?} {long:?}");
        watchdog.extend(Duration::from_secs(60));
        let long = long + Duration::from_secs(60);
        watchdog.write(1, &[0]);
        assert_eq!(watchdog.deadline(), Some(long));
        watchdog.restore(Some(Duration::from_secs(9)));
        assert!(watchdog.deadline().is_some_and(|at| at < long && at > Instant::now()));
        watchdog.write(STOP, &[0]);
        watchdog.extend(Duration::from_secs(60));
        assert_eq!(watchdog.deadline(), None);
    }
}
