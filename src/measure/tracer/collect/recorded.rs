//! VM exits as text, through the real parser: the formats are those of Linux 6.1. Those of an Intel processor's paging are recorded;
//! those of APICv and AVIC are put together from the manuals' tables.

use super::*;
use hwvmm_arch::exit_code::Register;
use std::fs;

/// Names and formats of the tracepoints.
const FORMATS: [(&str, &str); 5] = [
    ("kvm_exit", include_str!("linux-6.1/kvm_exit")),
    ("kvm_entry", include_str!("linux-6.1/kvm_entry")),
    ("kvm_msr", include_str!("linux-6.1/kvm_msr")),
    ("kvm_cpuid", include_str!("linux-6.1/kvm_cpuid")),
    ("kvm_page_fault", include_str!("linux-6.1/kvm_page_fault")),
];

/// Exits on shadow paging, 1,000 of them.
pub(crate) const VMX_EPT0: &str = include_str!("linux-6.1/vmx-ept0");
/// Exits of a guest that arms the timer in xAPIC mode, where the processor virtualizes the APIC.
pub(crate) const VMX_APICV: &str = include_str!("linux-6.1/vmx-apicv");
/// The same on AMD.
pub(crate) const SVM_AVIC: &str = include_str!("linux-6.1/svm-avic");
/// Exits on nested paging.
pub(crate) const VMX_EPT1: &str = include_str!("linux-6.1/vmx-ept1");

fn number(text: &str) -> u64 {
    let hex = text.strip_prefix("0x").map(|hex| u64::from_str_radix(hex, 16));
    hex.unwrap_or_else(|| text.parse()).expect("a number")
}

/// The bytes of a record: `NAME FIELD=VALUE ...`.
fn raw(text: &str) -> Vec<u8> {
    let mut words = text.split_whitespace();
    let name = words.next().expect("a name");
    let (_, format) = FORMATS.iter().find(|(known, _)| *known == name).expect("a known tracepoint");
    let format = Format::parse(format).expect("a format");
    let mut raw = vec![0; 64];
    raw[..2].copy_from_slice(&format.id.to_le_bytes());
    for (field, value) in words.map(|word| word.split_once('=').expect("FIELD=VALUE")) {
        format.field(field).expect("a field").put(&mut raw, number(value));
    }
    raw
}

/// What a collector makes of records: each line says how often, and which records follow one another.
pub(crate) fn collect(records: &str) -> VmRecord {
    let root = tempfile::tempdir().expect("a folder");
    for (name, format) in FORMATS {
        let folder = root.path().join("events/kvm").join(name);
        fs::create_dir_all(&folder).expect("made");
        fs::write(folder.join("format"), format).expect("written");
    }
    fs::create_dir_all(root.path().join("module/kvm_intel")).expect("made");
    let events = Events::read(root.path(), root.path()).expect("formats");
    let mut collector = Collector::new(vec![GpaRange { start: 0, bytes: 0x1000_0000 }], 0);
    let mut time_ns = 0;
    for line in records.lines().filter(|line| !line.starts_with('#')) {
        let (times, records) = line.split_once(' ').expect("a count");
        let records: Vec<Vec<u8>> = records.split('|').map(raw).collect();
        for record in (0..number(times)).flat_map(|_| &records) {
            time_ns += 1_000;
            collector.record(&events, time_ns, record);
        }
    }
    collector.finish()
}

fn count(record: &VmRecord, what: impl Fn(&VmCause) -> bool) -> u64 {
    record.causes.iter().filter(|one| what(&one.cause)).map(|one| one.outside.count).sum()
}

fn event(kind: EventKind, vector: u8) -> VmDetail {
    VmDetail::Event(Event { kind, vector })
}

