//! The virtio devices of a machine: started, paused for a snapshot, stopped.

use super::error::MachineError;
use crate::measure::record::VirtioQueue;
use crate::snapshot::State;
use hwvmm_devices::pci::{ConfigPorts, PciRoot, PciState};
use hwvmm_devices::virtio::{PauseError, QueueCounts, ThreadStart, TransportError, VirtioState, VirtioTransport};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long all devices together may take to complete their requests and to flush their disks.
const PAUSE: Duration = Duration::from_secs(10);

/// A virtio device of a machine.
pub(super) struct VirtioHandle {
    /// Name, such as `disk0`.
    name: String,
    /// Counts of its queues, by index.
    counts: Vec<Arc<QueueCounts>>,
    transport: Arc<dyn VirtioTransport>,
}

impl VirtioHandle {
    pub(super) fn new(name: String, transport: Arc<dyn VirtioTransport>) -> Self {
        Self { name, counts: transport.counts(), transport }
    }

    /// Returns the counts of the queues so far.
    fn queues(&self) -> impl Iterator<Item = VirtioQueue> {
        self.counts.iter().enumerate().map(|(queue, counts)| VirtioQueue {
            device: self.name.clone(),
            queue,
            kicks: counts.kicks.load(Ordering::Relaxed),
            interrupts: counts.interrupts.load(Ordering::Relaxed),
            requests: counts.requests.load(Ordering::Relaxed),
        })
    }
}

/// The PCI bus, which has its ports without devices, too.
pub(super) struct PciBus {
    pub(super) ports: Arc<ConfigPorts>,
    /// The bus with the devices.
    pub(super) root: Arc<PciRoot>,
}

impl PciBus {
    fn save(&self) -> PciState {
        let bridges = [self.ports.root().save_bridge(), self.root.save_bridge()];
        PciState { address: self.ports.address(), bridges }
    }

    /// Returns false where the state is none of a PCI bus.
    fn restore(&self, state: &PciState) -> bool {
        self.ports.set_address(state.address);
        let [by_ports, with_devices] = &state.bridges;
        self.ports.root().restore_bridge(by_ports) && self.root.restore_bridge(with_devices)
    }
}

/// The virtio devices of a machine, in the order of their places.
pub(super) struct VirtioDevices {
    handles: Vec<VirtioHandle>,
    bus: PciBus,
    /// Devices may be paused: they are to go on with the vCPUs, or once the host has answered their old workers.
    paused: AtomicBool,
}

impl VirtioDevices {
    pub(super) fn new(handles: Vec<VirtioHandle>, bus: PciBus) -> Self {
        Self { handles, bus, paused: AtomicBool::new(false) }
    }

    /// Starts the threads of the devices, which call `start` first, and has devices go on whose state was restored. The vCPUs must not
    /// have started.
    ///
    /// # Errors
    /// Where a thread cannot be started.
    pub(super) fn start(&self, start: &ThreadStart) -> Result<(), TransportError> {
        self.handles.iter().try_for_each(|device| device.transport.start_threads(start))?;
        self.resume();
        Ok(())
    }

    /// Pauses all devices, also where an error is returned, until [`Self::resume_paused`] is called. The vCPUs must wait.
    ///
    /// # Errors
    /// Where a device does not complete its requests in time, or its disk cannot be flushed.
    pub(super) fn pause(&self) -> Result<PausedDevices<'_>, PauseError> {
        let deadline = Instant::now() + PAUSE;
        self.paused.store(true, Ordering::Relaxed);
        self.handles.iter().try_for_each(|device| device.transport.pause(deadline))?;
        Ok(PausedDevices(self))
    }

    /// Sets the state of a snapshot. The devices are paused then, until they are started.
    ///
    /// # Errors
    /// Where the state is none that they can have.
    pub(super) fn restore(&self, state: &State) -> Result<(), MachineError> {
        for (device, state) in self.handles.iter().zip(&state.virtio) {
            device.transport.restore(state)?;
        }
        // After the devices, whose registers are in the pages of the bus.
        if self.bus.restore(&state.pci) { Ok(()) } else { Err(MachineError::SnapshotPci) }
    }

    fn resume(&self) {
        // All of them: one that is late keeps no other.
        let late = self.handles.iter().filter(|device| !device.transport.resume()).count();
        self.paused.store(late > 0, Ordering::Relaxed);
    }

    /// Has devices go on that were paused. To be called when the vCPUs go on, and now and then, as one may wait for the host.
    pub(super) fn resume_paused(&self) {
        if self.paused.load(Ordering::Relaxed) {
            self.resume();
        }
    }

    /// Ends the threads of all devices, after they have completed the requests that are available, by `deadline`. The vCPUs
    /// must have stopped.
    pub(super) fn stop(&self, deadline: Instant) {
        self.handles.iter().for_each(|device| device.transport.request_stop());
        self.handles.iter().for_each(|device| device.transport.wait_stopped(deadline));
    }

    /// Returns the counts of all queues so far.
    pub(super) fn queues(&self) -> Vec<VirtioQueue> {
        self.handles.iter().flat_map(VirtioHandle::queues).collect()
    }
}

