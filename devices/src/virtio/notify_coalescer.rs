//! Coalescing of used buffer notifications: the device waits a moment for more requests before it notifies the driver. With
//! many requests in flight this saves kicks and interrupts; with a single one it would only delay that one, so the coalescer
//! learns when waiting pays.

use std::time::{Duration, Instant};

/// The most rounds between two tries to wait.
const MAX_SKIP: u32 = 64;
/// The longest time that a used buffer notification is delayed.
pub(super) const MAX_WAIT: Duration = Duration::from_millis(3);
/// The longest gap between a notification and a kick that counts as one burst of requests.
const MAX_GAP: Duration = Duration::from_millis(5);
/// Waits shorter than this yield the processor instead of sleeping, as a sleep takes about this long at least.
const MIN_SLEEP: Duration = Duration::from_micros(40);

/// Learns from the gaps between requests, and from whether earlier waits brought more.
#[derive(Debug)]
pub(super) struct NotifyCoalescer {
    /// Rounds until the next try.
    skip: u32,
    /// Rounds to skip after the next try that brings no request.
    backoff: u32,
    /// A wait has brought a request since the last one that did not.
    paid: bool,
    /// The average time from a notification to the next request, of those below [`MAX_GAP`].
    average_gap: Duration,
    /// When the device last sent a used buffer notification.
    last_signal: Option<Instant>,
}

impl Default for NotifyCoalescer {
    fn default() -> Self {
        Self { skip: 0, backoff: 0, paid: false, average_gap: Duration::from_micros(100), last_signal: None }
    }
}

impl NotifyCoalescer {
    /// Notes that the device sent a used buffer notification.
    pub(super) fn signalled(&mut self) {
        self.last_signal = Some(Instant::now());
    }

    /// Notes that the driver kicked.
    pub(super) fn kicked(&mut self) {
        let gap = self.last_signal.take().map(|signal| signal.elapsed());
        if let Some(gap) = gap.filter(|gap| *gap < MAX_GAP) {
            self.learn(gap);
        }
    }

    fn learn(&mut self, gap: Duration) {
        self.average_gap = (self.average_gap * 7 + gap) / 8;
    }

    /// Waits until `is_available` returns true, for no longer than `limit`, where waiting has paid lately. Returns true if a
    /// request is available.
    pub(super) fn wait(&mut self, limit: Duration, mut is_available: impl FnMut() -> bool) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let window = (self.average_gap * 2).min(limit);
        let start = Instant::now();
        while start.elapsed() < window {
            // On a busy processor the vCPU runs meanwhile and can make requests available.
            if window < MIN_SLEEP {
                rustix::thread::sched_yield();
            } else {
                std::thread::sleep(window / 4);
            }
            if is_available() {
                self.paid = true;
                self.learn(start.elapsed());
                return true;
            }
        }
        // Every burst of requests ends with a wait that brings nothing. Only a burst of one request is a reason to wait less.
        self.backoff = if std::mem::take(&mut self.paid) { 0 } else { (self.backoff * 2).clamp(1, MAX_SKIP) };
        self.skip = self.backoff;
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_that_never_pays_becomes_rare_and_one_that_pays_goes_on() {
        let mut coalescer = NotifyCoalescer::default();
        let mut tries = 0;
        for _ in 0..1000 {
            let mut waited = false;
            assert!(!coalescer.wait(MAX_WAIT, || {
                waited = true;
                false
            }));
            tries += u32::from(waited);
        }
        assert!(tries < 30, "{tries}");
        let mut paid = 0;
        for _ in 0..200 {
            paid += u32::from(coalescer.wait(MAX_WAIT, || true));
        }
        assert!(paid >= 200 - MAX_SKIP, "{paid}");
    }
}
