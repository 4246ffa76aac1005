//! Where vCPUs wait while the machine is paused.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    /// Since when.
    closed: Option<Instant>,
    /// How long it has been closed before, in all.
    before: Duration,
    /// vCPUs that wait.
    waiting: usize,
    /// Raised to have those that wait look around.
    call: u64,
}

/// How a vCPU has come through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Passed {
    /// The gate was open.
    Open,
    /// It has waited.
    Waited,
    /// It is to stop.
    Stops,
}

/// Closed while the machine is paused. A vCPU's thread passes it between two KVM_RUN.
#[derive(Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Has the vCPUs wait that come by.
    pub(super) fn close(&self) {
        self.change(|state| {
            state.closed.get_or_insert_with(Instant::now);
        });
    }

    /// Lets all vCPUs go on.
    pub(super) fn open(&self) {
        self.change(|state| {
            let closed = state.closed.take().map(|since| since.elapsed());
            state.before = state.before.saturating_add(closed.unwrap_or_default());
        });
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed_since().is_some()
    }

    pub(super) fn closed_since(&self) -> Option<Instant> {
        self.lock().closed
    }

    /// How long it has been closed, in all, but for the time since it was closed last.
    pub(super) fn closed_before(&self) -> Duration {
        self.lock().before
    }

    /// Has those that wait call their `look`.
    pub(super) fn call(&self) {
        self.change(|state| state.call = state.call.wrapping_add(1));
    }

    /// Waits for `count` vCPUs to wait, for `limit` at most. Returns true if they do.
    pub(super) fn all_wait(&self, count: usize, limit: Duration) -> bool {
        let waiting = self
            .changed
            .wait_timeout_while(self.lock(), limit, |state| state.closed.is_some() && state.waiting < count);
        let (state, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        state.closed.is_some() && state.waiting >= count
    }

    /// Waits while the gate is closed. `look` is called before, and again at each [`Self::call`], without a lock held; where it
    /// returns true the vCPU is to stop.
    pub(super) fn pass(&self, mut look: impl FnMut() -> bool) -> Passed {
        let mut seen = self.lock().call;
        let mut counted = false;
        let stops = loop {
            if look() {
                break true;
            }
            let mut state = self.lock();
            if state.closed.is_none() {
                break false;
            }
            if !counted {
                counted = true;
                state.waiting += 1;
                self.changed.notify_all();
            }
            let waited = self.changed.wait_while(state, |state| state.closed.is_some() && state.call == seen);
            seen = waited.unwrap_or_else(PoisonError::into_inner).call;
        };
        if counted {
            self.lock().waiting -= 1;
        }
        match (stops, counted) {
            (true, _) => Passed::Stops,
            (false, true) => Passed::Waited,
            (false, false) => Passed::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn an_open_gate_is_passed_after_one_look() {
        let (gate, mut looks) = (Gate::default(), 0);
        let passed = gate.pass(|| {
            looks += 1;
            false
        });
        assert_eq!((passed, looks), (Passed::Open, 1));
        assert_eq!(gate.pass(|| true), Passed::Stops);
        assert!(!gate.all_wait(1, Duration::from_millis(1)), "none waits");
    }

    #[test]
    fn those_at_a_closed_gate_look_when_called_and_go_on_when_it_opens() {
        let (gate, looks) = (Gate::default(), AtomicU32::new(0));
        gate.close();
        std::thread::scope(|scope| {
            let vcpus: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        gate.pass(|| {
                            looks.fetch_add(1, Ordering::Relaxed);
                            false
                        })
                    })
                })
                .collect();
            assert!(gate.all_wait(2, LONG));
            assert!(!gate.all_wait(3, Duration::from_millis(1)), "there are two");
            assert_eq!(looks.load(Ordering::Relaxed), 2, "they do nothing by themselves");
            gate.call();
            while looks.load(Ordering::Relaxed) < 4 {
                std::thread::yield_now();
            }
            gate.open();
            assert!(vcpus.into_iter().all(|vcpu| vcpu.join().expect("no panic") == Passed::Waited));
        });
        assert!(!gate.is_closed());
        gate.close();
        assert!(!gate.all_wait(1, Duration::from_millis(1)), "none is left");
    }

    #[test]
    fn one_that_is_to_stop_does_so_at_a_closed_gate() {
        let (gate, stop) = (Gate::default(), AtomicU32::new(0));
        gate.close();
        std::thread::scope(|scope| {
            let vcpu = scope.spawn(|| gate.pass(|| stop.load(Ordering::Acquire) == 1));
            assert!(gate.all_wait(1, LONG));
            stop.store(1, Ordering::Release);
            gate.call();
            assert_eq!(vcpu.join().expect("no panic"), Passed::Stops);
        });
    }
}
