//! Checks of a record that another process has sent.

use super::clusters::MOST_PLACES;
use super::counters::MAX_ADDRESSES;
use super::flight_recorder::KEPT;
use super::record::{DeviceRange, Measured, MenuEntry, RunRecord, VERSION, VcpuRecord, VirtioQueue};
use super::tally::TallyRecord;
use super::tracer::{self, VmRecord};
use super::user_profile;
use crate::kvm::stats::Stat;
use std::collections::BTreeMap;
use thiserror::Error;

/// The longest name or sentence of a record, in bytes.
const MAX_TEXT_BYTES: usize = 4096;
/// The most devices, queues and sentences.
const MAX_ITEMS: usize = 4096;
/// The most buckets of a histogram: what 64-bit times fill of one with a decimal digit.
const MAX_BUCKETS: usize = 1024;
/// The most values of one of KVM's statistics: its histograms have some dozens.
const MAX_VALUES: usize = 1024;

/// A record is not what a machine of this version leaves.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RecordError {
    /// It has another version.
    #[error("its version is {0}, not {VERSION}")]
    Version(u32),
    /// It is of more or fewer vCPUs than the machine has.
    #[error("it has {found} records of vCPUs; the machine has {vcpus}")]
    Vcpus {
        /// The number of vCPUs' records in it.
        found: usize,
        /// vCPUs of the machine.
        vcpus: usize,
    },
    /// Its end names a vCPU that the machine does not have.
    #[error("it ended on vCPU {0}, which does not exist")]
    EndVcpu(usize),
    /// Its trace is of more or fewer vCPUs than the machine has.
    #[error("its trace is of {found} vCPUs; the machine has {vcpus}")]
    Trace {
        /// vCPUs in the trace.
        found: usize,
        /// vCPUs of the machine.
        vcpus: usize,
    },
    /// A list is too long.
    #[error("it has {count} {what}; the most is {max}")]
    TooMany {
        /// The items of the list.
        what: &'static str,
        /// The number of items in the list.
        count: usize,
        /// The most that there can be.
        max: usize,
    },
    /// A text is too long.
    #[error("a text in it has {bytes} bytes; the most is {MAX_TEXT_BYTES}")]
    Text {
        /// The length of the text in bytes.
        bytes: usize,
    },
}

impl RunRecord {
    /// Checks that the parts of a record fit each other, and a machine with `vcpus` vCPUs. Counts and times are not checked:
    /// code that adds them up saturates.
    ///
    /// # Errors
    /// [`RecordError`]: the first part that does not fit.
    pub fn check(&self, vcpus: usize) -> Result<(), RecordError> {
        if self.version != VERSION {
            return Err(RecordError::Version(self.version));
        }
        if self.vcpus.len() != vcpus {
            return Err(RecordError::Vcpus { found: self.vcpus.len(), vcpus });
        }
        if let Some(vcpu) = self.end.vcpu.filter(|vcpu| *vcpu >= vcpus) {
            return Err(RecordError::EndVcpu(vcpu));
        }
        if let Some(found) = self.trace.as_ref().map(|trace| trace.vcpus.len()).filter(|found| *found != vcpus) {
            return Err(RecordError::Trace { found, vcpus });
        }
        self.check_lengths()
    }

    /// Checks the lengths of lists and texts, also of a record that is not complete.
    ///
    /// # Errors
    /// [`RecordError::TooMany`] or [`RecordError::Text`].
    pub fn check_lengths(&self) -> Result<(), RecordError> {
        check_totals(&self.devices, &self.virtio, &self.missing, self.vm_stats.as_deref())?;
        self.entry.iter().try_for_each(MenuEntry::check_lengths)?;
        self.vcpus.iter().try_for_each(VcpuRecord::check_lengths)?;
        let Some(trace) = &self.trace else { return Ok(()) };
        check_trace(&trace.mmu, &trace.missing)?;
        trace.vcpus.iter().flatten().try_for_each(VmRecord::check_lengths)
    }
}

fn limit(what: &'static str, count: usize, max: usize) -> Result<(), RecordError> {
    if count > max { Err(RecordError::TooMany { what, count, max }) } else { Ok(()) }
}

fn check_texts<'a>(mut texts: impl Iterator<Item = &'a String>) -> Result<(), RecordError> {
    match texts.find(|text| text.len() > MAX_TEXT_BYTES) {
        Some(text) => Err(RecordError::Text { bytes: text.len() }),
        None => Ok(()),
    }
}

fn check_stats(stats: Option<&[Stat]>) -> Result<(), RecordError> {
    let stats = stats.unwrap_or_default();
    limit("statistics of KVM", stats.len(), MAX_ITEMS)?;
    stats.iter().try_for_each(|stat| limit("values of a statistic", stat.values.len(), MAX_VALUES))?;
    check_texts(stats.iter().map(|stat| &stat.name))
}

