//! What a running machine counts, for those who look at it while it runs. The vCPUs show their counters when they are
//! kicked: one exit a vCPU for each look, which is counted as `interrupted`.

use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, Handler};
use crate::kvm::stats::{Kind, Reader};
use crate::measure::Counters;
use crate::vcpu::Inspector;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a vCPU has to answer: one that is busy in a device's model is shown as it was.
const PATIENCE: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_micros(200);

/// Looks at a running machine.
pub struct Live {
    inspector: Inspector,
    handler: Arc<Handler>,
    stats: Vec<Option<Reader>>,
    start: Instant,
}

fn causes(counters: &Counters, handler: &Handler) -> Vec<Value> {
    let mut all = Vec::new();
    let mut add = |bus: &str, address: u64, device: Option<&str>, reads: u64, writes: u64| {
        if reads + writes > 0 {
            all.push(json!({"bus": bus, "address": address, "device": device, "reads": reads, "writes": writes}));
        }
    };
    for (bus, kind, name) in [(&handler.pio, BusKind::Pio, "pio"), (&handler.mmio, BusKind::Mmio, "mmio")] {
        for ((address, device), accesses) in bus.slots().zip(counters.slots(kind)) {
            add(name, address, Some(device), accesses.reads, accesses.writes);
        }
    }
    for (bus, address, accesses) in counters.unmapped() {
        add(if bus == BusKind::Pio { "pio" } else { "mmio" }, address, None, accesses.reads, accesses.writes);
    }
    for (index, accesses) in counters.msrs() {
        add("msr", u64::from(index), None, accesses.reads, accesses.writes);
    }
    all
}

fn reasons(counters: &Counters) -> Map<String, Value> {
    let counted = ExitReason::ALL.iter().map(|reason| (reason.name().to_owned(), counters.reason(*reason)));
    counted.filter(|(_, count)| *count > 0).map(|(name, count)| (name, count.into())).collect()
}

impl Live {
    /// For the machine whose vCPUs `inspector` looks at and whose statistics `stats` reads, by vCPU.
    pub fn new(inspector: Inspector, handler: Arc<Handler>, stats: Vec<Option<Reader>>) -> Self {
        Self { inspector, handler, stats, start: Instant::now() }
    }

    /// All counts so far, by vCPU.
    pub fn exits(&self) -> Value {
        self.inspector.ask();
        let deadline = Instant::now() + PATIENCE;
        while !self.inspector.all_answered() && Instant::now() < deadline {
            std::thread::sleep(STEP);
        }
        let vcpu = |(counters, stats): (Option<Counters>, &Option<Reader>)| {
            let userspace = counters.map(|counters| {
                json!({"total": counters.total(), "by_reason": reasons(&counters), "by_device": causes(&counters, &self.handler)})
            });
            let stats = stats.as_ref().and_then(|reader| reader.read().ok()).unwrap_or_default();
            let counts = stats.into_iter().filter(|stat| stat.kind == Kind::Cumulative && stat.values.len() == 1);
            let kvm: Map<String, Value> = counts.map(|stat| (stat.name, stat.values[0].into())).collect();
            json!({"userspace_exits": userspace, "kvm": kvm})
        };
        let vcpus: Vec<Value> = self.inspector.counters().into_iter().zip(&self.stats).map(vcpu).collect();
        let at_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        json!({"at_ns": at_ns, "vcpus": vcpus})
    }
}
