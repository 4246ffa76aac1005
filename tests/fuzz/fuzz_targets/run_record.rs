//! Any bytes as the record that a machine's process sends: it is refused, or made into statistics, a profile and a flight recorder.
#![no_main]

use hwvmm::config::{RunConfig, RunOptions};
use hwvmm::measure::RunRecord;
use hwvmm::profile::render::{Format, Style, render};
use hwvmm::profile::{Extent, Profile, RunStats, RunSymbols, flight_recorder};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

fn config() -> &'static RunConfig {
    static CONFIG: OnceLock<RunConfig> = OnceLock::new();
    CONFIG.get_or_init(|| {
        let options: RunOptions = toml::from_str("kernel = '/nonexistent'").expect("TOML");
        options.into_config().expect("a configuration")
    })
}

fuzz_target!(|data: &[u8]| {
    let Ok(record) = serde_json::from_slice::<RunRecord>(data) else { return };
    if record.check(record.vcpus.len()).is_err() {
        return;
    }
    let mut stats = RunStats::new(&record);
    stats.add_start(RunStats::new(&record));
    let _ = (stats.to_string(), serde_json::to_string(&stats));
    let _ = flight_recorder(&record, None, Extent::All);
    let profile = Profile::new(config(), &record, &RunSymbols::default());
    let _ = render(&profile, Format::Text, Style::default());
});
