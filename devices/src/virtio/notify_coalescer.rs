//! Whether it pays to wait a moment for more work before one tells the driver about what is done: with many requests in
//! flight it saves a kick and an interrupt each; with one in flight it only delays that one.

use std::time::{Duration, Instant};

/// The longest stretch without a try, in rounds.
const LONGEST_SKIP: u32 = 64;
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_millis(3);
/// Work that comes later than this after the last has nothing to do with it.
const RELATED: Duration = Duration::from_millis(5);
/// Waits shorter than this are spent awake: a sleep takes about as long by itself.
const SHORT: Duration = Duration::from_micros(40);

/// Learns from how fast work comes, and from what waiting brought.
#[derive(Debug)]
pub(super) struct NotifyCoalescer {
    /// Rounds until the next try.
    skip: u32,
    /// Rounds to leave out after the next try that brings nothing.
    backoff: u32,
    /// A wait has paid since the last that did not.
    paid: bool,
    /// How long after the last work the next comes, on average, where it comes soon.
    gap: Duration,
    /// When the driver was last told of something.
    told: Option<Instant>,
}

impl Default for NotifyCoalescer {
    fn default() -> Self {
        Self { skip: 0, backoff: 0, paid: false, gap: Duration::from_micros(100), told: None }
    }
}

impl NotifyCoalescer {
    /// The driver was told.
    pub(super) fn signalled(&mut self) {
        self.told = Some(Instant::now());
    }

    /// The driver kicked.
    pub(super) fn kicked(&mut self) {
        if let Some(gap) = self.told.take().map(|told| told.elapsed()).filter(|gap| *gap < RELATED) {
            self.learn(gap);
        }
    }

    fn learn(&mut self, gap: Duration) {
        self.gap = (self.gap * 7 + gap) / 8;
    }

    /// Waits for `more` to become true, where that has paid lately. Whether it did.
    pub(super) fn wait_for(&mut self, mut more: impl FnMut() -> bool) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        let window = (self.gap * 2).min(LONGEST_WAIT);
        let start = Instant::now();
        while start.elapsed() < window {
            // On a busy processor it is the guest that runs meanwhile, and asks for more.
            if window < SHORT {
                rustix::thread::sched_yield();
            } else {
                std::thread::sleep(window / 4);
            }
            if more() {
                self.paid = true;
                self.learn(start.elapsed());
                return true;
            }
        }
        // Every burst ends with a wait for nothing: only a burst of one speaks against waiting.
        self.backoff = if std::mem::take(&mut self.paid) { 0 } else { (self.backoff * 2).clamp(1, LONGEST_SKIP) };
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
            let mut asked = false;
            assert!(!coalescer.wait_for(|| {
                asked = true;
                false
            }));
            tries += u32::from(asked);
        }
        assert!(tries < 30, "{tries}");
        let mut paid = 0;
        for _ in 0..200 {
            paid += u32::from(coalescer.wait_for(|| true));
        }
        assert!(paid >= 200 - LONGEST_SKIP, "{paid}");
    }
}
