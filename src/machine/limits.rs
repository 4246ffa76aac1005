//! What ends a run without an exit: watchdog, halt, a console's line, a guest that prints nothing.

use super::drain::Drain;
use super::halt::HaltDetector;
use super::paused::VirtioDevices;
use super::saving::Save;
use super::working_set::Recorder;
use crate::console::{Announcements, Look, Watch};
use crate::event_loop::{EventLoop, EventLoopError};
use crate::exit::EndReason;
use crate::vcpu::{Control, Threads};
use hwvmm_devices::legacy::Watchdog;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the run is looked at for a guest that will never wake.
const TICK: Duration = Duration::from_secs(1);

/// Ends of a run that no exit shows.
pub(super) struct Limits<'a> {
    /// Where ends are reported.
    pub control: &'a Control,
    /// The guest's watchdog.
    pub watchdog: Option<Arc<Watchdog>>,
    /// Looked at once a tick.
    pub halt_detector: HaltDetector,
    /// The lines of the consoles.
    pub watches: &'a [Watch],
    /// Devices that go on after a pause.
    pub virtio: &'a VirtioDevices,
    /// What writes held output.
    pub drain: Option<&'a Drain>,
    /// The time for which the machine was paused that the watchdog has been given.
    pub paused: Duration,
    /// When a console must have had output.
    pub output: OutputLimit<'a>,
    /// Saves the machine when its moment has come (`--snapshot-at`).
    pub save: Save,
    /// What writes down the pages that the guest uses.
    pub recorder: Option<Recorder<'a>>,
}

/// When a console must have had output at the latest.
pub(super) struct OutputLimit<'a> {
    /// Know if a console has had output.
    pub announcements: &'a Announcements,
    /// None where a guest may print nothing.
    pub deadline: Option<Instant>,
    /// The time from the start to the deadline, for the message.
    pub timeout: Duration,
}

impl OutputLimit<'_> {
    /// Returns when to look again, or the end of a guest that has printed nothing in time.
    fn look(&mut self, now: Instant) -> Result<Option<Instant>, EndReason> {
        match self.deadline {
            Some(at) if at <= now => {
                self.deadline = None;
                if self.announcements.has_output() { Ok(None) } else { Err(EndReason::NotBooted(self.timeout)) }
            }
            deadline => Ok(deadline),
        }
    }
}

impl Limits<'_> {
    /// Looks for lines that do not go on. Returns when to look again.
    fn look_at_consoles(&self, now: Instant) -> Option<Instant> {
        let looks = self.watches.iter().map(|watch| watch.look(now));
        let again = looks.filter_map(|look| match look {
            Look::NoLine => None,
            Look::Again(at) => Some(at),
            Look::Flush(at) => {
                self.drain.into_iter().for_each(Drain::flush);
                Some(at)
            }
            Look::End(end) => {
                self.control.line_seen(end);
                None
            }
        });
        again.min()
    }

    /// When the watchdog expires; it does not run while the machine is paused. Pauses that are over are added to its time, also one that
    /// began and ended since it was looked at last, as that of a snapshot does.
    fn watchdog_deadline(&mut self) -> Option<Instant> {
        let watchdog = self.watchdog.as_ref()?;
        if self.control.is_paused() {
            return None;
        }
        let paused = self.control.paused_before();
        watchdog.extend(paused.saturating_sub(std::mem::replace(&mut self.paused, paused)));
        watchdog.deadline()
    }

    /// Handles events until the run has ended.
    pub(super) fn wait(&mut self, event_loop: &mut EventLoop, threads: &Threads) -> Result<(), EventLoopError> {
        let mut next_tick = Instant::now() + TICK;
        while self.control.ended().is_none() {
            if !self.control.is_paused() {
                self.virtio.resume_paused();
            }
            if self.control.take_snapshot_request() {
                self.control.end((self.save)(), None);
                continue;
            }
            let now = Instant::now();
            let dog = self.watchdog_deadline();
            if dog.is_some_and(|at| at <= now) {
                self.control.end(EndReason::Watchdog, None);
            } else if next_tick <= now {
                next_tick = now + TICK;
                if !self.control.is_paused() && self.halt_detector.tick(threads) {
                    self.control.end(EndReason::Halted, None);
                }
            }
            let output = self.output.look(now).unwrap_or_else(|end| {
                self.control.end(end, None);
                None
            });
            let console = self.look_at_consoles(now);
            let record = self.recorder.as_mut().and_then(|recorder| recorder.look(now));
            let next = dog.into_iter().chain(console).chain(output).chain(record).fold(next_tick, Instant::min);
            event_loop.wait(next.saturating_duration_since(now))?;
        }
        Ok(())
    }
}
