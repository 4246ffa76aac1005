//! A profile in all its forms.

mod chrome_trace;
mod csv;
mod diff;
mod error;
mod flame;
mod html;
mod prometheus;
mod rows;
mod text;

pub use diff::{Difference, diff};
pub use error::RenderError;
pub use text::Style;

use super::advice::Advice;
use super::data::Profile;
use crate::escape::escape_json;

/// The forms of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables for a terminal.
    #[default]
    Text,
    /// The profile in its own format.
    Json,
    /// One line a cause.
    Csv,
    /// Folded stacks, for flame graph tools.
    Folded,
    /// A flame graph (SVG).
    Svg,
    /// One page with everything.
    Html,
    /// For chrome://tracing and Perfetto.
    ChromeTrace,
    /// Metrics as Prometheus reads them.
    Prometheus,
}

/// Renders a profile.
///
/// # Errors
/// [`RenderError`]: for a flame graph where there are no exits.
pub fn render(profile: &Profile, format: Format, style: Style) -> Result<String, RenderError> {
    Ok(match format {
        Format::Text => text::render(profile, &Advice::of(profile), style),
        Format::Json => escape_json(&serde_json::to_string(profile)?) + "\n",
        Format::Csv => csv::render(profile),
        Format::Folded => flame::folded(profile),
        Format::Svg => flame::svg(profile)?,
        Format::Html => html::render(profile, &Advice::of(profile)),
        Format::ChromeTrace => chrome_trace::render(profile)?,
        Format::Prometheus => prometheus::render(profile),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Budget, Slack};
    use crate::profile::budget::{check, from_profile};
    use crate::profile::data::tests::sample;
    use clap::ValueEnum;
    use proptest::prelude::*;

    /// Numbers at the limits, where arithmetic can overflow.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(u64::MAX - 1), Just(1 << 63), any::<u64>(), 0_u64..5000]
    }

    proptest! {
        #[test]
        fn no_profile_makes_a_report_panic(
            numbers in proptest::collection::vec(number(), 24),
            words in "\\PC{0,40}",
            costs in proptest::collection::vec(proptest::num::f64::ANY, 2),
        ) {
            let mut profile = sample();
            let mut next = numbers.iter().copied();
            let mut number = || next.next().unwrap_or(7);
            for exits in [&mut profile.userspace_exits].into_iter().chain(&mut profile.vm_exits) {
                let cause = &mut exits.causes[0];
                (cause.count, cause.time_ns, cause.max_ns, cause.handler_ns) = (number(), number(), number(), number());
                (cause.rip, cause.address, cause.offset) = (Some(number()), Some(number()), Some(number()));
                cause.histogram = vec![(number(), number()).into(), (number(), number()).into()];
                (cause.function, cause.device) = (Some(words.clone()), Some(words.clone()));
                exits.timeline.step_ns = number();
                exits.timeline.counts = vec![
                    (number(), words.clone(), number()).into(),
                    (number(), "b".to_owned(), number()).into(),
                ];
                (exits.total, exits.lost, exits.untraced) = (cause.count, number(), number());
                exits.by_reason = [(words.clone(), cause.count)].into();
            }
            profile.phases[1].start_ns = number();
            profile.phases[1].end_ns = number();
            profile.marks[0].at_ns = number();
            profile.ran_ns = number();
            profile.costs = [("cpuid".to_owned(), costs[0]), ("userspace_pio".to_owned(), costs[1])].into();
            for format in Format::value_variants() {
                let _ = render(&profile, *format, Style { colour: true, rows: 3 });
            }
            let _ = diff(&profile, &sample()).text(Style::default());
            let _ = Budget::parse("total=1,userspace=1,pio=0,cpuid=0,leaf.0=0").map(|budget| check(&budget, &profile));
            let _ = Slack::parse("2%").map(|slack| from_profile(&profile, slack));
        }
    }
}
