//! `hwvmm top`: what a running machine exits for, right now.

use super::output::{fail, print_text};
use crate::control::protocol::{AccessSpace, LiveExits};
use crate::control::{ClientError, Request, RequestError, Response, request};
use crate::escape::plain;
use crate::exit::ExitReason;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::widgets::{self, Paragraph, Row};
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{IsTerminal, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a machine may take from its control socket to its first instruction.
const STARTUP: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(super) struct Args {
    /// Control socket that the machine was started with (--api)
    socket: PathBuf,

    /// Print the rates of one interval and end, for scripts
    #[arg(long)]
    once: bool,

    /// Seconds between two readings (0.1 to 3600)
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = interval)]
    interval: Duration,
}

/// `--interval` is out of range, or no number.
#[derive(Debug, Error)]
#[error("it must be a number of seconds from 0.1 to 3600")]
struct IntervalError;

fn interval(text: &str) -> Result<Duration, IntervalError> {
    let seconds: f64 = text.parse().map_err(|_| IntervalError)?;
    if (0.1..=3600.0).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(IntervalError) }
}

/// Rows of a table at most. A guest can exit for thousands of addresses on each of 254 vCPUs.
const MAX_ROWS: usize = 1000;

/// The vCPUs that have exited for a cause, in ascending order of their indices, with their counts. It takes no more memory than the
/// response that it is made from.
type VcpuCounts = Vec<(usize, u64)>;

/// Counts of a machine at one moment, by cause.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Time since the vCPUs were started, in nanoseconds.
    at_ns: u64,
    /// The number of vCPUs.
    vcpus: usize,
    /// Userspace exits by cause: reason, or device and direction of the access.
    userspace: BTreeMap<String, VcpuCounts>,
    /// KVM's own counters, by the kernel's name.
    kvm: BTreeMap<String, VcpuCounts>,
}

/// Adds a vCPU's count to a cause. The vCPUs come in ascending order.
fn add(causes: &mut BTreeMap<String, VcpuCounts>, cause: &str, vcpu: usize, count: u64) {
    if count == 0 {
        return;
    }
    let counts = causes.entry(plain(cause)).or_default();
    match counts.last_mut() {
        Some((last, sum)) if *last == vcpu => *sum = sum.saturating_add(count),
        _ => counts.push((vcpu, count)),
    }
}

/// Returns true if exits of this reason are listed by device, too.
fn is_access(reason: ExitReason) -> bool {
    use ExitReason::{MmioRead, MmioWrite, MsrRead, MsrWrite, PioIn, PioOut};
    matches!(reason, PioIn | PioOut | MmioRead | MmioWrite | MsrRead | MsrWrite)
}

impl From<LiveExits> for Counts {
    fn from(live: LiveExits) -> Self {
        let vcpus = live.vcpus.len();
        let (mut userspace, mut kvm) = (BTreeMap::new(), BTreeMap::new());
        for (index, vcpu) in live.vcpus.into_iter().enumerate() {
            let exits = vcpu.userspace_exits.unwrap_or_default();
            for device in exits.by_device {
                let name = match (&device.device, device.bus) {
                    (Some(name), _) => format!(" {name}"),
                    (None, AccessSpace::Msr) => String::new(),
                    (None, AccessSpace::Pio | AccessSpace::Mmio) => " (unmapped)".to_owned(),
                };
                for (count, access) in [(device.reads, "read"), (device.writes, "write")] {
                    let cause = format!("{} {:#x}{name} {access}", device.bus.name(), device.address);
                    add(&mut userspace, &cause, index, count);
                }
            }
            add(&mut userspace, "other addresses", index, exits.beyond);
            for (reason, count) in exits.by_reason.into_iter().filter(|(reason, _)| !is_access(*reason)) {
                add(&mut userspace, reason.name(), index, count);
            }
            for (name, count) in vcpu.kvm {
                add(&mut kvm, &name, index, count);
            }
        }
        Self { at_ns: live.at_ns, vcpus, userspace, kvm }
    }
}

/// One row of the output: exits a second of one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rate {
    name: String,
    /// Exits a second of each vCPU, by its index.
    each: Vec<u64>,
    /// Exits a second of all vCPUs together.
    sum: u64,
}

