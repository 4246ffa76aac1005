//! `hwvmm top`: what a running machine exits for, right now.

use super::ctl;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::widgets::{Paragraph, Row, Table};
use serde_json::Value;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{IsTerminal, stdout};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Options.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The socket that the machine was started with (--api)
    socket: PathBuf,

    /// Print one frame and end, for scripts
    #[arg(long)]
    once: bool,

    /// Seconds between two looks
    #[arg(long, default_value = "1", value_name = "SECONDS", value_parser = interval)]
    interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.1..=3600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("from 0.1 to 3600 seconds".into())
    }
}

/// Counts of a machine at one moment, by cause and vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    at_ns: u64,
    vcpus: usize,
    userspace: BTreeMap<String, Vec<u64>>,
    kvm: BTreeMap<String, Vec<u64>>,
}

impl Counts {
    fn parse(answer: &str) -> Result<Self, Box<dyn Error>> {
        let value: Value = serde_json::from_str(answer)?;
        if let Some(error) = value.get("error").and_then(Value::as_str) {
            return Err(error.into());
        }
        let vcpus = value.get("vcpus").and_then(Value::as_array).ok_or("the machine's answer has no vCPUs")?;
        let at_ns = value.get("at_ns").and_then(Value::as_u64).ok_or("the machine's answer has no time")?;
        let mut counts = Self { at_ns, vcpus: vcpus.len(), ..Self::default() };
        for (index, vcpu) in vcpus.iter().enumerate() {
            let add = |map: &mut BTreeMap<String, Vec<u64>>, name: String, count: u64| {
                map.entry(name).or_insert_with(|| vec![0; counts.vcpus])[index] += count;
            };
            let userspace = &vcpu["userspace_exits"];
            for device in userspace["by_device"].as_array().into_iter().flatten() {
                let (bus, address) = (device["bus"].as_str().unwrap_or("?"), device["address"].as_u64().unwrap_or(0));
                let name = format!("{bus} {address:#x} {}", device["device"].as_str().unwrap_or("(nobody)"));
                for (count, way) in [(&device["reads"], "read"), (&device["writes"], "write")] {
                    let count = count.as_u64().unwrap_or(0);
                    if count > 0 {
                        add(&mut counts.userspace, format!("{name} {way}"), count);
                    }
                }
            }
            // What is not an access to a device: kicks, halts, ...
            for (reason, count) in userspace["by_reason"].as_object().into_iter().flatten() {
                let access = ["pio_in", "pio_out", "mmio_read", "mmio_write", "msr_read", "msr_write"]
                    .contains(&reason.as_str());
                if !access {
                    add(&mut counts.userspace, reason.clone(), count.as_u64().unwrap_or(0));
                }
            }
            for (name, count) in vcpu["kvm"].as_object().into_iter().flatten() {
                add(&mut counts.kvm, name.clone(), count.as_u64().unwrap_or(0));
            }
        }
        Ok(counts)
    }
}

/// A line of a frame: what, and how often a second, by vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rate {
    name: String,
    each: Vec<u64>,
    sum: u64,
}

/// What happened between two looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Picture {
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

impl Picture {
    fn new(before: &Counts, after: &Counts) -> Self {
        let ns = after.at_ns.saturating_sub(before.at_ns);
        Self { userspace: rates(&before.userspace, &after.userspace, ns), kvm: rates(&before.kvm, &after.kvm, ns) }
    }

    /// VM exits a second, where KVM tells.
    fn vm_exits(&self) -> Option<u64> {
        self.kvm.iter().find(|rate| rate.name == "exits").map(|rate| rate.sum)
    }

