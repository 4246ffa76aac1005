//! Devices of a PC as far as a Linux guest needs them, and small paravirtual devices on ports.

mod command_port;
mod debug_exit;
mod fw_cfg;
mod i8042;
mod ioapic;
mod post;
mod power;
mod pvpanic;
mod serial;
mod testdev;
mod watchdog;

pub use command_port::CommandPort;
pub use debug_exit::DebugExit;
pub use fw_cfg::FwCfg;
pub use i8042::{I8042, I8042Port};
pub use ioapic::{IoApic, IoApicState, IoApicStateError};
pub use post::{MarkPort, PostPort};
pub use power::Power;
pub use pvpanic::PvPanic;
pub use serial::{SerialPort, UartState, UartStateError};
pub use testdev::{LineLevel, TestHost, add_test_device};
pub use watchdog::Watchdog;
