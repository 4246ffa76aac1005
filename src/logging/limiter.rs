//! Limits how often each message is printed. A guest can cause many of them as often as it likes.
//!
//! Each place in the code that logs has a token bucket of its own, and all of them together have one more. What is not
//! printed is counted, and the count is printed once the place has a token again.

use super::packet::{Place, Severity};
use std::collections::HashMap;
use std::time::Duration;

/// Places with a bucket of their own. Any others share one.
const MAX_PLACES: usize = 256;
/// How often to look for counts that can be printed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A burst of messages, then one each interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// The number of messages that may come at once: the size of the token bucket.
    pub(super) burst: u32,
    /// After this time there may be one more.
    pub(super) interval: Duration,
}

/// Errors and warnings of one place.
const PLACE: Rate = Rate { burst: 10, interval: Duration::from_secs(60) };
/// Errors and warnings of all places.
const ALL: Rate = Rate { burst: 100, interval: Duration::from_secs(2) };
/// What another process says as the command does: a few messages, and lines of its sandbox.
const SAY: Rate = Rate { burst: 100, interval: Duration::from_secs(10) };
/// What one place says with -v, -vv.
const VERBOSE_PLACE: Rate = Rate { burst: 500, interval: Duration::from_millis(100) };
/// What all places say with -v, -vv.
const VERBOSE_ALL: Rate = Rate { burst: 2000, interval: Duration::from_millis(20) };

/// A token bucket. The moments given to it are times since one fixed moment.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: Rate,
    tokens: u32,
    /// When the last token came, or when it was full.
    filled: Duration,
}

impl Bucket {
    /// Makes a full bucket: `rate.burst` tokens.
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, tokens: rate.burst, filled: Duration::ZERO }
    }

    /// Returns true if there is a token at the moment `now`.
    fn has_token(&mut self, now: Duration) -> bool {
        let passed = now.saturating_sub(self.filled);
        let more = u32::try_from(passed.as_nanos() / self.rate.interval.as_nanos().max(1)).unwrap_or(u32::MAX);
        if more >= self.rate.burst - self.tokens {
            (self.tokens, self.filled) = (self.rate.burst, self.filled.max(now));
        } else {
            self.tokens += more;
            self.filled += self.rate.interval * more;
        }
        self.tokens > 0
    }

    /// Takes a token. Returns false if there is none at the moment `now`.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        let there = self.has_token(now);
        self.tokens -= u32::from(there);
        there
    }
}

/// What is to be done with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is printed, and `suppressed` like it were not.
    Print { suppressed: u64 },
    /// It is not printed.
    Suppress,
}

/// How many messages of one place were not printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suppressed {
    /// The place in the code that the suppressed messages came from.
    pub(super) place: Place,
    /// How many messages of this place were suppressed.
    pub(super) count: u64,
    /// The last one that was printed, cut; empty where they are of several places.
    pub(super) like: String,
}

#[derive(Debug)]
struct State {
    bucket: Bucket,
    suppressed: Suppressed,
}

impl State {
    fn new(place: Place) -> Self {
        let rate = match place.severity {
            Severity::Error | Severity::Warning => PLACE,
            Severity::Say => SAY,
            Severity::Verbose => VERBOSE_PLACE,
        };
        Self { bucket: Bucket::new(rate), suppressed: Suppressed { place, count: 0, like: String::new() } }
    }
}

/// The limiter of all messages.
#[derive(Debug)]
pub(super) struct Limiter {
    places: HashMap<Place, State>,
    /// Of the places that are too many to have their own.
    others: State,
    all: Bucket,
    verbose: Bucket,
    next_look: Duration,
}

impl Limiter {
    pub(super) fn new() -> Self {
        Self {
            places: HashMap::new(),
            others: State::new(Place { id: 0, severity: Severity::Warning }),
            all: Bucket::new(ALL),
            verbose: Bucket::new(VERBOSE_ALL),
            next_look: Duration::ZERO,
        }
    }

