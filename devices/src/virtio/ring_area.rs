//! Where the areas of a device's queues are in guest memory (virtio 1.3 §2.7), and the check that no two overlap: a device
//! whose used ring lies over an available ring would feed itself requests.

use super::queue::RingAddresses;
use std::fmt;

// Sizes in bytes (virtio 1.3 §2.7.5 to §2.7.8): a descriptor; `flags` and `idx` of a ring; an entry of the available and of
// the used ring; `used_event` and `avail_event`.
const DESCRIPTOR: u64 = 16;
const RING_HEADER: u64 = 4;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;
const EVENT: u64 = 2;

/// An area of a virtqueue (virtio 1.3 §2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueArea {
    /// The descriptor table (virtio 1.3 §2.7.5).
    Descriptor,
    /// The available ring, which the driver writes (virtio 1.3 §2.7.6).
    Driver,
    /// The used ring, which the device writes (virtio 1.3 §2.7.8).
    Device,
}

/// An area of a queue, as a range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingArea {
    /// Index of the queue.
    pub queue: u16,
    /// Which of the queue's areas this is.
    pub area: QueueArea,
    /// First guest physical address.
    pub gpa: u64,
    /// Size of the area in bytes.
    pub bytes: u64,
}

impl fmt::Display for RingArea {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let area = match self.area {
            QueueArea::Descriptor => "descriptor table",
            QueueArea::Driver => "available ring",
            QueueArea::Device => "used ring",
        };
        write!(formatter, "the {area} of queue {} ({} bytes at {:#x})", self.queue, self.bytes, self.gpa)
    }
}

/// Presence of `used_event` and `avail_event` in the rings, which a device accesses with `VIRTIO_F_EVENT_IDX` only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventFields {
    Present,
    Absent,
}

/// Returns the three areas of the queue with index `queue` and `size` descriptors, as far as a device accesses them.
pub(super) fn areas(queue: u16, size: u16, rings: RingAddresses, events: EventFields) -> [RingArea; 3] {
    let size = u64::from(size);
    let event = if events == EventFields::Present { EVENT } else { 0 };
    let area = |area, gpa, bytes| RingArea { queue, area, gpa, bytes };
    [
        area(QueueArea::Descriptor, rings.descriptor_table, size * DESCRIPTOR),
        area(QueueArea::Driver, rings.available_ring, RING_HEADER + size * AVAILABLE_ENTRY + event),
        area(QueueArea::Device, rings.used_ring, RING_HEADER + size * USED_ENTRY + event),
    ]
}

/// Returns two areas that overlap, or `None` where no two do. Sorts `areas`.
pub(super) fn overlap(areas: &mut [RingArea]) -> Option<(RingArea, RingArea)> {
    areas.sort_unstable_by_key(|area| area.gpa);
    areas
        .iter()
        .zip(areas.get(1..)?)
        .find(|(first, second)| second.gpa - first.gpa < first.bytes)
        .map(|(a, b)| (*a, *b))
}
