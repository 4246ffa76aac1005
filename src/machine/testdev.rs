//! The devices of `--testdev`, for kvm-unit-tests.

use super::error::MachineError;
use crate::config::RunConfig;
use crate::kvm::{PinLevel, Vm};
use crate::memory::GuestRam;
use hwvmm_devices::BusBuilder;
use hwvmm_devices::legacy::{FwCfg, LineLevel, TestHost, add_test_device};
use std::sync::Arc;

struct Host {
    vm: Arc<Vm>,
    ram: GuestRam,
}

impl TestHost for Host {
    fn set_line(&self, gsi: u32, level: LineLevel) {
        let pin = match level {
            LineLevel::Low => PinLevel::Low,
            LineLevel::High => PinLevel::High,
        };
        if let Err(error) = self.vm.set_irq_line(gsi, pin) {
            log::debug!("test device: line {gsi}: {error}: {}", error.source);
        }
    }

    fn flush_page(&self, gpa: u64) {
        if let Err(error) = self.ram.flush_page(gpa) {
            log::debug!("test device: the page at {gpa:#x} is not flushed: {error}");
        }
    }
}

/// Adds the devices that kvm-unit-tests want, and sets the interrupt controllers as a PC's firmware leaves them: the
/// tests program only their masks.
pub(super) fn add(
    config: &RunConfig,
    vm: &Arc<Vm>,
    ram: &GuestRam,
    pio: &mut BusBuilder,
    mmio: &mut BusBuilder,
) -> Result<(), MachineError> {
    vm.set_pic_vectors(PIC_VECTORS)?;
    let host: Arc<dyn TestHost> = Arc::new(Host { vm: Arc::clone(vm), ram: ram.clone() });
    add_test_device(pio, mmio, &host)?;
    let fw_cfg = FwCfg::new(config.cpus.count(), config.memory.bytes);
    pio.insert(FwCfg::BASE.into(), FwCfg::LEN, "fw_cfg", Arc::new(fw_cfg))?;
    Ok(())
}

/// The first vector of each PIC (IRQ 0 to 7 and 8 to 15), as a PC's firmware sets it.
const PIC_VECTORS: [u8; 2] = [0x08, 0x70];
