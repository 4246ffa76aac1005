//! The thread that takes coalesced writes and held output where no exit does.

use crate::console::Watch;
use crate::error::chain;
use crate::exit::{EndReason, Handler, Outcome};
use crate::sandbox::{Sandbox, ThreadRole};
use crate::vcpu::Control;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long writes wait in the kernel, and output in devices, at most. Each look costs the guest some time where it has no
/// processor to spare.
const DRAIN: Duration = Duration::from_millis(100);

/// Takes what waits in the kernel when no exit does.
pub(super) struct Drain {
    thread: std::thread::JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Drain {
    /// `None` where nothing ever waits.
    pub(super) fn start(
        handler: &Arc<Handler>,
        control: &Arc<Control>,
        sandbox: &Arc<Sandbox>,
        watches: &[Watch],
    ) -> io::Result<Option<Self>> {
        if handler.ring.is_none() {
            return Ok(None);
        }
        let watches = watches.to_vec();
        let (handler, control, sandbox) = (Arc::clone(handler), Arc::clone(control), Arc::clone(sandbox));
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let work = move || {
            if let Err(error) = sandbox.enter(ThreadRole::Drain, "drain") {
                return control.end(EndReason::Failed(chain(&error)), None);
            }
            while !stopping.load(Ordering::Acquire) {
                std::thread::park_timeout(DRAIN);
                let began = Instant::now();
                if let Outcome::End(end) = handler.flush() {
                    control.end(end, None);
                }
                watches.iter().for_each(|watch| watch.note_flush(began));
            }
        };
        let thread = std::thread::Builder::new().name("drain".into()).stack_size(128 << 10).spawn(work)?;
        Ok(Some(Self { thread, stop }))
    }

    /// Has it look at once.
    pub(super) fn flush(&self) {
        self.thread.thread().unpark();
    }

    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            log::error!("the thread that takes coalesced writes panicked: this is a bug in hwvmm");
        }
    }
}
