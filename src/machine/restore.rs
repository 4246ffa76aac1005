//! A machine that goes on from a snapshot.

use super::error::MachineError;
use super::save::SavedDevices;
use crate::config::{ConsoleTarget, RunConfig};
use crate::kvm::{Vcpu, Vm};
use crate::snapshot::{Description, State, check_features};
use kvm_bindings::kvm_cpuid_entry2;

/// Gives `config` what the machine of a snapshot has: memory, vCPUs, devices.
pub fn configure(config: &mut RunConfig, description: &Description) {
    config.memory.bytes = description.memory_bytes;
    config.cpus = description.vcpus();
    config.watchdog = description.watchdog;
    config.debug_exit = description.debug_exit;
    for (place, target) in (1_u8..).zip(&mut config.serial) {
        match (description.uarts.contains(&place), &target) {
            (true, None) => *target = Some(ConsoleTarget::Null),
            (false, Some(_)) => {
                log::info!("the machine of the snapshot has no UART {place}");
                *target = None;
            }
            _ => {}
        }
    }
}

/// Creates the vCPUs, which have to have the features that the guest was told of.
pub(super) fn vcpus(
    vm: &Vm,
    state: &State,
    supported: &[kvm_cpuid_entry2],
    apic_ids: &[u32],
) -> Result<Vec<Vcpu>, MachineError> {
    if !state.vcpus.iter().map(|vcpu| &vcpu.id).eq(apic_ids) {
        return Err(MachineError::SnapshotIds);
    }
    state.vcpus.iter().try_for_each(|vcpu| check_features(&vcpu.cpuid, supported))?;
    let vcpus = apic_ids.iter().map(|id| vm.create_vcpu(*id)).collect::<Result<Vec<_>, _>>()?;
    vcpus.iter().zip(&state.vcpus).try_for_each(|(vcpu, state)| vcpu.restore(state))?;
    Ok(vcpus)
}

/// Sets the state of KVM's chips and of the devices. To be called when the vCPUs are there, and nothing runs yet.
pub(super) fn devices(vm: &Vm, state: &State, devices: &SavedDevices) -> Result<(), MachineError> {
    vm.restore(&state.vm)?;
    match (&devices.io_apic, &state.io_apic) {
        (Some(io_apic), Some(state)) => io_apic.restore(state)?,
        (None, None) => {}
        _ => return Err(MachineError::SnapshotIoApic),
    }
    if let Some(watchdog) = &devices.watchdog {
        watchdog.restore(state.watchdog);
    }
    devices.post.restore(state.post);
    // Last: their interrupts go to the chips.
    devices.uarts.iter().zip(&state.uarts).try_for_each(|(uart, state)| uart.restore(state))?;
    Ok(())
}
