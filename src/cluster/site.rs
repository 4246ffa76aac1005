//! Which exits are worth following: each site, an instruction that exits, is judged by what following it has saved lately.

/// Sites kept; a power of two. Two sites in one place displace each other.
const SITES: usize = 256;
/// The best and the worst score of a site.
const BEST: i8 = 8;
const WORST: i8 = -4;
/// The longest pause of a site, in exits: 1 << 10.
const MOST_PAUSES: u8 = 10;
/// The instructions that may be interpreted for each exit that is saved: at about 10 ns each, a quarter of what an exit to user space
/// costs where it costs least.
const WORTH: u64 = 100;

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
    /// Every exit is followed, for tests.
    always: bool,
}

#[allow(clippy::cast_possible_truncation, reason = "the remainder is small")]
fn place(rip: u64) -> usize {
    (rip ^ rip >> 8) as usize % SITES
}

impl Sites {
    pub(super) fn new(always: bool) -> Self {
        Self { sites: vec![Site::default(); SITES].into(), always }
    }

    /// Returns true if an exit at this address is to be followed.
    pub(super) fn is_followed(&mut self, rip: u64) -> bool {
        let site = &mut self.sites[place(rip)];
        if site.rip != rip {
            *site = Site { rip, ..Site::default() };
        }
        if site.pause > 0 && !self.always {
            site.pause -= 1;
            return false;
        }
        true
    }

    /// Judges a site: following it has saved `avoided` exits for `instructions` interpreted.
    pub(super) fn judge(&mut self, rip: u64, avoided: u64, instructions: u64) {
        let site = &mut self.sites[place(rip)];
        if site.rip != rip {
            return;
        }
        if avoided > 0 && instructions / avoided <= WORTH {
            site.score = (site.score + 1).min(BEST);
            site.pauses = 0;
            return;
        }
        site.score -= 1;
        if site.score <= WORST {
            site.pauses = (site.pauses + 1).min(MOST_PAUSES);
            // Tried once more after the pause.
            (site.pause, site.score) = (1 << site.pauses, WORST + 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_without_gain_is_left_and_tried_again() {
        let mut sites = Sites::new(false);
        let mut followed = 0;
        for _ in 0..10_000 {
            if sites.is_followed(0x1000) {
                followed += 1;
                sites.judge(0x1000, 0, 50);
            }
        }
        assert!((5..30).contains(&followed), "{followed}");
        // It gains now: every exit is followed again after the next try.
        let later = (0..5_000).filter(|_| {
            let followed = sites.is_followed(0x1000);
            if followed {
                sites.judge(0x1000, 4, 200);
            }
            followed
        });
        assert!(later.count() > 3_900);
    }

    #[test]
    fn a_site_with_too_little_gain_is_left() {
        let mut sites = Sites::new(false);
        for _ in 0..4 {
            assert!(sites.is_followed(5));
            sites.judge(5, 1, 400);
        }
        assert!(!sites.is_followed(5));
    }

    #[test]
    fn forced_sites_are_always_followed() {
        let mut sites = Sites::new(true);
        for _ in 0..100 {
            assert!(sites.is_followed(5));
            sites.judge(5, 0, 400);
        }
    }
}
