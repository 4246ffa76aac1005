//! Metrics in Prometheus' text format (version 0.0.4), for a node exporter's textfile collector or a push gateway.

use super::rows::rows;
use crate::escape::plain;
use crate::profile::data::{Exits, Profile};
use crate::profile::units::seconds;
use std::fmt::Write as _;

/// Rows by device and function; what is beyond is in the totals.
const ROWS: usize = 100;

/// Escapes the value of a label. Of the active characters, the format has an escape for the line feed only.
fn label(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(plain).collect();
    lines.join("\n").replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn metric(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn each(profile: &Profile) -> impl Iterator<Item = (&'static str, &Exits)> {
    let vm = profile.vm_exits.iter().map(|exits| ("vm", exits));
    vm.chain([("userspace", &profile.userspace_exits)])
}

pub(super) fn render(profile: &Profile) -> String {
    let mut out = String::new();
    metric(&mut out, "hwvmm_exits_total", "counter", "Exits by sort and reason.");
    for (sort, exits) in each(profile) {
        for (reason, count) in &exits.by_reason {
            let _ = writeln!(out, "hwvmm_exits_total{{sort=\"{sort}\",reason=\"{}\"}} {count}", label(reason));
        }
    }
    metric(&mut out, "hwvmm_exit_causes_total", "counter", "The most frequent causes of exits.");
    for (sort, exits) in each(profile) {
        for row in rows(&exits.causes).iter().take(ROWS) {
            let (reason, what, function) = (label(&row.reason), label(&row.what), label(&row.function));
            let _ = writeln!(
                out,
                "hwvmm_exit_causes_total{{sort=\"{sort}\",reason=\"{reason}\",what=\"{what}\",function=\"{function}\"}} {}",
                row.count
            );
        }
    }
    metric(
        &mut out,
        "hwvmm_outside_guest_seconds_total",
        "counter",
        "Time outside of the guest, without sleep in HLT.",
    );
    for (sort, exits) in each(profile) {
        let _ = writeln!(out, "hwvmm_outside_guest_seconds_total{{sort=\"{sort}\"}} {}", seconds(exits.busy_ns()));
    }
    if let Some(exits) = &profile.vm_exits {
        metric(&mut out, "hwvmm_lost_records_total", "counter", "Records of VM exits that were lost.");
        let _ = writeln!(out, "hwvmm_lost_records_total {}", exits.lost);
    }
    metric(&mut out, "hwvmm_phase_seconds", "gauge", "How long each phase took.");
    for phase in &profile.phases {
        let length = seconds(phase.length_ns());
        let _ = writeln!(out, "hwvmm_phase_seconds{{phase=\"{}\"}} {length}", phase.name);
    }
    metric(&mut out, "hwvmm_run_seconds", "gauge", "How long the guest ran.");
    let _ = writeln!(out, "hwvmm_run_seconds {}", seconds(profile.ran_ns));
    metric(&mut out, "hwvmm_exit_status", "gauge", "The exit status of the run.");
    let _ = writeln!(out, "hwvmm_exit_status {}", profile.status);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn every_line_is_a_comment_or_a_sample() {
        let mut profile = sample();
        profile.userspace_exits.causes[0].function = Some("a\"b\\c\nd\x1b[2J".into());
        let text = render(&profile);
        assert!(text.contains("hwvmm_exits_total{sort=\"vm\",reason=\"CPUID\"} 300"), "{text}");
        assert!(text.contains("function=\"a\\\"b\\\\c\\nd?[2J\"} 300") && !text.contains('\x1b'), "{text}");
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').expect("name and value");
            assert!(name.starts_with("hwvmm_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