fn check_tally(tally: &TallyRecord) -> Result<(), RecordError> {
    limit("buckets of a histogram", tally.histogram.len(), MAX_BUCKETS)
}

/// Checks the lengths of what is in a record once.
///
/// # Errors
/// [`RecordError::TooMany`] or [`RecordError::Text`].
pub fn check_totals(
    devices: &[DeviceRange],
    virtio: &[VirtioQueue],
    missing: &[String],
    vm_stats: Option<&[Stat]>,
) -> Result<(), RecordError> {
    limit("devices", devices.len(), MAX_ITEMS)?;
    limit("queues", virtio.len(), MAX_ITEMS)?;
    limit("messages about missing data", missing.len(), MAX_ITEMS)?;
    check_stats(vm_stats)?;
    let devices = devices.iter().map(|device| &device.name);
    check_texts(missing.iter().chain(devices).chain(virtio.iter().map(|queue| &queue.device)))
}

/// Checks the lengths of what a trace has of all vCPUs together.
///
/// # Errors
/// [`RecordError::TooMany`] or [`RecordError::Text`].
pub fn check_trace(mmu: &BTreeMap<String, u64>, missing: &[String]) -> Result<(), RecordError> {
    limit("events of the MMU", mmu.len(), MAX_ITEMS)?;
    limit("messages about missing data", missing.len(), MAX_ITEMS)?;
    check_texts(missing.iter().chain(mmu.keys()))
}

impl MenuEntry {
    /// Checks the lengths of texts.
    ///
    /// # Errors
    /// [`RecordError::Text`].
    pub fn check_lengths(&self) -> Result<(), RecordError> {
        check_texts([&self.number, &self.title].into_iter())
    }
}

impl VcpuRecord {
    /// The number of buckets of its histograms, of which it can have the most by far.
    #[must_use]
    pub fn buckets(&self) -> usize {
        match &self.measured {
            Measured::Nothing | Measured::HandlerTime(_) => 0,
            Measured::Profile(profile) => profile.causes.iter().map(|cause| cause.outside.histogram.len()).sum(),
        }
    }

    /// Checks the lengths of lists and texts.
    ///
    /// # Errors
    /// [`RecordError::TooMany`] or [`RecordError::Text`].
    pub fn check_lengths(&self) -> Result<(), RecordError> {
        limit("last exits of a vCPU", self.flight_recorder.len(), KEPT)?;
        // Unmapped addresses and MSRs are counted besides.
        limit("devices of a vCPU", self.counts.by_device.len(), MAX_ITEMS + 2 * MAX_ADDRESSES)?;
        check_texts(self.counts.by_device.iter().filter_map(|count| count.device.as_ref()))?;
        check_stats(self.stats.as_deref())?;
        if let Some(clusters) = &self.clusters {
            limit("places of avoided exits", clusters.avoided_at.len(), MOST_PLACES)?;
            limit("places of the ends of clusters", clusters.ended_at.len(), MOST_PLACES)?;
        }
        match &self.measured {
            Measured::Nothing | Measured::HandlerTime(_) => Ok(()),
            Measured::Profile(profile) => {
                limit("causes of userspace exits", profile.causes.len(), user_profile::MAX_RECORDED_CAUSES)?;
                limit("marks", profile.marks.len(), user_profile::MAX_MARKS)?;
                profile.causes.iter().try_for_each(|cause| check_tally(&cause.outside))
            }
        }
    }
}

impl VmRecord {
    /// The number of buckets of its histograms, of which it can have the most by far.
    #[must_use]
    pub fn buckets(&self) -> usize {
        self.causes.iter().map(|cause| cause.outside.histogram.len()).sum()
    }

