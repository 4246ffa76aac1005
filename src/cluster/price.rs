//! What an exit costs on this host.

/// The least time of an exit to user space that was seen: from going on with the guest until its next port I/O is answered, in ticks of
/// the TSC. The guest's own instructions are in it, so that what is measured is never less than the exit. The least of many samples has
/// few of them: a driver's loop exits every fifty instructions or so.
pub(super) struct Price {
    least: u64,
    /// When hwvmm last went on with the guest; `None` before.
    since: Option<u64>,
}

impl Price {
    pub(super) fn new() -> Self {
        Self { least: u64::MAX, since: None }
    }

    /// Port I/O has been answered at `now`. What lies between may have been several exits; it is a sample nonetheless, and one that is too long, which the least leaves out.
    pub(super) fn answered(&mut self, now: u64) {
        if let Some(since) = self.since {
            // On a host whose processors' TSCs differ a thread that has moved may see time go back: a large number.
            self.least = self.least.min(now.wrapping_sub(since));
        }
    }

    /// Goes on with the guest at `now`.
    pub(super) fn goes_on_at(&mut self, now: u64) {
        self.since = Some(now);
    }

    /// The ticks of `exits` exits; 0 while there is no sample.
    pub(super) fn of(&self, exits: u64) -> u64 {
        if self.least == u64::MAX { 0 } else { self.least.saturating_mul(exits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_sample_is_the_price() {
        let mut price = Price::new();
        price.answered(1000);
        assert_eq!(price.of(5), 0, "nothing to measure from");
        price.goes_on_at(1000);
        price.answered(1500);
        price.answered(9000);
        assert_eq!(price.of(2), 1000);
        price.answered(1400);
        price.answered(900);
        assert_eq!(price.of(2), 800, "time that went back is no sample");
        assert_eq!(price.of(u64::MAX), u64::MAX);
        price.goes_on_at(3000);
        price.answered(3100);
        assert_eq!(price.of(1), 100);
    }
}
