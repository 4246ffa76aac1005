//! A profile in all its forms.

mod chrome_trace;
mod csv;
mod diff;
mod flame;
mod html;
mod prometheus;
mod rows;
mod text;

pub use diff::{Difference, diff};
pub use text::Style;
pub(super) use text::{number, share, time};

use super::advice::Advice;
use super::data::Profile;

/// The forms of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Tables for people.
    #[default]
    Text,
    /// The profile itself.
    Json,
    /// One line a cause.
    Csv,
    /// Folded stacks, for flame graph tools.
    Folded,
    /// A flame graph.
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
/// Where the flame graph cannot be drawn.
pub fn render(profile: &Profile, format: Format, style: Style) -> Result<String, String> {
    Ok(match format {
        Format::Text => text::render(profile, &Advice::of(profile), style),
        Format::Json => serde_json::to_string(profile).map_err(|error| error.to_string())? + "\n",
        Format::Csv => csv::render(profile),
        Format::Folded => flame::folded(profile),
        Format::Svg => flame::svg(profile)?,
        Format::Html => html::render(profile, &Advice::of(profile))?,
        Format::ChromeTrace => chrome_trace::render(profile)?,
        Format::Prometheus => prometheus::render(profile),
    })
}