    fn title(&self) -> String {
        let all = self.userspace.iter().fold(0_u64, |sum, rate| sum.saturating_add(rate.sum));
        let vm = self.vm_exits().map_or_else(|| "not told".to_owned(), |exits| exits.to_string());
        format!("exits a second: VM exits {vm}, userspace exits {all} (one of them a vCPU for each look)")
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

fn look(args: &Args) -> Result<Counts, Box<dyn Error>> {
    Counts::parse(&ctl::ask(&args.socket, "exits")?)
}

pub(super) fn run(args: &Args) -> ExitCode {
    let result = if args.once || !stdout().is_terminal() { once(args) } else { live(args) };
    match result {
        Ok(code) => code,
        Err(error) => super::fail(error.as_ref()),
    }
}

fn once(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let before = look(args)?;
    std::thread::sleep(args.interval);
    let picture = Picture::new(&before, &look(args)?);
    Ok(super::print_all(picture.text().as_bytes()))
}

fn draw(frame: &mut Frame<'_>, picture: &Picture) {
    let [title, top, bottom] =
        Layout::vertical([Constraint::Length(2), Constraint::Percentage(60), Constraint::Fill(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(picture.title() + "   q ends").bold(), title);
    let table = |head: &'static str, rates: &[Rate]| {
        let row = |rate: &Rate| {
            let each: Vec<String> = rate.each.iter().map(ToString::to_string).collect();
            Row::new([rate.name.clone(), rate.sum.to_string(), each.join(" ")])
        };
        let widths = [Constraint::Min(40), Constraint::Length(12), Constraint::Fill(1)];
        Table::new(rates.iter().map(row), widths)
            .header(Row::new([head, "a second", "by vCPU"]).style(Style::new().reversed()))
    };
    frame.render_widget(table("userspace exits", &picture.userspace), top);
    frame.render_widget(table("KVM's own figures", &picture.kvm), bottom);
}

fn live(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let mut before = look(args)?;
    let mut terminal = ratatui::try_init()?;
    let mut picture = Picture::default();
    let result = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &picture)) {
            break Err(error.into());
        }
        match wait(args.interval) {
            Ok(true) => break Ok(ExitCode::SUCCESS),
            Ok(false) => {}
            Err(error) => break Err(error.into()),
        }
        match look(args) {
            Ok(now) => {
                picture = Picture::new(&before, &now);
                before = now;
            }
            // The machine is gone: that is the end, and no failure.
            Err(_) => break Ok(ExitCode::SUCCESS),
        }
    };
    ratatui::restore();
    result
}

/// Waits for the next look; `true` where the user wants to end.
fn wait(interval: Duration) -> std::io::Result<bool> {
    let deadline = Instant::now() + interval;
    while event::poll(deadline.saturating_duration_since(Instant::now()))? {
        if let Event::Key(key) = event::read()? {
            let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            if control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(at_ns: u64, writes: u64, exits: u64) -> String {
        format!(
            r#"{{"at_ns":{at_ns},"vcpus":[{{"userspace_exits":{{"total":9,"by_reason":{{"pio_out":{writes},"interrupted":2}},
            "by_device":[{{"bus":"pio","address":1016,"device":"UART 1","reads":0,"writes":{writes}}}]}},
            "kvm":{{"exits":{exits}}}}},{{"userspace_exits":null,"kvm":{{}}}}]}}"#
        )
    }

    #[test]
    fn rates_are_by_second_and_vcpu() {
        let before = Counts::parse(&answer(1_000_000_000, 10, 100)).expect("counts");
        let after = Counts::parse(&answer(1_500_000_000, 30, 600)).expect("counts");
        let picture = Picture::new(&before, &after);
        let expected = Rate { name: "pio 0x3f8 UART 1 write".into(), each: vec![40, 0], sum: 40 };
        assert_eq!(picture.userspace, [expected]);
        assert_eq!(picture.vm_exits(), Some(1000));
        assert!(picture.text().contains("VM exits 1000, userspace exits 40"), "{}", picture.text());
    }

    #[test]
    fn a_frame_is_drawn_on_any_size() {
        let before = Counts::parse(&answer(0, 0, 0)).expect("counts");
        let picture = Picture::new(&before, &Counts::parse(&answer(1_000_000_000, 5, 7)).expect("counts"));
        for (width, height) in [(100, 30), (20, 4), (1, 1)] {
            let mut terminal =
                ratatui::Terminal::new(ratatui::backend::TestBackend::new(width, height)).expect("a terminal");
            terminal.draw(|frame| draw(frame, &picture)).expect("drawn");
            let text: String =
                terminal.backend().buffer().content().iter().map(ratatui::buffer::Cell::symbol).collect();
            assert!(width < 100 || (text.contains("UART 1 write") && text.contains("VM exits 7")), "{text}");
        }
    }

    #[test]
    fn a_strange_answer_is_an_error() {
        assert!(Counts::parse("{\"error\":\"no\"}").is_err_and(|error| error.to_string() == "no"));
        assert!(Counts::parse("{}").is_err() && Counts::parse("").is_err());
    }
}