    /// Checks the lengths of lists.
    ///
    /// # Errors
    /// [`RecordError::TooMany`].
    pub fn check_lengths(&self) -> Result<(), RecordError> {
        limit("causes of VM exits", self.causes.len(), tracer::MAX_RECORDED_CAUSES)?;
        self.causes.iter().try_for_each(|cause| check_tally(&cause.outside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::stats::Kind;
    use crate::measure::record::tests::sample;
    use crate::measure::tally::Bucket;
    use crate::measure::user_profile::UserRecord;

    #[test]
    fn parts_that_do_not_fit_are_named() {
        assert_eq!(with_two_vcpus().check(2), Ok(()));
        let damaged = |damage: fn(&mut RunRecord)| {
            let mut record = with_two_vcpus();
            damage(&mut record);
            record.check(2).expect_err("refused").to_string()
        };
        assert_eq!(damaged(|record| record.version = 9), "its version is 9, not 6");
        assert_eq!(damaged(|record| record.vcpus.truncate(1)), "it has 1 records of vCPUs; the machine has 2");
        assert_eq!(damaged(|record| record.end.vcpu = Some(2)), "it ended on vCPU 2, which does not exist");
        assert!(
            damaged(|record| record.trace.as_mut().expect("there").vcpus.push(None)).starts_with("its trace is of 3")
        );
        assert!(damaged(|record| record.missing = vec![String::new(); 5000]).starts_with("it has 5000 messages"));
        assert!(damaged(|record| record.missing = vec!["x".repeat(5000)]).starts_with("a text in it has 5000 bytes"));
        let exits = damaged(|record| {
            let exit = record.vcpus[0].flight_recorder[0];
            record.vcpus[1].flight_recorder = vec![exit; 257];
        });
        assert_eq!(exits, "it has 257 last exits of a vCPU; the most is 256");
    }

    fn profile(record: &mut RunRecord) -> &mut UserRecord {
        let profiles = record.vcpus.iter_mut().filter_map(|vcpu| match &mut vcpu.measured {
            Measured::Profile(profile) => Some(profile.as_mut()),
            _ => None,
        });
        profiles.last().expect("a profile")
    }

    #[test]
    fn every_list_has_a_bound() {
        let stat = |values| Stat { name: "exits".into(), kind: Kind::Instant, values: vec![1; values] };
        type Damage<'a> = (&'a str, Box<dyn Fn(&mut RunRecord) + 'a>);
        let cases: [Damage<'_>; 13] = [
            ("statistics of KVM", Box::new(|record| record.vm_stats = Some(vec![stat(1); 4097]))),
            ("statistics of KVM", Box::new(|record| record.vcpus[1].stats = Some(vec![stat(1); 4097]))),
            ("values of a statistic", Box::new(|record| record.vm_stats = Some(vec![stat(1025)]))),
            ("values of a statistic", Box::new(|record| record.vcpus[1].stats = Some(vec![stat(1025)]))),
            (
                "devices of a vCPU",
                Box::new(|record| {
                    let one = record.vcpus[0].counts.by_device[0].clone();
                    record.vcpus[1].counts.by_device = vec![one; 6145];
                }),
            ),
            (
                "places of avoided exits",
                Box::new(|record| {
                    let places = &mut record.vcpus[1].clusters.as_mut().expect("clusters").avoided_at;
                    *places = vec![places[0]; MOST_PLACES + 1];
                }),
            ),
            (
                "places of the ends of clusters",
                Box::new(|record| {
                    let places = &mut record.vcpus[1].clusters.as_mut().expect("clusters").ended_at;
                    *places = vec![places[0]; MOST_PLACES + 1];
                }),
            ),
            (
                "causes of userspace exits",
                Box::new(|record| {
                    let one = profile(record).causes[0].clone();
                    profile(record).causes = vec![one; 17409];
                }),
            ),
            (
                "marks",
                Box::new(|record| {
                    let one = profile(record).marks[0];
                    profile(record).marks = vec![one; 1025];
                }),
            ),
            (
                "buckets of a histogram",
                Box::new(|record| {
                    let tally = &mut profile(record).causes[0].outside;
                    tally.histogram = vec![tally.histogram[0]; 1025];
                }),
            ),
            (
                "causes of VM exits",
                Box::new(|record| {
                    let trace = record.trace.iter_mut().flat_map(|trace| &mut trace.vcpus).flatten().last();
                    let causes = &mut trace.expect("a trace").causes;
                    *causes = vec![causes[0].clone(); 33793];
                }),
            ),
            (
                "buckets of a histogram",
                Box::new(|record| {
                    let trace = record.trace.iter_mut().flat_map(|trace| &mut trace.vcpus).flatten().last();
                    let tally = &mut trace.expect("a trace").causes[0].outside;
                    tally.histogram = vec![Bucket { up_to_ns: 1, count: 1 }; 1025];
                }),
            ),
            (
                "events of the MMU",
                Box::new(|record| {
                    let trace = record.trace.as_mut().expect("a trace");
                    trace.mmu = (0..4097).map(|number| (format!("{number}"), 1)).collect();
                }),
            ),
        ];
        for (what, damage) in cases {
            let mut record = with_two_vcpus();
            damage(&mut record);
            let said = record.check_lengths().expect_err(what).to_string();
            assert!(said.contains(what), "{what}: {said}");
        }
    }

    fn with_two_vcpus() -> RunRecord {
        let mut record = sample();
        record.vcpus.push(record.vcpus[0].clone());
        record
    }
}