/// Rates of one sort, highest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Table {
    /// The first [`MAX_ROWS`].
    rows: Vec<Rate>,
    /// The number of causes that are left out.
    more: usize,
    /// Exits a second of all causes.
    sum: u64,
}

/// Rates between two readings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rates {
    userspace: Table,
    kvm: Table,
}

/// The rates of all causes. `ns` is the time between the readings in nanoseconds.
fn rates(before: &BTreeMap<String, VcpuCounts>, after: &BTreeMap<String, VcpuCounts>, vcpus: usize, ns: u64) -> Table {
    let per_second =
        |more: u64| u64::try_from(u128::from(more) * 1_000_000_000 / u128::from(ns.max(1))).unwrap_or(u64::MAX);
    let rate = |(name, counts)| -> (&String, u64, VcpuCounts) {
        let counts: &VcpuCounts = counts;
        let old: &[(usize, u64)] = before.get(name).map_or(&[], |counts: &VcpuCounts| counts);
        let old = |vcpu| old.binary_search_by_key(&vcpu, |(vcpu, _)| *vcpu).ok().and_then(|at| old.get(at));
        let of = |(vcpu, count): &(usize, u64)| {
            (*vcpu, per_second(count.saturating_sub(old(*vcpu).map_or(0, |(_, count)| *count))))
        };
        let each: VcpuCounts = counts.iter().map(of).collect();
        (name, each.iter().fold(0_u64, |sum, (_, rate)| sum.saturating_add(*rate)), each)
    };
    let mut all: Vec<(&String, u64, VcpuCounts)> = after.iter().map(rate).filter(|(_, sum, _)| *sum > 0).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    let row = |(name, sum, counts): &(&String, u64, VcpuCounts)| {
        let mut each = vec![0; vcpus];
        for (vcpu, rate) in counts {
            if let Some(place) = each.get_mut(*vcpu) {
                *place = *rate;
            }
        }
        Rate { name: (*name).clone(), each, sum: *sum }
    };
    Table {
        rows: all.iter().take(MAX_ROWS).map(row).collect(),
        more: all.len().saturating_sub(MAX_ROWS),
        sum: all.iter().fold(0, |sum, (_, rate, _)| sum.saturating_add(*rate)),
    }
}

impl Rates {
    fn new(before: &Counts, after: &Counts) -> Self {
        let ns = after.at_ns.saturating_sub(before.at_ns);
        Self {
            userspace: rates(&before.userspace, &after.userspace, after.vcpus, ns),
            kvm: rates(&before.kvm, &after.kvm, after.vcpus, ns),
        }
    }

    /// VM exits a second; `None` where KVM has no statistics, or none occurred.
    fn vm_exits(&self) -> Option<u64> {
        self.kvm.rows.iter().find(|rate| rate.name == "exits").map(|rate| rate.sum)
    }

    fn title(&self) -> String {
        let all = self.userspace.sum;
        let vm = self.vm_exits().map_or_else(|| "unknown".to_owned(), |exits| exits.to_string());
        format!("exits a second: VM exits {vm}, userspace exits {all} (each reading causes one a vCPU)")
    }

    fn text(&self) -> String {
        let mut text = self.title() + "\n";
        for (head, table) in [("userspace exits", &self.userspace), ("KVM's statistics", &self.kvm)] {
            let _ = writeln!(text, "{head:<44} {:>10}  by vCPU", "a second");
            for rate in &table.rows {
                let each: Vec<String> = rate.each.iter().map(ToString::to_string).collect();
                let _ = writeln!(text, "  {:<42} {:>10}  {}", rate.name, rate.sum, each.join(" "));
            }
            if table.more > 0 {
                let _ = writeln!(text, "  and {} causes with fewer", table.more);
            }
        }
        text
    }
}

