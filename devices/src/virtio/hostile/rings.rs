//! Hostile drivers of rings: rings that lie anywhere, and memory that changes while the device works on a request.

use super::super::features::F_VERSION_1;
use super::super::mock::{Driver, MEMORY_BYTES};
use super::{Source, device};
use std::error::Error;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::{Bytes, GuestAddress};

/// Requests that a driver leaves to a device while its memory changes.
const CONCURRENT_REQUESTS: usize = 64;

/// Puts the rings of all queues where the input says, which may be anywhere and on top of each other, and lets the device run.
/// Afterwards the device must be able to start after a reset.
///
/// # Errors
/// Returns an error where the device cannot be made.
///
/// # Panics
/// Panics where the device does not start again.
pub fn place_rings(bytes: &[u8], folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut source = Source(bytes);
    let mut driver = Driver::new(device(source.byte(), folder)?);
    while !source.0.is_empty() {
        driver.negotiate(u64::MAX);
        for queue in 0..driver.queues() {
            place(&driver, queue, &mut source);
        }
        fill(&driver, &mut source);
        driver.write(0x70, 15);
        for queue in 0..driver.queues() {
            driver.kick(queue);
        }
    }
    driver.start(F_VERSION_1);
    assert_eq!(driver.status(), 15, "a reset and a start");
    Ok(())
}

/// Addresses near each other, so that areas overlap in every way.
fn place(driver: &Driver, queue: usize, source: &mut Source<'_>) {
    driver.write(0x30, u32::try_from(queue).unwrap_or(0));
    driver.write(0x38, 1 << (source.byte() % 12));
    let base = source.gpa();
    for register in [0x80, 0x90, 0xa0] {
        let gpa = match source.byte() % 4 {
            0 => source.gpa(),
            _ => base.wrapping_add(u64::from(source.short() % 512) * 2),
        };
        let [a, b, c, d, e, f, g, h] = gpa.to_le_bytes();
        driver.write(register, u32::from_le_bytes([a, b, c, d]));
        driver.write(register + 4, u32::from_le_bytes([e, f, g, h]));
    }
    driver.write(0x44, u32::from(source.byte() != 0));
}

/// Fills a piece of memory with a pattern, so that rings there have entries.
fn fill(driver: &Driver, source: &mut Source<'_>) {
    let pattern: Vec<u8> = (0..16).map(|_| source.byte()).collect();
    let gpa = source.gpa().min(MEMORY_BYTES - 0x4000);
    let _ = driver.memory.write_slice(&pattern.repeat(0x400), GuestAddress(gpa));
}

/// Submits requests while another thread changes the rings and the buffers as the input says. Afterwards the device must be able
/// to start after a reset.
///
/// # Errors
/// Returns an error where the device cannot be made.
///
/// # Panics
/// Panics where the device does not start again.
pub fn drive_concurrently(bytes: &[u8], folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut source = Source(bytes);
    let mut driver = Driver::new(device(source.byte(), folder)?);
    driver.start(u64::MAX);
    let (memory, stop) = (driver.memory.clone(), AtomicBool::new(false));
    let changes = source.0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                let mut source = Source(changes);
                while !source.0.is_empty() && !stop.load(Ordering::Acquire) {
                    // The rings of the first queues lie at the start of memory, the buffers from 4 MiB on.
                    let base = if source.byte().is_multiple_of(2) { 0 } else { 0x40_0000 };
                    let gpa = base + u64::from(source.short());
                    let _ = memory.write_obj(source.word(), GuestAddress(gpa));
                }
                std::thread::yield_now();
            }
        });
        for _ in 0..CONCURRENT_REQUESTS {
            let queue = usize::from(source.byte()) % driver.queues();
            let mut request = [0; 64];
            request.iter_mut().for_each(|byte| *byte = source.byte());
            driver.submit(queue, &[&request[..16], &request[16..]], &[512, 1]);
        }
        stop.store(true, Ordering::Release);
    });
    driver.start(F_VERSION_1);
    assert_eq!(driver.status(), 15, "a reset and a start");
    Ok(())
}
