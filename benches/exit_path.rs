//! The cost of one userspace exit in hwvmm itself: decoding the reason, handling, counting, and recording it. There are four
//! variants: without the profiler's hook (plain), with the hook and no profiler (off; every run without `--stats` and
//! `--profile`), with the times of `--stats` (stats), and with `--profile` (profile). It checks that a profiler that is off
//! costs nothing. Run it with `cargo bench --bench exit_path`. With the name of a variant only that one runs, for a tool that
//! counts instructions (scripts/profile-cost).

use hwvmm::exit::{ExitReason, Handler};
use hwvmm::kvm::{Direction, Exit, clock};
use hwvmm::measure::flight_recorder::Detail;
use hwvmm::measure::{Counters, ExitRecord, FlightRecorders, HandlerTime, NoProfile, Profiler, UserProfile};
use hwvmm_devices::BusBuilder;
use hwvmm_devices::legacy::PostPort;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const ROUNDS: usize = 7;

fn handler() -> Handler {
    let mut pio = BusBuilder::default();
    for port in [0x60, 0x64, 0x80, 0x3f8, 0x505, 0x600] {
        pio.insert(port, 1, "port", Arc::new(PostPort::default())).expect("free");
    }
    Handler { pio: pio.freeze(), mmio: BusBuilder::default().freeze(), ring: None }
}

fn exit(data: &mut [u8; 1]) -> Exit<'_> {
    Exit::Pio { port: black_box(0x3f8), direction: Direction::Out, size: 1, data }
}

/// The body of the run loop. The parts of the hook are in brackets: before KVM_RUN, before handling, after it, at the end.
macro_rules! run_loop {
    ($exits:ident, [$($enter:tt)*] [$($stamp:tt)*] [$exit:ident, $handled:ident, $($record:tt)*] [$($finish:tt)*]) => {
        let handler = handler();
        let flight_recorder = FlightRecorders::new(1).expect("memory").of_vcpu(0).expect("a recorder");
        let mut counters = Counters::new(&handler.pio, &handler.mmio);
        for _ in 0..$exits {
            $($enter)*
            let mut data = [0x41];
            let mut exit = exit(&mut data);
            let reason = ExitReason::of(&exit);
            $($stamp)*
            let $handled = handler.handle(&mut exit);
            let $exit = ExitRecord { reason, detail: Detail::of(&exit), rip: None, cpl: None, tsc: clock::tsc() };
            $($record)*
            counters.record(reason, $handled.route);
            flight_recorder.push($exit);
            black_box(&$handled.outcome);
        }
        black_box((&counters, &flight_recorder));
        $($finish)*
    };
}

/// The run loop without the hook.
#[inline(never)]
fn plain(exits: u32) {
    run_loop!(exits, [] [] [record, handled,] []);
}

/// The run loop with the hook of `profiler`.
#[inline(never)]
fn hooked<P: Profiler>(exits: u32, mut profiler: P) {
    run_loop!(
        exits,
        [profiler.enter();]
        [let stamp = profiler.stamp();]
        [record, handled, profiler.record(record, handled.route, stamp);]
        [black_box(profiler.finish());]
    );
}

fn run(variant: &str, exits: u32) {
    match variant {
        "plain" => plain(exits),
        "off" => hooked(exits, NoProfile),
        "stats" => hooked(exits, HandlerTime::default()),
        "profile" => hooked(exits, UserProfile::new(Instant::now())),
        other => {
            eprintln!("unknown variant '{other}': plain, off, stats or profile");
            std::process::exit(2);
        }
    }
}

/// Nanoseconds for an exit: the least of some rounds, because other work of the host can only add time.
fn measure(variant: &str) -> f64 {
    const EXITS: u32 = 2_000_000;
    let round = || {
        let start = Instant::now();
        run(variant, EXITS);
        start.elapsed().as_secs_f64() * 1e9 / f64::from(EXITS)
    };
    (0..ROUNDS).map(|_| round()).fold(f64::INFINITY, f64::min)
}

fn main() {
    if let Some(variant) = std::env::args().nth(1).filter(|word| !word.starts_with('-')) {
        let exits = std::env::args().nth(2).and_then(|word| word.parse().ok()).unwrap_or(100_000);
        return run(&variant, exits);
    }
    let [plain, off, stats, profile] = ["plain", "off", "stats", "profile"].map(measure);
    println!("one exit in hwvmm, without the profiler's hook: {plain:.1} ns");
    println!("one exit in hwvmm, with the hook, profiler off: {off:.1} ns");
    println!("one exit in hwvmm, times of --stats:            {stats:.1} ns");
    println!("one exit in hwvmm, --profile:                   {profile:.1} ns");
    assert!(off < stats && stats < profile, "a profiler that is off must cost less than one that is on");
}
