//! Pauses of devices, and devices that go on from the state of others.

mod disks;

use super::device::{ActivateError, Activation, DeviceKind, VirtioDevice};
use super::device_thread::DeviceThread;
use super::mock::{Driver, NEEDS_RESET, Used};
use super::queue::Virtqueue;
use super::rng::Rng;
use super::saved::{BusState, DeviceFault, DeviceState, PauseError, SaveFault, StateFault, VirtioState};
use super::worker::{Worker, watch};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(20);

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new(None).expect("a timer"))
}

fn pause(driver: &Driver) -> Result<(), PauseError> {
    driver.device().pause(Instant::now() + LONG)
}

#[test]
fn a_new_device_goes_on_where_the_old_one_was() {
    let mut driver = Driver::running(rng());
    for _ in 0..300 {
        assert_eq!(driver.request(0, &[], &[16]).len(), 16);
    }
    let registers: Vec<u32> = (0..0x100).step_by(4).map(|register| driver.read(register)).collect();
    driver.replace(rng()).expect("restored");
    assert_eq!((0..0x100).step_by(4).map(|register| driver.read(register)).collect::<Vec<_>>(), registers);
    let mut submitted: Vec<u16> = (0..10).map(|_| driver.submit(0, &[], &[16]).head).collect();
    assert_eq!(driver.poll_used(0), None, "it is paused");
    let _ = driver.interrupts();
    assert!(driver.device().resume());
    for _ in 0..10 {
        let Used { head, len } = driver.wait_used(0);
        assert_eq!((head, len), (u32::from(submitted.remove(0)), 16));
    }
    driver.wait_interrupt();
    for _ in 0..300 {
        assert_eq!(driver.request(0, &[], &[16]).len(), 16);
    }
    assert_eq!(driver.used_index(0), 610, "each was used once");
    // The device can be reset, and started again from the beginning.
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, &[], &[16]).len(), 16);
}

/// What was made available without a kick that anybody has seen, and while the device was paused.
#[test]
fn a_kick_during_a_pause_is_not_lost() {
    let mut driver = Driver::running(rng());
    for _ in 0..50 {
        pause(&driver).expect("paused");
        let head = driver.submit(0, &[], &[8]).head;
        assert!(driver.device().resume());
        assert_eq!(driver.wait_used(0), Used { head: u32::from(head), len: 8 });
        assert_eq!(driver.poll_used(0), None);
    }
    assert!(driver.device().resume(), "it was not paused: nothing happens");
}

#[test]
fn a_device_without_a_driver_is_paused_and_restored() {
    let mut driver = Driver::new(rng());
    driver.write(0x70, 1);
    driver.write(0x70, 3);
    driver.write(0x24, 1);
    driver.replace(rng()).expect("restored");
    assert!(driver.device().resume());
    assert_eq!(driver.status(), 3);
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, &[], &[8]).len(), 8);
}

/// The interrupt that tells of it may have been lost with the machine that was saved.
#[test]
fn a_driver_is_told_again_of_a_device_that_needs_a_reset() {
    let mut driver = Driver::running(rng());
    driver.request(0, &[], &[16]);
    driver.set_available_index(0, 5000);
    driver.kick(0);
    driver.wait_needs_reset();
    driver.wait_interrupt();
    driver.replace(rng()).expect("restored");
    assert_eq!(driver.interrupts(), 0);
    assert!(driver.device().resume());
    driver.wait_interrupt();
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    driver.start(u64::MAX);
    assert_eq!(driver.request(0, &[], &[16]).len(), 16);
}

/// Takes chains, and uses them when it is told to, the last one first.
struct Keeper(Arc<AtomicBool>, Arc<Mutex<Vec<u16>>>);

struct KeeperWorker {
    queue: Virtqueue,
    uses: Arc<AtomicBool>,
    taken: Arc<Mutex<Vec<u16>>>,
    kept: Vec<u16>,
}

impl VirtioDevice for Keeper {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "keeper", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(Some(DeviceState::Rng))
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let queue = activation.take_queue(0)?;
        let (uses, taken) = (Arc::clone(&self.0), Arc::clone(&self.1));
        Ok(vec![Box::new(KeeperWorker { queue, uses, taken, kept: Vec::new() })])
    }
}

impl MutEventSubscriber for KeeperWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.queue.take_kicks();
        let memory = self.queue.memory();
        while let Some(chain) = self.queue.pop(&memory) {
            self.kept.push(chain.head);
            self.taken.lock().expect("no panic").push(chain.head);
        }
        while self.uses.load(Ordering::Acquire)
            && let Some(head) = self.kept.pop()
        {
            self.queue.push(head, 0);
        }
        self.queue.notify();
        self.queue.enable_notification();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LONG, "{what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Chains that a device has taken and not used are taken again by its successor, in their order, and used once. Their places in the
