//! The entropy device (virtio 1.3 §5.4): host randomness for the guest.

mod rate;

use super::worker::watch;
use super::{ActivateError, Activation, DeviceKind, VirtioDevice, Virtqueue, Worker};
use crate::memory::Buffers;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rate::Bucket;
pub use rate::Rate;
use std::time::Instant;
use vmm_sys_util::timerfd::TimerFd;

/// The most bytes given for one request: the driver asks again if it wants more.
const MAX_REQUEST_BYTES: usize = 64 << 10;

/// The device.
pub struct Rng {
    rate: Option<Rate>,
}

impl Rng {
    /// With a `rate`, no more than that is given.
    #[must_use]
    pub fn new(rate: Option<Rate>) -> Self {
        Self { rate }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "rng", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![64]
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let timer = TimerFd::new().map_err(|error| ActivateError::Io("make a timer", error.into()))?;
        let bucket = self.rate.map(|rate| Bucket::new(rate, Instant::now()));
        Ok(vec![Box::new(Filler { queue: activation.queue(0)?, bucket, timer })])
    }
}

/// Answers requests; waits on the timer where the rate is used up.
struct Filler {
    queue: Virtqueue,
    bucket: Option<Bucket>,
    timer: TimerFd,
}

const KICK: u32 = 0;
const TIMER: u32 = 1;

impl Filler {
    fn serve(&mut self) {
        let (bucket, timer) = (&mut self.bucket, &mut self.timer);
        self.queue.serve(|chain| {
            let want = chain.writable.len().min(MAX_REQUEST_BYTES);
            let allowed = match bucket {
                None => want,
                Some(bucket) => match bucket.take(want as u64, Instant::now()) {
                    Ok(count) => usize::try_from(count).unwrap_or(want),
                    Err(wait) => {
                        if let Err(error) = timer.reset(wait, None) {
                            log::error!("rng: {error}");
                        }
                        return None;
                    }
                },
            };
            Some(fill(&mut chain.writable.split_to(allowed)))
        });
    }
}

/// Fills all of `buffers` from getrandom(2); returns how many bytes it gave.
fn fill(buffers: &mut Buffers<'_>) -> u32 {
    let mut data = [0; 4096];
    let mut done = 0;
    while !buffers.is_empty() {
        let part = buffers.len().min(data.len());
        match rustix::rand::getrandom(&mut data[..part], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => done += buffers.write(&data[..count]),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("rng: getrandom: {error}");
                break;
            }
        }
    }
    u32::try_from(done).unwrap_or(u32::MAX)
}

impl MutEventSubscriber for Filler {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == TIMER {
            let _ = self.timer.wait();
        }
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::with_data(self.queue.kick(), KICK, EventSet::IN));
        watch(ops, Events::with_data(&self.timer, TIMER, EventSet::IN));
    }
}
