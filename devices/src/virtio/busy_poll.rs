//! Polling of the available ring in place of waiting for a kick, which is an exit. The poll window follows the average time
//! between requests; where requests are further apart than the limit, there is no polling.

use std::time::{Duration, Instant};

/// Polls in a row without a request, after which polling stops until a kick comes within the limit again.
const MAX_FRUITLESS_POLLS: u32 = 2;
/// The poll window in average gaps, as requests do not arrive at regular intervals.
const WINDOW_GAPS: u32 = 4;

/// Learns how soon a request follows the last used buffer notification.
#[derive(Debug)]
pub(super) struct BusyPoller {
    /// The longest time that one poll may take.
    limit: Duration,
    /// The average time from a notification to the next request; `None` where it is above `limit` or not known yet.
    average_gap: Option<Duration>,
    fruitless_polls: u32,
    last_signal: Option<Instant>,
}

impl BusyPoller {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, average_gap: None, fruitless_polls: 0, last_signal: None }
    }

    /// Notes that the device sent a used buffer notification.
    pub(super) fn signalled(&mut self) {
        self.last_signal = Some(Instant::now());
    }

    /// Notes that the driver kicked.
    pub(super) fn kicked(&mut self) {
        let gap = self.last_signal.take().map(|signal| signal.elapsed());
        if let Some(gap) = gap.filter(|gap| *gap <= self.limit) {
            self.learn(gap);
        }
    }

    fn learn(&mut self, gap: Duration) {
        self.average_gap = Some(self.average_gap.map_or(gap, |average| (average * 7 + gap) / 8));
        self.fruitless_polls = 0;
    }

    /// Polls until `is_available` returns true or the poll window ends. Returns true if a request is available.
    pub(super) fn poll(&mut self, mut is_available: impl FnMut() -> bool) -> bool {
        let Some(gap) = self.average_gap else { return false };
        let window = (gap * WINDOW_GAPS).min(self.limit);
        let start = self.last_signal.unwrap_or_else(Instant::now);
        loop {
            if is_available() {
                self.last_signal = None;
                self.learn(start.elapsed().min(self.limit));
                return true;
            }
            if start.elapsed() >= window {
                break;
            }
            std::hint::spin_loop();
        }
        self.fruitless_polls += 1;
        if self.fruitless_polls >= MAX_FRUITLESS_POLLS {
            self.average_gap = None;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    #[test]
    fn polls_only_while_requests_follow_within_the_limit() {
        let mut poller = BusyPoller::new(LIMIT);
        let polls = |poller: &mut BusyPoller| {
            let mut polled = false;
            poller.signalled();
            assert!(!poller.poll(|| {
                polled = true;
                false
            }));
            polled
        };
        assert!(!polls(&mut poller), "no gap is known yet");
        poller.signalled();
        poller.kicked();
        poller.signalled();
        assert!(poller.poll(|| true));
        assert!((0..MAX_FRUITLESS_POLLS).all(|_| polls(&mut poller)));
        assert!(!polls(&mut poller), "too many polls without a request");
        poller.kicked();
        assert!(polls(&mut poller), "a kick came within the limit");
    }

    #[test]
    fn kicks_beyond_the_limit_start_no_polling() {
        let mut poller = BusyPoller::new(Duration::from_nanos(1));
        poller.signalled();
        std::thread::sleep(Duration::from_millis(1));
        poller.kicked();
        assert!(!poller.poll(|| true));
    }
}