/// available ring have other chains' heads by then, as the ring has gone round.
#[test]
fn chains_that_were_taken_and_not_used_are_taken_again() {
    let (uses, taken) = (Arc::new(AtomicBool::new(false)), Arc::default());
    let keeper = || Box::new(Keeper(Arc::clone(&uses), Arc::clone(&taken)));
    let mut driver = Driver::running(keeper());
    let seen = |count| wait("taken", || taken.lock().expect("no panic").len() == count);
    // Heads out of order in the ring.
    for round in 0..5 {
        uses.store(true, Ordering::Release);
        for _ in 0..3 + round {
            driver.request(0, &[], &[4]);
        }
        uses.store(false, Ordering::Release);
        taken.lock().expect("no panic").clear();
        let heads: Vec<u16> = (0..6).map(|_| driver.submit(0, &[], &[4]).head).collect();
        seen(6);
        driver.replace(keeper()).expect("restored");
        assert!(driver.device().resume());
        seen(12);
        assert_eq!(taken.lock().expect("no panic")[6..], heads[..], "in the same order");
        let new: Vec<u16> = (0..2).map(|_| driver.submit(0, &[], &[4]).head).collect();
        seen(14);
        uses.store(true, Ordering::Release);
        driver.kick(0);
        let used: BTreeSet<u32> = (0..8).map(|_| driver.wait_used(0).head).collect();
        assert_eq!(used, heads.iter().chain(&new).map(|head| u32::from(*head)).collect());
        assert_eq!(driver.poll_used(0), None, "none is used twice");
    }
}

/// A device that gives up what it has taken.
struct GivesUp;

struct GivesUpWorker(Virtqueue);

impl Drop for GivesUpWorker {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

impl MutEventSubscriber for GivesUpWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.take_kicks();
        let memory = self.0.memory();
        while self.0.pop(&memory).is_some() {}
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.0.kick(), EventSet::IN));
    }
}

impl VirtioDevice for GivesUp {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "gives-up", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        Ok(vec![Box::new(GivesUpWorker(activation.take_queue(0)?))])
    }
}

/// What the host may still do is not done a second time: not in this machine, and in no other.
#[test]
fn requests_that_were_given_up_are_not_taken_again() {
    let mut driver = Driver::running(Box::new(GivesUp));
    driver.submit(0, &[], &[4]);
    for _ in 0..2 {
        let error = pause(&driver).expect_err("given up");
        assert!(matches!(error, PauseError::Abandoned { .. }), "{error}");
        assert!(driver.device().resume());
        assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
        assert_eq!(driver.poll_used(0), None);
    }
    driver.start(u64::MAX);
    assert_eq!(driver.status() & NEEDS_RESET, 0);
}

/// A worker that does not end, as the host does not answer.
struct Stuck(Arc<AtomicUsize>);

struct StuckWorker(#[allow(dead_code, reason = "dropped with the worker")] Virtqueue, Arc<AtomicUsize>);

impl Drop for StuckWorker {
    fn drop(&mut self) {
        wait("let go", || self.1.load(Ordering::Acquire) > 0);
    }
}

impl MutEventSubscriber for StuckWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.0.serve(|_| Some(0));
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.0.kick(), EventSet::IN));
    }
}

impl VirtioDevice for Stuck {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "stuck", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        Ok(vec![Box::new(StuckWorker(activation.take_queue(0)?, Arc::clone(&self.0)))])
    }
}

#[test]
fn a_device_that_waits_for_the_host_is_not_paused_and_goes_on_later() {
    let let_go = Arc::new(AtomicUsize::new(0));
    let mut driver = Driver::running(Box::new(Stuck(Arc::clone(&let_go))));
    driver.request(0, &[], &[4]);
    let error = driver.device().pause(Instant::now() + Duration::from_millis(50)).expect_err("late");
    assert!(matches!(&error, PauseError::Late { name } if **name == *"mock"), "{error}");
    assert!(!driver.device().resume(), "the old worker is there");
    driver.submit(0, &[], &[4]);
    let_go.store(1, Ordering::Release);
    wait("resumed", || driver.device().resume());
    driver.wait_used(0);
    driver.request(0, &[], &[4]);
    pause(&driver).expect("paused");
    assert!(matches!(driver.device().save(), Err(PauseError::Unsaved { .. })));
    assert!(driver.device().resume());
    driver.request(0, &[], &[4]);
}

/// Resets of a device whose old worker waits for the host, by pauses and by its driver, add up to one: no later worker is told to end by
/// an older order, and none survives a reset.
#[test]
fn late_pauses_leave_no_orders_behind() {
    for pauses in 1..4 {
        let let_go = Arc::new(AtomicUsize::new(0));
        let mut driver = Driver::running(Box::new(Stuck(Arc::clone(&let_go))));
        driver.request(0, &[], &[4]);
        for _ in 0..pauses {
            let error = driver.device().pause(Instant::now() + Duration::from_millis(20)).expect_err("late");
            assert!(matches!(error, PauseError::Late { .. }), "{error}");
            assert!(!driver.device().resume(), "the old worker is there");
        }
        let_go.store(1, Ordering::Release);
        wait("resumed", || driver.device().resume());
        for _ in 0..20 {
            driver.request(0, &[], &[4]);
            pause(&driver).expect("paused");
            assert!(driver.device().resume());
        }
        driver.request(0, &[], &[4]);
        driver.write(0x70, 0);
        wait("reset", || driver.status() == 0);
        driver.start(u64::MAX);
        driver.request(0, &[], &[4]);
        assert_eq!(driver.status() & NEEDS_RESET, 0);
    }
}

