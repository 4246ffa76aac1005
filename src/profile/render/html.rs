//! One page with everything, and nothing from elsewhere: advice, time line, flame graph, tables.

use super::flame;
use super::rows::{Row, rows};
use crate::escape::escape_html as escape;
use crate::profile::advice::Advice;
use crate::profile::data::{Exits, Profile};
use crate::profile::units::{float, number, share, time};
use std::collections::BTreeMap;
use std::fmt::Write as _;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Rows of a table; a page with more is slow.
const ROWS: usize = 2000;
/// The time line's drawing: columns of it, its height, and what is below for labels.
const COLUMNS: u64 = 1000;
const HEIGHT: f64 = 220.0;
const LABELS: f64 = 34.0;
/// Colours that most people can distinguish (after Okabe and Ito). They are used again where there are more reasons.
const COLOURS: [&str; 10] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f", "#332288", "#88ccee"];

fn cell(out: &mut String, sort_by: u64, text: &str) {
    let _ = write!(out, "<td class=n data-v={sort_by}>{}", escape(text));
}

fn table(exits: &Exits, id: &str) -> String {
    let rows = rows(&exits.causes);
    let mut out = format!("<div class=scroll><table id={id}><thead><tr>");
    for (name, class) in [
        ("count", "n"),
        ("share", "n"),
        ("time", "n"),
        ("mean", "n"),
        ("p99", "n"),
        ("longest", "n"),
        ("reason", ""),
        ("device or register", ""),
        ("function", ""),
    ] {
        let _ = write!(out, "<th class=\"{class}\">{name}");
    }
    out.push_str("</thead><tbody>\n");
    for row in rows.iter().take(ROWS) {
        let Row { reason, what, function, count, time_ns, max_ns, .. } = row;
        out.push_str("<tr>");
        cell(&mut out, *count, &number(*count));
        cell(&mut out, *count, &share(*count, exits.total));
        for ns in [*time_ns, row.mean_ns(), row.p99_ns(), *max_ns] {
            cell(&mut out, ns, &time(ns));
        }
        let _ = writeln!(out, "<td>{}<td>{}<td>{}", escape(reason), escape(what), escape(function));
    }
    out.push_str("</tbody></table></div>\n");
    if rows.len() > ROWS {
        let _ = writeln!(out, "<p class=note>and {} more rows", rows.len() - ROWS);
    }
    out
}

/// Counts in [`COLUMNS`] columns at most, by column and key.
fn columns(exits: &Exits, ran_ns: u64) -> (BTreeMap<u64, BTreeMap<&str, u64>>, u64) {
    let line = &exits.timeline;
    let step_ns = line.step_ns.max(1);
    let last = line.counts.iter().map(|one| one.step).max().unwrap_or(0);
    let steps = (ran_ns / step_ns).max(last).saturating_add(1);
    let wide = steps.div_ceil(COLUMNS).max(1);
    let mut columns: BTreeMap<u64, BTreeMap<&str, u64>> = BTreeMap::new();
    for one in &line.counts {
        let place = columns.entry(one.step / wide).or_default().entry(&one.key).or_default();
        *place = place.saturating_add(one.count);
    }
    (columns, wide.saturating_mul(step_ns))
}

/// The reasons in all columns, the most frequent first.
fn keys_by_count<'a>(columns: &BTreeMap<u64, BTreeMap<&'a str, u64>>) -> Vec<(&'a str, u64)> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (key, count) in columns.values().flatten() {
        let sum = sums.entry(key).or_default();
        *sum = sum.saturating_add(*count);
    }
    let mut keys: Vec<(&str, u64)> = sums.into_iter().collect();
    keys.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    keys
}

/// Exits in each column, stacked by reason, with the phases marked.
fn timeline(profile: &Profile, exits: &Exits, id: &str) -> String {
    let (columns, column_ns) = columns(exits, profile.ran_ns);
    let keys = keys_by_count(&columns);
    let highest =
        columns.values().map(|counts| counts.values().fold(0_u64, |a, b| a.saturating_add(*b))).max().unwrap_or(0);
    let scale = HEIGHT / float(highest.max(1));
    let width = float(COLUMNS);
    let used = (float(profile.ran_ns) / float(column_ns)).max(1.0).min(width);
    let stretch = width / used;
    let colour = |index: usize| COLOURS[index % COLOURS.len()];
    let mut out = format!("<svg class=line id={id} viewBox=\"0 0 {width} {}\" role=img>\n", HEIGHT + LABELS);
    for (column, counts) in &columns {
        let mut top = HEIGHT;
        for (index, (key, _)) in keys.iter().enumerate() {
            let Some(count) = counts.get(key) else { continue };
            let height = float(*count) * scale;
            top -= height;
            let (x, fill, w) = (float(*column) * stretch, colour(index), stretch.max(1.0));
            let at = time(column.saturating_mul(column_ns));
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{top:.2}\" width=\"{w:.2}\" height=\"{height:.2}\" fill=\"{fill}\"><title>{at}: {count} {}</title></rect>",
                escape(key)
            );
        }
    }
    let _ = writeln!(out, "<text x=2 y=11>{} in {}</text>", number(highest), time(column_ns));
    let place = |ns: u64| (float(ns) / float(column_ns) * stretch).min(width);
    for (row, phase) in profile.phases.iter().filter(|phase| !phase.name.is_before_the_guest()).enumerate() {
        let x = place(phase.start_ns);
        let y = HEIGHT + 12.0 + if row.is_multiple_of(2) { 0.0 } else { 14.0 };
        // Near the right edge the words stand on the left of their line.
        let (shift, anchor) = if x > width * 0.85 { (-3.0, "end") } else { (3.0, "start") };
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=0 y2=\"{:.1}\" stroke=currentColor stroke-dasharray=\"3 3\" /><text x=\"{:.1}\" y=\"{y:.1}\" text-anchor={anchor}>{} ({})</text>",
            HEIGHT + LABELS,
            x + shift,
            phase.name,
            time(phase.length_ns())
        );
    }
    out.push_str("</svg><div class=legend>");
    for (index, (key, count)) in keys.iter().enumerate() {
        let _ = write!(
            out,
            "<span><i style=\"background:{}\"></i>{} {}</span>",
            colour(index),
            escape(key),
            number(*count)
        );
    }
    out.push_str("</div>\n");
    out
}

