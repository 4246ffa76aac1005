//! Tables for people: 100 columns at most, colour where a terminal is.

use super::rows::{Row, rows};
use crate::escape::plain as clean;
use crate::profile::advice::Advice;
use crate::profile::data::{Avoided, Exits, Profile};
use crate::profile::kinds::ExitClass;
use crate::profile::mmu_work;
use crate::profile::units::{float, number, share, time};
use std::fmt::Write as _;

/// How text is written.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// If true, the text has colour escapes.
    pub colour: bool,
    /// Rows of a table before the rest is summed up.
    pub rows: usize,
}

impl Default for Style {
    fn default() -> Self {
        Self { colour: false, rows: 25 }
    }
}

const WIDTH: usize = 100;

impl Style {
    fn bold(self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn dim(self, text: &str) -> String {
        if self.colour { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn warn(self, text: &str) -> String {
        if self.colour { format!("\x1b[33m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// `text` in exactly `width` columns; what is cut ends in an ellipsis.
fn fit(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return format!("{text:<width$}");
    }
    let cut: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{cut}…")
}

/// Columns side by side.
pub(super) fn cells(columns: &[(&str, usize)]) -> String {
    columns.iter().map(|(text, width)| fit(&clean(text), *width)).collect::<Vec<_>>().join(" ")
}

fn row(row: &Row, total: u64) -> String {
    format!(
        "{:>9} {:>7} {:>8} {:>8}  {}",
        number(row.count),
        share(row.count, total),
        time(row.mean_ns()),
        time(row.p99_ns()),
        cells(&[(&row.reason, 11), (&row.what, 24), (&row.function, 26)]),
    )
    .trim_end()
    .to_owned()
}

fn table(out: &mut String, exits: &Exits, style: Style) {
    let head = format!(
        "{:>9} {:>7} {:>8} {:>8}  {:<11} {:<24} {}",
        "count", "share", "mean", "p99", "reason", "what", "function"
    );
    let rows = rows(&exits.causes);
    let _ = writeln!(out, "{}", style.dim(&head));
    for one in rows.iter().take(style.rows) {
        let _ = writeln!(out, "{}", row(one, exits.total));
    }
    let rest: u64 = rows.iter().skip(style.rows).fold(0, |sum, row| sum.saturating_add(row.count));
    if rest > 0 {
        let more = rows.len() - style.rows;
        let _ = writeln!(out, "{:>9} {:>7} {:>17}  in {more} more rows", number(rest), share(rest, exits.total), "");
    }
}

fn by_reason(out: &mut String, exits: &Exits) {
    let mut reasons: Vec<_> = exits.by_reason.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let words: Vec<String> =
        reasons.iter().map(|(name, count)| format!("{} {}", clean(name), number(**count))).collect();
    wrapped(out, &words.join(", "), "  ");
}

/// Words on lines of at most [`WIDTH`] columns.
fn wrapped(out: &mut String, text: &str, indent: &str) {
    let mut line = indent.to_owned();
    let mut empty = true;
    for word in text.split(' ') {
        if !empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            let _ = writeln!(out, "{line}");
            line = indent.to_owned();
            empty = true;
        }
        if !empty {
            line.push(' ');
        }
        line.push_str(word);
        empty = false;
    }
    let _ = writeln!(out, "{line}");
}

fn head(out: &mut String, profile: &Profile, style: Style) {
    let guest = &profile.guest;
    let title = format!("profile: {}, {} vCPU, {} MiB", clean(&guest.kernel), guest.vcpus, guest.memory_bytes >> 20);
    let _ = writeln!(out, "{}", style.bold(fit(&title, WIDTH).trim_end()));
    wrapped(out, &format!("{}; the guest ran {}", clean(&profile.end), time(profile.ran_ns)), "  ");
    let phases: Vec<String> =
        profile.phases.iter().map(|phase| format!("{} {}", phase.name, time(phase.length_ns()))).collect();
    wrapped(out, &format!("phases: {}", phases.join(", ")), "  ");
    if !profile.marks.is_empty() {
        let marks = profile.marks.iter().take(20).map(|mark| format!("{} at {}", mark.name, time(mark.at_ns)));
        wrapped(out, &format!("marks: {}", marks.collect::<Vec<_>>().join(", ")), "  ");
    }
    match &guest.symbols {
        Some(symbols) => {
            let moved = if guest.slide == 0 { String::new() } else { format!(", moved by {:#x} (KASLR)", guest.slide) };
            wrapped(out, &format!("functions by {}{moved}", clean(symbols)), "  ");
        }
        None => wrapped(out, "no names of functions", "  "),
    }
}

/// What the exits cost by what one of each kind costs on this host: in the kernel by class, and what a way to hwvmm adds.
fn cost(profile: &Profile) -> Option<String> {
    let exits = profile.vm_exits.as_ref()?;
    let costs = &profile.costs;
    // What has no price of its own is at least a way out and in again.
    let least = *costs.get("cpuid")?;
    let kernel: f64 = exits
        .causes
        .iter()
        .filter(|cause| cause.class != ExitClass::Hlt)
        .map(|cause| costs.get(cause.class.name()).copied().unwrap_or(least) * float(cause.count))
        .sum();
    let more = |class: ExitClass| {
        let there = costs.get(&format!("userspace_{class}"))?;
        Some((there - costs.get(class.name()).copied().unwrap_or(least)).max(0.0))
    };
    let causes = &profile.userspace_exits.causes;
    let user: f64 = causes.iter().filter_map(|cause| Some(more(cause.class)? * float(cause.count))).sum();
    let all = std::time::Duration::try_from_secs_f64((kernel + user) / 1e9).ok()?;
    let all = u64::try_from(all.as_nanos()).unwrap_or(u64::MAX);
    Some(format!("by what one exit costs on this host (hwvmm bench exits), about {} of this run", time(all)))
}

/// What exit clusters have avoided, and why the interpreter stopped.
fn avoided(out: &mut String, avoided: &Avoided, style: Style) {
    let title = format!("exits avoided: {}", number(avoided.total));
    let _ = writeln!(
        out,
        "\n{} ({} instructions interpreted in {} clusters; {})",
        style.bold(&title),
        number(avoided.instructions),
        number(avoided.clusters),
        time(avoided.time_ns)
    );
    let _ = writeln!(
        out,
        "{}",
        style.dim(&format!("{:>9} {:>7}  {:<11} {:<24} function", "count", "share", "reason", "what"))
    );
    for one in rows(&avoided.causes).iter().take(style.rows) {
        let cells = cells(&[(&one.reason, 11), (&one.what, 24), (&one.function, 26)]);
        let _ = writeln!(out, "{:>9} {:>7}  {}", number(one.count), share(one.count, avoided.total), cells.trim_end());
    }
    let _ = writeln!(out, "{}", style.dim(&format!("{:>9} {:>7}  {:<11} before", "clusters", "share", "ended by")));
    for one in avoided.ends.iter().take(style.rows) {
        let cells = cells(&[(&one.reason, 11), (&one.place(), 51)]);
        let _ =
            writeln!(out, "{:>9} {:>7}  {}", number(one.count), share(one.count, avoided.clusters), cells.trim_end());
    }
}

/// Renders the profile and the advice as text for a terminal.
pub(super) fn render(profile: &Profile, advice: &[Advice], style: Style) -> String {
    let mut out = String::new();
    head(&mut out, profile, style);
    match &profile.vm_exits {
        Some(exits) => {
            let lost = if exits.lost > 0 {
                style.warn(&format!(", and {} lost", number(exits.lost)))
            } else {
                ", none lost".into()
            };
            let title = format!("VM exits: {}", number(exits.total));
            let busy = time(exits.busy_ns());
            let _ = writeln!(
                out,
                "\n{} (by the processor{lost}; {busy} outside of the guest, without sleep in HLT)",
                style.bold(&title)
            );
            if exits.untraced > 0 {
                let _ =
                    writeln!(out, "  and {} that KVM handled on its fast path without a trace", number(exits.untraced));
            }
            by_reason(&mut out, exits);
            if let Some(cost) = cost(profile) {
                wrapped(&mut out, &cost, "  ");
            }
            table(&mut out, exits, style);
        }
        None => {
            let total = profile
                .kvm
                .get("exits")
                .map_or_else(|| "unknown, without KVM's statistics".into(), |exits| number(*exits));
            let _ = writeln!(out, "\n{} (counted in total only)", style.bold(&format!("VM exits: {total}")));
        }
    }
    if let Some(work) = mmu_work::describe(&profile.kvm) {
        out.push('\n');
        wrapped(&mut out, &work, "");
    }
    let exits = &profile.userspace_exits;
    let handler = exits.causes.iter().fold(0_u64, |sum, cause| sum.saturating_add(cause.handler_ns));
    let title = format!("userspace exits: {}", number(exits.total));
    let _ = writeln!(out, "\n{} (KVM_RUN returned to hwvmm; {} in its handler)", style.bold(&title), time(handler));
    by_reason(&mut out, exits);
    table(&mut out, exits, style);
    if let Some(some) = &profile.avoided {
        avoided(&mut out, some, style);
    }
    if !advice.is_empty() {
        let _ = writeln!(out, "\n{}", style.bold("what to do:"));
        for (index, one) in advice.iter().enumerate() {
            wrapped(&mut out, &format!("{}. {}", index + 1, clean(&one.text)), "  ");
        }
    }
    for missing in &profile.missing {
        wrapped(&mut out, &style.warn(&format!("missing: {}", clean(missing))), "");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn a_report_fits_100_columns_and_names_the_function() {
        let mut profile = sample();
        profile.userspace_exits.causes[0].function = Some("a_function_with_a_very_long_name_that_will_not_fit".into());
        profile.missing.push(
            "a long story about what could not be had, and what one might do to have it, in many words more".into(),
        );
        let text = render(&profile, &Advice::of(&profile), Style::default());
        assert!(
            text.contains("VM exits: 300") && text.contains("io_serial_out") && text.contains("leaf 0x40000000"),
            "{text}"
        );
        assert!(text.contains("UART 1 0x3f8 write") && text.contains("10.0 µs") && text.contains("50.0 µs"), "{text}");
        assert!(text.contains("exits avoided: 7,000") && text.contains("console_unlock+0x16"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        assert!(!text.contains('\x1b'), "no colour unless asked for");
        assert!(render(&profile, &[], Style { colour: true, rows: 1 }).contains("\x1b[1m"));
    }

    #[test]
    fn control_characters_of_a_file_do_not_reach_the_terminal() {
        let mut profile = sample();
        profile.guest.kernel = "\x1b]0;title\x07".into();
        profile.end = "\x1b[31m".into();
        profile.userspace_exits.causes[0].function = Some("\x1b[2J".into());
        profile.userspace_exits.causes[0].device = Some("\x1b[2J".into());
        let avoided = profile.avoided.as_mut().expect("there");
        (avoided.ends[0].reason, avoided.ends[0].function) = ("\x1b[2J".into(), Some("\x1b[2J".into()));
        assert!(!render(&profile, &[], Style::default()).contains('\x1b'));
    }

    #[test]
    fn the_price_is_told_where_it_is_known() {
        let mut profile = sample();
        assert!(!render(&profile, &[], Style::default()).contains("costs on this host"));
        profile.costs = [("cpuid", 1000.0), ("userspace_pio", 5000.0)].map(|(name, ns)| (name.to_owned(), ns)).into();
        // 300 CPUIDs, and 300 times what a way to hwvmm adds.
        let text = render(&profile, &[], Style::default());
        assert!(text.contains("about 1.5 ms of this run"), "{text}");
    }
}
