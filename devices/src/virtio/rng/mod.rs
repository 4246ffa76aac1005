//! The entropy device (virtio 1.3 §5.4), with random bytes of the host.

mod rate;

pub use rate::Rate;

use crate::memory::Buffers;
use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::queue::Virtqueue;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::worker::{Worker, watch};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rate::TokenBucket;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::timerfd::TimerFd;

/// The most bytes written for one request; the driver makes another request if it needs more.
const MAX_REQUEST_BYTES: usize = 64 << 10;

/// The virtio entropy device (virtio 1.3 §5.4), with an optional limit on its rate.
pub struct Rng {
    rate: Option<Rate>,
    /// Expires when the rate allows more bytes.
    timer: SharedTimer,
}

type SharedTimer = Arc<Mutex<TimerFd>>;

impl Rng {
    /// Makes a device that gives the guest at most `rate`, or any number of bytes without one.
    ///
    /// # Errors
    /// Returns the error of timerfd_create(2).
    pub fn new(rate: Option<Rate>) -> io::Result<Self> {
        Ok(Self { rate, timer: Arc::new(Mutex::new(TimerFd::new()?)) })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "rng", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(Some(DeviceState::Rng))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        if *state == DeviceState::Rng { Ok(()) } else { Err(DeviceFault::Other) }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let bucket = self.rate.map(|rate| TokenBucket::new(rate, Instant::now()));
        Ok(vec![Box::new(Filler { queue: activation.take_queue(0)?, bucket, timer: Arc::clone(&self.timer) })])
    }
}

/// The worker: fills requests, and waits for the timer where the rate is exceeded.
struct Filler {
    queue: Virtqueue,
    bucket: Option<TokenBucket>,
    timer: SharedTimer,
}

// Data of the events.
const KICK: u32 = 0;
const TIMER: u32 = 1;

impl Filler {
    fn serve(&mut self) {
        let (bucket, timer) = (&mut self.bucket, &self.timer);
        self.queue.serve(|chain| {
            let wanted = chain.writable.len().min(MAX_REQUEST_BYTES);
            let allowed = match bucket {
                None => wanted,
                Some(bucket) => match bucket.take(wanted as u64, Instant::now()) {
                    Ok(count) => usize::try_from(count).unwrap_or(wanted),
                    Err(wait) => {
                        if let Err(error) = lock(timer).reset(wait, None) {
                            log::error!("rng: cannot set the timer of the rate limit: {error}");
                        }
                        return None;
                    }
                },
            };
            Some(fill(&mut chain.writable.split_to(allowed)))
        });
    }
}

fn lock(timer: &Mutex<TimerFd>) -> MutexGuard<'_, TimerFd> {
    timer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fills `buffers` from getrandom(2) and returns the number of bytes.
fn fill(buffers: &mut Buffers<'_>) -> u32 {
    let mut data = [0; 4096];
    let mut done = 0;
    while !buffers.is_empty() {
        let part = buffers.len().min(data.len());
        match rustix::rand::getrandom(&mut data[..part], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => done += buffers.write(&data[..count]),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("rng: getrandom failed: {error}");
                break;
            }
        }
    }
    u32::try_from(done).unwrap_or(u32::MAX)
}

impl MutEventSubscriber for Filler {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == TIMER {
            let _ = lock(&self.timer).wait();
        }
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::with_data(self.queue.kick(), KICK, EventSet::IN));
        watch(ops, Events::with_data(&*lock(&self.timer), TIMER, EventSet::IN));
    }
}
