//! The rate limit of the entropy device: a token bucket.

use std::time::{Duration, Instant};

/// A rate in bytes per second. The bytes of one second may be taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes per second, at least 1.
    pub bytes_per_second: u64,
}

/// A bucket of tokens, one for each byte.
pub(super) struct TokenBucket {
    /// Tokens per second, and the most that the bucket holds.
    rate: u64,
    tokens: u64,
    last_refill: Instant,
}

impl TokenBucket {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        let rate = rate.bytes_per_second.max(1);
        Self { rate, tokens: rate, last_refill: now }
    }

    /// Takes up to `wanted` tokens and returns their number.
    ///
    /// # Errors
    /// Returns how long to wait where there are no tokens.
    pub(super) fn take(&mut self, wanted: u64, now: Instant) -> Result<u64, Duration> {
        let passed = now.saturating_duration_since(self.last_refill).as_nanos();
        let earned = u64::try_from(passed.saturating_mul(u128::from(self.rate)) / 1_000_000_000).unwrap_or(u64::MAX);
        if earned > 0 {
            self.tokens = self.tokens.saturating_add(earned).min(self.rate);
            self.last_refill = now;
        }
        if self.tokens == 0 && wanted > 0 {
            // Until there are the tokens of a tenth of a second, so that the worker does not wake for each byte.
            let wait_for = (self.rate / 10).max(1);
            return Err(
                Duration::from_nanos(wait_for.saturating_mul(1_000_000_000) / self.rate).max(Duration::from_millis(1))
            );
        }
        let given = wanted.min(self.tokens);
        self.tokens -= given;
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_one_second_saved(
            rate in 1_u64..1_000_000,
            steps in proptest::collection::vec((0_u64..2_000, 0_u64..5_000), 1..50),
        ) {
            let start = Instant::now();
            let mut bucket = TokenBucket::new(Rate { bytes_per_second: rate }, start);
            let (mut now, mut given) = (start, 0);
            for (ms, want) in steps {
                now += Duration::from_millis(ms);
                match bucket.take(want, now) {
                    Ok(count) => given += count,
                    Err(wait) => {
                        now += wait;
                        prop_assert!(bucket.take(1, now).is_ok());
                        given += 1;
                    }
                }
                let seconds = now.duration_since(start).as_secs_f64();
                prop_assert!(given as f64 <= rate as f64 * (1.0 + seconds) + 1.0);
            }
        }
    }
}
