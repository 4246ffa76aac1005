use super::*;

const RIP: u64 = 0xffff_ffff_8123_4567;

/// A tracefs with the fields that are read, as Linux 6.1 lays them out.
fn tracefs() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let put = |name: &str, id: u16, fields: &[(&str, usize, usize)]| {
        let folder = root.path().join("events/kvm").join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut text = format!(
            "name: {name}\nID: {id}\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
        );
        for (field, offset, size) in fields {
            text += &format!("\tfield:unsigned long {field};\toffset:{offset};\tsize:{size};\tsigned:0;\n");
        }
        std::fs::write(folder.join("format"), text).expect("written");
    };
    put(
        "kvm_exit",
        10,
        &[("exit_reason", 8, 4), ("guest_rip", 16, 8), ("isa", 24, 4), ("info1", 32, 8), ("info2", 40, 8)],
    );
    put("kvm_entry", 11, &[("vcpu_id", 8, 4)]);
    put("kvm_msr", 12, &[("ecx", 12, 4)]);
    put("kvm_cpuid", 13, &[("function", 8, 4)]);
    root
}

fn exit(code: u32, rip: u64, info1: u64, info2: u64) -> Vec<u8> {
    let mut raw = vec![0; 48];
    raw[..2].copy_from_slice(&10_u16.to_le_bytes());
    raw[8..12].copy_from_slice(&code.to_le_bytes());
    raw[16..24].copy_from_slice(&rip.to_le_bytes());
    raw[24..28].copy_from_slice(&2_u32.to_le_bytes());
    raw[32..40].copy_from_slice(&info1.to_le_bytes());
    raw[40..48].copy_from_slice(&info2.to_le_bytes());
    raw
}

fn other(id: u16, offset: usize, value: u32) -> Vec<u8> {
    let mut raw = vec![0; 16];
    raw[..2].copy_from_slice(&id.to_le_bytes());
    raw[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    raw
}

fn entry() -> Vec<u8> {
    other(11, 8, 0)
}

fn collect(records: &[(u64, Vec<u8>)]) -> VmRecord {
    let root = tracefs();
    let events = Events::read(root.path(), root.path()).expect("formats");
    let mut collector = Collector::new(vec![GpaRange { start: 0, bytes: 0x1000_0000 }], 1000);
    records.iter().for_each(|(time, raw)| collector.record(&events, *time, raw));
    collector.finish()
}

fn only(profile: &VmRecord) -> (VmCause, TallyRecord) {
    let [VmCauseRecord { cause, outside }] = &profile.causes[..] else { panic!("one cause: {:?}", profile.causes) };
    (*cause, outside.clone())
}

#[test]
fn an_exit_has_its_detail_and_its_time() {
    let profile = collect(&[
        (2000, exit(0x7b, RIP, 0x3f8 << 16 | 1 << 4, 0)),
        (2700, entry()),
        (3000, exit(0x7b, RIP, 0x3f8 << 16 | 1 << 4, 0)),
        (3300, entry()),
    ]);
    let (cause, tally) = only(&profile);
    assert_eq!(cause.detail, VmDetail::Port { port: 0x3f8, size: 1, kind: AccessKind::Write });
    assert_eq!((cause.rip, tally.count, tally.ns, tally.max_ns), (RIP, 2, 1000, 700));
    assert_eq!((cause.isa, cause.code), (Isa::Svm, 0x7b));
    assert_eq!((profile.lost, profile.untraced, profile.first_kernel_ns), (0, 0, Some(1000)));
}

#[test]
fn msr_and_leaf_come_from_their_own_tracepoints() {
    let profile = collect(&[(0, exit(0x7c, RIP, 1, 0)), (1, other(12, 12, 0x6e0)), (2, entry())]);
    assert_eq!(only(&profile).0.detail, VmDetail::Msr { index: Some(0x6e0), kind: AccessKind::Write });
    let profile = collect(&[(0, exit(0x72, RIP, 0, 0)), (1, other(13, 8, 0x4000_0000)), (2, entry())]);
    assert_eq!(only(&profile).0.detail, VmDetail::Leaf(0x4000_0000));
}

#[test]
fn an_msr_of_the_fast_path_is_told_before_its_exit() {
    let profile = collect(&[(0, other(12, 12, 0x6e0)), (1, exit(0x7c, RIP, 1, 0)), (2, entry())]);
    assert_eq!(only(&profile).0.detail, VmDetail::Msr { index: Some(0x6e0), kind: AccessKind::Write });
    let entries = collect(&[(0, entry()), (1, exit(0x60, RIP, 0, 0)), (2, entry()), (3, entry())]);
    assert_eq!(entries.untraced, 1, "an entry without an exit before it");
}

#[test]
fn a_fault_is_the_memorys_or_a_devices() {
    let memory = collect(&[(0, exit(0x400, RIP, 6, 0xfff_ffff))]);
    assert_eq!(only(&memory).0.detail, VmDetail::Memory { kind: AccessKind::Write });
    let device = collect(&[(0, exit(0x400, RIP, 4, 0xfec0_0010))]);
    let (cause, tally) = only(&device);
    assert_eq!(cause.detail, VmDetail::Device { gpa: 0xfec0_0010, kind: AccessKind::Read });
    assert_eq!((tally.count, tally.histogram.len()), (1, 0), "counted, though it was never followed by an entry");
}

#[test]
fn short_and_foreign_records_are_survived() {
    let profile =
        collect(&[(0, vec![]), (0, vec![10]), (0, vec![10, 0]), (0, vec![10, 0, 1]), (0, vec![99, 99, 0, 0])]);
    assert_eq!(profile.causes.len(), 0);
}

#[test]
fn a_guest_cannot_make_a_profile_grow_without_end() {
    let root = tracefs();
    let events = Events::read(root.path(), root.path()).expect("formats");
    let mut collector = Collector::new(Vec::new(), 0);
    for n in 0..50_000_u64 {
        collector.record(&events, n, &exit(0x400, n, 0, n << 12));
        collector.record(&events, n + 1, &entry());
    }
    let profile = collector.finish();
    assert!(profile.causes.len() <= 2 * MAX_CAUSES + 1);
    assert_eq!(profile.causes.iter().map(|record| record.outside.count).sum::<u64>(), 50_000);
}