#[test]
fn exits_on_shadow_paging_have_vectors_and_registers() {
    let record = collect(VMX_EPT0);
    assert_eq!(count(&record, |_| true), 1000);
    use AccessKind::{Read, Write};
    let register = |register, kind| VmDetail::Register(RegisterAccess { register, kind });
    for (code, detail, expected) in [
        (14, VmDetail::None, 610),
        (28, register(Register::Control(3), Write), 140),
        (28, register(Register::Control(3), Read), 2),
        (28, register(Register::Control(4), Write), 6),
        (28, register(Register::Control(0), Write), 1),
        (29, register(Register::Debug(7), Write), 2),
        (0, event(EventKind::Exception, 14), 110),
        (0, event(EventKind::Exception, 7), 3),
        (0, event(EventKind::Nmi, 2), 2),
        (1, event(EventKind::Interrupt, 0xec), 40),
        (1, event(EventKind::Interrupt, 0xfd), 5),
        (32, VmDetail::Msr { index: Some(0x6e0), kind: AccessKind::Write }, 22),
        (31, VmDetail::Msr { index: Some(0x1b), kind: AccessKind::Read }, 8),
        (10, VmDetail::Leaf(0x4000_0000), 4),
    ] {
        assert_eq!(count(&record, |cause| (cause.code, cause.detail) == (code, detail)), expected, "{code} {detail:?}");
    }
}

#[test]
fn only_interrupts_of_the_host_are_counted_as_such() {
    let record = collect(VMX_EPT0);
    let of = |class| count(&record, |cause| cause.class() == class);
    assert_eq!(of(Class::Interrupt), 40 + 5 + 2, "external interrupts and NMIs");
    assert_eq!(of(Class::Timer), 20 + 22, "the preemption timer, and writes of TSC_DEADLINE");
    assert_eq!((of(Class::Window), of(Class::Exception), of(Class::Msr)), (25, 113, 8));
    let timeline = |class| record.timeline.iter().filter(|at| at.key == class).map(|at| at.count).sum::<u64>();
    assert_eq!((timeline(Class::Interrupt), timeline(Class::Window)), (47, 25));
}

#[test]
fn ept_violations_have_their_address() {
    let record = collect(VMX_EPT1);
    let of = |detail| count(&record, |cause| cause.detail == detail);
    assert_eq!(of(VmDetail::Memory { kind: AccessKind::Write }), 30);
    assert_eq!(of(VmDetail::Device { gpa: 0xfec0_0010, kind: AccessKind::Read }), 10);
    assert_eq!(of(VmDetail::Port { port: 0x3f8, size: 1, kind: AccessKind::Write }), 9);
}

#[test]
fn windows_and_nmis_of_svm_are_told_apart_too() {
    let class = |code, detail| VmCause { isa: Isa::Svm, code, detail, rip: 0, early: false }.class();
    assert_eq!((class(0x60, VmDetail::None), class(0x64, VmDetail::None)), (Class::Interrupt, Class::Window));
    assert_eq!((class(0x61, event(EventKind::Nmi, 2)), class(0x74, VmDetail::None)), (Class::Interrupt, Class::Window));
    let arm = |index| VmDetail::Msr { index: Some(index), kind: AccessKind::Write };
    assert_eq!((class(0x7c, arm(0x838)), class(0x7c, arm(0x830))), (Class::Timer, Class::Msr));
    let apic = VmDetail::Device { gpa: 0xfee0_0380, kind: AccessKind::Write };
    assert_eq!(class(0x400, apic), Class::Timer, "the initial count in xAPIC mode");
}

#[test]
fn the_timer_is_told_from_the_apic_where_the_processor_has_one_for_guests() {
    for (records, isa) in [(VMX_APICV, Isa::Vmx), (SVM_AVIC, Isa::Svm)] {
        let record = collect(records);
        assert!(record.causes.iter().all(|one| one.cause.isa == isa));
        let of = |class| count(&record, |cause| cause.class() == class);
        assert_eq!((of(Class::Timer), of(Class::Apic)), (30, 12), "{isa:?}");
        let initial_count = VmDetail::Device { gpa: 0xfee0_0380, kind: AccessKind::Write };
        assert_eq!(count(&record, |cause| cause.detail == initial_count), 30, "{isa:?}");
        let current_count = VmDetail::Device { gpa: 0xfee0_0390, kind: AccessKind::Read };
        assert_eq!(count(&record, |cause| cause.detail == current_count), 5, "{isa:?}");
        let timeline = |class| record.timeline.iter().filter(|at| at.key == class).map(|at| at.count).sum::<u64>();
        assert_eq!((timeline(Class::Timer), timeline(Class::Apic)), (30, 12), "{isa:?}");
    }
}
