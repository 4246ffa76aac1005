//! `hwvmm top`: what a running machine exits for, right now.

use super::output::{fail, print_all};
use crate::control::protocol::{Bus, LiveExits};
use crate::control::{ClientError, Request, RequestError, Response, request};
use crate::exit::ExitReason;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::widgets::{Paragraph, Row, Table};
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

/// Options of `hwvmm top`.
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

/// Counts of a machine at one moment, by cause. Each cause has one count a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Time since the vCPUs were started, in nanoseconds.
    at_ns: u64,
    /// Userspace exits.
    userspace: BTreeMap<String, Vec<u64>>,
    /// KVM's own counters, by the kernel's name.
    kvm: BTreeMap<String, Vec<u64>>,
}

/// Adds a vCPU's count to a cause.
fn add(causes: &mut BTreeMap<String, Vec<u64>>, vcpus: usize, cause: String, vcpu: usize, count: u64) {
    if count > 0
        && let Some(sum) = causes.entry(cause).or_insert_with(|| vec![0; vcpus]).get_mut(vcpu)
    {
        *sum += count;
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
                    (None, Bus::Msr) => String::new(),
                    (None, Bus::Pio | Bus::Mmio) => " (unmapped)".to_owned(),
                };
                for (count, access) in [(device.reads, "read"), (device.writes, "write")] {
                    let cause = format!("{} {:#x}{name} {access}", device.bus.name(), device.address);
                    add(&mut userspace, vcpus, cause, index, count);
                }
            }
            for (reason, count) in exits.by_reason.into_iter().filter(|(reason, _)| !is_access(*reason)) {
                add(&mut userspace, vcpus, reason.name().to_owned(), index, count);
            }
            for (name, count) in vcpu.kvm {
                add(&mut kvm, vcpus, name, index, count);
            }
        }
        Self { at_ns: live.at_ns, userspace, kvm }
    }
}

/// One row of the output: exits a second of one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rate {
    name: String,
    /// By vCPU.
    each: Vec<u64>,
    /// Of all vCPUs.
    sum: u64,
}

/// Rates between two readings, highest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rates {
    userspace: Vec<Rate>,
    kvm: Vec<Rate>,
}

fn rates(before: &BTreeMap<String, Vec<u64>>, after: &BTreeMap<String, Vec<u64>>, ns: u64) -> Vec<Rate> {
    let rate = |(name, counts): (&String, &Vec<u64>)| {
        let old = before.get(name);
        let of = |(vcpu, count): (usize, &u64)| {
            let more = count.saturating_sub(old.and_then(|old| old.get(vcpu)).copied().unwrap_or(0));
            u64::try_from(u128::from(more) * 1_000_000_000 / u128::from(ns.max(1))).unwrap_or(u64::MAX)
        };
        let each: Vec<u64> = counts.iter().enumerate().map(of).collect();
        Rate { name: name.clone(), sum: each.iter().fold(0, |sum, rate| sum.saturating_add(*rate)), each }
    };
    let mut rates: Vec<Rate> = after.iter().map(rate).filter(|rate| rate.sum > 0).collect();
    rates.sort_by(|a, b| b.sum.cmp(&a.sum).then_with(|| a.name.cmp(&b.name)));
    rates
}

impl Rates {
    fn new(before: &Counts, after: &Counts) -> Self {
        let ns = after.at_ns.saturating_sub(before.at_ns);
        Self { userspace: rates(&before.userspace, &after.userspace, ns), kvm: rates(&before.kvm, &after.kvm, ns) }
    }

    /// VM exits a second; `None` where KVM has no statistics, or none occurred.
    fn vm_exits(&self) -> Option<u64> {
        self.kvm.iter().find(|rate| rate.name == "exits").map(|rate| rate.sum)
    }

    fn title(&self) -> String {
        let all = self.userspace.iter().fold(0_u64, |sum, rate| sum.saturating_add(rate.sum));
        let vm = self.vm_exits().map_or_else(|| "unknown".to_owned(), |exits| exits.to_string());
        format!("exits a second: VM exits {vm}, userspace exits {all} (each reading causes one a vCPU)")
    }

    fn text(&self) -> String {
        let mut text = self.title() + "\n";
        for (head, rates) in [("userspace exits", &self.userspace), ("KVM's own figures", &self.kvm)] {
            let _ = writeln!(text, "{head:<44} {:>10}  by vCPU", "a second");
            for rate in rates {
                let each: Vec<String> = rate.each.iter().map(ToString::to_string).collect();
                let name: String = rate.name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
                let _ = writeln!(text, "  {name:<42} {:>10}  {}", rate.sum, each.join(" "));
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
    Ok(print_all(rates.text().as_bytes()))
}

fn draw(frame: &mut Frame<'_>, rates: &Rates) {
    let [title, top, bottom] =
        Layout::vertical([Constraint::Length(2), Constraint::Percentage(60), Constraint::Fill(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(rates.title() + "   q ends").bold(), title);
    let table = |head: &'static str, rates: &[Rate]| {
        let row = |rate: &Rate| {
            let each: Vec<String> = rate.each.iter().map(ToString::to_string).collect();
            Row::new([rate.name.clone(), rate.sum.to_string(), each.join(" ")])
        };
        let widths = [Constraint::Min(40), Constraint::Length(12), Constraint::Fill(1)];
        Table::new(rates.iter().map(row), widths)
            .header(Row::new([head, "a second", "by vCPU"]).style(Style::new().reversed()))
    };
    frame.render_widget(table("userspace exits", &rates.userspace), top);
    frame.render_widget(table("KVM's own figures", &rates.kvm), bottom);
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
            // The run has ended: so does this, without an error.
            Err(_) => break Ok(ExitCode::SUCCESS),
        }
    };
    ratatui::restore();
    result
}

/// What the user does until the next reading.
enum Wait {
    /// Nothing that matters.
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
    use crate::control::protocol::{DeviceExits, UserspaceExits, VcpuExits};

    fn counts(at_ns: u64, writes: u64, exits: u64) -> Counts {
        let device = |bus, address, device: Option<&str>, reads, writes| DeviceExits {
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
                device(Bus::Pio, 0x3f8, Some("UART 1"), 0, writes),
                device(Bus::Mmio, 0xd000_0000, None, 1, 0),
                device(Bus::Msr, 0x1b, None, 1, 0),
            ],
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
        assert_eq!(rates.userspace, [expected]);
        assert_eq!(rates.vm_exits(), Some(1000));
        assert!(rates.text().contains("VM exits 1000, userspace exits 40"), "{}", rates.text());
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
