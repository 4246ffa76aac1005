//! The MMIO transport and the queues, with drivers that follow the specification and drivers that violate it.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::features::{F_EVENT_IDX, F_VERSION_1};
use super::mock::{Descriptor, Driver, INDIRECT, MEMORY_BYTES, NEEDS_RESET, NEXT, Used, WRITE};
use super::rng::{Rate, Rng};
use proptest::prelude::*;

fn rng() -> Driver {
    Driver::running(Box::new(Rng::new(None).expect("a device")))
}

fn descriptor(gpa: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { gpa, len, flags, next }
}

/// Checks that the device starts after a reset and handles a request.
fn works(driver: &mut Driver) {
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.request(0, &[], &[64]).len(), 64);
}

#[test]
fn random_bytes_fill_the_whole_buffer() {
    let mut driver = rng();
    let bytes = driver.request(0, &[], &[5000, 1, 99]);
    assert_eq!(bytes.len(), 5100);
    assert!(bytes.iter().filter(|byte| **byte == 0).count() < 200);
    driver.wait_interrupt();
    assert_eq!(driver.read(0x60), 1, "used buffer notification");
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn a_rate_is_kept() {
    let mut driver = Driver::running(Box::new(Rng::new(Some(Rate { bytes_per_second: 1000 })).expect("a device")));
    let start = std::time::Instant::now();
    let mut given = 0;
    while given < 1200 {
        given += driver.request(0, &[], &[400]).len();
    }
    assert!(start.elapsed().as_millis() >= 150, "{:?}", start.elapsed());
}

#[test]
fn negotiation_keeps_to_the_rules() {
    let mut driver = Driver::new(Box::new(Rng::new(None).expect("a device")));
    assert_eq!(driver.read(0x0), 0x7472_6976);
    assert_eq!((driver.read(0x4), driver.read(0x8)), (2, 4));
    // FEATURES_OK is refused without VERSION_1, and for features that were not offered.
    for features in [0, F_VERSION_1 | 1] {
        driver.write(0x70, 0);
        driver.write(0x70, 3);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            driver.write(0x24, select);
            driver.write(0x20, half as u32);
        }
        driver.write(0x70, 11);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
    driver.negotiate(0);
    assert_eq!(driver.status(), 11);
    // After FEATURES_OK, features cannot change and status bits cannot be cleared.
    driver.write(0x24, 0);
    driver.write(0x20, 0xffff_ffff);
    driver.write(0x70, 8);
    assert_eq!(driver.status(), 11);
    driver.start(u64::MAX);
    // After DRIVER_OK, queues cannot change.
    driver.write(0x30, 0);
    driver.write(0x44, 0);
    driver.write(0x38, 2);
    assert_eq!(driver.read(0x44), 1);
    // Queues that do not exist.
    driver.write(0x30, 1);
    assert_eq!((driver.read(0x34), driver.read(0x44)), (0, 0));
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0);
    driver.kick(7);
    works(&mut driver);
}

#[test]
fn invalid_sizes_and_addresses_of_queues_are_refused() {
    let mut driver = Driver::new(Box::new(Rng::new(None).expect("a device")));
    driver.negotiate(u64::MAX);
    for size in [0, 3, 128, 0x1_0040] {
        driver.write(0x38, size);
    }
    for (register, value) in [(0x80, MEMORY_BYTES as u32 - 16), (0x90, 0x1000), (0xa0, 0x2000)] {
        driver.write(register, value);
    }
    driver.write(0x44, 1);
    driver.write(0x70, 15);
    assert_ne!(driver.status() & NEEDS_RESET, 0, "rings beyond memory");
    works(&mut driver);
}

