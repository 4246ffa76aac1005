//! Looking for the next request oneself, for a moment, in place of having the driver kick: a kick is an exit. Where requests
//! follow each other fast, the moment is as long as they take to come; where they do not, there is none.

use std::time::{Duration, Instant};

/// After so many looks that brought nothing one waits for kicks, until those come fast again.
const PATIENCE: u32 = 2;
/// The window is so many times the average gap: requests do not come like clockwork.
const MARGIN: u32 = 4;

/// Learns how soon the next request comes after the driver was told of the last.
#[derive(Debug)]
pub(super) struct Poller {
    /// The longest look.
    limit: Duration,
    /// How soon the next request comes, on average; `None` where it does not within `limit`.
    gap: Option<Duration>,
    in_vain: u32,
    told: Option<Instant>,
}

impl Poller {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, gap: None, in_vain: 0, told: None }
    }

    /// The driver was told of something done.
    pub(super) fn signalled(&mut self) {
        self.told = Some(Instant::now());
    }

    /// The driver kicked.
    pub(super) fn kicked(&mut self) {
        if let Some(gap) = self.told.take().map(|told| told.elapsed()).filter(|gap| *gap <= self.limit) {
            self.learn(gap);
        }
    }

    fn learn(&mut self, gap: Duration) {
        self.gap = Some(self.gap.map_or(gap, |average| (average * 7 + gap) / 8));
        self.in_vain = 0;
    }

    /// Looks for a request with `more`, for as long as it is worth. Whether there is one.
    pub(super) fn look(&mut self, mut more: impl FnMut() -> bool) -> bool {
        let Some(gap) = self.gap else { return false };
        let window = (gap * MARGIN).min(self.limit);
        let start = self.told.unwrap_or_else(Instant::now);
        loop {
            if more() {
                self.told = None;
                self.learn(start.elapsed().min(self.limit));
                return true;
            }
            if start.elapsed() >= window {
                break;
            }
            std::hint::spin_loop();
        }
        self.in_vain += 1;
        if self.in_vain >= PATIENCE {
            self.gap = None;
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    #[test]
    fn looks_only_once_requests_come_fast_and_gives_up_when_they_stop() {
        let mut poller = Poller::new(LIMIT);
        let looks = |poller: &mut Poller| {
            let mut asked = false;
            poller.signalled();
            assert!(!poller.look(|| {
                asked = true;
                false
            }));
            asked
        };
        assert!(!looks(&mut poller), "nothing is known yet");
        poller.signalled();
        poller.kicked();
        poller.signalled();
        assert!(poller.look(|| true));
        assert!((0..PATIENCE).all(|_| looks(&mut poller)));
        assert!(!looks(&mut poller), "in vain often enough");
        poller.kicked();
        assert!(looks(&mut poller), "a kick came soon");
    }

    #[test]
    fn late_kicks_teach_nothing() {
        let mut poller = Poller::new(Duration::from_nanos(1));
        poller.signalled();
        std::thread::sleep(Duration::from_millis(1));
        poller.kicked();
        assert!(!poller.look(|| true));
    }
}
