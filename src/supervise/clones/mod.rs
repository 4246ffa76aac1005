//! Many runs from one snapshot at once, each a process `hwvmm run` of its own.

mod lines;
mod plan;
mod result;
mod room;
mod running;

pub use plan::{CloneOutput, ClonePlan};
pub use result::CloneResult;
pub use running::clone_arguments;

use room::{CLONE_BYTES, Room};
use running::Running;
use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How often the user's wish to end, and processes that have ended, are looked for.
const LOOK: Duration = Duration::from_millis(20);

/// Clones cannot be run.
#[derive(Debug, Error)]
pub enum CloneError {
    /// The host has no memory for one.
    #[error(
        "the host has {} MiB of memory for guests, and a clone needs {} MiB: end other programs, or raise the limit of the control group",
        .0 >> 20, CLONE_BYTES >> 20
    )]
    Memory(u64),
    /// No process can be started.
    #[error("cannot start a clone")]
    Start(#[source] io::Error),
    /// poll(2) or waitpid(2) failed.
    #[error("cannot wait for the clones")]
    Wait(#[source] io::Error),
}

/// Runs the clones, and waits until they have ended. Returns what is known of each that was started, in order: fewer than were wanted if
/// `interrupted` was set. No process is left when this returns, or when this process ends in another way (PR_SET_PDEATHSIG).
///
/// # Errors
/// [`CloneError`]; those that run are killed.
pub fn run_clones(plan: &ClonePlan<'_>) -> Result<Vec<CloneResult>, CloneError> {
    let room = Room::of_host(plan.at_once.min(plan.count));
    if room.is_none() {
        return Err(CloneError::Memory(room.memory_bytes()));
    }
    let mut clones = Clones { plan, room, next: 0, running: Vec::new(), ended: Vec::new(), is_ending: false };
    while !clones.are_over() {
        clones.start_some()?;
        clones.serve()?;
    }
    let mut results = clones.ended;
    results.sort_by_key(|result| result.clone);
    Ok(results)
}

struct Clones<'a> {
    plan: &'a ClonePlan<'a>,
    room: Room,
    /// The number of the clone that is started next.
    next: u32,
    running: Vec<Running>,
    ended: Vec<CloneResult>,
    /// All were asked to end, and no more are started.
    is_ending: bool,
}

impl Clones<'_> {
    fn are_over(&self) -> bool {
        self.running.is_empty() && (self.is_ending || self.next >= self.plan.count)
    }

    /// Starts those that there is room for, unless the user wants no more.
    fn start_some(&mut self) -> Result<(), CloneError> {
        if !self.is_ending && self.plan.interrupted.load(Ordering::Relaxed) != 0 {
            self.is_ending = true;
            let now = Instant::now();
            self.running.iter_mut().for_each(|running| running.ask_to_end(now));
        }
        while !self.is_ending && self.next < self.plan.count && self.room.has_room(self.running.len()) {
            match Running::start(self.plan, self.next) {
                Ok(running) => self.running.push(running),
                // Those that run will end, and leave their place to others.
                Err(error) if !self.running.is_empty() => {
                    log::info!("no more than {} clones at once: {error}", self.running.len());
                    self.room.is_full_at(self.running.len());
                    return Ok(());
                }
                Err(error) => return Err(CloneError::Start(error)),
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Waits for a moment, and takes what there is.
    fn serve(&mut self) -> Result<(), CloneError> {
        let mut fds: Vec<PollFd<'_>> = self.running.iter().flat_map(Running::interests).collect();
        match poll(&mut fds, Timespec::try_from(LOOK).ok().as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(CloneError::Wait(error.into())),
        }
        // In the order of `interests`.
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
        for running in &mut self.running {
            running.serve(&mut ready, self.plan).map_err(CloneError::Wait)?;
        }
        for mut over in self.running.extract_if(.., |running| running.is_over()) {
            let result = std::mem::take(&mut over.result);
            result.own_kib.into_iter().for_each(|kib| self.room.took(kib, self.plan.most_bytes));
            self.ended.push(result);
        }
        Ok(())
    }
}