    /// Returns the state of a place, its own or the shared one.
    fn state(&mut self, place: Place) -> &mut State {
        if self.places.len() >= MAX_PLACES && !self.places.contains_key(&place) {
            return &mut self.others;
        }
        self.places.entry(place).or_insert_with(|| State::new(place))
    }

    /// Decides about a message at the moment `now`. `more` messages of its place were suppressed elsewhere.
    pub(super) fn check(&mut self, place: Place, more: u64, now: Duration) -> Verdict {
        let room = self.all_of(place.severity).has_token(now);
        let state = self.state(place);
        let count = &mut state.suppressed.count;
        *count = count.saturating_add(more);
        if room && state.bucket.take(now) {
            let suppressed = std::mem::take(count);
            self.all_of(place.severity).take(now);
            return Verdict::Print { suppressed };
        }
        *count = count.saturating_add(1);
        Verdict::Suppress
    }

    /// Counts messages that were suppressed elsewhere.
    pub(super) fn add(&mut self, place: Place, more: u64, like: &str) {
        let state = self.state(place);
        state.suppressed.count = state.suppressed.count.saturating_add(more);
        self.keep(place, like);
    }

    /// Returns the bucket of all places.
    fn all_of(&mut self, severity: Severity) -> &mut Bucket {
        if severity == Severity::Verbose { &mut self.verbose } else { &mut self.all }
    }

    /// Keeps the beginning of a message that is printed, for the line that says how many like it were not.
    pub(super) fn keep(&mut self, place: Place, text: &str) {
        if self.places.contains_key(&place) {
            self.state(place).suppressed.like = crate::escape::escape(text, LIKE_BYTES);
        }
    }

    /// Returns the counts of places that have a token again at the moment `now`. They are zero after that.
    pub(super) fn due(&mut self, now: Duration) -> Vec<Suppressed> {
        if now < self.next_look {
            return Vec::new();
        }
        self.next_look = now + LOOK_EVERY;
        let (all, verbose) = (&mut self.all, &mut self.verbose);
        let states = self.places.values_mut().chain([&mut self.others]);
        let due = states.filter(|state| state.suppressed.count > 0).filter_map(|state| {
            let all = if state.suppressed.place.severity == Severity::Verbose { &mut *verbose } else { &mut *all };
            (all.has_token(now) && state.bucket.take(now) && all.take(now)).then(|| taken(state))
        });
        due.collect()
    }

    /// Returns all counts that are not zero. They are zero after that.
    pub(super) fn rest(&mut self) -> Vec<Suppressed> {
        let states = self.places.values_mut().chain([&mut self.others]);
        states.filter(|state| state.suppressed.count > 0).map(taken).collect()
    }
}

/// Bytes that are kept of a message.
const LIKE_BYTES: usize = 100;

