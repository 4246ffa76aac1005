//! What one userspace exit costs in hwvmm itself: naming, handling, counting, remembering; without and with the profiler
//! that `--stats` turns on. Holds the claim that what is off is free. Run with `cargo bench`.

use hwvmm::exit::recent::Detail;
use hwvmm::exit::{Counters, ExitReason, Handler, HandlerTime, NoProfile, Profiler, Recent, Snapshot};
use hwvmm::kvm::{Direction, Exit};
use hwvmm_devices::BusBuilder;
use hwvmm_devices::legacy::PostPort;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const EXITS: u32 = 2_000_000;
const ROUNDS: usize = 7;

fn handler() -> Handler {
    let mut pio = BusBuilder::default();
    for port in [0x60, 0x64, 0x80, 0x3f8, 0x505, 0x600] {
        pio.insert(port, 1, "port", Arc::new(PostPort::default())).expect("free");
    }
    Handler { pio: pio.freeze(), mmio: BusBuilder::default().freeze() }
}

/// Nanoseconds an exit, the best of some rounds: what else the machine does only adds.
fn measure<P: Profiler>(new: impl Fn() -> P) -> f64 {
    let handler = handler();
    let round = || {
        let (mut profiler, mut recent) = (new(), Recent::default());
        let mut counters = Counters::new(&handler.pio, &handler.mmio);
        let start = Instant::now();
        for _ in 0..EXITS {
            let mut data = [0x41];
            let mut exit = Exit::Pio { port: black_box(0x3f8), direction: Direction::Out, size: 1, data: &mut data };
            let reason = ExitReason::of(&exit);
            let stamp = profiler.stamp();
            let handled = handler.handle(&mut exit);
            profiler.record(reason, stamp);
            counters.record(reason, handled.route);
            recent.push(Snapshot { reason, detail: Detail::of(&exit), rip: None });
            black_box(&handled.outcome);
        }
        black_box((&counters, &recent, profiler.handler_ns()));
        start.elapsed().as_secs_f64() * 1e9 / f64::from(EXITS)
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn main() {
    let (off, on) = (measure(|| NoProfile), measure(HandlerTime::default));
    println!("one exit in hwvmm, profiler off: {off:.1} ns");
    println!("one exit in hwvmm, profiler on:  {on:.1} ns (two readings of the clock)");
    assert!(off < on, "the profiler that is off must cost less than the one that is on");
}
