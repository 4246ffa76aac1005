//! A comparison of columns of nanobenchmarks: as text, as Markdown, as a chart.

use super::{Column, OPERATIONS, Operation, Paging, PaperCycles};
use crate::escape::plain;
use std::fmt::Write as _;

/// The format of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A table for a terminal.
    Text,
    /// A table in Markdown.
    Markdown,
    /// A bar chart in SVG, on a logarithmic scale.
    Svg,
}

/// A number of cycles, or a dash.
fn number(value: Option<f64>) -> String {
    match value {
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) => format!("{value:.1}"),
        None => "-".into(),
    }
}

fn cycles(column: &Column, operation: &Operation) -> Option<f64> {
    column.results.get(operation.name).map(|measured| measured.cycles)
}

/// The ratio of the cycles to those of the first column, where these are above 0.
fn ratio(column: &Column, first: &Column, operation: &Operation) -> Option<f64> {
    let base = cycles(first, operation).filter(|base| *base > 0.0)?;
    cycles(column, operation).map(|cycles| cycles / base)
}

/// The cells of a row: cycles, ratio to the first column, exits of each column; then the paper's ratios to native.
fn cells(columns: &[Column], operation: &Operation) -> Vec<String> {
    let mut cells = vec![operation.name.to_owned()];
    for (index, column) in columns.iter().enumerate() {
        cells.push(number(cycles(column, operation)));
        if let Some(first) = columns.first().filter(|_| index > 0) {
            cells.push(ratio(column, first, operation).map_or("-".into(), |ratio| format!("{ratio:.2}")));
        }
        if column.mmu != Paging::None {
            let exits = column.results.get(operation.name).and_then(|measured| measured.exits);
            cells.push(exits.map_or("-".into(), |exits| format!("{exits:.2}")));
        }
    }
    for vmm in [|paper: PaperCycles| paper.software, |paper: PaperCycles| paper.hardware] {
        let ratio = operation.paper.map(|paper| vmm(paper) / paper.native).filter(|ratio| ratio.is_finite());
        cells.push(ratio.map_or(String::new(), |ratio| format!("{ratio:.2}")));
    }
    cells
}

fn heads(columns: &[Column]) -> Vec<String> {
    let mut heads = vec!["operation".to_owned()];
    for (index, column) in columns.iter().enumerate() {
        heads.push(plain(&column.label));
        if index > 0 {
            heads.push("ratio".into());
        }
        if column.mmu != Paging::None {
            heads.push("exits".into());
        }
    }
    heads.extend(["2006 soft".into(), "2006 hard".into()]);
    heads
}

/// Shows `columns` side by side: cycles of each operation, how many times the first column's those are, exits.
#[must_use]
pub fn compare(columns: &[Column], form: Form) -> String {
    let rows: Vec<Vec<String>> = OPERATIONS.iter().map(|operation| cells(columns, operation)).collect();
    match form {
        Form::Text => text(&heads(columns), &rows),
        Form::Markdown => markdown(&heads(columns), &rows),
        Form::Svg => svg(columns),
    }
}

