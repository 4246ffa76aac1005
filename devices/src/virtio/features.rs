//! Feature bits that do not depend on the device type (virtio 1.3 §6), as masks.

/// `VIRTIO_F_INDIRECT_DESC`: the driver may use indirect descriptor tables.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`: each side says at which ring index it wants the next notification.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`: the device complies with virtio 1.0 or later. Always offered, and required of the driver.
pub const F_VERSION_1: u64 = 1 << 32;