/// Fetches the counts of the machine. A machine that has only just started is asked again for a second.
fn fetch(args: &Args) -> Result<Counts, ClientError> {
    let deadline = Instant::now() + STARTUP;
    loop {
        match request(&args.socket, Request::Exits) {
            Ok(Response::Exits(live)) => return Ok(live.into()),
            Ok(_) => return Err(ClientError::Mismatch { path: args.socket.clone() }),
            Err(ClientError::Refused(RequestError::NotRunning)) if Instant::now() < deadline => {
                std::thread::sleep(STARTUP / 50);
            }
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    let result = if args.once || !stdout().is_terminal() { once(args) } else { live(args) };
    match result {
        Ok(code) => code,
        Err(error) => fail(error.as_ref()),
    }
}

fn once(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let before = fetch(args)?;
    std::thread::sleep(args.interval);
    let rates = Rates::new(&before, &fetch(args)?);
    Ok(print_text(&rates.text()))
}

fn draw(frame: &mut Frame<'_>, rates: &Rates) {
    let [title, top, bottom] =
        Layout::vertical([Constraint::Length(2), Constraint::Percentage(60), Constraint::Fill(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(rates.title() + "   q ends").bold(), title);
    let table = |head: &'static str, rates: &Table| {
        let row = |rate: &Rate| {
            let each: Vec<String> = rate.each.iter().map(ToString::to_string).collect();
            Row::new([rate.name.clone(), rate.sum.to_string(), each.join(" ")])
        };
        let widths = [Constraint::Min(40), Constraint::Length(12), Constraint::Fill(1)];
        widgets::Table::new(rates.rows.iter().map(row), widths)
            .header(Row::new([head, "a second", "by vCPU"]).style(Style::new().reversed()))
    };
    frame.render_widget(table("userspace exits", &rates.userspace), top);
    frame.render_widget(table("KVM's statistics", &rates.kvm), bottom);
}

fn live(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let mut before = fetch(args)?;
    let mut terminal = ratatui::try_init()?;
    let mut rates = Rates::default();
    let result = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &rates)) {
            break Err(error.into());
        }
        match wait(args.interval) {
            Ok(Wait::Quit) => break Ok(ExitCode::SUCCESS),
            Ok(Wait::Elapsed) => {}
            Err(error) => break Err(error.into()),
        }
        match fetch(args) {
            Ok(now) => {
                rates = Rates::new(&before, &now);
                before = now;
            }
            Err(error) if is_end(&error) => break Ok(ExitCode::SUCCESS),
            Err(error) => break Err(error.into()),
        }
    };
    ratatui::restore();
    result
}

/// Returns true if `error` says that the run has ended: nothing listens any more, or the connection was closed on the way.
fn is_end(error: &ClientError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};
    match error {
        ClientError::Closed { .. } => true,
        ClientError::Connect { source, .. } => matches!(source.kind(), NotFound | ConnectionRefused),
        ClientError::Io { source, .. } => matches!(source.kind(), BrokenPipe | ConnectionReset),
        _ => false,
    }
}

/// What the user does until the next reading.
enum Wait {
    /// The interval has passed.
    Elapsed,
    /// The key that ends the program.
    Quit,
}

