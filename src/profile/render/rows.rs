//! Causes put together for tables: one row for each reason, device or register, and function.

use crate::profile::data::Cause;
use crate::profile::histogram::{Sum, percentile};
use crate::profile::kinds::{AddressSpace, ExitClass};
use std::collections::BTreeMap;

/// A row of a table.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Row {
    pub(super) reason: String,
    pub(super) class: ExitClass,
    pub(super) what: String,
    pub(super) function: String,
    pub(super) count: u64,
    pub(super) time_ns: u64,
    pub(super) max_ns: u64,
    pub(super) handler_ns: u64,
    pub(super) histogram: Sum,
}

impl Row {
    pub(super) fn mean_ns(&self) -> u64 {
        self.time_ns / self.count.max(1)
    }

    pub(super) fn p99_ns(&self) -> u64 {
        percentile(&self.histogram.buckets(), 99).min(self.max_ns)
    }
}

/// What a cause is about, coarse enough for a table: all of a device's registers of one page are one row for memory.
fn what(cause: &Cause) -> String {
    match (cause.space, &cause.device, cause.address) {
        (Some(AddressSpace::Gpa), Some(device), Some(_)) => {
            let direction = if cause.write == Some(true) { "write" } else { "read" };
            format!("{device} {direction}")
        }
        _ => cause.what(),
    }
}

/// Rows of causes, most first.
pub(super) fn rows(causes: &[Cause]) -> Vec<Row> {
    let mut rows: BTreeMap<(String, String, String), Row> = BTreeMap::new();
    for cause in causes {
        let key = (cause.reason.clone(), what(cause), cause.function());
        let row = rows.entry(key).or_insert_with_key(|(reason, what, function)| Row {
            reason: reason.clone(),
            class: cause.class,
            what: what.clone(),
            function: function.clone(),
            ..Row::default()
        });
        row.count = row.count.saturating_add(cause.count);
        row.time_ns = row.time_ns.saturating_add(cause.time_ns);
        row.max_ns = row.max_ns.max(cause.max_ns);
        row.handler_ns = row.handler_ns.saturating_add(cause.handler_ns);
        row.histogram.add(&cause.histogram);
    }
    let mut rows: Vec<Row> = rows.into_values().collect();
    rows.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| b.time_ns.cmp(&a.time_ns)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;
    use std::time::{Duration, Instant};

    #[test]
    fn many_causes_of_one_row_take_linear_time() {
        let cause = sample().userspace_exits.causes.remove(0);
        let with = |time: u64| Cause { count: 1, histogram: vec![(time, 1).into()], ..cause.clone() };
        let causes: Vec<Cause> = (0..20_000).map(with).collect();
        let start = Instant::now();
        let rows = rows(&causes);
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert_eq!((rows.len(), rows[0].count), (1, 20_000));
    }
}