fn text(heads: &[String], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().chain([&heads.to_vec()]).filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let mut out = String::new();
    for row in std::iter::once(heads).chain(rows.iter().map(Vec::as_slice)) {
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right. Writing to a String cannot fail.
            let _ = if index == 0 { write!(out, "{cell:<width$}") } else { write!(out, "  {cell:>width$}") };
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
    out
}

fn markdown(heads: &[String], rows: &[Vec<String>]) -> String {
    let cell = |text: &String| text.replace('\\', "\\\\").replace('|', "\\|");
    let line = |cells: &[String]| format!("| {} |\n", cells.iter().map(cell).collect::<Vec<_>>().join(" | "));
    let mut out = line(heads);
    let rule: Vec<String> = (0..heads.len()).map(|index| if index == 0 { "---" } else { "---:" }.into()).collect();
    out.push_str(&line(&rule));
    rows.iter().for_each(|row| out.push_str(&line(row)));
    out.push('\n');
    for operation in &OPERATIONS {
        let _ = writeln!(out, "- **{}**: {}", operation.name, operation.what);
    }
    out
}

// The chart's measures, in pixels.
const LEFT: f64 = 90.0;
const WIDTH: f64 = 640.0;
const BAR: f64 = 9.0;
const GAP: f64 = 8.0;
const TOP: f64 = 40.0;
/// One decade takes so many pixels.
const DECADE: f64 = WIDTH / 6.0;
const COLOURS: [&str; 6] = ["#555", "#2a78d6", "#d9662b", "#2e9e62", "#8a56c2", "#c23b6e"];

fn escape(text: &str) -> String {
    plain(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// From one cycle to a million, to the right.
fn length(cycles: f64) -> f64 {
    (cycles.max(1.0).log10() * DECADE).min(WIDTH)
}

fn svg(columns: &[Column]) -> String {
    let count = f64::from(u32::try_from(columns.len()).unwrap_or(0));
    let group = count * BAR + GAP;
    let operations = &OPERATIONS[1..];
    let height = TOP + group * f64::from(u32::try_from(operations.len()).unwrap_or(0)) + 30.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        LEFT + WIDTH + 80.0
    );
    let mut x = LEFT;
    for (column, colour) in columns.iter().zip(COLOURS.iter().cycle()) {
        let label = escape(&column.label);
        let _ = writeln!(out, "<rect x=\"{x:.0}\" y=\"10\" width=\"10\" height=\"10\" fill=\"{colour}\"/>");
        let _ = writeln!(out, "<text x=\"{:.0}\" y=\"19\">{label}</text>", x + 14.0);
        x += 40.0 + 7.0 * f64::from(u32::try_from(label.len()).unwrap_or(0));
    }
    for decade in 0..=6_i32 {
        let x = LEFT + f64::from(decade) * DECADE;
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{:.0}\" stroke=\"#ddd\"/>",
            height - 25.0
        );
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
            height - 10.0,
            10_i64.pow(decade.unsigned_abs())
        );
    }
    for (row, operation) in (0_u32..).zip(operations) {
        let y = TOP + f64::from(row) * group;
        let _ = writeln!(
            out,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\"><title>{}</title>{}</text>",
            LEFT - 6.0,
            y + count * BAR / 2.0 + 4.0,
            escape(operation.what),
            operation.name
        );
        for (index, (column, colour)) in (0_u32..).zip(columns.iter().zip(COLOURS.iter().cycle())) {
            let Some(cycles) = cycles(column, operation) else { continue };
            let (y, length) = (y + f64::from(index) * BAR, length(cycles));
            let _ = writeln!(
                out,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"8\">{}</text>",
                BAR - 1.0,
                LEFT + length + 3.0,
                y + BAR - 2.0,
                number(Some(cycles))
            );
        }
    }
    out.push_str("<!-- cycles of one operation, logarithmic -->\n</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nano::Measured;

    fn column(label: &str, mmu: Paging, cycles: f64) -> Column {
        let measured = Measured { cycles, exits: (mmu != Paging::None).then_some(1.0), ..Measured::default() };
        let results = [("in".to_owned(), measured)].into();
        Column { label: label.into(), mmu, results, ..Column::default() }
    }

    #[test]
    fn ratios_are_to_the_first_column_and_the_papers_to_its_native() {
        let columns = [column("native", Paging::None, 10.0), column("npt", Paging::Nested, 2500.0)];
        let table = compare(&columns, Form::Text);
        let row: Vec<&str> =
            table.lines().find(|line| line.starts_with("in ")).expect("a row").split_whitespace().collect();
        assert_eq!(row, ["in", "10.0", "2500", "250.00", "1.00", "0.07", "4.93"]);
        assert!(table.starts_with("operation"));
        let markdown = compare(&columns, Form::Markdown);
        assert!(
            markdown.lines().take(27).filter(|line| line.starts_with('|')).all(|line| line.matches('|').count() == 8)
        );
    }

    #[test]
    fn labels_of_a_file_change_neither_terminal_nor_table() {
        let columns = [column("a|b\x1b]0;x\x07\n", Paging::None, 1.0)];
        for form in [Form::Text, Form::Markdown, Form::Svg] {
            assert!(!compare(&columns, form).chars().any(|c| c != '\n' && crate::escape::is_active(c)), "{form:?}");
        }
        assert!(compare(&columns, Form::Markdown).starts_with("| operation | a\\|b?]0;x?? |"));
    }

    #[test]
    fn the_chart_has_a_bar_for_each_figure_and_escapes_labels() {
        let chart = compare(&[column("<a>", Paging::None, 10.0), column("b", Paging::Nested, 1e9)], Form::Svg);
        assert!(chart.contains("&lt;a&gt;") && !chart.contains("<a>"));
        assert_eq!(chart.matches(&format!("width=\"{DECADE:.1}\"")).count(), 1);
        assert_eq!(chart.matches(&format!("width=\"{WIDTH:.1}\"")).count(), 1, "no bar leaves the chart");
    }
}