/// Waits for an interval, or for the key that ends the program (q, Escape, Ctrl-C).
fn wait(interval: Duration) -> std::io::Result<Wait> {
    let deadline = Instant::now() + interval;
    while event::poll(deadline.saturating_duration_since(Instant::now()))? {
        if let Event::Key(key) = event::read()? {
            let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(Wait::Quit);
            }
        }
    }
    Ok(Wait::Elapsed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{DeviceCount, UserspaceExits, VcpuExits};

    fn counts(at_ns: u64, writes: u64, exits: u64) -> Counts {
        let device = |bus, address, device: Option<&str>, reads, writes| DeviceCount {
            bus,
            address,
            device: device.map(str::to_owned),
            reads,
            writes,
        };
        let userspace = UserspaceExits {
            total: writes + 2,
            by_reason: BTreeMap::from([(ExitReason::PioOut, writes), (ExitReason::Interrupted, 2)]),
            by_device: vec![
                device(AccessSpace::Pio, 0x3f8, Some("UART 1"), 0, writes),
                device(AccessSpace::Mmio, 0xd000_0000, None, 1, 0),
                device(AccessSpace::Msr, 0x1b, None, 1, 0),
            ],
            beyond: 0,
        };
        let kvm = BTreeMap::from([("exits".to_owned(), exits)]);
        let vcpus = vec![VcpuExits { userspace_exits: Some(userspace), kvm }, VcpuExits::default()];
        LiveExits { at_ns, vcpus }.into()
    }

    #[test]
    fn every_access_has_a_name() {
        let names: Vec<String> = counts(0, 1, 1).userspace.into_keys().collect();
        let expected = ["interrupted", "mmio 0xd0000000 (unmapped) read", "msr 0x1b read", "pio 0x3f8 UART 1 write"];
        assert_eq!(names, expected);
    }

    #[test]
    fn rates_are_by_second_and_vcpu() {
        let before = counts(1_000_000_000, 10, 100);
        let after = counts(1_500_000_000, 30, 600);
        let rates = Rates::new(&before, &after);
        let expected = Rate { name: "pio 0x3f8 UART 1 write".into(), each: vec![40, 0], sum: 40 };
        assert_eq!((&rates.userspace.rows[..], rates.userspace.sum), (&[expected][..], 40));
        assert_eq!(rates.vm_exits(), Some(1000));
        assert!(rates.text().contains("VM exits 1000, userspace exits 40"), "{}", rates.text());
    }

    #[test]
    fn a_large_response_takes_no_more_memory_than_it_has() {
        // As of a machine that the guest has taken over: causes of one vCPU's, among many vCPUs.
        let live = |count: u64| {
            let kvm = (0..200_000).map(|number| (format!("\x1b{number}"), count)).collect();
            let full = VcpuExits { userspace_exits: None, kvm };
            let mut vcpus = vec![VcpuExits::default(); 253];
            vcpus.push(full);
            Counts::from(LiveExits { at_ns: count, vcpus })
        };
        let (before, after) = (live(1), live(u64::MAX));
        assert_eq!(after.kvm.values().map(Vec::len).sum::<usize>(), 200_000);
        let rates = Rates::new(&before, &after);
        assert_eq!((rates.kvm.rows.len(), rates.kvm.more, rates.kvm.sum), (1000, 199_000, 200_000 * 1_000_000_000));
        assert!(rates.kvm.rows.iter().all(|rate| rate.each.len() == 254));
        assert!(!rates.text().contains('\x1b') && rates.text().contains("and 199000 causes with fewer"));
    }

    #[test]
    fn counts_of_one_cause_do_not_wrap() {
        let other = |device| DeviceCount { bus: AccessSpace::Pio, address: 1, device, reads: u64::MAX, writes: 0 };
        let by_device = vec![other(Some("a".into())), other(Some("a".into()))];
        let userspace = UserspaceExits { by_device, ..UserspaceExits::default() };
        let vcpus = vec![VcpuExits { userspace_exits: Some(userspace), ..VcpuExits::default() }];
        let counts = Counts::from(LiveExits { at_ns: 1, vcpus });
        assert_eq!(counts.userspace["pio 0x1 a read"], [(0, u64::MAX)]);
    }

    #[test]
    fn only_the_end_of_the_run_ends_without_an_error() {
        let path = || PathBuf::from("/tmp/vm.sock");
        let connect = |kind: std::io::ErrorKind| ClientError::Connect { path: path(), source: kind.into() };
        use std::io::ErrorKind;
        assert!(is_end(&ClientError::Closed { path: path() }));
        assert!(is_end(&connect(ErrorKind::NotFound)) && is_end(&connect(ErrorKind::ConnectionRefused)));
        assert!(!is_end(&connect(ErrorKind::WouldBlock)) && !is_end(&connect(ErrorKind::PermissionDenied)));
        assert!(!is_end(&ClientError::TimedOut { path: path(), timeout: STARTUP }));
        assert!(!is_end(&ClientError::TooLong { path: path(), max_bytes: 1 }));
    }

    #[test]
    fn a_frame_is_drawn_on_any_size() {
        let before = counts(0, 0, 0);
        let rates = Rates::new(&before, &counts(1_000_000_000, 5, 7));
        for (width, height) in [(100, 30), (20, 4), (1, 1)] {
            let mut terminal =
                ratatui::Terminal::new(ratatui::backend::TestBackend::new(width, height)).expect("a terminal");
            terminal.draw(|frame| draw(frame, &rates)).expect("drawn");
            let text: String =
                terminal.backend().buffer().content().iter().map(ratatui::buffer::Cell::symbol).collect();
            assert!(width < 100 || (text.contains("UART 1 write") && text.contains("VM exits 7")), "{text}");
        }
    }
}