fn tile(out: &mut String, value: &str, what: &str) {
    let _ = write!(out, "<div class=tile><b>{}</b><span>{}</span></div>", escape(value), escape(what));
}

fn head(profile: &Profile) -> String {
    let guest = &profile.guest;
    let mut out = format!("<h1>Exits of {}</h1>\n", escape(&guest.kernel));
    let symbols = guest.symbols.as_deref().unwrap_or("no names of functions");
    let _ = writeln!(
        out,
        "<p class=sub>{}; {} vCPU, {} MiB; {}; host kernel {}; {}; hwvmm {}<p class=sub><code>{}</code>",
        escape(&profile.end),
        guest.vcpus,
        guest.memory_bytes >> 20,
        escape(&guest.boot),
        escape(&profile.host.kernel),
        escape(symbols),
        escape(&profile.hwvmm),
        escape(&guest.cmdline),
    );
    out.push_str("<div class=tiles>");
    if let Some(exits) = &profile.vm_exits {
        tile(&mut out, &number(exits.total), "VM exits");
        tile(&mut out, &time(exits.busy_ns()), "outside of the guest (no HLT)");
        tile(&mut out, &number(exits.lost), "records lost");
    }
    tile(&mut out, &number(profile.userspace_exits.total), "userspace exits");
    for phase in &profile.phases {
        tile(&mut out, &time(phase.length_ns()), phase.name.name());
    }
    out.push_str("</div>\n");
    out
}

/// Renders the profile and the advice as one HTML page, which refers to no other file.
pub(super) fn render(profile: &Profile, advice: &[Advice]) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content=\"width=device-width\">\
         <title>hwvmm: exits of {}</title>\n<style>\n{STYLE}</style></head><body>\n",
        escape(&profile.guest.kernel)
    );
    out.push_str(&head(profile));
    if !advice.is_empty() {
        out.push_str("<h2>What to do</h2>\n<ol class=advice id=advice>\n");
        for one in advice {
            let _ = writeln!(out, "<li>{}", escape(&one.text));
        }
        out.push_str("</ol>\n");
    }
    for missing in &profile.missing {
        let _ = writeln!(out, "<p class=missing>Missing: {}", escape(missing));
    }
    if let Some(exits) = &profile.vm_exits {
        let _ = writeln!(out, "<h2>VM exits over time</h2>\n{}", timeline(profile, exits, "vm-line"));
    }
    let _ = writeln!(
        out,
        "<h2>Userspace exits over time</h2>\n{}",
        timeline(profile, &profile.userspace_exits, "user-line")
    );
    if let Ok(svg) = flame::svg(profile) {
        // Behind the XML declaration, which a page must not have.
        let drawing = svg.find("<svg").and_then(|start| svg.get(start..)).unwrap_or(&svg);
        let drawing =
            format!("<!doctype html><style>body {{ margin: 0 }} svg {{ width: 100%; height: auto }}</style>{drawing}");
        let _ = writeln!(
            out,
            "<h2>Flame graph</h2>\n<iframe id=flame title=\"flame graph\" srcdoc=\"{}\"></iframe>",
            escape(&drawing)
        );
    }
    if let Some(exits) = &profile.vm_exits {
        out.push_str("<h2>VM exits</h2><p class=note>Exits by the processor. Click a column title to sort.\n");
        out.push_str(&table(exits, "vm"));
    }
    out.push_str("<h2>Userspace exits</h2><p class=note>KVM_RUN returned to hwvmm.\n");
    out.push_str(&table(&profile.userspace_exits, "user"));
    let _ = writeln!(out, "<script>\n{SCRIPT}</script></body></html>");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::Phase;
    use crate::profile::data::tests::sample;
    use crate::profile::kinds::PhaseName;

    #[test]
    fn a_page_has_everything_and_lets_nothing_in() {
        let mut profile = sample();
        profile.userspace_exits.causes[0].function = Some("<script>alert(1)</script>".into());
        profile.userspace_exits.timeline.counts.push((u64::MAX, "\"><b>".to_owned(), u64::MAX).into());
        profile.phases.push(Phase { name: PhaseName::Init, start_ns: u64::MAX, end_ns: 0 });
        profile.guest.boot = "<i>".into();
        let page = render(&profile, &Advice::of(&profile));
        for part in [
            "id=vm-line",
            "id=user-line",
            "id=flame",
            "<table id=vm>",
            "<table id=user>",
            "id=advice",
            "kernel (8.0 ms)",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("<script>alert") && !page.contains("\"><b>") && !page.contains("<i>"));
    }
}