/// The devices, which are paused.
pub(super) struct PausedDevices<'a>(&'a VirtioDevices);

impl PausedDevices<'_> {
    /// Returns the state of each device.
    ///
    /// # Errors
    /// Where a device has none that can be saved.
    pub(super) fn save(&self) -> Result<Vec<VirtioState>, PauseError> {
        self.0.handles.iter().map(|device| device.transport.save()).collect()
    }

    pub(super) fn save_bus(&self) -> PciState {
        self.0.bus.save()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hwvmm_devices::virtio::{TransportOptions, VirtioStateError};
    use hwvmm_devices::{Action, BusDevice};
    use std::sync::atomic::AtomicUsize;

    /// A device that is paused unless the host does not answer, and counts when it is told to go on.
    #[derive(Default)]
    struct Counting {
        is_late: AtomicBool,
        resumed: AtomicUsize,
    }

    impl BusDevice for Counting {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}

        fn write(&self, _offset: u64, _data: &[u8]) -> Action {
            Action::None
        }
    }

    impl VirtioTransport for Counting {
        fn counts(&self) -> Vec<Arc<QueueCounts>> {
            Vec::new()
        }

        fn set_options(&self, _options: TransportOptions) {}

        fn start_threads(&self, _start: &ThreadStart) -> Result<(), TransportError> {
            Ok(())
        }

        fn pause(&self, _deadline: Instant) -> Result<(), PauseError> {
            if self.is_late.load(Ordering::Relaxed) { Err(PauseError::Late { name: "late".into() }) } else { Ok(()) }
        }

        fn save(&self) -> Result<VirtioState, PauseError> {
            Err(PauseError::Unsaved { name: "counting".into() })
        }

        fn restore(&self, _state: &VirtioState) -> Result<(), VirtioStateError> {
            Ok(())
        }

        fn resume(&self) -> bool {
            self.resumed.fetch_add(1, Ordering::Relaxed);
            !self.is_late.load(Ordering::Relaxed)
        }

        fn request_stop(&self) {}

        fn wait_stopped(&self, _deadline: Instant) {}
    }

    #[test]
    fn devices_stay_paused_until_the_machine_goes_on() {
        let device = Arc::new(Counting::default());
        let root = Arc::new(PciRoot::default());
        let bus = PciBus { ports: Arc::new(ConfigPorts::new(Arc::clone(&root))), root };
        let devices = VirtioDevices::new(vec![VirtioHandle::new("counting".into(), Arc::clone(&device) as _)], bus);
        let resumed = || device.resumed.load(Ordering::Relaxed);
        devices.resume_paused();
        assert_eq!(resumed(), 0, "none was paused");
        for snapshots in 1..3 {
            for _ in 0..snapshots {
                assert!(devices.pause().is_ok());
            }
            assert_eq!(resumed(), snapshots - 1, "a snapshot of a paused machine leaves its devices as they are");
            devices.resume_paused();
            devices.resume_paused();
            assert_eq!(resumed(), snapshots);
        }
        device.is_late.store(true, Ordering::Relaxed);
        assert!(devices.pause().is_err());
        assert_eq!(resumed(), 2);
        devices.resume_paused();
        devices.resume_paused();
        assert_eq!(resumed(), 4, "again, until the host has answered");
        device.is_late.store(false, Ordering::Relaxed);
        devices.resume_paused();
        devices.resume_paused();
        assert_eq!(resumed(), 5);
    }
}
