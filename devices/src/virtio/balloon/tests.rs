//! The balloon, from the driver and from the host.

use super::control::PAGE_BYTES;
use super::{Balloon, FreePageReporting};
use crate::virtio::mock::{Descriptor, Driver, NEXT, WRITE};
use vm_memory::{Bytes, GuestAddress};

#[test]
fn inflated_pages_are_discarded_and_read_as_zeros() {
    let device = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    let control = device.control();
    let mut driver = Driver::running(Box::new(device));
    let _ = driver.interrupts();
    control.set_target(8 << 20);
    assert_eq!((driver.read(0x100), driver.interrupts()), (2048, 1));
    for page in 0x800_u64..0x803 {
        driver.memory.write_obj(page, GuestAddress(page * PAGE_BYTES)).expect("memory");
    }
    // Not sorted, one twice, and some outside of guest memory.
    let numbers: Vec<u8> =
        [0x802_u32, 0x800, 0x802, u32::MAX, 0x10_0000].iter().flat_map(|number| number.to_le_bytes()).collect();
    driver.request(0, &[&numbers, &[1, 2, 3]], &[]);
    let first = |page: u64| driver.memory.read_obj::<u64>(GuestAddress(page * PAGE_BYTES)).expect("memory");
    assert_eq!([0x800, 0x801, 0x802].map(first), [0, 0x801, 0]);
    driver.request(1, &[&numbers], &[]);
    driver.write_bytes(0x104, &2_u32.to_le_bytes());
    assert_eq!((control.actual(), control.target()), (8192, 8 << 20));
    // The driver cannot write the target.
    driver.write_bytes(0x100, &[9; 4]);
    driver.write_bytes(0x105, &[9; 4]);
    assert_eq!((driver.read(0x100), driver.read(0x104)), (2048, 2));
}

#[test]
fn reported_pages_are_discarded() {
    let device = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    let control = device.control();
    let mut driver = Driver::running(Box::new(device));
    let submitted = driver.submit(3, &[], &[4096]);
    driver.wait_used(3);
    // The host refuses to discard a buffer that is not a whole page.
    let aligned = submitted.writable[0].gpa.is_multiple_of(4096);
    assert_eq!(control.reported(), if aligned { 4096 } else { 0 });
}

#[test]
fn statistics_are_reported_on_request() {
    let device = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    let control = device.control();
    let mut driver = Driver::running(Box::new(device));
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let stats = [entry(4, 1 << 30), entry(5, 2 << 30), entry(999, 7), vec![1, 2]].concat();
    let submitted = driver.submit(2, &[&stats], &[]);
    let start = std::time::Instant::now();
    while control.stats().values[4].is_none() || driver.poll_used(2).is_none() {
        assert!(start.elapsed().as_secs() < 10, "no statistics");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(control.stats().values[4..6], [Some(1 << 30), Some(2 << 30)]);
    assert_eq!(submitted.head, 0);
}

#[test]
fn a_report_of_more_than_1_gib_is_refused() {
    let mut driver = Driver::running(Box::new(Balloon::new(0, FreePageReporting::On).expect("a balloon")));
    for (mib, refused) in [(8, false), (9, true)] {
        for index in 0..128 {
            let (flags, next) = if index < 127 { (WRITE | NEXT, index + 1) } else { (WRITE, 0) };
            driver.put_descriptor(3, index, Descriptor { gpa: 0x40_0000, len: mib << 20, flags, next });
        }
        driver.make_available(3, 0);
        driver.kick(3);
        if refused {
            driver.wait_needs_reset();
        } else {
            driver.wait_used(3);
        }
    }
}

#[test]
fn ten_statistics_are_read_at_most() {
    let device = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    let control = device.control();
    let mut driver = Driver::running(Box::new(device));
    let entry = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let stats: Vec<u8> = (0..10).flat_map(|tag| entry(tag, 100)).chain(entry(4, 200)).collect();
    driver.submit(2, &[&stats], &[]);
    let start = std::time::Instant::now();
    while control.stats().values[9].is_none() || driver.poll_used(2).is_none() {
        assert!(start.elapsed().as_secs() < 10, "no statistics");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(control.stats().values, [Some(100); 10]);
}

/// The new balloon has the size of the old one, and the driver's buffer for statistics, which the device kept.
#[test]
fn a_new_balloon_goes_on_where_the_old_one_was() {
    let old = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    old.control().set_target(8 << 20);
    let mut driver = Driver::running(Box::new(old));
    driver.write_bytes(0x104, &7_u32.to_le_bytes());
    let stats: Vec<u8> = 4_u16.to_le_bytes().into_iter().chain(9_u64.to_le_bytes()).collect();
    let kept = driver.submit(2, &[&stats], &[]);
    let new = Balloon::new(0, FreePageReporting::On).expect("a balloon");
    let control = new.control();
    driver.replace(Box::new(new)).expect("restored");
    assert_eq!((control.target(), control.actual()), (8 << 20, 7 * PAGE_BYTES));
    assert_eq!((driver.read(0x100), driver.read(0x104)), (2048, 7));
    assert!(driver.device().resume());
    let start = std::time::Instant::now();
    while control.stats().values[4] != Some(9) {
        assert!(start.elapsed().as_secs() < 10, "no statistics");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert_eq!(driver.wait_used(2).head, u32::from(kept.head));
    let _ = driver.interrupts();
    control.set_target(4 << 20);
    assert_eq!((driver.read(0x100), driver.interrupts()), (1024, 1));
    driver.request(0, &[&0x800_u32.to_le_bytes()], &[]);
}
