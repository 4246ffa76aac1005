//! Which exits are worth following: each site, an instruction that exits, is judged by what following it has saved lately.

use super::price::Price;

/// Sites kept; a power of two. Two sites in one place displace each other.
const SITES: usize = 256;
/// The best and the worst score of a site.
const BEST: i8 = 8;
const WORST: i8 = -4;
/// The longest pause of a site, in exits: 1 << 10.
const MOST_PAUSES: u8 = 10;
/// The instructions that may be interpreted for each exit that is saved, where their time is not looked at: at about 10 ns each, a
/// quarter of what an exit to user space costs where it costs least.
const WORTH: u64 = 100;

/// Which exits are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// Those at sites where a cluster took less time lately than the exits that it saved.
    ByTime,
    /// Those at sites where a cluster has saved an exit for each 100 instructions or less, whatever an exit costs.
    ByCount,
    /// All that can be, for tests.
    Always,
}

/// What a cluster has saved, and what it took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gain {
    /// The exits avoided.
    pub(super) avoided: u64,
    /// The instructions interpreted.
    pub(super) instructions: u64,
    /// Its time, with that of the devices, in ticks of the TSC.
    pub(super) ticks: u64,
}

#[derive(Clone, Copy, Default)]
struct Site {
    rip: u64,
    score: i8,
    /// Exits until it is followed again.
    pause: u16,
    /// How often it was given up in a row.
    pauses: u8,
}

/// The sites of a vCPU.
pub(super) struct Sites {
    sites: Box<[Site]>,
    follow: Follow,
}

#[allow(clippy::cast_possible_truncation, reason = "the remainder is small")]
fn place(rip: u64) -> usize {
    (rip ^ rip >> 8) as usize % SITES
}

impl Sites {
    pub(super) fn new(follow: Follow) -> Self {
        Self { sites: vec![Site::default(); SITES].into(), follow }
    }

    /// Returns true if sites without a gain are left for a while.
    pub(super) fn may_be_left(&self) -> bool {
        self.follow != Follow::Always
    }

    /// Returns true if an exit at this address is to be followed.
    pub(super) fn is_followed(&mut self, rip: u64) -> bool {
        let site = &mut self.sites[place(rip)];
        if site.rip != rip {
            *site = Site { rip, ..Site::default() };
        }
        if site.pause > 0 && self.follow != Follow::Always {
            site.pause -= 1;
            return false;
        }
        true
    }

    /// Judges a site by what following it once has saved, where an exit has this price. Returns true if it was worth it.
    pub(super) fn judge(&mut self, rip: u64, gain: Gain, price: &Price) -> bool {
        let Gain { avoided, instructions, ticks } = gain;
        let is_worth = match self.follow {
            Follow::ByTime => avoided > 0 && ticks <= price.of(avoided),
            Follow::ByCount | Follow::Always => avoided > 0 && instructions / avoided <= WORTH,
        };
        let site = &mut self.sites[place(rip)];
        if site.rip == rip {
            site.note(is_worth);
        }
        is_worth
    }
}

impl Site {
    fn note(&mut self, is_worth: bool) {
        if is_worth {
            self.score = (self.score + 1).min(BEST);
            self.pauses = 0;
            return;
        }
        self.score -= 1;
        if self.score <= WORST {
            self.pauses = (self.pauses + 1).min(MOST_PAUSES);
            // Tried once more after the pause.
            (self.pause, self.score) = (1 << self.pauses, WORST + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gain(avoided: u64, instructions: u64, ticks: u64) -> Gain {
        Gain { avoided, instructions, ticks }
    }

    /// An exit has cost 1,000 ticks.
    fn price() -> Price {
        let mut price = Price::new();
        price.goes_on_at(0);
        price.answered(1000);
        price
    }

    #[test]
    fn a_site_without_gain_is_left_and_tried_again() {
        for (follow, loss, gained) in [
            (Follow::ByCount, gain(0, 50, 0), gain(4, 200, 1 << 40)),
            (Follow::ByTime, gain(9, 50, 9001), gain(9, 1 << 40, 9000)),
        ] {
            let (mut sites, price) = (Sites::new(follow), price());
            let mut followed = 0;
            for _ in 0..10_000 {
                if sites.is_followed(0x1000) {
                    followed += 1;
                    sites.judge(0x1000, loss, &price);
                }
            }
            assert!((5..30).contains(&followed), "{follow:?}: {followed}");
            // It gains now: every exit is followed again after the next try.
            let later = (0..5_000).filter(|_| {
                let followed = sites.is_followed(0x1000);
                if followed {
                    sites.judge(0x1000, gained, &price);
                }
                followed
            });
            assert!(later.count() > 3_900, "{follow:?}");
        }
    }

    #[test]
    fn a_site_with_too_little_gain_is_left() {
        for (follow, little) in [(Follow::ByCount, gain(1, 400, 0)), (Follow::ByTime, gain(0, 0, 0))] {
            let mut sites = Sites::new(follow);
            for _ in 0..4 {
                assert!(sites.is_followed(5));
                sites.judge(5, little, &price());
            }
            assert!(!sites.is_followed(5), "{follow:?}");
        }
    }

    #[test]
    fn without_a_price_nothing_gains_by_its_time() {
        let mut sites = Sites::new(Follow::ByTime);
        for _ in 0..4 {
            sites.judge(5, gain(100, 100, 1), &Price::new());
        }
        // `judge` changes no site that `is_followed` has not entered: this one is new.
        assert!(sites.is_followed(5));
        for _ in 0..4 {
            sites.judge(5, gain(100, 100, 1), &Price::new());
        }
        assert!(!sites.is_followed(5));
    }

    #[test]
    fn forced_sites_are_always_followed() {
        let mut sites = Sites::new(Follow::Always);
        for _ in 0..100 {
            assert!(sites.is_followed(5));
            sites.judge(5, gain(0, 400, 0), &price());
        }
    }
}