fn state_of_rng() -> VirtioState {
    let mut driver = Driver::running(rng());
    (0..3).for_each(|_| drop(driver.request(0, &[], &[4])));
    pause(&driver).expect("paused");
    driver.device().save().expect("a state")
}

#[test]
fn states_that_no_driver_could_set_are_refused() {
    let good = state_of_rng();
    let mut driver = Driver::new(rng());
    let mut refused = |change: &dyn Fn(&mut VirtioState)| {
        let mut state = good.clone();
        change(&mut state);
        let error = driver.replace_with(rng(), &state).expect_err("refused");
        assert_eq!(&*error.name, "mock");
        error.source
    };
    let kind = refused(&|state| state.kind = 2);
    assert!(matches!(kind, StateFault::Kind { found: 2, expected: 4 }), "{kind}");
    for status in [0xff, 0x40, 4, 8, 5] {
        assert!(matches!(refused(&|state| state.status = status), StateFault::Status(_)), "{status}");
    }
    assert!(matches!(refused(&|state| state.driver_features |= 1 << 5), StateFault::Features(0x20)));
    assert!(matches!(refused(&|state| state.driver_features = 0), StateFault::Features(0)));
    assert!(matches!(refused(&|state| state.queues.clear()), StateFault::Queues));
    let mut early = |change: &dyn Fn(&mut VirtioState)| {
        let fault = refused(change);
        assert!(matches!(fault, StateFault::Early(_)), "{fault}");
    };
    early(&|state| (state.status, state.driver_features) = (0, 1));
    early(&|state| state.status = 3);
    early(&|state| state.status = 11);
    early(&|state| {
        (state.status, state.queues[0].next_available, state.queues[0].next_used) = (3, 0, 0);
        state.queues[0].ready = false;
    });
    early(&|state| state.queues[0].ready = false);
    for size in [0, 3, 128, 0x8000, u16::MAX] {
        assert!(matches!(refused(&|state| state.queues[0].size = size), StateFault::QueueSize { index: 0, .. }));
    }
    let mut rings = |change: &dyn Fn(&mut super::RingAddresses)| refused(&|state| change(&mut state.queues[0].rings));
    assert!(matches!(rings(&|rings| rings.descriptor_table = 1 << 40), StateFault::Rings(_)));
    assert!(matches!(rings(&|rings| rings.used_ring = u64::MAX - 3), StateFault::Rings(_)));
    assert!(matches!(rings(&|rings| rings.available_ring |= 1), StateFault::Rings(_)));
    let overlap = rings(&|rings| rings.used_ring = rings.available_ring);
    assert!(overlap.to_string().contains("overlap"), "{overlap}");
    assert!(matches!(refused(&|state| state.device = DeviceState::Console), StateFault::Device(DeviceFault::Other)));
    let bus = BusState::Pci {
        config: crate::pci::ConfigSpace::new(
            crate::pci::Identity {
                vendor: 0,
                device: 0,
                revision: 0,
                class: 0,
                subsystem_vendor: 0,
                subsystem_device: 0,
            },
            None,
        )
        .save(),
        isr_status: 0,
        config_vector: 0,
        queue_vectors: Vec::new(),
        msix: crate::pci::Msix::new(Vec::new(), Arc::new(NoRoutes)).expect("a table").save(),
    };
    assert!(matches!(refused(&|state| state.bus = bus.clone()), StateFault::Bus));
    driver.replace_with(rng(), &good).expect("the good one");
}

struct NoRoutes;

impl crate::pci::MsiRouter for NoRoutes {
    fn route(&self, _gsi: u32, _message: crate::pci::MsiMessage) -> Result<(), crate::pci::RouteError> {
        Ok(())
    }

    fn unroute(&self, _gsi: u32) -> Result<(), crate::pci::RouteError> {
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Any indices and addresses: the device is refused, or it runs, and breaks or not; it can be reset then.
    #[test]
    fn no_state_of_a_queue_brings_the_device_down(
        (available, used) in any::<(u16, u16)>(), shift in 0_u32..14, rings in prop::array::uniform3(0_u64..0x110_0000)
    ) {
        let mut state = state_of_rng();
        let queue = &mut state.queues[0];
        (queue.next_available, queue.next_used, queue.size) = (available, used, 1 << shift);
        [queue.rings.descriptor_table, queue.rings.available_ring, queue.rings.used_ring] = rings.map(|gpa| gpa & !15);
        let mut driver = Driver::new(rng());
        if driver.replace_with(rng(), &state).is_ok() {
            prop_assert!(driver.device().resume());
            pause(&driver).expect("paused");
            prop_assert!(driver.device().save().is_ok());
            prop_assert!(driver.device().resume());
        }
        driver.start(u64::MAX);
        prop_assert_eq!(driver.request(0, &[], &[16]).len(), 16);
        prop_assert_eq!(driver.status() & NEEDS_RESET, 0);
    }
}
