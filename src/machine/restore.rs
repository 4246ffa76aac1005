//! A machine that goes on from a snapshot.

use super::error::MachineError;
use super::save::SavedDevices;
use crate::config::{ConsoleTarget, RunConfig};
use crate::kvm::state::VcpuState;
use crate::kvm::{Vcpu, Vm};
use crate::snapshot::{Description, State, check_features};
use kvm_bindings::kvm_cpuid_entry2;
use std::time::{Duration, SystemTime};

/// How far the counters of a machine's vCPUs are apart, at most, to be one counter that was read at different times.
const TOGETHER: Duration = Duration::from_secs(1);

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

/// The time that has passed for the guest: 0 where the host's clock was set back.
pub(super) fn passed(state: &State) -> Duration {
    SystemTime::now().duration_since(state.saved_at).unwrap_or_default()
}

/// The time-stamp counters after `passed`. vCPUs were not read at the same moment, so counters that are close to each other get
/// the same value: KVM then has them count together.
fn counters(vcpus: &[VcpuState], passed: Duration) -> Vec<Option<u64>> {
    let ticks = |vcpu: &VcpuState, time: Duration| {
        let ticks = time.as_nanos().saturating_mul(u128::from(vcpu.tsc_khz.unwrap_or(0))) / 1_000_000;
        u64::try_from(ticks).unwrap_or(u64::MAX)
    };
    let known = || vcpus.iter().filter_map(VcpuState::tsc);
    let (least, most) = (known().min().unwrap_or(0), known().max().unwrap_or(0));
    let together = vcpus.first().is_some_and(|vcpu| most - least <= ticks(vcpu, TOGETHER));
    let advanced = |vcpu: &VcpuState| {
        let tsc = vcpu.tsc()?;
        Some(if together { most } else { tsc }.wrapping_add(ticks(vcpu, passed)))
    };
    vcpus.iter().map(advanced).collect()
}

/// Creates the vCPUs, which have to have the features that the guest was told of.
pub(super) fn vcpus(
    vm: &Vm,
    state: &State,
    supported: &[kvm_cpuid_entry2],
    apic_ids: &[u32],
    passed: Duration,
) -> Result<Vec<Vcpu>, MachineError> {
    if !state.vcpus.iter().map(|vcpu| &vcpu.id).eq(apic_ids) {
        return Err(MachineError::SnapshotIds);
    }
    state.vcpus.iter().try_for_each(|vcpu| check_features(&vcpu.cpuid, supported))?;
    let vcpus = apic_ids.iter().map(|id| vm.create_vcpu(*id)).collect::<Result<Vec<_>, _>>()?;
    for ((vcpu, state), tsc) in vcpus.iter().zip(&state.vcpus).zip(counters(&state.vcpus, passed)) {
        vcpu.restore(state, tsc)?;
    }
    Ok(vcpus)
}

/// Sets the state of KVM's chips and of the devices. To be called when the vCPUs are there, and nothing runs yet.
pub(super) fn devices(vm: &Vm, state: &State, devices: &SavedDevices, passed: Duration) -> Result<(), MachineError> {
    vm.restore(&state.vm, passed)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::state::Msr;
    use hwvmm_arch::msr::IA32_TSC;

    fn vcpu(tsc: Option<u64>) -> VcpuState {
        let mut state = VcpuState::empty(0);
        state.tsc_khz = Some(2_000_000);
        state.msrs = tsc.map(|value| Msr { index: IA32_TSC, value }).into_iter().collect();
        state
    }

    #[test]
    fn counters_go_on_and_stay_together() {
        let second = Duration::from_secs(1);
        let of = |values: [Option<u64>; 2]| counters(&values.map(vcpu), second);
        assert_eq!(of([Some(1000), Some(5000)]), [Some(2_000_005_000); 2]);
        let apart = 3_000_000_000;
        assert_eq!(of([Some(1000), Some(1000 + apart)]), [Some(2_000_001_000), Some(2_000_001_000 + apart)]);
        assert_eq!(of([Some(7), None]), [Some(2_000_000_007), None]);
        assert_eq!(counters(&[vcpu(Some(7))], Duration::ZERO), [Some(7)]);
    }
}
