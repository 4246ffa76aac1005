//! Messages on the control queues (virtio 1.3 §5.3.6.2).

/// Bytes of `struct virtio_console_control`.
pub(super) const CONTROL_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says that the device has a use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It can take messages.
    Ready,
    /// A program of the guest has opened the port with this number.
    Opened(u32),
    /// It has closed it.
    Closed(u32),
}

impl FromDriver {
    /// Reads a message. Others than these, and those that the driver cut off, are `None`.
    pub(super) fn parse(bytes: [u8; CONTROL_BYTES]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        let port = u32::from_le_bytes([a, b, c, d]);
        match (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h])) {
            (DEVICE_READY, 1) => Some(Self::Ready),
            (PORT_OPEN, 0) => Some(Self::Closed(port)),
            (PORT_OPEN, _) => Some(Self::Opened(port)),
            _ => None,
        }
    }
}

/// What the device says of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToDriver {
    /// There is such a port.
    Add,
    /// Its name, by which the guest's programs find it.
    Name(&'static str),
    /// The host has a connection for it.
    Open,
    /// That connection is gone.
    Close,
}

impl ToDriver {
    /// The bytes of the message for the port with number `port`.
    pub(super) fn encode(self, port: u32) -> Vec<u8> {
        let (event, value, name) = match self {
            Self::Add => (DEVICE_ADD, 1, ""),
            Self::Name(name) => (PORT_NAME, 1, name),
            Self::Open => (PORT_OPEN, 1_u16, ""),
            Self::Close => (PORT_OPEN, 0, ""),
        };
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}
