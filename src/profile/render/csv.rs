//! One line a cause (RFC 4180).

use crate::escape::plain;
use crate::profile::data::{Cause, Profile};
use crate::profile::histogram::percentile;
use crate::profile::kinds::AddressSpace;
use std::fmt::Write as _;

const HEAD: &str = "sort,reason,class,space,address,size,direction,device,mode,function,offset,rip,count,time_ns,mean_ns,\
    p99_ns,max_ns,handler_ns";

/// A field, in quotes where it needs them. A spreadsheet takes what starts with one of four signs for a formula, also behind
/// white space: it gets a quote before it.
fn field(text: &str) -> String {
    let text = plain(text);
    let text = if text.trim_start().starts_with(['=', '+', '-', '@']) { format!("'{text}") } else { text };
    if text.contains([',', '"']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

fn hex(value: Option<u64>) -> String {
    value.map(|value| format!("{value:#x}")).unwrap_or_default()
}

fn line(sort: &str, cause: &Cause) -> String {
    let direction = match cause.write {
        Some(true) => "write",
        Some(false) => "read",
        None => "",
    };
    let fields = [
        sort.to_owned(),
        field(&cause.reason),
        cause.class.to_string(),
        cause.space.map_or("", AddressSpace::name).to_owned(),
        hex(cause.address),
        cause.size.map(|size| size.to_string()).unwrap_or_default(),
        direction.to_owned(),
        field(cause.device.as_deref().unwrap_or("")),
        cause.mode.to_string(),
        field(cause.function.as_deref().unwrap_or("")),
        hex(cause.offset),
        hex(cause.rip),
        cause.count.to_string(),
        cause.time_ns.to_string(),
        (cause.time_ns / cause.count.max(1)).to_string(),
        percentile(&cause.histogram, 99).min(cause.max_ns).to_string(),
        cause.max_ns.to_string(),
        cause.handler_ns.to_string(),
    ];
    fields.join(",")
}

pub(super) fn render(profile: &Profile) -> String {
    let mut out = format!("{HEAD}\n");
    for cause in profile.vm_exits.iter().flat_map(|exits| &exits.causes) {
        let _ = writeln!(out, "{}", line("vm", cause));
    }
    for cause in &profile.userspace_exits.causes {
        let _ = writeln!(out, "{}", line("userspace", cause));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn fields_are_neither_formulas_nor_escape_sequences() {
        assert_eq!(field("\t=1+1"), "?=1+1");
        assert_eq!(field(" \u{a0}@x"), "' \u{a0}@x");
        assert_eq!(field("\x1b[2J\u{9b}\n"), "?[2J??");
    }

    #[test]
    fn every_line_has_every_field() {
        let mut profile = sample();
        profile.userspace_exits.causes[0].device = Some("=a, \"b\"".into());
        let text = render(&profile);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[1].split(',').count(), lines[0].split(',').count());
        assert!(lines[1].starts_with("vm,CPUID,cpuid,leaf,0x40000000,,"), "{}", lines[1]);
        assert!(
            lines[2].contains("\"'=a, \"\"b\"\"\"") && lines[2].ends_with(",300,3000000,10000,50000,50000,600000"),
            "{}",
            lines[2]
        );
    }
}
