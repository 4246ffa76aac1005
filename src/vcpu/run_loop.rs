//! The run loop: the only place that runs a guest, and the only place that counts.

use crate::cluster::{Clusters, Interrupt, PortExit};
use crate::exit::{EndReason, ExitReason, Handler, Outcome, Route};
use crate::kvm::vcpu::Running;
use crate::kvm::{Exit, KvmError, clock};
use crate::measure::flight_recorder::Detail;
use crate::measure::{Counters, ExitRecord, FlightRecorder, Profiler};
use hwvmm_devices::irq::raised_by_this_thread;

/// Why the run loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest or KVM ended the run.
    End(EndReason),
    /// Another thread ended the run, and kicked this vCPU.
    Asked,
}

/// What the run loop records about exits.
pub struct Records<P> {
    /// The counts by exit reason and by device.
    pub counters: Counters,
    /// The last exits, with their details.
    pub flight_recorder: FlightRecorder,
    /// Follows exits in software; `None` where none is followed.
    pub clusters: Option<Clusters>,
    /// The profiler; [`crate::measure::NoProfile`] where nothing is measured.
    pub profiler: P,
}

impl<P: Profiler> Records<P> {
    /// Counts an exit of a KVM_RUN that has not run the guest.
    fn interrupted(&mut self, rip: Option<u64>, cpl: Option<u8>) {
        // The time of the exit before ends here.
        self.profiler.enter();
        let reason = ExitReason::Interrupted;
        let record = ExitRecord { reason, detail: Detail::of(&Exit::Interrupted), rip, cpl, tsc: clock::tsc() };
        let stamp = self.profiler.stamp();
        self.profiler.record(record, Route::None, stamp);
        self.counters.record(reason, Route::None);
    }
}

/// Runs a vCPU until the run ends. `kicked` is called after each kick; the loop ends if it returns true.
///
/// # Errors
/// Where KVM_RUN fails.
pub fn run<P: Profiler>(
    vcpu: &mut Running<'_>,
    handler: &Handler,
    records: &mut Records<P>,
    mut kicked: impl FnMut(&mut Running<'_>, &Records<P>) -> bool,
) -> Result<Stop, KvmError> {
    loop {
        records.profiler.enter();
        let mut exit = vcpu.run()?;
        let reason = ExitReason::of(&exit);
        let stamp = records.profiler.stamp();
        let raised = raised_by_this_thread();
        let handled = handler.handle(&mut exit);
        let interrupt = if raised_by_this_thread() == raised { Interrupt::None } else { Interrupt::Raised };
        let detail = Detail::of(&exit);
        let port_io = records.clusters.is_some().then(|| PortExit::of(&exit)).flatten();
        let (rip, cpl) = (vcpu.vcpu().synced_rip(), vcpu.vcpu().synced_cpl());
        let record = ExitRecord { reason, detail, rip, cpl, tsc: clock::tsc() };
        records.profiler.record(record, handled.route, stamp);
        records.counters.record(reason, handled.route);
        records.flight_recorder.push(record);
        match handled.outcome {
            Outcome::Continue => {
                if let (Some(clusters), Some(exit)) = (&mut records.clusters, port_io) {
                    let ended = clusters.follow(vcpu, handler, exit, interrupt)?;
                    (0..clusters.take_runs()).for_each(|_| records.interrupted(rip, cpl));
                    if let Some(end) = ended {
                        return Ok(Stop::End(end));
                    }
                }
            }
            Outcome::Kicked => {
                vcpu.clear_kick();
                if kicked(vcpu, records) {
                    return Ok(Stop::Asked);
                }
            }
            Outcome::End(end) => return Ok(Stop::End(end)),
        }
    }
}
