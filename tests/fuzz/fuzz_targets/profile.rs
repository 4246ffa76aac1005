//! Any bytes as a profile in JSON: it is refused, or rendered in every format.
#![no_main]

use hwvmm::profile::Profile;
use hwvmm::profile::render::{Format, Style, diff, render};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(profile) = Profile::from_json(data, Path::new("fuzz")) else { return };
    for format in [
        Format::Text,
        Format::Json,
        Format::Csv,
        Format::Folded,
        Format::Svg,
        Format::Html,
        Format::ChromeTrace,
        Format::Prometheus,
    ] {
        let _ = render(&profile, format, Style::default());
    }
    let _ = diff(&profile, &profile).text(Style::default());
});