fn taken(state: &mut State) -> Suppressed {
    let taken = state.suppressed.clone();
    state.suppressed.count = 0;
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(line: u32) -> Place {
        Place { id: line.into(), severity: Severity::Warning }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn printed(limiter: &mut Limiter, place: Place, now: Duration, times: usize) -> usize {
        (0..times).filter(|_| limiter.check(place, 0, now) != Verdict::Suppress).count()
    }

    #[test]
    fn a_burst_is_printed_and_the_rest_is_counted() {
        let mut limiter = Limiter::new();
        assert_eq!(printed(&mut limiter, place(1), seconds(5), 422), 10);
        limiter.keep(place(1), "a BAR\x1b");
        assert_eq!(limiter.due(seconds(64)), []);
        assert_eq!(limiter.check(place(1), 0, seconds(65)), Verdict::Print { suppressed: 412 });
        assert_eq!(limiter.check(place(1), 0, seconds(66)), Verdict::Suppress);
        let rest = Suppressed { place: place(1), count: 1, like: r"a BAR\x1b".into() };
        assert_eq!(limiter.rest(), [rest]);
        assert_eq!(limiter.rest(), []);
    }

    #[test]
    fn counts_of_another_process_are_added() {
        let mut limiter = Limiter::new();
        limiter.add(place(1), 5, "a");
        assert_eq!(limiter.check(place(1), 7, seconds(0)), Verdict::Print { suppressed: 12 });
        limiter.add(place(1), u64::MAX, "a");
        limiter.add(place(1), u64::MAX, "b");
        let rest = Suppressed { place: place(1), count: u64::MAX, like: "b".into() };
        assert_eq!(limiter.rest(), [rest]);
    }

    #[test]
    fn counts_are_due_when_the_bucket_has_a_token_again() {
        let mut limiter = Limiter::new();
        printed(&mut limiter, place(1), seconds(0), 30);
        assert_eq!(limiter.due(seconds(59)), []);
        let due = limiter.due(seconds(61));
        assert_eq!(due.iter().map(|due| due.count).collect::<Vec<_>>(), [20]);
        assert_eq!(limiter.check(place(1), 0, seconds(61)), Verdict::Suppress, "the count took the token");
    }

    #[test]
    fn a_flood_of_one_place_leaves_room_for_others_and_levels() {
        let mut limiter = Limiter::new();
        printed(&mut limiter, place(1), seconds(0), 100_000);
        assert_eq!(limiter.check(place(2), 0, seconds(0)), Verdict::Print { suppressed: 0 });
        let debug = Place { severity: Severity::Verbose, ..place(1) };
        assert_eq!(printed(&mut limiter, debug, seconds(0), 10_000), 500);
        let error = Place { severity: Severity::Error, ..place(1) };
        assert_eq!(printed(&mut limiter, error, seconds(0), 100), 10);
    }

    #[test]
    fn places_beyond_the_table_share_a_bucket() {
        let mut limiter = Limiter::new();
        // Slow enough for the bucket of all places.
        let at = |line: u32| seconds(u64::from(line) * 2);
        let all = u32::try_from(MAX_PLACES).expect("small");
        assert!((0..all).all(|line| printed(&mut limiter, place(line), at(line), 1) == 1));
        let many: usize = (all..all + 1000).map(|line| printed(&mut limiter, place(line), at(all), 1)).sum();
        assert_eq!(many, 10);
        assert_eq!(limiter.places.len(), MAX_PLACES);
        assert_eq!(limiter.rest().iter().map(|rest| rest.count).sum::<u64>(), 990);
    }

    proptest! {
        /// Whatever happens when: no more is printed than the rates allow, and each message is printed or counted.
        #[test]
        fn the_rates_hold_and_nothing_is_forgotten(
            steps in proptest::collection::vec((0_u32..400, 0_u64..20_000, 1_usize..50), 0..200)
        ) {
            let mut limiter = Limiter::new();
            let (mut now, mut printed_all, mut counted, mut sent) = (Duration::ZERO, 0_u64, 0, 0);
            let mut by_place: HashMap<u32, u64> = HashMap::new();
            for (line, later, times) in steps {
                now += Duration::from_millis(later);
                for due in limiter.due(now) {
                    counted += due.count;
                    printed_all += 1;
                }
                for _ in 0..times {
                    sent += 1;
                    if let Verdict::Print { suppressed } = limiter.check(place(line), 0, now) {
                        printed_all += 1;
                        counted += suppressed + 1;
                        *by_place.entry(line).or_default() += 1;
                    }
                }
            }
            let allowed = |rate: Rate| u64::from(rate.burst) + now.as_secs() / rate.interval.as_secs();
            prop_assert!(printed_all <= allowed(ALL));
            prop_assert!(by_place.values().all(|count| *count <= allowed(PLACE)));
            counted += limiter.rest().iter().map(|rest| rest.count).sum::<u64>();
            prop_assert_eq!(counted, sent);
        }

        /// A clock that goes back gives no tokens and no panic.
        #[test]
        fn a_bucket_holds_its_rate(times in proptest::collection::vec(0_u64..1_000_000, 0..200)) {
            let rate = Rate { burst: 3, interval: Duration::from_millis(1000) };
            let mut bucket = Bucket::new(rate);
            let last = times.iter().max().copied().unwrap_or(0);
            let taken = times.iter().filter(|at| bucket.take(Duration::from_millis(**at))).count();
            prop_assert!(taken as u64 <= 3 + last / 1000);
        }
    }
}
