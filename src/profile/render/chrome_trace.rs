//! The Trace Event Format, for chrome://tracing and Perfetto: phases, marks, and exits per millisecond as counters.

use super::error::RenderError;
use crate::escape::escape_json;
use crate::profile::data::{Exits, Profile};
use crate::profile::units::microseconds;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

fn counters(name: &str, exits: &Exits, events: &mut Vec<Value>) {
    let mut steps: BTreeMap<u64, Map<String, Value>> = BTreeMap::new();
    for one in &exits.timeline.counts {
        steps.entry(one.step).or_default().insert(one.key.clone(), one.count.into());
    }
    // A counter keeps its value until the next: after a step with exits comes one without, unless the next follows.
    let quiet: Vec<u64> =
        steps.keys().filter_map(|step| step.checked_add(1)).filter(|next| !steps.contains_key(next)).collect();
    let mut keys: Vec<&String> = exits.timeline.counts.iter().map(|one| &one.key).collect();
    keys.sort();
    keys.dedup();
    let none: Map<String, Value> = keys.iter().map(|key| ((*key).clone(), 0.into())).collect();
    for step in quiet {
        steps.insert(step, none.clone());
    }
    for (step, values) in steps {
        let mut args = none.clone();
        args.extend(values);
        let at = microseconds(step.saturating_mul(exits.timeline.step_ns));
        events.push(json!({"name": name, "ph": "C", "ts": at, "pid": 1, "args": args}));
    }
}

pub(super) fn render(profile: &Profile) -> Result<String, RenderError> {
    let mut events = vec![json!({"name": "process_name", "ph": "M", "pid": 1, "args": {"name": profile.guest.kernel}})];
    // "load" has a clock of its own, before the guest's.
    for phase in profile.phases.iter().filter(|phase| !phase.name.is_before_the_guest()) {
        events.push(json!({
            "name": phase.name, "cat": "phase", "ph": "X", "ts": microseconds(phase.start_ns), "dur": microseconds(phase.length_ns()),
            "pid": 1, "tid": 1,
        }));
    }
    for mark in &profile.marks {
        events.push(json!({"name": mark.name, "cat": "mark", "ph": "i", "s": "p", "ts": microseconds(mark.at_ns), "pid": 1, "tid": 1}));
    }
    if let Some(exits) = &profile.vm_exits {
        counters("VM exits", exits, &mut events);
    }
    counters("userspace exits", &profile.userspace_exits, &mut events);
    let trace = json!({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"end": profile.end}});
    Ok(escape_json(&serde_json::to_string(&trace)?) + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn counters_fall_back_to_zero() {
        let trace: Value = serde_json::from_str(&render(&sample()).expect("a trace")).expect("JSON");
        let events = trace["traceEvents"].as_array().expect("events");
        let counts: Vec<(f64, u64)> = events
            .iter()
            .filter(|event| event["name"] == "VM exits")
            .map(|event| (event["ts"].as_f64().expect("a time"), event["args"]["cpuid"].as_u64().expect("a count")))
            .collect();
        assert_eq!(counts, [(0.0, 100), (1000.0, 0), (7000.0, 200), (8000.0, 0)]);
    }
}