/// Each case violates the specification and breaks the queue until a reset.
#[test]
fn broken_rings_need_a_reset_and_a_reset_mends_them() {
    let mut driver = rng();
    type Case = (&'static str, fn(&mut Driver));
    let cases: [Case; 9] = [
        ("a loop", |d| {
            d.put_descriptor(0, 0, descriptor(0x50_0000, 16, WRITE | NEXT, 1));
            d.put_descriptor(0, 1, descriptor(0x50_0000, 16, WRITE | NEXT, 0));
            d.make_available(0, 0);
        }),
        ("a head out of range", |d| d.make_available(0, 64)),
        ("a next out of range", |d| {
            d.put_descriptor(0, 0, descriptor(0x50_0000, 16, WRITE | NEXT, 64));
            d.make_available(0, 0);
        }),
        ("a buffer outside of memory", |d| {
            d.put_descriptor(0, 0, descriptor(MEMORY_BYTES - 8, 16, WRITE, 0));
            d.make_available(0, 0);
        }),
        ("a buffer that wraps", |d| {
            d.put_descriptor(0, 0, descriptor(u64::MAX - 7, 16, WRITE, 0));
            d.make_available(0, 0);
        }),
        ("readable behind writable", |d| {
            d.put_descriptor(0, 0, descriptor(0x50_0000, 16, WRITE | NEXT, 1));
            d.put_descriptor(0, 1, descriptor(0x50_0000, 16, 0, 0));
            d.make_available(0, 0);
        }),
        ("an indirect table of no whole entries", |d| {
            d.put_descriptor(0, 0, descriptor(0x50_0000, 17, INDIRECT, 0));
            d.make_available(0, 0);
        }),
        ("an indirect table outside of memory", |d| {
            d.put_descriptor(0, 0, descriptor(MEMORY_BYTES, 32, INDIRECT, 0));
            d.make_available(0, 0);
        }),
        ("an index that jumps", |d| d.set_available_index(0, 1000)),
    ];
    for (name, case) in cases {
        works(&mut driver);
        case(&mut driver);
        driver.kick(0);
        driver.wait_needs_reset();
        assert!(driver.poll_used(0).is_none_or(|_| name.is_empty()), "{name}");
        // The interrupt follows the change of the status.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while driver.read(0x60) & 2 == 0 {
            assert!(std::time::Instant::now() < deadline, "{name}: no configuration change interrupt");
            std::thread::yield_now();
        }
    }
    works(&mut driver);
}

#[test]
fn an_indirect_table_is_followed_once() {
    use vm_memory::{Bytes, GuestAddress};
    let mut driver = rng();
    let table = driver.buffer(32);
    let mut bytes = Vec::new();
    for (gpa, flags, next) in [(0x60_0000_u64, WRITE | NEXT, 1_u16), (0x61_0000, WRITE, 0)] {
        bytes.extend(gpa.to_le_bytes());
        bytes.extend(100_u32.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
    }
    driver.memory.write_slice(&bytes, GuestAddress(table)).expect("memory");
    driver.put_descriptor(0, 5, descriptor(table, 32, INDIRECT, 0));
    driver.make_available(0, 5);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), Used { head: 5, len: 200 });
}

#[test]
fn interrupts_are_sent_only_where_the_driver_enables_them() {
    use vm_memory::{Bytes, GuestAddress};
    for features in [u64::MAX, !F_EVENT_IDX] {
        let mut driver = Driver::new(Box::new(Rng::new(None).expect("a device")));
        driver.start(features);
        driver.request(0, &[], &[8]);
        driver.wait_interrupt();
        // VRING_AVAIL_F_NO_INTERRUPT; with the event index, an event far ahead.
        driver.memory.write_obj(1_u16, GuestAddress(0x4000)).expect("memory");
        driver.memory.write_obj(60_u16, GuestAddress(0x4000 + 4 + 64 * 2)).expect("memory");
        driver.request(0, &[], &[8]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(driver.interrupts(), 0, "{features:#x}");
    }
}

#[test]
fn invalid_accesses_change_nothing() {
    let mut driver = rng();
    for offset in [0_u64, 1, 2, 0x70, 0x72, 0x100, 0xfff, 0x1000, u64::MAX] {
        for len in [0_usize, 1, 2, 3, 5, 8] {
            driver.read_bytes(offset, &mut vec![0; len]);
            if offset != 0x70 {
                driver.write_bytes(offset, &vec![0xa5; len]);
            }
        }
    }
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.request(0, &[], &[4]).len(), 4);
}

#[test]
fn available_requests_are_handled_before_the_stop() {
    let mut driver = rng();
    driver.submit(0, &[], &[128]);
    driver.device().request_stop();
    driver.device().wait_stopped(std::time::Instant::now() + std::time::Duration::from_secs(10));
    assert_eq!(driver.poll_used(0).map(|used| used.len), Some(128));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_ring_is_survived(
        descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..70), 1..20),
        heads in proptest::collection::vec(0_u16..70, 1..8),
        small in any::<bool>(),
    ) {
        let mut driver = rng();
        for (index, (gpa, len, flags, next)) in (0_u16..).zip(&descriptors) {
            let (gpa, len) = if small { (gpa % MEMORY_BYTES, len % 8192) } else { (*gpa, *len) };
            driver.put_descriptor(0, index, descriptor(gpa, len, *flags, *next));
        }
        for head in heads {
            driver.make_available(0, head);
        }
        driver.kick(0);
        // A reset must work whatever is in the rings.
        works(&mut driver);
    }

    #[test]
    fn any_register_write_is_survived(writes in proptest::collection::vec((0_u64..0x140, any::<u32>(), 0_u8..3), 0..60)) {
        let mut driver = rng();
        for (register, value, kind) in writes {
            match kind {
                0 => driver.write(register & !3, value % 8),
                1 => driver.write(register & !3, value),
                _ => driver.write_bytes(register, &value.to_le_bytes()[..(value % 5) as usize]),
            }
        }
        works(&mut driver);
    }
}
