//! Tiny guests whose exits are followed in software: they must end as they do without that, and make fewer exits.

use super::*;
use hwvmm::cluster::{Clusters, Follow};
use hwvmm::measure::clusters::ClusterCounts;

struct Followed {
    ran: Ran,
    clusters: ClusterCounts,
}

fn followed(code: &[u8], follow: Follow) -> Result<Followed, String> {
    let system = system()?;
    let machine = machine(&system, code, Mode::Long, false);
    let mut vcpu = vcpu(&system, &machine, Mode::Long);
    let counters = Counters::new(&machine.handler.pio, &machine.handler.mmio);
    let flight_recorder = flight_recorders(1).of_vcpu(0).expect("a recorder");
    let guard = Guard::start();
    let mut running = vcpu.enter();
    let clusters = Clusters::new(&mut running, follow).ok_or("this host's KVM does not copy registers at exits")?;
    let mut records = Records { counters, flight_recorder, clusters: Some(clusters), profiler: NoProfile };
    let stop = hwvmm::vcpu::run(&mut running, &machine.handler, &mut records, |_, _| true).expect("KVM_RUN");
    drop(guard);
    let clusters = records.clusters.as_ref().expect("there").record().counts;
    let last = records.flight_recorder.iter().last();
    match stop {
        Stop::Asked => Err("this host's KVM never comes back from it".into()),
        Stop::End(EndReason::Kvm(why)) => Err(format!("this host's KVM: {why}")),
        Stop::End(end) => {
            Ok(Followed { ran: Ran { end, counters: records.counters, latch: machine.latch, last }, clusters })
        }
    }
}

/// Runs the guest with and without clusters: both end well, the device sees the same accesses, and none is lost between exits and
/// avoided exits.
fn compared(code: &[u8], most_exits: u64) -> Outcome {
    compared_where(code, Follow::Always, most_exits)
}

fn compared_where(code: &[u8], follow: Follow, most_exits: u64) -> Outcome {
    outcome(run(code, Mode::Long).and_then(|plain| {
        assert_eq!(plain.end, EndReason::DebugExit(3), "without clusters");
        let Followed { ran, clusters } = followed(code, follow)?;
        assert_eq!(ran.end, EndReason::DebugExit(3), "with clusters: {clusters:?}");
        assert_eq!(*ran.latch.items.lock().unwrap(), *plain.latch.items.lock().unwrap());
        assert_eq!(*ran.latch.reads.lock().unwrap(), *plain.latch.reads.lock().unwrap());
        // KVM completes the instruction of an exit by a KVM_RUN that does not run the guest: three times a cluster at most.
        let completions = ran.counters.reason(ExitReason::Interrupted);
        assert!(completions <= 3 * clusters.clusters, "{completions}: {clusters:?}");
        let exits = ran.counters.total() - completions;
        assert_eq!(exits + clusters.avoided_exits, plain.counters.total(), "{clusters:?}");
        assert!(exits <= most_exits, "{exits} exits: {clusters:?}");
        assert!(clusters.clusters > 0 && clusters.ends.iter().sum::<u64>() == clusters.clusters, "{clusters:?}");
        Ok(())
    }))
}

pub(crate) fn a_loop() -> Outcome {
    compared(guests::cluster_loop(), 30)
}

/// Nothing is avoided, and nothing is done twice.
pub(crate) fn accesses_alone() -> Outcome {
    compared(guests::cluster_alone(), 61)
}

pub(crate) fn a_poll_loop() -> Outcome {
    compared(guests::cluster_poll(), 6)
}

pub(crate) fn self_modifying_code() -> Outcome {
    compared(guests::cluster_self_modifying(), 61)
}

pub(crate) fn a_fault_in_the_middle() -> Outcome {
    compared(guests::cluster_fault(), 31)
}

pub(crate) fn locked_instructions() -> Outcome {
    compared(guests::cluster_locked(), 30)
}

/// Nothing is gained for long, so that KVM is no longer asked for the state, and then something is.
pub(crate) fn a_site_that_is_left() -> Outcome {
    compared_where(guests::cluster_left(), Follow::ByCount, 1_600)
}

/// What an exit costs here is not known: any number of them may be avoided. The bound is that of a run without clusters.
pub(crate) fn a_site_that_may_cost_less() -> Outcome {
    compared_where(guests::cluster_left(), Follow::ByTime, 2_301)
}

/// The access behind STI, the one behind that, and what ends the run.
pub(crate) fn the_shadow_of_sti() -> Outcome {
    compared(guests::cluster_sti(), 41)
}
